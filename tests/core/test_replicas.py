"""Replicas: whose bytes are compared, when, and who is named."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from ckptd.core.boxes import Box
from ckptd.core.plan import LeafDecl
from ckptd.core.replicas import Ballots, Suspicion, compare, key_of, shared, turn_of


def leaf(name, start=(0,), extent=(4,), local=False):
    return LeafDecl(name, "F32", (8,), ((start, extent),), "", b"", local)


def test_only_equal_boxes_of_several_ranks_are_shared_and_nothing_local():
    leaves = {
        0: [leaf("w"), leaf("norm", extent=(8,)), leaf("buffer", local=True)],
        1: [leaf("w", (4,)), leaf("norm", extent=(8,)), leaf("buffer", local=True)],
        2: [leaf("w"), leaf("alone")],
    }
    assert shared(leaves) == {0: ["w", "norm"], 1: ["norm"], 2: ["w"]}


def test_keys_tell_shards_apart():
    assert key_of("w", Box((0, 0), (2, 2))) == "w" and key_of("w", Box((2, 0), (2, 2))) == "w[2, 0]"


def test_all_have_their_turn_and_the_same_on_all_ranks():
    names = [f"layer{i}.weight" for i in range(400)]
    turns = [turn_of(n, 50) for n in names]
    assert {*turns} == {*range(50)} and turns == [turn_of(n, 50) for n in names]


def test_the_minority_is_named_with_its_tensors():
    said = {0: {"a": 1, "b": 2}, 1: {"a": 1, "b": 2}, 2: {"a": 9, "b": 8}, 3: {"a": 1}}
    assert compare(said) == [Suspicion((2,), ("a", "b"))]
    assert "rank 2" in str(compare(said)[0]) and "a, b" in str(compare(said)[0])


def test_two_who_differ_accuse_nobody():
    assert compare({0: {"a": 1}, 1: {"a": 2}}) == [Suspicion((0, 1), ("a",), undecided=True)]
    assert "no majority" in str(compare({0: {"a": 1}, 1: {"a": 2}})[0])


def test_ballots_are_counted_once_and_kept_no_longer():
    b = Ballots()
    b.add((1, 5), {0: {"a": 1}})
    b.add((1, 5), {1: {"a": 1}, 2: {"a": 3}})
    b.add((1, 4), {0: {"a": 1}})
    assert b.of((1, 5), {0, 2}) == {0: {"a": 1}, 2: {"a": 3}}
    assert b.committed((1, 5)) == [Suspicion((2,), ("a",))]
    assert b.committed((1, 5)) == b.committed((1, 4)) == []


@given(st.dictionaries(st.integers(0, 6), st.dictionaries(st.sampled_from("abc"), st.integers(0, 2)), max_size=7))
def test_equal_bytes_are_never_suspected_and_a_majority_is_never_accused(said):
    for s in compare(said):
        for key in s.tensors:
            by_rank = {r: h[key] for r, h in said.items() if key in h}
            assert len({*by_rank.values()}) > 1
            right = [r for r in by_rank if r not in s.ranks]
            if s.undecided:
                assert not right
            else:
                assert len({by_rank[r] for r in right}) == 1
                assert all(sum(v == by_rank[r] for v in by_rank.values()) < len(right) for r in s.ranks)
