"""`ckptd run`: torch elastic's agent, embedded, with a daemon that outlives it.

What torchrun does not do, this does: it sees to a daemon and holds copies of every arena, so that a daemon that dies gets its memory back; it
keeps standbys, so that a restart does not wait for imports; it sets TORCH_DISABLE_SHARE_RDZV_TCP_STORE (without it gloo reads the dead
generation's addresses: pytorch#135712); it stops a job that dies again and again without a new snapshot in between; it does what the job's
coordinator says of a rank that hangs or is slow (acts.py): restarts the workers, or goes on without some of them.

Parts: `Keeper` (a thread: the daemon, the arenas, what it is told to do), `Standbys` (processes), `Agent` (the subclass that marks times and asks the two).
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import ipaddress
import json
import logging
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch
import torch.distributed.elastic.multiprocessing.api as elastic_processes
from torch.distributed.elastic.agent.server.api import RunResult, Worker, WorkerGroup, WorkerSpec, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.multiprocessing.subprocess_handler import SubprocessHandler
from torch.distributed.elastic.rendezvous import RendezvousClosedError, RendezvousTimeoutError, rendezvous_handler_registry
from torch.distributed.launcher import api as launcher_api

from ckptd import acts, elastic, plugin, spawn
from ckptd.channel import Pipe, connect, socket_path
from ckptd.core import wire
from ckptd.core.rendezvous import TEXT_MAX
from ckptd.errors import BadArgument, CkptdError, DaemonUnreachable
from ckptd.storage import absolute
from ckptd.trace import mark

log = logging.getLogger("ckptd.launch")

PING_S = 2.0
PERSIST_WAIT_S = 1800.0
"""A finished job waits this long for its last checkpoint: half an hour is 1 TB per node at 0.6 GB/s."""
ACTS_MAX = 64
"""Waiting to be judged: the agent looks many times a second, except in a rendezvous."""
HUNG_S = 20.0
"""A daemon of ours that answers nothing for this long is killed and replaced; its memory is ours too."""
FOREIGN_DAEMON_S = 5.0
"""How long a daemon that somebody else runs (systemd) may take to come back before we start one."""
REFILL_S = 3.0
"""Standbys are made this long after workers started: not while those come up."""
BARREN_RESTARTS_MAX = 3
"""Restarts in a row without a newly committed snapshot, after which the job is given up: it will not get better. Those that a verdict asked for count here,
and not as --max-restarts: a healthy job may be restarted for good reasons as often as it makes steps in between."""
ACT_STOP_S = 3
"""Workers that are to end by a verdict: one that hangs does not answer SIGTERM."""


ENDING_S, ENDING_MAX_S = 0.02, 0.5
"""For the daemon to hear that workers are ended on purpose, before they are; and how long it is tried to say so."""


class Evicted(Exception):
    """This node's workers were evicted, all of them: the launcher ends."""


class Ordered(NamedTuple):
    """An Act, and when it came (monotonic)."""

    act: wire.Act
    came_s: float


class Keeper:
    """A thread that keeps a daemon running and holds copies of the job's arenas."""

    def __init__(self, job: str, directory: str | None, linger_s: float, options: Sequence[str] = ()) -> None:
        self._job = job
        self._options = options
        self._directory = directory
        self._linger_s = linger_s
        self._path = socket_path(directory)
        self._arenas: dict[str, int] = {}
        self._process: subprocess.Popen[bytes] | None = None
        self._closing = threading.Event()
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._thread = threading.Thread(target=self._run, name="ckptd-keeper", daemon=True)
        self._says: deque[tuple[wire.Message, threading.Event]] = deque()
        self.acts: deque[Ordered] = deque(maxlen=ACTS_MAX)
        """What the agent is to judge."""
        self.replaced = 0
        self.attempt = 0
        self.committed: Any = None
        """Newest committed (attempt, step), as the daemon said last."""
        self.spared = 0
        """How many nodes may be lost, and some snapshot is left: acts.View."""

    def start(self, timeout_s: float = 20.0) -> None:
        """Have a daemon; raises DaemonUnreachable."""
        self._ensure_daemon(timeout_s)
        self._thread.start()

    def stop(self, *, forget: bool) -> None:
        """End the thread. `forget`: the job is over, its memory may go, and the daemon too if it is ours."""
        self._closing.set()
        with contextlib.suppress(OSError):
            os.eventfd_write(self._wake, 1)
        self._thread.join(5.0)
        if forget:
            self._await_persisted()
            with contextlib.suppress(CkptdError, OSError):
                _ask(self._path, wire.Forget(id=2, job=self._job))
                if self._process is not None:
                    _ask(self._path, wire.Shutdown(id=2))
                    with contextlib.suppress(subprocess.TimeoutExpired):  # others may use it: then it stays for them
                        self._process.wait(5.0)
                    spawn.leave(self._process)
        for fd in self._arenas.values():
            os.close(fd)
        self._arenas.clear()

    def _await_persisted(self) -> None:
        """The ranks are gone; what they asked to be persisted may still be on its way to the disk."""
        began_s = said_s = time.monotonic()
        while time.monotonic() - began_s < PERSIST_WAIT_S:
            try:
                job = _ask(self._path, wire.Status(id=2)).status["jobs"].get(self._job)
            except (CkptdError, OSError, EOFError):
                return
            if job is None or not any(s["persisting"] for s in job["snapshots"]):
                return
            if time.monotonic() - said_s > PING_S:
                said_s = time.monotonic()
                log.info("waiting for the last checkpoint to be written (%.0f s)", said_s - began_s)
            time.sleep(0.1)
        log.error("the last checkpoint was not written within %.0f s", PERSIST_WAIT_S)

    def _ensure_daemon(self, timeout_s: float) -> None:
        try:
            connect(self._path, 2.0).close()
        except DaemonUnreachable:
            self._process = spawn.start_daemon(self._directory, linger_s=self._linger_s, arenas=[*self._arenas.values()], options=self._options)
            spawn.await_socket(self._path, timeout_s)

    def _run(self) -> None:
        while not self._closing.is_set():
            try:
                pipe = connect(self._path, 2.0)
            except DaemonUnreachable:
                self._bring_back()
                continue
            try:
                self._hold(pipe)
            except (CkptdError, OSError, EOFError) as e:
                log.debug("the daemon's line broke: %s", e)
            finally:
                pipe.close()

    def _bring_back(self) -> None:
        """The daemon is gone: start another with the arenas; one that is not ours gets time to be brought back by whoever runs it."""
        if self._process is None:
            until_s = time.monotonic() + FOREIGN_DAEMON_S
            while time.monotonic() < until_s and not self._closing.is_set():
                with contextlib.suppress(DaemonUnreachable):
                    connect(self._path, 1.0).close()
                    return
                time.sleep(0.1)
        if self._closing.is_set():
            return
        self.replaced += 1
        log.warning("the daemon is gone: starting another with %d arenas", len(self._arenas))
        mark("daemon replaced", arenas=len(self._arenas))
        try:
            self._ensure_daemon(20.0)
        except (CkptdError, OSError):
            log.exception("no daemon could be started; training goes on without snapshots")
            self._closing.wait(5.0)

    def _hold(self, pipe: Pipe) -> None:
        """Greet, hand back what the daemon lacks, then hold what it sends until the line breaks or it hangs."""
        pipe.put(wire.Hello(id=1, job=self._job, role="keeper"))
        for fd in self._arenas.values():
            pipe.put(wire.HandBack(), fd)
        heard_s = asked_s = time.monotonic()
        saying: list[threading.Event] = []
        while not self._closing.is_set():
            while self._says:
                message, said = self._says.popleft()
                pipe.put(message)
                saying.append(said)
            pipe.flush()
            while saying and not pipe.wants_write:
                saying.pop().set()
            poller = select.poll()
            poller.register(pipe.sock, select.POLLIN | (select.POLLOUT if pipe.wants_write else 0))
            poller.register(self._wake, select.POLLIN)
            poller.poll(500)
            self._drain()
            for message in pipe.read():
                heard_s = time.monotonic()
                self._take(pipe, message)
            now_s = time.monotonic()
            if now_s - asked_s > PING_S:
                asked_s = now_s
                pipe.put(wire.Status(id=3))
            if now_s - heard_s > HUNG_S and self._process is not None:
                log.error("the daemon (pid %d) has not answered for %.0f s: replacing it", self._process.pid, HUNG_S)
                self._process.kill()
                self._process.wait()
                return

    def _take(self, pipe: Pipe, message: Any) -> None:
        match message:
            case wire.Kept():
                fd = pipe.take_fd()
                if message.arena in self._arenas:
                    os.close(fd)
                else:
                    self._arenas[message.arena] = fd
            case wire.Dropped():
                held = self._arenas.pop(message.arena, None)
                if held is not None:
                    os.close(held)
            case wire.Act():
                self.acts.append(Ordered(message, time.monotonic()))
            case wire.Report():
                self._know(message)

    def _drain(self) -> None:
        """Whoever woke us is heard."""
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._wake)

    def _know(self, report: wire.Report) -> None:
        job = report.status["jobs"].get(self._job) or {}
        self.attempt, self.committed = job.get("attempt", 0), job.get("committed")
        parity = (job.get("group") or {}).get("parity", 0)
        self.spared = acts.ANY if job.get("persisted") else parity if job.get("protected") else 0

    def look(self) -> None:
        """Have `attempt`, `committed` and `spared` as they are now; what was heard last stays if the daemon does not answer."""
        with contextlib.suppress(CkptdError, OSError, EOFError):
            self._know(_ask(self._path, wire.Status(id=2)))

    def answer(self, acted: wire.Acted) -> None:
        """Any thread: tell the daemon what became of an Act."""
        log.warning("verdict %d: %s%s", acted.verdict, "" if acted.done else "refused: ", acted.what)
        self.tell(wire.Acted(verdict=acted.verdict, done=acted.done, what=acted.what[:TEXT_MAX]))

    def tell(self, message: wire.Message, wait_s: float = 0.0) -> None:
        """Any thread but the keeper's own: say something to the daemon, and wait for so long at most until it is on its way."""
        said = threading.Event()
        self._says.append((message, said))
        with contextlib.suppress(OSError):
            os.eventfd_write(self._wake, 1)
        said.wait(wait_s)


def _ask(path: Path, request: wire.Request, timeout_s: float = 5.0) -> Any:
    """One request on a connection of its own. Raises CkptdError, OSError, EOFError."""
    pipe = connect(path, timeout_s)
    try:
        pipe.put(wire.Hello(id=1, role="cli"))
        pipe.put(request)
        until_s = time.monotonic() + timeout_s
        while (left_s := until_s - time.monotonic()) > 0:
            pipe.flush()
            select.select([pipe.sock], [], [], left_s)
            for message in pipe.read():
                if getattr(message, "id", 0) == request.id:
                    return message
    finally:
        pipe.close()
    msg = f"the daemon at {path} did not answer within {timeout_s:.0f} s"
    raise DaemonUnreachable(msg)


class Standbys:
    """Processes that have imported what a worker needs."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._ready: deque[subprocess.Popen[bytes]] = deque()

    def fill(self) -> None:
        """Start as many as are missing; they import at the lowest priority."""
        while len(self._ready) < self.count:
            self._ready.append(
                subprocess.Popen([sys.executable, "-u", "-m", "ckptd.standby"], stdin=subprocess.PIPE, start_new_session=True)
            )

    def take(self, argv: list[str], env: dict[str, str], stdout: str | None, stderr: str | None) -> subprocess.Popen[bytes] | None:
        """A living standby, told to become this worker; None if there is none."""
        while self._ready:
            process = self._ready.popleft()
            if process.poll() is None and process.stdin is not None:
                order = json.dumps({"argv": argv, "env": env, "stdout": stdout, "stderr": stderr}).encode() + b"\n"
                try:
                    process.stdin.write(order)
                    process.stdin.close()
                    # One that is still importing hurries now; one that cannot was never made slow (standby.may_raise_priority).
                    os.setpriority(os.PRIO_PROCESS, process.pid, os.getpriority(os.PRIO_PROCESS, 0))
                except OSError as e:
                    if e.errno not in {errno.EACCES, errno.EPERM}:
                        continue
                return process
        return None

    def close(self) -> None:
        """End those that nobody needs."""
        while self._ready:
            process = self._ready.popleft()
            if process.stdin is not None:
                process.stdin.close()
            process.kill()
            process.wait()


class _Handler(SubprocessHandler):
    """A worker's process: a standby where there is one, else a new one."""

    standbys: Standbys | None = None

    def _popen(self, args: tuple[str, ...], env: dict[str, str]) -> subprocess.Popen[bytes]:
        if self.standbys is not None and args[:2] == (sys.executable, "-u"):
            names = [getattr(f, "name", None) for f in (self._stdout, self._stderr)]
            process = self.standbys.take([*args[2:]], env, names[0], names[1])
            if process is not None:
                return process
        return super()._popen(args, env)

    def close(self, death_sig: signal.Signals | None = None) -> None:
        """A worker that is stopped (SIGSTOP, a debugger) hears of its end only when it goes on."""
        super().close(death_sig)
        with contextlib.suppress(OSError):
            os.killpg(self.proc.pid, signal.SIGCONT)


class Agent(LocalElasticAgent):
    """torch elastic's agent, with marks, standbys and an end to hopeless restarts."""

    keeper: Keeper
    standbys: Standbys
    policy = "report"
    _barren = 0
    _committed_before: Any = None
    _floor = 0
    _started_s = 0.0
    _ending = False
    _follows: tuple[float, wire.Act] | None = None
    """Until when other nodes are waited for, that an eviction concerns."""

    def __init__(self, spec: WorkerSpec, *args: Any, **more: Any) -> None:
        super().__init__(spec, *args, **more)
        self._workers_max = spec.local_world_size
        self._slots = tuple(range(spec.local_world_size))

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        mark("workers starting", slots=self._slots)
        self.keeper.look()  # no worker of an attempt that is known by now lives
        self._floor, self._follows, self._ending = self.keeper.attempt, None, False
        pids: dict[int, Any] = super()._start_workers(worker_group)
        self._started_s = time.monotonic()
        mark("workers started", pids={str(k): v for k, v in pids.items()})
        self._refill = threading.Timer(REFILL_S, self.standbys.fill)
        self._refill.daemon = True
        self._refill.start()
        return pids

    def _stop_workers(self, worker_group: WorkerGroup) -> None:
        if self.keeper.acts or self._follows is not None:  # other nodes began with what a verdict asks for: here too somebody may hang
            self._end_workers()
        self._say_ending()
        super()._stop_workers(worker_group)
        mark("workers stopped")

    def _say_ending(self) -> None:
        """What dies from now on dies of us: the daemon is not to call it a crash. Said once: what is dead by the second time would be none of ours."""
        if not self._ending:
            self._ending = True
            self.keeper.tell(wire.Ending(), ENDING_MAX_S)
            time.sleep(ENDING_S)

    def _monitor_workers(self, worker_group: WorkerGroup) -> Any:
        ordered = self._ordered(worker_group)
        if ordered is not None:
            return ordered
        began = time.time()
        result = super()._monitor_workers(worker_group)
        if result.is_failed():
            exits = {str(r): f.exitcode for r, f in result.failures.items()}
            mark("failure seen", exits=exits, seen_t=began)
        return result

    def _assign_worker_ranks(self, store: Any, group_rank: int, group_world_size: int, spec: WorkerSpec) -> list[Worker]:
        """Nodes have said how many workers they have: no store is asked, whose host may be lost by now."""
        handler = spec.rdzv_handler
        if not isinstance(handler, elastic.Handler):
            found: list[Worker] = super()._assign_worker_ranks(store, group_rank, group_world_size, spec)
            return found
        counts = [m.workers for m in handler.roster.members]
        first, world_size = sum(counts[:group_rank]), sum(counts)
        return [Worker(i, first + i, first + i, world_size, world_size) for i in range(counts[group_rank])]

    def _restart_workers(self, worker_group: WorkerGroup) -> None:
        if worker_group.state == WorkerState.HEALTHY:  # nodes came or went
            mark("membership changed")
            super()._restart_workers(worker_group)
            return
        self.keeper.look()
        committed = self.keeper.committed
        self._barren = self._barren + 1 if committed == self._committed_before else 0
        self._committed_before = committed
        if self._barren >= BARREN_RESTARTS_MAX:
            log.error("%d restarts in a row without a new snapshot (the newest is %s): giving the job up", self._barren, committed)
            self._remaining_restarts = 0
        super()._restart_workers(worker_group)

    # --- verdicts ---------------------------------------------------------------------------------------------------------------

    def _ordered(self, worker_group: WorkerGroup) -> RunResult | None:
        """What torch's agent is to be told of its workers, if a verdict ended them."""
        while self.keeper.acts:
            act, came_s = self.keeper.acts.popleft()
            if came_s < self._started_s:
                self.keeper.answer(wire.Acted(verdict=act.verdict, done=False, what="it came before these workers were started"))
                continue
            if act.action == "evict":
                self.keeper.look()
            decision = acts.decide(act, self._view(worker_group))
            if decision.kind in {acts.NOTHING, acts.FOLLOW}:
                self._follows = (time.monotonic() + acts.FOLLOW_S, act) if decision.kind == acts.FOLLOW else self._follows
                self.keeper.answer(wire.Acted(verdict=act.verdict, done=decision.done, what=decision.what))
                continue
            return self._carry_out(act, decision, worker_group)
        if self._follows is not None and time.monotonic() > self._follows[0]:
            act = self._follows[1]
            return self._carry_out(act, acts.Decision(acts.RESTART, done=True, what="the nodes concerned did not begin: this one does", slots=self._slots), worker_group)
        return None

    def _view(self, worker_group: WorkerGroup) -> acts.View:
        handler = worker_group.spec.rdzv_handler
        common: Any = {"policy": self.policy, "floor": self._floor, "slots": self._slots, "spared": self.keeper.spared}
        if isinstance(handler, elastic.Handler):
            counts = tuple(m.workers for m in handler.roster.members)
            return acts.View(counts=counts, mine=handler.position, nodes_min=handler.nodes_min, **common)
        first, world = (worker_group.workers[0].global_rank, worker_group.workers[0].world_size) if worker_group.workers else (0, 0)
        here = len(worker_group.workers)  # other nodes' shares are not known: two that stand for all before and after
        return acts.View(counts=(first, here, world - first - here), mine=1, may_leave=False, **common)

    def _carry_out(self, act: wire.Act, decision: acts.Decision, worker_group: WorkerGroup) -> RunResult:
        """End the workers at once; torch's agent starts them as after a failure, which this is not counted as. Raises Evicted."""
        log.warning("verdict %d, %s: %s of the workers of attempt %d", act.verdict, act.why, decision.kind, act.attempt)
        mark("acting", verdict=act.verdict, action=decision.kind, evicted=decision.evicted)
        self._end_workers()
        self.keeper.answer(wire.Acted(verdict=act.verdict, done=decision.done, what=decision.what))
        handler = worker_group.spec.rdzv_handler
        if decision.kind == acts.LEAVE and isinstance(handler, elastic.Handler):
            handler.leave()
            raise Evicted(act.why)
        self._resize(decision.slots, worker_group)
        self._remaining_restarts += 1
        return RunResult(state=WorkerState.UNHEALTHY)

    def _end_workers(self) -> None:
        """At once: SIGTERM, and SIGKILL soon."""
        self._say_ending()
        if self._pcontext is not None:
            self._pcontext.close(signal.SIGTERM, ACT_STOP_S)
        mark("workers ended")

    def _resize(self, slots: tuple[int, ...], worker_group: WorkerGroup) -> None:
        """These slots are left, in the next rendezvous."""
        if len(slots) == len(self._slots):
            return
        self._slots = slots
        worker_group.spec.local_world_size = len(slots)
        self.standbys.count = min(self.standbys.count, len(slots))
        if isinstance(worker_group.spec.rdzv_handler, elastic.Handler):
            worker_group.spec.rdzv_handler.resize(len(slots))

    def _set_local_rank_env(self, worker_env: dict[str, Any], local_rank: int, spec: WorkerSpec) -> None:
        """Local ranks stay dense; CKPTD_SLOT is the place on the node that a worker has had from the beginning, and its device goes with that."""
        slot = self._slots[local_rank]
        super()._set_local_rank_env(worker_env, slot if spec.virtual_local_rank else local_rank, spec)
        worker_env["CKPTD_SLOT"] = str(slot)
        evicted = [s for s in range(self._workers_max) if s not in self._slots]
        if evicted and not spec.virtual_local_rank:
            given = os.environ.get("CUDA_VISIBLE_DEVICES")
            devices = acts.visible_devices(given, torch.cuda.device_count() if given is None else 0, self._workers_max, evicted)
            if devices is not None:
                worker_env["CUDA_VISIBLE_DEVICES"] = devices


def run(args: argparse.Namespace) -> int:
    """Launch and supervise; returns the job's exit status."""
    from torch.distributed import run as torchrun

    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    job = _job_name(args)
    options = _rendezvous(args, torchrun, job)
    config, command, command_args = torchrun.config_from_args(args)
    if config.rdzv_backend == elastic.BACKEND:
        config.rdzv_configs |= {"workers": config.nproc_per_node, "secret_file": args.secret_file}
    settings = {
        "CKPTD_JOB": job, "CKPTD_STORE": absolute(args.store), "CKPTD_PERSIST_EVERY": args.persist_every, "CKPTD_SLOTS": args.slots,
        "CKPTD_PARITY": "" if args.parity is None else str(args.parity), "CKPTD_GROUP_SIZE": args.group_size or "", "CKPTD_KEPT": "1", "CKPTD_ON_FAULT": _policy(args.on_fault), "CKPTD_DIR": args.dir, "CKPTD_PRELOAD": ",".join(args.preload),
    }  # fmt: skip
    os.environ.update({k: str(v) for k, v in settings.items() if v})
    rendezvous_handler_registry.register(elastic.BACKEND, plugin.handler)
    keeper = Keeper(job, args.dir, args.linger_s, options)
    keeper.start()
    standbys = Standbys(config.nproc_per_node if args.standby is None else args.standby)
    Agent.keeper, Agent.standbys, Agent.policy, _Handler.standbys = keeper, standbys, args.on_fault, standbys
    # Two names that torch elastic looks up at call time, in this process only: its agent class, and how it starts a process.
    vars(launcher_api)["LocalElasticAgent"] = Agent
    vars(elastic_processes)["get_subprocess_handler"] = _Handler
    finished = False
    try:
        launcher_api.elastic_launch(config=config, entrypoint=command)(*command_args)
        finished = True
    except ChildFailedError as e:
        log.error("%s", e)  # noqa: TRY400  the traceback is the worker's, and is in the message
        return _status_of(e)
    except Evicted as e:
        log.warning("this node has left job %s (%s). Its memory is kept for %.0f s; to have it back in the job, start the same command here again", job, e, args.linger_s)
        return 0
    except elastic_processes.SignalException as e:
        return 128 + int(e.sigval)
    except RendezvousClosedError:
        log.error("the job is over: other nodes ended it, or finished it")  # noqa: TRY400  nobody needs the traceback
        return 1
    except RendezvousTimeoutError as e:
        raise DaemonUnreachable(str(e), remedy="more than half of the nodes of the last epoch must come (half, if its first is among them); then nodes may be fewer or more") from e
    finally:
        standbys.close()
        keeper.stop(forget=finished and not args.keep)
    return 0


def _policy(asked: str) -> str:
    """Raises BadArgument; argparse does not look at defaults, and this one may come from the environment."""
    if asked not in acts.POLICIES:
        msg = f"--on-fault {asked}"
        raise BadArgument(msg, remedy=f"one of {', '.join(acts.POLICIES)}")
    return asked


def _job_name(args: argparse.Namespace) -> str:
    name = args.job or (args.rdzv_id if args.rdzv_id not in {"", "none", None} else "") or Path(args.training_script).stem
    return str(name)


def _rendezvous(args: argparse.Namespace, torchrun: Any, job: str) -> list[str]:
    """Where nodes meet; returns the daemon's options.

    One node: as torchrun's own `run`, a c10d store in this process, on a free port. Several: by the daemons, unless another backend was asked for.
    """
    _, max_nodes = torchrun.parse_min_max_nnodes(args.nnodes)
    options = ["--peer-host", args.peer_host] if args.peer_host else []
    if args.rdzv_backend == elastic.BACKEND or (args.rdzv_backend == "static" and args.rdzv_endpoint and max_nodes > 1 and not args.standalone):
        args.rdzv_backend = elastic.BACKEND
        if not args.rdzv_endpoint:
            msg = "--rdzv-backend ckptd needs --rdzv-endpoint"
            raise BadArgument(msg, remedy="give HOST:PORT of one or more nodes, the same on all nodes")
        args.rdzv_id = job
        seeds = elastic.seeds_of(args.rdzv_endpoint)
        args.local_addr = args.local_addr or args.peer_host or elastic.address_towards(seeds)
        mine = next((s for s in seeds if s.rpartition(":")[0] == args.local_addr), "")
        options = ["--peer-host", args.peer_host or args.local_addr, *(["--peer-port", mine.rpartition(":")[2]] if mine else [])]
        elastic.check_secret(args.local_addr, args.secret_file)
        os.environ.setdefault("GLOO_SOCKET_IFNAME", _interface(args.local_addr))
    if args.insecure_peers:
        options.append("--insecure-peers")
    if args.standalone or (args.rdzv_backend == "static" and not args.rdzv_endpoint and args.master_port is None and max_nodes == 1):
        args.rdzv_backend, args.rdzv_endpoint = "c10d", "localhost:0"
        args.rdzv_id = f"{_job_name(args)}-{os.getpid()}"
    if args.master_port is None:
        args.master_port = 29500
    return options


def _interface(address: str) -> str:
    """The network interface that has an address: gloo would take the one that the host's name resolves to."""
    if ipaddress.ip_address(address).is_loopback:
        return "lo"
    found = (name for name, addresses in psutil.net_if_addrs().items() if any(a.address == address for a in addresses))
    name = next(found, None)
    if name is None:
        msg = f"no interface of this node has the address {address}"
        raise BadArgument(msg, remedy="give one with --local-addr")
    return name


def _status_of(error: ChildFailedError) -> int:
    """The first failed worker's status, as a shell would give it."""
    code = min(error.failures.values(), key=lambda f: f.timestamp).exitcode
    return 128 - code if code < 0 else code


def parser() -> argparse.ArgumentParser:
    """torchrun's own parser, with our arguments beside."""
    from torch.distributed.run import get_args_parser

    p = get_args_parser()
    p.prog = "ckptd run"
    p.description = "torchrun under supervision: the same arguments, and a daemon that keeps every step's state through whatever kills the job."
    p.set_defaults(max_restarts=100, monitor_interval=0.05)
    ours = p.add_argument_group("ckptd")
    ours.add_argument("--job", default=os.environ.get("CKPTD_JOB", ""), help="name of the job: a later run with this name resumes it (default: --rdzv-id, else the script's name)")
    ours.add_argument("--store", default=os.environ.get("CKPTD_STORE", ""), metavar="PATH", help="durable tier: a directory that all nodes share")
    ours.add_argument("--persist-every", type=int, default=int(os.environ.get("CKPTD_PERSIST_EVERY", "0")), metavar="N", help="persist every N-th step (default: only on session.persist)")
    ours.add_argument("--slots", type=int, default=0, metavar="N", help="snapshots per rank in memory, 2 to 8 (default 3)")
    ours.add_argument("--dir", default=os.environ.get("CKPTD_DIR"), metavar="DIR", help="directory of the daemon's socket")
    ours.add_argument("--linger-s", type=float, default=spawn.LINGER_S, metavar="S", help="a daemon started here leaves S seconds after the last client (default %(default)s)")
    ours.add_argument("--peer-host", default="", metavar="ADDRESS", help="this node's address for other nodes' daemons, if the daemon is started here (default: loopback)")
    ours.add_argument("--parity", type=int, metavar="M", help="nodes of a group that may be lost at once, 0 to 4 (default 1)")
    ours.add_argument("--group-size", type=int, metavar="N", help="nodes that protect each other (default 8)")
    ours.add_argument("--secret-file", default=os.environ.get("CKPTD_SECRET_FILE"), metavar="FILE", help="the job's secret, the same on all nodes (0600): needed where nodes meet off loopback")
    ours.add_argument("--insecure-peers", action="store_true", help="allow --peer-host off loopback: peers are authenticated, but nothing is encrypted")
    ours.add_argument(
        "--on-fault", default=os.environ.get("CKPTD_ON_FAULT") or "report", metavar="WHAT",
        help="what may follow where a rank is seen to hang, to be slow or to be broken. report: nothing but words (default); snapshot: keep the newest snapshot, and persist it where there is a --store;"
        " restart: also end all workers and go on from the last step (not counted as one of --max-restarts; after 3 in a row without a new snapshot the job is given up);"
        " evict: also leave out ranks that were confirmed to be bad, and go on with the others, resharded from memory. An evicted worker's slot (CKPTD_SLOT, and its GPU) stays empty until this"
        " launcher is started anew; a node that loses all its workers leaves the job with status 0, and comes back when it is started again (also CKPTD_ON_FAULT)",
    )  # fmt: skip
    ours.add_argument("--keep", action="store_true", help="keep the job's snapshots in memory after it has finished")
    ours.add_argument("--standby", type=int, metavar="N", help="processes that have imported torch, waiting to replace workers (default: one per worker; 0: none)")
    ours.add_argument("--preload", action="append", default=[], metavar="MODULE", help="import this in standbys too (may be repeated)")
    return p
