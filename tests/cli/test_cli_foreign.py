"""`ckptd ls`, `inspect`, `verify` and `diff` on checkpoints of other systems, made by those systems."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict

from ckptd import formats, reading
from ckptd.cli import foreign
from ckptd.cli.main import main
from ckptd.convert import Progress
from ckptd.core.boxes import Box
from ckptd.core.logical import Checkpoint, row_of
from tests.storage.helpers import commit, make_step


@pytest.fixture
def cli(capsys):
    def call(*args, code=0):
        got = main([*map(str, args)])
        out, err = capsys.readouterr()
        assert got == code, out + err
        return (json.loads(out) if "--json" in args else out), err

    return call


def model_and_optimizer(steps=2):
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(16, 16) for _ in range(4)], nn.LayerNorm(16))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step in range(steps):
        torch.manual_seed(step)
        model(torch.randn(4, 16)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def save_all(folder: Path, steps=2) -> Path:
    """One training state as torch.save, DCP and Hugging Face files."""
    model, optimizer = model_and_optimizer(steps)
    folder.mkdir(exist_ok=True)
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, folder / "t.pt")
    model_state, optimizer_state = get_state_dict(model, optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save({"model": model_state, "optim": optimizer_state}, checkpoint_id=str(folder / "dcp"))
    (folder / "hf").mkdir()
    save_file(model.state_dict(), folder / "hf/model.safetensors", metadata={"format": "pt"})
    (folder / "hf/config.json").write_text("{}")
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    return save_all(tmp_path_factory.mktemp("made") / "all")


class Fixed:
    """A format that is whatever it is told."""

    title = "made up by a test"

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint, self.name = checkpoint, checkpoint.format

    def probe(self, place):
        return True

    def read(self, place, options):
        return self.checkpoint


@pytest.fixture
def only_format(monkeypatch):
    def use(checkpoint: Checkpoint) -> None:
        fixed = Fixed(checkpoint)
        for module in (foreign, reading, formats):
            monkeypatch.setattr(module, "recognise", lambda place: fixed)

    return use


# --- ls ---------------------------------------------------------------------------------------------------------------------


def test_ls_lists_what_lies_in_a_folder(made, cli):
    document, _ = cli("ls", made, "--json")
    assert {(c["directory"], c["format"]) for c in document["checkpoints"]} == {("t.pt", "torch"), ("dcp", "dcp"), ("hf", "hf")}
    text, _ = cli("ls", made)
    assert text.splitlines()[0].split() == ["FORMAT", "STEP", "FILES", "SIZE", "DIRECTORY"]
    assert cli("ls", made / "dcp", "--json")[0]["checkpoints"][0]["format"] == "dcp"


def test_ls_orders_steps_and_knows_the_latest(made, cli, tmp_path):
    for step in (5, 40, 100):
        shutil.copytree(made / "dcp", tmp_path / f"global_step{step}")
    (tmp_path / "latest").write_text("global_step40\n")
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs/x.txt").write_text("x")
    document, _ = cli("ls", tmp_path, "--json")
    assert [(c["step"], c["latest"]) for c in document["checkpoints"]] == [(100, False), (40, True), (5, False)]
    assert [line.split()[-1] for line in cli("ls", tmp_path)[0].splitlines()[1:]] == ["global_step100", "latest", "global_step5"]


def test_ls_of_stores_in_a_folder(cli, tmp_path):
    from ckptd.storage.local import LocalStore

    commit(LocalStore(tmp_path / "x/store"), make_step())
    document, _ = cli("ls", tmp_path / "x", "--json")
    assert [(c["directory"], c["format"]) for c in document["checkpoints"]] == [("store", "ckptd")]
    assert cli("ls", tmp_path / "x/store", "--json")[0]["checkpoints"][0]["job"] == "job"


@pytest.mark.parametrize(("to", "folder"), [("zero3", "global_step2"), ("zero1", "global_step2"), ("megatron", "iter_0000002")])
def test_steps_of_deepspeed_and_megatron(cli, tmp_path, to, folder):
    """Written by us here; that those systems write and read the same is held by tests/convert."""
    model, optimizer = model_and_optimizer()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": 2}, tmp_path / "t.pt")
    cli("convert", tmp_path / "t.pt", tmp_path / "out", "--to", to, "--ranks", 2, "--quiet")
    (found,) = cli("ls", tmp_path / "out", "--json")[0]["checkpoints"]
    assert (found["format"], found["directory"], found["step"], found["latest"]) == (to, folder, 2, True)
    assert cli("inspect", tmp_path / "out", "--json")[0]["format"] == to
    assert "every tensor is covered once" in cli("verify", tmp_path / "out", "--crc")[0]
    assert "equal: 40 of 40 common" in cli("diff", tmp_path / "t.pt", tmp_path / "out")[0]
    shutil.copytree(tmp_path / "out" / folder, tmp_path / "out" / folder.replace("2", "1"))
    assert [c["step"] for c in cli("ls", tmp_path / "out", "--json")[0]["checkpoints"]] == [2, 1]
    victim = next(p for p in sorted((tmp_path / "out" / folder).iterdir()) if p.name.endswith(("_optim_states.pt", ".distcp")))
    victim.unlink()
    _, err = cli("verify", tmp_path / "out", code=25)
    assert "rank" in err or victim.name in err
    assert not (tmp_path / "x").exists()
    assert main(["convert", str(tmp_path / "out"), str(tmp_path / "x"), "--to", "ckptd"]) == 25
    assert not (tmp_path / "x").exists()


# --- inspect ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["t.pt", "dcp", "hf"])
def test_inspect_shows_a_tree(made, cli, name):
    text, err = cli("inspect", made / name)
    assert err == ""
    lines = [line.split() for line in text.splitlines()]
    assert ["0", "...", "3", "(4", "alike)", "8", "4.2", "KiB", "F32"] in lines
    assert ["weight", "1", "1.0", "KiB", "F32", "[16,", "16]"] in lines
    if name != "hf":
        assert "  group 0: 10 parameters; lr=0.001 betas=(0.9, 0.999)" in text
    document, _ = cli("inspect", made / name, "--json")
    held = {t["name"]: t for t in document["tensors"]}
    assert held["model.0.weight"]["shape"] == [16, 16]
    assert held["model.0.weight"]["rows"][0]["extent"] == [16, 16]
    assert document["format"] == {"t.pt": "torch"}.get(name, name)


def test_inspect_lists_rows_objects_and_depth(made, cli):
    text, _ = cli("inspect", made / "dcp", "--tensors", "model.4.*", "--objects")
    assert [line.split()[:3] for line in text.splitlines() if line.startswith("model.4")] == [["model.4.weight", "F32", "[16]"], ["model.4.bias", "F32", "[16]"]]
    assert "__0_0.distcp: [0:16]" in text
    assert "  optim.param_groups.0.lr = 0.001" in text
    assert "no tensor matches" in cli("inspect", made / "dcp", "--tensors", "nope*", code=14)[1]
    shallow = cli("inspect", made / "dcp", "--depth", "1")[0]
    assert "weight" not in shallow.split("TENSORS")[-1]
    cli("inspect", made / "dcp", "--depth", "0", code=10)


def test_names_cannot_drive_the_terminal(cli, only_format, tmp_path):
    checkpoint = Checkpoint("odd")
    checkpoint.literal("model.\x1b]0;owned\x07", "F32", bytes(4))
    checkpoint.objects["extras.\x1b[2J"] = "\x1b[2J"
    checkpoint.notes.append("a \x1b[31m note")
    (tmp_path / "x").write_bytes(b"x")
    only_format(checkpoint)
    for args in (["inspect"], ["inspect", "--tensors", "--objects"], ["verify"]):
        out, err = cli(*args, tmp_path / "x") if len(args) == 1 else cli(args[0], tmp_path / "x", *args[1:])
        assert "\x1b" not in out + err and "\x07" not in out + err
    out, _ = cli("diff", tmp_path / "x", tmp_path / "x")
    assert "\x1b" not in out


# --- verify -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["t.pt", "dcp", "hf"])
def test_verify_reads_everything(made, cli, name):
    text, err = cli("verify", made / name)
    assert err == ""
    assert "every tensor is covered once and can be read" in text
    document, _ = cli("verify", made / name, "--json", "--crc")
    assert document["ok"]
    assert document["bytes_read"] == cli("inspect", made / name, "--json")[0]["bytes"]
    assert cli("verify", made / name, "--quiet")[0] == ""


def test_verify_names_a_missing_and_a_short_file(made, cli, tmp_path):
    shutil.copytree(made / "dcp", tmp_path / "dcp")
    (file,) = (tmp_path / "dcp").glob("*.distcp")
    data = file.read_bytes()
    file.write_bytes(data[:-5000])
    _, err = cli("verify", tmp_path / "dcp", code=25)
    assert "__0_0.distcp" in err
    file.unlink()
    assert "__0_0.distcp" in cli("verify", tmp_path / "dcp", code=25)[1]
    document, _ = cli("verify", tmp_path / "dcp", "--json", code=25)
    assert (document["error"], document["exit_code"]) == ("BadForeign", 25)


def test_verify_compares_crcs_when_asked(made, cli, tmp_path):
    data = bytearray((made / "t.pt").read_bytes())
    at = cli("inspect", made / "t.pt", "--json")[0]["tensors"][0]["rows"][0]["begin"]
    data[at + 1] ^= 4
    (tmp_path / "t.pt").write_bytes(data)
    cli("verify", tmp_path / "t.pt")  # a flipped byte is a value like any other
    text, _ = cli("verify", tmp_path / "t.pt", "--crc", code=23)
    assert "does not match its CRC-32" in text


def test_verify_names_every_tensor_whose_copies_differ(cli, only_format, tmp_path):
    data = np.arange(8, dtype=np.float32)
    data[7] = np.nan
    (tmp_path / "a.bin").write_bytes(data.tobytes() * 2 + data.tobytes()[::-1])
    checkpoint = Checkpoint("odd")
    number = checkpoint.file("a.bin", 96)
    whole = Box.whole((8,))
    for name, copies in {"model.a": [32, 64], "model.b": [32], "model.c": [64]}.items():
        checkpoint.add(name, "F32", (8,), [row_of(whole, number, 0), *(row_of(whole, number, at) for at in copies)])
    only_format(checkpoint)
    text, _ = cli("verify", tmp_path / "a.bin", code=26)
    assert "2 problems" in text
    assert "model.a: Divergent: [0:8] in a.bin" in text
    document, _ = cli("verify", tmp_path / "a.bin", "--json", code=26)
    assert {p["tensor"] for p in document["problems"]} == {"model.a", "model.c"}
    assert document["not_finite"] == ["model.a", "model.b", "model.c"]
    assert (document["bytes_read"], document["bytes_compared"]) == (96, 128)
    (tmp_path / "a.bin").write_bytes(bytes(90))
    document, _ = cli("verify", tmp_path / "a.bin", "--json", code=41)
    assert {p["error"] for p in document["problems"]} == {"StoreFailed"}


def test_verify_names_a_hole(cli, only_format, tmp_path):
    (tmp_path / "a.bin").write_bytes(bytes(64))
    checkpoint = Checkpoint("odd")
    checkpoint.add("model.a", "F32", (4, 4), [row_of(Box((0, 0), (2, 4)), checkpoint.file("a.bin", 64), 0)])
    only_format(checkpoint)
    _, err = cli("verify", tmp_path / "a.bin", code=24)
    assert "model.a: 8 of 16 elements are in no box; the first hole is [2:4, 0:4]" in err


# --- diff -------------------------------------------------------------------------------------------------------------------


def test_diff_of_one_state_in_three_formats(made, cli):
    assert "equal: 40 of 40 common tensors equal" in cli("diff", made / "t.pt", made / "dcp")[0]
    assert "equal" in cli("diff", made / "t.pt", made / "hf", "--only", "model.*")[0]
    document, _ = cli("diff", made / "dcp", made / "hf", "--json", code=1)
    assert len(document["only_a"]) == 30
    assert document["only_b"] == document["tensors"] == []
    assert document["objects"] == []
    assert "extras.config" in {o["path"] for o in document["objects_not_counted"]}
    assert cli("diff", made / "dcp", made / "hf", "--quiet", code=1) == ("", "")


def test_diff_tells_how_much_and_where(made, cli, tmp_path):
    model, _ = model_and_optimizer()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    state["0.weight"][3, 5] += 0.25
    state["0.weight"][9, 1] -= 0.125
    state["1.bias"] = state["1.bias"].bfloat16()
    state["2.weight"] = state["2.weight"][:8].contiguous()
    state["new"] = torch.ones(3)
    state["3.bias"][2] = float("nan")
    del state["4.bias"]
    save_file(state, tmp_path / "b.safetensors", metadata={"format": "pt"})
    text, _ = cli("diff", made / "hf", tmp_path / "b.safetensors", "--only", "model.*", code=1)
    lines = [line.split() for line in text.splitlines()]
    assert ["model.0.weight", "F32", "[16,", "16]", "2", "0.25", "[3,", "5]"] in lines
    assert ["model.3.bias", "F32", "[16]", "1", "inf", "[2]"] in lines
    assert ["model.2.weight", "F32", "[16,", "16]", "|", "[8,", "16]", "-", "-", "-"] in lines
    assert "only in A: model.4.bias" in text
    assert "only in B: model.new" in text
    document, _ = cli("diff", made / "hf", tmp_path / "b.safetensors", "--only", "model.1.*", "--json", code=1)
    (bias,) = document["tensors"]
    assert bias["dtypes"] == ["F32", "BF16"]
    assert 0 < bias["max_abs"] < 0.01
    close, _ = cli("diff", made / "hf", tmp_path / "b.safetensors", "--only", "model.1.*", "--tolerance", "0.01")
    assert "equal: 2 of 2 common tensors equal (1 within the tolerance)" in close
    cli("diff", made / "hf", tmp_path / "b.safetensors", "--only", "model.0.*", "--tolerance", "0.25")
    cli("diff", made / "hf", tmp_path / "b.safetensors", "--only", "model.0.*", "--tolerance", "0.24", code=1)
    cli("diff", made / "hf", tmp_path / "b.safetensors", "--tolerance=-1", code=10)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2, torch.int8])
def test_diff_compares_values_of_other_dtypes(cli, tmp_path, dtype):
    values = torch.tensor([0.0, -1.5, 2.0, 24.0]).to(dtype)
    save_file({"w": values}, tmp_path / "a.safetensors")
    save_file({"w": values.float()}, tmp_path / "b.safetensors")
    assert "F32" in cli("diff", tmp_path / "a.safetensors", tmp_path / "b.safetensors", code=1)[0]
    cli("diff", tmp_path / "a.safetensors", tmp_path / "b.safetensors", "--tolerance", "0")
    save_file({"w": values.float() + torch.tensor([0, 0, 0.5, 0])}, tmp_path / "b.safetensors")
    (found,) = cli("diff", tmp_path / "a.safetensors", tmp_path / "b.safetensors", "--json", code=1)[0]["tensors"]
    assert (found["elements"], found["max_abs"], found["first"]) == (1, 0.5, [2])


def test_diff_of_zeros_with_signs(cli, tmp_path):
    save_file({"w": torch.tensor([1.0, 0.0])}, tmp_path / "a.safetensors")
    save_file({"w": torch.tensor([1.0, -0.0])}, tmp_path / "b.safetensors")
    (found,) = cli("diff", tmp_path / "a.safetensors", tmp_path / "b.safetensors", "--json", code=1)[0]["tensors"]
    assert (found["elements"], found["max_abs"], found["first"]) == (0, 0.0, [1])
    cli("diff", tmp_path / "a.safetensors", tmp_path / "b.safetensors", "--tolerance", "0")


def test_diff_of_hyper_parameters(cli, tmp_path):
    _, optimizer = model_and_optimizer()
    state = optimizer.state_dict()
    torch.save({"model": model_and_optimizer()[0].state_dict(), "optimizer": state, "step": 2}, tmp_path / "a.pt")
    state["param_groups"][0] |= {"lr": 0.5, "betas": [0.9, 0.999]}
    torch.save({"model": model_and_optimizer()[0].state_dict(), "optimizer": state, "step": 3}, tmp_path / "b.pt")
    document, _ = cli("diff", tmp_path / "a.pt", tmp_path / "b.pt", "--json", code=1)
    assert document["tensors"] == []
    assert document["objects"] == [
        {"path": "optim.param_groups: lr of 0.weight, 0.bias and 8 more", "a": "0.001", "b": "0.5"}, {"path": "step", "a": "2", "b": "3"}
    ]  # fmt: skip


def test_diff_of_large_tensors_goes_by_windows(cli, tmp_path):
    a = torch.zeros(3_000_000)
    save_file({"w": a}, tmp_path / "a.safetensors")
    a[2_500_000] = 1
    a[2_900_000] = 2
    save_file({"w": a}, tmp_path / "b.safetensors")
    (found,) = cli("diff", tmp_path / "a.safetensors", tmp_path / "b.safetensors", "--json", code=1)[0]["tensors"]
    assert (found["elements"], found["max_abs"], found["first"]) == (2, 2.0, [2_500_000])


def test_diff_of_ckptd_stores(cli, tmp_path):
    from ckptd.storage.local import LocalStore

    store = LocalStore(tmp_path / "s")
    commit(store, make_step(step=7))
    commit(store, make_step(step=8, seed=1))
    commit(LocalStore(tmp_path / "t"), make_step(step=7, world_size=4, rows=4))
    text, _ = cli("diff", tmp_path / "s", tmp_path / "s", "--tag-a", "7", "--tag-b", "8", code=1)
    assert "step: 7 | 8" in text
    cli("diff", tmp_path / "s/job/step-00000007", tmp_path / "s", "--tag-b", "7")
    assert "common" in cli("diff", tmp_path / "s", tmp_path / "t", "--tag-a", "7", code=1)[0], "other bytes in other images"
    assert "does not exist" in cli("diff", tmp_path / "s", tmp_path / "nowhere", code=14)[1]


# --- progress ---------------------------------------------------------------------------------------------------------------


def test_progress_on_a_terminal_and_in_a_log(monkeypatch, capsys):
    import sys

    at = Progress("write", 3 << 30, 12 << 30, 6.0)
    assert foreign.progress_text(at) == "write: 3.0 GiB of 12.0 GiB, 25 %, 537 MB/s, 18 s left"
    now = [0.0]
    monkeypatch.setattr(foreign.time, "monotonic", lambda: now[0])
    line = foreign.Line(shown=True)
    for second in range(12):
        now[0] = float(second)
        line(at)
    line.end()
    assert capsys.readouterr().err.count("\n") == 2, "every five seconds"
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    line = foreign.Line(shown=True)
    for _ in range(5):
        now[0] += 0.06
        line(at)
    line.end()
    err = capsys.readouterr().err
    assert (err.count("write:"), err.count("\n")) == (2, 0)
    assert err.endswith("\r\x1b[K")
    line = foreign.Line(shown=False)
    now[0] += 100
    line(at)
    assert capsys.readouterr().err == ""


def test_settings():
    assert foreign.settings(["a=1", "b=x y", 'c={"d": [1]}', "e=true", "f="], "--hint") == {"a": 1, "b": "x y", "c": {"d": [1]}, "e": True, "f": ""}
