"""How Megatron lays a GPT model out: names, what each tensor-parallel rank holds, the order of parameters in flat buffers, and param groups.

Everything here is arithmetic on names and shapes. What Megatron does not write down (which ranks hold which rows, where a parameter begins in a
buffer, which param group a parameter is in) follows from its rules; whoever uses them checks the result: sizes must add up, copies that the rules call replicated are
compared by the engine, and flat buffers are sampled against the weights (`megatron.py`).

Names are those of megatron-core's sharded state: the layer's number is global, and the norm in front of a linear layer is that layer's `layer_norm_weight`, as
Transformer Engine holds it. The names of the local (unfused) spec and of Megatron-LM before core become the same.

Source: megatron-core 0.16.1: tensor_parallel/layers.py, models/gpt/gpt_layer_specs.py, distributed/param_and_grad_buffer.py, optimizer/__init__.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from math import lcm, prod
from typing import Any

import msgspec

from ckptd.core.boxes import Box, Shape
from ckptd.errors import BadForeign

LAYER = re.compile(r"((?:.*\.)?(?:decoder|encoder)\.layers)\.(\d+)\.(.+)")
STACKED = re.compile(r"((?:.*\.)?(?:decoder|encoder)\.layers)\.(?!\d+\.)(.+)")
EXPERT = re.compile(r"(.*\.experts)\.local_experts\.(\d+)\.(.+)")
_GROUPED = re.compile(r"(.*\.experts)\.(linear_fc[12])\.(weight|bias)(\d+)")
ALIGN = 64
"""Elements: a parameter of a flat buffer begins at a multiple of it."""
EMBEDDING, OUTPUT = "embedding.word_embeddings.weight", "output_layer.weight"

_DIM0 = re.compile(
    r"(word_embeddings|output_layer|linear_qkv|linear_q|linear_kv|linear_q_proj|linear_q_up_proj|linear_kv_up_proj|linear_fc1)\.(weight|bias)$"
)
_DIM1 = re.compile(r"(linear_proj|linear_fc2)\.weight$")
_GATED = re.compile(r"linear_fc1\.(weight|bias)$")
_OLD = (
    (re.compile(r"^language_model\.(encoder|transformer)\."), "decoder."),
    (re.compile(r"^language_model\."), ""),
    (re.compile(r"\b(self_|inter_)?attention\.query_key_value\."), "self_attention.linear_qkv."),
    (re.compile(r"\b(self_)?attention\.dense\."), "self_attention.linear_proj."),
    (re.compile(r"\bmlp\.dense_h_to_4h\."), "mlp.linear_fc1."),
    (re.compile(r"\bmlp\.dense_4h_to_h\."), "mlp.linear_fc2."),
    (re.compile(r"\.post_attention_layernorm\."), ".pre_mlp_layernorm."),
    (re.compile(r"^word_embeddings_for_head\."), "output_layer."),
)
_NORMS = (("input_layernorm.", "self_attention.linear_qkv."), ("pre_mlp_layernorm.", "mlp.linear_fc1."))
_ORDER = ("input_layernorm", "linear_qkv.layer_norm", "core_attention", "linear_proj", "linear_qkv", "q_layernorm", "k_layernorm")
_ORDER_FUSED = ("core_attention", "linear_proj", "linear_qkv", "q_layernorm", "k_layernorm")
"""Modules of self-attention in the order of their registration: unfused, and with the norm inside `linear_qkv` (Transformer Engine)."""


def core_name(name: str) -> str:
    """A name of Megatron-LM before core as core calls it; others as they are."""
    for pattern, new in _OLD:
        name = pattern.sub(new, name)
    return name


def fused_names(names: Iterable[str]) -> dict[str, str]:
    """Local spec's name -> sharded name: norms belong to the linear layer behind them, where there is one of that name."""
    held = set(names)
    renamed = {}
    for name in held:
        for norm, linear in _NORMS:
            before, found, what = name.rpartition(norm)
            if found and not before.endswith("_") and f"{before}{linear}weight" in held:
                renamed[name] = f"{before}{linear}layer_norm_{what}"
    return renamed


def sharded_names(names: Iterable[str]) -> dict[str, str]:
    """Names of the local spec or of Transformer Engine's grouped experts -> names as they are here; only those that differ."""
    held = [*names]
    return fused_names(held) | single_experts(held)


def single_experts(names: Iterable[str]) -> dict[str, str]:
    """Names of Transformer Engine's grouped experts -> the same experts' one by one."""
    return {n: f"{m[1]}.local_experts.{m[4]}.{m[2]}.{m[3]}" for n in names if (m := _GROUPED.fullmatch(n))}


def unfused_name(name: str) -> str:
    """The local spec's name of a parameter."""
    for norm, linear in _NORMS:
        name = name.replace(f"{linear}layer_norm_", norm)
    return name


def is_gated(shapes: Mapping[str, Shape]) -> bool:
    """Whether `linear_fc1` holds gate and value: it has twice the rows that `linear_fc2` has columns. The same for global and for local shapes."""
    for name, shape in shapes.items():
        after = shapes.get(name.replace("linear_fc1.weight", "linear_fc2.weight")) if name.endswith("linear_fc1.weight") else None
        if after and len(after) == 2:
            return shape[0] == 2 * after[1]
    return False


# --- tensor parallelism -----------------------------------------------------------------------------------------------------


class Share(msgspec.Struct, frozen=True):
    """A part of a rank's tensor: `box` in the whole tensor, and the element of the flattened local tensor with which it begins (`dim` 0 cuts only)."""

    box: Box
    at: int


def cut_of(fqn: str, dims: int) -> int | None:
    """The dimension along which tensor parallelism cuts; None where every rank has a copy."""
    if _DIM0.search(fqn) and "_down_proj" not in fqn:
        return 0
    return 1 if dims > 1 and _DIM1.search(fqn) else None


def whole_shape(fqn: str, local: Shape, tp: int) -> Shape:
    """The shape of the tensor whose part on one of `tp` ranks has the shape `local`."""
    dim = cut_of(fqn, len(local))
    return local if dim is None else tuple(n * tp if d == dim else n for d, n in enumerate(local))


def local_shape(fqn: str, whole: Shape, tp: int) -> Shape:
    """The shape of a rank's part. Raises BadForeign where it cannot be cut."""
    dim = cut_of(fqn, len(whole))
    if dim is None:
        return whole
    if whole[dim] % tp:
        msg = f"{fqn}: {list(whole)} cannot be cut into {tp} along dimension {dim}"
        raise BadForeign(msg)
    return tuple(n // tp if d == dim else n for d, n in enumerate(whole))


def shares(fqn: str, whole: Shape, rank: int, tp: int, *, gated: bool) -> list[Share]:
    """What rank `rank` of `tp` holds of a tensor of shape `whole`, in the order of its local tensor. The gate and the value of a GLU are cut separately."""
    local = local_shape(fqn, whole, tp)
    dim = cut_of(fqn, len(whole))
    if dim is None or tp == 1:
        return [Share(Box.whole(whole), 0)]
    if dim == 0 and gated and _GATED.search(fqn):
        half = local[0] // 2
        size = (half, *local[1:])
        rest = (0,) * (len(whole) - 1)
        return [Share(Box((rank * half, *rest), size), 0), Share(Box((whole[0] // 2 + rank * half, *rest), size), prod(size))]
    return [Share(Box(tuple(rank * n if d == dim else 0 for d, n in enumerate(local)), local), 0)]


# --- pipeline parallelism ---------------------------------------------------------------------------------------------------


def stages(layers: int, pp: int, arguments: Mapping[str, Any]) -> list[range]:
    """The layers of each pipeline stage. Raises BadForeign for layouts whose rule is not known here (interleaved ones, `pipeline_model_parallel_layout`)."""
    first, last = arguments.get("decoder_first_pipeline_num_layers"), arguments.get("decoder_last_pipeline_num_layers")
    if arguments.get("virtual_pipeline_model_parallel_size") or arguments.get("pipeline_model_parallel_layout"):
        msg = "interleaved pipeline stages have no order of parameters that is known here"
        raise BadForeign(msg, remedy="save once with --dist-ckpt-optim-fully-reshardable, or with --ckpt-format torch")
    counts = [n for n in (first, last) if isinstance(n, int)]
    middle = pp - len(counts)
    rest = layers - sum(counts)
    if rest < 0 or (middle == 0 and rest) or (middle and rest % middle):
        msg = f"{layers} layers do not go into {pp} pipeline stages"
        raise BadForeign(msg)
    sizes = [rest // middle if middle else 0] * middle
    sizes = [*([first] if isinstance(first, int) else []), *sizes, *([last] if isinstance(last, int) else [])]
    begins = [sum(sizes[:i]) for i in range(pp)]
    return [range(b, b + n) for b, n in zip(begins, sizes, strict=True)]


def stage_of(fqn: str, layers: Sequence[range]) -> int:
    """The pipeline stage of a parameter."""
    found = LAYER.fullmatch(fqn)
    if found:
        return next((i for i, own in enumerate(layers) if int(found[2]) in own), 0)
    return 0 if fqn.startswith("embedding.") else len(layers) - 1


# --- the order of parameters ------------------------------------------------------------------------------------------------


def expanded(keys: Iterable[str]) -> list[str]:
    """Per-layer names, layer by layer, otherwise in the order given: embedding, layers, what comes after them."""
    plain = list(keys)
    layer = sorted((n for n in plain if LAYER.fullmatch(n)), key=_layer_number)
    before = [n for n in plain if n.startswith("embedding.")]
    after = [n for n in plain if not LAYER.fullmatch(n) and not n.startswith("embedding.")]
    return [*before, *layer, *sorted(after, key=lambda n: n.startswith("output_layer."))]


def _layer_number(name: str) -> int:
    found = LAYER.fullmatch(name)
    return int(found[2]) if found else -1


def registration_orders(names: Sequence[str]) -> Iterator[list[str]]:
    """Orders in which a GPT model may have registered its parameters, the likeliest first: as given, then by the rules of the two specs."""
    yield expanded(names)
    for order in (_ORDER, _ORDER_FUSED):

        def rank(name: str, order: Sequence[str] = order) -> tuple[int, int, int, int]:
            found = LAYER.fullmatch(name)
            inner = found[3] if found else name
            expert = EXPERT.fullmatch(inner)
            part = 1 if inner.startswith("mlp.") or "pre_mlp" in inner else 0
            place = next((i for i, m in enumerate(order) if m in inner), len(order)) if not part else _mlp_place(inner)
            kinds = ("layer_norm_weight", "layer_norm_bias", "weight", "bias")
            return part, int(expert[2]) if expert else -1, place, next((i for i, k in enumerate(kinds) if inner.endswith(k)), len(kinds))

        yield expanded(sorted(names, key=rank))


def _mlp_place(inner: str) -> int:
    return next(
        (i for i, m in enumerate(("pre_mlp", "router", "linear_fc1.layer_norm", "linear_fc1", "linear_fc2")) if m in inner), 5
    )


# --- flat buffers -----------------------------------------------------------------------------------------------------------


def places_in_buckets(numels: Sequence[int], sizes: Sequence[int]) -> list[tuple[int, int]] | None:
    """(bucket, first element in it) of parameters of `numels` elements that fill buckets of `sizes`, unpadded; None where they do not fit exactly."""
    found, bucket, at = [], 0, 0
    for numel in numels:
        begin = -(-at // ALIGN) * ALIGN
        if bucket < len(sizes) and begin + numel > sizes[bucket] and sizes[bucket] in {at, begin}:
            bucket, begin = bucket + 1, 0
        if bucket >= len(sizes) or begin + numel > sizes[bucket]:
            return None
        found.append((bucket, begin))
        at = begin + numel
    return found if bucket == len(sizes) - 1 and at == sizes[bucket] else None


def bucket_sizes(numels: Sequence[int], alone: Sequence[bool], bucket_size: int | None) -> list[int]:
    """The unpadded sizes of the buckets that Megatron's DDP makes. `alone`: parameters with a bucket of their own (tied embeddings)."""
    sizes, at = [], 0
    for numel, single in zip(numels, alone, strict=True):
        begin = -(-at // ALIGN) * ALIGN
        if single and at:
            sizes.append(begin)
            begin = 0
        at = begin + numel
        if single or (bucket_size is not None and at >= bucket_size):
            sizes.append(at)
            at = 0
    return [*sizes, at] if at else sizes


def default_bucket_size(arguments: Mapping[str, Any], pp_rank: int, dp: int) -> int | None:
    """Megatron's bucket size: none without overlap, and none on later pipeline stages."""
    if not arguments.get("overlap_grad_reduce") or pp_rank > 0:
        return None
    given = arguments.get("ddp_bucket_size")
    return given if isinstance(given, int) else max(40_000_000, 1_000_000 * dp)


def padded(numel: int, dp: int) -> int:
    """A bucket's size with its padding."""
    unit = lcm(dp, 128)
    return -(-numel // unit) * unit


# --- param groups -----------------------------------------------------------------------------------------------------------

IDENTITY = ("wd_mult", "lr_mult", "is_expert_parallel", "is_decoupled_lr")
"""What tells Megatron's param groups apart."""


def group_key(group: Mapping[str, Any]) -> tuple[Any, ...]:
    """A group's identity; NeMo writes `pre_wd_mult`."""
    return tuple(group.get(k, group.get(f"pre_{k}")) for k in IDENTITY)


def is_expert(fqn: str) -> bool:
    """Whether expert parallelism cuts it."""
    return ".experts." in fqn and "shared_experts" not in fqn


def members(groups: Sequence[Mapping[str, Any]], shapes: Mapping[str, Shape], hint: Mapping[str, int] | None) -> list[list[str]]:
    """The parameters of each group, by Megatron's own rule: no weight decay for biases and vectors, experts apart, embedding and output decoupled.

    Raises BadForeign where the rule does not tell (a hook decided): the hint `groups` does.
    """
    found: list[list[str]] = [[] for _ in groups]
    for fqn, shape in shapes.items():
        at = (
            [hint[fqn]]
            if hint and fqn in hint
            else [i for i, g in enumerate(groups) if len(groups) == 1 or _belongs(fqn, shape, g, groups)]
        )
        if len(at) != 1 or not 0 <= at[0] < len(groups):
            msg = f"{fqn}: which of {len(groups)} param groups it is in does not follow from Megatron's rules"
            raise BadForeign(msg, remedy='give the hint "groups": {name of the parameter: number of its group}')
        found[at[0]].append(fqn)
    return found


def _belongs(fqn: str, shape: Shape, group: Mapping[str, Any], groups: Sequence[Mapping[str, Any]]) -> bool:
    wd, _, expert, decoupled = group_key(group)
    undecayed = fqn.endswith(("bias", "_bias")) or len(shape) == 1
    if any(group_key(g)[0] == 0.0 for g in groups) and any(group_key(g)[0] != 0.0 for g in groups) and (wd == 0.0) != undecayed:
        return False
    if any(group_key(g)[2] for g in groups) and bool(expert) != is_expert(fqn):
        return False
    is_decoupled = any(group_key(g)[3] for g in groups) and (fqn.startswith("embedding.") or fqn == OUTPUT)
    return bool(decoupled) == is_decoupled
