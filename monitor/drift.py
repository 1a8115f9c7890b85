"""What changes for everybody, and what changes slowly. Pure; constant memory.

- `Pace`: the whole job's step time against its past. A change point is found where the mean of the last steps lies beyond what the past says of such means. A new
  program (another batch, another sequence length, another phase) is a new past, not an alarm.
- `is_drift`: whether a rank's excess grew steadily rather than at once: of the lines and steps that could be drawn through it, a line leaves less.

Sources: monitoring.md 4.5 (3); Greyhound's verification of a shift (2.3, step 4).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ckptd.monitor.join import Together, median
from ckptd.monitor.report import Evidence, Finding
from ckptd.monitor.settings import Settings

Array = np.ndarray[Any, Any]

KEPT = 512
WINDOW = 40
FAST, FAST_SLOW = 12, 0.2
"""A change by so much is said after so few steps."""
PAST_MIN = 60
DRIFT_MIN = 30
SURE = 8.0
"""A line has to leave less than a step by so many times the variance that it leaves: where noise is large, one or the other fits better by chance."""


class Pace:
    """Step times of the job, phases left out."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.log = np.zeros(KEPT)
        """Of the median rank's microseconds, by step."""
        self.steps = np.zeros(KEPT, np.int64)
        self.count = 0
        self.begun = 0
        self._program = -2
        self._other = 0
        self.level_us = 0.0
        self.slow_since = 0

    def add(self, t: Together) -> None:
        """Steps that are no phases."""
        k = np.arange(self.count, self.count + len(t)) % KEPT
        self.log[k], self.steps[k] = np.log(np.maximum(t.wall_us, 1.0)), t.steps
        for program in _most(t.program, t.present):
            self._see(program)

    def _see(self, program: int) -> None:
        """One more step, with this program."""
        self.count += 1
        if program == self._program or program < 0:
            self._other = 0
            return
        self._other += 1
        if self._program == -2 or self._other >= WINDOW // 4:  # not one step of another kind: another kind of steps
            self._program, self._other, self.begun = program, 0, self.count - 1
            self.level_us = 0.0

    def look(self) -> Finding | None:
        """All ranks are slower than they were."""
        return self._look(WINDOW, self.settings.global_slow) or self._look(FAST, max(FAST_SLOW, self.settings.global_slow))

    def _look(self, window: int, least: float) -> Finding | None:
        n, size = min(self.count - self.begun, KEPT), min(20, window)
        if n < max(PAST_MIN // 2, 3 * size) + window:
            return None
        at = np.arange(self.count - n, self.count) % KEPT
        past, now = self.log[at[:-window]], self.log[at[-window:]]
        before = float(median(past)) if not self.level_us else float(np.log(self.level_us))
        shift, least = float(median(now)) - before, float(np.log1p(least))
        bound = max(least, 6.0 * self._noise(past, size)) if shift >= least / 2 else least
        if shift < bound or float(np.mean(now > before + 0.5 * bound)) < 0.9:
            if shift < bound / 2 and window == WINDOW:
                self.level_us = 0.0
            return None
        if not self.level_us:
            self.level_us = float(np.exp(before))
            self.slow_since = int(self.steps[at[-window]])
        evidence = (Evidence(signal="step", value=round(float(np.exp(median(now)))), unit="us", baseline=round(float(np.exp(before)))),)
        return Finding(
            kind="global-slow", ranks=(), step=int(self.steps[at[-1]]), since_step=self.slow_since, strength=min(1.0, shift / (2 * bound)),
            cause="all ranks are slower than they were", slowdown=float(np.expm1(shift)), evidence=evidence,
        )  # fmt: skip

    @staticmethod
    def _noise(past: Array, size: int) -> float:
        """How far medians of so many steps stray."""
        blocks = past[len(past) % size :].reshape(-1, size)
        middle = float(median(past))
        spread = 1.4826 * float(median(np.abs(past - middle)))
        return max(1.4826 * float(median(np.abs(median(blocks, axis=1) - middle))), 1.25 * spread / float(np.sqrt(size)))


def _most(program: Array, present: Array) -> list[int]:
    """The program of most ranks, by step; -1: nobody's is known."""
    first = int(program[0, 0])
    if (program == first).all():
        return [first] * len(program)
    rows = [row[here] for row, here in zip(program, present, strict=True)]
    return [int(np.bincount(row + 1).argmax()) - 1 if len(row) else -1 for row in rows]


def is_drift(excess: Array) -> bool:
    """Whether a rank's excess (one value per step, oldest first) grew steadily: a line from zero fits better than a step from zero, by a margin."""
    n = len(excess)
    if n < DRIFT_MIN:
        return False
    smooth = np.clip(excess, *np.percentile(excess, [2.0, 98.0]))
    sums = np.cumsum(smooth[::-1])[::-1]
    sizes = np.arange(n, 0, -1)
    gains = sums**2 / sizes  # of a step that begins at i
    step = float((smooth**2).sum() - gains[: n - 5].max())
    line = min(_ramp(smooth, i) for i in range(0, n - DRIFT_MIN + 1, max(1, n // 16)))
    by_noise = n * (step - line) < SURE * line
    return not by_noise and (line < 0.9 * step or (line < 0.97 * step and _late_half_grows(smooth)))


def _ramp(y: Array, start: int) -> float:
    """What is left of y after a line that leaves zero at `start`."""
    x = np.maximum(np.arange(len(y)) - start, 0.0)
    slope = float(x @ y) / max(float(x @ x), 1e-9)
    return float(((y - slope * x) ** 2).sum()) if slope > 0 else float((y**2).sum())


def _late_half_grows(y: Array) -> bool:
    third = len(y) // 3
    a, b, c = y[:third].mean(), y[third : 2 * third].mean(), y[2 * third :].mean()
    return bool(0 <= a < b < c and c - b > 0.3 * (c - a) and b - a > 0.2 * (c - a))
