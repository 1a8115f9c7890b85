"""The demo: one job through everything that can happen to it on one node, and a table of what it cost. Called by scripts/demo."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests.train.cluster import Cluster  # noqa: E402  several nodes on one machine, and the harness: what the tests drive real jobs with
from tests.train.elastic_job import reference  # noqa: E402
from tests.train.harness import Job, daemon_pid, stop_daemon  # noqa: E402

LAYOUTS = [("DDP on 1", "ddp", 1), ("FSDP2 on 2", "fsdp", 2), ("FSDP2 on 3", "fsdp", 3), ("TP 2 x FSDP 2", "tp_fsdp", 4), ("PP 2 x FSDP 2", "pp_fsdp", 4)]
MODEL = ["--width", "96", "--layers", "4", "--batch", "12", "--context", "48"]


def say(text: str) -> None:
    print(f"[{time.monotonic() - BEGAN:6.1f} s] {text}", flush=True)


BEGAN = time.monotonic()


def wait_generation(job: Job, before: int) -> None:
    while len(job.marks("workers started")) == before and job.running():
        time.sleep(0.02)


def kill_and_measure(job: Job, ranks: list[int]) -> dict[str, Any]:
    """Kill ranks in mid-step; steps lost, seconds to the next finished step, source of the restore."""
    before = len(job.marks("workers started"))
    pids = set(job.pids().values())
    time.sleep(0.05)
    killed = job.kill(*ranks)
    wait_generation(job, before)
    done = min(max((m["step"] for m in job.marks("step") if m["pid"] == pid), default=0) for pid in pids)
    job.await_step(1, 120)
    new = set(job.pids().values())
    restored = [m for m in job.marks("restored") if m["pid"] in new]
    first = max(min(m["t"] for m in job.marks("step") if m["pid"] == pid) for pid in new)
    return {"lost": done - restored[0]["step"], "seconds": first - killed, "source": restored[0]["source"], "step": restored[0]["step"]}


def assemble(images: Path) -> dict[str, str]:
    """Hashes of every whole tensor, read from the image files with nothing but json and numpy."""
    shapes: dict[str, tuple[list[int], str]] = {}
    parts: dict[str, list[tuple[list[int], list[int], bytes]]] = {}
    for path in sorted(images.iterdir()):
        raw = path.read_bytes()
        (n,) = struct.unpack("<Q", raw[:8])
        header = json.loads(raw[8 : 8 + n])
        meta = header.pop("__metadata__")
        starts, ours = json.loads(meta["DCP_SHARDING_INFO"]), json.loads(meta["ckptd"])
        for key, info in header.items():
            name = ours["extra"].get(key, [key])[0]
            begin, end = info["data_offsets"]
            shapes[name] = (ours["shapes"][name], info["dtype"])
            parts.setdefault(name, []).append((starts[key]["saved_offsets"], info["shape"], raw[8 + n + begin : 8 + n + end]))
    kinds = {"F32": np.uint32, "I64": np.uint64, "U8": np.uint8, "U32": np.uint32}
    hashes = {}
    for name, (shape, dtype) in shapes.items():
        if name.startswith("object/") or "@r" in name:
            continue
        whole = np.zeros(shape, dtype=kinds[dtype])
        for start, extent, data in parts[name]:
            whole[tuple(slice(s, s + e) for s, e in zip(start, extent, strict=True))] = np.frombuffer(data, kinds[dtype]).reshape(extent)
        hashes[name] = xxhash.xxh3_128_hexdigest(np.ascontiguousarray(whole).tobytes()) if whole.size else "empty"
    return hashes


def lose_a_node(work: Path) -> tuple[tuple[str, ...], bool]:
    """Four nodes (addresses of their own, a launcher, a daemon and a rank each); the one where they met is killed; the others go on, from memory."""
    steps = 60
    with Cluster(work / "nodes", 4, steps=steps, pace_s=0.15, parity=1) as nodes:
        nodes.start()
        nodes.await_world(4, 0.0)
        reached = nodes.await_step(nodes.step() + 5)
        say(f"SIGKILL for everything on node 0 (launcher, rank, daemon; the others met there), at step {reached}")
        killed = nodes.nodes[0].kill()
        first = nodes.await_world(3, killed)
        restored = nodes.events("restored")[-1]
        lost = max(e["step"] for e in nodes.events("step") if e["t"] < killed) - restored["step"]
        seconds = first["t"] - killed
        say(f"3 nodes go on from step {restored['step']} out of each other's memory, {seconds:.1f} s after the kill")
        codes = nodes.wait()
        truth = reference(steps)
        said = [e for e in nodes.events() if e.get("digest")]
        same = all(e["digest"] == truth[e["step"]] for e in said) and nodes.step() == steps and codes[1:] == [0, 0, 0]
        say(f"finished; all {len(said)} digests of weights, moments and data position {'equal' if same else 'DIFFER FROM'} those of a run on one rank without ckptd")
    ok = same and restored["source"] == "memory" and lost <= 1
    return ("node 0 of 4 killed", str(max(0, lost)), f"{seconds:.1f}", f"step {restored['step']} from {restored['source']}, on 3 nodes"), ok


def step_time(job: Job) -> float:
    """Median milliseconds of a step of rank 0, ckptd's part included; the first three of each process are left out."""
    by_process: dict[int, list[float]] = {}
    for m in job.marks("step"):
        if m["rank"] == 0:
            by_process.setdefault(m["pid"], []).append(m["s"])
    return statistics.median([s for seconds in by_process.values() for s in seconds[3:]]) * 1e3


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--keep", action="store_true", help="leave the working directory for a look")
    a = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="ckptd-demo-"))
    rows: list[tuple[str, ...]] = []
    script = [*MODEL, "--pause-s", "0.02"]
    ok = True
    try:
        say("the loop without ckptd, uninterrupted: FSDP2 on 4 ranks, gloo")
        plain = Job(work, "fsdp", steps=a.steps, name="plain", run=["--standby", "0"], script=[*script, "--without-ckptd"]).start()
        if plain.wait() != 0:
            print(plain.tail())
            return 1
        say("the same job under `ckptd run`, a snapshot every step")
        job = Job(work, "fsdp", steps=a.steps, name="demo", script=script, run=["--store", str(work / "store"), "--persist-every", str(a.steps)]).start()
        job.await_step(a.steps // 4)
        say("SIGKILL for rank 2, in mid-step")
        event = kill_and_measure(job, [2])
        rows.append(("rank 2 killed", str(event["lost"]), f"{event['seconds']:.1f}", f"step {event['step']} from {event['source']}"))
        say(f"the job goes on from step {event['step']}, {event['seconds']:.1f} s after the kill")
        reached = job.await_step(event["step"] + a.steps // 4)
        pid = daemon_pid(work / "d")
        os.kill(pid, signal.SIGKILL)
        killed_s = time.monotonic()
        say(f"SIGKILL for the daemon (pid {pid}) in mid-training, at step {reached}")
        while True:
            try:
                new = daemon_pid(work / "d")
            except Exception:  # noqa: BLE001  until the launcher has brought the next one up
                new = pid
            if new != pid:
                break
            time.sleep(0.02)
        back_s = time.monotonic() - killed_s
        now = job.await_step(reached + 3)
        rows.append(("daemon killed", "0", f"{back_s:.1f} (daemon)", f"training unharmed: step {reached} to {now}"))
        adopted = [line for line in (work / "d" / "daemon.log").read_text().splitlines() if "adopted" in line and "0 arenas" not in line]
        say(f"training did not notice; {adopted[-1].split(' INFO ')[-1] if adopted else 'nothing was adopted'}")
        job.await_step(now + 4)  # snapshots begin again with the first step after the new daemon
        say("SIGKILL for all ranks at once: only the new daemon has the state")
        event = kill_and_measure(job, [0, 1, 2, 3])
        rows.append(("all ranks killed", str(event["lost"]), f"{event['seconds']:.1f}", f"step {event['step']} from {event['source']}"))
        ok &= event["source"] == "memory" and event["lost"] <= 1
        if job.wait() != 0:
            print(job.tail())
            return 1
        same = [x["state"] == y["state"] and x["rng"] == y["rng"] for x, y in zip(job.finals(), plain.finals(), strict=True)]
        say(f"finished; bit-equal to the uninterrupted run on ranks {same}")
        ok &= all(same)
        stop_daemon(work / "d")
        images = work / "store" / "demo" / f"step-{a.steps:08}" / "images"
        truth = assemble(images)
        for title, parallel, ranks in LAYOUTS:
            began = time.monotonic()
            again = Job(
                work, parallel, ranks=ranks, steps=a.steps, name=f"as-{parallel}-{ranks}", run=["--standby", "0", "--job", "demo", "--store", str(work / "store")],
                script=[*MODEL, "--restore-only"],
            ).start()  # fmt: skip
            code = again.wait()
            found: dict[str, str] = {}
            for r in range(ranks) if code == 0 else ():
                found |= json.loads((again.out / f"restored{r}.json").read_text())["hashes"]
            wrong = sorted(n for n in found if found[n] != truth.get(n))
            equal = code == 0 and not wrong and len(found) >= len(truth) - 2
            took = [m["seconds"] for m in again.marks("restored")]
            say(f"persisted step {a.steps} as {title}: {'bit-equal' if equal else f'DIFFERS {wrong[:3]}'}, {len(found)} tensors, {time.monotonic() - began:.1f} s")
            if code != 0:
                print(again.tail())
            rows.append((f"restored as {title}", "0", f"{max(took, default=0):.2f}", "disk, bit-equal" if equal else "DIFFERS"))
            ok &= equal
        without, with_ = step_time(plain), step_time(job)
        say("four nodes that protect each other (parity 1): the same script under one `ckptd run` each")
        row, held = lose_a_node(work)
        rows.insert(3, row)
        ok &= held
    finally:
        stop_daemon(work / "d")
        if a.keep:
            print(f"kept: {work}")
        else:
            shutil.rmtree(work, ignore_errors=True)
    print()
    print(f"{'event':<28} {'steps lost':>10}  {'seconds to next step':>20}  source")
    for event_, lost, seconds, source in rows:
        print(f"{event_:<28} {lost:>10}  {seconds:>20}  {source}")
    print(f"\nstep time, median: {without:.1f} ms without ckptd, {with_:.1f} ms with a snapshot every step ({with_ / without:.2f}x, restarts and their standbys' imports included; scripts/bench snapshot measures it undisturbed)")
    print("for restores the seconds are those of session.restore()")
    print(f"{'everything held' if ok else 'SOMETHING DID NOT HOLD'} ({time.monotonic() - BEGAN:.0f} s)")
    return 0 if ok else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except subprocess.SubprocessError as error:
        sys.exit(str(error))
