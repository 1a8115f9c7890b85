"""Replicas: what several ranks hold identically, compared. A rank whose bytes differ from the others' has computed or kept something wrong, silently.

Each rank hashes a share of what it holds in common with others, another share in each step, so that all is compared within `every` steps and no step pays for
all of it. Which share is a matter of the name alone, so all holders take the same.

Sources: reference/reliability.md (silent data corruption); the vote of replicas is that of N-modular redundancy.
"""

from __future__ import annotations

import zlib
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence

import msgspec

from ckptd.core.boxes import Box
from ckptd.core.plan import LeafDecl

EVERY = 50
"""Steps in which everything was compared once, unless told otherwise."""


class Suspicion(msgspec.Struct, frozen=True):
    """Ranks whose bytes of these tensors differ from those of more other ranks; `undecided` where no side is the larger."""

    ranks: tuple[int, ...]
    tensors: tuple[str, ...]
    undecided: bool = False

    def __str__(self) -> str:
        """For people."""
        names = ", ".join(self.tensors[:3]) + (f" and {len(self.tensors) - 3} more" if len(self.tensors) > 3 else "")
        who = ", ".join(map(str, self.ranks))
        if self.undecided:
            return f"ranks {who} hold different bytes of {names}, and no majority tells which are wrong"
        return f"rank {who} holds other bytes of {names} than the other ranks: suspected silent corruption"


def key_of(name: str, box: Box) -> str:
    """What names the same bytes on all ranks that hold them."""
    return f"{name}{[*box.start]}" if any(box.start) else name


def shared(leaves: Mapping[int, Sequence[LeafDecl]]) -> dict[int, list[str]]:
    """By rank: names of the leaves of which another rank holds the same box."""
    holders: dict[tuple[str, object], list[int]] = defaultdict(list)
    for rank, declared in leaves.items():
        for leaf in declared:
            if not leaf.local:
                holders[leaf.name, leaf.boxes].append(rank)
    found: dict[int, list[str]] = {rank: [] for rank in leaves}
    for (name, _), ranks in holders.items():
        for rank in ranks if len(ranks) > 1 else ():
            found[rank].append(name)
    return found


def turn_of(key: str, every: int) -> int:
    """In which of `every` steps its turn is."""
    return zlib.crc32(key.encode()) % every


def compare(said: Mapping[int, Mapping[str, int]]) -> list[Suspicion]:
    """What ranks said of the tensors that they hold in common: rank -> key -> hash. Those said by one rank only tell nothing."""
    wrong: dict[tuple[tuple[int, ...], bool], list[str]] = defaultdict(list)
    for key in sorted({k for hashes in said.values() for k in hashes}):
        by_rank = {rank: hashes[key] for rank, hashes in said.items() if key in hashes}
        counts = Counter(by_rank.values()).most_common()
        if len(counts) > 1:
            undecided = counts[0][1] == counts[1][1]
            ranks = tuple(sorted(r for r, h in by_rank.items() if undecided or h != counts[0][0]))
            wrong[ranks, undecided].append(key)
    return [Suspicion(ranks, tuple(keys), undecided) for (ranks, undecided), keys in sorted(wrong.items())]


class Ballots:
    """What was said of steps that are not committed yet."""

    def __init__(self) -> None:
        self._said: dict[tuple[int, int], dict[int, dict[str, int]]] = defaultdict(dict)

    def add(self, key: tuple[int, int], said: Mapping[int, Mapping[str, int]]) -> None:
        """Ranks said this of a step."""
        self._said[key].update({rank: dict(hashes) for rank, hashes in said.items()})

    def of(self, key: tuple[int, int], ranks: Collection[int]) -> dict[int, dict[str, int]]:
        """What these ranks said of a step."""
        return {rank: hashes for rank, hashes in self._said.get(key, {}).items() if rank in ranks}

    def committed(self, key: tuple[int, int]) -> list[Suspicion]:
        """All has been said of this step, and nothing before it matters any more."""
        found = compare(self._said.get(key, {}))
        for old in [k for k in self._said if k <= key]:
            del self._said[old]
        return found
