"""`ckptd ls`: the checkpoints below a path, newest first; a broken one never hides the others."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import Any

from ckptd.cli import foreign, show
from ckptd.storage.checkpoint import Found


def add_parser(verbs: Any) -> None:
    """The verb's arguments."""
    p = verbs.add_parser(
        "ls",
        help="the checkpoints in a store, or of other systems in a folder",
        description="List the checkpoints below a store's root, of one job, or in one step directory: by job, newest first.\n"
        "In any other folder: the checkpoints of other systems (DeepSpeed tags, Megatron iterations, Hugging Face folders ...).\n"
        "Files are not read, only looked at: `complete` means that everything is there, in the right size.\n"
        "`ckptd verify` reads every byte. A broken or unfinished checkpoint is listed with what is wrong; that is no error.",
        epilog="example:\n  ckptd ls /mnt/ckpt llama",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("path", metavar="PATH_OR_URL", help="a store's root, a job's directory, or a step's directory")
    p.add_argument("job", metavar="JOB", nargs="?", help="only this job of the store")
    p.add_argument("--json", action="store_true", help="print one JSON document")
    p.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """List."""
    if args.job is None and (others := foreign.listed(args.path)):
        return _others(args, others)
    place = show.open_place(args.path, args.job)
    found = show.find_checkpoints(place)
    if args.json:
        show.emit_json({"path": place.label, "store": str(place.store), "checkpoints": [_plain(f) for f in found]})
    else:
        header = ("JOB", "STEP", "ATTEMPT", "RANKS", "SIZE", "CREATED", "DIRECTORY", "STATE")
        show.emit(show.table(header, (_row(place, f) for f in found), right=("STEP", "ATTEMPT", "RANKS", "SIZE")))
    return 0


def _others(args: argparse.Namespace, found: list[foreign.Listed]) -> int:
    """The checkpoints of other systems; they have no manifest that says whether all is there: `ckptd verify` looks."""
    if args.json:
        show.emit_json({"path": args.path, "checkpoints": [asdict(f) for f in found]})
        return 0
    header = ("FORMAT", "STEP", "FILES", "SIZE", "DIRECTORY", "")
    rows = [
        [f.format, "-" if f.step is None else str(f.step), show.count(f.files), show.size(f.bytes), f.directory or ".", "latest" if f.latest else ""] for f in found
    ]
    show.emit(show.table(header, rows, right=("STEP", "FILES", "SIZE")))
    return 0


def state_of(found: Found) -> str:
    """Complete, unfinished or broken."""
    if found.unfinished:
        return "unfinished"
    return "complete" if found.ok else "broken"


def _plain(found: Found) -> dict[str, Any]:
    manifest = found.manifest
    return {
        "job": found.job,
        "step": found.step if found.step >= 0 else None,
        "attempt": found.attempt,
        "ranks": manifest.world_size if manifest else None,
        "bytes": found.bytes,
        "created_unix_s": manifest.created_unix_s if manifest else None,
        "created": show.utc(manifest.created_unix_s) if manifest else None,
        "directory": found.directory,
        "state": state_of(found),
        "error": "" if found.unfinished else found.error,
    }


def _row(place: show.Place, found: Found) -> list[str]:
    manifest = found.manifest
    state = state_of(found)
    return [
        found.job or "-",
        str(found.step) if found.step >= 0 else "-",
        "-" if found.attempt is None else str(found.attempt),
        str(manifest.world_size) if manifest else "-",
        show.size(found.bytes),
        show.utc(manifest.created_unix_s) if manifest else "-",
        place.name_of(found.directory).rpartition("/")[2],
        f"broken: {found.error}" if state == "broken" else state,
    ]
