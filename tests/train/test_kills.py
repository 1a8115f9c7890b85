"""A killed run ends bit-equal to the uninterrupted one: weights, moments, RNG draws, data order; at most one step is lost per kill."""

from __future__ import annotations

import os
import random
import shutil
import time

import pytest

from tests.train.harness import Job, stop_daemon

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

STEPS = 44
SEEDS = {"fsdp": 11, "ddp": 12, "tp_fsdp": 13, "pp_fsdp": 14}
RANDOM_KILLS = int(os.environ.get("KILLS", "3"))
FAULTS = {
    "fsdp": ["capture:rank=2,step=40,at=3", "seal:rank=1,step=43"],
    "ddp": ["capture:rank=0,step=40,at=1", "persist:rank=3,step=42"],
    "tp_fsdp": ["seal:rank=3,step=40", "capture:rank=1,step=43,at=20"],
    "pp_fsdp": ["capture:rank=3,step=40,at=7", "persist:rank=0,step=42"],
}


@pytest.mark.parametrize("parallel", SEEDS)
def test_a_killed_run_ends_bit_equal(parallel, tmp_path):
    baseline = Job(tmp_path, parallel, steps=STEPS, name="base", run=["--standby", "0"], script=["--without-ckptd"]).start()
    assert baseline.wait() == 0, baseline.tail()
    rng = random.Random(SEEDS[parallel])
    # Two exact faults and random kills; the script arms the second fault only after the first has fired (see faults.py's flags).
    faults = [a for f in FAULTS[parallel] for a in ("--fault", f)]
    job = Job(
        tmp_path, parallel, steps=STEPS, name="killed", script=["--pause-s", "0.03", *faults],
        run=["--store", str(tmp_path / "store"), "--persist-every", "7"],
    ).start()
    kills, losses = [], []
    try:
        reached = 0
        for number in range(RANDOM_KILLS):
            reached = job.await_step(reached + 2)
            if reached < 0 or reached > 36:
                break
            time.sleep(rng.uniform(0.0, 0.25))
            victims = range(4) if rng.random() < 0.25 else [rng.randrange(4)]
            before = len(job.marks("workers started"))
            finished = {m["pid"]: m["step"] for m in job.marks("step") if m["pid"] in set(job.pids().values())}
            job.kill(*victims)
            kills.append((number, [*victims], min(finished.values())))
            until = time.monotonic() + 60
            while len(job.marks("workers started")) == before and job.running() and time.monotonic() < until:
                time.sleep(0.02)
        assert job.wait() == 0, job.tail()
        generations = [m["t"] for m in job.marks("workers started")]
        for generation in range(1, len(generations)):
            restored = [m for m in job.marks("restored") if generations[generation] <= m["t"] < ([*generations, 1e18])[generation + 1]]
            if not restored:
                continue  # killed again before it got there
            done: dict[int, int] = {}
            for m in job.marks("step"):
                if m["t"] < generations[generation]:
                    done[m["rank"]] = max(done.get(m["rank"], 0), m["step"])
            assert len({m["step"] for m in restored}) == 1, "all ranks go on from one step"
            losses.append(min(done.values(), default=0) - restored[0]["step"])
    finally:
        if job.running():
            job.end()
        stop_daemon(tmp_path / "d")
    sources = {m["source"] for m in job.marks("restored")}
    print(f"{parallel}: seed {SEEDS[parallel]}, random kills {kills}, faults {FAULTS[parallel]}, steps lost {losses}, sources {sorted(sources)}")
    assert len(generations) - 1 >= len(kills) + 2, "every kill and every fault made a restart"
    assert max(losses) <= 1, losses
    for r, (ours, theirs) in enumerate(zip(job.finals(), baseline.finals(), strict=True)):
        assert ours["state"] == theirs["state"], f"rank {r}: {[k for k in ours['state'] if ours['state'][k] != theirs['state'].get(k)]}"
        for what in ("rng", "position", "lr", "notes"):
            assert ours[what] == theirs[what], (r, what)
        lines, expected = job.lines(r), baseline.lines(r)  # a rank that was killed between snapshot and log lacks a line
        assert lines == {s: line for s, line in expected.items() if s in lines} and len(lines) >= STEPS - len(generations)
    shutil.rmtree(tmp_path, ignore_errors=True)
