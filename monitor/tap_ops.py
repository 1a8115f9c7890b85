"""What c10d's operations mean to a record, and the hashes that all members of a group must compute alike, whichever layer of the tap they run. Pure.

`native.cpp` holds the same table and the same hashes; tests/monitor/test_tap.py compares what both write of the same program.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field

from ckptd.monitor import record

MASK = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class Op:
    """One operator of torch's library `c10d`. `tensors`: which argument is measured. `even`: all members bring as many bytes, so they are part of the signature."""

    name: str
    code: int
    tensors: int
    even: bool = True
    p2p: bool = False
    coalesced: bool = False
    flags: int = field(init=False, default=0)
    """What each of its records has."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "flags", (record.P2P if self.p2p else 0) | (record.COALESCED if self.coalesced else 0))


def _code(name: str) -> int:
    return record.OPS.index(name)


OPS: tuple[Op, ...] = (
    Op("allreduce_", _code("all_reduce"), 0),
    Op("allreduce_coalesced_", _code("all_reduce_coalesced"), 0, coalesced=True),
    Op("broadcast_", _code("broadcast"), 0),
    Op("reduce_", _code("reduce"), 0),
    Op("allgather_", _code("all_gather"), 1, even=False),
    Op("_allgather_base_", _code("all_gather"), 1),
    Op("allgather_coalesced_", _code("all_gather_coalesced"), 1, even=False, coalesced=True),
    Op("allgather_into_tensor_coalesced_", _code("all_gather_coalesced"), 1, coalesced=True),
    Op("reduce_scatter_", _code("reduce_scatter"), 1, even=False),
    Op("_reduce_scatter_base_", _code("reduce_scatter"), 1),
    Op("reduce_scatter_tensor_coalesced_", _code("reduce_scatter_coalesced"), 1, coalesced=True),
    Op("alltoall_", _code("all_to_all"), 1, even=False),
    Op("alltoall_base_", _code("all_to_all"), 1, even=False),
    Op("gather_", _code("gather"), 1, even=False),
    Op("scatter_", _code("scatter"), 0, even=False),  # its input is the root's alone: what each receives
    Op("barrier", _code("barrier"), -1),
    Op("monitored_barrier_", _code("barrier"), -1),
    Op("send", _code("send"), 0, p2p=True),
    Op("recv_", _code("recv"), 0, p2p=True),
    Op("recv_any_source_", _code("recv_any"), 0, p2p=True),
)
BY_NAME = {op.name: op for op in OPS}
SINGLE = {
    coalesced: BY_NAME[plain]
    for coalesced, plain in (
        ("allreduce_coalesced_", "allreduce_"), ("allgather_into_tensor_coalesced_", "_allgather_base_"), ("reduce_scatter_tensor_coalesced_", "_reduce_scatter_base_"),
    )
}  # fmt: skip
"""What a coalesced operation of one tensor is called: functional collectives are of this kind, and torch's own hooks do not tell the two apart."""
WITH_FUTURE = frozenset(op.code for op in OPS if not op.p2p)
"""Codes whose Work usually has a future; the layers find out which has none."""


def mix(word: int) -> int:
    """SplitMix64's finaliser (Steele et al., OOPSLA 2014)."""
    z = (word + 0x9E3779B97F4A7C15) & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


@functools.lru_cache(1024)  # a program has few, and C++ does in nanoseconds what takes Python microseconds
def signature(code: int, dtype: int, nbytes: int) -> int:
    """Of one collective: what members must agree on. `nbytes`: 0 where they may differ."""
    return mix(((code << 56) | (dtype << 48)) ^ nbytes)


def history(before: int, sign: int) -> int:
    """The rolling hash after one more collective: `mix`, written out, for it is computed in each collective."""
    z = ((before ^ sign) + 0x9E3779B97F4A7C15) & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def group_key(name: str, ranks: Sequence[int]) -> int:
    """FNV-1a (64 bits) over the name and the sorted global ranks: equal on all members, whatever each calls the group locally. Never 0."""
    key = 0xCBF29CE484222325
    for byte in f"{name}|{','.join(map(str, sorted(ranks)))}".encode():
        key = ((key ^ byte) * 0x100000001B3) & MASK
    return key or 1
