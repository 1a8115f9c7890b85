"""Labelled faults in real torchrun jobs, watched by a real daemon: what it names, when, and what it should have named.

    Case  what is run, and the label: who is to be named, and as what
      |   Nodes.run: scripts/watch_job.py under torchrun, gloo; the daemon is asked ten times a second
    Timeline  when the fault began, when each step ended, when each verdict was first seen or changed
      |   score
    Scored  named or not, right rank, right cause, seconds and steps from the beginning to the verdict, false alarms

One torchrun per number of ranks serves all cases of that size: its ranks fork a process for each, so that imports are paid once; the tap is attached in those by
torch's own plug-in mechanism. A case's processes are ended by their pids. The time of a verdict is the coordinator's (`detected_s`) where it was certain at once, and
the time of the look that found it confirmed otherwise; beginnings are told by the faulty rank. All on one machine, one clock.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from benchmarks import harness
from ckptd.channel import connect, socket_path
from ckptd.cli.status import ask
from ckptd.core import wire
from ckptd.errors import CkptdError

SCRIPT = harness.ROOT / "scripts" / "watch_job.py"
LOOK_S = 0.1
AFTER_S = 1.0
"""How long a case is watched after its fault was named: what comes then is a false alarm, or a contradiction."""
READY_S = 300.0
STEP_S = 60.0
"""Without a step of rank 0 for this long, and no fault begun, a job is given up."""
STANDING = ("hang", "desync", "deadlock", "comm-hang", "crash", "stopped", "io-blocked")


@dataclass(frozen=True, kw_only=True)
class Case:
    """`fault`: as watch_job.py takes it; `rank`: who is to be named (-1: nobody must be); `kinds`: as what. `stands`: the job does not go on by itself."""

    name: str
    layout: str
    fault: str = ""
    rank: int = 2
    kinds: tuple[str, ...] = ()
    stands: bool = False
    world: int = 4
    steps: int = 100
    limit_s: float = 15.0
    limit_steps: int = 50
    options: tuple[str, ...] = ()

    @property
    def quiet(self) -> bool:
        """Nothing is to be named at all."""
        return not self.kinds


@dataclass(frozen=True)
class Seen:
    """A verdict as it was at time `t`: when it was new, and at each change."""

    t: float
    verdict: dict[str, Any]


@dataclass
class Timeline:
    """What happened. Times are time.time()."""

    onset_t: float = 0.0
    onset_step: int = 0
    usual_s: float = 0.0
    steps: list[tuple[int, float]] = field(default_factory=list)
    seen: list[Seen] = field(default_factory=list)
    codes: list[int] = field(default_factory=list)
    taps: dict[str, Any] = field(default_factory=dict)

    def step_at(self, t: float) -> int:
        """The last step that rank 0 had ended."""
        return max((n for n, end in self.steps if end <= t), default=0)


@dataclass(frozen=True)
class Scored:
    """One case's result; see `score`."""

    case: Case
    named: bool
    right_rank: bool
    right_cause: bool
    kind: str
    ranks: tuple[int, ...]
    cause: str
    latency_s: float
    latency_steps: int
    suspected_s: float
    false_alarms: tuple[str, ...]
    usual_ms: float
    lost: int


def score(case: Case, timeline: Timeline) -> Scored:
    """The first confirmed verdict after the fault began counts. What was said before it began, of a quiet case at all, or of another rank beside it, is a false alarm."""
    first: Seen | None = None
    suspected_t = 0.0
    wrong: list[str] = []
    for s in timeline.seen:
        v = s.verdict
        early = case.quiet or not timeline.onset_t or s.t < timeline.onset_t
        if v["state"] == "cleared":
            continue
        if early:
            wrong.append(_words(s, timeline))
            continue
        suspected_t = suspected_t or s.t
        if v["state"] != "confirmed" or v["kind"] == "undecided":
            continue
        if first is None:
            first = s
        elif tuple(v["ranks"]) != tuple(first.verdict["ranks"]) and not _follows(case, v):
            wrong.append(_words(s, timeline))
    v = first.verdict if first else {}
    t = _when(first, timeline) if first else 0.0
    return Scored(
        case=case, named=first is not None, right_rank=first is not None and (case.rank < 0 or tuple(v["ranks"]) == (case.rank,)),
        right_cause=first is not None and v["kind"] in case.kinds, kind=v.get("kind", ""), ranks=tuple(v.get("ranks", ())), cause=v.get("cause", ""),
        latency_s=t - timeline.onset_t if first else float("nan"), latency_steps=max(0, timeline.step_at(t) - timeline.onset_step + 1) if first else -1,
        suspected_s=suspected_t - timeline.onset_t if suspected_t else float("nan"), false_alarms=tuple(dict.fromkeys(wrong)),
        usual_ms=timeline.usual_s * 1e3, lost=sum(int(t.get("lost", 0)) for t in timeline.taps.values()),
    )  # fmt: skip


def _when(s: Seen, timeline: Timeline) -> float:
    """Certain at once: when the coordinator said so. Else the look that found it."""
    told = float(s.verdict["detected_s"])
    return told if 0.0 <= s.t - told <= 3 * LOOK_S and told >= timeline.onset_t else s.t


def _follows(case: Case, v: dict[str, Any]) -> bool:
    """Whether a later verdict is a consequence that nobody would call an alarm: the others of a job that stands die, the job as a whole is slower."""
    return (case.stands and v["kind"] == "crash") or v["kind"] == "global-slow" or case.rank in v["ranks"]


def _words(s: Seen, timeline: Timeline) -> str:
    return f"{s.verdict['kind']} {list(s.verdict['ranks'])} {s.verdict['state']} at step {timeline.step_at(s.t)}"


# --- running ----------------------------------------------------------------------------------------------------------------


def lines(path: Path) -> list[dict[str, Any]]:
    """Whole lines of a file that is being written."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().split("\n")[:-1] if line.endswith("}")]


def plugged(directory: Path) -> str:
    """A folder for PYTHONPATH whose metadata has torch load the tap: as an installation has it, also where this checkout was not installed (or long ago)."""
    site = directory / "site"
    info = site / "ckptd_watched-0.dist-info"
    info.mkdir(parents=True, exist_ok=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: ckptd-watched\nVersion: 0\n")
    (info / "entry_points.txt").write_text("[torch.backends]\nckptd_watched = ckptd.autoload:register\n")
    return f"{site}:{harness.ROOT}"


class Ranks:
    """A torchrun whose ranks serve cases, one after the other."""

    def __init__(self, directory: Path, world: int, daemon: Path, env: dict[str, str] | None = None) -> None:
        self.directory, self.world, self.daemon = directory, world, daemon
        self.number = 0
        directory.mkdir(parents=True, exist_ok=True)
        self.env = {**os.environ, "OMP_NUM_THREADS": "1", "CKPTD_DIR": str(daemon), "PYTHONPATH": plugged(directory), **(env or {})}
        command = [
            sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(world), "--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0",
            "--rdzv-id", "watch", str(SCRIPT), "--serve", str(directory),
        ]  # fmt: skip
        self.log = (directory / "log").open("wb")
        self.process = subprocess.Popen(command, env=self.env, stdout=self.log, stderr=self.log, start_new_session=True)

    def __enter__(self) -> Self:
        until_s = time.monotonic() + READY_S
        while len([*self.directory.glob("ready*")]) < self.world:
            if self.process.poll() is not None or time.monotonic() > until_s:
                self.end()
                msg = f"{self.world} ranks did not come up:\n{self.tail()}"
                raise RuntimeError(msg)
            time.sleep(0.1)
        return self

    def __exit__(self, *_: object) -> None:
        self._tell({"args": None})
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(10)
        self.end()

    def end(self) -> None:
        harness.end(self.process)
        self.log.close()

    def tail(self) -> str:
        return (self.directory / "log").read_text(errors="replace")[-3000:]

    def _tell(self, what: dict[str, Any]) -> None:
        temporary = self.directory / "telling"
        temporary.write_text(json.dumps(what))
        temporary.rename(self.directory / f"job{self.number}.json")

    def run(self, case: Case) -> Timeline:
        """One case, to its end or until enough was seen; its processes are gone afterwards."""
        name, out = f"{case.name}-{self.number}", self.directory / f"out{self.number}"
        args = ["--layout", case.layout, "--steps", str(case.steps), "--out", str(out), *case.options, *(["--fault", case.fault] if case.fault else [])]
        self._tell({"args": args, "env": {"CKPTD_JOB": name}})
        timeline = Timeline()
        try:
            self._watch(case, name, out, timeline)
        finally:
            self._kill(out)
            done = self._await_end()
            self.number += 1
        timeline.codes = done
        timeline.steps = [(e["step"], e["t"]) for e in lines(out / "rank0.jsonl")]
        forget(self.daemon, name)
        return timeline

    def _watch(self, case: Case, name: str, out: Path, timeline: Timeline) -> None:
        known: dict[int, str] = {}
        moved_s, step, enough_s = time.monotonic(), 0, 0.0
        while True:
            now_s = time.monotonic()
            over = len([*self.directory.glob(f"job{self.number}.rank*")]) == self.world
            begun = lines(out / "faults.jsonl")
            if begun and not timeline.onset_t:
                timeline.onset_t, timeline.onset_step, timeline.usual_s = begun[0]["t"], begun[0]["step"], begun[0]["usual_s"]
            watched = self._ask(name)
            timeline.taps = watched.get("taps", timeline.taps)
            for v in watched.get("verdicts", ()):
                what = json.dumps([v["kind"], v["state"], v["ranks"]])
                if known.get(v["id"]) != what:
                    known[v["id"]] = what
                    timeline.seen.append(Seen(time.time(), v))
            last = lines(out / "rank0.jsonl")[-1:]
            if last and last[0]["step"] > step:
                moved_s, step = now_s, last[0]["step"]
            if not enough_s and self._named(case, timeline):
                enough_s = now_s + AFTER_S
            if over or (enough_s and now_s > enough_s) or self._late(case, timeline, step, now_s - moved_s):
                return
            time.sleep(LOOK_S)

    @staticmethod
    def _named(case: Case, timeline: Timeline) -> bool:
        if case.quiet or not timeline.onset_t:
            return False
        return any(s.t >= timeline.onset_t and s.verdict["state"] == "confirmed" and s.verdict["kind"] != "undecided" for s in timeline.seen)

    @staticmethod
    def _late(case: Case, timeline: Timeline, step: int, idle_s: float) -> bool:
        if not timeline.onset_t:
            return idle_s > STEP_S
        if case.stands:
            return time.time() - timeline.onset_t > case.limit_s
        return step > timeline.onset_step + case.limit_steps or idle_s > STEP_S

    def _ask(self, name: str) -> dict[str, Any]:
        try:
            return dict(ask(socket_path(str(self.daemon)), 5.0).get("watched", {}).get(name) or {})
        except CkptdError:
            return {}

    @staticmethod
    def _kill(out: Path) -> None:
        for e in lines(out / "pids.jsonl"):
            with contextlib.suppress(ProcessLookupError):
                os.kill(e["pid"], signal.SIGKILL)

    def _await_end(self) -> list[int]:
        until_s = time.monotonic() + 30
        paths = [self.directory / f"job{self.number}.rank{r}" for r in range(self.world)]
        while not all(p.exists() and p.read_text() for p in paths):
            if time.monotonic() > until_s or self.process.poll() is not None:
                msg = f"the ranks of case {self.number} did not end:\n{self.tail()}"
                raise RuntimeError(msg)
            time.sleep(0.02)
        return [int(p.read_text()) for p in paths]


def forget(directory: Path, job: str) -> None:
    """Tell the daemon that a job is over."""
    with contextlib.suppress(CkptdError, OSError, EOFError):
        pipe = connect(socket_path(str(directory)), 5.0)
        try:
            pipe.put(wire.Hello(id=1, role="cli"))
            pipe.put(wire.Forget(id=2, job=job))
            until_s = time.monotonic() + 5
            while time.monotonic() < until_s:
                pipe.flush()
                if any(isinstance(m, wire.Done | wire.Refused) for m in pipe.read()):
                    return
                time.sleep(0.01)
        finally:
            pipe.close()


# --- the cases --------------------------------------------------------------------------------------------------------------

SLOW = ("compute-slow",)
LAYOUTS = ("ddp", "fsdp", "tp_fsdp", "pp", "pp_dp")


def cases(*, quick: bool) -> list[Case]:
    """The labelled set, healthy jobs among them. Ranks and steps differ from case to case, by its place in the list."""
    return [*_standing(quick=quick), *_slow(quick=quick), *_quiet(quick=quick)]


def _standing(*, quick: bool) -> Iterator[Case]:
    """Jobs that do not go on by themselves."""
    layouts = LAYOUTS if not quick else ("ddp", "pp")
    for i, layout in enumerate(layouts):
        yield _stands("sigstop", layout, i, ("stopped",))
    for i, layout in enumerate(layouts if not quick else ("fsdp",)):
        yield _stands("stuck", layout, i + 1, ("hang",))
    for i, layout in enumerate(("pp", "fsdp") if not quick else ("pp",)):
        yield _stands("stuck", layout, i + 2, ("hang",), ",place=forward", name="hang in forward")
    for i, layout in enumerate(("ddp", "tp_fsdp", "pp_dp") if not quick else ("ddp",)):
        yield _stands("sigkill", layout, i, ("crash",))
    for i, layout in enumerate(("ddp", "tp_fsdp", "fsdp", "pp") if not quick else ("tp_fsdp",)):
        yield _stands("skip", layout, i + 3, ("desync", "deadlock"))
    for i, what in enumerate(("op", "size", "dtype") if not quick else ("op",)):
        yield _stands("desync", ("ddp", "ddp", "fsdp")[i], i, ("desync",), f",what={what}", name=f"wrong {what}")
    for i, layout in enumerate(("ddp", "pp") if not quick else ()):
        yield _stands("deadlock", layout, i + 1, ("deadlock", "desync"))


def _stands(kind: str, layout: str, i: int, kinds: tuple[str, ...], more: str = "", *, name: str = "") -> Case:
    rank = i % 4
    return Case(
        name=f"{name or kind} {layout}".replace(" ", "-"), layout=layout, fault=f"{kind}:rank={rank},step={25 + 3 * (i % 4)}{more}", rank=rank, kinds=kinds,
        stands=True, steps=120,
    )  # fmt: skip


def _slow(*, quick: bool) -> Iterator[Case]:
    """Jobs that go on, slower."""
    percents = (10, 20, 50) if not quick else (20,)
    for i, layout in enumerate(LAYOUTS if not quick else ("ddp", "fsdp")):
        for j, percent in enumerate(percents):
            place = ("all", "backward", "forward")[j]
            yield _costs("slow", layout, i + j, SLOW, f",percent={percent},place={place}", name=f"slow {percent}%")
    if quick:
        yield _costs("nan", "ddp", 2, ("nan",), "", "--report-loss")
        return
    yield _costs("slow", "ddp", 3, SLOW, ",percent=5", name="slow 5%", limit_steps=100)
    yield _costs("input", "ddp", 1, ("input-stall",), ",percent=40")
    yield _costs("input", "tp_fsdp", 2, ("input-stall",), ",percent=40")
    yield _costs("gc", "ddp", 2, ("gc-pause",), ",ms=400")
    yield _costs("drift", "ddp", 1, ("drift", "compute-slow"), ",percent=1", limit_steps=100)
    yield _costs("contend", "ddp", 2, ("cpu-contention",), ",ms=3", "--spin", "0.2", "--step-ms", "120")
    yield _costs("save", "ddp", 1, ("checkpoint-stall",), ",ms=8000", limit_steps=10)
    yield _costs("nan", "ddp", 2, ("nan",), "", "--report-loss")
    yield _costs("nan", "pp", 3, ("nan",), "", "--report-loss")


def _costs(kind: str, layout: str, i: int, kinds: tuple[str, ...], more: str, *options: str, name: str = "", limit_steps: int = 50) -> Case:
    rank, step = i % 4, 40 + 3 * (i % 4)
    if kind == "save":
        step = 60
    return Case(
        name=f"{name or kind} {layout}".replace(" ", "-"), layout=layout, fault=f"{kind}:rank={rank},step={step}{more}", rank=rank, kinds=kinds,
        steps=step + limit_steps + 10, limit_steps=limit_steps, options=options,
    )  # fmt: skip


def _quiet(*, quick: bool) -> Iterator[Case]:
    """Healthy jobs, and one-step spikes."""
    for i, layout in enumerate(LAYOUTS if not quick else ("fsdp",)):
        yield Case(name=f"healthy-{layout}", layout=layout, steps=100 if quick else 150, options=("--seed", str(11 + i)))
    yield Case(name="spike-ddp", layout="ddp", fault="spike:rank=1,step=40", steps=80)
    if not quick:
        yield Case(name="spike-pp", layout="pp", fault="spike:rank=2,step=40", steps=80)
        yield Case(name="healthy-session-fsdp", layout="fsdp", steps=100, options=("--session",))
        yield Case(name="healthy-accumulate-ddp", layout="ddp", steps=100, options=("--accumulate", "2"))


def main() -> None:
    """Run some cases by hand: watch_real.py DIR NAME...; NAME is a part of a case's name."""
    directory, words = Path(sys.argv[1]), sys.argv[2:]
    chosen = [c for c in cases(quick=False) if not words or any(w in c.name for w in words)]
    with harness.daemon(directory / "d"), Ranks(directory / "r", 4, directory / "d") as ranks:
        for case in chosen:
            began_s = time.monotonic()
            timeline = ranks.run(case)
            s = score(case, timeline)
            print(
                f"{case.name:24} rank {case.rank} {'/'.join(case.kinds) or 'quiet':20} -> {s.kind or '-':16} {list(s.ranks)} "
                f"{'ok' if (case.quiet and not s.false_alarms) or (s.right_rank and s.right_cause and not s.false_alarms) else 'WRONG'} "
                f"{s.latency_s:.2f} s {s.latency_steps} steps (usual {s.usual_ms:.0f} ms; {len(timeline.steps)} steps; codes {timeline.codes}; "
                f"{time.monotonic() - began_s:.0f} s) {s.cause} {' | '.join(s.false_alarms)}", flush=True,
            )  # fmt: skip


if __name__ == "__main__":
    main()
