"""The rings of a node as a trace for Perfetto and chrome://tracing (JSON Trace Event Format). Pure: windows and verdicts in, bytes out.

    process   a rank                                     slice    an operation, from its entry to its end (or the host's return from it)
    thread    a process group of it, its marks, sends    flow     joins one collective, (group, sequence number), over the ranks
              and receives; lanes where slices overlap   instant  the end of a step; a verdict, over all

One node's rings only: their clock is one. Bounded: EVENTS_MAX events, newest first to stay, FLOWS_MAX flows.

Format: "Trace Event Format" (Google, docs document 1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU), fields as Perfetto's importer reads them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np

from ckptd.monitor import record
from ckptd.monitor.report import Verdict
from ckptd.monitor.ring import Group

Records = np.ndarray[Any, np.dtype[np.void]]

EVENTS_MAX = 400_000
FLOWS_MAX = 40_000
LANES_MAX = 16
VERDICTS_MAX = 256
MARKS_TID = 1
P2P_TID = 20
GROUPS_TID = 100
"""Threads of the group of row 0; each thread is followed by its lanes."""


@dataclass(frozen=True, slots=True)
class Track:
    """One rank's records."""

    job: str
    rank: int
    pid: int
    records: Records
    groups: Sequence[Group]
    now_ns: int


@dataclass
class _Trace:
    events: list[dict[str, Any]] = field(default_factory=list)
    flows: dict[tuple[int, int], list[tuple[int, int, float, float]]] = field(default_factory=dict)
    """(group's key, sequence number) -> (process, thread, begin, end) of its slices."""


def render(windows: Mapping[str, Any]) -> bytes:
    """The trace, as JSON.

    `windows`: {"ranks": [{"job", "rank", "pid", "records": array of record.RECORD, "groups": [ring.Group]}], "verdicts": [report.Verdict], "now_ns", "now_s"}, the
    last two taken together when the rings were read: nanoseconds of the node's clock, seconds since the epoch.
    """
    now_ns, now_s = int(windows.get("now_ns", 0)), float(windows.get("now_s", 0.0))
    rows = windows.get("ranks", ())
    budget = EVENTS_MAX // max(1, len(rows))
    tracks = [Track(r.get("job", ""), r["rank"], r.get("pid", 0), _sorted(r["records"], now_ns)[-budget:], r.get("groups", ()), now_ns) for r in rows]
    begin_ns = min((int(t.records["entered_ns"][0]) for t in tracks if len(t.records)), default=now_ns)
    trace = _Trace()
    for number, t in enumerate(tracks):
        _rank(trace, number + 1, t, begin_ns)
    _flows(trace)
    for v in [*windows.get("verdicts", ())][-VERDICTS_MAX:]:
        _verdict(trace, v, (now_ns - begin_ns) / 1e3 - (now_s - v.detected_s) * 1e6)
    return msgspec.json.encode({"traceEvents": trace.events, "displayTimeUnit": "ms", "otherData": {"source": "ckptd"}})


def _sorted(records: Records, now_ns: int) -> Records:
    """By entry; without what was only recorded into a CUDA graph, or cannot have been (a rank that writes nonsense spoils its own records only)."""
    kept = records[(records["entered_ns"] > 0) & (records["entered_ns"] <= now_ns) & (records["flags"] & record.CAPTURED == 0)]
    return np.asarray(kept[np.argsort(kept["entered_ns"], kind="stable")])


def _rank(trace: _Trace, pid: int, t: Track, begin_ns: int) -> None:
    trace.events.append(_meta(pid, "process_name", {"name": f"rank {t.rank} of {t.job} (pid {t.pid})"}))
    trace.events.append(_meta(pid, "process_sort_index", {"sort_index": t.rank}))
    free: dict[int, list[float]] = {}
    """Thread -> until when each of its lanes is taken."""
    for r in t.records:
        tid, event = _event(t, r, begin_ns)
        if event["ph"] == "X":
            lane = _lane(free.setdefault(tid, []), event["ts"], event["ts"] + event["dur"])
            if lane < 0:
                continue
            tid += lane
            if not int(r["flags"]) & (record.MARK | record.P2P) and int(r["group"]) < len(t.groups):
                place = (t.groups[int(r["group"])].key, int(r["seq"]))
                trace.flows.setdefault(place, []).append((pid, tid, event["ts"], event["ts"] + event["dur"]))
        trace.events.append({**event, "pid": pid, "tid": tid})
    for tid, lanes in free.items():
        for lane in range(len(lanes)):
            trace.events.append({**_meta(pid, "thread_name", {"name": _thread_name(t, tid, lane)}), "tid": tid + lane})
            trace.events.append({**_meta(pid, "thread_sort_index", {"sort_index": tid + lane}), "tid": tid + lane})


def _event(t: Track, r: np.void, begin_ns: int) -> tuple[int, dict[str, Any]]:
    """(thread, event) of a record."""
    flags, op, entered_ns = int(r["flags"]), int(r["op"]), int(r["entered_ns"])
    ts = (entered_ns - begin_ns) / 1e3
    until_ns = min(int(r["ended_ns"]) or int(r["returned_ns"]), t.now_ns)
    args: dict[str, Any] = {"step": int(r["step"])}
    if flags & record.MARK:
        name = record.MARKS[op] if op < len(record.MARKS) else "mark"
        args["value"] = int(r["bytes"])
        if op in {record.STEP, record.LOSS} or until_ns <= entered_ns:
            return MARKS_TID, {"name": f"{name} {int(r['bytes']) or int(r['step'])}" if op == record.STEP else name, "cat": "mark", "ph": "i", "s": "p", "ts": ts, "args": args}
        return MARKS_TID, {"name": name, "cat": "mark", "ph": "X", "ts": ts, "dur": (until_ns - entered_ns) / 1e3, "args": args}
    name = record.OPS[op] if op < len(record.OPS) else "?"
    group = int(r["group"])
    open_ = until_ns < entered_ns
    if open_:  # in flight when the ring was read
        until_ns = max(t.now_ns, entered_ns)
    args |= {
        "seq": int(r["seq"]), "bytes": int(r["bytes"]), "dtype": record.DTYPES[int(r["dtype"])] if int(r["dtype"]) < len(record.DTYPES) else "?",
        "waited_us": int(r["waited_us"]), "in_flight": open_, "failed": bool(flags & record.FAILED), "async": bool(flags & record.ASYNC),
    }  # fmt: skip
    if flags & record.P2P:
        args["peer"] = int(r["peer"])
    tid = P2P_TID if flags & record.P2P else GROUPS_TID + LANES_MAX * min(group, record.GROUPS_MAX)
    return tid, {"name": name, "cat": "p2p" if flags & record.P2P else "collective", "ph": "X", "ts": ts, "dur": max(0, until_ns - entered_ns) / 1e3, "args": args}


def _lane(lanes: list[float], begin: float, end: float) -> int:
    """The first lane that is free at `begin`, taken until `end`: slices of one thread must nest, operations that overlap do not. -1: there is none."""
    for i, until in enumerate(lanes):
        if until <= begin:
            lanes[i] = end
            return i
    if len(lanes) >= LANES_MAX:
        return -1
    lanes.append(end)
    return len(lanes) - 1


def _thread_name(t: Track, tid: int, lane: int) -> str:
    more = f" (lane {lane + 1})" if lane else ""
    if tid < GROUPS_TID:
        return f"{'marks' if tid == MARKS_TID else 'send, receive'}{more}"
    row = (tid - GROUPS_TID) // LANES_MAX
    if row >= len(t.groups):
        return f"other groups{more}"
    return f"group of {t.groups[row].size}, {t.groups[row].key:x}{more}"


def _flows(trace: _Trace) -> None:
    """Arrows through one collective, in the order of entering: the last arrow points at who came last."""
    joined = [(place, sorted(slices, key=lambda s: s[2])) for place, slices in trace.flows.items() if len({s[0] for s in slices}) > 1]
    for number, (_, slices) in enumerate(joined[-FLOWS_MAX:]):
        for i, (pid, tid, begin, _) in enumerate(slices):
            phase = "s" if i == 0 else "f" if i == len(slices) - 1 else "t"
            event = {"name": "joined", "cat": "joined", "ph": phase, "id": number + 1, "pid": pid, "tid": tid, "ts": begin}
            trace.events.append({**event, "bp": "e"} if phase == "f" else event)


def _verdict(trace: _Trace, v: Verdict, ts: float) -> None:
    """When it was reached, over all processes."""
    args = {"text": v.text, "kind": v.kind, "state": v.state, "ranks": v.ranks, "cause": v.cause, "confidence": v.confidence, "since_step": v.since_step}
    trace.events.append({"name": f"verdict: {v.kind}", "cat": "verdict", "ph": "i", "s": "g", "pid": 1, "tid": MARKS_TID, "ts": ts, "args": args})


def _meta(pid: int, name: str, args: dict[str, Any]) -> dict[str, Any]:
    return {"name": name, "ph": "M", "pid": pid, "tid": 0, "ts": 0, "args": args}
