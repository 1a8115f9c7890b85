"""systemd's notify and file-descriptor-store protocol, without a library: sd_notify(3), sd_listen_fds(3), sd_watchdog_enabled(3).

A unit with `FileDescriptorStoreMax=` keeps the descriptors that are sent with FDSTORE=1 and hands them back in $LISTEN_FDS when it starts
the daemon again. The launcher speaks the same protocol to its daemon. Outside both, every call here does nothing.
"""

from __future__ import annotations

import contextlib
import os
import socket
import stat
from collections.abc import Iterator

FIRST_FD = 3


def notify(state: str, fd: int | None = None) -> None:
    """Send one notification, with a descriptor if given. A service manager that does not listen is no error of ours."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return
    if address.startswith("@"):
        address = "\0" + address[1:]
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.settimeout(1.0)
        sock.connect(address)
        if fd is None:
            sock.send(state.encode())
        else:
            socket.send_fds(sock, [state.encode()], [fd])


def store_fd(name: str, fd: int) -> None:
    """Have the service manager hold a copy of `fd`. The watch for hang-ups is off: a memfd never hangs up."""
    notify(f"FDSTORE=1\nFDPOLL=0\nFDNAME={name}", fd)


def drop_fd(name: str) -> None:
    """Have it let go of that copy."""
    notify(f"FDSTOREREMOVE=1\nFDNAME={name}")


def handed_fds() -> Iterator[tuple[str, int]]:
    """(name, fd) of the descriptors handed to this process at its start; the environment is cleaned, so that children inherit none."""
    pid, count = os.environ.pop("LISTEN_PID", ""), os.environ.pop("LISTEN_FDS", "")
    names = os.environ.pop("LISTEN_FDNAMES", "").split(":")
    if pid != str(os.getpid()) or not count.isdigit():
        return
    for i in range(int(count)):
        fd = FIRST_FD + i
        os.set_inheritable(fd, False)  # noqa: FBT003  os's own signature
        yield (names[i] if i < len(names) else ""), fd


def is_memory(fd: int) -> bool:
    """Whether `fd` could be an arena: a regular file without a name in any directory."""
    info = os.fstat(fd)
    return stat.S_ISREG(info.st_mode) and info.st_nlink == 0


def watchdog_s() -> float:
    """Seconds between the signs of life that the service manager wants; 0 if it wants none."""
    usec = os.environ.get("WATCHDOG_USEC", "")
    pid = os.environ.get("WATCHDOG_PID", str(os.getpid()))
    return int(usec) / 2e6 if usec.isdigit() and pid == str(os.getpid()) else 0.0
