"""Starting a daemon for this node, detached from whoever needed it first."""

from __future__ import annotations

import contextlib
import fcntl
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from ckptd.channel import connect, private_directory, socket_path
from ckptd.errors import DaemonUnreachable

LINGER_S = 600.0
"""A daemon that a job started leaves this long after the last client: a requeued job finds its snapshots, an idle node its memory."""


def start_daemon(
    directory: str | None, *, linger_s: float = LINGER_S, arenas: Sequence[int] = (), options: Sequence[str] = ()
) -> subprocess.Popen[bytes]:
    """Start `ckptd daemon` in a session of its own, its log beside its socket. `arenas`: descriptors that it is to adopt.

    Descriptors are handed over as systemd does it: LISTEN_FDS, beginning at 3.
    """
    path = socket_path(directory)
    private_directory(path.parent)
    command = [sys.executable, "-m", "ckptd.cli.main", "daemon", "--dir", str(path.parent), "--linger-s", str(linger_s), *options]
    env = {k: v for k, v in os.environ.items() if not k.startswith("LISTEN_")}
    high = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, HIGH_FD) for fd in arenas]
    if arenas:
        env |= {"LISTEN_FDS": str(len(arenas)), "LISTEN_FDNAMES": ":".join(["arena"] * len(arenas))}
        command = [sys.executable, "-S", "-c", _HAND_OVER, *map(str, high), "--", *command]
    try:
        with (path.parent / "daemon.log").open("ab") as log_file:
            return subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log_file, stderr=log_file, start_new_session=True, env=env, pass_fds=high
            )
    finally:
        for fd in high:
            os.close(fd)


def leave(process: subprocess.Popen[bytes]) -> None:
    """This daemon outlives us, and nobody here will wait for it: a Popen that is collected while its process runs would warn about that."""
    process.returncode = 0


HIGH_FD = 256
"""Descriptors travel above the places that they move to (3, 4, ...)."""
_HAND_OVER = """
import os, sys
at = sys.argv.index("--")
for place, fd in enumerate(map(int, sys.argv[1:at]), 3):
    os.dup2(fd, place)
    os.close(fd)
os.environ["LISTEN_PID"] = str(os.getpid())
os.execv(sys.argv[at + 1], sys.argv[at + 1 :])
"""
"""What runs between fork and exec: descriptors to their places, and LISTEN_PID, which only the child knows."""


def is_up(path: Path, timeout_s: float) -> bool:
    """Whether somebody listens at `path`, now or within `timeout_s`."""
    until_s = time.monotonic() + timeout_s
    while True:
        with contextlib.suppress(DaemonUnreachable):
            connect(path, timeout_s).close()
            return True
        if time.monotonic() > until_s:
            return False
        time.sleep(0.02)


def await_socket(path: Path, timeout_s: float) -> None:
    """Wait until a daemon listens. Raises DaemonUnreachable."""
    if not is_up(path, timeout_s):
        msg = f"no daemon came up at {path} within {timeout_s:.0f} s"
        raise DaemonUnreachable(msg, remedy=f"its log is {path.with_name('daemon.log')}")
