"""A rank of the tests on a GPU: `python ranks.py RANK WORLD STORE_FILE DEVICE CASE...` prints one JSON line: case -> what its ring says of its own operations.

Two ranks may share one GPU: NCCL refuses that within a host, and it takes NCCL_HOSTID's word for what a host is. So collectives of two ranks, with kernels, channels and
proxies over sockets, can be had on one device; they are slow (their kernels take turns), and real.
On a CPU (DEVICE cpu) the same program runs over gloo, so that it is kept working where no GPU is.
"""

from __future__ import annotations

import datetime as dt
import faulthandler
import json
import os
import statistics
import sys
import time
import traceback

import torch
import torch.distributed as dist

from ckptd.monitor import nccl, record, tap

ELEMENTS = 1 << 20
LATE_MS = 60
TIMEOUT = dt.timedelta(seconds=60)


class Rank:
    def __init__(self, rank: int, world: int, store: str, device: str) -> None:
        self.rank, self.world, self.cuda = rank, world, device == "cuda"
        self.device = torch.device("cuda", 0) if self.cuda else torch.device("cpu")
        self.plugin = nccl.enable() if self.cuda else nccl.State(active=False, why="no CUDA")
        more = {"device_id": self.device} if self.cuda else {}
        dist.init_process_group(
            "nccl" if self.cuda else "gloo", store=dist.FileStore(store, world), rank=rank, world_size=world, timeout=TIMEOUT, **more
        )
        self.tap = tap.attach()
        assert self.tap is not None, "no tap"
        self.attached = nccl.attach(self.tap.ring)
        self.begin = 0

    def tensor(self, n: int = ELEMENTS, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.ones(n, dtype=dtype, device=self.device)

    def settle(self, seconds: float = 0.2) -> None:
        """Everything done, and told by whoever tells it."""
        if self.cuda:
            torch.cuda.synchronize()
        time.sleep(seconds)

    def mark(self, settled: float = 0.2) -> None:
        """What follows is a case of its own."""
        self.settle(settled)
        self.begin = self.tap.ring.word("head")

    def records(self, settled: float = 0.2) -> list[dict]:
        self.settle(settled)
        found = []
        for r in self.tap.ring.read(self.begin).records:
            mark = bool(r["flags"] & record.MARK)
            found.append(
                {
                    "op": (record.MARKS if mark else record.OPS)[int(r["op"])], "mark": mark, "flags": int(r["flags"]), "bytes": int(r["bytes"]), "seq": int(r["seq"]),
                    "dtype": record.DTYPES[int(r["dtype"])] if not mark else record.OPS[int(r["dtype"])], "peer": int(r["peer"]),
                    "inside_us": int(r["inside_us"]), "waited_us": int(r["waited_us"]), "ended": bool(r["ended_ns"]), "returned": bool(r["returned_ns"]),
                    "lasted_us": (int(r["ended_ns"]) - int(r["entered_ns"])) // 1000 if r["ended_ns"] else -1,
                }
            )  # fmt: skip
        return found

    def late(self) -> None:
        """Rank 1 comes late, on the device if there is one."""
        if self.rank == 1 and self.cuda:
            began, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            cycles, spent = 20_000_000, 0.0
            while spent < LATE_MS:
                began.record()
                torch.cuda._sleep(cycles)
                ended.record()
                ended.synchronize()
                spent += began.elapsed_time(ended)
        elif self.rank == 1:
            time.sleep(LATE_MS / 1000)


# --- cases ------------------------------------------------------------------------------------------------------------------


def ops(r: Rank) -> dict:
    """Each operation once, and all of them timed."""
    nccl.times(1)
    x, out = r.tensor(), r.tensor(ELEMENTS * r.world)
    other = (r.rank + 1) % r.world
    for _ in range(2):  # the first makes the communicator, and the times take effect with the next group
        dist.all_reduce(x)
    r.mark()
    dist.all_reduce(x)
    dist.all_gather_into_tensor(out, x)
    dist.reduce_scatter_tensor(x, out)
    dist.broadcast(x, 0)
    dist.reduce(x, 0)
    dist.all_to_all_single(out, out.clone())
    dist.all_gather([torch.empty_like(x) for _ in range(r.world)], x)
    dist.barrier()
    if r.world > 1:
        y = torch.empty_like(x)
        for work in dist.batch_isend_irecv([dist.P2POp(dist.isend, x, other), dist.P2POp(dist.irecv, y, other)]):
            work.wait()
    work = dist.all_reduce(x.to(torch.bfloat16) if r.cuda else x, async_op=True)
    work.wait()
    return {"records": r.records()}


def straggler(r: Rank) -> dict:
    """Rank 1 is late for one collective of five; who waits is seen inside."""
    x = r.tensor()
    nccl.times(1)
    for _ in range(3):
        dist.all_reduce(x)
    r.mark()
    for i in range(5):
        if i == 3:
            r.late()
        dist.all_reduce(x)
        r.settle()
    return {"records": r.records()}


def graph(r: Rank) -> dict:
    """Captured once, replayed three times: capture is seen and does not break; the replays are right."""
    x, out = r.tensor(1 << 16), r.tensor((1 << 16) * r.world)
    nccl.times(1, graphs=True)
    dist.all_gather_into_tensor(out, x)
    r.mark()
    g = torch.cuda.CUDAGraph()
    with torch.cuda.graph(g):
        x.add_(1)
        dist.all_gather_into_tensor(out, x)
    for _ in range(3):
        g.replay()
    torch.cuda.synchronize()
    found = r.records()
    dist.all_reduce(x)
    torch.cuda.synchronize()
    return {"records": found, "value": float(out[-1])}


def waits(r: Rank) -> dict:
    """What proxies wait for, once it is asked for, and not before."""
    x = r.tensor()
    for _ in range(3):
        dist.all_reduce(x)
    r.mark()
    dist.all_reduce(x)
    before = r.records()
    r.mark()
    nccl.waits(True)
    for _ in range(3):
        dist.all_reduce(x)
    r.settle()
    nccl.waits(False)
    return {"before": before, "records": r.records()}


def timing(r: Rank) -> dict:
    """Device times by the tap beside those of torch's events around the same operation; small and big in turns. The tap times some of them."""
    found = []
    sizes = (1 << 16, 1 << 22, 1 << 26)
    outs = {n: (r.tensor(n), r.tensor(n * r.world)) for n in sizes}
    for x, out in outs.values():
        dist.all_gather_into_tensor(out, x)
    for n in sizes * 16:
        x, out = outs[n]
        r.mark(0.01)
        began, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        began.record()
        dist.all_gather_into_tensor(out, x)
        ended.record()
        ops_ = [f for f in r.records(0.03) if not f["mark"]]
        found.append({"bytes": x.nbytes, "event_us": round(began.elapsed_time(ended) * 1e3, 1), "records": len(ops_), "inside_us": ops_[0]["inside_us"]})
    return {"timed": found}


def tapped(r: Rank, wanted: bool) -> None:
    if wanted and r.tap is None:
        r.tap = tap.attach()
        nccl.attach(r.tap.ring)
    elif not wanted and r.tap is not None:
        r.tap.close()
        r.tap = None


def cost(r: Rank) -> dict:
    """Microseconds per all-reduce of 1 KiB and of 4 MiB, of the host alone and in all: without the tap, and with it and one in n groups timed by kernel channels.
    In turns, medians. Without CUDA the plugin has no part in it."""
    us: dict[str, list[tuple[float, float]]] = {}
    for elements, count in ((256, 200), (1 << 20, 30)):
        x = r.tensor(elements)
        for round_ in range(8):
            for name, every in (("no tap", 0), ("tap", 0), ("tap, 1 in 16 timed", 16), ("tap, all timed", 1)):
                tapped(r, name != "no tap")
                nccl.times(every)
                for _ in range(3):
                    dist.all_reduce(x)
                if r.cuda:
                    torch.cuda.synchronize()
                began = time.perf_counter()
                for _ in range(count):
                    dist.all_reduce(x)
                host = time.perf_counter() - began
                if r.cuda:
                    torch.cuda.synchronize()
                whole = time.perf_counter() - began
                if round_:
                    us.setdefault(f"{x.nbytes} B, {name}", []).append((host / count * 1e6, whole / count * 1e6))
    tapped(r, wanted=True)
    return {"host_and_whole_us": {k: [round(statistics.median(v), 2) for v in zip(*values, strict=True)] for k, values in us.items()}}


CASES = {f.__name__: f for f in (ops, straggler, graph, waits, timing, cost)}


def main() -> None:
    faulthandler.dump_traceback_later(30, exit=False)  # who hangs says where
    rank, world, store, device = int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:5]
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": "0"}
    r = Rank(rank, world, store, device)
    said = {"rank": rank, "plugin": r.plugin.active, "why": r.plugin.why, "attached": r.attached}
    for case in sys.argv[5:]:
        nccl.times(16)
        before = nccl.counts()
        try:
            said[case] = CASES[case](r)
        except Exception:  # the other cases say what they can; one that leaves its peer alone ends by the timeout
            said[case] = {"failed": traceback.format_exc()[-2000:]}
            print(said[case]["failed"], file=sys.stderr, flush=True)
        said[case] |= {"layer": r.tap.layer, "errors": r.tap.ring.word("errors"), "device_lost": r.tap.ring.word("device_lost")}
        said[case]["counts"] = {k: v - before[k] for k, v in nccl.counts().items()}
    dist.barrier()
    dist.destroy_process_group()
    print(json.dumps(said), flush=True)


if __name__ == "__main__":
    main()
