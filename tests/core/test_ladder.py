"""The ladder: order, completeness, failed steps; attempts before steps."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from ckptd.core.ladder import Durable, Holding, Rung, lost, rungs


def held(attempt, step, ranks, world=2, state="sealed"):
    return Holding(attempt, step, world, tuple(ranks), state)


def keys(found):
    return [(r.attempt, r.step, r.source) for r in found]


def test_attempts_come_before_steps_and_memory_before_storage():
    found = rungs(
        {0: [held(2, 5, [0]), held(1, 90, [0])], 1: [held(2, 5, [1]), held(1, 90, [1])]},
        [Durable(2, 5, 2, "j/step-5"), Durable(1, 100, 2, "j/step-100"), Durable(3, 1, 2, "j/step-1")],
    )
    assert keys(found) == [(3, 1, "j/step-1"), (2, 5, "memory"), (2, 5, "j/step-5"), (1, 100, "j/step-100"), (1, 90, "memory")]
    assert found[1].nodes == {0: 0, 1: 1}
    assert found[1].key == (2, 5)


def test_a_step_without_all_images_is_not_offered_but_named():
    nodes = {0: [held(1, 7, [0], world=4), held(1, 6, [0, 1], world=4)], 1: [held(1, 7, [3], world=4), held(1, 6, [2, 3], world=4)]}
    assert keys(rungs(nodes, [])) == [(1, 6, "memory")]
    assert lost(nodes) == [], "it was never promised to anybody"
    nodes[1][0] = held(1, 7, [3], world=4, state="committed")
    assert lost(nodes) == [((1, 7), [1, 2])], "a restart was promised this one: its loss is not silent"


def test_too_many_images_are_no_complete_snapshot():
    assert rungs({0: [held(1, 1, [0, 1, 2])]}, []) == []


def test_images_of_different_worlds_do_not_complete_each_other():
    assert rungs({0: [held(1, 1, [0], world=2)], 1: [held(1, 1, [1], world=3)]}, []) == []


def test_the_lowest_node_that_holds_an_image_gives_it():
    (rung,) = rungs({1: [held(1, 1, [0, 1])], 0: [held(1, 1, [1])]}, [])
    assert rung.nodes == {0: 1, 1: 0}


def test_failed_steps_come_last_and_from_that_source_only():
    nodes = {0: [held(1, 2, [0, 1]), held(1, 1, [0, 1])]}
    durable = [Durable(1, 2, 2, "d")]
    assert keys(rungs(nodes, durable, {(1, 2, "memory")})) == [(1, 2, "d"), (1, 1, "memory"), (1, 2, "memory")]
    assert keys(rungs(nodes, durable, {(1, 2, "memory"), (1, 2, "d"), (1, 1, "other")})) == [(1, 1, "memory"), (1, 2, "memory"), (1, 2, "d")]


def test_nothing_anywhere():
    assert rungs({}, []) == []
    assert lost({}) == []
    assert Rung(1, 1, 1).source == "memory"


@given(
    st.dictionaries(
        st.integers(0, 3),
        st.lists(st.builds(held, st.integers(0, 3), st.integers(0, 5), st.sets(st.integers(0, 3)).map(sorted), st.integers(1, 4), st.just("committed")), max_size=5),
    ),
    st.lists(st.builds(Durable, st.integers(0, 3), st.integers(0, 5), st.integers(1, 4), st.sampled_from("ab")), max_size=4),
    st.sets(st.tuples(st.integers(0, 3), st.integers(0, 5), st.sampled_from(["memory", "a", "b"]))),
)
def test_any_cluster(nodes, durable, failed):
    found = rungs(nodes, durable, failed)
    bad = [(r.attempt, r.step, r.source) in failed for r in found]
    assert bad == sorted(bad), "what failed comes after everything else"
    for part in ([r for r, b in zip(found, bad, strict=True) if b is which] for which in (False, True)):
        assert [r.key for r in part] == sorted((r.key for r in part), reverse=True)
    lacking = {key for key, _ in lost(nodes)}
    for r in found:
        if not r.directory:
            assert set(r.nodes) == set(range(r.world_size))
            for rank, node in r.nodes.items():
                assert any((h.attempt, h.step, h.world_size) == (*r.key, r.world_size) and rank in h.ranks for h in nodes[node])
    offered = {r.key for r in found if not r.directory}
    whole = {(h.attempt, h.step) for hs in nodes.values() for h in hs}
    assert whole - offered <= lacking
