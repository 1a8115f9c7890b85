"""Slow links between real nodes: four network namespaces on a bridge, each a `ckptd run` with a daemon and one rank; `tc` makes a direction slow. Root and iproute2.

All directions are shaped to RATE from the beginning, each node's sending at its own end and its receiving at the bridge's. The fault is a fifth of it: what a node sends,
what it receives, or what one node sends to one other (htb and u32).
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks import harness, watch_score
from benchmarks.watch_real import LOOK_S, SCRIPT, Case, Seen, Timeline, lines
from ckptd.channel import socket_path
from ckptd.cli.status import ask
from ckptd.errors import CkptdError

NODES = 4
RATE, SLOW_RATE = "200mbit", "40mbit"
SHAPE = ("burst", "64kb", "latency", "200ms")
ONSET_STEP = 45
PLACED_S = 20.0
"""How long after the fault's class is known its side is waited for."""
LIMIT_STEPS = 80
START_S = 180.0


def missing() -> str:
    """Why there are none here; "" if there are."""
    from tests.train.cluster import Namespaces

    return Namespaces.missing()


def cases() -> list[Case]:
    """`rank`: the node's place among the namespaces, until it is known which rank it runs."""
    return [
        Case(name="send-slow", kind="send-slow", layout="ddp", severity="1/5", rank=2, kinds=("send-slow",), group="comm"),
        Case(name="receive-slow", kind="receive-slow", layout="ddp", severity="1/5", rank=1, kinds=("receive-slow",), group="comm"),
        Case(name="link-slow", kind="link-slow", layout="ddp", severity="1/5", rank=1, kinds=("link-slow",), group="comm"),
        Case(name="healthy-nodes", kind="healthy", layout="ddp", severity="4 nodes"),
    ]


class Links:
    """One job over shaped links."""

    def __init__(self, directory: Path, case: Case) -> None:
        from tests.train import cluster

        self.out, self.case = directory / "job", case
        self.peer = -1
        cluster.SCRIPT = SCRIPT
        self.nodes = cluster.Namespaces(
            directory, NODES, nnodes=str(NODES), ranks=1, name=case.name, parity=0, options=("--standby", "0"), env={"PYTHONPATH": str(harness.ROOT)}
        )
        self.nodes.script = (
            "--layout", "ddp", "--session", "--steps", str(ONSET_STEP + LIMIT_STEPS + 20), "--width", "128", "--step-ms", "120", "--out", str(self.out),
        )  # fmt: skip
        for i in range(NODES):
            self._tc(i, "add", "tbf", "rate", RATE, *SHAPE)
            self._tc_bridge(i, "add", RATE)

    def _tc(self, node: int, verb: str, *what: str, parent: tuple[str, ...] = ("root",)) -> None:
        subprocess.run([*self.nodes.inside(node), "tc", "qdisc", verb, "dev", "eth0", *parent, *what], check=True, capture_output=True)

    def _tc_bridge(self, node: int, verb: str, rate: str) -> None:
        subprocess.run(["tc", "qdisc", verb, "dev", f"{self.nodes.tag}v{node}", "root", "tbf", "rate", rate, *SHAPE], check=True, capture_output=True)

    def slow(self, rank_of: dict[int, int]) -> None:
        """The fault. A link is one that the job uses: gloo's ring sends to the rank before."""
        node = self.case.rank
        if self.case.kind == "send-slow":
            self._tc(node, "change", "tbf", "rate", SLOW_RATE, *SHAPE)
        elif self.case.kind == "receive-slow":
            self._tc_bridge(node, "change", SLOW_RATE)
        elif self.case.kind == "link-slow":
            inside = [*self.nodes.inside(node), "tc"]
            self._tc(node, "replace", "handle", "1:", "htb", "default", "10")
            for number, rate in (("10", RATE), ("20", SLOW_RATE)):
                subprocess.run([*inside, "class", "add", "dev", "eth0", "parent", "1:", "classid", f"1:{number}", "htb", "rate", rate], check=True, capture_output=True)
            before = (rank_of[node] - 1) % NODES
            self.peer = next(i for i, r in rank_of.items() if r == before)
            there = f"{self.nodes.address(self.peer)}/32"
            subprocess.run(
                [*inside, "filter", "add", "dev", "eth0", "protocol", "ip", "parent", "1:", "u32", "match", "ip", "dst", there, "flowid", "1:20"],
                check=True, capture_output=True,
            )  # fmt: skip

    def rank_of(self) -> dict[int, int]:
        """Namespace -> rank."""
        found = {}
        for e in lines(self.out / "pids.jsonl"):
            with contextlib.suppress(OSError):
                for word in Path(f"/proc/{e['pid']}/environ").read_bytes().split(b"\0"):
                    if word.startswith(b"CKPTD_NODE_MARK="):
                        found[int(word.rpartition(b"-")[2])] = e["rank"]
        return found

    def run(self) -> tuple[watch_score.Case, Timeline]:
        """Start, wait, make it slow, look at what is said."""
        timeline = Timeline()
        with self.nodes:
            self.nodes.start()
            self._await_step(5)
            rank_of = self.rank_of()
            lead = next(i for i, r in rank_of.items() if r == 0)
            directory = self.nodes.nodes[lead].directory
            known: dict[int, str] = {}
            until_s = time.monotonic() + START_S
            step = placed_step = 0
            while time.monotonic() < until_s and any(n.process is not None and n.process.poll() is None for n in self.nodes.nodes):
                self._look(directory, known, timeline)
                done = lines(self.out / "rank0.jsonl")
                step = done[-1]["step"] if done else 0
                if step >= ONSET_STEP and not timeline.onset_t and not self.case.quiet:
                    timeline.usual_s = harness.median([e["s"] for e in done[-20:]])
                    timeline.onset_t, timeline.onset_step = time.time(), step + 1
                    self.slow(rank_of)
                if not placed_step and timeline.onset_t and any(s.verdict["kind"] in self.case.kinds and s.verdict["state"] == "confirmed" for s in timeline.seen):
                    placed_step = step
                if (placed_step and step >= placed_step + 5) or step > ONSET_STEP + LIMIT_STEPS:
                    break
                time.sleep(LOOK_S)
            timeline.steps = [(e["step"], e["t"]) for e in lines(self.out / "rank0.jsonl")]
        label = self.case.label(timeline)
        if not self.case.quiet:
            label = replace(label, ranks=(rank_of[self.case.rank],), peer=rank_of[self.peer] if self.peer >= 0 else -1)
        return label, timeline

    def _await_step(self, step: int) -> None:
        until_s = time.monotonic() + START_S
        while not (done := lines(self.out / "rank0.jsonl")) or done[-1]["step"] < step:
            if time.monotonic() > until_s:
                msg = f"no step {step} within {START_S:.0f} s\n{self.nodes.tails()}"
                raise RuntimeError(msg)
            time.sleep(0.2)

    def _look(self, directory: Path, known: dict[int, str], timeline: Timeline) -> None:
        watched: dict[str, Any] = {}
        with contextlib.suppress(CkptdError):
            watched = (ask(socket_path(str(directory)), 5.0).get("watched") or {}).get(self.nodes.name) or {}
        for v in watched.get("verdicts", ()):
            what = json.dumps([v["kind"], v["state"], v["ranks"], v["peer"]])
            if known.get(v["id"]) != what:
                known[v["id"]] = what
                timeline.seen.append(Seen(time.time(), v))


def run(directory: Path) -> Iterator[tuple[watch_score.Row, Timeline]]:
    """All cases."""
    for case in cases():
        label, timeline = Links(directory / case.name, case).run()
        yield watch_score.score(label, timeline.told()), timeline


def main() -> None:
    """Some cases by hand: python -m benchmarks.watch_links DIR NAME..."""
    from benchmarks.watch_real import line

    os.environ.setdefault("OMP_NUM_THREADS", "1")
    for case in cases():
        if not sys.argv[2:] or case.name in sys.argv[2:]:
            label, timeline = Links(Path(sys.argv[1]) / case.name, case).run()
            row = watch_score.score(label, timeline.told())
            print(line(row, timeline), f"class after {row.class_steps:.0f} steps", flush=True)
            for s in timeline.seen:
                print(f"   {s.t - timeline.onset_t:7.2f} s step {timeline.step_at(s.t)} {s.verdict['state']} {s.verdict['text'][:160]}")


if __name__ == "__main__":
    main()
