"""Reading DCP's folders: `.metadata`, the blobs that it names, and what its keys mean. Formats and writers are in `dcp`.

What `.metadata` says of a chunk is compared with the chunk itself: of each blob its headers and its pickle are read, never its elements. Blobs of one
dtype, shape and length differ in nothing before their elements, so from the second on it is enough that they do.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import msgspec

from ckptd.core.archive import Tensor as Stored
from ckptd.core.archive import part, read_torch
from ckptd.core.boxes import Box, Shape, chunk, prove_tiles
from ckptd.core.cast import FLOATS
from ckptd.core.image import ITEM_BYTES
from ckptd.core.logical import GROUPS, LITERAL, MODEL, STATE, Checkpoint, Row, Tensor
from ckptd.core.pickles import Dtype, Made, MetadataIndex, load
from ckptd.errors import BadForeign, NotTiled
from ckptd.formats import Place
from ckptd.integrations.native import COMMON_SLOTS
from ckptd.integrations.torch_state import (
    BUFFER,
    STEP_KEYS,
    Refused,
    add_number,
    array_of,
    cleaned,
    keep_ranks,
    name_buffers,
    name_numbers,
    number_of,
    plain,
    refuse_flat,
    step_of,
)

_DISTCP = re.compile(r"__(\d+)_(\d+)\.distcp")
_FOREIGN_ROOTS = frozenset(["lr_scheduler", "lr_schedulers", "scheduler", "schedulers", "dataloader", "loader", "train_state", "rng", "rng_state", "sampler", "scaler", "extras"])
_MODEL_ROOTS = ("model.", "app.model.", "model_state_dict.", "state_dict.", "module.", "net.")
_TRAIN_STATE = ("train_state", "trainer", "train")
GROUPS_MAX = 1_000_000
"""Length of lists that paths may ask for."""
TIED_BYTES = 64 << 20
"""A weight that is not trained is compared with trained ones of its shape: whole up to this size, else in three places (the engine compares the rest)."""


# --- whose key it is --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Names:
    """The prefixes of the model's and of the optimizers' keys, e.g. "model." and "optim."; "" is the root."""

    model: str
    optims: tuple[str, ...]

    @staticmethod
    def of(keys: Iterable[str], tensors: Iterable[str]) -> Names:
        """Learn them from all keys, and from those of tensors."""
        found: dict[str, None] = {}
        for key in keys:
            for word in ("param_groups", "state"):
                for match in re.finditer(rf"(?:^|\.){word}\.", key):
                    before = key[: match.start() + 1] if key[match.start()] == "." else ""
                    if word == "param_groups" or key.rpartition(".")[2] in COMMON_SLOTS:
                        found.setdefault(before)
                    break
        optims = tuple(p for p in found if not any(q != p and p.startswith(f"{q}state.") for q in found))
        names = [k for k in tensors if not any(k.startswith((f"{p}state.", f"{p}param_groups.")) for p in optims)]
        held = set(names)
        trained = {k.removeprefix(f"{p}state.").rpartition(".")[0] for p in optims for k in keys if k.startswith(f"{p}state.")}
        some = sorted(trained)[:64]
        tried = {n[: len(n) - len(f)] for f in some for n in names if n == f or n.endswith(f".{f}")}
        score = {p: sum(f"{p}{f}" in held for f in some) for p in tried}
        best = max(score, key=lambda p: (score[p], p in {*_MODEL_ROOTS, ""}, -len(p)), default=None)
        if best is None:
            best = next((p for p in _MODEL_ROOTS if any(n.startswith(p) for n in names)), "")
        return Names(best, optims)

    def split(self, key: str) -> tuple[str, str]:
        """(kind, rest): kind is "state", "groups", "model" or "extras"."""
        for p in self.optims:
            if key.startswith(f"{p}state."):
                return "state", key.removeprefix(f"{p}state.")
            if key == f"{p}param_groups" or key.startswith(f"{p}param_groups."):
                return "groups", key.removeprefix(f"{p}param_groups").removeprefix(".")
        if self.model:
            return ("model", key.removeprefix(self.model)) if key.startswith(self.model) else ("extras", key)
        root = key.partition(".")[0]
        return ("extras", key) if root in _FOREIGN_ROOTS or key in STEP_KEYS else ("model", key)


def _is_path(key: Any, path: Any) -> bool:
    """Whether a path is one of `key`: names and small numbers, which joined are the key."""
    if type(path) is not tuple or not all(type(p) is str or (type(p) is int and 0 <= p < GROUPS_MAX) for p in path):
        return False
    return bool(".".join(map(str, path)) == key)


def groups_of(values: Mapping[str, Any], paths: Mapping[str, Sequence[Any]], prefixes: Sequence[str]) -> list[dict[str, Any]]:
    """The param groups of all optimizers, from the objects under `<prefix>param_groups`: listed, or flattened by parameter."""
    out: list[dict[str, Any]] = []
    for prefix in prefixes:
        lead = f"{prefix}param_groups"
        held = {k.removeprefix(lead).removeprefix("."): v for k, v in values.items() if k == lead or k.startswith(f"{lead}.")}
        if "" in held:
            groups = held[""]
        elif all(_is_listed(rest, paths.get(f"{lead}.{rest}")) for rest in held):
            groups = _listed_groups(held)
        else:
            groups = _flat_groups(held)
        if type(groups) is not list or not all(type(g) is dict and type(g.get("params")) is list for g in groups):
            msg = f"{lead}: these are no param groups"
            raise BadForeign(msg)
        out += [dict(g) for g in groups]
    return out


def _is_listed(rest: str, path: Sequence[Any] | None) -> bool:
    if path and any(type(p) is int for p in path):
        return True
    return not (path and len(path) > 1 and str(path[-1]).startswith("param_groups.")) and re.fullmatch(r"\d+(\.[^.]+)?", rest) is not None


def _listed_groups(held: Mapping[str, Any]) -> list[dict[str, Any]]:
    groups: dict[int, dict[str, Any]] = {}
    for rest, value in held.items():
        number, _, key = rest.partition(".")
        groups.setdefault(int(number), {}).update({key: value} if key else value if type(value) is dict else {})
    return [{**{k: v for k, v in g.items() if k != "params"}, "params": g.get("params") or []} for _, g in sorted(groups.items())]


def _flat_groups(held: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Parameters with equal hyper-parameters are one group: what the flattened form does not say is nothing that an optimizer computes with."""
    by_param: dict[str, dict[str, Any]] = {}
    for rest, value in held.items():
        fqn, _, key = rest.rpartition(".")
        by_param.setdefault(fqn, {})[key] = value
    groups: dict[str, dict[str, Any]] = {}
    for fqn, hyper in by_param.items():
        groups.setdefault(repr(sorted(hyper.items())), {**hyper, "params": []})["params"].append(fqn)
    return [*groups.values()]


def nested(values: Mapping[str, Any], paths: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
    """Flattened keys as dicts and lists again."""
    root: dict[Any, Any] = {}
    for key, value in values.items():
        path = [*(paths.get(key) or key.split("."))]
        at: Any = root
        for name, below in zip(path, [*path[1:], None], strict=True):
            if isinstance(at, list):
                if type(name) is not int:
                    msg = f"{key}: a list has no part {name!r}"
                    raise BadForeign(msg)
                at.extend(None for _ in range(len(at), name + 1))
            if below is None:
                at[name] = value
                break
            inner = at[name] if isinstance(at, list) else at.get(name)
            if not isinstance(inner, dict | list):
                inner = at[name] = [] if type(below) is int else {}
            at = inner
    return root


# --- reading ----------------------------------------------------------------------------------------------------------------


class _Window:
    """A file, read in pieces that are large enough to hold the next few blobs; the last two are kept."""

    def __init__(self, place: Place, name: str) -> None:
        self._place, self._name, self._size = place, name, place.files[name]
        self._held: list[tuple[int, bytes]] = []
        self.ahead = 64 << 10

    def __call__(self, begin: int, count: int) -> bytes:
        for at, data in self._held:
            if at <= begin and begin + count <= at + len(data):
                return data[begin - at : begin - at + count]
        data = self._place.read(self._name, begin, max(count, min(self.ahead, self._size - begin)))
        self._held = [(begin, data), *self._held[:1]]
        return data[:count]


class _Blob(msgspec.Struct, frozen=True):
    """Where a blob lies. `rank`: who wrote its file, -1 if the name does not say."""

    file: str
    begin: int
    nbytes: int
    rank: int


class _Chunk(msgspec.Struct, frozen=True):
    """A chunk as it is: what `.metadata` says of it, and what its blob holds."""

    offset: Shape
    said: tuple[Shape, ...]
    shape: Shape
    row: Row
    rank: int


@dataclass(slots=True)
class Reader:
    """A DCP checkpoint being read: one folder, or several that belong together."""

    place: Place
    out: Checkpoint
    windows: dict[str, _Window] = field(default_factory=dict)
    infos: dict[str, tuple[str, Shape]] = field(default_factory=dict)
    chunks: dict[str, list[_Chunk]] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)
    paths: dict[str, Sequence[Any]] = field(default_factory=dict)
    lost: list[str] = field(default_factory=list)
    derived: dict[tuple[int, int], list[str]] = field(default_factory=dict)
    heads: dict[tuple[Any, ...], tuple[bytes, Stored]] = field(default_factory=dict)
    seen: OrderedDict[bytes, Any] = field(default_factory=OrderedDict)
    world: int = 0

    def folder(self, folder: str) -> None:
        """All `.metadata` files of a folder."""
        ranked = sorted(
            (int(m[1]), n) for n in self.place.files if n.startswith(folder) and (m := re.fullmatch(r"__(\d+)\.metadata", n[len(folder) :]))
        )
        single = f"{folder}.metadata"
        if single in self.place.files:
            self.metadata(single, folder, -1)
            return
        missing = sorted(set(range(len(ranked))) - {r for r, _ in ranked})
        if missing:
            msg = f"{self.place.label}: __{missing[0]}.metadata is missing"
            raise BadForeign(msg)
        for rank, name in ranked:
            self.metadata(name, folder, rank)

    def metadata(self, name: str, folder: str, rank: int) -> None:
        """One `.metadata`: where everything lies. `rank`: whose it is, -1 if it is everybody's."""
        value, _ = load(self.place.read(name))
        tables = [value.get(k) for k in ("state_dict_metadata", "storage_data")] if type(value) is Made and value.what.name == "Metadata" else []
        if len(tables) != 2 or not all(type(t) is dict for t in tables):
            msg = f"{name}: not the metadata of torch.distributed.checkpoint"
            raise BadForeign(msg)
        described, stored = tables
        planned = value.get("planner_data")
        if type(planned) is dict:
            self.paths |= {k: v for k, v in planned.items() if _is_path(k, v)}
        said: dict[str, dict[Shape, list[Shape]]] = {}
        for key, info in described.items():
            if type(info) is not Made or type(key) is not str:
                msg = f"{name}: the entry of {key!r} is malformed"
                raise BadForeign(msg)
            if info.what.name == "TensorStorageMetadata":
                said[key] = self._described(name, key, info)
        items = [(i, self._blob(name, folder, i, s)) for i, s in stored.items()]
        self.world = max([self.world, *(b.rank + 1 for _, b in items)])
        for index, blob in sorted(items, key=lambda t: (t[1].file, t[1].begin)):
            if index.fqn in said:
                self._chunk(index, blob, said[index.fqn])
            elif index.fqn in described:
                self._object(index.fqn, blob, rank)

    def _described(self, name: str, key: str, info: Made) -> dict[Shape, list[Shape]]:
        """offset -> sizes of the chunks that begin there."""
        properties, size, chunks = info.get("properties"), info.get("size"), info.get("chunks")
        state = properties.state if type(properties) is Made else None
        code = state[0] if type(state) is tuple and state else properties.get("dtype") if type(properties) is Made else None
        places: list[tuple[Any, Any]] = [(None, None)]
        if type(chunks) is list and all(type(c) is Made for c in chunks):
            places = [(c.get("offsets"), c.get("sizes")) for c in chunks]
        if (
            type(code) is not Dtype
            or type(size) is not tuple
            or not all(type(n) is int and n >= 0 for n in size)
            or not all(type(o) is tuple and type(s) is tuple and len(o) == len(s) == len(size) for o, s in places)
        ):
            msg = f"{name}: the entry of {key} is malformed"
            raise BadForeign(msg)
        if self.infos.setdefault(key, (code.name, size)) != (code.name, size):
            msg = f"{key}: two metadata files give it different dtypes or shapes"
            raise BadForeign(msg)
        found: dict[Shape, list[Shape]] = {}
        for offset, extent in places:
            found.setdefault(offset, []).append(extent)
        return found

    def _blob(self, name: str, folder: str, index: Any, info: Any) -> _Blob:
        if type(index) is not MetadataIndex or type(info) is not Made:
            msg = f"{name}: storage data that is not as torch writes it"
            raise BadForeign(msg)
        file, begin, nbytes = info.get("relative_path"), info.get("offset"), info.get("length")
        if type(file) is not str or type(begin) is not int or type(nbytes) is not int or min(index.offset or (0,)) < 0:
            msg = f"{name}: the place of {index.fqn} is malformed"
            raise BadForeign(msg)
        if info.get("transform_descriptors"):
            msg = f"{name}: {index.fqn} went through {info.get('transform_descriptors')}: stream extensions are not read"
            raise BadForeign(msg)
        size = self.place.files.get(folder + file)
        if size is None or begin < 0 or nbytes < 0 or begin + nbytes > size:
            what = "is not there" if size is None else f"ends at byte {size}, before {begin + nbytes}"
            msg = f"{folder}{file}: {what}, though {name} places {index.fqn} in it"
            raise BadForeign(msg, remedy="the checkpoint is incomplete: copy all of it, or take another step")
        match = _DISTCP.fullmatch(file.rpartition("/")[2])
        return _Blob(folder + file, begin, nbytes, int(match[1]) if match else -1)

    def _reader(self, blob: _Blob) -> _Window:
        window = self.windows.get(blob.file)
        if window is None:
            window = self.windows[blob.file] = _Window(self.place, blob.file)
        window.ahead = 64 << 10 if blob.nbytes < 32 << 10 else 4 << 10
        return window

    def _chunk(self, index: MetadataIndex, blob: _Blob, said: Mapping[Shape, list[Shape]]) -> None:
        dtype, shape = self.infos[index.fqn]
        window = self._reader(blob)
        offset = index.offset if index.offset is not None else (0,) * len(shape)
        # Blobs of one kind differ in their elements only: if this one begins as the last of its kind did, its tensor lies where that one's lay.
        kind = (dtype, tuple(said.get(offset, [()])[0]), blob.nbytes)
        head, held = self.heads.get(kind, (b"", None))
        if held is None or window(blob.begin, len(head)) != head:
            try:
                held = read_torch(part(window, blob.begin), blob.nbytes)
            except BadForeign as e:
                msg = f"{blob.file}: {index.fqn} at byte {blob.begin}: {e.message}"
                raise BadForeign(msg, remedy=e.remedy) from e
            if not isinstance(held, Stored):
                msg = f"{blob.file}: {index.fqn} at byte {blob.begin} is no tensor"
                raise BadForeign(msg)
            if held.storage.begin <= 16 << 10:
                self.heads[kind] = (window(blob.begin, held.storage.begin), held)
        if held.dtype != dtype or len(held.shape) != len(shape):
            msg = f"{index.fqn}: {blob.file} holds {held.dtype}{list(held.shape)}, the metadata says {dtype} of {len(shape)} dimensions"
            raise BadForeign(msg)
        number = self.out.file(blob.file, self.place.files[blob.file])
        row = Row(Box(offset, held.shape), number, blob.begin + held.begin, held.stride)
        self.chunks.setdefault(index.fqn, []).append(_Chunk(offset, tuple(said.get(offset, ())), held.shape, row, blob.rank))

    def _object(self, key: str, blob: _Blob, rank: int) -> None:
        window = self._reader(blob)
        raw = window(blob.begin, blob.nbytes) if blob.nbytes <= 8 << 10 else b""
        if raw and raw in self.seen:
            value = self.seen[raw]
        else:
            tree = read_torch(part(window, blob.begin), blob.nbytes)

            def array(path: str, leaf: Any) -> Any:
                if not isinstance(leaf, Stored) or not leaf.contiguous:
                    msg = f"{path} (a tensor inside an object)"
                    raise Refused(msg)
                return array_of(self.place.read(blob.file, blob.begin + leaf.begin, leaf.nbytes), leaf.dtype, leaf.shape)

            try:
                value = plain(tree, key, array, self.lost)
            except Refused as e:
                self.lost.append(str(e))
                return
            if raw:
                self.seen[raw] = value
        if rank < 0 or key not in self.values:
            self.values[key] = value
        elif repr(self.values[key]) != repr(value):
            self.out.per_rank.setdefault(rank, {})[f"extras.{key}"] = value

    # --- what it means

    def finish(self, hint: Sequence[str]) -> None:
        """Place all chunks, and give everything its name."""
        refuse_flat(self.infos, self.place.label)
        tensors = {key: self._placed(key) for key in self.infos}
        for (dp, tp), names in self.derived.items():
            self.out.notes.append(
                f"{len(names)} tensors ({names[0]} ...): .metadata places their parts wrongly, as torch does for uneven FSDP2 x TP (pytorch#161368); "
                f"they are placed as a mesh of {dp} x {tp} places them"
            )
        assemble(self.out, self.place, tensors, self.values, self.paths, hint)
        if self.lost:
            lost = sorted(set(self.lost))
            self.out.notes.append(f"left out, for no plain value says it: {', '.join(lost[:8])}" + (f" and {len(lost) - 8} more" if lost[8:] else ""))

    def _placed(self, key: str) -> Tensor:
        dtype, shape = self.infos[key]
        chunks = self.chunks.get(key, [])
        rows = [c.row for c in chunks]
        honest = all(c.shape in c.said for c in chunks)
        if honest and len(rows) == 1 and rows[0].box == Box.whole(shape):
            return Tensor(dtype, shape, tuple(rows))
        unique = {r.box: r for r in reversed(rows) if r.box.numel or not prod(shape)}
        replicas = tuple(r for r in rows if r.box.numel and unique[r.box] is not r)
        try:
            if not honest:
                wrong = next(c for c in chunks if c.shape not in c.said)
                msg = f"{key}: the chunk at {list(wrong.offset)} has shape {list(wrong.shape)}, the metadata says {[*map(list, wrong.said)]}"
                raise NotTiled(msg)
            prove_tiles(key, shape, unique)
        except NotTiled as e:
            derived = self._derived(key, shape, chunks)
            if derived is None:
                remedy = "torch writes wrong offsets for uneven FSDP2 x TP (pytorch#161368), and parts may be lost: save a full state dict instead"
                raise NotTiled(e.message, remedy=remedy) from e
            return Tensor(dtype, shape, tuple(derived))
        return Tensor(dtype, shape, tuple(unique.values()), replicas)

    def _derived(self, key: str, shape: Shape, chunks: Sequence[_Chunk]) -> list[Row] | None:
        """Rows by the only mesh (dp, tp) that leaves each rank the shape that it has. Outer dimensions of the mesh replicate, or are pipeline stages."""
        if not shape or any(c.rank < 0 for c in chunks):
            return None
        found: dict[tuple[tuple[Box, int, int], ...], tuple[int, int]] = {}
        for tp in range(2, self.world + 1):
            for dp in range(2, self.world // tp + 1):
                if self.world % (dp * tp):
                    continue
                rows = []
                for c in chunks:
                    d, t = divmod(c.rank % (dp * tp), tp)
                    outer, length = chunk(shape[0], tp, t)
                    inner, size = chunk(length, dp, d)
                    if (size, *shape[1:]) != c.shape:
                        break
                    rows.append(Row(Box((outer + inner, *c.offset[1:]), c.shape), c.row.file, c.row.begin, c.row.strides))
                rows = [r for r in rows if r.box.numel]
                if len(rows) != sum(bool(prod(c.shape)) for c in chunks):
                    continue
                try:
                    prove_tiles(key, shape, [r.box for r in rows])
                except NotTiled:
                    continue
                found.setdefault(tuple((r.box, r.file, r.begin) for r in rows), (dp, tp))
        if len(found) != 1:
            return None
        placed, mesh = next(iter(found.items()))
        self.derived.setdefault(mesh, []).append(key)
        by_begin = {(c.row.file, c.row.begin): c.row.strides for c in chunks}
        return [Row(box, file, begin, by_begin[file, begin]) for box, file, begin in placed]


def assemble(
    out: Checkpoint, place: Place, tensors: Mapping[str, Tensor], values: Mapping[str, Any], paths: Mapping[str, Sequence[Any]], hint: Sequence[str] = ()
) -> None:
    """Put tensors and objects under their canonical names into `out`."""
    names = Names.of([*tensors, *values], tensors)
    kinds = {key: names.split(key) for key in (*tensors, *values)}
    model = cleaned([rest for key, (kind, rest) in kinds.items() if kind == "model" and key in tensors])
    for key, tensor in tensors.items():
        kind, rest = kinds[key]
        if kind == "model":
            out.tensors[f"{MODEL}{model[rest]}"] = tensor
        elif kind == "extras":
            out.tensors[f"extras.{key}"] = tensor
    _optimizer(out, place, names, tensors, values, paths, model, hint)
    others = {k: v for k, v in values.items() if kinds[k][0] in {"extras", "model"}}
    tree = nested(others, paths)
    keep_ranks(out, tree.pop("per_rank", {}))
    for name, value in tree.items():
        out.objects[f"extras.{name}"] = value
    _tell_step(out, place)
    _tie(out, place)
    name_buffers(out)


def _optimizer(
    out: Checkpoint, place: Place, names: Names, tensors: Mapping[str, Tensor], values: Mapping[str, Any], paths: Mapping[str, Sequence[Any]],
    model: Mapping[str, str], hint: Sequence[str],
) -> None:  # fmt: skip
    groups = groups_of(_group_values(out, place, names, tensors, values), paths, names.optims)
    state: dict[str, dict[str, str]] = {}
    for key in (*tensors, *values):
        kind, rest = names.split(key)
        if kind == "state":
            fqn, _, slot = rest.rpartition(".")
            state.setdefault(fqn, {})[slot] = key
    listed = [p for g in groups for p in g["params"]]
    rename = {str(p): model.get(str(p), str(p)) for p in dict.fromkeys([*listed, *state])}
    if rename and all(p.isdecimal() for p in rename) and not rename.keys() & model.keys():
        rename = _numbered(out, groups, state, tensors, hint)
    elif any(p not in model for p in rename):
        rename |= cleaned([p for p in rename if p not in model])
    _state(out, place, state, rename, tensors, values)
    for group in groups:
        group["params"] = [rename[str(p)] for p in group["params"]]
    if groups:
        out.objects[GROUPS] = _complete(out, groups, [rename[f] for f in state])


def _state(
    out: Checkpoint, place: Place, state: Mapping[str, Mapping[str, str]], rename: Mapping[str, str], tensors: Mapping[str, Tensor], values: Mapping[str, Any]
) -> None:  # fmt: skip
    """fqn -> slot -> key, as the optimizer's tensors; numbers become tensors."""
    for fqn, slots in state.items():
        for slot, key in slots.items():
            name = f"{STATE}{rename[fqn]}.{slot}"
            if key in tensors:
                out.tensors[name] = tensors[key]
                if slot == "step":
                    step_of(out, place, name)
            elif isinstance(values[key], int | float):
                add_number(out, name, values[key])
            elif values[key] is not None:
                out.objects.setdefault("optim.scalars", {}).setdefault(rename[fqn], {})[slot] = values[key]


def _group_values(
    out: Checkpoint, place: Place, names: Names, tensors: Mapping[str, Tensor], values: Mapping[str, Any]
) -> dict[str, Any]:
    """Hyper-parameters by key; of learning rates that are tensors, the number."""
    by_key = {k: v for k, v in values.items() if names.split(k)[0] == "groups"}
    for key, tensor in tensors.items():
        if names.split(key)[0] == "groups":
            row = tensor.rows[0]
            raw = place.read(out.files[row.file].name, row.begin, tensor.nbytes)
            by_key[key] = number_of(array_of(raw, tensor.dtype, tensor.shape))
    return by_key


def _numbered(
    out: Checkpoint, groups: Sequence[Mapping[str, Any]], state: Mapping[str, Mapping[str, str]], tensors: Mapping[str, Tensor], hint: Sequence[str]
) -> dict[str, str]:
    weights = {n.removeprefix(MODEL): t.shape for n, t in out.tensors.items() if n.startswith(MODEL)}
    unlikely = [n.removeprefix(MODEL) for n, t in out.tensors.items() if t.dtype not in FLOATS or BUFFER.fullmatch(n)]
    shapes: dict[int, Shape] = {}
    for p, slots in state.items():
        seen = {tensors[k].shape for s, k in slots.items() if k in tensors and s != "step"}
        if len(seen) == 1:
            shapes[int(p)] = seen.pop()
    found = name_numbers(groups or [{"params": sorted(map(int, state))}], shapes, weights, unlikely, hint)
    return {str(p): n for p, n in found.items()}


def _complete(out: Checkpoint, groups: list[dict[str, Any]], trained: Sequence[str]) -> list[dict[str, Any]]:
    """Groups that know every parameter with state. Pipeline stages that saved lists overwrote each other's: then all groups must say the same."""
    known = {p for g in groups for p in g["params"]}
    left = [p for p in trained if p not in known]
    if not left:
        return groups
    alike = {repr(sorted((k, v) for k, v in g.items() if k != "params")) for g in groups}
    if len(alike) > 1:
        msg = f"{left[0]} and {len(left) - 1} more have optimizer state and are in no param group: pipeline stages have overwritten each other's"
        raise BadForeign(msg, remedy="save with StateDictOptions(flatten_optimizer_state_dict=True), or --drop optimizer")
    out.notes.append(f"{len(left)} parameters ({left[0]} ...) are in no param group: they get what the others have")
    groups[0]["params"] = [*groups[0]["params"], *left]
    return groups


def _tell_step(out: Checkpoint, place: Place) -> None:
    """The training step: an object or a tensor of this name, at the root or in torchtitan's train_state."""
    for root in ("", *_TRAIN_STATE):
        for name in STEP_KEYS:
            held = out.objects.get(f"extras.{root}" if root else f"extras.{name}")
            value = held.get(name) if root and isinstance(held, dict) else held if not root else None
            tensor = out.tensors.get(f"extras.{root}.{name}" if root else f"extras.{name}")
            if value is None and tensor is not None and prod(tensor.shape) == 1 and tensor.rows[0].file != LITERAL:
                row = tensor.rows[0]
                value = array_of(place.read(out.files[row.file].name, row.begin, ITEM_BYTES[tensor.dtype]), tensor.dtype, ())
            number = number_of(value)
            if type(number) is int and number >= 0:
                out.objects["step"] = number
                if not root and name == "step" and tensor is None:
                    del out.objects["extras.step"]
                return


def _tie(out: Checkpoint, place: Place) -> None:
    """Weights that no optimizer knows and that equal a trained one of their shape are tied to it: DCP stores both. Their rows become replicas."""
    known = [p for g in out.groups for p in g["params"]] or [*out.state()]
    by_kind: dict[tuple[str, Shape], list[str]] = {}
    for fqn in known:
        tensor = out.tensors.get(f"{MODEL}{fqn}")
        if tensor is not None and len(tensor.shape) > 1 and tensor.nbytes:
            by_kind.setdefault((tensor.dtype, tensor.shape), []).append(f"{MODEL}{fqn}")
    trained = {f"{MODEL}{p}" for p in known}
    for name in [n for n in out.tensors if n.startswith(MODEL) and n not in trained]:
        tensor = out.tensors[name]
        for other in by_kind.get((tensor.dtype, tensor.shape), ()):
            held = out.tensors[other]
            if _equal(out, place, tensor, held):
                out.tensors[other] = Tensor(held.dtype, held.shape, held.rows, (*held.replicas, *(r for r in tensor.rows if r not in held.rows)))
                out.aliases[name] = other
                del out.tensors[name]
                break


def _equal(out: Checkpoint, place: Place, a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one kind hold the same bytes, as far as it is looked at (`TIED_BYTES`)."""
    rows, others = ({r.box: r for r in t.rows} for t in (a, b))
    if rows.keys() != others.keys() or not all(r.contiguous for r in (*a.rows, *b.rows)):
        return False
    item = ITEM_BYTES[a.dtype]
    for box, row in rows.items():
        other = others[box]
        size = box.numel * item
        if (row.file, row.begin) == (other.file, other.begin):
            continue
        step = 1 << 20
        places = range(0, size, step) if a.nbytes <= TIED_BYTES else sorted({0, size // 2, max(0, size - step)})
        for at in places:
            count = min(step, size - at)
            one, two = (place.read(out.files[r.file].name, r.begin + at, count) for r in (row, other))
            if one != two:
                return False
    return True
