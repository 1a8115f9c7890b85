"""Statuses as a daemon tells them, of any size, for the tests of the faces. Engine and daemon make the real ones; here are those that nobody has at hand."""

from __future__ import annotations

import random

HOSTILE = '<img src=x onerror="window.hacked=1">\n"}\\ evil{x="1"} 9\u2028\x1b[31m\x00</script><script>window.hacked=1</script>'


def watching(ranks=8, steps=60, *, slow=3, seed=1, host="node{}.cluster", job="llama", state="confirmed"):
    rng = random.Random(seed)
    per_node = 8
    wall, late, table = [], [], []
    for r in range(ranks):
        more = [0.25 if r == slow and s > steps * 2 // 3 else max(0.0, rng.gauss(0.01, 0.01)) for s in range(steps)]
        late.append([round(x, 3) for x in more])
        wall.append([int(100_000 * (1.25 if s > steps * 2 // 3 else 1) * rng.gauss(1, 0.01)) for s in range(steps)])
        table.append({
            "rank": r, "node": r // per_node, "host": host.format(r // per_node), "local_rank": r % per_node, "device": r % per_node, "step": 1000 + steps - 1,
            "state": "S" if r != slow else "R", "idle_ms": 12, "wall_us": wall[-1][-1], "self_us": 60_000 + int(40_000 * more[-1] * 4), "lateness": more[-1],
            "parts": {"data": 2000, "gc": 10, "checkpoint": 700, "eval": 0, "compile": 0, "optimizer": 4000, "delay": 300}, "lost": 0,
        })  # fmt: skip
    verdict = {
        "id": 10001, "job": job, "attempt": 1, "kind": "compute-slow", "cause": "its own compute takes longer", "state": state, "ranks": [slow], "nodes": [slow // per_node],
        "places": [f"{host.format(slow // per_node)}, local rank {slow % per_node}, GPU {slow % per_node}"], "confidence": 0.97, "since_step": 1000 + steps * 2 // 3,
        "step": 1000 + steps - 1, "since_s": 1.7956e9, "detected_s": 1.7956e9 + 1.4, "slowdown": 0.24, "op": "", "group": 0, "seq": 0, "peer": -1, "victims": [],
        "evidence": [
            {"signal": "own time per step", "value": 74800.0, "baseline": 60100.0, "unit": "us"},
            {"signal": f"stack of rank {slow}", "value": "File train.py, line 40 in forward\nFile train.py, line 12 in main", "baseline": None, "unit": "py-spy"},
        ],
        "probes": [{"id": 1, "kind": "compute", "rank": slow, "rate": 3.1e10, "other": -1, "baseline": 4.2e10}], "grade": "evict", "recommended": "evict",
        "action": "", "lost_records": 0, "schema": 1, "text": f"compute-slow: rank {slow}, 24% of a step", "did": "asked the launcher",
    }  # fmt: skip
    return {
        "job": job, "attempt": 1, "world_size": ranks, "step": 1000 + steps - 1, "policy": "report", "coordinator": True, "ranks": table,
        "counts": {"reports": 120, "reports_lost": 1}, "verdicts": [verdict], "detectors": {"straggler": "confirmed", "hang": "ok"},
        "waits": [{"rank": r, "group": "dp0", "op": "all_reduce", "seq": 77, "for": [slow], "since_ms": 3100} for r in range(min(ranks, 4)) if r != slow],
        "heat": {"steps": [*range(1000, 1000 + steps)], "ranks": [*range(ranks)], "wall_us": wall, "lateness": late},
        "taps": {str(r): {"pid": 4000 + r, "layer": "native", "records": 9000, "lost": 0, "errors": 0, "hook_ns": 3_000_000, "device_lost": 0, "gone": False} for r in range(min(ranks, per_node))},
        "health": [{"node": n, "host": host.format(n), "values": {"cpu_steal": 0.01, "memory_free_bytes": 6.4e10}, "alarms": {"xid": "79 on GPU 3"} if n == 1 else {}} for n in range(-(-ranks // per_node))],
    }  # fmt: skip


def job(ranks=8, **more):
    snapshots = [
        {"attempt": 1, "step": s, "state": state, "ranks": [*range(min(ranks, 8))], "bytes": 8 << 30, "persisting": s == 1057, "persisted": s == 1050, "protected": s <= 1057}
        for s, state in ((1050, "COMMITTED"), (1057, "COMMITTED"), (1058, "SEALED"), (1059, "FILLING"))
    ]
    return {
        "attempt": 1, "node": 0, "nodes": -(-ranks // 8), "snapshots": snapshots, "committed": [1, 1057], "protected": [1, 1057], "persisted": [1, 1050],
        "counters": {"sealed": 60, "committed": 58, "skipped": 2, "protected": 50, "protect_failed": 0, "persisted": 2, "persist_failed": 0, "fenced": 0},
        "ranks": [*range(min(ranks, 8))], "peers_connected": {"1": True, "2": False}, "group": {"members": [0, 1, 2, 3], "parity": 1, "degraded": "", "fragment_bytes": 1 << 30},
        "store": "s3://bucket/ckpt", "suspected": [], "watching": watching(ranks, **more),
    }  # fmt: skip


def status(ranks=8, name="llama", **more):
    return {
        "version": "0.1.0", "daemon": "d-1", "pid": 4242, "uptime_s": 321.5, "peer_address": "127.0.0.1:7000", "strangers": 0, "memory_bytes": 24 << 30,
        "errors": 1, "last_errors": ["persisting step 1040: the store is slow"], "jobs": {name: job(ranks, job=name, **more)}, "rendezvous": {},
        "process": {"cpu_s": 3.25, "rss_bytes": 60 << 20, "private_bytes": 45 << 20},
    }  # fmt: skip
