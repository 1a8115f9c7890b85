"""Manifests and indexes that rot or lie: only errors of our tree, never a success that differs, never a bomb."""

from __future__ import annotations

import hashlib
import json
import random
import subprocess
import sys
import time

import msgspec
import pytest
import zstandard

from ckptd.core.manifest import _IndexFile, decode_index, decode_manifest, encode_index, encode_manifest, make_manifest
from ckptd.errors import BadBytes, BadManifest, ChecksumMismatch, NewerFormat, NotTiled
from tests.core.helpers import small_index


def refused_or_equal(decode, data: bytes, original: object) -> bool:
    """Whether it was accepted; then it must say what the original says. Only BadBytes may come otherwise."""
    try:
        back = decode(data)
    except BadBytes:
        return False
    assert back == original
    return True


@pytest.mark.parametrize("kind", ["index", "manifest"])
def test_every_flipped_byte_and_every_truncation_is_refused_or_means_the_same(kind):
    index, _ = small_index(2)
    data, original, decode = encode_index(index), index, decode_index
    if kind == "manifest":
        original = make_manifest(index, data, created_unix_s=1.7e9)
        data, decode = encode_manifest(original), decode_manifest
    accepted = 0
    masks = [1 << b for b in range(8)] + [0xFF]
    for at in range(len(data)):
        for mask in masks:
            rotten = bytearray(data)
            rotten[at] ^= mask
            accepted += refused_or_equal(decode, bytes(rotten), original)
    cut = sum(refused_or_equal(decode, data[:n], original) for n in range(len(data)))
    print(f"{kind}: {len(data) * len(masks)} flips, {accepted} say the same; {len(data)} truncations, {cut} say the same")
    assert accepted <= 30  # a reserved bit of the zstd frame; the case of hexadecimal digits in JSON escapes, blanks
    assert cut == (kind == "manifest")  # the newline at the end
    for more in (b"x", b"\x00", data):
        assert not refused_or_equal(decode, data + more, original)


def unpacked(index) -> dict:
    return msgspec.msgpack.decode(zstandard.ZstdDecompressor().decompress(encode_index(index)))


def packed(table: object) -> bytes:
    return zstandard.ZstdCompressor().compress(msgspec.msgpack.encode(table))


def changed(**columns) -> bytes:
    return packed({**unpacked(small_index(2)[0]), **columns})


def test_the_repacked_index_itself_is_accepted():
    assert decode_index(changed()) == small_index(2)[0]


def lying_indexes():
    t = unpacked(small_index(2)[0])
    images = t["images"]
    n = len(t["tensor"])
    w = t["names"].index("model.w")
    first_w = t["tensor"].index(w)
    yield from (("missing " + k, {x: y for x, y in t.items() if x != k}) for k in t)
    for column in ("names", "dtypes", "views", "shapes", "tensor", "image", "begin", "end", "starts", "extents", "images"):
        yield f"{column} one short", {**t, column: t[column][:-1]}
        yield f"{column} one long", {**t, column: [*t[column], t[column][-1]]}
        yield f"{column} empty", {**t, column: []}
        yield f"{column} no list", {**t, column: 1}
        yield f"{column} of another type", {**t, column: [1.5] * len(t[column])}
    for column in ("tensor", "image", "begin", "end", "starts", "extents"):
        for value in (-1, 2**62, 2**64 - 1, True, 1.0, None):
            yield f"{column}[0] = {value}", {**t, column: [value, *t[column][1:]]}
    for field in ("attempt", "step", "world_size"):
        for value in (-1, -(2**63), True, "1", None):
            yield f"{field} = {value}", {**t, field: value}
    for value in (0, 1, 3, 10**9, 10**12, 2**62):
        yield f"world_size = {value}", {**t, "world_size": value}
    yield "nothing at all", {**t, "world_size": 0, "images": [], "names": [], "dtypes": [], "views": [], "shapes": [], "tensor": [],
                             "image": [], "begin": [], "end": [], "starts": [], "extents": []}  # fmt: skip
    yield "another block size", {**t, "block_bytes": 4096}
    yield "an unknown field", {**t, "surprise": 1}
    yield "a name twice", {**t, "names": [t["names"][0]] * len(t["names"])}
    yield "an unknown dtype", {**t, "dtypes": ["F31"] * len(t["dtypes"])}
    yield "a negative shape", {**t, "shapes": [[-1, -1]] * len(t["shapes"])}
    yield "the ranks swapped", {**t, "images": [{**images[0], "rank": 1}, {**images[1], "rank": 1}]}
    yield "negative sizes", {**t, "images": [{**images[0], "image_bytes": -5, "header_bytes": -9, "digests": b""}, images[1]]}
    for change in ({"rank": 5}, {"rank": -1}, {"image_bytes": 100}, {"image_bytes": 0, "digests": b""}, {"header_bytes": 2**40}, {"header_bytes": -1},
                   {"digests": b""}, {"digests": images[0]["digests"] + b"x"}, {"digests": "text"}, {"coords": {"dp": 1.5}}, {"coords": {1: 1}},
                   {"aliases": {"a": 1}}, {"objects": []}, {"objects": {1: 1}}):  # fmt: skip
        yield f"image 0: {change}", {**t, "images": [{**images[0], **change}, images[1]]}
    at = sum(len(t["shapes"][i]) for i in t["tensor"][:first_w])
    for what, start in (("an overlap", [0, 0]), ("a hole", [1, 0])):
        starts = [*t["starts"]]
        starts[at : at + 2] = [2, 0] if what == "an overlap" else [5, 0]
        yield what, {**t, "starts": starts}
    yield "one image for all", {**t, "image": [0] * n}
    yield "an image that is not there", {**t, "image": [7] * n}
    yield "all begin at 0", {**t, "begin": [0] * n}
    yield "not a map", [t]
    yield "a text", "index"
    yield "nothing", None


LYING = list(lying_indexes())


@pytest.mark.parametrize(("what", "table"), LYING, ids=[w for w, _ in LYING])
def test_an_index_that_lies_is_refused_at_once(what, table):
    begun = time.perf_counter()
    with pytest.raises((BadManifest, NotTiled)):
        decode_index(packed(table))
    assert time.perf_counter() - begun < 1


def test_newer_formats_are_said_to_be_newer_whatever_else_they_have():
    with pytest.raises(NewerFormat, match="upgrade ckptd"):
        decode_index(packed({"version": 2, "new": [1]}))
    with pytest.raises(NewerFormat, match="upgrade ckptd"):
        decode_manifest(json.dumps({"format": "ckptd-manifest", "version": 2, "new": [1]}).encode())
    for not_newer in (True, "2", 0, -1, 2.0, None):
        with pytest.raises(BadBytes):
            decode_index(changed(version=not_newer) if not_newer is not True else packed({"version": True}))


RAW = [
    b"", b"\x00", b"\x28\xb5\x2f\xfd", b"not zstd at all", b"\x50\x2a\x4d\x18\x04\x00\x00\x00abcd", b"\x28\xb5\x2f\xfd\xe0" + b"\xff" * 16,
    zstandard.ZstdCompressor(write_content_size=False).compress(b"\x80"), zstandard.ZstdCompressor().compress(b""),
    *(zstandard.ZstdCompressor().compress(b) for b in (
        b"\xc1", b"\xdd\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff", b"\x81\xa1a\xdd\xff\xff\xff\xff", b"\xc6\xff\xff\xff\xff", b"\xa1\xff", b"\x81\xa1\xff\x01",
        b"\x81\xa1a" + b"\x91" * 100_000, b"\x81" * 100_000, b"\x81\x91\x01\x01", b"\x81\xa1a\x81\x81\x01\x01\x01", b"\x81\xa1a\xd6\xff\xff\xff\xff\xff",
        b"\x81\xa1a\xc7\x0c\xff" + b"\xff" * 12, b"\x81\xa1a\xcb\x7f\xf8" + b"\x00" * 6, b"\x80\x80",
    )),
]  # fmt: skip


@pytest.mark.parametrize("data", RAW, ids=lambda d: d[:24].hex() or "empty")
def test_bytes_that_are_no_index_are_refused(data):
    with pytest.raises(BadManifest):
        decode_index(data)


def test_thousands_of_random_changes_inside_the_frame_raise_nothing_foreign():
    original = msgspec.msgpack.encode(unpacked(small_index(2)[0]))
    rng = random.Random(7)
    packer = zstandard.ZstdCompressor()
    accepted = 0
    rounds = 6000
    for _ in range(rounds):
        raw = bytearray(original)
        for _ in range(rng.randint(1, 3)):
            at = rng.randrange(len(raw))
            how = rng.randrange(3)
            if how == 0:
                raw[at] = rng.randrange(256)
            elif how == 1:
                raw[at : at + rng.randint(1, 9)] = b""
            else:
                raw[at:at] = rng.choice([b"\xc0", b"\xff", b"\xd3" + b"\x80" + b"\x00" * 7, b"\xcf" + b"\xff" * 8, b"\x00", b"\xc2"])
        try:
            index = decode_index(packer.compress(bytes(raw)))
            assert decode_index(encode_index(index)) == index
            accepted += 1
        except BadBytes:
            pass
    print(f"{rounds} changed indexes, {accepted} consistent in themselves (the manifest's sha256 is what refuses those)")


BOMBS = """
import resource, sys, time
sys.path.insert(0, ".")
import zstandard
from ckptd.core.manifest import decode_index
from ckptd.errors import BadManifest
resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))
def declares(n):  # a frame header that declares n bytes, and an empty block
    return b"\\x28\\xb5\\x2f\\xfd\\xe0" + n.to_bytes(8, "little") + b"\\x01\\x00\\x00"
for n in (5, 1 << 20, 3 << 30, (4 << 30) + 1, 1 << 40, 1 << 63, (1 << 64) - 3):
    try:
        decode_index(declares(n))
        sys.exit(f"{n} accepted")
    except BadManifest as e:
        print(n, e)
compressor = zstandard.ZstdCompressor().compressobj(size=3 << 30)
zeros = bytes(1 << 20)
bomb = b"".join(compressor.compress(zeros) for _ in range(3 << 10)) + compressor.flush()
try:
    decode_index(bomb)
    sys.exit("accepted")
except BadManifest as e:
    print(len(bomb), e)
"""


def test_a_zstd_bomb_is_refused_within_a_gibibyte_of_address_space():
    done = subprocess.run([sys.executable, "-c", BOMBS], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    print(done.stdout)


def sealed(body: dict) -> bytes:
    canonical = json.dumps(body, sort_keys=True, separators=(",", ":")).encode()
    return json.dumps({**body, "sha256": hashlib.sha256(canonical).hexdigest()}).encode()


def manifest_body() -> dict:
    index, _ = small_index(2)
    body = json.loads(encode_manifest(make_manifest(index, b"x", created_unix_s=1.5)))
    body.pop("sha256")
    return body


def lying_manifests():
    b = manifest_body()
    one, two = b["images"]
    yield from (("missing " + k, {x: y for x, y in b.items() if x != k}) for k in b if k not in {"format", "version", "checksum", "block_bytes"})
    for field in ("attempt", "step", "world_size", "block_bytes", "created_unix_s"):
        for value in (-1, True, "1", None, 10**400, 2**63, []):
            if value not in ((-1, 2**63) if field == "created_unix_s" else ()):
                yield f"{field} = {str(value)[:20]}", {**b, field: value}
    for value in (0, 1, 3, 10**9, 10**12, 2**62):
        yield f"world_size = {value}", {**b, "world_size": value}
    yield "no ranks", {**b, "world_size": 0, "images": []}
    yield "swapped", {**b, "images": [two, one]}
    yield "twice", {**b, "images": [one, one]}
    for change in ({"name": "../../etc/passwd"}, {"name": "/images/r00000.safetensors"}, {"name": "images/r00001.safetensors"}, {"rank": 1}, {"rank": -1},
                   {"bytes": -1}, {"bytes": 1.5}, {"x": 1}):  # fmt: skip
        yield f"image {change}", {**b, "images": [{**one, **change}, two]}
    for change in ({"name": "other"}, {"name": "../index.msgpack.zst"}, {"bytes": -1}, {"sha256": 5}, {"x": 1}):
        yield f"index {change}", {**b, "index": {**b["index"], **change}}
    yield "another format", {**b, "format": "other"}
    yield from ((f"version {v}", {**b, "version": v}) for v in ("1", 0, -1, True, 1.0))
    yield "another checksum", {**b, "checksum": "md5"}
    yield "unknown field", {**b, "surprise": 1}


LYING_MANIFESTS = list(lying_manifests())


@pytest.mark.parametrize(("what", "body"), LYING_MANIFESTS, ids=[w for w, _ in LYING_MANIFESTS])
def test_a_well_sealed_manifest_that_lies_is_refused_at_once(what, body):
    begun = time.perf_counter()
    with pytest.raises(BadManifest):
        decode_manifest(sealed(body))
    assert time.perf_counter() - begun < 1


def test_a_manifest_without_its_seal_or_with_another_is_refused():
    body = manifest_body()
    decode_manifest(sealed(body))
    for seal in ({}, {"sha256": ""}, {"sha256": None}, {"sha256": 5}, {"sha256": "0" * 64}, {"sha256": []}):
        with pytest.raises(ChecksumMismatch):
            decode_manifest(json.dumps({**body, **seal}).encode())


@pytest.mark.parametrize("data", [
    b"", b"\x00", b"null", b"[]", b"1", b'"x"', b"{}", b"{", b'{"a":' * 100_000, b"[" * 100_000, b'{"a":' + b"[" * 100_000, b'{"\xff":1}', b'{"a":NaN}',
    b'{"a":1e999}', b'{"version":1e999}', b'{"created_unix_s":' + b"9" * 5000 + b"}", b"\xff\xfe{\x00}\x00", b'{"a":"\\ud800"}',
], ids=lambda d: repr(d[:20]))  # fmt: skip
def test_bytes_that_are_no_manifest_are_refused(data):
    with pytest.raises(BadBytes):
        decode_manifest(data)


def test_the_columns_of_the_index_are_those_that_the_tests_change():
    assert set(unpacked(small_index(2)[0])) == set(_IndexFile.__struct_fields__)
