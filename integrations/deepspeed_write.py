"""Writing DeepSpeed's checkpoints: ZeRO of any stage for any number of ranks, and universal ones that all three stages load. See `deepspeed`.

What DeepSpeed 0.19.8 demands
- one `step` per param group (stages 1, 2) or sub-group (stage 3): parameters of a group that have taken different numbers of steps are refused;
- the same flat layout as the run that loads it: order of the groups and their parameters, `round_robin_gradients`, stage 3's `sub_group_size`. The last two are
  taken from the source's `ds_config`, or from `SETTINGS`.
Universal: files are `{"param": tensor}`, which its stages 1, 2 and 3 all load. What its own loader then does wrong, or not at all, is said in the notes.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from math import prod
from typing import Any

import numpy as np

from ckptd.core.boxes import Box, Shape, boxes_of_flat_range
from ckptd.core.emit import Known, OutFile, Plain, Take, Taken, Zeros, number, torch_file, whole
from ckptd.core.image import ITEM_BYTES
from ckptd.core.inert import Dtype, Global, Made
from ckptd.core.logical import GROUPS, MODEL, STATE, Checkpoint
from ckptd.core.pickling import call
from ckptd.errors import BadArgument, Unstorable
from ckptd.formats import Plan, WriteOptions, check_settings, need_drop
from ckptd.integrations.deepspeed import LATEST, LATEST_UNIVERSAL, OWN_KEYS, setting
from ckptd.integrations.native import PYTHON_SLOTS, AsTensor

SETTINGS = ("tag", "round_robin_gradients", "sub_group_size", "stage", "buffers")
"""Of `--config`: the folder's name; the run's ZeRO settings where they differ from the source's; universal: 3 writes the bare files of stage 3's converter;
patterns of names that are buffers, for sources that do not say so (stage 3 keeps buffers and frozen parameters in different places)."""
VERSION = "0.19.8"
SUB_GROUP_SIZE = 1_000_000_000
_EXTRAS = "extras."
_CODES = {"uint8": "U8", "int8": "I8", "int16": "I16", "int32": "I32", "int64": "I64", "float16": "F16", "float32": "F32", "float64": "F64", "bool": "BOOL"}


def zero_plan(source: Checkpoint, options: WriteOptions, stage: int) -> Plan:
    """ZeRO of a stage."""
    w = _Writer(source, options, stage)
    folder, n = w.tag, options.ranks
    prefix = "bf16_" if w.dtype == "BF16" else ""
    files = [OutFile(LATEST, (Known(folder.encode()),))]
    if stage == 3:
        shares = [w.shares(names, n) for names in w.sub_groups(n)]
        for rank in range(n):
            files.append(_file(f"{folder}/zero_pp_rank_{rank}_mp_rank_00_model_states.pt", w.model_states(rank, n, w.sub_groups(n))))
            files.append(_file(f"{folder}/{prefix}zero_pp_rank_{rank}_mp_rank_00_optim_states.pt", w.optim_states3(rank, n, shares)))
    else:
        groups = [w.dealt(g, n) for g in w.groups]
        files.append(_file(f"{folder}/mp_rank_00_model_states.pt", w.model_states(0, n, groups)))
        layouts = [w.layout(names, n) for names in groups]
        files += [_file(f"{folder}/{prefix}zero_pp_rank_{r}_mp_rank_00_optim_states.pt", w.optim_states12(r, n, groups, layouts)) for r in range(n)]
    return Plan(files, dropped=w.dropped, inlined=w.inlined, notes=w.notes)


def universal_plan(source: Checkpoint, options: WriteOptions) -> Plan:
    """A universal checkpoint; its loaders take it at any world size."""
    w = _Writer(source, options, 0)
    bare = int(options.config.get("stage", 0)) == 3
    folder, n = w.tag, options.ranks
    files = [OutFile(LATEST_UNIVERSAL, (Known(folder.encode()),))]
    if not bare:
        files.append(_file(f"{folder}/mp_rank_00_model_states.pt", w.model_states(0, n, w.groups)))
    w.stage = 3
    files += [_file(f"{folder}/zero_pp_rank_{r}_mp_rank_00_model_states.pt", w.model_states(r, n, w.groups)) for r in range(n if bare else 1)]
    files.append(_file(f"{folder}/zero/optimizer_state.pt", w.common_state()))
    for names in w.groups:
        for fqn in names:
            if "/" in fqn or fqn in {".", "..", "optimizer_state.pt"}:
                msg = f"{fqn!r} cannot be the name of a folder"
                raise Unstorable(msg)
            for slot, taken in w.universal_state(fqn, flat=bare):
                tree: Any = taken if bare or slot == "step" else {"param": taken, "cat_dim": 0}
                files.append(_file(f"{folder}/zero/{fqn}/{slot}.pt", tree))
    lost = sorted(w.frozen) + sorted(n.removeprefix(MODEL) for n in w.buffers)
    if lost:
        w.notes.append(
            f"DeepSpeed {VERSION} does not load buffers and frozen parameters of universal checkpoints: load {', '.join(lost[:3])}"
            f"{' and more' if len(lost) > 3 else ''} from `module` of the model states yourself, or convert to zero1, zero2 or zero3"
        )
    if len(w.groups) > 1:
        w.notes.append(f"DeepSpeed {VERSION}, stage 3: all sub-groups share one `step` after a universal load, and settings in which param groups differ stay as configured")
    return Plan(files, dropped=w.dropped, inlined=w.inlined, notes=w.notes)


def _file(name: str, tree: Any) -> OutFile:
    return OutFile(name, torch_file(tree))


class _Layout:
    """Where the flat elements of a group go: for each rank, (fqn, first element of it, number, place in the partition)."""

    def __init__(self, sizes: Sequence[tuple[str, int]], dp: int) -> None:
        total = sum(n for _, n in sizes)
        self.per = -(-total // (2 * dp)) * 2
        self.lean = [min(max(total - r * self.per, 0), self.per) for r in range(dp)]
        self.parts: list[list[tuple[str, int, int, int]]] = [[] for _ in range(dp)]
        low = 0
        for fqn, n in sizes:
            for rank in range(low // self.per, -(-(low + n) // self.per)) if n else ():
                a, b = max(low, rank * self.per), min(low + n, (rank + 1) * self.per)
                self.parts[rank].append((fqn, a - low, b - a, a - rank * self.per))
            low += n


class _Writer:
    """What all files of a target share."""

    def __init__(self, source: Checkpoint, options: WriteOptions, stage: int) -> None:
        check_settings(options, SETTINGS, "DeepSpeed's writer")
        if options.ranks < 1 or (options.tp, options.pp) != (1, 1):
            msg = f"{options.ranks} data parallel ranks with tp {options.tp} and pp {options.pp}"
            raise BadArgument(msg, remedy="DeepSpeed is written for data parallel ranks: give --ranks alone")
        self.source, self.options, self.stage = source, options, stage
        self.notes: list[str] = []
        self.dropped: list[str] = []
        self.inlined: list[str] = []
        self._state = source.state()
        self._scalars: dict[tuple[str, ...], dict[str, Taken]] = {}
        self.buffers = self._buffers()
        if "optimizer" in options.drop:
            self._drop_optimizer()
        self.groups = [list(g["params"]) for g in source.groups] or [self._trainable()]
        self.shapes = {p: self._shape(p) for g in self.groups for p in g}
        self.groups = [[p for p in g if prod(self.shapes[p])] for g in self.groups]
        trained = {p for g in self.groups for p in g}
        weights = [n.removeprefix(MODEL) for n in source.tensors if n.startswith(MODEL) and n not in self.buffers]
        self.frozen = [n for n in weights if n not in trained]
        if self.frozen and not source.format.startswith(("zero", "universal")):
            some = ", ".join(self.frozen[:3]) + (f" and {len(self.frozen) - 3} more" if len(self.frozen) > 3 else "")
            self.notes.append(f"no param group has {some}: taken for frozen parameters; if they are buffers, say so with --config buffers=PATTERN,PATTERN")
        self.dtype = self._compute_dtype()
        kept = source.objects.get("extras.deepspeed")
        self.kept: dict[str, Any] = kept if isinstance(kept, dict) else {}
        self.step = int(source.objects.get("step") or 0)
        self.tag = str(options.config.get("tag", f"global_step{self.step}" + ("_universal" if not stage else "")))
        self.slots = [self._slots_of(g) for g in self.groups]
        self._client = self._client_state()

    # --- what there is

    def _buffers(self) -> set[str]:
        patterns = [p.strip() for p in str(self.options.config.get("buffers", "")).split(",") if p.strip()]
        names = [n for n in self.source.tensors if n.startswith(MODEL)]
        return self.source.buffers | {n for n in names if any(fnmatchcase(n.removeprefix(MODEL), p) for p in patterns)}

    def _trainable(self) -> list[str]:
        self.notes.append("no optimizer in the source: load it with load_optimizer_states=False")
        return [n.removeprefix(MODEL) for n in self.source.tensors if n.startswith(MODEL) and n not in self.buffers]

    def _drop_optimizer(self) -> None:
        masters = {f"{STATE}{fqn}.master" for fqn in self._state}
        self.dropped += [n for n in self.source.tensors if n.startswith(STATE) and n not in masters]
        self._state = {fqn: {"master": s["master"]} for fqn, s in self._state.items() if "master" in s}

    def _shape(self, fqn: str) -> Shape:
        tensor = self.source.tensors.get(f"{MODEL}{fqn}")
        if tensor is None:
            msg = f"{fqn}: the optimizer has it, and there is no weight of that name"
            raise Unstorable(msg)
        return tensor.shape

    def _compute_dtype(self) -> str:
        if self.options.dtype:
            if self.options.dtype not in {"F32", "BF16", "F16"}:
                msg = f"--dtype {self.options.dtype}: DeepSpeed computes in F32, BF16 or F16"
                raise BadArgument(msg)
            return self.options.dtype
        found = {self.weight_dtype(p) for g in self.groups for p in g}
        return found.pop() if len(found) == 1 else "F32" if "F32" in found or not found else min(found)

    def weight_dtype(self, fqn: str) -> str:
        """What a weight is stored as, where weights are stored."""
        name = f"{MODEL}{fqn}"
        own = self.source.tensors[name].dtype
        if self.options.dtype:
            return self.options.dtype if own in {"F64", "F32", "BF16", "F16"} else own
        return self.source.derived.get(name, own)

    def _slots_of(self, names: list[str]) -> list[str]:
        """Per-element slots of a group's parameters."""
        found: dict[str, None] = {}
        for fqn in names:
            for slot, tensor in self._state.get(fqn, {}).items():
                if tensor.shape == self.shapes[fqn] and slot not in {"master", "step"}:
                    found[slot] = None
                elif prod(tensor.shape) != 1:
                    need_drop("optimizer", [f"{STATE}{fqn}.{slot}"], self.options, "DeepSpeed, whose state is of the parameters' own shapes,")
        lacking = [f for f in names if found and not found.keys() <= self._state.get(f, {}).keys()]
        if lacking:
            self.notes.append(f"{len(lacking)} parameters have no optimizer state ({lacking[0]}): it is written as zeros, for DeepSpeed has one step per group")
        return [*found]

    def scalars_of(self, names: Iterable[str]) -> dict[str, Taken]:
        """0-d slots (`step`) that parameters of a flat group share: one of them is taken; the others must be equal."""
        names = list(names)
        found = self._scalars.get(tuple(names))
        if found is not None:
            return found
        found = self._scalars[tuple(names)] = {}
        values: dict[str, tuple[str, float | None]] = {}
        for fqn in names:
            for slot, tensor in self._state.get(fqn, {}).items():
                if slot == "master" or prod(tensor.shape) != 1 or slot in self._all_slots:
                    continue
                name = f"{STATE}{fqn}.{slot}"
                value = self.source.scalars.get(name)
                first, known = values.setdefault(slot, (name, value))
                if first != name:
                    self.inlined.append(name)
                if known != value:
                    msg = f"{name} is {value}, {first} is {known}; DeepSpeed has one per param group"
                    raise Unstorable(msg, remedy="--drop optimizer writes the weights alone")
                code = "F32" if slot == "step" else tensor.dtype
                found.setdefault(slot, Taken(code, (), (Take(name, Box.whole(tensor.shape), code),)))
        return found

    @property
    def _all_slots(self) -> set[str]:
        return {s for slots in self.slots for s in slots}

    def dealt(self, names: list[str], n: int) -> list[str]:
        """The order in the flat buffer."""
        told = self.options.config.get("round_robin_gradients", setting(self.config, "zero_optimization", "round_robin_gradients"))
        return [names[i] for j in range(n) for i in range(j, len(names), n)] if _truth(told) else list(names)

    @property
    def config(self) -> dict[str, Any]:
        """The source's ds_config."""
        found = self.kept.get("ds_config")
        return found if isinstance(found, dict) else {}

    # --- flat tensors

    def master(self, fqn: str) -> str:
        """The name of a weight's fp32 master."""
        name = f"{STATE}{fqn}.master"
        return name if name in self.source.tensors else f"{MODEL}{fqn}"

    def _slot(self, slot: str) -> Callable[[str], str]:
        if not slot:
            return self.master
        return lambda fqn: f"{STATE}{fqn}.{slot}"

    def flat(self, slot: str, parts: Iterable[tuple[str, int, int, int]], length: int) -> Taken:
        """A partition: pieces of parameters, zeros between and behind them."""
        name_of, out, at = self._slot(slot), list[Plain](), 0
        for fqn, start, count, place in parts:
            if place > at:
                out.append(Zeros((place - at) * 4))
            name = name_of(fqn)
            if name in self.source.tensors:
                out += [Take(name, box, "F32") for box in boxes_of_flat_range(self.shapes[fqn], start, count)]
            else:
                out.append(Zeros(count * 4))
            at = place + count
        if length > at:
            out.append(Zeros((length - at) * 4))
        return Taken("F32", (length,), tuple(out))

    def layout(self, names: list[str], n: int) -> _Layout:
        """Stages 1 and 2."""
        return _Layout([(p, prod(self.shapes[p])) for p in names], n)

    def sub_groups(self, n: int) -> list[list[str]]:
        """Stage 3: groups cut where `sub_group_size` elements of a rank are reached."""
        return [s for subs in self._subs(n) for s in subs]

    def _subs(self, n: int) -> list[list[list[str]]]:
        told = self.options.config.get("sub_group_size", setting(self.config, "zero_optimization", "sub_group_size"))
        size = int(told) if told is not None else SUB_GROUP_SIZE
        out: list[list[list[str]]] = []
        for names in self.groups:
            subs: list[list[str]] = [[]]
            held = 0
            for fqn in names:
                if held >= size:
                    subs.append([])
                    held = 0
                subs[-1].append(fqn)
                held += -(-prod(self.shapes[fqn]) // n)
            out.append(subs)
        return out

    def shares(self, names: list[str], n: int) -> tuple[list[str], list[list[tuple[str, int, int, int]]], int]:
        """Stage 3: (names, per rank its parts, length of the flat tensor)."""
        parts: list[list[tuple[str, int, int, int]]] = [[] for _ in range(n)]
        at = 0
        for fqn in names:
            numel = prod(self.shapes[fqn])
            share = -(-numel // n)
            for rank in range(n):
                start = min(rank * share, numel)
                if count := min(share, numel - start):
                    parts[rank].append((fqn, start, count, at))
            at += share
        return names, parts, at

    # --- files

    def model_states(self, rank: int, n: int, groups: Sequence[Sequence[str]]) -> dict[str, Any]:
        """`*_model_states.pt` of a rank."""
        source, kept = self.source, self.kept
        shapes = [_ordered((p, _size(self.shapes[p])) for p in g) for g in groups]
        aliases = {a.removeprefix(MODEL): o.removeprefix(MODEL) for a, o in source.aliases.items() if a.startswith(MODEL)}
        frozen = self.stage != 1
        states: dict[str, Any] = {
            "module": self._module(aliases),
            "buffer_names": [b.removeprefix(MODEL) for b in source.tensors if b in self.buffers],
            "optimizer": None,
            "param_shapes": shapes,
            "frozen_param_shapes": _ordered((p, _size(self._shape(p))) for p in self.frozen) if frozen else None,
            "shared_params": aliases if rank == 0 else {},
            "frozen_param_fragments": _ordered((p, self._frozen(p, rank, n)) for p in self.frozen) if frozen else None,
            "lr_scheduler": self.back(source.objects.get(f"{_EXTRAS}lr_scheduler"), "lr_scheduler"),
            "data_sampler": self.back(kept.get("data_sampler"), "data_sampler"),
            "random_ltd": self.back(kept.get("random_ltd"), "random_ltd"),
            "sparse_tensor_module_names": kept.get("sparse_tensor_module_names") or [],
            "skipped_steps": int(kept.get("skipped_steps") or 0),
            "global_steps": self.step,
            "global_samples": int(kept.get("global_samples") or 0),
            "dp_world_size": n,
            "mp_world_size": 1,
            "checkpoint_parallel_dimensions": {"pp_degree": 1, "tp_degree": 1},
            "ds_config": self._ds_config(),
            "ds_version": VERSION,
        }
        return states | self._client

    def _module(self, aliases: Mapping[str, str]) -> dict[str, Any]:
        """The state dict; in stage 3 parameters are empty."""
        source = self.source
        out: dict[str, Any] = {}
        for name, tensor in source.tensors.items():
            if name.startswith(MODEL):
                fqn = name.removeprefix(MODEL)
                if name in self.buffers:
                    out[fqn] = whole(name, tensor.dtype, tensor.shape)
                else:
                    out[fqn] = self._placeholder(fqn) if self.stage == 3 else whole(name, self.weight_dtype(fqn), tensor.shape, share=name)
        for alias, owner in aliases.items():
            if alias not in out and owner in out:
                out[alias] = out[owner]
        for name, value in source.objects.items():
            if name.startswith(MODEL):
                out[name.removeprefix(MODEL)] = self.back(value, name)
        return OrderedDict(out)

    def _placeholder(self, fqn: str) -> Taken:
        return Taken(self.weight_dtype(fqn), (0,), ())

    def _frozen(self, fqn: str, rank: int, n: int) -> Taken:
        """A frozen parameter; in stage 3 this rank's share."""
        name, dtype, shape = f"{MODEL}{fqn}", self.weight_dtype(fqn), self._shape(fqn)
        if self.stage != 3:
            return whole(name, dtype, shape, share=name)
        share = -(-prod(shape) // n)
        start = min(rank * share, prod(shape))
        count = min(share, prod(shape) - start)
        parts: list[Plain] = [Take(name, box, dtype) for box in boxes_of_flat_range(shape, start, count)]
        if count < share:
            parts.append(Zeros((share - count) * ITEM_BYTES[dtype]))
        return Taken(dtype, (share,), tuple(parts))

    def optim_states12(self, rank: int, n: int, groups: list[list[str]], layouts: list[_Layout]) -> dict[str, Any]:
        """Stages 1 and 2."""
        state = {}
        for g, layout in enumerate(layouts):
            held: dict[str, Any] = dict(self.scalars_of(groups[g]))
            held |= {slot: self.flat(slot, layout.parts[rank], layout.per) for slot in self.slots[g]}
            if held:
                state[g] = held
        inner = {
            **self._common(self.stage),
            "base_optimizer_state": {"state": state, "param_groups": self.param_groups([[g] for g in range(len(groups))])},
            "single_partition_of_fp32_groups": [self.flat("", lay.parts[rank], lay.lean[rank]) for lay in layouts],
            "group_paddings": [lay.per - lay.lean[rank] for lay in layouts],
            "param_alignment_paddings": [[0] * len(g) for g in groups],
            "partition_count": [n] * len(groups),
            "ds_version": VERSION,
            "param_slice_mappings": [_ordered((f, _fragment(c, at)) for f, _, c, at in lay.parts[rank]) for lay in layouts],
        }
        return {"optimizer_state_dict": inner, "ds_config": self._ds_config(), "ds_version": VERSION}

    def optim_states3(self, rank: int, n: int, shares: list[tuple[list[str], list[list[tuple[str, int, int, int]]], int]]) -> dict[str, Any]:
        """Stage 3."""
        self._need_masters()
        ids, k = [], 0
        for subs in self._subs(n):
            ids.append([*range(k, k + len(subs))])
            k += len(subs)
        slots = [self.slots[g] for g, mine in enumerate(ids) for _ in mine]
        state = {}
        for k, (names, parts, length) in enumerate(shares):
            held: dict[str, Any] = dict(self.scalars_of(names))
            held |= {slot: self.flat(slot, parts[rank], length) for slot in slots[k]}
            if held:
                state[k] = held
        inner = {
            **self._common(3),
            "partition_count": n,
            "optimizer_state_dict": {"state": state, "param_groups": self.param_groups(ids)},
            "fp32_flat_groups": [self.flat("", parts[rank], length) for _, parts, length in shares],
        }
        inner.pop("clip_grad", None)
        return {"optimizer_state_dict": inner, "ds_config": self._ds_config(), "ds_version": VERSION}

    def _need_masters(self) -> None:
        """Stage 3 has no place for weights that are not their masters' rounding."""
        both = [f"{MODEL}{p}" for g in self.groups for p in g if self.master(p) != f"{MODEL}{p}"]
        if both and both[0] not in self.dropped:
            self.dropped += need_drop("weights", both, self.options, "ZeRO stage 3, which keeps fp32 masters alone,")

    def common_state(self) -> dict[str, Any]:
        """`zero/optimizer_state.pt`: what stages 1 and 2 read of it, and what stage 3 does."""
        if self._all_slots:
            self._need_masters()
        groups = self.param_groups([[g] for g in range(len(self.groups))])
        alike = {k: v for k, v in groups[0].items() if all(g.get(k, self) == v for g in groups)} if groups else {}
        step = next((v for n, v in self.source.scalars.items() if n.startswith(STATE) and n.endswith(".step")), None)
        state = {0: {"step": number("F32", step)}} if step is not None else {}
        return {
            **self._common(2),
            "group_paddings": [0] * len(groups),
            "partition_count": [self.options.ranks] * len(groups),
            "ds_version": VERSION,
            "param_groups": groups,
            "optimizer_state_dict": {"state": state, "param_groups": [{**alike, "params": [0]}]},
        }

    def universal_state(self, fqn: str, *, flat: bool) -> Iterable[tuple[str, Taken]]:
        """(slot, tensor) of one parameter."""
        shape = self.shapes[fqn]

        def all_of(name: str) -> Taken:
            taken = whole(name, "F32", shape)
            return Taken(taken.dtype, (prod(shape),), taken.parts) if flat else taken

        yield "fp32", all_of(self.master(fqn))
        for slot, tensor in self._state.get(fqn, {}).items():
            if slot == "master":
                continue
            name = f"{STATE}{fqn}.{slot}"
            if tensor.shape == shape and slot != "step":
                yield slot, all_of(name)
            elif slot == "step":
                yield slot, Taken("F32", (), (Take(name, Box.whole(tensor.shape), "F32"),))
            else:
                need_drop("optimizer", [name], self.options, "a universal checkpoint")

    # --- objects

    def param_groups(self, ids: list[list[int]]) -> list[dict[str, Any]]:
        """Settings of each group, with the numbers of its flat tensors."""
        hyper = self.source.groups or [{}]
        return [{**{k: self.back(v, k) for k, v in g.items() if k != "params"}, "params": mine} for g, mine in zip(hyper, ids, strict=True)]

    def _common(self, stage: int) -> dict[str, Any]:
        enum = call("deepspeed.runtime.zero.config:ZeroStageEnum", stage)
        clip = {"clip_grad": self.kept["clip_grad"]} if "clip_grad" in self.kept else {}  # stage 3 does not keep it: then the run's own holds
        return {"loss_scaler": self._loss_scaler(), "dynamic_loss_scale": self.dtype == "F16", "overflow": False, **clip, "zero_stage": enum}

    def _loss_scaler(self) -> Made | Any:
        """The source's in half precision; a constant 1 otherwise."""
        old = self.kept.get("loss_scaler")
        if self.dtype == "F16" and isinstance(old, dict) and str(old.get("__class__", "")).startswith("deepspeed.runtime.fp16.loss_scaler:"):
            return self.back(old, "loss_scaler")
        module = "deepspeed.runtime.fp16.loss_scaler"
        if self.dtype != "F16":
            return Made(Global(module, "LossScaler"), state={"cur_scale": 1.0, "dynamic": False})
        self.notes.append("the dynamic loss scale begins anew, at 65536")
        state = {
            "cur_scale": 65536.0, "cur_iter": 0, "last_overflow_iter": -1, "scale_factor": 2.0, "scale_window": 1000, "min_scale": 1, "delayed_shift": 1,
            "cur_hysteresis": 1, "consecutive_hysteresis": False, "raise_error_at_min_scale": True, "dynamic": True, "dtype": Dtype("F16"),
        }  # fmt: skip
        return Made(Global(module, "DynamicLossScaler"), state=state)

    def _ds_config(self) -> dict[str, Any]:
        config = copy.deepcopy(self.config)
        zero = config.get("zero_optimization")
        config["zero_optimization"] = {**(zero if isinstance(zero, dict) else {}), "stage": self.stage or 1}
        for key, told in (("round_robin_gradients", _truth), ("sub_group_size", int)):
            if key in self.options.config:
                config["zero_optimization"][key] = told(self.options.config[key])
        for section, code in (("bf16", "BF16"), ("fp16", "F16")):
            if section in config or self.dtype == code:
                config[section] = {**(config[section] if isinstance(config.get(section), dict) else {}), "enabled": self.dtype == code}
        return config

    def _client_state(self) -> dict[str, Any]:
        """All other objects, at the top of the model states; what has no place there is dropped if the user says so."""
        known = {GROUPS, "step", "extras.deepspeed", f"{_EXTRAS}lr_scheduler", PYTHON_SLOTS}
        out, homeless = {}, []
        for name, value in self.source.objects.items():
            if name in known or name.startswith(MODEL):
                continue
            key = name.removeprefix(_EXTRAS)
            if not name.startswith(_EXTRAS) or key in OWN_KEYS:
                homeless.append(name)
                continue
            out[key] = self.back(value, name)
        own = sorted({n for objects in self.source.per_rank.values() for n in objects})
        random = [n for n in own if n.startswith("rng.")]
        if random:
            self.notes.append(f"DeepSpeed does not keep random states: {', '.join(random[:3])} left out")
        self.dropped += need_drop("objects", [*homeless, *(n for n in own if n not in random)], self.options, "DeepSpeed")
        return out

    def back(self, value: Any, path: str) -> Any:  # noqa: PLR0911  one return per kind of value
        """What `deepspeed.plain` made of a value of a pickle, as it was; arrays that were tensors are tensors again."""
        match value:
            case {"__class__": str(what), "args": list(args), "state": state}:
                module, _, name = what.partition(":")
                if module.split(".")[0] in {"deepspeed", "argparse", "types", "datetime"}:
                    made = tuple(self.back(a, path) for a in args)
                    return Made(Global(module, name), made, state=self.back(state, path))
                return {"__class__": what, "args": [self.back(a, path) for a in args], "state": self.back(state, path)}
            case {"__dtype__": str(code)}:
                return Dtype(code)
            case dict():
                return type(value)((k, self.back(v, path)) for k, v in value.items())
            case list():
                return [self.back(v, path) for v in value]
            case tuple():
                return tuple(self.back(v, path) for v in value)
            case AsTensor():
                raw = np.ascontiguousarray(value)
                return Taken(_CODES[raw.dtype.name], tuple(raw.shape), (Known(raw.tobytes()),))
        return value


def _ordered(pairs: Iterable[tuple[str, Any]]) -> Any:
    return OrderedDict(pairs)


def _size(shape: Shape) -> Any:
    return call("torch:Size", tuple(shape))


def _fragment(count: int, start: int) -> Made:
    return Made(Global("deepspeed.utils.tensor_fragment", "fragment_address"), state={"numel": count, "start": start})


def _truth(value: Any) -> bool:
    return value.lower() in {"1", "true", "yes"} if isinstance(value, str) else bool(value)
