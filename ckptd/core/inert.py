"""What the names in foreign pickles stand for: values, builders of ours, and inert objects. The closed list of `core.pickles`.

Nothing here imports, looks up or calls anything under a name of the file: a name is text that is compared with the keys of these tables.
Builders get whatever the file hands them; each checks its arguments, and raises TypeError or ValueError. What they copy is charged before
(`pickles.Limits.copied_bytes_max`).

What the classes write: `__reduce_ex__` and `__getstate__` of torch 2.13, numpy 1.26 to 2.4 and CPython 3.11, protocols 0 to 5.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from math import prod
from typing import Any

import msgspec
import numpy as np

from ckptd.core.image import DIMS_MAX, ITEM_BYTES
from ckptd.errors import BadForeign

KEY_NODES_MAX = 64
"""Atoms and tuples of one dict key: megatron's are pairs of dtypes, DCP's a name and an offset."""
KEY_INT_MAX = 2**61 - 2
"""Larger ints share their hashes with smaller ones (CPython reduces modulo 2**61 - 1), and dicts of such keys take quadratic time."""


class Global(msgspec.Struct, frozen=True):
    """A name that stands in the file. Nothing was looked up under it."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


class Dtype(msgspec.Struct, frozen=True):
    """A torch dtype by safetensors' code ("F32", "BF16", ...), or torch's name where there is none."""

    name: str


class NumpyDtype(msgspec.Struct, eq=False):
    """A numpy dtype of fixed size: what `np.dtype` takes, e.g. "<f4". Written in two steps, hence not frozen."""

    text: str


class MetadataIndex(msgspec.Struct, frozen=True, eq=False):
    """A key of DCP's `storage_data`: (name, offset of the shard, hint). The hint is no part of the key, as in torch."""

    fqn: str
    offset: tuple[int, ...] | None = None
    index: int | None = None

    def __eq__(self, other: object) -> bool:
        return type(other) is MetadataIndex and (self.fqn, self.offset) == (other.fqn, other.offset)

    def __hash__(self) -> int:
        return hash((self.fqn, self.offset))


class Made(msgspec.Struct, eq=False):
    """An object of another system, as data: what would have been called, with what, and the state it would have been given."""

    what: Global
    args: tuple[Any, ...] = ()
    state: Any = None
    items: Sequence[Any] = ()
    pairs: Sequence[tuple[Any, Any]] = ()
    kwargs: Any = None

    def get(self, name: str, default: Any = None) -> Any:
        """The attribute `name` of the state: of a dict, or of the pair (dict, slots) that classes with slots write."""
        for part in self.state if type(self.state) is tuple else (self.state,):
            if type(part) is dict and name in part:
                return part[name]
        return default


def item_bytes(dtype: str) -> int:
    """Bytes per element of a `Dtype.name`. Raises BadForeign if it has no fixed size."""
    size = ITEM_BYTES.get(dtype) or _OTHER_BYTES.get(dtype)
    if size is None:
        msg = f"dtype {shown(dtype)!r} has no known size"
        raise BadForeign(msg)
    return size


def shown(what: object) -> str:
    """Text of the file, or of an error about it, fit to be printed."""
    text = ascii(str(what))[1:-1]
    return text if len(text) <= 120 else f"{text[:120]}..."


def name_of(value: Any) -> str:
    """What a value is, for messages."""
    return str(value.what) if type(value) is Made else type(value).__name__


def is_key(key: Any) -> bool:
    """Whether it may be hashed: an atom, or a small tuple of such."""
    nodes, left = [key], KEY_NODES_MAX
    for node in nodes:
        kind = type(node)
        if kind is tuple:
            left -= len(node)
            if left < 0:
                return False
            nodes.extend(node)
        elif kind is int:
            if not -KEY_INT_MAX <= node <= KEY_INT_MAX:
                return False
        elif kind is MetadataIndex:
            if node.fqn == _UNSET or (node.offset is not None and not is_key(node.offset)):
                return False
        elif kind not in _ATOMS:
            return False
    return True


_ATOMS = frozenset({str, bytes, bool, float, type(None), Dtype, Global})


def inert(what: Global) -> Callable[..., Made]:
    """The builder of an inert object."""

    def build(*args: Any) -> Made:
        return Made(what, args)

    return build


def renamed(module: str, name: str) -> tuple[str, str]:
    """Python 2's names for what Python 3 calls otherwise (protocols 0 to 2 write them still)."""
    if module == "__builtin__":
        return "builtins", {"xrange": "range", "unicode": "str", "long": "int"}.get(name, name)
    return ("copyreg" if module == "copy_reg" else module), name


def in_family(module: str) -> bool:
    """Whether every name of the module becomes a Made."""
    return any(module == family or module.startswith(f"{family}.") for family in FAMILIES)


def _ints(values: Any) -> tuple[int, ...]:
    if type(values) not in {tuple, list} or not all(type(v) is int for v in values):
        msg = f"expected ints, not {name_of(values)}"
        raise TypeError(msg)
    return tuple(values)


def _only(*args: Any, kinds: Iterable[type]) -> Any:
    """The only argument, of one of the kinds; None if there is none."""
    if len(args) > 1 or (args and type(args[0]) not in kinds):
        msg = f"expected at most one argument, of {', '.join(k.__name__ for k in kinds)}"
        raise TypeError(msg)
    return args[0] if args else None


def _listing(*args: Any) -> list[Any]:
    return list(_only(*args, kinds=(list, tuple, set)) or ())


def _deque(items: Any = (), maxlen: Any = None) -> list[Any]:
    _only(maxlen, kinds=(int, type(None)))
    return _listing(items)


def _members(*args: Any) -> Any:
    items = _only(*args, kinds=(list, tuple, set, frozenset)) or ()
    if not all(is_key(item) for item in items):
        msg = "a member of a set is no atom"
        raise TypeError(msg)
    return items


def _pairs(*args: Any) -> dict[Any, Any]:
    """`dict`, `OrderedDict`, `Counter`: of nothing, of a dict, or of [key, value] pairs."""
    given = _only(*args, kinds=(dict, list, tuple))
    if type(given) is dict:
        return dict(given)
    if not all(type(pair) in {list, tuple} and len(pair) == 2 and is_key(pair[0]) for pair in given or ()):
        msg = "expected pairs of a key and a value"
        raise TypeError(msg)
    return dict(given or ())


def _defaultdict(factory: Any = None, *args: Any) -> dict[Any, Any]:
    _only(factory, kinds=(Global, type(None)))
    return _pairs(*args)


def _encode(text: Any, encoding: Any = "latin1") -> bytes:
    """How protocols 0 to 2 write bytes."""
    if type(text) is not str or encoding not in {"latin1", "latin-1"}:
        msg = "only text as latin1"
        raise TypeError(msg)
    return text.encode("latin1")


def _bytearray(*args: Any) -> bytearray:
    return bytearray(_encode(*args) if len(args) == 2 else _only(*args, kinds=(bytes, bytearray)) or b"")


def _complex(real: Any, imag: Any) -> complex:
    if type(real) is not float or type(imag) is not float:
        msg = "expected two floats"
        raise TypeError(msg)
    return complex(real, imag)


def _slice(*args: Any) -> slice:
    """Of numbers only: CPython frees slices of slices of slices by recursion, without a limit."""
    if not all(type(arg) in {int, type(None)} for arg in args):
        msg = "expected ints"
        raise TypeError(msg)
    return slice(*args)


def _path(*parts: Any) -> str:
    """A path is text here, and opens nothing."""
    if not all(type(part) is str for part in parts):
        msg = "expected text"
        raise TypeError(msg)
    return "/" + "/".join(parts[1:]) if parts[:1] == ("/",) else "/".join(parts)


def _reconstructor(kind: Any, base: Any, state: Any) -> Made:
    """copyreg's, how protocols 0 and 1 make objects of classes."""
    if type(kind) is not Global or type(base) is not Global:
        msg = "expected two classes"
        raise TypeError(msg)
    return Made(kind) if state is None else Made(kind, (state,))


_UNSET = "\x00"


def _index(*args: Any) -> MetadataIndex:
    if not args:
        return MetadataIndex(_UNSET)  # a state follows
    index = MetadataIndex(_UNSET)
    fill_index(index, dict(zip(("fqn", "offset", "index"), args, strict=False)))
    return index


def fill_index(index: MetadataIndex, state: Any) -> None:
    """Its dataclass's `__dict__`. Once, and before it is a key: its hash must not change."""
    if index.fqn != _UNSET or type(state) is not dict or not state.keys() <= {"fqn", "offset", "index"}:
        msg = "MetadataIndex: given its state twice, or an unknown one"
        raise TypeError(msg)
    fqn, offset, hint = state.get("fqn"), state.get("offset"), state.get("index")
    if type(fqn) is not str or fqn == _UNSET or type(hint) not in {int, type(None)}:
        msg = "MetadataIndex: name or hint is of the wrong type"
        raise TypeError(msg)
    if offset is not None and len(_ints(offset)) > DIMS_MAX:
        msg = f"MetadataIndex: over {DIMS_MAX} dimensions"
        raise ValueError(msg)
    msgspec.structs.force_setattr(index, "fqn", fqn)
    msgspec.structs.force_setattr(index, "offset", None if offset is None else _ints(offset))
    msgspec.structs.force_setattr(index, "index", hint)


_NUMPY = re.compile(r"b1|i[1248]|u[1248]|f[248]|c8|c16|[mM]8|[SUV][0-9]{1,6}")
"""Dtypes of fixed size without objects; `np.dtype` itself also takes expressions."""
_UNITS = frozenset({"Y", "M", "W", "D", "h", "m", "s", "ms", "us", "ns", "ps", "fs", "as", "generic"})
_FRESH = np.dtype("S1")
_ARRAY_ITEMS_MAX = 1 << 40
"""Of an array without elements too: numpy multiplies its dimensions."""


def _numpy_dtype(text: Any, align: Any = False, copy: Any = True) -> NumpyDtype:  # noqa: FBT002, ARG001  numpy's own order of arguments
    if type(text) is not str or not _NUMPY.fullmatch(text):
        msg = f"numpy dtype {shown(text)} is not read"
        raise TypeError(msg)
    return NumpyDtype(text)


def fill_dtype(target: NumpyDtype, state: Any) -> None:
    """dtype.__setstate__: (version, byte order, subdtype, names, fields, itemsize, alignment, flags[, (metadata, (unit, n, 1, 1))])."""
    if type(state) is not tuple or len(state) not in {8, 9} or target.text[0] in "<>|=" or state[2:5] != (None, None, None):
        msg = "numpy dtype: not a plain one"
        raise TypeError(msg)
    order, unit = state[1], ""
    if len(state) == 9:
        _, (name, count, *rest) = state[8]
        if (
            type(name) is not bytes
            or str(name, "ascii") not in _UNITS
            or type(count) is not int
            or not 0 < count < 2**31
            or rest != [1, 1]
        ):
            msg = "numpy dtype: no unit of time"
            raise TypeError(msg)
        unit = "" if name == b"generic" else f"[{count}{str(name, 'ascii')}]"
    if type(order) is not str or order not in {"<", ">", "|", "="} or (unit and target.text[0] not in "mM"):
        msg = "numpy dtype: no byte order"
        raise TypeError(msg)
    target.text = order + target.text + unit


def _dtype_of(value: Any) -> np.dtype[Any]:
    if type(value) is not NumpyDtype:
        msg = f"expected a numpy dtype, not {name_of(value)}"
        raise TypeError(msg)
    return np.dtype(value.text)


def _checked_shape(shape: Any, dtype: np.dtype[Any], raw: Any) -> tuple[int, ...]:
    """The shape, if it holds exactly the bytes there are."""
    dims = _ints(shape)
    if len(dims) > DIMS_MAX or any(d < 0 for d in dims) or type(raw) not in {bytes, bytearray}:
        msg = "numpy array: an impossible shape, or no bytes"
        raise TypeError(msg)
    items = prod(dims)
    if items * dtype.itemsize != len(raw) or (items and not raw) or prod([d or 1 for d in dims]) > _ARRAY_ITEMS_MAX:
        msg = f"numpy array: {list(dims)} of {dtype} does not fill {len(raw)} bytes"
        raise ValueError(msg)
    return dims


def _array(kind: Any, shape: Any, code: Any) -> np.ndarray[Any, Any]:
    """`_reconstruct`: an empty array, which a BUILD fills."""
    if kind != Global("numpy", "ndarray") or _ints(shape) != (0,) or type(code) is not bytes or code != b"b":
        msg = "numpy array: not as numpy writes it"
        raise TypeError(msg)
    return np.empty(0, _FRESH)


def fill_array(target: np.ndarray[Any, Any], state: Any) -> None:
    """ndarray.__setstate__, checked: (version, shape, dtype, Fortran order, bytes)."""
    if type(state) is not tuple or len(state) != 5 or target.dtype is not _FRESH or target.shape != (0,):
        msg = "numpy array: not a plain one, or filled twice"
        raise TypeError(msg)
    _, shape, code, fortran, raw = state
    dtype = _dtype_of(code)
    dims = _checked_shape(shape, dtype, raw)
    target.__setstate__((1, dims, dtype, bool(fortran), bytes(raw)))  # type: ignore[arg-type]  # numpy's stub knows only its oldest form


def _frombuffer(raw: Any, code: Any, shape: Any, order: Any) -> np.ndarray[Any, Any]:
    """How protocol 5 writes arrays."""
    dtype = _dtype_of(code)
    dims = _checked_shape(shape, dtype, raw)
    if order not in {"C", "F"}:
        msg = "numpy array: no memory order"
        raise ValueError(msg)
    flat = np.frombuffer(bytes(raw), dtype) if raw else np.empty(prod(dims), dtype)
    return flat.reshape(dims, order=order)


def _scalar(code: Any, raw: Any) -> Any:
    dtype = _dtype_of(code)
    if type(raw) is not bytes or len(raw) != dtype.itemsize:
        msg = f"numpy scalar: {name_of(raw)} is not of {dtype.itemsize} bytes"
        raise TypeError(msg)
    return np.frombuffer(raw, dtype)[0] if raw else np.zeros((), dtype)[()]


FAMILIES = (
    "accelerate", "deepspeed", "megatron", "transformers", "enum", "numpy.random",
    "torch.optim.lr_scheduler", "torch.distributed.fsdp", "torch.distributed.tensor", "torch.distributed._tensor",
    "torch.distributed.device_mesh", "torch.distributed._mesh_layout", "torch.distributed._shard",
)  # fmt: skip
"""Packages whose every name becomes a Made: configurations, enums, meshes, placements, generators. That is safe, for a Made is data: the
package is not imported, nothing in it is looked up or called. What is not listed is refused all the same, so that nobody takes for read
what no reader understands."""

_MADE = {
    "argparse": "Namespace",
    "types": "SimpleNamespace",
    "datetime": "date datetime timedelta timezone",
    "signal": "Signals",
    "torch": "device",
    "torch.serialization": "_get_layout",
    "torch._tensor": "_rebuild_from_type_v2",
    "torch._utils": "_rebuild_tensor _rebuild_tensor_v2 _rebuild_tensor_v3 _rebuild_parameter _rebuild_parameter_with_state _rebuild_wrapper_subclass",
    "torch.distributed.checkpoint.metadata": "Metadata TensorStorageMetadata BytesStorageMetadata ChunkStorageMetadata TensorProperties "
    "_MEM_FORMAT_ENCODING StorageMeta",
    "torch.distributed.checkpoint.filesystem": "_StorageInfo",
}
_MARKED_NAMES = {
    "builtins": "object int float str bool",
    "numpy": "ndarray",
    "torch": "Tensor",
    "torch.nn.parameter": "Parameter Buffer",
}
_PATHS = [(m, f"{p}{k}Path") for m in ("pathlib", "pathlib._local") for p in ("", "Pure") for k in ("Posix", "Windows", "")]
_MULTIARRAYS = ("numpy.core.multiarray", "numpy._core.multiarray")

KNOWN: Mapping[tuple[str, str], Callable[..., Any]] = {
    **{(module, name): inert(Global(module, name)) for module, names in _MADE.items() for name in names.split()},
    ("builtins", "set"): lambda *args: set(_members(*args)),
    ("builtins", "frozenset"): lambda *args: frozenset(_members(*args)),
    ("builtins", "list"): _listing,
    ("builtins", "tuple"): lambda *args: tuple(_listing(*args)),
    ("builtins", "dict"): _pairs,
    ("builtins", "bytes"): lambda *args: bytes(_only(*args, kinds=(bytes,)) or b""),
    ("builtins", "bytearray"): _bytearray,
    ("builtins", "complex"): _complex,
    ("builtins", "slice"): _slice,
    ("builtins", "range"): lambda *args: range(*_ints(args)),
    ("_codecs", "encode"): _encode,
    ("copyreg", "_reconstructor"): _reconstructor,
    ("collections", "OrderedDict"): _pairs,
    ("collections", "Counter"): _pairs,
    ("collections", "defaultdict"): _defaultdict,
    ("collections", "deque"): _deque,
    ("torch", "Size"): lambda sizes=(): _ints(sizes),
    ("torch.distributed.checkpoint.metadata", "MetadataIndex"): _index,
    ("numpy", "dtype"): _numpy_dtype,
    **{(module, "_reconstruct"): _array for module in _MULTIARRAYS},
    **{(module, "scalar"): _scalar for module in _MULTIARRAYS},
    **{(module, "_frombuffer"): _frombuffer for module in ("numpy.core.numeric", "numpy._core.numeric")},
    **dict.fromkeys(_PATHS, _path),
}
"""(module, name) -> what a call of it makes here. The only callables there are."""

_CODES = {
    "float64": "F64", "int64": "I64", "uint64": "U64", "complex64": "C64", "float32": "F32", "int32": "I32", "uint32": "U32", "float16": "F16",
    "bfloat16": "BF16", "int16": "I16", "uint16": "U16", "int8": "I8", "uint8": "U8", "bool": "BOOL", "float8_e4m3fn": "F8_E4M3",
    "float8_e4m3fnuz": "F8_E4M3FNUZ", "float8_e5m2": "F8_E5M2", "float8_e5m2fnuz": "F8_E5M2FNUZ",
}  # fmt: skip
_OTHER_BYTES = {
    "complex128": 16, "complex32": 4, "float8_e8m0fnu": 1, "float4_e2m1fn_x2": 1, "qint8": 1, "quint8": 1, "qint32": 4, "quint4x2": 1,
    "quint2x4": 1, "bits8": 1, "bits16": 2, "bits1x8": 1, "bits2x4": 1, "bits4x2": 1,
    **{f"{sign}int{bits}": 1 for sign in ("", "u") for bits in range(1, 8)},
}  # fmt: skip
_STORAGES = {
    "Double": "float64", "Float": "float32", "Half": "float16", "BFloat16": "bfloat16", "Long": "int64", "Int": "int32", "Short": "int16",
    "Char": "int8", "Byte": "uint8", "Bool": "bool", "ComplexDouble": "complex128", "ComplexFloat": "complex64", "QInt8": "qint8",
    "QUInt8": "quint8", "QInt32": "qint32", "QUInt4x2": "quint4x2", "QUInt2x4": "quint2x4",
}  # fmt: skip

STORAGES: Mapping[tuple[str, str], str] = {
    **{
        (module, f"{kind}Storage"): _CODES.get(name, name) for module in ("torch", "torch.cuda") for kind, name in _STORAGES.items()
    },
    ("torch.storage", "UntypedStorage"): "U8",
    ("torch.storage", "TypedStorage"): "U8",
    ("torch", "UntypedStorage"): "U8",
}
"""Storage classes -> the dtype of what they hold."""

MARKERS: frozenset[tuple[str, str]] = frozenset(
    {(m, n) for m, names in _MARKED_NAMES.items() for n in names.split()} | STORAGES.keys()
)
"""Names that may stand in a value, and that nothing calls."""

VALUES: Mapping[tuple[str, str], Any] = {("torch", name): Dtype(_CODES.get(name, name)) for name in (*_CODES, *_OTHER_BYTES)}
"""Names that are values: torch's dtypes."""
