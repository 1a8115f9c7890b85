"""Conversion: any checkpoint that a format reads, into any format that writes, in bounded memory.

    source files -> Checkpoint (boxes) -> proof of coverage -> Plan (files) -> windows -> target, under a temporary name -> rename

A *window* is at most WINDOW_BYTES of one target file: known bytes, and boxes of tensors that are fetched, cast and laid down. Windows are independent:
`workers` threads fill them, each with a buffer and scratch memory of its own, which is all the memory that tensors ever take. CRCs and hashes are of
windows and joined at the end, so that no file is written twice. What is stored more than once is compared beside that, by other threads.

Invariants
- nothing appears under the target's name before every byte is written, synced, compared where the source has it twice, and (with `check`) read back through the target's own reader;
- every element comes from exactly one row (`Checkpoint.prove`), replicas are compared, and what the target does not hold is named;
- the hash of every logical tensor is recorded in `ckptd-convert.json`: xxh3-128 over the xxh3-128 of each 4 MiB of its row-major bytes;
- a run that was killed is taken up again: files that are complete and whose source and plan are the same are not written twice;
- nothing of the source is executed, and nothing is written outside the target.
"""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import closing
from dataclasses import dataclass
from typing import Self

import xxhash

from ckptd import __version__
from ckptd.core.cast import can_cast
from ckptd.core.crc import crc32
from ckptd.core.emit import Known, OutFile, Sealed, Take
from ckptd.core.image import ITEM_BYTES
from ckptd.core.logical import Checkpoint, Tensor
from ckptd.errors import BadBytes, CkptdError, Divergent, StoreFailed, Unstorable
from ckptd.formats import Place, Plan, ReadOptions, WriteOptions, format_named
from ckptd.reading import (
    BUFFER_BYTES,
    WINDOW_BYTES,
    Hash,
    Pool,
    Reading,
    compare_replicas,
    differing,
    hashes,
    open_checkpoint,
    settle,
    settled_with,
    taken,
    workers_for,
)
from ckptd.storage.direct import ALIGN_BYTES
from ckptd.target import File, Target
from ckptd.windows import Sums, Window, flat, windows

__all__ = ["MEMORY_BYTES", "Progress", "Report", "convert", "report_text"]

MEMORY_BYTES = 1 << 30


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a conversion is. `phase`: "verify", "compare", "write", "check"; bytes of the phase; seconds since it began."""

    phase: str
    done_bytes: int
    total_bytes: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Report:
    """What was done. `hashes`: tensor -> (dtype, hash). `resumed_bytes`: found complete from an earlier run."""

    source: str
    target: str
    source_format: str
    target_format: str
    tensors: int
    read_bytes: int
    written_bytes: int
    resumed_bytes: int
    seconds: float
    hashes: Mapping[str, tuple[str, str]]
    dropped: Sequence[str]
    notes: Sequence[str]
    checked: bool


def convert(  # noqa: PLR0913  one call does it all, and every setting has a name
    source: str,
    target: str,
    to: str,
    *,
    read: ReadOptions | None = None,
    write: WriteOptions | None = None,
    view: Callable[[Checkpoint], Checkpoint] | None = None,
    memory_bytes: int = MEMORY_BYTES,
    workers: int | None = None,
    verify: bool = True,
    check: bool = False,
    sync: bool = True,
    progress: Callable[[Progress], None] | None = None,
) -> Report:
    """Write what lies at `source` to `target` (a path or URL that is free) in the format named `to`.

    `view`: changes names and shapes on the way (`core.views`). `verify`: where the source has checksums of its own, compare them first.
    `check`: read the result back and compare every tensor's hash. `sync`: fsync before the target gets its name. `progress` is called from this thread, a few times a second.

    Raises: BadForeign, NotTiled, Divergent, Unstorable, BadArgument, NotFound, StoreFailed, ChecksumMismatch.
    """
    began = time.monotonic()
    write = write or WriteOptions()
    writer = format_named(to)
    place, found, checkpoint = open_checkpoint(source, read)
    tell = _Teller(progress)
    with _Comparing(Reading(place, checkpoint), memory_bytes, workers) as comparing, closing(Pool(comparing.left)) as pool:
        prove_bytes = getattr(found, "prove_bytes", None)
        if verify and prove_bytes is not None:
            prove_bytes(place, read or ReadOptions(), tell.at)
        tell.begin("compare", sum(r.box.numel * ITEM_BYTES[t.dtype] for t in checkpoint.tensors.values() for r in t.replicas))

        def attempt(other: Collection[str]) -> Report:
            """All of it, if these weights are not their masters' rounding. Raises _RefutedError if the comparison says otherwise; nothing is left then, whatever was raised."""
            checkpoint, roundings, plan = _planned(comparing.reading, other, view, lambda c: writer.write(c, write))
            to_hash = _written(checkpoint, plan)
            mark = _fingerprint(place, to, checkpoint, plan, write)
            comparing.begin()  # not before: planning is one thread's work, and others would take its interpreter
            with Reading(place, checkpoint, roundings) as reading, closing(Target(target, single=plan.single, fingerprint=mark, sync=sync)) as out:
                try:
                    written, resumed, made = _write(plan.files, out, reading, pool, to_hash, tell, lambda: comparing.allow(other))
                    if plan.finish is not None:
                        more, _, _ = _write(plan.finish(out.place()), out, reading, pool, {}, tell, lambda: comparing.allow(other))
                        written += more
                    comparing.allow(other, until_the_end=True)
                    missing = {n: d for n, d in to_hash.items() if n not in made}
                    made |= hashes(reading, pool, missing, to_hash)
                    if check:
                        try:
                            _check(writer.read(out.place(), ReadOptions()), out, plan, (checkpoint, made, to_hash), pool, tell)
                        except BadBytes:
                            out.discard()
                            raise
                    report = Report(
                        place.label, target, found.name, to, len(checkpoint.tensors), reading.bytes_read, written, resumed, time.monotonic() - began,
                        {n: (to_hash[n], made[n]) for n in sorted(made)}, list(plan.dropped), [*checkpoint.notes, *plan.notes], check,
                    )  # fmt: skip
                    out.publish(report_text(report))
                    return report
                finally:
                    if comparing.refutes(other):
                        out.discard()  # also after an error: it is of no use to the next run

        usual: Collection[str] = () if view is None else comparing.outcome()  # a view may change what it is given: it is asked once, when the outcome is known
        try:
            return attempt(usual)
        except (CkptdError, _RefutedError):
            if not comparing.refutes(usual, until_the_end=True):
                raise
        return attempt(comparing.outcome())


class _RefutedError(Exception):
    """What was assumed of the source's weights is not so."""


class _Comparing:
    """What is stored twice is compared beside planning and writing, by threads of its own: nothing gets its name before they have ended.

    The outcome is nearly always the same, that all weights are their masters' rounding; a conversion that assumed it is begun anew where it is not.
    """

    def __init__(self, reading: Reading, memory_bytes: int, workers: int | None) -> None:
        """`left`: how many threads may write. Raises BadArgument where the memory is too small for one."""
        self.reading = reading
        self.left, beside = workers_for(memory_bytes, workers)
        self._first = not beside
        self._pool = Pool(beside or 1)
        self._thread = ThreadPoolExecutor(1, "ckptd-compare")
        self._outcome: Future[set[str]] | None = None

    def begin(self) -> Future[set[str]]:
        """Compare, if that has not begun; to the end, where the memory is too small for writing beside."""
        if self._outcome is None:
            self._outcome = self._thread.submit(self._compared)
            if self._first:
                wait([self._outcome])
                self._pool.close()
        return self._outcome

    def _compared(self) -> set[str]:
        compare_replicas(self.reading, self._pool)
        return differing(self.reading, self._pool)

    def outcome(self) -> set[str]:
        """The weights that are not their masters' rounding. Waits. Raises Divergent, and what reading raises."""
        return self.begin().result()

    def refutes(self, other: Collection[str], *, until_the_end: bool = False) -> bool:
        """Whether the outcome is known to be another, an error perhaps; `until_the_end`: whether it is."""
        if not until_the_end and (self._outcome is None or not self._outcome.done()):
            return False
        outcome = self.begin()
        return outcome.exception() is not None or outcome.result() != {*other}

    def allow(self, other: Collection[str], *, until_the_end: bool = False) -> None:
        """Raise _RefutedError where that is refuted."""
        if self.refutes(other, until_the_end=until_the_end):
            raise _RefutedError

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.close()  # else an interrupted conversion would compare to the end
        self._thread.shutdown()
        self.reading.close()


def _planned(
    source: Reading, other: Collection[str], view: Callable[[Checkpoint], Checkpoint] | None, write: Callable[[Checkpoint], Plan]
) -> tuple[Checkpoint, Mapping[str, Tensor], Plan]:
    """What is to be written, its tensors that the source has in 16 bits too, and the plan. `other`: weights that are not their masters' rounding."""
    checkpoint = settled_with(source, other)
    roundings = {w: source.checkpoint.tensors[w] for w, _ in source.checkpoint.pairs if w not in other}
    if view is not None:
        checkpoint, roundings = view(checkpoint), {}
        checkpoint.prove()
    return checkpoint, roundings, write(checkpoint)


def report_text(report: Report) -> bytes:
    """What stands in `ckptd-convert.json`."""
    body = {
        "ckptd": __version__,
        "source": report.source, "from": report.source_format, "to": report.target_format,
        "hash": f"xxh3-128 of the xxh3-128 of each {WINDOW_BYTES} bytes, row-major",
        "dropped": list(report.dropped), "notes": list(report.notes), "checked": report.checked,
    }  # fmt: skip
    tensors = ",\n".join(f"  {json.dumps(n)}: {json.dumps({'dtype': d, 'hash': h})}" for n, (d, h) in report.hashes.items())  # with `indent` it is Python that encodes
    return f'{json.dumps(body, indent=1)[:-2]},\n "tensors": {{\n{tensors}\n }}\n}}\n'.encode()


def _written(checkpoint: Checkpoint, plan: Plan) -> dict[str, str]:
    """tensor -> dtype in which the target holds it: its own if any file does, else the one that it is cast to."""
    found: dict[str, str] = {}
    for file in plan.files:
        for segment, _ in flat(file.segments):
            if isinstance(segment, Take):
                tensor = checkpoint.tensors.get(segment.name)
                if tensor is None or not segment.box.inside(tensor.shape):
                    msg = f"{segment.name}: the plan takes {segment.box}, which is not there"
                    raise Unstorable(msg)
                if not can_cast(tensor.dtype, segment.dtype):
                    msg = f"{segment.name}: {tensor.dtype} cannot be stored as {segment.dtype}"
                    raise Unstorable(msg)
                if found.get(segment.name) != tensor.dtype:
                    found[segment.name] = segment.dtype
    forgotten = sorted(checkpoint.tensors.keys() - found.keys() - {*plan.dropped} - {*plan.inlined})
    if forgotten:
        msg = f"{forgotten[0]} and {len(forgotten) - 1} more are in no file of the target" if forgotten[1:] else f"{forgotten[0]} is in no file of the target"
        raise Unstorable(msg, remedy="this format has no place for it: --drop what is not needed, or choose another format")
    return found


def _fingerprint(place: Place, to: str, checkpoint: Checkpoint, plan: Plan, options: WriteOptions) -> str:
    """What must be the same for files of an earlier run to be used: source files and their times, names, sizes and parts of the target's."""
    sums = hashlib.sha256(f"{__version__} {place.label} {to} {sorted(options.drop)}".encode())
    for held in checkpoint.files:
        path = place.path(held.name)
        moved = path.stat().st_mtime_ns if path is not None else 0
        sums.update(f"{held.name} {held.bytes} {moved}\n".encode())
    for file in plan.files:
        sums.update(f"{file.name} {file.nbytes}\n".encode())
        for segment, _ in flat(file.segments):
            if isinstance(segment, Known):
                sums.update(b"%d " % len(segment.data) + segment.data)
            elif isinstance(segment, Take):
                sums.update(repr(segment).encode())
    return sums.hexdigest()


class _Writing:
    """Files being filled: what is open, what is left of each, and what was summed."""

    def __init__(self, files: Sequence[OutFile], out: Target, hashed: Mapping[str, str]) -> None:
        """`hashed`: tensor -> dtype, for those whose hash is made on the way."""
        self._files = files
        self._out = out
        self._hashed = hashed
        self._open: dict[int, File] = {}
        self._left: dict[int, int] = {}
        self._sums: dict[int, Sums] = {}
        self._sizes = [f.nbytes for f in files]
        self._small = [0 < n <= BUFFER_BYTES for n in self._sizes]  # one window is all of it: its thread does everything
        self._lock = threading.Lock()  # `windows` is iterated by the threads, `filled` is called beside them
        self.hashes: dict[str, Hash] = {}

    def windows(self) -> Iterator[Window]:
        """All windows, file by file; a file is made when its first one is asked for."""
        for number, file in enumerate(self._files):
            if not self._small[number]:
                self._open[number] = self._out.open(file.name, self._sizes[number])
            self._sums[number] = Sums()
            self._left[number] = 1  # more are to come
            for window in windows(number, file, self._hashed):
                with self._lock:
                    self._left[number] += 1
                yield window
            self._one_less(number)

    def fill(self, window: Window, reading: Reading, pool: Pool) -> tuple[list[tuple[str, int, int, int]], list[bytes]]:
        """In a thread: the window's bytes, to its place. Returns CRCs (mark, place, CRC, bytes) and the hashes of its blocks."""
        lane = pool.lane
        buffer = lane.buffer[window.begin % ALIGN_BYTES :]  # as it lies in the file: whole pages need not be copied to be written
        for piece in window.pieces:
            here = buffer[piece.at : piece.at + piece.nbytes]
            if piece.take is not None:
                taken(reading, piece.take, here, lane)
            else:
                here[:] = piece.data if piece.data is not None else bytes(piece.nbytes)
        crcs = [(mark, window.begin + at, crc32(buffer[at : at + size]), size) for mark, at, size in window.marks]
        if self._small[window.file]:
            for at, data in self._sealed(window.file, {mark: crc for mark, _, crc, _ in crcs}):
                buffer[at : at + len(data)] = data
            self._open[window.file] = self._out.open(self._files[window.file].name, window.nbytes, whole=True)
        self._open[window.file].write(buffer[: window.nbytes], window.begin)
        return crcs, [xxhash.xxh3_128_digest(buffer[at : at + size]) for _, _, at, size in window.blocks]

    def filled(self, window: Window, crcs: list[tuple[str, int, int, int]], digests: list[bytes]) -> None:
        """A window is done; with the last one of a file, the file is."""
        for mark, at, crc, size in crcs:
            self._sums[window.file].parts.setdefault(mark, []).append((at, crc, size))
        for (name, block, _, _), digest in zip(window.blocks, digests, strict=True):
            self.hashes.setdefault(name, Hash()).blocks[block] = digest
        self._one_less(window.file)

    def _one_less(self, number: int) -> None:
        with self._lock:
            self._left[number] -= 1
            if self._left[number]:
                return
        sums, name, size = self._sums.pop(number), self._files[number].name, self._sizes[number]
        if not self._small[number]:
            for at, data in self._sealed(number, sums.joined()):
                self._open[number].write(data, at)
        self._out.done(name, self._open.pop(number), size)

    def _sealed(self, number: int, crcs: Mapping[str, int]) -> Iterator[tuple[int, bytes]]:
        """(place, bytes) of what follows from the CRCs."""
        at, known = 0, _Default(crcs)
        for segment in self._files[number].segments:
            if isinstance(segment, Sealed):
                yield at, segment.make(known)
            at += segment.nbytes

    def close(self) -> None:
        """Close what an error left open."""
        for file in self._open.values():
            file.close()


def _write(
    files: Sequence[OutFile], out: Target, reading: Reading, pool: Pool, to_hash: Mapping[str, str], tell: _Teller, allow: Callable[[], None]
) -> tuple[int, int, dict[str, str]]:
    """Fill the files. Returns bytes written, bytes that were there, and the hashes that were made on the way. Raises StoreFailed, and what `allow` raises between windows."""
    todo = [f for f in files if out.resumed.get(f.name) != f.nbytes]
    writing = _Writing(todo, out, _whole(reading.checkpoint, todo, to_hash))
    total = sum(f.nbytes for f in todo)
    tell.begin("write", total)
    try:
        for window, (crcs, digests) in pool.map(lambda w: writing.fill(w, reading, pool), writing.windows()):
            writing.filled(window, crcs, digests)
            tell.more(window.nbytes)
            allow()
        out.settle()
    except OSError as e:
        msg = f"{out.work} cannot be written: {e.strerror}"
        raise StoreFailed(msg, remedy="free some room and run the same command again: complete files are kept") from e
    finally:
        writing.close()
    return total, sum(f.nbytes for f in files) - total, {n: h.hex() for n, h in writing.hashes.items()}


class _Default(dict[str, int]):
    """CRCs; an entry without bytes has none that was counted: it is zero."""

    def __missing__(self, key: str) -> int:
        return 0


def _whole(checkpoint: Checkpoint, files: Sequence[OutFile], to_hash: Mapping[str, str]) -> dict[str, str]:
    """tensor -> dtype, of those that the files hold whole, in the dtype of their hash, exactly once."""
    count: dict[str, int] = {}
    for file in files:
        for segment, _ in flat(file.segments):
            if isinstance(segment, Take) and segment.dtype == to_hash.get(segment.name):
                is_whole = segment.box.extent == checkpoint.tensors[segment.name].shape
                count[segment.name] = count.get(segment.name, 0) + (1 if is_whole else 2)
    return {name: to_hash[name] for name, n in count.items() if n == 1}


def _check(
    result: Checkpoint, out: Target, plan: Plan, written: tuple[Checkpoint, Mapping[str, str], Mapping[str, str]], pool: Pool, tell: _Teller
) -> None:
    """Compare every tensor of `result`, the target as its own reader sees it, with what was written: (source, hashes, dtypes). Raises Divergent, by name."""
    source, made, dtypes = written
    place = out.place()
    result.prove()
    tell.begin("check", result.nbytes)
    with Reading(place, result) as first:
        compare_replicas(first, pool)
        settled = settle(first, pool)
    with Reading(place, settled) as back:
        called = {n: plan.renamed.get(n, n) for n in (*made, *plan.inlined)}
        names = {n: settled.aliases.get(c, c) for n, c in called.items()}
        missing = sorted(n for n, held in names.items() if held not in settled.tensors)
        if missing:
            msg = f"read back, {missing[0]} and {len(missing) - 1} more are missing" if len(missing) > 1 else f"read back, {missing[0]} is missing"
            raise Divergent(msg)
        again = hashes(back, pool, {names[n] for n in made}, {names[n]: dtypes[n] for n in made})
    wrong = sorted(n for n in made if again[names[n]] != made[n])
    wrong += sorted(n for n in plan.inlined if repr(settled.scalars.get(names[n])) != repr(source.scalars.get(n)))  # repr: NaN is NaN
    if wrong:
        msg = f"{wrong[0]}: read back, it is not what was written" + (f"; {len(wrong) - 1} more" if len(wrong) > 1 else "")
        raise Divergent(msg, remedy="run it again; if it stays, the target's disk or ckptd is at fault: please report it")


class _Teller:
    """Progress, a few times a second."""

    def __init__(self, progress: Callable[[Progress], None] | None) -> None:
        self._progress = progress
        self._phase, self._done, self._total = "", 0, 0
        self._began = self._told = time.monotonic()

    def begin(self, phase: str, total: int) -> None:
        self._phase, self._done, self._total = phase, 0, total
        self._began = self._told = time.monotonic()
        self._tell()

    def at(self, done: int, total: int) -> None:
        """The source's checksums are compared."""
        if self._phase != "verify":
            self.begin("verify", total)
        self.more(done - self._done)

    def more(self, nbytes: int) -> None:
        self._done += nbytes
        now = time.monotonic()
        if now - self._told > 0.2 or self._done >= self._total:
            self._told = now
            self._tell()

    def _tell(self) -> None:
        if self._progress:
            self._progress(Progress(self._phase, self._done, self._total, time.monotonic() - self._began))
