"""The program that the tests of the tap on a GPU run, kept working on a CPU, where it runs over gloo."""

from __future__ import annotations

import pytest
import torch

from tests.gpu.spawned import run_ranks

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")


@pytest.fixture(scope="module")
def said():
    return run_ranks(2, "cpu", "ops", "straggler")


def test_every_operation_is_recorded_once(said):
    for rank in said:
        ops = [r["op"] for r in rank["ops"]["records"] if not r["mark"]]
        assert ops == [
            "all_reduce", "all_gather", "reduce_scatter", "broadcast", "reduce", "all_to_all", "all_gather", "barrier", "send", "recv", "all_reduce",
        ]  # fmt: skip
        assert not rank["ops"]["errors"]


def test_who_waits_for_a_late_rank_is_inside(said):
    waiting, late = ([r for r in rank["straggler"]["records"] if not r["mark"]] for rank in said)
    assert len(waiting) == len(late) == 5
    assert waiting[3]["lasted_us"] > late[3]["lasted_us"] + 20_000
