"""`ckptd diff`: two checkpoints of any formats, tensor by tensor, value by value; in windows, so that their size does not matter.

Exit status as diff's: 0 equal, 1 different; errors have codes of their class.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from math import inf
from typing import Any

import numpy as np
import xxhash

from ckptd.cli import foreign, show
from ckptd.convert import MEMORY_BYTES, Progress
from ckptd.core.boxes import Box
from ckptd.core.cast import FLOATS, NUMPY, cast
from ckptd.core.image import ITEM_BYTES
from ckptd.core.logical import GROUPS, Checkpoint, Tensor
from ckptd.errors import BadArgument
from ckptd.formats import ReadOptions
from ckptd.reading import Pool, cuts, workers_for

SHOWN = 40
VALUE_CHARS = 80
NAMES_SHOWN = 6
NOTHING = "nothing"
DIFFERENT = 1


@dataclass(slots=True)
class Difference:
    """How a tensor differs. `dtypes`, `shapes`: of A and B; `elements`: that differ in value; `max_abs`: by how much at most, None where shapes differ."""

    name: str
    dtypes: tuple[str, str]
    shapes: tuple[tuple[int, ...], tuple[int, ...]]
    elements: int = 0
    max_abs: float | None = 0.0
    first: tuple[int, ...] | None = None
    """Index of the first element that differs, in the order in which windows were done"""


def add_parser(verbs: Any) -> None:
    """The verb's arguments."""
    p = verbs.add_parser(
        "diff",
        help="what differs between two checkpoints of any formats",
        description="Compare two checkpoints by logical tensor, whatever their formats, shards and world sizes are: names that only one has, other shapes or dtypes,\n"
        "and the largest difference of values. Values of different dtypes are compared as numbers: bf16 and fp32 that hold the same ones differ in\n"
        "dtype alone. Objects (step, param groups, schedulers) are compared too, but for random states and what only one of two formats has.",
        epilog="exit status: 0 equal; 1 different; else an error's class.\n"
        "Equal means: the same names, shapes, dtypes and bytes. With --tolerance T: the same names and shapes, and no value differs by more than T.\n\n"
        "examples:\n  ckptd diff /ckpt/zero3 /ckpt/hf --only 'model.*' --tolerance 0.01\n  ckptd diff /mnt/store/job/step-00000100 /mnt/store/job/step-00000200",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("a", metavar="A", help="a checkpoint's folder or file (path or URL)")
    p.add_argument("b", metavar="B", help="another")
    p.add_argument("--tolerance", type=float, metavar="T", help="values that differ by no more than T are equal, whatever their dtypes; 0 compares values alone")
    p.add_argument("--only", metavar="PATTERN", help="tensors whose name matches (shell wildcards); objects are left out then")
    p.add_argument("--tag-a", default="", metavar="TAG", help="which of several checkpoints in A")
    p.add_argument("--tag-b", default="", metavar="TAG", help="which of several checkpoints in B")
    p.add_argument("--hint", metavar="KEY=VALUE", action="append", default=[], help="what the files do not say of themselves (A and B)")
    p.add_argument("--view", default="", metavar="NAME|FILE", help="see A through a view, as `ckptd convert --view` does")
    p.add_argument("--json", action="store_true", help="print one JSON document")
    p.add_argument("--quiet", action="store_true", help="print nothing: the status says it")
    p.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Compare."""
    if args.tolerance is not None and not args.tolerance >= 0:
        msg = f"--tolerance {args.tolerance}: a number from 0 on"
        raise BadArgument(msg)
    began_s = time.monotonic()
    hints = {"views": "bytes", **foreign.settings(args.hint, "--hint")}
    line = foreign.Line(shown=not (args.json or args.quiet))
    pool = Pool(workers_for(MEMORY_BYTES, None)[0])
    opened: list[foreign.Opened] = []
    try:
        for path, tag, view in ((args.a, args.tag_a, args.view), (args.b, args.tag_b, "")):
            opened.append(foreign.Opened(path, ReadOptions(tag, hints), pool, foreign.view_of(view, hints)))
        comparison = _Comparison(opened[0], opened[1], pool, args.only, args.tolerance)
        comparison.compare(line)
    finally:
        line.end()
        pool.close()
        for one in opened:
            one.close()
    if args.json:
        show.emit_json(comparison.document(time.monotonic() - began_s))
    elif not args.quiet:
        show.emit("\n".join(comparison.lines(time.monotonic() - began_s)))
    return DIFFERENT if comparison.different else 0


class _Comparison:
    """Two opened checkpoints, and what differs."""

    def __init__(self, a: foreign.Opened, b: foreign.Opened, pool: Pool, only: str | None, tolerance: float | None) -> None:
        self._a, self._b, self._pool, self._tolerance = a, b, pool, tolerance
        left, right = _names(a.checkpoint, only), _names(b.checkpoint, only)
        self.only_a = sorted(left.keys() - right.keys())
        self.only_b = sorted(right.keys() - left.keys())
        self._common = {n: (left[n], right[n]) for n in left if n in right}
        self.found: dict[str, Difference] = {}
        alike = a.format.name == b.format.name
        self.objects, self.lonely = ([], []) if only else _objects(a.checkpoint, b.checkpoint, strict=alike)
        """(path, value in A, value in B) of objects that both have, and of those that one has: of another format, they are its own business."""
        self.bytes_read = 0

    @property
    def different(self) -> bool:
        """Whether anything counts as a difference."""
        return bool(self.only_a or self.only_b or self.objects or any(self._counts(d) for d in self.found.values()))

    def _counts(self, d: Difference) -> bool:
        """Whether a difference is one, with this tolerance."""
        if d.max_abs is None or self._tolerance is None:
            return True
        return d.max_abs > self._tolerance

    def compare(self, line: foreign.Line) -> None:
        """Read both, window by window."""
        total = 0
        jobs = []
        for name, (left, right) in self._common.items():
            a, b = self._a.checkpoint.tensors[left], self._b.checkpoint.tensors[right]
            if a.shape != b.shape or not _comparable(a.dtype, b.dtype):
                self.found[name] = Difference(name, (a.dtype, b.dtype), (a.shape, b.shape), max_abs=None)
                continue
            if a.dtype != b.dtype:
                self.found[name] = Difference(name, (a.dtype, b.dtype), (a.shape, b.shape))
            jobs.append((name, left, right, a, b))
            total += a.nbytes + b.nbytes
        began_s = time.monotonic()

        def windows() -> Iterator[tuple[str, str, str, Tensor, Tensor, Box]]:
            for name, left, right, a, b in jobs:
                for _, box in cuts(Box.whole(a.shape), max(ITEM_BYTES[a.dtype], ITEM_BYTES[b.dtype])):
                    yield name, left, right, a, b, box

        for (name, _, _, a, b, box), outcome in self._pool.map(self._window, windows()):
            self.bytes_read += box.numel * (ITEM_BYTES[a.dtype] + ITEM_BYTES[b.dtype])
            line(Progress("compare", self.bytes_read, total, time.monotonic() - began_s))
            if outcome is not None:
                elements, max_abs, first = outcome
                held = self.found.setdefault(name, Difference(name, (a.dtype, b.dtype), (a.shape, b.shape)))
                held.elements += elements
                held.max_abs = max(held.max_abs or 0.0, max_abs)
                index = tuple(int(s + i) for s, i in zip(box.start, first, strict=True))
                held.first = index if held.first is None else min(held.first, index)

    def _window(self, job: tuple[str, str, str, Tensor, Tensor, Box]) -> tuple[int, float, tuple[int, ...]] | None:
        """In a thread: (elements that differ, by how much, the first one's place in the box); None where all bytes are equal."""
        _, left, right, a, b, box = job
        lane = self._pool.lane
        one = lane.buffer[: box.numel * ITEM_BYTES[a.dtype]]
        two = lane.second[: box.numel * ITEM_BYTES[b.dtype]]
        self._a.reading.fill(left, box, one, lane.scratch)
        self._b.reading.fill(right, box, two, lane.scratch)
        if a.dtype == b.dtype and one == two:
            return None
        x, y = _values(one, a.dtype), _values(two, b.dtype)
        with np.errstate(invalid="ignore", over="ignore"):
            same = x == y
            if x.dtype.kind in "fc" and y.dtype.kind in "fc":
                same |= np.isnan(x) & np.isnan(y)
            wrong = np.flatnonzero(~same)
            if not wrong.size:
                if a.dtype == b.dtype and a.dtype in FLOATS:  # -0.0 and 0.0, NaNs of other bits: other bytes, no other value
                    raw_x, raw_y = np.frombuffer(one, np.uint8), np.frombuffer(two, np.uint8)
                    at = int(np.flatnonzero(raw_x != raw_y)[0]) // ITEM_BYTES[a.dtype]
                    return 0, 0.0, _index(at, box)
                return None
            gap = float(np.max(np.abs(x[wrong].astype(_wide(x)) - y[wrong].astype(_wide(y)))))
        return int(wrong.size), inf if gap != gap else gap, _index(int(wrong[0]), box)  # noqa: PLR0124  NaN

    # --- telling

    def lines(self, took_s: float) -> Iterator[str]:
        """For people."""
        yield f"A  {show.plain(self._a.place.label)} ({self._a.format.name})"
        yield f"B  {show.plain(self._b.place.label)} ({self._b.format.name})"
        for title, names in (("only in A", self.only_a), ("only in B", self.only_b)):
            for name in names[:SHOWN]:
                yield f"{title}: {show.plain(name)}"
            if len(names) > SHOWN:
                yield f"{title}: ... and {show.count(len(names) - SHOWN)} more"
        counted = [d for d in self.found.values() if self._counts(d)]
        if counted:
            header = ("TENSOR", "DTYPE", "SHAPE", "DIFFERENT", "MAX ABS", "FIRST AT")
            yield show.table(header, (_row(d) for d in counted[:SHOWN]), right=("DIFFERENT", "MAX ABS"))
        if len(counted) > SHOWN:
            yield f"... and {show.count(len(counted) - SHOWN)} more tensors: --json lists all"
        for path, a, b in self.objects[:SHOWN]:
            yield f"{show.plain(path)}: {a} | {b}"
        if len(self.objects) > SHOWN:
            yield f"... and {show.count(len(self.objects) - SHOWN)} more values of objects"
        for title, side in (("A", 2), ("B", 1)):
            names = [entry[0] for entry in self.lonely if entry[side] == NOTHING]
            if names:
                yield f"not counted: objects only in {title}: {show.plain(show.some(names, NAMES_SHOWN))}"
        equal = len(self._common) - len(counted)
        close = len(self.found) - len(counted)
        verdict = "different" if self.different else "equal"
        within = f" ({close} within the tolerance)" if close else ""
        yield f"{verdict}: {show.count(equal)} of {show.count(len(self._common), 'common tensor')} equal{within}, {show.size(self.bytes_read)} compared in {show.duration(took_s)}"

    def document(self, took_s: float) -> dict[str, Any]:
        """For programs."""
        return {
            "a": {"path": self._a.place.label, "format": self._a.format.name},
            "b": {"path": self._b.place.label, "format": self._b.format.name},
            "equal": not self.different,
            "common": len(self._common),
            "only_a": self.only_a,
            "only_b": self.only_b,
            "tensors": [
                {
                    "name": d.name, "dtypes": d.dtypes, "shapes": d.shapes, "elements": d.elements,
                    "max_abs": "inf" if d.max_abs == inf else d.max_abs, "first": d.first, "counts": self._counts(d),
                }
                for d in self.found.values()
            ],
            "objects": [{"path": p, "a": a, "b": b} for p, a, b in self.objects],
            "objects_not_counted": [{"path": p, "a": a, "b": b} for p, a, b in self.lonely],
            "tolerance": self._tolerance,
            "bytes_compared": self.bytes_read,
            "elapsed_s": round(took_s, 3),
        }  # fmt: skip


def _row(d: Difference) -> list[str]:
    dtypes = d.dtypes[0] if d.dtypes[0] == d.dtypes[1] else f"{d.dtypes[0]} | {d.dtypes[1]}"
    shapes = str(list(d.shapes[0])) if d.shapes[0] == d.shapes[1] else f"{list(d.shapes[0])} | {list(d.shapes[1])}"
    if d.max_abs is None:
        return [d.name, dtypes, shapes, "-", "-", "-"]
    return [d.name, dtypes, shapes, show.count(d.elements), f"{d.max_abs:.3g}", "-" if d.first is None else str(list(d.first))]


def _names(checkpoint: Checkpoint, only: str | None) -> dict[str, str]:
    """Every name, and the tensor that has its values: an alias is a name too."""
    names = {n: n for n in checkpoint.tensors} | checkpoint.aliases
    return {n: held for n, held in names.items() if only is None or fnmatchcase(n, only)}


def _comparable(a: str, b: str) -> bool:
    """Whether values of the two dtypes are numbers that can be compared."""
    known = FLOATS | {"F8_E4M3", "F8_E4M3FNUZ", "F8_E5M2", "F8_E5M2FNUZ"} | {"I64", "I32", "I16", "I8", "U64", "U32", "U16", "U8", "BOOL"}
    return a == b or (a in known and b in known)


def _values(data: memoryview, dtype: str) -> np.ndarray[Any, Any]:
    values: np.ndarray[Any, Any] = np.frombuffer(data, NUMPY[dtype])
    if dtype.startswith("F8"):
        table = _float8(dtype)
        return table.take(values)
    return cast(values, dtype, "F32") if dtype == "BF16" else values


@cache
def _float8(dtype: str) -> np.ndarray[Any, Any]:
    """The values of all 256 bytes. Source: Micikevicius et al., "FP8 formats for deep learning" (2022); for FNUZ torch/headeronly/util/Float8_e4m3fnuz.h."""
    mantissa_bits = 3 if "E4M3" in dtype else 2
    unsigned_zero = dtype.endswith("FNUZ")
    bias = (1 << (6 - mantissa_bits)) - (0 if unsigned_zero else 1)
    codes = np.arange(256)
    exponent, mantissa = (codes & 0x7F) >> mantissa_bits, codes & ((1 << mantissa_bits) - 1)
    fraction = mantissa / (1 << mantissa_bits)
    size = np.where(exponent, (1 + fraction) * 2.0 ** (exponent - bias), fraction * 2.0 ** (1 - bias))
    values = np.where(codes & 0x80, -size, size).astype(np.float32)
    if unsigned_zero:
        values[0x80] = np.nan
    elif mantissa_bits == 3:
        values[[0x7F, 0xFF]] = np.nan
    else:  # as in IEEE 754
        values[[0x7C, 0xFC]] = np.inf, -np.inf
        values[[0x7D, 0x7E, 0x7F, 0xFD, 0xFE, 0xFF]] = np.nan
    return values


def _wide(values: np.ndarray[Any, Any]) -> Any:
    """A type in which differences do not wrap."""
    return np.complex128 if values.dtype.kind == "c" else np.float64


def _index(at: int, box: Box) -> tuple[int, ...]:
    return tuple(int(i) for i in np.unravel_index(at, box.extent)) if box.extent else ()


# --- objects ----------------------------------------------------------------------------------------------------------------


_Said = tuple[str, str, str]


def _objects(a: Checkpoint, b: Checkpoint, *, strict: bool) -> tuple[list[_Said], list[_Said]]:
    """(path, value in A, value in B) of what differs, and of what one of them lacks where that is no difference (not `strict`)."""
    left, right = _flat(a), _flat(b)
    found = _groups(a, b, strict=strict)
    lonely: list[_Said] = []
    for path in dict.fromkeys([*left, *right]):
        one, two = left.get(path), right.get(path)
        if one != two:
            both = one is not None and two is not None
            (found if both or strict else lonely).append((path, _short(one), _short(two)))
    return found, lonely


def _flat(checkpoint: Checkpoint) -> dict[str, str]:
    """Random states are each run's own, and no difference."""
    held: dict[str, Any] = {k: v for k, v in checkpoint.objects.items() if k != GROUPS}
    for rank, objects in checkpoint.per_rank.items():
        held |= {f"{k} of rank {rank}": v for k, v in objects.items() if "rng" not in k}
    return {path: _text(value) for name, tree in held.items() for path, value in foreign.leaves(tree, name)}


def _groups(a: Checkpoint, b: Checkpoint, *, strict: bool) -> list[_Said]:
    """Hyper-parameters, parameter by parameter: how formats group them is not what is trained with. Not `strict`: those alone that both have."""
    left, right = ({p: g for g in c.groups for p in g["params"]} for c in (a, b))
    if not (left and right):
        return []
    found: dict[_Said, list[str]] = {}
    for fqn in dict.fromkeys([*left, *right]):
        one, two = left.get(fqn), right.get(fqn)
        if one is None or two is None:
            found.setdefault(("membership", NOTHING if one is None else "there", NOTHING if two is None else "there"), []).append(fqn)
            continue
        for key in dict.fromkeys([*one, *two]):
            if key == "params" or (not strict and not (key in one and key in two)):
                continue
            x, y = _listed(one.get(key)), _listed(two.get(key))
            if x != y and _text(x) != _text(y):
                found.setdefault((key, _short(_text(x)), _short(_text(y))), []).append(fqn)
    return [(f"{GROUPS}: {key} of {show.some(names, 2)}", x, y) for (key, x, y), names in found.items()]


def _text(value: Any) -> str:
    """All of a value: equal text, equal values."""
    if isinstance(value, np.ndarray):
        return f"<array {value.dtype}{list(value.shape)} {xxhash.xxh3_64_hexdigest(np.ascontiguousarray(value).tobytes())}>"
    return repr(value)


def _short(text: str | None) -> str:
    if text is None:
        return NOTHING
    return show.plain(text if len(text) <= VALUE_CHARS else f"{text[:VALUE_CHARS]}...")


def _listed(value: Any) -> Any:
    """A tuple and a list of the same numbers say the same."""
    return list(value) if isinstance(value, tuple) else value
