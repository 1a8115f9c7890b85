"""Real transformers: what it saves we read to the bit, what we write it loads without a missing key; a Trainer's folder; indexes that lie."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path

import pytest
import torch

from ckptd.convert import convert
from ckptd.errors import BadArgument, BadForeign, CkptdError, Unstorable
from ckptd.formats import ReadOptions, WriteOptions, place_of, recognise
from ckptd.integrations.hf import HF
from ckptd.reading import Reading, open_checkpoint

transformers = pytest.importorskip("transformers")
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.timeout(280)]

SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 37}


def llama(**changes):
    torch.manual_seed(1)
    config = transformers.LlamaConfig(**{**SMALL, "max_position_embeddings": 32, **changes})
    return transformers.LlamaForCausalLM(config).eval()


def gpt2():
    torch.manual_seed(2)
    config = transformers.GPT2Config(n_embd=16, n_layer=2, n_head=4, vocab_size=37, n_positions=12, bos_token_id=0, eos_token_id=1)
    return transformers.GPT2LMHeadModel(config).eval()


def mixtral():
    torch.manual_seed(3)
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**SMALL, num_local_experts=3, max_position_embeddings=32)).eval()


MODELS = {"llama": llama, "tied": lambda: llama(tie_word_embeddings=True), "bfloat16": lambda: llama().to(torch.bfloat16), "gpt2": gpt2, "mixtral": mixtral}


def values(checkpoint, place) -> dict[str, torch.Tensor]:
    """Every tensor, read through the engine."""
    kinds = {"F32": torch.float32, "BF16": torch.bfloat16, "I64": torch.int64, "U8": torch.uint8, "F16": torch.float16}
    with Reading(place, checkpoint) as reading:
        out = {}
        for name, tensor in checkpoint.tensors.items():
            raw = torch.from_numpy(reading.array(name).copy())
            out[name] = raw.view(torch.bfloat16) if tensor.dtype == "BF16" else raw
            assert out[name].dtype == kinds[tensor.dtype]
        return out


def read(path, **hints):
    place, found, checkpoint = open_checkpoint(str(path), ReadOptions(hints=hints))
    assert found.name == "hf"
    return checkpoint, values(checkpoint, place)


def same_as_saved(model, path) -> None:
    """What we read is what transformers itself loads."""
    checkpoint, held = read(path)
    loaded, info = type(model).from_pretrained(path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    want = dict(model.state_dict())
    for name, tensor in held.items():
        if name.removeprefix("model.") in want:  # Mixtral's experts are files of their own
            assert torch.equal(tensor, want[name.removeprefix("model.")]), name
    assert checkpoint.objects["extras.config"]["model_type"] == model.config.model_type
    tied = {a.removeprefix("model."): n.removeprefix("model.") for a, n in checkpoint.aliases.items()}
    for alias, name in tied.items():
        assert want[alias].data_ptr() == want[name].data_ptr()
    if model.config.model_type != "mixtral":
        assert {*want} == {n.removeprefix("model.") for n in held} | {*tied}


@pytest.mark.parametrize("kind", MODELS)
def test_what_transformers_saves_is_read_to_the_bit_and_written_so_that_it_loads(kind, tmp_path):
    model = MODELS[kind]()
    model.save_pretrained(tmp_path / "saved")
    model.save_pretrained(tmp_path / "shards", max_shard_size="6KB")
    assert (tmp_path / "shards" / "model.safetensors.index.json").exists()
    same_as_saved(model, tmp_path / "saved")
    same_as_saved(model, tmp_path / "shards")
    tokens = torch.tensor([[1, 5, 9, 30]])
    want = model(tokens).logits
    for name, options in {"one": WriteOptions(), "many": WriteOptions(shard_bytes=6000)}.items():
        report = convert(str(tmp_path / "shards"), str(tmp_path / name), "hf", write=options, check=True)
        assert not report.dropped
        same_as_saved(model, tmp_path / name)
        loaded = type(model).from_pretrained(tmp_path / name).eval()
        assert torch.equal(loaded(tokens).logits, want)
        if name == "many":
            ours, theirs = (json.loads((tmp_path / d / "model.safetensors.index.json").read_text()) for d in (name, "shards"))
            assert {*ours["weight_map"]} == {*theirs["weight_map"]}
            assert ours["metadata"]["total_size"] == theirs["metadata"]["total_size"]
            assert max(f.stat().st_size for f in (tmp_path / name).glob("*.safetensors")) < 6000 + 4096


def test_a_cast_is_torchs_and_config_says_so(tmp_path):
    model = llama()
    model.save_pretrained(tmp_path / "saved")
    convert(str(tmp_path / "saved"), str(tmp_path / "half"), "hf", write=WriteOptions(dtype="BF16"), check=True)
    loaded = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "half")
    for name, want in model.to(torch.bfloat16).state_dict().items():
        assert torch.equal(loaded.state_dict()[name], want)
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize("sharded", [False, True])
def test_bin_files(sharded, tmp_path):
    model = llama(tie_word_embeddings=True)
    state = model.state_dict()
    (tmp_path / "bin").mkdir()
    model.config.save_pretrained(tmp_path / "bin")
    if sharded:
        names = [*state]
        parts = {"pytorch_model-00001-of-00002.bin": names[:5], "pytorch_model-00002-of-00002.bin": names[5:]}
        for file, part in parts.items():
            torch.save({n: state[n] for n in part}, tmp_path / "bin" / file)
        index = {"metadata": {}, "weight_map": {n: f for f, part in parts.items() for n in part}}
        (tmp_path / "bin" / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    else:
        torch.save(state, tmp_path / "bin" / "pytorch_model.bin")
    checkpoint, held = read(tmp_path / "bin")
    assert all(torch.equal(t, state[n.removeprefix("model.")]) for n, t in held.items())
    if not sharded:
        assert checkpoint.aliases == {"model.lm_head.weight": "model.model.embed_tokens.weight"}


# --- a Trainer's folder -----------------------------------------------------------------------------------------------------


class Words(torch.utils.data.Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, i):
        ids = torch.arange(6).add(i).remainder(37)
        return {"input_ids": ids, "labels": ids}


def train(model, folder: Path, steps: int = 3):
    arguments = transformers.TrainingArguments(
        output_dir=str(folder), max_steps=steps, save_steps=steps, save_strategy="steps", per_device_train_batch_size=2, report_to=[], use_cpu=True,
        weight_decay=0.1, learning_rate=1e-2, disable_tqdm=True,
    )  # fmt: skip
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=Words())
    trainer.train()
    return trainer


@pytest.mark.parametrize("kind", ["tied", "gpt2"])
def test_a_trainers_checkpoint_with_its_optimizer(kind, tmp_path):
    trainer = train(MODELS[kind](), tmp_path / "run")
    model, optimizer = trainer.model, trainer.optimizer.optimizer
    names = {id(p): n for n, p in model.named_parameters()}
    place = place_of(str(tmp_path / "run"))
    assert recognise(place) is HF
    checkpoint, held = read(tmp_path / "run")  # the newest step of the run's folder
    assert checkpoint.objects["step"] == 3
    assert checkpoint.objects["extras.trainer_state"]["global_step"] == 3
    assert checkpoint.objects["extras.scheduler"]["last_epoch"] == 3
    for p, state in optimizer.state.items():
        for slot, value in state.items():
            assert torch.equal(held[f"optim.state.{names[id(p)]}.{slot}"], value), (names[id(p)], slot)
    assert [g["params"] for g in checkpoint.groups] == [[names[id(p)] for p in g["params"]] for g in optimizer.param_groups]
    assert [g["weight_decay"] for g in checkpoint.groups] == [0.1, 0.0]
    assert "training_args.bin" in " ".join(checkpoint.notes)
    with pytest.raises(Unstorable, match="--drop optimizer"):
        convert(str(tmp_path / "run" / "checkpoint-3"), str(tmp_path / "out"), "hf")
    report = convert(str(tmp_path / "run" / "checkpoint-3"), str(tmp_path / "out"), "hf", write=WriteOptions(drop=frozenset({"optimizer", "objects"})))
    assert any("exp_avg" in n for n in report.dropped)
    same_as_saved(model, tmp_path / "out")


def test_numbered_parameters_without_an_order_are_refused_by_hint(tmp_path, monkeypatch):
    trainer = train(llama(), tmp_path / "run")
    names = {id(p): n for n, p in trainer.model.named_parameters()}
    order = [names[id(p)] for g in trainer.optimizer.optimizer.param_groups for p in g["params"]]
    monkeypatch.setattr("ckptd.integrations.hf._ask_transformers", lambda _: [])
    with pytest.raises(BadArgument, match="params=NAME"):
        read(tmp_path / "run")
    checkpoint, held = read(tmp_path / "run", params=",".join(order))
    for p, state in trainer.optimizer.optimizer.state.items():
        assert torch.equal(held[f"optim.state.{names[id(p)]}.exp_avg"], state["exp_avg"])
    assert not read(tmp_path / "run", optimizer="no")[0].groups
    with pytest.raises(BadArgument):
        read(tmp_path / "run", params=",".join([order[-1], *order[1:-1], order[0]]))


# --- indexes and files that lie ---------------------------------------------------------------------------------------------


def shards(folder: Path) -> tuple[Path, dict]:
    model = llama()
    model.save_pretrained(folder, max_shard_size="6KB")
    index = folder / "model.safetensors.index.json"
    return index, json.loads(index.read_text())


@pytest.mark.parametrize(
    "name", ["../../etc/passwd", "/etc/passwd", "/proc/self/mem", "..", "", "a/../model-00001-of-00005.safetensors", "sub/x.safetensors", "x\0.safetensors", "config.json"]
)
def test_an_index_names_files_of_its_folder_only(name, tmp_path):
    index, table = shards(tmp_path / "m")
    table["weight_map"]["model.norm.weight"] = name
    index.write_text(json.dumps(table))
    with pytest.raises(BadForeign, match="no name of a file|is not there"):
        read(tmp_path / "m")


def test_links_and_pipes_are_not_followed(tmp_path):
    index, table = shards(tmp_path / "m")
    file = table["weight_map"]["model.norm.weight"]
    (tmp_path / "m" / file).rename(tmp_path / "elsewhere.safetensors")
    (tmp_path / "m" / file).symlink_to(tmp_path / "elsewhere.safetensors")
    with pytest.raises(CkptdError, match="is not there|symbolic"):
        read(tmp_path / "m")
    (tmp_path / "m" / file).unlink()
    os.mkfifo(tmp_path / "m" / file)
    with pytest.raises(BadForeign, match="is not there"):
        read(tmp_path / "m")


def test_tensors_missing_doubled_and_unnamed(tmp_path):
    index, table = shards(tmp_path / "m")
    good = dict(table["weight_map"])

    def refused(weight_map, match):
        index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
        with pytest.raises(BadForeign, match=match):
            read(tmp_path / "m")

    refused({**good, "model.extra": good["model.norm.weight"]}, "model.extra is not in it")
    refused({n: f for n, f in good.items() if n != "lm_head.weight"}, "lm_head.weight")
    other = next(f for f in good.values() if f != good["model.norm.weight"])
    refused({**good, "model.norm.weight": other}, "model.norm.weight")
    text = json.dumps({"metadata": {}, "weight_map": good})
    index.write_text(text.replace('"weight_map": {', '"weight_map": {"lm_head.weight": "x.safetensors", '))
    with pytest.raises(BadForeign, match="stands twice"):
        read(tmp_path / "m")
    for text in ("{", "[]", '{"weight_map": []}', '{"weight_map": {"a": 1}}', "[" * 100_000):
        index.write_text(text)
        with pytest.raises(BadForeign):
            read(tmp_path / "m")
    index.unlink()
    with pytest.raises(BadForeign, match="index is not there"):
        read(tmp_path / "m")


def test_two_saves_in_one_folder(tmp_path):
    shards(tmp_path / "m")
    llama().save_pretrained(tmp_path / "other")
    (tmp_path / "other" / "model.safetensors").rename(tmp_path / "m" / "model.safetensors")
    with pytest.raises(BadArgument, match="weights are in"):
        read(tmp_path / "m")
    place = place_of(str(tmp_path / "m"))
    assert HF.read(place, ReadOptions(tag="model.safetensors")).tensors.keys() == HF.read(place, ReadOptions(tag="model.safetensors.index.json")).tensors.keys()


def test_one_file_alone(tmp_path):
    llama().save_pretrained(tmp_path / "m")
    checkpoint, held = read(tmp_path / "m" / "model.safetensors")
    assert not checkpoint.objects
    assert "model.model.norm.weight" in held
    raw = (tmp_path / "m" / "model.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(raw[:-1])
    with pytest.raises(BadForeign):
        read(tmp_path / "cut.safetensors")
    (tmp_path / "long.safetensors").write_bytes(struct.pack("<Q", 2**63) + raw[8:])
    with pytest.raises(CkptdError):
        read(tmp_path / "long.safetensors")


def test_a_config_that_asks_for_a_monster_is_not_built(tmp_path):
    train(llama(), tmp_path / "run", 1)
    config = tmp_path / "run" / "checkpoint-1" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "num_hidden_layers": 10**9}))
    with pytest.raises(BadArgument, match="params=NAME"):
        read(tmp_path / "run")
