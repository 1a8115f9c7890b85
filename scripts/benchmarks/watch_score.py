"""Scoring of what was concluded: labelled cases and timelines of verdicts in, rows, tables and aims out.

    Case (what was done, to whom, when, what is expected)  +  [Told (when, at which step, which verdict)]  --score-->  Row  --tables, aims-->  Bench

A verdict *names* a case's culprit once it is confirmed, is of an accepted kind, and its ranks are the culprits. Anything else that is confirmed and names somebody is
false, before the fault and after it; "undecided" and "global-slow" name nobody. Latency is counted from the fault's onset to the first confirmed verdict that names.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from benchmarks.harness import Aim, Table
from ckptd.monitor.report import Verdict

CLASSES = {"comm-slow": ("send-slow", "receive-slow", "link-slow")}
NOBODY = frozenset({"undecided", "global-slow", "comm-slow", "comm-hang"})


@dataclass(frozen=True)
class Case:
    """A labelled case. `kinds`: verdicts that name it; empty: nothing must be named. `causes`: those of them that are the right cause. `ranks`: the culprits.

    `group`: which aim it counts for. `tolerated`: kinds that may be said beside it without being false.
    """

    kind: str
    layout: str
    seed: int
    severity: str = ""
    ranks: tuple[int, ...] = ()
    kinds: tuple[str, ...] = ()
    causes: tuple[str, ...] = ()
    group: str = ""
    onset_step: int = 0
    onset_s: float = 0.0
    step_s: float = 1.0
    peer: int = -1
    tolerated: tuple[str, ...] = ()
    hours: float = 0.0
    world: int = 0

    @property
    def quiet(self) -> bool:
        return not self.kinds


@dataclass(frozen=True)
class Told:
    """A verdict as it was told, the job's newest step by then, and when."""

    t_s: float
    step: int
    verdict: Verdict


@dataclass(frozen=True)
class Row:
    """How one case went. `class_steps`: until the class (slow transfers, no side yet) was known."""

    case: Case
    named: bool
    right_rank: bool
    right_cause: bool
    steps: float
    seconds: float
    class_steps: float
    false_reports: int
    false_evicts: int
    said: str
    undecided: bool = False
    class_seconds: float = float("nan")


def score(case: Case, told: Sequence[Told]) -> Row:
    """One case's row."""
    confirmed = [x for x in told if x.verdict.state == "confirmed"]
    after = [x for x in confirmed if x.step >= case.onset_step and x.t_s >= case.onset_s and not case.quiet]
    fits = [x for x in after if x.verdict.kind in case.kinds and _same(case, x.verdict)]
    claims = [x for x in after if x.verdict.kind not in NOBODY and x.verdict.kind not in case.tolerated]
    first = fits[0] if fits else None
    causes = case.causes or case.kinds
    named_first = claims[0] if claims else None
    classes = {"comm-slow", "global-slow", *CLASSES["comm-slow"]}
    in_class = next((x for x in after if x.verdict.kind in classes), None)
    wrong = [x for x in confirmed if _false(case, x)]
    nobody = not case.ranks  # a class without a culprit: its kind is all that can be right
    return Row(
        case=case, named=first is not None,
        right_rank=first is not None and (nobody or named_first is None or _same(case, named_first.verdict)),
        right_cause=first is not None and _last_of(first.verdict.id, confirmed).kind in causes,
        steps=first.step - case.onset_step if first else float("nan"), seconds=first.t_s - case.onset_s if first else float("nan"),
        class_steps=in_class.step - case.onset_step if in_class else float("nan"),
        false_reports=len({x.verdict.id for x in wrong}), false_evicts=len({x.verdict.id for x in wrong if x.verdict.grade == "evict"}),
        said="; ".join(dict.fromkeys(f"{x.verdict.kind} {_few(x.verdict.ranks)}@{x.step}" for x in told if x.verdict.state != "cleared"))[:240],
        class_seconds=in_class.t_s - case.onset_s if in_class else float("nan"),
        undecided=any(x.verdict.kind == "undecided" for x in told),
    )  # fmt: skip


def _same(case: Case, v: Verdict) -> bool:
    """Whether a verdict names the culprits: all of them, or (of several faults) some and nobody else."""
    if not case.ranks:
        return True
    return bool(v.ranks) and set(v.ranks) <= set(case.ranks) and (case.peer < 0 or v.peer in (case.peer, -1))


def _false(case: Case, x: Told) -> bool:
    v = x.verdict
    if v.kind == "undecided" or v.kind in case.tolerated:
        return False
    if case.quiet or x.step < case.onset_step or x.t_s < case.onset_s:
        return True
    if v.kind in NOBODY:
        return False
    return bool(case.ranks) and not (set(v.ranks) & set(case.ranks))


def _last_of(verdict_id: int, told: Sequence[Told]) -> Verdict:
    """What a verdict had become within its first changes: a cause that was refined counts as the refined one."""
    return [x.verdict for x in told if x.verdict.id == verdict_id][-1]


def _few(ranks: Sequence[int]) -> str:
    return ",".join(map(str, ranks[:4])) + ("..." if len(ranks) > 4 else "")


# --- tables and aims --------------------------------------------------------------------------------------------------------


def quantile(values: Iterable[float], q: float) -> float:
    """Of those that are numbers; no numbers have none."""
    known = [v for v in values if v == v]
    return float(np.quantile(known, q)) if known else float("nan")


def part(flags: Iterable[bool]) -> float:
    """How many of them hold."""
    flags = list(flags)
    return sum(flags) / len(flags) if flags else float("nan")


def layout_class(layout: str) -> str:
    """A layout without its numbers: ddp, fsdp, tp+dp ..."""
    return "".join(c for c in layout if not c.isdigit())


def table(rows: Sequence[Row], title: str) -> Table:
    """Kind x severity x layout class."""
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for r in rows:
        groups.setdefault((r.case.kind, r.case.severity, layout_class(r.case.layout)), []).append(r)
    lines = []
    for (kind, severity, layout), mine in groups.items():
        quiet = mine[0].case.quiet
        named = [r for r in mine if r.named]
        lines.append([
            kind, severity, layout, len(mine), None if quiet else part(r.named for r in mine), None if quiet else part(r.right_rank for r in named),
            None if quiet else part(r.right_cause for r in named), quantile((r.steps for r in named), 0.5) if named else None,
            quantile((r.steps for r in named), 0.9) if named else None, quantile((r.seconds for r in named), 0.5) if named else None,
            quantile((r.seconds for r in named), 0.95) if named else None, sum(r.false_reports for r in mine), sum(r.false_evicts for r in mine),
        ])  # fmt: skip
    columns = ["kind", "severity", "layout", "n", "recall", "right rank", "right cause", "steps p50", "p90", "s p50", "p95", "false", "evict"]
    return Table(title, columns, lines)


def misses(rows: Sequence[Row]) -> list[str]:
    """Every case that did not go as it should, with its seed."""
    out = []
    for r in rows:
        c = r.case
        why = [w for w, holds in (("not named", c.quiet or r.named), ("wrong rank", c.quiet or not r.named or r.right_rank),
                                  ("wrong cause", c.quiet or not r.named or r.right_cause), (f"{r.false_reports} false", not r.false_reports)) if not holds]  # fmt: skip
        if why:
            out.append(f"  {c.kind} {c.severity} {c.layout} seed {c.seed} ranks {_few(c.ranks)} onset {c.onset_step}: {', '.join(why)}; said: {r.said or 'nothing'}")
    return out


def aims(rows: Sequence[Row]) -> list[Aim]:
    """Issue 5's, of the cases that are there."""
    out = []

    def of(*groups: str) -> list[Row]:
        return [r for r in rows if r.case.group in groups]

    if crash := of("crash"):
        out.append(Aim("crash: noticed job-wide (worst)", max((r.seconds for r in crash if r.named), default=float("nan")), "<=", 1.0, " s"))
        out.append(Aim("crash: right rank", part(r.right_rank for r in crash), ">=", 0.98))
    if hangs := of("hang"):
        over = [r.seconds / max(3.0, 5 * r.case.step_s) for r in hangs if r.named]
        out.append(Aim("hang: named, in parts of max(3 s, 5 steps), p95", quantile(over, 0.95), "<=", 1.0))
        out.append(Aim("hang: recall", part(r.named for r in hangs), ">=", 0.98))
        out.append(Aim("hang: right rank", part(r.right_rank for r in hangs), ">=", 0.98))
        out.append(Aim("hang: right cause", part(r.right_cause for r in hangs), ">=", 0.95))
    if slow := of("slow"):
        out.append(Aim("slow by 10 % or more: recall", part(r.named for r in slow), ">=", 0.98))
        out.append(Aim("slow by 10 % or more: named, steps, p90", quantile((r.steps if r.named else 1e9 for r in slow), 0.9), "<=", 20.0))
        out.append(Aim("slow by 10 % or more: right rank", part(r.right_rank for r in slow), ">=", 0.98))
        out.append(Aim("slow by 10 % or more: right cause", part(r.right_cause for r in slow), ">=", 0.95))
    if mild := of("mild"):
        out.append(Aim("slow by 3 to 10 %: recall within 100 steps", part(r.named and r.steps <= 100 for r in mild), ">=", 0.8))
        out.append(Aim("slow by 3 to 10 %: right rank of those named", part(r.right_rank for r in mild if r.named), ">=", 0.98))
    if comm := of("comm"):
        out.append(Aim("slow transfers: class, steps, p90", quantile((r.class_steps if r.class_steps == r.class_steps else 1e9 for r in comm), 0.9), "<=", 20.0))
        late = [r.seconds - r.class_seconds if r.named else 1e9 for r in comm]
        out.append(Aim("slow transfers: side or link, seconds after the class, p90", quantile(late, 0.9), "<=", 10.0, " s"))
        out.append(Aim("slow transfers: right side or link", part(r.right_rank and r.right_cause for r in comm), ">=", 0.95))
    if other := of("other"):
        out.append(Aim("drift, intermittent, NaN, skipped, several at once: recall", part(r.named for r in other), ">=", 0.9))
        out.append(Aim("... right rank", part(r.right_rank for r in other if r.named), ">=", 0.98))
    if rows:
        out.append(Aim("false verdicts of grade evict", float(sum(r.false_evicts for r in rows)), "<=", 0.0))
    if quiet := [r for r in rows if r.case.hours]:
        per_day = sum(r.false_reports for r in quiet) / max(sum(r.case.hours / 24 * r.case.world / 64 for r in quiet), 1e-9)
        out.append(Aim("false reports in 24 h per 64 ranks", per_day, "<=", 1.0))
    return out


def facts(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """For JSON."""
    return [asdict(r) for r in rows]
