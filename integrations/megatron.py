"""Megatron-core's distributed checkpoints (`torch_dist`): a DCP folder whose keys are the model's, cut by no rank, and `common.pt` beside it.

    iter_0001000/   metadata.json {"sharded_backend": "torch_dist"}, common.pt, .metadata, __<rank>_<n>.distcp

Reading
- layers are stacked along a first axis (`decoder.layers.mlp.linear_fc1.weight` is [layers, ...]), experts along a second; here every layer and every
  expert has its own tensor, `model.decoder.layers.0.mlp.linear_fc1.weight`, of the shape that TP = PP = EP = 1 would have;
- the optimizer, in its three forms: per parameter as `fully_reshardable` and the non-distributed optimizer write it, and flat buckets
  (`dp_reshardable`), whose layout follows from Megatron's rules (`megatron_layout`) and is believed only if every bucket comes out full, every parameter
  begins and ends where a shard does, and a sample of its elements is what the weights are the rounding of;
- one step for all parameters, in the param groups or as `common_step`, becomes every parameter's `step`;
- which parameters a group has is not in the file: Megatron's rule tells, or the hint `groups`.

Writing makes what `dist_checkpointing.load` takes at any TP, PP, EP and DP: `fully_reshardable`, or with `config` {"optimizer": "plain"} the form of the
non-distributed optimizer. Padding of the vocabulary stays as it is: Megatron's loader allows another one.

Source: megatron-core 0.16.1: dist_checkpointing/, optimizer/distrib_optimizer.py, optimizer/optimizer.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from math import prod
from typing import Any

import msgspec
import numpy as np

from ckptd.core.archive import Tensor as Stored
from ckptd.core.archive import read_torch
from ckptd.core.boxes import Box, Shape
from ckptd.core.image import ITEM_BYTES
from ckptd.core.inert import inert
from ckptd.core.logical import MODEL, STATE, Checkpoint, Row, Tensor
from ckptd.core.pickles import KNOWN, Dtype, Global, Made, MetadataIndex, load
from ckptd.core.pickling import TORCH_NAMES
from ckptd.errors import BadArgument, BadForeign
from ckptd.formats import Place, Plan, ReadOptions, WriteOptions
from ckptd.integrations import megatron_layout as layout
from ckptd.integrations.megatron_legacy import LEGACY
from ckptd.integrations.megatron_parts import (
    MASTERS,
    Buffer,
    FlatDecoder,
    Objects,
    OptimizerState,
    add_optimizer,
    check_masters,
    foreign,
    iteration_folder,
    iteration_folders,
    keep_common,
    optimizer_state,
    pair_masters,
)
from ckptd.integrations.megatron_write import Writer, write_renamed

__all__ = ["LEGACY", "TORCH_DIST"]

LAYERS_MAX = 1_000_000
"""Layers times experts of one key: the largest models have some ten thousand."""
EXTRA_STATES_MAX = 100_000
"""`_extra_state` entries that are looked into."""

_MARKER = re.compile(r"(?:^|/)metadata\.json$")
_PLANNER = "torch.distributed.checkpoint.planner"
_KNOWN = {
    **KNOWN,
    **{
        (_PLANNER, n): inert(Global(_PLANNER, n))
        for n in ("SavePlan", "WriteItem", "WriteItemType", "TensorWriteData", "BytesIOWriteData")
    },
}
"""Megatron puts the ranks' plans into `.metadata` too; nobody needs them."""
_CHAINED = re.compile(r"^chained_(\d+)\.")
_BUCKET = re.compile(r"optimizer\.distributed\.dp_group_idx_(\d+)\.gbuf_idx_(\d+)\.dtype_(.+)\.bucket_idx_(\d+)\.(\w+)")
_GROUP_STATE = re.compile(r"optimizer\.distributed\.dp_group_idx_(\d+)\.(\w+)/shard_0_1")
_OBJECT = re.compile(r"(.+)/shard_([\d.]+)_([\d.]+)")
_EXPERT_KEY = re.compile(r"\.experts\.experts\.(\d+)\.")
_EDGE_BYTES = 4096


class TorchDist:
    """The format "megatron"."""

    name = "megatron"
    title = "Megatron-core: torch_dist, a folder that loads at any TP, PP, EP and DP"

    def probe(self, place: Place) -> bool:
        """See Format."""
        return any(_is_ours(place, f) for f in iteration_folders(place, _MARKER)[:3])

    def read(self, place: Place, options: ReadOptions) -> Checkpoint:
        """See Format. `tag`: an iteration. Hints: `groups` {parameter: number of its group}, `params`: parameters in the order of the model's registration;
        `optimizer` "skip" leaves it out.
        """
        folder = iteration_folder(place, options.tag, _MARKER)
        with foreign(place):
            return _Reader(place, folder, options).checkpoint()

    def write(self, checkpoint: Checkpoint, options: WriteOptions) -> Plan:
        """See Format. `tp`: shards are cut for this many ranks, which only makes their loading cheaper.

        `config`: `optimizer` ("fully_reshardable", "plain"), `layers` ("stacked", "separate"), `args` (of Megatron-LM's namespace, by name).
        """
        return write_renamed(checkpoint, lambda c: Writer(c, options).plan())


TORCH_DIST = TorchDist()


def _is_ours(place: Place, folder: str) -> bool:
    name = f"{folder}/metadata.json".lstrip("/")
    return f"{folder}/.metadata".lstrip("/") in place.files and place.files[name] < 4096 and b'"torch_dist"' in place.read(name)


# --- the folder's index -----------------------------------------------------------------------------------------------------


class Shard(msgspec.Struct, frozen=True):
    """A torch.save blob in a file, and the box of its tensor that it holds (None for an object)."""

    box: Box | None
    file: str
    begin: int
    nbytes: int


class Key(msgspec.Struct, frozen=True):
    """An entry of the index. `dtype` is "" for objects."""

    dtype: str
    shape: Shape
    shards: tuple[Shard, ...]


def read_blob(place: Place, shard: Shard) -> Any:
    """The value of a blob. Its first and last bytes, where the pickle and the directory are, are read once."""
    begin, size = shard.begin, shard.nbytes
    head = place.read(shard.file, begin, min(size, _EDGE_BYTES))
    tail_at = max(0, size - _EDGE_BYTES)
    tail = place.read(shard.file, begin + tail_at, size - tail_at) if size > len(head) else b""

    def port(at: int, count: int) -> bytes:
        if at + count <= len(head):
            return head[at : at + count]
        if at >= tail_at and tail:
            return tail[at - tail_at : at - tail_at + count]
        return place.read(shard.file, begin + at, count)

    return read_torch(port, size)


def read_index(place: Place, folder: str) -> dict[str, Key]:
    """DCP's `.metadata`: keys in their order. Raises BadForeign."""
    lead = f"{folder}/" if folder else ""
    value, _ = load(place.read(f"{lead}.metadata"), known=_KNOWN)
    if not isinstance(value, Made) or value.what.name not in {"Metadata", "MCoreMetadata"}:
        msg = f"{place.label}: .metadata is no DCP index"
        raise BadForeign(msg)
    described, stored = value.get("state_dict_metadata"), value.get("storage_data")
    if not isinstance(described, dict) or not isinstance(stored, dict):
        msg = f"{place.label}: .metadata has no tensors or no places"
        raise BadForeign(msg)
    places: dict[str, list[tuple[Any, Shard]]] = {}
    for index, info in stored.items():
        if not isinstance(index, MetadataIndex) or not isinstance(info, Made) or info.get("transform_descriptors"):
            msg = f"{place.label}: .metadata: the place of {index} is not as DCP writes it"
            raise BadForeign(msg)
        name, begin, nbytes = f"{lead}{info.get('relative_path')}", info.get("offset"), info.get("length")
        if (
            name not in place.files
            or type(begin) is not int
            or type(nbytes) is not int
            or not 0 <= begin <= begin + nbytes <= place.files[name]
        ):
            msg = (
                f"{place.label}: {index.fqn} lies in bytes {begin} to {begin}+{nbytes} of {name}, which has {place.files.get(name)}"
            )
            raise BadForeign(msg, remedy="is the folder complete?")
        places.setdefault(index.fqn, []).append((index.offset, Shard(None, name, begin, nbytes)))
    return {key: _key(key, said, places.get(key, [])) for key, said in described.items()}


def _key(key: str, said: Any, places: Sequence[tuple[Any, Shard]]) -> Key:
    if not isinstance(said, Made) or said.what.name not in {"TensorStorageMetadata", "BytesStorageMetadata"}:
        msg = f"{key}: not described as DCP does"
        raise BadForeign(msg)
    if said.what.name == "BytesStorageMetadata":
        return Key("", (), tuple(s for _, s in places))
    shape, chunks, properties = said.get("size"), said.get("chunks"), said.get("properties")
    state = properties.state if isinstance(properties, Made) else None
    dtype = state[0] if isinstance(state, tuple) and state else properties.get("dtype") if isinstance(properties, Made) else None
    if not isinstance(dtype, Dtype) or type(shape) is not tuple or not isinstance(chunks, list):
        msg = f"{key}: its shape or dtype is not as DCP writes it"
        raise BadForeign(msg)
    extents = {c.get("offsets"): c.get("sizes") for c in chunks if isinstance(c, Made)}
    shards = []
    for offset, shard in places:
        size = extents.get(offset)
        if size is None or len(size) != len(shape):
            msg = f"{key}: a shard lies at {offset}, where none is announced"
            raise BadForeign(msg)
        shards.append(msgspec.structs.replace(shard, box=Box(tuple(offset), tuple(size))))
    return Key(dtype.name, shape, tuple(shards))


# --- reading ----------------------------------------------------------------------------------------------------------------


class _Reader:
    """One folder being read."""

    def __init__(self, place: Place, folder: str, options: ReadOptions) -> None:
        self.place, self.options = place, options
        self.lead = f"{folder}/" if folder else ""
        self.out = Checkpoint(TORCH_DIST.name)
        self.index = {_CHAINED.sub("", k): v for k, v in read_index(place, folder).items()}
        self.objects = Objects(place)
        self.arguments: dict[str, Any] = {}

    def checkpoint(self) -> Checkpoint:
        """All of it."""
        out = self.out
        common = self._common()
        optimizer = common.pop("optimizer", None)
        skip = self.options.hints.get("optimizer") == "skip"
        for key, entry in self.index.items():
            if entry.dtype and not key.startswith("optimizer."):
                self._tensors(MODEL, key, entry, "")
            elif entry.dtype and key.startswith("optimizer.state.") and not skip:
                slot, _, model_key = key.removeprefix("optimizer.state.").partition(".")
                self._tensors(STATE, model_key, entry, "." + MASTERS.get(slot, slot))
        _join_gates(out)
        states = []
        if skip:
            out.notes.append("the optimizer is left out, as the hint says")
        else:
            states = ([optimizer_state(optimizer)] if optimizer is not None else []) + self._flat_buffers()
        if states:
            merged = OptimizerState([], None, {})
            for state in states:
                merged.groups += [g for g in state.groups if g not in merged.groups]
                merged.step = state.step if merged.step is None else merged.step
                merged.rest |= state.rest
            add_optimizer(out, merged, self.options.hints)
        pair_masters(out)
        check_masters(self.place, out)
        self._sharded_objects()
        self._common_objects(common)
        self.objects.note(out)
        return out

    # --- objects ----------------------------------------------------------------------------------------------------------------

    def _common(self) -> dict[str, Any]:
        name, entry = f"{self.lead}common.pt", self.index.get("common_state/shard_0_1")
        if name in self.place.files:
            value = self.objects.plain(read_torch(self.place.reader(name), self.place.files[name]), "common", name)
        elif entry is not None:
            value = self._value("common_state/shard_0_1", entry)
        else:
            msg = f"{self.place.label}: neither common.pt nor a common_state"
            raise BadForeign(msg, remedy="is the folder complete?")
        if not isinstance(value, dict):
            msg = f"{self.place.label}: the common state is no dict"
            raise BadForeign(msg)
        arguments = value.get("args")
        self.arguments = arguments if isinstance(arguments, dict) else {}
        return value

    def _value(self, key: str, entry: Key) -> Any:
        """What a ShardedObject holds: it is saved in a list of one."""
        if len(entry.shards) != 1:
            msg = f"{key}: in {len(entry.shards)} places"
            raise BadForeign(msg)
        shard = entry.shards[0]
        value = read_blob(self.place, shard)
        value = value[0] if isinstance(value, list) and len(value) == 1 else value
        return self.objects.plain(value, key, shard.file, shard.begin)

    def _sharded_objects(self) -> None:
        out, kept, full, looked = self.out, [], 0, 0
        for key, entry in self.index.items():
            found = _OBJECT.fullmatch(key)
            if entry.dtype or not found or key.startswith(("common_state/", "optimizer.distributed.")):
                continue
            if found[1].endswith("._extra_state"):
                kept.append(key)
                looked += 1
                if looked <= EXTRA_STATES_MAX and not _is_empty(self._value(key, entry)):
                    full += 1
                continue
            at, shape = [int(n) for n in found[2].split(".")], [int(n) for n in found[3].split(".")]
            rank = sum(a * prod(shape[i + 1 :]) for i, a in enumerate(at))
            out.per_rank.setdefault(rank, {})[f"extras.{found[1]}"] = self._value(key, entry)
        if kept:
            out.objects["extras.extra_state"] = sorted({_stacked_name(_OBJECT.sub(r"\1", k)) for k in kept})
        if full:
            out.notes.append(
                f"{full} of {len(kept)} `_extra_state` objects (FP8 scaling) are not carried over: their history starts anew"
            )

    def _common_objects(self, common: Mapping[str, Any]) -> None:
        out = self.out
        iteration = common.get("iteration")
        if isinstance(iteration, int):
            out.objects["step"] = iteration
        keep_common(out, common)
        if out.per_rank:
            out.objects["extras.rng_grid"] = [self._mesh()[1], self._mesh()[0]]
        padded, true = self.arguments.get("padded_vocab_size"), self.arguments.get("vocab_size")
        if isinstance(padded, int) and isinstance(true, int) and padded != true:
            out.notes.append(f"the vocabulary is padded from {true} to {padded} rows, which are kept")

    def _mesh(self) -> tuple[int, int]:
        """(tensor-parallel, pipeline-parallel) size."""
        for key in self.index:
            if key.startswith("rng_state/shard_") and (found := _OBJECT.fullmatch(key)) and found[3].count(".") == 1:
                pp, tp = (int(n) for n in found[3].split("."))
                return tp, pp
        said = [
            {**self.arguments, **self.options.hints}.get(k) for k in ("tensor_model_parallel_size", "pipeline_model_parallel_size")
        ]
        if isinstance(said[0], int) and isinstance(said[1], int):
            return said[0], said[1]
        msg = f"{self.place.label}: nothing says with which tensor and pipeline parallelism it was written"
        raise BadArgument(msg, remedy='give the hints "tensor_model_parallel_size" and "pipeline_model_parallel_size"')

    # --- tensors ----------------------------------------------------------------------------------------------------------------

    def _placed(self, key: str, entry: Key) -> Iterator[Row]:
        """A row for each shard."""
        for shard in entry.shards:
            value = read_blob(self.place, shard)
            box = shard.box
            if not isinstance(value, Stored) or box is None or value.dtype != entry.dtype or value.shape != box.extent:
                msg = f"{key}: {shard.file} holds no {entry.dtype} tensor of the box {box} at byte {shard.begin}"
                raise BadForeign(msg)
            yield Row(box, self.out.file(shard.file, self.place.files[shard.file]), shard.begin + value.begin, value.stride)

    def _tensors(self, prefix: str, key: str, entry: Key, suffix: str) -> None:
        """A key's tensors: one for each layer and expert that it stacks."""
        stacked = layout.STACKED.fullmatch(key)
        key = _EXPERT_KEY.sub(r".experts.local_experts.\1.", key)
        experts = ".experts.experts." in key
        axes = int(bool(stacked)) + int(experts)
        if axes > len(entry.shape) or prod(entry.shape[:axes]) > LAYERS_MAX:
            msg = f"{key}: {list(entry.shape)} is no stack of layers"
            raise BadForeign(msg)
        item, shape = ITEM_BYTES[entry.dtype], entry.shape[axes:]
        found: dict[tuple[int, ...], list[Row]] = {}
        for row in self._placed(key, entry):
            for part in np.ndindex(*row.box.extent[:axes]):
                at = tuple(map(int, part))
                start = tuple(a + b for a, b in zip(at, row.box.start, strict=False))
                skip = sum(a * s for a, s in zip(at, row.strides, strict=False))
                found.setdefault(start, []).append(
                    Row(Box(row.box.start[axes:], row.box.extent[axes:]), row.file, row.begin + skip * item, row.strides[axes:])
                )
        for at in np.ndindex(*entry.shape[:axes]):
            name = f"{stacked[1]}.{int(at[0])}.{stacked[2]}" if stacked else key
            if experts:
                name = name.replace(".experts.experts.", f".experts.local_experts.{int(at[-1])}.")
            self.out.add(f"{prefix}{name}{suffix}", entry.dtype, shape, found.get(tuple(map(int, at)), []))

    # --- flat buckets -------------------------------------------------------------------------------------------------------------

    def _flat_buffers(self) -> list[OptimizerState]:
        """`dp_reshardable`: buckets of every (tensor, pipeline) rank become its parameters' boxes."""
        buckets: dict[tuple[int, int], dict[int, dict[str, Key]]] = {}
        dtypes: dict[tuple[int, int], str] = {}
        states = []
        for key, entry in self.index.items():
            if found := _BUCKET.fullmatch(key):
                place = (int(found[1]), int(found[2]))
                buckets.setdefault(place, {}).setdefault(int(found[4]), {})[found[5]] = entry
                dtypes[place] = found[3]
            elif (found := _GROUP_STATE.fullmatch(key)) and found[2] in {"optimizer", "grad_scaler"} and not entry.dtype:
                states.append(optimizer_state({found[2]: self._value(key, entry)}))
        if not buckets:
            return states
        tp, pp = self._mesh()
        if set(buckets) != {(i, 0) for i in range(tp * pp)}:
            msg = f"{self.place.label}: buffers {sorted(buckets)[:4]} ..., for TP {tp} and PP {pp}"
            raise BadForeign(
                msg, remedy="dp_reshardable is read with one buffer per rank: save once with --dist-ckpt-optim-fully-reshardable"
            )
        decoder = FlatDecoder(self.place, self.out, tp)
        weights = {n.removeprefix(MODEL): t.dtype for n, t in self.out.tensors.items() if n.startswith(MODEL)}
        layers = 1 + max((int(m[2]) for n in weights if (m := layout.LAYER.fullmatch(n))), default=-1)
        stages = layout.stages(layers, pp, self.arguments)
        for (rank, _), held in sorted(buckets.items()):
            buffer = self._buffer(dtypes[rank, 0], [held[b] for b in sorted(held)])
            stage = rank // tp
            here = [n for n, d in weights.items() if d == buffer.dtype and layout.stage_of(n, stages) == stage]
            tied = (
                [layout.EMBEDDING]
                if pp > 1 and stage == pp - 1 and layout.EMBEDDING in weights and layout.OUTPUT not in weights
                else []
            )
            given = self.options.hints.get("params")
            orders = [[n for n in given if n in here]] if given else layout.registration_orders(here)
            decoder.decode(f"tensor rank {rank % tp}, pipeline stage {stage}", rank % tp, ([*o, *tied] for o in orders), buffer)
        return states

    def _buffer(self, dtype: str, buckets: Sequence[Mapping[str, Key]]) -> Buffer:
        code = next((c for c, n in TORCH_NAMES.items() if dtype.startswith((f"(torch.{n},", f"torch.{n}"))), "")
        sizes = [next(iter(b.values())).shape[0] for b in buckets]
        slots: dict[str, list[Row]] = {}
        for number, bucket in enumerate(buckets):
            before = sum(sizes[:number])
            for slot, entry in bucket.items():
                if entry.dtype != "F32" or entry.shape != (sizes[number],):
                    msg = f"{self.place.label}: bucket {number} has {slot} as {entry.dtype}{list(entry.shape)}; F32 of {sizes[number]} elements is read"
                    raise BadForeign(msg, remedy="save once with --dist-ckpt-optim-fully-reshardable")
                slots.setdefault(slot, []).extend(r.moved((r.box.start[0] + before,)) for r in self._placed(slot, entry))
        edges = {sum(sizes)} | {r.box.start[0] for r in next(iter(slots.values()))}
        return Buffer(
            code, sum(sizes), {s: sorted(r, key=lambda r: r.box.start) for s, r in slots.items()}, sizes, frozenset(edges)
        )


def _stacked_name(key: str) -> str:
    """A key without the numbers of layer and expert."""
    found = layout.LAYER.fullmatch(key)
    return _EXPERT_KEY.sub(".experts.experts.", f"{found[1]}.{found[3]}" if found else key)


def _is_empty(value: Any) -> bool:
    return value is None or (isinstance(value, np.ndarray) and value.size == 0) or value in ({}, [], b"")


def _join_gates(out: Checkpoint) -> None:
    """Gate and value that `singleton_local_shards` stores under two keys become one tensor."""
    for name in [n for n in out.tensors if re.search(r"linear_fc1\.(weight|bias)_w(\.\w+)?$", n)]:
        other = re.sub(r"_w(\.\w+)?$", r"_v\1", name)
        gate, value = out.tensors.pop(name), out.tensors.pop(other, None)
        if value is None or value.shape != gate.shape or value.dtype != gate.dtype:
            msg = f"{name}: the other half, {other}, is missing or of another shape"
            raise BadForeign(msg)
        moved = [r.moved((r.box.start[0] + gate.shape[0], *r.box.start[1:])) for r in value.rows]
        whole = (2 * gate.shape[0], *gate.shape[1:])
        out.tensors[re.sub(r"_w(\.\w+)?$", r"\1", name)] = Tensor(gate.dtype, whole, (*gate.rows, *moved))
