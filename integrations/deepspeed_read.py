"""Reading DeepSpeed's checkpoints: where the elements of every parameter lie in flat partitions, shares and files. See `deepspeed`."""

from __future__ import annotations

import re
import struct
from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

from ckptd.core.archive import Tensor as Stored
from ckptd.core.boxes import Shape
from ckptd.core.inert import Made
from ckptd.core.logical import GROUPS, MODEL, STATE, Checkpoint, Row
from ckptd.errors import BadForeign
from ckptd.formats import Place, ReadOptions
from ckptd.integrations.deepspeed import (
    LATEST,
    LAYER_FILE,
    MODEL_FILE,
    OPTIM_FILE,
    array_of,
    computes,
    folder_of,
    load,
    objects_of,
    plain,
    setting,
)
from ckptd.integrations.deepspeed_experts import Experts, shares_of
from ckptd.integrations.deepspeed_flat import Flat, Layout, Shards, Shares, listing, mapping, shapes_of, stored, whole_row


class FolderReader:
    """What the readers of all stages share: weights, masters, moments and objects, on their way into a checkpoint."""

    def __init__(self, place: Place, options: ReadOptions, stage: int) -> None:
        self.folder = folder_of(place, options.tag, LATEST)
        self._lead = self.folder.prefix.removeprefix(place.prefix).strip("/")
        files = self.folder.files
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
        self.mp = 1 + max((m for _, m in self.optim or self.model), default=-1)
        self.experts = Experts(self.folder, self.mp)
        self.shards = Shards(1, {})

    def start(self, first: dict[str, Any]) -> int:
        """Look at the first model states: experts, and how tensor parallel ranks make a whole. Returns how many of these there are."""
        if self.experts:
            self.experts.check(first, self.model[0, 0])
        tp = _tp_of(first, self.folder.files, self.mp)
        info = first.get("universal_checkpoint_info")
        self.shards = Shards(tp, info if isinstance(info, dict) else {})
        return tp

    def tree(self, name: str) -> Any:
        """A file's value."""
        self.number(name)
        return load(self.folder, name)

    def number(self, name: str) -> int:
        """The file's number."""
        return self.out.file(f"{self._lead}/{name}".lstrip("/"), self.folder.files[name])

    # --- weights and buffers

    def module(self, states: dict[str, Any], mp: int, tp_rank: int, shapes: list[dict[str, Shape]]) -> None:
        """Tensors of the module's state dict; empty ones are stage 3's placeholders."""
        name = self.model[0, mp]
        tied = self._ties(states, name)
        buffers = {str(n) for n in states.get("buffer_names") or ()}
        module = states.get("module")
        self._expert_weights(buffers, tp_rank)
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
                    aliases, owners = self.experts.others(fqn), dict(self.experts.others(owner))
                    self.out.aliases |= {f"{MODEL}{a}": f"{MODEL}{owners[i]}" for i, a in aliases}
                elif self.stage == 3 and fqn not in buffers and tensor.shape == (0,):
                    continue
                else:
                    fqn = self._tied_layer(fqn, short, tensor, trained)
                    if fqn in buffers:
                        self.out.buffers.add(f"{MODEL}{fqn}")
                    self.shards.put(f"{MODEL}{fqn}", tp_rank, tensor.dtype, tensor.shape, [whole_row(tensor, self.number(file))])

    def _ties(self, states: dict[str, Any], name: str) -> dict[str, str]:
        """Tied names -> the one that is stored."""
        return {str(a): str(o) for a, o in mapping(states.get("shared_params") or {}, f"{name}: shared_params").items()}

    def _expert_weights(self, buffers: set[str], tp_rank: int) -> None:
        """Weights and buffers of experts; `buffer_names` has those of the first rank's."""
        for file, fqn, tensor in self.experts.weights(self.tree):
            self.shards.put(f"{MODEL}{fqn}", tp_rank, tensor.dtype, tensor.shape, [whole_row(tensor, self.number(file))])
        self.out.buffers |= {f"{MODEL}{n}" for b in buffers for number, n in self.experts.others(b) if number and f"{MODEL}{n}" in self.shards}

    def _layers(self, mp: int, tp_rank: int) -> list[tuple[str, str, dict[str, Any]]]:
        """The pipeline's layer files, all by the first stage's turn."""
        if mp >= max(1, self.mp) or (mp and mp != tp_rank):
            return []
        found = [(int(m[1]), n) for n in self.folder.files if (m := LAYER_FILE.fullmatch(n)) and int(m[2]) == tp_rank]
        return [(n, f"{layer}.", mapping(self.tree(n), n)) for layer, n in sorted(found)]

    def _tied_layer(self, fqn: str, short: str, tensor: Stored, trained: Mapping[str, Shape]) -> str:
        """A pipeline's tied layer is `tied_modules.<key>.<name>` for the optimizer and `<layer>.<name>` in its file."""
        if fqn in trained or not re.fullmatch(r"\d+\..*", fqn):
            return fqn
        found = [n for n, s in trained.items() if re.fullmatch(rf"tied_modules\.[^.]+\.{re.escape(short)}", n) and s == tensor.shape]
        if len(found) == 1:
            self.out.aliases[f"{MODEL}{fqn}"] = f"{MODEL}{found[0]}"
            return found[0]
        return fqn

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

    def _slots(self, states: list[dict[str, Any]], names: list[str], tp_rank: int, layout: Layout | Shares) -> None:
        """Moments as rows; scalars once per parameter."""
        for slot in states[0]:
            held = [s.get(slot) for s in states]
            first = held[0]
            if isinstance(first, Stored) and first.shape:
                flats = [Flat(h, self.number(n), f"{n}: {slot}") for h, n in zip(held, names, strict=True)]
                if isinstance(layout, Layout):
                    layout.check([f.numel for f in flats], names, slot)
                for fqn, shape, rows in layout.rows(flats):
                    self.shards.put(f"{STATE}{fqn}.{slot}", tp_rank, flats[0].dtype, shape, rows)
            elif isinstance(first, Stored):
                numbers = [self.number(n) for n in names]
                rows = [whole_row(stored(h, f"{n}: {slot}"), f) for h, n, f in zip(held, names, numbers, strict=True)]
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
        file = self.model[0, 0]
        beside = self.optim.get((0, 0), file)
        self._computes = computes(self.config, beside)
        self.out.objects |= objects_of(states, optimizer, self.folder, file, beside)


class ZeroReader(FolderReader):
    """A ZeRO checkpoint being made of its files."""

    def __init__(self, place: Place, options: ReadOptions, stage: int) -> None:
        super().__init__(place, options, stage)
        self.dp = 1 + max((r for r, _ in self.optim), default=-1)
        missing = [m for m in range(min(self.mp, len(self.folder.files))) if (0, m) not in self.model]
        if not self.optim or len(self.optim) != self.dp * self.mp or missing:
            msg = f"{self.folder.label}: {len(self.optim)} optim_states files and {len(self.model)} model_states files of {self.dp} data parallel times {self.mp} mp ranks"
            raise BadForeign(msg, remedy="the checkpoint is not whole: take another tag")

    def checkpoint(self) -> Checkpoint:
        """All of it."""
        first = mapping(self.tree(self.model[0, 0]), self.model[0, 0])
        saved = first.get("dp_world_size")
        if isinstance(saved, int) and saved != self.dp:
            msg = f"{self.model[0, 0]}: {saved} data parallel ranks saved, and there are files of {self.dp}"
            raise BadForeign(msg)
        tp = self.start(first)
        for mp in range(self.mp):
            states = first if mp == 0 else mapping(self.tree(self.model[0, mp]), self.model[0, mp])
            parts = [self.optimizer_of(r, mp) for r in range(self.dp)]
            if mp == 0:
                self.objects(states, parts[0])
            told = states.get("param_shapes")
            shapes = [shapes_of(s) for s in listing(told or [], f"{self.model[0, mp]}: param_shapes")]
            self.module(states, mp, mp % tp, shapes)
            if told is None:
                shapes = self._shapes_of_slices(parts, mp, mp % tp)
            if self.stage == 3:
                self.frozen3(mp, mp % tp)
                self.stage3(parts, shapes, mp, mp % tp)
            else:
                self.stage12(parts, shapes, mp, mp % tp)
        self.shards.into(self.out)
        self.out.objects[GROUPS] = together(self.groups, tp)
        return self.out

    def optimizer_of(self, rank: int, mp: int) -> dict[str, Any]:
        """What an optimizer file says."""
        name = self.optim[rank, mp]
        return mapping(mapping(self.tree(name), name).get("optimizer_state_dict"), f"{name}: optimizer_state_dict")

    def frozen3(self, mp: int, tp_rank: int) -> None:
        """Stage 3's frozen parameters: each rank's share, padded."""
        shapes: dict[str, Shape] = {}
        for rank in range(self.dp):
            name = self.model.get((rank, mp), "")
            if not name:
                msg = f"{self.folder.label}: the model states of data parallel rank {rank}, mp rank {mp} are not there"
                raise BadForeign(msg)
            states = mapping(self.tree(name), name)
            shapes = shapes or shapes_of(states.get("frozen_param_shapes") or {})
            fragments = mapping(states.get("frozen_param_fragments") or {}, f"{name}: frozen_param_fragments")
            for fqn, shape in shapes.items():
                flat = Flat(fragments.get(fqn), self.number(name), f"{name}: frozen_param_fragments[{fqn!r}]")
                share = -(-prod(shape) // self.dp)
                start, stop = min(rank * share, prod(shape)), min((rank + 1) * share, prod(shape))
                self.shards.put(f"{MODEL}{fqn}", tp_rank, flat.dtype, shape, flat.rows(shape, start, stop - start, 0))

    def stage12(self, parts: list[dict[str, Any]], shapes: list[dict[str, Shape]], mp: int, tp_rank: int) -> None:
        """Partitions of the flat groups."""
        names = [self.optim[r, mp] for r in range(self.dp)]
        if parts[0].get("whole_param_optimizer_states"):
            msg = f"{names[0]}: whole parameters' states (Muon) are not read"
            raise BadForeign(msg)
        for g, group in enumerate(shapes):
            shares = shares_of(parts[0].get("partition_count"), g, self.dp, names[0], experts=bool(self.experts))
            for share in range(shares):
                ranks = self.experts.ranks(self.dp // shares, self.dp, share)
                known = {n: self.experts.known(n, shares, share) for n in group}
                self._partitions([(parts[r], names[r]) for r in ranks], g, {known[n]: s for n, s in group.items()}, known, tp_rank)
            hyper = _hyper(parts[0].get("base_optimizer_state"), g)
            order = self.experts.everywhere(self._optimizer_order([*group], self.dp // shares), shares)
            self.groups.setdefault(mp, []).append({**hyper, "params": order})

    def _partitions(self, held: list[tuple[dict[str, Any], str]], g: int, shapes: dict[str, Shape], known: Mapping[str, str], tp_rank: int) -> None:
        """A flat group, or the share of its experts that these ranks hold. `held`: (state, file) by partition; `known`: the ranks' names -> ours."""
        parts, names = [p for p, _ in held], [n for _, n in held]
        gaps = parts[0].get("param_alignment_paddings") or []
        layout = Layout(shapes, gaps[g] if g < len(gaps) else (), len(parts))
        masters = [Flat(_nth(p, "single_partition_of_fp32_groups", g, n), self.number(n), f"{n}: master {g}") for p, n in held]
        layout.check([m.numel for m in masters], names, "single_partition_of_fp32_groups")
        for fqn, shape, rows in layout.rows(masters):
            self.master(fqn, tp_rank, masters[0].dtype, shape, rows)
        states = [_group_state(p, g, n) for p, n in held]
        self._slots(states, names, tp_rank, layout)
        self._compare_mappings(parts, g, layout, names, known)
        hyper = _hyper(parts[0].get("base_optimizer_state"), g)
        if "step" in hyper and not any("step" in s for s in states):
            self._literal_step(shapes, hyper["step"])

    def _shapes_of_slices(self, parts: list[dict[str, Any]], mp: int, tp_rank: int) -> list[dict[str, Shape]]:
        """What `param_shapes` would say, where it is left out (with experts, by DeepSpeed up to 0.16; by 16-bit pipelines without ZeRO): `param_slice_mappings` tell
        names, order and sizes, the weights tell shapes."""
        name = self.optim[0, mp]
        if self.stage == 3 or setting(self.config, "zero_optimization", "round_robin_gradients") or not parts[0].get("param_slice_mappings"):
            msg = f"{self.model[0, mp]}: param_shapes are not there, and nothing else tells the order of parameters"
            raise BadForeign(msg, remedy="save it with a newer DeepSpeed; experts also without round_robin_gradients")
        groups = []
        for g in range(len(listing(parts[0].get("param_slice_mappings"), f"{name}: param_slice_mappings"))):
            shares = shares_of(parts[0].get("partition_count"), g, self.dp, name, experts=bool(self.experts))
            numels: dict[str, int] = {}
            for rank in self.experts.ranks(self.dp // shares, self.dp, 0):
                for fqn, part in _nth(parts[rank], "param_slice_mappings", g, self.optim[rank, mp]).items():
                    numels[fqn] = numels.get(fqn, 0) + part.get("numel")
            shapes = {fqn: self.shards.shape(f"{MODEL}{self.experts.known(fqn, shares, 0)}", tp_rank) for fqn in numels}
            wrong = next((n for n, s in shapes.items() if s is None or prod(s) != numels[n]), "")
            if wrong:
                msg = f"{name}: param_slice_mappings has {numels[wrong]} elements of {wrong}, whose weight has the shape {shapes[wrong]}"
                raise BadForeign(msg)
            groups.append({n: s for n, s in shapes.items() if s is not None})
        return groups

    def _optimizer_order(self, names: list[str], count: int) -> list[str]:
        """`round_robin_gradients` deals parameters to ranks like cards; this is the order before."""
        if not setting(self.config, "zero_optimization", "round_robin_gradients"):
            return names
        dealt = [i for j in range(count) for i in range(j, len(names), count)]
        out = [""] * len(names)
        for at, i in enumerate(dealt):
            out[i] = names[at]
        return out

    def _compare_mappings(self, parts: list[dict[str, Any]], g: int, layout: Layout, names: list[str], known: Mapping[str, str]) -> None:
        """DeepSpeed's own offsets, where it does not write those of other parameters."""
        if setting(self.config, "zero_optimization", "round_robin_gradients"):
            return
        for rank, (part, name) in enumerate(zip(parts, names, strict=True)):
            mappings = part.get("param_slice_mappings") or []
            told = {k: (v.get("numel"), v.get("start")) for k, v in (mappings[g] if g < len(mappings) else {}).items() if isinstance(v, Made)}
            wrong = [k for k, v in told.items() if layout.slice(known.get(k, k), rank) != v]
            if wrong:
                at = layout.slice(known.get(wrong[0], wrong[0]), rank)
                msg = f"{name}: param_slice_mappings places {wrong[0]} at {told[wrong[0]]}, its shapes place it at {at}"
                raise BadForeign(msg, remedy="was the checkpoint written with round_robin_gradients, and its ds_config lost?")

    def stage3(self, parts: list[dict[str, Any]], shapes: list[dict[str, Shape]], mp: int, tp_rank: int) -> None:
        """Shares of each parameter of the sub-groups."""
        names = [self.optim[r, mp] for r in range(self.dp)]
        count = parts[0].get("partition_count", self.dp)
        if parts[0].get("ds_zero_partition_groups") is not None or not isinstance(count, int) or count < 1 or self.dp % count:
            msg = f"{names[0]}: partitions over groups of ranks ({count} of {self.dp}) are not read"
            raise BadForeign(msg)
        inner = [mapping(p.get("optimizer_state_dict"), f"{n}: optimizer_state_dict") for p, n in zip(parts, names, strict=True)]
        for k, group in enumerate(shapes):
            shares = Shares(group, count)
            masters = [Flat(_nth(p, "fp32_flat_groups", k, n), self.number(n), f"{n}: fp32_flat_groups[{k}]") for p, n in zip(parts, names, strict=True)]
            for fqn, shape, rows in shares.rows(masters):
                self.master(fqn, tp_rank, masters[0].dtype, shape, rows)
            states = [mapping(mapping(i.get("state"), f"{n}: state").get(k, {}), f"{n}: state[{k}]") for i, n in zip(inner, names, strict=True)]
            self._slots(states, names, tp_rank, shares)
        groups, at = [], 0
        for g in listing(inner[0].get("param_groups"), f"{names[0]}: param_groups"):
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


def _nth(part: dict[str, Any], key: str, n: int, file: str) -> Any:
    held = listing(part.get(key), f"{file}: {key}")
    if n >= len(held):
        msg = f"{file}: {key} has {len(held)} entries; group {n} is missing"
        raise BadForeign(msg)
    return held[n]


def _hyper(base: Any, g: int) -> dict[str, Any]:
    groups = base.get("param_groups", []) if isinstance(base, dict) else []
    return {k: v for k, v in groups[g].items() if k != "params"} if g < len(groups) else {}


def together(groups: Mapping[int, list[dict[str, Any]]], tp: int) -> list[dict[str, Any]]:
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


def _group_state(part: dict[str, Any], g: int, file: str) -> dict[str, Any]:
    """The optimizer's state of a flat group: by its number, or in a list (`elastic_checkpoint`)."""
    base = part.get("base_optimizer_state")
    if isinstance(base, list):
        state = dict(base[g]) if g < len(base) else {}
        if "base_optimizer_state_step" in part:
            state.setdefault("step", part["base_optimizer_state_step"])
        return state
    base = mapping(base, f"{file}: base_optimizer_state")
    groups = listing(base.get("param_groups"), f"{file}: param_groups")
    ids = groups[g]["params"] if g < len(groups) else [g]
    return mapping(mapping(base.get("state"), f"{file}: state").get(ids[0] if ids else g, {}), f"{file}: state[{g}]")


def _tp_of(states: Mapping[str, Any], files: Mapping[str, int], mp: int) -> int:
    """Tensor parallel ranks among the mp ranks; the rest are pipeline stages."""
    told = setting(states, "checkpoint_parallel_dimensions", "tp_degree")
    models = {m[2] for n in files if (m := LAYER_FILE.fullmatch(n))}
    tp = told if isinstance(told, int) else len(models) or mp
    if tp < 1 or mp % tp:
        msg = f"{mp} mp ranks are no multiple of {tp} tensor parallel ranks"
        raise BadForeign(msg)
    return tp


