"""A Unix stream socket that carries messages and file descriptors, for an asyncio loop (`Channel`) or for a thread (`connect`, `Pipe`).

Both ends: nothing here blocks on a peer. Reads are framed and bounded (`core.wire`), writes are queued and bounded; a peer that does not
read loses its connection, never our time.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import stat
import struct
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ckptd.core import wire
from ckptd.errors import BadArgument, DaemonUnreachable, PeerFailed

READ_BYTES = 4 << 10
"""Handled in one go: a client that floods its daemon with requests delays others by a hundred or two of them."""
FDS_MAX = 64
"""Descriptors received and not yet claimed by a message; more is a flood."""
QUEUE_BYTES_MAX = 64 << 20
"""Unsent bytes at which a peer counts as gone: four of the longest messages."""
QUEUE_MESSAGES_MAX = 10_000
"""And unsent messages: small ones cost more than their bytes."""
SO_PEERPIDFD = 77
"""Linux 6.5; not in Python's socket module."""


def socket_path(directory: str | None = None) -> Path:
    """The daemon's socket: in `directory`, $CKPTD_DIR, $RUNTIME_DIRECTORY (systemd), $XDG_RUNTIME_DIR/ckptd or /tmp/ckptd-<uid>."""
    env = os.environ
    base = directory or env.get("CKPTD_DIR") or env.get("RUNTIME_DIRECTORY", "").split(":")[0]
    if not base:
        runtime = env.get("XDG_RUNTIME_DIR")
        base = f"{runtime}/ckptd" if runtime else f"/tmp/ckptd-{os.getuid()}"  # noqa: S108  0700 and owner are checked
    return Path(base) / "daemon.sock"


def private_directory(path: Path) -> None:
    """Make `path` 0700 and ours. Raises BadArgument if it belongs to somebody else or is open to others."""
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    info = path.lstat()
    if path.is_symlink() or info.st_uid != os.getuid() or info.st_mode & 0o077:
        msg = f"{path}: the socket's directory must be ours alone (0700), and no symlink"
        raise BadArgument(msg, remedy=f"rm -r {path} if nothing of yours is in it, or give another with --dir or CKPTD_DIR")


def read_private(option: str, file: str, bytes_max: int) -> bytes:
    """What is in a file that must be ours and nobody else's: secrets. `option`: who named it. Raises BadArgument."""
    try:
        fd = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # what was opened is looked at before it is read: a pipe would hang
        with os.fdopen(fd, "rb") as f:
            info = os.fstat(fd)
            data = f.read(bytes_max) if stat.S_ISREG(info.st_mode) else b""
    except (OSError, ValueError) as e:
        msg = f"{option} {file}: {e}"
        raise BadArgument(msg) from e
    if not stat.S_ISREG(info.st_mode) or info.st_uid not in {os.getuid(), 0} or info.st_mode & 0o077:
        msg = f"{option} {file}: it must be ours and nobody else's (0600)"
        raise BadArgument(msg, remedy=f"chmod 600 {file}")
    return data


def listen(path: Path) -> socket.socket:
    """A listening socket at `path`, bound under a name of its own with mode 0600, then renamed: nobody connects to a half-made one, and no stale one is in the way."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    temporary = path.with_name(f".daemon.{os.getpid()}.sock")
    temporary.unlink(missing_ok=True)
    old = os.umask(0o177)
    try:
        listener.bind(str(temporary))
    finally:
        os.umask(old)
    listener.listen(1024)
    listener.setblocking(False)  # noqa: FBT003  the socket module's own signature
    temporary.rename(path)
    return listener


def peer_of(sock: socket.socket) -> tuple[int, int]:
    """(pid, uid) of the process at the other end, as the kernel says."""
    pid, uid, _ = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return pid, uid


def pidfd_of(sock: socket.socket, pid: int) -> int:
    """A pidfd of the process at the other end; by the socket where the kernel can (no pid reuse), else by its pid."""
    try:
        return sock.getsockopt(socket.SOL_SOCKET, SO_PEERPIDFD)
    except OSError:
        return os.pidfd_open(pid)


class Pipe:
    """Framing over a non-blocking socket: the part that loop and thread share."""

    def __init__(self, sock: socket.socket, kind: str = "local") -> None:
        """`kind`: "daemon" for a daemon's end, which takes only what it is asked; "local" for a client's."""
        sock.setblocking(False)  # noqa: FBT003  the socket module's own signature
        self.sock = sock
        self._framer = wire.Framer(kind)
        self._fds: deque[int] = deque()
        self._out: deque[tuple[bytes, int | None]] = deque()
        self._out_bytes = 0

    @property
    def wants_write(self) -> bool:
        """Whether something is queued."""
        return bool(self._out)

    def read(self) -> list[Any]:
        """Messages that have arrived. Raises EOFError at the end, PeerFailed for garbage."""
        try:
            data, fds, _, _ = socket.recv_fds(self.sock, READ_BYTES, 16)
        except BlockingIOError:
            return []
        for fd in fds:
            os.set_inheritable(fd, False)  # noqa: FBT003  os's own signature; recv_fds drops its flags, so MSG_CMSG_CLOEXEC does nothing
        self._fds.extend(fds)
        if len(self._fds) > FDS_MAX:
            msg = "too many file descriptors"
            raise PeerFailed(msg)
        if not data:
            raise EOFError
        return list(self._framer.feed(data))

    def take_fd(self) -> int:
        """The descriptor that came with the message just read. Raises PeerFailed if there is none."""
        if not self._fds:
            msg = "a message came without its file descriptor"
            raise PeerFailed(msg)
        return self._fds.popleft()

    def put(self, message: wire.Message, fd: int | None = None) -> None:
        """Queue a message; a descriptor is duplicated and stays the caller's. Raises PeerFailed if the peer reads nothing."""
        frame = wire.encode(message)
        self._out_bytes += len(frame)
        if self._out_bytes > QUEUE_BYTES_MAX or len(self._out) >= QUEUE_MESSAGES_MAX:
            msg = "the other end does not read"
            raise PeerFailed(msg)
        self._out.append((frame, None if fd is None else os.dup(fd)))

    def flush(self) -> None:
        """Send what the socket takes. Raises OSError when the peer is gone."""
        while self._out:
            frame, fd = self._out[0]
            try:
                sent = self.sock.send(frame) if fd is None else socket.send_fds(self.sock, [frame], [fd])
            except BlockingIOError:
                return
            self._out_bytes -= sent
            if fd is not None:
                os.close(fd)
            if sent == len(frame):
                self._out.popleft()
            else:
                self._out[0] = (frame[sent:], None)

    def close(self) -> None:
        """Close the socket and every descriptor that nobody claimed."""
        for fd in [*self._fds, *(fd for _, fd in self._out if fd is not None)]:
            os.close(fd)
        self._fds.clear()
        self._out.clear()
        self.sock.close()


def connect(path: Path, timeout_s: float) -> Pipe:
    """A pipe to the daemon at `path`. Raises DaemonUnreachable; checks that the daemon is ours (or root's)."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.settimeout(timeout_s)
    try:
        sock.connect(str(path))
        _, uid = peer_of(sock)
    except OSError as e:
        sock.close()
        msg = f"no daemon answers at {path}: {e.strerror or e}"
        raise DaemonUnreachable(msg, remedy="start one with `ckptd daemon`, or launch with `ckptd run`") from e
    if uid not in {os.getuid(), 0}:
        sock.close()
        msg = f"the daemon at {path} belongs to user {uid}"
        raise DaemonUnreachable(msg, remedy="give your own directory with CKPTD_DIR")
    return Pipe(sock)


class Channel:
    """A pipe on an asyncio loop. `on_message(channel, message)` is called for each message, `on_close(channel)` once."""

    def __init__(
        self, pipe: Pipe, on_message: Callable[[Channel, Any], None], on_close: Callable[[Channel, str], None]
    ) -> None:
        self.pipe = pipe
        self.closed = False
        self.owner: Any = None
        self._on_message = on_message
        self._on_close = on_close
        self._loop = asyncio.get_running_loop()
        self._writing = False
        self._loop.add_reader(pipe.sock, self._readable)

    def send(self, message: wire.Message, fd: int | None = None) -> None:
        """Queue and send; a peer that fails is closed, never waited for."""
        if self.closed:
            return
        try:
            self.pipe.put(message, fd)
        except PeerFailed as e:
            self.close(e.message)
            return
        self._writable()

    def close(self, why: str) -> None:
        """Close once; later calls do nothing."""
        if self.closed:
            return
        self.closed = True
        self._loop.remove_reader(self.pipe.sock)
        with contextlib.suppress(OSError, ValueError):
            self._loop.remove_writer(self.pipe.sock)
        self.pipe.close()
        self._on_close(self, why)

    def _readable(self) -> None:
        try:
            for message in self.pipe.read():
                if not self.closed:
                    self._on_message(self, message)
        except EOFError:
            self.close("")
        except (PeerFailed, OSError) as e:
            self.close(str(e))

    def _writable(self) -> None:
        try:
            self.pipe.flush()
        except OSError as e:
            self.close(e.strerror or str(e))
            return
        if self.pipe.wants_write != self._writing:
            self._writing = self.pipe.wants_write
            if self._writing:
                self._loop.add_writer(self.pipe.sock, self._writable)
            else:
                self._loop.remove_writer(self.pipe.sock)
