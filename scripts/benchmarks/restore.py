"""How fast state comes back: from the daemon's memory against memcpy, and resharded from disk against dcp.load.

*Memory.* One rank of one thread; memcpy is `torch._foreach_copy_` from a populated mapping into the same tensors, in the same process and round.

- "new session": attach and restore again in one process. Nobody died, so the daemon verifies while the restore waits.
- "after a death": a new process, as after a restart; the daemon began to verify when the last one died.
- "... optimizer without state": the same, where a restore has to make the moments first, as it really is after a restart. Memory that is touched for the
  first time costs more than the copy.

*Disk.* Persisted by 4 ranks of FSDP2, restored by 2, against dcp.load of what dcp.save wrote under the same 4 ranks. Both ends are compared bit by bit.
Figures of a round are those of its slowest rank.
"""

from __future__ import annotations

import mmap
import os
import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import harness
from benchmarks.harness import Aim, Bench, Table, median

JOB = "bench"


# --- in the ranks -----------------------------------------------------------------------------------------------------------


def trained(gpt: dict[str, Any], *, stepped: bool = True) -> tuple[Any, Any]:
    """A model and its optimizer; `stepped`: with state, after a step with made-up gradients."""
    import torch
    import train_gpt

    a = Namespace(parallel="fsdp", heads=8, context=32, batch=8, dropout=0.0, dtype="fp32", device="cpu", seed=7, tie=False, freeze=False, **gpt)
    torch.manual_seed(a.seed)
    model = train_gpt.build(a)[0]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    if stepped:
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def tensors_of(model: Any, optimizer: Any) -> dict[str, Any]:
    import train_gpt

    return {n: train_gpt.local(t).detach() for n, t in train_gpt.state_of(model, optimizer).items()}


class Phases:
    """Seconds in restore's two phases, seen from outside."""

    def __init__(self) -> None:
        from ckptd import restore as restoring

        self.seconds: dict[str, float] = {}
        for name in ("stage", "apply"):
            setattr(restoring, name, self._seen(name, getattr(restoring, name)))

    def _seen(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def seen(*args: Any, **kwargs: Any) -> Any:
            began_s = time.perf_counter()
            try:
                return real(*args, **kwargs)
            finally:
                self.seconds[name] = time.perf_counter() - began_s

        return seen


class Memcpy:
    """From a populated mapping into the tensors, all in one call."""

    def __init__(self, tensors: list[Any]) -> None:
        import torch

        self.tensors = tensors
        self.mapping = mmap.mmap(-1, sum(t.nbytes for t in tensors) + 64 * len(tensors))
        base, at, self.sources = torch.frombuffer(self.mapping, dtype=torch.uint8), 0, []
        for t in tensors:
            self.sources.append(base[at : at + t.nbytes].view(t.dtype).view(t.shape).copy_(t))
            at += -(-t.nbytes // 64) * 64

    def __call__(self) -> None:
        import torch

        torch._foreach_copy_(self.tensors, self.sources)


def attach(model: Any, optimizer: Any, **more: Any) -> Any:
    import ckptd

    return ckptd.attach(model=model, optimizer=optimizer, job=JOB, start_daemon=False, required=True, **more)


def hold(*, gpt: dict[str, Any]) -> dict[str, Any]:
    """The only rank: have a snapshot committed, and die with it."""
    model, optimizer = trained(gpt)
    session = attach(model, optimizer)
    session.restore()
    session.step(1)
    if not session.wait("committed", timeout_s=60):
        raise RuntimeError(str(session.status()))
    return {"state_bytes": sum(t.nbytes for t in tensors_of(model, optimizer).values())}


def back(*, gpt: dict[str, Any], stepped: bool, rounds: int) -> list[dict[str, float]]:
    """The only rank, again: restore `rounds` times, each beside memcpy. Dies without closing, so that the next finds what this one found."""
    model, optimizer = trained(gpt, stepped=stepped)
    phases = Phases()
    found = []
    memcpy = Memcpy([*tensors_of(model, optimizer).values()]) if stepped else None
    if memcpy is not None:
        memcpy()
    session = None
    for _ in range(rounds):
        if session is not None:
            session.close()
        began_s = time.perf_counter()
        session = attach(model, optimizer)
        row: dict[str, float] = {"attach_s": time.perf_counter() - began_s}
        before_s = [] if memcpy is None else [harness.timed(memcpy)]
        with harness.no_collector():
            restored = session.restore()
        if restored.source != "memory" or restored.step != 1:
            raise RuntimeError(str(restored))
        if memcpy is None:
            memcpy = Memcpy([*tensors_of(model, optimizer).values()])
            memcpy()
        row |= {"restore_s": restored.seconds, "memcpy_s": sum([*before_s, harness.timed(memcpy)]) / (len(before_s) + 1), "bytes": restored.bytes}
        found.append(row | {f"{k}_s": v for k, v in phases.seconds.items()})
    return found


def save(*, gpt: dict[str, Any], store: str, dcp_path: str) -> dict[str, Any]:
    """Four ranks: the same state into ckptd's durable tier, and by dcp.save."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict

    model, optimizer = trained(gpt)
    session = attach(model, optimizer, store=store)
    session.restore()
    session.step(1)
    session.persist(1)
    if not session.wait("persisted", 1, timeout_s=120):
        raise RuntimeError(str(session.status()))
    session.close()
    both = get_state_dict(model, optimizer)
    dcp.save({"model": both[0], "optim": both[1]}, checkpoint_id=dcp_path)
    return {"state_bytes": sum(t.nbytes for t in tensors_of(model, optimizer).values())}


def reshard(*, gpt: dict[str, Any], store: str, dcp_path: str, rounds: int, cold: bool) -> list[dict[str, Any]]:
    """Two ranks: the state of four, again and again."""
    import torch
    import torch.distributed as dist
    import torch.distributed.checkpoint as dcp
    import train_gpt
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    model, optimizer = trained(gpt)
    tensors = tensors_of(model, optimizer)
    phases = Phases()
    session = None

    def slowest(seconds: float) -> float:
        t = torch.tensor([seconds])
        dist.all_reduce(t, dist.ReduceOp.MAX)
        return t.item()

    def with_ckptd() -> dict[str, float]:
        nonlocal session
        if session is not None:
            session.close()
        session = attach(model, optimizer, store=store)
        forget()
        restored = session.restore()
        if restored.source in {"memory", "fresh"}:
            raise RuntimeError(str(restored))
        return {"load_s": restored.seconds, "all_s": restored.seconds} | {f"{k}_s": v for k, v in phases.seconds.items()}

    def with_dcp() -> dict[str, float]:
        forget()
        began_s = time.perf_counter()
        both = get_state_dict(model, optimizer)
        state = {"model": both[0], "optim": both[1]}
        load_s = harness.timed(lambda: dcp.load(state, checkpoint_id=dcp_path))
        set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optim"])
        return {"load_s": load_s, "all_s": time.perf_counter() - began_s}

    def forget() -> None:
        """Zeros, and the page cache as this turn wants it."""
        torch._foreach_zero_([*tensors.values()])
        dist.barrier()
        if dist.get_rank() == 0:
            cache([store, dcp_path], warm=not is_cold)
        dist.barrier()

    found, hashes = [], set()
    cases = [(name, c) for c in (False, True)[: 1 + cold] for name in ("ckptd", "dcp")]
    for turn in range(rounds + 1):  # the first one warms up
        for name, is_cold in harness.rotated(cases, turn):
            with harness.no_collector():
                row = with_ckptd() if name == "ckptd" else with_dcp()
            tensors = tensors_of(model, optimizer)
            hashes.add(tuple(train_gpt.hash_of(t) for t in tensors.values()))
            if turn:
                found.append({"case": name, "cold": is_cold, "turn": turn, **{k: slowest(v) for k, v in row.items()}})
    if len(hashes) != 1:
        msg = "the two did not load the same state"
        raise RuntimeError(msg)
    return found


def cache(directories: list[str], *, warm: bool) -> None:
    """Have all files in the page cache, or none of them."""
    for path in [p for d in directories for p in Path(d).rglob("*") if p.is_file()]:
        fd = os.open(path, os.O_RDONLY)
        try:
            if warm:
                while os.read(fd, 8 << 20):
                    pass
            else:
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)


# --- the settings -----------------------------------------------------------------------------------------------------------


def run(bench: Bench) -> None:
    """Memory first, then disk."""
    memory(bench)
    disk(bench)


def memory(bench: Bench) -> None:
    """One rank, whose processes come and go beside one daemon."""
    gpt = bench.pick({"width": 512, "layers": 16}, {"width": 512, "layers": 5})
    rounds = bench.rounds or bench.pick(7, 3)
    processes = bench.rounds or bench.pick(5, 1)
    env = {"CKPTD_DIR": str(bench.directory / "m")}

    def one(target: str, **arguments: Any) -> Any:
        return harness.ranks(f"benchmarks.restore:{target}", {"gpt": gpt, **arguments}, world=1, directory=bench.directory / "one", env=env)[0]

    with harness.daemon(bench.directory / "m"):
        size = one("hold")["state_bytes"]
        first = [one("back", stepped=True, rounds=1 + (rounds if i == 0 else 0)) for i in range(processes)]
        bare = [one("back", stepped=False, rounds=1)[0] for _ in range(processes)]
    found = {"after a death": [f[0] for f in first], "after a death, optimizer without state": bare, "new session": first[0][1:]}
    rows = []
    for name, each in found.items():
        ms = [1e3 * median([r[k] for r in each]) for k in ("attach_s", "restore_s", "stage_s", "apply_s", "memcpy_s")]
        gb_s = median([r["bytes"] / r["restore_s"] for r in each]) / 1e9
        rows.append([name, len(each), *ms, gb_s, median([r["memcpy_s"] / r["restore_s"] for r in each])])
    columns = ["memory", "n", "attach ms", "restore ms", "of it stage", "of it apply", "memcpy ms", "restore GB/s", "x memcpy"]
    bench.tables.append(Table(f"from memory: 1 rank, 1 thread, state {size / 1e6:.0f} MB", columns, rows))
    bench.raw["memory"] = found
    slack = bench.pick(1.0, 0.7)
    by_name = {row[0]: row[-1] for row in rows}
    bench.aims += [
        Aim("memory, after a death: restore's bytes/s against memcpy's", by_name["after a death"], ">=", 0.8 * slack, "x"),
        Aim("memory, new session: restore's bytes/s against memcpy's", by_name["new session"], ">=", 0.8 * slack, "x"),
    ]


def disk(bench: Bench) -> None:
    """Saved by four ranks, loaded by two that never saw it, beside a daemon that never did."""
    gpt = bench.pick({"width": 512, "layers": 16}, {"width": 512, "layers": 3})
    paths = {"store": str(bench.directory / "store"), "dcp_path": str(bench.directory / "dcp")}
    rounds = bench.rounds or bench.pick(5, 2)
    with harness.daemon(bench.directory / "s"):
        four = harness.ranks(
            "benchmarks.restore:save", {"gpt": gpt, **paths}, world=4, directory=bench.directory / "four", env={"CKPTD_DIR": str(bench.directory / "s")}
        )
    with harness.daemon(bench.directory / "l"):
        arguments = {"gpt": gpt, **paths, "rounds": rounds, "cold": not bench.quick}
        two = harness.ranks(
            "benchmarks.restore:reshard", arguments, world=2, directory=bench.directory / "two", env={"CKPTD_DIR": str(bench.directory / "l")}
        )[0]
    bench.raw["disk"] = two
    size = sum(f["state_bytes"] for f in four)
    rows, times = [], {}
    for cold in (False, True)[: 1 + (not bench.quick)]:
        by = {name: [r for r in two if (r["case"], r["cold"]) == (name, cold)] for name in ("ckptd", "dcp")}
        pairs = [*zip(sorted(by["ckptd"], key=_turn), sorted(by["dcp"], key=_turn), strict=True)]
        times[cold] = median([d["load_s"] / c["all_s"] for c, d in pairs])
        all_times = median([d["all_s"] / c["all_s"] for c, d in pairs])
        where = "cold" if cold else "page cache"
        phases = [1e3 * median([c[k] for c, _ in pairs]) for k in ("stage_s", "apply_s")]
        rows += [
            [where, "session.restore", 1e3 * median([c["all_s"] for c, _ in pairs]), *phases, size / 1e9 / median([c["all_s"] for c, _ in pairs]), 1.0],
            [where, "dcp.load", 1e3 * median([d["load_s"] for _, d in pairs]), None, None, size / 1e9 / median([d["load_s"] for _, d in pairs]), times[cold]],
            [where, "dcp, with get and set", 1e3 * median([d["all_s"] for _, d in pairs]), None, None, size / 1e9 / median([d["all_s"] for _, d in pairs]), all_times],
        ]
    title = f"from disk: saved by 4 ranks, loaded by 2 (FSDP2), state {size / 1e6:.0f} MB, {rounds} rounds"
    bench.tables.append(Table(title, ["files", "how", "ms", "of it stage", "of it apply", "GB/s", "x ours"], rows))
    bench.aims.append(Aim("disk, resharded, page cache: dcp.load's time / ours", times[False], ">=", bench.pick(2.0, 1.3), "x"))


def _turn(row: dict[str, Any]) -> int:
    return int(row["turn"])
