"""Erasure coding: k data blocks, m parity blocks, and any k of the k + m give back the others.

A systematic Cauchy Reed-Solomon code over GF(2^8) (J. Bloemer et al., "An XOR-based erasure-resilient coding scheme", ICSI 1995), with the
field of ISA-L: polynomial 0x11D, generator 2. Blocks are numbered: 0 to k-1 data, k to k+m-1 parity. `encode_rows` and `decode_rows` give the
coefficients, `Combine` applies them to bytes; encoding, decoding and rebuilding parity are the same sum with other coefficients.

Invariants
- row 0 of the parity matrix is all ones: the first parity block is the plain XOR, whatever k and m are;
- every square part of the parity matrix can be inverted: any m erasures are survived (Cauchy; scaling rows and columns keeps it);
- all kernels give the same bytes: GFNI with AVX-512, AVX2, NEON and portable C (`parity.c`), and NumPy, which is also the reference;
- a block that is shorter than others is followed by zeros that are neither stored nor read.

Threads: everything here may be called from any thread; `Combine` gives the GIL up while it works, but for NumPy's part of the fallback.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np
from numpy.typing import NDArray

try:
    from ckptd.core import _parity
except ImportError:  # built without a C compiler
    _parity = None  # type: ignore[assignment]  # mypy takes the name for a module; KERNELS says which it is

POLYNOMIAL = 0x11D
BLOCKS_MAX = 32
"""Data and parity blocks together: the nodes of a group."""
PARITY_MAX = 4
NUMPY_BYTES = 64 << 10
"""One piece of the fallback: stays in a core's cache."""

NUMPY = "numpy"
KERNELS: tuple[str, ...] = (*(_parity.kernels if _parity else ()), NUMPY)
"""What can do the work on this machine, fastest first."""

Rows = tuple[bytes, ...]
"""Coefficients: one row per output, one byte per input."""


def _make_tables() -> tuple[list[int], list[int]]:
    exp, log, x = [0] * 510, [0] * 256, 1
    for i in range(255):
        exp[i] = exp[i + 255] = x
        log[x] = i
        x = x << 1 ^ (POLYNOMIAL if x & 0x80 else 0)
    return exp, log


_EXP, _LOG = _make_tables()


def multiply(a: int, b: int) -> int:
    """The product in GF(2^8)."""
    return _EXP[_LOG[a] + _LOG[b]] if a and b else 0


def invert(a: int) -> int:
    """1 / a. Raises ZeroDivisionError."""
    if a == 0:
        msg = "0 has no inverse"
        raise ZeroDivisionError(msg)
    return _EXP[255 - _LOG[a]]


@cache
def encode_rows(k: int, m: int) -> Rows:
    """The parity matrix, m rows of k coefficients. Raises ValueError beyond BLOCKS_MAX and PARITY_MAX.

    A Cauchy matrix 1 / ((k + i) xor j), each column divided by its entry in row 0, then each further row by its entry in column 0.
    """
    if k < 1 or not 0 <= m <= PARITY_MAX or k + m > BLOCKS_MAX:
        msg = f"{k} data and {m} parity blocks: there are 1 to {BLOCKS_MAX}, of them at most {PARITY_MAX} of parity"
        raise ValueError(msg)
    rows = [[invert((k + i) ^ j) for j in range(k)] for i in range(m)]
    if rows:
        scale = [invert(c) for c in rows[0]]
        rows = [[multiply(c, s) for c, s in zip(row, scale, strict=True)] for row in rows]
    return tuple(bytes(multiply(c, invert(row[0])) for c in row) for row in rows)


@cache
def decode_rows(k: int, m: int, have: tuple[int, ...], want: tuple[int, ...]) -> Rows:
    """Coefficients that make the blocks `want` (data or parity) from the k blocks `have`, in their order.

    Raises ValueError if `have` are not k different blocks: with fewer, nothing can be decoded.
    """
    if len(have) != k or len({*have}) != k or not all(0 <= b < k + m for b in (*have, *want)):
        msg = f"blocks {have} of {k} + {m} cannot give blocks {want}: it takes {k} different ones"
        raise ValueError(msg)
    parity = encode_rows(k, m)

    def row_of(block: int) -> list[int]:
        return [int(j == block) for j in range(k)] if block < k else [*parity[block - k]]

    inverse = _inverse([row_of(b) for b in have])
    return tuple(bytes(_dot(row_of(b), [r[j] for r in inverse]) for j in range(k)) for b in want)


def _dot(a: Sequence[int], b: Sequence[int]) -> int:
    total = 0
    for x, y in zip(a, b, strict=True):
        total ^= multiply(x, y)
    return total


def _inverse(matrix: list[list[int]]) -> list[list[int]]:
    """Gauss and Jordan; the matrices here can always be inverted."""
    n = len(matrix)
    rows = [[*row, *(int(i == j) for j in range(n))] for i, row in enumerate(matrix)]
    for i in range(n):
        pivot = next(r for r in range(i, n) if rows[r][i])
        rows[i], rows[pivot] = rows[pivot], rows[i]
        scale = invert(rows[i][i])
        rows[i] = [multiply(c, scale) for c in rows[i]]
        for r in range(n):
            if r != i and (factor := rows[r][i]):
                rows[r] = [c ^ multiply(factor, p) for c, p in zip(rows[r], rows[i], strict=True)]
    return [row[n:] for row in rows]


# --- bytes ------------------------------------------------------------------------------------------------------------------


@cache
def _products() -> NDArray[np.uint8]:
    """products[c][b] = c * b."""
    return np.array([[multiply(c, b) for b in range(256)] for c in range(256)], dtype=np.uint8)


@cache
def _entry(c: int) -> bytes:
    """A coefficient's 48 bytes of table; see parity.c."""
    bits = [0] * 8
    for i in range(8):
        row = sum((multiply(c, 1 << b) >> i & 1) << b for b in range(8))
        bits[7 - i] = row
    return bytes([*(multiply(c, b) for b in range(16)), *(multiply(c, b << 4) for b in range(16)), *bits, *bytes(8)])


Buffer = bytes | bytearray | memoryview


class Combine:
    """Makes len(rows) outputs from len(rows[0]) inputs. Build it once per set of coefficients, for the tables cost more than a small block."""

    def __init__(self, rows: Rows, kernel: str | None = None) -> None:
        """`kernel`: one of KERNELS; by default the fastest. Raises ValueError."""
        if not rows or not rows[0] or len({len(r) for r in rows}) != 1:
            msg = "rows of coefficients must be of one length, and there must be some"
            raise ValueError(msg)
        self.rows = rows
        self._kernel = KERNELS.index(kernel or KERNELS[0])
        self._tables: dict[tuple[int, ...], bytes] = {}

    def __call__(self, inputs: Sequence[Buffer], outputs: Sequence[Buffer], *, accumulate: bool = False) -> None:
        """Write the sums into `outputs`, all of one length; `accumulate`: add them to what is there. Inputs may be shorter: zeros follow.

        For speed: inputs whose addresses do not differ by multiples of 4 KiB, outputs at multiples of 64 bytes, all memory touched before.
        Raises ValueError.
        """
        ins, outs = [memoryview(i).cast("B") for i in inputs], [memoryview(o).cast("B") for o in outputs]
        if len(ins) != len(self.rows[0]) or len(outs) != len(self.rows) or len({len(o) for o in outs}) != 1 or any(len(i) > len(outs[0]) for i in ins):
            msg = f"{len(ins)} inputs and {len(outs)} outputs for {len(self.rows[0])} and {len(self.rows)}, or an input longer than its output"
            raise ValueError(msg)
        begin = 0
        for end in sorted({*(len(i) for i in ins), len(outs[0])}):
            if begin < end:
                used = tuple(j for j, i in enumerate(ins) if len(i) >= end)
                self._combine(used, [ins[j][begin:end] for j in used], [o[begin:end] for o in outs], accumulate=accumulate)
            begin = end

    def _combine(self, used: tuple[int, ...], ins: list[memoryview], outs: list[memoryview], *, accumulate: bool) -> None:
        if not used:
            for out in outs:
                if not accumulate:
                    out[:] = bytes(len(out))
        elif KERNELS[self._kernel] == NUMPY:
            _combine_numpy([bytes(row[j] for j in used) for row in self.rows], ins, outs, accumulate=accumulate)
        else:
            tables = self._tables.get(used)
            if tables is None:
                tables = self._tables[used] = b"".join(_entry(row[j]) for j in used for row in self.rows)
            _parity.combine(tables, ins, outs, accumulate, self._kernel)


def _combine_numpy(rows: Sequence[bytes], inputs: Sequence[memoryview], outputs: Sequence[memoryview], *, accumulate: bool) -> None:
    """The reference: a look-up per byte, none where the coefficient is 1."""
    table = _products()
    ins, outs = [np.frombuffer(i, np.uint8) for i in inputs], [np.frombuffer(o, np.uint8) for o in outputs]
    for at in range(0, len(outs[0]), NUMPY_BYTES):
        window = slice(at, at + NUMPY_BYTES)
        for row, out in zip(rows, outs, strict=True):
            total = out[window]
            if not accumulate:
                total[:] = 0
            for c, block in zip(row, ins, strict=True):
                if c:
                    total ^= block[window] if c == 1 else table[c].take(block[window])


def encoder(k: int, m: int, kernel: str | None = None) -> Combine:
    """From k data blocks to m >= 1 parity blocks."""
    return Combine(encode_rows(k, m), kernel)


def self_test() -> list[str]:
    """What is wrong with this machine's kernels, by name; an empty list where all agree with the reference. A few milliseconds."""
    rng = np.random.default_rng(0)
    wrong = []
    for k, m in ((1, 1), (3, 1), (4, 2), (8, 3), (12, 4)):
        data = [rng.integers(0, 256, 1000 - 7 * j, np.uint8).tobytes() for j in range(k)]
        right = [bytearray(1000) for _ in range(m)]
        encoder(k, m, NUMPY)(data, right)
        for kernel in KERNELS[:-1]:
            made = [bytearray(1000) for _ in range(m)]
            encoder(k, m, kernel)(data, made)
            if made != right:
                wrong.append(f"parity kernel {kernel!r} is wrong for {k} + {m} blocks")
    return wrong
