"""What only a GPU shows: pinned arenas, side-stream capture that overlaps, a fence that does not block the host, restore. Run: pytest -m gpu."""

from __future__ import annotations

import statistics
import time

import pytest
import torch
from torch import nn

import ckptd
from tests.train.harness import stop_daemon

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.fixture
def session_of(tmp_path):
    def make(model, optimizer, **more):
        return ckptd.attach(model=model, optimizer=optimizer, job="gpu", directory=str(tmp_path / "d"), required=True, **more)

    yield make
    stop_daemon(tmp_path / "d")


def build(width: int, layers: int):
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(width, width) for _ in range(layers)]).cuda()
    return model, torch.optim.AdamW(model.parameters(), fused=True)


def train(model, optimizer, step: int) -> None:
    torch.manual_seed(step)
    model(torch.rand(256, model[0].in_features, device="cuda")).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def test_captures_on_a_side_stream_are_whole_and_come_back(session_of):
    model, optimizer = build(1024, 8)
    session = session_of(model, optimizer)
    session.restore()
    assert session.status()["pinned"], "the arena is registered as pinned memory"
    for step in range(1, 11):
        train(model, optimizer, step)
        session.step(step)
        assert session.wait("committed", step, timeout_s=20)
    expected = [p.detach().clone() for p in model.parameters()] + [v.clone() for s in optimizer.state.values() for v in s.values()]
    train(model, optimizer, 11)
    session.close()
    session = session_of(model, optimizer)
    assert session.restore().step == 10
    found = [*model.parameters(), *[v for s in optimizer.state.values() for v in s.values()]]
    assert all(torch.equal(a, b.to(a.device)) for a, b in zip(expected, found, strict=True))
    session.close()


def test_the_host_does_not_wait_and_the_step_hardly_notices(session_of):
    model, optimizer = build(4096, 16)
    session = session_of(model, optimizer)
    session.restore()
    plain, ours, host = [], [], []
    number = 0
    for round_ in range(12):
        for times, snapshot in ((plain, False), (ours, True)):
            torch.cuda.synchronize()
            began = time.perf_counter()
            for _ in range(3):
                number += 1
                train(model, optimizer, number)
                if snapshot:
                    at = time.perf_counter()
                    session.step(number)
                    host.append(time.perf_counter() - at)
            torch.cuda.synchronize()
            if round_ > 1:
                times.append(time.perf_counter() - began)
    ratio = statistics.median(a / b for a, b in zip(ours, plain, strict=True))
    print(f"step time with a snapshot every step: {ratio:.3f}x; session.step on the host: median {statistics.median(host) * 1e3:.2f} ms")
    session.close()
    assert statistics.median(host) < 0.02
