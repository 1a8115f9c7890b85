"""DCP: what torch saves in any parallelism, read bit-equal; what is written, loaded by torch at another world size, and trained on."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch

from ckptd.core.image import ITEM_BYTES
from ckptd.core.logical import LITERAL
from ckptd.errors import BadForeign, NotFound, NotTiled
from ckptd.formats import ReadOptions, WriteOptions, place_of
from ckptd.integrations.dcp import DCP, DCP_SAFETENSORS
from ckptd.integrations.dcp_read import Names
from ckptd.integrations.native import CKPTD
from ckptd.storage import open_store
from ckptd.storage.checkpoint import list_checkpoints, verify_checkpoint
from tests.convert.dcp_job import Run, goes_on, trained_and_saved, union
from tests.forks import ranks

pytestmark = pytest.mark.timeout(120)
NAMES = {"F32": "float32", "BF16": "bfloat16", "I64": "int64", "I32": "int32"}


def truth_of(place, ck):
    """canonical name -> [dtype, shape, sha256], from the rows; tied names too."""
    ck.prove()
    found = {}
    for name, t in ck.tensors.items():
        item = ITEM_BYTES[t.dtype]
        out = np.zeros((*t.shape, item), np.uint8)
        for row in t.rows:
            begin, end = row.span(item)
            raw = bytes(ck.literals[begin:end]) if row.file == LITERAL else place.read(ck.files[row.file].name, begin, end - begin)
            flat = np.frombuffer(raw, np.uint8)
            part = np.lib.stride_tricks.as_strided(flat, (*row.box.extent, item), (*(s * item for s in row.strides), 1))
            out[tuple(slice(a, b) for a, b in zip(row.box.start, row.box.stop, strict=True))] = part
        found[name] = [NAMES[t.dtype], list(t.shape), hashlib.sha256(out.tobytes()).hexdigest()]
    return found | {a: found[n] for a, n in ck.aliases.items()}


def read(path, fmt=DCP, **hints):
    place = place_of(str(path))
    assert fmt.probe(place)
    ck = fmt.read(place, ReadOptions(hints=hints))
    return ck, truth_of(place, ck)


def convert(source, target, to, **options):
    import ckptd.convert

    return ckptd.convert.convert(str(source), str(target), to, write=WriteOptions(**options), check=True, sync=False)


def groups_in(ck):
    return [(g["weight_decay"], g["lr"], sorted(g["params"])) for g in ck.groups]


PARAMS = ["down.bias", "down.weight", "emb.weight", "norm.bias", "norm.weight", "up.bias", "up.weight"]
FLAT = [p for p in PARAMS if p.endswith("bias") or p.startswith("norm")]


def expected_groups(*, tied):
    return [(0.1, 1e-2, sorted([*(set(PARAMS) - set(FLAT)), *([] if tied else ["head.weight"])])), (0.0, 3e-3, FLAT)]


@pytest.mark.parametrize(("kind", "world", "flat"), [("fsdp", 4, False), ("hsdp", 4, False), ("tp_fsdp", 4, True), ("pp", 2, True), ("fsdp", 3, True)])
def test_what_torch_saves_is_read_and_goes_on_elsewhere(kind, world, flat, tmp_path):
    saved = ranks(world, trained_and_saved(kind, str(tmp_path / "a"), flat=flat, extra={"sched": {"last_epoch": 2, "lrs": [0.1, 0.2]}}))
    ck, found = read(tmp_path / "a")
    assert found == union(saved)
    tied = kind != "pp"
    assert sorted(groups_in(ck)) == sorted(expected_groups(tied=tied))
    assert ck.objects["step"] == 2
    assert ck.objects["extras.sched"] == {"last_epoch": 2, "lrs": [0.1, 0.2]}
    assert ck.aliases == ({"model.head.weight": "model.emb.weight"} if tied else {})
    assert ck.buffers == {"model.scale"}
    convert(tmp_path / "a", tmp_path / "b", "dcp", ranks=3, config={"flatten": not flat})
    back = ranks(2, goes_on("fsdp", str(tmp_path / "b"), tie=tied, flat=not flat))
    assert union(back) == union(saved)
    assert back[0]["step"] == 2
    assert back[0]["losses"] == pytest.approx(saved[0]["losses"], abs=2e-6)


@pytest.mark.parametrize(("kind", "world", "flatten"), [("pp", 2, True), ("hsdp", 4, False), ("tp", 2, False), ("ddp", 2, False)])
def test_what_is_written_is_loaded_by_torch(kind, world, flatten, tmp_path):
    saved = ranks(2, trained_and_saved("fsdp", str(tmp_path / "a"), tie=False))
    convert(tmp_path / "a", tmp_path / "b", "dcp", ranks=2, config={"flatten": flatten})
    back = ranks(world, goes_on(kind, str(tmp_path / "b"), tie=False, flat=flatten))
    assert union(back) == union(saved)
    assert back[0]["losses"] == pytest.approx(saved[0]["losses"], abs=2e-6)


# --- the live pair ----------------------------------------------------------------------------------------------------------


def writer(path):
    from ckptd.integrations.dcp import CkptdWriter

    return CkptdWriter(path)


def reader(path):
    from ckptd.integrations.dcp import CkptdReader

    return CkptdReader(path)


@pytest.mark.parametrize(
    ("saved_by", "world", "loaded_by", "count", "flat"),
    [("fsdp", 3, "tp_fsdp", 4, False), ("pp", 2, "hsdp", 4, True), ("tp_fsdp", 6, "fsdp", 2, False), ("fsdp", 2, "tp_fsdp", 6, True)],
)
def test_the_live_pair(saved_by, world, loaded_by, count, flat, tmp_path):
    extra = {"sched": {"last_epoch": 2, "betas": (0.9, 0.5)}, "gen": torch.arange(5), "names": ["a", "b"]}
    saved = ranks(world, trained_and_saved(saved_by, str(tmp_path / "a"), writer=writer, flat=flat, tie=False, extra=extra))
    found = list_checkpoints(open_store(str(tmp_path / "a")), None)
    assert [(f.step, f.ok) for f in found] == [(2, True)]
    assert verify_checkpoint(open_store(str(tmp_path / "a")), found[0].directory).ok
    ck, held = read(tmp_path / "a", CKPTD)
    assert {n: d for n, d in held.items() if not n.startswith("extras.")} == union(saved)
    assert sorted(groups_in(ck)) == sorted(expected_groups(tied=False))
    back = ranks(count, goes_on(loaded_by, str(tmp_path / "a"), reader=reader, tie=False, flat=not flat))
    assert union(back) == union(saved)
    assert back[0]["step"] == 2
    assert back[0]["losses"] == pytest.approx(saved[0]["losses"], abs=2e-6)


# --- what lies, and other people's folders ----------------------------------------------------------------------------------


def test_uneven_fsdp_x_tp_whose_metadata_lies_is_placed_as_the_mesh_places_it(tmp_path):
    """Hidden 7 on 3 x 2 ranks: rank 4 has no row and .metadata says one at 6; torch itself cannot load this."""
    saved = ranks(6, trained_and_saved("tp_fsdp", str(tmp_path / "a"), tie=False))
    ck, found = read(tmp_path / "a")
    assert found == union(saved)
    assert [n for n in ck.notes if "pytorch#161368" in n and "3 x 2" in n], ck.notes
    convert(tmp_path / "a", tmp_path / "b", "dcp")
    back = ranks(2, goes_on("fsdp", str(tmp_path / "b"), tie=False))
    assert back[0]["losses"] == pytest.approx(saved[0]["losses"], abs=2e-6)
    with pytest.MonkeyPatch.context() as m, pytest.raises(NotTiled, match=r"up\.weight") as e:
        m.setattr("ckptd.integrations.dcp_read.Reader._derived", lambda *_: None)  # as if no mesh explained it
        read(tmp_path / "a")
    assert "161368" in str(e.value)


def saved_here(path, state, **kwargs):
    import warnings

    import torch.distributed.checkpoint as dcp

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(state, checkpoint_id=str(path), **kwargs)


def plain_run(steps=2, *, tie=True):
    run = Run("plain", tie=tie)
    run.train(1, steps)
    return run


def test_torchtitans_layout(tmp_path):
    """The model at the root, the optimizer flattened below `optimizer.`, a train state of tensors."""
    run = plain_run(tie=False)
    state = run.state(flat=True)
    more = {"train_state": {"step": torch.tensor(2, dtype=torch.int32), "tokens": torch.tensor(99)}, "lr_scheduler": {"last_epoch": 2}}
    saved_here(tmp_path / "a", {**state["model"], "optimizer": state["optim"], **more})
    ck, found = read(tmp_path / "a")
    assert {n: d for n, d in found.items() if not n.startswith("extras.")} == run.truth()
    assert ck.tensors.keys() - run.truth().keys() == {"extras.train_state.step", "extras.train_state.tokens"}
    assert (ck.objects["step"], ck.objects["extras.lr_scheduler"]) == (2, {"last_epoch": 2})
    assert sorted(groups_in(ck)) == sorted(expected_groups(tied=False))
    convert(tmp_path / "a", tmp_path / "b", "dcp")
    again, there = read(tmp_path / "b")
    assert there == found
    assert again.objects == ck.objects


def test_accelerates_two_folders(tmp_path):
    run = plain_run()
    state = run.state(flat=False)
    saved_here(tmp_path / "a" / "pytorch_model_fsdp_0", {"model": state["model"]})
    saved_here(tmp_path / "a" / "optimizer_0", {"optimizer": state["optim"]})
    ck, found = read(tmp_path / "a")
    assert found == run.truth() | {"model.head.weight": run.truth()["model.head.weight"]}
    assert sorted(groups_in(ck)) == sorted(expected_groups(tied=True))


def test_numbered_optimizer_and_wrapped_names(tmp_path):
    """`optimizer.state_dict()` as it is, a compiled model, and the newest of two steps."""
    run = plain_run()
    wrapped = {f"module._orig_mod.{n}": t for n, t in run.model.state_dict().items()}
    for step in (2, 10):
        saved_here(tmp_path / "a" / f"step-{step}", {"state_dict": wrapped, "optimizer": run.optimizer.state_dict(), "global_step": step})
    ck, found = read(tmp_path / "a")
    assert found == run.truth()
    assert groups_in(ck) == expected_groups(tied=True)
    assert ck.objects["step"] == 10
    place = place_of(str(tmp_path / "a"))
    assert DCP.read(place, ReadOptions(tag="2")).objects["step"] == 2
    with pytest.raises(NotFound, match="77"):
        DCP.read(place, ReadOptions(tag="77"))


def test_metadata_per_rank(tmp_path):
    def work(rank):
        run = Run("fsdp")
        run.train(1, 2)
        import torch.distributed.checkpoint as dcp

        dcp.save({**run.state(), "mine": rank, "step": 2}, checkpoint_id=str(tmp_path / "a"), use_collectives=False)
        return {"truth": run.truth()}

    saved = ranks(2, work)
    assert sorted(p.name for p in (tmp_path / "a").iterdir() if "metadata" in p.name) == ["__0.metadata", "__1.metadata"]
    ck, found = read(tmp_path / "a")
    assert found == union(saved)
    assert (ck.objects["extras.mine"], ck.per_rank) == (0, {1: {"extras.mine": 1}})
    (tmp_path / "a" / "__0.metadata").unlink()
    with pytest.raises(BadForeign, match=r"__0\.metadata is missing"):
        read(tmp_path / "a")


def test_what_is_not_whole_is_refused(tmp_path):
    run = plain_run()
    saved_here(tmp_path / "a", run.state())
    data = tmp_path / "a" / "__0_0.distcp"
    whole = data.read_bytes()
    data.write_bytes(whole[:-1000])
    with pytest.raises(BadForeign, match="__0_0.distcp: ends at byte"):
        read(tmp_path / "a")
    data.write_bytes(whole.replace(b"\x81\xa4", b"\x81\xa5").replace(b"PK\x05\x06", b"PK\x05\x07"))
    with pytest.raises(BadForeign, match="__0_0.distcp|torch.save"):
        read(tmp_path / "a")
    data.unlink()
    with pytest.raises(BadForeign, match="is not there"):
        read(tmp_path / "a")


def test_bfloat16_and_what_may_be_dropped(tmp_path):
    run = plain_run()
    saved_here(tmp_path / "a", {**run.state(), "odd": np.arange(3), "step": 2})
    report = convert(tmp_path / "a", tmp_path / "b", "dcp", dtype="BF16", drop=frozenset({"optimizer", "objects", "buffers"}))
    ck, _ = read(tmp_path / "b")
    assert {t.dtype for t in ck.tensors.values()} == {"BF16"}
    assert not ck.objects
    assert {"model.scale", "extras.odd", "optim.state.emb.weight.exp_avg"} <= set(report.dropped)


# --- safetensors ------------------------------------------------------------------------------------------------------------


def test_safetensors_both_ways(tmp_path):
    def work(rank):
        import torch.distributed.checkpoint as dcp
        from torch.distributed.checkpoint import HuggingFaceStorageWriter

        run = Run("fsdp", tie=False)
        run.train(1, 2)
        state = run.state()
        dcp.save({"model": state["model"], "optim": {"state": state["optim"]["state"]}}, storage_writer=HuggingFaceStorageWriter(str(tmp_path / "a"), save_distributed=True))
        return {"truth": run.truth()}

    saved = ranks(3, work)
    ck, found = read(tmp_path / "a", DCP_SAFETENSORS)
    assert found == union(saved)
    assert not ck.groups
    with_groups = plain_run(tie=False)
    saved_here(tmp_path / "g", {**with_groups.state(), "step": 2, "extra": {"rng": torch.arange(9)}})
    convert(tmp_path / "g", tmp_path / "b", "dcp-safetensors", ranks=3)
    assert len([*(tmp_path / "b").glob("shard-*.safetensors")]) == 3
    ck, found = read(tmp_path / "b", DCP_SAFETENSORS)
    assert groups_in(ck) == expected_groups(tied=False)
    assert {n: d for n, d in found.items() if not n.startswith("extras.")} == with_groups.truth()

    def load(rank):
        import torch.distributed.checkpoint as dcp
        from torch.distributed.checkpoint import HuggingFaceStorageReader

        run = Run("fsdp", tie=False, seed=1)
        state = run.state()
        wanted = {"model": state["model"], "optim": {"state": state["optim"]["state"]}}
        dcp.load(wanted, storage_reader=HuggingFaceStorageReader(str(tmp_path / "b")))
        run.set({"model": wanted["model"], "optim": {**state["optim"], "state": wanted["optim"]["state"]}}, None)
        return {"truth": run.truth()}

    assert union(ranks(2, load)) == with_groups.truth()


# --- names ------------------------------------------------------------------------------------------------------------------


def test_whose_key_it_is():
    def split(*keys, objects=()):
        names = Names.of([*keys, *objects], keys)
        return [names.split(k)[0] for k in (*keys, *objects)]

    assert split("model.a.w", "optim.state.a.w.exp_avg", "ema.a.w") == ["model", "state", "extras"]
    assert split("app.model.a.w", "app.optim.state.a.w.step", objects=["app.optim.param_groups.0.lr"]) == ["model", "state", "groups"]
    assert split("a.w", "b.running_mean", "optimizer.state.a.w.step", "train_state.step") == ["model", "model", "state", "extras"]
    assert split("model.state.w", "optim.state.state.w.exp_avg") == ["model", "state"]
    assert split("model.w") == ["model"]
    assert split("w", "step") == ["model", "extras"]
    assert split("optim_g.state.a.step", "optim_d.state.b.step", "model.a", "model.b") == ["state", "state", "model", "model"]
