"""DeepSpeed's checkpoints: ZeRO stages 1, 2 and 3, BF16_Optimizer and universal ones, read and written without DeepSpeed.

    <save dir>/latest, latest_universal                   text: the tag, <tag> below
    <tag>/mp_rank_MM_model_states.pt                      weights, buffers, shapes, client state (stages 1 and 2; MM = pipeline stage * tp + tp rank)
    <tag>/zero_pp_rank_R_mp_rank_MM_model_states.pt       the same per rank R (stage 3; its weights are empty)
    <tag>/[bf16_]zero_pp_rank_R_mp_rank_MM_optim_states.pt   masters and moments, flat
    <tag>/layer_LL-model_TT-model_states.pt               weights of a pipeline's layer
    <tag>/layer_L_expert_E_mp_rank_MM_model_states.pt     weights of an expert (`deepspeed_experts`)
    <tag>/zero/<fqn>/{fp32,exp_avg,...,step}.pt           universal; zero/optimizer_state.pt

The flat layouts
    stages 1, 2   a param group's trainable parameters one after the other (in `param_shapes`' order, which is that of the file also under
                  `round_robin_gradients`), padded to 2*dp elements, cut into dp equal partitions. Masters are stored without the last ranks' padding, moments with
                  it; BF16_Optimizer stores both with it
    stage 3       a sub-group's parameters, of each ceil(numel/dp) elements, the last ranks' padded with what lay in memory

What we hold true
- offsets follow from `param_shapes` alone; `param_slice_mappings` are compared where they must agree, and never believed: under `round_robin_gradients` DeepSpeed
  (0.16.5 to 0.19.8) writes other parameters' offsets there;
- padding is in no row;
- whatever is not known how to be cut (experts beside tensor parallel ranks, tensor parallel shards without patterns, NVMe) is refused by its name.

Client state is `extras.<key>`, the scheduler `extras.lr_scheduler`, all else that DeepSpeed keeps `extras.deepspeed`.
Sources: deepspeed 0.19.8, runtime/{engine,bf16_optimizer}.py, runtime/zero/{stage_1_and_2,stage3}.py, checkpoint/{ds_to_universal,universal_checkpoint}.py.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from ckptd.core.archive import Tensor as Stored
from ckptd.core.archive import read_torch
from ckptd.core.cast import NUMPY
from ckptd.core.image import ITEM_BYTES
from ckptd.core.inert import Dtype, Global, Made, shown
from ckptd.core.logical import Checkpoint
from ckptd.errors import BadArgument, BadForeign, NotFound
from ckptd.formats import Place, Plan, ReadOptions, WriteOptions
from ckptd.integrations.native import AsTensor

LATEST, LATEST_UNIVERSAL = "latest", "latest_universal"
OWN_KEYS = (
    "module", "buffer_names", "optimizer", "param_shapes", "frozen_param_shapes", "shared_params", "frozen_param_fragments", "lr_scheduler",
    "data_sampler", "random_ltd", "sparse_tensor_module_names", "skipped_steps", "global_steps", "global_samples", "dp_world_size", "mp_world_size",
    "checkpoint_parallel_dimensions", "ds_config", "ds_version", "num_experts", "ds_autoep_layers", "autoep_layers", "universal_checkpoint_info", "folding",
)  # fmt: skip
"""Keys of model states that are DeepSpeed's; all others are the client's."""
KEPT_KEYS = ("data_sampler", "random_ltd", "sparse_tensor_module_names", "skipped_steps", "global_samples", "ds_config", "ds_version", "universal_checkpoint_info")
KEPT_OPTIMIZER_KEYS = (
    "loss_scaler", "dynamic_loss_scale", "overflow", "clip_grad", "cur_scale", "cur_iter", "last_overflow_iter", "scale_factor", "scale_window",
)  # fmt: skip
ARRAY_BYTES_MAX = 64 << 20
"""A tensor in the client state (a random state, a table) becomes an array of an object."""

MODEL_FILE = re.compile(r"(?:zero_pp_rank_(\d{1,6})_)?mp_rank_(\d{1,5})_model_states\.pt")
OPTIM_FILE = re.compile(r"(?:bf16_|fp16_)?zero_pp_rank_(\d{1,6})_mp_rank_(\d{1,5})_?optim_states\.pt")
LAYER_FILE = re.compile(r"layer_(\d{1,5})-model_(\d{1,5})-model_states\.pt")
EXPERT_FILE = re.compile(r"(?:layer_(\d{1,6})_)?expert_(\d{1,6})_mp_rank_\d{1,5}_model_states\.pt")
EXPERT_OPTIM_FILE = re.compile(r"expp_rank_(\d{1,6})_mp_rank_\d{1,5}_optim_states\.pt")
UNIVERSAL_FILE = re.compile(r"zero/(?:(.+)/([^/]+)|optimizer_state)\.pt")


# --- finding ----------------------------------------------------------------------------------------------------------------


def folder_of(place: Place, tag: str, pointer: str) -> Place:
    """The tag's folder. Raises NotFound."""
    here = {n for n in place.files if MODEL_FILE.fullmatch(n) or OPTIM_FILE.fullmatch(n)}
    if here and not tag:
        return place
    if not tag and pointer in place.files:
        tag = place.read(pointer, 0, min(4096, place.files[pointer])).decode("utf-8", "replace").strip()
    tags = sorted({n.rpartition("/")[0] for n in place.files if "/" in n and MODEL_FILE.fullmatch(n.rpartition("/")[2])}, key=_age)
    if not tag and tags:
        tag = tags[-1]
    if tag in tags:
        return place.below(tag)
    if here and place.label.rstrip("/").endswith(tag):
        return place
    msg = f"{place.label}: no checkpoint has the tag {tag!r}; there are {', '.join(tags) or 'none'}"
    raise NotFound(msg, remedy="--tag takes the name of a folder that holds *_model_states.pt")


def _age(tag: str) -> tuple[int, str]:
    digits = re.findall(r"\d+", tag)
    return (int(digits[-1]) if digits else -1), tag


def load(place: Place, name: str) -> Any:
    """The value of a file, with its name in every complaint."""
    try:
        return read_torch(place.reader(name), place.files[name])
    except BadForeign as e:
        msg = f"{name}: {e.message}"
        raise BadForeign(msg, remedy=e.remedy) from e


def stage_of(place: Place) -> int:
    """The ZeRO stage of the checkpoint in or under `place`; -1: none is there. 0: no ZeRO."""
    try:
        folder = folder_of(place, "", LATEST)
    except (NotFound, BadForeign):
        return -1
    names = list(folder.files)
    if any((m := MODEL_FILE.fullmatch(n)) and m[1] for n in names):
        return 3 if any(OPTIM_FILE.fullmatch(n) for n in names) else -1
    first = next((n for n in names if OPTIM_FILE.fullmatch(n)), "")
    if not first:
        return -1
    try:
        state = load(folder, first)["optimizer_state_dict"]
        stage = _number(state.get("zero_stage", 1))
    except (BadForeign, KeyError, TypeError, AttributeError):
        return -1
    return stage if stage in {1, 2} else -1


def _number(value: Any) -> int:
    """A stage: an int, or the enum of it."""
    if isinstance(value, Made) and len(value.args) == 1:
        value = value.args[0]
    return value if isinstance(value, int) else -1


# --- objects ----------------------------------------------------------------------------------------------------------------


def plain(value: Any, place: Place, name: str) -> Any:  # noqa: PLR0911  one return per kind of value
    """A value of the file as one of ours (core.typed): tensors become arrays, objects say what they were."""

    def sub(item: Any) -> Any:
        return plain(item, place, name)

    match value:
        case Stored():
            return array_of(value, place, name)
        case Made():
            state = value.state if value.state is not None or not (value.items or value.pairs) else [*value.items] or dict(value.pairs)
            return {"__class__": f"{value.what.module}:{value.what.name}", "args": [sub(a) for a in value.args], "state": sub(state)}
        case Global():
            return {"__name__": f"{value.module}:{value.name}"}
        case Dtype():
            return {"__dtype__": value.name}
        case dict():
            return {k: sub(v) for k, v in value.items()}
        case list():
            return [sub(v) for v in value]
        case tuple():
            return tuple(sub(v) for v in value)
    return value


def array_of(tensor: Stored, place: Place, name: str) -> Any:
    """A tensor among objects as an array; 16-bit brain floats as fp32."""
    if tensor.dtype not in NUMPY or tensor.nbytes > ARRAY_BYTES_MAX:
        msg = f"{name}: a tensor of {tensor.nbytes} bytes ({tensor.dtype}) in the client state"
        raise BadForeign(msg, remedy=f"tensors among objects are read up to {ARRAY_BYTES_MAX >> 20} MiB; keep larger ones in the model or the optimizer")
    item = ITEM_BYTES[tensor.dtype]
    span = (1 + sum((e - 1) * s for e, s in zip(tensor.shape, tensor.stride, strict=True))) * item if tensor.numel else 0
    flat: np.ndarray[Any, Any] = np.frombuffer(place.read(name, tensor.begin, span), NUMPY[tensor.dtype])
    strides = [s * item for s in tensor.stride]
    made = np.lib.stride_tricks.as_strided(flat, tensor.shape, strides).copy() if tensor.numel else np.zeros(tensor.shape, NUMPY[tensor.dtype])
    if tensor.dtype == "BF16":
        made = (made.view(np.uint16).astype(np.uint32) << np.uint32(16)).view(np.float32)
    return made.view(AsTensor)


def objects_of(states: dict[str, Any], optimizer: dict[str, Any], place: Place, file: str, optimizer_file: str) -> dict[str, Any]:
    """The objects of a checkpoint by our names."""
    kept = {k: plain(states[k], place, file) for k in KEPT_KEYS if states.get(k) is not None}
    kept |= {k: plain(optimizer[k], place, optimizer_file) for k in KEPT_OPTIMIZER_KEYS if k in optimizer}
    out: dict[str, Any] = {"step": states.get("global_steps", 0), "extras.deepspeed": kept}
    if states.get("lr_scheduler") is not None:
        out["extras.lr_scheduler"] = plain(states["lr_scheduler"], place, file)
    return out | {f"extras.{k}": plain(v, place, file) for k, v in states.items() if k not in OWN_KEYS and isinstance(k, str)}


def computes(config: Mapping[str, Any], optimizer_file: str) -> str:
    """The dtype that the run computes in: "BF16", "F16", or "" for full precision."""
    if setting(config, "bf16", "enabled") or setting(config, "bfloat16", "enabled") or "bf16_zero" in optimizer_file:
        return "BF16"
    return "F16" if setting(config, "fp16", "enabled") else ""


def setting(config: Mapping[str, Any], section: str, key: str) -> Any:
    """A value of a section of a table that may have none; None then."""
    inner = config.get(section)
    return inner.get(key) if isinstance(inner, dict) else None


# --- the formats ------------------------------------------------------------------------------------------------------------


def _or_malformed(place: Place, read: Callable[[], Checkpoint]) -> Checkpoint:
    """What `read` returns. What stands at the wrong place in a file that was not written by DeepSpeed raises BadForeign, whatever it is."""
    try:
        return read()
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, OverflowError, re.error) as e:
        msg = f"{place.label}: not as DeepSpeed writes it: {type(e).__name__}: {shown(e)}"
        raise BadForeign(msg) from e


class Zero:
    """ZeRO of one stage."""

    def __init__(self, stage: int, title: str) -> None:
        self.name, self.title, self.stage = f"zero{stage}", title, stage

    def probe(self, place: Place) -> bool:
        """See Format."""
        return not place.only and stage_of(place) == self.stage

    def read(self, place: Place, options: ReadOptions) -> Checkpoint:
        """See Format."""
        from ckptd.integrations.deepspeed_read import ZeroReader

        return _or_malformed(place, lambda: ZeroReader(place, options, self.stage).checkpoint())

    def write(self, checkpoint: Checkpoint, options: WriteOptions) -> Plan:
        """See Format. `ranks`: data parallel ranks. `config`: deepspeed_write.SETTINGS."""
        from ckptd.integrations.deepspeed_write import zero_plan

        return zero_plan(checkpoint, options, self.stage)


class Plain:
    """No ZeRO: every rank has all of the optimizer. Read, not written."""

    name, title = "zero0", "DeepSpeed without ZeRO (stage 0): the optimizer in the model states; read only"

    def probe(self, place: Place) -> bool:
        """See Format."""
        from ckptd.integrations.deepspeed_plain import lies_in

        return not place.only and lies_in(place)

    def read(self, place: Place, options: ReadOptions) -> Checkpoint:
        """See Format. Hint `params`: names of the optimizer's parameters, in its order (a list, or text with commas)."""
        from ckptd.integrations.deepspeed_plain import PlainReader

        return _or_malformed(place, lambda: PlainReader(place, options).checkpoint())

    def write(self, checkpoint: Checkpoint, options: WriteOptions) -> Plan:  # noqa: ARG002  a Format's
        """See Format: refused."""
        msg = "DeepSpeed's stage 0 is read, not written"
        raise BadArgument(msg, remedy="--to zero1 is what an engine with any stage from 1 on loads; --to universal, engines of any size")


class Universal:
    """Universal checkpoints."""

    name, title = "universal", "DeepSpeed universal checkpoint"

    def probe(self, place: Place) -> bool:
        """See Format. Where both a checkpoint and what DeepSpeed's converter made of it lie, the former is meant."""
        if place.only:
            return False
        if "zero/optimizer_state.pt" in place.files:
            return True
        try:
            return LATEST not in place.files and "zero/optimizer_state.pt" in folder_of(place, "", LATEST_UNIVERSAL).files
        except NotFound:
            return False

    def read(self, place: Place, options: ReadOptions) -> Checkpoint:
        """See Format."""
        from ckptd.integrations.deepspeed_universal import UniversalReader

        return _or_malformed(place, lambda: UniversalReader(place, options).checkpoint())

    def write(self, checkpoint: Checkpoint, options: WriteOptions) -> Plan:
        """See Format. `config`: deepspeed_write.SETTINGS."""
        from ckptd.integrations.deepspeed_write import universal_plan

        return universal_plan(checkpoint, options)


ZERO1 = Zero(1, "DeepSpeed ZeRO stage 1: flat partitions of masters and moments")
ZERO2 = Zero(2, "DeepSpeed ZeRO stage 2: as stage 1")
ZERO3 = Zero(3, "DeepSpeed ZeRO stage 3: every parameter cut over all ranks")
UNIVERSAL = Universal()
ZERO0 = Plain()
