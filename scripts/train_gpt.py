"""A small GPT that learns the licence's text, in any parallelism: what the demo, the tests and the benchmarks train.

    ckptd run --nproc-per-node 4 scripts/train_gpt.py --parallel fsdp --steps 20 --out DIR

--parallel  ddp | fsdp | hsdp | tp_fsdp | pp_fsdp     (hsdp: 2 x 2 ...; tp_fsdp: tp 2; pp_fsdp: pp 2; plain with one rank)
Every rank writes DIR/rank<R>.jsonl (one line per step: loss, data positions, a draw from the RNG) and at the end DIR/final<R>.json:
hashes of what it holds. `--restore-only` restores, writes the hashes of the whole state, gathered, and leaves.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import xxhash
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import ckptd
from ckptd.trace import mark

TEXT = (Path(__file__).resolve().parent.parent / "LICENSE").read_bytes()


class Block(nn.Module):
    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.ln1, self.ln2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.o = nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        y = self.ln1(x)
        q, k, v = (f(y).view(b, t, -1, x.shape[-1] // self.heads).transpose(1, 2) for f in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(b, t, -1)
        x = x + F.dropout(self.o(y), self.dropout, self.training)
        return x + F.dropout(self.down(F.gelu(self.up(self.ln2(x)))), self.dropout, self.training)


class GPT(nn.Module):
    """A stage of one, too: parts that a pipeline stage does not have are None, and FQNs stay those of the whole model."""

    def __init__(self, a: argparse.Namespace, layers: range, *, first: bool, last: bool) -> None:
        super().__init__()
        self.wte = nn.Embedding(256, a.width) if first else None
        self.wpe = nn.Embedding(a.context, a.width) if first else None
        self.layers = nn.ModuleDict({str(i): Block(a.width, a.heads, a.dropout) for i in layers})
        self.norm = nn.LayerNorm(a.width) if last else None
        self.head = nn.Linear(a.width, 256, bias=False) if last else None
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.inferring = not (first and last)  # a pipeline stage's first forward in a process is torch's, which infers shapes with it
        if a.tie and first and last:
            self.head.weight = self.wte.weight
        if a.freeze and first:
            self.wpe.weight.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        if self.inferring:
            self.inferring = False
        else:
            self.calls += 1
        if self.wte is not None:
            x = self.wte(x) + self.wpe(torch.arange(x.shape[1], device=x.device))
        for block in self.layers.values():
            x = block(x)
        return x if self.norm is None else self.head(self.norm(x))


class Loader:
    """Random windows of the text, the same global order on every mesh; its state is a position and a generator."""

    def __init__(self, a: argparse.Namespace, dp_rank: int, dp_size: int) -> None:
        self.context, self.batch, self.dp_rank, self.dp_size = a.context, a.batch, dp_rank, dp_size
        self.generator = torch.Generator().manual_seed(a.seed)
        self.position = 0
        self.text = torch.frombuffer(bytearray(TEXT), dtype=torch.uint8)

    def __iter__(self):
        return self

    def __next__(self) -> tuple[Tensor, Tensor, list[int]]:
        at = torch.randint(len(self.text) - self.context - 1, (self.batch,), generator=self.generator)
        self.position += 1
        mine = at.chunk(self.dp_size)[self.dp_rank]
        windows = torch.stack([self.text[i : i + self.context + 1] for i in mine]).long()
        return windows[:, :-1], windows[:, 1:], mine.tolist()

    def state_dict(self):
        return {"position": self.position, "generator": self.generator.get_state()}

    def load_state_dict(self, state) -> None:
        self.position = state["position"]
        self.generator.set_state(state["generator"])


def loss_of(logits: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(logits.float().reshape(-1, 256), target.reshape(-1))


def build(a: argparse.Namespace):
    """(module, function that runs forward and backward and returns the loss or None, dp rank, dp size)."""
    world = dist.get_world_size() if dist.is_initialized() else 1
    kind = a.parallel if world > 1 else "plain"
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32) if a.dtype == "bf16" else MixedPrecisionPolicy()
    everything = range(a.layers)
    if kind == "pp_fsdp":
        return build_pipeline(a, world, policy)
    model = GPT(a, everything, first=True, last=True)
    dp_rank, dp_size = (dist.get_rank() if world > 1 else 0), world
    if kind == "ddp":
        # DDP orders its buckets anew after the first backward of a process, and a ring's sums depend on where in a bucket a gradient lies:
        # with three ranks or more, a restarted run rounds differently, ckptd or not. This option keeps the order.
        model = DistributedDataParallel(model, find_unused_parameters=True)
    elif kind == "fsdp":
        shard(model, init_device_mesh(a.device, (world,), mesh_dim_names=("dp",)), policy)
    elif kind == "hsdp":
        mesh = init_device_mesh(a.device, (2, world // 2), mesh_dim_names=("replica", "dp"))
        shard(model, mesh, policy)
    elif kind == "tp_fsdp":
        mesh = init_device_mesh(a.device, (world // 2, 2), mesh_dim_names=("dp", "tp"))
        for block in model.layers.values():
            plan = {"q": ColwiseParallel(), "k": ColwiseParallel(), "v": ColwiseParallel(), "o": RowwiseParallel()}
            parallelize_module(block, mesh["tp"], {**plan, "up": ColwiseParallel(), "down": RowwiseParallel()})
        if mesh["dp"].size() > 1:
            shard(model, mesh["dp"], policy)
        dp_rank, dp_size = mesh["dp"].get_local_rank(), mesh["dp"].size()
    rows = a.batch // dp_size

    def run(x: Tensor, y: Tensor) -> Tensor:
        loss = loss_of(model(x[:rows]), y[:rows])
        loss.backward()
        return loss.detach()

    return model, run, dp_rank, dp_size


def shard(model: GPT, mesh, policy: MixedPrecisionPolicy) -> None:
    for block in model.layers.values():
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)


def build_pipeline(a: argparse.Namespace, world: int, policy: MixedPrecisionPolicy):
    from torch.distributed.pipelining import PipelineStage, Schedule1F1B

    mesh = init_device_mesh(a.device, (2, world // 2), mesh_dim_names=("pp", "dp"))
    stage_index, half = mesh["pp"].get_local_rank(), a.layers // 2
    torch.manual_seed(a.seed)
    whole = GPT(a, range(a.layers), first=True, last=True)  # built whole, so that every layout starts with the same weights
    mine = range(half) if stage_index == 0 else range(half, a.layers)
    model = GPT(a, mine, first=stage_index == 0, last=stage_index == 1)
    model.load_state_dict(whole.state_dict(), strict=False)
    if mesh["dp"].size() > 1:
        shard(model, mesh["dp"], policy)
    stage = PipelineStage(model, stage_index, 2, torch.device(a.device), group=mesh["pp"].get_group())
    schedule = Schedule1F1B(stage, n_microbatches=2, loss_fn=loss_of)

    def run(x: Tensor, y: Tensor) -> Tensor | None:
        if stage_index == 0:
            schedule.step(x)
            return None
        losses: list[Tensor] = []
        schedule.step(target=y, losses=losses)
        return torch.stack(losses).mean().detach()

    return model, run, mesh["dp"].get_local_rank(), mesh["dp"].size()


def hash_of(tensor: Tensor) -> str:
    flat = tensor.detach().contiguous().cpu().reshape(-1)
    return xxhash.xxh3_128_hexdigest(flat.view(torch.uint8).numpy()) if flat.numel() else "empty"


def local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def full(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def state_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Every tensor by ckptd's names."""
    prefix = "module." if isinstance(model, DistributedDataParallel) else ""
    names = {id(p): n.removeprefix(prefix) for n, p in model.named_parameters()}
    found = {f"model.{n.removeprefix(prefix)}": p for n, p in [*model.named_parameters(), *model.named_buffers()]}
    for p, slots in optimizer.state.items():
        found |= {f"optim.state.{names[id(p)]}.{k}": v for k, v in slots.items() if isinstance(v, Tensor)}
    return found


def rng_hash() -> str:
    states = [random.getstate(), np.random.get_state(legacy=False), torch.get_rng_state().tolist()]
    return xxhash.xxh3_128_hexdigest(repr([str(s) for s in states]).encode())


def parse() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--parallel", choices=("ddp", "fsdp", "hsdp", "tp_fsdp", "pp_fsdp"), default="fsdp")
    p.add_argument("--steps", type=int, default=20)
    p.add_argument("--width", type=int, default=64)
    p.add_argument("--layers", type=int, default=4)
    p.add_argument("--heads", type=int, default=4)
    p.add_argument("--context", type=int, default=32)
    p.add_argument("--batch", type=int, default=8)
    p.add_argument("--dropout", type=float, default=0.1)
    p.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    p.add_argument("--device", default="cpu")
    p.add_argument("--seed", type=int, default=7)
    p.add_argument("--tie", action="store_true", help="tie the head to the embedding (not with a pipeline)")
    p.add_argument("--freeze", action="store_true", help="freeze the position embedding")
    p.add_argument("--pause-s", type=float, default=0.0, help="sleep in each step, where a kill can hit")
    p.add_argument("--out", type=Path, required=True)
    p.add_argument("--restore-only", action="store_true")
    p.add_argument("--restore-step", type=int)
    p.add_argument("--without-ckptd", action="store_true", help="the same loop, ckptd not attached: the baseline")
    p.add_argument("--fault", action="append", default=[], help="tests only: KIND:rank=R,step=S[,at=N]; see tests/train/faults.py")
    return p.parse_args()


def main() -> None:
    a = parse()
    mark("script begins")
    a.out.mkdir(parents=True, exist_ok=True)
    if "RANK" in os.environ and int(os.environ["WORLD_SIZE"]) > 1:
        dist.init_process_group("gloo" if a.device == "cpu" else "nccl")
    rank = dist.get_rank() if dist.is_initialized() else 0
    if a.fault:
        import sys

        sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "train"))
        import faults

        for spec in a.fault:
            faults.arm(spec, rank, a.out)
    mark("group ready", rank=rank)
    torch.manual_seed(a.seed)
    model, run, dp_rank, dp_size = build(a)
    params = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": [p for p in params if p.ndim > 1]}, {"params": [p for p in params if p.ndim <= 1], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW([g for g in groups if g["params"]], lr=3e-3, weight_decay=0.1)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 1000)
    loader = Loader(a, dp_rank, dp_size)
    torch.manual_seed(a.seed + 1 + dp_rank)
    random.seed(a.seed + dp_rank)
    np.random.seed(a.seed + dp_rank)
    notes: dict[str, object] = {"seen": 0}
    mark("model built", rank=rank)
    session, start = None, 0
    if not a.without_ckptd:
        session = ckptd.attach(model=model, optimizer=optimizer, extras={"scheduler": scheduler, "loader": loader, "notes": notes})
        mark("attached", rank=rank)
        restored = session.restore(step=a.restore_step)
        start = restored.step
        mark("restored", rank=rank, step=start, source=restored.source, seconds=restored.seconds)
    if a.restore_only:
        hashes = {n: hash_of(full(t)) for n, t in state_of(model, optimizer).items()}
        out = {"step": start, "source": restored.source, "hashes": hashes, "notes": notes, "position": loader.position}
        (a.out / f"restored{rank}.json").write_text(json.dumps(out))
        session.close()
        finish()
        return
    log = (a.out / f"rank{rank}.jsonl").open("a")
    for step in range(start + 1, a.steps + 1):
        began = time.perf_counter()
        x, y, positions = next(loader)
        loss = run(x, y)
        time.sleep(a.pause_s)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        notes["seen"] = step
        draw = torch.rand(()).item()
        if session is not None:
            session.step(step)
        took = time.perf_counter() - began
        line = {"step": step, "loss": None if loss is None else loss.item(), "positions": positions, "draw": draw, "s": took}
        log.write(json.dumps(line) + "\n")
        log.flush()
        mark("step", rank=rank, step=step, s=took)
    state = {n: hash_of(local(t)) for n, t in state_of(model, optimizer).items()}
    final = {"state": state, "rng": rng_hash(), "position": loader.position, "lr": scheduler.get_last_lr(), "notes": notes}
    if session is not None:
        session.close()
        final["status"] = session.status()
    (a.out / f"final{rank}.json").write_text(json.dumps(final))
    finish()


def finish() -> None:
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
