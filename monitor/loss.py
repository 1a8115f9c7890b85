"""Numbers that are none: the first rank and step whose loss or gradient norm is NaN or infinite. Pure.

A gradient that is reduced makes everybody's norm a NaN in the same step; the loss of the rank where it began is one already. So a loss counts before a norm, and
where most ranks have it at once nobody is named.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ckptd.monitor import record
from ckptd.monitor.join import Joined
from ckptd.monitor.report import Evidence, Finding


class Losses:
    """Of one attempt."""

    def __init__(self) -> None:
        self.first: Finding | None = None

    def add(self, j: Joined) -> Finding | None:
        """A finding while there are such numbers: of the first of them, told again with the newest step."""
        if not j.bad.any():
            self.first = None
            return None
        if self.first is None:
            self.first = self._finding(j)
        f = self.first
        return Finding(
            kind=f.kind, ranks=f.ranks, step=j.step, since_step=f.since_step, strength=f.strength, cause=f.cause, victims=f.victims, evidence=f.evidence,
        )  # fmt: skip

    @staticmethod
    def _finding(j: Joined) -> Finding:
        losses = np.flatnonzero(j.bad & record.BAD_LOSS)
        norms = np.flatnonzero(j.bad & record.BAD_GRAD)
        what, ranks = ("loss", losses) if len(losses) else ("gradient norm", norms)
        told = int(np.count_nonzero(j.present))
        most = len(ranks) > max(1, told // 2)
        named: tuple[int, ...] = () if most else _ints(ranks)
        cause = f"the {what} of {len(ranks)} of {told} ranks is no number" if most else f"the {what} is no number"
        evidence = (Evidence(signal="ranks with such a loss", value=float(len(losses))), Evidence(signal="with such a gradient norm", value=float(len(norms))))
        return Finding(
            kind="nan", ranks=named, step=j.step, since_step=j.step, strength=1.0, cause=cause, victims=_ints(norms)[:64] if not most else (), evidence=evidence,
        )  # fmt: skip


def _ints(values: Any) -> tuple[int, ...]:
    return tuple(int(v) for v in values)
