"""Callers in Python, seen by replaced methods of ProcessGroup: what they call passes here before it becomes an operation of the dispatcher.

A method of Python's that is replaced by a function costs a call; a kernel in Python at the dispatcher costs that torch packs and unpacks all arguments twice, which
takes longer than all that a tap does.
"""

from __future__ import annotations

from typing import Any

from torch._C._distributed_c10d import ProcessGroup

from ckptd.monitor.tap_ops import BY_NAME, Op
from ckptd.monitor.tap_seen import Entered, Seen

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
"""Method of ProcessGroup: (operator, where its tensors are, where its peer is), counted without self; -1: nowhere."""


class Methods:
    """Replaced while this is on."""

    def __init__(self, seen: Seen) -> None:
        self._originals: dict[str, Any] = {}
        for name, (op, tensors_at, peer_at) in METHODS.items():
            original = ProcessGroup.__dict__.get(name)
            if original is not None:
                self._originals[name] = original
                setattr(ProcessGroup, name, seen.recorded(original, _reader(seen, BY_NAME[op], tensors_at + 1, peer_at + 1), _work))

    def remove(self) -> None:
        """As before, but for what somebody replaced after us."""
        for name, original in self._originals.items():
            if getattr(getattr(ProcessGroup, name), "__wrapped__", None) is original:
                setattr(ProcessGroup, name, original)


def _reader(seen: Seen, op: Op, tensors_at: int, peer_at: int) -> Any:
    """What begins with a call of this method. Places count from self; 0: nowhere."""
    enter, p2p = seen.enter, op.p2p

    def reader(args: Any, options: Any, now_ns: int) -> Entered:
        given = (*args, *options.values()) if options else args
        asynchronous = p2p or getattr(given[-1], "asyncOp", True)  # the options come last; without them, c10d's own are asynchronous
        tensors = given[tensors_at] if 0 < tensors_at < len(given) else None
        return enter(op, tensors, args[0], given[peer_at] if peer_at else -1, asynchronous=asynchronous, now_ns=now_ns)

    return reader


def _work(said: Any, _i: int) -> Any:
    return said
