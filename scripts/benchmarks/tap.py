"""What watching costs the trainer: added time per collective and per step, with each layer of the tap, against the same loop without it.

- Per collective: `dist.all_reduce` of 1 KB on gloo, one rank: nothing travels, so that what is added is not lost in waiting. Blocks of calls, each case once per round, in an
  order drawn anew. The rank is bound to one processor, gloo's thread with it: what that thread does (it tells when the operation is done) is then part of a call, and waking it
  is not a message to another processor, which costs ten times as much as the tap and varies by more.
- Per step: two ranks train the GPT of train_gpt.py (FSDP2, DDP), each bound to a processor of its own, blocks of steps, in the same way; by the clock, and the processor time of all
  threads.
- A call's figure is the tenth percentile of its quietest block: what it takes when nobody else disturbs it. Of steps, which vary by a tenth from one to the next, the blocks
  of a round are compared with each other, and the middle half of the differences is taken. `+-` is the standard error (rounds drawn again, 500 times). "no tap" runs twice
  per round: the difference between both is the noise.

The tap is attached anew for each block, and taken away after it: what stays is nothing. No daemon reads meanwhile; `scripts/bench watcher` measures the daemon.
"""

from __future__ import annotations

import os
import random
import statistics
import time
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np

from benchmarks import harness
from benchmarks.harness import Aim, Bench, Table
from ckptd.monitor import record

NONE = ("no tap", "no tap, again")
EMPTY = "(a kernel in Python that does nothing)"
"""What torch itself takes to call Python for each operation: the least that the layer "python" can add."""
CALLS_WARM = 20
UNDISTURBED = 10
"""Percentile."""
Array = np.ndarray[Any, Any]

Rounds = dict[str, list[list[float]]]
"""Case -> for each round what its calls or steps took."""


def layers() -> list[str]:
    """Those that this machine has."""
    from ckptd.monitor import tap_build

    return [*(["native"] if tap_build.built() else []), "python", "patched"]


class Tapped:
    """With this layer, or without a tap."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.records = 0
        self.empty: Any = None

    def __enter__(self) -> Self:
        from ckptd.monitor import tap

        self.tap = None
        if self.name == EMPTY:
            self.empty = _empty()
        elif self.name not in NONE:
            os.environ["CKPTD_TAP"] = self.name
            self.tap = tap.attach()
            if self.tap is None or self.tap.layer != self.name:
                msg = f"the layer {self.name} could not be attached"
                raise RuntimeError(msg)
        return self

    def __exit__(self, *_exc: object) -> None:
        if self.empty is not None:
            self.empty._destroy()  # noqa: SLF001  a Library is unregistered by this, or when it is collected, which may be blocks later
        if self.tap is not None:
            ops = self.tap.ring.read(0).records
            self.records = int(((ops["flags"] & record.MARK) == 0).sum())
            self.tap.close()


def _empty() -> Any:
    import torch

    op = torch.ops.c10d.allreduce_.default
    below = torch._C._dispatch_keyset_full_after(torch._C.DispatchKey.BackendSelect)  # noqa: SLF001  the keys below one: torch has no public name for them, and a kernel that hands on must give them
    library: Any = torch.library.Library("c10d", "IMPL")
    library.impl("allreduce_", lambda keys, *args: op.redispatch(keys & below, *args), "BackendSelect", with_keyset=True)
    return library


def bind(place: int) -> None:
    """All threads of this process to one processor, each process of a job to another where there are so many."""
    cpus = sorted(os.sched_getaffinity(0))
    cpu = cpus[place % len(cpus)]
    for task in Path("/proc/self/task").iterdir():
        os.sched_setaffinity(int(task.name), {cpu})


def calls(*, names: list[str], rounds: int, count: int) -> dict[str, Any]:
    """A rank alone: microseconds per call by case and round, of the clock and of the processor."""
    import torch
    import torch.distributed as dist

    bind(0)
    found: Rounds = {name: [] for name in names}
    cpu: Rounds = {name: [] for name in names}
    x = torch.ones(256)
    now = time.perf_counter_ns
    recorded = 0
    for turn in range(rounds + 1):  # the first warms up
        for name in random.Random(turn).sample(names, len(names)):
            with Tapped(name) as case, harness.no_collector():
                took = []
                for _ in range(CALLS_WARM):
                    dist.all_reduce(x)
                begun = time.process_time_ns()
                for _ in range(count):
                    began = now()
                    dist.all_reduce(x)
                    took.append(now() - began)
                spent = time.process_time_ns() - begun
            recorded += case.records
            if turn:
                found[name].append([t / 1000 for t in took])
                cpu[name].append([spent / count / 1000])
    return {"us": found, "cpu_us": cpu, "recorded": recorded}


def steps(*, parallel: str, gpt: dict[str, Any], names: list[str], rounds: int, count: int) -> dict[str, Any]:
    """A rank of two: seconds per step, and of processor time, by case and round; collectives per step."""
    import torch
    import torch.distributed as dist
    import train_gpt

    bind(dist.get_rank())
    a = Namespace(parallel=parallel, heads=8, dropout=0.0, dtype="fp32", device="cpu", seed=7, tie=False, freeze=False, **gpt)
    torch.manual_seed(a.seed)
    model, forward_backward, dp_rank, dp_size = train_gpt.build(a)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    loader = train_gpt.Loader(a, dp_rank, dp_size)
    wall: Rounds = {name: [] for name in names}
    cpu: Rounds = {name: [] for name in names}
    per_step = 0.0

    def step() -> tuple[float, float]:
        began, cpu_began = time.perf_counter(), time.process_time()
        x, y, _ = next(loader)
        forward_backward(x, y)
        optimizer.step()
        optimizer.zero_grad()
        return time.perf_counter() - began, time.process_time() - cpu_began

    for _ in range(3):
        step()
    for turn in range(rounds + 1):
        for name in random.Random(turn).sample(names, len(names)):
            with Tapped(name) as case:
                dist.barrier()
                with harness.no_collector():
                    step()
                    took = [step() for _ in range(count)]
            if case.records:
                per_step = (case.records - 1) / (count + 1)
            if turn:
                wall[name].append([t for t, _ in took])
                cpu[name].append([t for _, t in took])
    return {"wall_s": wall, "cpu_s": cpu, "per_step": per_step}


def figure(rounds: Sequence[Sequence[float]]) -> float:
    """Of a case."""
    return min(float(np.percentile(block, UNDISTURBED)) for block in rounds)


def added(rounds: Rounds, name: str) -> float:
    """A case's figure less the reference's. Of a case without a tap: less the other one's."""
    return figure(rounds[name]) - _reference(rounds, name)


def _reference(rounds: Rounds, name: str) -> float:
    return statistics.mean(figure(rounds[n]) for n in NONE if n != name)


def error(rounds: Rounds, name: str) -> float:
    """Standard error of `added`."""
    draw, n = random.Random(7), len(rounds[name])
    found = []
    for _ in range(500):
        at = draw.choices(range(n), k=n)
        found.append(added({case: [rounds[case][i] for i in at] for case in {name, *NONE}}, name))
    return statistics.stdev(found)


def overhead(bench: Bench) -> None:
    """Measure both; adds tables and aims."""
    names = [*NONE, *layers(), EMPTY]
    rounds = bench.rounds or bench.pick(40, 12)
    (said,) = harness.ranks("benchmarks.tap:calls", {"names": names, "rounds": rounds, "count": 400}, world=1, directory=bench.directory / "calls", env={"CKPTD_TAP": "0"})
    us, cpu = said["us"], said["cpu_us"]
    base = _reference(us, "")
    rows = [[name, figure(us[name]), added(us, name), error(us, name), 100 * added(us, name) / base, figure(cpu[name]), added(cpu, name)] for name in names]
    columns = ["case", "us", "added us", "+-", "of bare %", "cpu us", "added cpu us"]
    bench.tables.append(Table(f"all_reduce of 1 KB, one rank on one processor, gloo: {said['recorded']} recorded", columns, rows))
    bench.raw["calls"] = said
    bench.notes.append(f"five million additions in Python take {harness.loop_s():.2f} s of this processor")
    for name, bound in {"native": 1.5, "python": 15.0}.items():
        if name in names:
            what = f"added per collective, {name}, with the time it is done (bare: {base:.1f} us; noise {abs(added(us, NONE[1])):.2f} us; {100 * added(us, name) / base:.1f} % of bare)"
            bench.aims.append(Aim(what, added(us, name), "<=", bench.pick(bound, 2 * bound), " us"))
    gpt = {"width": 128, "layers": 4, "context": 128, "batch": 4}
    for parallel in ("fsdp", "ddp"):
        arguments = {"parallel": parallel, "gpt": gpt, "names": [n for n in names if n not in {"patched", EMPTY}], "rounds": 3 * rounds, "count": 4}
        both = harness.ranks("benchmarks.tap:steps", arguments, world=2, directory=bench.directory / parallel, env={"CKPTD_TAP": "0"})
        _report(bench, parallel, both, arguments["names"], us)
        bench.raw[parallel] = both


def paired(ranks: Sequence[Rounds], name: str) -> tuple[float, float]:
    """(percent that a case adds to a step, its standard error): of each round the middle step of its block, of both ranks, less the same of the blocks without a tap; of
    these differences the mean of the middle half."""
    middles = {case: np.mean([np.median(r[case], axis=1) for r in ranks], axis=0) for case in {name, *NONE}}
    without = np.mean([middles[n] for n in NONE if n != name], axis=0)
    over = 100 * (middles[name] - without) / np.median(without)
    draw = np.random.default_rng(7)
    return _middle(over), float(np.std([_middle(draw.choice(over, len(over))) for _ in range(500)]))


def _middle(values: Array) -> float:
    quarter = len(values) // 4
    return float(np.sort(values)[quarter : len(values) - quarter].mean())


def _report(bench: Bench, parallel: str, both: list[dict[str, Any]], names: list[str], us: Rounds) -> None:
    wall, cpu = [b["wall_s"] for b in both], [b["cpu_s"] for b in both]
    per_step, ms = both[0]["per_step"], 1e3 * _step_s(wall, NONE[0])
    rows = [[n, 1e3 * _step_s(wall, n), *paired(wall, n), 1e3 * _step_s(cpu, n), *paired(cpu, n)] for n in names]
    title = f"a step of {parallel}, 2 ranks, a processor each, {len(wall[0][NONE[0]])} rounds: {per_step:.1f} collectives"
    bench.tables.append(Table(title, ["case", "ms", "added %", "+-", "cpu ms", "added cpu %", "+-"], rows))
    best = "native" if "native" in names else "python"
    (adds, error_cpu), (adds_wall, error_wall) = paired(cpu, best), paired(wall, best)
    what = f"added to a step of {parallel} with {per_step:.0f} collectives, {best}, processor time (+- {error_cpu:.2f}; by the clock {adds_wall:.2f} % +- {error_wall:.2f})"
    bench.aims.append(Aim(what, adds, "<=", bench.pick(1.0, 3.0), " %"))
    by_call = per_step * added(us, best) / (ms * 1e3)
    bench.aims.append(Aim(f"the same, by what a call costs: {per_step:.0f} x {added(us, best):.1f} us of {ms:.0f} ms", 100 * by_call, "<=", 1.0, " %"))


def _step_s(ranks: Sequence[Rounds], name: str) -> float:
    return float(np.median([np.median(r[name], axis=1) for r in ranks]))


def run(bench: Bench) -> None:
    overhead(bench)
