"""`ckptd daemon`: the daemon in the foreground; what the unit and the launcher run."""

from __future__ import annotations

import argparse
from typing import Any


def add_parser(verbs: Any) -> None:
    """The verb's arguments."""
    p = verbs.add_parser(
        "daemon",
        help="the daemon in the foreground",
        description="Run this node's daemon in the foreground. It leaves on SIGTERM, SIGINT, or after --linger-s without clients. "
        "Under systemd it speaks the notify and file-descriptor-store protocols: see ckptd/ckptd.service.",
    )
    p.add_argument("--dir", metavar="DIR", help="directory of its socket (0700); default: $CKPTD_DIR, $RUNTIME_DIRECTORY, or the user's runtime directory")
    p.add_argument("--peer-host", default="127.0.0.1", metavar="ADDRESS", help="address for other nodes' daemons (default %(default)s)")
    p.add_argument("--peer-port", type=int, default=0, metavar="PORT", help="where to listen for them (default: where the last daemon here did, or any free port)")
    p.add_argument("--insecure-peers", action="store_true", help="allow --peer-host off loopback: peers are authenticated, but nothing is encrypted")
    p.add_argument("--peer-rate", default="0", metavar="BYTES_PER_S", help="most bytes of images to send other nodes, such as 2GB (default: no limit)")
    p.add_argument("--linger-s", type=float, default=0.0, metavar="S", help="leave after S seconds without a client (default: never)")
    p.add_argument("--threads", type=int, default=2, metavar="N", help="threads for checksums and writing (default %(default)s)")
    p.add_argument("--persist-timeout-s", type=float, default=3600.0, metavar="S", help="give up persisting a step after S seconds (default %(default)s)")
    p.add_argument(
        "--label", action="append", default=[], metavar="KIND=NAME", type=_label,
        help="a failure domain of this node, such as rack=r7 or power=a: nodes that share one do not protect each other if others can; may be repeated",
    )  # fmt: skip
    w = p.add_argument_group("watching", "who is slow, who hangs, and why: on by default (monitor/README.md)")
    w.add_argument("--no-watch", action="store_true", help="do not watch: taps are told to stop writing")
    w.add_argument("--evict-after-s", type=float, default=60.0, metavar="S", help="a rank must have been slow for S seconds before it may be evicted (`ckptd run --on-fault evict`; default %(default)s)")
    w.add_argument("--http", default="127.0.0.1:0", metavar="HOST:PORT", help="page, metrics, status and trace (default %(default)s, any free port: `ckptd status` says which)")
    w.add_argument("--no-http", action="store_true", help="serve nothing over HTTP")
    w.add_argument("--http-remote", action="store_true", help="allow --http off loopback: whoever reaches it can read the jobs' status")
    w.add_argument("--http-name", action="append", default=[], metavar="NAME", help="a host name by which --http may be asked, besides loopback's; may be repeated")
    w.add_argument("--events", default="", metavar="FILE", help="log of verdicts, a JSON line each (default: events.jsonl beside the socket)")
    w.add_argument("--webhook-file", default="", metavar="FILE", help="POST verdicts to the URLs in FILE (0600, one a line)")
    w.add_argument("--webhook-private", action="store_true", help="allow webhooks to loopback and private addresses, and over plain HTTP")
    w.add_argument("--record", default="", metavar="DIR", help="record what verdicts are made of, for `ckptd analyze`")
    p.set_defaults(run=run)


def _label(text: str) -> tuple[str, str]:
    kind, _, name = text.partition("=")
    if not kind or not name:
        msg = f"{text!r} is not KIND=NAME"
        raise argparse.ArgumentTypeError(msg)
    return kind, name


def run(args: argparse.Namespace) -> int:
    """Serve until told to leave."""
    from ckptd import daemon, faces
    from ckptd.cli.show import parse_size

    daemon.run(
        daemon.Settings(
            directory=args.dir,
            peer_host=args.peer_host,
            peer_port=args.peer_port,
            insecure_peers=args.insecure_peers,
            peer_rate_bytes_per_s=parse_size(args.peer_rate),
            linger_s=args.linger_s,
            threads=args.threads,
            persist_timeout_s=args.persist_timeout_s,
            labels=dict(args.label),
            watch=not args.no_watch,
            evict_after_s=args.evict_after_s,
            faces=faces.FaceSettings(
                http="" if args.no_http else args.http, http_remote=args.http_remote, http_names=tuple(args.http_name), events=args.events,
                webhook_file=args.webhook_file, webhook_private=args.webhook_private, record=args.record,
            ),
        )
    )
    return 0
