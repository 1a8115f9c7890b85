"""Retention: which checkpoints of a job may go. Pure; `ckptd.storage.checkpoint.apply_retention` carries it out.

A checkpoint stays if any rule keeps it: it is among the newest, its step is a multiple of `every`, or it is younger than
`max_age_s`. Newest means highest (attempt, step): a job that went back to step 100 in attempt 3 continues from attempt 3.

Invariants
- the newest checkpoint given is never dropped, whatever the policy and the clock say: callers give complete checkpoints only;
- the newest of those that the caller calls `verified` is never dropped either;
- the clock decides only how long more than the promised ones stay.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from math import isfinite

from ckptd.errors import BadArgument

__all__ = ["Retention", "to_drop"]


@dataclass(frozen=True, slots=True)
class Retention:
    """What to keep. `newest`: how many, at least 1. `every`: steps that are multiples stay for ever; 0: none do.

    `max_age_s`: checkpoints beyond the newest stay until they are this old; 0: they go at once.
    """

    newest: int = 2
    every: int = 0
    max_age_s: float = 0

    def __post_init__(self) -> None:
        if self.newest < 1 or self.every < 0 or not (isfinite(self.max_age_s) and self.max_age_s >= 0):
            msg = f"impossible retention: newest {self.newest}, every {self.every}, max_age_s {self.max_age_s}"
            raise BadArgument(msg, remedy="keep at least the newest one; 0 switches `every` and `max_age_s` off")


def to_drop(
    found: Iterable[tuple[int, int, float]],
    policy: Retention,
    now_unix_s: float,
    verified: Collection[tuple[int, int]] = (),
) -> list[tuple[int, int]]:
    """The (attempt, step) to delete, oldest first. `found`: (attempt, step, created_unix_s) of the job's complete checkpoints.

    `verified`: (attempt, step) whose every byte was read and found right.
    """
    # Of one step with two creation times, the later counts.
    created = {(attempt, step): created_s for attempt, step, created_s in sorted(found)}
    newest_first = sorted(created, reverse=True)
    kept = set(newest_first[: policy.newest])
    kept.update([key for key in newest_first if key in verified][:1])
    if policy.every:
        kept.update(key for key in newest_first if key[1] % policy.every == 0)
    if policy.max_age_s:
        kept.update(key for key in newest_first if now_unix_s - created[key] < policy.max_age_s)
    return sorted(set(created) - kept)
