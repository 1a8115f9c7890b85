"""The command line as a process: help, version, exit codes, closed pipes; and how numbers are shown."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from ckptd.cli import show
from ckptd.cli.main import VERBS
from ckptd.storage.local import LocalStore
from tests.cli.helpers import COMMAND, ROOT, ckptd
from tests.storage.helpers import commit, make_step


def test_help_and_version():
    done = ckptd("--help")
    assert done.returncode == 0
    for verb in VERBS:
        assert f"\n    {verb} " in done.stdout or f"\n    {verb}\n" in done.stdout
    done = ckptd("--version")
    assert (done.returncode, done.stdout) == (0, "ckptd 0.1.0\n")


@pytest.mark.parametrize("verb", ["status", "ls", "inspect", "verify", "selftest"])
def test_help_of_a_verb_has_an_example(verb):
    done = ckptd(verb, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert "example" in done.stdout
    assert f"\n  ckptd {verb} " in done.stdout
    assert "--json" in done.stdout


@pytest.mark.parametrize(
    "args", [[], ["nonsense"], ["ls"], ["ls", "/", "--nonsense"], ["status", "--watch", "--json"], ["verify", "x", "--repair"]]
)
def test_bad_usage(args):
    done = ckptd(*args)
    assert (done.returncode, done.stdout) == (2, "")


def test_selftest():
    done = ckptd("selftest")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "computes parity" in done.stdout
    document = json.loads(ckptd("selftest", "--json").stdout)
    assert document["ok"] and [t["name"] for t in document["tests"]] == ["parity", "checksum", "memory", "socket"]


def test_selftest_sees_a_wrong_kernel(monkeypatch, capsys):
    from ckptd.cli import main
    from ckptd.core import parity

    monkeypatch.setattr(parity, "self_test", lambda: ["parity kernel 'abacus' is wrong"])
    assert main.main(["selftest"]) == 70
    assert "FAILED" in capsys.readouterr().out


def test_exit_codes_by_class(tmp_path):
    store = LocalStore(tmp_path / "store")
    commit(store, make_step())
    step = tmp_path / "store/job/step-00000007"
    assert ckptd("verify", step).returncode == 0
    image = step / "images/r00000.safetensors"
    data = bytearray(image.read_bytes())
    data[-1] ^= 1
    image.write_bytes(data)
    assert ckptd("verify", step).returncode == 23
    assert ckptd("ls", tmp_path / "nowhere").returncode == 14
    assert ckptd("ls", "gopher://x").returncode == 10
    image.write_bytes(b"no image")
    done = ckptd("inspect", image, "--json")
    assert done.returncode == 20
    assert json.loads(done.stdout)["error"] == "BadImage"
    assert done.stderr.startswith("ckptd inspect: ")
    assert ckptd("status", "--dir", tmp_path).returncode == 30


def test_a_closed_pipe_is_no_traceback(tmp_path):
    commit(LocalStore(tmp_path), make_step())
    process = subprocess.Popen([*COMMAND, "ls", str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    process.stdout = None
    _, err = process.communicate(timeout=20)
    assert b"Traceback" not in err


def test_names_that_the_terminal_cannot_write(tmp_path):
    store = tmp_path / "Größe"
    commit(LocalStore(store), make_step())
    done = ckptd("inspect", store / "job/step-00000007", PYTHONIOENCODING="ascii", PYTHONUTF8="0")
    assert (done.returncode, done.stderr) == (0, "")
    assert "Gr\\xf6\\xdfe" in done.stdout


def test_no_verb_imports_torch():
    code = "import sys; from ckptd.cli import main; main.build_parser(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=30).returncode == 0


def test_how_numbers_are_shown():
    assert [show.size(n) for n in (0, 1023, 1024, 1536, 1024**2 - 1, 1024**2, 5 * 1024**4, 2**63)] == [
        "0 B", "1023 B", "1.0 KiB", "1.5 KiB", "1.0 MiB", "1.0 MiB", "5.0 TiB", "8192.0 PiB",
    ]  # fmt: skip
    assert [show.duration(s) for s in (0, 9.96, 59.9, 60, 192, 3600, 187200)] == [
        "0.0 s", "10.0 s", "59 s", "1 min 0 s", "3 min 12 s", "1 h 0 min", "2 d 4 h",
    ]  # fmt: skip
    assert [show.ranges(r) for r in ([], [3], [0, 1, 2, 3, 7], range(1000))] == ["-", "3", "0-3,7", "0-999"]
    assert [show.utc(t) for t in (0, 1.7e9, 1e300)] == ["1970-01-01T00:00:00Z", "2023-11-14T22:13:20Z", "1e+300"]
    assert show.count(1, "image") + show.count(1234, "image") == "1 image1,234 images"
    assert show.some(["a", "b", "c"], 2) == "a, b and 1 more"
