"""What `core.emit` lays out, torch and safetensors and Python's zipfile read."""

from __future__ import annotations

import io
import struct
import zipfile
import zlib
from collections import OrderedDict

import numpy as np
import pytest
import torch
from safetensors.torch import load as load_safetensors

from ckptd.core.emit import Entry, Known, Sealed, Take, Taken, Zeros, number, tensor_file, torch_file
from ckptd.core.inert import Dtype
from ckptd.errors import Unstorable


def filled(segments) -> bytes:
    """The file, filled the slow way: no boxes of tensors."""
    parts, sums, out = [], {}, []
    for segment in segments:
        inner = segment.segments if isinstance(segment, Entry) else (segment,)
        data = b"".join(s.data if isinstance(s, Known) else bytes(s.nbytes) for s in inner if not isinstance(s, Sealed))
        if isinstance(segment, Entry):
            sums[segment.mark] = zlib.crc32(data)
        parts.append((segment, data))
    for segment, data in parts:
        made = segment.make(sums) if isinstance(segment, Sealed) else data
        assert len(made) == segment.nbytes
        out.append(made)
    return b"".join(out)


def values(dtype: str, shape: tuple[int, ...], array: np.ndarray, **more) -> Taken:
    return Taken(dtype, shape, (Known(array.tobytes()),), **more)


TREE = {
    "model": OrderedDict([("a", values("F32", (2, 3), np.arange(6, dtype=np.float32))), ("e", values("BF16", (0,), np.zeros(0, np.uint16)))]),
    "list": [1, -1, 255, 256, 2**31, -(2**31), 2**63, -(2**70), 1.5, float("inf"), True, None, "text é", b"bytes\xff", (), (1,), (1, 2, 3, 4), {3}],
    "dtype": Dtype("BF16"),
    "step": number("F32", 3.0),
    "int": number("I64", 7),
    "padded": Taken("F32", (8,), (Known(struct.pack("<5f", *range(5))), Zeros(12))),
    "f8": values("F8_E4M3", (4,), np.arange(4, dtype=np.uint8)),
    "u16": values("U16", (2,), np.array([1, 65535], np.uint16)),
    3: "int key",
    "many": {f"k{i}": i for i in range(600)},
    "array": np.arange(5, dtype=np.int64),
}


@pytest.mark.parametrize("safe", [True, False])
def test_torch_reads_it(safe: bool) -> None:
    tree = {k: v for k, v in TREE.items() if not (safe and k == "array")}
    data = filled(torch_file(tree))
    got = torch.load(io.BytesIO(data), weights_only=safe)
    assert list(got) == list(tree)
    assert isinstance(got["model"], OrderedDict)
    assert got["model"]["a"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert got["model"]["e"].dtype == torch.bfloat16
    assert got["list"] == TREE["list"]
    assert got["dtype"] is torch.bfloat16
    assert (got["step"].item(), got["step"].dim(), got["int"].item()) == (3.0, 0, 7)
    assert got["padded"].tolist() == [0, 1, 2, 3, 4, 0, 0, 0]
    assert got["f8"].dtype == torch.float8_e4m3fn
    assert got["f8"].view(torch.uint8).tolist() == [0, 1, 2, 3]
    assert got["u16"].tolist() == [1, 65535]
    assert got["many"] == TREE["many"]
    if not safe:
        assert np.array_equal(got["array"], TREE["array"])
    with zipfile.ZipFile(io.BytesIO(data)) as z:
        assert z.testzip() is None
    assert torch.load(io.BytesIO(data), weights_only=safe, mmap=False)["int"].item() == 7


def test_mmap_reads_it(tmp_path) -> None:
    (tmp_path / "x.pt").write_bytes(filled(torch_file({"a": TREE["model"]["a"]})))
    assert torch.load(tmp_path / "x.pt", mmap=True)["a"][1, 2] == 5


def test_tied_tensors_share_a_storage() -> None:
    one = values("F32", (4,), np.ones(4, np.float32), share="w")
    got = torch.load(io.BytesIO(filled(torch_file({"a": one, "b": one, "c": values("F32", (4,), np.ones(4, np.float32))}))))
    assert got["a"].data_ptr() == got["b"].data_ptr() != got["c"].data_ptr()


def test_what_has_no_word_is_refused_with_its_path() -> None:
    with pytest.raises(Unstorable, match="a.0"):
        torch_file({"a": [object()]})


def test_safetensors_read_it() -> None:
    named = [("a", TREE["model"]["a"]), ("b", TREE["f8"]), ("c", TREE["int"]), ("d", TREE["padded"])]
    got = load_safetensors(filled(tensor_file(named, {"format": "pt"})))
    assert got["a"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert got["c"].item() == 7
    assert set(got) == {"a", "b", "c", "d"}
    assert load_safetensors(filled(tensor_file([], {}))) == {}


def test_sizes_beyond_four_gigabytes_are_told_in_zip64() -> None:
    """Only the headers are made: the data would not fit."""
    big = Taken("U8", (5 << 30,), (Zeros(5 << 30),))
    segments = torch_file({"a": big, "b": number("F32", 1.0)})
    sums = {s.mark: 0 for s in segments if isinstance(s, Entry)}
    at, sealed = 0, []
    for s in segments:
        if isinstance(s, Sealed):
            made = s.make(sums)
            assert len(made) == s.nbytes
            sealed.append((at, made))
        at += s.nbytes
    directory = sealed[-1][1]
    assert (5 << 30).to_bytes(8, "little") in directory
    assert all((place + len(made)) % 64 == 0 for place, made in sealed[:-1])


def test_a_take_counts_its_bytes() -> None:
    from ckptd.core.boxes import Box

    assert Take("a", Box((1, 2), (3, 4)), "BF16").nbytes == 24
