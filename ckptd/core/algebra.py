"""The algebra of views: steps that map a tensor's rows exactly, without moving a byte. Each has an inverse that is a step too.

    split   one dimension into several      merge    several adjacent ones into one
    cut     one tensor into several         concat   several into one, along a dimension
    unstack one tensor into a list          stack    a list into one, along a new dimension
    unpad   fewer elements in a dimension   pad      zeros at its end, read from nowhere
    permute dimensions in another order

A row is a box and a strided array. Where a box does not end with the new dimensions it becomes several boxes; where strides do not fit into one
dimension the row becomes several rows; what was cut and follows each other again is joined.

Steps as they stand in the file of a view (`core.views`) are structs; the numbers in them are expressions over the view's parameters, evaluated here and
not by Python.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import pairwise
from math import prod
from typing import Annotated, Any, TypeAlias

import msgspec

from ckptd.core.boxes import Box, Shape, boxes_of_flat_range
from ckptd.core.image import ITEM_BYTES
from ckptd.core.logical import FILL, Row, Tensor, row_major
from ckptd.errors import BadArgument

# --- the algebra ------------------------------------------------------------------------------------------------------------


def _mapped(tensor: Tensor, shape: Shape, way: Callable[[Row, int], Iterable[Row]], join: int | None = None) -> Tensor:
    """`tensor` as `shape`: each row becomes what `way` makes of it; rows that now follow each other along `join` become one."""
    item = ITEM_BYTES[tensor.dtype]

    def turned(rows: Sequence[Row]) -> tuple[Row, ...]:
        made = [r for row in rows if row.box.numel for r in way(row, item)]
        return tuple(made if join is None else _joined(made, join, item))

    return Tensor(tensor.dtype, shape, turned(tensor.rows), turned(tensor.replicas))


def _joined(rows: Sequence[Row], dim: int, item: int) -> list[Row]:
    """Rows that lie in one array and follow each other along `dim`, as one. What was cut for a split comes together again."""
    if len(rows) < 2:
        return [*rows]

    def key(row: Row) -> tuple[Any, ...]:
        box, rest = row.box, [d for d in range(len(row.strides)) if d != dim]
        return row.file, *(box.start[d] for d in rest), *(box.extent[d] for d in rest), box.start[dim]

    out: list[Row] = []
    for row in sorted(rows, key=key):
        joined = _follow(out[-1], row, dim, item) if out else None
        if joined is None:
            out.append(row)
        else:
            out[-1] = joined
    return out


def _follow(a: Row, b: Row, dim: int, item: int) -> Row | None:
    """`a` and `b` as one row if `b` goes on where `a` ends along `dim`."""
    x, y = a.box, b.box
    if a.file != b.file or a.file == FILL or y.start[dim] != x.start[dim] + x.extent[dim]:
        return None
    for d, (s, t) in enumerate(zip(a.strides, b.strides, strict=True)):
        if d != dim and (x.start[d] != y.start[d] or x.extent[d] != y.extent[d] or (s != t and x.extent[d] > 1)):
            return None
    stride, off = divmod(b.begin - a.begin, item * x.extent[dim])
    known = {r.strides[dim] for r in (a, b) if r.box.extent[dim] > 1}
    if off or stride <= 0 or known - {stride}:
        return None
    extent = _with(x.extent, dim, (x.extent[dim] + y.extent[dim],))
    return Row(Box(x.start, extent), a.file, a.begin, _with(a.strides, dim, (stride,)))


def _with(values: Shape, dim: int, new: Sequence[int], count: int = 1) -> Shape:
    """`values` with `new` in place of `count` of them from `dim` on."""
    return (*values[:dim], *new, *values[dim + count :])


def permute(tensor: Tensor, order: Sequence[int]) -> Tensor:
    """Dimension i of the result is dimension `order[i]` of `tensor`."""

    def turn(values: Shape) -> Shape:
        return tuple(values[d] for d in order)

    return _mapped(
        tensor, turn(tensor.shape), lambda r, _: [Row(Box(turn(r.box.start), turn(r.box.extent)), r.file, r.begin, turn(r.strides))]
    )


def split(tensor: Tensor, dim: int, sizes: Sequence[int]) -> Tensor:
    """Dimension `dim` as several of `sizes`, whose product it is. A row that ends within one of them becomes several."""
    steps = row_major(sizes)

    def way(row: Row, item: int) -> Iterator[Row]:
        first, stride = row.box.start[dim], row.strides[dim]
        for part in boxes_of_flat_range(sizes, first, row.box.extent[dim]):
            at = sum(s * n for s, n in zip(part.start, steps, strict=True)) - first
            box = Box(_with(row.box.start, dim, part.start), _with(row.box.extent, dim, part.extent))
            yield Row(box, row.file, row.begin + at * stride * item, _with(row.strides, dim, [n * stride for n in steps]))

    return _mapped(tensor, _with(tensor.shape, dim, sizes), way)


def merge(tensor: Tensor, dim: int, count: int) -> Tensor:
    """`count` dimensions from `dim` on as one. A row whose strides cannot be one becomes several."""
    for inner in range(dim + count - 2, dim - 1, -1):
        tensor = _merge_two(tensor, inner)
    return tensor


def _merge_two(tensor: Tensor, dim: int) -> Tensor:
    width = tensor.shape[dim + 1]

    def way(row: Row, item: int) -> Iterator[Row]:
        (a, b), (m, n), (s, t) = row.box.start[dim : dim + 2], row.box.extent[dim : dim + 2], row.strides[dim : dim + 2]

        def as_one(skip: int, start: int, extent: int, stride: int) -> Row:
            box = Box(_with(row.box.start, dim, (start,), 2), _with(row.box.extent, dim, (extent,), 2))
            return Row(box, row.file, row.begin + skip * s * item, _with(row.strides, dim, (stride,), 2))

        if width == 1:
            yield as_one(0, a, m, s)
        elif n == width and (m == 1 or s == n * t or row.file == FILL):
            yield as_one(0, a * width, m * width, t)
        else:
            yield from (as_one(i, (a + i) * width + b, n, t) for i in range(m))

    return _mapped(tensor, _with(tensor.shape, dim, (tensor.shape[dim] * width,), 2), way, join=dim)


def narrow(tensor: Tensor, dim: int, start: int, stop: int) -> Tensor:
    """Elements `start` to `stop` of a dimension."""
    shape = _with(tensor.shape, dim, (stop - start,))
    wanted = Box(_with((0,) * len(shape), dim, (start,)), shape)

    def way(row: Row, item: int) -> Iterator[Row]:
        common = row.box.intersect(wanted)
        if common is not None:
            yield row.part(common, item).moved(common.relative_to(wanted).start)

    return _mapped(tensor, shape, way)


def concat(tensors: Sequence[Tensor], dim: int) -> Tensor:
    """Tensors one after the other along a dimension."""
    rows, replicas, at = [], [], 0
    for t in tensors:
        rows += [_shifted(r, dim, at) for r in t.rows if r.box.numel]
        replicas += [_shifted(r, dim, at) for r in t.replicas if r.box.numel]
        at += t.shape[dim]
    item = ITEM_BYTES[tensors[0].dtype]
    shape = _with(tensors[0].shape, dim, (at,))
    return Tensor(tensors[0].dtype, shape, tuple(_joined(rows, dim, item)), tuple(_joined(replicas, dim, item)))


def _shifted(row: Row, dim: int, by: int) -> Row:
    return row.moved(_with(row.box.start, dim, (row.box.start[dim] + by,))) if by else row


def cut(tensor: Tensor, dim: int, sizes: Sequence[int]) -> list[Tensor]:
    """Tensors of `sizes` along a dimension, one after the other."""
    ends = [sum(sizes[:i]) for i in range(len(sizes) + 1)]
    return [narrow(tensor, dim, a, b) for a, b in pairwise(ends)]


def stack(tensors: Sequence[Tensor], dim: int) -> Tensor:
    """Tensors of one shape along a new dimension."""
    return concat([unsqueeze(t, dim) for t in tensors], dim)


def unsqueeze(tensor: Tensor, dim: int) -> Tensor:
    """A new dimension of one element."""

    def way(row: Row, _item: int) -> list[Row]:
        box = Box(_with(row.box.start, dim, (0,), 0), _with(row.box.extent, dim, (1,), 0))
        return [Row(box, row.file, row.begin, _with(row.strides, dim, (0,), 0))]

    return _mapped(tensor, _with(tensor.shape, dim, (1,), 0), way)


def unstack(tensor: Tensor, dim: int) -> list[Tensor]:
    """The tensors that lie along a dimension, without it."""

    def way(row: Row, _item: int) -> list[Row]:
        box = Box(_with(row.box.start, dim, ()), _with(row.box.extent, dim, ()))
        return [Row(box, row.file, row.begin, _with(row.strides, dim, ()))]

    return [_mapped(narrow(tensor, dim, i, i + 1), _with(tensor.shape, dim, ()), way) for i in range(tensor.shape[dim])]


def pad(tensor: Tensor, dim: int, size: int) -> Tensor:
    """Zeros at the end of a dimension, so that it has `size` elements."""
    missing = size - tensor.shape[dim]
    if missing == 0:
        return tensor
    box = Box(_with((0,) * len(tensor.shape), dim, (tensor.shape[dim],)), _with(tensor.shape, dim, (missing,)))
    fill = (Row(box, FILL, 0, row_major(box.extent)),) if box.numel else ()
    return Tensor(tensor.dtype, _with(tensor.shape, dim, (size,)), (*tensor.rows, *fill), tensor.replicas)


# --- numbers ----------------------------------------------------------------------------------------------------------------

_TOKEN = re.compile(r"\s*([A-Za-z_]\w*|\d+|[-+*/(),])")
_DEPTH_MAX = 32

Number: TypeAlias = int | str
"""A number of a view: itself, or an expression over its parameters: + - * / (exact), parentheses, up(a, b): a rounded up to a multiple of b."""


def evaluate(text: Number, of: Callable[[str], int]) -> int:
    """The value of an expression; `of` knows the names. Raises BadArgument."""
    if isinstance(text, int):
        return text
    tokens, at = [], 0
    while at < len(text.rstrip()):
        found = _TOKEN.match(text, at)
        if found is None:
            msg = f"{text!r}: a number cannot be read from {text[at:]!r} on"
            raise BadArgument(msg)
        tokens.append(found[1])
        at = found.end()
    reader = _Expression(text, tokens, of)
    value = reader.sum(0)
    if reader.tokens:
        msg = f"{text!r}: nothing is expected at {reader.tokens[0]!r}"
        raise BadArgument(msg)
    return value


class _Expression:
    """Recursive descent; no Python is evaluated."""

    def __init__(self, text: str, tokens: list[str], of: Callable[[str], int]) -> None:
        self.text, self.tokens, self.of = text, tokens, of

    def take(self, wanted: str = "") -> str:
        token = self.tokens.pop(0) if self.tokens else ""
        if not token or (wanted and token != wanted):
            msg = f"{self.text!r}: {wanted or 'a number'} is missing"
            raise BadArgument(msg)
        return token

    def sum(self, depth: int) -> int:
        value = self.product(depth)
        while self.tokens and self.tokens[0] in "+-":
            sign = 1 if self.tokens.pop(0) == "+" else -1
            value += sign * self.product(depth)
        return value

    def product(self, depth: int) -> int:
        value = self.atom(depth)
        while self.tokens and self.tokens[0] in "*/":
            if self.tokens.pop(0) == "*":
                value *= self.atom(depth)
                continue
            by = self.atom(depth)
            if by == 0 or value % by:
                msg = f"{self.text!r}: {value} is no multiple of {by}"
                raise BadArgument(msg)
            value //= by
        return value

    def atom(self, depth: int) -> int:
        if depth > _DEPTH_MAX:
            msg = f"{self.text[:60]!r}: too many parentheses"
            raise BadArgument(msg)
        token = self.take()
        if token == "(":  # noqa: S105  a parenthesis
            value = self.sum(depth + 1)
            self.take(")")
            return value
        if token.isdigit():
            return int(token)
        if not token[0].isalpha() and token[0] != "_":
            msg = f"{self.text!r}: a number is missing before {token!r}"
            raise BadArgument(msg)
        if token == "up" and self.tokens[:1] == ["("]:  # noqa: S105  a name
            self.take("(")
            value = self.sum(depth + 1)
            self.take(",")
            by = self.sum(depth + 1)
            self.take(")")
            return -(-value // max(1, by)) * max(1, by)
        return self.of(token)


# --- steps of a rule --------------------------------------------------------------------------------------------------------
# ruff: noqa: D102  what `run` and `inverse` do is said once, at _Step

Value: TypeAlias = "Tensor | list[Tensor]"
"""What a step maps: a tensor, or those of a pattern with a number that only one side has."""
Dim = Annotated[int, msgspec.Meta(ge=0, le=63)]


class _Step(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="do", tag=str.lower):
    """A step: `run` maps the values of a rule, `inverse` is the step back."""


class Split(_Step, frozen=True):
    """Dimension `dim` of value `at` (of all, if none is given) into `sizes`."""

    dim: Dim
    sizes: tuple[Number, ...]
    at: Dim | None = None

    def inverse(self) -> Step:
        return Merge(self.dim, self.sizes, self.at)

    def run(self, values: list[Value], n: Callable[[Number], int]) -> list[Value]:
        sizes = [n(s) for s in self.sizes]

        def one(t: Tensor) -> Tensor:
            _same(t.shape[self.dim : self.dim + 1], (prod(sizes),), self)
            return split(t, self.dim, sizes)

        return _each(values, self.at, one)


class Merge(_Step, frozen=True):
    """As many dimensions from `dim` on as there are `sizes`, which they have, into one."""

    dim: Dim
    sizes: tuple[Number, ...]
    at: Dim | None = None

    def inverse(self) -> Step:
        return Split(self.dim, self.sizes, self.at)

    def run(self, values: list[Value], n: Callable[[Number], int]) -> list[Value]:
        sizes = tuple(n(s) for s in self.sizes)

        def one(t: Tensor) -> Tensor:
            _same(t.shape[self.dim : self.dim + len(sizes)], sizes, self)
            return merge(t, self.dim, len(sizes))

        return _each(values, self.at, one)


class Permute(_Step, frozen=True):
    """Dimension i of the result is dimension `order[i]`."""

    order: tuple[Dim, ...]
    at: Dim | None = None

    def __post_init__(self) -> None:
        if sorted(self.order) != [*range(len(self.order))]:
            msg = f"{list(self.order)} is no order of dimensions"
            raise ValueError(msg)

    def inverse(self) -> Step:
        return Permute(tuple(self.order.index(d) for d in range(len(self.order))), self.at)

    def run(self, values: list[Value], _n: Callable[[Number], int]) -> list[Value]:
        def one(t: Tensor) -> Tensor:
            _same((len(t.shape),), (len(self.order),), self)
            return permute(t, self.order)

        return _each(values, self.at, one)


class Concat(_Step, frozen=True):
    """All values, of `sizes` in dimension `dim`, as one."""

    dim: Dim
    sizes: tuple[Number, ...]

    def inverse(self) -> Step:
        return Cut(self.dim, self.sizes)

    def run(self, values: list[Value], n: Callable[[Number], int]) -> list[Value]:
        tensors = _alike([_tensor(v, self) for v in values], self.dim, self)
        _same(tuple(t.shape[self.dim] for t in tensors), tuple(n(s) for s in self.sizes), self)
        return [concat(tensors, self.dim)]


class Cut(_Step, frozen=True):
    """The one value, whose dimension `dim` is the sum of `sizes`, as several."""

    dim: Dim
    sizes: tuple[Number, ...]

    def inverse(self) -> Step:
        return Concat(self.dim, self.sizes)

    def run(self, values: list[Value], n: Callable[[Number], int]) -> list[Value]:
        sizes = [n(s) for s in self.sizes]
        tensor = _tensor(values[0], self)
        _same((len(values), *tensor.shape[self.dim : self.dim + 1]), (1, sum(sizes)), self)
        return [*cut(tensor, self.dim, sizes)]


class Stack(_Step, frozen=True):
    """A list of `count` tensors (of a pattern with a number that only one side has) as one, along a new dimension."""

    dim: Dim
    count: Number
    at: Dim | None = None

    def inverse(self) -> Step:
        return Unstack(self.dim, self.count, self.at)

    def run(self, values: list[Value], n: Callable[[Number], int]) -> list[Value]:
        def one(v: Value) -> Value:
            if isinstance(v, Tensor):
                msg = f"{_shown(self)}: there is no list to stack"
                raise BadArgument(msg)
            _same((len(v),), (n(self.count),), self)
            _same((max(self.dim, len(v[0].shape)),), (len(v[0].shape),), self)
            return stack(_alike(v, None, self), self.dim)

        return [one(v) if self.at in {None, i} else v for i, v in enumerate(values)]


class Unstack(_Step, frozen=True):
    """A tensor as the list of those that lie along dimension `dim`."""

    dim: Dim
    count: Number
    at: Dim | None = None

    def inverse(self) -> Step:
        return Stack(self.dim, self.count, self.at)

    def run(self, values: list[Value], n: Callable[[Number], int]) -> list[Value]:
        def one(v: Value) -> Value:
            tensor = _tensor(v, self)
            _same(tensor.shape[self.dim : self.dim + 1], (n(self.count),), self)
            return unstack(tensor, self.dim)

        return [one(v) if self.at in {None, i} else v for i, v in enumerate(values)]


class Pad(_Step, frozen=True):
    """Dimension `dim` from `shorter` to `longer` elements, with zeros."""

    dim: Dim
    shorter: Number
    longer: Number
    at: Dim | None = None

    def inverse(self) -> Step:
        return Unpad(self.dim, self.shorter, self.longer, self.at)

    def run(self, values: list[Value], n: Callable[[Number], int]) -> list[Value]:
        shorter, longer = n(self.shorter), n(self.longer)

        def one(t: Tensor) -> Tensor:
            _same(t.shape[self.dim : self.dim + 1], (shorter,), self)
            _same((max(shorter, longer),), (longer,), self)
            return pad(t, self.dim, longer)

        return _each(values, self.at, one)


class Unpad(_Step, frozen=True):
    """Dimension `dim` from `longer` to `shorter` elements: what is left out was padding."""

    dim: Dim
    shorter: Number
    longer: Number
    at: Dim | None = None

    def inverse(self) -> Step:
        return Pad(self.dim, self.shorter, self.longer, self.at)

    def run(self, values: list[Value], n: Callable[[Number], int]) -> list[Value]:
        shorter, longer = n(self.shorter), n(self.longer)

        def one(t: Tensor) -> Tensor:
            _same(t.shape[self.dim : self.dim + 1], (longer,), self)
            _same((max(shorter, longer),), (longer,), self)
            return narrow(t, self.dim, 0, shorter)

        return _each(values, self.at, one)


Step: TypeAlias = Split | Merge | Permute | Concat | Cut | Stack | Unstack | Pad | Unpad


def _shown(step: Step | _Step) -> str:
    return msgspec.json.encode(step).decode()


def _same(have: Shape, want: Shape, step: _Step) -> None:
    if have != want:
        msg = f"{_shown(step)} needs {list(want)}, and has {list(have)}"
        raise BadArgument(msg)


def _tensor(value: Value, step: _Step) -> Tensor:
    if not isinstance(value, Tensor):
        msg = f"{_shown(step)}: a list has to be stacked first"
        raise BadArgument(msg)
    return value


def _alike(tensors: Sequence[Tensor], dim: int | None, step: _Step) -> list[Tensor]:
    """Tensors that differ in nothing but the length of `dim`."""
    first = tensors[0]
    for t in tensors:
        if t.dtype != first.dtype:
            msg = f"{_shown(step)}: {first.dtype} and {t.dtype} cannot become one tensor"
            raise BadArgument(msg)
        _same(t.shape if dim is None else _with(t.shape, dim, ()), first.shape if dim is None else _with(first.shape, dim, ()), step)
    return [*tensors]


def _each(values: list[Value], at: int | None, one: Callable[[Tensor], Tensor]) -> list[Value]:
    return [
        v if at not in {None, i} else one(v) if isinstance(v, Tensor) else [one(t) for t in v]
        for i, v in enumerate(values)
    ]  # fmt: skip
