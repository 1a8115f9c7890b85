"""Silent corruption in a real job: one bit of one rank's copy flips, and the rank and the tensor are named when the step is COMMITTED."""

from __future__ import annotations

import os
import time

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import ckptd
from ckptd.capture import sum_of
from tests.forks import ranks
from tests.train.harness import stop_daemon

pytestmark = pytest.mark.timeout(120)


def committed(session: ckptd.Session, step: int) -> bool:
    """Wait until it is; False if some rank had no free slot and skipped it, as ranks that wait for a processor may."""
    until = time.monotonic() + 30
    while time.monotonic() < until:
        reached = session.status()["reached"]
        if reached.get("committed", 0) >= step:
            return True
        if reached.get("skipped", 0) >= step:
            return False
        time.sleep(0.02)
    raise TimeoutError(session.status())


def suspects(place, world: int, wrong: int | None, *, nodes: int = 1) -> list[list[dict]]:
    def work(rank):
        os.environ |= {"CKPTD_DIR": str(place / f"d{rank % nodes}"), "LOCAL_RANK": str(rank // nodes)}
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(6, 33), nn.Linear(33, 5))
        ddp = DistributedDataParallel(model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        session = ckptd.attach(model=ddp, optimizer=optimizer, job="replicas", required=True, check_replicas_every=3)
        session.restore()
        skipped = 0
        for step in range(1, 13):
            ddp(torch.ones(4, 6) * (rank + 1)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            if rank == wrong and step == 5:
                with torch.no_grad():
                    model[1].weight.view(torch.int32)[2, 7] ^= 1 << 3  # a cosmic ray
            session.step(step)
            skipped += not committed(session, step)
        from ckptd.channel import socket_path
        from ckptd.core import wire
        from ckptd.launch import _ask

        found = _ask(socket_path(None), wire.Status(id=2)).status["jobs"]["replicas"]["suspected"]
        session.close()
        return found + [{"counts": session.status()["counts"].get("replicas differ", 0), "skipped": skipped}]

    try:
        return ranks(world, work)
    finally:
        for n in range(nodes):
            stop_daemon(place / f"d{n}")


@pytest.mark.parametrize("nodes", [1, 2])
def test_the_rank_and_the_tensor_are_named(tmp_path, nodes):
    found = suspects(tmp_path, 3, 1, nodes=nodes)[0]
    told = found.pop()
    assert {tuple(f["ranks"]) for f in found} == {(1,)} and told["counts"] > 0
    assert min(f["step"] for f in found) <= 8 + told["skipped"], "within as many steps as were asked for"
    assert "model.1.weight" in {t for f in found for t in f["tensors"]}


def test_nobody_is_suspected_where_nothing_is_wrong(tmp_path):
    assert [f["counts"] for f in suspects(tmp_path, 3, None)[0]] == [0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
def test_a_devices_own_hash_sees_every_bit(dtype):
    t = torch.arange(1001).remainder(2).to(dtype)
    before = int(sum_of(t))
    assert int(sum_of(t.clone())) == before
    raw = t.view(torch.uint8)
    for at in range(0, raw.numel(), 37):
        raw[at] ^= 1
        assert int(sum_of(t)) != before, at
        raw[at] ^= 1
    swapped = t.clone()
    swapped[[0, 1]] = swapped[[1, 0]]
    assert int(sum_of(swapped)) != before


def test_sharded_replicas_are_compared_too(tmp_path):
    """HSDP: each shard is held by two ranks; and a tensor that cannot be hashed costs no snapshot (it did)."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    def work(rank):
        os.environ |= {"CKPTD_DIR": str(tmp_path / "d0"), "LOCAL_RANK": str(rank)}
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(6, 33), nn.Linear(33, 5))
        fully_shard(model, mesh=init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "shard")))
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        session = ckptd.attach(model=model, optimizer=optimizer, job="hsdp", required=True, check_replicas_every=1)
        session.restore()
        for step in range(1, 5):
            model(torch.ones(4, 6)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            if rank == 3 and step == 3:
                with torch.no_grad():
                    model[1].weight.to_local().view(torch.int32)[0, 0] ^= 1
            session.step(step)
            assert session.wait("committed", step, timeout_s=20), session.status()
        counts = session.status()["counts"]
        session.close()
        return [counts.get("replicas differ", 0), counts.get("skipped", 0)]

    try:
        found = ranks(4, work)
    finally:
        stop_daemon(tmp_path / "d0")
    assert found[0][0] > 0 and [skipped for _, skipped in found] == [0, 0, 0, 0]
