"""Files that `torch.save` wrote: a state dict, or several in one dict; a model's and an optimizer's file in one folder; DTensors in a file per rank.

What is recognised, at the top or one level below
- a model: {fqn: tensor}, alone or under "model", "state_dict", ...; wrappers in names (`module.`, `_orig_mod.`, ...) are taken out;
- an optimizer: {"state", "param_groups"}, its parameters named (FSDP's FULL, `get_optimizer_state_dict`) or numbered (`optimizer.state_dict()`);
- `model_world_size_<W>_rank_<r>.pt` (verl, SkyRL), its `optim_...` and `extra_state_...`: boxes follow from each DTensor's placements and its rank's place in
  the mesh, `chunk(chunk(dim, tp), dp)`, and are checked against the shard's shape.
All else becomes `extras.<name>`.

Numbered parameters get their names by shape, or by the hint `params` (`torch_state`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import numpy as np

from ckptd.core.archive import Tensor as Stored
from ckptd.core.boxes import Box, Shape, chunk
from ckptd.core.cast import FLOATS, NUMPY
from ckptd.core.emit import OutFile, torch_file
from ckptd.core.image import ITEM_BYTES
from ckptd.core.logical import GROUPS, MODEL, STATE, Checkpoint, Row
from ckptd.core.pickles import Made
from ckptd.errors import BadArgument, BadForeign
from ckptd.formats import Place, Plan, ReadOptions, WriteOptions
from ckptd.integrations.native import AsTensor
from ckptd.integrations.torch_state import (
    BUFFER,
    STEP_KEYS,
    Outgoing,
    Refused,
    add_number,
    array_of,
    cleaned,
    is_dtensor,
    keep_ranks,
    listed,
    name_buffers,
    name_numbers,
    named_by_shape,
    number_of,
    numbered,
    plain,
    read_state,
    step_of,
    truth,
)

__all__ = ["TORCH", "Outgoing", "Reader", "Refused", "array_of", "dtensor", "named_by_shape", "numbered", "placed", "plain"]

SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")
MODEL_KEYS = ("model", "state_dict", "model_state_dict", "module", "net", "network", "params", "weights", "policy", "actor")
OPTIM_KEYS = ("optim", "optimizer", "optimizer_state_dict", "optim_state_dict", "optimizers", "optimizer_states", "opt")
INLINE_BYTES = 1 << 20
"""A tensor among the extras of up to this size is part of its object (random states, counters); a larger one (an EMA) stays a tensor."""
RANKED = re.compile(r"(?:(.*/)?)(model|optim|extra_state)_world_size_(\d+)_rank_(\d+)\.pt")


class TorchFile:
    """The format "torch"."""

    name = "torch"
    title = "torch.save: a file with a state dict, of model and optimizer or of one of them"

    def probe(self, place: Place) -> bool:
        """See Format."""
        return any(_is_zip(place, n) for n in _names(place)) or any(RANKED.fullmatch(n) for n in place.files)

    def read(self, place: Place, options: ReadOptions) -> Checkpoint:
        """See Format. Hint `params`: names of the optimizer's parameters, in its order (a list, or text with commas)."""
        out = Checkpoint(self.name)
        ranked = {(m[2], int(m[4])): n for n in place.files if (m := RANKED.fullmatch(n))}
        reader = Reader(out, place, listed(options.hints.get("params")))
        if ranked and not place.only:
            _check_ranks(ranked, place)
            for rank in sorted({r for _, r in ranked}):
                reader.rank(rank, {kind: ranked[kind, rank] for kind in ("model", "optim", "extra_state") if (kind, rank) in ranked})
        else:
            reader.files([n for n in _names(place) if _is_zip(place, n)])
        reader.finish()
        return out

    def write(self, checkpoint: Checkpoint, options: WriteOptions) -> Plan:
        """See Format. `config`: `index` (the optimizer's parameters by number), `file` (the file's name)."""
        unknown = sorted(set(options.config) - {"index", "file"})
        if unknown:
            msg = f"--config {unknown[0]}: torch files have no such setting"
            raise BadArgument(msg, remedy="there are index and file")
        out = Outgoing(checkpoint, options, "a torch file")
        tree: dict[str, Any] = {"model": out.model()}
        state, groups = out.optimizer()
        if state or groups:
            tree["optim"] = numbered(state, groups) if truth(options.config.get("index")) else {"state": state, "param_groups": groups}
        objects = out.objects()
        if "step" in objects:
            tree["step"] = objects.pop("step")
        if objects:
            tree["extras"] = objects
        name = str(options.config.get("file", "checkpoint.pt"))
        return Plan([OutFile(name, torch_file(tree))], single=True, dropped=out.dropped, notes=out.notes)


TORCH = TorchFile()


def _names(place: Place) -> list[str]:
    """Files that may be torch's: one that is given may have any name."""
    return [place.only] if place.only else [n for n in place.files if "/" not in n and n.endswith(SUFFIXES)]


def _is_zip(place: Place, name: str) -> bool:
    head = place.read(name, 0, min(256, place.files[name]))
    return head.startswith(b"PK\x03\x04") and b"/data.pkl" in head


def _check_ranks(ranked: Mapping[tuple[str, int], str], place: Place) -> None:
    worlds = {int(m[3]) for n in place.files if (m := RANKED.fullmatch(n))}
    if len(worlds) != 1 or len({n.rpartition("/")[0] for n in ranked.values()}) != 1:
        msg = f"{place.label}: files of world sizes {sorted(worlds)} lie together"
        raise BadForeign(msg, remedy="give the folder of one of them")
    world = worlds.pop()
    for kind in {k for k, _ in ranked}:
        missing = sorted(set(range(world)) - {r for k, r in ranked if k == kind})
        if missing:
            msg = f"{place.label}: {kind}_world_size_{world}_rank_{missing[0]}.pt is missing" + (f", and {len(missing) - 1} more" if missing[1:] else "")
            raise BadForeign(msg)


# --- DTensors ---------------------------------------------------------------------------------------------------------------


def dtensor(value: Made, name: str) -> tuple[Stored, Shape, Box]:
    """Local tensor, global shape and box of a pickled DTensor. Raises BadForeign."""
    local, spec, shape = value.get("_local_tensor"), value.get("_spec"), value.args[2] if len(value.args) > 2 else None
    mesh = spec.get("mesh") if type(spec) is Made else None
    placements = spec.get("placements") if type(spec) is Made else None
    if not isinstance(local, Stored) or type(mesh) is not Made or type(placements) is not tuple or type(shape) is not tuple or not all(type(n) is int and n >= 0 for n in shape):
        msg = f"{name}: this DTensor is not as torch writes it"
        raise BadForeign(msg)
    sizes, at = _mesh_of(mesh, name)
    box = placed(name, shape, [_cut_of(p, name) for p in placements], sizes, at)
    if box.extent != tuple(local.shape):
        msg = f"{name}: its placements leave {list(box.extent)} here, but the shard is {list(local.shape)}"
        raise BadForeign(msg)
    return local, shape, box


def _mesh_of(mesh: Made, name: str) -> tuple[list[int], list[int]]:
    """Sizes of the mesh's dimensions, and this rank's coordinate."""
    layout, at = mesh.get("_layout"), mesh.get("_coordinate_on_dim")
    axes = layout.get("axes") if type(layout) is Made else None
    if type(axes) is tuple and all(type(a) is Made for a in axes):
        sizes = [prod(_numbers_in(a.get("shape"))) for a in axes]
    elif isinstance(mesh.get("mesh"), Stored):
        sizes = list(mesh.get("mesh").shape)
    else:
        sizes = _numbers_in(layout.get("shape")) if type(layout) is Made else []
    place = _numbers_in(at)
    if not sizes or len(place) != len(sizes) or not all(0 <= a < n for a, n in zip(place, sizes, strict=True)):
        msg = f"{name}: its device mesh does not say its sizes and this rank's place"
        raise BadForeign(msg)
    return sizes, place


def _numbers_in(value: Any) -> list[int]:
    """The ints of nested tuples; of anything else, none."""
    if type(value) is int:
        return [value]
    return [n for v in value for n in _numbers_in(v)] if type(value) in {tuple, list} else []


def _cut_of(placement: Any, name: str) -> tuple[int, int] | None:
    """(dimension, split factor) of a shard; None of a replica."""
    kind = placement.what.name if type(placement) is Made else ""
    if kind == "Replicate":
        return None
    dim, factor = (placement.get("dim", 0), placement.get("split_factor", 1)) if type(placement) is Made else (0, 1)
    if kind not in {"Shard", "_StridedShard"} or type(dim) is not int or type(factor) is not int:
        msg = f"{name}: placement {kind or placement!r} is not read"
        raise BadForeign(msg)
    return dim, factor


def placed(name: str, shape: Shape, cuts: Sequence[tuple[int, int] | None], sizes: Sequence[int], at: Sequence[int]) -> Box:
    """The box that placements leave at a place of the mesh: dimensions are cut in the order in which the parallelisms cut them (see `ckptd.state`)."""
    start, extent = [0] * len(shape), list(shape)
    if len(cuts) != len(sizes):
        msg = f"{name}: {len(cuts)} placements on a mesh of {len(sizes)} dimensions"
        raise BadForeign(msg)
    for dim in range(len(shape)):
        order: list[int] = []
        for mesh_dim in reversed(range(len(sizes))):
            cut = cuts[mesh_dim]
            if cut is None or cut[0] not in {dim, dim - len(shape)}:
                continue
            factor, position = cut[1], 0
            while factor > 1 and position < len(order):
                factor //= sizes[order[position]]
                position += 1
            order.insert(position, mesh_dim)
        for mesh_dim in order:
            offset, extent[dim] = chunk(extent[dim], sizes[mesh_dim], at[mesh_dim])
            start[dim] += offset
    return Box(tuple(start), tuple(extent))


# --- reading ----------------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Reader:
    """A checkpoint being put together from the trees of one or several files."""

    out: Checkpoint
    place: Place
    hint: Sequence[str]
    groups: list[dict[str, Any]] = field(default_factory=list)
    storages: dict[tuple[Any, ...], str] = field(default_factory=dict)
    names: dict[int, str] | None = None
    steps: set[str] = field(default_factory=set)
    lost: list[str] = field(default_factory=list)
    file: int = 0
    file_name: str = ""

    def files(self, names: Sequence[str]) -> None:
        """One file, or the parts of one checkpoint in several."""
        trees = [(n, self.tree(n)) for n in names]
        models = [n for n, t in trees if _is_model(t)]
        if len(models) > 1:
            msg = f"{self.place.label}: {', '.join(models[:4])} are several models"
            raise BadForeign(msg, remedy="give one of the files, or the folder of each")
        for name, tree in sorted(trees, key=lambda t: _is_optimizer(t[1])):  # the model first: it names the optimizer's parameters
            self.use(name)
            if _is_model(tree):
                self.model(tree)
            elif _is_optimizer(tree):
                self.optimizer(tree)
            elif len(trees) == 1 or (isinstance(tree, dict) and any(k in tree for k in (*MODEL_KEYS, *OPTIM_KEYS))):
                self.mixed(tree)
            else:
                self.extra(name.rpartition(".")[0], tree)  # noqa: S610  no SQL is near

    def rank(self, rank: int, names: Mapping[str, str]) -> None:
        """A rank's files."""
        for kind, name in names.items():
            tree = self.tree(name)
            self.use(name)
            if kind == "extra_state":
                for key, value in tree.items() if isinstance(tree, dict) else [("state", tree)]:
                    self.out.per_rank.setdefault(rank, {})[f"extras.{key}"] = self.value(f"extras.{key}", value)
            elif kind == "optim" and _is_optimizer(tree):
                self.optimizer(tree)
            elif kind == "model" and _is_model(tree):
                self.model(tree)
            else:
                self.mixed(tree)

    def tree(self, name: str) -> Any:
        """The value of a file."""
        return read_state(self.place, name)

    def use(self, name: str) -> None:
        """What follows is of this file."""
        self.file, self.file_name = self.out.file(name, self.place.files[name]), name

    def mixed(self, tree: Mapping[str, Any]) -> None:
        """A dict that holds models, optimizers and others by key."""
        if not isinstance(tree, dict):
            msg = f"{self.file_name}: a {type(tree).__name__}, and no state dict"
            raise BadForeign(msg)
        model = next((k for k in MODEL_KEYS if isinstance(tree.get(k), dict) and _is_model(tree[k])), None)
        if model is None:
            model = next((k for k, v in tree.items() if isinstance(v, dict) and _is_model(v) and "ema" not in str(k).lower()), None)
        if model is not None:
            self.model(tree[model])
        optimizer = next((k for k in OPTIM_KEYS if _is_optimizer(_single(tree.get(k)))), None)
        if optimizer is not None:
            self.optimizer(_single(tree[optimizer]))
        if model is None and optimizer is None:
            msg = f"{self.file_name}: neither a model's nor an optimizer's state is in it, but {', '.join(map(str, [*tree][:6]))}"
            raise BadForeign(msg)
        for key, value in tree.items():
            if key in {model, optimizer}:
                continue
            if key == "extras" and isinstance(value, dict):
                for name, item in value.items():
                    if name == "per_rank":
                        keep_ranks(self.out, self.value(name, item))
                        continue
                    self.extra(str(name), item)  # noqa: S610  no SQL is near
            else:
                self.extra(str(key), value)  # noqa: S610  no SQL is near

    def extra(self, name: str, value: Any) -> None:
        """An entry that is neither a model nor an optimizer."""
        path = f"extras.{name}"
        try:
            made = self.value(path, value)
        except Refused as e:
            self.lost.append(str(e))
            return
        number = number_of(made)
        if name in STEP_KEYS and "step" not in self.out.objects and type(number) is int:
            self.out.objects["step"] = number
            if name == "step":
                return
        known = self.out.objects.get(path)
        if known is None or not isinstance(known, dict) or not isinstance(made, dict):
            self.out.objects[path] = made
        else:
            known.update(made)

    def value(self, path: str, value: Any) -> Any:
        """An object's value. Raises Refused."""
        return plain(value, path, self.array, self.lost)

    def array(self, path: str, leaf: Any) -> Any:
        """A tensor among objects: an array if it is small, else a tensor of its own."""
        if is_dtensor(leaf) or prod(leaf.shape) * ITEM_BYTES.get(leaf.dtype, 1) > INLINE_BYTES or leaf.dtype not in NUMPY or leaf.dtype.startswith("F8"):
            self.tensor(path, leaf)
            msg = f"{path} (kept as a tensor of its own)"
            raise Refused(msg)
        raw = self.place.read(self.file_name, leaf.begin, _reach(leaf) * ITEM_BYTES[leaf.dtype])
        flat = array_of(raw, leaf.dtype, (_reach(leaf),))
        strides = tuple(s * flat.itemsize for s in leaf.stride)
        return np.lib.stride_tricks.as_strided(flat, tuple(leaf.shape), strides).copy().view(AsTensor)

    def tensor(self, name: str, leaf: Any) -> None:
        """A tensor of the state: all of it, or a rank's part."""
        if is_dtensor(leaf):
            local, shape, box = dtensor(leaf, name)
        else:
            local, shape = leaf, tuple(leaf.shape)
            box = Box.whole(shape)
        self.out.add(name, local.dtype, shape, [Row(box, self.file, local.begin, tuple(local.stride))])

    def model(self, tree: Mapping[str, Any]) -> None:
        """A model's state dict."""
        tensors = {str(k): v for k, v in tree.items() if _is_tensor(v)}
        fqns = cleaned([*tensors])
        for raw, leaf in tensors.items():
            name = f"{MODEL}{fqns[raw]}"
            local = dtensor(leaf, name)[0] if is_dtensor(leaf) else leaf
            place = (self.file, local.begin, local.dtype, tuple(local.shape), tuple(local.stride))
            first = self.storages.setdefault(place, name) if prod(local.shape) else name
            if first != name or name in self.out.aliases:
                self.out.aliases[name] = first
            else:
                self.tensor(name, leaf)
        for key, value in tree.items():
            if not _is_tensor(value):
                self.extra(f"model.{key}", value)  # noqa: S610  no SQL is near

    def optimizer(self, tree: Mapping[str, Any]) -> None:
        """An optimizer's state dict, by name or by number."""
        groups = [dict(g) for g in tree.get("param_groups") or ()]
        state = tree.get("state") or {}
        ids = [p for g in groups for p in g.get("params") or ()] or [*state]
        if all(type(p) is int for p in ids):
            if self.names is None:
                self.names = self._named(groups or [{"params": sorted(ids)}], state)
            names: Mapping[Any, str] = self.names
        else:
            aliases = {a.removeprefix(MODEL): n.removeprefix(MODEL) for a, n in self.out.aliases.items()}
            clean = cleaned([str(p) for p in dict.fromkeys([*ids, *state])])
            names = {p: aliases.get(n, n) for p, n in clean.items()}
        for p, slots in state.items():
            if p not in names:
                msg = f"{self.file_name}: state of parameter {p!r}, which is in no group"
                raise BadForeign(msg)
            for slot, value in slots.items():
                self._slot(names[p], str(slot), value)
        made = []
        for group in groups:
            hyper = {str(k): number_of(self.value(f"{GROUPS}.{k}", v)) for k, v in group.items() if k not in {"params", "param_names"}}
            made.append({**hyper, "params": [names[p] for p in group.get("params") or ()]})
        self.groups = self.groups or made

    def _slot(self, fqn: str, slot: str, value: Any) -> None:
        name = f"{STATE}{fqn}.{slot}"
        if _is_tensor(value):
            self.tensor(name, value)
            self.steps |= {name} if slot == "step" else set()
        elif isinstance(value, int | float):
            add_number(self.out, name, value)
        elif value is not None:
            self.lost.append(f"{name} ({type(value).__name__})")

    def _named(self, groups: Sequence[Mapping[str, Any]], state: Mapping[Any, Any]) -> dict[int, str]:
        weights = {n.removeprefix(MODEL): t.shape for n, t in self.out.tensors.items() if n.startswith(MODEL)}
        unlikely = [n.removeprefix(MODEL) for n, t in self.out.tensors.items() if t.dtype not in FLOATS or BUFFER.fullmatch(n)]
        shapes = {}
        for p, slots in state.items():
            seen = {tuple(dtensor(v, str(p))[1]) if is_dtensor(v) else tuple(v.shape) for s, v in slots.items() if _is_tensor(v) and s != "step"}
            if len(seen) == 1:
                shapes[p] = seen.pop()
        return name_numbers(groups, shapes, weights, unlikely, self.hint)

    def finish(self) -> None:
        """Bring together what was found. Once, at the end."""
        out = self.out
        for name in self.steps:
            step_of(out, self.place, name)
        if self.groups:
            out.objects[GROUPS] = self.groups
        _same_objects(out)
        own = [n for n in self.lost if n.endswith("of its own)")]
        lost = sorted({*self.lost} - {*own})
        if lost:
            out.notes.append(f"left out, for no plain value says it: {', '.join(lost[:8])}" + (f" and {len(lost) - 8} more" if len(lost) > 8 else ""))
        name_buffers(out)


_Reader = Reader


def _same_objects(out: Checkpoint) -> None:
    """Objects that are equal on all ranks are no rank's own."""
    for name in {n for held in out.per_rank.values() for n in held}:
        values = [held[name] for held in out.per_rank.values() if name in held]
        if len(values) == len(out.per_rank) and len({repr(v) for v in values}) == 1 and not any(isinstance(v, np.ndarray) for v in values):
            out.objects[name] = values[0]
            for held in out.per_rank.values():
                del held[name]
    out.per_rank = {r: held for r, held in out.per_rank.items() if held}


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Stored) or is_dtensor(value)


def _is_model(tree: Any) -> bool:
    return isinstance(tree, dict) and bool(tree) and sum(map(_is_tensor, tree.values())) * 2 > len(tree)


def _is_optimizer(tree: Any) -> bool:
    if not isinstance(tree, dict) or not isinstance(tree.get("state"), dict) or not ("param_groups" in tree or len(tree) == 1):
        return False
    groups = tree.get("param_groups", [])
    return all(isinstance(s, dict) for s in tree["state"].values()) and isinstance(groups, list | tuple) and all(map(_is_group, groups))


def _is_group(group: Any) -> bool:
    return isinstance(group, dict) and isinstance(group.get("params"), list | tuple) and all(type(p) in {int, str} for p in group["params"])


def _single(value: Any) -> Any:
    """The only one of a list of optimizers."""
    return value[0] if isinstance(value, list | tuple) and len(value) == 1 else value


def _reach(leaf: Stored) -> int:
    """Elements from the first to the last."""
    return 1 + sum((e - 1) * s for e, s in zip(leaf.shape, leaf.stride, strict=True)) if prod(leaf.shape) else 0


