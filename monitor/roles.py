"""Which ranks do the same work, so that one can be compared with the others. Pure.

Equal programs (sequence of operations with their sizes) are equal work. Where that leaves a rank with too few peers (each batch of another length; two copies of a
pipeline's stage), the same sizes of groups have to do: what differs within such a role from the start is in the baselines.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ckptd.monitor.straggler import ROLE_MIN

Array = np.ndarray[Any, Any]

STEADY = 3
"""Steps for which new programs have to last until roles follow them."""


class Roles:
    """Roles of an attempt. `by_role`: indices of ranks, each rank in one."""

    def __init__(self, world_size: int) -> None:
        self.size = world_size
        self.by_role: list[Array] = [np.arange(world_size)]
        self.of = np.zeros(world_size, np.int64)
        self._program: Array | None = None
        self._since = 0
        self._structure = np.zeros(world_size, np.int64)

    def learn(self, members: Mapping[int, Sequence[int]]) -> None:
        """Sizes of the groups that each rank is in."""
        sizes: list[list[int]] = [[] for _ in range(self.size)]
        for ranks in members.values():
            for r in ranks:
                if r < self.size:
                    sizes[r].append(len(ranks))
        _, self._structure = np.unique(np.array([hash(tuple(sorted(s))) for s in sizes], np.int64), return_inverse=True)
        self._program = None

    def known(self, programs: Array) -> bool:
        """Whether these are, step after step (K x R), the programs that roles follow."""
        return self._program is not None and bool((programs == self._program).all())

    def see(self, program: Array) -> bool:
        """Programs of a step. True if roles changed."""
        if self._program is not None and (np.any(program < 0) or np.array_equal(program, self._program)):
            self._since = 0
            return False
        self._since += 1
        if self._program is not None and self._since < STEADY:
            return False
        self._program, self._since = program.copy(), 0
        _, counts = np.unique(program, return_counts=True)
        labels = _by_first(self._structure if counts.min() < ROLE_MIN else program)
        if np.array_equal(labels, self.of):
            return False
        self.of = labels
        self.by_role = [np.flatnonzero(labels == label) for label in np.unique(labels)]
        return True

    def peers(self, rank: int, node_of: Array, most: int) -> tuple[int, ...]:
        """Some of a rank's peers, those of other nodes first, spread over them."""
        others = [int(r) for r in np.flatnonzero(self.of == self.of[rank]) if r != rank] or [r for r in range(self.size) if r != rank]
        far = [r for r in others if node_of[r] != node_of[rank]]
        near = [r for r in others if node_of[r] == node_of[rank]]
        spread = far[:: max(1, len(far) // most)] if far else []
        return tuple((spread + near)[:most])


def _by_first(labels: Array) -> Array:
    """The same partition, its parts numbered by their first rank: partitions are equal if these are."""
    _, first, inverse = np.unique(labels, return_index=True, return_inverse=True)
    return np.asarray(first[inverse])
