"""Files to be written, as lists of segments: bytes that are known, boxes of tensors, and bytes that follow from checksums.

A writer says what a file consists of; `ckptd.convert` fills it, window by window, in any order and from several threads. So every byte's place
is known before the first one is read.

    Known    bytes: headers, pickles, padding
    Take     a box of a tensor, row-major, in the dtype that the target wants
    Sealed   bytes of known length that depend on the CRC-32 of what lies between two marks of the same file (zip directories)

`torch_file` lays out what `torch.save` writes: a zip of stored entries with 64-byte aligned data; `tensor_file` a safetensors file. Both take a tree or
a table whose tensors are `Taken`: views of logical tensors.

Source: PKWARE's APPNOTE 6.3.10 (zip, zip64), torch/csrc/serialization and caffe2/serialize/inline_container.cc (alignment, record names), the safetensors
specification.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property, lru_cache
from math import prod
from typing import Any, TypeAlias

import msgspec

from ckptd.core.boxes import Box, Shape
from ckptd.core.crc import crc32
from ckptd.core.image import ITEM_BYTES
from ckptd.core.logical import row_major
from ckptd.core.pickling import PersId, dumps, rebuild_tensor
from ckptd.errors import Unstorable


class Known(msgspec.Struct, frozen=True):
    """Bytes as they are."""

    data: bytes

    @property
    def nbytes(self) -> int:
        """Their number."""
        return len(self.data)


class Zeros(msgspec.Struct, frozen=True):
    """Padding."""

    nbytes: int


class Take(msgspec.Struct, frozen=True):
    """A box of the logical tensor `name`, row-major, as `dtype`."""

    name: str
    box: Box
    dtype: str

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return self.box.numel * ITEM_BYTES[self.dtype]


class Sealed(msgspec.Struct, frozen=True):
    """`nbytes` bytes that `make` returns, given the CRC-32 of each entry of the file (`Entry.mark` -> CRC)."""

    nbytes: int
    make: Callable[[Mapping[str, int]], bytes]


Plain: TypeAlias = Known | Zeros | Take


class Entry(msgspec.Struct, frozen=True, dict=True):
    """Segments in a row whose CRC-32 is wanted under `mark`."""

    mark: str
    segments: tuple[Plain, ...]

    @cached_property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return sum(s.nbytes for s in self.segments)


Segment: TypeAlias = Known | Zeros | Take | Sealed | Entry


class OutFile(msgspec.Struct, frozen=True, dict=True):
    """A file of the target: its name below the target's place, and what it consists of."""

    name: str
    segments: tuple[Segment, ...]

    @cached_property
    def nbytes(self) -> int:
        """Its size."""
        return sum(s.nbytes for s in self.segments)


# --- what a torch file's tree holds for a tensor ----------------------------------------------------------------------------


class Taken(msgspec.Struct, frozen=True):
    """A tensor of a file to be written: contiguous, of `shape`, made of `parts` that lie one after the other in its storage.

    Usually one part. A flat partition is many parts and zeros: its shape is (number of elements,).
    `share`: tensors with the same text share one storage (tied weights); "" for a storage of its own.
    `parameter`: torch.nn.Parameter with requires_grad.
    """

    dtype: str
    shape: Shape
    parts: tuple[Plain, ...]
    share: str = ""
    parameter: bool = False


def whole(name: str, dtype: str, shape: Shape, *, share: str = "") -> Taken:
    """All of a logical tensor."""
    return Taken(dtype, shape, (Take(name, Box.whole(shape), dtype),), share)


def boxed(name: str, dtype: str, box: Box) -> Taken:
    """A box of a logical tensor."""
    return Taken(dtype, box.extent, (Take(name, box, dtype),))


def number(dtype: str, value: float) -> Taken:
    """A 0-d tensor."""
    code = {"F32": "<f", "F64": "<d", "I64": "<q", "I32": "<i"}[dtype]
    return Taken(dtype, (), (Known(struct.pack(code, value)),))


# --- torch.save -------------------------------------------------------------------------------------------------------------

ALIGN_BYTES = 64
_LOCAL = struct.Struct("<IHHHHHIIIHH")
_CENTRAL = struct.Struct("<IHHHHHHIIIHHHHHII")
_U32_MAX = 0xFFFFFFFF


def torch_file(tree: Any, *, root: str = "archive") -> tuple[Segment, ...]:
    """The segments of `torch.save(tree)`. `tree`: plain values, `Taken` for tensors, and inert objects (`core.inert.Made`).

    Raises Unstorable for values that the pickle has no word for.
    """
    storages: list[Entry] = []
    shared: dict[str, str] = {}

    def persistent(value: Any) -> Any:
        if not isinstance(value, Taken):
            return None
        key = shared.get(value.share) if value.share else None
        if key is None:
            key = str(len(storages))
            storages.append(Entry(f"data/{key}", value.parts))
            if value.share:
                shared[value.share] = key
        held = sum(p.nbytes for p in value.parts)
        count = held // ITEM_BYTES[value.dtype]
        if count < prod(value.shape):
            msg = f"a tensor of shape {value.shape} over a storage of {count} elements"
            raise Unstorable(msg)
        return rebuild_tensor(PersId(value.dtype, key, count), value.shape, row_major(value.shape), parameter=value.parameter)

    key = _form(tree)
    pickled = dumps(tree, persistent) if key is None else _pickle_of(key)
    if key is not None:
        storages = [Entry("data/0", tree.parts if isinstance(tree, Taken) else next(v.parts for v in tree.values() if isinstance(v, Taken)))]
    storages = [Entry(f"{root}/{e.mark}", e.segments) for e in storages]
    laid = (_laid if key is not None else _laid.__wrapped__)(root, pickled, tuple((e.mark, e.nbytes) for e in storages))  # a large pickle is not kept
    storage = iter(storages)
    return tuple(next(storage) if s is None else s for s in laid)


def _form(tree: Any) -> tuple[Any, ...] | None:
    """What the pickle of a tree follows from, where that is one tensor, alone or among a few plain values; None otherwise. (A target may be thousands of such files.)"""
    if isinstance(tree, Taken):
        tree = {"": tree}
        alone = True
    elif type(tree) is dict and len(tree) <= 8 and sum(isinstance(v, Taken) for v in tree.values()) == 1:
        alone = False
    else:
        return None
    out: list[Any] = [alone]
    for name, value in tree.items():
        if isinstance(value, Taken) and not value.share and type(name) is str:
            count = sum(p.nbytes for p in value.parts) // ITEM_BYTES[value.dtype]
            if count < prod(value.shape):
                return None
            out.append((name, Taken, (value.dtype, count, value.shape, value.parameter)))
        elif type(value) in {int, str, bool} and type(name) is str:
            out.append((name, type(value), value))
        else:
            return None
    return tuple(out)


@lru_cache(maxsize=1024)
def _pickle_of(form: tuple[Any, ...]) -> bytes:
    """The pickle of a tree by its form."""
    alone, *items = form
    tree: dict[str, Any] = {}
    for name, kind, value in items:
        if kind is Taken:
            dtype, count, shape, parameter = value
            tree[name] = rebuild_tensor(PersId(dtype, "0", count), shape, row_major(shape), parameter=parameter)
        else:
            tree[name] = value
    return dumps(tree[""] if alone else tree)


@lru_cache(maxsize=1024)
def _laid(root: str, pickled: bytes, storages: tuple[tuple[str, int], ...]) -> tuple[Segment | None, ...]:
    """The segments of an archive with a pickle and storages of so many bytes; None where a storage goes. Files of the same form share one."""
    entries: list[tuple[str, bytes | int]] = [(f"{root}/data.pkl", pickled), (f"{root}/byteorder", b"little")]
    entries += storages
    entries += [(f"{root}/version", b"3\n"), (f"{root}/.data/serialization_id", b"0" * 40)]
    return _zip(entries)


def _zip(entries: Sequence[tuple[str, bytes | int]]) -> tuple[Segment | None, ...]:
    """Stored entries, their data aligned: bytes, or the size of what goes where None stands. Headers hold sizes and CRCs: those of the latter are sealed."""
    out: list[Segment | None] = []
    places: list[tuple[bytes, str, int, int]] = []
    sums: dict[str, int] = {}
    ready = bytearray()  # headers and data in a row that are known

    def known() -> None:
        if ready:
            out.append(Known(bytes(ready)))
            ready.clear()

    at = 0
    for name, held in entries:
        raw = name.encode()
        size = held if isinstance(held, int) else len(held)
        big = size >= _U32_MAX
        extra64 = struct.pack("<HHQQ", 1, 16, size, size) if big else b""
        fixed = _LOCAL.size + len(raw) + len(extra64) + 4
        pad = -(at + fixed) % ALIGN_BYTES
        extra = extra64 + struct.pack("<HH", 0x4246, pad) + b"Z" * pad  # "FB", as torch pads
        head = _local_maker(raw, name, size, extra, big=big)
        if isinstance(held, int):
            known()
            out += [Sealed(_LOCAL.size + len(raw) + len(extra), head), None]
        else:
            sums[name] = crc32(held)
            ready += head(sums) + held
        places.append((raw, name, size, at))
        at += _LOCAL.size + len(raw) + len(extra) + size
    known()
    directory_bytes = sum(_CENTRAL.size + len(raw) + len(_central_extra(size, begin)) for raw, _, size, begin in places)
    tail = _end(len(places), directory_bytes, at)

    def directory(given: Mapping[str, int]) -> bytes:
        return b"".join(_central(*p, sums[p[1]] if p[1] in sums else given[p[1]]) for p in places)

    out += [Sealed(directory_bytes, directory), Known(tail)]
    return tuple(out)


def _local_maker(raw: bytes, mark: str, size: int, extra: bytes, *, big: bool) -> Callable[[Mapping[str, int]], bytes]:
    def make(sums: Mapping[str, int]) -> bytes:
        short = _U32_MAX if big else size
        return _LOCAL.pack(0x04034B50, 45 if big else 20, 0x800, 0, 0, 0x21, sums[mark], short, short, len(raw), len(extra)) + raw + extra

    return make


def _central_extra(size: int, begin: int) -> bytes:
    fields = [v for v, big in ((size, size >= _U32_MAX), (size, size >= _U32_MAX), (begin, begin >= _U32_MAX)) if big]
    return struct.pack(f"<HH{len(fields)}Q", 1, 8 * len(fields), *fields) if fields else b""


def _central(raw: bytes, _name: str, size: int, begin: int, crc: int) -> bytes:
    extra = _central_extra(size, begin)
    short, at = min(size, _U32_MAX), min(begin, _U32_MAX)
    needs = 45 if extra else 20
    return _CENTRAL.pack(0x02014B50, needs, needs, 0x800, 0, 0, 0x21, crc, short, short, len(raw), len(extra), 0, 0, 0, 0, at) + raw + extra


def _end(count: int, directory_bytes: int, begin: int) -> bytes:
    tail = b""
    if count >= 0xFFFF or begin >= _U32_MAX or directory_bytes >= _U32_MAX:
        tail += struct.pack("<IQHHIIQQQQ", 0x06064B50, 44, 45, 45, 0, 0, count, count, directory_bytes, begin)
        tail += struct.pack("<IIQI", 0x07064B50, 0, begin + directory_bytes, 1)
    few = min(count, 0xFFFF)
    return tail + struct.pack("<IHHHHIIH", 0x06054B50, 0, 0, few, few, min(directory_bytes, _U32_MAX), min(begin, _U32_MAX), 0)


# --- safetensors ------------------------------------------------------------------------------------------------------------


def tensor_file(tensors: Iterable[tuple[str, Taken]], metadata: Mapping[str, str]) -> tuple[Segment, ...]:
    """The segments of a safetensors file: larger elements first, so that all are aligned; then by name."""
    ordered = sorted(tensors, key=lambda t: (-ITEM_BYTES[t[1].dtype], t[0]))
    table: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    at = 0
    for name, taken in ordered:
        size = sum(p.nbytes for p in taken.parts)
        table[name] = {"dtype": taken.dtype, "shape": list(taken.shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(table, separators=(",", ":")).encode()
    text = text.ljust(-(-(8 + len(text)) // 64) * 64 - 8)
    return (Known(len(text).to_bytes(8, "little") + text), *(p for _, taken in ordered for p in taken.parts))
