"""Records become summaries: what a rank did of its own, and what it waited for, from a hand-written run whose truth is known."""

from __future__ import annotations

import time

import numpy as np
import pytest

from ckptd.monitor import record
from ckptd.monitor.ring import Group, Ring
from ckptd.monitor.steps import APART_US, EVERY_MAX, Samples, Summarizer, between, join_node, recent_signatures, stride, summarize
from ckptd.monitor.tap_writer import Writer

MS = 1_000_000
ALL_REDUCE = record.OPS.index("all_reduce")
SEND = record.OPS.index("send")


def group(key: int = 7, size: int = 4) -> Group:
    return Group(key, size, 0, tuple(range(size)), 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, False, -1, 0, 0, 0)


class Run:
    """Writes records as a tap would."""

    def __init__(self) -> None:
        self.rows: list[tuple[int, ...]] = []
        self.seq = 0

    def op(self, entered: int, returned: int, ended: int, *, bytes_: int = 64, flags: int = 0, waited_us: int = 0, op: int = ALL_REDUCE) -> None:
        self.seq += 1
        self.rows.append((len(self.rows) + 1, entered, returned, ended, bytes_, self.seq, 0, 0, op, 7, flags, -1, waited_us, 0))

    def mark(self, kind: int, entered: int, ended: int = 0, *, value: int = 0, flags: int = 0) -> None:
        self.rows.append((len(self.rows) + 1, entered, 0, ended, value, 0, 0, 255, kind, 0, record.MARK | flags, -1, 0, 0))

    @property
    def records(self) -> np.ndarray:
        return np.array(self.rows, record.RECORD)


def test_waiting_inside_an_operation_is_not_work():
    run = Run()
    run.mark(record.STEP, 100 * MS)
    run.op(110 * MS, 110 * MS, 118 * MS, bytes_=10)  # 10 ms of work, 8 ms until all had come
    run.op(125 * MS, 125 * MS, 126 * MS, bytes_=10)  # 7 ms of work
    run.mark(record.STEP, 130 * MS)  # 4 ms
    second = Summarizer(3).feed(0, run.records, 0, [group()], 8192)[-1].summary
    assert (second.step, second.wall_us, second.self_us, second.ops) == (2, 30_000, 21_000, 2)
    assert second.groups[0].ops == 2
    assert second.groups[0].inside_us == 9_000


def test_seen_waits_are_subtracted_and_overlapped_compute_is_not():
    run = Run()
    run.mark(record.STEP, 100 * MS)
    run.op(105 * MS, 130 * MS, 129 * MS, flags=record.WAITED | record.ASYNC, waited_us=10_000)  # entered at 105, compute until 120, wait until 130
    run.mark(record.STEP, 140 * MS)
    s = Summarizer(0).feed(0, run.records, 0, [group()], 8192)[-1].summary
    assert s.wall_us == 40_000
    assert s.self_us == 30_000


def test_numbers_of_the_session_win_over_the_optimizers_marks():
    run = Run()
    for step in range(5, 8):
        run.op(step * 100 * MS, step * 100 * MS, step * 100 * MS + MS)
        run.mark(record.STEP, step * 100 * MS + 50 * MS)
        run.mark(record.STEP, step * 100 * MS + 51 * MS, value=step, flags=record.NUMBERED)
    got = [d.summary.step for d in Summarizer(0).feed(0, run.records, 0, [group()], 8192)]
    assert got == [5, 6, 7]


def test_parts_are_told_apart():
    run = Run()
    run.mark(record.STEP, 100 * MS)
    run.mark(record.DATA, 100 * MS, 104 * MS)
    run.mark(record.GC, 105 * MS, 107 * MS)
    run.mark(record.LOSS, 108 * MS, value=record.BAD_LOSS)
    run.op(110 * MS, 110 * MS, 111 * MS)
    run.mark(record.OPTIMIZER, 111 * MS, 114 * MS)
    run.mark(record.STEP, 115 * MS)
    s = Summarizer(0).feed(0, run.records, 0, [group()], 8192)[-1].summary
    assert (s.data_us, s.gc_us, s.optimizer_us, s.bad) == (4000, 2000, 3000, record.BAD_LOSS)
    assert s.self_us == 14_000


def test_a_step_longer_than_the_ring_is_taken_in_parts():
    run = Run()
    run.mark(record.STEP, MS)
    for i in range(100):
        run.op((2 + i) * MS, (2 + i) * MS, (2 + i) * MS + MS // 2)
    run.mark(record.STEP, 200 * MS)
    records, s, got = run.records, Summarizer(0), []
    while s.begin < len(records):
        window = records[s.begin : s.begin + 48]
        before = s.begin
        got += s.feed(s.begin, window, 0, [group()], 64)
        assert s.begin > before
    assert [d.summary.ops for d in got] == [0, 100]
    assert got[1].summary.self_us == pytest.approx(1000 + 99 * 500 + 98_500, abs=2)


def test_history_tells_order_and_kind_but_not_uneven_sizes():
    def history(*ops: tuple[int, int]) -> int:
        run = Run()
        for i, (op, size) in enumerate(ops):
            run.op((i + 1) * MS, (i + 1) * MS, (i + 1) * MS + 1, op=op, bytes_=size)
        run.mark(record.STEP, 100 * MS)
        return Summarizer(0).feed(0, run.records, 0, [group()], 8192)[0].summary.groups[0].history

    broadcast, gather = record.OPS.index("broadcast"), record.OPS.index("all_gather")
    assert history((ALL_REDUCE, 8), (broadcast, 8)) == history((ALL_REDUCE, 8), (broadcast, 8))
    assert history((ALL_REDUCE, 8), (broadcast, 8)) != history((broadcast, 8), (ALL_REDUCE, 8))
    assert history((ALL_REDUCE, 8)) != history((ALL_REDUCE, 16))
    assert history((gather, 8)) == history((gather, 16))


def test_lost_records_leave_no_guess():
    run = Run()
    run.op(MS, MS, 2 * MS)
    run.mark(record.STEP, 10 * MS)
    s = Summarizer(0).feed(0, run.records, 5, [group()], 8192)[0].summary
    assert (s.lost, s.program, s.groups) == (5, 0, [])


def test_the_nodes_ranks_are_joined_by_operation():
    done = []
    for late in (0, 3):  # rank 1 comes 3 ms later to both: it waits least
        run = Run()
        run.mark(record.STEP, MS)
        run.op((10 + late) * MS, (10 + late) * MS, 15 * MS)
        run.op((20 + late) * MS, (20 + late) * MS, 25 * MS)
        run.mark(record.STEP, 30 * MS)
        done.append(Summarizer(late).feed(0, run.records, 0, [group()], 8192)[-1])
    joined = join_node([done])
    assert [s.groups[0].inside_us for s in joined] == [10_000, 4_000]
    assert [s.groups[0].least_us for s in joined] == [4_000, 4_000]


def test_samples_are_joined_by_straight_lines():
    s = Samples()
    s.add(0, 0, 0)
    s.add(100 * MS, 50 * MS, 10 * MS)
    cpu, delay = between([s], np.array([0, 50 * MS]), np.array([50 * MS, 100 * MS]), np.zeros(2, np.int64))
    assert [*cpu] == [25_000, 25_000]
    assert [*delay] == [5_000, 5_000]


@pytest.mark.parametrize("seed", range(20))
def test_samples_of_several_ranks_are_each_ranks_own(seed):
    """Steps before the first look, after the last, and longer than many looks; ranks of which there are none."""
    rng = np.random.default_rng(seed)
    ranks, begin, end, rank_of, wanted = [], [], [], [], []
    up = int(rng.choice([10**12, 10**15, 10**16]))  # a clock that has run for a quarter of an hour, for 12 days, for four months
    for r in range(int(rng.integers(1, 9))):
        s = Samples()
        looks = np.sort(rng.integers(up, up + 10**10, int(rng.integers(0, 30))))
        spent = np.cumsum(rng.integers(0, 10**8, (2, len(looks))), axis=1) + 10**12
        for row in zip(looks.tolist(), *spent.tolist(), strict=True):
            s.add(*row)
        times = np.sort(rng.integers(up - 10**9, up + 11 * 10**9, int(rng.integers(2, 20))))
        ranks.append(s)
        begin, end, rank_of = [*begin, *times[:-1]], [*end, *times[1:]], [*rank_of, *[r] * (len(times) - 1)]
        base = up - 10**9
        its = [np.diff(np.interp(times - base, looks - base, v - v[0])) / 1000 if len(looks) > 1 else np.zeros(len(times) - 1) for v in spent]
        wanted.append(np.array(its))
    found = between(ranks, np.array(begin), np.array(end), np.array(rank_of))
    np.testing.assert_allclose(found, np.concatenate(wanted, axis=1), atol=2)


def test_signatures_of_what_was_entered_before_are_the_writers():
    """By group, newest first, without the newest; a lost record ends them; marks and sends are none of them."""
    ring = Ring.create()
    writer = Writer(ring)
    rows = [writer.group(70 + g, 2, 0, range(2)) for g in range(2)]
    seen = []
    for i in range(6):
        writer.enter(rows[0], ALL_REDUCE, 7, 100 + i, 0, -1, 100 + i)
        seen.append(ring.groups()[0].signature)
        writer.mark(record.DATA, 1, 2)
    writer.enter(rows[1], ALL_REDUCE, 7, 8, 0, -1, 8)
    records = ring.read(0).records
    assert recent_signatures(records, 16) == {0: seen[-2::-1], 1: []}
    assert recent_signatures(records, 3)[0] == seen[-2:-5:-1]
    lost = records[(records["group"] != 0) | (records["seq"] != 4)]
    assert recent_signatures(lost, 16)[0] == [seen[4]]
    assert recent_signatures(records[:0], 16) == {}
    ring.close()


def test_summarizing_is_cheap():
    run = Run()
    for step in range(60):
        for i in range(12):
            t = (step * 20 + i) * MS
            run.op(t, t, t + MS // 2)
        run.mark(record.STEP, (step * 20 + 19) * MS)
    records, best = run.records, 1e9
    for _ in range(5):
        began = time.perf_counter()
        assert len(Summarizer(0).feed(0, records, 0, [group()], 8192)) == 60
        best = min(best, time.perf_counter() - began)
    print(f"{best / 60 * 1e6:.1f} us per step of 12 operations")
    assert best / 60 < 500e-6


def random_run(rng: np.random.Generator, groups: int, numbered: bool, begin_ms: int) -> np.ndarray:
    """Steps of operations in any order, waits seen and not, sends, marks of all kinds."""
    run, t = Run(), begin_ms * MS
    for step in range(int(rng.integers(2, 7))):
        for _ in range(int(rng.integers(0, 9))):
            t += int(rng.integers(0, 3 * MS))
            inside = int(rng.integers(0, 4 * MS))
            flags = int(rng.choice([0, record.WAITED | record.ASYNC, record.P2P, record.DEVICE]))
            returned = t + inside if rng.random() < 0.8 else 0
            ended = t + int(inside * rng.random()) if rng.random() < 0.8 else 0
            run.op(t, returned, ended, flags=flags, waited_us=inside // 2000, op=int(rng.choice([ALL_REDUCE, SEND])), bytes_=int(rng.integers(1, 9)))
            row = run.rows[-1]
            run.rows[-1] = (*row[:9], int(rng.integers(0, groups + 1)), *row[10:13], int(rng.integers(0, 50)))
        run.mark(record.DATA, t, t + MS)
        run.mark(record.LOSS, t, value=int(rng.integers(0, 3)))
        t += int(rng.integers(0, 3 * MS))
        run.mark(record.STEP, t, value=40 + step, flags=record.NUMBERED if numbered else 0)
    return run.records


@pytest.mark.parametrize("seed", range(40))
def test_ranks_summed_at_once_are_as_summed_alone(seed):
    """Same times, the same numbers for different groups, some numbered and some not, two windows each."""
    rng = np.random.default_rng(seed)
    ranks = int(rng.integers(1, 9))
    alone, together = ([Summarizer(r) for r in range(ranks)] for _ in range(2))
    groups = [[group(int(rng.integers(1, 1 << 60)), int(rng.integers(2, 9))) for _ in range(int(rng.integers(1, 4)))] for _ in range(ranks)]
    windows = [[random_run(rng, len(groups[r]), r % 2 == 0, begin) for begin in (1000 * (r % 3), 2000)] for r in range(ranks)]
    for r in range(ranks):
        for s in (alone[r], together[r]):
            for at in range(0, 4000, 7):
                s.samples.add(at * MS, at * MS // (r + 2), at * MS // (r + 9))
    for window in range(2):
        lost = [int(rng.integers(0, 2)) for _ in range(ranks)]
        of_each = [alone[r].feed(0, windows[r][window], lost[r], groups[r], 8192) for r in range(ranks)]
        batches = [together[r].cut(0, windows[r][window], lost[r], groups[r], 8192) for r in range(ranks)]
        of_all = summarize([b for b in batches if b is not None])
        assert [[d.summary for d in done] for done in of_all] == [[d.summary for d in done] for done in of_each]
        for a, b in zip([d for done in of_all for d in done], [d for done in of_each for d in done], strict=True):
            assert all(np.array_equal(getattr(a.timed, n), getattr(b.timed, n)) for n in ("keys", "seqs", "inside_ns"))


def test_strides_are_powers_of_two_that_lie_within_each_other():
    """Two nodes that see a step's length a little differently tell steps of which the fewer are among the more."""
    strides = [stride(us) for us in range(1, 300_000, 7)]
    assert all(n & (n - 1) == 0 and 1 <= n <= EVERY_MAX for n in strides)
    assert strides == sorted(strides, reverse=True)
    assert (stride(200_000), stride(APART_US), stride(APART_US / 2), stride(40_000), stride(20_000), stride(0.0)) == (1, 1, 2, 2, 4, EVERY_MAX)


def short_steps(count: int, bad: set[int]) -> list[np.ndarray]:
    """Windows of a few steps of 10 ms; whose numbers are in `bad` had a loss that is none."""
    run, t = Run(), 1000 * MS
    cuts = [0]
    for step in range(1, count + 1):
        for _ in range(3):
            t += 3 * MS
            run.op(t - MS * (step % 2), t, t)
        if step in bad:
            run.mark(record.LOSS, t, value=record.BAD_LOSS)
        t += MS
        run.mark(record.STEP, t, value=step, flags=record.NUMBERED)
        if step % 7 == 0:
            cuts.append(len(run.rows))
    return [run.records[a:b] for a, b in zip(cuts, [*cuts[1:], len(run.rows)], strict=True)]


@pytest.mark.parametrize("every", [2, 4, 16])
def test_of_short_steps_some_are_told_as_they_are_and_nothing_wrong_is_forgotten(every):
    bad = {3, 13, 14, 29}
    windows = short_steps(64, bad)
    whole, some = Summarizer(0), Summarizer(0)
    some.every = every
    of_whole, of_some = ([d.summary for w in windows for d in s.feed(0, w, 0, [group()], 8192)] for s in (whole, some))
    assert [s.step for s in of_some] == [s.step for s in of_whole if s.step % every == 0]
    by_step = {s.step: s for s in of_whole}
    for s in of_some:
        same = by_step[s.step]
        assert (s.wall_us, s.self_us, s.ops, s.program, s.groups, s.ended_ns) == (same.wall_us, same.self_us, same.ops, same.program, same.groups, same.ended_ns)
        within = bad & {*range(s.step - every + 1, s.step + 1)}
        assert s.bad == (record.BAD_LOSS if within else 0), s.step
    assert {s.step for s in of_whole if s.bad} == bad


def test_steps_that_are_not_told_cost_no_summary():
    windows = short_steps(64, set())
    s = Summarizer(0)
    s.every = 16
    batches = [s.cut(0, w, 0, [group()], 8192) for w in windows]
    assert sum(len(b.records) for b in batches if b is not None) == 4 * (3 + 1)
