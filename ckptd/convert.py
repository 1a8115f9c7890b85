"""Conversion: any checkpoint that a format reads, into any format that writes, in bounded memory.

    source files -> Checkpoint (boxes) -> proof of coverage -> Plan (files) -> windows -> target, under a temporary name -> rename

A *window* is at most WINDOW_BYTES of one target file: known bytes, and boxes of tensors that are fetched, cast and laid down. Windows are independent:
`workers` threads fill them, each with a buffer and scratch memory of its own, which is all the memory that tensors ever take. CRCs and hashes are of
windows and joined at the end, so that no file is written twice.

Invariants
- nothing appears under the target's name before every byte is written, synced and (with `check`) read back through the target's own reader;
- every element comes from exactly one row (`Checkpoint.prove`), replicas are compared, and what the target does not hold is named;
- the hash of every logical tensor is recorded in `ckptd-convert.json`: xxh3-128 over the xxh3-128 of each 4 MiB of its row-major bytes;
- a run that was killed is taken up again: files that are complete and whose source and plan are the same are not written twice;
- nothing of the source is executed, and nothing is written outside the target.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

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
from ckptd.target import Target, write_at
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
    pool = Pool(workers_for(memory_bytes, workers))
    tell = _Teller(progress)
    reading = Reading(place, checkpoint)
    out: Target | None = None
    try:
        prove_bytes = getattr(found, "prove_bytes", None)
        if verify and prove_bytes is not None:
            prove_bytes(place, read or ReadOptions(), tell.at)
        tell.begin("compare", sum(r.box.numel * ITEM_BYTES[t.dtype] for t in checkpoint.tensors.values() for r in t.replicas))
        checkpoint, roundings, plan, to_hash = _planned(reading, pool, view, lambda c: writer.write(c, write))
        reading.close()
        reading = Reading(place, checkpoint, roundings)
        mark = _fingerprint(place, to, checkpoint, plan, write)
        out = Target(target, single=plan.single, fingerprint=mark, sync=sync)
        written, resumed, made = _write(plan.files, out, reading, pool, to_hash, tell)
        if plan.finish is not None:
            more, _, _ = _write(plan.finish(out.place()), out, reading, pool, {}, tell)
            written += more
        missing = {n: d for n, d in to_hash.items() if n not in made}
        made |= hashes(reading, pool, missing, to_hash)
        if check:
            try:
                _check(writer.read(out.place(), ReadOptions()), out, plan, (checkpoint, made, to_hash), pool, tell)
            except BadBytes:
                out.discard()
                raise
        notes = [*checkpoint.notes, *plan.notes]
        report = Report(
            place.label, target, found.name, to, len(checkpoint.tensors), reading.bytes_read, written, resumed, time.monotonic() - began,
            {n: (to_hash[n], made[n]) for n in sorted(made)}, list(plan.dropped), notes, check,
        )  # fmt: skip
        out.publish(report_text(report))
        return report
    finally:
        pool.close()
        reading.close()
        if out is not None:
            out.close()


def _planned(
    reading: Reading, pool: Pool, view: Callable[[Checkpoint], Checkpoint] | None, write: Callable[[Checkpoint], Plan]
) -> tuple[Checkpoint, Mapping[str, Tensor], Plan, dict[str, str]]:
    """Compare what is stored twice; (what is to be written, its tensors that the source has in 16 bits too, the plan, tensor -> dtype in the target).

    Threads compare while this one plans for the usual outcome, that all weights are their masters' rounding. Nothing is written before they have ended.
    A view may change what it is given, so it is asked once, when the outcome is known.
    """
    source = reading.checkpoint

    def compared() -> set[str]:
        compare_replicas(reading, pool)
        return differing(reading, pool)

    def planned(other: Collection[str]) -> tuple[Checkpoint, Mapping[str, Tensor], Plan, dict[str, str]]:
        checkpoint = settled_with(reading, other)
        roundings = {w: source.tensors[w] for w, _ in source.pairs if w not in other}
        if view is not None:
            checkpoint, roundings = view(checkpoint), {}
            checkpoint.prove()
        plan = write(checkpoint)
        return checkpoint, roundings, plan, _written(checkpoint, plan)

    if view is not None:
        return planned(compared())
    with ThreadPoolExecutor(1, "ckptd-compare") as beside:
        comparing = beside.submit(compared)
        try:
            try:
                guess = planned(())
            except CkptdError:
                if not comparing.result():
                    raise
            other = comparing.result()
        except BaseException:
            pool.close()  # else an interrupted conversion would compare to the end
            raise
    return planned(other) if other else guess


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
        self._fds: dict[int, int] = {}
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
                self._fds[number] = self._out.open(file.name, self._sizes[number])
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
        for piece in window.pieces:
            here = lane.buffer[piece.at : piece.at + piece.nbytes]
            if piece.take is not None:
                taken(reading, piece.take, here, lane)
            else:
                here[:] = piece.data if piece.data is not None else bytes(piece.nbytes)
        crcs = [(mark, window.begin + at, crc32(lane.buffer[at : at + size]), size) for mark, at, size in window.marks]
        if self._small[window.file]:
            for at, data in self._sealed(window.file, {mark: crc for mark, _, crc, _ in crcs}):
                lane.buffer[at : at + len(data)] = data
            self._out.put(self._files[window.file].name, lane.buffer[: window.nbytes])
        else:
            write_at(self._fds[window.file], lane.buffer[: window.nbytes], window.begin)
        return crcs, [xxhash.xxh3_128_digest(lane.buffer[at : at + size]) for _, _, at, size in window.blocks]

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
        if self._small[number]:
            self._out.remember(name, size)
            return
        for at, data in self._sealed(number, sums.joined()):
            write_at(self._fds[number], data, at)
        self._out.done(name, self._fds.pop(number), size)

    def _sealed(self, number: int, crcs: Mapping[str, int]) -> Iterator[tuple[int, bytes]]:
        """(place, bytes) of what follows from the CRCs."""
        at, known = 0, _Default(crcs)
        for segment in self._files[number].segments:
            if isinstance(segment, Sealed):
                yield at, segment.make(known)
            at += segment.nbytes

    def close(self) -> None:
        """Close what an error left open."""
        for fd in self._fds.values():
            os.close(fd)


def _write(
    files: Sequence[OutFile], out: Target, reading: Reading, pool: Pool, to_hash: Mapping[str, str], tell: _Teller
) -> tuple[int, int, dict[str, str]]:
    """Fill the files. Returns bytes written, bytes that were there, and the hashes that were made on the way."""
    todo = [f for f in files if out.resumed.get(f.name) != f.nbytes]
    writing = _Writing(todo, out, _whole(reading.checkpoint, todo, to_hash))
    total = sum(f.nbytes for f in todo)
    tell.begin("write", total)
    try:
        for window, (crcs, digests) in pool.map(lambda w: writing.fill(w, reading, pool), writing.windows()):
            writing.filled(window, crcs, digests)
            tell.more(window.nbytes)
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
