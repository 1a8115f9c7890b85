"""torch.distributed.checkpoint: folders of `.metadata` and `.distcp` files ("dcp"), and of safetensors files with sharding info ("dcp-safetensors").

    .metadata             a pickle: for each key dtype, shape and chunks; for each chunk (key, offset) a file, a first byte and a length
    __<rank>_<n>.distcp   one complete torch.save blob per chunk, and one per object
    __<rank>.metadata     instead of `.metadata`, where ranks saved without talking to each other

Keys are nested dicts joined with dots; which of them are a model's and which an optimizer's follows from the keys themselves (`Names`): `model.`/`optim.`,
the model at the root beside `optimizer.` (torchtitan), `app.model.`; Accelerate's two folders; an optimizer's parameters by name, one group after the
other (`param_groups.0.lr`) or flattened (`param_groups.<fqn>.lr`). What is neither becomes `extras.<root>`, and is written back to that root.

What `.metadata` says of a chunk is compared with the chunk itself. For uneven FSDP2 x TP torch 2.13 writes wrong offsets (pytorch#161368): where the chunks'
own shapes leave one mesh that explains them, they are placed as the mesh places them, `chunk(chunk(dim, tp), dp)`, and a note says so.

`CkptdWriter` and `CkptdReader` (`ckptd.integrations.dcp_live`) are given out here: `dcp.save(state, storage_writer=CkptdWriter(path))`.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from math import prod
from typing import Any

import msgspec
import numpy as np

from ckptd.core import tensorfile, typed
from ckptd.core.boxes import Box, Shape, chunk
from ckptd.core.emit import Known, OutFile, Segment, Taken, boxed, tensor_file, torch_file
from ckptd.core.logical import GROUPS, Checkpoint, Row, Tensor, row_of
from ckptd.core.pickles import Dtype, Global, Made
from ckptd.core.pickling import Call, call, dumps
from ckptd.errors import BadArgument, BadForeign, BadImage, NotFound, Unstorable
from ckptd.formats import Place, Plan, ReadOptions, WriteOptions, check_settings
from ckptd.integrations.dcp_read import Reader, assemble
from ckptd.integrations.native import AsTensor
from ckptd.integrations.torch_state import Outgoing, listed, truth

_METADATA = re.compile(r"((?:.*/)?)(?:\.metadata|__\d+\.metadata)")
_PARTS = re.compile(r"(?:pytorch_model_fsdp|optimizer)(?:_\d+)?|model|optim")
"""Folders that are parts of one checkpoint: Accelerate's, and what loops of one's own call them."""
SHARDING, OBJECTS = "DCP_SHARDING_INFO", "ckptd_objects"


def __getattr__(name: str) -> Any:
    """The live pair, which needs torch."""
    if name in {"CkptdReader", "CkptdWriter"}:
        from ckptd.integrations import dcp_live

        return getattr(dcp_live, name)
    raise AttributeError(name)


# --- the formats ------------------------------------------------------------------------------------------------------------


class Dcp:
    """The format "dcp"."""

    name = "dcp"
    title = "torch.distributed.checkpoint: .metadata and .distcp files (FSDP2, torchtitan, Accelerate)"

    def probe(self, place: Place) -> bool:
        """See Format. A folder of Megatron's is one of these with a `metadata.json` that names its backend."""
        folders = _folders(place)
        return bool(folders) and not any(f"{f}metadata.json" in place.files for f in folders)

    def read(self, place: Place, options: ReadOptions) -> Checkpoint:
        """See Format. `tag`: a folder, or the number in its name. Hint `params`: see "torch"."""
        out = Checkpoint(self.name)
        reader = Reader(place, out)
        for folder in _chosen(_folders(place), options.tag, place):
            reader.folder(folder)
        reader.finish(listed(options.hints.get("params")))
        return out

    def write(self, checkpoint: Checkpoint, options: WriteOptions) -> Plan:
        """See Format. `ranks`: files. `config`: `flatten` (param groups by parameter, as flatten_optimizer_state_dict wants them),
        `defaults` ("false": hyper-parameters that torch's Adam asks for are not added)."""
        _check_options(options, {"flatten", "defaults"}, self.name)
        return _Writer(Outgoing(checkpoint, options, "DCP"), options).plan()


DCP = Dcp()


def _folders(place: Place) -> list[str]:
    """Folders with `.metadata`, at the place or one level below."""
    return sorted({m[1] for n in place.files if n.count("/") < 2 and (m := _METADATA.fullmatch(n))}) if not place.only else []


def _chosen(folders: Sequence[str], tag: str, place: Place) -> list[str]:
    """The folders of one checkpoint."""
    if "" in folders and not tag:
        return [""]
    if folders and not tag and all(_PARTS.fullmatch(f.rstrip("/")) for f in folders):
        firsts = [next(g) for _, g in groupby(sorted(folders, key=_number_in), key=lambda f: f.partition("_")[0])]
        return sorted(set(firsts))
    wanted = [f for f in folders if not tag or tag in {f.rstrip("/"), str(_number_in(f))}]
    if not wanted:
        msg = f"{place.label}: no folder is {tag!r}"
        raise NotFound(msg, remedy="there are " + ", ".join(f.rstrip("/") for f in folders))
    return [max(wanted, key=_number_in)]


def _number_in(folder: str) -> int:
    numbers = re.findall(r"\d+", folder)
    return int(numbers[-1]) if numbers else -1


def _check_options(options: WriteOptions, known: set[str], target: str) -> None:
    check_settings(options, known, target)
    if options.ranks < 1 or (options.tp, options.pp) != (1, 1):
        msg = f"{options.ranks} ranks with tp {options.tp} and pp {options.pp}"
        raise BadArgument(msg, remedy="give --ranks alone: dcp.load cuts to any mesh")


def cuts(shape: Shape, ranks: int) -> Iterator[tuple[int, Box]]:
    """(rank, box), as FSDP2 cuts: along the first dimension. A number, or a tensor without elements, is rank 0's."""
    if not shape or not prod(shape):
        yield 0, Box.whole(shape)
        return
    for rank in range(ranks):
        start, size = chunk(shape[0], ranks, rank)
        if size:
            yield rank, Box((start, *(0 for _ in shape[1:])), (size, *shape[1:]))


# --- writing .distcp --------------------------------------------------------------------------------------------------------

_META = "torch.distributed.checkpoint.metadata"
ADAM = {
    "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0, "amsgrad": False, "maximize": False, "foreach": None, "capturable": False,
    "differentiable": False, "fused": None, "decoupled_weight_decay": True,
}  # fmt: skip
"""What a param group of torch 2.13's AdamW has. dcp.load refuses a checkpoint that lacks one of its keys."""


def _made(name: str, state: Any = None, module: str = _META) -> Made:
    return Made(Global(module, name), (), state)


def _size(numbers: Sequence[int]) -> Call:
    return call("torch:Size", tuple(numbers))


@dataclass(slots=True)
class _Writer:
    """Blobs and their metadata being laid out."""

    parts: Outgoing
    options: WriteOptions
    segments: dict[int, list[Segment]] = field(default_factory=dict)
    at: dict[int, int] = field(default_factory=dict)
    described: dict[str, Any] = field(default_factory=dict)
    stored: dict[Made, Made] = field(default_factory=dict)
    paths: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    places: dict[str, list[tuple[Box, Made]]] = field(default_factory=dict)
    count: int = 0

    def plan(self) -> Plan:
        flat = truth(self.options.config.get("flatten"))
        for fqn, name in self.parts.weights():
            self._tensor(f"model.{fqn}", name, self.parts.dtype(name), ("model", fqn))
        self._optimizer(flat=flat)
        for name, value in self.parts.objects().items():
            if isinstance(value, Taken) and f"extras.{name}" in self.parts.source.tensors:
                self._tensor(name, f"extras.{name}", value.dtype, tuple(name.split(".")))
            else:
                for path, item in _leaves(value, (name,)):
                    self._object(".".join(map(str, path)), item, path)
        files = [OutFile(f"__{r}_0.distcp", tuple(s)) for r, s in sorted(self.segments.items())]
        meta = _made(
            "Metadata",
            {
                "state_dict_metadata": self.described,
                "planner_data": self.paths,
                "storage_data": self.stored,
                "storage_meta": _made("StorageMeta", {"checkpoint_id": None, "save_id": "ckptd", "load_id": None, "modules": []}),
                "version": "1.0.0",
            },
        )
        files.append(OutFile(".metadata", (Known(dumps(meta)),)))
        return Plan(files, dropped=self.parts.dropped, notes=self.parts.notes)

    def _optimizer(self, *, flat: bool) -> None:
        """State and groups, under the keys that torch's loader asks for."""
        parts = self.parts

        def state_path(fqn: str, slot: str) -> tuple[Any, ...]:
            return ("optim", f"state.{fqn}.{slot}") if flat else ("optim", "state", fqn, slot)

        slots = parts.slots()
        for fqn, held in slots.items():
            for slot, name in held.items():
                self._tensor(name, name, parts.source.tensors[name].dtype, state_path(fqn, slot))
        for fqn, values in parts.scalars().items():
            for slot, value in values.items():
                self._object(f"optim.state.{fqn}.{slot}", value, state_path(fqn, slot))
        groups = parts.groups()
        adam = any("exp_avg" in s for s in slots.values()) and truth(self.options.config.get("defaults", True))
        fill: Mapping[str, Any] = ADAM if adam else {}
        added = sorted({k for g in groups for k in fill if k not in g})
        if added:
            parts.notes.append(f"param groups get torch's defaults for what the source does not say: {', '.join(added)}")
        groups = [{**{k: v for k, v in fill.items() if k not in g}, **g} for g in groups]
        for path, value in _group_objects(groups, flat=flat):
            self._object(".".join(map(str, path)), value, path)

    def _put(self, rank: int, tree: Any) -> Made:
        """A blob into the rank's file; its storage info."""
        self.count += 1
        made = torch_file(tree, root=f"a{self.count}")  # roots differ, for their checksums are asked for by name
        size, begin = sum(s.nbytes for s in made), self.at.get(rank, 0)
        self.segments.setdefault(rank, []).extend(made)
        self.at[rank] = begin + size
        place = {"relative_path": f"__{rank}_0.distcp", "offset": begin, "length": size}
        return _made("_StorageInfo", place, "torch.distributed.checkpoint.filesystem")

    def _tensor(self, key: str, name: str, dtype: str, path: tuple[Any, ...]) -> None:
        """A tensor under a key; tied ones lie in one place under two keys."""
        shape = self.parts.source.tensors[name].shape
        if name not in self.places:
            self.places[name] = [(box, self._put(rank, boxed(name, dtype, box))) for rank, box in cuts(shape, self.options.ranks)]
        self._check_new(key)
        layout, encoding = call("torch.serialization:_get_layout", "torch.strided"), call(f"{_META}:_MEM_FORMAT_ENCODING", 0)
        chunks = []
        for box, info in self.places[name]:
            chunks.append(_made("ChunkStorageMetadata", {"offsets": _size(box.start), "sizes": _size(box.extent)}))
            self.stored[_made("MetadataIndex", {"fqn": key, "offset": _size(box.start), "index": None})] = info
        no = False
        properties = _made("TensorProperties", (Dtype(dtype), layout, no, encoding, no))
        self.described[key] = _made("TensorStorageMetadata", {"properties": properties, "size": _size(shape), "chunks": chunks})
        self.paths[key] = path

    def _object(self, key: str, value: Any, path: tuple[Any, ...]) -> None:
        self._check_new(key)
        self.stored[_made("MetadataIndex", {"fqn": key, "index": None})] = self._put(0, value)
        self.described[key] = _made("BytesStorageMetadata")
        self.paths[key] = path

    def _check_new(self, key: str) -> None:
        if key in self.described:
            msg = f"{key}: two parts of the checkpoint would have this key"
            raise Unstorable(msg, remedy="--drop objects, or rename one of them")


def _group_objects(groups: Sequence[Mapping[str, Any]], *, flat: bool) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """(path, value) of the param groups, as `flatten_state_dict` of torch 2.13 cuts them."""
    for i, group in enumerate(groups):
        for key, value in group.items():
            if not flat:
                yield ("optim", "param_groups", i, key), value
            elif key != "params":
                for fqn in group["params"]:
                    yield ("optim", f"param_groups.{fqn}.{key}"), value


def _leaves(value: Any, path: tuple[Any, ...]) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """(path, value) of an object's leaves, as `traverse_state_dict` of torch 2.13 goes through it."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _leaves(item, (*path, str(key)))
    elif isinstance(value, list) and not _is_leaf(value):
        for i, item in enumerate(value):
            yield from _leaves(item, (*path, i))
    else:
        yield path, value


def _is_leaf(value: Any) -> bool:
    if isinstance(value, dict):
        return False
    return not isinstance(value, list) or not any(isinstance(v, Taken) or (isinstance(v, dict | list) and not _is_leaf(v)) for v in value)


# --- safetensors with sharding info -----------------------------------------------------------------------------------------


class DcpSafetensors:
    """The format "dcp-safetensors"."""

    name = "dcp-safetensors"
    title = "HuggingFaceStorageWriter's shards: safetensors files with DCP_SHARDING_INFO"

    def probe(self, place: Place) -> bool:
        """See Format."""
        names = _shards(place)
        if not names:
            return False
        try:
            head = tensorfile.parse(place.reader(names[0]), place.files[names[0]]).metadata
        except (BadForeign, BadImage, NotFound):
            return False
        return SHARDING in head and "ckptd" not in head

    def read(self, place: Place, options: ReadOptions) -> Checkpoint:
        """See Format. Objects are read where ckptd wrote them."""
        out = Checkpoint(self.name)
        parts: dict[str, list[tuple[str, Row]]] = {}
        values: dict[str, Any] = {}
        for name in _shards(place):
            held = tensorfile.parse(place.reader(name), place.files[name])
            number = out.file(name, place.files[name])
            starts = _starts(name, held.metadata.get(SHARDING, "{}"))
            for key, (dtype, shape, begin, _) in held.tensors.items():
                start = starts.get(key, (0,) * len(shape))
                if len(start) != len(shape) or min(start, default=0) < 0:
                    msg = f"{name}: {key} of {len(shape)} dimensions is said to begin at {list(start)}"
                    raise BadForeign(msg)
                parts.setdefault(key, []).append((dtype, row_of(Box(start, shape), number, begin)))
            if OBJECTS in held.metadata:
                values |= _objects_in(name, held.metadata[OBJECTS])
        tensors = {}
        for key, rows in parts.items():
            dims = {len(r.box.extent) for _, r in rows}
            dtypes = {d for d, _ in rows}
            if len(dims) != 1 or len(dtypes) != 1:
                msg = f"{key}: its parts differ in dtype or dimensions"
                raise BadForeign(msg)
            shape = tuple(max(r.box.stop[d] for _, r in rows) for d in range(dims.pop()))
            unique: dict[Box, Row] = {}
            again = [r for _, r in rows if r.box.numel and unique.setdefault(r.box, r) is not r]
            kept = [r for b, r in unique.items() if b.numel] or [rows[0][1]]
            tensors[key] = Tensor(dtypes.pop(), shape, tuple(kept), tuple(again))
        groups = {f"optim.param_groups.{i}": g for i, g in enumerate(values.pop(GROUPS, ()))}
        paths = {k: ("optim", "param_groups", i) for i, k in enumerate(groups)}
        extras = {k.removeprefix("extras."): v for k, v in values.items()}
        assemble(out, place, tensors, {**groups, **extras}, {**paths, **{k: (k,) for k in extras}}, listed(options.hints.get("params")))
        return out

    def write(self, checkpoint: Checkpoint, options: WriteOptions) -> Plan:
        """See Format. `ranks`: files. Objects stand in the first file's metadata, where `ckptd` finds them and torch does not."""
        _check_options(options, set(), self.name)
        parts = Outgoing(checkpoint, options, "DCP's safetensors form")
        slots, groups, objects = parts.slots(), parts.groups(), parts.objects()
        shards: dict[int, dict[str, tuple[str, str, Box]]] = {0: {}}
        named = [(f"model.{fqn}", n, parts.dtype(n)) for fqn, n in parts.weights()]
        named += [(n, n, checkpoint.tensors[n].dtype) for held in slots.values() for n in held.values()]
        for name in [n for n, v in objects.items() if isinstance(v, Taken) and f"extras.{n}" in checkpoint.tensors]:
            named.append((name, f"extras.{name}", objects.pop(name).dtype))
        for key, name, dtype in named:
            for rank, box in cuts(checkpoint.tensors[name].shape, options.ranks):
                shards.setdefault(rank, {})[key] = (name, dtype, box)
        kept = {n: v for n, v in checkpoint.objects.items() if n != GROUPS and n.removeprefix("extras.") in objects}
        if groups:
            kept[GROUPS] = checkpoint.groups or groups
        if "per_rank" in objects:
            kept["per_rank"] = {str(r): {n.removeprefix("extras."): v for n, v in held.items()} for r, held in checkpoint.per_rank.items()}
        if kept:
            parts.notes.append("stock dcp.load does not see objects in this form (param groups, step, extras): load the tensors, and set them in code")
        text = json.dumps(typed.encode(kept, "objects", _array_out))
        files = []
        for rank, held in sorted(shards.items()):
            info = {key: {"saved_offsets": list(box.start)} for key, (_, _, box) in held.items()}
            metadata = {"format": "pt", "DCP_VERSION": "1.0", SHARDING: json.dumps(info), **({OBJECTS: text} if kept and rank == 0 else {})}
            tensors = [(key, boxed(name, dtype, box)) for key, (name, dtype, box) in held.items()]
            files.append(OutFile(f"shard-{rank + 1:05}-model-00001-of-00001.safetensors", tensor_file(tensors, metadata)))
        return Plan(files, dropped=parts.dropped, notes=parts.notes)


DCP_SAFETENSORS = DcpSafetensors()


def _shards(place: Place) -> list[str]:
    """Its files: at the place, or in `sharded/`, where a save with consolidation leaves them."""
    if place.only:
        return [place.only] if place.only.endswith(".safetensors") else []
    shards = [n for n in place.files if n.endswith(".safetensors") and "/" not in n and n.startswith("shard-")]
    return shards or [n for n in place.files if n.endswith(".safetensors") and "/" not in n] or place.glob("sharded/*.safetensors")


def _starts(name: str, text: str) -> dict[str, Shape]:
    try:
        info = msgspec.json.decode(text, type=dict[str, dict[str, tuple[int, ...]]])
    except (msgspec.MsgspecError, RecursionError) as e:
        msg = f"{name}: {SHARDING}: {e}"
        raise BadForeign(msg) from e
    return {k: v["saved_offsets"] for k, v in info.items() if "saved_offsets" in v}


def _objects_in(name: str, text: str) -> dict[str, Any]:
    try:
        values = typed.decode(msgspec.json.decode(text), _array_in)
    except (msgspec.MsgspecError, RecursionError) as e:
        msg = f"{name}: {OBJECTS}: {e}"
        raise BadForeign(msg) from e
    if not isinstance(values, dict) or not isinstance(values.get(GROUPS, []), list):
        msg = f"{name}: {OBJECTS} is no table of objects"
        raise BadForeign(msg)
    return values


def _array_out(path: str, value: Any) -> tuple[str, str] | None:
    """An array of an object as text: dtype, shape and bytes."""
    if not isinstance(value, np.ndarray) or value.dtype.kind not in "biufc":
        return None
    del path
    kind = "tensor" if isinstance(value, AsTensor) else "ndarray"
    return kind, f"{value.dtype.str}|{','.join(map(str, value.shape))}|{base64.b64encode(np.ascontiguousarray(value).tobytes()).decode()}"


def _array_in(kind: str, text: str) -> np.ndarray[Any, Any]:
    dtype, shape, raw = text.split("|") if text.count("|") == 2 else text[1:].split("|")
    if not re.fullmatch(r"<?[biufc]\d{1,2}", dtype):
        msg = f"an array of {dtype!r}"
        raise ValueError(msg)
    made = np.frombuffer(base64.b64decode(raw, validate=True), np.dtype(dtype)).reshape([int(n) for n in shape.split(",") if n]).copy()
    return made.view(AsTensor) if kind == "tensor" else made

