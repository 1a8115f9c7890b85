"""`ckptd doctor`: this machine passes, and each check fails where it should, on a real fault or on a machine that we make up."""

from __future__ import annotations

import argparse
import errno
import importlib.metadata
import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from ckptd import __version__, arena
from ckptd.channel import socket_path
from ckptd.cli import doctor
from ckptd.cli.doctor import INFO, OK, PROBLEM, WARNING, Limit
from ckptd.cli.main import main
from ckptd.core import parity
from ckptd.errors import BadArgument, StoreFailed
from ckptd.storage.local import LocalStore
from tests.cli.helpers import ROOT, ckptd, running_daemon

GB = 10**9
NAMES = [n for n in doctor.CHECKS if n != "store"]


@pytest.fixture
def home(tmp_path):
    directory = tmp_path / "d"
    directory.mkdir(mode=0o700)
    return directory


def checks(done) -> dict[str, dict]:
    document = json.loads(done.stdout)
    assert document["ok"] == (done.returncode == 0) == all(c["level"] != PROBLEM for c in document["checks"])
    return {c["name"]: c for c in document["checks"]}


def checked(name, **given):
    return doctor._checked(doctor.CHECKS[name], argparse.Namespace(**{"dir": None, "store": None, "timeout_s": 2.0} | given))


# --- as a whole -------------------------------------------------------------------------------------------------------------


def test_help_has_an_example():
    done = ckptd("doctor", "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert "\n  ckptd doctor --store " in done.stdout and "--json" in done.stdout


def test_this_machine(home):
    done = ckptd("doctor", "--dir", home, "--json")
    found = checks(done)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    assert list(found) == NAMES
    for name in ("python", "packages", "torch", "entry point", "memfd", "sockets", "loopback", "directory"):
        assert found[name]["level"] == OK, found[name]
    assert found["parity"]["level"] == (WARNING if parity.KERNELS[0] == parity.NUMPY else OK)
    text = ckptd("doctor", "--dir", home).stdout.splitlines()
    assert [line[9:23].strip() for line in text[:-1] if not line.startswith(" ")] == NAMES
    warnings = sum(c["level"] == WARNING for c in found.values())
    assert text[-1] == f"0 problems, {warnings} warning{'' if warnings == 1 else 's'}"


def test_a_problem_is_the_exit_status_and_has_a_remedy(home, capsys):
    home.chmod(0o755)
    assert main(["doctor", "--dir", str(home)]) == 1
    out = capsys.readouterr().out
    assert f"problem  directory     {home} is open to others (mode 0755): the daemon refuses it\n{'':23}remedy: chmod 700 {home}" in out
    assert "\n1 problem, " in out


def test_impossible_numbers(capsys):
    for value in ("0", "nan", "inf"):
        assert main(["doctor", "--timeout-s", value]) == 10
    assert "seconds above 0" in capsys.readouterr().err


def test_doctor_does_not_import_torch(home):
    code = f"import sys; from ckptd.cli import main; main.main(['doctor', '--dir', {str(home)!r}]); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=30, stdout=subprocess.DEVNULL).returncode == 0


def test_every_finding_to_act_upon_says_what_to_do():
    made = [
        doctor.judge_python((3, 10)), doctor.judge_packages({}, {}), doctor.judge_torch(None, ""), doctor.judge_kernel("Linux", "4.19"),
        doctor.judge_memlock(1 << 23, 1 << 23, ["/dev/nvidia0"]), doctor.judge_files(100), doctor.judge_memory(10 * GB, 0, [], 0),
        doctor.judge_memfd(same=True, sealed=False), doctor.judge_sockets((0, 1), (2, 3), alive=True), doctor.judge_clock(1e-9, "hpet", 50),
        doctor.judge_entry([], []), doctor.judge_entry([], ["/a", "/b"]),
    ]  # fmt: skip
    assert all(f.level in {WARNING, PROBLEM} and f.text and f.remedy for f in made)


# --- versions ---------------------------------------------------------------------------------------------------------------


def test_python():
    assert doctor.judge_python((3, 10, 12)).level == PROBLEM
    assert doctor.judge_python((3, 11, 0)).level == OK
    assert doctor.judge_python((4, 0, 0)).level == OK


def test_versions():
    assert [doctor.version_of(t) for t in ("2.13.0+cpu", "6.18.44-fc-v595", "2.9.0a0", "6.8-generic", "", "x")] == [(2, 13, 0), (6, 18, 44), (2, 9, 0), (6, 8), (), ()]


def test_packages():
    needs = {"numpy": "1.26", "xxhash": "3.4"}
    assert doctor.judge_packages(needs, {"numpy": "2.4.6", "xxhash": "3.4"}).level == OK
    found = doctor.judge_packages(needs, {"numpy": "1.9", "xxhash": None})
    assert (found.level, found.text) == (PROBLEM, "numpy 1.9 (needs 1.26), xxhash is missing (needs 3.4)")
    assert doctor.judge_packages({}, {}).level == WARNING


def test_requirements_are_those_of_this_installation(monkeypatch):
    assert set(doctor._requirements()) == {"h11", "msgspec", "numpy", "psutil", "xxhash", "zstandard"}
    assert set(doctor._requirements("torch")) == {"torch"}
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.1")
    assert checked("packages").level == PROBLEM

    def gone(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "requires", gone)
    monkeypatch.setattr(importlib.metadata, "version", gone)
    assert checked("packages").level == WARNING
    assert checked("torch").level == WARNING


def test_torch():
    assert doctor.judge_torch("2.13.0+cpu", "2.9").level == OK
    assert doctor.judge_torch("2.8.1", "2.9").level == PROBLEM
    assert doctor.judge_torch(None, "2.9").level == WARNING


@pytest.mark.parametrize(
    ("release", "level"), [("6.18.44-fc", OK), ("6.5", OK), ("6.4.9", INFO), ("5.15.0-91-generic", INFO), ("5.10.0", WARNING), ("5.2.1", PROBLEM), ("4.18.0-553.el8", PROBLEM)]
)  # fmt: skip
def test_kernels(release, level):
    assert doctor.judge_kernel("Linux", release).level == level


def test_other_systems():
    assert doctor.judge_kernel("Darwin", "23.1.0").level == PROBLEM


# --- limits -----------------------------------------------------------------------------------------------------------------


def test_memlock():
    assert doctor.judge_memlock(-1, -1, ["/dev/nvidia0"]).level == OK
    assert doctor.judge_memlock(8 << 20, 8 << 20, []).level == OK
    low = doctor.judge_memlock(8 << 20, 8 << 20, ["/dev/nvidia0"])
    assert low.level == WARNING and "8.0 MiB" in low.text and "LimitMEMLOCK" in low.remedy
    assert doctor.judge_memlock(8 << 20, -1, ["/dev/nvidia0"]).remedy == "ulimit -l unlimited"


def test_memlock_is_read(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor, "DEVICES", (str(tmp_path),))
    soft = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    assert checked("memlock").level == (OK if soft == -1 else WARNING)


@pytest.mark.parametrize(("hard", "level"), [(-1, OK), (65536, OK), (4096, OK), (1024, WARNING), (255, PROBLEM)])
def test_open_files(hard, level):
    assert doctor.judge_files(hard).level == level


def test_a_low_limit_of_open_files_is_seen(home):
    code = "import resource as r, os, sys; r.setrlimit(r.RLIMIT_NOFILE, (200, 200)); os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
    done = subprocess.run(
        [sys.executable, "-c", code, "-m", "ckptd.cli.main", "doctor", "--dir", str(home), "--json"], cwd=ROOT, capture_output=True, text=True, timeout=30
    )
    assert checks(done)["open files"]["level"] == PROBLEM


def machine(root: Path, cgroup: str, files: dict[str, object]) -> Path:
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(cgroup)
    for name, value in files.items():
        path = root / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{value}\n")
    return root


def test_cgroup_v2(tmp_path):
    """The unit's own limit, and its slice's; the root has no such files."""
    unit, above = "system.slice/ckptd.service", "system.slice"
    files = {f"{unit}/memory.max": 8 * GB, f"{unit}/memory.current": 3 * GB, f"{above}/memory.max": "max", f"{above}/memory.current": 9 * GB}
    root = machine(tmp_path, f"0::/{unit}\n", files)
    top = tmp_path / "sys/fs/cgroup"
    assert doctor.cgroup_limits(root) == [Limit(f"{top}/{unit}/memory.max", 8 * GB, 5 * GB)]
    (top / above / "memory.max").write_text(f"{10 * GB}\n")
    assert [limit.left_bytes for limit in doctor.cgroup_limits(root)] == [5 * GB, 1 * GB]


def test_cgroup_v2_in_a_container(tmp_path):
    root = machine(tmp_path, "0::/\n", {"memory.max": 4 * GB, "memory.current": GB})
    assert [limit.left_bytes for limit in doctor.cgroup_limits(root)] == [3 * GB]


def test_cgroup_v1(tmp_path):
    files = {
        "memory/slurm/job7/memory.limit_in_bytes": 6 * GB, "memory/slurm/job7/memory.usage_in_bytes": GB,
        "memory/memory.limit_in_bytes": 9223372036854771712, "memory/memory.usage_in_bytes": 5 * GB,
    }  # fmt: skip
    root = machine(tmp_path, "12:pids:/\n4:memory,hugetlb:/slurm/job7\n1:name=systemd:/\n0::/\n", files)
    assert [(limit.limit_bytes, limit.left_bytes) for limit in doctor.cgroup_limits(root)] == [(6 * GB, 5 * GB)]


def test_cgroup_v1_whose_own_path_is_not_mounted(tmp_path):
    """Docker without a cgroup namespace: the path is the host's, the mount is the container's."""
    root = machine(tmp_path, "4:memory:/docker/abc\n", {"memory/memory.limit_in_bytes": 2 * GB, "memory/memory.usage_in_bytes": GB})
    assert [limit.left_bytes for limit in doctor.cgroup_limits(root)] == [GB]


@pytest.mark.parametrize(("line", "files"), [("0::/", ("memory.max", "memory.current", "inactive_file")), ("4:memory:/", ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "total_inactive_file"))])
def test_page_cache_is_no_use_of_memory(tmp_path, line, files):
    limit, used, cache = files
    stat = (Path(limit).parent / "memory.stat").as_posix()
    root = machine(tmp_path, f"{line}\n", {limit: 4 * GB, used: 4 * GB, stat: f"anon {GB}\n{cache} {3 * GB}"})
    assert [found.left_bytes for found in doctor.cgroup_limits(root)] == [3 * GB]


def test_no_cgroups(tmp_path):
    assert doctor.cgroup_limits(tmp_path) == []


def test_memory():
    margin = arena.MARGIN_BYTES + 100 * GB // 20
    assert doctor.judge_memory(100 * GB, 80 * GB, [], 80 * GB).level == OK
    assert "no cgroup limits it" in doctor.judge_memory(100 * GB, 80 * GB, [], 80 * GB).text
    assert doctor.judge_memory(100 * GB, margin, [], margin).level == PROBLEM
    small = [Limit("/a/memory.max", 50 * GB, 40 * GB), Limit("/a/b/memory.max", 6 * GB, 5 * GB)]
    found = doctor.judge_memory(100 * GB, 80 * GB, small, 5 * GB)
    assert found.level == PROBLEM and "/a/b/memory.max" in found.text
    assert doctor.judge_memory(100 * GB, 80 * GB, small[:1], 40 * GB).level == OK
    refused = doctor.judge_memory(100 * GB, 80 * GB, [], GB)
    assert refused.level == PROBLEM, "admission control would refuse, whatever is left"
    unseen = doctor.judge_memory(100 * GB, 80 * GB, small[:1], 80 * GB)
    assert unseen.level == WARNING and "admission control does not see" in unseen.text


def test_a_machine_without_memory_is_seen(monkeypatch):
    monkeypatch.setattr(doctor.psutil, "virtual_memory", lambda: SimpleNamespace(total=10 * GB, available=GB // 10))
    assert checked("memory").level == PROBLEM


# --- what the system lets us do ---------------------------------------------------------------------------------------------


def refuse(*_, **__):
    raise OSError(errno.EPERM, os.strerror(errno.EPERM))


def test_memfd(monkeypatch):
    assert checked("memfd").level == OK
    with monkeypatch.context() as m:
        m.setattr(os, "memfd_create", refuse)
        assert checked("memfd").level == PROBLEM
    with monkeypatch.context() as m:
        m.setattr(doctor.fcntl, "fcntl", lambda *_: 0)  # seals that are taken and do nothing
        found = checked("memfd")
        assert found.level == PROBLEM and "though it is sealed" in found.text
    with monkeypatch.context() as m:
        m.setattr(os, "pread", lambda *_: b"other")
        assert "does not hold" in checked("memfd").text
    assert checked("memfd").level == OK


def test_sockets(monkeypatch):
    assert checked("sockets").level == OK
    with monkeypatch.context() as m:
        m.setattr(doctor, "pidfd_of", refuse)
        assert checked("sockets").level == PROBLEM
    with monkeypatch.context() as m:
        m.setattr(doctor, "peer_of", lambda _: (0, 65534))  # another PID and user namespace
        m.setattr(doctor, "pidfd_of", lambda _, pid: os.pidfd_open(os.getpid()))
        found = checked("sockets")
        assert found.level == PROBLEM and "process 0 of user 65534" in found.text
    gone = subprocess.Popen([sys.executable, "-c", ""])
    fd = os.pidfd_open(gone.pid)
    gone.wait()
    with monkeypatch.context() as m:
        m.setattr(doctor, "pidfd_of", lambda *_: fd)
        assert "a living process is dead" in checked("sockets").text


def test_loopback(monkeypatch):
    assert checked("loopback").level == OK
    with monkeypatch.context() as m:
        m.setattr(socket, "create_connection", refuse)
        found = checked("loopback")
        assert found.level == PROBLEM and "ip link set lo up" in found.remedy


def test_clocks():
    for source in ("tsc", "kvm-clock", "arch_sys_counter", ""):
        assert doctor.judge_clock(1e-9, source, 60).level == OK
    assert doctor.judge_clock(1e-9, "hpet", 60).level == WARNING
    assert doctor.judge_clock(1e-9, "tsc", 5000).level == WARNING
    assert doctor.judge_clock(4e-3, "tsc", 60).level == WARNING


def test_the_clock_is_read(monkeypatch):
    assert "1 ns fine" in checked("clock").text
    real = time.monotonic_ns

    def slow():
        for _ in range(20):
            real()
        return real()

    monkeypatch.setattr(time, "monotonic_ns", slow)
    monkeypatch.setattr(doctor, "CLOCK_READ_NS_MAX", 100.0)
    assert checked("clock").level == WARNING


# --- this node's daemon -----------------------------------------------------------------------------------------------------


def test_directories(home, tmp_path, monkeypatch):
    def judge(folder):
        return doctor.judge_directory(socket_path(str(folder)))

    assert judge(home).level == OK
    assert judge(tmp_path / "new" / "er").level == OK
    home.chmod(0o770)
    assert "open to others (mode 0770)" in judge(home).text
    home.chmod(0o700)
    link = tmp_path / "link"
    link.symlink_to(home)
    assert judge(link).level == PROBLEM
    file = tmp_path / "file"
    file.write_text("")
    assert judge(tmp_path / ("x" * 100)).level == PROBLEM
    assert "bytes long" in judge(tmp_path / ("x" * 100)).text
    assert judge(file).level == PROBLEM
    with monkeypatch.context() as m:
        m.setattr(os, "getuid", lambda: 4711)
        assert "not to 4711" in judge(home).text
    with monkeypatch.context() as m:
        m.setattr(os, "access", lambda *_: False)
        assert "is not writable" in judge(tmp_path / "new").text


def test_a_directory_below_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    assert checked("directory", dir=str(tmp_path / "file" / "d")).level == PROBLEM


def test_no_daemon(home):
    assert checked("daemon", dir=str(home)).level == INFO


def test_a_daemon_that_lives_is_stopped_and_dies(home):
    with running_daemon(home) as process:
        found = checked("daemon", dir=str(home))
        assert found.level == OK and f"pid {process.pid}, version {__version__}, up " in found.text
        assert "peers at 127.0.0.1:" in found.text and "this machine only" in found.text
        process.send_signal(signal.SIGSTOP)
        found = checked("daemon", dir=str(home), timeout_s=0.3)
        assert found.level == PROBLEM and "did not answer within 0.3 s" in found.text and "SIGSTOP" in found.remedy
        process.send_signal(signal.SIGCONT)
        process.kill()
        process.wait(10)
        found = checked("daemon", dir=str(home))
        assert found.level == WARNING and "its socket is left" in found.text


def told(**changes):
    return {"version": __version__, "daemon": "d", "pid": 7, "uptime_s": 60.0, "peer_address": "10.0.0.1:7070", "errors": 0, "jobs": {}} | changes


def test_what_a_daemon_tells():
    assert doctor.judge_daemon(told()).level == OK
    assert "this machine only" not in doctor.judge_daemon(told()).text
    assert "this machine only" in doctor.judge_daemon(told(peer_address="127.0.0.1:1")).text
    assert doctor.judge_daemon(told(version="0.0.1")).level == WARNING
    ill = doctor.judge_daemon(told(errors=3, last_errors=["disk full"]))
    assert ill.level == WARNING and "3 errors, the last: disk full" in ill.text
    assert doctor.judge_daemon({"pid": "seven"}).level == WARNING


# --- this installation ------------------------------------------------------------------------------------------------------

RATES = {"gfni": 30e9, "numpy": 1.5e9}


def test_parity():
    assert "20 times NumPy's" in doctor.judge_parity(["gfni", "numpy"], [], RATES, ["_parity.so"]).text
    assert doctor.judge_parity(["gfni", "numpy"], ["'gfni' is wrong"], RATES, []).level == PROBLEM
    bare = doctor.judge_parity(["numpy"], [], RATES, [])
    assert bare.level == WARNING and bare.text.startswith("no C compiler was found") and "20 to 40 times slower" in bare.text
    assert "_parity.cp39.so does not load" in doctor.judge_parity(["numpy"], [], RATES, ["_parity.cp39.so"]).text


def test_a_wrong_kernel_and_a_missing_one_are_seen(monkeypatch):
    with monkeypatch.context() as m:
        m.setattr(parity, "self_test", lambda: ["parity kernel 'abacus' is wrong"])
        assert checked("parity").level == PROBLEM
    monkeypatch.setattr(parity, "KERNELS", (parity.NUMPY,))
    found = checked("parity")
    assert found.level == WARNING and "NumPy computes parity" in found.text


def test_what_numpy_is_said_to_cost_is_about_true():
    fast = [k for k in parity.KERNELS if k in {"gfni", "avx2"}]
    if not fast:
        pytest.skip("no such kernel here")
    assert doctor._rate(fast[0]) / doctor._rate(parity.NUMPY) > doctor.NUMPY_TIMES[0] / 4


def test_entry_points():
    assert doctor.judge_entry(["ckptd.elastic:plugin"], ["/site"]).level == OK
    assert doctor.judge_entry([], ["/site"]).level == WARNING
    shadowed = doctor.judge_entry(["ckptd.elastic:plugin"], ["/tree", "/site"])
    assert shadowed.level == WARNING and "in /tree shadow those in /site" in shadowed.text
    assert "does not work" in doctor.judge_entry([], ["/tree", "/site"]).text


def test_a_stale_egg_info_is_seen(tmp_path, home):
    stale = tmp_path / "ckptd.egg-info"
    stale.mkdir()
    (stale / "PKG-INFO").write_text("Metadata-Version: 2.1\nName: ckptd\nVersion: 0.0.1\n")
    found = checks(ckptd("doctor", "--dir", home, "--json", cwd=tmp_path))
    assert found["entry point"]["level"] == WARNING
    assert str(tmp_path) in found["entry point"]["text"] and "shadow" in found["entry point"]["text"]
    assert "torchrun --rdzv-backend ckptd does not work" in found["entry point"]["text"]


def test_torchruns_variable(monkeypatch):
    monkeypatch.setenv(doctor.SHARE_STORE, "1")
    assert checked("torchrun").level == OK
    monkeypatch.setenv(doctor.SHARE_STORE, "0")
    found = checked("torchrun")
    assert found.level == INFO and found.remedy.endswith(f"export {doctor.SHARE_STORE}=1")


# --- the durable tier -------------------------------------------------------------------------------------------------------


def test_a_store(home, tmp_path):
    store = tmp_path / "store"
    store.mkdir()
    found = checks(ckptd("doctor", "--dir", home, "--store", store, "--json"))["store"]
    assert found["level"] in {OK, WARNING}, found
    assert "64 MiB written and synced at " in found["text"]
    assert list(store.iterdir()) == [], "nothing is left"
    found = checked("store", store=f"file://{store}/not/yet")
    assert found.level == WARNING and "does not exist yet" in found.text
    assert list(store.iterdir()) == []


def test_stores_that_cannot_be(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    assert checked("store", store=str(tmp_path / "file")).level == PROBLEM
    assert checked("store", store="/proc").level == PROBLEM
    assert checked("store", store="s3://bucket").level == PROBLEM
    with pytest.raises(BadArgument):
        doctor._store(argparse.Namespace(store="memory://x"))
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: SimpleNamespace(total=100 * GB, free=1000))
    found = checked("store", store=str(tmp_path))
    assert found.level == PROBLEM and ": full" in found.text
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_an_fsync_that_fails(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    for name in ("fsync", "fdatasync"):
        monkeypatch.setattr(os, name, fail)
    found = checked("store", store=str(tmp_path))
    assert found.level == PROBLEM and "dmesg" in found.remedy
    assert list(tmp_path.iterdir()) == []


class Forgetful(LocalStore):
    def get(self, name, begin, into):
        super().get(name, begin, into)
        into[-1] ^= 1


class Replacing(LocalStore):
    """A file system on which nothing is exclusive."""

    def put(self, name, data, *, exclusive=False):
        super().put(name, data)


class Keeping(LocalStore):
    """A file system on which nothing is replaced."""

    def put(self, name, data, *, exclusive=False):
        if not (Path(str(self)) / name).exists():
            super().put(name, data)


@pytest.mark.parametrize(("kind", "what"), [(Forgetful, "not what was written"), (Replacing, "holds b'again!!!'"), (Keeping, "not what was put last")])
def test_file_systems_that_lie(tmp_path, kind, what):
    with pytest.raises(StoreFailed, match=what):
        doctor.try_store(kind(tmp_path))


def test_what_is_said_of_stores():
    def judge(**changes):
        return doctor.judge_store("/s", **{"existing": True, "kind": "ext4", "free": (50 * GB, 100 * GB), "bytes_per_s": 1e9} | changes)

    assert judge().level == OK and "1000 MB/s" in judge().text
    assert judge(kind="tmpfs").level == WARNING
    assert judge(free=(GB, 100 * GB)).level == WARNING
    assert judge(free=(1000, 100 * GB)).level == PROBLEM
    assert judge(bytes_per_s=5e6).level == WARNING
    assert judge(existing=False).level == WARNING


def test_file_systems(tmp_path):
    mounts = tmp_path / "mounts"
    mounts.write_text("/dev/a / ext4 rw 0 0\nx /mnt/a\\040b nfs4 rw 0 0\ntmpfs /mnt tmpfs rw 0 0\n")
    assert [doctor.file_system_of(Path(p), mounts) for p in ("/home/x", "/mnt/a b/c", "/mnt/other", "/mnt2")] == ["ext4", "nfs4", "tmpfs", "ext4"]
    assert doctor.file_system_of(Path("/"), tmp_path / "absent") == ""


# --- watching ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("found", "native", "compiler", "env", "level", "says"),
    [
        (["ckptd.autoload:register"], "/c/ckptd_tap.so", "g++", {}, OK, "native"),
        (["ckptd.autoload:register"], "", "g++", {}, INFO, "python"),
        (["ckptd.autoload:register"], "", "", {}, WARNING, "compiler"),
        ([], "/c/ckptd_tap.so", "g++", {}, WARNING, "entry point"),
        (["ckptd.autoload:register"], "/c/ckptd_tap.so", "g++", {"CKPTD_DISABLE": "1"}, INFO, "CKPTD_DISABLE=1"),
        (["ckptd.autoload:register"], "/c/ckptd_tap.so", "g++", {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}, INFO, "AUTOLOAD=0"),
    ],
)
def test_how_ranks_will_be_watched(found, native, compiler, env, level, says):
    finding = doctor.judge_tap(found, native, compiler, env)
    assert finding.level == level and says in finding.text
    assert bool(finding.remedy) == (level != OK)


@pytest.mark.parametrize(
    ("state", "level", "says"),
    [
        ({"active": True, "path": "/c/nccl-profiler-1.so", "next": ""}, OK, "/c/nccl-profiler-1.so: operations"),
        ({"active": True, "path": "/c/nccl-profiler-1.so", "next": "/u/mine.so"}, OK, "/u/mine.so behind it"),
        ({"active": False, "why": "CKPTD_NCCL_PROFILER=0"}, INFO, "=0"),
        ({"active": False, "why": "NCCL_PROFILER_PLUGIN=none"}, INFO, "=none"),
        ({"active": False, "why": "no C compiler (cc, gcc or clang) is there"}, WARNING, "compiler"),
        ({"active": False, "why": "the plugin x has none of the versions (3, 4, 5, 6): it is left alone"}, WARNING, "none of the versions"),
    ],
)
def test_what_nccl_will_load(state, level, says):
    finding = doctor.judge_nccl(state)
    assert finding.level == level and says in finding.text
    assert bool(finding.remedy) == (level != OK)


def test_nccls_plugin_is_asked_for_as_a_rank_does_it(tmp_path, monkeypatch):
    """With a driver, by its file; without one there is nothing to ask."""
    monkeypatch.setattr(doctor, "NVIDIA", tmp_path / "absent")
    assert checked("nccl").level == INFO
    monkeypatch.setattr(doctor, "NVIDIA", tmp_path)
    monkeypatch.delenv("NCCL_PROFILER_PLUGIN", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    found = checked("nccl")
    assert found.level == (OK if shutil.which("cc") or os.environ.get("CC") else WARNING), found
    monkeypatch.setenv("CKPTD_NCCL_PROFILER", "0")
    assert checked("nccl").level == INFO
    monkeypatch.delenv("CKPTD_NCCL_PROFILER")
    monkeypatch.setenv("NCCL_PROFILER_PLUGIN", "/nowhere.so")
    assert checked("nccl").level == WARNING


def test_the_tap_of_this_machine():
    assert checked("tap").level in {OK, INFO, WARNING}
