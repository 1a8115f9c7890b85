"""Daemon to daemon: news of snapshots, and the bytes of images, over TCP.

News go one way: each daemon keeps a connection to every other daemon of a job and sends what happened here. News may be lost with a
connection; therefore each new connection begins with a greeting: what was sealed, skipped and persisted here. Receivers take doubles in
their stride. A daemon that comes back listens where its predecessor did, if it can: its peers may be new themselves and know that address only.

Images are fetched in a connection of their own: `Describe` and `Fetch`, answered from the mapping.

Trust: plain TCP, therefore loopback only, unless the operator says otherwise (`--insecure-peers`); authentication belongs to the transport
that replaces this one. Every frame is bounded, every wait has a deadline.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from ckptd.core import wire
from ckptd.errors import BadArgument, CkptdError, NotFound, PeerFailed

log = logging.getLogger("ckptd.peers")

CONNECT_TIMEOUT_S = 2.0
ANSWER_TIMEOUT_S = 10.0
"""For one message or one megabyte: slower than 100 kB/s is dead for our purposes."""
RETRY_S = (0.1, 2.0)
"""First and longest pause between attempts to connect."""
FETCH_BYTES = 4 << 20
"""One answer's bytes: DESIGN section 6 found units of 1 to 4 MiB best on TCP."""
AHEAD = 3
"""Requests of a stream that are under way while one is answered: the answering side never waits for a round trip."""
READ_AHEAD_BYTES = 1 << 20
"""asyncio buffers twice as much per connection before anybody asked for it; longer messages are read in pieces."""
NEWS_MAX = 4096
"""News queued for a peer that does not answer; the oldest go first, for a new connection tells everything anyway."""


@dataclass(frozen=True, slots=True)
class Held:
    """An image in this daemon's memory."""

    image: memoryview
    digests: bytes


class Local(Protocol):
    """What peers need of the daemon. All are called on the loop."""

    def held(self, job: str, attempt: int, step: int, rank: int) -> Held:
        """An image in memory; raises NotFound."""

    def listing(self, job: str, attempt: int, step: int) -> list[tuple[int, int, bytes]]:
        """(rank, bytes, checksums) of the sealed images of a snapshot."""

    def heard(self, news: wire.PeerNews) -> None:
        """A peer told something."""

    def greeting(self, job: str) -> list[wire.PeerNews]:
        """News to begin a connection with."""

    def attempt_of(self, job: str) -> int:
        """The newest attempt known here: the fence against zombies."""


def check_bind(host: str, *, insecure: bool) -> None:
    """Raise BadArgument for an address off loopback, unless the operator insists."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError as e:
        msg = f"--peer-host {host}: {e}"
        raise BadArgument(msg, remedy="give an address of this node, not a name") from e
    if address.is_unspecified:
        msg = f"--peer-host {host}: other daemons could not reach that"
        raise BadArgument(msg, remedy="give the one address of this node that they should use")
    if not insecure and not ipaddress.ip_address(host).is_loopback:
        msg = f"--peer-host {host}: daemons do not authenticate each other yet, so they bind to loopback only"
        raise BadArgument(msg, remedy="on a trusted network, add --insecure-peers")


class Peers:
    """All connections of one daemon to others."""

    def __init__(self, local: Local) -> None:
        self._local = local
        self._links: dict[tuple[str, int], _Link] = {}
        self._server: asyncio.Server | None = None
        self.address = ""

    async def start(self, host: str, port: int = 0) -> None:
        """Listen, on the predecessor's `port` if it is free."""
        try:
            self._server = await asyncio.start_server(self._serve, host, port, limit=READ_AHEAD_BYTES)
        except (OSError, OverflowError):
            self._server = await asyncio.start_server(self._serve, host, 0, limit=READ_AHEAD_BYTES)
        name = self._server.sockets[0].getsockname()
        self.address = f"{name[0]}:{name[1]}"

    async def stop(self) -> None:
        """Close everything."""
        for link in self._links.values():
            link.task.cancel()
        self._links.clear()
        if self._server is not None:
            self._server.close()

    def join(self, job: str, attempt: int, node: int, addresses: list[str]) -> None:
        """Be connected to the other nodes of this attempt, and to nobody else of this job."""
        for other, address in enumerate(addresses):
            link = self._links.get((job, other))
            if other == node or (link is not None and (link.address, link.attempt) == (address, attempt)):
                continue
            if link is not None:
                link.task.cancel()
            self._links[job, other] = _Link(self, job, attempt, node, other, address)
        for key in [k for k in self._links if k[0] == job and k[1] >= len(addresses)]:
            self._links.pop(key).task.cancel()

    def leave(self, job: str) -> None:
        """The job is over."""
        for key in [k for k in self._links if k[0] == job]:
            self._links.pop(key).task.cancel()

    def tell(self, news: wire.PeerNews, only: int | None = None) -> None:
        """Send news to all nodes of the job, or to one."""
        for (job, node), link in self._links.items():
            if job == news.job and only in {None, node}:
                link.put(news)

    def address_of(self, job: str, node: int) -> str:
        """Where a node listens. Raises NotFound."""
        link = self._links.get((job, node))
        if link is None:
            msg = f"node {node} of job {job!r} is not known here"
            raise NotFound(msg)
        return link.address

    def connected(self, job: str) -> dict[int, bool]:
        """node -> whether news get there, for status."""
        return {node: link.connected for (name, node), link in self._links.items() if name == job}

    async def describe(self, address: str, job: str, attempt: int, step: int, rank: int) -> wire.Described:
        """Size and checksums of an image at a peer."""
        async with _dial(address) as (reader, writer):
            await _send(writer, wire.Describe(job=job, attempt=attempt, step=step, rank=rank))
            answer = await _receive(reader)
            if not isinstance(answer, wire.Described):
                raise _refusal(answer)
            return answer

    async def listing(self, address: str, job: str, attempt: int, step: int) -> list[tuple[int, int, bytes]]:
        """(rank, bytes, checksums) of the images that a peer holds of a snapshot."""
        async with _dial(address) as (reader, writer):
            await _send(writer, wire.List(job=job, attempt=attempt, step=step))
            answer = await _receive(reader)
            if not isinstance(answer, wire.Listed):
                raise _refusal(answer)
            return answer.images

    async def fetch(
        self, address: str, job: str, attempt: int, step: int, rank: int, ranges: Iterable[tuple[int, int]]
    ) -> AsyncIterator[tuple[int, bytes]]:
        """(offset, bytes) of the wanted ranges, in pieces of at most FETCH_BYTES."""
        pieces = [(at, min(at + FETCH_BYTES, end)) for begin, end in ranges for at in range(begin, end, FETCH_BYTES)]
        data = self.stream(address, job, attempt, step, [(rank, begin, end) for begin, end in pieces])
        try:
            for at, _ in pieces:
                yield at, await anext(data)
        finally:
            await data.aclose()

    async def stream(
        self, address: str, job: str, attempt: int, step: int, wanted: Sequence[tuple[int, int, int]]
    ) -> AsyncGenerator[bytes, None]:
        """Bytes [begin, end) of images, as (rank, begin, end), none longer than FETCH_BYTES; one after the other, with AHEAD requests under way."""
        async with _dial(address) as (reader, writer):
            for number, (_, begin, end) in enumerate(wanted):
                ahead = wanted[: AHEAD + 1] if number == 0 else wanted[number + AHEAD : number + AHEAD + 1]
                for r, b, e in ahead:
                    writer.write(wire.encode(wire.Fetch(job=job, attempt=attempt, step=step, rank=r, begin=b, end=e)))
                answer = await _receive(reader)
                if not isinstance(answer, wire.Blocks) or answer.bytes != end - begin:
                    raise _refusal(answer)
                async with asyncio.timeout(ANSWER_TIMEOUT_S):
                    data = await reader.readexactly(answer.bytes)
                yield data

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        hello: wire.PeerHello | None = None
        try:
            while True:
                message = await _receive(reader, idle=True)
                match message:
                    case wire.PeerHello():
                        hello = message
                        self._greeted(message)
                    case wire.PeerNews() if hello is not None and message.job == hello.job:
                        if hello.attempt >= self._local.attempt_of(hello.job):
                            self._local.heard(message)
                    case wire.Describe():
                        await self._answer(writer, message)
                    case wire.Fetch():
                        await self._answer(writer, message)
                    case wire.List():
                        await _send(writer, wire.Listed(images=self._local.listing(message.job, message.attempt, message.step)))
                    case _:
                        return
                await asyncio.sleep(0)  # a flood that is buffered already would keep the loop to itself
        except (OSError, PeerFailed, TimeoutError, asyncio.IncompleteReadError) as e:
            log.debug("a peer's connection ended: %s", e)
            writer.transport.abort()  # close() would wait for a peer that does not read
        finally:
            writer.close()

    def _greeted(self, hello: wire.PeerHello) -> None:
        """A daemon that came back listens elsewhere: follow it, if it is of our attempt."""
        link = self._links.get((hello.job, hello.node))
        if link is not None and link.attempt == hello.attempt and link.address != hello.address:
            log.info("node %d of job %s is back at %s", hello.node, hello.job, hello.address)
            link.task.cancel()
            self._links[hello.job, hello.node] = _Link(self, hello.job, hello.attempt, link.node, hello.node, hello.address)

    async def _answer(self, writer: asyncio.StreamWriter, m: wire.Describe | wire.Fetch) -> None:
        try:
            held = self._local.held(m.job, m.attempt, m.step, m.rank)
            if isinstance(m, wire.Fetch) and not 0 <= m.begin <= m.end <= min(len(held.image), m.begin + FETCH_BYTES):
                msg = f"bytes {m.begin} to {m.end} are not to be had"
                raise NotFound(msg)
        except CkptdError as e:
            await _send(writer, wire.Refused(id=0, error=type(e).__name__, message=e.message))
            return
        if isinstance(m, wire.Describe):
            await _send(writer, wire.Described(image_bytes=len(held.image), digests=held.digests))
        else:
            await _send(writer, wire.Blocks(bytes=m.end - m.begin))
            writer.write(held.image[m.begin : m.end])
            async with asyncio.timeout(ANSWER_TIMEOUT_S):
                await writer.drain()


class _Link:
    """News to one peer: a queue and the task that keeps a connection for it."""

    def __init__(self, peers: Peers, job: str, attempt: int, node: int, other: int, address: str) -> None:
        self.job, self.attempt, self.node, self.other, self.address = job, attempt, node, other, address
        self.connected = False
        self._peers = peers
        self._news: deque[wire.PeerNews] = deque(maxlen=NEWS_MAX)
        self._wake = asyncio.Event()
        self.task = asyncio.create_task(self._run(), name=f"peer {job}/{address}")

    def put(self, news: wire.PeerNews) -> None:
        self._news.append(news)
        self._wake.set()

    async def _run(self) -> None:
        pause_s = RETRY_S[0]
        while True:
            try:
                async with _dial(self.address) as (reader, writer):
                    pause_s, self.connected = RETRY_S[0], True
                    await self._until_gone(reader, self._talk(writer))
            except (OSError, PeerFailed, TimeoutError, ValueError) as e:  # ValueError: an address that is none
                log.debug("peer %s: %s", self.address, e)
            finally:
                self.connected = False
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, RETRY_S[1])

    @staticmethod
    async def _until_gone(reader: asyncio.StreamReader, talk: Coroutine[Any, Any, None]) -> None:
        """A peer says nothing on this line; it ends when the peer's daemon does, and its successor wants the greeting at once."""
        tasks = {asyncio.ensure_future(reader.read(1)), asyncio.create_task(talk)}
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _talk(self, writer: asyncio.StreamWriter) -> None:
        local = self._peers._local  # noqa: SLF001  a link is a part of Peers
        await _send(
            writer, wire.PeerHello(job=self.job, attempt=self.attempt, node=self.node, address=self._peers.address)
        )
        for news in local.greeting(self.job):
            if news.what != "part" or self.other == 0:
                await _send(writer, news)
        while True:
            while self._news:
                await _send(writer, self._news.popleft())
            self._wake.clear()
            await self._wake.wait()


@contextlib.asynccontextmanager
async def _dial(address: str) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    host, _, port = address.rpartition(":")
    async with asyncio.timeout(CONNECT_TIMEOUT_S):
        reader, writer = await asyncio.open_connection(host, int(port), limit=READ_AHEAD_BYTES)
    try:
        yield reader, writer
    except asyncio.IncompleteReadError as e:
        msg = f"the daemon at {address} hung up"
        raise PeerFailed(msg) from e
    except TimeoutError as e:
        msg = f"the daemon at {address} did not answer in {ANSWER_TIMEOUT_S:.0f} s"
        raise PeerFailed(msg) from e
    finally:
        writer.close()


async def _send(writer: asyncio.StreamWriter, message: wire.Message) -> None:
    writer.write(wire.encode(message))
    async with asyncio.timeout(ANSWER_TIMEOUT_S):
        await writer.drain()


async def _receive(reader: asyncio.StreamReader, *, idle: bool = False) -> Any:
    """One message; between messages a connection may be `idle` for as long as it likes, within one it may not."""
    if idle:
        head = await reader.readexactly(4)
    else:
        async with asyncio.timeout(ANSWER_TIMEOUT_S):
            head = await reader.readexactly(4)
    length = wire.frame_length(head)
    async with asyncio.timeout(ANSWER_TIMEOUT_S):
        return wire.decode(await reader.readexactly(length), "remote")


def _refusal(answer: Any) -> CkptdError:
    return PeerFailed(answer.message if isinstance(answer, wire.Refused) else f"unexpected {type(answer).__name__}")


