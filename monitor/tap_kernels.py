"""Callers in C++, seen by kernels in Python at the dispatch key BackendSelect, which all callers of an operator pass. Each call costs what torch takes to call Python, and more
where arguments are objects of its own, so operators are hooked only where nothing cheaper sees their callers.

    Functional    `_c10d_functional`: functional collectives, DTensor, compiled code; and the waits for what they return
    Operators     `c10d` itself: what is left is DDP's reducer and its like

Sources: torch/csrc/distributed/c10d/Ops.cpp and Functional.cpp (what is dispatched), ATen/core/dispatch (what BackendSelect is).
"""

from __future__ import annotations

from collections.abc import Callable
from time import monotonic_ns
from typing import Any

import torch
from torch._C import _distributed_c10d as c10d

from ckptd.monitor.tap_ops import BY_NAME, OPS, Op
from ckptd.monitor.tap_seen import NO_WORK, Entered, Seen

Library: Any = torch.library.Library
FUNCTIONAL = {
    "all_reduce": "allreduce_", "all_reduce_": "allreduce_", "all_reduce_coalesced": "allreduce_coalesced_", "all_reduce_coalesced_": "allreduce_coalesced_",
    "all_gather_into_tensor": "_allgather_base_", "all_gather_into_tensor_out": "_allgather_base_", "all_gather_into_tensor_coalesced": "allgather_into_tensor_coalesced_",
    "reduce_scatter_tensor": "_reduce_scatter_base_", "reduce_scatter_tensor_out": "_reduce_scatter_base_",
    "reduce_scatter_tensor_coalesced": "reduce_scatter_tensor_coalesced_", "all_to_all_single": "alltoall_base_", "broadcast": "broadcast_", "broadcast_": "broadcast_",
}  # fmt: skip
"""What functional collectives become. What they work on is their first argument; their group comes by name."""
AS_REAL = ("all_reduce", "all_gather_into_tensor", "reduce_scatter_tensor", "broadcast")
"""Those that send complex numbers as real ones."""
_AFTER = torch._C._dispatch_keyset_full_after(torch._C.DispatchKey.BackendSelect)  # noqa: SLF001  torch has no public name for it; the attach's trial says if it is gone


def _handing_on(op: Any) -> Any:
    """Calls what lies below. `op.redispatch` would pack all arguments once more."""
    redispatch, after = op._handle.redispatch_boxed, _AFTER  # noqa: SLF001  the public way is the slow one; the attach's trial says if this is gone

    def handing_on(keys: Any, *args: Any, **options: Any) -> Any:
        return redispatch(keys & after, *args, **options)

    return handing_on


def _all_of(library: str) -> set[str]:
    """Operators of a library, those without overloads."""
    names = (name.partition("::") for name in torch._C._dispatch_get_all_op_names())  # noqa: SLF001  torch has no public list of operators
    return {name for owner, _, name in names if owner == library and "." not in name}


def _names(op: Any) -> list[str]:
    return [a.name for a in op._schema.arguments]  # noqa: SLF001  an operator's schema has no public name


class Functional:
    """Kernels of `_c10d_functional`. `other`: called before what else there is (from 2.13: sends and receives), which is left to the operators that it calls; without it,
    only waits are seen, for somebody else sees the operations."""

    def __init__(self, seen: Seen, other: Callable[[], None] | None = None) -> None:
        self._seen = seen
        self._library: Any = Library("_c10d_functional", "IMPL")
        ops = torch.ops._c10d_functional  # noqa: SLF001  torch has no public name for it; the attach's trial says if it is gone
        self._impl("wait_tensor", self._waiting(ops.wait_tensor.default))
        if other is None:
            return
        for name in sorted(_all_of("_c10d_functional") - {"wait_tensor"}):
            op = getattr(ops, name).default
            if name in FUNCTIONAL:
                enter = self._reader(BY_NAME[FUNCTIONAL[name]], _names(op).index("group_name") + 1, other, real=name in AS_REAL)
                self._impl(name, seen.recorded(_handing_on(op), enter, self._outputs))
            elif "group_name" in _names(op):
                self._impl(name, self._first(other, op._handle.redispatch_boxed))  # noqa: SLF001  as in `_handing_on`

    def _impl(self, name: str, kernel: Any) -> None:
        self._library.impl(name, kernel, "BackendSelect", with_keyset=True)

    def _reader(self, op: Op, group_at: int, other: Callable[[], None], *, real: bool) -> Any:
        enter, unbox = self._seen.enter, c10d.ProcessGroup.unbox
        resolve: Any = c10d._resolve_process_group  # noqa: SLF001  torch has no public name for it; the attach's trial says if it is gone

        def reader(args: Any, _options: Any, now_ns: int) -> Entered | None:
            tensors, group = args[1], args[group_at]
            first = tensors if isinstance(tensors, torch.Tensor) else tensors[0]
            if first.is_meta:  # a compiler asks what would come of it
                return None
            pg = resolve(group) if type(group) is str else unbox(group)
            if type(pg) is not c10d.ProcessGroup:  # written in Python: what it calls is seen
                other()
                return None
            if real and first.is_complex():  # what travels is the same memory as real numbers
                tensors = torch.view_as_real(tensors.detach())
            return enter(op, tensors, pg, -1, asynchronous=True, now_ns=now_ns)

        return reader

    def _outputs(self, said: Any, i: int) -> Any:
        self._seen.remember(said, i)
        return NO_WORK

    def _first(self, first: Callable[[], None], redispatch: Any) -> Any:
        """Calls `first`, and hands on."""
        seen = self._seen

        def kernel(keys: Any, *args: Any, **options: Any) -> Any:
            try:
                first()
            except Exception:  # noqa: BLE001  never into the user's code
                seen.failed()
            return redispatch(keys & _AFTER, *args, **options)

        return kernel

    def _waiting(self, op: Any) -> Any:
        seen, writer, original = self._seen, self._seen.writer, _handing_on(op)

        def wait_tensor(keys: Any, tensor: Any) -> Any:
            i = None
            try:
                i = None if writer.off else seen.take_output(tensor)
            except Exception:  # noqa: BLE001  a tensor without storage
                seen.failed()
            if i is None:
                return original(keys, tensor)
            began_ns = monotonic_ns()
            try:
                said = original(keys, tensor)
            except BaseException:
                writer.waited(i, began_ns, done=True, failed=True)
                raise
            writer.waited(i, began_ns, done=not tensor.is_cuda)
            return said

        return wait_tensor

    def remove(self) -> None:
        """Unregister."""
        self._library._destroy()  # noqa: SLF001  a Library is unregistered by this, or when it is collected


class Operators:
    """Kernels of `c10d`, which `ops` is. What comes here out of a method or a functional collective is recorded there."""

    def __init__(self, seen: Seen, ops: Any) -> None:
        self._seen = seen
        self._library: Any = Library("c10d", "IMPL")
        for spec in OPS:
            packet = getattr(ops, spec.name, None)
            if packet is not None:
                self._library.impl(spec.name, seen.recorded(_handing_on(packet.default), self._reader(spec, packet.default), self._work), "BackendSelect", with_keyset=True)

    def _reader(self, spec: Op, op: Any) -> Any:
        """What begins with these arguments, which count from the keys."""
        names = ["", *_names(op)]
        defaults = {a.name: a.default_value for a in op._schema.arguments}  # noqa: SLF001  torch has no public name for it; the attach's trial says if it is gone
        group_at = names.index("process_group")
        peer_at = next((names.index(n) for n in ("dst", "src") if n in names), 0) if spec.p2p else 0
        async_at = names.index("async_op") if "async_op" in names else 0
        async_default = bool(defaults.get("async_op", True)) if async_at else spec.p2p
        inside = self._seen.inside
        enter, remember, unbox, tensors_at = self._seen.enter, self._seen.remember, c10d.ProcessGroup.unbox, max(spec.tensors, 0) + 1

        def reader(args: Any, _options: Any, now_ns: int) -> Entered | None:
            if inside.recorded:
                inside.recorded = False
                return None
            asynchronous = bool(args[async_at]) if 0 < async_at < len(args) else async_default
            entered = enter(spec, args[tensors_at], unbox(args[group_at]), args[peer_at] if peer_at else -1, asynchronous=asynchronous, now_ns=now_ns)
            if spec.p2p:  # a functional send or receive: its wait will be for the tensor
                remember(args[tensors_at], entered[1])
            return entered

        return reader

    @staticmethod
    def _work(said: Any, _i: int) -> Any:
        work = said[-1] if type(said) is tuple else said
        return None if work is None else c10d.Work.unbox(work)

    def remove(self) -> None:
        """Unregister."""
        self._library._destroy()  # noqa: SLF001  a Library is unregistered by this, or when it is collected
