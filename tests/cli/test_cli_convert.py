"""`ckptd convert` as a user runs it: what it prints, what it refuses, what survives a kill, and how much memory it takes."""

from __future__ import annotations

import json
import os
import signal
import struct
import subprocess
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from ckptd import convert as engine
from ckptd.cli.main import main
from ckptd.core.boxes import Box
from ckptd.core.image import Piece, lay_out
from ckptd.formats import formats
from ckptd.storage.local import LocalStore
from tests.cli.helpers import COMMAND, ROOT, ckptd
from tests.storage.helpers import commit, make_step

pytestmark = pytest.mark.timeout(120)


@pytest.fixture
def cli(capsys):
    def call(*args, code=0):
        got = main([*map(str, args)])
        out, err = capsys.readouterr()
        assert got == code, out + err
        return (json.loads(out) if "--json" in args else out), err

    return call


@pytest.fixture
def saved(tmp_path) -> Path:
    """A torch.save file of model and AdamW after two steps."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(2):
        model(torch.randn(4, 8)).square().mean().backward()
        optimizer.step()
    path = tmp_path / "t.pt"
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": 2}, path)
    return path


def leftovers(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if ".ckptd-convert" in p.name)


def test_it_says_what_it_did(saved, cli, tmp_path):
    text, err = cli("convert", saved, tmp_path / "out", "--to", "ckptd", "--ranks", 2, "--check", "--config", "job=j")
    assert err == ""
    lines = text.splitlines()
    assert lines[0] == f"{saved} (torch) -> {tmp_path}/out (ckptd)"
    assert lines[1].split()[:2] == ["tensors", "16,"]
    assert "MB/s" in lines[2]
    assert "  checked   every tensor was read back and is equal" in lines
    assert lines[-1] == f"  hashes    {tmp_path}/out/ckptd-convert.json"
    assert json.loads((tmp_path / "out/ckptd-convert.json").read_text())["checked"]
    assert "every byte is right" in cli("verify", tmp_path / "out")[0]
    assert [c["job"] for c in cli("ls", tmp_path / "out", "--json")[0]["checkpoints"]] == ["j"]
    assert leftovers(tmp_path) == []


def test_there_and_back_is_the_same(saved, cli, tmp_path):
    cli("convert", saved, tmp_path / "a", "--to", "ckptd", "--ranks", 3, "--quiet")
    document, _ = cli("convert", tmp_path / "a", tmp_path / "b.pt", "--to", "torch", "--json")
    assert (document["source_format"], document["target_format"], document["dropped"]) == ("ckptd", "torch", [])
    assert document["hash_file"] == f"{tmp_path}/b.pt.json"
    assert Path(document["hash_file"]).is_file()
    assert "equal: 16 of 16" in cli("diff", saved, tmp_path / "b.pt")[0]
    assert set(document["hashes"]) == {t["name"] for t in cli("inspect", saved, "--json")[0]["tensors"]}


def test_weights_for_hugging_face(saved, cli, tmp_path):
    assert "--drop" in cli("convert", saved, tmp_path / "hf", "--to", "hf", "--dtype", "bf16", code=11)[1]
    assert leftovers(tmp_path) == []
    text, _ = cli("convert", saved, tmp_path / "hf", "--to", "hf", "--dtype", "bf16", "--drop", "optimizer,objects", "--check")
    assert "dropped" in text
    want = torch.load(saved)["model"]
    held = load_file(tmp_path / "hf/model.safetensors")
    assert {n: t.bfloat16().tolist() for n, t in want.items()} == {n: t.tolist() for n, t in held.items()}


def test_list_and_help_name_every_format(cli, capsys):
    names = [f.name for f in formats()]
    assert [f["name"] for f in cli("convert", "--list", "--json")[0]["formats"]] == names
    assert [line.split()[0] for line in cli("convert", "--list")[0].splitlines()[2:]] == names
    assert cli("convert", "--to", "help")[0] == cli("convert", "--list")[0]
    with pytest.raises(SystemExit) as e:
        main(["convert", "--help"])
    assert e.value.code == 0
    text = capsys.readouterr().out
    assert "\n  ckptd convert " in text
    assert all(f"  {n} " in text for n in names)


# --- refusals ---------------------------------------------------------------------------------------------------------------


def test_the_target_must_be_free(saved, cli, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full/x").write_text("mine")
    assert "there already" in cli("convert", saved, tmp_path / "full", "--to", "ckptd", code=10)[1]
    (tmp_path / "file").write_text("mine")
    cli("convert", saved, tmp_path / "file", "--to", "torch", code=10)
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    assert "is a link" in cli("convert", saved, tmp_path / "link", "--to", "ckptd", code=10)[1]
    assert "is no folder" in cli("convert", saved, tmp_path / "no/such", "--to", "ckptd", code=10)[1]
    assert (tmp_path / "full/x").read_text() == (tmp_path / "file").read_text() == "mine"
    assert not (tmp_path / "nowhere").exists()
    assert leftovers(tmp_path) == []
    (tmp_path / "empty").mkdir()
    cli("convert", saved, tmp_path / "empty", "--to", "ckptd")


@pytest.mark.parametrize(
    ("args", "code", "says"),
    [
        (["{t}", "{o}", "--to", "onnx"], 10, "'onnx' is no format"),
        (["{t}", "{o}"], 10, "--to FORMAT is missing"),
        (["{t}"], 10, "DST is missing"),
        ([], 10, "SRC is missing"),
        (["{t}x", "{o}", "--to", "ckptd"], 14, "does not exist"),
        (["/etc", "{o}", "--to", "ckptd"], 25, "no format is recognised"),
        (["{t}", "{o}", "--to", "ckptd", "--drop", "weights"], 10, "--drop weights"),
        (["{t}", "{o}", "--to", "ckptd", "--dtype", "int4"], 10, "--dtype 'int4'"),
        (["{t}", "{o}", "--to", "ckptd", "--memory", "lots"], 10, "no size"),
        (["{t}", "{o}", "--to", "ckptd", "--memory", "1MiB"], 10, "too few"),
        (["{t}", "{o}", "--to", "ckptd", "--shard-size", "0"], 10, "--shard-size"),
        (["{t}", "{o}", "--to", "ckptd", "--ranks", "0"], 10, "--ranks 0"),
        (["{t}", "{o}", "--to", "ckptd", "--workers", "0"], 10, "--workers 0"),
        (["{t}", "{o}", "--to", "ckptd", "--hint", "x"], 10, "no KEY=VALUE"),
        (["{t}", "{o}", "--to", "ckptd", "--hint", "x=@/no/file"], 10, "/no/file cannot be read"),
        (["{t}", "{o}", "--to", "ckptd", "--view", "no-such-view"], 14, "no-such-view"),
        (["{t}", "{o}", "--to", "ckptd", "--view", "/no/view.json"], 14, "/no/view.json cannot be read"),
    ],
)
def test_bad_arguments(saved, cli, tmp_path, args, code, says):
    args = [a.format(t=saved, o=tmp_path / "out") for a in args]
    assert says in cli("convert", *args, code=code)[1]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["t.pt"]
    document, _ = cli("convert", *args, "--json", code=code)
    assert document["exit_code"] == code


def test_a_missing_image_names_tensor_and_hole(cli, tmp_path):
    commit(LocalStore(tmp_path / "s"), make_step(step=7))
    images = tmp_path / "s/job/step-00000007/images"
    (images / "r00001.safetensors").unlink()
    _, err = cli("convert", images, tmp_path / "out", "--to", "torch", code=24)
    assert "model.w: 128 of 256 elements are in no box; the first hole is [8:16, 0:16]" in err
    assert "r00001.safetensors is missing" in cli("convert", tmp_path / "s", tmp_path / "out", "--to", "torch", code=20)[1]
    assert not (tmp_path / "out").exists()


def test_a_missing_shard_is_named(cli, tmp_path):
    folder = tmp_path / "hf"
    folder.mkdir()
    save_file({"a": torch.ones(4)}, folder / "model-00001-of-00002.safetensors", metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {"a": "model-00001-of-00002.safetensors", "b.weight": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text("{}")
    code = main(["convert", str(folder), str(tmp_path / "out"), "--to", "torch"])
    assert code in {14, 24, 25}
    assert not (tmp_path / "out").exists()


def test_copies_that_differ_are_refused(cli, tmp_path):
    pieces = [Piece(n, "F32", (4,), Box.whole((4,))) for n in ("model.a", "model.b")]
    layout = lay_out(pieces, job="j", rank=0, world_size=1, coords={}, aliases={"model.b": "model.a"}, objects_bytes=0)
    head = layout.render(attempt=1, step=1, objects={})
    path = tmp_path / "r00000.safetensors"
    path.write_bytes(head + struct.pack("<4f", 1, 2, 3, 4) * 2)
    cli("convert", path, tmp_path / "same.pt", "--to", "torch")
    path.write_bytes(head + struct.pack("<8f", 1, 2, 3, 4, 1, 2, 3, 5))
    assert "model.a: [0:4] in r00000.safetensors differs from its replica" in cli("convert", path, tmp_path / "out.pt", "--to", "torch", code=26)[1]
    assert not (tmp_path / "out.pt").exists()


def test_a_rotten_source_of_ours_is_not_converted(cli, tmp_path):
    commit(LocalStore(tmp_path / "s"), make_step(step=7))
    image = tmp_path / "s/job/step-00000007/images/r00001.safetensors"
    data = bytearray(image.read_bytes())
    data[-3] ^= 16
    image.write_bytes(data)
    _, err = cli("convert", tmp_path / "s", tmp_path / "out", "--to", "torch", code=23)
    assert "r00001.safetensors: block 0" in err
    assert not (tmp_path / "out").exists()
    cli("convert", tmp_path / "s", tmp_path / "out", "--to", "ckptd", "--no-verify", "--ranks", "2")


def test_check_catches_a_byte_that_changed_on_the_disk(saved, cli, tmp_path, monkeypatch):
    """Between the last write and the reading back, a byte of the temporary file changes, as a bad disk would do it."""
    before = engine._check

    def spoiled(writer, out, *rest):
        image = next(out.work.rglob("*.safetensors"))
        data = bytearray(image.read_bytes())
        data[-1] ^= 1
        image.write_bytes(data)
        before(writer, out, *rest)

    monkeypatch.setattr(engine, "_check", spoiled)
    _, err = cli("convert", saved, tmp_path / "out", "--to", "dcp-safetensors", "--check", "--drop", "optimizer,objects", code=26)
    assert "read back, it is not what was written" in err
    assert not (tmp_path / "out").exists()
    assert leftovers(tmp_path) == [], "nothing of it is taken up again"


# --- a kill, and memory -----------------------------------------------------------------------------------------------------


def test_a_killed_run_leaves_no_name_and_is_taken_up_again(tmp_path):
    source = tmp_path / "m.safetensors"
    save_file({f"layers.{i}.weight": torch.full((512, 512), float(i)) for i in range(96)}, source, metadata={"format": "pt"})
    args = ["convert", source, tmp_path / "hf", "--to", "hf", "--shard-size", "1MiB", "--workers", "1"]
    process = subprocess.Popen([*COMMAND, *map(str, args)], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    journal = tmp_path / ".hf.ckptd-convert/.ckptd-journal"
    until = time.monotonic() + 60
    done = 0
    while done < 8 and time.monotonic() < until and process.poll() is None:
        done = journal.read_text().count("\n") - 1 if journal.exists() else 0
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stderr.close()
    assert process.returncode == -signal.SIGKILL, "it was faster than the kill"
    assert not (tmp_path / "hf").exists()
    finished = ckptd(*args, "--check")
    assert finished.returncode == 0, finished.stderr
    (resumed,) = [line for line in finished.stdout.splitlines() if "resumed" in line]
    assert float(resumed.split()[1]) >= 8
    assert resumed.split()[2] == "MiB"
    held = {k: v for f in (tmp_path / "hf").glob("*.safetensors") for k, v in load_file(f).items()}
    assert len(held) == 96
    assert all((v == int(k.split(".")[1])).all() for k, v in held.items())
    assert leftovers(tmp_path) == []
    again = ckptd(*args)
    assert again.returncode == 10, "the target is there now"


def test_another_source_is_not_mixed_with_an_earlier_run(saved, cli, tmp_path, monkeypatch):
    def dies(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as m:
        m.setattr(engine.Target, "publish", dies)
        cli("convert", saved, tmp_path / "out", "--to", "ckptd", code=130)
    assert leftovers(tmp_path) == [".out.ckptd-convert"]
    state = torch.load(saved)
    state["model"]["0.bias"] += 1
    torch.save(state, saved)
    document, _ = cli("convert", saved, tmp_path / "out", "--to", "ckptd", "--json")
    assert document["resumed_bytes"] == 0
    assert "equal: 16 of 16" in cli("diff", saved, tmp_path / "out")[0]


def test_two_runs_to_one_target_do_not_mix(saved, cli, tmp_path, monkeypatch):
    before = engine.Target.publish

    def publish(self, report):
        assert "another conversion writes to" in second()[1]
        before(self, report)

    def second():
        done = ckptd("convert", saved, tmp_path / "out", "--to", "ckptd")
        assert done.returncode == 41
        return done.stdout, done.stderr

    monkeypatch.setattr(engine.Target, "publish", publish)
    cli("convert", saved, tmp_path / "out", "--to", "ckptd")


def test_memory_is_bounded(tmp_path):
    """A tensor of 400 MiB (of a sparse file), cast on the way, in at most 200 MiB of memory."""
    header = json.dumps({"w": {"dtype": "F32", "shape": [100, 1 << 20], "data_offsets": [0, 400 << 20]}}).encode()
    source = tmp_path / "m.safetensors"
    source.write_bytes(struct.pack("<Q", len(header)) + header)
    os.truncate(source, 8 + len(header) + (400 << 20))
    code = (
        "import sys; from ckptd.cli.main import main; code = main(sys.argv[1:])\n"
        "print([l for l in open('/proc/self/status') if 'VmHWM' in l][0].split()[1], file=sys.stderr); sys.exit(code)"
    )
    args = ["convert", source, tmp_path / "out", "--to", "hf", "--dtype", "bf16", "--memory", "200MiB", "--no-sync", "--quiet", "--check"]
    done = subprocess.run([COMMAND[0], "-c", code, *map(str, args)], cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    peak_mib = int(done.stderr.split()[-1]) >> 10
    print(f"400 MiB converted in {peak_mib} MiB")
    assert peak_mib <= 200
