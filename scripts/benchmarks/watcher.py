"""What watching 8 ranks costs the daemon: processor and memory, steps of 20, 60 and 250 ms with 24 collectives each.

The rings are real, the daemon is real; the ranks are written by one process, as fast as such ranks would. The daemon's memory is what is its own: pages of rings are the
trainers'. Where other work is on the machine a processor's second is longer: the processor time of a fixed piece of work is printed beside it.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from benchmarks import harness
from benchmarks.harness import Aim, Bench, Table
from ckptd.channel import connect
from ckptd.core import wire
from ckptd.monitor import record
from ckptd.monitor.ring import Ring
from ckptd.monitor.tap_writer import Writer

RANKS = 8
OPS = 24
SECONDS = 30.0
CPU_MAX_PERCENT = 2.0
OWN_MAX_MIB = 64.0


def write(directory: str, step_s: float, seconds: float) -> None:
    """In a process of its own: 8 ranks that step, every one with a ring and a line."""
    pipes, writers = [], []
    for rank in range(RANKS):
        ring = Ring.create()
        head = ring.header
        head["rank"], head["world_size"], head["pid"], head["local_rank"], head["layer"] = rank, RANKS, os.getpid(), rank, 2
        writer = Writer(ring)
        rows = [writer.group(77, RANKS, rank, range(RANKS)), writer.group(78, RANKS, rank, range(RANKS))]
        pipe = connect(Path(directory) / "daemon.sock", 5.0)
        pipe.put(wire.Hello(id=1, job="bench", rank=rank, role="tap"))
        pipe.put(wire.Watch(id=2, job="bench", rank=rank, attempt=1), ring.fd)
        while pipe.wants_write:
            pipe.flush()
        pipes.append(pipe)
        writers.append((writer, rows, ring))
    began, step = time.monotonic(), 0
    while time.monotonic() - began < seconds:
        step += 1
        for writer, rows, _ in writers:
            for i in range(OPS):
                writer.ended(writer.enter(rows[i % 2], 1 + i % 5, 7, 4096, 0, -1, 4096))
            writer.step(step, 1000, 20)  # as a tap tells what its thread had of the processors
        for pipe in pipes:
            pipe.read()
        time.sleep(max(0.0, began + step * step_s - time.monotonic()))
    for _, _, ring in writers:
        ring.header["done"] = record.GOOD


def used(pid: int) -> tuple[float, float]:
    """(processor seconds, MiB of its own)."""
    text = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    anonymous = next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("RssAnon"))
    return (int(text[11]) + int(text[12])) / os.sysconf("SC_CLK_TCK"), int(anonymous.split()[1]) / 1024


def run(bench: Bench) -> None:
    """See the module."""
    seconds = 8.0 if bench.quick else SECONDS
    rows = []
    bench.notes.append(f"five million additions in Python take {harness.loop_s():.2f} s of this processor")
    for step_s in (0.02, 0.06, 0.25):
        with harness.daemon(bench.directory / f"d{step_s}") as process:
            time.sleep(1.0)
            idle0 = used(process.pid)[0]
            time.sleep(seconds / 3)
            idle = (used(process.pid)[0] - idle0) / (seconds / 3) * 100
            code = f"from benchmarks import watcher; watcher.write({str(bench.directory / f'd{step_s}')!r}, {step_s}, {seconds + 2})"
            child = subprocess.Popen([sys.executable, "-c", code])
            time.sleep(2.0)
            cpu0, _ = used(process.pid)
            time.sleep(seconds - 1.0)
            cpu, own = used(process.pid)
            child.wait()
            percent = (cpu - cpu0) / (seconds - 1.0) * 100
        rows.append([f"{step_s * 1e3:.0f} ms", idle, percent, percent - idle, own])
        bench.aims.append(Aim(f"steps of {step_s * 1e3:.0f} ms: of one processor for {RANKS} ranks, with all else that the daemon does", percent, "<=", CPU_MAX_PERCENT, " %"))
        bench.aims.append(Aim(f"steps of {step_s * 1e3:.0f} ms: memory of the daemon's own", own, "<=", OWN_MAX_MIB, " MiB"))
    bench.tables.append(Table(f"{RANKS} ranks, {OPS} collectives a step", ["step", "idle %", "watching %", "added %", "own MiB"], rows))
