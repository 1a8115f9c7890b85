"""Values of one dtype as those of another, exactly as torch rounds: to nearest, ties to even. NumPy, because a conversion needs no torch.

bfloat16 has no NumPy type; its bits are the upper half of a float32's.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ckptd.errors import Unstorable

NUMPY = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": np.uint16, "I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8,
    "U64": np.uint64, "U32": np.uint32, "U16": np.uint16, "U8": np.uint8, "BOOL": np.bool_, "C64": np.complex64, "F8_E4M3": np.uint8,
    "F8_E5M2": np.uint8, "F8_E4M3FNUZ": np.uint8, "F8_E5M2FNUZ": np.uint8,
}  # fmt: skip
"""NumPy's type of the same size: for bfloat16 and float8 it holds the bits."""
FLOATS = frozenset({"F64", "F32", "F16", "BF16"})


def can_cast(source: str, target: str) -> bool:
    """Whether `cast` knows the way."""
    return source == target or (source in FLOATS and target in FLOATS)


def cast(values: np.ndarray[Any, Any], source: str, target: str) -> np.ndarray[Any, Any]:
    """`values`, whose bits are of `source` (in NumPy's type of the same size), as `target`. Raises Unstorable for what is no float."""
    if source == target:
        return values
    if not can_cast(source, target):
        msg = f"values of {source} cannot be made {target}"
        raise Unstorable(msg)
    with np.errstate(over="ignore", invalid="ignore"):
        if source == "BF16":
            wide = (values.astype(np.uint32) << np.uint32(16)).view(np.float32)
            return wide if target == "F32" else cast(wide, "F32", target)
        if target == "BF16":
            return _to_bfloat16(values if source == "F32" else values.astype(np.float32))
        if (source, target) == ("F64", "F16"):
            values = values.astype(np.float32)  # torch goes this way, and rounds twice
        return values.astype(NUMPY[target])


BLOCK = 1 << 16
"""Elements that are cast at a time: what lies between stays in a core's cache, and is allocated from memory that is warm."""


def cast_into(values: np.ndarray[Any, Any], source: str, target: str, out: np.ndarray[Any, Any]) -> None:
    """`cast`, into memory that is given; both arrays have one dimension."""
    for at in range(0, len(values), BLOCK):
        out[at : at + BLOCK] = cast(values[at : at + BLOCK], source, target)


def _to_bfloat16(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The upper halves, rounded; NaN becomes torch's one NaN."""
    bits = values.view(np.uint32)
    rounded = bits >> np.uint32(16)
    rounded &= np.uint32(1)
    rounded += np.uint32(0x7FFF)
    rounded += bits
    rounded >>= np.uint32(16)
    out = rounded.astype(np.uint16)
    nan = np.isnan(values)
    if nan.any():
        out[nan] = np.uint16(0x7FC0)
    return out
