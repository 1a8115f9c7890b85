"""The target of a conversion: files under a temporary name beside the target's, a journal of those that are complete, and the rename at the end.

For a URL the files are made in a local folder and uploaded when all are complete, the report last: it stands for a complete upload.
What is to be synced goes past the page cache (`storage.direct`): it has to reach the disk anyhow, and a second copy of a checkpoint in memory helps nobody.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import threading
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ckptd.errors import BadArgument, StoreFailed
from ckptd.formats import Place
from ckptd.reading import WINDOW_BYTES
from ckptd.storage import check_name, open_store
from ckptd.storage.direct import DirectFile, reserve, write_at

JOURNAL = ".ckptd-journal"
REPORT_NAME = "ckptd-convert.json"
DIRECT_BYTES_MIN = 1 << 20
"""What is shorter goes through the page cache."""
SYNCED_AT_ONCE = 64
"""Files that are complete wait for so many others, open, before all are synced: a file system commits them together."""
SYNCERS = 16


class File:
    """A file of a target, open for writing. Any thread may write, each to bytes of its own."""

    def __init__(self, fd: int, *, past_the_cache: bool) -> None:
        self._fd = fd
        self._direct = DirectFile(fd, DIRECT_BYTES_MIN) if past_the_cache else None

    def write(self, data: bytes | memoryview, at: int) -> None:
        """All of it."""
        if self._direct is not None:
            self._direct.write(memoryview(data), at)
        else:
            write_at(self._fd, data, at)

    def sync(self) -> None:
        """Wait until the disk has it."""
        os.fsync(self._fd)

    def close(self) -> None:
        """No more is written."""
        if self._direct is not None:
            self._direct.close()
        os.close(self._fd)


class Target:
    """Files under a temporary name beside the target's, until `publish`."""

    def __init__(self, target: str, *, single: bool, fingerprint: str, sync: bool) -> None:
        self.remote = "://" in target and not target.startswith("file://")
        path = Path(os.path.abspath(target.removeprefix("file://")))  # noqa: PTH100  the user's links stay
        self._sync = sync
        self.url = target
        if self.remote:
            name = hashlib.sha256(target.encode()).hexdigest()[:16]
            path = Path(os.environ.get("TMPDIR", "/var/tmp")) / f"ckptd-upload-{name}"  # noqa: S108  large, and the same after a crash
        self.path, self.single = path, single
        if not self.remote:
            _check_free(path, single=single)
        self.work = path.parent / f".{path.name}.ckptd-convert"
        self.resumed: dict[str, int] = {}
        self._made = {""}
        self._telling = threading.Lock()
        self._waiting: list[tuple[str, File, int]] = []
        self._syncers = ThreadPoolExecutor(SYNCERS, "ckptd-sync")
        self._begin(fingerprint if sync else f"{fingerprint} {_boot()}")  # what was not synced is worth nothing after a power cut

    def _begin(self, fingerprint: str) -> None:
        journal = self.work / JOURNAL
        if self.work.is_symlink() or (self.work.exists() and not self.work.is_dir()):
            msg = f"{self.work} is in the way"
            raise StoreFailed(msg, remedy="remove it")
        try:
            self.work.mkdir(0o700 if self.remote else 0o777, parents=True, exist_ok=True)
            if self.work.lstat().st_uid != os.geteuid():
                msg = f"{self.work} is somebody else's"
                raise StoreFailed(msg, remedy="remove it, or set TMPDIR to a folder of your own")
            fd = os.open(journal, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
            self._journal = os.fdopen(fd, "a+", encoding="utf-8", errors="replace")
            self._lock(journal)
            self._journal.seek(0)
            lines = self._journal.read().splitlines()
            if lines[:1] == [fingerprint]:
                for line in lines[1:]:
                    size, _, name = line.partition(" ")
                    held = self.work / name
                    if size.isdecimal() and held.is_file() and held.stat().st_size == int(size):
                        self.resumed[name] = int(size)
                return
            for held in self.work.iterdir():
                if held.is_dir() and not held.is_symlink():
                    shutil.rmtree(held)
                elif held.name != JOURNAL:
                    held.unlink()
            self._journal.truncate(0)
            self._journal.write(fingerprint + "\n")
            self._journal.flush()
        except OSError as e:
            msg = f"{self.work} cannot be written: {e.strerror}"
            raise StoreFailed(msg) from e

    def _lock(self, journal: Path) -> None:
        """Two runs to one target would mix. Raises StoreFailed."""
        try:
            fcntl.flock(self._journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(self._journal.fileno()).st_ino == journal.stat().st_ino:
                return
        except (BlockingIOError, FileNotFoundError):  # it works, or it has just published
            pass
        self._journal.close()
        msg = f"another conversion writes to {self.path}"
        raise StoreFailed(msg, remedy="wait for it, or choose another target")

    def close(self) -> None:
        """Let go of the journal; what is complete is kept for the next run."""
        self._syncers.shutdown()
        for _, file, _ in self._waiting:
            file.close()
        self._waiting = []
        self._journal.close()

    def discard(self) -> None:
        """What was written is not what it should be: nothing of it shall be taken up again."""
        shutil.rmtree(self.work, ignore_errors=True)

    def open(self, name: str, nbytes: int, *, whole: bool = False) -> File:
        """A new file that will have so many bytes; of that size at once, unless one write is the `whole` of it. Any thread may ask. Raises StoreFailed."""
        check_name(name)  # nothing that could leave the target
        path = f"{self.work}/{name}"
        try:
            folder = name.rpartition("/")[0]
            if folder not in self._made:
                (self.work / folder).mkdir(parents=True, exist_ok=True)
                self._made.add(folder)
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
            try:
                if not whole:
                    reserve(fd, nbytes)
                    os.ftruncate(fd, nbytes)
            except OSError:
                os.close(fd)
                raise
        except OSError as e:
            msg = f"{path} cannot be written: {e.strerror}"
            raise StoreFailed(msg, remedy="free some room") from e
        return File(fd, past_the_cache=self._sync and nbytes >= DIRECT_BYTES_MIN)

    def done(self, name: str, file: File, nbytes: int) -> None:
        """The file is complete; it is synced with others and remembered then. Any thread may say so. Raises OSError, of any file that was waiting."""
        if not self._sync:
            file.close()
            self._remember([(name, file, nbytes)])
            return
        with self._telling:
            self._waiting.append((name, file, nbytes))
            if len(self._waiting) < SYNCED_AT_ONCE:
                return
        self.settle()

    def settle(self) -> None:
        """Sync what is complete: many files at once, which a file system commits together. Raises OSError."""
        with self._telling:
            waiting, self._waiting = self._waiting, []
        try:
            for _ in self._syncers.map(lambda held: held[1].sync(), waiting):
                pass
        finally:
            for _, file, _ in waiting:
                file.close()
        self._remember(waiting)

    def _remember(self, complete: Iterable[tuple[str, File, int]]) -> None:
        with self._telling:
            self._journal.writelines(f"{nbytes} {name}\n" for name, _, nbytes in complete)
            self._journal.flush()

    def place(self) -> Place:
        """Where the files lie now."""
        names = [p.name for p in self.work.iterdir() if p.name not in {JOURNAL, REPORT_NAME}]
        only = names[0] if self.single and len(names) == 1 else ""
        return Place(open_store(str(self.work)), "", str(self.path), only)

    def publish(self, report: bytes) -> None:
        """Give the files their name. What stood there before is not touched: it was checked, and a rename onto a folder fails."""
        self._journal.close()
        (self.work / JOURNAL).unlink()
        try:
            (self.work / REPORT_NAME).write_bytes(report)
            if self.remote:
                self._upload()
                return
            if self._sync:
                for _ in self._syncers.map(_sync_folder, [self.work, *(p for p in self.work.rglob("*") if p.is_dir())]):
                    pass
            if self.single:
                (only,) = (p for p in self.work.iterdir() if p.name != REPORT_NAME)
                os.link(only, self.path)  # unlike a rename, it replaces nothing
                (self.work / REPORT_NAME).replace(self.path.with_name(self.path.name + ".json"))
                shutil.rmtree(self.work)
            else:
                if self.path.is_dir():
                    self.path.rmdir()
                os.rename(self.work, self.path)  # noqa: PTH104  Path.rename says no less and no more
            if self._sync:
                _sync_folder(self.path.parent)
        except OSError as e:
            msg = f"{self.path} cannot be made of {self.work}: {e.strerror}"
            raise StoreFailed(msg, remedy="the converted files are complete in the temporary folder") from e

    def _upload(self) -> None:
        """To an object store, file by file, the report last: it stands for a complete upload."""
        base, _, only = self.url.rpartition("/") if self.single else (self.url, "", "")
        store = open_store(base)
        names = sorted(str(p.relative_to(self.work)) for p in self.work.rglob("*") if p.is_file())
        for name in sorted(names, key=lambda n: n == REPORT_NAME):
            path = self.work / name
            target = (f"{only}.json" if name == REPORT_NAME else only) if self.single else name
            with store.stream(target) as out, path.open("rb") as file:  # type: ignore[attr-defined]
                while data := file.read(WINDOW_BYTES):
                    out.write(memoryview(data))
        shutil.rmtree(self.work)


def _check_free(path: Path, *, single: bool) -> None:
    """Raise BadArgument where the target's name is taken: by anything but an empty folder."""
    if path.is_symlink() or path.exists():
        if not single and not path.is_symlink() and path.is_dir() and not any(path.iterdir()):
            return
        what = "a link" if path.is_symlink() else "there already"
        msg = f"{path} is {what}"
        raise BadArgument(msg, remedy="give a name that is free, or remove what stands there")
    if not path.parent.is_dir():
        msg = f"{path.parent} is no folder"
        raise BadArgument(msg, remedy="make it first")


def _boot() -> str:
    """A word for the time since this machine was started."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return "unknown"


def _sync_folder(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
