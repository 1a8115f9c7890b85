"""Protection end to end, over loopback: how long it takes, as a fraction of what one plain TCP stream moves.

*Throughput.* Daemons that are nodes of one job; ranks that only fill slots. From the moment when all nodes have committed a step to the moment when all
say that it is PROTECTED: listing, moving every block m times, checking it, coding, sealing. The reference moves as many bytes through one TCP
connection between two processes, in the same round. All daemons share this machine's cores, so this is the cost of protecting n nodes at once.

*Step time.* The same real job (FSDP2, gloo) on three nodes of this machine, with parity and without, one after the other and again: the median of a step. Three launchers, daemons
and ranks share its cores, so whatever protecting takes is taken from training; on nodes of their own it has the cores that training leaves.
"""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from pathlib import Path

from benchmarks import harness
from benchmarks.harness import Aim, Bench, Table, median

MB = 1 << 20
SHAPES = [(2, 1), (4, 1), (5, 2)]


def run(bench: Bench) -> None:
    """Throughput of each shape."""
    image_bytes = bench.pick(96, 24) * MB
    rounds = bench.rounds or bench.pick(7, 3)
    rows = []
    for n, m in SHAPES:
        found = harness.ranks(
            "benchmarks.protect:throughput", {"n": n, "m": m, "image_bytes": image_bytes, "rounds": rounds, "directory": str(bench.directory / f"{n}{m}")},
            world=1, directory=bench.directory / f"r{n}{m}",
        )[0]  # fmt: skip
        bench.raw[f"({n},{m})"] = found
        ratio = median([f["bytes"] / f["protect_s"] / f["tcp_bytes_per_s"] for f in found])
        seconds, tcp = median([f["protect_s"] for f in found]), median([f["tcp_bytes_per_s"] for f in found])
        rows.append([f"({n},{m})", n * image_bytes / 1e6, seconds, median([f["bytes"] for f in found]) / seconds / 1e9, tcp / 1e9, ratio, found[-1]["parity_bytes"] / image_bytes])
        bench.aims.append(Aim(f"({n},{m}): bytes moved while protecting, against one plain TCP stream", ratio, ">=", bench.pick(0.15, 0.05), "x"))
        bench.aims.append(Aim(f"({n},{m}): memory of a fragment against m/(n-m) of an image", found[-1]["parity_bytes"] / image_bytes * (n - m) / m, "<=", 1.1, "x"))
    step_time(bench)
    columns = ["(n,m)", "images MB", "protect s", "moved GB/s", "plain TCP GB/s", "x TCP", "fragment / image"]
    bench.tables.append(Table(f"protecting one step, {image_bytes >> 20} MiB per node, {rounds} rounds", columns, rows))


def step_time(bench: Bench) -> None:
    """What protecting every step adds to a step."""
    sys.path.insert(0, str(harness.ROOT))
    from tests.train.cluster import Cluster

    steps, pairs, rows = bench.pick(60, 20), bench.pick(3, 1), []
    found: dict[int, list[float]] = {0: [], 1: []}
    for pair in range(pairs):
        for parity in (0, 1) if pair % 2 == 0 else (1, 0):
            where = bench.directory / f"step{pair}{parity}"
            with Cluster(where, 3, nnodes="3", steps=steps, pace_s=0.3, parity=parity, env={"SCALE": "16", "DIGEST": "0"}) as nodes:
                nodes.start()
                codes = nodes.wait(300.0)
                if any(codes):
                    raise RuntimeError(nodes.tails())
                found[parity] += [e["s"] for e in nodes.events("step")[5:]]
    plain, protected = median(found[0]) * 1e3, median(found[1]) * 1e3
    rows.append([3, steps, pairs, plain, protected, protected - plain, protected / plain])
    bench.raw["step_time"] = found
    bench.tables.append(Table("a step of a job on three nodes, every step snapshotted", ["nodes", "steps", "runs each", "parity 0 ms", "parity 1 ms", "added ms", "x"], rows))


def throughput(*, n: int, m: int, image_bytes: int, rounds: int, directory: str) -> list[dict[str, float]]:
    """n daemons, n ranks that fill; each round beside a plain stream."""
    sys.path.insert(0, str(harness.ROOT))
    from tests.daemon.rig import Rig

    base = Path(directory)
    base.mkdir(parents=True)
    rig = Rig(base)
    found = []
    try:
        names = [f"n{i}" for i in range(n)]
        for name in names:
            rig.start(name)
        peers = [rig.client(name).status()["peer_address"] for name in names]
        ranks = [rig.trainer(x, i, world=n, local=1, node=i, peers=peers, slot_count=4, nbytes=image_bytes, parity=m) for i, x in enumerate(names)]
        for step in range(1, rounds + 2):
            for t in ranks:
                t.fill(step)
            for t in ranks:
                t.reached("committed", step, 60)
            began_s = time.perf_counter()
            for t in ranks:
                t.reached("protected", step, 120)
            took_s = time.perf_counter() - began_s
            parity = sum(t.job()["group"]["fragment_bytes"] for t in ranks) / 2 / n
            row: dict[str, float] = {"protect_s": took_s, "bytes": n * m * image_bytes, "tcp_bytes_per_s": plain(n * m * image_bytes), "parity_bytes": parity}
            found += [row] if step > 1 else []
    finally:
        rig.close()
    return found


def plain(count: int) -> float:
    """Bytes per second of one TCP connection between two processes, both with buffers of 1 MiB."""
    code = "import socket,sys\ns=socket.create_connection(('127.0.0.1',int(sys.argv[1])));b=bytes(1<<20)\nfor _ in range(int(sys.argv[2])>>20): s.sendall(b)"
    with socket.create_server(("127.0.0.1", 0)) as server:
        child = subprocess.Popen([sys.executable, "-c", code, str(server.getsockname()[1]), str(count)])
        sock, _ = server.accept()
        buffer, got = bytearray(MB), 0
        with sock:
            began_s = time.perf_counter()
            while size := sock.recv_into(buffer):
                got += size
            took_s = time.perf_counter() - began_s
        child.wait()
    return got / took_s
