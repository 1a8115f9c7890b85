"""A simulated cluster that keeps its own truth: the real `Node`, `rungs`, `guarded` and `form` over machines, slots, links and trainers that are played.

A world is one seed and one `Setup`; all chance comes from the seed, all time is virtual. First safety: after every event the machine that it touched is
compared with the truth. Then liveness: all faults end, and a fresh step must be COMMITTED, PROTECTED and PERSISTED within a few steps.

Faults (`FAULTS`; each world draws some of them)

    always      news are lost with their connection, doubled, reordered; slots are torn; writes to the durable tier fail or hang
    daemon      a daemon is killed; its successor adopts the arenas, or gets them back rank by rank
    all         all daemons at once
    node        a machine goes with its memory, also several, also in the middle of a restore; some come back empty, some never
    pause       a machine handles nothing for a while, then everything at once
    cut         links between two sets of machines, both ways or one way, drop until they heal; then the greeting, then what was queued
    corrupt     bytes of a sealed image or fragment are damaged
    slow        a part takes longer than its deadline
    full        no place for a fragment; no free slot
    clock       a machine's clock jumps ahead
    zombie      a machine is left behind in an old attempt and comes back; latecomers and trainers of old attempts go on talking

A restore does what `Session._gather`, `restore` and `_chose` do: the ladder over what those who gathered hold, rung by rung, the choice to all daemons; and a
snapshot of the restored step at once, which those who are left commit and protect.

Invariants of reference/reliability.md, and who checks them

    I1   an acked commit is restorable       `World.promises`: what was PROTECTED is offered while each of its groups lost no more than it may (a damaged
                                             image counts as lost), what all sealed while nobody is lost; `World.look`: N1, N4, that nobody lets go of it
    I2   right bytes or an error             `World.stage`: every image read or decoded is the one that was filled, sealed and undamaged, else the rung fails; a rung
                                             fails for nothing else. A part made of damaged bytes fails. Real bytes: tests/hostile, tests/daemon/test_protect.py
    I3   one content per (attempt, step)     `World.fill`, `World.work` (what a manifest holds). On disk: tests/storage/test_checkpoint.py
    I4   all ranks get the same step         `World.look`: whoever heard of the attempt's choice has that source. Across ranks: tests/train/test_kills.py
    I5   the newest one that survives        `World.promises`: the ladder begins at or above both promises of I1, and with the newest step that it has
    I6   a failed restore is remembered      `World.promises`: while a daemon lives that heard, it is behind all others
    I7   old epochs do nothing               `World.send`: N3, no event of an old attempt changes the present one; `World.perform`: nothing of an old attempt is
                                             committed but by a choice; `World.look`: a zombie's image does not outlive the choice. Proofs: test_daemon_peers.py
    I8   groups and failure domains          `World.lose_domain`: the loss of any domain that no group says it shares is survived. All shapes: test_groups.py
    I9   one manifest, only whole            `World.work`: a manifest when all have written. Orphans and collection: tests/storage
    I10  memory within its cap               slots and places for fragments are fixed, and N2; the last commit: N1. Admission: tests/daemon/test_arena.py
    I11  deadlines; failures are visible     `World.tick`: no errand outlives its deadline; `World.look`: every failed errand is counted and told once
    I12  liveness                            `World.live`: after healing, and again after losing as many nodes as parity allows, twice in a row
"""

from __future__ import annotations

import random
from collections import defaultdict, deque
from dataclasses import dataclass, field

from ckptd.core.groups import form
from ckptd.core.ladder import Durable, Fragment, Rung, guarded, rungs
from ckptd.core.node import (
    COMMITTED,
    ERRANDS,
    FILLING,
    PERSIST,
    PROTECT,
    Asked,
    AttemptBegan,
    Chosen,
    DoPart,
    ErrandDone,
    ErrandFailed,
    Filled,
    FragmentFound,
    Hash,
    Hashed,
    Node,
    PartDone,
    PeerSealed,
    Release,
    RestoreFailed,
    Skipped,
    SlotRef,
    TellPeers,
    TellRanks,
    Tick,
    Told,
    WriteManifest,
    check,
)
from ckptd.core.stripes import Member

J = "job"
FAULTS = ("daemon", "all", "node", "pause", "cut", "corrupt", "slow", "full", "clock", "zombie")
TIMEOUTS_S = {PERSIST: 50.0, PROTECT: 5.0}
Key = tuple[int, int]


class Broken(AssertionError):
    """An invariant of the world does not hold."""


@dataclass(frozen=True)
class Setup:
    nodes: int
    ranks: int
    slots: int
    loss: float = 0.05
    double: float = 0.05
    reorder: float = 0.05
    parity: int = 0
    """How many nodes of a group may be lost; 0: nodes do not protect each other."""
    group: int = 8
    domains: int = 0
    """How many racks the nodes stand in; 0: they have no labels."""
    faults: tuple[str, ...] = ("daemon", "zombie")

    @staticmethod
    def of(rng: random.Random) -> Setup:
        rate = lambda: rng.choice([0.0, 0.02, 0.1])
        nodes = rng.choice([1, 2, 2, 3, 3, 3, 3, 3, 4, 4, 4, 4, 5, 5, 5, 6, 6, 6, rng.randrange(7, 10), rng.randrange(7, 13)])
        parity = rng.choice([0, 1, 1, 1, 2]) if nodes > 1 else 0
        group = rng.choice([parity + 1, 3, 4, 8])
        faults = tuple(f for f in FAULTS if rng.random() < 0.5)
        return Setup(
            nodes, rng.choice([1, 1, 2, 2, 3]) if nodes < 7 else 1, rng.choice([3, 4, 4] if parity else [2, 3]), rate(), rate(), rate(),
            parity, max(group, parity + 1), rng.choice([0, 0, 2, 3, 4]), faults,
        )  # fmt: skip


@dataclass
class Slot:
    """What lies in memory: it outlives trainer and daemon."""

    state: str = "EMPTY"
    gen: int = 0
    key: Key = (0, 0)
    place: tuple[int, int, int, int, int] = (0, 1, 1, 0, 1)
    """rank, world_size, local_count, node, nodes: a slot's header says what its attempt was like."""
    released: int = 0
    sealed: int = 0
    tokens: dict[int, int] = field(default_factory=dict)
    """The bytes: by rank, a number that stands for what was filled; of a fragment, all whose parity it is."""
    fragment: Fragment | None = None
    """What a fragment's own header says of it."""
    damaged: bool = False

    @property
    def free(self) -> bool:
        return self.state in {"EMPTY", "VOID"} or (self.state == "FILLED" and self.released == self.gen)

    @property
    def held(self) -> bool:
        return self.state == "FILLED" and self.released != self.gen

    @property
    def whole(self) -> bool:
        return self.state == "FILLED" and self.released != self.gen and self.sealed == self.gen

    def begin(self, key: Key, place: tuple[int, int, int, int, int], tokens: dict[int, int]) -> None:
        self.gen = max(self.gen, self.sealed, self.released) + 1
        self.state, self.key, self.place, self.tokens, self.damaged = "FILLING", key, place, tokens, False


@dataclass
class Rank:
    """A trainer: it fills, flips, tells; and knows nothing else."""

    slots: list[Slot]
    step: int = 0
    filling: int = -1
    joined: bool = True
    chose: bool = True
    protected: Key | None = None
    """The newest PROTECTED step that it was told of."""


@dataclass
class Machine:
    node: Node | None
    ranks: list[Rank]
    number: int = 0
    attempt: int = 1
    """Of its trainers: less than the world's where it was left behind; 0: it is new."""
    alive: bool = True
    since: int = 1
    """The attempt with which its memory began."""
    fragments: list[Slot] = field(default_factory=lambda: [Slot(), Slot()])
    """Parity, of which the newest and its successor fit."""
    zombie: Slot = field(default_factory=Slot)
    """Memory of a trainer of an old attempt that still runs here."""
    work: list = field(default_factory=list)
    """(not before, action): what the daemon owes itself: hashes, writes. They die with it."""
    inbox: list = field(default_factory=list)
    """What its trainers did while it was paused."""
    paused_until_s: float = -1.0
    frozen: bool = False
    """Paused with its trainers."""
    skew_s: float = 0.0
    full: bool = False
    lives: int = 0
    """How many daemons there were here."""
    notices: dict[str, int] = field(default_factory=lambda: dict.fromkeys(ERRANDS, 0))


class World:
    """A job on some machines."""

    def __init__(self, seed: int, setup: Setup | None = None, machine: type[Node] = Node) -> None:
        self.rng = random.Random(seed)
        self.setup = s = setup or Setup.of(self.rng)
        self.make = lambda: machine(persist_timeout_s=TIMEOUTS_S[PERSIST], protect_timeout_s=TIMEOUTS_S[PROTECT])
        self.now_s = 0.0
        self.events = 0
        self.faults = True
        self.attempt = 1
        self.machines = [Machine(self.make(), self.empty_ranks(), n) for n in range(s.nodes)]
        self.labels = [{"rack": f"r{n % s.domains}"} if s.domains else {} for n in range(s.nodes)]
        self.members: dict[int, list[int]] = {}
        """By attempt: machines, by their numbers."""
        self.groups: dict[int, list[tuple[int, list[int], str]]] = {}
        """By attempt: parity, machines, and in what a group is degraded."""
        self.choices: dict[int, tuple[Key | None, Key | None]] = {1: (None, None)}
        """By attempt: source, and what is under parity."""
        self.links: dict[tuple[int, int], deque] = {(a, b): deque() for a in range(s.nodes) for b in range(s.nodes) if a != b}
        self.cuts: set[tuple[int, int]] = set()
        self.late: list = []
        self.tokens = 0
        self.truth: dict[tuple[Key, int], int] = {}
        self.sealed_by: dict[Key, set[int]] = defaultdict(set)
        self.newest: Key | None = None
        """What must be held: the newest step that every node sealed, or the restore's choice; and by whom."""
        self.holders: set[int] = set()
        self.protected: Key | None = None
        """The newest step of which some node said that it is PROTECTED, and who must hold it."""
        self.protectors: set[int] = set()
        self.spoiled: set[tuple[int, Key]] = set()
        """(machine, key) of which bytes were damaged: they count as lost."""
        self.unsettled: set[int] = set()
        """Whose checksums were not made when the ladder was."""
        self.barred: set[Key] = set()
        """Whose damage a daemon noticed: it is as if it had been skipped, by who did not commit it yet."""
        self.failures: dict[tuple[int, int, str], set[tuple[int, int]]] = defaultdict(set)
        """Restores that failed, and the (machine, life) that heard of it."""
        self.releases: set = set()
        self.written: dict[Key, dict[int, int]] = defaultdict(dict)
        self.manifests: dict[Key, dict[int, int]] = {}
        self.commits: dict[Key, set[int]] = defaultdict(set)
        self.done: set[Key] = set()
        self.count: dict[str, int] = defaultdict(int)
        """What happened, so that tests can see that it did."""
        self.trace: deque = deque(maxlen=80)
        self.enter(1, [*range(s.nodes)])
        for n, m in enumerate(self.machines):
            for r in range(s.ranks):
                self.send(n, AttemptBegan(J, 1, m.number, s.nodes, self.protects(1), None, r, s.ranks))
                self.send(n, Chosen(J, 1, None))

    # --- truth --------------------------------------------------------------------------------------------------------------

    def empty_ranks(self) -> list[Rank]:
        return [Rank([Slot() for _ in range(self.setup.slots)]) for _ in range(self.setup.ranks)]

    def enter(self, attempt: int, here: list[int]) -> None:
        self.attempt, self.members[attempt] = attempt, here
        s = self.setup
        formed = form([self.labels[n] for n in here], size=s.group, parity=s.parity) if s.parity and len(here) > 1 else ()
        self.groups[attempt] = [(g.parity, [here[i] for i in g.members], g.degraded) for g in formed]

    def protects(self, attempt: int) -> bool:
        return bool(self.groups[attempt])

    def here(self) -> list[int]:
        """Machines of the present attempt that are left; an empty one that took a place is not."""
        return [n for n in self.members[self.attempt] if self.machines[n].alive and self.machines[n].attempt == self.attempt]

    def holds(self, n: int, key) -> bool:
        return all(any(s.key == key and s.held for s in rank.slots) for rank in self.machines[n].ranks)

    def guards(self, n: int, key) -> bool:
        return self.holds(n, key) and any(s.key == key and s.held for s in self.machines[n].fragments)

    def image(self, n: int, key: Key, rank: int) -> Slot | None:
        m = self.machines[n]
        places = [s for r in m.ranks for s in r.slots] if rank >= 0 else m.fragments
        return next((s for s in places if s.held and s.key == key and (rank < 0 or s.place[0] == rank)), None)

    def look(self, n: int) -> None:
        """Compare a machine with the truth."""
        m = self.machines[n]
        if m.node is not None and (job := m.node.jobs.get(J)) is not None:
            check(m.node)
            for snapshot in job.snapshots.values():
                for image in snapshot.images.values():
                    slot = self.slot(n, image.ref)
                    if not slot.held or slot.gen != image.ref.gen:
                        raise Broken(f"N2: node {n} counts on {image.ref} of {snapshot.key}, which was released")
            for ref, _ in job.fragments.values():
                slot = self.slot(n, ref)
                if not slot.held or slot.gen != ref.gen:
                    raise Broken(f"N2: node {n} counts on parity in {ref}, which was released")
            if job.attempt and job.decided == job.attempt:
                if job.source != self.choices[job.attempt][0]:
                    raise Broken(f"I4: node {n} went on from {job.source}, the ranks from {self.choices[job.attempt][0]}")
                if any(i.ref.arena == "z" for snapshot in job.snapshots.values() for i in snapshot.images.values()):
                    raise Broken(f"I7: node {n} keeps a zombie's {m.zombie.key} after attempt {job.attempt} chose {job.source}")
            if (job.counters.protect_failed, job.counters.persist_failed) != (m.notices[PROTECT], m.notices[PERSIST]):
                raise Broken(f"I11: node {n} counted {job.counters} and told its ranks of {m.notices}")
        if n in self.protectors and not self.guards(n, self.protected):
            raise Broken(f"N4: {self.protected} was PROTECTED, and node {n} holds it or its fragment no more")
        if n in self.holders and not self.holds(n, self.newest):
            raise Broken(f"N1: {self.newest} was sealed by all, and node {n} holds it no more")

    # --- events in, actions out ---------------------------------------------------------------------------------------------

    def send(self, n: int, event) -> None:
        m = self.machines[n]
        if m.node is None:
            return
        job = m.node.jobs.get(J)
        old = job is not None and getattr(event, "attempt", 1 << 30) < job.attempt
        before = self.picture(job) if old else None
        self.events += 1
        actions = m.node.receive(event, self.now_s + m.skew_s)
        self.trace.append((round(self.now_s, 1), n, event, actions))
        if before is not None:
            strict = isinstance(event, PeerSealed | Told | Asked) or (isinstance(event, Skipped) and event.node is not None)
            own = isinstance(event, Filled | Hashed | Skipped | PartDone | ErrandDone | ErrandFailed | FragmentFound) and not strict
            if self.picture(job) != before and not own:
                raise Broken(f"N3: {event} of an old attempt changed node {n}: {actions}")
            if (strict and actions) or any(isinstance(a, Release) and self.slot(n, a.ref).key[0] == job.attempt for a in actions):
                raise Broken(f"N3: {event} of an old attempt made node {n} do {actions}")
        for action in actions:
            self.perform(n, action)
        self.look(n)

    @staticmethod
    def picture(job):
        errands = [(e.wanted, e.key, e.told, e.done) for e in job.errands.values()]
        return {k: (s.state, tuple(s.images)) for k, s in job.snapshots.items()}, job.committed, job.attempt, tuple(job.doomed), errands

    def perform(self, n: int, action) -> None:
        m = self.machines[n]
        match action:
            case Hash() | DoPart() | WriteManifest():
                m.work.append((0.0, action))
            case Release():
                if (n, action.ref) in self.releases:
                    raise Broken(f"N2: {action.ref} released twice")
                self.releases.add((n, action.ref))
                slot = self.slot(n, action.ref)
                if slot.gen == action.ref.gen:
                    slot.released = action.ref.gen
            case TellPeers():
                job = m.node.jobs[J]
                for number, other in enumerate(self.members.get(job.attempt, ())):
                    if other != n and self.machines[other].alive and (action.what not in {"part", "asked"} or number == 0):
                        self.links[n, other].append((job.attempt, job.node, action))
            case TellRanks():
                self.hear(n, action)

    def hear(self, n: int, action: TellRanks) -> None:
        m, key, state = self.machines[n], (action.attempt, action.step), action.state
        if state == COMMITTED:
            if action.attempt < m.node.jobs[J].attempt:
                raise Broken(f"I7: node {n} committed {key} in attempt {m.node.jobs[J].attempt}")
            self.commits[key].add(n)
        if state == "protected":
            self.count["protected"] += 1
            told = [rank for rank in m.ranks if rank.joined]
            for rank in told:
                rank.protected = max(rank.protected or key, key)
            if told and key[0] == self.attempt and (self.protected is None or key > self.protected):
                self.protected = key
                self.protectors = {i for i in self.here() if (i, key) not in self.spoiled}
        if state == "persisted":
            if key not in self.manifests:
                raise Broken(f"node {n} says that {key} is persisted, and there is no manifest")
            self.done.add(key)
        for errand in ERRANDS:
            m.notices[errand] += state.startswith(f"{errand} failed")

    def slot(self, n: int, ref) -> Slot:
        m, kind = self.machines[n], ref.arena[0]
        return m.zombie if kind == "z" else m.fragments[ref.slot] if kind == "f" else m.ranks[int(ref.arena[1:])].slots[ref.slot]

    # --- links --------------------------------------------------------------------------------------------------------------

    def heard(self, link, item) -> None:
        attempt, source, news = item
        n = link[1]
        job = self.machines[n].node.jobs.get(J) if self.machines[n].node is not None else None
        if job is None or job.attempt != attempt:
            return  # it does not know the secret
        what, key, errand = news.what, (news.attempt, news.step), news.errand
        self.send(
            n,
            {
                "sealed": lambda: PeerSealed(J, *key, source),
                "skipped": lambda: Skipped(J, *key, source),
                "told": lambda: Told(J, *key, errand, news.after),
                "asked": lambda: Asked(J, *key, errand),
                "part": lambda: PartDone(J, *key, errand, source),
                "done": lambda: ErrandDone(J, *key, errand, here=False),
                "failed": lambda: ErrandFailed(J, *key, "there", errand, here=False),
            }[what](),
        )

    def paused(self, n: int) -> bool:
        return self.machines[n].paused_until_s > self.now_s

    def deliver(self, link) -> bool:
        queue, rng, s = self.links[link], self.rng, self.setup
        if not queue or link in self.cuts or self.paused(link[1]):
            return False
        item = queue.popleft()
        if self.faults and rng.random() < s.loss:
            self.greet(link)  # the connection broke, and everything on it is lost; a new one begins with the greeting
            return True
        if self.faults and rng.random() < s.double:
            self.late.append((link, item))
        if self.faults and rng.random() < s.reorder:
            self.late.append((link, item))
            return True
        self.heard(link, item)
        return True

    def greet(self, link, *, keep: bool = False) -> None:
        """A new connection. `keep`: what was queued for the old one is sent after the greeting, as peers.py does."""
        a, b = (self.machines[n].node for n in link)
        if a is None or b is None or J not in a.jobs or J not in b.jobs or a.jobs[J].attempt != b.jobs[J].attempt or link in self.cuts:
            return
        queued = [*self.links[link]] if keep else []
        job = a.jobs[J]
        greeting = [(job.attempt, job.node, news) for news in a.greeting(J) if news.what != "part" or b.jobs[J].node == 0]
        self.links[link] = deque(greeting + queued)

    def greet_all(self, n: int | None = None) -> None:
        for link in self.links:
            if n is None or n in link:
                self.greet(link)

    def cut(self) -> None:
        """Both ways or one way."""
        rng, some = self.rng, set(self.rng.sample(range(len(self.machines)), self.rng.randrange(1, len(self.machines))))
        both = rng.random() < 0.5
        self.cuts |= {(a, b) for a, b in self.links if (a in some and b not in some) or (both and b in some and a not in some)}

    def mend(self) -> None:
        healed, self.cuts = sorted(self.cuts), set()
        for link in healed:
            self.greet(link, keep=self.rng.random() < 0.5)

    # --- what daemons do ----------------------------------------------------------------------------------------------------

    def work(self, n: int) -> bool:
        """One thing that this daemon owes itself; False: nothing is ready."""
        m, rng = self.machines[n], self.rng
        ready = [i for i, (at_s, _) in enumerate(m.work) if at_s <= self.now_s]
        if m.node is None or not ready or self.paused(n):
            return False
        at_s, action = m.work.pop(rng.choice(ready))
        key = action.attempt, action.step
        if self.faults and at_s == 0.0 and "slow" in self.setup.faults and rng.random() < (0.05 if isinstance(action, Hash) else 0.25):
            m.work.append((self.now_s + rng.choice([1.0, 4.0, 12.0]), action))
            self.count["slow"] += 1
            return True
        match action:
            case Hash():
                slot = self.slot(n, action.ref)
                stale = slot.gen != action.ref.gen or slot.state != "FILLED"
                if not stale and slot.sealed == slot.gen and slot.damaged:
                    self.count["damage noticed by a successor"] += 1
                    self.barred.add(key)  # who did not commit it yet is told that it is lost
                    if self.newest is not None and self.newest <= key:
                        self.newest, self.holders = None, set()
                if stale or (slot.sealed == slot.gen and slot.damaged):
                    self.send(n, Skipped(J, *key))
                    return True
                slot.sealed = slot.gen
                self.note_sealed(n, key)
                self.send(n, Hashed(J, *key, action.rank, action.ref))
            case DoPart() if action.errand == PROTECT:
                self.make_fragment(n, action)
            case DoPart():
                self.write_images(n, action)
            case WriteManifest():
                written = self.written[key]
                if {*written} != {*range(action.world_size)}:
                    raise Broken(f"I9: the manifest of {key} was asked for when only ranks {[*written]} had written")
                if self.faults and rng.random() < 0.1:
                    self.send(n, ErrandFailed(J, *key, "disk"))
                    return True
                if self.manifests.setdefault(key, dict(written)) != written:
                    raise Broken(f"I3: two contents of {key}: {self.manifests[key]} and {written}")
                self.send(n, ErrandDone(J, *key))
        return True

    def note_sealed(self, n: int, key: Key) -> None:
        """Of an old attempt too, as long as no restore has chosen: who was left behind may commit it."""
        if key[0] < max(self.choices) or not all(any(s.key == key and s.whole for s in rank.slots) for rank in self.machines[n].ranks):
            return
        self.sealed_by[key].add(n)
        newer = (self.newest is None or key > self.newest) and key > max(self.barred, default=(0, 0))
        if newer and self.sealed_by[key] == {*self.members[key[0]]}:
            self.newest = key
            x = self.machines
            self.holders = {i for i in self.members[key[0]] if x[i].alive and x[i].since <= key[0] and (i, key) not in self.spoiled}
            if not self.protects(key[0]):  # a node alone goes back no further than its own commits
                self.protected, self.protectors = None, set()

    def write_images(self, n: int, action: DoPart) -> None:
        m, key = self.machines[n], (action.attempt, action.step)
        snapshot = m.node.jobs[J].snapshots.get(key)
        if snapshot is not None and PERSIST in snapshot.since_s:
            for _, ref, _ in action.refs:
                slot = self.slot(n, ref)
                if slot.gen != ref.gen or not slot.held:
                    raise Broken(f"node {n}: {key} was released while it was being persisted")
        chance = self.rng.random() if self.faults else 1.0
        if chance < 0.1:
            return  # it hangs: the deadline ends it
        places = [self.slot(n, ref) for _, ref, _ in action.refs]
        if chance < 0.2 or any(s.damaged or s.key != key for s in places):
            self.send(n, ErrandFailed(J, *key, "disk"))
            return
        self.written[key].update({s.place[0]: s.tokens[s.place[0]] for s in places})
        self.send(n, PartDone(J, *key))

    def make_fragment(self, n: int, action: DoPart) -> None:
        """It takes the images of all members of the group, undamaged, and a free place."""
        m, key, rng = self.machines[n], (action.attempt, action.step), self.rng
        job = m.node.jobs[J]
        group = next((g for g in self.groups[key[0]] if n in g[1]), None)
        if self.faults and rng.random() < 0.05:
            return  # it hangs: the deadline ends it
        why, tokens = "", {}
        if group is None or key[0] != job.attempt or key not in job.snapshots:
            why = "attempt or snapshot is gone"
        for other in group[1] if not why else ():
            x = self.machines[other]
            held = x.node.jobs[J].snapshots.get(key) if x.node is not None and J in x.node.jobs else None
            apart = other != n and (self.paused(other) or (n, other) in self.cuts or (other, n) in self.cuts)
            if apart or not x.alive or held is None or held.state == FILLING or held.attempt != key[0]:
                why = "a peer"
                break
            places = [self.slot(other, i.ref) for i in held.images.values()]
            if len(places) < held.local_count or len(places) < self.setup.ranks:
                raise Broken(f"node {other} sealed {key} with {len(places)} of {self.setup.ranks} ranks")
            if any(s.damaged for s in places):
                why = "wrong checksums"
                self.count["part of damaged bytes"] += 1
            tokens |= {s.place[0]: s.tokens[s.place[0]] for s in places}
        free = [i for i, s in enumerate(m.fragments) if not s.held]
        if not why and (m.full or not free):
            why = "memory is full"
            self.count["no place for a fragment"] += 1
        if why:
            self.send(n, ErrandFailed(J, *key, why, PROTECT))
            return
        parity, members, _ = group
        numbers = {x: i for i, x in enumerate(self.members[key[0]])}
        ranks = self.setup.ranks
        shape = tuple(Member(tuple((numbers[x] * ranks + r, 1) for r in range(ranks))) for x in members)
        slot = m.fragments[free[0]]
        slot.begin(key, (-1, len(numbers) * ranks, ranks, m.number, len(numbers)), tokens)
        slot.state, slot.sealed = "FILLED", slot.gen
        slot.fragment = Fragment(len(numbers) * ranks, parity, members.index(n), shape)
        self.send(n, PartDone(J, *key, PROTECT, ref=SlotRef("f", free[0], slot.gen), fragment=slot.fragment))

    def tick(self, n: int) -> None:
        m = self.machines[n]
        if m.node is None or self.paused(n):
            return
        self.send(n, Tick())
        for snapshot in m.node.jobs[J].snapshots.values() if J in m.node.jobs else ():
            for errand, since_s in snapshot.since_s.items():
                promised = errand == PROTECT and snapshot.node != 0 and snapshot.node in snapshot.parts[errand]
                if self.now_s + m.skew_s - since_s > TIMEOUTS_S[errand] and not promised:
                    raise Broken(f"I11: node {n} is at {errand} of {snapshot.key} since {since_s}")

    # --- trainers -----------------------------------------------------------------------------------------------------------

    def post(self, n: int, thunk) -> None:
        """What a trainer does reaches its daemon, perhaps later."""
        self.machines[n].inbox.append(thunk) if self.paused(n) else thunk()

    def tell(self, n: int, r: int, event) -> None:
        if self.machines[n].ranks[r].joined:
            self.post(n, lambda: self.send(n, event))

    def begin_step(self, n: int, r: int, *, torn: bool = False) -> None:
        m, rank = self.machines[n], self.machines[n].ranks[r]
        if rank.filling >= 0:
            self.flip(n, r)
        rank.step += 1
        free = [i for i, s in enumerate(rank.slots) if s.free]
        if torn or not free:
            self.tell(n, r, Skipped(J, m.attempt, rank.step))
            return
        nodes, ranks = len(self.members[m.attempt]), self.setup.ranks
        mine = m.number * ranks + r
        self.tokens += 1
        if self.truth.setdefault(((m.attempt, rank.step), mine), self.tokens) != self.tokens:
            raise Broken(f"I3: rank {mine} takes step {rank.step} of attempt {m.attempt} twice")
        rank.slots[free[0]].begin((m.attempt, rank.step), (mine, nodes * ranks, ranks, m.number, nodes), {mine: self.tokens})
        rank.filling = free[0]

    def flip(self, n: int, r: int) -> None:
        m, rank = self.machines[n], self.machines[n].ranks[r]
        slot, rank.filling = rank.slots[rank.filling], -1
        if self.faults and self.rng.random() < 0.02:
            slot.state = "VOID"
            self.tell(n, r, Skipped(J, m.attempt, slot.key[1]))
        else:
            slot.state = "FILLED"
            if m.node is not None and rank.joined:
                self.post(n, lambda: self.scan(n, r))

    def scan(self, n: int, r: int) -> None:
        slots = self.machines[n].ranks[r].slots
        for i, s in sorted(enumerate(slots), key=lambda e: e[1].key):
            if s.held:
                rank, world, local, number, nodes = s.place
                self.send(n, Filled(J, *s.key, rank, world, local, number, nodes, SlotRef(f"r{r}", i, s.gen), 1))

    # --- daemons and machines -----------------------------------------------------------------------------------------------

    def kill_daemon(self, n: int) -> None:
        m = self.machines[n]
        m.node, m.work, m.inbox, m.zombie.state = None, [], [], "VOID"
        for rank in m.ranks:
            rank.joined = False
        for link in self.links:
            if n in link:
                self.links[link].clear()

    def start_daemon(self, n: int, *, adopts: bool | None = None) -> None:
        """`adopts`: a service manager kept the arenas; else ranks hand them back."""
        m = self.machines[n]
        m.node = self.make()
        m.lives += 1
        m.notices = dict.fromkeys(ERRANDS, 0)
        if self.rng.random() < 0.5 if adopts is None else adopts:
            for r in self.rng.sample(range(len(m.ranks)), len(m.ranks)):
                self.scan(n, r)
        for i, s in enumerate(m.fragments):  # the launcher or the service manager
            if s.held and s.damaged and self.rng.random() < 0.5:
                s.released = s.gen  # its header cannot be read
            elif s.held:
                self.send(n, FragmentFound(J, *s.key, SlotRef("f", i, s.gen), s.fragment))

    def restart_daemons(self) -> None:
        self.count["all daemons restarted"] += 1
        if "corrupt" in self.setup.faults and self.rng.random() < 0.5:  # and what a successor adopts is proven again
            self.corrupt()
        adopts = self.rng.random() < 0.7
        mine = [n for n in self.here() if not self.paused(n)]
        for n in mine:
            self.kill_daemon(n)
        for n in mine:
            self.start_daemon(n, adopts=adopts)
        if self.rng.random() < 0.5:
            for n in mine:
                for r in range(self.setup.ranks):
                    self.rejoin(n, r)

    def rejoin(self, n: int, r: int) -> None:
        m, rank = self.machines[n], self.machines[n].ranks[r]
        if m.node is None or rank.joined or m.attempt == 0 or self.paused(n):
            return
        self.scan(n, r)
        nodes = len(self.members[m.attempt])
        self.send(n, AttemptBegan(J, m.attempt, m.number, nodes, self.protects(m.attempt), rank.protected, r, self.setup.ranks))
        rank.joined = True
        self.scan(n, r)
        if rank.chose:
            self.send(n, Chosen(J, m.attempt, *self.choices[m.attempt]))
        self.greet_all(n)

    def lose_node(self, n: int) -> None:
        """A machine goes with all its memory."""
        self.count["nodes lost"] += 1
        self.kill_daemon(n)
        m = self.machines[n]
        self.machines[n] = Machine(None, self.empty_ranks(), m.number, attempt=0, alive=False, since=1 << 30, lives=m.lives)
        for rank, gone in zip(self.machines[n].ranks, m.ranks, strict=True):
            rank.joined, rank.step = False, gone.step
        self.releases = {(x, ref) for x, ref in self.releases if x != n}
        self.protectors.discard(n)
        self.holders.discard(n)
        self.spoiled = {(x, key) for x, key in self.spoiled if x != n}
        self.late = [(link, item) for link, item in self.late if n not in link]

    def lose_domain(self) -> None:
        """All machines of a rack at once. Where no group of the PROTECTED step says that its members share one, that is within what it survives."""
        if self.setup.domains and len(self.here()) > 1:
            rack = self.labels[self.rng.choice(self.here())]
            gone = [n for n in self.here() if self.labels[n] == rack]
            apart = all("share" not in why for _, _, why in self.groups[self.attempt])
            most = max((len({*gone} & {*group}) - max(1, parity) for parity, group, _ in self.groups[self.attempt]), default=0)
            if apart and most > 0:
                raise Broken(f"I8: {self.groups[self.attempt]} hide that {gone} stand in one rack")
            for n in gone[: len(self.here()) - 1]:
                self.lose_node(n)

    def pause(self, n: int) -> None:
        self.count["pauses"] += 1
        m = self.machines[n]
        m.paused_until_s, m.frozen = self.now_s + self.rng.choice([1.0, 3.0, 8.0]), self.rng.random() < 0.5

    def wake(self, n: int) -> None:
        """Everything that came meanwhile, at once: each trainer's and each peer's in order, between each other in any."""
        m = self.machines[n]
        m.paused_until_s = -1.0
        if m.node is None:
            return
        inbox, m.inbox = deque(m.inbox), []
        sources = [("inbox", len(inbox)), ("tick", 1), *((link, len(self.links[link])) for link in self.links if link[1] == n)]
        turns = [source for source, count in sources for _ in range(count)]
        self.rng.shuffle(turns)
        for source in turns:
            if source == "inbox":
                inbox.popleft()()
            elif source == "tick":
                self.tick(n)
            else:
                self.deliver(source)

    def corrupt(self) -> None:
        n = self.rng.choice(self.here())
        m = self.machines[n]
        places = [s for rank in m.ranks for s in rank.slots if s.whole] + [s for s in m.fragments if s.whole]
        if self.rng.random() < 0.5:
            places = [s for s in places if s.key in {self.protected, self.newest}]
        if places:
            self.damage(n, self.rng.choice(places))

    def damage(self, n: int, slot: Slot) -> None:
        slot.damaged = True
        self.count["damaged"] += 1
        self.spoiled.add((n, slot.key))
        if slot.key == self.newest:
            self.holders.discard(n)
        if slot.key == self.protected:
            self.protectors.discard(n)

    def haunt(self, n: int) -> None:
        """Somebody of an old attempt says something, or fills a slot of his own."""
        m, rng = self.machines[n], self.rng
        job = m.node.jobs.get(J) if m.node is not None and not self.paused(n) else None
        if job is None or job.attempt < 2:
            return
        self.count["haunted"] += 1
        attempt, step = rng.randrange(1, job.attempt), rng.randrange(1, 40)
        other, errand = rng.randrange(4), rng.choice(ERRANDS)
        key = attempt, step
        says = [
            PeerSealed(J, *key, other), Skipped(J, *key, other), Told(J, *key, errand), Asked(J, *key), ErrandDone(J, *key, PROTECT, here=False),
            ErrandFailed(J, *key, "late", PROTECT, here=False), PartDone(J, *key, PROTECT, other),
        ]  # fmt: skip
        if rng.random() < 0.7:
            self.send(n, rng.choice(says))
        elif m.zombie.free and n in self.members[attempt] and len(self.members[attempt]) > 1:
            number, nodes, ranks, step = self.members[attempt].index(n), len(self.members[attempt]), self.setup.ranks, step + 100
            m.zombie.begin((attempt, step), (number * ranks, nodes * ranks, ranks, number, nodes), {number * ranks: -1})
            m.zombie.state = "FILLED"
            self.send(n, Filled(J, attempt, step, number * ranks, nodes * ranks, ranks, number, nodes, SlotRef("z", 0, m.zombie.gen), 1))

    # --- a new attempt ------------------------------------------------------------------------------------------------------

    def new_attempt(self) -> None:
        """Trainers die, who is there gathers, all restore from one rung and snapshot it at once; again, where somebody is lost meanwhile."""
        for _ in range(20):
            if self.restart():
                return
        raise Broken("no attempt ever begins")

    def gathering(self) -> list[int]:
        rng, s = self.rng, self.setup
        for n, m in enumerate(self.machines):
            if not m.alive and self.faults and rng.random() < 0.4:
                m.alive = True  # an empty one takes its place
        here = [n for n in self.members[self.attempt] if self.machines[n].alive]
        here += [n for n, m in enumerate(self.machines) if m.alive and n not in here]
        if self.faults and "zombie" in s.faults and len(here) > 1 and rng.random() < 0.15:
            here.remove(rng.choice(here))
            self.count["left behind"] += 1
        if rng.random() < 0.3:  # rank 0 came up elsewhere: nodes are renumbered
            rng.shuffle(here)
        return here

    def restart(self) -> bool:
        rng, s = self.rng, self.setup
        here = self.gathering()
        if not self.faults or rng.random() < 0.8:
            self.mend()
        for n in here:
            self.settle_machine(n)
        held = {i: self.machines[n].node.holdings(J) for i, n in enumerate(here)}
        failed = {f for n in here if J in self.machines[n].node.jobs for f in self.machines[n].node.jobs[J].failed}
        ladder = rungs(held, [Durable(a, st, len(t), f"a{a}s{st}") for (a, st), t in self.manifests.items()], failed)
        under_parity = guarded(held)
        self.promises(here, ladder)
        self.enter(self.attempt + 1, here)
        self.count["attempts"] += 1
        joins = [(n, r) for n in here for r in range(s.ranks)]
        rng.shuffle(joins)
        for number, n in enumerate(here):
            m = self.machines[n]
            m.number, m.attempt, m.since = number, self.attempt, min(m.since, self.attempt)
        quiet = not self.cuts & {(a, b) for a in here for b in here}
        for n, r in joins:
            m = self.machines[n]
            if m.node is None:
                self.start_daemon(n)
                quiet = False
            m.ranks[r].joined, m.ranks[r].chose, m.ranks[r].protected = True, False, None
            self.send(n, AttemptBegan(J, self.attempt, m.number, len(here), self.protects(self.attempt), None, r, s.ranks))
            self.scan(n, r)  # a keeper brought the arena back, if a new daemon is here
            quiet &= self.noise(here)
        self.greet_all()
        if self.interrupted():
            return False
        rung = self.climb(here, ladder, quiet=quiet)
        if self.interrupted() or (self.faults and rung is None and ladder and rng.random() < 0.5):  # or: the job ends with NotFound, and is started again
            return False
        source = rung.key if rung is not None and not rung.directory else None
        guard = under_parity if source is not None and under_parity is not None and under_parity <= source else None
        self.choices[self.attempt] = source, guard
        self.newest, self.protected = source, guard
        self.holders = {n for n in here if source and self.holds(n, source) and (n, source) not in self.spoiled}
        self.protectors = {n for n in here if guard and self.guards(n, guard) and (n, guard) not in self.spoiled}
        rng.shuffle(joins)
        for n, r in joins:
            self.noise(here)
            rank = self.machines[n].ranks[r]
            rank.step, rank.chose = (rung.step if rung else 0), True
            self.tell(n, r, Chosen(J, self.attempt, source, guard))
        for n in here:
            self.look(n)
        if rung is not None:
            self.rebuild(joins)
        return True

    def interrupted(self) -> bool:
        """A node is lost, or a trainer dies, before anything was chosen."""
        lost = self.faults and "node" in self.setup.faults and self.rng.random() < 0.1 and len(self.here()) > 1
        if lost:
            self.lose_node(self.rng.choice(self.here()))
            self.count["lost while restoring"] += 1
        return lost or (self.faults and self.rng.random() < 0.05)

    def rebuild(self, joins) -> None:
        """The restored step is snapshot at once, as the new attempt's: who is left protects it anew."""
        for n, r in joins:
            self.machines[n].ranks[r].step -= 1
            self.begin_step(n, r)

    def settle_machine(self, n: int) -> None:
        """Its trainers are dead; a Welcome waits for checksums."""
        m = self.machines[n]
        if self.paused(n):
            self.wake(n)
        if m.node is None:
            self.start_daemon(n, adopts=True)
        for r, rank in enumerate(m.ranks):
            for slot in rank.slots:
                if slot.state == "FILLING":
                    slot.state = "VOID"
            rank.filling = -1
            self.scan(n, r)
        self.unsettled.discard(n)
        if self.faults and "slow" in self.setup.faults and self.rng.random() < 0.15 and any(isinstance(a, Hash) for _, a in m.work):
            self.unsettled.add(n)  # it is given up after a while
            self.count["slow to settle"] += 1
            return
        faults, self.faults = self.faults, False
        while hashes := [i for i, (_, a) in enumerate(m.work) if isinstance(a, Hash)]:
            action = m.work.pop(hashes[0])[1]
            rest, m.work = m.work, [(0.0, action)]
            self.work(n)
            m.work += rest
        self.faults = faults

    def promises(self, here: list[int], ladder: list[Rung]) -> None:
        """I1, I5, I6: whether the ladder offers what it must."""
        keys, present = [r.key for r in ladder], {*here} - self.unsettled
        if self.newest is not None:
            makers = {*self.members[self.newest[0]]}
            if makers <= present & self.holders and max(keys, default=(0, 0)) < self.newest:
                raise Broken(f"I1: {self.newest} was sealed by all and is not offered: {keys}")
        if self.protected is not None and self.groups[self.protected[0]]:
            left = present & self.protectors
            whole = all(len({*group} - left) <= parity for parity, group, _ in self.groups[self.protected[0]])
            if whole and max(keys, default=(0, 0)) < self.protected:
                raise Broken(f"I1: {self.protected} was PROTECTED, only {sorted({*self.members[self.protected[0]]} - left)} are lost, and it is not offered: {keys}")
            self.count["offered after a loss"] += whole and not {*self.members[self.protected[0]]} <= left
        lives = {(n, self.machines[n].lives) for n in here}
        bad = [(r.attempt, r.step, r.source) in self.failures and bool(self.failures[r.attempt, r.step, r.source] & lives) for r in ladder]
        if bad != sorted(bad):
            raise Broken(f"I6: a rung that failed is offered before others: {[*zip(keys, bad, strict=True)]}")
        good = [k for k, b in zip(keys, bad, strict=True) if not b]
        known = {f for n in here for f in self.machines[n].node.jobs[J].failed} if all(J in self.machines[n].node.jobs for n in here) else set()
        if good and good[0] != max(k for r in ladder if (k := r.key) and (*k, r.source) not in known):
            raise Broken(f"I5: the ladder does not begin with the newest: {keys}")

    def picked(self, ladder: list[Rung]) -> list[Rung]:
        """`restore()`, `restore(step=...)` or `restore(fresh=True)`."""
        pick = self.rng.random() if self.faults else 1.0
        if not ladder or pick < 0.05:
            return []
        step = self.rng.choice(ladder).step
        return [r for r in ladder if r.step == step] if pick < 0.2 else ladder

    def climb(self, here: list[int], ladder: list[Rung], *, quiet: bool) -> Rung | None:
        newest = max((r.key for r in ladder), default=None)
        for rung in self.picked(ladder):
            why = self.stage(here, rung)
            if not why:
                self.count["restored from memory" if not rung.directory else "restored from the durable tier"] += 1
                self.count["decoded"] += bool(rung.remains)
                return rung
            damaged = why == "damaged"
            self.count["damaged rungs" if damaged else "failed rungs"] += 1
            if quiet and not damaged and why != "slow store" and rung.key == newest:  # older ones may go with the last news of the old attempt
                raise Broken(f"I2: {rung.key} was offered and cannot be restored: {why}")
            for n in here:
                for r in range(self.setup.ranks):
                    if self.machines[n].ranks[r].joined and self.machines[n].node is not None:
                        self.send(n, RestoreFailed(J, rung.attempt, rung.step, rung.source))
                        self.failures[rung.attempt, rung.step, rung.source].add((n, self.machines[n].lives))
        return None

    def stage(self, here: list[int], rung: Rung) -> str:
        """Have every image, proven; or why not."""
        if rung.directory:
            if self.faults and self.rng.random() < 0.05:
                return "slow store"
            self.prove(rung.key, self.manifests[rung.key])
            return ""
        links = {(a, b) for a in here for b in here if a != b}
        sources = {here[i] for i in rung.nodes.values()} | {here[i] for x in rung.remains for i in x.fragments.values()}
        if any(a in sources or b in sources for a, b in links & self.cuts):
            return "cut"
        read: dict[int, int] = {}
        for rank, number in rung.nodes.items():
            slot = self.readable(here[number], rung.key, rank)
            if isinstance(slot, str):
                return slot
            read |= {rank: slot.tokens[rank]}
        for rank in {*range(rung.world_size)} - {*rung.nodes}:
            remains = rung.remains_of(rank)
            if remains is None or len(remains.lost) > remains.parity:
                raise Broken(f"I2: {rung.key} was offered, and nothing gives rank {rank}")
            used = {p: n for p, n in remains.fragments.items() if p not in remains.lost}
            for n in used.values():
                slot = self.readable(here[n], rung.key, -1)
                if isinstance(slot, str):
                    return slot
                if any(slot.tokens[r] != read[r] for p, m in enumerate(remains.members) if p not in remains.lost for r, _ in m.images):
                    return "damaged"  # the checksums in the fragment are another image's
                read[rank] = slot.tokens[rank]
        self.prove(rung.key, read)
        return ""

    def readable(self, n: int, key: Key, rank: int) -> Slot | str:
        """What the daemon finds, verified. It reads nothing but what it sealed."""
        job = self.machines[n].node.jobs.get(J) if self.machines[n].node is not None else None
        slot = self.image(n, key, rank)
        snapshot = job.snapshots.get(key) if job else None
        known = key in job.fragments if rank < 0 and job else snapshot is not None and rank in snapshot.images and snapshot.state != FILLING
        if not known or slot is None:
            return "gone"
        if not slot.whole:
            raise Broken(f"I2: node {n} offered rank {rank} of {key} without checksums")
        return "damaged" if slot.damaged else slot

    def prove(self, key: Key, read: dict[int, int]) -> None:
        wrong = [rank for rank, token in read.items() if self.truth.get((key, rank)) != token]
        if wrong:
            raise Broken(f"I2: ranks {wrong} of {key} are restored from other bytes")

    def noise(self, here: list[int]) -> bool:
        """Whatever is on the way arrives, a daemon dies, a zombie says something; False if that may cost a restore its source."""
        rng, s = self.rng, self.setup
        for _ in range(rng.randrange(4)):
            if self.links:
                self.deliver(rng.choice([*self.links]))
        if not self.faults:
            return True
        n = rng.choice(here)
        if "zombie" in s.faults and rng.random() < 0.2:
            self.haunt(n)
        if "daemon" in s.faults and rng.random() < 0.1 / len(here):
            self.kill_daemon(n)
            self.start_daemon(n)
            return False
        return True

    # --- one event, chosen by chance ----------------------------------------------------------------------------------------

    def once(self) -> None:
        rng, s = self.rng, self.setup
        n = rng.randrange(len(self.machines))
        m = self.machines[n]
        r = rng.randrange(s.ranks)
        self.now_s += 0.1
        for i, x in enumerate(self.machines):
            if -1.0 < x.paused_until_s <= self.now_s:
                self.wake(i)
        dice = rng.random()
        if dice < 0.40:
            self.train(n, r)
        elif dice < 0.62:
            self.work(n)
        elif dice < 0.86:
            busy = [link for link, queue in self.links.items() if queue]
            for link in rng.sample(busy, min(len(busy), 1 + len(self.machines) // 3)):
                self.deliver(link)
        elif dice < 0.88:
            if self.late:
                self.heard(*self.late.pop(rng.randrange(len(self.late)))) if not self.paused(self.late[-1][0][1]) else None
        elif dice < 0.90:
            if self.links:
                self.greet(rng.choice([*self.links]), keep=True)
        elif dice < 0.915:
            self.tell(n, r, Asked(J, m.attempt, max(1, m.ranks[r].step - rng.randrange(2))))
        elif dice < 0.93:
            self.tick(n)
        elif dice < 0.95:
            if m.alive and not self.paused(n):
                self.start_daemon(n) if m.node is None else self.rejoin(n, r)
        elif dice < 0.985:
            fault = rng.choice([*s.faults]) if s.faults else ""
            self.fault(fault, n)
        elif dice < (0.989 if len(self.here()) == len(self.members[self.attempt]) else 1.0):
            self.new_attempt()

    def train(self, n: int, r: int) -> None:
        m = self.machines[n]
        if not m.alive or m.attempt == 0 or (self.paused(n) and m.frozen):
            return
        rank = m.ranks[r]
        if rank.filling >= 0 and self.rng.random() < 0.5:
            self.flip(n, r)
            return
        behind = m.attempt < self.attempt
        slowest = min(x.step for i in self.members[m.attempt] if self.machines[i].attempt in {m.attempt, 0} for x in self.machines[i].ranks)
        if rank.chose and rank.step <= slowest + 2 * behind:  # ranks of a job are within a step of each other
            self.begin_step(n, r, torn=self.rng.random() < (0.1 if m.full else 0.02))

    def fault(self, fault: str, n: int) -> None:
        rng, m = self.rng, self.machines[n]
        self.count[f"fault {fault}"] += 1
        match fault:
            case "daemon" if m.alive:
                self.kill_daemon(n) if m.node is not None else self.start_daemon(n)
            case "all" if rng.random() < 0.4:
                self.restart_daemons()
            case "node" if rng.random() < 0.3 and len(self.here()) > 1:
                if rng.random() < 0.3:
                    self.lose_domain()
                else:
                    for x in rng.sample(self.here(), min(len(self.here()) - 1, rng.choice([1, 1, 1, 2]))):
                        self.lose_node(x)
            case "pause" if m.alive and not self.paused(n):
                self.pause(n)
            case "cut" if len(self.machines) > 1:
                self.mend() if self.cuts else self.cut()
            case "corrupt" if rng.random() < 0.6:
                self.corrupt()
            case "full":
                m.full = not m.full
            case "clock":
                m.skew_s += rng.choice([2.0, 60.0, 10_000.0])
                self.tick(n)
            case "zombie":
                self.haunt(n)

    # --- and then it must go on ---------------------------------------------------------------------------------------------

    def settle(self) -> None:
        """Everything that is under way comes to its end."""
        for _ in range(300):
            busy = False
            for n in range(len(self.machines)):
                while self.work(n):
                    busy = True
            for link in self.links:
                while self.deliver(link):
                    busy = True
            if not busy:
                return
        raise Broken("I12: the nodes talk for ever")

    def heal(self) -> None:
        self.faults = False
        for n, m in enumerate(self.machines):
            m.full = False
            if m.paused_until_s > -1.0:
                self.wake(n)
            if m.alive and m.node is None:
                self.start_daemon(n)
        self.mend()
        self.late.clear()
        if len(self.here()) < len(self.members[self.attempt]):
            self.new_attempt()
        for n, m in enumerate(self.machines):
            for r in range(self.setup.ranks if m.alive else 0):
                self.rejoin(n, r)
        self.greet_all()
        self.settle()
        self.wait_out()

    def wait_out(self) -> None:
        """Longer than any deadline."""
        self.now_s += 1000.0
        for n in self.here():
            self.tick(n)
        self.settle()

    def march(self, steps: int) -> None:
        """All ranks take the same steps, everything arrives."""
        for _ in range(steps):
            top = max(rank.step for n in self.here() for rank in self.machines[n].ranks)
            for n in self.here():
                for r, rank in enumerate(self.machines[n].ranks):
                    if rank.filling >= 0:
                        self.flip(n, r)
                    rank.step = top
                    self.begin_step(n, r)
                    if rank.filling >= 0:
                        self.flip(n, r)
            self.settle()

    def redundant(self, key: Key) -> None:
        """I12: everybody who is left holds this step, or a newer one, with its fragment."""
        if self.protects(self.attempt) and not (self.protected is not None and self.protected >= key and {*self.here()} == self.protectors):
            raise Broken(f"I12: {key} is not protected, but {self.protected} by {self.protectors} of {self.here()}")

    def live(self) -> None:
        self.heal()
        self.march(1)
        first = max(rank.step for n in self.here() for rank in self.machines[n].ranks) + 1
        self.march(3)
        committed = [k for k, nodes in self.commits.items() if k[0] == self.attempt and k[1] >= first and nodes >= {*self.here()}]
        if not committed:
            raise Broken(f"I12: none of steps {first} to {first + 2} was committed")
        self.redundant((self.attempt, first))
        for n in self.here():
            self.tell(n, 0, Asked(J, self.attempt, first + 3))
        self.march(3)
        self.redundant((self.attempt, first + 3))
        if not any(k >= (self.attempt, first + 3) for k in self.done & {*self.manifests}):
            raise Broken(f"I12: nothing is persisted any more; {self.done}")

    def lose_and_rebuild(self) -> None:
        """After `live`: as many nodes as parity allows are lost, twice, without a training step between."""
        for _ in range(2):
            parity, group, _ = self.groups[self.attempt][0] if self.groups[self.attempt] else (0, [], "")
            if not parity:
                return
            step = self.protected[1]
            for n in self.rng.sample(group, min(parity, len(self.here()) - 1)):
                self.lose_node(n)
            self.new_attempt()
            source = self.choices[self.attempt][0]
            if source is None or source[1] < step:
                raise Broken(f"I12: step {step} was PROTECTED before the loss, and {source} is restored")
            for n in self.here():
                for r, rank in enumerate(self.machines[n].ranks):
                    if rank.filling < 0:
                        raise Broken(f"I12: no slot for the restored step on node {n}")
                    self.flip(n, r)
            self.settle()
            if self.commits[self.attempt, source[1]] != {*self.here()}:
                raise Broken(f"I12: the restored step {source[1]} is not committed by who is left")
            self.redundant((self.attempt, source[1]))
            self.count["rebuilt"] += 1


def simulate(seed: int, events: int = 0, *, setup: Setup | None = None, machine: type[Node] = Node) -> World:
    """One world, from its seed to its liveness. `events`: 0 for what suits its size."""
    world = World(seed, setup, machine)
    for _ in range(events or 250 + 40 * world.setup.nodes):
        world.once()
    world.live()
    if seed % 3 == 0:
        world.lose_and_rebuild()
    return world
