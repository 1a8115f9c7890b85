"""A rank's records become one summary per step. Pure: records and samples in, summaries out.

A step ends at a STEP mark (its own, by the optimizer's hook; once the session numbers steps, the numbered ones only). What lies before the last mark is whole: its
operations are done, or will never say so. A step of more records than half a ring is taken in parts.

How waiting is told from working, without any other clock than the rank's own (monitoring, self-gap):

    self = sum over operations of (entry - sync)        sync: the latest of
                                                         - the entry or return of the operation before,
                                                         - the end of any earlier operation that nobody was seen to wait for,
           - time seen in waits since                    (Work.wait returned: WAITED)

so a rank that waits for others inside an operation, in a wait, or until a reducer has finished is not working, whoever called. An operation that overlaps with
compute hides part of that compute, of all ranks alike.

Many steps of all ranks are summed in one pass over arrays: with steps of 20 ms a daemon has 400 of them per second.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np

from ckptd.monitor import record
from ckptd.monitor.report import GroupStep, StepSummary
from ckptd.monitor.ring import Group

Array = np.ndarray[Any, Any]

APART_US = 100_000
"""Of steps of less than half of this not every one is told and looked at, but those about so far apart."""
EVERY_MAX = 64
STRETCH_NS = 1 << 50
"""Thirteen days: no window of a ring holds more."""
SAMPLES_MAX = 4096
UNEVEN = np.isin(np.arange(256), [record.OPS.index(n) for n in ("all_gather", "reduce_scatter", "all_to_all", "gather", "scatter", "all_gather_coalesced", "reduce_scatter_coalesced")])
"""Operations whose members may bring different sizes: their bytes do not count when programs and histories are compared."""
ROW_OF = np.full(256, -1)
"""Mark -> the row of `_parts` that it counts for."""
ROW_OF[[record.DATA, record.GC, record.CHECKPOINT, record.EVAL, record.COMPILE, record.OPTIMIZER]] = np.arange(6)
ROW_OF[[record.RESTORE, record.PROBE]] = ROW_OF[record.CHECKPOINT]

ENDS_NUMBERED = record.MARK | record.NUMBERED
_MIX = tuple(np.uint64(c) for c in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def mix(words: Array) -> Array:
    """SplitMix64's finaliser (Steele et al., OOPSLA 2014): every bit of a word changes half of the result's."""
    z = words + _MIX[0]  # arrays wrap around without a word; scalars would warn
    z = (z ^ (z >> np.uint64(30))) * _MIX[1]
    z = (z ^ (z >> np.uint64(27))) * _MIX[2]
    return np.asarray(z ^ (z >> np.uint64(31)))


def stride(wall_us: float) -> int:
    """One in so many steps of this length says as much of speed as all, and a daemon has other work. A power of two: what one node tells, another one tells, too."""
    return min(EVERY_MAX, 1 << max(0, int(APART_US / max(wall_us, 1.0)).bit_length() - 1))


@dataclass(frozen=True, slots=True)
class Timed:
    """The collectives of one step with a known end: (group key, sequence number) and how long the rank was inside. For joining with the node's other ranks."""

    keys: Array
    seqs: Array
    inside_ns: Array


@dataclass(slots=True)
class Done:
    """One step, and what joining it needs."""

    summary: StepSummary
    timed: Timed


@dataclass(slots=True)
class Samples:
    """What the kernel said of the rank's thread, by the node's clock: processor time and time spent waiting for a processor."""

    at_ns: list[int] = field(default_factory=list)
    cpu_ns: list[int] = field(default_factory=list)
    delay_ns: list[int] = field(default_factory=list)

    def add(self, at_ns: int, cpu_ns: int, delay_ns: int) -> None:
        """One look; looks come in order."""
        self.at_ns.append(at_ns)
        self.cpu_ns.append(cpu_ns)
        self.delay_ns.append(delay_ns)
        if len(self.at_ns) > SAMPLES_MAX:
            for values in (self.at_ns, self.cpu_ns, self.delay_ns):
                del values[: SAMPLES_MAX // 2]

    def around(self, begin_ns: int, end_ns: int) -> slice:
        """The looks that an interval lies between; at least one, if there are any."""
        first = max(0, bisect_right(self.at_ns, begin_ns) - 1)
        return slice(first, max(first, bisect_left(self.at_ns, end_ns)) + 1)


def between(samples: Sequence[Samples], begin_ns: Array, end_ns: Array, rank_of: Array) -> tuple[Array, Array]:
    """(cpu, delay) in microseconds of intervals of several ranks, each rank's in order; looks are joined by straight lines. `rank_of`: each interval's place in `samples`."""
    bounds = np.searchsorted(rank_of, np.arange(len(samples) + 1)).tolist()
    base = min((s.at_ns[0] for s in samples if len(s.at_ns) > 1), default=0)
    at: list[int] = []
    cpu: list[int] = []
    delay: list[int] = []
    of: list[int] = []
    for i, s in enumerate(samples):
        if len(s.at_ns) < 2 or bounds[i] == bounds[i + 1]:
            at, cpu, delay, of = [*at, base], [*cpu, 0], [*delay, 0], [*of, 1]
            continue
        its = s.around(int(begin_ns[bounds[i]]), int(end_ns[bounds[i + 1] - 1]))
        at += s.at_ns[its]
        cpu += s.cpu_ns[its]
        delay += s.delay_ns[its]
        of.append(len(s.at_ns[its]))
    ends = np.cumsum(of)
    owner = np.repeat(np.arange(len(samples)), of)
    line = _apart(np.array(at, np.int64), owner, base)
    first, last = line[ends - of][rank_of], line[ends - 1][rank_of]  # before and after the looks nothing is known to have been spent
    begin, end = (np.clip(_apart(t, rank_of, base), first, last) for t in (begin_ns, end_ns))
    n, times = len(begin), np.concatenate([begin, end])
    both = []
    for values in (cpu, delay):
        v = np.array(values, np.int64)
        spent = np.interp(times, line, v - v[ends - of][owner])
        both.append(((spent[n:] - spent[:n]) / 1000).astype(np.int64))
    return both[0], both[1]


@dataclass(frozen=True, slots=True)
class Batch:
    """Whole steps of one rank: their records, where in them each step ends, what it is called, when it began, and what was no number in it or before it."""

    of: Summarizer
    records: Array
    places: Array
    numbers: Array
    began_ns: Array
    bad: Array
    groups: Sequence[Group]


class Summarizer:
    """One rank. Feed it windows of its ring, each beginning where it says (`begin`); or `cut` those of several ranks, and `summarize` them at once."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.begin = 0
        """The record from which the next window is to be read."""
        self.every = 1
        """Only steps whose number is a multiple are told (`stride`); a loss that is no number is told with the next of them. Operations of a step that is not told
        are not seen: not those that end in the next one, nor that one of them was another operation than the other ranks'."""
        self.samples = Samples()
        self.lost = 0
        """Records, since the beginning."""
        self._numbered = False
        self._last_ns = 0
        """When the last step ended."""
        self._count = 0
        self._rest: Array | None = None
        self._rest_lost = 0
        self._bad = 0

    def feed(self, first: int, records: Array, lost: int, groups: Sequence[Group], capacity: int) -> list[Done]:
        """Summaries of the steps that ended in a window. `first`: index of its first record; `lost`: of those that were overwritten before it."""
        batch = self.cut(first, records, lost, groups, capacity)
        return summarize([batch])[0] if batch is not None else []

    def cut(self, first: int, records: Array, lost: int, groups: Sequence[Group], capacity: int) -> Batch | None:
        """The steps that ended in a window, as `feed` takes it. They are to be summarized before the next window is cut."""
        self.lost += lost
        self._rest_lost += lost
        flags, steps = records["flags"], records["op"] == record.STEP
        if not self._numbered:
            self._numbered = bool((steps & (flags & ENDS_NUMBERED == ENDS_NUMBERED)).any())
        ends = ENDS_NUMBERED if self._numbered else record.MARK
        places = (steps & (flags & ends == ends)).nonzero()[0]
        if not len(places):
            if len(records) > capacity // 2:  # a long step: keep what it has so far, that it is not lapped
                keep = len(records) - capacity // 8
                self._keep(records[:keep])
                self.begin = self._after(first, records, keep)
            return None
        end = int(places[-1]) + 1
        whole = records[:end]
        if self._rest is not None:
            whole = np.concatenate([self._rest, whole])
            places = places + len(self._rest)
            self._rest = None
        self.begin = self._after(first, records, end)
        return self._thinned(whole, places, self._numbers(whole, places), self._began(whole, places), groups)

    def _thinned(self, records: Array, places: Array, numbers: Array, began_ns: Array, groups: Sequence[Group]) -> Batch | None:
        """The steps of these that are told."""
        bad = self._bad_of(records, places)
        if self.every == 1 and not self._bad:
            return Batch(self, records, places, numbers, began_ns, bad, groups)
        told = np.flatnonzero(numbers % self.every == 0)
        bad = self._with_next(bad, told) if bad.any() or self._bad else bad[told]
        if not len(told):
            return None
        chosen = np.zeros(len(places), np.bool_)
        chosen[told] = True
        kept = np.repeat(chosen, np.diff(places, prepend=-1))
        return Batch(self, records[kept], np.cumsum(kept)[places[told]] - 1, numbers[told], began_ns[told], bad, groups)

    @staticmethod
    def _bad_of(records: Array, places: Array) -> Array:
        """BAD_* bits of each step's losses."""
        bad = np.zeros(len(places), np.int64)
        losses = (records["op"] == record.LOSS).nonzero()[0]
        if len(losses):
            losses = losses[(records["flags"][losses] & record.MARK) != 0]
            np.bitwise_or.at(bad, np.searchsorted(places, losses), records["bytes"][losses].astype(np.int64))
        return bad

    def _with_next(self, bad: Array, told: Array) -> Array:
        """What was wrong in a step that is not told is told with the next that is."""
        found, at = [], 0
        for end in told.tolist():
            found.append(int(np.bitwise_or.reduce(bad[at : end + 1])) | self._bad)
            self._bad, at = 0, end + 1
        self._bad |= int(np.bitwise_or.reduce(bad[at:])) if at < len(bad) else 0
        return np.array(found, np.int64)

    @staticmethod
    def _after(first: int, records: Array, count: int) -> int:
        """The index of the record after the first `count` of a window; some may be missing in it, so a record's own word says its index."""
        return int(records["commit"][count - 1]) if count else first

    def _keep(self, records: Array) -> None:
        kept = records.copy() if self._rest is None else np.concatenate([self._rest, records])
        if len(kept) > record.CAPACITY_MAX // 4:  # no step ends: a loop without an optimizer that is seen
            self._rest_lost += len(kept) // 2
            kept = kept[len(kept) // 2 :]
        self._rest = kept

    def _numbers(self, records: Array, places: Array) -> Array:
        """What the steps that end there are called; they count as told."""
        self._count += len(places)
        return records["bytes"][places].astype(np.int64) if self._numbered else np.arange(self._count - len(places), self._count) + 1

    def _began(self, records: Array, places: Array) -> Array:
        """When the steps began that end there: each where the one before ended, the very first with the first thing seen."""
        ended_ns = records["entered_ns"][places].astype(np.int64)
        first = self._last_ns or min(int(records["entered_ns"].min()), int(ended_ns[0]))
        self._last_ns = int(ended_ns[-1])
        return np.concatenate([[first], ended_ns[:-1]])

    def take_lost(self) -> int:
        """How many records were lost since this was asked before."""
        lost, self._rest_lost = self._rest_lost, 0
        return lost


def summarize(batches: Sequence[Batch]) -> list[list[Done]]:
    """Summaries of each batch's steps, of different ranks, in one pass over the records of all: a pass over a few records costs what its calls of NumPy cost."""
    if not batches:
        return []
    records = np.concatenate([b.records for b in batches]) if len(batches) > 1 else batches[0].records
    firsts = np.cumsum([0, *(len(b.records) for b in batches)])
    places = np.concatenate([b.places + at for b, at in zip(batches, firsts, strict=False)])
    steps = np.cumsum([0, *(len(b.places) for b in batches)])
    spans = [*pairwise(steps.tolist())]
    count = len(places)
    rank_of = np.repeat(np.arange(len(batches)), np.diff(steps))
    ended_ns = records["entered_ns"][places].astype(np.int64)
    began_ns, numbers, bad = (np.concatenate([getattr(b, name) for b in batches]) for name in ("began_ns", "numbers", "bad"))
    cpu_us, delay_us = _processor(batches, records[places], began_ns, ended_ns, rank_of)
    marks = (records["flags"] & record.MARK) != 0
    step_of = np.searchsorted(places, np.arange(len(records)))  # a mark belongs to the step that it ends
    at = np.flatnonzero(~marks)
    ops, op_step = records[at], step_of[at]
    order = np.lexsort((ops["entered_ns"], op_step))
    ops, op_step = ops[order], op_step[order]
    op_rank = rank_of[op_step]
    self_us = _self_times(ops, op_step, began_ns, ended_ns, rank_of)
    wall_us = np.maximum(ended_ns - began_ns, 0) // 1000
    parts = _parts(records[marks], step_of[marks], count)
    device_us = np.bincount(op_step, ops["inside_us"].astype(np.float64), count).astype(np.int64)
    words = _words(ops)
    groups = _Groups(batches)
    tables, timed = _group_steps(ops, words, op_step, op_rank, rank_of, groups)
    program = _programs(ops, words, op_step, op_rank, groups, count)
    op_count = np.bincount(op_step, minlength=count)
    rows = [*zip(
        numbers.tolist(), ended_ns.tolist(), wall_us.tolist(), np.minimum(self_us, wall_us).tolist(), parts.T.tolist(), np.minimum(delay_us, wall_us).tolist(),
        cpu_us.tolist(), device_us.tolist(), op_count.tolist(), (bad & 0xFF).tolist(), program.tolist(), tables, timed, strict=True,
    )]  # fmt: skip
    return [_done(b.of, rows[i:j]) for b, (i, j) in zip(batches, spans, strict=True)]


def _processor(batches: Sequence[Batch], ends: Array, began_ns: Array, ended_ns: Array, rank_of: Array) -> tuple[Array, Array]:
    """(on a processor, waiting for one) in microseconds of each step, as its end says (`record.py`), or as looks from outside have it."""
    cpu_us, delay_us = ends["inside_us"].astype(np.int64), ends["waited_us"].astype(np.int64)
    told = cpu_us > 0
    if told.all():
        return cpu_us, delay_us
    cpu, delay = between([b.of.samples for b in batches], began_ns, ended_ns, rank_of)
    return np.where(told, cpu_us, cpu), np.where(told, delay_us, delay)


def _done(of: Summarizer, rows: Sequence[tuple[Any, ...]]) -> list[Done]:
    done = []
    for number, end, wall, own, part, delay, cpu, device, n, wrong, hashed, table, times in rows:
        if n == 0 and wall < 1000 and len(rows) > 1:
            continue  # the optimizer's own mark just before the first that is numbered
        lost = of.take_lost()
        data, gc, checkpoint, evaluation, compiling, optimizer = part
        summary = StepSummary(
            of.rank, number, end, wall, own, data, gc, checkpoint, evaluation, compiling, optimizer, delay, cpu, device, n, lost, wrong,
            0 if lost else hashed, [] if lost else table,
        )  # fmt: skip
        done.append(Done(summary, times))
    return done


class _Groups:
    """The groups of several ranks, each rank's by its own numbers, as tables of [rank * 256 + number]."""

    def __init__(self, batches: Sequence[Batch]) -> None:
        self.keys = np.zeros(256 * len(batches), np.uint64)
        self.sizes = np.zeros(256 * len(batches), np.uint64)
        self.known = np.zeros(256 * len(batches), np.bool_)
        for at, b in zip(range(0, len(self.keys), 256), batches, strict=True):
            its = slice(at, at + len(b.groups))
            self.keys[its] = [g.key for g in b.groups]
            self.sizes[its] = [g.size for g in b.groups]
            self.known[its] = True


def _apart(times_ns: Array, rank: Array, base_ns: int) -> Array:
    """Times of several ranks on one line, each rank's in a stretch of its own: so that one search over all finds what is the rank's own."""
    return np.asarray(np.clip(times_ns.astype(np.int64) - base_ns, 0, STRETCH_NS - 1) + rank * STRETCH_NS)


def _self_times(ops: Array, op_step: Array, began_ns: Array, ended_ns: Array, rank_of: Array) -> Array:
    """Microseconds of each step in which the rank was at work of its own. `rank_of`: each step's."""
    op_rank = rank_of[op_step]
    base_ns = int(began_ns.min())
    waited = (ops["flags"] & record.WAITED) != 0
    has_returned, is_over = ops["returned_ns"] > 0, ops["ended_ns"] > 0
    entered, returned, over = (_apart(ops[name], op_rank, base_ns) for name in ("entered_ns", "returned_ns", "ended_ns"))
    began_ns, ended_ns = _apart(began_ns, rank_of, base_ns), _apart(ended_ns, rank_of, base_ns)
    waits_us = ops["waited_us"].astype(np.int64)
    # Where a wait was seen, the call itself returned before it: only the wait's own interval counts, below.
    syncs = np.sort(np.concatenate([began_ns, entered, returned[has_returned & ~waited], over[is_over & ~waited]]))
    events = np.concatenate([entered, ended_ns])
    owner = np.concatenate([op_step, np.arange(len(ended_ns))])
    before = np.searchsorted(syncs, events, side="left") - 1
    sync = np.where(before >= 0, syncs[np.maximum(before, 0)], events)
    sync = np.maximum(sync, began_ns[owner])
    gaps = np.maximum(events - sync, 0)
    seen = waited & (waits_us > 0) & has_returned
    if np.any(seen):
        ends = np.sort(returned[seen])
        spans = (waits_us[seen] * 1000)[np.argsort(returned[seen], kind="stable")]
        starts = np.maximum(ends - spans, np.concatenate([[0], ends[:-1]]))  # waits of one thread do not overlap
        total = np.concatenate([[0], np.cumsum(ends - starts)])

        def until(t: Array) -> Array:
            n = np.searchsorted(ends, t, side="right")
            inside = np.minimum(n, len(ends) - 1)
            partial = np.where(n < len(ends), np.clip(t - starts[inside], 0, None), 0)
            return np.asarray(total[n] + np.minimum(partial, np.where(n < len(ends), ends[inside] - starts[inside], 0)))

        gaps = np.maximum(gaps - (until(events) - until(sync)), 0)
    return np.asarray(np.bincount(owner, gaps.astype(np.float64), len(ended_ns)) // 1000).astype(np.int64)


def _parts(marks: Array, step_of: Array, count: int) -> Array:
    """Microseconds of each kind of interval (data, gc, checkpoint with restore and probe, eval, compile, optimizer), by step."""
    lasted = np.maximum(marks["ended_ns"].astype(np.int64) - marks["entered_ns"].astype(np.int64), 0) // 1000
    lasted[marks["ended_ns"] == 0] = 0
    row = ROW_OF[marks["op"]]
    named = row >= 0
    found = np.bincount(row[named] * count + step_of[named], lasted[named].astype(np.float64), 6 * count)
    return np.asarray(found.astype(np.int64).reshape(6, count))


def _words(ops: Array) -> Array:
    """What two members of a group must agree on: operation, dtype, and bytes where all bring the same."""
    size = np.where(UNEVEN[ops["op"]], np.uint64(0), ops["bytes"].astype(np.uint64))
    return np.asarray((ops["op"].astype(np.uint64) << np.uint64(56)) ^ (ops["dtype"].astype(np.uint64) << np.uint64(48)) ^ size)


def recent_signatures(records: Array, count: int) -> dict[int, list[int]]:
    """Group (by its number in the ring) -> signatures of the last collectives before its newest, at most `count`, the newest of them first, as the ring's writer hashes them."""
    ops = records[(records["flags"] & (record.MARK | record.P2P)) == 0]
    signs, numbers = mix(_words(ops)), ops["seq"].astype(np.int64)
    found: dict[int, list[int]] = {}
    for group in np.unique(ops["group"]).tolist():
        at = np.flatnonzero(ops["group"] == group)
        at = at[np.argsort(numbers[at], kind="stable")][-count - 1 :]
        gaps = np.flatnonzero(np.diff(numbers[at]) != 1)  # what was lost is not skipped over
        found[group] = signs[at[int(gaps[-1]) + 1 if len(gaps) else 0 : -1]][::-1].tolist()
    return found


def _programs(ops: Array, words: Array, op_step: Array, op_rank: Array, groups: _Groups, count: int) -> Array:
    """A hash of each step's operations in order, blind to which group of a size it is."""
    position = np.arange(len(ops)) - np.searchsorted(op_step, op_step)
    hashes = mix(mix(words ^ (groups.sizes[op_rank * 256 + ops["group"]] << np.uint64(40))) ^ position.astype(np.uint64))
    found = np.zeros(count, np.uint64)
    np.add.at(found, op_step, hashes)
    return found


def _group_steps(ops: Array, words: Array, op_step: Array, op_rank: Array, rank_of: Array, groups: _Groups) -> tuple[list[list[GroupStep]], list[Timed]]:
    """What each group did in each step, and the collectives whose end is known. `rank_of`: each step's."""
    count = len(rank_of)
    tables: list[list[GroupStep]] = [[] for _ in range(count)]
    number = op_rank * 256 + ops["group"]
    known = groups.known[number]
    timed_us = ops["inside_us"].astype(np.int64)
    until_ns = ops["ended_ns"].astype(np.int64)
    inside_ns = np.maximum(np.where(timed_us > 0, timed_us * 1000, np.where(until_ns > 0, until_ns - ops["entered_ns"].astype(np.int64), 0)), 0)
    one = (ops["flags"] & record.P2P) == 0
    cell = op_step * 256 + ops["group"]
    order = np.argsort(cell, kind="stable")
    order = order[known[order]]
    if len(order):
        cell, one_, seqs = cell[order], one[order], ops["seq"][order].astype(np.int64)
        starts = np.flatnonzero(np.concatenate([[True], cell[1:] != cell[:-1]]))
        hashes = np.where(one_, mix(mix(words[order]) ^ seqs.astype(np.uint64)), np.uint64(0))
        columns = (
            op_step[order[starts]].tolist(), groups.keys[number[order[starts]]].tolist(), np.maximum.reduceat(seqs * one_, starts).tolist(),
            np.add.reduceat(hashes, starts).tolist(), np.add.reduceat(one_.astype(np.int64), starts).tolist(),
            np.add.reduceat(ops["bytes"][order].astype(np.int64), starts).tolist(), (np.add.reduceat(inside_ns[order] * one_, starts) // 1000).tolist(),
            np.add.reduceat((~one_).astype(np.int64), starts).tolist(),
        )  # fmt: skip
        for step, key, seq, history, n, moved, inside_us, p2p in zip(*columns, strict=True):
            tables[step].append(GroupStep(key, seq, history, n, moved, inside_us, inside_us, p2p))
    told = np.flatnonzero(one & (inside_ns > 0) & known)  # in the order of steps, as the operations are
    cuts = np.searchsorted(op_step[told], np.arange(count + 1))
    of, seq, spent = groups.keys[number[told]], ops["seq"][told].astype(np.int64), inside_ns[told]
    timed = [Timed(of[a:b], seq[a:b], spent[a:b]) for a, b in pairwise(cuts)]
    return tables, timed


def join_node(steps: Sequence[Sequence[Done]]) -> list[StepSummary]:
    """Steps, each of all ranks of a node, one after the other: `least_us` of each group becomes the sum of each operation's least time inside, over the ranks here."""
    joined = [d for step in steps if len(step) > 1 for d in step]
    of_step = np.repeat(np.arange(len(steps)), [sum(len(d.timed.keys) for d in step) if len(step) > 1 else 0 for step in steps])
    if not len(of_step):
        return [d.summary for step in steps for d in step]
    keys, seqs, inside = (np.concatenate([getattr(d.timed, name) for d in joined]) for name in ("keys", "seqs", "inside_ns"))
    order = np.lexsort((inside, seqs, keys, of_step))
    of_step, keys, seqs, inside = of_step[order], keys[order], seqs[order], inside[order]
    group = np.concatenate([[True], (of_step[1:] != of_step[:-1]) | (keys[1:] != keys[:-1])])
    first = group | np.concatenate([[True], seqs[1:] != seqs[:-1]])
    begins = np.flatnonzero(group)
    sums = np.add.reduceat(np.where(first, inside, 0), begins) // 1000
    least = dict(zip(zip(of_step[begins].tolist(), keys[begins].tolist(), strict=True), sums.tolist(), strict=True))
    for i, step in enumerate(steps):
        for d in step:
            _put_least(d.summary.groups, least, i)
    return [d.summary for step in steps for d in step]


def _put_least(groups: list[GroupStep], least: Mapping[tuple[int, int], int], step: int) -> None:
    for i, g in enumerate(groups):
        us = least.get((step, g.key), g.inside_us)
        if us < g.inside_us:
            groups[i] = GroupStep(g.key, g.seq, g.history, g.ops, g.bytes, g.inside_us, us, g.p2p)
