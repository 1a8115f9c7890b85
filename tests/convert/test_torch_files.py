"""Files of torch.save: full state dicts of real frameworks, numbered optimizers, DTensors in a file per rank; and what is written, loaded and trained on."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from ckptd.errors import BadArgument, BadForeign, Unstorable
from ckptd.formats import ReadOptions, WriteOptions, place_of
from ckptd.integrations.torch_native import TORCH
from ckptd.integrations.torch_state import cleaned, named_by_shape
from ckptd.reading import open_checkpoint
from tests.convert.dcp_job import Run, described, goes_on, trained_and_saved, union
from tests.convert.test_dcp import convert, expected_groups, groups_in, plain_run, truth_of
from tests.forks import ranks

pytestmark = pytest.mark.timeout(120)


def read(path, **hints):
    place = place_of(str(path))
    assert TORCH.probe(place)
    ck = TORCH.read(place, ReadOptions(hints=hints))
    return ck, truth_of(place, ck)


# --- what frameworks save ---------------------------------------------------------------------------------------------------


def full_state(kind, path):
    """Two steps, a full state dict gathered on rank 0 and saved there, two more steps."""

    def work(rank):
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, get_optimizer_state_dict

        run = Run(kind)
        run.train(1, 2)
        options = StateDictOptions(full_state_dict=True, cpu_offload=kind != "fsdp1")  # FSDP1 on the CPU dies of it: it copies what it has freed
        state = {"model": get_model_state_dict(run.model, options=options), "optim": get_optimizer_state_dict(run.model, run.optimizer, options=options)}
        if rank == 0:
            torch.save({**state, "step": 2}, path)
        tensors = {f"model.{n}": t for n, t in state["model"].items()}
        tensors |= {f"optim.state.{f}.{k}": t for f, slots in state["optim"].get("state", {}).items() for k, t in slots.items()}
        truth = {n: described(t) for n, t in tensors.items()} if kind == "fsdp1" else run.truth()
        return {"truth": truth, "losses": run.train(3, 4)}

    return work


@pytest.mark.parametrize("kind", ["fsdp", "hsdp", "fsdp1", "ddp"])
def test_full_state_dicts_are_read_and_go_on_elsewhere(kind, tmp_path):
    world = 4 if kind == "hsdp" else 2
    saved = ranks(world, full_state(kind, str(tmp_path / "a.pt")))
    ck, found = read(tmp_path / "a.pt")
    assert found == union(saved)
    assert groups_in(ck) == expected_groups(tied=True)
    assert ck.objects["step"] == 2
    convert(tmp_path / "a.pt", tmp_path / "b", "dcp", ranks=2)
    back = ranks(2, goes_on("fsdp", str(tmp_path / "b")))
    assert back[0]["losses"] == pytest.approx(saved[0]["losses"], abs=2e-6)


@pytest.mark.parametrize(("kind", "world"), [("fsdp", 3), ("tp", 2), ("ddp", 2), ("plain", 1)])
def test_what_is_written_is_loaded_and_trained_on(kind, world, tmp_path):
    """Not FSDP2 x TP: torch 2.13 fails to distribute a full tensor to uneven parts of it (an assertion in `_StridedShard`)."""
    saved = ranks(2, trained_and_saved("fsdp", str(tmp_path / "a"), tie=False))
    convert(tmp_path / "a", tmp_path / "b.pt", "torch")
    back = ranks(world, goes_on(kind, str(tmp_path / "b.pt"), tie=False))
    assert union(back) == union(saved)
    assert back[0]["step"] == 2
    assert back[0]["losses"] == pytest.approx(saved[0]["losses"], abs=2e-6)


def test_numbered_optimizer_both_ways(tmp_path):
    """`{"model": ..., "optimizer": optimizer.state_dict()}` of a plain loop, with DDP's prefixes, a scheduler and random states; and back."""
    run = plain_run()
    scheduler = torch.optim.lr_scheduler.StepLR(run.optimizer, 5)
    model = {f"module.{n}": t for n, t in run.model.state_dict().items()}
    extras = {"epoch": 3, "global_step": 2, "rng": torch.get_rng_state(), "numpy": np.random.default_rng(1).bit_generator.state, "scheduler": scheduler.state_dict()}
    torch.save({"model_state_dict": model, "optimizer_state_dict": run.optimizer.state_dict(), **extras}, tmp_path / "a.pt")
    ck, found = read(tmp_path / "a.pt")
    assert found == run.truth()
    assert groups_in(ck) == expected_groups(tied=True)
    assert (ck.objects["step"], ck.objects["extras.epoch"], ck.aliases) == (2, 3, {"model.head.weight": "model.emb.weight"})
    convert(tmp_path / "a.pt", tmp_path / "b.pt", "torch", config={"index": "true"})
    state = torch.load(tmp_path / "b.pt", weights_only=True)
    assert torch.equal(state["extras"]["rng"], extras["rng"])
    assert state["extras"]["numpy"] == extras["numpy"]
    other = Run("plain", seed=3)
    other.model.load_state_dict(state["model"])
    other.optimizer.load_state_dict(state["optim"])
    assert other.train(3, 4) == run.train(3, 4)


def test_accelerates_full_files(tmp_path):
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    run = plain_run()
    torch.save(run.model.state_dict(), tmp_path / "pytorch_model_fsdp.bin")
    torch.save(get_optimizer_state_dict(run.model, run.optimizer), tmp_path / "optimizer.bin")
    torch.save({"last_epoch": 7}, tmp_path / "scheduler.bin")
    ck, found = read(tmp_path)
    assert found == run.truth()
    assert groups_in(ck) == expected_groups(tied=True)
    assert ck.objects["extras.scheduler"] == {"last_epoch": 7}


@pytest.mark.parametrize(("kind", "world"), [("fsdp", 3), ("hsdp", 4), ("tp_fsdp", 6)])
def test_dtensors_in_a_file_per_rank(kind, world, tmp_path):
    """As verl and SkyRL save: sharded state dicts by torch.save, the optimizer numbered; also uneven FSDP2 x TP."""

    def work(rank):
        run = Run(kind, tie=False)
        run.train(1, 2)
        torch.save(run.model.state_dict(), tmp_path / f"model_world_size_{world}_rank_{rank}.pt")
        torch.save(run.optimizer.state_dict(), tmp_path / f"optim_world_size_{world}_rank_{rank}.pt")
        torch.save({"lr_scheduler": {"last_epoch": 2}, "rng": torch.get_rng_state(), "who": rank}, tmp_path / f"extra_state_world_size_{world}_rank_{rank}.pt")
        return {"truth": run.truth()}

    saved = ranks(world, work)
    ck, found = read(tmp_path)
    assert found == union(saved)
    assert groups_in(ck) == expected_groups(tied=False)
    assert ck.objects["extras.lr_scheduler"] == {"last_epoch": 2}
    assert [ck.per_rank[r]["extras.who"] for r in range(world)] == [*range(world)]
    (tmp_path / f"optim_world_size_{world}_rank_1.pt").unlink()
    with pytest.raises(BadForeign, match="rank_1.pt is missing"):
        read(tmp_path)


# --- one by one -------------------------------------------------------------------------------------------------------------


def flat_shards(folder, *, original: bool):
    """FSDP1's LOCAL state dict: a torch.save file per rank, and by DCP."""

    def work(rank):
        import torch.distributed.checkpoint as dcp
        from torch.distributed.fsdp import FullyShardedDataParallel, StateDictType

        model = FullyShardedDataParallel(torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Linear(7, 3)), device_id=torch.device("cpu"), use_orig_params=original)
        with FullyShardedDataParallel.state_dict_type(model, StateDictType.LOCAL_STATE_DICT):
            state = model.state_dict()
        torch.save(state, f"{folder}/pytorch_model_fsdp_rank{rank}.bin")
        dcp.save({"model": state}, checkpoint_id=f"{folder}/dcp")
        return sorted(state)

    return work


@pytest.mark.parametrize("original", [False, True])
def test_fsdp1_local_state_dicts_say_too_little_and_are_refused(original, tmp_path):
    keys, _ = ranks(2, flat_shards(str(tmp_path), original=original))
    assert "_flat_param" in keys  # one tensor of all elements: what its parts were called, and in which order, stands nowhere
    for name in ("pytorch_model_fsdp_rank1.bin", "dcp"):
        with pytest.raises(BadForeign, match="no names, shapes or order") as raised:
            open_checkpoint(str(tmp_path / name))
        assert "SHARDED_STATE_DICT" in str(raised.value)


def test_numbers_that_fit_in_two_ways_need_a_hint(tmp_path):
    model = nn.ParameterDict({n: nn.Parameter(torch.randn(3, 3)) for n in "abcd"})
    optimizer = torch.optim.SGD([{"params": [model["c"], model["b"]]}, {"params": [model["a"]], "lr": 0.5}], lr=0.1, momentum=0.9)
    for p in model.parameters():
        p.grad = torch.randn(3, 3)
    optimizer.step()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "a.pt")
    with pytest.raises(BadArgument, match="several ways") as e:
        read(tmp_path / "a.pt")
    assert "params=NAME" in str(e.value)
    ck, _ = read(tmp_path / "a.pt", params="c,b,a")
    assert [g["params"] for g in ck.groups] == [["c", "b"], ["a"]]
    place = place_of(str(tmp_path / "a.pt"))
    row = ck.tensors["optim.state.c.momentum_buffer"].rows[0]
    assert place.read("a.pt", row.begin, 36) == optimizer.state[model["c"]]["momentum_buffer"].numpy().tobytes()
    with pytest.raises(BadArgument, match="no weight"):
        read(tmp_path / "a.pt", params="c,b,x")


def test_named_by_shape():
    shapes = {0: (2, 3), 1: (3, 3), 2: (3,)}
    names = [("a", (2, 3)), ("b", (3,)), ("c", (3, 3))]
    assert named_by_shape([[0, 1], [2]], shapes, names) == [{0: "a", 1: "c", 2: "b"}]
    assert named_by_shape([[0, 1, 2]], shapes, names) == []  # one group follows the model's order
    assert named_by_shape([[0, 1], [2]], shapes, [*names, ("buffer", (9,))]) == [{0: "a", 1: "c", 2: "b"}]
    assert len(named_by_shape([[0, 1], [2]], shapes, [*names, ("buffer", (3,))])) == 2
    assert len(named_by_shape([[0], [1]], {}, [("a", (1,)), ("b", (1,))])) == 2
    many = [(f"l{i}.{k}", (4, 4) if k == "w" else (4,)) for i in range(2000) for k in "wb"]
    found = named_by_shape([[*range(2000)], [*range(2000, 4000)]], {i: (4, 4) if i < 2000 else (4,) for i in range(4000)}, many)
    assert found[0][1999] == "l1999.w"
    assert found[0][2000] == "l0.b"


def test_names_without_wrappers():
    assert cleaned(["module.a", "module.b._orig_mod.c"]) == {"module.a": "a", "module.b._orig_mod.c": "b.c"}
    assert cleaned(["module.a", "b"]) == {"module.a": "module.a", "b": "b"}
    with pytest.raises(BadForeign, match="both a"):
        cleaned(["a", "_orig_mod.a"])


def test_views_slices_and_dtypes_lie_where_they_lie(tmp_path):
    base = torch.randn(6, 8)
    state = {"t": base.t(), "s": base[1:4, ::2], "h": base.bfloat16(), "i": torch.arange(3), "e": torch.empty(0, 4), "p": nn.Parameter(torch.ones(2))}
    torch.save(state, tmp_path / "a.bin")
    ck, found = read(tmp_path / "a.bin")
    convert(tmp_path / "a.bin", tmp_path / "b.pt", "torch")
    back = torch.load(tmp_path / "b.pt", weights_only=True)["model"]
    assert all(torch.equal(back[n], t) and back[n].dtype == t.dtype for n, t in state.items())
    assert ck.buffers == {"model.i"}
    assert len(found) == 6


def test_options_of_the_writer(tmp_path):
    run = plain_run()
    torch.save({"model": run.model.state_dict(), "optimizer": run.optimizer.state_dict(), "odd": {1, 2}}, tmp_path / "a.pt")
    report = convert(tmp_path / "a.pt", tmp_path / "b.pt", "torch", dtype="BF16", drop=frozenset({"optimizer", "objects"}))
    state = torch.load(tmp_path / "b.pt", weights_only=True)
    assert [*state] == ["model"]
    assert (state["model"]["up.weight"].dtype, state["model"]["scale"].dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(state["model"]["up.weight"], run.model.up.weight.detach().bfloat16())
    assert "extras.odd" in report.dropped
    place = place_of(str(tmp_path / "a.pt"))
    ck = TORCH.read(place, ReadOptions())
    with pytest.raises(BadArgument, match="no such setting"):
        TORCH.write(ck, WriteOptions(config={"nonsense": 1}))
    ck.objects["extras.bad"] = object()
    with pytest.raises(Unstorable, match=r"extras\.bad"):
        TORCH.write(ck, WriteOptions())


def test_what_no_plain_value_says_is_named(tmp_path):
    import argparse

    run = plain_run()
    torch.save({"model": run.model.state_dict(), "args": argparse.Namespace(lr=0.1, dtype=torch.bfloat16), "device": torch.device("cpu")}, tmp_path / "a.pt")
    ck, _ = read(tmp_path / "a.pt")
    assert ck.objects["extras.args"] == {"lr": 0.1, "dtype": "torch.bfloat16"}
    assert any("extras.device" in n for n in ck.notes)
    torch.save([1, 2], tmp_path / "b.pt")
    with pytest.raises(BadForeign, match="no state dict"):
        read(tmp_path / "b.pt")
