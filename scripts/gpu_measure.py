"""Measures what only a GPU shows, one part per process: `gpu_measure.py PART [--quick]`. Prints text for people and one line of JSON per part. Run by `scripts/gpu`.

    pinned    memfds as pinned memory: what registering costs, how fast copies into and out of them are, beside memory that CUDA itself allocated
    step      what a snapshot of every step adds to a training step, in turns with the loop without, and how long the host stands in `session.step`
    restore   a restore onto the device, beside a plain copy of the same bytes
    tap       what recording a collective costs, alone and with two ranks on one device
    health    what NVML says of this device, as ckptd's health sees it

Every figure is a median of interleaved blocks; bandwidths are in 10^9 bytes per second.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import mmap
import os
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ["PYTHONPATH"] = f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"  # of the daemon that a session starts

from tests.train.harness import stop_daemon  # noqa: E402

median = statistics.median


def cuda() -> bool:
    import torch

    return bool(torch.cuda.is_available())


def device_name() -> str:
    """Without a GPU the program runs on the CPU, so that it is kept working; its lines then say so, and mean nothing."""
    return "cuda" if cuda() else "cpu"


def synchronize() -> None:
    import torch

    if cuda():
        torch.cuda.synchronize()


def say(part: str, **facts: Any) -> None:
    print(json.dumps({"part": part, "device": device_name(), **facts}), flush=True)


def timed(work: Any) -> float:
    synchronize()
    began = time.perf_counter()
    work()
    synchronize()
    return time.perf_counter() - began


# --- pinned -----------------------------------------------------------------------------------------------------------------


def pinned(a: argparse.Namespace) -> None:
    import torch

    from ckptd import arena, capture

    size = (1 << 29) if a.quick else (1 << 31)
    fd = os.memfd_create("gpu-measure")
    os.posix_fallocate(fd, 0, size)
    mapping = mmap.mmap(fd, size)
    address = ctypes.addressof(ctypes.c_char.from_buffer(mapping))
    began = time.perf_counter()
    populated = arena._libc.madvise(address, size, arena.MADV_POPULATE_WRITE)  # noqa: SLF001
    populate_s = time.perf_counter() - began
    synchronize()
    memory = memoryview(mapping)
    began = time.perf_counter()
    ok = capture.pin(memory)
    pin_s = time.perf_counter() - began
    ours = torch.frombuffer(memory, dtype=torch.uint8)
    theirs = torch.empty(size, dtype=torch.uint8, pin_memory=cuda())
    pageable = torch.zeros(size, dtype=torch.uint8)
    device = torch.randint(0, 255, (size,), dtype=torch.uint8, device=device_name())
    found: dict[str, list[float]] = {}
    for round_ in range(5 if a.quick else 8):
        for name, host in (("memfd", ours), ("cudaHostAlloc", theirs), ("pageable", pageable)):
            down = timed(lambda h=host: h.copy_(device, non_blocking=True))
            up = timed(lambda h=host: device.copy_(h, non_blocking=True))
            if round_:
                found.setdefault(f"{name} device to host", []).append(size / down / 1e9)
                found.setdefault(f"{name} host to device", []).append(size / up / 1e9)
    same = bool(torch.equal(device.cpu(), ours))
    # A copy into memory that is truly pinned returns before it is done.
    synchronize()
    began = time.perf_counter()
    ours.copy_(device, non_blocking=True)
    returned_s = time.perf_counter() - began
    synchronize()
    done_s = time.perf_counter() - began
    say(
        "pinned", bytes=size, populated=populated == 0, registered=ok, populate_s=round(populate_s, 3), register_s=round(pin_s, 3), same=same,
        gb_per_s={k: round(median(v), 2) for k, v in found.items()}, copy_returned_ms=round(returned_s * 1e3, 3), copy_done_ms=round(done_s * 1e3, 3),
    )  # fmt: skip
    del ours
    if ok:
        capture.unpin(memory)


# --- step and restore -------------------------------------------------------------------------------------------------------


class Training:
    """Linear layers and AdamW in fp32: 12 bytes of state per parameter. `rows`: how long a step is."""

    def __init__(self, width: int, layers: int, rows: int) -> None:
        import torch
        from torch import nn

        torch.manual_seed(0)
        self.model = nn.Sequential(*[nn.Linear(width, width) for _ in range(layers)]).to(device_name())
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5, fused=True)
        self.x = torch.rand(rows, width, device=device_name())

    def step(self) -> None:
        self.model(self.x).square().mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def held(self) -> list[Any]:
        """Parameters, and what the optimizer keeps of each (the steps that it counts are left out)."""
        return [*self.model.parameters(), *(v for s in self.optimizer.state.values() for v in s.values() if v.ndim)]

    def state_bytes(self) -> int:
        return sum(t.nbytes for t in self.held())


def rows_for(width: int, layers: int, step_s: float) -> int:
    """How many rows make a step as long as this, here."""
    training = Training(width, layers, 2048)
    for _ in range(3):
        training.step()
    took = median([timed(training.step) for _ in range(5)])
    return max(256, int(2048 * step_s / took) // 256 * 256)


class Blocks:
    """Blocks of steps, one case after the other: the loop alone, with a snapshot of each step, with a bare copy into pinned memory at the end of each step."""

    def __init__(self, training: Training, session: Any, block: int) -> None:
        import torch

        self.training, self.session, self.block, self.number, self.host = training, session, block, 0, []
        self.sources = training.held()
        self.places = [torch.empty_like(t, device="cpu", pin_memory=cuda()) for t in self.sources]

    def run(self, case: str) -> float:
        """Seconds per step."""
        synchronize()
        began = 0.0
        for i in range(self.block + 1):  # the first brings the case into its steady state
            if i == 1:
                synchronize()
                began = time.perf_counter()
            self.training.step()
            if case == "ours":
                self.number += 1
                at = time.perf_counter()
                self.session.step(self.number)
                self.host.append(time.perf_counter() - at)
            elif case == "bare":
                self.copy()
        synchronize()
        took = (time.perf_counter() - began) / self.block
        if case == "ours":
            self.session.wait("committed", timeout_s=60)
        return took

    def copy(self) -> None:
        import torch

        with torch.no_grad():
            for place, source in zip(self.places, self.sources, strict=True):
                place.copy_(source, non_blocking=True)
        synchronize()


def step(a: argparse.Namespace) -> None:
    for step_ms in (150,) if a.quick else (60, 150, 300):
        directory = Path(tempfile.mkdtemp(prefix="ckptd-gpu-"))
        try:
            step_of(step_ms, directory, a)
        finally:
            stop_daemon(directory)
            shutil.rmtree(directory, ignore_errors=True)


def step_of(step_ms: int, directory: Path, a: argparse.Namespace) -> None:
    import ckptd

    width, layers = a.width, 6 if a.quick else 14
    rows = rows_for(width, layers, step_ms / 1e3)
    training = Training(width, layers, rows)
    for _ in range(3):
        training.step()
    began = time.perf_counter()
    session = ckptd.attach(model=training.model, optimizer=training.optimizer, job="gpu", directory=str(directory), required=True)
    session.restore(timeout_s=60)
    attach_s = time.perf_counter() - began
    blocks = Blocks(training, session, 6)
    took: dict[str, list[float]] = {"plain": [], "ours": [], "bare": []}
    for round_ in range(4 if a.quick else 6):
        for case, times in took.items():
            found = blocks.run(case)
            if round_:
                times.append(found)
    state = session.status()
    plain, size = median(took["plain"]), training.state_bytes()
    added = median([x - y for x, y in zip(took["ours"], took["plain"], strict=True)])
    copied = median([x - y for x, y in zip(took["bare"], took["plain"], strict=True)])
    say(
        "step", wanted_ms=step_ms, rows=rows, state_bytes=size, pinned=state["pinned"], plain_ms=round(plain * 1e3, 2),
        with_snapshot_ms=round(median(took["ours"]) * 1e3, 2), added_ms=round(added * 1e3, 3), added_percent=round(added / plain * 100, 2),
        bare_copy_added_ms=round(copied * 1e3, 2), bare_copy_gb_per_s=round(size / max(copied, 1e-9) / 1e9, 1),
        spread_percent=round((max(took["plain"]) - min(took["plain"])) / plain * 100, 2), session_step_host_ms=round(median(blocks.host) * 1e3, 3),
        session_step_host_max_ms=round(max(blocks.host) * 1e3, 3), attach_and_restore_s=round(attach_s, 2), counts=state["counts"], timings_s=state["timings_s"],
    )  # fmt: skip
    session.close()


def restore(a: argparse.Namespace) -> None:
    import torch

    import ckptd
    from ckptd import capture

    width, layers = a.width, 6 if a.quick else 14
    directory = Path(tempfile.mkdtemp(prefix="ckptd-gpu-"))
    try:
        training = Training(width, layers, 256)
        training.step()
        session = ckptd.attach(model=training.model, optimizer=training.optimizer, job="gpu", directory=str(directory), required=True)
        session.restore(timeout_s=60)
        session.step(1)
        assert session.wait("committed", timeout_s=60)
        size = training.state_bytes()
        held = training.held()
        expected = [t.detach().clone() for t in held]
        session.close()
        took, timings = [], []
        for _ in range(3 if a.quick else 5):
            with torch.no_grad():
                for t in held:
                    t.zero_()
            session = ckptd.attach(model=training.model, optimizer=training.optimizer, job="gpu", directory=str(directory), required=True)
            synchronize()
            began = time.perf_counter()
            got = session.restore(timeout_s=60)
            synchronize()
            took.append(time.perf_counter() - began)
            timings.append(session.status()["timings_s"])
            assert got.step == 1
            session.close()
        now = training.held()
        same = all(torch.equal(a, b) for a, b in zip(expected, now, strict=True))
        # The same bytes by one plain copy: from memory that is pinned, and from memory that is not.
        device = torch.empty(size, dtype=torch.uint8, device=device_name())
        mapping = mmap.mmap(-1, size)
        host = torch.frombuffer(mapping, dtype=torch.uint8)
        host.fill_(1)
        pageable = median([timed(lambda: device.copy_(host)) for _ in range(4)][1:])
        capture.pin(memoryview(mapping))
        pinned_s = median([timed(lambda: device.copy_(host, non_blocking=True)) for _ in range(4)][1:])
        say(
            "restore", state_bytes=size, same=same, restore_s=round(median(took), 3), restore_gb_per_s=round(size / median(took) / 1e9, 2),
            copy_pageable_gb_per_s=round(size / pageable / 1e9, 2), copy_pinned_gb_per_s=round(size / pinned_s / 1e9, 2), of_a_pinned_copy=round(pinned_s / median(took), 3),
            all_s=[round(t, 3) for t in took], timings_s=timings[-1],
        )  # fmt: skip
    finally:
        stop_daemon(directory)
        shutil.rmtree(directory, ignore_errors=True)


# --- tap and health ---------------------------------------------------------------------------------------------------------


def tap(a: argparse.Namespace) -> None:
    from tests.gpu.spawned import run_ranks

    device = device_name()
    for world in (1,) if a.quick else (1, 2):
        cases = ["timing", "cost"] if (world, device) == (1, "cuda") else ["cost"]
        try:
            said = run_ranks(world, device, *cases, timeout_s=60)[0]
        except AssertionError as e:
            say("tap", world=world, failed=str(e)[-1500:])
            continue
        for case in cases:
            say("tap", world=world, case=case, plugin=said["plugin"], why=said["why"], **{k: v for k, v in said[case].items() if k != "records"})


def health(a: argparse.Namespace) -> None:
    from ckptd.monitor import nvml
    from ckptd.monitor.health import Sampler

    sampler = Sampler(0)
    for look in range(3 if a.quick else 5):
        began = time.perf_counter()
        sampler.sample_gpus(time.monotonic())
        spent_s = time.perf_counter() - began
        seen = sampler.sample(time.monotonic())
        if look == 0:
            first_s = spent_s
        if cuda():
            training = Training(a.width, 2, 4096)
            for _ in range(20):
                training.step()
            synchronize()
        time.sleep(0.5)
    say(
        "health", pynvml=nvml.module() is not None, first_look_s=round(first_s, 3), look_s=round(spent_s, 4), alarms=seen.alarms,
        gpu={k: round(v, 3) for k, v in seen.values.items() if "gpu" in k},
    )  # fmt: skip


PARTS = {f.__name__: f for f in (pinned, step, restore, tap, health)}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--width", type=int, default=4096, help="of the layers of `step` and `restore`")
    a = parser.parse_args()
    PARTS[a.part](a)


if __name__ == "__main__":
    main()
