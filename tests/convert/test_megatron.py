"""Real megatron-core 0.16.1 on a CPU: what it saves is read bit for bit, what is written it loads at another TP and PP and trains on.

The truth is what the ranks held in memory when they saved (`megatron_job.Run.held`), put together by the offsets that the model itself states, never by the files.
Legacy files: Megatron-LM's own `save_checkpoint` cannot be installed without a GPU, so the job makes them, from the same `state_dict_for_save_checkpoint`,
`optimizer.state_dict` and `save_parameter_state` that Megatron-LM calls, in its layout of names and folders (formats.md 1.5).
Transformer Engine is not there: its names and the order of its parameters are tested on files that this package writes only.
"""

from __future__ import annotations

import importlib.util
import json
import os
import random
import select
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("megatron") is None, reason="needs megatron-core (the extra `megatron`)"),
]
pytest.importorskip("torch")

import torch  # noqa: E402

from ckptd.convert import convert  # noqa: E402
from ckptd.core.logical import Checkpoint  # noqa: E402
from ckptd.errors import BadForeign, CkptdError, NotFound, Unstorable  # noqa: E402
from ckptd.formats import ReadOptions, WriteOptions, place_of, recognise  # noqa: E402
from ckptd.integrations import megatron_layout as layout  # noqa: E402
from ckptd.integrations.megatron import LEGACY, TORCH_DIST  # noqa: E402
from ckptd.reading import Pool, Reading, compare_replicas, settle  # noqa: E402
from tests.convert.roundtrip import TARGETS, there_and_back  # noqa: E402
from tests.ports import free_port  # noqa: E402

JOB = Path(__file__).with_name("megatron_job.py")
SOURCES = {
    "tp2pp2": {"world": 4, "run": {"tp": 2, "pp": 2}, "sharding": [None]},
    "tp2": {"world": 4, "run": {"tp": 2, "dtype": "bf16", "optimizer": "dist", "tied": True}, "sharding": ["fully_reshardable", "dp_reshardable"]},
    "pp2": {"world": 4, "run": {"pp": 2, "dtype": "bf16", "optimizer": "dist", "tied": True, "bucket": 3000}, "sharding": ["fully_reshardable", "dp_reshardable"]},
    "moe": {"world": 2, "run": {"experts": 2}, "sharding": [None], "invented": True},
    "ep2": {"world": 2, "run": {"experts": 4, "ep": 2}, "sharding": [], "invented": True},
    "ep2pp2": {"world": 4, "run": {"experts": 4, "ep": 2, "pp": 2, "dtype": "bf16", "optimizer": "dist"}, "sharding": [], "invented": True},
}  # fmt: skip
STEPS = 2


class Ranks:
    """Four processes that stay: importing Megatron takes longer than all that they do."""

    def __init__(self, folder: Path):
        env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_DEVICE_MAX_CONNECTIONS": "1"}
        self.logs = [(folder / f"rank-{r}.log").open("w") for r in range(4)]
        self.processes = [
            subprocess.Popen(
                [sys.executable, str(JOB), str(r)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=env,
                bufsize=1,
            )
            for r, log in enumerate(self.logs)
        ]
        for process in self.processes:
            self.answer(process, 200)

    def answer(self, process, timeout_s):
        ready, _, _ = select.select([process.stdout], [], [], timeout_s)
        assert ready, "a rank does not answer"
        line = process.stdout.readline()
        assert line, "a rank is gone"
        return json.loads(line)

    def do(self, **command):
        command["port"] = free_port()
        began = time.monotonic()
        used = self.processes[: command["world"]]
        for process in used:
            process.stdin.write(json.dumps(command, default=str) + "\n")
            process.stdin.flush()
        answers = [self.answer(p, 120) for p in used]
        print(f"{command['run']}: {time.monotonic() - began:.1f} s")
        for answer in answers:
            assert "error" not in answer, answer["trace"]
        return answers[0]

    def close(self):
        family = [c for p in self.processes for c in psutil.Process(p.pid).children(recursive=True)] if self.processes else []
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.wait()
            process.stdin.close()
            process.stdout.close()
        for child in family:  # megatron-core's queues live in processes that outlast it
            try:
                child.kill()
            except psutil.NoSuchProcess:
                pass
        for log in self.logs:
            log.close()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    pool = Ranks(tmp_path_factory.mktemp("ranks"))
    yield pool
    pool.close()


class Source:
    """What one job saved: folders by sharding type, the losses of the steps after it, and what its ranks held."""

    def __init__(self, name, root, answer):
        self.root, self.after, self.run = root, answer["after"], SOURCES[name]["run"]
        self.legacy = str(root / "legacy")
        self.held = gathered(root, SOURCES[name]["run"].get("experts", 2))

    def folder(self, sharding=None, kind=""):
        return str(self.root / f"{sharding or 'plain'}{kind}")


@pytest.fixture(scope="module")
def saved(ranks, tmp_path_factory):
    """Jobs run when they are first asked for."""
    made = {}

    def get(name):
        if name not in made:
            root, said = tmp_path_factory.mktemp(name), SOURCES[name]
            saves = [[str(root / (s or "plain") / f"iter_{STEPS:07d}"), s, False] for s in said["sharding"]]
            if name == "moe":
                saves.append([str(root / "plain-singleton" / f"iter_{STEPS:07d}"), None, True])
            command = {
                "world": said["world"],
                "run": said["run"],
                "steps": STEPS,
                "save": saves,
                "dump": str(root / "held"),
                "legacy": str(root / "legacy"),
            }
            more = {"invented": True} if said.get("invented") else {"more": 2}
            made[name] = Source(name, root, ranks.do(**command, **more))
        return made[name]

    return get


def gathered(root, experts=2):
    """{canonical name: array} of all ranks' parts. 16-bit floats are compared as they are stored."""
    whole = {}
    for file in sorted(root.glob("held-*.pt")):
        for key, offset, shape, slot, tensor in torch.load(file):
            if slot == "step":
                whole.setdefault((key, slot), set()).add(float(tensor))
                continue
            ahead = len(shape) - tensor.dim()
            full = whole.setdefault((key, slot), torch.full(shape, float("nan"), dtype=tensor.dtype))
            place = [
                *(slice(o, o + 1) for o in offset[:ahead]),
                *(slice(o, o + n) for o, n in zip(offset[ahead:], tensor.shape, strict=True)),
            ]
            full[tuple(place)] = tensor.reshape((1,) * ahead + tuple(tensor.shape))
    made = {}
    for (key, slot), full in whole.items():
        for fqn, at in expanded(key, full.shape[1] if ".experts.experts." in key and slot != "step" else experts):
            name = f"optim.state.{fqn}.{slot}" if slot else f"model.{fqn}"
            if slot == "step":
                assert len(full) == 1
                made[name] = np.float32(full.copy().pop())
                continue
            part = full[at].contiguous()
            made[name] = (part.view(torch.uint16) if part.dtype == torch.bfloat16 else part).numpy()
    return made


def expanded(key, experts=2):
    """(name, index) of each layer and expert of a stacked key."""
    if not key.startswith("decoder.layers."):
        return [(key, ())]
    rest = key.removeprefix("decoder.layers.")
    if ".experts.experts." in key:
        return [
            (f"decoder.layers.{i}.{rest}".replace(".experts.experts.", f".experts.local_experts.{e}."), (i, e))
            for i in range(4)
            for e in range(experts)
        ]
    return [(f"decoder.layers.{i}.{rest}", (i,)) for i in range(4)]


def read(folder, **hints):
    place = place_of(folder)
    checkpoint = recognise(place).read(place, ReadOptions(hints=hints))
    checkpoint.prove()
    return place, checkpoint


def check(place, checkpoint: Checkpoint, held, *, copies=False):
    """Every tensor is what the ranks held, and there is no other."""
    assert set(checkpoint.tensors) == set(held)
    pool = Pool(1)
    with Reading(place, checkpoint) as reading:
        compared = compare_replicas(reading, pool)
        assert compared > 0 or not copies
        for name, want in held.items():
            got = reading.array(name)
            assert got.shape == want.shape and got.tobytes() == want.tobytes(), name
        settled = settle(reading, pool)
    pool.close()
    return settled


def close_enough(got, want):
    assert np.allclose(got, want, rtol=0, atol=1e-5), (got, want)


def roughly(got, want):
    """Sums in another order, in bfloat16."""
    assert np.allclose(got, want, rtol=0, atol=2e-3), (got, want)


# --- reading ----------------------------------------------------------------------------------------------------------------


def test_reads_torch_dist_of_tp2_pp2(saved):
    source = saved("tp2pp2")
    place, checkpoint = read(source.folder())
    check(place, checkpoint, source.held)
    assert checkpoint.format == "megatron"
    assert checkpoint.objects["step"] == STEPS
    assert checkpoint.objects["extras.args"]["tensor_model_parallel_size"] == 2
    assert checkpoint.objects["extras.args"]["params_dtype"] == "torch.float32"
    assert checkpoint.objects["extras.opt_param_scheduler"] == {"max_lr": 0.01, "num_steps": 4}
    assert any("padded from 50 to 64" in n for n in checkpoint.notes)
    assert sorted(checkpoint.per_rank) == [0, 1, 2, 3]
    decayed, undecayed = checkpoint.groups
    assert (decayed["wd_mult"], undecayed["wd_mult"]) == (1.0, 0.0)
    assert decayed["params"][:3] == [
        "embedding.word_embeddings.weight",
        "embedding.position_embeddings.weight",
        "decoder.layers.0.self_attention.linear_proj.weight",
    ]
    assert "decoder.layers.3.mlp.linear_fc1.layer_norm_weight" in undecayed["params"]
    assert len(decayed["params"]) + len(undecayed["params"]) == 53


def test_reads_fully_reshardable_of_tp2(saved):
    source = saved("tp2")
    place, checkpoint = read(source.folder("fully_reshardable"))
    settled = check(place, checkpoint, source.held)
    assert len(settled.derived) == 52 and set(settled.derived.values()) == {"BF16"}
    assert not any("master" in n for n in settled.tensors)


@pytest.mark.parametrize("name", ["tp2", "pp2"])
def test_reads_flat_buckets_of_dp_reshardable(saved, name):
    """tp2: one bucket, two tensor ranks. pp2: many buckets, and a tied embedding that both stages have, in a bucket of its own."""
    source = saved(name)
    place, checkpoint = read(source.folder("dp_reshardable"))
    settled = check(place, checkpoint, source.held, copies=True)
    assert len(settled.derived) == 52


def test_reads_experts_stacked_and_single(saved):
    source = saved("moe")
    for kind in ("", "-singleton"):
        place, checkpoint = read(source.folder(kind=kind))
        check(place, checkpoint, source.held)
        assert checkpoint.tensors["model.decoder.layers.3.mlp.experts.local_experts.1.linear_fc1.weight"].shape == (96, 32)


@pytest.mark.parametrize("name", ["tp2pp2", "tp2", "pp2", "moe"])
def test_reads_legacy(saved, name):
    source = saved(name)
    place, checkpoint = read(source.legacy)
    assert checkpoint.format == "megatron-legacy"
    held = source.held
    if (
        name == "moe"
    ):  # core's stacked keys give every norm its linear layer's name; the legacy names of a mixture of experts are the module's own
        held = {n.replace("mlp.linear_fc1.layer_norm_", "pre_mlp_layernorm."): v for n, v in held.items()}
    settled = check(place, checkpoint, held, copies=name != "moe")
    assert len(settled.derived) == (52 if name in {"tp2", "pp2"} else 0)
    assert checkpoint.objects["step"] == STEPS


@pytest.mark.parametrize("name", ["ep2", "ep2pp2"])
def test_reads_legacy_of_expert_parallel_ranks(saved, name):
    """ep2: two optimizers, numbered; ranks named by one number more, as pipeline stages are. ep2pp2: two lists of flat buffers, one of them in one file only."""
    source = saved(name)
    place, checkpoint = read(source.legacy)
    held = {n.replace("mlp.linear_fc1.layer_norm_", "pre_mlp_layernorm."): v for n, v in source.held.items()}
    experts = [held[f"model.decoder.layers.1.mlp.experts.local_experts.{i}.linear_fc2.weight"].tobytes() for i in range(4)]
    assert len(set(experts)) == 4
    settled = check(place, checkpoint, held, copies=True)
    assert len(settled.derived) == (0 if name == "ep2" else len([n for n in held if n.startswith("model.")]))
    flags = [(g["wd_mult"], g["is_expert_parallel"], {layout.is_expert(p) for p in g["params"]}) for g in checkpoint.groups]
    assert sorted(flags, key=str) == [(0.0, False, {False}), (0.0, True, {True}), (1.0, False, {False}), (1.0, True, {True})]
    assert checkpoint.objects["step"] == STEPS


def test_refuses_what_megatron_core_wrote_wrongly(saved):
    """megatron-core 0.16.1 saves fully_reshardable wrongly where buckets are padded: masters and moments are other elements', silently."""
    source = saved("pp2")
    with pytest.raises(BadForeign, match="holds other values than the weight") as e:
        read(source.folder("fully_reshardable"))
    assert "dp_reshardable" in e.value.remedy
    place, checkpoint = read(source.folder("fully_reshardable"), optimizer="skip")
    assert all(n.startswith("model.") for n in checkpoint.tensors)
    check(place, checkpoint, {n: v for n, v in source.held.items() if n.startswith("model.")})


def test_a_wrong_order_of_parameters_is_refused(saved):
    """Parameters of one size changed places: every bucket is full, every edge fits, and a look at the values tells."""
    source = saved("tp2")
    _, checkpoint = read(source.folder("dp_reshardable"))
    names = layout.expanded([n.removeprefix("model.") for n in checkpoint.tensors if n.startswith("model.")])
    a, b = (names.index(f"decoder.layers.{i}.mlp.linear_fc2.weight") for i in (0, 1))
    read(source.folder("dp_reshardable"), params=names)
    names[a], names[b] = names[b], names[a]
    with pytest.raises(BadForeign, match="in any order"):
        read(source.folder("dp_reshardable"), params=names)


def test_a_missing_rank_is_named(saved, tmp_path):
    source = saved("tp2pp2")
    for file in Path(source.legacy).rglob("*"):
        if file.is_file() and "mp_rank_01_001" not in str(file):
            target = tmp_path / file.relative_to(source.legacy)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.hardlink_to(file)
    with pytest.raises(BadForeign, match="no grid"):
        LEGACY.read(place_of(str(tmp_path)), ReadOptions())
    with pytest.raises(NotFound, match="no iteration 7"):
        TORCH_DIST.read(place_of(source.folder()), ReadOptions(tag="7"))


# --- writing: the real library takes it, and trains on ----------------------------------------------------------------------


def written(source, target, to="megatron", **options):
    report = convert(source, str(target), to, write=WriteOptions(**options), check=True)
    assert report.checked
    return str(target / f"iter_{STEPS:07d}") if to == "megatron" else str(target)


@pytest.fixture(scope="module")
def from_tp2pp2(saved, tmp_path_factory):
    """TP2 PP2 of the plain optimizer, as both optimizers' torch_dist."""
    root = tmp_path_factory.mktemp("from-tp2pp2")
    source = saved("tp2pp2").folder()
    return {
        "plain": written(source, root / "plain", tp=2, config={"optimizer": "plain"}),
        "fully_reshardable": written(source, root / "full"),
    }


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (1, 2)])
def test_tp2_pp2_goes_on_elsewhere(ranks, saved, from_tp2pp2, tp, pp):
    answer = ranks.do(world=tp * pp, run={"tp": tp, "pp": pp}, load=from_tp2pp2["plain"], more=2)
    close_enough(answer["after"], saved("tp2pp2").after)
    assert answer["loaded"]["iteration"] == STEPS
    assert answer["loaded"]["opt_param_scheduler"]["num_steps"] == 4


def test_the_plain_optimizer_becomes_a_distributed_one(ranks, saved, from_tp2pp2):
    answer = ranks.do(
        world=2, run={"tp": 2, "optimizer": "dist"}, load=from_tp2pp2["fully_reshardable"], sharding="fully_reshardable", more=2
    )
    close_enough(answer["after"], saved("tp2pp2").after)


def test_flat_buckets_become_reshardable(ranks, saved, tmp_path):
    """dp_reshardable may change DP only; converted, it goes on exactly at TP 2 without data parallelism, and at TP 1 with it."""
    source = saved("tp2")
    folder = written(source.folder("dp_reshardable"), tmp_path / "out")
    answer = ranks.do(world=2, run=source.run, load=folder, sharding="fully_reshardable", more=2)
    assert answer["after"] == source.after
    answer = ranks.do(world=2, run={**source.run, "tp": 1}, load=folder, sharding="fully_reshardable", more=2)
    roughly(answer["after"], source.after)


def test_a_tied_model_of_two_stages_goes_on_as_one(ranks, saved, tmp_path):
    source = saved("pp2")
    folder = written(source.folder("dp_reshardable"), tmp_path / "out")
    answer = ranks.do(world=1, run={**source.run, "pp": 1, "bucket": None}, load=folder, sharding="fully_reshardable", more=2)
    roughly(answer["after"], source.after)


def test_legacy_becomes_torch_dist(ranks, saved, tmp_path):
    source = saved("tp2pp2")
    folder = written(source.legacy, tmp_path / "out", config={"optimizer": "plain"})
    answer = ranks.do(world=2, run={"tp": 2}, load=folder, more=2)
    close_enough(answer["after"], source.after)


@pytest.mark.parametrize(
    ("name", "target", "run"),
    [
        ("tp2pp2", {"pp": 2, "config": {"optimizer": "plain"}}, {"pp": 2}),
        ("tp2pp2", {"tp": 2}, {"tp": 2, "optimizer": "dist"}),
        ("pp2", {"tp": 2}, {"tp": 2, "dtype": "bf16", "optimizer": "dist", "tied": True}),
        ("tp2", {"pp": 2}, {"pp": 2, "dtype": "bf16", "optimizer": "dist", "tied": True}),
    ],
)
def test_legacy_is_written(ranks, saved, tmp_path, name, target, run):
    """Real ranks load their files: the plain optimizer's, flat buffers, and a tied embedding's copy on the last stage."""
    source = saved(name)
    target = {**target, "config": {"spec": "local", **target.get("config", {})}}
    folder = written(source.legacy, tmp_path / "out", "megatron-legacy", **target)
    answer = ranks.do(world=2, run=run, load_legacy=folder, more=2)
    (close_enough if name == "tp2pp2" else roughly)(answer["after"], source.after)


def test_experts_come_back(ranks, saved, tmp_path):
    source = saved("moe")
    folder = written(source.folder(kind="-singleton"), tmp_path / "out", config={"optimizer": "plain"})
    ranks.do(world=1, run=source.run, load=folder, dump=str(tmp_path / "held"))
    again = gathered(tmp_path)
    assert set(again) == set(source.held)
    assert all(again[n].tobytes() == v.tobytes() for n, v in source.held.items())


@pytest.mark.parametrize(
    ("name", "run"), [("ep2", {"experts": 4}), ("ep2pp2", {"experts": 4, "pp": 2, "dtype": "bf16", "optimizer": "dist"})]
)
def test_experts_of_several_ranks_become_one_ranks(ranks, saved, tmp_path, name, run):
    source = saved(name)
    plain = {"optimizer": "plain"} if "optimizer" not in run else {}
    folder = written(source.legacy, tmp_path / "out", "megatron-legacy", pp=run.get("pp", 1), config={"spec": "local", **plain})
    ranks.do(world=run.get("pp", 1), run=run, load_legacy=folder, dump=str(tmp_path / "held"))
    again = gathered(tmp_path, 4)
    assert set(again) == set(source.held)
    assert all(again[n].tobytes() == v.tobytes() for n, v in source.held.items())


# --- writing: what needs no ranks -------------------------------------------------------------------------------------------


def test_random_states_return_to_their_ranks(saved, from_tp2pp2):
    _, before = read(saved("tp2pp2").folder())
    _, after = read(str(Path(from_tp2pp2["plain"]).parent))
    assert sorted(after.per_rank) == [0, 1, 2, 3]
    for rank in range(4):
        old, new = (c.per_rank[rank]["extras.rng_state"][0] for c in (before, after))
        assert old["random_rng_state"] == new["random_rng_state"]
        assert old["torch_rng_state"].tobytes() == new["torch_rng_state"].tobytes()
        assert old["np_rng_state"][1].tobytes() == new["np_rng_state"][1].tobytes()
    assert before.objects["extras.args"] == after.objects["extras.args"]
    assert before.groups == after.groups


def test_transformer_engines_names_come_back(saved, tmp_path):
    """The fused names and their order, by our own writer and reader: two orders of parameters for one model."""
    source = saved("tp2")
    folder = written(source.legacy, tmp_path / "out", "megatron-legacy", tp=2, config={"spec": "te"})
    place, checkpoint = read(folder)
    check(place, checkpoint, source.held)


def test_layers_that_differ_are_kept_apart(saved, tmp_path):
    place, checkpoint = read(saved("moe").folder())
    del checkpoint.tensors["model.decoder.layers.1.mlp.router.bias"]
    options = WriteOptions(drop=frozenset({"optimizer"}))
    with pytest.raises(Unstorable, match="3 of 4 layers"):
        TORCH_DIST.write(checkpoint, options)
    plan = TORCH_DIST.write(checkpoint, replace(options, config={"layers": "separate"}))
    assert plan.files


def test_steps_that_differ_are_refused(saved):
    place, checkpoint = read(saved("tp2pp2").folder())
    pool = Pool(1)
    with Reading(place, checkpoint) as reading:
        settled = settle(reading, pool)
    pool.close()
    settled.scalars["optim.state.output_layer.weight.step"] = 7.0
    with pytest.raises(Unstorable, match="one step for all"):
        TORCH_DIST.write(settled, WriteOptions())


def test_other_systems_groups_become_megatrons(saved):
    _, checkpoint = read(saved("tp2pp2").folder())
    params = [p for g in checkpoint.groups for p in g["params"]]
    checkpoint.objects["optim.param_groups"] = [{"lr": 0.1, "betas": (0.9, 0.99), "weight_decay": 0.01, "params": params}]
    from ckptd.integrations.megatron_write import megatron_groups

    notes = []
    decayed, undecayed = megatron_groups(checkpoint, notes)
    assert (decayed["wd_mult"], undecayed["wd_mult"], decayed["is_expert_parallel"]) == (1.0, 0.0, False)
    assert len(decayed["params"]) == 19 and len(undecayed["params"]) == 34 and decayed["lr"] == 0.1
    assert notes


def test_the_local_specs_names_are_written_as_core_shards_them(ranks, saved, tmp_path):
    """As a view from Hugging Face's names makes them: norms of their own. Megatron's loader asks for them under the linear layer's name, whatever the spec."""
    source = saved("tp2pp2")

    def unfused(checkpoint):
        checkpoint.rename(
            {
                n.removeprefix("model."): layout.unfused_name(n.removeprefix("model."))
                for n in checkpoint.tensors
                if n.startswith("model.")
            }
        )
        checkpoint.scalars = {layout.unfused_name(n): v for n, v in checkpoint.scalars.items()}
        return checkpoint

    convert(source.folder(), str(tmp_path / "out"), "megatron", write=WriteOptions(config={"optimizer": "plain"}), view=unfused)
    answer = ranks.do(world=1, run={}, load=str(tmp_path / "out" / f"iter_{STEPS:07d}"), more=2)
    close_enough(answer["after"], source.after)


def test_the_common_state_may_be_a_sharded_object(saved, tmp_path):
    """As newer versions write it: no common.pt."""
    import io
    import pickle

    from torch.distributed.checkpoint.filesystem import _StorageInfo
    from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex

    source = saved("tp2pp2")
    shutil.copytree(source.folder(), tmp_path / "new")
    folder = tmp_path / "new" / f"iter_{STEPS:07d}"
    blob = io.BytesIO()
    torch.save([torch.load(folder / "common.pt", weights_only=False)], blob)
    (folder / "common.pt").unlink()
    (folder / "__0_7.distcp").write_bytes(blob.getvalue())
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    metadata.state_dict_metadata["common_state/shard_0_1"] = BytesStorageMetadata()
    metadata.storage_data[MetadataIndex("common_state/shard_0_1")] = _StorageInfo("__0_7.distcp", 0, len(blob.getvalue()))
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    place, checkpoint = read(str(tmp_path / "new"))
    check(place, checkpoint, source.held)
    assert checkpoint.objects["step"] == STEPS


@pytest.mark.parametrize("kind", ["torch_dist", "legacy"])
def test_flipped_bytes_raise_nothing_else(saved, tmp_path, kind):
    """Every outcome is a checkpoint or an error of ours."""
    source = saved("tp2")
    shutil.copytree(source.folder("dp_reshardable") if kind == "torch_dist" else source.legacy, tmp_path / "in")
    files = [
        f for f in (tmp_path / "in").rglob("*") if f.name in {".metadata", "common.pt", "model_optim_rng.pt", "distrib_optim.pt"}
    ]
    chance = random.Random(7)
    outcomes = {"read": 0, "refused": 0}
    for _ in range(60):
        file = chance.choice(files)
        data = bytearray(file.read_bytes())
        whole = bytes(data)
        for _ in range(chance.choice([1, 1, 3])):
            data[chance.randrange(min(len(data), 40_000))] = chance.randrange(256)
        file.write_bytes(data)
        try:
            read(str(tmp_path / "in"))
            outcomes["read"] += 1
        except CkptdError:
            outcomes["refused"] += 1
        file.write_bytes(whole)
    assert outcomes["refused"] > 5, outcomes
    read(str(tmp_path / "in"))


# --- into every target and back ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tp2pp2", "tp2", "pp2"])
def test_there_and_back(saved, name, tmp_path):
    """Plain optimizer, fully reshardable and flat buckets, into every format that holds a training state, and from there into Megatron's two."""
    sharding = "dp_reshardable" if name == "pp2" else SOURCES[name]["sharding"][0]  # pp2 fully reshardable: megatron-core itself writes it wrongly

    def back(number: int, to: str) -> tuple[str, WriteOptions]:
        return ("megatron", "dcp", "torch")[number % 3], WriteOptions(ranks=1 + number % 2, drop=frozenset({"objects"}))

    assert there_and_back(saved(name).folder(sharding), tmp_path, back) == 2 * len(TARGETS)
