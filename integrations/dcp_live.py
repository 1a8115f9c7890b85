"""`dcp.save` and `dcp.load` with ckptd's own checkpoints, by changing one argument:

    dcp.save(state, storage_writer=CkptdWriter("/checkpoints"))
    dcp.load(state, storage_reader=CkptdReader("/checkpoints"))

Each rank writes one image, the coordinator index and manifest: what `ckptd verify`, `ckptd convert`, a session's restore and stock safetensors read. The
state dict is any that DCP takes: nested, with DTensors and objects, its optimizer listed or flattened; a checkpoint of one form loads into the other.

What is better than with DCP's own files
- every byte has a checksum, looked at before a tensor is touched; no pickle; a save that did not end is no checkpoint;
- boxes follow from what a rank physically holds: uneven FSDP2 x TP is saved and loaded right, where DTensor's own offsets are wrong (pytorch#161368);
- each rank's objects are kept; a rank gets back its own if there is one, else the first one's.

Objects are those of typed JSON (`core.typed`); another one raises Unstorable with its path.
"""

from __future__ import annotations

import io
import mmap
import os
import re
import time
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, SavePlan, SavePlanner, WriteItemType
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.distributed.tensor import DTensor
from torch.futures import Future

from ckptd.core import checksum, typed
from ckptd.core.boxes import Box, Shape
from ckptd.core.image import Piece, lay_out
from ckptd.core.logical import GROUPS, MODEL, STATE
from ckptd.core.manifest import Index, Row, build_index, image_name
from ckptd.errors import BadArgument, NotFound, StateMismatch, Unstorable
from ckptd.integrations.dcp_read import Names, groups_of, nested
from ckptd.integrations.native import _merged
from ckptd.integrations.torch_state import STEP_KEYS
from ckptd.state import DTYPES, TORCH_DTYPES, box_of, local_of, stored_view
from ckptd.storage import absolute, checkpoint, open_store

JOB, SCALARS = "dcp", "optim.scalars"
BLOCKS_HELD = 64
"""Checked blocks of images that a reader keeps: neighbouring tensors share them."""
_GROUP_KEY = re.compile(r"(?:.*\.)?param_groups\.(.+)")
_STATE_KEY = re.compile(r"(?:.*?\.)?state\.(.+)")
_MODEL_KEY = re.compile(r"(?:app\.)?(?:model|model_state_dict|state_dict|module|net)\.(.+)")


@dataclass(frozen=True)
class _Where:
    """What the coordinator tells every rank of a save."""

    rank: int
    world: int
    attempt: int
    names: Names


class CkptdWriter(StorageWriter):
    """Writes a state dict as ckptd's images. `path`: a store's root (path or URL); `step`: by default what the state dict says under `step`, else
    the number at the end of the path."""

    def __init__(self, path: str | os.PathLike[str], *, job: str = JOB, step: int | None = None) -> None:
        super().__init__()
        checkpoint.check_job(job)
        self._url, self._job, self._step = absolute(path), job, step

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """See StorageWriter."""
        self._url = absolute(checkpoint_id) if checkpoint_id else self._url

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:  # noqa: FBT001  torch's signature
        """See StorageWriter."""
        del is_coordinator, args
        if not kwargs.get("use_collectives", True):
            msg = "CkptdWriter needs a coordinator: dcp.save(use_collectives=False) has none"
            raise BadArgument(msg, remedy="leave use_collectives as it is")

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """See StorageWriter."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """See StorageWriter."""
        if not all(p.usable for p in plans):
            msg = "CkptdWriter writes every save anew: a planner with enable_plan_caching has nothing for it"
            raise BadArgument(msg, remedy="leave enable_plan_caching off")
        items = [i for p in plans for i in p.items]
        tensors = [i.index.fqn for i in items if i.type is not WriteItemType.BYTE_IO]
        names = Names.of([i.index.fqn for i in items], dict.fromkeys(tensors))
        taken = [f.attempt or 0 for f in checkpoint.list_checkpoints(open_store(self._url), self._job)]
        where = [_Where(rank, len(plans), max(taken, default=0) + 1, names) for rank in range(len(plans))]
        return [replace(p, storage_data=w) for p, w in zip(plans, where, strict=True)]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """See StorageWriter."""
        where: _Where = plan.storage_data
        state: dict[str, Any] = getattr(planner, "state_dict", {})
        step = self._step_of(state, where.names)
        image = _Image(where.rank, where.names)
        image.tensors(plan, planner, state)
        image.objects(state, getattr(planner, "mappings", None) or {})
        store = open_store(self._url)
        directory = checkpoint.pick_directory(store, self._job, step, where.attempt)
        data = image.fill(self._job, where, step)
        digests = checksum.digests_of(data)
        checkpoint.write_image(store, directory, where.rank, data, digests)
        done: Future[list[WriteResult]] = Future()
        done.set_result([WriteResult(MetadataIndex(image_name(where.rank)), len(data), (where.rank, directory, digests))])
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """See StorageWriter."""
        del metadata
        written = [r.storage_data for of_rank in results for r in of_rank]
        directories = {d for _, d, _ in written}
        if len(directories) != 1:
            msg = f"ranks wrote different steps: {', '.join(sorted(directories))}"
            raise StateMismatch(msg, remedy="give CkptdWriter the step")
        store, directory = open_store(self._url), directories.pop()
        images = {rank: checkpoint.read_header(store, directory, rank) for rank, _, _ in written}
        checkpoint.write_manifest(store, directory, build_index(images, {r: d for r, _, d in written}), time.time())

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """See StorageWriter."""
        return bool(os.fspath(checkpoint_id))

    def _step_of(self, state: Mapping[str, Any], names: Names) -> int:
        if self._step is not None:
            return self._step
        for key in (*STEP_KEYS, *(f"{root}.{k}" for root in ("train_state", "trainer", "train") for k in STEP_KEYS)):
            value = state.get(key)
            if isinstance(value, Tensor) and value.numel() == 1 and names.split(key)[0] == "extras":
                value = int(value)
            if type(value) is int and value >= 0:
                return value
        number = re.search(r"(\d+)$", self._url)
        return int(number[1]) if number else 0


class _Image:
    """One rank's image being put together."""

    def __init__(self, rank: int, names: Names) -> None:
        self._rank, self._names = rank, names
        self._pieces: list[Piece] = []
        self._sources: dict[tuple[str, Box], Tensor] = {}
        self._objects: dict[str, Any] = {}

    def tensors(self, plan: SavePlan, planner: SavePlanner, state: Mapping[str, Any]) -> None:
        """What the plan gives this rank; of DTensors whose offsets torch gets wrong, what it holds as the first of its replicas."""
        for item in plan.items:
            fqn = item.index.fqn
            if item.type is WriteItemType.BYTE_IO or _is_misplaced(state.get(fqn)):
                continue
            assert item.tensor_data is not None  # noqa: S101  only BYTE_IO has none
            part = item.tensor_data.chunk
            self._add(self._named(fqn), tuple(item.tensor_data.size), Box(tuple(part.offsets), tuple(part.sizes)), planner.resolve_data(item))
        for fqn, value in state.items():
            if _is_misplaced(value) and _is_first(value):
                self._add(self._named(fqn), tuple(value.shape), box_of(fqn, value), value)

    def _named(self, key: str) -> str:
        kind, rest = self._names.split(key)
        return {"model": MODEL, "state": STATE, "extras": "extras."}.get(kind, "optim.param_groups.") + rest

    def _add(self, name: str, shape: Shape, box: Box, value: Any) -> None:
        local = local_of(value)
        if local.layout != torch.strided or local.is_quantized or local.is_meta:
            msg = f"{name}: {local.layout} tensors on {local.device} are not stored"
            raise Unstorable(msg, remedy="keep it dense and materialised, or leave it out")
        dtype, view = DTYPES.get(local.dtype), ""
        if dtype is None:
            item = local.element_size()
            dtype, view = "U8", str(local.dtype).removeprefix("torch.")
            shape, box = (*shape, item), Box((*box.start, 0), (*box.extent, item))
        if box.numel == 0 < prod(shape):
            return
        self._pieces.append(Piece(name, dtype, shape, box, view))
        self._sources[name, box] = stored_view(local.contiguous(), view)

    def objects(self, state: Mapping[str, Any], paths: Mapping[str, Sequence[Any]]) -> None:
        """All objects of this rank, also those that other ranks have too."""
        values = {k: v for k, v in state.items() if not isinstance(v, Tensor) and not hasattr(v, "local_shards")}
        kinds = {k: self._names.split(k) for k in values}
        grouped = {k: v for k, v in values.items() if kinds[k][0] == "groups"}
        if grouped:
            self._keep(GROUPS, "optimizer", groups_of(grouped, paths, self._names.optims))
        scalars: dict[str, dict[str, Any]] = {}
        for key in [k for k in values if kinds[k][0] == "state"]:
            fqn, _, slot = kinds[key][1].rpartition(".")
            scalars.setdefault(fqn, {})[slot] = values[key]
        if scalars:
            self._keep(SCALARS, "optimizer", scalars)
        for key in [k for k in values if kinds[k][0] == "model"]:
            self._keep(f"{MODEL}{kinds[key][1]}", "same", values[key])
        for name, value in nested({k: v for k, v in values.items() if kinds[k][0] == "extras"}, paths).items():
            self._keep("step" if name == "step" else f"extras.{name}", "same", value)

    def _keep(self, name: str, policy: str, value: Any) -> None:
        self._objects[name] = {"policy": policy, "value": typed.encode(value, name, self._put)}

    def _put(self, path: str, value: Any) -> tuple[str, str] | None:
        """An array or tensor inside an object becomes a piece."""
        if not isinstance(value, Tensor) and not (isinstance(value, np.ndarray) and value.dtype.kind in "biufc"):
            return None
        name = f"object/{path}@r{self._rank}"
        while any(p.name == name for p in self._pieces):
            name += "~"
        tensor = value if isinstance(value, Tensor) else torch.from_numpy(np.ascontiguousarray(value)).reshape(value.shape)
        self._add(name, tuple(tensor.shape), Box.whole(tensor.shape), tensor)
        return ("tensor" if isinstance(value, Tensor) else "ndarray"), name

    def fill(self, job: str, where: _Where, step: int) -> memoryview:
        """The image's bytes."""
        room = len(str(self._objects).encode())
        layout = lay_out(
            self._pieces, job=job, rank=where.rank, world_size=where.world, coords={"rank": where.rank}, aliases={}, objects_bytes=room
        )
        header = layout.render(attempt=where.attempt, step=step, objects=self._objects)
        memory = mmap.mmap(-1, layout.image_bytes)
        memory[: len(header)] = header
        with torch.no_grad():
            for entry in layout.entries:
                source = self._sources[entry.piece.name, entry.piece.box]
                if source.numel():
                    at = layout.header_bytes + entry.begin
                    torch.frombuffer(memory, dtype=source.dtype, count=source.numel(), offset=at).view(source.shape).copy_(source)
        return memoryview(memory)


def _is_misplaced(value: Any) -> bool:
    """Whether torch's own arithmetic may get the offsets of this DTensor wrong: those of parts that were cut twice along one dimension."""
    if not isinstance(value, DTensor) or value.device_mesh.get_coordinate() is None:
        return False
    return any(getattr(p, "split_factor", 1) > 1 for p in value.placements)


def _is_first(value: DTensor) -> bool:
    """Whether this rank is the first of those that hold the same part."""
    at = value.device_mesh.get_coordinate()
    return at is not None and not any(a for a, p in zip(at, value.placements, strict=True) if p.is_replicate())


# --- reading ----------------------------------------------------------------------------------------------------------------


class _Keys(dict[str, Any]):
    """`state_dict_metadata` under the checkpoint's own names, that also answers to the names that a state dict gives them."""

    def __init__(self, held: Mapping[str, Any], reader: CkptdReader) -> None:
        super().__init__(held)
        self._reader = reader

    def __contains__(self, key: object) -> bool:
        return super().__contains__(key) or (isinstance(key, str) and self._reader.described(key) is not None)

    def __missing__(self, key: str) -> Any:
        found = self._reader.described(key)
        if found is None:
            raise KeyError(key)
        return found


class CkptdReader(StorageReader):
    """Reads ckptd's checkpoints: of a session, of CkptdWriter, or converted. `path`: a store's root, a job's or a step's directory; the newest
    step, unless `step` says which."""

    def __init__(self, path: str | os.PathLike[str], *, job: str | None = None, step: int | None = None) -> None:
        super().__init__()
        self._url, self._job, self._step = absolute(path), job, step
        self._blocks: OrderedDict[tuple[int, int], bytes] = OrderedDict()
        self._index: Index | None = None

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """See StorageReader."""
        self._url = absolute(checkpoint_id) if checkpoint_id else self._url
        self._index = None
        self._blocks.clear()

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """See StorageReader."""
        del args, kwargs
        index = self._open()
        held = {n: self._tensor_metadata(n) for n in index.tensors if not n.startswith("object/")}
        return Metadata(_Keys(held, self), planner_data={}, storage_data={}, storage_meta=StorageMeta(self._url))

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:  # noqa: FBT001  torch's signature
        """See StorageReader."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """See StorageReader."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """See StorageReader."""
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """See StorageReader."""
        state: dict[str, Any] = getattr(planner, "state_dict", {})
        for item in plan.items:
            key = item.dest_index.fqn
            if item.type is LoadItemType.BYTE_IO:
                data = io.BytesIO()
                torch.save(self._object(key), data)
                data.seek(0)
                planner.load_bytes(item, data)
            elif not _is_misplaced(state.get(key)):
                start = [a + b for a, b in zip(item.storage_index.offset or (), item.storage_offsets, strict=True)]
                target = planner.resolve_tensor(item)
                self._fill(key, Box(tuple(start), tuple(item.lengths)), target.detach())
                planner.commit_tensor(item, target)
        for key, value in state.items():
            if _is_misplaced(value):
                self._fill(key, box_of(key, value), local_of(value))
        done: Future[None] = Future()
        done.set_result(None)
        return done

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """See StorageReader."""
        return bool(os.fspath(checkpoint_id))

    # --- what is there

    def _open(self) -> Index:
        if self._index is None:
            store = open_store(self._url)
            try:
                self._directory = ""
                _, self._index = checkpoint.read_checkpoint(store, "")
            except NotFound:
                found = [f for f in checkpoint.list_checkpoints(store, self._job) if f.ok and self._step in {None, f.step}]
                if not found:
                    above, _, name = self._url.rpartition("/")
                    found = [f for f in checkpoint.list_checkpoints(open_store(above), name) if f.ok and self._step in {None, f.step}] if above else []
                    self._url = above if found else self._url
                if not found:
                    msg = f"{self._url}: no checkpoint of ckptd's" + (f" of step {self._step}" if self._step is not None else "")
                    raise NotFound(msg) from None
                self._directory = found[0].directory
                _, self._index = checkpoint.read_checkpoint(open_store(self._url), self._directory)
            self._store = open_store(self._url)
            self._groups: list[dict[str, Any]] | None = None
        return self._index

    def described(self, key: str) -> Any:
        """The metadata of what a state dict calls `key`; None if there is nothing of it."""
        name = self._tensor_name(key)
        if name is not None:
            return self._tensor_metadata(name)
        try:
            self._object(key)
        except KeyError:
            return None
        return BytesStorageMetadata()

    def _tensor_name(self, key: str) -> str | None:
        index = self._open()
        names = [key]
        if match := _STATE_KEY.fullmatch(key):
            names.append(STATE + match[1])
        if match := _MODEL_KEY.fullmatch(key):
            names.append(MODEL + match[1])
        return next((n for n in (*names, MODEL + key, f"extras.{key}") if n in index.tensors), None)

    def _tensor_metadata(self, name: str) -> TensorStorageMetadata:
        index = self._open()
        info = index.tensors[name]
        cut = -1 if info.view else None
        dtype = getattr(torch, info.view) if info.view else TORCH_DTYPES[info.dtype]
        chunks = [ChunkStorageMetadata(torch.Size(r.box.start[:cut]), torch.Size(r.box.extent[:cut])) for r in index.rows[name]]
        return TensorStorageMetadata(TensorProperties(dtype=dtype), torch.Size(info.shape[:cut]), chunks)

    # --- tensors

    def _fill(self, key: str, box: Box, target: Tensor) -> None:
        """The elements of a box into `target`, which has its shape."""
        name, index = self._tensor_name(key), self._open()
        assert name is not None  # noqa: S101  it was planned
        info = index.tensors[name]
        if tuple(target.shape) != box.extent:
            msg = f"{key}: a part of shape {list(target.shape)} is to hold {box}"
            raise StateMismatch(msg)
        with torch.no_grad():
            for row in index.rows[name]:
                whole = row.box if not info.view else Box(row.box.start[:-1], row.box.extent[:-1])
                common = whole.intersect(box)
                if common is not None:
                    there = self._part(row, info.dtype, info.view, whole, common)
                    here = common.relative_to(box)
                    target[tuple(slice(a, b) for a, b in zip(here.start, here.stop, strict=True))] = there

    def _part(self, row: Row, dtype: str, view: str, whole: Box, wanted: Box) -> Tensor:
        """A box of a row: read from its first to its last slice along the first dimension."""
        kind = getattr(torch, view) if view else TORCH_DTYPES[dtype]
        inner = wanted.relative_to(whole)
        first, count = (inner.start[0], inner.extent[0]) if inner.extent else (0, 1)
        slab = prod(whole.extent[1:]) * kind.itemsize
        data = self._bytes(row.image, row.begin + first * slab, row.begin + (first + count) * slab)
        shape = (count, *whole.extent[1:]) if inner.extent else ()
        made = torch.frombuffer(data, dtype=kind).view(shape)
        if not inner.extent:
            return made
        return made[(slice(None), *(slice(a, b) for a, b in zip(inner.start[1:], inner.stop[1:], strict=True)))]

    def _bytes(self, image: int, begin: int, end: int) -> bytearray:
        """Bytes of an image, their blocks checked. Raises ChecksumMismatch."""
        data = bytearray(end - begin)
        for block, lo, hi in self._checked(image, begin, end):
            at = block * checksum.BLOCK_BYTES
            data[lo - begin : hi - begin] = self._block(image, block)[lo - at : hi - at]
        return data

    def _checked(self, image: int, begin: int, end: int) -> Iterator[tuple[int, int, int]]:
        size = self._open().images[image].image_bytes
        for block in checksum.blocks_of(begin, end):
            lo, hi = checksum.extent_of(block, size)
            yield block, max(lo, begin), min(hi, end)

    def _block(self, image: int, block: int) -> bytes:
        held = self._blocks.get((image, block))
        if held is None:
            info = self._open().images[image]
            begin, end = checksum.extent_of(block, info.image_bytes)
            name = f"{self._directory}/{image_name(image)}".lstrip("/")
            data = bytearray(end - begin)
            self._store.get(name, begin, memoryview(data))
            held = bytes(data)
            checksum.check_block(name, block, held, info.digests)
            self._blocks[image, block] = held
            while len(self._blocks) > BLOCKS_HELD:
                self._blocks.popitem(last=False)
        return held

    # --- objects

    def _object(self, key: str) -> Any:
        """What stands under a flattened key. Raises KeyError."""
        if match := _GROUP_KEY.fullmatch(key):
            return self._hyper(key, match[1])
        if match := _STATE_KEY.fullmatch(key):
            fqn, _, slot = match[1].rpartition(".")
            return self._decoded(SCALARS)[fqn][slot]
        if match := _MODEL_KEY.fullmatch(key):
            return self._decoded(MODEL + match[1])
        if key == "step":
            return self._open().step
        parts = key.split(".")
        value = self._decoded(f"extras.{parts[0]}")
        while len(parts) > 1:
            parts.pop(0)
            if isinstance(value, Mapping):
                name = next((n for i in range(len(parts), 0, -1) if (n := ".".join(parts[:i])) in value), parts[0])
                value = value[name]
                parts = parts[name.count(".") :]
            elif isinstance(value, list | tuple) and parts[0].isdecimal() and int(parts[0]) < len(value):
                value = value[int(parts[0])]
            else:
                raise KeyError(key)
        return value

    def _hyper(self, key: str, rest: str) -> Any:
        """A hyper-parameter: of a group by number, or of a parameter."""
        if self._groups is None:
            index = self._open()
            self._groups = _merged([self._decoded(GROUPS, rank) for rank in sorted(index.images) if GROUPS in index.images[rank].objects])
        owner, _, name = rest.rpartition(".")
        if owner.isdecimal() and int(owner) < len(self._groups) and name in self._groups[int(owner)]:
            return self._groups[int(owner)][name]
        for group in self._groups:
            if owner in group["params"]:
                return group[name]
        raise KeyError(key)

    def _decoded(self, name: str, rank: int | None = None) -> Any:
        """An object: of the given rank, else of this one, else of the first that has it. Raises KeyError."""
        images = self._open().images
        mine = dist.get_rank() if dist.is_initialized() else 0
        for number in [rank] if rank is not None else [mine, *sorted(images)]:
            entry = images[number].objects.get(name) if number in images else None
            if entry is not None:
                return typed.decode(entry["value"] if isinstance(entry, dict) and "value" in entry else entry, self._array)
        raise KeyError(name)

    def _array(self, kind: str, reference: str) -> Any:
        row, info = self._open().rows[reference][0], self._open().tensors[reference]
        whole = Box(row.box.start[:-1], row.box.extent[:-1]) if info.view else row.box
        made = self._part(row, info.dtype, info.view, whole, whole) if whole.numel else torch.empty(whole.extent, dtype=TORCH_DTYPES[info.dtype])
        return made.clone() if kind == "tensor" else made.clone().numpy()
