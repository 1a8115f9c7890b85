"""From memory into any other parallelism: every layout of the GPT into every other one, weights and moments bit-equal."""

from __future__ import annotations

import sys

import pytest
import torch.distributed as dist

import ckptd
from tests.forks import ranks
from tests.train.harness import ROOT, stop_daemon

pytestmark = pytest.mark.timeout(400)

SAVED = ["fsdp", "hsdp", "ddp", "tp_fsdp", "pp_fsdp"]
TARGETS = [("plain", 1), ("ddp", 2), ("fsdp", 3), ("hsdp", 4), ("tp_fsdp", 4), ("tp_fsdp", 2), ("pp_fsdp", 4)]


def gpt(parallel: str, work):
    """Build the GPT in a layout inside a forked rank and hand it to `work`."""

    def run(rank):
        sys.path.insert(0, str(ROOT / "scripts"))
        import torch
        import train_gpt as g

        sys.argv = ["train", "--out", "unused", "--parallel", "fsdp" if parallel == "plain" else parallel, "--batch", "12"]
        a = g.parse()
        torch.manual_seed(a.seed)
        model, step, dp_rank, dp_size = g.build(a)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        loader = g.Loader(a, dp_rank, dp_size)
        session = ckptd.attach(model=model, optimizer=optimizer, extras={"loader": loader}, required=True)
        return work(g, session, model, step, optimizer, loader)

    return run


def hashes(g, model, optimizer):
    mine = {n: g.hash_of(g.full(t)) for n, t in g.state_of(model, optimizer).items()}
    return {n: h for n, h in mine.items() if not n.endswith("calls")}


def train(g, session, model, step, optimizer, loader):
    session.restore()
    for number in range(1, 4):
        x, y, _ = next(loader)
        step(x, y)
        optimizer.step()
        optimizer.zero_grad()
        session.step(number)
    assert session.wait("committed", 3, timeout_s=30)
    session.close()
    return hashes(g, model, optimizer)


def come_back(g, session, model, step, optimizer, loader):
    restored = session.restore()
    assert (restored.step, restored.source, restored.missing, restored.unexpected) == (3, "memory", (), ())
    session.close()
    return [hashes(g, model, optimizer), loader.position, list(restored.warnings)]


def union(results):
    return {n: h for found in results for n, h in found.items()}


@pytest.mark.parametrize("saved", SAVED)
def test_any_layout_into_any_other(saved, tmp_path):
    env = {"CKPTD_DIR": str(tmp_path / "d"), "CKPTD_JOB": "reshard"}
    try:
        truth = union(ranks(4, gpt(saved, train), env=env))
        for target, count in TARGETS:
            back = ranks(count, gpt(target, come_back), env=env)
            found = union(b[0] for b in back)
            assert found == truth, (saved, target, sorted(n for n in truth if truth[n] != found.get(n))[:5])
            assert {b[1] for b in back} == {3}, "the loader goes on where it was"
            assert all(any("reseeded" in w for w in b[2]) for b in back) or target == saved, "a changed mesh is said so"
    finally:
        stop_daemon(tmp_path / "d")
    assert not dist.is_initialized()
    print(f"{saved} x 4 -> {', '.join(f'{t} x {c}' for t, c in TARGETS)}: {len(truth)} tensors each, bit-equal")
