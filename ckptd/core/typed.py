"""Typed JSON: objects of the training state as plain JSON text, exactly, without pickle.

A closed list of types. JSON's own (str, bool, None, finite float, int of at most 63 bits, list, dict with str keys that do not
begin with "$") stand for themselves; floats are exact because Python prints the shortest text that reads back as the same
double. Everything else is a one-key object `{"$<tag>": payload}`:

    $int     "123..."             int beyond 63 bits (numpy's PCG64 state has 128); beyond 2000 bits in hexadecimal, "0x..."
    $str     base64 of UTF-8      text with lone surrogates (file names as `os.fsdecode` gives them), which no JSON reader must accept
    $float   "nan"|"inf"|"-inf"
    $bytes   base64
    $complex [re, im]
    $tuple $set $frozenset $deque $odict $dict $counter      list of items, or of [key, value] pairs
    $ring    [maxlen, items]      deque with a maxlen
    $npscalar [dtype, base64]     numpy scalar; of text ("U") and bytes ("S") the base64 of its UTF-8 or bytes
    $array   [kind, reference]    kind is "ndarray" or "tensor"; the bytes lie in the image under the key `reference`

Arrays are handed out to the caller (`put_array`), who gives them a place in the image and returns their key; `get_array` brings them back.
Anything else raises Unstorable with the path of the offender, e.g. `extras.loader.sampler: <class '...'>`.
"""

from __future__ import annotations

import base64
import binascii
import math
import re
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np

from ckptd.errors import BadImage, Unstorable

Json: TypeAlias = "bool | int | float | str | list[Json] | dict[str, Json] | None"
PutArray: TypeAlias = Callable[[str, Any], "tuple[str, str] | None"]
"""(path, value) -> (kind, reference) if the value is an array, else None."""
GetArray: TypeAlias = Callable[[str, str], Any]
"""(kind, reference) -> the array."""

DEPTH_MAX = 64
"""Nesting that encode and decode accept; deeper state is a cycle or an attack (json's own limit is the interpreter's recursion limit)."""

_INT_MAX = 2**63 - 1
_DECIMAL_BITS_MAX = 2000
"""Python refuses to read or write more than 4300 decimal digits (`sys.set_int_max_str_digits`); powers of two have no such limit."""
_NP_DTYPE = re.compile(r"[<>|](?:[biufcV][1-9][0-9]{0,5}|[mM]8(?:\[[0-9]{0,9}[A-Za-z]{1,2}\])?)")
"""What `dtype.str` of a scalar looks like; numpy's own reader also takes expressions."""


def encode(value: Any, path: str, put_array: PutArray) -> Json:  # noqa: C901, PLR0911, PLR0912  a flat dispatch over the closed list reads best in one place
    """The JSON of `value`. Raises Unstorable with the path and type of the first value outside the closed list."""
    depth = path.count("\x00")
    if depth > DEPTH_MAX:
        msg = f"{_shown(path)}: nested deeper than {DEPTH_MAX} levels"
        raise Unstorable(msg, remedy="is there a cycle in this object?")

    def sub(item: Any, key: object) -> Json:
        return item if _is_plain(item) else encode(item, f"{path}\x00{_label(key)}", put_array)

    kind = type(value)
    if value is None or kind is bool:
        return value  # type: ignore[no-any-return]
    if kind is str:
        return value if _is_unicode(value) else {"$str": base64.b64encode(value.encode("utf-8", "surrogatepass")).decode()}
    if kind is int:
        if -_INT_MAX <= value <= _INT_MAX:
            return value  # type: ignore[no-any-return]
        return {"$int": hex(value) if value.bit_length() > _DECIMAL_BITS_MAX else str(value)}
    if kind is float:
        return value if math.isfinite(value) else {"$float": repr(value)}
    if kind is list:
        return [sub(v, i) for i, v in enumerate(value)]
    if kind is dict and all(type(k) is str and not k.startswith("$") and _is_unicode(k) for k in value):
        return {k: sub(v, k) for k, v in value.items()}
    if kind is bytes or kind is bytearray:
        return {"$bytes": base64.b64encode(value).decode()}
    if kind is complex:
        return {"$complex": [encode(value.real, path, put_array), encode(value.imag, path, put_array)]}
    array = put_array(_shown(path), value)
    if array is not None:
        return {"$array": [*array]}
    if kind is np.str_:
        return {"$npscalar": ["U", base64.b64encode(value.encode("utf-8", "surrogatepass")).decode()]}
    if kind is np.bytes_:
        return {"$npscalar": ["S", base64.b64encode(value).decode()]}
    if isinstance(value, np.generic):
        text = value.dtype.str
        if not _NP_DTYPE.fullmatch(text) or np.dtype(text) != value.dtype:  # a record or an extension type would come back as void
            raise _unstorable(path, value)
        return {"$npscalar": [text, base64.b64encode(value.tobytes()).decode()]}
    if kind is deque and value.maxlen is not None:
        return {"$ring": [value.maxlen, [sub(v, i) for i, v in enumerate(value)]]}
    for tag, cls in _SEQUENCES.items():
        if kind is cls:
            items = sorted(value, key=lambda v: (type(v).__name__, _label(v))) if tag in {"$set", "$frozenset"} else value
            return {tag: [sub(v, i) for i, v in enumerate(items)]}
    if isinstance(value, tuple) and (kind.__module__, kind.__name__) == ("torch", "Size"):
        return {"$tuple": [sub(v, i) for i, v in enumerate(value)]}
    for tag, mapping in _MAPPINGS.items():
        if kind is mapping or (tag == "$dict" and kind is defaultdict):
            return {tag: [[sub(k, f"key {_label(k)}"), sub(v, k)] for k, v in value.items()]}
    raise _unstorable(path, value)


def decode(json: Json, get_array: GetArray) -> Any:
    """The value that `encode` was given. Raises BadImage if the JSON is not of its making."""
    try:
        return _decode(json, get_array, 0)
    except (TypeError, ValueError, KeyError, binascii.Error, OverflowError) as e:
        msg = f"an object in the header is malformed: {e}"
        raise BadImage(msg) from e


def _decode(json: Json, get_array: GetArray, depth: int) -> Any:
    if depth > DEPTH_MAX + 1:
        msg = f"nested deeper than {DEPTH_MAX} levels"
        raise ValueError(msg)
    if isinstance(json, list):
        return [_decode(v, get_array, depth + 1) for v in json]
    if json is None or isinstance(json, bool | int | float | str):
        return json
    if not isinstance(json, dict) or not all(isinstance(k, str) for k in json):
        msg = f"{type(json).__name__} (or one of its keys) is not JSON"
        raise TypeError(msg)
    tag = next((k for k in json if k.startswith("$")), "")
    if not tag:
        return {k: _decode(v, get_array, depth + 1) for k, v in json.items()}
    if len(json) != 1:
        msg = f"{tag} has company: {sorted(json)}"
        raise ValueError(msg)
    return _decode_tagged(tag, json[tag], get_array, depth + 1)


def _decode_tagged(tag: str, payload: Any, get_array: GetArray, depth: int) -> Any:  # noqa: PLR0911  one return per tag
    if tag in _SEQUENCES:
        return _SEQUENCES[tag](_decode(v, get_array, depth) for v in _listed(payload))
    if tag in _MAPPINGS:
        pairs = [(_decode(k, get_array, depth), _decode(v, get_array, depth)) for k, v in _listed(payload)]
        return _MAPPINGS[tag](dict(pairs)) if tag == "$counter" else _MAPPINGS[tag](pairs)
    match tag:
        case "$int":
            return int(_text(payload), 0)
        case "$str":
            return base64.b64decode(_text(payload), validate=True).decode("utf-8", "surrogatepass")
        case "$ring":
            maxlen, items = _listed(payload)
            return deque((_decode(v, get_array, depth) for v in _listed(items)), maxlen)
        case "$float":
            return {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}[_text(payload)]
        case "$bytes":
            return base64.b64decode(_text(payload), validate=True)
        case "$complex":
            re, im = (_decode(v, get_array, depth) for v in _listed(payload))
            return complex(re, im)
        case "$npscalar":
            return _np_scalar(*(_text(v) for v in _listed(payload)))
        case "$array":
            kind_name, reference = (_text(v) for v in _listed(payload))
            return get_array(kind_name, reference)
    msg = f"unknown tag {tag!r}"
    raise ValueError(msg)


def _np_scalar(dtype: str, text: str) -> Any:
    raw = base64.b64decode(text, validate=True)
    if dtype in {"U", "S"}:
        return np.str_(raw.decode("utf-8", "surrogatepass")) if dtype == "U" else np.bytes_(raw)
    if not _NP_DTYPE.fullmatch(dtype):
        msg = f"numpy type {dtype!r} is not a scalar's"
        raise ValueError(msg)
    kind = np.dtype(dtype)
    if len(raw) != kind.itemsize:
        msg = f"a {dtype} scalar has {kind.itemsize} bytes, not {len(raw)}"
        raise ValueError(msg)
    return np.frombuffer(raw, dtype=kind)[0]


def _listed(payload: Any) -> list[Any]:
    if not isinstance(payload, list):
        msg = f"expected a list, not {type(payload).__name__}"
        raise TypeError(msg)
    return payload


def _text(payload: Any) -> str:
    if not isinstance(payload, str):
        msg = f"expected text, not {type(payload).__name__}"
        raise TypeError(msg)
    return payload


def _is_plain(value: Any) -> bool:
    """Whether a value stands for itself, told quickly: most of what a step's objects hold."""
    kind = type(value)
    if kind is str:
        return bool(value.isascii())
    return kind is bool or value is None or (kind is float and math.isfinite(value)) or (kind is int and -_INT_MAX <= value <= _INT_MAX)


def _is_unicode(text: str) -> bool:
    """Whether UTF-8 can say it: no lone surrogate."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _label(key: object) -> str:
    """A key, an index or an item as part of a path. Never fails, and never looks like two parts."""
    try:
        text = key if isinstance(key, str) else repr(key)
    except Exception:  # noqa: BLE001  a stranger's __repr__ may raise anything; the refusal must still name the place
        text = f"<{type(key).__qualname__}>"
    return text.replace("\x00", "\\0")


def _shown(path: str) -> str:
    return path.replace("\x00", ".")


def _unstorable(path: str, value: object) -> Unstorable:
    kind = type(value)
    return Unstorable(
        f"{_shown(path)}: {kind.__module__}.{kind.__qualname__} cannot be stored without pickle",
        remedy="give the object a state_dict() of numbers, text, bytes, lists, dicts and arrays, or leave it out of `extras`",
    )


_SEQUENCES: dict[str, Callable[..., Any]] = {"$tuple": tuple, "$set": set, "$frozenset": frozenset, "$deque": deque}
_MAPPINGS: dict[str, Callable[..., Any]] = {"$odict": OrderedDict, "$counter": Counter, "$dict": dict}
