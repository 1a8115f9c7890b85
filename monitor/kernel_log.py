"""What the kernel says that explains a slow or dead rank: Xid, machine checks, the OOM killer, links that flap, I/O errors, hung tasks.

`KernelLog` reads /dev/kmsg where it may, from now on, without ever waiting; `parse` and `classify` are pure. Patterns are of the kernel's own sources (mm/oom_kill.c,
kernel/hung_task.c, block/blk-core.c, drivers/edac, arch/x86/kernel/cpu/mce, drivers/net) and of NVIDIA's "Xid Errors" manual; what is not recognised is no event.

A pid in it is of the kernel's first pid namespace: in a container it is not the one that the container sees.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
from dataclasses import dataclass

PATH = "/dev/kmsg"
RECORD_BYTES = 8192
"""The kernel gives one record per read, and none that is longer (CONSOLE_EXT_LOG_MAX)."""
READS_MAX = 512
"""Records per look: a kernel that shouts is heard in parts."""
WORDS_MAX = 200


@dataclass(frozen=True, slots=True)
class Event:
    """One thing that the kernel said. `device`: "0000:3b:00" (PCI), "eth0", "sda" ...; `pid`: the process that it is about, 0: none is named."""

    kind: str
    words: str
    device: str = ""
    pid: int = 0
    code: int = 0
    """Of an Xid."""


def parse(record: bytes) -> tuple[int, str]:
    """(level 0 to 7, text) of a record of /dev/kmsg: "prefix,sequence,time,flags;text", then lines of KEY=value. Level 7 and the whole line where it is none."""
    line = record.split(b"\n", 1)[0].decode(errors="replace")
    head, found, text = line.partition(";")
    first = head.split(",", 1)[0]
    return (int(first) & 7, text) if found and first.isdecimal() else (7, line)


_NIC = r"(?P<device>[\w.-]+):? (?:NIC )?Link (?:is )?"
_PATTERNS: tuple[tuple[str, re.Pattern[str]], ...] = tuple(
    (kind, re.compile(pattern, re.IGNORECASE))
    for kind, pattern in (
        ("xid", r"NVRM: Xid \(PCI:(?P<device>[\da-f:.]+)\): (?P<code>\d+)(?:, pid='?(?P<pid>\d+)'?)?"),
        ("sxid", r"nvidia-nvswitch(?P<device>\d+): SXid \(PCI:[\da-f:.]+\): (?P<code>\d+)"),
        ("oom-kill", r"(?:Out of memory|Memory cgroup out of memory): Killed process (?P<pid>\d+)"),
        ("mce", r"(?:mce: )?\[Hardware Error\]: (?!.*corrected).*"),
        ("edac", r"EDAC (?P<device>MC\d+|\w+): \d+ (?:CE|UE) "),
        ("hung-task", r"INFO: task \S+:(?P<pid>\d+) blocked for more than \d+ seconds"),
        ("soft-lockup", r"watchdog: BUG: soft lockup - CPU#\d+ stuck for \d+s! \[[^\]]*:(?P<pid>\d+)\]"),
        ("io-error", r"I/O error, dev (?P<device>[\w/-]+)"),
        ("io-error", r"Buffer I/O error on dev(?:ice)? (?P<device>[\w/-]+)"),
        ("io-error", r"(?P<device>nvme\d+): (?:I/O|I/O tag) .*timeout"),
        ("io-error", r"(?:EXT4-fs|BTRFS) (?:error|critical) \(device (?P<device>[\w/-]+)\)"),
        ("io-error", r"XFS \((?P<device>[\w/-]+)\): .*(?:I/O error|corruption|shutting down)"),
        ("nfs", r"nfs: server (?P<device>\S+) not responding"),
        ("nic-down", rf"{_NIC}down"),
        ("nic-up", rf"{_NIC}up"),
        ("cpu-thermal", r"(?P<device>CPU\d+): (?:Core|Package) temperature.* above threshold"),
        ("segfault", r"\S+\[(?P<pid>\d+)\]: segfault at "),
        ("segfault", r"traps: \S+\[(?P<pid>\d+)\] (?:general protection fault|trap )"),
    )
)
FATAL = frozenset({"oom-kill", "segfault"})
"""Kinds that end the process they name."""


def classify(text: str) -> Event | None:
    """What a line says, if it is something that matters here."""
    for kind, pattern in _PATTERNS:
        found = pattern.search(text)
        if found is not None:
            said = found.groupdict()
            return Event(kind, text.strip()[:WORDS_MAX], said.get("device") or "", int(said.get("pid") or 0), int(said.get("code") or 0))
    return None


class KernelLog:
    """The kernel's log from now on. One thread; nothing waits, nothing raises: where it may not be read there are no events (`readable`)."""

    def __init__(self, path: str = PATH) -> None:
        self._fd = -1
        self.lost = 0
        """Times that the kernel had overwritten what was not read yet."""
        with contextlib.suppress(OSError):
            self._fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOFOLLOW)
        with contextlib.suppress(OSError):
            if self._fd >= 0:
                os.lseek(self._fd, 0, os.SEEK_END)

    @property
    def readable(self) -> bool:
        """Whether anything will ever come."""
        return self._fd >= 0

    def read(self) -> list[Event]:
        """What was said since the last time, as far as it matters here, oldest first."""
        found: list[Event] = []
        for _ in range(READS_MAX if self._fd >= 0 else 0):
            try:
                record = os.read(self._fd, RECORD_BYTES)
            except OSError as e:
                if e.errno != errno.EPIPE:  # EAGAIN: that was all
                    break
                self.lost += 1
                continue
            if not record:
                break
            event = classify(parse(record)[1])
            if event is not None:
                found.append(event)
        return found

    def close(self) -> None:
        """Once."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
