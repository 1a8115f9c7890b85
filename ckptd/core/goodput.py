"""Goodput: what protecting a job costs in memory and network, and how much of the job's time is then work.

Goodput is the share of the time that goes into steps that are not done again.

The model
- Nodes fail independently of each other, each after an exponentially distributed time of mean `mtbf_s`; nothing else fails (ranks that die alone cost less
  than a node, and need no other node's memory).
- From a node's loss until its group can bear `m` losses again passes the window: recovery, one step, protecting that step. The job goes on on the nodes
  that are left, in groups formed anew, so no repair has to be waited for (that it is slower there is left out). A loss within the window does not begin it anew.
- More is lost than a group bears if, within the window that a loss begins, at least m of the n - 1 others of the group are lost too.
- A copy on r other nodes is a mirror: groups of r + 1 that bear r losses, so that the same formulas hold. Memory and network are r times the images. This is
  the placement that loses least (GEMINI, SOSP 2023: groups rather than rings).
- A snapshot that is protected is as old as protecting takes; the next comes a step later, or when protecting is done, whatever is longer.
- Images in memory lie in slots; parity (and copies, to compare like with like) in FRAGMENT_SLOTS with room to grow, as ckptd.protect makes them. Headers,
  checksums (16 bytes per MiB) and stripes of members of unequal size are left out.
- Each member fetches the k = n - m data blocks of every row whose parity it holds, none of which are its own. Images of D blocks make n D / k rows, and m / n of
  them are its: it fetches m D blocks, and sends as many. Links are taken to be full duplex, at their whole rate.

Daly's cost function is exact for exponential failures that may also hit restarts: work of T takes M e^(R/M) (e^((tau + C)/M) - 1) T / tau, where M is the mean
time between failures, R what a restart takes, C what a checkpoint takes, tau the work between two (J. T. Daly, "A higher order estimate of the optimum
checkpoint interval for restart dumps", Future Generation Computer Systems 22, 2006). It is applied twice and multiplied: to losses that memory bears, and
to those beyond, after which the job goes back to the durable tier.
"""

from __future__ import annotations

from math import comb, exp, expm1, isfinite, sqrt

import msgspec

from ckptd.core.groups import Group
from ckptd.errors import BadArgument

DAY_S = 86400.0
MTBF_HOURS = 6300.0
"""Of a node of 8 GPUs: 419 unexpected interruptions in 54 days of 2,048 nodes ("The Llama 3 Herd of Models", 2024, section 3.3.4), about 260 days a node."""
SLOTS = 3
"""Per rank where no node protects another, as ckptd.session has it; one more where they do."""
FRAGMENT_SLOTS = 2
GROWTH = 16
"""A sixteenth more in each: both as in ckptd.protect."""

_ABOVE_ZERO = {
    "node_bytes": "the images of one node: of all its ranks, and at least a byte",
    "step_s": "the time of one training step",
    "link_bytes_per_s": "what a node's link takes in each direction",
    "store_bytes_per_s": "what the durable tier takes per node, when all write at once",
    "mtbf_s": "a node's mean time between failures",
}
_NOT_BELOW_ZERO = {"recovery_s": "from a loss to the next step", "stall_s": "what a snapshot adds to a step"}


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """A job and what it runs on. `node_bytes`: the images of all ranks of a node. Raises BadArgument for what cannot be."""

    nodes: int
    node_bytes: int
    step_s: float
    link_bytes_per_s: float
    store_bytes_per_s: float
    mtbf_s: float
    recovery_s: float
    stall_s: float = 0.0

    def __post_init__(self) -> None:
        if self.nodes < 1:
            msg = f"a job on {self.nodes} nodes"
            raise BadArgument(msg, remedy="give 1 node or more")
        for bound, names in (("above 0", _ABOVE_ZERO), ("not below 0", _NOT_BELOW_ZERO)):
            for name, meaning in names.items():
                value = getattr(self, name)
                if not isfinite(value) or value < 0 or (value == 0 and names is _ABOVE_ZERO):
                    msg = f"{name} = {value:g}: must be {bound}"
                    raise BadArgument(msg, remedy=f"give {meaning}")

    @property
    def failures_per_s(self) -> float:
        """Of all nodes together."""
        return self.nodes / self.mtbf_s

    @property
    def transfer_s(self) -> float:
        """To have all images written to the durable tier, or read from it."""
        return self.node_bytes / self.store_bytes_per_s


class Shape(msgspec.Struct, frozen=True):
    """`count` groups of n nodes, any m of which may be lost."""

    n: int
    m: int
    count: float


def shapes_of(groups: tuple[Group, ...]) -> tuple[Shape, ...]:
    """The different groups among those that were formed, the smallest first."""
    sizes = [(len(g.members), g.parity) for g in groups]
    return tuple(Shape(n, m, sizes.count((n, m))) for n, m in sorted({*sizes}))


def alone(nodes: int) -> tuple[Shape, ...]:
    """No node protects another."""
    return (Shape(1, 0, nodes),)


def mirrors(nodes: int, copies: int) -> tuple[Shape, ...]:
    """Every image on `copies` other nodes. Raises BadArgument where there are not as many."""
    if not 0 <= copies < nodes:
        msg = f"{copies} copies of what each of {nodes} nodes holds, on others"
        raise BadArgument(msg, remedy=f"{nodes - 1} others can hold 0 to {nodes - 1} copies")
    return (Shape(copies + 1, copies, nodes / (copies + 1)),)


class Outcome(msgspec.Struct, frozen=True):
    """What a protection takes and gives. Per node: of the node that has most."""

    memory_bytes: int
    """Per node: slots, and parity or copies."""
    extra: float
    """Of what the node's slots would take if no node protected another."""
    network_bytes: int
    """Per node and snapshot, in each direction."""
    protect_s: float
    """On the link, per snapshot."""
    fits_step: bool
    """Protecting is done before the next step is; else snapshots between are kept in memory, but not protected."""
    window_s: float
    """From a loss until as many can be borne again."""
    loss_per_day: float
    """The probability that, within a day, some group loses more nodes than it bears."""
    durable_s: float
    """How often to persist: Daly's interval for the losses beyond, never more often than persisting takes."""
    goodput: float


def outcome(job: Job, shapes: tuple[Shape, ...], slots: int | None = None) -> Outcome:
    """What `shapes` mean for a job. `slots`: per rank; by default as many as ckptd takes."""
    protects = any(s.m for s in shapes)
    base = job.node_bytes * (slots or SLOTS)
    memory = job.node_bytes * (slots or SLOTS + protects) + max(fragment_bytes(job.node_bytes, s.n, s.m) for s in shapes)
    network = max(s.m for s in shapes) * job.node_bytes
    protect_s = network / job.link_bytes_per_s
    window_s = job.recovery_s + job.step_s + protect_s
    loss = sum(s.count * losses_per_s(s.n, s.m, job.mtbf_s, window_s) for s in shapes)
    durable_s = max(daly_s(job.transfer_s, 1 / loss), job.transfer_s) if loss else float("inf")
    return Outcome(
        memory_bytes=memory,
        extra=memory / base - 1,
        network_bytes=network,
        protect_s=protect_s,
        fits_step=protect_s <= job.step_s,
        window_s=window_s,
        loss_per_day=-expm1(-loss * DAY_S),
        durable_s=durable_s,
        goodput=_goodput(job, loss, protect_s, durable_s),
    )


def _goodput(job: Job, loss_per_s: float, protect_s: float, durable_s: float) -> float:
    """Losses that memory bears, and those beyond. Persisting runs beside training: it delays the checkpoint, and costs the steps nothing."""
    every_s = max(job.step_s, protect_s)
    stall_s = job.stall_s * every_s / job.step_s
    borne = max(0.0, job.failures_per_s - loss_per_s)
    near = work_share(every_s, stall_s, job.recovery_s + protect_s, 1 / borne) if borne else every_s / (every_s + stall_s)
    far = work_share(durable_s, 0.0, job.recovery_s + 2 * job.transfer_s, 1 / loss_per_s) if loss_per_s else 1.0
    return near * far


class DurableOnly(msgspec.Struct, frozen=True):
    """Checkpoints to the durable tier alone, for which the trainers wait."""

    young_s: float
    interval_s: float
    """Daly's."""
    goodput: float


def durable_only(job: Job) -> DurableOnly:
    """The same job without snapshots in memory: every failure goes back to the last checkpoint."""
    mtbf_s, cost_s = 1 / job.failures_per_s, job.transfer_s
    interval_s = daly_s(cost_s, mtbf_s)
    return DurableOnly(young_s(cost_s, mtbf_s), interval_s, work_share(interval_s, cost_s, job.recovery_s + cost_s, mtbf_s))


# --- the formulas -----------------------------------------------------------------------------------------------------------


def fragment_bytes(node_bytes: int, n: int, m: int) -> int:
    """Memory for parity on a node of a group of n that bears m losses."""
    parity_bytes = -(-node_bytes * m // (n - m))
    return FRAGMENT_SLOTS * (parity_bytes + parity_bytes // GROWTH)


def losses_per_s(n: int, m: int, mtbf_s: float, window_s: float) -> float:
    """How often a group of n loses more than m nodes: a first loss, and in its window at least m of the n - 1 others."""
    gone = -expm1(-window_s / mtbf_s)
    more = sum(comb(n - 1, i) * gone**i * (1 - gone) ** (n - 1 - i) for i in range(m, n)) if m else 1.0
    return n / mtbf_s * min(1.0, more)


def young_s(cost_s: float, mtbf_s: float) -> float:
    """The first-order optimum: sqrt(2 C M). J. W. Young, "A first order approximation to the optimum checkpoint interval", CACM 17(9), 1974."""
    return sqrt(2 * cost_s * mtbf_s)


def daly_s(cost_s: float, mtbf_s: float) -> float:
    """Work between two checkpoints: sqrt(2 C M) (1 + sqrt(C / 2M) / 3 + C / 18M) - C while C < 2M, else M (Daly 2006; the module's text)."""
    ratio = cost_s / (2 * mtbf_s)
    if ratio >= 1:
        return mtbf_s
    return young_s(cost_s, mtbf_s) * (1 + sqrt(ratio) / 3 + ratio / 9) - cost_s


def work_share(interval_s: float, cost_s: float, restart_s: float, mtbf_s: float) -> float:
    """The share of the time that is work, by Daly's cost function; see the module's text."""
    exponent = (interval_s + cost_s) / mtbf_s
    if exponent + restart_s / mtbf_s > 700:  # e^709 is the largest number there is: such a job never gets through
        return 0.0
    return interval_s / mtbf_s * exp(-restart_s / mtbf_s) / expm1(exponent)
