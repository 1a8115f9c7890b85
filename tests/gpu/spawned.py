"""Runs `ranks.py` as processes on one machine, two of them on one GPU if need be, and reads what they print."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent


def run_ranks(world: int, device: str, *cases: str, timeout_s: float = 90.0, env: dict[str, str] | None = None) -> list[dict]:
    """One JSON object per rank: what each case found, by its name. Raises AssertionError with their last words if one fails, or all are not done by the deadline."""
    with tempfile.TemporaryDirectory() as scratch:
        common = {k: v for k, v in os.environ.items() if not k.startswith(("NCCL_PROFILER", "CKPTD_NCCL"))}
        common |= {"PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}", "OMP_NUM_THREADS": "1", **(env or {})}
        if world > 1 and device == "cuda":
            common |= {"NCCL_SOCKET_IFNAME": "lo", "NCCL_IB_DISABLE": "1"}
        logs = [(Path(scratch) / f"out{r}", Path(scratch) / f"err{r}") for r in range(world)]
        processes = []
        for r in range(world):
            own = common | ({"NCCL_HOSTID": f"ckptd-test-{r}"} if world > 1 and device == "cuda" else {})
            command = [sys.executable, str(Path(__file__).with_name("ranks.py")), str(r), str(world), f"{scratch}/store", device, *cases]
            with logs[r][0].open("wb") as out, logs[r][1].open("wb") as err:
                processes.append(subprocess.Popen(command, env=own, stdout=out, stderr=err, start_new_session=True))
        until = time.monotonic() + timeout_s
        try:
            while any(p.poll() is None for p in processes) and time.monotonic() < until:
                if any(p.poll() not in (None, 0) for p in processes):
                    time.sleep(2)  # the others say something too, or hang
                    break
                time.sleep(0.05)
        finally:
            for p in processes:
                if p.poll() is None:
                    os.killpg(p.pid, signal.SIGKILL)
                p.wait()
        said = "\n".join(f"--- rank {r}: {p.returncode}\n{e.read_text(errors='replace')[-3000:]}" for r, (p, (_, e)) in enumerate(zip(processes, logs, strict=True)))
        assert all(p.returncode == 0 for p in processes), said
        results = [json.loads(o.read_text().splitlines()[-1]) for o, _ in logs]
        for result, (_, e) in zip(results, logs, strict=True):
            result["stderr"] = e.read_text(errors="replace")[-3000:]
        return results
