"""What watching costs the trainer: added time per collective and per step, with each layer of the tap, against the same loop without it.

- Per collective: `dist.all_reduce` of 1 KB on gloo, one rank: nothing travels, so that what is added is not lost in waiting. Blocks of calls, each case once per round in an
  order drawn anew; a block's figures are its thread's processor time per call, and the median of its calls by the clock, less the mean of the two blocks without a tap *of the
  same round*; then the median over the rounds. The aim is of processor time: by the clock a call is mostly gloo's thread waking up, which varies by more than the tap costs.
- Per step: two ranks train the GPT of train_gpt.py (FSDP2, DDP), blocks of steps, in the same way. Beside the wall clock, the processor time of all threads: on a machine that
  others use, too, it says more.
- "no tap" runs twice per round: the difference between both is the noise.

The tap is attached anew for each block, and taken away after it: what stays is nothing. No daemon reads meanwhile; `scripts/bench watch` measures the daemon.
"""

from __future__ import annotations

import random
import time
from argparse import Namespace
from typing import Any, Self

from benchmarks import harness
from benchmarks.harness import Aim, Bench, Table, median

NONE = ("no tap", "no tap, again")
CALLS_WARM = 20
REFERENCE_US = 14.2
"""What a bare all_reduce of 1 KB on one rank took, by the clock, on the machine that the aims were set on."""


def layers() -> list[str]:
    """Those that this machine has."""
    from ckptd.monitor import tap_build

    return [*(["native"] if tap_build.built() else []), "python", "patched"]


class Tapped:
    """With this layer, or without a tap."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.records = 0

    def __enter__(self) -> Self:
        import os

        from ckptd.monitor import tap

        self.tap = None
        if self.name not in NONE:
            os.environ["CKPTD_TAP"] = self.name
            self.tap = tap.attach()
            if self.tap is None or self.tap.layer != self.name:
                msg = f"the layer {self.name} could not be attached"
                raise RuntimeError(msg)
        return self

    def __exit__(self, *_exc: object) -> None:
        if self.tap is not None:
            ops = self.tap.ring.read(0).records
            self.records = int(((ops["flags"] & 32) == 0).sum())
            self.hook_ns = int(self.tap.ring.header["hook_ns"][0])
            self.tap.close()


def calls(*, names: list[str], rounds: int, count: int) -> dict[str, Any]:
    """A rank alone: microseconds per call by case and round, by the clock and of the calling thread's processor time."""
    import torch
    import torch.distributed as dist

    found: dict[str, list[float]] = {name: [] for name in names}
    cpu: dict[str, list[float]] = {name: [] for name in names}
    x = torch.ones(256)
    now = time.perf_counter_ns
    recorded = 0
    for turn in range(rounds + 1):  # the first warms up
        for name in random.Random(turn).sample(names, len(names)):
            with Tapped(name) as case, harness.no_collector():
                took = []
                for _ in range(CALLS_WARM):
                    dist.all_reduce(x)
                begun = time.thread_time_ns()
                for _ in range(count):
                    began = now()
                    dist.all_reduce(x)
                    took.append(now() - began)
                spent = time.thread_time_ns() - begun
            recorded += case.records
            if turn:
                found[name].append(median(took) / 1000)
                cpu[name].append(spent / count / 1000)
    return {"us": found, "cpu_us": cpu, "recorded": recorded}


def steps(*, parallel: str, gpt: dict[str, Any], names: list[str], rounds: int, count: int) -> dict[str, Any]:
    """A rank of two: seconds per step, and of processor time, by case and round; collectives per step."""
    import torch
    import torch.distributed as dist
    import train_gpt

    a = Namespace(parallel=parallel, heads=8, dropout=0.0, dtype="fp32", device="cpu", seed=7, tie=False, freeze=False, **gpt)
    torch.manual_seed(a.seed)
    model, forward_backward, dp_rank, dp_size = train_gpt.build(a)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    loader = train_gpt.Loader(a, dp_rank, dp_size)
    wall: dict[str, list[float]] = {name: [] for name in names}
    cpu: dict[str, list[float]] = {name: [] for name in names}
    per_step = 0.0

    def step() -> float:
        began = time.perf_counter()
        x, y, _ = next(loader)
        forward_backward(x, y)
        optimizer.step()
        optimizer.zero_grad()
        return time.perf_counter() - began

    for _ in range(3):
        step()
    for turn in range(rounds + 1):
        for name in random.Random(turn).sample(names, len(names)):
            with Tapped(name) as case:
                dist.barrier()
                with harness.no_collector():
                    step()
                    began = time.process_time()
                    took = [step() for _ in range(count)]
                    spent = (time.process_time() - began) / count
            if case.records:
                per_step = (case.records - 1) / (count + 1)
            if turn:
                wall[name].append(median(took))
                cpu[name].append(spent)
    return {"wall_s": wall, "cpu_s": cpu, "per_step": per_step}


def added(rounds: dict[str, list[float]], name: str) -> float:
    """Median over rounds of a case's figure less the round's own reference."""
    return median([v - (a + b) / 2 for v, a, b in zip(rounds[name], rounds[NONE[0]], rounds[NONE[1]], strict=True)])


def noise(rounds: dict[str, list[float]]) -> float:
    return median([abs(a - b) for a, b in zip(rounds[NONE[0]], rounds[NONE[1]], strict=True)])


def overhead(bench: Bench) -> None:
    """Measure both; adds tables and aims."""
    names = [*NONE, *layers()]
    rounds = bench.rounds or bench.pick(40, 12)
    (said,) = harness.ranks("benchmarks.tap:calls", {"names": names, "rounds": rounds, "count": 400}, world=1, directory=bench.directory / "calls", env={"CKPTD_TAP": "0"})
    us, cpu = said["us"], said["cpu_us"]
    base = median(cpu[NONE[0]])
    rows = [[name, median(cpu[name]), added(cpu, name), 100 * added(cpu, name) / base, median(us[name]), added(us, name), harness.spread(us[name])] for name in names]
    columns = ["case", "cpu us", "added cpu us", "of bare %", "us", "added us", "spread"]
    bench.tables.append(Table(f"all_reduce of 1 KB, one rank, gloo: {said['recorded']} recorded", columns, rows))
    bench.raw["calls"] = said
    bench.notes.append(f"five million additions in Python take {harness.loop_s():.2f} s of this processor")
    bounds = {"native": bench.pick(1.5, 3.0), "python": bench.pick(15.0, 30.0)}
    for name, bound in bounds.items():
        if name in names:
            what = f"added per collective, {name}, processor time of the caller (bare: {base:.1f} us; noise {noise(cpu):.2f} us; by the clock {added(us, name):.1f} us, noise {noise(us):.1f} us)"
            bench.aims.append(Aim(what, added(cpu, name), "<=", bound, " us"))
            bench.aims.append(Aim(f"the same as a part of a bare all_reduce ({bound} of {REFERENCE_US} us)", 100 * added(cpu, name) / base, "<=", 100 * bound / REFERENCE_US, " %"))
    gpt = {"width": 256, "layers": 4, "context": 128, "batch": 8}
    for parallel in ("fsdp", "ddp"):
        arguments = {"parallel": parallel, "gpt": gpt, "names": [n for n in names if n != "patched"], "rounds": max(3, rounds // 4), "count": bench.pick(12, 6)}
        both = harness.ranks("benchmarks.tap:steps", arguments, world=2, directory=bench.directory / parallel, env={"CKPTD_TAP": "0"})
        _report(bench, parallel, both, arguments["names"])
        bench.raw[parallel] = both


def _report(bench: Bench, parallel: str, both: list[dict[str, Any]], names: list[str]) -> None:
    wall, cpu = both[0]["wall_s"], both[0]["cpu_s"]
    ref, ref_cpu = median(wall[NONE[0]]), median(cpu[NONE[0]])
    rows = [[n, median(wall[n]) * 1e3, 100 * added(wall, n) / ref, median(cpu[n]) * 1e3, 100 * added(cpu, n) / ref_cpu] for n in names]
    title = f"a step of {parallel}, 2 ranks: {both[0]['per_step']:.1f} collectives"
    bench.tables.append(Table(title, ["case", "ms", "added %", "cpu ms", "added cpu %"], rows))
    best = "native" if "native" in names else "python"
    what = f"added to a step of {parallel}, {best}, processor time (noise {100 * noise(cpu) / ref_cpu:.2f} %; by the clock {100 * added(wall, best) / ref:.2f} %, noise {100 * noise(wall) / ref:.2f} %)"
    bench.aims.append(Aim(what, 100 * added(cpu, best) / ref_cpu, "<=", bench.pick(1.0, 3.0), " %"))


def run(bench: Bench) -> None:
    overhead(bench)
