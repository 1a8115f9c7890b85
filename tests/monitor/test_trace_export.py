"""The trace: its structure as Chrome's and Perfetto's importers demand it, from a real ring."""

from __future__ import annotations

import json
from collections import Counter, defaultdict

import numpy as np
import pytest

from ckptd.monitor import record, trace_export
from ckptd.monitor.report import Verdict
from ckptd.monitor.ring import Group, Ring

MS = 1_000_000


def group(key, members, mine):
    return Group(key, len(members), mine, tuple(members), 9, 0, 9, 0, 0, 0, 0, 1, 7, 0, False, -1, 0, 0, 0)


def written(rows, capacity=64):
    """A ring with these records, read as the daemon reads it."""
    ring = Ring.create(capacity)
    for i, row in enumerate(rows):
        at = i % capacity
        for name, value in row.items():
            ring.records[name][at] = value
        ring.records["commit"][at] = i + 1
    ring.header["head"] = len(rows)
    records = ring.read(max(0, len(rows) - capacity)).records
    ring.close()
    return records


def op(entered, ended, seq, *, group=0, op=1, flags=0, returned=0, **more):
    return {"entered_ns": entered * MS, "ended_ns": ended * MS, "returned_ns": (returned or ended) * MS, "seq": seq, "group": group, "op": op, "dtype": 7, "bytes": 4096, "flags": flags, "step": 5, **more}


def mark(kind, begin, end, value=0):
    return op(begin, end, 0, group=record.NO_GROUP, op=kind, flags=record.MARK, bytes=value)


def windows(**more):
    first = [op(10, 30, 1), op(12, 20, 1, group=1), op(31, 50, 2, flags=record.ASYNC), op(32, 44, 3, flags=record.ASYNC), mark(record.OPTIMIZER, 51, 55), mark(record.STEP, 56, 56, 7), op(60, 0, 4), op(57, 58, 1, op=10, flags=record.P2P, peer=1)]
    second = [op(25, 30, 1), op(40, 50, 2, flags=record.ASYNC), op(41, 44, 3, flags=record.ASYNC), mark(record.GC, 45, 47), op(99, 99, 9, flags=record.CAPTURED)]
    groups = [group(0xABC, (0, 1), 0), group(0xDEF, (0,), 0)]
    ranks = [{"job": "job", "rank": r, "pid": 100 + r, "records": written(rows), "groups": groups} for r, rows in ((0, first), (1, second))]
    verdict = Verdict(1, "job", 1, "compute-slow", "why", "confirmed", (1,), (0,), ("here",), 0.9, 5, 7, 1000.0, 1000.02)
    return {"ranks": ranks, "verdicts": [verdict], "now_ns": 70 * MS, "now_s": 1000.04} | more


def parsed(told):
    return json.loads(trace_export.render(told))


def check(trace):
    """What the importers demand: known phases with their fields, slices of a thread that nest, flows that start once, end once and lie in slices."""
    assert set(trace) == {"traceEvents", "displayTimeUnit", "otherData"} and trace["displayTimeUnit"] in {"ms", "ns"}
    slices, flows, named = defaultdict(list), defaultdict(list), set()
    for e in trace["traceEvents"]:
        assert {"name", "ph", "pid", "tid", "ts"} <= set(e) and all(type(e[k]) is int for k in ("pid", "tid"))
        assert isinstance(e["ts"], int | float)
        if e["ph"] == "X":
            assert e["dur"] >= 0
            slices[e["pid"], e["tid"]].append((e["ts"], e["ts"] + e["dur"]))
        elif e["ph"] in "stf":
            flows[e["id"]].append(e)
        elif e["ph"] == "M":
            assert e["name"] in {"process_name", "process_sort_index", "thread_name", "thread_sort_index"} and e["args"]
            named.add((e["pid"], e["tid"]))
        else:
            assert e["ph"] == "i" and e["s"] in "gpt"
    for thread, spans in slices.items():
        assert thread in named
        spans.sort()
        assert all(a[1] <= b[0] * (1 + 1e-12) + 1e-3 for a, b in zip(spans, spans[1:], strict=False)), thread
    for events in flows.values():
        assert Counter(e["ph"] for e in events) | {"t": 0} == Counter({"s": 1, "f": 1, "t": len(events) - 2}) | {"t": 0}
        assert [e["ts"] for e in events] == sorted(e["ts"] for e in events)
        assert [e["ph"] for e in events] == ["s", *"t" * (len(events) - 2), "f"] and len({(e["name"], e["cat"]) for e in events}) == 1
        for e in events:
            assert any(begin <= e["ts"] <= end for begin, end in slices[e["pid"], e["tid"]])
    return slices, flows


def test_ranks_groups_and_what_joins_them():
    trace = parsed(windows())
    slices, flows = check(trace)
    events = trace["traceEvents"]
    assert {e["args"]["name"] for e in events if e["name"] == "process_name"} == {"rank 0 of job (pid 100)", "rank 1 of job (pid 101)"}
    threads = {e["args"]["name"] for e in events if e["name"] == "thread_name"}
    assert threads == {"group of 2, abc", "group of 2, abc (lane 2)", "group of 1, def", "marks", "send, receive"}
    assert len(flows) == 3, "three operations of two ranks"
    (first,) = [e for e in events if e["ph"] == "X" and e["pid"] == 1 and e["args"].get("seq") == 1 and e["cat"] == "collective" and e["tid"] == 100]
    assert (first["ts"], first["dur"], first["name"], first["args"]["bytes"], first["args"]["dtype"]) == (0.0, 20_000.0, "all_reduce", 4096, "f32")
    ends = {e["id"]: e["pid"] for e in events if e["ph"] == "f"}
    assert set(ends.values()) == {2}, "the last to enter is where the arrow points"


def test_what_is_in_flight_marks_steps_and_verdicts():
    events = parsed(windows())["traceEvents"]
    (flight,) = [e for e in events if e.get("args", {}).get("in_flight")]
    assert (flight["args"]["seq"], flight["dur"]) == (4, 10_000.0)
    (step,) = [e for e in events if e["ph"] == "i" and e["cat"] == "mark"]
    assert step["name"] == "step 7"
    (verdict,) = [e for e in events if e["ph"] == "i" and e["cat"] == "verdict"]
    assert verdict["ts"] == pytest.approx(60_000 - 20_000, abs=1) and verdict["args"]["ranks"] == [1]
    (p2p,) = [e for e in events if e.get("cat") == "p2p"]
    assert (p2p["name"], p2p["args"]["peer"]) == ("send", 1)
    assert not [e for e in events if e.get("args", {}).get("seq") == 9], "recorded into a graph, not run"


def test_bounds_and_garbage(monkeypatch):
    assert parsed({})["traceEvents"] == []
    check(parsed(windows(ranks=[])))
    rng = np.random.default_rng(1)
    noise = np.frombuffer(rng.bytes(64 * 500), record.RECORD)
    check(parsed(windows(now_ns=2**62, ranks=[{"job": "\x00<b>", "rank": 0, "pid": 1, "records": noise, "groups": []}])))
    noise = noise.copy()
    noise["entered_ns"] %= 70 * MS
    noise["ended_ns"][::2] %= 70 * MS
    noise["flags"] &= 0xFF ^ record.CAPTURED
    check(parsed(windows(ranks=[{"job": "j", "rank": 0, "pid": 1, "records": noise, "groups": []}])))
    monkeypatch.setattr(trace_export, "EVENTS_MAX", 10)
    many = [op(10 + 2 * i, 11 + 2 * i, i + 1) for i in range(60)]
    trace = parsed(windows(now_ns=200 * MS, ranks=[{"job": "j", "rank": 0, "pid": 1, "records": written(many), "groups": [group(1, (0, 1), 0)]}]))
    assert [e["args"]["seq"] for e in trace["traceEvents"] if e["ph"] == "X"] == [*range(51, 61)]
