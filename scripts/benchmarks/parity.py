"""Parity's kernels: encoding and decoding beside memcpy, a read-only pass over the same memory, and ISA-L.

One thread, one process. The data lie in blocks whose starts are not a multiple of 4 KiB apart, as the daemon lays them; outputs are warm. A rate is
bytes of data per second (parity not counted), a ratio is taken within a round.

- "read": `np.bitwise_xor.reduce` over the data, which is what any encoder has to do at least.
- "ISA-L": `ec_encode_data` of the library inside the pyeclib wheel (`pip install pyeclib`), or of the system, through ctypes; for one parity block the
  faster of that and `xor_gen`. Its bytes are compared with ours.
- (n, m): n nodes of which m may be lost: n - m data blocks. k+m: k data blocks.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import importlib.util
import mmap
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import harness
from benchmarks.harness import Aim, Bench, Table, median
from ckptd.core.parity import KERNELS, NUMPY, Combine, decode_rows, encode_rows

SHAPES = {"(4,1)": (3, 1), "(6,2)": (4, 2), "(8,3)": (5, 3), "4+1": (4, 1), "6+2": (6, 2), "8+3": (8, 3), "12+4": (12, 4)}
AIMED = ("(4,1)", "(6,2)", "(8,3)", "4+1", "6+2", "8+3")
PITCH = 512
"""Block starts lie at this, modulo 4096: sets of the L1 cache are not shared by all blocks, and O_DIRECT's alignment is kept."""


def run(bench: Bench) -> None:
    """All shapes, each in rounds of all cases."""
    total = bench.pick(256 << 20, 64 << 20)
    rounds = bench.rounds or bench.pick(15, 5)
    isal = IsaL.find()
    if isal is None:
        bench.notes.append("ISA-L was not found: pip install pyeclib (its wheel contains it) or apt-get install libisal2.")
    else:
        bench.notes.append(f"ISA-L: {isal.path}")
    rows = []
    for name, (k, m) in SHAPES.items():
        rates = shape(k, m, total, rounds, isal)
        bench.raw[name] = rates
        for case, each in rates.items():
            beside = [median([r / q for r, q in zip(each, rates[other], strict=True)]) for other in ("memcpy", "read")]
            rows.append([name, f"{k}+{m}", case, median(each) / 1e9, *beside])
        slack = bench.pick(1.0, 0.85)
        for case in ("encode", "decode"):
            ours = rates[f"{case}, {KERNELS[0]}"]
            if name in AIMED:
                read = median([r / q for r, q in zip(ours, rates["read"], strict=True)])
                bench.aims.append(Aim(f"{name}: {case} against the read-only pass", read, ">=", 0.9 * slack, "x"))
            if isal is not None:
                theirs = median([r / q for r, q in zip(ours, rates[f"{case}, ISA-L"], strict=True)])
                bench.aims.append(Aim(f"{name}: {case} against ISA-L", theirs, ">=", 1.0 * slack, "x"))
    bench.tables.append(Table(f"one thread, {total >> 20} MiB of data, {rounds} rounds", ["shape", "k+m", "case", "GB/s", "x memcpy", "x read"], rows))


def shape(k: int, m: int, total: int, rounds: int, isal: IsaL | None) -> dict[str, list[float]]:
    """case -> bytes of data per second, by round."""
    size = total // k // 4096 * 4096
    blocks = Blocks(k + 2 * m, size)
    data, made, again = blocks.views[:k], blocks.views[k : k + m], blocks.views[k + m :]
    rng = np.random.default_rng(0)
    for view in data:
        np.frombuffer(view, np.uint64)[:] = rng.integers(0, 1 << 63, size // 8, np.uint64)
    lost = tuple(range(m))
    have = (*range(m, k), *range(k, k + m))[:k]
    rows, back = encode_rows(k, m), decode_rows(k, m, have, lost)
    survivors = [(*data, *made)[b] for b in have]
    Combine(rows)(data, made)
    copy = np.empty(size, np.uint8)
    words = [np.frombuffer(v, np.uint64) for v in data]

    def memcpy() -> None:
        for view in data:
            np.copyto(copy, np.frombuffer(view, np.uint8))

    def read() -> None:
        for w in words:
            np.bitwise_xor.reduce(w)

    cases: dict[str, Callable[[], Any]] = {"memcpy": memcpy, "read": read}
    for kernel in (k for k in KERNELS if k != NUMPY or total <= 64 << 20):
        encode, decode = Combine(rows, kernel), Combine(back, kernel)
        cases[f"encode, {kernel}"] = partial(encode, data, made)
        cases[f"decode, {kernel}"] = partial(decode, survivors, again)
    if isal is not None:
        cases["encode, ISA-L"] = isal.coder(rows, data, made)
        cases["decode, ISA-L"] = isal.coder(back, survivors, again)
    for name, work in cases.items():
        for view in again:
            np.frombuffer(view, np.uint8)[:] = 0
        work()
        check = [bytes(a[:65536]) == bytes(d[:65536]) and bytes(a[-65536:]) == bytes(d[-65536:]) for a, d in zip(again, data[:m], strict=True)]
        if name.startswith("decode") and not all(check):
            msg = f"{name}: the lost blocks did not come back"
            raise RuntimeError(msg)
    return harness.rates(cases, rounds, k * size)


class Blocks:
    """Populated blocks of `size` bytes at a pitch of PITCH modulo 4096."""

    def __init__(self, count: int, size: int) -> None:
        pitch = -(-size // 4096) * 4096 + PITCH
        self.mapping = mmap.mmap(-1, count * pitch)
        whole = memoryview(self.mapping)
        np.frombuffer(whole, np.uint8)[:] = 1
        self.views = [whole[i * pitch : i * pitch + size] for i in range(count)]


class IsaL:
    """The library, through ctypes."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._lib = ctypes.CDLL(path)
        for name in ("ec_init_tables", "ec_encode_data", "xor_gen"):
            getattr(self._lib, name)  # AttributeError: another library

    @staticmethod
    def find() -> IsaL | None:
        spec = importlib.util.find_spec("pyeclib")
        places = sorted(Path(spec.origin).parent.parent.glob("pyeclib.libs/libisal*")) if spec and spec.origin else []
        for path in [*map(str, places), ctypes.util.find_library("isal")]:
            if path:
                try:
                    return IsaL(path)
                except (OSError, AttributeError):
                    continue
        return None

    def coder(self, rows: tuple[bytes, ...], ins: list[memoryview], outs: list[memoryview]) -> Callable[[], None]:
        """One that makes `outs` from `ins`; the fastest that it has for these coefficients."""
        k, m, size = len(ins), len(outs), len(ins[0])
        tables = ctypes.create_string_buffer(32 * k * m)
        self._lib.ec_init_tables(k, m, b"".join(rows), tables)

        def pointers(views: list[memoryview]) -> Any:
            return (ctypes.c_void_p * len(views))(*(ctypes.addressof(ctypes.c_char.from_buffer(v)) for v in views))

        a, b, both = pointers(ins), pointers(outs), pointers([*ins, *outs])

        def encode() -> None:
            self._lib.ec_encode_data(size, k, m, tables, a, b)

        def xor() -> None:
            if self._lib.xor_gen(k + 1, size, both):
                msg = "xor_gen refused"
                raise RuntimeError(msg)

        if m > 1 or any(c != 1 for c in rows[0]):
            return encode
        took = {f: median([harness.timed(f) for _ in range(5)]) for f in (encode, xor)}
        return min(took, key=lambda f: took[f])
