"""The daemon's side of watching: real daemons, real rings, taps without torch. What a rank wrote is joined, over nodes too, and outlives the rank."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from ckptd.core import wire
from ckptd.monitor import record
from ckptd.monitor.ring import Ring
from ckptd.monitor.steps import Summarizer
from ckptd.monitor.tap_writer import Writer
from ckptd.watcher import Rank
from tests.daemon.conftest import rig  # noqa: F401  the fixture
from tests.daemon.rig import JOB, ROOT, Client, Refusal, until

ALL_REDUCE = record.OPS.index("all_reduce")
F32 = record.DTYPES.index("f32")


class FakeTap(Client):
    """A rank's tap: a real ring, written as the tap's own writer writes it."""

    def __init__(self, directory, rank: int, world: int, *, job: str = JOB, attempt: int = 1, policy: str = "") -> None:
        super().__init__(directory)
        self.rank, self.job_name, self.attempt, self.policy = rank, job, attempt, policy
        self.ring = Ring.create(1024)
        head = self.ring.header
        head["rank"], head["world_size"], head["pid"], head["local_rank"] = rank, world, os.getpid(), rank
        head["attempt"], head["job"], head["layer"] = attempt, job.encode(), record.LAYERS.index("python")
        self.writer = Writer(self.ring)
        self.row = self.writer.group(77, world, rank, range(world))
        self.ask(wire.Hello, job=job, rank=rank, role="tap")
        self.watched = self.watch()

    def watch(self) -> wire.Watched:
        return self.ask(wire.Watch, self.ring.fd, job=self.job_name, rank=self.rank, attempt=self.attempt, policy=self.policy)

    def enter(self) -> int:
        return self.writer.enter(self.row, ALL_REDUCE, F32, 64, 0, -1, 64)

    def step(self, number: int, work_s: float = 0.0) -> None:
        time.sleep(work_s)
        i = self.enter()
        self.writer.ended(i)
        self.writer.mark(record.STEP, time.monotonic_ns(), 0, number, record.NUMBERED)
        self.ring.header["step"] = number


def watching(client: Client, job: str = JOB) -> dict:
    return client.status()["watched"].get(job) or {}


def test_a_ring_that_fills_is_read_before_its_time():
    """Where steps are short a ring is read once a second; half a ring sooner."""
    ring = Ring.create(1024)
    writer = Writer(ring)
    rank = Rank(0, None, ring, os.getpid(), Summarizer(0))
    for _ in range(512):
        writer.mark(record.GC, 1, 2)
    assert not rank.filling
    writer.mark(record.GC, 1, 2)
    assert rank.filling
    rank.steps.begin = 513
    assert not rank.filling


def test_steps_of_all_ranks_are_joined(rig):  # noqa: F811
    rig.start("a")
    directory = rig.directory("a")
    taps = [rig.keep(FakeTap(directory, r, 4)) for r in range(4)]
    for step in range(1, 6):
        for tap in taps:
            tap.step(step, 0.002)
    look = rig.client("a")
    seen = until(lambda: (w := watching(look)) and len(w.get("ranks", [])) == 4 and w, what="the ranks were not seen")
    assert seen["taps"]["2"]["layer"] == "python"
    assert seen["taps"]["2"]["records"] == 10
    until(lambda: all(r.get("step", 0) == 5 for r in _ranks(watching(look))), what="the steps were not joined")


def _ranks(status: dict) -> list[dict]:
    ranks = status.get("ranks", [])
    return [*ranks.values()] if isinstance(ranks, dict) else ranks


def test_a_ring_that_lies_is_refused_and_nobody_is_harmed(rig):  # noqa: F811
    rig.start("a")
    tap = rig.keep(FakeTap(rig.directory("a"), 0, 2))
    with pytest.raises(Refusal, match="BadArgument"):
        tap.ring.header["pid"] = 1
        tap.watch()
    tap.ring.header["pid"] = os.getpid()
    for field, value in (("magic", 1), ("version", 9), ("capacity", 1 << 19), ("capacity", 77)):
        kept = tap.ring.header[field][0]
        tap.ring.header[field] = value
        with pytest.raises(Refusal, match="BadImage"):
            tap.watch()
        tap.ring.header[field] = kept
    fd = os.memfd_create("plain")
    os.ftruncate(fd, os.fstat(tap.ring.fd).st_size)
    with pytest.raises(Refusal, match="BadImage"):
        tap.ask(wire.Watch, fd, job=JOB, rank=0)
    os.close(fd)
    # Nonsense inside a ring that was taken: heads that jump, groups without end.
    tap.ring.header["head"] = 2**63
    tap.ring.header["groups"] = 2**32 - 1
    tap.ring.groups_table["size"][:] = 2**32 - 1
    tap.ring.ranks[:] = 2**32 - 1
    time.sleep(1.0)
    tap.ring.header["groups"], tap.ring.header["head"] = 1, 5
    assert rig.client("a").status()["watched"][JOB]["taps"]["0"]["gone"] is False


def test_another_daemon_takes_over_the_ring(rig):  # noqa: F811
    rig.start("a")
    tap = rig.keep(FakeTap(rig.directory("a"), 0, 1))
    tap.step(1)
    rig.kill("a")
    tap.step(2)
    rig.start("a")
    again = FakeTap.__new__(FakeTap)
    again.__dict__ |= tap.__dict__
    Client.__init__(rig.keep(again), rig.directory("a"))
    again.ask(wire.Hello, job=JOB, rank=0, role="tap")
    assert again.watch().watching
    look = rig.client("a")
    until(lambda: _ranks(watching(look)) and _ranks(watching(look))[0].get("step") == 2, what="steps of before were not read")


DYING = """
import os, sys, time
sys.path.insert(0, {root!r})
from pathlib import Path
from tests.monitor.test_watch_daemon import FakeTap
tap = FakeTap(Path(sys.argv[1]), 1, 2)
tap.step(1)
tap.enter()
print("ready", flush=True)
time.sleep(60)
"""


def test_a_death_is_seen_at_once_and_names_the_rank(rig):  # noqa: F811
    rig.start("a")
    directory = rig.directory("a")
    survivor = rig.keep(FakeTap(directory, 0, 2))
    survivor.step(1)
    child = subprocess.Popen([sys.executable, "-c", DYING.format(root=ROOT), str(directory)], stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdout.readline() == "ready\n"
        look = rig.client("a")
        until(lambda: len(_ranks(watching(look))) == 2)
        child.send_signal(signal.SIGKILL)
        began = time.monotonic()
        verdict = until(lambda: [v for v in watching(look).get("verdicts", []) if v["kind"] == "crash"], 5.0, "no verdict came")[0]
        took = time.monotonic() - began
        print(f"named after {took * 1e3:.0f} ms")
        assert verdict["ranks"] == [1]
        assert took < 1.0
    finally:
        child.kill()
        child.wait()
        child.stdout.close()


def test_a_rank_that_ends_in_good_order_is_no_crash(rig):  # noqa: F811
    rig.start("a")
    directory = rig.directory("a")
    code = DYING.replace("time.sleep(60)", "tap.ring.header['done'] = 1")
    done = subprocess.run([sys.executable, "-c", code.format(root=ROOT), str(directory)], capture_output=True, text=True, timeout=60, check=True)
    assert "ready" in done.stdout
    time.sleep(0.6)
    assert watching(rig.client("a"))["verdicts"] == []


def test_two_nodes_report_to_the_first(rig):  # noqa: F811
    rig.start("a")
    rig.start("b")
    looks = {n: rig.client(n) for n in "ab"}
    peers = [looks[n].status()["peer_address"] for n in "ab"]
    ranks = [rig.trainer(n, i, world=2, local=1, node=i, peers=peers) for i, n in enumerate("ab")]
    taps = [rig.keep(FakeTap(rig.directory(n), i, 2)) for i, n in enumerate("ab")]
    for step in range(1, 8):
        for tap in taps:
            tap.step(step, 0.005)
    seen = until(lambda: (w := watching(looks["a"])) and len(_ranks(w)) == 2 and all(r.get("step") == 7 for r in _ranks(w)) and w, what="node 1 was not heard")
    assert seen["coordinator"] is True
    assert {r["node"] for r in _ranks(seen)} == {0, 1}
    assert watching(looks["b"])["coordinator"] is False
    assert ranks[0].job()["watching"]["coordinator"] is True


def test_a_probe_goes_to_the_tap_and_comes_back(rig):  # noqa: F811
    """The wire alone: that an engine asks is tested with the engine."""
    rig.start("a")
    tap = rig.keep(FakeTap(rig.directory("a"), 0, 1))
    tap.send(wire.ProbeDone(probe=12345, kind="compute", rate=1.0))  # nobody asked: no harm
    tap.send(wire.StacksDone(ask=999, text="x"))
    tap.step(1)
    until(lambda: _ranks(watching(rig.client("a"))))
