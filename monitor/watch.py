r"""Steps that all ranks told, watched: roles, phases, stragglers, transfers, the job's pace, losses. Pure.

    Joined ---> phase? ---> left out (its checkpoints are looked at by themselves)
            \-> roles ---> Stragglers, Lasting, Transfers, Pace ---every few steps---> Seen

A *phase* is a step in which a rank evaluated, compiled or saved for longer than it does in every step; it, and the step after it, says nothing about speed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from ckptd.monitor import join, record
from ckptd.monitor.comms import Transfers
from ckptd.monitor.drift import Pace, is_drift
from ckptd.monitor.hang import Patience
from ckptd.monitor.join import CHECKPOINT, COMPILE, DATA, DEVICE, EVAL, SELF, WALL, Joined, Odd, Together, known, median, together
from ckptd.monitor.lasting import Lasting
from ckptd.monitor.loss import Losses
from ckptd.monitor.report import Evidence, Finding
from ckptd.monitor.roles import Roles
from ckptd.monitor.settings import Settings
from ckptd.monitor.standing import Roll
from ckptd.monitor.steps import stride
from ckptd.monitor.straggler import KEPT, TOGETHER_MAX, Stragglers
from ckptd.monitor.verdict import Seen

Array = np.ndarray[Any, Any]

PHASE = 0.02
"""Evaluating or compiling for more than this part of a step makes it a phase."""
SAVING = 0.10
"""Saving for this much longer than usual makes it one."""
EVERY_STEPS = 2
"""Windows are looked at when so many steps are new; of more that come at once, at the last."""
NODE_MIN = 3
"""So many ranks of one node, slow for one reason, are the node's verdict."""
SAVES_KEPT = 4
SAVED = 0.03
"""A rank saves if it takes it so much of a step more than what it does in every step."""
SAVERS_MIN = 3
STARVED = 0.25
"""A node whose tasks wait for processors for this part of the time is short of them."""
UNKNOWN = 0.5
"""A rank of whose last 20 steps less than this is known cannot be judged."""


class Watch:
    """Of one attempt."""

    def __init__(self, world_size: int, settings: Settings, roll: Roll, patience: Patience) -> None:
        self.settings, self.roll, self.patience = settings, roll, patience
        self.join = join.Join(world_size)
        self.roles = Roles(world_size)
        self.stragglers = Stragglers(world_size, settings)
        self.lasting = Lasting(world_size, settings)
        self.transfers = Transfers(settings)
        self.pace = Pace(settings)
        self.losses = Losses()
        self.drifts: set[int] = set()
        self.step = 0
        self.steps_seen = 0
        self.since_look = 0
        self.hot: tuple[int, ...] = ()
        self.global_slow = False
        self.values: Array = np.zeros((len(join.SIGNALS), world_size), np.float32)
        """Of the newest step."""
        self._known_groups = -1
        self._after_phase = False
        self._saving = np.zeros(world_size)
        self._saves: list[Array] = []
        self._odd: dict[int, Odd] = {}

    # --- one step ---

    def take(self, steps: Sequence[Joined]) -> Iterator[tuple[list[Seen], int]]:
        """Fills the windows. Yields what they show when these steps are in them (of very many: now and then), and how many pairs of steps are new; nothing where none is."""
        for i in range(0, len(steps), TOGETHER_MAX):
            self._add(steps[i : i + TOGETHER_MAX])
            pairs, self.since_look = divmod(self.since_look, EVERY_STEPS)
            if pairs:
                yield self.look(), pairs

    def _add(self, steps: Sequence[Joined]) -> None:
        self.step = steps[-1].step
        every = stride(self.stragglers.wall_us) if self.stragglers.wall_us else 1
        at = [i for i, j in enumerate(steps) if j.step % every == 0]  # others were told before their node knew how short steps are
        seen = self.steps_seen + 1 + np.array(at, np.int64)
        self.steps_seen += len(steps)
        if not at:
            return
        t = together([steps[i] for i in at])
        for row in t.values if np.isnan(t.values).any() else t.values[-1:]:
            self.values = np.where(np.isnan(row), self.values, row)
        self._pauses(t)
        t = t.only(~self._left_out(t, seen) & (t.wall_us > 0.0))
        if len(self.roll.members) != self._known_groups:
            self._known_groups = len(self.roll.members)
            self.roles.learn(self.roll.members)
        if len(t):
            for piece in t.pieces(0 if self.roles.known(t.program) else len(t)):
                self._fill(piece)

    def _fill(self, t: Together) -> None:
        """Steps that are no phases; one, if its programs may be new."""
        if self.roles.see(t.program[0]):
            self.stragglers.forget()
        self.stragglers.add(t, self.roles.by_role)
        wall_us = self.stragglers.wall_us
        self.lasting.add(t, wall_us, device=self.stragglers.device)
        self.transfers.add(t, wall_us)
        self.pace.add(t)
        self.since_look += len(t)

    def _pauses(self, t: Together) -> None:
        """What the job's own pauses are: a hang is longer."""
        v = t.values
        most = np.fmax.reduce(v, axis=2)  # of the ranks that told it
        own = np.where(most[:, DEVICE, None] > 0, v[:, WALL], v[:, SELF])
        rest = np.fmax.reduce(own - v[:, CHECKPOINT] - v[:, EVAL] - v[:, COMPILE], axis=1)
        for pause_us in rest[~np.isnan(rest)].tolist():
            self.patience.step(pause_us / 1e6, {})
        longest = np.fmax.reduce(most, axis=0).tolist()
        for kind, signal in ((record.CHECKPOINT, CHECKPOINT), (record.EVAL, EVAL), (record.COMPILE, COMPILE), (record.DATA, DATA)):
            if longest[signal] > 0.0:
                self.patience.phase(kind, longest[signal] / 1e6)

    def _left_out(self, t: Together, seen: Array) -> Array:
        """Which of these steps (the how-manieth that were `seen`) say nothing about speed: warm-up, phases, and the step after one."""
        busy, saves = known(t.values[:, EVAL] + t.values[:, COMPILE]), known(t.values[:, CHECKPOINT])
        left = seen <= self.settings.warmup_steps
        if self._after_phase or self._saving.any() or busy.any() or saves.any():
            count = self.stragglers.count
            for i in np.flatnonzero(~left).tolist():
                left[i] = self._phase(busy[i], saves[i], float(t.wall_us[i]), int(seen[i]), first=count == 0)
                count += not left[i]
        return left

    def _phase(self, busy: Array, saves_us: Array, wall_us: float, seen: int, *, first: bool) -> bool:
        wall = self.stragglers.wall_us or wall_us
        saving = saves_us - self._saving
        saves = bool((saving > SAVING * wall).any()) and not first
        if saves and not self._after_phase:
            self._saves = [*self._saves, saving][-SAVES_KEPT:]
        else:
            self._saving += (saves_us - self._saving) / min(seen, 20)
        phase = saves or bool((busy > PHASE * wall).any())
        left_out = phase or self._after_phase
        self._after_phase = phase
        return left_out and seen > 8

    # --- certain at once ---

    def at_once(self, j: Joined) -> list[Seen]:
        """What one step shows: numbers that are none, and ranks that entered other operations than the others."""
        seen = []
        if (bad := self.losses.add(j)) is not None:
            seen.append(Seen(("nan",), bad, certain=True))
        odd = {o.group: o for o in j.odd}
        for group, o in odd.items():
            before = self._odd.get(group)
            if o.sure or (before is not None and before.ranks == o.ranks):
                seen.append(Seen(("desync", *o.ranks[:4]), self._desync(o, j), certain=True))
                if not o.sure:
                    self.join.accept(o)
        self._odd = odd
        return seen

    def _desync(self, o: Odd, j: Joined) -> Finding:
        if not o.ranks:
            cause = "ranks entered different operations, and no majority says which is right"
        elif o.behind:
            cause = "skipped an operation that the others entered"
        else:
            cause = "entered other operations than the others"
        evidence = (Evidence(signal="operations of the others at the end of the step", value=float(o.seq)),)
        return Finding(
            kind="desync", ranks=o.ranks or o.others[:64], step=j.step, since_step=j.step - 1, strength=1.0 if o.ranks else 0.6, cause=cause, group=o.group, seq=o.seq,
            victims=o.others if o.ranks else (), evidence=evidence,
        )  # fmt: skip

    # --- windows ---

    def look(self) -> list[Seen]:
        """All that the windows show now."""
        seen = self._slow_ranks()
        slow = self.transfers.look(self.join.keys, self.roll.members)
        self.hot = slow.groups if slow else ()
        if slow:
            starved = self._starved(slow.finding)
            seen.append(Seen(("undecided", "slow"), starved) if starved else Seen(("comm",), slow.finding))
        seen += self._saves_stall()
        pace = self.pace.look()
        self.global_slow = pace is not None and not seen
        if pace is not None and not seen:
            unknown = self._unknown()
            seen.append(Seen(("undecided", "slow"), unknown) if unknown else Seen(("global",), pace))
        return seen

    def _slow_ranks(self) -> list[Seen]:
        late = self.stragglers.look()
        self.drifts &= {x.rank for x in late}
        by_node: dict[tuple[int, str], list[Seen]] = {}
        alone: list[Seen] = []
        found = {x.rank: (self._drifting(x.rank, x.finding), x.half) for x in late}
        found |= {rank: (f, False) for rank, f in self.lasting.found.items() if rank not in found}
        for rank, (f, half) in found.items():
            seen = Seen(("slow", rank), f, half=half)
            node = int(self.roll.node_of[rank])
            (by_node.setdefault((node, f.kind), []) if node >= 0 else alone).append(seen)
        for (node, kind), group in by_node.items():
            if len(group) >= NODE_MIN:
                alone.append(Seen(("slow-node", node, kind), _together([s.finding for s in group]), half=all(s.half for s in group)))
            else:
                alone += group
        return alone

    def _drifting(self, rank: int, f: Finding) -> Finding:
        """A slow rank whose slowness grew."""
        if f.kind != "compute-slow":
            return f
        s = self.stragglers
        if rank not in self.drifts and is_drift(s.computing(rank)):
            self.drifts.add(rank)
        if rank not in self.drifts:
            return f
        return Finding(
            kind="drift", ranks=f.ranks, step=f.step, since_step=f.since_step, strength=f.strength, cause="becomes slower and slower", slowdown=f.slowdown,
            evidence=f.evidence,
        )  # fmt: skip

    def _saves_stall(self) -> list[Seen]:
        """A rank whose saves take far longer than those of others that save, again and again. Where one or two save for all, there is nobody to compare them with."""
        if len(self._saves) < 3:
            return []
        last = np.array(self._saves[-3:])
        saves = last.min(axis=0) > SAVED * max(self.stragglers.wall_us, 1.0)
        if np.count_nonzero(saves) < SAVERS_MIN:
            return []
        last = np.log(np.where(saves, last, np.nan))
        over = last - median(last, axis=1)[:, None]
        spread = 1.4826 * float(median(np.abs(over).ravel()))
        slow = np.flatnonzero(saves & (np.nan_to_num(over, nan=-1.0).min(axis=0) > max(np.log(2.0), 3.0 * spread)))
        least, usual = np.exp(last.min(axis=0)), float(np.exp(median(last, axis=1)).min())
        if not len(slow) or len(slow) > self.stragglers.size // 4:
            return []
        evidence = (Evidence(signal="time in saving", value=float(least[slow].max()), baseline=usual, unit="us"),)
        f = Finding(
            kind="checkpoint-stall", ranks=tuple(int(r) for r in slow), step=self.step, since_step=self.step, strength=1.0, cause="its saves take longer than the others'",
            evidence=evidence,
        )  # fmt: skip
        return [Seen(("saves",), f)]

    def _starved(self, f: Finding) -> Finding | None:
        """Transfers within one node are slow while its processors are short: they are what moves the bytes there, and nothing is to be said of links."""
        nodes = {int(self.roll.node_of[r]) for r in f.victims}
        told = self.roll.health.get(nodes.pop()) if len(nodes) == 1 and not self.stragglers.device else None
        short = told.values.get("psi_cpu_some_ratio", 0.0) if told is not None else 0.0
        if short < STARVED:
            return None
        evidence = (*f.evidence, Evidence(signal="part of the time that somebody waited for a processor", value=round(short, 2)))
        return Finding(
            kind="undecided", ranks=(), step=f.step, since_step=f.since_step, strength=0.5, cause="transfers within a node are slow, and its processors are short",
            group=f.group, slowdown=f.slowdown, victims=f.victims, evidence=evidence,
        )  # fmt: skip

    def _unknown(self) -> Finding | None:
        """The job is slow, and of some ranks too little is known to say that it is not they."""
        s = self.stragglers
        n = min(s.count, 20)
        known = s.good[np.arange(s.count - n, s.count) % KEPT].mean(axis=0)
        dark = np.flatnonzero(known < UNKNOWN)
        if not len(dark):
            return None
        evidence = (Evidence(signal="ranks of which too much was lost", value=" ".join(map(str, dark[:32]))),)
        return Finding(
            kind="undecided", ranks=(), step=self.step, since_step=self.step, strength=0.5, cause="the job is slow, and of some ranks too much was lost", evidence=evidence,
        )  # fmt: skip


def _together(findings: list[Finding]) -> Finding:
    """Several ranks of one node as one finding."""
    worst = max(findings, key=lambda f: f.slowdown)
    return Finding(
        kind=worst.kind, ranks=tuple(sorted(r for f in findings for r in f.ranks)), step=worst.step, since_step=min(f.since_step for f in findings),
        strength=worst.strength, cause=f"{worst.cause}: {len(findings)} ranks of the node", slowdown=worst.slowdown, evidence=worst.evidence,
    )  # fmt: skip
