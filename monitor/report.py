"""What travels: a node's summaries of its ranks, to the job's coordinator. Records stay where they are.

    ring --steps.Summarizer--> StepSummary   one per rank and step
         --pulse-------------> Pulse         one per rank and look: what it stands in, while it does not move
         --first seen--------> RankInfo      who it is, which groups it is in
    all of a node's ------------> Report      one message

Everything is bounded (a peer is believed within these bounds only) and a plain value. Durations are of the rank's own clock; nothing here is compared with another
node's clock. Units: microseconds, unless the name says otherwise.
"""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

GROUPS_MAX = 64
RECENT_MAX = 16
RANKS_MAX = 1 << 16
STEPS_MAX = 4096
"""Of one report: 8 ranks with steps of 2 ms, told once a second."""
TEXT_MAX = 256
Text = Annotated[str, Meta(max_length=TEXT_MAX)]
Long = Annotated[str, Meta(max_length=16 << 10)]


class GroupInfo(msgspec.Struct, frozen=True, array_like=True):
    """A process group: `key` is the same on all members."""

    key: int
    members: Annotated[list[int], Meta(max_length=RANKS_MAX)]


class RankInfo(msgspec.Struct, frozen=True):
    """Who a rank is. Told when it is first seen, and when its groups change."""

    rank: int
    node: int
    local_rank: int
    pid: int
    host: Text
    device: int = -1
    layer: Text = ""
    groups: Annotated[list[GroupInfo], Meta(max_length=GROUPS_MAX)] = []


class GroupStep(msgspec.Struct, frozen=True, array_like=True):
    """One group in one step of one rank.

    `seq`: collectives entered when the step ended; `history`: a hash of those of this step, in order (0: none). `inside_us`: sum over the step's operations from entering to being done (0 where
    nothing says when they were done); `least_us`: the same, taking of each operation the least over this node's members: what is left is transfer, not waiting.
    """

    key: int
    seq: int
    history: int
    ops: int
    bytes: int
    inside_us: int
    least_us: int
    p2p: int = 0


class StepSummary(msgspec.Struct, frozen=True, array_like=True):
    """One step of one rank. `wall_us` = `self_us` + waiting for others; the parts of `self_us` follow, in no order, what is left is compute.

    self_us: from each sync point (an operation entered, one known to be done, a wait that returned) to the next operation's entry, and to the step's end.
    delay_us: runnable and not running (the kernel's run_delay) while it was not waiting. cpu_us: time on a processor.
    """

    rank: int
    step: int
    ended_ns: int
    wall_us: int
    self_us: int
    data_us: int = 0
    gc_us: int = 0
    checkpoint_us: int = 0
    eval_us: int = 0
    compile_us: int = 0
    optimizer_us: int = 0
    delay_us: int = 0
    cpu_us: int = 0
    device_us: int = 0
    """Device collectives, summed: what `inside_us` are made of where they ran on a device."""
    ops: int = 0
    lost: int = 0
    bad: int = 0
    """record.BAD_* bits: loss or gradient norm that is no number."""
    program: int = 0
    """Hash of the step's sequence of (group's size, operation, bytes, dtype): ranks with equal programs are role peers."""
    groups: Annotated[list[GroupStep], Meta(max_length=GROUPS_MAX)] = []


class OpenOp(msgspec.Struct, frozen=True, array_like=True):
    """A group as a rank stands in it: the newest collective that it entered, and whether that is known to be done; its newest send or receive."""

    key: int
    entered: int
    done: int
    op: int
    dtype: int
    bytes: int
    signature: int
    history: int
    since_ms: int
    """Since the newest was entered."""
    p2p_op: int = 0
    p2p_open: bool = False
    p2p_peer: int = -1
    p2p_entered: int = 0
    p2p_done: int = 0
    p2p_since_ms: int = 0
    recent: Annotated[list[int], Meta(max_length=RECENT_MAX)] = []
    """Signatures of the collectives before the newest, the newest of these first."""


class Pulse(msgspec.Struct, frozen=True):
    """A rank at this moment. `groups` only while it is idle for longer than a second (or was asked about)."""

    rank: int
    idle_ms: int
    """Since its ring moved."""
    step: int
    records: int
    state: Text
    """The kernel's state of its main thread: R, S, D, T, Z, X; "dead"; "raised" (dead, by an exception); "closed" (it ended in good order)."""
    where: Text = ""
    """What the kernel says it sleeps in (wchan)."""
    phases: int = 0
    """Open intervals: bits by record.MARKS."""
    phase_ms: int = 0
    signal: int = 0
    """What killed it, if that is known."""
    cpu_ms: int = 0
    """Processor time so far: one that computes is not stuck in a wait."""
    groups: Annotated[list[OpenOp], Meta(max_length=GROUPS_MAX)] = []


class Health(msgspec.Struct, frozen=True):
    """A node's health as numbers and findings; see health.py. `alarms`: kind -> what was seen, e.g. {"xid": "79 on GPU 3"}."""

    node: int
    values: dict[Text, float] = {}
    alarms: dict[Text, Text] = {}


class Probed(msgspec.Struct, frozen=True):
    """The outcome of one active probe. kind "compute", "memory": `rank` and its rate; "transfer": node `rank` to node `other`. `rate`: per second; 0: it failed."""

    id: int
    kind: Text
    rank: int
    rate: float
    other: int = -1
    baseline: float = 0.0
    """What is usual there, as far as the node knows; 0: it does not."""
    outside: bool = False
    """Measured by a process beside the rank, which did not answer: with another library, so not to be compared with what ranks measure in themselves."""


class Stack(msgspec.Struct, frozen=True):
    """A rank's stacks as text, for a verdict's evidence."""

    rank: int
    text: Long
    how: Text = ""


class Report(msgspec.Struct, frozen=True):
    """All that a node says at once."""

    node: int
    sent: int = 0
    """Counts this node's reports: what was lost is seen."""
    ranks: Annotated[list[RankInfo], Meta(max_length=STEPS_MAX)] = []
    steps: Annotated[list[StepSummary], Meta(max_length=STEPS_MAX)] = []
    pulses: Annotated[list[Pulse], Meta(max_length=STEPS_MAX)] = []
    health: Health | None = None
    probed: Annotated[list[Probed], Meta(max_length=STEPS_MAX)] = []
    stacks: Annotated[list[Stack], Meta(max_length=64)] = []
    every: Annotated[int, Meta(ge=1, le=1 << 16)] = 1
    """Of steps, this node tells those whose number is a multiple of this (a power of two)."""


# --- what the coordinator concludes ----------------------------------------------------------------------------------------


class Evidence(msgspec.Struct, frozen=True):
    """One number or text behind a finding. `baseline`: what it is compared with."""

    signal: Text
    value: float | Long
    baseline: float | None = None
    unit: Text = ""


class Finding(msgspec.Struct, frozen=True):
    """What a detector saw in its window: no action follows from it by itself.

    `kind`: see KINDS. `ranks`: the culprits (empty: nobody is to be named). `strength`: 0 to 1, how far beyond the threshold and how steady.
    """

    kind: Text
    ranks: tuple[int, ...]
    step: int
    since_step: int
    strength: float
    cause: Text = ""
    group: int = 0
    op: Text = ""
    seq: int = 0
    slowdown: float = 0.0
    """Part of a step that it costs: 0.1 is ten percent."""
    peer: int = -1
    victims: tuple[int, ...] = ()
    evidence: tuple[Evidence, ...] = ()


KINDS = {
    "crash": "the process is gone",
    "stopped": "the process is stopped (SIGSTOP, a debugger, a frozen cgroup)",
    "io-blocked": "the process sleeps in the kernel (disk, network file system)",
    "hang": "a rank did not enter an operation that others wait in",
    "desync": "ranks entered different operations at one place of a group",
    "deadlock": "ranks wait for each other in different groups",
    "comm-hang": "all entered an operation and none has left it",
    "compute-slow": "a rank computes longer than those that do the same",
    "cpu-contention": "a rank waits for a processor",
    "input-stall": "a rank waits for its data",
    "gc-pause": "a rank stands in Python's garbage collection",
    "checkpoint-stall": "a rank stands in saving",
    "send-slow": "what a node sends is slow",
    "receive-slow": "what a node receives is slow",
    "link-slow": "what goes from one node to another is slow",
    "comm-slow": "a group's transfers are slow; no side is known yet",
    "global-slow": "all ranks are slower than they were",
    "drift": "a rank becomes slower and slower",
    "nan": "a loss or gradient norm is no number",
    "divergence": "copies that should be equal differ",
    "undecided": "something is slow or hangs, and the evidence does not say who",
}


class Verdict(msgspec.Struct, frozen=True):
    """What the job concludes: a finding that held, with its place and the action by policy. Schema version 1."""

    id: int
    job: Text
    attempt: int
    kind: Text
    cause: Text
    state: Text
    """"suspected", "confirmed" (held, or a probe agrees) or "cleared"."""
    ranks: tuple[int, ...]
    nodes: tuple[int, ...]
    places: tuple[Text, ...]
    """For each rank: "host, local rank 3, GPU 3"."""
    confidence: float
    since_step: int
    step: int
    since_s: float
    """Seconds since the epoch, by the coordinator's clock: for people."""
    detected_s: float
    slowdown: float = 0.0
    op: Text = ""
    group: int = 0
    seq: int = 0
    peer: int = -1
    victims: tuple[int, ...] = ()
    evidence: tuple[Evidence, ...] = ()
    probes: tuple[Probed, ...] = ()
    grade: Text = "report"
    """"report", or "evict": grave and sure enough that policy may act on it."""
    recommended: Text = "report"
    action: Text = ""
    """What was done: "", "report", "snapshot", "restart", "evict"."""
    lost_records: int = 0
    schema: int = 1

    @property
    def text(self) -> str:
        """One line for people."""
        who = ", ".join(f"rank {r} ({p})" for r, p in zip(self.ranks, self.places, strict=False)) or "no rank"
        much = f", {self.slowdown:.0%} of a step" if self.slowdown else ""
        what = f" in {self.op} {self.seq}" if self.op else ""
        return f"{self.kind}: {who}{what}{much}: {self.cause or KINDS.get(self.kind, '')} ({self.confidence:.0%} sure, since step {self.since_step})"
