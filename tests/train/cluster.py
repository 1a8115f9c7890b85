"""Several nodes on one machine: each a `ckptd run` with a daemon and workers of its own, at an address of its own. On loopback addresses, or in network namespaces.

Every process started here, or by one started here, is ended here, by its pid: a node is a session (setsid) whose members are found by their environment.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Self

from tests.train.harness import ROOT

SCRIPT = ROOT / "tests" / "train" / "elastic_job.py"


class Node:
    """One of them. `mark` in its processes' environment tells which are its."""

    def __init__(self, cluster: Cluster, number: int) -> None:
        self.cluster, self.number = cluster, number
        self.address = cluster.address(number)
        self.directory = cluster.tmp / f"d{number}"
        self.mark = f"{cluster.name}-{number}"
        self.process: subprocess.Popen | None = None
        self.stopped = False

    def start(self) -> Node:
        c = self.cluster
        env = {
            **os.environ, "CKPTD_DIR": str(self.directory), "CKPTD_NODE_MARK": self.mark, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT),
            "OUT": str(c.out), "CKPTD_TRACE": str(c.tmp / f"trace{self.number}.jsonl"), **c.env,
        }  # fmt: skip
        command = [
            *c.inside(self.number), sys.executable, "-m", "ckptd.cli.main", "run", "--nproc-per-node", str(c.ranks), "--job", c.name,
            *c.meeting(self), *c.options, str(c.job), *map(str, c.script),
        ]  # fmt: skip
        with (c.tmp / f"log{self.number}.txt").open("ab") as log:
            self.process = subprocess.Popen(command, env=env, stdout=log, stderr=log, start_new_session=True)
        return self

    def pids(self) -> list[int]:
        """All processes of this node: launcher, workers, standbys, daemon."""
        found = []
        for proc in Path("/proc").iterdir():
            if proc.name.isdecimal():
                with contextlib.suppress(OSError):
                    if f"CKPTD_NODE_MARK={self.mark}\0".encode() in (proc / "environ").read_bytes() + b"\0":
                        found.append(int(proc.name))
        return found

    def signal(self, number: int) -> float:
        """To all its processes at once; twice, for what was being started."""
        now = time.time()
        for _ in range(2):
            for pid in self.pids():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)
        return now

    def kill(self) -> float:
        now = self.signal(signal.SIGKILL)
        if self.process is not None:
            self.process.wait()
        return now

    def stop(self) -> float:
        self.stopped = True
        return self.signal(signal.SIGSTOP)

    def go_on(self) -> float:
        self.stopped = False
        return self.signal(signal.SIGCONT)

    def log(self, lines: int = 30) -> str:
        path = self.cluster.tmp / f"log{self.number}.txt"
        return "\n".join(path.read_text(errors="replace").splitlines()[-lines:]) if path.exists() else ""


class Cluster:
    """Nodes that run one job."""

    def __init__(
        self, tmp: Path, nodes: int, *, nnodes: str = "", ranks: int = 1, steps: int = 60, pace_s: float = 0.1, parity: int = 1, group_size: int = 8,
        name: str = "elastic", options=(), env=None,
    ) -> None:  # fmt: skip
        self.tmp, self.name = tmp, f"{name}-{os.getpid()}"
        self.count, self.nnodes, self.ranks = nodes, nnodes or f"1:{nodes}", ranks
        self.parity, self.group_size, self.job, self.script = parity, group_size, SCRIPT, (steps, pace_s)
        self.options, self.env = options, env or {}
        tmp.mkdir(parents=True, exist_ok=True)
        self.out = tmp / "out.jsonl"
        self.endpoint = self._endpoint()
        self.nodes = [Node(self, i) for i in range(nodes)]

    def _endpoint(self) -> str:
        import socket

        with socket.socket() as s:
            s.bind((self.address(0), 0))
            return f"{self.address(0)}:{s.getsockname()[1]}"

    def address(self, number: int) -> str:
        return f"127.0.0.{number + 1}"

    def inside(self, _number: int) -> list[str]:
        """What a node's command begins with."""
        return []

    def meeting(self, node: Node) -> list[str]:
        """How a node finds the others; nothing for one that is alone, as a user starts it."""
        return [
            "--nnodes", self.nnodes, "--rdzv-endpoint", self.endpoint, "--local-addr", node.address, "--parity", str(self.parity),
            "--group-size", str(self.group_size), "--rdzv-conf", "last_call_timeout=3",
        ]  # fmt: skip

    def start(self) -> Self:
        for node in self.nodes:
            node.start()
        return self

    def events(self, what: str | None = None) -> list[dict]:
        lines = self.out.read_text().splitlines() if self.out.exists() else []
        found = [json.loads(line) for line in lines if line.endswith("}")]
        return [e for e in found if what in (None, e["what"])]

    def started(self, after_t: float) -> float:
        """When the last of the workers that are of the newest generation was started, on any node."""
        found = []
        for node in self.nodes:
            path = self.tmp / f"trace{node.number}.jsonl"
            lines = path.read_text().splitlines() if path.exists() else []
            marks = [json.loads(line) for line in lines if '"workers started"' in line and line.endswith("}")]
            found += [m["t"] for m in marks[-1:] if m["t"] > after_t]
        return max(found)

    def step(self) -> int:
        return max((e["step"] for e in self.events("step")), default=0)

    def await_(self, condition, timeout_s: float, what: str):
        until = time.monotonic() + timeout_s
        while time.monotonic() < until:
            value = condition()
            if value:
                return value
            time.sleep(0.02)
        raise TimeoutError(f"{what} within {timeout_s} s\n{self.tails()}")

    def await_step(self, step: int, timeout_s: float = 60.0) -> int:
        return self.await_(lambda: self.step() if self.step() >= step else 0, timeout_s, f"step {step}")

    def await_world(self, ranks: int, after_t: float, timeout_s: float = 60.0) -> dict:
        """The first step that so many ranks made, after a moment."""
        return self.await_(
            lambda: next((e for e in self.events("step") if e["world"] == ranks and e["t"] > after_t), None), timeout_s, f"{ranks} ranks"
        )

    def wait(self, timeout_s: float = 120.0) -> list[int | None]:
        """Exit codes of the nodes that were not killed or stopped."""
        until = time.monotonic() + timeout_s
        for node in self.nodes:
            if node.process is not None and not node.stopped:
                try:
                    node.process.wait(max(0.1, until - time.monotonic()))
                except subprocess.TimeoutExpired:
                    raise TimeoutError(f"node {node.number} did not end within {timeout_s} s\n{self.tails()}") from None
        return [n.process.returncode if n.process else None for n in self.nodes]

    def tails(self) -> str:
        return "\n".join(f"--- node {n.number}\n{n.log()}" for n in self.nodes)

    def end(self) -> None:
        """Kill what is left."""
        for _ in range(3):
            for node in self.nodes:
                node.signal(signal.SIGKILL)
        for node in self.nodes:
            if node.process is not None:
                node.process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()


class Namespaces(Cluster):
    """Nodes in network namespaces: a bridge, and a link per node that can be cut."""

    made = 0

    def __init__(self, tmp: Path, nodes: int, **more) -> None:
        Namespaces.made += 1
        self.tag = f"ck{os.getpid() % 100000}x{Namespaces.made}"
        secret = tmp / "secret"
        tmp.mkdir(parents=True, exist_ok=True)
        secret.write_text(os.urandom(24).hex())
        secret.chmod(0o600)
        more["options"] = [*more.get("options", ()), "--secret-file", str(secret), "--insecure-peers"]
        super().__init__(tmp, nodes, **more)
        self._ip("link", "add", self.tag, "type", "bridge")
        self._ip("link", "set", self.tag, "up")
        for i in range(nodes):
            ns, there = f"{self.tag}n{i}", f"{self.tag}v{i}"
            self._ip("netns", "add", ns)
            self._ip("link", "add", there, "type", "veth", "peer", "name", "eth0", "netns", ns)
            self._ip("link", "set", there, "master", self.tag, "up")
            for command in (("addr", "add", f"{self.address(i)}/24", "dev", "eth0"), ("link", "set", "eth0", "up"), ("link", "set", "lo", "up")):
                self._ip("-n", ns, *command)

    @staticmethod
    def missing() -> str:
        """Why there are none here; "" if there are."""
        if shutil.which("ip") is None:
            return "the ip command is missing (iproute2)"
        if os.geteuid() != 0:
            return "network namespaces need root"
        probe = subprocess.run(["ip", "netns", "add", f"ckprobe{os.getpid()}"], capture_output=True, check=False)
        if probe.returncode:
            return f"no network namespaces: {probe.stderr.decode().strip()}"
        subprocess.run(["ip", "netns", "del", f"ckprobe{os.getpid()}"], check=False)
        return ""

    @staticmethod
    def _ip(*command: str, check: bool = True) -> None:
        subprocess.run(["ip", *command], check=check, capture_output=True)

    def _endpoint(self) -> str:
        return f"{self.address(0)}:7070"

    def address(self, number: int) -> str:
        return f"10.77.0.{number + 11}"

    def inside(self, number: int) -> list[str]:
        return ["ip", "netns", "exec", f"{self.tag}n{number}"]

    def link(self, number: int, up: bool) -> float:  # noqa: FBT001
        self._ip("link", "set", f"{self.tag}v{number}", "up" if up else "down")
        return time.time()

    def end(self) -> None:
        super().end()
        for i in range(self.count):
            self._ip("link", "del", f"{self.tag}v{i}", check=False)
            self._ip("netns", "del", f"{self.tag}n{i}", check=False)
        self._ip("link", "del", self.tag, check=False)
