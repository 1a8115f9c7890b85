"""`ckptd verify` of another system's checkpoint: coverage is proven, every byte of every row is read, copies are compared.

Most formats have no checksums, so this cannot tell a flipped byte from a trained one; what they do have (CRCs of zip entries) is looked at with --crc.
"""

from __future__ import annotations

import argparse
import io
import time
import zipfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ckptd import errors
from ckptd.cli import foreign, show
from ckptd.convert import MEMORY_BYTES, Progress
from ckptd.core.boxes import Box
from ckptd.core.cast import FLOATS, NUMPY
from ckptd.core.image import ITEM_BYTES
from ckptd.core.logical import Row
from ckptd.errors import BadForeign, CkptdError
from ckptd.formats import Place
from ckptd.reading import Pool, Reading, cuts, open_checkpoint, settle, workers_for

PROBLEMS_SHOWN = 50
NAMES_SHOWN = 8
_ZIP = b"PK\x03\x04"


@dataclass(frozen=True, slots=True)
class Trouble:
    """What is wrong with a tensor, or with a file ("" for the tensor)."""

    tensor: str
    error: str
    message: str
    file: str = ""


@dataclass(frozen=True, slots=True)
class _Job:
    """A box to be read; of a replica, the row that repeats it."""

    name: str
    box: Box
    again: Row | None = None


def run(args: argparse.Namespace) -> int:
    """Verify; the status is that of the first problem."""
    began_s = time.monotonic()
    place, found, checkpoint = open_checkpoint(args.path, foreign.read_options(args))
    line = foreign.Line(shown=not (args.json or args.quiet))
    pool = Pool(workers_for(MEMORY_BYTES, None)[0])
    try:
        with Reading(place, checkpoint) as reading:
            scan = _Scan(reading, pool)
            scan.read(line)
            notes = [*checkpoint.notes]
            if checkpoint.pairs and not scan.troubles:
                notes = settle(reading, pool).notes
        if args.crc:
            scan.troubles += _crcs(place, [h.name for h in checkpoint.files])
    finally:
        pool.close()
        line.end()
    took_s = time.monotonic() - began_s
    if args.json:
        show.emit_json(
            {
                "path": place.label,
                "format": found.name,
                "ok": not scan.troubles,
                "tensors": len(checkpoint.tensors),
                "bytes_read": scan.bytes_read,
                "bytes_compared": scan.bytes_compared,
                "elapsed_s": round(took_s, 3),
                "problems": [asdict(t) | {"exit_code": _exit_code(t)} for t in scan.troubles],
                "not_finite": sorted(scan.not_finite),
                "notes": notes,
            }
        )
    elif scan.troubles or not args.quiet:
        verdict = show.count(len(scan.troubles), "problem") if scan.troubles else "every tensor is covered once and can be read"
        compared = f", {show.size(scan.bytes_compared)} of copies compared" if scan.bytes_compared else ""
        rate = f"{scan.bytes_read / max(took_s, 1e-9) / 1e6:,.0f} MB/s"
        show.emit(f"{show.plain(place.label)}: {found.name}, {show.count(len(checkpoint.tensors), 'tensor')}, {show.size(scan.bytes_read)} read{compared}, {rate}: {verdict}")
        for t in scan.troubles[:PROBLEMS_SHOWN]:
            show.emit(f"  {show.plain(t.tensor or t.file)}: {t.error}: {show.plain(t.message)}")
        if len(scan.troubles) > PROBLEMS_SHOWN:
            show.emit(f"  ... and {len(scan.troubles) - PROBLEMS_SHOWN} more: --json lists all")
        if scan.not_finite:
            show.emit(f"  note: NaN or infinite values in {show.plain(show.some(sorted(scan.not_finite), NAMES_SHOWN))}")
        for note in notes:
            show.emit(f"  note: {show.plain(note)}")
    return _exit_code(scan.troubles[0]) if scan.troubles else 0


def _exit_code(trouble: Trouble) -> int:
    return int(getattr(errors, trouble.error, CkptdError).exit_code)


class _Scan:
    """Reads all, and goes on after a problem."""

    def __init__(self, reading: Reading, pool: Pool) -> None:
        self._reading, self._pool = reading, pool
        self.troubles: list[Trouble] = []
        self.not_finite: set[str] = set()
        self.bytes_read = self.bytes_compared = 0

    def read(self, line: foreign.Line) -> None:
        """Every box once, every replica against it."""
        tensors = self._reading.checkpoint.tensors
        total = sum(t.nbytes + sum(r.box.numel * ITEM_BYTES[t.dtype] for r in t.replicas) for t in tensors.values())
        began_s, done = time.monotonic(), 0
        known: set[tuple[str, str]] = set()
        for job, trouble in self._pool.map(self._one, self._jobs()):
            size = job.box.numel * ITEM_BYTES[tensors[job.name].dtype]
            done += size
            if job.again is None:
                self.bytes_read += size
            else:
                self.bytes_compared += size
            if trouble is not None and (trouble.tensor, trouble.error) not in known:  # one per tensor and kind says enough
                known.add((trouble.tensor, trouble.error))
                self.troubles.append(trouble)
            line(Progress("verify", done, total, time.monotonic() - began_s))

    def _jobs(self) -> Iterator[_Job]:
        for name, tensor in self._reading.checkpoint.tensors.items():
            item = ITEM_BYTES[tensor.dtype]
            for _, box in cuts(Box.whole(tensor.shape), item):
                yield _Job(name, box)
            for row in tensor.replicas:
                for _, box in cuts(row.box, item):
                    yield _Job(name, box, row)

    def _one(self, job: _Job) -> Trouble | None:
        """In a thread."""
        lane, dtype = self._pool.lane, self._reading.checkpoint.tensors[job.name].dtype
        item = ITEM_BYTES[dtype]
        size = job.box.numel * item
        try:
            held = lane.buffer[:size]
            self._reading.fill(job.name, job.box, held, lane.scratch)
            if job.again is None:
                if not _finite(held, dtype):
                    self.not_finite.add(job.name)
                return None
            self._reading.row(job.again.part(job.box, item), dtype, lane.second[:size], lane.scratch)
            if lane.second[:size] == held:
                return None
            file = self._reading.checkpoint.files[job.again.file].name if job.again.file >= 0 else "the objects"
            return Trouble(job.name, "Divergent", f"{job.box} in {file} is not what its first copy is")
        except CkptdError as e:
            return Trouble(job.name, type(e).__name__, e.message)
        except OSError as e:
            return Trouble(job.name, "StoreFailed", str(e))


def _finite(data: memoryview, dtype: str) -> bool:
    if dtype not in FLOATS:
        return True
    values: np.ndarray[Any, Any] = np.frombuffer(data, NUMPY[dtype])
    if dtype == "BF16":  # an exponent of ones is no number
        return not bool(((values & 0x7F80) == 0x7F80).any())
    return bool(np.isfinite(values).all())


# --- zip --------------------------------------------------------------------------------------------------------------------


class _Raw(io.RawIOBase):
    """A file of a place, for `zipfile`."""

    def __init__(self, place: Place, name: str) -> None:
        self._place, self._name, self._at = place, name, 0
        self._size = place.files[name]

    def readable(self) -> bool:
        """See RawIOBase."""
        return True

    def seekable(self) -> bool:
        """See RawIOBase."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """See RawIOBase."""
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        return self._at

    def tell(self) -> int:
        """See RawIOBase."""
        return self._at

    def readinto(self, into: Any) -> int:
        """See RawIOBase."""
        view = memoryview(into).cast("B")
        view = view[: max(0, min(len(view), self._size - self._at))]
        if len(view):
            self._place.store.get(self._place.full(self._name), self._at, view)
        self._at += len(view)
        return len(view)


def _crcs(place: Place, names: list[str]) -> list[Trouble]:
    """Entries of zip files whose bytes do not match their CRC-32."""
    found = []
    for name in names:
        if place.files.get(name, 0) < 4 or place.read(name, 0, 4) != _ZIP:
            continue
        try:
            with zipfile.ZipFile(io.BufferedReader(_Raw(place, name), 1 << 20)) as archive:
                bad = archive.testzip()
        except (zipfile.BadZipFile, ValueError, NotImplementedError, EOFError) as e:
            found.append(Trouble("", BadForeign.__name__, f"the zip archive cannot be read: {e}", name))
            continue
        if bad is not None:
            found.append(Trouble("", errors.ChecksumMismatch.__name__, f"entry {bad} does not match its CRC-32", name))
    return found
