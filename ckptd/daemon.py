"""The daemon: one asyncio loop that owns all state, and a small pool for byte work.

    clients (Unix socket) --+                         +--> pool: checksums, verification, images to the durable tier
    peers (TCP)             +--> core.node.Node --> actions --> arenas (release), peers (news), ranks (notices)
    pool (done, failed)   --+

`Node` decides; this file performs. What it adds of its own is bookkeeping about processes: who is connected, who died, whose memory is whose.

Invariants
- a client that is slow, hung, hostile or dead costs nobody else anything: nothing awaits a client, answers are queued and bounded;
- every await has a deadline; every failure is logged once, counted, and shown by `status`;
- a rank's death is seen by its pidfd, not only by its socket: forked data-loader workers inherit sockets;
- an arena changes hands only when its last owner is dead.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import os
import secrets
import signal
import socket
import time
from collections import Counter, defaultdict, deque
from collections.abc import Awaitable, Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from ckptd import __version__, arena, faces, members, notify, peers, persist, protect, transport, watcher
from ckptd.channel import Channel, Pipe, listen, peer_of, pidfd_of, private_directory, socket_path
from ckptd.core import checksum, node, parity, proof, report, slots, wire
from ckptd.core.ladder import Key
from ckptd.core.replicas import Ballots, Suspicion
from ckptd.core.retention import Retention
from ckptd.errors import BadArgument, Bug, CkptdError, NotFound
from ckptd.held import Arenas, Guest, make_seal, put_seal, verify_blocks
from ckptd.monitor.settings import Settings as EngineSettings

log = logging.getLogger("ckptd.daemon")

TICK_S = 0.5
SETTLE_TIMEOUT_S = 30.0
"""How long a Welcome waits for checksums of images that were complete when their trainers died: 30 s are 500 GB here."""
ERRORS_KEPT, REASONS_MAX = 50, 32
ACTIVE_S = 5.0
"""A rank that filled a slot within this time is at work."""
LINGER_ASKED_S = 60.0
"""A daemon without a linger time that was asked to leave while others use it goes this long after the last of them."""
PROTECT_SLOTS_MIN = 3
"""With less, the PROTECTED and the COMMITTED snapshot would leave no slot to fill."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How a daemon runs."""

    directory: str | None = None
    """Where its socket lies; see `channel.socket_path`."""
    peer_host: str = "127.0.0.1"
    """Address on which other daemons reach it."""
    peer_port: int = 0
    """Where it listens for them; 0: where its predecessor did, or anywhere."""
    insecure_peers: bool = False
    """Allow `peer_host` off loopback."""
    peer_rate_bytes_per_s: float = 0.0
    """Most bytes of images sent to other daemons, all together; 0: as fast as it goes."""
    linger_s: float = 0.0
    """Leave after this long without any client; 0: never."""
    threads: int = 2
    """Byte work at a time."""
    persist_timeout_s: float = 3600.0
    """A snapshot that is not persisted by then gives its memory back."""
    labels: Mapping[str, str] = field(default_factory=dict)
    """Failure domains of this node: kind -> name."""
    watch: bool = True
    evict_after_s: float = 60.0
    """A rank must have been slow for this long before it may be evicted."""
    faces: faces.FaceSettings = field(default_factory=faces.FaceSettings)

    def __post_init__(self) -> None:
        if self.threads < 1 or self.linger_s < 0 or self.persist_timeout_s <= 0:
            msg = "threads must be at least 1, linger_s at least 0, persist_timeout_s above 0"
            raise BadArgument(msg)


@dataclass(eq=False, slots=True)
class Client:
    """A connection. A rank has an arena from its Join to its death."""

    channel: Channel
    pid: int
    pidfd: int = -1
    role: str = ""
    job: str = ""
    rank: int = -1
    attempt: int = 0
    arena: arena.Arena | None = None
    alive: bool = True
    filled_s: float = float("-inf")
    """When it last filled a slot."""


@dataclass(slots=True)
class Tier:
    """Where a job's checkpoints go, as its ranks said when they joined."""

    url: str = ""
    retention: Retention = field(default_factory=Retention)
    last: str = ""


class Daemon:
    """One per node. `run` until a signal, `Shutdown`, or lingering ends it."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.name = secrets.token_hex(6)
        self.node = node.Node(persist_timeout_s=settings.persist_timeout_s)
        self.arenas = Arenas()
        self.peers = peers.Peers(self, settings.peer_rate_bytes_per_s)
        self.clients: set[Client] = set()
        self.parted: set[Client] = set()
        """Ranks whose connection ended and whose process lives: their memory is still theirs."""
        self.ahead: dict[str, tuple[int, Key | None]] = {}
        self.guests: dict[tuple[str, int, int, int], Guest] = {}
        self.tiers: dict[str, Tier] = {}
        self.protection = protect.Protection(self)
        self.members = members.Members()
        self.watcher = watcher.Watcher(self, EngineSettings(evict_after_s=settings.evict_after_s), enabled=settings.watch)
        self.faces = faces.Faces(self, settings.faces)
        self.ballots: dict[str, Ballots] = defaultdict(Ballots)
        self.skips: dict[str, Counter[str]] = defaultdict(Counter)
        self.suspicions: deque[tuple[str, int, Suspicion]] = deque(maxlen=ERRORS_KEPT)
        self.written: dict[tuple[str, int, int], dict[int, bytes]] = {}
        self.verifying: dict[node.SlotRef, asyncio.Lock] = {}
        self.busy: Counter[str] = Counter()
        self.errors: deque[str] = deque(maxlen=ERRORS_KEPT)
        self.error_count = 0
        self.started_s = self.idle_since_s = time.monotonic()
        self.linger_s = settings.linger_s
        self._pool = ThreadPoolExecutor(settings.threads, "ckptd-bytes", initializer=transport.be_nice)
        self._store_pool = ThreadPoolExecutor(settings.threads, "ckptd-store", initializer=transport.be_nice)
        """Apart from the other: a store that hangs must not keep checksums and restores waiting."""
        self._tasks: set[asyncio.Task[None]] = set()
        self._settled = asyncio.Event()
        self._leave = asyncio.Event()
        self._actions: dict[type, Callable[..., None]] = {
            node.Hash: self._do_hash,
            node.Release: lambda a: self.arenas.release(a.ref),
            node.TellPeers: self._do_tell_peers,
            node.TellRanks: self._do_tell_ranks,
            node.DoPart: self._do_part,
            node.WriteManifest: self._do_write_manifest,
        }

    # --- life ---------------------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Serve until told to leave. Raises BadArgument if another daemon serves here."""
        path = socket_path(self.settings.directory)
        private_directory(path.parent)
        peers.check_bind(self.settings.peer_host, insecure=self.settings.insecure_peers)
        lock = os.open(path.parent / "daemon.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as e:
            os.close(lock)
            msg = f"a daemon already serves {path}"
            raise BadArgument(msg, remedy="use that one, or give another directory with --dir or CKPTD_DIR") from e
        transport.raise_fd_limit()
        self._adopt_handed()
        port_file = path.with_name("peer.port")
        await self.peers.start(self.settings.peer_host, self.settings.peer_port or _read_port(port_file), must=self.settings.peer_port > 0)
        self.members.start(path.parent, self.peers.address)
        self.start(self.members.run())
        self.start(self.watcher.run(path.parent))
        await self.faces.start(path.parent)
        port_file.write_text(self.peers.address.rpartition(":")[2])
        listener = listen(path)
        loop = asyncio.get_running_loop()
        loop.add_reader(listener, self._accept, listener)
        for sig in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(sig, self._leave.set)
        notify.notify(f"READY=1\nSTATUS=serving {path}")
        try:
            for what in await self._in_pool(parity.self_test):  # tens of milliseconds; training starts meanwhile
                self._failed("self-test", Bug(what))
        except Exception as e:  # noqa: BLE001  out of descriptors or memory: no reason to leave
            self._failed("self-test", e)
        log.info("parity by %s; serving %s, peers at %s, %d arenas adopted", parity.KERNELS[0], path, self.peers.address, len(self.arenas))
        try:
            await self._tick_until_told()
        finally:
            notify.notify("STOPPING=1")
            loop.remove_reader(listener)
            listener.close()
            path.unlink(missing_ok=True)
            for client in [*self.clients]:
                client.channel.close("the daemon leaves")
            await self.faces.stop()
            await self.peers.stop()
            for task in [*self._tasks]:
                task.cancel()
            self._pool.shutdown(wait=False, cancel_futures=True)
            self._store_pool.shutdown(wait=False, cancel_futures=True)
            os.close(lock)

    async def _tick_until_told(self) -> None:
        watchdog_s = notify.watchdog_s()
        period_s = min(TICK_S, watchdog_s or TICK_S)
        while not self._leave.is_set():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(period_s):
                    await self._leave.wait()
            now_s = time.monotonic()
            if watchdog_s:
                notify.notify("WATCHDOG=1")
            self._perform(self.node.receive(node.Tick(), now_s))
            self._collect()
            if self.clients:
                self.idle_since_s = now_s
            elif 0 < self.linger_s < now_s - self.idle_since_s:
                log.info("nobody was here for %.0f s: leaving", self.settings.linger_s)
                return

    def _adopt_handed(self) -> None:
        for name, fd in notify.handed_fds():
            if notify.is_memory(fd):
                self._adopt(fd, f"handed over as {name!r}")
            else:
                os.close(fd)

    def _adopt(self, fd: int, how: str) -> None:
        """Take over an arena with everything complete in it."""
        try:
            adopted = arena.Arena.adopt(fd)
        except CkptdError as e:
            self._failed(f"arena {how}", e)
            return
        if self.arenas.add(adopted):
            log.info("arena of job %s rank %d adopted, %s", adopted.descriptor.job, adopted.descriptor.rank, how)
            self._scan(adopted)

    # --- clients ------------------------------------------------------------------------------------------------------------

    def _accept(self, listener: socket.socket) -> None:
        try:
            sock, _ = listener.accept()
        except BlockingIOError:
            return
        except OSError as e:  # out of descriptors: the listener stays readable, so look again later instead of at once
            self._failed("a connection", e)
            self.peers.shed()
            loop = asyncio.get_running_loop()
            loop.remove_reader(listener)
            loop.call_later(TICK_S, self._accept_again, listener)
            return
        pid, uid = peer_of(sock)
        if uid not in {os.getuid(), 0}:
            self._failed("a connection", BadArgument(f"user {uid} (pid {pid}) may not talk to this daemon"))
            sock.close()
            return
        client = Client(Channel(Pipe(sock, "daemon"), self._on_message, self._on_close), pid)
        client.channel.owner = client
        self.clients.add(client)

    def _accept_again(self, listener: socket.socket) -> None:
        if listener.fileno() >= 0:
            asyncio.get_running_loop().add_reader(listener, self._accept, listener)

    def _on_message(self, channel: Channel, message: Any) -> None:
        """Descriptors are claimed here, in the order of their messages: requests are answered later, in any order."""
        client: Client = channel.owner
        try:
            brings = isinstance(message, wire.HandBack | wire.Watch) or (isinstance(message, wire.Join) and message.image_bytes == 0)
            fd = channel.pipe.take_fd() if brings else None
            if isinstance(message, wire.Request):
                self.start(self._answer(client, message, fd))
            else:
                self._notice(client, message, fd)
        except CkptdError as e:
            self._failed(f"{type(message).__name__} of {client.job} rank {client.rank}", e)
            if isinstance(message, wire.Request):
                channel.send(wire.Refused(id=message.id, error=type(e).__name__, message=e.message, remedy=e.remedy))

    def _on_close(self, channel: Channel, why: str) -> None:
        client: Client = channel.owner
        self.clients.discard(client)
        self.members.gone(channel)
        if why:
            log.info("client %d (%s %s rank %d) left: %s", client.pid, client.role, client.job, client.rank, why)
        if client.pidfd < 0:
            self._gone(client)  # otherwise its death, or the next line, comes by the pidfd
        elif client.alive:
            self._part(client)

    def _watch(self, client: Client) -> None:
        """See the process die, whoever still holds its socket."""
        with contextlib.suppress(OSError):
            client.pidfd = pidfd_of(client.channel.pipe.sock, client.pid)
            asyncio.get_running_loop().add_reader(client.pidfd, self._died, client)

    @staticmethod
    def _unwatch(client: Client) -> None:
        if client.pidfd >= 0:
            asyncio.get_running_loop().remove_reader(client.pidfd)
            os.close(client.pidfd)
            client.pidfd = -1

    def _died(self, client: Client) -> None:
        client.alive = False
        self._unwatch(client)
        client.channel.close("its process died")
        self._gone(client)

    def _part(self, client: Client) -> None:
        """The connection ended, the process lives (it closed its session, or its link broke and will be back): look at what it left."""
        if client.arena is not None:
            self.parted.add(client)
            self._scan(client.arena)
        elif client.role != "tap":  # its death is to be seen even if its line is broken
            self._unwatch(client)

    def _gone(self, client: Client) -> None:
        """The process is dead: its memory is ours alone again."""
        self.watcher.gone(client)
        held, client.arena = client.arena, None
        self.parted.discard(client)
        if held is not None and self.arenas.get(held.name) is held:
            self.arenas.void_torn(held)
            self._scan(held)
            self._verify_ahead(client.job)

    def _scan(self, held: arena.Arena) -> None:
        """Tell the node about complete fillings that it may not know: their messages died with the trainer or a daemon."""
        job = held.descriptor.job
        if held.descriptor.rank == protect.FRAGMENT_RANK:
            self.arenas.void_torn(held)
            for ref, h in [*self.arenas.filled(held)]:
                fragment = protect.found(held, ref, h)
                if fragment is None:
                    self.arenas.release(ref)
                else:
                    self.event(node.FragmentFound(job, h.attempt, h.step, ref, fragment))
            return
        for ref, h in [*self.arenas.filled(held)]:
            self.event(
                node.Filled(job, h.attempt, h.step, h.rank, h.world_size, h.local_count, h.node, h.nodes, ref, h.image_bytes)
            )

    def _verify_ahead(self, job: str) -> None:
        """A rank died, a restore will come: verify the newest committed images while the job's processes start. Once, however many died."""
        known = self.node.jobs.get(job)
        if known is None or self.ahead.get(job) == (known.attempt, known.committed):
            return
        self.ahead[job] = (known.attempt, known.committed)
        self.arenas.forget_verified()
        snapshot = known.snapshots.get(known.committed) if known and known.committed else None
        for image in snapshot.images.values() if snapshot else ():
            blocks = range(checksum.block_count(image.image_bytes))
            self.start(self._guarded(f"verifying step {snapshot.step if snapshot else 0}", self._verify(image.ref, image.image_bytes, blocks)))

    def _notice(self, client: Client, message: Any, fd: int | None) -> None:
        match message:
            case wire.Filled():
                client.filled_s = time.monotonic()
                if message.replicas:
                    self.ballots[client.job].add((client.attempt, message.step), {client.rank: message.replicas})
                held = client.arena
                header = held.header(message.slot) if held is not None and 0 <= message.slot < held.geometry.slots else None
                if held is not None and header is not None and header.gen == message.gen and header.state == slots.FILLED:
                    self._scan(held)
            case wire.Skipped():
                self.skips[client.job][message.reason if len(self.skips[client.job]) < REASONS_MAX else "other"] += 1
                self.event(node.Skipped(client.job, client.attempt, message.step))
            case wire.Persist():
                self.event(node.Asked(client.job, client.attempt, message.step))
            case wire.Chose():
                source = None if message.step < 0 else (message.attempt, message.step)
                self.event(node.Chosen(client.job, client.attempt, source, message.protected))
                self._drop_guests(client.job)
            case wire.RestoreFailed():
                self._failed(f"restore of job {client.job} step {message.step} from {message.source}", PeerFailedHere(message.why))
                self.event(node.RestoreFailed(client.job, message.attempt, message.step, message.source))
            case wire.Closed():
                self.members.close(client.channel)
            case wire.ProbeDone() | wire.StacksDone() | wire.Acted() | wire.Ending():
                self.watcher.notice(client, message)
            case wire.HandBack() if fd is not None:
                self._adopt(fd, f"handed back by process {client.pid}")
            case _:
                client.channel.close(f"unexpected {type(message).__name__}")

    async def _answer(self, client: Client, request: wire.Request, fd: int | None) -> None:
        try:
            match request:
                case wire.Hello():
                    await self._hello(client, request)
                case wire.Join():
                    await self._join(client, request, fd)
                case wire.Watch() if fd is not None and client.role == "tap":
                    client.channel.send(wire.Watched(id=request.id, watching=self.watcher.watch(client, request, fd)))
                case wire.Open():
                    await self._open(client, request)
                case wire.Ensure():
                    await self._ensure(client, request)
                case _:
                    self._answer_at_once(client, request)
        except CkptdError as e:
            self._failed(f"{type(request).__name__} of {client.job} rank {client.rank}", e)
            client.channel.send(wire.Refused(id=request.id, error=type(e).__name__, message=e.message, remedy=e.remedy))
        except OSError as e:
            self._failed(f"{type(request).__name__} of {client.job} rank {client.rank}", e)
            client.channel.send(wire.Refused(id=request.id, error="DaemonUnreachable", message=str(e)))
        except (ValueError, OverflowError) as e:  # numbers that cannot be: an arena of -1 bytes, a name with a NUL
            self._failed(f"{type(request).__name__} of {client.job} rank {client.rank}", BadArgument(str(e)))
            client.channel.send(wire.Refused(id=request.id, error="BadArgument", message=str(e)))
        except Exception as e:  # noqa: BLE001  who asked must have an answer
            self._failed(f"{type(request).__name__} of {client.job} rank {client.rank}", e)
            client.channel.send(wire.Refused(id=request.id, error="Bug", message=f"{type(e).__name__}: {e}"))

    def _answer_at_once(self, client: Client, request: wire.Request) -> None:
        match request:
            case wire.Enter() if (client.role, client.job) != ("agent", request.job):
                msg = f"a launcher of job {request.job!r} did not say Hello here"
                raise BadArgument(msg)
            case wire.Enter():
                client.channel.send(wire.Entered(id=request.id, address=self.members.enter(client.channel, request)))
            case wire.Forget():
                self._forget(request.job)
                client.channel.send(wire.Done(id=request.id))
            case wire.Status():
                client.channel.send(wire.Report(id=request.id, status=self.status()))
            case wire.Shutdown():
                client.channel.send(wire.Done(id=request.id))
                self._asked_to_leave()
            case _:
                client.channel.close(f"unexpected {type(request).__name__}")

    def _asked_to_leave(self) -> None:
        """At once, unless other jobs are here."""
        if len(self.arenas) or any(c.role == "rank" for c in self.clients):
            log.info("asked to leave, but other jobs are here: lingering")
            self.linger_s = self.settings.linger_s or LINGER_ASKED_S
        else:
            self._leave.set()

    async def _hello(self, client: Client, m: wire.Hello) -> None:
        if m.protocol != wire.PROTOCOL:
            msg = f"daemon {__version__} speaks protocol {wire.PROTOCOL}, the client speaks {m.protocol}"
            raise BadArgument(msg, remedy="restart the daemon with the version of ckptd that the job uses")
        if client.role:
            msg = "Hello is said once"
            raise BadArgument(msg)
        client.role, client.job, client.rank = m.role, m.job, m.rank
        if m.role in {"rank", "tap"}:
            self._watch(client)
        if m.role == "rank":
            await self._settle(m.job)
        if m.role == "keeper":
            for held in self.arenas.of(m.job):
                client.channel.send(wire.Kept(arena=held.name), held.fd)
        known = self.node.jobs.get(m.job)
        attempts = [known.attempt, *(k[0] for k in known.snapshots)] if known else [0]
        client.channel.send(
            wire.Welcome(
                id=m.id,
                daemon=self.name,
                peer_address=self.peers.address,
                attempt_max=max(attempts),
                holdings=self.node.holdings(m.job),
                failed=sorted(known.failed) if known else [],
                labels=dict(self.settings.labels),
            )
        )

    async def _settle(self, job: str) -> None:
        """Wait until every image that was complete has its checksums, so that a restart is offered the newest step."""
        for client in [*self.clients]:
            if client.job == job and client.arena is not None and not client.alive:
                self._gone(client)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(SETTLE_TIMEOUT_S):
                while self.busy[job]:
                    self._settled.clear()
                    await self._settled.wait()

    async def _join(self, client: Client, m: wire.Join, fd: int | None) -> None:
        known = self.node.jobs.get(m.job)
        why = self._why_not_join(client, m, known)
        if why:
            if fd is not None:
                os.close(fd)
            raise BadArgument(why)
        protects = self.protection.join(m)
        if known is None or m.attempt > known.attempt:
            self._drop_guests(m.job)  # what was opened for an attempt that never chose is of other nodes, or of a group that has changed since
            self._verify_ahead(m.job)  # beside granting and mapping of memory; if a death has begun it, there is nothing to do
            self.ahead.pop(m.job, None)
        client.attempt = m.attempt
        if fd is not None:
            self._adopt(fd, f"handed back by rank {m.rank}")
        self.event(node.AttemptBegan(m.job, m.attempt, m.node, len(m.peers), protects, m.protected, m.rank, m.local_count))
        self.tiers[m.job] = Tier(m.store, Retention(newest=m.keep_newest, every=m.keep_every), self.tier(m.job).last)
        self.peers.join(m.job, m.attempt, m.node, m.peers, m.secret)
        held, note = await self._arena_for(client, m)
        client.arena = held
        self._scan(held)  # what was filled since somebody looked, while no daemon was there
        geometry = held.geometry
        client.channel.send(
            wire.Granted(
                id=m.id, arena=held.name, slots=geometry.slots, slot_bytes=geometry.slot_bytes, brings=m.image_bytes > 0, note=note
            ),
            None if m.image_bytes == 0 else held.fd,
        )
        known = self.node.jobs.get(m.job)
        if fd is not None and known is not None and known.committed is not None:  # what a successor knows and the rank may have missed
            client.channel.send(wire.Reached(attempt=known.committed[0], step=known.committed[1], state=node.COMMITTED))

    def _why_not_join(self, client: Client, m: wire.Join, known: node.Job | None) -> str:  # noqa: PLR0911  a list of reasons
        if client.role != "rank" or (client.job, client.rank) != (m.job, m.rank):
            return f"rank {m.rank} of job {m.job!r} did not say Hello here"
        if m.attempt < 1:
            return f"attempt {m.attempt}: they begin at 1"
        if known is not None and m.attempt < known.attempt:
            return f"attempt {m.attempt} of job {m.job!r} is over: attempt {known.attempt} has begun"
        if (other := self._alive_elsewhere(client, m.attempt)) is not None:
            return f"rank {m.rank} of job {m.job!r} is alive already, as process {other}: two runs must not share a job's name"
        if not 0 <= m.node < len(m.peers) or not 0 <= m.rank < m.world_size or not 1 <= m.local_count <= m.world_size or m.image_bytes < 0:
            return f"rank {m.rank} of {m.world_size}, {m.local_count} here, node {m.node} of {len(m.peers)}, {m.image_bytes} bytes: this cannot be"
        if len(m.secret) != proof.SECRET_BYTES and len(m.peers) > 1:
            return f"a secret of {len(m.secret)} bytes, not {proof.SECRET_BYTES}"
        if len(m.labels) not in {0, len(m.peers)}:
            return f"failure domains of {len(m.labels)} nodes for {len(m.peers)}"
        return ""

    def _alive_elsewhere(self, client: Client, attempt: int) -> int | None:
        """The pid of another process that is this rank of this job: of the same attempt, or taking snapshots just now. (A stopped zombie of an
        older attempt must not keep its successor out.)"""
        for other in self.clients:
            same = (other.job, other.rank) == (client.job, client.rank) and other.arena is not None and other.alive
            if same and other.pid != client.pid and (attempt <= other.attempt or time.monotonic() - other.filled_s < ACTIVE_S):
                return other.pid
        return None

    async def _arena_for(self, client: Client, m: wire.Join) -> tuple[arena.Arena, str]:
        """The rank's own memory of the last attempt if it fits and nobody lives in it, else new memory."""
        others = [c for c in {*self.clients, *self.parted} if c is not client and c.arena is not None]
        taken = {c.arena for c in others if c.pid != client.pid}
        for held in self.arenas.of(m.job, m.rank):
            if held in taken:
                continue
            if m.image_bytes == 0 or held.geometry.slot_bytes >= m.image_bytes:
                for other in others:  # an earlier connection of the same process
                    if other.arena is held:
                        other.arena = None
                        if other in self.parted:
                            self.parted.discard(other)
                            self._unwatch(other)
                if m.image_bytes > 0 and client.arena is not held:
                    self.arenas.void_torn(held)  # its last owner died, perhaps while no daemon was there to see it
                return held, ""
        if m.image_bytes == 0:
            msg = f"rank {m.rank} handed back no arena that can be used"
            raise NotFound(msg)
        joined = sum(c.job == m.job and c.attempt == m.attempt and c.arena is not None for c in self.clients)
        least = PROTECT_SLOTS_MIN if m.parity and len(m.peers) > 1 else slots.SLOTS_MIN
        allowed = arena.admit(m.image_bytes, m.slots, max(0, m.local_count - 1 - joined), min(least, m.slots))
        made = await self._in_pool(
            partial(arena.Arena.create, job=m.job, rank=m.rank, slot_count=allowed, slot_bytes=m.image_bytes)
        )
        await self._in_pool(made.populate)
        self.hold(made)
        note = "" if allowed == m.slots else f"{allowed} slots instead of {m.slots}: memory is short"
        return made, note

    def hold(self, made: arena.Arena) -> None:
        """A new arena: hold it, and give keepers their copy."""
        self.arenas.add(made)
        for keeper in [*self.clients]:
            if keeper.role == "keeper" and keeper.job == made.descriptor.job:
                keeper.channel.send(wire.Kept(arena=made.name), made.fd)

    async def _open(self, client: Client, m: wire.Open) -> None:
        _only_its_own(client, m.job)
        found = self._find(m.job, m.attempt, m.step, m.rank)
        if found is not None:
            ref, image_bytes = found
            held = self.arenas.get(ref.arena)
            if held is not None:
                client.channel.send(
                    wire.Opened(
                        id=m.id, image=wire.image_id(m), offset=held.geometry.image_at(ref.slot), image_bytes=image_bytes,
                        digests=self.arenas.digests(ref),
                    ),
                    held.fd,
                )  # fmt: skip
                return
        key = (m.job, m.attempt, m.step, m.rank)
        guest = self.guests.get(key)
        if guest is None and m.remains is not None:
            made = await self.protection.open(key, m.remains)
            guest = self.guests.setdefault(key, made)
            if guest is not made:  # another rank was faster
                made.close()
        elif guest is None:
            address = self.peers.address_of(m.job, m.node)
            about = await self.peers.describe(address, *key)
            guest = self.guests.get(key)  # another rank may have been faster
            if guest is None:
                guest = self.guests[key] = Guest.of(wire.image_id(m), m.node, about.image_bytes, about.digests)
        guest.node, guest.remains = m.node, m.remains  # nodes are numbered anew in each attempt
        client.channel.send(
            wire.Opened(id=m.id, image=wire.image_id(m), offset=0, image_bytes=guest.image_bytes, digests=guest.digests), guest.fd
        )

    async def _ensure(self, client: Client, m: wire.Ensure) -> None:
        job, attempt, step, rank = key = wire.parse_image_id(m.image)
        _only_its_own(client, job)
        found = self._find(job, attempt, step, rank)
        guest = self.guests.get(key)
        image_bytes = found[1] if found is not None else guest.image_bytes if guest is not None else 0
        count = checksum.block_count(image_bytes)
        if any(not 0 <= a <= b <= count for a, b in m.blocks) or sum(b - a for a, b in m.blocks) > count:  # before a range is walked
            msg = f"image {m.image!r} has {count} blocks here; more were asked for, or some twice"
            raise NotFound(msg)
        blocks = [b for first, last in m.blocks for b in range(first, last)]
        if found is not None:
            await self._verify(*found, blocks)
        else:
            await self._fetch(key, blocks)
        client.channel.send(wire.Done(id=m.id))

    async def _verify(self, ref: node.SlotRef, image_bytes: int, blocks: Iterable[int]) -> None:
        self.verifying = {r: lock for r, lock in self.verifying.items() if lock.locked() or r == ref}
        async with self.verifying.setdefault(ref, asyncio.Lock()):  # who comes second finds it done
            wanted = self.arenas.unverified(ref, blocks)
            if not wanted:
                return
            image, digests = self.arenas.image(ref, image_bytes), self.arenas.digests(ref)
            what = f"slot {ref.slot} of {ref.arena}"
            shares = [wanted[i :: self.settings.threads] for i in range(min(len(wanted), self.settings.threads))]
            await asyncio.gather(*(self._in_pool(partial(verify_blocks, what, image, digests, share)) for share in shares))
            self.arenas.verified(ref, wanted)

    async def _fetch(self, key: tuple[str, int, int, int], blocks: Iterable[int]) -> None:
        guest = self.guests.get(key)
        if guest is None:
            msg = f"image {key} is not open"
            raise NotFound(msg)
        async with guest.lock:  # a block that a rank may be reading is not written again
            await self._fetch_into(guest, key, blocks)

    async def _fetch_into(self, guest: Guest, key: tuple[str, int, int, int], blocks: Iterable[int]) -> None:
        size = guest.image_bytes
        wanted = sorted({b for b in blocks if b not in guest.present and 0 <= b < checksum.block_count(size)})
        if guest.remains is not None:
            await self.protection.decode(key, guest, guest.remains, wanted)
            return
        address = self.peers.address_of(key[0], guest.node)
        with memoryview(guest.mapping) as view:
            arrived = partial(guest.arrived, f"image of rank {key[3]} from {address}", view)
            await self.peers.fetch(address, key[0], key[1:], [checksum.extent_of(b, size) for b in wanted], view, arrived)

    def _find(self, job: str, attempt: int, step: int, rank: int) -> tuple[node.SlotRef, int] | None:
        known = self.node.jobs.get(job)
        snapshot = known.snapshots.get((attempt, step)) if known else None
        image = snapshot.images.get(rank) if snapshot and snapshot.state != node.FILLING else None
        return (image.ref, image.image_bytes) if image else None

    def _forget(self, job: str) -> None:
        if job in self.node.jobs:
            self.event(node.Forget(job))
        self.peers.leave(job)
        self.watcher.forget(job)
        self._drop_guests(job)
        self.tiers.pop(job, None)
        self.protection.leave(job)
        self.ballots.pop(job, None)
        self.skips.pop(job, None)
        for held in self.arenas.of(job):
            if not any(c.arena is held for c in self.clients):
                self._drop_arena(held)

    def _drop_guests(self, job: str) -> None:
        for key in [k for k in self.guests if k[0] == job]:
            self.guests.pop(key).close()

    def _drop_arena(self, held: arena.Arena) -> None:
        for client in [*self.clients]:
            if client.role == "keeper" and client.job == held.descriptor.job:
                client.channel.send(wire.Dropped(arena=held.name))
        self.arenas.drop(held.name)

    def _collect(self) -> None:
        """Free arenas that nobody owns and no snapshot needs, once the job's current attempt has ranks of its own."""
        owned = {c.arena.name for c in self.clients if c.arena is not None}
        for job in self.node.jobs.values():
            if not any(c.job == job.name and c.attempt == job.attempt and c.arena is not None for c in self.clients):
                continue
            needed = {i.ref.arena for s in job.snapshots.values() for i in s.images.values()}
            for held in self.arenas.of(job.name):
                if held.descriptor.rank == protect.FRAGMENT_RANK and job.protect:
                    self._collect_parity(job, held)
                    continue
                if held.name not in owned and held.name not in needed and job.committed and job.committed[0] == job.attempt:
                    self._drop_arena(held)

    def _collect_parity(self, job: node.Job, held: arena.Arena) -> None:
        """Free memory for fragments that became too small, once nothing lies in it."""
        larger = any(a.geometry.slot_bytes > held.geometry.slot_bytes for a in self.arenas.of(job.name, protect.FRAGMENT_RANK))
        used = any(ref.arena == held.name for ref, _ in job.fragments.values())
        filling = any(held.header(s).state == slots.FILLING for s in range(held.geometry.slots))
        if larger and not used and not filling:
            self._drop_arena(held)

    # --- what the node asks for ---------------------------------------------------------------------------------------------

    def event(self, event: node.Event) -> None:
        """Something happened to a snapshot: on the loop."""
        self._perform(self.node.receive(event, time.monotonic()))

    def _perform(self, actions: Iterable[node.Action]) -> None:
        for action in actions:
            self._actions[type(action)](action)

    def _do_hash(self, a: node.Hash) -> None:
        self.start(self._hash(a))

    async def _hash(self, a: node.Hash) -> None:
        self.busy[a.job] += 1
        try:
            held = self.arenas.get(a.ref.arena)
            if held is None:
                return
            image = self.arenas.image(a.ref, a.image_bytes)
            digests = await self._in_pool(partial(make_seal, a.ref.slot, a.ref.gen, image, held.seal(a.ref.slot)))
            del image
            put_seal(held, a.ref.slot, a.ref.gen, digests)
            self.event(node.Hashed(a.job, a.attempt, a.step, a.rank, a.ref))
        except CkptdError as e:
            self._failed(f"sealing step {a.step} of job {a.job} rank {a.rank}", e)
            self.event(node.Skipped(a.job, a.attempt, a.step))
        finally:
            self.busy[a.job] -= 1
            self._settled.set()

    def _do_tell_peers(self, a: node.TellPeers) -> None:
        if a.what == "sealed" and a.job in self.ballots and (said := self._said_here(a)):
            here = self.node.jobs[a.job].node
            self.peers.tell(wire.PeerNews(job=a.job, attempt=a.attempt, step=a.step, node=here, what="replicas", replicas=said), only=0)
        self.peers.tell(self._news(a), only=0 if a.what in {"part", "asked"} else None)

    def _news(self, a: node.TellPeers) -> wire.PeerNews:
        here = self.node.jobs[a.job]
        digests: dict[int, bytes] = {}
        if (a.what, a.errand) == ("part", node.PERSIST):
            self.written.pop((a.job, a.attempt, a.step), None)
            digests = {rank: self.arenas.digests(i.ref) for rank, i in here.snapshots[a.attempt, a.step].images.items()}
        return wire.PeerNews(
            job=a.job, attempt=a.attempt, step=a.step, node=here.node, what=a.what, errand=a.errand, after=a.after, digests=digests
        )

    def _said_here(self, a: node.TellPeers) -> dict[int, dict[str, int]]:
        """What this node's ranks said of what others hold too."""
        return self.ballots[a.job].of((a.attempt, a.step), self.node.jobs[a.job].snapshots[a.attempt, a.step].images)

    def _compare_replicas(self, a: node.TellRanks) -> None:
        """A step is COMMITTED: whatever was said of it has come to node 0, before "sealed"."""
        found = self.ballots[a.job].committed((a.attempt, a.step))
        for suspicion in found if self.node.jobs[a.job].node == 0 else ():
            log.error("job %s step %d: %s", a.job, a.step, suspicion)
            self.suspicions.append((a.job, a.step, suspicion))
            self._do_tell_ranks(node.TellRanks(a.job, a.attempt, a.step, f"replicas differ: {suspicion}"))

    def _do_tell_ranks(self, a: node.TellRanks) -> None:
        if a.state == node.COMMITTED and a.job in self.ballots:
            self._compare_replicas(a)
        for client in [*self.clients]:  # a send that fails takes its client out
            if client.role == "rank" and client.job == a.job:
                client.channel.send(wire.Reached(attempt=a.attempt, step=a.step, state=a.state))

    def _do_part(self, a: node.DoPart) -> None:
        self.start(self._errand(a, a.errand, self._write_images(a) if a.errand == node.PERSIST else self._make_fragment(a)))

    def _do_write_manifest(self, a: node.WriteManifest) -> None:
        self.start(self._errand(a, node.PERSIST, self._write_manifest(a)))

    async def _errand(self, a: node.DoPart | node.WriteManifest, errand: str, work: Awaitable[None]) -> None:
        try:
            await work
        except Exception as e:  # noqa: BLE001  the errand must end on all nodes, whatever it was
            if errand == node.PERSIST:
                self.written.pop((a.job, a.attempt, a.step), None)
            self._failed(f"{errand}ing step {a.step} of job {a.job}", e)
            self.event(node.ErrandFailed(a.job, a.attempt, a.step, str(e), errand))

    async def _make_fragment(self, a: node.DoPart) -> None:
        ref, fragment = await self.protection.make(a.job, (a.attempt, a.step))
        self.event(node.PartDone(a.job, a.attempt, a.step, node.PROTECT, ref=ref, fragment=fragment))

    async def _write_images(self, a: node.DoPart) -> None:
        url = self.tier(a.job).url
        if not url:
            msg = f"job {a.job!r} has no durable tier"
            raise BadArgument(msg, remedy="give one: attach(store=...), or ckptd run --store")
        held = {rank: (self.arenas.image(ref, size), self.arenas.digests(ref)) for rank, ref, size in a.refs}
        await self.in_store_pool(partial(persist.write_images, url, a.job, a.step, a.attempt, held))
        self.written.setdefault((a.job, a.attempt, a.step), {}).update({r: d for r, (_, d) in held.items()})
        self.event(node.PartDone(a.job, a.attempt, a.step))

    async def _write_manifest(self, a: node.WriteManifest) -> None:
        tier = self.tier(a.job)
        digests = self.written.pop((a.job, a.attempt, a.step), {})
        work = partial(persist.write_manifest, tier.url, a.job, a.step, a.attempt, a.world_size, digests, time.time())
        tier.last = await self.in_store_pool(work)
        self.event(node.ErrandDone(a.job, a.attempt, a.step))
        retain = self.in_store_pool(partial(persist.retain, tier.url, a.job, tier.retention, tier.last))
        await self._guarded(f"deleting old checkpoints of job {a.job}", retain)  # no failure of this step: it is persisted

    def tier(self, job: str) -> Tier:
        """Where a job's checkpoints go."""
        return self.tiers.get(job) or Tier()

    # --- peers.Local --------------------------------------------------------------------------------------------------------

    def held(self, job: str, attempt: int, step: int, rank: int) -> peers.Held:
        """An image in memory, or (FRAGMENT_RANK) this node's fragment; raises NotFound."""
        found = self._find(job, attempt, step, rank)
        if rank == protect.FRAGMENT_RANK and job in self.node.jobs and (attempt, step) in self.node.jobs[job].fragments:
            ref = self.node.jobs[job].fragments[attempt, step][0]
            fragments = self.arenas.get(ref.arena)
            found = None if fragments is None else (ref, fragments.header(ref.slot).image_bytes)
        if found is None:
            msg = f"step {step} (attempt {attempt}) of job {job!r} rank {rank} is not here"
            raise NotFound(msg)
        return peers.Held(self.arenas.image(*found), self.arenas.digests(found[0]))

    def listing(self, job: str, attempt: int, step: int) -> list[tuple[int, int, bytes]]:
        """(rank, bytes, checksums) of the sealed images of a snapshot."""
        known = self.node.jobs.get(job)
        snapshot = known.snapshots.get((attempt, step)) if known else None
        if snapshot is None or snapshot.state == node.FILLING:
            return []
        return [(rank, i.image_bytes, self.arenas.digests(i.ref)) for rank, i in sorted(snapshot.images.items())]

    def heard(self, news: wire.PeerNews) -> None:
        """A peer told something."""
        key = (news.job, news.attempt, news.step)
        if news.job not in self.node.jobs or news.errand not in {"", *node.ERRANDS}:  # news make no jobs
            return
        errand = news.errand or node.PERSIST
        match news.what:
            case "sealed":
                self.event(node.PeerSealed(*key, news.node))
            case "skipped":
                self.event(node.Skipped(*key, news.node))
            case "replicas":
                self.ballots[news.job].add((news.attempt, news.step), news.replicas)
            case "asked":
                self.event(node.Asked(*key, errand))
            case "told":
                self.event(node.Told(*key, errand, news.after))
            case "part":
                if errand == node.PERSIST and key[1:] in self.node.jobs[news.job].snapshots:
                    self.written.setdefault(key, {}).update(news.digests)
                self.event(node.PartDone(*key, errand, news.node))
            case "done":
                self.event(node.ErrandDone(*key, errand, here=False))
            case "failed":
                if errand == node.PERSIST:
                    self.written.pop(key, None)
                self.event(node.ErrandFailed(*key, f"node {news.node} could not", errand, here=False))
            case _:
                log.debug("a peer says %r", news.what)

    def gathering(self, job: str) -> bytes | None:
        """The secret of a job's rendezvous."""
        return self.members.secret_of(job)

    def beaten(self, beat: wire.PeerBeat) -> None:
        """A node said something of a job's rendezvous."""
        self.members.heard(beat)

    def watched(self, message: wire.PeerWatch | wire.PeerAsk | wire.PeerVerdict) -> None:
        """A peer says something of the watching of a job."""
        self.watcher.heard(message)

    def greeting(self, job: str) -> list[wire.PeerNews]:
        """News to begin a connection with."""
        return [self._news(a) for a in self.node.greeting(job)]

    # --- common -------------------------------------------------------------------------------------------------------------

    def status(self) -> dict[str, Any]:
        """Everything `ckptd status` shows, as plain values."""
        return {
            "version": __version__,
            "daemon": self.name,
            "pid": os.getpid(),
            "uptime_s": round(time.monotonic() - self.started_s, 1),
            "peer_address": self.peers.address,
            "strangers": self.peers.strangers,
            "memory_bytes": sum(a.geometry.arena_bytes for a in self.arenas),
            "errors": self.error_count,
            "last_errors": [*self.errors][-5:],
            "jobs": {name: self._job_status(job) for name, job in self.node.jobs.items()},
            **self.faces.status(),
            "watched": {name: self.watcher.status(name) for name in self.watcher.jobs},
            "rendezvous": {name: self.members.status(name) for name in self.members.names()},
        }

    def _job_status(self, job: node.Job) -> dict[str, Any]:
        return report.of_job(job) | {
            "ranks": sorted(c.rank for c in self.clients if c.role == "rank" and c.job == job.name and c.arena is not None),
            "peers_connected": {str(n): ok for n, ok in self.peers.connected(job.name).items()},
            "group": self.protection.status(job.name) if job.protect else None,
            "store": self.tier(job.name).url,
            "skipped": dict(self.skips.get(job.name, {})),
            "watching": self.watcher.status(job.name),
            "suspected": [{"step": step, "what": str(s), "ranks": s.ranks, "tensors": s.tensors} for name, step, s in self.suspicions if name == job.name],
        }

    def snapshot(self, job: str, key: Key) -> node.Snapshot:
        """A snapshot that is known here; raises NotFound."""
        known = self.node.jobs.get(job)
        found = known.snapshots.get(key) if known else None
        if found is None:
            msg = f"step {key[1]} (attempt {key[0]}) of job {job!r} is not here"
            raise NotFound(msg)
        return found

    def number(self, job: str) -> int:
        """This node's number in the job's attempt."""
        known = self.node.jobs.get(job)
        return known.node if known else -1

    async def in_pool(self, work: Callable[[], Any]) -> Any:
        """Byte work for others of the daemon's parts."""
        return await self._in_pool(work)

    async def _in_pool(self, work: Callable[[], Any]) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._pool, work)

    async def in_store_pool(self, work: Callable[[], Any]) -> Any:
        """Work that may hang: storage, other processes."""
        return await asyncio.get_running_loop().run_in_executor(self._store_pool, work)

    def start(self, work: Any) -> None:
        """A task of the daemon's own; its failure is counted."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._finished)

    def _finished(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._failed("a task", error)

    async def _guarded(self, what: str, work: Awaitable[None]) -> None:
        try:
            await work
        except (CkptdError, OSError) as e:
            self._failed(what, e)

    def _failed(self, what: str, error: BaseException) -> None:
        self.error_count += 1
        self.errors.append(f"{what}: {error}")
        known = isinstance(error, CkptdError | OSError)
        log.warning("%s: %s", what, error, exc_info=None if known else error)


class PeerFailedHere(CkptdError):
    """A rank reported a failure of its own; only its text matters."""


def _only_its_own(client: Client, job: str) -> None:
    if job != client.job:
        msg = f"this is a line of job {client.job!r}, not of {job!r}"
        raise NotFound(msg)


def _read_port(path: Path) -> int:
    """The predecessor's port for peers, or 0."""
    with contextlib.suppress(OSError, ValueError):
        port = int(path.read_text()[:8])
        return port if 0 < port < 1 << 16 else 0
    return 0


def run(settings: Settings) -> None:
    """Run a daemon in this process until it is told to leave."""
    asyncio.run(Daemon(settings).run())
