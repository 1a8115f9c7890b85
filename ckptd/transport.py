"""Connections between daemons: TCP, both ends proven (core/proof.py), every frame bounded and tagged, every wait with a deadline.

The seam at which another transport (RDMA, TLS) takes the place of this one: `dial` and `accept` give a `Connection`, which sends and receives messages, and
raw bytes that were announced by one.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

from ckptd.core import proof, wire
from ckptd.core.proof import DIALS, LISTENS, Tagger
from ckptd.errors import PeerFailed

RENDEZVOUS = 0
"""The "attempt" of connections in which nodes find each other: real ones begin at 1."""
CONNECT_TIMEOUT_S = 2.0
ANSWER_TIMEOUT_S = 10.0
"""For one message or one megabyte: slower than 100 kB/s is dead for our purposes."""
READ_AHEAD_BYTES = 1 << 20
"""asyncio buffers twice as much per connection before anybody asked for it; longer messages are read in pieces."""
STRANGER_BYTES_MAX = 4096
"""The longest message before an end has proven itself."""


class Connection:
    """One, between ends that have proven themselves for `job` and `attempt`."""

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, job: str, attempt: int, sends: Tagger, receives: Tagger
    ) -> None:
        self.job, self.attempt = job, attempt
        self._reader, self._writer, self._sends, self._receives = reader, writer, sends, receives

    def put(self, message: wire.Message) -> None:
        """Queue a message."""
        frame = wire.encode(message)
        self._writer.write(frame + self._sends.tag(frame[4:]))

    async def send(self, message: wire.Message) -> None:
        """Send a message. Raises OSError, TimeoutError."""
        self.put(message)
        await self.drained()

    async def send_bytes(self, data: memoryview) -> None:
        """Send bytes that the last message announced."""
        self._writer.write(data)
        await self.drained()

    async def drained(self) -> None:
        """Wait until the peer has taken most of what was queued."""
        async with asyncio.timeout(ANSWER_TIMEOUT_S):
            await self._writer.drain()

    async def receive(self, *, idle: bool = False) -> wire.Message:
        """One message; between messages a connection may be `idle` for as long as it likes, within one it may not. Raises PeerFailed, TimeoutError, OSError."""
        body = await _frame(self._reader, wire.MESSAGE_BYTES_MAX, proof.TAG_BYTES, idle=idle)
        body, tag = body[: -proof.TAG_BYTES], body[-proof.TAG_BYTES :]
        if not proof.matches(self._receives.tag(body), tag):
            msg = "a message is not what the peer sent"
            raise PeerFailed(msg)
        message: wire.Message = wire.decode(body, "remote")
        return message

    async def receive_bytes(self, count: int) -> bytes:
        """Bytes that the last message announced."""
        async with asyncio.timeout(ANSWER_TIMEOUT_S):
            return await self._reader.readexactly(count)

    async def gone(self) -> None:
        """Wait until the peer hangs up (or says something, where it should not)."""
        await self._reader.read(1)


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


@contextlib.asynccontextmanager
async def dial(address: str, job: str, attempt: int, secret: bytes) -> AsyncIterator[Connection]:
    """Connect to a daemon of the job's attempt. Raises PeerFailed, OSError, TimeoutError."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 1 << 16:
        msg = f"{address!r} is no address of a daemon"
        raise PeerFailed(msg)
    async with asyncio.timeout(CONNECT_TIMEOUT_S):
        reader, writer = await asyncio.open_connection(host, int(port), limit=READ_AHEAD_BYTES)
    try:
        mine = secrets.token_bytes(proof.NONCE_BYTES)
        writer.write(wire.encode(wire.Knock(job=job, attempt=attempt, nonce=mine)))
        answer = wire.decode(await _frame(reader, STRANGER_BYTES_MAX), "remote")
        theirs = answer.nonce if isinstance(answer, wire.Prove) else b""
        known = isinstance(answer, wire.Prove) and proof.matches(answer.proof, proof.proof(secret, LISTENS, job, attempt, mine, theirs))
        if not known or len(theirs) != proof.NONCE_BYTES:
            msg = f"the daemon at {address} does not know the secret of attempt {attempt} of job {job!r}"
            raise PeerFailed(msg)
        writer.write(wire.encode(wire.Prove(nonce=b"", proof=proof.proof(secret, DIALS, job, attempt, mine, theirs))))
        yield Connection(reader, writer, job, attempt, Tagger(secret, DIALS, mine, theirs), Tagger(secret, LISTENS, mine, theirs))
    except asyncio.IncompleteReadError as e:
        msg = f"the daemon at {address} hung up"
        raise PeerFailed(msg) from e
    except TimeoutError as e:
        msg = f"the daemon at {address} did not answer in {ANSWER_TIMEOUT_S:.0f} s"
        raise PeerFailed(msg) from e
    finally:
        writer.close()


async def accept(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, secret_of: Callable[[str, int], bytes | None]
) -> Connection | None:
    """Who dialled, once it has proven itself; None for strangers. `secret_of`: (job, attempt) -> its secret, if this daemon is of that attempt."""
    knock = wire.decode(await _frame(reader, STRANGER_BYTES_MAX), "remote")
    secret = secret_of(knock.job, knock.attempt) if isinstance(knock, wire.Knock) else None
    if not isinstance(knock, wire.Knock) or secret is None or len(knock.nonce) != proof.NONCE_BYTES:
        return None
    mine = secrets.token_bytes(proof.NONCE_BYTES)
    who = knock.job, knock.attempt, knock.nonce, mine
    writer.write(wire.encode(wire.Prove(nonce=mine, proof=proof.proof(secret, LISTENS, *who))))
    answer = wire.decode(await _frame(reader, STRANGER_BYTES_MAX), "remote")
    if not isinstance(answer, wire.Prove) or not proof.matches(answer.proof, proof.proof(secret, DIALS, *who)):
        return None
    tags = Tagger(secret, LISTENS, knock.nonce, mine), Tagger(secret, DIALS, knock.nonce, mine)
    return Connection(reader, writer, knock.job, knock.attempt, *tags)


async def _frame(reader: asyncio.StreamReader, bytes_max: int, extra: int = 0, *, idle: bool = False) -> bytes:
    """The body of a frame and `extra` bytes after it."""
    if idle:
        head = await reader.readexactly(4)
    else:
        async with asyncio.timeout(ANSWER_TIMEOUT_S):
            head = await reader.readexactly(4)
    length = wire.frame_length(head)
    if length > bytes_max:
        msg = f"a frame of {length} bytes from a stranger"
        raise PeerFailed(msg)
    async with asyncio.timeout(ANSWER_TIMEOUT_S):
        return await reader.readexactly(length + extra)
