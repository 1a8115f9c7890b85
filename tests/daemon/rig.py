"""Real daemons and raw trainers: processes, sockets and arenas, no torch. Every process started here is ended here, by its pid."""

from __future__ import annotations

import contextlib
import itertools
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ckptd
from ckptd.arena import Arena
from ckptd.channel import Pipe, connect
from ckptd.core import proof, slots, wire
from ckptd.core.boxes import Box
from ckptd.core.image import Piece, lay_out
from ckptd.errors import DaemonUnreachable

ROOT = str(Path(ckptd.__file__).parents[1])
JOB = "job"


def until(condition: Callable[[], Any], timeout_s: float = 10.0, what: str = "") -> Any:
    """The first true value; fails at the deadline."""
    deadline = time.monotonic() + timeout_s
    while True:
        value = condition()
        if value:
            return value
        assert time.monotonic() < deadline, what or "it did not come about"
        time.sleep(0.01)


class Refusal(Exception):
    """The daemon said Refused."""

    def __init__(self, refused: wire.Refused) -> None:
        super().__init__(f"{refused.error}: {refused.message}")
        self.error = refused.error


class Client:
    """A raw connection: nothing of `Link`, so it can misbehave."""

    def __init__(self, directory: Path) -> None:
        self.pipe: Pipe = connect(directory / "daemon.sock", 5.0)
        self.ids = itertools.count(1)
        self.inbox: list[Any] = []

    def send(self, message: wire.Message, fd: int | None = None) -> None:
        self.pipe.put(message, fd)
        deadline = time.monotonic() + 5
        while True:
            self.pipe.flush()
            if not self.pipe.wants_write:
                return
            assert time.monotonic() < deadline
            select.select([], [self.pipe.sock], [], 0.1)

    def get(self, wanted: Callable[[Any], bool], timeout_s: float = 10.0) -> Any:
        deadline = time.monotonic() + timeout_s
        while True:
            for i, message in enumerate(self.inbox):
                if wanted(message):
                    return self.inbox.pop(i)
            left = deadline - time.monotonic()
            if left <= 0:
                msg = f"nothing came; there is {self.inbox[-5:]}"
                raise TimeoutError(msg)
            if select.select([self.pipe.sock], [], [], left)[0]:
                self.inbox += self.pipe.read()

    def ask(self, kind: type[wire.Request], fd: int | None = None, timeout_s: float = 10.0, **values: Any) -> Any:
        number = next(self.ids)
        self.send(kind(id=number, **values), fd)
        answer = self.get(lambda m: getattr(m, "id", 0) == number, timeout_s)
        if isinstance(answer, wire.Refused):
            raise Refusal(answer)
        return answer

    def status(self) -> dict[str, Any]:
        return self.ask(wire.Status).status

    def job(self, name: str = JOB) -> dict[str, Any]:
        return self.status()["jobs"].get(name, {})

    def steps(self, name: str = JOB) -> dict[tuple[int, int], str]:
        return {(s["attempt"], s["step"]): s["state"] for s in self.job(name).get("snapshots", [])}

    def close(self) -> None:
        self.pipe.close()


def image_of(step: int, rank: int, world: int, nbytes: int, attempt: int = 1, job: str = JOB) -> bytes:
    """A real image, whose bytes differ by step and rank."""
    layout = lay_out(
        [Piece("w", "U8", (world * nbytes,), Box((rank * nbytes,), (nbytes,)))],
        job=job, rank=rank, world_size=world, coords={"rank": rank}, aliases={}, objects_bytes=0,
    )  # fmt: skip
    return layout.render(attempt=attempt, step=step, objects={}) + bytes([(31 * step + rank) % 251]) * nbytes


SECRET = bytes(range(32))


def secret_of(attempt: int) -> bytes:
    return SECRET[attempt % 8 :] + SECRET[: attempt % 8]


class Peer:
    """The end of a daemon's connection that a test plays: it knows the secret, and says what it likes."""

    def __init__(self, sock: socket.socket, *, job: str = JOB, attempt: int = 1, secret: bytes | None = None) -> None:
        """Dial: knock and prove."""
        self.sock, secret = sock, secret_of(attempt) if secret is None else secret
        mine = os.urandom(32)
        sock.sendall(wire.encode(wire.Knock(job=job, attempt=attempt, nonce=mine)))
        theirs = self.frame().nonce
        sock.sendall(wire.encode(wire.Prove(nonce=b"", proof=proof.proof(secret, proof.DIALS, job, attempt, mine, theirs))))
        self.sends, self.receives = (proof.Tagger(secret, role, mine, theirs) for role in (proof.DIALS, proof.LISTENS))

    @classmethod
    def listening(cls, sock: socket.socket) -> Peer:
        """Be dialled, and prove."""
        self = cls.__new__(cls)
        self.sock = sock
        knock = self.frame()
        secret, mine = secret_of(knock.attempt), os.urandom(32)
        who = knock.job, knock.attempt, knock.nonce, mine
        sock.sendall(wire.encode(wire.Prove(nonce=mine, proof=proof.proof(secret, proof.LISTENS, *who))))
        assert self.frame().proof == proof.proof(secret, proof.DIALS, *who)
        self.sends, self.receives = (proof.Tagger(secret, role, knock.nonce, mine) for role in (proof.LISTENS, proof.DIALS))
        return self

    def frame(self, extra: int = 0) -> Any:
        head = self.sock.recv(4, socket.MSG_WAITALL)
        if len(head) < 4:
            raise ConnectionError("it hung up")
        body = self.sock.recv(int.from_bytes(head, "little") + extra, socket.MSG_WAITALL)
        if extra:
            assert self.receives.tag(body[:-extra]) == body[-extra:]
            body = body[:-extra]
        return wire.decode(body, "remote")

    def bytes_of(self, message: wire.Message) -> bytes:
        frame = wire.encode(message)
        return frame + self.sends.tag(frame[4:])

    def send(self, message: wire.Message) -> None:
        self.sock.sendall(self.bytes_of(message))

    def receive(self) -> Any:
        return self.frame(proof.TAG_BYTES)


class Trainer(Client):
    """A rank as the session is one, step by step and without its care."""

    def __init__(
        self, directory: Path, rank: int = 0, *, attempt: int = 1, world: int = 1, local: int = 0, node: int = 0, peers: list[str] | None = None,
        job: str = JOB, slot_count: int = 3, nbytes: int = 1 << 16, store: str = "", join: bool = True, choose: Any = "none",
        parity: int = 0,
    ) -> None:  # fmt: skip
        super().__init__(directory)
        self.directory, self.rank, self.attempt, self.world, self.job_name = directory, rank, attempt, world, job
        self.local, self.node, self.peers = local or world, node, peers or [""]
        self.secret = secret_of(attempt)
        self.slot_count, self.nbytes, self.store, self.parity = slot_count, nbytes, store, parity
        self.arena: Arena | None = None
        try:
            self.welcome = self.ask(wire.Hello, job=job, rank=rank)
            if join:
                self.join()
            if join and choose != "wait":
                self.choose(None if choose == "none" else choose)
        except BaseException:
            self.close()
            raise

    def request(self, image_bytes: int) -> dict[str, Any]:
        return {
            "job": self.job_name, "attempt": self.attempt, "rank": self.rank, "world_size": self.world, "local_count": self.local, "node": self.node,
            "peers": self.peers, "image_bytes": image_bytes, "slots": self.slot_count, "store": self.store, "parity": self.parity, "secret": self.secret,
        }  # fmt: skip

    def join(self) -> wire.Granted:
        granted = self.ask(wire.Join, **self.request(self.nbytes + 2 * slots.PAGE_BYTES))
        if self.arena is not None:
            self.arena.close()
        self.arena = Arena.adopt(self.pipe.take_fd())
        return granted

    def rejoin(self) -> wire.Granted:
        """The daemon is new: say hello to it and hand the arena back."""
        self.pipe.close()
        self.inbox.clear()
        self.pipe = connect(self.directory / "daemon.sock", 5.0)
        self.welcome = self.ask(wire.Hello, job=self.job_name, rank=self.rank)
        return self.ask(wire.Join, self.arena.fd, **self.request(0))

    def choose(self, key: tuple[int, int] | None) -> None:
        attempt, step = key or (-1, -1)
        self.send(wire.Chose(attempt=attempt, step=step))

    def free_slot(self) -> int | None:
        a = self.arena
        return next((s for s in range(a.geometry.slots) if slots.is_free(a.header(s), a.seal(s).released_gen)), None)

    def begin(self, step: int) -> tuple[int, int]:
        """Start a filling and write half of it: (slot, gen)."""
        slot = until(lambda: (s := self.free_slot()) is not None and (s,), what="no slot was released")[0]
        a = self.arena
        image = image_of(step, self.rank, self.world, self.nbytes, self.attempt, self.job_name)
        gen = max(a.header(slot).gen, a.seal(slot).gen, a.seal(slot).released_gen) + 1
        header = slots.Header(
            slots.FILLING, gen, self.attempt, step, len(image), self.rank, self.world, self.local, self.node, len(self.peers)
        )
        slots.begin(a.memory, a.geometry.header_at(slot), header)
        view = a.image(slot, len(image))
        view[: len(image) // 2] = image[: len(image) // 2]
        return slot, gen

    def fill(self, step: int, *, tell: bool = True) -> tuple[int, int]:
        slot, gen = self.begin(step)
        a = self.arena
        image = image_of(step, self.rank, self.world, self.nbytes, self.attempt, self.job_name)
        a.image(slot, len(image))[:] = image
        slots.flip(a.memory, a.geometry.header_at(slot), slots.FILLED)
        if tell:
            self.send(wire.Filled(step=step, slot=slot, gen=gen))
        return slot, gen

    def reached(self, state: str, step: int, timeout_s: float = 10.0) -> wire.Reached:
        return self.get(lambda m: isinstance(m, wire.Reached) and m.state == state and m.step == step, timeout_s)

    def states(self) -> list[int]:
        return [self.arena.header(s).state for s in range(self.arena.geometry.slots)]

    def close(self) -> None:
        super().close()
        if self.arena is not None:
            self.arena.close()
            self.arena = None


class Rig:
    """Daemons, clients and forked children of one test."""

    def __init__(self, base: Path) -> None:
        self.base = base
        self.daemons: dict[str, subprocess.Popen[bytes]] = {}
        self.children: list[int] = []
        self.clients: list[Client] = []

    def directory(self, name: str = "d") -> Path:
        return self.base / name

    def start(self, name: str = "d", *options: str, env: dict[str, str] | None = None) -> Path:
        directory = self.directory(name)
        directory.mkdir(mode=0o700, exist_ok=True)
        with (self.base / f"{name}.log").open("ab") as log:
            self.daemons[name] = subprocess.Popen(
                [sys.executable, "-m", "ckptd.cli.main", "daemon", "--dir", str(directory), *options],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=self.base, env=os.environ | {"PYTHONPATH": ROOT} | (env or {}),
            )  # fmt: skip
        self.await_up(directory, self.daemons[name])
        return directory

    def await_up(self, directory: Path, process: subprocess.Popen[bytes] | None = None) -> None:
        def up() -> bool:
            assert process is None or process.poll() is None, self.log(directory.name)
            with contextlib.suppress(DaemonUnreachable):
                connect(directory / "daemon.sock", 1.0).close()
                return True
            return False

        until(up, 20.0, f"the daemon in {directory} does not come up")

    def log(self, name: str = "d") -> str:
        return "".join(p.read_text() for p in (self.base / f"{name}.log", self.base / name / "daemon.log") if p.exists())

    def kill(self, name: str = "d", sig: int = signal.SIGKILL) -> None:
        process = self.daemons.pop(name)
        process.send_signal(sig)
        process.wait(10)

    def trainer(self, name: str = "d", rank: int = 0, **options: Any) -> Trainer:
        return self.keep(Trainer(self.directory(name), rank, **options))

    def client(self, name: str = "d") -> Client:
        return self.keep(Client(self.directory(name)))

    def keep(self, client: Any) -> Any:
        self.clients.append(client)
        return client

    def child(self, work: Callable[[Callable[[], None]], Any]) -> int:
        """A forked process that runs `work(ready)` and then waits to be killed; returns when it said `ready()`."""
        read, write = os.pipe()
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                os.close(read)
                work(lambda: os.write(write, b"!"))
                code = 0
                time.sleep(600)
            except BaseException:
                import traceback

                traceback.print_exc()
            finally:
                os._exit(code)
        os.close(write)
        self.children.append(pid)
        try:
            assert select.select([read], [], [], 20)[0], "the child does not get ready"
            assert os.read(read, 1) == b"!", "the child died"
        finally:
            os.close(read)
        return pid

    def end(self, pid: int) -> None:
        self.children.remove(pid)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)

    def close(self) -> None:
        for client in self.clients:
            with contextlib.suppress(OSError, ValueError):
                client.close()
        for pid in [*self.children]:
            self.end(pid)
        for name in [*self.daemons]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.daemons[name].pid, signal.SIGCONT)
            self.kill(name)


@contextlib.contextmanager
def latency(directory: Path) -> Iterator[list[float]]:
    """Another process asks for the status all the while; at the end the list has its waiting times in seconds."""
    read, write = os.pipe()
    stop_read, stop_write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(stop_write)
            client = Client(directory)
            waited = []
            while not select.select([stop_read], [], [], 0.002)[0]:
                began = time.perf_counter()
                client.status()
                waited.append(time.perf_counter() - began)
            with open(write, "w") as out:
                out.write(",".join(map(repr, waited)))
        finally:
            os._exit(0)
    os.close(write)
    os.close(stop_read)
    times: list[float] = []
    try:
        yield times
    finally:
        os.close(stop_write)
        with open(read) as answer:
            times += [float(t) for t in answer.read().split(",") if t]
        os.waitpid(pid, 0)
