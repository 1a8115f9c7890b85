"""Rendezvous: which nodes run a job together, decided by the nodes themselves, in one epoch after the other. Pure: beats and the time in, actions out.

A *roster* is an epoch's members. Each daemon keeps one machine per job; its agent (the launcher of the node's workers) enters when it wants to be of the
next roster, and is told when there is one. Nobody hosts anything: the nodes of the last roster elect the next, so whichever of them is lost, the others go on.

Theory of operation. Daemons send each other beats, which hold all that the sender knows that matters: the state, not its changes, so a beat that is lost, doubled or
late does no harm. A roster is chosen by single-decree Paxos per epoch (Lamport, "Paxos Made Simple", 2001), whose acceptors, the *electors*, are the
members of the last roster: a majority of them, or half of them with the first. So two halves of a split network never both go on, and a coordinator may
die at any moment. Epoch 0's electors are the seeds: the addresses that every node was told to begin with. Votes are kept on disk (`Save` comes before the beats
that show it): a daemon that comes back is the same elector; one that lost its memory has another `life` and is none. (The seeds of epoch 0 have no life yet: a majority
of them that rebooted could begin the job a second time, if the others are out of their reach. Where fewer than half of the nodes may not begin one - MIN more than
half of MAX - that is impossible.)

The first elector that waits proposes, as soon as every elector waits too or is gone: those that wait and hear each other, in the last roster's order, newcomers after
them. A roster is told to agents when all its members were heard to have it; if one is gone by then, the next epoch begins at once.

Invariants (tests/core/test_rendezvous.py)
- R1 an epoch has one roster, whoever learned it when
- R2 a majority of a roster's members (or half with the first) voted for the next
- R3 an agent is told of a roster only while it waits, and never of an older one than before
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Annotated

import msgspec
from msgspec import Meta

from ckptd.errors import BadArgument

BEAT_S = 0.25
LOST_S = 4.0
"""A member that was not heard for this long is gone. A daemon that dies is replaced within about a second, and a loaded machine is late by less."""
REFUSED_S = 1.0
"""The same, where its address refuses connections while others wait: its daemon is dead, by its kernel's own word."""
LATE_S = 30.0
"""A member that is heard, and whose agent does not come while all others wait."""
RETRY_S = 0.5
"""A proposal that is not through by then is made again, under a higher ballot; times 1 + the proposer's place, lest two duel for ever."""
GROW_S = 1.0
"""A newcomer has waited for this long before running members make room for it: so several come in at once."""
SLEPT_S = 1.0
"""A daemon that let no time pass for so long was stopped, or starved."""
NUMBERS = 1 << 32
"""More beats than a daemon sends in its life: so many numbers ahead begins its successor."""
UNHEARD_MAX = 256
"""Addresses that others named, and where nobody was heard yet, that are tried at a time."""
UNHEARD_S = 10.0
"""An address that somebody named and at which nobody is."""
FORGET_S = 60.0
"""A daemon without an agent for the job that has heard nobody of it for this long keeps no memory of it: the job may begin anew, elsewhere."""

AWAY, WAITING, JOINED, RUNNING = "away", "waiting", "joined", "running"
"""No agent; it wants to be of the next roster; it is of this one, and will be told when all members know; it was told."""

SEEDS_MAX = 64
NODES_MAX = 4096
"""Of a job, and that are known of."""
Count = Annotated[int, Meta(ge=0, le=1 << 53)]
"""Whatever is counted: a peer's word of it never comes near an end at which it could not be written down."""
TEXT_MAX = 255
PORTS = 1 << 16
LAST_CALL_MAX_S = 86400.0
Text = Annotated[str, Meta(max_length=TEXT_MAX)]
Port = Annotated[int, Meta(ge=0, lt=PORTS)]

Ballot = tuple[Count, Text]
"""(round, life of who proposes)"""
NO_BALLOT: Ballot = (0, "")


class Member(msgspec.Struct, frozen=True, array_like=True):
    """A node of a roster."""

    address: Text
    """Of its daemon."""
    life: Text = ""
    """Of its daemon's memory of this job; "" of a seed: whoever is there."""
    entry: Count = 0
    """How often its agent has entered: what it said then is below."""
    workers: Annotated[int, Meta(ge=1, le=NODES_MAX)] = 1
    host: Text = ""
    """Where its agent's store and its first worker's are reached, should it be the first member."""
    agent_port: Port = 0
    worker_port: Port = 0


Members = Annotated[tuple[Member, ...], Meta(max_length=NODES_MAX)]
Names = Annotated[tuple[Text, ...], Meta(max_length=NODES_MAX)]


class Roster(msgspec.Struct, frozen=True, array_like=True):
    """The members of an epoch, in order."""

    epoch: Count
    members: Members

    def position(self, life: str) -> int | None:
        """Where a member stands; None if it is none."""
        return next((i for i, m in enumerate(self.members) if m.life == life), None)

    def elector(self, who: Member) -> int | None:
        """Which elector of the next roster somebody is."""
        return next((i for i, m in enumerate(self.members) if m.life == who.life or (not m.life and m.address == who.address)), None)

    def is_quorum(self, places: Iterable[int]) -> bool:
        """Whether these electors decide: more than half, or half with the first."""
        votes = {*places}
        return 2 * len(votes) > len(self.members) or (2 * len(votes) == len(self.members) and 0 in votes)


class Vote(msgspec.Struct, frozen=True, array_like=True):
    """What an elector promised and accepted for the next epoch."""

    promised: Ballot = NO_BALLOT
    ballot: Ballot = NO_BALLOT
    accepted: Members = ()


class Proposal(msgspec.Struct, frozen=True, array_like=True):
    """A ballot, and, once a quorum promised, its members."""

    ballot: Ballot
    members: Members = ()


class Beat(msgspec.Struct, frozen=True, array_like=True):
    """All that a node has to say about a job."""

    me: Member
    number: Count
    """Counts this life's beats: an older one that comes later is not heard."""
    phase: Text
    running: Count
    """The epoch that its agent runs in, or is to."""
    epoch: Count
    members: Members
    """Of that epoch's roster; left out where the other knows it."""
    vote: Vote
    proposal: Proposal | None
    hears: Names
    """Lives that it hears."""
    known: Names
    """Addresses of those."""
    closed: bool


class Memory(msgspec.Struct, frozen=True):
    """What outlives a daemon."""

    life: Text
    roster: Roster
    vote: Vote
    number: Count = 0


class Wish(msgspec.Struct, frozen=True, kw_only=True):
    """What an agent says when it enters."""

    seeds: tuple[str, ...]
    nodes_min: int = 1
    nodes_max: int = 1
    last_call_s: float = 5.0
    """How long a first roster that could be larger waits for more."""
    workers: int = 1
    host: str = ""
    agent_port: int = 0
    worker_port: int = 0

    def check(self) -> None:
        """Raise BadArgument for what cannot be."""
        wrong = []
        if not 1 <= self.nodes_min <= self.nodes_max <= NODES_MAX:
            wrong.append(f"{self.nodes_min} to {self.nodes_max} nodes (1 to {NODES_MAX})")
        if not 1 <= self.workers <= NODES_MAX:
            wrong.append(f"{self.workers} workers (1 to {NODES_MAX})")
        if not 0 <= self.last_call_s <= LAST_CALL_MAX_S:
            wrong.append(f"a last call of {self.last_call_s} s (0 to {LAST_CALL_MAX_S:.0f})")
        if not 0 <= self.agent_port < PORTS or not 0 <= self.worker_port < PORTS:
            wrong.append(f"ports {self.agent_port} and {self.worker_port}")
        if len(self.host) > TEXT_MAX or len(self.seeds) > SEEDS_MAX or any(len(s) > TEXT_MAX for s in self.seeds):
            wrong.append(f"{len(self.seeds)} seeds (at most {SEEDS_MAX}), and names of at most {TEXT_MAX} letters")
        if wrong:
            msg = "a rendezvous with " + "; ".join(wrong) + ": this cannot be"
            raise BadArgument(msg)


@dataclass(frozen=True, slots=True)
class Send:
    """Send a beat; a newer one to the same address takes its place."""

    address: str
    beat: Beat


@dataclass(frozen=True, slots=True)
class Save:
    """Keep this where the next daemon finds it, before anything is sent."""

    memory: Memory


@dataclass(frozen=True, slots=True)
class Gathered:
    """Tell the agent: this is the roster."""

    roster: Roster
    position: int


@dataclass(frozen=True, slots=True)
class Regroup:
    """Tell the agent, which runs: stop your workers and enter. "" takes it back."""

    why: str


@dataclass(frozen=True, slots=True)
class Closed:
    """Tell the agent: the job is over."""


Action = Send | Save | Gathered | Regroup | Closed


@dataclass(slots=True)
class _Other:
    """What was heard of a life."""

    beat: Beat
    heard_s: float
    waits_since_s: float | None = None


NOBODY = Roster(0, ())
UNDECIDED = Vote()


@dataclass
class Rendezvous:
    """One node's machine for one job."""

    me: Member
    roster: Roster = NOBODY
    vote: Vote = UNDECIDED
    number: int = 0
    wish: Wish | None = None
    phase: str = AWAY
    running: int = 0
    closed: bool = False
    others: dict[str, _Other] = field(default_factory=dict)
    addresses: dict[str, float] = field(default_factory=dict)
    """Where to send beats -> since when its address is known."""
    _refused_s: dict[str, float] = field(default_factory=dict)
    _proposal: Proposal | None = None
    _proposed_s: float = 0.0
    _round: int = 0
    _adopted_s: float = 0.0
    _entered_s: float = 0.0
    _ready_s: float | None = None
    _ticked_s: float | None = None
    _beaten_s: float = float("-inf")
    _heard_s: float = 0.0
    _said: str = ""
    _saved: Memory | None = None

    @classmethod
    def recall(cls, address: str, memory: Memory) -> Rendezvous:
        """The machine of a daemon that came back."""
        return cls(Member(address, memory.life), memory.roster, memory.vote, memory.number + NUMBERS)

    # --- events ---------------------------------------------------------------------------------------------------------------

    def enter(self, wish: Wish, now_s: float, *, running: int = 0) -> list[Action]:
        """The agent wants to be of the next roster; or (`running`) it is of that epoch's already, and tells a daemon that came back."""
        wish = msgspec.structs.replace(wish, seeds=wish.seeds or (self.me.address,))
        if self.roster.epoch == 0:
            self.roster = Roster(0, tuple(Member(a) for a in wish.seeds))
        self.wish = wish
        self._said = ""
        self._heard_s = now_s
        for address in wish.seeds:
            self.addresses.setdefault(address, now_s)
        if running:
            self.phase, self.running = RUNNING, running
        else:
            self.me = Member(self.me.address, self.me.life, self.me.entry + 1, wish.workers, wish.host, wish.agent_port, wish.worker_port)
            self.phase, self._entered_s = WAITING, now_s
        return self._go(now_s, beat=True)

    def leave(self, now_s: float) -> list[Action]:
        """The agent is gone, or has finished."""
        self.phase, self.wish = AWAY, None
        self._proposal = None
        return self._go(now_s, beat=True)

    def close(self, now_s: float) -> list[Action]:
        """The job is over, for everybody."""
        self.closed = True
        return self._go(now_s, beat=True)

    def heard(self, beat: Beat, now_s: float) -> list[Action]:
        """A beat came in."""
        self._wake(now_s)
        if beat.me.life == self.me.life or not beat.me.life:
            return []
        known = self.others.get(beat.me.life)
        if known is not None and known.beat.number >= beat.number:
            return []
        for life in [life for life, o in self.others.items() if o.beat.me.address == beat.me.address and life != beat.me.life]:
            del self.others[life]  # who lived there before is no more
        if known is None and len(self.others) >= NODES_MAX:
            return []
        waits = beat.phase == WAITING
        since_s = known.waits_since_s if known is not None and waits else None
        self.others[beat.me.life] = _Other(beat, now_s, (now_s if since_s is None else since_s) if waits else None)
        self._heard_s = now_s
        self._refused_s.pop(beat.me.address, None)
        for address in (beat.me.address, *beat.known):
            if address != self.me.address and (address == beat.me.address or len(self.addresses) < len(self.others) + UNHEARD_MAX):
                self.addresses.setdefault(address, now_s)
        changed = known is None
        if beat.epoch > self.roster.epoch and beat.members:
            self._adopt(Roster(beat.epoch, beat.members), now_s)
            changed = True
        if beat.closed and beat.epoch == self.roster.epoch and self.roster.position(beat.me.life) is not None:
            changed, self.closed = changed or not self.closed, True
        changed |= self._consider(beat)
        changed |= known is not None and (known.beat.phase, known.beat.epoch) != (beat.phase, beat.epoch)
        changed |= beat.epoch < self.roster.epoch and bool(self.roster.members)
        return self._go(now_s, beat=changed)

    def refused(self, address: str, now_s: float) -> list[Action]:
        """Nobody listens at this address."""
        self._refused_s.setdefault(address, now_s)
        return []

    def tick(self, now_s: float) -> list[Action]:
        """Time passed: less than BEAT_S since the last tick, unless this daemon slept."""
        self._wake(now_s)
        self._ticked_s = now_s
        self._forget(now_s)
        return self._go(now_s, beat=False)

    def is_idle(self, now_s: float) -> bool:
        """Whether this may be forgotten."""
        return self.phase == AWAY and (self.closed or now_s - self._heard_s > FORGET_S)

    def _forget(self, now_s: float) -> None:
        """Who was not heard for long, or never, and is neither member nor seed."""
        needed = {m.address for m in self.roster.members} | {*(self.wish.seeds if self.wish is not None else ())}
        self.others = {
            life: o for life, o in self.others.items() if now_s - o.heard_s < FORGET_S or o.beat.me.address in needed
        }
        needed |= {o.beat.me.address for o in self.others.values()}
        self.addresses = {a: since_s for a, since_s in self.addresses.items() if a in needed or now_s - since_s < UNHEARD_S}

    def _wake(self, now_s: float) -> None:
        """Who slept must not judge others for it."""
        if self._ticked_s is not None and (slept_s := now_s - self._ticked_s - SLEPT_S) > 0:
            for other in self.others.values():
                other.heard_s += slept_s
            self._refused_s.clear()
            self._ticked_s = now_s - SLEPT_S

    # --- what follows -----------------------------------------------------------------------------------------------------------

    def _go(self, now_s: float, *, beat: bool) -> list[Action]:
        """Everything that follows from what is known now."""
        told: list[Action] = []
        before = (self.roster.epoch, self.phase, self.vote, self._proposal)
        if self.closed and self.phase != AWAY:
            if self._said != "closed":
                self._said = "closed"
                told.append(Closed())
        elif self.phase in {WAITING, JOINED}:
            self._elect(now_s)
            told += self._confirm(now_s)
        elif self.phase == RUNNING:
            why = self._why_regroup(now_s)
            if why != self._said:
                self._said = why
                told.append(Regroup(why))
        beat |= before != (self.roster.epoch, self.phase, self.vote, self._proposal)
        actions: list[Action] = []
        if beat or now_s - self._beaten_s >= BEAT_S:
            self._beaten_s = now_s
            actions = [*self._beats(now_s)]
        memory = Memory(self.me.life, self.roster, self.vote)
        if memory != self._saved and self.roster.members:
            self._saved = memory
            actions.insert(0, Save(msgspec.structs.replace(memory, number=self.number)))
        return [*actions, *told]

    def _beats(self, now_s: float) -> Iterable[Send]:
        heard = [o for o in self.others.values() if self._is_heard(o, now_s)]
        by_address = {o.beat.me.address: o for o in self.others.values()}
        hears, known = tuple(sorted(o.beat.me.life for o in heard)), tuple(sorted(o.beat.me.address for o in heard))
        for address in [a for a in self.addresses if a != self.me.address]:
            self.number += 1
            other = by_address.get(address)
            informed = other is not None and other.beat.epoch >= self.roster.epoch
            members = () if informed or self.roster.epoch == 0 else self.roster.members
            yield Send(
                address,
                Beat(
                    self.me, self.number, self.phase, self.running, self.roster.epoch, members, self.vote, self._proposal, hears, known, self.closed
                ),
            )  # fmt: skip

    def _adopt(self, roster: Roster, now_s: float) -> None:
        """This roster was chosen."""
        self.roster, self.vote, self._proposal = roster, UNDECIDED, None
        self._round, self._adopted_s, self._ready_s = 0, now_s, None
        for m in roster.members:
            if m.address != self.me.address:
                self.addresses.setdefault(m.address, now_s)
        if self.phase in {WAITING, JOINED}:
            self.phase = JOINED if self.me in roster.members else WAITING
            self.running = roster.epoch if self.phase == JOINED else self.running

    def _consider(self, beat: Beat) -> bool:
        """Elector: promise and accept, as a proposal's ballot allows."""
        p = beat.proposal
        if p is None or beat.epoch != self.roster.epoch or self.roster.elector(self.me) is None or self.roster.elector(beat.me) is None:
            return False
        return self._vote(p)

    def _vote(self, p: Proposal) -> bool:
        before = self.vote
        if p.ballot > self.vote.promised:
            self.vote = msgspec.structs.replace(self.vote, promised=p.ballot)
        if p.members and p.ballot >= self.vote.promised:
            self.vote = Vote(p.ballot, p.ballot, p.members)
        self._round = max(self._round, self.vote.promised[0])
        return self.vote != before

    def _elect(self, now_s: float) -> None:
        """Propose if it is ours to, and carry a proposal through."""
        if self.phase == JOINED:
            if not self._is_broken(now_s):
                return
            self.phase, self._entered_s = WAITING, now_s
        place = self.roster.elector(self.me)
        if place is None or not self._is_ready(place, now_s):
            self._proposal = None
            return
        if self._proposal is None or now_s - self._proposed_s > RETRY_S * (1 + place):
            self._round = 1 + max([self._round, *(o.beat.vote.promised[0] for o in self.others.values() if o.beat.epoch == self.roster.epoch)])
            self._proposal, self._proposed_s = Proposal((self._round, self.me.life)), now_s
            self._vote(self._proposal)
        votes = {place: self.vote, **{i: o.beat.vote for o in self.others.values() if o.beat.epoch == self.roster.epoch and (i := self.roster.elector(o.beat.me)) is not None}}  # fmt: skip
        p = self._proposal
        if not p.members and self.roster.is_quorum(i for i, v in votes.items() if v.promised == p.ballot):
            bound = max((v for v in votes.values() if v.promised == p.ballot and v.accepted), key=lambda v: v.ballot, default=None)
            self._proposal = p = Proposal(p.ballot, bound.accepted if bound is not None else self._candidates(now_s))
            self._vote(p)
            votes[place] = self.vote
        if p.members and self.roster.is_quorum(i for i, v in votes.items() if v.ballot == p.ballot):
            self._adopt(Roster(self.roster.epoch + 1, p.members), now_s)

    def _is_ready(self, place: int, now_s: float) -> bool:
        """Whether a roster is to be proposed, by us."""
        found = len(self._candidates(now_s))
        if self.wish is None or found < self.wish.nodes_min or not self._is_our_turn(place, now_s):
            self._ready_s = None
            return False
        if self.roster.epoch > 0 or found >= self.wish.nodes_max:
            return True
        self._ready_s = now_s if self._ready_s is None else self._ready_s
        return now_s - self._ready_s >= self.wish.last_call_s

    def _is_our_turn(self, place: int, now_s: float) -> bool:
        """All electors that are there wait, those before us cannot hear us, and there are enough to decide."""
        quorum, waited_s = {place}, now_s - self._waiting_since(now_s)
        for i, elector in enumerate(self.roster.members):
            other = self._other_at(i, elector)
            if i == place:
                continue
            if other is None and self.roster.epoch > 0 and self._may_come(elector, now_s):
                return False
            if other is None or not self._is_heard(other, now_s):
                continue
            quorum.add(i)  # a daemon whose launcher is gone has its vote still
            if other.beat.phase == AWAY:
                continue
            waits = other.beat.phase == WAITING and other.beat.epoch == self.roster.epoch
            if (i < place and self.me.life in other.beat.hears) if waits else waited_s < LATE_S:
                return False
        return self.roster.is_quorum(quorum)

    def _waiting_since(self, now_s: float) -> float:
        """Since when all is done that can be: the last of those that wait began to."""
        others = [o.waits_since_s for o in self.others.values() if o.waits_since_s is not None and self._is_heard(o, now_s)]
        return max(self._entered_s, *others) if others else self._entered_s

    def _candidates(self, now_s: float) -> tuple[Member, ...]:
        """Those that wait and hear each other: members of the last roster first, newcomers by address."""
        waiting = {o.beat.me.life: o for o in self.others.values() if o.beat.phase == WAITING and o.beat.epoch == self.roster.epoch and self._is_heard(o, now_s)}  # fmt: skip
        lives = [self.me.life, *waiting]
        place = {life: p for life in lives if (p := self.roster.elector(self.me if life == self.me.life else waiting[life].beat.me)) is not None}
        order = sorted(lives, key=lambda life: (place.get(life, len(self.roster.members)), self._address(life), life))
        chosen: list[str] = [self.me.life]
        for life in [life for life in order if life != self.me.life]:
            hears = {*waiting[life].beat.hears}
            if len(chosen) < (self.wish.nodes_max if self.wish else 1) and all(
                c in hears and (c == self.me.life or life in waiting[c].beat.hears) for c in chosen
            ):
                chosen.append(life)
        return tuple(self.me if life == self.me.life else waiting[life].beat.me for life in order if life in chosen)

    def _address(self, life: str) -> str:
        return self.me.address if life == self.me.life else self.others[life].beat.me.address

    def _confirm(self, now_s: float) -> list[Action]:
        """All members are known to have the roster: tell the agent."""
        if self.phase != JOINED or self._is_broken(now_s):
            return []
        for m in self.roster.members:
            other = self.others.get(m.life)
            if m.life != self.me.life and (other is None or other.beat.running < self.roster.epoch):
                return []
        self.phase, self._said = RUNNING, ""
        place = self.roster.position(self.me.life)
        return [Gathered(self.roster, -1 if place is None else place)]

    # --- judgements ---------------------------------------------------------------------------------------------------------------

    def _is_heard(self, other: _Other, now_s: float) -> bool:
        return now_s - other.heard_s <= self._limit(other.beat.me.address)

    def _limit(self, address: str) -> float:
        """For how long silence is borne."""
        urgent = self.phase == WAITING or any(o.beat.phase == WAITING for o in self.others.values())
        return REFUSED_S if urgent and address in self._refused_s else LOST_S

    def _other_at(self, place: int, elector: Member) -> _Other | None:
        if elector.life:
            return self.others.get(elector.life)
        return next((o for o in self.others.values() if self.roster.elector(o.beat.me) == place), None)

    def _may_come(self, elector: Member, now_s: float) -> bool:
        """A member of which nothing was heard yet (a new daemon's others) may yet be there."""
        reborn = any(o.beat.me.address == elector.address for o in self.others.values())
        since_s = max(self._adopted_s, self.addresses.get(elector.address, now_s))
        return not reborn and now_s - since_s <= self._limit(elector.address)

    def _lost(self, now_s: float) -> Iterable[str]:
        """Members of the roster that are not with us, and why."""
        for m in self.roster.members:
            if m.life == self.me.life:
                continue
            other = self.others.get(m.life)
            if other is None:
                if not self._may_come(m, now_s):
                    yield f"{m.address} is not there"
            elif not self._is_heard(other, now_s):
                yield f"{m.address} was not heard for {now_s - other.heard_s:.1f} s"
            elif other.beat.epoch >= self.roster.epoch and other.beat.phase in {AWAY, WAITING}:
                yield f"{m.address} has no agent" if other.beat.phase == AWAY else f"{m.address} waits for the next roster"

    def _is_broken(self, now_s: float) -> bool:
        return any(True for _ in self._lost(now_s))

    def _why_regroup(self, now_s: float) -> str:
        """Why an agent that runs is to stop its workers; "" if it is not."""
        if self.running < self.roster.epoch:
            return f"epoch {self.roster.epoch} began without this node"
        lost = [*self._lost(now_s)]
        if lost:
            return "; ".join(lost[:3]) + (f"; and {len(lost) - 3} more" if len(lost) > 3 else "")
        newcomers = self._newcomers(now_s)
        return f"{', '.join(newcomers)} would join" if newcomers else ""

    def _newcomers(self, now_s: float) -> Sequence[str]:
        """First member: those that wait, and hear all members, and are heard by them, if there is room."""
        room = (self.wish.nodes_max if self.wish else 0) - len(self.roster.members)
        if room <= 0 or self.roster.position(self.me.life) != 0:
            return []
        members = {m.life for m in self.roster.members}
        hear = [{*self.others[life].beat.hears} for life in members if life in self.others]
        found = [
            o.beat.me.address
            for life, o in self.others.items()
            if life not in members and o.waits_since_s is not None and now_s - o.waits_since_s >= GROW_S and self._is_heard(o, now_s)
            and o.beat.epoch == self.roster.epoch and members <= {*o.beat.hears} and all(life in h for h in hear)
        ]  # fmt: skip
        return sorted(found)[:room]
