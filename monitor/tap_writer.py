"""Writes a ring from Python: what the layers without C++ use, and what says how the C++ does it (`native.cpp`).

`record.py` has the rules. Here they are kept by: one lock over claims and rows of groups (reentrant: the garbage collector may call a mark in the middle of a
record), no call between reading and moving `head`, and stores of whole words. Python orders stores as it writes them down; on x86 the processor does too, and on
weakly ordered machines a reader may drop a record more.

Threads: any. Nothing here waits for longer than another thread's record takes. A forked child writes nothing (`off`).
"""

from __future__ import annotations

import os
import struct
import threading
from collections.abc import Sequence
from time import monotonic_ns

from ckptd.monitor import record
from ckptd.monitor.ring import Ring
from ckptd.monitor.tap_ops import history, signature

_AFTER_COMMIT = struct.Struct("QQQQIIBBBBiII")
assert _AFTER_COMMIT.size == record.RECORD.itemsize - 8  # noqa: S101  drawn, not computed
_pack_record = _AFTER_COMMIT.pack_into


def _words(dtype: object, at: int = 0) -> dict[str, int]:
    """Field -> index of its 8-byte word."""
    return {name: (at + offset) // 8 for name, (_, offset, *_) in dtype.fields.items()}  # type: ignore[attr-defined]


_H = _words(record.HEADER)
_G = _words(record.GROUP)
_HEAD, _STEP, _PHASE_NS, _ERRORS, _HOOK_NS = (_H[n] for n in ("head", "step", "phase_ns", "errors", "hook_ns"))
_PHASES_U32 = record.HEADER.fields["phases"][1] // 4  # type: ignore[index]
_VERSION, _OPS_WORD, _HISTORY, _SIGNATURE, _BYTES = (_G[n] for n in ("version", "op", "history", "signature", "bytes"))
_ENTERED, _ENTERED_NS, _DONE, _DONE_NS = (_G[n] for n in ("entered", "entered_ns", "done", "done_ns"))
_P2P_ENTERED, _P2P_NS, _P2P_DONE = (_G[n] for n in ("p2p_entered", "p2p_ns", "p2p_done"))
_ROW_WORDS, _RECORD_WORDS = record.GROUP.itemsize // 8, record.RECORD.itemsize // 8
_GROUPS, _RECORDS = record.GROUPS_AT // 8, record.RECORDS_AT // 8
_NO_GROUP, _P2P = record.NO_GROUP, record.P2P
_FAILED, _WAITED, _P2P_BIT = (flag << 24 for flag in (record.FAILED, record.WAITED, record.P2P))
"""Flags as they lie in a record's seventh word: group, op, dtype, flags, peer."""
_U32 = 0xFFFFFFFF
_P2P_OPEN = 0xFF << 24
"""`p2p_open` in the word of `op`."""


class _Row:
    """A row of GROUP as its only writer remembers it: reading it back word by word takes longer than the rest of an operation's record."""

    __slots__ = ("at", "done", "entered", "history", "ops", "p2p_done", "p2p_entered", "version")

    def __init__(self, row: int) -> None:
        self.at = _GROUPS + row * _ROW_WORDS
        """Its first word."""
        self.entered = self.done = self.history = self.p2p_entered = self.p2p_done = self.version = 0
        self.ops = _U32 << 32
        """The word of `op`; there is no peer yet."""


class Writer:
    """The one writer of one ring. `off`: set in a forked child, and when the tap was told to stop."""

    def __init__(self, ring: Ring) -> None:
        self.lock = threading.RLock()
        self.off = False
        self.coalescing = 0
        """Flag that operations get between the start and the end of a coalesced batch."""
        self.capturing = 0
        """Flag while a CUDA graph is captured."""
        self.use(ring)

    def use(self, ring: Ring) -> None:
        """Write here from now on: a ring without groups."""
        self.ring = ring
        self._bytes = memoryview(ring.memory)
        self._q = self._bytes.cast("Q")
        self._u32 = self._bytes.cast("I")
        self._mask = ring.capacity - 1
        self._rows: dict[int, int] = {}
        self._states: dict[int, _Row] = {}
        self._head, self._step = self._q[_HEAD], self._q[_STEP]

    # --- groups -------------------------------------------------------------------------------------------------------------

    def group(self, key: int, size: int, mine: int, ranks: Sequence[int]) -> int:
        """The row of a group: the one that has its key already, a new one, or NO_GROUP when all are taken (counted)."""
        with self.lock:
            if key in self._rows:
                return self._rows[key]
            header = self.ring.header
            row = int(header["groups"][0])
            if row >= record.GROUPS_MAX:
                header["untabled"] += 1
                return record.NO_GROUP
            used = int(header["ranks_used"][0])
            at = record.EVERYBODY
            if list(ranks) != list(range(size)) and used + size <= record.RANKS_MAX:
                self.ring.ranks[used : used + size] = ranks
                header["ranks_used"] = used + size
                at = used
            place = self.ring.groups_table[row : row + 1]
            place["key"], place["size"], place["mine"], place["ranks_at"], place["local_id"], place["p2p_peer"] = key, size, mine, at, row, -1
            header["groups"] = row + 1
            self._states[row] = _Row(row)
            self._rows[key] = row
            return row

    # --- operations ---------------------------------------------------------------------------------------------------------

    def enter(self, row: int, op: int, dtype: int, nbytes: int, flags: int, peer: int, signed: int, now_ns: int = 0) -> int:
        """An operation begins: its record's index. `signed`: bytes as far as members must agree on them. `now_ns`: when, if it was read already."""
        flags |= self.coalescing | self.capturing
        now = now_ns or monotonic_ns()
        with self.lock:
            q = self._q
            g = self._states.get(row)  # none: of a ring that was in use before
            if g is None:
                row = _NO_GROUP
            i = self._head
            self._head = q[_HEAD] = i + 1  # no call since the line above: nothing can come between
            at = _RECORDS + (i & self._mask) * _RECORD_WORDS
            q[at] = 0
            seq = 0
            if g is not None:
                version = g.at + _VERSION
                q[version] = g.version + 1
                if flags & _P2P:
                    seq = g.p2p_entered = g.p2p_entered + 1
                    g.ops = g.ops & 0xFFFF | op << 16 | 1 << 24 | (peer & _U32) << 32
                    q[g.at + _P2P_ENTERED] = seq
                    q[g.at + _P2P_NS] = now
                    q[g.at + _OPS_WORD] = g.ops
                else:
                    seq = g.entered = g.entered + 1
                    sign = signature(op, dtype, signed)
                    g.history = history(g.history, sign)
                    g.ops = g.ops & ~0xFFFF | op | dtype << 8
                    base = g.at  # whole words one by one: packing them at once clears all of them first, and a reader, or a death, may come between
                    q[base + _ENTERED] = seq
                    q[base + _ENTERED_NS] = now
                    q[base + _HISTORY] = g.history
                    q[base + _SIGNATURE] = sign
                    q[base + _BYTES] = nbytes
                    q[base + _OPS_WORD] = g.ops
                g.version += 2
                q[version] = g.version
            _pack_record(self._bytes, at * 8 + 8, now, 0, 0, nbytes, seq & _U32, (self._step + 1) & _U32, row, op, dtype, flags & 0xFF, peer, 0, 0)
            q[at] = i + 1
        return i

    def returned(self, i: int, now_ns: int) -> None:
        """The call came back to the host. Without the lock: between the look and the store no thread overwrites a whole ring."""
        q, at = self._q, _RECORDS + (i & self._mask) * _RECORD_WORDS
        if q[at] == i + 1 and not q[at + 2]:
            q[at + 2] = now_ns

    def ended(self, i: int, *, failed: bool = False) -> None:
        """The operation is known to be done."""
        now = monotonic_ns()
        with self.lock:
            at = _RECORDS + (i & self._mask) * _RECORD_WORDS
            if self._q[at] == i + 1:
                self._end(at, now, _FAILED if failed else 0)

    def waited(self, i: int, began_ns: int, *, done: bool, failed: bool = False) -> None:
        """A wait for it returned. `done`: that says that it is done (not so on a device, whose waits are its stream's)."""
        now = monotonic_ns()
        q = self._q
        with self.lock:
            at = _RECORDS + (i & self._mask) * _RECORD_WORDS
            if q[at] != i + 1:
                return
            q[at + 2] = now
            u32, waits = self._u32, 2 * at + 14
            u32[waits] = min(u32[waits] + (now - began_ns) // 1000, _U32)
            if done or failed:
                self._end(at, now, _WAITED | _FAILED if failed else _WAITED)
            else:
                q[at + 6] |= _WAITED

    def _end(self, at: int, now: int, flags: int) -> None:
        """The record at this word gets these flags, and its group's row an end."""
        q = self._q
        word = q[at + 6]
        if flags:
            q[at + 6] = word | flags
        if not q[at + 3]:
            q[at + 3] = now
        g = self._states.get(word & 0xFF)
        if g is None:
            return
        if word & _P2P_BIT:
            seq = q[at + 5] & _U32 | g.p2p_entered & ~_U32
            if seq > g.p2p_done:
                q[g.at + _VERSION] = g.version + 1
                g.p2p_done = q[g.at + _P2P_DONE] = seq
                if seq == g.p2p_entered:
                    g.ops &= ~_P2P_OPEN
                    q[g.at + _OPS_WORD] = g.ops
                g.version = q[g.at + _VERSION] = g.version + 2
        else:
            seq = q[at + 5] & _U32 | g.entered & ~_U32
            if seq > g.done:
                base = g.at
                q[base + _VERSION] = g.version + 1
                g.done = q[base + _DONE] = seq
                q[base + _DONE_NS] = now
                g.version = q[base + _VERSION] = g.version + 2

    # --- marks --------------------------------------------------------------------------------------------------------------

    def mark(self, kind: int, began_ns: int, ended_ns: int, value: int = 0, flags: int = 0, waited_us: int = 0, inside_us: int = 0) -> None:
        """An interval of the step's life, or a moment (both times equal)."""
        if self.off:
            return
        q = self._q
        with self.lock:
            i = self._head
            self._head = q[_HEAD] = i + 1  # as in `enter`
            at = _RECORDS + (i & self._mask) * _RECORD_WORDS
            q[at] = 0
            step = (self._step + 1) & _U32
            flags |= record.MARK
            _pack_record(self._bytes, at * 8 + 8, began_ns, ended_ns, ended_ns, value, 0, step, record.NO_GROUP, kind, 0, flags, -1, waited_us, inside_us)
            q[at] = i + 1

    def step(self, number: int | None, cpu_us: int = 0, delay_us: int = 0) -> None:
        """A step ended: a STEP mark, and the header's count, or its number where the session gives one. `cpu_us`, `delay_us`: as `schedstat.Spent` has them."""
        if self.off:
            return
        now = monotonic_ns()
        with self.lock:
            self.mark(record.STEP, now, now, 0 if number is None else number, 0 if number is None else record.NUMBERED, delay_us, cpu_us)
            self._step = self._q[_STEP] = self._step + 1 if number is None else number

    def phase(self, kind: int, since_ns: int | None) -> None:
        """An interval of this kind is open since then; None: it is no more."""
        with self.lock:
            if since_ns is None:
                self._u32[_PHASES_U32] &= ~(1 << kind)
            else:
                self._q[_PHASE_NS] = since_ns
                self._u32[_PHASES_U32] |= 1 << kind

    @property
    def records(self) -> int:
        """Records claimed so far."""
        return self._head

    def error(self) -> int:
        """Count a failure of the tap; how many there were."""
        with self.lock:
            self._q[_ERRORS] += 1
            return int(self._q[_ERRORS])

    def hook_ns(self, spent_ns: int) -> None:
        """Add to the time spent in the tap."""
        with self.lock:
            self._q[_HOOK_NS] += spent_ns

    def thread(self, native_id: int) -> None:
        """The thread that trains."""
        self.ring.header["thread"] = native_id


def pid_start(pid: int | str = "self") -> int:
    """Field 22 of /proc/pid/stat: when the process began, in ticks since boot."""
    with open(f"/proc/{pid}/stat", encoding="ascii", errors="replace") as f:  # noqa: PTH123  once per process, in a trainer
        return int(f.read().rpartition(")")[2].split()[19])


def fill_header(ring: Ring, rank: int, world_size: int, layer: int) -> None:
    """Who writes. Job and attempt come when they are known."""
    h = ring.header
    h["rank"], h["world_size"], h["local_rank"] = rank, world_size, int(os.environ.get("LOCAL_RANK", "0") or 0)
    h["pid"], h["pid_start"], h["layer"], h["thread"] = os.getpid(), pid_start(), layer, threading.get_native_id()
