"""Summaries of all ranks side by side, by step. Pure; constant memory; time linear in ranks.

    StepSummary (rank, step) ---> Pending (one per step, until all ranks have told it, or nobody waits any longer) ---> Joined, in order of steps

Arrays are over ranks (R) or over groups in the order they were first seen (G). NaN: the rank did not tell this step, or records of it were lost.

A group's *transfer* in a step is the least that any member was inside: what is left when nobody waits for anybody. No two clocks are compared for it.

At the end of a step all members of a group have entered equally many collectives (`seq`), with equal signatures (`history`). A rank whose numbers
differ entered something else, or skipped something; where its numbers differed from the start its tap began later, and only the change counts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ckptd.monitor.report import StepSummary

Array = np.ndarray[Any, Any]

SIGNALS = ("wall", "self", "data", "gc", "checkpoint", "eval", "compile", "optimizer", "delay", "cpu", "device", "lost")
WALL, SELF, DATA, GC, CHECKPOINT, EVAL, COMPILE, OPTIMIZER, DELAY, CPU, DEVICE, LOST = range(len(SIGNALS))
PENDING_MAX = 64
PENDING_CELLS = 4_000_000
"""Steps that are waited for, in numbers: small jobs with steps of milliseconds may have many."""
GROUPS_MAX = 1 << 16
P2P_PART = 0.5
"""A group with more sends and receives than this has no transfer: a receive waits for its sender."""


def median(values: Array, axis: int = -1) -> Any:
    """Of what is known; NaN where nothing is. (numpy's own take ten times as long for a handful of ranks, and a coordinator of fast steps takes thousands a second.)"""
    ordered = np.array(values)
    ordered.sort(axis=axis)
    rows = ordered if ordered.ndim == 1 or axis == 0 else ordered.T if ordered.ndim == 2 else np.moveaxis(ordered, axis, 0)
    n = len(rows)
    if n == 0:
        return np.nan
    last = rows[n - 1]
    if not np.isnan(last).any():  # NaN sorts last
        return 0.5 * (rows[(n - 1) // 2] + rows[n // 2])
    told = n - np.isnan(ordered).sum(axis=axis)
    low, high = np.maximum((told - 1) // 2, 0), np.minimum(told // 2, n - 1)
    if ordered.ndim == 1:
        return 0.5 * (ordered[low] + ordered[high])
    both = [np.take_along_axis(ordered, np.expand_dims(at, axis), axis) for at in (low, high)]
    return np.squeeze(0.5 * (both[0] + both[1]), axis)


def known(values: Array) -> Array:
    """Zero for what is not known."""
    return np.where(np.isnan(values), 0.0, values)  # numpy's nan_to_num looks for infinities too, and takes ten times as long


@dataclass(slots=True)
class Odd:
    """At the end of a step these ranks had entered other operations of a group than the majority; `ranks` is empty where there is none. `behind`: fewer.

    `sure`: equally many before and in this step, but other ones: no boundary that fell between two operations explains that.
    """

    group: int
    ranks: tuple[int, ...]
    others: tuple[int, ...]
    seq: int
    behind: bool
    sure: bool = False


@dataclass(slots=True)
class Joined:
    """One step of all ranks. `values`: SIGNALS x R, microseconds. `program`: a small number per distinct program, -1 unknown. `transfer`, `bytes`: G."""

    step: int
    values: Array
    present: Array
    program: Array
    bad: Array
    transfer: Array
    bytes: Array
    odd: list[Odd]
    lost: int
    missing: int


@dataclass(slots=True)
class Together:
    """Several steps, oldest first, as arrays: `steps`, `wall_us` (the median rank's): K; `values`: K x SIGNALS x R; `present`, `program`: K x R; `transfer`, `bytes`:
    K x G. What a pass over few numbers costs are its calls of NumPy: a coordinator of short steps takes them by the dozen."""

    steps: Array
    wall_us: Array
    values: Array
    present: Array
    program: Array
    transfer: Array
    bytes: Array

    def __len__(self) -> int:
        return len(self.steps)

    def only(self, which: Any) -> Together:
        """Some of the steps: a slice, or an array of those that are wanted."""
        return Together(*(getattr(self, name)[which] for name in self.__slots__))

    def pieces(self, singles: int) -> Iterator[Together]:
        """The first so many by themselves, the others as one."""
        for i in range(min(max(singles, 0), len(self))):
            yield self.only(slice(i, i + 1))
        if singles <= 0:
            yield self
        elif singles < len(self):
            yield self.only(slice(singles, None))


def together(steps: Sequence[Joined]) -> Together:
    """At least one, in order. A group that was not known yet in the first of them has no transfer there."""
    groups = max(len(j.transfer) for j in steps)
    values = np.array([j.values for j in steps])
    wide = [(j.transfer, j.bytes) if len(j.transfer) == groups else (_wider(j.transfer, groups, np.nan), _wider(j.bytes, groups, 0.0)) for j in steps]
    return Together(
        np.array([j.step for j in steps], np.int64), median(values[:, WALL]), values, np.array([j.present for j in steps]), np.array([j.program for j in steps]),
        np.array([t for t, _ in wide]), np.array([b for _, b in wide]),
    )  # fmt: skip


def _wider(row: Array, size: int, fill: float) -> Array:
    return np.concatenate([row, np.full(size - len(row), fill)])


@dataclass(slots=True)
class _Pending:
    rows: list[tuple[int, ...]] = field(default_factory=list)
    at: list[int] = field(default_factory=list)
    programs: list[int] = field(default_factory=list)
    bad: list[tuple[int, int]] = field(default_factory=list)
    transfer: dict[int, int] = field(default_factory=dict)
    bytes: dict[int, int] = field(default_factory=dict)
    places: dict[int, dict[tuple[int, int, int], list[int]]] = field(default_factory=dict)
    first_s: float = 0.0


class Join:
    """Of one attempt. `known`: how many ranks tell steps at all (grows as they are first heard of)."""

    WAIT_S = 2.5

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self.heard = np.zeros(world_size, bool)
        self.known = 0
        self.pending: dict[int, _Pending] = {}
        self.done = -1
        """The newest step that was given out."""
        self.joined, self.late, self.records_lost, self.rank_steps = 0, 0, 0, 0
        self.groups: dict[int, int] = {}
        self.keys: list[int] = []
        self.every: dict[int, int] = {}
        """Node -> one in how many steps it tells: what is joined are those that all nodes tell."""
        self.unlike: dict[tuple[int, int], int] = {}
        """(group, rank) -> by how much its sequence numbers differ from the start."""
        self._all = self._before = 1
        """One in so many is joined: of all steps, and of those until `_until`."""
        self._until = self._newest = -1
        self._met: set[int] = set()
        self._late_run = 0
        self._programs: dict[int, int] = {0: -1}
        self._limit = max(PENDING_MAX, PENDING_CELLS // (len(SIGNALS) * max(1, world_size)) // 8)

    def add(self, summaries: Iterable[StepSummary], now_s: float, *, node: int = 0, every: int = 1) -> None:
        """Take what ranks told, of a node that tells every so-manieth step. A step that was already given out is counted as late."""
        if every != self.every.get(node, 1):
            self._follow(node, every)
        pending, size = self.pending, self.world_size
        for s in summaries:
            rank, step = s.rank, s.step
            if not 0 <= rank < size:
                continue
            self._newest = max(self._newest, step)
            if not self._joins(step):
                continue
            if step <= self.done and not self._renumbered(step):
                self.late += 1
                continue
            p = pending.get(step)
            if p is None:
                p = pending[step] = _Pending(first_s=now_s)
            if not self.heard[rank]:
                self.heard[rank] = True
                self.known += 1
            p.at.append(rank)
            p.rows.append((
                s.wall_us, s.self_us, s.data_us, s.gc_us, s.checkpoint_us, s.eval_us, s.compile_us, s.optimizer_us, s.delay_us, s.cpu_us, s.device_us, s.lost,
            ))  # fmt: skip
            p.programs.append(self._program(s.program))
            if s.bad:
                p.bad.append((rank, s.bad))
            if s.groups and not s.lost:
                self._groups(p, rank, s)

    def _joins(self, step: int) -> bool:
        return step % (self._all if step > self._until else self._before) == 0

    def _follow(self, node: int, every: int) -> None:
        """A node tells more or fewer steps than before. Of more, those do not count that lie before what another node, when it still told fewer, has told."""
        self.every[node] = every
        fewest = max(self.every.values())
        self._before = max(fewest, self._all, self._before if self._until > self.done else 1)
        if fewest < self._all:
            self._until = self._newest + self._all - 1  # so far a node may have come without telling more
        self._all = fewest
        self.pending = {step: p for step, p in self.pending.items() if self._joins(step)}

    def _renumbered(self, step: int) -> bool:
        """Whether the job numbers its steps anew: nothing but old numbers for long."""
        self._late_run += 1
        if self.pending or self._late_run <= 8 * self.world_size:
            return False
        self.done, self._late_run = step - 1, 0
        return True

    def _program(self, program: int) -> int:
        known = self._programs
        number = known.get(program)
        if number is None:
            if len(known) > 4096:  # every step is another one: they say nothing
                known.clear()
                known[0] = -1
            number = known[program] = len(known) - 1
        return number

    def _groups(self, p: _Pending, rank: int, s: StepSummary) -> None:
        transfer, nbytes, places = p.transfer, p.bytes, p.places
        for g in s.groups:
            key = g.key
            by_place = places.get(key)
            if by_place is None:
                by_place = places[key] = {}
                if key not in self.groups and len(self.groups) < GROUPS_MAX:
                    self.groups[key] = len(self.keys)
                    self.keys.append(key)
            by_place.setdefault((g.seq, g.ops, g.history), []).append(rank)
            inside = g.least_us or g.inside_us
            if inside and g.p2p <= P2P_PART * g.ops:
                if inside < transfer.get(key, 1 << 62):
                    transfer[key] = inside
                if g.bytes > nbytes.get(key, 0):
                    nbytes[key] = g.bytes

    def ready(self, now_s: float) -> list[Joined]:
        """Steps that all ranks have told, or that were waited for long enough; in order."""
        whole: list[tuple[int, _Pending]] = []
        while self.pending:
            step = min(self.pending)
            p = self.pending[step]
            complete = len(p.at) >= self.known and self.known == self.world_size
            if not complete and now_s - p.first_s < self.WAIT_S and len(self.pending) <= self._limit:
                break
            whole.append((step, self.pending.pop(step)))
        return self._finish(whole) if whole else []

    def _finish(self, whole: Sequence[tuple[int, _Pending]]) -> list[Joined]:
        count, size = len(whole), self.world_size
        at = np.concatenate([p.at for _, p in whole])
        of = np.repeat(np.arange(count), [len(p.at) for _, p in whole])
        rows = np.array([row for _, p in whole for row in p.rows], np.float64)
        lost = rows[:, LOST]
        values = np.full((count, size, len(SIGNALS)), np.nan, np.float32)
        values[of, at] = rows
        values[of[lost > 0], at[lost > 0], :LOST] = np.nan
        values = values.transpose(0, 2, 1)
        lost = np.bincount(of, lost, count).astype(int).tolist()
        present = np.zeros((count, size), bool)
        present[of, at] = True
        program = np.full((count, size), -1, np.int32)
        program[of, at] = np.concatenate([p.programs for _, p in whole])
        bad = np.zeros((count, size), np.uint8)
        transfer = np.full((count, len(self.keys)), np.nan)
        nbytes = np.zeros((count, len(self.keys)))
        out = []
        for k, (step, p) in enumerate(whole):
            for rank, bits in p.bad:
                bad[k, rank] = bits
            for key, us in p.transfer.items():
                if (g := self.groups.get(key)) is not None:
                    transfer[k, g], nbytes[k, g] = us, p.bytes.get(key, 0)
            odd = [o for key, by_place in p.places.items() if (o := self._odd(key, by_place)) is not None]
            told = len(set(p.at))
            out.append(Joined(step, values[k], present[k], program[k], bad[k], transfer[k], nbytes[k], odd, lost[k], self.known - told))
        self.done, self._late_run = whole[-1][0], 0
        self.joined += count
        self.rank_steps += len(at) * self._all
        self.records_lost += sum(lost)
        return out

    def _odd(self, key: int, by_place: Mapping[tuple[int, int, int], Sequence[int]]) -> Odd | None:
        first = key not in self._met
        self._met.add(key)
        if len(by_place) < 2:
            return None
        usual = _majority(by_place)
        if first:  # before anything was compared: taps that began at different times
            seq = usual[0] if usual else max(by_place)[0]
            for place, ranks in by_place.items():
                if place != usual:
                    self.unlike.update({(key, r): place[0] - seq for r in ranks})
            return None
        return self._compared(key, by_place)

    def _compared(self, key: int, by_place: Mapping[tuple[int, int, int], Sequence[int]]) -> Odd | None:
        seqs: dict[int, list[int]] = {}
        histories: dict[tuple[int, int, int], list[int]] = {}
        for (seq, ops, history), ranks in by_place.items():
            for r in ranks:
                shift = self.unlike.get((key, r))
                seqs.setdefault(seq - (shift or 0), []).append(r)
                if shift is None:
                    histories.setdefault((seq, ops, history), []).append(r)
        if len(seqs) > 1:
            usual = _majority(seqs)
            ranks = tuple(sorted(r for seq, rs in seqs.items() if seq != usual for r in rs)) if usual is not None else ()
            others = tuple(seqs[usual]) if usual is not None else tuple(sorted(r for rs in seqs.values() for r in rs))
            seq = usual if usual is not None else max(seqs)
            return Odd(key, ranks, others[:64], seq, behind=usual is not None and any(s < usual for s in seqs))
        if len(histories) > 1:
            place = _majority(histories)
            ranks = tuple(sorted(r for h, rs in histories.items() if h != place for r in rs)) if place is not None else ()
            others = tuple(histories[place]) if place is not None else tuple(sorted(r for rs in histories.values() for r in rs))
            return Odd(key, ranks, others[:64], next(iter(histories))[0], behind=False, sure=len({ops for _, ops, _ in histories}) == 1)
        return None

    def accept(self, odd: Odd) -> None:
        """A difference that was told once is not told again: from here on only its changes count."""
        for r in odd.ranks or odd.others:
            self._met.discard(odd.group)
            self.unlike.pop((odd.group, r), None)


def _majority(by_value: Mapping[Any, Sequence[int]]) -> Any:
    """The value that more ranks have than any other; None if there is none."""
    counts = Counter({v: len(ranks) for v, ranks in by_value.items()}).most_common(2)
    return None if len(counts) > 1 and counts[0][1] == counts[1][1] else counts[0][0]
