"""Ranks as forked children of the test process: a real process group over gloo, without four imports of torch."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from importlib import import_module
from typing import Any

from ckptd.standby import PRELOAD
from tests.ports import free_port

for _name in PRELOAD:
    import_module(_name)  # before any fork: four ranks that each import torch._dynamo take four seconds here


def ranks(count: int, work: Callable[[int], Any], *, timeout_s: float = 120.0, env: dict[str, str] | None = None, may_die: bool = False) -> list[Any]:
    """Run `work(rank)` in `count` forked ranks of one gloo group; their JSON-able results, by rank. A failure shows the rank's traceback.

    `may_die`: a rank that was killed gives None.
    """
    port = free_port()
    children: dict[int, tuple[int, int]] = {}
    sys.stdout.flush()
    for rank in range(count):
        read, write = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(read)
            os._exit(_child(rank, count, port, work, write, env or {}))
        os.close(write)
        children[rank] = pid, read
    results: list[Any] = []
    deadline = time.monotonic() + timeout_s
    try:
        for rank, (pid, read) in children.items():
            data = _read_all(read, deadline)
            if data is None:
                raise TimeoutError(f"rank {rank} did not answer within {timeout_s} s")
            if not data and may_die:
                results.append(None)
                continue
            answer = json.loads(data or b'{"error": "died without a word"}')
            if "error" in answer:
                raise AssertionError(f"rank {rank}: {answer['error']}")
            results.append(answer["result"])
    finally:
        for pid, read in children.values():
            os.close(read)
            done, _ = os.waitpid(pid, os.WNOHANG)
            if not done:
                if sys.exc_info()[0] is not None:
                    os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
    return results


def _read_all(fd: int, deadline: float) -> bytes | None:
    import select

    data = b""
    while (left := deadline - time.monotonic()) > 0:
        ready, _, _ = select.select([fd], [], [], left)
        if ready:
            piece = os.read(fd, 1 << 20)
            if not piece:
                return data
            data += piece
    return None


def _child(rank: int, count: int, port: int, work: Callable[[int], Any], write: int, env: dict[str, str]) -> int:
    try:
        os.environ.update(
            {"RANK": str(rank), "WORLD_SIZE": str(count), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), **env}
        )
        import torch
        import torch.distributed as dist

        torch.set_num_threads(1)
        warnings.simplefilter("ignore")  # torch's own, in the code under its wrappers; pytest's "error" is for ours
        if count > 1:
            dist.init_process_group("gloo")
        answer = {"result": work(rank)}
        if count > 1:
            dist.barrier()
            dist.destroy_process_group()
    except BaseException:
        answer = {"error": traceback.format_exc()}
    _write_all(write, json.dumps(answer).encode())
    sys.stdout.flush()
    sys.stderr.flush()
    return 0


def _write_all(fd: int, data: bytes) -> None:
    while data:
        data = data[os.write(fd, data) :]
