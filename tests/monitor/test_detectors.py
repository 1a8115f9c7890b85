"""Detectors by themselves: summaries in, findings out."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from ckptd.monitor import comms, join, record
from ckptd.monitor.asks import Asks
from ckptd.monitor.drift import Pace, is_drift
from ckptd.monitor.hang import Patience
from ckptd.monitor.join import Join, median, together
from ckptd.monitor.loss import Losses
from ckptd.monitor.report import Finding, GroupStep, Probed, StepSummary
from ckptd.monitor.roles import Roles
from ckptd.monitor.settings import Settings
from ckptd.monitor.standing import Roll
from ckptd.monitor.straggler import Stragglers
from ckptd.monitor.verdict import Seen, Verdicts, agree
from ckptd.monitor.watch import Watch
from tests.monitor.summaries import MS, WORLD, joined, noisy, summary

# --- join -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("shape", "axis"), [((9,), -1), ((1, 5), 0), ((1, 5), 1), ((6, 4), 0), ((6, 4), 1), ((16, 3, 7), 0), ((16, 3, 7), 1), ((16, 3, 7), 2)])
@pytest.mark.parametrize("missing", [0.0, 0.3, 0.9, 1.0])
@pytest.mark.filterwarnings("ignore:All-NaN")
def test_medians_are_numpys(shape, axis, missing):
    rng = np.random.default_rng(7)
    values = rng.normal(size=shape)
    values[rng.random(shape) < missing] = np.nan
    np.testing.assert_allclose(median(values, axis), np.nanmedian(values, axis=axis))


def test_steps_come_whole_and_in_order():
    table = Join(3)
    table.add([summary(r, 1) for r in range(3)], 0.0)
    table.add([summary(0, 2), summary(1, 2)], 0.1)
    table.add([summary(r, 3) for r in range(3)], 0.2)
    assert [j.step for j in table.ready(0.3)] == [1]
    late = table.ready(3.0)
    assert [(j.step, j.missing) for j in late] == [(2, 1), (3, 0)]
    assert np.isnan(late[0].values[join.SELF, 2])
    table.add([summary(2, 2)], 3.1)
    assert table.late == 1


@pytest.mark.parametrize("seed", range(60))
def test_of_nodes_that_tell_steps_more_and_less_often_those_count_that_all_tell(seed):
    """Three nodes that change from one stride to another at different times and tell several steps at once: no step is waited for that somebody does not tell."""
    rng, nodes = np.random.default_rng(seed), 3
    table, out, stride = Join(nodes), [], 1
    every, told = [1] * nodes, [0] * nodes
    for tick in range(80):
        stride = int(rng.choice([1, 2, 4, 8])) if rng.random() < 0.1 else stride
        for node in range(nodes):
            every[node] = stride if rng.random() < 0.5 else every[node]
            until = min(told[node] + int(rng.integers(0, 13)), min(told) + 30)
            steps = [summary(node, s) for s in range(told[node] + 1, until + 1) if s % every[node] == 0]
            table.add(steps, tick / 100, node=node, every=every[node])
            told[node] = until
        out += table.ready(tick / 100)
    assert not any(j.missing for j in out)
    assert not [s for s in table.pending if s <= min(told)], "waited for in vain"
    assert len(out) > min(told) // 8 - 8
    assert table.late == 0


def test_lost_records_leave_a_rank_unknown():
    _, (j,) = joined(1, 2, lambda r, s: summary(r, s, lost=5 * r))
    assert not np.isnan(j.values[join.SELF, 0])
    assert np.isnan(j.values[join.SELF, 1])
    assert j.lost == 5


def test_memory_is_bounded_while_a_rank_is_silent():
    table = Join(64)
    for r in range(64):
        table.add([summary(r, 1)], 0.0)
    for step in range(2, 20000):
        table.add([summary(0, step)], 0.0)
        table.ready(0.0)
    assert len(table.pending) <= table._limit + 1


def test_a_job_that_numbers_its_steps_anew_is_followed():
    table, _ = joined(50, 2, summary)
    out = []
    for step in range(1, 40):
        table.add([summary(r, step) for r in range(2)], 100.0 + step)
        out += table.ready(100.0 + step)
    assert out[-1].step == 39


@pytest.mark.parametrize("how", ["skipped", "another"])
def test_who_entered_other_operations(how):
    def of(r, s):
        odd = r == 2 and s >= 5
        return summary(r, s, seq=4 * s - (odd and how == "skipped"), history=9 * s + odd)

    _, out = joined(6, 4, of)
    assert not any(j.odd for j in out[:4])
    assert (out[4].odd[0].ranks, out[4].odd[0].behind) == ((2,), how == "skipped")


def test_a_tap_that_began_later_is_not_odd():
    _, out = joined(6, 4, lambda r, s: summary(r, s, seq=4 * s - 3 * (r == 2), history=9 * s + (r == 2)))
    assert not any(j.odd for j in out)


# --- stragglers -------------------------------------------------------------------------------------------------------------


def watched(steps, size, of, roles=None, settings=Settings()):
    """(step at which each rank was first found, what was found last)."""
    s = Stragglers(size, settings)
    first, last = {}, []
    for j in joined(steps, size, of)[1]:
        s.add(together([j]), roles or [np.arange(size)])
        last = s.look()
        for x in last:
            if not x.half:
                first.setdefault(x.rank, (j.step, x.finding))
    return first, last


@pytest.mark.parametrize(
    ("kind", "part"),
    [("compute-slow", None), ("input-stall", "data_us"), ("gc-pause", "gc_us"), ("checkpoint-stall", "checkpoint_us"), ("cpu-contention", "delay_us")],
)
def test_the_part_tells_the_cause(kind, part):
    factor = noisy(1, 8, 100)

    def of(r, s):
        extra = 10 * MS if r == 3 and s > 60 else 0
        return summary(r, s, own=int(80 * MS * factor[s, r]) + extra, **({part: extra} if part else {}))

    first, _ = watched(100, 8, of)
    step, finding = first[3]
    assert set(first) == {3}
    assert finding.kind == kind
    assert 61 <= step <= 75
    assert abs(finding.since_step - 61) <= 2
    assert 0.06 <= finding.slowdown <= 0.14


def test_what_was_so_from_the_start_is_no_fault():
    factor = noisy(2, 8, 150)
    first, _ = watched(150, 8, lambda r, s: summary(r, s, own=int((80 + 12 * (r == 3)) * MS * factor[s, r])))
    assert first == {}


@pytest.mark.parametrize("seed", range(3))
def test_a_small_slowness_is_not_learned_as_the_ranks_noise(seed):
    """3 % of a step, on one rank, from step 45 on: standard errors stay what the noise makes them, its own and everybody's."""
    s, noise = Stragglers(8, Settings()), noisy(seed, 8, 200)

    def of(r, step):
        own = int(80 * MS * noise[step, r]) + (3 * MS if r == 2 and step > 45 else 0)
        return summary(r, step, own=own, wall=own + 20 * MS)

    for j in joined(199, 8, of)[1]:
        s.add(together([j]), [np.arange(8)])
    error, true = s.standard_error(40)[1], 0.02 * 0.8 * np.sqrt(1 / 40 + 1 / 100)
    print(f"standard errors, percent of a step: {np.round(100 * error, 2)}; of the noise that was put in {100 * true:.2f}")
    assert 0.7 * true < error.min() and error.max() < 1.6 * true


def test_one_spike_is_no_fault():
    factor = noisy(3, 8, 120)
    first, _ = watched(120, 8, lambda r, s: summary(r, s, own=int(80 * MS * factor[s, r]) + (900 * MS if r == 3 and s == 60 else 0)))
    assert first == {}


def test_who_stands_least_in_device_collectives_is_late():
    factor = noisy(4, 8, 100)

    def of(r, s):
        late = 12 * MS if s > 60 else 0
        return summary(r, s, own=5 * MS, device_us=int(20 * MS * factor[s, r]) + (0 if r == 3 else late))

    first, _ = watched(100, 8, of)
    assert set(first) == {3}
    assert first[3][1].kind == "compute-slow"


def test_a_stage_of_one_rank_is_compared_with_its_past():
    factor = noisy(5, 2, 120)

    def of(r, s):
        length = 1 + 0.3 * np.sin(s)  # batches of other lengths: both stages know it
        return summary(r, s, own=int((60 + 20 * r) * MS * length * factor[s, r]) + (15 * MS if r == 1 and s > 60 else 0))

    first, _ = watched(120, 2, of, roles=[np.array([0]), np.array([1])])
    assert 1 in first
    assert first[1][0] <= 85


def test_a_rank_that_recovered_is_not_found():
    factor = noisy(6, 8, 160)
    first, last = watched(160, 8, lambda r, s: summary(r, s, own=int(80 * MS * factor[s, r]) + (20 * MS if r == 3 and 60 < s <= 90 else 0)))
    assert set(first) == {3}
    assert last == []


def test_roles_follow_programs_and_do_not_follow_every_batch():
    roles = Roles(8)
    roles.learn({1: range(8)})
    assert roles.see(np.array([1, 1, 1, 1, 2, 2, 2, 2]))
    assert [r.tolist() for r in roles.by_role] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    for i in range(10):  # the same partition under new names
        assert not roles.see(np.array([1, 1, 1, 1, 2, 2, 2, 2]) + 10 * i)
    assert not roles.see(np.array([1, -1, 1, 1, 2, 2, 2, 2]))


# --- transfers --------------------------------------------------------------------------------------------------------------


def rates(nodes, slow, factor=0.4):
    return [Probed(1, "transfer", a, 1e9 * (factor if slow(a, b) else 1.0), b) for a in range(nodes) for b in range(nodes) if a != b]


@pytest.mark.parametrize("nodes", [3, 4, 8])
@pytest.mark.parametrize(
    ("kind", "slow", "found"),
    [
        ("send-slow", lambda a, _: a == 1, (1,)),
        ("receive-slow", lambda _, b: b == 1, (1,)),
        ("link-slow", lambda a, b: (a, b) == (1, 2), (1,)),
        ("send-slow", lambda a, b: 1 in (a, b), (1,)),
    ],
    ids=["row", "column", "cell", "both"],
)
def test_the_matrix_says_side_or_link(nodes, kind, slow, found):
    if nodes == 3 and kind == "send-slow" and slow(0, 1):
        pytest.skip("of three nodes, two of three pairs are slow: nothing is left to compare with")
    place = comms.place(rates(nodes, slow), 1.5)
    assert (place.kind, place.nodes) == (kind, found)
    assert place.peer == (2 if kind == "link-slow" else -1)


def test_a_matrix_without_a_hot_cell_names_nobody():
    assert comms.place(rates(4, lambda *_: False), 1.5) is None
    assert comms.place(rates(4, lambda *_: True), 1.5) is None
    assert comms.place([], 1.5) is None


@pytest.mark.parametrize("nodes", [2, 3, 4, 5, 7, 8, 9, 63, 64])
def test_in_a_round_a_node_is_in_one_pair(nodes):
    """All pairs of up to 8 nodes, each of more to four others; in few rounds."""
    rounds = comms.rounds(list(range(nodes)))
    pairs = [pair for r in rounds for pair in r]
    assert all(len({n for pair in r for n in pair}) == 2 * len(r) for r in rounds)
    assert len(pairs) == len(set(pairs)) == nodes * (nodes - 1 if nodes <= 8 else 4)
    assert len(rounds) <= (len(pairs) / max(nodes // 2, 1) if nodes <= 8 else 10)


@pytest.mark.parametrize(
    ("sends", "receives", "kind", "cause"),
    [
        ([2.7, 3.4, 5.4], [5.6, 6.3, 7.7], "receive-slow", "what node 1 receives is slow"),
        ([4.1, 4.5, 6.8], [7.4, 7.7, 8.8], "receive-slow", "what node 1 receives is slow"),
        ([6.2, 6.3, 4.8], [4.7, 2.0, 3.0], "send-slow", "what node 1 sends is slow"),
        ([5.1, 4.8, 5.6], [5.3, 5.2, 6.1], "send-slow", "node [1] sends and receives slowly"),
    ],
)
def test_a_full_queue_of_one_side_slows_the_other(sends, receives, kind, cause):
    """As links with a fifth of their rate were measured beside a job that went on: what was slow delayed the acknowledgements of what was not."""
    others = [0, 2, 3]
    matrix = [Probed(1, "transfer", a, 20e6 / (sends[others.index(b)] if a == 1 else receives[others.index(a)] if b == 1 else 1.0), b) for a in range(4) for b in range(4) if a != b]
    place = comms.place(matrix, 1.5)
    assert (place.kind, place.nodes, place.cause) == (kind, (1,), cause)


def test_slow_transfers_are_found_without_anybody_being_slow():
    t = comms.Transfers(Settings())
    found = None
    for j in joined(60, 4, lambda r, s: summary(r, s, seq=4 * s, inside=(20 if s <= 40 else 60) * MS))[1]:
        t.add(together([j]), 100 * MS)
        found = t.look([WORLD], {WORLD: range(4)}) or found
    assert found.finding.kind == "comm-slow"
    assert found.finding.since_step == 41
    assert found.groups == (WORLD,)


@pytest.mark.parametrize("together_", [1, 6])
def test_a_group_that_comes_later_is_learned_before_it_is_judged(together_):
    """An evaluation's or a new phase's group: its first transfers are no slowness; when they become slow, they are."""
    t, found, batch = comms.Transfers(Settings()), [], []
    table, other = Join(4), 2
    for s in range(1, 141):
        more = [GroupStep(other, s, 0, 1, 1 << 20, *[(20 if s <= 110 else 60) * MS] * 2)] if s > 40 else []
        table.add([StepSummary(r, s, 0, 100 * MS, 60 * MS, program=1, groups=[GroupStep(WORLD, s, 0, 1, 1 << 20, 20 * MS, 20 * MS), *more]) for r in range(4)], 0.0)
        batch += table.ready(0.0)
        if len(batch) >= together_:
            t.add(together(batch), 100 * MS)
            batch = []
            if slow := t.look(table.keys, {WORLD: range(4), other: range(4)}):
                found.append((s, slow.groups, slow.finding.since_step))
    assert found and 118 <= found[0][0] <= 130 and all(groups == (other,) and 108 <= since <= 114 for _, groups, since in found)


def test_two_nodes_with_a_slow_side_each_are_not_left_unsaid():
    """Node 1 sends slowly and node 2 receives slowly: the slower of the two is named, the other one when that is mended."""
    rates_ = [Probed(1, "transfer", a, 1e9 * (0.2 if a == 1 else 0.4 if b == 2 else 1.0), b) for a in range(5) for b in range(5) if a != b]
    place = comms.place(rates_, 1.5)
    assert (place.kind, place.nodes) == ("send-slow", (1,))


# --- drift, pace, losses ----------------------------------------------------------------------------------------------------


def test_a_slope_is_told_from_a_step():
    rng = np.random.default_rng(7)
    for _ in range(10):
        noise = rng.normal(0, 0.02, 100)
        assert is_drift(np.maximum(np.arange(100) - 30, 0) * 0.002 + noise)
        assert not is_drift((np.arange(100) > 60) * 0.15 + noise)


def one_step(step, wall_us, program):
    table = Join(2)
    table.add([summary(r, step, wall=wall_us, program=program) for r in range(2)], 0.0)
    (j,) = table.ready(0.0)
    return together([replace(j, program=np.full(2, program))])


def test_all_slower_is_said_and_a_new_program_is_not():
    pace, other = Pace(Settings()), Pace(Settings())
    for s in range(300):
        wall = int(1e5 * (1.3 if s > 200 else 1.0))
        pace.add(one_step(s, wall, 1))
        other.add(one_step(s, wall, 1 + (s > 200)))
    assert pace.look().kind == "global-slow"
    assert other.look() is None


def test_when_all_became_slower_is_said_the_same_at_every_look():
    """Also while the long window has too little past for its noise: that must not take the level away that the short one found."""
    pace, since = Pace(Settings()), set()
    rng = np.random.default_rng(3)
    for s in range(1, 131):
        pace.add(one_step(s, int(1e5 * (1.3 if s > 44 else 1.0) * (1 + 0.005 * rng.normal())), 1))
        if s % 2 == 0 and (found := pace.look()) is not None:
            since.add(found.since_step)
    assert len(since) == 1 and abs(since.pop() - 45) <= 3


@pytest.mark.parametrize(("bits", "named"), [({1: 1, 0: 2, 2: 2, 3: 2}, (1,)), (dict.fromkeys(range(4), 3), ()), ({2: 2}, (2,))])
def test_the_first_number_that_is_none(bits, named):
    losses = Losses()
    _, steps = joined(3, 4, lambda r, s: summary(r, s, bad=bits.get(r, 0) if s >= 2 else 0))
    found = [losses.add(j) for j in steps]
    assert found[0] is None
    assert (found[1].kind, found[1].ranks, found[1].step) == ("nan", named, 2)
    assert (found[2].ranks, found[2].since_step) == (named, 2)
    assert record.BAD_LOSS == 1


# --- verdicts ---------------------------------------------------------------------------------------------------------------


def slow_finding(slowdown=0.2, step=10, kind="compute-slow"):
    return Finding(kind, (3,), step, step, 1.0, slowdown=slowdown)


def book(**settings):
    return Verdicts("job", 1, Settings(**settings), lambda r: (r // 2, f"host{r // 2}, local rank {r % 2}"))


def test_what_holds_is_confirmed_and_what_ends_is_cleared():
    v = book()
    key = ("slow", 3)
    states = [t.state for i in range(4) for t in v.window("steps", [Seen(key, slow_finding())], float(i), 0.0)]
    assert states == ["suspected", "confirmed"]
    states = [t.state for i in range(4, 9) for t in v.window("steps", [], float(i), 0.0)]
    assert states == ["cleared"]
    (again,) = v.window("steps", [Seen(key, slow_finding())], 20.0, 0.0)
    assert again.id == 1
    assert any(e.signal == "times that it came back" for e in again.evidence)
    for i in range(4):
        v.window("steps", [], 21.0 + i, 0.0)
    (other,) = v.window("steps", [Seen(key, slow_finding())], 200.0, 0.0)
    assert other.id == 2


def probes(culprit, peers=1e11):
    return [Probed(1, "compute", 3, culprit), *(Probed(1, "compute", r, peers) for r in (4, 5, 6))]


@pytest.mark.parametrize(("rate", "grade", "recommended"), [(0.8e11, "evict", "evict"), (0.99e11, "report", "report")])
def test_only_a_probe_that_agrees_makes_a_slow_rank_one_to_evict(rate, grade, recommended):
    v = book(policy="evict")
    for i in range(3):
        v.window("steps", [Seen(("slow", 3), slow_finding())], float(i), 0.0)
    v.probed(("slow", 3), probes(rate), 3.0, 0.0)
    assert v.all()[0].grade == "report"  # not yet for long enough
    v.window("steps", [Seen(("slow", 3), slow_finding())], 100.0, 0.0)
    told = v.window("steps", [Seen(("slow", 3), slow_finding())], 101.0, 0.0) or v.all()
    assert (told[-1].grade, told[-1].recommended) == (grade, recommended)
    assert told[-1].state == "confirmed"


def test_one_eviction_an_hour():
    v = book(policy="evict")
    for i in range(3):
        v.window("steps", [Seen(("slow", 3), slow_finding())], float(i), 0.0)
    v.probed(("slow", 3), probes(0.7e11), 3.0, 0.0)
    v.acted(1, "evict", 1000.0)
    v.window("steps", [Seen(("slow", 3), slow_finding())], 100.0, 1100.0)
    assert v.all()[0].recommended == "report"
    v.window("steps", [Seen(("slow", 3), slow_finding())], 101.0, 5000.0)
    assert v.all()[0].recommended == "evict"


def test_losses_lower_confidence():
    sure, unsure = book(), book()
    unsure.lost = (0.2, 1000)
    for v in (sure, unsure):
        v.window("steps", [Seen(("slow", 3), slow_finding())], 0.0, 0.0)
    assert unsure.all()[0].confidence < sure.all()[0].confidence
    assert unsure.all()[0].lost_records == 1000


def test_a_probe_needs_peers_to_agree():
    assert agree(slow_finding(), [Probed(1, "compute", 3, 1e10)]) is None
    assert agree(slow_finding(), probes(0.0)) is None


def test_what_was_measured_from_outside_is_not_compared_with_what_ranks_measured_themselves():
    """Another library's matmul may be several times as fast, or as slow: it would convict, or acquit, by itself."""
    outside = Probed(1, "compute", 3, 1e10, outside=True)
    assert agree(slow_finding(), [outside, *probes(0.0)[1:]]) is None
    assert agree(slow_finding(), [outside, *(Probed(1, "compute", r, 1e11, outside=True) for r in (4, 5, 6))]) is True


def test_a_rank_is_not_probed_again_at_once():
    asks = Asks(Settings())
    first = asks.probe(("slow", 3), (3,), (4, 5, 6), 0.0)
    assert {a.what for a in first} == {"compute", "memory"}
    assert asks.probe(("slow", 3), (3,), (4, 5, 6), 10.0) == []
    for a in first:
        asks.answered([Probed(a.id, a.what, r, 1e9) for r in a.ranks])
    ended, _, _ = asks.done(11.0)
    assert len(ended) == 1
    assert asks.probe(("slow", 3), (3,), (4, 5, 6), 30.0) == []
    assert asks.probe(("slow", 3), (3,), (4, 5, 6), 61.0)


# --- saves ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("saves_ms", "named"),
    [([40, 0, 0, 0, 0, 0], []), ([40, 40, 41, 39, 40, 200], [5]), ([40, 0, 41, 39, 0, 90], [5]), ([40, 40, 41, 39, 40, 42], [])],
    ids=["one saves for all", "one is slow", "one is slow of those that save", "all alike"],
)
@pytest.mark.parametrize("each_ms", [0, 4], ids=["", "and a snapshot in every step"])
def test_a_save_is_compared_with_those_of_others_that_save(saves_ms, named, each_ms):
    settings = Settings()
    watch = Watch(6, settings, Roll(6, 1, settings), Patience(settings))
    factor = noisy(5, 6, 120)
    seen = []
    for j in joined(120, 6, lambda r, s: summary(r, s, own=int(80 * MS * factor[s, r]), checkpoint_us=each_ms * MS + saves_ms[r] * MS * (s % 25 == 0)))[1]:
        seen += [x for shown, _ in watch.take([j]) for x in shown]
    assert {r for x in seen for r in x.finding.ranks if x.finding.kind == "checkpoint-stall"} == set(named)


def test_rare_long_batches_do_not_hide_a_slow_rank():
    """One batch in 48 is a third longer: medians do not mind, and the short window is one of medians."""
    rng = np.random.default_rng(8)
    factor = noisy(8, 4, 100) * (1 + 0.33 * (rng.random((101, 4)) < 1 / 48))
    first, _ = watched(100, 4, lambda r, s: summary(r, s, own=int(80 * MS * factor[s, r]) + 9 * MS * (r == 2 and s > 50)))
    assert set(first) == {2}
    assert first[2][0] <= 64


# --- slow ranks in noise ----------------------------------------------------------------------------------------------------


def noisy_job(seed, *, cost, onset=43, steps=90, size=4):
    """Steps after the onset until rank 0 was found by itself (not only as one that may be), and who else was; as real jobs of 4 ranks on 2 cores are: steps vary by
    3 %, one in 48 is a quarter longer."""
    rng = np.random.default_rng(seed)
    table, stragglers, first, others = Join(size), Stragglers(size, Settings()), None, set()
    for step in range(1, steps + 1):
        own = 0.75 + 0.03 * rng.normal(size=size) + 0.25 * (rng.random(size) < 1 / 48)
        own[0] += cost if step >= onset else 0.0
        table.add([summary(r, step, wall=int((own.max() + 0.2) * 1e5), own=int(own[r] * 1e5)) for r in range(size)], 0.0)
        for j in table.ready(0.0):
            stragglers.add(together([j]), [np.arange(size)])
        for x in stragglers.look() if step % 2 == 0 else ():
            if x.rank == 0 and step >= onset and not x.half:
                first = step - onset if first is None else first
            elif not x.half:
                others.add(x.rank)
    return first, others


@pytest.mark.parametrize(("cost", "within_20", "within_40"), [(0.06, 0.25, 0.4), (0.085, 0.55, 0.75), (0.12, 0.88, 0.95)])
def test_a_slow_rank_is_found_in_noise(cost, within_20, within_40):
    found = [noisy_job(seed, cost=cost) for seed in range(60)]
    steps = np.array([first if first is not None else 1 << 30 for first, _ in found])
    print(f"{cost:.1%} of a step: within 20 steps {np.mean(steps <= 20):.2f}, within 40 {np.mean(steps <= 40):.2f}")
    assert np.mean(steps <= 20) >= within_20
    assert np.mean(steps <= 40) >= within_40
    assert not [others for _, others in found if others]


def test_what_a_short_window_shows_is_not_held_up_by_a_longer_one():
    """The mean of 20 steps may lie farther over its bound than the middle of 10 does over its own: it needs time to be believed, the other one does not."""
    rng = np.random.default_rng(5)
    table, stragglers, looks = Join(4), Stragglers(4, Settings()), 0
    for step in range(1, 160):
        own = 0.75 + 0.005 * rng.normal(size=4)
        own[0] += 0.06 if step >= 120 else 0.0
        table.add([summary(r, step, own=int(own[r] * 1e5)) for r in range(4)], 0.0)
        for j in table.ready(0.0):
            stragglers.add(together([j]), [np.arange(4)])
        late = stragglers.look() if step % 2 == 0 else []
        looks += len([x for x in late if x.rank == 0 and not x.half])
        if looks == 3:  # so many confirm it
            break
    assert step - 120 <= 16


def test_more_computing_is_found_in_noise_of_the_processors_and_only_if_it_costs_something():
    """What ranks wait for a processor is noise that their computing does not have: 8 % more computing is found at once. Where it is waited for that much less, nothing is held up."""

    def first(free):
        s, rng = Stragglers(4, Settings()), np.random.default_rng(5)
        compute, waits = 80 * MS * (1 + 0.01 * rng.standard_normal((120, 4))), 15 * MS + 8 * MS * np.abs(rng.standard_normal((120, 4)))
        compute[50:, 1] += 8 * MS
        waits[50:, 1] -= free

        def of(r, step):
            delay = int(waits[step, r])
            own = int(compute[step, r]) + delay
            return summary(r, step, own=own, wall=own + 10 * MS, delay_us=delay)

        found = {}
        for j in joined(119, 4, of)[1]:
            s.add(together([j]), [np.arange(4)])
            for late in s.look():
                found.setdefault(late.rank, j.step)
        return found

    assert set(first(0)) == {1} and first(0)[1] <= 63
    assert first(10 * MS) == {}


@pytest.mark.parametrize("seed", [6, 7, 9])
def test_early_in_a_job_who_stays_near_a_bound_is_still_found(seed):
    """4 % of a step, in noise of 2.4 %, found in three looks within 70 steps: after the first one, nearly over the bound is enough while little is known of noise."""
    s, rng = Stragglers(8, Settings()), np.random.default_rng(seed)
    noise = 1 + 0.03 * rng.standard_normal((200, 8))

    def of(r, step):
        own = int(80 * MS * noise[step, r]) + (4 * MS if r == 2 and step >= 60 else 0)
        return summary(r, step, own=own, wall=own + 20 * MS)

    looks = dict.fromkeys(range(8), 0)
    for j in joined(130, 8, of)[1]:
        s.add(together([j]), [np.arange(8)])
        for late in s.look() if j.step % 2 == 0 else ():
            looks[late.rank] += not late.half
    print(f"looks that found it: {looks}")
    assert looks[2] >= 3
    assert sum(looks.values()) == looks[2]


def test_what_began_at_once_is_no_drift_whatever_the_noise_draws():
    """Of 400 steps of 3 % in noise of 2 % none is a line; of 200 lines to 12 % all are."""

    def drifts(seed, grown):
        return is_drift(0.02 * np.random.default_rng(seed).standard_normal(len(grown)) + grown)

    steps, lines = [drifts(s, 0.03 * (np.arange(60) >= 35)) for s in range(400)], [drifts(s, 0.12 * np.clip((np.arange(70) - 20) / 50, 0, None)) for s in range(200)]
    print(f"steps that were called drift: {sum(steps)} of 400; lines: {sum(lines)} of 200")
    assert sum(steps) == 0 and sum(lines) == 200
