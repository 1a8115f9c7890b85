"""Typed JSON: exact values and exact types back, refusals by path, nothing but BadImage for malformed JSON."""

from __future__ import annotations

import json
import math
import struct
from collections import Counter, OrderedDict, defaultdict, deque
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptd.core.typed import DEPTH_MAX, decode, encode
from ckptd.errors import BadImage, Unstorable


def through_json(value):
    """Encode, write as JSON text, read and decode. Arrays lie in a list beside it."""
    held = []

    def put(path, item):
        if isinstance(item, np.ndarray):
            held.append(item)
            return "ndarray", str(len(held) - 1)
        return None

    text = json.dumps(encode(value, "extras", put), allow_nan=False)
    return decode(json.loads(text), lambda kind, reference: held[int(reference)])


def no_array(*_):
    return None


def same(a, b) -> bool:
    """Equal in value and type, bit for bit, all the way down."""
    if type(a) is not type(b):
        return False
    if type(a) is float:
        return struct.pack("<d", a) == struct.pack("<d", b) or (math.isnan(a) and math.isnan(b))
    if type(a) is complex:
        return same(a.real, b.real) and same(a.imag, b.imag)
    if isinstance(a, (np.str_, np.bytes_)):
        return a == b and len(a) == len(b)
    if isinstance(a, np.generic):
        return a.dtype == b.dtype and a.tobytes() == b.tobytes()
    if isinstance(a, np.ndarray):
        return a is b
    if isinstance(a, deque) and a.maxlen != b.maxlen:
        return False
    if isinstance(a, (list, tuple, deque)):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict):
        return len(a) == len(b) and all(map(same, a.keys(), b.keys())) and all(map(same, a.values(), b.values()))
    return a == b


numpy_scalars = st.one_of(
    st.floats(width=32).map(np.float32),
    st.floats().map(np.float64),
    st.integers(-(2**63), 2**63 - 1).map(np.int64),
    st.integers(0, 255).map(np.uint8),
    st.booleans().map(np.bool_),
    st.complex_numbers().map(np.complex128),
    st.text(max_size=4).map(np.str_),
    st.binary(max_size=4).map(np.bytes_),
    st.sampled_from([np.float16("inf"), np.datetime64("NaT", "ns"), np.datetime64("2026-01-01", "25s"), np.timedelta64(3, "D"), np.longdouble(1) / 3]),
)
hashables = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(-(2**200), 2**200),
    st.floats(allow_nan=False),
    st.text(max_size=5),
    st.sampled_from(["$", "$int", "a\x00b", "\ud800", "f\udcff.txt", "", "é\u2028"]),
    st.binary(max_size=5),
    st.tuples(st.integers(), st.text(max_size=2)),
)
leaves = st.one_of(
    hashables,
    numpy_scalars,
    st.floats(),
    st.complex_numbers(),
    st.sampled_from([np.arange(3), np.zeros((0, 2), np.float32), np.array(1.5)]),
)
values = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.builds(deque, st.lists(inner, max_size=3), st.sampled_from([None, 0, 2, 7])),
        st.sets(hashables, max_size=3),
        st.frozensets(hashables, max_size=3),
        st.dictionaries(st.text(max_size=3), inner, max_size=3),
        st.dictionaries(hashables, inner, max_size=3),
        st.dictionaries(hashables, inner, max_size=3).map(OrderedDict),
        st.dictionaries(hashables, st.integers(-3, 2**70), max_size=3).map(Counter),
    ),
    max_leaves=12,
)


@settings(max_examples=250, deadline=None)
@given(values)
def test_every_value_of_the_closed_list_comes_back_exactly_with_its_type(value):
    assert same(through_json(value), value)


@pytest.mark.parametrize("value", [
    math.nan, math.inf, -math.inf, -0.0, 5e-324, 2**63 - 1, -(2**63) + 1, -(2**63), 2**63, 2**128 + 1, 10**5000, -(10**5000),
    complex(-0.0, math.nan), {"$tuple": [1]}, {"$int": "5", "a": 1}, {"a": 1, "$b": 2}, {1: "a", "1": "b"}, {None: 0, (1, 2): [3]},
    {-0.0: 1}, "\ud800", {"\udcff": 1}, "x\x00y", {"\x00" * 200: {"\x00": 1}}, deque([1, 2], maxlen=2), deque([], maxlen=0),
    np.str_(""), np.str_("a\x00"), np.str_("\udcff"), np.bytes_(b"a\x00"), np.bytes_(b""), np.void(b"ab"), np.float32(-0.0),
    Counter({"a": -1}), OrderedDict([("b", 1), ("a", 2)]), {1, "1", 1.5, None}, frozenset({(1, frozenset({2}))}), {10**5000, 1},
    {10**5000: 1},
], ids=lambda v: type(v).__name__)  # fmt: skip
def test_the_awkward_values_come_back_exactly(value):
    assert same(through_json(value), value)


def test_a_defaultdict_comes_back_as_a_dict_and_a_bytearray_as_bytes():
    assert same(through_json(defaultdict(int, {1: 2})), {1: 2})
    assert same(through_json(bytearray(b"ab")), b"ab")


def test_states_of_real_generators_come_back_exactly():
    import random

    torch = pytest.importorskip("torch")
    for state in (random.Random(3).getstate(), np.random.default_rng(3).bit_generator.state, torch.Size([2, 3])):
        back = through_json(state)
        assert back == state
    rng = np.random.default_rng(0)
    rng.bit_generator.state = through_json(np.random.default_rng(3).bit_generator.state)
    assert rng.integers(1 << 60) == np.random.default_rng(3).integers(1 << 60)


class Stranger:
    pass


class Hostile:
    def __repr__(self):
        raise OSError("no")

    __str__ = __repr__


class Size(NamedTuple):  # as torch calls its own
    w: int
    h: int


@pytest.mark.parametrize("value", [
    Stranger(), Stranger, len, object(), 1j.conjugate, range(3), iter([]), memoryview(b""), slice(1),
    Size(1, 2), type("Text", (str,), {})("a"), type("Number", (int,), {})(1),
    np.zeros(1, [("a", "i4")])[0], np.void(b""), np.array([None])[0:1].view(), Hostile(),
], ids=lambda v: type(v).__name__)  # fmt: skip
def test_anything_else_is_refused_with_its_path(value):
    with pytest.raises(Unstorable, match=r"^extras\.loader\.0\.sampler: "):
        encode({"loader": [{"sampler": value}]}, "extras", no_array)


def test_a_stranger_as_key_or_in_a_set_is_refused_with_its_path():
    for value in ({Hostile(): 1}, {Hostile()}, {1: {Stranger(): 2}}, frozenset({Stranger()})):
        with pytest.raises(Unstorable, match=r"^extras\.a\."):
            encode({"a": value}, "extras", no_array)


def test_cycles_and_deep_nesting_are_refused_as_unstorable():
    cyclic: list = []
    cyclic.append(cyclic)
    table: dict = {}
    table["self"] = table
    ring: deque = deque()
    ring.append([ring])
    odd: dict = {1: None}
    odd[1] = (odd,)
    deep = None
    for _ in range(100_000):
        deep = [deep]
    for value in (cyclic, table, ring, odd, deep):
        with pytest.raises(Unstorable, match="^extras.*nested deeper than 64"):
            encode(value, "extras", no_array)
    while deep:  # taken apart by hand: the interpreter's own way is recursive
        deep = deep[0]


def test_what_is_just_not_too_deep_comes_back():
    for wrap in (lambda v: [v], lambda v: (v,), lambda v: {1: v}, lambda v: {"a": v}, lambda v: deque([v], 3)):
        value = 1j
        for _ in range(DEPTH_MAX):
            value = wrap(value)
        assert same(through_json(value), value)


TAGS = ["$int", "$str", "$float", "$bytes", "$complex", "$tuple", "$set", "$frozenset", "$deque", "$ring", "$odict", "$dict", "$counter",
        "$npscalar", "$array", "$new", "$"]  # fmt: skip
odd_texts = st.sampled_from(["", "nan", "1", "AAAA", "AAAAAAAAAAA=", "=", "é", "\ud800", "<f8", "|O", "O", ",", "(3,)f8", "i4,i4", "f8,(", "<U999999999",
                             "|V0", "<M8[99999s]", "<M8[xx]", "a", "T", "{}", "<f3", "U", "S", "0x", "9" * 5000, "ndarray"])  # fmt: skip
junk = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), odd_texts, st.text(max_size=3)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.sampled_from(TAGS), inner, min_size=1, max_size=1),
        st.dictionaries(st.sampled_from([*TAGS, "a"]), inner, max_size=2),
    ),
    max_leaves=8,
)


@settings(max_examples=500, deadline=None)
@given(junk)
@pytest.mark.filterwarnings("error")
def test_malformed_json_only_ever_raises_bad_image(value):
    try:
        decode(value, lambda kind, reference: {}[reference])
    except BadImage:
        pass


@pytest.mark.parametrize("value", [
    {"$npscalar": [",", "AA=="]}, {"$npscalar": ["a", "AA=="]}, {"$npscalar": ["|O", "AAAAAAAAAAA="]}, {"$npscalar": ["(1,)f8", "AAAAAAAAAAA="]},
    {"$npscalar": ["<f8", "AA=="]}, {"$npscalar": ["<f8"]}, {"$npscalar": ["f8,", "AAAAAAAAAAA="]}, {"$npscalar": ["<U999999999", "AAAA"]},
    {"$set": [[1]]}, {"$dict": [[[1], 2]]}, {"$dict": [1]}, {"$dict": [[1, 2, 3]]}, {"$dict": {"a": 1}}, {"$tuple": "ab"}, {"$tuple": None},
    {"$int": 5}, {"$int": "x"}, {"$int": "9" * 5000}, {"$float": "1"}, {"$float": 1}, {"$bytes": "!"}, {"$bytes": 1}, {"$complex": [1]},
    {"$complex": ["1", "2"]}, {"$complex": [None, 1]}, {"$ring": [-1, []]}, {"$ring": ["a", []]}, {"$ring": [1]}, {"$ring": [2**70, []]}, {"$str": "/w=="},
    {"$array": ["ndarray", "no such"]}, {"$array": ["ndarray"]}, {"$array": [1, 2]}, {"$unknown": 1}, {"$": 1},
    {"$int": "1", "a": 2}, {"a": 2, "$int": "1"}, {"a": b"bytes"}, {1: 2}, {"a": {1: 2}}, (1, 2), {"$tuple": [object()]},
], ids=str)  # fmt: skip
def test_each_malformed_value_is_a_bad_image(value):
    with pytest.raises(BadImage):
        decode(value, lambda kind, reference: {}[reference])


def test_json_nested_too_deep_is_a_bad_image():
    for wrap in (lambda v: [v], lambda v: {"a": v}, lambda v: {"$tuple": [v]}, lambda v: {"$dict": [[1, v]]}, lambda v: {"$complex": [v, 1]}):
        value = 1
        for _ in range(500):
            value = wrap(value)
        with pytest.raises(BadImage, match="nested deeper"):
            decode(value, no_array)
