"""Views that ckptd brings along, on real models of transformers: against the layouts of Megatron-core written down in plain torch, there and back to the
bit with all moments, and in a real Megatron model that computes the same logits."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ckptd.convert import convert
from ckptd.core.views import apply, load_view
from ckptd.errors import BadArgument, Divergent
from ckptd.formats import WriteOptions
from ckptd.reading import Pool, compare_replicas, open_checkpoint, settle
from tests.convert import test_hf as hf

transformers = pytest.importorskip("transformers")
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.timeout(280)]

LLAMA = {"num_attention_heads": 8, "num_key_value_heads": 2, "hidden_size": 32, "head_dim": 4}
MODELS = {
    "llama": lambda: hf.llama(**LLAMA),
    "tied": lambda: hf.llama(**LLAMA, tie_word_embeddings=True),
    "multi-head": lambda: hf.llama(num_key_value_heads=4),
    "one-group": lambda: hf.llama(num_key_value_heads=1),
    "biases": lambda: hf.llama(attention_bias=True, mlp_bias=True),
    "gpt2": hf.gpt2,
}


def qkv(q, k, v, groups: int, head_dim: int) -> torch.Tensor:
    """Megatron-core: for each query group its queries' heads, then its key, then its value."""
    out = []
    per_group = q.shape[0] // groups
    for g in range(groups):
        out += [q[g * per_group : (g + 1) * per_group], k[g * head_dim : (g + 1) * head_dim], v[g * head_dim : (g + 1) * head_dim]]
    return torch.cat(out)


def pad(t, rows: int):
    return torch.cat([t, t.new_zeros(rows - t.shape[0], *t.shape[1:])])


def llama_reference(held, config, rows: int) -> dict[str, torch.Tensor]:
    """A Megatron-core GPTModel's state (local spec), of one kind of values (weights, or a moment), by plain torch."""
    groups, head_dim = config.num_key_value_heads, config.head_dim
    out = {"embedding.word_embeddings.weight": pad(held["model.embed_tokens.weight"], rows), "decoder.final_layernorm.weight": held["model.norm.weight"]}
    if "lm_head.weight" in held:
        out["output_layer.weight"] = pad(held["lm_head.weight"], rows)
    for i in range(config.num_hidden_layers):
        a, b = f"model.layers.{i}.", f"decoder.layers.{i}."
        for kind in ("weight", "bias"):
            if f"{a}self_attn.q_proj.{kind}" in held:
                out[f"{b}self_attention.linear_qkv.{kind}"] = qkv(*(held[f"{a}self_attn.{n}_proj.{kind}"] for n in "qkv"), groups, head_dim)
                out[f"{b}self_attention.linear_proj.{kind}"] = held[f"{a}self_attn.o_proj.{kind}"]
                out[f"{b}mlp.linear_fc1.{kind}"] = torch.cat([held[f"{a}mlp.gate_proj.{kind}"], held[f"{a}mlp.up_proj.{kind}"]])
                out[f"{b}mlp.linear_fc2.{kind}"] = held[f"{a}mlp.down_proj.{kind}"]
        out[f"{b}input_layernorm.weight"] = held[f"{a}input_layernorm.weight"]
        out[f"{b}pre_mlp_layernorm.weight"] = held[f"{a}post_attention_layernorm.weight"]
    return out


def gpt2_reference(held, config, rows: int) -> dict[str, torch.Tensor]:
    """The same for GPT-2: Conv1D is transposed; c_attn holds all queries, then all keys, then all values."""
    names = {"wte.weight": "embedding.word_embeddings.weight", "wpe.weight": "embedding.position_embeddings.weight"}
    out = {new: held[f"transformer.{old}"] for old, new in names.items()}
    out["embedding.word_embeddings.weight"] = pad(out["embedding.word_embeddings.weight"], rows)
    for i in range(config.n_layer):
        a, b = f"transformer.h.{i}.", f"decoder.layers.{i}."
        for kind in ("weight", "bias"):
            turn = (lambda t: t.T) if kind == "weight" else (lambda t: t)
            q, k, v = turn(held[f"{a}attn.c_attn.{kind}"]).chunk(3)
            out[f"{b}self_attention.linear_qkv.{kind}"] = qkv(q, k, v, config.n_head, config.n_embd // config.n_head)
            out[f"{b}self_attention.linear_proj.{kind}"] = turn(held[f"{a}attn.c_proj.{kind}"])
            out[f"{b}mlp.linear_fc1.{kind}"] = turn(held[f"{a}mlp.c_fc.{kind}"])
            out[f"{b}mlp.linear_fc2.{kind}"] = turn(held[f"{a}mlp.c_proj.{kind}"])
            out[f"{b}input_layernorm.{kind}"] = held[f"{a}ln_1.{kind}"]
            out[f"{b}pre_mlp_layernorm.{kind}"] = held[f"{a}ln_2.{kind}"]
            out[f"decoder.final_layernorm.{kind}"] = held[f"transformer.ln_f.{kind}"]
    return out


def opened(path):
    """As the engine opens it: replicas compared, masters settled."""
    place, _, checkpoint = open_checkpoint(str(path))
    pool = Pool(1)
    with hf.Reading(place, checkpoint) as reading:
        compare_replicas(reading, pool)
        checkpoint = settle(reading, pool)
    pool.close()
    return place, checkpoint


def kinds(held: dict[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    """"" (weights) or slot -> FQN -> values."""
    out: dict[str, dict[str, torch.Tensor]] = {}
    for name, value in held.items():
        if name.startswith("model."):
            out.setdefault("", {})[name.removeprefix("model.")] = value
        else:
            fqn, _, slot = name.removeprefix("optim.state.").rpartition(".")
            out.setdefault(slot, {})[fqn] = value
    return out


@pytest.mark.parametrize("kind", MODELS)
def test_to_megatron_is_what_plain_torch_makes_of_it_and_back_is_to_the_bit(kind, tmp_path):
    """With the Trainer's AdamW moments, which take the same way as the weights."""
    trainer = hf.train(MODELS[kind](), tmp_path / "run", 2)
    place, checkpoint = opened(tmp_path / "run" / "checkpoint-2")
    name = "gpt2" if kind == "gpt2" else "llama"
    there = apply(load_view(name), checkpoint, {"vocab_multiple": 64, "variant": "local"})
    there.prove()
    held, made = hf.values(checkpoint, place), hf.values(there, place)
    reference = gpt2_reference if name == "gpt2" else llama_reference
    for slot, values in kinds(held).items():
        got = kinds(made)[slot]
        if slot == "step":
            assert {*got} == {*kinds(made)["exp_avg"]}
            assert {float(t) for t in got.values()} == {2.0}
            continue
        want = reference(values, trainer.model.config, 64)
        assert {*got} == {*want}
        for fqn, value in want.items():
            assert torch.equal(got[fqn], value), (slot, fqn)
    tied = kind in {"tied", "gpt2"}
    assert there.aliases == ({"model.output_layer.weight": "model.embedding.word_embeddings.weight"} if tied else {})
    assert sorted(p for g in there.groups for p in g["params"]) == sorted(kinds(made)["exp_avg"])
    assert [g["weight_decay"] for g in there.groups] == [0.1, 0.0]
    back = apply(load_view(name), there, {})
    back.prove()
    again = hf.values(back, place)
    assert {*again} == {*held}
    assert all(torch.equal(again[n], t) for n, t in held.items())
    assert back.aliases == checkpoint.aliases
    # Numbers of parts: a fused parameter's group order need not be the old one, but nobody changes groups.
    assert [sorted(g["params"]) for g in back.groups] == [sorted(g["params"]) for g in checkpoint.groups]
    te = apply(load_view(name), checkpoint, {})  # TransformerEngine's names, which Megatron's distributed checkpoints have too
    assert "model.decoder.layers.1.self_attention.linear_qkv.layer_norm_weight" in te.tensors
    assert {*apply(load_view(name), te, {}).tensors} == {*checkpoint.tensors}


def test_files_there_and_back_and_transformers_loads_them(tmp_path):
    """Through the engine, on disk: folder -> Megatron's names in a torch file, read by torch -> folder, loaded by transformers."""
    model = MODELS["llama"]()
    model.save_pretrained(tmp_path / "hf")
    view = load_view("llama")
    convert(str(tmp_path / "hf"), str(tmp_path / "gpt.pt"), "torch", view=lambda c: apply(view, c, {"padded_vocab": 40, "variant": "local"}), check=True)
    state = torch.load(tmp_path / "gpt.pt")["model"]
    want = llama_reference(model.state_dict(), model.config, 40)
    assert {*state} == {*want}
    assert all(torch.equal(state[n], t) for n, t in want.items())
    config = (tmp_path / "hf" / "config.json").read_text()
    options = WriteOptions(drop=frozenset({"objects"}), config={"config": config}, shard_bytes=9000)
    hints = {"heads": 8, "vocab": 37}
    convert(str(tmp_path / "gpt.pt"), str(tmp_path / "back"), "hf", view=lambda c: apply(view, c, hints), write=options, check=True)
    hf.same_as_saved(model, tmp_path / "back")
    loaded = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "back").eval()
    tokens = torch.tensor([[1, 5, 9, 30]])
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)


@pytest.mark.parametrize("to", ["megatron", "ckptd"])
def test_a_trainers_run_as_megatrons_checkpoint_and_back(to, tmp_path):
    """With the optimizer, through files of formats that hold it, each read back and compared."""
    trainer = hf.train(MODELS["tied"](), tmp_path / "run", 2)
    view = load_view("llama")
    options = WriteOptions(drop=frozenset({"objects"}))
    convert(str(tmp_path / "run"), str(tmp_path / "there"), to, view=lambda c: apply(view, c, {}), write=options, check=True)
    convert(str(tmp_path / "there"), str(tmp_path / "back.pt"), "torch", view=lambda c: apply(view, c, {"heads": 8}), check=True)
    held = torch.load(tmp_path / "back.pt")
    for name, p in trainer.model.named_parameters():
        assert torch.equal(held["model"][name], p), name
        for slot, value in trainer.optimizer.optimizer.state[p].items():
            assert torch.equal(torch.as_tensor(held["optim"]["state"][name][slot]).float(), value.float()), (name, slot)
    if to == "ckptd":  # Megatron's files do not say what is tied: a model that ties has no key
        assert held["model"]["lm_head.weight"].data_ptr() == held["model"]["model.embed_tokens.weight"].data_ptr()


def test_heads_that_nobody_says_are_asked_for(tmp_path):
    MODELS["llama"]().save_pretrained(tmp_path / "hf")
    (tmp_path / "hf" / "config.json").unlink()
    _, checkpoint = opened(tmp_path / "hf")
    with pytest.raises(BadArgument) as e:
        apply(load_view("llama"), checkpoint, {})
    assert "say it by a hint, groups=..., or head_dim=..., or heads=..." in str(e.value)
    assert apply(load_view("llama"), checkpoint, {"heads": 8}).tensors.keys() == apply(load_view("llama"), checkpoint, {"head_dim": 4}).tensors.keys()
    with pytest.raises(BadArgument):
        apply(load_view("llama"), checkpoint, {"heads": 7})


def test_steps_that_differ_are_not_merged(tmp_path):
    """Through the engine: q has taken another step than k, as no optimizer of one group does."""
    trainer = hf.train(MODELS["llama"](), tmp_path / "run", 2)
    q = dict(trainer.model.named_parameters())["model.layers.0.self_attn.q_proj.weight"]
    trainer.optimizer.optimizer.state[q]["step"].fill_(5)
    torch.save(trainer.optimizer.optimizer.state_dict(), tmp_path / "run" / "checkpoint-2" / "optimizer.pt")
    with pytest.raises(Divergent, match=r"layers\.0\.self_attn\.\w_proj\.weight\.step"):
        convert(str(tmp_path / "run"), str(tmp_path / "out"), "ckptd", view=lambda c: apply(load_view("llama"), c, {}))


@pytest.mark.parametrize("variant", ["te", "te-grouped", "local", "stacked"])
def test_mixtral(variant, tmp_path):
    model = hf.mixtral()
    model.save_pretrained(tmp_path / "hf")
    place, checkpoint = opened(tmp_path / "hf")
    there = apply(load_view("mixtral"), checkpoint, {"variant": variant})
    there.prove()
    held, made = (kinds(hf.values(c, place))[""] for c in (checkpoint, there))
    for i in range(2):
        a, b = f"model.layers.{i}.block_sparse_moe.", f"decoder.layers.{i}.mlp."
        assert torch.equal(made[f"{b}router.weight"], held[f"{a}gate.weight"])
        norm = "self_attention.linear_qkv.layer_norm_weight" if variant.startswith("te") else "input_layernorm.weight"
        assert torch.equal(made[f"decoder.layers.{i}.{norm}"], held[f"model.layers.{i}.input_layernorm.weight"])
        fc1 = [torch.cat([held[f"{a}experts.{e}.w1.weight"], held[f"{a}experts.{e}.w3.weight"]]) for e in range(3)]
        fc2 = [held[f"{a}experts.{e}.w2.weight"] for e in range(3)]
        for number, values in ((1, fc1), (2, fc2)):
            if variant == "stacked":
                assert torch.equal(made[f"{b}experts.experts.linear_fc{number}.weight"], torch.stack(values))
            else:
                name = f"experts.local_experts.{{}}.linear_fc{number}.weight" if variant != "te-grouped" else f"experts.linear_fc{number}.weight{{}}"
                assert all(torch.equal(made[b + name.format(e)], v) for e, v in enumerate(values))
    back = apply(load_view("mixtral"), there, {})
    again = kinds(hf.values(back, place))[""]
    assert {*again} == {*held}
    assert all(torch.equal(again[n], t) for n, t in held.items())


def test_mixtrals_modules_are_not_its_files(tmp_path):
    """transformers 5 trains with experts in one tensor, and saves them one by one: a snapshot of the modules becomes a folder that loads."""
    model = hf.mixtral()
    (tmp_path / "modules").mkdir()
    torch.save({"model": model.state_dict()}, tmp_path / "modules" / "checkpoint.pt")
    model.config.save_pretrained(tmp_path / "config")
    options = WriteOptions(config={"config": (tmp_path / "config" / "config.json").read_text()})
    convert(str(tmp_path / "modules"), str(tmp_path / "hf"), "hf", view=lambda c: apply(load_view("mixtral-files"), c, {}), write=options, check=True)
    loaded, info = transformers.MixtralForCausalLM.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert all(torch.equal(loaded.state_dict()[n], t) for n, t in model.state_dict().items())
    place, checkpoint = opened(tmp_path / "hf")
    modules = apply(load_view("mixtral-files"), checkpoint, {})
    values = kinds(hf.values(modules, place))[""]
    assert all(torch.equal(values[n], t) for n, t in model.state_dict().items())
    _, live = opened(tmp_path / "modules")
    live.objects["extras.config"] = model.config.to_dict()
    assert {*apply(load_view("mixtral"), live, {}).tensors} == {*apply(load_view("mixtral"), checkpoint, {}).tensors}


def test_a_view_of_a_user(tmp_path):
    """torchtitan's Llama, as its users have it: names only, but that rotary halves are interleaved (wq, wk)."""
    hf.llama().save_pretrained(tmp_path / "hf")
    turn = lambda n: [{"do": "split", "dim": 0, "sizes": [n, 2, "head_dim/2"]}, {"do": "permute", "order": [0, 2, 1, 3]}, {"do": "merge", "dim": 0, "sizes": [n, "head_dim/2", 2]}]
    names = {"self_attn.v_proj": "attention.wv", "self_attn.o_proj": "attention.wo", "mlp.gate_proj": "feed_forward.w1", "mlp.up_proj": "feed_forward.w3",
             "mlp.down_proj": "feed_forward.w2", "input_layernorm": "attention_norm", "post_attention_layernorm": "ffn_norm"}  # fmt: skip
    layer = lambda a, b, **more: {"from": [f"model.layers.{{layer}}.{a}.weight"], "to": [f"layers.{{layer}}.{b}.weight"], **more}
    view = {
        "name": "titan", "sides": ["hf", "titan"], "counts": {"layer": "layers"},
        "parameters": {"layers": ["count:layer"], "heads": ["extras.config.num_attention_heads"], "groups": ["extras.config.num_key_value_heads"], "head_dim": ["extras.config.head_dim"]},
        "rules": [layer(a, b) for a, b in names.items()] + [
            layer("self_attn.q_proj", "attention.wq", steps=turn("heads")), layer("self_attn.k_proj", "attention.wk", steps=turn("groups")),
            {"from": ["model.embed_tokens.weight"], "to": ["tok_embeddings.weight"]}, {"from": ["model.norm.weight"], "to": ["norm.weight"]},
            {"from": ["lm_head.weight"], "to": ["output.weight"]},
        ],
    }  # fmt: skip
    place, checkpoint = opened(tmp_path / "hf")
    there = apply(load_view(json.dumps(view)), checkpoint, {})
    held, made = (kinds(hf.values(c, place))[""] for c in (checkpoint, there))
    q = held["model.layers.1.self_attn.q_proj.weight"]
    assert torch.equal(made["layers.1.attention.wq.weight"], q.view(4, 2, 2, 16).transpose(1, 2).reshape(16, 16))
    back = kinds(hf.values(apply(load_view(json.dumps(view)), there, {}), place))[""]
    assert all(torch.equal(back[n], t) for n, t in held.items())


# --- a real Megatron model ---------------------------------------------------------------------------------------------------

MEGATRON = """
import json, sys
from tests.convert.megatron_job import shim
shim()
import torch, torch.distributed as dist
from megatron.core import parallel_state as ps
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.transformer_config import TransformerConfig
moe_utils.te_general_gemm = None  # without TransformerEngine the name is missing
dist.init_process_group("gloo", init_method="file://" + sys.argv[1] + "/rendezvous", rank=0, world_size=1)
ps.initialize_model_parallel()
state = torch.load(sys.argv[1] + "/gpt.pt")["model"]
kind, tokens = sys.argv[2], torch.tensor([[1, 5, 9, 30]])
common = dict(num_layers=2, num_attention_heads=4, hidden_dropout=0.0, attention_dropout=0.0, use_cpu_initialization=True, gradient_accumulation_fusion=False,
    masked_softmax_fusion=False, bias_activation_fusion=False, bias_dropout_fusion=False, apply_rope_fusion=False, persist_layer_norm=False)
if kind == "gpt2":
    config = TransformerConfig(hidden_size=16, ffn_hidden_size=64, activation_func=lambda x: torch.nn.functional.gelu(x, approximate="tanh"), **common)
    more = dict(vocab_size=37, max_sequence_length=12, position_embedding_type="learned_absolute", share_embeddings_and_output_weights=True)
    spec = get_gpt_layer_local_spec()
else:
    experts = dict(num_moe_experts=3, moe_ffn_hidden_size=24, moe_router_topk=2, moe_router_load_balancing_type="none", moe_token_dispatcher_type="allgather",
        moe_router_pre_softmax=False) if kind == "mixtral" else {}
    config = TransformerConfig(hidden_size=16, ffn_hidden_size=24, num_query_groups=2, gated_linear_unit=True, activation_func=torch.nn.functional.silu,
        add_bias_linear=False, normalization="RMSNorm", layernorm_epsilon=1e-5 if kind == "mixtral" else 1e-6, **experts, **common)
    spec = get_gpt_layer_local_spec(normalization="RMSNorm", num_experts=3 if experts else None, moe_grouped_gemm=False)
    more = dict(vocab_size=40, max_sequence_length=32, position_embedding_type="rope", rotary_base=1000000 if kind == "mixtral" else 10000,
        share_embeddings_and_output_weights=kind == "tied")
model = GPTModel(config, spec, **more).eval()
said = model.load_state_dict(state, strict=False)
missing = [k for k in said.missing_keys if "_extra_state" not in k]
mask = torch.triu(torch.ones(4, 4, dtype=torch.bool), 1)[None, None]
with torch.no_grad():
    logits = model(tokens, torch.arange(4)[None], mask)
torch.save({"missing": missing, "unexpected": said.unexpected_keys, "logits": logits[..., :37]}, sys.argv[1] + "/said.pt")
"""


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("megatron") is None, reason="megatron-core is not installed")
@pytest.mark.parametrize("kind", ["llama", "tied", "gpt2", "mixtral"])
def test_a_real_megatron_model_computes_the_same_logits(kind, tmp_path):
    model = {"llama": hf.llama, "tied": hf.MODELS["tied"], "gpt2": hf.gpt2, "mixtral": hf.mixtral}[kind]()
    model.save_pretrained(tmp_path / "hf")
    view = load_view({"tied": "llama"}.get(kind, kind))
    convert(str(tmp_path / "hf"), str(tmp_path / "gpt.pt"), "torch", view=lambda c: apply(view, c, {"variant": "local", **({} if kind == "gpt2" else {"padded_vocab": 40})}))
    done = subprocess.run(
        [sys.executable, "-c", MEGATRON, str(tmp_path), kind], cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    said = torch.load(tmp_path / "said.pt")
    assert not said["unexpected"] or said["unexpected"] == ["output_layer.weight"]
    assert not said["missing"], said["missing"]
    with torch.no_grad():
        want = model(torch.tensor([[1, 5, 9, 30]])).logits
    torch.testing.assert_close(said["logits"], want, rtol=1e-4, atol=1e-5)
    assert want.abs().max() > 0.05
