"""Reading DeepSpeed's checkpoints: where the elements of every parameter lie in flat partitions, shares and files. See `deepspeed`."""

from __future__ import annotations

import re
import struct
from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

from ckptd.core.archive import Tensor as Stored
from ckptd.core.boxes import Box, Shape
from ckptd.core.image import DIMS_MAX, ITEM_BYTES
from ckptd.core.inert import Made
from ckptd.core.logical import GROUPS, MODEL, STATE, Checkpoint, Row, Tensor, row_of, rows_of_flat
from ckptd.errors import BadForeign
from ckptd.formats import Place, ReadOptions
from ckptd.integrations.deepspeed import (
    EXPERT_FILE,
    LATEST,
    LATEST_UNIVERSAL,
    LAYER_FILE,
    MODEL_FILE,
    OPTIM_FILE,
    UNIVERSAL_FILE,
    array_of,
    computes,
    folder_of,
    load,
    objects_of,
    plain,
    setting,
)

NUMEL_MAX = 1 << 48
"""Of a parameter: offsets in bytes stay below 2**63."""

# --- what one mp rank holds, and how mp ranks make a whole -------------------------------------------------------------------


def _mapping(value: Any, what: str) -> dict[Any, Any]:
    if not isinstance(value, dict):
        msg = f"{what} is a {type(value).__name__}, not a dict"
        raise BadForeign(msg)
    return value


def _listing(value: Any, what: str) -> list[Any]:
    if not isinstance(value, list | tuple):
        msg = f"{what} is a {type(value).__name__}, not a list"
        raise BadForeign(msg)
    return list(value)


def _stored(value: Any, what: str) -> Stored:
    if not isinstance(value, Stored):
        msg = f"{what} is a {type(value).__name__}, not a tensor"
        raise BadForeign(msg)
    return value


class _Flat:
    """A tensor of a file that is to be read as flat elements."""

    def __init__(self, held: Any, file: int, what: str) -> None:
        tensor = _stored(held, what)
        if not tensor.contiguous:
            msg = f"{what} is not contiguous"
            raise BadForeign(msg)
        self.dtype, self.numel, self.file, self.what = tensor.dtype, tensor.numel, file, what
        self._begin, self._item = tensor.begin, ITEM_BYTES.get(tensor.dtype, 0)

    def rows(self, shape: Shape, start: int, length: int, at: int) -> list[Row]:
        """Rows of `length` elements from `start` of a parameter, which are those from `at` on here."""
        if not (at >= 0 and at + length <= self.numel):
            msg = f"{self.what} has {self.numel} elements; {at + length} are needed"
            raise BadForeign(msg, remedy="is it the file of this run, and is the run's `zero_optimization` what `ds_config` says?")
        return rows_of_flat(shape, start, length, self.file, self._begin + at * self._item, self._item)


class _Shards:
    """Tensors of all mp ranks by name, to be put together in the end."""

    def __init__(self, tp: int, patterns: Mapping[str, Any]) -> None:
        self._tp = tp
        self._patterns = patterns
        self._parts: dict[str, dict[int, Tensor]] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._parts

    def put(self, name: str, tp_rank: int, dtype: str, shape: Shape, rows: Sequence[Row]) -> None:
        """Rows of a tensor as this tensor parallel rank has it; what comes again is a replica."""
        mine = self._parts.setdefault(name, {})
        old = mine.get(tp_rank)
        if old is not None and (old.dtype, old.shape) != (dtype, shape):
            msg = f"{name}: {dtype}{list(shape)} in one place, {old.dtype}{list(old.shape)} in another"
            raise BadForeign(msg)
        known = {r.box for r in old.rows} if old else set()
        new = [r for r in rows if r.box not in known]
        again = [r for r in rows if r.box in known]
        mine[tp_rank] = Tensor(dtype, shape, (*(old.rows if old else ()), *new), (*(old.replicas if old else ()), *again))

    def into(self, out: Checkpoint) -> None:
        """Add everything. Raises BadForeign for a tensor whose cut is not known."""
        for name, parts in self._parts.items():
            first = parts[min(parts)]
            if self._tp == 1 or len(parts) == 1:
                out.tensors[name] = first
                continue
            fqn = name.removeprefix(MODEL) if name.startswith(MODEL) else name.removeprefix(STATE).rpartition(".")[0]
            out.tensors[name] = self._joined(fqn, [parts[r] for r in sorted(parts)])

    def _joined(self, fqn: str, parts: list[Tensor]) -> Tensor:
        first = parts[0]
        if not first.shape or self._matches("tp_replicated_parameter_patterns", fqn):
            more = [r for p in parts[1:] for r in (*p.rows, *p.replicas)]
            return Tensor(first.dtype, first.shape, first.rows, (*first.replicas, *more))
        if self._matches("parameter_to_average_patterns", fqn):
            msg = f"{fqn}: its tensor parallel copies differ and are to be averaged, which no checkpoint of ours can say"
            raise BadForeign(msg)
        dim, blocks = self._cut(fqn, [p.shape for p in parts])
        total = sum(sum(b) for b in blocks)
        if self._matches("vocabulary_parameter_patterns", fqn):
            total = int(self._patterns.get("original_vocab_size", total))
        shape = (*first.shape[:dim], total, *first.shape[dim + 1 :])
        rows: list[Row] = []
        replicas: list[Row] = []
        at, start = [0] * len(parts), 0
        for widths in blocks:
            for rank, width in enumerate(widths):
                item = ITEM_BYTES[first.dtype]
                rows += _moved(parts[rank].rows, dim, at[rank], width, start, total, item)
                replicas += _moved(parts[rank].replicas, dim, at[rank], width, start, total, item)
                at[rank] += width
                start += width
        return Tensor(first.dtype, shape, tuple(rows), tuple(replicas))

    def _cut(self, fqn: str, shapes: list[Shape]) -> tuple[int, list[list[int]]]:
        """(dimension, blocks: of each sub-parameter its width on every rank)."""
        if not self._patterns:
            msg = f"{fqn}: {len(shapes)} tensor parallel shards, and nothing says how they were cut"
            raise BadForeign(msg, remedy="save with a client state that has `universal_checkpoint_info`, as DeepSpeed's AutoTP and Megatron-DeepSpeed do")
        for entry in self._patterns.get("parameter_with_sub_params") or ():
            if any(re.match(p, fqn) for p in entry["patterns"]):
                dim, sizes = entry["partition_dim"], entry["shape"][entry["partition_dim"]]
                if not isinstance(sizes, tuple | list) or len(entry["shape"]) != len(shapes[0]):
                    msg = f"{fqn}: sub-parameters {entry['shape']} are not cut along a dimension that it has"
                    raise BadForeign(msg)
                widths = next((w for p, w in (self._patterns.get("sub_param_shard_widths") or {}).items() if p in entry["patterns"]), None)
                return dim, [list(w) for w in widths] if widths else [[s // len(shapes)] * len(shapes) for s in sizes]
        if self._matches("parameter_with_2_sub_params_cat_dim_0", fqn):
            return 0, [[s[0] // 2 for s in shapes]] * 2
        dim = 1 if self._matches("parameter_with_row_parallelism_patterns", fqn) else 0
        return dim, [[s[dim] for s in shapes]]

    def _matches(self, key: str, fqn: str) -> bool:
        return any(re.match(p, fqn) for p in self._patterns.get(key) or ())


def _moved(rows: Sequence[Row], dim: int, low: int, width: int, start: int, total: int, item: int) -> list[Row]:
    """The parts of rows that lie in [low, low + width) of a dimension, moved so that `low` is `start`; cut off at `total`."""
    out = []
    width = min(width, total - start)
    for row in rows:
        a, b = max(row.box.start[dim], low), min(row.box.stop[dim], low + width)
        if b > a:
            begin, extent = [*row.box.start], [*row.box.extent]
            begin[dim], extent[dim] = a, b - a
            part = row.part(Box(tuple(begin), tuple(extent)), item)
            begin[dim] = a - low + start
            out.append(part.moved(tuple(begin)))
    return out


class ZeroReader:
    """A ZeRO checkpoint being made of its files."""

    def __init__(self, place: Place, options: ReadOptions, stage: int) -> None:
        self.folder = folder_of(place, options.tag, LATEST)
        self._lead = self.folder.prefix.removeprefix(place.prefix).strip("/")
        files = self.folder.files
        experts = next((n for n in files if EXPERT_FILE.fullmatch(n)), "")
        if experts:
            msg = f"{experts}: DeepSpeed's mixture of experts is not read: ranks hold different experts under one name"
            raise BadForeign(msg, remedy="save it as a universal checkpoint (python -m deepspeed.checkpoint.ds_to_universal) and convert that")
        if any("offloaded_tensors/" in n for n in files):
            msg = f"{self.folder.label}: optimizer state on NVMe (offloaded_tensors) is not read"
            raise BadForeign(msg, remedy="save once with offload_optimizer.device cpu or none")
        self.model = {(int(m[1] or 0), int(m[2])): n for n in files if (m := MODEL_FILE.fullmatch(n))}
        self.optim = {(int(m[1]), int(m[2])): n for n in files if (m := OPTIM_FILE.fullmatch(n))}
        self.stage = stage
        self.out = Checkpoint(f"zero{stage}")
        self.groups: dict[int, list[dict[str, Any]]] = {}
        self.config: dict[str, Any] = {}
        self._computes = ""
        self._alone: set[str] = set()
        self.dp = 1 + max((r for r, _ in self.optim), default=-1)
        self.mp = 1 + max((m for _, m in self.optim), default=-1)
        missing = [m for m in range(min(self.mp, len(files))) if (0, m) not in self.model]
        if not self.optim or len(self.optim) != self.dp * self.mp or missing:
            msg = f"{self.folder.label}: {len(self.optim)} optim_states files and {len(self.model)} model_states files of {self.dp} data parallel times {self.mp} mp ranks"
            raise BadForeign(msg, remedy="the checkpoint is not whole: take another tag")

    def checkpoint(self) -> Checkpoint:
        """All of it."""
        first = _mapping(self.tree(self.model[0, 0]), self.model[0, 0])
        saved = first.get("dp_world_size")
        if isinstance(saved, int) and saved != self.dp:
            msg = f"{self.model[0, 0]}: {saved} data parallel ranks saved, and there are files of {self.dp}"
            raise BadForeign(msg)
        tp = _tp_of(first, self.folder.files, self.mp)
        info = first.get("universal_checkpoint_info")
        self.shards = _Shards(tp, info if isinstance(info, dict) else {})
        for mp in range(self.mp):
            states = first if mp == 0 else _mapping(self.tree(self.model[0, mp]), self.model[0, mp])
            parts = [self.optimizer_of(r, mp) for r in range(self.dp)]
            if mp == 0:
                self.objects(states, parts[0])
            shapes = [_shapes(s) for s in _listing(states.get("param_shapes"), f"{self.model[0, mp]}: param_shapes")]
            self.module(states, mp, mp % tp, shapes)
            if self.stage == 3:
                self.frozen3(mp, mp % tp)
                self.stage3(parts, shapes, mp, mp % tp)
            else:
                self.stage12(parts, shapes, mp, mp % tp)
        self.shards.into(self.out)
        self.out.objects[GROUPS] = _together(self.groups, tp)
        return self.out

    def tree(self, name: str) -> Any:
        """A file's value."""
        self.number(name)
        return load(self.folder, name)

    def number(self, name: str) -> int:
        """The file's number."""
        return self.out.file(f"{self._lead}/{name}".lstrip("/"), self.folder.files[name])

    def optimizer_of(self, rank: int, mp: int) -> dict[str, Any]:
        """What an optimizer file says."""
        name = self.optim[rank, mp]
        return _mapping(_mapping(self.tree(name), name).get("optimizer_state_dict"), f"{name}: optimizer_state_dict")

    # --- weights, buffers, what is frozen

    def module(self, states: dict[str, Any], mp: int, tp_rank: int, shapes: list[dict[str, Shape]]) -> None:
        """Tensors of the module's state dict; empty ones are stage 3's placeholders."""
        name = self.model[0, mp]
        tied = {str(a): str(o) for a, o in _mapping(states.get("shared_params") or {}, f"{name}: shared_params").items()}
        buffers = {str(n) for n in states.get("buffer_names") or ()}
        module = states.get("module")
        held = [(name, "", module)] if isinstance(module, dict) else self._layers(mp, tp_rank)
        trained = {n: s for g in shapes for n, s in g.items()}
        for file, prefix, tensors in held:
            for short, tensor in tensors.items():
                fqn = f"{prefix}{short}"
                if not isinstance(tensor, Stored):
                    if tensor is not None:
                        self.out.objects[f"{MODEL}{fqn}"] = plain(tensor, self.folder, file)
                    continue
                owner = tied.get(fqn)
                if owner is not None:
                    self.out.aliases[f"{MODEL}{fqn}"] = f"{MODEL}{owner}"
                elif self.stage == 3 and fqn not in buffers and tensor.shape == (0,):
                    continue
                else:
                    fqn = self._tied_layer(fqn, short, tensor, trained)
                    if fqn in buffers:
                        self.out.buffers.add(f"{MODEL}{fqn}")
                    self.shards.put(f"{MODEL}{fqn}", tp_rank, tensor.dtype, tensor.shape, [_whole_row(tensor, self.number(file))])

    def _layers(self, mp: int, tp_rank: int) -> list[tuple[str, str, dict[str, Any]]]:
        """The pipeline's layer files, all by the first stage's turn."""
        if mp >= max(1, self.mp) or (mp and mp != tp_rank):
            return []
        found = [(int(m[1]), n) for n in self.folder.files if (m := LAYER_FILE.fullmatch(n)) and int(m[2]) == tp_rank]
        return [(n, f"{layer}.", _mapping(self.tree(n), n)) for layer, n in sorted(found)]

    def _tied_layer(self, fqn: str, short: str, tensor: Stored, trained: Mapping[str, Shape]) -> str:
        """A pipeline's tied layer is `tied_modules.<key>.<name>` for the optimizer and `<layer>.<name>` in its file."""
        if fqn in trained or not re.fullmatch(r"\d+\..*", fqn):
            return fqn
        found = [n for n, s in trained.items() if re.fullmatch(rf"tied_modules\.[^.]+\.{re.escape(short)}", n) and s == tensor.shape]
        if len(found) == 1:
            self.out.aliases[f"{MODEL}{fqn}"] = f"{MODEL}{found[0]}"
            return found[0]
        return fqn

    def frozen3(self, mp: int, tp_rank: int) -> None:
        """Stage 3's frozen parameters: each rank's share, padded."""
        shapes: dict[str, Shape] = {}
        for rank in range(self.dp):
            name = self.model.get((rank, mp), "")
            if not name:
                msg = f"{self.folder.label}: the model states of data parallel rank {rank}, mp rank {mp} are not there"
                raise BadForeign(msg)
            states = _mapping(self.tree(name), name)
            shapes = shapes or _shapes(states.get("frozen_param_shapes") or {})
            fragments = _mapping(states.get("frozen_param_fragments") or {}, f"{name}: frozen_param_fragments")
            for fqn, shape in shapes.items():
                flat = _Flat(fragments.get(fqn), self.number(name), f"{name}: frozen_param_fragments[{fqn!r}]")
                share = -(-prod(shape) // self.dp)
                start, stop = min(rank * share, prod(shape)), min((rank + 1) * share, prod(shape))
                self.shards.put(f"{MODEL}{fqn}", tp_rank, flat.dtype, shape, flat.rows(shape, start, stop - start, 0))

    # --- masters and moments

    def master(self, fqn: str, tp_rank: int, dtype: str, shape: Shape, rows: Sequence[Row]) -> None:
        """The master of a weight: beside the weight where the files hold one, else in its place."""
        weight, name = f"{MODEL}{fqn}", f"{STATE}{fqn}.master"
        if name in self.shards or (weight in self.shards and weight not in self._alone):
            if name not in self.shards:
                self.out.pairs.append((weight, name))
            self.shards.put(name, tp_rank, dtype, shape, rows)
            return
        self._alone.add(weight)
        if self._computes:
            self.out.derived[weight] = self._computes
        self.shards.put(weight, tp_rank, dtype, shape, rows)

    def stage12(self, parts: list[dict[str, Any]], shapes: list[dict[str, Shape]], mp: int, tp_rank: int) -> None:
        """Partitions of the flat groups."""
        names = [self.optim[r, mp] for r in range(self.dp)]
        for g, group in enumerate(shapes):
            counts = parts[0].get("partition_count")
            count = counts[g] if isinstance(counts, list) and g < len(counts) else self.dp
            if count != self.dp or parts[0].get("whole_param_optimizer_states"):
                what = "whole parameters' states (Muon)" if count == self.dp else f"a group over {count} of {self.dp} ranks (experts)"
                msg = f"{names[0]}: group {g} holds {what}, which is not read"
                raise BadForeign(msg)
            gaps = parts[0].get("param_alignment_paddings") or []
            layout = _Layout(group, gaps[g] if g < len(gaps) else (), self.dp)
            masters = [_Flat(_nth(p, "single_partition_of_fp32_groups", g, n), self.number(n), f"{n}: master {g}") for p, n in zip(parts, names, strict=True)]
            layout.check([m.numel for m in masters], names, "single_partition_of_fp32_groups")
            for fqn, shape, rows in layout.rows(masters):
                self.master(fqn, tp_rank, masters[0].dtype, shape, rows)
            states = [_group_state(p, g, n) for p, n in zip(parts, names, strict=True)]
            self._slots(states, names, tp_rank, layout)
            self._compare_mappings(parts, g, layout, names)
            hyper = _hyper(parts[0].get("base_optimizer_state"), g)
            self.groups.setdefault(mp, []).append({**hyper, "params": self._optimizer_order([*group])})
            if "step" in hyper and not any("step" in s for s in states):
                self._literal_step(group, hyper["step"])

    def _optimizer_order(self, names: list[str]) -> list[str]:
        """`round_robin_gradients` deals parameters to ranks like cards; this is the order before."""
        if not setting(self.config, "zero_optimization", "round_robin_gradients"):
            return names
        dealt = [i for j in range(self.dp) for i in range(j, len(names), self.dp)]
        out = [""] * len(names)
        for at, i in enumerate(dealt):
            out[i] = names[at]
        return out

    def _compare_mappings(self, parts: list[dict[str, Any]], g: int, layout: _Layout, names: list[str]) -> None:
        """DeepSpeed's own offsets, where it does not write those of other parameters."""
        if setting(self.config, "zero_optimization", "round_robin_gradients"):
            return
        for rank, (part, name) in enumerate(zip(parts, names, strict=True)):
            mappings = part.get("param_slice_mappings") or []
            told = {k: (v.get("numel"), v.get("start")) for k, v in (mappings[g] if g < len(mappings) else {}).items() if isinstance(v, Made)}
            wrong = [k for k, v in told.items() if layout.slice(k, rank) != v]
            if wrong:
                msg = f"{name}: param_slice_mappings places {wrong[0]} at {told[wrong[0]]}, its shapes place it at {layout.slice(wrong[0], rank)}"
                raise BadForeign(msg, remedy="was the checkpoint written with round_robin_gradients, and its ds_config lost?")

    def stage3(self, parts: list[dict[str, Any]], shapes: list[dict[str, Shape]], mp: int, tp_rank: int) -> None:
        """Shares of each parameter of the sub-groups."""
        names = [self.optim[r, mp] for r in range(self.dp)]
        count = parts[0].get("partition_count", self.dp)
        if parts[0].get("ds_zero_partition_groups") is not None or not isinstance(count, int) or count < 1 or self.dp % count:
            msg = f"{names[0]}: partitions over groups of ranks ({count} of {self.dp}) are not read"
            raise BadForeign(msg)
        inner = [_mapping(p.get("optimizer_state_dict"), f"{n}: optimizer_state_dict") for p, n in zip(parts, names, strict=True)]
        for k, group in enumerate(shapes):
            shares = _Shares(group, count)
            masters = [_Flat(_nth(p, "fp32_flat_groups", k, n), self.number(n), f"{n}: fp32_flat_groups[{k}]") for p, n in zip(parts, names, strict=True)]
            for fqn, shape, rows in shares.rows(masters):
                self.master(fqn, tp_rank, masters[0].dtype, shape, rows)
            states = [_mapping(_mapping(i.get("state"), f"{n}: state").get(k, {}), f"{n}: state[{k}]") for i, n in zip(inner, names, strict=True)]
            self._slots(states, names, tp_rank, shares)
        groups, at = [], 0
        for g in _listing(inner[0].get("param_groups"), f"{names[0]}: param_groups"):
            mine = shapes[at : at + len(g["params"])]
            at += len(g["params"])
            hyper = {k: v for k, v in g.items() if k != "params"}
            groups.append({**hyper, "params": [n for s in mine for n in s]})
            for s in mine:
                if "step" in hyper and f"{STATE}{next(iter(s), '')}.step" not in self.shards:
                    self._literal_step(s, hyper["step"])
        if at != len(shapes):
            msg = f"{names[0]}: {at} sub-groups in param_groups, {len(shapes)} in param_shapes"
            raise BadForeign(msg)
        self.groups[mp] = groups

    def _slots(self, states: list[dict[str, Any]], names: list[str], tp_rank: int, layout: _Layout | _Shares) -> None:
        """Moments as rows; scalars once per parameter."""
        for slot in states[0]:
            held = [s.get(slot) for s in states]
            first = held[0]
            if isinstance(first, Stored) and first.shape:
                flats = [_Flat(h, self.number(n), f"{n}: {slot}") for h, n in zip(held, names, strict=True)]
                if isinstance(layout, _Layout):
                    layout.check([f.numel for f in flats], names, slot)
                for fqn, shape, rows in layout.rows(flats):
                    self.shards.put(f"{STATE}{fqn}.{slot}", tp_rank, flats[0].dtype, shape, rows)
            elif isinstance(first, Stored):
                numbers = [self.number(n) for n in names]
                rows = [_whole_row(_stored(h, f"{n}: {slot}"), f) for h, n, f in zip(held, names, numbers, strict=True)]
                if first.dtype != "F32" and slot == "step":
                    self._literal_step(layout.shapes, float(array_of(first, self.folder, names[0]).item()))
                    continue
                for fqn in layout.shapes:
                    for row in rows:
                        self.shards.put(f"{STATE}{fqn}.{slot}", tp_rank, first.dtype, (), [row])
            elif slot == "step" and isinstance(first, int | float):
                self._literal_step(layout.shapes, first)
            elif first is not None:
                self.out.notes.append(f"{names[0]}: the optimizer's {slot} is a {type(first).__name__} and is left out")

    def _literal_step(self, names: Mapping[str, Any], step: float) -> None:
        for fqn in names:
            if f"{STATE}{fqn}.step" not in self.out.tensors:
                self.out.literal(f"{STATE}{fqn}.step", "F32", struct.pack("<f", float(step)))

    # --- objects

    def objects(self, states: dict[str, Any], optimizer: dict[str, Any]) -> None:
        """Steps, schedulers, client state."""
        config = states.get("ds_config")
        self.config = config if isinstance(config, dict) else {}
        self._computes = computes(self.config, self.optim[0, 0])
        file = self.model[0, 0]
        self.out.objects |= objects_of(states, optimizer, self.folder, file, self.optim[0, 0])


def _shapes(table: Any) -> dict[str, Shape]:
    found = {str(n): tuple(s) for n, s in _mapping(table, "param_shapes").items()}
    for name, shape in found.items():
        if len(shape) > DIMS_MAX or not all(type(e) is int and 0 <= e <= NUMEL_MAX for e in shape) or prod(shape) > NUMEL_MAX:
            msg = f"param_shapes: {name} cannot have the shape {shape}"
            raise BadForeign(msg)
    return found


def _whole_row(tensor: Stored, file: int) -> Row:
    return row_of(Box.whole(tensor.shape), file, tensor.begin, tensor.stride)


def _nth(part: dict[str, Any], key: str, n: int, file: str) -> Any:
    held = _listing(part.get(key), f"{file}: {key}")
    if n >= len(held):
        msg = f"{file}: {key} has {len(held)} entries; group {n} is missing"
        raise BadForeign(msg)
    return held[n]


def _group_state(part: dict[str, Any], g: int, file: str) -> dict[str, Any]:
    """The optimizer's state of a flat group: by its number, or in a list (`elastic_checkpoint`)."""
    base = part.get("base_optimizer_state")
    if isinstance(base, list):
        state = dict(base[g]) if g < len(base) else {}
        if "base_optimizer_state_step" in part:
            state.setdefault("step", part["base_optimizer_state_step"])
        return state
    base = _mapping(base, f"{file}: base_optimizer_state")
    groups = _listing(base.get("param_groups"), f"{file}: param_groups")
    ids = groups[g]["params"] if g < len(groups) else [g]
    return _mapping(_mapping(base.get("state"), f"{file}: state").get(ids[0] if ids else g, {}), f"{file}: state[{g}]")


def _hyper(base: Any, g: int) -> dict[str, Any]:
    groups = base.get("param_groups", []) if isinstance(base, dict) else []
    return {k: v for k, v in groups[g].items() if k != "params"} if g < len(groups) else {}


def _tp_of(states: Mapping[str, Any], files: Mapping[str, int], mp: int) -> int:
    """Tensor parallel ranks among the mp ranks; the rest are pipeline stages."""
    told = setting(states, "checkpoint_parallel_dimensions", "tp_degree")
    models = {m[2] for n in files if (m := LAYER_FILE.fullmatch(n))}
    tp = told if isinstance(told, int) else len(models) or mp
    if tp < 1 or mp % tp:
        msg = f"{mp} mp ranks are no multiple of {tp} tensor parallel ranks"
        raise BadForeign(msg)
    return tp


def _together(groups: Mapping[int, list[dict[str, Any]]], tp: int) -> list[dict[str, Any]]:
    """Groups of the pipeline's stages: at each place, one group of all their parameters."""
    out: list[dict[str, Any]] = []
    for mp in sorted(groups):
        if mp % tp:
            continue
        for i, group in enumerate(groups[mp]):
            if i == len(out):
                out.append({**group, "params": []})
            out[i]["params"] += [p for p in group["params"] if not any(p in g["params"] for g in out)]
    return out


class _Layout:
    """Stages 1 and 2: a flat group of `dp` equal partitions."""

    def __init__(self, shapes: Mapping[str, Shape], gaps: Sequence[int], dp: int) -> None:
        self.shapes, self.dp = shapes, dp
        self.offsets: dict[str, int] = {}
        at = 0
        for i, (fqn, shape) in enumerate(shapes.items()):
            self.offsets[fqn] = at
            at += prod(shape) + (gaps[i] if i < len(gaps) else 0)
        self.total = at - (gaps[len(shapes) - 1] if 0 < len(shapes) <= len(gaps) else 0)
        self.per = -(-self.total // (2 * dp)) * 2

    def check(self, numels: list[int], names: list[str], what: str) -> None:
        """Each partition has all its elements, and at most the padding besides."""
        for rank, numel in enumerate(numels):
            lean = self.lean(rank)
            if not lean <= numel <= self.per:
                msg = f"{names[rank]}: {what} has {numel} elements, its parameters' shapes give {lean} to {self.per}"
                raise BadForeign(msg)

    def lean(self, rank: int) -> int:
        """Elements of a partition that are no padding."""
        return min(max(self.total - rank * self.per, 0), self.per)

    def slice(self, fqn: str, rank: int) -> tuple[int, int] | None:
        """(elements, start in the partition) of a parameter on a rank."""
        if fqn not in self.offsets:
            return None
        low, high = self.offsets[fqn], self.offsets[fqn] + prod(self.shapes[fqn])
        a, b = max(low, rank * self.per), min(high, (rank + 1) * self.per)
        return (b - a, a - rank * self.per) if b > a else None

    def rows(self, flats: list[_Flat]) -> list[tuple[str, Shape, list[Row]]]:
        """The rows of every parameter."""
        out = []
        for fqn, shape in self.shapes.items():
            low, count = self.offsets[fqn], prod(shape)
            rows: list[Row] = []
            for rank in range(low // self.per, -(-(low + count) // self.per)) if count else ():
                length, at = self.slice(fqn, rank) or (0, 0)
                rows += flats[rank].rows(shape, rank * self.per + at - low, length, at)
            out.append((fqn, shape, rows))
        return out


class _Shares:
    """Stage 3: of every parameter a share of ceil(numel / count) elements, one after the other."""

    def __init__(self, shapes: Mapping[str, Shape], count: int) -> None:
        self.shapes, self.count = shapes, count

    def rows(self, flats: list[_Flat]) -> list[tuple[str, Shape, list[Row]]]:
        """The rows of every parameter; ranks beyond `count` repeat them."""
        out, at = [], 0
        for fqn, shape in self.shapes.items():
            share, numel = -(-prod(shape) // self.count), prod(shape)
            rows: list[Row] = []
            for rank, flat in enumerate(flats):
                start = min((rank % self.count) * share, numel)
                rows += flat.rows(shape, start, min(share, numel - start), at)
            out.append((fqn, shape, rows))
            at += share
        return out


# --- universal --------------------------------------------------------------------------------------------------------------


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
        states = _mapping(self.tree(file), file)
        common_file = "zero/optimizer_state.pt"
        common = _mapping(self.tree(common_file), common_file)
        out.objects |= objects_of(states, common, folder, file, common_file)
        shapes = [_shapes(s) for s in states.get("param_shapes") or ()]
        frozen = _shapes(states.get("frozen_param_shapes") or {})
        held = [(rank, n, (_mapping(self.tree(n), n).get("frozen_param_fragments") or {})) for (rank, mp), n in sorted(self.model.items()) if not mp and frozen]
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
        out.aliases |= {f"{MODEL}{a}": f"{MODEL}{o}" for a, o in _mapping(states.get("shared_params") or {}, f"{file}: shared_params").items()}
        out.buffers |= {f"{MODEL}{n}" for n in states.get("buffer_names") or ()}
        for fqn, tensor in _mapping(states.get("module") or {}, f"{file}: module").items():
            name = f"{MODEL}{fqn}"
            if isinstance(tensor, Stored) and name not in out.aliases and name not in out.tensors and (tensor.shape != (0,) or name in out.buffers):
                out.add(name, tensor.dtype, tensor.shape, [_whole_row(tensor, number)])

    def frozen(self, fqn: str, shape: Shape, held: list[tuple[int, str, Any]]) -> None:
        """A frozen parameter: whole in the model states, or (stage 3) a share in those of each rank."""
        found = [(rank, _Flat(fragments[fqn], self.number(name), f"{name}: {fqn}")) for rank, name, fragments in held if fqn in fragments]
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
        tensor = _stored(tensor, f"{name}: param")
        shape = trained.get(fqn, tensor.shape)
        if prod(shape) != tensor.numel:
            msg = f"{name}: {tensor.numel} elements for a parameter of shape {list(shape)}"
            raise BadForeign(msg)
        flat = _Flat(tensor, self.number(name), name)
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
        for g in _listing(common.get("param_groups"), f"{file}: param_groups"):
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
