"""The life of snapshots on one node: a pure state machine. Events and the time in, actions out; it reads no clock and no socket.

Promises of the states (DESIGN section 4)

    FILLING     none; a crash discards it
    SEALED      this node's ranks are complete and checksummed: survives every trainer of the node
    COMMITTED   every node of the job sealed it: a restart can use it
    PROTECTED   a mark beside these: every node holds its share of the parity; survives any m nodes of each group
    PERSISTED   another mark: the durable tier has it

Theory of operation. A snapshot is named by its key (attempt, step). Each rank's `Filled` asks for a `Hash`; when all local ranks are
hashed the snapshot is SEALED and the peers are told; when all nodes have told, it is COMMITTED, and only then are older snapshots
released. So at every moment the newest COMMITTED snapshot is held by every node, whatever dies. A snapshot that one rank skipped
can never complete: it is doomed and released everywhere, so that ranks cannot drift into holding different steps for ever.
Skips may be lost too; but a rank's steps only go forward, so a rank that is past a step without an image of it has skipped it.

A restore ends the uncertainty of an attempt, and nothing else does: once a new attempt began, the old one's snapshots are neither
committed nor released until the restore chose. What it chose is COMMITTED (as soon as its images are here: a successor of this daemon gets
them rank by rank), everything else of the old attempts is released.

Protecting and persisting are *errands*: something that every node does its part of, for one snapshot at a time. Which one is decided by node 0, when it
has sealed it, and told before any newer "sealed": so all nodes mean the same step, and none has released it. A node begins its part when it has
COMMITTED the snapshot, and holds it until node 0 says that all parts are done, or the errand failed or timed out. To protect is wanted of every
snapshot (of the newest, as soon as the last one is done); to persist is asked for. Parity computed for a snapshot is its fragment.

News may be lost with a connection; `greeting` is what a new one begins with. What the table does not list changes nothing; late, doubled
and reordered events are normal.

Invariants (checked by `check`, which the tests call after every event)
- N1 the newest COMMITTED snapshot is never released, except by a newer one, by a restore's choice, or by `Forget`; nor is the newest PROTECTED
  one, with its fragment, except by a newer PROTECTED one, or by a restore that went back behind it
- N2 a slot is released exactly once per filling, and never while its snapshot is known
- N3 an event of an attempt older than the job's newest changes nothing but the release of its own slot, or completes what may be chosen
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from ckptd.core.ladder import Fragment, Holding, Key

PROTECT, PERSIST = "protect", "persist"
ERRANDS = (PROTECT, PERSIST)
REACHED = {PROTECT: "protected", PERSIST: "persisted"}
"""What ranks are told when an errand is done."""

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
    """A rank of this node joined attempt `attempt`. `protect`: nodes hold parity for each other; `protected`: the newest PROTECTED step that it heard of."""

    job: str
    attempt: int
    node: int
    nodes: int
    protect: bool = False
    protected: Key | None = None
    rank: int = 0
    local_count: int = 1
    """How many ranks of this node will say so."""


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
class Asked:
    """Somebody wants an errand done for the newest committed snapshot at or after `step`."""

    job: str
    attempt: int
    step: int
    errand: str = PERSIST


@dataclass(frozen=True, slots=True)
class Told:
    """Node 0 decided for which snapshot the errand is to be done; `after`: the newest for which it was done, so that whatever is newer was given up."""

    job: str
    attempt: int
    step: int
    errand: str = PERSIST
    after: Key | None = None


@dataclass(frozen=True, slots=True)
class PartDone:
    """`node` (None: this node) has done its part: its images are in the durable tier and read back; or its fragment lies sealed in `ref`."""

    job: str
    attempt: int
    step: int
    errand: str = PERSIST
    node: int | None = None
    ref: SlotRef | None = None
    fragment: Fragment | None = None


@dataclass(frozen=True, slots=True)
class FragmentFound:
    """A sealed fragment lies in an arena that this daemon adopted."""

    job: str
    attempt: int
    step: int
    ref: SlotRef
    fragment: Fragment


@dataclass(frozen=True, slots=True)
class ErrandDone:
    """All parts are done, and (PERSIST) the manifest is written and read back. `here`: by this node, else told by node 0."""

    job: str
    attempt: int
    step: int
    errand: str = PERSIST
    here: bool = True


@dataclass(frozen=True, slots=True)
class ErrandFailed:
    """A part could not be done; the snapshot stays in memory as any other."""

    job: str
    attempt: int
    step: int
    why: str
    errand: str = PERSIST
    here: bool = True


@dataclass(frozen=True, slots=True)
class Chosen:
    """A restore of `attempt` chose `source` for all ranks; None: the durable tier, or a fresh start.

    `protected`: the newest step, not after it, that the nodes of this attempt can give back with their parity.
    """

    job: str
    attempt: int
    source: Key | None
    protected: Key | None = None


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
    AttemptBegan | Filled | Hashed | Skipped | PeerSealed | Asked | Told | PartDone | FragmentFound | ErrandDone | ErrandFailed
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
    """Tell the other nodes of the job: "sealed", "skipped", and of an errand "told", "done", "failed"; only node 0: "asked", "part"."""

    job: str
    attempt: int
    step: int
    what: str
    errand: str = ""
    after: Key | None = None
    """With "told": see `Told`."""


@dataclass(frozen=True, slots=True)
class TellRanks:
    """Tell this node's ranks that a snapshot reached a state ("committed", "protected", "persisted", "skipped", "persist failed: ...")."""

    job: str
    attempt: int
    step: int
    state: str


@dataclass(frozen=True, slots=True)
class DoPart:
    """Do this node's part for a committed snapshot, then say `PartDone` or `ErrandFailed`: write its images to the durable tier; or make its fragment."""

    job: str
    attempt: int
    step: int
    errand: str
    refs: tuple[tuple[int, SlotRef, int], ...]
    """(rank, filling, image_bytes)"""


@dataclass(frozen=True, slots=True)
class WriteManifest:
    """All nodes have written: prove, write index and manifest, then say `ErrandDone` or `ErrandFailed`. Node 0 only."""

    job: str
    attempt: int
    step: int
    world_size: int


Action = Hash | Release | TellPeers | TellRanks | DoPart | WriteManifest

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
    since_s: dict[str, float] = field(default_factory=dict)
    """errand -> since when this node is at it: until then the snapshot is held."""
    parts: dict[str, set[int]] = field(default_factory=lambda: {e: set() for e in ERRANDS})
    """errand -> nodes that have done their part."""
    done: set[str] = field(default_factory=set)
    """Errands that are done."""

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
    protected: int = 0
    protect_failed: int = 0
    persisted: int = 0
    persist_failed: int = 0
    fenced: int = 0


@dataclass(slots=True)
class Errand:
    """Where one kind of errand stands."""

    wanted: int | None = None
    """Node 0: somebody wants a snapshot at or after this step."""
    key: Key | None = None
    """What node 0 decided: begun as soon as it is COMMITTED here."""
    told: Key | None = None
    """Node 0: the newest that it told of."""
    done: Key | None = None
    """The newest that it was done for."""


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
    protect: bool = False
    local_count: int = 1
    joined: set[int] = field(default_factory=set)
    """Ranks of this node that joined the attempt since this daemon knows it."""
    errands: dict[str, Errand] = field(default_factory=lambda: {e: Errand() for e in ERRANDS})
    fragments: dict[Key, tuple[SlotRef, Fragment]] = field(default_factory=dict)
    """Sealed parity in this node's memory. It may outlive the images, and come back before them."""
    passed: dict[tuple[int, int], int] = field(default_factory=dict)
    """(attempt, rank) -> the highest step that a local rank filled; rank -1: that some local rank skipped."""
    decided: int = 0
    """The attempt whose restore has chosen, and what."""
    source: Key | None = None
    committed: Key | None = None
    counters: Counters = field(default_factory=Counters)

    @property
    def persisted(self) -> Key | None:
        """The newest PERSISTED step that this node knows of."""
        return self.errands[PERSIST].done

    @property
    def protected(self) -> Key | None:
        """The newest PROTECTED step that this node knows of."""
        return self.errands[PROTECT].done


class Node:
    """The machine. `receive` is its only way in; `jobs` is read by whoever performs the actions, and written by nobody else."""

    def __init__(self, *, persist_timeout_s: float = 3600.0, protect_timeout_s: float = 600.0) -> None:
        self.timeouts_s = {PERSIST: persist_timeout_s, PROTECT: protect_timeout_s}
        self.jobs: dict[str, Job] = {}
        self._on: dict[type, Callable[..., Iterator[Action]]] = {
            AttemptBegan: self._attempt_began,
            Filled: self._filled,
            Hashed: self._hashed,
            Skipped: self._skipped,
            PeerSealed: self._peer_sealed,
            Asked: self._asked,
            Told: self._told,
            PartDone: self._part_done,
            FragmentFound: self._fragment_found,
            ErrandDone: self._errand_done,
            ErrandFailed: self._errand_failed,
            Chosen: self._chosen,
            RestoreFailed: self._restore_failed,
            Forget: self._forget,
        }

    def receive(self, event: Event, now_s: float) -> list[Action]:
        """Take one event; the actions are to be performed in order."""
        if isinstance(event, Tick):
            return [a for job in [*self.jobs.values()] for a in self._expire(job, now_s)]
        if event.job not in self.jobs and not isinstance(event, AttemptBegan | Filled | FragmentFound):
            return []  # of a job that is over
        job = self.jobs.setdefault(event.job, Job(event.job))
        return list(self._on[type(event)](job, event, now_s))

    def holdings(self, name: str) -> list[Holding]:
        """What this node could give to a restart: its sealed and committed snapshots, and its fragments."""
        job = self.jobs.get(name)
        if job is None:
            return []
        found = [
            Holding(s.attempt, s.step, s.world_size, tuple(sorted(s.images)), s.state, (job.fragments[k][1],) if k in job.fragments else ())
            for k, s in job.snapshots.items()
            if s.state != FILLING
        ]
        whole = {(h.attempt, h.step) for h in found}
        return found + [Holding(*k, f.world_size, (), SEALED, (f,)) for k, (_, f) in job.fragments.items() if k not in whole]

    def greeting(self, name: str) -> list[TellPeers]:
        """News to begin a connection with: what is told may have been lost with the last one. ("told" before newer "sealed".)"""
        job = self.jobs.get(name)
        if job is None:
            return []
        news: list[TellPeers] = []
        for errand, state in job.errands.items():
            if state.done is not None and (job.node == 0 or errand == PROTECT):  # a successor of node 0 must know what all hold
                news.append(TellPeers(name, *state.done, "done", errand))
            if state.key is not None and job.node == 0:
                news += self._tell_told(job, errand, state.key)
            mine = [k for k, s in job.snapshots.items() if errand in s.since_s and s.node in s.parts[errand] and s.node]
            news += [TellPeers(name, *k, "part", errand) for k in mine]
        news += [TellPeers(name, *k, "skipped") for k in job.doomed if k[0] == job.attempt]
        return news + [TellPeers(name, *k, "sealed") for k, s in sorted(job.snapshots.items()) if s.state != FILLING]

    # --- the events' handlers -----------------------------------------------------------------------------------------------

    def _attempt_began(self, job: Job, e: AttemptBegan, now_s: float) -> Iterator[Action]:
        if e.attempt < job.attempt:
            job.counters.fenced += 1
            return
        newer, successor = e.attempt > job.attempt, job.attempt == 0
        job.attempt, job.node, job.nodes, job.protect, job.local_count = e.attempt, e.node, e.nodes, e.protect, e.local_count
        job.joined = {*(() if newer else job.joined), e.rank}
        if e.protected is not None and e.protected[0] == e.attempt and (job.protected is None or e.protected > job.protected):
            job.errands[PROTECT].done = e.protected  # all daemons may be new; ranks remember
        if not newer:
            yield from self._decide(job, PROTECT, now_s)  # what a predecessor sealed
            return
        for state in job.errands.values():
            state.wanted = state.key = state.told = None
        job.passed = {k: step for k, step in job.passed.items() if k[0] >= e.attempt}
        for snapshot in [*job.snapshots.values()]:
            if snapshot.attempt >= e.attempt:
                continue
            if len(snapshot.images) < snapshot.local_count and not successor:  # a successor gets the other ranks' arenas later
                yield from self._drop(job, snapshot)
            elif PERSIST in snapshot.since_s and (snapshot.node, snapshot.nodes) != (e.node, e.nodes):
                yield from self._errand_failed(job, ErrandFailed(job.name, *snapshot.key, "the job's nodes changed"), now_s)
            snapshot.since_s.pop(PROTECT, None)  # whom it protects with are this attempt's nodes; a fragment that comes late is released
        yield from self._decide(job, PROTECT, now_s)  # what a predecessor sealed

    def _filled(self, job: Job, e: Filled, now_s: float) -> Iterator[Action]:
        key = e.attempt, e.step
        snapshot = job.snapshots.get(key)
        known = snapshot.images.get(e.rank) if snapshot else None
        if known is not None and known.ref == e.ref:
            return
        full = snapshot is not None and len(snapshot.images) >= snapshot.local_count
        doomed = key in job.doomed and key not in job.fragments
        if doomed or known is not None or full or self._obsolete(job, key):
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
            for errand in ERRANDS:
                yield from self._decide(job, errand, now_s)
            if snapshot.nodes > 1:
                yield TellPeers(job.name, e.attempt, e.step, "sealed")
            yield from self._commit_if_all(job, snapshot, now_s)

    def _peer_sealed(self, job: Job, e: PeerSealed, now_s: float) -> Iterator[Action]:
        key = e.attempt, e.step
        snapshot = job.snapshots.get(key)
        if e.attempt < job.attempt or (job.committed is not None and key <= job.committed and (snapshot is None or snapshot.state == COMMITTED)):
            return
        if key in job.doomed:
            yield TellPeers(job.name, *key, "skipped")
            return
        job.peers_sealed.setdefault(key, set()).add(e.node)
        while len(job.peers_sealed) > DOOMED_KEPT:
            job.peers_sealed.popitem(last=False)
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

    def _asked(self, job: Job, e: Asked, now_s: float) -> Iterator[Action]:
        state = job.errands[e.errand]
        known = (state.key, state.done)
        if e.attempt < job.attempt or any(k is not None and k[0] == job.attempt and k[1] >= e.step for k in known):
            return
        if job.node != 0:
            yield TellPeers(job.name, job.attempt, e.step, "asked", e.errand)
            return
        if state.wanted is None or e.step > state.wanted:
            state.wanted = e.step
        yield from self._decide(job, e.errand, now_s)

    def _told(self, job: Job, e: Told, now_s: float) -> Iterator[Action]:
        key, state = (e.attempt, e.step), job.errands[e.errand]
        snapshot = job.snapshots.get(key)
        if e.attempt < job.attempt or job.node == 0 or key == state.key:
            return
        if snapshot is not None and e.errand in snapshot.done:  # a successor of node 0 does not know
            yield TellPeers(job.name, *key, "done", e.errand)
            return
        if e.after is not None and (state.done is None or e.after > state.done):
            yield from self._errand_done(job, ErrandDone(job.name, *e.after, e.errand, here=False), now_s)
        yield from self._give_up(job, e.errand, key)
        if snapshot is None and (key in job.doomed or (job.committed is not None and key < job.committed)):
            yield TellPeers(job.name, *key, "failed", e.errand)
            yield from self._drop_superseded(job, now_s)
            return
        state.key = key
        if snapshot is not None:
            yield from self._begin(job, e.errand, snapshot, now_s)
        yield from self._drop_superseded(job, now_s)

    def _part_done(self, job: Job, e: PartDone, now_s: float) -> Iterator[Action]:
        key, state = (e.attempt, e.step), job.errands[e.errand]
        snapshot = job.snapshots.get(key)
        if e.ref is not None and (snapshot is None or e.errand not in snapshot.since_s or job.fragments.get(key, (e.ref,))[0] != e.ref):
            yield Release(e.ref)  # it came too late
            return
        if e.node is not None and job.node == 0 and (snapshot is None or e.errand in snapshot.done):
            done = key == state.done or (snapshot is not None and e.errand in snapshot.done)
            if done or e.errand == PERSIST or (state.done is not None and key < state.done):  # else our predecessor may have said that it is PROTECTED
                yield TellPeers(job.name, *key, "done" if done else "failed", e.errand)
            return
        if snapshot is None or (e.node is None and e.errand not in snapshot.since_s):
            return
        if e.ref is not None and e.fragment is not None:
            job.fragments[key] = e.ref, e.fragment
        parts = snapshot.parts[e.errand]
        node = snapshot.node if e.node is None else e.node
        if node in parts:
            return
        parts.add(node)
        if snapshot.node != 0:
            if e.node is None:
                yield TellPeers(job.name, *key, "part", e.errand)
            return
        gave_up = state.told is not None and key <= state.told
        decided_before_us = state.key is None and e.errand not in snapshot.since_s and e.attempt == job.attempt and not gave_up
        if decided_before_us and snapshot.state != FILLING:
            state.key = key
            yield from self._tell_told(job, e.errand, key)
            yield from self._give_up(job, e.errand, key)
            job.peers_sealed[key] = {*range(snapshot.nodes)}  # who does its part has committed it
            yield from self._commit_if_all(job, snapshot, now_s)
            yield from self._begin(job, e.errand, snapshot, now_s)
        if parts >= set(range(snapshot.nodes)) and e.errand in snapshot.since_s:
            if e.errand == PERSIST:
                yield WriteManifest(job.name, *key, snapshot.world_size)
            else:
                yield from self._errand_done(job, ErrandDone(job.name, *key, e.errand), now_s)

    def _fragment_found(self, job: Job, e: FragmentFound, now_s: float) -> Iterator[Action]:
        key = e.attempt, e.step
        if job.fragments.get(key, (e.ref,))[0] != e.ref:
            yield Release(e.ref)
            return
        job.fragments[key] = e.ref, e.fragment
        yield from self._drop_superseded(job, now_s)

    def _errand_done(self, job: Job, e: ErrandDone, now_s: float) -> Iterator[Action]:
        key, state = (e.attempt, e.step), job.errands[e.errand]
        if e.errand == PROTECT and e.attempt < job.attempt:  # what the restore knew of it, it said
            return
        if state.done is None or key > state.done:
            state.done = key
            self._count(job, REACHED[e.errand])
            yield TellRanks(job.name, *key, REACHED[e.errand])
        if e.here and job.nodes > 1:
            yield TellPeers(job.name, *key, "done", e.errand)
        yield from self._end(job, e.errand, key, now_s, done=True)

    def _errand_failed(self, job: Job, e: ErrandFailed, now_s: float) -> Iterator[Action]:
        key = e.attempt, e.step
        snapshot = job.snapshots.get(key)
        if key != job.errands[e.errand].key and (snapshot is None or e.errand not in snapshot.since_s):
            return
        self._count(job, f"{e.errand}_failed")
        yield TellRanks(job.name, *key, f"{e.errand} failed: {e.why}")
        if job.nodes > 1 and (e.here or job.node == 0):
            yield TellPeers(job.name, *key, "failed", e.errand)
        yield from self._end(job, e.errand, key, now_s, done=False)

    def _chosen(self, job: Job, e: Chosen, now_s: float) -> Iterator[Action]:
        if e.attempt < job.attempt:
            job.counters.fenced += 1
            return
        job.decided, job.source = e.attempt, e.source
        if job.committed is not None and job.committed[0] < e.attempt and job.committed != e.source:
            job.committed = None
        if job.protected is None or job.protected[0] < e.attempt:
            job.errands[PROTECT].done = e.protected
        if e.source in job.snapshots:
            self._take_choice(job, job.snapshots[e.source])
        yield from self._drop_superseded(job, now_s)

    def _restore_failed(self, job: Job, e: RestoreFailed, _now_s: float) -> Iterator[Action]:
        job.failed.add((e.attempt, e.step, e.source))
        yield from ()

    def _forget(self, job: Job, _e: Forget, _now_s: float) -> Iterator[Action]:
        for snapshot in [*job.snapshots.values()]:
            yield from self._drop(job, snapshot)
        for ref, _ in job.fragments.values():
            yield Release(ref)
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
        for errand in ERRANDS:
            yield from self._begin(job, errand, snapshot, now_s)
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
        """Whether a newer snapshot superseded it, or a restore gave it up."""
        decided = job.decided == job.attempt
        ours = key[0] >= job.attempt or not decided
        if job.protect or job.attempt == 0 or job.committed is None or job.committed[0] < job.attempt:
            # A fragment that is newer than what is PROTECTED may complete it, or may have: a successor learns that later.
            newer = key in job.fragments and ours and (job.protected is None or key > job.protected)
            if key == job.protected or newer:
                return False
        if not ours and key != job.source:
            return True
        return job.committed is not None and key < job.committed and (job.committed[0] >= job.attempt or decided)

    def _drop_superseded(self, job: Job, now_s: float) -> Iterator[Action]:
        for snapshot in [*job.snapshots.values()]:
            if not snapshot.since_s and snapshot.key in job.snapshots and self._obsolete(job, snapshot.key):
                yield from self._drop(job, snapshot)
                for errand, state in job.errands.items():
                    if snapshot.key == state.key:  # checksums were made out of order, so a newer step was committed first
                        yield from self._next(job, errand, now_s)
                        if job.node != 0 and job.nodes > 1:  # node 0 saw the same, unless news were lost
                            yield TellPeers(job.name, *snapshot.key, "failed", errand)
        for key in [k for k in job.fragments if k not in job.snapshots and self._obsolete(job, k)]:
            yield Release(job.fragments.pop(key)[0])

    def _doom(self, job: Job, key: Key, now_s: float, *, tell: bool) -> Iterator[Action]:
        """A rank will never have it: release it, here and (`tell`) everywhere. A peer that lost what has parity here (damage) is a lost member, no more."""
        job.doomed[key] = None
        while len(job.doomed) > DOOMED_KEPT:
            job.doomed.popitem(last=False)
        job.peers_sealed.pop(key, None)
        job.counters.skipped += 1
        if key in job.snapshots and (tell or key not in job.fragments):
            yield from self._drop(job, job.snapshots[key])
        yield TellRanks(job.name, *key, "skipped")
        if tell and job.nodes > 1:
            yield TellPeers(job.name, *key, "skipped")
        for errand, state in job.errands.items():
            if key == state.key:
                yield from self._next(job, errand, now_s)

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

    def _decide(self, job: Job, errand: str, now_s: float) -> Iterator[Action]:
        """Node 0: the newest sealed snapshot at or after the wish; to protect, the newest that was not tried yet. One at a time: others wait."""
        state = job.errands[errand]
        if job.node != 0 or state.key is not None or any(errand in s.since_s for s in job.snapshots.values()):
            return
        keys = [k for k, s in job.snapshots.items() if s.state != FILLING and k[0] == job.attempt and k not in job.doomed]
        if errand == PROTECT:
            tried = max((k for k in (state.told, state.done) if k is not None), default=None)
            ready = job.protect and len(job.joined) >= job.local_count  # before that a rank may know of a PROTECTED step, and we do not
            keys = [k for k in keys if ready and (tried is None or k > tried)]
        else:
            keys = [k for k in keys if state.wanted is not None and k[1] >= state.wanted]
        if not keys:
            return
        state.wanted = None
        snapshot = job.snapshots[max(keys)]
        if errand in snapshot.done:
            return
        state.key = snapshot.key
        yield from self._tell_told(job, errand, snapshot.key)
        yield from self._give_up(job, errand, snapshot.key)
        yield from self._begin(job, errand, snapshot, now_s)

    @staticmethod
    def _tell_told(job: Job, errand: str, key: Key) -> Iterator[TellPeers]:
        """From then on others give up whatever is older, so nothing older may be completed."""
        state = job.errands[errand]
        state.told = max(key, state.told or key)
        after = state.done if state.done is not None and state.done[0] == job.attempt else None
        if job.nodes > 1:
            yield TellPeers(job.name, *key, "told", errand, after)

    @staticmethod
    def _give_up(job: Job, errand: str, key: Key) -> Iterator[Action]:
        """Node 0 told of `key`: it is done with what is older, or gave it up. (What is newer was decided by its predecessor.)"""
        done = job.errands[errand].done
        for other in job.snapshots.values():
            if other.attempt == key[0] and other.key < key:
                other.since_s.pop(errand, None)
                other.parts[errand].clear()
        for k in [k for k in job.fragments if errand == PROTECT and k[0] == key[0] and k < key and (done is None or k > done)]:
            yield Release(job.fragments.pop(k)[0])

    def _next(self, job: Job, errand: str, now_s: float) -> Iterator[Action]:
        """What was decided was never committed: the next one takes its place. No failure: the wish stands."""
        state = job.errands[errand]
        gone, state.key = state.key, None
        if gone is not None and job.node == 0:
            state.wanted = max(gone[1], state.wanted or 0) if errand == PERSIST else None
            yield from self._decide(job, errand, now_s)

    def _begin(self, job: Job, errand: str, snapshot: Snapshot, now_s: float) -> Iterator[Action]:
        if snapshot.key != job.errands[errand].key or snapshot.state != COMMITTED or errand in snapshot.since_s or errand in snapshot.done:
            return
        snapshot.since_s[errand] = now_s
        if errand == PROTECT and snapshot.key in job.fragments:  # our predecessor's
            ref, fragment = job.fragments[snapshot.key]
            yield from self._part_done(job, PartDone(job.name, *snapshot.key, errand, ref=ref, fragment=fragment), now_s)
            return
        refs = tuple((rank, image.ref, image.image_bytes) for rank, image in sorted(snapshot.images.items()))
        yield DoPart(job.name, *snapshot.key, errand, refs)

    def _end(self, job: Job, errand: str, key: Key, now_s: float, *, done: bool) -> Iterator[Action]:
        state = job.errands[errand]
        if key == state.key:
            state.key = None
        snapshot = job.snapshots.get(key)
        if snapshot is not None:
            snapshot.since_s.pop(errand, None)
            snapshot.parts[errand].clear()
            if done:
                snapshot.done.add(errand)
        if errand == PROTECT and not done and key in job.fragments and key != state.done:
            yield Release(job.fragments.pop(key)[0])
        yield from self._drop_superseded(job, now_s)
        yield from self._decide(job, errand, now_s)

    def _expire(self, job: Job, now_s: float) -> Iterator[Action]:
        for snapshot in [*job.snapshots.values()]:
            for errand, since_s in [*snapshot.since_s.items()]:
                promised = errand == PROTECT and snapshot.node != 0 and snapshot.node in snapshot.parts[errand]  # only node 0 may take it back
                if now_s - since_s > self.timeouts_s[errand] and not promised:
                    why = f"not finished after {self.timeouts_s[errand]:.0f} s"
                    yield from self._errand_failed(job, ErrandFailed(job.name, *snapshot.key, why, errand), now_s)

    @staticmethod
    def _count(job: Job, what: str) -> None:
        setattr(job.counters, what, getattr(job.counters, what) + 1)

    @staticmethod
    def _drop(job: Job, snapshot: Snapshot) -> Iterator[Action]:
        del job.snapshots[snapshot.key]
        job.peers_sealed.pop(snapshot.key, None)
        for image in snapshot.images.values():
            yield Release(image.ref)
        if snapshot.key in job.fragments:
            yield Release(job.fragments.pop(snapshot.key)[0])


def check(node: Node) -> None:
    """Assert the invariants that can be read from the state. Tests and the simulator call it after every event."""
    for job in node.jobs.values():
        refs = [i.ref for s in job.snapshots.values() for i in s.images.values()] + [ref for ref, _ in job.fragments.values()]
        assert len(refs) == len(set(refs)), "N2: a filling belongs to one snapshot"  # noqa: S101
        for key, snapshot in job.snapshots.items():
            assert key == snapshot.key, "a snapshot is filed under its key"  # noqa: S101
            assert len(snapshot.images) <= snapshot.local_count, "no more images than ranks"  # noqa: S101
            if snapshot.state != FILLING:
                assert all(i.hashed for i in snapshot.images.values()), "sealed means hashed"  # noqa: S101
        if job.committed is not None and job.committed in job.snapshots:
            assert job.snapshots[job.committed].state == COMMITTED, "N1"  # noqa: S101
