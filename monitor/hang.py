"""Who hangs: the wait-for graph of process groups, and why its root does not go on. Pure.

    pulses (where each rank stands) ---> waiting rank -> members of the group that entered fewer operations -> ...
                                          |
                                          root: waited for, and waits for nobody      -> stopped, io-blocked, hang, crash ...
                                          cycle: everybody waits                      -> desync (odd signature), else deadlock (odd order)
                                          no edge: all entered, nobody is done        -> comm-hang

A waiting rank is one whose newest operation of a group is not known to be done. In the graph it points at a *place* (group, sequence number), and
the place at members that entered fewer operations, so that edges are linear in ranks. A receive points at its peer, a send does only where nothing else does.

`Patience` says how long a pause is too long: it is learned from the job, by phase. What is certain at once (a dead process, different signatures at one place)
needs no patience.

Sources: monitoring.md 2.1 (all entered, none done), 2.6 (wavefront), 3(d); MegaScale and C4D for the order of the rules.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import log10

from ckptd.monitor import record
from ckptd.monitor.report import Evidence, Finding, OpenOp, Pulse
from ckptd.monitor.settings import Settings

Place = tuple[int, int]
"""(group, sequence number)."""

PHASES = {
    record.CHECKPOINT: "checkpoint",
    record.EVAL: "eval",
    record.COMPILE: "compile",
    record.RESTORE: "restore",
    record.DATA: "data",
    record.PROBE: "probe",
}
LONG = (1 << record.CHECKPOINT) | (1 << record.EVAL) | (1 << record.COMPILE) | (1 << record.RESTORE) | (1 << record.PROBE)
GONE = frozenset({"dead", "raised", "Z", "X"})
STOPPED = frozenset({"T"})
TRACED = frozenset({"t"})
"""So a process stands in a debugger, and for a moment while its stacks are read: with patience, it is stopped."""
WILL_RUN = TRACED | {"R"}
"""Others have the processor, or hold the process: no fault of its program."""
RECEIVES = frozenset({record.OPS.index("recv"), record.OPS.index("recv_any")})
TOGETHER = frozenset(record.OPS.index(n) for n in ("all_reduce", "all_gather", "barrier"))
"""Nobody leaves these before everybody is in; and when they are done is known."""
VICTIMS_MAX = 64


@dataclass
class Standing:
    """Where the job stands: what `look` looks at. `stale`: ranks whose node is silent; their pulses are old or missing."""

    pulses: Mapping[int, Pulse]
    members: Mapping[int, Sequence[int]]
    stale: frozenset[int] = frozenset()
    step: int = 0
    busy: frozenset[int] = frozenset()
    """Ranks that use their processor."""


@dataclass
class Graph:
    """Ranks that wait for places, and places that wait for ranks."""

    at: dict[int, list[Place]] = field(default_factory=dict)
    missing: dict[Place, list[int]] = field(default_factory=dict)
    peers: dict[int, list[int]] = field(default_factory=dict)
    """Of sends and receives: rank -> ranks it waits for."""

    def out(self, rank: int) -> set[int]:
        """For whom a rank waits."""
        return {m for p in self.at.get(rank, ()) for m in self.missing[p]} | set(self.peers.get(rank, ()))

    def waits(self) -> list[tuple[int, int, int]]:
        """(waiting rank, place's group, its sequence number), for people."""
        return [(r, *p) for r, places in self.at.items() for p in places]


def name_of(op: int) -> str:
    """An operation's name; a foreign number has none."""
    return record.OPS[op] if 0 <= op < len(record.OPS) else "?"


def rows_by_group(pulses: Mapping[int, Pulse]) -> dict[int, dict[int, OpenOp]]:
    """group -> rank -> its row."""
    rows: dict[int, dict[int, OpenOp]] = {}
    for rank, pulse in pulses.items():
        for row in pulse.groups:
            rows.setdefault(row.key, {})[rank] = row
    return rows


def graph_of(standing: Standing, rows: Mapping[int, Mapping[int, OpenOp]]) -> Graph:
    """Who waits for whom now."""
    graph = Graph()
    for key, by_rank in rows.items():
        waiting = {r: row.entered for r, row in by_rank.items() if row.entered > row.done}
        entered = {m: by_rank[m].entered if m in by_rank else 0 for m in standing.members.get(key, tuple(by_rank)) if _known(standing, m)}
        for level in set(waiting.values()):
            behind = [m for m, e in entered.items() if e < level] or [m for m, e in waiting.items() if e == level and _stands(standing, m)]
            if behind:
                graph.missing[key, level] = behind
        for r, level in waiting.items():
            if (key, level) in graph.missing and r not in graph.missing[key, level]:
                graph.at.setdefault(r, []).append((key, level))
    _pairs(graph, rows)
    return graph


def _known(standing: Standing, rank: int) -> bool:
    """Whether it is known what the rank has entered: it told its table, or nothing is running there any more."""
    pulse = standing.pulses.get(rank)
    return pulse is not None and (bool(pulse.groups) or pulse.state in GONE or pulse.state == "closed")


def _stands(standing: Standing, rank: int) -> bool:
    """Whether a rank that entered an operation cannot take part in it: stopped, or gone."""
    return standing.pulses[rank].state in STOPPED | GONE


def _pairs(graph: Graph, rows: Mapping[int, Mapping[int, OpenOp]]) -> None:
    """Edges of sends and receives. A receive is waited for; a send only where its rank waits for nothing else, and its peer is not at the other end of it."""
    opened = {(r, row.p2p_peer, row.p2p_op in RECEIVES) for by_rank in rows.values() for r, row in by_rank.items() if row.p2p_open and row.p2p_peer >= 0}
    for r, peer, receives in opened:
        if receives:
            graph.peers.setdefault(r, []).append(peer)
    for r, peer, receives in opened:
        if not receives and r not in graph.peers and r not in graph.at and (peer, r, True) not in opened:
            graph.peers[r] = [peer]


# --- roots and cycles -------------------------------------------------------------------------------------------------------


def sinks(graph: Graph, ranks: Iterable[int]) -> list[list[int]]:
    """Strongly connected sets of ranks that wait for nobody outside: roots (one rank that waits for nobody) and cycles. Only those that somebody waits for.

    Tarjan's algorithm without recursion, over ranks and places.
    """
    edges: dict[object, list[object]] = {r: [*graph.at.get(r, ()), *graph.peers.get(r, ())] for r in ranks}
    edges.update({p: list(behind) for p, behind in graph.missing.items()})
    waited_for = {m for behind in graph.missing.values() for m in behind} | {m for peers in graph.peers.values() for m in peers}
    found = []
    for component in _components(edges):
        inside = set(component)
        if all(t in inside for n in component for t in edges.get(n, ())):
            members = sorted(n for n in component if isinstance(n, int))
            if members and any(m in waited_for for m in members):
                found.append(members)
    return found


def _components(edges: dict[object, list[object]]) -> list[list[object]]:
    index: dict[object, int] = {}
    low: dict[object, int] = {}
    stack: list[object] = []
    on: set[object] = set()
    found = []
    for start, first in edges.items():
        if start in index:
            continue
        work = [(start, iter(first))]
        index[start] = low[start] = len(index)
        stack.append(start)
        on.add(start)
        while work:
            node, targets = work[-1]
            for target in targets:
                if target not in index:
                    index[target] = low[target] = len(index)
                    stack.append(target)
                    on.add(target)
                    work.append((target, iter(edges.get(target, ()))))
                    break
                if target in on:
                    low[node] = min(low[node], index[target])
            else:
                work.pop()
                if work:
                    low[work[-1][0]] = min(low[work[-1][0]], low[node])
                if low[node] == index[node]:
                    cut = stack.index(node)
                    component = stack[cut:]
                    del stack[cut:]
                    on.difference_update(component)
                    found.append(component)
    return found


# --- findings ---------------------------------------------------------------------------------------------------------------


def mismatches(standing: Standing, rows: Mapping[int, Mapping[int, OpenOp]]) -> list[Finding]:
    """Places where ranks entered different operations: certain, without patience. The odd ones are those that differ from the majority."""
    found = []
    for key, by_rank in rows.items():
        levels: dict[int, list[int]] = {}
        for r, row in by_rank.items():
            if row.entered:
                levels.setdefault(row.entered, []).append(r)
        for level, ranks in levels.items():
            for signal in ("signature", "history"):
                values = {r: getattr(by_rank[r], signal) for r in ranks}
                if len(set(values.values())) > 1:
                    found.append(_desync(standing, rows, ranks, values, (key, level, signal)))
                    break
    return found


def _desync(
    standing: Standing, rows: Mapping[int, Mapping[int, OpenOp]], ranks: Sequence[int], values: Mapping[int, int], where: tuple[int, int, str]
) -> Finding:
    key, level, signal = where
    by_rank = rows[key]
    odd = odd_ones(values) or _odd_of_job(values, rows, key)
    usual = next((by_rank[r] for r in ranks if r not in odd), by_rank[ranks[0]])
    what = tuple(
        Evidence(signal=f"rank {r} entered", value=_words(by_rank[r])) for r in (*odd[:4], *[r for r in ranks if r not in odd][:1])
    )
    cause = "entered another operation than the others" if signal == "signature" else "entered other operations before than the others"
    if not odd:
        cause = "entered different operations, and no majority says which is right"
    return Finding(
        kind="desync", ranks=tuple(odd or ranks), step=standing.step, since_step=standing.step, strength=1.0 if odd else 0.6, cause=cause, group=key,
        op=name_of(usual.op), seq=level, victims=tuple(r for r in ranks if r not in odd)[:VICTIMS_MAX] if odd else (), evidence=what,
    )  # fmt: skip


def odd_ones(values: Mapping[int, int]) -> list[int]:
    """Who differs from the majority; empty where there is none."""
    counts = Counter(values.values()).most_common(2)
    if len(counts) > 1 and counts[0][1] == counts[1][1]:
        return []
    return sorted(r for r, v in values.items() if v != counts[0][0])


def _odd_of_job(values: Mapping[int, int], rows: Mapping[int, Mapping[int, OpenOp]], key: int) -> list[int]:
    """The same in a group without a majority: what groups of its size entered at this place of theirs, where they stand or before, says what is usual; else the kinds of operations of the job do.

    (What they entered elsewhere does not: who left an operation out stands in one that the others will come to.)
    """
    by_rank = rows[key]
    level, size = next(by_rank[r].entered for r in values), len(by_rank)
    ops = Counter(row.op for k, by in rows.items() if k != key for row in by.values() if row.entered)
    signatures = Counter(_signature_at(row, level) for k, by in rows.items() if k != key and len(by) == size for row in by.values())
    for weight in ({r: signatures[by_rank[r].signature] for r in values}, {r: ops[by_rank[r].op] for r in values}):
        most = max(weight.values())
        odd = sorted(r for r, w in weight.items() if w < most)
        if odd:
            return odd
    return []


def _signature_at(row: OpenOp, level: int) -> int:
    """Of what it entered as number `level`; 0 where that is not known."""
    back = row.entered - level
    if back == 0:
        return row.signature
    return row.recent[back - 1] if 0 < back <= len(row.recent) else 0


def _words(row: OpenOp) -> str:
    kind = record.DTYPES[row.dtype] if 0 <= row.dtype < len(record.DTYPES) else "?"
    return f"{name_of(row.op)} of {row.bytes} bytes of {kind}, number {row.entered}"


def look(standing: Standing) -> tuple[list[Finding], Graph]:
    """What holds the job up, most certain first, were it standing still; and who waits for whom. Says nothing about whether it has stood still for too long."""
    rows = rows_by_group(standing.pulses)
    graph = graph_of(standing, rows)
    certain = mismatches(standing, rows)
    found: list[Finding] = []
    cycles = []
    for members in sinks(graph, standing.pulses):
        if len(members) == 1 and not graph.out(members[0]):
            found.append(_root(standing, rows, graph, members[0]))
        elif len(members) > 1:
            cycles.append(members)
    if certain:  # a rank at the wrong operation: what it waits for, and who waits for it, follows
        return [*[f for f in found if f.kind in ("crash", "stopped")], *certain], graph
    found += [_cycle(standing, rows, graph, members) for members in cycles]
    if not found:
        found = _all_entered(standing, rows)
    if standing.stale:
        found = [_hedged(f, standing) for f in found]
        if not found and _waited(graph, rows, standing):
            found = [_undecided(standing, "a node is silent, and others wait for its ranks")]
    return found, graph


def _waited(graph: Graph, rows: Mapping[int, Mapping[int, OpenOp]], standing: Standing) -> bool:
    """Whether somebody may wait for a rank that is not known."""
    if any(p in standing.stale for peers in graph.peers.values() for p in peers):
        return True
    return any(row.entered > row.done and any(m in standing.stale for m in standing.members.get(key, ())) for key, by in rows.items() for row in by.values())


def _hedged(finding: Finding, standing: Standing) -> Finding:
    """A finding while a node is silent: what a process state or a signature says stands; a missing entry may be only a missing report."""
    if finding.kind in ("crash", "stopped", "desync") or not set(finding.ranks) & standing.stale:
        return finding
    return _undecided(standing, "the ranks that others wait for are on a node that is silent")


def _undecided(standing: Standing, cause: str) -> Finding:
    silent = tuple(sorted(standing.stale))[:VICTIMS_MAX]
    evidence = (Evidence(signal="ranks that are not known", value=" ".join(map(str, silent))),)
    return Finding(kind="undecided", ranks=(), step=standing.step, since_step=standing.step, strength=0.3, cause=cause, evidence=evidence)


def _root(standing: Standing, rows: Mapping[int, Mapping[int, OpenOp]], graph: Graph, rank: int) -> Finding:
    """What is the matter with a rank that others wait for."""
    places = [p for p, behind in graph.missing.items() if rank in behind]
    place = max(places, key=lambda p: len(graph.missing[p]) == 1) if places else None
    victims = [r for r, at in graph.at.items() if any(p in at for p in places)] + [r for r, peers in graph.peers.items() if rank in peers]
    pulse = standing.pulses[rank]
    kind, cause = _why(pulse, busy=rank in standing.busy)
    op, key, seq = "", 0, 0
    if place is not None:
        key, seq = place
        row = next(row for row in rows[key].values() if row.entered == seq)
        op = name_of(row.op)
        waiters = [standing.pulses[v].step for v in victims]
        if kind == "hang" and _left_behind(rows[key], rank):
            kind, cause = "desync", "waits in an operation that the others have left: it was another one"
        elif kind == "hang" and waiters and pulse.step > max(waiters):
            kind, cause = "desync", f"has gone on to step {pulse.step} without it"
        elif kind == "hang" and _between(rows, rank, graph):
            kind, cause = "comm-hang", "stands in an operation that all of another group have entered"
    elif victims:
        row = next(row for by in rows.values() for r, row in by.items() if r == victims[0] and row.p2p_open)
        op, key, seq = name_of(row.p2p_op), row.key, row.p2p_entered
    evidence = (
        Evidence(signal="process state", value=f"{pulse.state} {pulse.where}".strip()),
        Evidence(signal="idle", value=float(pulse.idle_ms), unit="ms"),
        Evidence(signal="ranks that wait for it", value=float(len(victims))),
    )
    return Finding(
        kind=kind, ranks=(rank,), step=standing.step, since_step=pulse.step, strength=1.0, cause=cause, group=key, op=op, seq=seq,
        victims=tuple(sorted(set(victims)))[:VICTIMS_MAX], evidence=evidence,
    )  # fmt: skip


def _left_behind(by_rank: Mapping[int, OpenOp], rank: int) -> bool:
    """Whether the rank is in an operation that ends for all or nobody, and that all others have left."""
    mine = by_rank.get(rank)
    if mine is None or mine.entered <= mine.done or mine.op not in TOGETHER:
        return False
    return all(row.done >= mine.entered for r, row in by_rank.items() if r != rank)


def _between(rows: Mapping[int, Mapping[int, OpenOp]], rank: int, graph: Graph) -> bool:
    """Whether the rank, and somebody else, is in an operation that all have entered and nobody has left."""
    for by_rank in rows.values():
        mine = by_rank.get(rank)
        if mine is None or mine.entered <= mine.done or len(by_rank) < 2:
            continue
        if all(row.entered == mine.entered and row.done < row.entered for row in by_rank.values()) and not any(r in graph.at for r in by_rank):
            return True
    return False


def _why(pulse: Pulse, *, busy: bool) -> tuple[str, str]:
    """(kind, cause) from the process: its state, what it sleeps in, its open phases. The first that fits."""
    rules = (
        (pulse.state in GONE, "crash", f"the process is gone (signal {pulse.signal})" if pulse.signal else "the process is gone"),
        (pulse.state == "closed", "hang", "it ended in good order while others go on"),
        (pulse.state in STOPPED, "stopped", "the process is stopped"),
        (pulse.state in TRACED, "stopped", "the process is held by a debugger"),
        (bool(pulse.phases & 1 << record.CHECKPOINT), "checkpoint-stall", "it stands in saving"),
        (bool(pulse.phases & 1 << record.DATA), "input-stall", "it waits for its data"),
        (pulse.state == "D", "io-blocked", f"it sleeps in the kernel ({pulse.where or 'uninterruptible'})"),
        (bool(pulse.phases & 1 << record.GC), "gc-pause", "it collects garbage"),
        (busy, "hang", "it computes, and does not come to the operation that others wait in"),
        (bool(pulse.where), "hang", f"it sleeps ({pulse.where})"),
    )
    return next(((kind, cause) for holds, kind, cause in rules if holds), ("hang", "it did not come to the operation that others wait in"))


def _cycle(standing: Standing, rows: Mapping[int, Mapping[int, OpenOp]], graph: Graph, members: list[int]) -> Finding:
    """Ranks that wait for each other: the ones whose order is not that of the majority."""
    stopped = [r for r in members if standing.pulses[r].state in STOPPED | GONE]
    if stopped:
        return _root(standing, rows, graph, stopped[0])
    first = {r: graph.at[r][0][0] for r in members if r in graph.at}
    odd = _alone(rows, graph, members) or (odd_ones(first) if len(set(first.values())) > 1 else [])
    key, seq = next((graph.at[r][0] for r in (*odd, *first) if r in graph.at), (0, 0))
    row = next((row for row in rows.get(key, {}).values() if row.entered == seq), None)
    evidence = tuple(Evidence(signal=f"rank {r} waits in", value=f"group {graph.at[r][0][0]:x}, number {graph.at[r][0][1]}") for r in sorted(first)[:8])
    evidence += tuple(Evidence(signal=f"rank {r} waits for", value=f"rank {graph.peers[r][0]}") for r in members if r in graph.peers)[:8]
    return Finding(
        kind="deadlock", ranks=tuple(odd or members), step=standing.step, since_step=standing.step, strength=1.0 if odd else 0.7,
        cause="stands against the others of its group: another order, or an operation left out" if odd else "wait for each other, each in another group", group=key,
        op=name_of(row.op) if row else "", seq=seq, victims=tuple(m for m in members if m not in odd)[:VICTIMS_MAX] if odd else (), evidence=evidence,
    )  # fmt: skip


def _alone(rows: Mapping[int, Mapping[int, OpenOp]], graph: Graph, members: Sequence[int]) -> list[int]:
    """Who stands against the majority of a group at the most places: has not entered what most have, or has entered what most have not. Empty if nobody does."""
    against: Counter[int] = Counter()
    for (key, seq), behind in graph.missing.items():
        there = [r for r, row in rows[key].items() if row.entered >= seq]
        if len(there) != len(behind):
            against.update(there if len(there) < len(behind) else behind)
    most = max((against[m] for m in members), default=0)
    return sorted(m for m in members if against[m] == most) if most > 0 else []


def _all_entered(standing: Standing, rows: Mapping[int, Mapping[int, OpenOp]]) -> list[Finding]:
    """Nobody is missing anywhere, and yet some operation is not done."""
    for key, by_rank in rows.items():
        stuck = sorted(r for r, row in by_rank.items() if row.entered > row.done)
        if len(stuck) < 2 or not all(_known(standing, m) for m in standing.members.get(key, ())):
            continue
        row = by_rank[stuck[0]]
        stopped = [r for r in stuck if standing.pulses[r].state in STOPPED | GONE | {"D"}]
        kind, cause = _why(standing.pulses[stopped[0]], busy=False) if stopped else ("comm-hang", "all entered it, and nobody has left it")
        return [
            Finding(
                kind=kind, ranks=tuple(stopped), step=standing.step, since_step=standing.step, strength=0.8, cause=cause, group=key, op=name_of(row.op),
                seq=row.entered, victims=tuple(stuck)[:VICTIMS_MAX],
            )
        ]  # fmt: skip
    return _open_pairs(standing, rows)


def _open_pairs(standing: Standing, rows: Mapping[int, Mapping[int, OpenOp]]) -> list[Finding]:
    """A send and its receive, both entered, neither done."""
    opened = {(r, row.p2p_peer): row for by in rows.values() for r, row in by.items() if row.p2p_open and row.p2p_op not in RECEIVES}
    for (r, peer), row in opened.items():
        other = standing.pulses.get(peer)
        if other and any(o.p2p_open and o.p2p_peer == r and o.p2p_op in RECEIVES for o in other.groups):
            return [
                Finding(
                    kind="comm-hang", ranks=(), step=standing.step, since_step=standing.step, strength=0.6, cause="both ends entered it, and neither has left it",
                    group=row.key, op=name_of(row.p2p_op), seq=row.p2p_entered, peer=peer, victims=(r, peer),
                )
            ]  # fmt: skip
    return []


def overdue(f: Finding, standing: Standing, patience: Patience) -> bool:
    """Whether the pause that a finding explains is longer than the job's own. What cannot be otherwise, a death or different signatures, is so at once."""
    s = patience.settings
    if f.kind in ("crash", "desync"):
        return True
    rows = [row for v in f.victims if v in standing.pulses for row in standing.pulses[v].groups]
    waited_ms = max([row.since_ms for row in rows if row.entered > row.done] + [row.p2p_since_ms for row in rows if row.p2p_open], default=0)
    concerned = [standing.pulses[r] for r in (f.ranks or f.victims) if r in standing.pulses]
    idle_ms = min((p.idle_ms for p in concerned), default=0)
    if f.kind == "deadlock":
        return idle_ms >= 1e3 * s.hang_s
    if f.kind == "undecided":
        everybody_ms = min((p.idle_ms for p in standing.pulses.values()), default=0)
        return everybody_ms >= 1e3 * max(s.hang_s, s.hang_factor * patience.pause_s())
    budget_ms = 1e3 * max((patience.budget_s(p, busy=p.rank in standing.busy) for p in concerned), default=s.start_s)
    return waited_ms >= budget_ms and (idle_ms >= budget_ms or waited_ms >= 5 * budget_ms)


# --- patience ---------------------------------------------------------------------------------------------------------------


class Patience:
    """How long a pause the job makes by itself, by phase; what is longer is a hang. Constant memory: a decaying histogram of pauses, and the longest per phase."""

    BINS = 96
    PER_DECADE = 16.0

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._counts = [0.0] * self.BINS
        self._longest_s: dict[int, float] = {}
        self.steps = 0

    def step(self, wall_s: float, phases_s: Mapping[int, float]) -> None:
        """A step's longest rank: its time outside of phases bounds each pause in it from above. Warm-up, with its imports and first allocations, does not count."""
        self.steps += 1
        if self.steps > self.settings.warmup_steps:
            self._add(max(wall_s - sum(phases_s.values()), 1e-4))
        for kind, seconds in phases_s.items():
            if seconds > 0.0:
                self.phase(kind, seconds)

    def phase(self, kind: int, seconds: float) -> None:
        """So long a phase was, or is."""
        self._longest_s[kind] = max(self._longest_s.get(kind, 0.0), seconds)

    def pause_s(self, beyond: float = 0.01) -> float:
        """Of steps outside of phases: this part of them is longer, and be it only one."""
        total = sum(self._counts)
        left = max(total * beyond, min(1.0, total / 20))
        for i in range(self.BINS - 1, -1, -1):
            left -= self._counts[i]
            if left < 0.0:
                return float(10 ** ((i + 1) / self.PER_DECADE - 4))
        return 0.0

    def budget_s(self, pulse: Pulse, *, busy: bool) -> float:
        """How long others may wait for this rank."""
        s = self.settings
        if pulse.state in GONE or pulse.state in STOPPED:
            return s.hang_s
        if self.steps <= s.warmup_steps:
            return s.start_s
        usual = max(s.hang_s, s.hang_factor * self.pause_s())
        if pulse.phases & LONG or (pulse.phases & 1 << record.DATA and self._longest_s.get(record.DATA, 0.0) > s.hang_s):
            own = max((self._longest_s.get(k, 0.0) for k in PHASES if pulse.phases >> k & 1), default=0.0)
            usual = max(usual, s.hang_factor * own if own > s.hang_s else s.phase_s)  # what takes milliseconds in every step says nothing of a save
        patient = busy or pulse.state in WILL_RUN
        return max(usual, s.busy_s, s.hang_factor * self.pause_s(0.001)) if patient else usual

    def _add(self, seconds: float) -> None:
        at = min(max(int((log10(seconds) + 4) * self.PER_DECADE), 0), self.BINS - 1)
        self._counts[at] += 1.0
        if self.steps % 4096 == 0:
            self._counts = [c / 2 for c in self._counts]
