"""Megatron-core, live: a session over the tensor- and pipeline-parallel shards of a job, never gathered.

    session = megatron_live.attach(model, optimizer, scheduler=opt_param_scheduler, args=args)
    start = session.restore().step
    for step in range(start + 1, total + 1):
        ...
        optimizer.step()
        session.step(step)

Where a rank's tensors lie in the whole is what the model itself says in `sharded_state_dict()`: its boxes, one for each half of a gated linear layer. So a snapshot of
any TP, PP and DP restores into any other. Names are those of the format `megatron` (`megatron_layout`): one for every layer, by its number in the whole model.

    leaves    model.<fqn>                   weights; of a 16-bit optimizer its fp32 masters, whose rounding the weights are: they are made again after a restore
              optim.state.<fqn>.<slot>      moments, cut as the weight; `step` whole
    objects   optim.param_groups, optim.scalars, extras.opt_param_scheduler, extras.grad_scaler, extras.args (counters), rng.megatron, extras of yours

What data-parallel ranks and both ends of a pipeline (tied embeddings) hold alike is stored once. A vocabulary padded to another size is another tensor: keep the padding.

Checked with megatron-core 0.16.1, FP32Optimizer and Float16OptimizerWithFloat16Params over torch's AdamW, on a CPU, without Transformer Engine.
DistributedOptimizer and layers with an extra state that is not empty (FP8) are refused by name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from importlib import import_module
from typing import Any

import torch
import xxhash
from torch import Tensor, nn
from torch.optim import Optimizer

from ckptd import session as sessions
from ckptd import state
from ckptd.core.boxes import Box, Shape
from ckptd.errors import Unstorable
from ckptd.integrations.megatron_layout import STACKED
from ckptd.session import Restored, Session
from ckptd.state import Leaf, Obj, TrainState

COUNTERS = ("iteration", "consumed_train_samples", "skipped_train_samples", "consumed_valid_samples")
"""What a restore gives back to `args`."""
OPTIMIZERS = {"FP32Optimizer", "Float16OptimizerWithFloat16Params"}
EXPERTS = ".experts.experts."


class _Part:
    """A part of a rank's tensor: `box` of the whole `fqn`, and its first row in the local tensor (None: all of it)."""

    def __init__(self, fqn: str, shape: Shape, box: Box, row: int | None) -> None:
        self.fqn, self.shape, self.box, self.row = fqn, shape, box, row


def _rows(source: Callable[[], Tensor | None], row: int, count: int) -> state.Cut:
    """Some rows of a live tensor."""
    return state.Cut(source, lambda live: live.narrow(0, row, count))


def _cut(leaf: Leaf, parts: Sequence[_Part], name: str) -> Iterator[Leaf]:
    """The leaves that a local tensor is of the whole one."""
    if leaf.view:
        msg = f"{leaf.name}: tensors that safetensors has no dtype for ({leaf.view}) are not cut"
        raise Unstorable(msg)
    for part in parts:
        resolve = leaf.resolve if part.row is None else _rows(leaf.resolve, part.row, part.box.extent[0])
        yield replace(leaf, name=name.format(part.fqn), shape=part.shape, box=part.box, resolve=resolve, assumed=True)


def _bare(model: nn.Module) -> nn.Module:
    """The model inside Megatron's wrappers (DDP, Float16Module)."""
    while isinstance(inner := getattr(model, "module", None), nn.Module):
        model = inner
    return model


def _flat(value: Any) -> Iterator[Any]:
    """The entries of what a factory builds, in order."""
    nested = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    if nested is None:
        yield value
        return
    for one in nested:
        yield from _flat(one)


def _part(sharded: Any, whole: Tensor) -> _Part:
    """Where a ShardedTensor, a part of the local tensor `whole`, lies."""
    data: Tensor = sharded.data
    key, ahead = sharded.key, sharded.prepend_axis_num
    at, shape = tuple(map(int, sharded.global_offset)), tuple(map(int, sharded.global_shape))
    stacked = STACKED.fullmatch(key)
    if ahead != bool(stacked) + (EXPERTS in key) or getattr(sharded, "flattened_range", None) is not None:
        msg = f"{key}: {ahead} axes in front of {list(data.shape)} are neither layers nor experts"
        raise Unstorable(msg)
    fqn = f"{stacked[1]}.{at[0]}.{stacked[2]}" if stacked else key
    if EXPERTS in fqn:
        fqn = fqn.replace(EXPERTS, f".experts.local_experts.{at[ahead - 1]}.")
    box = Box(at[ahead:], tuple(data.shape))
    if data.shape == whole.shape:
        return _Part(fqn, shape[ahead:], box, None)
    row, rest = divmod(int(data.storage_offset() - whole.storage_offset()), max(1, int(whole.stride(0))))
    if rest or data.shape[1:] != whole.shape[1:] or data.untyped_storage().data_ptr() != whole.untyped_storage().data_ptr():
        msg = f"{key}: its parts are not rows of the rank's tensor of shape {list(whole.shape)}"
        raise Unstorable(msg)
    return _Part(fqn, shape[ahead:], box, row)


def _inner(optimizer: Any) -> list[Any]:
    """Megatron's optimizers that update something here: a mixture of experts has several."""
    return [o for o in getattr(optimizer, "chained_optimizers", [optimizer]) if not getattr(o, "is_stub_optimizer", False)]


class Shards:
    """What a session sees of a job."""

    def __init__(self, models: Sequence[nn.Module], optimizer: Any, scheduler: Any, args: Any, extras: Mapping[str, Any]) -> None:
        self._models = [_bare(m) for m in models]
        self._optimizers = _inner(optimizer)
        self._scheduler, self._args, self._extras = scheduler, args, extras
        self._buffers: dict[int, tuple[dict[str, Tensor | None], str]] = {}

    def look(self, rank: int) -> TrainState:
        """Leaves and objects of this rank. Raises Unstorable, by name."""
        for one in self._optimizers:
            if type(one).__name__ not in OPTIMIZERS:
                msg = f"{type(one).__qualname__}: its state is not captured live"
                remedy = "train without --use-distributed-optimizer, or let Megatron save and `ckptd convert` the folder"
                raise Unstorable(msg, remedy=remedy)
        parts = self._parts()
        modules = [m for model in self._models for m in model.modules()]
        self._buffers = {id(b): (m._buffers, k) for m in modules for k, b in m._buffers.items()}  # noqa: SLF001  they are replaced by assignment
        masters = {id(half): full for one in self._optimizers for half, full in _pairs(one)}
        leaves = [leaf for tensor, found in parts.values() for leaf in self._weights(masters.get(id(tensor), tensor), found)]
        by_param = {id(masters.get(k, t)): found for k, (t, found) in parts.items()}
        optims = [self._optimizer_state(one, by_param) for one in self._optimizers]
        leaves += [leaf for found, _ in optims for leaf in found]
        held = repr(sorted((leaf.name, leaf.box) for leaf in leaves if leaf.name.startswith("model."))).encode()
        coords = {"rank": rank, "holds": xxhash.xxh3_64_intdigest(held) >> 1}
        objects = state.merged([obj for _, s in optims for obj in s.objects]) + self._objects()
        return TrainState(leaves, objects, {}, coords, all(s.complete for _, s in optims))

    def _parts(self) -> dict[int, tuple[Tensor, list[_Part]]]:
        """id(tensor) -> (tensor, where its parts lie), of all that the models save."""
        found: dict[int, tuple[Tensor, list[_Part]]] = {}
        for model in self._models:
            sharded: Any = model
            for key, entry in sharded.sharded_state_dict(metadata={"singleton_local_shards": False}).items():
                tensor = entry.data
                if not hasattr(entry, "build") and not hasattr(entry, "local_shape"):
                    if tensor is not None and not (isinstance(tensor, Tensor) and not tensor.numel()):
                        msg = f"{key}: {type(tensor).__name__}, a state beside its tensors (FP8), is not captured live"
                        raise Unstorable(msg, remedy="let Megatron save and `ckptd convert` the folder")
                    continue
                built = _flat(entry.build()) if hasattr(entry, "build") else [entry]
                found[id(tensor)] = tensor, [_part(one, tensor) for one in built]
            for name, param in model.named_parameters():
                if id(param) not in found:
                    msg = f"{name}: a parameter that sharded_state_dict does not have"
                    raise Unstorable(msg)
        return found

    def _weights(self, tensor: Tensor, parts: Sequence[_Part]) -> Iterator[Leaf]:
        buffer = self._buffers.get(id(tensor))
        dtype = state.DTYPES.get(tensor.dtype)
        if dtype is None:
            msg = f"model.{parts[0].fqn}: tensors of {tensor.dtype} are not captured live"
            raise Unstorable(msg)

        def live() -> Tensor | None:
            return tensor if buffer is None else buffer[0].get(buffer[1])

        shape = tuple(tensor.shape)
        yield from _cut(Leaf("", dtype, shape, Box.whole(shape), "", live, eager=buffer is not None), parts, "model.{}")

    @staticmethod
    def _optimizer_state(one: Any, parts: Mapping[int, Sequence[_Part]]) -> tuple[list[Leaf], state.OptimizerState]:
        inner: Optimizer = one.optimizer
        params = {id(p): p for g in inner.param_groups for p in g["params"]}
        fqns = {k: found[0].fqn for k, found in parts.items() if k in params}
        masters = [full for _, full in _pairs(one) if not full.requires_grad]
        try:
            for full in masters:  # they are made without, and are updated all the same: what is asked for its state must know
                full.requires_grad = True
            if not inner.state and state.predict(inner) is None:
                one.init_state_fn(inner, one.config)  # what Megatron does before it loads: moments of zero
            known = state.optimizer_state("", inner, fqns)
        finally:
            for full in masters:
                full.requires_grad = False
        by_fqn = {fqn: (tuple(params[k].shape), parts[k]) for k, fqn in fqns.items()}
        leaves: list[Leaf] = []
        for leaf in known.leaves:
            path, _, slot = leaf.name.rpartition(".")
            shape, found = by_fqn[path.removeprefix("optim.state.")]
            leaves += _cut(leaf, found, f"optim.state.{{}}.{slot}") if leaf.shape == shape else [leaf]
        return leaves, known

    def _objects(self) -> list[Obj]:
        extras = dict(self._extras)
        if self._scheduler is not None:
            extras.setdefault("opt_param_scheduler", self._scheduler)
        scaler = next((s for o in self._optimizers if (s := getattr(o, "grad_scaler", None)) is not None), None)
        if scaler is not None:
            extras.setdefault("grad_scaler", scaler)
        objects = [state.extra_object(name, value) for name, value in extras.items()]
        if (args := self._args) is not None:
            objects.append(Obj("extras.args", "same", lambda: {k: v for k in COUNTERS if (v := getattr(args, k, None)) is not None}, vars(args).update))
        return [*objects, *state.rng_objects(), *_tracker()]

    def refresh(self) -> None:
        """After a restore: the 16-bit weights from their masters."""
        with torch.no_grad():
            for one in self._optimizers:
                for half, full in _pairs(one):
                    half.copy_(full)


def _pairs(one: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """(16-bit weight, fp32 master) of an optimizer."""
    for halves, wholes in zip(getattr(one, "float16_groups", []), getattr(one, "fp32_from_float16_groups", []), strict=True):
        yield from zip(halves, wholes, strict=True)


def _tracker() -> Iterator[Obj]:
    """Megatron's random states for tensor-parallel regions, where the job has any; on another mesh they stay as the job made them."""
    tracker: Any = import_module("megatron.core.tensor_parallel.random").get_cuda_rng_tracker()
    states = tracker.get_states()
    if states and all(isinstance(s, Tensor) for s in states.values()):
        yield Obj("rng.megatron", "rng", tracker.get_states, tracker.set_states)


class MegatronSession(Session):
    """A session whose restore makes the 16-bit weights again."""

    shards: Shards

    def restore(self, *, step: int | None = None, strict: bool = True, fresh: bool = False, timeout_s: float = 120.0) -> Restored:
        """See Session."""
        done = super().restore(step=step, strict=strict, fresh=fresh, timeout_s=timeout_s)
        if done.source != "fresh":
            self.shards.refresh()
        return done


def attach(
    model: nn.Module | Sequence[nn.Module],
    optimizer: Any,
    *,
    scheduler: Any = None,
    args: Any = None,
    extras: Mapping[str, Any] | None = None,
    **settings: Any,
) -> MegatronSession:
    """A session over a Megatron-core model (or its chunks, wrapped or not) and the optimizer of `get_megatron_optimizer`. Collective.

    `scheduler`: OptimizerParamScheduler. `args`: Megatron-LM's namespace, whose counters are captured. `extras`, `settings`: as of `ckptd.attach`.
    """
    models = [model] if isinstance(model, nn.Module) else [*model]
    shards = Shards(models, optimizer, scheduler, args, extras or {})
    inner = [o.optimizer for o in _inner(optimizer)]
    made = sessions.attach(model=models, optimizer=inner, look=shards.look, kind=MegatronSession, **settings)
    assert isinstance(made, MegatronSession)  # noqa: S101  `kind` says so
    made.shards = shards
    return made
