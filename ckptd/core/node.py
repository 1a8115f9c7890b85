"""The life of snapshots on one node: a pure state machine. Events and the time in, actions out; it reads no clock and no socket.

Promises of the states (DESIGN section 4)

    FILLING     none; a crash discards it
    SEALED      this node's ranks are complete and checksummed: survives every trainer of the node
    COMMITTED   every node of the job sealed it: a restart can use it
    (PERSISTED  is a mark beside these: the durable tier has it)

Theory of operation. A snapshot is named by its key (attempt, step). Each rank's `Filled` asks for a `Hash`; when all local ranks are
hashed the snapshot is SEALED and the peers are told; when all nodes have told, it is COMMITTED, and only then are older snapshots
released. So at every moment the newest COMMITTED snapshot is held by every node, whatever dies. A snapshot that one rank skipped
can never complete: it is doomed and released everywhere, so that ranks cannot drift into holding different steps for ever.
Skips may be lost too; but a rank's steps only go forward, so a rank that is past a step without an image of it has skipped it.

A restore ends the uncertainty of an attempt, and nothing else does: once a new attempt began, the old one's snapshots are neither
committed nor released until the restore chose. What it chose is COMMITTED (as soon as its images are here: a successor of this daemon gets
them rank by rank), everything else of the old attempts is released.

What to persist is decided by node 0, when it has sealed it, and told before any newer "sealed": so all nodes write the same step, and none
has released it. It is held until its manifest is written, or the attempt at it failed or timed out.

News may be lost with a connection; `greeting` is what a new one begins with. What the table does not list changes nothing; late, doubled
and reordered events are normal.

Invariants (checked by `check`, which the tests call after every event)
- N1 the newest COMMITTED snapshot is never released, except by a newer one, by a restore's choice, or by `Forget`
- N2 a slot is released exactly once per filling, and never while its snapshot is known
- N3 an event of an attempt older than the job's newest changes nothing but the release of its own slot, or completes what may be chosen
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from ckptd.core.ladder import Holding, Key

FILLING, SEALED, COMMITTED = "filling", "sealed", "committed"

TRANSITIONS: dict[tuple[str, str], str] = {
    (FILLING, "all local ranks hashed"): SEALED,
    (SEALED, "all nodes sealed"): COMMITTED,
    (SEALED, "chosen by a restore"): COMMITTED,
}
"""(state, what happened) -> state. Leaving the table means release: doomed, superseded, not chosen, forgotten."""

DOOMED_KEPT = 256
"""Keys of doomed snapshots remembered, so that a late rank's image is released at once. Ranks are at most a few steps apart."""


class SlotRef(NamedTuple):
    """A filling of a slot."""

    arena: str
    slot: int
    gen: int


# --- events -----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class AttemptBegan:
    """A rank of this node joined attempt `attempt`."""

    job: str
    attempt: int
    node: int
    nodes: int


@dataclass(frozen=True, slots=True)
class Filled:
    """A rank's image lies complete in a slot. `local_count` ranks of this node will say so of this step."""

    job: str
    attempt: int
    step: int
    rank: int
    world_size: int
    local_count: int
    node: int
    nodes: int
    ref: SlotRef
    image_bytes: int


@dataclass(frozen=True, slots=True)
class Hashed:
    """The checksums of a filling are made and written beside it."""

    job: str
    attempt: int
    step: int
    rank: int
    ref: SlotRef


@dataclass(frozen=True, slots=True)
class Skipped:
    """A rank (of this node: `node` is None, or of another) will never have this step."""

    job: str
    attempt: int
    step: int
    node: int | None = None


@dataclass(frozen=True, slots=True)
class PeerSealed:
    """Another node sealed this step."""

    job: str
    attempt: int
    step: int
    node: int


@dataclass(frozen=True, slots=True)
class PersistAsked:
    """Somebody wants the newest committed snapshot at or after `step` in the durable tier."""

    job: str
    attempt: int
    step: int


@dataclass(frozen=True, slots=True)
class PersistTold:
    """Node 0 decided that this snapshot is to be persisted."""

    job: str
    attempt: int
    step: int


@dataclass(frozen=True, slots=True)
class ImagesWritten:
    """The images of `node` (None: this node) are in the durable tier and read back."""

    job: str
    attempt: int
    step: int
    node: int | None = None


@dataclass(frozen=True, slots=True)
class Persisted:
    """The manifest is written and read back (by this node if it is the lowest, else told by it)."""

    job: str
    attempt: int
    step: int
    here: bool = True


@dataclass(frozen=True, slots=True)
class PersistFailed:
    """The durable tier refused; the snapshot stays in memory as any other."""

    job: str
    attempt: int
    step: int
    why: str
    here: bool = True


@dataclass(frozen=True, slots=True)
class Chosen:
    """A restore of `attempt` chose `source` for all ranks; None: the durable tier, or a fresh start."""

    job: str
    attempt: int
    source: Key | None


@dataclass(frozen=True, slots=True)
class RestoreFailed:
    """This snapshot could not be restored; it is the last to be tried again."""

    job: str
    attempt: int
    step: int
    source: str


@dataclass(frozen=True, slots=True)
class Forget:
    """The job is over: release everything."""

    job: str


@dataclass(frozen=True, slots=True)
class Tick:
    """Time passed."""


Event = (
    AttemptBegan | Filled | Hashed | Skipped | PeerSealed | PersistAsked | PersistTold | ImagesWritten | Persisted | PersistFailed
    | Chosen | RestoreFailed | Forget | Tick
)  # fmt: skip

# --- actions ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Hash:
    """Make the checksums of this filling, write its seal, then say `Hashed`."""

    job: str
    attempt: int
    step: int
    rank: int
    ref: SlotRef
    image_bytes: int


@dataclass(frozen=True, slots=True)
class Release:
    """The slot may be filled again."""

    ref: SlotRef


@dataclass(frozen=True, slots=True)
class TellPeers:
    """Tell the other nodes of the job: `what` is "sealed", "skipped", "persist", "persisted" or "persist failed"; node 0: "persist asked", "written"."""

    job: str
    attempt: int
    step: int
    what: str


@dataclass(frozen=True, slots=True)
class TellRanks:
    """Tell this node's ranks that a snapshot reached a state ("committed", "persisted", "skipped", "persist failed: ...")."""

    job: str
    attempt: int
    step: int
    state: str


@dataclass(frozen=True, slots=True)
class WriteImages:
    """Write this node's images of a committed snapshot to the durable tier, then say `ImagesWritten` or `PersistFailed`."""

    job: str
    attempt: int
    step: int
    refs: tuple[tuple[int, SlotRef, int], ...]
    """(rank, filling, image_bytes)"""


@dataclass(frozen=True, slots=True)
class WriteManifest:
    """All nodes have written: prove, write index and manifest, then say `Persisted` or `PersistFailed`. Lowest node only."""

    job: str
    attempt: int
    step: int
    world_size: int


Action = Hash | Release | TellPeers | TellRanks | WriteImages | WriteManifest

# --- state ------------------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Image:
    """A rank's image on this node."""

    ref: SlotRef
    image_bytes: int
    hashed: bool = False


@dataclass(slots=True)
class Snapshot:
    """A step as this node knows it."""

    attempt: int
    step: int
    world_size: int
    local_count: int
    node: int
    nodes: int
    state: str = FILLING
    images: dict[int, Image] = field(default_factory=dict)
    persist_since_s: float | None = None
    written: set[int] = field(default_factory=set)
    persisted: bool = False

    @property
    def key(self) -> Key:
        """(attempt, step)"""
        return self.attempt, self.step


@dataclass(slots=True)
class Counters:
    """What happened to a job's snapshots since this daemon knows it."""

    sealed: int = 0
    committed: int = 0
    skipped: int = 0
    persisted: int = 0
    persist_failed: int = 0
    fenced: int = 0


@dataclass(slots=True)
class Job:
    """Everything this node remembers of a job."""

    name: str
    attempt: int = 0
    node: int = 0
    nodes: int = 1
    snapshots: dict[Key, Snapshot] = field(default_factory=dict)
    peers_sealed: OrderedDict[Key, set[int]] = field(default_factory=OrderedDict)
    doomed: OrderedDict[Key, None] = field(default_factory=OrderedDict)
    failed: set[tuple[int, int, str]] = field(default_factory=set)
    persist_wanted: int | None = None
    persist_key: Key | None = None
    """What node 0 decided to persist: written as soon as it is COMMITTED here."""
    passed: dict[tuple[int, int], int] = field(default_factory=dict)
    """(attempt, rank) -> the highest step that a local rank filled; rank -1: that some local rank skipped."""
    decided: int = 0
    """The attempt whose restore has chosen, and what."""
    source: Key | None = None
    committed: Key | None = None
    persisted: Key | None = None
    counters: Counters = field(default_factory=Counters)


class Node:
    """The machine. `receive` is its only way in; `jobs` is read by whoever performs the actions, and written by nobody else."""

    def __init__(self, *, persist_timeout_s: float = 3600.0) -> None:
        self.persist_timeout_s = persist_timeout_s
        self.jobs: dict[str, Job] = {}
        self._on: dict[type, Callable[..., Iterator[Action]]] = {
            AttemptBegan: self._attempt_began,
            Filled: self._filled,
            Hashed: self._hashed,
            Skipped: self._skipped,
            PeerSealed: self._peer_sealed,
            PersistAsked: self._persist_asked,
            PersistTold: self._persist_told,
            ImagesWritten: self._images_written,
            Persisted: self._persisted,
            PersistFailed: self._persist_failed,
            Chosen: self._chosen,
            RestoreFailed: self._restore_failed,
            Forget: self._forget,
        }

    def receive(self, event: Event, now_s: float) -> list[Action]:
        """Take one event; the actions are to be performed in order."""
        if isinstance(event, Tick):
            return [a for job in [*self.jobs.values()] for a in self._expire(job, now_s)]
        job = self.jobs.setdefault(event.job, Job(event.job))
        return list(self._on[type(event)](job, event, now_s))

    def holdings(self, name: str) -> list[Holding]:
        """What this node could give to a restart: its sealed and committed snapshots."""
        job = self.jobs.get(name)
        snapshots = job.snapshots.values() if job else ()
        return [
            Holding(s.attempt, s.step, s.world_size, tuple(sorted(s.images)), s.state) for s in snapshots if s.state != FILLING
        ]

    def greeting(self, name: str) -> list[tuple[Key, str]]:
        """News to begin a connection with: what is told may have been lost with the last one. (A "persist" before newer "sealed".)"""
        job = self.jobs.get(name)
        if job is None:
            return []
        news = [(job.persisted, "persisted")] if job.persisted is not None and job.node == 0 else []
        news += [(job.persist_key, "persist")] if job.persist_key is not None and job.node == 0 else []
        news += [(k, "written") for k, s in job.snapshots.items() if s.persist_since_s is not None and s.node in s.written and s.node]
        news += [(k, "skipped") for k in job.doomed if k[0] == job.attempt]
        return news + [(k, "sealed") for k, s in job.snapshots.items() if s.state != FILLING]

    # --- the events' handlers -----------------------------------------------------------------------------------------------

    def _attempt_began(self, job: Job, e: AttemptBegan, now_s: float) -> Iterator[Action]:
        if e.attempt < job.attempt:
            job.counters.fenced += 1
            return
        newer, successor = e.attempt > job.attempt, job.attempt == 0
        job.attempt, job.node, job.nodes = e.attempt, e.node, e.nodes
        if not newer:
            return
        job.persist_wanted = job.persist_key = None
        job.passed = {k: step for k, step in job.passed.items() if k[0] >= e.attempt}
        for snapshot in [*job.snapshots.values()]:
            if snapshot.attempt >= e.attempt:
                continue
            if len(snapshot.images) < snapshot.local_count and not successor:  # a successor gets the other ranks' arenas later
                yield from self._drop(job, snapshot)
            elif snapshot.persist_since_s is not None and (snapshot.node, snapshot.nodes) != (e.node, e.nodes):
                yield from self._persist_failed(job, PersistFailed(job.name, *snapshot.key, "the job's nodes changed"), now_s)

    def _filled(self, job: Job, e: Filled, now_s: float) -> Iterator[Action]:
        key = e.attempt, e.step
        snapshot = job.snapshots.get(key)
        known = snapshot.images.get(e.rank) if snapshot else None
        if known is not None and known.ref == e.ref:
            return
        full = snapshot is not None and len(snapshot.images) >= snapshot.local_count
        if key in job.doomed or known is not None or full or self._obsolete(job, key):
            yield Release(e.ref)
        else:
            if snapshot is None:
                snapshot = Snapshot(e.attempt, e.step, e.world_size, e.local_count, e.node, e.nodes)
                job.snapshots[key] = snapshot
            snapshot.images[e.rank] = Image(e.ref, e.image_bytes)
            yield Hash(job.name, e.attempt, e.step, e.rank, e.ref, e.image_bytes)
        yield from self._passes(job, e.attempt, e.rank, e.step, now_s)

    def _hashed(self, job: Job, e: Hashed, now_s: float) -> Iterator[Action]:
        snapshot = job.snapshots.get((e.attempt, e.step))
        image = snapshot.images.get(e.rank) if snapshot else None
        if snapshot is None or image is None or image.ref != e.ref or image.hashed:
            return
        image.hashed = True
        if len(snapshot.images) == snapshot.local_count and all(i.hashed for i in snapshot.images.values()):
            self._advance(snapshot, "all local ranks hashed")
            job.counters.sealed += 1
            self._take_choice(job, snapshot)
            yield from self._decide_persist(job, now_s)
            if snapshot.nodes > 1:
                yield TellPeers(job.name, e.attempt, e.step, "sealed")
            yield from self._commit_if_all(job, snapshot, now_s)

    def _peer_sealed(self, job: Job, e: PeerSealed, now_s: float) -> Iterator[Action]:
        key = e.attempt, e.step
        if e.attempt < job.attempt or (job.committed is not None and key <= job.committed):
            return
        if key in job.doomed:
            yield TellPeers(job.name, *key, "skipped")
            return
        job.peers_sealed.setdefault(key, set()).add(e.node)
        while len(job.peers_sealed) > DOOMED_KEPT:
            job.peers_sealed.popitem(last=False)
        snapshot = job.snapshots.get(key)
        if snapshot is not None:
            yield from self._commit_if_all(job, snapshot, now_s)
        if self._is_lost(job, key):
            yield from self._doom(job, key, now_s, tell=True)

    def _skipped(self, job: Job, e: Skipped, now_s: float) -> Iterator[Action]:
        key = e.attempt, e.step
        snapshot = job.snapshots.get(key)
        if e.attempt < job.attempt:
            if e.node is None and snapshot is not None and snapshot.state == FILLING:
                yield from self._drop(job, snapshot)
            return
        if key not in job.doomed and (snapshot is None or snapshot.state != COMMITTED):
            yield from self._doom(job, key, now_s, tell=e.node is None)
        if e.node is None:
            yield from self._passes(job, e.attempt, -1, e.step, now_s)

    def _persist_asked(self, job: Job, e: PersistAsked, now_s: float) -> Iterator[Action]:
        known = (job.persist_key, job.persisted)
        if e.attempt < job.attempt or any(k is not None and k[0] == job.attempt and k[1] >= e.step for k in known):
            return
        if job.node != 0:
            yield TellPeers(job.name, job.attempt, e.step, "persist asked")
            return
        if job.persist_wanted is None or e.step > job.persist_wanted:
            job.persist_wanted = e.step
        yield from self._decide_persist(job, now_s)

    def _persist_told(self, job: Job, e: PersistTold, now_s: float) -> Iterator[Action]:
        key = e.attempt, e.step
        snapshot = job.snapshots.get(key)
        if e.attempt < job.attempt or job.node == 0 or (snapshot is not None and (snapshot.persisted or key == job.persist_key)):
            return
        if snapshot is None and (key in job.doomed or (job.committed is not None and key < job.committed)):
            yield TellPeers(job.name, *key, "persist failed")
            return
        for other in job.snapshots.values():  # node 0 is done with those
            if other.attempt == e.attempt:
                other.persist_since_s = None
        job.persist_key = key
        if snapshot is not None:
            yield from self._begin_persist(job, snapshot, now_s)
        yield from self._drop_superseded(job, now_s)

    def _images_written(self, job: Job, e: ImagesWritten, now_s: float) -> Iterator[Action]:
        key = e.attempt, e.step
        snapshot = job.snapshots.get(key)
        if e.node is not None and job.node == 0 and (snapshot is None or snapshot.persisted):
            done = key == job.persisted or (snapshot is not None and snapshot.persisted)
            yield TellPeers(job.name, *key, "persisted" if done else "persist failed")
            return
        if snapshot is None or (e.node is None and snapshot.persist_since_s is None):
            return
        node = snapshot.node if e.node is None else e.node
        if node in snapshot.written:
            return
        snapshot.written.add(node)
        if snapshot.node != 0:
            if e.node is None:
                yield TellPeers(job.name, *key, "written")
            return
        if job.persist_key is None and snapshot.persist_since_s is None and e.attempt == job.attempt:  # decided by our predecessor
            job.persist_key = key
            yield TellPeers(job.name, *key, "persist")
            yield from self._begin_persist(job, snapshot, now_s)
        if snapshot.written >= set(range(snapshot.nodes)) and snapshot.persist_since_s is not None:
            yield WriteManifest(job.name, *key, snapshot.world_size)

    def _persisted(self, job: Job, e: Persisted, now_s: float) -> Iterator[Action]:
        key = e.attempt, e.step
        if job.persisted is None or key > job.persisted:
            job.persisted = key
            job.counters.persisted += 1
            yield TellRanks(job.name, *key, "persisted")
        if e.here and job.nodes > 1:
            yield TellPeers(job.name, *key, "persisted")
        yield from self._end_persist(job, key, now_s, done=True)

    def _persist_failed(self, job: Job, e: PersistFailed, now_s: float) -> Iterator[Action]:
        key = e.attempt, e.step
        snapshot = job.snapshots.get(key)
        if key != job.persist_key and (snapshot is None or snapshot.persist_since_s is None):
            return
        job.counters.persist_failed += 1
        yield TellRanks(job.name, *key, f"persist failed: {e.why}")
        if job.nodes > 1 and (e.here or job.node == 0):
            yield TellPeers(job.name, *key, "persist failed")
        yield from self._end_persist(job, key, now_s, done=False)

    def _chosen(self, job: Job, e: Chosen, now_s: float) -> Iterator[Action]:
        if e.attempt < job.attempt:
            job.counters.fenced += 1
            return
        job.decided, job.source = e.attempt, e.source
        if job.committed is not None and job.committed[0] < e.attempt and job.committed != e.source:
            job.committed = None
        if e.source in job.snapshots:
            self._take_choice(job, job.snapshots[e.source])
        yield from self._drop_superseded(job, now_s)

    def _restore_failed(self, job: Job, e: RestoreFailed, _now_s: float) -> Iterator[Action]:
        job.failed.add((e.attempt, e.step, e.source))
        yield from ()

    def _forget(self, job: Job, _e: Forget, _now_s: float) -> Iterator[Action]:
        for snapshot in [*job.snapshots.values()]:
            yield from self._drop(job, snapshot)
        del self.jobs[job.name]

    # --- what they share ----------------------------------------------------------------------------------------------------

    @staticmethod
    def _advance(snapshot: Snapshot, what: str) -> bool:
        state = TRANSITIONS.get((snapshot.state, what))
        if state is not None:
            snapshot.state = state
        return state is not None

    def _commit_if_all(self, job: Job, snapshot: Snapshot, now_s: float) -> Iterator[Action]:
        if snapshot.attempt < job.attempt:
            return
        others = {n for n in job.peers_sealed.get(snapshot.key, ()) if 0 <= n < snapshot.nodes} - {snapshot.node}
        if len(others) + 1 < snapshot.nodes or not self._advance(snapshot, "all nodes sealed"):
            return
        job.peers_sealed.pop(snapshot.key, None)
        job.counters.committed += 1
        yield TellRanks(job.name, *snapshot.key, COMMITTED)
        if job.committed is None or snapshot.key > job.committed:
            job.committed = snapshot.key
        yield from self._begin_persist(job, snapshot, now_s)
        yield from self._drop_superseded(job, now_s)

    def _take_choice(self, job: Job, snapshot: Snapshot) -> None:
        """What the restore chose is COMMITTED, now or when it has been sealed here again."""
        chosen = job.decided == job.attempt and snapshot.key == job.source
        if chosen:
            self._advance(snapshot, "chosen by a restore")
        if chosen and snapshot.state == COMMITTED and (job.committed is None or snapshot.key > job.committed):
            job.committed = snapshot.key

    @staticmethod
    def _obsolete(job: Job, key: Key) -> bool:
        """Whether a newer commit superseded it, or a restore gave it up."""
        decided = job.decided == job.attempt
        if key[0] < job.attempt and decided and key != job.source:
            return True
        return job.committed is not None and key < job.committed and (job.committed[0] >= job.attempt or decided)

    def _drop_superseded(self, job: Job, now_s: float) -> Iterator[Action]:
        for snapshot in [*job.snapshots.values()]:
            if snapshot.persist_since_s is None and snapshot.key in job.snapshots and self._obsolete(job, snapshot.key):
                yield from self._drop(job, snapshot)
                if snapshot.key == job.persist_key:  # checksums were made out of order, so a newer step was committed first
                    yield from self._persist_next(job, now_s)
                    if job.node != 0 and job.nodes > 1:  # node 0 saw the same, unless news were lost
                        yield TellPeers(job.name, *snapshot.key, "persist failed")

    def _doom(self, job: Job, key: Key, now_s: float, *, tell: bool) -> Iterator[Action]:
        """A rank will never have it: release it, here and (`tell`) everywhere."""
        job.doomed[key] = None
        while len(job.doomed) > DOOMED_KEPT:
            job.doomed.popitem(last=False)
        job.peers_sealed.pop(key, None)
        job.counters.skipped += 1
        if key in job.snapshots:
            yield from self._drop(job, job.snapshots[key])
        yield TellRanks(job.name, *key, "skipped")
        if tell and job.nodes > 1:
            yield TellPeers(job.name, *key, "skipped")
        if key == job.persist_key:
            yield from self._persist_next(job, now_s)

    def _passes(self, job: Job, attempt: int, rank: int, step: int, now_s: float) -> Iterator[Action]:
        """A local rank has come to `step`: what it should have filled before and did not, it skipped."""
        if attempt < job.attempt:
            return
        job.passed[attempt, rank] = max(step, job.passed.get((attempt, rank), step))
        for key in {*job.snapshots, *job.peers_sealed}:
            if key[0] == attempt and self._is_lost(job, key):
                yield from self._doom(job, key, now_s, tell=True)

    @staticmethod
    def _is_lost(job: Job, key: Key) -> bool:
        """Whether a local rank is past this step without an image of it."""
        snapshot = job.snapshots.get(key)
        if key in job.doomed or (job.committed is not None and key <= job.committed) or (snapshot is not None and snapshot.state != FILLING):
            return False
        past = [rank for (attempt, rank), step in job.passed.items() if attempt == key[0] and step > key[1]]
        return any(snapshot is None or (rank >= 0 and rank not in snapshot.images) for rank in past)

    def _decide_persist(self, job: Job, now_s: float) -> Iterator[Action]:
        """Node 0: the newest sealed snapshot at or after the wish. One at a time: while a snapshot is being written, a newer wish waits."""
        wanted = job.persist_wanted
        if wanted is None or job.node != 0 or job.persist_key is not None or any(s.persist_since_s is not None for s in job.snapshots.values()):
            return
        keys = [k for k, s in job.snapshots.items() if s.state != FILLING and k[0] == job.attempt and k[1] >= wanted]
        if not keys:
            return
        job.persist_wanted = None
        snapshot = job.snapshots[max(keys)]
        if snapshot.persisted:
            return
        job.persist_key = snapshot.key
        if job.nodes > 1:
            yield TellPeers(job.name, *snapshot.key, "persist")
        yield from self._begin_persist(job, snapshot, now_s)

    def _persist_next(self, job: Job, now_s: float) -> Iterator[Action]:
        """What was to be persisted was never committed: the next one takes its place. No failure: the wish stands."""
        gone, job.persist_key = job.persist_key, None
        if gone is not None and job.node == 0:
            job.persist_wanted = max(gone[1], job.persist_wanted or 0)
            yield from self._decide_persist(job, now_s)

    @staticmethod
    def _begin_persist(job: Job, snapshot: Snapshot, now_s: float) -> Iterator[Action]:
        if snapshot.key != job.persist_key or snapshot.state != COMMITTED or snapshot.persist_since_s is not None or snapshot.persisted:
            return
        snapshot.persist_since_s = now_s
        refs = tuple((rank, image.ref, image.image_bytes) for rank, image in sorted(snapshot.images.items()))
        yield WriteImages(job.name, *snapshot.key, refs)

    def _end_persist(self, job: Job, key: Key, now_s: float, *, done: bool) -> Iterator[Action]:
        if key == job.persist_key:
            job.persist_key = None
        snapshot = job.snapshots.get(key)
        if snapshot is not None:
            snapshot.persist_since_s = None
            snapshot.persisted |= done
            snapshot.written.clear()
        yield from self._drop_superseded(job, now_s)
        yield from self._decide_persist(job, now_s)

    def _expire(self, job: Job, now_s: float) -> Iterator[Action]:
        for snapshot in [*job.snapshots.values()]:
            since_s = snapshot.persist_since_s
            if since_s is not None and now_s - since_s > self.persist_timeout_s:
                why = f"not finished after {self.persist_timeout_s:.0f} s"
                yield from self._persist_failed(job, PersistFailed(job.name, *snapshot.key, why), now_s)

    @staticmethod
    def _drop(job: Job, snapshot: Snapshot) -> Iterator[Action]:
        del job.snapshots[snapshot.key]
        job.peers_sealed.pop(snapshot.key, None)
        for image in snapshot.images.values():
            yield Release(image.ref)


def check(node: Node) -> None:
    """Assert the invariants that can be read from the state. Tests and the simulator call it after every event."""
    for job in node.jobs.values():
        refs = [i.ref for s in job.snapshots.values() for i in s.images.values()]
        assert len(refs) == len(set(refs)), "N2: a filling belongs to one snapshot"  # noqa: S101
        for key, snapshot in job.snapshots.items():
            assert key == snapshot.key, "a snapshot is filed under its key"  # noqa: S101
            assert len(snapshot.images) <= snapshot.local_count, "no more images than ranks"  # noqa: S101
            if snapshot.state != FILLING:
                assert all(i.hashed for i in snapshot.images.values()), "sealed means hashed"  # noqa: S101
        if job.committed is not None and job.committed in job.snapshots:
            assert job.snapshots[job.committed].state == COMMITTED, "N1"  # noqa: S101


def copy_of(snapshot: Snapshot) -> Snapshot:
    """A snapshot as a value, for status."""
    return replace(snapshot, images=dict(snapshot.images), written=set(snapshot.written))
