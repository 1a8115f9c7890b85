"""Summaries as ranks would tell them, for tests of what is made of them."""

from __future__ import annotations

import numpy as np

from ckptd.monitor.join import Join
from ckptd.monitor.report import GroupStep, StepSummary

MS = 1000
WORLD = 1


def summary(rank, step, *, wall=100 * MS, own=80 * MS, seq=None, history=0, inside=20 * MS, program=7, **more):
    groups = [] if seq is None else [GroupStep(WORLD, seq, history, 4, 1 << 20, inside, inside)]
    return StepSummary(rank, step, step * 10**8, wall, own, program=program, groups=groups, **more)


def joined(steps, size, of):
    """What Join makes of `of(rank, step)`."""
    table = Join(size)
    out = []
    for step in range(1, steps + 1):
        table.add([of(r, step) for r in range(size)], float(step))
        out += table.ready(float(step))
    return table, out


def noisy(seed, size, steps, spread=0.02):
    rng = np.random.default_rng(seed)
    return np.exp(rng.normal(0, spread, (steps + 1, size)))
