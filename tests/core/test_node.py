"""The life of snapshots: the machine as a table of events and actions. (Whole clusters of it: test_sim.py.)"""

from __future__ import annotations

import pytest

from ckptd.core.ladder import Fragment
from ckptd.core.node import (
    COMMITTED,
    DOOMED_KEPT,
    FILLING,
    PERSIST,
    PROTECT,
    SEALED,
    Asked,
    AttemptBegan,
    Chosen,
    DoPart,
    ErrandDone,
    ErrandFailed,
    Filled,
    Forget,
    FragmentFound,
    Hash,
    Hashed,
    Node,
    PartDone,
    PeerSealed,
    Release,
    RestoreFailed,
    Skipped,
    SlotRef,
    TellPeers,
    TellRanks,
    Tick,
    Told,
    WriteManifest,
    check,
)
from ckptd.core.stripes import Member

J = "job"


# --- the table: events -> actions ---------------------------------------------------------------------------------------------


def ref(step: int, rank: int = 0, gen: int | None = None) -> SlotRef:
    return SlotRef(f"a{rank}", step % 3, step if gen is None else gen)


def filled(step, rank=0, *, attempt=1, ranks=1, node=0, nodes=1, gen=None):
    return Filled(J, attempt, step, rank, ranks * nodes, ranks, node, nodes, ref(step, rank, gen), 100)


def hashed(step, rank=0, *, attempt=1, gen=None):
    return Hashed(J, attempt, step, rank, ref(step, rank, gen))


def run(machine: Node, *events, at: float = 0.0) -> list:
    """The last event's actions."""
    actions: list = []
    for event in events:
        actions = machine.receive(event, at)
        check(machine)
    return actions


def began(attempt=1, node=0, nodes=1):
    return AttemptBegan(J, attempt, node, nodes)


def sealed_here(machine, step, *, attempt=1, node=0, nodes=1):
    return run(machine, filled(step, attempt=attempt, node=node, nodes=nodes), hashed(step, attempt=attempt))


def state_of(machine, step, attempt=1):
    snapshot = machine.jobs[J].snapshots.get((attempt, step))
    return snapshot.state if snapshot else None


def told(what, step, errand=""):
    return TellPeers(J, 1, step, what, errand)


def test_filled_asks_for_a_hash_and_doubles_change_nothing():
    m = Node()
    assert run(m, began(), filled(1)) == [Hash(J, 1, 1, 0, ref(1), 100)]
    assert run(m, filled(1)) == []
    assert state_of(m, 1) == FILLING


def test_all_local_ranks_seal_and_one_node_commits():
    m = Node()
    run(m, began(), filled(1, 0, ranks=2), filled(1, 1, ranks=2))
    assert run(m, hashed(1, 0)) == []
    assert run(m, hashed(1, 1)) == [TellRanks(J, 1, 1, COMMITTED)]
    assert run(m, hashed(1, 1)) == []
    assert (m.jobs[J].counters.sealed, m.jobs[J].counters.committed) == (1, 1)


def test_sealed_waits_for_every_node():
    m = Node()
    run(m, began(nodes=3), filled(1, nodes=3))
    assert run(m, hashed(1)) == [told("sealed", 1)]
    assert state_of(m, 1) == SEALED
    assert run(m, PeerSealed(J, 1, 1, 1)) == []
    assert run(m, PeerSealed(J, 1, 1, 1)) == [], "a node that says it twice is one node"
    assert run(m, PeerSealed(J, 1, 1, 0)) == [], "our own number is no other node"
    assert run(m, PeerSealed(J, 1, 1, 7)) == [], "a node that the job does not have"
    assert run(m, PeerSealed(J, 1, 1, -1)) == []
    assert run(m, PeerSealed(J, 1, 1, 2)) == [TellRanks(J, 1, 1, COMMITTED)]


def test_peers_may_seal_first():
    m = Node()
    run(m, began(nodes=2), PeerSealed(J, 1, 1, 1), filled(1, nodes=2))
    assert run(m, hashed(1)) == [told("sealed", 1), TellRanks(J, 1, 1, COMMITTED)]


def test_a_newer_commit_releases_the_older_one_and_only_then():
    m = Node()
    run(m, began(nodes=2))
    sealed_here(m, 1, nodes=2)
    run(m, PeerSealed(J, 1, 1, 1))
    assert sealed_here(m, 2, nodes=2) == [told("sealed", 2)]
    assert state_of(m, 1) == COMMITTED
    assert run(m, PeerSealed(J, 1, 2, 1)) == [TellRanks(J, 1, 2, COMMITTED), Release(ref(1))]
    assert run(m, PeerSealed(J, 1, 1, 1)) == []
    assert run(m, filled(1, gen=77)) == [Release(ref(1, gen=77))], "superseded before it came"


def test_a_skipped_snapshot_is_released_everywhere_and_late_images_at_once():
    m = Node()
    run(m, began(nodes=2), filled(1, 0, ranks=2, nodes=2))
    assert run(m, Skipped(J, 1, 1)) == [Release(ref(1, 0)), TellRanks(J, 1, 1, "skipped"), told("skipped", 1)]
    assert run(m, Skipped(J, 1, 1)) == []
    assert run(m, filled(1, 1, ranks=2, nodes=2)) == [Release(ref(1, 1))]
    assert run(m, Skipped(J, 1, 2, 1)) == [TellRanks(J, 1, 2, "skipped")], "a peer's skip is not told on"


def test_a_committed_snapshot_cannot_be_skipped():
    m = Node()
    run(m, began())
    sealed_here(m, 1)
    assert run(m, Skipped(J, 1, 1)) == []
    assert state_of(m, 1) == COMMITTED


def test_a_peer_that_seals_a_doomed_step_is_told_again():
    m = Node()
    assert run(m, began(nodes=2), Skipped(J, 1, 1), PeerSealed(J, 1, 1, 1)) == [told("skipped", 1)]


def test_a_rank_that_is_past_a_step_without_an_image_skipped_it():
    """Its notice died with a daemon. Without this, the other ranks' slots are held for ever."""
    m = Node()
    run(m, began(nodes=2), filled(1, 0, ranks=2, nodes=2))
    actions = run(m, filled(2, 1, ranks=2, nodes=2))
    assert Release(ref(1, 0)) in actions
    assert told("skipped", 1) in actions
    m = Node()
    run(m, began(nodes=2), filled(2, 1, ranks=2, nodes=2))
    assert run(m, filled(1, 0, ranks=2, nodes=2))[1:] == [Release(ref(1, 0)), TellRanks(J, 1, 1, "skipped"), told("skipped", 1)]


def test_a_peers_step_that_we_are_past_is_told_as_skipped():
    m = Node()
    run(m, began(nodes=2), filled(5, nodes=2))
    assert told("skipped", 4) in run(m, PeerSealed(J, 1, 4, 1))
    assert run(m, PeerSealed(J, 1, 6, 1)) == [], "we may still come to it"
    assert told("skipped", 6) in run(m, Skipped(J, 1, 7))


def test_a_new_attempt_releases_what_can_never_be_complete():
    m = Node()
    run(m, began())
    sealed_here(m, 1)
    run(m, filled(2, 0, ranks=2))
    assert run(m, began(2)) == [Release(ref(2, 0))]
    assert state_of(m, 1) == COMMITTED
    assert run(m, began(1)) == []
    assert m.jobs[J].counters.fenced == 1


def test_a_successor_that_learns_of_the_attempt_before_all_arenas_are_back_releases_nothing():
    """The only step of a job that restarted and did not commit yet: rank 0's arena comes with its Join, rank 1's later."""
    m = Node()
    run(m, filled(7, 0, attempt=4, ranks=2))
    assert run(m, began(5)) == []
    run(m, Chosen(J, 5, (4, 7)))
    run(m, filled(7, 1, attempt=4, ranks=2), hashed(7, 0, attempt=4))
    run(m, hashed(7, 1, attempt=4))
    assert state_of(m, 7, 4) == COMMITTED
    assert m.jobs[J].committed == (4, 7)
    assert run(m, filled(6, 1, attempt=4, ranks=2)) == [Release(ref(6, 1))], "not chosen"


def test_between_attempt_and_choice_nothing_is_committed_or_released():
    m = Node()
    run(m, began(nodes=2))
    sealed_here(m, 1, nodes=2)
    run(m, PeerSealed(J, 1, 1, 1))
    sealed_here(m, 2, nodes=2)
    assert run(m, began(2, nodes=2), PeerSealed(J, 1, 2, 1)) == [], "the restore may be reading step 1"
    assert state_of(m, 1) == COMMITTED
    assert run(m, Chosen(J, 2, (1, 1))) == [Release(ref(2))]
    assert m.jobs[J].committed == (1, 1)


def test_renumbered_nodes_do_not_complete_an_old_attempts_snapshot():
    m = Node()
    run(m, began(nodes=3))
    sealed_here(m, 1, nodes=3)
    run(m, PeerSealed(J, 1, 1, 2), began(2, nodes=3))
    assert run(m, PeerSealed(J, 1, 1, 1)) == [], "node 1 of attempt 2 was node 2 of attempt 1"
    assert state_of(m, 1) == SEALED


@pytest.mark.parametrize("source", [None, (1, 1), (1, 2)])
def test_a_restores_choice_is_committed_and_everything_else_is_released(source):
    m = Node()
    run(m, began(nodes=2))
    sealed_here(m, 1, nodes=2)
    sealed_here(m, 2, nodes=2)
    actions = run(m, began(2, nodes=2), Chosen(J, 2, source))
    assert {a.ref for a in actions if isinstance(a, Release)} == {ref(s) for s in (1, 2) if (1, s) != source}
    assert m.jobs[J].committed == source
    assert run(m, Chosen(J, 2, source)) == []
    assert run(m, Chosen(J, 1, None)) == []


def test_a_choice_repeated_late_does_not_turn_back():
    m = Node()
    run(m, began())
    sealed_here(m, 1)
    run(m, began(2), Chosen(J, 2, (1, 1)))
    sealed_here(m, 2, attempt=2)
    run(m, Chosen(J, 2, (1, 1)))
    assert m.jobs[J].committed == (2, 2)


def test_a_zombies_image_is_released():
    m = Node()
    run(m, began(), began(2), Chosen(J, 2, None))
    assert run(m, filled(9)) == [Release(ref(9))]
    assert run(m, Skipped(J, 1, 9)) == []
    assert run(m, PeerSealed(J, 1, 9, 1)) == []


def test_an_old_image_that_could_not_be_sealed_is_released():
    """A successor adopts a damaged slot of the last attempt: it must not be held for ever."""
    m = Node()
    run(m, began(5), filled(7, attempt=4))
    assert run(m, Skipped(J, 4, 7)) == [Release(ref(7))]


def test_persist_is_written_where_it_is_committed_and_held_until_then():
    m = Node()
    run(m, began())
    assert run(m, Asked(J, 1, 1)) == []
    assert sealed_here(m, 1) == [TellRanks(J, 1, 1, COMMITTED), DoPart(J, 1, 1, PERSIST, ((0, ref(1), 100),))]
    assert sealed_here(m, 2) == [TellRanks(J, 1, 2, COMMITTED)], "step 1 is being written"
    assert run(m, Asked(J, 1, 1)) == [], "that is being done"
    assert run(m, PartDone(J, 1, 1)) == [WriteManifest(J, 1, 1, 1)]
    assert run(m, PartDone(J, 1, 1)) == []
    assert run(m, ErrandDone(J, 1, 1)) == [TellRanks(J, 1, 1, "persisted"), Release(ref(1))]
    assert run(m, ErrandDone(J, 1, 1)) == []
    assert run(m, ErrandFailed(J, 1, 1, "late")) == []
    assert run(m, Asked(J, 1, 1)) == [], "that was done"
    assert m.jobs[J].counters.persisted == 1
    assert m.jobs[J].counters.persist_failed == 0


def test_the_next_wish_waits_and_failures_and_deadlines_release():
    m = Node(persist_timeout_s=10)
    run(m, began(), Asked(J, 1, 1))
    sealed_here(m, 1)
    sealed_here(m, 2)
    assert run(m, Asked(J, 1, 2)) == []
    actions = run(m, ErrandFailed(J, 1, 1, "full"))
    assert actions == [TellRanks(J, 1, 1, "persist failed: full"), Release(ref(1)), DoPart(J, 1, 2, PERSIST, ((0, ref(2), 100),))]
    sealed_here(m, 3)
    assert run(m, Tick(), at=10.0) == []
    assert Release(ref(2)) in run(m, Tick(), at=10.1)
    assert run(m, PartDone(J, 1, 2)) == []


def test_node_0_decides_what_is_persisted_before_it_tells_that_it_sealed():
    m = Node()
    run(m, began(nodes=2), Asked(J, 1, 1))
    assert sealed_here(m, 1, nodes=2) == [told("told", 1, PERSIST), told("sealed", 1)]
    run(m, PeerSealed(J, 1, 1, 1))
    assert run(m, PartDone(J, 1, 1, PERSIST, 1)) == []
    assert run(m, PartDone(J, 1, 1)) == [WriteManifest(J, 1, 1, 2)]
    assert told("done", 1, PERSIST) in run(m, ErrandDone(J, 1, 1))


def test_a_wish_of_an_old_attempt_is_none():
    """It may be for a step that this attempt comes to in a week, and newer wishes wait for it."""
    m = Node()
    run(m, began(2), Asked(J, 1, 500), Asked(J, 2, 1))
    assert sealed_here(m, 1, attempt=2)[1:] == [DoPart(J, 2, 1, PERSIST, ((0, ref(1), 100),))]


def test_the_others_ask_and_obey():
    m = Node()
    run(m, began(node=1, nodes=2))
    assert run(m, Asked(J, 1, 1)) == [told("asked", 1, PERSIST)]
    assert run(m, Told(J, 1, 1)) == []
    run(m, filled(1, node=1, nodes=2), hashed(1))
    assert run(m, PeerSealed(J, 1, 1, 0))[1:] == [DoPart(J, 1, 1, PERSIST, ((0, ref(1), 100),))]
    assert run(m, Told(J, 1, 1)) == []
    assert run(m, PartDone(J, 1, 1)) == [told("part", 1, PERSIST)]
    assert told("part", 1, PERSIST) in m.greeting(J)
    run(m, filled(2, node=1, nodes=2), hashed(2), PeerSealed(J, 1, 2, 0))
    assert state_of(m, 1) == COMMITTED
    assert Release(ref(1)) in run(m, ErrandDone(J, 1, 1, here=False))
    assert run(m, Told(J, 1, 1)) == [told("failed", 1, PERSIST)], "it is gone"


def test_a_decided_step_that_a_rank_skipped_gives_way_to_the_next():
    m = Node()
    run(m, began(nodes=2), Asked(J, 1, 1))
    sealed_here(m, 1, nodes=2)
    run(m, Skipped(J, 1, 1, 1))
    assert told("told", 2, PERSIST) in sealed_here(m, 2, nodes=2)


def test_a_decided_step_that_was_overtaken_gives_way_to_the_newer_one():
    """Two images are hashed at a time, so node 1 may seal step 2 before step 1, and 2 is committed first. The wish is not lost, and nothing failed."""
    zero, one = Node(), Node()
    run(zero, began(nodes=2), Asked(J, 1, 1))
    assert sealed_here(zero, 1, nodes=2) == [told("told", 1, PERSIST), told("sealed", 1)]
    sealed_here(zero, 2, nodes=2)
    run(one, began(node=1, nodes=2), Told(J, 1, 1), PeerSealed(J, 1, 1, 0), PeerSealed(J, 1, 2, 0))
    run(one, filled(1, node=1, nodes=2), filled(2, node=1, nodes=2))
    assert told("failed", 1, PERSIST) in run(one, hashed(2))
    actions = run(zero, PeerSealed(J, 1, 2, 1))
    assert told("told", 2, PERSIST) in actions
    assert [a.step for a in actions if isinstance(a, DoPart)] == [2]
    assert run(zero, ErrandFailed(J, 1, 1, "node 1 could not", here=False)) == []
    assert [a.step for a in run(one, Told(J, 1, 2)) if isinstance(a, DoPart)] == [2]
    assert [m.jobs[J].counters.persist_failed for m in (zero, one)] == [0, 0]


FRAGMENT = Fragment(2, 1, 0, (Member(((0, 100),)), Member(((1, 100),))))
PARITY = SlotRef("f0", 0, 1)


def placed(step, ref=PARITY, attempt=1):
    return PartDone(J, attempt, step, PROTECT, ref=ref, fragment=FRAGMENT)


def protecting(node=0):
    m = Node()
    run(m, AttemptBegan(J, 1, node, 2, protect=True), Chosen(J, 1, None))
    return m


def commit_of_two(m, step, node=0):
    sealed_here(m, step, node=node, nodes=2)
    return run(m, PeerSealed(J, 1, step, 1 - node))


def test_every_step_is_to_be_protected_and_node_0_says_which():
    m = protecting()
    assert sealed_here(m, 1, nodes=2) == [told("told", 1, PROTECT), told("sealed", 1)]
    assert DoPart(J, 1, 1, PROTECT, ((0, ref(1), 100),)) in run(m, PeerSealed(J, 1, 1, 1))
    assert run(m, placed(1)) == []
    assert run(m, PartDone(J, 1, 1, PROTECT, 1)) == [TellRanks(J, 1, 1, "protected"), told("done", 1, PROTECT)]
    assert m.jobs[J].protected == (1, 1)
    assert m.holdings(J)[0].fragments == (FRAGMENT,)


def test_the_protected_step_and_its_parity_stay_until_a_newer_one_is():
    m = protecting()
    commit_of_two(m, 1)
    run(m, placed(1), PartDone(J, 1, 1, PROTECT, 1))
    assert not [a for a in commit_of_two(m, 2) if isinstance(a, Release)]
    assert state_of(m, 1) == COMMITTED
    run(m, placed(2, SlotRef("f0", 1, 1)))
    actions = run(m, PartDone(J, 1, 2, PROTECT, 1))
    assert {a.ref for a in actions if isinstance(a, Release)} == {ref(1), PARITY}


def test_who_said_that_its_part_is_done_does_not_take_it_back():
    m = protecting(node=1)
    m.timeouts_s[PROTECT] = 10
    run(m, Told(J, 1, 1, PROTECT))
    commit_of_two(m, 1, node=1)
    assert run(m, placed(1)) == [told("part", 1, PROTECT)]
    assert run(m, Tick(), at=1000.0) == []
    assert run(m, ErrandFailed(J, 1, 1, "node 0 could not", PROTECT, here=False))[-1] == Release(PARITY)


def test_a_fragment_that_comes_too_late_is_released():
    m = protecting()
    commit_of_two(m, 1)
    run(m, AttemptBegan(J, 2, 0, 2, protect=True))
    assert run(m, placed(1)) == [Release(PARITY)]
    assert run(m, placed(7)) == [Release(PARITY)], "of a step that nobody knows"


def test_a_restore_says_what_is_protected_and_everything_else_goes():
    m = protecting()
    commit_of_two(m, 1)
    run(m, placed(1), PartDone(J, 1, 1, PROTECT, 1))
    commit_of_two(m, 2)
    run(m, AttemptBegan(J, 2, 0, 2, protect=True))
    assert run(m, Chosen(J, 2, (1, 2), (1, 1))) == []
    again = protecting()
    commit_of_two(again, 1)
    run(again, placed(1), PartDone(J, 1, 1, PROTECT, 1), AttemptBegan(J, 2, 0, 2, protect=True))
    assert {a.ref for a in run(again, Chosen(J, 2, None)) if isinstance(a, Release)} == {ref(1), PARITY}


def test_a_successor_takes_adopted_parity_for_its_part():
    m = Node()
    run(m, FragmentFound(J, 1, 1, PARITY, FRAGMENT), filled(1, nodes=2), hashed(1))
    actions = run(m, AttemptBegan(J, 1, 0, 2, protect=True))
    assert told("told", 1, PROTECT) in actions
    assert run(m, Chosen(J, 1, None), PeerSealed(J, 1, 1, 1)) == [TellRanks(J, 1, 1, COMMITTED)], "no new part is computed"
    assert TellRanks(J, 1, 1, "protected") in run(m, PartDone(J, 1, 1, PROTECT, 1))


@pytest.mark.parametrize("before_its_image", [True, False])
def test_a_peer_that_lost_what_has_parity_is_a_lost_member_and_no_skip(before_its_image):
    """All daemons are new, and node 1's image of the PROTECTED step is damaged: it says "skipped". Node 0 holds on to what decodes it."""
    m = Node()
    mine = [filled(1, nodes=2), hashed(1)]
    skipped = [AttemptBegan(J, 1, 0, 2, protect=True, protected=(1, 1)), Skipped(J, 1, 1, 1)]
    run(m, FragmentFound(J, 1, 1, PARITY, FRAGMENT))
    for event in [*skipped, *mine] if before_its_image else [*mine, *skipped]:
        assert not [a for a in run(m, event) if isinstance(a, Release)]
    assert m.holdings(J)[0].fragments == (FRAGMENT,)
    assert m.holdings(J)[0].ranks == (0,)
    run(m, Chosen(J, 1, None))
    commit_of_two(m, 2)
    run(m, placed(2, SlotRef("f0", 1, 1)))
    assert {a.ref for a in run(m, PartDone(J, 1, 2, PROTECT, 1)) if isinstance(a, Release)} == {ref(1), PARITY}, "until a newer one is PROTECTED"


def test_what_a_peer_lost_is_not_to_be_protected_again():
    m = Node()
    run(m, FragmentFound(J, 1, 1, PARITY, FRAGMENT), AttemptBegan(J, 1, 0, 2, protect=True), Chosen(J, 1, None), Skipped(J, 1, 1, 1))
    assert run(m, filled(1, nodes=2), hashed(1)) == [told("sealed", 1)], "its own part of it is lost"
    assert told("told", 2, PROTECT) in sealed_here(m, 2, nodes=2)


def test_a_successor_of_node_0_takes_over_what_was_being_persisted():
    m = Node()
    run(m, began(nodes=2))
    sealed_here(m, 1, nodes=2)
    actions = run(m, PartDone(J, 1, 1, PERSIST, 1))
    assert told("told", 1, PERSIST) in actions
    assert DoPart(J, 1, 1, PERSIST, ((0, ref(1), 100),)) in actions, "who does its part has committed it"
    assert run(m, PartDone(J, 1, 1)) == [WriteManifest(J, 1, 1, 2)]
    run(m, ErrandDone(J, 1, 1))
    assert run(m, PartDone(J, 1, 1, PERSIST, 1)) == [told("done", 1, PERSIST)], "it did not hear"
    assert run(m, PartDone(J, 1, 9, PERSIST, 1)) == [told("failed", 9, PERSIST)], "nobody here knows it"


def test_greeting_tells_everything_that_may_have_been_lost():
    m = Node()
    run(m, began(nodes=2), Asked(J, 1, 2), Skipped(J, 1, 1))
    sealed_here(m, 2, nodes=2)
    run(m, filled(3, nodes=2))
    assert m.greeting(J) == [told("told", 2, PERSIST), told("skipped", 1), told("sealed", 2)]
    assert m.greeting("none") == []


def test_holdings_are_what_is_sealed():
    m = Node()
    run(m, began(), filled(2, 0, ranks=2))
    sealed_here(m, 1)
    assert [(h.step, h.ranks, h.state) for h in m.holdings(J)] == [(1, (0,), COMMITTED)]
    assert m.holdings("none") == []


def test_failed_restores_are_remembered_and_forget_releases_all():
    m = Node()
    run(m, began())
    sealed_here(m, 1)
    assert run(m, RestoreFailed(J, 1, 1, "memory")) == []
    assert m.jobs[J].failed == {(1, 1, "memory")}
    assert run(m, Forget(J)) == [Release(ref(1))]
    assert m.jobs == {}


def test_jobs_do_not_touch_each_other():
    m = Node()
    run(m, began())
    sealed_here(m, 1)
    m.receive(AttemptBegan("other", 9, 0, 1), 0.0)
    m.receive(Filled("other", 9, 1, 0, 1, 1, 0, 1, SlotRef("b", 0, 1), 5), 0.0)
    assert m.receive(Forget("other"), 0.0) == [Release(SlotRef("b", 0, 1))]
    assert state_of(m, 1) == COMMITTED


def test_memory_of_the_machine_is_bounded():
    m = Node()
    run(m, began(nodes=2))
    for step in range(5 * DOOMED_KEPT):
        m.receive(PeerSealed(J, 1, step, 1), 0.0)
        m.receive(Skipped(J, 1, step, 1), 0.0)
        m.receive(PeerSealed(J, 1, 10_000 + step, 1), 0.0)
    job = m.jobs[J]
    assert len(job.doomed) <= DOOMED_KEPT
    assert len(job.peers_sealed) <= DOOMED_KEPT
    assert len(job.passed) <= 2


def test_more_images_than_local_ranks_are_refused():
    m = Node()
    run(m, began(), filled(1, 0))
    assert run(m, filled(1, 1)) == [Release(ref(1, 1))]
