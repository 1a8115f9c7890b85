"""Ranks that were slow before anybody looked: compared with those of the same program, not with their own past. Pure; constant memory.

    own parts of the first steps ---> each step's excess over the ranks that run the same program ---> median and steadiness over 16 steps ---> Lasting.found

`straggler.py` takes what a rank cost from the start for the job's own unevenness, which in small it mostly is. A node whose processor is throttled, whose data
come slowly or that somebody else uses is slow from the first step on, and by much.

A rank is found if the median of its excess is over max(10 % of a step, 5 times the spread of all ranks about their peers), and it is over half of that in 13 of 16 steps.
A peer is a rank whose steps are the same sequence of operations. Of only two the slower one has to be slower by twice as much, and so has rank 0, which logs and prints
for all. What counts is computing, waiting for data and waiting for a processor: one rank that saves for all is how jobs are written. What is not there in the first
40 steps is `straggler.py`'s to find: looked for again and again, noise would be found.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ckptd.monitor import join
from ckptd.monitor.join import Together, known, median
from ckptd.monitor.report import Evidence, Finding
from ckptd.monitor.settings import Settings
from ckptd.monitor.straggler import BESIDE, CAUSES, COMPUTE, DATA, KINDS, PROCESSOR, own_parts

Array = np.ndarray[Any, Any]

WINDOW = 16
STEADY = 13
EVERY = 8
EARLY = 40
"""Steps of a job (or after ranks began to run other programs) in which a rank may be found."""
COUNTED = (COMPUTE, DATA, PROCESSOR)
SPREADS = 5.0
HOLDS = 0.7
"""What was found is found as long as it is over this part of the bound."""


class Lasting:
    """Of one attempt. `found`: ranks and what is to be said of each."""

    def __init__(self, world_size: int, settings: Settings) -> None:
        self.size, self.settings = world_size, settings
        self.found: dict[int, Finding] = {}
        self._parts = np.full((WINDOW, len(COUNTED), world_size), np.nan, np.float32)
        self._count = 0
        self._program: Array | None = None
        self._like = np.zeros(world_size, np.int64)
        """The same number: the same program."""
        self._alike = 0
        """Steps since that changed."""
        self._first = 0
        """The first of them."""

    def add(self, t: Together, wall_us: float, *, device: bool) -> None:
        """Steps that are no phases. On a device, who stands least in collectives is late."""
        if not wall_us > 0.0 or (self._over() and bool((t.program == self._program).all())):
            return
        parts = own_parts(t.values)
        for i, step in enumerate(t.steps.tolist()):
            if self._same(t.program[i]) and not self._over():
                self._add(step, parts[i], t.values[i, join.DEVICE] if device else None, wall_us)

    def _over(self) -> bool:
        """Whether there is nothing to be found any more, unless programs change."""
        return self._program is not None and self._alike >= EARLY and not self.found

    def _add(self, step: int, parts: Array, device: Array | None, wall_us: float) -> None:
        row = self._parts[self._count % WINDOW]
        row[:] = parts[list(COUNTED)]
        if device is not None:
            row[0] = -device
        self._first = self._first if self._alike else step
        self._count += 1
        self._alike += 1
        if self._alike >= WINDOW and self._alike % EVERY == 0:
            self._look(step, wall_us, device=device is not None)

    def _same(self, program: Array) -> bool:
        """Whether all programs are known; follows which ranks run the same one."""
        if self._program is not None and np.array_equal(program, self._program):
            return True
        if program.min(initial=0) < 0:
            return False
        self._program = program.copy()
        _, first, inverse = np.unique(program, return_index=True, return_inverse=True)
        like = first[inverse]
        if not np.array_equal(like, self._like):
            self._like, self._alike, self.found = like, 0, {}
        return True

    def _look(self, step: int, wall_us: float, *, device: bool) -> None:
        rows = self._parts / wall_us
        over = np.zeros_like(rows)
        peers = np.zeros(self.size, np.int64)
        for label in np.unique(self._like):
            ranks = np.flatnonzero(self._like == label)
            peers[ranks] = len(ranks) - 1
            if len(ranks) > 1:
                mine = rows[:, :, ranks]
                over[:, :, ranks] = mine - (mine[:, :, ::-1] if len(ranks) == 2 else median(mine, axis=2)[:, :, None])
        over = known(over)
        if device:  # who waits for data or a processor stands less in collectives because of it: that is not to be counted twice
            over[:, 0] -= np.maximum(over[:, 1:], 0.0).sum(axis=1)
        costs = over.sum(axis=1)
        cost = median(costs, axis=0)
        spread = 1.4826 * float(median(np.abs(cost[peers > 1]))) if np.any(peers > 1) else 0.0  # of all: a few peers say little of it
        twice = (peers == 1) | (np.arange(self.size) == 0)
        bound = np.maximum(self.settings.lasting * np.where(twice, 2.0, 1.0), SPREADS * spread)
        held = np.isin(np.arange(self.size), [*self.found])
        late = held & (cost > HOLDS * bound)
        if self._alike <= EARLY:
            late |= (cost > bound) & ((costs > 0.5 * bound).sum(axis=0) >= STEADY)
        late &= cost >= BESIDE * float(cost.max())
        parts = median(over, axis=0)
        self.found = {r: self._finding(r, step, parts[:, r], float(cost[r]), wall_us) for r in np.flatnonzero(late).tolist()}

    def _finding(self, rank: int, step: int, parts: Array, cost: float, wall_us: float) -> Finding:
        which = COUNTED[int(np.argmax(parts))]
        evidence = (Evidence(signal="excess over the ranks with the same program, median of steps", value=round(cost * wall_us), unit="us", baseline=round(wall_us)),)
        return Finding(
            kind=KINDS[which], ranks=(rank,), step=step, since_step=self._first, strength=min(1.0, cost / (2.0 * self.settings.lasting)),
            cause=f"{CAUSES[which]}, from the first steps on", slowdown=cost, evidence=evidence,
        )  # fmt: skip
