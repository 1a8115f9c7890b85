"""Nodes that are lost, hang, are cut off, come late and come back, under real jobs: gloo, FSDP2, `ckptd run` per node, restored from memory.

Every digest that the job writes (weights, moments, data position, at each step) must be that of a run on one rank that nothing happened to:
`elastic_job.py` says why that holds on any number of ranks. Schedules are seeded: ELASTIC_SEED=n replays one list.
"""

from __future__ import annotations

import os
import random
import time
from functools import cache

import pytest

from tests.train.cluster import Cluster, Namespaces
from tests.train.elastic_job import reference

pytestmark = pytest.mark.timeout(400)

NO_NAMESPACES = Namespaces.missing()
STEPS = 3000
"""More than any of these jobs makes: they are ended when the schedule is over."""


@cache
def truth(steps: int) -> dict[int, str]:
    return reference(steps)


def check(cluster: Cluster) -> list[dict]:
    """All that was written is right: every step, and every restore, from memory."""
    said = [e for e in cluster.events() if e.get("digest")]
    right = truth(-(-max((e["step"] for e in said), default=0) // 500) * 500)
    wrong = [e for e in said if e["digest"] != right[e["step"]]]
    assert not wrong, f"{len(wrong)} of {len(said)}: {wrong[:3]}"
    restores = cluster.events("restored")
    assert all(r["source"] == "memory" for r in restores if r["step"]), restores
    assert all(r["step"] for r in restores[1:] if r["attempt"] > 1), f"none began anew: {restores}"
    return restores


def lost_steps(cluster: Cluster, restored: dict) -> int:
    """How many steps were made before it, of which it knows nothing."""
    return max(e["step"] for e in cluster.events("step") if e["attempt"] < restored["attempt"]) - restored["step"]


def breakdown(c: Cluster, restored: dict, first: dict, killed_t: float) -> tuple[float, str]:
    """Seconds from a fault to the next step without what a worker's own start-up costs, and where all of them went."""
    t, started_t = restored["times"], c.started(killed_t)
    parts = {"seen, agreed, started": started_t - killed_t, "imports": t["start"] - started_t, "group": t["group"] - t["start"], "build": t["built"] - t["group"]}
    parts |= {"attach": t["attached"] - t["built"], "restore": t["restored"] - t["attached"], "step": first["t"] - t["restored"]}
    ours = first["t"] - killed_t - (t["built"] - started_t)
    return ours, f"{first['t'] - killed_t:.2f} s, {ours:.2f} without the workers' own start-up: " + ", ".join(f"{k} {v:.2f}" for k, v in parts.items())


def lose_the_store_host(tmp_path) -> float:
    with Cluster(tmp_path, 3, steps=60) as c:
        c.start()
        c.await_step(6)
        t = c.nodes[0].kill()
        first = c.await_world(2, t)
        assert c.wait() == [-9, 0, 0], c.tails()
        restores = check(c)
        assert [r["world"] for r in restores] == [3, 2] and c.step() == 60
        ours, parts = breakdown(c, restores[-1], first, t)
        print("next step after", parts, "; steps lost:", lost_steps(c, restores[-1]))
        return ours


def test_the_store_host_is_lost_and_the_job_ends_as_if_nothing_had_happened(tmp_path):
    """Plain torchrun never recovers from this. All four steps: lost, gone on over fewer, finished, agents leave with 0. Within 3 s of what workers' own start-up takes:
    in one of three tries, for other people's work on this machine is in the time too."""
    took = [lose_the_store_host(tmp_path / "0")]
    while min(took) >= 3.0 and len(took) < 3:
        took.append(lose_the_store_host(tmp_path / str(len(took))))
    assert min(took) < 3.0, took


def test_plain_torchrun_with_our_rendezvous_beside_daemons_that_run_already(tmp_path):
    """`torchrun --rdzv-backend ckptd`: found by its entry point."""
    import importlib.metadata
    import subprocess
    import sys

    found = [e for e in importlib.metadata.entry_points(group="torchrun.handlers") if e.name == "ckptd"]
    assert found, "the package is not installed with its entry points: pip install -e . again"
    from ckptd import spawn
    from tests.train.harness import ROOT, SCRIPT, stop_daemon

    out = tmp_path / "out"
    daemons = [spawn.start_daemon(str(tmp_path / f"d{i}"), linger_s=60.0, options=["--peer-host", f"127.0.0.{i + 1}"]) for i in range(2)]
    try:
        from ckptd.channel import socket_path

        for i in range(2):
            spawn.await_socket(socket_path(str(tmp_path / f"d{i}")), 20.0)
        port = (tmp_path / "d0" / "peer.port").read_text()
        agents = [
            subprocess.Popen(
                [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "ckptd",
                 "--rdzv-endpoint", f"127.0.0.1:{port}", "--rdzv-id", "plain", "--local-addr", f"127.0.0.{i + 1}",
                 str(SCRIPT), "--parallel", "fsdp", "--steps", "3", "--out", str(out)],
                env={**os.environ, "CKPTD_DIR": str(tmp_path / f"d{i}"), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT),
                     "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"},
            )
            for i in range(2)
        ]  # fmt: skip
        assert [a.wait(90) for a in agents] == [0, 0]
        assert sorted(p.name for p in out.glob("final*.json")) == ["final0.json", "final1.json"]
    finally:
        for i in range(2):
            stop_daemon(tmp_path / f"d{i}")
        for d in daemons:
            d.wait()


@pytest.mark.skipif(bool(NO_NAMESPACES), reason=NO_NAMESPACES)
def test_a_minority_does_not_go_on_and_comes_back(tmp_path):
    """Two of five are cut off together: they hear each other, and wait. The three go on."""
    with Namespaces(tmp_path, 5, nnodes="1:5", steps=STEPS, parity=2) as c:
        c.start()
        c.await_step(5)
        second = c.tag + "b"  # a switch of their own
        c._ip("link", "add", second, "type", "bridge")
        c._ip("link", "set", second, "up")
        try:
            t = time.time()
            for n in (0, 1):  # the store host is one of them
                c._ip("link", "set", f"{c.tag}v{n}", "master", second)
            c.await_world(3, t)
            c.await_step(c.step() + 20)
            worlds = {e["world"] for e in c.events("step") if e["t"] > t + 6}
            assert worlds == {3}, f"steps were made by {worlds} ranks"
            t = time.time()
            for n in (0, 1):
                c._ip("link", "set", f"{c.tag}v{n}", "master", c.tag)
            c.await_world(5, t)
        finally:
            c._ip("link", "del", second, check=False)
        restores = check(c)
        assert [r["world"] for r in restores][-1] == 5


def lose(c: Namespaces, rng: random.Random, up: list[int], parity: int) -> tuple[dict[int, str], str]:
    """One schedule: lose up to `parity` of the nodes that are up, somehow, at some moment; go on over the others. Returns how, and what it took."""
    victims = rng.sample(up, rng.randint(1, min(parity, (len(up) - 1) // 2)))  # a majority is left, wherever the first one is
    if 0 in up and 0 not in victims and rng.random() < 0.3:
        victims[0] = 0  # where everybody began to meet
    how = {v: rng.choice(["kill", "kill", "stop", "link"]) for v in victims}
    c.await_step(c.step() + rng.randint(1, 3))
    time.sleep(rng.random() * 0.3)  # anywhere in a step, while it is committed or protected
    t = time.time()
    for v, kind in how.items():
        t = {"kill": c.nodes[v].kill, "stop": c.nodes[v].stop, "link": lambda v=v: c.link(v, up=False)}[kind]()
    left = [n for n in up if n not in victims]
    first = c.await_world(len(left), t)
    restored = c.events("restored")[-1]
    assert restored["source"] == "memory", restored
    c.await_(lambda: c.events("step")[-1].get("protected", 0) >= first["step"], 30.0, "redundancy anew")
    up[:] = left
    return how, f"{how}: {breakdown(c, restored, first, t)[1]}; {lost_steps(c, restored)} steps lost"


def have_back(c: Namespaces, lost: dict[int, str]) -> None:
    t = time.time()
    for v, kind in lost.items():
        {"kill": c.nodes[v].start, "stop": c.nodes[v].go_on, "link": lambda v=v: c.link(v, up=True)}[kind]()
    c.await_world(len(c.nodes), t, 90.0)


@pytest.mark.skipif(bool(NO_NAMESPACES), reason=NO_NAMESPACES)
@pytest.mark.parametrize(("parity", "rounds", "losses"), [(1, 3, 4), (2, 3, 3)])
def test_seeded_schedules_of_node_loss_over_six_nodes(tmp_path, parity, rounds, losses):
    """Twenty-one of them, in two jobs: some losses one after the other, with redundancy made anew between them; then all come back, and again."""
    seed = int(os.environ.get("ELASTIC_SEED", parity))
    rng, number = random.Random(seed), 0
    with Namespaces(tmp_path, 6, nnodes="1:6", steps=STEPS, pace_s=0.2, parity=parity, group_size=6) as c:
        c.start()
        c.await_world(6, 0.0, 90.0)
        for _ in range(int(os.environ.get("ELASTIC_ROUNDS", rounds))):
            up, gone = [*range(6)], {}
            for _ in range(losses):
                how, what = lose(c, rng, up, parity)
                gone |= how
                number += 1
                print(f"seed {seed}, schedule {number}: {what}", flush=True)
            have_back(c, gone)
        restores = check(c)
        assert len(restores) >= 1 + number


def test_torchs_own_rendezvous_is_accepted(tmp_path):
    """An external or hosted store, as torchrun has it: with its limits, but with snapshots."""
    with Cluster(tmp_path, 2, nnodes="2", steps=10, options=["--rdzv-backend", "c10d"]) as c:
        c.start()
        assert c.wait() == [0, 0], c.tails()
        check(c)
        assert c.step() == 10 and {e["world"] for e in c.events("step")} == {2}
