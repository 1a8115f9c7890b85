"""safetensors files of others: what lies where, by a strict reading of the header. Ours, which say more of themselves, are `core.image`'s.

    u64 n (little endian) | n bytes of JSON, an object, spaces may follow | tensor bytes, without holes

Invariants
- byte ranges are contiguous from the end of the header to the end of the file: no hole, no overlap, nothing after the last;
- every range has exactly the bytes of its shape and dtype; no name stands twice;
- the header is bounded before it is read, and its parts are counted before they are parsed.

Format: https://huggingface.co/docs/safetensors and safetensors/src/tensor.rs of safetensors 0.8 (dtypes, `Metadata::validate`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, NoReturn

import msgspec

from ckptd.core.archive import Read
from ckptd.core.image import DIMS_MAX, ITEM_BYTES, _load, header_bytes_of
from ckptd.errors import BadForeign, BadImage

TENSORS_MAX = 1_000_000
PARTS_MAX = 16_000_000
"""Commas and brackets of a header: what it may become in memory. A tensor has about eight."""
FILE_BYTES_MAX = 1 << 50
"""Sums of positions stay below 2**63."""
_METADATA = "__metadata__"
_BITS: Mapping[str, int] = {**{code: 8 * n for code, n in ITEM_BYTES.items()}, "F8_E8M0": 8, "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4}
"""Bits per element of every dtype of the specification. Tensors of sub-byte ones are whole bytes all the same."""


@dataclass(frozen=True, slots=True)
class TensorFile:
    """A checked header. `tensors`: name -> (dtype, shape, begin, end), bytes of the file, in their order there."""

    header_bytes: int
    metadata: Mapping[str, str]
    tensors: Mapping[str, tuple[str, tuple[int, ...], int, int]]


def parse(read: Read, size: int) -> TensorFile:
    """Read and check the header of a safetensors file of `size` bytes. Raises BadForeign (what is wrong, where)."""
    if size > FILE_BYTES_MAX:
        _refuse(f"{size} bytes are no file")
    try:
        header_bytes = header_bytes_of(read(0, 8) if size >= 8 else b"", size)
        text = read(8, header_bytes - 8)
        if len(text) != header_bytes - 8:
            _refuse(f"the header ends at byte {header_bytes}, the file is shorter than it was")
        table = _parse_table(text)
    except BadImage as e:
        _refuse(e.message)
    metadata = _parse_metadata(table.pop(_METADATA, {}))
    tensors = [_parse_tensor(name, info, header_bytes) for name, info in table.items()]
    tensors.sort(key=lambda t: (t[1][2], t[1][3]))
    at = header_bytes
    for name, (_, _, begin, end) in tensors:
        if begin != at:
            _refuse(
                f"{_shown(name)} begins at byte {begin}, not at {at}: it {'overlaps what lies before it' if begin < at else 'follows a hole'}"
            )
        at = end
    if at != size:
        _refuse(f"the last tensor ends at byte {at}, the file at {size}")
    return TensorFile(header_bytes, metadata, dict(tensors))


def _parse_table(text: bytes) -> dict[str, Any]:
    """The header as JSON. Its parts are counted first: parsed, each takes some hundred bytes."""
    tensors, parts = text.count(b'"data_offsets"'), sum(text.count(sign) for sign in (b",", b"[", b"{"))
    if tensors > TENSORS_MAX or parts > PARTS_MAX:
        _refuse(f"{tensors} tensors and {parts} parts in the header; at most {TENSORS_MAX} and {PARTS_MAX}")
    if text[:1] != b"{":
        _refuse("the header is no JSON object")
    table = _load(text, "header")
    if type(table) is not dict:
        _refuse("the header is no JSON object")
    return table


def _parse_metadata(described: Any) -> dict[str, str]:
    if type(described) is not dict or not all(type(v) is str for v in described.values()):
        _refuse("__metadata__ is not a map of text to text")
    return described


def _parse_tensor(name: str, raw: Any, header_bytes: int) -> tuple[str, tuple[str, tuple[int, ...], int, int]]:
    try:
        info = msgspec.convert(raw, _TensorInfo)
    except msgspec.ValidationError as e:
        _refuse(f"{_shown(name)}: {e}")
    bits = _BITS.get(info.dtype)
    if bits is None:
        _refuse(f"{_shown(name)}: unknown dtype {_shown(info.dtype)}")
    begin, end = info.data_offsets
    if len(info.shape) > DIMS_MAX or min(begin, end, *info.shape) < 0:
        _refuse(f"{_shown(name)}: more than {DIMS_MAX} dimensions, or a negative number")
    if 8 * (end - begin) != prod(info.shape) * bits:  # Python's product does not overflow
        _refuse(f"{_shown(name)}: its shape of {info.dtype} does not fill bytes {begin} to {end}")
    return name, (info.dtype, info.shape, header_bytes + begin, header_bytes + end)


class _TensorInfo(msgspec.Struct, frozen=True, forbid_unknown_fields=True, gc=False):
    dtype: str
    shape: tuple[int, ...]
    data_offsets: tuple[int, int]


def _shown(text: str) -> str:
    return ascii(text if len(text) <= 120 else f"{text[:120]}...")


def _refuse(what: str) -> NoReturn:
    msg = f"safetensors file: {what}"
    raise BadForeign(msg, remedy="is this file whole, and written by safetensors? fetch or write it again")
