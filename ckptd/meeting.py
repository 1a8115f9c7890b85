"""Meetings of a job's ranks: everybody brings something, rank 0 decides, everybody takes the decision home.

One primitive, `round`, serves attach (which daemons, which attempt, who stores what) and restore (which step, did everybody succeed). It runs over
the job's own c10d store: no new service, no collective that could interfere with training, no pickle. Every wait has a deadline and
a failure names the ranks that did not come.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, Protocol

import msgspec
import xxhash

from ckptd import errors
from ckptd.errors import CkptdError, PeerFailed, RanksMissing

Decide = Callable[[list[bytes]], list[bytes]]
"""What the ranks brought, by rank -> what each takes home. Runs on rank 0."""

_meetings: dict[str, Iterator[int]] = {}
"""Meetings held so far, by the ranks of the group: two groups of one process must not count each other's."""


class _Outcome(msgspec.Struct, array_like=True):
    """What a rank finds: a decision, or the error that deciding raised."""

    decision: bytes = b""
    error: str = ""
    message: str = ""
    remedy: str = ""


class Meeting(Protocol):
    """A place where ranks meet."""

    rank: int
    world_size: int

    def round(self, name: str, brought: bytes, decide: Decide, timeout_s: float) -> bytes:
        """All ranks call this in the same order. Raises RanksMissing, or what `decide` raised (on every rank)."""


class Alone:
    """The meeting of a job with one rank."""

    rank = 0
    world_size = 1

    def round(self, _name: str, brought: bytes, decide: Decide, _timeout_s: float) -> bytes:
        """Decide at once."""
        return decide([brought])[0]


class StoreMeeting:
    """A meeting over a c10d store."""

    def __init__(self, store: Any, rank: int, world_size: int) -> None:
        self.rank = rank
        self.world_size = world_size
        self._store = store
        self._count = itertools.count()

    def round(self, name: str, brought: bytes, decide: Decide, timeout_s: float) -> bytes:
        """See Meeting."""
        key = f"{next(self._count)}/{name}"
        self._store.set(f"{key}/in/{self.rank}", brought)
        if self.rank == 0:
            for rank, outcome in enumerate(self._decide(key, decide, timeout_s)):
                self._store.set(f"{key}/out/{rank}", msgspec.msgpack.encode(outcome))
        mine = f"{key}/out/{self.rank}"
        # Rank 0 waits for `timeout_s` and then tells what it knows: waiting a little longer than it gives the better error.
        if not self._wait(mine, timeout_s * 1.25 + 5.0):
            msg = f"{name}: rank 0 decided nothing within {timeout_s * 1.25 + 5.0:.0f} s"
            raise RanksMissing(msg)
        outcome = msgspec.msgpack.decode(self._store.get(mine), type=_Outcome)
        self._store.delete_key(mine)
        if outcome.error:
            kind = getattr(errors, outcome.error, PeerFailed)
            raise kind(outcome.message, remedy=outcome.remedy)
        return outcome.decision

    def _decide(self, key: str, decide: Decide, timeout_s: float) -> list[_Outcome]:
        try:
            brought = []
            for rank in range(self.world_size):
                if not self._wait(f"{key}/in/{rank}", timeout_s):
                    absent = [r for r in range(rank, self.world_size) if not self._store.check([f"{key}/in/{r}"])]
                    msg = f"{key}: ranks {absent} of {self.world_size} did not come within {timeout_s:.0f} s"
                    raise RanksMissing(msg, remedy="every rank of the job must call attach and restore, in the same order")
                brought.append(bytes(self._store.get(f"{key}/in/{rank}")))
                self._store.delete_key(f"{key}/in/{rank}")
            return [_Outcome(decision) for decision in decide(brought)]
        except CkptdError as e:
            return [_Outcome(b"", type(e).__name__, e.message, e.remedy)] * self.world_size

    def _wait(self, key: str, timeout_s: float) -> bool:
        try:
            self._store.wait([key], timedelta(seconds=timeout_s))
        except RuntimeError:  # DistStoreError: the deadline passed, or the store's host is gone
            return False
        return True


def meeting_of(group: Any = None) -> Meeting:
    """Where this process's job meets: its default process group's store, or alone where there is none."""
    import torch.distributed as dist

    if not dist.is_available() or not dist.is_initialized():
        return Alone()
    if dist.get_world_size(group) == 1:
        return Alone()
    store = dist.distributed_c10d._get_default_store()  # noqa: SLF001  the group's store has no public name
    # A store that outlives the ranks is told apart by restart. One of their own is new each time, and nodes that joined late count otherwise.
    shared = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if shared else "0"
    members = ",".join(map(str, dist.get_process_group_ranks(group)))
    number = next(_meetings.setdefault(members, itertools.count()))
    name = f"ckptd/{restart}/{xxhash.xxh3_64_hexdigest(members.encode())}/{number}"
    prefix = dist.distributed_c10d.PrefixStore(name, store)
    return StoreMeeting(prefix, dist.get_rank(group), dist.get_world_size(group))
