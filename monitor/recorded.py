"""A recorded run: everything that an engine was told, in order, so that the same engine says the same again.

    name      run-<job>-<attempt>-<when>-<part>.ckptdrec
    file      MAGIC, then chunks: u32 length, that many bytes: a zstd frame of values, each a u32 length and msgpack
    first value   Header: whose run, how large, which part
    others        Entry: what the engine was told at `now_s`: a report, a finding of others, or nothing (a tick)

Every part begins with a Header, so any suffix of a run can be read. A chunk is whole or it is not there: what a crash cuts off is the last chunk.
Reports hold durations, counts and names of ranks and hosts: no data, no state, no stacks but those that a verdict asked for.

Threads: `Writer.write` from any, returns at once; chunks are compressed and written by a thread of the writer's own. Reading is bounded: a chunk is at most
CHUNK_BYTES_MAX when unpacked, whatever it claims.
"""

from __future__ import annotations

import os
import re
import struct
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import zstandard

from ckptd.errors import BadArgument, BadForeign, NewerFormat, NotFound
from ckptd.monitor import events, record
from ckptd.monitor.engine import Ask, Concluded, Engine
from ckptd.monitor.report import Finding, Report, Verdict
from ckptd.monitor.settings import Settings

MAGIC = b"CKPTDREC"
VERSION = 1
SUFFIX = ".ckptdrec"
CHUNK_BYTES = 256 << 10
CHUNK_BYTES_MAX = 32 << 20
"""Of a chunk, unpacked: one report is at most 8 MiB or so."""
CHUNK_S = 5.0
PARTS = 8
BYTES_MAX = 256 << 20
QUEUE_MAX = 4096
LEVEL = 3
STEPS_SHOWN = 20_000

_NAME = re.compile(rf"run-.*-\d+-\d+-(\d+)\{SUFFIX}")


class Header(msgspec.Struct, frozen=True, kw_only=True):
    """First of each part. `settings`: what the engine was told besides defaults."""

    version: int = VERSION
    job: str
    attempt: int
    world_size: int
    nodes: int
    part: int = 0
    began_s: float = 0.0
    settings: dict[str, Any] = {}


class Entry(msgspec.Struct, frozen=True, array_like=True):
    """What an engine was told. `now_s`: the coordinator's monotonic clock; `wall_s`: since the epoch. Nothing else: time passed (a tick)."""

    now_s: float
    wall_s: float
    report: Report | None = None
    finding: Finding | None = None
    acted: tuple[int, str] | None = None
    """What was done about a verdict: its number, the action."""


class Writer(events.Outbox):
    """Records a run into `directory`, in at most `bytes_max` bytes: the oldest part goes when a new one has no room.

    What the disk is too slow for is dropped and counted (`status`). Raises BadArgument if the directory cannot be written.
    """

    def __init__(self, directory: str | Path, header: Header, bytes_max: int = BYTES_MAX) -> None:
        super().__init__(f"recording to {directory}", QUEUE_MAX)
        self._directory, self._part_bytes = Path(directory), max(bytes_max // PARTS, CHUNK_BYTES)
        safe = re.sub(r"[^A-Za-z0-9._]", "_", header.job)[:64]
        self._stem = f"run-{safe}-{header.attempt}-{time.time_ns() // 1_000_000}"
        self._header = header
        self._parts: list[Path] = []
        self._buffer: list[bytes] = []
        self._buffered = self._size = 0
        self._flushed_s = time.monotonic()
        try:
            self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._next_part()
        except OSError as e:
            msg = f"cannot record to {directory}: {e.strerror}"
            raise BadArgument(msg, remedy="give a directory that the daemon may write") from e

    def write(
        self, now_s: float, wall_s: float, *, report: Report | None = None, finding: Finding | None = None, acted: tuple[int, str] | None = None
    ) -> None:
        """Record that the engine was told this, and only this, at that time."""
        self.put({"entry": Entry(now_s, wall_s, report, finding, acted)})

    def close(self, timeout_s: float = 5.0) -> None:
        """Write what is left."""
        super().close(timeout_s)
        if self._thread is None or not self._thread.is_alive():
            self._write_chunk()

    def _encode(self, event: events.Event) -> bytes:
        return _framed(event["entry"])

    def _deliver(self, line: bytes) -> None:
        self._buffer.append(line)
        self._buffered += len(line)
        if self._buffered >= CHUNK_BYTES or time.monotonic() - self._flushed_s >= CHUNK_S:
            self._write_chunk()

    def _write_chunk(self) -> None:
        buffer, self._buffer, self._buffered = self._buffer, [], 0
        self._flushed_s = time.monotonic()
        if buffer:
            if self._size >= self._part_bytes:
                self._next_part()
            self._append(buffer)

    def _append(self, values: list[bytes]) -> None:
        packed = zstandard.ZstdCompressor(level=LEVEL, write_checksum=True).compress(b"".join(values))
        data = struct.pack("<I", len(packed)) + packed
        fd = os.open(self._parts[-1], os.O_WRONLY | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            if os.write(fd, data) != len(data):
                os.ftruncate(fd, self._size)
                msg = "no space for a recorded chunk"
                raise OSError(msg)
        finally:
            os.close(fd)
        self._size += len(data)

    def _next_part(self) -> None:
        number = int(_number(self._parts[-1])) + 1 if self._parts else 0
        path = self._directory / f"{self._stem}-{number:05d}{SUFFIX}"
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        os.write(fd, MAGIC)
        os.close(fd)
        self._parts.append(path)
        self._size = len(MAGIC)
        self._append([_framed(msgspec.structs.replace(self._header, part=number))])
        while len(self._parts) > PARTS:
            self._parts.pop(0).unlink(missing_ok=True)


def _framed(value: Header | Entry) -> bytes:
    data = msgspec.msgpack.encode(value)
    return len(data).to_bytes(4, "little") + data


# --- reading ----------------------------------------------------------------------------------------------------------------


def _number(path: Path) -> str:
    match = _NAME.fullmatch(path.name)
    return match[1] if match else "0"


def find(path: Path) -> list[list[Path]]:
    """Recorded runs at a path (a part, or a directory of them): the parts of each, in order."""
    paths = sorted(p for p in ([path] if path.is_file() else path.iterdir()) if p.name.endswith(SUFFIX))
    runs: dict[str, list[Path]] = {}
    for part in paths:
        runs.setdefault(part.name.rpartition("-")[0], []).append(part)
    return [sorted(parts, key=_number) for parts in runs.values()]


def read(parts: list[Path]) -> Iterator[Header | Entry]:
    """The header of the first part, then all entries. A chunk that a crash cut off ends its part. Raises BadForeign, NewerFormat, NotFound."""
    told = False
    for path in parts:
        values = _values(path)
        first = next(values, None)
        if first is None:
            continue  # cut off in its first chunk
        header = _as(path, first, Header)
        if header.version > VERSION:
            msg = f"{path}: recorded by a newer ckptd (version {header.version})"
            raise NewerFormat(msg, remedy="analyze it with that ckptd")
        if not told:
            told = True
            yield header
        for value in values:
            yield _as(path, value, Entry)
    if not told:
        msg = f"{parts[0] if parts else 'nothing'}: no recorded run"
        raise BadForeign(msg, remedy=f"give a *{SUFFIX} file as `ckptd daemon --record` writes them")


def _as(path: Path, value: bytes, kind: type[Any]) -> Any:
    try:
        return msgspec.msgpack.decode(value, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as e:
        msg = f"{path}: not what a recorded run holds: {e}"
        raise BadForeign(msg) from e


def _values(path: Path) -> Iterator[bytes]:
    """Every value of one part, still encoded."""
    try:
        with path.open("rb") as file:
            if file.read(len(MAGIC)) != MAGIC:
                msg = f"{path}: not a recorded run"
                raise BadForeign(msg, remedy=f"give a *{SUFFIX} file as `ckptd daemon --record` writes them")
            while len(head := file.read(4)) == 4:
                (length,) = struct.unpack("<I", head)
                if length > CHUNK_BYTES_MAX:
                    msg = f"{path}: a chunk of {length} bytes"
                    raise BadForeign(msg)
                packed = file.read(length)
                if len(packed) < length:
                    return
                yield from _split(path, _unpacked(path, packed))
    except OSError as e:
        msg = f"{path}: {e.strerror}"
        raise NotFound(msg) from e


def _unpacked(path: Path, packed: bytes) -> bytes:
    try:
        reader = zstandard.ZstdDecompressor(max_window_size=CHUNK_BYTES_MAX).stream_reader(packed)
        data = reader.read(CHUNK_BYTES_MAX + 1)
    except zstandard.ZstdError as e:
        msg = f"{path}: a chunk is broken: {e}"
        raise BadForeign(msg) from e
    if len(data) > CHUNK_BYTES_MAX:
        msg = f"{path}: a chunk unpacks to more than {CHUNK_BYTES_MAX} bytes"
        raise BadForeign(msg)
    return data


def _split(path: Path, data: bytes) -> Iterator[bytes]:
    """The values of a chunk."""
    at = 0
    while at < len(data):
        begin = at + 4
        at = begin + int.from_bytes(data[at:begin], "little")
        if at > len(data):
            msg = f"{path}: a value ends behind its chunk"
            raise BadForeign(msg)
        yield data[begin:at]


# --- replaying --------------------------------------------------------------------------------------------------------------


def replay(parts: list[Path], settings: Settings | None = None) -> Replayed:
    """What the engine concludes of a recorded run; as it did then, unless other `settings` are given. Raises as `read`."""
    entries = read(parts)
    header = next(entries)
    assert isinstance(header, Header)  # noqa: S101  `read` says so
    engine = Engine(header.job, header.attempt, header.world_size, header.nodes, settings or _settings(header))
    done = Replayed(header)
    for entry in entries:
        assert isinstance(entry, Entry)  # noqa: S101  `read` says so
        done.took(entry)
        for outcome in _tell(engine, entry):
            if isinstance(outcome, Concluded):
                done.verdicts[outcome.verdict.id] = outcome.verdict
                done.history.append(outcome.verdict)
    done.status = engine.status()
    return done


def _tell(engine: Engine, entry: Entry) -> list[Concluded | Ask]:
    if entry.report is not None:
        return engine.receive(entry.report, entry.now_s, entry.wall_s)
    if entry.finding is not None:
        return engine.found(entry.finding)
    if entry.acted is not None:
        engine.acted(*entry.acted)
        return []
    return engine.tick(entry.now_s, entry.wall_s)


def _settings(header: Header) -> Settings:
    """As the header has them, but for what this ckptd does not know."""
    known = {f.name for f in fields(Settings)}
    return replace(Settings(), **{k: v for k, v in header.settings.items() if k in known})


@dataclass
class Replayed:
    """`verdicts`: by id, each as it was last; `history`: every change, in order; `status`: the engine's, at the end."""

    header: Header
    verdicts: dict[int, Verdict] = field(default_factory=dict)
    history: list[Verdict] = field(default_factory=list)
    status: dict[str, Any] = field(default_factory=dict)
    reports: int = 0
    steps: int = 0
    began_s: float = 0.0
    ended_s: float = 0.0

    def took(self, entry: Entry) -> None:
        """Count an entry."""
        self.began_s, self.ended_s = self.began_s or entry.wall_s, entry.wall_s
        if entry.report is not None:
            self.reports += 1
            self.steps += len(entry.report.steps)


# --- a trace ----------------------------------------------------------------------------------------------------------------


def windows(parts: list[Path]) -> dict[str, Any]:
    """The steps of a recorded run, as `trace_export.render` takes them: its newest STEPS_SHOWN per rank.

    Steps are summaries: where in a step its parts lay is not known. Ranks are placed by their own clocks, and nodes by when their reports came: good to the eye, not
    to the millisecond.
    """
    entries = read(parts)
    header = next(entries)
    steps: dict[int, deque[tuple[int, int, int]]] = {}
    nodes: dict[int, int] = {}
    late_ns: dict[int, int] = {}
    """Node -> the least that its reports came after what they tell: what places its clock."""
    newest_ns, newest_s = 0, 0.0
    for entry in entries:
        if not isinstance(entry, Entry) or entry.report is None:
            continue
        newest_ns, newest_s = int(entry.now_s * 1e9), entry.wall_s
        for s in entry.report.steps:
            nodes[s.rank] = entry.report.node
            late_ns[entry.report.node] = min(late_ns.get(entry.report.node, 1 << 62), newest_ns - s.ended_ns)
            steps.setdefault(s.rank, deque(maxlen=STEPS_SHOWN)).append((s.ended_ns, s.wall_us, s.step))
    ranks = []
    for rank, told in sorted(steps.items()):
        records = np.zeros(2 * len(told), record.RECORD)
        for i, (ended_ns, wall_us, step) in enumerate(told):
            end = max(1, ended_ns + late_ns[nodes[rank]])
            begin = max(1, end - wall_us * 1000)
            records[2 * i] = (1, begin, end, end, step, 0, step & 0xFFFFFFFF, record.NO_GROUP, record.TRAIN, 0, record.MARK, -1, 0, 0)
            records[2 * i + 1] = (1, end, end, end, step, 0, step & 0xFFFFFFFF, record.NO_GROUP, record.STEP, 0, record.MARK, -1, 0, 0)
        ranks.append({"job": header.job if isinstance(header, Header) else "", "rank": rank, "pid": 0, "records": records, "groups": []})
    return {"ranks": ranks, "verdicts": [], "now_ns": newest_ns, "now_s": newest_s}
