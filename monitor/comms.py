"""Whose transfers are slow: by group from the steps, by node and link from probes of pairs. Pure.

    transfer of a group and step (least time inside) --over its own baseline, ranks flat--> comm-slow --probes of pairs--> send-slow   a row of the matrix
                                                                                                                  receive-slow  a column
                                                                                                                  link-slow     a cell
                                                                                                                  node          row and column

The matrix D[from][to] is seconds per byte (1 / rate). A cell is hot if it is 1.5 times its own baseline where the node has one, else the 25th percentile of all: half of
the cells are hot where both directions of one node of four are slow, so a median would not do. Up to PAIRS_ALL nodes every pair is measured, in rounds of disjoint
pairs; beyond, each node to a few others.

A slow side whose queue is full (the job goes on meanwhile) delays the acknowledgements of what goes the other way, so that this is slow too, only less.

Sources: C4D (monitoring.md 2.1), measured in 3(c).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np

from ckptd.monitor.join import Together, known, median
from ckptd.monitor.report import Evidence, Finding, Probed
from ckptd.monitor.settings import Settings

Array = np.ndarray[Any, Any]

KEPT = 32
WINDOW = 10
HITS = 8
PAIRS_ALL = 8
OFFSETS = (1, 2, 5, -1)
MOST = 0.75
"""Of a row's or column's cells: so many hot ones make the whole hot."""
SIDED = 1.4
"""A node that sends and receives slowly, one of them by so much more, has one slow side: the other one waits for acknowledgements in the slow side's queue."""


@dataclass(frozen=True, slots=True)
class Slow:
    """Groups whose transfers are slow, and what that costs of a step."""

    finding: Finding
    groups: tuple[int, ...]


class Transfers:
    """Baselines and windows of all groups of an attempt."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.over = np.zeros((KEPT, 0))
        """Microseconds over the baseline, by step and group."""
        self.hits = np.zeros((KEPT, 0), bool)
        self.base = np.zeros(0)
        self.base_bytes = np.zeros(0)
        self.spread = np.zeros(0)
        self.n = np.zeros(0)
        self.steps = np.zeros(KEPT, np.int64)
        self.count = 0
        self.wall_us = 0.0
        self._early: list[tuple[Array, Array]] = []
        self.hot = np.zeros(0, bool)

    def add(self, t: Together, wall_us: float) -> None:
        """Steps that are no phases."""
        self._grow(t.transfer.shape[1])
        self.wall_us = wall_us
        for piece in t.pieces(self.settings.learn_steps - self.count):
            self._add(piece)

    def _add(self, t: Together) -> None:
        k = np.arange(self.count, self.count + len(t)) % KEPT
        self.steps[k] = t.steps
        if self.count < self.settings.learn_steps:
            self._early += zip(t.transfer, t.bytes, strict=True)
            self._first()
        else:
            more = (t.bytes > 1.02 * self.base_bytes) & (self.base_bytes > 0)
            spent = np.where(more, t.transfer * self.base_bytes / np.maximum(t.bytes, 1.0), t.transfer)
            told = ~np.isnan(spent)
            over = np.where(self.n < self.settings.learn_steps, 0.0, known(spent - self.base))  # a group that came later is learned first
            bound = np.maximum((self.settings.comm_ratio - 1.0) * self.base, 3.0 * self.spread)
            self.over[k], self.hits[k] = over, (over > bound) & (self.n > 0)
            self._learn(known(spent), t.bytes, ~self.hot & ~self.hits[k] & told)
            self.n += told.sum(axis=0)
        self.count += len(t)

    def _learn(self, spent: Array, nbytes: Array, quiet: Array) -> None:
        """Baselines follow the steps (K x G) that are `quiet`."""
        each = quiet / np.minimum(self.n + np.maximum(quiet.sum(axis=0), 1), 500.0)
        self.base += (each * (spent - self.base)).sum(axis=0)
        self.base_bytes += (each * (nbytes - self.base_bytes)).sum(axis=0)
        self.spread += (each * (1.25 * np.abs(spent - self.base) - self.spread)).sum(axis=0)

    def _grow(self, groups: int) -> None:
        more = groups - len(self.base)
        if more > 0:
            self.over = np.pad(self.over, ((0, 0), (0, more)))
            self.hits = np.pad(self.hits, ((0, 0), (0, more)))
            self.base, self.base_bytes, self.spread, self.n = (np.pad(a, (0, more)) for a in (self.base, self.base_bytes, self.spread, self.n))
            self.hot = np.pad(self.hot, (0, more))

    def _first(self) -> None:
        """Baselines of the steps so far: medians."""
        size = len(self.base)
        times = np.array([np.pad(t, (0, size - len(t)), constant_values=np.nan) for t, _ in self._early])
        nbytes = np.array([np.pad(b, (0, size - len(b))) for _, b in self._early])
        self.n = np.count_nonzero(~np.isnan(times), axis=0).astype(float)
        told = self.n > 0
        self.base, self.spread = np.zeros(size), np.zeros(size)
        if np.any(told):
            self.base[told] = median(times[:, told], axis=0)
            self.spread[told] = 1.4826 * median(np.abs(times[:, told] - self.base[told]), axis=0)
        self.base_bytes = median(nbytes, axis=0)
        if self.count + 1 >= self.settings.learn_steps:
            self._early = []

    def look(self, keys: Sequence[int], members: Mapping[int, Sequence[int]]) -> Slow | None:
        """Groups that were slow in 8 of the last 10 steps, if it costs enough."""
        n = self.count
        if n < self.settings.learn_steps + WINDOW or not len(self.base):
            return None
        at = np.arange(n - WINDOW, n) % KEPT
        over = median(self.over[at], axis=0)
        steady = self.hits[at].sum(axis=0) >= HITS
        cost = over / max(self.wall_us, 1.0)
        self.hot = steady & (over > 3.0 * self.spread * 1.25 / np.sqrt(WINDOW))
        if not np.any(self.hot) or float(cost[self.hot].max()) < self.settings.comm_slow:
            self.hot = np.zeros_like(self.hot) if not np.any(self.hot) else self.hot
            return None
        worst = int(np.argmax(np.where(self.hot, cost, -1.0)))
        hot = tuple(keys[int(g)] for g in np.flatnonzero(self.hot & (cost > 0.25 * cost[worst])))
        ratio = (self.base[worst] + over[worst]) / max(self.base[worst], 1.0)
        step, first = int(self.steps[(n - 1) % KEPT]), self._since(worst, float(over[worst]))
        evidence = (
            Evidence(signal="transfer of the group", value=round(float(self.base[worst] + over[worst])), unit="us", baseline=round(float(self.base[worst]))),
            Evidence(signal="groups that are slow", value=" ".join(f"{key:x}" for key in hot[:8])),
        )
        victims = tuple(sorted({m for key in hot[:64] for m in members.get(key, ())}))[:64]
        finding = Finding(
            kind="comm-slow", ranks=(), step=step, since_step=first, strength=min(1.0, float(ratio) - 1.0), cause=f"transfers take {ratio:.1f} times as long as they did",
            group=keys[worst], slowdown=float(cost[worst]), victims=victims, evidence=evidence,
        )  # fmt: skip
        return Slow(finding, hot)

    def _since(self, group: int, over: float) -> int:
        back = min(self.count, KEPT)
        at = np.arange(self.count - back, self.count) % KEPT
        score = np.cumsum(self.over[at, group][::-1] - over / 2)
        return int(self.steps[at[back - 1 - int(np.argmax(score))]])


# --- pairs ------------------------------------------------------------------------------------------------------------------


def rounds(nodes: Sequence[int]) -> list[list[tuple[int, int]]]:
    """Pairs (from, to) to be measured, in rounds in which no node is in two pairs: one that received meanwhile would send slowly, behind acknowledgements that wait."""
    return _each_with_each(nodes) if len(nodes) <= PAIRS_ALL else _each_with_some(nodes)


def _each_with_each(nodes: Sequence[int]) -> list[list[tuple[int, int]]]:
    """The rounds of a tournament, there and back: as few as there can be. One node stays in its place, the others go around."""
    seats: list[int | None] = [*nodes] + [None] * (len(nodes) % 2)
    found = []
    for _ in range(len(seats) - 1):
        pairs = [(a, b) for a, b in zip(seats[: len(seats) // 2], reversed(seats), strict=False) if a is not None and b is not None]
        found += [pairs, [(b, a) for a, b in pairs]]
        seats = [seats[0], seats[-1], *seats[1:-1]]
    return found


def _each_with_some(nodes: Sequence[int]) -> list[list[tuple[int, int]]]:
    found: list[tuple[set[int], list[tuple[int, int]]]] = []
    for d, i in product(OFFSETS, range(len(nodes))):
        pair = (nodes[i], nodes[(i + d) % len(nodes)])
        busy, pairs = next((r for r in found if r[0].isdisjoint(pair)), (set(), []))
        if not pairs:
            found.append((busy, pairs))
        busy.update(pair)
        pairs.append(pair)
    return [pairs for _, pairs in found]


def suspects(hot: Sequence[int], members: Mapping[int, Sequence[int]], node_of: Array, healthy: Sequence[int]) -> list[int]:
    """Nodes to be probed: those of slow groups that reach over nodes; first those that no healthy group of the same reach clears."""
    found: set[int] = set()
    for key in hot:
        nodes = {int(node_of[m]) for m in members.get(key, ()) if m < len(node_of)} - {-1}
        if len(nodes) > 1:
            found |= nodes
    cleared: set[int] = set()
    for key in healthy:
        nodes = {int(node_of[m]) for m in members.get(key, ()) if m < len(node_of)} - {-1}
        if len(nodes) > 1 and not nodes >= found:
            cleared |= nodes
    return sorted(found - cleared if len(found - cleared) > 1 else found)


@dataclass(frozen=True, slots=True)
class Place:
    """Where the matrix is hot."""

    kind: str
    nodes: tuple[int, ...]
    peer: int
    cause: str
    evidence: tuple[Evidence, ...]


def place(probes: Sequence[Probed], hot: float) -> Place | None:
    """Rows, columns, cells. None: nothing is hot, or too much was not answered."""
    cells: dict[tuple[int, int], list[Probed]] = {}
    for p in probes:
        if p.kind == "transfer" and p.other >= 0 and p.rank != p.other:
            cells.setdefault((p.rank, p.other), []).append(p)
    delay = {pair: 1.0 / max(*(q.rate for q in ps), 1e-3) for pair, ps in cells.items()}
    if len(delay) < 2:
        return None
    reference = float(np.percentile(list(delay.values()), 25.0)) if len(delay) > 2 else min(delay.values())
    usual = {pair: 1.0 / ps[0].baseline if ps[0].baseline > 0 else reference for pair, ps in cells.items()}
    over = {pair: d / usual[pair] for pair, d in delay.items()}
    burning = {pair for pair, x in over.items() if x >= hot}
    if not burning or (len(burning) > 0.8 * len(over) and len(over) > 2):
        return None
    return _shape(burning, over)


def _shape(burning: set[tuple[int, int]], over: Mapping[tuple[int, int], float]) -> Place | None:
    nodes = sorted({n for pair in over for n in pair})
    rows = [n for n in nodes if _most(n, 0, burning, over)]
    columns = [n for n in nodes if _most(n, 1, burning, over)]
    for n in {*rows} & {*columns}:
        sends, receives = _middle(n, 0, over), _middle(n, 1, over)
        if receives >= SIDED * sends:
            rows.remove(n)
        elif sends >= SIDED * receives:
            columns.remove(n)
    both = [n for n in rows if n in columns]
    if rows and columns and not both:  # one node's slow side is seen at others' other sides: the slower one it is
        sends, receives = max(_middle(n, 0, over) for n in rows), max(_middle(n, 1, over) for n in columns)
        rows, columns = (rows, []) if sends >= receives else ([], columns)
    top = sorted(burning, key=lambda p: -over[p])
    evidence = tuple(Evidence(signal=f"node {a} to node {b}", value=round(over[a, b], 2), unit="times as long") for a, b in top[:6])
    a, b = top[0]
    rules = (
        (bool(both), "send-slow", both[:1], -1, f"node {both[:1]} sends and receives slowly"),
        (bool(rows) and not columns, "send-slow", rows, -1, f"what node {', '.join(map(str, rows))} sends is slow"),
        (bool(columns) and not rows, "receive-slow", columns, -1, f"what node {', '.join(map(str, columns))} receives is slow"),
        (not rows and not columns, "link-slow", [a], b, f"what goes from node {a} to node {b} is slow"),
    )
    for holds, kind, found, peer, cause in rules:
        if holds:
            return Place(kind, tuple(found), peer, cause, evidence)
    return None


def _middle(node: int, end: int, over: Mapping[tuple[int, int], float]) -> float:
    """How much longer a node's pairs take, with it at this end (0: it sends)."""
    return float(np.median([x for pair, x in over.items() if pair[end] == node]))


def _most(node: int, end: int, burning: set[tuple[int, int]], over: Mapping[tuple[int, int], float]) -> bool:
    mine = [p for p in over if p[end] == node]
    return len(mine) > 1 and sum(p in burning for p in mine) >= MOST * len(mine)
