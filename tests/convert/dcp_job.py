"""A small model in every parallelism of torch, saved and loaded by torch itself: what test_dcp.py and test_torch_files.py train in forked ranks.

Sizes are odd: 53 tokens, width 6, hidden 7. Two param groups, a tied weight where there is one stage, a buffer. Every rank sees the same batches.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

TOKENS, WIDTH, HIDDEN, BATCH = 53, 6, 7, 12


class Net(nn.Module):
    """A stage of it, too: parts that a stage lacks are None, and FQNs stay those of the whole."""

    def __init__(self, stage: int | None = None, *, tie: bool = True) -> None:
        super().__init__()
        first, last = stage in {None, 0}, stage in {None, 1}
        self.emb = nn.Embedding(TOKENS, WIDTH) if first else None
        self.up = nn.Linear(WIDTH, HIDDEN) if first else None
        self.down = nn.Linear(HIDDEN, WIDTH) if last else None
        self.norm = nn.LayerNorm(WIDTH) if last else None
        self.head = nn.Linear(WIDTH, TOKENS, bias=False) if last else None
        if first:
            self.register_buffer("scale", torch.tensor([1.0, 0.5]))
        if tie and stage is None:
            self.head.weight = self.emb.weight

    def forward(self, x: Tensor) -> Tensor:
        if self.emb is not None:
            x = torch.tanh(self.up(self.emb(x) * self.scale.sum()))
        return x if self.head is None else self.head(self.norm(self.down(x)))


def batch(step: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(1000 + step)
    return torch.randint(TOKENS, (BATCH, 3), generator=g), torch.randint(TOKENS, (BATCH, 3), generator=g)


def loss_of(out: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(out.reshape(-1, TOKENS), y.reshape(-1))


class Run:
    """A model in a layout: "plain", "ddp", "fsdp", "fsdp1", "hsdp", "tp", "tp_fsdp", "pp"."""

    def __init__(self, kind: str, *, tie: bool = True, seed: int = 7) -> None:
        torch.manual_seed(seed)
        world, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
        self.kind, self.dp, self.size, self.schedule = kind, rank, world, None
        whole = Net(tie=tie and kind != "pp")
        if kind == "pp":
            from torch.distributed.pipelining import PipelineStage, ScheduleGPipe

            stage = Net(rank, tie=False)
            stage.load_state_dict({k: v for k, v in whole.state_dict().items() if k in stage.state_dict()})
            x, _ = batch(0)
            hidden = torch.zeros(BATCH // 2, 3, HIDDEN, requires_grad=True)
            args = (x[: BATCH // 2],) if rank == 0 else (hidden,)
            out = hidden if rank == 0 else torch.zeros(BATCH // 2, 3, TOKENS)
            self.schedule = ScheduleGPipe(PipelineStage(stage, rank, 2, torch.device("cpu"), input_args=args, output_args=out), 2, loss_fn=loss_of)
            self.model, self.dp, self.size = stage, 0, 1
        else:
            self.model = whole
        if kind == "ddp":
            self.model = nn.parallel.DistributedDataParallel(whole)
        elif kind == "fsdp":
            fully_shard(whole, mesh=init_device_mesh("cpu", (world,)))
        elif kind == "fsdp1":
            from torch.distributed.fsdp import FullyShardedDataParallel

            self.model = FullyShardedDataParallel(whole, use_orig_params=True, device_id=torch.device("cpu"))
        elif kind == "hsdp":
            fully_shard(whole, mesh=init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("replica", "dp")))
        elif kind in {"tp", "tp_fsdp"}:
            tp = 2
            mesh = init_device_mesh("cpu", (world // tp, tp), mesh_dim_names=("dp", "tp"))
            parallelize_module(whole, mesh["tp"], {"up": ColwiseParallel(output_layouts=Replicate()), "down": RowwiseParallel(input_layouts=Replicate())})
            self.dp, self.size = mesh["dp"].get_local_rank(), world // tp
            if kind == "tp_fsdp":
                fully_shard(whole, mesh=mesh["dp"])
        named = [*self.model.named_parameters()]
        decay = [p for n, p in named if n.endswith("weight") and "norm" not in n]
        flat = [p for n, p in named if not (n.endswith("weight") and "norm" not in n)]
        self.optimizer = torch.optim.AdamW([{"params": decay, "weight_decay": 0.1}, {"params": flat, "weight_decay": 0.0, "lr": 3e-3}], lr=1e-2, foreach=False)

    def train(self, first: int, last: int) -> list[float]:
        """Steps first..last; the mean loss of each."""
        losses = []
        for step in range(first, last + 1):
            x, y = batch(step)
            if self.schedule is not None:
                seen: list[Tensor] = []
                if dist.get_rank() == 0:
                    self.schedule.step(x)
                else:
                    self.schedule.step(target=y, losses=seen)
                loss = torch.stack(seen).mean().detach() if seen else torch.zeros(())
                dist.broadcast(loss, 1)
            else:
                rows = slice(self.dp * BATCH // self.size, (self.dp + 1) * BATCH // self.size)
                mine = loss_of(self.model(x[rows]), y[rows])
                mine.backward()
                loss = mine.detach().clone()
                if self.size > 1:
                    dist.all_reduce(loss)
                    loss /= dist.get_world_size()
            self.optimizer.step()
            self.optimizer.zero_grad()
            losses.append(float(loss))
        return losses

    def state(self, *, flat: bool | None = None) -> dict:
        flat = self.kind == "pp" if flat is None else flat
        options = StateDictOptions(flatten_optimizer_state_dict=flat)
        return {"model": get_model_state_dict(self.model), "optim": get_optimizer_state_dict(self.model, self.optimizer, options=options)}

    def load(self, path: str, *, reader=None, flat: bool | None = None) -> int:
        """dcp.load as a user writes it. Returns the step."""
        flat = self.kind == "pp" if flat is None else flat
        state = {**self.state(flat=flat), "step": 0}
        dcp.load(state, **({"storage_reader": reader} if reader else {"checkpoint_id": path}))
        self.set(state, StateDictOptions(flatten_optimizer_state_dict=flat))
        return state["step"]

    def load_file(self, path: str) -> int:
        """A full state dict in one file."""
        state = torch.load(path, weights_only=True)
        self.set(state, StateDictOptions(full_state_dict=True))
        return state["step"]

    def set(self, state: dict, options: StateDictOptions | None) -> None:
        set_model_state_dict(self.model, state["model"], options=options)
        set_optimizer_state_dict(self.model, self.optimizer, state["optim"], options=options)

    def truth(self) -> dict[str, list]:
        """canonical name -> [dtype, shape, sha256], of all that this rank knows whole."""
        state = self.state(flat=False)
        found = {f"model.{n}": t for n, t in state["model"].items()}
        found |= {f"optim.state.{f}.{s}": t for f, slots in state["optim"]["state"].items() for s, t in slots.items()}
        return {n: described(whole_of(t)) for n, t in found.items()}


def whole_of(t) -> Tensor:
    """All of a DTensor by where its parts physically lie (DTensor's own arithmetic is what is under test)."""
    if not isinstance(t, DTensor):
        return t.detach() if isinstance(t, Tensor) else torch.tensor(float(t))
    from ckptd.state import box_of

    box = box_of("t", t)
    parts = [None] * dist.get_world_size(t.device_mesh.get_group(0)) if t.device_mesh.ndim == 1 else [None] * dist.get_world_size()
    group = t.device_mesh.get_group(0) if t.device_mesh.ndim == 1 else None
    dist.all_gather_object(parts, (box.start, box.extent, t.to_local().detach()), group=group)
    out = torch.empty(t.shape, dtype=t.dtype)
    for start, extent, local in parts:
        out[tuple(slice(a, a + e) for a, e in zip(start, extent, strict=True))] = local
    return out


def described(t: Tensor) -> list:
    raw = t.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if t.numel() else b""
    return [str(t.dtype).removeprefix("torch."), list(t.shape), hashlib.sha256(raw).hexdigest()]


def trained_and_saved(kind: str, path: str, *, writer=None, flat: bool | None = None, tie: bool = True, extra: dict | None = None, **kwargs):
    """Work for `forks.ranks`: two steps, a save by torch, two more steps. Returns losses of these, and what was saved."""

    def work(rank: int):
        run = Run(kind, tie=tie)
        run.train(1, 2)
        more = {"storage_writer": writer(path)} if writer else {"checkpoint_id": path}
        dcp.save({**run.state(flat=flat), "step": 2, **(extra or {})}, **more, **kwargs)
        truth = run.truth()
        return {"truth": truth, "losses": run.train(3, 4)}

    return work


def goes_on(kind: str, path: str, *, reader=None, flat: bool | None = None, tie: bool = True):
    """Work for `forks.ranks`: a fresh model loads a folder or a file, and trains steps 3 and 4."""

    def work(rank: int):
        run = Run(kind, tie=tie, seed=99)
        step = run.load_file(path) if Path(path).is_file() else run.load(path, reader=reader(path) if reader else None, flat=flat)
        return {"step": step, "truth": run.truth(), "losses": run.train(3, 4)}

    return work


def union(results: list[dict]) -> dict[str, list]:
    return {n: d for r in results for n, d in r["truth"].items()}
