"""One model, trained by two frameworks in turn: by DeepSpeed (`deepspeed_job`, which asks `make` for the model), and here by FSDP2 x TP.

    torchrun --nproc-per-node 4 across_job.py LOAD FIRST STEPS SAVE OUT

loads a DCP checkpoint (`dcp.load`, torch's own), trains STEPS steps from step FIRST on a 2 x 2 mesh, saves with `dcp.save`, and writes the losses.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

VOCAB, WIDTH, INNER = 16, 8, 12


class Block(nn.Module):
    """Even sizes: torch 2.13's own offsets of uneven FSDP2 x TP are wrong (pytorch#161368), and this is about conversion."""

    def __init__(self) -> None:
        super().__init__()
        self.wte = nn.Embedding(VOCAB, WIDTH)
        self.up = nn.Linear(WIDTH, INNER)
        self.down = nn.Linear(INNER, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCAB, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        h = self.wte(tokens)
        h = self.norm(h + self.down(torch.tanh(self.up(h))))
        return F.cross_entropy(self.head(h[:, :-1]).float().reshape(-1, VOCAB), tokens[:, 1:].reshape(-1))


def make(seed: int = 7) -> nn.Module:
    torch.manual_seed(seed)
    return Block()


def batch(step: int) -> torch.Tensor:
    return torch.randint(0, VOCAB, (4, 6), generator=torch.Generator().manual_seed(1000 + step))


def groups(model: nn.Module) -> list[dict]:
    return [
        {"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]


def main() -> None:
    import torch.distributed as dist
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    load, first, steps, save, out = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4], sys.argv[5]
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    model = make(seed=99)  # another start: what is not loaded shows
    parallelize_module(model, mesh["tp"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
    fully_shard(model, mesh=mesh["dp"])
    optimizer = torch.optim.AdamW(groups(model), lr=1e-2)
    model_state, optim_state = get_state_dict(model, optimizer)
    state = {"model": model_state, "optim": optim_state}
    dcp.load(state, checkpoint_id=load)
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optim"])
    losses = []
    for step in range(first, first + steps):
        optimizer.zero_grad()
        loss = model(batch(step))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    model_state, optim_state = get_state_dict(model, optimizer)
    dcp.save({"model": model_state, "optim": optim_state}, checkpoint_id=save)
    if dist.get_rank() == 0:
        Path(out).write_text(json.dumps(losses))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
