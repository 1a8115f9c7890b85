"""Defects that reviews found, each as a test that failed on the code before its fix."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import ckptd
from ckptd import capture, errors
from ckptd.core.ladder import Durable, rungs
from ckptd.state import predict
from tests.forks import ranks
from tests.train.harness import ROOT, stop_daemon

pytestmark = pytest.mark.timeout(120)


@pytest.fixture
def place(tmp_path):
    yield {"CKPTD_DIR": str(tmp_path / "d"), "CKPTD_JOB": "review"}
    stop_daemon(tmp_path / "d")


def build():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 4))
    return model, torch.optim.AdamW(model.parameters())


def train(session, model, optimizer, *steps):
    for step in steps:
        model(torch.ones(2, 64)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        session.step(step)
        assert session.wait("committed", int(step), timeout_s=20), session.status()


def test_steps_that_failed_once_are_the_last_resort_and_not_gone():
    tiers = [Durable(1, 5, 1, "a"), Durable(1, 4, 1, "b")]
    assert [r.step for r in rungs({}, tiers, {(1, 5, "a")})] == [4, 5]
    assert [r.step for r in rungs({}, tiers[:1], {(1, 5, "a")})] == [5], "or the next restart would silently begin from scratch"


def test_a_script_that_ends_without_close_ends_well(place, tmp_path):
    script = tmp_path / "train.py"
    script.write_text(
        "import sys, torch, ckptd\n"
        "model = torch.nn.Sequential(*[torch.nn.Linear(1000, 1000) for _ in range(20)])\n"
        "session = ckptd.attach(model=model)\n"
        "session.restore()\n"
        "session.step(1)\n"
    )
    for _ in range(3):
        done = subprocess.run([sys.executable, str(script)], env={**os.environ, **place, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr[-2000:]


def test_a_copy_that_fails_costs_its_snapshot_and_never_the_loop(place):
    def work(_rank):
        model, optimizer = build()
        session = ckptd.attach(model=model, optimizer=optimizer, required=True)
        session.restore()
        real, fail = capture.copy_batch, [True]

        def copy(places, sources):
            if fail[0] and threading.current_thread().name == "ckptd-copier":
                fail[0] = False
                raise RuntimeError("a planted failure")
            real(places, sources)

        capture.copy_batch = copy
        session.step(1)
        began = time.perf_counter()
        session._fence()
        train(session, model, optimizer, 2, 3)
        took = time.perf_counter() - began
        counts = dict(session.counts)
        session.close()
        return [took, counts]

    [[took, counts]] = ranks(1, work, env=place)
    assert counts["torn"] == 1 and counts["captured"] == 2 and took < 20


class Wrapper(torch.optim.Optimizer):
    """As accelerate's: state and groups are those of the optimizer inside."""

    def __init__(self, inner):
        self.optimizer = inner

    state = property(lambda self: self.optimizer.state, lambda self, v: setattr(self.optimizer, "state", v))
    param_groups = property(lambda self: self.optimizer.param_groups, lambda self, v: setattr(self.optimizer, "param_groups", v))

    def step(self, closure=None):
        return self.optimizer.step(closure)


def test_asking_a_wrapped_optimizer_leaves_the_real_one_alone():
    _, optimizer = build()
    before = [[id(p) for p in g["params"]] for g in optimizer.param_groups]
    assert predict(Wrapper(optimizer)) is None
    assert [[id(p) for p in g["params"]] for g in optimizer.param_groups] == before and not optimizer.state
    found = predict(optimizer)
    assert found is not None and len(found) == 4 and not optimizer.state


def test_moments_of_local_parameters_are_each_ranks_own(place):
    def work(rank):
        torch.manual_seed(rank)
        model = nn.Linear(300, 300)
        optimizer = torch.optim.AdamW(model.parameters())
        session = ckptd.attach(model=model, optimizer=optimizer, local=["*"], required=True)
        start = session.restore().step
        if start == 0:
            model(torch.ones(2, 300) * (rank + 1)).square().mean().backward()
            optimizer.step()
            session.step(1)
            assert session.wait("committed", 1, timeout_s=20)
        sums = [float(t.double().sum()) for t in [*model.parameters(), *(v for p in model.parameters() for v in optimizer.state[p].values())]]
        session.close()
        return sums

    first, again = ranks(2, work, env=place), ranks(2, work, env=place)
    assert first == again and first[0] != first[1]


def test_optimizer_state_that_appears_late_is_refused_by_name_not_left_out(place):
    def work(_rank):
        model, _ = build()
        model[0].weight.requires_grad_(False)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        session = ckptd.attach(model=model, optimizer=optimizer, required=True)
        session.restore()
        train(session, model, optimizer, 1)
        model[0].weight.requires_grad_(True)  # thawed
        model(torch.ones(2, 64)).square().mean().backward()
        optimizer.step()
        session.step(2)
        counts, said = dict(session.counts), [*session._said]
        session.close()
        return [counts, said]

    [[counts, said]] = ranks(1, work, env=place)
    assert counts["skipped: Unstorable"] == 1
    assert any("optim.state.0.weight.momentum_buffer appeared after attach" in s for s in said)


def test_a_step_that_goes_back_is_counted_and_a_late_restore_refused(place):
    def work(_rank):
        model, optimizer = build()
        session = ckptd.attach(model=model, optimizer=optimizer, required=True)
        session.restore()
        train(session, model, optimizer, np.int64(5))  # a numpy step is a step
        session.step(3)
        counts = dict(session.counts)
        try:
            session.restore()
            refused = ""
        except errors.BadArgument as e:
            refused = str(e)
        session.close()
        return [counts, refused]

    [[counts, refused]] = ranks(1, work, env=place)
    assert counts["skipped: step went back"] == 1 and "attach again" in refused


def test_arrays_that_differ_between_ranks_are_not_one_ranks_on_a_changed_mesh(place):
    class Own:
        def __init__(self, rank):
            self.order = torch.arange(5) + 100 * rank

        def state_dict(self):
            return {"order": self.order}

        def load_state_dict(self, state):
            self.order = state["order"]

    def save(rank):
        session = ckptd.attach(model=nn.Linear(2, 2, bias=False), local=["*"], extras={"own": Own(rank)}, required=True)
        session.restore()
        session.step(1)
        assert session.wait("committed", 1, timeout_s=20)
        session.close()

    def load(rank):
        session = ckptd.attach(model=nn.Linear(2, 2, bias=False), local=["*"], extras={"own": Own(7)}, required=True)
        try:
            session.restore()
        except errors.StateMismatch as e:
            return str(e)
        finally:
            session.close()
        return ""

    ranks(2, save, env=place)
    assert "extras.own: its state differs" in ranks(1, load, env=place)[0]


def test_two_arrays_whose_paths_read_alike_stay_two(place):
    def work(_rank):
        extras = {"x": {"a.b": np.arange(3), "a": {"b": np.arange(3) + 10}}}
        for _ in range(2):
            session = ckptd.attach(model=nn.Linear(2, 2), extras=extras, required=True)
            if session.restore().step == 0:
                session.step(1)
                assert session.wait("committed", 1, timeout_s=20)
            session.close()
        return [extras["x"]["a.b"].tolist(), extras["x"]["a"]["b"].tolist()]

    assert ranks(1, work, env=place) == [[[0, 1, 2], [10, 11, 12]]]


def test_a_second_run_of_a_living_job_is_refused_by_pid(place):
    def work(_rank):
        model, optimizer = build()
        session = ckptd.attach(model=model, optimizer=optimizer, required=True)
        session.restore()
        train(session, model, optimizer, 1)
        other = subprocess.Popen(
            [sys.executable, "-c", "import torch, ckptd; ckptd.attach(model=torch.nn.Linear(2, 2), required=True)"],
            env={**os.environ, "PYTHONPATH": str(ROOT)}, stderr=subprocess.PIPE, text=True,
        )
        step, until = 1, time.monotonic() + 60
        while other.poll() is None and time.monotonic() < until:  # a job that takes no snapshot for seconds may be a zombie's
            step += 1
            train(session, model, optimizer, step)
            time.sleep(0.2)
        other.kill()
        said = other.communicate()[1]
        session.close()
        return [other.returncode, said, os.getpid()]

    [[code, said, pid]] = ranks(1, work, env=place)
    assert code != 0 and f"alive already, as process {pid}" in said


def test_the_last_steps_persist_is_written_though_the_job_has_ended(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(
        "import torch, ckptd\n"
        "model = torch.nn.Sequential(*[torch.nn.Linear(1500, 1500) for _ in range(12)])\n"
        "session = ckptd.attach(model=model)\n"
        "start = session.restore().step\n"
        "session.step(start + 1)\n"
        "session.persist(start + 1)\n"
        "session.close(timeout_s=0.05)\n"
    )
    env = {**os.environ, "CKPTD_DIR": str(tmp_path / "d"), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "ckptd.cli.main", "run", "--standby", "0", "--store", str(tmp_path / "store"), "--job", "last", str(script)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=90, check=False)
    stop_daemon(tmp_path / "d")
    assert done.returncode == 0, done.stderr[-2000:]
    assert (Path(tmp_path) / "store" / "last" / "step-00000001" / "manifest.json").exists()
