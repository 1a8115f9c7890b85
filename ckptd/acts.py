"""What a launcher does when the job's coordinator says Act: restart the workers, or go on without some of them. Pure: `decide` is all of the judgement.

    daemon --wire.Act--> Keeper (thread) --> Agent (main thread, between two looks at its workers) --> decide --> Decision --> wire.Acted

Every node's launcher is given the same Act, and judges it by the same roster; so all of them come to the same end without talking about it.

Rules
- An Act is for the attempt that it names. One that came before these workers were started, or that names an attempt that is over, is refused.
- The operator's word (`--on-fault`) bounds what is done: "report" and "snapshot" do nothing here, "restart" never evicts.
- Evicted is for the rest of this launcher's life: a *slot* is a worker's place on its node (0-based, as the launcher was started), and an evicted slot is never filled
  again by itself. The operator takes it back by starting the launcher anew.
- A node all of whose slots are evicted leaves: its launcher ends with status 0, its daemon stays and votes. To come back, `ckptd run` is started there again.
- Where going on smaller is impossible (too few nodes, nobody left, nothing in memory or on disk that outlives a node) all is restarted instead, and the answer says so.
- The nodes that an eviction touches go first; the others follow when the rendezvous tells them to (by themselves after FOLLOW_S): a node that met the next roster
  before it heard of the eviction would take the evicted along.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from ckptd.core import wire

POLICIES = ("report", "snapshot", "restart", "evict")
"""What may follow from a verdict, each with all before it."""
FOLLOW_S = 10.0
"""A node that an eviction does not touch restarts by itself if the rendezvous has not told it to within this time."""

ANY = 1 << 20
"""More nodes than there are."""

RESTART, SHRINK, LEAVE, FOLLOW, NOTHING = "restart", "shrink", "leave", "follow", "nothing"


@dataclass(frozen=True, kw_only=True)
class View:
    """A launcher's situation. `counts`: workers per node, in order of their ranks; `mine`: this node's place among them."""

    policy: str
    floor: int
    """The newest attempt that was known when these workers were started: theirs is a later one. 0: none was known."""
    slots: tuple[int, ...]
    """Of its workers, in order of their local ranks."""
    counts: tuple[int, ...]
    mine: int = 0
    nodes_min: int = 1
    may_leave: bool = True
    """Whether its rendezvous lets a node go while the others go on."""
    spared: int = 0
    """How many nodes' memory may go and leave some snapshot whole: parity's m where one is PROTECTED, any number where one is persisted."""


@dataclass(frozen=True)
class Decision:
    """What to do, and what to answer. `slots`: those that are left here. `done`: whether it is what was asked for."""

    kind: str
    done: bool
    what: str
    slots: tuple[int, ...] = ()
    evicted: tuple[int, ...] = ()
    """Slots of this node that go."""


def decide(act: wire.Act, view: View) -> Decision:
    """What follows from an Act that came while these workers ran."""
    why_not = _refusal(act, view)
    if why_not:
        return Decision(NOTHING, done=False, what=why_not, slots=view.slots)
    if act.action == "restart":
        return Decision(RESTART, done=True, what=f"{len(view.slots)} workers of this node are restarted", slots=view.slots)
    return _evict(act, view)


def _refusal(act: wire.Act, view: View) -> str:
    if act.action not in {"restart", "evict"}:
        return f"a launcher restarts and evicts; {act.action!r} is neither"
    if act.attempt <= view.floor and (act.attempt or view.floor):
        return f"attempt {act.attempt} is over: the workers that run now are of a later one"
    if POLICIES.index(act.action) > POLICIES.index(view.policy):
        return f"this job was started with --on-fault {view.policy}"
    return ""


def _evict(act: wire.Act, view: View) -> Decision:
    firsts = [0, *accumulate(view.counts)]
    world, asked = firsts[-1], {*act.ranks}
    gone = {r for r in asked if 0 <= r < world}
    leaving = [i for i, n in enumerate(view.counts) if n and gone >= {*range(firsts[i], firsts[i + 1])}]
    why_not = _why_not(gone, asked, world, leaving, view)
    if why_not:
        return Decision(RESTART, done=False, what=f"{why_not}: the workers are restarted instead", slots=view.slots)
    first = firsts[view.mine]
    out = tuple(s for i, s in enumerate(view.slots) if first + i in gone)
    left = tuple(s for s in view.slots if s not in out)
    if not out:
        return Decision(FOLLOW, done=True, what=f"ranks {_listed(gone)} are on other nodes: this one goes on with {len(left)} workers", slots=left)
    if not left:
        return Decision(LEAVE, done=True, what="this node leaves the job, its daemon stays", slots=(), evicted=out)
    what = f"slots {_listed(out)} are left out from now on: {len(left)} workers of this node go on, of {world - len(gone)} in all"
    return Decision(SHRINK, done=True, what=what, slots=left, evicted=out)


def _why_not(gone: set[int], asked: set[int], world: int, leaving: Sequence[int], view: View) -> str:
    """Why the job cannot go on without these ranks."""
    left = len(view.counts) - len(leaving)
    reasons = (
        (gone != asked or not gone, f"there is no rank {_listed(asked - gone)} among {world}" if asked else "nobody was named"),
        (len(gone) == world, "nobody would be left"),
        (bool(leaving) and not view.may_leave, "the rendezvous in use ends the job for all nodes where one leaves"),
        (bool(leaving) and left < view.nodes_min, f"{left} nodes would be left, and --nnodes asks for {view.nodes_min}"),
        (len(leaving) > view.spared, f"{len(leaving)} nodes' memory would go, and the snapshots that there are outlive that of {view.spared}"),
    )
    return next((why for so, why in reasons if so), "")


def _listed(numbers: Sequence[int] | set[int]) -> str:
    return ", ".join(str(n) for n in sorted(numbers))


def visible_devices(env: str | None, count: int, workers: int, evicted: Sequence[int]) -> str | None:
    """CUDA_VISIBLE_DEVICES for workers of a node without the devices of its evicted slots; None: leave it as it is.

    `env`: its value for the launcher; `count`: devices that there are; `workers`: slots in all. Where there are fewer devices than slots, nothing says whose is whose.
    """
    if not evicted:
        return None
    names = [str(i) for i in range(count)] if env is None else [n.strip() for n in env.split(",") if n.strip()]
    if len(names) < workers:
        return None
    return ",".join(n for i, n in enumerate(names) if i not in evicted)
