"""Ranks of real megatron-core training on a CPU: started once per test module, told what to do by lines of JSON.

A rank reads one command per line from stdin and answers with one line on its first stdout; everything else it prints goes to stderr. Importing Megatron
takes longer than anything it does here, so the ranks stay, and each command makes its own process group, over the first `world` of them.

The shims are those that megatron-core 0.16.1 needs without CUDA. Pipeline stages talk by gloo send and receive: its own p2p code wants NCCL.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
from contextlib import nullcontext
from datetime import timedelta


def shim():
    import torch
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
    from megatron.core.tensor_parallel import random as tp_random
    from megatron.core.transformer.moe import moe_utils
    from torch.overrides import TorchFunctionMode

    cpu = torch.device("cpu")
    torch.cuda.current_device = lambda: cpu
    torch.cuda.synchronize = lambda *_, **__: None
    torch.Tensor.cuda = lambda self, *_, **__: self
    tp_random.CudaRNGStatesTracker.fork = lambda *_, **__: nullcontext()

    class OnCpu(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            kwargs = kwargs or {}
            if str(kwargs.get("device", "")).startswith("cuda"):
                kwargs["device"] = cpu
            found = func(*args, **kwargs)
            return found.replace("torch.", "torch.cuda.") if func is torch.Tensor.type and isinstance(found, str) else found

    OnCpu().__enter__()
    moe_utils.te_general_gemm = None  # defect: the name is missing without Transformer Engine

    plainly = DistributedOptimizer._set_main_param_and_optimizer_states

    def with_step(self, model_param, tensors):
        """Defect 2: with torch's AdamW a load asks for every parameter's `step`, which no save holds."""
        group, order = self.model_param_group_index_map[model_param]
        step = self.optimizer.state[self.optimizer.param_groups[group]["params"][order]]["step"]
        plainly(self, model_param, {"step": step.clone(), **tensors})

    DistributedOptimizer._set_main_param_and_optimizer_states = with_step


VOCAB, SEQUENCE, BATCH = 50, 8, 2


class Run:
    """One model with its optimizer on this rank."""

    def __init__(self, tp=1, pp=1, layers=4, dtype="fp32", optimizer="plain", tied=False, vocab=64, bucket=None, experts=0, ep=1, **_):
        import torch
        from megatron.core import parallel_state as ps
        from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
        from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
        from megatron.core.models.gpt.gpt_model import GPTModel
        from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
        from megatron.core.transformer.transformer_config import TransformerConfig

        ps.initialize_model_parallel(tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp, expert_model_parallel_size=ep)
        self.ps, self.tp, self.pp, self.ep, self.tied = ps, tp, pp, ep, tied
        self.first, self.last = ps.is_pipeline_first_stage(), ps.is_pipeline_last_stage()
        torch.manual_seed(100 + ps.get_pipeline_model_parallel_rank())
        bf16 = dtype == "bf16"
        config = TransformerConfig(
            num_layers=layers, hidden_size=32, num_attention_heads=4, num_query_groups=2, ffn_hidden_size=48, gated_linear_unit=True,
            activation_func=torch.nn.functional.silu, add_bias_linear=True, add_qkv_bias=True, hidden_dropout=0.0, attention_dropout=0.0,
            use_cpu_initialization=True, tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp, bf16=bf16,
            params_dtype=torch.bfloat16 if bf16 else torch.float32, pipeline_dtype=torch.bfloat16 if bf16 else torch.float32,
            gradient_accumulation_fusion=False, masked_softmax_fusion=False, bias_activation_fusion=False, bias_dropout_fusion=False,
            apply_rope_fusion=False, persist_layer_norm=False, attention_softmax_in_fp32=True,
            num_moe_experts=experts or None, moe_ffn_hidden_size=48 if experts else None, expert_model_parallel_size=ep,
        )  # fmt: skip
        self.config, self.dtype = config, config.params_dtype
        model = GPTModel(
            config, get_gpt_layer_local_spec(num_experts=experts or None, moe_grouped_gemm=False), vocab_size=vocab, max_sequence_length=SEQUENCE,
            pre_process=self.first, post_process=self.last, parallel_output=True, share_embeddings_and_output_weights=tied,
        )  # fmt: skip
        torch.manual_seed(200 + ps.get_expert_model_parallel_rank())
        for name, param in model.named_parameters():
            if ep > 1 and ".local_experts." in name:
                param.data.normal_(std=0.1)  # drawn alike on all ranks: experts would be each other's copies
        if bf16:
            model = model.bfloat16()
        ddp = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True,
            overlap_grad_reduce=bucket is not None,
            use_distributed_optimizer=optimizer != "plain",
            bucket_size=bucket,
        )
        self.gpt, self.model = model, DistributedDataParallel(config, ddp, model, disable_bucketing=bucket is None)
        settings = OptimizerConfig(
            optimizer="adam", lr=0.01, min_lr=0.001, weight_decay=0.1, clip_grad=0.0, bf16=bf16, params_dtype=self.dtype,
            use_distributed_optimizer=optimizer != "plain",
        )  # fmt: skip
        self.optimizer = get_megatron_optimizer(settings, [self.model])
        self.kind, self.iteration = optimizer, 0

    @property
    def inner(self):
        """Megatron's optimizer for one buffer; MoE has several."""
        return getattr(self.optimizer, "chained_optimizers", [self.optimizer])

    # --- training -----------------------------------------------------------------------------------------------------------

    def step(self):
        import torch
        import torch.distributed as dist

        ps, self.iteration = self.ps, self.iteration + 1
        generator = torch.Generator().manual_seed(self.iteration)
        text = torch.randint(0, VOCAB, (BATCH, SEQUENCE + 1), generator=generator)
        tokens, labels = text[:, :-1].contiguous(), text[:, 1:].contiguous()
        places = torch.arange(SEQUENCE).expand(BATCH, -1)
        mask = torch.triu(torch.ones(SEQUENCE, SEQUENCE, dtype=torch.bool), 1)[None, None]
        self.model.zero_grad_buffer()
        self.optimizer.zero_grad()
        entered = None
        if not self.first:
            entered = torch.empty(SEQUENCE, BATCH, self.config.hidden_size, dtype=self.dtype)
            dist.recv(entered, ps.get_pipeline_model_parallel_prev_rank())
            entered.requires_grad_()
            self.gpt.set_input_tensor(entered)
        out = self.model(tokens, places, mask, labels=labels if self.last else None)
        if self.last:
            loss = out.float().mean()
            loss.backward()
        else:
            dist.send(out.detach(), ps.get_pipeline_model_parallel_next_rank())
            gradient = torch.empty_like(out)
            dist.recv(gradient, ps.get_pipeline_model_parallel_next_rank())
            torch.autograd.backward(out, gradient)
            loss = torch.zeros(())
        if not self.first:
            dist.send(entered.grad, ps.get_pipeline_model_parallel_prev_rank())
        self.model.finish_grad_sync()
        if self.tied and self.pp > 1 and (self.first or self.last):
            dist.all_reduce(self.gpt.shared_embedding_or_output_weight().main_grad, group=ps.get_embedding_group())
        self.optimizer.step()
        dist.broadcast(loss, ps.get_pipeline_model_parallel_last_rank(), group=ps.get_pipeline_model_parallel_group())
        return loss.item()

    def invented(self):
        """A step on gradients that are made up: megatron-core's mixture of experts does not train on a CPU."""
        import torch

        self.iteration += 1
        torch.manual_seed(self.iteration)
        for name, param in self.gpt.named_parameters():
            if ".local_experts." not in name:
                param.main_grad.normal_()
        torch.manual_seed(1000 * self.iteration + self.ps.get_expert_model_parallel_rank() if self.ep > 1 else self.iteration)
        for name, param in self.gpt.named_parameters():
            if ".local_experts." in name:
                param.main_grad.normal_()
        self.optimizer.step()
        return 0.0

    # --- torch_dist ---------------------------------------------------------------------------------------------------------

    def _metadata(self, sharding):
        plain = (
            {"distrib_optim_sharding_type": sharding, "chained_optim_avoid_prefix": True}
            if sharding
            else {"chained_optim_avoid_prefix": True}
        )
        return {"singleton_local_shards": False, **plain}, {
            "dp_cp_group": self.ps.get_data_parallel_group(with_context_parallel=True)
        }

    def sharded(self, sharding, *, loading=False, singleton=False):
        """What Megatron-LM's `generate_state_dict` builds."""
        from megatron.core.dist_checkpointing import ShardedObject

        ps = self.ps
        stored, groups = self._metadata(sharding)
        stored["singleton_local_shards"] = singleton
        metadata = {**stored, **groups}
        model = self.gpt.sharded_state_dict(metadata=metadata)
        state = {
            "args": self.arguments(), "checkpoint_version": 3.0, "iteration": self.iteration, "model": model,
            "optimizer": self.optimizer.sharded_state_dict(model, is_loading=loading, metadata=metadata),
            "opt_param_scheduler": {"max_lr": 0.01, "num_steps": self.iteration * BATCH},
            "num_floating_point_operations_so_far": 1234.5,
            "rng_state": ShardedObject(
                "rng_state", [self.randomness()], (self.pp, self.tp),
                (ps.get_pipeline_model_parallel_rank(), ps.get_tensor_model_parallel_rank()), replica_id=ps.get_data_parallel_rank(),
            ),
        }  # fmt: skip
        return state, stored

    def arguments(self):
        return argparse.Namespace(
            num_layers=self.config.num_layers, tensor_model_parallel_size=self.tp, pipeline_model_parallel_size=self.pp, iteration=self.iteration,
            padded_vocab_size=64, vocab_size=VOCAB, swiglu=True, params_dtype=self.dtype,
            untie_embeddings_and_output_weights=not self.tied, expert_model_parallel_size=self.ep, num_experts=self.config.num_moe_experts,
        )  # fmt: skip

    def randomness(self):
        import numpy as np
        import torch

        return {
            "random_rng_state": random.getstate(), "np_rng_state": np.random.get_state(),  # noqa: NPY002  what Megatron-LM saves
            "torch_rng_state": torch.get_rng_state(),
            "cuda_rng_state": torch.zeros(16, dtype=torch.uint8), "rng_tracker_states": {"model-parallel-rng": torch.zeros(16, dtype=torch.uint8)},
        }  # fmt: skip

    def save(self, folder, sharding, *, singleton=False):
        from megatron.core import dist_checkpointing

        state, stored = self.sharded(sharding, singleton=singleton)
        dist_checkpointing.save(state, folder, content_metadata=stored)

    def load(self, folder, sharding, *, singleton=False):
        """As Megatron-LM loads, but for a defect of its torch-AdamW path: all parameters share one step tensor afterwards."""
        from megatron.core import dist_checkpointing

        if self.kind != "plain":  # its state_dict asserts before a first step: defect 1
            for one in self.inner:
                one._init_optimizer_states_with_dummy_values()
        state, _ = self.sharded(sharding, loading=True, singleton=singleton)
        state.pop("args")
        state.pop("rng_state")
        loaded = dist_checkpointing.load(state, folder)
        self.gpt.load_state_dict(loaded["model"])
        self.optimizer.load_state_dict(loaded["optimizer"])
        for one in self.inner:
            for slots in one.optimizer.state.values():
                slots["step"] = slots["step"].detach().clone()  # defect 3
        self.iteration = loaded["iteration"]
        return {k: v for k, v in loaded.items() if isinstance(v, int | float | dict) and k not in ("model", "optimizer")}

    # --- live ---------------------------------------------------------------------------------------------------------------

    def live(self, how, rank):
        """A ckptd session: restore what there is, train `steps` more, each captured."""
        from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

        from ckptd.integrations.megatron_live import attach

        os.environ["LOCAL_RANK"] = str(rank)
        args = argparse.Namespace(iteration=0, consumed_train_samples=0)
        scheduler = OptimizerParamScheduler(
            self.optimizer, init_lr=0.0, max_lr=0.01, min_lr=0.001, lr_warmup_steps=0, lr_decay_steps=100, lr_decay_style="linear",
            start_wd=0.1, end_wd=0.1, wd_incr_steps=100, wd_incr_style="constant", use_checkpoint_opt_param_scheduler=True, override_opt_param_scheduler=False,
        ) if how["decay"] else None  # fmt: skip
        session = attach(
            [self.model], self.optimizer, scheduler=scheduler, args=args, job=how["job"], directory=how["directory"], store=how.get("store", ""),
            required=True, parity=0,
        )  # fmt: skip
        done = session.restore()
        self.iteration, losses = args.iteration, []
        for step in range(done.step + 1, done.step + 1 + how["steps"]):
            losses.append(self.invented() if how.get("invented") else self.step())
            if scheduler:
                scheduler.step(increment=BATCH)
            args.iteration, args.consumed_train_samples = step, args.consumed_train_samples + BATCH
            session.step(step)
            if not session.wait("committed", step, timeout_s=60):
                raise TimeoutError(session.status())
        if how["steps"] and how.get("store"):
            session.persist(self.iteration)
            if not session.wait("persisted", timeout_s=60):
                raise TimeoutError(session.status())
        counts = session.status()["counts"]
        session.close()
        return {
            "step": done.step, "source": done.source, "losses": losses, "counts": counts, "missing": done.missing, "unexpected": done.unexpected,
            "samples": args.consumed_train_samples, "num_steps": getattr(scheduler, "num_steps", None), "lr": [g["lr"] for g in self.optimizer.param_groups],
        }  # fmt: skip

    # --- legacy -------------------------------------------------------------------------------------------------------------

    def save_legacy(self, root):
        """`model_optim_rng.pt` and `distrib_optim.pt` as Megatron-LM's `save_checkpoint` with --ckpt-format torch lays them out."""
        import torch

        ps, name = self.ps, self.legacy_folder()
        folder = os.path.join(root, f"iter_{self.iteration:07d}", name)
        os.makedirs(folder, exist_ok=True)
        if self.kind != "plain":
            self.optimizer.save_parameter_state(os.path.join(folder, "distrib_optim.pt"))
        if ps.get_data_parallel_rank() == 0 or ps.get_expert_data_parallel_rank() == 0:
            state = {
                "args": self.arguments(), "checkpoint_version": 3.0, "iteration": self.iteration, "model": self.gpt.state_dict_for_save_checkpoint(),
                "optimizer": self.optimizer.state_dict(), "opt_param_scheduler": {"max_lr": 0.01, "num_steps": self.iteration * BATCH},
                "num_floating_point_operations_so_far": 1234.5, "rng_state": [self.randomness()],
            }  # fmt: skip
            torch.save(state, os.path.join(folder, "model_optim_rng.pt"))
        if torch.distributed.get_rank() == 0:
            with open(os.path.join(root, "latest_checkpointed_iteration.txt"), "w") as f:
                f.write(str(self.iteration))

    def legacy_folder(self):
        """As Megatron-LM's `get_checkpoint_name`."""
        ps = self.ps
        name = f"mp_rank_{ps.get_tensor_model_parallel_rank():02d}"
        name += f"_{ps.get_pipeline_model_parallel_rank():03d}" if self.pp > 1 else ""
        return name + (f"_{ps.get_expert_model_parallel_rank():03d}" if self.ep > 1 else "")

    def load_legacy(self, root):
        import torch

        name = self.legacy_folder()
        with open(os.path.join(root, "latest_checkpointed_iteration.txt")) as f:
            folder = os.path.join(root, f"iter_{int(f.read()):07d}", name)
        state = torch.load(os.path.join(folder, "model_optim_rng.pt"), weights_only=False)
        if self.kind != "plain":
            for one in self.inner:
                one._init_optimizer_states_with_dummy_values()
        self.gpt.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.kind != "plain":
            with torch.no_grad():  # defect: this path alone forgets it, and an fp32 model's parameters are their own masters
                self.optimizer.load_parameter_state(os.path.join(folder, "distrib_optim.pt"))
        for one in self.inner:
            for slots in one.optimizer.state.values():
                slots["step"] = slots["step"].detach().clone()
        self.iteration = state["iteration"]

    # --- what this rank holds -----------------------------------------------------------------------------------------------

    def held(self):
        """[(sharded key, offset, global shape, slot, tensor)]: every part of every tensor of this rank, told by the model itself, not by a file."""
        from dataclasses import replace

        import torch.distributed as dist
        from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

        stored, groups = self._metadata(None)
        rows, params = [], {}
        for one in self.gpt.sharded_state_dict(metadata={**stored, **groups}).values():
            if isinstance(one, ShardedTensor | ShardedTensorFactory):
                params[one.data] = one
        group = self.ps.get_data_parallel_group()
        for param, meta in params.items():
            slots = {"": param.detach()}
            for one in self.inner:
                slots |= self._slots(one, param, group)
            for slot, tensor in slots.items():
                tensor = tensor.detach().clone()
                if slot == "step":
                    rows.append((meta.key, (), (), slot, tensor))
                    continue
                if isinstance(meta, ShardedTensorFactory):
                    parts = replace(meta, data=tensor).build()
                else:
                    parts = [replace(meta, data=tensor, dtype=tensor.dtype)]
                rows += [(p.key, tuple(p.global_offset), tuple(p.global_shape), slot, p.data.clone()) for p in parts]
        dist.barrier()
        return rows

    def _slots(self, one, param, group):
        import torch
        import torch.distributed as dist

        if self.kind == "plain":
            for halves, wholes in zip(
                getattr(one, "float16_groups", []), getattr(one, "fp32_from_float16_groups", []), strict=True
            ):
                for half, full in zip(halves, wholes, strict=True):
                    if half is param:
                        return {"master": full, **one.optimizer.state[full]}
            return dict(one.optimizer.state[param]) if param in one.optimizer.state else {}
        here = None
        for maps in one.gbuf_ranges:
            for buckets in maps.values():
                for bucket in buckets:
                    if param in bucket["param_map"]:
                        span = bucket["param_map"][param]["param"]
                        tensors = one._get_main_param_and_optimizer_states(param)
                        here = (span.start, span.end, {k: v.detach().clone() for k, v in tensors.items()})
        group = one.data_parallel_group
        parts = [None] * group.size()
        dist.all_gather_object(parts, here, group=group)
        found = {}
        for begin, end, tensors in (p for p in parts if p):
            for key, tensor in tensors.items():
                name = "master" if key == "param" else key
                if name == "step":
                    found[name] = tensor
                    continue
                found.setdefault(name, torch.empty(param.numel())).view(-1)[begin:end] = tensor.view(-1)
        return {k: v if k == "step" else v.view(param.shape) for k, v in found.items()}


def obey(command, rank):
    """One command: {world, port, run: {...}, load?, live?, steps, save?, legacy?, dump?, more} -> {"losses", "after", "loaded"}."""
    import torch
    import torch.distributed as dist

    dist.init_process_group(
        "gloo",
        init_method=f"tcp://127.0.0.1:{command['port']}",
        rank=rank,
        world_size=command["world"],
        timeout=timedelta(seconds=120),
    )
    try:
        run = Run(**command["run"])
        answer = {}
        if "load" in command:
            answer["loaded"] = run.load(command["load"], command.get("sharding"), singleton=command.get("singleton", False))
        if "load_legacy" in command:
            run.load_legacy(command["load_legacy"])
        if "live" in command:
            answer["live"] = run.live(command["live"], rank)
        answer["losses"] = [run.invented() if command.get("invented") else run.step() for _ in range(command.get("steps", 0))]
        for folder, sharding, singleton in command.get("save", []):
            if rank == 0:
                os.makedirs(folder, exist_ok=True)
            dist.barrier()
            run.save(folder, sharding, singleton=singleton)
        if "legacy" in command:
            run.save_legacy(command["legacy"])
        if "dump" in command:
            torch.save(run.held(), f"{command['dump']}-{rank}.pt")
        answer["after"] = [run.step() for _ in range(command.get("more", 0))]
        dist.barrier()
        return answer
    finally:
        from megatron.core import parallel_state

        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def main():
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    import torch

    torch.set_num_threads(1)
    shim()
    rank = int(sys.argv[1])
    print(json.dumps({"ready": rank}), file=answers, flush=True)
    for line in sys.stdin:
        try:
            answer = obey(json.loads(line), rank)
        except BaseException as e:  # torch's CheckpointException is no Exception
            import traceback

            answer = {"error": f"{type(e).__name__}: {e}", "trace": traceback.format_exc()}
        print(json.dumps(answer, default=str), file=answers, flush=True)


if __name__ == "__main__":
    main()
