"""What one rank wants of a snapshot: tensors, arrays of objects, objects. All of it is decided before anything live is touched.

Per-rank objects follow their coordinates. On the same mesh every rank gets its own; on a changed one an object's policy says whose: a copy
that all ranks share, all copies merged by name (optimizers), a deterministic new seed (random states), or the data loader's own
`reshard_state_dict` - and where none of these holds, the restore refuses and names it.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import xxhash
from torch import Tensor

from ckptd import state
from ckptd.core import typed
from ckptd.core.boxes import Box
from ckptd.core.manifest import Index
from ckptd.core.plan import Want, local_name, mesh_digest
from ckptd.errors import Bug, StateMismatch
from ckptd.state import Leaf, Obj, TrainState


@dataclass(frozen=True, slots=True)
class Asker:
    """Who wants: `mesh` is the digest of all ranks' coordinates, `declared` the tensor names that any rank of the job has."""

    job: str
    rank: int
    world_size: int
    mesh: str
    declared: frozenset[str]


class Wanted:
    """What one rank wants of one snapshot: tensors, arrays of objects, objects; decided before anything is touched."""

    def __init__(self, train: TrainState, asker: Asker, index: Index, *, strict: bool) -> None:
        self._train, self._asker, self._index = train, asker, index
        self.warnings: list[str] = []
        self._same_mesh = mesh_digest([index.images[r].coords for r in range(index.world_size)]) == asker.mesh
        self._absent = {n for i in index.images.values() for n in i.objects.get("absent", {}).get("value", [])}
        self._leaves = [leaf for leaf in train.leaves if leaf.name not in self._absent]
        if not train.complete:
            self._leaves += self._saved_only({leaf.name for leaf in self._leaves})
        named = [(self._saved_name(leaf), leaf) for leaf in self._leaves]
        self.missing = sorted(name for name, _ in named if name not in index.tensors)
        if not strict:
            self._leaves = [leaf for name, leaf in named if name in index.tensors]
        self.wants = [Want(self._saved_name(leaf), leaf.dtype, leaf.shape, leaf.box, leaf.view) for leaf in self._leaves]
        known = asker.declared | {leaf.name for leaf in self._leaves}
        saved = {re.sub(r"@r\d+$", "", n) if "@r" in n else n for n in index.tensors if not n.startswith("object/")}
        saved |= {n for n in index.images[0].objects if n != "absent" and not n.startswith("rng.")}
        self.unexpected = sorted(saved - known - self._absent)
        self._objects = self._choose_objects()
        gone = sorted({o.name for o in train.objects if not o.name.startswith("rng.")} - {o.name for o, _ in self._objects})
        self.missing += gone
        if strict and (self.missing or self.unexpected):
            parts = [f"missing: {', '.join(self.missing[:8])}"] * bool(self.missing)
            parts += [f"unexpected: {', '.join(self.unexpected[:8])}"] * bool(self.unexpected)
            msg = f"step {index.step} does not fit: " + "; ".join(parts)
            raise StateMismatch(msg, remedy="pass strict=False to restore what fits")
        references: list[str] = []
        for _, values in self._objects:
            for value in values:
                typed.decode(value, lambda _kind, name: references.append(name))
        self.array_wants = [self._array_want(n) for n in dict.fromkeys(references)]
        self._values: list[tuple[Obj, list[Any]]] = []

    def _saved_only(self, known: set[str]) -> list[Leaf]:
        """Optimizer state that the snapshot has and an optimizer that could not be asked does not have yet."""
        found = []
        for name, info in self._index.tensors.items():
            prefix, _, slot = name.rpartition(".")
            owner = self._train.params.get(f"{prefix}.")
            if owner is not None and "@r" not in slot and name not in known and name not in self._absent:
                leaf = state.saved_leaf(name, *owner, slot, info.dtype, info.shape, info.view)
                found += [leaf] if leaf is not None else []
        return found

    def _saved_name(self, leaf: Leaf) -> str:
        own = local_name(leaf.name, self._asker.rank) if leaf.local and self._same_mesh else leaf.name
        if own in self._index.tensors:
            return own
        tied = self._train.aliases.get(leaf.name, "")  # a converted checkpoint holds a tied weight once
        return tied if leaf.name not in self._index.tensors and tied in self._index.tensors else leaf.name

    def _array_want(self, name: str) -> Want:
        info = self._index.tensors.get(name)
        if info is None:
            msg = f"{name}: an object refers to it and no image holds it"
            raise StateMismatch(msg)
        return Want(name, info.dtype, info.shape, Box.whole(info.shape), info.view)

    def _choose_objects(self) -> list[tuple[Obj, list[Any]]]:
        """Per object, the saved values that this rank needs: its own, one that all share, or all of them to merge."""
        images = self._index.images
        chosen: list[tuple[Obj, list[Any]]] = []
        for obj in self._train.objects:
            values = {r: i.objects[obj.name]["value"] for r, i in images.items() if obj.name in i.objects}
            if not values:
                if obj.policy == "rng":
                    self.warnings.append(f"{obj.name}: the snapshot has none, this rank's stays as it is")
                continue
            mine = self._asker.rank
            if obj.policy == "optimizer":  # merged by name: what this rank has of its own comes last, and wins
                chosen.append((obj, [*(v for r, v in values.items() if r != mine), *(v for r, v in values.items() if r == mine)]))
            elif self._same_mesh and mine in values:
                chosen.append((obj, [values[mine]]))
            elif obj.policy == "rng":
                self.warnings.append(f"{obj.name}: the mesh changed, reseeded from job, step and rank")
                chosen.append((obj, []))
            else:
                chosen.append((obj, self._shared(values)))
        return chosen

    @staticmethod
    def _shared(values: Mapping[int, Any]) -> list[Any]:
        """One copy where all are equal to the letter; where they hold arrays, or differ, all of them: `_agreed` looks at the bytes."""
        first = next(iter(values.values()))
        equal = all(v == first for v in values.values()) and "$array" not in repr(first)
        return [first] if equal else [*values.values()]

    def _agreed(self, obj: Obj, values: list[Any]) -> list[Any]:
        """Decoded copies of an object that ranks share: one if they are equal, all for a loader that can reshard, else StateMismatch."""
        if obj.policy in {"optimizer", "rng"} or len(values) < 2:
            return values
        if len({_canonical(obj.name, v) for v in values}) == 1:
            return values[:1]
        if obj.policy == "loader" and hasattr(obj.target, "reshard_state_dict"):
            return values
        msg = f"{obj.name}: its state differs between the {len(values)} ranks that saved it, and the mesh changed"
        raise StateMismatch(
            msg, remedy="give the object reshard_state_dict(states, rank=, world_size=) -> state, or restore on the mesh that saved it"
        )

    def decode(self, arrays: Mapping[str, Tensor]) -> None:
        """Turn the chosen JSON into values; the last thing that can fail."""

        def get(kind: str, name: str) -> Any:
            tensor, view = arrays[name], self._index.tensors[name].view
            if view:
                tensor = tensor.view(getattr(torch, view)).squeeze(-1)
            return tensor.numpy().copy() if kind == "ndarray" else tensor.clone()

        self._values = [(obj, self._agreed(obj, [typed.decode(v, get) for v in values])) for obj, values in self._objects]

    def create(self) -> None:
        """Make optimizer state that does not exist yet, in the order in which the optimizer would: ranks that walk it must meet in their collectives."""
        for leaf in self._leaves:
            if leaf.like is not None and leaf.resolve() is None:
                leaf.like()

    def target(self, want: int) -> Tensor:
        """The live tensor of a want, as stored."""
        leaf = self._leaves[want]
        live = leaf.resolve()
        if live is None:
            msg = f"{leaf.name} vanished between attach and restore"
            raise Bug(msg)
        return state.stored_view(state.local_of(live), leaf.view)

    def finish(self) -> None:
        """Give every object its value; random states last, for loading others may draw."""
        for obj, values in sorted(self._values, key=lambda v: v[0].policy == "rng"):
            if obj.policy == "rng" and not values:
                self._reseed(obj)
            elif obj.policy == "optimizer" and obj.name.endswith("param_groups"):
                obj.set([g for v in values for g in v])
            elif obj.policy == "optimizer":
                obj.set({fqn: s for v in values for fqn, s in v.items()})
            elif len(values) > 1:
                asker = self._asker
                obj.set(obj.target.reshard_state_dict(values, rank=asker.rank, world_size=asker.world_size))
            else:
                obj.set(values[0])

    def _reseed(self, obj: Obj) -> None:
        seed = xxhash.xxh3_64_intdigest(f"{self._asker.job}/{self._index.step}/{self._asker.rank}/{obj.name}".encode()) >> 1
        match obj.target:
            case torch.Generator():
                obj.target.manual_seed(seed)
            case random.Random():
                obj.target.seed(seed)
            case np.random.Generator():
                obj.target.bit_generator.state = type(obj.target.bit_generator)(seed).state
            case _:
                state.reseed(seed)


def _canonical(name: str, value: Any) -> str:
    """A decoded object as text in which arrays stand with their bytes' hash: equal text, equal objects."""

    def put(_path: str, item: Any) -> tuple[str, str] | None:
        if isinstance(item, np.ndarray):
            return "ndarray", f"{item.dtype}{item.shape}{xxhash.xxh3_128_hexdigest(np.ascontiguousarray(item).tobytes())}"
        if isinstance(item, Tensor):
            raw = item.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if item.numel() else b""
            return "tensor", f"{item.dtype}{tuple(item.shape)}{xxhash.xxh3_128_hexdigest(raw)}"
        return None

    return repr(typed.encode(value, name, put))
