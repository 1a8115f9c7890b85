"""Steps that come together: taken as those that come one by one, looked at once, and what is odd among the first of them."""

from __future__ import annotations

import numpy as np
import pytest

from ckptd.monitor.hang import Patience
from ckptd.monitor.join import Join, together
from ckptd.monitor.report import Finding
from ckptd.monitor.settings import Settings
from ckptd.monitor.standing import Roll
from ckptd.monitor.straggler import Stragglers
from ckptd.monitor.verdict import Seen, Verdicts
from ckptd.monitor.watch import Watch
from tests.monitor.summaries import MS, joined, noisy, summary


def eventful(seed, steps, size):
    """Steps of a job in which much happens: (join, its steps, which faults there are, the step after which they are there)."""
    rng = np.random.default_rng(seed)
    kinds = dict(zip(("slow", "spikes", "saves", "evaluations", "transfers"), (rng.random(5) < 0.6).tolist(), strict=True))
    late, programs = int(rng.integers(40, steps)), 1 + (int(rng.integers(2)) * np.arange(size)) // 2

    def of(r, step):
        own = 75 * MS + int(2 * MS * rng.normal())
        own += 9 * MS if kinds["slow"] and r == 1 and step > late else 0
        own += 60 * MS if kinds["spikes"] and r == 2 and step % 30 < 5 else 0
        part = {"checkpoint_us": 40 * MS * (kinds["saves"] and step % 25 == 0), "eval_us": 50 * MS * (kinds["evaluations"] and step % 40 == 0)}
        inside, lost = 20 * MS * (3 if kinds["transfers"] and step > late else 1), int(rng.random() < 0.01)
        return summary(
            r, step, wall=100 * MS + part["eval_us"], own=own + sum(part.values()), seq=4 * step, inside=inside, program=0 if lost else int(programs[r]), lost=lost, **part,
        )  # fmt: skip

    return *joined(steps, size, of), kinds, late


def watched_in(batches, size, table):
    """The Watch after batches of steps; when what was first seen; the windows, in pairs of steps."""
    settings = Settings()
    watch = Watch(size, settings, Roll(size, 1, settings), Patience(settings))
    watch.join = table
    found, pairs = {}, 0
    for steps in batches:
        for shown, new in watch.take(steps):
            pairs += new
            for x in shown:
                found.setdefault(x.key, steps[-1].step)
    return watch, found, pairs


@pytest.mark.parametrize("seed", range(30))
def test_steps_that_come_together_are_taken_as_those_that_come_one_by_one(seed):
    """Baselines, noise and windows are nearly the same, and who is found is; a rank with spikes is left out, whose baseline hangs on when it was looked at."""
    rng, size = np.random.default_rng(seed), int(np.random.default_rng(seed).integers(2, 9))
    table, steps, kinds, late = eventful(seed, 160, size)
    cuts = np.cumsum(rng.integers(1, 30, 160))
    one, alone, _ = watched_in([[j] for j in steps], size, table)
    many, together_, pairs = watched_in([steps[a:b] for a, b in zip([0, *cuts], cuts, strict=False) if steps[a:b]], size, table)
    a, b = one.stragglers, many.stragglers
    print(f"seed {seed}: {size} ranks, {kinds} from step {late}; found one by one {alone}, together {together_}")
    assert (a.count, a.learned, a.blocks, one.steps_seen, one.patience.steps) == (b.count, b.learned, b.blocks, many.steps_seen, many.patience.steps)
    assert 2 * pairs + many.since_look == b.count
    np.testing.assert_array_equal(a.steps, b.steps)
    assert one.patience.pause_s() == many.patience.pause_s()
    np.testing.assert_allclose(one.transfers.base, many.transfers.base, rtol=0.05)
    ranks = np.array([r for r in range(size) if not kinds["spikes"] or r != 2])
    np.testing.assert_allclose((a.total / a.wall_us)[:, ranks], (b.total / b.wall_us)[:, ranks], atol=0.02)
    np.testing.assert_allclose(a.standard_error(20)[:, ranks], b.standard_error(20)[:, ranks], rtol=0.4, atol=2e-3)
    wanted = {("slow", 1): kinds["slow"], ("slow", 2): kinds["spikes"], ("comm",): kinds["transfers"]}
    for found in (alone, together_):
        assert all(wanted.get(key, key == ("global",)) for key in found)
    for key in (("slow", 1), ("comm",)):
        if wanted[key] and late <= 110:
            assert key in alone and together_[key] <= alone[key] + 32, key


@pytest.mark.parametrize("seed", range(12))
def test_who_is_quiet_at_first_glance_is_over_no_bound(seed):
    """The look that costs little never passes over what the whole one would have seen."""
    size = 3 + seed % 6
    _, steps, _, _ = eventful(100 + seed, 160, size)
    s, quiet, loud = Stragglers(size, Settings()), 0, 0
    for j in steps:
        s.add(together([j]), [np.arange(size)])
        if s.count >= 20:
            over = float(s._levels(s.count)[0].max())
            glance = s._quiet(s.count)
            assert not (glance and over >= 1.0)
            quiet, loud = quiet + glance, loud + (over >= 1.0)
        s.look()
    print(f"seed {seed}: {quiet} of {s.count - 19} looks were done at first glance, in {loud} somebody was over a bound")
    assert quiet > 0


def test_a_look_confirms_for_as_many_windows_as_it_has_new_steps_for():
    """Steps that come by the dozen are looked at once: a rank that still is slow after four new ones is confirmed, as by two looks."""
    v = Verdicts("job", 1, Settings(), lambda r: (r, f"host{r}"))
    slow = Seen(("slow", 3), Finding("compute-slow", (3,), 10, 10, 1.0, slowdown=0.2))
    assert [t.state for t in v.window("steps", [slow], 0.0, 0.0, windows=5)] == ["suspected"]
    assert [t.state for t in v.window("steps", [slow], 0.5, 0.0, windows=1)] == []
    assert [t.state for t in v.window("steps", [slow], 1.0, 0.0, windows=2)] == ["confirmed"]
    v.window("steps", [], 1.5, 0.0, windows=9)
    assert v.all()[0].state == "confirmed", "one look without it does not clear it, however many steps it had"


@pytest.mark.parametrize("together_", [1, 24])
def test_a_save_among_the_first_steps_that_come_is_a_phase(together_):
    """Steps of 20 ms, the first 24 told at once, before anybody knew how short they are: a save in them is no slow step."""
    settings = Settings()
    watch = Watch(4, settings, Roll(4, 1, settings), Patience(settings))
    part = {r: 100 * MS * (r == 0) for r in range(4)}
    steps = joined(24, 4, lambda r, s: summary(r, s, wall=20 * MS + part[0] * (s == 12), own=15 * MS + part[r] * (s == 12), checkpoint_us=part[r] * (s == 12)))[1]
    for i in range(0, 24, together_):
        list(watch.take(steps[i : i + together_]))
    assert watch.steps_seen == 24
    assert len(watch._saves) == 1
    assert 12 not in watch.stragglers.steps[: watch.stragglers.count]


def test_a_rank_whose_first_steps_were_lost_is_compared_with_its_later_ones():
    """Two ranks: nobody to compare them with but their own past, which for one of them begins 14 steps later."""
    factor = noisy(4, 2, 160, 0.005)
    table, s, found = Join(2), Stragglers(2, Settings()), {}
    for step in range(1, 161):
        own = [int(80 * MS * factor[step, r]) + (30 * MS if r == 1 and step > 100 else 0) for r in range(2)]
        table.add([summary(r, step, wall=own[r] + 20 * MS, own=own[r], lost=int(r == 1 and step < 15)) for r in range(2)], 0.0)
        for j in table.ready(0.0):
            s.add(together([j]), [np.arange(2)])
        for x in s.look():
            if not x.half:
                found.setdefault(x.rank, step)
    assert found.keys() == {1} and 101 <= found[1] <= 125
