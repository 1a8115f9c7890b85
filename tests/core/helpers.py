"""Strategies and builders that the tests of `core` share."""

from __future__ import annotations

import json
from math import prod
from typing import Any

import numpy as np
from hypothesis import strategies as st

from ckptd.core import checksum
from ckptd.core.boxes import Box
from ckptd.core.image import ITEM_BYTES, Image, Layout, Piece, lay_out, parse
from ckptd.core.manifest import Index, build_index


def shapes(dims: int = 3, side: int = 6) -> st.SearchStrategy[tuple[int, ...]]:
    """Shapes of 0 to `dims` dimensions, now and then with a zero."""
    size = st.one_of(st.integers(1, side), st.integers(1, side), st.integers(0, side))
    return st.lists(size, max_size=dims).map(tuple)


@st.composite
def boxes_in(draw: st.DrawFn, shape: tuple[int, ...]) -> Box:
    """Any box inside a shape, empty ones too."""
    ends = [sorted((draw(st.integers(0, n)), draw(st.integers(0, n)))) for n in shape]
    return Box(tuple(a for a, _ in ends), tuple(b - a for a, b in ends))


@st.composite
def cuts(draw: st.DrawFn, length: int, most: int = 4) -> list[int]:
    """0, some cuts, length; pieces may be empty."""
    return [0, *sorted(draw(st.lists(st.integers(0, length), max_size=most - 1))), length]


@st.composite
def grid(draw: st.DrawFn, shape: tuple[int, ...]) -> list[Box]:
    """All cells of a random grid: a partition of the shape, with empty cells."""
    cells = [Box((), ())]
    for n in shape:
        edges = draw(cuts(n, 3))
        cells = [
            Box((*c.start, a), (*c.extent, b - a)) for c in cells for a, b in zip(edges, edges[1:], strict=False)
        ]
    return cells


@st.composite
def guillotine(draw: st.DrawFn, shape: tuple[int, ...]) -> list[Box]:
    """A partition by random cuts, each through one box only."""
    boxes = [Box.whole(shape)]
    for _ in range(draw(st.integers(0, 6)) if shape else 0):
        box = boxes.pop(draw(st.integers(0, len(boxes) - 1)))
        dim = draw(st.integers(0, len(shape) - 1))
        at = draw(st.integers(0, box.extent[dim]))
        for begin, size in ((0, at), (at, box.extent[dim] - at)):
            start, extent = list(box.start), list(box.extent)
            start[dim] += begin
            extent[dim] = size
            boxes.append(Box(tuple(start), tuple(extent)))
    return boxes


def piece(name: str, dtype: str = "F32", shape: tuple[int, ...] = (4,), box: Box | None = None, view: str = "") -> Piece:
    """A piece; the whole tensor if no box is given."""
    return Piece(name, dtype, shape, Box.whole(shape) if box is None else box, view)


def laid(pieces: list[Piece], **changes: Any) -> Layout:
    """`lay_out` with ordinary arguments."""
    fields = {"job": "j", "rank": 0, "world_size": 1, "coords": {"dp": 0}, "aliases": {}, "objects_bytes": 200}
    return lay_out(pieces, **{**fields, **changes})


def filled(layout: Layout, *, objects: dict[str, Any] | None = None, attempt: int = 1, step: int = 7) -> bytearray:
    """The image: its header and bytes that differ everywhere."""
    head = layout.render(attempt=attempt, step=step, objects=objects or {})
    data = np.random.default_rng(len(head)).integers(0, 2, layout.image_bytes - layout.header_bytes, dtype=np.uint8)
    return bytearray(head + data.tobytes())


def foreign(table: dict[str, Any], data_bytes: int, **meta: Any) -> tuple[bytes, int]:
    """A hand-made header, and the bytes of its image: `meta` changes the `ckptd` entry, `table` the tensors."""
    shapes_of = {k: v["shape"] for k, v in table.items() if isinstance(v, dict) and isinstance(v.get("shape"), list)}
    said = {"format": 1, "job": "j", "rank": 0, "world_size": 1, "shapes": shapes_of, **meta}
    starts = said.pop("starts", {k: {"saved_offsets": [0] * len(s)} for k, s in shapes_of.items()})
    described = {"format": "pt", "DCP_SHARDING_INFO": json.dumps(starts), "ckptd": json.dumps(said)}
    return framed(json.dumps({**table, "__metadata__": described}).encode(), data_bytes)


def framed(text: bytes, data_bytes: int = 0) -> tuple[bytes, int]:
    """Length, header text; and the size of an image with so many bytes of data."""
    return len(text).to_bytes(8, "little") + text, 8 + len(text) + data_bytes


def tensor(begin: int, shape: list[int], dtype: str = "F32") -> dict[str, Any]:
    """A header entry that fits."""
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, begin + prod(shape) * ITEM_BYTES.get(dtype, 4)]}


def assert_consistent(image: Image) -> None:
    """What every parsed image promises: contiguous ranges that fit their boxes, boxes inside their shapes."""
    at = 0
    for entry in image.entries:
        p = entry.piece
        assert entry.begin == at
        assert entry.end - entry.begin == p.nbytes == p.box.numel * ITEM_BYTES[p.dtype]
        assert p.box.inside(p.shape)
        at = entry.end
    assert image.header_bytes + at == image.image_bytes
    assert 0 <= image.meta.rank < image.meta.world_size


def small_index(parts: int = 3) -> tuple[Index, dict[int, bytearray]]:
    """A step of `parts` ranks: a tensor cut by rows, two replicated ones of the same shape on rank 0, a scalar, objects."""
    files: dict[int, bytearray] = {}
    for rank in range(parts):
        held = [piece("model.w", "F32", (2 * parts, 3), Box((2 * rank, 0), (2, 3)))]
        if rank == 0:
            held += [piece("model.a", "BF16", (5,)), piece("model.b", "BF16", (5,)), piece("step", "I64", ())]
            held += [piece("model.none", "F16", (0, 3))]
        layout = laid(held, rank=rank, world_size=parts, coords={"dp": rank}, aliases={"tied": "model.a"} if rank == 0 else {})
        files[rank] = filled(layout, objects={"rng": {"$tuple": [rank, 1.5, "é", None]}})
    images = {r: parse(bytes(f), len(f)) for r, f in files.items()}
    return build_index(images, {r: checksum.digests_of(f) for r, f in files.items()}), files
