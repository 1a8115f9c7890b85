"""`ckptd ls`, `inspect` and `verify` on real checkpoints: good, broken, unfinished, copied, foreign."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest

from ckptd.cli.main import main
from ckptd.core.boxes import Box
from ckptd.core.checksum import digests_of
from ckptd.core.image import Piece, lay_out, parse
from ckptd.core.manifest import build_index
from ckptd.storage import memory
from ckptd.storage.local import LocalStore
from tests.storage.helpers import Step, commit, make_step


@pytest.fixture
def root(tmp_path) -> Path:
    return tmp_path / "store"


def store_with(root: Path, *made: Step) -> LocalStore:
    store = LocalStore(root)
    for m in made:
        commit(store, m, created_unix_s=1000.0 + m.step)
    return store


@pytest.fixture
def cli(capsys):
    def call(*args, code=0):
        got = main([*map(str, args)])
        out, err = capsys.readouterr()
        assert got == code, out + err
        return (json.loads(out) if "--json" in args else out), err

    return call


def step_of(root: Path, step: int, job="job") -> Path:
    return root / job / f"step-{step:08}"


def image_of(root: Path, step: int, rank: int) -> Path:
    return step_of(root, step) / "images" / f"r{rank:05}.safetensors"


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


@pytest.fixture
def mixed(root) -> Path:
    """Steps 1 to 6: good, image missing, image truncated, manifest of a newer version, a damaged manifest, unfinished; step 3 again good."""
    store_with(root, *(make_step(step=s) for s in range(1, 7)))
    image_of(root, 2, 1).unlink()
    short = image_of(root, 3, 0)
    short.write_bytes(short.read_bytes()[:-100])
    newer = step_of(root, 4) / "manifest.json"
    newer.write_text(newer.read_text().replace('"version": 1', '"version": 99'))
    flip(step_of(root, 5) / "manifest.json", 30)
    (step_of(root, 6) / "manifest.json").unlink()
    store_with(root, make_step(step=3, attempt=2))
    return root


# --- ls ---------------------------------------------------------------------------------------------------------------------


def test_ls_shows_good_broken_and_unfinished(mixed, cli):
    text, _ = cli("ls", mixed)
    lines = text.splitlines()
    assert lines[0].split() == ["JOB", "STEP", "ATTEMPT", "RANKS", "SIZE", "CREATED", "DIRECTORY", "STATE"]
    assert lines[1].split()[:4] == ["job", "3", "2", "2"]
    assert "1970-01-01T00:16:43Z" in lines[1]
    assert lines[1].endswith("step-00000003.a2  complete")
    document, err = cli("ls", mixed, "job", "--json")
    assert err == ""
    assert [(c["step"], c["attempt"], c["state"]) for c in document["checkpoints"]] == [
        (3, 2, "complete"), (3, 1, "broken"), (2, 1, "broken"), (1, 1, "complete"), (6, None, "unfinished"), (5, None, "broken"), (4, None, "broken"),
    ]  # fmt: skip
    errors = {(c["step"], c["attempt"]): c["error"] for c in document["checkpoints"]}
    assert "r00000.safetensors has" in errors[3, 1]
    assert "r00001.safetensors is missing" in errors[2, 1]
    assert "NewerFormat" in errors[4, None]
    assert errors[6, None] == errors[1, 1] == ""


def test_ls_takes_job_and_step_directories_links_and_urls(root, cli, tmp_path, monkeypatch):
    store_with(root, make_step(step=7), make_step(step=8), make_step(job="other", step=9))

    def steps(*args):
        return [(c["job"], c["step"]) for c in cli("ls", *args, "--json")[0]["checkpoints"]]

    assert steps(root) == [("job", 8), ("job", 7), ("other", 9)]
    assert steps(root, "other") == [("other", 9)]
    assert steps(root / "job") == steps(root / "job", "job") == steps(f"file://{root}/job") == [("job", 8), ("job", 7)]
    assert steps(f"{step_of(root, 7)}/") == [("job", 7)]
    (tmp_path / "latest").symlink_to(step_of(root, 8))
    assert steps(tmp_path / "latest") == [("job", 8)]
    monkeypatch.chdir(step_of(root, 7))
    assert steps(".") == steps("manifest.json") == [("job", 7)]
    shutil.copytree(step_of(root, 7), tmp_path / "copy")
    assert steps(tmp_path / "copy") == [("job", 7)]
    assert "copy       complete" in cli("ls", tmp_path / "copy")[0]


def test_ls_of_urls(cli):
    commit(memory.shared("cli-ls"), make_step(step=7))
    assert cli("ls", "memory://cli-ls", "--json")[0]["checkpoints"][0]["directory"] == "job/step-00000007"
    assert cli("inspect", "memory://cli-ls/job/step-00000007", "--json")[0]["step"] == 7
    assert "all right" in cli("verify", "memory://cli-ls/job/step-00000007/")[0]


def test_ls_of_nothing(root, cli, tmp_path):
    assert "does not exist" in cli("ls", root, code=14)[1]
    root.mkdir()
    assert "no checkpoint at" in cli("ls", root, code=14)[1]
    step_of(root, 7).mkdir(parents=True)
    cli("ls", step_of(root, 7), code=14)
    store_with(root, make_step())
    assert "no checkpoint of job 'else'" in cli("ls", root, "else", code=14)[1]
    cli("ls", root, "../job", code=10)
    cli("ls", root / "job", "other", code=10)
    cli("ls", step_of(root, 7), "job", code=10)
    cli("ls", image_of(root, 7, 0), code=10)
    cli("ls", "gopher://bucket", code=10)
    cli("ls", "", code=10)
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    cli("ls", tmp_path / "circle", code=41)
    document, _ = cli("ls", root, "else", "--json", code=14)
    assert (document["error"], document["exit_code"]) == ("NotFound", 14)


def test_jobs_called_like_our_own_files(root, cli):
    store_with(root, make_step(job="images"), make_step(job="step-00000001"))
    assert [c["job"] for c in cli("ls", root, "--json")[0]["checkpoints"]] == ["images", "step-00000001"]
    assert [c["job"] for c in cli("ls", root / "step-00000001", "--json")[0]["checkpoints"]] == ["step-00000001"]
    assert cli("inspect", root / "step-00000001/step-00000007", "--json")[0]["job"] == "step-00000001"


# --- verify -----------------------------------------------------------------------------------------------------------------


def test_verify_of_what_is_right(root, cli):
    store_with(root, make_step(step=7), make_step(step=8))
    text, err = cli("verify", root)
    assert err == ""
    assert text.count("every byte is right") == 2
    assert "2 checkpoints verified, all right" in text
    assert cli("verify", root, "--quiet")[0] == ""
    document, _ = cli("verify", step_of(root, 7), "--json")
    assert document["ok"]
    total = sum(image_of(root, 7, r).stat().st_size for r in (0, 1))
    assert document["bytes_read"] == document["checkpoints"][0]["bytes_read"] == total


def test_verify_names_a_flipped_byte(root, cli):
    store_with(root, make_step(step=7), make_step(step=8))
    flip(image_of(root, 7, 1), -1)
    text, _ = cli("verify", root, code=23)
    assert "image of rank 1: ChecksumMismatch: job/step-00000007/images/r00001.safetensors: block 0" in text
    assert "1 tensor touched: model.w" in text
    assert "2 checkpoints verified, 1 with problems" in text
    quiet, _ = cli("verify", root, "--quiet", code=23)
    assert "step-00000007" in quiet
    assert "step-00000008" not in quiet
    document, _ = cli("verify", root, "--json", code=23)
    assert [c["ok"] for c in document["checkpoints"]] == [True, False]
    problem = document["checkpoints"][1]["problems"][0]
    assert (problem["rank"], problem["error"], problem["exit_code"], problem["tensors"]) == (1, "ChecksumMismatch", 23, ["model.w"])
    cli("verify", step_of(root, 8))


@pytest.mark.parametrize(
    ("spoil", "code", "says"),
    [
        (lambda d: (d / "images/r00001.safetensors").unlink(), 14, "NotFound"),
        (lambda d: (d / "images/r00000.safetensors").write_bytes((d / "images/r00000.safetensors").read_bytes()[:-100]), 20, "BadImage"),
        (lambda d: (d / "manifest.json").write_text((d / "manifest.json").read_text().replace('"version": 1', '"version": 2')), 22, "NewerFormat"),
        (lambda d: (d / "manifest.json").write_text("{"), 21, "BadManifest"),
        (lambda d: flip(d / "index.msgpack.zst", 40), 23, "ChecksumMismatch"),
        (lambda d: (d / "index.msgpack.zst").unlink(), 21, "BadManifest"),
        (lambda d: d.rename(d.with_name("step-00000009")), 21, "BadManifest"),
    ],
    ids=["missing image", "truncated image", "newer manifest", "broken manifest", "index byte", "missing index", "misplaced"],
)  # fmt: skip
def test_verify_by_class_of_error(root, cli, spoil, code, says):
    store_with(root, make_step())
    spoil(step_of(root, 7))
    assert says in cli("verify", root, code=code)[0]
    (directory,) = (root / "job").iterdir()
    assert says in cli("verify", directory, code=code)[0]
    assert not cli("verify", root, "--json", code=code)[0]["ok"]


def test_verify_of_a_mixed_store_reads_what_can_be_read(mixed, cli):
    document, _ = cli("verify", mixed, "--json", code=20)
    assert document["unfinished"] == ["job/step-00000006"]
    assert [(c["directory"][9:], [p["error"] for p in c["problems"]]) for c in document["checkpoints"]] == [
        ("00000003.a2", []),
        ("00000003", ["BadImage", "ChecksumMismatch"]),
        ("00000002", ["NotFound"]),
        ("00000001", []),
        ("00000005", ["BadManifest"]),
        ("00000004", ["NewerFormat"]),
    ]
    assert "job/step-00000006: unfinished, not read" in cli("verify", mixed, code=20)[0]


def test_verify_of_unfinished(root, cli):
    store_with(root, make_step())
    (step_of(root, 7) / "manifest.json").unlink()
    assert "nothing was verified" in cli("verify", root)[0]
    assert "no manifest" in cli("verify", step_of(root, 7), code=14)[1]
    cli("verify", image_of(root, 7, 0), code=10)


def test_verify_shows_progress_on_a_terminal(root, cli, monkeypatch):
    import sys

    store_with(root, make_step())
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    out, err = cli("verify", root, "--json")
    assert out["ok"]
    assert "MB/s" in err
    assert "(1 of 1): " in err
    assert " %, " in err
    assert err.endswith("\r\x1b[K")
    assert cli("verify", root, "--quiet")[1] == ""


# --- inspect ----------------------------------------------------------------------------------------------------------------


def test_inspect_a_checkpoint(root, cli):
    store_with(root, make_step())
    text, _ = cli("inspect", step_of(root, 7))
    assert (
        "  job         job\n  step        7, attempt 1\n  created     1970-01-01T00:16:47Z\n  world size  2\n  tensors     3 in 4 boxes\n"
        in text
    )
    assert [line.split() for line in text.splitlines() if line.startswith(("F32", "BF16", "I64"))] == [
        ["F32", "1", "1,024", "1.0", "KiB"], ["BF16", "1", "10", "10", "B"], ["I64", "1", "8", "8", "B"],
    ]  # fmt: skip
    assert "dp=1" in text
    assert "model.w" not in text
    text, _ = cli("inspect", step_of(root, 7), "--tensors", "model.*", "--objects")
    assert [line.split(maxsplit=2) for line in text.splitlines() if line.startswith("model.")] == [
        ["model.b", "BF16", "[5]       0: [0:5]"], ["model.w", "F32", "[16, 16]  0: [0:8, 0:16], 1: [8:16, 0:16]"],
    ]  # fmt: skip
    assert "objects of rank 1 (dp=1)\n  lr = 0.1\n  rank = 1\n" in text
    assert "no tensor matches 'nope'" in cli("inspect", step_of(root, 7), "--tensors", "nope", code=14)[1]


def test_inspect_as_json(root, cli):
    store_with(root, make_step())
    document, _ = cli("inspect", step_of(root, 7), "--json")
    assert "tensors" not in document
    assert document["dtypes"]["F32"] == {"tensors": 1, "bytes": 1024}
    assert document["images"][1]["coords"] == {"dp": 1}
    document, _ = cli("inspect", step_of(root, 7), "--json", "--tensors", "--objects")
    assert [t["name"] for t in document["tensors"]] == ["model.b", "model.w", "optim.step"]
    assert document["tensors"][1]["boxes"][1]["start"] == [8, 0]
    assert document["objects"]["1"] == {"lr": 0.1, "rank": 1}


def test_inspect_an_image(root, cli):
    store_with(root, make_step())
    path = image_of(root, 7, 0)
    text, _ = cli("inspect", path, "--objects")
    assert "rank        0 of 2" in text
    assert "header      4,096 bytes; 2 objects" in text
    assert "optim.step  I64    []" in text
    assert "lr = 0.1" in text
    document, _ = cli("inspect", path, "--json", "--tensors", "optim*", "--objects")
    (entry,) = document["entries"]
    assert path.read_bytes()[entry["begin"] : entry["end"]] == make_step().images[0][4096:4104]
    assert document["objects"] == {"lr": 0.1, "rank": 0}


def test_inspect_views_aliases_and_typed_objects(root, cli):
    pieces = [Piece("z", "U8", (3, 16), Box.whole((3, 16)), "complex128"), Piece("model.embed", "F32", (2,), Box.whole((2,)))]
    objects = {
        "rng": {"cpu": {"$array": ["tensor", "objects.rng.cpu"]}, "state": {"$tuple": [3, {"$bytes": "AAEC"}]}},
        "long": [1.5] * 100,
        "nan": {"$float": "nan"},
    }
    layout = lay_out(pieces, job="job", rank=0, world_size=1, coords={}, aliases={"model.head": "model.embed"}, objects_bytes=4096)
    image = layout.render(attempt=1, step=1, objects=objects) + np.random.default_rng(0).bytes(56)
    digests = {0: digests_of(image)}
    step = Step("job", 1, 1, {0: image}, digests, build_index({0: parse(image, len(image))}, digests))
    store_with(root, step)
    text, _ = cli("inspect", step_of(root, 1), "--tensors", "--objects")
    assert "complex128 as U8" in text
    assert "model.head is the same tensor as model.embed" in text
    assert "  rng.cpu = <tensor objects.rng.cpu>\n  rng.state = (3, b'\\x00\\x01\\x02')\n" in text
    assert "(500 characters)" in text
    assert cli("inspect", step_of(root, 1), "--json", "--objects")[0]["objects"]["0"] == objects
    assert "complex128 as U8" in cli("inspect", image_of(root, 1, 0))[0]


def test_inspect_refuses_what_is_not_ours(root, cli, tmp_path):
    header = json.dumps({"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}, "__metadata__": {"format": "pt"}}).encode()
    foreign = tmp_path / "model.safetensors"
    foreign.write_bytes(struct.pack("<Q", len(header)) + header + b"1234")
    assert "hf: " in cli("inspect", foreign)[0]
    image = foreign.rename(tmp_path / "r00000.safetensors")  # called like ours
    assert "not written by ckptd" in cli("inspect", image, code=20)[1]
    image.write_bytes(b"")
    cli("inspect", image, code=20)
    image.write_bytes(b"\xff" * 20)
    assert cli("inspect", image, "--json", code=20)[0]["error"] == "BadImage"
    store_with(root, make_step())
    assert "is not one checkpoint" in cli("inspect", root, code=10)[1]
    cli("inspect", root / "job", code=10)
    flip(step_of(root, 7) / "index.msgpack.zst", 40)
    cli("inspect", step_of(root, 7), code=23)
    (step_of(root, 7) / "manifest.json").unlink()
    assert "unfinished" in cli("inspect", step_of(root, 7), code=14)[1]


def test_names_cannot_drive_the_terminal(root, cli):
    pieces = [Piece("\x1b]0;owned\x07\nw", "F32", (2,), Box.whole((2,)))]
    layout = lay_out(
        pieces, job="job", rank=0, world_size=1, coords={"\x1b[31m": 1}, aliases={"\r": pieces[0].name}, objects_bytes=64
    )
    image = layout.render(attempt=1, step=1, objects={"\x1b[2J": "\x1b[2J"}) + bytes(8)
    digests = {0: digests_of(image)}
    store_with(root, Step("job", 1, 1, {0: image}, digests, build_index({0: parse(image, len(image))}, digests)))
    flip(image_of(root, 1, 0), -1)
    for args in (["inspect", step_of(root, 1), "--tensors", "--objects"], ["inspect", image_of(root, 1, 0), "--objects"]):
        out, _ = cli(*args)
        assert not {"\x1b", "\r", "\x07"} & set(out)
    out, _ = cli("verify", root, code=23)
    assert "\\x1b]0;owned\\x07\\nw" in out
    assert "\x1b" not in out
