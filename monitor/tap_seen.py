"""What the layers of the tap that are written in Python share: operations, works and groups as Python meets them, turned into records.

    Seen      turns arguments into records; learns when an operation is done; `recorded` makes a function that does what another does, and records it
    Waits     `Work.wait`, replaced so that waiting is seen

When an operation is done is learned from `Work.wait` (replaced while the tap is on), from `_c10d_functional.wait_tensor` (`tap_kernels`), and, where nobody is sure
to wait (asynchronous callers, the reducer of DDP), from the work's future.

Threads: any; of two that wait for one work, one is told of.
"""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Callable
from time import monotonic_ns
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import Work

from ckptd.monitor import record
from ckptd.monitor.ring import Ring
from ckptd.monitor.tap_ops import SINGLE, Op, group_key
from ckptd.monitor.tap_writer import Writer

PENDING_MAX = 64
"""Works held because their end is not known yet; past that, those that are done are let go, then the oldest."""
OUTPUTS_MAX = 256
"""Outputs of functional operations that nobody has waited for yet; the oldest are forgotten."""
DTYPES = {
    torch.uint8: "u8", torch.int8: "i8", torch.int16: "i16", torch.int32: "i32", torch.int64: "i64", torch.float16: "f16", torch.float32: "f32",
    torch.float64: "f64", torch.bfloat16: "bf16", torch.bool: "bool", torch.complex64: "c64", torch.complex128: "c128",
    torch.float8_e4m3fn: "f8", torch.float8_e5m2: "f8", torch.float8_e4m3fnuz: "f8", torch.float8_e5m2fnuz: "f8",
}  # fmt: skip
_DTYPE_CODES = {dtype: record.DTYPES.index(name) for dtype, name in DTYPES.items()}
_OTHER = record.DTYPES.index("other")
_ASYNC, _DEVICE = record.ASYNC, record.DEVICE
SAMPLED = 63
"""Operations whose index has none of these bits, one in 64, have their time in the tap measured."""
NO_WORK = object()
"""Instead of the Work of a functional operation, which stays in C++: only the wait for its output, or a later operation of its group, says that it is done."""
Failed = Callable[[], None]
Ref: Any = weakref.ref
WORK: Any = Work
"""Untyped on purpose: what follows replaces its methods."""


def measure(x: Any) -> tuple[int, int, bool]:
    """(bytes, dtype code, on a device) of a tensor, a list of them, or a list of lists."""
    if type(x) is list and len(x) == 1:  # nearly always
        x = x[0]
    if isinstance(x, torch.Tensor):
        return x.numel() * x.itemsize, _DTYPE_CODES.get(x.dtype, _OTHER), not x.is_cpu
    if not x:
        return 0, 0, False
    nbytes, dtype, device = measure(x[0])
    for i in range(1, len(x)):
        nbytes += measure(x[i])[0]
    return nbytes, dtype, device


def members_of(pg: Any) -> list[int]:
    """Global ranks of a process group, in its own order; its local ranks where torch does not say."""
    known = dist.distributed_c10d._world.pg_group_ranks.get(pg)  # noqa: SLF001  the public question refuses groups that are being made
    if known:
        return [rank for rank, _ in sorted(known.items(), key=lambda item: item[1])]
    return list(range(pg.size()))


Entered = tuple[Op, int, bool, bool]
"""An operation that began: what it is, its record, whether it is on a device, and asynchronous. (A bare tuple: one with names takes as long to make as all that is in it.)"""


class Inside(threading.local):
    """Of a thread. `recorded`: the next operator that it comes to is recorded already."""

    recorded = False


class Seen:
    """Operations, works and groups as Python meets them. Errors of its own are counted by `failed`, never raised."""

    def __init__(self, writer: Writer, failed: Failed) -> None:
        self.writer = writer
        self.failed = failed
        self._groups: dict[int, tuple[weakref.ref[Any], int, list[int]]] = {}
        self.works: dict[int, tuple[Any, int, bool]] = {}
        """By their address: the work (a reference to it, once it is done), its record, whether it is on a device."""
        self._outputs: dict[int, int] = {}
        self._no_future: set[tuple[int, bool]] = set()
        self.inside = Inside()

    def use(self, ring: Ring) -> None:
        """Write there from now on: what was seen before is in another ring."""
        with self.writer.lock:
            self.writer.use(ring)
            self._groups = {}
            self.works.clear()
            self._outputs.clear()

    def coalesced(self, by: int) -> None:
        """A coalesced batch begins (1) or ended (-1)."""
        self.writer.coalescing = record.COALESCED if by > 0 else 0

    def captured(self, by: int) -> None:
        """The capture of a CUDA graph begins (1) or ended (-1)."""
        self.writer.capturing = record.CAPTURED if by > 0 else 0

    def last(self, work: Any, *, device: bool) -> None:
        """The work of a coalesced batch: its wait is its last operation's."""
        self.works[id(work)] = work, max(self.writer.records - 1, 0), device

    def row(self, pg: Any) -> tuple[int, list[int]]:
        """The group's row in the ring, and its members."""
        known = self._groups.get(id(pg))
        if known is not None and known[0]() is pg:
            return known[1], known[2]
        members = members_of(pg)
        row = self.writer.group(group_key(pg.group_name, members), pg.size(), pg.rank(), members)
        if len(self._groups) > 4 * record.GROUPS_MAX:
            self._groups = {k: v for k, v in self._groups.items() if v[0]() is not None}
        self._groups[id(pg)] = Ref(pg), row, members
        return row, members

    def recorded(self, original: Any, enter: Callable[[Any, Any, int], Entered | None], work_of: Callable[[Any, int], Any]) -> Any:
        """A function that does what `original` does, and records it; what goes wrong in here is counted, and never reaches who calls.

        `enter(args, options, now_ns)`: what begins with these arguments; None: nothing that is to be recorded. `work_of(said, i)`: the Work in what was returned, if any.
        """
        writer, began, failed, inside = self.writer, self.began, self.failed, self.inside

        @functools.wraps(original)
        def recorded(*args: Any, **options: Any) -> Any:
            if writer.off:
                return original(*args, **options)
            entered = None
            began_ns = monotonic_ns()
            try:
                entered = enter(args, options, began_ns)
            except Exception:  # noqa: BLE001  never into the user's code
                failed()
            if entered is None:
                return original(*args, **options)
            i = entered[1]
            called_ns = 0 if i & SAMPLED else monotonic_ns()
            before, inside.recorded = inside.recorded, True
            try:
                said = original(*args, **options)
            except BaseException:
                writer.returned(i, monotonic_ns())
                writer.ended(i, failed=True)
                raise
            finally:
                inside.recorded = before
            back_ns = monotonic_ns()
            try:
                began(entered, work_of(said, i), back_ns)
                if called_ns:
                    writer.hook_ns((SAMPLED + 1) * (called_ns - began_ns + monotonic_ns() - back_ns))
            except Exception:  # noqa: BLE001  counted; never into the user's code
                failed()
            return said

        return recorded

    def enter(self, op: Op, tensors: Any, pg: Any, peer: int, *, asynchronous: bool, now_ns: int = 0) -> Entered:
        """An operation begins. `peer`: a rank of the group. `now_ns`: when, if it was read already."""
        if op.coalesced and len(tensors) == 1:
            op = SINGLE.get(op.name, op)
        row, members = self.row(pg)
        if tensors is None:
            nbytes, dtype, device = 0, 0, False
        else:
            nbytes, dtype, device = measure(tensors)
            if op.tensors < 0:  # a barrier's tensor says only where
                nbytes = dtype = 0
        flags = op.flags
        if asynchronous:
            flags |= _ASYNC
        if device:
            flags |= _DEVICE
        there = members[peer] if 0 <= peer < len(members) else -1
        return op, self.writer.enter(row, op.code, dtype, nbytes, flags, there, nbytes if op.even else 0, now_ns), device, asynchronous

    def began(self, entered: Entered, work: Any, now_ns: int) -> None:
        """The call returned, with this work; NO_WORK: it has one, which Python does not see."""
        op, i, device, asynchronous = entered
        self.writer.returned(i, now_ns)
        if work is NO_WORK:
            return
        if work is None:
            self.writer.ended(i)
            return
        self.works[id(work)] = work, i, device
        if len(self.works) > PENDING_MAX:
            self._sweep()
        if asynchronous and not device and (op.code, op.even) not in self._no_future:
            self._follow(op, i, work)

    def remember(self, outputs: Any, i: int) -> None:
        """wait_tensor is asked about outputs, not works."""
        if isinstance(outputs, torch.Tensor):
            if len(self._outputs) >= OUTPUTS_MAX:
                self._outputs.pop(next(iter(self._outputs)), None)
            self._outputs[outputs.untyped_storage()._cdata] = i  # noqa: SLF001  an address that identifies it
            return
        for x in outputs:
            self.remember(x, i)

    def _follow(self, op: Op, i: int, work: Any) -> None:
        try:
            future = work.get_future()
        except RuntimeError:  # not implemented: torch makes this error slowly, so it is asked once
            self._no_future.add((op.code, op.even))
            return
        number = id(work)

        def done(future: Any) -> None:
            if self.writer.off:
                return
            known = self.works.get(number)
            if known is not None and known[1] == i:
                self.works[number] = Ref(known[0]), i, known[2]  # whoever waits for it later holds it
            failed = False
            try:
                future.value()
            except Exception:  # noqa: BLE001  whatever the operation failed with
                failed = True
            self.writer.ended(i, failed=failed)

        future.add_done_callback(done)

    def _sweep(self) -> None:
        for number, (work, i, device) in [*self.works.items()]:
            if type(work) is Ref:
                if work() is None:
                    self.works.pop(number, None)
            elif not device and work.is_completed():
                self.works.pop(number, None)
                self.writer.ended(i)
        while len(self.works) > PENDING_MAX:
            self.works.pop(next(iter(self.works)), None)

    def take_output(self, tensor: Any) -> int | None:
        """The record whose output this is, once."""
        return self._outputs.pop(tensor.untyped_storage()._cdata, None)  # noqa: SLF001  torch has no public name for it; the attach's self-test says if it is gone


class Waits:
    """`Work.wait`, replaced so that waiting is seen."""

    def __init__(self, seen: Seen) -> None:
        self._seen = seen
        self._original = WORK.wait
        WORK.wait = self._waiting(WORK.wait)

    def _waiting(self, original: Any) -> Any:
        works, writer, waited = self._seen.works, self._seen.writer, self._seen.writer.waited

        @functools.wraps(original)
        def wait(work: Any, *args: Any, **options: Any) -> Any:
            known = works.pop(id(work), None)  # told of once
            if known is None or writer.off or (known[0] is not work and not (type(known[0]) is Ref and known[0]() is work)):
                return original(work, *args, **options)
            began_ns = monotonic_ns()
            try:
                said = original(work, *args, **options)
            except BaseException:
                waited(known[1], began_ns, done=True, failed=True)
                raise
            waited(known[1], began_ns, done=not known[2])
            return said

        return wait

    def remove(self) -> None:
        """As before, unless somebody replaced it after us."""
        if getattr(WORK.wait, "__wrapped__", None) is self._original:
            WORK.wait = self._original
