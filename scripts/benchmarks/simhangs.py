"""Simulated standstills: each rank's program of operations is run, one of them at fault, until nobody can go on; where everybody then stands is what pulses say.

An operation of a group ends when all members have entered their nth one with the same signature. A receive ends when its peer has sent. Nothing here knows what a
detector makes of it: who is to blame is known because it was done to them.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from benchmarks.simjobs import MICROBATCHES, Kind, Layout, Sim, kinds_of
from ckptd.monitor import record
from ckptd.monitor.report import RECENT_MAX, GroupInfo, OpenOp, Pulse, RankInfo

SEND, RECV, BROADCAST = (record.OPS.index(n) for n in ("send", "recv", "broadcast"))
F32 = record.DTYPES.index("f32")

STATES = {
    "sigstop": ("T", "do_signal_stop", 0),
    "stop-inside": ("T", "do_signal_stop", 0),
    "sleep": ("S", "hrtimer_nanosleep", 0),
    "io": ("D", "nfs_wait_bit_killable", 0),
    "loader": ("S", "pipe_read", 1 << record.DATA),
    "saving": ("D", "folio_wait_bit", 1 << record.CHECKPOINT),
    "busy": ("R", "", 0),
}


@dataclass(slots=True)
class Op:
    """One operation in a rank's program. `peer` >= 0: a send or receive."""

    key: int
    op: int
    nbytes: int
    peer: int = -1
    step: int = 0


@dataclass
class Place:
    """Where a rank stands in a group."""

    entered: int = 0
    done: int = 0
    last: Op | None = None
    history: int = 17
    p2p: int = 0
    p2p_done: int = 0
    p2p_last: Op | None = None
    signs: list[int] = field(default_factory=list)
    """Of all that it entered here."""


@dataclass
class Stall:
    """A job that does not go on. `step`: of each rank."""

    layout: Layout
    ranks: tuple[int, ...]
    kind: str
    places: list[dict[int, Place]]
    steps: list[int]
    members: dict[int, list[int]]
    base: dict[int, int] = field(default_factory=dict)

    def pulses(self, idle_s: float, node: int, cpu_s: float) -> list[Pulse]:
        """What a node's daemon sees after it has been still for so long."""
        lay = self.layout
        out = []
        for r in range(node * lay.per_node, min((node + 1) * lay.per_node, lay.world)):
            state, where, phases = STATES.get(self.kind, ("S", "futex_wait_queue", 0)) if r in self.ranks else ("S", "ep_poll", 0)
            ms = int(idle_s * 1e3)
            busy = self.kind == "busy" and r in self.ranks
            rows = [self._row(key, p, ms) for key, p in self.places[r].items()] if ms >= 1000 else []
            out.append(Pulse(r, ms, self.steps[r], 1000, state, where, phases, ms if phases else 0, 0, int(1e3 * (cpu_s if busy else 0.05 * cpu_s)), rows))
        return out

    def _row(self, key: int, p: Place, ms: int) -> OpenOp:
        last, pair = p.last, p.p2p_last
        base = self.base.get(key, 0)
        row = OpenOp(
            key, base + p.entered, base + p.done, last.op if last else 0, F32 if last else 0, last.nbytes if last else 0, _signature(last) if last else 0, p.history, ms,
            recent=p.signs[-2::-1][:RECENT_MAX],
        )  # fmt: skip
        if pair is None:
            return row
        return OpenOp(*_fields(row), pair.op, p.p2p > p.p2p_done, pair.peer, p.p2p, p.p2p_done, ms, row.recent)


def _fields(row: OpenOp) -> tuple[int, int, int, int, int, int, int, int, int]:
    return row.key, row.entered, row.done, row.op, row.dtype, row.bytes, row.signature, row.history, row.since_ms


def _signature(op: Op) -> int:
    return (op.op * 1_000_003 + op.nbytes) & 0xFFFFFFFF


def programs(sim: Sim, steps: int, first: int) -> list[list[Op]]:
    """What each rank enters in so many steps."""
    lay = sim.layout
    out: list[list[Op]] = [[] for _ in range(lay.world)]
    for step in range(first, first + steps):
        for i, (_, kind) in enumerate(sim.programs):
            if kind == -2:
                _pipeline(lay, sim.kinds, out, step)
            elif kind >= 0:
                k = sim.kinds[kind]
                for g, row in enumerate(k.members):
                    for r in row:
                        out[int(r)].append(Op(k.keys[g], k.op, k.nbytes + 4096 * i, step=step))
    return out


def _pipeline(lay: Layout, kinds: list[Kind], out: list[list[Op]], step: int) -> None:
    ranks = lay.ranks()
    pp = next(k for k in kinds if k.name == "pp")
    for forward in (True, False):
        for _ in range(MICROBATCHES):
            for p in range(lay.pp) if forward else range(lay.pp - 1, -1, -1):
                before, after = (p - 1, p + 1) if forward else (p + 1, p - 1)
                for r in ranks[p].ravel():
                    d, t = divmod(int(r) % (lay.dp * lay.tp), lay.tp)
                    key = pp.keys[pp.label[r]]
                    if 0 <= before < lay.pp:
                        out[int(r)].append(Op(key, RECV, 1 << 20, int(ranks[before, d, t]), step))
                    if 0 <= after < lay.pp:
                        out[int(r)].append(Op(key, SEND, 1 << 20, int(ranks[after, d, t]), step))


def stall(layout: Layout, kind: str, seed: int) -> Stall:
    """A job of this layout, one (or two) of whose ranks are made faulty, run until nothing moves."""
    rng = np.random.default_rng(seed)
    sim = Sim(layout, 1.0, seed)
    first = 40
    todo = programs(sim, 3, first)
    members = {key: row.tolist() for k in kinds_of(layout) for key, row in zip(k.keys, k.members, strict=True)}
    count = 2 if kind == "two-stopped" else 1
    ranks = tuple(sorted(int(r) for r in rng.choice(layout.world, count, replace=False)))
    halt: dict[int, tuple[int, bool]] = {}
    step_ops = len(todo[ranks[0]]) // 3
    at = int(rng.integers(0, step_ops))
    r = ranks[0]
    collectives = [i for i, op in enumerate(todo[r][:step_ops]) if op.peer < 0]
    match kind:
        case "wrong-op":
            i = int(rng.choice(collectives))
            todo[r][i] = Op(todo[r][i].key, BROADCAST, todo[r][i].nbytes, step=first)
        case "wrong-size":
            i = int(rng.choice(collectives))
            todo[r][i] = Op(todo[r][i].key, todo[r][i].op, todo[r][i].nbytes * 2, step=first)
        case "skipped":
            del todo[r][int(rng.choice(_told_apart(todo[r][:step_ops], collectives)))]
        case "deadlock" | "deadlock-tie":
            ranks = _deadlock(todo, layout, ranks, members, tie=kind == "deadlock-tie")
        case "stop-inside":
            halt = {r: (int(rng.choice(collectives)), True)}
        case _:
            halt = dict.fromkeys(ranks, (at, False))
    places, steps = run(todo, members, halt, first)
    return Stall(layout, ranks, "sigstop" if kind == "two-stopped" else kind, places, steps, members, dict.fromkeys(members, first * 5))


def _told_apart(ops: list[Op], collectives: list[int]) -> list[int]:
    """Operations whose group has others of another size in the step: leaving one out makes a mismatch at once. (Else the job goes on, one off: see Fault "skip".)"""
    return [i for i in collectives if len({_signature(op) for op in ops if op.key == ops[i].key and op.peer < 0}) > 1]


def _deadlock(todo: list[list[Op]], layout: Layout, ranks: tuple[int, ...], members: dict[int, list[int]], *, tie: bool) -> tuple[int, ...]:
    """Two more groups over the same ranks, entered in two orders."""
    size = min(8, layout.world)
    start = ranks[0] // size * size
    inside = list(range(start, start + size))
    members[901], members[902] = inside, inside
    odd = set(inside[: size // 2]) if tie else {ranks[0]}
    for r in inside:
        pair = [Op(901, record.OPS.index("all_reduce"), 4, step=40), Op(902, record.OPS.index("all_reduce"), 4, step=40)]
        todo[r][0:0] = pair[::-1] if r in odd else pair
    return tuple(inside) if tie else ranks


def run(todo: list[list[Op]], members: dict[int, list[int]], halt: dict[int, tuple[int, bool]], first: int) -> tuple[list[dict[int, Place]], list[int]]:
    """Until nobody can go on. `halt`: rank -> (before which operation it stops, or inside it)."""
    world = len(todo)
    keys_of: list[list[int]] = [[] for _ in range(world)]
    for key, inside in members.items():
        for r in inside:
            keys_of[r].append(key)
    places: list[dict[int, Place]] = [{k: Place() for k in keys_of[r]} for r in range(world)]
    pc, waiting = [0] * world, [False] * world
    sent: dict[tuple[int, int], int] = {}
    got: dict[tuple[int, int], int] = {}
    queue = list(range(world))
    while queue:
        r = queue.pop()
        while pc[r] < len(todo[r]):
            op, at = todo[r][pc[r]], pc[r]
            stop = halt.get(r)
            if stop is not None and at >= stop[0] and (not stop[1] or at > stop[0]):
                break
            place = places[r][op.key]
            if not waiting[r]:
                waiting[r] = True
                if op.peer >= 0:
                    place.p2p, place.p2p_last = place.p2p + 1, op
                else:
                    place.signs.append(_signature(op))
                    place.entered, place.last, place.history = place.entered + 1, op, (place.history * 31 + _signature(op)) & (1 << 63) - 1
            frozen = stop is not None and stop[1] and at == stop[0]
            if frozen or not _ends(r, op, places, members[op.key], sent, got, halt, pc):
                break
            waiting[r] = False
            pc[r] += 1
            queue += [op.peer] if op.peer >= 0 else [m for m in members[op.key] if m != r and waiting[m]]
    return places, [todo[r][min(pc[r], len(todo[r]) - 1)].step if todo[r] else first for r in range(world)]


def _ends(
    r: int, op: Op, places: list[dict[int, Place]], inside: list[int], sent: dict[tuple[int, int], int], got: dict[tuple[int, int], int],
    halt: dict[int, tuple[int, bool]], pc: list[int],
) -> bool:  # fmt: skip
    place = places[r][op.key]
    if op.op == SEND:
        sent[r, op.peer] = sent.get((r, op.peer), 0) + 1
        place.p2p_done = place.p2p
        return True
    if op.op == RECV:
        if got.get((op.peer, r), 0) >= sent.get((op.peer, r), 0):
            return False
        got[op.peer, r] = got.get((op.peer, r), 0) + 1
        place.p2p_done = place.p2p
        return True
    n = place.entered
    for m in inside:
        other = places[m][op.key]
        if other.entered < n:
            return False
        if other.entered == n and other.last is not None and _signature(other.last) != _signature(op):
            return False
        stop = halt.get(m)
        if stop is not None and stop[1] and other.entered == n and other.done < n and m != r and pc[m] == stop[0]:
            return False  # it is stopped inside: nobody's operation ends
    place.done = n
    return True


def infos(s: Stall) -> list[list[RankInfo]]:
    """By node."""
    lay = s.layout
    out: list[list[RankInfo]] = [[] for _ in range(lay.nodes)]
    for r in range(lay.world):
        groups = [GroupInfo(key, s.members[key]) for key in s.places[r]]
        out[r // lay.per_node].append(RankInfo(r, r // lay.per_node, r % lay.per_node, 1000 + r, f"host{r // lay.per_node}", groups=groups))
    return out
