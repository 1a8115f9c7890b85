"""Checkpoints that real DeepSpeed made, once per run of the tests: every stage, world and dtype, and some variants. `conftest.py` gives them out."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import product
from pathlib import Path

STAGES, WORLDS, DTYPES = (1, 2, 3), (2, 3, 4), ("fp32", "bf16")
VARIANTS = {  # what the plain sources do not show, each at one size
    "robin": (3, {"stage": 2, "dtype": "fp32", "zero": {"round_robin_gradients": True}}),
    "aligned": (3, {"stage": 1, "dtype": "bf16", "zero": {"parameter_alignment": True}}),
    "subs": (3, {"stage": 3, "dtype": "bf16", "zero": {"sub_group_size": 20}}),
    "sgd": (2, {"stage": 1, "dtype": "fp32", "optimizer": "sgd"}),
    "bf16opt": (2, {"stage": 1, "dtype": "bf16", "config": {"data_types": {"grad_accum_dtype": "fp32"}}}),
    "files": (2, {"stage": 2, "dtype": "bf16", "files": "ckptd"}),
    "robin-bf16": (2, {"stage": 1, "dtype": "bf16", "zero": {"round_robin_gradients": True}}),
}


class Server:
    """`deepspeed_job.py`: one import for all worlds."""

    def __init__(self, log: Path) -> None:
        job = Path(__file__).with_name("deepspeed_job.py")
        with log.open("w") as err:
            self._process = subprocess.Popen([sys.executable, job], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=err, text=True)
        self.seconds = 0.0

    def ask(self, world: int, tasks: list[dict]) -> list[dict]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps({"world": world, "tasks": tasks}) + "\n")
        self._process.stdin.flush()
        answer = json.loads(self._process.stdout.readline() or '{"error": "the job died", "seconds": 0}')
        self.seconds += answer["seconds"]
        assert "error" not in answer, answer["error"]
        return answer["results"]

    def close(self) -> None:
        self._process.communicate(timeout=30)


def make(root: Path, server: Server) -> dict[str, dict]:
    """name -> what the job answered; the checkpoint is at root/name, what DeepSpeed says it holds at root/name.pt."""
    plain = {f"{s}-{w}-{d}": (w, {"stage": s, "dtype": d}) for w, d, s in product(WORLDS, DTYPES, STAGES)}
    found: dict[str, dict] = {}
    for world in WORLDS:
        named = {n: t for n, (w, t) in (plain | VARIANTS).items() if w == world}
        tasks = [t | {"train": 3, "save": str(root / n), "dump": str(root / f"{n}.pt"), "next": 2} for n, t in named.items()]
        answers = server.ask(world, tasks)
        found |= {n: t | a for n, t, a in zip(named, tasks, answers, strict=True)}
    return found
