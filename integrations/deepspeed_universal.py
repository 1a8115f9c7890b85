"""Reading DeepSpeed's universal checkpoints: each parameter's master and moments in files of their own. See `deepspeed`."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from math import prod
from typing import Any

from ckptd.core.archive import Tensor as Stored
from ckptd.core.boxes import Shape
from ckptd.core.logical import GROUPS, MODEL, STATE, Checkpoint
from ckptd.errors import BadForeign
from ckptd.formats import Place, ReadOptions
from ckptd.integrations.deepspeed import (
    LATEST_UNIVERSAL,
    MODEL_FILE,
    UNIVERSAL_FILE,
    array_of,
    computes,
    folder_of,
    load,
    objects_of,
)
from ckptd.integrations.deepspeed_flat import Flat, listing, mapping, shapes_of, stored, whole_row


class UniversalReader:
    """A universal checkpoint: each parameter's master and moments whole, in files of their own."""

    def __init__(self, place: Place, options: ReadOptions) -> None:
        self.folder = place if "zero/optimizer_state.pt" in place.files else folder_of(place, options.tag, LATEST_UNIVERSAL)
        self._lead = self.folder.prefix.removeprefix(place.prefix).strip("/")
        self.out = Checkpoint("universal")
        self.model = {(int(m[1] or -1), int(m[2])): n for n in self.folder.files if (m := MODEL_FILE.fullmatch(n))}
        if not self.model or "zero/optimizer_state.pt" not in self.folder.files:
            msg = f"{self.folder.label}: a universal checkpoint has *_model_states.pt and zero/optimizer_state.pt"
            raise BadForeign(msg)

    def checkpoint(self) -> Checkpoint:
        """All of it."""
        out, folder = self.out, self.folder
        file = self.model[min(self.model)]
        states = mapping(self.tree(file), file)
        common_file = "zero/optimizer_state.pt"
        common = mapping(self.tree(common_file), common_file)
        out.objects |= objects_of(states, common, folder, file, common_file)
        shapes = [shapes_of(s) for s in states.get("param_shapes") or ()]
        frozen = shapes_of(states.get("frozen_param_shapes") or {})
        held = [(rank, n, (mapping(self.tree(n), n).get("frozen_param_fragments") or {})) for (rank, mp), n in sorted(self.model.items()) if not mp and frozen]
        for fqn, shape in frozen.items():
            self.frozen(fqn, shape, held)
        self.module(states, file)
        self.groups(common, shapes, common_file)
        config = states.get("ds_config")
        dtype = computes(config if isinstance(config, dict) else {}, "")
        trained = {n: s for g in shapes for n, s in g.items()}
        for name in folder.files:
            found = UNIVERSAL_FILE.fullmatch(name)
            if found and found[1]:
                self.state(name, found[1], found[2], trained, dtype)
        self.steps(common, shapes)
        return out

    def tree(self, name: str) -> Any:
        """A file's value."""
        self.number(name)
        return load(self.folder, name)

    def number(self, name: str) -> int:
        """The file's number."""
        return self.out.file(f"{self._lead}/{name}".lstrip("/"), self.folder.files[name])

    def module(self, states: dict[str, Any], file: str) -> None:
        """Weights (where they are not stage 3's placeholders), buffers, ties."""
        out, number = self.out, self.number(file)
        out.aliases |= {f"{MODEL}{a}": f"{MODEL}{o}" for a, o in mapping(states.get("shared_params") or {}, f"{file}: shared_params").items()}
        out.buffers |= {f"{MODEL}{n}" for n in states.get("buffer_names") or ()}
        for fqn, tensor in mapping(states.get("module") or {}, f"{file}: module").items():
            name = f"{MODEL}{fqn}"
            if isinstance(tensor, Stored) and name not in out.aliases and name not in out.tensors and (tensor.shape != (0,) or name in out.buffers):
                out.add(name, tensor.dtype, tensor.shape, [whole_row(tensor, number)])

    def frozen(self, fqn: str, shape: Shape, held: list[tuple[int, str, Any]]) -> None:
        """A frozen parameter: whole in the model states, or (stage 3) a share in those of each rank."""
        found = [(rank, Flat(fragments[fqn], self.number(name), f"{name}: {fqn}")) for rank, name, fragments in held if fqn in fragments]
        whole = [f for _, f in found if f.numel == prod(shape)]
        if whole:
            self.out.add(f"{MODEL}{fqn}", whole[0].dtype, shape, whole[0].rows(shape, 0, prod(shape), 0))
            return
        share = -(-prod(shape) // max(1, len(found)))
        for rank, flat in found:
            start = min(rank * share, prod(shape))
            self.out.add(f"{MODEL}{fqn}", flat.dtype, shape, flat.rows(shape, start, min(share, prod(shape) - start), 0))

    def state(self, name: str, fqn: str, slot: str, trained: Mapping[str, Shape], dtype: str) -> None:
        """One file: {"param": tensor, ...}, or a bare flat tensor (stage 3's converter)."""
        out = self.out
        value = self.tree(name)
        if slot == "step":
            step = array_of(value, self.folder, name).item() if isinstance(value, Stored) else value
            if fqn in trained:
                out.literal(f"{STATE}{fqn}.step", "F32", struct.pack("<f", float(step)))
            return
        tensor = value.get("param") if isinstance(value, dict) else value
        tensor = stored(tensor, f"{name}: param")
        shape = trained.get(fqn, tensor.shape)
        if prod(shape) != tensor.numel:
            msg = f"{name}: {tensor.numel} elements for a parameter of shape {list(shape)}"
            raise BadForeign(msg)
        flat = Flat(tensor, self.number(name), name)
        weight = f"{MODEL}{fqn}"
        if slot != "fp32":
            target = f"{STATE}{fqn}.{slot}"
        elif fqn not in trained:
            if weight in out.tensors or weight in out.aliases:  # a buffer or a frozen weight as fp32, a tied weight again
                return
            target = weight
        elif weight in out.tensors:
            target = f"{STATE}{fqn}.master"
            out.pairs.append((weight, target))
        else:
            target = weight
            if dtype:
                out.derived[weight] = dtype
        out.add(target, flat.dtype, shape, flat.rows(shape, 0, prod(shape), 0))

    def groups(self, common: dict[str, Any], shapes: list[dict[str, Shape]], file: str) -> None:
        """Param groups; each has one or more of `param_shapes`."""
        groups, at = [], 0
        for g in listing(common.get("param_groups"), f"{file}: param_groups"):
            mine = shapes[at : at + max(1, len(g.get("params", ())))]
            at += len(mine)
            groups.append({**{k: v for k, v in g.items() if k != "params"}, "params": [n for s in mine for n in s]})
        if at != len(shapes):
            msg = f"{file}: {len(groups)} param groups for {len(shapes)} in param_shapes"
            raise BadForeign(msg)
        self.out.objects[GROUPS] = groups

    def steps(self, common: dict[str, Any], shapes: list[dict[str, Shape]]) -> None:
        """Stage 3 keeps them in the common file."""
        inner = common.get("optimizer_state_dict")
        state = inner.get("state") if isinstance(inner, dict) else None
        for k, group in enumerate(shapes):
            held = state.get(k, {}).get("step") if isinstance(state, dict) else None
            for fqn in group:
                if held is not None and f"{STATE}{fqn}.step" not in self.out.tensors:
                    step = array_of(held, self.folder, "zero/optimizer_state.pt").item() if isinstance(held, Stored) else held
                    self.out.literal(f"{STATE}{fqn}.step", "F32", struct.pack("<f", float(step)))
