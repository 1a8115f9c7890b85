"""Plans: every byte is stored once and evenly; a restore onto any other grid gives equal bits and reads what it says it reads."""

from __future__ import annotations

import random
from collections import Counter
from math import prod

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ckptd.core import checksum
from ckptd.core.boxes import Box, boxes_of_flat_range, chunk, prove_tiles
from ckptd.core.image import ITEM_BYTES, parse
from ckptd.core.manifest import build_index
from ckptd.core.plan import SPLIT_BYTES_MIN, LeafDecl, Want, byte_ranges, local_name, merge, plan_capture, plan_restore, span
from ckptd.errors import NotTiled, StateMismatch, Unstorable
from tests.core.helpers import boxes_in, grid, guillotine, laid, shapes

CASES = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
NUMPY = {"F64": np.float64, "F32": np.float32, "I16": np.int16, "U8": np.uint8, "BOOL": np.bool_, "I64": np.int64}


def decl(name, shape, boxes, dtype="F32", **more):
    return LeafDecl(name, dtype, tuple(shape), tuple((b.start, b.extent) for b in boxes), **more)


def mesh_box(shape, dp, tp, i, j, tp_dim):
    """FSDP2 over tensor parallelism: dim 0 in dp, after `tp_dim` in tp."""
    start, extent = [0] * len(shape), list(shape)
    if tp_dim is not None:
        start[tp_dim], extent[tp_dim] = chunk(shape[tp_dim], tp, j)
    at, n = chunk(extent[0], dp, i)
    return Box((start[0] + at, *start[1:]), (n, *extent[1:]))


@st.composite
def jobs(draw):
    """Declarations of all ranks of a dp x tp mesh, tensors sharded or replicated over either axis."""
    dp, tp = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    declared = {r: [] for r in range(dp * tp)}
    sizes = st.one_of(st.integers(0, 9), st.sampled_from([7, 1, 257, 50257]))
    for t in range(draw(st.integers(1, 6))):
        shape = (draw(sizes), *draw(st.lists(st.integers(1, 5), max_size=2))) if draw(st.booleans()) or not t else ()
        fsdp = bool(shape) and draw(st.booleans())
        tp_dim = draw(st.sampled_from([None, *range(len(shape))]))
        for r, leaves in declared.items():
            i, j = divmod(r, tp)
            box = mesh_box(shape, dp if fsdp else 1, tp, i if fsdp else 0, j, tp_dim) if shape else Box((), ())
            none = not box.numel and shape and draw(st.booleans())
            leaves.append(decl(f"t{t}", shape, [] if none else [box], "F64" if t % 2 else "F32"))
    return declared


def check_stored_once(declared, plan):
    """All leaves are stored, each box by one of those who hold it, and the boxes tile the tensors."""
    assert set(plan) == set(declared)
    leaves = {leaf.name: leaf for of in declared.values() for leaf in of}
    stored = {name: [] for name in leaves}
    for rank, pieces in plan.items():
        held = {}
        for leaf in declared[rank]:
            held.setdefault(leaf.name, []).extend(Box(*b) for b in leaf.boxes)
        for p in pieces:
            assert (p.dtype, p.shape, p.view) == (leaves[p.name].dtype, leaves[p.name].shape, leaves[p.name].view)
            assert not p.box.numel or any(p.box.intersect(h) == p.box for h in held[p.name]), f"rank {rank} does not hold {p}"
            stored[p.name].append(p.box)
    for name, boxes in stored.items():
        assert boxes, f"{name} is stored nowhere"
        prove_tiles(name, leaves[name].shape, boxes)
        assert prod(leaves[name].shape) == 0 or all(b.numel for b in boxes)


@CASES
@given(jobs())
def test_a_capture_over_any_mesh_stores_each_byte_once_where_it_is_held(declared):
    plan = plan_capture(declared)
    check_stored_once(declared, plan)
    assert plan == plan_capture(dict(reversed(declared.items())))


@CASES
@given(st.integers(1, 9), st.lists(st.tuples(st.integers(0, 400), st.integers(1, 600)), min_size=1, max_size=12))
def test_what_all_ranks_hold_is_stored_evenly(ranks, tensors):
    leaves = [decl(f"t{i}", s, [Box.whole(s)], "F64") for i, s in enumerate(tensors)]
    plan = plan_capture(dict.fromkeys(range(ranks), leaves))
    check_stored_once(dict.fromkeys(range(ranks), leaves), plan)
    load = [sum(p.nbytes for p in plan[r]) for r in range(ranks)]
    biggest = max((p.nbytes for of in plan.values() for p in of), default=0)
    assert max(load) <= sum(load) / ranks + biggest
    rows = sum(max(m, n) * 8 for m, n in tensors)  # parts are whole rows
    assert max(load) <= sum(load) / ranks + 2 * SPLIT_BYTES_MIN + rows


@CASES
@given(st.integers(1, 4), st.integers(1, 4), st.lists(st.integers(1, 300_000), min_size=1, max_size=8))
def test_what_groups_hold_is_stored_evenly_in_each_group(dp, tp, lengths):
    leaves = {r: [decl(f"t{i}", (n,), [Box(*((v,) for v in chunk(n, tp, r % tp)))]) for i, n in enumerate(lengths)] for r in range(dp * tp)}
    plan = plan_capture(leaves)
    check_stored_once(leaves, plan)
    for j in range(tp):
        load = [sum(p.nbytes for p in plan[r]) for r in range(dp * tp) if r % tp == j]
        biggest = max((p.nbytes for r in range(dp * tp) if r % tp == j for p in plan[r]), default=0)
        assert max(load) <= sum(load) / dp + biggest


def test_shared_state_goes_to_those_with_least_of_their_own():
    shared = decl("shared", (1024, 1024), [Box((0, 0), (1024, 1024))])
    leaves = {r: [decl("own", (4, 1 << 18), [Box((r, 0), (1, 1 << 18))]), shared] for r in range(4)}
    leaves[0].append(decl("big", (1 << 20,), [Box((0,), (1 << 20,))]))
    load = {r: sum(p.nbytes for p in of) for r, of in plan_capture(leaves).items()}
    print(load)
    assert not [p for p in plan_capture(leaves)[0] if p.name == "shared"]
    assert max(load.values()) == load[0] == 5 << 20


@pytest.mark.parametrize(("length", "ranks"), [(7, 3), (50257, 8), (2, 5), (0, 3), (1, 1), (50257, 64), (3, 64)])
def test_uneven_shards_and_more_ranks_than_rows_are_stored_whole(length, ranks):
    leaves = {r: [decl("w", (length, 2), [Box((a, 0), (n, 2))])] for r in range(ranks) for a, n in [chunk(length, ranks, r)]}
    check_stored_once(leaves, plan_capture(leaves))


@pytest.mark.parametrize(("shape", "ranks"), [((5, 7), 3), ((50257,), 7), ((3, 4, 5), 8), ((), 2), ((0, 4), 3), ((2,), 5)])
def test_flat_ranges_are_stored_whole(shape, ranks):
    total = prod(shape)
    leaves = {r: [decl("w", shape, boxes_of_flat_range(shape, *chunk(total, ranks, r)))] for r in range(ranks)}
    check_stored_once(leaves, plan_capture(leaves))


def test_a_tensor_that_no_rank_claims_a_box_of_is_never_lost_in_silence():
    with pytest.raises(NotTiled, match="^w: "):
        plan_capture({0: [decl("w", (4,), [])], 1: [decl("w", (4,), [])]})
    plan = plan_capture({0: [decl("w", (0, 4), [])], 1: [decl("w", (0, 4), [])]})
    assert [(p.name, p.shape, p.box) for p in plan[0]] == [("w", (0, 4), Box.whole((0, 4)))]
    assert not plan[1]


def test_ranks_that_disagree_are_refused_by_name():
    whole = [Box((0,), (4,))]
    a = decl("layer.w", (4,), whole, digest=b"1" * 16)
    for b in (decl("layer.w", (4,), whole, "F16"), decl("layer.w", (5,), whole), decl("layer.w", (4, 1), []), decl("layer.w", (4,), whole, view="x"),
              decl("layer.w", (4,), whole, digest=b"2" * 16)):  # fmt: skip
        with pytest.raises(Unstorable, match=r"^layer\.w: .*rank"):
            plan_capture({0: [a], 1: [], 2: [b]})
    plan_capture({0: [a], 1: [a], 2: [decl("layer.w", (4,), whole)]})
    with pytest.raises(Unstorable, match="rank"):
        plan_capture({0: [decl("layer.w", (4,), whole)], 1: [a], 2: [decl("layer.w", (4,), whole, digest=b"3" * 16)]})


def test_what_each_rank_has_for_itself_is_stored_by_each_under_its_own_name():
    own = decl("rng", (3,), [Box((0,), (3,))], "U8", local=True)
    plan = plan_capture({0: [], 1: [own], 2: [own]})
    assert {r: [p.name for p in of] for r, of in plan.items()} == {0: [], 1: ["rng"], 2: [local_name("rng", 2)]}
    shared = decl("rng", (3,), [Box((0,), (3,))], "U8")
    for leaves in ({0: [own], 1: [shared]}, {0: [shared], 1: [own]}):
        with pytest.raises(Unstorable, match="^rng: .*own"):
            plan_capture(leaves)


def test_declared_boxes_that_overlap_or_leave_a_hole_are_refused_by_name():
    half, rest, over = Box((0,), (2,)), Box((2,), (2,)), Box((1,), (3,))
    for boxes in ([half], [half, over], [half, rest, Box((0,), (4,))], [half, Box((2,), (3,))]):
        with pytest.raises(NotTiled, match=r"^layer\.w: "):
            plan_capture({r: [decl("layer.w", (4,), [b])] for r, b in enumerate(boxes)})


def saved(draw, arrays):
    """Cut each array at random, deal the boxes to ranks, write images; the index of them and their bytes."""
    ranks = draw(st.integers(1, 3))
    declared = {r: [] for r in range(ranks)}
    for name, (dtype, array) in arrays.items():
        boxes = draw(guillotine(array.shape) if draw(st.booleans()) else grid(array.shape))
        owners = [draw(st.lists(st.integers(0, ranks - 1), min_size=1, max_size=3, unique=True)) for _ in boxes]
        for r in range(ranks):
            declared[r].append(decl(name, array.shape, [b for b, of in zip(boxes, owners, strict=True) if r in of], dtype))
    files = {}
    for rank, pieces in plan_capture(declared).items():
        layout = laid(pieces, rank=rank, world_size=ranks)
        file = bytearray(layout.render(attempt=0, step=1, objects={}).ljust(layout.image_bytes, b"\xee"))
        for e in layout.entries:
            part = arrays[e.piece.name][1][tuple(map(slice, e.piece.box.start, e.piece.box.stop))]
            file[layout.header_bytes + e.begin : layout.header_bytes + e.end] = np.ascontiguousarray(part).tobytes()
        files[rank] = file
    images = {r: parse(bytes(f), len(f)) for r, f in files.items()}
    return build_index(images, {r: checksum.digests_of(f) for r, f in files.items()}), files


@settings(CASES, max_examples=120)
@given(st.data())
def test_arrays_saved_on_one_grid_are_restored_onto_another_bit_for_bit(data):
    draw = data.draw
    arrays = {}
    for t in range(draw(st.integers(1, 3))):
        shape, dtype = draw(shapes(dims=3, side=5)), draw(st.sampled_from(sorted(NUMPY)))
        raw = np.random.default_rng(t).integers(0, 2 if dtype == "BOOL" else 256, prod(shape) * ITEM_BYTES[dtype], dtype=np.uint8)
        arrays[f"t{t}"] = (dtype, raw.view(NUMPY[dtype]).reshape(shape))
    index, files = saved(draw, arrays)
    wants = []
    for name, (dtype, array) in arrays.items():
        boxes = draw(st.one_of(guillotine(array.shape), grid(array.shape), st.lists(boxes_in(array.shape), max_size=3)))
        wants += [Want(name, dtype, array.shape, b) for b in boxes]
    wants = draw(st.permutations(wants))
    mine = draw(st.sampled_from([None, 0, 1]))
    copies = plan_restore(index, wants, mine=mine)

    ranges = byte_ranges(copies, {i: w.dtype for i, w in enumerate(wants)})
    read = {r: bytearray(b"\xdd" * len(f)) for r, f in files.items()}  # nothing but what the plan says it reads
    for image, parts in ranges.items():
        assert parts == merge(parts)
        assert all(a < b for a, b in parts)
        for a, b in parts:
            read[image][a:b] = files[image][a:b]

    got = [np.zeros(w.box.extent, NUMPY[w.dtype]) for w in wants]
    times = [np.zeros(w.box.extent, np.int64) for w in wants]
    for c in copies:
        want = wants[c.want]
        stored = np.frombuffer(bytes(read[c.image][c.begin : c.end]), NUMPY[want.dtype]).reshape(c.box.extent)
        source, target = c.part.relative_to(c.box), c.part.relative_to(want.box)
        there = tuple(map(slice, target.start, target.stop))
        got[c.want][there] = stored[tuple(map(slice, source.start, source.stop))]
        times[c.want][there] += 1
    for want, array, written in zip(wants, got, times, strict=True):
        expected = arrays[want.name][1][tuple(map(slice, want.box.start, want.box.stop))]
        assert array.tobytes() == np.ascontiguousarray(expected).tobytes()
        assert (written == 1).all()
    order = [(c.image != mine, c.image, c.begin) for c in copies]
    assert order == sorted(order)


@CASES
@given(st.data())
def test_span_reaches_from_the_first_element_to_the_last(data):
    extent = data.draw(shapes(dims=4, side=4))
    box = data.draw(boxes_in(extent))
    if not box.numel:
        return
    flat = np.arange(prod(extent)).reshape(extent)[tuple(map(slice, box.start, box.stop))]
    assert span(box, extent) == (flat.min(), flat.max() + 1)


@CASES
@given(st.lists(st.tuples(st.integers(0, 40), st.integers(1, 9)).map(lambda t: (t[0], t[0] + t[1])), max_size=8))
def test_merge_keeps_exactly_the_bytes(ranges):
    merged = merge(ranges)
    assert {i for a, b in ranges for i in range(a, b)} == {i for a, b in merged for i in range(a, b)}
    assert all(x[1] < y[0] for x, y in zip(merged, merged[1:], strict=False))


def small():
    layout = laid([*(p for n in ("a", "b") for p in [decl_piece(n)])])
    file = layout.render(attempt=0, step=1, objects={}).ljust(layout.image_bytes, b"\x00")
    return build_index({0: parse(file, len(file))}, {0: checksum.digests_of(file)})


def decl_piece(name):
    return plan_capture({0: [decl(name, (4, 2), [Box((0, 0), (4, 2))])]})[0][0]


def test_every_missing_or_mismatched_name_is_reported():
    whole = Box((0, 0), (4, 2))
    wants = [Want("a", "F32", (4, 2), whole), Want("no.such", "F32", (4, 2), whole), Want("b", "F32", (2, 4), whole), Want("b", "F16", (4, 2), whole),
             Want("a", "F32", (4, 2), whole, "complex")]  # fmt: skip
    with pytest.raises(StateMismatch) as caught:
        plan_restore(small(), wants)
    for told in ("no.such is missing", "b is [4, 2], wanted [2, 4]", "b is F32, wanted F16", "a is F32, wanted complex"):
        assert told in str(caught.value)
    many = [Want(f"gone{i}", "F32", (1,), Box((0,), (1,))) for i in range(30)]
    with pytest.raises(StateMismatch, match=r"gone0.*gone7 is missing; and 22 more"):
        plan_restore(small(), many)


def test_a_wanted_box_that_the_step_does_not_cover_is_refused():
    for box in (Box((0, 0), (5, 2)), Box((4, 0), (1, 2)), Box((0,), (4,)), Box((0, 0, 0), (4, 2, 1)), Box((), ())):
        with pytest.raises((NotTiled, StateMismatch), match="a"):
            plan_restore(small(), [Want("a", "F32", (4, 2), box)])
    assert plan_restore(small(), [Want("a", "F32", (4, 2), Box((2, 1), (0, 1)))]) == []


def test_a_wide_tensor_narrow_wants_and_many_ranks_plan_quickly():
    n, ranks = 50257, 96
    leaves = {r: [decl("w", (n, 8), [Box((a, 0), (k, 8))])] for r in range(ranks) for a, k in [chunk(n, ranks, r)]}
    counts = Counter(len(of) for of in plan_capture(leaves).values())
    assert counts == {1: ranks}


def test_no_rank_gets_two_parts_of_one_shared_box():
    """Stock PyTorch reads one box of a tensor per file: a second, `<name>#1`, would silently stay out of what it loads."""
    rng = random.Random(7)
    for world in (2, 3, 4, 7, 8):
        for _ in range(40):
            shapes = {f"w{i}": (rng.randrange(1, 600), rng.randrange(1, 300)) for i in range(12)}
            declared = {r: [LeafDecl(n, "F32", s, (((0, 0), s),)) for n, s in shapes.items()] for r in range(world)}
            for pieces in plan_capture(declared).values():
                assert len({p.name for p in pieces}) == len(pieces)
