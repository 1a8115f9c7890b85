"""Real jobs through `ckptd run`, with a trace to wait on, and processes to kill."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
SCRIPT = ROOT / "scripts" / "train_gpt.py"


class Job:
    """One `ckptd run` of the GPT, everything of it below `tmp`."""

    def __init__(self, tmp: Path, parallel: str, *, ranks: int = 4, steps: int = 20, name: str = "job", run=(), script=(), env=None):
        self.tmp, self.ranks, self.steps, self.name = tmp, ranks, steps, name
        self.out, self.trace, self.log = tmp / f"out-{name}", tmp / f"trace-{name}.jsonl", tmp / f"log-{name}.txt"
        tmp.mkdir(parents=True, exist_ok=True)
        self.env = {
            **os.environ, "CKPTD_DIR": str(tmp / "d"), "CKPTD_TRACE": str(self.trace), "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT), **(env or {}),
        }
        self.command = [
            sys.executable, "-m", "ckptd.cli.main", "run", "--nproc-per-node", str(ranks), "--job", name, *run,
            str(SCRIPT), "--parallel", parallel, "--steps", str(steps), "--out", str(self.out), *script,
        ]
        self.process: subprocess.Popen | None = None

    def start(self) -> Job:
        self.log_file = self.log.open("ab")
        self.process = subprocess.Popen(self.command, env=self.env, stdout=self.log_file, stderr=self.log_file, start_new_session=True)
        return self

    def marks(self, what: str | None = None) -> list[dict]:
        lines = self.trace.read_text().splitlines() if self.trace.exists() else []
        found = [json.loads(line) for line in lines if line.endswith("}")]
        return [m for m in found if what in (None, m["what"])]

    def pids(self) -> dict[int, int]:
        started = self.marks("workers started")
        return {int(k): v for k, v in started[-1]["pids"].items()} if started else {}

    def running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def step(self) -> int:
        """The newest step that any rank of the running generation finished; 0 before the first."""
        pids = set(self.pids().values())
        return max((m["step"] for m in self.marks("step") if m["pid"] in pids), default=0)

    def await_step(self, step: int, timeout_s: float = 90.0) -> int:
        """Wait until every rank of the running generation has finished a step >= `step`; the number it reached."""
        until = time.monotonic() + timeout_s
        while time.monotonic() < until and self.running():
            pids = set(self.pids().values())
            last: dict[int, int] = {}
            for m in self.marks("step"):
                if m["pid"] in pids:
                    last[m["pid"]] = m["step"]
            if len(last) == self.ranks and min(last.values()) >= step:
                return min(last.values())
            time.sleep(0.01)
        if self.running():
            raise TimeoutError(f"step {step} was not reached in {timeout_s} s:\n{self.tail()}")
        return -1

    def kill(self, *ranks: int) -> float:
        pids = self.pids()
        now = time.time()
        for rank in ranks:
            try:
                os.kill(pids[rank], signal.SIGKILL)
            except ProcessLookupError:
                pass
        return now

    def wait(self, timeout_s: float = 180.0) -> int:
        try:
            code = self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.end()
            raise TimeoutError(f"the job did not end in {timeout_s} s:\n{self.tail()}") from None
        self.log_file.close()
        return code

    def end(self) -> None:
        """Kill what is left of it: the launcher, its workers, its daemon."""
        for pid in [*self.pids().values(), *([self.process.pid] if self.process else [])]:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        if self.process:
            self.process.wait()
        self.log_file.close()

    def tail(self, lines: int = 40) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])

    def finals(self) -> list[dict]:
        return [json.loads((self.out / f"final{r}.json").read_text()) for r in range(self.ranks)]

    def lines(self, rank: int) -> dict[int, dict]:
        """step -> the last line that this rank wrote about it, without its time."""
        found = {}
        for line in (self.out / f"rank{rank}.jsonl").read_text().splitlines():
            try:
                entry = json.loads(line)
            except ValueError:
                continue  # a killed rank's half line
            entry.pop("s")
            found[entry["step"]] = entry
        return found


def daemon_pid(directory: Path) -> int:
    """The pid of the daemon that serves `directory`."""
    from ckptd.channel import connect, peer_of

    pipe = connect(directory / "daemon.sock", 5.0)
    try:
        return peer_of(pipe.sock)[0]
    finally:
        pipe.close()


def stop_daemon(directory: Path) -> None:
    """End the daemon that serves `directory`, if there is one."""
    from ckptd.errors import CkptdError

    try:
        os.kill(daemon_pid(directory), signal.SIGKILL)
    except (CkptdError, ProcessLookupError):
        pass
