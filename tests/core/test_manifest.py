"""Index and manifest: read back as written; check_* catch every disagreement."""

from __future__ import annotations

from dataclasses import replace

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ckptd.core import checksum
from ckptd.core.boxes import Box
from ckptd.core.image import ITEM_BYTES, parse
from ckptd.core.manifest import (
    Index,
    Manifest,
    build_index,
    check_agreement,
    check_index_bytes,
    check_rows,
    decode_index,
    decode_manifest,
    encode_index,
    encode_manifest,
    image_name,
    make_manifest,
    names_missing,
)
from ckptd.errors import BadBytes, BadManifest, ChecksumMismatch, NotTiled
from tests.core.helpers import filled, grid, guillotine, laid, piece, shapes, small_index

CASES = settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=5)


@st.composite
def steps(draw):
    """Images of one step: random tensors, cut at random, dealt to random ranks."""
    ranks = draw(st.integers(1, 4))
    held = {r: [] for r in range(ranks)}
    for name in draw(st.lists(TEXT.filter(lambda n: n != "__metadata__"), unique=True, max_size=4)):
        shape, dtype = draw(shapes(side=4)), draw(st.sampled_from(sorted(ITEM_BYTES)))
        view = draw(st.sampled_from(["", "complex128"]))
        for box in dict.fromkeys(draw(guillotine(shape) if draw(st.booleans()) else grid(shape))):
            held[draw(st.integers(0, ranks - 1))].append(piece(name, dtype, shape, box, view))
    return {
        r: parse(bytes(f), len(f))
        for r, p in held.items()
        for f in [filled(laid(p, rank=r, world_size=ranks, coords={"pp": r}), objects={"o": {"$tuple": [r, 0.1, None, True, "é"]}})]
    }


@CASES
@given(steps())
def test_an_index_and_its_manifest_are_read_back_as_written(images):
    digests = {r: bytes(16 * checksum.block_count(i.image_bytes)) for r, i in images.items()}
    index = build_index(images, digests)
    data = encode_index(index)
    back = decode_index(data)
    assert back == index
    assert encode_index(back) == data
    for rank, image in images.items():
        check_rows(back, rank, image)
    manifest = make_manifest(index, data, created_unix_s=1.7e9 + 0.1)
    again = decode_manifest(encode_manifest(manifest))
    assert again == manifest
    check_index_bytes(again, data)
    check_agreement(again, back)
    assert names_missing(index, [*index.tensors, "no such", "nor this"]) == ["no such", "nor this"]


def test_the_manifest_says_its_checksum_and_names_every_image():
    index, files = small_index(3)
    manifest = make_manifest(index, b"xyz", created_unix_s=1.0)
    assert (manifest.checksum, manifest.block_bytes) == ("xxh3-128", 1 << 20)
    assert [(i.rank, i.name, i.bytes) for i in manifest.images] == [(r, image_name(r), len(files[r])) for r in range(3)]
    assert index.aliases == {"tied": "model.a"}


def test_build_index_refuses_images_that_do_not_belong_together():
    index, files = small_index(3)
    images = {r: parse(bytes(f), len(f)) for r, f in files.items()}
    digests = {r: checksum.digests_of(f) for r, f in files.items()}
    build_index(images, digests)

    def other(**changes):
        return {**images, 1: replace(images[1], meta=msgspec.structs.replace(images[1].meta, **changes))}

    bad = [other(job="k"), other(step=8), other(attempt=2), other(world_size=4), other(rank=2), {}, {0: images[0], 1: images[1]}, {1: images[0]}]
    bad += [{**images, 3: images[2]}]
    for these in bad:
        with pytest.raises(BadManifest):
            build_index(these, {**digests, 3: digests[2]})
    with pytest.raises(BadManifest, match="bytes of checksums"):
        build_index(images, {**digests, 1: digests[1][:-1]})
    for info in (piece("model.w", "F16", (6, 3), Box((2, 0), (2, 3))), piece("model.w", "F32", (7, 3), Box((2, 0), (2, 3))),
                 piece("model.w", "F32", (6, 3), Box((2, 0), (2, 3)), "other")):  # fmt: skip
        f = filled(laid([info], rank=1, world_size=3))
        with pytest.raises(BadManifest, match=r"^model\.w: image 1 says"):
            build_index({**images, 1: parse(bytes(f), len(f))}, digests)
    for box in (Box((2, 0), (2, 2)), Box((1, 0), (3, 3)), Box((0, 0), (0, 3))):
        f = filled(laid([piece("model.w", "F32", (6, 3), box)], rank=1, world_size=3))
        with pytest.raises(NotTiled, match=r"^model\.w: "):
            build_index({**images, 1: parse(bytes(f), len(f))}, digests)


def test_check_rows_catches_two_swapped_tensors_of_one_shape():
    index, files = small_index(2)
    image = parse(bytes(files[0]), len(files[0]))
    rows = {**index.rows, "model.a": index.rows["model.b"], "model.b": index.rows["model.a"]}
    lying = decode_index(encode_index(replace_index(index, rows=rows)))
    with pytest.raises(BadManifest, match=r"disagree about \['model.a', 'model.b'\]"):
        check_rows(lying, 0, image)
    check_rows(lying, 1, parse(bytes(files[1]), len(files[1])))


def replace_index(index: Index, **changes) -> Index:
    fields = {f: getattr(index, f) for f in ("job", "attempt", "step", "world_size", "images", "tensors", "rows")}
    return Index(**{**fields, **changes})


def test_check_rows_catches_every_disagreement_between_index_and_header():
    index, files = small_index(2)
    image = parse(bytes(files[0]), len(files[0]))
    check_rows(index, 0, image)
    held = index.images[0]

    def with_image(**changes):
        return replace_index(index, images={**index.images, 0: msgspec.structs.replace(held, **changes)})

    lying = [
        replace_index(index, job="k"), replace_index(index, step=8), replace_index(index, attempt=9),
        with_image(header_bytes=held.header_bytes - 8), with_image(image_bytes=held.image_bytes + 8),
        with_image(objects={"rng": {"$tuple": [5, 1.5, "é", None]}}), with_image(objects={}), with_image(coords={"dp": 1}),
        with_image(aliases={"tied": "model.b"}),
        replace_index(index, tensors={**index.tensors, "model.a": msgspec.structs.replace(index.tensors["model.a"], dtype="F16")}),
        replace_index(index, tensors={**index.tensors, "model.a": msgspec.structs.replace(index.tensors["model.a"], view="x")}),
    ]  # fmt: skip
    for one in lying:
        with pytest.raises(BadManifest, match="^image 0: "):
            check_rows(one, 0, image)
    with pytest.raises(BadManifest):
        check_rows(index, 1, image)


def test_check_agreement_and_check_index_bytes_catch_another_steps_index():
    index, _ = small_index(2)
    data = encode_index(index)
    manifest = make_manifest(index, data, created_unix_s=0.0)
    for wrong in (data[:-1], data + b"\x00", data[:-1] + bytes([data[-1] ^ 1]), b""):
        with pytest.raises(ChecksumMismatch):
            check_index_bytes(manifest, wrong)
    for changes in ({"job": "k"}, {"step": 8}, {"attempt": 2}):
        with pytest.raises(BadManifest):
            check_agreement(manifest, replace_index(index, **changes))
    images = {**index.images, 1: msgspec.structs.replace(index.images[1], image_bytes=index.images[1].image_bytes + 1)}
    with pytest.raises(BadManifest):
        check_agreement(manifest, replace_index(index, images=images))


def test_a_manifest_that_would_not_read_back_is_not_written():
    index, _ = small_index(1)
    manifest = make_manifest(index, b"x", created_unix_s=1.0)
    for changes in ({"created_unix_s": float("nan")}, {"created_unix_s": float("inf")}, {"job": "\ud800"}):
        with pytest.raises(BadBytes):
            encode_manifest(msgspec.structs.replace(manifest, **changes))
    for changes in ({"world_size": 2}, {"world_size": 10**15}, {"world_size": 0, "images": []}, {"step": -1}, {"step": 2**70}, {"version": 0}, {"format": "x"}, {"checksum": "md5"}):
        with pytest.raises(ValueError):
            Manifest(**{f: getattr(manifest, f) for f in Manifest.__struct_fields__} | changes)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 5 << 20), st.integers(0, 5 << 20))
def test_blocks_of_a_range_are_those_that_it_touches(a, b):
    begin, end = min(a, b), max(a, b)
    blocks = list(checksum.blocks_of(begin, end))
    touched = [i for i in range(6) if max(begin, checksum.extent_of(i, 6 << 20)[0]) < min(end, checksum.extent_of(i, 6 << 20)[1])]
    assert blocks == touched


def test_digests_cover_every_block_and_a_flip_is_found_in_its_own_block():
    data = bytearray(bytes(range(256)) * 4096 * 2 + b"tail")
    digests = checksum.digests_of(data)
    assert len(digests) == 16 * checksum.block_count(len(data)) == 48
    assert checksum.digests_of(b"") == b""
    data[(1 << 20) + 5] ^= 1
    for block in range(3):
        begin, end = checksum.extent_of(block, len(data))
        if block == 1:
            with pytest.raises(ChecksumMismatch, match="block 1 "):
                checksum.check_block("image", block, data[begin:end], digests)
        else:
            checksum.check_block("image", block, memoryview(data)[begin:end], digests)
    with pytest.raises(ChecksumMismatch):
        checksum.check_block("image", 3, b"", digests)
