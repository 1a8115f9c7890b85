"""What is asked for when something is suspected, and what came back. Pure.

- *stacks* of the guilty and one that waits; *pulses* of ranks that others may wait for;
- *compute* and *memory* of a suspect and some of its peers: they agree with the suspicion or not (`verdict.agree`);
- *transfer* between nodes, in rounds of disjoint pairs: a round is asked when the one before it was answered or has taken too long.

What is not answered in time counts as not known.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from ckptd.monitor import comms
from ckptd.monitor.report import Probed
from ckptd.monitor.settings import Settings
from ckptd.monitor.verdict import Key

PATIENCE_S = 20.0
"""A probe of a rank waits for the end of its step."""
ROUND_S = 2.5
PEERS = 3
AGAIN_MAX = 4


@dataclass(frozen=True, slots=True)
class Ask:
    """Something to be measured or told. `what`: "compute", "memory" (of `ranks`; answered by Probed), "transfer" (nodes in `ranks` to node `other`; answered by
    Probed(kind="transfer", rank=node, other=node)), "stacks" (answered by Stack), "pulses" (answered by pulses with their groups)."""

    id: int
    what: str
    ranks: tuple[int, ...]
    other: int = -1
    seconds: float = 0.2


@dataclass(slots=True)
class RankProbe:
    """Asks about a suspect and its peers, under way."""

    key: Key
    asks: frozenset[int]
    wanted: int
    until_s: float
    got: list[Probed] = field(default_factory=list)


@dataclass(slots=True)
class Matrix:
    """Pairs of nodes, being measured."""

    rounds: list[list[tuple[int, int]]]
    at: int = 0
    waiting: set[tuple[int, int]] = field(default_factory=set)
    until_s: float = 0.0
    got: list[Probed] = field(default_factory=list)


class Asks:
    """All that is under way."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.count = 0
        self.ranks: list[RankProbe] = []
        self.matrix: Matrix | None = None
        self.asked_s: dict[Key, tuple[float, int]] = {}
        """Key -> when it was last probed, and how often."""

    def ask(self, what: str, ranks: Iterable[int], other: int = -1) -> Ask:
        """A new one."""
        self.count += 1
        return Ask(self.count, what, tuple(ranks), other, self.settings.probe_s)

    def probe(self, key: Key, suspects: Sequence[int], peers: Sequence[int], now_s: float) -> list[Ask]:
        """Have suspects and peers measured, unless that was done lately."""
        last_s, times = self.asked_s.get(key, (-1e9, 0))
        if now_s - last_s < self.settings.cool_down_s or times >= AGAIN_MAX or not peers or any(p.key == key for p in self.ranks):
            return []
        self.asked_s[key] = (now_s, times + 1)
        if len(self.asked_s) > 1024:
            del self.asked_s[next(iter(self.asked_s))]
        both = (*suspects[:4], *peers[:PEERS])
        asks = [self.ask(what, both) for what in ("compute", "memory")]
        self.ranks.append(RankProbe(key, frozenset(a.id for a in asks), 2 * len(both), now_s + PATIENCE_S))
        return asks

    def pairs(self, nodes: Sequence[int], now_s: float) -> list[Ask]:
        """Have a matrix measured, unless one is."""
        if self.matrix is not None or len(nodes) < 2:
            return []
        self.matrix = Matrix(comms.rounds(nodes))
        return self._round(now_s)

    def _round(self, now_s: float) -> list[Ask]:
        m = self.matrix
        if m is None or m.at >= len(m.rounds):
            return []
        pairs = m.rounds[m.at]
        m.at, m.waiting, m.until_s = m.at + 1, set(pairs), now_s + ROUND_S
        return [self.ask("transfer", (a,), b) for a, b in pairs]

    def answered(self, probes: Sequence[Probed]) -> None:
        """Take answers."""
        for p in probes:
            if p.kind == "transfer" and self.matrix is not None:
                self.matrix.got.append(p)
                self.matrix.waiting.discard((p.rank, p.other))
            for r in self.ranks:
                if p.id in r.asks:
                    r.got.append(p)

    def done(self, now_s: float) -> tuple[list[RankProbe], Matrix | None, list[Ask]]:
        """(probes of ranks that are complete, a complete matrix, what is to be asked next)."""
        ended = [r for r in self.ranks if len(r.got) >= r.wanted or now_s >= r.until_s]
        self.ranks = [r for r in self.ranks if r not in ended]
        m = self.matrix
        if m is None or (m.waiting and now_s < m.until_s):
            return ended, None, []
        if m.at < len(m.rounds):
            return ended, None, self._round(now_s)
        self.matrix = None
        return ended, m, []
