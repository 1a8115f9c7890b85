"""What a thread had of the processors: time on one, and time that it was ready to run while none was free (`schedstat`; Linux, Documentation/scheduler/sched-stats.rst).

What a rank's own work takes and what others take from it are told apart by this. Not every kernel says it.
"""

from __future__ import annotations

import contextlib
import os
import threading

READ_MAX = 128
US_MAX = 0xFFFFFFFF


class Thread:
    """One thread at a time, of this process or another. The file stays open, so that reading takes a microsecond."""

    def __init__(self) -> None:
        self.id = 0
        self._fd = -1

    def read(self, pid: int, thread: int) -> tuple[int, int]:
        """(on a processor, waiting for one), nanoseconds since it began. Raises OSError where that is not told, ValueError or IndexError for what is no schedstat."""
        if thread != self.id:
            self.close()
            self.id = thread
            self._fd = os.open(f"/proc/{pid}/task/{thread}/schedstat", os.O_RDONLY | os.O_CLOEXEC)
        if self._fd < 0:
            raise FileNotFoundError
        words = os.pread(self._fd, READ_MAX, 0).split()
        return int(words[0]), int(words[1])

    def close(self) -> None:
        """Let go of the file."""
        fd, self._fd, self.id = self._fd, -1, 0
        if fd >= 0:
            with contextlib.suppress(OSError):
                os.close(fd)


class Spent:
    """Of the thread that asks: asked by it once per step."""

    def __init__(self) -> None:
        self._of = Thread()
        self._cpu_ns = self._delay_ns = 0

    def take(self) -> tuple[int, int]:
        """(on a processor, waiting for one), microseconds since this thread asked before; (0, 0) if it did not, or the kernel does not say. Never raises."""
        thread = threading.get_native_id()
        before = (self._cpu_ns, self._delay_ns) if thread == self._of.id else (0, 0)
        try:
            self._cpu_ns, self._delay_ns = self._of.read(os.getpid(), thread)
        except (OSError, ValueError, IndexError):
            self._cpu_ns = self._delay_ns = 0
        if not self._cpu_ns or not before[0]:
            return 0, 0
        return min((self._cpu_ns - before[0]) // 1000, US_MAX), min((self._delay_ns - before[1]) // 1000, US_MAX)

    def close(self) -> None:
        """Let go of the file."""
        self._of.close()
