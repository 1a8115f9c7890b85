"""Images: what is laid out is read back, by us and by the safetensors library, aligned and without holes."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ckptd.core import typed
from ckptd.core.boxes import Box
from ckptd.core.image import ALIGN_BYTES, DIMS_MAX, ITEM_BYTES, parse
from ckptd.errors import Unstorable
from tests.core.helpers import assert_consistent, boxes_in, filled, grid, laid, piece, shapes

CASES = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))

NAMES = ["w", "w#1", "w#2", "w#1#1", "model.läyer.✓", 'a"b\\', "", " ", "a\nb\x00", "𝔘", "ckptd", "__metadata", "{", "}}", "zz" * 50]
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=6)
names = st.one_of(st.sampled_from(NAMES), TEXT).filter(lambda n: n != "__metadata__")


@st.composite
def piece_lists(draw):
    """Some tensors, each cut in several boxes; not all of the boxes are ours."""
    pieces = []
    for name in draw(st.lists(names, unique=True, max_size=5)):
        shape, dtype = draw(shapes(dims=3, side=4)), draw(st.sampled_from(sorted(ITEM_BYTES)))
        view = draw(st.sampled_from(["", "", "complex128"]))
        mine = [b for b in draw(grid(shape)) if draw(st.booleans())] or [draw(boxes_in(shape))]
        pieces += [piece(name, dtype, shape, b, view) for b in dict.fromkeys(mine)]
    return draw(st.permutations(pieces))


values = st.one_of(st.integers(-(2**90), 2**90), st.floats(), st.text(max_size=6), st.binary(max_size=6))


@CASES
@given(piece_lists(), st.dictionaries(TEXT, values, max_size=3), st.integers(0, 2**62), st.integers(0, 9))
def test_what_is_laid_out_is_parsed_back(pieces, state, step, rank):
    objects = {k: typed.encode(v, k, lambda *_: None) for k, v in state.items()}
    where = {"job": 'a job "x"', "rank": rank, "world_size": 10, "coords": {"dp": rank, "tp": 0}, "aliases": {"b": "a"}}
    layout = laid(pieces, objects_bytes=len(json.dumps(objects)), **where)
    header = layout.render(attempt=3, step=step, objects=objects)
    assert len(header) == layout.header_bytes
    assert layout.header_bytes % ALIGN_BYTES == 0
    image = parse(memoryview(header), layout.image_bytes)
    assert_consistent(image)
    assert len(image.entries) == len(layout.entries) == len(pieces) == len({e.key for e in layout.entries})
    assert {*image.entries} == {*layout.entries}
    assert {e.piece for e in image.entries} == {*pieces}
    assert all(e.begin % ITEM_BYTES[e.piece.dtype] == 0 for e in image.entries)
    assert (image.header_bytes, image.image_bytes) == (layout.header_bytes, layout.image_bytes)
    said = {f: getattr(image.meta, f) for f in where}
    assert said == where
    assert (image.meta.attempt, image.meta.step, image.meta.objects) == (3, step, objects)
    for key, value in state.items():
        assert repr(typed.decode(image.meta.objects[key], lambda *_: None)) == repr(value)
    assert same(layout.recognise(memoryview(header), layout.image_bytes), image)


def same(one, other):
    return (one.header_bytes, one.image_bytes, {*one.entries}, one.meta) == (other.header_bytes, other.image_bytes, {*other.entries}, other.meta)


@CASES
@given(piece_lists(), st.data())
def test_what_is_recognised_is_what_is_parsed(pieces, data):
    """Another header, or a broken one, is recognised only as what the parser says of it."""
    layout = laid(pieces, objects_bytes=200)
    header = bytearray(layout.render(attempt=3, step=7, objects={"a": [1, "x"], "b": {"$tuple": []}}))
    text_end = len(header.rstrip(b" "))
    for _ in range(60):
        broken = bytearray(header)
        at = data.draw(st.one_of(st.integers(0, len(header) - 1), st.integers(max(0, text_end - 120), text_end)))
        match data.draw(st.sampled_from(["flip", "cut", "insert", "quote"])):
            case "flip":
                broken[at] ^= data.draw(st.sampled_from([1, 2, 4, 16, 32, 128]))
            case "cut":
                del broken[at]
                broken.append(32)
            case "insert":
                broken.insert(at, data.draw(st.sampled_from(b'0-9"\\{}[],: \n')))
                del broken[-1]
            case _:
                broken[at : at + 1] = b'"'
        size = layout.image_bytes + data.draw(st.sampled_from([0, 0, 0, 1, -1]))
        found = layout.recognise(memoryview(bytes(broken)), size)
        if found is not None:
            assert same(found, parse(bytes(broken), size))


def test_another_layout_is_not_recognised():
    one, two = laid([piece("a", "F32", (2, 2))]), laid([piece("b", "F32", (2, 2))])
    header = one.render(attempt=1, step=2, objects={})
    assert two.recognise(header, one.image_bytes) is None
    assert one.recognise(b"", 0) is None


@CASES
@given(pieces=piece_lists())
def test_the_safetensors_library_opens_it_and_sees_the_same_bytes(pieces):
    safetensors = pytest.importorskip("safetensors")
    layout = laid(pieces)
    data = bytes(filled(layout))
    try:
        theirs = dict(safetensors.deserialize(data))
    except safetensors.SafetensorError as e:
        pytest.fail(f"{e}: {data[8:300]!r}")
    assert set(theirs) == {e.key for e in layout.entries}
    for e in layout.entries:
        told = theirs[e.key]
        assert (told["dtype"], tuple(told["shape"])) == (e.piece.dtype, e.piece.box.extent)
        assert bytes(told["data"]) == data[layout.header_bytes + e.begin : layout.header_bytes + e.end]


def test_safe_open_gives_torch_tensors_of_every_dtype(tmp_path):
    torch = pytest.importorskip("torch")
    from safetensors import safe_open

    pieces = [piece(f"t.{d}", d, s) for d in ITEM_BYTES for s in ((3, 5),)] + [piece("scalar", "I64", ()), piece("none", "F32", (0, 2))]
    pieces += [piece("cut", "F32", (9, 2), Box((0, 0), (2, 2))), piece("cut", "F32", (9, 2), Box((4, 1), (3, 1)))]
    layout = laid(pieces)
    data = bytes(filled(layout))
    path = tmp_path / "r.safetensors"
    path.write_bytes(data)
    with safe_open(path, "pt") as f:
        assert f.metadata()["format"] == "pt"
        for e in layout.entries:
            got = f.get_tensor(e.key)
            assert tuple(got.shape) == e.piece.box.extent
            raw = got.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
            assert raw == data[layout.header_bytes + e.begin : layout.header_bytes + e.end], e.key
    print(f"{len(layout.entries)} tensors of {len(ITEM_BYTES)} dtypes")


def test_further_boxes_are_numbered_and_stay_clear_of_tensors_that_are_called_so():
    boxes = [Box((i,), (1,)) for i in range(3)]
    pieces = [piece("x", "F32", (3,), b) for b in boxes] + [piece("x#1", "F32", (2,)), piece("x#1", "F32", (2,), Box((0,), (0,)))]
    layout = laid(pieces)
    keys = {e.key: e.piece for e in layout.entries}
    assert len(keys) == 5
    assert keys["x"].box == boxes[0]
    assert keys["x#1"].name == "x#1"
    assert [keys[k].box for k in ("x#2", "x#3")] == boxes[1:]
    image = parse(layout.render(attempt=0, step=0, objects={}), layout.image_bytes)
    assert {e.key: e.piece for e in image.entries} == keys


def test_names_and_shapes_that_could_not_be_read_back_are_refused_by_name():
    for bad in (piece("__metadata__"), piece("a\ud800b"), piece("deep", "F32", (1,) * (DIMS_MAX + 1))):
        with pytest.raises(Unstorable, match=r"__metadata__|a.*b|deep"):
            laid([piece("ok"), bad])
    layout = laid([piece("deep", "F32", (1,) * DIMS_MAX)])
    assert_consistent(parse(layout.render(attempt=0, step=0, objects={}), layout.image_bytes))


def test_objects_of_the_announced_size_fit_however_they_are_quoted():
    objects = {"a": '"\\' * 5000}
    layout = laid([piece("w")], objects_bytes=len(json.dumps(objects, separators=(",", ":"))))
    header = layout.render(attempt=2**62, step=2**62, objects=objects)
    assert parse(header, layout.image_bytes).meta.objects == objects
    with pytest.raises(OverflowError):
        layout.render(attempt=1, step=1, objects={"a": "x" * layout.header_bytes})


def test_objects_nested_to_the_limit_pass_through_the_header():
    value = 1j
    for _ in range(typed.DEPTH_MAX):
        value = {1: value}
    objects = {"deep": typed.encode(value, "deep", lambda *_: None)}
    layout = laid([], objects_bytes=len(json.dumps(objects)))
    image = parse(layout.render(attempt=0, step=0, objects=objects), layout.image_bytes)
    assert typed.decode(image.meta.objects["deep"], lambda *_: None) == value


def test_a_header_over_safetensors_limit_is_refused_before_it_is_made():
    with pytest.raises(Unstorable, match="over safetensors' limit"):
        laid([piece("w")], objects_bytes=50_000_000)


def test_the_same_pieces_in_any_order_give_the_same_bytes():
    pieces = [piece(n, d) for n in ("b", "a") for d in ("F32",)] + [piece("c", "BF16"), piece("d", "I64"), piece("e", "U8")]
    heads = {laid(p).render(attempt=1, step=2, objects={}) for p in (pieces, pieces[::-1])}
    assert len(heads) == 1
    order = [e.key for e in laid(pieces).entries]
    assert order == ["d", "a", "b", "c", "e"]


def test_the_data_of_a_filled_image_lies_where_the_entries_say():
    layout = laid([piece("w", "F32", (4,)), piece("v", "U8", (3,))])
    image = filled(layout)
    values = np.arange(4, dtype=np.float32)
    entry = next(e for e in layout.entries if e.key == "w")
    image[layout.header_bytes + entry.begin : layout.header_bytes + entry.end] = values.tobytes()
    assert len(image) == layout.image_bytes
    again = parse(bytes(image), len(image)).entries[0]
    assert (np.frombuffer(image, np.float32, 4, layout.header_bytes + again.begin) == values).all()
