"""The ladder: in which order a restore tries steps and sources.

Nodes say what they hold, the durable tier says what it has; `rungs` orders every step that is complete somewhere. Attempts are
compared before steps: what a later attempt committed outranks a higher step of an attempt that was given up (a zombie's, or a branch
that the job left when it went back to an older checkpoint). Within one step memory comes before storage. Steps that failed to
restore come last: they are tried again only when nothing else is left, for a passing reason (a store that was slow) must not turn the
next restart into a silent fresh start.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

import msgspec

Key = tuple[int, int]
"""(attempt, step)"""


class Holding(msgspec.Struct, frozen=True, array_like=True):
    """A node holds the sealed images of `ranks` of one snapshot."""

    attempt: int
    step: int
    world_size: int
    ranks: tuple[int, ...]
    state: str = "sealed"


class Durable(msgspec.Struct, frozen=True, array_like=True):
    """The durable tier has a checkpoint with a readable manifest."""

    attempt: int
    step: int
    world_size: int
    directory: str


class Rung(msgspec.Struct, frozen=True):
    """One thing to try. `nodes`: image rank -> the node that holds it in memory; or `directory` in the durable tier."""

    attempt: int
    step: int
    world_size: int
    nodes: dict[int, int] = {}
    directory: str = ""

    @property
    def key(self) -> Key:
        """(attempt, step)"""
        return self.attempt, self.step

    @property
    def source(self) -> str:
        """"memory" or the durable directory, for people."""
        return self.directory or "memory"


def rungs(held: Mapping[int, Iterable[Holding]], durable: Iterable[Durable], failed: Collection[tuple[int, int, str]] = ()) -> list[Rung]:
    """All complete snapshots, best first. `held`: by node. `failed`: (attempt, step, source) that failed to restore before."""
    images: dict[tuple[int, int, int], dict[int, int]] = {}
    for node, holdings in sorted(held.items()):
        for h in holdings:
            for rank in h.ranks:
                images.setdefault((h.attempt, h.step, h.world_size), {}).setdefault(rank, node)
    found = [
        Rung(attempt, step, world_size, nodes=nodes)
        for (attempt, step, world_size), nodes in images.items()
        if set(nodes) == set(range(world_size))
    ]
    found += [Rung(d.attempt, d.step, d.world_size, directory=d.directory) for d in durable]
    return sorted(found, key=lambda r: ((r.attempt, r.step, r.source) in failed, -r.attempt, -r.step, r.directory))


def incomplete(held: Mapping[int, Iterable[Holding]]) -> list[tuple[int, int, list[int]]]:
    """(attempt, step, missing ranks) of the snapshots in memory that lack images, newest first: for error texts."""
    images: dict[tuple[int, int, int], set[int]] = {}
    for holdings in held.values():
        for h in holdings:
            images.setdefault((h.attempt, h.step, h.world_size), set()).update(h.ranks)
    lacking = [(a, s, sorted(set(range(w)) - have)) for (a, s, w), have in images.items() if have != set(range(w))]
    return sorted(lacking, reverse=True)
