"""Groups: everybody is in one, domains are kept apart where they can be, and it is said where they cannot."""

from __future__ import annotations

from itertools import combinations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ckptd.core.groups import Group, form
from ckptd.errors import BadArgument

CASES = settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))


def racks(*sizes):
    return [{"rack": f"r{i}"} for i, size in enumerate(sizes) for _ in range(size)]


def test_nodes_without_labels():
    assert form([]) == ()
    assert form([{}]) == (Group((0,), 0, (), 1),)
    assert form([{}])[0].degraded == "1 nodes can lose 0, not 1"
    assert form([{}] * 2) == (Group((0, 1), 1, (), 1),)
    assert [len(g.members) for g in form([{}] * 20)] == [7, 7, 6]
    assert [g.parity for g in form([{}] * 2, parity=2)] == [1]
    assert not any(g.degraded for g in form([{}] * 20, size=5, parity=2))


def test_racks_are_kept_apart():
    groups = form(racks(4, 4, 4, 4), size=4)
    assert len(groups) == 4
    assert not any(g.degraded for g in groups)
    groups = form(racks(2, 2, 2), size=8)
    assert [len(g.members) for g in groups] == [3, 3], "smaller groups than asked for, but no rack twice"
    assert not any(g.degraded for g in groups)


def test_what_cannot_be_kept_apart_is_said():
    (group,) = form(racks(3), size=4)
    assert group.degraded == "members share rack=r0"
    groups = form(racks(5, 1, 1), size=4)
    assert sum(g.shared == ("rack=r0",) for g in groups) == len(groups), "five of seven nodes are in one rack"


@pytest.mark.parametrize(("size", "parity"), [(1, 1), (33, 1), (4, 0), (4, 5), (4, 4), (2, 2)])
def test_impossible_sizes_are_refused(size, parity):
    with pytest.raises(BadArgument, match="a group has 2 to 32 nodes"):
        form([{}] * 8, size=size, parity=parity)


nodes = st.lists(st.fixed_dictionaries({"rack": st.sampled_from("abcde")}, optional={"power": st.sampled_from("xy"), "switch": st.sampled_from("123")}), max_size=24)


@CASES
@given(nodes, st.integers(2, 9), st.integers(1, 3))
def test_every_node_is_in_one_group(labels, size, parity):
    if parity >= size:
        return
    groups = form(labels, size=size, parity=parity)
    assert sorted(n for g in groups for n in g.members) == list(range(len(labels)))
    sizes = [len(g.members) for g in groups]
    assert not sizes or max(sizes) <= size or len(labels) // (parity + 1) < -(-len(labels) // size)
    assert len(labels) <= parity or all(g.parity == parity for g in groups), "enough nodes, so every group can lose what was asked for"
    assert not sizes or max(sizes) - min(sizes) <= 1
    assert groups == form(list(labels), size=size, parity=parity), "the same for every daemon"
    for g in groups:
        assert g.parity == min(parity, len(g.members) - 1)
        met = {f"{k}={v}" for a, b in combinations(g.members, 2) for k, v in labels[a].items() if labels[b].get(k) == v}
        assert {*g.shared} == met, "what members share is said, and nothing else"


@CASES
@given(st.lists(st.integers(1, 4), min_size=4, max_size=8), st.integers(2, 4))
def test_one_kind_of_domain_is_kept_apart_wherever_that_can_be(sizes, size):
    labels = racks(*sizes)
    groups = form(labels, size=size)
    if max(sizes) <= len(groups):
        assert not any(g.shared for g in groups)
