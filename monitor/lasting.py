"""Ranks that were slow before anybody looked: compared with those of the same program, not with their own past. Pure; constant memory.

    own parts of a step ---> medians of the last 16 steps ---> excess over the ranks that run the same program ---> Lasting.found, every 8 steps

`straggler.py` takes what a rank cost from the start for the job's own unevenness, which in small it mostly is. A node whose processor is throttled, whose data
come slowly or that somebody else uses is slow from the first step on, and by much.

A rank is found if its excess is over max(10 % of a step, 5 times the spread of all ranks about their peers), where a peer is a rank whose steps are the same sequence
of operations. Of only two the slower one has to be slower by twice as much, and so has rank 0, which logs and prints for all. What counts is computing, waiting for
data and waiting for a processor: one rank that saves for all is how jobs are written. Medians over steps: what happens now and then is no lasting slowness.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ckptd.monitor import join
from ckptd.monitor.join import Joined, known, median
from ckptd.monitor.report import Evidence, Finding
from ckptd.monitor.settings import Settings
from ckptd.monitor.straggler import BESIDE, CAUSES, COMPUTE, DATA, KINDS, PROCESSOR

Array = np.ndarray[Any, Any]

WINDOW = 16
EVERY = 8
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
        self._first = 0
        self._count = 0
        self._program: Array | None = None
        self._like = np.zeros(world_size, np.int64)
        """The same number: the same program."""
        self._alike = 0
        """Steps since that changed."""
        self._since: dict[int, int] = {}

    def add(self, j: Joined, parts: Array, wall_us: float, *, device: bool) -> None:
        """A step that is no phase. `parts`: straggler.PARTS x R, microseconds; on a device, who stands least in collectives is late."""
        if not wall_us > 0.0 or not self._same(j.program):
            return
        row = self._parts[self._count % WINDOW]
        row[:] = parts[list(COUNTED)]
        if device:
            row[0] = -j.values[join.DEVICE]
        self._first = self._first or j.step
        self._count += 1
        self._alike += 1
        if self._alike >= WINDOW and self._count % EVERY == 0:
            self._look(j.step, wall_us, device=device)

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
        middle = known(median(self._parts, axis=0)) / wall_us
        over = np.zeros_like(middle)
        peers = np.zeros(self.size, np.int64)
        for label in np.unique(self._like):
            ranks = np.flatnonzero(self._like == label)
            peers[ranks] = len(ranks) - 1
            if len(ranks) > 1:
                mine = middle[:, ranks]
                over[:, ranks] = mine - (mine[:, ::-1] if len(ranks) == 2 else median(mine, axis=1)[:, None])
        if device:  # who waits for data or a processor stands less in collectives because of it: that is not to be counted twice
            over[0] -= np.maximum(over[1:], 0.0).sum(axis=0)
        cost = over.sum(axis=0)
        spread = 1.4826 * float(median(np.abs(cost[peers > 1]))) if np.any(peers > 1) else 0.0  # of all: a few peers say little of it
        twice = (peers == 1) | (np.arange(self.size) == 0)
        bound = np.maximum(self.settings.lasting * np.where(twice, 2.0, 1.0), SPREADS * spread)
        held = np.isin(np.arange(self.size), [*self.found])
        late = cost > np.where(held, HOLDS, 1.0) * bound
        late &= cost >= BESIDE * float(cost.max())
        self._since = {r: self._since.get(r, max(self._first, step - WINDOW)) for r in np.flatnonzero(late).tolist()}
        self.found = {r: self._finding(r, step, over[:, r], wall_us) for r in self._since}

    def _finding(self, rank: int, step: int, over: Array, wall_us: float) -> Finding:
        which, cost = COUNTED[int(np.argmax(over))], float(over.sum())
        since = self._since[rank]
        began = ", from the first steps on" if since <= self._first + WINDOW else ""
        evidence = (Evidence(signal="excess over the ranks with the same program, median of steps", value=round(cost * wall_us), unit="us", baseline=round(wall_us)),)
        return Finding(
            kind=KINDS[which], ranks=(rank,), step=step, since_step=since, strength=min(1.0, cost / (2.0 * self.settings.lasting)), cause=CAUSES[which] + began,
            slowdown=cost, evidence=evidence,
        )  # fmt: skip
