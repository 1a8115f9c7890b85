"""A rank's ring: a memfd that its tap makes and writes, and that its node's daemon maps and reads, also when the rank is dead.

`record.py` draws the bytes and says the rules of writing and reading. Here they become memory: `create` in the trainer, `adopt` in the daemon, which believes
nothing that it finds there but what it checked: sizes, bounds of indexes, and no word twice.

Threads: a Ring is read by one thread at a time; the writer (tap) brings its own exclusion.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import struct
from dataclasses import dataclass
from typing import Any

import numpy as np

from ckptd.arena import SEALS, map_sealed
from ckptd.errors import BadImage
from ckptd.monitor import record

AHEAD_MAX = 1 << 40
"""Records that could have been written since the last look: a day at ten million a second."""


_WORDS = {name: (struct.Struct(f"<{ {'u4': 'I', 'i4': 'i', 'u8': 'Q'}[kind.str[1:]] }"), at) for name, (kind, at, *_) in (record.HEADER.fields or {}).items() if kind.kind in "ui"}
"""How a word of the header is read: a tenth of what numpy takes, and a daemon reads hundreds a second."""


@dataclass(frozen=True, slots=True)
class Group:
    """A process group of one rank, as its ring has it just now. `members`: global ranks; all of `size` where the ring has no list."""

    key: int
    size: int
    mine: int
    members: tuple[int, ...]
    entered: int
    entered_ns: int
    done: int
    done_ns: int
    history: int
    signature: int
    bytes: int
    op: int
    dtype: int
    p2p_op: int
    p2p_open: bool
    p2p_peer: int
    p2p_entered: int
    p2p_done: int
    p2p_ns: int


@dataclass(frozen=True, slots=True)
class Window:
    """Records of a ring, oldest first. `first`: index of the first; `end`: where to go on; `lost`: overwritten or torn before they could be read."""

    first: int
    end: int
    records: np.ndarray[Any, np.dtype[np.void]]
    lost: int


class Ring:
    """One mapped ring. `fd` stays open as long as the object lives."""

    def __init__(self, fd: int, mapping: mmap.mmap) -> None:
        self.fd = fd
        self.memory = mapping
        size = len(mapping)
        self.header = np.frombuffer(mapping, record.HEADER, 1)[0:1]
        self.groups_table = np.frombuffer(mapping, record.GROUP, record.GROUPS_MAX, record.GROUPS_AT)
        self.ranks = np.frombuffer(mapping, "<u4", record.RANKS_MAX, record.RANKS_AT)
        self.capacity = (size - record.RECORDS_AT) // record.RECORD.itemsize
        self.capacity = 1 << (self.capacity.bit_length() - 1)
        self.records = np.frombuffer(mapping, record.RECORD, self.capacity, record.RECORDS_AT)
        self._members: dict[tuple[int, int, int], tuple[int, ...]] = {}

    @classmethod
    def create(cls, capacity: int = record.CAPACITY_DEFAULT) -> Ring:
        """Make one, empty and sealed against shrinking and growing; the tap fills its header. Raises OSError, ValueError."""
        if capacity & (capacity - 1) or not record.CAPACITY_MIN <= capacity <= record.CAPACITY_MAX:
            msg = f"a ring has a power of two of records, {record.CAPACITY_MIN} to {record.CAPACITY_MAX}, not {capacity}"
            raise ValueError(msg)
        fd = os.memfd_create("ckptd:ring", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.posix_fallocate(fd, 0, record.ring_bytes(capacity))
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, SEALS)
            ring = cls(fd, mmap.mmap(fd, record.ring_bytes(capacity)))
        except BaseException:
            os.close(fd)
            raise
        ring.header["version"], ring.header["capacity"], ring.header["device"] = record.VERSION, capacity, -1
        ring.header["magic"] = record.MAGIC
        return ring

    @classmethod
    def adopt(cls, fd: int) -> Ring:
        """Map a ring that a tap made, for reading; takes over `fd`, and closes it if this raises. Raises BadImage if it is none."""
        try:
            ring = cls(fd, map_sealed(fd, "ring", record.ring_bytes(record.CAPACITY_MIN), record.ring_bytes(record.CAPACITY_MAX), mmap.PROT_READ))
            head = ring.header[0]
            if int(head["magic"]) != record.MAGIC or int(head["version"]) != record.VERSION:
                msg = f"no ring of version {record.VERSION}"
                raise BadImage(msg)
            capacity = int(head["capacity"])
            if capacity & (capacity - 1) or not record.CAPACITY_MIN <= capacity <= ring.capacity:
                msg = f"a ring of {len(ring.memory)} bytes does not hold {capacity} records"
                raise BadImage(msg)
            ring.capacity = capacity
            ring.records = ring.records[:capacity]
        except BaseException:
            with contextlib.suppress(OSError):
                os.close(fd)
            raise
        return ring

    def word(self, name: str) -> int:
        """A number of the header, as it is now."""
        form, at = _WORDS[name]
        value: int = form.unpack_from(self.memory, at)[0]
        return value

    @property
    def job(self) -> str:
        """Whose ring it is."""
        return bytes(self.header["job"][0]).decode(errors="replace")

    def read(self, begin: int) -> Window:
        """Everything committed from record `begin` on. A record that is being written ends the window: it is read the next time."""
        head = self.word("head")
        if head - begin > AHEAD_MAX:  # what is written there may be anything
            return Window(begin, begin, self.records[:0].copy(), 0)
        first = max(begin, head - self.capacity, 0)
        if head <= first or head - first > self.capacity:  # nothing new, or a head that cannot be
            return Window(begin, max(begin, min(head, first)) if head >= begin else head, self.records[:0].copy(), 0)
        copied = self._copy(first, head, self.records)
        numbers = np.arange(first + 1, head + 1, dtype=np.uint64)
        ready = copied["commit"] == numbers
        now = self._copy(first, head, self.records["commit"])  # after the copy: what moved was overwritten meanwhile
        if ready.all() and (now == numbers).all():
            return Window(first, head, copied, first - begin if begin >= 0 else 0)
        good = ready & (now == numbers)
        end = head
        pending = np.flatnonzero(~ready & (now < numbers))
        if len(pending):  # claimed and not committed; what comes after it is read the next time, together with it
            oldest = int(pending[0])
            if head - (first + oldest) < self.capacity // 2:
                end = first + oldest
                good = good[:oldest]
                copied = copied[:oldest]
        kept = copied if good.all() else copied[good]
        return Window(first, end, kept, (first - begin if begin >= 0 else 0) + int(np.count_nonzero(~good)))

    def _copy(self, first: int, end: int, of: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """Places of records [first, end), at most once around."""
        a, b = first & (self.capacity - 1), ((end - 1) & (self.capacity - 1)) + 1
        return of[a:b].copy() if a < b else np.concatenate([of[a:], of[:b]])

    def groups(self) -> list[Group]:
        """All rows, each read whole or (while its writer is at it for long) as it is."""
        found = []
        for i in range(min(self.word("groups"), record.GROUPS_MAX)):
            row = self.groups_table[i].copy()
            for _ in range(4):
                if not int(row["version"]) & 1 and int(self.groups_table[i]["version"]) == int(row["version"]):
                    break
                row = self.groups_table[i].copy()
            found.append(self._group(row))
        return found

    def _group(self, row: np.void) -> Group:
        size, at = min(int(row["size"]), self.word("world_size"), record.RANKS_MAX), int(row["ranks_at"])  # what is written there may be anything
        which = (int(row["key"]), size, at)
        members = self._members.get(which)
        if members is None:
            if at == record.EVERYBODY or at + size > record.RANKS_MAX:
                members = tuple(range(size))
            else:
                members = tuple(int(r) for r in self.ranks[at : at + size])
            if len(self._members) > 4 * record.GROUPS_MAX:
                self._members.clear()
            self._members[which] = members
        names = ("entered", "entered_ns", "done", "done_ns", "history", "signature", "bytes", "op", "dtype", "p2p_op")
        values = {n: int(row[n]) for n in names}
        return Group(
            key=which[0], size=size, mine=int(row["mine"]), members=members, p2p_open=bool(row["p2p_open"]), p2p_peer=int(row["p2p_peer"]),
            p2p_entered=int(row["p2p_entered"]), p2p_done=int(row["p2p_done"]), p2p_ns=int(row["p2p_ns"]), **values,
        )  # fmt: skip

    def close(self) -> None:
        """Close the descriptor; the mapping goes with the last view of it."""
        self.header = self.groups_table = self.ranks = self.records = np.empty(0)  # type: ignore[assignment]
        with contextlib.suppress(BufferError):
            self.memory.close()
        os.close(self.fd)
