"""The command line as a user runs it, a real daemon, and a trainer that needs no torch."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from ckptd.arena import Arena
from ckptd.channel import socket_path
from ckptd.core import slots, wire
from ckptd.link import Link
from tests.storage.helpers import Step

ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, "-W", "error", "-m", "ckptd.cli.main"]


def ckptd(*args, timeout=30, cwd=ROOT, **env) -> subprocess.CompletedProcess[str]:
    """`ckptd ARGS`, to its end."""
    return subprocess.run(
        [*COMMAND, *map(str, args)], capture_output=True, text=True, timeout=timeout, cwd=cwd, env=os.environ | env
    )


@contextmanager
def running_daemon(directory: Path):
    """A daemon of our own; it is the only process that is ended, by its pid."""
    with (directory / "log").open("w") as log:
        process = subprocess.Popen([*COMMAND, "daemon", "--dir", str(directory)], cwd=ROOT, stdout=log, stderr=log)
    try:
        deadline_s = time.monotonic() + 20
        while not socket_path(str(directory)).exists():
            assert process.poll() is None, (directory / "log").read_text()
            assert time.monotonic() < deadline_s, "no daemon after 20 s"
            time.sleep(0.02)
        yield process
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGCONT)
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(10)


@dataclass
class Trainer:
    """All ranks of a one-node job in one thread: joins, fills slots with ready-made images, hears what became of them."""

    directory: Path
    job: str = "job"
    attempt: int = 1
    store: str = ""
    heard: list[wire.Reached] = field(default_factory=list)
    links: dict[int, Link] = field(default_factory=dict)
    arenas: dict[int, Arena] = field(default_factory=dict)

    def join(self, made: Step) -> None:
        for rank, image in made.images.items():
            link = Link(
                socket_path(str(self.directory)),
                lambda i, r=rank: wire.Hello(id=i, job=self.job, role="rank", rank=r),
                self.heard.append,
            )
            welcome = link.open(5)

            def join(i: int, rank=rank, size=len(image), address=welcome.peer_address) -> wire.Join:
                return wire.Join(
                    id=i, job=self.job, attempt=self.attempt, rank=rank, world_size=len(made.images), local_count=len(made.images),
                    node=0, peers=[address], image_bytes=size, slots=3, store=self.store,
                )  # fmt: skip

            _, fd = link.ask(join, wire.Granted, 10)
            self.links[rank], self.arenas[rank] = link, Arena.adopt(fd)

    def fill(self, made: Step) -> None:
        for rank, image in made.images.items():
            arena = self.arenas[rank]
            slot = next(s for s in range(3) if slots.is_free(arena.header(s), arena.seal(s).released_gen))
            gen, at = arena.header(slot).gen + 1, arena.geometry.header_at(slot)
            n = len(made.images)
            slots.begin(arena.memory, at, slots.Header(slots.FILLING, gen, self.attempt, made.step, len(image), rank, n, n, 0, 1))
            arena.image(slot, len(image))[:] = image
            slots.flip(arena.memory, at, slots.FILLED)
            self.links[rank].tell(wire.Filled(step=made.step, slot=slot, gen=gen))

    def persist(self, step: int) -> None:
        self.links[0].tell(wire.Persist(step=step))

    def wait_for(self, step: int, state: str) -> None:
        deadline_s = time.monotonic() + 10
        while not any((m.step, m.state) == (step, state) for m in self.heard if isinstance(m, wire.Reached)):
            assert time.monotonic() < deadline_s, self.heard
            time.sleep(0.01)

    def close(self) -> None:
        for link in self.links.values():
            link.close()
        for arena in self.arenas.values():
            arena.close()
