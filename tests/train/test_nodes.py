"""A job whose ranks live under several daemons: commit over all of them, restore from each other's memory, persist together."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import ckptd
from tests.forks import ranks
from tests.train.harness import stop_daemon

pytestmark = pytest.mark.timeout(200)


@pytest.fixture
def place(tmp_path):
    yield tmp_path
    for name in ("d0", "d1", "d2", "d3", "d4"):
        stop_daemon(tmp_path / name)


def live(place: Path, nodes: list[int], *, start: int, steps: int, persist: bool = False, parity: int = 0, after=None):
    """Ranks under daemon d<nodes[rank]>; restores, trains, and says what it holds, step by step."""

    def work(rank):
        os.environ["CKPTD_DIR"] = str(place / f"d{nodes[rank]}")
        os.environ["LOCAL_RANK"] = str(sum(n == nodes[rank] for n in nodes[:rank]))
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(6, 33), nn.Linear(33, 5))
        fully_shard(model, mesh=init_device_mesh("cpu", (len(nodes),), mesh_dim_names=("dp",)))
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        session = ckptd.attach(model=model, optimizer=optimizer, job="nodes", store=place / "store", required=True, parity=parity)
        restored = session.restore()
        assert restored.step == start, restored
        x = torch.ones(4, 6)  # the same on all ranks: the numbers do not depend on how many there are
        for step in range(start + 1, start + steps + 1):
            model(x * step).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            session.step(step)
            assert session.wait("committed", step, timeout_s=20), session.status()
        if parity and steps:
            assert session.wait("protected", start + steps, timeout_s=20), session.status()
        if persist:
            session.persist(start + steps)
            assert session.wait("persisted", start + steps, timeout_s=20)
        if after is not None:
            after(session)
        session.close()
        whole = [float(p.full_tensor().detach().double().sum()) for p in model.parameters()]
        whole += [float(s["exp_avg"].full_tensor().double().sum()) for s in optimizer.state.values()]
        return [restored.source, whole]

    return ranks(len(nodes), work)


def test_two_daemons_commit_restore_and_persist_as_one(place):
    first = live(place, [0, 0, 1, 1], start=0, steps=4)
    assert {s for s, _ in first} == {"fresh"}
    swapped = live(place, [1, 1, 0, 0], start=4, steps=0)
    assert swapped[0] == ["memory", first[0][1]], "each rank's image came from the other daemon"
    fewer = live(place, [0, 1], start=4, steps=0)
    assert fewer[0] == ["memory", first[0][1]], "two ranks, one under each daemon, resharded"
    third = live(place, [1, 0, 2], start=4, steps=2, persist=True)
    assert third[0][0] == "memory", "a third node with nothing of its own"
    alone = live(place, [0], start=6, steps=0)
    assert alone[0] == ["nodes/step-00000006", third[0][1]], "one node's memory is not enough: the durable tier is"
    manifest = json.loads((place / "store" / "nodes" / "step-00000006" / "manifest.json").read_text())
    assert manifest["world_size"] == 3 and len(manifest["images"]) == 3


def test_a_lost_daemon_sends_all_ranks_to_the_durable_tier_together(place):
    first = live(place, [0, 0, 1, 1], start=0, steps=2, persist=True)
    live(place, [0, 0, 1, 1], start=2, steps=3)
    stop_daemon(place / "d1")  # node 1's memory is gone; node 0 still holds step 5
    again = live(place, [0, 0, 1, 1], start=2, steps=0)
    assert [s for s, _ in again] == ["nodes/step-00000002"] * 4 and again[0][1] == first[0][1]


@pytest.mark.parametrize(("nodes", "parity", "lost"), [([0, 0, 1, 1], 1, [1]), ([0, 1, 2, 3], 1, [2]), ([0, 1, 1, 2, 3, 4], 2, [1, 4])])
def test_lost_nodes_cost_no_step_and_no_storage_is_read(place, nodes, parity, lost):
    """Their daemons and ranks are gone; the others decode what they held, on fewer ranks."""
    live(place, nodes, start=0, steps=3, parity=parity)
    for n in lost:
        stop_daemon(place / f"d{n}")
    left = [n for n in nodes if n not in lost]
    again = live(place, left, start=3, steps=2, parity=min(parity, len({*left}) - 1))
    assert [s for s, _ in again] == ["memory"] * len(left)
    alone = live(place / "alone", [0], start=0, steps=5)
    stop_daemon(place / "alone" / "d0")
    # Six ranks' average is no exact sixth: processors differ in the last bits of single numbers, and sums of moments nearly cancel.
    assert again[0][1] == pytest.approx(alone[0][1], rel=1e-6, abs=1e-6), "it went on as if nothing had happened"
    back = live(place, left, start=5, steps=0, parity=min(parity, len({*left}) - 1))
    assert back[0] == ["memory", again[0][1]]


def test_two_losses_one_after_the_other(place):
    """After the first loss the next step is protected by those who are left; so the second costs nothing either."""
    live(place, [0, 1, 2, 3], start=0, steps=2, parity=1)
    stop_daemon(place / "d3")
    live(place, [0, 1, 2], start=2, steps=1, parity=1)
    stop_daemon(place / "d0")
    last = live(place, [1, 2], start=3, steps=0, parity=1)
    assert [s for s, _ in last] == ["memory"] * 2


def test_two_losses_without_a_step_between_them(place):
    """A restore is followed by a snapshot of what was restored, protected by the nodes that are left: it is rebuilt before any step is made."""

    def rest(session):
        assert session.wait("protected", 2, timeout_s=20), session.status()

    live(place, [0, 1, 2, 3], start=0, steps=2, parity=1)
    stop_daemon(place / "d3")
    first = live(place, [0, 1, 2], start=2, steps=0, parity=1, after=rest)
    stop_daemon(place / "d0")
    last = live(place, [1, 2], start=2, steps=0, parity=1, after=rest)
    assert last[0] == ["memory", first[0][1]]
