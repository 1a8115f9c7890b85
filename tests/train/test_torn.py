"""No state of mixed steps is ever returned: the copier is killed at every tensor boundary, and guards catch writers beside the optimizer."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path

import pytest
import torch
from torch import nn

import ckptd
from ckptd import capture
from tests.forks import ranks
from tests.train.harness import stop_daemon

pytestmark = pytest.mark.timeout(300)


@pytest.fixture
def place(tmp_path):
    yield {"CKPTD_DIR": str(tmp_path / "d"), "CKPTD_JOB": "torn"}
    stop_daemon(tmp_path / "d")


def build():
    model = nn.Sequential(*[nn.Linear(11, 11) for _ in range(5)])
    return model, torch.optim.AdamW(model.parameters())


def tensors(model, optimizer):
    return [*model.parameters(), *[v for s in optimizer.state.values() for v in s.values()]]


def write(model, optimizer, step: int) -> None:
    """The state of a step: every element of every tensor is the step's number."""
    for p in model.parameters():
        if p not in optimizer.state:
            optimizer.state[p].update(exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p), step=torch.tensor(0.0))
    with torch.no_grad():
        for t in tensors(model, optimizer):
            t.fill_(step)


def test_a_copier_killed_at_any_tensor_leaves_the_step_before(place):
    def life(boundary: int):
        def work(_rank):
            model, optimizer = build()
            session = ckptd.attach(model=model, optimizer=optimizer, required=True)
            start = session.restore().step
            if start:
                values = {float(t.min()) for t in tensors(model, optimizer)} | {float(t.max()) for t in tensors(model, optimizer)}
                assert values == {float(start)}, f"mixed steps {values} in what should be step {start}"
            else:
                write(model, optimizer, 0)
            write(model, optimizer, start + 1)
            session.step(start + 1)
            session._fence()
            Path(os.environ["CKPTD_DIR"], "..", "reached").write_text(str(start + 1))
            session._binding.batch_bytes = 0
            session._binding.forget()
            count, real = [0], capture.copy_batch

            def copy(places, sources):
                if threading.current_thread().name == "ckptd-copier":
                    if count[0] == boundary:
                        os.kill(os.getpid(), signal.SIGKILL)
                    count[0] += 1
                real(places, sources)

            capture.copy_batch = copy
            write(model, optimizer, start + 2)
            session.step(start + 2)
            session._fence()
            session.close()
            return count[0]

        return work

    boundary, kills, reached = 0, 0, 0
    while True:
        [done] = ranks(1, life(boundary), env=place, may_die=True)
        now = int(Path(place["CKPTD_DIR"], "..", "reached").read_text())
        assert now == reached + 1, f"after the kill at tensor {boundary - 1}: step {now - 1} came back, not {reached}"
        if done is not None:
            break
        reached = now
        boundary, kills = boundary + 1, kills + 1
    assert kills == done == 40
    print(f"{kills} kills, one at every tensor boundary: each came back at the step before, whole")


def test_a_writer_beside_the_optimizer_tears_one_snapshot_and_is_named(place, caplog):
    def work(_rank):
        model = nn.Sequential(*[nn.Linear(400, 400) for _ in range(8)])
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        session = ckptd.attach(model=model, optimizer=optimizer, required=True)
        session.restore()
        gate, real = threading.Event(), capture.copy_batch

        def slow(places, sources):
            if threading.current_thread().name == "ckptd-copier":
                gate.wait(5)
            real(places, sources)

        capture.copy_batch = slow
        session._binding.batch_bytes = 0
        for step in (1, 2, 3):
            gate.clear()
            session.step(step)
            expected = model[3].weight.detach().clone()
            with torch.no_grad():
                model[3].weight.add_(1.0)  # an EMA, a weight clip: not the optimizer
            gate.set()
            session._fence()
        torn = [*session._torn]
        assert session.wait("committed", 3, timeout_s=10)
        counts = dict(session.counts)
        session.close()
        session = ckptd.attach(model=model, optimizer=optimizer, required=True)
        step = session.restore().step
        equal = bool(torch.equal(model[3].weight, expected))
        session.close()
        return [torn, counts, step, equal]

    [[torn, counts, step, equal]] = ranks(1, work, env=place)
    assert torn == ["model.3.weight"] and counts["torn"] == 1 and counts["captured"] == 2
    assert (step, equal) == (3, True), "eager from then on: the value at session.step(3), before the later write"


def test_paranoid_mode_sees_writes_that_move_no_counter(place):
    def work(_rank):
        model = nn.Linear(300, 300)
        session = ckptd.attach(model=model, paranoid=True, required=True)
        session.restore()
        gate, real = threading.Event(), capture.copy_batch

        def slow(places, sources):
            if threading.current_thread().name == "ckptd-copier":
                gate.wait(5)
            real(places, sources)

        capture.copy_batch = slow
        session.step(1)
        model.weight.data[0, 0] += 1.0
        gate.set()
        session._fence()
        torn = [*session._torn]
        session.close()
        return torn

    assert ranks(1, work, env=place) == [["model.weight"]]
