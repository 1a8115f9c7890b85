"""The profiler plugin without a GPU: driven by a program that does what NCCL does (`nccl_driver.c`), with a user's plugin behind it, and built and loaded as a trainer would."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from ckptd.monitor import nccl, record
from ckptd.monitor.ring import Ring

HERE = Path(__file__).parent
COMPILER = shutil.which("cc") or shutil.which("gcc")
pytestmark = pytest.mark.skipif(COMPILER is None, reason="needs a C compiler")
SANITIZE = ("-g", "-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")


def cc(*arguments) -> None:
    subprocess.run([COMPILER, "-std=gnu11", "-Wall", "-Wextra", "-Werror", *map(str, arguments)], check=True)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Driver and plugin, plain and with sanitizers, and two plugins of a user."""
    at = tmp_path_factory.mktemp("nccl")
    plugin = [f for f in nccl.FLAGS if not f.startswith("-std")]
    cc(*plugin, "-o", at / "plugin.so", nccl.SOURCES[0], "-ldl")
    cc("-O1", "-g", "-o", at / "driver", HERE / "nccl_driver.c", "-ldl", "-lpthread")
    for v in (4, 5):
        cc("-O1", "-fPIC", "-shared", f"-DVERSION={v}", "-o", at / f"user{v}.so", HERE / "nccl_user_plugin.c")
    try:
        cc(*plugin, *SANITIZE, "-o", at / "plugin-sanitized.so", nccl.SOURCES[0], "-ldl")
        cc(*SANITIZE, "-o", at / "driver-sanitized", HERE / "nccl_driver.c", "-ldl", "-lpthread")
    except subprocess.CalledProcessError:
        pass  # a compiler without its sanitizers' libraries
    return at


def drive(at, mode, version, *, sanitized=False, under=(), **env):
    which = "-sanitized" if sanitized else ""
    command = [*under, at / f"driver{which}", at / f"plugin{which}.so", mode, str(version)]
    done = subprocess.run(
        command, env={**os.environ, "CKPTD_NCCL_TIMES": "1", "ASAN_OPTIONS": "detect_leaks=0", **env}, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return {x["case"]: x for x in map(json.loads, done.stdout.splitlines())}, done.stderr


@pytest.mark.parametrize("version", nccl.VERSIONS)
def test_times_land_in_the_taps_record_of_the_same_operation(built, version):
    said, _ = drive(built, "match", version)
    exact = version >= 4  # before, the plugin's own clock, when NCCL's proxy tells it
    for case, us in (("all_reduce", 2000), ("barrier", 9), ("reduce_scatter", 7), ("batch 1", 1000), ("batch 2", 2000), ("batch 3", 3000), ("pair", 600), ("all_to_all", 800)):
        found = said[case]
        assert found["inside_us"] == us if exact else found["inside_us"] >= 1, found
        assert found["ended"]
    assert said["cpu"]["inside_us"] == 0, "a record of gloo's is not NCCL's"
    assert said["no barrier"]["inside_us"] == 0, "a barrier is of one element"
    assert said["captured"]["inside_us"] == 0, "what was captured has not run"
    for case in ("called directly", "replayed"):
        found = said[case]
        assert found["flags"] == record.MARK | record.DEVICE
        assert (found["op"], found["dtype"], found["bytes"], found["group"]) == (record.NCCL, record.OPS.index("all_reduce"), 4096, record.NO_GROUP)
        assert found["inside_us"] >= 2000
    waits = said["transfer"]
    assert (waits["flags"], waits["op"], waits["dtype"], waits["peer"]) == (record.MARK | record.P2P, record.NCCL, record.OPS.index("send"), 3)
    assert waits["inside_us"] >= 16_000, "for the network"
    assert waits["seq"] >= 8_000, "for the peer"
    assert waits["waited_us"] >= 4_000, "for the own device"
    assert waits["bytes"] == (1000 if exact else 0)


@pytest.mark.parametrize("version", nccl.VERSIONS)
def test_threads_lost_events_wrong_handles_and_early_ends(built, version):
    said, _ = drive(built, "storm", version)
    counted = dict(zip(nccl.COUNTS, said["counts"]["counts"], strict=True))
    assert counted["communicators"] == 360
    assert counted["operations"] > 10_000
    assert counted["lost"] > 0, "places ran out, and that was counted"
    assert counted["stale"] > 0


@pytest.mark.parametrize("mode", ["match", "storm"])
@pytest.mark.parametrize("version", [3, 6])
def test_clean_under_sanitizers(built, mode, version):
    if not (built / "driver-sanitized").exists():
        pytest.skip("the compiler has no sanitizers")
    drive(built, mode, version, sanitized=True)


@pytest.mark.skipif(shutil.which("valgrind") is None, reason="needs valgrind")
def test_clean_under_valgrind(built):
    drive(built, "match", 5, under=("valgrind", "-q", "--error-exitcode=9"))


@pytest.mark.parametrize("version", [4, 5])
@pytest.mark.parametrize("switch", ["1", "0"])
def test_a_users_plugin_hears_what_it_asked_for(built, version, switch):
    """Also when ours is switched off; never after it has finalized; and its parents are its own handles."""
    said, heard = drive(built, "chain", version, CKPTD_NCCL_PROFILER_NEXT=str(built / f"user{version}.so"), CKPTD_NCCL_PROFILER=switch, CKPTD_NCCL_TIMES="0")
    assert f"version {version}, colls 21, channels 40, stops {80 if version == 4 else 100}, states 40, wrong 0" in heard
    counted = dict(zip(nccl.COUNTS, said["counts"]["counts"], strict=True))
    assert counted["operations"] == (21 if switch == "1" else 0)


def test_switched_off_it_asks_for_nothing(built):
    said, _ = drive(built, "cost", 5, CKPTD_NCCL_PROFILER="0")
    assert said["counts"]["mask"] == 0
    assert not any(said["counts"]["counts"][1:])


def test_events_of_one_collective_cost_little(built):
    best = min(drive(built, "cost", 5, CKPTD_NCCL_TIMES="16")[0]["cost"]["ns"] for _ in range(3))
    print(f"the plugin's events of one collective: {best} ns")
    assert best < 20_000


def in_python(tmp_path, code, **env):
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("NCCL_", "CKPTD_"))}
    done = subprocess.run(
        [sys.executable, "-c", code], env={**clean, "XDG_CACHE_HOME": str(tmp_path), **env}, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


ENABLE = "import json, os; from ckptd.monitor import nccl; s = nccl.enable(); print(json.dumps([s.active, s.why, s.path, s.next, os.environ.get('NCCL_PROFILER_PLUGIN')]))"


def test_it_is_built_once_into_a_directory_of_the_user(tmp_path):
    active, why, path, behind, named = in_python(tmp_path, ENABLE)
    assert active, why
    assert path == named
    assert not behind
    assert Path(path).parent == tmp_path / "ckptd"
    assert stat.S_IMODE(Path(path).parent.stat().st_mode) == 0o700
    before = Path(path).stat().st_mtime_ns
    again = in_python(tmp_path, ENABLE, CC="/nonexistent/cc")
    assert again[:3] == [True, "", path]
    assert Path(path).stat().st_mtime_ns == before
    assert [p.name for p in Path(path).parent.iterdir()] == [Path(path).name], "nothing partial is left"


def test_what_stands_against_it_is_said_and_nothing_is_set(tmp_path):
    for env, word in (
        ({"CKPTD_NCCL_PROFILER": "0"}, "CKPTD_NCCL_PROFILER"),
        ({"NCCL_PROFILER_PLUGIN": "none"}, "none"),
        ({"CC": "/nonexistent/cc"}, "/nonexistent/cc"),
        ({"NCCL_PROFILER_PLUGIN": "nobody-has-this"}, "nobody-has-this"),
    ):
        active, why, _, _, named = in_python(tmp_path, ENABLE, **env)
        assert not active
        assert word in why
        assert named == env.get("NCCL_PROFILER_PLUGIN")
    (tmp_path / "ckptd").chmod(0o777)
    active, why, *_ = in_python(tmp_path, ENABLE)
    assert not active
    assert "only this user" in why


def test_behind_a_users_plugin_only_its_versions_are_offered(tmp_path, built):
    active, why, path, behind, named = in_python(tmp_path, ENABLE, NCCL_PROFILER_PLUGIN=str(built / "user4.so"))
    assert active, why
    assert (path, behind) == (named, str(built / "user4.so"))
    import ctypes

    library = ctypes.CDLL(path)
    assert [v for v in nccl.VERSIONS if hasattr(library, f"ncclProfiler_v{v}")] == [4]
    child = in_python(tmp_path, ENABLE, NCCL_PROFILER_PLUGIN=path, CKPTD_NCCL_PROFILER_NEXT=behind)
    assert child[:4] == [True, "", path, behind], "a child of that process does the same"


def test_a_ring_is_handed_over_and_outlives_its_owner(tmp_path):
    code = """
import json
from ckptd.monitor import nccl, record
from ckptd.monitor.ring import Ring
before = nccl.attach(Ring.create(64))
nccl.enable()
ring = Ring.create(64)
ok = nccl.attach(ring)
ring.close()
nccl.times(8); nccl.waits(True); nccl.waits(False); counts = nccl.counts(); nccl.detach()
print(json.dumps([before, ok, counts]))
"""
    before, ok, counts = in_python(tmp_path, code)
    assert not before
    assert ok
    assert counts == dict.fromkeys(nccl.COUNTS, 0)
    assert nccl.counts() == {}
    assert Ring.create(64).capacity == 64
