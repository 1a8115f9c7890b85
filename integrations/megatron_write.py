"""Writing Megatron-core's `torch_dist`: what `dist_checkpointing.load` takes at any TP, PP, EP and DP.

Layers are stacked under one key again (`--config layers=separate` keeps them apart, for models whose layers differ), every shard is one layer's, and one
rank's of `--tp`. The optimizer is `fully_reshardable`, or what the non-distributed optimizer writes. Megatron's loader asks for more than tensors: a param group for
each of its own, found by `wd_mult` and its like; one step for all parameters; an `_extra_state` object for every linear layer.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

import numpy as np

from ckptd.core.boxes import Box, Shape
from ckptd.core.emit import Entry, Known, OutFile, Segment, Take, Taken, torch_file
from ckptd.core.logical import GROUPS, MODEL, STATE, Checkpoint
from ckptd.core.pickles import Dtype, Global, Made
from ckptd.core.pickling import TORCH_NAMES, Call, call, dumps
from ckptd.errors import Unstorable
from ckptd.formats import Plan, WriteOptions, check_settings, need_drop
from ckptd.integrations import megatron_layout as layout
from ckptd.integrations.megatron_parts import LATEST
from ckptd.integrations.native import AsTensor
from ckptd.integrations.torch_native import Outgoing, Refused

LINEARS = (
    "self_attention.linear_qkv",
    "self_attention.linear_proj",
    "self_attention.core_attention",
    "mlp.linear_fc1",
    "mlp.linear_fc2",
)
"""Modules for which Megatron's loader asks an `_extra_state`, though it is empty without FP8."""
_METADATA, _FILES = "torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem"
COMMON = (
    "args",
    "checkpoint_version",
    "opt_param_scheduler",
    "num_floating_point_operations_so_far",
    "rerun_state_machine",
    "tokens",
    "random_seed",
)
"""Objects that have a place of their own in Megatron-LM's common state; others lie under `ckptd`."""
_RESERVED = ("extras.rng_grid", "extras.extra_state", "extras.grad_scaler")


def megatron_groups(checkpoint: Checkpoint, notes: list[str]) -> list[dict[str, Any]]:
    """The param groups as Megatron tells them apart: those of another system are split by its rule, with their own hyper-parameters.

    Every rank of a target has all experts. Megatron's are then in the groups of all else: `is_expert_parallel` means that ranks share them.
    """
    groups = [dict(g) for g in checkpoint.groups]
    if not groups or all("wd_mult" in g or "pre_wd_mult" in g for g in groups):
        return _without_expert_parallel(groups)
    made: dict[float, dict[str, Any]] = {}
    mixed = False
    for group in groups:
        for fqn in group["params"]:
            tensor = checkpoint.tensors.get(MODEL + fqn)
            undecayed = fqn.endswith("bias") or (tensor is not None and len(tensor.shape) == 1)
            key = 0.0 if undecayed else 1.0
            hyper = {k: v for k, v in group.items() if k not in {"params", "param_names"}}
            identity = dict(zip(layout.IDENTITY, (key, 1.0, False, False), strict=True))
            entry = made.setdefault(key, {**hyper, **identity, "params": []})
            mixed |= {k: v for k, v in entry.items() if k in hyper and k != "params"} != hyper
            entry["params"].append(fqn)
    notes.append(
        "the param groups are Megatron's: biases and vectors apart from the rest"
        + ("; their hyper-parameters differed within one, the first are kept" if mixed else "")
    )
    return [made[k] for k in sorted(made, reverse=True)]


def _without_expert_parallel(groups: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Groups of experts as one rank that holds all of them has them: they join those that are otherwise like them."""
    made: list[dict[str, Any]] = []
    for group in groups:
        named = {**group, "is_expert_parallel": False} if group.get("is_expert_parallel") else group
        like = next((g for g in made if {**g, "params": ()} == {**named, "params": ()}), None) if named is not group else None
        if like is None:
            made.append(named)
        else:
            like["params"] = [*like["params"], *named["params"]]
    return made


def weight_dtypes(checkpoint: Checkpoint, options: WriteOptions, dropped: list[str]) -> dict[str, str]:
    """FQN -> dtype of the weights and buffers in the target: `options.dtype`, else what the source computes with."""
    found = {}
    for name, tensor in checkpoint.tensors.items():
        if not name.startswith(MODEL):
            continue
        if name in checkpoint.buffers and "buffers" in options.drop:
            dropped.append(name)
            continue
        dtype = checkpoint.derived.get(name, tensor.dtype)
        wanted = options.dtype and name not in checkpoint.buffers and dtype in {"F64", "F32", "F16", "BF16"}
        found[name.removeprefix(MODEL)] = options.dtype if wanted else dtype
    return found


def one_step(checkpoint: Checkpoint, notes: list[str]) -> tuple[float, list[str]]:
    """The optimizer's step, which Megatron holds once for all parameters, and the tensors that say it. Raises Unstorable where they differ."""
    names = [n for n in checkpoint.tensors if n.startswith(STATE) and n.endswith(".step")]
    values = {checkpoint.scalars[n] for n in names if n in checkpoint.scalars}
    if len(values) > 1:
        msg = f"parameters are at steps {sorted(values)[:4]}, and Megatron has one step for all"
        raise Unstorable(msg, remedy="--drop optimizer")
    if values:
        return float(values.pop()), names
    step = checkpoint.objects.get("step", 0)
    notes.append(f"no parameter says its step: the optimizer's is taken to be {step}")
    return float(step), names


def note_scheduler(checkpoint: Checkpoint, notes: list[str]) -> None:
    """Megatron-LM stops where an optimizer comes without its scheduler."""
    if "extras.opt_param_scheduler" not in checkpoint.objects:
        notes.append("the source has no opt_param_scheduler: Megatron-LM needs --no-load-optim, or one put into its common state")


def write_renamed(checkpoint: Checkpoint, make: Callable[[Checkpoint], Plan]) -> Plan:
    """The plan of a checkpoint whose names are Megatron's own, those of the local spec included: `make` sees the names that the sharded state has."""
    renamed = layout.sharded_names(n.removeprefix(MODEL) for n in checkpoint.tensors if n.startswith(MODEL))
    if not renamed:
        return make(checkpoint)
    objects = {k: [dict(g) for g in v] if k == GROUPS else v for k, v in checkpoint.objects.items()}
    copy = replace(checkpoint, tensors=dict(checkpoint.tensors), objects=objects)
    copy.rename(renamed)
    there = dict(zip(checkpoint.tensors, copy.tensors, strict=True))
    copy.scalars = {there.get(n, n): v for n, v in checkpoint.scalars.items()}
    back = {new: old for old, new in there.items()}
    plan = make(copy)
    files = [OutFile(f.name, tuple(_taken_back(s, back) for s in f.segments)) for f in plan.files]
    dropped, inlined = [back.get(n, n) for n in plan.dropped], [back.get(n, n) for n in plan.inlined]
    return replace(plan, files=files, dropped=dropped, inlined=inlined, renamed={old: new for old, new in there.items() if old != new})


def _taken_back(segment: Any, back: Mapping[str, str]) -> Any:
    if isinstance(segment, Take):
        return Take(back.get(segment.name, segment.name), segment.box, segment.dtype)
    return Entry(segment.mark, tuple(_taken_back(s, back) for s in segment.segments)) if isinstance(segment, Entry) else segment


@dataclass
class _Stack:
    """A key of the target: tensors of one shape under leading indices."""

    shape: Shape
    dtype: str
    parts: dict[tuple[int, ...], str] = field(default_factory=dict)


class Writer:
    """One target being planned."""

    def __init__(self, checkpoint: Checkpoint, options: WriteOptions) -> None:
        check_settings(options, {"optimizer", "layers", "args"}, "the format megatron")
        self.source, self.options = checkpoint, options
        self.plain = options.config.get("optimizer", "fully_reshardable") == "plain"
        self.stacked = options.config.get("layers", "stacked") == "stacked"
        self.notes: list[str] = []
        self.dropped: list[str] = []
        self.inlined: list[str] = []
        self.outgoing = MegatronObjects(checkpoint, options, "Megatron's torch_dist")
        self.shapes = {n.removeprefix(MODEL): t.shape for n, t in checkpoint.tensors.items() if n.startswith(MODEL)}
        self.gated = layout.is_gated(self.shapes)

    def plan(self) -> Plan:
        """All files."""
        stacks: dict[str, _Stack] = {}
        self._model(stacks)
        optimizer = self._optimizer(stacks)
        common = self._common(optimizer)
        others = [n for n in self.source.tensors if n.startswith("extras.")]
        self.dropped += need_drop("objects", others, self.options, "Megatron's torch_dist")
        files, metadata = self._files(stacks)
        marker = {
            "sharded_backend": "torch_dist",
            "sharded_backend_version": 1,
            "common_backend": "torch",
            "common_backend_version": 1,
        }
        out = [
            *files,
            OutFile("common.pt", torch_file(common)),
            OutFile(".metadata", (Known(dumps(metadata)),)),
            OutFile("metadata.json", (Known(json.dumps(marker).encode()),)),
        ]
        step = int(self.source.objects.get("step", 0))
        out = [OutFile(f"iter_{step:07d}/{f.name}", f.segments) for f in out]
        out.append(OutFile(LATEST, (Known(str(step).encode()),)))
        return Plan(out, dropped=self.dropped, inlined=self.inlined, notes=[*self.notes, *self.outgoing.notes])

    # --- tensors ----------------------------------------------------------------------------------------------------------------

    def _model(self, stacks: dict[str, _Stack]) -> None:
        source = self.source
        for fqn, dtype in weight_dtypes(source, self.options, self.dropped).items():
            self._stack(stacks, "", fqn, MODEL + fqn, dtype)
        tied = [a for a in source.aliases if a != MODEL + layout.OUTPUT]
        if tied:
            self.notes.append(f"tied weights are stored once: {', '.join(tied[:3])}")

    def _stack(self, stacks: dict[str, _Stack], prefix: str, fqn: str, name: str, dtype: str) -> None:
        found = layout.LAYER.fullmatch(fqn)
        key = fqn
        at: list[int] = []
        if found and self.stacked:
            key, at = f"{found[1]}.{found[3]}", [int(found[2])]
        if expert := layout.EXPERT.fullmatch(key):
            key, at = f"{expert[1]}.experts.{expert[3]}", [*at, int(expert[2])]
        shape = self.source.tensors[name].shape
        stack = stacks.setdefault(prefix + key, _Stack(shape, dtype))
        if (stack.shape, stack.dtype) != (shape, dtype) or tuple(at) in stack.parts:
            msg = f"{fqn}: {dtype}{list(shape)}, where other layers have {stack.dtype}{list(stack.shape)}"
            raise Unstorable(msg, remedy="layers that differ need --config layers=separate (Megatron: non-homogeneous layers)")
        stack.parts[tuple(at)] = name

    def _optimizer(self, stacks: dict[str, _Stack]) -> Any:
        source = self.source
        state = source.state()
        if not state and not source.groups:
            return None
        names = [n for n in source.tensors if n.startswith("optim.")]
        if "optimizer" in self.options.drop:
            self.dropped += names
            return None
        half = any(stacks[k].dtype in {"BF16", "F16"} for k in stacks)
        for fqn, slots in state.items():
            if MODEL + fqn not in source.tensors:
                msg = f"{fqn} has state of the optimizer and is no weight of the model"
                raise Unstorable(msg, remedy="--drop optimizer")
            for slot, tensor in slots.items():
                if slot not in {"step", "master"}:
                    if tensor.shape != self.shapes[fqn]:
                        msg = f"{fqn}: {slot} of shape {list(tensor.shape)}: Megatron's optimizer has state of the weight's shape only"
                        raise Unstorable(msg, remedy="--drop optimizer")
                    self._stack(stacks, f"optimizer.state.{slot}.", fqn, f"{STATE}{fqn}.{slot}", "F32")
            if not self.plain or half:
                master = f"{STATE}{fqn}.master" if "master" in slots else MODEL + fqn
                self._stack(stacks, f"optimizer.state.{'fp32_param' if self.plain else 'param'}.", fqn, master, "F32")
        step, self.inlined = one_step(source, self.notes)
        note_scheduler(source, self.notes)
        groups = []
        for group in megatron_groups(source, self.notes):
            held = {k: self.outgoing.value(f"{GROUPS}.{k}", v) for k, v in group.items() if k != "params"}
            groups.append(held if self.plain else {**held, "step": step})
        scaler = source.objects.get("extras.grad_scaler")
        rest = {"grad_scaler": self.outgoing.value("extras.grad_scaler", scaler)} if scaler else {}
        if not self.plain:
            return {"optimizer": {"param_groups": groups}, **rest, "param_state_sharding_type": "fully_reshardable"}
        common = Taken("F32", (), (Known(np.float32(step).tobytes()),))
        inner = {"state": {"common_step": common}, "param_groups": groups}
        return {"optimizer": inner, **rest} if half else inner

    # --- objects ----------------------------------------------------------------------------------------------------------------

    def _common(self, optimizer: Any) -> dict[str, Any]:
        source = self.source
        kept: dict[str, Any] = {}
        lost: list[str] = []
        common: dict[str, Any] = {"checkpoint_version": 3.0, "iteration": int(source.objects.get("step", 0))}
        if "objects" in self.options.drop:
            self.dropped += [n for n in source.objects if n not in {GROUPS, "step"}]
        else:
            for name, value in source.objects.items():
                if name in {GROUPS, "step", *_RESERVED}:
                    continue
                key = name.removeprefix("extras.")
                try:
                    made = self.outgoing.value(name, value)
                except Refused as e:
                    lost.append(str(e))
                    continue
                (common if name.startswith("extras.") and key in COMMON else kept)[key if key in COMMON else name] = made
        self.dropped += need_drop("objects", lost, self.options, "Megatron's torch_dist")
        given = {**(common.pop("args", None) or {}), **(self.options.config.get("args") or {})}
        if given:
            common["args"] = Made(Global("argparse", "Namespace"), (), {k: dtype_again(v) for k, v in given.items()})
        if kept:
            common["ckptd"] = kept
        if optimizer is not None:
            common["optimizer"] = optimizer
        content: dict[str, Any] = {"singleton_local_shards": False, "chained_optim_avoid_prefix": True}
        if optimizer is not None and not self.plain:
            content["distrib_optim_sharding_type"] = "fully_reshardable"
        common["content_metadata"] = content
        return common

    def _blobs(self) -> Iterator[tuple[str, Any]]:
        """Sharded objects: key, value."""
        source = self.source
        layers = 1 + max((int(m[2]) for n in self.shapes if (m := layout.LAYER.fullmatch(n))), default=-1)
        experts = 1 + max((int(m[2]) for n in self.shapes if (m := layout.EXPERT.fullmatch(n))), default=-1)
        known = source.objects.get("extras.extra_state")
        for key in known or [f"decoder.layers.{m}._extra_state" for m in LINEARS]:
            stacked = layout.STACKED.fullmatch(key)
            shape = [*([layers] if stacked and self.stacked else []), *([experts] if ".experts.experts." in key else [])] or [1]
            names = [key] if self.stacked or not stacked else [f"{stacked[1]}.{i}.{stacked[2]}" for i in range(layers)]
            for name in names:
                for at in np.ndindex(*shape):
                    yield f"{name}/shard_{'.'.join(map(str, at))}_{'.'.join(map(str, shape))}", None
        grid = source.objects.get("extras.rng_grid")
        if not source.per_rank or "objects" in self.options.drop:
            return
        if (
            not grid
            or len(source.per_rank) != prod(grid)
            or {k for held in source.per_rank.values() for k in held} != {"extras.rng_state"}
        ):
            self.dropped += [f"{n} of rank {r}" for r, held in source.per_rank.items() for n in held]
            self.notes.append(
                "random states are per (pipeline, tensor) rank in Megatron; those of the source are left out, Megatron seeds anew"
            )
            return
        pp, tp = grid
        for rank in range(pp * tp):
            yield f"rng_state/shard_{rank // tp}.{rank % tp}_{pp}.{tp}", source.per_rank[rank]["extras.rng_state"]

    # --- files ------------------------------------------------------------------------------------------------------------------

    def _shards(self, key: str, stack: _Stack) -> Iterator[tuple[Shape, Taken]]:
        """(offset, tensor) of a key: one for each layer and rank of `tp`."""
        tp = self.options.tp
        lead = len(next(iter(stack.parts)))
        for at, name in stack.parts.items():
            fqn = key if not key.startswith("optimizer.state.") else key.split(".", 3)[3]
            boxes = [Box.whole(stack.shape)]
            dim = layout.cut_of(fqn, len(stack.shape))
            if tp > 1 and dim is not None and stack.shape[dim] % (2 * tp) == 0:
                boxes = sorted({s.box for r in range(tp) for s in layout.shares(fqn, stack.shape, r, tp, gated=self.gated)})
            for box in boxes:
                yield (*at, *box.start), Taken(stack.dtype, ((1,) * lead) + box.extent, (Take(name, box, stack.dtype),))

    def _files(self, stacks: Mapping[str, _Stack]) -> tuple[list[OutFile], Made]:
        """The `.distcp` files, filled one after the other, and the index."""
        described: dict[str, Any] = {}
        stored: dict[Any, Any] = {}
        files: list[list[Segment]] = [[]]
        at = number = 0

        def put(value: Any, fqn: str, offset: Shape | None) -> None:
            nonlocal at, number
            blob = torch_file(value, root=f"archive{number}")
            size = sum(s.nbytes for s in blob)
            if at and at + size > self.options.shard_bytes:
                files.append([])
                at = 0
            stored[_index(fqn, offset)] = Made(
                Global(_FILES, "_StorageInfo"), (), {"relative_path": f"__{len(files) - 1}_0.distcp", "offset": at, "length": size}
            )
            files[-1] += blob
            at, number = at + size, number + 1

        for key, stack in stacks.items():
            counts = tuple(max(a[d] for a in stack.parts) + 1 for d in range(len(next(iter(stack.parts)))))
            if prod(counts) != len(stack.parts):
                msg = f"{key}: {len(stack.parts)} of {prod(counts)} layers have it"
                raise Unstorable(msg, remedy="layers that differ need --config layers=separate (Megatron: non-homogeneous layers)")
            chunks = []
            for offset, taken in self._shards(key, stack):
                chunks.append(_made("ChunkStorageMetadata", {"offsets": _size(offset), "sizes": _size(taken.shape)}))
                put(taken, key, offset)
            described[key] = _made(
                "TensorStorageMetadata",
                {"properties": _properties(stack.dtype), "size": _size((*counts, *stack.shape)), "chunks": chunks},
            )
        for key, value in self._blobs():
            described[key] = _made("BytesStorageMetadata", None)
            put([self.outgoing.value(key, value)], key, None)
        metadata = _made(
            "Metadata",
            {
                "state_dict_metadata": described,
                "planner_data": None,
                "storage_data": stored,
                "storage_meta": None,
                "version": "1.0.0",
            },
        )
        return [OutFile(f"__{i}_0.distcp", tuple(s)) for i, s in enumerate(files)], metadata


def _made(name: str, state: Any) -> Made:
    return Made(Global(_METADATA, name), (), state)


def _size(shape: Sequence[int]) -> Call:
    return call("torch:Size", list(shape))


def _index(fqn: str, offset: Shape | None) -> Any:
    return _made("MetadataIndex", {"fqn": fqn, "offset": None if offset is None else _size(offset), "index": None})


def _properties(dtype: str) -> Made:
    strided, contiguous = call("torch.serialization:_get_layout", "torch.strided"), call(f"{_METADATA}:_MEM_FORMAT_ENCODING", 0)
    return _made("TensorProperties", (Dtype(dtype), strided, False, contiguous, False))


class MegatronObjects(Outgoing):
    """NumPy's own arrays (its random state) stay what they are; those that were tensors become tensors again."""

    def value(self, path: str, value: Any) -> Any:
        """See Outgoing."""
        if isinstance(value, np.ndarray) and not isinstance(value, AsTensor) and value.ndim == 1:
            return value
        return super().value(path, value)


def dtype_again(value: Any) -> Any:
    """A dtype that was kept as text."""
    code = next((c for c, n in TORCH_NAMES.items() if value == f"torch.{n}"), None) if isinstance(value, str) else None
    return Dtype(code) if code else value
