"""The algebra of views on random boxes and strides, against numpy; views of models as data: which way, what is missing, what is refused."""

from __future__ import annotations

import json
from math import prod

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ckptd.core import algebra as a
from ckptd.core.algebra import evaluate
from ckptd.core.boxes import Box
from ckptd.core.logical import FILL, GROUPS, LITERAL, Checkpoint, Held, Row, Tensor, row_major
from ckptd.core.views import apply, load_view
from ckptd.errors import BadArgument, Divergent, NotFound, Unstorable

many = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])  # two cores, shared


# --- rows over a buffer, as numpy sees them ---------------------------------------------------------------------------------


def array_of(rows, shape, held: bytes) -> np.ndarray:
    """What rows of int32 say, -1 where none says anything."""
    out = np.full(shape, -1, np.int32)
    for row in rows:
        where = tuple(slice(s, s + e) for s, e in zip(row.box.start, row.box.extent))
        if row.file == FILL:
            out[where] = 0
        elif row.box.numel:
            base = np.frombuffer(held, np.int32, offset=row.begin)
            out[where] = np.lib.stride_tricks.as_strided(base, row.box.extent, [4 * s for s in row.strides])
    return out


def check(tensor: Tensor, held: bytes, want: np.ndarray) -> None:
    """The rows tile the tensor, lie in the file, and are these values; so are the replicas, where they are."""
    one = Checkpoint("test")
    one.file("f", len(held))
    one.tensors["t"] = tensor
    one.prove()
    assert tensor.shape == want.shape
    assert np.array_equal(array_of(tensor.rows, tensor.shape, held), want)
    again = array_of(tensor.replicas, tensor.shape, held)
    assert np.array_equal(np.where(again >= 0, again, want), want)


def cut_up(draw, box: Box) -> list[Box]:
    """A random tiling by guillotine cuts."""
    wide = [d for d, e in enumerate(box.extent) if e > 1]
    if not wide or draw(st.integers(0, 2)) == 0:
        return [box]
    dim = draw(st.sampled_from(wide))
    at = draw(st.integers(1, box.extent[dim] - 1))
    left = Box(box.start, (*box.extent[:dim], at, *box.extent[dim + 1 :]))
    right = Box((*box.start[:dim], box.start[dim] + at, *box.start[dim + 1 :]), (*box.extent[:dim], box.extent[dim] - at, *box.extent[dim + 1 :]))
    return cut_up(draw, left) + cut_up(draw, right)


@st.composite
def tensors(draw, shape=None):
    """A tensor of random rows (any order of dimensions in the file, gaps, replicas), its file, and its values."""
    shape = draw(st.lists(st.integers(0, 6), min_size=1, max_size=4).map(tuple)) if shape is None else shape
    truth = np.arange(prod(shape), dtype=np.int32).reshape(shape) + 1
    held = bytearray()
    rows, replicas = [], []
    for box in cut_up(draw, Box.whole(shape)) if prod(shape) else []:
        for target in (rows, replicas) if draw(st.booleans()) else (rows,):
            order = draw(st.permutations(range(len(shape))))
            gap = draw(st.integers(0, 2))
            extent = [box.extent[d] for d in order]
            flat = row_major(extent)
            strides = [0] * len(shape)
            for d, s in zip(order, flat):
                strides[d] = s * (gap + 1)
            values = truth[tuple(slice(s, s + e) for s, e in zip(box.start, box.extent))].transpose(order)
            spread = np.full(prod(extent) * (gap + 1), -7, np.int32)
            spread[:: gap + 1] = values.reshape(-1)
            held += b"\xee" * 4 * draw(st.integers(0, 3))
            target.append(Row(box, 0, len(held), tuple(strides)))
            held += spread.tobytes()
    return Tensor("I32", shape, tuple(rows), tuple(replicas)), bytes(held), truth


@many
@given(tensors())
def test_the_generator_itself(one):
    check(*one)


@many
@given(tensors(), st.data())
def test_permute(one, data):
    tensor, held, truth = one
    order = data.draw(st.permutations(range(truth.ndim)))
    turned = a.permute(tensor, order)
    check(turned, held, truth.transpose(order))
    assert a.permute(turned, [order.index(d) for d in range(truth.ndim)]) == tensor


@many
@given(st.data())
def test_split_and_merge(data):
    sizes = data.draw(st.lists(st.integers(0, 5), min_size=1, max_size=3))
    rest = data.draw(st.lists(st.integers(1, 4), max_size=2))
    dim = data.draw(st.integers(0, len(rest)))
    flat = (*rest[:dim], prod(sizes), *rest[dim:])
    many = (*rest[:dim], *sizes, *rest[dim:])
    tensor, held, truth = data.draw(tensors(shape=flat))
    apart = a.split(tensor, dim, sizes)
    check(apart, held, truth.reshape(many))
    check(a.merge(apart, dim, len(sizes)), held, truth)
    tensor, held, truth = data.draw(tensors(shape=many))
    together = a.merge(tensor, dim, len(sizes))
    check(together, held, truth.reshape(flat))
    check(a.split(together, dim, sizes), held, truth)


@many
@given(tensors(), st.data())
def test_cut_and_concat(one, data):
    tensor, held, truth = one
    dim = data.draw(st.integers(0, truth.ndim - 1))
    ends = sorted(data.draw(st.lists(st.integers(0, truth.shape[dim]), max_size=3)))
    sizes = [int(n) for n in np.diff([0, *ends, truth.shape[dim]])]
    parts = a.cut(tensor, dim, sizes)
    for part, want in zip(parts, np.split(truth, np.cumsum(sizes)[:-1], dim)):
        check(part, held, want)
    check(a.concat(parts, dim), held, truth)


@many
@given(tensors(), st.data())
def test_stack_unstack_and_pad(one, data):
    tensor, held, truth = one
    dim = data.draw(st.integers(0, truth.ndim - 1))
    apart = a.unstack(tensor, dim)
    for i, part in enumerate(apart):
        check(part, held, truth.take(i, dim))
    if apart:
        check(a.stack(apart, dim), held, truth)
    more = data.draw(st.integers(0, 3))
    longer = a.pad(tensor, dim, truth.shape[dim] + more)
    check(longer, held, np.pad(truth, [(0, more if d == dim else 0) for d in range(truth.ndim)]))
    assert a.narrow(longer, dim, 0, truth.shape[dim]).rows == tuple(r for r in tensor.rows if r.box.numel)


def test_what_was_whole_comes_back_whole():
    """Fusing and taking apart leaves one row, not one per head: files are read in long pieces again."""
    q, k = (Tensor("I32", (n, 6), (Row(Box.whole((n, 6)), f, 0, (6, 1)),)) for f, n in enumerate((32, 16)))
    fused = a.merge(a.concat([a.split(q, 0, (4, 2, 4)), a.split(k, 0, (4, 1, 4))], 1), 0, 3)
    assert len(fused.rows) == 8
    back = a.cut(a.split(fused, 0, (4, 3, 4)), 1, (2, 1))
    assert a.merge(back[0], 0, 3) == q


# --- expressions ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [("heads/groups+2", 6), ("(heads/groups+2)*head_dim", 48), ("up(vocab, 128)", 128), ("up(vocab,1)", 37), ("2*3-4", 2), (7, 7), ("12/2/3", 2)],
)
def test_expressions(text, value):
    assert evaluate(text, {"heads": 8, "groups": 2, "head_dim": 8, "vocab": 37}.__getitem__) == value


@pytest.mark.parametrize("text", ["", "heads/", "heads/3", "heads//2", "__import__('os')", "(heads", "heads)", "heads heads", "1/0", "(" * 99, "a.b", "up(3)"])
def test_expressions_that_are_none(text):
    with pytest.raises(BadArgument):
        evaluate(text, lambda _: 8)


# --- views ------------------------------------------------------------------------------------------------------------------

TOY = {
    "name": "toy", "sides": ["left", "right"], "counts": {"layer": "layers", "expert": "experts"},
    "parameters": {"layers": ["extras.config.layers", "count:layer"], "experts": ["count:expert", "shape:r.{layer}.experts:0"], "ffn": ["shape:l.{layer}.gate:0", "=hidden*2"],
                   "hidden": ["shape:r.{layer}.fc1:1"], "vocab": ["shape:emb:0"], "padded": ["shape:words:0", "=up(vocab, 8)"]},
    "rules": [
        {"from": ["emb"], "to": ["words"], "steps": [{"do": "pad", "dim": 0, "shorter": "vocab", "longer": "padded"}]},
        {"from": ["out"], "to": ["head"], "optional": True, "steps": [{"do": "pad", "dim": 0, "shorter": "vocab", "longer": "padded"}]},
        {"from": ["l.{layer}.gate", "l.{layer}.up"], "to": ["r.{layer}.fc1"], "steps": [{"do": "concat", "dim": 0, "sizes": ["ffn", "ffn"]}]},
        {"from": ["l.{layer}.e.{expert}.w"], "to": ["r.{layer}.experts"], "optional": True, "steps": [{"do": "stack", "dim": 0, "count": "experts"}]},
    ],
}  # fmt: skip


class Toy:
    """A checkpoint of the left side, its values at hand."""

    def __init__(self, layers=2, experts=3, optimizer=True, step=5.0):
        self.one = Checkpoint("test")
        self.held = bytearray()
        self.values = {}
        self.one.file("f", 0)
        shapes = {"emb": (5, 3)}
        for i in range(layers):
            shapes |= {f"l.{i}.gate": (6, 3), f"l.{i}.up": (6, 3)} | {f"l.{i}.e.{e}.w": (3, 2) for e in range(experts)}
        for fqn, shape in shapes.items():
            self.put(f"model.{fqn}", shape)
            if optimizer:
                self.put(f"optim.state.{fqn}.exp_avg", shape)
                self.one.literal(f"optim.state.{fqn}.step", "F32", np.float32(step).tobytes())
        if optimizer:
            self.one.objects[GROUPS] = [{"lr": 0.1, "params": [*shapes]}]

    def put(self, name, shape):
        value = (np.arange(prod(shape), dtype=np.int32) + len(self.held)).reshape(shape)
        self.one.tensors[name] = Tensor("I32", shape, (Row(Box.whole(shape), 0, len(self.held), row_major(shape)),))
        self.values[name] = value
        self.held += value.tobytes()
        self.one.files[0] = Held("f", len(self.held))

    def array(self, checkpoint, name):
        tensor = checkpoint.tensors[name]
        return array_of(tensor.rows, tensor.shape, bytes(self.held))


def view(**changes):
    return load_view(json.dumps(TOY | changes))


def test_a_view_maps_weights_slots_groups_and_back():
    toy = Toy()
    there = apply(view(), toy.one, {})
    there.prove()
    for prefix, suffix in (("model.", ""), ("optim.state.", ".exp_avg")):
        v = lambda n: toy.values[f"{prefix}{n}{suffix}"]
        assert np.array_equal(toy.array(there, f"{prefix}words{suffix}"), np.pad(v("emb"), ((0, 3), (0, 0))))
        for i in (0, 1):
            assert np.array_equal(toy.array(there, f"{prefix}r.{i}.fc1{suffix}"), np.concatenate([v(f"l.{i}.gate"), v(f"l.{i}.up")]))
            assert np.array_equal(toy.array(there, f"{prefix}r.{i}.experts{suffix}"), np.stack([v(f"l.{i}.e.{e}.w") for e in range(3)]))
    assert there.groups == [{"lr": 0.1, "params": ["words", "r.0.fc1", "r.0.experts", "r.1.fc1", "r.1.experts"]}]
    assert there.tensors["optim.state.r.0.fc1.step"].shape == ()
    assert there.tensors["optim.state.r.0.fc1.step"].rows[0].file == LITERAL
    back = apply(view(), there, {"vocab": 5})
    back.prove()
    assert {*back.tensors} == {*toy.one.tensors}
    for name, value in toy.values.items():
        assert np.array_equal(toy.array(back, name), value), name
        assert back.tensors[name].rows == toy.one.tensors[name].rows, "whole again"
    assert back.groups == toy.one.groups
    assert "left -> right" in there.notes[-1]


def test_a_number_that_nobody_says_is_named_with_its_hint():
    there = apply(view(), Toy().one, {})
    with pytest.raises(BadArgument, match="vocab is not said") as e:
        apply(view(), there, {})
    assert "hint, vocab=..." in str(e.value)
    with pytest.raises(BadArgument, match="no whole number"):
        apply(view(), there, {"vocab": "five"})
    with pytest.raises(BadArgument, match="r.0.fc1"):
        apply(view(), there, {"vocab": 5, "ffn": 7})


def test_missing_and_unknown_names_are_errors_by_name():
    toy = Toy(optimizer=False)
    del toy.one.tensors["model.l.1.up"]
    with pytest.raises(BadArgument, match=r"l\.1\.up is not there"):
        apply(view(), toy.one, {})
    toy = Toy(layers=2, optimizer=False)
    toy.one.objects["extras.config"] = {"layers": 3}
    with pytest.raises(BadArgument, match=r"l\.2\.gate, l\.2\.up are not there"):
        apply(view(), toy.one, {})
    toy = Toy(optimizer=False)
    del toy.one.tensors["model.l.1.e.1.w"]
    with pytest.raises(BadArgument, match=r"l\.1\.e\.1\.w"):
        apply(view(), toy.one, {})
    toy = Toy(optimizer=False)
    toy.put("model.extra.bias", (2,))
    with pytest.raises(BadArgument, match="extra.bias"):
        apply(view(), toy.one, {})
    assert "model.extra.bias" in apply(view(rest="keep"), toy.one, {}).tensors
    dropped = apply(view(rest="drop"), toy.one, {})
    assert "model.extra.bias" not in dropped.tensors
    assert "extra.bias" in dropped.notes[-1]
    with pytest.raises(BadArgument, match="none of these names"):
        apply(load_view("llama"), toy.one, {})


def test_state_that_cannot_follow_is_refused_by_name():
    toy = Toy()
    toy.one.objects[GROUPS] = [{"lr": 0.1, "params": [p for p in toy.one.groups[0]["params"] if p != "l.0.up"]}, {"lr": 0.2, "params": ["l.0.up"]}]
    with pytest.raises(Unstorable, match=r"l\.0\.gate and l\.0\.up have different hyper-parameters"):
        apply(view(), toy.one, {})
    toy.one.objects[GROUPS][1]["lr"] = 0.1
    assert apply(view(), toy.one, {}).groups[0]["params"][:2] == ["words", "r.0.fc1"]
    toy = Toy()
    toy.one.objects[GROUPS][0]["params"].remove("l.0.up")
    with pytest.raises(Unstorable, match=r"l\.0\.gate is trained and l\.0\.up is not"):
        apply(view(), toy.one, {})
    toy = Toy()
    del toy.one.tensors["model.l.0.up"]
    with pytest.raises(Unstorable, match=r"l\.0\.up has optimizer state and no weight"):
        apply(view(), toy.one, {})
    toy = Toy()
    del toy.one.tensors["optim.state.l.0.up.exp_avg"]
    with pytest.raises(Unstorable, match=r"optim\.state\.l\.0\.up\.exp_avg"):
        apply(view(), toy.one, {})
    toy = Toy()
    toy.put("optim.state.l.0.up.row", (6,))
    toy.put("optim.state.l.0.gate.row", (6,))
    with pytest.raises(Unstorable, match="neither its parameter's nor that of a number"):
        apply(view(), toy.one, {})
    toy = Toy()
    toy.one.tensors.pop("optim.state.l.0.up.step")
    toy.one.literal("optim.state.l.0.up.step", "F32", np.float32(6).tobytes())
    with pytest.raises(Divergent, match=r"l\.0\.up\.step"):
        apply(view(), toy.one, {})


def test_a_step_in_a_file_becomes_a_replica_for_the_engine_to_compare():
    toy = Toy()
    for part in ("gate", "up"):
        toy.one.tensors.pop(f"optim.state.l.0.{part}.step")
        toy.one.tensors[f"optim.state.l.0.{part}.step"] = Tensor("F32", (), (Row(Box((), ()), 0, 4 * len(part), ()),))
    step = apply(view(), toy.one, {}).tensors["optim.state.r.0.fc1.step"]
    assert [r.begin for r in step.rows] == [16]
    assert [r.begin for r in step.replicas] == [8]
    names = [f"optim.state.l.0.{part}.step" for part in ("gate", "up")]
    toy.one.scalars = dict.fromkeys(names, 4.0)
    known = apply(view(), toy.one, {})
    assert not known.tensors["optim.state.r.0.fc1.step"].replicas
    assert known.scalars["optim.state.r.0.fc1.step"] == 4.0
    toy.one.scalars[names[1]] = 5.0
    with pytest.raises(Divergent, match=r"l\.0\.up\.step"):
        apply(view(), toy.one, {})


def test_ties_and_pairs_and_derived_follow():
    toy = Toy(experts=0)
    toy.one.aliases["model.out"] = "model.emb"
    for fqn in ("l.0.gate", "l.0.up"):
        toy.one.derived[f"model.{fqn}"] = "BF16"
        toy.put(f"optim.state.{fqn}.master", (6, 3))
        toy.one.pairs.append((f"model.{fqn}", f"optim.state.{fqn}.master"))
    toy.one.buffers.add("model.emb")
    there = apply(view(), toy.one, {})
    there.prove()
    assert there.aliases == {"model.head": "model.words"}
    assert there.derived == {"model.r.0.fc1": "BF16"}
    assert there.pairs == [("model.r.0.fc1", "optim.state.r.0.fc1.master")]
    assert there.buffers == {"model.words"}
    back = apply(view(), there, {"vocab": 5})
    assert back.aliases == toy.one.aliases
    assert sorted(back.pairs) == sorted(toy.one.pairs)
    assert back.derived == toy.one.derived
    toy.one.derived.pop("model.l.0.up")
    with pytest.raises(Unstorable, match="different dtypes"):
        apply(view(), toy.one, {})


@pytest.mark.parametrize(
    "text",
    ["{", "{}", '{"name": "x", "sides": ["a"], "rules": []}', '{"name": "x", "sides": ["a", "b"], "rules": [{"from": ["p"], "to": ["q"], "steps": [{"do": "eval"}]}]}',
     '{"name": "x", "sides": ["a", "b"], "rules": [{"from": [], "to": ["q"]}]}', '{"name": "x", "sides": ["a", "b"], "rules": [], "prefixes": {"c": ""}}',
     '{"name": "x", "sides": ["a", "b"], "rules": [{"from": ["p"], "to": ["q"], "steps": [{"do": "permute", "order": [0, 2]}]}]}',
     '{"name": "x", "sides": ["a", "b"], "rules": [{"from": ["p.{i}.{i}"], "to": ["q"]}]}', '{"a":' * 3000],
)  # fmt: skip
def test_texts_that_are_no_views(text):
    with pytest.raises(BadArgument):
        load_view(text)


def test_names_of_views():
    for name in ("llama", "gpt2", "mixtral", "mixtral-files"):
        assert load_view(name).name == name
    with pytest.raises(NotFound, match="no view"):
        load_view("../../etc/passwd")
