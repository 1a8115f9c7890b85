"""A job as plain values: what `ckptd status` shows of the life of its snapshots."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from ckptd.core.node import PERSIST, PROTECT, Job


def of_job(job: Job) -> dict[str, Any]:
    """Its attempt, its snapshots, what reached which state, and what was counted."""
    return {
        "attempt": job.attempt,
        "node": job.node,
        "nodes": job.nodes,
        "snapshots": [
            {
                "attempt": s.attempt, "step": s.step, "state": s.state, "ranks": sorted(s.images),
                "bytes": sum(i.image_bytes for i in s.images.values()),
                "persisting": PERSIST in s.since_s, "persisted": PERSIST in s.done,
                "protected": PROTECT in s.done or s.key == job.protected,
            }
            for _, s in sorted(job.snapshots.items())
        ],
        "committed": job.committed,
        "protected": job.protected,
        "persisted": job.persisted,
        "counters": asdict(job.counters),
    }  # fmt: skip
