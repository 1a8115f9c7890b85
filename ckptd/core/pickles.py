"""Pickles of other systems, read without executing anything: our own interpreter of the opcodes, protocols 0 to 5.

A pickle is a program for a small stack machine, and its REDUCE calls whatever the text names. Here a name is data: it is looked up in
closed tables, never in a module, and what "calling" it means is a builder of ours (`KNOWN`), a value (`VALUES`), or an inert `Made`
that only remembers what would have been called with what. Names outside the tables are refused with their place in the file. The tables are in `core.inert`.

Invariants
- no import, no attribute lookup and no call by a name that stands in the file: the tables hold the only callables, all of them ours;
- no recursion over what the file nests; no allocation that the file's own length or `Limits` does not bound, checked before it is made;
- only BadForeign comes out, with the byte at which the reading stopped;
- keys of dicts and members of sets are atoms or small tuples of atoms, so that hashing them is bounded, and collisions are counted;
- SETITEM, APPEND, ADDITEMS and BUILD apply to dicts, lists, sets and Mades (CVE-2026-24747 was a SETITEM on a tensor);
- the value's nesting and its size with every shared part counted as often as it is seen are bounded: whoever walks it comes back.

Refused for good: EXT1, EXT2, EXT4 (a registry that the file does not hold), INST, OBJ (Python 1), PERSID (text), NEXT_BUFFER, READONLY_BUFFER
(buffers outside the file), `getattr` (how Python 3.11.0 to 3.11.3 wrote enums), escaped text of Python 2.

Opcodes: Lib/pickletools.py of CPython 3.11. What the classes write: `__reduce_ex__` and `__getstate__` of torch 2.13 and numpy 2.4.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Mapping
from itertools import repeat
from typing import Any, NoReturn

import msgspec
import numpy as np

from ckptd.core.inert import (
    KNOWN,
    MARKERS,
    VALUES,
    Dtype,
    Global,
    Made,
    MetadataIndex,
    NumpyDtype,
    fill_array,
    fill_dtype,
    fill_index,
    in_family,
    inert,
    is_key,
    item_bytes,
    name_of,
    renamed,
    shown,
)
from ckptd.errors import BadForeign

__all__ = [
    "COLLISIONS_MAX",
    "KNOWN",
    "LIMITS",
    "Dtype",
    "Global",
    "Limits",
    "Made",
    "MetadataIndex",
    "NumpyDtype",
    "item_bytes",
    "load",
    "shown",
]

_REMEDY = "if the file is yours, save it again as tensors, numbers and text; if not, do not load it elsewhere either"
_REMEDY_GLOBAL = f"{_REMEDY} (the closed list is KNOWN in ckptd/core/inert.py)"


class Limits(msgspec.Struct, frozen=True):
    """What one pickle may cost. The defaults hold the `.metadata` of 200,000 shards, and bound the memory to about 2 GiB."""

    bytes_max: int = 256 << 20
    """A pickle holds names and numbers; tensors lie beside it."""
    opcodes_max: int = 20_000_000
    containers_max: int = 5_000_000
    """Lists, dicts, sets, tuples and Mades: the opcodes that make them are one byte long, they are not."""
    depth_max: int = 200
    """Nesting of marks and of the value. Python's own recursion limit is 1000."""
    memo_max: int = 5_000_000
    int_bytes_max: int = 1024
    """numpy's PCG64 has 16, the largest tested; int text has at most Python's 4300 digits."""
    copied_bytes_max: int = 1 << 30
    """What builders may copy out of memoised values: arrays, lists of tuples, decoded text."""
    nodes_max: int = 50_000_000
    """Containers of the value, shared ones counted as often as a walk without memory meets them ("billion laughs")."""


LIMITS = Limits()

_SHORT = 40
"""Opcodes of a pickle that can neither nest too deep nor unfold to more than 3**13 parts."""
COLLISIONS_MAX = 64
"""Different tuples of one hash. By chance there is none among a billion; crafted ones make dicts quadratic too."""
NAME_CHARS_MAX = 200
"""Characters of a module or a name."""


def load(
    data: bytes | bytearray | memoryview,
    *,
    persistent: Callable[[Any], Any] | None = None,
    known: Mapping[tuple[str, str], Callable[..., Any]] | None = None,
    limits: Limits = LIMITS,
) -> tuple[Any, int]:
    """The value of the pickle at the beginning of `data`, and how many bytes it has; what follows is the caller's business.

    `persistent` resolves persistent ids (torch's storages); without it they are refused. `known` is `KNOWN` or an extension of it:
    (module, name) -> builder, called with the pickle's positional arguments; it must be safe for any of them and may raise TypeError
    or ValueError. Raises BadForeign.
    """
    if len(data) > limits.bytes_max:
        msg = f"pickle: {len(data)} bytes are over the limit of {limits.bytes_max}"
        raise BadForeign(msg)
    machine = _Machine(bytes(data), persistent, KNOWN if known is None else known, limits)
    value, end, opcodes = machine.run()
    if opcodes > _SHORT:
        _measure(value, limits)
    return value, end


# --- the machine ------------------------------------------------------------------------------------------------------------


class _Machine:
    """One pickle being read. `run` holds the frequent opcodes; what is rare, or applies to a mark, has its own method."""

    def __init__(
        self,
        data: bytes,
        persistent: Callable[[Any], Any] | None,
        known: Mapping[tuple[str, str], Callable[..., Any]],
        limits: Limits,
    ) -> None:
        self.data, self.persistent, self.known, self.limits = data, persistent, known, limits
        self.memo: dict[int, Any] = {}
        self.globals: dict[tuple[str, str], Any] = {}
        self.builders: dict[int, Callable[..., Any]] = {}
        """By identity of the Global in `globals`, which keeps it alive: a Global of another origin is no callable."""
        self.hashes: dict[int, Any] = {}
        self.collisions = 0
        self.containers = limits.containers_max
        self.copied = 0

    def run(self) -> tuple[Any, int, int]:  # noqa: C901, PLR0912, PLR0915  one flat dispatch: a call per opcode would take twice the time
        """(value, bytes read, opcodes read). Slices may come out short: then `pos` is past the end, and the next opcode is missing."""
        data, memo, builders, limits = self.data, self.memo, self.builders, self.limits
        size, depth_max, memo_max, containers = len(data), limits.depth_max, limits.memo_max, limits.containers_max
        stack: list[Any] = []
        below: list[list[Any]] = []
        pos = at = 0
        counter = iter(repeat(None, limits.opcodes_max))
        try:
            for _ in counter:
                at = pos
                op = data[pos]
                pos += 1
                if op >= 0x80:
                    if op == 0x8C:  # SHORT_BINUNICODE
                        begin = pos + 1
                        pos = begin + data[pos]
                        stack.append(str(data[begin:pos], "utf-8", "surrogatepass"))
                    elif op == 0x94:  # MEMOIZE
                        index = len(memo)
                        if index >= memo_max:
                            _refuse(at, f"more than {memo_max} memoised values")
                        memo[index] = stack[-1]
                    elif op == 0x85:  # TUPLE1
                        containers -= 1
                        stack[-1] = (stack[-1],)
                    elif op == 0x86:  # TUPLE2
                        containers -= 1
                        last = stack.pop()
                        stack[-1] = (stack[-1], last)
                    elif op == 0x87:  # TUPLE3
                        containers -= 1
                        last = stack.pop()
                        middle = stack.pop()
                        stack[-1] = (stack[-1], middle, last)
                    elif op == 0x81:  # NEWOBJ
                        containers -= 1
                        args = stack.pop()
                        build = builders.get(id(stack[-1]))
                        if build is None or type(args) is not tuple:
                            self.refuse_call(at, stack[-1], args)
                        if args:
                            self.charge(at, args)
                        stack[-1] = build(*args)
                    elif op == 0x89:  # NEWFALSE
                        stack.append(False)
                    elif op == 0x88:  # NEWTRUE
                        stack.append(True)
                    elif op in _MARKED:
                        containers -= 1
                        items, stack = stack, below.pop()
                        self.marked(op, at, stack, items)
                    else:
                        containers -= 1
                        pos = self.rare(op, at, pos, stack)
                elif op == 0x68:  # BINGET
                    stack.append(memo[data[pos]])
                    pos += 1
                elif op == 0x71:  # BINPUT
                    memo[data[pos]] = stack[-1]
                    pos += 1
                elif op == 0x4B:  # BININT1
                    stack.append(data[pos])
                    pos += 1
                elif op == 0x28:  # MARK
                    if len(below) >= depth_max:
                        _refuse(at, f"nested deeper than {depth_max} levels")
                    below.append(stack)
                    stack = []
                elif op == 0x29:  # EMPTY_TUPLE
                    stack.append(())
                elif op == 0x7D:  # EMPTY_DICT
                    containers -= 1
                    stack.append({})
                elif op == 0x52:  # REDUCE
                    containers -= 1
                    args = stack.pop()
                    build = builders.get(id(stack[-1]))
                    if build is None or type(args) is not tuple:
                        self.refuse_call(at, stack[-1], args)
                    self.charge(at, args)
                    stack[-1] = build(*args)
                elif op == 0x62:  # BUILD
                    state = stack.pop()
                    self.build(at, stack[-1], state)
                elif op == 0x58:  # BINUNICODE
                    begin = pos + 4
                    pos = begin + int.from_bytes(data[pos:begin], "little")
                    stack.append(str(data[begin:pos], "utf-8", "surrogatepass"))
                elif op == 0x6A:  # LONG_BINGET
                    stack.append(memo[int.from_bytes(data[pos : pos + 4], "little")])
                    pos += 4
                elif op == 0x72:  # LONG_BINPUT
                    if len(memo) >= memo_max:
                        _refuse(at, f"more than {memo_max} memoised values")
                    memo[int.from_bytes(data[pos : pos + 4], "little")] = stack[-1]
                    pos += 4
                elif op == 0x4D:  # BININT2
                    stack.append(int.from_bytes(data[pos : pos + 2], "little"))
                    pos += 2
                elif op == 0x4A:  # BININT
                    stack.append(int.from_bytes(data[pos : pos + 4], "little", signed=True))
                    pos += 4
                elif op == 0x4E:  # NONE
                    stack.append(None)
                elif op == 0x51:  # BINPERSID
                    if self.persistent is None:
                        _refuse(at, "a persistent id, which only torch.save files have")
                    containers -= 1
                    stack.append(self.persistent(stack.pop()))
                elif op == 0x73:  # SETITEM
                    last = stack.pop()
                    key = stack.pop()
                    self.marked(op, at, stack, [key, last])
                elif op in _MARKED:
                    containers -= 1
                    items, stack = stack, below.pop()
                    self.marked(op, at, stack, items)
                elif op == 0x2E:  # STOP
                    value = stack.pop()
                    if stack or below:
                        _refuse(at, "values are left over on the stack")
                    return value, pos, limits.opcodes_max - counter.__length_hint__()
                else:
                    containers -= 1
                    pos = self.rare(op, at, pos, stack)
                if containers < 0:
                    _refuse(at, f"more than {limits.containers_max} containers")
        except (IndexError, UnicodeDecodeError, struct.error) as e:
            if pos >= size:
                msg = f"pickle: the data ends at byte {size}, in mid-pickle"
                raise BadForeign(msg) from e
            _refuse(at, f"malformed: {shown(e)}")
        except (TypeError, ValueError, KeyError, OverflowError, RecursionError) as e:
            _refuse(at, f"malformed: {type(e).__name__}: {shown(e)}")
        msg = f"pickle, byte {pos}: more than {limits.opcodes_max} opcodes"
        raise BadForeign(msg)

    def rare(self, op: int, at: int, pos: int, stack: list[Any]) -> int:  # noqa: C901, PLR0911, PLR0912, PLR0915  see `run`
        """An opcode that is not worth a place in `run`; returns where the next one begins."""
        data = self.data
        match op:
            case 0x80:  # PROTO
                if data[pos] > 5:
                    _refuse(at, f"protocol {data[pos]}, the newest known is 5")
                return pos + 1
            case 0x95:  # FRAME; its boundaries mean nothing to us, but a length that lies is a sign of rot
                end = pos + 8 + int.from_bytes(data[pos : pos + 8], "little")
                if end > len(data):
                    msg = f"pickle, byte {at}: the frame ends at byte {end}, the data at {len(data)}"
                    raise BadForeign(msg)
                return pos + 8
            case 0x5D:  # EMPTY_LIST
                stack.append([])
            case 0x61:  # APPEND
                last = stack.pop()
                self.marked(op, at, stack, [last])
            case 0x8F:  # EMPTY_SET
                stack.append(set())
            case 0x63:  # GLOBAL
                module, pos = self.line(at, pos)
                name, pos = self.line(at, pos)
                stack.append(self.resolve(at, str(module, "utf-8"), str(name, "utf-8")))
            case 0x93:  # STACK_GLOBAL
                name, module = stack.pop(), stack.pop()
                if type(name) is not str or type(module) is not str:
                    _refuse(at, "a global whose name is no text")
                stack.append(self.resolve(at, module, name))
            case 0x47:  # BINFLOAT
                stack.append(struct.unpack_from(">d", data, pos)[0] if pos + 8 <= len(data) else 0.0)
                return pos + 8
            case 0x43 | 0x55:  # SHORT_BINBYTES, SHORT_BINSTRING
                end = pos + 1 + data[pos]
                stack.append(data[pos + 1 : end] if op == 0x43 else _old_text(data[pos + 1 : end]))
                return end
            case 0x42 | 0x54:  # BINBYTES, BINSTRING
                count = int.from_bytes(data[pos : pos + 4], "little", signed=op == 0x54)
                end = pos + 4 + count
                if count < 0:
                    _refuse(at, f"text of {count} bytes")
                stack.append(data[pos + 4 : end] if op == 0x42 else _old_text(data[pos + 4 : end]))
                return end
            case 0x8D | 0x8E | 0x96:  # BINUNICODE8, BINBYTES8, BYTEARRAY8; a slice never holds more than there is
                end = pos + 8 + int.from_bytes(data[pos : pos + 8], "little")
                raw = data[pos + 8 : end]
                stack.append(str(raw, "utf-8", "surrogatepass") if op == 0x8D else bytearray(raw) if op == 0x96 else raw)
                return end
            case 0x8A | 0x8B:  # LONG1, LONG4
                width = 1 if op == 0x8A else 4
                count = int.from_bytes(data[pos : pos + width], "little", signed=op == 0x8B)
                if not 0 <= count <= self.limits.int_bytes_max:
                    _refuse(at, f"an int of {count} bytes, the limit is {self.limits.int_bytes_max}")
                end = pos + width + count
                stack.append(int.from_bytes(data[pos + width : end], "little", signed=True))
                return end
            case 0x49 | 0x4C | 0x46 | 0x56 | 0x53:  # INT, LONG, FLOAT, UNICODE, STRING
                line, pos = self.line(at, pos)
                stack.append(_from_line(op, line))
            case 0x67:  # GET
                line, pos = self.line(at, pos)
                stack.append(self.memo[int(line)])
            case 0x70:  # PUT
                line, pos = self.line(at, pos)
                index = int(line)
                if index < 0 or len(self.memo) >= self.limits.memo_max:
                    _refuse(at, f"memo index {index}, or more than {self.limits.memo_max} memoised values")
                self.memo[index] = stack[-1]
            case 0x92:  # NEWOBJ_EX
                kwargs, args = stack.pop(), stack.pop()
                build = self.builders.get(id(stack[-1]))
                if build is None or type(args) is not tuple or type(kwargs) is not dict:
                    self.refuse_call(at, stack[-1], args)
                self.charge(at, args)
                stack[-1] = build(*args)
                if kwargs:
                    if type(stack[-1]) is not Made:
                        _refuse(at, f"keyword arguments for a {type(stack[-1]).__name__}")
                    stack[-1].kwargs = kwargs
            case 0x30:  # POP
                stack.pop()
            case 0x32:  # DUP
                stack.append(stack[-1])
            case _:
                _refuse(at, f"opcode {_REFUSED.get(op, '')} 0x{op:02x} is not read")
        return pos

    def marked(self, op: int, at: int, stack: list[Any], items: list[Any]) -> None:  # noqa: C901, PLR0912  see `run`
        """An opcode that applies to what was pushed since the last mark (or SETITEM and APPEND, to one item)."""
        if op == 0x74:  # TUPLE
            stack.append(tuple(items))
        elif op in {0x75, 0x73}:  # SETITEMS, SETITEM
            target = stack[-1]
            if len(items) % 2:
                _refuse(at, "a key without a value")
            if type(target) is dict:
                for key in items[::2]:
                    if type(key) is not str:
                        self.check_key(at, key)
                target.update(zip(items[::2], items[1::2], strict=True))
            elif type(target) is Made:
                if not target.pairs:
                    target.pairs = []
                target.pairs.extend(zip(items[::2], items[1::2], strict=True))  # type: ignore[attr-defined]  # a list since the line above
            else:
                _refuse(at, f"an item is set in a {name_of(target)}")
        elif op in {0x65, 0x61}:  # APPENDS, APPEND
            target = stack[-1]
            if type(target) is list:
                target.extend(items)
            elif type(target) is Made:
                if not target.items:
                    target.items = []
                target.items.extend(items)  # type: ignore[attr-defined]  # a list since the line above
            else:
                _refuse(at, f"an item is appended to a {name_of(target)}")
        elif op == 0x6C:  # LIST
            stack.append(items)
        elif op == 0x64:  # DICT
            stack.append({})
            self.marked(0x75, at, stack, items)
        elif op == 0x90:  # ADDITEMS
            if type(stack[-1]) is not set:
                _refuse(at, f"an item is added to a {name_of(stack[-1])}")
            self.check_keys(at, items)
            stack[-1].update(items)
        elif op == 0x91:  # FROZENSET
            self.check_keys(at, items)
            stack.append(frozenset(items))
        # else POP_MARK: they are gone

    def resolve(self, at: int, module: str, name: str) -> Any:
        """What a name stands for: a value, or a Global; it can be "called" if `builders` knows it."""
        key = renamed(module, name)
        found = self.globals.get(key)
        if found is not None:
            return found
        if len(module) > NAME_CHARS_MAX or len(name) > NAME_CHARS_MAX:
            _refuse(at, f"a global of {len(module) + len(name)} characters: {shown(module)}")
        found = VALUES.get(key)
        if found is None:
            found = Global(*key)
            build = self.known.get(key)
            if build is None and in_family(key[0]):
                build = inert(found)
            if build is not None:
                self.builders[id(found)] = build
            elif key not in MARKERS:
                msg = f"pickle, byte {at}: {shown(str(found))} is not among the types that are read"
                raise BadForeign(msg, remedy=_REMEDY_GLOBAL)
        self.globals[key] = found
        return found

    def build(self, at: int, target: Any, state: Any) -> None:
        """BUILD: give an object its state. Once, for who used it already as a key would see it change."""
        kind = type(target)
        if kind is Made:
            if target.state is not None:
                _refuse(at, f"{target.what} is given its state twice")
            target.state = state
        elif kind is MetadataIndex:
            fill_index(target, state)
        elif kind is dict:
            if type(state) is not dict:  # attributes of an OrderedDict (torch's `_metadata` of state dicts): versions, no state
                _refuse(at, f"a dict is given a {name_of(state)} as state")
        elif kind is np.ndarray:
            self.charge(at, state)
            fill_array(target, state)
        elif kind is NumpyDtype:
            fill_dtype(target, state)
        elif kind is not set or state is not None:
            _refuse(at, f"a {name_of(target)} is given a state")

    def charge(self, at: int, args: Any) -> None:
        """What builders may copy of their arguments, before they do. A memoised megabyte can be named a million times."""
        cost = 8 * len(args)
        for arg in args:
            kind = type(arg)
            if kind in _COSTS:
                cost += len(arg) * _COSTS[kind]
                if kind is list and len(args) == 1:  # a set's members, a dict's pairs
                    self.check_members(at, arg)
        self.copied += cost
        if self.copied > self.limits.copied_bytes_max:
            _refuse(at, f"objects copy more than {self.limits.copied_bytes_max} bytes")

    def check_members(self, at: int, items: list[Any]) -> None:
        """`set([...])`, `frozenset([...])`, `OrderedDict([[k, v], ...])` of old protocols: their builders check types, this counts collisions."""
        for item in items:
            if type(item) is tuple and is_key(item):
                self.count_hash(at, item)
            elif type(item) in {list, tuple} and item and type(item[0]) is tuple and is_key(item[0]):
                self.count_hash(at, item[0])

    def check_keys(self, at: int, keys: Iterable[Any]) -> None:
        """Members of a set."""
        for key in keys:
            if type(key) is not str:
                self.check_key(at, key)

    def check_key(self, at: int, key: Any) -> None:
        """Refuse what cannot be hashed in bounded time."""
        if not is_key(key):
            _refuse(at, f"a {name_of(key)} as key, or one too large")
        if type(key) is tuple or type(key) is MetadataIndex:
            self.count_hash(at, key)

    def count_hash(self, at: int, key: Any) -> None:
        """Tuples of ints hash alike in all processes: whoever writes the file can make them collide."""
        if self.hashes.setdefault(hash(key), key) != key:
            self.collisions += 1
            if self.collisions > COLLISIONS_MAX:
                _refuse(at, f"more than {COLLISIONS_MAX} keys with the hash of another")

    def line(self, at: int, pos: int) -> tuple[bytes, int]:
        """A line of the text protocols, without its end."""
        end = self.data.find(b"\n", pos)
        if end < 0:
            msg = f"pickle, byte {at}: the line does not end"
            raise BadForeign(msg)
        return self.data[pos:end], end + 1

    def refuse_call(self, at: int, what: Any, args: Any) -> NoReturn:
        """A REDUCE of something that no table makes."""
        if type(args) is not tuple:
            _refuse(at, f"arguments in a {name_of(args)}")
        _refuse(at, f"a call of {what if type(what) is Global else 'a ' + name_of(what)}")


_MARKED = frozenset(b"tueld1\x90\x91")
"""TUPLE, SETITEMS, APPENDS, LIST, DICT, POP_MARK, ADDITEMS, FROZENSET."""
_REFUSED = {
    0x82: "EXT1",
    0x83: "EXT2",
    0x84: "EXT4",
    0x69: "INST",
    0x6F: "OBJ",
    0x50: "PERSID",
    0x97: "NEXT_BUFFER",
    0x98: "READONLY_BUFFER",
}
_COSTS: dict[Any, int] = {bytes: 1, bytearray: 1, str: 4, list: 64, tuple: 64, dict: 64, set: 64, frozenset: 64}
"""Bytes per item of a copy; of lists more than they take, for each is also looked at."""


def _refuse(at: int, what: str) -> NoReturn:
    msg = f"pickle, byte {at}: {what}"
    raise BadForeign(msg, remedy=_REMEDY)


def _old_text(raw: bytes) -> str | bytes:
    """A str of Python 2, which held text or bytes."""
    try:
        return str(raw, "utf-8")
    except UnicodeDecodeError:
        return raw


def _from_line(op: int, line: bytes) -> Any:
    """The value of a line of protocol 0."""
    if op == 0x49 and line in {b"00", b"01"}:
        return line == b"01"
    if op in {0x49, 0x4C}:
        text = line.removesuffix(b"L") if op == 0x4C else line
        if not text.removeprefix(b"-").isdigit():
            msg = f"{shown(line)} is no int"
            raise ValueError(msg)
        return int(text)
    if op == 0x46:
        return float(line)
    if op == 0x56:
        return str(line, "raw-unicode-escape")
    if len(line) < 2 or line[:1] not in b"'\"" or line[-1:] != line[:1] or b"\\" in line:
        msg = "text of Python 2 with escapes"
        raise ValueError(msg)
    return _old_text(line[1:-1])


def _measure(value: Any, limits: Limits) -> None:
    """Bound the nesting and the unfolded size of a value. A ring of plain containers is refused; one through a Made is the owner's to notice."""
    done: dict[int, tuple[int, int]] = {}
    """id -> (depth, nodes)."""
    path: dict[int, bool] = {}
    """The containers around the one that is looked at -> whether it is a Made."""
    todo: list[tuple[Any, list[Any] | None]] = [(value, None)]
    while todo:
        node, parts = todo.pop()
        key = id(node)
        if parts is None:
            if key in done or type(node) not in _CONTAINERS:
                continue
            if key in path:
                ring = list(path)
                if not any(path[k] for k in ring[ring.index(key) :]):
                    msg = "pickle: a container holds itself"
                    raise BadForeign(msg, remedy=_REMEDY)
                continue
            parts = [part for part in _parts_of(node) if type(part) in _CONTAINERS and part]
            if not parts:
                done[key] = (1, 1)
                continue
            path[key] = type(node) is Made
            if len(path) > limits.depth_max:
                msg = f"pickle: nested deeper than {limits.depth_max} levels"
                raise BadForeign(msg, remedy=_REMEDY)
            todo.append((node, parts))
            todo.extend((part, None) for part in parts if id(part) not in done)
            continue
        depth, nodes = 0, 1
        for part in parts:
            below, inside = done.get(id(part), (0, 0))
            depth = max(depth, below)
            nodes += inside
        depth += 1
        if depth > limits.depth_max or nodes > limits.nodes_max:
            msg = f"pickle: nested deeper than {limits.depth_max} levels, or more than {limits.nodes_max} parts when unfolded"
            raise BadForeign(msg, remedy=_REMEDY)
        done[key] = (depth, nodes)
        del path[key]


def _parts_of(node: Any) -> Iterable[Any]:
    if type(node) is dict:
        return node.values()  # keys are small, see is_key
    if type(node) is Made:
        return (*node.args, node.state, *node.items, *(v for _, v in node.pairs), node.kwargs)
    return node  # type: ignore[no-any-return]  # a list, tuple or set: `_measure` asks for nothing else


_CONTAINERS = frozenset({list, tuple, dict, Made})
"""Members of sets are keys."""
