"""A file that is written past the page cache: aligned bytes straight from the caller's memory (O_DIRECT), what is not aligned through the cache.

A checkpoint of the size of the node's memory would otherwise push out the data loader's pages, and read-back would come from the cache and prove nothing
about the disk. It takes less of the processor, which copies nothing, and less time where pages of the cache are touched for the first time.

Invariant: one page is never written both ways at the same time. What goes past the cache is whole pages; the parts of pages at its two ends go through it, which writers
of what lies beside may share.
"""

from __future__ import annotations

import ctypes
import errno
import os
from typing import Self

import numpy as np

ALIGN_BYTES = 4096
"""What O_DIRECT asks of address, offset and length on every disk of today (logical blocks are 512 or 4096 bytes)."""
PIECE_BYTES = 16 << 20
"""One write call: long enough to keep a disk busy, short enough that a signal is answered."""

_libc = ctypes.CDLL(None, use_errno=True)


class DirectFile:
    """Writes to the open file `fd`, which stays its owner's. Any number of threads may write, each to bytes of its own."""

    def __init__(self, fd: int, least_bytes: int) -> None:
        """`least_bytes`: what is shorter goes through the cache."""
        self._fd = fd
        self._least_bytes = least_bytes
        try:  # a second description of the same file: flags are a description's, and threads that write through the cache must not meet O_DIRECT
            self._past = os.open(f"/proc/self/fd/{fd}", os.O_WRONLY | os.O_DIRECT | os.O_CLOEXEC)
        except OSError:  # this file system has no direct writes, or there is no /proc
            self._past = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """No more is written; `fd` stays open."""
        if self._past >= 0:
            os.close(self._past)
            self._past = -1

    def write(self, data: memoryview, at: int) -> int:
        """All of it, to `at`; how many bytes went past the cache. Raises OSError."""
        before = -at % ALIGN_BYTES
        whole = (len(data) - before) // ALIGN_BYTES * ALIGN_BYTES
        if self._past < 0 or whole < max(self._least_bytes, 1) or (_address(data) + before) % ALIGN_BYTES:
            write_at(self._fd, data, at)
            return 0
        write_at(self._fd, data[:before], at)
        done = self._write_past(data[before : before + whole], at + before)
        write_at(self._fd, data[before + done :], at + before + done)
        return done

    def _write_past(self, data: memoryview, at: int) -> int:
        """As much as goes."""
        done = 0
        while done < len(data):
            try:
                n = os.pwrite(self._past, data[done : done + PIECE_BYTES], at + done)
            except OSError as e:
                if e.errno != errno.EINVAL:  # EINVAL: this disk's block size has no direct writes for us
                    raise
                return done
            done += n
            if n == 0 or n % ALIGN_BYTES:
                return done  # the rest is no longer aligned
        return done


def write_at(fd: int, data: bytes | memoryview, at: int) -> None:
    """All of it, through the page cache. Raises OSError."""
    view = memoryview(data)
    while view:
        n = os.pwrite(fd, view[:PIECE_BYTES], at)
        if n == 0:
            raise OSError(errno.EIO, "the file system takes no more bytes and gives no reason")
        view, at = view[n:], at + n


def reserve(fd: int, size_bytes: int) -> None:
    """Ask for the space before the first byte, so that a full disk is told at once and not after forty gigabytes. The file gets that size, where the file system can reserve.

    Raises OSError. posix_fallocate is no choice: where the file system has no fallocate (NFS before 4.2), glibc writes a byte into every block instead.
    """
    if size_bytes == 0 or _libc.fallocate(fd, 0, ctypes.c_int64(0), ctypes.c_int64(size_bytes)) == 0:
        return
    code = ctypes.get_errno()
    if code not in {errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.EINTR, errno.ENODEV}:
        raise OSError(code, os.strerror(code))


def _address(data: memoryview) -> int:
    address: int = np.frombuffer(data, np.uint8).ctypes.data
    return address
