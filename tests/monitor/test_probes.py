"""Probes of processors and memory by real processes; transfers between nodes by real daemons' lines, over links that `tc` makes slow."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ckptd.monitor import probes

ROOT = Path(__file__).resolve().parents[2]
DAY_S = 86400.0


@contextlib.contextmanager
def process(code: str, *, cpus: set[int] | None = None, nice: int = 0):
    """A process that does something, placed somewhere; ended here."""

    def place() -> None:
        os.nice(nice)
        if cpus:
            os.sched_setaffinity(0, cpus)

    p = subprocess.Popen([sys.executable, "-c", code], preexec_fn=place)
    try:
        yield p
    finally:
        p.kill()
        p.wait()


SLEEPS, BURNS = "import time; time.sleep(1000)", "while True: pass"


# --- rates ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", probes.KINDS)
def test_a_probe_measures_what_it_says(kind):
    """The best repeat is never slower than the whole, and more time finds the same speed."""
    found = [getattr(probes, kind)(s) for s in (0.05, 0.1, 0.2, 0.2, 0.2)]
    assert all(r.best >= r.total > 0 for r in found)
    best = sorted((r.best for r in found), reverse=True)
    print(f"{kind}: {best[0]:.3g} per second at best, {found[0].total:.3g} in all")
    assert best[1] > best[0] / 3, "two of five were not disturbed"
    assert best[0] > {"compute": 1e9, "memory": 1e8}[kind]


def test_repeats_are_counted():
    done = []
    rate = probes.repeat(lambda: done.append(time.sleep(0.02)), 10.0, 0.0)
    assert len(done) == 1 + probes.REPEATS_MIN
    assert 10 / 0.2 < rate.total <= rate.best <= 10 / 0.02


def test_a_stopped_process_is_probed_from_outside_where_it_runs():
    cpu = max(os.sched_getaffinity(0))
    with process(SLEEPS, cpus={cpu}, nice=3) as p:
        os.kill(p.pid, signal.SIGSTOP)
        found = probes.run_outside("compute", p.pid, 0.1)
        assert found.best >= found.total > 0 and "cpus" not in found.unlike and "nice" not in found.unlike
        assert probes.outside("memory", p.pid, 0.05) > 0


def test_it_is_placed_as_the_process_is():
    cpu = max(os.sched_getaffinity(0))
    code = f"import os, sys; sys.path.insert(0, {str(ROOT)!r}); from ckptd.monitor import probes; print(probes.pin_like(int(sys.argv[1])), os.sched_getaffinity(0), os.getpriority(0, 0))"
    with process(SLEEPS, cpus={cpu}, nice=7) as p:
        until = time.monotonic() + 10
        while os.getpriority(os.PRIO_PROCESS, p.pid) != 7 and time.monotonic() < until:
            time.sleep(0.01)
        done = subprocess.run([sys.executable, "-c", code, str(p.pid)], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.split("]")[1].strip() == f"{{{cpu}}} 7"


def test_neighbours_on_its_processor_show_in_the_whole_and_not_in_the_best():
    cpu = max(os.sched_getaffinity(0))
    with contextlib.ExitStack() as stack:
        rank = stack.enter_context(process(SLEEPS, cpus={cpu}))
        for _ in range(4):
            stack.enter_context(process(BURNS, cpus={cpu}))
        found = probes.run_outside("compute", rank.pid, 1.0)
    print(f"beside four others: {found.total / found.best:.0%}")
    assert found.total < 0.5 * found.best, "four of five parts of the time were others'"


CPU_V1 = Path("/sys/fs/cgroup/cpu")
QUOTA = CPU_V1 / "cpu.cfs_quota_us"
WHY_NOT = "" if os.geteuid() == 0 and (CPU_V1 / "cgroup.procs").exists() and os.access(CPU_V1, os.W_OK) else "no cgroup (version 1, cpu) to make here"


@pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT)
def test_its_cgroups_quota_is_felt_and_counted():
    from ckptd.monitor.health import Sampler

    group = CPU_V1 / f"ckptd-test-{os.getpid()}"
    group.mkdir()
    try:
        if not (group / "cpu.cfs_quota_us").exists():
            pytest.skip("this kernel's cgroups have no quota")
        (group / "cpu.cfs_quota_us").write_text("20000")
        with process(SLEEPS) as p:
            (group / "cgroup.procs").write_text(str(p.pid))
            sampler = Sampler(pid=p.pid, kmsg="/nowhere")
            sampler.sample(time.monotonic())
            found = probes.run_outside("compute", p.pid, 1.0)
            throttled = sampler.sample(time.monotonic())
            print(f"a fifth of a processor: {found.total / found.best:.0%}; throttled {throttled.values['cgroup_throttled_ratio']:.2f} s per second")
            assert "cgroup" not in found.unlike and found.total < 0.5 * found.best
            assert throttled.values["cgroup_throttled_ratio"] > 0.05 and "cpu-throttled" in throttled.alarms
    finally:
        until = time.monotonic() + 10
        while group.exists() and time.monotonic() < until:
            with contextlib.suppress(OSError):
                group.rmdir()
            time.sleep(0.05)


def test_what_cannot_be_probed_is_said():
    with process("") as p:
        p.wait()
        with pytest.raises(OSError, match="ProcessLookupError|No such"):
            probes.outside("compute", p.pid, 0.05)
    for kind, seconds in (("disk", 0.1), ("compute", 0.0), ("compute", 1e9), ("compute", float("nan"))):
        with pytest.raises(ValueError, match="no probe"):
            probes.outside(kind, os.getpid(), seconds)


def test_where_groups_lie(tmp_path):
    for name in ("cpu", "cpuset", "memory", "unified"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "cgroup.procs").touch()
    text = "4:memory:/m\n3:cpuset:/s\n2:cpu,cpuacct:/c/d\n0::/u\n9:name=systemd:/\nnonsense\n5:cpu:/../../etc\n"
    assert probes._groups(text, tmp_path) == {"cpuset": tmp_path / "cpuset/s", "cpu": tmp_path / "cpu/c/d", "": tmp_path / "unified/u"}


# --- baselines --------------------------------------------------------------------------------------------------------------


def test_baselines_outlive_the_daemon_and_are_nobody_elses(tmp_path):
    path = tmp_path / "baselines.json"
    b = probes.Baselines(path)
    assert b.of("compute") == 0.0
    b.learn("compute", "", 5e9, 0.0)
    b.learn("compute", "", 4e9, 1.0)
    b.learn("transfer", "10.0.0.2:7070", 1e9, 1.0)
    for nonsense in (0.0, -1.0, float("inf"), float("nan")):
        b.learn("memory", "", nonsense, 1.0)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600 and [p.name for p in tmp_path.iterdir()] == ["baselines.json"]
    again = probes.Baselines(path)
    assert (again.of("compute"), again.of("transfer", "10.0.0.2:7070"), again.of("memory")) == (5e9, 1e9, 0.0)
    again.learn("compute", "", 3e9, 31 * DAY_S)
    assert probes.Baselines(path).of("compute") == 3e9, "what was a month ago is forgotten"
    assert probes.Baselines(path, machine="another").of("compute") == 0.0


@pytest.mark.parametrize("text", ["", "{", "[]", '{"machine": 3, "entries": {}}', '{"machine": "m", "entries": {"compute ": {"rate": -1, "taken_s": 0}}}', "\0" * 100])
def test_a_file_that_is_none_counts_for_nothing(tmp_path, text):
    path = tmp_path / "baselines.json"
    path.write_text(text)
    b = probes.Baselines(path, machine="m")
    assert b.of("compute") == 0.0
    b.learn("compute", "", 1.0, 0.0)
    assert probes.Baselines(path, machine="m").of("compute") == 1.0


def test_links_and_pipes_are_not_followed(tmp_path):
    (tmp_path / "other").write_text(json.dumps({"machine": "m", "entries": {"compute ": {"rate": 1.0, "taken_s": 0}}}))
    (tmp_path / "link").symlink_to(tmp_path / "other")
    os.mkfifo(tmp_path / "pipe")
    for name in ("link", "pipe", "none"):
        assert probes.Baselines(tmp_path / name, machine="m").of("compute") == 0.0
    assert probes.Baselines(None).of("compute") == 0.0


def test_baselines_are_bounded(tmp_path):
    b = probes.Baselines(None)
    for n in range(probes.ENTRIES_MAX + 10):
        b.learn("transfer", str(n), 1.0, float(n))
    assert len(b._entries) == probes.ENTRIES_MAX and b.of("transfer", "0") == 0.0 and b.of("transfer", str(probes.ENTRIES_MAX + 9)) == 1.0
