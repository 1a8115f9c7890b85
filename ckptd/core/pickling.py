"""Writing pickles: the words that torch, DeepSpeed and Megatron read, from plain values and inert objects. The other way round: `core.pickles`.

Protocol 2, as torch.save writes, without a framework at hand: a `Made` becomes the call that its class name asks for, whoever loads it. No object of
this process is ever pickled, so none of its code is named by accident: the closed list of types is that of `dumps`.

What may stand in a tree: None, bool, int, float, str, bytes, list, tuple, dict (`OrderedDict` too), set, `Global`, `Made`, torch dtypes as `Dtype`, 1-d numpy arrays
of plain numbers, and whatever `persistent` makes a value of.
"""

from __future__ import annotations

import struct
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np

from ckptd.core.boxes import Shape
from ckptd.core.inert import Dtype, Global, Made
from ckptd.errors import Unstorable

STORAGES = {
    "F64": "DoubleStorage", "F32": "FloatStorage", "F16": "HalfStorage", "BF16": "BFloat16Storage", "I64": "LongStorage", "I32": "IntStorage",
    "I16": "ShortStorage", "I8": "CharStorage", "U8": "ByteStorage", "BOOL": "BoolStorage", "C64": "ComplexFloatStorage",
}  # fmt: skip
"""Storage classes of torch's pickles, by dtype. The others (float8, unsigned) are told by dtype through an untyped storage."""
TORCH_NAMES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8",
    "U8": "uint8", "U16": "uint16", "U32": "uint32", "U64": "uint64", "BOOL": "bool", "C64": "complex64", "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2", "F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2FNUZ": "float8_e5m2fnuz",
}  # fmt: skip
"""torch's name of every dtype."""


class PersId(msgspec.Struct, frozen=True):
    """A storage by the key under which the archive holds it."""

    dtype: str
    key: str
    count: int


class Call(msgspec.Struct, frozen=True):
    """A REDUCE: what to call, and with what."""

    what: Global
    args: tuple[Any, ...]


def call(path: str, *args: Any) -> Call:
    """A call of "module:name"."""
    module, _, name = path.partition(":")
    return Call(Global(module, name), args)


def rebuild_tensor(storage: PersId, shape: Shape, strides: Shape, *, parameter: bool = False) -> Call:
    """The call that makes a tensor of a storage, as torch.save writes it."""
    hooks, frozen, wanted = call("collections:OrderedDict"), False, True  # no backward hooks; requires_grad
    if storage.dtype in STORAGES:
        made = call("torch._utils:_rebuild_tensor_v2", storage, 0, tuple(shape), tuple(strides), frozen, hooks)
    else:
        dtype = Dtype(storage.dtype)
        made = call("torch._utils:_rebuild_tensor_v3", storage, 0, tuple(shape), tuple(strides), frozen, hooks, dtype)
    return call("torch._utils:_rebuild_parameter", made, wanted, hooks) if parameter else made


def dumps(tree: Any, persistent: Callable[[Any], Any] | None = None) -> bytes:
    """The pickle of a tree. `persistent`: what stands for a value that is not plain (None: it has nothing to say). Raises Unstorable with the path."""
    out = bytearray(b"\x80\x02")
    _Writer(out, persistent).put(tree, "")
    out += b"."
    return bytes(out)


class _Writer:
    """One pickle. Globals and short texts are written once and remembered."""

    def __init__(self, out: bytearray, persistent: Callable[[Any], Any] | None) -> None:
        self._out = out
        self._persistent = persistent
        self._memo: dict[Any, int] = {}

    def put(self, value: Any, path: str) -> None:  # noqa: C901, PLR0912  a flat dispatch over the closed list reads best in one place
        out, kind = self._out, type(value)
        if value is None:
            out += b"N"
        elif kind is bool:
            out += b"\x88" if value else b"\x89"
        elif kind is int:
            self._int(value)
        elif kind is float:
            out += b"G" + struct.pack(">d", value)
        elif kind is str:
            self._text(value)
        elif kind is bytes or kind is bytearray:
            self.put(call("_codecs:encode", bytes(value).decode("latin1"), "latin1"), path)
        elif kind is tuple:
            self._tuple(value, path)
        elif kind is list:
            out += b"](" if value else b"]"
            for i, item in enumerate(value):
                self.put(item, f"{path}.{i}")
            out += b"e" if value else b""
        elif kind is OrderedDict:
            self.put(Call(Global("collections", "OrderedDict"), ()), path)
            self._items(value, path)
        elif kind is dict:
            out += b"}"
            self._items(value, path)
        elif kind is set or kind is frozenset:
            self.put(call(f"builtins:{kind.__name__}", sorted(value, key=repr)), path)
        elif kind is Global:
            self._global(value)
        elif kind is Dtype:
            self._global(Global("torch", TORCH_NAMES[value.name]))
        elif kind is Call:
            self._global(value.what)
            self._tuple(value.args, path)
            out += b"R"
        elif kind is Made:
            self._made(value, path)
        elif kind is PersId:
            self._storage(value)
        elif isinstance(value, np.generic):
            self.put(value.item(), path)
        elif isinstance(value, np.ndarray) and value.dtype.kind in "iufb" and value.ndim == 1:
            self._array(value, path)
        else:
            made = self._persistent(value) if self._persistent else None
            if made is None:
                msg = f"{path.lstrip('.')}: {kind.__module__}.{kind.__qualname__} cannot be written as a pickle of this format"
                raise Unstorable(msg)
            self.put(made, path)

    def _int(self, value: int) -> None:
        if 0 <= value < 256:
            self._out += b"K" + bytes([value])
        elif -(2**31) <= value < 2**31:
            self._out += b"J" + struct.pack("<i", value)
        else:
            raw = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
            self._out += b"\x8a" + bytes([len(raw)]) + raw if len(raw) < 256 else b"\x8b" + struct.pack("<i", len(raw)) + raw

    def _text(self, value: str) -> None:
        if not self._recall(value):
            raw = value.encode("utf-8", "surrogatepass")
            self._out += b"X" + struct.pack("<I", len(raw)) + raw
            self._remember(value)

    def _global(self, value: Global) -> None:
        if not self._recall(value):
            self._out += f"c{value.module}\n{value.name}\n".encode()
            self._remember(value)

    def _recall(self, value: Any) -> bool:
        number = self._memo.get(value)
        if number is None:
            return False
        self._out += b"h" + bytes([number]) if number < 256 else b"j" + struct.pack("<I", number)
        return True

    def _remember(self, value: Any) -> None:
        number = self._memo[value] = len(self._memo)
        self._out += b"q" + bytes([number]) if number < 256 else b"r" + struct.pack("<I", number)

    def _tuple(self, value: tuple[Any, ...], path: str) -> None:
        out = self._out
        if len(value) > 3:
            out += b"("
        for i, item in enumerate(value):
            self.put(item, f"{path}.{i}")
        out += (b")", b"\x85", b"\x86", b"\x87")[len(value)] if len(value) <= 3 else b"t"

    def _items(self, value: dict[Any, Any], path: str) -> None:
        if value:
            self._out += b"("
            for key, item in value.items():
                self.put(key, path)
                self.put(item, f"{path}.{key}")
            self._out += b"u"

    def _made(self, value: Made, path: str) -> None:
        """`cls.__new__(cls, *args)`, then its state: what pickle does for any object."""
        self._global(value.what)
        self._tuple(tuple(value.args), path)
        self._out += b"\x81"
        if value.state is not None:
            self.put(value.state, path)
            self._out += b"b"

    def _storage(self, value: PersId) -> None:
        kind = Global("torch", STORAGES[value.dtype]) if value.dtype in STORAGES else Global("torch.storage", "UntypedStorage")
        count = value.count if value.dtype in STORAGES else value.count * _ITEM.get(value.dtype, 1)
        self._tuple(("storage", kind, value.key, "cpu", count), "")
        self._out += b"Q"

    def _array(self, value: np.ndarray[Any, Any], path: str) -> None:
        """`numpy.core.multiarray._reconstruct` and its state."""
        plain = np.ascontiguousarray(value)
        self.put(call("numpy.core.multiarray:_reconstruct", Global("numpy", "ndarray"), (0,), b"b"), path)
        self._out += b"("
        self.put(1, path)
        self.put(tuple(plain.shape), path)
        self.put(Call(Global("numpy", "dtype"), (plain.dtype.str.lstrip("<|"), *_COPIED)), path)
        self.put((3, plain.dtype.str[0], None, None, None, -1, -1, 0), path)
        self._out += b"b\x89"  # not in Fortran's order
        self.put(plain.tobytes(), path)
        self._out += b"tb"


_COPIED = (False, True)
"""What `numpy.dtype` takes besides a name: align, copy."""
_ITEM = {"U16": 2, "U32": 4, "U64": 8}
