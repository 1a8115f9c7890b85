"""The training state as ckptd sees it: named tensors with their boxes, and objects.

Names are those that torch's DCP gives to `{"model": ..., "optim": ...}`: `model.<fqn>`, `optim.state.<fqn>.<slot>`, with FQNs free of wrappers
(DDP's `module`, compile's `_orig_mod`, activation checkpointing's `_checkpoint_wrapped_module`). Names are global: pipeline stages keep
the FQNs of the whole model.

A DTensor's box follows from physical ownership, not from DTensor's own offset helper, which is wrong for uneven FSDP2 x TP (torch 2.13;
pytorch#161368): dimensions are cut in the order in which the parallelisms cut them, `chunk(chunk(dim, tp), dp)`, and the result is checked
against the local shape. A plain tensor that several ranks declare under one name is taken for a replica; its bytes are compared at attach.

Which tensors are eager: buffers and the arrays inside objects, for forward and backward may change them at any moment. Parameters and optimizer
state are lazy: they change in `optimizer.step` only.

Optimizer state does not exist before the first step. `predict` learns its names, dtypes and shapes from a twin of the optimizer that takes one step
on the meta device: no memory, and neither weights nor state nor counters of the real one are touched.
"""

from __future__ import annotations

import copy
import fnmatch
import inspect
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import xxhash
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from ckptd.core.boxes import Box, Shape, chunk
from ckptd.errors import Unstorable

DTYPES: Mapping[torch.dtype, str] = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint64: "U64", torch.uint32: "U32", torch.uint16: "U16", torch.uint8: "U8",
    torch.bool: "BOOL", torch.complex64: "C64",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e4m3fnuz: "F8_E4M3FNUZ",
    torch.float8_e5m2: "F8_E5M2", torch.float8_e5m2fnuz: "F8_E5M2FNUZ",
}  # fmt: skip
"""torch's dtypes that safetensors has; every other one is stored as bytes with one more dimension (core.image)."""
TORCH_DTYPES: Mapping[str, torch.dtype] = {name: dtype for dtype, name in DTYPES.items()}

WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")


@dataclass(eq=False, slots=True)
class Leaf:
    """One tensor of the state on this rank. `shape`, `box`, `dtype` are as stored; `resolve` finds the live tensor, or None while it does not exist.

    `local`: this rank's own, not shared with others that use the same name (plain buffers).
    `assumed`: plain, so that other ranks' equal names are taken for replicas.
    """

    name: str
    dtype: str
    shape: Shape
    box: Box
    view: str
    resolve: Callable[[], Tensor | None]
    eager: bool = False
    local: bool = False
    assumed: bool = False
    like: Callable[[], Tensor] | None = None
    """Makes the live tensor, for optimizer state that a restore brings before the first step."""


@dataclass(eq=False, slots=True)
class Obj:
    """An object of the state. `policy` says whose copy a rank gets on a changed mesh: "same" (all ranks' copies must be equal),
    "optimizer" (merged by FQN), "rng" (reseeded), "loader" (its `reshard_state_dict`, or refused)."""

    name: str
    policy: str
    get: Callable[[], Any]
    set: Callable[[Any], None]
    target: Any = None


# --- geometry ---------------------------------------------------------------------------------------------------------------


def box_of(name: str, tensor: Tensor) -> Box:
    """The box that this rank holds of a tensor. Raises Unstorable for placements that are no box."""
    if not isinstance(tensor, DTensor):
        return Box.whole(tensor.shape)
    start, extent = [0] * tensor.ndim, list(tensor.shape)
    coordinate = tensor.device_mesh.get_coordinate()
    if coordinate is None:
        msg = f"{name}: this rank is not in the tensor's device mesh"
        raise Unstorable(msg)
    for dim in range(tensor.ndim):
        for mesh_dim in _cut_order(name, tensor, dim):
            offset, extent[dim] = chunk(extent[dim], tensor.device_mesh.size(mesh_dim), coordinate[mesh_dim])
            start[dim] += offset
    local = tuple(tensor.to_local().shape)
    if tuple(extent) != local:
        msg = f"{name}: placements {tensor.placements} of shape {tuple(tensor.shape)} should leave {tuple(extent)} here, but the shard is {local}"
        raise Unstorable(msg, remedy="report this layout; a custom sharding needs an adapter that names its boxes")
    return Box(tuple(start), tuple(extent))


def _cut_order(name: str, tensor: DTensor, dim: int) -> list[int]:
    """Mesh dimensions that cut `dim`, in the order of cutting. A plain Shard cuts before the mesh dimensions to its right; a _StridedShard
    cuts after as many of them as its split factor multiplies."""
    order: list[int] = []
    mesh = tensor.device_mesh
    for mesh_dim in reversed(range(mesh.ndim)):
        placement = tensor.placements[mesh_dim]
        if placement.is_partial():
            msg = f"{name}: placement {placement} is a partial sum, not state"
            raise Unstorable(msg, remedy="reduce it before attach")
        # _StridedShard is a Shard subclass in some versions of torch and not in others; both have `dim`.
        if placement.is_replicate() or getattr(placement, "dim", None) not in {dim, dim - tensor.ndim}:
            continue
        factor, position = getattr(placement, "split_factor", 1), 0
        while factor > 1 and position < len(order):
            factor //= mesh.size(order[position])
            position += 1
        order.insert(position, mesh_dim)
    return order


def coordinates(tensors: Iterable[Tensor], rank: int) -> dict[str, int]:
    """This rank's place: its rank, and its coordinates in the meshes of the model's DTensors, with their sizes."""
    found = {"rank": rank}
    for mesh in {id(t.device_mesh): t.device_mesh for t in tensors if isinstance(t, DTensor)}.values():
        names = mesh.mesh_dim_names or tuple(f"dim{i}" for i in range(mesh.ndim))
        for i, (name, at) in enumerate(zip(names, mesh.get_coordinate() or (), strict=False)):
            found |= {name: at, f"{name}_size": mesh.size(i)}
    return found


def local_of(tensor: Tensor) -> Tensor:
    """The bytes on this rank, detached; shares storage and version counter with the tensor."""
    if isinstance(tensor, DTensor):
        with torch.no_grad():  # with gradients, it would be a view that autograd made, at ten times the cost
            tensor = tensor.to_local()
    return tensor.detach()


class Cut:
    """A view of a live tensor, the same object as long as the tensor stays where it is: a session tells by identity that nothing changed.

    `source`: the live tensor, or None while it does not exist. `cut`: the view of it, detached.
    """

    def __init__(self, source: Callable[[], Tensor | None], cut: Callable[[Tensor], Tensor]) -> None:
        self._source, self._cut = source, cut
        self._key: tuple[int, int] | None = None
        self._held: Tensor | None = None

    def __call__(self) -> Tensor | None:
        """The view, or None."""
        live = self._source()
        key = None if live is None else (id(live), live.data_ptr())
        if key != self._key:
            self._key, self._held = key, None if live is None else self._cut(live.detach())
        return self._held


def stored_view(tensor: Tensor, view: str) -> Tensor:
    """The local tensor as it is stored: itself, or its bytes with one more dimension."""
    return tensor.unsqueeze(-1).view(torch.uint8) if view else tensor


def _stored(name: str, tensor: Tensor, box: Box) -> tuple[str, Shape, Box, str]:
    """(dtype, shape, box, view) as stored."""
    if tensor.layout != torch.strided or tensor.is_quantized:
        msg = f"{name}: {tensor.layout} tensors are not stored"
        raise Unstorable(msg, remedy="keep it dense, or leave it out")
    if tensor.is_meta:
        msg = f"{name}: it is on the meta device and has no bytes"
        raise Unstorable(msg, remedy="materialise the model (model.to_empty, then initialise) before attach")
    shape = tuple(tensor.shape)
    dtype = DTYPES.get(tensor.dtype)
    if dtype is not None:
        return dtype, shape, box, ""
    item = tensor.element_size()
    return "U8", (*shape, item), Box((*box.start, 0), (*box.extent, item)), str(tensor.dtype).removeprefix("torch.")


# --- the model --------------------------------------------------------------------------------------------------------------


def _modules(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """(canonical prefix, module), wrappers removed, every path (also second paths to one module: tied weights)."""
    yield prefix, module
    inside_ddp = isinstance(module, nn.parallel.DistributedDataParallel | nn.DataParallel)
    for name, child in module._modules.items():  # noqa: SLF001  named_modules drops second paths and cannot skip wrappers
        if child is not None:
            skip = name in WRAPPERS or (inside_ddp and name == "module")
            yield from _modules(child, prefix if skip else f"{prefix}{name}.")


@dataclass
class ModelState:
    """Leaves, aliases and extra state of one or several modules."""

    leaves: list[Leaf] = field(default_factory=list)
    aliases: dict[str, str] = field(default_factory=dict)
    objects: list[Obj] = field(default_factory=list)
    fqns: dict[int, str] = field(default_factory=dict)
    """id(parameter) -> canonical FQN"""
    own: set[int] = field(default_factory=set)
    """id(parameter) of those that each rank has for itself"""


def model_state(models: Iterable[tuple[str, nn.Module]], local: Sequence[str]) -> ModelState:
    """The state of the models, by prefix ("" or "<name>."). `local`: patterns of names that each rank has for itself."""
    out = ModelState()
    first: dict[int, str] = {}
    for prefix, model in models:
        for path, module in _modules(model):
            for attr, param in module._parameters.items():  # noqa: SLF001  as above
                if param is not None:
                    _add(out, first, f"{prefix}{path}{attr}", module._parameters, attr, buffer=False, local=local)  # noqa: SLF001
            for attr, buffer in module._buffers.items():  # noqa: SLF001
                if buffer is not None and attr not in module._non_persistent_buffers_set:  # noqa: SLF001
                    _add(out, first, f"{prefix}{path}{attr}", module._buffers, attr, buffer=True, local=local)  # noqa: SLF001
            if type(module).get_extra_state is not nn.Module.get_extra_state:
                name = f"model.{prefix}{path}_extra_state"
                out.objects.append(Obj(name, "same", module.get_extra_state, module.set_extra_state, module))
    return out


def _add(
    out: ModelState, first: dict[int, str], fqn: str, where: Mapping[str, Any], attr: str, *, buffer: bool, local: Sequence[str]
) -> None:
    tensor: Tensor = where[attr]
    name = f"model.{fqn}"
    if any(leaf.name == name for leaf in out.leaves[-1:]):
        return
    known = first.setdefault(id(tensor), name)
    if known != name:
        out.aliases[name] = known
    else:
        out.fqns[id(tensor)] = fqn
    plain = not isinstance(tensor, DTensor)
    own = any(fnmatch.fnmatchcase(name, p) or fnmatch.fnmatchcase(fqn, p) for p in local)
    if own:
        out.own.add(id(tensor))
    dtype, shape, box, view = _stored(name, tensor, box_of(name, tensor))
    # Buffers are replaced by assignment; parameters are not, and FSDP shows the gathered one in their place while a module is unsharded.
    resolve: Callable[[], Tensor | None] = (lambda: where.get(attr)) if buffer else (lambda: tensor)
    out.leaves.append(Leaf(name, dtype, shape, box, view, resolve, eager=buffer, local=own or (buffer and plain), assumed=plain))


# --- optimizers -------------------------------------------------------------------------------------------------------------


def predict(optimizer: Optimizer) -> dict[int, dict[str, tuple[torch.dtype, Shape]]] | None:
    """id(parameter) -> slot -> (dtype, local shape) of the state that a first step will make; None if this optimizer cannot be asked."""
    plain = vars(optimizer)
    if not {"state", "param_groups"} <= plain.keys() or any(isinstance(v, Optimizer) for v in plain.values()):
        return None  # a wrapper: a twin of it would share, and step, the optimizer inside
    try:
        twin = copy.copy(optimizer)
        twin.state = defaultdict(dict)
        pairs: list[tuple[Tensor, Tensor]] = []
        groups = []
        for group in optimizer.param_groups:
            metas = []
            for p in group["params"]:
                meta = torch.empty_like(local_of(p), device="meta").requires_grad_()
                if p.requires_grad:
                    meta.grad = torch.empty_like(meta)
                    pairs.append((p, meta))
                metas.append(meta)
            hyper = {k: (float(v) if isinstance(v, Tensor) and v.numel() == 1 else v) for k, v in group.items()}
            fixed: dict[str, Any] = dict.fromkeys({"foreach", "fused", "capturable"} & set(group), False)
            groups.append({**hyper, **fixed, "params": metas})
        twin.param_groups = groups
        with torch.no_grad():
            inspect.unwrap(type(optimizer).step)(twin)  # bare: no hooks, no profiler
    except Exception:  # noqa: BLE001  any optimizer may object to being asked; then its state is learned from its first step
        return None
    found: dict[int, dict[str, tuple[torch.dtype, Shape]]] = {}
    for p, meta in pairs:
        slots = {k: (v.dtype, tuple(v.shape)) for k, v in twin.state.get(meta, {}).items() if isinstance(v, Tensor)}
        if any(shape not in {(), tuple(meta.shape)} for _, shape in slots.values()):
            return None  # factored state: how it is shared is known once it exists
        found[id(p)] = slots
    return found


@dataclass
class OptimizerState:
    """Leaves and objects of one optimizer. `complete`: the leaves are known (by their existence or by prediction)."""

    leaves: list[Leaf] = field(default_factory=list)
    objects: list[Obj] = field(default_factory=list)
    complete: bool = True


def optimizer_state(prefix: str, optimizer: Optimizer, fqns: Mapping[int, str], own: Collection[int] = ()) -> OptimizerState:
    """The state of one optimizer under `optim.<prefix>`; `own`: ids of parameters that each rank has for itself. Raises Unstorable for parameters that belong to no model."""
    params = [p for g in optimizer.param_groups for p in g["params"]]
    for i, p in enumerate(params):
        if id(p) not in fqns:
            msg = f"optim.{prefix}: parameter {i} of shape {tuple(p.shape)} is in no model that was given to attach"
            raise Unstorable(msg, remedy="attach every module whose parameters the optimizer updates")
    out = OptimizerState()
    predicted = predict(optimizer)
    expected = {} if predicted is None else predicted
    for p in params:
        fqn = fqns[id(p)]
        live = {k: v for k, v in optimizer.state.get(p, {}).items() if isinstance(v, Tensor)}
        slots: dict[str, tuple[torch.dtype, bool]] = {
            k: (dtype, shape == tuple(local_of(p).shape) and bool(shape)) for k, (dtype, shape) in expected.get(id(p), {}).items()
        }
        slots |= {k: (v.dtype, v.shape == p.shape and v.ndim > 0) for k, v in live.items()}
        for slot, (dtype, like_param) in slots.items():  # in the order in which the optimizer makes them
            leaf = _state_leaf(f"optim.{prefix}state.{fqn}.{slot}", optimizer, p, slot, dtype, like_param, live.get(slot))
            leaf.local = id(p) in own
            out.leaves.append(leaf)
        out.complete &= predicted is not None or bool(optimizer.state.get(p)) or not p.requires_grad
    names = {id(p): fqns[id(p)] for p in params}
    known = {leaf.name for leaf in out.leaves}
    out.objects.append(
        Obj(
            f"optim.{prefix}param_groups",
            "optimizer",
            lambda: _groups(optimizer, names),
            lambda groups: _set_groups(optimizer, names, groups),
        )
    )
    out.objects.append(
        Obj(
            f"optim.{prefix}scalars",
            "optimizer",
            lambda: _scalars(f"optim.{prefix}state.", optimizer, names, known),
            lambda values: _set_scalars(optimizer, names, values),
        )
    )
    return out


def saved_leaf(name: str, optimizer: Optimizer, p: Tensor, slot: str, dtype: str, shape: Shape, view: str) -> Leaf | None:
    """The leaf of a state slot that only a snapshot knows of: the optimizer could not be asked for its state, and has not stepped yet.

    None where it cannot be told how this rank shares it: a shape that is neither the parameter's nor () of a sharded parameter.
    """
    like_param = shape == tuple(p.shape) and bool(shape)
    if view or not (like_param or shape == () or not isinstance(p, DTensor)):
        return None
    if like_param or shape == ():
        return _state_leaf(name, optimizer, p, slot, TORCH_DTYPES[dtype], like_param, None)

    def like() -> Tensor:
        made = torch.zeros(shape, dtype=TORCH_DTYPES[dtype], device=p.device)
        optimizer.state[p][slot] = made
        return made

    return Leaf(name, dtype, shape, Box.whole(shape), "", lambda: optimizer.state.get(p, {}).get(slot), assumed=True, like=like)


def _state_leaf(
    name: str, optimizer: Optimizer, p: Tensor, slot: str, dtype: torch.dtype, like_param: bool, live: Tensor | None  # noqa: FBT001
) -> Leaf:
    def resolve() -> Tensor | None:
        return optimizer.state[p].get(slot) if p in optimizer.state else None

    def like() -> Tensor:
        if like_param:
            made: Tensor = torch.zeros_like(p, dtype=dtype, requires_grad=False)
        else:
            group = next(g for g in optimizer.param_groups if any(q is p for q in g["params"]))
            on_device = bool(group.get("fused") or group.get("capturable"))
            made = torch.zeros((), dtype=dtype, device=p.device if on_device else "cpu")
        optimizer.state[p][slot] = made
        return made

    box = box_of(name, p if like_param else (live if live is not None else torch.zeros(())))
    sample = p if like_param else (live if live is not None else torch.zeros((), dtype=dtype))
    if like_param and sample.dtype != dtype:
        stored = DTYPES.get(dtype)
        if stored is None:
            msg = f"{name}: optimizer state of {dtype} is not supported"
            raise Unstorable(msg)
        return Leaf(name, stored, tuple(p.shape), box, "", resolve, assumed=not isinstance(p, DTensor), like=like)
    kind, shape, box, view = _stored(name, sample, box)
    return Leaf(name, kind, shape, box, view, resolve, assumed=not isinstance(sample, DTensor), like=like)


def merged(objects: Sequence[Obj]) -> list[Obj]:
    """Objects of optimizers that share a namespace, as one each: their groups one after the other, their scalars together."""
    by_name: dict[str, list[Obj]] = {}
    for obj in objects:
        by_name.setdefault(obj.name, []).append(obj)
    return [several[0] if len(several) == 1 else _together(name, several) for name, several in by_name.items()]


def _together(name: str, several: Sequence[Obj]) -> Obj:
    def get() -> Any:
        values = [o.get() for o in several]
        return {k: v for d in values for k, v in d.items()} if isinstance(values[0], dict) else [g for groups in values for g in groups]

    def put(value: Any) -> None:
        for o in several:
            o.set(value)

    return Obj(name, several[0].policy, get, put)


def _set_groups(optimizer: Optimizer, names: Mapping[int, str], groups: list[dict[str, Any]]) -> None:
    """Give every group the hyper-parameters that its parameters were saved with. Raises Unstorable if they were saved with different ones."""
    saved: dict[str, dict[str, Any]] = {}
    for g in groups:
        shared = {k: v for k, v in g.items() if k != "params"}
        saved |= dict.fromkeys(g["params"], shared)
    for i, group in enumerate(optimizer.param_groups):
        found = [saved[names[id(p)]] for p in group["params"] if names[id(p)] in saved]
        if not found:
            continue
        if any(f is not found[0] and repr(f) != repr(found[0]) for f in found[1:]):
            msg = f"param group {i} mixes parameters that were saved in groups with different hyper-parameters"
            raise Unstorable(msg, remedy="build the optimizer with the groups that it was saved with")
        for key, value in found[0].items():
            if isinstance(group.get(key), Tensor) and isinstance(value, Tensor):
                group[key].copy_(value)
            else:
                group[key] = value


def _groups(optimizer: Optimizer, names: Mapping[int, str]) -> list[dict[str, Any]]:
    """The param groups with FQNs for parameters. Raises Unstorable if there are parameters that were not there at attach."""
    if any(id(p) not in names for g in optimizer.param_groups for p in g["params"]):
        msg = "optim: a param group with new parameters was added after attach"
        raise Unstorable(msg, remedy="attach again after changing the optimizer")
    return [{**{k: v for k, v in g.items() if k != "params"}, "params": [names[id(p)] for p in g["params"]]} for g in optimizer.param_groups]


def _scalars(prefix: str, optimizer: Optimizer, names: Mapping[int, str], known: Collection[str]) -> dict[str, dict[str, Any]]:
    """State that is no tensor, by FQN, and which parameters have state at all.

    Raises Unstorable for a tensor that the capture plan does not know: state that appeared later (a parameter thawed, momentum switched on)
    would otherwise be left out in silence.
    """
    found = {}
    for p, state in optimizer.state.items():
        fqn = names.get(id(p))
        if fqn is None:
            continue
        for slot, value in state.items():
            if isinstance(value, Tensor) and f"{prefix}{fqn}.{slot}" not in known:
                msg = f"{prefix}{fqn}.{slot} appeared after attach"
                raise Unstorable(msg, remedy="attach again when the optimizer's state has grown (a thawed parameter, momentum switched on)")
        found[fqn] = {k: v for k, v in state.items() if not isinstance(v, Tensor)}
    return found


def _set_scalars(optimizer: Optimizer, names: Mapping[int, str], values: Mapping[str, Mapping[str, Any]]) -> None:
    params = {names[id(p)]: p for g in optimizer.param_groups for p in g["params"]}
    for fqn, p in params.items():
        if values.get(fqn):
            optimizer.state[p].update(values[fqn])
        elif fqn not in values:
            optimizer.state.pop(p, None)


# --- objects ----------------------------------------------------------------------------------------------------------------


def rng_objects() -> list[Obj]:
    """The random states that a training step draws from: python, numpy, torch on the CPU and on this process's CUDA device."""
    objects = [
        Obj("rng.python", "rng", _get_python, _set_python),
        Obj("rng.numpy", "rng", lambda: np.random.get_state(legacy=False), np.random.set_state),  # noqa: NPY002  the global state is what users draw from
        Obj("rng.torch", "rng", torch.get_rng_state, torch.set_rng_state),
    ]
    if torch.cuda.is_available():
        objects.append(Obj("rng.cuda", "rng", torch.cuda.get_rng_state, torch.cuda.set_rng_state))
    return objects


def _get_python() -> Any:
    """random.getstate() with its 625 words as an array: a fixed place in the image instead of 6 kB of text."""
    version, words, gauss = random.getstate()
    return version, np.asarray(words, dtype=np.uint32), gauss


def _set_python(state: Any) -> None:
    version, words, gauss = state
    random.setstate((version, tuple(int(w) for w in words), gauss))


def reseed(seed: int) -> None:
    """Deterministic new random states, for a rank that has no predecessor on a changed mesh."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002  the global state is what users draw from
    torch.manual_seed(seed)


def extra_object(name: str, value: Any) -> Obj:
    """How an entry of `extras` is read and written back. Raises Unstorable, with its path, for what has no state that can be had."""
    path = f"extras.{name}"
    if isinstance(value, torch.Generator):
        return Obj(path, "rng", value.get_state, lambda s: _ignore(value.set_state(s)), value)
    if isinstance(value, random.Random):
        return Obj(path, "rng", value.getstate, value.setstate, value)
    if isinstance(value, np.random.Generator):
        bits = value.bit_generator
        return Obj(path, "rng", lambda: bits.state, lambda s: setattr(bits, "state", s), value)
    if hasattr(value, "state_dict") and hasattr(value, "load_state_dict"):
        loader = hasattr(value, "__iter__") and not isinstance(value, nn.Module)
        return Obj(path, "loader" if loader else "same", value.state_dict, value.load_state_dict, value)
    if isinstance(value, dict):
        return Obj(path, "same", lambda: value, lambda v: _refill(value, v), value)
    if isinstance(value, list):
        return Obj(path, "same", lambda: value, lambda v: value.__setitem__(slice(None), v), value)
    kind = type(value)
    msg = f"{path}: {kind.__module__}.{kind.__qualname__} has no state_dict()/load_state_dict(), and is neither dict, list nor generator"
    raise Unstorable(msg, remedy="wrap it in an object with state_dict and load_state_dict, or keep it in a dict")


def _ignore(_result: object) -> None:
    """A setter that returns something, as one that does not."""


def _refill(target: dict[Any, Any], value: Mapping[Any, Any]) -> None:
    target.clear()
    target.update(value)


# --- all of it --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class TrainState:
    """Everything of one rank that is captured. `complete`: all leaves are known; not so for an optimizer that cannot be asked for its state
    before its first step. `params`: "optim.<prefix>state.<fqn>." -> (optimizer, parameter)."""

    leaves: list[Leaf] = field(default_factory=list)
    objects: list[Obj] = field(default_factory=list)
    aliases: dict[str, str] = field(default_factory=dict)
    coords: dict[str, int] = field(default_factory=dict)
    complete: bool = True
    params: dict[str, tuple[Optimizer, Tensor]] = field(default_factory=dict)


def look(
    models: Iterable[tuple[str, nn.Module]],
    optimizers: Sequence[tuple[str, Optimizer]],
    extras: Mapping[str, Any],
    *,
    local: Sequence[str],
    rank: int,
) -> TrainState:
    """Find all leaves and objects of this rank. Raises Unstorable, by path."""
    model = model_state(models, local)
    optims = [optimizer_state(prefix, o, model.fqns, model.own) for prefix, o in optimizers]
    leaves = model.leaves + [leaf for o in optims for leaf in o.leaves]
    objects = model.objects + merged([obj for o in optims for obj in o.objects])
    objects += [extra_object(name, value) for name, value in extras.items()] + rng_objects()
    names = [leaf.name for leaf in leaves] + [obj.name for obj in objects]
    doubled = sorted(n for n, count in Counter(names).items() if count > 1)
    if doubled:
        msg = f"{doubled[0]}: two parts of the state have this name"
        raise Unstorable(msg, remedy="give several models or optimizers as a dict, so that their names differ")
    params = {f"optim.{prefix}state.{model.fqns[id(p)]}.": (o, p) for prefix, o in optimizers for g in o.param_groups for p in g["params"]}
    coords = coordinates((t for leaf in leaves if (t := leaf.resolve()) is not None), rank)
    # What a rank holds of the model is a part of where it is: pipeline stages of plain tensors differ in nothing else.
    held = repr(sorted((leaf.name, leaf.box) for leaf in model.leaves)).encode()
    coords["holds"] = xxhash.xxh3_64_intdigest(held) >> 1
    return TrainState(leaves, objects, model.aliases, coords, all(o.complete for o in optims), params)
