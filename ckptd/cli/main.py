"""`ckptd VERB ...`: find the verb, run it, turn errors into messages and exit codes."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from importlib import import_module

from ckptd import __version__
from ckptd.errors import CkptdError

VERBS = ("run", "daemon", "status", "ls", "inspect", "verify", "convert", "diff", "analyze", "selftest", "doctor", "plan")
EPILOG = """exit status: 0 done; 1 an error without a class; 2 bad usage; 10 bad argument; 11 state that cannot be stored;
12 keys that do not match; 13 snapshots exist and were not restored; 14 not found; 20 bad image; 21 bad manifest or index;
22 newer format; 23 checksum mismatch; 24 boxes do not tile; 25 another system's checkpoint is malformed; 26 copies of one
tensor differ; 30 no daemon; 31 ranks missing; 32 peer failed; 40 memory refused; 41 store failed; 70 a bug; 130 interrupted.
`ckptd run` exits with the job's own status, `ckptd diff` with 1 where two checkpoints differ."""


def build_parser(verb: str = "") -> argparse.ArgumentParser:
    """The command line: of one verb where it is known, else the whole. None of them imports torch at the top, but all together take 0.3 s."""
    parser = argparse.ArgumentParser(
        prog="ckptd",
        description="Keeps distributed training alive: snapshots every step, survives what kills the job, gives the state back to any parallelism.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"ckptd {__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    for each in (verb,) if verb in VERBS else VERBS:
        import_module(f"ckptd.cli.{each}").add_parser(verbs)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    args = build_parser(argv[0] if argv else "").parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s", stream=sys.stderr)
    try:
        return int(args.run(args) or 0)
    except CkptdError as e:
        if getattr(args, "json", False):
            print(json.dumps({"error": type(e).__name__, "message": e.message, "remedy": e.remedy, "exit_code": e.exit_code}))
        print(f"ckptd {args.verb}: {e}", file=sys.stderr)
        return e.exit_code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        sys.stderr.close()
        return 0


if __name__ == "__main__":
    sys.exit(main())
