"""What only NCCL on a GPU shows of the tap and of the profiler plugin. One device is enough: two ranks share it (see `ranks.py`). Run: pytest -m gpu."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
import torch

from ckptd.monitor import record
from tests.gpu.spawned import run_ranks

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

ALONE = ["all_reduce", "all_gather", "reduce_scatter", "broadcast", "reduce", "all_to_all", "all_gather", "barrier", "all_reduce"]
TWO = [*ALONE[:-1], "send", "recv", "all_reduce"]


def operations(said: dict) -> list[dict]:
    return [r for r in said["records"] if not r["mark"]]


def test_a_rank_alone_every_operation_is_recorded_once():
    (said,) = run_ranks(1, "cuda", "ops")
    assert [r["op"] for r in operations(said)] == ALONE
    assert all(r["flags"] & record.DEVICE for r in operations(said) if r["op"] != "barrier")
    assert said["errors"] == 0
    assert said["plugin"], said["why"]


def test_the_taps_own_times_are_those_of_events():
    """A group of one never reaches a profiler: these are the tap's events."""
    (said,) = run_ranks(1, "cuda", "timing")
    print("tap beside events, us:", [(t["bytes"], t["inside_us"], t["event_us"]) for t in said["timed"]], "layer", said["layer"])
    assert all(t["records"] == 1 for t in said["timed"])
    if said["layer"] not in ("native", "hooks"):
        pytest.skip(f"the layer {said['layer']!r} does not time devices by itself")
    for t in said["timed"]:
        assert t["inside_us"] > 0, t
        assert abs(t["inside_us"] - t["event_us"]) < max(0.3 * t["event_us"], 60), t


@pytest.mark.parametrize("world", [1, 2])
def test_capture_into_a_graph_is_seen_and_not_disturbed(world):
    for said in run_ranks(world, "cuda", "graph"):
        assert said["value"] == 4.0, "1, and 1 for each replay"
        captured = [r for r in operations(said) if r["op"] == "all_gather"]
        assert len(captured) == 1
        assert captured[0]["flags"] & record.CAPTURED, "recorded, not run"
        assert captured[0]["inside_us"] == 0
        assert said["errors"] == 0
        replays = [r for r in said["records"] if r["mark"] and r["op"] == "nccl"]
        print(f"world {world}: {len(replays)} marks of replays, us: {[r['inside_us'] for r in replays]}")
        if world == 2 and said["layer"] == "native":
            assert len(replays) == 3
            assert all(r["dtype"] == "all_gather" and r["inside_us"] > 0 for r in replays)


def test_two_ranks_on_one_device_are_timed_by_the_plugin():
    for said in run_ranks(2, "cuda", "ops", env={"CKPTD_NCCL_TIMES": "1"}):
        assert said["plugin"], said["why"]
        assert said["attached"]
        ops = operations(said)
        assert [r["op"] for r in ops] == TWO
        print("rank", said["rank"], [(r["op"], r["inside_us"], r["lasted_us"]) for r in ops], said["counts"])
        counts = said["counts"]
        assert counts["operations"] >= len(TWO)
        assert counts["matched"] >= 0.8 * counts["operations"], "NCCL's operations and c10d's calls are the same"
        assert counts["timed"] > 0
        assert counts["lost"] == 0
        untimed = [r["op"] for r in ops if not r["inside_us"]]
        assert not untimed


def test_who_waits_for_a_late_rank_is_inside_on_the_device():
    waiting, late = (operations(s) for s in run_ranks(2, "cuda", "straggler"))
    print("inside, us:", [r["inside_us"] for r in waiting], [r["inside_us"] for r in late])
    assert len(waiting) == len(late) == 5
    assert waiting[3]["inside_us"] > late[3]["inside_us"] + 20_000
    assert waiting[3]["inside_us"] > 20_000


def test_waits_of_proxies_are_told_when_asked_for():
    for said in run_ranks(2, "cuda", "waits"):
        assert not [r for r in said["before"] if r["mark"]]
        if said["layer"] != "native":
            pytest.skip(f"beside a writer of the layer {said['layer']!r} no marks are made")
        told = [r for r in said["records"] if r["mark"] and r["flags"] & record.P2P]
        print(f"rank {said['rank']}: {len(told)} transfers, e.g. {told[:2]}")
        assert {r["dtype"] for r in told} == {"send", "recv"}
        assert {r["peer"] for r in told} == {1 - said["rank"]}


def test_a_users_plugin_is_loaded_behind_ours(tmp_path):
    user = tmp_path / "libuser.so"
    source = Path(__file__).parent.parent / "monitor" / "nccl_user_plugin.c"
    subprocess.run([os.environ.get("CC", "cc"), "-O1", "-fPIC", "-shared", "-DVERSION=5", "-DREAL", "-o", user, source], check=True)
    for said in run_ranks(2, "cuda", "ops", env={"NCCL_PROFILER_PLUGIN": str(user)}):
        assert said["plugin"], said["why"]
        assert said["counts"]["forwarded"] > 0
        assert "user's plugin: version 5" in said["stderr"], said["stderr"]
        assert "wrong 0" in said["stderr"], said["stderr"]


def test_switched_off_nothing_is_loaded():
    for said in run_ranks(2, "cuda", "ops", env={"CKPTD_NCCL_PROFILER": "0"}):
        assert not said["plugin"]
        assert said["counts"] == {}
        assert [r["op"] for r in operations(said)] == TWO
