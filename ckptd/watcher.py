"""The daemon's part in watching: rings in, reports to the job's coordinator, verdicts out.

    tap (trainer) --ring--> Watcher --Report--> coordinator (the daemon of node 0): monitor.engine.Engine --Verdict--> all nodes --Act--> launchers
                                     <--Ask---

Here are the sockets, the clock and /proc; what is concluded is `monitor.engine`'s, what is done about it is the launcher's.

Invariants
- a ring is believed within its bounds only, and read without a lock: a rank that writes nonsense spoils its own numbers;
- a death is told at once, to all nodes; everything else waits for the next look;
- what a node has to say is bounded per look, and what could not be sent is missing from `Report.sent`'s count: it is seen as lost, not guessed;
- a failure here costs watching, never a snapshot.

All runs on the daemon's loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import statistics
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from ckptd.core import node, wire
from ckptd.errors import BadArgument, CkptdError
from ckptd.monitor import probes, record, recorded, report, schedstat
from ckptd.monitor.engine import Ask, Concluded, Engine, Past
from ckptd.monitor.engine import Settings as EngineSettings
from ckptd.monitor.ring import Group, Ring
from ckptd.monitor.steps import Done, Summarizer, join_node, recent_signatures, stride, summarize

if TYPE_CHECKING:
    from ckptd.daemon import Client, Daemon

log = logging.getLogger("ckptd.watcher")

LOOK_S = 0.25
"""Between looks at where ranks stand."""
DRAIN_S, DRAIN_SHORT_S = 0.5, 1.0
"""Between reads of what they did: several short steps are summed in one pass. The second where steps are so short that not all are told, unless a ring fills."""
PULSE_S = 1.0
"""A rank that moves says so this often; one that stands still, at every look."""
IDLE_MS = 1000
"""A rank that has not moved for this long tells in which operation of which group it stands."""
JOIN_S = 2.0
"""A step waits this long for the node's other ranks."""
RECENT_RECORDS = 256
"""Looked through for what a rank that stands still entered before."""
VERDICTS_KEPT = 64
SHOWN_S = 3600.0
IDS = 10_000
"""Verdicts are numbered by their engine, one per attempt; outside it a number is attempt * IDS + that."""
RANKS_MAX = 256
"""Of one job on one node."""
ANSWER_S = 5.0
"""For a probe in the rank itself, and as many steps (one probe is made at the end of each); then it is measured from outside."""
ANSWER_STEPS = 4
NATIVE_AFTER_S = 8.0
POLICIES = ("report", "snapshot", "restart", "evict")


@dataclass(slots=True)
class Rank:
    """A watched rank of this node."""

    rank: int
    client: Client
    ring: Ring
    pid: int
    steps: Summarizer
    head: int = -1
    ends: tuple[int, int] | None = None
    """How many operations had ended; None: not since its ring moved."""
    moved_s: float = 0.0
    pulsed_s: float = 0.0
    drained_s: float = 0.0
    wall_s: float = 0.0
    """What its newest step took."""
    groups: list[Group] = field(default_factory=list)
    told_groups: int = -1
    done: deque[Done] = field(default_factory=lambda: deque(maxlen=256))
    gone: bool = False
    ending: bool = False
    """Its launcher ends it."""
    thread: schedstat.Thread = field(default_factory=schedstat.Thread)
    """The one that trains."""

    @property
    def filling(self) -> bool:
        """Whether half of the ring was not read yet."""
        return self.ring.word("head") - self.steps.begin > self.ring.capacity // 2

    def close(self) -> None:
        """Let go of its ring, and of what it is looked at with."""
        self.ring.close()
        self.thread.close()


@dataclass(slots=True)
class Job:
    """A job as this node watches it. `engine`: where this node coordinates."""

    name: str
    attempt: int
    world_size: int
    policy: str = ""
    ranks: dict[int, Rank] = field(default_factory=dict)
    engine: Engine | None = None
    recorder: recorded.Writer | None = None
    health: report.Health | None = None
    past: tuple[Past, ...] = ()
    """What was done in earlier attempts."""
    run: int = 0
    """Counts the engines: attempts as this node saw them."""
    sent: int = 0
    probed: list[report.Probed] = field(default_factory=list)
    stacks: list[report.Stack] = field(default_factory=list)
    verdicts: dict[int, report.Verdict] = field(default_factory=dict)
    acted: dict[int, str] = field(default_factory=dict)
    waiting_since_s: float = 0.0
    pace_us: float = 0.0
    """What steps here usually take, lately."""
    every: int = 1
    """One in so many of those that are read next is told; `told_every`: of those that were read last."""
    told_every: int = 1
    over_s: float = 0.0
    """When the last of its ranks was gone."""


class Watcher:
    """All jobs that this daemon watches."""

    def __init__(self, daemon: Daemon, settings: EngineSettings, *, enabled: bool = True) -> None:
        self._daemon = daemon
        self.jobs: dict[str, Job] = {}
        self.host = socket.gethostname()[:64]
        self.enabled = enabled
        self.counts: Counter[str] = Counter()
        self.listeners: list[Any] = []
        """Called with (job, verdict) for each that is new or changed: the log, webhooks."""
        self._recorder: Callable[[recorded.Header], recorded.Writer] | None = None
        self._baselines = probes.Baselines()
        self._asked: dict[int, tuple[str, int, str, int, float]] = {}
        self._numbers = 0
        self.engine_settings = settings

    async def run(self, directory: Path) -> None:
        """Look at all rings, again and again, until cancelled. `directory`: where the daemon's socket lies; what is usual here is kept beside it."""
        self._baselines = probes.Baselines(directory / "baselines.json")
        while True:
            await asyncio.sleep(LOOK_S)
            for job in [*self.jobs.values()]:
                try:
                    self._look(job, time.monotonic())
                except Exception as e:  # of one job, a bug of ours: the others are watched on, it is counted and logged
                    self.counts["failed looks"] += 1
                    if self.counts["failed looks"] <= 3:
                        log.warning("watching job %s: %s", job.name, e, exc_info=True)
            self._overdue(time.monotonic())
            self._forget_old(time.monotonic())

    # --- taps ---------------------------------------------------------------------------------------------------------------

    def watch(self, client: Client, m: wire.Watch, fd: int) -> bool:
        """A tap brings its rank's ring; takes over `fd`. Raises BadImage, BadArgument."""
        ring = Ring.adopt(fd)
        pid, rank, world = ring.word("pid"), ring.word("rank"), ring.word("world_size")
        if pid != client.pid or rank != m.rank or not 0 <= rank < world <= report.RANKS_MAX or not m.job or len(m.job) > report.TEXT_MAX:
            ring.close()
            msg = f"a ring of process {pid}, rank {rank} of {world}, brought by process {client.pid} for rank {m.rank} of job {m.job!r}"
            raise BadArgument(msg)
        if not self.enabled:
            ring.close()
            return False
        self._leave_others(client, m.job)
        client.job, client.rank = m.job, m.rank
        job = self.jobs.get(m.job)
        known = job.ranks.get(rank) if job is not None else None
        fresh = job is None or m.attempt > job.attempt or world != job.world_size or (known is not None and known.pid != pid)
        if job is None or fresh:
            job = self._begin(m, world, job)
            known = job.ranks.get(rank)
        if len(job.ranks) >= RANKS_MAX and known is None:
            ring.close()
            msg = f"more than {RANKS_MAX} ranks of one job on one node"
            raise BadArgument(msg)
        if m.policy in POLICIES:
            job.policy = m.policy
        steps = known.steps if known is not None and known.pid == pid else Summarizer(rank)
        if known is not None:
            known.close()
        job.ranks[rank] = Rank(rank, client, ring, pid, steps, moved_s=time.monotonic())
        return True

    def _begin(self, m: wire.Watch, world: int, old: Job | None) -> Job:
        """A new attempt of the job, or a new job; verdicts of the last attempt stay to be seen."""
        job = Job(m.job, m.attempt, world, run=(old.run if old else 0) + 1)
        if old is not None:
            job.policy, job.verdicts, job.acted = old.policy, old.verdicts, old.acted
            job.past = old.engine.past if old.engine is not None else old.past
            for r in old.ranks.values():
                if not r.gone and old.world_size == world:  # the same processes, of which one has learned its attempt before the others
                    job.ranks[r.rank] = r
                else:
                    r.close()
        self.jobs[m.job] = job
        return job

    def _leave_others(self, client: Client, name: str) -> None:
        """A tap that learned its job's name, or its attempt, comes again."""
        for job in [*self.jobs.values()]:
            for r in [*job.ranks.values()]:
                if r.client is client and job.name != name:
                    r.close()
                    del job.ranks[r.rank]
            if not job.ranks and job.name != name and not job.verdicts:
                del self.jobs[job.name]

    def gone(self, client: Client) -> None:
        """A tap's process is dead."""
        job = self.jobs.get(client.job)
        r = job.ranks.get(client.rank) if job is not None else None
        if job is None or r is None or r.client is not client or r.gone:
            return
        r.gone = True
        now_s = time.monotonic()
        others = [self._pulse(o, now_s, full=True) for o in job.ranks.values() if o is not r]  # where they stood may be why it died
        self._drain([r])
        self._send(job, steps=self._joined(job), pulses=[self._pulse(r, now_s), *others], urgent=True)

    def _forget_old(self, now_s: float) -> None:
        """Jobs that ended without a word: their verdicts are shown for a while."""
        for job in [*self.jobs.values()]:
            if any(not r.gone for r in job.ranks.values()):
                job.over_s = 0.0
            elif not job.over_s:
                job.over_s = now_s
            elif now_s - job.over_s > SHOWN_S:
                self.forget(job.name)

    def forget(self, name: str) -> None:
        """The job is over."""
        job = self.jobs.pop(name, None)
        for r in job.ranks.values() if job is not None else ():
            r.close()
        if job is not None and job.recorder is not None:
            job.recorder.close(0.2)

    # --- looking ------------------------------------------------------------------------------------------------------------

    def _look(self, job: Job, now_s: float) -> None:
        pulses: list[report.Pulse] = []
        infos: list[report.RankInfo] = []
        due = [r for r in job.ranks.values() if not r.gone and (now_s - r.drained_s >= (DRAIN_S if job.every == 1 else DRAIN_SHORT_S) or r.filling)]
        for r in due:
            r.drained_s = now_s
            r.steps.every = job.every
            self._sample(r)
        self._drain(due)
        job.told_every = job.every
        self._set_pace(job, due)
        for r in job.ranks.values():
            if r.gone:
                continue
            if self._idle_ms(r, now_s) >= IDLE_MS or now_s - r.pulsed_s >= PULSE_S:
                r.pulsed_s = now_s
                pulses.append(self._pulse(r, now_s))
            if (known := r.ring.word("groups")) != r.told_groups:
                r.told_groups = known
                infos.append(self._info(job, r))
        steps = self._joined(job)
        feels, job.health = job.health, None
        if steps or pulses or infos or job.probed or job.stacks or feels:
            self._send(job, ranks=infos, steps=steps, pulses=pulses, health=feels)
        if job.engine is not None and self._coordinates(job):
            wall_s = time.time()
            if job.recorder is not None:
                job.recorder.write(now_s, wall_s)
            self._conclude(job, job.engine.tick(now_s, wall_s))

    @staticmethod
    def _set_pace(job: Job, ranks: Sequence[Rank]) -> None:
        """How many of the steps to come are told: the same of all ranks here."""
        walls = [r.wall_s * 1e6 for r in ranks if r.wall_s > 0.0]
        if walls:
            now = statistics.median(walls)
            job.pace_us += (now - job.pace_us) * (0.3 if job.pace_us else 1.0)
            job.every = stride(job.pace_us)

    @staticmethod
    def _drain(ranks: Sequence[Rank]) -> None:
        """New steps of these ranks."""
        cut = []
        for r in ranks:
            window = r.ring.read(r.steps.begin)
            if len(window.records) or window.lost:
                if len(r.groups) != min(r.ring.word("groups"), record.GROUPS_MAX):
                    r.groups = r.ring.groups()  # whose key and size do not change
                batch = r.steps.cut(window.first, window.records, window.lost, r.groups, r.ring.capacity)
                if batch is not None:
                    cut.append((r, batch))
        for (r, _), done in zip(cut, summarize([batch for _, batch in cut]), strict=True):
            r.done.extend(done)
            r.wall_s = done[-1].summary.wall_us / 1e6 if done else r.wall_s

    def _joined(self, job: Job) -> list[report.StepSummary]:
        """Steps that all ranks of this node have ended, or that waited long enough for them."""
        live = [r for r in job.ranks.values() if not r.gone or r.done]
        found: list[list[Done]] = []
        now_s = time.monotonic()
        while any(r.done for r in live):
            first = min(r.done[0].summary.step for r in live if r.done)
            having = [r for r in live if r.done and r.done[0].summary.step == first]
            late = [r for r in live if not r.done and not r.gone]
            if late and not job.waiting_since_s:
                job.waiting_since_s = now_s
            if late and now_s - job.waiting_since_s < JOIN_S and all(len(r.done) < 64 for r in having):
                return join_node(found)
            job.waiting_since_s = 0.0
            found.append([r.done.popleft() for r in having])
        job.waiting_since_s = 0.0
        return join_node(found)

    @staticmethod
    def _sample(r: Rank) -> None:
        with contextlib.suppress(OSError, ValueError, IndexError):
            r.steps.samples.add(time.monotonic_ns(), *r.thread.read(r.pid, r.ring.word("thread") or r.pid))

    @staticmethod
    def _idle_ms(r: Rank, now_s: float) -> int:
        """Since its ring moved: a record, or the end of an operation."""
        head = r.ring.word("head")
        if head != r.head:
            r.head, r.ends, r.moved_s = head, None, now_s
        else:
            table = r.ring.groups_table[: r.ring.word("groups")]
            ends = (int(table["done"].sum()), int(table["p2p_done"].sum()))
            if ends != r.ends:
                r.moved_s = now_s if r.ends is not None else r.moved_s
                r.ends = ends
        return int((now_s - r.moved_s) * 1000)

    def _pulse(self, r: Rank, now_s: float, *, full: bool = False) -> report.Pulse:
        ring = r.ring
        idle_ms = self._idle_ms(r, now_s)
        state, where = "R", ""
        if ring.word("done") == record.GOOD or (r.gone and r.ending):
            state = "closed"
        elif r.gone:
            state = "raised" if ring.word("done") == record.RAISED else "dead"
        elif idle_ms >= IDLE_MS // 2 or full:
            state, where = _state_of(r.pid, ring.word("thread") or r.pid)
            if state in {"dead", "Z", "X"}:  # /proc knows before its pidfd has told us
                state = "closed" if r.ending else "raised" if ring.word("done") == record.RAISED else state
        phases = ring.word("phases")
        now_ns = time.monotonic_ns()
        cpu = r.steps.samples.cpu_ns
        return report.Pulse(
            rank=r.rank, idle_ms=idle_ms, step=ring.word("step"), records=ring.word("head"), state=state, where=where, phases=phases,
            phase_ms=max(0, now_ns - ring.word("phase_ns")) // 1_000_000 if phases else 0, cpu_ms=cpu[-1] // 1_000_000 if cpu else 0,
            groups=_open_ops(ring, now_ns) if idle_ms >= IDLE_MS or full or state in {"dead", "raised", "closed"} else [],
        )  # fmt: skip

    def _info(self, job: Job, r: Rank) -> report.RankInfo:
        ring = r.ring
        return report.RankInfo(
            rank=r.rank, node=self._node_of(job), local_rank=ring.word("local_rank"), pid=r.pid, host=self.host, device=ring.word("device"),
            layer=record.LAYERS[min(ring.word("layer"), len(record.LAYERS) - 1)],
            groups=[report.GroupInfo(g.key, [*g.members[: report.RANKS_MAX]]) for g in ring.groups()],
        )  # fmt: skip

    # --- between nodes ------------------------------------------------------------------------------------------------------

    def _node_of(self, job: Job) -> int:
        return max(0, self._daemon.number(job.name))

    def _nodes_of(self, job: Job) -> int:
        known = self._daemon.node.jobs.get(job.name)
        return known.nodes if known is not None else 1

    def _coordinates(self, job: Job) -> bool:
        return self._node_of(job) == 0

    def _send(
        self,
        job: Job,
        *,
        ranks: Iterable[report.RankInfo] = (),
        steps: Iterable[report.StepSummary] = (),
        pulses: Iterable[report.Pulse] = (),
        health: report.Health | None = None,
        urgent: bool = False,
    ) -> None:
        """Tell the coordinator, which may be this node."""
        job.sent += 1
        probed, stacks, job.probed, job.stacks = job.probed, job.stacks, [], []
        told = report.Report(
            node=self._node_of(job), sent=job.sent, ranks=[*ranks], steps=[*steps][: report.STEPS_MAX], pulses=[*pulses], health=health,
            probed=probed, stacks=stacks, every=job.told_every,
        )  # fmt: skip
        if self._coordinates(job):
            self._receive(job, told)
        if not self._coordinates(job) or urgent:
            message = wire.PeerWatch(job=job.name, attempt=self._attempt(job), node=told.node, report=msgspec.msgpack.encode(told))
            self._daemon.peers.tell_watch(message, only=None if urgent else 0)

    def _attempt(self, job: Job) -> int:
        known = self._daemon.node.jobs.get(job.name)
        return known.attempt if known is not None else job.attempt

    def _receive(self, job: Job, told: report.Report) -> None:
        if job.engine is None:
            job.engine = Engine(job.name, max(job.attempt, job.run), job.world_size, self._nodes_of(job), self._settings(job), past=job.past)
            for r in job.ranks.values():
                r.told_groups = -1
            self._record(job)
        now_s, wall_s = time.monotonic(), time.time()
        if job.recorder is not None:
            job.recorder.write(now_s, wall_s, report=told)
        self._conclude(job, job.engine.receive(told, now_s, wall_s))

    def _settings(self, job: Job) -> EngineSettings:
        return replace(self.engine_settings, policy=job.policy or self.engine_settings.policy)

    def heard(self, m: wire.PeerWatch | wire.PeerAsk | wire.PeerVerdict) -> None:
        """Another daemon of the job says something of it."""
        job = self.jobs.get(m.job)
        if job is None:
            return
        try:
            match m:
                case wire.PeerWatch() if self._coordinates(job):
                    self._receive(job, msgspec.msgpack.decode(m.report, type=report.Report))
                case wire.PeerAsk():
                    self._start_ask(job, Ask(m.ask, m.what, tuple(m.ranks), m.other, m.seconds))
                case wire.PeerVerdict():
                    self._take_verdict(job, msgspec.msgpack.decode(m.verdict, type=report.Verdict))
        except (msgspec.MsgspecError, UnicodeDecodeError, ValueError, OverflowError) as e:
            self.counts["reports that were none"] += 1
            log.debug("a report of job %s: %s", m.job, e)

    def _record(self, job: Job) -> None:
        if self._recorder is None or job.engine is None:
            return
        if job.recorder is not None:
            job.recorder.close(0.2)
        header = recorded.Header(
            job=job.name, attempt=max(job.attempt, job.run), world_size=job.world_size, nodes=self._nodes_of(job), began_s=time.time(),
            settings=asdict(self._settings(job)),
        )  # fmt: skip
        try:
            job.recorder = self._recorder(header)
        except CkptdError as e:
            log.warning("job %s is not recorded: %s", job.name, e)

    # --- what is concluded --------------------------------------------------------------------------------------------------

    def _conclude(self, job: Job, outcomes: Iterable[Concluded | Ask]) -> None:
        for outcome in outcomes:
            match outcome:
                case Concluded():
                    verdict = msgspec.structs.replace(outcome.verdict, id=outcome.verdict.attempt * IDS + outcome.verdict.id)
                    message = wire.PeerVerdict(job=job.name, attempt=self._attempt(job), verdict=msgspec.msgpack.encode(verdict))
                    self._daemon.peers.tell_watch(message)
                    self._take_verdict(job, verdict)
                case Ask():
                    self._spread_ask(job, outcome)

    def _take_verdict(self, job: Job, verdict: report.Verdict) -> None:
        """All nodes: keep it, tell people, do our part."""
        before = job.verdicts.get(verdict.id)
        job.verdicts[verdict.id] = verdict
        while len(job.verdicts) > VERDICTS_KEPT:
            job.verdicts.pop(next(iter(job.verdicts)))
        if before is None or before.state != verdict.state:
            log.log(logging.INFO if verdict.state == "cleared" else logging.WARNING, "job %s: %s: %s", job.name, verdict.state, verdict.text)
        for tell in self.listeners:
            try:
                tell(job.name, verdict)
            except Exception:  # of one listener: the others hear it
                log.exception("a listener failed")
        if verdict.state == "confirmed" and verdict.recommended in {"snapshot", "restart", "evict"} and verdict.id not in job.acted:
            job.acted[verdict.id] = verdict.recommended
            self._act(job, verdict)

    def _act(self, job: Job, verdict: report.Verdict) -> None:
        name = job.name
        known = self._daemon.node.jobs.get(name)
        if known is not None and known.node == 0 and known.committed is not None and self._daemon.tier(name).url:
            # Before anything is ended: the newest step to the durable tier.
            self._daemon.event(node.Asked(name, known.attempt, known.committed[1]))
        if verdict.recommended in {"restart", "evict"}:
            act = wire.Act(verdict=verdict.id, attempt=self._attempt(job), action=verdict.recommended, ranks=[*verdict.ranks], why=verdict.text[:500])
            for client in [*self._daemon.clients]:
                if client.role == "keeper" and client.job == name:
                    client.channel.send(act)
        if job.engine is not None:
            if job.recorder is not None:
                job.recorder.write(time.monotonic(), time.time(), acted=(verdict.id % IDS, verdict.recommended))
            job.engine.acted(verdict.id % IDS, verdict.recommended)

    def notice(self, client: Client, m: wire.ProbeDone | wire.StacksDone | wire.Acted | wire.Ending) -> None:
        """A tap answers, or a launcher says what it did."""
        match m:
            case wire.ProbeDone():
                self._probed(client, m)
            case wire.StacksDone():
                self._stacked(client, m)
            case wire.Acted() if client.role == "keeper":
                self._acted(client, m)
            case wire.Ending() if client.role == "keeper" and client.job in self.jobs:
                for r in self.jobs[client.job].ranks.values():
                    r.ending = r.ending or not r.gone

    def _acted(self, client: Client, m: wire.Acted) -> None:
        job = self.jobs.get(client.job)
        if job is not None:
            job.acted[m.verdict] = m.what if m.done else f"refused: {m.what}"
            log.info("job %s: the launcher %s verdict %d: %s", client.job, "acted on" if m.done else "did not act on", m.verdict, m.what)
            verdict = job.verdicts.get(m.verdict)
            if verdict is not None:
                job.verdicts[m.verdict] = msgspec.structs.replace(verdict, action=job.acted[m.verdict][:200])

    # --- asks ---------------------------------------------------------------------------------------------------------------

    def _spread_ask(self, job: Job, ask: Ask) -> None:
        """To the nodes whose ranks (or which nodes themselves) are meant."""
        if self._nodes_of(job) > 1:
            message = wire.PeerAsk(job=job.name, attempt=self._attempt(job), ask=ask.id, what=ask.what, ranks=[*ask.ranks], other=ask.other, seconds=ask.seconds)
            self._daemon.peers.tell_watch(message)
        self._start_ask(job, ask)

    def _start_ask(self, job: Job, ask: Ask) -> None:
        here = [job.ranks[r] for r in ask.ranks if r in job.ranks]
        match ask.what:
            case "compute" | "memory":
                for r in here:
                    self._probe(job, r, ask)
            case "stacks":
                for r in here:
                    self._daemon.start(self._stack(job, r))
            case "pulses":
                self._send(job, pulses=[self._pulse(r, time.monotonic(), full=True) for r in here])
            case "transfer" if self._node_of(job) in ask.ranks and 0 <= ask.other != self._node_of(job):
                self._daemon.start(self._transfer(job, ask))

    def _probe(self, job: Job, r: Rank, ask: Ask) -> None:
        self._numbers += 1
        self._asked[self._numbers] = (job.name, r.rank, ask.what, ask.id, time.monotonic() + ask.seconds + ANSWER_S + ANSWER_STEPS * r.wall_s)
        r.client.channel.send(wire.ProbeAsked(probe=self._numbers, kind=ask.what, seconds=min(2.0, ask.seconds)))

    def _probed(self, client: Client, m: wire.ProbeDone) -> None:
        asked = self._asked.pop(m.probe, None)
        job = self.jobs.get(client.job)
        if asked is not None and job is not None and asked[:2] == (client.job, client.rank):
            job.probed.append(report.Probed(asked[3], asked[2], client.rank, max(0.0, m.rate)))

    def _overdue(self, now_s: float) -> None:
        for number in [n for n, a in self._asked.items() if a[4] < now_s]:
            name, rank, kind, ask, _ = self._asked.pop(number)
            job = self.jobs.get(name)
            if job is not None and rank in job.ranks:
                self._daemon.start(self._probe_outside(job, job.ranks[rank], kind, ask))

    async def _probe_outside(self, job: Job, r: Rank, kind: str, ask: int) -> None:
        """The rank did not answer: measure where it runs, in a process of our own."""
        rate = 0.0
        with contextlib.suppress(OSError, ValueError, CkptdError, TimeoutError):
            rate = await self._daemon.in_store_pool(lambda: probes.outside(kind, r.pid, 0.2))
        job.probed.append(report.Probed(ask, kind, r.rank, rate, outside=True))

    async def _stack(self, job: Job, r: Rank) -> None:
        """Of Python first, which does not stop the process. Native frames do, for seconds where its symbols are many: only of one that has not moved for long."""
        from ckptd.monitor import stacks

        moved_s = r.moved_s
        text, how = await self._daemon.in_store_pool(lambda: stacks.of(r.pid, native=False))
        kernel = stacks.kernel(r.pid)
        if text or kernel:
            both = f"{text}\n{kernel}" if text else kernel
            job.stacks.append(report.Stack(r.rank, both[: 16 << 10], how or "kernel"))
        if not text:
            self._numbers += 1
            self._asked[self._numbers] = (job.name, r.rank, "stacks", 0, time.monotonic() + ANSWER_S)
            r.client.channel.send(wire.StacksAsked(ask=self._numbers))
        await asyncio.sleep(NATIVE_AFTER_S)
        if text and not r.gone and r.moved_s == moved_s:
            text, how = await self._daemon.in_store_pool(lambda: stacks.of(r.pid))
            job.stacks.append(report.Stack(r.rank, text[: 16 << 10], how))

    def _stacked(self, client: Client, m: wire.StacksDone) -> None:
        job = self.jobs.get(client.job)
        if self._asked.pop(m.ask, None) is not None and job is not None:
            job.stacks.append(report.Stack(client.rank, m.text[: 16 << 10], "faulthandler"))

    async def _transfer(self, job: Job, ask: Ask) -> None:
        from ckptd import probing

        here, rate, address = self._node_of(job), 0.0, ""
        with contextlib.suppress(OSError, CkptdError, TimeoutError, ValueError):  # a node that is gone: 0
            address = self._daemon.peers.address_of(job.name, ask.other)
            rate = await probing.transfer(self._daemon.peers, job.name, ask.other)
        job.probed.append(report.Probed(ask.id, "transfer", here, rate, other=ask.other, baseline=self._baselines.of("transfer", address)))
        self._baselines.learn("transfer", address, rate, time.time())  # the best of what was seen stays
        if self.jobs.get(job.name) is job:  # else it began anew meanwhile
            self._send(job)  # at once: the next round of pairs waits for it

    def feels(self, found: report.Health) -> None:
        """The node's health, for all its jobs."""
        for job in self.jobs.values():
            if any(not r.gone for r in job.ranks.values()):
                job.health = msgspec.structs.replace(found, node=self._node_of(job))

    # --- faces --------------------------------------------------------------------------------------------------------------

    def found(self, name: str, finding: report.Finding) -> None:
        """Somebody else of the daemon saw something (replicas that differ)."""
        job = self.jobs.get(name)
        if job is not None and job.engine is not None:
            if job.recorder is not None:
                job.recorder.write(time.monotonic(), time.time(), finding=finding)
            self._conclude(job, job.engine.found(finding))

    def record_with(self, make: Callable[[recorded.Header], recorded.Writer]) -> None:
        """Record what engines are told from now on."""
        self._recorder = make

    def recorders(self) -> list[recorded.Writer]:
        """Those that are to be closed when the daemon leaves."""
        return [job.recorder for job in self.jobs.values() if job.recorder is not None]

    def windows(self, name: str | None, seconds: float) -> dict[str, Any]:
        """For a trace: the newest records of this node's ranks, copied. `name`: of one job, or of all."""
        since_ns = time.monotonic_ns() - int(seconds * 1e9)
        ranks = []
        for job in self.jobs.values():
            for r in job.ranks.values() if name in {None, job.name} else ():
                window = r.ring.read(max(0, r.ring.word("head") - r.ring.capacity))
                kept = window.records[window.records["entered_ns"] >= since_ns]
                ranks.append({"job": job.name, "rank": r.rank, "pid": r.pid, "records": kept, "groups": r.ring.groups()})
        verdicts = [v for job in self.jobs.values() if name in {None, job.name} for v in job.verdicts.values()]
        return {"ranks": ranks, "verdicts": verdicts, "since_ns": since_ns, "now_ns": time.monotonic_ns(), "now_s": time.time()}

    def status(self, name: str) -> dict[str, Any] | None:
        """Of one job, as plain values."""
        job = self.jobs.get(name)
        if job is None:
            return None
        verdicts = [msgspec.to_builtins(v) | {"text": v.text, "did": job.acted.get(v.id, "")} for v in job.verdicts.values()]
        taps = {
            str(r.rank): {
                "pid": r.pid, "layer": record.LAYERS[min(r.ring.word("layer"), len(record.LAYERS) - 1)], "records": r.ring.word("head"), "lost": r.steps.lost,
                "errors": r.ring.word("errors"), "hook_ns": r.ring.word("hook_ns"), "device_lost": r.ring.word("device_lost"), "gone": r.gone,
            }
            for r in job.ranks.values()
        }  # fmt: skip
        told = job.engine.status() if job.engine is not None else {}
        return told | {
            "attempt": job.attempt, "world_size": job.world_size, "policy": job.policy or "report", "coordinator": self._coordinates(job), "taps": taps,
            "verdicts": verdicts,
        }  # fmt: skip


def _state_of(pid: int, thread: int) -> tuple[str, str]:
    """The kernel's state of a thread and what it sleeps in; ("dead", "") if it is gone."""
    try:
        text = Path(f"/proc/{pid}/task/{thread}/stat").read_text()
        state = text.rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return "dead", ""
    where = ""
    with contextlib.suppress(OSError):
        where = Path(f"/proc/{pid}/task/{thread}/wchan").read_text()[:64]
    return state, where if where != "0" else ""


def _open_ops(ring: Ring, now_ns: int) -> list[report.OpenOp]:
    def ago_ms(then_ns: int) -> int:
        return max(0, now_ns - then_ns) // 1_000_000 if then_ns else 0

    head = ring.word("head")
    recent = recent_signatures(ring.read(max(0, head - RECENT_RECORDS)).records, report.RECENT_MAX)
    return [
        report.OpenOp(
            g.key, g.entered, g.done, g.op, g.dtype, g.bytes, g.signature, g.history, ago_ms(g.entered_ns),
            g.p2p_op, g.p2p_open, g.p2p_peer, g.p2p_entered, g.p2p_done, ago_ms(g.p2p_ns), recent.get(i, []),
        )
        for i, g in enumerate(ring.groups())
    ]  # fmt: skip
