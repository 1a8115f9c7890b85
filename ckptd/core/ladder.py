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

from ckptd.core.stripes import Member

Key = tuple[int, int]
"""(attempt, step)"""
Key3 = tuple[int, int, int]
"""(attempt, step, world size)"""
Group = tuple[int, tuple[Member, ...]]
"""Parity and members: what tells two groups of one snapshot apart."""


class Fragment(msgspec.Struct, frozen=True, array_like=True):
    """The parity that the member at `position` of a group holds of one snapshot."""

    world_size: int
    parity: int
    position: int
    members: tuple[Member, ...]


class Holding(msgspec.Struct, frozen=True, array_like=True):
    """A node holds the sealed images of `ranks` of one snapshot, and fragments."""

    attempt: int
    step: int
    world_size: int
    ranks: tuple[int, ...]
    state: str = "sealed"
    fragments: tuple[Fragment, ...] = ()


class Durable(msgspec.Struct, frozen=True, array_like=True):
    """The durable tier has a checkpoint with a readable manifest."""

    attempt: int
    step: int
    world_size: int
    directory: str


class Remains(msgspec.Struct, frozen=True, array_like=True):
    """A group of which members are lost, and who holds what is left of it: from that their images are decoded."""

    parity: int
    members: tuple[Member, ...]
    images: dict[int, int]
    """rank -> node, of the members' images that are left."""
    fragments: dict[int, int]
    """position -> node, of the fragments that are left."""

    @property
    def lost(self) -> list[int]:
        """Positions of which anything is missing."""
        return [
            p for p, m in enumerate(self.members) if p not in self.fragments or any(rank not in self.images for rank, _ in m.images)
        ]


class Rung(msgspec.Struct, frozen=True):
    """One thing to try. `nodes`: image rank -> the node that holds it in memory; or `directory` in the durable tier."""

    attempt: int
    step: int
    world_size: int
    nodes: dict[int, int] = {}
    directory: str = ""
    remains: list[Remains] = []
    """Groups from which the ranks that are not in `nodes` are decoded."""

    def remains_of(self, rank: int) -> Remains | None:
        """The group from which a rank's image is to be decoded."""
        return next((r for r in self.remains if any(rank == held for m in r.members for held, _ in m.images)), None)

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
    images, groups = _gathered(held)
    found = []
    for key in {*images, *groups}:
        rung = _rung(key, images.get(key, {}), groups.get(key, {}))
        found += [rung] if rung is not None else []
    found += [Rung(d.attempt, d.step, d.world_size, directory=d.directory) for d in durable]
    return sorted(found, key=lambda r: ((r.attempt, r.step, r.source) in failed, -r.attempt, -r.step, r.directory))


def _gathered(held: Mapping[int, Iterable[Holding]]) -> tuple[dict[Key3, dict[int, int]], dict[Key3, dict[Group, dict[int, int]]]]:
    """By snapshot: rank -> node, and group -> position -> node; the lowest node wins."""
    images: dict[Key3, dict[int, int]] = {}
    groups: dict[Key3, dict[Group, dict[int, int]]] = {}
    for node, holdings in sorted(held.items()):
        for h in holdings:
            key = h.attempt, h.step, h.world_size
            for rank in h.ranks:
                images.setdefault(key, {}).setdefault(rank, node)
            for f in h.fragments:
                groups.setdefault(key, {}).setdefault((f.parity, f.members), {}).setdefault(f.position, node)
    return images, groups


def _rung(key: Key3, nodes: dict[int, int], groups: Mapping[Group, dict[int, int]]) -> Rung | None:
    """A snapshot in memory, if every image is held or can be decoded."""
    attempt, step, world_size = key
    missing = {*range(world_size)} - {*nodes}
    remains = []
    for (parity, members), fragments in groups.items():
        ranks = {rank for m in members for rank, _ in m.images}
        if ranks & missing:
            left = Remains(parity, members, {r: n for r, n in nodes.items() if r in ranks}, fragments)
            if len(left.lost) <= parity:
                remains.append(left)
                missing -= ranks
    return None if missing or not {*nodes} <= {*range(world_size)} else Rung(attempt, step, world_size, nodes, remains=remains)


def guarded(held: Mapping[int, Iterable[Holding]]) -> Key | None:
    """The newest snapshot all of whose images are under the parity of groups that have not lost more than they may."""
    found = []
    images, groups = _gathered(held)
    for (attempt, step, world_size), each in groups.items():
        nodes = images.get((attempt, step, world_size), {})
        left = [Remains(parity, members, nodes, fragments) for (parity, members), fragments in each.items()]
        covered = {rank for r in left if len(r.lost) <= r.parity for m in r.members for rank, _ in m.images}
        if covered >= {*range(world_size)}:
            found.append((attempt, step))
    return max(found, default=None)


def lost(held: Mapping[int, Iterable[Holding]]) -> list[tuple[Key, list[int]]]:
    """Snapshots that a restart was promised, and that cannot be had from memory any more: which, and whose images are neither held nor decodable; newest first."""
    images, groups = _gathered(held)
    promised = {(h.attempt, h.step, h.world_size) for holdings in held.values() for h in holdings if h.state == "committed"}
    gone = [key for key in promised if _rung(key, images.get(key, {}), groups.get(key, {})) is None]
    return sorted((((a, s), sorted({*range(w)} - {*images.get((a, s, w), {})})) for a, s, w in gone), reverse=True)
