"""A checkpoint of any format as ckptd sees it: logical tensors, where their elements lie, and the objects beside them.

A reader (`ckptd.integrations`) turns files into a `Checkpoint`; a writer turns a `Checkpoint` into files. Neither moves a byte of a tensor: both only
say where bytes lie, and `ckptd.convert` carries them. So a conversion's memory does not depend on the checkpoint's size, and what
is proven about rows is proven about bytes.

    Row      a box of a tensor, and the strided array in a file that holds it: byte of its first element, elements to step per dimension
    Tensor   dtype, global shape, rows that tile it; `replicas`, further rows that must hold the same bytes as those
    Checkpoint  tensors by name, objects by path, files by number

Views (rename, slice, concatenate, stack, permute, reshape, pad: `core.views`) are arithmetic on boxes and strides, so they cost nothing either.

Names are canonical, whatever the format calls things (DESIGN section 3)
    model.<fqn>                     a weight or buffer; fp32 where fp32 masters exist (see `derived`)
    optim.state.<fqn>.<slot>        exp_avg, exp_avg_sq, step, momentum_buffer, ...; `step` is a 0-d F32 tensor per parameter
    optim.state.<fqn>.master        the fp32 master of a 16-bit weight that is not its rounding (stochastic rounding)
and objects
    optim.param_groups              [{"lr": ..., "params": [fqn, ...]}, ...], in the optimizer's order
    step                            the training step
    extras.<name>                   everything else (schedulers, scalers, client state): typed-JSON values (core.typed)

Invariants, proven by `Checkpoint.prove`
- the rows of every tensor are disjoint and cover it: nothing is lost, nothing doubled. Padding is in no row, so it is neither compared nor hashed;
- every row's bytes lie inside its file;
- an alias names a tensor that exists.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

import msgspec

from ckptd.core.boxes import Box, Shape, boxes_of_flat_range, prove_tiles
from ckptd.core.image import ITEM_BYTES
from ckptd.errors import BadForeign

LITERAL = -1
"""File number of `Checkpoint.literals`: values that a format keeps in its objects (a step in a param group) and that are tensors here."""
FILL = -2
"""File number of padding that a view asks for: zeros, read from nowhere."""

MODEL, STATE, GROUPS = "model.", "optim.state.", "optim.param_groups"


class Row(msgspec.Struct, frozen=True, gc=False):
    """Where the elements of a box lie: byte `begin` of `file` is that of `box.start`; `strides` are elements per step, by dimension."""

    box: Box
    file: int
    begin: int
    strides: Shape

    def part(self, box: Box, item_bytes: int) -> Row:
        """The row of a box inside this one's."""
        skip = sum((a - b) * s for a, b, s in zip(box.start, self.box.start, self.strides, strict=True))
        return Row(box, self.file, self.begin + skip * item_bytes, self.strides)

    def moved(self, start: Shape) -> Row:
        """The same elements under another place in another tensor."""
        return Row(Box(start, self.box.extent), self.file, self.begin, self.strides)

    def span(self, item_bytes: int) -> tuple[int, int]:
        """First byte, and first byte past the last element."""
        if not self.box.numel:
            return self.begin, self.begin
        reach = sum((e - 1) * s for e, s in zip(self.box.extent, self.strides, strict=True))
        return self.begin, self.begin + (reach + 1) * item_bytes

    @property
    def contiguous(self) -> bool:
        """Whether the elements lie one after the other, in row-major order."""
        want = 1
        for e, s in zip(reversed(self.box.extent), reversed(self.strides), strict=True):
            if e != 1 and s != want:
                return False
            want *= e
        return True


def row_major(extent: Sequence[int]) -> Shape:
    """Strides of a contiguous array."""
    strides, at = [], 1
    for e in reversed(extent):
        strides.append(at)
        at *= e
    return tuple(reversed(strides))


def row_of(box: Box, file: int, begin: int, strides: Sequence[int] | None = None) -> Row:
    """A row; contiguous unless `strides` are given."""
    return Row(box, file, begin, row_major(box.extent) if strides is None else tuple(strides))


def rows_of_flat(shape: Shape, start: int, length: int, file: int, begin: int, item_bytes: int) -> list[Row]:
    """Rows of `length` elements of the flattened tensor, from element `start` on, that lie one after the other from byte `begin`."""
    rows = []
    for box in boxes_of_flat_range(shape, start, length):
        rows.append(row_of(box, file, begin))
        begin += box.numel * item_bytes
    return rows


@dataclass(frozen=True, slots=True)
class Tensor:
    """A logical tensor. `dtype`: safetensors' code. `replicas`: rows that repeat parts of `rows`; the engine compares their bytes."""

    dtype: str
    shape: Shape
    rows: tuple[Row, ...]
    replicas: tuple[Row, ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes of the whole tensor."""
        return prod(self.shape) * ITEM_BYTES[self.dtype]


class Held(msgspec.Struct, frozen=True):
    """A file of the checkpoint: its name below the checkpoint's place, and its size."""

    name: str
    bytes: int


@dataclass(slots=True)
class Checkpoint:
    """What a reader found. Mutable while it is built; `prove` is called before anybody relies on it.

    `format`: the reader's name. `aliases`: tied name -> the name that is stored. `buffers`: names among `model.` that are no parameters.
    `derived`: weight -> dtype that the source's framework computes with: the stored tensor is the fp32 master, its rounding to
    this dtype is the weight. `pairs`: (name in 16 bit, name of its master) where the file holds both; the engine compares them, and
    makes them one derived tensor or leaves both (`settle`).
    `scalars`: the values of all tensors of one element, for writers that store a step as a number; the engine reads them before it asks a writer.
    `per_rank`: objects that differ by rank, with nothing to say about another world size. `notes`: what a user should know.
    """

    format: str
    files: list[Held] = field(default_factory=list)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    objects: dict[str, Any] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)
    buffers: set[str] = field(default_factory=set)
    derived: dict[str, str] = field(default_factory=dict)
    pairs: list[tuple[str, str]] = field(default_factory=list)
    per_rank: dict[int, dict[str, Any]] = field(default_factory=dict)
    literals: bytearray = field(default_factory=bytearray)
    notes: list[str] = field(default_factory=list)
    scalars: dict[str, float] = field(default_factory=dict)
    _numbers: dict[str, int] = field(default_factory=dict)

    # --- building -----------------------------------------------------------------------------------------------------------

    def file(self, name: str, nbytes: int) -> int:
        """The number of a file, which is added if it is new."""
        number = self._numbers.setdefault(name, len(self.files))
        if number == len(self.files):
            self.files.append(Held(name, nbytes))
        return number

    def literal(self, name: str, dtype: str, data: bytes, shape: Shape = ()) -> None:
        """A tensor whose bytes the reader has."""
        begin = len(self.literals)
        self.literals += data
        self.add(name, dtype, shape, [row_of(Box.whole(shape), LITERAL, begin)])

    def add(self, name: str, dtype: str, shape: Shape, rows: Iterable[Row]) -> None:
        """Rows of a tensor, also of one that is known. A box that is known already becomes a replica. Raises BadForeign where dtype or shape differ."""
        if dtype not in ITEM_BYTES:
            msg = f"{name}: dtype {dtype} is not known"
            raise BadForeign(msg)
        old = self.tensors.get(name)
        if old is None:
            old = Tensor(dtype, shape, ())
        elif (old.dtype, old.shape) != (dtype, shape):
            msg = f"{name}: {dtype}{list(shape)} in one place, {old.dtype}{list(old.shape)} in another"
            raise BadForeign(msg)
        boxes = {r.box for r in old.rows}
        new: list[Row] = []
        again: list[Row] = []
        for row in rows:
            if row.box.numel == 0 and 0 not in shape:
                continue
            (again if row.box in boxes else new).append(row)
            boxes.add(row.box)
        self.tensors[name] = Tensor(dtype, shape, (*old.rows, *new), (*old.replicas, *again))

    def rename(self, names: Mapping[str, str]) -> None:
        """Tensors, aliases, buffers and param groups under other names; `names` holds FQNs, old -> new, and all slots of a parameter follow."""
        full = {f"{MODEL}{a}": f"{MODEL}{b}" for a, b in names.items()}
        tensors = {}
        for name, tensor in self.tensors.items():
            if name.startswith(STATE):
                fqn, _, slot = name.removeprefix(STATE).rpartition(".")
                new = f"{STATE}{names.get(fqn, fqn)}.{slot}"
            else:
                new = full.get(name, name)
            if new in tensors:
                msg = f"{name}: {new} is there already"
                raise BadForeign(msg)
            tensors[new] = tensor
        self.tensors = tensors
        self.aliases = {full.get(a, a): full.get(n, n) for a, n in self.aliases.items()}
        self.buffers = {full.get(n, n) for n in self.buffers}
        self.derived = {full.get(n, n): d for n, d in self.derived.items()}
        for group in self.objects.get(GROUPS) or ():
            group["params"] = [names.get(p, p) for p in group["params"]]

    # --- asking -------------------------------------------------------------------------------------------------------------

    @property
    def groups(self) -> list[dict[str, Any]]:
        """The param groups; none where there is no optimizer."""
        return self.objects.get(GROUPS) or []

    def parameters(self) -> list[str]:
        """FQNs that the optimizer knows, in its order; then other weights that are no buffers, in the file's order."""
        known = [p for g in self.groups for p in g["params"]]
        rest = [n.removeprefix(MODEL) for n in self.tensors if n.startswith(MODEL) and n not in self.buffers]
        return [*dict.fromkeys([*known, *rest])]

    def slots(self, fqn: str) -> dict[str, Tensor]:
        """The optimizer's state of a parameter."""
        return self._slots().get(fqn, {})

    def _slots(self) -> dict[str, dict[str, Tensor]]:
        found: dict[str, dict[str, Tensor]] = {}
        for name, tensor in self.tensors.items():
            if name.startswith(STATE):
                fqn, _, slot = name.removeprefix(STATE).rpartition(".")
                found.setdefault(fqn, {})[slot] = tensor
        return found

    def state(self) -> dict[str, dict[str, Tensor]]:
        """fqn -> slot -> tensor, of the whole optimizer (call once, not per parameter)."""
        return self._slots()

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(t.nbytes for t in self.tensors.values())

    # --- proof --------------------------------------------------------------------------------------------------------------

    def prove(self) -> None:
        """Raise NotTiled or BadForeign unless the invariants above hold; names the tensor and the hole."""
        for name, tensor in self.tensors.items():
            prove_tiles(name, tensor.shape, [r.box for r in tensor.rows])
            item = ITEM_BYTES[tensor.dtype]
            for row in (*tensor.rows, *tensor.replicas):
                if len(row.strides) != len(row.box.extent):
                    msg = f"{name}: strides {row.strides} do not fit {row.box}"
                    raise BadForeign(msg)
                begin, end = row.span(item)
                size = self.size_of(row.file)
                if row.file != FILL and (begin < 0 or end > size or min(row.strides, default=0) < 0):
                    where = self.files[row.file].name if row.file >= 0 else "the literals"
                    msg = f"{name}: {row.box} lies in bytes {begin} to {end} of {where}, which has {size}"
                    raise BadForeign(msg)
                if not row.box.inside(tensor.shape):
                    msg = f"{name}: {row.box} does not lie in {tensor.shape}"
                    raise BadForeign(msg)
        for alias, name in self.aliases.items():
            if name not in self.tensors:
                msg = f"{alias} is tied to {name}, which is not there"
                raise BadForeign(msg)

    def size_of(self, file: int) -> int:
        """Bytes of a file by number."""
        return len(self.literals) if file == LITERAL else 0 if file == FILL else self.files[file].bytes

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> Checkpoint:
        """A copy with other tensors; all else is shared."""
        return replace(self, tensors=dict(tensors))
