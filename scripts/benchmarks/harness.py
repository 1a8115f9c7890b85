"""What benchmarks share: rounds, pairing, processes that are ranks, tables, aims, and a description of the machine.

How to measure here, on few cores of a shared host: all cases run in one process tree, interleaved in rounds whose order rotates; a round's
figures are compared with the reference *of the same round*, and only then is a median taken, so that what slows the whole round cancels out.
Two cases that are the same show the noise. The garbage collector is off while the clock runs.

As a program (`python -m benchmarks.harness MODULE:FUNCTION ARGUMENTS RESULT`) this module is a rank: it calls the function, and writes what it returns.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime as dt
import gc
import importlib
import json
import os
import platform
import random
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

ROOT = Path(__file__).resolve().parents[2]
END_S = 10.0
"""How long a process that was told to end may take."""

median = statistics.median


def rotated(cases: Sequence[Any], turn: int) -> list[Any]:
    """The cases in this round's order: each comes first once, and is followed by others than in the last round."""
    turn %= len(cases)
    order = [*cases[turn:], *cases[:turn]]
    return order[::-1] if turn % 2 else order


def spread(values: Sequence[float]) -> float:
    """Median distance from the median."""
    return median([abs(v - median(values)) for v in values])


@contextlib.contextmanager
def no_collector() -> Iterator[None]:
    """No garbage collection meanwhile."""
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.unfreeze()


def timed(work: Callable[[], Any]) -> float:
    """Seconds that `work` takes."""
    began_s = time.perf_counter()
    work()
    return time.perf_counter() - began_s


def loop_s() -> float:
    """Processor seconds of five million additions in Python, the least of three: what a processor's second is worth just now."""

    def add() -> float:
        total, begun = 0, time.thread_time()
        for i in range(5_000_000):
            total += i
        return time.thread_time() - begun

    return min(add() for _ in range(3))


def rates(cases: dict[str, Callable[[], Any]], rounds: int, nbytes: int) -> dict[str, list[float]]:
    """case -> bytes per second by round, where each case does `nbytes`; warmed up, interleaved, in an order that is drawn anew for each round.

    Drawn, not rotated: rotation keeps neighbours together, and what ran before leaves caches and memory as it left them (10 % for a kernel at the speed of memory).
    """
    found: dict[str, list[float]] = {name: [] for name in cases}
    for work in cases.values():
        work()
    with no_collector():
        for turn in range(rounds):
            for name in random.Random(turn).sample([*cases], len(cases)):
                found[name].append(nbytes / timed(cases[name]))
    return found


# --- what comes out ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Aim:
    """A value and its bound. `sense` is "<=" or ">="."""

    what: str
    value: float
    sense: str
    bound: float
    unit: str = ""

    @property
    def holds(self) -> bool:
        """A value that is no number holds nothing."""
        return self.value <= self.bound if self.sense == "<=" else self.value >= self.bound

    def line(self) -> str:
        verdict = "holds " if self.holds else "MISSED"
        return f"  {verdict}  {self.value:8.3g}{self.unit} {self.sense} {self.bound:.3g}{self.unit}  {self.what}"


@dataclass(frozen=True)
class Table:
    """Rows as printed; floats get three significant digits."""

    title: str
    columns: list[str]
    rows: list[list[Any]]

    def text(self) -> str:
        cells = [self.columns, *([_cell(c) for c in row] for row in self.rows)]
        widths = [max(len(row[i]) for row in cells) for i in range(len(self.columns))]
        lines = ["  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))) for row in cells]
        return "\n".join([self.title, lines[0], "-" * len(lines[0]), *lines[1:]])


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return "" if value is None else str(value)


@dataclass
class Bench:
    """One run of one benchmark: its settings, its work directory, and what it found."""

    name: str
    command: str
    quick: bool = False
    rounds: int | None = None
    options: argparse.Namespace | None = None
    """A benchmark's own, where it has some."""
    tables: list[Table] = field(default_factory=list)
    aims: list[Aim] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    raw: dict[str, Any] = field(default_factory=dict)

    def __enter__(self) -> Self:
        self.machine = machine()
        self.began_s = time.monotonic()
        self.directory = Path(tempfile.mkdtemp(prefix=f"ckptd-bench-{self.name}-"))
        return self

    def __exit__(self, *_exc: object) -> None:
        shutil.rmtree(self.directory, ignore_errors=True)

    def pick(self, full: Any, quick: Any) -> Any:
        return quick if self.quick else full

    def text(self) -> str:
        m = self.machine
        where = f"{m['cpu']}, {m['cores']} cores, {m['memory_gb']} GB, Linux {m['kernel']}, torch {m['torch']}"
        when = f"load {m['load_at_start'][0]:.1f} at start, {m['date']}, {time.monotonic() - self.began_s:.0f} s"
        parts = [
            f"{self.command}\n{where}, {when}",
            *(t.text() for t in self.tables),
            "\n".join(self.notes),
            "aims" + " (quick: looser)" * self.quick + "\n" + "\n".join(aim.line() for aim in self.aims),
        ]
        return "\n\n".join(p for p in parts if p)

    def facts(self) -> dict[str, Any]:
        return {
            "benchmark": self.name, "command": self.command, "quick": self.quick, "machine": self.machine,
            "seconds": round(time.monotonic() - self.began_s, 1), "tables": [asdict(t) for t in self.tables],
            "aims": [{**asdict(aim), "holds": aim.holds} for aim in self.aims], "notes": self.notes, "raw": self.raw,
        }  # fmt: skip


def machine() -> dict[str, Any]:
    """Where this runs, as far as it explains the figures."""
    import torch

    models = [line.split(":", 1)[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return {
        "cpu": models[0] if models else platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "kernel": platform.release(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "load_at_start": os.getloadavg(),
        "date": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
    }


# --- processes --------------------------------------------------------------------------------------------------------------


def end(process: subprocess.Popen[Any]) -> None:
    """End a process that we started; softly, then not."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(END_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@contextlib.contextmanager
def daemon(directory: Path, *options: str) -> Iterator[subprocess.Popen[Any]]:
    """A daemon of our own, whose socket lies in `directory`."""
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    with (directory / "log").open("wb") as log:
        process = subprocess.Popen([sys.executable, "-m", "ckptd.cli.main", "daemon", "--dir", str(directory), *options], stdout=log, stderr=log)
    try:
        until_s = time.monotonic() + 30
        while not (directory / "daemon.sock").exists():
            if process.poll() is not None or time.monotonic() > until_s:
                msg = "no daemon came up:\n" + (directory / "log").read_text()[-2000:]
                raise RuntimeError(msg)
            time.sleep(0.02)
        yield process
    finally:
        end(process)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def ranks(target: str, arguments: dict[str, Any], *, world: int, directory: Path, env: dict[str, str] | None = None, timeout_s: float = 900) -> list[Any]:
    """Run `module:function` with these arguments in `world` processes, one thread each, as torchrun would; what each returned, by rank."""
    directory.mkdir(parents=True, exist_ok=True)
    common = {**os.environ, **(env or {}), "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    results = [directory / f"result{r}.json" for r in range(world)]
    logs = [directory / f"rank{r}.log" for r in range(world)]
    processes = []
    try:
        for r in range(world):
            place = {"RANK": str(r), "LOCAL_RANK": str(r), "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
            command = [sys.executable, "-m", "benchmarks.harness", target, json.dumps(arguments), str(results[r])]
            with logs[r].open("wb") as log:
                processes.append(subprocess.Popen(command, env=common | place, stdout=log, stderr=log, stdin=subprocess.DEVNULL))
        until_s = time.monotonic() + timeout_s
        while any(p.poll() is None for p in processes):
            failed = [r for r, p in enumerate(processes) if p.poll() not in {None, 0}]
            if failed or time.monotonic() > until_s:
                break
            time.sleep(0.05)
        wrong = [r for r, p in enumerate(processes) if p.poll() != 0]
        if wrong:
            tails = "\n".join(f"--- rank {r}: {processes[r].poll()}\n{logs[r].read_text(errors='replace')[-3000:]}" for r in wrong)
            msg = f"{target}: ranks {wrong} of {world} did not end well in {timeout_s:.0f} s\n{tails}"
            raise RuntimeError(msg)
    finally:
        for p in processes:
            end(p)
    return [json.loads(path.read_text()) for path in results]


def rank_main() -> None:
    """A rank of `ranks`: join the others, call, write, leave no process behind."""
    import psutil
    import torch
    import torch.distributed as dist

    signal.signal(signal.SIGTERM, lambda *_: os._exit(143))
    target, arguments, result = sys.argv[1:]
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    module, _, name = target.partition(":")
    returned = getattr(importlib.import_module(module), name)(**json.loads(arguments))
    Path(result).write_text(json.dumps(returned))
    dist.barrier()
    for child in psutil.Process().children(recursive=True):  # dcp's process for saving outlives its interpreter otherwise
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()
    os._exit(0)


if __name__ == "__main__":
    rank_main()
