"""DeepSpeed, live: a session over an engine's ZeRO partitions, and a checkpoint engine for `save_checkpoint`.

    session = deepspeed_live.attach(engine)
    start = session.restore().step
    for step in range(start + 1, total + 1):
        ...
        engine.step()
        session.step(step)

What is captured are the fp32 partitions that a rank owns, as boxes of the logical parameters, never gathered; the 16-bit weights are their rounding and are made
again after a restore. So a snapshot of any stage and number of ranks restores into any other, and into plain torch with fp32 weights.

    leaves    model.<fqn>                   fragments of the fp32 masters; buffers, frozen parameters
              optim.state.<fqn>.<slot>      fragments of the moments; `step` as it is for the flat group
    objects   optim.param_groups, optim.scalars, extras.lr_scheduler, extras.deepspeed (counters, loss scaler), extras of yours

Checked with deepspeed 0.19.8, stages 1, 2, 3 without offload. BF16_Optimizer, NVMe and expert groups are refused by name.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import xxhash
from torch import Tensor, nn
from torch.optim import Optimizer

from ckptd import session as sessions
from ckptd import state
from ckptd.core.boxes import Box, Shape, boxes_of_flat_range
from ckptd.core.logical import GROUPS
from ckptd.errors import ChecksumMismatch, Unstorable
from ckptd.session import Restored, Session
from ckptd.state import Leaf, Obj, TrainState

COUNTERS = ("global_steps", "global_samples", "skipped_steps", "micro_steps")
SUMS = ".ckptd-sums.json"


class _Part:
    """A stretch of a parameter in a flat tensor of this rank."""

    def __init__(self, fqn: str, shape: Shape, start: int, count: int, at: int) -> None:
        self.fqn, self.shape, self.start, self.count, self.at = fqn, shape, start, count, at

    def boxes(self) -> Iterator[tuple[Box, int]]:
        """(box, place of its first element in the flat tensor)."""
        at = self.at
        for box in boxes_of_flat_range(self.shape, self.start, self.count):
            yield box, at
            at += box.numel


class _Flat:
    """A flat tensor that the inner optimizer updates: its parameters in order, and what of them lies here."""

    def __init__(self, tensor: Tensor, group: int, shapes: dict[str, Shape], parts: list[_Part]) -> None:
        self.tensor, self.group, self.shapes, self.parts = tensor, group, shapes, parts


def _flats(opt: Any) -> list[_Flat]:
    """The flat tensors of a ZeRO optimizer."""
    if hasattr(opt, "fp32_partitioned_groups_flat"):
        return [_flat3(opt, k) for k in range(len(opt.fp32_partitioned_groups_flat))]
    if hasattr(opt, "round_robin_bit16_groups"):
        return [_flat12(opt, g) for g in range(len(opt.single_partition_of_fp32_groups))]
    msg = f"{type(opt).__module__}.{type(opt).__qualname__}: only ZeRO stages 1, 2 and 3 are captured from their partitions"
    raise Unstorable(msg, remedy="attach(model=engine.module, optimizer=engine.optimizer.optimizer) where nothing is partitioned; zero_optimization.stage 1 otherwise")


def _flat12(opt: Any, g: int) -> _Flat:
    if getattr(opt, "has_moe_layers", False) and opt.is_moe_param_group[g]:
        msg = f"param group {g} holds experts, whose partitions lie over fewer ranks"
        raise Unstorable(msg)
    tensor = opt.single_partition_of_fp32_groups[g]
    group = opt.real_dp_process_group[g]
    per = tensor.numel()
    low, high = dist.get_rank(group) * per, (dist.get_rank(group) + 1) * per
    shapes, parts = {}, []
    for p, offset in zip(opt.round_robin_bit16_groups[g], opt.round_robin_bit16_offsets[g], strict=True):
        fqn, numel = opt.param_names[p], p.numel()
        shapes[fqn] = tuple(p.shape)
        a, b = max(low, offset), min(high, offset + numel)
        if b > a:
            parts.append(_Part(fqn, tuple(p.shape), a - offset, b - a, a - low))
    return _Flat(tensor, g, shapes, parts)


def _flat3(opt: Any, k: int) -> _Flat:
    tensor = opt.fp32_partitioned_groups_flat[k]
    if tensor is None or getattr(opt, "swap_optimizer", False):
        msg = f"sub-group {k}: its fp32 partition is not in memory (NVMe)"
        raise Unstorable(msg)
    shapes, parts, at = {}, [], 0
    for p in opt.fp16_groups[k]:
        fqn, shape, numel = opt.param_names[p], tuple(p.ds_shape), p.ds_numel
        shapes[fqn] = shape
        share, rank = p.partition_numel(), dist.get_rank(p.ds_process_group)
        start = min(rank * share, numel)
        if count := min(share, numel - start):
            parts.append(_Part(fqn, shape, start, count, at))
        at += share
    return _Flat(tensor, opt.sub_group_to_group_id[k], shapes, parts)


def _flat(source: Callable[[], Tensor | None], at: int, box: Box) -> state.Cut:
    """A box whose elements lie in a flat tensor, one after the other, from element `at` on."""
    return state.Cut(source, lambda live: live.view(-1)[at : at + box.numel].view(box.extent))


class Partitions:
    """What a session sees of an engine."""

    def __init__(self, engine: Any, extras: Mapping[str, Any]) -> None:
        self._engine, self._extras = engine, extras
        self._opt = engine.optimizer
        self._inner: Optimizer = engine.optimizer.optimizer

    def look(self, rank: int) -> TrainState:
        """Leaves and objects of this rank. Raises Unstorable, by name."""
        flats = _flats(self._opt)
        trained = {fqn for flat in flats for fqn in flat.shapes}
        slots = self._slots(flats)
        model = state.model_state([("", self._engine.module)], ())
        leaves = [leaf for flat in flats for leaf in self._masters(flat)]
        leaves += [leaf for leaf in model.leaves if leaf.eager]
        leaves += self._frozen(trained, model.leaves)
        for flat, known in zip(flats, slots, strict=True):
            leaves += [leaf for slot, (dtype, vector) in known.items() for leaf in self._moments(flat, slot, dtype, vector=vector)]
        held = repr(sorted((leaf.name, leaf.box) for leaf in leaves if not leaf.local)).encode()
        coords = {"rank": rank, "holds": xxhash.xxh3_64_intdigest(held) >> 1}
        aliases = {a: o for a, o in model.aliases.items() if o.removeprefix("model.") in trained or o in {leaf.name for leaf in leaves}}
        return TrainState(leaves, [*model.objects, *self._objects(flats)], aliases, coords)

    def _slots(self, flats: Sequence[_Flat]) -> list[dict[str, tuple[torch.dtype, bool]]]:
        """slot -> (dtype, one per element?) of each flat tensor: what there is, and what a first step will make."""
        grouped = not any(g["params"] for g in self._inner.param_groups)  # stage 3 keeps the groups empty between steps
        if grouped:
            self._opt._set_fp32_optimizer_param_groups()  # noqa: SLF001  DeepSpeed's own way to ask its inner optimizer
        try:
            predicted = state.predict(self._inner) or {}
        finally:
            if grouped:
                self._opt._clear_fp32_optimizer_param_groups()  # noqa: SLF001
        out = []
        for flat in flats:
            found = {k: (dtype, shape == tuple(flat.tensor.shape)) for k, (dtype, shape) in predicted.get(id(flat.tensor), {}).items()}
            live = self._inner.state.get(flat.tensor, {})
            found |= {k: (v.dtype, v.shape == flat.tensor.shape) for k, v in live.items() if isinstance(v, Tensor)}
            out.append(found)
        return out

    def _masters(self, flat: _Flat) -> Iterator[Leaf]:
        dtype = state.DTYPES[flat.tensor.dtype]
        for part in flat.parts:
            for box, at in part.boxes():
                yield Leaf(f"model.{part.fqn}", dtype, part.shape, box, "", _flat(lambda: flat.tensor, at, box))

    def _moments(self, flat: _Flat, slot: str, dtype: torch.dtype, *, vector: bool) -> Iterator[Leaf]:
        code, inner = state.DTYPES[dtype], self._inner

        def live() -> Tensor | None:
            found = inner.state[flat.tensor].get(slot) if flat.tensor in inner.state else None
            return found if isinstance(found, Tensor) else None

        def make() -> Tensor:
            made = torch.zeros_like(flat.tensor, dtype=dtype, requires_grad=False) if vector else torch.zeros((), dtype=dtype)
            held: Tensor = inner.state[flat.tensor].setdefault(slot, made)
            return held

        if vector:
            for part in flat.parts:
                for box, at in part.boxes():
                    yield Leaf(f"optim.state.{part.fqn}.{slot}", code, part.shape, box, "", _flat(live, at, box), like=make)
            return
        scalar = Box((), ())
        for fqn in flat.shapes:
            yield Leaf(f"optim.state.{fqn}.{slot}", code, (), scalar, "", live, assumed=True, like=make)

    def _frozen(self, trained: set[str], leaves: Sequence[Leaf]) -> Iterator[Leaf]:
        """Parameters that no flat tensor has; in stage 3 a share of each."""
        whole = {leaf.name: leaf for leaf in leaves}
        seen: set[int] = set()
        for fqn, p in self._engine.module.named_parameters():
            if fqn in trained or id(p) in seen:
                continue
            seen.add(id(p))
            if not hasattr(p, "ds_tensor"):
                yield whole[f"model.{fqn}"]
                continue
            share, shape = p.ds_tensor.ds_numel, tuple(p.ds_shape)
            start = min(dist.get_rank(p.ds_process_group) * share, prod(shape))
            part = _Part(fqn, shape, start, min(share, prod(shape) - start), 0)
            for box, at in part.boxes():
                yield Leaf(f"model.{fqn}", state.DTYPES[p.ds_tensor.dtype], shape, box, "", _flat(_tensor_of(p), at, box))

    # --- objects

    def _objects(self, flats: Sequence[_Flat]) -> list[Obj]:
        engine = self._engine
        extras = dict(self._extras)
        if engine.lr_scheduler is not None:
            extras.setdefault("lr_scheduler", engine.lr_scheduler)
        return [
            Obj(GROUPS, "optimizer", lambda: self._groups(flats), lambda groups: self._set_groups(flats, groups)),
            Obj("optim.scalars", "optimizer", lambda: self._scalars(flats), lambda values: self._set_scalars(flats, values)),
            Obj("extras.deepspeed", "same", self._counters, self._set_counters),
            *(state.extra_object(name, value) for name, value in extras.items()),
            *state.rng_objects(),
        ]

    def _groups(self, flats: Sequence[_Flat]) -> list[dict[str, Any]]:
        names: list[list[str]] = [[] for _ in self._inner.param_groups]
        for flat in flats:
            names[flat.group] += flat.shapes
        return [{**{k: v for k, v in g.items() if k != "params"}, "params": n} for g, n in zip(self._inner.param_groups, names, strict=True)]

    def _set_groups(self, flats: Sequence[_Flat], groups: Sequence[Mapping[str, Any]]) -> None:
        saved = {p: g for g in groups for p in g["params"]}
        for i, group in enumerate(self._inner.param_groups):
            mine = next((saved[f] for flat in flats if flat.group == i for f in flat.shapes if f in saved), None)
            for key, value in (mine or {}).items():
                if key != "params":
                    group[key] = value

    def _scalars(self, flats: Sequence[_Flat]) -> dict[str, dict[str, Any]]:
        found: dict[str, dict[str, Any]] = {}
        for flat in flats:
            if flat.tensor in self._inner.state:
                plain = {k: v for k, v in self._inner.state[flat.tensor].items() if not isinstance(v, Tensor)}
                found |= {fqn: dict(plain) for fqn in flat.shapes}
        return found

    def _set_scalars(self, flats: Sequence[_Flat], values: Mapping[str, Mapping[str, Any]]) -> None:
        for flat in flats:
            held = [dict(values[f]) for f in flat.shapes if values.get(f)]
            if any(h != held[0] for h in held[1:]):
                msg = f"{next(iter(flat.shapes))}: parameters of its group were saved with different values of {', '.join(held[0])}"
                raise Unstorable(msg, remedy="DeepSpeed has one per param group: use the groups that were saved")
            if held:
                self._inner.state[flat.tensor].update(held[0])

    def _counters(self) -> dict[str, Any]:
        engine, scaler = self._engine, getattr(self._opt, "loss_scaler", None)
        kept: dict[str, Any] = {k: int(getattr(engine, k)) for k in COUNTERS}
        if scaler is not None:
            plain = {k: {"__dtype__": state.DTYPES[v]} if isinstance(v, torch.dtype) else v for k, v in vars(scaler).items()}
            kept["loss_scaler"] = {"__class__": f"{type(scaler).__module__}:{type(scaler).__qualname__}", "args": [], "state": plain}
        config = engine.config if isinstance(engine.config, dict) else {}
        kept["ds_config"] = {k: config[k] for k in ("zero_optimization", "bf16", "fp16") if k in config}
        return kept

    def _set_counters(self, kept: Mapping[str, Any]) -> None:
        for name in COUNTERS:
            if name in kept:
                setattr(self._engine, name, kept[name])
        scaler = getattr(self._opt, "loss_scaler", None)
        saved = kept.get("loss_scaler")
        if scaler is not None and isinstance(saved, dict) and saved.get("__class__") == f"{type(scaler).__module__}:{type(scaler).__qualname__}":
            vars(scaler).update({k: v for k, v in saved["state"].items() if not isinstance(v, dict)})

    # --- after a restore

    def before(self) -> None:
        """Collective: stage 3 gives up what it has gathered."""
        if hasattr(self._opt, "checkpoint_event_prologue"):
            self._opt.checkpoint_event_prologue()

    def refresh(self) -> None:
        """Collective: the 16-bit weights from the masters, on all ranks."""
        opt = self._opt
        if not hasattr(opt, "fp32_partitioned_groups_flat"):
            opt.update_lp_params()
            if hasattr(opt, "_link_all_hp_params"):
                opt._link_all_hp_params()  # noqa: SLF001  what its own loader calls
            return
        for k, master in enumerate(opt.fp32_partitioned_groups_flat):
            opt.fp16_partitioned_groups_flat[k].data.copy_(master.data)
            pieces = opt.unflatten(opt.fp16_partitioned_groups_flat[k], opt.fp16_partitioned_groups[k])
            for share, piece in zip(opt.fp16_partitioned_groups[k], pieces, strict=True):
                share.data = piece.data

    def after(self) -> None:
        """Collective: stage 3 gathers what it keeps."""
        if hasattr(self._opt, "checkpoint_event_epilogue"):
            self._opt.checkpoint_event_epilogue()


def _tensor_of(p: Any) -> Callable[[], Tensor]:
    return lambda: p.ds_tensor


class DeepSpeedSession(Session):
    """A session whose restore makes the 16-bit weights again."""

    partitions: Partitions

    def restore(self, *, step: int | None = None, strict: bool = True, fresh: bool = False, timeout_s: float = 120.0) -> Restored:
        """See Session."""
        self.partitions.before()
        try:
            done = super().restore(step=step, strict=strict, fresh=fresh, timeout_s=timeout_s)
            if done.source != "fresh":
                self.partitions.refresh()
        finally:
            self.partitions.after()
        return done


def attach(engine: Any, *, extras: Mapping[str, Any] | None = None, **settings: Any) -> DeepSpeedSession:
    """A session over a DeepSpeed engine. `extras`, `settings`: as of `ckptd.attach`. The engine's scheduler is captured without being named. Collective.

    Call `session.step` after an `engine.step` that updated the weights (every gradient_accumulation_steps).
    """
    partitions = Partitions(engine, extras or {})
    module: nn.Module = engine.module
    made = sessions.attach(model=module, optimizer=engine.optimizer.optimizer, look=partitions.look, kind=DeepSpeedSession, **settings)
    assert isinstance(made, DeepSpeedSession)  # noqa: S101  `kind` says so
    made.partitions = partitions
    return made


# --- DeepSpeed's own checkpoints, made safe ---------------------------------------------------------------------------------


class CkptdCheckpointEngine:
    """DeepSpeed's `CheckpointEngine` interface: `save_checkpoint` and `load_checkpoint` as ever, but a file appears whole, synced and summed, or not at all.

        deepspeed.runtime.engine.create_checkpoint_engine = lambda **_: CkptdCheckpointEngine()      before deepspeed.initialize
        engine.checkpoint_engine = CkptdCheckpointEngine()                                           or after it

    Files are DeepSpeed's own. Beside each lies its sum, `<file>.ckptd-sums.json`; loading checks it. DeepSpeed writes `latest` after `commit`.
    """

    def __init__(self, config_params: Any = None) -> None:
        del config_params
        self.name = "CkptdCheckpointEngine"

    def create(self, info: Any) -> None:
        """A checkpoint begins."""

    def makedirs(self, path: str, exist_ok: bool = False) -> None:  # noqa: FBT001, FBT002  DeepSpeed's signature
        """Make a folder."""
        Path(path).mkdir(parents=True, exist_ok=exist_ok)

    def save(self, state_dict: Any, path: str) -> None:
        """Write one file: under another name, synced, summed, renamed."""
        part = f"{path}.part"
        torch.save(state_dict, part)
        with open(part, "r+b") as f:  # noqa: PTH123  the descriptor is what is synced
            os.fsync(f.fileno())
        size, digest = _sum_of(part)
        sums = Path(f"{path}{SUMS}")
        sums.write_text(json.dumps({"bytes": size, "xxh3_128": digest}) + "\n")
        os.replace(part, path)  # noqa: PTH105
        folder = os.open(Path(path).parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def load(self, path: str, map_location: Any = None) -> Any:
        """Read one file, if it is what was written. Raises ChecksumMismatch. Loads as DeepSpeed does: only what you trust."""
        sums = Path(f"{path}{SUMS}")
        if sums.exists():
            wanted, (size, digest) = json.loads(sums.read_text()), _sum_of(path)
            if (size, digest) != (wanted["bytes"], wanted["xxh3_128"]):
                msg = f"{path}: its {size} bytes are not those that were written"
                raise ChecksumMismatch(msg, remedy="load another tag")
        from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine

        return TorchCheckpointEngine().load(path, map_location=map_location)

    def commit(self, info: Any) -> bool:
        """All ranks' files are there."""
        del info
        return True

    def cleanup(self) -> None:
        """Nothing to let go of."""

    def is_data_parallel_writer(self, dp_rank: int) -> bool:
        """Whether this rank writes what all hold."""
        return dp_rank == 0

    def is_decoupled(self) -> bool:
        """Saving ends when `save` does."""
        return False

    def get_commit_info(self) -> None:
        """See is_decoupled."""

    def set_commit_info(self, info: Any) -> None:
        """See is_decoupled."""

    def preserves_storage_sharing(self) -> bool:
        """torch.save does."""
        return True


def _sum_of(path: str) -> tuple[int, str]:
    sums, size = xxhash.xxh3_128(), 0
    with open(path, "rb") as f:  # noqa: PTH123
        while block := f.read(4 << 20):
            sums.update(block)
            size += len(block)
    return size, sums.hexdigest()
