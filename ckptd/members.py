"""The daemon's part in rendezvous: performs what core/rendezvous.py asks for, for each job whose agent entered here.

A connection to every other node that is known of, on which the newest beat goes out; what comes in is heard through `peers`. The job's secret (attempt 0) comes from
its agent. What electors promised lies in a file beside the socket: it must outlive the daemon, and must not outlive the boot, for it is not synced.

All runs on the daemon's loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import os
import secrets
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from ckptd import transport
from ckptd.channel import Channel
from ckptd.core import proof, wire
from ckptd.core.rendezvous import Action, Beat, Closed, Gathered, Member, Memory, Regroup, Rendezvous, Save, Send
from ckptd.errors import BadArgument, PeerFailed

log = logging.getLogger("ckptd.members")

TICK_S = 0.1
RETRY_S = (0.1, 1.0)
JOB_BYTES_MAX = 1024
"""Of a job's name: it is said to strangers."""
CLOSED_S = 2.0
"""For how long a job that is over is told of."""


class _Kept(msgspec.Struct, frozen=True):
    """A file."""

    job: str
    boot: str
    memory: Memory


@dataclass(eq=False, slots=True)
class _Job:
    machine: Rendezvous
    secret: bytes
    path: Path
    agent: Channel | None = None
    lines: dict[str, _Line] = field(default_factory=dict)
    closed_s: float | None = None


class Members:
    """All rendezvous of one daemon."""

    def __init__(self) -> None:
        self._jobs: dict[str, _Job] = {}
        self._entered = asyncio.Event()
        self._directory = Path()
        self._address = self._source = ""
        self._boot = ""

    def start(self, directory: Path, address: str) -> None:
        """Where this daemon is."""
        self._directory, self._address = directory, address
        self._source = transport.source_of(address.rpartition(":")[0])
        with contextlib.suppress(OSError):
            self._boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()

    async def run(self) -> None:
        """Let time pass, until cancelled."""
        try:
            while True:
                if not self._jobs:  # ten wakings a second would be most of what a daemon with nothing to do costs
                    self._entered.clear()
                    await self._entered.wait()
                await asyncio.sleep(TICK_S)
                now_s = time.monotonic()
                for name, job in [*self._jobs.items()]:
                    try:
                        self._tick(name, job, now_s)
                    except Exception:  # of one job: the others go on meeting
                        log.exception("the rendezvous of job %s failed, and is given up", name)
                        self._drop(name)
        finally:
            for job in self._jobs.values():
                for line in job.lines.values():
                    line.task.cancel()

    def _tick(self, name: str, job: _Job, now_s: float) -> None:
        self._perform(name, job, job.machine.tick(now_s))
        for address in [a for a in job.lines if a not in job.machine.addresses]:
            job.lines.pop(address).task.cancel()
        over = job.closed_s is not None and now_s - job.closed_s > CLOSED_S
        if over or job.machine.is_idle(now_s):
            self._drop(name)

    def enter(self, agent: Channel, m: wire.Enter) -> str:
        """An agent enters; returns this node's address. Raises BadArgument."""
        known = self._jobs.get(m.job)
        if known is not None and known.closed_s is not None and known.agent is None:
            self._drop(m.job)  # that was another run
            known = None
        if len(m.secret) != proof.SECRET_BYTES:
            msg = f"a secret of {len(m.secret)} bytes, not {proof.SECRET_BYTES}"
            raise BadArgument(msg)
        if known is not None and known.agent not in {None, agent}:
            msg = f"job {m.job!r} has another launcher on this node"
            raise BadArgument(msg, remedy="one `ckptd run` per node and job; give another --job, or another --dir per node where several share a machine")
        m.wish.check()
        if not m.job or len(m.job.encode()) > JOB_BYTES_MAX:
            msg = f"a job's name of {len(m.job.encode())} bytes"
            raise BadArgument(msg)
        try:
            for seed in m.wish.seeds:
                transport.split_address(seed)
        except PeerFailed as e:
            raise BadArgument(e.message) from e
        job = known or self._jobs.setdefault(m.job, self._recalled(m.job, m.secret))
        self._entered.set()
        job.agent, job.secret = agent, m.secret
        self._perform(m.job, job, job.machine.enter(m.wish, time.monotonic(), running=m.running))
        return self._address

    def gone(self, agent: Channel) -> None:
        """An agent's line ended."""
        for name, job in self._jobs.items():
            if job.agent is agent:
                job.agent = None
                self._perform(name, job, job.machine.leave(time.monotonic()))

    def close(self, agent: Channel) -> None:
        """An agent says that its job is over."""
        for name, job in self._jobs.items():
            if job.agent is agent:
                self._perform(name, job, job.machine.close(time.monotonic()))

    def dial(self, address: str, job: str, secret: bytes) -> contextlib.AbstractAsyncContextManager[transport.Connection]:
        """A connection to a daemon that beats for this job."""
        return transport.dial(address, job, transport.RENDEZVOUS, secret, self._source)

    def secret_of(self, job: str) -> bytes | None:
        """What daemons that beat for this job must know."""
        known = self._jobs.get(job)
        return known.secret if known is not None else None

    def heard(self, m: wire.PeerBeat) -> None:
        """A beat came in."""
        job = self._jobs.get(m.job)
        if job is not None:
            self._perform(m.job, job, job.machine.heard(m.beat, time.monotonic()))

    def status(self, name: str) -> dict[str, Any] | None:
        """For people."""
        job = self._jobs.get(name)
        if job is None:
            return None
        m = job.machine
        return {
            "epoch": m.roster.epoch,
            "phase": m.phase,
            "members": [x.address for x in m.roster.members],
            "heard": sorted(o.beat.me.address for o in m.others.values()),
            "waiting": sorted(o.beat.me.address for o in m.others.values() if o.waits_since_s is not None),
        }

    def names(self) -> list[str]:
        """Jobs whose agents are here."""
        return [*self._jobs]

    def refused(self, name: str, address: str) -> None:
        """Nobody listens there."""
        job = self._jobs.get(name)
        if job is not None:
            self._perform(name, job, job.machine.refused(address, time.monotonic()))

    def _perform(self, name: str, job: _Job, actions: list[Action]) -> None:
        for a in actions:
            match a:
                case Save():
                    self._save(name, job, a.memory)
                case Send():
                    line = job.lines.get(a.address)
                    if line is None:
                        line = job.lines[a.address] = _Line(self, name, a.address)
                    line.put(a.beat)
                case Gathered():
                    log.info("job %s: epoch %d has %d nodes, this is number %d", name, a.roster.epoch, len(a.roster.members), a.position)
                    self._tell(job, wire.Gathered(roster=a.roster, position=a.position))
                case Regroup():
                    if a.why:
                        log.warning("job %s: %s", name, a.why)
                    self._tell(job, wire.Regroup(why=a.why))
                case Closed():
                    self._tell(job, wire.Closed())
        if job.machine.closed and job.closed_s is None:
            job.closed_s = time.monotonic()

    @staticmethod
    def _tell(job: _Job, message: wire.Message) -> None:
        if job.agent is not None:
            job.agent.send(message)

    def _path(self, name: str) -> Path:
        return self._directory / f"rendezvous-{hashlib.blake2b(name.encode(), digest_size=8).hexdigest()}"

    def _recalled(self, name: str, secret: bytes) -> _Job:
        path = self._path(name)
        with contextlib.suppress(OSError, msgspec.MsgspecError):
            kept = msgspec.msgpack.decode(path.read_bytes(), type=_Kept)
            if (kept.job, kept.boot) == (name, self._boot):
                return _Job(Rendezvous.recall(self._address, kept.memory), secret, path)
        return _Job(Rendezvous(Member(self._address, secrets.token_hex(8))), secret, path)

    def _save(self, name: str, job: _Job, memory: Memory) -> None:
        """Raises nothing: a node that cannot keep its word may still run, and says so."""
        temporary = job.path.with_suffix(".new")
        try:
            with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600), "wb") as f:
                f.write(msgspec.msgpack.encode(_Kept(name, self._boot, memory)))
            temporary.rename(job.path)
        except OSError as e:
            log.warning("votes for job %s cannot be kept: %s", name, e)

    def _drop(self, name: str) -> None:
        job = self._jobs.pop(name)
        for line in job.lines.values():
            line.task.cancel()
        job.path.unlink(missing_ok=True)


class _Line:
    """Beats to one address: the newest, as soon as it can be sent."""

    def __init__(self, members: Members, job: str, address: str) -> None:
        self.address = address
        self._members, self._job = members, job
        self._beat: Beat | None = None
        self._wake = asyncio.Event()
        self.task = asyncio.create_task(self._run(), name=f"beats {job}/{address}")

    def put(self, beat: Beat) -> None:
        self._beat = beat
        self._wake.set()

    async def _run(self) -> None:
        pause_s = RETRY_S[0]
        while True:
            began_s = time.monotonic()
            try:
                secret = self._members.secret_of(self._job) or b""
                async with self._members.dial(self.address, self._job, secret) as peer:
                    pause_s = RETRY_S[0]
                    await transport.until_gone(peer, self._talk(peer))
            except ConnectionRefusedError:
                self._members.refused(self._job, self.address)
            except (OSError, PeerFailed, TimeoutError, ValueError) as e:
                log.debug("beats to %s: %s", self.address, e)
            await asyncio.sleep(max(0.0, pause_s - (time.monotonic() - began_s)))
            pause_s = min(2 * pause_s, RETRY_S[1])

    async def _talk(self, peer: transport.Connection) -> None:
        while True:
            self._wake.clear()
            if self._beat is not None:
                await peer.send(wire.PeerBeat(job=self._job, beat=self._beat))
            await self._wake.wait()
