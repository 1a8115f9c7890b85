"""Typed JSON: objects of the training state as plain JSON text, exactly, without pickle.

A closed list of types. JSON's own (str, bool, None, finite float, int of at most 63 bits, list, dict with str keys that do not
begin with "$") stand for themselves; floats are exact because Python prints the shortest text that reads back as the same
double. Everything else is a one-key object `{"$<tag>": payload}`:

    $int     "123..."             int beyond 63 bits (numpy's PCG64 state has 128)
    $float   "nan"|"inf"|"-inf"
    $bytes   base64
    $complex [re, im]
    $tuple $set $frozenset $deque $odict $dict $counter      list of items, or of [key, value] pairs
    $npscalar [dtype, base64]     numpy scalar
    $array   [kind, reference]    kind is "ndarray" or "tensor"; the bytes lie in the image under the key `reference`

Arrays are handed out to the caller (`put_array`), who gives them a place in the image and returns their key; `get_array` brings them back.
Anything else raises Unstorable with the path of the offender, e.g. `extras.loader.sampler: <class '...'>`.
"""

from __future__ import annotations

import base64
import binascii
import math
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np

from ckptd.errors import BadImage, Unstorable

Json: TypeAlias = "None | bool | int | float | str | list[Json] | dict[str, Json]"
PutArray: TypeAlias = Callable[[str, Any], "tuple[str, str] | None"]
"""(path, value) -> (kind, reference) if the value is an array, else None."""
GetArray: TypeAlias = Callable[[str, str], Any]
"""(kind, reference) -> the array."""

DEPTH_MAX = 64
"""Nesting that encode and decode accept; deeper state is a cycle or an attack (json's own limit is the interpreter's recursion limit)."""

_INT_MAX = 2**63 - 1


def encode(value: Any, path: str, put_array: PutArray) -> Json:  # noqa: C901, PLR0911, PLR0912  a flat dispatch over the closed list reads best in one place
    """The JSON of `value`. Raises Unstorable with the path and type of the first value outside the closed list."""
    depth = path.count("\x00")
    if depth > DEPTH_MAX:
        msg = f"{_shown(path)}: nested deeper than {DEPTH_MAX} levels"
        raise Unstorable(msg, remedy="is there a cycle in this object?")

    def sub(item: Any, key: object) -> Json:
        return encode(item, f"{path}\x00{key}", put_array)

    kind = type(value)
    if value is None or kind is bool or kind is str:
        return value  # type: ignore[no-any-return]
    if kind is int:
        return value if -_INT_MAX <= value <= _INT_MAX else {"$int": str(value)}
    if kind is float:
        return value if math.isfinite(value) else {"$float": repr(value)}
    if kind is list:
        return [sub(v, i) for i, v in enumerate(value)]
    if kind is dict and all(type(k) is str and not k.startswith("$") for k in value):
        return {k: sub(v, k) for k, v in value.items()}
    if kind is bytes or kind is bytearray:
        return {"$bytes": base64.b64encode(value).decode()}
    if kind is complex:
        return {"$complex": [encode(value.real, path, put_array), encode(value.imag, path, put_array)]}
    array = put_array(_shown(path), value)
    if array is not None:
        return {"$array": [*array]}
    if isinstance(value, np.generic):
        if value.dtype.hasobject:
            raise _unstorable(path, value)
        return {"$npscalar": [value.dtype.str, base64.b64encode(value.tobytes()).decode()]}
    for tag, cls in _SEQUENCES.items():
        if kind is cls:
            items = sorted(value, key=repr) if tag in {"$set", "$frozenset"} else value
            return {tag: [sub(v, i) for i, v in enumerate(items)]}
    if isinstance(value, tuple) and kind.__name__ == "Size":
        return {"$tuple": [sub(v, i) for i, v in enumerate(value)]}
    for tag, mapping in _MAPPINGS.items():
        if kind is mapping or (tag == "$dict" and kind is defaultdict):
            return {tag: [[sub(k, f"key {k!r}"), sub(v, k)] for k, v in value.items()]}
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
    if not isinstance(json, dict):
        return json
    tag = next(iter(json), "")
    if not tag.startswith("$"):
        return {k: _decode(v, get_array, depth + 1) for k, v in json.items()}
    if len(json) != 1:
        msg = f"{tag} has company: {sorted(json)}"
        raise ValueError(msg)
    return _decode_tagged(tag, json[tag], get_array, depth + 1)


def _decode_tagged(tag: str, payload: Any, get_array: GetArray, depth: int) -> Any:
    if tag in _SEQUENCES:
        return _SEQUENCES[tag](_decode(v, get_array, depth) for v in _listed(payload))
    if tag in _MAPPINGS:
        pairs = [(_decode(k, get_array, depth), _decode(v, get_array, depth)) for k, v in _listed(payload)]
        return _MAPPINGS[tag](dict(pairs)) if tag == "$counter" else _MAPPINGS[tag](pairs)
    match tag:
        case "$int":
            return int(_text(payload))
        case "$float":
            return {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}[_text(payload)]
        case "$bytes":
            return base64.b64decode(_text(payload), validate=True)
        case "$complex":
            re, im = (_decode(v, get_array, depth) for v in _listed(payload))
            return complex(re, im)
        case "$npscalar":
            dtype, text = (_text(v) for v in _listed(payload))
            kind = np.dtype(dtype)
            if kind.hasobject:
                msg = f"numpy type {dtype!r} is not inert"
                raise ValueError(msg)
            raw = base64.b64decode(text, validate=True)
            if len(raw) != kind.itemsize:
                msg = f"a {dtype} scalar has {kind.itemsize} bytes, not {len(raw)}"
                raise ValueError(msg)
            return np.frombuffer(raw, dtype=kind)[0]
        case "$array":
            kind_name, reference = (_text(v) for v in _listed(payload))
            return get_array(kind_name, reference)
    msg = f"unknown tag {tag!r}"
    raise ValueError(msg)


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
