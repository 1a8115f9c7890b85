"""A job under `ckptd run` that hangs, or has a rank that is slow for good, goes on by itself: seen, confirmed, acted upon, from memory. Nothing is played here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.train.cluster import Cluster
from tests.train.harness import ROOT
from tests.train.test_elastic import check

PATIENCE_S = 150.0


class Watched(Cluster):
    """One node, as a user starts it."""

    def __init__(self, tmp: Path, ranks: int, *, trouble: str, policy: str, **more) -> None:
        super().__init__(tmp, 1, ranks=ranks, env={"TROUBLE": trouble, **more.pop("env", {})}, options=["--on-fault", policy], **more)
        self.daemon: subprocess.Popen[bytes] | None = None

    def meeting(self, _node) -> list[str]:
        return []

    def start_daemon(self, *options: str) -> Watched:
        """One of its own, with options that `ckptd run` does not have."""
        directory = self.nodes[0].directory
        directory.mkdir(mode=0o700, exist_ok=True)
        with (self.tmp / "daemon.txt").open("ab") as log:
            command = [sys.executable, "-m", "ckptd.cli.main", "daemon", "--dir", str(directory), *options]
            self.daemon = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=log, stderr=log)
        self.await_(lambda: (directory / "daemon.sock").exists(), PATIENCE_S, "the daemon")
        return self

    def __exit__(self, *exc: object) -> None:
        super().__exit__(*exc)
        if self.daemon is not None:
            self.daemon.kill()
            self.daemon.wait()

    def verdicts(self) -> list[dict]:
        path = self.nodes[0].directory / "events.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [e["verdict"] for e in map(json.loads, lines) if e["event"] == "verdict"]

    def began(self) -> dict:
        return json.loads(Path(f"{self.out}.trouble").read_text().splitlines()[0])


@pytest.mark.timeout(300)
def test_a_job_that_hangs_goes_on_by_itself(tmp_path):
    """Rank 1 sleeps for ever before an operation that the others wait in."""
    with Watched(tmp_path, 3, trouble="hang:rank=1,step=20", policy="restart", steps=45, pace_s=0.05) as c:
        c.start()
        c.await_step(30, PATIENCE_S)
        assert c.wait() == [0], c.tails()
        restores = check(c)
        assert [r["world"] for r in restores] == [3, 3]
        assert restores[-1]["step"] == 19, restores
        hang = next(v for v in c.verdicts() if v["kind"] == "hang" and v["state"] == "confirmed")
        assert hang["ranks"] == [1], hang
        first = next(e for e in c.events("step") if e["attempt"] == 2)
        print(f"named {hang['detected_s'] - c.began()['t']:.2f} s after it began to hang, next step after {first['t'] - c.began()['t']:.2f} s")
        assert {v["kind"] for v in c.verdicts()} == {"hang"}, "workers that were ended on purpose are no crashes"


@pytest.mark.timeout(400)
def test_a_rank_that_is_slow_for_good_is_evicted_after_a_probe_agrees(tmp_path):
    """It runs for two fifths of the time: the rank's own part of a step grows, a probe in it and in its peers agrees, and the job goes on with two, from memory, resharded."""
    trouble = "slow:slot=2,step=60,work_ms=40"
    with Watched(tmp_path, 3, trouble=trouble, policy="evict", steps=1200, pace_s=0.06, env={"DIGEST": "0"}) as c:
        c.start_daemon("--evict-after-s", "8").start()
        c.await_step(60, PATIENCE_S)
        try:
            c.await_world(2, c.began()["t"], PATIENCE_S)
        except TimeoutError:
            print([(v["kind"], v["state"], v["ranks"], v["cause"], v["recommended"], v["probes"]) for v in c.verdicts()])
            raise
        acted = next(v for v in c.verdicts() if v["recommended"] == "evict" and v["state"] == "confirmed")
        assert acted["ranks"] == [2], acted
        assert acted["grade"] == "evict" and acted["probes"], acted
        restores = check(c)
        assert [r["world"] for r in restores][:2] == [3, 2]
        after = next(e for e in c.events("step") if e["world"] == 2)
        before = max(e["step"] for e in c.events("step") if e["world"] == 3)
        print(f"{acted['kind']} ({acted['cause']}): evicted {acted['detected_s'] - c.began()['t']:.1f} s, {acted['step'] - c.began()['step']} steps after it became slow; "
              f"next step {after['t'] - c.began()['t']:.1f} s after")
        assert before - restores[1]["step"] <= 1
        c.await_step(after["step"] + 10)
        time.sleep(0.1)
        check(c)
