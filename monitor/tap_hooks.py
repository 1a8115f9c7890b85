"""The tap by torch's own hooks (layer "hooks"): ProcessGroup.register_pre_hook and register_post_hook, of torch 2.14 and newer.

They fire below the dispatcher for every caller, like the kernels of the other layers, but they belong to one process group, and are called in Python. Source: pytorch PR
186300, torch/csrc/distributed/c10d/Hooks.hpp. Run with torch 2.14.1 over gloo. The trial at attach decides whether it is used.

Three operators share a name there: gathering into a list of tensors, into one tensor, and several tensors each into one; reduce_scatter likewise. Into a list, one side has as
many tensors more as there are members; else both have equally many.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from time import monotonic_ns
from typing import Any

import torch.distributed as dist
from torch._C._distributed_c10d import ProcessGroup

from ckptd.monitor.tap_kernels import FUNCTIONAL, Functional
from ckptd.monitor.tap_ops import BY_NAME
from ckptd.monitor.tap_seen import Entered, Seen, Waits

HOOK_ID = 0x636B7074
OPEN_MAX = 256
"""Operations between their hooks; more means that some raised and have no second one."""
NAMES = {
    "SEND": "send", "RECV": "recv_", "BROADCAST": "broadcast_", "ALLREDUCE": "allreduce_", "REDUCE": "reduce_", "ALLGATHER": "allgather_",
    "REDUCE_SCATTER": "reduce_scatter_", "ALLTOALL": "alltoall_", "BARRIER": "barrier", "SCATTER": "scatter_", "GATHER": "gather_",
    "ALLREDUCE_COALESCED": "allreduce_coalesced_", "ALLGATHER_BASE": "_allgather_base_", "ALLGATHER_COALESCED": "allgather_coalesced_",
    "ALLGATHER_INTO_TENSOR_COALESCED": "allgather_into_tensor_coalesced_", "REDUCE_SCATTER_BASE": "_reduce_scatter_base_",
    "REDUCE_SCATTER_TENSOR_COALESCED": "reduce_scatter_tensor_coalesced_", "ALLTOALL_BASE": "alltoall_base_",
}  # fmt: skip
FUNCTIONAL_CODES = frozenset(BY_NAME[name].code for name in FUNCTIONAL.values())
SHARED = {"allgather_": "allgather_into_tensor_coalesced_", "reduce_scatter_": "reduce_scatter_tensor_coalesced_", "allreduce_": "allreduce_coalesced_"}
"""What a name may mean besides; of one tensor, that is the plain operation again (`SINGLE`)."""


class Hooks:
    """The layer. Raises ImportError where torch has no such hooks."""

    def __init__(self, seen: Seen) -> None:
        if not hasattr(ProcessGroup, "register_pre_hook"):
            msg = "this torch has no hooks of process groups"
            raise ImportError(msg)
        self.seen, self.writer = seen, seen.writer
        self.coalesced, self.captured, self.last = seen.coalesced, seen.captured, seen.last
        self._recent: Any = None
        self._open: dict[tuple[int, int], Entered] = {}
        self._remove: list[Callable[[], None]] = []
        self._parts: list[Any] = []
        try:
            for pg in [*dist.distributed_c10d._world.pg_map]:  # noqa: SLF001  torch's own users of these hooks take it too
                self.watch(pg)
            self._watch_groups()
            self._parts.append(Waits(seen))
            self._parts.append(Functional(seen))
        except BaseException:
            self.remove()
            raise

    def watch(self, pg: Any) -> None:
        """Hook a group."""
        pg.register_pre_hook(HOOK_ID, functools.partial(self._before, pg))
        pg.register_post_hook(HOOK_ID, functools.partial(self._after, id(pg)))
        self._remove += [functools.partial(pg.unregister_pre_hook, HOOK_ID), functools.partial(pg.unregister_post_hook, HOOK_ID)]

    def _before(self, pg: Any, args: Any) -> None:
        if self.writer.off:
            return
        try:
            name = NAMES.get(args.name.name)
            if name is None:  # the making of groups
                return
            brought, got = args.input_tensors, args.output_tensors
            if name == "recv_" and args.root < 0:
                name = "recv_any_source_"
            elif name in SHARED and len(brought) == len(got) and pg.size() > 1:
                name = SHARED[name]
            op = BY_NAME[name]
            tensors = got if op.name == "scatter_" else brought or got
            entered = self.seen.enter(op, tensors, pg, args.root if op.p2p else -1, asynchronous=args.async_op)
            if op.p2p or (args.async_op and op.code in FUNCTIONAL_CODES):
                self.seen.remember(got or brought, entered[1])
            if len(self._open) >= OPEN_MAX:
                self._open.pop(next(iter(self._open)), None)
            self._open[id(pg), args.op_id] = entered
        except Exception:  # noqa: BLE001  a hook that raises fails the collective
            self.seen.failed()

    def _after(self, pg: int, args: Any) -> None:
        try:
            known = self._open.pop((pg, args.op_id), None)
            if known is not None:
                self._recent = args.work  # held, for its end may come before the caller has it, who is to be given the same object: its wait is found by that
                self.seen.began(known, args.work, monotonic_ns())
        except Exception:  # noqa: BLE001  counted; never into the user's code
            self.seen.failed()

    def _watch_groups(self) -> None:
        """Groups to come."""
        c10d: Any = dist.distributed_c10d
        original = c10d._new_process_group_helper  # noqa: SLF001  torch has no public name for it; the attach's self-test says if it is gone

        @functools.wraps(original)
        def making(*args: Any, **options: Any) -> Any:
            said = original(*args, **options)
            with contextlib.suppress(Exception):
                pg = said[0] if isinstance(said, tuple) else said
                if isinstance(pg, ProcessGroup):
                    self.watch(pg)
            return said

        c10d._new_process_group_helper = making  # noqa: SLF001  torch has no public name for it; the attach's self-test says if it is gone
        self._remove.append(functools.partial(setattr, c10d, "_new_process_group_helper", original))

    def remove(self) -> None:
        """Unhook."""
        for undo in reversed(self._remove):
            with contextlib.suppress(Exception):
                undo()
        for part in self._parts:
            part.remove()
