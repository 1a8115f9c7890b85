"""Writing past the page cache: whatever the offsets, the lengths and the threads, the file holds what was written."""

from __future__ import annotations

import errno
import mmap
import os
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from ckptd.storage.direct import ALIGN_BYTES, DirectFile, reserve, write_at

LEAST = 8 * ALIGN_BYTES


def buffer(data: bytes, at: int) -> memoryview:
    """The bytes, in memory that lies to pages as the file's offset does."""
    skew = at % ALIGN_BYTES
    held = memoryview(mmap.mmap(-1, skew + len(data) + ALIGN_BYTES))[skew : skew + len(data)]
    held[:] = data
    return held


@pytest.fixture(params=["disk", "memory"])
def folder(request, tmp_path):
    """A disk's file system, and one that may know no direct writes."""
    if request.param == "disk":
        return tmp_path
    if not os.access("/dev/shm", os.W_OK):
        pytest.skip("needs /dev/shm")
    path = Path("/dev/shm") / f"ckptd-test-{os.getpid()}"
    path.mkdir()
    request.addfinalizer(lambda: [*map(Path.unlink, path.iterdir()), path.rmdir()])
    return path


@pytest.mark.parametrize("seed", range(6))
def test_pieces_of_a_file_written_by_threads_in_any_order(folder, seed):
    rng = random.Random(seed)
    data = rng.randbytes(rng.randrange(1, 60 * ALIGN_BYTES))
    cuts = sorted({0, len(data), *(rng.randrange(len(data)) for _ in range(8)), *(rng.randrange(len(data)) // ALIGN_BYTES * ALIGN_BYTES for _ in range(3))})
    pieces = [(a, data[a:b]) for a, b in zip(cuts, cuts[1:], strict=False)]
    rng.shuffle(pieces)
    fd = os.open(folder / "x", os.O_RDWR | os.O_CREAT)
    try:
        if seed % 2:
            reserve(fd, len(data))
        os.ftruncate(fd, len(data))
        with DirectFile(fd, LEAST) as file, ThreadPoolExecutor(4) as threads:
            past = sum(threads.map(lambda piece: file.write(buffer(piece[1], piece[0]), piece[0]), pieces))
            file.write(memoryview(data[:5]), 0)  # through the cache, over what went past it
        assert (folder / "x").read_bytes() == data
        assert past % ALIGN_BYTES == 0
        print(f"{past} of {len(data)} bytes past the cache")
    finally:
        os.close(fd)


def test_memory_that_lies_otherwise_than_the_file_goes_through_the_cache(tmp_path):
    fd = os.open(tmp_path / "x", os.O_RDWR | os.O_CREAT)
    data = os.urandom(20 * ALIGN_BYTES)
    with DirectFile(fd, LEAST) as file:
        assert file.write(buffer(data, 0), 100) == 0
        assert file.write(buffer(b"", 0), 7) == 0
    os.close(fd)
    assert (tmp_path / "x").read_bytes() == bytes(100) + data


def test_refused_and_short_writes_are_made_good(tmp_path, monkeypatch):
    """A disk of larger blocks says EINVAL; a full or interrupted write is shorter than asked."""
    data, real, calls = os.urandom(40 * ALIGN_BYTES + 77), os.pwrite, []
    fd = os.open(tmp_path / "x", os.O_RDWR | os.O_CREAT)

    def pwrite(to, view, at):
        calls.append(to == fd)
        if to != fd and len([c for c in calls if not c]) == 3:
            raise OSError(errno.EINVAL, "blocks are larger here")
        return real(to, view[: max(ALIGN_BYTES, len(view) // 2 // ALIGN_BYTES * ALIGN_BYTES)], at)

    monkeypatch.setattr(os, "pwrite", pwrite)
    with DirectFile(fd, LEAST) as file:
        done = file.write(buffer(data, 0), 0)
    os.close(fd)
    assert (tmp_path / "x").read_bytes() == data
    assert 0 <= done < len(data)


def test_other_errors_are_told(tmp_path, monkeypatch):
    fd = os.open(tmp_path / "x", os.O_RDWR | os.O_CREAT)

    def full(*_):
        raise OSError(errno.ENOSPC, "full")

    with DirectFile(fd, LEAST) as file:
        monkeypatch.setattr(os, "pwrite", full)
        with pytest.raises(OSError, match="full"):
            file.write(buffer(bytes(20 * ALIGN_BYTES), 0), 0)
    monkeypatch.setattr(os, "pwrite", lambda *_: 0)
    with pytest.raises(OSError, match="takes no more"):
        write_at(fd, b"x", 0)
    os.close(fd)


def test_its_second_descriptor_is_closed(tmp_path):
    before = len([*Path("/proc/self/fd").iterdir()])
    fd = os.open(tmp_path / "x", os.O_RDWR | os.O_CREAT)
    with DirectFile(fd, LEAST):
        pass
    os.write(fd, b"still open")
    os.close(fd)
    assert len([*Path("/proc/self/fd").iterdir()]) == before
