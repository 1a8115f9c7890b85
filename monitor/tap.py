"""The tap: sees every collective and send of this rank, and writes the ring. In the trainer; nothing of it can fail or delay a step.

    attach() -> Tap      make the ring, take the best layer that works, hook the marks
    current()            the process's tap, if there is one

Layers, best first: "native" (C++ at the dispatcher; `tap_build` builds it), "hooks" (torch's own, from 2.14, called in Python), "python" (methods of Python's callers, kernels
for those in C++), "patched" (methods alone). Each is tried on an operation of its own, alone, before it is believed.

CKPTD_DISABLE=1: nothing at all. CKPTD_TAP=0: no tap; native, python, patched, hooks: this layer and no other. CKPTD_RING_RECORDS: how many records a ring holds.

Threads: attach and close by one; the rest by any. A forked child has no tap: it writes nothing. Errors of the tap's own are counted; at ERRORS_MAX it goes silent.
"""

from __future__ import annotations

import atexit
import contextlib
import datetime as dt
import logging
import os
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from ckptd.errors import BadArgument
from ckptd.monitor import nccl, record
from ckptd.monitor.marks import Marks
from ckptd.monitor.ring import Ring
from ckptd.monitor.tap_writer import Writer, fill_header

if TYPE_CHECKING:
    from ckptd.monitor.tap_native import NativeWriter

log = logging.getLogger("ckptd.tap")

ERRORS_MAX, AT_STEPS_MAX = 16, 8
SCRATCH_RECORDS = 64
_ONE = threading.Lock()
_current: Tap | None = None


class Tap:
    """One rank's tap. Made by `attach`."""

    def __init__(self, rank: int, world_size: int, capacity: int) -> None:
        self.ring = Ring.create(capacity)
        self.rank = rank
        self.pid = os.getpid()
        self.layer = "none"
        self.writer: Writer | NativeWriter = Writer(self.ring)
        self.at_steps: deque[Callable[[], None]] = deque(maxlen=AT_STEPS_MAX)
        """Called once each, by the thread that trains: one at the end of each step, so that no step pays for all."""
        self.on_close: Callable[[], None] | None = None
        """The line's."""
        self.over = False
        """It failed too often, or was closed: it does not come back."""
        self._layer: Any = None
        self._batches: Any = None
        fill_header(self.ring, rank, world_size, 0)
        self.marks = Marks(self.writer, self.failed, self._stepped)

    def install(self, names: tuple[str, ...]) -> None:
        """The first of these layers that works."""
        for name in names:
            scratch = Ring.create(SCRATCH_RECORDS)
            try:
                layer = LAYERS[name](self, scratch)
            except Exception as e:  # noqa: BLE001  whatever is missing, the next is tried
                log.debug("tap %s: %s: %s", name, type(e).__name__, e)
                continue
            if self._sees(layer, scratch):
                self._take(name, layer)
                break
            log.debug("tap %s: did not see its own operation", name)
            with contextlib.suppress(Exception):
                layer.remove()
        self.ring.header["layer"] = record.LAYERS.index(self.layer)
        self.marks.install()

    def _take(self, name: str, layer: Any) -> None:
        from ckptd.monitor.tap_batches import Batches

        getattr(layer, "seen", layer.writer).use(self.ring)
        self._layer, self.layer = layer, name
        self.writer = self.marks.writer = layer.writer
        with contextlib.suppress(Exception):
            self._batches = Batches(layer, self.failed)

    def _sees(self, layer: Any, scratch: Ring) -> bool:
        """Whether the layer records an operation of its own, on a group of one rank and a ring of its own."""
        try:
            group = group_of_one()
            if group is None:
                return True  # nothing to try it with
            import torch

            if hasattr(layer, "watch"):
                layer.watch(group)
            group.allreduce([torch.zeros(3)]).wait()
            expected = [(record.OPS.index("all_reduce"), 12, 1, True)]
            if hasattr(layer, "trial"):
                layer.trial(group)
                expected.append((record.OPS.index("broadcast"), 12, 2, True))
            told = [(int(r["op"]), int(r["bytes"]), int(r["seq"]), int(r["ended_ns"]) > 0) for r in scratch.read(0).records]
        except Exception as e:  # noqa: BLE001  whatever it was, the layer is not to be trusted
            log.debug("tap: its trial failed: %s", e)
            return False
        return told == expected

    def identify(self, job: str, attempt: int) -> None:
        """Write what is known of the job into the ring."""
        self.ring.header["job"], self.ring.header["attempt"] = job.encode()[: record.JOB_BYTES], attempt

    def failed(self) -> None:
        """Something in the tap went wrong: count it, and at ERRORS_MAX be silent."""
        with contextlib.suppress(Exception):
            if self.writer.error() == ERRORS_MAX:
                self.over = self.writer.off = True
                log.warning("rank %d: the tap failed %d times and is off; training is not affected: %r", self.rank, ERRORS_MAX, sys.exception())

    def watch(self, watching: bool) -> None:  # noqa: FBT001  what the daemon said
        """The daemon reads the ring, or was told not to: then nothing is written."""
        self.writer.off = self.over or not watching or int(self.ring.header["errors"][0]) >= ERRORS_MAX

    def _stepped(self) -> None:
        if self.at_steps:
            self.at_steps.popleft()()

    def finished(self, *, over: bool) -> None:
        """The process group ended in good order (or began anew): silence is no hang."""
        self.ring.header["done"] = record.GOOD if over else 0

    def ending(self) -> None:
        """The interpreter ends; whether by an exception that nobody caught, is told by what it left in `sys`."""
        raised = getattr(sys, "last_value", None) is not None and os.getpid() == self.pid and not self.over
        self.close()
        if raised:
            self.ring.header["done"] = record.RAISED

    def close(self) -> None:
        """Unhook; the ring stays readable for who has it."""
        global _current  # noqa: PLW0603  one tap per process
        if os.getpid() != self.pid:
            return
        self.finished(over=True)
        self.over = self.writer.off = True
        self.marks.remove()
        if self.on_close is not None:
            self.on_close()
        if self._batches is not None:
            self._batches.remove()
        if self._layer is not None:
            with contextlib.suppress(Exception):
                self._layer.remove()
            self._layer = None
        if _current is self:
            _current = None


def group_of_one() -> Any:
    """A process group of this rank alone, outside torch's tables; None where there is no gloo."""
    import torch
    from torch._C import _distributed_c10d as c10d

    if not hasattr(c10d, "ProcessGroupGloo"):
        return None
    store = c10d.HashStore()
    backend = c10d.ProcessGroupGloo(store, 0, 1, dt.timedelta(seconds=10))
    group: Any = c10d.ProcessGroup(store, 0, 1)
    group._register_backend(torch.device("cpu"), c10d.ProcessGroup.BackendType.GLOO, backend)  # noqa: SLF001  as new_group does
    group._set_default_backend(c10d.ProcessGroup.BackendType.GLOO)  # noqa: SLF001  torch has no public name for it; the attach's self-test says if it is gone
    group._set_group_name("ckptd-tap")  # noqa: SLF001  torch has no public name for it; the attach's self-test says if it is gone
    return group


def _native(_tap: Tap, ring: Ring) -> Any:
    from ckptd.monitor import tap_native

    return tap_native.Native(ring)


def _hooks(tap: Tap, ring: Ring) -> Any:
    from ckptd.monitor import tap_hooks, tap_seen

    return tap_hooks.Hooks(tap_seen.Seen(Writer(ring), tap.failed))


def _python(tap: Tap, ring: Ring) -> Any:
    from ckptd.monitor import tap_python, tap_seen

    return tap_python.Python(tap_seen.Seen(Writer(ring), tap.failed))


def _patched(tap: Tap, ring: Ring) -> Any:
    from ckptd.monitor import tap_python, tap_seen

    return tap_python.Patched(tap_seen.Seen(Writer(ring), tap.failed))


LAYERS: dict[str, Callable[[Tap, Ring], Any]] = {"native": _native, "hooks": _hooks, "python": _python, "patched": _patched}


def wanted() -> tuple[str, ...]:
    """The layers to try, by the environment; none: no tap."""
    chosen = os.environ.get("CKPTD_TAP", "")
    if os.environ.get("CKPTD_DISABLE", "") == "1" or chosen == "0":
        return ()
    return (chosen,) if chosen in LAYERS else tuple(LAYERS)


def current() -> Tap | None:
    """This process's tap."""
    return _current


def attach() -> Tap | None:
    """This process's tap, made now if there is none and torch's default process group exists. Never raises."""
    global _current  # noqa: PLW0603  one tap per process
    names = wanted()
    if not names:
        return None
    with _ONE:
        if _current is not None:
            return _current
        try:
            import torch.distributed as dist

            if not (dist.is_available() and dist.is_initialized()):
                return None
            capacity = int(os.environ.get("CKPTD_RING_RECORDS", record.CAPACITY_DEFAULT))
            tap = Tap(dist.get_rank(), dist.get_world_size(), capacity)
            tap.install(names)
            os.register_at_fork(after_in_child=lambda: _forked(tap))
            atexit.register(tap.ending)
            _current = tap
            nccl.attach(tap.ring)
        except Exception:  # a job without a tap is a job all the same
            log.debug("no tap", exc_info=True)
        return _current


PHASES = ("eval", "checkpoint", "data", "compile", "restore", "train")


@contextlib.contextmanager
def phase(kind: str) -> Iterator[None]:
    """What the training loop does meanwhile is known to be no straggling: `with ckptd.phase("eval"): ...`; kinds: PHASES. Raises BadArgument for another.

    Costs a microsecond, and nothing where no tap is; may be nested; any thread.
    """
    if kind not in PHASES:
        msg = f"phase({kind!r}): there are {', '.join(PHASES)}"
        raise BadArgument(msg)
    with interval(record.MARKS.index(kind)):
        yield


def interval(kind: int) -> contextlib.AbstractContextManager[None]:
    """An interval mark of this process's tap, if there is one."""
    its = _current
    return contextlib.nullcontext() if its is None else its.marks.interval(kind)


def report_loss(loss: Any, grad_norm: Any = None) -> None:
    """Have a loss (and the gradients' norm) looked at: one that is no number becomes a finding. Does not wait for a device. Never raises; any thread."""
    its = _current
    if its is None:
        return
    try:
        its.marks.loss(loss, record.BAD_LOSS)
        its.marks.loss(grad_norm, record.BAD_GRAD)
    except Exception:  # noqa: BLE001  a loss of a kind that we cannot read
        its.failed()


def stepped(number: int) -> None:
    """The session ended a step of this number."""
    its = _current
    if its is None:
        return
    try:
        its.marks.step(number)
    except Exception:  # noqa: BLE001  counted; never into the user's step
        its.failed()


def _forked(tap: Tap) -> None:
    global _current  # noqa: PLW0603  one tap per process
    tap.over = tap.writer.off = True
    if _current is tap:
        _current = None
