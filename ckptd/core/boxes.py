"""Boxes: n-d slices of a logical tensor, and the proof that a set of them tiles it.

A box is the only geometry in ckptd. Every shard of every parallelism is one box or, for flat ranges (FSDP1, ZeRO), a few.
Start and extent count elements per dimension. A 0-d tensor has exactly one box, `Box((), ())`, of one element.

`prove_tiles` is what stands between a user and a silently lost tensor: a manifest or a capture plan is accepted only if the
boxes of each tensor lie inside its shape, do not overlap, and add up to its volume. That is a proof: disjoint subsets of a
finite set whose sizes add up to the size of the set cover it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise
from math import prod

import msgspec

from ckptd.errors import NotTiled

Shape = tuple[int, ...]


class Box(msgspec.Struct, frozen=True, order=True, gc=False):
    """An n-d slice: `start` and `extent`, elements per dimension. (A struct, as pieces and rows are: a restore makes several per tensor.)"""

    start: Shape
    extent: Shape

    def __post_init__(self) -> None:
        if len(self.start) != len(self.extent):
            msg = f"a box needs as many starts as extents: {self.start} and {self.extent}"
            raise ValueError(msg)
        if self.start and (min(self.start) < 0 or min(self.extent) < 0):
            msg = f"a box has no negative start or extent: {self.start} and {self.extent}"
            raise ValueError(msg)

    @staticmethod
    def whole(shape: Sequence[int]) -> Box:
        """The box that is the whole tensor."""
        return Box((0,) * len(shape), tuple(shape))

    @property
    def numel(self) -> int:
        """Elements in the box."""
        return prod(self.extent)

    @property
    def stop(self) -> Shape:
        """First element past the box, per dimension."""
        return tuple(s + e for s, e in zip(self.start, self.extent, strict=True))

    def intersect(self, other: Box) -> Box | None:
        """The common part, or None where there is none (an empty box meets nothing)."""
        if self == other and self.numel:
            return self
        start = tuple(map(max, self.start, other.start))
        stop = tuple(map(min, self.stop, other.stop))
        if any(b <= a for a, b in zip(start, stop, strict=True)):
            return None
        return Box(start, tuple(b - a for a, b in zip(start, stop, strict=True)))

    def inside(self, shape: Sequence[int]) -> bool:
        """Whether the box lies within a tensor of this shape."""
        return len(shape) == len(self.start) and not any(map(_beyond, self.start, self.extent, shape))

    def relative_to(self, outer: Box) -> Box:
        """The same elements, counted from `outer`'s start. `outer` must contain this box."""
        if not any(outer.start):
            return self
        return Box(tuple(s - o for s, o in zip(self.start, outer.start, strict=True)), self.extent)

    def cut(self, shares: Sequence[int]) -> list[Box]:
        """One box per share along the longest dimension, in proportion and in order; together they are this box. Shares too small come out empty.

        A box of one element without dimensions, or of none, is not cut.
        """
        if not self.extent or len(shares) == 1 or self.numel == 0:
            return [self]
        dim = max(range(len(self.extent)), key=lambda d: (self.extent[d], -d))
        length, total = self.extent[dim], sum(shares)
        cuts = [0, *((length * sum(shares[: i + 1]) + total // 2) // total for i in range(len(shares)))]
        return [
            Box(
                (*self.start[:dim], self.start[dim] + a, *self.start[dim + 1 :]),
                (*self.extent[:dim], b - a, *self.extent[dim + 1 :]),
            )
            for a, b in pairwise(cuts)
        ]

    def __str__(self) -> str:
        return "[" + ", ".join(f"{a}:{b}" for a, b in zip(self.start, self.stop, strict=True)) + "]"


def _beyond(start: int, extent: int, length: int) -> bool:
    return start + extent > length


def chunk(length: int, parts: int, index: int) -> tuple[int, int]:
    """Start and size of piece `index` when `length` is cut as `torch.chunk` does: ceil-sized pieces, the last ones short or empty."""
    size = -(-length // parts)
    start = min(index * size, length)
    return start, min(size, length - start)


def boxes_of_flat_range(shape: Sequence[int], start: int, length: int) -> list[Box]:
    """Cut `length` elements of the row-major flattened tensor, from `start`, into boxes in flat order: at most 2n-1 of them.

    Raises ValueError if the range does not lie in the tensor.
    """
    shape = tuple(shape)
    total = prod(shape)
    if start < 0 or length < 0 or start + length > total:
        msg = f"flat range {start}+{length} does not lie in {shape} ({total} elements)"
        raise ValueError(msg)
    if length == 0:
        return []
    if not shape:
        return [Box((), ())]
    row = prod(shape[1:])
    first, offset = divmod(start, row)
    boxes: list[Box] = []

    def within(index: int, lo: int, count: int) -> None:
        boxes.extend(Box((index, *b.start), (1, *b.extent)) for b in boxes_of_flat_range(shape[1:], lo, count))

    if offset:
        head = min(length, row - offset)
        within(first, offset, head)
        first, length = first + 1, length - head
    full = length // row
    if full:
        boxes.append(Box((first,) + (0,) * (len(shape) - 1), (full, *shape[1:])))
    if length % row:
        within(first + full, 0, length % row)
    return boxes


def prove_tiles(name: str, shape: Sequence[int], boxes: Iterable[Box]) -> None:
    """Prove that `boxes` are disjoint, lie in `shape` and cover it; NotTiled names the tensor and the first offence.

    Empty boxes count for nothing. O(n log n) for grids cut along one dimension, O(n^2) at worst.
    """
    boxes = [*boxes]
    if len(boxes) == 1 and boxes[0].extent == tuple(shape) and not any(boxes[0].start):  # most tensors of most images
        return
    real = sorted(b for b in boxes if b.numel or not b.inside(shape))
    for box in real:
        if not box.inside(shape):
            msg = f"{name}: box {box} does not lie in shape {tuple(shape)}"
            raise NotTiled(msg)
    _prove_disjoint(name, real)
    covered, total = sum(b.numel for b in real), prod(shape)
    if covered != total:
        hole = _first_hole(Box.whole(shape), real)
        msg = f"{name}: {total - covered} of {total} elements are in no box; the first hole is {hole}"
        raise NotTiled(msg)


def _prove_disjoint(name: str, boxes: list[Box]) -> None:
    """Sweep along the dimension in which the boxes differ most; only boxes whose ranges there overlap are compared."""
    if len(boxes) < 2:
        return
    rank = len(boxes[0].start)
    if rank == 0:
        msg = f"{name}: a 0-d tensor is stored {len(boxes)} times"
        raise NotTiled(msg)
    dim = max(range(rank), key=lambda d: len({b.start[d] for b in boxes}))
    active: list[Box] = []
    for box in sorted(boxes, key=lambda b: b.start[dim]):
        active = [a for a in active if a.stop[dim] > box.start[dim]]
        for other in active:
            common = box.intersect(other)
            if common is not None:
                msg = f"{name}: boxes {other} and {box} overlap in {common}"
                raise NotTiled(msg)
        active.append(box)


def _first_hole(whole: Box, boxes: list[Box]) -> Box:
    """A box that nothing covers; only called when there is one. Depth first, so that a lying index of many holes costs little."""
    todo = [(whole, 0)]
    while True:
        region, at = todo.pop()
        while at < len(boxes) and region.intersect(boxes[at]) is None:
            at += 1
        if at == len(boxes):
            return region
        todo.extend((piece, at + 1) for piece in reversed(subtract(region, boxes[at])))


def subtract(outer: Box, inner: Box) -> list[Box]:
    """What is left of `outer` without `inner`: at most 2n boxes."""
    common = outer.intersect(inner)
    if common is None:
        return [outer]
    left: list[Box] = []
    start, stop = list(outer.start), list(outer.stop)
    for dim, (low, high) in enumerate(zip(common.start, common.stop, strict=True)):
        for lo, hi in ((start[dim], low), (high, stop[dim])):
            if lo < hi:
                begin, end = [*start], [*stop]
                begin[dim], end[dim] = lo, hi
                left.append(Box(tuple(begin), tuple(e - b for b, e in zip(begin, end, strict=True))))
        start[dim], stop[dim] = low, high
    return left
