"""DeepSpeed's checkpoints against DeepSpeed: what it saves is read bit by bit as it says it holds it; what we write it loads, at other sizes and stages,
and trains on as the run that was never converted. The runs are real (`deepspeed_job.py`): gloo, CPU, worlds of 2, 3 and 4.

MATRIX=full loads every source into every stage and world. Skipped where deepspeed is not installed (scripts/setup says how).
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch

from ckptd.convert import convert
from ckptd.errors import BadArgument, BadForeign, NotFound, Unstorable
from ckptd.formats import ReadOptions, WriteOptions, place_of
from ckptd.integrations import deepspeed
from ckptd.integrations.deepspeed import UNIVERSAL, ZERO1, ZERO2, ZERO3
from ckptd.reading import Pool, Reading, compare_replicas, settle
from tests.convert.zero_sources import DTYPES, STAGES, VARIANTS, WORLDS
from tests.train.harness import stop_daemon

pytestmark = [pytest.mark.timeout(600), pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed: see scripts/setup")]
FORMATS = {f.name: f for f in (UNIVERSAL, ZERO1, ZERO2, ZERO3)}
FULL = os.environ.get("MATRIX") == "full"
TORCH = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "I64": torch.int64}
PAIRS = [  # source, target stage, target world
    *(("1-2-fp32", s, w) for s, w in ((1, 3), (2, 4), (3, 3))),
    *(("1-4-bf16", s, w) for s, w in ((1, 2), (3, 4))),
    *(("2-3-bf16", s, w) for s, w in ((1, 2), (2, 4), (3, 2))),
    *(("2-4-fp32", s, w) for s, w in ((2, 3), (3, 3))),
    *(("3-2-bf16", s, w) for s, w in ((3, 3), (1, 4), (2, 2))),
    *(("3-3-fp32", s, w) for s, w in ((3, 4), (2, 2))),
    *(("3-4-fp32", s, w) for s, w in ((1, 3), (3, 2))),
    ("sgd", 2, 3), ("bf16opt", 2, 3), ("subs", 1, 3), ("robin", 3, 3), ("robin", 1, 2), ("aligned", 3, 2),
]  # fmt: skip
if FULL:
    PAIRS = [(f"{a}-{n}-{d}", s, w) for a, n, d, s, w in product(STAGES, WORLDS, DTYPES, STAGES, WORLDS)] + PAIRS[-6:]
UNIVERSALS = [("1-2-fp32", 1, 3), ("1-2-fp32", 3, 3), ("2-3-bf16", 2, 2), ("3-3-fp32", 3, 2), ("3-2-bf16", 2, 3), ("3-2-bf16", 3, 4)]


@pytest.fixture(scope="module")
def root(zero_root):
    return zero_root


@pytest.fixture(scope="module")
def server(zero_server):
    return zero_server


@pytest.fixture(scope="module")
def sources(zero_made):
    """name -> what the job answered; the checkpoint is at root/name, what DeepSpeed says it holds at root/name.pt."""
    return zero_made


def read(path: Path, tag: str = ""):
    """(format, settled checkpoint, tensors)."""
    place = place_of(str(path))
    mine = [f for f in FORMATS.values() if f.probe(place)]
    assert len(mine) == 1, mine
    return mine[0].name, *tensors_of(place, mine[0].read(place, ReadOptions(tag)))


def tensors_of(place, checkpoint):
    """(settled checkpoint, tensors)."""
    checkpoint.prove()
    pool = Pool(1)
    with Reading(place, checkpoint) as reading:
        compare_replicas(reading, pool)
        settled = settle(reading, pool)
    pool.close()
    tensors = {}
    with Reading(place, settled) as reading:
        for name, tensor in settled.tensors.items():
            raw = reading.array(name).reshape(-1).view(np.uint8).copy()
            tensors[name] = torch.from_numpy(raw).view(TORCH[tensor.dtype]).reshape(tensor.shape)
    return settled, tensors


def held(root: Path, name: str) -> dict:
    return torch.load(root / f"{name}.pt", weights_only=False)


def compare(said: dict, checkpoint, tensors: dict, *, computes: str) -> None:
    """Everything DeepSpeed says it holds is what was read, and nothing else was."""
    for fqn, master in said["master"].items():
        assert torch.equal(tensors[f"model.{fqn}"], master), fqn
        for slot, value in said["state"][fqn].items():
            assert torch.equal(tensors[f"optim.state.{fqn}.{slot}"], value), (fqn, slot)
        if said["steps"]:
            assert [float(tensors[f"optim.state.{fqn}.step"])] == said["steps"]
        if computes != "fp32":
            assert checkpoint.derived[f"model.{fqn}"] == {"bf16": "BF16", "fp16": "F16"}[computes]
    for fqn, weight in said["module"].items():
        assert torch.equal(tensors[f"model.{fqn}"].to(weight.dtype), weight), fqn
    for fqn, buffer in said["buffers"].items():
        assert tensors[f"model.{fqn}"].dtype == buffer.dtype
        assert torch.equal(tensors[f"model.{fqn}"], buffer), fqn
    slots = {s for state in said["state"].values() for s in state} | ({"step"} if said["steps"] else set())
    known = {f"model.{n}" for n in {*said["module"], *said["buffers"]}} | {f"optim.state.{n}.{s}" for n in said["master"] for s in slots}
    assert set(tensors) == known
    assert checkpoint.aliases == {"model.head.weight": "model.wte.weight"}
    assert checkpoint.buffers == {f"model.{n}" for n in said["buffers"]}
    assert [{k: v for k, v in g.items() if k != "params"} for g in checkpoint.groups] == said["groups"]
    assert checkpoint.objects["step"] == said["global_steps"]
    assert checkpoint.objects["extras.lr_scheduler"] == said["scheduler"]
    assert checkpoint.objects["extras.note"] == "client"
    assert checkpoint.objects["extras.list"] == [1, 2.5, None]


GROUPS = [["wte.weight", "up.weight", "down.weight"], ["gain", "up.bias", "down.bias", "norm.weight", "norm.bias"]]


@pytest.mark.parametrize("name", [*(f"{s}-{w}-{d}" for w, d, s in product(WORLDS, DTYPES, STAGES)), *VARIANTS])
def test_reads_what_deepspeed_says_it_holds(root, sources, name):
    kind, checkpoint, tensors = read(root / name)
    assert kind == f"zero{sources[name]['stage']}"
    compare(held(root, name), checkpoint, tensors, computes=sources[name]["dtype"])
    assert [g["params"] for g in checkpoint.groups] == GROUPS  # the optimizer's order, also where gradients go round robin
    assert not checkpoint.notes


def test_the_tag_folder_itself_and_tags_by_name(root, sources):
    folder = root / "1-2-fp32"
    assert read(folder)[1].tensors == read(folder, "global_step3")[1].tensors
    _, inside, tensors = read(folder / "global_step3")
    compare(held(root, "1-2-fp32"), inside, tensors, computes="fp32")
    with pytest.raises(NotFound, match="global_step3"):
        ZERO1.read(place_of(str(folder)), ReadOptions("global_step9"))


def same(a: dict, b: dict) -> None:
    """Two engines hold the same, bit by bit."""
    for part in ("master", "module", "buffers"):
        assert a[part].keys() == b[part].keys()
        for name, value in a[part].items():
            assert value.dtype == b[part][name].dtype
            assert torch.equal(value, b[part][name]), (part, name)
    for name, state in a["state"].items():
        for slot, value in state.items():
            assert torch.equal(value, b["state"][name][slot]), (name, slot)
    for part in ("steps", "groups", "scheduler", "global_steps"):
        assert a[part] == b[part], part


def near(losses: list[float], wanted: list[float], dtype: str) -> None:
    """Equal up to the order in which ranks' gradients are summed: exact for 2 and 4 ranks of one batch, a bit for 3."""
    assert losses == pytest.approx(wanted, rel=1e-6 if dtype == "fp32" else 2e-3)


@pytest.fixture(scope="module")
def loaded(root, server, sources):
    """(source, stage, world) -> what DeepSpeed says of the converted checkpoint that it loaded; the model was initialised otherwise."""
    tasks: dict[int, dict[tuple, dict]] = {w: {} for w in WORLDS}
    for name, stage, world in PAIRS:
        source = sources[name]
        target = root / f"to-{name}-{stage}-{world}"
        zero = {"round_robin_gradients": True} if name == "robin" and stage == 1 else {}  # as written: the source's setting stays
        config = {} if name != "robin" or zero else {"round_robin_gradients": False}
        if name == "subs":
            zero = {}
        report = convert(str(root / name), str(target), f"zero{stage}", write=WriteOptions(ranks=world, config=config), check=True, workers=1, sync=False)
        assert not report.dropped
        tasks[world][name, stage, world] = {
            "stage": stage, "dtype": source["dtype"], "optimizer": source.get("optimizer", "adamw"), "zero": zero, "seed": 99,
            "load": str(target), "dump": f"{target}.pt", "next": 2,
        }  # fmt: skip
    found = {}
    for world, named in tasks.items():
        answers = server.ask(world, [*named.values()]) if named else []
        found |= dict(zip(named, answers, strict=True))
    return found


@pytest.mark.parametrize("pair", PAIRS, ids=lambda p: f"{p[0]}-to-{p[1]}-{p[2]}")
def test_deepspeed_loads_it_at_another_stage_and_size_and_trains_on(root, sources, loaded, pair):
    name, stage, world = pair
    same(held(root, f"to-{name}-{stage}-{world}"), held(root, name))
    near(loaded[pair]["next"], sources[name]["next"], sources[name]["dtype"])
    assert loaded[pair]["client"] == {"note": "client", "list": [1, 2.5, None]}


@pytest.fixture(scope="module")
def universal(root, server, sources):
    """(source, stage, world) -> what DeepSpeed's universal loader makes of ours."""
    tasks: dict[int, dict[tuple, dict]] = {w: {} for w in WORLDS}
    for name in dict.fromkeys(n for n, _, _ in UNIVERSALS):
        report = convert(str(root / name), str(root / f"uni-{name}"), "universal", check=True, workers=1, sync=False)
        assert any("does not load buffers and frozen parameters" in n for n in report.notes)
    for name, stage, world in UNIVERSALS:
        folder = root / f"uni-{name}"
        tasks[world][name, stage, world] = {
            "stage": stage, "dtype": sources[name]["dtype"], "seed": 99, "universal": True, "load": str(folder),
            "mend": str(folder / "global_step3_universal"), "dump": str(root / f"uni-{name}-{stage}-{world}.pt"), "next": 2,
        }  # fmt: skip
    found = {}
    for world, named in tasks.items():
        found |= dict(zip(named, server.ask(world, [*named.values()]) if named else [], strict=True))
    return found


@pytest.mark.parametrize("pair", UNIVERSALS, ids=lambda p: f"{p[0]}-to-{p[1]}-{p[2]}")
def test_deepspeed_loads_our_universal_checkpoint_into_all_stages(root, sources, universal, pair):
    """After `deepspeed_job.mend` made good what DeepSpeed 0.19.8 leaves out (frozen weights, buffers) or mixes up in stage 3 (`step`, settings of groups)."""
    name, stage, world = pair
    same(held(root, f"uni-{name}-{stage}-{world}"), held(root, name))
    near(universal[pair]["next"], sources[name]["next"], sources[name]["dtype"])


@pytest.mark.parametrize("name", ["1-2-fp32", "2-3-bf16", "3-2-bf16", "3-3-fp32"])
def test_reads_deepspeeds_own_universal_checkpoints_and_ours(root, server, sources, name):
    theirs = root / f"theirs-{name}"
    shutil.copytree(root / name, theirs)
    server.ask(0, [{"input": str(theirs / "global_step3"), "output": str(theirs / "global_step3_uni")}])
    for path in (theirs / "global_step3_uni", root / f"bare-{name}"):
        if path.name.startswith("bare"):
            convert(str(root / name), str(path), "universal", write=WriteOptions(ranks=2, config={"stage": 3}), check=True, workers=1, sync=False)
        kind, checkpoint, tensors = read(path)
        assert kind == "universal"
        compare(held(root, name), checkpoint, tensors, computes=sources[name]["dtype"])
        assert [g["params"] for g in checkpoint.groups] == GROUPS
    assert read(theirs)[0] == f"zero{sources[name]['stage']}"  # both lie there: the run's own is meant
    (theirs / "latest").unlink()
    assert read(theirs)[0] == "universal"


def test_through_other_formats_and_back(root, sources, server):
    """zero2 of 3 ranks -> ckptd's own -> zero3 of 2: loads, and goes on. A session does not say which names are buffers; the user does."""
    name = "2-3-bf16"
    convert(str(root / name), str(root / "own"), "ckptd", write=WriteOptions(ranks=2), check=True, workers=1, sync=False)
    options = WriteOptions(ranks=2, dtype="BF16", config={"buffers": "seen, count"})
    report = convert(str(root / "own"), str(root / "own-3"), "zero3", write=options, check=True, workers=1, sync=False)
    assert not report.dropped
    assert any("frozen.bias" in n and "--config buffers" in n for n in report.notes)
    task = {"stage": 3, "dtype": "bf16", "seed": 99, "load": str(root / "own-3"), "dump": str(root / "own-3.pt"), "next": 2}
    (answer,) = server.ask(2, [task])
    same(held(root, "own-3"), held(root, name))
    near(answer["next"], sources[name]["next"], "bf16")


@pytest.mark.parametrize("stage", [2, 3])
def test_weights_alone_load_without_optimizer_states(root, sources, server, stage):
    """In stage 3 DeepSpeed then reads our files with its own zero_to_fp32."""
    if stage == 3:
        pytest.importorskip("huggingface_hub", reason="zero_to_fp32 needs it, and deepspeed does not declare it")
    name, target = "1-2-fp32", root / f"weights-{stage}"
    options = WriteOptions(ranks=2, drop=frozenset({"optimizer"}))
    report = convert(str(root / name), str(target), f"zero{stage}", write=options, check=True, workers=1, sync=False)
    assert len(report.dropped) == 3 * 8
    how = {"load_optimizer_states": False, "load_lr_scheduler_states": False}
    server.ask(2, [{"stage": stage, "dtype": "fp32", "seed": 99, "load": str(target), "how": how, "slots": False, "dump": f"{target}.pt"}])
    was, now = held(root, name), held(root, target.name)
    for part in ("master", "module", "buffers"):
        assert all(torch.equal(now[part][n], v) for n, v in was[part].items()), part


def test_our_checkpoint_engine_sums_what_deepspeed_saves_and_looks_before_it_loads(root, sources, server):
    names = sorted(p.name for p in (root / "files" / "global_step3").iterdir())
    assert [f"{n}.ckptd-sums.json" for n in names if n.endswith(".pt")] == [n for n in names if not n.endswith(".pt")]
    rotten = root / "rotten"
    shutil.copytree(root / "files", rotten)
    file = next((rotten / "global_step3").glob("*_rank_1_*.pt"))
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    task = {"stage": 2, "dtype": "bf16", "seed": 99, "files": "ckptd"}
    good = task | {"load": str(root / "files"), "dump": str(root / "files-again.pt"), "next": 2}
    assert server.ask(2, [good])[0]["next"] == sources["files"]["next"]
    same(held(root, "files-again"), held(root, "files"))
    with pytest.raises(AssertionError, match="ChecksumMismatch.*are not those that were written"):
        server.ask(2, [task | {"load": str(rotten)}])


# --- live -------------------------------------------------------------------------------------------------------------------

LIVE = [(1, "bf16"), (2, "fp32"), (3, "bf16"), (3, "fp32")]
LIVE_PAIRS = [(1, "bf16", 3), (2, "fp32", 1), (3, "bf16", 2), (3, "fp32", 3)]


@pytest.fixture(scope="module")
def live(root, server):
    """Sessions over real engines: captured in a world of 2; restored in a world of 3, into other stages, from memory and from the durable tier."""
    directory = root / "daemon"
    directory.mkdir(mode=0o700)

    def task(stage: int, dtype: str, name: str, steps: int) -> dict:
        how = {"job": f"z{name}", "directory": str(directory), "store": str(root / f"live-{name}"), "steps": steps}
        return {"stage": stage, "dtype": dtype, "seed": 7 if steps else 99, "live": how, "next": 2}

    saved = [task(s, d, f"{s}{d}", 3) | {"dump": str(root / f"live-{s}{d}.pt")} for s, d in LIVE]
    back = [task(t, d, f"{s}{d}", 0) | {"dump": str(root / f"back-{s}{d}-{t}.pt")} for s, d, t in LIVE_PAIRS]
    try:
        first = dict(zip(LIVE, server.ask(2, saved), strict=True))
        second = dict(zip(LIVE_PAIRS, server.ask(3, back), strict=True))
    finally:
        stop_daemon(directory)
    back[0]["live"]["directory"] = str(root / "daemon2")
    back[0]["dump"] = str(root / "durable.pt")
    Path(back[0]["live"]["directory"]).mkdir(mode=0o700)
    try:
        (durable,) = server.ask(4, back[:1])
    finally:
        stop_daemon(root / "daemon2")
    return first, second, durable


@pytest.mark.parametrize("pair", LIVE_PAIRS, ids=lambda p: f"{p[0]}-{p[1]}-to-{p[2]}")
def test_a_session_captures_partitions_and_restores_them_into_another_stage_and_size(root, sources, live, pair):
    stage, dtype, target = pair
    first, second, _ = live
    assert first[stage, dtype]["live"]["counts"] == {"captured": 3}
    assert first[stage, dtype]["live"]["losses"] == sources[f"{stage}-2-{dtype}"]["losses"]  # capturing changes nothing
    same(held(root, f"live-{stage}{dtype}"), held(root, f"{stage}-2-{dtype}"))
    told = second[pair]["live"]
    assert (told["step"], told["source"], told["mine"], told["missing"], told["unexpected"]) == (3, "memory", "step 3", [], [])
    same(held(root, f"back-{stage}{dtype}-{target}"), held(root, f"live-{stage}{dtype}"))
    near(second[pair]["next"], first[stage, dtype]["next"], dtype)


def test_a_session_restores_from_the_durable_tier(root, live):
    first, _, durable = live
    stage, dtype, _ = LIVE_PAIRS[0]
    assert durable["live"]["step"] == 3
    assert durable["live"]["source"] != "memory"
    same(held(root, "durable"), held(root, f"live-{stage}{dtype}"))
    near(durable["next"], first[stage, dtype]["next"], dtype)


def test_what_a_session_persisted_converts_into_deepspeeds_files(root, live, server):
    """The daemon's images -> zero2 of 3 ranks, which DeepSpeed loads without any session."""
    first, _, _ = live
    options = WriteOptions(ranks=3, config={"buffers": "seen,count"}, dtype="BF16")
    report = convert(str(root / "live-1bf16"), str(root / "from-live"), "zero2", write=options, check=True, workers=1, sync=False)
    assert not report.dropped
    task = {"stage": 2, "dtype": "bf16", "seed": 99, "load": str(root / "from-live"), "dump": str(root / "from-live.pt"), "next": 2}
    (answer,) = server.ask(3, [task])
    same(held(root, "from-live"), held(root, "live-1bf16"))
    near(answer["next"], first[1, "bf16"]["next"], "bf16")


# --- crafted files ----------------------------------------------------------------------------------------------------------


def crafted(folder: Path, tp: int = 1, pp: int = 1, dp: int = 2, patterns: dict | None = None) -> dict[str, torch.Tensor]:
    """Stage 1 with tensor and pipeline parallel ranks, as Megatron-DeepSpeed lays it out; what is padding is NaN. Returns the whole tensors."""
    g = torch.Generator().manual_seed(5)
    full = {
        "0.embed.weight": torch.randn(11, 6, generator=g), "1.qkv.weight": torch.randn(12, 6, generator=g), "1.dense.weight": torch.randn(6, 4, generator=g),
        "1.norm.weight": torch.randn(6, generator=g), "2.glu.weight": torch.randn(16, 3, generator=g), "2.out.bias": torch.randn(5, generator=g),
    }  # fmt: skip
    moment = {n: torch.randn(t.shape, generator=g) for n, t in full.items()}
    folder.mkdir(parents=True)

    def cut(name: str, t: torch.Tensor, rank: int) -> torch.Tensor:
        if tp == 1 or "norm" in name or "out.bias" in name:
            return t
        if "embed" in name:
            t = torch.cat([t, torch.full((-(-11 // tp) * tp - 11, 6), float("nan"))])
        if "glu" in name:
            return torch.cat([h.chunk(tp)[rank] for h in t.chunk(2)])
        return t.chunk(tp, dim=1 if "dense" in name else 0)[rank]

    for stage, rank in product(range(pp), range(tp)):
        mine = [n for n in full if pp == 1 or int(n[0]) * pp // 3 == stage]
        parts = {n: cut(n, full[n], rank) for n in mine}
        moments = {n: cut(n, moment[n], rank) for n in mine}
        mp = stage * tp + rank
        states = {
            "module": {n: t.bfloat16() for n, t in parts.items()}, "buffer_names": [], "param_shapes": [{n: t.shape for n, t in parts.items()}],
            "shared_params": {}, "dp_world_size": dp, "mp_world_size": tp * pp, "checkpoint_parallel_dimensions": {"pp_degree": pp, "tp_degree": tp},
            "global_steps": 7, "ds_config": {"bf16": {"enabled": True}}, "ds_version": "0.19.8",
        }  # fmt: skip
        if patterns is not None:
            states["universal_checkpoint_info"] = patterns
        torch.save(states, folder / f"mp_rank_{mp:02d}_model_states.pt")
        flat = torch.cat([t.flatten() for t in parts.values()])
        flat_m = torch.cat([t.flatten() for t in moments.values()])
        per = -(-len(flat) // (2 * dp)) * 2
        for r in range(dp):
            lean = min(max(len(flat) - r * per, 0), per)
            held_m = torch.full((per,), float("nan"))
            held_m[:lean] = flat_m[r * per : r * per + lean]
            state = {0: {"step": torch.tensor(7.0), "exp_avg": held_m}}
            inner = {
                "base_optimizer_state": {"state": state, "param_groups": [{"lr": 0.1, "params": [0]}]}, "zero_stage": 1, "partition_count": [dp],
                "single_partition_of_fp32_groups": [flat[r * per : r * per + lean].clone()], "group_paddings": [per - lean], "param_slice_mappings": [{}],
            }  # fmt: skip
            torch.save({"optimizer_state_dict": inner}, folder / f"bf16_zero_pp_rank_{r}_mp_rank_{mp:02d}_optim_states.pt")
    return {f"model.{n}": t for n, t in full.items()} | {f"optim.state.{n}.exp_avg": t for n, t in moment.items()}


PATTERNS = {
    "tp_replicated_parameter_patterns": [r".*norm\.weight", r".*out\.bias"], "parameter_with_row_parallelism_patterns": [r".*dense\.weight"],
    "vocabulary_parameter_patterns": [r".*embed\.weight"], "original_vocab_size": 11, "parameter_with_2_sub_params_cat_dim_0": [r".*glu\.weight"],
}  # fmt: skip


@pytest.mark.parametrize(("tp", "pp", "dp"), [(1, 1, 3), (1, 3, 2), (2, 1, 2), (2, 3, 1), (4, 1, 3)])
def test_tensor_and_pipeline_parallel_ranks(tmp_path, tp, pp, dp):
    full = crafted(tmp_path / "t", tp, pp, dp, PATTERNS)
    kind, checkpoint, tensors = read(tmp_path / "t")
    assert kind == "zero1"
    assert {n: t for n, t in tensors.items() if not n.endswith(".step")}.keys() == full.keys()
    for name, value in full.items():
        assert torch.equal(tensors[name], value), name
    assert checkpoint.groups == [{"lr": 0.1, "params": [n.removeprefix("model.") for n in full if n.startswith("model.")]}]


def test_tensor_parallel_shards_without_patterns_are_refused_by_name(tmp_path):
    crafted(tmp_path / "t", tp=2)
    with pytest.raises(BadForeign, match=r"0\.embed\.weight: 2 tensor parallel shards"):
        read(tmp_path / "t")


def _missing(folder: Path) -> str:
    next(folder.glob("*_rank_1_*")).unlink()
    return "2 data parallel ranks saved"


def _hole(folder: Path) -> str:
    file = next(folder.glob("*_rank_1_*"))
    file.rename(str(file).replace("rank_1", "rank_999999"))
    return "2 optim_states files"


def _nonsense(folder: Path) -> str:
    file = next(folder.glob("*_rank_0_*optim*"))
    held = torch.load(file)
    held["optimizer_state_dict"]["base_optimizer_state"]["param_groups"] = [{"lr": 1.0}]
    torch.save(held, file)
    return "not as DeepSpeed writes it"


def _bomb(folder: Path) -> str:
    file = folder / "mp_rank_00_model_states.pt"
    held = torch.load(file)
    held["param_shapes"][0]["1.norm.weight"] = (2**40, 2**40)
    torch.save(held, file)
    return "cannot have the shape"


def _short(folder: Path) -> str:
    file = next(folder.glob("*_rank_1_*optim*"))
    held = torch.load(file)
    held["optimizer_state_dict"]["single_partition_of_fp32_groups"][0] = torch.zeros(3)
    torch.save(held, file)
    return "3 elements"


def _experts(folder: Path) -> str:
    (folder / "layer_0_expert_1_mp_rank_00_model_states.pt").write_bytes(b"x")
    return "num_experts does not say"


def _shape(folder: Path) -> str:
    file = folder / "mp_rank_00_model_states.pt"
    held = torch.load(file)
    held["param_shapes"][0]["1.norm.weight"] = torch.Size([7])
    torch.save(held, file)
    return "has 109 elements, its parameters' shapes give 110"


def _expert_groups(folder: Path) -> str:
    for file in folder.glob("*optim*"):
        held = torch.load(file)
        held["optimizer_state_dict"]["partition_count"] = [1]
        torch.save(held, file)
    return "1 of 2 ranks"


def _no_tensor(folder: Path) -> str:
    file = next(folder.glob("*_rank_0_*optim*"))
    held = torch.load(file)
    held["optimizer_state_dict"]["base_optimizer_state"]["state"][0]["exp_avg"] = torch.zeros(0)
    torch.save(held, file)
    return "exp_avg"


@pytest.mark.parametrize("spoil", [_missing, _hole, _short, _experts, _shape, _expert_groups, _no_tensor, _nonsense, _bomb])
def test_damaged_or_foreign_files_are_refused_by_name(tmp_path, spoil):
    crafted(tmp_path / "t")
    said = spoil(tmp_path / "t")
    with pytest.raises(BadForeign, match=said):
        read(tmp_path / "t")


def test_what_deepspeed_cannot_hold_is_said(tmp_path):
    crafted(tmp_path / "t")
    source, target = str(tmp_path / "t"), str(tmp_path / "u")
    with pytest.raises(BadArgument, match="tp 2"):
        convert(source, target, "zero1", write=WriteOptions(tp=2), workers=1, sync=False)
    with pytest.raises(BadArgument, match="subgroups"):
        convert(source, target, "zero3", write=WriteOptions(config={"subgroups": 3}), workers=1, sync=False)
    place = place_of(source)
    with Reading(place, ZERO1.read(place, ReadOptions())) as reading:
        pool = Pool(1)
        checkpoint = settle(reading, pool)
        pool.close()
    checkpoint.scalars["optim.state.1.norm.weight.step"] = 9.0
    with pytest.raises(Unstorable, match="one per param group"):
        ZERO2.write(checkpoint, WriteOptions())
    assert ZERO2.write(checkpoint, WriteOptions(drop=frozenset({"optimizer"}))).dropped


def test_every_format_has_its_own_probe(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "latest").write_text("gone")
    assert not any(f.probe(place_of(str(tmp_path / "empty"))) for f in FORMATS.values())
    assert {f.name for f in FORMATS.values()} == {"universal", "zero1", "zero2", "zero3"}
    assert deepspeed.stage_of(place_of(str(tmp_path / "empty"))) == -1
