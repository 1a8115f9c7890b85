"""Four ranks that call collectives in every way there is, seen by each layer of the tap in turn. Run by test_tap.py; writes what the ring held to argv[1]<rank>.json."""

from __future__ import annotations

import datetime as dt
import json
import os
import sys
import time
import warnings

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage, Schedule1F1B
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from ckptd.monitor import record, tap

warnings.simplefilter("ignore")
if os.environ.get("TAP_DEBUG"):
    import logging

    logging.basicConfig(level=logging.INFO)
    logging.getLogger("ckptd.tap").setLevel(logging.DEBUG)
LIGHT = "light"
"""The layer "python" without kernels of operators, but where the reducer calls them; with them, as they come with a reducer, is "python" here."""
KB = torch.ones(256)


def plain(w):
    """dist.*, each once."""
    me, n = dist.get_rank(), dist.get_world_size()
    dist.all_reduce(KB.clone())
    dist.broadcast(KB.clone(), 0)
    dist.reduce(KB.clone(), 1)
    dist.all_gather([torch.empty(256) for _ in range(n)], KB)
    dist.all_gather_into_tensor(torch.empty(256 * n), KB)
    dist.reduce_scatter(torch.empty(256), [KB.clone() for _ in range(n)])
    dist.reduce_scatter_tensor(torch.empty(64), KB)
    dist.all_to_all_single(torch.empty(256), KB)
    dist.gather(KB, [torch.empty(256) for _ in range(n)] if me == 2 else None, dst=2)
    dist.scatter(torch.empty(256), [KB.clone() for _ in range(n)] if me == 0 else None, src=0)
    dist.barrier()
    dist.all_reduce(torch.ones(7, dtype=torch.bfloat16))
    dist.all_reduce(torch.ones(3, dtype=torch.int64), op=dist.ReduceOp.MAX)


def asynchronous(w):
    work = [dist.all_reduce(KB.clone(), async_op=True) for _ in range(3)]
    for x in work:
        x.wait()
    x = dist.reduce_scatter_tensor(torch.empty(64), KB, async_op=True)
    x.wait()


def objects(w):
    dist.broadcast_object_list([{"a": 1}] if dist.get_rank() == 0 else [None], 0)
    dist.all_gather_object([None] * dist.get_world_size(), dist.get_rank())


def sends(w):
    me, n = dist.get_rank(), dist.get_world_size()
    if me == 0:
        dist.send(KB, 3)
        dist.isend(KB, 2).wait()
    if me == 3:
        dist.recv(torch.empty(256), 0)
    if me == 2:
        dist.irecv(torch.empty(256), 0).wait()
    if me == 1:
        dist.recv(torch.empty(256), tag=5)  # from whoever
    if me == 2:
        dist.send(KB, 1, tag=5)
    ops = [dist.P2POp(dist.isend, KB.clone(), (me + 1) % n), dist.P2POp(dist.irecv, torch.empty(256), (me - 1) % n)]
    for r in dist.batch_isend_irecv(ops):
        r.wait()


def subgroup(w):
    """Members by their global ranks, peers too."""
    me = dist.get_rank()
    if me in (1, 3):
        dist.all_reduce(KB.clone(), group=w["odd"])
        if me == 1:
            dist.send(KB, 3, group=w["odd"])
        else:
            dist.recv(torch.empty(256), 1, group=w["odd"])


def functional(w):
    x = funcol.all_reduce(KB, "sum", dist.group.WORLD)
    float(x.sum())
    y = funcol.all_gather_tensor(KB, 0, dist.group.WORLD)
    float(y.sum())
    z = funcol.reduce_scatter_tensor(KB, "sum", 0, dist.group.WORLD)
    float(z.sum())


def functional_sends(w):
    """Those that torch has besides collectives (2.13)."""
    if not hasattr(torch.ops._c10d_functional, "batch_p2p_ops"):
        return
    me, n, name = dist.get_rank(), dist.get_world_size(), dist.group.WORLD.group_name
    got = torch.ops._c10d_functional.batch_p2p_ops(["isend", "irecv"], [(me + 1) % n, (me - 1) % n], [0, 0], [KB.clone(), torch.empty(256)], name)
    for x in got:
        torch.ops._c10d_functional.wait_tensor(x)


def groups_own_methods(w):
    """Methods of a process group, called in every form that they have."""
    pg = dist.group.WORLD
    pg.allreduce(KB.clone()).wait()
    pg.allreduce([KB.clone()], dist.ReduceOp.MAX).wait()
    pg.allreduce(tensors=[KB.clone()], opts=dist.AllreduceOptions()).wait()
    pg.broadcast(KB.clone(), 1).wait()
    pg.allgather([torch.empty(256) for _ in range(dist.get_world_size())], KB).wait()
    pg.barrier().wait()


def ddp(w):
    w["ddp_optimizer"].zero_grad()
    w["ddp"](torch.ones(2, 64)).sum().backward()
    w["ddp_optimizer"].step()


def fsdp(w):
    w["fsdp_optimizer"].zero_grad()
    w["fsdp"](torch.ones(2, 64)).sum().backward()
    w["fsdp_optimizer"].step()


def tensor_parallel(w):
    w["tp"](torch.ones(2, 64)).sum().backward()


def pipeline(w):
    if w["pp_index"] == 0:
        w["pp"].step(torch.ones(4, 64))
    else:
        w["pp"].step(target=torch.ones(4, 64), losses=[])


def compiled(w):
    w["compiled"](KB)


def raised(group) -> list:
    """What a wait that runs out of time raises, and a call that is wrong."""
    if dist.get_rank() > 0:
        return []
    found = []
    for wrong in (lambda: dist.broadcast(KB, 3, group=group), lambda: dist.irecv(torch.empty(4), 1, group=group).wait(dt.timedelta(milliseconds=300))):
        try:
            wrong()
        except Exception as e:
            found.append([type(e).__module__, type(e).__name__, str(e).split("\n")[0].split("object at")[0][-60:]])
    return found


CASES = [plain, asynchronous, objects, sends, subgroup, functional, functional_sends, groups_own_methods, ddp, fsdp, tensor_parallel, pipeline, compiled]


def world() -> dict:
    mlp = lambda: nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64))  # noqa: E731
    torch.manual_seed(0)
    w = {"odd": dist.new_group([1, 3]), "pairs": [dist.new_group([0, 1]) for _ in range(8)]}
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    w["ddp"] = DistributedDataParallel(mlp(), bucket_cap_mb=0.02)
    w["ddp_optimizer"] = torch.optim.SGD(w["ddp"].parameters(), lr=0.1)
    model = mlp()
    for layer in model:
        if isinstance(layer, nn.Linear):
            fully_shard(layer, mesh=mesh["dp"])
    w["fsdp"] = fully_shard(model, mesh=mesh["dp"])
    w["fsdp_optimizer"] = torch.optim.SGD(w["fsdp"].parameters(), lr=0.1)
    w["tp"] = parallelize_module(mlp(), mesh["tp"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
    group = mesh["tp"].get_group()
    w["pp_index"] = dist.get_group_rank(group, dist.get_rank())
    stage = PipelineStage(mlp(), w["pp_index"], 2, torch.device("cpu"), group=group)
    w["pp"] = Schedule1F1B(stage, n_microbatches=2, loss_fn=nn.functional.mse_loss)
    name = dist.group.WORLD.group_name
    w["compiled"] = torch.compile(lambda x: funcol.all_reduce(x, "sum", name) + 1, backend="aot_eager")
    for warm in (ddp, ddp, fsdp, fsdp, tensor_parallel, pipeline, compiled):  # what happens only once is over
        warm(w)
    return w


def told(r) -> dict:
    kind = record.MARKS if int(r["flags"]) & record.MARK else record.OPS
    out = {n: int(r[n]) for n in ("bytes", "seq", "group", "flags", "peer", "step", "waited_us")}
    return out | {
        "op": kind[r["op"]], "dtype": record.DTYPES[r["dtype"]], "mark": bool(int(r["flags"]) & record.MARK),
        "returned": int(r["returned_ns"]) >= int(r["entered_ns"]), "ended": int(r["ended_ns"]) >= int(r["entered_ns"]) > 0,
    }  # fmt: skip


def run(layer: str, w: dict) -> dict:
    kind = os.environ["CKPTD_TAP"] = "python" if layer == LIGHT else layer
    its = tap.attach()
    assert its is not None and its.layer == kind, (kind, its and its.layer)
    said: dict = {"cases": {}, "whole": []}
    try:
        for case in CASES:
            if layer == LIGHT:  # as if the reducer came and went
                its._layer.whole() if case is ddp else its._layer.light()
            dist.barrier()
            begin = its.writer.records
            case(w)
            time.sleep(0.05)  # futures of works that nobody waits for
            if layer == LIGHT and its._layer._operators is not None:
                said["whole"].append(case.__name__)
            said["cases"][case.__name__] = [told(r) for r in its.ring.read(begin).records]
        said["raised"] = raised(w["pairs"].pop())
        said["groups"] = [{"key": g.key, "members": g.members, "mine": g.mine, "entered": g.entered, "done": g.done, "history": g.history} for g in its.ring.groups()]
        said["errors"] = int(its.ring.header["errors"][0])
        return said
    finally:
        its.close()


def main() -> None:
    dist.init_process_group("gloo", timeout=dt.timedelta(seconds=120))
    if (at := tap.current()) is not None:
        at.close()
    torch.set_num_threads(1)
    w = world()
    out = {"plain": {"raised": raised(w["pairs"].pop())}} | {layer: run(layer, w) for layer in sys.argv[2].split(",")}
    with open(f"{sys.argv[1]}{dist.get_rank()}.json", "w") as f:
        json.dump(out, f)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
