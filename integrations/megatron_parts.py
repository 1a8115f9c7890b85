"""What Megatron's two kinds of checkpoints share: where an iteration lies, objects, the optimizer's groups and step, flat buffers.

A distributed optimizer keeps one flat buffer per rank and dtype, cut into buckets. Which parameter lies where is not in the file; it follows from the order in
which the model registered its parameters (`megatron_layout`). An order is believed only if it fills every bucket exactly, if every parameter begins and ends where
a shard does (where there are shards), and if a sample of each parameter's master is what its weight is the rounding of.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod
from typing import Any

import msgspec
import numpy as np

from ckptd.core.archive import Tensor as Stored
from ckptd.core.boxes import Box, Shape
from ckptd.core.logical import GROUPS, MODEL, STATE, Checkpoint, Row, Tensor, rows_of_flat
from ckptd.errors import BadForeign, NotFound
from ckptd.formats import Place
from ckptd.integrations import megatron_layout as layout
from ckptd.integrations.torch_native import Refused, array_of, plain
from ckptd.reading import Reading

LATEST = "latest_checkpointed_iteration.txt"
INLINE_BYTES = 1 << 20
"""A tensor among the objects of up to this size is part of its object."""
MASTERS = {"param": "master", "fp32_param": "master", "master_param": "master"}
"""Megatron's names of a slot -> ours."""
_SAMPLE = 64


def iteration_folders(place: Place, marker: re.Pattern[str]) -> list[str]:
    """Folders in which a file that `marker` matches lies; "" is the place itself."""
    found = {n[: m.start()] for n in place.files if (m := marker.search(n))}
    return sorted(f for f in found if "/" not in f)


def iteration_folder(place: Place, tag: str, marker: re.Pattern[str]) -> str:
    """The folder of the iteration that is meant: the place itself, the tag's, the one that LATEST names, the only one. Raises NotFound."""
    found = iteration_folders(place, marker)
    if found == [""]:
        return ""
    if not tag and LATEST in place.files:
        tag = place.read(LATEST).decode(errors="replace").strip()
    wanted = {tag, f"iter_{int(tag):07d}"} if tag.isdecimal() else {tag}
    chosen = [f for f in found if f in wanted] if tag else found
    if len(chosen) != 1:
        msg = f"{place.label}: " + (
            f"no iteration {tag}" if tag else f"several iterations: {', '.join(found[:5])}" if found else "no iteration"
        )
        raise NotFound(msg, remedy="--tag takes one of " + ", ".join(found)[:400])
    return chosen[0]


@contextmanager
def foreign(place: Place) -> Iterator[None]:
    """What a malformed tree makes Python raise becomes BadForeign: readers walk trees of dicts and lists whose every part may be anything."""
    try:
        yield
    except (AttributeError, IndexError, KeyError, OverflowError, RecursionError, TypeError, ValueError) as e:
        msg = f"{place.label}: not as Megatron writes it: {type(e).__name__}: {e}"
        raise BadForeign(msg[:400]) from e


class Objects:
    """Values of torch files as typed JSON can hold them; what it cannot hold is counted in `lost`."""

    def __init__(self, place: Place) -> None:
        self.lost: list[str] = []
        self._place = place

    def plain(self, value: Any, path: str, file: str, begin: int = 0) -> Any:
        """`value`, read from what begins at `begin` in `file`, without other systems' types."""

        def array(at: str, leaf: Any) -> Any:
            if not isinstance(leaf, Stored) or not leaf.contiguous or leaf.nbytes > INLINE_BYTES:
                msg = f"{at} (a tensor of {getattr(leaf, 'nbytes', 0)} bytes)"
                raise Refused(msg)
            return array_of(self._place.read(file, begin + leaf.begin, leaf.nbytes), leaf.dtype, leaf.shape)

        try:
            return plain(value, path, array, self.lost)
        except Refused as e:
            self.lost.append(str(e))
            return None

    def note(self, out: Checkpoint) -> None:
        """Say what was left out."""
        if self.lost:
            some = ", ".join(self.lost[:3]) + (f" and {len(self.lost) - 3} more" if self.lost[3:] else "")
            out.notes.append(f"objects that cannot be kept were left out: {some}")


class OptimizerState(msgspec.Struct):
    """What the optimizer's own part says: its param groups (without parameters), one step for all, and the rest (a grad scaler)."""

    groups: list[dict[str, Any]]
    step: float | None
    rest: dict[str, Any]


def optimizer_state(value: Any) -> OptimizerState:
    """Of the optimizer's state dict in any of Megatron's forms; several chained ones become one."""
    found = OptimizerState([], None, {})
    if isinstance(value, dict) and value and all(isinstance(k, int) for k in value):
        parts = [value[k] for k in sorted(value)]
    else:
        parts = value if isinstance(value, list) else [value]
    for part in parts:
        if not isinstance(part, dict):
            continue
        inner = part.get("optimizer", part)
        if not isinstance(inner, dict):
            continue
        state = inner.get("state")
        steps = [state.get("common_step") if isinstance(state, dict) else None]
        for group in inner.get("param_groups") or ():
            kept = {k: v for k, v in group.items() if k not in {"params", "step"}}
            if kept not in found.groups:
                found.groups.append(kept)
            steps.append(group.get("step"))
        for step in steps:
            number = step.item() if isinstance(step, np.ndarray) and step.size == 1 else step
            if number is None:
                continue
            if found.step not in {None, float(number)}:
                msg = f"the optimizer's steps differ: {found.step} and {number}"
                raise BadForeign(msg)
            found.step = float(number)
        found.rest |= {
            k: v
            for k, v in part.items()
            if k not in {"optimizer", "state", "param_groups", "param_state", "param_state_sharding_type", "fp32_from_fp16_params"}
        }
    return found


def add_optimizer(out: Checkpoint, state: OptimizerState, hints: Mapping[str, Any]) -> None:
    """Groups with their parameters, and every parameter's step."""
    trained = dict.fromkeys(n.removeprefix(STATE).rpartition(".")[0] for n in out.tensors if n.startswith(STATE))
    names = layout.expanded(
        [n.removeprefix(MODEL) for n in out.tensors if n.startswith(MODEL) and n.removeprefix(MODEL) in trained]
    )
    if state.groups and names:
        shapes = {n: out.tensors[MODEL + n].shape for n in names}
        for group, params in zip(state.groups, layout.members(state.groups, shapes, hints.get("groups")), strict=True):
            group["params"] = params
        out.objects[GROUPS] = state.groups
    if state.step is not None:
        for name in names:
            out.literal(f"{STATE}{name}.step", "F32", np.float32(state.step).tobytes())
    for key, value in state.rest.items():
        if value is not None:
            out.objects[f"extras.{key}"] = value


def keep_common(out: Checkpoint, common: Mapping[str, Any]) -> None:
    """Objects of the common state as extras; what this package's writers put under `ckptd` gets its names back."""
    for key, value in common.items():
        if key == "ckptd" and isinstance(value, dict):
            out.objects |= value
        elif key not in {"iteration", "content_metadata", "optimizer", "rng_state"} and value is not None:
            out.objects[f"extras.{key}"] = value


def pair_masters(out: Checkpoint) -> None:
    """Tell the engine which weights have masters."""
    for name in out.tensors:
        if name.startswith(STATE) and name.endswith(".master"):
            weight = MODEL + name.removeprefix(STATE).removesuffix(".master")
            if weight in out.tensors:
                out.pairs.append((weight, name))


def check_masters(place: Place, out: Checkpoint) -> None:
    """Refuse masters that belong to other weights, by a sample of each: no rounding makes that difference.

    megatron-core 0.16.1 writes such `fully_reshardable` checkpoints, and says nothing: `sharded_param_state_fully_reshardable` cuts the gathered buffer, which has
    no padding between its buckets, at places that count it. So it happens where DDP has several buckets (--overlap-grad-reduce) of which one ends in padding.
    """
    with Reading(place, out) as reading:
        for weight, master in out.pairs:
            tensor = out.tensors[weight]
            if out.tensors[master].shape != tensor.shape or not prod(tensor.shape) or not tensor.shape:
                continue
            extent = (*(1 for _ in tensor.shape[1:]), min(_SAMPLE, tensor.shape[-1]))
            for start in ((0,) * len(extent), tuple(n - e for n, e in zip(tensor.shape, extent, strict=True))):
                box = Box(start, extent)
                if not _alike(reading.array(weight, box), reading.array(master, box), tensor.dtype):
                    msg = f"{place.label}: the optimizer's fp32 copy of {weight.removeprefix(MODEL)} holds other values than the weight"
                    remedy = (
                        "megatron-core writes fully_reshardable so where DDP's buckets are padded: save dp_reshardable or without --overlap-grad-reduce; "
                        'the hint "optimizer": "skip" reads the weights alone'
                    )
                    raise BadForeign(msg, remedy=remedy)


class Buffer(msgspec.Struct, frozen=True):
    """A rank's flat buffer: for each slot 1-d rows that tile it, buckets one after the other without the padding at their ends.

    `dtype`: of the weights that it belongs to. `sizes`: of its buckets, unpadded, where they are known; else `total` alone is.
    `edges`: elements at which shards begin and end, where there are shards.
    """

    dtype: str
    total: int
    slots: Mapping[str, Sequence[Row]]
    sizes: Sequence[int] | None = None
    edges: frozenset[int] = frozenset()


@dataclass
class FlatDecoder:
    """Flat buffers -> boxes of the parameters that they hold, rank by rank. `out` has the model already.

    `sizes_of`: (order of parameters, their sizes) -> ways in which buckets may have been cut, for buffers that do not say.
    """

    place: Place
    out: Checkpoint
    tp: int
    sizes_of: Callable[[Sequence[str], Sequence[int]], Iterable[Sequence[int]]] | None = None
    placed: set[tuple[str, Box]] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.shapes = {n.removeprefix(MODEL): t.shape for n, t in self.out.tensors.items() if n.startswith(MODEL)}
        self.gated = layout.is_gated(self.shapes)

    def decode(self, where: str, tp_rank: int, orders: Iterable[Sequence[str]], buffer: Buffer) -> None:
        """Place a buffer's parameters. `orders`: candidates for the order of registration. Raises BadForeign where none fits."""
        count = 0
        for order in orders:
            names = [*reversed(order)]
            count = len(names)
            numels = [prod(layout.local_shape(n, self.shapes[n], self.tp)) for n in names]
            for sizes in [buffer.sizes] if buffer.sizes else self.sizes_of(names, numels) if self.sizes_of else [[buffer.total]]:
                begins = self._begins(numels, sizes, buffer)
                if begins and self._fits(tp_rank, dict(zip(names, begins, strict=True)), buffer):
                    self._place(tp_rank, dict(zip(names, begins, strict=True)), buffer)
                    return
        msg = f"{self.place.label}: {where}: {count} parameters do not fill the optimizer's buffer of {buffer.total} elements in any order and cut that is known"
        raise BadForeign(
            msg,
            remedy='give the hint "params": [n for n, _ in model.named_parameters()], with global layer numbers; "bucket_size" if it was set',
        )

    def _begins(self, numels: Sequence[int], sizes: Sequence[int], buffer: Buffer) -> list[int] | None:
        places = layout.places_in_buckets(numels, sizes) if sum(sizes) == buffer.total else None
        if places is None:
            return None
        before = [sum(sizes[:b]) for b in range(len(sizes))]
        begins = [before[bucket] + at for bucket, at in places]
        edges = buffer.edges
        return begins if not edges or all(b in edges and b + n in edges for b, n in zip(begins, numels, strict=True)) else None

    def _place(self, tp_rank: int, begins: Mapping[str, int], buffer: Buffer) -> None:
        for fqn, begin in begins.items():
            shape = self.shapes[fqn]
            for share in layout.shares(fqn, shape, tp_rank, self.tp, gated=self.gated):
                for slot, rows in buffer.slots.items():
                    name = f"{STATE}{fqn}.{MASTERS.get(slot, slot)}"
                    self._add(name, shape, share.box, _of_flat(rows, begin + share.at, share.box))

    def _add(self, name: str, shape: Shape, box: Box, rows: Sequence[Row]) -> None:
        """Rows of one rank's box; further ranks' copies, which may be cut elsewhere, are replicas."""
        if (name, box) in self.placed:
            old = self.out.tensors[name]
            self.out.tensors[name] = Tensor(old.dtype, old.shape, old.rows, (*old.replicas, *rows))
        else:
            self.placed.add((name, box))
            self.out.add(name, "F32", shape, rows)

    def _fits(self, tp_rank: int, begins: Mapping[str, int], buffer: Buffer) -> bool:
        """Whether a sample of each parameter's master rounds to its weight, give or take the last bit."""
        rows = buffer.slots.get("param")
        if rows is None:
            return True
        probe = Checkpoint("", files=self.out.files)
        pairs = []
        for fqn, begin in begins.items():
            probe.tensors[fqn] = self.out.tensors[MODEL + fqn]
            for share in layout.shares(fqn, self.shapes[fqn], tp_rank, self.tp, gated=self.gated):
                box, master = share.box, f"{fqn}.{share.at}"
                probe.tensors[master] = Tensor("F32", self.shapes[fqn], tuple(_of_flat(rows, begin + share.at, box)))
                last = len(box.extent) - 1
                pairs.append(
                    (fqn, master, Box(box.start, tuple(min(n, _SAMPLE if d == last else 1) for d, n in enumerate(box.extent))))
                )
        with Reading(self.place, probe) as reading:
            return all(_alike(reading.array(w, box), reading.array(m, box), probe.tensors[w].dtype) for w, m, box in pairs)


def _alike(weight: np.ndarray[Any, Any], master: np.ndarray[Any, Any], dtype: str) -> bool:
    wide = (weight.astype(np.uint32) << 16).view(np.float32) if dtype == "BF16" else weight.astype(np.float32)
    return bool(np.all(np.abs(wide - master) <= np.abs(master) / 64 + 1e-6))


def _of_flat(rows: Sequence[Row], begin: int, box: Box) -> list[Row]:
    """Rows of `box`, whose elements lie one after the other from `begin` on in a flat F32 tensor that 1-d `rows` tile."""
    found: list[Row] = []
    for row in rows:
        low, high = max(begin, row.box.start[0]), min(begin + box.numel, row.box.stop[0])
        if low < high:
            parts = rows_of_flat(box.extent, low - begin, high - low, row.file, row.begin + (low - row.box.start[0]) * 4, 4)
            found += [p.moved(tuple(a + b for a, b in zip(p.box.start, box.start, strict=True))) for p in parts]
    return found
