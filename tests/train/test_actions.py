"""What a launcher does of a verdict, on real jobs: a stopped rank and restart, a bad rank and evict, on one node and on several; and what it refuses.

`elastic_job.py` says why every digest (weights, moments, data position) must be that of an undisturbed run, whatever the number of ranks. Acts come as from a daemon: by
the keeper's ears in a real launcher (`acting_run.py`), and over a real socket in `test_an_act_comes_over_the_line_and_is_answered`.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from ckptd import acts, launch
from ckptd.core import wire
from tests.train.cluster import Cluster
from tests.train.harness import ROOT, stop_daemon
from tests.train.test_elastic import check, truth

PATIENCE_S = 150.0
"""Of a few processes that import torch at once, where others do too."""
RUN = ROOT / "tests" / "train" / "acting_run.py"


def act(verdict: int = 1, attempt: int = 1, action: str = "restart", ranks=(), why: str = "rank 1 hangs") -> wire.Act:
    return wire.Act(verdict=verdict, attempt=attempt, action=action, ranks=[*ranks], why=why)


# --- the judgement ----------------------------------------------------------------------------------------------------------


def view(**more) -> acts.View:
    return acts.View(**({"policy": "evict", "floor": 0, "slots": (0, 1, 2, 3), "counts": (4,), "spared": 1} | more))


@pytest.mark.parametrize(
    ("asked", "situation", "kind", "done", "slots"),
    [
        (act(), {}, "restart", True, (0, 1, 2, 3)),
        (act(attempt=3), {"floor": 3}, "nothing", False, (0, 1, 2, 3)),
        (act(attempt=0), {"floor": 0}, "restart", True, (0, 1, 2, 3)),
        (act(attempt=0), {"floor": 2}, "nothing", False, (0, 1, 2, 3)),
        (act(), {"policy": "snapshot"}, "nothing", False, (0, 1, 2, 3)),
        (act(action="snapshot"), {}, "nothing", False, (0, 1, 2, 3)),
        (act(action="evict", ranks=[2]), {"policy": "restart"}, "nothing", False, (0, 1, 2, 3)),
        (act(action="evict", ranks=[2]), {}, "shrink", True, (0, 1, 3)),
        (act(action="evict", ranks=[2]), {"slots": (0, 1, 3), "counts": (3,)}, "shrink", True, (0, 1)),
        (act(action="evict", ranks=[0, 1, 2, 3]), {}, "restart", False, (0, 1, 2, 3)),
        (act(action="evict", ranks=[4]), {}, "restart", False, (0, 1, 2, 3)),
        (act(action="evict"), {}, "restart", False, (0, 1, 2, 3)),
        # three nodes of two ranks; this is the second of them
        (act(action="evict", ranks=[3]), {"counts": (2, 2, 2), "mine": 1, "slots": (0, 1)}, "shrink", True, (0,)),
        (act(action="evict", ranks=[2, 3]), {"counts": (2, 2, 2), "mine": 1, "slots": (0, 1)}, "leave", True, ()),
        (act(action="evict", ranks=[4, 5]), {"counts": (2, 2, 2), "mine": 1, "slots": (0, 1)}, "follow", True, (0, 1)),
        (act(action="evict", ranks=[2, 3, 4]), {"counts": (2, 2, 2), "mine": 2, "slots": (0, 1)}, "shrink", True, (1,)),
        (act(action="evict", ranks=[4, 5]), {"counts": (2, 2, 2), "mine": 1, "slots": (0, 1), "nodes_min": 3}, "restart", False, (0, 1)),
        (act(action="evict", ranks=[4, 5]), {"counts": (2, 2, 2), "mine": 1, "slots": (0, 1), "may_leave": False}, "restart", False, (0, 1)),
        (act(action="evict", ranks=[4, 5]), {"counts": (2, 2, 2), "mine": 1, "slots": (0, 1), "spared": 0}, "restart", False, (0, 1)),
        (act(action="evict", ranks=[2, 3, 4, 5]), {"counts": (2, 2, 2), "mine": 0, "slots": (0, 1)}, "restart", False, (0, 1)),
        (act(action="evict", ranks=[5]), {"counts": (2, 2, 2), "mine": 2, "slots": (0, 1), "spared": 0}, "shrink", True, (0,)),
    ],
)
def test_what_follows_from_an_act(asked, situation, kind, done, slots):
    found = acts.decide(asked, view(**situation))
    assert (found.kind, found.done, found.slots) == (kind, done, slots), found
    assert found.what


def test_all_nodes_judge_alike():
    """Those that an eviction touches shrink or leave; the others follow; or all of them restart."""
    counts = (2, 1, 3)
    for gone in range(1 << 6):
        ranks = [r for r in range(6) if gone >> r & 1]
        firsts = (0, 2, 3)
        kinds = [acts.decide(act(action="evict", ranks=ranks), view(counts=counts, mine=i, slots=tuple(range(n)))).kind for i, n in enumerate(counts)]
        if "restart" in kinds:
            assert {*kinds} == {"restart"}
            continue
        for i, kind in enumerate(kinds):
            mine = {*range(firsts[i], firsts[i] + counts[i])}
            assert kind == ("follow" if not mine & {*ranks} else "leave" if mine <= {*ranks} else "shrink")


@pytest.mark.parametrize(
    ("env", "count", "evicted", "devices"),
    [
        (None, 4, [], None),
        (None, 4, [2], "0,1,3"),
        (None, 0, [2], None),
        (None, 2, [2], None),
        ("7,5,3,1", 0, [0, 2], "5,1"),
        ("GPU-aa, GPU-bb, GPU-cc, GPU-dd", 0, [1], "GPU-aa,GPU-cc,GPU-dd"),
        ("", 4, [1], None),
    ],
)
def test_the_device_of_an_evicted_slot_is_left_out(env, count, evicted, devices):
    assert acts.visible_devices(env, count, 4, evicted) == devices


# --- the line ---------------------------------------------------------------------------------------------------------------


def test_an_act_comes_over_the_line_and_is_answered(tmp_path):
    """A socket that a test serves as a daemon would: what the keeper hears there waits for the agent, and what the agent answers comes back."""
    import socket

    from ckptd.channel import Pipe

    (tmp_path / "d").mkdir(mode=0o700)
    heard: list = []
    asked = act(verdict=7, attempt=2, action="evict", ranks=[1], why="who waits for whom " * 50)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(tmp_path / "d" / "daemon.sock"))
        listener.listen(8)

        def serve(sock: socket.socket) -> None:
            pipe = Pipe(sock, "daemon")
            sock.setblocking(True)
            try:
                while True:
                    for m in pipe.read():
                        heard.append(m)
                        if isinstance(m, wire.Hello) and m.role == "keeper":
                            pipe.put(asked)
                        if isinstance(m, wire.Status):
                            status = {"jobs": {"job": {"attempt": 2, "committed": [2, 9], "protected": [2, 8], "persisted": None, "group": {"parity": 1}}}}
                            pipe.put(wire.Report(id=m.id, status=status))
                    pipe.flush()
            except (EOFError, OSError):
                pipe.close()

        def accept() -> None:
            while True:
                try:
                    sock, _ = listener.accept()
                except OSError:
                    return
                threading.Thread(target=serve, args=(sock,), daemon=True).start()

        threading.Thread(target=accept, daemon=True).start()
        keeper = launch.Keeper("job", str(tmp_path / "d"), 1.0)
        keeper.start()
        try:
            until = time.monotonic() + 20
            while not keeper.acts and time.monotonic() < until:
                time.sleep(0.01)
            ordered = keeper.acts.popleft()
            assert ordered.act == asked
            keeper.look()
            assert (keeper.attempt, keeper.committed, keeper.spared) == (2, [2, 9], 1)
            keeper.answer(wire.Acted(verdict=7, done=True, what="slot 1 is left out" + "." * 999))
            while not any(isinstance(m, wire.Acted) for m in heard) and time.monotonic() < until:
                time.sleep(0.01)
            assert [m for m in heard if isinstance(m, wire.Acted)] == [wire.Acted(verdict=7, done=True, what="slot 1 is left out".ljust(255, "."))]
        finally:
            keeper.stop(forget=False)
            listener.shutdown(socket.SHUT_RDWR)


# --- jobs -------------------------------------------------------------------------------------------------------------------


class Acting(Cluster):
    """Nodes whose launchers hear Acts from a file."""

    def __init__(self, tmp: Path, nodes: int, **more) -> None:
        self.acts, self.acted = tmp / "acts.jsonl", tmp / "acted.jsonl"
        more["options"] = ["--on-fault", "evict", *more.get("options", ())]
        super().__init__(tmp, nodes, env={"ACTS": str(self.acts), "ACTED": str(self.acted), **more.pop("env", {})}, **more)

    def inside(self, _number: int) -> list[str]:
        return [sys.executable, str(RUN)]

    def act(self, **how) -> float:
        with self.acts.open("a") as f:
            f.write(json.dumps({"verdict": 1, "attempt": 1, "action": "restart", "ranks": [], "why": "a test", **how}) + "\n")
        return time.time()

    def answers(self, verdict: int, count: int, timeout_s: float = 40.0) -> list[dict]:
        def found() -> list[dict]:
            lines = self.acted.read_text().splitlines() if self.acted.exists() else []
            return [a for a in map(json.loads, lines) if a["verdict"] == verdict]

        self.await_(lambda: len(found()) >= count, timeout_s, f"{count} answers to verdict {verdict}")
        return found()

    def marks(self, number: int, what: str) -> list[dict]:
        path = self.tmp / f"trace{number}.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [m for m in map(json.loads, lines) if m["what"] == what]

    def pids_of(self, number: int) -> dict[int, int]:
        return {int(k): v for k, v in self.marks(number, "workers started")[-1]["pids"].items()}


def environment(pid: int) -> dict[str, str]:
    return dict(e.split("=", 1) for e in Path(f"/proc/{pid}/environ").read_text().split("\0") if "=" in e)


class One(Acting):
    """One node, as `ckptd run --nproc-per-node N` has it: torch's own store, in the launcher."""

    def __init__(self, tmp: Path, ranks: int, **more) -> None:
        super().__init__(tmp, 1, ranks=ranks, **more)

    def meeting(self, _node) -> list[str]:
        return []


@pytest.mark.timeout(300)
def test_a_stopped_worker_is_restarted_and_the_job_goes_on_from_its_last_step(tmp_path):
    with One(tmp_path, 3, steps=40, pace_s=0.05) as c:
        c.start()
        c.await_step(8, PATIENCE_S)
        os.kill(c.pids_of(0)[1], signal.SIGSTOP)
        time.sleep(1.0)
        stood = c.step()
        time.sleep(0.5)
        assert c.step() == stood, "nobody goes on without a rank that is stopped"
        t = c.act(verdict=1)
        (answer,) = c.answers(1, 1)
        assert answer["done"], answer
        ended = c.marks(0, "workers ended")[0]["t"] - t
        assert c.wait() == [0], c.tails()
        restores = check(c)
        assert [r["world"] for r in restores] == [3, 3] and c.step() == 40
        assert stood - restores[-1]["step"] <= 1, (stood, restores)
        first = next(e for e in c.events("step") if e["t"] > t)
        print(f"workers ended {ended:.2f} s after the Act, next step after {first['t'] - t:.2f} s")
        assert ended < 20.0


@pytest.mark.timeout(300)
def test_a_job_that_hangs_goes_on_by_itself(tmp_path):
    """All of it: the tap, the daemon's verdict, its Act, the restart; and what the restart itself ends is no crash."""
    with One(tmp_path, 3, steps=40, pace_s=0.05, options=["--on-fault", "restart"]) as c:
        c.start()
        c.await_step(12, PATIENCE_S)
        t = time.time()
        os.kill(c.pids_of(0)[1], signal.SIGSTOP)
        assert c.wait(PATIENCE_S) == [0], c.tails()
        restores = check(c)
        assert [r["world"] for r in restores] == [3, 3] and c.step() == 40
        (acting,) = c.marks(0, "acting")
        print(f"ended {acting['t'] - t:.2f} s after it hung, restored after {restores[1]['t'] - t:.2f} s")
        said = (c.nodes[0].directory / "daemon.log").read_text()
        assert "confirmed: stopped: rank 1" in said and "confirmed: crash" not in said, said


@pytest.mark.timeout(400)
def test_an_evicted_rank_stays_out_and_the_job_goes_on_without_it_from_memory(tmp_path):
    """Rank 2 of 4, then what is rank 2 by then; and between them the same Act again, which is of an attempt that is over."""
    with One(tmp_path, 4, steps=60, pace_s=0.05) as c:
        c.start()
        c.await_step(8, PATIENCE_S)
        assert [environment(p)["CKPTD_SLOT"] for p in c.pids_of(0).values()] == ["0", "1", "2", "3"]
        t = c.act(verdict=1, action="evict", ranks=[2])
        c.await_world(3, t, PATIENCE_S)
        c.act(verdict=2, action="evict", ranks=[2])
        assert [(a["done"], "over" in a["what"]) for a in c.answers(2, 1)] == [(False, True)]
        c.await_step(c.step() + 4)
        assert {e["world"] for e in c.events("step") if e["attempt"] == 2} == {3}
        t = c.act(verdict=3, attempt=2, action="evict", ranks=[2])
        c.await_world(2, t, PATIENCE_S)
        assert c.wait() == [0], c.tails()
        restores = check(c)
        assert [r["world"] for r in restores] == [4, 3, 2] and c.step() == 60
        assert c.events("step")[-1]["digest"] == truth(500)[60]
        assert [m["evicted"] for m in c.marks(0, "acting")] == [[2], [3]], "the second time it was the worker in slot 3"
        for before, after in ((1, 2), (2, 3)):
            made = max(e["step"] for e in c.events("step") if e["attempt"] == before)
            assert made - next(r["step"] for r in restores if r["attempt"] == after) <= 1
        assert [m["slots"] for m in c.marks(0, "workers starting")] == [[0, 1, 2, 3], [0, 1, 3], [0, 1]]


@pytest.mark.timeout(400)
def test_on_two_nodes_a_rank_then_the_first_node_is_evicted(tmp_path):
    """Two ranks each. A rank of the second node goes: its node runs one worker. Then both of the first node, which is where they met: its launcher ends with 0, the other goes
    on alone, with what parity gives back of the first one's memory."""
    with Acting(tmp_path, 2, nnodes="1:2", ranks=2, steps=60, pace_s=0.1, options=["--standby", "0"]) as c:
        c.start()
        c.await_world(4, 0.0, PATIENCE_S)
        c.await_step(6, PATIENCE_S)
        first, second = sorted((0, 1), key=lambda n: c.marks(n, "rendezvous")[-1]["node"])
        t = c.act(verdict=1, action="evict", ranks=[3])
        c.await_world(3, t, PATIENCE_S)
        assert [a["done"] for a in c.answers(1, 2)] == [True] * 2
        assert c.marks(second, "workers starting")[-1]["slots"] == [0] and c.marks(first, "workers starting")[-1]["slots"] == [0, 1]
        c.await_step(c.step() + 5, PATIENCE_S)
        c.await_(lambda: c.events("step")[-1].get("protected", 0) > 0, 30.0, "protection")
        time.sleep(launch.PING_S + 0.5)
        t = c.act(verdict=2, attempt=2, action="evict", ranks=[0, 1])
        c.await_world(1, t, PATIENCE_S)
        assert c.wait(PATIENCE_S) == [0, 0], c.tails()
        restores = check(c)
        assert [r["world"] for r in restores] == [4, 3, 1] and c.step() == 60
        assert "this node has left job" in c.nodes[first].log() and not c.marks(second, "acting")[1:], "the second one followed"


@pytest.mark.timeout(300)
def test_restart_on_three_nodes_is_one_restart(tmp_path):
    with Acting(tmp_path, 3, nnodes="1:3", ranks=1, steps=40, pace_s=0.1, options=["--standby", "0"]) as c:
        c.start()
        c.await_world(3, 0.0, PATIENCE_S)
        c.await_step(6, PATIENCE_S)
        os.kill(c.pids_of(2)[0], signal.SIGSTOP)
        time.sleep(1.0)
        t = c.act(verdict=1)
        c.await_world(3, t, PATIENCE_S)
        assert c.wait(PATIENCE_S) == [0, 0, 0], c.tails()
        restores = check(c)
        assert [r["world"] for r in restores] == [3, 3] and c.step() == 40
        assert any(a["done"] for a in c.answers(1, 3))


@pytest.mark.timeout(300)
def test_too_few_nodes_would_be_left_so_all_restart(tmp_path):
    with Acting(tmp_path, 2, nnodes="2", ranks=1, steps=30, pace_s=0.1, options=["--standby", "0"]) as c:
        c.start()
        c.await_step(6, PATIENCE_S)
        t = c.act(verdict=1, action="evict", ranks=[1])
        answers = c.answers(1, 2)
        assert any("--nnodes asks for 2" in a["what"] for a in answers) and not any(a["done"] for a in answers), answers
        c.await_world(2, t, PATIENCE_S)
        assert c.wait(PATIENCE_S) == [0, 0], c.tails()
        assert [r["world"] for r in check(c)] == [2, 2]


SLEEPER = """
import signal, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
time.sleep(1000)
"""


@pytest.mark.timeout(120)
def test_restarts_without_a_new_snapshot_end_a_job_and_a_worker_that_ignores_sigterm_holds_nobody_up(tmp_path):
    """Workers that are no session's and do not listen: four Acts, then the job is given up, though --max-restarts would allow a hundred."""
    script = tmp_path / "sleeper.py"
    script.write_text(SLEEPER)
    with One(tmp_path, 2, options=["--standby", "0"]) as c:
        c.job, c.script = script, ()
        c.start()
        for n in range(1, 5):
            c.await_(lambda n=n: len(c.marks(0, "workers started")) == n, 30.0, f"generation {n}")
            time.sleep(0.5)
            t = c.act(verdict=n, attempt=0)
            (answer,) = c.answers(n, 1)
            assert answer["done"]
            assert answer["t"] - t < 15.0
        until = time.monotonic() + 20
        while "giving the job up" not in c.nodes[0].log() and time.monotonic() < until:
            time.sleep(0.05)
        assert "giving the job up" in c.nodes[0].log(), c.tails()
        stop_daemon(c.nodes[0].directory)


TELLER = """
import json, os, time
with open(os.environ["OUT"], "a") as f:
    f.write(json.dumps({k: os.environ.get(k) for k in ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "WORLD_SIZE", "CKPTD_SLOT", "CUDA_VISIBLE_DEVICES", "CKPTD_ON_FAULT")}) + chr(10))
time.sleep(1000)
"""


@pytest.mark.timeout(200)
@pytest.mark.parametrize("virtual", [False, True])
def test_those_that_are_left_keep_their_slots_and_devices(tmp_path, virtual):
    """Local ranks stay dense; with --virtual-local-rank each worker sees the one device of its slot."""
    script = tmp_path / "teller.py"
    script.write_text(TELLER)
    options = ["--standby", "0", *(["--virtual-local-rank"] if virtual else [])]
    with One(tmp_path, 4, options=options, env={"CUDA_VISIBLE_DEVICES": "7,5,3,1"}) as c:
        c.job, c.script = script, ()
        c.start()

        def told(count: int) -> list[dict]:
            lines = c.out.read_text().splitlines() if c.out.exists() else []
            return sorted(map(json.loads, lines[-count:]), key=lambda e: e["RANK"]) if len(lines) >= count else []

        first = c.await_(lambda: told(4), PATIENCE_S, "four workers")
        assert [e["CKPTD_SLOT"] for e in first] == ["0", "1", "2", "3"] and {e["CKPTD_ON_FAULT"] for e in first} == {"evict"}
        for verdict, rank, slots in ((1, 1, ["0", "2", "3"]), (2, 2, ["0", "2"])):
            c.out.unlink()
            c.act(verdict=verdict, attempt=0, action="evict", ranks=[rank])
            left = c.await_(lambda n=len(slots): told(n), PATIENCE_S, "those that are left")
            assert [e["CKPTD_SLOT"] for e in left] == slots
            assert [e["LOCAL_RANK"] for e in left] == (["0"] * len(slots) if virtual else [str(i) for i in range(len(slots))])
            assert {(e["WORLD_SIZE"], e["LOCAL_WORLD_SIZE"]) for e in left} == {(str(len(slots)),) * 2}
            names = ["7531"[int(s)] for s in slots]
            assert [e["CUDA_VISIBLE_DEVICES"] for e in left] == (names if virtual else [",".join(names)] * len(slots))
        c.out.unlink()
        c.act(verdict=3, attempt=0, action="evict", ranks=[0, 1])
        (answer,) = c.answers(3, 1)
        assert not answer["done"] and "nobody would be left" in answer["what"]
        assert [e["CKPTD_SLOT"] for e in c.await_(lambda: told(2), PATIENCE_S, "both again")] == ["0", "2"]
        stop_daemon(c.nodes[0].directory)


def test_a_policy_that_is_none_is_refused(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "ckptd.cli.main", "run", "--nproc-per-node", "1", "--dir", str(tmp_path / "d"), "x.py"], capture_output=True, text=True,
        timeout=60, env={**os.environ, "CKPTD_ON_FAULT": "panic", "PYTHONPATH": str(ROOT)}, check=False,
    )  # fmt: skip
    assert done.returncode and "--on-fault panic" in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert not (tmp_path / "d" / "daemon.sock").exists()
