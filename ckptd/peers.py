"""Daemon to daemon: news of snapshots, and the bytes of images, over TCP.

News go one way: each daemon keeps a connection to every other daemon of a job and sends what happened here. News may be lost with a
connection; therefore each new connection begins with a greeting: what was sealed, skipped and persisted here. Receivers take doubles in
their stride. A daemon that comes back listens where its predecessor did, if it can: its peers may be new themselves and know that address only.

Images are fetched in a connection of their own: `Describe` and `Fetch`, answered from the mapping; what comes is received in a thread, into place.

Trust: both ends of a connection prove that they know the secret of the job's attempt (transport.py); so strangers, other jobs and zombies of an older
attempt are not heard. What is sent can be read on the wire, therefore loopback only, unless the operator says otherwise (`--insecure-peers`).
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import socket
from collections import OrderedDict, deque
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from ckptd import probing, transport
from ckptd.core import wire
from ckptd.errors import BadArgument, CkptdError, NotFound, PeerFailed
from ckptd.transport import Bulk, Connection, Rate

log = logging.getLogger("ckptd.peers")

RETRY_S = (0.1, 2.0)
"""First and longest pause between attempts to connect."""
FETCH_BYTES = 4 << 20
"""One answer's bytes: DESIGN section 6 found units of 1 to 4 MiB best on TCP."""
AHEAD = 3
"""Requests of a stream that are under way while one is answered: the answering side never waits for a round trip."""
BACKLOG = 100
ACCEPT_PAUSE_S = 0.1
"""Where no connection can be accepted: no descriptor is left."""
RATE_MIN_BYTES_PER_S = 8 << 20
"""The least rate limit: each of 31 members may wait for a block of 1 MiB, none for longer than ANSWER_TIMEOUT_S."""
UNPROVEN_MAX = 128
"""Connections that did not prove themselves yet: of more, the oldest is hung up on. A daemon that was right dials again."""
WATCH_MAX = 64
"""Summaries queued for one that does not answer: what is lost is seen by its number."""
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

    def watched(self, message: wire.PeerWatch | wire.PeerAsk | wire.PeerVerdict) -> None:
        """A peer says something of the watching of a job."""

    def greeting(self, job: str) -> list[wire.PeerNews]:
        """News to begin a connection with."""

    def gathering(self, job: str) -> bytes | None:
        """The secret of the job's rendezvous, if this node takes part in one."""

    def beaten(self, beat: wire.PeerBeat) -> None:
        """A beat came."""


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
        msg = f"--peer-host {host}: what daemons send each other is authenticated but not encrypted, so they bind to loopback only"
        raise BadArgument(msg, remedy="on a network where nobody listens, add --insecure-peers")


class Peers:
    """All connections of one daemon to others. `rate_bytes_per_s`: of images and fragments, to all of them together; 0: as fast as it goes. Raises BadArgument."""

    def __init__(self, local: Local, rate_bytes_per_s: float = 0) -> None:
        if rate_bytes_per_s and not rate_bytes_per_s >= RATE_MIN_BYTES_PER_S:
            msg = f"--peer-rate {rate_bytes_per_s:.0f}: peers wait for a block no longer than {transport.ANSWER_TIMEOUT_S:.0f} s"
            raise BadArgument(msg, remedy=f"give at least {RATE_MIN_BYTES_PER_S} bytes per second, or 0 for no limit")
        self._local = local
        self.rate = Rate(rate_bytes_per_s)
        self._links: dict[tuple[str, int], _Link] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._source = ""
        self._secrets: dict[str, tuple[int, bytes]] = {}
        self._unproven: OrderedDict[socket.socket, None] = OrderedDict()
        self.receiving = 0
        """Transfers that are measured here just now."""
        self.strangers = 0
        """Connections that did not prove themselves."""
        self.address = ""

    async def start(self, host: str, port: int = 0, *, must: bool = False) -> None:
        """Listen, on the predecessor's `port` if it is free; on no other if we `must`. Raises BadArgument."""
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            listener = socket.create_server((host, port), family=family, backlog=BACKLOG)
        except (OSError, OverflowError) as e:
            if must:
                msg = f"--peer-port {port}: {host} cannot listen there: {e}"
                raise BadArgument(msg) from e
            listener = socket.create_server((host, 0), family=family, backlog=BACKLOG)
        listener.setblocking(False)  # noqa: FBT003  the socket module's own signature
        name = listener.getsockname()
        self.address, self._source = f"{name[0]}:{name[1]}", transport.source_of(name[0])
        self._start(self._listen(listener))

    async def stop(self) -> None:
        """Close everything."""
        for link in self._links.values():
            link.task.cancel()
        self._links.clear()
        for task in self._tasks:
            task.cancel()

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _listen(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        with listener:
            while True:
                try:
                    sock, _ = await loop.sock_accept(listener)
                except OSError as e:
                    log.warning("a peer cannot be let in: %s", e)
                    self.shed()
                    await asyncio.sleep(ACCEPT_PAUSE_S)
                else:
                    self._start(self._serve(sock))

    def join(self, job: str, attempt: int, node: int, addresses: list[str], secret: bytes) -> None:
        """Be connected to the other nodes of this attempt, and to nobody else of this job."""
        self._secrets[job] = attempt, secret
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
        self._secrets.pop(job, None)
        for key in [k for k in self._links if k[0] == job]:
            self._links.pop(key).task.cancel()

    def tell(self, news: wire.PeerNews, only: int | None = None) -> None:
        """Send news to all nodes of the job, or to one."""
        for (job, node), link in self._links.items():
            if job == news.job and only in {None, node}:
                link.put(news)

    def tell_watch(self, message: wire.PeerWatch | wire.PeerAsk | wire.PeerVerdict, only: int | None = None) -> None:
        """Say something of watching to one node of the job, or to all; never before news."""
        for (job, other), link in self._links.items():
            if job == message.job and only in {None, other}:
                link.put_watch(message)

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

    def dial(self, address: str, job: str) -> contextlib.AbstractAsyncContextManager[Connection]:
        """A connection to another daemon of the job. Raises NotFound where this daemon is not in the job."""
        attempt, secret = self._secrets.get(job, (0, b""))
        if not secret:
            msg = f"job {job!r} has no attempt here, so its peers cannot be asked"
            raise NotFound(msg)
        return transport.dial(address, job, attempt, secret, self._source)

    async def describe(self, address: str, job: str, attempt: int, step: int, rank: int) -> wire.Described:
        """Size and checksums of an image at a peer."""
        async with self.dial(address, job) as peer:
            await peer.send(wire.Describe(job=job, attempt=attempt, step=step, rank=rank))
            answer = await peer.receive()
            if not isinstance(answer, wire.Described):
                raise _refusal(answer)
            return answer

    async def listing(self, address: str, job: str, attempt: int, step: int) -> list[tuple[int, int, bytes]]:
        """(rank, bytes, checksums) of the images that a peer holds of a snapshot."""
        async with self.dial(address, job) as peer:
            await peer.send(wire.List(job=job, attempt=attempt, step=step))
            answer = await peer.receive()
            if not isinstance(answer, wire.Listed):
                raise _refusal(answer)
            return answer.images

    async def fetch(
        self, address: str, job: str, image: tuple[int, int, int], ranges: Sequence[tuple[int, int]], into: memoryview,
        arrived: Callable[[int, int], None] | None = None,
    ) -> None:  # fmt: skip
        """Have these bytes of an image, (attempt, step, rank), at the same place in `into`. Thread: what of them has `arrived`, in pieces of at most FETCH_BYTES."""
        pieces = [(at, min(at + FETCH_BYTES, end)) for begin, end in ranges for at in range(begin, end, FETCH_BYTES)]
        async with self.dial(address, job) as peer:
            bulk = peer.bulk()

            def take() -> None:
                for number, (begin, end) in enumerate(pieces):
                    for ahead in pieces[: AHEAD + 1] if number == 0 else pieces[number + AHEAD : number + AHEAD + 1]:
                        ask(bulk, job, image, *ahead)
                    receive(bulk, into[begin:end])
                    if arrived is not None:
                        arrived(begin, end)

            await transport.in_thread(take, bulk.hang_up)

    def _secret_of(self, job: str, attempt: int) -> bytes | None:
        if attempt == transport.RENDEZVOUS:
            return self._local.gathering(job)
        known = self._secrets.get(job)
        return known[1] or None if known is not None and known[0] == attempt else None

    async def _serve(self, sock: socket.socket) -> None:
        with sock:
            peer = await self._proven(sock)
            if peer is None:
                return
            try:
                while await self._heed(peer, await peer.receive(idle=True)):  # noqa: ASYNC110  nothing is polled: it yields
                    await asyncio.sleep(0)  # a flood that is here already would keep the loop to itself
            except (OSError, PeerFailed, TimeoutError) as e:
                log.debug("a peer's connection ended: %s", e)

    async def _proven(self, sock: socket.socket) -> Connection | None:
        """Who proves itself in time, and before others need the place."""
        self._unproven[sock] = None
        self.shed(UNPROVEN_MAX)
        peer = None
        try:
            async with asyncio.timeout(transport.ANSWER_TIMEOUT_S):
                peer = await transport.accept(sock, self._secret_of)
        except (OSError, PeerFailed, TimeoutError) as e:
            log.debug("somebody did not prove itself: %s", e)
        finally:
            self._unproven.pop(sock, None)
        if peer is None:
            self.strangers += 1
        return peer

    def shed(self, left: int = 0) -> None:
        """Hang up on the oldest of those that did not prove themselves, until so many are left: their descriptors are wanted."""
        while len(self._unproven) > left:
            with contextlib.suppress(OSError):
                self._unproven.popitem(last=False)[0].shutdown(socket.SHUT_RDWR)  # whoever waits for it sees its end

    async def _heed(self, peer: Connection, message: Any) -> bool:
        """Do what a message asks for; False where the connection is to end: for another job, for an attempt that is over, or for nothing we know."""
        if peer.attempt == transport.RENDEZVOUS and isinstance(message, wire.PeerBeat) and message.job == peer.job:
            self._local.beaten(message)
            return True
        if getattr(message, "job", None) != peer.job or peer.attempt != self._secrets.get(peer.job, (-1, b""))[0]:
            return False
        match message:
            case wire.PeerHello():
                self._greeted(message)
            case wire.PeerNews():
                self._local.heard(message)
            case wire.PeerWatch() | wire.PeerAsk() | wire.PeerVerdict():
                self._local.watched(message)
            case wire.Describe() | wire.Fetch():
                await self._answer(peer, message)
            case wire.Transfer():
                await probing.receive(self, peer, message)
                return False
            case wire.List():
                await peer.send(wire.Listed(images=self._local.listing(message.job, message.attempt, message.step)))
            case _:
                return False
        return True

    def _greeted(self, hello: wire.PeerHello) -> None:
        """A daemon that came back listens elsewhere: follow it, if it is of our attempt."""
        link = self._links.get((hello.job, hello.node))
        if link is not None and link.attempt == hello.attempt and link.address != hello.address:
            log.info("node %d of job %s is back at %s", hello.node, hello.job, hello.address)
            link.task.cancel()
            self._links[hello.job, hello.node] = _Link(self, hello.job, hello.attempt, link.node, hello.node, hello.address)
        elif link is not None and link.attempt == hello.attempt:
            # Perhaps a new daemon at the old address: what our line told it before it knew the attempt fell on deaf ears.
            for news in self._local.greeting(hello.job):
                if news.what != "part" or hello.node == 0:
                    link.put(news)

    async def _answer(self, peer: Connection, m: wire.Describe | wire.Fetch) -> None:
        try:
            held = self._local.held(m.job, m.attempt, m.step, m.rank)
            if isinstance(m, wire.Fetch) and not 0 <= m.begin <= m.end <= min(len(held.image), m.begin + FETCH_BYTES):
                msg = f"bytes {m.begin} to {m.end} are not to be had"
                raise NotFound(msg)
        except CkptdError as e:
            await peer.send(wire.Refused(id=0, error=type(e).__name__, message=e.message))
            return
        if isinstance(m, wire.Describe):
            await peer.send(wire.Described(image_bytes=len(held.image), digests=held.digests))
        else:
            await self.rate.let_through(m.end - m.begin)
            peer.put(wire.Blocks(bytes=m.end - m.begin))
            await peer.send_bytes(held.image[m.begin : m.end])


class _Link:
    """News to one peer: a queue and the task that keeps a connection for it."""

    def __init__(self, peers: Peers, job: str, attempt: int, node: int, other: int, address: str) -> None:
        self.job, self.attempt, self.node, self.other, self.address = job, attempt, node, other, address
        self.connected = False
        self._peers = peers
        self._news: deque[wire.PeerNews] = deque(maxlen=NEWS_MAX)
        self._watch: deque[wire.Message] = deque(maxlen=WATCH_MAX)
        self._wake = asyncio.Event()
        self.task = asyncio.create_task(self._run(), name=f"peer {job}/{address}")

    def put(self, news: wire.PeerNews) -> None:
        self._news.append(news)
        self._wake.set()

    def put_watch(self, message: wire.Message) -> None:
        self._watch.append(message)
        self._wake.set()

    async def _run(self) -> None:
        pause_s = RETRY_S[0]
        while True:
            try:
                async with self._peers.dial(self.address, self.job) as peer:
                    pause_s, self.connected = RETRY_S[0], True
                    await transport.until_gone(peer, self._talk(peer))  # its successor wants the greeting at once
            except (OSError, PeerFailed, NotFound, TimeoutError, ValueError) as e:  # ValueError: an address that is none
                log.debug("peer %s: %s", self.address, e)
            finally:
                self.connected = False
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, RETRY_S[1])

    async def _talk(self, peer: Connection) -> None:
        local = self._peers._local  # noqa: SLF001  a link is a part of Peers
        await peer.send(wire.PeerHello(job=self.job, attempt=self.attempt, node=self.node, address=self._peers.address))
        for news in local.greeting(self.job):
            if news.what != "part" or self.other == 0:
                await peer.send(news)
        while True:
            while self._news or self._watch:
                await peer.send(self._news.popleft() if self._news else self._watch.popleft())
            self._wake.clear()
            await self._wake.wait()


def ask(peer: Bulk, job: str, image: tuple[int, int, int], begin: int, end: int) -> None:
    """Thread: ask for bytes of an image, (attempt, step, rank)."""
    attempt, step, rank = image
    peer.send(wire.Fetch(job=job, attempt=attempt, step=step, rank=rank, begin=begin, end=end))


def receive(peer: Bulk, place: memoryview) -> None:
    """Thread: what was asked for, in that order."""
    answer = peer.receive()
    if not isinstance(answer, wire.Blocks) or answer.bytes != len(place):
        raise _refusal(answer)
    peer.receive_into(place)


def _refusal(answer: Any) -> CkptdError:
    return PeerFailed(answer.message if isinstance(answer, wire.Refused) else f"unexpected {type(answer).__name__}")
