"""Images that lie, are cut short or rotten: BadBytes, in bounded time, or an image that is consistent. Nothing else."""

from __future__ import annotations

import json
import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ckptd.core import checksum
from ckptd.core.boxes import Box
from ckptd.core.image import HEADER_BYTES_MAX, header_bytes_of, parse
from ckptd.core.manifest import build_index, decode_index, encode_index
from ckptd.errors import BadBytes, BadImage, CkptdError, NewerFormat
from tests.core.helpers import assert_consistent, filled, foreign, framed, laid, piece, tensor


def parsed_or_refused(header: bytes, image_bytes: int) -> bool:
    """Whether it was accepted; anything but BadBytes, or an inconsistent image, fails the test."""
    try:
        image = parse(header, image_bytes)
    except BadBytes:
        return False
    assert_consistent(image)
    return True


def sample() -> bytes:
    pieces = [piece("model.w", "F32", (6, 2), Box((0, 0), (2, 2))), piece("model.w", "F32", (6, 2), Box((4, 0), (1, 1)))]
    pieces += [piece("b", "BF16", (3,)), piece("s", "I64", ()), piece("none", "U8", (0, 2)), piece("z", "U8", (2, 16), view="complex128")]
    objects = {"rng": {"$tuple": [1, 2.5, "é"]}, "n": {"$int": str(2**100)}}
    return bytes(filled(laid(pieces, aliases={"tied": "b"}), objects=objects))


def test_every_flipped_byte_of_a_header_is_refused_or_leaves_a_consistent_image():
    data = sample()
    head = header_bytes_of(data, len(data))
    text = len(data[8:head].rstrip())
    accepted = tried = 0
    spots = [*range(8 + text + 4), *range(8 + text + 4, head, 211), head - 1]
    for at in spots:
        for mask in (0x01, 0x80, 0xFF):
            rotten = bytearray(data)
            rotten[at] ^= mask
            tried += 1
            accepted += parsed_or_refused(bytes(rotten), len(rotten))
    print(f"{tried} flips, {accepted} accepted (inside names and texts)")
    assert accepted < tried / 4


def test_every_truncation_and_every_extension_is_refused():
    data = sample()
    head = header_bytes_of(data, len(data))
    for n in [*range(300), *range(300, len(data), 37), *range(len(data) - 120, len(data))]:
        with pytest.raises(BadBytes):
            parse(data[:n], n)
        with pytest.raises(BadBytes):  # the file is cut, the header still whole
            parse(data[: max(n, head)], n)
        if n < head:
            with pytest.raises(BadBytes):
                parse(data[:n], len(data))
    for more in (1, 8, 4096):
        with pytest.raises(BadBytes):
            parse(data, len(data) + more)


@pytest.mark.parametrize("n", [0, 1, HEADER_BYTES_MAX + 1, 101_000_000, 2**31, 2**32, 2**63, 2**64 - 1])
def test_a_lying_header_length_is_refused_before_anything_is_allocated(n):
    for rest in (b"", b"{}", b"{" * 100):
        for image_bytes in (0, 8, 10, 108, 2**40, 2**63, 2**64):
            with pytest.raises(BadImage):
                parse(n.to_bytes(8, "little") + rest, image_bytes)
    for short in range(8):
        with pytest.raises(BadImage):
            parse(b"\x00" * short, 100)


@pytest.mark.parametrize("text", [
    b"[" * 100_000, b'{"a":' * 100_000, b'{"__metadata__":' + b"[" * 100_000, b"[]", b"null", b"1", b'"x"', b"", b"   ", b"{", b"{}", b"\xef\xbb\xbf{}",
    b'{"__metadata__":{}}', b'{"__metadata__":{"ckptd":1}}', b'{"__metadata__":[]}', b'{"__metadata__":null}', b'{"__metadata__":{"a":NaN}}',
    b'{"__metadata__":{"ckptd":""}}', b'{"__metadata__":{"ckptd":"[]"}}', b'{"__metadata__":{"ckptd":"{\\"format\\":1}"}}',
    b'{"__metadata__":{"ckptd":"{}","ckptd":"{}"}}', b'{"\xff":1}', b"1" * 5000, b'{"__metadata__":{"ckptd":"' + b"[" * 100_000 + b'"}}', b"\x00" * 64,
], ids=lambda t: repr(t[:24]))  # fmt: skip
def test_headers_that_are_no_map_of_tensors_are_refused(text):
    with pytest.raises(BadImage):
        parse(*framed(text))


def good(**meta):
    return foreign({"w": tensor(0, [2, 3]), "v": tensor(24, [4], "U8")}, 28, **meta)


def test_the_hand_made_header_itself_is_accepted():
    assert_consistent(parse(*good()))


def entry(**changes):
    table = {"w": {**tensor(0, [2, 3]), **changes}}
    return table, 24


@pytest.mark.parametrize(("changes", "why"), [
    ({"dtype": "F31"}, "unknown dtype"), ({"dtype": 4}, "dtype"), ({"dtype": None}, "dtype"), ({"dtype": ""}, "unknown"), ({"dtype": "F4"}, "unknown"),
    ({"dtype": "f32"}, "unknown"),
    ({"shape": [2.0, 3]}, "float"), ({"shape": [True, 24]}, "bool"), ({"shape": [-2, -3]}, "negative"), ({"shape": None}, "shape"), ({"shape": "23"}, "shape"),
    ({"shape": [2**63, 2**63]}, "fill"), ({"shape": [2**32, 2**32]}, "fill"), ({"shape": [2**64 - 6, 1]}, "fill"), ({"shape": [1] * 65 + [6]}, "dimensions"),
    ({"shape": [10**400]}, "metadata"), ({"shape": [2, 3, 0]}, "fill"), ({"shape": [3]}, "fill"), ({"shape": {"0": 2}}, "shape"),
    ({"data_offsets": [0, 25]}, "fill"), ({"data_offsets": [0, 23]}, "fill"), ({"data_offsets": [-24, 0]}, "negative"), ({"data_offsets": [24, 0]}, "fill"),
    ({"data_offsets": [4, 28]}, "hole"), ({"data_offsets": [0]}, "data_offsets"), ({"data_offsets": [0, 24, 48]}, "data_offsets"),
    ({"data_offsets": [0.0, 24.0]}, "float"), ({"data_offsets": [False, 24]}, "bool"), ({"data_offsets": [2**64 - 24, 2**64]}, "hole"),
    ({"data_offsets": "00"}, "data_offsets"), ({"surprise": 1}, "surprise"),
], ids=str)  # fmt: skip
def test_a_tensor_entry_that_lies_is_refused_and_named(changes, why):
    table, size = entry(**changes)
    shape = [2, 3] if not isinstance(changes.get("shape"), list) else changes["shape"]
    starts = {"w": {"saved_offsets": [0] * len(shape)}}
    with pytest.raises(BadImage, match=why):
        parse(*foreign(table, size, shapes={"w": [2, 3] if "shape" not in changes else [n for n in shape if type(n) is int]}, starts=starts))


@pytest.mark.parametrize("table", [
    {"w": tensor(0, [6]), "v": tensor(20, [6])}, {"w": tensor(0, [6]), "v": tensor(28, [6])}, {"w": tensor(0, [6]), "v": tensor(0, [6])},
    {"w": tensor(4, [5])}, {"w": tensor(0, [13])}, {"w": tensor(0, [12]), "z": tensor(24, [0])}, {"w": tensor(0, [12]), "z": tensor(49, [0])},
    {"w": tensor(0, [11])}, {}, {"w": 1}, {"w": []}, {"w": None}, {"w": {}},
], ids=str)  # fmt: skip
def test_overlaps_holes_and_bytes_past_the_end_are_refused(table):
    with pytest.raises(BadImage):
        parse(*foreign(table, 48))


def test_zero_sized_tensors_may_share_a_place_and_nothing_else():
    table = {"a": tensor(0, [0]), "b": tensor(0, [0, 7]), "w": tensor(0, [3]), "c": tensor(12, [0]), "d": tensor(12, [2**63, 0])}
    image = parse(*foreign(table, 12))
    assert_consistent(image)
    assert len(image.entries) == 5


@pytest.mark.parametrize("meta", [
    {"format": 0}, {"format": -1}, {"format": "1"}, {"format": True}, {"format": 1.0}, {"format": None}, {"job": None}, {"job": 1}, {"job": "\ud800"},
    {"rank": 1}, {"rank": 5, "world_size": 5}, {"rank": -1}, {"rank": 0, "world_size": 0}, {"rank": True, "world_size": 3}, {"world_size": -1},
    {"step": -1}, {"attempt": -1}, {"step": 2**64}, {"step": 1.5}, {"world_size": 2**65},
    {"coords": {"dp": 2**70}}, {"coords": {"dp": "x"}}, {"coords": [1]}, {"coords": {"\udfff": 1}},
    {"shapes": {}}, {"shapes": {"w": [2, 3]}}, {"shapes": {"w": [2, 2], "v": [4]}}, {"shapes": {"w": [2], "v": [4]}}, {"shapes": {"w": [2, 3, 1], "v": [4]}},
    {"shapes": {"w": [-2, -3], "v": [4]}}, {"shapes": {"w": [2.0, 3], "v": [4]}}, {"shapes": {"w": [], "v": [4]}}, {"shapes": {"w": [1, 6], "v": [4]}},
    {"shapes": {"w": None, "v": [4]}},
    {"starts": {}}, {"starts": {"w": {"saved_offsets": [0, 0]}}}, {"starts": {"w": {}, "v": {}}}, {"starts": []}, {"starts": {"w": 1}},
    {"starts": {"w": {"saved_offsets": [1, 0]}, "v": {"saved_offsets": [0]}}}, {"starts": {"w": {"saved_offsets": [-1, 0]}, "v": {"saved_offsets": [0]}}},
    {"starts": {"w": {"saved_offsets": [0]}, "v": {"saved_offsets": [0]}}}, {"starts": {"w": {"saved_offsets": [0, 0.0]}, "v": {"saved_offsets": [0]}}},
    {"starts": {"w": {"saved_offsets": [2**63, 2**63]}, "v": {"saved_offsets": [0]}}},
    {"extra": {"w": ["v", [0, 0]]}}, {"extra": {"w": ["w", [1, 0]]}}, {"extra": {"w": ["nobody", [0, 0]]}}, {"extra": {"w": ["w"]}}, {"extra": {"w": 1}},
    {"extra": {"w": ["w", "00"]}}, {"extra": {"w": ["w", [0, 0, 0]]}},
    {"views": {"w": 1}}, {"views": []}, {"aliases": {"a": 1}}, {"aliases": {"\ud800": "w"}}, {"objects": []}, {"objects": {"a": 2**64}},
    {"objects": {"a": ["x", {"\udc80": 1}]}}, {"objects": {"a": "\udc80"}},
], ids=str)  # fmt: skip
def test_metadata_that_lies_is_refused(meta):
    with pytest.raises(BadImage):
        parse(*good(**meta))


@pytest.mark.parametrize("version", [2, 3, 2**40, 2**70])
def test_a_newer_format_is_said_to_be_newer_whatever_else_it_has(version):
    with pytest.raises(NewerFormat, match="newer"):
        parse(*good(format=version, shapes=7, rank="new meaning"))


def test_unknown_metadata_fields_are_left_for_later_versions():
    assert_consistent(parse(*good(surprise={"a": [1]})))


def test_keys_that_stand_twice_are_refused_wherever_they_stand():
    header, size = good()
    text = header[8:].decode()
    ckptd = json.loads(text)["__metadata__"]["ckptd"]
    w = json.dumps(tensor(0, [2, 3]))
    for twice in (
        text.replace('{"w"', f'{{"w": {w}, "w"', 1),
        text.replace('"dtype": "F32"', '"dtype": "F32", "dtype": "F32"', 1),
        text.replace('"format": "pt"', '"format": "pt", "format": "pt"', 1),
        text.replace(json.dumps(ckptd), json.dumps(ckptd.replace('"rank": 0', '"rank": 0, "rank": 0')), 1),
        text.replace('\\"saved_offsets\\": [0]', '\\"saved_offsets\\": [0], \\"saved_offsets\\": [0]', 1),
    ):
        assert twice != text
        with pytest.raises(BadImage, match="stands twice"):
            parse(*framed(twice.encode(), 28))


def test_other_encodings_than_utf_8_are_refused():
    header, _ = good(job="é")
    text = header[8:].decode()
    for coded in (text.encode("utf-16"), text.encode("utf-16-le"), text.encode("utf-32"), text.encode("utf-8-sig")):
        with pytest.raises(BadImage):
            parse(*framed(coded, 28))
    assert b"format" in header
    for bad in (b"\xed\xa0\x80", b"\xff", b"\xc0\xaf"):
        with pytest.raises(BadImage):
            parse(*framed(header[8:].replace(b'"pt"', b'"' + bad + b'"', 1), 28))


def test_a_foreign_safetensors_file_is_said_to_be_foreign():
    torch = pytest.importorskip("torch")
    from safetensors.torch import save

    for metadata in (None, {}, {"format": "pt"}):
        data = save({"w": torch.zeros(3)}, metadata)
        with pytest.raises(BadImage, match=r"not written by ckptd|__metadata__"):
            parse(data, len(data))


def test_a_hundred_thousand_tensors_are_parsed_in_seconds():
    n = 100_000
    table = {f"t{i}": tensor(4 * i, [1]) for i in range(n)}
    header, size = foreign(table, 4 * n)
    begun = time.perf_counter()
    image = parse(header, size)
    took = time.perf_counter() - begun
    assert len(image.entries) == n
    print(f"{n} tensors, a header of {len(header) >> 20} MiB, in {took:.2f} s")
    assert took < 10


def test_a_world_size_that_lies_does_not_cost_memory():
    header, size = good(world_size=10**12)
    image = parse(header, size)
    begun = time.perf_counter()
    with pytest.raises(CkptdError, match="missing"):
        build_index({0: image}, {0: checksum.digests_of(bytes(size))})
    assert time.perf_counter() - begun < 1


json_values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(), st.text(max_size=3), st.sampled_from([0, 1, 2, 24, 28, 2**63, "F32", "w"])),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.sampled_from(["w", "v", "dtype", "$int", "\ud800"]), inner, max_size=2)),
    max_leaves=4,
)
META_FIELDS = ["format", "job", "rank", "world_size", "coords", "shapes", "extra", "views", "aliases", "attempt", "step", "objects", "starts"]


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.dictionaries(st.sampled_from(META_FIELDS), json_values, max_size=2), st.sampled_from(["w", "v"]),
       st.dictionaries(st.sampled_from(["dtype", "shape", "data_offsets", "x"]), json_values, max_size=1))  # fmt: skip
def test_any_junk_in_any_field_is_refused_or_harmless_and_then_fits_an_index(meta, which, changes):
    table = {"w": tensor(0, [2, 3]), "v": tensor(24, [4], "U8")}
    table[which] = {**table[which], **changes}
    header, size = foreign(table, 28, **{"shapes": {"w": [2, 3], "v": [4]}, "starts": {"w": {"saved_offsets": [0, 0]}, "v": {"saved_offsets": [0]}}, **meta})
    if not parsed_or_refused(header, size):
        return
    image = parse(header, size)
    try:
        index = build_index({image.meta.rank: image}, {image.meta.rank: checksum.digests_of(bytes(size))})
        assert decode_index(encode_index(index)) == index
    except CkptdError:
        pass
