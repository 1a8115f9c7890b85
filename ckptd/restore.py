"""Restore: fill live tensors from images, wherever those lie, all ranks from one step.

Two phases, with a meeting of all ranks between them. *Stage*: find the index, plan, and have every wanted byte present and verified; no tensor is
touched, any failure sends all ranks to the next rung of the ladder. *Apply*: copy, which cannot fail for want of bytes. So a bad
image, a lost peer or a lying manifest never leaves a tensor half restored.

Where the bytes are: images in this node's daemon are mapped and read in place (own slot, neighbours' slots); images of other daemons are fetched
by ours, only the wanted blocks, into a sparse guest; images in the durable tier are read by this process, only the wanted blocks, into
sparse anonymous memory. All three look alike from here: memory in which the ensured blocks of an image are right.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ckptd.arena import Arena
from ckptd.capture import copy_batch
from ckptd.core import checksum, slots, wire
from ckptd.core.boxes import Box
from ckptd.core.image import Image, Layout, header_bytes_of, parse
from ckptd.core.ladder import Rung
from ckptd.core.manifest import Index, build_index, check_rows, image_name
from ckptd.core.plan import Copy, Want, byte_ranges, merge, plan_restore
from ckptd.errors import BadImage
from ckptd.link import Link
from ckptd.state import TORCH_DTYPES
from ckptd.storage import Store, checkpoint

READ_BYTES = 8 << 20
"""One read of the durable tier (DESIGN section 7's measurement: O_DIRECT or not, 8 MiB saturate the disk)."""
READERS = 2
COPY_BYTES = 16 << 20
"""Copied at a time; the next batch is prepared meanwhile."""
SWITCH_S = 2e-4
MAP_NORESERVE = 0x4000
"""Not in the mmap module of Python 3.11; the same number on x86-64 and ARM64."""


class Source(Protocol):
    """A complete snapshot somewhere."""

    index: Index

    def ensure(self, ranges: Mapping[int, Sequence[tuple[int, int]]]) -> None:
        """Have these byte ranges of these images present and verified. Raises CkptdError."""

    def memory(self, image: int) -> tuple[memoryview, int]:
        """Writable-looking memory in which the image begins at the given offset. Never written."""

    def close(self) -> None:
        """Let go of all mappings."""


@dataclass(eq=False, slots=True)
class _Mapped:
    memory: memoryview
    mapping: mmap.mmap | None
    """None: our own arena, which stays mapped."""
    offset: int
    name: str
    image_bytes: int
    digests: bytes


class MemorySource:
    """A snapshot in the daemons' memory."""

    def __init__(self, link: Link, job: str, rung: Rung, own: Arena | None, known: Layout | None, timeout_s: float) -> None:
        """`own`: memory that is mapped already. `known`: the layout of this rank's images, recognised faster than parsed."""
        self._link = link
        self._known = known
        self._own = own
        self._timeout_s = timeout_s
        self._mapped: dict[int, _Mapped] = {}
        try:
            for rank in range(rung.world_size):
                self._mapped[rank] = self._open(job, rung, rank)
            parsed = {rank: self._parse(mapped) for rank, mapped in self._mapped.items()}
            self.index = build_index(parsed, {rank: m.digests for rank, m in self._mapped.items()})
        except BaseException:
            self.close()
            raise

    def _open(self, job: str, rung: Rung, rank: int) -> _Mapped:
        node = rung.nodes.get(rank, -1)
        remains = rung.remains_of(rank) if node < 0 else None  # nobody holds it: our daemon decodes it

        def request(i: int) -> wire.Open:
            return wire.Open(id=i, job=job, attempt=rung.attempt, step=rung.step, rank=rank, node=node, remains=remains)

        opened, fd = self._link.ask(request, wire.Opened, self._timeout_s)
        if fd is None:
            msg = f"image of rank {rank} came without its memory"
            raise BadImage(msg)
        try:
            size = os.fstat(fd).st_size
            if opened.offset + opened.image_bytes > size:
                msg = f"image of rank {rank} does not lie in its memory of {size} bytes"
                raise BadImage(msg)
            if self._own is not None and os.path.samestat(os.fstat(fd), os.fstat(self._own.fd)):
                # Our own arena is mapped and populated since the join: faulting its pages in again and unmapping them cost as much as the copy.
                return _Mapped(self._own.memory, None, opened.offset, opened.image, opened.image_bytes, opened.digests)
            # Private and writable, for torch has no read-only tensors; nothing is ever written, so no page is copied.
            mapping = mmap.mmap(fd, size, flags=mmap.MAP_PRIVATE | MAP_NORESERVE)
        finally:
            os.close(fd)
        return _Mapped(memoryview(mapping), mapping, opened.offset, opened.image, opened.image_bytes, opened.digests)

    def _parse(self, mapped: _Mapped) -> Image:
        view = mapped.memory[mapped.offset : mapped.offset + mapped.image_bytes]
        self._ensure(mapped, [(0, 8)])
        header_bytes = header_bytes_of(view[:8], mapped.image_bytes)
        self._ensure(mapped, [(0, header_bytes)])
        header = view[:header_bytes]
        return (self._known and self._known.recognise(header, mapped.image_bytes)) or parse(header, mapped.image_bytes)

    def _ensure(self, mapped: _Mapped, ranges: Iterable[tuple[int, int]]) -> None:
        blocks = _block_ranges(ranges)
        if blocks:
            self._link.ask(lambda i: wire.Ensure(id=i, image=mapped.name, blocks=blocks), wire.Done, self._timeout_s)

    def ensure(self, ranges: Mapping[int, Sequence[tuple[int, int]]]) -> None:
        """See Source; the daemon verifies, once for all ranks."""
        for image, wanted in ranges.items():
            self._ensure(self._mapped[image], wanted)

    def memory(self, image: int) -> tuple[memoryview, int]:
        """See Source."""
        mapped = self._mapped[image]
        return mapped.memory, mapped.offset

    def close(self) -> None:
        """See Source."""
        for mapped in self._mapped.values():
            if mapped.mapping is not None:
                with contextlib.suppress(BufferError):
                    mapped.memory.release()
                    mapped.mapping.close()


class StoreSource:
    """A checkpoint in the durable tier."""

    def __init__(self, store: Store, directory: str, warm: Sequence[memoryview] = ()) -> None:
        """`warm`: populated memory that nobody needs until this is closed (free slots): the first touch of fresh memory costs up to ten copies."""
        self._store = store
        self._directory = directory
        self._warm = [*warm]
        self._made: list[mmap.mmap] = []
        self._memory: dict[int, memoryview] = {}
        self._present: dict[int, set[int]] = {}
        _, self.index = checkpoint.read_checkpoint(store, directory)

    def ensure(self, ranges: Mapping[int, Sequence[tuple[int, int]]]) -> None:
        """See Source. Each image's own header is read too, and must say what the index says."""
        work = [(image, span) for image, wanted in ranges.items() for span in self._missing(image, wanted)]
        with ThreadPoolExecutor(READERS, "ckptd-read") as pool:
            for done in [pool.submit(self._read, image, *span) for image, span in work]:
                done.result()
        for image in ranges:
            info = self.index.images[image]
            view = self._memory[image]
            if header_bytes_of(view[:8], info.image_bytes) != info.header_bytes:
                msg = f"image {image}: its header is not as long as the index says"
                raise BadImage(msg)
            check_rows(self.index, image, parse(view[: info.header_bytes], info.image_bytes))

    def _missing(self, image: int, wanted: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
        """Spans of blocks that are not here yet, cut for reading; makes the image's memory on first use."""
        info = self.index.images[image]
        if image not in self._memory:
            self._memory[image], self._present[image] = self._room(info.image_bytes), set()
        present = self._present[image]
        per_read = READ_BYTES // checksum.BLOCK_BYTES
        spans = []
        for first, last in _block_ranges([(0, info.header_bytes), *wanted]):
            blocks = [b for b in range(first, last) if b not in present]
            present.update(blocks)
            for low, high in merge((b, b + 1) for b in blocks):
                spans += [(at, min(at + per_read, high)) for at in range(low, high, per_read)]
        return spans

    def _room(self, nbytes: int) -> memoryview:
        for i, area in enumerate(self._warm):
            if nbytes <= len(area):
                self._warm[i] = area[slots.round_up(nbytes) :]
                return area[:nbytes]
        made = mmap.mmap(-1, max(nbytes, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE)
        with contextlib.suppress(OSError):
            made.madvise(mmap.MADV_HUGEPAGE)
        self._made.append(made)
        return memoryview(made)

    def _read(self, image: int, first: int, last: int) -> None:
        info = self.index.images[image]
        begin, end = first * checksum.BLOCK_BYTES, min(last * checksum.BLOCK_BYTES, info.image_bytes)
        view = self._memory[image]
        name = f"{self._directory}/{image_name(image)}"
        self._store.get(name, begin, view[begin:end])
        for block in range(first, last):
            low, high = checksum.extent_of(block, info.image_bytes)
            checksum.check_block(name, block, view[low:high], info.digests)

    def memory(self, image: int) -> tuple[memoryview, int]:
        """See Source."""
        return self._memory[image], 0

    def close(self) -> None:
        """See Source."""
        for view in (*self._memory.values(), *self._warm):
            with contextlib.suppress(BufferError):
                view.release()
        for made in self._made:
            with contextlib.suppress(BufferError):
                made.close()


def _block_ranges(ranges: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Byte ranges -> merged [first, last) block numbers."""
    size = checksum.BLOCK_BYTES
    return merge((begin // size, -(-end // size)) for begin, end in ranges if end > begin)


# --- staging and applying ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Staged:
    """Everything a rank wants, present and verified."""

    source: Source
    copies: tuple[Copy, ...]
    wants: tuple[Want, ...]
    arrays: Mapping[str, Tensor]
    """Arrays inside objects, by the name under which the image holds them."""


def stage(source: Source, wants: Sequence[Want], array_wants: Sequence[Want], *, mine: int) -> Staged:
    """Plan and ensure. Raises CkptdError; touches no live tensor."""
    everything = (*wants, *array_wants)
    copies = plan_restore(source.index, everything, mine=mine)
    source.ensure(byte_ranges(copies, {i: w.dtype for i, w in enumerate(everything)}))
    made = [torch.empty(want.box.extent, dtype=TORCH_DTYPES[want.dtype]) for want in array_wants]

    def array(i: int) -> tuple[Tensor, Box, str]:
        want = everything[i]
        return made[i - len(wants)], want.box, want.dtype

    _copy(source, (c for c in copies if c.want >= len(wants)), array)
    arrays = {want.name: tensor for want, tensor in zip(array_wants, made, strict=True)}
    return Staged(source, tuple(c for c in copies if c.want < len(wants)), tuple(wants), arrays)


def apply(staged: Staged, targets: Callable[[int], Tensor], threads: int = 1) -> int:
    """Copy into the live tensors (`targets`: want number -> local tensor as stored), with so many threads. Returns the bytes copied."""
    return _copy(staged.source, staged.copies, lambda i: (targets(i), staged.wants[i].box, staged.wants[i].dtype), threads)


def _copy(
    source: Source, copies: Iterable[Copy], target: Callable[[int], tuple[Tensor, Box, str]], threads: int = 1
) -> int:
    """Copy, batch by batch, while the next batch is prepared: a thousand tensors cost a good part of their copying in Python."""
    made: dict[int, tuple[Tensor, Box, str]] = {}
    total = room = 0
    places: list[Tensor] = []
    sources: list[Tensor] = []
    with _quick_switches(), ThreadPoolExecutor(threads, "ckptd-copy") as pool:
        running = []
        for c in copies:
            if c.want not in made:
                made[c.want] = target(c.want)
            place, box, dtype = made[c.want]
            memory, offset = source.memory(c.image)
            saved = torch.frombuffer(memory, dtype=TORCH_DTYPES[dtype], count=c.box.numel, offset=offset + c.begin)
            sources.append(_narrow(saved.view(c.box.extent), c.part.relative_to(c.box)))
            places.append(_narrow(place, c.part.relative_to(box)))
            room += places[-1].nbytes
            if room >= COPY_BYTES:
                running.append(pool.submit(_copy_batch, places, sources))
                total, room, places, sources = total + room, 0, [], []
        running.append(pool.submit(_copy_batch, places, sources))
        for done in running:
            done.result()
    return total + room


@contextlib.contextmanager
def _quick_switches() -> Iterator[None]:
    """A thread that copies needs the interpreter between two batches, for microseconds; by default it gets it after 5 ms, while others prepare.

    Measured in rounds with memcpy (2 cores, 608 MB): restore at 0.80-0.88 of it so, 0.76-0.83 without; preparing all first, or copying every
    other batch in the thread that prepares, was no better than that.
    """
    before_s = sys.getswitchinterval()
    sys.setswitchinterval(SWITCH_S)
    try:
        yield
    finally:
        sys.setswitchinterval(before_s)


def _copy_batch(places: list[Tensor], sources: list[Tensor]) -> None:
    with torch.no_grad():  # a thread has its own mode
        copy_batch(places, sources)


def _narrow(tensor: Tensor, box: Box) -> Tensor:
    for dim, (start, extent) in enumerate(zip(box.start, box.extent, strict=True)):
        if extent != tensor.shape[dim]:
            tensor = tensor.narrow(dim, start, extent)
    return tensor


