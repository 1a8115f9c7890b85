"""What a snapshot of every step costs the training loop: ckptd against no checkpoints, a bare copy, torch.save and torch's own async savers.

Blocks of steps, one case after the other, in one training loop. A block's first step is not counted: it brings the case into its steady state
(work of the last snapshot beside this step). The figure of a block is the mean of its other steps, for what falls in every third step counts, too.

- "no checkpoints" runs twice per round: the mean of both is the round's reference, the difference between them is the noise.
- A saver of torch's must wait for its last save before it begins the next; that wait is added time. Where it cannot save every step, it is
  run again with a save every k steps, k as many as its save took while training went on.
- In torch's favour: it writes to memory (tmpfs), its state dict is made once and not at every save, its stagers are kept where it lets one keep them.
- The bare copy is `torch._foreach_copy_` of all local tensors into a warm mapping at the end of the step: what any saver that copies in the
  step costs at least (DLRover 0.6.1 was measured to sit there).
"""

from __future__ import annotations

import mmap
import os
import shutil
import tempfile
import time
from argparse import Namespace
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from benchmarks import harness
from benchmarks.harness import Aim, Bench, Table, median

K_MAX = 16
"""Most steps between two saves of torch's: enough for each seen."""
NONE = ("no checkpoints", "no checkpoints, again")
CKPTD, COPY = "ckptd", "bare copy"
TORCH = "dcp "
"""What names of torch's async savers begin with."""


# --- the cases, in the ranks ------------------------------------------------------------------------------------------------


class Case:
    """Nothing: the loop without checkpoints. `save` is called at the end of a step, `fence` before the next update, `drain` after a block."""

    def save(self, step: int) -> None: ...

    def fence(self) -> None: ...

    def drain(self) -> None: ...

    def done(self) -> bool:
        """Whether the last save is complete, so that the next would not wait."""
        return True


class Ckptd(Case):
    def __init__(self, session: Any) -> None:
        self.session = session
        self.save = session.step

    def drain(self) -> None:
        if not self.session.wait("committed", timeout_s=60):
            msg = f"the last snapshot of a block was not committed: {self.session.status()}"
            raise RuntimeError(msg)


class Copy(Case):
    """Into a populated memfd mapping, as ckptd's slots are."""

    def __init__(self, tensors: list[Any]) -> None:
        import torch

        size = sum(-(-t.nbytes // 64) * 64 for t in tensors)
        fd = os.memfd_create("bench-copy")
        os.ftruncate(fd, size)
        self.mapping, self.tensors = mmap.mmap(fd, size), tensors
        os.close(fd)
        base, at, self.places = torch.frombuffer(self.mapping, dtype=torch.uint8), 0, []
        for t in tensors:
            self.places.append(base[at : at + t.nbytes].view(t.dtype).view(t.shape))
            at += -(-t.nbytes // 64) * 64
        self.copy = torch._foreach_copy_
        self.copy(self.places, tensors)

    def save(self, step: int) -> None:  # noqa: ARG002
        self.copy(self.places, self.tensors)


class TorchSave(Case):
    def __init__(self, tensors: dict[str, Any], path: Path) -> None:
        self.tensors, self.path = tensors, path

    def save(self, step: int) -> None:  # noqa: ARG002
        import torch

        torch.save(self.tensors, self.path)


class Dcp(Case):
    """dcp.async_save. `stager`: kept between saves; None: dcp makes one per save."""

    def __init__(self, state: dict[str, Any], path: Path, *, process: bool = False, stager: Any = None) -> None:
        import torch.distributed as dist
        from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType

        self.state, self.path, self.stager = state, path, stager
        self.group = dist.new_group()  # its thread must not share a group with training
        self.type = AsyncCheckpointerType.PROCESS if process else AsyncCheckpointerType.THREAD
        self.pending: Future[Any] | None = None
        self.staging: Future[Any] | None = None

    def save(self, step: int) -> None:  # noqa: ARG002
        import torch.distributed.checkpoint as dcp

        self.drain()
        made = dcp.async_save(
            self.state, storage_writer=dcp.FileSystemWriter(self.path, overwrite=True), process_group=self.group,
            async_checkpointer_type=self.type, async_stager=self.stager,
        )  # fmt: skip
        self.staging, self.pending = (None, made) if isinstance(made, Future) else (made.staging_completion, made.upload_completion)

    def fence(self) -> None:
        if self.staging is not None:
            self.staging.result()
            self.staging = None

    def drain(self) -> None:
        if self.pending is not None:
            self.pending.result()
            self.pending = None

    def done(self) -> bool:
        return self.pending is None or self.pending.done()


def train(*, gpt: dict[str, Any], steps: int, rounds: int, names: list[str], fast: str, directory: str) -> dict[str, Any]:
    """A rank: build, warm up, run the rounds. Returns the blocks by case, and facts."""
    import torch
    import torch.distributed as dist
    import train_gpt
    from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
    from torch.distributed.checkpoint.state_dict import get_state_dict

    import ckptd

    a = Namespace(parallel="fsdp", heads=8, dropout=0.0, dtype="fp32", device="cpu", seed=7, tie=False, freeze=False, **gpt)
    torch.manual_seed(a.seed)
    model, forward_backward, dp_rank, dp_size = train_gpt.build(a)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    loader = train_gpt.Loader(a, dp_rank, dp_size)
    session = ckptd.attach(model=model, optimizer=optimizer, extras={"loader": loader}, directory=directory, start_daemon=False, required=True)
    session.restore()
    number = 0
    in_case_s = 0.0

    def step(case: Case, *, save: bool) -> float:
        nonlocal number, in_case_s
        number += 1
        began_s = time.perf_counter()
        x, y, _ = next(loader)
        forward_backward(x, y)
        in_case_s += harness.timed(case.fence)
        optimizer.step()
        optimizer.zero_grad()
        if save:
            in_case_s += harness.timed(lambda: case.save(number))
        return time.perf_counter() - began_s

    def agreed(value: float) -> int:
        most = torch.tensor([value])
        dist.all_reduce(most, dist.ReduceOp.MAX)
        return int(most)

    for _ in range(2):
        step(Case(), save=False)
    tensors = {n: train_gpt.local(t).detach() for n, t in train_gpt.state_of(model, optimizer).items()}
    both = get_state_dict(model, optimizer)
    state = {"model": both[0], "optim": both[1]}
    shared = {"use_pinned_memory": False, "use_shared_memory": True, "use_non_blocking_copy": False}
    make: dict[str, Callable[[], Case]] = {
        NONE[0]: Case,
        NONE[1]: Case,
        CKPTD: lambda: Ckptd(session),
        COPY: lambda: Copy([*tensors.values()]),
        "torch.save": lambda: TorchSave(tensors, Path(fast) / f"rank{dist.get_rank()}.pt"),
        "dcp thread": lambda: Dcp(state, Path(fast) / "thread"),
        "dcp thread, kept stager": lambda: Dcp(state, Path(fast) / "kept", stager=DefaultStager(StagingOptions(use_async_staging=False, **shared))),
        "dcp thread, staging beside": lambda: Dcp(state, Path(fast) / "beside", stager=DefaultStager(StagingOptions(use_async_staging=True, **shared))),
        "dcp process, kept stager": lambda: Dcp(
            state, Path(fast) / "process", process=True, stager=DefaultStager(StagingOptions(use_async_staging=False, **shared))
        ),
    }
    cases = {name: make[name]() for name in names}
    every: dict[str, list[int]] = {name: [1] for name in cases}
    for name, case in cases.items():  # warm up, and see how long torch's savers take beside training
        step(case, save=True)
        step(case, save=True)
        case.drain()
        if name.startswith(TORCH):
            step(case, save=True)
            between = 1
            while not agreed(case.done()) or agreed(-case.done()) != -1:
                step(case, save=False)
                between += 1
                if between == K_MAX:
                    break
            every[name] += [between] * (between > 1)
            case.drain()

    blocks: dict[str, list[dict[str, float]]] = {}
    plan = [(name, k) for name, ks in every.items() for k in ks]

    def block(name: str, k: int) -> None:
        nonlocal in_case_s
        case = cases[name]
        dist.barrier()
        step(case, save=k == 1)
        in_case_s = 0.0
        count = -(-steps // k) * k
        took_s = sum(step(case, save=i % k == 0) for i in range(count))
        blocks.setdefault(f"{name}/{k}", []).append({"step_s": took_s / count, "in_case_s": in_case_s * k / count, "saves": count / k})
        case.drain()

    with harness.no_collector():
        for turn in range(rounds):
            for name, k in harness.rotated(plan, turn):
                block(name, k)
    status = session.status()
    session.close()
    return {
        "blocks": blocks,
        "state_bytes": sum(t.nbytes for t in tensors.values()),
        "counts": dict(Counter(status["counts"])),
        "timings_s": status["timings_s"],
    }


# --- the settings -----------------------------------------------------------------------------------------------------------


def run(bench: Bench) -> None:
    """Four ranks of FSDP2 on whatever cores there are; and one rank of one thread, beside which a core is free."""
    every = [*NONE, CKPTD, COPY, "torch.save", "dcp thread", "dcp thread, kept stager", "dcp thread, staging beside", "dcp process, kept stager"]
    some = [*NONE, CKPTD, COPY, "dcp thread, kept stager", "dcp thread, staging beside"]
    names = bench.pick(every, some)
    four = setting(bench, "4 ranks", 4, names, bench.pick(FOUR, FOUR_QUICK))
    slack = bench.pick(1.0, 2.0)
    ckptd, copy, leeway = four.added_ms(CKPTD), four.added_ms(COPY), slack * four.leeway_ms
    best_name = min((n for n in four.rows if n.startswith(TORCH)), key=four.added_ms)
    bench.notes += [four.noise("4 ranks"), f"4 ranks: the best of torch's savers, per snapshot, is '{best_name}'."]
    bench.aims += [
        Aim("4 ranks: step with ckptd / without checkpoints", four.ratio(CKPTD), "<=", 1 + 0.10 * slack, "x"),
        Aim("4 ranks: added by the best of torch's savers / by ckptd", four.added_ms(best_name) / max(ckptd, four.leeway_ms), ">=", 3 / slack, "x"),
        Aim(f"4 ranks: added by ckptd ({ckptd:.1f} ms) - added by the bare copy ({copy:.1f} ms)", four.between_ms(CKPTD, COPY), "<=", leeway, " ms"),
        Aim("4 ranks: snapshots that ckptd skipped", four.skipped, "<=", 0),
    ]
    if len(os.sched_getaffinity(0)) < 2:
        bench.notes.append("1 rank: not run, for no core is free beside it.")
        return
    one = setting(bench, "1 rank, 1 thread", 1, names, bench.pick(ONE, ONE_QUICK))
    ckptd, copy, leeway = one.added_ms(CKPTD), one.added_ms(COPY), slack * one.leeway_ms
    bench.notes.append(one.noise("1 rank"))
    bench.aims += [
        Aim(f"1 rank: added by ckptd, against a third of the bare copy's {copy:.1f} ms + leeway", ckptd, "<=", copy / 3 + leeway, " ms"),
        Aim("1 rank: snapshots that ckptd skipped", one.skipped, "<=", 0),
    ]


FOUR = {"gpt": {"width": 512, "layers": 5, "context": 32, "batch": 8}, "steps": 5, "rounds": 5}
FOUR_QUICK = {"gpt": {"width": 256, "layers": 4, "context": 32, "batch": 8}, "steps": 3, "rounds": 3}
ONE = {"gpt": {"width": 512, "layers": 6, "context": 32, "batch": 8}, "steps": 5, "rounds": 7}
ONE_QUICK = {"gpt": {"width": 512, "layers": 3, "context": 32, "batch": 8}, "steps": 3, "rounds": 3}


class Found:
    """The rounds of one setting: per case, its mean step and its time in calls, over ranks, by round."""

    def __init__(self, brought: list[dict[str, Any]]) -> None:
        self.rows: dict[str, list[dict[str, float]]] = {}
        for name, blocks in brought[0]["blocks"].items():
            others = [b["blocks"][name] for b in brought]
            self.rows[name] = [{k: sum(o[i][k] for o in others) / len(others) for k in blocks[i]} for i in range(len(blocks))]
        pairs = [*zip(*(self.steps(n) for n in NONE), strict=True)]
        self.reference = [(x + y) / 2 for x, y in pairs]
        self.noise_ms = 1e3 * median([abs(x - y) / 2 for x, y in pairs])
        self.copy_ms = 1e3 * median([r["in_case_s"] for r in self.row(COPY)])
        self.leeway_ms = min(max(0.01 * 1e3 * median(self.reference), self.noise_ms), self.copy_ms)
        self.skipped = max(b["counts"].get("skipped", 0) for b in brought)
        self.captured = min(b["counts"].get("captured", 0) for b in brought)

    def noise(self, title: str) -> str:
        """What the aims allow for."""
        return (
            f"{title}: a block without checkpoints differs from its round's reference by {self.noise_ms:.1f} ms; leeway {self.leeway_ms:.1f} ms"
            f" (that or 1 % of a step, at most one bare copy of {self.copy_ms:.1f} ms); added times below it count as that much in ratios."
        )

    def row(self, name: str) -> list[dict[str, float]]:
        return self.rows[name if "/" in name else f"{name}/1"]

    def steps(self, name: str) -> list[float]:
        return [r["step_s"] for r in self.row(name)]

    def ratio(self, name: str) -> float:
        return median([s / r for s, r in zip(self.steps(name), self.reference, strict=True)])

    def added(self, name: str) -> list[float]:
        """Milliseconds per snapshot, by round."""
        k = int(name.partition("/")[2] or 1)
        return [1e3 * k * (s - r) for s, r in zip(self.steps(name), self.reference, strict=True)]

    def added_ms(self, name: str) -> float:
        return median(self.added(name))

    def between_ms(self, name: str, other: str) -> float:
        return median([x - y for x, y in zip(self.added(name), self.added(other), strict=True)])


def setting(bench: Bench, title: str, world: int, names: list[str], size: dict[str, Any]) -> Found:
    """Run the ranks beside a daemon of their own, and make the table."""
    size = size | ({"rounds": bench.rounds} if bench.rounds else {})
    directory = bench.directory / f"{world}"
    fast = Path(tempfile.mkdtemp(prefix="ckptd-bench-", dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else bench.directory))
    try:
        with harness.daemon(directory / "d"):
            told = {**size, "names": names, "fast": str(fast), "directory": str(directory / "d")}
            env = {"CKPTD_JOB": "bench", "CKPTD_DIR": str(directory / "d"), "PYTHONWARNINGS": "ignore"}
            brought = harness.ranks("benchmarks.snapshot:train", told, world=world, directory=directory, env=env)
    finally:
        shutil.rmtree(fast, ignore_errors=True)
    found = Found(brought)
    rows = []
    for name, rounds in found.rows.items():
        case, _, k = name.partition("/")
        saves = int(sum(r["saves"] for r in rounds)) if case not in NONE else None
        taken = f"{found.captured} of {found.captured + found.skipped}" if case == CKPTD else saves
        in_call = None if case in NONE else 1e3 * median([r["in_case_s"] for r in rounds])
        added = found.added(name)
        rows.append([case, k, 1e3 * median(found.steps(name)), found.ratio(name), median(added), harness.spread(added), in_call, taken])
    megabytes = brought[0]["state_bytes"] / 1e6
    rest = f"{size['rounds']} rounds of {size['steps']}+ steps, state {megabytes:.0f} MB per rank"
    columns = ["case", "every", "step ms", "x none", "added ms", "+-", "in calls ms", "snapshots"]
    bench.tables.append(Table(f"{title}: {rest}; 'added' and 'in calls' per snapshot", columns, rows))
    bench.raw[title] = brought
    return found
