"""Callers in Python, seen by replaced methods of ProcessGroup: what they call passes here before it becomes an operation of the dispatcher.

A method of Python's that is replaced by a function costs a call; a kernel in Python at the dispatcher costs that torch packs and unpacks all arguments twice, which
takes longer than all that a tap does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
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
NAMES = (("tensors", "tensor", "output_tensors", "output_tensor"), ("input_tensors", "input_tensor", "input", "inputs", "input_list", "inputTensor"))
"""What tensors in the first and in the second place are called."""
PEERS = ("dstRank", "srcRank")
TENSORS = (list, tuple, Tensor)


class Method:
    """One method of ProcessGroup, seen. Of a subclass that is written in Python it is the original: pybind asks such an object for its method, and takes any function of Python's
    for an override, which would be called by what it calls. `subclassed` is told: what its operators become is seen below, or not at all."""

    def __init__(self, original: Any, seen: Any, subclassed: Callable[[], None]) -> None:
        self.original, self._seen, self._bind, self._subclassed = original, seen, seen.__get__, subclassed

    def __get__(self, pg: Any, owner: Any = None) -> Any:
        if type(pg) is ProcessGroup:
            return self._bind(pg)
        if pg is None:
            return self._seen
        self._subclassed()
        return self.original.__get__(pg, owner)


class Methods:
    """Replaced while this is on. `subclassed`: see Method."""

    def __init__(self, seen: Seen, subclassed: Callable[[], None]) -> None:
        self._ours: dict[str, Method] = {}
        for name, (op, tensors_at, peer_at) in METHODS.items():
            original = ProcessGroup.__dict__.get(name)
            if original is not None:
                reader = _reader(seen, BY_NAME[op], tensors_at, peer_at)
                self._ours[name] = Method(original, seen.recorded(original, reader, _work), subclassed)
                setattr(ProcessGroup, name, self._ours[name])

    def remove(self) -> None:
        """As before, but for what somebody replaced after us."""
        for name, ours in self._ours.items():
            if ProcessGroup.__dict__.get(name) is ours:
                setattr(ProcessGroup, name, ours.original)


def _reader(seen: Seen, op: Op, tensors_at: int, peer_at: int) -> Any:
    """What begins with a call of this method."""
    enter, p2p, asynchronous_by_default = seen.enter, op.p2p, op.name != "monitored_barrier_"

    def reader(args: Any, options: Any, now_ns: int) -> Entered | None:
        pg = args[0] if args else options.get("self")
        if type(pg) is not ProcessGroup:
            return None
        tensors, peer = None, -1
        if tensors_at >= 0:
            tensors = args[tensors_at + 1] if tensors_at + 1 < len(args) else _named(options, NAMES[tensors_at])
            if not isinstance(tensors, TENSORS):  # a call that is refused
                return None
        if p2p:
            if peer_at >= 0:
                peer = args[peer_at + 1] if peer_at + 1 < len(args) else _named(options, PEERS)
            return enter(op, tensors, pg, peer, asynchronous=True, now_ns=now_ns)
        last = options["opts"] if "opts" in options else args[-1] if args else None  # where options come, unless they are named
        return enter(op, tensors, pg, peer, asynchronous=getattr(last, "asyncOp", asynchronous_by_default), now_ns=now_ns)

    return reader


def _named(options: Any, names: tuple[str, ...]) -> Any:
    return next((options[n] for n in names if n in options), None)


def _work(said: Any, _i: int) -> Any:
    return said
