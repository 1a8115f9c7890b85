"""The life of snapshots: the machine as a table of events and actions, and a simulated cluster that keeps its own truth.

The simulation (`World`): nodes with their `Node`, ranks with slots as bytes would lie in an arena, links that lose, double and reorder.
A world is one seed and one `Setup`; a failure prints both. Replay one:  SIM_SEED=17 pytest tests/core/test_node.py -k sim
"""

from __future__ import annotations

import os
import random
from collections import defaultdict, deque
from dataclasses import dataclass, field

import pytest

from ckptd.core.ladder import Fragment, guarded, rungs
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


# --- the simulation -----------------------------------------------------------------------------------------------------------


class Broken(AssertionError):
    """An invariant of the world does not hold."""


@dataclass(frozen=True)
class Setup:
    nodes: int
    ranks: int
    slots: int
    loss: float = 0.05
    double: float = 0.05
    reorder: float = 0.05
    protect: bool = False

    @staticmethod
    def of(rng: random.Random) -> Setup:
        rate = lambda: rng.choice([0.0, 0.02, 0.1])
        nodes, ranks, protect = rng.choice([1, 2, 2, 3, 3, 4]), rng.choice([1, 1, 2, 2, 3]), rng.random() < 0.7
        protect = protect and nodes > 1
        return Setup(nodes, ranks, rng.choice([3, 4] if protect else [2, 3]), rate(), rate(), rate(), protect)


@dataclass
class Slot:
    """What lies in memory: it outlives trainer and daemon."""

    state: str = "EMPTY"
    gen: int = 0
    key: tuple[int, int] = (0, 0)
    place: tuple[int, int, int, int] = (1, 1, 0, 1)
    """world_size, local_count, node, nodes: a slot's header says what its attempt was like."""
    released: int = 0
    sealed: int = 0
    fragment: Fragment | None = None
    """What a fragment's own header says of it."""

    @property
    def free(self) -> bool:
        return self.state in {"EMPTY", "VOID"} or (self.state == "FILLED" and self.released == self.gen)

    @property
    def held(self) -> bool:
        return self.state == "FILLED" and self.released != self.gen


@dataclass
class Rank:
    """A trainer: it fills, flips, tells; and knows nothing else."""

    slots: list[Slot]
    step: int = 0
    filling: int = -1
    joined: bool = True
    chose: bool = True
    protected: tuple[int, int] | None = None
    """The newest PROTECTED step that it was told of."""


@dataclass
class Machine:
    node: Node | None
    number: int
    ranks: list[Rank]
    fragments: list[Slot] = field(default_factory=lambda: [Slot(), Slot()])
    """Parity, of which the newest and its successor fit."""
    work: list = field(default_factory=list)
    """Events that the daemon owes itself: hashes, writes. They die with it."""


class World:
    """A job on some nodes. All randomness from one seed; all truth from the slots."""

    def __init__(self, seed: int, setup: Setup | None = None, machine: type[Node] = Node) -> None:
        self.rng = random.Random(seed)
        self.setup = setup or Setup.of(self.rng)
        self.make = lambda: machine(persist_timeout_s=50.0, protect_timeout_s=5.0)
        self.now_s = 0.0
        self.faults = True
        self.attempt = 1
        self.known_failed: set = set()
        self.machines = [
            Machine(self.make(), n, [Rank([Slot() for _ in range(self.setup.slots)]) for _ in range(self.setup.ranks)])
            for n in range(self.setup.nodes)
        ]
        self.links: dict[tuple[int, int], deque] = {(a, b): deque() for a in range(len(self.machines)) for b in range(len(self.machines)) if a != b}
        self.late: list = []
        self.sealed_by: dict = defaultdict(set)
        self.newest = None
        """What must be held by all: the newest step that every node sealed, or the restore's choice."""
        self.releases: set = set()
        self.written: dict = defaultdict(set)
        self.manifests: set = set()
        self.commits: dict = defaultdict(set)
        self.done: set = set()
        self.protected = None
        """The newest step of which some node said that it is PROTECTED, and who must hold it."""
        self.protectors: set = set()
        self.losses = self.protections = 0
        self.trace: deque = deque(maxlen=60)
        for n in range(len(self.machines)):
            for r in range(self.setup.ranks):
                self.send(n, AttemptBegan(J, 1, n, self.setup.nodes, self.setup.protect, None, r, self.setup.ranks))
                self.send(n, Chosen(J, 1, None))

    # --- truth

    def arena(self, n: int, r: int) -> str:
        return f"n{n}r{r}"

    def holds(self, n: int, key) -> bool:
        return all(any(s.held and s.key == key for s in rank.slots) for rank in self.machines[n].ranks)

    def guards(self, n: int, key) -> bool:
        return self.holds(n, key) and any(s.held and s.key == key for s in self.machines[n].fragments)

    def fragment(self, n: int) -> Fragment:
        """All nodes are one group that may lose one; positions are the numbers of this attempt."""
        order = sorted(range(len(self.machines)), key=lambda i: self.machines[i].number)
        members = tuple(Member(tuple((i * self.setup.ranks + r, 1) for r in range(self.setup.ranks))) for i in order)
        return Fragment(self.setup.nodes * self.setup.ranks, 1, self.machines[n].number, members)

    def sealed(self, n: int, key) -> bool:
        return all(any(s.held and s.key == key and s.sealed == s.gen for s in rank.slots) for rank in self.machines[n].ranks)

    def look(self) -> None:
        """Check the promises against the slots."""
        for n, m in enumerate(self.machines):
            for key in {s.key for s in m.ranks[0].slots if s.held and s.key[0] == self.attempt}:
                if self.sealed(n, key):
                    self.sealed_by[key].add(n)
                    if len(self.sealed_by[key]) == len(self.machines) and (self.newest is None or key > self.newest):
                        self.newest = key
            if m.node is not None:
                check(m.node)
                for snapshot in m.node.jobs[J].snapshots.values() if J in m.node.jobs else ():
                    for r, image in snapshot.images.items():
                        slot = m.ranks[r % self.setup.ranks].slots[image.ref.slot]
                        if (n, image.ref) in self.releases or not slot.held or slot.gen != image.ref.gen:
                            raise Broken(f"N2: node {n} counts on {image.ref} of {snapshot.key}, which was released")
        if self.protected is not None:
            lost = [n for n in self.protectors if not self.guards(n, self.protected)]
            if lost:
                raise Broken(f"N4: {self.protected} was PROTECTED, and nodes {lost} hold it or its fragment no more")
        if self.newest is not None:
            lost = [n for n in range(len(self.machines)) if not self.holds(n, self.newest)]
            if lost:
                raise Broken(f"N1: {self.newest} was sealed by all, and nodes {lost} hold it no more")

    # --- events in, actions out

    def send(self, n: int, event) -> None:
        m = self.machines[n]
        if m.node is None:
            return
        job = m.node.jobs.get(J)
        old = job is not None and getattr(event, "attempt", 1 << 30) < job.attempt
        before = self.picture(job) if old and isinstance(event, (PeerSealed, Skipped)) else None
        actions = m.node.receive(event, self.now_s)
        self.trace.append((n, event, actions))
        if before is not None and (self.picture(job) != before or actions):
            raise Broken(f"N3: {event} of an old attempt changed node {n}: {actions}")
        for action in actions:
            self.perform(n, action)
        self.look()

    @staticmethod
    def picture(job):
        return {k: (s.state, tuple(s.images)) for k, s in job.snapshots.items()}, job.committed, job.attempt, tuple(job.doomed)

    def perform(self, n: int, action) -> None:
        m = self.machines[n]
        match action:
            case Hash():
                m.work.append(action)
            case Release():
                if (n, action.ref) in self.releases:
                    raise Broken(f"N2: {action.ref} released twice")
                self.releases.add((n, action.ref))
                slot = self.slot(n, action.ref)
                if slot.gen == action.ref.gen:
                    slot.released = action.ref.gen
            case TellPeers():
                for other in range(len(self.machines)):
                    if other != n and (action.what not in {"part", "asked"} or self.machines[other].number == 0):
                        self.links[n, other].append(action)
            case TellRanks():
                if action.state == COMMITTED:
                    self.commits[action.attempt, action.step].add(n)
                if action.state == "protected":
                    self.protections += 1
                    key = action.attempt, action.step
                    told = [rank for rank in m.ranks if rank.joined]
                    for rank in told:
                        rank.protected = max(rank.protected or key, key)
                    if told and action.attempt == self.attempt and (self.protected is None or (action.attempt, action.step) > self.protected):
                        self.protected, self.protectors = (action.attempt, action.step), {*range(len(self.machines))}
                if action.state == "persisted":
                    self.done.add((action.attempt, action.step))
            case DoPart() | WriteManifest():
                m.work.append(action)

    def slot(self, n: int, ref) -> Slot:
        m = self.machines[n]
        return m.fragments[ref.slot] if ref.arena == f"f{n}" else m.ranks[int(ref.arena.split("r")[1])].slots[ref.slot]

    def heard(self, n: int, a: int, news) -> None:
        what, key, errand = news.what, (news.attempt, news.step), news.errand
        source = self.machines[a].number
        self.send(
            n,
            {
                "sealed": lambda: PeerSealed(J, *key, source),
                "skipped": lambda: Skipped(J, *key, source),
                "told": lambda: Told(J, *key, errand, news.after),
                "asked": lambda: Asked(J, *key, errand),
                "part": lambda: PartDone(J, *key, errand, source),
                "done": lambda: ErrandDone(J, *key, errand, here=False),
                "failed": lambda: ErrandFailed(J, *key, "there", errand, here=False),
            }[what](),
        )

    def deliver(self, link) -> None:
        queue, rng, s = self.links[link], self.rng, self.setup
        if not queue:
            return
        news = queue.popleft()
        if self.faults and rng.random() < s.loss:
            self.greet(link)  # the connection broke, and everything on it is lost; a new one begins with the greeting
            return
        if self.faults and rng.random() < s.double:
            self.late.append((link, news))
        if self.faults and rng.random() < s.reorder:
            self.late.append((link, news))
            return
        self.heard(link[1], link[0], news)

    def greet(self, link) -> None:
        a, b = link
        if self.machines[a].node is not None and self.machines[b].node is not None:
            self.links[link].clear()
            for news in self.machines[a].node.greeting(J):
                if news.what != "part" or self.machines[b].number == 0:
                    self.links[link].append(news)

    def work(self, n: int) -> None:
        m = self.machines[n]
        if m.node is None or not m.work:
            return
        action = m.work.pop(self.rng.randrange(len(m.work)))
        match action:
            case Hash():
                r = int(action.ref.arena.split("r")[1])
                slot = m.ranks[r].slots[action.ref.slot]
                if slot.gen != action.ref.gen or slot.state != "FILLED":
                    self.send(n, Skipped(J, action.attempt, action.step))
                    return
                slot.sealed = slot.gen
                self.send(n, Hashed(J, action.attempt, action.step, action.rank, action.ref))
            case DoPart() if action.errand == PROTECT:
                self.make_fragment(n, action)
            case DoPart():
                key = action.attempt, action.step
                snapshot = m.node.jobs[J].snapshots.get(key)
                if snapshot is not None and PERSIST in snapshot.since_s:
                    for _, image_ref, _ in action.refs:
                        r = int(image_ref.arena.split("r")[1])
                        slot = m.ranks[r].slots[image_ref.slot]
                        if slot.gen != image_ref.gen or not slot.held:
                            raise Broken(f"node {n}: {key} was released while it was being persisted")
                chance = self.rng.random() if self.faults else 1.0
                if chance < 0.1:
                    return  # it hangs: the deadline ends it
                if chance < 0.2:
                    self.send(n, ErrandFailed(J, *key, "disk"))
                    return
                self.written[key].add(n)
                self.send(n, PartDone(J, *key))
            case WriteManifest():
                key = action.attempt, action.step
                if len(self.written[key]) != len(self.machines):
                    raise Broken(f"the manifest of {key} was asked for when only nodes {self.written[key]} had written")
                if self.faults and self.rng.random() < 0.1:
                    self.send(n, ErrandFailed(J, *key, "disk"))
                    return
                self.manifests.add(key)
                self.send(n, ErrandDone(J, *key))

    def make_fragment(self, n: int, action: DoPart) -> None:
        """It takes all members' images, and a free place."""
        m, key = self.machines[n], (action.attempt, action.step)
        chance = self.rng.random() if self.faults else 1.0
        free = [i for i, s in enumerate(m.fragments) if not s.held]
        if chance < 0.05:
            return  # it hangs: the deadline ends it
        if chance < 0.1 or not free or not all(x.node is not None and self.sealed(i, key) for i, x in enumerate(self.machines)):
            self.send(n, ErrandFailed(J, *key, "a peer", PROTECT))
            return
        slot = m.fragments[free[0]]
        slot.state, slot.gen, slot.key = "FILLED", max(slot.gen, slot.released) + 1, key
        slot.sealed, slot.fragment = slot.gen, self.fragment(n)
        self.send(n, PartDone(J, *key, PROTECT, ref=SlotRef(f"f{n}", free[0], slot.gen), fragment=slot.fragment))

    # --- trainers

    def begin_step(self, n: int, r: int, *, torn: bool = False) -> None:
        m, rank = self.machines[n], self.machines[n].ranks[r]
        if rank.filling >= 0:
            self.flip(n, r)
        rank.step += 1
        free = [i for i, s in enumerate(rank.slots) if s.free]
        if torn or not free:
            self.tell(n, r, Skipped(J, self.attempt, rank.step))
            return
        slot = rank.slots[free[0]]
        slot.state, slot.gen, slot.key = "FILLING", max(slot.gen, slot.sealed, slot.released) + 1, (self.attempt, rank.step)
        slot.place = (self.setup.ranks * self.setup.nodes, self.setup.ranks, m.number, self.setup.nodes)
        rank.filling = free[0]

    def flip(self, n: int, r: int) -> None:
        rank = self.machines[n].ranks[r]
        slot = rank.slots[rank.filling]
        if self.faults and self.rng.random() < 0.02:
            slot.state = "VOID"
            self.tell(n, r, Skipped(J, self.attempt, slot.key[1]))
        else:
            slot.state = "FILLED"
            if self.machines[n].node is not None and rank.joined:
                self.scan(n, r)
        rank.filling = -1

    def tell(self, n: int, r: int, event) -> None:
        if self.machines[n].ranks[r].joined:
            self.send(n, event)

    def scan(self, n: int, r: int) -> None:
        slots = self.machines[n].ranks[r].slots
        for i, s in sorted(enumerate(slots), key=lambda e: e[1].key):
            if s.held:
                world, local, number, nodes = s.place
                self.send(n, Filled(J, *s.key, n * self.setup.ranks + r, world, local, number, nodes, SlotRef(self.arena(n, r), i, s.gen), 1))

    # --- daemons and attempts

    def kill_daemon(self, n: int) -> None:
        m = self.machines[n]
        m.node, m.work = None, []
        for rank in m.ranks:
            rank.joined = False
        for link in self.links:
            if n in link:
                self.links[link].clear()

    def start_daemon(self, n: int) -> None:
        m = self.machines[n]
        m.node = self.make()
        if self.rng.random() < 0.5:  # a service manager kept the arenas
            for r in self.rng.sample(range(len(m.ranks)), len(m.ranks)):
                self.scan(n, r)
        self.scan_fragments(n)  # the launcher or the service manager

    def scan_fragments(self, n: int) -> None:
        for i, s in enumerate(self.machines[n].fragments):
            if s.held:
                self.send(n, FragmentFound(J, *s.key, SlotRef(f"f{n}", i, s.gen), s.fragment))

    def lose_node(self, n: int) -> None:
        """A machine goes with all its memory; an empty one takes its place."""
        self.kill_daemon(n)
        self.losses += 1
        m = self.machines[n]
        m.ranks = [Rank([Slot() for _ in range(self.setup.slots)], joined=False) for _ in m.ranks]
        m.fragments = [Slot(), Slot()]
        self.releases = {(x, ref) for x, ref in self.releases if x != n}
        self.protectors.discard(n)
        self.newest = None
        for nodes in self.sealed_by.values():
            nodes.discard(n)
        self.late = [(link, news) for link, news in self.late if n not in link]

    def rejoin(self, n: int, r: int) -> None:
        m, rank = self.machines[n], self.machines[n].ranks[r]
        if m.node is None or rank.joined:
            return
        self.scan(n, r)
        self.send(n, AttemptBegan(J, self.attempt, m.number, self.setup.nodes, self.setup.protect, rank.protected, r, self.setup.ranks))
        rank.joined = True
        self.scan(n, r)
        if rank.chose:
            self.send(n, Chosen(J, self.attempt, self.source, self.guarded))
        for link in self.links:
            if n in link:
                self.greet(link)

    source = guarded = None

    def new_attempt(self) -> None:
        """Every trainer dies; daemons look at what is left; all ranks restore from one rung."""
        rng = self.rng
        if self.setup.protect and rng.random() < 0.4:
            self.lose_node(rng.randrange(len(self.machines)))
        for n, m in enumerate(self.machines):
            if m.node is None:
                self.start_daemon(n)
            for r, rank in enumerate(m.ranks):
                for s in rank.slots:
                    if s.state == "FILLING":
                        s.state = "VOID"
                rank.filling = -1
                self.scan(n, r)
            while any(isinstance(w, Hash) for w in m.work):  # a Welcome waits for those
                self.work(n)
        if self.rng.random() < 0.3 and self.setup.nodes > 1:  # ranks 0 came up elsewhere: nodes are renumbered
            numbers = rng.sample(range(self.setup.nodes), self.setup.nodes)
        else:
            numbers = [m.number for m in self.machines]
        must = self.newest
        held = {n: m.node.holdings(J) for n, m in enumerate(self.machines)}
        ladder = rungs(held, [])
        if must is not None and (not ladder or ladder[0].key < must):
            raise Broken(f"{must} was sealed by all and is not offered: {[r.key for r in ladder]}")
        guard, whole_guard = self.protected, len(self.protectors) >= len(self.machines) - 1
        if guard is not None and whole_guard and (not ladder or ladder[0].key < guard):
            raise Broken(f"N4: {guard} was PROTECTED, {len(self.machines) - len(self.protectors)} nodes are lost, and it is not offered: {[r.key for r in ladder]}")
        zombie = self.attempt
        self.attempt += 1
        joins = [(n, r) for n in range(len(self.machines)) for r in range(self.setup.ranks)]
        rng.shuffle(joins)
        for n, r in joins:
            m = self.machines[n]
            m.number = numbers[n]
            self.send(n, AttemptBegan(J, self.attempt, m.number, self.setup.nodes, self.setup.protect, None, r, self.setup.ranks))
            m.ranks[r].joined, m.ranks[r].chose, m.ranks[r].protected = True, False, None
            self.noise(zombie)
        for link in self.links:
            self.greet(link)
        offered = [r.key for r in ladder if r.remains or all(self.holds(n, r.key) for n in range(len(self.machines)))]
        pick = rng.random()
        self.source = None if not offered or pick < 0.1 else rng.choice(offered) if pick < 0.4 else offered[0]
        self.newest = self.source if self.source and all(self.holds(n, self.source) for n in range(len(self.machines))) else None
        newest_guarded = guarded(held)
        self.guarded = newest_guarded if self.source and newest_guarded and newest_guarded <= self.source else None
        self.protected = self.guarded
        self.protectors = {n for n in range(len(self.machines)) if self.guarded and self.guards(n, self.guarded)}
        step = self.source[1] if self.source else 0
        rng.shuffle(joins)
        for n, r in joins:
            self.noise(zombie)
            if self.faults and rng.random() < 0.05:
                self.kill_daemon(n)
                self.start_daemon(n)
            self.machines[n].ranks[r].step = step
            self.machines[n].ranks[r].chose = True
            self.tell(n, r, Chosen(J, self.attempt, self.source, self.guarded))
        self.look()

    def noise(self, zombie: int) -> None:
        """Whatever is on the way arrives, and a zombie says something."""
        for _ in range(self.rng.randrange(4)):
            self.deliver(self.rng.choice([*self.links])) if self.links else None
        if self.faults and self.rng.random() < 0.2 and len(self.machines) > 1:
            n = self.rng.randrange(len(self.machines))
            step = self.rng.randrange(1, 60)
            job = self.machines[n].node.jobs.get(J) if self.machines[n].node else None
            if job is not None and job.attempt > zombie:  # before that it would be a lie, not a latecomer
                self.send(n, self.rng.choice([PeerSealed(J, zombie, step, (n + 1) % len(self.machines)), Skipped(J, zombie, step, 1)]))

    # --- one event, chosen by chance

    def once(self) -> None:
        rng = self.rng
        n = rng.randrange(len(self.machines))
        m = self.machines[n]
        r = rng.randrange(self.setup.ranks)
        dice = rng.random()
        self.now_s += 0.1
        slowest = min(rank.step for x in self.machines for rank in x.ranks)
        if dice < 0.30:
            if m.ranks[r].step <= slowest:  # ranks of a job are within a step of each other
                self.begin_step(n, r, torn=rng.random() < 0.03)
        elif dice < 0.42:
            if m.ranks[r].filling >= 0:
                self.flip(n, r)
        elif dice < 0.64:
            self.work(n)
        elif dice < 0.88:
            if self.links:
                self.deliver(rng.choice([*self.links]))
        elif dice < 0.90:
            if self.late:
                (a, b), news = self.late.pop(rng.randrange(len(self.late)))
                self.heard(b, a, news)
        elif dice < 0.93:
            if self.links:
                self.greet(rng.choice([*self.links]))
        elif dice < 0.95:
            self.tell(n, r, Asked(J, self.attempt, max(1, m.ranks[r].step - rng.randrange(2))))
        elif dice < 0.96:
            self.send(n, Tick())
        elif dice < 0.972:
            self.kill_daemon(n) if m.node is not None else self.start_daemon(n)
        elif dice < 0.99:
            self.start_daemon(n) if m.node is None else self.rejoin(n, r)
        elif dice < 0.992:
            self.new_attempt()

    # --- and then it must go on

    def settle(self) -> None:
        """Everything that is under way comes to its end."""
        for _ in range(3000):
            busy = False
            for n in range(len(self.machines)):
                while self.machines[n].work:
                    self.work(n)
                    busy = True
            for link in self.links:
                while self.links[link]:
                    self.deliver(link)
                    busy = True
            if not busy:
                return
        raise Broken("the nodes talk for ever")

    def heal(self) -> None:
        self.faults = False
        for n, m in enumerate(self.machines):
            if m.node is None:
                self.start_daemon(n)
            for r in range(self.setup.ranks):
                self.rejoin(n, r)
        self.late.clear()
        for link in self.links:
            self.greet(link)
        self.settle()
        self.now_s += 1000.0
        for n in range(len(self.machines)):
            self.send(n, Tick())
        self.settle()

    def march(self, steps: int) -> None:
        """All ranks take the same steps, everything arrives."""
        for _ in range(steps):
            top = max(rank.step for m in self.machines for rank in m.ranks)
            for n, m in enumerate(self.machines):
                for r, rank in enumerate(m.ranks):
                    if rank.filling >= 0:
                        self.flip(n, r)
                    rank.step = top
                    self.begin_step(n, r)
                    if rank.filling >= 0:
                        self.flip(n, r)
            self.settle()

    def live(self) -> None:
        self.heal()
        self.march(1)
        first = max(rank.step for m in self.machines for rank in m.ranks) + 1
        self.march(3)
        committed = [k for k, nodes in self.commits.items() if k[0] == self.attempt and k[1] >= first and len(nodes) == len(self.machines)]
        if not committed:
            raise Broken(f"livelock: none of steps {first} to {first + 2} was committed")
        for n in range(len(self.machines)):
            self.tell(n, 0, Asked(J, self.attempt, first + 3))
        self.march(3)
        if self.setup.protect and not (self.protected is not None and self.protected >= (self.attempt, first)):
            raise Broken(f"livelock: nothing is protected any more; {self.protected}")
        if not any(k >= (self.attempt, first + 3) for k in self.done & self.manifests):
            raise Broken(f"livelock: nothing is persisted any more; {self.done}")


def simulate(seed: int, events: int = 350, *, setup: Setup | None = None, machine: type[Node] = Node) -> World:
    world = World(seed, setup, machine)
    for _ in range(events):
        world.once()
    world.live()
    return world


def replay(seed: int, **options) -> World:
    try:
        return simulate(seed, **options)
    except AssertionError as e:
        world_setup = Setup.of(random.Random(seed))
        pytest.fail(f"SIM_SEED={seed} ({options.get('setup') or world_setup}): {type(e).__name__}: {e}", pytrace=True)


ONE = os.environ.get("SIM_SEED")
CHUNKS = 8
SEEDS = int(os.environ.get("SIM_SEEDS", "2000"))


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_sim_promises_hold_under_faults(chunk):
    seeds = [int(ONE)] if ONE else range(chunk, SEEDS, CHUNKS)
    commits = persisted = attempts = 0
    for seed in seeds:
        world = replay(seed)
        commits += len(world.commits)
        persisted += len(world.manifests)
        attempts += world.attempt
    print(f"chunk {chunk}: {len(seeds)} seeds, {commits} commits, {persisted} persisted, {attempts} attempts")
    assert ONE or min(commits, persisted, attempts) > len(seeds), "the simulation must do what it is to test"


@pytest.mark.parametrize("slots", [2, 3])
@pytest.mark.parametrize("nodes", [1, 2, 3])
def test_sim_snapshots_go_on_after_faults(nodes, slots):
    for seed in [int(ONE)] if ONE else range(1000, 1012):
        replay(seed, events=250, setup=Setup(nodes, 2, slots, 0.1, 0.1, 0.1))


def test_sim_is_a_function_of_its_seed():
    first, second = simulate(5), simulate(5)
    assert list(first.trace) == list(second.trace)
    assert first.commits == second.commits


@pytest.mark.parametrize("slots", [2, 3])
def test_sim_without_faults_every_step_is_committed(slots):
    world = World(1, Setup(2, 2, slots, 0, 0, 0))
    world.faults = False
    world.march(20)
    assert [k for k, nodes in world.commits.items() if len(nodes) == 2] == [(1, s) for s in range(1, 21)]


# --- the simulation finds what it is there to find ------------------------------------------------------------------------------


class CommitsAlone(Node):
    def _commit_if_all(self, job, snapshot, now_s):
        job.peers_sealed[snapshot.key] = set(range(snapshot.nodes))
        yield from super()._commit_if_all(job, snapshot, now_s)


class ReleasesAtSeal(Node):
    def _hashed(self, job, e, now_s):
        yield from super()._hashed(job, e, now_s)
        if self._state(job, e) == SEALED:
            for snapshot in [*job.snapshots.values()]:
                if snapshot.key < (e.attempt, e.step) and not snapshot.since_s:
                    yield from self._drop(job, snapshot)

    @staticmethod
    def _state(job, e):
        snapshot = job.snapshots.get((e.attempt, e.step))
        return snapshot.state if snapshot else None


class IgnoresDoomed(Node):
    def _filled(self, job, e, now_s):
        job.doomed.clear()
        yield from super()._filled(job, e, now_s)

    def _is_lost(self, job, key):
        return False


class ReleasesWhilePersisting(Node):
    def _drop_superseded(self, job, now_s):
        for snapshot in [*job.snapshots.values()]:
            if self._obsolete(job, snapshot.key):
                yield from self._drop(job, snapshot)


class ForgetsPersistSince(Node):
    def _end(self, job, errand, key, now_s, *, done):
        snapshot = job.snapshots.get(key)
        since_s = dict(snapshot.since_s) if snapshot else {}
        yield from super()._end(job, errand, key, now_s, done=done)
        if key in job.snapshots:
            job.snapshots[key].since_s = since_s

    def _expire(self, job, now_s):
        yield from ()


class AcceptsOldAttempts(Node):
    def _peer_sealed(self, job, e, now_s):
        attempt, job.attempt = job.attempt, min(job.attempt, e.attempt)
        yield from super()._peer_sealed(job, e, now_s)
        job.attempt = attempt


class SuccessorReleasesIncomplete(Node):
    def _attempt_began(self, job, e, now_s):
        newer = e.attempt > job.attempt
        yield from super()._attempt_began(job, e, now_s)
        for snapshot in [*job.snapshots.values()] if newer else ():
            if snapshot.attempt < e.attempt and len(snapshot.images) < snapshot.local_count:
                yield from self._drop(job, snapshot)


class GreetsWithSealsOnly(Node):
    def greeting(self, name):
        return [news for news in super().greeting(name) if news.what == "sealed"]

    def _is_lost(self, job, key):
        return False


class EachNodeChoosesWhatToPersist(Node):
    def _asked(self, job, e, now_s):
        number, job.node = job.node, 0
        yield from super()._asked(job, e, now_s)
        job.node = number

    def _told(self, job, e, now_s):
        yield from ()


class ManifestWithoutTheOthers(Node):
    def _part_done(self, job, e, now_s):
        snapshot = job.snapshots.get((e.attempt, e.step))
        if snapshot is not None and e.errand == PERSIST:
            snapshot.parts[PERSIST] |= set(range(1, snapshot.nodes)) - {snapshot.node}
        yield from super()._part_done(job, e, now_s)


class ReleasesTwice(Node):
    def _drop(self, job, snapshot):
        gone = [*super()._drop(job, snapshot)]
        yield from gone
        if snapshot.step % 3 == 0:
            yield from gone


class ForgetsTheChoice(Node):
    def _take_choice(self, job, snapshot):
        pass

    def _obsolete(self, job, key):
        return (key[0] < job.attempt and job.decided == job.attempt) or super()._obsolete(job, key)


class SealsBeforeAllRanks(Node):
    def _hashed(self, job, e, now_s):
        snapshot = job.snapshots.get((e.attempt, e.step))
        if snapshot is not None:
            snapshot.local_count = len(snapshot.images)
        yield from super()._hashed(job, e, now_s)


class ReleasesProtected(Node):
    @staticmethod
    def _obsolete(job, key):
        decided = job.decided == job.attempt
        if key[0] < job.attempt and decided and key != job.source:
            return True
        return job.committed is not None and key < job.committed and (job.committed[0] >= job.attempt or decided)


class BreaksPromises(Node):
    def _expire(self, job, now_s):
        for snapshot in [*job.snapshots.values()]:
            for errand, since_s in [*snapshot.since_s.items()]:
                if now_s - since_s > self.timeouts_s[errand]:
                    yield from self._errand_failed(job, ErrandFailed(job.name, *snapshot.key, "late", errand), now_s)


class ProtectedByOne(Node):
    def _part_done(self, job, e, now_s):
        snapshot = job.snapshots.get((e.attempt, e.step))
        if snapshot is not None and e.errand == PROTECT and snapshot.node == 0 and e.node is None:
            snapshot.parts[PROTECT] |= set(range(1, snapshot.nodes))
        yield from super()._part_done(job, e, now_s)


class TakesTheRestoresWordForNothing(Node):
    def _chosen(self, job, e, now_s):
        yield from super()._chosen(job, Chosen(e.job, e.attempt, e.source), now_s)


class LateFragmentsStay(Node):
    def _part_done(self, job, e, now_s):
        yield from (a for a in super()._part_done(job, e, now_s) if not (isinstance(a, Release) and a.ref == e.ref))


BUGS = [
    ReleasesProtected, BreaksPromises, ProtectedByOne, TakesTheRestoresWordForNothing, LateFragmentsStay,
    CommitsAlone, ReleasesAtSeal, IgnoresDoomed, ReleasesWhilePersisting, ForgetsPersistSince, AcceptsOldAttempts, SuccessorReleasesIncomplete,
    GreetsWithSealsOnly, EachNodeChoosesWhatToPersist, ManifestWithoutTheOthers, ReleasesTwice, ForgetsTheChoice, SealsBeforeAllRanks,
]  # fmt: skip


@pytest.mark.parametrize("bug", BUGS)
def test_sim_finds_planted_bugs(bug):
    for seed in range(600):
        try:
            simulate(seed, machine=bug)
        except AssertionError as e:
            print(f"{bug.__name__}: seed {seed}: {str(e)[:100]}")
            return
    pytest.fail(f"600 seeds did not find {bug.__name__}")
