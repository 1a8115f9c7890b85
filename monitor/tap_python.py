"""The tap without C++: kernels of the library `c10d` at the dispatch key BackendSelect, which every caller passes (layer "python"); or, where that fails,
replaced methods of ProcessGroup, which calls from Python pass (layer "patched").

Both end in `Seen`, which turns arguments into records. When an operation is done is learned from `Work.wait` (replaced while the tap is on), from
`_c10d_functional.wait_tensor`, and, where nobody is sure to wait (asynchronous callers, the reducer of DDP), from the work's future.

Sources: torch/csrc/distributed/c10d/Ops.cpp (what is dispatched), ATen/core/dispatch (what BackendSelect is).
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from time import monotonic_ns
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import ProcessGroup, Work

from ckptd.monitor import record
from ckptd.monitor.tap_ops import BY_NAME, OPS, SINGLE, Op, group_key
from ckptd.monitor.tap_writer import Writer

PENDING_MAX = 64
"""Works held because their end is not known yet; past that, those that are done are let go, then the oldest."""
OUTPUTS_MAX = 256
DTYPES = {
    torch.uint8: "u8", torch.int8: "i8", torch.int16: "i16", torch.int32: "i32", torch.int64: "i64", torch.float16: "f16", torch.float32: "f32",
    torch.float64: "f64", torch.bfloat16: "bf16", torch.bool: "bool", torch.complex64: "c64", torch.complex128: "c128",
    torch.float8_e4m3fn: "f8", torch.float8_e5m2: "f8", torch.float8_e4m3fnuz: "f8", torch.float8_e5m2fnuz: "f8",
}  # fmt: skip
_DTYPE_CODES = {dtype: record.DTYPES.index(name) for dtype, name in DTYPES.items()}
_OTHER = record.DTYPES.index("other")
_ASYNC, _DEVICE = record.ASYNC, record.DEVICE
Failed = Callable[[], None]
Library: Any = torch.library.Library
WORK: Any = Work
"""Untyped on purpose: what follows replaces its methods."""


def measure(x: Any) -> tuple[int, int, bool]:
    """(bytes, dtype code, on a device) of a tensor, a list of them, or a list of lists."""
    if type(x) is list and len(x) == 1:  # nearly always
        x = x[0]
    if isinstance(x, torch.Tensor):
        return x.nbytes, _DTYPE_CODES.get(x.dtype, _OTHER), not x.is_cpu
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


class Seen:
    """Operations, works and groups as Python meets them. Errors of its own are counted by `failed`, never raised."""

    def __init__(self, writer: Writer, failed: Failed) -> None:
        self.writer = writer
        self.failed = failed
        self._groups: dict[int, tuple[weakref.ref[Any], int, list[int]]] = {}
        self._works: dict[int, tuple[Any, int, bool]] = {}
        self._outputs: dict[int, int] = {}
        self._no_future: set[tuple[int, bool]] = set()
        self._recent: Any = None

    def coalesced(self, by: int) -> None:
        """A coalesced batch begins (1) or ended (-1)."""
        self.writer.coalescing = record.COALESCED if by > 0 else 0

    def captured(self, by: int) -> None:
        """The capture of a CUDA graph begins (1) or ended (-1)."""
        self.writer.capturing = record.CAPTURED if by > 0 else 0

    def last(self, work: Any, *, device: bool) -> None:
        """The work of a coalesced batch: its wait is its last operation's."""
        self._works[id(work)] = work, max(self.writer.records - 1, 0), device

    def row(self, pg: Any) -> tuple[int, list[int]]:
        """The group's row in the ring, and its members."""
        known = self._groups.get(id(pg))
        if known is not None and known[0]() is pg:
            return known[1], known[2]
        members = members_of(pg)
        row = self.writer.group(group_key(pg.group_name, members), pg.size(), pg.rank(), members)
        if len(self._groups) > 4 * record.GROUPS_MAX:
            self._groups = {k: v for k, v in self._groups.items() if v[0]() is not None}
        self._groups[id(pg)] = weakref.ref(pg), row, members
        return row, members

    def enter(self, op: Op, tensors: Any, pg: Any, peer: int, *, asynchronous: bool, now_ns: int = 0) -> tuple[int, bool]:
        """An operation begins: (its record, whether it is on a device). `peer`: a rank of the group. `now_ns`: when, if it was read already."""
        if op.coalesced and len(tensors) == 1:
            op = SINGLE.get(op.name, op)
        row, members = self.row(pg)
        nbytes, dtype, device = (0, 0, False) if tensors is None else measure(tensors)
        if op.tensors < 0:  # a barrier's tensor says only where
            nbytes = dtype = 0
        flags = op.flags
        if asynchronous:
            flags |= _ASYNC
        if device:
            flags |= _DEVICE
        there = members[peer] if 0 <= peer < len(members) else -1
        return self.writer.enter(row, op.code, dtype, nbytes, flags, there, nbytes if op.even else 0, now_ns), device

    def began(self, op: Op, i: int, work: Any, now_ns: int, *, device: bool, asynchronous: bool) -> None:
        """The call returned, with this work."""
        self.writer.returned(i, now_ns)
        if work is None:
            self.writer.ended(i)
            return
        self._works[id(work)] = work, i, device
        self._recent = work  # held, so that the caller is given the same object and its wait finds it
        if len(self._works) > PENDING_MAX:
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
            known = self._works.get(number)
            if known is not None and known[1] == i:
                self._works[number] = weakref.ref(known[0]), i, known[2]  # whoever waits for it later holds it
            failed = False
            try:
                future.value()
            except Exception:  # noqa: BLE001  whatever the operation failed with
                failed = True
            self.writer.ended(i, failed=failed)

        future.add_done_callback(done)

    def _sweep(self) -> None:
        for number, (work, i, device) in [*self._works.items()]:
            if isinstance(work, weakref.ref):
                if work() is None:
                    self._works.pop(number, None)
            elif not device and work.is_completed():
                self._works.pop(number, None)
                self.writer.ended(i)
        while len(self._works) > PENDING_MAX:
            self._works.pop(next(iter(self._works)), None)

    def take(self, work: Any) -> tuple[int, bool] | None:
        """The record of a work that is waited for, once: (index, on a device)."""
        known = self._works.pop(id(work), None)
        if known is None or (known[0] is not work and not (isinstance(known[0], weakref.ref) and known[0]() is work)):
            return None
        return known[1:]

    def take_output(self, tensor: Any) -> int | None:
        """The record whose output this is, once."""
        return self._outputs.pop(tensor.untyped_storage()._cdata, None)  # noqa: SLF001  torch has no public name for it; the attach's self-test says if it is gone


class Waits:
    """`Work.wait` and `wait_tensor`, replaced so that waiting is seen."""

    def __init__(self, seen: Seen) -> None:
        self.seen = seen
        self._original = WORK.wait
        WORK.wait = self._waiting(WORK.wait)
        self._library: Any = None

    def _waiting(self, original: Any) -> Any:
        seen, writer = self.seen, self.seen.writer

        @functools.wraps(original)
        def wait(work: Any, *args: Any, **options: Any) -> Any:
            known = None if writer.off else seen.take(work)
            if known is None:
                return original(work, *args, **options)
            began_ns = monotonic_ns()
            try:
                said = original(work, *args, **options)
            except BaseException:
                writer.waited(known[0], began_ns, done=True, failed=True)
                raise
            writer.waited(known[0], began_ns, done=not known[1])
            return said

        return wait

    def functional(self) -> None:
        """Also those of functional collectives."""
        seen, writer = self.seen, self.seen.writer
        op = torch.ops._c10d_functional.wait_tensor.default  # noqa: SLF001  torch has no public name for it; the attach's self-test says if it is gone
        below = torch._C._dispatch_keyset_full_after(torch._C.DispatchKey.BackendSelect)  # noqa: SLF001  torch has no public name for it; the attach's self-test says if it is gone

        def wait_tensor(keys: Any, tensor: Any) -> Any:
            i = None
            try:
                i = None if writer.off else seen.take_output(tensor)
            except Exception:  # noqa: BLE001  a tensor without storage
                seen.failed()
            if i is None:
                return op.redispatch(keys & below, tensor)
            began_ns = monotonic_ns()
            said = op.redispatch(keys & below, tensor)
            writer.waited(i, began_ns, done=not tensor.is_cuda)
            return said

        self._library = Library("_c10d_functional", "IMPL")
        self._library.impl("wait_tensor", wait_tensor, "BackendSelect", with_keyset=True)

    def remove(self) -> None:
        """As before, unless somebody replaced it after us."""
        if getattr(WORK.wait, "__wrapped__", None) is self._original:
            WORK.wait = self._original
        if self._library is not None:
            self._library._destroy()  # noqa: SLF001  torch has no public name for it; the attach's self-test says if it is gone
            self._library = None


class Kernels:
    """Layer "python"."""

    def __init__(self, seen: Seen) -> None:
        self.seen, self.writer = seen, seen.writer
        self.coalesced, self.captured, self.last = seen.coalesced, seen.captured, seen.last
        self._library: Any = Library("c10d", "IMPL")
        self._below = torch._C._dispatch_keyset_full_after(torch._C.DispatchKey.BackendSelect)  # noqa: SLF001  torch has no public name for it; the attach's self-test says if it is gone
        for spec in OPS:
            packet = getattr(torch.ops.c10d, spec.name, None)
            if packet is not None:
                self._library.impl(spec.name, self._kernel(spec, packet.default), "BackendSelect", with_keyset=True)
        self.waits = Waits(seen)
        self.waits.functional()

    def _kernel(self, spec: Op, op: Any) -> Any:
        names = [a.name for a in op._schema.arguments]  # noqa: SLF001  torch has no public name for it; the attach's self-test says if it is gone
        defaults = {a.name: a.default_value for a in op._schema.arguments}  # noqa: SLF001  torch has no public name for it; the attach's self-test says if it is gone
        group_at = names.index("process_group")
        peer_at = next((names.index(n) for n in ("dst", "src") if n in names), -1)
        async_at = names.index("async_op") if "async_op" in names else -1
        functional = spec.code in FUNCTIONAL
        async_default = bool(defaults.get("async_op", True)) if async_at >= 0 else spec.p2p
        seen, writer, below, redispatch = self.seen, self.seen.writer, self._below, op._handle.redispatch_boxed  # noqa: SLF001  `op.redispatch` packs all arguments once more, in every collective; without it this layer is not taken
        unbox, unbox_work, tensors_at = ProcessGroup.unbox, Work.unbox, max(spec.tensors, 0)

        def kernel(keys: Any, *args: Any) -> Any:
            if writer.off:
                return redispatch(keys & below, *args)
            i, device, asynchronous = -1, False, async_default
            began_ns = monotonic_ns()
            try:
                asynchronous = bool(args[async_at]) if 0 <= async_at < len(args) else async_default
                peer = args[peer_at] if peer_at >= 0 else -1
                i, device = seen.enter(spec, args[tensors_at], unbox(args[group_at]), peer, asynchronous=asynchronous, now_ns=began_ns)
            except Exception:  # noqa: BLE001  never into the user's code
                seen.failed()
            called_ns = 0 if i & 63 else monotonic_ns()
            try:
                said = redispatch(keys & below, *args)
            except BaseException:
                if i >= 0:
                    writer.returned(i, monotonic_ns())
                    writer.ended(i, failed=True)
                raise
            if i >= 0:
                try:
                    back_ns = monotonic_ns()
                    work = said[-1] if type(said) is tuple else said
                    seen.began(spec, i, None if work is None else unbox_work(work), back_ns, device=device, asynchronous=asynchronous)
                    if asynchronous and functional:
                        seen.remember(args[0], i)
                    if called_ns:
                        writer.hook_ns(64 * (called_ns - began_ns + monotonic_ns() - back_ns))
                except Exception:  # noqa: BLE001  counted; never into the user's code
                    seen.failed()
            return said

        return kernel

    def remove(self) -> None:
        """Unregister."""
        self._library._destroy()  # noqa: SLF001  torch has no public name for it; the attach's self-test says if it is gone
        self.waits.remove()


FUNCTIONAL = frozenset(
    record.OPS.index(n)
    for n in (
        "all_reduce", "broadcast", "all_gather", "reduce_scatter", "all_to_all", "all_reduce_coalesced", "all_gather_coalesced", "reduce_scatter_coalesced",
    )
)  # fmt: skip
"""What functional collectives end in."""

# method of ProcessGroup: (operator, where its tensors are, where its peer is), counted without self
METHODS: dict[str, tuple[str, int, int]] = {
    "allreduce": ("allreduce_", 0, -1),
    "allreduce_coalesced": ("allreduce_coalesced_", 0, -1),
    "broadcast": ("broadcast_", 0, -1),
    "reduce": ("reduce_", 0, -1),
    "allgather": ("allgather_", 1, -1),
    "_allgather_base": ("_allgather_base_", 1, -1),
    "all_gather_single": ("_allgather_base_", 1, -1),
    "allgather_coalesced": ("allgather_coalesced_", 1, -1),
    "allgather_into_tensor_coalesced": ("allgather_into_tensor_coalesced_", 1, -1),
    "reduce_scatter": ("reduce_scatter_", 1, -1),
    "_reduce_scatter_base": ("_reduce_scatter_base_", 1, -1),
    "reduce_scatter_single": ("_reduce_scatter_base_", 1, -1),
    "reduce_scatter_tensor_coalesced": ("reduce_scatter_tensor_coalesced_", 1, -1),
    "all_gather_single_coalesced": ("allgather_into_tensor_coalesced_", 1, -1),
    "reduce_scatter_single_coalesced": ("reduce_scatter_tensor_coalesced_", 1, -1),
    "alltoall": ("alltoall_", 1, -1),
    "alltoall_base": ("alltoall_base_", 1, -1),
    "all_to_all_single": ("alltoall_base_", 1, -1),
    "gather": ("gather_", 1, -1),
    "scatter": ("scatter_", 0, -1),
    "barrier": ("barrier", -1, -1),
    "monitored_barrier": ("monitored_barrier_", -1, -1),
    "send": ("send", 0, 1),
    "recv": ("recv_", 0, 1),
    "recv_anysource": ("recv_any_source_", 0, -1),
}


class Patches:
    """Layer "patched": the methods of ProcessGroup. Calls from C++ (DDP's reducer, functional collectives) pass it by."""

    def __init__(self, seen: Seen) -> None:
        self.seen, self.writer = seen, seen.writer
        self.coalesced, self.captured, self.last = seen.coalesced, seen.captured, seen.last
        self._originals: dict[str, Any] = {}
        for name, (op, tensors_at, peer_at) in METHODS.items():
            original = ProcessGroup.__dict__.get(name)
            if original is not None:
                self._originals[name] = original
                setattr(ProcessGroup, name, self._method(BY_NAME[op], original, tensors_at, peer_at))
        self.waits = Waits(seen)

    def _method(self, spec: Op, original: Any, tensors_at: int, peer_at: int) -> Any:
        seen, writer = self.seen, self.seen.writer

        @functools.wraps(original)
        def method(pg: Any, *args: Any, **options: Any) -> Any:
            if writer.off:
                return original(pg, *args, **options)
            i, device, asynchronous = -1, False, spec.p2p
            try:
                asynchronous = bool(next((a.asyncOp for a in args if hasattr(a, "asyncOp")), spec.p2p))
                tensors = args[tensors_at] if 0 <= tensors_at < len(args) else next(iter(options.values()), None) if tensors_at >= 0 else None
                peer = args[peer_at] if 0 <= peer_at < len(args) else -1
                i, device = seen.enter(spec, tensors, pg, peer, asynchronous=asynchronous)
            except Exception:  # noqa: BLE001  counted; never into the user's code
                seen.failed()
            try:
                work = original(pg, *args, **options)
            except BaseException:
                if i >= 0:
                    writer.returned(i, monotonic_ns())
                    writer.ended(i, failed=True)
                raise
            if i >= 0:
                try:
                    seen.began(spec, i, work, monotonic_ns(), device=device, asynchronous=asynchronous)
                except Exception:  # noqa: BLE001  counted; never into the user's code
                    seen.failed()
            return work

        return method

    def remove(self) -> None:
        """As before."""
        for name, original in self._originals.items():
            setattr(ProcessGroup, name, original)
        self.waits.remove()
