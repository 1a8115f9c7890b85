"""Goodput: the formulas by hand, by simulation and by what the stripes really do; and what can never get worse."""

from __future__ import annotations

import math
import random

import msgspec
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from ckptd.core import checksum, goodput
from ckptd.core.goodput import (
    Job,
    Shape,
    alone,
    daly_s,
    durable_only,
    fragment_bytes,
    losses_per_s,
    mirrors,
    outcome,
    shapes_of,
    work_share,
    young_s,
)
from ckptd.core.groups import form
from ckptd.core.stripes import Member, Stripes
from ckptd.errors import BadArgument

CASES = settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
HOUR_S, MIN_S = 3600.0, 60.0
JOB = Job(nodes=64, node_bytes=96 * 10**9, step_s=8, link_bytes_per_s=12.5e9, store_bytes_per_s=1e9, mtbf_s=6300 * HOUR_S, recovery_s=60)


def but(**changes) -> Job:
    return msgspec.structs.replace(JOB, **changes)


# --- intervals --------------------------------------------------------------------------------------------------------------


def test_youngs_interval():
    assert young_s(2, 100) == 20
    assert young_s(5 * MIN_S, 24 * HOUR_S) == pytest.approx(120 * MIN_S)


@pytest.mark.parametrize(("mtbf_s", "minutes"), [(24 * HOUR_S, 117), (6 * HOUR_S, 57), (15 * MIN_S, 9.1)])
def test_dalys_interval_as_in_his_figures_3_to_5(mtbf_s, minutes):
    assert daly_s(5 * MIN_S, mtbf_s) / MIN_S == pytest.approx(minutes, rel=0.01)


def test_dalys_interval_by_hand():
    """C = 20, M = 40: C / 2M is a quarter, its root a half."""
    assert daly_s(20, 40) == pytest.approx(40 * (1 + 1 / 6 + 1 / 36) - 20)


def test_dalys_interval_where_a_checkpoint_takes_longer_than_nodes_live():
    assert daly_s(20, 10) == 10
    assert daly_s(1e6, 10) == 10


@given(st.floats(0.1, 1e4), st.floats(10, 1e7), st.floats(0, 1e3))
@CASES
def test_dalys_interval_is_the_best(cost_s, mtbf_s, restart_s):
    assume(cost_s < mtbf_s / 10)
    best = work_share(daly_s(cost_s, mtbf_s), cost_s, restart_s, mtbf_s)
    for factor in (0.5, 0.8, 1.25, 2):
        assert work_share(factor * daly_s(cost_s, mtbf_s), cost_s, restart_s, mtbf_s) <= best


def test_work_share_by_hand():
    assert work_share(100, 0, 0, 1e12) == pytest.approx(1)
    assert work_share(100, 25, 0, 1e12) == pytest.approx(0.8)
    # work 10, checkpoint 0, restart 0, a failure every 10: M (e^1 - 1) / 10 of time per work
    assert work_share(10, 0, 0, 10) == pytest.approx(1 / (math.e - 1))
    assert work_share(10, 0, 10, 10) == pytest.approx(1 / (math.e - 1) / math.e)
    assert work_share(1e6, 0, 0, 1) == 0
    assert work_share(1, 0, 1e6, 1) == 0


def test_work_share_by_simulation():
    rng, interval_s, cost_s, restart_s, mtbf_s = random.Random(1), 60.0, 6.0, 20.0, 200.0
    now_s = 0.0
    for _ in range(20_000):
        need_s = interval_s + cost_s
        while (lived_s := rng.expovariate(1 / mtbf_s)) < need_s:
            now_s += lived_s
            need_s = restart_s + interval_s + cost_s  # a failure in the restart begins it anew
        now_s += need_s
    assert 20_000 * interval_s / now_s == pytest.approx(work_share(interval_s, cost_s, restart_s, mtbf_s), rel=0.02)


# --- losses -----------------------------------------------------------------------------------------------------------------


def test_losses_by_hand():
    p = 1 - math.exp(-5 / 100)
    assert losses_per_s(1, 0, 100, 5) == 1 / 100
    assert losses_per_s(8, 0, 100, 5) == 8 / 100
    assert losses_per_s(2, 1, 100, 5) == pytest.approx(2 / 100 * p)
    assert losses_per_s(3, 1, 100, 5) == pytest.approx(3 / 100 * (1 - (1 - p) ** 2))
    assert losses_per_s(3, 2, 100, 5) == pytest.approx(3 / 100 * p**2)
    assert losses_per_s(8, 1, 100, 0) == 0
    # A group of 8 at 6300 h, 76 s of window: 8 / M * 7 W / M, to first order.
    assert losses_per_s(8, 1, 6300 * HOUR_S, 76) == pytest.approx(56 * 76 / (6300 * HOUR_S) ** 2, rel=1e-4)


@pytest.mark.parametrize(("n", "m", "window_s"), [(4, 1, 10.0), (6, 2, 60.0)])
def test_losses_by_simulation(n, m, window_s):
    """Windows begin with a loss, and nodes that are lost are back when it ends: the formula counts windows as if they took no time of the rest."""
    rng, mtbf_s, now_s, beyond = random.Random(2), 1000.0, 0.0, 0
    for _ in range(150_000):
        now_s += rng.expovariate(n / mtbf_s) + window_s
        beyond += sum(rng.expovariate(1 / mtbf_s) < window_s for _ in range(n - 1)) >= m
    begun = 1 + n / mtbf_s * window_s
    assert beyond / now_s * begun == pytest.approx(losses_per_s(n, m, mtbf_s, window_s), rel=0.06)


@given(st.integers(2, 32), st.floats(1, 1e9), st.floats(0, 1e6))
@CASES
def test_more_parity_never_loses_more(n, mtbf_s, window_s):
    rates = [losses_per_s(n, m, mtbf_s, window_s) for m in range(min(5, n))]
    assert all(b <= a * (1 + 1e-9) for a, b in zip(rates, rates[1:]))
    assert all(0 <= r <= n / mtbf_s for r in rates)


@given(st.integers(2, 32), st.integers(1, 4), st.floats(1, 1e9), st.floats(0, 1e6), st.floats(1, 10))
@CASES
def test_longer_windows_and_worse_nodes_never_lose_less(n, m, mtbf_s, window_s, factor):
    assume(m < n)
    here = losses_per_s(n, m, mtbf_s, window_s)
    assert losses_per_s(n, m, mtbf_s, window_s * factor) >= here * (1 - 1e-9)
    assert losses_per_s(n, m, mtbf_s * factor, window_s) <= here * (1 + 1e-9)


# --- memory and network -----------------------------------------------------------------------------------------------------


def test_constants_are_those_of_the_code_that_does_it():
    from ckptd import protect, session

    assert (goodput.FRAGMENT_SLOTS, goodput.GROWTH, goodput.SLOTS) == (protect.FRAGMENT_SLOTS, protect.GROWTH, session.SLOTS_DEFAULT)


def test_fragments_by_hand():
    assert fragment_bytes(700, 8, 1) == 2 * (100 + 6)
    assert fragment_bytes(600, 8, 2) == 2 * (200 + 12)
    assert fragment_bytes(100, 2, 1) == 2 * (100 + 6)
    assert fragment_bytes(100, 1, 0) == 0


@pytest.mark.parametrize(("n", "m"), [(2, 1), (4, 1), (8, 1), (6, 2), (8, 3), (9, 4)])
def test_memory_and_network_are_those_of_the_stripes(n, m):
    blocks = 4 * (n - m)
    data_bytes = blocks * checksum.BLOCK_BYTES
    stripes = Stripes(m, tuple(Member(((rank, data_bytes),)) for rank in range(n)))
    shape = outcome(but(node_bytes=data_bytes), (Shape(n, m, 1),))
    for member in range(n):
        parts = [part for task in stripes.encode(member) for part in task.parts]
        assert all(part.member != member for part in parts), "its own blocks are in none of its rows"
        assert sum(part.bytes for part in parts) == shape.network_bytes == m * data_bytes
        parity_bytes = stripes.fragment_bytes(member)
        assert 2 * (parity_bytes + parity_bytes // 16) == fragment_bytes(data_bytes, n, m)


@given(st.integers(2, 32), st.integers(1000, 10**12), st.integers(2, 8) | st.none())
@CASES
def test_more_parity_never_takes_less(n, node_bytes, slots):
    job = but(node_bytes=node_bytes, nodes=n)
    made = [outcome(job, (Shape(n, m, 1),), slots) for m in range(1, min(5, n))]
    made.insert(0, outcome(job, alone(n), slots))
    for less, more in zip(made, made[1:]):
        assert less.memory_bytes < more.memory_bytes
        assert less.network_bytes < more.network_bytes
        assert less.protect_s < more.protect_s
        assert less.extra < more.extra
    assert all(0 <= o.goodput <= 1 and 0 <= o.loss_per_day <= 1 for o in made)


@given(st.integers(2, 31), st.integers(1, 4))
@CASES
def test_larger_groups_never_take_more_memory_and_coding_never_more_than_copies(n, m):
    assume(m < n)
    small, large = outcome(JOB, (Shape(n, m, 1),)), outcome(JOB, (Shape(n + 1, m, 1),))
    assert large.memory_bytes <= small.memory_bytes
    assert large.network_bytes == small.network_bytes
    assert small.memory_bytes <= outcome(JOB, mirrors(64, m)).memory_bytes


# --- outcomes ---------------------------------------------------------------------------------------------------------------


def test_an_outcome_by_hand():
    """Two nodes that mirror each other: 10 GB of images, 1 GB/s of link, steps of 20 s, a failure every 1000 h."""
    job = but(nodes=2, node_bytes=10 * 10**9, step_s=20, link_bytes_per_s=1e9, mtbf_s=1000 * HOUR_S, recovery_s=30)
    o = outcome(job, shapes_of(form([{}] * 2)))
    assert o.memory_bytes == 4 * 10 * 10**9 + 2 * (10 * 10**9 + 625 * 10**6)
    assert o.extra == pytest.approx(61.25 / 30 - 1)
    assert (o.network_bytes, o.protect_s, o.fits_step, o.window_s) == (10 * 10**9, 10, True, 60)
    loss_per_s = 2 / 3.6e6 * (1 - math.exp(-60 / 3.6e6))
    assert o.loss_per_day == pytest.approx(86400 * loss_per_s, rel=1e-4)
    assert o.durable_s == pytest.approx(math.sqrt(2 * 10 / loss_per_s), rel=0.01)
    # A failure in 500 h costs recovery, the protected snapshot's age, and half a step; one beyond, half of what was not persisted, and reading it back.
    near, far = (30 + 10 + 10) / (500 * HOUR_S), loss_per_s * (o.durable_s / 2 + 30 + 20)
    assert 1 - o.goodput == pytest.approx(near + far, rel=1e-3)


def test_protecting_that_takes_longer_than_a_step():
    slow = outcome(but(link_bytes_per_s=1e9), (Shape(8, 1, 8),))
    assert (slow.protect_s, slow.fits_step) == (96, False)
    # Its age, and half of the time until the next, which is no step but another 96 s.
    near = (60 + 96 + 48) * 64 / (6300 * HOUR_S)
    far = -math.log1p(-slow.loss_per_day) / 86400 * (slow.durable_s / 2 + 60 + 2 * 96)
    assert 1 - slow.goodput == pytest.approx(near + far, rel=1e-3)


def test_a_stall_costs_every_step():
    job = but(stall_s=0.08, mtbf_s=1e18)
    assert outcome(job, (Shape(8, 1, 8),)).goodput == pytest.approx(8 / 8.08)
    assert outcome(but(stall_s=0.08, mtbf_s=1e18, link_bytes_per_s=1e9), (Shape(8, 1, 8),)).goodput == pytest.approx(8 / 8.08)


def test_without_parity_every_loss_goes_back_to_the_durable_tier():
    o = outcome(JOB, alone(64))
    assert o.loss_per_day == pytest.approx(1 - math.exp(-64 * 24 / 6300))
    assert o.durable_s == durable_only(JOB).interval_s
    mtbf_s = 6300 * HOUR_S / 64
    work = o.durable_s / mtbf_s / math.expm1(o.durable_s / mtbf_s)
    assert o.goodput == pytest.approx(work * math.exp(-(60 + 96 + 96) / mtbf_s)), "recovery, reading, and what was being written when it was lost"
    assert durable_only(JOB).goodput < o.goodput < outcome(JOB, (Shape(8, 1, 8),)).goodput


def test_groups_of_several_sizes():
    """Per node it is the node that has most; what is lost adds up."""
    one, other = (Shape(2, 1, 3),), (Shape(5, 2, 2),)
    mixed = outcome(JOB, one + other)
    assert mixed.memory_bytes == outcome(JOB, one).memory_bytes > outcome(JOB, other).memory_bytes
    assert mixed.network_bytes == outcome(JOB, other).network_bytes > outcome(JOB, one).network_bytes
    loss = 3 * losses_per_s(2, 1, JOB.mtbf_s, mixed.window_s) + 2 * losses_per_s(5, 2, JOB.mtbf_s, mixed.window_s)
    assert mixed.loss_per_day == pytest.approx(86400 * loss, rel=1e-5)


def test_durable_only_by_hand():
    mtbf_s = 6300 * HOUR_S / 64
    only = durable_only(JOB)
    assert only.young_s == pytest.approx(math.sqrt(2 * 96 * mtbf_s))
    assert only.interval_s == pytest.approx(only.young_s, rel=0.02)
    # To first order: a checkpoint per interval, and per failure half an interval, the restart and reading.
    assert 1 - only.goodput == pytest.approx(96 / only.interval_s + (only.interval_s / 2 + 60 + 96) / mtbf_s, rel=0.03)


def test_copies_are_groups_that_mirror_each_other():
    assert outcome(but(nodes=2), mirrors(2, 1)) == outcome(but(nodes=2), shapes_of(form([{}] * 2)))
    assert mirrors(64, 0) == (Shape(1, 0, 64),)
    assert shapes_of(form([{}] * 20)) == (Shape(6, 1, 1), Shape(7, 1, 2))
    assert shapes_of(form([{}] * 2, parity=2)) == (Shape(2, 1, 1),)


@given(st.integers(2, 100), st.floats(HOUR_S, 1e5 * HOUR_S), st.floats(1, 1000), st.floats(1, 10), st.integers(0, 3))
@CASES
def test_worse_nodes_never_give_more(nodes, mtbf_s, step_s, factor, m):
    shapes = (Shape(m + 2, m, nodes / (m + 2)),) if m else alone(nodes)
    job = but(nodes=nodes, mtbf_s=mtbf_s, step_s=step_s)
    worse = but(nodes=nodes, mtbf_s=mtbf_s / factor, step_s=step_s)
    assert outcome(worse, shapes).goodput <= outcome(job, shapes).goodput * (1 + 1e-6)
    assert outcome(worse, shapes).loss_per_day >= outcome(job, shapes).loss_per_day * (1 - 1e-9)
    assert durable_only(worse).goodput <= durable_only(job).goodput * (1 + 1e-2), "Daly's interval is the optimum's estimate"


@pytest.mark.parametrize(
    "changes",
    [{"nodes": 0}, {"node_bytes": 0}, {"step_s": 0.0}, {"step_s": math.nan}, {"link_bytes_per_s": -1.0}, {"store_bytes_per_s": 0.0}, {"mtbf_s": math.inf}, {"recovery_s": -1.0}, {"stall_s": math.inf}],
)  # fmt: skip
def test_what_cannot_be(changes):
    with pytest.raises(BadArgument) as refused:
        Job(**msgspec.structs.asdict(JOB) | changes)
    assert refused.value.remedy


def test_copies_that_nobody_can_hold():
    with pytest.raises(BadArgument, match="4 copies"):
        mirrors(4, 4)
