"""`ckptd status`: what this node's daemon holds, and what would be lost if something died now.

One connection per look, with one deadline for all of it: a stopped daemon is told apart from a quiet one.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import select
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

import msgspec

from ckptd import errors
from ckptd.channel import Pipe, connect, socket_path
from ckptd.cli import show
from ckptd.core import wire
from ckptd.errors import BadArgument, DaemonUnreachable, PeerFailed
from ckptd.monitor import view

REFRESH_S = 2.0
RANKS_SHOWN = 32
VERDICTS_SHOWN = 8
WAITS_SHOWN = 8
IDLE_MS = 1000
"""A rank that stood still for longer is said to be idle."""
PART_SHOWN = 0.02
"""Parts of a step that are worth a word."""
CLEAR = "\x1b[H\x1b[2J"


def add_parser(verbs: Any) -> None:
    """The verb's arguments."""
    p = verbs.add_parser(
        "status",
        help="this node's daemon: jobs, snapshots, and what would be lost if something died now",
        description="Show this node's daemon: its jobs, their snapshots by state, what is in the durable tier, and what would be lost if\n"
        "all trainers of this node, or the node itself, died now; and what watching found: where each rank is, how late it is, who waits\n"
        "for whom, and verdicts. Of many ranks the latest are listed.",
        epilog="example:\n  ckptd status --watch 1",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument(
        "--dir",
        metavar="DIR",
        help="directory of the daemon's socket; default: $CKPTD_DIR, $RUNTIME_DIRECTORY, or the user's runtime directory",
    )
    how = p.add_mutually_exclusive_group()
    how.add_argument(
        "--watch",
        metavar="S",
        nargs="?",
        type=float,
        const=REFRESH_S,
        help="show it again every S seconds (default %(const)s) until Ctrl-C",
    )
    how.add_argument("--json", action="store_true", help="print one JSON document")
    p.add_argument("--timeout-s", type=float, default=5.0, metavar="S", help="wait this long for the daemon (default %(default)s)")
    p.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Show it once, or until interrupted."""
    for name, value in (("--timeout-s", args.timeout_s), ("--watch", args.watch)):
        if value is not None and not (math.isfinite(value) and value > 0):
            msg = f"{name} {value:g}: give a number of seconds above 0"
            raise BadArgument(msg)
    path = socket_path(args.dir)
    status = ask(path, args.timeout_s)
    if args.watch is not None:
        _watch(path, status, args.timeout_s, args.watch)
    if args.json:
        show.emit_json(_document(path, status))
    else:
        show.emit(render(status))
    return 0


def _watch(path: Path, first: dict[str, Any], timeout_s: float, every_s: float) -> NoReturn:
    """Until KeyboardInterrupt. A daemon that goes away is said so, and looked for again."""
    terminal = sys.stdout.isatty()
    text = render(first)
    while True:
        head = f"every {every_s:g} s, {show.utc(time.time())}, Ctrl-C ends"
        show.emit(f"{CLEAR}{head}\n\n{text}" if terminal else f"--- {head}\n{text}")
        time.sleep(every_s)
        try:
            text = render(ask(path, timeout_s))
        except DaemonUnreachable as e:
            text = str(e)


def ask(path: Path, timeout_s: float) -> dict[str, Any]:
    """The status of the daemon at `path`. Raises DaemonUnreachable, PeerFailed, BadArgument (it speaks another protocol)."""
    deadline_s = time.monotonic() + timeout_s
    pipe = connect(path, timeout_s)
    try:
        pipe.put(wire.Hello(id=1, role="cli"))
        pipe.put(wire.Status(id=2))
        return _answer(pipe, deadline_s, f"the daemon at {path} did not answer within {timeout_s:g} s")
    except (EOFError, OSError) as e:
        msg = f"the daemon at {path} hung up"
        raise DaemonUnreachable(msg, remedy="it is leaving, or was killed: try again; `ckptd daemon` starts one") from e
    finally:
        pipe.close()


def _answer(pipe: Pipe, deadline_s: float, late: str) -> dict[str, Any]:
    poller = select.poll()
    while (left_s := deadline_s - time.monotonic()) > 0:
        pipe.flush()
        poller.register(pipe.sock, select.POLLIN | (select.POLLOUT if pipe.wants_write else 0))
        poller.poll(math.ceil(left_s * 1000))
        for message in pipe.read():
            if isinstance(message, wire.Refused):
                raise getattr(errors, message.error, PeerFailed)(message.message, remedy=message.remedy)
            if isinstance(message, wire.Report):
                return message.status
    raise DaemonUnreachable(late, remedy="it is stopped (SIGSTOP, a debugger) or overloaded: look at its process, then restart it")


# --- what it says -----------------------------------------------------------------------------------------------------------

Key = tuple[int, int]


class Snapshot(msgspec.Struct):
    """A snapshot, as `Daemon.status` tells it."""

    attempt: int
    step: int
    state: str
    ranks: list[int] = []
    bytes: int = 0
    persisting: bool = False
    persisted: bool = False
    protected: bool = False


class Group(msgspec.Struct):
    """The nodes that protect each other."""

    members: list[int] = []
    parity: int = 0
    degraded: str = ""
    fragment_bytes: int = 0


class Suspected(msgspec.Struct):
    """Ranks that hold other bytes than their replicas."""

    step: int
    what: str


class Job(msgspec.Struct):
    """A job, as `Daemon.status` tells it."""

    attempt: int
    node: int = 0
    nodes: int = 1
    ranks: list[int] = []
    peers_connected: dict[str, bool] = {}
    snapshots: list[Snapshot] = []
    committed: Key | None = None
    protected: Key | None = None
    persisted: Key | None = None
    group: Group | None = None
    store: str = ""
    suspected: list[Suspected] = []
    counters: dict[str, int] = {}


class Daemon(msgspec.Struct):
    """What `Daemon.status` tells. What a newer daemon says besides is in --json only."""

    version: str
    daemon: str
    pid: int
    uptime_s: float
    peer_address: str = ""
    memory_bytes: int = 0
    errors: int = 0
    last_errors: list[str] = []
    jobs: dict[str, Job] = {}


def _parse(status: dict[str, Any]) -> Daemon:
    try:
        return msgspec.convert(status, Daemon)
    except msgspec.ValidationError as e:
        msg = f"the daemon's status is not what this ckptd expects: {e}"
        raise PeerFailed(
            msg, remedy="daemon and command line are of different versions: use the same; --json shows the status as it is"
        ) from e


@dataclass(frozen=True, slots=True)
class Loss:
    """Where a restart would go back to. `source`: "memory", "durable" or "nothing"; `steps`: committed ones that would be lost, if known."""

    source: str
    attempt: int | None
    step: int | None
    steps: int | None
    text: str


def if_trainers_die(job: Job) -> Loss:
    """All trainers of this node are gone, the daemon lives: the newest committed snapshot is in its memory."""
    if job.committed is None or job.committed not in {(s.attempt, s.step) for s in job.snapshots}:
        return if_node_dies(job)
    attempt, step = job.committed
    text = f"back to step {step} from memory (0 steps committed later are lost)"
    return Loss("memory", attempt, step, 0, text)


def if_node_dies(job: Job) -> Loss:
    """The memory of this node is gone. What was persisted before this daemon began, it does not know."""
    if job.group is not None and job.protected is not None and job.group.parity and (job.persisted is None or job.protected >= job.persisted):
        attempt, step = job.protected
        newest = job.committed or job.protected
        lost = newest[1] - step if newest[0] == attempt else None
        others = f"any {job.group.parity} of nodes {show.ranges(job.group.members)} may go"
        return Loss("memory", attempt, step, lost, f"back to step {step} from the others' memory ({_lost(lost, newest[0])}; {others})")
    if job.persisted is None:
        if not job.store:
            return Loss("nothing", None, None, None, "everything: no durable tier")
        hint = f"everything, but for what {job.store} held before this daemon began (`ckptd ls` tells)"
        return Loss("nothing", None, None, None, f"{hint}: nothing persisted yet")
    attempt, step = job.persisted
    committed = max(job.committed or job.persisted, job.persisted)
    # Over attempts steps cannot be counted: a later attempt may have gone back to an older checkpoint.
    lost = committed[1] - step if committed[0] == attempt else None
    tail = f"attempt {attempt}; {_lost(lost, committed[0])}" if lost is None else _lost(lost, attempt)
    return Loss("durable", attempt, step, lost, f"back to step {step} from the durable tier ({tail})")


def _lost(steps: int | None, attempt: int) -> str:
    if steps is None:
        return f"all that attempt {attempt} committed is lost"
    return f"{steps} step{'' if steps == 1 else 's'} committed later {'is' if steps == 1 else 'are'} lost"


def _document(path: Path, status: dict[str, Any]) -> dict[str, Any]:
    """The status as it is, with what would be lost where that can be told."""
    document = {"socket": str(path), **status}
    with contextlib.suppress(PeerFailed):
        document["jobs"] = {
            name: {
                **status["jobs"][name],
                "if_trainers_die": asdict(if_trainers_die(job)),
                "if_node_dies": asdict(if_node_dies(job)),
            }
            for name, job in _parse(status).jobs.items()
        }
    return document


def render(status: dict[str, Any]) -> str:
    """The text of one look."""
    d = _parse(status)
    who = f"daemon {show.plain(d.daemon)}, pid {d.pid}, version {show.plain(d.version)}, up {show.duration(d.uptime_s)}"
    lines = [f"{who}, {show.size(d.memory_bytes)} of memory held, peers at {show.plain(d.peer_address) or '-'}"]
    if d.errors:
        lines.append(f"{show.count(d.errors, 'error')}, the last:")
        lines += [f"  {show.plain(error)}" for error in d.last_errors]
    else:
        lines.append("no errors")
    all_jobs = view.jobs(status)
    if not all_jobs:
        lines.append("no jobs")
    if isinstance(faces := status.get("faces"), dict) and faces.get("http"):
        lines.append(f"page and metrics at http://{show.plain(str(faces['http']))}/")
    for name, raw in sorted(all_jobs.items()):
        lines += ["", *(_job_lines(name, d.jobs[name]) if name in d.jobs else [f"job {show.plain(name)}: watched only, no session is attached"])]
        seen = view.watching(raw)
        if seen is not None:
            lines += _watch_lines(seen)
    return "\n".join(lines)


def _job_lines(name: str, job: Job) -> list[str]:
    peers = [
        f"node {n} {'connected' if ok else 'NOT connected'}"
        for n, ok in sorted(job.peers_connected.items(), key=lambda p: int(p[0]))
    ]
    where = f"job {show.plain(name)}: attempt {job.attempt}, node {job.node} of {job.nodes}"
    lines = [f"{where}, {show.count(len(job.ranks), 'rank')} connected{f' ({show.ranges(job.ranks)})' if job.ranks else ''}"]
    if peers:
        lines.append(f"  peers: {', '.join(peers)}")
    if job.snapshots:
        newest_first = sorted(job.snapshots, key=lambda s: (s.attempt, s.step), reverse=True)
        lines.append(
            show.table(
                ("STEP", "ATTEMPT", "STATE", "RANKS", "SIZE", "PARITY", "DURABLE"),
                (
                    [str(s.step), str(s.attempt), s.state, show.ranges(s.ranks), show.size(s.bytes), "protected" if s.protected else "-", _durable(s)]
                    for s in newest_first
                ),
                right=("STEP", "ATTEMPT", "SIZE"),
                indent="  ",
            )
        )
    else:
        lines.append("  no snapshots")
    lines.append(f"  committed: {_key(job.committed)}")
    if job.group is not None:
        g = job.group
        members = f"group of nodes {show.ranges(g.members)}, any {g.parity} may be lost, {show.size(g.fragment_bytes)} of parity here"
        lines.append(f"  protected: {_key(job.protected)}, {members}{f'; DEGRADED: {show.plain(g.degraded)}' if g.degraded else ''}")
    elif job.nodes > 1:
        lines.append("  protected: off (parity 0)")
    lines.append(f"  persisted: {_key(job.persisted)}{f' in {show.plain(job.store)}' if job.store else ', no durable tier'}")
    lines.append(
        "  since the daemon knows this job: "
        + (", ".join(f"{n} {what.replace('_', ' ')}" for what, n in job.counters.items()) or "-")
    )
    lines += [f"  SUSPECTED at step {s.step}: {show.plain(s.what)}" for s in job.suspected]
    lines.append(f"  if every trainer of this node died now: {show.plain(if_trainers_die(job).text)}")
    lines.append(f"  if this node died now: {show.plain(if_node_dies(job).text)}")
    return lines


# --- watching ---------------------------------------------------------------------------------------------------------------


def _watch_lines(seen: view.Watching) -> list[str]:
    """What watching says of a job: verdicts first, for they are why somebody looks."""
    ranks = {r.rank: r for r in seen.ranks}
    lost = sum(t.lost for t in seen.taps.values())
    head = f"  watching: {len(ranks) or len(seen.taps)} of {show.count(seen.world_size, 'rank')}, step {seen.step}, policy {show.plain(seen.policy) or '-'}"
    walls = sorted(r.wall_us for r in seen.ranks if r.wall_us)
    head += f", {_time(walls[len(walls) // 2])} a step" if walls else ""
    layers = sorted({t.layer for t in seen.taps.values() if t.layer})
    head += f"; taps here: {len(seen.taps)} ({', '.join(map(show.plain, layers)) or '-'}), {show.count(lost, 'record')} lost"
    lines = [head]
    if seen.note:
        lines.append(f"  not understood: {show.plain(seen.note)}")
    shown = view.open_verdicts(seen)
    for v in shown[:VERDICTS_SHOWN]:
        did = v.did or v.action
        lines.append(f"  {'VERDICT' if v.state == 'confirmed' else show.plain(v.state)}: {show.plain(v.text or v.kind)}{f'; done: {show.plain(did)}' if did else ''}")
    cleared = sum(v.state == "cleared" for v in seen.verdicts)
    rest = [f"{len(shown) - VERDICTS_SHOWN} more"] if len(shown) > VERDICTS_SHOWN else []
    rest += [f"{cleared} cleared"] if cleared else []
    if not shown or rest:
        lines.append(f"  {'verdicts besides' if shown else 'no verdict holds'}{': ' if rest else ''}{', '.join(rest)}")
    lines += _waiting(seen)
    if ranks:
        lines.append(_rank_table(seen, {r for v in shown for r in v.ranks}))
    elif not seen.coordinator:
        lines.append("  node 0 coordinates this job: its daemon tells of the ranks")
    return lines


def _waiting(seen: view.Watching) -> list[str]:
    together: dict[tuple[str, int, str, tuple[int, ...]], list[view.Wait]] = {}
    for w in seen.waits:
        together.setdefault((w.op, w.seq, w.group, tuple(w.ranks)), []).append(w)
    lines = []
    for (op, seq, group, behind), waits in sorted(together.items(), key=lambda item: -len(item[1]))[:WAITS_SHOWN]:
        who = f"rank{'s' if len(waits) > 1 else ''} {show.ranges(w.rank for w in waits)} wait{'' if len(waits) > 1 else 's'}"
        since = _time(1e3 * max(w.since_ms for w in waits))
        lines.append(f"  {who} in {show.plain(op)} {seq} of group {show.plain(group)} for {f'rank {show.ranges(behind)}' if behind else 'nobody'}, since {since}")
    return lines


def _rank_table(seen: view.Watching, guilty: set[int]) -> str:
    """All ranks, or the latest of many; those of a verdict first."""
    ranks = seen.ranks
    if len(ranks) > RANKS_SHOWN:
        ranks = sorted(ranks, key=lambda r: (r.rank not in guilty, -(r.lateness or 0.0), r.rank))[:RANKS_SHOWN]
    rows = [
        [
            str(r.rank), f"{r.node} {show.plain(r.host)}".strip(), f"{show.plain(r.state)}{f' idle {_time(1e3 * r.idle_ms)}' if r.idle_ms >= IDLE_MS else ''}" or "-",
            str(r.step), _time(r.wall_us), _time(r.self_us), _time(max(0.0, r.wall_us - r.self_us)), "-" if r.lateness is None else f"{r.lateness:.1%}",
            ", ".join(f"{part} {_time(us)}" for part, us in r.parts.items() if part in view.PARTS and us >= PART_SHOWN * r.wall_us > 0) or "-",
            "<-" if r.rank in guilty else "",
        ]
        for r in ranks
    ]  # fmt: skip
    header = ("RANK", "NODE", "STATE", "STEP", "STEP TIME", "OWN", "WAITING", "LATENESS", "OF ITS OWN", "")
    text = show.table(header, rows, right=("RANK", "STEP", "STEP TIME", "OWN", "WAITING", "LATENESS"), indent="  ")
    left = len(seen.ranks) - len(ranks)
    return f"{text}\n  and {show.count(left, 'rank')} that {'is' if left == 1 else 'are'} less late" if left else text


def _time(us: float) -> str:
    if us >= 1e6:
        return f"{us / 1e6:.1f} s"
    return f"{us / 1e3:.1f} ms" if us >= 1e3 else f"{us:.0f} us"


def _durable(snapshot: Snapshot) -> str:
    if snapshot.persisted:
        return "persisted"
    return "persisting" if snapshot.persisting else "-"


def _key(key: Key | None) -> str:
    return "nothing yet" if key is None else f"step {key[1]} (attempt {key[0]})"
