"""Simulated training jobs: what each rank's daemon would report, with faults and their labels. Seeded; vectorised over ranks.

A step is a program of segments: every rank computes for a while, then the ranks of a group meet in an operation, which ends for all when the last has come and the bytes
have gone. So who waits for whom follows, over tensor-, pipeline- and data-parallel groups, as it does in a job. Pipelines send activations forward and
gradients back, microbatch by microbatch.

Noise: lognormal jitter of each segment; heavy-tailed pauses of the operating system; node-wide wander with a memory (AR(1)); unequal ranks from the start; loader
hiccups; spikes of 2 to 10 steps' length, once in a while; garbage collection, staggered over ranks; run queues that are full on all nodes ("neighbours").

What a detector is told is made of `ckptd.monitor.report` values only; the truth stays here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from ckptd.monitor import record, report
from ckptd.monitor.asks import Ask
from ckptd.monitor.report import GroupInfo, GroupStep, Probed, Pulse, RankInfo, Report, StepSummary

Array = np.ndarray[Any, Any]

MICROBATCHES = 4
PARTS = ("data", "gc", "checkpoint", "eval", "compile", "delay")


@dataclass(frozen=True)
class Layout:
    """How ranks are divided: tensor parallel fastest, then data parallel, then pipeline. `shard`: size of FSDP's shard groups, 0: all."""

    name: str
    style: str
    world: int
    tp: int = 1
    pp: int = 1
    shard: int = 0
    per_node: int = 8

    @property
    def dp(self) -> int:
        return self.world // (self.tp * self.pp)

    @property
    def nodes(self) -> int:
        return -(-self.world // self.per_node)

    def ranks(self) -> Array:
        """pp x dp x tp."""
        return np.arange(self.world).reshape(self.pp, self.dp, self.tp)


TRANSFER_S = 0.6
"""How long a round of pairs of nodes takes, from asking to the answer: so measured in the real jobs of watch_links, with four daemons on two cores."""


@dataclass
class Kind:
    """Groups of one kind: a matrix of members, and what its operations cost."""

    name: str
    members: Array
    op: int
    part: float
    """Of a step: one operation's transfer."""
    ops: int = 0
    nbytes: int = 1 << 20

    def __post_init__(self) -> None:
        self.label = np.full(int(self.members.max()) + 1, -1, np.int64)
        for g, row in enumerate(self.members):
            self.label[row] = g
        name = int.from_bytes(self.name.encode()[:3], "big")
        self.keys = [name << 32 | g + 1 for g in range(len(self.members))]


@dataclass(frozen=True)
class Fault:
    """Something wrong. `severity`: part of a step, or the factor of a rate. `every`: (on, off) seconds. `end`: step at which it heals."""

    kind: str
    ranks: tuple[int, ...] = ()
    severity: float = 0.0
    onset: int = 0
    end: int = 1 << 60
    node: int = -1
    peer: int = -1
    every: tuple[float, float] | None = None
    hardware: bool = True
    """Whether a probe of the rank would show it."""


@dataclass(frozen=True)
class Noise:
    """How unquiet the job is; parts of a step."""

    jitter: float = 0.02
    os_pause: float = 0.002
    wander: float = 0.005
    uneven: float = 0.02
    spikes: float = 1.0 / 300
    """Per step: one rank stands for 2 to 10 steps' time."""
    hiccups: float = 0.01
    gc_every: int = 0
    gc_part: float = 0.3
    neighbours: float = 0.0
    lengths: float = 0.0
    """Spread of sequence lengths, the same for all ranks of a step."""
    lengths_own: float = 0.0
    """Spread of each data-parallel replica's own lengths."""
    uneven_stage: float = 0.0
    """The last pipeline stage has more to do."""
    save_every: int = 0
    save_part: float = 3.0
    snapshot_part: float = 0.005
    eval_every: int = 0
    eval_marked: bool = True
    log_every: int = 10
    log_part: float = 0.03
    compile_steps: int = 2
    lost_reports: float = 0.0
    lost_records: float = 0.0
    clock_steps: float = 0.0
    device: bool = False


class Sim:
    """One job. `steps(n)` yields (wall clock of the job, its newest step, reports) as the coordinator would get them."""

    def __init__(self, layout: Layout, step_s: float, seed: int, noise: Noise = Noise(), faults: tuple[Fault, ...] = (), report_s: float = 0.5) -> None:
        self.layout, self.step_s, self.noise, self.faults, self.report_s = layout, step_s, noise, faults, report_s
        self.rng = np.random.default_rng(seed)
        w = layout.world
        self.node_of = np.arange(w) // layout.per_node
        self.kinds = kinds_of(layout)
        self.uneven = np.exp(self.rng.normal(0, noise.uneven, w))
        if noise.uneven_stage:
            self.uneven[layout.ranks()[-1].ravel()] *= 1 + noise.uneven_stage
        self.wander = np.zeros(layout.nodes)
        self.slow_wander = np.zeros(w)
        self.step = 0
        self.t = self.now = 0.0
        """The end of the newest step; the moment that is being told of."""
        self.clock_ns = np.full(w, 10**9, np.int64)
        self.sent = [0] * layout.nodes
        self.gc_phase = self.rng.integers(0, max(1, noise.gc_every), w)
        self.pending: list[list[StepSummary]] = [[] for _ in range(layout.nodes)]
        self.reported = 0.0
        self.answers: list[tuple[float, Probed]] = []
        self.skew = np.zeros(w)
        """How much later than the first each rank begins its step."""
        self.held = np.zeros(w)
        """Seconds that probes take of the next step."""
        self.programs = self._programs()
        self.seqs = np.zeros(len(self.kinds), np.int64)
        self.skipped: dict[int, int] = {}

    # --- one step ---

    def advance(self) -> None:
        """Simulate a step, and keep what it would be summarised to."""
        s, n, lay, rng = self.step_s, self.noise, self.layout, self.rng
        w = lay.world
        self.step += 1
        own = {p: np.zeros(w) for p in PARTS}
        self.wander = 0.98 * self.wander + rng.normal(0, n.wander * 0.2, lay.nodes)
        self.slow_wander = 0.995 * self.slow_wander + rng.normal(0, n.wander * 0.1, w)
        speed = self.uneven * np.exp(self.wander[self.node_of] + self.slow_wander) * np.exp(rng.normal(0, n.lengths)) * (1.0 if not n.lengths_own else self._lengths())
        own["data"] = s * 0.01 * np.exp(rng.normal(0, 0.5, w)) + s * 0.2 * rng.random(w) * (rng.random(w) < n.hiccups)
        extra = s * n.os_pause * rng.pareto(2.5, w)
        if rng.random() < n.spikes:
            extra[rng.integers(w)] += s * rng.uniform(2, 10)
        if n.gc_every:
            own["gc"] += s * n.gc_part * ((self.step + self.gc_phase) % n.gc_every == 0)
        if n.neighbours:
            own["delay"] += s * n.neighbours * rng.gamma(1.0, 1.0, w) * (1 + np.sin(self.t / 300))
        own["checkpoint"] += s * n.snapshot_part * np.exp(rng.normal(0, 0.2, w))
        if n.save_every and self.step % n.save_every == 0:
            own["checkpoint"] += s * n.save_part * np.exp(rng.normal(0, 0.3, w))
        if n.eval_every and self.step % n.eval_every == 0:
            long = s * 8 * np.exp(rng.normal(0, 0.05, w))
            own["eval"] += long * n.eval_marked
            extra += long * (not n.eval_marked)
        if n.log_every and self.step % n.log_every == 0:
            extra[0] += s * n.log_part
        if self.step <= n.compile_steps:
            own["compile"] += s * 20 * rng.uniform(0.8, 1.2, w)
        if self.step <= 3:
            extra += s * rng.uniform(0.2, 1.0, w)
        self._inject(own, extra)
        extra += self.held
        self.held[:] = 0.0
        self._meet(speed, own, extra)

    def _lengths(self) -> Array:
        lay = self.layout
        each = np.exp(self.rng.normal(0, self.noise.lengths_own, lay.dp))
        return each[np.tile(np.repeat(np.arange(lay.dp), lay.tp), lay.pp)]

    def active(self, f: Fault) -> bool:
        """Whether a fault is at work in this step."""
        if not f.onset <= self.step < f.end:
            return False
        if f.every is None:
            return True
        on, off = f.every
        return ((self.step - f.onset) * self.step_s) % (on + off) < on

    def _inject(self, own: dict[str, Array], extra: Array) -> None:
        for f in self.faults:
            if not self.active(f):
                continue
            at, cost = list(f.ranks), f.severity * self.step_s
            match f.kind:
                case "compute-slow" | "intermittent" | "heals":
                    extra[at] += cost
                case "one-off":
                    extra[at] += cost * (self.step == f.onset)
                case "input-stall":
                    own["data"][at] += cost * np.exp(self.rng.normal(0, 0.2, len(at)))
                case "gc-storm":
                    own["gc"][at] += cost * np.exp(self.rng.normal(0, 0.2, len(at)))
                case "cpu-contention":
                    own["delay"][at] += cost * np.exp(self.rng.normal(0, 0.3, len(at)))
                case "drift":
                    extra[at] += cost * (self.step - f.onset) * self.step_s / 60
                case _:
                    pass

    # --- who waits for whom ---

    def _meet(self, speed: Array, own: dict[str, Array], extra: Array) -> None:
        w, s, rng = self.layout.world, self.step_s, self.rng
        began = self.skew
        t = began + sum((own[p] for p in PARTS), np.zeros(w))
        inside = np.zeros((len(self.kinds), w))
        least = np.zeros((len(self.kinds), w))
        busy = t - began
        for part, kind in self.programs:
            c = part * s * speed * np.exp(rng.normal(0, self.noise.jitter * np.sqrt(0.8 / max(part, 0.05)) if part else 0.0, w)) + extra * (part / 0.8)
            t = t + c
            busy += c
            if kind >= 0:
                t = self._operation(kind, t, inside, least)
            elif kind == -2:
                t = self._pipeline(t, busy, speed, extra, inside)
        self.busy, self.wall = busy, t - began
        self._summaries(own, inside, least)
        self.t += float(t.min())
        self.skew = t - t.min()

    def _operation(self, kind: int, t: Array, inside: Array, least: Array) -> Array:
        k = self.kinds[kind]
        m = k.members
        cost = k.part * self.step_s * self.transfer_factor(k) * np.exp(self.rng.normal(0, 0.03, len(m)))
        arrived = t[m]
        done = arrived.max(axis=1) + cost
        spent = done[:, None] - arrived
        inside[kind, m] += spent
        order, starts, back = self._node_order(kind)
        flat = spent.ravel()[order]
        least[kind, m.ravel()[order]] += np.minimum.reduceat(flat, starts)[back]
        out = t.copy()
        out[m] = done[:, None]
        return out

    def _node_order(self, kind: int) -> tuple[Array, Array, Array]:
        cache = self.__dict__.setdefault("_orders", {})
        if kind not in cache:
            m = self.kinds[kind].members
            labels = (np.arange(len(m))[:, None] * self.layout.nodes + self.node_of[m]).ravel()
            order = np.argsort(labels, kind="stable")
            ordered = labels[order]
            starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])
            cache[kind] = (order, starts, np.repeat(np.arange(len(starts)), np.diff(np.r_[starts, len(ordered)])))
        return cache[kind]

    def _pipeline(self, t: Array, busy: Array, speed: Array, extra: Array, inside: Array) -> Array:
        """Microbatches forward through the stages, then back."""
        lay, s = self.layout, self.step_s
        ranks = lay.ranks()
        t = t.copy()
        share = 0.8 / (2 * MICROBATCHES + 2 * (lay.pp - 1))
        for forward in (True, False):
            order = range(lay.pp) if forward else range(lay.pp - 1, -1, -1)
            sent = [np.zeros(lay.dp * lay.tp) for _ in range(lay.pp)]
            for _ in range(MICROBATCHES):
                before: Array | None = None
                for p in order:
                    at = ranks[p].ravel()
                    if before is not None:
                        inside[-1, at] += np.maximum(before - t[at], 0.0)
                        t[at] = np.maximum(t[at], before)
                    c = share * s * speed[at] * np.exp(self.rng.normal(0, self.noise.jitter * 2, len(at))) + extra[at] / (2 * MICROBATCHES)
                    t[at] += c
                    busy[at] += c
                    neighbour = p + 1 if forward else p - 1
                    if 0 <= neighbour < lay.pp:
                        link = self._p2p_factor(at, ranks[neighbour].ravel())
                        sent[p] = t[at] + 0.01 * s * link
                        before = sent[p]
        return t

    def transfer_factor(self, k: Kind) -> Array:
        """How much longer the groups' transfers take: a ring is as slow as its slowest link."""
        factor = np.ones(len(k.members))
        for f in self.faults:
            if f.kind in ("send-slow", "receive-slow", "link-slow") and self.active(f):
                nodes = self.node_of[k.members]
                over = (nodes != nodes[:, :1]).any(axis=1)
                here = (nodes == f.node).any(axis=1) & over
                if f.kind == "link-slow":
                    follows = np.roll(nodes, -1, axis=1)
                    here = ((nodes == f.node) & (follows == f.peer)).any(axis=1)
                factor = np.where(here, np.maximum(factor, 1.0 / f.severity), factor)
        return factor

    def _p2p_factor(self, source: Array, target: Array) -> Array:
        factor = np.ones(len(source))
        for f in self.faults:
            if f.kind in ("send-slow", "receive-slow", "link-slow") and self.active(f):
                a, b = self.node_of[source], self.node_of[target]
                hit = {"send-slow": a == f.node, "receive-slow": b == f.node, "link-slow": (a == f.node) & (b == f.peer)}[f.kind] & (a != b)
                factor = np.where(hit, 1.0 / f.severity, factor)
        return factor

    # --- what is reported ---

    def _programs(self) -> list[tuple[float, int]]:
        """(part of a step to compute, index of the groups to meet in; -1 none, -2 the pipeline)."""
        names = [k.name for k in self.kinds]
        style = self.layout.style
        if style == "ddp":
            program = [(0.5, 0), (0.2, 0), (0.1, -1)]
        elif style == "fsdp":
            program = [(0.05, 0), (0.15, 0), (0.1, 0), (0.2, 0), (0.2, 0), (0.1, -1)]
        elif style == "hsdp":
            program = [(0.05, 0), (0.25, 0), (0.2, 0), (0.2, 1), (0.1, -1)]
        elif self.layout.pp > 1:
            program = [(0.0, -2)] + ([(0.0, names.index("tp"))] if "tp" in names else []) + ([(0.0, names.index("dp"))] if "dp" in names else []) + [(0.1, -1)]
        else:
            program = [(0.2, 0), (0.2, 0), (0.2, 0), (0.1, 1), (0.1, -1)]
        for _, kind in program:
            if kind >= 0:
                self.kinds[kind].ops += 1
        return program

    def _summaries(self, own: dict[str, Array], inside: Array, least: Array) -> None:
        n, rng, lay = self.noise, self.rng, self.layout
        w = lay.world
        us = 1e6
        wall = self.wall * us
        self.clock_ns += (self.wall * 1e9).astype(np.int64)
        if n.clock_steps and rng.random() < n.clock_steps:
            self.clock_ns += rng.integers(-10**10, 10**10, w)
            self.clock_ns = np.maximum(self.clock_ns, 1)
        bad = np.zeros(w, np.int64)
        for f in self.faults:
            if f.kind == "nan" and self.step >= f.onset:
                bad[list(f.ranks)] |= record.BAD_LOSS
                bad |= record.BAD_GRAD
                if self.step > f.onset:
                    bad |= record.BAD_LOSS
            if f.kind == "skip" and self.step == f.onset:
                self.skipped[f.ranks[0]] = 1
        lost = (rng.random(w) < n.lost_records) * rng.integers(1, 100, w) if n.lost_records else np.zeros(w, np.int64)
        program = 1000 + (np.arange(w) // (lay.dp * lay.tp) if lay.pp > 1 else np.zeros(w, np.int64))
        if n.lengths_own and lay.tp > 1:
            program = program + 10 * (self.step * lay.dp + np.tile(np.repeat(np.arange(lay.dp), lay.tp), lay.pp))
        device = (inside.sum(axis=0) * us) if n.device else np.zeros(w)
        busy = self.busy * us * (0.05 if n.device else 1.0) if n.device else self.busy * us
        columns = np.stack([wall, np.minimum(busy, wall), *(own[p] * us for p in ("data", "gc", "checkpoint", "eval", "compile")), wall * 0.02, own["delay"] * us,
                            busy * 0.9, device]).astype(np.int64).T.tolist()  # fmt: skip
        groups = self._groups(inside, least)
        clocks, losts, bads, progs = self.clock_ns.tolist(), lost.tolist(), bad.tolist(), program.tolist()
        step, pending, per = self.step, self.pending, lay.per_node
        for r, c in enumerate(columns):
            gone = losts[r]
            pending[r // per].append(
                StepSummary(r, step, clocks[r], *c[:9], c[9], c[10], 12, gone, bads[r], 0 if gone else progs[r], [] if gone else groups[r])
            )

    def _groups(self, inside: Array, least: Array) -> list[list[GroupStep]]:
        out: list[list[GroupStep]] = [[] for _ in range(self.layout.world)]
        for i, k in enumerate(self.kinds):
            self.seqs[i] += k.ops
            p2p = 2 * MICROBATCHES if k.name == "pp" else 0
            seq, ops, nbytes = int(self.seqs[i]), k.ops + p2p, k.nbytes * (k.ops + p2p)
            a, b = (inside[i] * 1e6).astype(np.int64).tolist(), (least[i] * 1e6).astype(np.int64).tolist()
            keys, label = k.keys, k.label.tolist()
            for r in range(len(label)):
                g = label[r]
                if g >= 0:
                    behind = self.skipped.get(r, 0) if i == 0 else 0
                    out[r].append(GroupStep(keys[g], seq - behind, seq * 7919 + behind, ops, nbytes, a[r], b[r], p2p))
        return out

    def infos(self, node: int) -> list[RankInfo]:
        """Who the ranks of a node are."""
        found = []
        for r in range(node * self.layout.per_node, min((node + 1) * self.layout.per_node, self.layout.world)):
            groups = [GroupInfo(k.keys[k.label[r]], k.members[k.label[r]].tolist()) for k in self.kinds if r < len(k.label) and k.label[r] >= 0]
            found.append(RankInfo(r, node, r % self.layout.per_node, 1000 + r, f"host{node}", device=r % self.layout.per_node if self.noise.device else -1, groups=groups))
        return found

    def reports(self) -> list[Report]:
        """What all nodes say now; some of it is lost on the way."""
        found = []
        for node in range(self.layout.nodes):
            infos = self.infos(node) if not self.sent[node] else []
            steps, self.pending[node] = self.pending[node], []
            self.sent[node] += 1
            first, last = node * self.layout.per_node, min((node + 1) * self.layout.per_node, self.layout.world)
            pulses = [Pulse(r, 100, self.step, self.step * 14, "S") for r in range(first, last)]
            if self.noise.lost_reports and not infos and self.rng.random() < self.noise.lost_reports:
                continue
            found += [
                Report(node, self.sent[node], ranks=infos if not at else [], steps=steps[at : at + report.STEPS_MAX], pulses=pulses if not at else [])
                for at in range(0, max(len(steps), 1), report.STEPS_MAX)
            ]
        due = [p for at, p in self.answers if at <= self.t]
        self.answers = [(at, p) for at, p in self.answers if at > self.t]
        if due:
            found.append(Report(0, 0, probed=due))
        return found

    def ask(self, ask: Ask) -> None:
        """Answer a probe as the nodes would: ranks at the end of their step, pairs within the time that the probe takes."""
        rng = self.rng
        if ask.what in ("compute", "memory"):
            for r in ask.ranks:
                rate = 1e11 * float(np.exp(rng.normal(0, 0.01)))
                for f in self.faults:
                    if r in f.ranks and self.active(f) and f.hardware and f.kind in ("compute-slow", "drift", "heals", "intermittent", "cpu-contention"):
                        cost = f.severity * ((self.step - f.onset) * self.step_s / 60 if f.kind == "drift" else 1.0)
                        rate /= 1 + cost / 0.8
                self.answers.append((self.t + self.step_s + ask.seconds + 0.3, Probed(ask.id, ask.what, r, rate)))
                self.held[r] += ask.seconds
        elif ask.what == "transfer":
            for a in ask.ranks:
                rate = 1e9 * float(np.exp(rng.normal(0, 0.06)))
                for f in self.faults:
                    hit = {"send-slow": a == f.node, "receive-slow": ask.other == f.node, "link-slow": (a, ask.other) == (f.node, f.peer)}.get(f.kind, False)
                    if hit and self.active(f):
                        rate *= f.severity
                self.answers.append((self.now + TRANSFER_S, Probed(ask.id, "transfer", a, rate, ask.other)))

    def run(self, steps: int) -> Iterator[tuple[float, int, list[Report]]]:
        """Steps, told every `report_s`; between long steps time passes too, and pairs of nodes say what they measured when they have."""
        for _ in range(steps):
            before = self.t
            self.advance()
            ticks = [*np.arange(np.ceil(before / 0.5) * 0.5, self.t, 0.5)[1:4].tolist()] if self.step_s > 0.6 else []
            while (at := min([*ticks[:1], *[t for t, p in self.answers if p.kind == "transfer"]], default=self.t)) < self.t:
                self.now = max(at, before)
                ticks = [t for t in ticks if t > at]
                due = [(t, p) for t, p in self.answers if p.kind == "transfer" and t <= at]
                self.answers = [a for a in self.answers if a not in due]
                yield self.now, self.step - 1, [Report(0, 0, probed=[p for _, p in due])] if due else []
            self.now = self.t
            if self.t - self.reported >= self.report_s:
                self.reported = self.t
                yield self.t, self.step, self.reports()


def kinds_of(lay: Layout) -> list[Kind]:
    """The groups of a layout."""
    reduce, gather, scatter = record.OPS.index("all_reduce"), record.OPS.index("all_gather"), record.OPS.index("reduce_scatter")
    ranks = lay.ranks()
    everybody = np.arange(lay.world)[None]
    if lay.style == "ddp":
        return [Kind("world", everybody, reduce, 0.08)]
    if lay.style == "fsdp":
        return [Kind("world", everybody, gather, 0.03)]
    if lay.style == "hsdp":
        grid = np.arange(lay.world).reshape(-1, lay.shard)
        return [Kind("shard", grid, scatter, 0.02), Kind("replicate", grid.T.copy(), reduce, 0.06)]
    found = []
    if lay.tp > 1:
        found.append(Kind("tp", ranks.reshape(-1, lay.tp), reduce, 0.02))
    if lay.dp > 1:
        found.append(Kind("dp", ranks.transpose(0, 2, 1).reshape(-1, lay.dp).copy(), reduce, 0.08))
    if lay.pp > 1:
        found.append(Kind("pp", ranks.transpose(1, 2, 0).reshape(-1, lay.pp).copy(), reduce, 0.0))
    return found


LAYOUTS = {
    "ddp4": Layout("ddp4", "ddp", 4, per_node=2),
    "ddp8": Layout("ddp8", "ddp", 8, per_node=2),
    "ddp64": Layout("ddp64", "ddp", 64),
    "fsdp16": Layout("fsdp16", "fsdp", 16, per_node=4),
    "fsdp64": Layout("fsdp64", "fsdp", 64),
    "hsdp32": Layout("hsdp32", "hsdp", 32, shard=8),
    "tp2dp4": Layout("tp2dp4", "3d", 8, tp=2, per_node=2),
    "tp4dp16": Layout("tp4dp16", "3d", 64, tp=4),
    "pp4dp2": Layout("pp4dp2", "3d", 8, pp=4, per_node=2),
    "pp4dp4": Layout("pp4dp4", "3d", 16, pp=4, per_node=4),
    "tp2pp2dp2": Layout("tp2pp2dp2", "3d", 8, tp=2, pp=2, per_node=2),
    "tp4pp4dp4": Layout("tp4pp4dp4", "3d", 64, tp=4, pp=4),
    "hsdp512": Layout("hsdp512", "hsdp", 512, shard=8),
    "tp8pp8dp16": Layout("tp8pp8dp16", "3d", 1024, tp=8, pp=8),
    "tp8dp512": Layout("tp8dp512", "3d", 4096, tp=8),
}
