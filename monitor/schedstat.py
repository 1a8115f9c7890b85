"""What a thread had of the processors: time on one, and time that it was ready to run while none was free (`schedstat`; Linux, Documentation/scheduler/sched-stats.rst).

What a rank's own work takes and what others take from it are told apart by this. Not every kernel says it.
"""

from __future__ import annotations

import contextlib
import os
import threading

READ_MAX = 128
US_MAX = 0xFFFFFFFF


def read(fd: int) -> tuple[int, int]:
    """(on a processor, waiting for one), nanoseconds since the thread began. Raises OSError when it is gone, ValueError for what is no schedstat."""
    words = os.pread(fd, READ_MAX, 0).split()
    if len(words) < 2:
        msg = "no schedstat"
        raise ValueError(msg)
    return int(words[0]), int(words[1])


class Spent:
    """Of the thread that asks: asked by it once per step. The file stays open, so that asking takes two microseconds."""

    def __init__(self) -> None:
        self._thread = 0
        self._fd = -1
        self._cpu_ns = self._delay_ns = 0

    def take(self) -> tuple[int, int]:
        """(on a processor, waiting for one), microseconds since this thread asked before; (0, 0) if it did not, or the kernel does not say. Never raises."""
        thread = threading.get_native_id()
        before = self._cpu_ns, self._delay_ns
        try:
            if thread != self._thread:
                self.close()
                self._thread, before = thread, (0, 0)
                self._fd = os.open(f"/proc/self/task/{thread}/schedstat", os.O_RDONLY | os.O_CLOEXEC)
            self._cpu_ns, self._delay_ns = read(self._fd) if self._fd >= 0 else (0, 0)
        except (OSError, ValueError):
            self._cpu_ns = self._delay_ns = 0
        if not self._cpu_ns or not before[0]:
            return 0, 0
        return min((self._cpu_ns - before[0]) // 1000, US_MAX), min((self._delay_ns - before[1]) // 1000, US_MAX)

    def close(self) -> None:
        """Let go of the file."""
        fd, self._fd, self._thread = self._fd, -1, 0
        if fd >= 0:
            with contextlib.suppress(OSError):
                os.close(fd)
