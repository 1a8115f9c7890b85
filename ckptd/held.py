"""What the daemon holds: arenas, the images in their slots, and guests (parts of images fetched from other daemons).

Invariant: bytes are given out only for blocks whose checksum matched. For images of this node "matched" is remembered per filling until the
next attempt begins, so that many ranks reading one image cost one pass over it.

All methods run on the loop unless they say "pool"; those get immutable inputs and return values.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import mmap
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from ckptd import notify
from ckptd.arena import Arena
from ckptd.core import checksum, slots
from ckptd.core.ladder import Remains
from ckptd.core.node import SlotRef
from ckptd.errors import NotFound, PeerFailed

log = logging.getLogger("ckptd.held")


@dataclass(eq=False, slots=True)
class Guest:
    """An image of another node: a sparse memfd that fills with the blocks that somebody asked for."""

    fd: int
    mapping: mmap.mmap
    node: int
    image_bytes: int
    digests: bytes
    present: set[int] = field(default_factory=set)
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    closed: bool = False
    remains: Remains | None = None
    """Where nobody holds the image: what it is decoded from."""
    meta: Any = None
    """And what its group's fragments say (protect.Meta)."""

    @staticmethod
    def of(name: str, node: int, image_bytes: int, digests: bytes) -> Guest:
        """An empty guest. It costs memory only for the blocks that arrive."""
        if image_bytes <= 0 or len(digests) != checksum.block_count(image_bytes) * checksum.DIGEST_BYTES:
            msg = f"node {node} describes an image of {image_bytes} bytes with {len(digests)} bytes of checksums"
            raise PeerFailed(msg)
        fd = os.memfd_create(name[:200], os.MFD_CLOEXEC)
        try:
            os.ftruncate(fd, image_bytes)
            return Guest(fd, mmap.mmap(fd, image_bytes), node, image_bytes, digests)
        except BaseException:
            os.close(fd)
            raise

    def close(self) -> None:
        """Free it; trainers that mapped it keep their mapping, and a decoding that is under way its view."""
        self.closed = True
        with contextlib.suppress(BufferError):
            self.mapping.close()
        os.close(self.fd)

    def arrived(self, what: str, view: memoryview, begin: int, end: int) -> None:
        """Thread: whole blocks were written to `view` of the mapping; they are present if they match. Raises ChecksumMismatch, NotFound (closed meanwhile)."""
        if self.closed:
            msg = f"{what} is not wanted any more"
            raise NotFound(msg)
        blocks = [*checksum.blocks_of(begin, end)]
        verify_blocks(what, view, self.digests, blocks)
        self.present.update(blocks)


class Arenas:
    """All arenas, by name. A service manager gets a copy of each descriptor, so that they outlive this process."""

    def __init__(self) -> None:
        self._arenas: dict[str, Arena] = {}
        self._verified: dict[SlotRef, set[int]] = {}
        self._digests: dict[SlotRef, bytes] = {}
        """Seals that were read: a peer that fetches an image asks once per megabyte."""

    def __iter__(self) -> Iterator[Arena]:
        return iter([*self._arenas.values()])

    def __len__(self) -> int:
        return len(self._arenas)

    def get(self, name: str) -> Arena | None:
        """An arena by its name."""
        return self._arenas.get(name)

    def add(self, arena: Arena) -> bool:
        """Hold an arena; False (and closed) if it is held already."""
        if arena.name in self._arenas:
            arena.close()
            return False
        self._arenas[arena.name] = arena
        notify.store_fd(f"ckptd-{arena.name}", arena.fd)
        return True

    def drop(self, name: str) -> None:
        """Free an arena."""
        arena = self._arenas.pop(name)
        notify.drop_fd(f"ckptd-{name}")
        self._verified = {ref: blocks for ref, blocks in self._verified.items() if ref.arena != name}
        self._digests = {ref: digests for ref, digests in self._digests.items() if ref.arena != name}
        arena.close()

    def of(self, job: str, rank: int | None = None) -> list[Arena]:
        """Arenas of a job, or of one rank of it."""
        return [
            a for a in self._arenas.values() if a.descriptor.job == job and rank in {None, a.descriptor.rank}
        ]

    def image(self, ref: SlotRef, image_bytes: int) -> memoryview:
        """The bytes of a filling. Raises NotFound if the slot holds another by now."""
        arena = self._arenas.get(ref.arena)
        if arena is None or arena.header(ref.slot).gen != ref.gen:
            msg = f"slot {ref.slot} of arena {ref.arena} no longer holds filling {ref.gen}"
            raise NotFound(msg)
        return arena.image(ref.slot, image_bytes)

    def digests(self, ref: SlotRef) -> bytes:
        """The checksums of a sealed filling. Raises NotFound."""
        arena = self._arenas.get(ref.arena)
        if arena is not None and ref in self._digests and arena.header(ref.slot).gen == ref.gen:
            return self._digests[ref]
        seal = arena.seal(ref.slot) if arena else None
        if seal is None or seal.gen != ref.gen:
            msg = f"slot {ref.slot} of arena {ref.arena} has no checksums of filling {ref.gen}"
            raise NotFound(msg)
        self._digests[ref] = seal.digests
        return seal.digests

    def release(self, ref: SlotRef) -> None:
        """Give the slot back to its trainer."""
        self._verified.pop(ref, None)
        self._digests.pop(ref, None)
        arena = self._arenas.get(ref.arena)
        if arena is not None:
            slots.release(arena.memory, arena.geometry.seal_at(ref.slot), ref.gen)

    def void_torn(self, arena: Arena) -> None:
        """The trainer of this arena is dead: what it was filling is nothing, and its successor may take the slot."""
        for slot in range(arena.geometry.slots):
            if arena.header(slot).state == slots.FILLING:
                slots.flip(arena.memory, arena.geometry.header_at(slot), slots.VOID)

    def filled(self, arena: Arena) -> Iterator[tuple[SlotRef, slots.Header]]:
        """Fillings of an arena that were not released: what a successor or a death leaves to be found. Oldest first, as they were made."""
        found = [(arena.header(slot), slot) for slot in range(arena.geometry.slots)]
        for header, slot in sorted(found, key=lambda f: (f[0].attempt, f[0].step, f[0].gen)):
            fits = 0 < header.image_bytes <= arena.geometry.slot_bytes
            if header.state == slots.FILLED and header.gen != arena.seal(slot).released_gen and fits:
                yield SlotRef(arena.name, slot, header.gen), header

    def forget_verified(self) -> None:
        """A new attempt begins: what was verified for the last one is verified again."""
        self._verified.clear()

    def unverified(self, ref: SlotRef, blocks: Iterable[int]) -> list[int]:
        """Those of `blocks` that nobody verified in this attempt."""
        known = self._verified.get(ref, set())
        return [b for b in blocks if b not in known]

    def verified(self, ref: SlotRef, blocks: Iterable[int]) -> None:
        """Remember that these matched."""
        self._verified.setdefault(ref, set()).update(blocks)


def make_seal(slot: int, gen: int, image: memoryview, seal: slots.Seal) -> bytes:
    """Pool: the checksums of a filling; where a predecessor left a `seal` of it, the bytes are checked against that. Raises ChecksumMismatch."""
    if seal.gen == gen and len(seal.digests) == checksum.block_count(len(image)) * checksum.DIGEST_BYTES:
        verify_blocks(f"slot {slot}", image, seal.digests, range(checksum.block_count(len(image))))
        return seal.digests
    return checksum.digests_of(image)


def put_seal(arena: Arena, slot: int, gen: int, digests: bytes) -> None:
    """Loop, so that two fillings of one slot cannot overtake each other: write the seal, unless another filling has begun meanwhile."""
    if arena.header(slot).gen == gen and arena.seal(slot).gen != gen:
        slots.write_seal(arena.memory, arena.geometry.seal_at(slot), gen, digests)


def verify_blocks(what: str, image: memoryview, digests: bytes, blocks: Iterable[int]) -> None:
    """Pool: raise ChecksumMismatch at the first block that does not match."""
    for block in blocks:
        begin, end = checksum.extent_of(block, len(image))
        checksum.check_block(what, block, image[begin:end], digests)
