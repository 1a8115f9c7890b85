"""A training job that can be made faulty, with labels: what `scripts/bench watch --real` and tests/monitor watch.

    torchrun --nproc-per-node 4 scripts/watch_job.py --layout fsdp --steps 200 --out DIR --fault slow:rank=2,step=40,percent=20

Plain torch: it knows nothing of ckptd (`--session` attaches one). Each rank's computing is time that passes (sleeps in forward and backward, as a host that waits for
its GPU), beside small real tensors: so ranks of one machine with few cores do not starve each other, and what a step takes is known.

Every job contains what must *not* be called a fault: batches of unequal length, an evaluation every `--eval-every` steps, a save by rank 0 every `--save-every`, a
log line by rank 0 every `--log-every`, a cold start.

Layouts: ddp | fsdp (fully_shard over all) | tp_fsdp (tensor parallel 2) | pp (1F1B, a stage per rank) | pp_dp (1F1B over 2 stages, fully_shard in each).
A step's own collectives, in this order: the layout's; `norm` (an all_reduce over the tp group, or over a second group of all ranks); `metrics` (an all_reduce over all).

`--fault KIND:rank=R,step=S[,until=U][,percent=P][,ms=M][,place=W][,what=W]`, see KINDS; it may be repeated. Times are of the rank's median step before S
(percent) or absolute (ms). When a fault begins, its rank appends to DIR/faults.jsonl: {"kind", "rank", "step", "t" (time.time)}.
`--clip` (on for ddp) clips the norm of gradients; `--report-loss` calls ckptd.report_loss: the one line that tells whose loss is no number.

With `--serve DIR` a rank trains not once but as often as it is told, each time in a process that it forks, so that imports are paid once: job N's arguments are
{"args": [...], "env": {...}} in DIR/job<N>.json, its end is told by DIR/job<N>.rank<R>; "args": null ends it all.
Every rank writes DIR/rank<R>.jsonl, one line per step: {"step", "t" (its end), "s" (what it took), "cpu", "loss"}; and DIR/pids.jsonl.
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import ctypes
import gc
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

FOREVER_S = 3600.0
CLASSES = 64
KINDS = {
    "sigstop": "the process stops itself in the middle of a step",
    "sigkill": "the process is killed in the middle of a step",
    "slow": "every step takes `percent` longer: in forward and backward, or at `place` (forward, backward, optimizer)",
    "drift": "every step takes `percent` longer than the one before it, up to 100 %",
    "spike": "one step takes ten times as long",
    "input": "every batch takes `percent` of a step longer to load",
    "gc": "a heap of `ms` thousand objects that is collected in every step",
    "save": "a save takes `ms` instead of a moment (the rank whose fault it is saves too)",
    "desync": "one `metrics` is another operation: `what` is op, size or dtype",
    "skip": "one collective is left out: `what` is metrics or norm",
    "deadlock": "one step does metrics before norm",
    "stuck": "sleeps for ever before `what` (metrics), or at `place`",
    "nan": "from now on the rank's loss is no number",
    "contend": "the rank is pinned to one core, with `ms` processes that spin there (needs --spin)",
}


@dataclass(frozen=True)
class Fault:
    kind: str
    rank: int = 2
    step: int = 40
    until: int = 1 << 30
    percent: float = 20.0
    ms: float = 0.0
    place: str = "all"
    what: str = "metrics"

    @classmethod
    def parse(cls, text: str) -> Fault:
        kind, _, rest = text.partition(":")
        if kind not in KINDS:
            msg = f"no fault {kind!r}: one of {', '.join(KINDS)}"
            raise argparse.ArgumentTypeError(msg)
        values: dict[str, object] = {}
        for pair in filter(None, rest.split(",")):
            name, _, value = pair.partition("=")
            values[name] = value if name in {"place", "what"} else float(value) if name in {"percent", "ms"} else int(value)
        return cls(kind, **values)  # type: ignore[arg-type]


class Injector:
    """The faults of this rank. The job asks it at each place where one may begin; `step` is the step that is under way."""

    def __init__(self, faults: list[Fault], rank: int, out: Path) -> None:
        self.mine = [f for f in faults if f.rank == rank]
        self.rank, self.out, self.step = rank, out, 0
        self.begun: set[Fault] = set()
        self.walls: deque[float] = deque(maxlen=20)
        self.usual_s = 0.0
        self.works = self.works_before = 0
        self.heap: list[object] = []
        self.stressors: list[subprocess.Popen[bytes]] = []

    def next_step(self, step: int, took_s: float | None) -> None:
        self.step, self.works_before, self.works = step, self.works, 0
        if took_s is not None and not any(f.step <= step <= f.until for f in self.mine):
            self.walls.append(took_s)
            self.usual_s = statistics.median(self.walls)

    def active(self, *kinds: str) -> Fault | None:
        """The fault of one of these kinds that is under way at this step; once told, it has begun."""
        for f in self.mine:
            if f.kind in kinds and f.step <= self.step <= f.until:
                if f not in self.begun:
                    self.begun.add(f)
                    self.note(f)
                return f
        return None

    def once(self, *kinds: str) -> Fault | None:
        """As `active`, the first time only."""
        before = set(self.begun)
        f = self.active(*kinds)
        return f if f is not None and f not in before else None

    def note(self, f: Fault) -> None:
        line = {"kind": f.kind, "rank": self.rank, "step": self.step, "t": time.time(), "usual_s": round(self.usual_s, 4)}
        with (self.out / "faults.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")

    # --- places -------------------------------------------------------------------------------------------------------------

    def work(self, way: str) -> float:
        """What this piece of forward or backward takes longer, in seconds."""
        self.works += 1
        if self.works == 3:  # in the midst of forward
            self.end_of_process()
        if (f := self.mine and self.active("slow", "drift")) and f.place in {"all", way}:
            pieces = max(self.works_before, 2) / (1 if f.place == "all" else 2)
            steps = self.step - f.step + 1 if f.kind == "drift" else 1
            return min(f.percent * steps, 100.0 if f.kind == "drift" else 1e9) / 100 * self.usual_s / pieces
        if self.works == 2 and (f := self.mine and self.once("spike")):
            return 9 * self.usual_s
        return 0.0

    def end_of_process(self) -> None:
        if not self.mine:
            return
        if self.once("sigstop"):
            os.kill(os.getpid(), signal.SIGSTOP)
        if self.once("sigkill"):
            os.kill(os.getpid(), signal.SIGKILL)
        for f in self.mine:
            if f.kind == "stuck" and f.place != "all" and f.step == self.step:
                self.begun.add(f)
                self.note(f)
                time.sleep(FOREVER_S)

    def loading(self) -> float:
        f = self.active("input")
        return f.percent / 100 * self.usual_s if f else 0.0

    def between(self) -> None:
        """After the optimizer."""
        if (f := self.active("slow")) and f.place == "optimizer":
            time.sleep(f.percent / 100 * self.usual_s)
        if f := self.active("gc"):
            if not self.heap:
                self.heap = [[i] for i in range(int(f.ms or 300) * 1000)]
            gc.collect()
        elif self.heap:
            self.heap = []
        if f := self.active("contend"):
            if not self.stressors:
                os.sched_setaffinity(0, {0})
                spin = f"import os\nos.sched_setaffinity(0, {{0}})\nwhile os.getppid() == {os.getpid()}: sum(range(9999))"
                self.stressors = [subprocess.Popen([sys.executable, "-c", spin]) for _ in range(int(f.ms or 3))]
        elif self.stressors:
            self.quiet()

    def quiet(self) -> None:
        for p in self.stressors:
            p.kill()
            p.wait()
        self.stressors = []

    def norm_and_metrics(self, norm, metrics, group: object) -> None:
        """A step's own two collectives, and what can go wrong with them."""
        f = self.once("deadlock", "skip", "desync") if self.mine else None
        if f is None:
            norm()
            self.stuck()
            metrics()
            return
        if f.kind == "deadlock":
            metrics()
            norm()
        elif f.kind == "skip":
            (metrics if f.what == "norm" else norm)()
        else:
            norm()
            wrong = {"size": torch.zeros(4096), "dtype": torch.zeros(2, dtype=torch.int32)}.get(f.what, torch.zeros(2))
            if f.what in {"size", "dtype"}:
                dist.all_reduce(wrong, group=group)
            else:
                dist.broadcast(wrong, src=self.rank, group=group)

    def stuck(self) -> None:
        if self.mine and (f := next((f for f in self.mine if f.kind == "stuck" and f.place == "all"), None)) and f.step == self.step:
            self.once("stuck")
            time.sleep(FOREVER_S)


# --- the model --------------------------------------------------------------------------------------------------------------


class Passing(torch.autograd.Function):
    """Time that passes: `work.forward_s` in forward, twice that in backward."""

    @staticmethod
    def forward(ctx, x: Tensor, work: Work) -> Tensor:
        ctx.work = work
        work.spend("forward", 1)
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor):
        ctx.work.spend("backward", 2)
        return grad, None


class Work(nn.Module):
    """One layer's computing, as time. `pace.unit_s` is what forward takes of one layer in this step."""

    def __init__(self, pace: Pace) -> None:
        super().__init__()
        self.pace = pace

    def spend(self, way: str, units: float) -> None:
        s = units * self.pace.unit_s
        spin = s * self.pace.spin
        extra = self.pace.injector.work(way)
        if spin:
            until = time.thread_time() + spin  # processor time: with less of a processor it takes longer
            while time.thread_time() < until:
                pass
        time.sleep(max(0.0, s - spin) + extra)

    def forward(self, x: Tensor) -> Tensor:
        return Passing.apply(x, self) if torch.is_grad_enabled() else self._without_gradient(x)

    def _without_gradient(self, x: Tensor) -> Tensor:
        self.spend("forward", 1)
        return x


class Pace:
    """How long this rank's work takes: jitter of two percent, and once in 48 batches one that is a third longer; times `--uneven`."""

    def __init__(self, a: argparse.Namespace, rank: int, layers: int, injector: Injector) -> None:
        self.injector, self.spin = injector, a.spin
        self.usual_s = a.step_ms / 1e3 / layers / 3 / (a.micro if a.layout.startswith("pp") else a.accumulate)
        self.unit_s, self.uneven = self.usual_s, a.uneven
        self.random = random.Random(a.seed * 1000 + rank)

    def draw(self) -> None:
        jitter = min(max(self.random.gauss(0, 0.02), -0.06), 0.06)
        long = 0.33 if self.random.random() < 1 / 48 else 0.0
        self.unit_s = self.usual_s * (1 + self.uneven * (jitter + long))


class Block(nn.Module):
    def __init__(self, width: int, pace: Pace) -> None:
        super().__init__()
        self.up, self.down, self.work = nn.Linear(width, 4 * width), nn.Linear(4 * width, width), Work(pace)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.work(x))))


class Model(nn.Module):
    """A stage of one, too."""

    def __init__(self, a: argparse.Namespace, layers: range, pace: Pace, *, first: bool, last: bool) -> None:
        super().__init__()
        self.first = nn.Linear(a.width, a.width) if first else None
        self.layers = nn.ModuleDict({str(i): Block(a.width, pace) for i in layers})
        self.last = nn.Linear(a.width, CLASSES) if last else None

    def forward(self, x: Tensor) -> Tensor:
        if self.first is not None:
            x = self.first(x).relu()
        for block in self.layers.values():
            x = block(x)
        return x if self.last is None else self.last(x)


class Batches(torch.utils.data.Dataset):
    def __init__(self, a: argparse.Namespace, injector: Injector, seed: int) -> None:
        self.a, self.injector = a, injector
        self.generator = torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        return 1 << 30

    def __getitem__(self, _index: int) -> tuple[Tensor, Tensor]:
        time.sleep(0.001 + self.injector.loading())
        x = torch.randn(self.a.batch, self.a.width, generator=self.generator)
        return x, x.argmax(1) % CLASSES


def build(a: argparse.Namespace, injector: Injector):
    """(module, run(x, y) -> loss or None, group of `norm`, data seed)."""
    rank, world = dist.get_rank(), dist.get_world_size()
    second = dist.new_group(list(range(world)))
    if a.layout.startswith("pp"):
        return build_pipeline(a, injector, second)
    pace = Pace(a, rank, a.layers, injector)
    model: nn.Module = Model(a, range(a.layers), pace, first=True, last=True)
    data = rank
    if a.layout == "ddp":
        model = DistributedDataParallel(model)
    elif a.layout == "fsdp":
        from torch.distributed.device_mesh import init_device_mesh

        shard(model, init_device_mesh("cpu", (world,), mesh_dim_names=("dp",)))
    else:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

        mesh = init_device_mesh("cpu", (world // 2, 2), mesh_dim_names=("dp", "tp"))
        for block in model.layers.values():
            parallelize_module(block, mesh["tp"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
        shard(model, mesh["dp"])
        data, second = mesh["dp"].get_local_rank(), mesh["tp"].get_group()

    def run(x: Tensor, y: Tensor) -> Tensor:
        total = torch.zeros(())
        for i in range(a.accumulate):
            pace.draw()
            last = i == a.accumulate - 1
            with contextlib.nullcontext() if last or a.layout != "ddp" else model.no_sync():
                loss = F.cross_entropy(model(x), y) / a.accumulate
                if injector.mine and injector.active("nan"):
                    loss = loss * float("nan")
                loss.backward()
            total += loss.detach()
        return total

    def evaluate(x: Tensor) -> None:
        pace.draw()
        with torch.no_grad():
            model(x)

    return model, run, evaluate, second, data


def shard(model: Model, mesh) -> None:
    from torch.distributed.fsdp import fully_shard

    for block in model.layers.values():
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def build_pipeline(a: argparse.Namespace, injector: Injector, second):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.pipelining import PipelineStage, Schedule1F1B

    rank, world = dist.get_rank(), dist.get_world_size()
    stages = world if a.layout == "pp" else 2
    mesh = init_device_mesh("cpu", (stages, world // stages), mesh_dim_names=("pp", "dp"))
    index = mesh["pp"].get_local_rank()
    layers = max(1, a.layers // stages)
    pace = Pace(a, rank, layers, injector)
    model = Model(a, range(index * layers, (index + 1) * layers), pace, first=index == 0, last=index == stages - 1)
    if world > stages:
        shard(model, mesh["dp"])
    stage = PipelineStage(model, index, stages, torch.device("cpu"), group=mesh["pp"].get_group())

    def loss_of(out: Tensor, y: Tensor) -> Tensor:
        loss = F.cross_entropy(out, y)
        return loss * float("nan") if injector.mine and injector.active("nan") else loss

    schedule = Schedule1F1B(stage, n_microbatches=a.micro, loss_fn=loss_of)

    def run(x: Tensor, y: Tensor) -> Tensor | None:
        pace.draw()
        if index == 0:
            schedule.step(x)
            return None
        if index < stages - 1:
            schedule.step()
            return None
        losses: list[Tensor] = []
        schedule.step(target=y, losses=losses)
        return torch.stack(losses).mean().detach()

    def evaluate(_x: Tensor) -> None:
        pace.draw()
        time.sleep(pace.unit_s * layers)

    return model, run, evaluate, second, mesh["dp"].get_local_rank()


# --- the loop ---------------------------------------------------------------------------------------------------------------


class SlowFile:
    """A file on a disk that takes its time."""

    def __init__(self, path: Path, stall_s: float) -> None:
        self.file, self.stall_s = path.open("wb"), stall_s

    def write(self, data) -> int:
        time.sleep(self.stall_s)
        self.stall_s = 0.0
        return self.file.write(data)

    def flush(self) -> None:
        self.file.flush()

    def close(self) -> None:
        self.file.close()


def save(model: nn.Module, path: Path, stall_s: float) -> None:
    state = {n: (p.to_local() if hasattr(p, "to_local") else p).detach() for n, p in model.named_parameters()}
    file = SlowFile(path, stall_s)
    torch.save(state, file)
    file.close()


def train(a: argparse.Namespace, rank: int) -> None:
    torch.manual_seed(a.seed)
    injector = Injector(a.fault, rank, a.out)
    model, run, evaluate, second, data_seed = build(a, injector)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    batches = iter(torch.utils.data.DataLoader(Batches(a, injector, a.seed + data_seed), batch_size=None))
    session = None
    if a.session or a.report_loss:
        import ckptd
    if a.session:
        session = ckptd.attach(model=model, optimizer=optimizer)
    with (a.out / f"rank{rank}.jsonl").open("a", buffering=1) as log:
        took_s = None
        for step in range(1, a.steps + 1):
            began_s, cpu_s = time.perf_counter(), time.process_time()
            injector.next_step(step, took_s)
            x, y = next(batches)
            loss = run(x, y)
            if a.clip or a.layout == "ddp":
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            if a.report_loss and loss is not None:
                ckptd.report_loss(loss)
            optimizer.step()
            optimizer.zero_grad()
            injector.between()
            told = torch.tensor([0.0 if loss is None else loss.item(), 1.0])
            injector.norm_and_metrics(lambda: dist.all_reduce(torch.ones(1), group=second), lambda told=told: dist.all_reduce(told), None)
            if session is not None:
                session.step(step)
            if step % a.eval_every == 0:
                model.eval()
                for _ in range(3):
                    evaluate(x)
                model.train()
                dist.all_reduce(torch.ones(3))
            if step % a.save_every == 0:
                slow = injector.active("save") if injector.mine else None
                if rank == 0 or slow:
                    save(model, a.out / f"saved{rank}.pt", slow.ms / 1e3 if slow else a.save_ms / 1e3)
            if rank == 0 and step % a.log_every == 0:
                print(f"step {step}: loss {told[0].item():.4f}", flush=True)
                time.sleep(0.004)
            took_s = time.perf_counter() - began_s
            line = {"step": step, "t": round(time.time(), 4), "s": round(took_s, 4), "cpu": round(time.process_time() - cpu_s, 4), "loss": None if loss is None else round(loss.item(), 4)}
            log.write(json.dumps(line) + "\n")
    injector.quiet()
    if session is not None:
        session.close()


def parse(words: list[str] | None = None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--layout", choices=("ddp", "fsdp", "tp_fsdp", "pp", "pp_dp"), default="ddp")
    p.add_argument("--steps", type=int, default=200)
    p.add_argument("--step-ms", type=float, default=80.0, help="what forward and backward of one step pass, without communication")
    p.add_argument("--spin", type=float, default=0.0, help="the part of it that is spent computing on the processor")
    p.add_argument("--uneven", type=float, default=1.0, help="how uneven batches are; 0: all equal")
    p.add_argument("--width", type=int, default=64)
    p.add_argument("--layers", type=int, help="default: 2; of a pipeline 4")
    p.add_argument("--batch", type=int, default=8)
    p.add_argument("--micro", type=int, default=4, help="micro-batches of a pipeline's step")
    p.add_argument("--accumulate", type=int, default=1)
    p.add_argument("--eval-every", type=int, default=25)
    p.add_argument("--save-every", type=int, default=30)
    p.add_argument("--save-ms", type=float, default=40.0)
    p.add_argument("--log-every", type=int, default=10)
    p.add_argument("--seed", type=int, default=7)
    p.add_argument("--clip", action="store_true")
    p.add_argument("--report-loss", action="store_true")
    p.add_argument("--session", action="store_true", help="attach a ckptd session")
    p.add_argument("--out", type=Path, help="needed, but for --serve")
    p.add_argument("--fault", action="append", default=[], type=Fault.parse, metavar="KIND:rank=R,step=S,...")
    p.add_argument("--serve", type=Path, metavar="DIR")
    a = p.parse_args(words)
    a.layers = a.layers or (4 if a.layout.startswith("pp") else 2)
    if a.out is None and a.serve is None:
        p.error("--out is missing")
    return a


def job(a: argparse.Namespace, store: dist.Store | None = None) -> None:
    """One training run; `store`: of its process group, where there have been others before."""
    a.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    if store is None:
        dist.init_process_group("gloo")
    else:
        dist.init_process_group("gloo", store=store, rank=int(os.environ["RANK"]), world_size=int(os.environ["WORLD_SIZE"]))
    rank = dist.get_rank()
    with (a.out / "pids.jsonl").open("a") as file:
        file.write(json.dumps({"rank": rank, "pid": os.getpid()}) + "\n")
    train(a, rank)
    dist.barrier()
    dist.destroy_process_group()


def serve(directory: Path) -> None:
    """Jobs as they come. This process itself makes no group and no thread: only what it forks does."""
    import torch._dynamo  # what jobs would import, each rank for itself
    import torch.distributed.fsdp
    import torch.distributed.pipelining
    import torch.distributed.tensor.parallel  # noqa: F401

    rank, number = int(os.environ["RANK"]), 0
    (directory / f"ready{rank}").touch()
    while True:
        path = directory / f"job{number}.json"
        while not path.exists():
            time.sleep(0.02)
        told = json.loads(path.read_text())
        if told["args"] is None:
            return
        pid = os.fork()
        if pid == 0:
            os._exit(_child(told, number))
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        (directory / f"job{number}.rank{rank}").write_text(str(status))
        number += 1


def _child(told: dict, number: int) -> int:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: no orphans
    os.environ.update(told["env"])
    code = 1
    try:
        store, _, _ = next(dist.rendezvous("env://"))
        job(parse(told["args"]), dist.PrefixStore(f"job{number}", store))
        code = 0
    except BaseException as e:  # noqa: BLE001  it is the end of this process
        sys.last_type, sys.last_value, sys.last_traceback = sys.exc_info()  # as an interpreter leaves that nobody caught it
        print(f"rank {os.environ['RANK']}, job {number}: {type(e).__name__}: {e}", file=sys.stderr, flush=True)
    sys.stdout.flush()
    atexit._run_exitfuncs()  # noqa: SLF001  as an interpreter does; os._exit does not
    return code


def main() -> None:
    a = parse()
    if a.serve:
        serve(a.serve)
    else:
        job(a)


if __name__ == "__main__":
    main()
