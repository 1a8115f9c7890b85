"""Labelled faults in real torchrun jobs, watched by a real daemon: what it names, when, and what it should have named.

    Case  what is run, and the label: who is to be named, and as what
      |   Nodes.run: scripts/watch_job.py under torchrun, gloo; the daemon is asked ten times a second
    Timeline  when the fault began, when each step ended, when each verdict was first seen or changed
      |   watch_score
    Row  named or not, right rank, right cause, seconds and steps from the beginning to the verdict, false alarms

One torchrun per number of ranks serves all cases of that size: its ranks fork a process for each, so that imports are paid once; the tap is attached in those by
torch's own plug-in mechanism. A case's processes are ended by their pids. The time of a verdict is the coordinator's (`detected_s`) where it was certain at once, and
the time of the look that found it confirmed otherwise; beginnings are told by the faulty rank. All on one machine, one clock.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Self

import msgspec

from benchmarks import harness, watch_score
from benchmarks.harness import Aim, Bench
from ckptd.channel import connect, socket_path
from ckptd.cli.status import ask
from ckptd.core import wire
from ckptd.errors import CkptdError
from ckptd.monitor.report import Verdict

SCRIPT = harness.ROOT / "scripts" / "watch_job.py"
LOOK_S = 0.1
AFTER_S = 1.0
"""How long a case is watched after its fault was named: what comes then is a false alarm, or a contradiction."""
READY_S = 300.0
SOON_S = 3 * LOOK_S
COST_STEPS = 10
"""So many steps on both sides, at least, to say what a fault cost."""
STEP_S = 60.0
"""Without a step of rank 0 for this long, and no fault begun, a job is given up."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """`fault`: as watch_job.py takes it; `rank`: who is to be named (-1: nobody must be); `kinds`: as what, `also`: less exactly. `stands`: the job does not go on
    by itself. `group`: which aim it counts for (watch_score). `seed`: of its data, and of what its steps take."""

    name: str
    layout: str
    kind: str = ""
    severity: str = ""
    group: str = ""
    also: tuple[str, ...] = ()
    fault: str = ""
    rank: int = 2
    kinds: tuple[str, ...] = ()
    stands: bool = False
    world: int = 4
    steps: int = 100
    limit_s: float = 15.0
    limit_steps: int = 50
    options: tuple[str, ...] = ()
    seed: int = 7

    @property
    def quiet(self) -> bool:
        """Nothing is to be named at all."""
        return not self.kinds

    def label(self, timeline: Timeline) -> watch_score.Case:
        """For the score."""
        return watch_score.Case(
            kind=self.kind or self.name, layout=f"{self.layout}{self.world}", seed=self.seed, severity=self.severity, ranks=(self.rank,) if self.rank >= 0 and self.kinds else (),
            kinds=(*self.kinds, *self.also), causes=self.kinds, group=self.group, onset_step=timeline.onset_step, onset_s=timeline.onset_t, step_s=timeline.usual_s,
            tolerated=("crash",) if self.stands else (), world=self.world,
        )  # fmt: skip


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

    def told(self) -> list[watch_score.Told]:
        """The verdicts as they were told, with the step that was under way."""
        return [watch_score.Told(self.when(s), self.step_at(self.when(s)), msgspec.convert(s.verdict, Verdict)) for s in self.seen]

    def step_at(self, t: float) -> int:
        """The step that was under way in rank 0, which may be one behind the rank that has begun to fail."""
        step = max((n for n, end in self.steps if end <= t), default=0) + 1
        return max(step, self.onset_step) if self.onset_t and t >= self.onset_t else min(step, self.onset_step - 1) if self.onset_t else step

    def cost(self) -> float:
        """What the job's steps (the middle one) became longer by since the onset, as part of a step: what a rank is given to do more is not always what it costs. 0: not known."""
        ends = sorted(self.steps)
        before, after = ([b[1] - a[1] for a, b in pairwise(ends) if (b[0] >= self.onset_step) == since] for since in (False, True))
        if not self.onset_step or len(before) < COST_STEPS or len(after) < COST_STEPS:
            return 0.0
        return statistics.median(after) / statistics.median(before[-3 * COST_STEPS :]) - 1.0

    def when(self, s: Seen) -> float:
        """Certain at once: when the coordinator said so. Else the look that found it."""
        told = float(s.verdict["detected_s"])
        return told if 0.0 <= s.t - told <= SOON_S else s.t


def score(case: Case, timeline: Timeline) -> watch_score.Row:
    """How it went. Beside a job that stands, the deaths of those who waited are no alarm."""
    return watch_score.score(case.label(timeline), timeline.told())


def right(row: watch_score.Row) -> bool:
    """As it should be, apart from the time it took."""
    return not row.false_reports and (row.case.quiet or (row.named and row.right_rank and row.right_cause))


def line(row: watch_score.Row, timeline: Timeline) -> str:
    """For people."""
    c = row.case
    label = f"rank {c.ranks[0] if c.ranks else '-'} {'/'.join(c.kinds)}" if c.kinds else "quiet"
    when = f"{row.seconds:.2f} s, {row.steps:.0f} steps" if row.named else "-"
    cost = f" ({timeline.cost():+.1%} since)" if timeline.cost() else ""
    return (
        f"{'ok   ' if right(row) else 'WRONG'} {c.kind} {c.severity} {c.layout} seed {c.seed}: {label}: {when}; said: {row.said or 'nothing'}; "
        f"step {timeline.usual_s * 1e3:.0f} ms{cost}, {len(timeline.steps)} steps, codes {timeline.codes}"
    )


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


def _with_parent() -> None:
    """In the child: end when the driver does, however that ends."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


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
        self.process = subprocess.Popen(command, env=self.env, stdout=self.log, stderr=self.log, start_new_session=True, preexec_fn=_with_parent)  # noqa: PLW1509

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
        args = ["--layout", case.layout, "--steps", str(case.steps), "--out", str(out), "--seed", str(case.seed), *case.options, *(["--fault", case.fault] if case.fault else [])]
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

LAYOUTS = ("ddp", "fsdp", "tp_fsdp", "pp", "pp_dp")
SLOW = ("compute-slow",)


def cases(seed: int, *, quick: bool) -> list[Case]:
    """The labelled set, healthy jobs among them, all sizes. Ranks, steps and seeds (from `seed` on) differ from case to case, by its place in the list."""
    chosen = [*_standing(quick=quick), *_slow(quick=quick), *_quiet(quick=quick), *_many(quick=quick)]
    return [replace(case, seed=seed + i) for i, case in enumerate(chosen)]


def _standing(*, quick: bool) -> Iterator[Case]:
    """Jobs that do not go on by themselves."""
    plan = (
        ("sigstop", ("ddp", "fsdp", "pp"), ("ddp",), ("stopped",), "", ""),
        ("stuck", LAYOUTS, ("fsdp",), ("hang",), "", "before an operation"),
        ("stuck", ("pp", "fsdp"), ("pp",), ("hang",), ",place=forward", "in forward"),
        ("sigkill", ("ddp", "tp_fsdp", "pp_dp"), ("ddp",), ("crash",), "", ""),
        ("skip", ("ddp", "tp_fsdp", "fsdp", "pp"), ("tp_fsdp",), ("desync", "deadlock"), "", ""),
        ("desync", ("ddp",), ("ddp",), ("desync",), ",what=op", "operation"),
        ("desync", ("ddp",), (), ("desync",), ",what=size", "size"),
        ("desync", ("fsdp",), (), ("desync",), ",what=dtype", "dtype"),
        ("deadlock", ("ddp", "pp"), (), ("deadlock", "desync"), "", ""),
    )
    for i, (kind, full, few, kinds, more, severity) in enumerate(plan):
        for j, layout in enumerate(few if quick else full):
            rank = (i + j) % 4
            yield Case(
                name=f"{kind}-{layout}-{i}", kind=kind, severity=severity, layout=layout, fault=f"{kind}:rank={rank},step={25 + 3 * rank}{more}", rank=rank, kinds=kinds,
                stands=True, steps=120, group="crash" if kind == "sigkill" else "hang",
            )  # fmt: skip


def _slow(*, quick: bool) -> Iterator[Case]:
    """Jobs that go on, slower. Onsets come late enough for a baseline."""
    for i, layout in enumerate(("ddp", "fsdp") if quick else LAYOUTS):
        for j, (percent, place) in enumerate(((10, "all"), (20, "backward"), (50, "forward"))):
            if percent == 20 if quick else percent == 10 or (i + j) % 2:  # ten percent everywhere, the others in turn
                yield _costs("slow", layout, i + j, SLOW, f",percent={percent},place={place}", severity=f"{percent}%", group="slow")
    for i, layout in enumerate(() if quick else LAYOUTS):
        yield _costs("slow", layout, i + 3, SLOW, ",percent=5", severity="5%", limit_steps=100, group="mild")
    if not quick:
        yield _costs("input", "ddp", 1, ("input-stall",), ",percent=40", severity="40%", group="slow")
        yield _costs("input", "tp_fsdp", 2, ("input-stall",), ",percent=40", severity="40%", group="slow")
        yield _costs("gc", "ddp", 2, ("gc-pause",), ",ms=400", group="slow")
        yield _costs("contend", "ddp", 2, ("cpu-contention",), ",ms=3", options=("--spin", "0.2", "--step-ms", "120"), group="slow")
        yield _costs("drift", "ddp", 1, ("drift", "compute-slow"), ",percent=1", severity="1% a step", limit_steps=100)
        # Saves of 2.5 s are known by then; beside saves of milliseconds a long one is no fault for two minutes.
        saves = ("--save-ms", "2500", "--save-every", "20")
        yield _costs("save", "ddp", 1, ("checkpoint-stall",), ",ms=30000", severity="30 s", options=saves, limit_steps=10)
        yield _costs("nan", "pp", 3, ("nan",), "", options=("--report-loss",))
    yield _costs("nan", "ddp", 2, ("nan",), "", options=("--report-loss",))


def _costs(
    kind: str, layout: str, i: int, kinds: tuple[str, ...], more: str, *, severity: str = "", options: tuple[str, ...] = (), limit_steps: int = 40, group: str = "other"
) -> Case:  # fmt: skip
    rank, step = i % 4, 40 + 3 * (i % 4)
    if kind == "save":
        step = 60
    return Case(
        name=f"{kind}-{layout}-{severity}".replace(" ", "-").strip("-"), kind=kind, severity=severity, layout=layout, fault=f"{kind}:rank={rank},step={step}{more}",
        rank=rank, kinds=kinds, also=("compute-slow", "drift") if group in {"slow", "mild"} else (), steps=step + limit_steps + 10, limit_steps=limit_steps,
        options=options, group=group,
    )  # fmt: skip


def _quiet(*, quick: bool) -> Iterator[Case]:
    """Healthy jobs, and one-step spikes."""
    for layout in ("fsdp",) if quick else LAYOUTS:
        yield Case(name=f"healthy-{layout}", kind="healthy", layout=layout, steps=100 if quick else 130, options=("--uneven", "2"))
    yield Case(name="spike-ddp", kind="spike", layout="ddp", fault="spike:rank=1,step=40", steps=80)
    if not quick:
        yield Case(name="spike-pp", kind="spike", layout="pp", fault="spike:rank=2,step=40", steps=80)
        yield Case(name="healthy-session", kind="healthy", severity="with a session", layout="fsdp", steps=100, options=("--session",))
        yield Case(name="healthy-accumulate", kind="healthy", severity="accumulating", layout="ddp", steps=100, options=("--accumulate", "2"))


def _many(*, quick: bool) -> list[Case]:
    """Of eight ranks, which two cores bear with longer steps."""
    options = ("--step-ms", "250")
    stopped = Case(name="sigstop-8", kind="sigstop", layout="fsdp", world=8, fault="sigstop:rank=5,step=20", rank=5, kinds=("stopped",), stands=True, group="hang", options=options)
    slow = Case(
        name="slow-8", kind="slow", severity="20%", layout="ddp", world=8, fault="slow:rank=6,step=30,percent=20", rank=6, kinds=SLOW, also=("drift",), steps=80,
        limit_steps=40, group="slow", options=options,
    )  # fmt: skip
    stuck = Case(name="stuck-8", kind="stuck", severity="in forward", layout="pp_dp", world=8, fault="stuck:rank=3,step=15,place=forward", rank=3, kinds=("hang",), stands=True, group="hang", options=options)  # fmt: skip
    return [] if quick else [stopped, slow, stuck]


# --- the benchmark ----------------------------------------------------------------------------------------------------------


def run(bench: Bench, seeds: range, only: str = "", record: str = "") -> None:
    """`scripts/bench watch --real`. `seeds`: all cases with each, but for slow links. `only`: a part of the names of the cases that are wanted; slow links have none. `record`:
    where their daemons record them."""
    from benchmarks import watch_links

    rows = []
    for seed in seeds:
        chosen = [c for c in cases(seed, quick=bench.quick) if only in c.name]
        rows += _all(bench.directory / str(seed), chosen, Path(record) / str(seed) if record else None)
    if only:
        bench.notes.append(f"slow links were left out: --only {only}")
    elif bench.quick or (why := watch_links.missing()):
        bench.notes.append(f"slow links were left out: {'quick' if bench.quick else why}")
    else:
        for row, timeline in watch_links.run(bench.directory / "links"):
            rows.append(row)
            print(line(row, timeline), file=sys.stderr, flush=True)
    bench.tables.append(watch_score.table([r for r in rows if not r.case.quiet], "real jobs with a fault"))
    bench.tables.append(watch_score.table([r for r in rows if r.case.quiet], "real jobs without one that is to be named"))
    if missed := watch_score.misses(rows):
        bench.notes.append("real cases that did not go as they should:\n" + "\n".join(missed))
    bench.aims += [*watch_score.aims(rows), Aim("false verdicts in real jobs without a fault", float(sum(r.false_reports for r in rows if r.case.quiet)), "<=", 0.0)]
    if crashes := [r.seconds if r.named else float("inf") for r in rows if r.case.group == "crash"]:
        bench.aims.append(Aim("crash: noticed on its node (median)", harness.median(crashes), "<=", 0.1, " s"))
    bench.raw["real"] = watch_score.facts(rows)


def _all(directory: Path, chosen: list[Case], record: Path | None = None) -> list[watch_score.Row]:
    rows = []
    for world in sorted({c.world for c in chosen}):
        place = directory / f"w{world}"
        options = ()
        if record is not None:
            (record / f"w{world}").mkdir(parents=True, exist_ok=True)
            options = ("--record", str(record / f"w{world}"))
        with harness.daemon(place / "d", *options), Ranks(place / "r", world, place / "d") as ranks:
            for case in (c for c in chosen if c.world == world):
                timeline = ranks.run(case)
                rows.append(score(case, timeline))
                if record is not None:
                    label = {"job": f"{case.name}-{ranks.number - 1}", "seed": case.seed, "fault": case.fault, "rank": case.rank, "kinds": case.kinds, "said": line(rows[-1], timeline)}
                    with (record / f"w{world}" / "labels.jsonl").open("a") as f:
                        f.write(json.dumps(label) + "\n")
                print(line(rows[-1], timeline), file=sys.stderr, flush=True)
    return rows


def main() -> None:
    """Some cases by hand: python -m benchmarks.watch_real DIR NAME...; NAME is a part of a case's name."""
    directory, words = Path(sys.argv[1]), sys.argv[2:]
    _all(directory, [c for c in cases(7, quick=False) if not words or any(w in c.name for w in words)])


if __name__ == "__main__":
    main()
