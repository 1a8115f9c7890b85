"""Watching: who is slow, who hangs, and why; labelled faults on simulated and on real jobs.

- simulated jobs (`--sim`): up to 4,096 ranks; kinds x severities x layouts x seeds through the engine that the daemon runs, in simulated time; hours without a fault
  (`--hours`) count false alarms. Seeds that thresholds were tuned with are 1 to 2999; scored are 3000 and up (`--seeds FIRST:COUNT`).
- real jobs (`--real`) under torchrun, a seed for each, from FIRST on; what watching costs ranks and daemon (`--overhead`: also `scripts/bench tap`, `scripts/bench watcher`).

Without a choice: simulated jobs, and real ones unless `--quick`.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from benchmarks import simhangs, tap, watch_real, watcher
from benchmarks.harness import Aim, Bench, Table
from benchmarks.simjobs import LAYOUTS, Fault, Layout, Noise, Sim
from benchmarks.watch_score import Case, Row, Told, aims, facts, misses, score, table
from ckptd.monitor import record
from ckptd.monitor.engine import Ask, Concluded, Engine, Settings
from ckptd.monitor.report import Pulse, Report

FIRST_SEED = 3000
SETTINGS = Settings(policy="evict")
"""Policy changes nothing of what is seen; the one that may do most shows what would be done."""
BUSY_NOISE = Noise(
    jitter=0.03, hiccups=0.02, gc_every=40, neighbours=0.01, save_every=50, eval_every=90, log_every=10, spikes=1 / 200, uneven=0.03, wander=0.008, clock_steps=0.01,
)  # fmt: skip
QUIETS: dict[str, tuple[str, Noise]] = {
    "as usual": ("fsdp64", Noise()),
    "busy": ("tp4dp16", BUSY_NOISE),
    "saves and evaluations": ("hsdp32", Noise(save_every=20, eval_every=35, gc_every=25)),
    "unmarked evaluations": ("ddp8", Noise(eval_every=60, eval_marked=False, save_every=45)),
    "variable lengths": ("fsdp64", Noise(lengths=0.3, lengths_own=0.08)),
    "uneven batches": ("tp4dp16", Noise(uneven=0.08, lengths_own=0.05)),
    "uneven last stage": ("pp4dp4", Noise(uneven_stage=0.25, gc_every=30)),
    "neighbours on all": ("ddp64", Noise(neighbours=0.06, os_pause=0.006)),
    "staggered collection": ("fsdp16", Noise(gc_every=16, gc_part=0.8)),
    "rank 0 logs": ("ddp8", Noise(log_every=5, log_part=0.4)),
    "losses": ("fsdp16", Noise(lost_reports=0.05, lost_records=0.02)),
    "on a device": ("tp4dp16", Noise(device=True, save_every=40)),
    "pipeline": ("tp4pp4dp4", Noise(gc_every=50, save_every=60)),
}


@dataclass(frozen=True)
class Job:
    """A simulated case: what is run, and its label."""

    case: Case
    sim: Callable[[], Sim]
    steps: int


def options(arguments: list[str]) -> argparse.Namespace:
    """Of this benchmark."""
    p = argparse.ArgumentParser(prog="scripts/bench watch")
    p.add_argument("--sim", action="store_true", help="simulated jobs")
    p.add_argument("--real", action="store_true", help="real jobs under torchrun")
    p.add_argument("--overhead", action="store_true", help="what watching costs")
    p.add_argument("--seeds", default="", metavar="FIRST:COUNT", help=f"seeds of the cases (default {FIRST_SEED}:1)")
    p.add_argument("--hours", type=float, help="simulated hours without a fault, over all layouts, per 64 ranks (default 24)")
    p.add_argument("--only", default="", metavar="WORD", help="only cases whose kind, group or layout (real jobs: whose name, as slow-ddp-10) contains it")
    p.add_argument("--record", default="", metavar="DIR", help="real jobs: record there what verdicts are made of, for `ckptd analyze`, and what was done to whom (labels.jsonl)")
    return p.parse_args(arguments)


def run(bench: Bench) -> None:
    """What was chosen."""
    a = getattr(bench, "options", None) or options([])
    chosen = a.sim or a.real or a.overhead
    first, _, count = a.seeds.partition(":")
    seeds = range(int(first or FIRST_SEED), int(first or FIRST_SEED) + int(count or 1))
    if a.sim or not chosen:
        simulated(bench, a, seeds)
    if a.real or (not chosen and not bench.quick):
        watch_real.run(bench, seeds, a.only, a.record)
    if a.overhead:
        tap.overhead(bench)
        watcher.run(bench)


def simulated(bench: Bench, a: argparse.Namespace, seeds: range) -> None:
    """All simulated cases."""
    bench.notes.append(f"scored seeds {seeds.start} to {seeds.stop - 1}; thresholds were tuned with seeds 1 to 2999")
    hours = a.hours if a.hours is not None else bench.pick(24.0, 0.5)
    rows: list[Row] = []
    cost = {"engine_s": 0.0, "rank_steps": 0.0}
    began_s = time.monotonic()
    SCALE.clear()
    jobs = itertools.chain(slow_jobs(seeds, quick=bench.quick), big_jobs(seeds, quick=bench.quick), quiet_jobs(seeds, hours))
    rows += [play(job, cost) for job in jobs if a.only in f"{job.case.kind} {job.case.group} {job.case.layout}{' quiet' * job.case.quiet}"]
    stills = hang_cases(seeds, quick=bench.quick)
    rows += [hang(kind, LAYOUTS[layout], seed) for kind, layout, seed in stills if a.only in f"{kind} hang crash {layout}"]
    rows += [pause(name, seeds.start) for name in PAUSES if a.only in f"pause {name}"]
    bench.tables.append(table([r for r in rows if not r.case.quiet], "simulated jobs with a fault"))
    bench.tables.append(table([r for r in rows if r.case.quiet], "simulated jobs without one"))
    if cost["rank_steps"]:
        each = 1e6 * cost["engine_s"] / cost["rank_steps"]
        bench.notes.append(f"engine: {each:.1f} us per rank and step, {cost['rank_steps']:.3g} of them; {time.monotonic() - began_s:.0f} s in all")
        bench.raw["engine_us_per_rank_step"] = each
    big = [r for r in rows if r.case.group == "scale"]
    if big:
        bench.tables.append(scale_table())
        if "tp8dp512" in SCALE:
            bench.aims.append(Aim("4,096 ranks: a step of 1 s is watched in", SCALE["tp8dp512"], "<=", 0.5, " s"))
    missed = misses(rows)
    if missed:
        bench.notes.append("cases that did not go as they should:\n" + "\n".join(missed[:60]))
    bench.aims += aims(rows)
    bench.raw["rows"] = facts(rows)


SCALE: dict[str, float] = {}
"""Layout -> seconds that the engine takes of one step."""


def scale_table() -> Table:
    """What watching a step costs, by size."""
    rows = [[name, LAYOUTS[name].world, 1e3 * s, 1e6 * s / LAYOUTS[name].world] for name, s in SCALE.items()]
    return Table("the engine, one step", ["layout", "ranks", "ms", "us per rank"], rows)


# --- slow jobs --------------------------------------------------------------------------------------------------------------

SLOW = (
    ("compute-slow", ("compute-slow", "drift"), ("compute-slow",)),
    ("input-stall", ("input-stall", "compute-slow"), ("input-stall",)),
    ("gc-storm", ("gc-pause", "compute-slow"), ("gc-pause",)),
    ("cpu-contention", ("cpu-contention", "compute-slow"), ("cpu-contention",)),
)
SMALL = ("ddp4", "ddp8", "fsdp16", "hsdp32", "tp2dp4", "tp4dp16", "pp4dp2", "pp4dp4", "tp2pp2dp2", "tp4pp4dp4")
OVER_NODES = ("ddp8", "fsdp16", "fsdp64", "hsdp32", "tp2dp4", "tp4dp16")


def slow_jobs(seeds: range, *, quick: bool) -> Iterator[Job]:
    """Slow ranks and slow transfers, of all kinds."""
    layouts = ("ddp8", "tp4dp16", "pp4dp4") if quick else SMALL
    for seed in seeds:
        for i, layout in enumerate(layouts):
            kinds = SLOW if not quick else SLOW[i % 2 :: 2]
            for (kind, kinds_ok, causes), severity in itertools.product(kinds, (0.1, 0.2, 0.5)):
                yield slow(kind, kinds_ok, causes, severity, layout, seed, "slow")
            for severity in (0.03, 0.05, 0.08)[:: 2 if quick else 1]:
                yield slow("compute-slow", ("compute-slow", "drift"), ("compute-slow",), severity, layout, seed, "mild")
        yield from _transfers(seed, OVER_NODES[:2] if quick else OVER_NODES)
        yield from _others(seed, ("ddp8", "tp4dp16") if quick else ("ddp8", "fsdp16", "tp4dp16", "pp4dp4", "tp4pp4dp4"))


def _draw(layout: str, kind: str, seed: int) -> tuple[Layout, np.random.Generator, int, float]:
    lay = LAYOUTS[layout]
    rng = np.random.default_rng([seed, *layout.encode(), *kind.encode()])
    return lay, rng, int(rng.integers(40, 120)), float(rng.choice([0.2, 0.5, 1.0, 2.0]))


def slow(kind: str, kinds: tuple[str, ...], causes: tuple[str, ...], severity: float, layout: str, seed: int, group: str) -> Job:
    """One slow rank."""
    lay, rng, onset, step_s = _draw(layout, f"{kind}{severity}", seed)
    rank = int(rng.integers(0, lay.world))
    noise = Noise(gc_every=int(rng.choice([0, 40])), save_every=int(rng.choice([0, 35])), device=bool(rng.random() < 0.2 and kind == "compute-slow"))
    case = Case(
        kind=kind, severity=f"{severity:.0%}", layout=layout, seed=seed, ranks=(rank,), kinds=kinds, causes=causes, group=group, onset_step=onset, step_s=step_s,
    )  # fmt: skip
    fault = Fault(kind, (rank,), severity, onset)
    sim = partial(Sim, lay, step_s, int(rng.integers(1 << 31)), noise, (fault,))
    return Job(case, sim, onset + (60 if group == "slow" else 110))


def _transfers(seed: int, layouts: tuple[str, ...]) -> Iterator[Job]:
    for layout, kind, rate in itertools.product(layouts, ("send-slow", "receive-slow", "link-slow"), (0.5, 0.2)):
        lay, rng, onset, step_s = _draw(layout, f"{kind}{rate}", seed)
        step_s = max(step_s, 0.5)
        node = int(rng.integers(0, lay.nodes))
        peer = (node + 1) % lay.nodes if kind == "link-slow" else -1
        ranks = tuple(range(node * lay.per_node, (node + 1) * lay.per_node))
        case = Case(
            kind=kind, severity=f"rate x {rate:g}", layout=layout, seed=seed, ranks=ranks, kinds=(kind,), group="comm", onset_step=onset, step_s=step_s, peer=peer,
        )  # fmt: skip
        fault = Fault(kind, (), rate, onset, node=node, peer=peer)
        yield Job(case, partial(Sim, lay, step_s, int(rng.integers(1 << 31)), Noise(), (fault,)), onset + int(40 + 20 / step_s))


def _others(seed: int, layouts: tuple[str, ...]) -> Iterator[Job]:
    """What is neither slow nor hangs all the time, each in every layout."""
    for layout in layouts:
        lay, rng, at, step_s = _draw(layout, "others", seed)
        a, b = (int(r) for r in rng.choice(lay.world, 2, replace=False))
        slower = ("compute-slow", "drift")
        either = (*slower, "input-stall")
        # kind, severity, culprits, kinds that name it, causes, step, steps after the onset, faults
        cases: tuple[tuple[str, str, tuple[int, ...], tuple[str, ...], tuple[str, ...], float, int, tuple[Fault, ...]], ...] = (
            ("drift", "+10 %/min", (a,), slower, ("drift",), 1.0, 150, (Fault("drift", (a,), 0.10, at),)),
            ("intermittent", "5 s of 25 s", (a,), slower, slower, step_s, int(120 / step_s), (Fault("intermittent", (a,), 0.5, at, every=(5, 20)),)),
            ("heals", "20 %", (a,), slower, slower, step_s, 140, (Fault("heals", (a,), 0.2, at, end=at + 60),)),
            ("two at once", "20 %", (a, b), either, either, step_s, 60, (Fault("compute-slow", (a,), 0.2, at), Fault("input-stall", (b,), 0.25, at + 5))),
            ("nan", "", (a,), ("nan",), (), step_s, 10, (Fault("nan", (a,), 0, at),)),
            ("skipped", "", (a,), ("desync",), (), step_s, 10, (Fault("skip", (a,), 0, at),)),
            ("one-off", "10 steps", (), (), (), step_s, 60, (Fault("one-off", (a,), 10.0, at),)),
        )
        for kind, severity, ranks, kinds, causes, each_s, after, faults in cases:
            case = Case(
                kind=kind, severity=severity, layout=layout, seed=seed, ranks=ranks, kinds=kinds, causes=causes, group="other" if kinds else "quiet", onset_step=at,
                step_s=each_s,
            )  # fmt: skip
            number = int(rng.integers(1 << 31))
            yield Job(case, partial(Sim, lay, each_s, number, Noise(), faults), at + after)


def big_jobs(seeds: range, *, quick: bool) -> Iterator[Job]:
    """Many ranks: what it costs, and whether one is found among them."""
    for layout in ("hsdp512",) if quick else ("hsdp512", "tp8pp8dp16", "tp8dp512"):
        lay, rng, _, _ = _draw(layout, "scale", seeds.start)
        rank = int(rng.integers(0, lay.world))
        case = Case(kind="compute-slow", severity="20%", layout=layout, seed=seeds.start, ranks=(rank,), kinds=("compute-slow",), group="scale", onset_step=40)
        fault = Fault("compute-slow", (rank,), 0.2, 40)
        yield Job(case, partial(Sim, lay, 1.0, int(rng.integers(1 << 31)), Noise(), (fault,)), 62)


def quiet_jobs(seeds: range, hours: float) -> Iterator[Job]:
    """Nothing is wrong, for hours."""
    total = sum(LAYOUTS[layout].world / 64 for layout, _ in QUIETS.values())
    for i, (name, (layout, noise)) in enumerate(QUIETS.items()):
        lay = LAYOUTS[layout]
        step_s = (1.0, 4.0, 8.0)[i % 3]
        each_h = hours / total
        case = Case(kind=name, layout=layout, seed=seeds.start, group="quiet", step_s=step_s, hours=each_h, world=lay.world)
        yield Job(case, partial(Sim, lay, step_s, seeds.start * 1000 + i, noise), max(60, int(each_h * 3600 / step_s)))


def play(job: Job, cost: dict[str, float] | None = None) -> Row:
    """Run a simulated job through an engine."""
    sim = job.sim()
    engine = Engine("job", 1, sim.layout.world, sim.layout.nodes, SETTINGS)
    told: list[Told] = []
    took_s = 0.0
    onset_s = 0.0
    for t, step, reports in sim.run(job.steps):
        if not onset_s and step >= job.case.onset_step:
            onset_s = t
        began_s = time.perf_counter()
        out = [x for r in reports for x in engine.receive(r, t, t)] + engine.tick(t, t)
        took_s += time.perf_counter() - began_s
        for x in out:
            if isinstance(x, Ask):
                sim.ask(x)
            elif isinstance(x, Concluded):
                told.append(Told(t, sim.step, x.verdict))
    if cost is not None:
        cost["engine_s"] += took_s
        cost["rank_steps"] += job.steps * sim.layout.world
    if job.case.group == "scale":
        SCALE[job.case.layout] = took_s / job.steps
    return score(replace(job.case, onset_s=onset_s if not job.case.quiet else 0.0), told)


# --- hangs ------------------------------------------------------------------------------------------------------------------

HANGS = {
    "sigkill": ("crash",), "sigstop": ("stopped",), "stop-inside": ("stopped",), "sleep": ("hang",), "io": ("io-blocked",), "loader": ("input-stall",),
    "wrong-op": ("desync",), "wrong-size": ("desync",), "skipped": ("desync",), "deadlock": ("deadlock",), "deadlock-tie": ("deadlock",), "two-stopped": ("stopped",),
}  # fmt: skip
TELL_S = 0.25


def hang_cases(seeds: range, *, quick: bool) -> Iterator[tuple[str, str, int]]:
    """(kind, layout, seed)."""
    layouts = ("ddp8", "tp2dp4", "pp4dp2") if quick else ("ddp4", "ddp8", "fsdp16", "hsdp32", "tp2dp4", "tp4dp16", "pp4dp2", "pp4dp4", "tp2pp2dp2", "tp4pp4dp4", "hsdp512")
    for seed, layout, kind in itertools.product(seeds, layouts, HANGS):
        if kind == "skipped" and LAYOUTS[layout].pp > 1:  # one collective in a step: the job goes on, one off
            continue
        yield kind, layout, seed


def hang(kind: str, lay: Layout, seed: int) -> Row:
    """One standstill, after 40 steps of the same job."""
    rng = np.random.default_rng([seed, *lay.name.encode(), *kind.encode()])
    step_s = float(rng.choice([0.1, 0.5, 1.0, 2.0]))
    engine = Engine("job", 1, lay.world, lay.nodes, SETTINGS)
    sim = Sim(lay, step_s, int(rng.integers(1 << 31)), Noise(compile_steps=1))
    t = 0.0
    for t, _, reports in sim.run(40):
        for r in reports:
            engine.receive(r, t, t)
        engine.tick(t, t)
    still = simhangs.stall(lay, kind if kind != "sigkill" else "sleep", seed)
    kinds = HANGS[kind]
    case = Case(
        kind=kind, layout=lay.name, seed=seed, ranks=still.ranks, kinds=(*kinds, "hang"), causes=kinds, group="crash" if kind == "sigkill" else "hang", onset_step=40,
        onset_s=t, step_s=step_s, tolerated=(),
    )  # fmt: skip
    told: list[Told] = []
    infos = simhangs.infos(still)
    offsets = rng.uniform(0, TELL_S, lay.nodes)
    for i in range(int((max(3.0, 6 * step_s) + 1.5) / TELL_S)):
        for node in range(lay.nodes):
            at = i * TELL_S + float(offsets[node])
            pulses = _killed(still, node, at) if kind == "sigkill" else still.pulses(at, node, at)
            if kind != "sigkill" and at < 1.0:
                pulses = []
            out = engine.receive(Report(node, 1000 + i, ranks=infos[node] if not i else [], pulses=pulses), t + at, t + at)
            told += [Told(t + at, 40, x.verdict) for x in out if isinstance(x, Concluded)]
        out = engine.tick(t + (i + 1) * TELL_S, t + (i + 1) * TELL_S)
        told += [Told(t + (i + 1) * TELL_S, 40, x.verdict) for x in out if isinstance(x, Concluded)]
    return score(case, told)


def _killed(still: simhangs.Stall, node: int, at: float) -> list[Pulse]:
    """The killed rank is told at once; its peers die of it within 1.5 to 2.2 s."""
    lay = still.layout
    out = []
    for r in range(node * lay.per_node, min((node + 1) * lay.per_node, lay.world)):
        dead = r in still.ranks or at > 1.5 + 0.7 * ((r * 37) % 100) / 100
        out.append(Pulse(r, int(1e3 * at), 40, 1000, "dead" if dead else "S", signal=9 if r in still.ranks else 0))
    return out


# --- pauses that are no hangs -----------------------------------------------------------------------------------------------

PAUSES = {
    "first checkpoint, 40 s": ("saving-all", 40.0),
    "evaluation by rank 0, marked, 60 s": ("eval-one", 60.0),
    "rank 0 at unmarked work, 7 s": ("busy-one", 7.0),
    "a step of 1.8 s": ("sleep-one", 1.8),
    "in a debugger": ("debugger", 60.0),
    "the end of the job": ("closing", 60.0),
    "a node is silent": ("silent", 20.0),
}


def pause(name: str, seed: int) -> Row:
    """A standstill that is none."""
    how, seconds = PAUSES[name]
    lay = LAYOUTS["fsdp16"]
    engine = Engine("job", 1, lay.world, lay.nodes, SETTINGS)
    sim = Sim(lay, 0.2, seed, Noise(compile_steps=1))
    t = 0.0
    for t, _, reports in sim.run(60):
        for r in reports:
            engine.receive(r, t, t)
        engine.tick(t, t)
    kind = {"saving-all": "saving", "eval-one": "saving", "busy-one": "busy"}.get(how, "sleep")
    still = simhangs.stall(lay, kind, seed)
    infos = simhangs.infos(still)
    told: list[Told] = []
    for i in range(int(seconds / TELL_S)):
        at = i * TELL_S
        for node in range(lay.nodes):
            pulses = [_paused(how, p, at) for p in still.pulses(at, node, at)]
            if how == "silent" and node == still.ranks[0] // lay.per_node:
                continue
            out = engine.receive(Report(node, 1000 + i, ranks=infos[node] if not i else [], pulses=pulses), t + at, t + at)
            told += [Told(t + at, 60, x.verdict) for x in out if isinstance(x, Concluded)]
        told += [Told(t + at, 60, x.verdict) for x in engine.tick(t + at, t + at) if isinstance(x, Concluded)]
    return score(Case(kind=name, layout=lay.name, seed=seed, group="quiet"), told)


def _paused(how: str, p: Pulse, at: float) -> Pulse:
    if how == "debugger":
        return Pulse(p.rank, p.idle_ms, p.step, p.records, "t", groups=p.groups)
    if how == "closing":
        return Pulse(p.rank, p.idle_ms, p.step, p.records, "closed" if at > 0.2 * (p.rank % 5) else "S")
    if how == "eval-one" and p.phases:
        return Pulse(p.rank, p.idle_ms, p.step, p.records, "R", phases=1 << record.EVAL, groups=p.groups)
    if how == "saving-all":
        return Pulse(p.rank, p.idle_ms, p.step, p.records, p.state, phases=1 << record.CHECKPOINT, groups=p.groups)
    return p
