"""safetensors files of others that lie, are cut short or explode: BadForeign, before anything large is allocated. And all that safetensors writes."""

from __future__ import annotations

import json
import tracemalloc

import numpy as np
import pytest
import safetensors.numpy as stnp

from ckptd.core.image import HEADER_BYTES_MAX
from ckptd.core.tensorfile import PARTS_MAX, TENSORS_MAX, parse
from ckptd.errors import BadForeign


def port(data: bytes):
    return lambda begin, count: data[begin : begin + count]


def framed(header: bytes | dict, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def refused(data: bytes, what: str = "", size: int | None = None) -> None:
    with pytest.raises(BadForeign) as e:
        parse(port(data), len(data) if size is None else size)
    assert what in e.value.message, e.value.message
    assert len(e.value.message) < 1000


def entry(dtype="F32", shape=(2,), begin=0, end=8, **more) -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end], **more}


def test_what_safetensors_writes_is_read():
    torch = pytest.importorskip("torch")
    from safetensors.torch import save

    tensors = {"w": torch.arange(6.0).reshape(2, 3), "b": torch.ones(3, dtype=torch.bfloat16), "none": torch.zeros(0, 4), "scalar": torch.tensor(3), "bool": torch.tensor([True]), "f8": torch.zeros(3, dtype=torch.float8_e4m3fn),
               "c": torch.zeros(2, dtype=torch.complex64), "é": torch.ones(1, dtype=torch.uint16)}  # fmt: skip
    data = save(tensors, {"format": "pt", "x": "y"})
    file = parse(port(data), len(data))
    assert dict(file.metadata) == {"format": "pt", "x": "y"}
    assert file.tensors.keys() == tensors.keys()
    for name, (_, shape, begin, end) in file.tensors.items():
        assert shape == tuple(tensors[name].shape)
        assert data[begin:end] == (tensors[name].reshape(-1).view(torch.uint8).numpy().tobytes() if tensors[name].numel() else b"")
    data = stnp.save({})
    assert parse(port(data), len(data)).tensors == {}
    data = stnp.save({"a": np.arange(3)})
    assert parse(port(data), len(data)).tensors["a"][0] == "I64"
    assert parse(port(framed(b"{}")), 10).metadata == {}
    data = framed(json.dumps({"a": entry()}).encode() + b"   ", bytes(8))
    assert parse(port(data), len(data)).header_bytes == len(data) - 8


@pytest.mark.parametrize(("dtype", "numel", "nbytes"), [("F4", 4, 2), ("F6_E2M3", 4, 3), ("F6_E3M2", 8, 6), ("F8_E8M0", 3, 3), ("F64", 1, 8), ("U8", 5, 5)])
def test_dtypes_of_the_specification(dtype, numel, nbytes):
    data = framed({"a": entry(dtype, (numel,), 0, nbytes)}, bytes(nbytes))
    file = parse(port(data), len(data))
    assert file.tensors["a"] == (dtype, (numel,), file.header_bytes, len(data))
    refused(framed({"a": entry(dtype, (numel + 1,), 0, nbytes)}, bytes(nbytes)), "does not fill")


@pytest.mark.parametrize("n", [0, 1, 101_000_000, HEADER_BYTES_MAX + 1, 2**31, 2**32, 2**62, 2**63, 2**64 - 1])
def test_a_lying_header_length(n):
    tracemalloc.start()
    for rest in (b"", b"{}", b"{" * 100):
        for size in (0, 7, 8, 10, 108, 2**40, 2**50, 2**51, 2**63, 2**64):
            refused(n.to_bytes(8, "little") + rest, size=size)
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


@pytest.mark.parametrize("header", [
    b"", b" ", b" {}", b"[]", b"null", b"1", b'"x"', b"{", b"{}}", b"{}x", b"\xef\xbb\xbf{}", b'{"\xff":1}', b'{"a":NaN}', b'{"a":1}', b'{"a":[]}', b'{"a":{}}', b'{"__metadata__":1}', b'{"__metadata__":null}', b'{"__metadata__":[]}',
    b'{"__metadata__":{"a":1}}', b'{"__metadata__":{"a":{}}}', b'{"__metadata__":{},"__metadata__":{}}', b"{" * 100_000, b'{"a":' * 100_000, b'{"a":' + b"[" * 100_000, b'{"a":' + b"9" * 5000 + b"}", "{}".encode("utf-16"), "{}".encode("utf-32"),
    b'{"a":{"dtype":"F32","dtype":"F32","shape":[2],"data_offsets":[0,8]}}', b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
    b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"\\u0061":{"dtype":"F32","shape":[0],"data_offsets":[8,8]}}', b"{}\x00", b"{}\n\x00",
], ids=lambda h: repr(h[:24]))  # fmt: skip
def test_headers_that_are_no_map_of_tensors(header):
    refused(framed(header, bytes(8)))


@pytest.mark.parametrize("changes", [
    {"dtype": "F33"}, {"dtype": "f32"}, {"dtype": ""}, {"dtype": "x" * 5000}, {"dtype": 1}, {"dtype": None}, {"dtype": "O"}, {"shape": [3]}, {"shape": [1]}, {"shape": [-2]}, {"shape": [-1, -2]}, {"shape": [2.0]}, {"shape": ["2"]}, {"shape": 2},
    {"shape": [2**32, 2**32, 2]}, {"shape": [2**63, 2]}, {"shape": [2**64, 2]}, {"shape": [2**64 + 2]}, {"shape": [2] + [1] * 64}, {"shape": [10**1000, 2]}, {"shape": [True, 2]}, {"shape": None}, {"data_offsets": [0]}, {"data_offsets": [0, 8, 8]},
    {"data_offsets": [8, 0]}, {"data_offsets": [-8, 0]}, {"data_offsets": [0, 9]}, {"data_offsets": [0, 7]}, {"data_offsets": [4, 12]}, {"data_offsets": [0, 2**63]}, {"data_offsets": [2**64 - 8, 2**64]}, {"data_offsets": [0.0, 8.0]}, {"more": 1},
], ids=lambda c: str(c)[:40])  # fmt: skip
def test_entries_that_lie(changes):
    refused(framed({"a": {**entry(), **changes}}, bytes(8)))
    refused(framed({"a": entry(), "b": {**entry(begin=8, end=16), **changes}}, bytes(16)))
    for missing in ("dtype", "shape", "data_offsets"):
        refused(framed({"a": {k: v for k, v in entry().items() if k != missing}}, bytes(8)))


def test_overlaps_holes_and_ends():
    refused(framed({"a": entry(), "b": entry(begin=4, end=12)}, bytes(12)), "overlaps")
    refused(framed({"a": entry(), "b": entry()}, bytes(8)), "overlaps")
    refused(framed({"a": entry(), "b": entry(begin=12, end=20)}, bytes(20)), "hole")
    refused(framed({"a": entry(begin=4, end=12)}, bytes(12)), "hole")
    refused(framed({"a": entry()}, bytes(7)), "the file at")
    refused(framed({"a": entry()}, bytes(9)), "the file at")
    refused(framed({"a": entry()}), "the file at")
    refused(framed({}, b"x"), "the file at")
    refused(framed({"a": entry(), "z": entry(shape=(0,), begin=4, end=4)}, bytes(8)), "overlaps")  # a zero-size alias into another
    data = framed({"a": entry(), "z": entry(shape=(0, 9), begin=8, end=8), "y": entry(shape=(0,), begin=0, end=0)}, bytes(8))
    assert len(parse(port(data), len(data)).tensors) == 3


def test_headers_that_explode():
    """Counted before they are parsed: what JSON takes in memory is many times its text."""
    small = json.dumps(entry(shape=(0,), end=0), separators=(",", ":"))
    for text in (b'{"a":{"shape":[' + b"[]," * (PARTS_MAX // 2) + b"[]]}}", b'{"__metadata__":{"a":"' + b"," * (PARTS_MAX + 1) + b'"}}', b"{" + b",".join(b'"data_offsets":1' for _ in range(TENSORS_MAX + 1)) + b"}"):
        data = framed(text)
        tracemalloc.start()
        refused(data, "at most")
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 2 * len(data) + (1 << 20)
    many = ("{" + ",".join(f'"t{i}":{small}' for i in range(20_000)) + "}").encode()
    assert len(parse(port(framed(many)), 8 + len(many)).tensors) == 20_000


def test_every_truncation_and_every_flip():
    data = framed({"__metadata__": {"format": "pt"}, "a": entry(), "b": entry("BF16", (2, 2), 8, 16)}, bytes(16))
    parse(port(data), len(data))
    for n in range(len(data)):
        refused(data[:n])
        refused(data[:n] if n < len(data) - 16 else data[:0], size=len(data))
    accepted = 0
    for at in range(len(data) - 16):
        for mask in (1, 0x20, 0x80, 0xFF):
            rotten = bytearray(data)
            rotten[at] ^= mask
            try:
                file = parse(port(bytes(rotten)), len(rotten))
            except BadForeign:
                continue
            accepted += 1
            assert sum(end - begin for _, _, begin, end in file.tensors.values()) == 16
    assert accepted < 60


def test_names_are_data():
    names = ["../../etc/passwd", "a\x00b", "", " ", "__metadata__x", "\u202e", "a" * 10_000]
    data = framed({n: entry(shape=(0,), end=0) for n in names})
    assert list(parse(port(data), len(data)).tensors) == names
