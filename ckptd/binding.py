"""The capture plan, bound: which live tensor goes to which place of which slot.

`Binding` knows the pieces that this rank stores and lays them out together with the arrays inside its objects; per slot it prepares the list of
(live tensor, place) once, and per step it only checks that every tensor is still the one it was. A tensor that does not exist yet
(optimizer state before the first step, parameters that never get a gradient) is absent: its place is zeroed, the image says so.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from ckptd import state
from ckptd.arena import Arena
from ckptd.capture import BATCH_BYTES, Batch, batches
from ckptd.core import typed
from ckptd.core.boxes import Box
from ckptd.core.image import Entry, Layout, Piece, lay_out
from ckptd.core.plan import local_name
from ckptd.errors import Bug, Unstorable
from ckptd.state import Leaf, Obj, TrainState

LAYOUTS_MAX = 4
"""Layouts kept: objects whose arrays change shape in every step make a new one each time."""


@dataclass(slots=True)
class Bound:
    """The plan bound to live tensors and one slot: (leaf, place, source) to copy later and at once, and what to check per step."""

    lazy: list[tuple[Leaf, Tensor, Tensor]] = field(default_factory=list)
    eager: list[tuple[Leaf, Tensor, Tensor]] = field(default_factory=list)
    absent: list[str] = field(default_factory=list)
    cut: list[Batch] = field(default_factory=list)
    identities: list[tuple[Leaf, Tensor | None, int]] = field(default_factory=list)


def encode_objects(objects: Sequence[Obj], rank: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The objects as typed JSON, and the arrays that it refers to. Raises Unstorable with the path of what cannot be stored."""
    arrays: dict[str, Tensor] = {}
    taken: set[str] = set()

    def put(path: str, value: Any) -> tuple[str, str] | None:
        if isinstance(value, np.ndarray) and value.dtype.kind in "biufc" and value.dtype.isnative:
            kind, tensor = "ndarray", torch.from_numpy(np.ascontiguousarray(value).reshape(value.shape).copy())
        elif isinstance(value, Tensor) and value.layout == torch.strided and not isinstance(value, DTensor):
            kind, tensor = "tensor", value.detach().clone()
        else:
            return None
        while path in taken:  # {"a.b": t, "a": {"b": u}} spells one path twice
            path += "~"
        taken.add(path)
        name = f"object/{path}@r{rank}"
        arrays[name] = tensor
        return kind, name

    return {o.name: {"policy": o.policy, "value": typed.encode(o.get(), o.name, put)} for o in objects}, arrays


class Binding:
    """One rank's pieces and their places. `torn`: names of tensors that are captured eagerly because something else writes them."""

    def __init__(self, pieces: Sequence[Piece], train: TrainState, *, job: str, rank: int, world_size: int, torn: set[str]) -> None:
        self.batch_bytes = BATCH_BYTES
        self._pieces = pieces
        self._train = train
        self._job, self._rank, self._world_size = job, rank, world_size
        self._torn = torn
        self._by_name: dict[str, list[Leaf]] = {}
        for leaf in train.leaves:  # flat partitions (ZeRO) are several boxes of one name
            self._by_name.setdefault(leaf.name, []).append(leaf)
            if leaf.local:
                self._by_name[local_name(leaf.name, rank)] = [leaf]
        self._layouts: dict[Any, tuple[Layout, dict[int, Bound]]] = {}
        self._arena: Arena | None = None
        self._base: Tensor | None = None

    def use(self, arena: Arena | None) -> None:
        """The memory that places are in from now on; None: let go of it."""
        self._arena = arena
        self._base = None if arena is None else torch.frombuffer(arena.memory, dtype=torch.uint8)
        self.forget()

    def forget(self) -> None:
        """Bind anew at the next step."""
        self._layouts.clear()

    def lay_out(self, objects: Mapping[str, Any], arrays: Mapping[str, Tensor]) -> Layout:
        """The image of these objects and arrays, and of this rank's pieces."""
        pieces = [*self._pieces]
        for name, tensor in arrays.items():
            dtype = state.DTYPES.get(tensor.dtype)
            stored = state.stored_view(tensor, "" if dtype else "bytes")
            view = "" if dtype else str(tensor.dtype).removeprefix("torch.")
            pieces.append(Piece(name, dtype or "U8", tuple(stored.shape), Box.whole(stored.shape), view))
        size = len(json.dumps(objects))
        return lay_out(
            pieces, job=self._job, rank=self._rank, world_size=self._world_size, coords=self._train.coords, aliases=self._train.aliases, objects_bytes=2 * size
        )

    def bound(self, slot: int, objects: Mapping[str, Any], arrays: Mapping[str, Tensor]) -> tuple[Layout, Bound]:
        """The layout for these arrays, and the plan bound to this slot; from the cache if every tensor is still the one it was."""
        key = tuple((n, t.dtype, t.shape) for n, t in arrays.items())
        if key not in self._layouts and len(self._layouts) >= LAYOUTS_MAX:
            self._layouts.clear()
        layout, bounds = self._layouts.get(key) or self._layouts.setdefault(key, (self.lay_out(objects, arrays), {}))
        if self._arena is None or layout.image_bytes > self._arena.geometry.slot_bytes:
            msg = f"the objects have grown: an image of {layout.image_bytes} bytes does not fit a slot"
            raise Unstorable(msg, remedy="attach again, or keep large objects out of `extras`")
        bound = bounds.get(slot)
        if bound is None or any(not _same(live, leaf.resolve(), pointer) for leaf, live, pointer in bound.identities):
            bound = bounds[slot] = self._bind(slot, layout)
        return layout, bound

    def _bind(self, slot: int, layout: Layout) -> Bound:
        bound = Bound()
        seen: set[int] = set()
        for entry in layout.entries:
            leaf = self._leaf_of(entry)
            if leaf is None:
                continue
            live = leaf.resolve()
            if id(leaf) not in seen:
                seen.add(id(leaf))
                bound.identities.append((leaf, live, _pointer(live)))
                if live is None:
                    bound.absent.append(leaf.name)
                else:
                    _check_unchanged(leaf, live)
            place = self.at(slot, layout, entry)
            if live is None:
                place.zero_()
            elif entry.piece.box.numel:
                source = state.stored_view(state.local_of(live), leaf.view)
                for dim, (start, extent) in enumerate(zip(*_in_leaf(entry.piece.box, leaf), strict=True)):
                    source = source.narrow(dim, start, extent)
                eager = leaf.eager or leaf.name in self._torn
                (bound.eager if eager else bound.lazy).append((leaf, place, source))
        bound.cut = batches([d for _, d, _ in bound.lazy], [s for _, _, s in bound.lazy], self.batch_bytes)
        return bound

    def _leaf_of(self, entry: Entry) -> Leaf | None:
        """The leaf that a piece is of: of several with its name, the one whose box holds the piece's."""
        leaves, box = self._by_name.get(entry.piece.name, ()), entry.piece.box
        return leaves[0] if len(leaves) == 1 else next((leaf for leaf in leaves if leaf.box.intersect(box) == box or leaf.box == box), None)

    def at(self, slot: int, layout: Layout, entry: Entry) -> Tensor:
        """A piece's place in a slot, as a tensor."""
        if self._arena is None or self._base is None:
            msg = "no arena"
            raise Bug(msg)
        at = self._arena.geometry.image_at(slot) + layout.header_bytes + entry.begin
        flat = self._base[at : at + entry.end - entry.begin]
        place = flat.view(state.TORCH_DTYPES[entry.piece.dtype]).view(entry.piece.box.extent)
        if entry.piece.view and entry.piece.name not in self._by_name:
            return place.view(getattr(torch, entry.piece.view)).squeeze(-1)
        return place


def _same(live: Tensor | None, now: Tensor | None, pointer: int) -> bool:
    return live is now and _pointer(now) == pointer


def _pointer(tensor: Tensor | None) -> int:
    """Where the local bytes are. (`to_local` would be the public way to a shard; it costs 20 us, for every tensor in every step.)"""
    if tensor is None:
        return 0
    return tensor._local_tensor.data_ptr() if isinstance(tensor, DTensor) else tensor.data_ptr()  # noqa: SLF001


def _in_leaf(box: Box, leaf: Leaf) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Start and extent of a piece, counted in the local tensor. (A rank's own copy of a leaf is stored whole.)"""
    inner = box.relative_to(leaf.box)
    return inner.start, inner.extent


def _check_unchanged(leaf: Leaf, live: Tensor) -> None:
    stored = state.stored_view(state.local_of(live), leaf.view)
    if tuple(stored.shape) != leaf.box.extent or state.DTYPES.get(stored.dtype) != leaf.dtype:
        msg = f"{leaf.name}: it was {leaf.dtype}{list(leaf.box.extent)} here at attach, and is {stored.dtype} {list(stored.shape)} now"
        raise Unstorable(msg, remedy="attach again after changing the model")
