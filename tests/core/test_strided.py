"""Strided copies, casts, joined CRCs: against NumPy, torch and zlib."""

from __future__ import annotations

import random
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptd.core import strided
from ckptd.core.cast import cast
from ckptd.core.crc import joined


class File:
    """A buffer that counts what is read of it."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.reads = 0
        self.bytes = 0

    def fetch(self, begin: int, into: memoryview) -> None:
        assert begin >= 0
        assert begin + len(into) <= len(self.data), "read beyond the end"
        into[:] = self.data[begin : begin + len(into)]
        self.reads += 1
        self.bytes += len(into)


@st.composite
def cases(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, int]:
    """(a strided view of a larger array, the array, scratch bytes)."""
    dims = draw(st.integers(1, 4))
    extent = tuple(draw(st.integers(1, 7)) for _ in range(dims))
    order = draw(st.permutations(range(dims)))
    base = np.arange(1, 1 + int(np.prod([e + 2 for e in extent], initial=1)), dtype=draw(st.sampled_from([np.uint8, np.uint16, np.uint32, np.uint64])))
    whole = base.reshape([extent[d] + 2 for d in order])
    cut = whole[tuple(slice(draw(st.integers(0, 2)), None) for _ in order)][tuple(slice(0, extent[d]) for d in order)]
    view = cut.transpose([order.index(d) for d in range(dims)])
    return view, base, draw(st.sampled_from([64, 200, 4096]))


@settings(max_examples=400, deadline=None)
@given(cases(), st.booleans())
def test_any_strided_array_is_copied_exactly(case: tuple[np.ndarray, np.ndarray, int], apart: bool) -> None:
    view, base, scratch = case
    item = base.itemsize
    begin = view.__array_interface__["data"][0] - base.__array_interface__["data"][0]
    out = np.zeros([2 * e for e in view.shape], base.dtype)[tuple(slice(None, None, 2) for _ in view.shape)] if apart else np.zeros(view.shape, base.dtype)
    file = File(base.tobytes())
    strided.copy(file.fetch, begin, tuple(s // item for s in view.strides), view.shape, item, out, memoryview(bytearray(scratch)))
    assert np.array_equal(out, view)


def test_a_single_element() -> None:
    file, out = File(b"\x01\x02\x03\x04"), np.zeros((), np.uint16)
    strided.copy(file.fetch, 2, (), (), 2, out, memoryview(bytearray(64)))
    assert out.tobytes() == b"\x03\x04"


@pytest.mark.parametrize(
    ("shape", "box", "reads"),
    [((1000, 1000), (slice(0, 1000), slice(0, 1000)), 1), ((1000, 1000), (slice(3, 9), slice(0, 1000)), 1), ((64, 100_000), (slice(0, 64), slice(0, 50_000)), 64)],
)
def test_few_reads(shape: tuple[int, ...], box: tuple[slice, ...], reads: int) -> None:
    whole = np.arange(np.prod(shape), dtype=np.uint32).reshape(shape)
    view = whole[box]
    begin = view.__array_interface__["data"][0] - whole.__array_interface__["data"][0]
    file, out = File(whole.tobytes()), np.zeros(view.shape, np.uint32)
    strided.copy(file.fetch, begin, tuple(s // 4 for s in view.strides), view.shape, 4, out, memoryview(bytearray(1 << 20)))
    assert np.array_equal(out, view)
    assert file.reads <= reads
    assert file.bytes <= 1.1 * view.nbytes


def test_columns_are_read_in_spans_and_a_transpose_in_runs() -> None:
    whole = np.arange(512 * 512, dtype=np.uint32).reshape(512, 512)
    for view, most in ((whole[:, :256], 8), (whole.T[:8], 600)):
        begin = view.__array_interface__["data"][0] - whole.__array_interface__["data"][0]
        file, out = File(whole.tobytes()), np.zeros(view.shape, np.uint32)
        strided.copy(file.fetch, begin, tuple(s // 4 for s in view.strides), view.shape, 4, out, memoryview(bytearray(1 << 18)))
        assert np.array_equal(out, view)
        assert file.reads <= most


TORCH = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@pytest.mark.parametrize("source", TORCH)
@pytest.mark.parametrize("target", TORCH)
def test_casts_round_as_torch_does(source: str, target: str) -> None:
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 1 << 63, 100_000, np.uint64).view(np.float64)
    odd = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, 1 + 2**-9, 1 + 3 * 2**-9, 65504, 65520, 3.4e38, 1e-45, 6e-8, 2**-24], np.float64)
    with np.errstate(all="ignore"):
        values = torch.from_numpy(np.concatenate([odd, bits, rng.standard_normal(100_000)])).to(TORCH[source])
    raw = values.view(torch.uint16).numpy() if source == "BF16" else values.numpy()
    ours = cast(raw, source, target)
    theirs = values.to(TORCH[target])
    nan = torch.isnan(theirs).numpy()
    bits_of = theirs.view(torch.uint16).numpy() if target == "BF16" else theirs.numpy()
    assert ours.dtype.itemsize == bits_of.dtype.itemsize
    assert np.array_equal(ours.view(np.uint8).reshape(len(ours), -1)[~nan], bits_of.view(np.uint8).reshape(len(ours), -1)[~nan])
    back = torch.from_numpy(ours.copy()).view(torch.bfloat16) if target == "BF16" else torch.from_numpy(ours.copy())
    assert torch.isnan(back).numpy()[nan].all()


def test_joined_crcs() -> None:
    rng = random.Random(0)
    for _ in range(200):
        parts = [rng.randbytes(rng.choice([0, 1, 7, 64, 5000])) for _ in range(rng.randint(0, 6))]
        assert joined((zlib.crc32(p), len(p)) for p in parts) == zlib.crc32(b"".join(parts))
