"""`ckptd convert`: a checkpoint of any format as one of another; streaming, in bounded memory, proven complete."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ckptd.cli import foreign, show
from ckptd.convert import MEMORY_BYTES, Report, convert
from ckptd.errors import BadArgument
from ckptd.formats import WriteOptions, format_named
from ckptd.target import REPORT_NAME

DROPS = ("optimizer", "objects", "buffers")
NAMES_SHOWN = 6


class _Help(argparse.Action):
    """`--help`, with the formats below: they are asked only now, for that takes their modules."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        parser.epilog = f"{parser.epilog}\n\n{_formats_text()}"
        parser.print_help()
        parser.exit()


def add_parser(verbs: Any) -> None:
    """The verb's arguments."""
    p = verbs.add_parser(
        "convert",
        help="a checkpoint of any format as one of another",
        description="Read a checkpoint of any format that is known and write it in another. The format of SRC is recognised. Every element of every tensor\n"
        "comes from exactly one place, which is proven before a byte is written; what is stored twice is compared; what the target cannot hold is\n"
        "an error unless --drop names it. Memory is bounded by --memory, however large the checkpoint. DST gets its name when it is\n"
        "complete; a run that was killed is taken up by running the same command again.",
        epilog="exit status: 0 done; 10 bad argument (DST exists, a hint is missing); 11 the target cannot hold something; 14 SRC not found; 20 to 23 ckptd's\n"
        "own bytes are damaged; 24 a tensor has a hole; 25 SRC is malformed; 26 copies of one tensor differ, or DST does not read back equal; 41 the store failed.\n\n"
        "examples:\n  ckptd convert /ckpt/zero3 /ckpt/hf --to hf --dtype bf16 --drop optimizer,objects --check\n"
        "  ckptd convert /ckpt/megatron /mnt/store --to ckptd --config job=llama --ranks 8\n  ckptd convert --list",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        add_help=False,
    )
    p.add_argument("-h", "--help", action=_Help, nargs=0, help="show this, and the formats")
    p.add_argument("source", metavar="SRC", nargs="?", help="a checkpoint's folder or file (path or URL)")
    p.add_argument("target", metavar="DST", nargs="?", help="where it shall lie; nothing may be there")
    p.add_argument("--to", metavar="FORMAT", help="the format of DST (`--list` lists them)")
    p.add_argument("--list", action="store_true", help="list the formats that are read and written, and end")
    foreign.add_reading(p)
    p.add_argument("--ranks", type=int, default=1, metavar="N", help="data-parallel size of DST, or number of its files (default %(default)s)")
    p.add_argument("--tp", type=int, default=1, metavar="N", help="tensor-parallel size of DST (default %(default)s)")
    p.add_argument("--pp", type=int, default=1, metavar="N", help="pipeline-parallel size of DST (default %(default)s)")
    p.add_argument("--dtype", default="", metavar="DTYPE", help="of the weights: bf16, fp16, fp32 (default: as they are)")
    p.add_argument("--shard-size", default="5GB", metavar="SIZE", help="most bytes per file, where a format has shards (default %(default)s)")
    p.add_argument("--view", default="", metavar="NAME|FILE", help="names and shapes of another model code: a view of ckptd's, or a JSON file")
    p.add_argument("--drop", default="", metavar="WHAT", help=f"what may be left out: {', '.join(DROPS)}; several with commas")
    p.add_argument("--config", metavar="KEY=VALUE", action="append", default=[], help="a setting of the target's format; KEY=@FILE takes JSON from a file")
    p.add_argument("--memory", default=f"{MEMORY_BYTES >> 20}MiB", metavar="SIZE", help="most memory to use (default %(default)s)")
    p.add_argument("--workers", type=int, metavar="N", help="threads that write (default: twice the cores, as memory allows, at most 8); half as many compare beside them")
    p.add_argument("--check", action="store_true", help="read DST back and compare every tensor before it gets its name")
    p.add_argument("--no-verify", action="store_true", help="do not compare a ckptd source with its checksums first")
    p.add_argument("--no-sync", action="store_true", help="do not wait for the disk: faster, and a power cut may lose DST")
    p.add_argument("--json", action="store_true", help="print one JSON document, and no progress")
    p.add_argument("--quiet", action="store_true", help="print nothing but errors")
    p.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Convert, or list the formats."""
    if args.list or args.to == "help":
        if args.json:
            show.emit_json({"formats": foreign.table_of_formats()})
        else:
            show.emit(_formats_text())
        return 0
    if not (args.source and args.target and args.to):
        missing = "SRC" if not args.source else "DST" if not args.target else "--to FORMAT"
        msg = f"{missing} is missing"
        raise BadArgument(msg, remedy="ckptd convert SRC DST --to FORMAT; `ckptd convert --list` lists the formats")
    format_named(args.to)  # before anything is read
    write = _write_options(args)
    read = foreign.read_options(args)
    memory_bytes = show.parse_size(args.memory)
    if args.workers is not None and args.workers < 1:
        msg = f"--workers {args.workers}: at least one is needed"
        raise BadArgument(msg)
    line = foreign.Line(shown=not (args.json or args.quiet))
    try:
        report = convert(
            args.source, args.target, args.to, read=read, write=write, view=foreign.view_of(args.view, read.hints), memory_bytes=memory_bytes,
            workers=args.workers, verify=not args.no_verify, check=args.check, sync=not args.no_sync, progress=line,
        )  # fmt: skip
    finally:
        line.end()
    if args.json:
        show.emit_json(_document(report))
    elif not args.quiet:
        show.emit("\n".join(_lines(report)))
    return 0


def _write_options(args: argparse.Namespace) -> WriteOptions:
    drop = frozenset(d.strip() for d in args.drop.split(",") if d.strip())
    unknown = sorted(drop - {*DROPS})
    if unknown:
        msg = f"--drop {unknown[0]}: there is no such thing to leave out"
        raise BadArgument(msg, remedy="one or several of " + ", ".join(DROPS))
    for name in ("ranks", "tp", "pp"):
        if getattr(args, name) < 1:
            msg = f"--{name} {getattr(args, name)}: at least 1"
            raise BadArgument(msg)
    shard_bytes = show.parse_size(args.shard_size)
    if shard_bytes < 1:
        msg = f"--shard-size {args.shard_size}: at least a byte"
        raise BadArgument(msg)
    return WriteOptions(args.ranks, args.tp, args.pp, foreign.dtype_of(args.dtype), shard_bytes, drop, foreign.settings(args.config, "--config"))


def _formats_text() -> str:
    rows = [(f["name"], "yes", "yes" if f["writes"] else "no", f["title"]) for f in foreign.table_of_formats()]
    return "formats:\n" + show.table(("NAME", "READ", "WRITTEN", "WHAT"), rows, indent="  ")


def _hash_file(report: Report) -> str:
    """Where the hashes stand: in the target's folder, or beside the one file that the target is."""
    target = report.target.rstrip("/")
    return f"{target}.json" if Path(target.removeprefix("file://")).is_file() else f"{target}/{REPORT_NAME}"


def _lines(report: Report) -> Sequence[str]:
    out = [
        f"{show.plain(report.source)} ({report.source_format}) -> {show.plain(report.target)} ({report.target_format})",
        f"  tensors   {show.count(report.tensors)}, {show.size(report.read_bytes)} read",
        f"  written   {show.size(report.written_bytes)} in {show.duration(report.seconds)}, {_rate(report)}",
    ]
    if report.resumed_bytes:
        out.append(f"  resumed   {show.size(report.resumed_bytes)} were complete from an earlier run")
    if report.checked:
        out.append("  checked   every tensor was read back and is equal")
    if report.dropped:
        out.append(f"  dropped   {show.count(len(report.dropped), 'name')}: {show.plain(show.some(report.dropped, NAMES_SHOWN))}")
    out += [f"  note      {show.plain(note)}" for note in report.notes]
    out.append(f"  hashes    {show.plain(_hash_file(report))}")
    return out


def _rate(report: Report) -> str:
    return f"{report.written_bytes / max(report.seconds, 1e-9) / 1e6:,.0f} MB/s"


def _document(report: Report) -> dict[str, Any]:
    return {
        "source": report.source,
        "source_format": report.source_format,
        "target": report.target,
        "target_format": report.target_format,
        "tensors": report.tensors,
        "read_bytes": report.read_bytes,
        "written_bytes": report.written_bytes,
        "resumed_bytes": report.resumed_bytes,
        "elapsed_s": round(report.seconds, 3),
        "checked": report.checked,
        "dropped": list(report.dropped),
        "notes": list(report.notes),
        "hash_file": _hash_file(report),
        "hashes": {n: {"dtype": d, "hash": h} for n, (d, h) in report.hashes.items()},
    }
