"""Capture: from live tensors into a slot, without the trainer waiting.

Between the end of `optimizer.step(n)` and the start of `optimizer.step(n+1)` parameters and optimizer state do not change, so they are copied
then, beside forward and backward: on the CPU by a thread, on CUDA by a side stream into pinned slot memory. `fence` is called before the
next update: on the CPU it joins the thread, on CUDA the compute stream waits for the copy's event and the host goes on.

A guard reads each lazy tensor's version counter before and after: a change means that something else than the optimizer wrote (an EMA, a
clipped weight), and the snapshot is torn: void, never FILLED. Fused optimizers and `.data` writes do not move the counter (measured, torch 2.13),
so the fence is what makes optimizers safe, and `paranoid` hashes the sources before and after for those who doubt.

Tried and left: ctypes.memmove per tensor (re-takes the GIL once per tensor; the foreach call does it once per batch).
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import xxhash
from torch import Tensor

log = logging.getLogger("ckptd.capture")

FAILED = "the copy itself failed"
"""Stands where names of torn tensors stand."""
BATCH_BYTES = 64 << 20
"""Copied in one call: a few milliseconds, so that a fence or a close never waits for more than it needs."""


Batch = tuple[list[Tensor], list[Tensor]]
"""Places and sources that are copied in one call."""


@dataclass(eq=False, slots=True)
class Capture:
    """One snapshot being copied: live sources and their places in the slot. `finish(torn names)` is called once, from the copier's thread.

    `cut`: the same tensors in batches, prepared ahead: the copier's thread then holds the GIL for microseconds.
    """

    sources: Sequence[Tensor]
    places: Sequence[Tensor]
    names: Sequence[str]
    cut: Sequence[Batch]
    finish: Callable[[list[str]], None]
    paranoid: bool = False
    replicas: Sequence[tuple[str, Tensor]] = ()
    """Tensors that other ranks hold too, to be hashed while they stand still, by their keys."""
    hashes: dict[str, int] = field(default_factory=dict)
    """Of those, once they are made: before `finish`."""
    sums: list[tuple[str, Tensor]] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)
    digests: list[int] = field(default_factory=list)
    done: threading.Event = field(default_factory=threading.Event)
    event: torch.cuda.Event | None = None
    verdict: list[str] | None = None

    def arm(self) -> None:
        """Note what the guard compares with; on the trainer's thread, before it goes on."""
        self.versions = [t._version for t in self.sources]  # noqa: SLF001  the version counter has no public name
        if self.paranoid:
            self.digests = [hash_of(t) for t in self.sources]

    def torn(self) -> list[str]:
        """Names of the tensors that changed since `arm`."""
        moved = {n for n, t, v in zip(self.names, self.sources, self.versions, strict=True) if t._version != v}  # noqa: SLF001
        if self.paranoid:
            moved |= {n for n, t, d in zip(self.names, self.sources, self.digests, strict=True) if hash_of(t) != d}
        return sorted(moved)


def hash_of(tensor: Tensor) -> int:
    """xxh3-64 of a tensor's elements."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return xxhash.xxh3_64_intdigest(flat.view(torch.uint8).numpy().data) if flat.numel() else 0


def sum_of(tensor: Tensor) -> Tensor:
    """A hash that a device makes of its own memory, as an int64 there: words weighted by odd numbers, so that each bit and each place counts."""
    data = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    words = torch.nn.functional.pad(data, (0, -data.numel() % 4)).view(torch.int32).to(torch.int64)
    weights = torch.arange(1, 2 * words.numel(), 2, device=words.device, dtype=torch.int64) * 0x9E3779B1
    return (words * weights).sum()


def copy_batch(places: list[Tensor], sources: list[Tensor]) -> None:
    """Copy tensors into their places; one call, so that the GIL is given up once."""
    if places:
        torch._foreach_copy_(places, sources)


def batches(places: Sequence[Tensor], sources: Sequence[Tensor], batch_bytes: int = BATCH_BYTES) -> list[Batch]:
    """Cut parallel lists into batches of about `batch_bytes`; 0: one tensor each."""
    out: list[tuple[list[Tensor], list[Tensor]]] = []
    room = 0
    for place, source in zip(places, sources, strict=True):
        if room <= 0:
            out.append(([], []))
            room = batch_bytes
        out[-1][0].append(place)
        out[-1][1].append(source)
        room -= place.nbytes
    return out


class CpuCopier:
    """A thread that copies host tensors. At most one capture is in flight: the fence sees to it."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[Capture | None] = queue.SimpleQueue()
        self._current: Capture | None = None
        self._thread = threading.Thread(target=self._run, name="ckptd-copier", daemon=True)
        self._thread.start()

    def start(self, capture: Capture) -> None:
        """Begin; returns at once."""
        capture.arm()
        self._current = capture
        self._queue.put(capture)

    def fence(self, timeout_s: float | None = None) -> bool:
        """Nothing is read from the sources any more when this returns True. False: the deadline passed.

        Without a deadline it waits for as long as the copier lives: it is our own copy of our own memory.
        """
        current = self._current
        return current is None or _join(current, self._thread, timeout_s)

    join = fence
    """On the CPU the fence is the end of the copy; see CudaCopier."""

    def close(self) -> None:
        """End the thread after what it is doing."""
        self._queue.put(None)
        self._thread.join(timeout=5.0)

    def _run(self) -> None:
        while (capture := self._queue.get()) is not None:
            _settle(capture, lambda c=capture: self._copy(c))  # type: ignore[misc]  # mypy cannot type a lambda's default
            del capture  # an idle thread must not keep the last snapshot's tensors alive

    @staticmethod
    def _copy(capture: Capture) -> list[str]:
        with torch.no_grad():
            for places, sources in capture.cut:
                copy_batch(places, sources)
            try:
                capture.hashes = {key: hash_of(t) for key, t in capture.replicas}
            except (RuntimeError, TypeError) as e:  # they are compared another time, or never; the snapshot is whole
                log.warning("replicas cannot be hashed: %s", e)
        return capture.torn()


class CudaCopier:
    """A side stream that copies device tensors into pinned memory, and a thread that waits for its events.

    The guard's verdict is taken by the fence, on the host, before the update is enqueued: the thread would see the update's own writes.
    Not run on this project's CPU machines; `tests/gpu` holds its tests.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._queue: queue.SimpleQueue[Capture | None] = queue.SimpleQueue()
        self._current: Capture | None = None
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="ckptd-copier", daemon=True)
        self._thread.start()

    def start(self, capture: Capture) -> None:
        """Enqueue the copies behind everything that the compute stream has been given; returns at once."""
        capture.arm()
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.no_grad(), torch.cuda.stream(self._stream):
            for place, source in zip(capture.places, capture.sources, strict=True):
                place.copy_(source, non_blocking=True)
            capture.sums = [(key, sum_of(t)) for key, t in capture.replicas]
            capture.event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            capture.event.record(self._stream)
        self._current = capture
        self._queue.put(capture)

    def fence(self, timeout_s: float | None = None) -> bool:  # noqa: ARG002  the host never waits here
        """The compute stream waits for the copies; the host does not. What the guard has seen until now is its verdict."""
        current = self._current
        if current is not None and current.event is not None:
            torch.cuda.current_stream(self._device).wait_event(current.event)
            self._judge(current)
        return True

    def join(self, timeout_s: float | None = None) -> bool:
        """The copies are done and the slot is flipped when this returns True. False: the deadline passed."""
        current = self._current
        return current is None or _join(current, self._thread, timeout_s)

    def close(self) -> None:
        """End the thread after what it is doing."""
        self._queue.put(None)
        self._thread.join(timeout=5.0)

    def _judge(self, capture: Capture) -> list[str]:
        with self._lock:
            if capture.verdict is None:
                capture.verdict = capture.torn()
            return capture.verdict

    def _run(self) -> None:
        while (capture := self._queue.get()) is not None:
            _settle(capture, lambda c=capture: self._wait(c))  # type: ignore[misc]  # as above
            del capture

    def _wait(self, capture: Capture) -> list[str]:
        if capture.event is not None:
            capture.event.synchronize()
        capture.hashes = {key: int(s) % (1 << 64) for key, s in capture.sums}
        return self._judge(capture)


def _settle(capture: Capture, work: Callable[[], list[str]]) -> None:
    """Copier's thread: do the work, finish the capture, open the fence - in this order, so that once an update has begun the step before it is
    safe - and survive whatever happens: a dead copier would hang the next fence."""
    try:
        try:
            torn = work()
        except Exception:  # of the copy: costs this snapshot
            log.exception("a copy failed; its snapshot is void")
            torn = [FAILED]
        capture.finish(torn)
    except Exception:  # of the flip or the telling: the fence must open all the same
        log.exception("a capture could not be finished")
    finally:
        capture.done.set()


def _join(capture: Capture, thread: threading.Thread, timeout_s: float | None) -> bool:
    until_s = None if timeout_s is None else time.monotonic() + timeout_s
    while not capture.done.wait(0.5 if until_s is None else max(0.0, min(0.5, until_s - time.monotonic()))):
        if not thread.is_alive() or (until_s is not None and time.monotonic() >= until_s):
            return not thread.is_alive()
    return True


Copier = CpuCopier | CudaCopier


def copier_for(tensors: Sequence[Tensor]) -> Copier:
    """The copier for where the state lives."""
    device = next((t.device for t in tensors if t.is_cuda), None)
    return CpuCopier() if device is None else CudaCopier(device)


def pin(memory: memoryview) -> bool:
    """Register memory as pinned where there is CUDA, so that copies into it are asynchronous. False where it is not, or refused."""
    if not torch.cuda.is_available():
        return False
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    return int(torch.cuda.cudart().cudaHostRegister(address, len(memory), 0)) == 0  # type: ignore[no-untyped-call]


def unpin(memory: memoryview) -> None:
    """Undo `pin`."""
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    with contextlib.suppress(RuntimeError):
        torch.cuda.cudart().cudaHostUnregister(address)  # type: ignore[no-untyped-call]
