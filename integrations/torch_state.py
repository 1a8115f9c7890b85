"""What torch's state dicts are made of, whatever file they are in: names without wrappers, numbers as tensors, objects as plain values, optimizers whose
parameters are numbered; and, the other way, the parts of a checkpoint as state dicts.

Numbered parameters are the model's in some order that the file does not tell. They get names only where there is one way to do it: each group's
parameters follow the model's order, and every moment has its parameter's shape. Where there are two ways, the hint `params` is asked for.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from math import prod
from typing import Any

import numpy as np

from ckptd.core.archive import Tensor as Stored
from ckptd.core.archive import read_torch
from ckptd.core.boxes import Shape
from ckptd.core.cast import FLOATS, NUMPY
from ckptd.core.emit import Known, Taken, whole
from ckptd.core.image import ITEM_BYTES
from ckptd.core.logical import GROUPS, LITERAL, MODEL, STATE, Checkpoint
from ckptd.core.pickles import Dtype, Global, Made
from ckptd.core.pickling import TORCH_NAMES
from ckptd.errors import BadArgument, BadForeign
from ckptd.formats import Place, WriteOptions, need_drop
from ckptd.integrations.native import PYTHON_SLOTS, SCALARS, AsTensor

WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.", "_fsdp_wrapped_module.")
STEP_KEYS = ("step", "global_step", "iteration", "iter", "num_steps")
BUFFER = re.compile(r"(.*\.)?(running_mean|running_var|num_batches_tracked|inv_freq|position_ids|freqs_cis|rotary_emb\..*|causal_mask|attn_mask)")
"""What torch's and the usual models' buffers are called, where nothing else tells them from parameters."""
FLAT_BYTES = 1 << 20
"""Of a file that is refused: where the name of FSDP1's flat parameter is looked for, to say why."""
_FLAT = re.compile(r"_?flat_param(?:_\d+)?")
_STATES_MAX = 20_000
"""Of the search for the one way to name numbered parameters."""

PutTensor = Callable[[str, Any], Any]


def truth(value: Any) -> bool:
    """A setting as it comes from a command line."""
    return value is True or str(value).lower() in {"1", "true", "yes"}


def listed(hint: Any) -> list[str]:
    """A hint of names: a list, or text with commas."""
    if isinstance(hint, str):
        return [n.strip() for n in hint.split(",") if n.strip()]
    return [str(n) for n in hint or ()]


# --- values and names -------------------------------------------------------------------------------------------------------


def cleaned(names: Sequence[str]) -> dict[str, str]:
    """raw -> FQN, without wrappers. Raises BadForeign where two become one."""
    ddp = bool(names) and all(n.startswith("module.") for n in names)
    found: dict[str, str] = {}
    seen: dict[str, str] = {}
    for name in names:
        new = name.removeprefix("module.") if ddp else name
        for wrapper in WRAPPERS:
            new = new.replace(wrapper, "")
        if new in seen:
            msg = f"{name} and {seen[new]} are both {new} without their wrappers"
            raise BadForeign(msg)
        seen[new] = found[name] = new
    return {raw: new for new, raw in zip(found.values(), found, strict=True)}


def add_number(out: Checkpoint, name: str, value: float) -> None:
    """A Python number of the optimizer's state as a 0-d tensor: `step` F32, others I64 or F64."""
    if name in out.tensors:
        return
    if name.endswith(".step") and struct.unpack("<f", struct.pack("<f", value))[0] == value:
        out.literal(name, "F32", struct.pack("<f", value))
    elif isinstance(value, bool):
        out.literal(name, "BOOL", bytes([value]))
    elif isinstance(value, int):
        out.literal(name, "I64", struct.pack("<q", value))
    else:
        out.literal(name, "F64", struct.pack("<d", value))


def refuse_flat(names: Iterable[Any], where: str) -> None:
    """Raise BadForeign where a name is FSDP1's flat parameter: a `LOCAL` state dict.

    It holds, for each wrapped module, one flat tensor and how many elements that has; no name, shape or order of the parameters that it was made of. Two models
    of as many elements have equal files, so nothing can be read out of one. With `use_orig_params` what lies beside it is each rank's own under one name.
    """
    flat = next((n for n in names if type(n) is str and _FLAT.fullmatch(n.rpartition(".")[2])), None)
    if flat is not None:
        msg = f"{where}: {flat} is a flat parameter of FSDP1's LOCAL state dict, which says no names, shapes or order of what it was made of"
        raise BadForeign(msg, remedy="load it into a model wrapped as the one that saved it, with as many ranks, and save it with StateDictType.SHARDED_STATE_DICT or FULL_STATE_DICT")


def read_state(place: Place, name: str) -> Any:
    """The value of a file of torch.save. Raises BadForeign; see also `refuse_flat`."""
    size = place.files[name]
    try:
        tree = read_torch(place.reader(name), size)
    except BadForeign:  # the pickle of FSDP1's sharded tensor asks for what none of ours does
        refuse_flat(["_flat_param"] if b"_flat_param" in place.read(name, 0, min(size, FLAT_BYTES)) else [], name)
        raise
    for held in (tree, *tree.values()) if isinstance(tree, dict) else ():
        refuse_flat(held if isinstance(held, dict) else (), name)
    return tree


def keep_ranks(out: Checkpoint, by_rank: Any) -> None:
    """Objects that belong to ranks, as `Outgoing.objects` writes them."""
    for rank, held in by_rank.items() if isinstance(by_rank, dict) else ():
        if str(rank).isdecimal() and isinstance(held, dict):
            out.per_rank.setdefault(int(rank), {}).update({f"extras.{n}": v for n, v in held.items()})


class Refused(Exception):
    """A part of an object that typed JSON cannot hold; says which."""


def plain(value: Any, path: str, tensor: PutTensor, lost: list[str]) -> Any:
    """`value` with arrays for its tensors (`tensor`: path, leaf -> array); what is neither plain nor an array is left out and named in `lost`."""
    kind = type(value)
    if value is None or kind in {bool, int, float, str, bytes, bytearray, complex} or isinstance(value, np.ndarray | np.generic):
        return value
    if kind is dict:
        made = {}
        for key, item in value.items():
            try:
                made[key] = plain(item, f"{path}.{key}", tensor, lost)
            except Refused as e:
                lost.append(str(e))
        return made
    if kind in {list, tuple, set, frozenset}:
        return kind(plain(v, f"{path}.{i}", tensor, lost) for i, v in enumerate(value))
    if kind is Dtype:
        return f"torch.{TORCH_NAMES.get(value.name, value.name)}"
    if kind is Made and kind is not None and type(value.state) is dict and not value.args and value.what.name in {"Namespace", "SimpleNamespace"}:
        return plain(value.state, path, tensor, lost)
    if isinstance(value, Stored) or is_dtensor(value):
        return tensor(path, value)
    what = f"{value.what}" if kind is Made else f"{value}" if kind is Global else kind.__name__
    msg = f"{path} ({what})"
    raise Refused(msg)


def is_dtensor(value: Any) -> bool:
    """Whether a value of a torch file is a DTensor."""
    return type(value) is Made and value.what.name == "DTensor"


def array_of(raw: bytes, dtype: str, shape: Shape) -> np.ndarray[Any, Any]:
    """A tensor's bytes as an array that becomes a tensor again. bfloat16 is widened. Raises Refused for float8."""
    if dtype == "BF16":
        wide = (np.frombuffer(raw, np.uint16).astype(np.uint32) << np.uint32(16)).view(np.float32)
        return wide.reshape(shape).view(AsTensor)
    if dtype.startswith("F8") or dtype not in NUMPY:
        msg = f"a tensor of {dtype}"
        raise Refused(msg)
    return np.frombuffer(raw, NUMPY[dtype]).reshape(shape).copy().view(AsTensor)


def number_of(value: Any) -> Any:
    """A 0-d array as the number it is (learning rates may be tensors)."""
    return value.item() if isinstance(value, np.ndarray) and value.size == 1 and value.ndim <= 1 else value


def step_of(out: Checkpoint, place: Place, name: str) -> None:
    """Make `optim.state.<fqn>.step` the 0-d F32 tensor that it is everywhere here."""
    t = out.tensors[name]
    if (t.dtype, t.shape) == ("F32", ()) or prod(t.shape) != 1 or len(t.rows) != 1 or t.rows[0].file == LITERAL:
        return
    row = t.rows[0]
    value = number_of(array_of(place.read(out.files[row.file].name, row.begin, ITEM_BYTES[t.dtype]), t.dtype, ()))
    del out.tensors[name]
    add_number(out, name, value)


def name_buffers(out: Checkpoint) -> None:
    """Weights that no optimizer knows: buffers, or parameters that are not trained. Without an optimizer, by dtype and by name."""
    known = {f"{MODEL}{p}" for g in out.groups for p in g["params"]}
    for name, tensor in out.tensors.items():
        if name.startswith(MODEL) and name not in known and (known or tensor.dtype not in FLOATS or BUFFER.fullmatch(name)):
            out.buffers.add(name)


# --- numbered parameters ----------------------------------------------------------------------------------------------------


def named_by_shape(groups: Sequence[Sequence[int]], shapes: Mapping[int, Shape], names: Sequence[tuple[str, Shape]]) -> list[dict[int, str]]:
    """number -> name, if there is one way in which each group follows the order of `names` and all shapes fit; nothing if there is none, two
    empty ones if there are several.

    `shapes`: of the numbers whose state tells one. Names that are left over were no parameters.
    """
    spare = len(names) - sum(map(len, groups))
    start, end = tuple(0 for _ in groups), tuple(len(g) for g in groups)
    layers: list[dict[tuple[int, ...], tuple[int, tuple[int, ...], int]]] = [{start: (1, start, -1)}]
    """After each name: how many parameters of each group are named -> in how many ways, and by which last step."""
    for at, (_, shape) in enumerate(names if spare >= 0 else ()):
        following: dict[tuple[int, ...], tuple[int, tuple[int, ...], int]] = {}
        for done, (ways, _, _) in layers[-1].items():
            steps = [g for g, c in enumerate(done) if c < end[g] and shapes.get(groups[g][c], shape) == shape]
            for g in [*steps, *([-1] if at - sum(done) < spare else [])]:
                reached = done if g < 0 else (*done[:g], done[g] + 1, *done[g + 1 :])
                following[reached] = (following.get(reached, (0, done, g))[0] + ways, done, g)
        if len(following) > _STATES_MAX:
            return [{}, {}]
        layers.append(following)
    ways, before, g = layers[-1].get(end, (0, start, -1)) if len(layers) == len(names) + 1 else (0, start, -1)
    found: dict[int, str] = {}
    if ways != 1:
        return [found, found][:ways]
    for at in range(len(names) - 1, -1, -1):
        if g >= 0:
            found[groups[g][before[g]]] = names[at][0]
        _, before, g = layers[at][before]
    return [found]


def name_numbers(
    groups: Sequence[Mapping[str, Any]], shapes: Mapping[int, Shape], weights: Mapping[str, Shape], unlikely: Sequence[str], hint: Sequence[str]
) -> dict[int, str]:
    """number -> FQN. `weights`: the model's, in order; `unlikely`: those that are buffers by their names or dtypes. Raises BadArgument."""
    numbers = [[int(p) for p in g["params"]] for g in groups]
    flat = [p for g in numbers for p in g]
    given = hint or [str(n) for g in groups for n in g.get("param_names") or ()]
    if given:
        wrong = [n for n in given if n not in weights]
        if len(given) != len(flat) or wrong:
            msg = f"the hint `params` has {len(given)} names for {len(flat)} parameters" if not wrong else f"the hint `params` names {wrong[0]}, which is no weight"
            raise BadArgument(msg, remedy="give the optimizer's parameters by name, in its order")
        for p, name in zip(flat, given, strict=True):
            if shapes.get(p, weights[name]) != weights[name]:
                msg = f"parameter {p} of the optimizer has state of shape {list(shapes[p])}, but {name} is {list(weights[name])}"
                raise BadArgument(msg, remedy="is the hint `params` in the optimizer's order?")
        return dict(zip(flat, given, strict=True))
    if not flat:
        return {}
    found: list[dict[int, str]] = []
    for names in ([(n, s) for n, s in weights.items() if n not in unlikely], [*weights.items()]):
        found = named_by_shape(numbers, shapes, names)
        if found:
            break
    if len(found) == 1:
        return found[0]
    why = "fit the model's weights in several ways" if found else "do not fit the model's weights"
    msg = f"the optimizer's {len(flat)} parameters are numbered, and by shape they {why} ({len(weights)} tensors)"
    remedy = "--hint params=NAME,NAME,... names them in the optimizer's order: [n for g in groups for n in g] as they were given to it; --drop optimizer needs no names"
    raise BadArgument(msg, remedy=remedy)


# --- writing ----------------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Outgoing:
    """The parts of a checkpoint as torch's state dicts have them; `dropped` and `notes` fill up meanwhile."""

    source: Checkpoint
    options: WriteOptions
    target: str
    dropped: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def dtype(self, name: str) -> str:
        """Of a weight in the target."""
        held = self.source.tensors[name].dtype
        cast = self.options.dtype and held in FLOATS and name.startswith(MODEL) and name not in self.source.buffers
        return self.options.dtype if cast else held

    def weights(self) -> list[tuple[str, str]]:
        """(FQN, name of the tensor that holds it), aliases included."""
        source, found = self.source, []
        for name in source.tensors:
            if not name.startswith(MODEL):
                continue
            if name in source.buffers and "buffers" in self.options.drop:
                self.dropped.append(name)
            else:
                found.append((name.removeprefix(MODEL), name))
        return found + [(a.removeprefix(MODEL), n) for a, n in source.aliases.items() if a.startswith(MODEL)]

    def model(self) -> dict[str, Taken]:
        """{fqn: tensor}; tied ones share a storage."""
        shared = {*self.source.aliases.values()}
        return {fqn: whole(n, self.dtype(n), self.source.tensors[n].shape, share=n if n in shared else "") for fqn, n in self.weights()}

    def slots(self) -> dict[str, dict[str, str]]:
        """fqn -> slot -> name of the tensor; parameters in the optimizer's order."""
        source = self.source
        if "optimizer" in self.options.drop:
            self.dropped += [n for n in source.tensors if n.startswith("optim.")]
            return {}
        state = source.state()
        return {fqn: {s: f"{STATE}{fqn}.{s}" for s in state[fqn]} for fqn in dict.fromkeys([*source.parameters(), *state]) if fqn in state}

    def groups(self) -> list[dict[str, Any]]:
        """The param groups; none if the optimizer is dropped. Without any in the source, all parameters with state are one."""
        if "optimizer" in self.options.drop:
            return []
        groups = [{k: self.value(f"{GROUPS}.{k}", v) for k, v in g.items()} for g in self.source.groups]
        if not groups and (state := self.slots()):
            self.notes.append("the source has no param groups: the target has one, without hyper-parameters")
            groups = [{"params": [*state]}]
        return groups

    def scalars(self) -> dict[str, dict[str, Any]]:
        """fqn -> slot -> what of the optimizer's state is neither a tensor nor a number."""
        held = {} if "optimizer" in self.options.drop else self.source.objects.get(SCALARS) or {}
        return {fqn: {s: self.value(f"{STATE}{fqn}.{s}", v) for s, v in slots.items()} for fqn, slots in held.items()}

    def optimizer(self) -> tuple[dict[str, dict[str, Any]], list[dict[str, Any]]]:
        """State and groups."""
        tensors = self.source.tensors
        state: dict[str, dict[str, Any]] = {
            fqn: {s: whole(n, tensors[n].dtype, tensors[n].shape) for s, n in slots.items()} for fqn, slots in self.slots().items()
        }
        for fqn, slots in self.scalars().items():
            state.setdefault(fqn, {}).update(slots)
        return state, self.groups()

    def objects(self) -> dict[str, Any]:
        """All objects but the param groups, by name; "extras." is taken off. Tensors that belong to no model are put in their places."""
        source, found, lost = self.source, {}, []
        if "objects" in self.options.drop:
            self.dropped += [n for n in source.objects if n != GROUPS] + [f"{n} of rank {r}" for r, held in source.per_rank.items() for n in held]
            self.dropped += [n for n in source.tensors if n.startswith("extras.")]
            return {}
        values = {n: v for n, v in source.objects.items() if n not in {GROUPS, SCALARS, PYTHON_SLOTS}}
        if source.per_rank:
            values["per_rank"] = {str(r): {n.removeprefix("extras."): v for n, v in held.items()} for r, held in source.per_rank.items()}
        for name, value in values.items():
            try:
                found[name.removeprefix("extras.")] = self.value(name, value)
            except Refused as e:
                lost.append(str(e))
        for name, tensor in source.tensors.items():
            if name.startswith("extras."):
                found[name.removeprefix("extras.")] = whole(name, tensor.dtype, tensor.shape)
        self.dropped += need_drop("objects", lost, self.options, self.target)
        return found

    def value(self, path: str, value: Any) -> Any:
        """An object's value, arrays as tensors. Raises Refused."""
        kind = type(value)
        if kind in {list, tuple}:
            return kind(self.value(f"{path}.{i}", v) for i, v in enumerate(value))
        if isinstance(value, dict):
            return {k: self.value(f"{path}.{k}", v) for k, v in value.items()}
        if isinstance(value, np.ndarray):
            return _taken(value, path)
        if isinstance(value, np.generic):
            return value.item()
        if value is None or kind in {bool, int, float, str, bytes, bytearray, set, frozenset}:
            return value
        if hasattr(value, "__iter__"):
            return [self.value(f"{path}.{i}", v) for i, v in enumerate(value)]
        msg = f"{path} ({kind.__name__})"
        raise Refused(msg)


@lru_cache(maxsize=1)
def _codes() -> Mapping[str, str]:
    return {np.dtype(t).str.lstrip("<|="): code for code, t in NUMPY.items() if code != "BF16" and not code.startswith("F8")}


def _taken(value: np.ndarray[Any, Any], path: str) -> Taken:
    """An array as a tensor of the file."""
    little = np.ascontiguousarray(value, value.dtype.newbyteorder("<"))
    code = _codes().get(little.dtype.str.lstrip("<|="))
    if code is None:
        msg = f"{path} (an array of {value.dtype})"
        raise Refused(msg)
    return Taken(code, tuple(value.shape), (Known(little.tobytes()),))


def numbered(state: Mapping[str, Any], groups: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """As `optimizer.state_dict()` has it."""
    order = [p for g in groups for p in g["params"]]
    numbers = {p: i for i, p in enumerate(order)}
    left = [p for p in state if p not in numbers]
    if left:
        msg = f"{left[0]} has optimizer state and is in no param group"
        raise BadForeign(msg)
    return {
        "state": {numbers[p]: state[p] for p in order if p in state},
        "param_groups": [{**g, "params": [numbers[p] for p in g["params"]]} for g in groups],
    }
