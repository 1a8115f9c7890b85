"""A node's health: processors, memory, disks, network, cgroup, GPUs, and what the kernel says. Numbers, and alarms in words.

    Sampler.sample(now_s)       host part: /proc, /sys, the kernel's log; 1 to 10 ms; on the loop or in a pool    -> report.Health, with what the GPU part found last
    Sampler.sample_gpus(now_s)  NVML: blocks for as long as the driver does; in a pool, never two at a time      -> None

Values are levels, and rates since the last sample (`_ratio`: of one, `_per_s`). An alarm is a change: something was counted, or a level passed a bound. It stays in `Health.alarms` for
HOLD_S after it was last true, in the words that it began with: who looks at the newest health alone sees what a suspicion of the last minute may be about.

Everything is optional, and nothing raises: what this kernel, container or user cannot see is left out. Only the counts of changes are judged, never absolute counters, which may be years old.

Sources: psutil; /proc/pressure (kernel Documentation/accounting/psi.rst: time that tasks stood still, in microseconds); cpu.stat of the cgroup (Documentation/admin-guide/cgroup-v2.rst and
scheduler/sched-bwc.rst for version 1).
"""

from __future__ import annotations

import contextlib
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

from ckptd.monitor import kernel_log, nvml
from ckptd.monitor.report import TEXT_MAX, Health

HOLD_S = 60.0
NICS_MAX, PATHS_MAX, KILLS_MAX, ALARMS_MAX = 16, 8, 256, 32
GPU_SILENT_S = 10.0
"""NVML that does not answer for this long."""

STEAL_MAX = 0.05
"""Of all processors' time, taken by the hypervisor."""
SWAP_MAX_BYTES_PER_S = 1 << 20
AVAILABLE_MIN = 0.03
"""Of memory."""
STALLED_MAX = 0.05
"""Of time in which all tasks stood still for want of memory (PSI, full)."""
IO_STALLED_MAX = 0.5
DISK_FREE_MIN = 0.02
THROTTLED_MAX = 0.05
"""Of time in which the cgroup's processors were taken away by its quota."""
NIC_ERRORS_MAX, NIC_DROPS_MAX = 1, 100
"""Per sample: a dropped packet now and then is TCP at work."""

Rates = Callable[[str, float], float | None]


# --- pure: text of the kernel into numbers ----------------------------------------------------------------------------------


def parse_pressure(text: str) -> dict[str, float]:
    """{"some": seconds, "full": seconds} that tasks have stood still, of a file of /proc/pressure; {} where it is none."""
    found: dict[str, float] = {}
    for line in text.splitlines():
        kind, _, rest = line.partition(" ")
        total = rest.rpartition("total=")[2]
        if kind in {"some", "full"} and total.isdecimal():
            found[kind] = int(total) / 1e6
    return found


def parse_cpu_stat(text: str) -> float | None:
    """Seconds that a cgroup was throttled for, of its cpu.stat: version 2 counts microseconds, version 1 nanoseconds. None: it says nothing of it."""
    for line in text.splitlines():
        name, _, value = line.partition(" ")
        if name in {"throttled_usec", "throttled_time"} and value.strip().isdecimal():
            return int(value) / (1e6 if name == "throttled_usec" else 1e9)
    return None


def cgroup_paths(text: str, root: Path = Path("/sys/fs/cgroup")) -> list[Path]:
    """Where the cpu.stat of a process may lie, by its /proc/PID/cgroup: its own group first, then those above it, whose quota holds too."""
    found: list[Path] = []
    for line in text.splitlines():
        _, _, rest = line.partition(":")
        controllers, colon, path = rest.partition(":")
        if not colon:
            continue
        names = controllers.split(",")
        bases = [root, root / "unified"] if not controllers else [root / controllers, root / "cpu"] if "cpu" in names else []
        parts = [p for p in path.split("/") if p not in {"", ".", ".."}]
        for base in bases:
            found += [base.joinpath(*parts[:n]) / "cpu.stat" for n in range(len(parts), -1, -1)]
    return found


# --- what is remembered between samples -------------------------------------------------------------------------------------


class Counters:
    """Counters that only grow: what they grew by since the last sample. One that went back (a device that was reset) begins anew."""

    def __init__(self) -> None:
        self._last: dict[str, float] = {}

    def grew(self, name: str, now: float) -> float | None:
        """None at the first time."""
        before = self._last.get(name)
        self._last[name] = now
        return None if before is None or now < before else now - before


class Alarms:
    """What was wrong lately. Bounded."""

    def __init__(self) -> None:
        self._said: dict[str, tuple[str, float]] = {}

    def raise_(self, kind: str, words: str, now_s: float, *, event: bool = False) -> None:
        """It is so now. `event`: it has just happened; another of its kind is told beside it."""
        kept = self._said.get(kind)
        if kept is not None and now_s - kept[1] > HOLD_S:
            del self._said[kind]
            kept = None
        if kept is None and len(self._said) >= ALARMS_MAX:
            return
        if kept is not None:
            words = f"{kept[0]}; {words}" if event and words not in kept[0] else kept[0]
        self._said[kind] = (words[:TEXT_MAX], now_s)

    def now(self, now_s: float) -> dict[str, str]:
        """All that held within the last HOLD_S."""
        self._said = {kind: (words, at_s) for kind, (words, at_s) in self._said.items() if now_s - at_s <= HOLD_S}
        return {kind: words for kind, (words, _) in self._said.items()}


class Sampler:
    """One node. `paths`: of which the free space matters (the durable tier, the socket's directory); `pid`: whose cgroup is looked at (a rank's), 0: our own."""

    def __init__(self, node: int = 0, paths: Sequence[str] = (), *, pid: int = 0, module: Any = None, kmsg: str = kernel_log.PATH) -> None:
        """`module`: in place of pynvml."""
        self.node, self.pid = node, pid
        self._paths = [*paths][:PATHS_MAX]
        self._module = module
        self._counters, self._alarms = Counters(), Alarms()
        self._log = kernel_log.KernelLog(kmsg)
        self._gpus: nvml.Gpus | None = None
        self._gpu_values: dict[str, float] = {}
        self._gpu_alarms: deque[dict[str, str]] = deque(maxlen=8)
        self._asked_s: float | None = None
        self._last_s: float | None = None
        self._nics: dict[str, tuple[bool, int]] = {}
        self._kills: deque[kernel_log.Event] = deque(maxlen=KILLS_MAX)

    def sample(self, now_s: float) -> Health:
        """Everything now; `now_s` is monotonic. Never raises."""
        values: dict[str, float] = {}
        took_s = None if self._last_s is None else max(1e-3, now_s - self._last_s)
        self._last_s = now_s
        for part in (self._processors, self._memory, self._pressure, self._disks, self._network, self._cgroup, self._kernel, self._gpu_part):
            with contextlib.suppress(Exception):  # of one part: the others are as good as before
                part(values, now_s, took_s)
        return Health(self.node, {k[:TEXT_MAX]: round(v, 6) for k, v in values.items()}, self._alarms.now(now_s))

    def sample_gpus(self, now_s: float) -> None:
        """Ask the driver; the next `sample` has the answers. In a pool: it blocks, and does nothing while another call of it has not come back."""
        if self._asked_s is not None:
            return
        self._asked_s = now_s
        try:
            if self._gpus is None:
                self._gpus = nvml.Gpus(self._module or nvml.module())
            values, alarms = self._gpus.sample()
            self._gpu_values = values
            self._gpu_alarms.append(alarms)
        finally:
            self._asked_s = None

    def said_of(self, pid: int) -> str:
        """What the kernel said lately of the end of this process: "" or its words."""
        return next((e.words for e in reversed(self._kills) if e.pid == pid), "")

    def close(self) -> None:
        """Once."""
        self._log.close()

    # --- parts ------------------------------------------------------------------------------------------------------------------

    def _grew(self, name: str, now: float) -> float | None:
        return self._counters.grew(name, now)

    def _processors(self, values: dict[str, float], now_s: float, _took_s: float | None) -> None:
        times = psutil.cpu_times()
        fields = {n: float(getattr(times, n)) for n in ("user", "nice", "system", "idle", "iowait", "irq", "softirq", "steal") if hasattr(times, n)}
        grown = {n: self._grew(f"cpu {n}", v) for n, v in fields.items()}
        total = sum(g for g in grown.values() if g is not None)
        cores = psutil.cpu_count() or 1
        values["load_per_core"] = psutil.getloadavg()[0] / cores
        if total > 0:
            ratio = {n: (g or 0.0) / total for n, g in grown.items()}
            values["cpu_busy_ratio"] = 1.0 - ratio.get("idle", 0.0) - ratio.get("iowait", 0.0)
            values["cpu_iowait_ratio"], values["cpu_steal_ratio"] = ratio.get("iowait", 0.0), ratio.get("steal", 0.0)
            if values["cpu_steal_ratio"] > STEAL_MAX:
                self._alarms.raise_("steal", f"the hypervisor takes {values['cpu_steal_ratio']:.0%} of the processors' time", now_s)

    def _memory(self, values: dict[str, float], now_s: float, took_s: float | None) -> None:
        memory, swap = psutil.virtual_memory(), psutil.swap_memory()
        values["memory_available_bytes"], values["memory_available_ratio"] = memory.available, memory.available / max(1, memory.total)
        values["swap_used_bytes"] = swap.used
        moved = 0.0
        for name, count in (("in", swap.sin), ("out", swap.sout)):
            grew = self._grew(f"swap {name}", count)
            if grew is not None and took_s is not None:
                values[f"swap_{name}_bytes_per_s"] = grew / took_s
                moved += grew / took_s
        if moved > SWAP_MAX_BYTES_PER_S:
            self._alarms.raise_("swap", f"{moved / 1e6:.1f} MB/s go to and from swap", now_s)
        if values["memory_available_ratio"] < AVAILABLE_MIN:
            self._alarms.raise_("memory", f"{memory.available / 1e9:.2f} GB of memory are left, {values['memory_available_ratio']:.1%}", now_s)

    def _pressure(self, values: dict[str, float], now_s: float, took_s: float | None) -> None:
        bounds = {("memory", "full"): STALLED_MAX, ("io", "full"): IO_STALLED_MAX}
        for what in ("cpu", "memory", "io"):
            for kind, stood_s in parse_pressure(_text(f"/proc/pressure/{what}")).items():
                grew = self._grew(f"psi {what} {kind}", stood_s)
                if grew is None or took_s is None:
                    continue
                ratio = min(1.0, grew / took_s)
                values[f"psi_{what}_{kind}_ratio"] = ratio
                if ratio > bounds.get((what, kind), 2.0):
                    self._alarms.raise_(f"{what}-pressure", f"everything stood still for want of {what} {ratio:.0%} of the time", now_s)

    def _disks(self, values: dict[str, float], now_s: float, took_s: float | None) -> None:
        busiest = 0.0
        for name, io in psutil.disk_io_counters(perdisk=True).items():
            grew = self._grew(f"disk {name}", getattr(io, "busy_time", 0))
            if grew is not None and took_s is not None and not name.startswith(("loop", "ram")):
                busiest = max(busiest, min(1.0, grew / 1000 / took_s))
        values["disk_busy_ratio"] = busiest
        for number, path in enumerate(self._paths):
            with contextlib.suppress(OSError):
                usage = shutil.disk_usage(path)
                values[f"disk_free_bytes_{number}"] = usage.free
                if usage.total and usage.free / usage.total < DISK_FREE_MIN:
                    self._alarms.raise_("disk-full", f"{usage.free / 1e9:.1f} GB are left below {path}", now_s)

    def _network(self, values: dict[str, float], now_s: float, _took_s: float | None) -> None:
        stats = psutil.net_if_stats()
        errors = drops = 0.0
        for name, io in [*psutil.net_io_counters(pernic=True).items()][:NICS_MAX]:
            if name == "lo":
                continue
            wrong = self._grew(f"nic {name} errors", io.errin + io.errout) or 0.0
            lost = self._grew(f"nic {name} drops", io.dropin + io.dropout) or 0.0
            errors, drops = errors + wrong, drops + lost
            if wrong >= NIC_ERRORS_MAX:
                self._alarms.raise_("nic-errors", f"{wrong:.0f} damaged packets at {name}", now_s)
            if lost >= NIC_DROPS_MAX:
                self._alarms.raise_("nic-drops", f"{lost:.0f} packets were dropped at {name}", now_s)
            if name in stats:
                self._link(name, stats[name].isup, stats[name].speed, values, now_s)
        values["nic_errors"], values["nic_drops"] = errors, drops
        for name in [n for n in self._nics if n not in stats]:
            self._alarms.raise_("nic-down", f"{name} is gone", now_s)
            del self._nics[name]

    def _link(self, name: str, up: bool, speed_mbit: int, values: dict[str, float], now_s: float) -> None:  # noqa: FBT001  as psutil has it
        before = self._nics.get(name)
        self._nics[name] = up, max(speed_mbit, before[1] if before is not None and not up else 0)
        values[f"nic_{name}_up"] = float(up)
        if speed_mbit > 0:
            values[f"nic_{name}_mbit_per_s"] = speed_mbit
        if before is not None and before[0] and not up:
            self._alarms.raise_("nic-down", f"{name} is down", now_s)
        elif before is not None and up and 0 < speed_mbit < before[1]:
            self._alarms.raise_("nic-slow", f"{name} runs at {speed_mbit} Mbit/s, and ran at {before[1]}", now_s)

    def _cgroup(self, values: dict[str, float], now_s: float, took_s: float | None) -> None:
        """The quota of the group and of those above it: time is counted where it is set, so the most throttled one tells."""
        worst = None
        for path in dict.fromkeys(cgroup_paths(_text(f"/proc/{self.pid or 'self'}/cgroup"))):
            stood_s = parse_cpu_stat(_text(path))
            grew = None if stood_s is None else self._grew(f"cgroup {path}", stood_s)
            if grew is not None and took_s is not None:
                worst = max(worst or 0.0, grew / took_s)
        if worst is not None:
            values["cgroup_throttled_ratio"] = worst
            if worst > THROTTLED_MAX:
                self._alarms.raise_("cpu-throttled", f"the cgroup's quota takes the processors away: {worst:.2f} s per second", now_s)

    def _kernel(self, values: dict[str, float], now_s: float, _took_s: float | None) -> None:
        for event in self._log.read():
            if event.kind in kernel_log.FATAL:
                self._kills.append(event)
            if event.kind == "nic-up":
                continue
            kind = nvml.xid_kind(event.code) if event.kind == "xid" else event.kind
            gpu = self._gpus.index_of(event.device) if event.kind == "xid" and self._gpus is not None else -1
            self._alarms.raise_(kind, f"{event.code} on GPU {gpu}" if gpu >= 0 else event.words, now_s, event=True)
        values["kernel_log_lost"] = self._log.lost

    def _gpu_part(self, values: dict[str, float], now_s: float, _took_s: float | None) -> None:
        asked_s = self._asked_s
        if asked_s is not None and now_s - asked_s > GPU_SILENT_S:
            self._alarms.raise_("gpu-driver", f"the GPU driver has not answered for {now_s - asked_s:.0f} s", now_s)
        values.update(self._gpu_values)
        while self._gpu_alarms:
            for kind, words in self._gpu_alarms.popleft().items():
                self._alarms.raise_(kind, words, now_s, event=True)


def _text(path: str | Path) -> str:
    """A small file of the kernel; "" where it cannot be read."""
    try:
        with open(path, "rb") as f:  # noqa: PTH123  /proc and /sys: a path that is read once a second
            return f.read(16384).decode(errors="replace")
    except OSError:
        return ""


def in_words(alarms: Mapping[str, str], kinds: Iterable[str] = ()) -> str:
    """For people: "xid: 79 on GPU 3; ecc: ..." of all kinds, or of these."""
    wanted = {*kinds}
    return "; ".join(f"{kind}: {words}" for kind, words in sorted(alarms.items()) if not wanted or kind in wanted)


if __name__ == "__main__":
    sampler = Sampler(paths=["/"])
    for _ in range(2):
        sampler.sample_gpus(time.monotonic())
        found = sampler.sample(time.monotonic())
        time.sleep(1.0)
    print(found)  # noqa: T201  `python -m ckptd.monitor.health`: this node, now
