r"""The job's coordinator as one machine: reports and the time in, verdicts and asks out. Pure: no clock, file, socket, thread or chance.

    receive(report) ---> Roll (pulses)  ---> hang, crash ----+
                    \--> Join (steps)   ---> straggler, comms, drift, loss ---> Verdicts ---> Concluded
                                                              ^                     |
                    answers <---------------- Ask <-----------+---------------------+

One engine serves one attempt of one job. `now_s` is any clock that only goes forward; `wall_s` is for people. Nothing of two nodes' clocks is compared. Memory is
bounded; time is linear in ranks. Not thread-safe: one thread calls it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import msgspec

from ckptd.monitor import hang, report
from ckptd.monitor.report import Evidence, Finding, Pulse
from ckptd.monitor.settings import Settings
from ckptd.monitor.standing import Roll
from ckptd.monitor.verdict import FATAL, Past, Seen, Verdicts

__all__ = ["Ask", "Concluded", "Engine", "Past", "Settings"]

TOGETHER_S = 0.3
"""Deaths within this time are of one cause; later ones follow from it."""
IDLE_MS = 1000
"""A pulse brings its groups from here on."""


@dataclass(frozen=True, slots=True)
class Concluded:
    """A verdict that is new, or whose state, confidence, kind, ranks, grade or recommendation changed."""

    verdict: report.Verdict


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
class _Death:
    ranks: list[int] = field(default_factory=list)
    victims: list[int] = field(default_factory=list)
    first_s: float = 0.0


class Engine:
    """See the module. `past`: what was done in earlier attempts (`Engine.past` of theirs), for the guards against crash loops and too many evictions."""

    def __init__(
        self, job: str, attempt: int, world_size: int, nodes: int, settings: Settings = Settings(), *, past: tuple[Past, ...] = ()  # noqa: B008  frozen
    ) -> None:
        self.job, self.attempt, self.world_size, self.settings = job, attempt, world_size, settings
        self.roll = Roll(world_size, nodes, settings)
        self.patience = hang.Patience(settings)
        self.verdicts = Verdicts(job, attempt, settings, self.roll.place, list(past))
        self._death = _Death()
        self._asks = 0
        self._asked: dict[int, tuple[int, float]] = {}
        self._pulses_asked_s = -1e9
        self._fresh = False
        self._graph = hang.Graph()
        self._looked_s = -1e9
        self._step = 0
        self._now_s, self._wall_s = 0.0, 0.0

    # --- in ---

    def receive(self, report: report.Report, now_s: float, wall_s: float) -> list[Concluded | Ask]:
        """All that a node says at once."""
        self._now_s, self._wall_s = now_s, wall_s
        self.roll.hear(report, now_s)
        self._fresh |= bool(report.pulses)
        self._step = max([self._step, *[p.step for p in report.pulses]])
        out: list[Concluded | Ask] = []
        out += self._stacks(report, now_s, wall_s)
        out += self._deaths(report.pulses, now_s, wall_s)
        return out

    def tick(self, now_s: float, wall_s: float) -> list[Concluded | Ask]:
        """Time passes; about 4 times a second."""
        self._now_s, self._wall_s = now_s, wall_s
        self.verdicts.lost = (self.roll.part_lost(), self.roll.reports_lost)
        return self._hangs(now_s, wall_s)

    def found(self, finding: Finding) -> list[Concluded | Ask]:
        """A finding of somebody else (replicas that differ): it is believed."""
        seen = Seen((finding.kind, *finding.ranks), finding, certain=True)
        return [Concluded(v) for v in self.verdicts.window("found", [seen], self._now_s, self._wall_s)]

    def acted(self, verdict_id: int, action: str) -> None:
        """What was done about a verdict."""
        self.verdicts.acted(verdict_id, action, self._wall_s)

    @property
    def past(self) -> tuple[Past, ...]:
        """What was done, to be given to the next attempt's engine."""
        return tuple(self.verdicts.past)

    # --- deaths and hangs ---

    def _deaths(self, pulses: list[Pulse], now_s: float, wall_s: float) -> list[Concluded | Ask]:
        known = {*self._death.ranks, *self._death.victims}
        dead = [p.rank for p in pulses if p.state in hang.GONE and 0 <= p.rank < self.world_size and p.rank not in known]
        if not dead:
            return []
        d = self._death
        if not d.ranks:
            d.first_s = now_s
        (d.ranks if now_s - d.first_s <= TOGETHER_S else d.victims).extend(dead)
        first = self.roll.pulses[d.ranks[0]]
        signals = sorted({self.roll.pulses[r].signal for r in d.ranks} - {0})
        cause = "the process is gone" + (f" (signal {', '.join(map(str, signals))})" if signals else "")
        op = max(first.groups, key=lambda row: row.entered, default=None)
        finding = Finding(
            kind="crash", ranks=tuple(sorted(d.ranks)), step=first.step, since_step=first.step, strength=1.0, cause=cause,
            victims=tuple(sorted(d.victims))[: hang.VICTIMS_MAX], op=hang.name_of(op.op) if op else "", seq=op.entered if op else 0, group=op.key if op else 0,
        )  # fmt: skip
        return [Concluded(v) for v in self.verdicts.window("crash", [Seen(("crash",), finding, stuck=True)], now_s, wall_s)]

    def _hangs(self, now_s: float, wall_s: float) -> list[Concluded | Ask]:
        """Look at where everybody stands, if somebody has stood for long; new pulses make a new window."""
        if not self._fresh and now_s - self._looked_s < 1.0:
            return []
        self._fresh, self._looked_s = False, now_s
        idle = [p for r, p in self.roll.pulses.items() if p.idle_ms >= IDLE_MS and not self.roll.gone(r)]
        if not idle or self._death.ranks:
            self._graph = hang.Graph()
            return [Concluded(v) for v in self.verdicts.window("hang", [], now_s, wall_s)]
        standing = self.roll.standing(now_s, self._step)
        alive = [p for r, p in standing.pulses.items() if not self.roll.gone(r)]
        if alive and all(p.state in hang.STOPPED for p in alive):  # a debugger, or a frozen machine: nobody is to blame
            return []
        findings, self._graph = hang.look(standing)
        due = [f for f in findings if self._overdue(f, standing)]
        told = self.verdicts.window("hang", [Seen(_hang_key(f), f, stuck=True, certain=f.kind != "undecided") for f in due], now_s, wall_s)
        out: list[Concluded | Ask] = [Concluded(v) for v in told]
        out += [ask for v in told if v.state == "confirmed" for ask in self._ask_stacks(v)]
        out += self._ask_pulses(standing, now_s)
        return out

    def _overdue(self, f: Finding, standing: hang.Standing) -> bool:
        """Whether the pause is longer than the job's own."""
        if f.kind in ("crash", "desync"):
            return True
        waited_ms = [row.since_ms for v in f.victims if v in standing.pulses for row in standing.pulses[v].groups if row.entered > row.done]
        waited_ms += [row.p2p_since_ms for v in f.victims if v in standing.pulses for row in standing.pulses[v].groups if row.p2p_open]
        idle_ms = [standing.pulses[r].idle_ms for r in (f.ranks or f.victims) if r in standing.pulses]
        if f.kind == "deadlock":
            return min(idle_ms, default=0) >= 1e3 * self.settings.hang_s
        if f.kind == "undecided":
            idle_ms = [p.idle_ms for p in standing.pulses.values()]
            return min(idle_ms, default=0) >= 1e3 * max(self.settings.hang_s, self.settings.hang_factor * self.patience.pause_s())
        budgets = [self.patience.budget_s(standing.pulses[r], busy=r in standing.busy) for r in (f.ranks or f.victims) if r in standing.pulses]
        budget_ms = 1e3 * max(budgets, default=self.settings.start_s)
        return max(waited_ms, default=0) >= budget_ms and (min(idle_ms, default=0) >= budget_ms or max(waited_ms, default=0) >= 5 * budget_ms)

    # --- asks ---

    def _ask(self, what: str, ranks: tuple[int, ...], other: int = -1, seconds: float = 0.2) -> Ask:
        self._asks += 1
        return Ask(self._asks, what, ranks, other, seconds)

    def _ask_pulses(self, standing: hang.Standing, now_s: float) -> list[Ask]:
        """Tables of ranks that others may wait for, and that move elsewhere."""
        if now_s - self._pulses_asked_s < 1.0:
            return []
        waiting = {row.key for p in standing.pulses.values() for row in p.groups if row.entered > row.done and row.since_ms >= IDLE_MS}
        known = {r for r, p in standing.pulses.items() if p.groups or self.roll.gone(r)}
        lacking = sorted({m for key in waiting for m in standing.members.get(key, ())} - known - standing.stale)
        if not lacking:
            return []
        self._pulses_asked_s = now_s
        return [self._ask("pulses", tuple(lacking[:256]))]

    def _ask_stacks(self, v: report.Verdict) -> list[Ask]:
        if not self.settings.stacks or v.kind not in FATAL | {"input-stall", "checkpoint-stall", "gc-pause"} or v.kind == "crash":
            return []
        if any(owner == v.id for owner, _ in self._asked.values()):
            return []
        ask = self._ask("stacks", (*v.ranks[:2], *v.victims[:1]))
        self._asked[ask.id] = (v.id, self._now_s)
        return [ask]

    def _stacks(self, r: report.Report, now_s: float, wall_s: float) -> list[Concluded | Ask]:
        out: list[Concluded | Ask] = []
        for stack in r.stacks:
            for v in self.verdicts.all():
                if stack.rank in (*v.ranks[:2], *v.victims[:1]) and v.state != "cleared":
                    item = Evidence(signal=f"stack of rank {stack.rank}", value=stack.text, unit=stack.how)
                    out += [Concluded(x) for x in self.verdicts.evidence(v.id, [item], now_s, wall_s)]
        return out

    # --- status ---

    def status(self) -> dict[str, Any]:
        """Plain values for `ckptd status`, metrics and the page."""
        ranks = []
        for r in sorted(self.roll.infos):
            info, pulse = self.roll.infos[r], self.roll.pulses.get(r)
            ranks.append({
                "rank": r, "node": info.node, "host": info.host, "local_rank": info.local_rank, "step": pulse.step if pulse else 0,
                "state": pulse.state if pulse else "", "idle_ms": pulse.idle_ms if pulse else 0,
            })  # fmt: skip
        return {
            "job": self.job, "attempt": self.attempt, "world_size": self.world_size, "step": self._step, "ranks": ranks,
            "counts": {"reports": self.roll.reports, "reports_lost": self.roll.reports_lost},
            "verdicts": [msgspec.to_builtins(v) | {"text": v.text} for v in self.verdicts.all()],
            "waits": self.roll.waits(self._graph.waits()),
        }  # fmt: skip


def _hang_key(f: Finding) -> tuple[str | int, ...]:
    return ("undecided",) if f.kind == "undecided" else ("hang", *f.ranks[:8])
