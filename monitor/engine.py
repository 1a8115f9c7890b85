r"""The job's coordinator as one machine: reports and the time in, verdicts and asks out. Pure: no clock, file, socket, thread or chance.

    receive(report) ---> Roll (pulses)  ---> hang, crash ----+
                    \--> Join (steps)   ---> Watch ----------+---> Verdicts ---> Concluded
                                                             ^         |
                    answers <---------------- Asks <---------+---------+

One engine serves one attempt of one job. `now_s` is any clock that only goes forward; `wall_s` is for people. Nothing of two nodes' clocks is compared. Memory is
bounded; time is linear in ranks. Not thread-safe: one thread calls it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np

from ckptd.monitor import comms, hang, join, report
from ckptd.monitor.asks import Ask, Asks
from ckptd.monitor.report import Evidence, Finding, Pulse
from ckptd.monitor.settings import Settings
from ckptd.monitor.standing import Roll
from ckptd.monitor.verdict import FATAL, Key, Past, Seen, Verdicts
from ckptd.monitor.watch import Watch

__all__ = ["Ask", "Asks", "Concluded", "Engine", "Past", "Settings"]

TOGETHER_S = 0.01
"""Deaths within this time are of one cause; later ones follow from it: others lose their connection, or their launcher ends them."""
IDLE_MS = 1000
"""A pulse brings its groups from here on."""
STACKS_OF = FATAL | {"input-stall", "checkpoint-stall", "gc-pause"}
PROBED = frozenset({"compute-slow", "drift", "cpu-contention"})
MATRIX_AGAIN_S = 15.0
MATRICES_MAX = 4
HEAT_STEPS, HEAT_RANKS = 120, 256


@dataclass(frozen=True, slots=True)
class Concluded:
    """A verdict that is new, or whose state, confidence, kind, ranks, grade or recommendation changed."""

    verdict: report.Verdict


Out = list[Concluded | Ask]


@dataclass(slots=True)
class _Death:
    ranks: list[int] = field(default_factory=list)
    victims: list[int] = field(default_factory=list)
    first_s: float = 0.0
    explained: bool = False
    """By what they entered: not their own doing."""


class Engine:
    """See the module. `past`: what was done in earlier attempts (`Engine.past` of theirs), for the guards against crash loops and too many evictions."""

    def __init__(
        self, job: str, attempt: int, world_size: int, nodes: int, settings: Settings = Settings(), *, past: tuple[Past, ...] = ()  # noqa: B008  frozen
    ) -> None:
        self.job, self.attempt, self.world_size, self.settings = job, attempt, world_size, settings
        self.roll = Roll(world_size, nodes, settings)
        self.patience = hang.Patience(settings)
        self.watch = Watch(world_size, settings, self.roll, self.patience)
        self.verdicts = Verdicts(job, attempt, settings, self.roll.place, list(past), alarms_of=self.roll.alarms)
        self.asks = Asks(settings)
        self._death = _Death()
        self._stacks_of: set[int] = set()
        self._pulses_asked_s = -1e9
        self._fresh = False
        self._graph = hang.Graph()
        self._looked_s = -1e9
        self._step = 0
        self._now_s, self._wall_s = 0.0, 0.0
        self._matrices: list[float] = []
        self._place: comms.Place | None = None

    # --- in ---

    def receive(self, report: report.Report, now_s: float, wall_s: float) -> Out:
        """All that a node says at once."""
        self._now_s, self._wall_s = now_s, wall_s
        self.roll.hear(report, now_s)
        self._fresh |= bool(report.pulses)
        self._step = max([self._step, *[p.step for p in report.pulses]])
        out = self._deaths(report.pulses)
        if report.steps:
            self.watch.join.add(report.steps, now_s, node=report.node, every=report.every)
            out += self._steps()
        if report.probed:
            self.asks.answered(report.probed)
            out += self._answers()
        out += self._stacks(report)
        return out

    def tick(self, now_s: float, wall_s: float) -> Out:
        """Time passes; about 4 times a second."""
        self._now_s, self._wall_s = now_s, wall_s
        out = self._steps()
        out += self._answers()
        out += self._hangs()
        return out

    def found(self, finding: Finding) -> Out:
        """A finding of somebody else (replicas that differ): it is believed."""
        return self._conclude("found", [Seen((finding.kind, *finding.ranks), finding, certain=True)])

    def acted(self, verdict_id: int, action: str) -> None:
        """What was done about a verdict."""
        self.verdicts.acted(verdict_id, action, self._wall_s)

    @property
    def past(self) -> tuple[Past, ...]:
        """What was done, to be given to the next attempt's engine."""
        return tuple(self.verdicts.past)

    def _conclude(self, domain: str, seen: list[Seen], *, windows: int = 1) -> Out:
        return [Concluded(v) for v in self.verdicts.window(domain, seen, self._now_s, self._wall_s, windows=windows)]

    # --- steps ---

    def _steps(self) -> Out:
        out: Out = []
        steps = self.watch.join.ready(self._now_s)
        if not steps:
            return out
        self._step = max(self._step, steps[-1].step)
        self._count_lost()
        for j in steps:
            certain = self.watch.at_once(j)
            for domain in ("nan", "desync"):
                mine = [s for s in certain if s.key[0] == domain]
                if mine or (domain == "nan" and ("nan",) in self.verdicts.open):
                    out += self._conclude(domain, mine)
        for seen, pairs in self.watch.take(steps):
            out += self._windows(seen, pairs)
        return out

    def _windows(self, seen: list[Seen], pairs: int) -> Out:
        """One look at the windows, with so many pairs of new steps in them: verdicts, and what is asked because of them."""
        if self._place is not None:
            seen = self._placed(seen)
        out: Out = self._conclude("steps", seen, windows=pairs)
        for s in seen:
            entry = self.verdicts.open.get(s.key)
            if entry is None or s.half:
                continue
            if s.finding.kind in PROBED and s.finding.ranks:
                peers = [r for r in self.watch.roles.peers(s.finding.ranks[0], self.roll.node_of, 4) if r not in s.finding.ranks]
                out += self.asks.probe(s.key, s.finding.ranks, peers, self._now_s)
            if s.key in {("comm",), ("global",)} and s.finding.kind in ("comm-slow", "global-slow"):
                out += self._ask_pairs()
        return out

    def _placed(self, seen: list[Seen]) -> list[Seen]:
        """The place that probes found, as long as the job's transfers (or all of its steps) are slow."""
        place = self._place
        slow = next((s for s in seen if s.key in {("comm",), ("global",)}), None)
        if place is None or slow is None:
            if ("comm",) not in self.verdicts.open:
                self._place, self._matrices = None, []
            return seen
        f = slow.finding
        ranks = tuple(r for node in place.nodes for r in self.roll.ranks_of(node))
        found = Finding(
            kind=place.kind, ranks=ranks, step=f.step, since_step=f.since_step, strength=1.0, cause=place.cause, group=f.group, slowdown=f.slowdown, peer=place.peer,
            victims=f.victims, evidence=(*place.evidence, *f.evidence)[:10],
        )  # fmt: skip
        return [Seen(("comm",), found, half=slow.half), *[s for s in seen if s is not slow]]

    def _count_lost(self) -> None:
        lost, roll = self.watch.join.records_lost, self.roll
        rank_steps = max(1, self.watch.join.rank_steps)
        part = max(roll.part_lost(), min(1.0, lost / (20.0 * rank_steps)))
        self.verdicts.lost = (part, lost + roll.reports_lost)

    # --- deaths and hangs ---

    def _deaths(self, pulses: list[Pulse]) -> Out:
        known = {*self._death.ranks, *self._death.victims}
        dead = [p.rank for p in pulses if p.state in hang.GONE and 0 <= p.rank < self.world_size and p.rank not in known]
        d = self._death
        if not dead:
            return self._died_of() if d.ranks and pulses else []
        out: Out = []
        if not d.ranks:
            d.first_s = self._now_s
            told = {r for r, p in self.roll.pulses.items() if p.groups}
            others = sorted(self.roll.infos.keys() - told - {*dead}) if len(self.roll.heard_s) > 1 else []
            out += [self.asks.ask("pulses", others[:256])] if others else []
        (d.ranks if self._now_s - d.first_s <= TOGETHER_S else d.victims).extend(dead)
        explained = self._died_of()
        return out + (explained if explained or d.explained else self._crashed())

    def _died_of(self) -> Out:
        """A mismatch that ranks died of: a backend that was given less or more than it expected ends its process, which is not to blame."""
        standing = self.roll.standing(self._now_s, self._step)
        odd = [f for f in hang.mismatches(standing, hang.rows_by_group(standing.pulses)) if f.strength == 1.0]
        self._death.explained |= bool(odd)
        return self._conclude("died of", [Seen(_hang_key(f), f, stuck=True, certain=True) for f in odd]) if odd else []

    def _crashed(self) -> Out:
        d = self._death
        killed = [r for r in d.ranks if self.roll.pulses[r].signal or self.roll.pulses[r].state != "raised"]
        ranks = killed or d.ranks  # who was killed is first; who raised because of it follows
        victims = {*d.victims, *d.ranks} - {*ranks}
        first = self.roll.pulses[ranks[0]]
        signals = sorted({self.roll.pulses[r].signal for r in ranks} - {0})
        cause = "the process is gone" + (f" (signal {', '.join(map(str, signals))})" if signals else "")
        op = max(first.groups, key=lambda row: row.entered, default=None)
        finding = Finding(
            kind="crash", ranks=tuple(sorted(ranks)), step=first.step, since_step=first.step, strength=1.0, cause=cause,
            victims=tuple(sorted(victims))[: hang.VICTIMS_MAX], op=hang.name_of(op.op) if op else "", seq=op.entered if op else 0, group=op.key if op else 0,
        )  # fmt: skip
        return self._conclude("crash", [Seen(("crash",), finding, stuck=True)])

    def _hangs(self) -> Out:
        """Look at where everybody stands, if somebody has stood for long; new pulses make a new window."""
        if not self._fresh and self._now_s - self._looked_s < 1.0:
            return []
        self._fresh, self._looked_s = False, self._now_s
        idle = [r for r, p in self.roll.pulses.items() if p.idle_ms >= IDLE_MS and not self.roll.gone(r)]
        if not idle or self._death.ranks:
            self._graph = hang.Graph()
            return self._conclude("hang", [])
        standing = self.roll.standing(self._now_s, self._step)
        alive = [p for r, p in standing.pulses.items() if not self.roll.gone(r)]
        if alive and all(p.state in hang.STOPPED | hang.TRACED for p in alive):  # a debugger, or a frozen machine: nobody is to blame
            return []
        findings, self._graph = hang.look(standing)
        due = [f for f in findings if hang.overdue(f, standing, self.patience)]
        out = self._conclude("hang", [Seen(_hang_key(f), f, stuck=True, certain=f.kind != "undecided") for f in due])
        out += [ask for c in out if isinstance(c, Concluded) and c.verdict.state == "confirmed" for ask in self._ask_stacks(c.verdict)]
        out += self._ask_pulses(standing)
        return out

    # --- asks ---

    def _ask_pulses(self, standing: hang.Standing) -> list[Ask]:
        """Tables of ranks that others may wait for, and that move elsewhere."""
        if self._now_s - self._pulses_asked_s < 1.0:
            return []
        waiting = {row.key for p in standing.pulses.values() for row in p.groups if row.entered > row.done and row.since_ms >= IDLE_MS}
        waiting_for = {row.p2p_peer for p in standing.pulses.values() for row in p.groups if row.p2p_open and row.p2p_since_ms >= IDLE_MS}
        known = {r for r, p in standing.pulses.items() if p.groups or self.roll.gone(r)}
        lacking = sorted(({m for key in waiting for m in standing.members.get(key, ())} | waiting_for) - known - standing.stale - {-1})
        if not lacking:
            return []
        self._pulses_asked_s = self._now_s
        return [self.asks.ask("pulses", lacking[:256])]

    def _ask_stacks(self, v: report.Verdict) -> list[Ask]:
        if not self.settings.stacks or v.kind not in STACKS_OF or v.kind == "crash" or v.id in self._stacks_of:
            return []
        self._stacks_of.add(v.id)
        return [self.asks.ask("stacks", (*v.ranks[:2], *v.victims[:1]))]

    def _ask_pairs(self) -> list[Ask]:
        """A matrix of the nodes whose transfers may be slow; again while it showed nothing."""
        last_s = self._matrices[-1] if self._matrices else -1e9
        if self._place is not None or len(self._matrices) >= MATRICES_MAX or self._now_s - last_s < MATRIX_AGAIN_S:
            return []
        hot = self.watch.hot
        members = self.roll.members
        nodes = comms.suspects(hot, members, self.roll.node_of, [k for k in members if k not in hot]) if hot else []
        asks = self.asks.pairs(nodes or sorted(self.roll.heard_s), self._now_s)
        if asks:
            self._matrices.append(self._now_s)
        return asks

    def _answers(self) -> Out:
        ended, matrix, asks = self.asks.done(self._now_s)
        out: Out = [*asks]
        for probe in ended:
            out += [Concluded(v) for v in self.verdicts.probed(probe.key, probe.got, self._now_s, self._wall_s)]
        if matrix is not None:
            self._place = comms.place(matrix.got, self.settings.hot)
            key: Key = ("comm",) if ("comm",) in self.verdicts.open else ("global",)
            entry = self.verdicts.open.get(key)
            if self._place is not None and entry is not None:
                seen = self._placed([Seen(key, entry.finding)])
                out += self._conclude("steps", seen + [Seen(k, e.finding, half=True) for k, e in self.verdicts.open.items() if e.domain == "steps" and k != ("comm",)])
                out += [Concluded(v) for v in self.verdicts.agreed(("comm",), matrix.got, self._now_s, self._wall_s)]
        return out

    def _stacks(self, r: report.Report) -> Out:
        out: Out = []
        for stack in r.stacks:
            for v in self.verdicts.all():
                if stack.rank in (*v.ranks[:2], *v.victims[:1]) and v.state != "cleared" and v.id in self._stacks_of:
                    item = Evidence(signal=f"stack of rank {stack.rank}", value=stack.text, unit=stack.how)
                    out += [Concluded(x) for x in self.verdicts.evidence(v.id, [item], self._now_s, self._wall_s)]
        return out

    # --- status ---

    def status(self) -> dict[str, Any]:
        """Plain values for `ckptd status`, metrics and the page: the shapes of `view.py`. Bounded, but for one row per rank."""
        w = self.watch
        s = w.stragglers
        late = s.lateness(1)[-1] if s.count else None
        ranks = [self._rank(r, None if late is None else float(late[r])) for r in sorted(self.roll.infos)]
        kinds = {v.kind: v.state for v in self.verdicts.all() if v.state != "cleared"}
        return {
            "job": self.job, "attempt": self.attempt, "world_size": self.world_size, "step": self._step, "policy": self.settings.policy,
            "step_us": round(s.wall_us), "steps_per_s": round(1e6 / s.wall_us, 3) if s.wall_us else 0.0, "ranks": ranks,
            "counts": {
                "reports": self.roll.reports, "reports_lost": self.roll.reports_lost, "steps_joined": w.join.joined, "steps_late": w.join.late,
                "rank_steps": w.join.rank_steps, "records_lost": w.join.records_lost,
            },
            "detectors": {d: next((s for k, s in kinds.items() if k in of), "ok") for d, of in DETECTORS.items()},
            "health": [msgspec.to_builtins(h) for _, h in sorted(self.roll.health.items())],
            "verdicts": [msgspec.to_builtins(v) | {"text": v.text} for v in self.verdicts.all()],
            "waits": self.roll.waits(self._graph.waits()),
            "heat": self._heat(),
        }  # fmt: skip

    def _rank(self, r: int, late: float | None) -> dict[str, Any]:
        info, pulse = self.roll.infos[r], self.roll.pulses.get(r)
        v = self.watch.values[:, r]
        parts = {name: int(v[join.SIGNALS.index(name)]) for name in ("data", "gc", "checkpoint", "eval", "compile", "optimizer", "delay")}
        return {
            "rank": r, "node": info.node, "host": info.host, "local_rank": info.local_rank, "device": info.device,
            "step": max(pulse.step if pulse else 0, self.watch.step), "state": pulse.state if pulse else "", "idle_ms": pulse.idle_ms if pulse else 0,
            "wall_us": int(v[join.WALL]), "self_us": int(v[join.SELF]), "lateness": None if late is None else round(late, 4), "parts": parts,
            **{f"{name}_us": value for name, value in parts.items()}, "device_us": int(v[join.DEVICE]), "lost": int(v[join.LOST]),
        }  # fmt: skip

    def _heat(self) -> dict[str, Any]:
        """Ranks x the last steps. Of very many ranks, those that are latest."""
        s = self.watch.stragglers
        if not s.count:
            return {"steps": [], "ranks": [], "wall_us": [], "lateness": []}
        late = s.lateness(HEAT_STEPS)
        at = np.arange(s.count - len(late), s.count) % len(s.steps)
        known = np.array(sorted(self.roll.infos), np.int64)
        if len(known) > HEAT_RANKS:
            known = np.sort(known[np.argsort(-late[-10:, known].mean(axis=0))[:HEAT_RANKS]])
        return {
            "steps": s.steps[at].tolist(), "ranks": known.tolist(), "wall_us": np.rint(s.walls[at][:, known].T).astype(int).tolist(),
            "lateness": np.round(late[:, known].T.astype(float), 3).tolist(),
        }  # fmt: skip


DETECTORS = {
    "crash": frozenset({"crash"}),
    "hang": frozenset({"hang", "stopped", "io-blocked", "desync", "deadlock", "comm-hang"}),
    "straggler": frozenset({"compute-slow", "cpu-contention", "input-stall", "gc-pause", "checkpoint-stall"}),
    "comms": frozenset({"comm-slow", "send-slow", "receive-slow", "link-slow"}),
    "drift": frozenset({"drift", "global-slow"}),
    "loss": frozenset({"nan", "divergence"}),
}
"""Which kinds are of which detector, for people."""


def _hang_key(f: Finding) -> tuple[str | int, ...]:
    return ("undecided",) if f.kind == "undecided" else ("hang", *f.ranks[:8])
