"""DeepSpeed without ZeRO against DeepSpeed: what its torch optimizer, its 16-bit optimizers (one master for each parameter, or FusedAdam's flat ones) and ranks with
experts say they hold is read bit by bit; engines with ZeRO load what it was converted to, and train on as the run that was never converted.
"""

from __future__ import annotations

import importlib.util
import shutil

import pytest
import torch

from ckptd.convert import convert
from ckptd.core.logical import Checkpoint
from ckptd.errors import BadArgument, BadForeign
from ckptd.formats import ReadOptions, WriteOptions, place_of, recognise
from ckptd.integrations.deepspeed import ZERO0
from tests.convert.roundtrip import there_and_back
from tests.convert.test_deepspeed import GROUPS, compare, held, near, same, tensors_of

pytestmark = [pytest.mark.timeout(600), pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed: see scripts/setup")]
SOURCES = {
    "fp32": {"dtype": "fp32"}, "bf16": {"dtype": "bf16"}, "fp16": {"dtype": "fp16"}, "fused": {"dtype": "bf16", "fused": True}, "experts": {"dtype": "bf16", "ep": 2},
    "sgd": {"dtype": "fp32", "optimizer": "sgd"},
}  # fmt: skip
HINT = [n for g in GROUPS for n in g]


@pytest.fixture(scope="module")
def root(zero_root):
    (zero_root / "plain").mkdir()
    return zero_root / "plain"


@pytest.fixture(scope="module")
def sources(root, zero_server):
    tasks = [t | {"stage": 0, "train": 3, "save": str(root / n), "dump": str(root / f"{n}.pt"), "next": 2} for n, t in SOURCES.items()]
    return {n: t | a for n, t, a in zip(SOURCES, tasks, zero_server.ask(2, tasks), strict=True)}


def read(path, hint=()) -> tuple[Checkpoint, dict[str, torch.Tensor]]:
    place = place_of(str(path))
    assert recognise(place) is ZERO0
    return tensors_of(place, ZERO0.read(place, ReadOptions(hints={"params": hint})))


@pytest.mark.parametrize("name", ["fp32", "bf16", "fp16", "fused", "sgd"])
def test_reads_what_deepspeed_says_it_holds(root, sources, name):
    checkpoint, tensors = read(root / name, HINT if name == "fused" else ())
    compare(held(root, name), checkpoint, tensors, computes=SOURCES[name]["dtype"])
    assert [g["params"] for g in checkpoint.groups] == GROUPS
    assert not checkpoint.notes


def test_experts_without_zero(root, sources, tmp_path):
    """Each share of them has an optimizer of its own, all with the dense parameters, which are compared; names follow from shapes."""
    checkpoint, tensors = read(root / "experts")
    said = held(root, "experts")
    for fqn, master in said["master"].items():
        assert torch.equal(tensors[f"model.{fqn}"], master), fqn
        assert all(torch.equal(tensors[f"optim.state.{fqn}.{s}"], v) for s, v in said["state"][fqn].items()), fqn
    assert len([n for n in tensors if n.endswith(".step")]) == len(said["master"])
    assert all(torch.equal(tensors[f"model.{n}"], b) for n, b in said["buffers"].items())
    assert checkpoint.buffers == {f"model.{n}" for n in said["buffers"]}
    assert [{k: v for k, v in g.items() if k != "params"} for g in checkpoint.groups] == said["groups"]
    names = [n for g in checkpoint.groups for n in g["params"]]
    assert sorted(names) == sorted(said["master"])
    assert "first.deepspeed_moe.experts.deepspeed_experts.3.up.weight" in names

    def back(number: int, to: str) -> tuple[str, WriteOptions]:
        return f"zero{1 + number % 3}", WriteOptions(ranks=2, dtype="BF16", drop=frozenset({"objects"}), config={"buffers": "*.calls"} if to == "ckptd" else {})

    there_and_back(root / "experts", tmp_path, back, ("ckptd", "zero2"))


@pytest.mark.parametrize(("name", "stage"), [("fp32", 2), ("fused", 1)])
def test_engines_with_zero_load_what_it_was_converted_to(root, sources, zero_server, name, stage):
    target = root / f"{name}-{stage}"
    report = convert(
        str(root / name), str(target), f"zero{stage}", read=ReadOptions(hints={"params": ",".join(HINT)}), write=WriteOptions(ranks=2), check=True, workers=1, sync=False
    )
    assert not report.dropped
    task = {"stage": stage, "dtype": SOURCES[name]["dtype"], "seed": 99, "load": str(target), "dump": f"{target}.pt", "next": 2}
    (answer,) = zero_server.ask(2, [task])
    same(held(root, target.name), held(root, name))
    near(answer["next"], sources[name]["next"], SOURCES[name]["dtype"])
    assert answer["client"] == {"note": "client", "list": [1, 2.5, None]}


def test_what_no_shape_tells_is_asked_for(root, sources, tmp_path):
    """Before the first step there is no state; a flat group has one shape."""
    shutil.copytree(root / "fp32", tmp_path / "t")
    file = tmp_path / "t" / "global_step3" / "mp_rank_00_model_states.pt"
    states = torch.load(file, weights_only=False)
    states["optimizer"]["state"] = {}
    torch.save(states, file)
    with pytest.raises(BadArgument, match="several ways"):
        read(tmp_path / "t")
    assert [g["params"] for g in read(tmp_path / "t", HINT)[0].groups] == GROUPS
    with pytest.raises(BadArgument, match="2 flat groups of 161, 27 elements"):
        read(root / "fused")
    with pytest.raises(BadArgument, match="frozen.bias"):
        read(root / "fused", hint=[*HINT[:-1], "frozen.bias.x"])
    with pytest.raises(BadArgument, match="flat groups"):
        read(root / "fused", hint=HINT[::-1])
    with pytest.raises(BadArgument, match="zero1"):
        ZERO0.write(Checkpoint("zero0"), WriteOptions())


def test_what_is_no_whole_checkpoint_is_refused_by_name(root, sources, tmp_path):
    shutil.copytree(root / "bf16", tmp_path / "t")
    file = tmp_path / "t" / "global_step3" / "mp_rank_00_model_states.pt"
    whole = torch.load(file, weights_only=False)
    shutil.copy(file, file.with_name("mp_rank_02_model_states.pt"))
    with pytest.raises(BadForeign, match="2 model_states files of 3 mp ranks"):
        read(tmp_path / "t")
    file.with_name("mp_rank_02_model_states.pt").unlink()
    for change, said in (
        (lambda t: t.update(module=None), "pipeline without ZeRO"), (lambda t: t["optimizer"]["fp32_groups"].pop(), "masters for groups of"),
        (lambda t: t["optimizer"]["optimizer_state_dict"]["state"].update({99: {}}), "in no group"), (lambda t: t.update(optimizer=[1]), "is a list, not a dict"),
    ):  # fmt: skip
        torch.save(whole, file)
        spoilt = torch.load(file, weights_only=False)
        change(spoilt)
        torch.save(spoilt, file)
        with pytest.raises(BadForeign, match=said):
            read(tmp_path / "t")
    torch.save(whole | {"param_shapes": [{}]}, file)  # ZeRO's, and its files are gone
    assert not ZERO0.probe(place_of(str(tmp_path / "t")))
