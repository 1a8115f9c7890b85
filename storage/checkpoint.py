"""Checkpoints: the commit protocol over a `Store`.

    <job>/step-00001234/images/r00000.safetensors ...    1. every rank: put, read back
    <job>/step-00001234/index.msgpack.zst                2. the coordinator: look at every image, put, read back
    <job>/step-00001234/manifest.json                    3. the coordinator: put exclusively, read back

A *directory* is the name "<job>/step-<step>", with ".a<attempt>" appended where an earlier attempt committed the same step.

Invariants
- no manifest, no checkpoint: whatever a crash leaves before the manifest is unfinished and is written over by the next try;
- a commit is immutable: where a manifest stands, no image, index or manifest is written. Trying again with the very same bytes
  succeeds without writing, so that a writer whose answer was lost may simply repeat itself;
- every byte is read back and compared with its checksum before the manifest is put;
- deletion takes the manifest first: a half-deleted checkpoint is an unfinished one, never a broken one;
- memory is bounded: images are read in windows, manifest and index have limits.

One caller per directory and attempt writes the manifest (the coordinator); images may be written by all nodes at once.
"""

from __future__ import annotations

import re
import time
from bisect import bisect_left
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from functools import cached_property

from ckptd.core import checksum
from ckptd.core.image import HEADER_BYTES_MAX, Image, header_bytes_of, parse
from ckptd.core.manifest import (
    INDEX_BYTES_MAX,
    INDEX_NAME,
    MANIFEST_NAME,
    Index,
    Manifest,
    check_agreement,
    check_index_bytes,
    check_rows,
    decode_index,
    decode_manifest,
    encode_index,
    encode_manifest,
    image_name,
    make_manifest,
)
from ckptd.core.retention import Retention, to_drop
from ckptd.errors import BadArgument, BadBytes, BadImage, BadManifest, ChecksumMismatch, CkptdError, NotFound, StoreFailed
from ckptd.storage import Store

__all__ = [
    "Found",
    "Problem",
    "Report",
    "apply_retention",
    "check_job",
    "delete_checkpoint",
    "list_checkpoints",
    "pick_directory",
    "read_checkpoint",
    "read_header",
    "split_directory",
    "step_dir",
    "verify_checkpoint",
    "write_image",
    "write_manifest",
]

WINDOW_BYTES = 8 << 20
"""Read-back and verification hold this much of an image at a time: eight checksum blocks, enough for a disk's full speed."""
MANIFEST_BYTES_MAX = 64 << 20
"""About 600 000 ranks; checked before anything is allocated."""

_JOB = re.compile(r"(?!\.)[A-Za-z0-9._-]{1,128}")
_STEP = re.compile(r"step-([0-9]{8,18})(?:\.a([1-9][0-9]{0,17}))?")


@dataclass(frozen=True, slots=True)
class Found:
    """A directory of a job. `manifest`: if it could be read; `error`: why this is no checkpoint to restore from, or "".

    `unfinished`: there is no manifest; it is being written, or was left by a crash. `bytes`: of all its files.
    """

    job: str
    directory: str
    step: int
    attempt: int | None
    manifest: Manifest | None
    error: str
    unfinished: bool = False
    bytes: int = 0

    @property
    def ok(self) -> bool:
        """Whether manifest, index and images are there, and of the sizes that the manifest names. Contents: `verify_checkpoint`."""
        return self.manifest is not None and not self.error


@dataclass(frozen=True, slots=True)
class Problem:
    """Something wrong in a checkpoint. `rank`: whose image, None for manifest and index; `error`: the class in `ckptd.errors`.

    `tensors`: names whose bytes are touched, sorted; none where only a header is.
    """

    rank: int | None
    error: str
    message: str
    tensors: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Report:
    """What `verify_checkpoint` saw. `bytes_read`: of images."""

    directory: str
    images: int
    bytes_read: int
    problems: tuple[Problem, ...]

    @property
    def ok(self) -> bool:
        """Whether every byte is what it was when the checkpoint was written."""
        return not self.problems


def check_job(job: str) -> None:
    """Raise BadArgument unless `job` can name a job: one path component that no shell or file system takes amiss."""
    if not _JOB.fullmatch(job):
        msg = f"{job[:140]!r} cannot name a job"
        raise BadArgument(msg, remedy="use 1 to 128 of the characters A-Z a-z 0-9 . _ -, not beginning with a dot")


def step_dir(job: str, step: int, suffix: int = 0) -> str:
    """The directory of a step. `suffix`: the attempt to append, 0 for none. Raises BadArgument."""
    check_job(job)
    if not (0 <= step < 10**18 and 0 <= suffix < 10**18):
        msg = f"step {step} with suffix {suffix} cannot name a directory"
        raise BadArgument(msg)
    return f"{job}/step-{step:08}" + (f".a{suffix}" if suffix else "")


def split_directory(directory: str) -> tuple[str, int, int] | None:
    """Job, step and suffix of a directory that `step_dir` could have named; None for any other."""
    job, _, last = directory.partition("/")
    match = _STEP.fullmatch(last)
    if not match or not _JOB.fullmatch(job):
        return None
    step, suffix = int(match[1]), int(match[2] or 0)
    return (job, step, suffix) if step_dir(job, step, suffix) == directory else None


def pick_directory(store: Store, job: str, step: int, attempt: int) -> str:
    """Where `attempt` shall write `step`: the plain directory, unless another attempt has committed there. The coordinator asks once.

    A directory without a manifest is a leftover and is written over. One whose manifest cannot be read is left alone, as evidence;
    only in ".a<attempt>", which is this attempt's own, such a manifest is deleted.

    Raises: StoreFailed, BadArgument.
    """
    plain = step_dir(job, step)
    if attempt < 0:
        msg = f"attempt {attempt} cannot be"
        raise BadArgument(msg)
    if _is_free(store, plain, attempt):
        return plain
    if attempt == 0:
        msg = f"{plain} is taken, and attempt 0 has no directory of its own"
        raise StoreFailed(msg, remedy="delete the checkpoint that stands there, or write to another job")
    own = step_dir(job, step, attempt)
    if not _is_free(store, own, attempt):
        store.delete(_at(own, MANIFEST_NAME))
    return own


def _is_free(store: Store, directory: str, attempt: int) -> bool:
    """Whether `attempt` may write here: no manifest stands here, or its own does."""
    try:
        return _read_manifest(store, directory).attempt == attempt
    except NotFound:
        return True
    except BadBytes:
        return False


def write_image(store: Store, directory: str, rank: int, image: memoryview, digests: bytes) -> None:
    """Put the image of `rank` and prove that it can be read back. `digests`: made when the image was sealed.

    Raises: ChecksumMismatch (what the store returns, or what lay in memory, is not what was sealed), StoreFailed, BadArgument.
    """
    view = image.cast("B")
    if len(digests) != checksum.block_count(len(view)) * checksum.DIGEST_BYTES:
        msg = f"image {rank}: {len(digests)} bytes of checksums for {len(view)} bytes"
        raise BadArgument(msg)
    name = _at(directory, image_name(rank))
    if _exists(store, _at(directory, MANIFEST_NAME)):
        try:
            _check_stored(store, name, len(view), digests)
        except CkptdError as e:
            msg = f"{directory} is already committed, and its image {rank} is not this one: {e.message}"
            raise StoreFailed(msg, remedy="a commit is immutable: write under a new attempt, or delete the checkpoint first") from e
        return
    store.put(name, view)
    _check_stored(store, name, len(view), digests)


def read_header(store: Store, directory: str, rank: int) -> Image:
    """The parsed header of an image as the store gives it back. Raises NotFound, BadImage."""
    name = _at(directory, image_name(rank))
    image_bytes = store.stat(name).bytes
    head = bytearray(min(8, image_bytes))
    store.get(name, 0, memoryview(head))
    header = bytearray(header_bytes_of(bytes(head), image_bytes))
    store.get(name, 0, memoryview(header))
    return parse(bytes(header), image_bytes)


def write_manifest(store: Store, directory: str, index: Index, created_unix_s: float) -> Manifest:
    """Commit: after this the checkpoint exists. All images must have been written, by whichever node.

    Every image named is looked at from here: it must exist, have its size, and begin with the header that the index was built
    from. That catches stores that the nodes do not share, and a zombie of an earlier attempt that wrote over an image.

    Raises: StoreFailed, ChecksumMismatch, BadManifest (the index is of another job or step than the directory).
    """
    data = encode_index(index)
    manifest = make_manifest(index, data, created_unix_s=created_unix_s)
    _check_place(manifest, directory)
    for rank, info in sorted(index.images.items()):
        name = _at(directory, image_name(rank))
        shared = "the store must be one that all nodes share; is it mounted on all of them, at the same path?"
        try:
            held_bytes = store.stat(name).bytes
        except NotFound as e:
            msg = f"{store}: {name} of rank {rank} is missing"
            raise StoreFailed(msg, remedy=shared) from e
        if held_bytes != info.image_bytes:
            msg = f"{store}: {name} of rank {rank} has {held_bytes} bytes, not {info.image_bytes}"
            raise StoreFailed(msg, remedy=shared)
        _check_stored(store, name, info.image_bytes, info.digests, upto=info.header_bytes)
    manifest_name, index_name = _at(directory, MANIFEST_NAME), _at(directory, INDEX_NAME)
    if _exists(store, manifest_name):
        return _committed_before(store, directory, manifest)
    store.put(index_name, data)
    _check_same(index_name, _read_whole(store, index_name, len(data)), data)
    text = encode_manifest(manifest)
    store.put(manifest_name, text, exclusive=True)
    _check_same(manifest_name, _read_whole(store, manifest_name, MANIFEST_BYTES_MAX), text)
    return manifest


def _committed_before(store: Store, directory: str, manifest: Manifest) -> Manifest:
    """The manifest that stands in `directory`, if it commits the same index: then our answer was lost, not our work."""
    standing, _ = read_checkpoint(store, directory)
    if standing.index != manifest.index:
        msg = f"{directory} is already committed, with another content"
        raise StoreFailed(msg, remedy="a commit is immutable: write under a new attempt, or delete the checkpoint first")
    return standing


def read_checkpoint(store: Store, directory: str) -> tuple[Manifest, Index]:
    """Manifest and index, with everything checked that can be without reading the images: sizes, sha256, coverage, agreement.

    `directory` may also be one that was copied elsewhere, or "" for the store's root; only names of ours must agree with the manifest.

    Raises: NotFound (no manifest), BadManifest, BadImage (missing or of another size), ChecksumMismatch, NewerFormat, NotTiled,
    StoreFailed.
    """
    manifest = _read_manifest(store, directory)
    name = _at(directory, INDEX_NAME)
    try:
        data = _read_whole(store, name, min(manifest.index.bytes, INDEX_BYTES_MAX))
    except NotFound as e:
        msg = f"{name} is missing, though a manifest names it"
        raise BadManifest(msg, remedy="restore another step") from e
    check_index_bytes(manifest, data)
    index = decode_index(data)
    check_agreement(manifest, index)
    problem = _misfits(manifest, _sizes(store, directory))
    if problem:
        msg = f"{directory}/{problem}"
        raise BadImage(msg, remedy="restore another step")
    return manifest, index


def list_checkpoints(store: Store, job: str | None) -> list[Found]:
    """Every step directory of `job` (None: of all jobs), newest first by (attempt, step); those without a manifest come last.

    One bad directory never hides the others: it is listed with its error. Raises StoreFailed if the store cannot be listed.
    """
    if job is not None:
        check_job(job)
    sizes: dict[str, dict[str, int]] = {}
    for held in store.list(job or ""):
        job_name, _, below = held.name.partition("/")
        last, _, file = below.partition("/")
        directory = f"{job_name}/{last}"
        if file and split_directory(directory):
            sizes.setdefault(directory, {})[file] = held.bytes
    found = [_look_at(store, directory, held_bytes) for directory, held_bytes in sizes.items()]
    return sorted(found, key=lambda f: (-1 if f.attempt is None else f.attempt, f.step, f.directory), reverse=True)


def _look_at(store: Store, directory: str, sizes: dict[str, int]) -> Found:
    place = split_directory(directory)
    assert place is not None  # noqa: S101  list_checkpoints asked before
    job, step, _ = place
    total = sum(sizes.values())
    try:
        manifest = _read_manifest(store, directory)
    except NotFound:
        return Found(job, directory, step, None, None, "no manifest: unfinished", unfinished=True, bytes=total)
    except CkptdError as e:
        return Found(job, directory, step, None, None, f"{type(e).__name__}: {e.message}", bytes=total)
    return Found(job, directory, step, manifest.attempt, manifest, _misfits(manifest, sizes), bytes=total)


def verify_checkpoint(store: Store, directory: str, progress: Callable[[int, int], None] | None = None) -> Report:
    """Read every byte of every image, once and in order, and compare it with index and checksums; nothing stops at the first problem.

    `progress` is called with the bytes read and the bytes to read, after every window. Raises nothing for what is wrong with the
    checkpoint: that is in the report. NotFound, if there is no manifest at all.
    """
    problems: list[Problem] = []
    try:
        manifest, index = read_checkpoint(store, directory)
    except NotFound:
        raise
    except BadImage:  # an image is missing or has another size; the others can still be read
        manifest, index = _read_without_images(store, directory)
    except CkptdError as e:
        return Report(directory, 0, 0, (_problem(None, e),))
    rows: dict[int, list[tuple[int, int, str]]] = {rank: [] for rank in index.images}
    for name, placed in index.rows.items():
        for row in placed:
            rows[row.image].append((row.begin, row.end, name))
    total = sum(i.image_bytes for i in index.images.values())
    bytes_read = 0
    for image in manifest.images:
        scan = _Scan(store, _at(directory, image.name), index, image.rank, sorted(rows[image.rank]))
        for window_bytes in scan.windows():
            bytes_read += window_bytes
            if progress:
                progress(bytes_read, total)
        problems += scan.problems
    return Report(directory, len(manifest.images), bytes_read, tuple(problems))


def _read_without_images(store: Store, directory: str) -> tuple[Manifest, Index]:
    """What `read_checkpoint` found right before it looked at the images."""
    manifest = _read_manifest(store, directory)
    return manifest, decode_index(_read_whole(store, _at(directory, INDEX_NAME), manifest.index.bytes))


class _Scan:
    """One image read from end to end. `problems` is complete when `windows` is exhausted; at most one per kind of error."""

    def __init__(self, store: Store, name: str, index: Index, rank: int, rows: list[tuple[int, int, str]]) -> None:
        self._store, self._name, self._index, self._rank, self._rows = store, name, index, rank, rows
        self._info = index.images[rank]
        self.problems: list[Problem] = []

    def windows(self) -> Iterator[int]:
        """Read and check; yields the bytes of each window that was read."""
        try:
            held_bytes = self._store.stat(self._name).bytes
        except CkptdError as e:
            self.problems.append(_problem(self._rank, e, self._touched([(0, self._info.image_bytes)])))
            return
        if held_bytes != self._info.image_bytes:
            msg = f"{self._name}: has {held_bytes} bytes, not {self._info.image_bytes}"
            lost = self._touched([(held_bytes, self._info.image_bytes)])
            self.problems.append(Problem(self._rank, BadImage.__name__, msg, lost))
        header = bytearray()
        bad: list[tuple[int, int]] = []
        first: ChecksumMismatch | None = None
        unread: list[tuple[int, int]] = []
        refused: CkptdError | None = None
        for at, size in _windows(min(held_bytes, self._info.image_bytes)):
            window = self._window[:size]
            try:
                self._store.get(self._name, at, window)
            except CkptdError as e:
                unread.append((at, at + size))
                refused = refused or e
                continue
            for block in checksum.blocks_of(at, at + size):
                low = block * checksum.BLOCK_BYTES
                part = window[low - at : low - at + checksum.BLOCK_BYTES]
                try:
                    checksum.check_block(self._name, block, part, self._info.digests)
                except ChecksumMismatch as e:
                    bad.append((low, low + len(part)))
                    first = first or e
            if len(header) == at < self._header_bytes:
                header += window[: self._header_bytes - at]
            yield size
        if first:
            message = first.message + (f"; {len(bad)} blocks in all" if len(bad) > 1 else "")
            self.problems.append(Problem(self._rank, type(first).__name__, message, self._touched(bad)))
        if refused:
            self.problems.append(_problem(self._rank, refused, self._touched(unread)))
        if len(header) == self._header_bytes and not any(low < self._header_bytes for low, _ in bad):
            self._check_header(header)

    def _check_header(self, header: bytearray) -> None:
        """The bytes are the ones that were sealed; do they also say what the index says."""
        try:
            check_rows(self._index, self._rank, parse(bytes(header), self._info.image_bytes))
        except BadBytes as e:
            self.problems.append(_problem(self._rank, e))

    @cached_property
    def _window(self) -> memoryview:
        return memoryview(bytearray(min(WINDOW_BYTES, self._info.image_bytes)))

    @property
    def _header_bytes(self) -> int:
        return min(self._info.header_bytes, HEADER_BYTES_MAX + 8)

    def _touched(self, extents: list[tuple[int, int]]) -> tuple[str, ...]:
        """Names of tensors that have a byte in one of the extents (sorted, disjoint)."""
        names: set[str] = set()
        ends = [end for _, end, _ in self._rows]
        for low, high in extents:
            for begin, end, name in self._rows[bisect_left(ends, low + 1) :]:
                if begin >= high:
                    break
                if end > begin:
                    names.add(name)
        return tuple(sorted(names))


def delete_checkpoint(store: Store, directory: str) -> None:
    """Delete a checkpoint, or what is left of one: manifest, index, then the rest. Deleting nothing is no error.

    Raises: StoreFailed; what is left is unfinished, and the call can be repeated.
    """
    if split_directory(directory) is None:
        msg = f"{directory!r} is not a directory that ckptd writes: it is not deleted"
        raise BadArgument(msg)
    first = [_at(directory, MANIFEST_NAME), _at(directory, INDEX_NAME)]
    for name in first:
        store.delete(name)
    for name in [held.name for held in store.list(directory)]:
        store.delete(name)


def apply_retention(
    store: Store, job: str, policy: Retention, protect: Collection[str], *, now_unix_s: float | None = None
) -> list[str]:
    """Delete what `policy` does not keep; returns the directories deleted, oldest first. Only the job's lowest live node calls this.

    `protect`: directories that must stay: those being written, those being restored from, the last one verified. Unfinished
    directories below the newest good step go; directories whose manifest is damaged stay, for somebody to look at.

    Raises: StoreFailed, BadArgument.
    """
    found = list_checkpoints(store, job)
    good = [(f.manifest, f.directory) for f in found if f.manifest is not None and f.ok]
    if not good:
        return []
    newest, _ = good[0]
    known = [(m.attempt, m.step, m.created_unix_s) for m, _ in good]
    dropped = set(to_drop(known, policy, time.time() if now_unix_s is None else now_unix_s))
    gone = [d for m, d in reversed(good) if (m.attempt, m.step) in dropped]
    gone += [f.directory for f in reversed(found) if f.unfinished and f.step < newest.step]
    gone = [d for d in gone if d not in protect]
    for directory in gone:
        delete_checkpoint(store, directory)
    return gone


def _at(directory: str, name: str) -> str:
    return f"{directory}/{name}" if directory else name


def _sizes(store: Store, directory: str) -> dict[str, int]:
    skip = len(directory) + 1 if directory else 0
    return {held.name[skip:]: held.bytes for held in store.list(directory)}


def _misfits(manifest: Manifest, sizes: dict[str, int]) -> str:
    """The first file that the manifest names and that is missing or of another size; "" if there is none."""
    for name, size in [(manifest.index.name, manifest.index.bytes), *((i.name, i.bytes) for i in manifest.images)]:
        if name not in sizes:
            return f"{name} is missing, or is no regular file"
        if sizes[name] != size:
            return f"{name} has {sizes[name]} bytes, not {size}"
    return ""


def _read_manifest(store: Store, directory: str) -> Manifest:
    manifest = decode_manifest(_read_whole(store, _at(directory, MANIFEST_NAME), MANIFEST_BYTES_MAX))
    _check_place(manifest, directory)
    return manifest


def _check_place(manifest: Manifest, directory: str) -> None:
    """Raise BadManifest if the directory's name says another job, step or attempt than the manifest."""
    place = split_directory(directory)
    if place is None:
        return
    job, step, suffix = place
    if (manifest.job, manifest.step) != (job, step) or (suffix and suffix != manifest.attempt):
        msg = f"{directory}: its manifest is of job {manifest.job!r}, attempt {manifest.attempt}, step {manifest.step}"
        raise BadManifest(msg, remedy="move it back under its own name, or to one that does not look like ckptd's")


def _exists(store: Store, name: str) -> bool:
    try:
        store.stat(name)
    except NotFound:
        return False
    return True


def _read_whole(store: Store, name: str, bytes_max: int) -> bytes:
    size = store.stat(name).bytes
    if size > bytes_max:
        msg = f"{name}: {size} bytes are too many, at most {bytes_max} are read"
        raise BadManifest(msg)
    data = bytearray(size)
    store.get(name, 0, memoryview(data))
    return bytes(data)


def _windows(total_bytes: int) -> Iterator[tuple[int, int]]:
    for at in range(0, total_bytes, WINDOW_BYTES):
        yield at, min(WINDOW_BYTES, total_bytes - at)


def _check_stored(store: Store, name: str, image_bytes: int, digests: bytes, *, upto: int | None = None) -> None:
    """Read an image back and compare it with its checksums; `upto`: only the blocks that hold its first bytes."""
    if store.stat(name).bytes != image_bytes:
        msg = f"{name}: has {store.stat(name).bytes} bytes, not {image_bytes}"
        raise ChecksumMismatch(msg)
    wanted = image_bytes if upto is None else min(image_bytes, -(-upto // checksum.BLOCK_BYTES) * checksum.BLOCK_BYTES)
    buffer = memoryview(bytearray(min(WINDOW_BYTES, wanted)))
    for at, size in _windows(wanted):
        window = buffer[:size]
        store.get(name, at, window)
        for block in checksum.blocks_of(at, at + size):
            low = block * checksum.BLOCK_BYTES - at
            checksum.check_block(name, block, window[low : low + checksum.BLOCK_BYTES], digests)


def _check_same(name: str, held: bytes, wanted: bytes) -> None:
    if held != wanted:
        msg = f"{name} does not read back as it was written"
        raise ChecksumMismatch(msg, remedy="the store returns other bytes than it was given: look into dmesg, use another store")


def _problem(rank: int | None, error: CkptdError, tensors: tuple[str, ...] = ()) -> Problem:
    return Problem(rank, type(error).__name__, error.message, tensors)
