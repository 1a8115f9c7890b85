"""What watching costs the trainer: added time per collective and per step, with each layer of the tap, against the same loop without it.

- Per collective: `dist.all_reduce` of 1 KB on gloo, one rank: nothing travels, so that what is added is not lost in waiting. Blocks of calls, each case once per round, in an
  order drawn anew; the tap is attached anew for each block and taken away after it. The rank is bound to one processor, gloo's thread with it: what that thread does (it tells
  when the operation is done) is then part of a call, and waking it is not a message to another processor, which costs ten times as much as the tap and varies by more. A case's
  figure is the tenth percentile of its quietest block: what a call takes when nobody else disturbs it. "no tap" runs twice per round: the difference between both is the noise.
- Per step: two ranks train the GPT of train_gpt.py (FSDP2, DDP), each bound to a processor of its own. A machine's speed changes from second to second by more than the tap costs,
  so neighbours are compared: of four steps in a row, in an order drawn anew, two are recorded and two are not (the tap is told to be silent, and hands everything on; what that
  costs is among the calls, "native, silent"). The middle half of the differences is taken; the two silent ones against each other show the noise.

`+-` is the standard error (drawn again, 500 times). No daemon reads meanwhile; `scripts/bench watcher` measures the daemon.
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
SILENT = "native, silent"
CALLS_WARM = 20
UNDISTURBED = 10
"""Percentile."""
Array = np.ndarray[Any, Any]

Rounds = dict[str, list[list[float]]]
"""Case -> for each round what its calls took."""
GPT = {"width": 64, "layers": 4, "context": 64, "batch": 2}
"""Small: its steps take 20 (DDP) and 65 ms (FSDP2), so that a microsecond is more of them than of anybody's."""


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
            layer = self.name.removesuffix(", silent")
            os.environ["CKPTD_TAP"] = layer
            self.tap = tap.attach()
            if self.tap is None or self.tap.layer != layer:
                msg = f"the layer {layer} could not be attached"
                raise RuntimeError(msg)
            self.tap.watch(self.name == layer)
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


def steps(*, parallel: str, layer: str, quartets: int) -> dict[str, Any]:
    """A rank of two. Seconds by the clock and of the processor, quartets x (silent, silent, recorded, recorded) x 2; operations per step."""
    import torch
    import torch.distributed as dist
    import train_gpt

    bind(dist.get_rank())
    a = Namespace(parallel=parallel, heads=8, dropout=0.0, dtype="fp32", device="cpu", seed=7, tie=False, freeze=False, **GPT)
    torch.manual_seed(a.seed)
    model, forward_backward, dp_rank, dp_size = train_gpt.build(a)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    loader = train_gpt.Loader(a, dp_rank, dp_size)

    def step() -> tuple[float, float]:
        began, cpu_began = time.perf_counter(), time.process_time()
        x, y, _ = next(loader)
        forward_backward(x, y)
        optimizer.step()
        optimizer.zero_grad()
        return time.perf_counter() - began, time.process_time() - cpu_began

    took: list[list[tuple[float, float]]] = []
    with Tapped(layer) as case, harness.no_collector():
        assert case.tap is not None  # for mypy: a layer has one
        for turn in range(quartets + 2):  # the first two warm up
            four: dict[int, tuple[float, float]] = {}
            for which in random.Random(turn).sample(range(4), 4):
                dist.barrier()
                case.tap.watch(which >= 2)
                four[which] = step()
            if turn > 1:
                took.append([four[k] for k in range(4)])
        ops = case.tap.ring.read(0).records
    found = ops[((ops["flags"] & record.MARK) == 0) & (ops["op"] != record.OPS.index("barrier"))]
    numbers, count = np.unique(found["step"], return_counts=True)
    return {"took": took, "per_step": float(np.median(count[1:])) if len(numbers) > 1 else 0.0}


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
    if "native" in names:
        names.insert(names.index("native") + 1, SILENT)
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
    for parallel, per_round in (("fsdp", 25), ("ddp", 50)):
        for layer in layers()[: bench.pick(2, 1)]:
            arguments = {"parallel": parallel, "layer": layer, "quartets": per_round * rounds}
            both = harness.ranks("benchmarks.tap:steps", arguments, world=2, directory=bench.directory / parallel / layer, env={"CKPTD_TAP": "0"})
            _report(bench, parallel, layer, both)
            bench.raw[f"{parallel}, {layer}"] = both


def compared(took: Array) -> tuple[float, float, float, float]:
    """Of quartets (n x 4, seconds): (what recording adds, its standard error; the same of the silent ones against each other), in percent of a silent step."""
    silent = float(np.median(took[:, :2]))
    recorded, noise = 50 * (took[:, 2:].sum(axis=1) - took[:, :2].sum(axis=1)) / silent, 100 * (took[:, 1] - took[:, 0]) / silent
    return _middle(recorded), _error(recorded), _middle(noise), _error(noise)


def _error(values: Array) -> float:
    draw = np.random.default_rng(7)
    return float(np.std([_middle(draw.choice(values, len(values))) for _ in range(500)]))


def _middle(values: Array) -> float:
    quarter = len(values) // 4
    return float(np.sort(values)[quarter : len(values) - quarter].mean())


def _report(bench: Bench, parallel: str, layer: str, both: list[dict[str, Any]]) -> None:
    took, per_step = np.array([b["took"] for b in both]).mean(axis=0), both[0]["per_step"]
    rows = []
    for name, of in (("by the clock", took[:, :, 0]), ("processor", took[:, :, 1])):
        rows.append([name, 1e3 * float(np.median(of[:, :2])), *compared(of)])
    title = f"a step of {parallel}, {layer}, 2 ranks, a processor each: {per_step:.0f} collectives; {2 * len(took)} recorded steps against their neighbours"
    bench.tables.append(Table(title, ["time", "silent ms", "added %", "+-", "noise %", "+-"], rows))
    if layer != layers()[0]:
        return
    adds, error_pct, *_ = compared(took[:, :, 1])
    what = f"added to a step of {parallel} with {per_step:.0f} collectives, {layer}, processor time (+- {error_pct:.2f}; by the clock {rows[0][2]:.2f} +- {rows[0][3]:.2f})"
    bench.aims.append(Aim(what, adds, "<=", bench.pick(1.0, 3.0), " %"))


def run(bench: Bench) -> None:
    overhead(bench)
