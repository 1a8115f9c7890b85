"""Connections between daemons: TCP, both ends proven (core/proof.py), every frame bounded and tagged, every wait with a deadline.

The seam at which another transport (RDMA, TLS) takes the place of this one: `dial` and `accept` give a `Connection`, which sends and receives messages, and
raw bytes that were announced by one. It runs on the loop and never blocks it. Whoever takes in many bytes does so in a thread of its own (`in_thread`), for
which `Connection.bulk` gives it the blocking face: each call is one system call for a whole block, straight into the memory where the bytes are wanted.

Bytes are touched once on each side, by the kernel: sent from the mapping they lie in, received into place. Nothing is read ahead of what somebody asked for: what a peer
sends beyond that waits in the kernel's buffers, whose sizes TCP tunes itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import os
import resource
import secrets
import socket
import struct
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from ckptd.core import proof, wire
from ckptd.core.proof import DIALS, LISTENS, Tagger
from ckptd.errors import PeerFailed

RENDEZVOUS = 0
"""The "attempt" of connections in which nodes find each other: real ones begin at 1."""
CONNECT_TIMEOUT_S = 2.0
ANSWER_TIMEOUT_S = 10.0
"""For one message or one megabyte: slower than 100 kB/s is dead for our purposes."""
PART_BYTES = 64 << 10
"""Of a message, read at a time."""
STRANGER_BYTES_MAX = 4096
"""The longest message before an end has proven itself."""
NICE = 5
"""Byte work yields to training: it has until the next step's fence, training has no time at all."""
BURST_S = 0.05
"""What a rate limit lets through at once, after a pause: as many bytes as it allows in this time."""

T = TypeVar("T")


class _Line:
    """A connected socket that does not block: whole frames in, whole buffers out."""

    def __init__(self, sock: socket.socket, address: str) -> None:
        self.sock, self.address = sock, address
        sock.setblocking(False)  # noqa: FBT003  the socket module's own signature
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    async def read(self, count: int) -> bytearray:
        """Raises PeerFailed where the peer hangs up first. Memory is taken as bytes come: what is only announced costs none."""
        loop, data = asyncio.get_running_loop(), bytearray()
        while len(data) < count:
            part = bytearray(min(count - len(data), PART_BYTES))
            size = await loop.sock_recv_into(self.sock, part)
            if size == 0:
                raise self.hung_up()
            data += memoryview(part)[:size]
        return data

    async def frame(self, bytes_max: int, extra: int = 0, *, idle: bool = False) -> bytearray:
        """The body of a frame and `extra` bytes after it. `idle`: its first byte may take as long as it likes."""
        async with asyncio.timeout(None if idle else ANSWER_TIMEOUT_S):
            head = await self.read(1)
        async with asyncio.timeout(ANSWER_TIMEOUT_S):
            head += await self.read(3)
            length = wire.frame_length(head)
            if length > bytes_max:
                msg = f"a frame of {length} bytes from a stranger"
                raise PeerFailed(msg)
            return await self.read(length + extra)

    async def write(self, *buffers: memoryview | bytes) -> None:
        """Until the kernel has all of it; in one system call, where it takes it at once."""
        try:
            sent = self.sock.sendmsg(buffers)
        except (BlockingIOError, InterruptedError):
            sent = 0
        for data in buffers:
            if sent < len(data):
                async with asyncio.timeout(ANSWER_TIMEOUT_S):
                    await asyncio.get_running_loop().sock_sendall(self.sock, memoryview(data)[sent:])
            sent = max(0, sent - len(data))

    def hung_up(self) -> PeerFailed:
        return PeerFailed(f"the daemon at {self.address} hung up")


class Connection:
    """One, between ends that have proven themselves for `job` and `attempt`."""

    def __init__(self, line: _Line, job: str, attempt: int, sends: Tagger, receives: Tagger) -> None:
        self.job, self.attempt = job, attempt
        self._line, self._sends, self._receives = line, sends, receives
        self._queued: list[bytes] = []

    def put(self, message: wire.Message) -> None:
        """Queue a message: it goes out with what is sent next."""
        self._queued.append(_sealed(message, self._sends))

    async def send(self, message: wire.Message) -> None:
        """Send a message. Raises OSError, TimeoutError."""
        self.put(message)
        await self.drained()

    async def send_bytes(self, data: memoryview) -> None:
        """Send bytes that the last message announced, from where they lie."""
        queued, self._queued = self._queued, []
        await self._line.write(*queued, data)

    async def drained(self) -> None:
        """Send what was queued: wait until the kernel has it."""
        queued, self._queued = self._queued, []
        if queued:
            await self._line.write(b"".join(queued))

    async def receive(self, *, idle: bool = False) -> wire.Message:
        """One message; between messages a connection may be `idle` for as long as it likes, within one it may not. Raises PeerFailed, TimeoutError, OSError."""
        return _opened(await self._line.frame(wire.MESSAGE_BYTES_MAX, proof.TAG_BYTES, idle=idle), self._receives)

    async def gone(self) -> None:
        """Wait until the peer hangs up (or says something, where it should not)."""
        await asyncio.get_running_loop().sock_recv(self._line.sock, 1)

    def bulk(self) -> Bulk:
        """For a thread, which from now on has the connection for itself."""
        return Bulk(self._line, self._sends, self._receives)


class Bulk:
    """A connection in the hands of one thread: its calls block, each until its deadline. All raise PeerFailed, OSError."""

    def __init__(self, line: _Line, sends: Tagger, receives: Tagger) -> None:
        self.address = line.address
        self._line, self._sends, self._receives = line, sends, receives
        limit = struct.pack("ll", int(ANSWER_TIMEOUT_S), 0)  # the kernel keeps the deadlines: no call but the one that moves the bytes
        line.sock.setblocking(True)  # noqa: FBT003  the socket module's own signature
        for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
            line.sock.setsockopt(socket.SOL_SOCKET, option, limit)

    def send(self, message: wire.Message) -> None:
        """Send a short message."""
        try:
            self._line.sock.sendall(_sealed(message, self._sends))
        except BlockingIOError as e:
            raise _too_slow(self.address) from e

    def send_bytes(self, data: bytes | memoryview) -> None:
        """Send bytes that the last message announced."""
        try:
            self._line.sock.sendall(data)
        except BlockingIOError as e:
            raise _too_slow(self.address) from e

    def limit_send_buffer(self, count: int) -> None:
        """Have the kernel hold no more than about this much of what was sent and has not arrived."""
        self._line.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, count)

    def receive(self) -> wire.Message:
        """One message."""
        head = bytearray(4)
        self.receive_into(memoryview(head))
        body, left = bytearray(), wire.frame_length(head) + proof.TAG_BYTES
        while left:
            part = bytearray(min(left, PART_BYTES))
            self.receive_into(memoryview(part))
            body, left = body + part, left - len(part)
        return _opened(body, self._receives)

    def receive_into(self, place: memoryview) -> None:
        """Bytes that the last message announced, to where they are wanted."""
        until_s, got = time.monotonic() + ANSWER_TIMEOUT_S, 0
        while got < len(place):
            try:
                size = self._line.sock.recv_into(place[got:], 0, socket.MSG_WAITALL)
            except BlockingIOError as e:
                raise _too_slow(self.address) from e
            if size == 0:
                raise self._line.hung_up()
            got += size
            if got < len(place) and time.monotonic() >= until_s:
                raise _too_slow(self.address)

    def hang_up(self) -> None:
        """Any thread: what waits in a call here fails at once."""
        with contextlib.suppress(OSError):
            self._line.sock.shutdown(socket.SHUT_RDWR)


def _sealed(message: wire.Message, sends: Tagger) -> bytes:
    frame = wire.encode(message)
    return frame + sends.tag(frame[4:])


def _opened(body: bytearray, receives: Tagger) -> wire.Message:
    with memoryview(body) as view:
        said, tag = bytes(view[: -proof.TAG_BYTES]), bytes(view[-proof.TAG_BYTES :])
    if not proof.matches(receives.tag(said), tag):
        msg = "a message is not what the peer sent"
        raise PeerFailed(msg)
    message: wire.Message = wire.decode(said, "remote")
    return message


def _too_slow(address: str) -> PeerFailed:
    return PeerFailed(f"the daemon at {address} did not answer in {ANSWER_TIMEOUT_S:.0f} s")


def raise_fd_limit() -> None:
    """A connection and an arena are a descriptor each: take what the system allows."""
    with contextlib.suppress(OSError, ValueError):
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def be_nice() -> None:
    """In a thread: setpriority's process 0 is the calling thread on Linux."""
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, 0, NICE)


async def in_thread(work: Callable[[], T], stop: Callable[[], None]) -> T:
    """Do work that waits for peers in a thread of its own, so that nobody else waits for them. Cancelled, it is told to `stop`, and has ended when this returns."""
    pool = ThreadPoolExecutor(1, "ckptd-bulk", initializer=be_nice)
    future = asyncio.get_running_loop().run_in_executor(pool, work)
    try:
        return await asyncio.shield(future)
    except asyncio.CancelledError:
        stop()
        await asyncio.wait([future])
        future.exception()  # said to nobody: it is ours
        raise
    finally:
        pool.shutdown(wait=False)
        del future  # it holds an exception that holds this frame, and with it the memory that the work was about


class Rate:
    """A token bucket for bulk bytes, in the order of asking; none where the rate is 0."""

    def __init__(self, bytes_per_s: float) -> None:
        self.bytes_per_s = bytes_per_s
        self._next_s = 0.0
        """When what was let through so far is through, at this rate."""

    async def let_through(self, count: int) -> None:
        """Wait until `count` more bytes may go."""
        if self.bytes_per_s <= 0:
            return
        now_s = time.monotonic()
        begin_s = max(self._next_s, now_s - BURST_S)
        self._next_s = begin_s + count / self.bytes_per_s
        if begin_s > now_s:
            await asyncio.sleep(begin_s - now_s)


async def until_gone(peer: Connection, talk: Coroutine[Any, Any, None]) -> None:
    """Talk on a line on which the peer says nothing; it ends when the peer's daemon does."""
    tasks = {asyncio.ensure_future(peer.gone()), asyncio.create_task(talk)}
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def source_of(host: str) -> str:
    """The address to dial from, for a daemon that listens at `host`: the same, so that the interface is the chosen one; "" (any) for loopback's usual one."""
    return "" if host in {"", "127.0.0.1", "::1"} else host


async def _connect(host: str, port: int, source: str) -> socket.socket:
    loop = asyncio.get_running_loop()
    try:
        family = socket.AF_INET6 if ipaddress.ip_address(host).version == 6 else socket.AF_INET
        where: Any = (host, port)
    except ValueError:  # a seed's name
        family, _, _, _, where = (await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM))[0]
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)  # noqa: FBT003  the socket module's own signature
        if source:
            sock.bind((source, 0))
        await loop.sock_connect(sock, where)
    except BaseException:
        sock.close()
        raise
    return sock


def split_address(address: str) -> tuple[str, int]:
    """HOST:PORT. Raises PeerFailed."""
    host, _, port = address.rpartition(":")
    if not host or not (port.isascii() and port.isdecimal()) or not 0 < int(port) < 1 << 16:
        msg = f"{address!r} is no address of a daemon"
        raise PeerFailed(msg)
    return host, int(port)


@contextlib.asynccontextmanager
async def dial(address: str, job: str, attempt: int, secret: bytes, source: str = "") -> AsyncIterator[Connection]:
    """Connect to a daemon of the job's attempt, from the address `source` if one is given. Raises PeerFailed, OSError, TimeoutError."""
    host, port = split_address(address)
    async with asyncio.timeout(CONNECT_TIMEOUT_S):
        sock = await _connect(host, port, source)
    with sock:
        try:
            line = _Line(sock, address)
            mine = secrets.token_bytes(proof.NONCE_BYTES)
            await line.write(wire.encode(wire.Knock(job=job, attempt=attempt, nonce=mine)))
            answer = wire.decode(await line.frame(STRANGER_BYTES_MAX), "remote")
            theirs = answer.nonce if isinstance(answer, wire.Prove) else b""
            known = isinstance(answer, wire.Prove) and proof.matches(answer.proof, proof.proof(secret, LISTENS, job, attempt, mine, theirs))
            if not known or len(theirs) != proof.NONCE_BYTES:
                msg = f"the daemon at {address} does not know the secret of attempt {attempt} of job {job!r}"
                raise PeerFailed(msg)
            await line.write(wire.encode(wire.Prove(nonce=b"", proof=proof.proof(secret, DIALS, job, attempt, mine, theirs))))
            yield Connection(line, job, attempt, Tagger(secret, DIALS, mine, theirs), Tagger(secret, LISTENS, mine, theirs))
        except TimeoutError as e:
            raise _too_slow(address) from e


async def accept(sock: socket.socket, secret_of: Callable[[str, int], bytes | None]) -> Connection | None:
    """Who dialled, once it has proven itself; None for strangers. `secret_of`: (job, attempt) -> its secret, if this daemon is of that attempt."""
    line = _Line(sock, "that dialled")
    knock = wire.decode(await line.frame(STRANGER_BYTES_MAX), "remote")
    secret = secret_of(knock.job, knock.attempt) if isinstance(knock, wire.Knock) else None
    if not isinstance(knock, wire.Knock) or secret is None or len(knock.nonce) != proof.NONCE_BYTES:
        return None
    mine = secrets.token_bytes(proof.NONCE_BYTES)
    who = knock.job, knock.attempt, knock.nonce, mine
    await line.write(wire.encode(wire.Prove(nonce=mine, proof=proof.proof(secret, LISTENS, *who))))
    answer = wire.decode(await line.frame(STRANGER_BYTES_MAX), "remote")
    if not isinstance(answer, wire.Prove) or not proof.matches(answer.proof, proof.proof(secret, DIALS, *who)):
        return None
    tags = Tagger(secret, LISTENS, knock.nonce, mine), Tagger(secret, DIALS, knock.nonce, mine)
    return Connection(line, knock.job, knock.attempt, *tags)
