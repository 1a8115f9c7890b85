"""Real DeepSpeed in forked ranks over gloo: a server that imports it once and runs worlds one after the other.

    one line in:  {"world": 3, "tasks": [{...}, ...]}        one line out: {"results": [...], "seconds": ...} or {"error": traceback}

A world is forked, does its tasks (each: an engine of its own; load; train; save; say what it holds; train on) and ends. What it says it holds is gathered by
DeepSpeed's own functions (`safe_get_full_fp32_param`, `safe_get_full_optimizer_state`) and written as a dict by `torch.save`.

Every rank computes on the same batch, so that losses do not depend on the number of ranks but in the last bit.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import time
import traceback
import warnings
from contextlib import redirect_stdout
from pathlib import Path

os.environ |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR", "DEEPSPEED_LOG_LEVEL": "error"}
warnings.simplefilter("ignore")

import torch  # noqa: E402  after the environment
import torch.nn.functional as F  # noqa: E402
from torch import nn  # noqa: E402

VOCAB, WIDTH, INNER, LENGTH = 13, 7, 5, 6


class Tiny(nn.Module):
    """Odd sizes, tied weights, a frozen layer, a buffer that changes, a parameter of one element, one without dimensions never used by the loss alone."""

    def __init__(self) -> None:
        super().__init__()
        self.wte = nn.Embedding(VOCAB, WIDTH)
        self.frozen = nn.Linear(WIDTH, WIDTH)
        self.up = nn.Linear(WIDTH, INNER)
        self.down = nn.Linear(INNER, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.gain = nn.Parameter(torch.ones(1))
        self.head = nn.Linear(WIDTH, VOCAB, bias=False)
        self.head.weight = self.wte.weight
        self.register_buffer("seen", torch.zeros(3))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        for p in self.frozen.parameters():
            p.requires_grad_(False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        h = self.wte(tokens)
        h = h + self.down(torch.tanh(self.up(self.frozen(h))))
        h = self.norm(h) * self.gain
        self.seen += h.detach().float().mean().to(self.seen.dtype)
        self.count += 1
        logits = self.head(h[:, :-1]).float()
        return F.cross_entropy(logits.reshape(-1, VOCAB), tokens[:, 1:].reshape(-1))


class Experts(nn.Module):
    """Two layers of four experts each, with a buffer, with and without biases, between dense layers of odd sizes."""

    def __init__(self, ep_size: int, *, data_first: bool) -> None:
        from deepspeed.moe.layer import MoE

        super().__init__()
        rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
        self.ep_size, self.share = ep_size, rank // (world // ep_size) if data_first else rank % ep_size
        self.wte = nn.Embedding(VOCAB, WIDTH)
        how = {"num_experts": 4, "ep_size": ep_size, "k": 1, "use_rts": False, "min_capacity": 2}
        self.first = MoE(WIDTH, Expert(bias=True), use_residual=True, **how)
        self.norm = nn.LayerNorm(WIDTH)
        self.second = MoE(WIDTH, Expert(bias=False), **how)
        self.head = nn.Linear(WIDTH, VOCAB, bias=False)
        with torch.no_grad():  # experts are copies of one: each becomes its own, the same in every world
            for layer in (self.first, self.second):
                local = layer.deepspeed_moe.experts.deepspeed_experts
                for i, expert in enumerate(local):
                    g = torch.Generator().manual_seed(100 + self.share * len(local) + i)
                    for p in expert.parameters():
                        p.copy_(torch.randn(p.shape, generator=g) / 3)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        h = self.wte(tokens)
        first, one, _ = self.first(h)
        second, two, _ = self.second(self.norm(h + first))
        logits = self.head((h + second)[:, :-1]).float()
        return F.cross_entropy(logits.reshape(-1, VOCAB), tokens[:, 1:].reshape(-1)) + 0.01 * (one + two).float()


class Expert(nn.Module):
    def __init__(self, *, bias: bool) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, INNER, bias=bias)
        self.down = nn.Linear(INNER, WIDTH, bias=bias)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return self.down(torch.tanh(self.up(h)))


def experts_of(task: dict) -> Experts:
    """DeepSpeed keeps groups of experts by their size for as long as a process lives: they are forgotten between tasks."""
    from deepspeed.utils import groups

    for name in ("_EXPERT_PARALLEL_GROUP", "_EXPERT_PARALLEL_GROUP_RANKS", "_EXPERT_DATA_PARALLEL_GROUP", "_EXPERT_DATA_PARALLEL_GROUP_RANKS"):
        getattr(groups, name).clear()
    return Experts(task["ep"], data_first=task.get("config", {}).get("use_data_before_expert_parallelism", False))


def batch(step: int) -> torch.Tensor:
    g = torch.Generator().manual_seed(1000 + step)
    return torch.randint(0, VOCAB, (4, LENGTH), generator=g)


def config_of(task: dict) -> dict:
    zero = {"stage": task["stage"], "reduce_bucket_size": 1000, "allgather_bucket_size": 1000} | task.get("zero", {})
    if task["stage"] == 3:
        zero = {k: v for k, v in zero.items() if not k.endswith("bucket_size")} | {"stage3_param_persistence_threshold": 0, "memory_efficient_linear": False}
        # the last: stage 3's own linear layer replaces torch's for good, and rounds 16-bit sums elsewhere
    if task["stage"] == 0:
        zero = {"stage": 0}
    return {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_clipping": 1.0,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": task["dtype"] == "bf16"},
        "fp16": {"enabled": task["dtype"] == "fp16", "initial_scale_power": 4},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_min_lr": 1e-3, "warmup_max_lr": 1e-2, "warmup_num_steps": 10}},
        "checkpoint": {"load_universal": task.get("universal", False)},
    } | task.get("config", {})


def engine_of(task: dict):
    import deepspeed

    torch.manual_seed(task.get("seed", 7))
    model = experts_of(task) if "ep" in task else Tiny()
    few = [p for p in model.parameters() if p.requires_grad and p.ndim < 2]
    many = [p for p in model.parameters() if p.requires_grad and p.ndim >= 2]
    groups = [{"params": many, "weight_decay": 0.1}, {"params": few, "weight_decay": 0.0}]
    if "ep" in task:
        from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer

        groups = split_params_into_different_moe_groups_for_optimizer([{**g, "name": f"dense{i}"} for i, g in enumerate(groups)])
    kind = task.get("optimizer", "adamw")
    optimizer = torch.optim.SGD(groups, lr=1e-2, momentum=0.9) if kind == "sgd" else torch.optim.AdamW(groups, lr=1e-2)
    # the fused kernel is C++ of its own; the optimizer around it, which lays files out, asks only what class it is of
    deepspeed.runtime.engine.FusedAdam = torch.optim.AdamW if task.get("fused") else deepspeed.ops.adam.FusedAdam
    if task["dtype"] == "fp16":  # torch computes it; DeepSpeed asks for a processor with instructions for it
        deepspeed.accelerator.get_accelerator().is_fp16_supported = lambda: True
    engine, _, _, _ = deepspeed.initialize(model=model, optimizer=optimizer, config=config_of(task))
    if task.get("files") == "ckptd":
        from ckptd.integrations.deepspeed_live import CkptdCheckpointEngine

        engine.checkpoint_engine = CkptdCheckpointEngine()
    return engine


def train(engine, steps: int, first: int) -> list[float]:
    losses = []
    for step in range(first, first + steps):
        loss = engine(batch(step))
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses


def gathered(engine, slots: tuple[str, ...]) -> tuple[dict, dict]:
    """Masters and moments of stages 1 and 2 from the flat partitions themselves: under `round_robin_gradients` DeepSpeed's own functions give other parameters' values."""
    opt = engine.optimizer
    names = {p: n for n, p in engine.module.named_parameters()}
    master, state = {}, {}
    for i, params in enumerate(opt.round_robin_bit16_groups):
        mine = opt.single_partition_of_fp32_groups[i]
        inner = opt.optimizer.state[mine]
        for slot in ("", *slots):
            part = (inner[slot] if slot else mine).detach().clone()
            parts = [torch.empty_like(part) for _ in range(torch.distributed.get_world_size())]
            torch.distributed.all_gather(parts, part)
            flat = torch.cat(parts)
            for p, at in zip(params, opt.round_robin_bit16_offsets[i], strict=True):
                value = flat[at : at + p.numel()].reshape(p.shape).clone()
                if slot:
                    state.setdefault(names[p], {})[slot] = value
                else:
                    master[names[p]] = value
    return master, state


def merged(model: nn.Module, mine: dict) -> dict:
    """What all ranks hold by name, experts by their global numbers. What several hold is equal."""
    count = 4 // model.ep_size

    def known(name: str) -> str:
        before, _, after = name.partition(".deepspeed_experts.")
        number, _, rest = after.partition(".")
        return f"{before}.deepspeed_experts.{model.share * count + int(number)}.{rest}" if after else name

    gathered: list[dict] = [{} for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather_object(gathered, {known(n): v for n, v in mine.items()})
    found: dict = {}
    for part in gathered:
        for name, value in part.items():
            same = found.setdefault(name, value)
            if "calls" not in name:  # counts of what each rank sent to its experts; the first one's are saved
                assert all(map(torch.equal, same.values(), value.values())) if isinstance(value, dict) else torch.equal(same, value), name
    return found


def buffers_of(model: nn.Module) -> dict:
    mine = {n: b.detach().clone() for n, b in model.named_buffers()}
    return merged(model, mine) if hasattr(model, "ep_size") else mine


def held(engine, slots: tuple[str, ...]) -> dict:
    """What DeepSpeed says it holds: collective. Module weights are gathered where stage 3 scatters them."""
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    opt = engine.optimizer
    if not engine.zero_optimization():
        return held_without_zero(engine, slots)
    if hasattr(opt, "_lazy_init_hp_params_optimizer_state"):  # DeepSpeed's defect: linked after the first group's step only
        opt._hp_optimizer_states_linked = False
        opt._lazy_init_hp_params_optimizer_state()
    master, state, module = {}, {}, {}
    for name, p in engine.module.named_parameters():
        with deepspeed.zero.GatheredParameters([p], enabled=hasattr(p, "ds_id")):
            module[name] = p.detach().clone()
        if p.requires_grad:
            master[name] = safe_get_full_fp32_param(p).detach().clone().reshape(module[name].shape)
            state[name] = {s: safe_get_full_optimizer_state(p, s).detach().clone().reshape(module[name].shape) for s in slots}
    if getattr(opt, "round_robin_gradients", False):
        said, (master, state) = master, gathered(engine, slots)
        assert any(not torch.equal(said[n], master[n]) for n in master), "DeepSpeed has mended safe_get_full_fp32_param under round robin: so may this test"
    if hasattr(engine.module, "ep_size"):
        master, state, module = (merged(engine.module, part) for part in (master, state, module))
    inner = opt.optimizer
    steps = sorted({float(s["step"]) for s in inner.state.values() if "step" in s})
    groups = [{k: v for k, v in g.items() if k != "params"} for g in inner.param_groups]
    return {
        "master": master, "state": state, "module": module, "buffers": buffers_of(engine.module),
        "steps": steps, "groups": groups, "scheduler": engine.lr_scheduler.state_dict() if engine.lr_scheduler else None, "global_steps": engine.global_steps,
    }  # fmt: skip


def held_without_zero(engine, slots: tuple[str, ...]) -> dict:
    """Stage 0: the parameters themselves, or the masters that the 16-bit optimizers keep of them, one each or flat."""
    opt = engine.optimizer
    inner = getattr(opt, "optimizer", opt)
    names = {p: n for n, p in engine.module.named_parameters()}
    master, state = {}, {}
    for i, group in enumerate(inner.param_groups):
        params = opt.fp16_groups[i] if hasattr(opt, "fp16_groups") else group["params"]
        at = 0
        for k, p in enumerate(params):
            if hasattr(opt, "fp32_groups_flat"):
                flat = {"": opt.fp32_groups_flat[i]} | {s: inner.state[opt.fp32_groups_flat[i]][s] for s in slots}
                found = {s: t.detach()[at : at + p.numel()].reshape(p.shape).clone() for s, t in flat.items()}
                at += p.numel()
            else:
                own = group["params"][k]
                found = {"": own.detach().clone()} | {s: inner.state[own][s].clone() for s in slots}
            master[names[p]] = found.pop("")
            state[names[p]] = found
    module = {n: p.detach().clone() for n, p in engine.module.named_parameters()}
    if hasattr(engine.module, "ep_size"):
        master, state, module = (merged(engine.module, part) for part in (master, state, module))
    return {
        "master": master, "state": state, "module": module, "buffers": buffers_of(engine.module),
        "steps": sorted({float(s["step"]) for s in inner.state.values() if "step" in s}),
        "groups": [{k: v for k, v in g.items() if k != "params"} for g in inner.param_groups],
        "scheduler": engine.lr_scheduler.state_dict() if engine.lr_scheduler else None, "global_steps": engine.global_steps,
    }  # fmt: skip


def mend(engine, task: dict) -> None:
    """What DeepSpeed 0.19.8 does not do, or does wrong, when it loads a universal checkpoint: frozen weights and buffers stay as they were initialised;
    in stage 3 all sub-groups share one `step`, and settings in which groups differ are not restored. `task["mend"]` is the folder of the tag."""
    import deepspeed

    states = torch.load(Path(task["mend"]) / "mp_rank_00_model_states.pt", weights_only=False)
    buffers = dict(engine.module.named_buffers())
    for name in states["buffer_names"]:
        buffers[name].copy_(states["module"][name])
    for name, p in engine.module.named_parameters():
        if not p.requires_grad:
            with torch.no_grad(), deepspeed.zero.GatheredParameters([p], modifier_rank=0, enabled=hasattr(p, "ds_id")):
                p.copy_(states["module"][name])
    if task["stage"] == 3:
        inner = engine.optimizer.optimizer
        assert len({id(s["step"]) for s in inner.state.values()}) == 1, "DeepSpeed has mended its shared step: so may this test"
        for state in inner.state.values():
            state["step"] = state["step"].clone()
        for group, decay in zip(inner.param_groups, (0.1, 0.0), strict=True):
            group["weight_decay"] = decay


def live(engine, how: dict) -> dict:
    """A ckptd session over the engine: restore what there is, train `steps` more, each captured."""
    from ckptd.integrations.deepspeed_live import attach

    mine = {"note": "client"}
    session = attach(engine, extras={"mine": mine}, job=how["job"], directory=how["directory"], store=how["store"], required=True, parity=0)
    done = session.restore()
    losses = []
    for step in range(done.step + 1, done.step + 1 + how["steps"]):
        losses += train(engine, 1, engine.global_steps)
        mine["note"] = f"step {step}"
        session.step(step)
        if not session.wait("committed", step, timeout_s=60):
            raise TimeoutError(session.status())
    if how["steps"]:
        session.persist(done.step + how["steps"])
        if not session.wait("persisted", timeout_s=60):
            raise TimeoutError(session.status())
    status = session.status()["counts"]
    session.close()
    return {"step": done.step, "source": done.source, "losses": losses, "mine": mine["note"], "missing": done.missing, "unexpected": done.unexpected, "counts": status}


def perform(task: dict, rank: int) -> dict:
    slots = ("momentum_buffer",) if task.get("optimizer") == "sgd" else ("exp_avg", "exp_avg_sq")
    engine = engine_of(task)
    out: dict = {}
    first = 0
    if "load" in task:
        path, client = engine.load_checkpoint(task["load"], tag=task.get("tag"), **task.get("how", {}))
        assert path is not None, f"DeepSpeed found nothing in {task['load']}"
        out["client"] = {k: v for k, v in client.items() if k in {"note", "list"}}
        first = engine.global_steps
        if "mend" in task:
            mend(engine, task)
    if "train" in task:
        out["losses"] = train(engine, task["train"], first)
        first += task["train"]
    if "live" in task:
        out["live"] = live(engine, task["live"])
        first = engine.global_steps
    if "save" in task:
        engine.save_checkpoint(task["save"], client_state={"note": "client", "list": [1, 2.5, None]})
    if "dump" in task:
        what = held(engine, slots if task.get("slots", True) else ())
        if rank == 0:
            torch.save(what, task["dump"])
    if "next" in task:
        out["next"] = train(engine, task["next"], first)
    engine.destroy()
    return out


def _rank(rank: int, world: int, port: int, tasks: list[dict]) -> list[dict]:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    import deepspeed

    deepspeed.init_distributed("gloo", verbose=False)
    out = []
    for task in tasks:
        try:
            out.append(perform(task, rank))
        except Exception:
            if not task.get("may_fail"):
                raise
            out.append({"error": traceback.format_exc()})
    torch.distributed.destroy_process_group()
    return out


def _rank_or_tool(rank: int, world: int, port: int, tasks: list[dict]) -> list[dict]:
    """A rank's tasks; or, for a world of none, DeepSpeed's own converter."""
    if world:
        return _rank(rank, world, port, tasks)
    from argparse import Namespace

    from deepspeed.checkpoint import ds_to_universal

    for task in tasks:
        more = {"num_extract_workers": 1, "num_merge_workers": 1, "keep_temp_folder": False, "strict": True, "inject_missing_state": True}
        ds_to_universal.main(Namespace(input_folder=task["input"], output_folder=task["output"], **more))
    return [{} for _ in tasks]


def _world(world: int, tasks: list[dict]) -> list[dict]:
    """The answers of rank 0. A port that somebody else took between its choice and its use is chosen again."""
    try:
        return _ranks(world, tasks)
    except RuntimeError as e:
        if "EADDRINUSE" not in str(e) and "already in use" not in str(e):
            raise
        print("the port was taken:", e, file=sys.stderr)
        return _ranks(world, tasks)


def _ranks(world: int, tasks: list[dict]) -> list[dict]:
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    children = []
    for rank in range(max(1, world)):
        read, write = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(read)
            try:
                with redirect_stdout(sys.stderr):
                    answer: dict = {"result": _rank_or_tool(rank, world, port, tasks)}
            except BaseException:
                answer = {"error": traceback.format_exc()}
            with os.fdopen(write, "w") as f:
                f.write(json.dumps(answer))
            os._exit(0)
        os.close(write)
        children.append((pid, read))
    answers = []
    for pid, read in children:
        with os.fdopen(read) as f:
            text = f.read()
        os.waitpid(pid, 0)
        answers.append(json.loads(text) if text else {"error": "a rank died without a word"})
        if "error" in answers[-1]:  # the others would wait for it
            for other, _ in children[len(answers) :]:
                os.kill(other, signal.SIGKILL)
    errors = [f"rank {r}: {a['error']}" for r, a in enumerate(answers) if "error" in a]
    if errors:
        raise RuntimeError("\n".join(errors))
    return answers[0]["result"]


def main() -> None:
    import deepspeed

    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # else: minutes of C++, once per cache directory
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    answers = os.dup(1)
    os.dup2(2, 1)  # DeepSpeed prints; answers have a line of their own
    for line in sys.stdin:
        began_s = time.perf_counter()
        order = json.loads(line)
        try:
            answer = {"results": _world(order["world"], order["tasks"])}
        except Exception as e:
            answer = {"error": str(e)}
        answer["seconds"] = round(time.perf_counter() - began_s, 2)
        os.write(answers, (json.dumps(answer) + "\n").encode())
    del deepspeed


if __name__ == "__main__":
    main()
