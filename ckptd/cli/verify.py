"""`ckptd verify`: read every byte and compare it with its checksum; nothing stops at the first problem.

Exit status: that of the first problem's class, so that a script can tell a flipped byte (23) from a missing image (14).
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import asdict
from typing import Any

from ckptd import errors
from ckptd.cli import foreign, show
from ckptd.errors import CkptdError, NotFound
from ckptd.storage.checkpoint import Found, Problem, Report, verify_checkpoint

TENSORS_SHOWN = 8
REDRAW_S = 0.1


def add_parser(verbs: Any) -> None:
    """The verb's arguments."""
    p = verbs.add_parser(
        "verify",
        help="read every byte of checkpoints and compare it with its checksum, or with its copies",
        description="Read every byte of one checkpoint, or of all checkpoints of a store or job, and compare it with manifest, index and\n"
        "checksums. All problems are printed, with the image, the tensors that are touched, and the class of the error.\n"
        "Directories without a manifest are being written, or were left by a crash: they are named, and are no error,\n"
        "unless one is all that was asked for.\n"
        "Of another system's checkpoint: every tensor is proven to be covered once, every byte of it is read, copies are compared.",
        epilog="exit status: 0 every byte is right; else that of the first problem: 14 an image is missing, 20 image, 21 manifest or index, 22 newer format,\n"
        "23 checksum, 24 boxes do not tile, 25 malformed, 26 copies differ, 41 the store does not read.\n\nexample:\n  ckptd verify /mnt/ckpt/llama/step-00001200",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("path", metavar="PATH", help="a step's directory, a job's directory, or a store's root (path or URL)")
    p.add_argument("--json", action="store_true", help="print one JSON document")
    p.add_argument("--quiet", action="store_true", help="print problems only, and no progress")
    p.add_argument("--crc", action="store_true", help="other systems: compare the entries of zip files with their CRCs, too")
    foreign.add_reading(p)
    p.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Verify; the status is that of the first problem."""
    if foreign.recognised(args.path):
        from ckptd.cli import scan

        return scan.run(args)
    place = show.open_place(args.path)
    found = show.find_checkpoints(place)
    meter = Meter(shown=sys.stderr.isatty() and not args.quiet)
    reports: list[Report] = []
    unfinished: list[str] = []
    for number, f in enumerate(found, 1):
        meter.begin(f"{place.name_of(f.directory)} ({number} of {len(found)})")
        report = _verify(place, f, meter)
        meter.end()
        if report is not None:
            reports.append(report)
        elif place.directory is None:
            unfinished.append(f.directory)
        else:
            msg = f"{place.label} has no manifest: it is unfinished, and no checkpoint to verify"
            raise NotFound(msg, remedy="`ckptd ls` on the store shows which are complete")
        if not args.json and not (args.quiet and (report is None or report.ok)):
            show.emit(_told(place, report) if report else f"{show.plain(place.name_of(f.directory))}: unfinished, not read")
    if args.json:
        show.emit_json(_document(place, reports, unfinished, meter))
    elif not args.quiet:
        show.emit(_summary(reports, meter))
    return next((_exit_code(p) for r in reports for p in r.problems), 0)


def _verify(place: show.Place, found: Found, meter: Meter) -> Report | None:
    """None: there is no manifest, or it was deleted since it was listed."""
    if found.unfinished:
        return None
    try:
        return verify_checkpoint(place.store, found.directory, meter.progress)
    except NotFound:
        return None


class Meter:
    """Bytes read over all checkpoints, and a line on stderr about them while they are read."""

    def __init__(self, *, shown: bool) -> None:
        self.bytes_read = 0
        self._shown = shown
        self._what = ""
        self._before = 0
        self._drawn_s = 0.0
        self._began_s = time.monotonic()

    @property
    def elapsed_s(self) -> float:
        """Since the verb began."""
        return time.monotonic() - self._began_s

    @property
    def rate(self) -> str:
        """Speed over everything read."""
        return f"{self.bytes_read / max(self.elapsed_s, 1e-9) / 1e6:,.0f} MB/s"

    def begin(self, what: str) -> None:
        """The next checkpoint."""
        self._what, self._before = what, self.bytes_read

    def progress(self, done_bytes: int, total_bytes: int) -> None:
        """Called by `verify_checkpoint` after every window."""
        self.bytes_read = self._before + done_bytes
        now_s = time.monotonic()
        if self._shown and now_s - self._drawn_s >= REDRAW_S:
            self._drawn_s = now_s
            share = f"{show.size(done_bytes)} of {show.size(total_bytes)}, {100 * done_bytes // max(total_bytes, 1)} %"
            print(f"\r\x1b[K{show.plain(self._what)}: {share}, {self.rate}", end="", file=sys.stderr, flush=True)

    def end(self) -> None:
        """Take the line away."""
        if self._shown and self._drawn_s:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def _exit_code(problem: Problem) -> int:
    kind = getattr(errors, problem.error, CkptdError)
    return int(kind.exit_code)


def _told(place: show.Place, report: Report) -> str:
    verdict = "every byte is right" if report.ok else show.count(len(report.problems), "problem")
    name = show.plain(place.name_of(report.directory))
    lines = [f"{name}: {show.count(report.images, 'image')}, {show.size(report.bytes_read)} read: {verdict}"]
    for p in report.problems:
        where = "manifest or index" if p.rank is None else f"image of rank {p.rank}"
        lines.append(f"  {where}: {p.error}: {show.plain(p.message)}")
        if p.tensors:
            names = show.some([show.plain(t) for t in p.tensors], TENSORS_SHOWN)
            lines.append(f"    {show.count(len(p.tensors), 'tensor')} touched: {names}")
    return "\n".join(lines)


def _summary(reports: list[Report], meter: Meter) -> str:
    bad = sum(not r.ok for r in reports)
    if not reports:
        return "no finished checkpoint here: nothing was verified"
    verdict = f"{bad} with problems" if bad else "all right"
    read = f"{show.size(meter.bytes_read)} in {show.duration(meter.elapsed_s)}, {meter.rate}"
    return f"{show.count(len(reports), 'checkpoint')} verified, {verdict} ({read})"


def _document(place: show.Place, reports: list[Report], unfinished: list[str], meter: Meter) -> dict[str, Any]:
    return {
        "path": place.label,
        "store": str(place.store),
        "ok": all(r.ok for r in reports),
        "bytes_read": meter.bytes_read,
        "elapsed_s": round(meter.elapsed_s, 3),
        "checkpoints": [
            {
                "directory": r.directory,
                "ok": r.ok,
                "images": r.images,
                "bytes_read": r.bytes_read,
                "problems": [asdict(p) | {"exit_code": _exit_code(p)} for p in r.problems],
            }
            for r in reports
        ],
        "unfinished": unfinished,
    }
