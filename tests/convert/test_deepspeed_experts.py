"""DeepSpeed's mixture of experts against DeepSpeed: ZeRO-1, ZeRO-2 and BF16_Optimizer with ep_size 1 and 2 on 2 and 4 ranks are read bit by bit as the ranks
say they hold them, and come back from other formats. The runs are real (`deepspeed_job.Experts`); what only old versions write is made of theirs.
"""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

import pytest
import torch

from ckptd.convert import convert
from ckptd.errors import BadForeign
from ckptd.formats import WriteOptions
from tests.convert.roundtrip import state, there_and_back
from tests.convert.test_deepspeed import held, read

pytestmark = [pytest.mark.timeout(600), pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed: see scripts/setup")]
SOURCES = {  # name -> (world, task)
    "1-of-2": (2, {"stage": 2, "dtype": "bf16", "ep": 1}),
    "2-of-2": (2, {"stage": 2, "dtype": "fp32", "ep": 2}),
    "2-of-4": (4, {"stage": 2, "dtype": "bf16", "ep": 2}),
    "bf16opt": (4, {"stage": 1, "dtype": "bf16", "ep": 2, "config": {"data_types": {"grad_accum_dtype": "fp32"}}}),
    "data-first": (4, {"stage": 1, "dtype": "fp32", "ep": 2, "config": {"use_data_before_expert_parallelism": True}}),
}


@pytest.fixture(scope="module")
def root(zero_root):
    (zero_root / "experts").mkdir()
    return zero_root / "experts"


@pytest.fixture(scope="module")
def sources(root, zero_server):
    found = {}
    for world in (2, 4):
        named = {n: t for n, (w, t) in SOURCES.items() if w == world}
        tasks = [t | {"train": 3, "save": str(root / n), "dump": str(root / f"{n}.pt")} for n, t in named.items()]
        found |= dict(zip(named, zero_server.ask(world, tasks), strict=True))
    return found


def compare(said: dict, checkpoint, tensors: dict, dtype: str) -> None:
    """Everything the ranks say they hold is what was read, and nothing else was."""
    for fqn, master in said["master"].items():
        assert torch.equal(tensors[f"model.{fqn}"], master), fqn
        for slot, value in said["state"][fqn].items():
            assert torch.equal(tensors[f"optim.state.{fqn}.{slot}"], value), (fqn, slot)
        assert float(tensors[f"optim.state.{fqn}.step"]) == 3
        assert checkpoint.derived.get(f"model.{fqn}", "F32") == {"bf16": "BF16", "fp32": "F32"}[dtype]
    for fqn, weight in said["module"].items():
        assert torch.equal(tensors[f"model.{fqn}"].to(weight.dtype), weight), fqn
    for fqn, buffer in said["buffers"].items():
        assert torch.equal(tensors[f"model.{fqn}"], buffer), fqn
    assert set(tensors) == {f"model.{n}" for n in {*said["module"], *said["buffers"]}} | {
        f"optim.state.{n}.{s}" for n in said["master"] for s in ("exp_avg", "exp_avg_sq", "step")
    }
    assert checkpoint.buffers == {f"model.{n}" for n in said["buffers"]}
    assert [{k: v for k, v in g.items() if k != "params"} for g in checkpoint.groups] == said["groups"]
    assert checkpoint.objects["step"] == 3
    assert not checkpoint.notes


@pytest.mark.parametrize("name", [*SOURCES])
def test_reads_what_the_ranks_say_they_hold(root, sources, name):
    world, task = SOURCES[name]
    kind, checkpoint, tensors = read(root / name)
    assert kind == f"zero{task['stage']}"
    said = held(root, name)
    assert sum(".deepspeed_experts." in n for n in said["master"]) == 4 * 4 + 4 * 2
    compare(said, checkpoint, tensors, task["dtype"])
    order = [g["params"] for g in checkpoint.groups]
    alone = [g["params"] for g in read(root / "1-of-2")[1].groups]
    assert order == alone  # as a run that holds all experts on every rank has them


def test_there_and_back(root, sources, tmp_path):
    def back(number: int, to: str) -> tuple[str, WriteOptions]:
        buffers = {"buffers": "*.calls"} if to in {"ckptd", "dcp", "dcp-safetensors", "torch"} else {}
        return f"zero{1 + number % 3}", WriteOptions(ranks=1 + number % 4, dtype="BF16", drop=frozenset({"objects"}), config=buffers)

    there_and_back(root / "2-of-4", tmp_path, back)


def test_deepspeed_loads_it_with_another_ep_size_by_way_of_a_universal_checkpoint(root, sources, zero_server):
    """Its own converter leaves native experts out. Its loader goes by a rank's own names: all experts must be on every rank (ep_size 1)."""
    report = convert(str(root / "2-of-4"), str(root / "uni"), "universal", check=True, workers=1, sync=False)
    assert not report.dropped
    task = {"stage": 2, "dtype": "bf16", "ep": 1, "seed": 99, "universal": True, "load": str(root / "uni"), "dump": str(root / "uni.pt"), "next": 1}
    zero_server.ask(2, [task])
    now, was = held(root, "uni"), held(root, "2-of-4")
    for part in ("master", "module"):
        assert now[part].keys() == was[part].keys()
        assert all(torch.equal(now[part][n], v) for n, v in was[part].items()), part
    assert all(torch.equal(now["state"][n][s], v) for n, slots in was["state"].items() for s, v in slots.items())
    assert now["steps"] == was["steps"]


def _each(folder: Path, pattern: str, change) -> None:
    for file in (folder / "global_step3").glob(pattern):
        tree = torch.load(file, weights_only=False)
        change(tree)
        torch.save(tree, file)


def test_old_versions_left_out_the_shapes(root, sources, tmp_path):
    """DeepSpeed 0.16 writes no `param_shapes` beside experts, and empty optimizer files for each share of them."""
    folder = tmp_path / "old"
    shutil.copytree(root / "2-of-4", folder)
    _each(folder, "mp_rank_*", lambda tree: tree.pop("param_shapes"))
    for share in (0, 1):
        torch.save({"optimizer": None}, folder / "global_step3" / f"expp_rank_{share}_mp_rank_00_optim_states.pt")
    assert state(folder) == state(root / "2-of-4")
    _each(folder, "mp_rank_*", lambda tree: tree["ds_config"]["zero_optimization"].update(round_robin_gradients=True))
    with pytest.raises(BadForeign, match="param_shapes are not there"):
        read(folder)


def _gone(folder: Path) -> None:
    (folder / "global_step3" / "layer_1_expert_3_mp_rank_00_model_states.pt").unlink()


def _other(folder: Path) -> None:
    shutil.copy(folder / "global_step3" / "layer_1_expert_3_mp_rank_00_model_states.pt", folder / "global_step3" / "layer_1_expert_2_mp_rank_00_model_states.pt")


def _ungrouped(folder: Path) -> None:
    _each(folder, "*optim_states.pt", lambda tree: tree["optimizer_state_dict"].update(partition_count=[2, 4, 2, 2]))


def _automatic(folder: Path) -> None:
    _each(folder, "mp_rank_*", lambda tree: tree.update(ds_autoep_layers=[{"module_path": "first"}]))


def _otherwise_ordered(folder: Path) -> None:
    _each(folder, "mp_rank_*", lambda tree: tree["ds_config"].update(use_data_before_expert_parallelism=True))


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (_gone, "layer_1_expert_3.* is missing; its layers have 4, 4 experts"), (_other, "is no tensor of expert 2"), (_ungrouped, "wte.weight is partitioned over one of 2"),
        (_automatic, "AutoEP"), (_otherwise_ordered, "param_slice_mappings places"),
    ],
)  # fmt: skip
def test_what_does_not_fit_together_is_refused_by_name(root, sources, tmp_path, spoil, said):
    shutil.copytree(root / "2-of-4", tmp_path / "t")
    spoil(tmp_path / "t")
    with pytest.raises(BadForeign, match=said):
        read(tmp_path / "t")
