"""Probes of processors and memory by real processes; transfers between nodes by real daemons' lines, over links that `tc` makes slow."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
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


# --- transfers between nodes ------------------------------------------------------------------------------------------------


def missing() -> str:
    from tests.train.cluster import Namespaces

    return Namespaces.missing() or ("" if shutil.which("tc") else "the tc command is missing (iproute2)")


NO_LINKS = missing()
SLOW = "40mbit"
SLOW_BYTES_PER_S = 40e6 / 8


class Links:
    """Nodes in network namespaces, on a bridge, each with a daemon's peers."""

    made = 0

    def __init__(self, count: int, *, rate: float = 0.0) -> None:
        Links.made += 1
        self.tag, self.count = f"cp{os.getpid() % 100000}x{Links.made}", count
        self.addresses = [f"10.78.0.{i + 11}:7171" for i in range(count)]
        self.nodes: list[subprocess.Popen] = []
        self.run("ip", "link", "add", self.tag, "type", "bridge")
        self.run("ip", "link", "set", self.tag, "up")
        for i in range(count):
            ns, there = f"{self.tag}n{i}", f"{self.tag}v{i}"
            self.run("ip", "netns", "add", ns)
            self.run("ip", "link", "add", there, "type", "veth", "peer", "name", "eth0", "netns", ns)
            self.run("ip", "link", "set", there, "master", self.tag, "up")
            for command in (("addr", "add", f"10.78.0.{i + 11}/24", "dev", "eth0"), ("link", "set", "eth0", "up"), ("link", "set", "lo", "up")):
                self.run("ip", "-n", ns, *command)
        for i in range(count):
            self.nodes.append(
                subprocess.Popen(
                    ["ip", "netns", "exec", f"{self.tag}n{i}", sys.executable, str(ROOT / "tests/monitor/transfer_node.py"), str(i), str(rate), *self.addresses],
                    stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)},
                )
            )  # fmt: skip
        assert [n.stdout.readline() for n in self.nodes] == ["ready\n"] * count

    @staticmethod
    def run(*command: str, check: bool = True) -> None:
        subprocess.run(command, check=check, capture_output=True)

    def slow_sending(self, i: int) -> None:
        self.run("tc", "-n", f"{self.tag}n{i}", "qdisc", "add", "dev", "eth0", "root", "tbf", "rate", SLOW, "burst", "64kb", "latency", "50ms")

    def slow_receiving(self, i: int) -> None:
        self.run("tc", "qdisc", "add", "dev", f"{self.tag}v{i}", "root", "tbf", "rate", SLOW, "burst", "64kb", "latency", "50ms")

    def slow_link(self, i: int, j: int) -> None:
        """What goes from i to j, and nothing else."""
        tc = ("tc", "-n", f"{self.tag}n{i}")
        self.run(*tc, "qdisc", "add", "dev", "eth0", "root", "handle", "1:", "htb", "default", "10")
        for number, rate in ((10, "10gbit"), (20, SLOW)):
            self.run(*tc, "class", "add", "dev", "eth0", "parent", "1:", "classid", f"1:{number}", "htb", "rate", rate, "burst", "64kb")
        self.run(*tc, "filter", "add", "dev", "eth0", "parent", "1:", "protocol", "ip", "u32", "match", "ip", "dst", f"10.78.0.{j + 11}/32", "flowid", "1:20")

    def transfer(self, i: int, j: int, **how) -> tuple[float, float]:
        """(rate, seconds it took)"""
        self.nodes[i].stdin.write(json.dumps({"to": j, **how}) + "\n")
        self.nodes[i].stdin.flush()
        return tuple(json.loads(self.nodes[i].stdout.readline()))

    def matrix(self) -> list[list[float]]:
        """rates[i][j]: from i to j; the better of two tries, for others use this machine too."""
        return [[0.0 if i == j else max(self.transfer(i, j, seconds=0.15)[0] for _ in range(2)) for j in range(self.count)] for i in range(self.count)]

    def __enter__(self):
        return self

    def __exit__(self, *_: object) -> None:
        for n in self.nodes:
            n.stdin.close()
            n.kill()
            n.wait()
            n.stdout.close()
        for i in range(self.count):
            self.run("ip", "link", "del", f"{self.tag}v{i}", check=False)
            self.run("ip", "netns", "del", f"{self.tag}n{i}", check=False)
        self.run("ip", "link", "del", self.tag, check=False)


@pytest.mark.skipif(bool(NO_LINKS), reason=NO_LINKS)
@pytest.mark.parametrize("what", ["sending", "receiving", "link"])
def test_a_slow_side_is_a_low_row_a_low_column_or_a_low_cell(what):
    n = 4
    with Links(n) as links:
        {"sending": lambda: links.slow_sending(2), "receiving": lambda: links.slow_receiving(2), "link": lambda: links.slow_link(1, 2)}[what]()
        rates = links.matrix()
    expected = {
        "sending": {(2, j) for j in range(n)}, "receiving": {(i, 2) for i in range(n)}, "link": {(1, 2)},
    }[what] - {(2, 2)}  # fmt: skip
    print(what + ": " + "; ".join(" ".join(f"{r / 1e6:.0f}" for r in row) for row in rates) + " MB/s")
    low = {(i, j) for i in range(n) for j in range(n) if i != j and rates[i][j] < 3 * SLOW_BYTES_PER_S}
    assert low == expected, rates
    for i, j in expected:
        assert 0.4 * SLOW_BYTES_PER_S < rates[i][j] < 1.6 * SLOW_BYTES_PER_S, rates


@pytest.mark.skipif(bool(NO_LINKS), reason=NO_LINKS)
def test_a_dead_a_stopped_and_an_unreachable_node_have_rate_0_and_hold_up_nobody():
    with Links(3) as links:
        assert links.transfer(0, 1)[0] > 0
        links.run("ip", "link", "set", f"{links.tag}v1", "down")
        rate, took = links.transfer(0, 1, deadline_s=3.0)
        assert rate == 0.0 and took < 6.0
        os.kill(links.nodes[2].pid, signal.SIGSTOP)
        rate, took = links.transfer(0, 2, deadline_s=3.0)
        assert rate == 0.0 and took < 6.0
        os.kill(links.nodes[2].pid, signal.SIGCONT)
        links.nodes[2].kill()
        links.nodes[2].wait()
        rate, took = links.transfer(0, 2)
        assert rate == 0.0 and took < 6.0


@pytest.mark.skipif(bool(NO_LINKS), reason=NO_LINKS)
def test_a_daemons_rate_limit_holds_for_transfers_too():
    limit = 10 << 20
    with Links(2, rate=limit) as links:
        rate, _ = links.transfer(0, 1, seconds=1.0)
    assert rate < 1.5 * limit


def test_what_came_at_once_at_the_beginning_is_not_counted():
    from ckptd import probing

    came = [(0.0, 1 << 20), (0.0, 2 << 20), *((0.1 * i, (2 << 20) + 1000 * i) for i in range(1, 20))]
    found = probing.measured(came)
    assert found.bytes / found.seconds == pytest.approx(10_000, rel=0.01)
    assert probing.measured([(0.0, 5), (1.0, 25)]).bytes == 20
