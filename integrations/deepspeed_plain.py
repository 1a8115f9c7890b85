"""Reading DeepSpeed's checkpoints without ZeRO (stage 0): the whole optimizer lies in the model states, its parameters by number. See `deepspeed`.

What `optimizer` holds
    full precision   torch's state dict
    16 bit           `optimizer_state_dict` of masters: `fp32_groups`, one for each parameter, or with FusedAdam `fp32_groups_flat`, one for each group: its
                     parameters one after the other, without padding
    with experts     `expp_rank_P_mp_rank_00_optim_states.pt`, of each share of the experts

Nothing says which parameter a number means. It gets its name by shape where there is one way to do it (`torch_state.name_numbers`), else by the hint `params`
(experts as the first rank calls them).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from math import prod
from typing import Any

from ckptd.core.archive import Tensor as Stored
from ckptd.core.boxes import Shape
from ckptd.core.logical import GROUPS, MODEL, STATE, Checkpoint
from ckptd.errors import BadArgument, BadForeign, NotFound
from ckptd.formats import Place, ReadOptions
from ckptd.integrations.deepspeed import LATEST, MODEL_FILE, OPTIM_FILE, array_of, folder_of, load, plain
from ckptd.integrations.deepspeed_experts import EXPERT_NAME
from ckptd.integrations.deepspeed_flat import Flat, Layout, listing, mapping, stored, whole_row
from ckptd.integrations.deepspeed_read import FolderReader, together
from ckptd.integrations.torch_state import listed, name_numbers

GROUP_SIZE = re.compile(r"ep_size_(\d{1,6})")


def lies_in(place: Place) -> bool:
    """Whether a checkpoint without ZeRO lies in or under `place`."""
    try:
        folder = folder_of(place, "", LATEST)
        first = min(n for n in folder.files if MODEL_FILE.fullmatch(n))
        if any(OPTIM_FILE.fullmatch(n) for n in folder.files):
            return False
        states = load(folder, first)
    except (NotFound, BadForeign, ValueError):
        return False
    return isinstance(states, dict) and {"module", "ds_version", "optimizer"} <= states.keys() and states.get("param_shapes") is None


class PlainReader(FolderReader):
    """A checkpoint without ZeRO being made of its files."""

    def __init__(self, place: Place, options: ReadOptions) -> None:
        super().__init__(place, options, 0)
        self._hint = listed(options.hints.get("params"))
        if sorted(self.model) != [(0, m) for m in range(self.mp)]:
            msg = f"{self.folder.label}: {len(self.model)} model_states files of {self.mp} mp ranks"
            raise BadForeign(msg, remedy="the checkpoint is not whole: take another tag")

    def checkpoint(self) -> Checkpoint:
        """All of it."""
        first = mapping(self.tree(self.model[0, 0]), self.model[0, 0])
        tp = self.start(first)
        if first.get("module") is None:
            msg = f"{self.model[0, 0]}: a pipeline without ZeRO is not read: no file says which layers a rank's optimizer holds"
            raise BadForeign(msg, remedy="save once with zero_optimization.stage 1")
        self.objects(first, mapping(first.get("optimizer") or {}, f"{self.model[0, 0]}: optimizer"))
        for mp in range(self.mp):
            file = self.model[0, mp]
            states = first if mp == 0 else mapping(self.tree(file), file)
            self.module(states, mp, mp % tp, [])
            weights = self._trainable(states, mp % tp)
            found = [(0, file, states.get("optimizer"))]
            for share, name in sorted(self.experts.optim.items()) if self.experts else ():
                found.append((share, name, mapping(self.tree(name), name).get("optimizer")))
            shares = max(1, len(self.experts.optim))
            groups = [self._optimizer(mapping(o, f"{n}: optimizer"), weights, n, share, shares, mp % tp) for share, n, o in found if o is not None]
            self.groups[mp] = groups[0] if groups else []
        self.shards.into(self.out)
        self.out.objects[GROUPS] = together(self.groups, tp)
        return self.out

    def _ties(self, states: dict[str, Any], name: str) -> dict[str, str]:
        """Nothing is said of them: those that are one storage."""
        first: dict[tuple[Any, ...], str] = {}
        tied: dict[str, str] = {}
        for fqn, t in mapping(states.get("module") or {}, f"{name}: module").items():
            if isinstance(t, Stored) and t.numel:
                owner = first.setdefault((t.begin, t.dtype, t.shape, t.stride), fqn)
                tied |= {fqn: owner} if owner != fqn else {}
        return tied

    def _trainable(self, states: dict[str, Any], tp_rank: int) -> dict[str, Shape]:
        """Weights of this file in the module's order, then experts: what may be the optimizer's parameters, or frozen."""
        names = [f"{MODEL}{n}" for n in states["module"]] + self.experts.names(MODEL)
        shapes = {n.removeprefix(MODEL): self.shards.shape(n, tp_rank) for n in names if n not in self.out.buffers and n not in self.out.aliases}
        return {n: s for n, s in shapes.items() if s is not None}

    # --- one rank's optimizer

    def _optimizer(self, held: dict[str, Any], weights: Mapping[str, Shape], file: str, share: int, shares: int, tp_rank: int) -> list[dict[str, Any]]:
        """Masters, moments and groups of the optimizer of a rank that holds this share of the experts."""
        inner = mapping(held.get("optimizer_state_dict", held), f"{file}: optimizer")
        groups = [mapping(g, f"{file}: param_groups") for g in listing(inner.get("param_groups"), f"{file}: param_groups")]
        state = mapping(inner.get("state"), f"{file}: state")
        local = {n: s for n, s in weights.items() if self.experts.local(n, shares, share) is not None}
        if shares > 1 and any((m := GROUP_SIZE.fullmatch(str(g.get("name")))) and int(m[1]) != shares for g in groups):
            msg = f"{file}: layers of different ep_size without ZeRO are not read: files are of {shares} shares of the experts"
            raise BadForeign(msg, remedy="save once with zero_optimization.stage 1")
        hint = [self.experts.known(n, shares, share) if EXPERT_NAME.fullmatch(n) else n for n in self._hint]
        if "fp32_groups_flat" in held:
            members = self._flat_groups(held, groups, state, local, hint, file, tp_rank)
        else:
            members = self._numbered(held, groups, state, local, hint, file, tp_rank)
        made = []
        for group, names in zip(groups, members, strict=True):
            hyper = {str(k): plain(v, self.folder, file) for k, v in group.items() if k not in {"params", "param_names"}}
            order = [self.experts.local(n, shares, share) or n for n in names]
            made.append({**hyper, "params": self.experts.everywhere(order, shares) if any(EXPERT_NAME.fullmatch(n) for n in order) else order})
            if "step" in hyper:
                self._literal_step(dict.fromkeys(n for n in names if f"{STATE}{n}.step" not in self.shards), hyper["step"])
        return made

    def _numbered(
        self, held: dict[str, Any], groups: list[dict[Any, Any]], state: dict[Any, Any], weights: Mapping[str, Shape], hint: list[str], file: str, tp_rank: int
    ) -> list[list[str]]:
        """One tensor for each parameter; returns the groups' names."""
        ids = [listing(g.get("params"), f"{file}: params") for g in groups]
        masters: dict[int, Stored] = {}
        if "fp32_groups" in held:
            tensors = [listing(g, f"{file}: fp32_groups") for g in listing(held["fp32_groups"], f"{file}: fp32_groups")]
            if [len(t) for t in tensors] != [len(i) for i in ids]:
                msg = f"{file}: {[len(t) for t in tensors]} masters for groups of {[len(i) for i in ids]} parameters"
                raise BadForeign(msg)
            masters = {p: stored(t, f"{file}: fp32_groups") for i, g in zip(ids, tensors, strict=True) for p, t in zip(i, g, strict=True)}
        shapes = {p: m.shape for p, m in masters.items()}
        for p, slots in state.items():
            seen = {v.shape for s, v in mapping(slots, f"{file}: state[{p}]").items() if isinstance(v, Stored) and s != "step"}
            if p not in shapes and len(seen) == 1:
                shapes[p] = seen.pop()
        names = name_numbers(groups, shapes, weights, (), hint)
        number = self.number(file)
        for p, master in masters.items():
            self.master(names[p], tp_rank, master.dtype, master.shape, [whole_row(master, number)])
        for p, slots in state.items():
            if p not in names:
                msg = f"{file}: state of parameter {p!r}, which is in no group"
                raise BadForeign(msg)
            for slot, value in slots.items():
                self._slot(names[p], str(slot), value, file, tp_rank)
        return [[names[p] for p in i] for i in ids]

    def _slot(self, fqn: str, slot: str, value: Any, file: str, tp_rank: int) -> None:
        if slot == "step" and isinstance(value, Stored | int | float):
            number = array_of(value, self.folder, file).item() if isinstance(value, Stored) else value
            self._literal_step({fqn: ()}, number)
        elif isinstance(value, Stored):
            self.shards.put(f"{STATE}{fqn}.{slot}", tp_rank, value.dtype, value.shape, [whole_row(value, self.number(file))])
        elif value is not None:
            self.out.notes.append(f"{file}: the optimizer's {slot} is a {type(value).__name__} and is left out")

    def _flat_groups(
        self, held: dict[str, Any], groups: list[dict[Any, Any]], state: dict[Any, Any], weights: Mapping[str, Shape], hint: list[str], file: str, tp_rank: int
    ) -> list[list[str]]:
        """One tensor for each group; returns the groups' names."""
        flats = [Flat(t, self.number(file), f"{file}: fp32_groups_flat[{i}]") for i, t in enumerate(listing(held["fp32_groups_flat"], f"{file}: fp32_groups_flat"))]
        names = hint or [n for n, s in weights.items() if prod(s)]
        unknown = next((n for n in names if n not in weights), "")
        members: list[list[str]] = []
        rest = iter(names)
        for flat in flats:
            left, mine = flat.numel, list[str]()
            while left > 0 and (name := next(rest, "")):
                mine.append(name)
                left -= prod(weights.get(name, ()))
            members.append(mine if not left else [])
        if unknown or not all(members) or next(rest, "") or len(flats) != len(groups) or (len(flats) > 1 and not hint):
            what = f"the hint `params` names {unknown}, which is no weight" if unknown else f"{len(weights)} weights"
            msg = f"{file}: {len(flats)} flat groups of {', '.join(str(f.numel) for f in flats)} elements, and {what}"
            raise BadArgument(msg, remedy="--hint params=NAME,NAME,... names all groups' parameters in the optimizer's order")
        for group, flat, mine in zip(groups, flats, members, strict=True):
            layout = Layout({n: weights[n] for n in mine}, (), 1)
            for fqn, shape, rows in layout.rows([flat]):
                self.master(fqn, tp_rank, flat.dtype, shape, rows)
            (number,) = listing(group.get("params"), f"{file}: params")
            self._slots([mapping(state.get(number, {}), f"{file}: state[{number}]")], [file], tp_rank, layout)
        return members
