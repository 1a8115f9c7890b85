"""The daemon absent, killed, stopped, full or slow never fails or stalls a training step: deadlines, with the numbers printed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from torch import nn

import ckptd
from tests.forks import ranks
from tests.train.harness import ROOT, daemon_pid, stop_daemon

pytestmark = pytest.mark.timeout(200)

STEP_MAX_S = 0.25
"""No step may add more than this, in any kind of trouble; on two shared cores a scheduler's hiccup alone is 0.1 s."""


@pytest.fixture
def place(tmp_path):
    yield {"CKPTD_DIR": str(tmp_path / "d"), "CKPTD_JOB": "trouble"}
    stop_daemon(tmp_path / "d")


def loop(session, model, optimizer, first: int, count: int) -> list[float]:
    """Seconds that ckptd added to each step: session.step and the fence."""
    added = []
    for step in range(first, first + count):
        loss = model(torch.rand(8, 512)).square().mean()
        loss.backward()
        began = time.perf_counter()
        session._fence()
        fence = time.perf_counter() - began
        optimizer.step()
        optimizer.zero_grad()
        began = time.perf_counter()
        session.step(step)
        added.append(fence + time.perf_counter() - began)
        time.sleep(0.01)
    return added


def build():
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(512, 512) for _ in range(6)])
    return model, torch.optim.AdamW(model.parameters())


def report(kind: str, added: list[float], counts: dict) -> None:
    ordered = sorted(added)
    print(f"{kind:>9}: {len(added)} steps, added per step: median {ordered[len(ordered) // 2] * 1e3:.2f} ms, worst {ordered[-1] * 1e3:.2f} ms; {counts}")


def start_daemon_with(patch: str, directory: str) -> subprocess.Popen:
    """A real daemon with one of its parts made slow or poor."""
    os.makedirs(directory, mode=0o700, exist_ok=True)
    code = f"import sys, time\nimport ckptd.daemon, ckptd.arena, ckptd.held\n{patch}\nfrom ckptd.cli.main import main\nsys.exit(main(['daemon', '--dir', {directory!r}]))"
    process = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(ROOT)}, stderr=subprocess.DEVNULL)
    until = time.monotonic() + 20
    while not os.path.exists(directory + "/daemon.sock") and time.monotonic() < until:
        time.sleep(0.02)
    return process


@pytest.mark.parametrize("kind", ["healthy", "killed", "stopped"])
def test_a_daemon_in_trouble_in_mid_training(kind, place):
    def work(_rank):
        model, optimizer = build()
        session = ckptd.attach(model=model, optimizer=optimizer, required=True)
        session.restore()
        added = loop(session, model, optimizer, 1, 20)
        before = dict(session.counts)
        assert before.get("captured", 0) >= 15
        pid = daemon_pid(session._link._path.parent)
        if kind != "healthy":
            os.kill(pid, signal.SIGKILL if kind == "killed" else signal.SIGSTOP)
        trouble = loop(session, model, optimizer, 21, 60)
        after = dict(session.counts)
        if kind == "stopped":
            os.kill(pid, signal.SIGCONT)
            assert session.wait("committed", timeout_s=10), "it goes on where it was"
            loop(session, model, optimizer, 81, 10)
            assert session.wait("committed", timeout_s=10)
        began = time.perf_counter()
        session.close(timeout_s=2.0)
        assert time.perf_counter() - began < 6.0
        return [added, trouble, after]

    [[added, trouble, counts]] = ranks(1, work, env=place)
    report("before", added, {})
    report(kind, trouble, counts)
    assert max(trouble) < STEP_MAX_S
    if kind != "healthy":
        assert counts["skipped"] >= 50, "snapshots are what it costs, and they are counted"


def test_no_daemon_and_none_wanted(place):
    def work(_rank):
        model, optimizer = build()
        began = time.perf_counter()
        session = ckptd.attach(model=model, optimizer=optimizer, start_daemon=False, timeout_s=10)
        attached = time.perf_counter() - began
        assert session.restore().source == "fresh"
        added = loop(session, model, optimizer, 1, 40)
        session.close()
        return [attached, added, dict(session.counts), session.inert]

    [[attached, added, counts, inert]] = ranks(1, work, env=place)
    report("absent", added, counts)
    assert max(added) < STEP_MAX_S and counts["skipped"] == 40 and "no daemon" in inert and attached < 5


def test_a_daemon_that_is_stopped_at_attach(place):
    daemon = start_daemon_with("", place["CKPTD_DIR"])
    try:
        os.kill(daemon.pid, signal.SIGSTOP)

        def work(_rank):
            model, optimizer = build()
            began = time.perf_counter()
            session = ckptd.attach(model=model, optimizer=optimizer, timeout_s=4)
            attached = time.perf_counter() - began
            session.restore()
            added = loop(session, model, optimizer, 1, 20)
            session.close()
            return [attached, added, dict(session.counts)]

        [[attached, added, counts]] = ranks(1, work, env=place)
    finally:
        daemon.kill()
        daemon.wait()
    report("hung", added, counts)
    print(f"attach gave up after {attached:.1f} s of its 4 s")
    assert attached < 6 and max(added) < STEP_MAX_S and counts["skipped"] == 20


@pytest.mark.parametrize(
    ("kind", "patch"),
    [
        ("full", "ckptd.arena.room = lambda: ckptd.arena.Room(300 << 20, 'a test')"),
        ("slow", "real = ckptd.daemon.make_seal\ndef slow(*a):\n    time.sleep(1.0)\n    return real(*a)\nckptd.daemon.make_seal = slow"),
    ],
)
def test_a_daemon_that_is_full_or_slow(kind, patch, place):
    daemon = start_daemon_with(patch, place["CKPTD_DIR"])
    try:

        def work(_rank):
            model, optimizer = build()
            session = ckptd.attach(model=model, optimizer=optimizer)
            session.restore()
            added = loop(session, model, optimizer, 1, 60)
            counts, inert = dict(session.counts), session.inert
            session.close(timeout_s=1.0)
            return [added, counts, inert]

        [[added, counts, inert]] = ranks(1, work, env=place)
    finally:
        daemon.kill()
        daemon.wait()
    report(kind, added, counts)
    assert max(added) < STEP_MAX_S
    if kind == "full":
        assert "slots of" in inert and "are free" in inert, "the refusal has the numbers"
        assert counts["skipped"] == 60
    else:
        assert counts["captured"] >= 3 and counts["skipped"] >= 30
