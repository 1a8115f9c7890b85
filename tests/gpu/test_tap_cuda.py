"""What only NCCL on a GPU shows of the tap and of the profiler plugin. One device is enough: two ranks share it (see `ranks.py`). Run: pytest -m gpu."""

from __future__ import annotations

import os
import statistics
import subprocess
from pathlib import Path

import pytest
import torch

from ckptd.monitor import record
from tests.gpu.spawned import run_ranks

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

ALONE = ["all_reduce", "all_gather", "reduce_scatter", "broadcast", "reduce", "all_to_all", "all_gather", "barrier", "all_reduce"]
TWO = [*ALONE[:-1], "send", "recv", "all_reduce"]


@pytest.fixture(scope="module")
def alone():
    """A group of one: NCCL copies, or does nothing, and never asks a profiler."""
    return run_ranks(1, "cuda", "ops", "timing", "graph")[0]


@pytest.fixture(scope="module")
def together():
    """Two ranks on one device."""
    return run_ranks(2, "cuda", "ops", "straggler", timeout_s=50)


@pytest.fixture(scope="module")
def asking():
    """Two ranks, and what their proxies wait for."""
    return run_ranks(2, "cuda", "waits", timeout_s=40)


@pytest.fixture(scope="module")
def replaying():
    """Two ranks, and a graph."""
    return run_ranks(2, "cuda", "graph", timeout_s=40)


def found(said: dict, case: str) -> dict:
    assert "failed" not in said[case], said[case]["failed"]
    return said[case]


def operations(case: dict) -> list[dict]:
    return [r for r in case["records"] if not r["mark"]]


def test_a_rank_alone_every_operation_is_recorded_once(alone):
    case = found(alone, "ops")
    assert [r["op"] for r in operations(case)] == ALONE
    assert all(r["flags"] & record.DEVICE for r in operations(case) if r["op"] != "barrier")
    assert case["errors"] == 0
    assert alone["plugin"], alone["why"]


def test_the_taps_own_times_are_those_of_events(alone):
    """No plugin has a part in these: they are the tap's events."""
    case = found(alone, "timing")
    print("tap beside events, us:", [(t["bytes"], t["inside_us"], t["event_us"]) for t in case["timed"] if t["inside_us"]], "layer", case["layer"])
    assert all(t["records"] == 1 for t in case["timed"])
    if case["layer"] not in ("native", "hooks"):
        pytest.skip(f"the layer {case['layer']!r} does not time devices by itself")
    timed = [t for t in case["timed"] if t["inside_us"]]
    assert {t["bytes"] for t in timed} == {t["bytes"] for t in case["timed"]}, "some of each size"
    # The events stand around Python's call, 0.1 ms or so apart where nothing is moved; the tap's stand around the operation.
    assert all(t["inside_us"] <= t["event_us"] + 20 for t in timed)
    largest = max(t["bytes"] for t in timed)
    of_tap, of_events = (statistics.median(t[what] for t in timed if t["bytes"] == largest) for what in ("inside_us", "event_us"))
    assert of_events - of_tap < 0.4 * of_events


def check_graph(case: dict) -> list[dict]:
    assert case["value"] == 4.0, "1, and 1 for each replay"
    captured = [r for r in operations(case) if r["op"] == "all_gather"]
    assert len(captured) == 1
    assert captured[0]["flags"] & record.CAPTURED, "recorded, not run"
    assert captured[0]["inside_us"] == 0
    assert case["errors"] == 0
    return [r for r in case["records"] if r["mark"] and r["op"] == "nccl" and not r["flags"] & record.P2P]


def test_capture_into_a_graph_is_seen_and_not_disturbed(alone):
    assert check_graph(found(alone, "graph")) == []


def test_replays_of_a_graph_are_timed_by_the_plugin(replaying):
    for said in replaying:
        case = found(said, "graph")
        replays = check_graph(case)
        print(f"{len(replays)} marks of replays, us: {[r['inside_us'] for r in replays]}", case["counts"])
        if case["layer"] != "native":
            pytest.skip(f"beside a writer of the layer {case['layer']!r} no marks are made")
        assert len(replays) == 3
        assert all(r["dtype"] == "all_gather" and r["inside_us"] > 0 for r in replays)


def test_two_ranks_on_one_device_are_timed_by_the_plugin(together):
    for said in together:
        assert said["plugin"], said["why"]
        assert said["attached"]
        case = found(said, "ops")
        ops, counts = operations(case), case["counts"]
        print("rank", said["rank"], [(r["op"], r["inside_us"], r["lasted_us"]) for r in ops], counts)
        assert [r["op"] for r in ops] == TWO
        assert counts["operations"] >= len(TWO)
        assert counts["matched"] >= 0.8 * counts["operations"], "NCCL's operations and c10d's calls are the same"
        assert counts["timed"] > 0
        assert counts["lost"] == 0
        assert not [r["op"] for r in ops if not r["inside_us"]]


def test_who_waits_for_a_late_rank_is_inside_on_the_device(together):
    waiting, late = (operations(found(said, "straggler")) for said in together)
    print("inside, us:", [r["inside_us"] for r in waiting], [r["inside_us"] for r in late])
    assert len(waiting) == len(late) == 5
    assert waiting[3]["inside_us"] > late[3]["inside_us"] + 20_000
    assert waiting[3]["inside_us"] > 20_000


def test_waits_of_proxies_are_told_when_asked_for(asking):
    for said in asking:
        case = found(said, "waits")
        assert not [r for r in case["before"] if r["mark"]]
        print(f"rank {said['rank']}:", case["counts"])
        if case["layer"] != "native":
            pytest.skip(f"beside a writer of the layer {case['layer']!r} no marks are made")
        told = [r for r in case["records"] if r["mark"] and r["flags"] & record.P2P]
        print(f"{len(told)} transfers, e.g. {told[:2]}")
        assert {r["dtype"] for r in told} == {"send", "recv"}
        assert {r["peer"] for r in told} == {1 - said["rank"]}


def test_a_users_plugin_is_loaded_behind_ours(tmp_path):
    user = tmp_path / "libuser.so"
    source = Path(__file__).parent.parent / "monitor" / "nccl_user_plugin.c"
    subprocess.run([os.environ.get("CC", "cc"), "-O1", "-fPIC", "-shared", "-DVERSION=5", "-DREAL", "-o", user, source], check=True)
    for said in run_ranks(2, "cuda", "ops", env={"NCCL_PROFILER_PLUGIN": str(user)}):
        assert said["plugin"], said["why"]
        assert found(said, "ops")["counts"]["forwarded"] > 0
        assert "user's plugin: version 5" in said["stderr"], said["stderr"]
        assert "wrong 0" in said["stderr"], said["stderr"]


def test_switched_off_nothing_is_loaded():
    for said in run_ranks(2, "cuda", "ops", env={"CKPTD_NCCL_PROFILER": "0"}):
        assert not said["plugin"]
        assert found(said, "ops")["counts"] == {}
        assert [r["op"] for r in operations(found(said, "ops"))] == TWO
