"""LocalStore: a directory of a local or shared file system.

    put:  temporary file -> reserve space -> write -> fsync -> rename (exclusive: link) -> fsync of the folder and those above it

Invariants
- a file is never written under its final name; what has that name was complete and synced before it got it;
- every path is walked component by component from the root, without following symbolic links: no name leaves the root, whoever
  made the links (the root itself may be a link: it is the operator's choice);
- an fsync error poisons the file. The kernel reports it once and drops the dirty pages (Rebello et al., "Can Applications Recover
  from fsync Failures?", ATC 2020), so a second fsync that succeeds proves nothing: the bytes are written anew under a new name, once.

Bulk data goes past the page cache (`direct.py`).

Things that don't work
- rename for exclusive puts: it replaces silently. link(2) refuses, on every file system that has hard links; where there are none we
  look first and then rename, which leaves two writers in the same instant a race (the file is whole in any case).
- Open file descriptors kept per folder: they go stale on NFS and keep deleted folders alive. A walk costs microseconds.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import secrets
import stat
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import TypeAlias

from ckptd.errors import BadArgument, CkptdError, NotFound, StoreFailed
from ckptd.storage import Data, Stat, Writer, check_name, is_temporary, parts_of
from ckptd.storage.direct import PIECE_BYTES, DirectFile, reserve

__all__ = ["LocalStore"]

DIRECT_BYTES_MIN = 8 << 20
"""Below this the page cache does no harm, and a single direct write is slower than a cached one."""
STALE_AFTER_S = 3600.0
"""A temporary that nobody wrote to for this long and nobody holds locked was left by a dead process."""
UNSYNCED_RETRIES = 1
"""An fsync that fails twice in a row tells of a disk, not of an accident."""
PRUNED_RETRIES = 16
"""Another's delete may prune the empty folder that we just made or opened; each time takes a delete in the microseconds before our file."""

STREAM_BYTES = PIECE_BYTES
"""What a stream gathers before it writes past the page cache."""

_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC  # O_NONBLOCK: a FIFO in our place must not hang us
_CREATE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC

_NO_LINKS = "symbolic links below the store's root are not followed: put a real file or directory there"
_REMEDIES = {
    errno.ENOSPC: "free space on this file system, keep fewer checkpoints (retention), or use another store",
    errno.EDQUOT: "the quota of this user or project is used up: free space or have it raised",
    errno.EROFS: "the file system is mounted read-only: look into dmesg for disk errors, then remount it or use another store",
    errno.EACCES: "give the user that runs ckptd read and write permission on this directory",
    errno.EPERM: "give the user that runs ckptd read and write permission on this directory",
    errno.EIO: "the disk or the file server reports errors: look into dmesg, and use another store meanwhile",
    errno.ESTALE: "the shared file system was exported or mounted anew: remount it on this node",
    errno.ELOOP: _NO_LINKS,
    errno.ENOTDIR: _NO_LINKS,
    errno.EFBIG: "the file system, or this user's limit (ulimit -f), does not allow files this large",
    errno.EISDIR: "a directory stands where a file belongs: move it away",
}

# Inside the class `list` is the method.
_Stats: TypeAlias = list[Stat]
_Descriptors: TypeAlias = list[int]


class _UnsyncedError(OSError):
    """An fsync failed; what it was asked to make durable must be written anew."""


class LocalStore:
    """A `Store` below the directory `root`, which the first put makes if it is missing."""

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self._root = os.path.abspath(root)  # noqa: PTH100  Path.resolve would follow links, and the root's are the operator's

    def __str__(self) -> str:
        return self._root

    def put(self, name: str, data: Data, *, exclusive: bool = False) -> None:
        """See `Store.put`."""
        components, parts = check_name(name), parts_of(data)
        with self._explained("write", name):
            unsynced = pruned = 0
            while True:
                try:
                    return self._put_once(components, parts, exclusive=exclusive)
                except _UnsyncedError:
                    unsynced += 1
                    if unsynced > UNSYNCED_RETRIES:
                        raise
                except FileNotFoundError:
                    pruned += 1
                    if pruned > PRUNED_RETRIES:
                        raise

    def get(self, name: str, begin: int, into: memoryview) -> None:
        """See `Store.get`."""
        *parents, last = check_name(name)
        if begin < 0 or into.readonly or not into.c_contiguous:
            msg = f"{name}: cannot read from byte {begin} into {'read-only ' if into.readonly else ''}memory"
            raise BadArgument(msg)
        with self._explained("read", name), self._folders(parents) as folders:
            fd = os.open(last, _READ, dir_fd=folders[-1])
            try:
                self._check_regular(name, os.fstat(fd))
                view = into.cast("B") if into.nbytes else into
                done = 0
                while done < len(view):
                    n = os.preadv(fd, [view[done : done + PIECE_BYTES]], begin + done)
                    if n == 0:
                        msg = f"{self._root}/{name}: short read: {done} of {len(view)} bytes at byte {begin}"
                        raise StoreFailed(msg, remedy="the file was truncated: restore another step, or from another tier")
                    done += n
            finally:
                os.close(fd)

    def list(self, prefix: str) -> Iterator[Stat]:
        """See `Store.list`. The walk also removes temporaries that dead processes left."""
        components = check_name(prefix) if prefix else []
        found: list[Stat] = []
        with self._explained("list", prefix), suppress(FileNotFoundError), self._folders(components) as folders:
            self._walk(folders[-1], "/".join(components), found)
        return iter(sorted(found))

    def delete(self, name: str) -> None:
        """See `Store.delete`. Folders left empty go too."""
        *parents, last = check_name(name)
        with self._explained("delete", name), suppress(FileNotFoundError), self._folders(parents) as folders:
            os.unlink(last, dir_fd=folders[-1])
            _sync_folder(folders[-1])
            for folder, child in zip(reversed(folders[:-1]), reversed(parents), strict=True):
                try:
                    os.rmdir(child, dir_fd=folder)
                except OSError:  # not empty, or not ours to remove: an empty folder is no object, nobody misses its removal
                    break

    def stat(self, name: str) -> Stat:
        """See `Store.stat`."""
        *parents, last = check_name(name)
        with self._explained("stat", name), self._folders(parents) as folders:
            info = os.stat(last, dir_fd=folders[-1], follow_symlinks=False)
            self._check_regular(name, info)
            return Stat(name, info.st_size)

    def stream(self, name: str) -> Writer:
        """See `Streaming.stream`. Holds 16 MiB."""
        components = check_name(name)
        with self._explained("write", name):
            pruned = 0
            while True:
                try:
                    return _LocalWriter(self, name, components)
                except FileNotFoundError:
                    pruned += 1
                    if pruned > PRUNED_RETRIES:
                        raise

    def _put_once(self, components: Sequence[str], parts: Sequence[memoryview], *, exclusive: bool) -> None:
        *parents, last = components
        with self._folders(parents, make=True) as folders:
            temporary = f".ckptd-{secrets.token_hex(16)}.tmp"
            fd = os.open(temporary, _CREATE, 0o644, dir_fd=folders[-1])
            try:
                try:
                    with suppress(OSError):  # the lock only tells a sweep elsewhere that we live; some file systems have none
                        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    _fill(fd, parts)
                    _sync(fd)
                    with suppress(OSError):
                        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)  # the read-back shall come from the disk
                finally:
                    os.close(fd)
                if exclusive:
                    self._place_exclusively(folders[-1], temporary, last)
                else:
                    os.rename(temporary, last, src_dir_fd=folders[-1], dst_dir_fd=folders[-1])
            finally:
                with suppress(OSError):  # already renamed, as a rule
                    os.unlink(temporary, dir_fd=folders[-1])
            try:
                _sync_all(folders)
            except _UnsyncedError:
                if exclusive:  # ours, but not known to be durable; the next try must find the name free
                    with suppress(OSError):
                        os.unlink(last, dir_fd=folders[-1])
                raise

    def _place_exclusively(self, folder: int, temporary: str, last: str) -> None:
        try:
            os.link(temporary, last, src_dir_fd=folder, dst_dir_fd=folder, follow_symlinks=False)
        except FileExistsError:
            # NFS may repeat a link whose answer was lost, and then say that it exists: our own second name tells.
            if os.stat(temporary, dir_fd=folder, follow_symlinks=False).st_nlink == 1:
                raise
        except OSError as e:
            if e.errno not in {errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}:
                raise
            with suppress(FileNotFoundError):
                os.stat(last, dir_fd=folder, follow_symlinks=False)
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST)) from e
            os.rename(temporary, last, src_dir_fd=folder, dst_dir_fd=folder)

    def _walk(self, folder: int, path: str, found: _Stats) -> None:
        with os.scandir(folder) as entries:
            for entry in entries:
                name = f"{path}/{entry.name}" if path else entry.name
                with suppress(FileNotFoundError):  # deleted since the folder was read
                    if is_temporary(entry.name):
                        _sweep(folder, entry.name)
                    elif not _is_name(name):
                        continue  # not put by us, and no name that could be asked for
                    elif entry.is_dir(follow_symlinks=False):
                        fd = os.open(entry.name, _FOLDER, dir_fd=folder)
                        try:
                            self._walk(fd, name, found)
                        finally:
                            os.close(fd)
                    elif entry.is_file(follow_symlinks=False):
                        found.append(Stat(name, entry.stat(follow_symlinks=False).st_size))

    @contextmanager
    def _folders(self, components: Sequence[str], *, make: bool = False) -> Iterator[_Descriptors]:
        """Descriptors of the root and of each folder below it; `folders[-1]` holds the object."""
        folders = [self._open_root(make=make)]
        try:
            for component in components:
                if make:
                    with suppress(FileExistsError):
                        os.mkdir(component, 0o755, dir_fd=folders[-1])
                folders.append(os.open(component, _FOLDER, dir_fd=folders[-1]))
            yield folders
        finally:
            for fd in folders:
                os.close(fd)

    def _open_root(self, *, make: bool) -> int:
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
        try:
            return os.open(self._root, flags)
        except FileNotFoundError:
            if not make:
                raise
        missing = [self._root]
        while not os.path.isdir(parent := os.path.dirname(missing[-1])):  # noqa: PTH112, PTH120
            missing.append(parent)
        for path in reversed(missing):
            with suppress(FileExistsError):
                os.mkdir(path, 0o755)  # noqa: PTH102
            above = os.open(os.path.dirname(path), flags)  # noqa: PTH120
            try:
                _sync_folder(above)
            finally:
                os.close(above)
        return os.open(self._root, flags)

    def _check_regular(self, name: str, info: os.stat_result) -> None:
        if not stat.S_ISREG(info.st_mode):
            kind = {stat.S_IFDIR: "a directory", stat.S_IFLNK: "a symbolic link", stat.S_IFIFO: "a FIFO"}
            msg = f"{self._root}/{name} is {kind.get(stat.S_IFMT(info.st_mode), 'a special file')}, not a file"
            raise StoreFailed(msg, remedy=_NO_LINKS)

    @contextmanager
    def _explained(self, verb: str, name: str) -> Iterator[None]:
        """Turn what the operating system says into our errors, with the path and what to do about it."""
        try:
            yield
        except FileNotFoundError as e:
            msg = f"{self._root}/{name} does not exist"
            kind: type[CkptdError] = StoreFailed if verb == "write" else NotFound
            raise kind(msg) from e
        except OSError as e:
            what = f"cannot {verb} {self._root}/{name}: {e.strerror or e}"
            msg = f"{what} (fsync failed twice)" if isinstance(e, _UnsyncedError) else what
            remedy = _REMEDIES.get(e.errno or 0, "the file system refused: look into dmesg and at the mount")
            if isinstance(e, FileExistsError):
                remedy = "what is committed is never replaced"
            raise StoreFailed(msg, remedy=remedy) from e


class _LocalWriter(Writer):
    """A temporary file that a commit gives its name. An fsync error ends it: what was written is no longer there to be written anew."""

    def __init__(self, store: LocalStore, name: str, components: Sequence[str]) -> None:
        super().__init__(f"{store}/{name}")
        self._store, self._name, self._last = store, name, components[-1]
        self._temporary = f".ckptd-{secrets.token_hex(16)}.tmp"
        self._gathered, self._filled, self._at = mmap.mmap(-1, STREAM_BYTES), 0, 0  # page-aligned
        with ExitStack() as stack:
            self._folders = stack.enter_context(store._folders(components[:-1], make=True))  # noqa: SLF001  one of its two halves
            self._fd = os.open(self._temporary, _CREATE, 0o644, dir_fd=self._folders[-1])
            stack.callback(self._leave)
            self._file = stack.enter_context(DirectFile(self._fd, DIRECT_BYTES_MIN))
            with suppress(OSError):
                fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._stack = stack.pop_all()

    def _write(self, data: memoryview) -> None:
        while data:
            taken = data[: STREAM_BYTES - self._filled]
            self._gathered[self._filled : self._filled + len(taken)] = taken
            self._filled += len(taken)
            data = data[len(taken) :]
            if self._filled == STREAM_BYTES:
                self._flush()

    def _commit(self) -> None:
        self._flush()
        with self._store._explained("write", self._name):  # noqa: SLF001
            _sync(self._fd)
            with suppress(OSError):
                os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_DONTNEED)
            os.rename(self._temporary, self._last, src_dir_fd=self._folders[-1], dst_dir_fd=self._folders[-1])
            _sync_all(self._folders)
        self._stack.close()

    def _abort(self) -> None:
        self._stack.close()

    def _flush(self) -> None:
        with self._store._explained("write", self._name), memoryview(self._gathered) as gathered:  # noqa: SLF001
            self._file.write(gathered[: self._filled], self._at)
        self._at += self._filled
        self._filled = 0

    def _leave(self) -> None:
        os.close(self._fd)
        with suppress(OSError):  # renamed, if it was committed
            os.unlink(self._temporary, dir_fd=self._folders[-1])


def _is_name(name: str) -> bool:
    try:
        check_name(name)
    except BadArgument:
        return False
    return True


def _sync(fd: int) -> None:
    try:
        os.fsync(fd)
    except OSError as e:
        raise _UnsyncedError(e.errno, e.strerror) from e


def _sync_folder(fd: int) -> None:
    try:
        _sync(fd)
    except _UnsyncedError as e:
        if e.errno not in {errno.EINVAL, errno.EOPNOTSUPP}:  # some network and FUSE mounts have no fsync of folders
            raise


def _sync_all(folders: Sequence[int]) -> None:
    """All folders above, too: another process may have made them a moment ago and died before it synced them."""
    for folder in reversed(folders):
        _sync_folder(folder)


def _fill(fd: int, parts: Sequence[memoryview]) -> None:
    """Write the parts one after the other into the empty file `fd`."""
    reserve(fd, sum(len(p) for p in parts))
    at = 0
    with DirectFile(fd, DIRECT_BYTES_MIN) as file:
        for part in parts:
            file.write(part, at)
            at += len(part)


def _sweep(folder: int, temporary: str) -> None:
    """Remove a temporary whose writer is dead: old, and its lock is free. Failing to is no failure of the listing."""
    with suppress(OSError):
        if time.time() - os.stat(temporary, dir_fd=folder, follow_symlinks=False).st_mtime < STALE_AFTER_S:
            return
        fd = os.open(temporary, _READ, dir_fd=folder)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.unlink(temporary, dir_fd=folder)
        finally:
            os.close(fd)
