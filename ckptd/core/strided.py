"""Copying a strided array out of a file into a strided array in memory, as few reads of bounded size. Pure: says which reads, moves what they bring.

A job is a box of a row (file offset and strides) and its place in a row-major buffer. Dimensions that lie together on both sides are one; then
- both sides contiguous: one read, straight into the buffer;
- long runs on both sides: a read per run;
- else the span is read into scratch memory and its elements picked, in portions that fit; a span that is mostly other elements is read run by run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ckptd.core.boxes import Shape

Fetch = Callable[[int, memoryview], None]
"""(first byte, where to) -> nothing; fills all of it."""

RUN_BYTES = 32 << 10
"""A run of this many bytes is worth a read of its own."""
WASTE = 4
"""A span is read whole if at least one in so many of its bytes is wanted."""


def copy(
    fetch: Fetch, begin: int, strides: Shape, extent: Shape, item: int, out: np.ndarray[Any, Any], scratch: memoryview
) -> None:
    """Fill `out`, an array of `extent` (any strides) whose items have `item` bytes, from the array at byte `begin` with `strides` in elements.

    `scratch` bounds what is read beside it; at least a few pages.
    """
    if not out.size:
        return
    dims = _merged(extent, strides, tuple(s // item for s in out.strides))
    extent, strides = tuple(d[0] for d in dims), tuple(d[1] for d in dims)
    flat = np.lib.stride_tricks.as_strided(out, extent, tuple(d[2] * item for d in dims))
    _copy(fetch, begin, strides, extent, item, flat, scratch)


def _merged(extent: Shape, source: Shape, target: Shape) -> list[tuple[int, int, int]]:
    """(extent, stride there, stride here) with dimensions of one element left out and those that continue each other joined."""
    dims: list[tuple[int, int, int]] = []
    for e, s, t in zip(extent, source, target, strict=True):
        if e == 1:
            continue
        if dims and dims[-1][1] == s * e and dims[-1][2] == t * e:
            dims[-1] = (dims[-1][0] * e, s, t)
        else:
            dims.append((e, s, t))
    return dims


def _copy(fetch: Fetch, begin: int, strides: Shape, extent: Shape, item: int, out: np.ndarray[Any, Any], scratch: memoryview) -> None:
    if not extent or (len(extent) == 1 and strides[0] == 1 and out.strides[0] == item):
        fetch(begin, memoryview(out.reshape(-1).view(np.uint8)))  # type: ignore[arg-type]  # contiguous here and there
        return
    wanted = out.size * item
    span = (sum((e - 1) * s for e, s in zip(extent, strides, strict=True)) + 1) * item
    runs = strides[-1] == 1 and out.strides[-1] == item and extent[-1] * item >= RUN_BYTES and len(extent) > 1
    if not runs and span <= len(scratch) and span <= WASTE * wanted:
        fetch(begin, scratch[:span])
        held = np.frombuffer(scratch[:span], np.uint8)
        there = np.lib.stride_tricks.as_strided(
            held[: held.size // item * item].view(out.dtype), extent, tuple(s * item for s in strides)
        )
        out[...] = there
        return
    # Cut what is farthest apart in the file, so that each part lies close together.
    dim = max(range(len(extent)), key=lambda d: (strides[d], -d))
    if len(extent) == 1:
        _sparse(fetch, begin, strides[0], extent[0], item, out, scratch)
        return
    inner = [d for d in range(len(extent)) if d != dim]
    within = (sum((extent[d] - 1) * strides[d] for d in inner) + 1) * item
    step = 1
    if not runs and within + (extent[dim] - 1) * 0 <= len(scratch):
        step = max(1, min(extent[dim], (len(scratch) - within) // max(1, strides[dim] * item) + 1))
        if step > 1 and (within + (step - 1) * strides[dim] * item) > WASTE * step * (wanted // extent[dim]):
            step = 1
    for at in range(0, extent[dim], step):
        count = min(step, extent[dim] - at)
        place = begin + at * strides[dim] * item
        index: list[Any] = [slice(None)] * len(extent)
        if count == 1:
            index[dim] = at
            _again(fetch, place, tuple(strides[d] for d in inner), tuple(extent[d] for d in inner), item, out[tuple(index)], scratch)
        else:
            index[dim] = slice(at, at + count)
            sizes = tuple(count if d == dim else extent[d] for d in range(len(extent)))
            _copy(fetch, place, strides, sizes, item, out[tuple(index)], scratch)


def _again(fetch: Fetch, begin: int, strides: Shape, extent: Shape, item: int, out: np.ndarray[Any, Any], scratch: memoryview) -> None:
    """With one dimension less: the rest may have come together."""
    dims = _merged(extent, strides, tuple(s // item for s in out.strides))
    flat = np.lib.stride_tricks.as_strided(out, tuple(d[0] for d in dims), tuple(d[2] * item for d in dims))
    _copy(fetch, begin, tuple(d[1] for d in dims), tuple(d[0] for d in dims), item, flat, scratch)


def _sparse(fetch: Fetch, begin: int, stride: int, count: int, item: int, out: np.ndarray[Any, Any], scratch: memoryview) -> None:
    """Single elements, `stride` apart there, or lying together there and apart here; as many at a time as scratch holds."""
    some = max(1, (len(scratch) // item - 1) // max(1, stride) + 1)
    for at in range(0, count, some):
        here = out[at : at + some]
        span = ((len(here) - 1) * stride + 1) * item
        fetch(begin + at * stride * item, scratch[:span])
        held = np.frombuffer(scratch[:span], np.uint8).view(out.dtype)
        here[...] = held[:: max(1, stride)][: len(here)]
