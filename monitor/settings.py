"""What an engine may be told: policy, and thresholds whose defaults detect. All are bounds in the sense that a wrong one costs time or noise, never state."""

from __future__ import annotations

from dataclasses import dataclass

POLICIES = ("report", "snapshot", "restart", "evict")
"""From doing nothing to doing most: each may do what those before it may."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Of one job. Fractions are parts of a step unless said otherwise."""

    policy: str = "report"
    """The most that may follow from a verdict; one of POLICIES."""
    hang_s: float = 2.0
    """No rank is said to hang before it has stood still for this long."""
    hang_factor: float = 4.0
    """... nor before this multiple of the long pauses that the job itself makes (99th percentile; 99.9th for a rank that uses its processor)."""
    start_s: float = 300.0
    """Until the job's first steps: imports, compilation, first batches. Evidence that needs no patience (a dead rank, a mismatch, a cycle) does not wait for it."""
    phase_s: float = 120.0
    """A checkpoint, evaluation, restore or compilation may take this long until the job has shown how long its own are."""
    busy_s: float = 10.0
    """A rank that others wait for, and that uses its processor, may be at work that nobody marked."""
    silent_s: float = 3.0
    """A node that reported nothing for this long is not known any more."""
    warmup_steps: int = 3
    """Not looked at: allocators, caches and loaders settle."""
    learn_steps: int = 12
    """How many steps the first baseline is made of."""
    slow: float = 0.05
    """What a rank may cost the job in the short window (10 steps)."""
    slow_long: float = 0.02
    """... and in the long windows (20 to 80 steps)."""
    lasting: float = 0.10
    """What a rank may cost from the start, over ranks with the same program (twice that where there are only two, and for rank 0)."""
    sigma_short: float = 5.0
    """Standard errors of the short window's mean above its peers."""
    sigma_long: float = 4.5
    """... and of the long windows': they are looked at more often than they are new."""
    comm_slow: float = 0.05
    """What slower transfers may cost."""
    comm_ratio: float = 1.3
    """Transfers are slow when they take this multiple of their baseline."""
    global_slow: float = 0.10
    """What all ranks together may become slower."""
    hot: float = 1.5
    """A pair of nodes is slow if its probe takes this multiple of the others' (or of its own baseline)."""
    confirm_windows: int = 2
    """Further windows in which a finding has to hold."""
    clear_windows: int = 3
    """Windows under half the threshold that clear it."""
    cool_down_s: float = 60.0
    """What comes back within this time is the same verdict again (its flaps are counted); nor is the same rank probed again, or acted upon."""
    evict_slow: float = 0.10
    """A rank that costs less is not worth an eviction."""
    evict_after_s: float = 60.0
    """Nor one that was slow for a shorter time."""
    evictions_per_hour: int = 1
    """More are only recommended as a report."""
    restarts_max: int = 2
    """Of the same (kind, ranks, step): after so many a restart is not what helps."""
    probe_s: float = 0.2
    """How long a probe of a rank or a pair of nodes takes."""
    stacks: bool = True
    """Ask for the stacks of the guilty and one that waits."""

    def __post_init__(self) -> None:
        if self.policy not in POLICIES:
            msg = f"a policy is one of {', '.join(POLICIES)}, not {self.policy!r}"
            raise ValueError(msg)
