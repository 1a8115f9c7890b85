"""What NVIDIA's driver says of this node's GPUs, through NVML: Xids, ECC, throttling, clocks, temperature, power, PCIe replays, NVLink, remapped and retired rows.

The module is nvidia-ml-py's `pynvml` (`pip install 'ckptd[gpu]'`); without it, without a driver or without a device there is nothing, and no error. Constants and meanings are NVML's
(docs.nvidia.com, "NVML API Reference Guide"). Every question is asked by itself: a device that does not know the answer answers the others.

Threads: all calls may block for as long as the driver does (seconds, where a GPU is falling off the bus). Use it from one pool thread; `health.Sampler` does.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

GPUS_MAX = 64
XIDS_MAX = 64
"""Events taken per look."""
LINKS_MAX = 36
BAD_THROTTLES = {0x08: "hardware slowdown", 0x20: "thermal limit (software)", 0x40: "thermal limit (hardware)", 0x80: "power brake"}
"""nvmlClocksEventReason*: those that no setting of the operator explains."""
POWER_CAP = 0x04
"""SwPowerCap: usual under full load; a number, no alarm."""
XIDS_OF_THE_PROGRAM = frozenset({13, 31, 43, 45, 68, 69})
"""Those that a program causes itself, or that follow from its end: no fault of the device."""


@dataclass(slots=True)
class _Gpu:
    handle: Any
    bus: str
    links: tuple[int, ...] = ()
    counters: dict[str, float] = field(default_factory=dict)
    lost: bool = False


def module() -> Any:
    """pynvml, or None."""
    try:
        return importlib.import_module("pynvml")
    except Exception:  # noqa: BLE001  whatever a foreign module does when it loads
        return None


class Gpus:
    """All GPUs of the node. `nvml`: pynvml, or what answers like it. Never raises."""

    def __init__(self, nvml: Any = None) -> None:
        self._nvml = nvml
        self._gpus: list[_Gpu] = []
        self._events: Any = None
        if nvml is None or self._ask("nvmlInit", default=self) is self:
            return
        for index in range(min(int(self._ask("nvmlDeviceGetCount") or 0), GPUS_MAX)):
            handle = self._ask("nvmlDeviceGetHandleByIndex", index)
            if handle is not None:
                self._gpus.append(_Gpu(handle, self._bus_of(handle), self._links_of(handle)))
        self._listen()

    def __len__(self) -> int:
        return len(self._gpus)

    def index_of(self, bus: str) -> int:
        """The GPU at a PCI address such as "0000:3b:00"; -1: none of these."""
        short = bus.lower().split(".")[0].removeprefix("0000")[-8:].lstrip(":")
        return next((i for i, g in enumerate(self._gpus) if g.bus and g.bus.split(".")[0].endswith(short)), -1)

    def sample(self) -> tuple[dict[str, float], dict[str, str]]:
        """(values, alarms) of all of them: alarms are what holds now, and what was counted or said since the last time."""
        values: dict[str, float] = {}
        alarms: dict[str, str] = {}
        for i, gpu in enumerate(self._gpus):
            self._one(i, gpu, values, alarms)
        for gpu_index, xid in self._xids():
            _add(alarms, xid_kind(xid), f"{xid} on GPU {gpu_index}")
        return values, alarms

    def _one(self, i: int, gpu: _Gpu, values: dict[str, float], alarms: dict[str, str]) -> None:
        n, h = self._nvml, gpu.handle
        gpu.lost = False
        levels: dict[str, Callable[[], Any]] = {
            "temperature_c": lambda: n.nvmlDeviceGetTemperature(h, n.NVML_TEMPERATURE_GPU),
            "power_w": lambda: n.nvmlDeviceGetPowerUsage(h) / 1000,
            "sm_clock_mhz": lambda: n.nvmlDeviceGetClockInfo(h, n.NVML_CLOCK_SM),
            "sm_clock_max_mhz": lambda: n.nvmlDeviceGetMaxClockInfo(h, n.NVML_CLOCK_SM),
        }
        for name, question in levels.items():
            self._put(values, f"gpu{i}_{name}", self._ask(question, gpu=gpu))
        reasons = self._reasons(gpu)
        if reasons is not None:
            values[f"gpu{i}_throttled"] = float(bool(reasons & sum(BAD_THROTTLES)))
            values[f"gpu{i}_power_capped"] = float(bool(reasons & POWER_CAP))
            words = [w for bit, w in BAD_THROTTLES.items() if reasons & bit]
            if words:
                _add(alarms, "gpu-throttled", f"GPU {i}: {', '.join(words)}")
        self._counters(i, gpu, values, alarms)
        if gpu.lost:
            _add(alarms, "gpu-lost", f"GPU {i} does not answer: it fell off the bus, or was reset")

    def _counters(self, i: int, gpu: _Gpu, values: dict[str, float], alarms: dict[str, str]) -> None:
        """What only grows: told as a number, and as an alarm where it grew."""
        for name, kind, what, question, least in self._questions(gpu):
            now = self._ask(question, gpu=gpu)
            if now is None:
                continue
            values[f"gpu{i}_{name}"] = float(now)
            before = gpu.counters.get(name)
            gpu.counters[name] = float(now)
            if before is not None and now - before >= least:
                _add(alarms, kind, f"GPU {i}: {now - before:.0f} {what}")

    def _questions(self, gpu: _Gpu) -> list[tuple[str, str, str, Callable[[], Any], int]]:
        """(name, kind of alarm, what is counted, question, how many more are an alarm)."""
        n, h = self._nvml, gpu.handle

        def ecc(kind: str) -> Callable[[], Any]:
            return lambda: n.nvmlDeviceGetTotalEccErrors(h, getattr(n, f"NVML_MEMORY_ERROR_TYPE_{kind}"), n.NVML_VOLATILE_ECC)

        def links(counter: str) -> Callable[[], Any]:
            return lambda: sum(int(n.nvmlDeviceGetNvLinkErrorCounter(h, link, getattr(n, f"NVML_NVLINK_ERROR_DL_{counter}"))) for link in gpu.links)

        def retired(cause: str) -> Callable[[], Any]:
            return lambda: len(n.nvmlDeviceGetRetiredPages(h, getattr(n, f"NVML_PAGE_RETIREMENT_CAUSE_{cause}")))

        nvlink = [
            ("nvlink_replays", "nvlink", "NVLink replays", links("REPLAY"), 100),
            ("nvlink_recoveries", "nvlink", "NVLink recoveries", links("RECOVERY"), 1),
            ("nvlink_crc_errors", "nvlink", "NVLink CRC errors", links("CRC_FLIT"), 100),
        ]
        return [
            ("ecc_uncorrected", "ecc", "uncorrectable memory errors", ecc("UNCORRECTED"), 1),
            ("ecc_corrected", "ecc-corrected", "corrected memory errors", ecc("CORRECTED"), 100),
            ("pcie_replays", "pcie", "PCIe replays", lambda: n.nvmlDeviceGetPcieReplayCounter(h), 10),
            ("rows_remapped", "row-remapped", "memory rows were remapped", lambda: sum(int(x) for x in n.nvmlDeviceGetRemappedRows(h)[:2]), 1),
            ("rows_failed", "row-remapped", "memory rows could not be remapped", lambda: int(n.nvmlDeviceGetRemappedRows(h)[3]), 1),
            ("pages_retired", "row-remapped", "memory pages were retired", retired("DOUBLE_BIT_ECC_ERROR"), 1),
            *(nvlink if gpu.links else []),
        ]

    def _reasons(self, gpu: _Gpu) -> int | None:
        """Clock event reasons, as newer and as older drivers call them."""
        for name in ("nvmlDeviceGetCurrentClocksEventReasons", "nvmlDeviceGetCurrentClocksThrottleReasons"):
            found = self._ask(name, gpu.handle, gpu=gpu)
            if found is not None:
                return int(found)
        return None

    def _listen(self) -> None:
        """Be told of Xids, where the driver tells anybody."""
        self._events = self._ask("nvmlEventSetCreate") if self._gpus else None
        kinds = getattr(self._nvml, "nvmlEventTypeXidCriticalError", 8)
        for gpu in self._gpus if self._events is not None else ():
            self._ask("nvmlDeviceRegisterEvents", gpu.handle, kinds, self._events)

    def _xids(self) -> list[tuple[int, int]]:
        """(GPU, Xid) that were told since the last time; the device is -1 where it is none of ours."""
        found: list[tuple[int, int]] = []
        wait = "nvmlEventSetWait_v2" if hasattr(self._nvml, "nvmlEventSetWait_v2") else "nvmlEventSetWait"
        while self._events is not None and len(found) < XIDS_MAX:
            event = self._ask(wait, self._events, 0)
            if event is None:
                break
            bus = self._bus_of(getattr(event, "device", None))
            found.append((next((i for i, g in enumerate(self._gpus) if g.bus == bus), -1), int(event.eventData)))
        return found

    def _bus_of(self, handle: Any) -> str:
        info = self._ask("nvmlDeviceGetPciInfo", handle) if handle is not None else None
        bus = getattr(info, "busId", "")
        return (bus.decode(errors="replace") if isinstance(bus, bytes) else str(bus)).lower()

    def _links_of(self, handle: Any) -> tuple[int, ...]:
        """NVLinks that are up."""
        return tuple(link for link in range(LINKS_MAX) if self._ask("nvmlDeviceGetNvLinkState", handle, link))

    def _ask(self, question: str | Callable[..., Any], *args: Any, gpu: _Gpu | None = None, default: Any = None) -> Any:
        """The answer; `default` where there is none. `question`: a function of the module, or one that asks it. One that returns nothing answers None."""
        try:
            return (getattr(self._nvml, question) if isinstance(question, str) else question)(*args)
        except Exception as e:  # noqa: BLE001  NVMLError of many kinds, and AttributeError where the module is older than this
            if gpu is not None and type(e).__name__ in {"NVMLError_GpuIsLost", "NVMLError_ResetRequired"}:
                gpu.lost = True
            return default

    @staticmethod
    def _put(values: dict[str, float], name: str, value: Any) -> None:
        if value is not None:
            values[name] = float(value)


def xid_kind(xid: int) -> str:
    """Of alarm: "xid-program" says something of a crash, and nothing of the device."""
    return "xid-program" if xid in XIDS_OF_THE_PROGRAM else "xid"


def _add(alarms: dict[str, str], kind: str, words: str) -> None:
    """Several of a kind are one alarm."""
    alarms[kind] = f"{alarms[kind]}; {words}" if kind in alarms else words
