r"""The short window's baseline and noise: what a rank's middle of 10 steps usually is, and how far it strays without a fault. Pure; constant memory.

The *middle* of steps is their mean, each no farther from their median than two standard deviations: a spike counts as little as in a median, and noise less.

    scatter within blocks of 10 -----> of a step --------\
    blocks that lie behind ---------> memory, all ranks ---> variance of a middle against its baseline
                            \-------> own ----------------/

A rank that becomes slow must not hide in what it adds to its noise: it widens one block of six, and blocks are learned from when they lie behind. How much more
blocks vary than steps alone would have them, because noise has a memory, is learned from all ranks at once: of a few blocks one rank says little.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ckptd.monitor.join import median

Array = np.ndarray[Any, Any]

BLOCK = 10
KEPT = 12
"""Blocks whose middles are kept until they lie behind."""
SPREAD = 6
"""Blocks from whose scatter the noise of a step is learned."""
OF_MIDDLE = 1.1
"""The variance of a middle, as a multiple of a mean's (of normal values)."""
SMALL = 1.1
"""The median distance of 10 normal values is so much too small."""
MEDIAN_OF_SQUARE = 0.455
"""Of a normal value, as a part of its variance."""
OWN = 5
"""So many blocks of a rank say something of their variance."""
FEW = 16.0
"""So many ranks teach of memory what one rank would need as many blocks for; of few, what all started with counts for longer."""
MEMORY_MAX = 9.0


class Middles:
    """Of all ranks; parts of a step."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.base = np.zeros(size)
        """The baseline: the mean of the middles of `n` blocks."""
        self.n = np.zeros(size)
        self.step_var = np.zeros(size)
        """Of a step, by the median distance."""
        self.own_var = np.zeros(size)
        """Of middles, as a rank's own blocks have it."""
        self.memory = 1.0
        """Variance of middles, as a multiple of what it is where every step is for itself."""
        self._blocks = np.zeros((KEPT, size))
        self._learned = 0

    def begin(self, steps: Array, step_var: Array) -> None:
        """The first steps (steps x ranks), and what is known of their noise."""
        self.base = median(steps, axis=0)
        self.n = np.full(self.size, len(steps) / BLOCK)
        self.step_var = step_var
        self._learned = len(steps) // BLOCK

    def add(self, steps: Array, count: int, behind: int, flagged: Array) -> None:
        """One more block: the newest of these steps (whole blocks x ranks; `count`: of all steps). `behind`: the steps that lie behind; `flagged` ranks teach nothing."""
        blocks = steps.reshape(-1, BLOCK, self.size)
        spread = (SMALL * 1.4826 * median(median(np.abs(blocks - median(blocks, axis=1)[:, None]), axis=1), axis=0)) ** 2
        self.step_var = np.where(flagged, self.step_var, spread)
        self._blocks[(count // BLOCK - 1) % KEPT] = self.of(blocks[-1])
        while BLOCK * (self._learned + 1) <= behind:
            off = self._blocks[self._learned % KEPT] - self.base
            alone = np.maximum(self._alone(), 1e-12)
            now = float(median(off**2 / alone)) / MEDIAN_OF_SQUARE
            self.memory += (min(now, MEMORY_MAX) - self.memory) / min(self._learned + 1.0 + FEW / self.size, 20.0)
            self.n += ~flagged
            weight = np.where(flagged, 0.0, 1.0 / np.clip(self.n, 1.0, 50.0))
            self.own_var += weight * (off**2 - self.own_var)
            self.base += weight * off
            self._learned += 1

    def _alone(self) -> Array:
        """Variance of a middle against its baseline, if every step is for itself."""
        return np.asarray(OF_MIDDLE * self.step_var / BLOCK * self._with_base())

    def _with_base(self) -> Array:
        return np.asarray(1.0 + 1.0 / np.maximum(self.n, 1.0))

    def of(self, steps: Array) -> Array:
        """The middle of steps x ranks."""
        center, wide = median(steps, axis=0), 2.0 * np.sqrt(self.step_var)
        return np.asarray(np.clip(steps, center - wide, center + wide).mean(axis=0))

    def error(self) -> Array:
        """Standard error of a middle against its baseline, by rank."""
        own = np.where(self.n >= OWN, self.own_var, 0.0) * self._with_base()
        return np.asarray(np.sqrt(np.maximum(self._alone() * max(1.0, self.memory), own)))
