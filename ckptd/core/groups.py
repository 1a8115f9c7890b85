"""Groups: which nodes protect each other.

A group has n members, any m of which may be lost. Members should not fail together: nodes carry labels (`rack=r7`, `switch=s2`, `power=a`), and no
two members of a group should share one. Where that cannot be had the group is formed nevertheless, and says what its members share.

`form` is a pure function of the membership, so all daemons of a job come to the same groups without a word; when the membership changes, it
is asked again.

Invariants
- every node is in exactly one group; sizes differ by at most one;
- a group of n has min(m, n - 1) parity: a node alone is protected by nobody;
- groups are as large as asked for, smaller where only that keeps the members of a domain apart, larger where a group were left too small.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import combinations

import msgspec

from ckptd.core.parity import BLOCKS_MAX, PARITY_MAX
from ckptd.errors import BadArgument

SIZE_DEFAULT = 8
PARITY_DEFAULT = 1

Labels = Mapping[str, str]
"""Failure domains of a node: kind -> name."""


class Group(msgspec.Struct, frozen=True):
    """Nodes that protect each other. A member's position is its index in `members`."""

    members: tuple[int, ...]
    parity: int
    """How many members may be lost."""
    shared: tuple[str, ...] = ()
    """Labels that two members share: losing that domain may lose more than `parity` members."""
    wanted: int = 0
    """The parity that was asked for."""

    @property
    def data(self) -> int:
        """Data blocks per stripe."""
        return len(self.members) - self.parity

    @property
    def degraded(self) -> str:
        """What is less than asked for; "" if nothing is."""
        why = []
        if self.parity < self.wanted:
            why.append(f"{len(self.members)} nodes can lose {self.parity}, not {self.wanted}")
        if self.shared:
            why.append("members share " + ", ".join(self.shared))
        return "; ".join(why)


def check(size: int, parity: int) -> None:
    """Raise BadArgument for sizes that cannot be."""
    if not 2 <= size <= BLOCKS_MAX or not 1 <= parity <= PARITY_MAX or parity >= size:
        msg = f"groups of {size} nodes that may lose {parity}: a group has 2 to {BLOCKS_MAX} nodes, and may lose 1 to {PARITY_MAX}, not all of them"
        raise BadArgument(msg)


def form(labels: Sequence[Labels], *, size: int = SIZE_DEFAULT, parity: int = PARITY_DEFAULT) -> tuple[Group, ...]:
    """Groups of about `size` for nodes 0, 1, ..., whose labels are given. Raises BadArgument."""
    check(size, parity)
    if not labels:
        return ()
    groups = _placed(labels, _group_count(labels, size, parity))
    return tuple(
        Group(tuple(sorted(g)), min(parity, len(g) - 1), tuple(sorted(_shared(labels, g))), parity) for g in sorted(groups, key=min)
    )


def _group_count(labels: Sequence[Labels], size: int, parity: int) -> int:
    """As few as `size` allows; more where the largest domain has more nodes than there are groups. None too small to lose `parity`, if that can be."""
    fewest = max(1, min(-(-len(labels) // size), len(labels) // (parity + 1)))
    largest = max(Counter(label for node in labels for label in node.items()).values(), default=1)
    return largest if largest > fewest and len(labels) // largest > parity else fewest


def _placed(labels: Sequence[Labels], count: int) -> list[list[int]]:
    """Deal the nodes out, those of large domains first, each to where it meets fewest labels of its own; then swap what still collides."""
    weight = Counter(label for node in labels for label in node.items())
    order = sorted(range(len(labels)), key=lambda n: (-max((weight[x] for x in labels[n].items()), default=0), sorted(labels[n].items()), n))
    room = [len(labels) // count + (i < len(labels) % count) for i in range(count)]
    groups: list[list[int]] = [[] for _ in range(count)]
    held: list[Counter[tuple[str, str]]] = [Counter() for _ in range(count)]
    for node in order:
        free = [g for g in range(count) if len(groups[g]) < room[g]]
        best = min(free, key=lambda g: (_meets(held[g], labels[node]), len(groups[g]), g))
        groups[best].append(node)
        held[best].update(labels[node].items())
    _swap(labels, groups, held)
    return groups


def _swap(labels: Sequence[Labels], groups: list[list[int]], held: list[Counter[tuple[str, str]]]) -> None:
    """Exchange a node that shares a label for one elsewhere, as long as that leaves fewer collisions."""
    better = True
    while better:
        better = False
        for g, i in [(g, i) for g, group in enumerate(groups) for i in range(len(group))]:
            mine = labels[groups[g][i]]
            if _meets(held[g], mine) == len(mine):  # it meets itself only
                continue
            for h, j in [(h, j) for h, group in enumerate(groups) if h != g for j in range(len(group))]:
                theirs = labels[groups[h][j]]
                if _change(held[g], held[h], mine, theirs) < 0:
                    groups[g][i], groups[h][j] = groups[h][j], groups[g][i]
                    for counts, goes, comes in ((held[g], mine, theirs), (held[h], theirs, mine)):
                        counts.subtract(goes.items())
                        counts.update(comes.items())
                    better = True
                    break


def _meets(held: Counter[tuple[str, str]], labels: Labels) -> int:
    return sum(held[x] for x in labels.items())


def _change(here: Counter[tuple[str, str]], there: Counter[tuple[str, str]], mine: Labels, theirs: Labels) -> int:
    """By how many the pairs that share a label change if a node here and one there change places."""
    goes, comes = mine.items() - theirs.items(), theirs.items() - mine.items()
    return sum(there[x] - here[x] + 1 for x in goes) + sum(here[x] - there[x] + 1 for x in comes)


def _shared(labels: Sequence[Labels], group: Sequence[int]) -> set[str]:
    return {f"{kind}={name}" for a, b in combinations(group, 2) for kind, name in labels[a].items() & labels[b].items()}
