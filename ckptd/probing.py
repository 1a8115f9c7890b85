"""How fast bytes go from this node to another, measured: daemon to daemon, in a connection of its own, by the same transport as images.

    transfer (the sender)  Transfer + bytes, Transfer + bytes, ..., the last one says so   -->  receive (the other daemon)
                           <-- Transferred: bytes and time, as they came in there

What is measured is one direction: what came in at the receiver from its first bytes on, by the receiver's clock alone. What the sender's kernel still buffers is in nobody's rate; its buffer is
kept small, so that a slow link is seen soon. Who pairs nodes so that no two measurements disturb each other is the engine; a node takes part in RECEIVED_AT_ONCE_MAX at a time, at most.

Bounds: SECONDS and BYTES_MAX of sending, DEADLINE_S for all of it, the daemon's own rate limit (`--peer-rate`), which a measurement therefore never exceeds. A node that does not answer, is
refused or is slower than the transport waits for has rate 0. Only daemons of the job's attempt are heard (transport.py).
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from typing import TYPE_CHECKING

from ckptd import transport
from ckptd.core import wire
from ckptd.errors import PeerFailed

if TYPE_CHECKING:
    from ckptd.peers import Peers
    from ckptd.transport import Bulk, Connection

log = logging.getLogger("ckptd.probing")

SECONDS = 0.3
BYTES_MAX = 256 << 20
CHUNK_BYTES = 256 << 10
SEND_BUFFER_BYTES = 512 << 10
"""Enough for 10 Gbit/s at a round trip of 0.4 ms; more would hide a slow link behind the kernel's memory for longer."""
DEADLINE_S = 8.0
RECEIVED_AT_ONCE_MAX = 4
SKIPPED = 8
"""One of so many chunks, at the beginning, is not counted: TCP's slow start, and what a shaper lets through at once."""

_ZEROS = bytes(CHUNK_BYTES)


async def transfer(peers: Peers, job: str, node: int, *, seconds: float = SECONDS, bytes_max: int = BYTES_MAX, deadline_s: float = DEADLINE_S) -> float:
    """Bytes per second from this node to `node` of the job; 0 where nothing came through. Raises NotFound where this daemon is not of the job, or knows no such node."""
    address = peers.address_of(job, node)
    loop = asyncio.get_running_loop()
    stop = threading.Event()
    try:
        async with asyncio.timeout(deadline_s), peers.dial(address, job) as peer:
            bulk = peer.bulk()

            def allow(count: int) -> None:
                if peers.rate.bytes_per_s > 0:
                    asyncio.run_coroutine_threadsafe(peers.rate.let_through(count), loop).result(deadline_s)

            def send() -> wire.Message:
                bulk.limit_send_buffer(SEND_BUFFER_BYTES)
                until_s, sent, last = time.monotonic() + seconds, 0, False
                while not last:
                    allow(CHUNK_BYTES)
                    last = time.monotonic() >= until_s or sent + CHUNK_BYTES >= bytes_max or stop.is_set()
                    bulk.send(wire.Transfer(job=job, attempt=peer.attempt, bytes=CHUNK_BYTES, last=last))
                    bulk.send_bytes(_ZEROS)
                    sent += CHUNK_BYTES
                return bulk.receive()

            def hang_up() -> None:
                stop.set()
                bulk.hang_up()

            answer = await transport.in_thread(send, hang_up)
    except (OSError, PeerFailed, TimeoutError) as e:
        log.info("nothing came through to node %d of job %s at %s: %s", node, job, address, e or type(e).__name__)
        return 0.0
    if not isinstance(answer, wire.Transferred) or answer.bytes <= 0 or not 0 < answer.seconds <= 2 * deadline_s:
        log.info("node %d of job %s did not measure: %s", node, job, answer)
        return 0.0
    return answer.bytes / answer.seconds


async def receive(peers: Peers, peer: Connection, first: wire.Transfer) -> None:
    """Take in what a peer sends, and say how fast it came; the connection is of no more use then. Raises OSError, PeerFailed, TimeoutError."""
    if peers.receiving >= RECEIVED_AT_ONCE_MAX:
        await peer.send(wire.Refused(id=0, error="PeerFailed", message="too many transfers at a time"))
        return
    peers.receiving += 1
    try:
        bulk = peer.bulk()
        async with asyncio.timeout(2 * DEADLINE_S):
            await transport.in_thread(lambda: _take_in(bulk, first), bulk.hang_up)
    finally:
        peers.receiving -= 1


def _take_in(bulk: Bulk, first: wire.Transfer) -> None:
    """Thread: all chunks, and the answer."""
    place = memoryview(bytearray(CHUNK_BYTES))
    message, total, came = first, 0, []
    while True:
        if message.bytes != CHUNK_BYTES or total + message.bytes > BYTES_MAX:
            msg = f"a transfer of {message.bytes} bytes after {total}"
            raise PeerFailed(msg)
        bulk.receive_into(place)
        total += message.bytes
        came.append((time.monotonic(), total))
        if message.last:
            break
        following = bulk.receive()
        if not isinstance(following, wire.Transfer) or following.job != first.job:
            msg = f"unexpected {type(following).__name__} in a transfer"
            raise PeerFailed(msg)
        message = following
    bulk.send(wire.Transferred(bytes=0, seconds=0.0) if len(came) < 2 else measured(came))


def measured(came: list[tuple[float, int]]) -> wire.Transferred:
    """Of (when, bytes so far), at least two: what came after the beginning, and how long that took."""
    begin_s, before = came[min(len(came) // SKIPPED, len(came) - 2)]
    end_s, total = came[-1]
    return wire.Transferred(bytes=total - before, seconds=max(end_s - begin_s, 1e-6))
