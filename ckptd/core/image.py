"""Images: one rank's part of one snapshot, a complete safetensors file as bytes.

    u64 n (little endian) | n bytes of JSON, space-padded so that 8 + n is a multiple of 4096 | tensor bytes, without holes

The layout is known before the first byte is copied, because shapes are known: `lay_out` places every tensor, `Layout.render`
writes the header of one step. `parse` is the strict inverse: it accepts what the safetensors specification and `ckptd/FORMAT.md`
allow and names everything else. The header's order is: tensors, then `__metadata__`, whose last entry is `ckptd`; per step only the
tail of that entry (attempt, step, objects) is new text.

Invariants
- entries are ordered by element size (largest first), then name, then box: every tensor is aligned to its element size;
- byte ranges are contiguous from 0 to the end of the image: no hole, no overlap, nothing after the last;
- every box lies inside its tensor's global shape.

Dtypes that stock readers do not know (complex128, float8 with e8m0, sub-byte types) are stored as bytes: dtype U8, one more
dimension of `itemsize`, and `views[name]` says what they are.

Format: https://huggingface.co/docs/safetensors (specification), torch.distributed.checkpoint._hf_utils of torch 2.13 (DCP_SHARDING_INFO).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import msgspec

from ckptd.core.boxes import Box, Shape
from ckptd.core.typed import Json
from ckptd.errors import BadImage, NewerFormat, Unstorable

FORMAT_VERSION = 1
ALIGN_BYTES = 4096
HEADER_BYTES_MAX = 100_000_000
"""The safetensors library refuses larger headers (safetensors/src/tensor.rs, MAX_HEADER_SIZE)."""
DIMS_MAX = 64
"""torch itself stops at 64 dimensions in its kernels."""
_METADATA = "__metadata__"

ITEM_BYTES: Mapping[str, int] = {
    "F64": 8, "I64": 8, "U64": 8, "C64": 8,
    "F32": 4, "I32": 4, "U32": 4,
    "F16": 2, "BF16": 2, "I16": 2, "U16": 2,
    "I8": 1, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E4M3FNUZ": 1, "F8_E5M2": 1, "F8_E5M2FNUZ": 1,
}  # fmt: skip
"""Bytes per element of every dtype that safetensors.torch 0.8 can load; others travel as U8 (see `views`)."""


class Piece(msgspec.Struct, frozen=True, gc=False):
    """A box of a tensor that one image holds. `shape` is the tensor's global shape, `view` the logical dtype if stored as bytes."""

    name: str
    dtype: str
    shape: Shape
    box: Box
    view: str = ""

    @property
    def nbytes(self) -> int:
        """Bytes of the box."""
        return self.box.numel * ITEM_BYTES[self.dtype]


class Entry(msgspec.Struct, frozen=True, gc=False):
    """A piece and its place: `begin` and `end` are bytes from the start of the image's data section."""

    key: str
    piece: Piece
    begin: int
    end: int


class Meta(msgspec.Struct, frozen=True, forbid_unknown_fields=False):
    """What the `ckptd` metadata entry says, in FORMAT.md's order. Unknown fields are left for later versions."""

    format: int
    job: str
    rank: int
    world_size: int
    coords: dict[str, int] = {}
    shapes: dict[str, Shape] = {}
    extra: dict[str, tuple[str, Shape]] = {}
    """key -> (name, start): further boxes of a tensor, keyed `<name>#1`, ..."""
    views: dict[str, str] = {}
    aliases: dict[str, str] = {}
    """alias -> name: tied weights; the alias is stored too, for readers that expect both keys."""
    attempt: int = 0
    step: int = 0
    objects: dict[str, Any] = {}


@dataclass(frozen=True, slots=True)
class Image:
    """A parsed header: where the data begins, what lies where, and what the image says of itself."""

    header_bytes: int
    image_bytes: int
    entries: tuple[Entry, ...]
    meta: Meta


@dataclass(frozen=True, slots=True)
class Layout:
    """Where every piece of one rank's image goes. Built once by `lay_out`, reused for every step."""

    header_bytes: int
    image_bytes: int
    entries: tuple[Entry, ...]
    _prefix: bytes = field(repr=False)
    """Header text up to and including the static part of the `ckptd` entry (an open JSON string)."""
    _meta: Meta = field(repr=False)
    """What that entry says, but for attempt, step and objects."""

    def render(self, *, attempt: int, step: int, objects: Mapping[str, Json]) -> bytes:
        """The header of one step, `header_bytes` long. Raises OverflowError if the objects do not fit any more: lay out anew."""
        tail = json.dumps({"attempt": attempt, "step": step, "objects": objects}, separators=(",", ":"), allow_nan=False)
        text = self._prefix + json.dumps(tail[1:])[1:-1].encode() + b'"}}'
        room = self.header_bytes - 8
        if len(text) > room:
            msg = f"header needs {len(text)} bytes, has {room}"
            raise OverflowError(msg)
        return room.to_bytes(8, "little") + text.ljust(room)

    def recognise(self, header: bytes | memoryview, image_bytes: int) -> Image | None:
        """What `parse` would say of an image that has this very layout: its header begins with the text that `render` writes, and only the tail is read.

        None if it has another, or if anything is wrong with it: then `parse` says what. A restart on the same mesh finds the layout that it makes.
        """
        at = 8 + len(self._prefix)
        if bytes(header[8:at]) != self._prefix:
            return None
        try:
            header_bytes = header_bytes_of(header, image_bytes)
            text = str(header[at:header_bytes], "ascii").rstrip(" ")
            fits = len(header) >= header_bytes and header_bytes - self.header_bytes == image_bytes - self.image_bytes
            if not fits or not text.endswith('"}}'):
                return None
            tail = msgspec.convert(_load("{" + _load(f'"{text[:-3]}"', "tail"), "tail"), _Tail)
            meta = _checked(msgspec.structs.replace(self._meta, attempt=tail.attempt, step=tail.step, objects=tail.objects))
        except (BadImage, ValueError):
            return None
        return Image(header_bytes, image_bytes, self.entries, meta)


def lay_out(
    pieces: Iterable[Piece],
    *,
    job: str,
    rank: int,
    world_size: int,
    coords: Mapping[str, int],
    aliases: Mapping[str, str],
    objects_bytes: int,
) -> Layout:
    """Place the pieces. `objects_bytes` is the room kept for the JSON of a step's objects, doubled for its growth.

    Raises Unstorable if the header would be larger than safetensors allows, or could not be read back.
    """
    ordered = sorted(pieces, key=lambda p: (-ITEM_BYTES[p.dtype], p.name, p.box))
    names = {p.name for p in ordered}
    _check_storable(ordered)
    entries: list[Entry] = []
    seen: dict[str, int] = {}
    at = 0
    for piece in ordered:
        count = seen.get(piece.name, 0)
        key = f"{piece.name}#{count}" if count else piece.name
        while count and key in names:  # somebody's tensor is called so
            count += 1
            key = f"{piece.name}#{count}"
        seen[piece.name] = count + 1
        entries.append(Entry(key, piece, at, at + piece.nbytes))
        at += piece.nbytes
    meta = Meta(
        FORMAT_VERSION, job, rank, world_size, dict(coords), {e.piece.name: e.piece.shape for e in entries},
        {e.key: (e.piece.name, e.piece.box.start) for e in entries if e.key != e.piece.name},
        {e.piece.name: e.piece.view for e in entries if e.piece.view}, dict(aliases),
    )  # fmt: skip
    prefix = _prefix(entries, meta)
    header_bytes = _rounded(8 + len(prefix) + 2 * objects_bytes + 1024)
    if header_bytes - 8 > HEADER_BYTES_MAX:
        msg = f"image of rank {rank}: a header of {header_bytes} bytes is over safetensors' limit of {HEADER_BYTES_MAX}"
        raise Unstorable(msg, remedy="fewer tensors per rank (fuse small ones), or smaller objects")
    return Layout(header_bytes, header_bytes + at, tuple(entries), prefix, meta)


def _check_storable(pieces: Sequence[Piece]) -> None:
    for piece in pieces:
        if piece.name == _METADATA or _has_surrogate(piece.name):
            msg = f"{piece.name!r}: a safetensors file cannot hold a tensor of this name"
            raise Unstorable(msg, remedy="rename it")
        if len(piece.shape) > DIMS_MAX:
            msg = f"{piece.name}: {len(piece.shape)} dimensions, at most {DIMS_MAX} are stored"
            raise Unstorable(msg)


def _has_surrogate(text: str) -> bool:
    return not text.isascii() and any("\ud800" <= c <= "\udfff" for c in text)


def _prefix(entries: Sequence[Entry], ckptd: Meta) -> bytes:
    tensors = {
        e.key: {"dtype": e.piece.dtype, "shape": list(e.piece.box.extent), "data_offsets": [e.begin, e.end]} for e in entries
    }
    static = {k: v for k, v in msgspec.to_builtins(ckptd).items() if k not in _Tail.__struct_fields__}
    meta = {
        "format": "pt",
        "DCP_VERSION": "1.0",
        "DCP_SHARDING_INFO": _compact({e.key: {"saved_offsets": list(e.piece.box.start)} for e in entries}),
    }
    body = _compact(tensors)[:-1] + ("," if tensors else "")
    open_string = json.dumps(_compact(static)[:-1] + ",")[:-1]
    return f'{body}"__metadata__":{_compact(meta)[:-1]},"ckptd":{open_string}'.encode()


def _compact(value: object) -> str:
    return json.dumps(value, separators=(",", ":"))


def _rounded(n: int) -> int:
    return -(-n // ALIGN_BYTES) * ALIGN_BYTES


def header_bytes_of(head: bytes | memoryview, image_bytes: int) -> int:
    """8 + n, read from the first eight bytes; checked against the limits before anything is allocated."""
    if len(head) < 8 or image_bytes < 8:
        msg = f"truncated: {min(len(head), image_bytes)} bytes are no safetensors file"
        raise BadImage(msg)
    n = int.from_bytes(head[:8], "little")
    if n > HEADER_BYTES_MAX:
        msg = f"header length {n} is over the limit of {HEADER_BYTES_MAX}"
        raise BadImage(msg)
    if 8 + n > image_bytes:
        msg = f"truncated: the header ends at byte {8 + n}, the image at {image_bytes}"
        raise BadImage(msg)
    return 8 + n


def parse(header: bytes | memoryview, image_bytes: int) -> Image:
    """Parse and check the header of an image of `image_bytes`. `header` holds at least its first 8 + n bytes.

    Raises BadImage (what is wrong, where), NewerFormat. Touches nothing but its arguments.
    """
    header_bytes = header_bytes_of(header, image_bytes)
    if len(header) < header_bytes:
        msg = f"truncated: {len(header)} of {header_bytes} header bytes"
        raise BadImage(msg)
    table = _load(header[8:header_bytes], "header")
    if not isinstance(table, dict):
        msg = "header: not a JSON object"
        raise BadImage(msg)
    described = table.pop(_METADATA, None)
    if not isinstance(described, dict) or not all(isinstance(v, str) for v in described.values()):
        msg = "header: __metadata__ is not a map of text to text"
        raise BadImage(msg)
    if "ckptd" not in described:
        msg = "header: no `ckptd` entry: this safetensors file was not written by ckptd"
        raise BadImage(msg)
    meta = _parse_meta(described["ckptd"])
    starts = _parse_starts(described.get("DCP_SHARDING_INFO", ""))
    entries = [_parse_entry(key, info, meta, starts) for key, info in _parse_infos(table).items()]
    entries.sort(key=lambda e: (e.begin, e.end))
    at = 0
    for entry in entries:
        if entry.begin != at:
            what = "overlaps what lies before it" if entry.begin < at else "follows a hole"
            msg = f"{entry.key}: begins at {entry.begin}, not at {at}: it {what}"
            raise BadImage(msg)
        at = entry.end
    if header_bytes + at != image_bytes:
        msg = f"the last tensor ends at byte {header_bytes + at}, the image at {image_bytes}"
        raise BadImage(msg)
    return Image(header_bytes, image_bytes, tuple(entries), meta)


def _parse_meta(text: str) -> Meta:
    raw = _load(text, "ckptd metadata")
    version = raw.get("format") if isinstance(raw, dict) else None
    if isinstance(version, int) and version > FORMAT_VERSION:
        msg = f"image format {version} is newer than this ckptd's {FORMAT_VERSION}"
        raise NewerFormat(msg, remedy="upgrade ckptd")
    try:
        return _checked(msgspec.convert(raw, Meta))
    except msgspec.ValidationError as e:
        msg = f"ckptd metadata: {e}"
        raise BadImage(msg) from e


def _checked(meta: Meta) -> Meta:
    try:
        msgspec.msgpack.encode(meta)  # the index will say it so: text is Unicode, numbers have 64 bits
    except (UnicodeEncodeError, OverflowError, RecursionError) as e:
        msg = f"ckptd metadata: {e}"
        raise BadImage(msg) from e
    if meta.format < 1 or not 0 <= meta.rank < meta.world_size or meta.step < 0 or meta.attempt < 0:
        msg = f"ckptd metadata: impossible format, rank, world size, step or attempt (rank {meta.rank} of {meta.world_size})"
        raise BadImage(msg)
    return meta


def _parse_starts(text: str) -> dict[str, _Starts]:
    try:
        return msgspec.convert(_load(text, "DCP_SHARDING_INFO"), dict[str, _Starts])
    except msgspec.ValidationError as e:
        msg = f"DCP_SHARDING_INFO: {e}"
        raise BadImage(msg) from e


def _parse_infos(table: Mapping[str, object]) -> dict[str, _TensorInfo]:
    """All at once, for there may be many thousands; one by one where one is wrong, to name it."""
    try:
        return msgspec.convert(table, dict[str, _TensorInfo])
    except msgspec.ValidationError:
        for key, raw in table.items():
            try:
                msgspec.convert(raw, _TensorInfo)
            except msgspec.ValidationError as e:
                msg = f"{key}: {e}"
                raise BadImage(msg) from e
        raise


def _parse_entry(key: str, info: _TensorInfo, meta: Meta, starts: Mapping[str, _Starts]) -> Entry:
    item_bytes = ITEM_BYTES.get(info.dtype)
    if item_bytes is None:
        msg = f"{key}: unknown dtype {info.dtype!r}"
        raise BadImage(msg)
    name, start = meta.extra.get(key, (key, None))
    shape = meta.shapes.get(name)
    where = starts.get(key)
    if shape is None or where is None or (start is not None and start != where.saved_offsets):
        msg = f"{key}: its global shape or its offsets are missing, or are told in two ways"
        raise BadImage(msg)
    begin, end = info.data_offsets
    if len(info.shape) > DIMS_MAX or min(begin, end, *info.shape, *shape, *where.saved_offsets) < 0:
        msg = f"{key}: too many dimensions, or a negative number"
        raise BadImage(msg)
    if end - begin != prod(info.shape) * item_bytes:
        msg = f"{key}: shape {list(info.shape)} of {info.dtype} does not fill bytes {begin} to {end}"
        raise BadImage(msg)
    if len(where.saved_offsets) != len(info.shape):
        msg = f"{key}: offsets {where.saved_offsets} do not fit shape {list(info.shape)}"
        raise BadImage(msg)
    box = Box(where.saved_offsets, info.shape)
    if not box.inside(shape):
        msg = f"{key}: box {box} does not lie in global shape {shape}"
        raise BadImage(msg)
    return Entry(key, Piece(name, info.dtype, shape, box, meta.views.get(name, "")), begin, end)


class _Tail(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What of `Meta` is new in every step, last in the text."""

    attempt: int
    step: int
    objects: dict[str, Any]


class _TensorInfo(msgspec.Struct, frozen=True, forbid_unknown_fields=True, gc=False):
    dtype: str
    shape: Shape
    data_offsets: tuple[int, int]


class _Starts(msgspec.Struct, frozen=True, gc=False):
    saved_offsets: Shape


def _load(text: str | bytes | memoryview, what: str) -> Any:
    """JSON, without the liberties that the standard parser takes: no duplicate keys, no NaN, no UTF-16, bounded depth."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        table = dict(pairs)
        if len(table) != len(pairs):
            msg = f"{what}: a key stands twice"
            raise BadImage(msg)
        return table

    def no_constant(name: str) -> None:
        msg = f"{what}: {name} is not JSON"
        raise BadImage(msg)

    try:
        if not isinstance(text, str):
            text = str(text, "utf-8")  # `json` itself would also guess UTF-16 and accept surrogates
        return json.loads(text, object_pairs_hook=unique, parse_constant=no_constant)
    except (ValueError, RecursionError) as e:
        msg = f"{what}: not JSON: {e}"
        raise BadImage(msg) from e
