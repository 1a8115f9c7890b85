"""Boxes against numpy masks: the algebra, the proof of tiling, flat ranges, torch's chunk."""

from __future__ import annotations

import time
from math import prod

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from ckptd.core.boxes import Box, boxes_of_flat_range, chunk, prove_tiles, subtract
from ckptd.errors import NotTiled
from tests.core.helpers import boxes_in, grid, guillotine, shapes

CASES = settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))


def mask(shape: tuple[int, ...], box: Box) -> np.ndarray:
    out = np.zeros(shape, dtype=np.int64)
    out[slices(box)] += 1
    return out


def slices(box: Box) -> tuple[slice, ...]:
    return tuple(slice(a, b) for a, b in zip(box.start, box.stop, strict=True))


def painted(shape: tuple[int, ...], boxes: list[Box]) -> np.ndarray:
    out = np.zeros(shape, dtype=np.int64)
    for b in boxes:
        out[slices(b)] += 1
    return out


@CASES
@given(st.data())
def test_intersect_is_the_common_elements(data):
    shape = data.draw(shapes())
    a, b = data.draw(boxes_in(shape)), data.draw(boxes_in(shape))
    both = mask(shape, a) * mask(shape, b)
    common = a.intersect(b)
    assert common == b.intersect(a)
    if common is None:
        assert not both.any()
    else:
        assert common.numel > 0
        assert (mask(shape, common) == both).all()


@CASES
@given(st.data())
def test_subtract_leaves_disjoint_boxes_that_are_exactly_the_rest(data):
    shape = data.draw(shapes())
    a, b = data.draw(boxes_in(shape)), data.draw(boxes_in(shape))
    left = subtract(a, b)
    assert len(left) <= max(1, 2 * len(shape))
    assert (painted(shape, left) == mask(shape, a) * (1 - mask(shape, b))).all()


@CASES
@given(st.data())
def test_cut_gives_parts_in_proportion_that_tile_the_box(data):
    shape = data.draw(shapes())
    box = data.draw(boxes_in(shape))
    shares = data.draw(st.lists(st.integers(0, 1000), min_size=1, max_size=9).filter(sum))
    parts = box.cut(shares)
    assert len(parts) == (len(shares) if box.numel and box.extent else 1)
    assert (painted(shape, parts) == mask(shape, box)).all()
    if box.numel and len(shares) > 1 and box.extent:
        row = box.numel // max(box.extent)
        for part, share in zip(parts, shares, strict=True):
            assert abs(part.numel - box.numel * share / sum(shares)) <= row


@CASES
@given(st.data())
def test_relative_to_addresses_the_same_elements(data):
    shape = data.draw(shapes())
    outer = data.draw(boxes_in(shape))
    part = data.draw(boxes_in(outer.extent))
    inner = Box(tuple(o + s for o, s in zip(outer.start, part.start, strict=True)), part.extent)
    assert inner.relative_to(outer) == part
    whole = np.arange(prod(shape)).reshape(shape)
    assert (whole[slices(outer)][slices(inner.relative_to(outer))] == whole[slices(inner)]).all()


@CASES
@given(st.data(), st.booleans())
def test_prove_tiles_accepts_every_partition(data, cut_freely):
    shape = data.draw(shapes())
    boxes = data.draw(guillotine(shape) if cut_freely else grid(shape))
    boxes = data.draw(st.permutations(boxes))
    assert (painted(shape, boxes) == 1).all()
    prove_tiles("t", shape, boxes)


@settings(CASES, max_examples=200)
@given(st.data(), st.booleans(), st.sampled_from(["drop", "twice", "move", "stretch", "rank"]))
def test_prove_tiles_rejects_every_partition_with_one_box_changed(data, cut_freely, how):
    shape = data.draw(shapes())
    boxes = data.draw(guillotine(shape) if cut_freely else grid(shape))
    solid = [i for i, b in enumerate(boxes) if b.numel]
    assume(solid)
    i = data.draw(st.sampled_from(solid))
    box, dim = boxes[i], data.draw(st.integers(0, max(0, len(shape) - 1)))
    assume(shape or how in {"drop", "twice", "rank"})
    if how == "drop":
        boxes.pop(i)
    elif how == "twice":
        boxes.append(box)
    elif how == "rank":
        boxes[i] = Box((*box.start, 0), (*box.extent, 1))
    else:
        start, extent = list(box.start), list(box.extent)
        by = data.draw(st.sampled_from([-2, -1, 1, 2]))
        row = start if how == "move" else extent
        assume(row[dim] + by >= 0)
        row[dim] += by
        boxes[i] = Box(tuple(start), tuple(extent))
    with pytest.raises(NotTiled, match="^layer.weight: "):
        prove_tiles("layer.weight", shape, boxes)


@settings(CASES, max_examples=150)
@given(st.data())
def test_prove_tiles_agrees_with_a_mask_on_arbitrary_boxes(data):
    shape = data.draw(shapes(side=3))
    boxes = data.draw(st.lists(boxes_in(shape), max_size=5))
    if (painted(shape, boxes) == 1).all():
        prove_tiles("t", shape, boxes)
    else:
        with pytest.raises(NotTiled):
            prove_tiles("t", shape, boxes)


def test_prove_tiles_counts_empty_boxes_for_nothing_but_not_outside():
    prove_tiles("t", (4,), [Box((0,), (4,)), Box((4,), (0,)), Box((2,), (0,))])
    prove_tiles("t", (0, 3), [])
    with pytest.raises(NotTiled):
        prove_tiles("t", (4,), [Box((0,), (4,)), Box((5,), (0,))])
    with pytest.raises(NotTiled):
        prove_tiles("t", (), [])
    with pytest.raises(NotTiled):
        prove_tiles("t", (), [Box((), ()), Box((), ())])


def test_the_hole_that_is_named_is_a_hole():
    boxes = [Box((0, 0), (2, 2)), Box((2, 0), (2, 4))]
    with pytest.raises(NotTiled, match=r"4 of 16 elements are in no box; the first hole is \[0:2, 2:4\]"):
        prove_tiles("t", (4, 4), boxes)


def test_forty_thousand_shards_and_as_many_holes_are_judged_in_seconds():
    n = 40_000
    whole = [Box((i, 0), (1, 8)) for i in range(n)]
    begun = time.perf_counter()
    prove_tiles("t", (n, 8), whole)
    accepted = time.perf_counter() - begun
    with pytest.raises(NotTiled, match=r"hole is \[0:1, 0:8\]"):
        prove_tiles("t", (n, 8), whole[1::2])
    with pytest.raises(NotTiled, match=r"the first hole is \[39999:40000, 0:8\]"):
        prove_tiles("t", (n, 8), whole[:-1])
    print(f"accepted {n} in {accepted:.2f} s, all three in {time.perf_counter() - begun:.2f} s")
    assert time.perf_counter() - begun < 10


@CASES
@given(st.data())
def test_a_flat_range_is_tiled_in_flat_order_by_at_most_2n_minus_1_boxes(data):
    shape = data.draw(shapes(dims=4, side=4))
    total = prod(shape)
    start = data.draw(st.integers(0, total))
    length = data.draw(st.integers(0, total - start))
    boxes = boxes_of_flat_range(shape, start, length)
    flat = np.arange(total).reshape(shape)
    told = [flat[slices(b)].reshape(-1) for b in boxes]
    got = np.concatenate([np.zeros(0, np.int64), *told])
    assert (got == np.arange(start, start + length)).all()
    assert got.size == length
    assert len(boxes) <= max(1, 2 * len(shape) - 1)
    for bad in ((-1, 1), (0, -1), (start, total - start + 1)):
        with pytest.raises(ValueError):
            boxes_of_flat_range(shape, *bad)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 300), st.integers(1, 40))
def test_chunk_is_torch_chunk(length, parts):
    torch = pytest.importorskip("torch")
    whole = torch.arange(length)
    theirs = [c.tolist() for c in torch.chunk(whole, parts)] if length else []
    theirs += [[]] * (parts - len(theirs))
    ours = [whole[s : s + n].tolist() for s, n in (chunk(length, parts, i) for i in range(parts))]
    assert ours == theirs


def test_a_box_refuses_negative_and_mismatched_numbers():
    for start, extent in [((0,), ()), ((-1,), (1,)), ((0,), (-1,))]:
        with pytest.raises(ValueError):
            Box(start, extent)
