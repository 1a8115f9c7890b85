"""Wait-for graphs: root, cycle, mismatch, nobody missing; and when a pause is a hang."""

from __future__ import annotations

import pytest

from ckptd.monitor import hang, record
from ckptd.monitor.engine import Concluded, Engine, Settings
from ckptd.monitor.report import GroupInfo, OpenOp, Pulse, RankInfo, Report

ALL_REDUCE, BROADCAST, SEND, RECV = (record.OPS.index(n) for n in ("all_reduce", "broadcast", "send", "recv"))
WORLD, TP0, TP1, DP0, DP1 = 1, 10, 11, 20, 21
TWO_D = {TP0: [0, 1], TP1: [2, 3], DP0: [0, 2], DP1: [1, 3]}


def row(key, entered, done, *, op=ALL_REDUCE, since_ms=3000, history=0, signature=None, **p2p):
    return OpenOp(key, entered, done, op, 7, 4096, op if signature is None else signature, history, since_ms, **p2p)


def pulse(rank, groups, *, state="S", idle_ms=3000, step=20, **more):
    return Pulse(rank=rank, idle_ms=idle_ms, step=step, records=100, state=state, groups=groups, **more)


def look(pulses, members, **more):
    return hang.look(hang.Standing({p.rank: p for p in pulses}, members, **more))[0]


def only(found):
    assert len(found) == 1, found
    return found[0]


@pytest.mark.parametrize(
    ("state", "more", "kind"),
    [
        ("T", {}, "stopped"),
        ("D", {"where": "nfs_wait"}, "io-blocked"),
        ("S", {"where": "hrtimer_nanosleep"}, "hang"),
        ("S", {"phases": 1 << record.DATA}, "input-stall"),
        ("D", {"phases": 1 << record.CHECKPOINT}, "checkpoint-stall"),
        ("closed", {}, "hang"),
    ],
)
def test_the_root_is_who_waits_for_nobody(state, more, kind):
    """2-D: 1 waits for 0 in its TP group, 0 for 2 and 3 for 2: 0 is missing somewhere, and is not to blame."""
    pulses = [
        pulse(0, [row(TP0, 4, 4), row(DP0, 9, 8)]),
        pulse(1, [row(TP0, 5, 4), row(DP1, 8, 8)]),
        pulse(2, [row(TP1, 4, 4), row(DP0, 8, 8)], state=state, **more),
        pulse(3, [row(TP1, 5, 4), row(DP1, 8, 8)]),
    ]
    found = only(look(pulses, TWO_D))
    assert (found.kind, found.ranks) == (kind, (2,))
    assert set(found.victims) == {0, 3}
    assert found.op == "all_reduce"


def test_two_roots_are_two_findings():
    pulses = [pulse(r, [row(WORLD, 5 - (r in (1, 3)), 4)]) for r in range(4)]
    assert sorted(f.ranks for f in look(pulses, {WORLD: range(4)})) == [(1,), (3,)]


def test_the_odd_signature_is_to_blame_for_a_cycle():
    """monitoring.md 3(d): 0 waits for 2 in DP, 2 broadcasts where the others reduce."""
    pulses = [pulse(r, [row(WORLD, 45, 44, op=BROADCAST if r == 2 else ALL_REDUCE)]) for r in range(4)]
    found = only(look(pulses, {WORLD: range(4)}))
    assert (found.kind, found.ranks, found.op) == ("desync", (2,), "all_reduce")
    assert any("broadcast" in str(e.value) for e in found.evidence)


def test_a_rank_that_went_on_without_the_operation():
    pulses = [pulse(r, [row(WORLD, 45, 44)]) for r in range(3)] + [pulse(3, [row(WORLD, 44, 44)], step=21)]
    found = only(look(pulses, {WORLD: range(4)}))
    assert (found.kind, found.ranks) == ("desync", (3,))


def test_a_deadlock_names_the_odd_order_or_all():
    both = {TP0: [0, 1, 2, 3], DP0: [0, 1, 2, 3]}
    pulses = [pulse(r, [row(TP0, 5, 4), row(DP0, 4, 4)] if r != 2 else [row(TP0, 4, 4), row(DP0, 5, 4)]) for r in range(4)]
    found = only(look(pulses, both))
    assert (found.kind, found.ranks) == ("deadlock", (2,))
    pulses = [pulse(r, [row(TP0, 5, 4), row(DP0, 4, 4)] if r < 2 else [row(TP0, 4, 4), row(DP0, 5, 4)]) for r in range(4)]
    found = only(look(pulses, both))
    assert (found.kind, found.ranks) == ("deadlock", (0, 1, 2, 3))


def test_a_rank_that_left_one_out_and_waits_elsewhere():
    """0 left out WORLD's 45 and is in the next step's DP0, which 2, still in WORLD, has not entered: both wait for each other, and 0 is the one alone."""
    pulses = [pulse(0, [row(WORLD, 44, 44), row(DP0, 9, 8)])]
    pulses += [pulse(r, [row(WORLD, 45, 44), row(DP0 if r == 2 else DP1, 8, 8)]) for r in (1, 2, 3)]
    found = only(look(pulses, {WORLD: range(4), DP0: [0, 2], DP1: [1, 3]}))
    assert (found.kind, found.ranks) == ("deadlock", (0,))


def test_two_members_are_no_majority_but_the_job_is():
    pulses = [pulse(r, [row(TP0 if r < 2 else TP1, 5, 4, op=BROADCAST if r == 1 else ALL_REDUCE)]) for r in range(4)]
    found = [f for f in look(pulses, TWO_D) if f.kind == "desync"]
    assert only(found).ranks == (1,)
    pulses = [pulse(r, [row(TP0, 5, 4, op=BROADCAST if r == 1 else ALL_REDUCE)]) for r in range(2)]
    assert only(look(pulses, {TP0: [0, 1]})).ranks == (0, 1)


@pytest.mark.parametrize("odd", [0, 1])
def test_what_others_entered_before_tells_which_of_two_is_odd(odd):
    """All do the same kind of operation, of sizes that change; the other pair has gone on by two."""
    here = [pulse(r, [row(TP0, 5, 4, signature=99 if r == odd else 50, recent=[40])]) for r in range(2)]
    there = [pulse(r, [row(TP1, 7, 7, signature=70, recent=[60, 50, 40])]) for r in (2, 3)]
    found = [f for f in look([*here, *there], TWO_D) if f.kind == "desync"]
    assert only(found).ranks == (odd,)
    gone = [pulse(r, [row(TP1, 30, 30, signature=70, recent=[60, 50, 40])]) for r in (2, 3)]
    assert only([f for f in look([*here, *gone], TWO_D) if f.kind == "desync"]).ranks == (0, 1), "too far back to be known"


def test_who_waits_in_what_a_stopped_rank_has_entered_is_no_root():
    """1 is stopped inside; 0 waits with it; 2 receives from 0."""
    receives = pulse(2, [row(DP0, 3, 3, p2p_op=RECV, p2p_open=True, p2p_peer=0, p2p_entered=7, p2p_done=6, p2p_since_ms=3000)])
    pulses = [pulse(0, [row(TP0, 5, 4)]), pulse(1, [row(TP0, 5, 4)], state="T"), receives]
    found = only(look(pulses, {TP0: [0, 1], DP0: [0, 2]}))
    assert (found.kind, found.ranks) == ("stopped", (1,))


def test_nobody_is_missing():
    pulses = [pulse(r, [row(WORLD, 45, 44)]) for r in range(4)]
    found = only(look(pulses, {WORLD: range(4)}))
    assert (found.kind, found.ranks) == ("comm-hang", ())


def test_a_stopped_rank_that_had_entered():
    pulses = [pulse(r, [row(WORLD, 45, 44)], state="T" if r == 1 else "S") for r in range(4)]
    found = only(look(pulses, {WORLD: range(4)}))
    assert (found.kind, found.ranks) == ("stopped", (1,))


def test_a_pipeline_waits_along_its_stages():
    """3 receives from 2, which receives from 1, which computes; 0 receives from 1 what comes back."""

    def receives(rank, peer):
        return pulse(rank, [row(WORLD, 3, 3, p2p_op=RECV, p2p_open=True, p2p_peer=peer, p2p_entered=7, p2p_done=6, p2p_since_ms=3000)])

    pulses = [receives(0, 1), pulse(1, [row(WORLD, 3, 3)]), receives(2, 1), receives(3, 2)]
    found = only(look(pulses, {WORLD: range(4)}))
    assert (found.kind, found.ranks, set(found.victims)) == ("hang", (1,), {0, 2})


def test_a_silent_node_is_no_culprit():
    pulses = [pulse(r, [row(WORLD, 45, 44)]) for r in range(3)]
    found = only(look(pulses, {WORLD: range(4)}, stale=frozenset({3})))
    assert (found.kind, found.ranks) == ("undecided", ())


def test_many_ranks_are_few_edges():
    """4,096 ranks wait for one: linear, so it takes no time to speak of."""
    pulses = [pulse(r, [row(WORLD, 45 - (r == 77), 44)]) for r in range(4096)]
    assert only(look(pulses, {WORLD: range(4096)})).ranks == (77,)


# --- in the engine ----------------------------------------------------------------------------------------------------------


def engine_of(pulses_at, *, seconds=6.0, warm=True, settings=Settings()):
    """An engine that sees `pulses_at(t)` every quarter of a second; (time, verdict) of what it concluded."""
    engine = Engine("job", 1, 4, 2, settings)
    if warm:
        for _ in range(100):
            engine.patience.step(0.3, {})
    infos = [RankInfo(r, r // 2, r % 2, 100 + r, f"host{r // 2}", groups=[GroupInfo(WORLD, [0, 1, 2, 3])]) for r in range(4)]
    told = []
    for i in range(int(seconds * 4)):
        t = i / 4
        for node in range(2):
            pulses = [p for p in pulses_at(t) if p.rank // 2 == node]
            told += [(t, c) for c in engine.receive(Report(node, i + 1, ranks=infos if i == 0 else [], pulses=pulses), t, 1e9 + t)]
        told += [(t, c) for c in engine.tick(t, 1e9 + t)]
    return engine, [(t, c.verdict) for t, c in told if isinstance(c, Concluded)], [c for _, c in told if not isinstance(c, Concluded)]


def hung(t, **more):
    ms = int(1e3 * t)
    groups = [row(WORLD, 45, 44, since_ms=ms)] if ms >= 1000 else []
    return [pulse(r, groups, idle_ms=ms) for r in (0, 1, 2)] + [pulse(3, [row(WORLD, 44, 44)] if groups else [], idle_ms=ms, **more)]


@pytest.mark.parametrize(("state", "kind"), [("T", "stopped"), ("S", "hang")])
def test_a_hang_is_named_in_three_seconds(state, kind):
    _, verdicts, asks = engine_of(lambda t: hung(t, state=state))
    at, verdict = verdicts[0]
    assert 2.0 <= at <= 3.0
    assert (verdict.kind, verdict.ranks, verdict.nodes, verdict.state) == (kind, (3,), (1,), "confirmed")
    assert verdict.grade == ("evict" if state == "T" else "report")
    assert any(a.what == "stacks" and 3 in a.ranks for a in asks)


@pytest.mark.parametrize(
    "pulses_at",
    [
        lambda t: [pulse(r, [row(WORLD, 45, 44)], state="t", idle_ms=int(1e3 * t)) for r in range(4)],
        lambda t: [pulse(r, [row(WORLD, 45, 45)], state="closed", idle_ms=int(1e3 * t)) for r in range(4)],
        lambda t: hung(t % 1.5),
        lambda t: hung(t, phases=1 << record.CHECKPOINT),
        lambda t: hung(t, state="R"),
        lambda t: hung(t, state="t"),
    ],
    ids=["in a debugger", "closed", "short pauses", "a first checkpoint", "waiting for a processor", "its stacks are read"],
)
def test_no_hang(pulses_at):
    assert engine_of(pulses_at)[1] == []


def test_a_long_first_step_is_none():
    assert engine_of(hung, warm=False)[1] == []


def test_a_hang_that_ends_is_cleared():
    _, verdicts, _ = engine_of(lambda t: hung(t) if t < 4 else hung(0.1), seconds=8)
    assert [v.state for _, v in verdicts] == ["confirmed", "cleared"]


@pytest.mark.parametrize(("policy", "recommended"), [("report", "report"), ("snapshot", "snapshot"), ("restart", "restart"), ("evict", "restart")])
def test_policy_bounds_what_follows(policy, recommended):
    _, verdicts, _ = engine_of(hung, settings=Settings(policy=policy))
    assert verdicts[0][1].recommended == recommended


def test_a_restart_that_did_not_help_is_not_recommended_for_ever():
    engine, verdicts, _ = engine_of(hung, settings=Settings(policy="restart"))
    for _ in range(2):
        engine.acted(verdicts[0][1].id, "restart")
    again = Engine("job", 2, 4, 2, Settings(policy="restart"), past=engine.past)
    again.verdicts.place_of = lambda _: (0, "")
    told = again.verdicts.window("hang", [hang_seen(verdicts[0][1])], 0.0, 0.0)
    assert told[0].recommended == "report"


def hang_seen(verdict):
    from ckptd.monitor.report import Finding
    from ckptd.monitor.verdict import Seen

    return Seen(("hang",), Finding(verdict.kind, verdict.ranks, verdict.step, verdict.since_step, 1.0), stuck=True, certain=True)


def test_a_death_is_told_at_once_and_the_rest_follows_from_it():
    def at(t):
        dead = {2} if t < 2 else {0, 2}
        return [pulse(r, [], state="dead" if r in dead and t >= 1 else "S", idle_ms=100, signal=9 if r == 2 else 0) for r in range(4)]

    engine, verdicts, _ = engine_of(at)
    at_s, verdict = verdicts[0]
    assert at_s == 1.0
    assert (verdict.kind, verdict.ranks, verdict.state, verdict.grade) == ("crash", (2,), "confirmed", "evict")
    assert "signal 9" in verdict.cause
    assert len(verdicts) == 1
    assert engine.status()["verdicts"][0]["kind"] == "crash"


def test_who_was_killed_is_told_from_who_raised_because_of_it():
    def at(t):
        states = {0: "raised", 2: "dead", 3: "raised"} if t >= 1 else {}
        return [pulse(r, [], state=states.get(r, "S"), idle_ms=100) for r in range(4)]

    _, verdicts, _ = engine_of(at)
    assert [(v.kind, v.ranks, v.victims) for _, v in verdicts[-1:]] == [("crash", (2,), (0, 3))]


def test_a_mismatch_that_others_die_of_is_still_named():
    """gloo ends the process that was given more bytes than it expected: it is not to blame."""

    def at(t):
        return [
            pulse(r, [row(WORLD, 45, 44, signature=99 if r == 3 else 1)] if t >= 1 else [], state="dead" if r == 0 and t >= 1 else "S", idle_ms=100)
            for r in range(4)
        ]

    engine, verdicts, asks = engine_of(at)
    assert [(t, v.kind, v.ranks) for t, v in verdicts] == [(1.0, "crash", (0,)), (1.0, "desync", (3,))], "the other node's ranks are heard of later"
    assert any(a.what == "pulses" for a in asks)
    report = Report(0, 1, ranks=list(engine.roll.infos.values()), pulses=at(1))
    alone = Engine("job", 1, 4, 1)
    told = alone.receive(report, 1.0, 1e9)
    told += alone.receive(Report(0, 2, pulses=[pulse(r, [], state="raised", idle_ms=100) for r in (1, 2, 3)]), 1.2, 1e9)
    assert [(c.verdict.kind, c.verdict.ranks) for c in told if isinstance(c, Concluded)] == [("desync", (3,))], "on one node it is known at once, and stays so"


def test_who_waits_in_what_the_others_have_left_entered_something_else():
    pulses = [pulse(r, [row(WORLD, 46, 45)]) for r in (1, 2, 3)] + [pulse(0, [row(WORLD, 45, 44)])]
    found = only(look(pulses, {WORLD: range(4)}))
    assert (found.kind, found.ranks) == ("desync", (0,))


def test_small_saves_in_every_step_say_nothing_of_a_large_one():
    def at(t):
        return hung(t, phases=1 << record.CHECKPOINT)

    engine, verdicts, _ = engine_of(at)
    engine.patience.phase(record.CHECKPOINT, 0.005)
    assert verdicts == []
    stuck = hung(20.0, phases=1 << record.CHECKPOINT)[3]
    assert engine.patience.budget_s(stuck, busy=False) == engine.settings.phase_s
    engine.patience.phase(record.CHECKPOINT, 10.0)
    assert engine.patience.budget_s(stuck, busy=False) == 10.0 * engine.settings.hang_factor


def test_who_has_not_told_its_table_may_be_missing():
    """A node fell silent before its pulses brought groups: nobody may say that all have entered."""
    pulses = [*(pulse(r, [row(WORLD, 45, 44)]) for r in range(3)), pulse(3, [], idle_ms=0)]
    assert look(pulses, {WORLD: range(4)}) == []
