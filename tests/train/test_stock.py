"""What we persist is readable without us: stock PyTorch reshards it with dcp.load, the safetensors library opens every image."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import ckptd
from tests.forks import ranks
from tests.train.harness import stop_daemon

pytestmark = pytest.mark.timeout(200)


def full(t):
    return (t.full_tensor() if isinstance(t, DTensor) else t).detach()


def train_and_persist(rank: int):
    torch.manual_seed(5)
    model = nn.Sequential(nn.Embedding(50, 8), nn.Linear(8, 7), nn.LayerNorm(7), nn.Linear(7, 3))
    fully_shard(model, mesh=init_device_mesh("cpu", (4,)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    session = ckptd.attach(model=model, optimizer=optimizer, required=True)
    session.restore()
    for step in range(1, 4):
        loss = model(torch.randint(50, (4, 6))).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        session.step(step)
    session.persist(3)
    assert session.wait("persisted", 3, timeout_s=30)
    session.close()
    names = {id(p): n for n, p in model.named_parameters()}
    found = {f"model.{n}": p for n, p in model.named_parameters()}
    found |= {f"optim.state.{names[id(p)]}.{k}": v for p, s in optimizer.state.items() for k, v in s.items()}
    return {n: [str(t.dtype), full(t).float().reshape(-1).tolist()] for n, t in found.items()}


def test_stock_pytorch_and_safetensors_read_a_persisted_step(tmp_path):
    env = {"CKPTD_DIR": str(tmp_path / "d"), "CKPTD_STORE": str(tmp_path / "store"), "CKPTD_JOB": "stock"}
    try:
        truth = ranks(4, train_and_persist, env=env)[0]
    finally:
        stop_daemon(tmp_path / "d")
    images = tmp_path / "store" / "stock" / "step-00000003" / "images"
    held = 0
    for path in sorted(images.iterdir()):
        with safe_open(path, framework="pt") as f:
            assert json.loads(f.metadata()["ckptd"])["step"] == 3
            held += sum(f.get_tensor(k).numel() for k in f.keys() if not k.startswith("object/"))
    assert held == sum(max(1, len(v)) for _, v in truth.values()), "each element is stored once"
    script = Path(__file__).with_name("stock_load.py")
    for world in (1, 2, 3):
        out = tmp_path / f"loaded{world}.json"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world), str(script), str(images), str(out)]
        clean = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"CKPTD_DISABLE": "1"}  # nor watched
        done = subprocess.run(command, env=clean, cwd=tmp_path, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr[-3000:]
        assert json.loads(out.read_text()) == truth
    print(f"{len(truth)} tensors of 4 ranks, equal in stock PyTorch on 1, 2 and 3 ranks")
