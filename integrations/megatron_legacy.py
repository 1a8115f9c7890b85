"""Megatron-LM's `torch` checkpoints (`--ckpt-format torch`): a folder per (tensor, pipeline) rank, as each rank holds its part.

    latest_checkpointed_iteration.txt
    iter_0001000/mp_rank_<tp:02d>[_<pp:03d>][_<ep:03d>]/model_optim_rng.pt   args, iteration, model (or model0, model1, ...), optimizer, rng_state
                                                        distrib_optim.pt     flat buffers of the distributed optimizer

Nothing in it says how ranks fit together; `megatron_layout` does, by name: rows and columns of the GPT family, layers counted stage by stage. Names of
Megatron-LM before core (`language_model.encoder...`) are read too. What every rank has a copy of is compared; the padding of the vocabulary is kept, and noted.

Parameters of the optimizer have numbers only: its groups hold the model's parameters in the order of their registration, which is that of the state dict.

Expert parallel ranks number their own experts from 0, and have two optimizers: one for experts, one for all else, which all of them hold alike; of a
distributed one only the first data parallel rank's file has the flat buffers, which is the first expert parallel rank's.

Not read, and said so: experts that are cut by another tensor parallelism than all else or lie in one tensor (GroupedMLP), checkpoint versions before 2.0
(another order of the rows of Q, K and V).

Source: Megatron-LM of August 2026, megatron/training/checkpointing.py; megatron-core 0.16.1, optimizer/distrib_optimizer.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import numpy as np

from ckptd.core.archive import Tensor as Stored
from ckptd.core.archive import read_torch
from ckptd.core.boxes import Box
from ckptd.core.emit import Known, OutFile, Plain, Take, Taken, Zeros, torch_file
from ckptd.core.image import ITEM_BYTES
from ckptd.core.logical import GROUPS, MODEL, STATE, Checkpoint, Row
from ckptd.core.pickles import Dtype, Global, Made
from ckptd.errors import BadForeign, Unstorable
from ckptd.formats import Place, Plan, ReadOptions, WriteOptions, check_settings, need_drop
from ckptd.integrations import megatron_layout as layout
from ckptd.integrations.megatron_parts import (
    LATEST,
    MASTERS,
    Buffer,
    FlatDecoder,
    Objects,
    OptimizerState,
    add_optimizer,
    foreign,
    iteration_folder,
    iteration_folders,
    keep_common,
    optimizer_state,
    pair_masters,
)
from ckptd.integrations.megatron_write import (
    COMMON,
    LINEARS,
    MegatronObjects,
    dtype_again,
    megatron_groups,
    note_scheduler,
    one_step,
    weight_dtypes,
    write_renamed,
)
from ckptd.integrations.torch_native import Refused

_MARKER = re.compile(r"(?:^|/)mp_rank_\d+(?:_\d+)*/model_optim_rng\.pt$")
_RANK = re.compile(r"(?:^|.*/)mp_rank_(\d+)(?:_(\d+))?(?:_(\d+))?/model_optim_rng\.pt$")
_CHUNK = re.compile(r"model(\d*)")


class Legacy:
    """The format "megatron-legacy"."""

    name = "megatron-legacy"
    title = "Megatron-LM: a folder per tensor and pipeline rank (--ckpt-format torch)"

    def probe(self, place: Place) -> bool:
        """See Format."""
        return bool(iteration_folders(place, _MARKER))

    def read(self, place: Place, options: ReadOptions) -> Checkpoint:
        """See Format. `tag`: an iteration, or "release". Hints: `groups`, `params`, `bucket_size` (of the DDP), `tied` (whether the last stage's output is the embedding)."""
        folder = iteration_folder(place, options.tag, _MARKER)
        with foreign(place):
            return _Reader(place, folder, options).checkpoint()

    def write(self, checkpoint: Checkpoint, options: WriteOptions) -> Plan:
        """See Format. `tp`, `pp`: ranks. `config`: `optimizer` ("distributed", "plain"), `spec` ("te", "local"), `args` (of Megatron-LM's namespace, by name)."""
        return write_renamed(checkpoint, lambda c: _Writer(c, options).plan())


LEGACY = Legacy()


# --- reading ----------------------------------------------------------------------------------------------------------------


@dataclass
class _Rank:
    """One rank's file. `chunks`: for each model chunk, the names of its tensors in the order of the state dict; with global numbers of layers."""

    tp: int
    pp: int
    ep: int
    file: str
    tree: dict[str, Any]
    models: list[dict[str, Stored]]
    chunks: list[dict[str, Stored]] = field(default_factory=list)


class _Reader:
    """One iteration being read."""

    def __init__(self, place: Place, folder: str, options: ReadOptions) -> None:
        self.place, self.options = place, options
        self.out = Checkpoint(LEGACY.name)
        self.objects = Objects(place)
        self.arguments: dict[str, Any] = {}
        self.ranks = [self._rank(n) for n in sorted(place.files) if _RANK.match(n) and n.startswith(f"{folder}/" if folder else "")]
        self._check()
        self.tp, self.pp, self.ep = 1 + max(r.tp for r in self.ranks), 1 + max(r.pp for r in self.ranks), 1 + max(r.ep for r in self.ranks)

    def checkpoint(self) -> Checkpoint:
        """All of it."""
        out = self.out
        self._number_layers()
        for rank in self.ranks:
            for chunk in rank.chunks:
                for fqn, leaf in chunk.items():
                    self._weight(rank, MODEL + fqn, fqn, leaf)
        state = OptimizerState([], None, {})
        for rank in self.ranks:
            one = self._optimizer(rank)
            state.groups += [g for g in one.groups if g not in state.groups]
            state.step = one.step if state.step is None else state.step
            state.rest |= one.rest
        self._flat_buffers()
        add_optimizer(out, state, self.options.hints)
        pair_masters(out)
        self._keep_objects()
        self.objects.note(out)
        return out

    # --- files ------------------------------------------------------------------------------------------------------------------

    def _rank(self, name: str) -> _Rank:
        found = _RANK.match(name)
        tree = read_torch(self.place.reader(name), self.place.files[name])
        if found is None or not isinstance(tree, dict):
            msg = f"{name}: no dict of Megatron-LM"
            raise BadForeign(msg)
        arguments = tree.get("args")
        if not self.arguments and isinstance(arguments, Made) and isinstance(arguments.state, dict):
            self.arguments = arguments.state
        pp, ep = int(found[2] or 0), int(found[3] or 0)
        if found[3] is None and self.arguments.get("pipeline_model_parallel_size") == 1:  # of two numbers the second is the stage, if there are stages
            pp, ep = 0, pp
        keys = sorted((k for k in tree if _CHUNK.fullmatch(k)), key=lambda k: int(k[5:] or 0))
        models: list[dict[str, Stored]] = []
        for key in keys:
            models.append({})
            _flatten(tree[key], "", models[-1])
        return _Rank(int(found[1]), pp, ep, name, tree, models)

    def _check(self) -> None:
        there = {(r.tp, r.pp, r.ep) for r in self.ranks}
        tps, pps, eps = ({r[i] for r in there} for i in range(3))
        if not there or there != {(t, p, e) for t in range(len(tps)) for p in range(len(pps)) for e in range(len(eps))}:
            msg = f"{self.place.label}: ranks {sorted(there)} are no grid of tensor, pipeline and expert ranks"
            raise BadForeign(msg, remedy="a rank's folder is missing")
        sizes = (("tensor", len(tps)), ("pipeline", len(pps)), ("expert", len(eps)))
        for name, size in ((f"{n}_model_parallel_size", size) for n, size in sizes):
            if (self.arguments.get(name) or size) != size:
                msg = f"{self.place.label}: {name} is {self.arguments[name]}, but there are {size} ranks"
                raise BadForeign(msg, remedy="a rank's folder is missing")
        if len(eps) > 1 and self.arguments.get("expert_tensor_parallel_size") not in {None, len(tps)}:
            msg = f"{self.place.label}: experts are cut for {self.arguments['expert_tensor_parallel_size']} tensor ranks, all else for {len(tps)}, which is not read in this format"
            raise BadForeign(msg, remedy="save with --ckpt-format torch_dist --dist-ckpt-optim-fully-reshardable")
        version = self.ranks[0].tree.get("checkpoint_version", 0)
        if not isinstance(version, int | float) or version < 2.0:
            msg = f"{self.place.label}: checkpoint version {version}, in which the rows of Q, K and V are ordered otherwise"
            raise BadForeign(msg, remedy="load it with Megatron-LM of 2021 to 2023 and save it again")
        if len({len(r.models) for r in self.ranks}) != 1 or not self.ranks[0].models:
            msg = f"{self.place.label}: ranks without a model, or with different numbers of chunks"
            raise BadForeign(msg)

    def _number_layers(self) -> None:
        """Local numbers of layers become global ones: chunk by chunk, stage by stage, as many as each rank has."""
        tied = self._tied()
        before = 0
        for chunk in range(len(self.ranks[0].models)):
            for stage in range(self.pp):
                here = [r for r in self.ranks if r.pp == stage]
                counts = set()
                for rank in here:
                    named = self._global_experts(rank, {layout.core_name(n): v for n, v in rank.models[chunk].items()})
                    fused = layout.fused_names(named)
                    numbers = {int(m[2]) for n in named if (m := layout.LAYER.fullmatch(n))}
                    counts.add(len(numbers))
                    if numbers != set(range(len(numbers))):
                        msg = f"{rank.file}: layers {sorted(numbers)}"
                        raise BadForeign(msg)
                    moved = {}
                    for name, leaf in named.items():
                        new = fused.get(name, name)
                        if found := layout.LAYER.fullmatch(new):
                            new = f"{found[1]}.{int(found[2]) + before}.{found[3]}"
                        moved[layout.EMBEDDING if tied and new == layout.OUTPUT else new] = leaf
                    rank.chunks.append(moved)
                if len(counts) != 1:
                    msg = f"{self.place.label}: tensor ranks of pipeline stage {stage} have {sorted(counts)} layers"
                    raise BadForeign(msg)
                before += counts.pop()

    def _global_experts(self, rank: _Rank, named: dict[str, Stored]) -> dict[str, Stored]:
        """A chunk's tensors, its experts by their numbers among those of all ranks."""
        if not any(map(layout.is_expert, named)):
            return named
        singles = layout.single_experts(named)
        held = {singles.get(n, n): v for n, v in named.items()}
        if self.ep == 1:
            return held
        found = {n: m for n in held if layout.is_expert(n) and (m := layout.EXPERT.fullmatch(n))}
        stacked = next((n for n in held if layout.is_expert(n) and n not in found), "")
        total = self.arguments.get("num_experts")
        numbers = {int(m[2]) for m in found.values()}
        if stacked or numbers != set(range(len(numbers))) or (isinstance(total, int) and total != len(numbers) * self.ep):
            what = f"{stacked} holds several experts" if stacked else f"experts {sorted(numbers)[:8]} of {total} on one of {self.ep} ranks"
            msg = f"{rank.file}: {what}, which is not read in this format"
            raise BadForeign(msg, remedy="save with --ckpt-format torch_dist --dist-ckpt-optim-fully-reshardable")
        first = rank.ep * len(numbers)
        return {f"{m[1]}.local_experts.{first + int(m[2])}.{m[3]}" if (m := found.get(n)) else n: v for n, v in held.items()}

    def _tied(self) -> bool:
        """Whether the last stage's output layer is its copy of the embedding."""
        if any(
            n.startswith(("word_embeddings_for_head.", "language_model.word_embeddings_for_head."))
            for r in self.ranks
            for m in r.models
            for n in m
        ):
            return True
        untied = self.arguments.get("untie_embeddings_and_output_weights")
        return self.pp > 1 and bool(self.options.hints.get("tied", untied is False))

    # --- tensors ----------------------------------------------------------------------------------------------------------------

    def _weight(self, rank: _Rank, name: str, fqn: str, leaf: Stored) -> None:
        """A rank's part of a tensor that is cut as the weight `fqn` is."""
        whole = layout.whole_shape(fqn, leaf.shape, self.tp)
        number = self.out.file(rank.file, self.place.files[rank.file])
        rows = []
        for share in layout.shares(fqn, whole, rank.tp, self.tp, gated=self._gated(rank)):
            first = share.at // prod(leaf.shape[1:]) if share.at else 0
            rows.append(
                Row(share.box, number, leaf.begin + first * (leaf.stride[0] if first else 0) * ITEM_BYTES[leaf.dtype], leaf.stride)
            )
        self.out.add(name, leaf.dtype, whole, rows)

    def _gated(self, rank: _Rank) -> bool:
        return layout.is_gated({n: leaf.shape for chunk in rank.chunks for n, leaf in chunk.items()})

    def _optimizer(self, rank: _Rank) -> OptimizerState:
        """A rank's optimizer, or several: of experts, and of all else. Numbered state gets the names of the group's parameters, in their order."""
        found = rank.tree.get("optimizer")
        parts = found if isinstance(found, list) else [found]
        values = [self._part(rank, p, self._names_of(rank, i)) for i, p in enumerate(parts)]
        return optimizer_state([v for v in values if v])

    def _names_of(self, rank: _Rank, number: int) -> set[str]:
        """The weights that a rank's optimizer `number` may have: all, where there is one."""
        every = [n for chunk in rank.chunks for n in chunk]
        found = rank.tree.get("optimizer")
        if not isinstance(found, list) or len(found) == 1:
            return set(every)
        kinds = {bool(layout.group_key(g)[2]) for g in _inner(found[number]).get("param_groups") or ()}
        if len(found) != 2 or len(kinds) > 1 or (kinds and kinds != {number == 1}):
            msg = f"{rank.file}: {len(found)} chained optimizers, and not one of experts and one of all else"
            raise BadForeign(msg, remedy="save with --ckpt-format torch_dist")
        return {n for n in every if layout.is_expert(n) == (number == 1)}

    def _part(self, rank: _Rank, found: Any, names: set[str]) -> dict[str, Any]:
        inner = _inner(found)
        if not isinstance(found, dict) or not inner:
            return {}
        kept = {k: v for k, v in found.items() if k not in {"optimizer", "state", "param_groups", "fp32_from_fp16_params"}}
        groups = [{k: v for k, v in g.items() if k != "params"} for g in inner.get("param_groups") or ()]
        values: dict[str, Any] = self.objects.plain({"param_groups": groups, **kept}, "optimizer", rank.file)
        if inner.get("state"):
            values["state"] = {"common_step": self._numbered(rank, inner, found.get("fp32_from_fp16_params"), names)}
        return values

    def _numbered(self, rank: _Rank, inner: Mapping[str, Any], masters: Any, those: set[str]) -> float | None:
        state, groups = inner["state"], inner["param_groups"]
        weights = {n: leaf for chunk in rank.chunks for n, leaf in chunk.items() if n in those}
        trained = self.options.hints.get("params")
        shapes = {n: leaf.shape for n, leaf in weights.items() if not trained or n in trained}
        steps = set()
        for at, (group, names) in enumerate(
            zip(groups, layout.members(groups, shapes, self.options.hints.get("groups")), strict=True)
        ):
            numbers = group["params"]
            halves = [n for n in names if weights[n].dtype != "F32"] if masters else []
            held = masters[at] if masters else []
            named = [*halves, *[n for n in names if n not in halves]]  # Megatron's optimizer has a group's 16-bit parameters first
            if len(named) != len(numbers) or len(held) != len(halves):
                msg = (
                    f"{rank.file}: param group {at} has {len(numbers)} parameters; by Megatron's rules it should have {len(named)}"
                )
                raise BadForeign(
                    msg,
                    remedy='give the hint "groups": {name of the parameter: number of its group}; "params" where some are not trained',
                )
            for fqn, master in zip(halves, held, strict=True):
                self._state(rank, fqn, "master", master, weights[fqn])
            for fqn, number in zip(named, numbers, strict=True):
                for slot, leaf in (state.get(number) or {}).items():
                    if slot == "step":
                        value = self.objects.plain(leaf, f"optimizer.state.{number}.step", rank.file)
                        steps.add(float(value.item() if isinstance(value, np.ndarray) else value))
                    else:
                        self._state(rank, fqn, MASTERS.get(slot, slot), leaf, weights[fqn])
        if len(steps) > 1:
            msg = f"{rank.file}: parameters are at steps {sorted(steps)[:4]}"
            raise BadForeign(msg)
        return steps.pop() if steps else None

    def _state(self, rank: _Rank, fqn: str, slot: str, leaf: Any, weight: Stored) -> None:
        if not isinstance(leaf, Stored) or leaf.shape != weight.shape:
            msg = f"{rank.file}: {slot} of {fqn} should have the shape {list(weight.shape)}, not {list(getattr(leaf, 'shape', ()))}"
            raise BadForeign(msg, remedy='the parameters\' order is not the usual one: give the hint "groups"')
        self._weight(rank, f"{STATE}{fqn}.{slot}", fqn, leaf)

    # --- flat buffers -------------------------------------------------------------------------------------------------------------

    def _flat_buffers(self) -> None:
        decoder: FlatDecoder | None = None
        for rank in self.ranks:
            name = rank.file.replace("model_optim_rng.pt", "distrib_optim.pt")
            if name not in self.place.files:
                continue
            if decoder is None:
                decoder = FlatDecoder(self.place, self.out, self.tp, self._sizes_of)
            tree = read_torch(self.place.reader(name), self.place.files[name])
            parts = tree if isinstance(tree, list) else [tree]
            self._stage = rank.pp
            for number, part in enumerate(parts):
                if part is None and len(parts) > 1:  # another rank's file has it
                    continue
                if not isinstance(part, dict) or not part.get("buckets_coalesced") or len(parts) != self._optimizers(rank):
                    msg = f"{name}: not a dict of coalesced buckets for each of {self._optimizers(rank)} optimizers"
                    raise BadForeign(msg, remedy="files of before February 2024 are not read: save with --ckpt-format torch_dist")
                self._decode(decoder, rank, name, part, self._names_of(rank, number))

    def _optimizers(self, rank: _Rank) -> int:
        found = rank.tree.get("optimizer")
        return len(found) if isinstance(found, list) else 1

    def _decode(self, decoder: FlatDecoder, rank: _Rank, name: str, tree: Mapping[Any, Any], names: set[str]) -> None:
        """The buffers of one optimizer, which has these parameters."""
        chunks = [{n: v for n, v in c.items() if n in names} for c in rank.chunks]
        dtypes = {leaf.dtype for chunk in chunks for leaf in chunk.values()}
        hint = [n for n in self.options.hints.get("params") or () if n in names]
        for number, held in ((k, v) for k, v in tree.items() if isinstance(k, int)):
            chunk = chunks[number] if len(chunks) > 1 and number < len(chunks) else {n: v for c in chunks for n, v in c.items()}
            for (code, _), slots in held.items():
                order = [n for n, leaf in chunk.items() if leaf.dtype == code.name or len(dtypes) == 1]
                decoder.decode(f"{name}, buffer {number}", rank.tp, [hint or order], self._buffer(name, code.name, slots))

    def _buffer(self, name: str, dtype: str, slots: Mapping[str, Any]) -> Buffer:
        file = self.out.file(name, self.place.files[name])
        rows, totals = {}, set()
        for slot, leaf in slots.items():
            if isinstance(leaf, Stored):
                if leaf.dtype != "F32" or len(leaf.shape) != 1 or not leaf.contiguous:
                    msg = f"{name}: {slot} is {leaf.dtype}{list(leaf.shape)}; one dimension of F32 is read"
                    raise BadForeign(msg)
                rows[slot] = [Row(Box.whole(leaf.shape), file, leaf.begin, (1,))]
                totals.add(leaf.shape[0])
        if len(totals) != 1:
            msg = f"{name}: tensors of {sorted(totals)} elements in one buffer"
            raise BadForeign(msg)
        return Buffer(dtype, totals.pop(), rows)

    def _sizes_of(self, names: Sequence[str], numels: Sequence[int]) -> Iterator[list[int]]:
        """How DDP may have cut the buffer: not at all, or as its arguments say; a tied embedding always has its own bucket."""
        tied = self._tied()
        alone = [tied and n == layout.EMBEDDING for n in names]
        dp = self.arguments.get("data_parallel_size")
        sizes = [
            self.options.hints.get("bucket_size"),
            None,
            layout.default_bucket_size(self.arguments, self._stage, dp if isinstance(dp, int) else 1),
        ]
        for size in dict.fromkeys(int(s) if s is not None else None for s in sizes):
            yield layout.bucket_sizes(numels, alone, size)

    # --- objects ----------------------------------------------------------------------------------------------------------------

    def _keep_objects(self) -> None:
        out, first = self.out, self.ranks[0]
        common = {
            k: v for k, v in first.tree.items() if not _CHUNK.fullmatch(k) and k not in {"iteration", "optimizer", "rng_state"}
        }
        keep_common(out, self.objects.plain(common, "", first.file))
        if isinstance(first.tree.get("iteration"), int):
            out.objects["step"] = first.tree["iteration"]
        for rank in self.ranks:
            if rank.tree.get("rng_state") is not None:
                out.per_rank[(rank.pp * self.ep + rank.ep) * self.tp + rank.tp] = {
                    "extras.rng_state": self.objects.plain(rank.tree["rng_state"], "rng_state", rank.file)
                }
        if out.per_rank and self.ep == 1:
            out.objects["extras.rng_grid"] = [self.pp, self.tp]
        padded, true = self.arguments.get("padded_vocab_size"), self.arguments.get("vocab_size")
        if isinstance(padded, int) and isinstance(true, int) and padded != true:
            out.notes.append(f"the vocabulary is padded from {true} to {padded} rows, which are kept")


def _flatten(value: Any, path: str, into: dict[str, Stored]) -> None:
    """Tensors of nested dicts by dotted name; FP8's `_extra_state` is none of the model's."""
    if isinstance(value, Stored) and not path.endswith("_extra_state"):
        into[path] = value
    elif isinstance(value, dict):
        for key, item in value.items():
            _flatten(item, f"{path}.{key}" if path else str(key), into)


def _inner(optimizer: Any) -> dict[str, Any]:
    """The dict with the param groups of an optimizer; an empty one where there is none."""
    inner = optimizer.get("optimizer", optimizer) if isinstance(optimizer, dict) else None
    return inner if isinstance(inner, dict) else {}


# --- writing ----------------------------------------------------------------------------------------------------------------


class _Writer:
    """One target being planned."""

    def __init__(self, checkpoint: Checkpoint, options: WriteOptions) -> None:
        check_settings(options, {"optimizer", "spec", "args"}, f"the format {LEGACY.name}")
        self.source, self.options = checkpoint, options
        self.local = options.config.get("spec", "te") == "local"
        self.plain = options.config.get("optimizer", "distributed") == "plain"
        self.notes: list[str] = []
        self.outgoing = MegatronObjects(checkpoint, options, "Megatron-LM's torch format")
        self.dropped = self.outgoing.dropped
        self.dtypes = weight_dtypes(checkpoint, options, self.dropped)
        self.shapes = {n: checkpoint.tensors[MODEL + n].shape for n in self.dtypes}
        self.gated = layout.is_gated(self.shapes)
        self.layers = 1 + max((int(m[2]) for n in self.shapes if (m := layout.LAYER.fullmatch(n))), default=-1)
        self.arguments = {**(checkpoint.objects.get("extras.args") or {}), **(options.config.get("args") or {})}
        self.arguments |= {"tensor_model_parallel_size": options.tp, "pipeline_model_parallel_size": options.pp}
        self.arguments |= {k: 1 for k in ("expert_model_parallel_size",) if k in self.arguments}
        self.arguments |= {k: None for k in ("expert_tensor_parallel_size",) if k in self.arguments}
        self.stages = layout.stages(self.layers, options.pp, self.arguments)
        self.tied = options.pp > 1 and layout.OUTPUT not in self.shapes
        self.arguments["untie_embeddings_and_output_weights"] = layout.OUTPUT in self.shapes
        self.step = int(checkpoint.objects.get("step", 0))

    def plan(self) -> Plan:
        """All files."""
        state = {} if "optimizer" in self.options.drop else self.source.state()
        inlined: list[str] = []
        step = 0.0
        if "optimizer" in self.options.drop:
            self.dropped += [n for n in self.source.tensors if n.startswith("optim.")]
        elif state:
            step, inlined = one_step(self.source, self.notes)
            note_scheduler(self.source, self.notes)
        others = [n for n in self.source.tensors if n.startswith("extras.")]
        self.dropped += need_drop("objects", others, self.options, self.outgoing.target)
        common = self._common()
        groups = megatron_groups(self.source, self.notes)
        files: list[OutFile] = []
        for pp in range(self.options.pp):
            for tp in range(self.options.tp):
                folder = f"iter_{self.step:07d}/mp_rank_{tp:02d}" + (f"_{pp:03d}" if self.options.pp > 1 else "")
                files += self._rank(folder, tp, pp, state, groups, step, common)
        files.append(OutFile(LATEST, (Known(str(self.step).encode()),)))
        return Plan(
            files, dropped=self.dropped, inlined=inlined if not self.plain else [], notes=[*self.notes, *self.outgoing.notes]
        )

    def _rank(
        self, folder: str, tp: int, pp: int, state: Mapping[str, Any], groups: Sequence[Mapping[str, Any]], step: float, common: Mapping[str, Any]
    ) -> Iterator[OutFile]:  # fmt: skip
        order = [*layout.registration_orders([n for n in self.shapes if layout.stage_of(n, self.stages) == pp])][
            1 if self.local else 2
        ]
        if self.tied and pp == self.options.pp - 1:
            order.append(layout.EMBEDDING)
        tree = {**common, "model": self._model(order, tp, pp)}
        trained = [n for n in order if n in state]
        rng = self.source.per_rank.get(pp * self.options.tp + tp, {}).get("extras.rng_state")
        if (
            rng is not None
            and self.source.objects.get("extras.rng_grid") == [self.options.pp, self.options.tp]
            and "objects" not in self.options.drop
        ):
            tree["rng_state"] = self.outgoing.value("rng_state", rng)
        if state:
            kept = [{k: self.outgoing.value(f"{GROUPS}.{k}", v) for k, v in g.items() if k != "params"} for g in groups]
            members = [[n for n in trained if n in set(g["params"])] for g in groups]
            if self.plain:
                tree["optimizer"] = self._numbered(kept, members, state, tp)
            else:
                tree["optimizer"] = {"optimizer": {"param_groups": [{**g, "step": step} for g in kept]}}
                yield OutFile(f"{folder}/distrib_optim.pt", torch_file(self._flat(trained, state, tp)))
        yield OutFile(f"{folder}/model_optim_rng.pt", torch_file(tree))

    def _parts(self, name: str, fqn: str, dtype: str, tp: int) -> tuple[Plain, ...]:
        return tuple(Take(name, s.box, dtype) for s in layout.shares(fqn, self.shapes[fqn], tp, self.options.tp, gated=self.gated))

    def _taken(self, name: str, fqn: str, dtype: str, tp: int) -> Taken:
        return Taken(dtype, layout.local_shape(fqn, self.shapes[fqn], self.options.tp), self._parts(name, fqn, dtype, tp))

    def _model(self, order: Sequence[str], tp: int, pp: int) -> dict[str, Any]:
        first = self.stages[pp].start
        made: dict[str, Any] = {}
        for fqn in order:
            name = layout.OUTPUT if self.tied and pp and fqn == layout.EMBEDDING else fqn
            if found := layout.LAYER.fullmatch(fqn):
                name = f"{found[1]}.{int(found[2]) - first}.{found[3]}"
            made[layout.unfused_name(name) if self.local else name] = self._taken(MODEL + fqn, fqn, self.dtypes[fqn], tp)
        modules = [m for m in LINEARS if not self.local or "core_attention" not in m]
        for layer in range(len(self.stages[pp])):
            held = [m for m in modules if f"decoder.layers.{layer}.{m}.weight" in made or "core_attention" in m]
            made |= {f"decoder.layers.{layer}.{m}._extra_state": None for m in held}
        return made

    def _master(self, fqn: str, state: Mapping[str, Any]) -> str:
        return f"{STATE}{fqn}.master" if "master" in state[fqn] else MODEL + fqn

    def _numbered(
        self, groups: Sequence[dict[str, Any]], members: Sequence[Sequence[str]], state: Mapping[str, Any], tp: int
    ) -> dict[str, Any]:
        """The non-distributed optimizer: parameters by number, group by group."""
        numbered, numbers = {}, iter(range(sum(map(len, members))))
        made = []
        for group, names in zip(groups, members, strict=True):
            made.append({**group, "params": [next(numbers) for _ in names]})
            for number, fqn in zip(made[-1]["params"], names, strict=True):
                slots = {}
                for slot, tensor in state[fqn].items():
                    name = f"{STATE}{fqn}.{slot}"
                    if slot == "step":
                        slots[slot] = Taken("F32", (), (Take(name, Box.whole(tensor.shape), "F32"),))
                    elif slot != "master":
                        slots[slot] = self._taken(name, fqn, tensor.dtype, tp)
                numbered[number] = slots
        inner = {"state": numbered, "param_groups": made}
        if all(d not in {"BF16", "F16"} for d in self.dtypes.values()):
            return inner
        return {
            "optimizer": inner,
            "fp32_from_fp16_params": [[self._taken(self._master(n, state), n, "F32", tp) for n in names] for names in members],
        }

    def _flat(self, trained: Sequence[str], state: Mapping[str, Any], tp: int) -> dict[Any, Any]:
        """`distrib_optim.pt`: one buffer for each dtype of weights, as DDP without overlap cuts it."""
        tree: dict[Any, Any] = {"buckets_coalesced": True}
        for number, dtype in enumerate(dict.fromkeys(self.dtypes[n] for n in trained)):
            names = [n for n in reversed(trained) if self.dtypes[n] == dtype]
            numels = [prod(layout.local_shape(n, self.shapes[n], self.options.tp)) for n in names]
            sizes = layout.bucket_sizes(numels, [self.tied and n == layout.EMBEDDING for n in names], None)
            places = layout.places_in_buckets(numels, sizes)
            if places is None:
                msg = f"{dtype}: the parameters do not fill their buckets"
                raise Unstorable(msg)
            begins = [sum(sizes[:b]) + at for b, at in places]
            slots: dict[str, Any] = {}
            for slot in ("param", "exp_avg", "exp_avg_sq"):
                parts: list[Plain] = []
                at = 0
                for fqn, begin, numel in zip(names, begins, numels, strict=True):
                    name = self._master(fqn, state) if slot == "param" else f"{STATE}{fqn}.{slot}"
                    if name not in self.source.tensors:
                        msg = f"{fqn} has no {slot}: Megatron's distributed optimizer is Adam"
                        raise Unstorable(msg, remedy="--drop optimizer")
                    parts += [Zeros(4 * (begin - at)), *self._parts(name, fqn, "F32", tp)]
                    at = begin + numel
                parts.append(Zeros(4 * (sum(sizes) - at)))
                slots[slot] = Taken("F32", (sum(sizes),), tuple(p for p in parts if p.nbytes))
            tree[number] = {(Dtype(dtype), Dtype("F32")): {**slots, "numel_unpadded": sum(sizes)}}
        return tree

    def _common(self) -> dict[str, Any]:
        """What every rank's file says."""
        common: dict[str, Any] = {"checkpoint_version": 3.0, "iteration": self.step}
        lost: list[str] = []
        kept: dict[str, Any] = {}
        for name, value in self.source.objects.items():
            key = name.removeprefix("extras.")
            if name in {GROUPS, "step", "extras.rng_grid", "extras.extra_state", "extras.args"}:
                continue
            if "objects" in self.options.drop:
                self.dropped.append(name)
                continue
            try:
                (common if name.startswith("extras.") and key in COMMON else kept)[key if key in COMMON else name] = (
                    self.outgoing.value(name, value)
                )
            except Refused as e:
                lost.append(str(e))
        self.dropped += need_drop("objects", lost, self.options, self.outgoing.target)
        if kept:
            common["ckptd"] = kept
        if self.source.per_rank and self.source.objects.get("extras.rng_grid") != [self.options.pp, self.options.tp]:
            self.dropped += [f"{n} of rank {r}" for r, held in self.source.per_rank.items() for n in held]
            self.notes.append("random states of other ranks are left out: load with --no-load-rng")
        common["args"] = Made(Global("argparse", "Namespace"), (), {k: dtype_again(v) for k, v in self.arguments.items()})
        return common
