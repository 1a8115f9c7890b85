"""torch elastic's rendezvous, by the nodes' daemons: backend "ckptd" for `ckptd run`, and for torchrun (entry point `torchrun.handlers`).

    ckptd run --nnodes 3:4 --rdzv-endpoint hostA:7070,hostB:7070 ...
    torchrun --nnodes 3:4 --rdzv-backend ckptd --rdzv-endpoint hostA:7070 --rdzv-id job ...      beside daemons that run already

The handler lives in the launcher; the daemon does the work (members.py). Where plain torchrun's rendezvous dies with the host of its store, here each epoch has a store of its
own, hosted by the launcher of its first member: ports are part of what a node says when it enters. That a member was lost is told by `num_nodes_waiting`, which torch elastic
asks all the time: what it answers to is a restart that counts as none.

Threads: all methods are called by the launcher's main thread. Nothing waits without a deadline.
"""

from __future__ import annotations

import contextlib
import hashlib
import ipaddress
import logging
import os
import select
import socket
import time
from datetime import timedelta
from typing import Any

import msgspec
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore  # torch.distributed re-exports them, but not for type checkers
from torch.distributed.elastic.rendezvous import (
    RendezvousClosedError,
    RendezvousConnectionError,
    RendezvousHandler,
    RendezvousInfo,
    RendezvousParameters,
    RendezvousStoreInfo,
    RendezvousTimeoutError,
)

from ckptd.channel import Pipe, connect, read_private, socket_path
from ckptd.core import wire
from ckptd.core.rendezvous import Roster, Wish
from ckptd.errors import BadArgument, CkptdError, DaemonUnreachable
from ckptd.trace import mark

log = logging.getLogger("ckptd.elastic")

BACKEND = "ckptd"
PORT = 7070
"""Of a seed's daemon, where the endpoint gives none."""
SECRET_BYTES_MIN, SECRET_BYTES_MAX = 16, 65536
JOIN_TIMEOUT_S = 600.0
LAST_CALL_S = 5.0
STORE_TIMEOUT_S = 30.0
"""For the agents' store of an epoch: who hosts it is up, or was lost since."""
SILENT_S = 10.0
"""It is said every so often what is waited for."""


class Handler(RendezvousHandler):
    """A node's part in the rendezvous."""

    def __init__(
        self, job: str, wish: Wish, secret: bytes, *, directory: str | None = None, join_timeout_s: float = JOIN_TIMEOUT_S
    ) -> None:
        self._job, self._wish, self._secret, self._join_timeout_s = job, wish, secret, join_timeout_s
        self._path = socket_path(directory)
        self._pipe: Pipe | None = None
        self._tried_s = float("-inf")
        self._store: TCPStore | None = None
        self.roster = Roster(0, ())
        self.position = -1
        self._regroup = ""
        self._closed = self._left = False
        self._id = 0

    def get_backend(self) -> str:
        """Its name."""
        return BACKEND

    def get_run_id(self) -> str:
        """The job's name."""
        return self._job

    def is_closed(self) -> bool:
        """Whether the job is over."""
        self._listen()
        return self._closed

    def set_closed(self) -> None:
        """The job is over, for all nodes."""
        self._closed = True
        if self._pipe is not None:
            with contextlib.suppress(OSError, CkptdError):
                self._pipe.put(wire.Closed())
                self._pipe.flush()

    def shutdown(self) -> bool:
        """The launcher ends: so does the job, unless this node left it."""
        if not self._left:
            self.set_closed()
        return True

    @property
    def nodes_min(self) -> int:
        """With fewer nodes the job does not run."""
        return self._wish.nodes_min

    def resize(self, workers: int) -> None:
        """From the next rendezvous on this node has so many workers."""
        self._wish = msgspec.structs.replace(self._wish, workers=workers)

    def leave(self) -> None:
        """This node's part is over, the others' is not: they meet without it. Its daemon stays, and votes."""
        self._left = True
        if self._pipe is not None:
            self._pipe.close()
            self._pipe = None

    def num_nodes_waiting(self) -> int:
        """Whether to stop the workers and come to the next rendezvous."""
        self._listen()
        if self._regroup:
            log.warning("epoch %d ends: %s", self.roster.epoch, self._regroup)
            mark("regroup", why=self._regroup)
        return int(bool(self._regroup))

    def next_rendezvous(self) -> RendezvousInfo:
        """Wait to be of a roster. Raises RendezvousClosedError, RendezvousTimeoutError, RendezvousConnectionError."""
        until_s = time.monotonic() + self._join_timeout_s
        while True:
            self._gather(until_s)
            first = self.roster.members[0]
            try:
                if self.position == 0 and self._store is not None:
                    store = self._store
                else:
                    store = TCPStore(first.host, first.agent_port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=STORE_TIMEOUT_S))
            except (OSError, RuntimeError) as e:  # its host was lost since
                log.warning("the store of epoch %d at %s:%d cannot be reached: %s", self.roster.epoch, first.host, first.agent_port, e)
                continue
            mark("rendezvous", epoch=self.roster.epoch, nodes=len(self.roster.members), node=self.position)
            info = RendezvousStoreInfo(first.host, first.worker_port)
            prefixed: Store = PrefixStore(f"ckptd/{self.roster.epoch}", store)
            return RendezvousInfo(prefixed, self.position, len(self.roster.members), info)

    # --- the daemon's line ------------------------------------------------------------------------------------------------------

    def _gather(self, until_s: float) -> None:
        """Enter, and wait for a roster that we are of."""
        if self._closed:
            msg = f"job {self._job!r} is over"
            raise RendezvousClosedError(msg)
        self._store = TCPStore("0.0.0.0", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=STORE_TIMEOUT_S))  # noqa: S104  torch's own listens on all
        wish = self._wish
        self._wish = Wish(
            seeds=wish.seeds, nodes_min=wish.nodes_min, nodes_max=wish.nodes_max, last_call_s=wish.last_call_s, workers=wish.workers, host=wish.host,
            agent_port=self._store.port, worker_port=_free_port(),
        )  # fmt: skip
        before, self.position, self._regroup = self.roster.epoch, -1, ""
        if self._pipe is not None:
            self._enter(self._pipe)
        said_s = time.monotonic()
        while self.roster.epoch == before:
            now_s = time.monotonic()
            if now_s > until_s:
                msg = f"no rendezvous of job {self._job!r} within {self._join_timeout_s:.0f} s: `ckptd status --json` says which nodes this one hears, under rendezvous"
                raise RendezvousTimeoutError(msg)
            if now_s - said_s > SILENT_S:
                said_s = now_s
                log.info("job %s: waiting for at least %d nodes, and for more than half of those of the last epoch (%d)", self._job, wish.nodes_min, before)
            self._listen(min(0.2, until_s - now_s))
            if self._closed:
                msg = f"job {self._job!r} is over"
                raise RendezvousClosedError(msg)

    def _listen(self, wait_s: float = 0.0) -> None:
        """Take what the daemon said; come back to one that was replaced."""
        if self._pipe is None:
            if time.monotonic() - self._tried_s < 0.1:
                time.sleep(wait_s)
                return
            self._tried_s = time.monotonic()
            try:
                self._pipe = connect(self._path, 2.0)
            except DaemonUnreachable:
                time.sleep(wait_s)
                return
            self._pipe.put(wire.Hello(id=0, job=self._job, role="agent"))
            self._enter(self._pipe)
        try:
            select.select([self._pipe.sock], [self._pipe.sock] if self._pipe.wants_write else [], [], wait_s)
            self._pipe.flush()
            while messages := self._pipe.read():
                for message in messages:
                    self._take(message)
        except (OSError, EOFError) as e:
            log.warning("the daemon's line broke: %s", e or "it left")
            self._pipe.close()
            self._pipe = None
        except CkptdError as e:
            raise RendezvousConnectionError(str(e)) from e

    def _enter(self, pipe: Pipe) -> None:
        self._id += 1
        running = self.roster.epoch if self.position >= 0 else 0
        pipe.put(wire.Enter(id=self._id, job=self._job, wish=self._wish, secret=self._secret, running=running))

    def _take(self, message: Any) -> None:
        match message:
            case wire.Gathered():
                self.roster, self.position = message.roster, message.position
                self._regroup = ""  # what was said of the last epoch, while we entered
            case wire.Regroup():
                self._regroup = message.why
            case wire.Closed():
                self._closed = True
            case wire.Entered():
                self._check(message.address)
            case wire.Refused():
                raise BadArgument(message.message, remedy=message.remedy)

    def _check(self, address: str) -> None:
        """A seed whose daemon listens elsewhere would never be found."""
        host = address.rpartition(":")[0]
        here = [s for s in self._wish.seeds if s.rpartition(":")[0] == host]
        if here and address not in here:
            log.error("the rendezvous is to be at %s, but this node's daemon listens at %s: start it with --peer-port %s", here[0], address, here[0].rpartition(":")[2])


def seeds_of(endpoint: str) -> tuple[str, ...]:
    """The addresses in "host[:port],host[:port]", resolved. Raises BadArgument."""
    found = []
    for part in endpoint.split(","):
        host, colon, port = part.strip().rpartition(":")
        if not colon:
            host, port = port, str(PORT)
        try:
            if not (port.isascii() and port.isdecimal() and 0 < int(port) < 1 << 16):
                msg = f"{port!r} is no port"
                raise ValueError(msg)
            address = socket.getaddrinfo(host, int(port), type=socket.SOCK_STREAM)[0][4]
        except (OSError, ValueError, OverflowError) as e:
            msg = f"--rdzv-endpoint {part}: {e}"
            raise BadArgument(msg, remedy=f"HOST or HOST:PORT of one or more nodes, the same on all; without a port it is {PORT}") from e
        found.append(f"{address[0]!s}:{address[1]!s}")
    return tuple(dict.fromkeys(found))


def address_towards(seeds: tuple[str, ...]) -> str:
    """This node's own address, as the first seed that can be routed to would see it."""
    for seed in seeds:
        host, _, port = seed.rpartition(":")
        with contextlib.suppress(OSError), socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_DGRAM) as s:
            s.connect((host, int(port)))  # sends nothing
            return str(s.getsockname()[0])
    return "127.0.0.1"


def secret_from(file: str | None, job: str) -> bytes:
    """The job's secret: from a file that is ours alone; without one, something that only keeps jobs apart. Raises BadArgument."""
    if not file:
        return hashlib.blake2b(job.encode(), digest_size=32, person=b"ckptd no secret").digest()
    text = read_private("--secret-file", file, SECRET_BYTES_MAX)
    if len(text.strip()) < SECRET_BYTES_MIN:
        msg = f"--secret-file {file}: {len(text.strip())} bytes are no secret"
        raise BadArgument(msg, remedy=f"head -c 32 /dev/urandom | base64 > {file}, and copy it to all nodes")
    return hashlib.blake2b(text.strip(), digest_size=32, key=job.encode()[:64], person=b"ckptd secret").digest()


def check_secret(host: str, file: str | None) -> None:
    """Raise BadArgument for nodes that meet off loopback without a secret."""
    with contextlib.suppress(ValueError):
        if file or ipaddress.ip_address(host).is_loopback:
            return
    msg = f"nodes at {host} need a secret by which they know each other"
    raise BadArgument(msg, remedy="head -c 32 /dev/urandom | base64 > FILE; chmod 600 FILE; copy it to all nodes; --secret-file FILE, or CKPTD_SECRET_FILE")


def handler(params: RendezvousParameters) -> Handler:
    """What torch elastic's registry calls."""
    job = params.run_id
    seeds = seeds_of(params.endpoint) if params.endpoint else ()
    wish = Wish(
        seeds=seeds,
        nodes_min=params.min_nodes,
        nodes_max=params.max_nodes,
        last_call_s=float(params.get("last_call_timeout", LAST_CALL_S)),
        workers=int(params.get("workers", 1)),
        host=params.local_addr or address_towards(seeds),
    )
    file = params.get("secret_file") or os.environ.get("CKPTD_SECRET_FILE")
    check_secret(wish.host, file)
    secret = secret_from(file, job)
    return Handler(job, wish, secret, directory=os.environ.get("CKPTD_DIR"), join_timeout_s=float(params.get("join_timeout", JOIN_TIMEOUT_S)))


def _free_port() -> int:
    """For the first worker's store. It may be taken until then; then the workers fail, and the next epoch has another."""
    with socket.socket() as s:
        s.bind(("", 0))
        port: int = s.getsockname()[1]
        return port
