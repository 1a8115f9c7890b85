"""Arenas: a rank's shared memory, as a memfd that the daemon owns and the trainer maps.

The bytes are laid out by `core.slots`; here they become memory: created, sealed against shrinking and growing (a truncated mapping is
SIGBUS), populated ahead (the first touch of a page costs 5 to 10 copies of it), passed as a file descriptor, adopted by a successor.

Invariants
- the descriptor alone is enough to adopt an arena: page 0 says whose it is;
- memory is reserved with fallocate before it is touched, and admission control ran before that: no SIGBUS, no OOM killer;
- a mapping is released only when no view of it is left.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import mmap
import os
import secrets
import stat
import sys
from dataclasses import dataclass
from pathlib import Path

import psutil

from ckptd.core import slots
from ckptd.core.slots import Descriptor, Geometry, Header, Seal
from ckptd.errors import BadImage, MemoryRefused

SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
"""F_SEAL_SEAL too: a trainer must not be able to add F_SEAL_WRITE and with it lock its successor out."""
MADV_POPULATE_WRITE = 23
"""Linux 5.14; missing from Python's mmap module. Older kernels say EINVAL and pages are touched on first use."""
MARGIN_BYTES = 256 << 20
"""Left free by admission control, besides 5 % of the memory: page tables, the trainers' own growth."""

_libc = ctypes.CDLL(None, use_errno=True)
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


class Arena:
    """One mapped arena. `fd` stays open as long as the object lives; `memory` is the whole of it."""

    def __init__(self, fd: int, descriptor: Descriptor, mapping: mmap.mmap) -> None:
        self.fd = fd
        self.descriptor = descriptor
        self.geometry = Geometry(descriptor.slots, descriptor.slot_bytes)
        self._mapping = mapping
        self.memory = memoryview(mapping)

    @classmethod
    def create(cls, *, job: str, rank: int, slot_count: int, slot_bytes: int) -> Arena:
        """Reserve and seal a new arena; `populate` it before use. Raises MemoryRefused if the kernel has no room."""
        geometry = Geometry(slot_count, slots.round_up(slot_bytes))
        descriptor = Descriptor(secrets.token_hex(8), job, rank, slot_count, geometry.slot_bytes)
        fd = os.memfd_create(f"ckptd:{job}:{rank}"[:200], os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.posix_fallocate(fd, 0, geometry.arena_bytes)
        except OSError as e:
            os.close(fd)
            msg = f"no room for an arena of {geometry.arena_bytes} bytes: {e.strerror}"
            raise MemoryRefused(msg, remedy="fewer slots, fewer ranks on this node, or more memory") from e
        try:
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, SEALS)
            arena = cls(fd, descriptor, mmap.mmap(fd, geometry.arena_bytes))
            slots.write_descriptor(arena.memory, descriptor)
        except BaseException:
            os.close(fd)
            raise
        return arena

    @classmethod
    def adopt(cls, fd: int) -> Arena:
        """Map an arena that somebody else made; takes over `fd`, and closes it if this raises. Raises BadImage if it is none."""
        try:
            mapping = map_sealed(fd, "arena", slots.PAGE_BYTES)
            return cls(fd, slots.read_descriptor(memoryview(mapping)), mapping)
        except BaseException:
            os.close(fd)
            raise

    @property
    def name(self) -> str:
        """The arena's id."""
        return self.descriptor.arena

    def populate(self) -> None:
        """Have every page present and mapped here. Blocks for about 0.6 s per GB the first time; releases the GIL."""
        populate(self.memory)

    def header(self, slot: int) -> Header:
        """What the trainer says of a slot."""
        return slots.read_header(self.memory, self.geometry.header_at(slot))

    def seal(self, slot: int) -> Seal:
        """What the daemon says of a slot."""
        return slots.read_seal(self.memory, self.geometry.seal_at(slot), self.geometry.seal_bytes)

    def image(self, slot: int, image_bytes: int) -> memoryview:
        """The image's bytes."""
        at = self.geometry.image_at(slot)
        return self.memory[at : at + image_bytes]

    def close(self) -> None:
        """Unmap and close. Views that are still held keep the mapping alive until they go."""
        self.memory.release()
        with contextlib.suppress(BufferError):
            self._mapping.close()
        os.close(self.fd)


def map_sealed(fd: int, what: str, bytes_min: int, bytes_max: int = sys.maxsize, prot: int = mmap.PROT_READ | mmap.PROT_WRITE) -> mmap.mmap:
    """The memory that another process made and sealed against shrinking and growing (a truncated mapping is SIGBUS). `fd` stays the caller's. Raises BadImage."""
    info = os.fstat(fd)
    if not stat.S_ISREG(info.st_mode) or not bytes_min <= info.st_size <= bytes_max:
        msg = f"this descriptor is no {what}"
        raise BadImage(msg)
    try:
        sealed = fcntl.fcntl(fd, fcntl.F_GET_SEALS) & (fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
    except OSError:
        sealed = 0
    if sealed != fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW:
        msg = "this memory is not sealed against shrinking and growing"
        raise BadImage(msg)
    try:
        return mmap.mmap(fd, info.st_size, prot=prot)
    except OSError as e:  # sealed against writing, for example
        msg = f"this memory cannot be mapped: {e.strerror}"
        raise BadImage(msg) from e


def populate(memory: memoryview) -> None:
    """MADV_POPULATE_WRITE over writable memory; where the kernel has no such call, nothing happens."""
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    _libc.madvise(address, len(memory), MADV_POPULATE_WRITE)


@dataclass(frozen=True, slots=True)
class Room:
    """Memory that could still be used, and what says so."""

    available_bytes: int
    limit: str


def room() -> Room:
    """The least of MemAvailable and the cgroup's remaining memory (v2 and v1)."""
    found = [Room(psutil.virtual_memory().available, "MemAvailable")]
    for limit, usage in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        with contextlib.suppress(OSError, ValueError):
            found.append(Room(int(Path(limit).read_text()) - int(Path(usage).read_text()), limit))
    return min(found, key=lambda r: r.available_bytes)


def admit(slot_bytes: int, wanted_slots: int, ranks_to_come: int, least: int = slots.SLOTS_MIN) -> int:
    """Slots that one rank may have while as much is left for `ranks_to_come` others. Raises MemoryRefused below `least`, with the numbers."""
    free = room()
    margin = MARGIN_BYTES + psutil.virtual_memory().total // 20
    share = max(0, free.available_bytes - margin) // (ranks_to_come + 1)
    per_slot = Geometry(slots.SLOTS_MIN, slots.round_up(slot_bytes)).stride
    allowed = min(wanted_slots, slots.SLOTS_MAX, share // per_slot)
    if allowed < least:
        without = "; with attach(parity=0), or ckptd run --parity 0, two slots are enough" if least > slots.SLOTS_MIN else ""
        msg = (
            f"a rank needs {least} slots of {per_slot / 1e6:.0f} MB; {free.available_bytes / 1e6:.0f} MB are free "
            f"({free.limit}), {margin / 1e6:.0f} MB stay reserved, and {ranks_to_come} more ranks of this node want as much"
        )
        raise MemoryRefused(msg, remedy="raise the memory limit, shard the state over more ranks, or run fewer ranks per node" + without)
    return allowed
