"""What a daemon's status says of watching, read by the faces: `status["jobs"][name]["watching"]`, or `status["watched"][name]` where no session is attached. Pure.

Only what is shown is drawn here; whatever is missing (an older daemon, a node that does not coordinate) is empty, whatever is more is let through untouched.

    attempt, world_size, step, policy, coordinator      of the job
    ranks       one per rank: RankView
    taps        rank -> TapView, of this node's ranks
    verdicts    report.Verdict as plain values, with `text`
    waits       {rank, group, op, seq, for: [ranks], since_ms}: who waits for whom
    heat        {steps: [step ...], ranks: [rank ...], wall_us: [[...] per rank], lateness: [[...] per rank]}; lateness as a part of the step: 0.1 is ten percent
    health      [{node, host, values: {name: number}, alarms: {kind: what}}]
    detectors   name -> "ok", "suspected", ...
    counts      reports, reports_lost, ...
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

PARTS = ("data", "gc", "checkpoint", "eval", "compile", "optimizer", "delay")


class RankView(msgspec.Struct):
    """A rank in its newest step. `lateness`: how much more it worked than its peers, as a part of the step. `parts`: microseconds by PARTS."""

    rank: int
    node: int = 0
    host: str = ""
    local_rank: int = 0
    device: int = -1
    step: int = 0
    state: str = ""
    idle_ms: float = 0
    wall_us: float = 0
    self_us: float = 0
    lateness: float | None = None
    parts: dict[str, float] = {}
    lost: int = 0


class TapView(msgspec.Struct):
    """A tap of this node."""

    pid: int = 0
    layer: str = ""
    records: int = 0
    lost: int = 0
    errors: int = 0
    hook_ns: int = 0
    device_lost: int = 0
    gone: bool = False


class Wait(msgspec.Struct, rename={"ranks": "for"}):
    """A rank that waits for others in an operation."""

    rank: int
    group: str = ""
    op: str = ""
    seq: int = 0
    ranks: list[int] = []
    since_ms: float = 0


class VerdictView(msgspec.Struct):
    """A verdict, as far as tables show it."""

    id: int = 0
    kind: str = ""
    state: str = ""
    text: str = ""
    ranks: list[int] = []
    confidence: float = 0
    since_s: float = 0
    detected_s: float = 0
    action: str = ""
    did: str = ""
    recommended: str = ""


class Watching(msgspec.Struct):
    """All of it. `note`: what could not be read."""

    attempt: int = 0
    world_size: int = 0
    step: int = 0
    policy: str = ""
    coordinator: bool = False
    ranks: list[RankView] = []
    taps: dict[str, TapView] = {}
    verdicts: list[VerdictView] = []
    waits: list[Wait] = []
    health: list[dict[str, Any]] = []
    detectors: dict[str, str] = {}
    counts: dict[str, float] = {}
    note: str = ""


def jobs(status: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """All jobs of a status by name, each with its "watching" where it is watched: those with snapshots, and those that are only watched."""
    found: dict[str, dict[str, Any]] = {}
    told, watched = status.get("jobs"), status.get("watched")
    for name, job in told.items() if isinstance(told, Mapping) else ():
        found[str(name)] = dict(job) if isinstance(job, Mapping) else {}
    for name, seen in watched.items() if isinstance(watched, Mapping) else ():
        job = found.setdefault(str(name), {})
        if not job.get("watching"):
            job["watching"] = seen
    return found


def watching(job: Any) -> Watching | None:
    """What a job's status says of watching; None where nothing watches it. A part that cannot be read costs that part, and is noted."""
    told = job.get("watching") if isinstance(job, dict) else None
    if not isinstance(told, dict):
        return None
    good: dict[str, Any] = {}
    bad = []
    for field in msgspec.structs.fields(Watching):
        if told.get(field.encode_name) is None:
            continue
        try:
            good[field.name] = msgspec.convert(told[field.encode_name], field.type, strict=False)
        except msgspec.ValidationError as e:
            bad.append(f"{field.name}: {e}")
    return Watching(**{**good, "note": "; ".join(bad)[:500]})


def open_verdicts(seen: Watching) -> list[VerdictView]:
    """Those that hold, newest first."""
    return sorted((v for v in seen.verdicts if v.state != "cleared"), key=lambda v: (-v.detected_s, -v.id))
