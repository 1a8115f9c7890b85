"""A job whose numbers do not depend on how many ranks it has: run by `ckptd run` in tests of node loss, and by `reference` in the test itself.

Every gradient is a sum of small integers, exact in any order and on any number of ranks; so an uninterrupted run on one rank tells, bit for bit, what weights,
moments and data position must be after each step, whatever nodes were lost meanwhile. Rank 0 writes one JSON line per event to $OUT.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time

import torch
from torch import nn

BATCH = 60
"""Samples per step: they are shared out to 1 to 6 nodes evenly or not, the sum is the same."""
SHAPES = ((7, 33), (33, 5), (64, 129))


class Model(nn.Module):
    def __init__(self, scale: int = 1) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.layers = nn.ModuleList([nn.Linear(a * scale, b * scale) for a, b in SHAPES])

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return sum((layer(x[:, : layer.in_features]) * t[:, : layer.out_features]).sum() for layer in self.layers)


class Loader:
    """Where in the data the job is. What a step is fed depends on nothing else."""

    def __init__(self) -> None:
        self.position = 0

    def state_dict(self) -> dict:
        return {"position": self.position}

    def load_state_dict(self, state: dict) -> None:
        self.position = state["position"]

    def batch(self, rank: int, world_size: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
        numbers = torch.arange(self.position + rank, self.position + BATCH, world_size)
        self.position += BATCH
        columns = torch.arange(width)
        return ((numbers[:, None] * 31 + columns * 7) % 11 - 5).float(), ((numbers[:, None] * 17 + columns * 3) % 7 - 3).float()


def digest(model: nn.Module, optimizer: torch.optim.Optimizer, loader: Loader) -> str:
    """Of all weights, moments and the data position."""
    h = hashlib.sha256(str(loader.position).encode())
    for p in model.parameters():
        state = optimizer.state.get(p, {})
        for t in (p, *(state[k] for k in sorted(state))):
            whole = t.full_tensor() if hasattr(t, "full_tensor") else t
            h.update(whole.detach().contiguous().numpy().tobytes())
    return h.hexdigest()[:16]


def reference(steps: int, scale: int = 1) -> dict[int, str]:
    """step -> digest, of an uninterrupted run on one rank without ckptd."""
    model, loader = Model(scale), Loader()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    found = {}
    for step in range(1, steps + 1):
        x, t = loader.batch(0, 1, 129 * scale)
        model(x, t).backward()
        optimizer.step()
        optimizer.zero_grad()
        found[step] = digest(model, optimizer, loader)
    return found


THROTTLE = """
import ctypes, os, signal, sys, time
ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: it goes with the worker
while True:
    os.kill(int(sys.argv[1]), signal.SIGSTOP)
    time.sleep(0.03)
    os.kill(int(sys.argv[1]), signal.SIGCONT)
    time.sleep(0.02)
"""


class Trouble:
    """What goes wrong with this worker: "hang:rank=1,step=9" in the first attempt; "slow:slot=2,step=9", wherever that slot is used: from then on it
    runs for two fifths of the time, as a processor that throttles (by stops and goes: a busy machine changes nothing of that)."""

    def __init__(self, kind: str = "", step: int = 0, work_s: float = 0.0) -> None:
        self.kind, self.step, self.work_s = kind, step, work_s
        self.throttle: subprocess.Popen[bytes] | None = None

    @classmethod
    def of(cls, text: str, rank: int, attempt: int) -> Trouble:
        kind, _, rest = text.partition(":")
        told = dict(part.split("=") for part in rest.split(",") if part)
        mine = (kind == "hang" and attempt == 1 and int(told["rank"]) == rank) or (kind == "slow" and told["slot"] == os.environ.get("CKPTD_SLOT"))
        return cls(kind if mine else "", int(told.get("step", 0)), float(told.get("work_ms", 0)) / 1000)

    def at(self, step: int) -> None:
        if self.kind and step == self.step:
            with open(os.environ["OUT"] + ".trouble", "a") as f:
                f.write(json.dumps({"t": time.time(), "what": self.kind, "step": step}) + "\n")
        if self.kind == "hang" and step == self.step:
            time.sleep(3600)
        if self.kind == "slow" and step >= self.step and self.throttle is None:
            self.throttle = subprocess.Popen([sys.executable, "-S", "-c", THROTTLE, str(os.getpid())])
        until = time.thread_time() + self.work_s
        while time.thread_time() < until:
            pass


def main() -> None:
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    import ckptd

    t = {"start": time.time()}
    with_digest = os.environ.get("DIGEST", "1") == "1"
    steps, pace_s, scale = int(sys.argv[1]), float(sys.argv[2]), int(os.environ.get("SCALE", "1"))
    dist.init_process_group("gloo")
    t["group"] = time.time()
    rank, world_size = dist.get_rank(), dist.get_world_size()
    model, loader = Model(scale), Loader()
    mesh = init_device_mesh("cpu", (world_size,), mesh_dim_names=("dp",))
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    t["built"] = time.time()
    session = ckptd.attach(model=model, optimizer=optimizer, extras={"loader": loader}, required=True, timeout_s=40)
    t["attached"] = time.time()
    restored = session.restore(timeout_s=40)
    t["restored"] = time.time()
    torch.set_num_threads(1)

    def say(**what: object) -> None:
        if rank == 0:
            with open(os.environ["OUT"], "a") as f:
                f.write(json.dumps({"t": time.time(), "world": world_size, "attempt": session.attempt, **what}) + "\n")

    found = digest(model, optimizer, loader) if restored.step else ""
    say(what="restored", step=restored.step, source=restored.source, digest=found, times=t)
    trouble = Trouble.of(os.environ.get("TROUBLE", ""), rank, session.attempt)
    for step in range(restored.step + 1, steps + 1):
        began = time.monotonic()
        trouble.at(step)
        x, target = loader.batch(rank, world_size, 129 * scale)
        (model(x, target) * world_size).backward()  # FSDP divides by it
        optimizer.step()
        optimizer.zero_grad()
        session.step(step)
        took = time.monotonic() - began
        now = digest(model, optimizer, loader) if with_digest else ""
        say(what="step", step=step, digest=now, s=took, protected=session.status()["reached"].get("protected", 0))
        time.sleep(max(0.0, pace_s - (time.monotonic() - began)))
    session.close()
    say(what="end")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
