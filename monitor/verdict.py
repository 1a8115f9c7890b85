"""From findings to verdicts: what held, how sure it is, what follows from it. Pure.

                 seen in 2 further windows, or a probe agrees, or certain by itself
    suspected ----------------------------------------------------------------------> confirmed
        |                                                                                 |
        +--------- not seen, under half its threshold, for 3 windows -----> cleared <-----+
                                                                               |
    what comes back within the cool-down is the same verdict again, its flaps counted

A *key* is what makes two findings the same thing: a rank that is slow, the job's hang, the job's transfers. A *domain* is what is looked at together (steps,
pulses): one call of `window` is one window of all that is open in it.

Grade "evict" needs two that agree: a detector and a probe, or a detector and the state of the process. What follows is bounded by policy, by the number of evictions
an hour, and by a guard: what was restarted twice at the same step, for the same ranks and kind, will not get better by a third time.

Source: monitoring.md 4.5 (5), 4.8; ByteRobust and MegaScale for the order of actions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from statistics import median

from ckptd.monitor.report import Evidence, Finding, Probed, Verdict
from ckptd.monitor.settings import POLICIES, Settings

Key = tuple[str | int, ...]

FATAL = frozenset({"hang", "desync", "deadlock", "comm-hang", "crash", "stopped", "io-blocked"})
"""The job does not go on by itself."""
HARDWARE = frozenset({"compute-slow", "cpu-contention", "drift", "send-slow", "receive-slow"})
"""What another machine would not have."""
CERTAIN = frozenset({"crash", "desync", "nan", "divergence"})
"""Seen once is enough."""
LASTING = frozenset({"crash", "divergence"})
"""These are not cleared by silence: the attempt ends with them, or has to."""
CONFIDENCE = {"suspected": 0.6, "confirmed": 0.85, "cleared": 0.85}
PROBED_CONFIDENCE = 0.97
ILL = 0.08
"""A node whose health is known to be bad is the likelier culprit."""
RECENT_MAX = 64
EVIDENCE_MAX = 12


@dataclass(frozen=True, slots=True)
class Past:
    """Something done about a verdict, to be remembered over attempts: `Engine(..., past=...)`."""

    kind: str
    ranks: tuple[int, ...]
    step: int
    action: str
    wall_s: float


@dataclass(frozen=True, slots=True)
class Seen:
    """A finding and what it is the same thing as. `half`: only under its threshold, but not under half of it: neither confirms nor clears."""

    key: Key
    finding: Finding
    half: bool = False
    stuck: bool = False
    """Found because the job stands still, whatever its kind."""
    certain: bool = False
    """Its threshold is made of many windows, or it cannot be otherwise: confirmed at once."""


@dataclass(slots=True)
class Open:
    """A verdict that is being followed."""

    key: Key
    domain: str
    finding: Finding
    id: int
    since_s: float
    detected_s: float
    since_now_s: float
    state: str = "suspected"
    windows: int = 1
    quiet: int = 0
    flaps: int = 0
    cleared_now_s: float = 0.0
    probes: tuple[Probed, ...] = ()
    agrees: bool | None = None
    stuck: bool = False
    action: str = ""
    recommended: str = "report"
    extra: tuple[Evidence, ...] = ()
    told: Verdict | None = None


@dataclass
class Verdicts:
    """All verdicts of an attempt. `place_of`: rank -> (node, words). `lost`: records and reports that are missing, as a part of all, and their count."""

    job: str
    attempt: int
    settings: Settings
    place_of: Callable[[int], tuple[int, str]]
    past: list[Past] = field(default_factory=list)
    open: dict[Key, Open] = field(default_factory=dict)
    recent: list[Open] = field(default_factory=list)
    lost: tuple[float, int] = (0.0, 0)
    alarms_of: Callable[[int], Mapping[str, str]] = lambda _: {}
    """Node -> what is wrong with its health."""
    _ids: int = 0

    def window(self, domain: str, seen: Iterable[Seen], now_s: float, wall_s: float, *, windows: int = 1) -> list[Verdict]:
        """One window of a domain, as new as so many: what was seen in it. Returns verdicts that are new or changed."""
        by_key = {s.key: s for s in seen}
        changed = []
        for key, s in by_key.items():
            entry = self.open.get(key)
            if entry is None:
                if s.half:
                    continue
                entry = self._begin(domain, s, now_s, wall_s)
            else:
                self._again(entry, s, windows)
            changed.append(entry)
        for key, entry in list(self.open.items()):
            if entry.domain == domain and key not in by_key and entry.finding.kind not in LASTING:
                entry.quiet += 1
                if entry.quiet >= self.settings.clear_windows:
                    self._clear(entry, now_s)
                changed.append(entry)
        return self._told(changed, now_s, wall_s)

    def _begin(self, domain: str, s: Seen, now_s: float, wall_s: float) -> Open:
        entry = next((e for e in self.recent if e.key == s.key and now_s - e.cleared_now_s <= self.settings.cool_down_s), None)
        if entry is not None:
            self.recent.remove(entry)
            entry.flaps += 1
            entry.state, entry.windows, entry.quiet, entry.finding, entry.since_now_s = "suspected", 1, 0, s.finding, now_s
            entry.agrees, entry.probes = None, ()
        else:
            self._ids += 1
            entry = Open(s.key, domain, s.finding, self._ids, wall_s, wall_s, now_s, stuck=s.stuck)
        if s.certain or s.finding.kind in CERTAIN:
            entry.state = "confirmed"
        self.open[s.key] = entry
        return entry

    def _again(self, entry: Open, s: Seen, windows: int) -> None:
        entry.quiet = 0
        if s.half:
            return
        entry.windows += windows
        since = min(entry.finding.since_step, s.finding.since_step)
        entry.finding = _merged(entry, s.finding, since)
        if entry.state == "suspected" and (entry.windows > self.settings.confirm_windows or s.certain or s.finding.kind in CERTAIN):
            entry.state = "confirmed"

    def _clear(self, entry: Open, now_s: float) -> None:
        entry.state, entry.cleared_now_s = "cleared", now_s
        del self.open[entry.key]
        self.recent = [*self.recent, entry][-RECENT_MAX:]

    # --- probes, evidence, actions ---

    def probed(self, key: Key, probes: Sequence[Probed], now_s: float, wall_s: float) -> list[Verdict]:
        """Rates of the suspect and of its peers; they agree if the suspect's is under the peers' median by more than half of what it costs."""
        entry = self.open.get(key)
        if entry is None:
            return []
        entry.probes = (*entry.probes, *probes)[-64:]
        entry.agrees = agree(entry.finding, entry.probes)
        if entry.agrees and entry.state == "suspected":
            entry.state = "confirmed"
        return self._told([entry], now_s, wall_s)

    def agreed(self, key: Key, probes: Sequence[Probed], now_s: float, wall_s: float) -> list[Verdict]:
        """Probes that found the place are probes that agree."""
        entry = self.open.get(key)
        if entry is None:
            return []
        entry.probes, entry.agrees, entry.state = tuple(probes)[-64:], True, "confirmed"
        return self._told([entry], now_s, wall_s)

    def evidence(self, verdict_id: int, items: Sequence[Evidence], now_s: float, wall_s: float) -> list[Verdict]:
        """More evidence for a verdict: stacks, a node's health."""
        entry = next((e for e in self.open.values() if e.id == verdict_id), None)
        if entry is None:
            return []
        entry.extra = (*entry.extra, *items)[-EVIDENCE_MAX:]
        return self._told([entry], now_s, wall_s, force=True)

    def acted(self, verdict_id: int, action: str, wall_s: float) -> None:
        """What was done about a verdict."""
        for entry in (*self.open.values(), *self.recent):
            if entry.id == verdict_id:
                entry.action = action
                self.past.append(Past(entry.finding.kind, entry.finding.ranks, entry.finding.step, action, wall_s))
                self.past = self.past[-256:]
                if entry.told is not None:
                    entry.told = self._verdict(entry)

    def all(self) -> list[Verdict]:
        """Open and recent ones, oldest first."""
        entries = [e for e in (*self.recent, *self.open.values()) if e.told is not None]
        return [e.told for e in sorted(entries, key=lambda e: e.id) if e.told is not None]

    # --- making verdicts ---

    def _told(self, entries: Iterable[Open], now_s: float, wall_s: float, *, force: bool = False) -> list[Verdict]:
        told = []
        for entry in entries:
            self._recommend(entry, now_s, wall_s)
            verdict = self._verdict(entry)
            if force or _differs(entry.told, verdict):
                entry.told = verdict
                told.append(verdict)
        return told

    def _verdict(self, entry: Open) -> Verdict:
        f = entry.finding
        places = [self.place_of(r) for r in f.ranks]
        nodes = {node for node, _ in places if node >= 0}
        if f.kind == "link-slow" and f.peer >= 0:
            nodes.add(f.peer)
        extra = entry.extra
        if entry.flaps:
            extra = (*extra, Evidence(signal="times that it came back", value=float(entry.flaps)))
        if entry.agrees is not None:
            extra = (*extra, Evidence(signal="probe", value="agrees" if entry.agrees else "does not see it"))
        alarms = [(n, kind, text) for n in sorted(nodes) for kind, text in self.alarms_of(n).items()]
        extra = (*[Evidence(signal=f"health of node {n}: {kind}", value=text) for n, kind, text in alarms[:4]], *extra)
        return Verdict(
            id=entry.id, job=self.job, attempt=self.attempt, kind=f.kind, cause=f.cause, state=entry.state, ranks=f.ranks, nodes=tuple(sorted(nodes)),
            places=tuple(words for _, words in places), confidence=self._confidence(entry, ill=bool(alarms)), since_step=f.since_step, step=f.step, since_s=entry.since_s,
            detected_s=entry.detected_s, slowdown=f.slowdown, op=f.op, group=f.group, seq=f.seq, peer=f.peer, victims=f.victims,
            evidence=(*f.evidence, *extra)[: 2 * EVIDENCE_MAX], probes=entry.probes, grade=self._grade(entry), recommended=entry.recommended, action=entry.action,
            lost_records=self.lost[1],
        )  # fmt: skip

    def _confidence(self, entry: Open, *, ill: bool) -> float:
        sure = CONFIDENCE[entry.state] + (ILL if ill and entry.finding.kind in HARDWARE else 0.0)
        if entry.agrees or entry.finding.kind in CERTAIN:
            sure = PROBED_CONFIDENCE
        sure *= 0.7 + 0.3 * max(0.0, min(1.0, entry.finding.strength))
        if entry.agrees is False and entry.finding.kind in HARDWARE:
            sure *= 0.8
        part_lost = 0.0 if entry.finding.kind == "crash" else self.lost[0]
        return round(sure * (1.0 - min(0.6, 2.0 * part_lost)), 2)

    def _grade(self, entry: Open) -> str:
        f, s = entry.finding, self.settings
        if entry.state != "confirmed" or not f.ranks:
            return "report"
        if f.kind in ("crash", "stopped"):
            return "evict"
        lasted_s = self._now_s - entry.since_now_s
        least = s.evict_slow * (0.6 if entry.told is not None and entry.told.grade == "evict" else 1.0)  # not to and fro about the bound
        grave = f.kind in HARDWARE and f.slowdown >= least and bool(entry.agrees) and lasted_s >= s.evict_after_s
        return "evict" if grave else "report"

    _now_s: float = 0.0

    def _recommend(self, entry: Open, now_s: float, wall_s: float) -> None:
        self._now_s = now_s
        allowed = POLICIES.index(self.settings.policy)
        wanted = "report"
        if entry.state == "confirmed" and (entry.finding.kind in FATAL or entry.stuck) and entry.finding.kind != "undecided":
            wanted = "restart"
        elif entry.state == "confirmed" and self._grade(entry) == "evict":
            wanted = "evict"
        if wanted == "restart" and self._restarts(entry.finding) >= self.settings.restarts_max:
            wanted = "report"
        if wanted == "evict" and self._evictions(wall_s) >= self.settings.evictions_per_hour:
            wanted = "report"
        if wanted != "report" and POLICIES.index(wanted) > allowed:
            wanted = "snapshot" if allowed >= POLICIES.index("snapshot") else "report"
        entry.recommended = wanted

    def _restarts(self, f: Finding) -> int:
        return sum(p.action == "restart" and p.kind == f.kind and p.ranks == f.ranks and abs(p.step - f.step) <= 1 for p in self.past)

    def _evictions(self, wall_s: float) -> int:
        return sum(p.action == "evict" and abs(wall_s - p.wall_s) < 3600.0 for p in self.past)


def _merged(entry: Open, new: Finding, since: int) -> Finding:
    """The newest finding, with the first step of all; a place that probes have found is not forgotten for one that is less exact."""
    old = entry.finding
    if new.kind == "comm-slow" and old.kind in ("send-slow", "receive-slow", "link-slow"):
        kept = (old.kind, old.ranks, old.peer, old.cause, old.evidence)
        return _replace(new, since, kept)
    return _replace(new, since, (new.kind, new.ranks, new.peer, new.cause, new.evidence))


def _replace(f: Finding, since: int, place: tuple[str, tuple[int, ...], int, str, tuple[Evidence, ...]]) -> Finding:
    kind, ranks, peer, cause, evidence = place
    return Finding(
        kind=kind, ranks=ranks, step=f.step, since_step=since, strength=f.strength, cause=cause, group=f.group, op=f.op, seq=f.seq, slowdown=f.slowdown, peer=peer,
        victims=f.victims, evidence=evidence,
    )  # fmt: skip


def _differs(old: Verdict | None, new: Verdict) -> bool:
    """Whether the change is worth telling."""
    if old is None:
        return True
    same = (old.kind, old.state, old.ranks, old.peer, old.grade, old.recommended) == (new.kind, new.state, new.ranks, new.peer, new.grade, new.recommended)
    return not same or abs(old.confidence - new.confidence) >= 0.1


def agree(f: Finding, probes: Sequence[Probed]) -> bool | None:
    """Whether any kind of probe shows the suspects slower than their peers (or their own baseline). None: nothing to compare with."""
    answer = None
    for kind, outside in product(("compute", "memory"), (False, True)):
        alike = [p for p in probes if p.kind == kind and p.outside == outside and p.rate > 0]
        mine = [p for p in alike if p.rank in f.ranks]
        theirs = [p.rate for p in alike if p.rank not in f.ranks]
        if not mine or not theirs:
            continue
        bound = (1.0 - min(f.slowdown, 0.9) / 2) * median(theirs)
        slow = all(p.rate < bound for p in mine)
        answer = slow or bool(answer)
    return answer
