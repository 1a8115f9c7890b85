"""The trainer's line: whatever the daemon does, `tell` returns at once and `ask` at its deadline."""

from __future__ import annotations

import os
import signal
import time
import tracemalloc

import pytest

from ckptd.channel import QUEUE_BYTES_MAX, QUEUE_MESSAGES_MAX, Pipe
from ckptd.core import wire
from ckptd.errors import BadArgument, DaemonUnreachable, PeerFailed
from ckptd.link import TELLS_MAX, Link
from tests.daemon.rig import JOB, until


@pytest.fixture
def link(rig):
    made = Link(rig.directory() / "daemon.sock", lambda i: wire.Hello(id=i, job=JOB, rank=0), lambda _: None)
    yield made
    made.close()


def status(link, timeout_s=5.0):
    return link.ask(lambda i: wire.Status(id=i), wire.Report, timeout_s)[0].status


def test_no_daemon(rig, link):
    began = time.perf_counter()
    with pytest.raises(DaemonUnreachable, match="no daemon answers"):
        link.open(5.0)
    with pytest.raises(DaemonUnreachable, match="gone"):
        status(link)
    link.tell(wire.Skipped(step=1, reason=""))
    assert time.perf_counter() - began < 0.5


def test_a_stopped_daemon_costs_a_tell_nothing_and_an_ask_its_deadline(rig, link):
    rig.start()
    link.open(5.0)
    pid = rig.daemons["d"].pid
    os.kill(pid, signal.SIGSTOP)
    try:
        tracemalloc.start()
        began = time.perf_counter()
        worst = 0.0
        for step in range(10_000):
            at = time.perf_counter()
            link.tell(wire.Skipped(step=step, reason="no free slot"))
            worst = max(worst, time.perf_counter() - at)
        took_s = time.perf_counter() - began
        grown = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        print(f"10,000 tells to a stopped daemon: {took_s * 1e3:.0f} ms, worst {worst * 1e3:.2f} ms, {grown / 1e6:.2f} MB")
        assert took_s < 3
        assert grown < 4e6
        time.sleep(0.2)
        assert len(link._tells) <= TELLS_MAX
        for timeout_s in (0.3, 0.6):
            began = time.perf_counter()
            with pytest.raises(DaemonUnreachable, match="did not answer"):
                status(link, timeout_s)
            assert timeout_s <= time.perf_counter() - began < timeout_s + 0.3
    finally:
        os.kill(pid, signal.SIGCONT)
    assert status(link)["pid"] == pid
    assert link.reconnects == 0


def test_what_is_kept_for_a_daemon_that_does_not_read_is_bounded(rig, link):
    """A hundred thousand notices: the oldest go, the socket's buffer and a queue of a thousand stay."""
    rig.start()
    link.open(5.0)
    pid = rig.daemons["d"].pid
    os.kill(pid, signal.SIGSTOP)
    try:
        tracemalloc.start()
        for step in range(100_000):
            link.tell(wire.Skipped(step=step, reason="x" * 100))
        time.sleep(0.3)
        kept = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
        print(f"100,000 tells to a stopped daemon: {kept / 1e6:.2f} MB stay")
        assert kept < 4e6
    finally:
        os.kill(pid, signal.SIGCONT)
    assert status(link)["pid"] == pid


def test_a_daemon_that_dies_while_asked_is_not_waited_for(rig, link):
    rig.start()
    link.open(5.0)
    os.kill(rig.daemons["d"].pid, signal.SIGSTOP)
    import threading

    threading.Timer(0.3, rig.kill).start()
    began = time.perf_counter()
    with pytest.raises(DaemonUnreachable, match="went away"):
        status(link, 20.0)
    assert time.perf_counter() - began < 2
    rig.start()

    def answered():
        try:
            return status(link)["pid"] == rig.daemons["d"].pid
        except DaemonUnreachable:  # it may have reached the dying daemon's socket once more
            return False

    until(answered)
    assert link.reconnects >= 1


def test_answers_and_refusals(rig, link):
    rig.start()
    link.open(5.0)
    with pytest.raises(BadArgument, match="said once"):
        link.ask(lambda i: wire.Hello(id=i, job=JOB), wire.Welcome, 5.0)
    with pytest.raises(PeerFailed, match="answered with Report, not Done"):
        link.ask(lambda i: wire.Status(id=i), wire.Done, 5.0)


def test_closing_waits_for_nobody(rig):
    rig.start()
    made = Link(rig.directory() / "daemon.sock", lambda i: wire.Hello(id=i, job=JOB, rank=0), lambda _: None)
    made.open(5.0)
    os.kill(rig.daemons["d"].pid, signal.SIGSTOP)
    for step in range(20_000):
        made.tell(wire.Skipped(step=step, reason="x" * 100))
    began = time.perf_counter()
    made.close()
    took_s = time.perf_counter() - began
    os.kill(rig.daemons["d"].pid, signal.SIGCONT)
    assert took_s < 1.5


def test_a_pipes_queue_is_bounded():
    import socket

    for message, limit in ((wire.Skipped(step=1, reason="x" * (1 << 20)), QUEUE_BYTES_MAX >> 20), (wire.Status(id=1), QUEUE_MESSAGES_MAX)):
        a, b = socket.socketpair()
        pipe = Pipe(a)
        with b:
            for _ in range(limit - 1):
                pipe.put(message)
            with pytest.raises(PeerFailed, match="does not read"):
                for _ in range(3):
                    pipe.put(message)
        pipe.close()
