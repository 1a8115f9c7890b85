"""ckptd as a format: real jobs' steps converted, restored on other meshes, read by stock PyTorch; hostile and odd ones."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from ckptd.convert import convert
from ckptd.core.boxes import Box
from ckptd.core.image import Piece, lay_out
from ckptd.errors import BadArgument, BadForeign, BadImage, NotFound, NotTiled, Unstorable
from ckptd.formats import ReadOptions, WriteOptions, format_named, place_of, recognise
from ckptd.reading import Pool, Reading, hashes, open_checkpoint, settle
from ckptd.storage.checkpoint import verify_checkpoint
from ckptd.storage.local import LocalStore
from tests.convert.native_job import go_on, train, train_two, train_without_ckptd
from tests.forks import ranks
from tests.storage.helpers import commit, make_step
from tests.train.harness import stop_daemon

pytestmark = pytest.mark.timeout(240)


def settled(path, **options):
    place, found, checkpoint = open_checkpoint(str(path), ReadOptions(**options))
    pool = Pool(1)
    with Reading(place, checkpoint) as reading:
        checkpoint = settle(reading, pool)
    with Reading(place, checkpoint) as reading:
        made = hashes(reading, pool)
    pool.close()
    return found, checkpoint, made


def job(count, kind, tmp, store, name, *, first, last, **options):
    """Losses of a job of `count` ranks with a daemon of its own."""
    env = {"CKPTD_DIR": str(tmp), "CKPTD_STORE": str(store), "CKPTD_JOB": name}
    try:
        return ranks(count, partial(train, kind=kind, first=first, last=last, **options), env=env)
    finally:
        stop_daemon(tmp)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """Step 4 of an FSDP2 job of three ranks, persisted."""
    tmp = tmp_path_factory.mktemp("trained")
    job(3, "fsdp", tmp / "d", tmp / "store", "converted", first=1, last=4, persist=True)
    return tmp / "store"


# --- the way there and back -------------------------------------------------------------------------------------------------


def test_a_real_step_is_read_as_what_it_is(trained):
    found, checkpoint, _ = settled(trained)
    assert found.name == "ckptd"
    assert checkpoint.aliases == {"model.head.weight": "model.embed.weight"}
    assert checkpoint.tensors["model.embed.weight"].replicas, "the tied weight's second copy is compared"
    assert "model.seen" in checkpoint.buffers
    assert "model.frozen.weight" not in checkpoint.buffers
    assert checkpoint.objects["step"] == 4
    groups = checkpoint.groups
    assert [(g["weight_decay"], sorted(g["params"])) for g in groups] == [(0.1, ["embed.weight", "hidden.weight"]), (0.0, ["hidden.bias", "norm.bias", "norm.weight"])]
    assert groups[0]["lr"] == 0.0025
    assert checkpoint.objects["extras.scheduler"]["last_epoch"] == 4
    assert sorted(checkpoint.slots("hidden.weight")) == ["exp_avg", "exp_avg_sq", "step"]
    assert checkpoint.scalars["optim.state.hidden.weight.step"] == 4.0
    assert sorted(checkpoint.per_rank) == [0, 1, 2]
    assert set(checkpoint.per_rank[1]) == {"rng.python", "rng.numpy", "rng.torch"}


@pytest.mark.parametrize("images", [1, 2, 5])
def test_converted_it_verifies_and_holds_the_same(trained, tmp_path, images):
    report = convert(str(trained), str(tmp_path / "out"), "ckptd", write=WriteOptions(ranks=images, config={"job": "j"}), check=True)
    assert report.dropped == []
    verified = verify_checkpoint(LocalStore(tmp_path / "out"), "j/step-00000004")
    assert verified.ok
    assert verified.images == images
    (_, before, first), (_, after, second) = settled(trained), settled(tmp_path / "out")
    assert first == second
    assert (before.objects, before.aliases, before.buffers) == (after.objects, after.aliases, after.buffers)


@pytest.mark.parametrize(("count", "kind"), [(2, "fsdp"), (2, "ddp"), (1, "plain")])
def test_a_job_on_another_mesh_goes_on_as_from_the_original(trained, tmp_path, count, kind):
    convert(str(trained), str(tmp_path / "out"), "ckptd", write=WriteOptions(ranks=2))
    shutil.copytree(trained, tmp_path / "same")
    original = job(count, kind, tmp_path / "d0", tmp_path / "same", "converted", first=5, last=7)
    again = job(count, kind, tmp_path / "d1", tmp_path / "out", "converted", first=5, last=7)
    for a, b in zip(original, again, strict=True):
        assert (a["losses"], a["state"], a["lr"]) == (b["losses"], b["state"], b["lr"])
        assert a["missing"] == b["missing"] == []
    assert any("reseeded" in w for w in again[0]["warnings"])


def test_numbers_of_python_come_back_as_numbers(tmp_path):
    job(2, "fsdp", tmp_path / "d", tmp_path / "store", "converted", first=1, last=3, optimizer="python", persist=True)
    _, checkpoint, _ = settled(tmp_path / "store")
    assert checkpoint.objects["optim.python_slots"] == ["step"]
    assert checkpoint.tensors["optim.state.norm.weight.step"].dtype == "F32"
    report = convert(str(tmp_path / "store"), str(tmp_path / "out"), "ckptd", check=True)
    assert "optim.state.norm.weight.step" not in report.hashes
    got = job(1, "plain", tmp_path / "d1", tmp_path / "out", "converted", first=4, last=5, optimizer="python")
    assert got[0]["state"]["norm.weight.step"] == 5


def test_a_plain_torch_file_becomes_a_job_on_any_mesh(tmp_path):
    """torch.save of an unsharded loop -> ckptd -> session.restore on FSDP2 and DDP: the losses are those of the loop that went on by itself."""
    truth = train_without_ckptd(tmp_path / "t.pt", steps=4, more=3)
    convert(str(tmp_path / "t.pt"), str(tmp_path / "out"), "ckptd", write=WriteOptions(ranks=3), check=True)
    for number, (count, kind) in enumerate([(1, "plain"), (2, "fsdp"), (2, "ddp")]):
        directory = tmp_path / f"d{number}"
        try:
            env = {"CKPTD_DIR": str(directory), "CKPTD_STORE": str(tmp_path / "out"), "CKPTD_JOB": "converted"}
            losses = ranks(count, partial(go_on, kind=kind, first=5, last=7), env=env)
        finally:
            stop_daemon(directory)
        mean = np.mean(losses, axis=0)
        if count == 1:
            assert mean.tolist() == truth
        assert mean == pytest.approx(truth, rel=1e-5)


def test_two_optimizers_are_one_on_the_way_and_two_again(tmp_path):
    def run(name, store, **options):
        try:
            return ranks(1, partial(train_two, **options), env={"CKPTD_DIR": str(tmp_path / name), "CKPTD_STORE": str(store), "CKPTD_JOB": "converted"})[0]
        finally:
            stop_daemon(tmp_path / name)

    whole = run("d0", tmp_path / "s0", first=1, last=6)
    assert run("d1", tmp_path / "s1", first=1, last=3, persist=True) == whole[:3]
    _, checkpoint, _ = settled(tmp_path / "s1")
    assert [g["ckptd_optimizer"] for g in checkpoint.groups] == ["d", "g"]
    assert sorted(checkpoint.slots("disc.bias")) == ["momentum_buffer"]
    convert(str(tmp_path / "s1"), str(tmp_path / "out"), "ckptd", check=True)
    assert run("d2", tmp_path / "out", first=4, last=6) == whole[3:]


def test_stock_pytorch_loads_the_images(trained, tmp_path):
    convert(str(trained), str(tmp_path / "out"), "ckptd", write=WriteOptions(ranks=3))
    images = tmp_path / "out/converted/step-00000004/images"
    code = (
        "import sys, torch, torch.distributed.checkpoint as dcp\n"
        "from torch.distributed.checkpoint import HuggingFaceStorageReader as R\n"
        "s = {'model': {'embed.weight': torch.zeros(37, 12), 'head.weight': torch.zeros(37, 12)}, 'optim': {'state': {'hidden.weight': {'exp_avg': torch.zeros(12, 12), 'step': torch.zeros(())}}}}\n"
        "dcp.load(s, storage_reader=R(sys.argv[1]))\n"
        "torch.save(s, sys.argv[2])\n"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code, str(images), str(tmp_path / "s.pt")], capture_output=True, text=True, cwd=tmp_path, timeout=100, env=os.environ)
    assert done.returncode == 0, done.stderr[-2000:]
    loaded = torch.load(tmp_path / "s.pt")
    place, _, checkpoint = open_checkpoint(str(trained))
    with Reading(place, checkpoint) as reading:
        want = reading.array("model.embed.weight")
        assert np.array_equal(loaded["model"]["embed.weight"].numpy(), want)
        assert np.array_equal(loaded["model"]["head.weight"].numpy(), want)
        assert np.array_equal(loaded["optim"]["state"]["hidden.weight"]["exp_avg"].numpy(), reading.array("optim.state.hidden.weight.exp_avg"))
    assert loaded["optim"]["state"]["hidden.weight"]["step"].item() == 4.0


def test_weights_alone_in_16_bit(trained, tmp_path):
    drop = frozenset({"optimizer", "objects", "buffers"})
    report = convert(str(trained), str(tmp_path / "out"), "ckptd", write=WriteOptions(dtype="BF16", drop=drop), check=True)
    assert any(n == "optim.state.hidden.weight.exp_avg" for n in report.dropped)
    _, checkpoint, _ = settled(tmp_path / "out")
    assert {t.dtype for t in checkpoint.tensors.values()} == {"BF16"}
    assert checkpoint.objects == {"step": 4}
    assert not checkpoint.per_rank


# --- what is chosen ---------------------------------------------------------------------------------------------------------


def test_the_newest_valid_step_or_the_one_that_is_named(tmp_path):
    store = LocalStore(tmp_path / "s")
    for step in (7, 8, 9):
        commit(store, make_step(step=step))
    (tmp_path / "s/job/step-00000009/images/r00001.safetensors").unlink()
    _, newest, _ = settled(tmp_path / "s")
    assert newest.objects["step"] == 8
    assert any("passed over" in n and "r00001" in n for n in newest.notes)
    for tag in ("7", "step-00000007", "job/step-00000007", "job/7"):
        assert settled(tmp_path / "s", tag=tag)[1].objects["step"] == 7
    assert settled(tmp_path / "s/job")[1].objects["step"] == 8
    assert settled(tmp_path / "s/job/step-00000007")[1].objects["step"] == 7
    with pytest.raises(BadImage, match="r00001"):
        settled(tmp_path / "s", tag="9")
    with pytest.raises(NotFound, match="no step is '10'"):
        settled(tmp_path / "s", tag="10")
    commit(store, make_step(job="other", step=3))
    with pytest.raises(BadArgument, match="2 jobs: job, other"):
        settled(tmp_path / "s")
    assert settled(tmp_path / "s", tag="other")[1].objects["step"] == 3


def test_images_alone(tmp_path):
    commit(LocalStore(tmp_path / "s"), make_step(step=7))
    images = tmp_path / "s/job/step-00000007/images"
    assert recognise(place_of(str(images))).name == "ckptd"
    _, checkpoint, _ = settled(images)
    assert checkpoint.objects["step"] == 7
    assert "no checksum" in checkpoint.notes[0]
    with pytest.raises(NotTiled, match=r"model.w: .* hole is \[8:16, 0:16\]"):
        settled(images / "r00000.safetensors")
    (tmp_path / "s/job/step-00000007/manifest.json").unlink()
    with pytest.raises(NotFound):
        settled(tmp_path / "s")


def one_image(path: Path, pieces, objects=None, **more) -> Path:
    layout = lay_out(pieces, job="j", rank=0, world_size=1, coords={}, aliases=more.get("aliases", {}), objects_bytes=2000)
    path.write_bytes(layout.render(attempt=1, step=2, objects=objects or {}) + bytes(sum(p.nbytes for p in pieces)))
    return path


def test_dtypes_without_a_name_are_refused_or_bytes(tmp_path):
    path = one_image(tmp_path / "r00000.safetensors", [Piece("model.z", "U8", (3, 16), Box.whole((3, 16)), "complex128")])
    with pytest.raises(BadForeign, match="model.z: complex128") as e:
        settled(path)
    assert "views=bytes" in e.value.remedy
    assert settled(path, hints={"views": "bytes"})[1].tensors["model.z"].shape == (3, 16)


def test_objects_that_name_what_is_not_there(tmp_path):
    objects = {"extras.x": {"policy": "same", "value": {"$array": ["ndarray", "object/gone@r0"]}}}
    path = one_image(tmp_path / "r00000.safetensors", [Piece("model.w", "F32", (2,), Box.whole((2,)))], objects)
    with pytest.raises(BadForeign, match="object/gone@r0"):
        settled(path)
    path = one_image(tmp_path / "r00000.safetensors", [Piece("model.w", "F32", (2,), Box.whole((2,)))], aliases={"model.v": "model.u"})
    with pytest.raises(BadForeign, match="model.v: it is tied to model.u"):
        settled(path)


@pytest.mark.parametrize(
    "objects",
    [
        {"optim.param_groups": {"policy": "optimizer", "value": 3}},
        {"optim.param_groups": {"policy": "optimizer", "value": [{"lr": 1}]}},
        {"optim.param_groups": {"policy": "optimizer", "value": [{"params": [[1]]}]}},
        {"optim.param_groups": {"policy": "optimizer", "value": [{"params": {"a": 1}}, 7]}},
        {"optim.scalars": {"policy": "optimizer", "value": [1, 2]}},
        {"optim.scalars": {"policy": "optimizer", "value": {"w": 4}}},
        {"absent": {"policy": "absent", "value": 5}},
        {"extras.x": {"policy": "same", "value": {"$array": ["ndarray", 4]}}},
        {"extras.x": {"policy": "same", "value": {"$nonsense": 1}}},
    ],
)
def test_objects_that_no_job_writes(tmp_path, objects):
    path = one_image(tmp_path / "r00000.safetensors", [Piece("model.w", "F32", (2,), Box.whole((2,)))], objects)
    with pytest.raises((BadForeign, BadImage)):
        settled(path)


def test_odd_numbers_of_an_optimizer(tmp_path):
    values = {"w": {"step": {"$int": str(2**70)}, "big": 2**40, "half": 0.5, "flag": True, "name": "x", "nan": {"$float": "nan"}}, "v": {"step": (1 << 24) + 1}}
    objects = {"optim.scalars": {"policy": "optimizer", "value": values}, "optim.param_groups": {"policy": "optimizer", "value": [{"lr": 1, "params": ["w", "v"]}]}}
    path = one_image(tmp_path / "r00000.safetensors", [Piece("model.w", "F32", (2,), Box.whole((2,)))], objects)
    _, checkpoint, _ = settled(path)
    assert {n: t.dtype for n, t in checkpoint.tensors.items() if n.startswith("optim")} == {
        "optim.state.w.big": "I64", "optim.state.w.half": "F64", "optim.state.w.flag": "BOOL", "optim.state.w.nan": "F64", "optim.state.v.step": "I64",
    }  # fmt: skip
    assert checkpoint.objects["optim.scalars"] == {"w": {"step": 2**70, "name": "x"}}
    convert(str(path), str(tmp_path / "out"), "ckptd", check=True)
    _, again, _ = settled(tmp_path / "out")
    assert (again.objects, {n: v for n, v in again.scalars.items() if v == v}) == (checkpoint.objects, {n: v for n, v in checkpoint.scalars.items() if v == v})
    assert {n: t.dtype for n, t in again.tensors.items()} == {n: t.dtype for n, t in checkpoint.tensors.items()}


def test_what_the_writer_refuses(trained, tmp_path):
    def write(**options):
        convert(str(trained), str(tmp_path / "out"), "ckptd", write=WriteOptions(**options))

    with pytest.raises(BadArgument, match="tp 2"):
        write(tp=2)
    with pytest.raises(BadArgument, match="--config jobb"):
        write(config={"jobb": 1})
    with pytest.raises(BadArgument, match="step=-4"):
        write(config={"step": -4})
    with pytest.raises(BadArgument, match="cannot name a job"):
        write(config={"job": "a/b"})
    assert not (tmp_path / "out").exists()
    _, checkpoint, _ = settled(trained)
    checkpoint.per_rank = {0: {"extras.loader": {"at": 1}}, 1: {"extras.loader": {"at": 2}}}
    with pytest.raises(Unstorable, match="extras.loader of rank 1"):
        format_named("ckptd").write(checkpoint, WriteOptions())
    plan = format_named("ckptd").write(checkpoint, WriteOptions(drop=frozenset({"objects"})))
    assert "extras.loader of rank 1" in plan.dropped
    format_named("ckptd").write(checkpoint, WriteOptions(ranks=2))
    checkpoint.per_rank = {}
    checkpoint.objects["extras.odd"] = object()
    with pytest.raises(Unstorable, match="extras.odd"):
        format_named("ckptd").write(checkpoint, WriteOptions())


def test_arrays_in_objects_keep_kind_dtype_and_shape(tmp_path):
    _, checkpoint, _ = settled(one_image(tmp_path / "r00000.safetensors", [Piece("model.w", "F32", (2,), Box.whole((2,)))]))
    arrays = {"a": np.arange(6, dtype=np.int16).reshape(2, 3), "b": np.zeros((0, 3)), "c": np.array(1 + 2j), "d": np.array(True), "e": np.arange(3, dtype=">u4")}
    checkpoint.objects["extras.arrays"] = arrays

    class Fixed:
        name, title = "fixed", ""
        probe = staticmethod(lambda place: True)
        read = staticmethod(lambda place, options: checkpoint)

    import ckptd.reading as reading_module

    before = reading_module.recognise
    reading_module.recognise = lambda place: Fixed
    try:
        convert(str(tmp_path / "r00000.safetensors"), str(tmp_path / "out"), "ckptd")
    finally:
        reading_module.recognise = before
    held = settled(tmp_path / "out")[1].objects["extras.arrays"]
    assert {k: (v.dtype.newbyteorder("="), v.shape) for k, v in held.items()} == {k: (v.dtype.newbyteorder("="), v.shape) for k, v in arrays.items()}
    assert all(np.array_equal(held[k], v) for k, v in arrays.items())
    assert json.dumps(sorted(held)) == '["a", "b", "c", "d", "e"]'
