"""`ckptd run`: launch a job under supervision, with torchrun's arguments."""

from __future__ import annotations

import argparse
from typing import Any


def add_parser(verbs: Any) -> None:
    """The verb takes everything after it as torchrun would: its own parser needs torch, so it is built when the verb runs."""
    p = verbs.add_parser(
        "run",
        add_help=False,
        prefix_chars="\0",
        help="launch a job under supervision (torchrun's arguments)",
        description="torchrun's arguments and ckptd's own: see `ckptd run --help`.",
    )
    p.add_argument("rest", nargs="*")
    p.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Launch, supervise, and exit with the job's own status."""
    from ckptd import launch

    return launch.run(launch.parser().parse_args(args.rest))
