"""The bytes of a ring: what the tap writes about each collective, and how a reader finds its way. Drawn once here; `ring.h` says the same to C++.

    page 0                      HEADER: who writes (rank, process), how many records were claimed, what the process is at just now
    GROUPS_AT                   GROUPS_MAX rows of GROUP: the last operation entered and the last one done, per process group
    RANKS_AT                    RANKS_MAX words: members of the groups, by global rank
    RECORDS_AT                  `capacity` (a power of two) records of 64 bytes

One process writes, any number read, nobody locks:

- a writer claims record `i = head++`, clears the word `commit` of place i % capacity, fills the record, and last stores `commit = i + 1`;
- what becomes known later (returned, ended, waited) is stored only while `commit == i + 1` still holds;
- a reader copies, and looks at `commit` again: a record that moved meanwhile is dropped, and counted. It never waits;
- a row of GROUP has a `version`, odd while it is written.

Words are aligned and of at most 8 bytes, single stores on every 64-bit machine. Times are CLOCK_MONOTONIC nanoseconds of the node: they are never compared with
another node's.

An *operation* is a collective or a send or receive; a *mark* is a record with the flag MARK: an interval (or a moment) of the step's life.
"""

from __future__ import annotations

import numpy as np

MAGIC = int.from_bytes(b"CKPDRNG1", "little")
VERSION = 1
PAGE_BYTES = 4096
GROUPS_MAX = 64
"""Process groups of one rank; more are not tabled (`group` = NO_GROUP) and counted in `untabled`."""
RANKS_MAX = 16384
CAPACITY_DEFAULT = 8192
CAPACITY_MIN, CAPACITY_MAX = 64, 1 << 20
NO_GROUP = 255
EVERYBODY = 0xFFFFFFFF
"""`ranks_at` of a group that is all ranks, 0 to size - 1, or whose members found no room."""
JOB_BYTES = 256

HEADER = np.dtype(
    [
        ("magic", "<u8"),
        ("version", "<u4"),
        ("capacity", "<u4"),
        ("rank", "<u4"),
        ("world_size", "<u4"),
        ("local_rank", "<u4"),
        ("pid", "<u4"),
        ("pid_start", "<u8"),  # field 22 of /proc/pid/stat: a pid is used again, this pair is not
        ("attempt", "<u8"),
        ("head", "<u8"),  # records claimed since the ring was made
        ("step", "<u8"),  # steps ended, or the number that the session gave the last one
        ("groups", "<u4"),  # rows of GROUP in use
        ("untabled", "<u4"),
        ("layer", "<u4"),  # which tap writes: LAYERS
        ("phases", "<u4"),  # a bit per mark kind whose interval is open now
        ("phase_ns", "<u8"),  # when the newest of them began
        ("errors", "<u8"),  # failures of the tap itself; past a limit it switches itself off
        ("hook_ns", "<u8"),  # time spent in the tap, sampled 1 in 64 and scaled
        ("device_lost", "<u8"),  # device timings that found no free pair of events
        ("ranks_used", "<u4"),
        ("device", "<i4"),  # CUDA device index, -1 on CPU
        ("job", f"S{JOB_BYTES}"),
        ("thread", "<u4"),  # kernel id of the thread that trains
        ("done", "<u4"),  # GOOD: the tap was closed in good order, its silence is no hang; RAISED: the interpreter ends because of an exception
    ],
)
GROUP = np.dtype(
    [
        ("key", "<u8"),  # the same on all members: hash of members and name
        ("size", "<u4"),
        ("mine", "<u4"),  # this rank's place in the group
        ("ranks_at", "<u4"),
        ("local_id", "<u4"),
        ("entered", "<u8"),  # collectives entered; the sequence number of the newest, counted from 1
        ("entered_ns", "<u8"),
        ("done", "<u8"),  # newest sequence number known to be done
        ("done_ns", "<u8"),
        ("history", "<u8"),  # rolling hash over the signatures of all collectives: equal sequence numbers must have equal ones
        ("signature", "<u8"),  # of the newest: hash of operation, bytes and dtype (bytes: 0 where members may differ)
        ("bytes", "<u8"),
        ("op", "u1"),
        ("dtype", "u1"),
        ("p2p_op", "u1"),
        ("p2p_open", "u1"),  # 1 while the newest send or receive is not known to be done
        ("p2p_peer", "<i4"),  # its other end, a global rank
        ("p2p_entered", "<u8"),
        ("p2p_ns", "<u8"),
        ("p2p_done", "<u8"),
        ("version", "<u8"),
        ("spare", "<u8"),
    ]
)
RECORD = np.dtype(
    [
        ("commit", "<u8"),
        ("entered_ns", "<u8"),
        ("returned_ns", "<u8"),  # the host was free of it: the call's return, later the return of the last wait for it
        ("ended_ns", "<u8"),  # known to be done; 0: in flight, or not known
        ("bytes", "<u8"),  # of the input; of a mark: its value
        ("seq", "<u4"),  # of the group's collectives, or of its sends and receives; counted from 1
        ("step", "<u4"),
        ("group", "u1"),
        ("op", "u1"),
        ("dtype", "u1"),
        ("flags", "u1"),
        ("peer", "<i4"),
        ("waited_us", "<u4"),  # the host stood in waits for it; of a STEP: its thread waited for a processor since the last STEP
        ("inside_us", "<u4"),  # on the device, from its turn in the stream to its end; 0: not timed. Of a STEP: its thread used a processor; 0: not known
    ]
)

GROUPS_AT = PAGE_BYTES
RANKS_AT = GROUPS_AT + GROUPS_MAX * GROUP.itemsize
RECORDS_AT = RANKS_AT + RANKS_MAX * 4

P2P, ASYNC, FAILED, DEVICE, COALESCED, MARK, WAITED, CAPTURED = (1 << i for i in range(8))
"""Flags. WAITED: waits for this work were seen. CAPTURED: recorded into a CUDA graph, not run now."""

OPS = (
    "?", "all_reduce", "reduce", "broadcast", "all_gather", "reduce_scatter", "all_to_all", "gather", "scatter", "barrier", "send", "recv",
    "all_reduce_coalesced", "all_gather_coalesced", "reduce_scatter_coalesced", "recv_any",
)  # fmt: skip
DTYPES = ("?", "u8", "i8", "i16", "i32", "i64", "f16", "f32", "f64", "bf16", "bool", "c64", "c128", "f8", "other")

MARKS = ("step", "optimizer", "data", "gc", "checkpoint", "eval", "compile", "loss", "restore", "probe", "train", "nccl")
"""Kinds of marks. step: its end (a moment; value: its number, or 0 if nobody numbers them). loss: value has BAD_* bits. data: the loop waited
for its loader. checkpoint: ckptd's own part of a step, or a save that the user marked. train: an interval that the user marked as a step's work. nccl: what NCCL ran
without a call of c10d (a CUDA graph's replay), and what its proxies waited for; `nccl_profiler.c` says which words mean what. Operations that c10d entered have one
record, the tap's: the profiler plugin adds `inside_us` and `ended_ns` to it and counts nothing twice."""
STEP, OPTIMIZER, DATA, GC, CHECKPOINT, EVAL, COMPILE, LOSS, RESTORE, PROBE, TRAIN, NCCL = range(len(MARKS))
GOOD, RAISED = 1, 2
"""Values of `done`. 0 in the ring of a dead process: it was killed, and had no time to say anything."""
NUMBERED = 1
"""Flag (beside MARK, in place of P2P) of a STEP whose number the session gave."""
BAD_LOSS, BAD_GRAD = 1, 2

LAYERS = ("none", "hooks", "native", "python", "patched")
"""torch's own hooks; C++ kernels at the dispatcher; Python, by methods and kernels; Python, by methods alone."""


def ring_bytes(capacity: int) -> int:
    """Bytes of a ring of `capacity` records, whole pages."""
    size = RECORDS_AT + capacity * RECORD.itemsize
    return -(-size // PAGE_BYTES) * PAGE_BYTES


assert RECORD.itemsize == 64  # noqa: S101  drawn, not computed: three pages of code rely on it
assert GROUP.itemsize == 128  # noqa: S101  likewise
assert HEADER.itemsize <= PAGE_BYTES  # noqa: S101  likewise
