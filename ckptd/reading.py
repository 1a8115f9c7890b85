"""Reading boxes of a checkpoint of any format: into memory that is given, from many threads, each with bounded scratch memory.

    Reading       any box of any tensor as bytes; knows rows, files and strides (`core.logical`, `core.strided`)
    Pool          a few threads with a buffer each, and bounded work under way
    hashes        of every logical tensor: xxh3-128 over the xxh3-128 of each 4 MiB of its row-major bytes
    compare_replicas, settle   what is stored more than once is compared before it is believed

Memory that tensors take is that of the threads (3 windows and the scratch each; `workers_for`), whatever the checkpoint's size.
"""

from __future__ import annotations

import mmap
import os
import stat as stat_of
import threading
from bisect import bisect_left
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import replace
from math import prod
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Self

import numpy as np
import xxhash

from ckptd.core import strided
from ckptd.core.boxes import Box, boxes_of_flat_range
from ckptd.core.cast import NUMPY, can_cast, cast, cast_into
from ckptd.core.emit import Take
from ckptd.core.image import ITEM_BYTES
from ckptd.core.logical import FILL, LITERAL, STATE, Checkpoint, Row, Tensor
from ckptd.errors import BadArgument, Divergent, StoreFailed
from ckptd.formats import Format, Place, ReadOptions, place_of, recognise
from ckptd.storage.direct import ALIGN_BYTES

WINDOW_BYTES = 4 << 20
"""Also the block of a tensor's hash: windows of a whole tensor begin at its multiples."""
BUFFER_BYTES = WINDOW_BYTES + (64 << 10)
"""A buffer holds a whole block and the headers beside it."""
SCRATCH_BYTES = 8 << 20
BASE_BYTES = 160 << 20
"""What Python, NumPy and the tables take, before the first window."""


class Files:
    """The bytes of a checkpoint's files by number. Local files are kept open; any thread may read."""

    def __init__(self, place: Place, checkpoint: Checkpoint) -> None:
        self._place = place
        self._held = checkpoint.files
        self._literals = memoryview(bytes(checkpoint.literals))
        self._open: dict[int, int] = {}
        self._lock = threading.Lock()

    def fetch(self, file: int, begin: int, into: memoryview) -> None:
        """Fill `into`. Raises StoreFailed where the file has become shorter."""
        if file == FILL:
            into[:] = bytes(len(into))
            return
        if file == LITERAL:
            into[:] = self._literals[begin : begin + len(into)]
            return
        fd = self._open.get(file)
        if fd is None:
            fd = self._opened(file)
        if fd < 0:
            self._place.store.get(self._place.full(self._held[file].name), begin, into)
            return
        done = 0
        while done < len(into):
            got = os.preadv(fd, [into[done:]], begin + done)
            if not got:
                msg = f"{self._held[file].name}: ends at byte {begin + done}, while it is read"
                raise StoreFailed(msg, remedy="do not change a checkpoint that is being converted")
            done += got

    def _opened(self, file: int) -> int:
        with self._lock:
            if file not in self._open:
                held = self._held[file]
                path = self._place.path(held.name)
                self._open[file] = -1 if path is None else _open_regular(path)
            return self._open[file]

    def close(self) -> None:
        """Close what was opened."""
        for fd in self._open.values():
            if fd >= 0:
                os.close(fd)
        self._open = {}


def _open_regular(path: Path) -> int:
    """Open a file that is one: no pipe to wait on, no device. Raises StoreFailed."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as e:
        msg = f"{path} cannot be read: {e.strerror}"
        raise StoreFailed(msg) from e
    if not stat_of.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        msg = f"{path} is no regular file"
        raise StoreFailed(msg)
    return fd


class _Rows:
    """The rows of a tensor, so that those which meet a box are found quickly."""

    def __init__(self, tensor: Tensor) -> None:
        rows = tensor.rows
        dims = range(len(tensor.shape))
        self._dim = max(dims, key=lambda d: len({r.box.start[d] for r in rows}), default=-1) if len(rows) > 8 else -1
        self._rows = sorted(rows, key=lambda r: r.box.start[self._dim]) if self._dim >= 0 else list(rows)
        self._starts = [r.box.start[self._dim] for r in self._rows] if self._dim >= 0 else []
        self._longest = max((r.box.extent[self._dim] for r in self._rows), default=0) if self._dim >= 0 else 0

    def meeting(self, box: Box) -> Iterator[tuple[Row, Box]]:
        """Rows with their common part."""
        low, high = 0, len(self._rows)
        if self._dim >= 0:
            low = bisect_left(self._starts, box.start[self._dim] - self._longest)
            high = bisect_left(self._starts, box.stop[self._dim])
        for row in self._rows[low:high]:
            part = row.box.intersect(box)
            if part is not None:
                yield row, part


class Reading:
    """Boxes of a checkpoint's tensors as bytes. Any thread may ask, each with its own scratch memory."""

    def __init__(self, place: Place, checkpoint: Checkpoint, roundings: Mapping[str, Tensor] | None = None) -> None:
        """`roundings`: tensors of which the source holds the values in 16 bits, too, compared already: read where these are wanted, instead of rounding again."""
        self.checkpoint = checkpoint
        self._roundings = roundings or {}
        self._files = Files(place, checkpoint)
        self._rows: dict[tuple[str, str], _Rows] = {}
        self.bytes_read = 0

    def stored(self, name: str, dtype: str) -> Tensor:
        """The tensor that holds these values: as `dtype` if there is one, else as the checkpoint has them."""
        rounding = self._roundings.get(name)
        return rounding if rounding is not None and rounding.dtype == dtype else self.checkpoint.tensors[name]

    def fill(self, name: str, box: Box, out: memoryview, scratch: memoryview, dtype: str = "") -> None:
        """Write the box, row-major, over all of `out`: in the tensor's own dtype, or as `stored` has it under `dtype`."""
        tensor = self.stored(name, dtype)
        item = ITEM_BYTES[tensor.dtype]
        rows = self._rows.get((name, tensor.dtype))
        if rows is None:
            rows = self._rows[name, tensor.dtype] = _Rows(tensor)
        self.bytes_read += len(out)
        array: np.ndarray[Any, Any] | None = None
        for row, part in rows.meeting(box):
            there = row.part(part, item)
            if part == box and there.contiguous:  # most of most checkpoints
                self._files.fetch(row.file, there.begin, out)
                return
            if array is None:
                array = np.frombuffer(out, NUMPY[tensor.dtype]).reshape(box.extent)
            self._copy(there, array, part.relative_to(box), item, scratch)

    def row(self, row: Row, dtype: str, out: memoryview, scratch: memoryview) -> None:
        """The elements of one row, row-major, over all of `out`: for replicas, which `fill` does not read."""
        array: np.ndarray[Any, Any] = np.frombuffer(out, NUMPY[dtype]).reshape(row.box.extent)
        self._copy(row, array, Box.whole(row.box.extent), ITEM_BYTES[dtype], scratch)

    def array(self, name: str, box: Box | None = None) -> np.ndarray[Any, Any]:
        """A box (all by default) as an array of its own; 16-bit brain floats come as uint16."""
        tensor = self.checkpoint.tensors[name]
        box = box or Box.whole(tensor.shape)
        held = bytearray(box.numel * ITEM_BYTES[tensor.dtype])
        self.fill(name, box, memoryview(held), memoryview(bytearray(min(SCRATCH_BYTES, max(4096, 4 * len(held))))))
        return np.frombuffer(held, NUMPY[tensor.dtype]).reshape(box.extent)

    def _copy(self, row: Row, array: np.ndarray[Any, Any], at: Box, item: int, scratch: memoryview) -> None:
        here = array[tuple(slice(a, b) for a, b in zip(at.start, at.stop, strict=True))] if at.start else array

        def fetch(begin: int, into: memoryview) -> None:
            self._files.fetch(row.file, begin, into)

        strided.copy(fetch, row.begin, row.strides, row.box.extent, item, here, scratch)

    def close(self) -> None:
        """Close the files."""
        self._files.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def cuts(box: Box, item: int, window_bytes: int = WINDOW_BYTES) -> Iterator[tuple[int, Box]]:
    """(byte, box) pieces of a box in row-major order, none longer than a window; they begin at multiples of it, or continue such a one."""
    if box.numel * item <= window_bytes:
        if box.numel:
            yield 0, box
        return
    count = window_bytes // item
    for at in range(0, box.numel, count):
        begin = at * item
        for piece in flat_part(box, at, min(count, box.numel - at)):
            yield begin, piece
            begin += piece.numel * item


def flat_part(box: Box, first: int, count: int) -> list[Box]:
    """The boxes of `count` elements of a box, from element `first` of its row-major order on."""
    if count == box.numel:
        return [box]
    return [Box(tuple(a + b for a, b in zip(box.start, p.start, strict=True)), p.extent) for p in boxes_of_flat_range(box.extent, first, count)]


# --- what one thread has ----------------------------------------------------------------------------------------------------


class Lane(threading.local):
    """A thread's memory."""

    def __init__(self) -> None:
        self.buffer = memoryview(mmap.mmap(-1, BUFFER_BYTES + ALIGN_BYTES))  # whole pages of it can be written past the page cache
        self.second = memoryview(bytearray(2 * WINDOW_BYTES))  # a window before its cast is at most twice as large
        self.scratch = memoryview(bytearray(SCRATCH_BYTES))


class Pool:
    """Threads with bounded work under way; the first error ends all.

    A thread takes its next item itself and leaves the result in a queue: fewer hand-overs between threads than a future per item.
    """

    def __init__(self, workers: int) -> None:
        self.lane = Lane()
        self._workers = workers
        self._threads = ThreadPoolExecutor(workers, "ckptd-convert")
        self._closed = False

    def map(self, work: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[tuple[Any, Any]]:
        """(item, result) as they are done, in any order. `items` is iterated by the threads, one at a time."""
        source, taking = iter(items), threading.Lock()
        room = threading.Semaphore(4 * self._workers)  # a caller that is slow holds up the threads
        done: SimpleQueue[tuple[Any, Any] | BaseException | None] = SimpleQueue()
        stopped = False

        def loop() -> None:
            try:
                while True:
                    room.acquire()
                    with taking:
                        if stopped or self._closed:
                            return
                        try:
                            item = next(source)
                        except StopIteration:
                            return
                    done.put((item, work(item)))
            except BaseException as e:  # noqa: BLE001  raised by the caller's thread
                done.put(e)
            finally:
                room.release()
                done.put(None)

        under_way = [self._threads.submit(loop) for _ in range(self._workers)]
        try:
            left = len(under_way)
            while left:
                match done.get():
                    case None:
                        left -= 1
                    case BaseException() as e:
                        raise e
                    case pair:
                        room.release()
                        yield pair
        finally:
            stopped = True
            room.release(4 * self._workers)
            wait(under_way)  # nobody may still write to what the caller closes now

    def close(self) -> None:
        """Wait for the threads; what they have not begun is not done."""
        self._closed = True
        self._threads.shutdown(cancel_futures=True)


def workers_for(memory_bytes: int, workers: int | None) -> tuple[int, int]:
    """How many threads fit for the work, and how many beside it for comparing (perhaps none). Raises BadArgument where not even one does."""
    each = 3 * WINDOW_BYTES + SCRATCH_BYTES
    fits = (memory_bytes - BASE_BYTES) // each
    if fits < 1:
        msg = f"{memory_bytes >> 20} MiB are too few"
        raise BadArgument(msg, remedy=f"--memory of at least {(BASE_BYTES + each >> 20) + 1} MiB")
    wanted = workers or min(8, 2 * len(os.sched_getaffinity(0)))  # half of them wait for a disk
    beside = min((wanted + 1) // 2, int(fits) // 3)
    return int(min(fits - beside, wanted)), beside


# --- hashes, replicas, masters ----------------------------------------------------------------------------------------------


class Hash:
    """The hash of a tensor from those of its blocks, in any order."""

    def __init__(self) -> None:
        self.blocks: dict[int, bytes] = {}

    def hex(self) -> str:
        """Its text."""
        return xxhash.xxh3_128_hexdigest(b"".join(self.blocks[b] for b in sorted(self.blocks)))


def hashes(reading: Reading, pool: Pool, names: Iterable[str] | None = None, dtypes: Mapping[str, str] | None = None) -> dict[str, str]:
    """The hash of tensors (all by default), by name; of their values as another dtype where `dtypes` says so."""
    tensors = reading.checkpoint.tensors
    found = {name: Hash() for name in (tensors if names is None else names)}

    def blocks() -> Iterator[tuple[str, int, list[Box]]]:
        for name in found:
            tensor = tensors[name]
            item = ITEM_BYTES[(dtypes or {}).get(name, tensor.dtype)]
            count = WINDOW_BYTES // item
            box = Box.whole(tensor.shape)
            for number, at in enumerate(range(0, box.numel, count)):
                yield name, number, boxes_of_flat_range(tensor.shape, at, min(count, box.numel - at))

    def work(job: tuple[str, int, list[Box]]) -> bytes:
        name, _, boxes = job
        wanted = (dtypes or {}).get(name, tensors[name].dtype)
        lane, at = pool.lane, 0
        for box in boxes:
            size = box.numel * ITEM_BYTES[wanted]
            taken(reading, Take(name, box, wanted), lane.buffer[at : at + size], lane)
            at += size
        return xxhash.xxh3_128_digest(lane.buffer[:at])

    for (name, number, _), digest in pool.map(work, blocks()):
        found[name].blocks[number] = digest
    return {name: each.hex() for name, each in found.items()}


def taken(reading: Reading, take: Take, out: memoryview, lane: Lane) -> None:
    """A box in the dtype that is wanted, over all of `out`."""
    source = reading.stored(take.name, take.dtype).dtype
    if source == take.dtype:
        reading.fill(take.name, take.box, out, lane.scratch, take.dtype)
        return
    held = lane.second
    size = take.box.numel * ITEM_BYTES[source]
    if size > len(held):  # from 8 bytes to 1 or 2: rarer than worth a larger buffer
        held = memoryview(bytearray(size))
    reading.fill(take.name, take.box, held[:size], lane.scratch)
    cast_into(np.frombuffer(held[:size], NUMPY[source]), source, take.dtype, np.frombuffer(out, NUMPY[take.dtype]))


def _equal(one: memoryview, other: memoryview) -> bool:
    """Whether their bytes are the same. (Python's own comparison of memoryviews goes byte by byte, and holds the interpreter's lock.)"""
    words = len(one) // 8 * 8
    same = np.array_equal(np.frombuffer(one[:words], np.uint64), np.frombuffer(other[:words], np.uint64))
    return same and bytes(one[words:]) == bytes(other[words:])


def compare_replicas(reading: Reading, pool: Pool) -> int:
    """Read what is stored more than once, and compare. Returns its bytes; raises Divergent with tensor, box and file."""
    checkpoint = reading.checkpoint

    def jobs() -> Iterator[tuple[str, Row]]:
        for name, tensor in checkpoint.tensors.items():
            item = ITEM_BYTES[tensor.dtype]
            for row in tensor.replicas:
                for _, box in cuts(row.box, item):
                    yield name, row.part(box, item)

    def work(job: tuple[str, Row]) -> int:
        name, row = job
        lane, dtype = pool.lane, checkpoint.tensors[name].dtype
        size = row.box.numel * ITEM_BYTES[dtype]
        reading.row(row, dtype, lane.buffer[:size], lane.scratch)
        reading.fill(name, row.box, lane.second[:size], lane.scratch)
        if not _equal(lane.buffer[:size], lane.second[:size]):
            there = checkpoint.files[row.file].name if row.file >= 0 else "its objects"
            msg = f"{name}: {row.box} in {there} differs from its replica"
            raise Divergent(msg, remedy="ranks that should hold the same values did not: the checkpoint, or a rank that wrote it, is damaged")
        return size

    return sum(size for _, size in pool.map(work, jobs()))


def settle(reading: Reading, pool: Pool) -> Checkpoint:
    """Make one tensor of a 16-bit (or equal) weight and its fp32 master, where the weight is the master's rounding; leave both where it is not."""
    return settled_with(reading, differing(reading, pool))


def settled_with(reading: Reading, differing: Collection[str]) -> Checkpoint:
    """`settle`, where it is known which weights are not their masters' rounding."""
    checkpoint = reading.checkpoint
    tensors = checkpoint.tensors
    settled, derived = dict(tensors), dict(checkpoint.derived)
    for weight, master in checkpoint.pairs:
        if weight not in differing:
            derived[weight] = tensors[weight].dtype
            settled[weight] = settled.pop(master)
    notes = list(checkpoint.notes)
    if differing:
        some = ", ".join(sorted(differing)[:3])
        notes.append(f"{len(differing)} weights are not the rounding of their masters, so both are kept: {some}")
    order = {n: settled[n] for n in tensors if n in settled}
    scalars = _scalars(reading, settled)
    objects = _with_step(checkpoint.objects, scalars, notes)
    return replace(checkpoint, tensors=order, derived=derived, notes=notes, pairs=[], scalars=scalars, objects=objects)


def differing(reading: Reading, pool: Pool) -> set[str]:
    """The weights that are not the rounding of their masters."""
    tensors = reading.checkpoint.tensors
    found: set[str] = set()

    def jobs() -> Iterator[tuple[str, str, Box]]:
        for weight, master in reading.checkpoint.pairs:
            if tensors[weight].shape != tensors[master].shape or not can_cast(tensors[master].dtype, tensors[weight].dtype):
                found.add(weight)
                continue
            item = max(ITEM_BYTES[tensors[master].dtype], ITEM_BYTES[tensors[weight].dtype])
            for _, box in cuts(Box.whole(tensors[master].shape), item):
                yield weight, master, box

    def work(job: tuple[str, str, Box]) -> bool:
        weight, master, box = job
        if weight in found:
            return True
        lane, dtype = pool.lane, tensors[weight].dtype
        size = box.numel * ITEM_BYTES[dtype]
        rounded, weights = lane.buffer[:size], lane.buffer[WINDOW_BYTES // 2 :][:size]  # 16 bits: both fit, and `second` holds the master
        if size > WINDOW_BYTES // 2:
            weights = lane.second[:size] if dtype == tensors[master].dtype else memoryview(bytearray(size))
        reading.fill(weight, box, weights, lane.scratch)
        taken(reading, Take(master, box, dtype), rounded, lane)
        return _equal(weights, rounded)

    for (weight, _, _), same in pool.map(work, jobs()):
        if not same:
            found.add(weight)
    return found


def _with_step(objects: Mapping[str, Any], scalars: Mapping[str, float], notes: list[str]) -> dict[str, Any]:
    """Objects that say the step: if none does, it is that of the optimizer, where all its parameters took equally many."""
    steps = {v for n, v in scalars.items() if n.startswith(STATE) and n.endswith(".step")}
    if isinstance(objects.get("step"), int) or len(steps) != 1:
        return dict(objects)
    step = int(steps.pop())
    notes.append(f"the checkpoint does not say its step; its optimizer took {step}")
    return {**objects, "step": step}


def _scalars(reading: Reading, tensors: Mapping[str, Tensor]) -> dict[str, float]:
    """The values of tensors of one element."""
    small = [n for n, t in tensors.items() if prod(t.shape) == 1 and t.dtype in _NUMBERS and n in reading.checkpoint.tensors]
    return {n: cast(reading.array(n).reshape(-1), tensors[n].dtype, _NUMBERS[tensors[n].dtype])[0].item() for n in small}


_NUMBERS = {"F64": "F64", "F32": "F32", "F16": "F32", "BF16": "F32", "I64": "I64", "I32": "I32", "I16": "I16", "I8": "I8", "U8": "U8", "BOOL": "BOOL"}
"""Dtypes whose elements are numbers, and what they are read as."""


def open_checkpoint(source: str | Place, options: ReadOptions | None = None) -> tuple[Place, Format, Checkpoint]:
    """Recognise and read what lies at `source`, and prove its coverage. Raises as `Format.read` does."""
    place = place_of(source) if isinstance(source, str) else source
    found = recognise(place)
    checkpoint = found.read(place, options or ReadOptions())
    checkpoint.prove()
    return place, found, checkpoint
