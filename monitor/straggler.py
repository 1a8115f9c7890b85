"""Who holds the others up, by how much, and with what. Pure; vectorised over ranks; constant memory.

    values of a step ---> excess over role peers, by part (compute, data, gc, checkpoint, processor) ---> minus what was so from the start ---> windows of 10 to 80 steps

Role peers are ranks whose step is the same sequence of operations (`program`), or else the same groups; a role of fewer than 3 is compared with its own past, and
with what the whole job did meanwhile. On a device the host's times say little: there the straggler is who stands least in collectives, and the same windows are
filled with (the others' time in collectives) - (its own).

A rank is found if it exceeds its past in 8 of the last 10 steps and their middle (the mean, steps far from the median clipped) is over max(5 % of a step, 5 standard
errors); or if the mean of the last 20, 40 or 80 steps is over max(2 %, 4.5 standard errors), for as long as 14 steps more: in all that it does, or in its computing
alone, which is quieter where ranks contend for processors (what each waited for one, the end of its step says exactly). Standard errors are learned from blocks of 10
steps, so that noise with a memory counts as what it is, and so that a rank that has become slow does not hide in it: those of means from how far a block lies from the
block before, those of middles from the scatter within blocks, and from blocks that lie behind. What was so from the start is the baseline, the job's own unevenness;
where it is large, `lasting.py` says so.

The baseline is the mean of what lies behind: the first half of what was seen, later everything older than 100 steps, never steps in which the rank was suspected.

Sources: monitoring.md 3(b) (rule, role peers, run_delay), 4.5.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ckptd.monitor import join
from ckptd.monitor.join import Together, known, median
from ckptd.monitor.middles import BLOCK, MEDIAN_OF_SQUARE, SPREAD, Middles
from ckptd.monitor.report import Evidence, Finding
from ckptd.monitor.settings import Settings

Array = np.ndarray[Any, Any]

PARTS = ("compute", "data", "gc", "checkpoint", "processor")
COMPUTE, DATA, GC, CHECKPOINT, PROCESSOR = range(len(PARTS))
KINDS = ("compute-slow", "input-stall", "gc-pause", "checkpoint-stall", "cpu-contention")
CAUSES = (
    "computes longer than those that do the same", "waits for its data", "stands in garbage collection", "stands in saving", "waits for a processor",
)  # fmt: skip
WINDOWS = (10, 20, 40, 80)
STEADY = 8
"""Of the steps of the short window: so many lie beyond half of its bound."""
KEPT = 128
"""Steps in memory: the longest window, and what the baseline has not taken yet."""
LAG = 100
TOGETHER_MAX = 24
"""So many steps may come at once: KEPT less LAG, and a few."""
SHARE = 0.5
"""Of a rank's excess: the part that is its cause."""
FELT = 0.5
"""Of the smallest cost that is named: who computes longer, and waits for a processor so much less that it costs less than this, holds nobody up."""
BESIDE = 0.4
"""A rank whose excess is less than this part of the largest one is not named beside it: disturbed, not disturbing."""
ROLE_MIN = 3
CLIP = 0.15
AGAIN = 14
"""What a long window shows is believed if it still shows it with so many new steps in it."""
HOLDS = 0.8
"""Of its bound: early in a job, while noise is known from a few blocks and bounds are wide, who was over it is still found so far. In a long job noise does this, too."""
FAR = 2.5
"""Standard deviations: what lies farther from the block before is no noise, but something that began."""
NOISIER = 9.0
"""No rank's variance counts as more than so many times what is usual among all: else a fault could hide in what it adds to it."""
RUN = 4
"""Steps in a row that make an episode; EPISODES of them, of one rank, make it intermittent."""
EPISODES = 3
FORGET = 1.0 - 1.0 / 200.0
"""What a step leaves of the episodes before it."""
EARLY = 400
"""Steps until a baseline is known well enough to tell noise with a long memory from what it has not learned."""


def own_parts(values: Array) -> Array:
    """K x PARTS x R, microseconds, of what the host did itself."""
    named = values[:, [join.DATA, join.GC, join.CHECKPOINT]]
    rest = values[:, join.SELF] - named.sum(axis=1) - values[:, join.EVAL] - values[:, join.COMPILE]
    delay = np.minimum(values[:, join.DELAY], np.maximum(rest, 0.0))
    compute = np.maximum(rest - delay, 0.0)
    return np.concatenate([compute[:, None], named, delay[:, None]], axis=1)


@dataclass(frozen=True, slots=True)
class Late:
    """A rank that is found, or (`half`) that was and has not recovered."""

    rank: int
    finding: Finding
    half: bool


class Stragglers:
    """Of one attempt."""

    def __init__(self, world_size: int, settings: Settings) -> None:
        r = world_size
        self.size, self.settings = r, settings
        self.excess = np.zeros((KEPT, len(PARTS), r), np.float32)
        """By step, part and rank: microseconds over the peers, baseline taken off."""
        self.total = np.zeros((KEPT, r), np.float32)
        self.raw = np.zeros((KEPT, len(PARTS), r), np.float32)
        """The same, baseline included: what the baseline learns from. Compute: part of the peers' time."""
        self.good = np.zeros((KEPT, r), bool)
        self.walls = np.zeros((KEPT, r), np.float32)
        self.steps = np.zeros(KEPT, np.int64)
        self.count = 0
        """Steps in the windows since the beginning."""
        self.learned = 0
        self.base = np.zeros((len(PARTS), r))
        self.base_n = np.zeros(r)
        self.block_var = np.zeros((2, r))
        """By series (all of a rank's excess; its compute alone) and rank: of means of 10 steps."""
        self.blocks = 0
        self.step_var = np.zeros((2, r))
        self.middles = Middles(r), Middles(r)
        """By series."""
        self.wide_var = np.zeros(2)
        """Of means of 40 steps, all ranks pooled: noise with a long memory."""
        self.wall_us = 0.0
        self.device = False
        self.flagged = np.zeros(r, bool)
        self.found_at = np.zeros(r, np.int64)
        self.level = np.zeros(r)
        """What a rank that was found cost then, as part of a step."""
        self.since = np.zeros(r, np.int64)
        self.runs = np.zeros(r, np.int32)
        self.episodes = np.zeros(r)
        self.own = np.zeros(r)
        """Compute of ranks without role peers: their own usual time."""
        self._last = np.zeros((2, 2, r))
        """Means of the last 10 and of the last 40 steps, by series and rank."""
        self._recent: Array | None = None
        """The longest window, clipped; None: not since the last step."""
        self._walls: list[float] = []
        self._first: list[Array] = []

    def forget(self) -> None:
        """Begin anew: the roles are others now."""
        self.__init__(self.size, self.settings)  # type: ignore[misc]

    # --- taking a step ---

    def add(self, t: Together, roles: list[Array]) -> None:
        """Steps that are no phases. `roles`: ranks that do the same, each rank in one of them."""
        for piece in t.pieces(self.settings.learn_steps - self.count):
            self._add(piece, roles)

    def _add(self, t: Together, roles: list[Array]) -> None:
        self._walls = [*self._walls, *t.wall_us.tolist()][-32:]
        self.wall_us = float(median(np.array(self._walls)))
        parts = own_parts(t.values)
        raw, scale = self._over_peers(parts, roles, t.values)
        for compute in () if self.own.all() else parts[:, COMPUTE]:
            self._usual(compute)
        k = np.arange(self.count, self.count + len(t)) % KEPT
        good = t.present & ~np.isnan(raw[:, COMPUTE])
        raw = known(raw)
        self.raw[k] = raw
        over = raw - self.base
        over[:, COMPUTE] *= scale
        self.excess[k] = np.where(good[:, None], over, 0.0)
        self.total[k] = self.excess[k].sum(axis=1)
        self.good[k] = good
        self.steps[k] = t.steps
        self.walls[k] = known(t.values[:, join.WALL])
        before = self.count
        self.count += len(t)
        self._recent = None
        self._learn(before)
        self._runs(k)

    def _usual(self, compute: Array) -> None:
        """What ranks without peers are compared with."""
        least = self.settings.learn_steps
        self._first = [*self._first, compute][-4 * least :]
        rows = np.array(self._first)
        fresh = (self.own == 0.0) & ((rows > 0.0).sum(axis=0) >= least)
        if fresh.any():
            self.own[fresh] = median(rows[:, fresh], axis=0)
        if self.own.all():
            self._first = []

    def _over_peers(self, parts: Array, roles: list[Array], v: Array) -> tuple[Array, Array]:
        """(raw excess, K x PARTS x R: of compute as part of the peers' own, of the other parts in microseconds; microseconds per unit of raw compute excess, K x R)."""
        raw = np.full_like(parts, np.nan)
        device = v[:, join.DEVICE]
        if self.count < self.settings.learn_steps:
            self.device = bool(median(device.ravel()) > 0)
        scale = np.ones(device.shape) if self.device else np.zeros(device.shape)
        everybody, common = None, np.ones((len(v), 1))
        for ranks in roles:
            mine = parts[:, :, ranks]
            alone = len(ranks) < ROLE_MIN
            if alone and everybody is None:
                everybody, common = median(parts)[..., None], self._common(parts[:, COMPUTE])
            center = everybody if alone and everybody is not None else median(mine)[..., None]
            raw[:, 1:, ranks] = mine[:, 1:] - center[:, 1:]
            if self.device:
                continue
            usual = self.own[ranks] * common if alone else center[:, COMPUTE]
            scale[:, ranks] = usual
            raw[:, COMPUTE, ranks] = np.where(usual > 0.0, mine[:, COMPUTE] / np.maximum(usual, 1.0) - 1.0, 0.0 * mine[:, COMPUTE])
        if self.device:
            raw[:, COMPUTE] = self._by_device(device, roles) - np.maximum(known(raw[:, 1:]), 0.0).sum(axis=1)
        return raw, known(scale)

    def _by_device(self, device: Array, roles: list[Array]) -> Array:
        """Who stands least in device collectives is late: microseconds less than its peers, as part of a step."""
        late = np.full(device.shape, np.nan, np.float32)
        everybody = median(device)[:, None]
        for ranks in roles:
            center = everybody if len(ranks) < ROLE_MIN else median(device[:, ranks])[:, None]
            late[:, ranks] = center - device[:, ranks]
        return late

    def _common(self, compute: Array) -> Array:
        """How much longer all ranks computed in each step than they usually do."""
        known = self.own > 0.0
        return np.asarray(median(compute[:, known] / self.own[known])[:, None]) if known.any() else np.ones((len(compute), 1))

    # --- learning what is usual ---

    def _learn(self, before: int) -> None:
        """Let the baseline follow, at a distance; and noise, in blocks of 10 steps. `before`: the count before the newest steps."""
        s = self.settings
        n = self.count
        if n <= s.learn_steps:
            self._relearn(n)
            return
        until = max(s.learn_steps, n // 2 if n < 2 * LAG else n - LAG)
        if until > self.learned:
            at = np.arange(self.learned, until) % KEPT
            take = self.good[at] & ~self.flagged
            self.base_n += take.sum(axis=0)
            self.base += (take[:, None] * (self._clipped_raw(at) - self.base)).sum(axis=0) / np.clip(self.base_n, 1.0, 1000.0)
            self.learned = until
        for end in range(before // BLOCK * BLOCK + BLOCK, n + 1, BLOCK):
            self._noise(end)

    def _clipped_raw(self, at: Array) -> Array:
        """Steps as the baseline sees them: a spike moves it no more than a bound."""
        unit = 1.0 if not self.device else self.wall_us
        bound = np.full(len(PARTS), CLIP * self.wall_us)
        bound[COMPUTE] = CLIP * unit
        wide = 4.0 * np.sqrt(self.step_var[0]) * self.wall_us
        limit = np.maximum(bound[:, None], np.where(np.arange(len(PARTS))[:, None] == COMPUTE, wide / (1.0 if self.device else max(self.wall_us, 1.0)), wide))
        return np.asarray(np.clip(self.raw[at], self.base - limit, self.base + limit))

    def _relearn(self, n: int) -> None:
        """While there is little: the mean of all of it, spikes clipped as the windows clip them."""
        rows = self.raw[:n]
        middle = median(rows, axis=0)
        bound = np.full(len(PARTS), CLIP * self.wall_us)[:, None]
        bound[COMPUTE] = CLIP * (self.wall_us if self.device else 1.0)
        self.base = np.clip(rows, middle - bound, middle + bound).mean(axis=0).astype(float)
        self.base_n[:] = n
        self.learned = n
        over = rows - self.base
        over[:, COMPUTE] *= 1.0 if self.device else self.wall_us
        self.excess[:n] = over
        self.total[:n] = over.sum(axis=1)
        if n >= 5:
            spread = 1.4826 * median(np.abs(np.stack([self.total[:n], self.excess[:n, COMPUTE]])), axis=1) / max(self.wall_us, 1.0)
            self.step_var = np.maximum(spread, median(spread, axis=1)[:, None]) ** 2
            self.block_var = self.step_var / 10.0
            for middles, rows, var in zip(self.middles, (self.total, self.excess[:, COMPUTE]), self.step_var, strict=True):
                middles.begin(rows[:n] / max(self.wall_us, 1.0), var.copy())

    def _noise(self, count: int) -> None:
        """One more block of 10, of so many steps. How far its mean lies from the last one's is a sample of the variance of such means: a rank that has become slow changes
        once, and does not hide in it."""
        rows = self._clipped(BLOCK, count)
        means = rows.mean(axis=1)
        self.blocks += 1
        change = (means - self._last[0]) / np.sqrt(2.0)
        usual = np.abs(change) < FAR * np.sqrt(np.maximum(self.block_var, self.step_var / 10.0)) + 1e-9
        weight = np.where(self.flagged | ~usual, 0.02 * usual, 1.0 / min(self.blocks + 2.0, 50.0))
        if self.blocks > 1:
            self.block_var += weight * (change**2 - self.block_var)
        self._last[0] = means
        self.step_var += weight * (rows.var(axis=1) - self.step_var)
        for middles, blocks in zip(self.middles, self._clipped(BLOCK * min(count // BLOCK, SPREAD), count), strict=True):
            middles.add(blocks, count, self.learned, self.flagged)
        if count % 40 == 0 and count >= 80:
            means = self._clipped(40, count).mean(axis=1)
            known = count > EARLY  # before, what the baseline does not know yet would count as noise
            now = median(means**2 if known else (means - self._last[1]) ** 2 / 2.0, axis=1) / MEDIAN_OF_SQUARE
            self._last[1] = means
            if count >= 120:
                self.wide_var += (now - self.wide_var) / min(count / 40.0 - 2.0, 20.0)
        self._recent = None  # it was clipped by what noise was known before

    def _clipped(self, w: int, count: int | None = None) -> Array:
        """Series x the last w steps (of so many) x ranks, parts of a step, spikes clipped."""
        back = 0 if count is None else self.count - count
        if self._recent is None:
            wide = np.maximum(CLIP, 4.0 * np.sqrt(self.step_var))[:, None]
            self._recent = np.clip(self._series(min(self.count, WINDOWS[-1] + back)), -wide, wide)
        end = self._recent.shape[1] - back
        return np.asarray(self._recent[:, max(0, end - w) : end])

    def _runs(self, at: Array) -> None:
        """Steps in a row in which a rank was far out: episodes of an intermittent fault."""
        out = self.total[at] > np.maximum(2.0 * self.settings.slow, 4.0 * np.sqrt(self.step_var[0])) * self.wall_us
        if not out.any() and not self.runs.any():
            self.episodes *= FORGET ** len(at)
            return
        for far in out:
            ended = ~far & (self.runs >= RUN) & (self.runs < 10 * RUN)
            self.runs = np.where(far, self.runs + 1, 0).astype(np.int32)
            self.episodes = self.episodes * FORGET + ended

    # --- looking ---

    def standard_error(self, n: int) -> Array:
        """Of the mean of n steps against the baseline, as part of a step; by series and rank."""
        return np.asarray(self._standard_errors([n])[0])

    def _standard_errors(self, windows: Sequence[int]) -> Array:
        """The same, by window, series and rank."""
        var = np.maximum(self.step_var, 10.0 * self.block_var)
        var = np.minimum(var, NOISIER * median(var, axis=1)[:, None])
        past = np.maximum(self.base_n, 1.0)
        base = np.maximum(var / past, self.wide_var[:, None] * np.minimum(1.0, 80.0 / past))
        means = [np.maximum(var / n, self.wide_var[:, None] if n >= 40 else 0.0) for n in windows]
        return np.asarray(np.sqrt(np.array(means) + base))

    def look(self) -> list[Late]:
        """Ranks that are found now, and ranks that were and have not recovered."""
        n = self.count
        if n < self.settings.learn_steps + 8:
            return []
        if self._quiet(n):
            return []
        over, window, short = self._levels(n)
        found = over >= 1.0
        mean20 = self._mean(20).max(axis=0)
        holds = self.flagged & (mean20 >= 0.5 * self.level)
        found &= self._beside(found | holds)
        fresh = found & ~self.flagged
        for rank in np.flatnonzero(fresh):
            found[rank] = self._began(int(rank), int(window[rank]))
        fresh &= found
        self.flagged = found | holds
        if not self.flagged.any():
            return []
        self.found_at = np.where(fresh, n, self.found_at)
        early = ~short & (n - self.found_at < AGAIN)
        whole = (found | (holds & (over >= HOLDS) & (n <= EARLY))) & ~early
        return [self._late(int(r), int(window[r]), half=not whole[r], fresh=bool(fresh[r])) for r in np.flatnonzero(self.flagged)]

    def _quiet(self, n: int) -> bool:
        """Whether nobody can be over a bound, whatever the noise is: so it mostly is, and is seen at little cost."""
        if self.flagged.any() or self.runs.any():
            return False
        if ((self._last_ten() > 0.5 * self.settings.slow).sum(axis=1) >= STEADY).any():
            return False
        return all(float(self._mean(w).max()) < self.settings.slow_long for w in self._windows(n))

    def _last_ten(self) -> Array:
        """Series x 10 steps x ranks, parts of a step, over the short window's baselines."""
        return self._series(10) - np.stack([m.base for m in self.middles])[:, None]

    def _series(self, w: int) -> Array:
        """Series x the last w steps x ranks, parts of a step."""
        at = np.arange(self.count - w, self.count) % KEPT
        return np.stack([self.total[at], self.excess[at, COMPUTE]]) / max(self.wall_us, 1.0)

    def _windows(self, n: int) -> list[int]:
        """The long windows of which there are enough steps."""
        return [w for w in WINDOWS[1:] if n >= w + self.settings.learn_steps + 5]

    def _levels(self, n: int) -> tuple[Array, Array, Array]:
        """(largest ratio to its threshold over the windows, which window, whether the short one shows it by itself) of each rank."""
        s = self.settings
        enough = self.good[np.arange(n - 10, n) % KEPT].sum(axis=0) >= 8
        last = self._last_ten()
        middle = np.stack([m.of(rows) for m, rows in zip(self.middles, last, strict=True)])
        among = 1.4826 * median(np.abs(middle - median(middle)[:, None]))[:, None] if self.size >= 8 else 0.0
        bound = np.maximum(s.slow, s.sigma_short * np.maximum(np.stack([m.error() for m in self.middles]), among))
        steady = (last > 0.5 * bound[:, None]).sum(axis=1) >= STEADY
        best = np.where(steady & enough & (middle[0] > FELT * s.slow), middle / bound, 0.0).max(axis=0)
        window, short = np.full(self.size, 10), best >= 1.0
        if windows := self._windows(n):
            means = np.stack([self._mean(w) for w in windows])
            spread = 1.4826 * median(np.abs(means - median(means)[..., None]))[..., None] if self.size >= 8 else 0.0
            limits = np.maximum(np.maximum(s.slow_long, s.sigma_long * self._standard_errors(windows)), 4.5 * spread)
            limits[0] *= 1.15  # the shortest of them is looked at most often, in proportion to its length
            good = self.good[np.arange(n - windows[-1], n) % KEPT]
            ratios = np.where(means[:, :1] > FELT * s.slow_long, means / limits, 0.0).max(axis=1)
            for w, its in zip(windows, ratios, strict=True):
                ratio = np.where(good[-w:].sum(axis=0) >= 0.8 * w, its, 0.0)
                window = np.where(ratio > best, w, window)
                best = np.maximum(best, ratio)
        often = np.where(self.episodes >= EPISODES - 0.6, self.episodes / (EPISODES - 0.6), 0.0)
        again = (often > 3.0 * median(self.episodes)) & (self.runs >= RUN)
        best = np.where(again, np.maximum(best, often), best)
        return best, window, short | (again & (often >= 1.0))

    def _mean(self, w: int) -> Array:
        """Mean of the last w steps, spikes clipped; by series and rank, parts of a step."""
        return np.asarray(self._clipped(w).mean(axis=1))

    def _beside(self, found: Array) -> Array:
        """Who is large enough beside the largest."""
        if not found.any():
            return found
        mean = self._mean(10).max(axis=0)
        return np.asarray(mean >= BESIDE * float(mean[found].max()))

    def _late(self, rank: int, window: int, *, half: bool, fresh: bool) -> Late:
        back = min(window, max(3, int(np.count_nonzero(self.steps[: min(self.count, KEPT)] >= self.since[rank]))))
        at = np.arange(self.count - back, self.count) % KEPT
        parts = self.excess[at, :, rank].mean(axis=0)
        cost = float(median(self.total[at, rank]) if back <= 10 else self._clipped(back)[0, :, rank].mean() * self.wall_us) / self.wall_us
        if fresh:
            clipped = float(self._mean(10)[:, rank].max())
            self.level[rank] = min(cost, max(clipped, 0.5 * self.settings.slow_long))
        positive = np.maximum(parts, 0.0)
        which = int(np.argmax(positive))
        evidence = [
            Evidence(signal="excess over its peers", value=round(cost * self.wall_us), unit="us", baseline=round(self.wall_us)),
            *[Evidence(signal=f"of it {name}", value=round(float(p)), unit="us") for name, p in zip(PARTS, parts, strict=True) if abs(p) > 0.1 * max(positive.sum(), 1)],
            Evidence(signal="standard error", value=round(float(self.standard_error(window)[0, rank]) * self.wall_us), unit="us"),
            Evidence(signal="steps looked at", value=float(window)),
        ]
        step = int(self.steps[(self.count - 1) % KEPT])
        finding = Finding(
            kind=KINDS[which], ranks=(rank,), step=step, since_step=int(self.since[rank]), strength=min(1.0, max(cost, 0.0) / self.settings.slow), cause=CAUSES[which],
            slowdown=max(cost, 0.0), evidence=tuple(evidence),
        )  # fmt: skip
        return Late(rank, finding, half)

    def _began(self, rank: int, window: int) -> bool:
        """Whether there was a time before it: what goes back to the first steps is how the job is."""
        at = np.arange(self.count - window, self.count) % KEPT
        self.since[rank] = self._since(rank, float(self.total[at, rank].mean()) / self.wall_us)
        return self.count > KEPT or bool(self.since[rank] > self.steps[min(self.settings.learn_steps, self.count) - 1])

    def _since(self, rank: int, cost: float) -> int:
        """The first of the steps that went on without a break until now: where a step lies nearer to what it cost than to nothing."""
        back = min(self.count, KEPT)
        at = np.arange(self.count - back, self.count) % KEPT
        score = np.cumsum(self.total[at, rank][::-1] / self.wall_us - cost / 2)
        first = int(np.argmax(score))
        return int(self.steps[at[back - 1 - first]])

    def computing(self, rank: int) -> Array:
        """A rank's computing alone, over its peers', as part of a step: of all steps in memory, oldest first."""
        at = np.arange(self.count - min(self.count, KEPT), self.count) % KEPT
        return np.asarray(self.excess[at, COMPUTE, rank] / max(self.wall_us, 1.0))

    # --- for people ---

    def lateness(self, n: int) -> Array:
        """n x R: excess as part of a step, of the last n steps, oldest first."""
        n = min(n, self.count, KEPT)
        return np.asarray(self.total[np.arange(self.count - n, self.count) % KEPT] / max(self.wall_us, 1.0))
