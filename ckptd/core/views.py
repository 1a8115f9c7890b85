"""Views of models: the checkpoint of one system as another names and shapes it, without moving a byte.

A view is a data file that anybody can write: rules "these names of one side are those names of the other", each with steps of the algebra (`core.algebra`),
and where the numbers in them (heads, vocabulary, experts) come from. It runs in either direction, which follows from the names, over the weights
and over every slot of the optimizer alike: moments are permuted with their weights. What no rule knows is an error, by name; so is a
number that nobody gave and no shape proves.

    {"name": "toy", "sides": ["hf", "megatron"],
     "parameters": {"ffn": ["extras.config.ffn_dim", "shape:mlp.{layer}.up.weight:0", "=4*hidden"], ...},
     "counts": {"layer": "layers"},
     "rules": [{"from": ["mlp.{layer}.gate.weight", "mlp.{layer}.up.weight"], "to": ["mlp.{layer}.fc1.weight"],
                "steps": [{"do": "concat", "dim": 0, "sizes": ["ffn", "ffn"]}]}]}

`{layer}` stands for a number. One that both sides have makes a rule one rule per number; one that only one side has makes a list, to be stacked.
A parameter is what a hint says, or else the first of its sources that is there: a value of an object (`extras.config.num_layers`), a size of a tensor
(`shape:NAME:dimension`), how many numbers were met (`count:layer`), or an expression (`=hidden/heads`).
Sides may have variants (other names for some tensors); the source's follows from its names, the target's is the first, or the hint `variant`.

Where several parameters become one, their 0-d slots (`step`) must be equal. Their values are compared where they are known (`Checkpoint.scalars`, which
the engine reads first); the others become replicas of the one that is taken, so that whoever compares replicas compares them. Parameters of groups
with different hyper-parameters are not merged.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.resources import files
from itertools import product
from typing import Any, Literal

import msgspec

from ckptd.core.algebra import Number, Step, Value, evaluate
from ckptd.core.image import ITEM_BYTES
from ckptd.core.logical import GROUPS, LITERAL, MODEL, STATE, Checkpoint, Tensor
from ckptd.errors import BadArgument, Divergent, NotFound, Unstorable

TEXT_BYTES_MAX = 1 << 20
"""A view of the largest known family has 10 kB."""
NAMED_MAX = 5
"""So many names stand in a message; the rest is counted."""

_VARIABLE = re.compile(r"\{(\w+)\}")


class Rule(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Names of the first side, of the second, and the steps between. `optional`: may be absent. `when`: in these variants only, of each side that it names."""

    sources: tuple[str, ...] = msgspec.field(name="from")
    targets: tuple[str, ...] = msgspec.field(name="to")
    steps: tuple[Step, ...] = ()
    optional: bool = False
    when: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.sources or not self.targets:
            msg = "a rule needs a name on each side"
            raise ValueError(msg)
        for text in (*self.sources, *self.targets):
            names = _VARIABLE.findall(text)
            if len({*names}) != len(names) or not all(n.isidentifier() for n in names):
                msg = f"{text}: a variable stands in it twice, or is no name"
                raise ValueError(msg)

    def turned(self) -> Rule:
        """The rule in the other direction."""
        return Rule(self.targets, self.sources, tuple(s.inverse() for s in reversed(self.steps)), self.optional, self.when)


class View(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A view, as its file has it. `prefixes`: what the names of a side begin with in some checkpoints and not in others; `ignore`: names of a side that
    are no state; `rest`: what becomes of names that no rule knows."""

    name: str
    sides: tuple[str, str]
    rules: tuple[Rule, ...]
    title: str = ""
    parameters: dict[str, tuple[str, ...]] = {}
    counts: dict[str, str] = {}
    """variable -> the parameter that says how many there are: 0 to that, each of them"""
    prefixes: dict[str, str] = {}
    variants: dict[str, tuple[str, ...]] = {}
    ignore: dict[str, tuple[str, ...]] = {}
    rest: Literal["error", "keep", "drop"] = "error"

    def of(self, side: int, variant: str, other: str | None = None) -> list[Rule]:
        """The rules that apply to a variant of a side (and of the other, where it is known), from that side to the other."""
        chosen = {side: variant, 1 - side: other}
        found = []
        for rule in self.rules:
            fits = True
            for number, one in chosen.items():
                named = {*rule.when} & {*self.variants.get(self.sides[number], ())}
                fits &= one is None or not named or one in named
            if fits:
                found.append(rule.turned() if side else rule)
        return found


def load_view(name_or_text: str) -> View:
    """A view that ckptd brings along, by name, or the text of one. Raises NotFound, BadArgument (with the place in the text)."""
    text = name_or_text
    if not text.lstrip().startswith("{"):
        folder = files("ckptd") / "views"
        known = sorted(f.name.removesuffix(".json") for f in folder.iterdir() if f.name.endswith(".json"))
        if text not in known:
            msg = f"{text!r} is no view that ckptd brings along"
            raise NotFound(msg, remedy=f"one of {', '.join(known)}, or a file of your own")
        text = (folder / f"{text}.json").read_text("utf-8")
    if len(text) > TEXT_BYTES_MAX:
        msg = f"a view of {len(text)} characters is not read"
        raise BadArgument(msg)
    try:
        view = msgspec.json.decode(text, type=View)
    except (msgspec.DecodeError, RecursionError) as e:
        msg = f"the view cannot be read: {e}"
        raise BadArgument(msg, remedy="ckptd/views/llama.json is an example") from e
    known_sides = {*view.sides}
    for table in (view.prefixes, view.variants, view.ignore):
        if {*table} - known_sides:
            msg = f"view {view.name}: {sorted({*table} - known_sides)} are none of its sides {list(view.sides)}"
            raise BadArgument(msg)
    return view


# --- patterns ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Pattern:
    """A name with variables."""

    text: str
    variables: tuple[str, ...]
    regex: re.Pattern[str]

    @staticmethod
    def of(text: str) -> _Pattern:
        parts = _VARIABLE.split(text)
        regex = "".join(rf"(?P<{p}>0|[1-9][0-9]{{0,8}})" if i % 2 else re.escape(p) for i, p in enumerate(parts))
        return _Pattern(text, tuple(parts[1::2]), re.compile(regex))

    def match(self, name: str) -> dict[str, int] | None:
        found = self.regex.fullmatch(name)
        return None if found is None else {k: int(v) for k, v in found.groupdict().items()}

    def fill(self, values: Mapping[str, int]) -> str:
        return _VARIABLE.sub(lambda m: str(values[m[1]]), self.text)


@dataclass(frozen=True, slots=True)
class _Instance:
    """A rule for one set of numbers: what it takes, name by name or list by list; `flat` is all of it."""

    rule: Rule
    numbers: Mapping[str, int]
    names: tuple[str | tuple[str, ...], ...]

    @property
    def flat(self) -> list[str]:
        return [n for one in self.names for n in ([one] if isinstance(one, str) else one)]


def _some(names: Iterable[str]) -> str:
    names = [*names]
    return ", ".join(names[:NAMED_MAX]) + (f" and {len(names) - NAMED_MAX} more" if len(names) > NAMED_MAX else "")


# --- where numbers come from ------------------------------------------------------------------------------------------------


@dataclass
class _Numbers:
    """The parameters of a view for one checkpoint."""

    view: View
    checkpoint: Checkpoint
    names: Iterable[str]
    stripped: str
    """What the source's names lack of the view's."""
    hints: Mapping[str, Any]
    known: dict[str, int] = field(default_factory=dict)
    met: dict[str, int] = field(default_factory=dict)
    """variable -> the largest number met, and one"""
    _asking: list[str] = field(default_factory=list)

    def __call__(self, number: Number) -> int:
        return evaluate(number, self.of)

    def of(self, name: str) -> int:
        """The value of a parameter. Raises BadArgument, naming the hint."""
        value = self._find(name)
        if value is None:
            why = "is no parameter of it" if name not in self.view.parameters else "is not said by the checkpoint, and no shape proves it"
            msg = f"view {self.view.name}: {name} {why}"
            raise BadArgument(msg, remedy=f"say it by a hint, {name}=..." + "".join(f", or {n}=..." for n in self._behind(name)))
        return value

    def _behind(self, name: str) -> list[str]:
        """Parameters, not known either, from which it would follow."""
        found: dict[str, None] = {}
        todo = [name]
        while todo:
            for source in self.view.parameters.get(todo.pop(), ()):
                for one in re.findall(r"[A-Za-z_]\w*", source) if source.startswith("=") else ():
                    if one in self.view.parameters and self._find(one) is None and one not in found and one != name:
                        found[one] = None
                        todo.append(one)
        return [*found]

    def _find(self, name: str) -> int | None:
        if name in self.known:
            return self.known[name]
        if name in self._asking:
            return None
        self._asking.append(name)
        try:
            value = self._hint(name)
            for source in self.view.parameters.get(name, ()):
                if value is not None:
                    break
                value = self._source(source)
        finally:
            self._asking.pop()
        if value is not None:
            self.known[name] = value
        return value

    def _hint(self, name: str) -> int | None:
        if name not in self.hints:
            return None
        try:
            return int(str(self.hints[name]))
        except ValueError as e:
            msg = f"the hint {name}={self.hints[name]!r} is no whole number"
            raise BadArgument(msg) from e

    def _source(self, text: str) -> int | None:
        kind, _, rest = text.partition(":")
        if text.startswith("="):
            return self._expression(text[1:])
        if kind == "count":
            return self.met.get(rest)
        if kind == "shape":
            pattern, _, dim = rest.rpartition(":")
            wanted = _Pattern.of(pattern.removeprefix(self.stripped))
            for name in self.names:
                tensor = self.checkpoint.tensors.get(MODEL + name)
                if tensor is not None and dim.isdigit() and int(dim) < len(tensor.shape) and wanted.match(name) is not None:
                    return tensor.shape[int(dim)]
            return None
        return self._object(text)

    def _expression(self, text: str) -> int | None:
        def of(name: str) -> int:
            value = self._find(name)
            if value is None:
                raise LookupError(name)
            return value

        try:
            return evaluate(text, of)
        except LookupError:
            return None

    def _object(self, path: str) -> int | None:
        """A whole number in an object, or in the attributes of an inert one (`args` of a pickle)."""
        root = next((o for o in self.checkpoint.objects if path.startswith(f"{o}.")), None)
        if root is None:
            return None
        value = self.checkpoint.objects[root]
        for key in path.removeprefix(f"{root}.").split("."):
            value = getattr(value, "state", value)
            value = value.get(key) if isinstance(value, Mapping) else None
        return value if isinstance(value, int) and not isinstance(value, bool) else None


# --- applying a view --------------------------------------------------------------------------------------------------------


def apply(view: View, checkpoint: Checkpoint, hints: Mapping[str, Any]) -> Checkpoint:
    """The checkpoint as the other side of the view has it; the rows of all tensors mapped, nothing read.

    `hints`: parameters by name; `to` (the side that is wanted, where the names do not say which one is there) and `variant` (of the target).
    Raises BadArgument (a number is missing or does not fit; names that the view does not know, or misses), Unstorable (optimizer state that cannot follow its weight).
    """
    return _Run(view, checkpoint, hints).result()


class _Run:
    """One application of a view."""

    def __init__(self, view: View, checkpoint: Checkpoint, hints: Mapping[str, Any]) -> None:
        self.view, self.source = view, checkpoint
        self.state = checkpoint.state()
        stored = [n.removeprefix(MODEL) for n in checkpoint.tensors if n.startswith(MODEL)]
        self.tied = {a.removeprefix(MODEL): n.removeprefix(MODEL) for a, n in checkpoint.aliases.items()}
        self.names = [*dict.fromkeys([*stored, *self.tied, *self.state])]
        self.side, variant = self._recognise(hints)
        self.target = view.sides[1 - self.side]
        self.rules = view.of(self.side, variant, self._variant(hints))
        self.stripped = self._stripped(self.side)
        self.n = _Numbers(view, checkpoint, self.names, self.stripped, hints)
        self.out: dict[str, Tensor] = {}
        self.became: dict[str, tuple[_Instance, list[str]]] = {}
        """FQN -> the instance that took it, and what it made"""
        self.notes: list[str] = []
        self.scalars: dict[str, float] = {}

    # --- which way ----------------------------------------------------------------------------------------------------------

    def _stripped(self, side: int) -> str:
        prefix = self.view.prefixes.get(self.view.sides[side], "")
        return "" if not prefix or any(n.startswith(prefix) for n in self.names) else prefix

    def _recognise(self, hints: Mapping[str, Any]) -> tuple[int, str]:
        """The side, and the variant of it, whose names these are."""
        view, scores = self.view, []
        for side, name in enumerate(view.sides):
            stripped = self._stripped(side)
            for number, variant in enumerate(view.variants.get(name, ("",))):
                patterns = [_Pattern.of(s.removeprefix(stripped)) for rule in view.of(side, variant) for s in rule.sources]
                known = sum(any(p.match(n) is not None for p in patterns) for n in self.names)
                scores.append((known, -number, side, variant))
        wanted = hints.get("to")
        if wanted is not None and wanted not in view.sides:
            msg = f"view {view.name} has the sides {' and '.join(view.sides)}, not {wanted!r}"
            raise BadArgument(msg)
        if wanted is not None:
            scores = [s for s in scores if view.sides[1 - s[2]] == wanted]
        best = max(scores)
        if best[0] == 0:
            msg = f"view {view.name} knows none of these names: {_some(self.names)}"
            raise BadArgument(msg, remedy="is it the view of another model?")
        if any(s[0] == best[0] and s[2] != best[2] for s in scores):
            msg = f"view {view.name}: the names do not say which side this is, {' or '.join(view.sides)}"
            raise BadArgument(msg, remedy="say where to: the hint to=...")
        return best[2], best[3]

    def _variant(self, hints: Mapping[str, Any]) -> str:
        known = self.view.variants.get(self.target, ("",))
        wanted = str(hints.get("variant", known[0]))
        if wanted not in known:
            msg = f"view {self.view.name}: {wanted!r} is no variant of {self.target}"
            raise BadArgument(msg, remedy=f"one of {', '.join(known)}")
        return wanted

    # --- which rule for which names -----------------------------------------------------------------------------------------

    def _instances(self) -> Iterator[_Instance]:
        """Every rule for all its numbers. Raises BadArgument: names that are missing."""
        left = dict.fromkeys(self.names)
        matched: list[list[tuple[_Pattern, dict[str, dict[str, int]]]]] = []
        for rule in self.rules:
            per_pattern = []
            for text in rule.sources:
                pattern = _Pattern.of(text.removeprefix(self.stripped))
                hits = {n: found for n in left if (found := pattern.match(n)) is not None}
                for name in hits:
                    del left[name]
                per_pattern.append((pattern, hits))
                for found in hits.values():
                    for variable, value in found.items():
                        self.n.met[variable] = max(self.n.met.get(variable, 0), value + 1)
            matched.append(per_pattern)
        missing: list[str] = []
        for rule, per_pattern in zip(self.rules, matched, strict=True):
            yield from self._of_rule(rule, per_pattern, missing)
        if missing:
            msg = f"view {self.view.name}: {_some(missing)} {'is' if len(missing) == 1 else 'are'} not there"
            raise BadArgument(msg, remedy="a part of the model is missing, or it is another model's view")

    def _of_rule(
        self, rule: Rule, per_pattern: list[tuple[_Pattern, dict[str, dict[str, int]]]], missing: list[str]
    ) -> Iterator[_Instance]:
        goal = {v for t in rule.targets for v in _VARIABLE.findall(t)}
        shared = [v for v in dict.fromkeys(v for p, _ in per_pattern for v in p.variables) if v in goal]
        found: dict[tuple[int, ...], list[dict[int | None, str]]] = {}
        for number, (pattern, hits) in enumerate(per_pattern):
            own = [v for v in pattern.variables if v not in goal]
            if len(own) > 1 or {*shared} - {*pattern.variables}:
                msg = f"view {self.view.name}: {pattern.text} has other variables than the rest of its rule"
                raise BadArgument(msg)
            for name, values in hits.items():
                lists = found.setdefault(tuple(values[v] for v in shared), [{} for _ in per_pattern])
                lists[number][values[own[0]] if own else None] = name
        keys = {*found} if rule.optional else {*found} | {*self._range(shared)}
        for key in sorted(keys):
            numbers = dict(zip(shared, key, strict=True))
            names: list[str | tuple[str, ...]] = []
            for (pattern, _), held in zip(per_pattern, found.get(key, [{} for _ in per_pattern]), strict=True):
                own = [v for v in pattern.variables if v not in goal]
                wanted: Sequence[int | None] = range(max(1, self._count(own[0]))) if own else (None,)
                missing += [pattern.fill({**numbers, **({own[0]: w} if own and w is not None else {})}) for w in wanted if w not in held]
                names.append(tuple(held[w] for w in wanted if w in held) if own else held.get(None, ""))
            yield _Instance(rule, numbers, tuple(names))

    def _count(self, variable: str) -> int:
        parameter = self.view.counts.get(variable)
        return self.n.of(parameter) if parameter is not None else self.n.met.get(variable, 0)

    def _range(self, variables: Sequence[str]) -> Iterator[tuple[int, ...]]:
        return product(*(range(self._count(v)) for v in variables))

    # --- the mapping --------------------------------------------------------------------------------------------------------

    def result(self) -> Checkpoint:
        """The checkpoint of the other side."""
        instances = [*self._instances()]
        ties: dict[str, tuple[_Instance, str]] = {}
        for one in instances:
            if all(n in self.tied for n in one.flat):
                if len(one.flat) != 1 or len(one.rule.targets) != 1:
                    msg = f"view {self.view.name}: {_some(one.flat)} are tied to other tensors, and cannot become {_some(one.rule.targets)}"
                    raise Unstorable(msg)
                ties[one.flat[0]] = one, self._target_names(one, self._fill_targets(one))[0]
            else:
                self._map(one)
        self._rest({n for one in instances for n in one.flat})
        return replace(
            self.source,
            tensors=self.out,
            objects={**self.source.objects, **({GROUPS: self._groups()} if self.source.groups else {})},
            aliases={MODEL + name: MODEL + self._tied_to(alias, one) for alias, (one, name) in ties.items()},
            buffers={MODEL + t for f in self.source.buffers for t in self._now(f)},
            derived=self._derived(),
            pairs=self._pairs(),
            scalars=self.scalars,
            notes=[*self.source.notes, self._summary(), *self.notes],
        )

    def _summary(self) -> str:
        numbers = ", ".join(f"{k}={v}" for k, v in sorted(self.n.known.items()))
        return f"view {self.view.name}: {self.view.sides[self.side]} -> {self.target}" + (f" ({numbers})" if numbers else "")

    def _map(self, one: _Instance) -> None:
        """The weight, and every slot, of what a rule takes."""
        rule, flat = one.rule, one.flat
        lost = [f for f in flat if MODEL + f not in self.source.tensors]
        if lost:
            why = "is tied to another tensor" if lost[0] in self.tied else "has optimizer state and no weight"
            msg = f"view {self.view.name}: {lost[0]} {why}, and cannot become {_some(rule.targets)}"
            raise Unstorable(msg)
        names = self._put(one, "", {f: self.source.tensors[MODEL + f] for f in flat})
        for f in flat:
            self.became[f] = one, names
        slots = [*self.state.get(flat[0], ())]
        for f in flat[1:]:
            if {*self.state.get(f, ())} != {*slots}:
                odd = min({*self.state.get(f, ())} ^ {*slots})
                msg = f"{STATE}{f}.{odd}: one of {_some(flat)} has this state and another has not; they cannot become one"
                raise Unstorable(msg)
        for slot in slots:
            held = {f: self.state[f][slot] for f in flat}
            if all(t.shape == self.source.tensors[MODEL + f].shape for f, t in held.items()):
                self._put(one, slot, held)
            elif all(t.shape == () for t in held.values()):
                number = _one_number(slot, held, self.source)
                self._keep({f"{STATE}{n}.{slot}": number for n in names})
                self._know(f"{STATE}{flat[0]}.{slot}", [f"{STATE}{n}.{slot}" for n in names])
            elif not rule.steps and len(flat) == len(names) == 1:
                self._keep({f"{STATE}{names[0]}.{slot}": held[flat[0]]})
            else:
                f, t = next((f, t) for f, t in held.items() if t.shape != self.source.tensors[MODEL + f].shape)
                msg = f"{STATE}{f}.{slot}: its shape {list(t.shape)} is neither its parameter's nor that of a number, so it cannot follow its parameter"
                raise Unstorable(msg, remedy="leave the optimizer out: --drop optimizer")

    def _put(self, one: _Instance, slot: str, tensors: Mapping[str, Tensor]) -> list[str]:
        values: list[Value] = [tensors[n] if isinstance(n, str) else [tensors[m] for m in n] for n in one.names]
        try:
            for step in one.rule.steps:
                values = step.run(values, self.n)
        except BadArgument as e:
            numbers = ", ".join(f"{k}={v}" for k, v in sorted(self.n.known.items()))
            msg = f"view {self.view.name}: {_some(one.flat)}: {e.message.removeprefix(f'view {self.view.name}: ')}"
            raise BadArgument(msg, remedy=e.remedy or f"the numbers were {numbers}: a hint corrects one that is wrong") from e
        names = self._fill_targets(one, values)
        flat = [t for v in values for t in ([v] if isinstance(v, Tensor) else v)]
        made = self._target_names(one, names)
        full = [f"{STATE}{n}.{slot}" if slot else MODEL + n for n in made]
        self._keep(dict(zip(full, flat, strict=True)))
        if len(tensors) == len(made) == 1:
            self._know(f"{STATE}{one.flat[0]}.{slot}" if slot else MODEL + one.flat[0], full)
        return made

    def _know(self, old: str, new: Iterable[str]) -> None:
        """The value of a tensor of one element goes with it."""
        if old in self.source.scalars:
            self.scalars |= dict.fromkeys(new, self.source.scalars[old])

    def _fill_targets(self, one: _Instance, values: Sequence[Value] | None = None) -> list[str | list[str]]:
        """The names that a rule gives to what it made."""
        filled: list[str | list[str]] = []
        patterns = [_Pattern.of(t) for t in one.rule.targets]
        if values is not None and len(values) != len(patterns):
            msg = f"view {self.view.name}: the rule for {_some(one.rule.targets)} makes {len(values)} tensors of {_some(one.flat)}"
            raise BadArgument(msg)
        for i, pattern in enumerate(patterns):
            own = [v for v in pattern.variables if v not in one.numbers]
            value = None if values is None else values[i]
            if len(own) > 1 or bool(own) != isinstance(value, list):
                msg = f"view {self.view.name}: {pattern.text} is a list on this side only, and its rule does not unstack one"
                raise BadArgument(msg)
            if own and isinstance(value, list):
                filled.append([pattern.fill({**one.numbers, own[0]: k}) for k in range(len(value))])
            else:
                filled.append(pattern.fill(one.numbers))
        return filled

    def _target_names(self, _one: _Instance, names: Sequence[str | list[str]]) -> list[str]:
        return [n for one in names for n in ([one] if isinstance(one, str) else one)]

    def _keep(self, tensors: Mapping[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            if name in self.out:
                msg = f"view {self.view.name}: two rules make {name}"
                raise BadArgument(msg)
            self.out[name] = tensor

    # --- what goes with the tensors -----------------------------------------------------------------------------------------

    def _rest(self, taken: set[str]) -> None:
        """What no rule took."""
        ignored = [_Pattern.of(t.removeprefix(self.stripped)) for t in self.view.ignore.get(self.view.sides[self.side], ())]
        left = [n for n in self.names if n not in taken]
        unread = [n for n in left if any(p.match(n) is not None for p in ignored)]
        left = [n for n in left if n not in {*unread}]
        if unread:
            self.notes.append(f"no state, left out by the view: {_some(unread)}")
        if not left:
            return
        if self.view.rest == "error":
            msg = f"view {self.view.name} knows no rule for {_some(left)}"
            raise BadArgument(msg, remedy='add rules for them to the view, or say what becomes of them: "rest": "keep" or "drop"')
        if self.view.rest == "drop":
            self.notes.append(f"dropped, as the view says: {_some(left)}")
            return
        for name in left:
            if MODEL + name in self.source.tensors:
                self._keep({MODEL + name: self.source.tensors[MODEL + name]})
            self._keep({f"{STATE}{name}.{slot}": t for slot, t in self.state.get(name, {}).items()})
            self.became[name] = _Instance(Rule((name,), (name,)), {}, (name,)), [name]

    def _now(self, name: str) -> list[str]:
        """What became of a weight, by its name or FQN."""
        found = self.became.get(name.removeprefix(MODEL))
        return found[1] if found else []

    def _tied_to(self, alias: str, one: _Instance) -> str:
        stored = self.tied[alias]
        found = self.became.get(stored)
        if found is None or len(found[1]) != 1 or found[0].rule.steps != one.rule.steps:
            msg = f"view {self.view.name}: {alias} is tied to {stored}, and the view gives them different shapes"
            raise Unstorable(msg)
        return found[1][0]

    def _groups(self) -> list[dict[str, Any]]:
        groups: list[dict[str, Any]] = []
        first: dict[int, tuple[dict[str, Any], str]] = {}
        known = {p for g in self.source.groups for p in g["params"]}
        for group in self.source.groups:
            rest = {k: v for k, v in group.items() if k not in {"params", "param_names"}}
            made: list[str] = []
            for p in group["params"]:
                if p not in self.became:
                    if p in self.names:
                        continue  # dropped, and said
                    msg = f"{GROUPS}: {p} is a parameter that has no weight here"
                    raise Unstorable(msg)
                one, names = self.became[p]
                apart = [f for f in one.flat if f not in known]
                if apart:
                    msg = f"{GROUPS}: {p} is trained and {apart[0]} is not; they cannot become {_some(names)}"
                    raise Unstorable(msg)
                if id(one) not in first:
                    first[id(one)] = rest, p
                    made += names
                elif repr(first[id(one)][0]) != repr(rest):
                    msg = f"{GROUPS}: {first[id(one)][1]} and {p} have different hyper-parameters and cannot become {_some(names)}"
                    raise Unstorable(msg, remedy="leave the optimizer out: --drop optimizer")
            groups.append({**rest, "params": made})
        return groups

    def _derived(self) -> dict[str, str]:
        found: dict[str, str] = {}
        for fqn, (one, names) in self.became.items():
            dtypes = {self.source.derived.get(MODEL + f, "") for f in one.flat}
            if len(dtypes) > 1:
                msg = f"{MODEL}{fqn}: {_some(one.flat)} are computed with in different dtypes and cannot become one"
                raise Unstorable(msg)
            dtype = dtypes.pop()
            found |= {MODEL + n: dtype for n in names if dtype}
        return found

    def _pairs(self) -> list[tuple[str, str]]:
        """(16-bit name, master's name), translated; a merged parameter has a pair where all its parts have one."""
        by_fqn = {a.removeprefix(MODEL): b for a, b in self.source.pairs}
        found: dict[tuple[str, str], None] = {}
        for fqn, master in by_fqn.items():
            if fqn not in self.became:
                continue
            one, names = self.became[fqn]
            slot = master.removeprefix(f"{STATE}{fqn}.")
            if slot == master or any(by_fqn.get(f) != f"{STATE}{f}.{slot}" for f in one.flat):
                msg = f"{master}: the master of {fqn} cannot follow it to {_some(names)}"
                raise Unstorable(msg)
            found |= {(MODEL + n, f"{STATE}{n}.{slot}"): None for n in names}
        return [*found]


def _one_number(slot: str, held: Mapping[str, Tensor], source: Checkpoint) -> Tensor:
    """The 0-d slots of parameters that become one: the first; the others are compared here if their values are known, or else its replicas. Raises Divergent."""
    (fqn, first), *others = held.items()
    replicas = [*first.replicas]
    known = _value(source, f"{STATE}{fqn}.{slot}", first)
    for name, other in others:
        value = _value(source, f"{STATE}{name}.{slot}", other)
        if other.dtype != first.dtype:
            msg = f"{STATE}{name}.{slot} is {other.dtype} and {STATE}{fqn}.{slot} {first.dtype}"
            raise Unstorable(msg)
        if known is not None and type(value) is type(known):
            if value != known:
                msg = f"{STATE}{name}.{slot} and {STATE}{fqn}.{slot} differ, and their parameters become one"
                raise Divergent(msg, remedy="leave the optimizer out: --drop optimizer")
        else:
            replicas += [*other.rows, *other.replicas]
    return Tensor(first.dtype, (), first.rows, tuple(replicas))


def _value(source: Checkpoint, name: str, tensor: Tensor) -> float | bytes | None:
    """What is known of a number without reading: its value, or its bytes."""
    if name in source.scalars:
        return source.scalars[name]
    row = tensor.rows[0]
    return bytes(source.literals[row.begin : row.begin + ITEM_BYTES[tensor.dtype]]) if row.file == LITERAL else None
