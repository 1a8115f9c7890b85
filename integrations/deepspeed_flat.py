"""Flat partitions and shares of DeepSpeed's files as rows of parameters, and tensor parallel parts as whole tensors. See `deepspeed`."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

from ckptd.core.archive import Tensor as Stored
from ckptd.core.boxes import Box, Shape
from ckptd.core.image import DIMS_MAX, ITEM_BYTES
from ckptd.core.logical import MODEL, STATE, Checkpoint, Row, Tensor, row_of, rows_of_flat
from ckptd.errors import BadForeign

NUMEL_MAX = 1 << 48
"""Of a parameter: offsets in bytes stay below 2**63."""

def mapping(value: Any, what: str) -> dict[Any, Any]:
    """`value` if it is a dict. Raises BadForeign, which calls it `what`; so do the next two."""
    if not isinstance(value, dict):
        msg = f"{what} is a {type(value).__name__}, not a dict"
        raise BadForeign(msg)
    return value


def listing(value: Any, what: str) -> list[Any]:
    """A list or tuple as a list."""
    if not isinstance(value, list | tuple):
        msg = f"{what} is a {type(value).__name__}, not a list"
        raise BadForeign(msg)
    return list(value)


def stored(value: Any, what: str) -> Stored:
    """A tensor of a file."""
    if not isinstance(value, Stored):
        msg = f"{what} is a {type(value).__name__}, not a tensor"
        raise BadForeign(msg)
    return value


class Flat:
    """A tensor of a file that is to be read as flat elements."""

    def __init__(self, held: Any, file: int, what: str) -> None:
        tensor = stored(held, what)
        if not tensor.contiguous:
            msg = f"{what} is not contiguous"
            raise BadForeign(msg)
        self.dtype, self.numel, self.file, self.what = tensor.dtype, tensor.numel, file, what
        self._begin, self._item = tensor.begin, ITEM_BYTES.get(tensor.dtype, 0)

    def rows(self, shape: Shape, start: int, length: int, at: int) -> list[Row]:
        """Rows of `length` elements from `start` of a parameter, which are those from `at` on here."""
        if not (at >= 0 and at + length <= self.numel):
            msg = f"{self.what} has {self.numel} elements; {at + length} are needed"
            raise BadForeign(msg, remedy="is it the file of this run, and is the run's `zero_optimization` what `ds_config` says?")
        return rows_of_flat(shape, start, length, self.file, self._begin + at * self._item, self._item)


class Shards:
    """Tensors of all mp ranks by name, to be put together in the end."""

    def __init__(self, tp: int, patterns: Mapping[str, Any]) -> None:
        self._tp = tp
        self._patterns = patterns
        self._parts: dict[str, dict[int, Tensor]] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._parts

    def shape(self, name: str, tp_rank: int) -> Shape | None:
        """Of a tensor as this tensor parallel rank has it; None if it has none."""
        held = self._parts.get(name, {}).get(tp_rank)
        return held.shape if held else None

    def put(self, name: str, tp_rank: int, dtype: str, shape: Shape, rows: Sequence[Row]) -> None:
        """Rows of a tensor as this tensor parallel rank has it; what comes again is a replica."""
        mine = self._parts.setdefault(name, {})
        old = mine.get(tp_rank)
        if old is not None and (old.dtype, old.shape) != (dtype, shape):
            msg = f"{name}: {dtype}{list(shape)} in one place, {old.dtype}{list(old.shape)} in another"
            raise BadForeign(msg)
        known = {r.box for r in old.rows} if old else set()
        new = [r for r in rows if r.box not in known]
        again = [r for r in rows if r.box in known]
        mine[tp_rank] = Tensor(dtype, shape, (*(old.rows if old else ()), *new), (*(old.replicas if old else ()), *again))

    def into(self, out: Checkpoint) -> None:
        """Add everything. Raises BadForeign for a tensor whose cut is not known."""
        for name, parts in self._parts.items():
            first = parts[min(parts)]
            if self._tp == 1 or len(parts) == 1:
                out.tensors[name] = first
                continue
            fqn = name.removeprefix(MODEL) if name.startswith(MODEL) else name.removeprefix(STATE).rpartition(".")[0]
            out.tensors[name] = self._joined(fqn, [parts[r] for r in sorted(parts)])

    def _joined(self, fqn: str, parts: list[Tensor]) -> Tensor:
        first = parts[0]
        if not first.shape or self._matches("tp_replicated_parameter_patterns", fqn):
            more = [r for p in parts[1:] for r in (*p.rows, *p.replicas)]
            return Tensor(first.dtype, first.shape, first.rows, (*first.replicas, *more))
        if self._matches("parameter_to_average_patterns", fqn):
            msg = f"{fqn}: its tensor parallel copies differ and are to be averaged, which no checkpoint of ours can say"
            raise BadForeign(msg)
        dim, blocks = self._cut(fqn, [p.shape for p in parts])
        total = sum(sum(b) for b in blocks)
        if self._matches("vocabulary_parameter_patterns", fqn):
            total = int(self._patterns.get("original_vocab_size", total))
        shape = (*first.shape[:dim], total, *first.shape[dim + 1 :])
        rows: list[Row] = []
        replicas: list[Row] = []
        at, start = [0] * len(parts), 0
        for widths in blocks:
            for rank, width in enumerate(widths):
                item = ITEM_BYTES[first.dtype]
                rows += _moved(parts[rank].rows, dim, at[rank], width, start, total, item)
                replicas += _moved(parts[rank].replicas, dim, at[rank], width, start, total, item)
                at[rank] += width
                start += width
        return Tensor(first.dtype, shape, tuple(rows), tuple(replicas))

    def _cut(self, fqn: str, shapes: list[Shape]) -> tuple[int, list[list[int]]]:
        """(dimension, blocks: of each sub-parameter its width on every rank)."""
        if not self._patterns:
            msg = f"{fqn}: {len(shapes)} tensor parallel shards, and nothing says how they were cut"
            raise BadForeign(msg, remedy="save with a client state that has `universal_checkpoint_info`, as DeepSpeed's AutoTP and Megatron-DeepSpeed do")
        for entry in self._patterns.get("parameter_with_sub_params") or ():
            if any(re.match(p, fqn) for p in entry["patterns"]):
                dim, sizes = entry["partition_dim"], entry["shape"][entry["partition_dim"]]
                if not isinstance(sizes, tuple | list) or len(entry["shape"]) != len(shapes[0]):
                    msg = f"{fqn}: sub-parameters {entry['shape']} are not cut along a dimension that it has"
                    raise BadForeign(msg)
                widths = next((w for p, w in (self._patterns.get("sub_param_shard_widths") or {}).items() if p in entry["patterns"]), None)
                return dim, [list(w) for w in widths] if widths else [[s // len(shapes)] * len(shapes) for s in sizes]
        if self._matches("parameter_with_2_sub_params_cat_dim_0", fqn):
            return 0, [[s[0] // 2 for s in shapes]] * 2
        dim = 1 if self._matches("parameter_with_row_parallelism_patterns", fqn) else 0
        return dim, [[s[dim] for s in shapes]]

    def _matches(self, key: str, fqn: str) -> bool:
        return any(re.match(p, fqn) for p in self._patterns.get(key) or ())


def _moved(rows: Sequence[Row], dim: int, low: int, width: int, start: int, total: int, item: int) -> list[Row]:
    """The parts of rows that lie in [low, low + width) of a dimension, moved so that `low` is `start`; cut off at `total`."""
    out = []
    width = min(width, total - start)
    for row in rows:
        a, b = max(row.box.start[dim], low), min(row.box.stop[dim], low + width)
        if b > a:
            begin, extent = [*row.box.start], [*row.box.extent]
            begin[dim], extent[dim] = a, b - a
            part = row.part(Box(tuple(begin), tuple(extent)), item)
            begin[dim] = a - low + start
            out.append(part.moved(tuple(begin)))
    return out

def shapes_of(table: Any) -> dict[str, Shape]:
    """A group of `param_shapes`: shapes by name, in the order of the flat elements."""
    found = {str(n): tuple(s) for n, s in mapping(table, "param_shapes").items()}
    for name, shape in found.items():
        if len(shape) > DIMS_MAX or not all(type(e) is int and 0 <= e <= NUMEL_MAX for e in shape) or prod(shape) > NUMEL_MAX:
            msg = f"param_shapes: {name} cannot have the shape {shape}"
            raise BadForeign(msg)
    return found


def whole_row(tensor: Stored, file: int) -> Row:
    """All of a tensor of a file."""
    return row_of(Box.whole(tensor.shape), file, tensor.begin, tensor.stride)


class Layout:
    """Stages 1 and 2: a flat group of `dp` equal partitions."""

    def __init__(self, shapes: Mapping[str, Shape], gaps: Sequence[int], dp: int) -> None:
        self.shapes, self.dp = shapes, dp
        self.offsets: dict[str, int] = {}
        at = 0
        for i, (fqn, shape) in enumerate(shapes.items()):
            self.offsets[fqn] = at
            at += prod(shape) + (gaps[i] if i < len(gaps) else 0)
        self.total = at - (gaps[len(shapes) - 1] if 0 < len(shapes) <= len(gaps) else 0)
        self.per = -(-self.total // (2 * dp)) * 2

    def check(self, numels: list[int], names: list[str], what: str) -> None:
        """Each partition has all its elements, and at most the padding besides."""
        for rank, numel in enumerate(numels):
            lean = self.lean(rank)
            if not lean <= numel <= self.per:
                msg = f"{names[rank]}: {what} has {numel} elements, its parameters' shapes give {lean} to {self.per}"
                raise BadForeign(msg)

    def lean(self, rank: int) -> int:
        """Elements of a partition that are no padding."""
        return min(max(self.total - rank * self.per, 0), self.per)

    def slice(self, fqn: str, rank: int) -> tuple[int, int] | None:
        """(elements, start in the partition) of a parameter on a rank."""
        if fqn not in self.offsets:
            return None
        low, high = self.offsets[fqn], self.offsets[fqn] + prod(self.shapes[fqn])
        a, b = max(low, rank * self.per), min(high, (rank + 1) * self.per)
        return (b - a, a - rank * self.per) if b > a else None

    def rows(self, flats: list[Flat]) -> list[tuple[str, Shape, list[Row]]]:
        """The rows of every parameter."""
        out = []
        for fqn, shape in self.shapes.items():
            low, count = self.offsets[fqn], prod(shape)
            rows: list[Row] = []
            for rank in range(low // self.per, -(-(low + count) // self.per)) if count else ():
                length, at = self.slice(fqn, rank) or (0, 0)
                rows += flats[rank].rows(shape, rank * self.per + at - low, length, at)
            out.append((fqn, shape, rows))
        return out


class Shares:
    """Stage 3: of every parameter a share of ceil(numel / count) elements, one after the other."""

    def __init__(self, shapes: Mapping[str, Shape], count: int) -> None:
        self.shapes, self.count = shapes, count

    def rows(self, flats: list[Flat]) -> list[tuple[str, Shape, list[Row]]]:
        """The rows of every parameter; ranks beyond `count` repeat them."""
        out, at = [], 0
        for fqn, shape in self.shapes.items():
            share, numel = -(-prod(shape) // self.count), prod(shape)
            rows: list[Row] = []
            for rank, flat in enumerate(flats):
                start = min((rank % self.count) * share, numel)
                rows += flat.rows(shape, start, min(share, numel - start), at)
            out.append((fqn, shape, rows))
            at += share
        return out
