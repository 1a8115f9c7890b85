"""`ckptd plan`: what protecting a job costs in memory and network, and what it gives, before the job is run. The maths are core/goodput's."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Any

import msgspec

from ckptd.cli import show
from ckptd.cli.show import parse_size
from ckptd.core import goodput, groups, slots
from ckptd.core.goodput import Job, Outcome, Shape
from ckptd.core.parity import BLOCKS_MAX, PARITY_MAX
from ckptd.errors import BadArgument

NODES_MAX = 4096
"""Forming groups takes seconds beyond; the figures per node are those of a smaller job."""
GBPS = 1e9 / 8
HOUR_S = 3600.0
YEAR_S = 365 * goodput.DAY_S

EXAMPLES = """examples:
  ckptd plan --image-bytes 12GB --ranks-per-node 8 --nodes 64 --step-s 8
  ckptd plan --image-bytes 12GB --ranks-per-node 8 --nodes 64 --step-s 8 --parity 2 --link-gbps 400 --json
"""
MODEL = """nodes fail independently, every M hours each on average; a group is whole again after recovery, one step and protecting it; LOSS/DAY: the probability
that a group loses more nodes than it bears, so that the job goes back to the durable tier. DURABLE EVERY: how often to persist for that (Daly 2006).
Goodput: the share of the time that goes into steps that are not done again. Formulas and what they leave out: ckptd/core/goodput.py."""


def add_parser(verbs: Any) -> None:
    """The verb's arguments."""
    p = verbs.add_parser(
        "plan",
        help="memory, network and goodput of protecting a job, for several parities",
        description="Tell what it costs to protect a job's snapshots across nodes, and what it gives: memory, network, the probability of losing more than was\n"
        "protected against, goodput; for the parity asked for (*), for others, for whole copies, and for checkpoints to the durable tier alone.\n\n" + MODEL,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("--image-bytes", required=True, metavar="SIZE", help="of one rank's snapshot: 12GB, 800MiB; a rank says it when it attaches, `ckptd status` shows it")
    p.add_argument("--ranks-per-node", type=int, required=True, metavar="N")
    p.add_argument("--nodes", type=int, required=True, metavar="N")
    p.add_argument("--step-s", type=float, required=True, metavar="S", help="time of one training step")
    p.add_argument("--parity", type=int, default=groups.PARITY_DEFAULT, metavar="M", help="nodes of a group that may be lost at once, 0 to 4 (default %(default)s)")
    p.add_argument("--group-size", type=int, default=groups.SIZE_DEFAULT, metavar="N", help="nodes that protect each other (default %(default)s)")
    p.add_argument("--slots", type=int, metavar="N", help="snapshots per rank in memory, 2 to 8 (default 4; 3 where nodes do not protect each other)")
    p.add_argument("--link-gbps", type=float, default=100.0, metavar="G", help="a node's network, gigabits per second in each direction (default %(default)g)")
    p.add_argument("--store-gbps", type=float, default=8.0, metavar="G", help="what the durable tier takes per node when all write, gigabits per second (default %(default)g)")
    p.add_argument(
        "--mtbf-hours", type=float, default=goodput.MTBF_HOURS, metavar="M",
        help="a node's mean time between failures (default %(default)g: 8 GPUs, from 419 interruptions in 54 days of 2,048 nodes, Llama 3, 2024)",
    )  # fmt: skip
    p.add_argument("--recovery-s", type=float, default=60.0, metavar="S", help="from a node's loss to the next step, reading storage not counted (default %(default)g; `scripts/bench recovery` measures)")
    p.add_argument("--stall-s", type=float, default=0.0, metavar="S", help="what a snapshot adds to a step (default %(default)g)")
    p.add_argument("--json", action="store_true", help="print one JSON document")
    p.set_defaults(run=run)


@dataclass(frozen=True, slots=True)
class Row:
    """One way to protect the job. `chosen`: the one asked for."""

    kind: str
    """"parity" or "copies"."""
    number: int
    shapes: tuple[Shape, ...]
    outcome: Outcome
    chosen: bool = False

    @property
    def name(self) -> str:
        """For the table."""
        mark = " *" if self.chosen else ""
        if self.kind == "copies":
            return "1 copy" if self.number == 1 else f"{self.number} copies"
        sizes = show.ranges(s.n for s in self.shapes)
        return f"parity {self.number}{f' of {sizes}' if self.number else ''}{mark}"

    @property
    def degraded(self) -> str:
        """What is less than asked for."""
        if self.kind == "copies":
            return ""
        return "; ".join(f"groups of {s.n} can lose {s.m}, not {self.number}" for s in self.shapes if s.m < self.number)


def run(args: argparse.Namespace) -> int:
    """Check, compute, print."""
    job = job_of(args)
    rows = rows_of(job, args.parity, args.group_size, args.slots)
    if args.json:
        show.emit_json(_document(job, rows))
    else:
        show.emit(render(job, rows))
    return 0


def job_of(args: argparse.Namespace) -> Job:
    """The job as the arguments have it. Raises BadArgument."""
    if args.ranks_per_node < 1 or not 1 <= args.nodes <= NODES_MAX:
        msg = f"{args.nodes} nodes of {args.ranks_per_node} ranks"
        raise BadArgument(msg, remedy=f"give 1 rank per node or more, and 1 to {NODES_MAX} nodes: larger jobs have the same figures per node")
    if args.slots is not None:
        least = slots.SLOTS_MIN + (args.parity > 0 and args.nodes > 1)
        if not least <= args.slots <= slots.SLOTS_MAX:
            msg = f"--slots {args.slots}: with parity {args.parity} a rank has {least} to {slots.SLOTS_MAX}"
            raise BadArgument(msg, remedy="leave --slots out for what ckptd takes by itself")
    return Job(
        nodes=args.nodes,
        node_bytes=parse_size(args.image_bytes) * args.ranks_per_node,
        step_s=args.step_s,
        link_bytes_per_s=args.link_gbps * GBPS,
        store_bytes_per_s=args.store_gbps * GBPS,
        mtbf_s=args.mtbf_hours * HOUR_S,
        recovery_s=args.recovery_s,
        stall_s=args.stall_s,
    )


def shapes_for(nodes: int, size: int, parity: int) -> tuple[Shape, ...]:
    """The groups that ckptd would form of nodes without labels. Raises BadArgument."""
    if parity == 0:
        return goodput.alone(nodes)
    try:
        return goodput.shapes_of(groups.form([{}] * nodes, size=size, parity=parity))
    except BadArgument as e:
        raise BadArgument(e.message, remedy=f"give --parity 0 to {PARITY_MAX} and a larger --group-size, 2 to {BLOCKS_MAX}") from e


def rows_of(job: Job, parity: int, size: int, slot_count: int | None) -> list[Row]:
    """The parity asked for and the others that these nodes can have, then whole copies."""
    chosen = Row("parity", parity, (found := shapes_for(job.nodes, size, parity)), goodput.outcome(job, found, slot_count), chosen=True)
    rows = []
    for m in range(PARITY_MAX + 1):
        if m == parity:
            rows.append(chosen)
        elif m == 0 or m < min(size, job.nodes):
            shapes = shapes_for(job.nodes, size, m)
            rows.append(Row("parity", m, shapes, goodput.outcome(job, shapes, slot_count)))
    for copies in range(1, min(max(2, parity), job.nodes - 1) + 1):
        shapes = goodput.mirrors(job.nodes, copies)
        rows.append(Row("copies", copies, shapes, goodput.outcome(job, shapes, slot_count)))
    return rows


# --- what it says -----------------------------------------------------------------------------------------------------------

HEADER = ("PROTECTION", "MEMORY/NODE", "EXTRA", "NETWORK/NODE", "TAKES", "IN A STEP", "LOSS/DAY", "DURABLE EVERY", "GOODPUT")


def render(job: Job, rows: list[Row]) -> str:
    """The table, with what it is about above and what follows below."""
    only = goodput.durable_only(job)
    lines = [
        f"{show.count(job.nodes, 'node')}, {show.size(job.node_bytes)} of images on each; one of them is lost every {_span(1 / job.failures_per_s)}",
        "",
        show.table(HEADER, [*map(_cells, rows), _cells_durable(only)], right=HEADER[1:]),
        "",
        f"durable only: trainers wait {show.duration(job.transfer_s)} per checkpoint, every {_span(only.interval_s)} (Daly; Young: {_span(only.young_s)})",
    ]
    chosen = next(r for r in rows if r.chosen)
    lines += [f"DEGRADED: {chosen.degraded}"] if chosen.degraded else []
    if not chosen.outcome.fits_step:
        took, step = show.duration(chosen.outcome.protect_s), show.duration(job.step_s)
        lines.append(f"protecting takes {took}, a step {step}: not every snapshot is protected; all are in the node's own memory, for ranks that die")
    return "\n".join([*lines, MODEL])


def _cells(row: Row) -> list[str]:
    o = row.outcome
    if not any(s.m for s in row.shapes):
        network = ["-", "-", "-"]
    else:
        network = [show.size(o.network_bytes), show.duration(o.protect_s), "yes" if o.fits_step else "no"]
    extra = f"{100 * o.extra:+.0f} %"
    return [row.name, show.size(o.memory_bytes), extra, *network, _chance(o.loss_per_day), _span(o.durable_s), _percent(o.goodput)]


def _cells_durable(only: goodput.DurableOnly) -> list[str]:
    return ["durable only", "-", "-", "-", "-", "-", "-", _span(only.interval_s), _percent(only.goodput)]


def _chance(p: float) -> str:
    return f"{100 * p:.2g} %" if p >= 0.0001 else f"{p:.0e}"


def _percent(share: float) -> str:
    return f"{100 * share:.3f} %"


def _span(seconds: float) -> str:
    return show.duration(seconds) if seconds <= YEAR_S else "over a year"


def _document(job: Job, rows: list[Row]) -> dict[str, Any]:
    return {
        "job": msgspec.to_builtins(job),
        "protections": [
            {
                "kind": r.kind,
                "number": r.number,
                "chosen": r.chosen,
                "groups": msgspec.to_builtins(r.shapes),
                "degraded": r.degraded,
                **msgspec.to_builtins(r.outcome),
            }
            for r in rows
        ],
        "durable_only": msgspec.to_builtins(goodput.durable_only(job)),
    }
