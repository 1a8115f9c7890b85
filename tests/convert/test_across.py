"""One run that goes through three frameworks' checkpoints: DeepSpeed ZeRO-3 on 4 ranks -> FSDP2 x TP on 4 -> DeepSpeed ZeRO-1 on 2.

Its losses lie on those of the run that stayed where it was, within float noise: weights, both moments, steps and each group's settings came along. The
conversions are the command line's, checked (`--check`); the loading at every stop is the framework's own.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytestmark = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed: see scripts/setup")
HERE = Path(__file__).parent
NOISE = 2e-5
"""Relative: sums in another order, by other kernels, over nine steps."""


class Worlds:
    """DeepSpeed's ranks with the common model."""

    def __init__(self, log: Path) -> None:
        with log.open("w") as err:
            self._process = subprocess.Popen([sys.executable, HERE / "across_deepspeed.py"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=err, text=True)

    def ask(self, world: int, task: dict) -> dict:
        config = {"gradient_clipping": 0.0}
        self._process.stdin.write(json.dumps({"world": world, "tasks": [{"dtype": "fp32", "config": config} | task]}) + "\n")
        self._process.stdin.flush()
        answer = json.loads(self._process.stdout.readline() or '{"error": "the job died"}')
        assert "error" not in answer, answer["error"]
        return answer["results"][0]

    def close(self) -> None:
        self._process.communicate(timeout=30)


@pytest.fixture
def worlds(tmp_path):
    made = Worlds(tmp_path / "log")
    yield made
    made.close()


def ckptd_convert(source: Path, target: Path, *words: str) -> dict:
    done = subprocess.run(
        [sys.executable, "-m", "ckptd.cli.main", "convert", source, target, "--check", "--json", *words], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_three_frameworks_one_loss_curve(tmp_path, worlds):
    straight = worlds.ask(4, {"stage": 3, "train": 3, "save": str(tmp_path / "zero3"), "next": 6})
    ckptd_convert(tmp_path / "zero3", tmp_path / "dcp", "--to", "dcp", "--ranks", "4", "--drop", "objects")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "4", "--standalone", HERE / "across_job.py"]
    done = subprocess.run([*torchrun, tmp_path / "dcp", "3", "3", tmp_path / "fsdp_tp", tmp_path / "out.json"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    middle = json.loads((tmp_path / "out.json").read_text())
    ckptd_convert(tmp_path / "fsdp_tp", tmp_path / "zero1", "--to", "zero1", "--ranks", "2")
    end = worlds.ask(2, {"stage": 1, "load": str(tmp_path / "zero1"), "next": 3, "train": 0})
    ours = [*middle, *end["next"]]
    print("straight", straight["next"], "\nthrough ", ours)
    assert len(ours) == len(straight["next"]) == 6
    np.testing.assert_allclose(ours, straight["next"], rtol=NOISE)
    assert not np.allclose(straight["next"][:-1], straight["next"][1:], rtol=1e-3), "the curve moves, so that a step too few would show"
