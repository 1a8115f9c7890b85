"""The tap's line to its node's daemon: says who it is, gives it the ring (Watch + memfd), does what it asks.

It costs nothing while nobody listens: one thread that tries now and then, and at once when a session found a daemon. A daemon that dies is replaced by its
successor in the same way: the ring is handed to it again. What the daemon asks: a probe (computed by the thread that trains, at the end of its step), and stacks.

Threads: everything is called by the trainer's, except `_on_notice`, which is the link's.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import logging
import os
import re
import sys
import threading
import time
from pathlib import Path
from typing import Any

from ckptd.channel import socket_path
from ckptd.core import wire
from ckptd.link import Link
from ckptd.monitor import record, tap, tap_build

log = logging.getLogger("ckptd.tap")

RETRY_MAX_S = 5.0
"""Longest pause between attempts to reach a daemon."""
PROBE_SECONDS_MAX = 2.0
MATMUL_SIZE = {"cpu": 384, "cuda": 4096}
COPY_BYTES = {"cpu": 64 << 20, "cuda": 512 << 20}
PR_SET_PTRACER = 0x59616D61

_one = threading.Lock()
_line: Line | None = None


class Line:
    """One tap's line."""

    def __init__(self, its: tap.Tap, job: str, directory: str | None = None) -> None:
        self.tap = its
        self.job, self.attempt = job, 0
        self.watching: bool | None = None
        its.identify(job, 0)
        self.link = Link(socket_path(directory), self._hello, self._on_notice, retry_max_s=RETRY_MAX_S)
        self.link.rejoin_with(self._watch, its.ring.fd)
        self.link.start(on_connect=self._allow_ptrace)

    def _hello(self, number: int) -> wire.Hello:
        return wire.Hello(id=number, job=self.job, role="tap", rank=self.tap.rank)

    def _watch(self, number: int) -> wire.Watch:
        return wire.Watch(id=number, job=self.job, rank=self.tap.rank, attempt=self.attempt, policy=os.environ.get("CKPTD_ON_FAULT", ""))

    def identify(self, job: str, attempt: int) -> None:
        """Job and attempt became known: say so, on a line of that job."""
        before, self.job, self.attempt = self.job, job, attempt
        self.tap.identify(job, attempt)
        if before != job and self.link.connected:
            self.link.renew()  # Hello is said once: a new connection
        else:
            self.link.again()
        self.link.hurry()

    def close(self) -> None:
        """Hang up."""
        self.link.close()

    def _allow_ptrace(self, pid: int) -> None:
        """Let the daemon read our stacks from outside (py-spy), where Yama restricts that to parents."""
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PTRACER, ctypes.c_ulong(pid), 0, 0, 0)

    # --- what the daemon asks: the link's thread ------------------------------------------------------------------------------

    def _on_notice(self, message: Any) -> None:
        if isinstance(message, wire.ProbeAsked):
            self.tap.at_steps.append(lambda: self._probe(message))
        elif isinstance(message, wire.StacksAsked):
            self.link.tell(wire.StacksDone(ask=message.ask, text=stacks()[: wire.STACK_CHARS_MAX]))
        elif isinstance(message, wire.Watched):
            self.watching = message.watching
            self.tap.watch(message.watching)

    def _probe(self, asked: wire.ProbeAsked) -> None:
        """The thread that trains, between two steps."""
        with self.tap.marks.interval(record.PROBE):
            device, rate, best = probe(asked.kind, min(asked.seconds, PROBE_SECONDS_MAX))
        self.link.tell(wire.ProbeDone(probe=asked.probe, kind=asked.kind, rate=rate, best=best, device=device))


def probe(kind: str, seconds: float) -> tuple[str, float, float]:
    """(device, rate, best rate) of this rank: FLOP/s of one matmul of fixed size ("compute"), bytes/s copied ("memory"), for about `seconds`.

    `rate` is all work over all time, so that a processor that is taken away now and then shows; `best` is the best repeat, so that a slow one shows alone. 0: it failed.
    """
    import torch

    cuda: Any = torch.cuda
    try:
        on = "cuda" if cuda.is_available() and cuda.is_initialized() else "cpu"
        device = torch.device(on, cuda.current_device()) if on == "cuda" else torch.device("cpu")
        with torch.no_grad():
            work, amount = _work(kind, on, device)
            wait: Any = cuda.synchronize if on == "cuda" else lambda: None
            work()
            wait()
            began_s = last_s = time.perf_counter()
            best_s, count = float("inf"), 0
            while last_s - began_s < seconds or count < 3:
                work()
                wait()
                now_s = time.perf_counter()
                best_s, last_s, count = min(best_s, now_s - last_s), now_s, count + 1
        return str(device), count * amount / (last_s - began_s), amount / best_s
    except Exception as e:  # noqa: BLE001  out of memory, a device that is lost: the answer is 0
        log.warning("a probe (%s) failed: %s", kind, e)
        return "", 0.0, 0.0


def _work(kind: str, on: str, device: Any) -> tuple[Any, float]:
    """(what to repeat, how much one repeat does)."""
    import torch

    if kind == "memory":
        source = torch.ones(COPY_BYTES[on], dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        return lambda: target.copy_(source), float(COPY_BYTES[on])
    n = MATMUL_SIZE[on]
    dtype = torch.bfloat16 if on == "cuda" else torch.float32
    a, b = torch.full((n, n), 0.5, dtype=dtype, device=device), torch.full((n, n), 0.25, dtype=dtype, device=device)
    out = torch.empty((n, n), dtype=dtype, device=device)
    return lambda: torch.mm(a, b, out=out), 2.0 * n**3


def stacks() -> str:
    """Where all Python threads of this process stand, newest call first."""
    fd = os.memfd_create("ckptd:stacks", os.MFD_CLOEXEC)
    try:
        faulthandler.dump_traceback(fd, all_threads=True)
        return os.pread(fd, os.fstat(fd).st_size, 0).decode(errors="replace")
    finally:
        os.close(fd)


def job_of_environment() -> str:
    """A job's name where nobody gave one: $CKPTD_JOB, torch elastic's run id (if a restart of the whole job has it again), the script's name."""
    env = os.environ
    return env.get("CKPTD_JOB") or _run_id(env.get("TORCHELASTIC_RUN_ID", "")) or Path(sys.argv[0] or "job").stem or "job"


def _run_id(run_id: str) -> str:
    return "" if run_id in {"", "none"} or re.fullmatch(r"[0-9a-f-]{36}", run_id) else run_id


def ensure(job: str | None = None, attempt: int = 0, directory: str | None = None) -> Line | None:
    """This process's tap and its line, made now if need be; told the job where it is known. None: no tap. Never raises."""
    global _line  # noqa: PLW0603  one line per process
    try:
        its = tap.attach()
        if its is None:
            return None
        with _one:
            if _line is None or _line.tap is not its:
                if its.layer != "native" and "native" in tap.wanted() and os.environ.get("LOCAL_RANK", "0") == "0":
                    tap_build.start_in_background()
                _line = Line(its, job or job_of_environment(), directory)
                its.on_close = _line.close
            if job is not None:
                _line.identify(job, attempt)
            return _line
    except Exception:  # a bug of ours costs the watching, never the job; it is logged
        log.debug("no line for the tap", exc_info=True)
        return None
