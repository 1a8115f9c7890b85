"""A small job whose checkpoints test_native converts: FSDP2, DDP or one process, with tied weights, a buffer, a frozen layer and a scheduler."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import ckptd


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(37, 12)
        self.norm = nn.LayerNorm(12)
        self.hidden = nn.Linear(12, 12)
        self.frozen = nn.Linear(12, 12).requires_grad_(False)
        self.head = nn.Linear(12, 37, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        self.seen += 1
        return self.head(self.norm(self.frozen(self.hidden(self.embed(ids))).relu()))


class PythonStep(torch.optim.SGD):
    """An optimizer that counts in Python, as many outside torch do."""

    def step(self, closure=None):
        super().step(closure)
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.state[p]["step"] = self.state[p].get("step", 0) + 1


def build(kind: str, optimizer: str = "adamw"):
    torch.manual_seed(3)
    model: nn.Module = Model()
    if kind == "fsdp":
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        fully_shard(model.hidden, mesh=mesh)
        fully_shard(model, mesh=mesh)
    elif kind == "ddp":
        model = nn.parallel.DistributedDataParallel(model)
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    decay = [p for n, p in named if p.ndim > 1]
    rest = [p for n, p in named if p.ndim <= 1]
    groups = [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    made = torch.optim.AdamW(groups, lr=1e-2) if optimizer == "adamw" else PythonStep(groups, lr=1e-2, momentum=0.9)
    return model, made, torch.optim.lr_scheduler.StepLR(made, 2, 0.5)


def train(rank: int, kind: str, *, first: int, last: int, optimizer: str = "adamw", persist: bool = False, strict: bool = True):
    """Restore what is there, train from step `first` to `last`; the losses, and what `restore` said."""
    model, made, scheduler = build(kind, optimizer)
    world = dist.get_world_size() if dist.is_initialized() else 1
    session = ckptd.attach(model=model, optimizer=made, extras={"scheduler": scheduler}, required=True, timeout_s=40)
    restored = session.restore(strict=strict)
    assert restored.step == first - 1, restored
    losses = []
    for step in range(first, last + 1):
        ids = torch.randint(37, (12, 5), generator=torch.Generator().manual_seed(step))[rank::world]
        loss = nn.functional.cross_entropy(model(ids).flatten(0, 1), ids.flatten())
        loss.backward()
        made.step()
        scheduler.step()
        made.zero_grad()
        session.step(step)
        losses.append(loss.item())
    if persist:
        session.persist(last)
        assert session.wait("persisted", last, timeout_s=30)
    session.close()
    return {"losses": losses, "warnings": list(restored.warnings), "missing": list(restored.missing), "lr": made.param_groups[0]["lr"], "state": digest(model, made)}


def digest(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict:
    """name -> values, whole."""
    bare = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
    found = dict(bare.named_parameters())
    names = {id(p): n for n, p in found.items()}
    for p, slots in optimizer.state.items():
        found |= {f"{names[id(p)]}.{k}": v for k, v in slots.items()}
    return {n: (v.full_tensor() if isinstance(v, DTensor) else v).detach().flatten().tolist() if isinstance(v, torch.Tensor) else v for n, v in found.items()}


def train_two(rank: int, *, first: int, last: int, persist: bool = False):
    """One process with two optimizers, each under its name."""
    torch.manual_seed(4)
    model = nn.ModuleDict({"gen": nn.Linear(6, 6), "disc": nn.Linear(6, 1)})
    made = {"g": torch.optim.AdamW(model["gen"].parameters(), lr=1e-2), "d": torch.optim.SGD(model["disc"].parameters(), lr=0.1, momentum=0.9)}
    session = ckptd.attach(model=model, optimizer=made, required=True, timeout_s=40)
    assert session.restore().step == first - 1
    losses = []
    for step in range(first, last + 1):
        x = torch.randn(4, 6, generator=torch.Generator().manual_seed(step))
        loss = model["disc"](model["gen"](x)).square().mean()
        loss.backward()
        for o in made.values():
            o.step()
            o.zero_grad()
        session.step(step)
        losses.append(loss.item())
    if persist:
        session.persist(last)
        assert session.wait("persisted", last, timeout_s=30)
    session.close()
    return losses


def plain_loop(model, made, first: int, last: int, rank: int = 0, world: int = 1, session=None) -> list[float]:
    """The training itself."""
    losses = []
    for step in range(first, last + 1):
        ids = torch.randint(37, (12, 5), generator=torch.Generator().manual_seed(step))[rank::world]
        loss = nn.functional.cross_entropy(model(ids).flatten(0, 1), ids.flatten())
        loss.backward()
        made.step()
        made.zero_grad()
        if session is not None:
            session.step(step)
        losses.append(loss.item())
    return losses


def adamw(model):
    """AdamW whose groups know their parameters' names."""
    bare = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
    named = [(n, p) for n, p in bare.named_parameters() if p.requires_grad]
    groups = [{"params": [e for e in named if e[1].ndim > 1], "weight_decay": 0.1}, {"params": [e for e in named if e[1].ndim <= 1], "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=1e-2)


def train_without_ckptd(path, *, steps: int, more: int) -> list[float]:
    """One process, plain torch: saves after `steps`; the losses of `more` steps after that."""
    model, _, _ = build("plain")
    made = adamw(model)
    plain_loop(model, made, 1, steps)
    torch.save({"model": model.state_dict(), "optimizer": made.state_dict(), "step": steps}, path)
    return plain_loop(model, made, steps + 1, steps + more)


def go_on(rank: int, kind: str, *, first: int, last: int):
    """Restore what was converted, and train on."""
    model, _, _ = build(kind)
    made = adamw(model)
    world = dist.get_world_size() if dist.is_initialized() else 1
    session = ckptd.attach(model=model, optimizer=made, required=True, timeout_s=40)
    restored = session.restore()
    assert restored.step == first - 1, restored
    losses = plain_loop(model, made, first, last, rank, world, session)
    session.close()
    return losses
