"""torch.save files, read without torch and without executing anything: the zip form, and the stream that was written before torch 1.6.

    zip     <root>/data.pkl            a pickle whose persistent ids name storages        (see core.pickles)
            <root>/data/<key>          one storage each, stored as it is
            <root>/byteorder, version, .format_version, .storage_alignment, .data/serialization_id
    stream  pickles: magic, protocol, system, value, keys | for each key: u64 elements, bytes

Nothing is copied: the value's tensors are `Tensor`s that say where in the file their elements lie. Whoever reads bytes is the caller's port
`Read`; a torch.save blob inside a larger file (DCP's `.distcp`) is read through a shifted port, `part`.

Invariants
- a zip is one archive from its first byte to its last: entries side by side without gap or overlap, then the directory, then its end. So no
  two readers can disagree about what it holds;
- entries are stored, plain, under distinct relative names, and the two descriptions of each entry agree;
- a storage has exactly the bytes that its pickle says; a tensor lies inside its storage;
- what is read into memory: the directory, the headers of entries and the pickles; each is bounded before it is read.

Formats: APPNOTE.TXT 6.3.9 of PKWARE; torch/serialization.py and caffe2/serialize/inline_container.cc of torch 2.13, which writes zip64 ends
always, sizes behind the data (flag 8), and no CRCs (0) under `set_crc32_options(False)` or `skip_data`.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, NoReturn, TypeAlias

import msgspec

from ckptd.core.image import DIMS_MAX
from ckptd.core.inert import STORAGES, name_of
from ckptd.core.pickles import KNOWN, LIMITS, Dtype, Global, Limits, Made, item_bytes, load, shown
from ckptd.errors import BadForeign

Read: TypeAlias = Callable[[int, int], bytes]
"""(begin, count) -> exactly these bytes. A short answer is refused."""

ENTRIES_MAX = 1_000_000
"""Entries of one archive. A rank of a mixture-of-experts model has some ten thousand storages."""
DIRECTORY_BYTES_MAX = 128 << 20
NAME_BYTES_MAX = 1024
BYTES_MAX = 1 << 50
"""Of a file: all sums stay below 2**63."""
EXPANDED_NUMEL_MAX = 1 << 31
"""Elements of a tensor that has more of them than its storage (`expand`): writing it out is no bomb."""

_END = struct.Struct("<4s4H2LH")
_END64 = struct.Struct("<4sQ2H2L4Q")
_LOCATOR = struct.Struct("<4sLQL")
_CENTRAL = struct.Struct("<4s6H3L5H2L")
_LOCAL = struct.Struct("<4s5H3L2H")
_SIZES_FOLLOW, _UTF8 = 0x0008, 0x0800
_FULL = 0xFFFFFFFF
"""A 32-bit field whose value stands in the zip64 extra."""
_MAGIC = 0x1950A86A20F9469CFC6C
_PROTOCOL = 1001
_WINDOW_BYTES = 1 << 20
_REMEDY = "is this file whole? torch.save it again; a TorchScript archive or a re-packed zip is no checkpoint"


class Entry(msgspec.Struct, frozen=True):
    """A file in an archive: `begin` is its first byte in the archive."""

    name: str
    begin: int
    nbytes: int
    crc: int


@dataclass(frozen=True, slots=True)
class Archive:
    """A checked zip file: its entries by name, in the order of their bytes."""

    entries: Mapping[str, Entry]


class Storage(msgspec.Struct, frozen=True):
    """A flat run of elements: `begin` is its first byte in the file."""

    key: str
    dtype: str
    numel: int
    begin: int
    nbytes: int


class Tensor(msgspec.Struct, frozen=True):
    """A strided view of a storage. `offset` and `stride` count elements of `dtype`, which may differ from the storage's."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: str
    requires_grad: bool = False

    def __post_init__(self) -> None:
        size = item_bytes(self.dtype)
        if len(self.shape) != len(self.stride) or len(self.shape) > DIMS_MAX:
            _refuse(f"storage {shown(self.storage.key)}: a tensor of {len(self.shape)} dimensions has {len(self.stride)} strides")
        if min(self.offset, *self.shape, *self.stride, 0) < 0 or max(self.offset, *self.shape, *self.stride, 0) > BYTES_MAX:
            _refuse(f"storage {shown(self.storage.key)}: a tensor with an impossible shape, stride or offset")
        last = self.offset + sum((d - 1) * s for d, s in zip(self.shape, self.stride, strict=True))
        if self.numel and (last + 1) * size > self.storage.nbytes:
            _refuse(
                f"storage {shown(self.storage.key)}: a tensor of shape {self.shape}, stride {self.stride}, offset {self.offset} "
                f"ends at byte {(last + 1) * size}, the storage at {self.storage.nbytes}"
            )
        if self.numel * size > self.storage.nbytes and self.numel > EXPANDED_NUMEL_MAX:
            _refuse(f"storage {shown(self.storage.key)}: {self.storage.nbytes} bytes are expanded to shape {self.shape}")

    @property
    def numel(self) -> int:
        """Elements."""
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of its elements, written side by side."""
        return self.numel * item_bytes(self.dtype)

    @property
    def begin(self) -> int:
        """Its first element's first byte in the file. Of a tensor without elements, its storage's: it has no place of its own."""
        return self.storage.begin + (self.offset * item_bytes(self.dtype) if self.numel else 0)

    @property
    def contiguous(self) -> bool:
        """Whether the elements lie side by side, in order."""
        expected = 1
        for dim, step in zip(reversed(self.shape), reversed(self.stride), strict=True):
            if dim != 1 and step != expected:
                return not self.numel
            expected *= dim
        return True


def part(read: Read, begin: int) -> Read:
    """The port of what begins inside a file at byte `begin`. Positions in what is read through it count from there."""
    return lambda at, count: read(begin + at, count)


def read_torch(
    read: Read, size: int, *, known: Mapping[tuple[str, str], Callable[..., Any]] = KNOWN, limits: Limits = LIMITS
) -> Any:
    """The value of a torch.save file of `size` bytes, with a Tensor for each tensor; of other objects what `pickles.load` makes.

    Raises BadForeign. `known` may extend `pickles.KNOWN`; torch's own rebuilders are added here.
    """
    head = _take(read, 0, min(size, 512), size)
    if head[:4] == b"PK\x03\x04":
        return _read_zip_value(read, size, {**known, **REBUILD}, limits)
    if head[257:262] == b"ustar" or (
        len(head) == 512 and head.startswith((b"storages\x00", b"tensors\x00", b"pickle\x00", b"./storages\x00"))
    ):
        _refuse(
            "a tar file: the format that torch.save wrote before 2018 is not read",
            "load it with torch 2.5 or older where it may do no harm",
        )
    if head[:1] != b"\x80":
        _refuse(f"neither a zip nor a stream of torch.save: it begins with {head[:8]!r}")
    return _read_stream(read, size, {**known, **REBUILD}, limits)


# --- zip --------------------------------------------------------------------------------------------------------------------


def read_zip(read: Read, size: int) -> Archive:
    """Check that the `size` bytes are one plain archive, and say where its entries lie. Reads the directory and the entries' headers."""
    if not _END.size <= size <= BYTES_MAX:
        _refuse(f"{size} bytes are no zip file")
    count, directory_begin, directory_bytes = _read_end(read, size)
    if count > ENTRIES_MAX or directory_bytes > DIRECTORY_BYTES_MAX or count * _CENTRAL.size > directory_bytes:
        _refuse(f"zip: {count} entries in a directory of {directory_bytes} bytes; at most {ENTRIES_MAX} in {DIRECTORY_BYTES_MAX}")
    directory = _take(read, directory_begin, directory_bytes, size)
    found = sorted(_read_directory(directory, count, directory_begin), key=lambda c: c.header_begin)
    if found and found[0].header_begin != 0:
        _refuse(f"zip: {found[0].header_begin} bytes stand before the first entry")
    if not found and directory_begin:
        _refuse("zip: bytes without an entry stand before the directory")
    names = {c.name.casefold() for c in found}
    if len(names) != len(found):
        _refuse("zip: two entries have the same name, or differ in case only")
    entries: dict[str, Entry] = {}
    ends = [*(c.header_begin for c in found[1:]), directory_begin]
    for here, after in zip(found, ends, strict=False):
        entries[here.name] = _read_entry(read, here, after, size)
    return Archive(entries)


class _Central(msgspec.Struct, frozen=True):
    """An entry as the directory describes it."""

    name: str
    raw: bytes
    flags: int
    crc: int
    nbytes: int
    header_begin: int


def _read_end(read: Read, size: int) -> tuple[int, int, int]:
    """(entries, the directory's first byte, its bytes). The end has no comment, so it can stand in one place only."""
    end = size - _END.size
    sign, disk, first_disk, here, count, nbytes, begin, comment = _END.unpack(_take(read, end, _END.size, size))
    if sign != b"PK\x05\x06" or comment:
        _refuse("zip: no end of the directory at the end of the file: it is cut short, or something follows")
    if disk or first_disk or here != count:
        _refuse("zip: in several volumes")
    narrow = (count, nbytes, begin)
    tail = _take(read, end - 20, 20, size) if end >= 20 else b""
    if tail[:4] == b"PK\x06\x07":
        _, disk, end64, disks = _LOCATOR.unpack(tail)
        if disk or disks != 1 or end64 != end - 20 - _END64.size:
            _refuse("zip: its zip64 end is not where it says")
        sign, length, _, _, disk, first_disk, here, count, nbytes, begin = _END64.unpack(_take(read, end64, _END64.size, size))
        if sign != b"PK\x06\x06" or length != _END64.size - 12 or disk or first_disk or here != count:
            _refuse("zip: its zip64 end is malformed")
        for value, said, full in zip((count, nbytes, begin), narrow, (0xFFFF, _FULL, _FULL), strict=True):
            if said not in {value, full}:
                _refuse(f"zip: its two ends differ: {said} and {value}")
        end = end64
    elif narrow[0] == 0xFFFF or _FULL in narrow[1:]:
        _refuse("zip: a zip64 end is announced and missing")
    if begin + nbytes != end:
        _refuse(f"zip: the directory goes from byte {begin} to {begin + nbytes}, its end begins at {end}")
    return count, begin, nbytes


def _read_directory(directory: bytes, count: int, directory_begin: int) -> Iterator[_Central]:
    at = 0
    for _ in range(count):
        if at + _CENTRAL.size > len(directory):
            _refuse("zip: the directory holds fewer entries than it says")
        (sign, _, _, flags, method, _, _, crc, packed, nbytes, name_bytes, extra_bytes, comment, disk, _, mode, begin) = (
            _CENTRAL.unpack_from(directory, at)
        )
        extra_at = at + _CENTRAL.size + name_bytes
        after = extra_at + extra_bytes
        if sign != b"PK\x01\x02" or after > len(directory) or comment or disk:
            _refuse(f"zip: byte {directory_begin + at}: no directory entry, or one with a comment")
        raw = directory[at + _CENTRAL.size : extra_at]
        name = _checked_name(raw, flags)
        if method or flags & ~(_SIZES_FOLLOW | _UTF8):
            _refuse(f"zip: {shown(name)} is compressed or encrypted (method {method}, flags {flags:#x}); torch stores")
        if (mode >> 16) & 0xF000 not in {0, 0x8000}:
            _refuse(f"zip: {shown(name)} is no regular file")
        nbytes, packed, begin = _widened(name, directory[extra_at:after], (nbytes, packed, begin))
        if packed != nbytes or begin > directory_begin or nbytes > directory_begin:
            _refuse(
                f"zip: {shown(name)}: {nbytes} bytes packed as {packed} at {begin}, in a file whose directory begins at {directory_begin}"
            )
        yield _Central(name, raw, flags, crc, nbytes, begin)
        at = after
    if at != len(directory):
        _refuse("zip: the directory holds more than its entries")


def _checked_name(raw: bytes, flags: int) -> str:
    if not 0 < len(raw) <= NAME_BYTES_MAX:
        _refuse(f"zip: a name of {len(raw)} bytes")
    try:
        name = str(raw, "utf-8" if flags & _UTF8 else "ascii")
    except UnicodeDecodeError:
        _refuse(f"zip: the name {shown(raw)} is not text")
    if any(c < " " or c in "\\\x7f" for c in name) or any(p in {"", ".", ".."} for p in name.split("/")):
        _refuse(f"zip: the name {shown(name)} is no plain relative path")
    return name


def _widened(name: str, extra: bytes, narrow: tuple[int, ...]) -> list[int]:
    """The fields of a header, those that are full taken from its zip64 extra, which holds these and no others."""
    wide = b""
    at, seen = 0, False
    while at + 4 <= len(extra):
        tag, count = struct.unpack_from("<2H", extra, at)
        if at + 4 + count > len(extra) or (tag == 1 and seen):
            _refuse(f"zip: {shown(name)}: a malformed extra field")
        if tag == 1:
            wide, seen = extra[at + 4 : at + 4 + count], True
        at += 4 + count
    full = [v == _FULL for v in narrow]
    if at != len(extra) or len(wide) != 8 * sum(full):
        _refuse(f"zip: {shown(name)}: its zip64 extra has {len(wide)} bytes, {8 * sum(full)} are announced")
    values = iter(struct.unpack(f"<{sum(full)}Q", wide))
    return [next(values) if is_full else v for v, is_full in zip(narrow, full, strict=True)]


def _read_entry(read: Read, here: _Central, after: int, size: int) -> Entry:
    """Check the header in front of the data, and what follows it up to the next entry at `after`."""
    names = len(here.raw)
    head = _take(read, here.header_begin, min(_LOCAL.size + names + 20, after - here.header_begin), size)
    if len(head) < _LOCAL.size + names:
        _refuse(f"zip: {shown(here.name)}: its header overlaps the next entry")
    sign, _, flags, method, _, _, crc, packed, nbytes, name_bytes, extra_bytes = _LOCAL.unpack_from(head)
    if sign != b"PK\x03\x04" or flags != here.flags or method or head[_LOCAL.size : _LOCAL.size + name_bytes] != here.raw:
        _refuse(f"zip: {shown(here.name)}: the header in front of its data is another entry's")
    if _FULL in {packed, nbytes}:
        wide = head[_LOCAL.size + names :]
        if len(wide) < 20 or wide[:4] != b"\x01\x00\x10\x00" or extra_bytes < 20:
            _refuse(f"zip: {shown(here.name)}: no zip64 extra in front of its data")
        nbytes, packed = struct.unpack_from("<2Q", wide, 4)
    follows = bool(flags & _SIZES_FOLLOW)
    if (crc, packed, nbytes) != (here.crc, here.nbytes, here.nbytes) and not (follows and (crc, packed, nbytes) == (0, 0, 0)):
        _refuse(f"zip: {shown(here.name)}: the header in front of its data has other sizes or another CRC than the directory")
    begin = here.header_begin + _LOCAL.size + names + extra_bytes
    gap = after - begin - here.nbytes
    if gap < 0 or (gap and not follows) or (follows and gap not in {16, 24}):
        _refuse(f"zip: {shown(here.name)}: its data goes from byte {begin} to {begin + here.nbytes}, the next begins at {after}")
    if follows:
        told = struct.unpack("<4sLLL" if gap == 16 else "<4sLQQ", _take(read, after - gap, gap, size))
        if told != (b"PK\x07\x08", here.crc, here.nbytes, here.nbytes):
            _refuse(f"zip: {shown(here.name)}: what is said behind its data differs from the directory")
    return Entry(here.name, begin, here.nbytes, here.crc)


def _read_zip_value(read: Read, size: int, known: Mapping[tuple[str, str], Callable[..., Any]], limits: Limits) -> Any:
    entries = read_zip(read, size).entries
    roots = [name.removesuffix("data.pkl") for name in entries if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(roots) != 1:
        _refuse(f"{len(roots)} entries are called <root>/data.pkl in this zip: torch.save writes one")
    root = roots[0]
    stray = next((name for name in entries if not name.startswith(root)), "")
    if stray or f"{root}constants.pkl" in entries:
        _refuse(f"a zip, but not as torch.save writes it: it holds {shown(stray or 'constants.pkl')}")
    order = entries.get(f"{root}byteorder")
    if order is not None and _take(read, order.begin, min(order.nbytes, 16), size) != b"little":
        _refuse("not little-endian", "convert it on the machine that wrote it")
    pickle = entries[f"{root}data.pkl"]
    if pickle.nbytes > limits.bytes_max:
        _refuse(f"its pickle of {pickle.nbytes} bytes is over the limit of {limits.bytes_max}")
    data = _take(read, pickle.begin, pickle.nbytes, size)
    if pickle.crc and zlib.crc32(data) != pickle.crc:
        _refuse("its pickle does not have the CRC that the directory says")

    def storage(pid: Any) -> Storage:
        key, dtype, numel = _checked_pid(pid, 5)
        entry = entries.get(f"{root}data/{key}")
        if entry is None or entry.nbytes != numel * item_bytes(dtype):
            held = "is missing" if entry is None else f"has {entry.nbytes} bytes"
            _refuse(f"storage {shown(key)}: {numel} elements of {dtype} are announced, the entry {held}")
        return Storage(key, dtype, numel, entry.begin, entry.nbytes)

    value, end = load(data, persistent=storage, known=known, limits=limits)
    if end != len(data):
        _refuse(f"its pickle ends at byte {end} of {len(data)}")
    return value


# --- stream -----------------------------------------------------------------------------------------------------------------


def _read_stream(read: Read, size: int, known: Mapping[tuple[str, str], Callable[..., Any]], limits: Limits) -> Any:
    """The pickles stand in front of the storages, whose places are known only after the last pickle: so the value is read twice."""
    window = min(size, _WINDOW_BYTES)
    while True:
        data = _take(read, 0, window, size)
        try:
            return _parse_stream(data, read, size, known, limits)
        except BadForeign:  # because the window ends too early?
            if window >= min(size, limits.bytes_max):
                raise
            window = min(window * 8, size, limits.bytes_max)


def _parse_stream(data: bytes, read: Read, size: int, known: Mapping[tuple[str, str], Callable[..., Any]], limits: Limits) -> Any:
    at = 0

    def following(persistent: Callable[[Any], Any] | None = None) -> Any:
        nonlocal at
        value, used = load(memoryview(data)[at:], persistent=persistent, known=known, limits=limits)
        at += used
        return value

    magic = following()
    if type(magic) is not int or magic != _MAGIC:
        _refuse("a plain pickle, not a file of torch.save")
    version = following()
    if type(version) is not int or version != _PROTOCOL:
        _refuse("a stream of torch.save, in another version than 1001")
    system = following()
    if type(system) is not dict or system.get("little_endian") is not True:
        _refuse("not little-endian", "convert it on the machine that wrote it")
    sizes: dict[str, tuple[int, int]] = {}

    def announced(pid: Any) -> Storage:
        key, dtype, numel = _checked_pid(pid, 6)
        if sizes.setdefault(key, (numel, item_bytes(dtype))) != (numel, item_bytes(dtype)):
            _refuse(f"storage {shown(key)} is announced with two sizes")
        return _viewed(Storage(key, dtype, numel, 0, numel * item_bytes(dtype)), pid[5])

    value_at = at
    following(announced)
    keys = following()
    begins = _place(read, at, size, keys, sizes)

    def placed(pid: Any) -> Storage:
        key, dtype, numel = _checked_pid(pid, 6)
        return _viewed(Storage(key, dtype, numel, begins[key], numel * item_bytes(dtype)), pid[5])

    value, _ = load(memoryview(data)[value_at:], persistent=placed, known=known, limits=limits)
    return value


def _place(read: Read, at: int, size: int, keys: Any, sizes: Mapping[str, tuple[int, int]]) -> dict[str, int]:
    """Where each storage begins: they stand from byte `at` to the end, in the order of `keys`."""
    if type(keys) is not list or not all(type(k) is str for k in keys) or len(set(keys)) != len(keys) or set(keys) != sizes.keys():
        _refuse("the storages that follow are not those of the value")
    begins: dict[str, int] = {}
    for key in keys:
        numel, item = sizes[key]
        if int.from_bytes(_take(read, at, 8, size), "little", signed=True) != numel:
            _refuse(f"storage {shown(key)}: {numel} elements are announced, byte {at} says otherwise")
        begins[key] = at + 8
        at += 8 + numel * item
        if at > size:
            _refuse(f"storage {shown(key)} ends at byte {at}, the file at {size}")
    if at != size:
        _refuse(f"the last storage ends at byte {at}, the file at {size}")
    return begins


def _viewed(storage: Storage, view: Any) -> Storage:
    """The part of a storage that another one is (torch before 0.4): (key, offset, elements)."""
    if view is None:
        return storage
    if (
        type(view) is not tuple
        or len(view) != 3
        or type(view[0]) is not str
        or type(view[1]) is not int
        or type(view[2]) is not int
    ):
        _refuse(f"storage {shown(storage.key)}: a malformed view")
    key, offset, numel = view
    if offset < 0 or numel < 0 or offset + numel > storage.numel:
        _refuse(f"storage {shown(key)}: elements {offset} to {offset + numel} of {storage.numel}")
    item = item_bytes(storage.dtype)
    return Storage(key, storage.dtype, numel, storage.begin + offset * item, numel * item)


# --- what torch's rebuilders make -------------------------------------------------------------------------------------------


def _checked_pid(pid: Any, length: int) -> tuple[str, str, int]:
    """(key, dtype, elements) of `("storage", class, key, location, elements[, view])`."""
    if type(pid) is not tuple or len(pid) != length or type(pid[0]) is not str or pid[0] != "storage" or type(pid[1]) is not Global:
        _refuse(f"a persistent id that is no storage: {name_of(pid)}")
    _, kind, key, location, numel = pid[:5]
    dtype = STORAGES.get((kind.module, kind.name))
    if dtype is None or type(key) is not str or type(location) is not str or type(numel) is not int or not 0 <= numel <= BYTES_MAX:
        _refuse(f"a storage of class {shown(kind)} with a malformed key, place or size")
    return key, dtype, numel


def _tensor(storage: Any, offset: Any, shape: Any, stride: Any, dtype: str, *, requires_grad: Any = False) -> Tensor:
    if type(storage) is not Storage or type(offset) is not int or type(shape) is not tuple or type(stride) is not tuple:
        _refuse(f"a tensor of {name_of(storage)}, or with a malformed shape, stride or offset")
    if type(requires_grad) is not bool or not all(type(n) is int for n in (*shape, *stride)):
        _refuse("a tensor whose shape or stride is no tuple of ints")
    return Tensor(storage, offset, shape, stride, dtype, requires_grad)


def _dtype_of(storage: Any) -> str:
    return storage.dtype if type(storage) is Storage else ""


def _check_plain(metadata: Any) -> None:
    if metadata and (type(metadata) is not dict or any(v is not False for v in metadata.values())):
        _refuse("a tensor that is to be conjugated or negated when read", "save it after .resolve_conj().resolve_neg()")


def _rebuild_tensor(storage: Any, offset: Any, shape: Any, stride: Any) -> Tensor:
    return _tensor(storage, offset, shape, stride, _dtype_of(storage))


def _rebuild_tensor_v2(
    storage: Any, offset: Any, shape: Any, stride: Any, requires_grad: Any, hooks: Any, metadata: Any = None
) -> Tensor:  # fmt: skip
    _check_plain(metadata)
    del hooks  # torch writes none, and nothing here would call them
    return _tensor(storage, offset, shape, stride, _dtype_of(storage), requires_grad=requires_grad)


def _rebuild_tensor_v3(
    storage: Any, offset: Any, shape: Any, stride: Any, requires_grad: Any, hooks: Any, dtype: Any, metadata: Any = None
) -> Tensor:  # fmt: skip
    """Of dtypes that have no storage class of their own."""
    _check_plain(metadata)
    del hooks
    if type(dtype) is not Dtype:
        _refuse(f"a tensor whose dtype is a {name_of(dtype)}")
    return _tensor(storage, offset, shape, stride, dtype.name, requires_grad=requires_grad)


def _rebuild_parameter(data: Any, requires_grad: Any, hooks: Any, state: Any = None) -> Any:
    """A Parameter is its tensor. One of a DTensor or another subclass is that. Attributes are no state of training."""
    del hooks, state
    if type(requires_grad) is not bool or type(data) not in {Tensor, Made}:
        _refuse(f"a parameter of a {name_of(data)}")
    return msgspec.structs.replace(data, requires_grad=requires_grad) if type(data) is Tensor else data


def _rebuild_from_type_v2(rebuild: Any, kind: Any, args: Any, state: Any) -> Any:
    """A tensor with attributes is its tensor; a subclass (DTensor) is a Made of its class, with the state as it stands."""
    if type(rebuild) is not Global or type(kind) is not Global or type(args) is not tuple:
        _refuse("a tensor of a subclass that is not as torch writes it")
    build = REBUILD.get((rebuild.module, rebuild.name))
    if build is not None and build is not _rebuild_from_type_v2:
        value = build(*args)
        plain = kind.module in {"torch", "torch.nn.parameter"}
        return value if plain else Made(kind, (value,), state)
    if (rebuild.module, rebuild.name) != ("torch._utils", "_rebuild_wrapper_subclass"):
        _refuse(f"a tensor rebuilt by {shown(rebuild)}")
    return Made(kind, args, state)


REBUILD: Mapping[tuple[str, str], Callable[..., Any]] = {
    ("torch._utils", "_rebuild_tensor"): _rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor_v2,
    ("torch._utils", "_rebuild_tensor_v3"): _rebuild_tensor_v3,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
    ("torch._utils", "_rebuild_parameter_with_state"): _rebuild_parameter,
    ("torch._tensor", "_rebuild_from_type_v2"): _rebuild_from_type_v2,
}
"""torch's functions -> ours. Quantised, sparse and nested tensors have none: they are refused by the name of their rebuilder."""


def _take(read: Read, begin: int, count: int, size: int) -> bytes:
    """Bytes of the file, all of them, and none outside."""
    if begin < 0 or begin + count > size:
        _refuse(f"bytes {begin} to {begin + count} are outside the file of {size}")
    data = read(begin, count)
    if len(data) != count:
        _refuse(f"bytes {begin} to {begin + count} cannot be read, the file is shorter than it was")
    return bytes(data)


def _refuse(what: str, remedy: str = _REMEDY) -> NoReturn:
    msg = f"torch.save file: {what}"
    raise BadForeign(msg, remedy=remedy)
