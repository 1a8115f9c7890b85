"""`ckptd analyze`: recorded runs and torch's Flight Recorder dumps, after the fact: the same verdicts that the daemon gives while a job runs."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import msgspec

from ckptd.cli import show
from ckptd.errors import BadArgument, NotFound, StoreFailed

EVIDENCE_SHOWN = 8
PROGRESS_S = 1.0


def add_parser(verbs: Any) -> None:
    """The verb's arguments."""
    p = verbs.add_parser(
        "analyze",
        help="recorded runs and Flight Recorder dumps: who was slow, missing or gone",
        description="Say who was slow, who hung and why, from what was recorded:\n"
        "  *.ckptdrec        runs that `ckptd daemon --record DIR` recorded: the same verdicts as then\n"
        "  other files       torch Flight Recorder dumps (pickle or JSON), one per rank, the rank at the end of each name\n"
        "Give files, or directories of them. Nothing of a dump is executed.",
        epilog="example:\n  ckptd analyze /tmp/nccl_trace_dumps",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("paths", metavar="PATH", nargs="+", help="a recorded run, a directory of runs, or a directory of dumps")
    p.add_argument("--json", action="store_true", help="print one JSON document")
    p.add_argument("--trace-out", metavar="FILE", help="also write the operations of the dumps, or the steps of the run, as a trace for Perfetto (https://ui.perfetto.dev)")
    p.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Analyze every path."""
    runs, dumps = _sorted([Path(p) for p in args.paths])
    if args.trace_out and len(runs) + bool(dumps) > 1:
        msg = "--trace-out takes one run, or the dumps of one job"
        raise BadArgument(msg, remedy="give one path")
    told = [_run(parts, args.trace_out) for parts in runs]
    if dumps:
        told.append(_dumps(dumps, args.trace_out))
    if args.json:
        show.emit_json({"analyzed": told})
    else:
        show.emit("\n\n".join(_text(t) for t in told))
    return 0


def _sorted(paths: list[Path]) -> tuple[list[list[Path]], dict[int, Path]]:
    """(parts of recorded runs, rank -> dump). Raises NotFound, BadArgument."""
    from ckptd.monitor import flight, recorded

    runs: list[list[Path]] = []
    dumps: dict[int, Path] = {}
    for path in paths:
        try:
            here = recorded.find(path)
            found = flight.find(path)
        except OSError as e:
            msg = f"{path}: {e.strerror}"
            raise NotFound(msg) from e
        runs += here
        twice = sorted(dumps.keys() & found.keys())
        if twice:
            msg = f"two dumps of rank {twice[0]}: {dumps[twice[0]]} and {found[twice[0]]}"
            raise BadArgument(msg, remedy="give the dumps of one moment of one job")
        dumps |= found
    if not runs and not dumps:
        msg = f"{', '.join(map(str, paths))}: neither recorded runs nor Flight Recorder dumps"
        raise NotFound(msg, remedy="runs are *.ckptdrec files; a dump's name ends in its rank (set TORCH_FR_DUMP_TEMP_FILE), as in trace_0")
    return runs, dumps


# --- recorded runs ----------------------------------------------------------------------------------------------------------


def _run(parts: list[Path], trace_out: str | None) -> dict[str, Any]:
    from ckptd.monitor import recorded

    done = recorded.replay(parts)
    if trace_out:
        _write(trace_out, recorded.windows(parts) | {"verdicts": [*done.verdicts.values()]})
    h = done.header
    return {
        "what": "recorded run", "source": str(parts[0]), "parts": len(parts), "job": h.job, "attempt": h.attempt, "ranks": h.world_size, "nodes": h.nodes,
        "reports": done.reports, "steps": done.steps, "began_s": done.began_s, "ended_s": done.ended_s,
        "verdicts": [_verdict(v) for v in done.verdicts.values()], "history": [_verdict(v) for v in done.history],
        "waits": done.status.get("waits", []), "counts": done.status.get("counts", {}), "notes": [],
    }  # fmt: skip


def _verdict(v: Any) -> dict[str, Any]:
    return {**msgspec.to_builtins(v), "text": v.text}


# --- Flight Recorder --------------------------------------------------------------------------------------------------------


def _dumps(files: dict[int, Path], trace_out: str | None) -> dict[str, Any]:
    from ckptd.monitor import flight

    def read() -> Iterator[tuple[int, Any]]:
        """Anew each time: many dumps are more than memory should hold."""
        shows, said_s = sys.stderr.isatty(), time.monotonic()
        for n, (rank, path) in enumerate(sorted(files.items())):
            if shows and time.monotonic() - said_s > PROGRESS_S:
                said_s = time.monotonic()
                print(f"\r{n} of {len(files)} dumps", end="", file=sys.stderr, flush=True)
            yield rank, flight.read(path)

    job = flight.gather(read())
    findings, waits = flight.conclude(job)
    if trace_out:
        _write(trace_out, flight.windows(read(), job))
    where = {r: str(p) for r, p in files.items()}
    return {
        "what": "Flight Recorder dumps", "source": str(next(iter(files.values())).parent), "ranks": len(files), "absent": job.absent,
        "groups": {name: {"ranks": members, "entered": {str(r): s.entered for r, s in job.standings[name].items()}} for name, members in job.members.items()},
        "verdicts": [{**msgspec.to_builtins(f), "text": _finding(f), "state": "confirmed", "confidence": f.strength, "files": [where[r] for r in f.ranks if r in where]} for f in findings],
        "waits": waits, "notes": job.notes,
    }  # fmt: skip


def _finding(f: Any) -> str:
    who = f"rank{'s' if len(f.ranks) > 1 else ''} {show.ranges(f.ranks)}" if f.ranks else "no rank is named"
    return f"{f.kind}: {who}{f' in {f.op} {f.seq}' if f.op else ''}: {f.cause}"


def _write(path: str, windows: dict[str, Any]) -> None:
    from ckptd.monitor import trace_export

    try:
        Path(path).write_bytes(trace_export.render(windows))
    except OSError as e:
        msg = f"--trace-out {path}: {e.strerror}"
        raise StoreFailed(msg, remedy="give a file in a directory that you may write") from e


# --- text -------------------------------------------------------------------------------------------------------------------


def _text(told: dict[str, Any]) -> str:
    if told["what"] == "recorded run":
        span = show.duration(max(0.0, told["ended_s"] - told["began_s"]))
        head = f"recorded run of job {told['job']}, attempt {told['attempt']}: {show.count(told['ranks'], 'rank')} on {show.count(told['nodes'], 'node')}, {span}, {show.count(told['steps'], 'step')} of ranks"
    else:
        head = f"Flight Recorder dumps of {show.count(told['ranks'], 'rank')} in {told['source']}"
        if told["absent"]:
            head += f"; no dump of rank{'s' if len(told['absent']) > 1 else ''} {show.ranges(told['absent'])}"
    lines = [show.plain(head)]
    for v in told["verdicts"]:
        lines += ["", *_verdict_lines(v)]
    if not told["verdicts"]:
        lines.append("  nothing hangs, and nobody is slow")
    lines += _wait_lines(told["waits"])
    return "\n".join(lines)


def _verdict_lines(v: dict[str, Any]) -> Iterable[str]:
    yield f"  {v['state']}: {show.plain(v['text'])}"
    for e in v["evidence"][:EVIDENCE_SHOWN]:
        value = e["value"]
        if isinstance(value, str) and "\n" in value:
            yield f"    {show.plain(e['signal'])}:"
            yield from (f"      {show.plain(line)}" for line in value.splitlines()[:12])
        else:
            shown = show.plain(value) if isinstance(value, str) else f"{value:g} {e['unit']}".strip()
            against = f" (compared with {e['baseline']:g})" if e.get("baseline") is not None else ""
            yield f"    {show.plain(e['signal'])}: {shown}{against}"


def _wait_lines(waits: list[dict[str, Any]]) -> list[str]:
    """Who waits for whom, those in one place together."""
    together: dict[tuple[Any, ...], list[int]] = {}
    for w in waits:
        together.setdefault((w["op"], w["seq"], w["group"], tuple(w["for"])), []).append(w["rank"])
    return [
        f"  {'rank' if len(ranks) == 1 else 'ranks'} {show.ranges(ranks)} wait{'s' if len(ranks) == 1 else ''} in {show.plain(op)} {seq or ''} of group {show.plain(group) or '-'} for {show.ranges(behind) or 'nobody'}"
        for (op, seq, group, behind), ranks in [*together.items()][:32]
    ]
