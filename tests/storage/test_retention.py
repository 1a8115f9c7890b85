"""Retention, by its properties."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptd.core.retention import Retention, to_drop
from ckptd.errors import BadArgument

found_lists = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 40), st.floats(0, 1000)), max_size=30)
policies = st.builds(Retention, newest=st.integers(1, 5), every=st.integers(0, 10), max_age_s=st.floats(0, 1000))


@given(found_lists, policies, st.floats(-1e9, 1e12), st.data())
def test_what_is_promised_stays(found, policy, now, data):
    keys = sorted({(a, s) for a, s, _ in found}, reverse=True)
    verified = set(data.draw(st.lists(st.sampled_from(keys), max_size=3))) if keys else set()
    dropped = to_drop(found, policy, now, verified)
    assert dropped == sorted(set(dropped))
    assert set(dropped) <= set(keys)
    assert not set(dropped) & set(keys[: policy.newest])
    if verified:
        assert max(verified) not in dropped
    if policy.every:
        assert all(step % policy.every for _, step in dropped)
    latest = {(a, s): max(c for b, t, c in found if (b, t) == (a, s)) for a, s in keys}
    if policy.max_age_s:
        assert all(now - latest[k] >= policy.max_age_s for k in dropped)


@given(found_lists, policies, st.floats(-1e9, 1e12))
def test_nothing_more_than_promised_stays(found, policy, now):
    dropped = set(to_drop(found, policy, now))
    keys = sorted({(a, s) for a, s, _ in found}, reverse=True)
    for key in keys[policy.newest :]:
        if key not in dropped:
            young = any(now - c < policy.max_age_s for a, s, c in found if (a, s) == key)
            assert (policy.every and key[1] % policy.every == 0) or (policy.max_age_s and young)


@given(found_lists, policies, st.floats(-1e9, 1e12), st.randoms())
def test_dropping_is_idempotent_and_needs_no_order(found, policy, now, random):
    dropped = to_drop(found, policy, now)
    left = [f for f in found if (f[0], f[1]) not in dropped]
    assert to_drop(left, policy, now) == []
    random.shuffle(found)
    assert to_drop(found, policy, now) == dropped


def test_an_example():
    found = [(1, 10, 0.0), (1, 20, 10.0), (1, 30, 20.0), (2, 15, 30.0), (2, 25, 40.0)]
    assert to_drop(found, Retention(newest=2), 50) == [(1, 10), (1, 20), (1, 30)]
    assert to_drop(found, Retention(newest=2, every=20), 50) == [(1, 10), (1, 30)]
    assert to_drop(found, Retention(newest=2, max_age_s=35), 50) == [(1, 10), (1, 20)]
    assert to_drop(found, Retention(newest=1), 50, verified=[(1, 20), (1, 10)]) == [(1, 10), (1, 30), (2, 15)]
    assert to_drop([], Retention(), 0) == []


@pytest.mark.parametrize("kwargs", [{"newest": 0}, {"newest": -1}, {"every": -1}, {"max_age_s": -1.0}, {"max_age_s": float("nan")}])
def test_impossible_policies(kwargs):
    with pytest.raises(BadArgument):
        Retention(**kwargs)
