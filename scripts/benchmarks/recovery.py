"""From the SIGKILL of a rank to the next finished step, phase by phase: ckptd run with standbys, without, and plain torchrun.

Phases end when the last of the four ranks has passed them. torchrun (with TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1, else it restarts into stale
addresses) trains without ckptd: it begins again with step 1, so everything since the start is lost; its agent leaves no marks, so what comes
before the script is one phase.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

import psutil

from benchmarks.harness import ROOT, Aim, Bench, Table, median
from tests.train.harness import SCRIPT, Job, stop_daemon

RANKS = 4
STEPS = 100_000
"""More than a run reaches: it is ended when its rounds are over."""
PHASES = ("detect", "stop others", "rendezvous", "start", "imports", "group", "build", "attach", "restore", "first step")
READY_S = 90.0
"""How long standbys may take to import: they do it at the lowest priority, beside training."""


class TorchrunJob(Job):
    """The same script under torchrun, without ckptd."""

    def __init__(self, tmp: Path, name: str, script: list[str]) -> None:
        super().__init__(tmp, "fsdp", ranks=RANKS, steps=STEPS, name=name, env={"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"})
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(RANKS), "--max-restarts", "100"]
        self.command = [*torchrun, *self.command[self.command.index(str(SCRIPT)) :], *script, "--without-ckptd"]

    def pids(self) -> dict[int, int]:
        """Of the newest generation: its ranks mark themselves."""
        return {m["rank"]: m["pid"] for m in self.marks("group ready")[-RANKS:]}


def standbys_ready(job: Job, wanted: int) -> bool:
    """Whether all standbys have done their imports: they sleep on their standard input."""
    waiting = []
    for child in psutil.Process(job.process.pid).children():
        try:
            if "ckptd.standby" in child.cmdline() and child.pid not in set(job.pids().values()):
                waiting.append(child.status() == psutil.STATUS_SLEEPING and Path(f"/proc/{child.pid}/wchan").read_text() in WAITS)
        except (psutil.NoSuchProcess, OSError):
            continue
    return sum(waiting) >= wanted


WAITS = {"pipe_read", "anon_pipe_read", "0", ""}
"""Where the kernel says that a reader of a pipe sleeps; old and new name, and what it says where it tells nobody."""


def once(job: Job, victim: int, standbys: int) -> dict[str, float]:
    """Kill a rank of a running job; the phases in seconds. Waits until the job is settled before and until it trains again after."""
    job.await_step(job.step() + 4)
    until_s = time.monotonic() + READY_S
    while standbys and not (standbys_ready(job, standbys) and _still(job, standbys)):
        if time.monotonic() > until_s:
            msg = f"standbys were not ready in {READY_S:.0f} s"
            raise TimeoutError(msg)
        time.sleep(0.2)
    old = set(job.pids().values())
    killed = job.kill(victim)
    until_s = time.monotonic() + 120
    while True:
        marks = [m for m in job.marks() if m["t"] > killed and m["pid"] not in old]
        steps = [m for m in marks if m["what"] == "step"]
        if len({m["pid"] for m in steps}) == RANKS:
            break
        if time.monotonic() > until_s or not job.running():
            msg = f"it did not come back:\n{job.tail()}"
            raise TimeoutError(msg)
        time.sleep(0.02)
    reached = {m["pid"]: m["step"] for m in job.marks("step") if m["pid"] in old}
    return phases(killed, marks) | {"lost": min(reached.values()) + 1 - min(m["step"] for m in steps)}


def _still(job: Job, standbys: int) -> bool:
    time.sleep(0.5)
    return standbys_ready(job, standbys)


def phases(killed: float, marks: list[dict[str, Any]]) -> dict[str, float]:
    """Seconds per phase; a phase without marks is part of the next one."""
    seen = [m for m in marks if m["what"] == "failure seen"]
    marks = [*marks, *({"t": m["seen_t"], "what": "failure noticed"} for m in seen)]
    ends = {"detect": "failure noticed", "stop others": "workers stopped", "rendezvous": "workers starting", "start": "workers started"}
    ends |= {"imports": "script begins", "group": "group ready", "build": "model built", "attach": "attached", "restore": "restored"}
    found, began = {}, killed
    for phase, what in ends.items():
        times = [m["t"] for m in marks if m["what"] == what]
        if times:
            end = max(times[:RANKS])
            found[phase], began = end - began, end
    first = {}
    for m in marks:
        if m["what"] == "step":
            first.setdefault(m["pid"], m["t"])
    found["first step"] = max(first.values()) - began
    return found | {"total": max(first.values()) - killed}


def run(bench: Bench) -> None:
    """Three jobs one after the other, each killed a few times: two at once would take each other's cores."""
    rounds = bench.rounds or bench.pick(3, 1)
    script = ["--pause-s", "0.05"]
    jobs = {
        "ckptd run": (Job(bench.directory, "fsdp", ranks=RANKS, steps=STEPS, name="standbys", script=script), RANKS),
        "ckptd run --standby 0": (Job(bench.directory, "fsdp", ranks=RANKS, steps=STEPS, name="none", run=["--standby", "0"], script=script), 0),
        "torchrun": (TorchrunJob(bench.directory, "torchrun", script), 0),
    }
    found: dict[str, list[dict[str, float]]] = {}
    for name, (job, standbys) in jobs.items():
        job.env["PYTHONPATH"] = os.pathsep.join([str(ROOT), job.env.get("PYTHONPATH", "")])
        job.start()
        try:
            found[name] = [once(job, turn % RANKS, standbys) for turn in range(rounds)]
        finally:
            job.end()
            stop_daemon(bench.directory / "d")
    rows = []
    for phase in (*PHASES, "total", "lost"):
        values = [[r[phase] for r in found[name] if phase in r] for name in found]
        label = {"total": "kill to next step", "lost": "steps lost"}.get(phase, phase)
        rows.append([label, *(None if not v else median(v) if phase == "lost" else round(median(v), 3) for v in values)])
    bench.tables.append(Table(f"seconds from SIGKILL of 1 of {RANKS} ranks, median of {rounds}", ["phase", *found], rows))
    bench.raw["rounds"] = found
    ours, bare, theirs = ([r["total"] for r in found[name]] for name in found)
    bench.notes.append("Totals by round: " + "; ".join(f"{name} " + ", ".join(f"{r['total']:.2f}" for r in found[name]) for name in found))
    own = median([r["attach"] + r["restore"] for r in found["ckptd run"]])
    slack = bench.pick(1.0, 1.5)
    bench.aims += [
        Aim("with standbys: kill to next step, against torchrun's, which begins from scratch", median(ours) / median(theirs), "<=", 0.7 * slack, "x"),
        Aim("without standbys, the same", median(bare) / median(theirs), "<=", 1.2 * slack, "x"),
        Aim("with standbys: attach and restore of that", own, "<=", 0.5 * slack, " s"),
        Aim("steps lost, worst round", max(r["lost"] for name in list(found)[:2] for r in found[name]), "<=", 1),
    ]
