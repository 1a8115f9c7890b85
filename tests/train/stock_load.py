"""Run by test_stock.py under torchrun: stock PyTorch loads a step that ckptd persisted. ckptd is never imported here."""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint import HuggingFaceStorageReader
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor


def main() -> None:
    images, out = sys.argv[1:3]
    dist.init_process_group("gloo")
    torch.manual_seed(99)
    model = nn.Sequential(nn.Embedding(50, 8), nn.Linear(8, 7), nn.LayerNorm(7), nn.Linear(7, 3))
    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model_state, optim_state = get_state_dict(model, optimizer)
    state = {"model": model_state, "optim": {"state": optim_state["state"]}}
    dcp.load(state, storage_reader=HuggingFaceStorageReader(images))
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict={**optim_state, "state": state["optim"]["state"]})
    torchs_own = {"ckptd", "ckptd.errors", "ckptd.plugin", "ckptd.autoload"}  # what torch loads by itself, where ckptd is installed: entry points for its elastic's rendezvous and for backends
    assert not [m for m in sys.modules if (m == "ckptd" or m.startswith("ckptd.")) and m not in torchs_own]
    found = {}

    def note(name, t):
        t = t.full_tensor() if isinstance(t, DTensor) else t
        found[name] = [str(t.dtype), t.detach().float().reshape(-1).tolist()]

    names = {id(p): n for n, p in model.named_parameters()}
    for n, p in model.named_parameters():
        note(f"model.{n}", p)
    for p, slots in optimizer.state.items():
        for k, v in slots.items():
            note(f"optim.state.{names[id(p)]}.{k}", v)
    if dist.get_rank() == 0:
        Path(out).write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
