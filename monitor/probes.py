"""Active probes of a processor and its memory: what a suspicion of one rank is confirmed with, where the rank itself cannot be asked (it hangs, or is stopped).

    python -m ckptd.monitor.probes compute --seconds 0.2 --like PID        prints {"best": ..., "total": ..., "unlike": []}, per second
    outside("compute", pid, 0.2)                                           the same, started from here: blocks, so in a pool

The probe runs as a process of its own, placed as the rank is: on its processors, at its priority, in its cgroup (whose quota is what may be slow). Without torch, with one thread. Work is of
fixed size: a matrix product of float32 that stays in a core's cache, and a copy that does not. Two rates: `total` is all work over all time, so a processor that is taken away shows;
`best` is the best repeat alone, so a processor that is slow in itself shows. Libraries differ: compare with other probes of this kind and with the node's own `Baselines` only, never with what a
rank measured in its own process.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec

KINDS = ("compute", "memory")
MATMUL_SIZE = 384
COPY_BYTES = 64 << 20
"""More than any core's cache."""
SECONDS_MAX = 5.0
REPEATS_MIN = 3
START_S = 20.0
"""For Python to start and load NumPy, on a busy machine."""
ONE_THREAD = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "BLIS_NUM_THREADS")

ENTRIES_MAX, FILE_BYTES_MAX = 4096, 1 << 20
AGE_MAX_S = 30 * 86400.0


class Rate(NamedTuple):
    """Per second: floating point operations, or bytes copied."""

    best: float
    total: float


def repeat(work: Callable[[], object], amount: float, seconds: float) -> Rate:
    """Do it for so long, at least REPEATS_MIN times after one that does not count."""
    work()
    began_s = last_s = time.perf_counter()
    best_s, count = math.inf, 0
    while last_s - began_s < seconds or count < REPEATS_MIN:
        work()
        now_s = time.perf_counter()
        best_s, last_s, count = min(best_s, now_s - last_s), now_s, count + 1
    return Rate(amount / max(best_s, 1e-9), count * amount / max(last_s - began_s, 1e-9))


def compute(seconds: float) -> Rate:
    """Floating point operations per second, of one thread (as the environment says: ONE_THREAD, before NumPy is loaded)."""
    import numpy as np

    n = MATMUL_SIZE
    a, b, out = np.full((n, n), 0.5, np.float32), np.full((n, n), 0.25, np.float32), np.empty((n, n), np.float32)
    return repeat(lambda: np.matmul(a, b, out=out), 2.0 * n**3, seconds)


def memory(seconds: float) -> Rate:
    """Bytes copied per second, from memory to memory."""
    import numpy as np

    source, target = np.ones(COPY_BYTES, np.uint8), np.empty(COPY_BYTES, np.uint8)
    return repeat(lambda: np.copyto(target, source), float(COPY_BYTES), seconds)


# --- placed as another process is -------------------------------------------------------------------------------------------


def pin_like(pid: int) -> list[str]:
    """Have this process run where and as `pid` does: its cgroup, processors and priority. Returns what could not be had. Raises ProcessLookupError where it is gone."""
    unlike = []
    for what, place in (("cgroup", _join_cgroup), ("cpus", _take_cpus), ("nice", _take_nice)):
        try:
            if not place(pid):
                unlike.append(what)
        except ProcessLookupError:
            raise
        except OSError:
            unlike.append(what)
    return unlike


def _take_cpus(pid: int) -> bool:
    os.sched_setaffinity(0, os.sched_getaffinity(pid))
    return True


def _take_nice(pid: int) -> bool:
    """A priority that is above ours needs a right that daemons seldom have."""
    wanted = os.getpriority(os.PRIO_PROCESS, pid)
    os.setpriority(os.PRIO_PROCESS, 0, wanted)
    return os.getpriority(os.PRIO_PROCESS, 0) == wanted


def _join_cgroup(pid: int, root: Path = Path("/sys/fs/cgroup")) -> bool:
    """Be in its groups, as far as they rule processors; one that is frozen would freeze us too."""
    theirs, ours = (_groups(Path(f"/proc/{who}/cgroup").read_text(), root) for who in (pid, "self"))
    for controller, place in theirs.items():
        if place == ours.get(controller):
            continue
        if "frozen 1" in _read(place / "cgroup.events"):
            return False
        (place / "cgroup.procs").write_text("0")  # the kernel takes 0 for whoever writes
    return True


def _groups(text: str, root: Path) -> dict[str, Path]:
    """controller -> folder, of /proc/PID/cgroup: the one of version 2 (""), and of version 1 those of cpu and cpuset."""
    found = {}
    for line in text.splitlines():
        _, controllers, path = (*line.split(":", 2), "", "", "")[:3]
        for controller in controllers.split(","):
            base = root / (controller or ("unified" if (root / "unified").is_dir() else ""))
            if controller in {"", "cpu", "cpuset"} and path.startswith("/") and ".." not in path.split("/") and (base / "cgroup.procs").exists():
                found[controller] = base / path.lstrip("/")
    return found


def _read(path: Path) -> str:
    with contextlib.suppress(OSError):
        return path.read_text()
    return ""


class Outcome(msgspec.Struct, frozen=True):
    """What a probe's process prints."""

    best: float
    total: float
    unlike: list[str] = []


def run_outside(kind: str, pid: int, seconds: float) -> Outcome:
    """Measure in a process that is placed as `pid` is. Blocks for a start of Python and `seconds`. Raises ValueError, OSError, TimeoutError."""
    if kind not in KINDS or not 0 < seconds <= SECONDS_MAX:
        msg = f"no probe is called {kind!r}, or lasts {seconds} s"
        raise ValueError(msg)
    command = [sys.executable, "-m", "ckptd.monitor.probes", kind, "--seconds", str(seconds), "--like", str(pid)]
    try:
        done = subprocess.run(command, capture_output=True, timeout=START_S + 3 * seconds, check=False, stdin=subprocess.DEVNULL, env=_environment())
    except subprocess.TimeoutExpired as e:
        msg = f"a probe ({kind}) of process {pid} did not come to an end"
        raise TimeoutError(msg) from e
    try:
        return msgspec.json.decode(done.stdout, type=Outcome)
    except msgspec.MsgspecError as e:
        msg = f"a probe ({kind}) of process {pid} failed: {done.stderr.decode(errors='replace').strip()[-200:]}"
        raise OSError(msg) from e


def outside(kind: str, pid: int, seconds: float) -> float:
    """The rate that counts, per second: all work over all time; where the process's place could not be had, the best repeat, which no neighbour makes smaller. Raises as `run_outside`."""
    found = run_outside(kind, pid, seconds)
    return found.best if found.unlike else found.total


def _environment() -> dict[str, str]:
    return {**os.environ, **dict.fromkeys(ONE_THREAD, "1")}


# --- what a node can do when nothing is wrong -------------------------------------------------------------------------------


class _Entry(msgspec.Struct):
    rate: float
    taken_s: float


class _File(msgspec.Struct):
    machine: str
    entries: dict[str, _Entry]


class Baselines:
    """What this node measured when nobody suspected it: one file of its own (0600), the best of what was seen in the last 30 days. Nothing raises: without a file it remembers by itself."""

    def __init__(self, path: Path | None = None, machine: str = "") -> None:
        """`machine`: whose numbers these are; a file of another one counts for nothing."""
        self._path, self._machine = path, machine or machine_name()
        self._entries: dict[str, _Entry] = {}
        with contextlib.suppress(OSError, msgspec.MsgspecError):
            if path is not None:
                fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
                with os.fdopen(fd, "rb") as f:
                    kept = msgspec.json.decode(f.read(FILE_BYTES_MAX), type=_File)
                if kept.machine == self._machine:
                    self._entries = {k: e for k, e in [*kept.entries.items()][:ENTRIES_MAX] if math.isfinite(e.rate) and e.rate > 0}

    def of(self, kind: str, place: str = "") -> float:
        """The rate that is usual here, 0 if none is known. `place`: which processors, or which other node."""
        entry = self._entries.get(f"{kind} {place}")
        return entry.rate if entry is not None else 0.0

    def learn(self, kind: str, place: str, rate: float, now_s: float) -> None:
        """Something was measured while all was well (`now_s`: seconds since the epoch). The better of two stays, for AGE_MAX_S."""
        key = f"{kind} {place}"
        known = self._entries.get(key)
        old = known is not None and now_s - known.taken_s > AGE_MAX_S
        if not (math.isfinite(rate) and rate > 0) or (known is not None and not old and known.rate >= rate):
            return
        if known is None and len(self._entries) >= ENTRIES_MAX:
            self._entries.pop(min(self._entries, key=lambda k: self._entries[k].taken_s))
        self._entries[key] = _Entry(rate, now_s)
        self._save()

    def _save(self) -> None:
        if self._path is None:
            return
        temporary = self._path.with_name(f".{self._path.name}.{os.getpid()}")
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
            fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            with os.fdopen(fd, "wb") as f:
                f.write(msgspec.json.encode(_File(self._machine, self._entries)))
            temporary.rename(self._path)


def machine_name() -> str:
    """Kind and number of processors: what rates depend on."""
    model = next((line.partition(":")[2].strip() for line in _read(Path("/proc/cpuinfo")).splitlines() if line.startswith("model name")), "")
    return f"{os.uname().nodename} {model} x {os.cpu_count()}"


def main(argv: Sequence[str] | None = None) -> None:
    """One probe, in this process."""
    p = argparse.ArgumentParser(prog="python -m ckptd.monitor.probes", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("kind", choices=KINDS)
    p.add_argument("--seconds", type=float, default=0.2)
    p.add_argument("--cpus", default="", help="run on these processors: 2,3")
    p.add_argument("--like", type=int, default=0, metavar="PID", help="run where and as this process does")
    args = p.parse_args(argv)
    unlike = pin_like(args.like) if args.like else []
    if args.cpus:
        os.sched_setaffinity(0, {int(c) for c in args.cpus.split(",")})
    rate = {"compute": compute, "memory": memory}[args.kind](min(args.seconds, SECONDS_MAX))
    print(json.dumps({"best": rate.best, "total": rate.total, "unlike": unlike}))  # noqa: T201  this is its answer


if __name__ == "__main__":
    os.environ.update(_environment())
    main()
