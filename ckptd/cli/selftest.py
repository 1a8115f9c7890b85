"""`ckptd selftest`: does what ckptd relies on work on this machine? Parity's kernels, checksums, sealed memory, descriptors through a socket."""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from typing import Any

from ckptd.errors import Bug, CkptdError

EXAMPLES = """examples:
  ckptd selftest
  ckptd selftest --json
"""


def add_parser(verbs: Any) -> None:
    """The verb's arguments."""
    p = verbs.add_parser(
        "selftest",
        help="whether what ckptd relies on works on this machine",
        description="Test what ckptd relies on: the kernels that compute parity, against a reference; checksums, against known values; memory that is sealed, "
        "populated and adopted; descriptors that go through a socket. Takes less than a second and changes nothing. Exits with 70 if anything is wrong.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("--json", action="store_true", help="print the results as one JSON document")
    p.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run all tests, then say what failed."""
    results = [_result(name, work) for name, work in TESTS.items()]
    if args.json:
        print(json.dumps({"ok": all(r["ok"] for r in results), "tests": results}, indent=1))
    else:
        for r in results:
            print(f"{r['name']:10} {'ok' if r['ok'] else 'FAILED':6} {1e3 * r['seconds']:6.1f} ms  {r['text']}")
    return 0 if all(r["ok"] for r in results) else Bug.exit_code


def _result(name: str, work: Callable[[], str]) -> dict[str, Any]:
    began_s = time.perf_counter()
    try:
        ok, text = True, work()
    except (CkptdError, OSError, AssertionError) as e:
        ok, text = False, str(e)
    return {"name": name, "ok": ok, "seconds": time.perf_counter() - began_s, "text": text}


def _parity() -> str:
    from ckptd.core import parity

    wrong = parity.self_test()
    if wrong:
        raise Bug("; ".join(wrong))
    note = "" if parity.KERNELS[0] != parity.NUMPY else " (NumPy only, slow: install ckptd again where there is a C compiler)"
    return f"{parity.KERNELS[0]} computes parity{note}; all give the same bytes: {', '.join(parity.KERNELS)}"


def _checksum() -> str:
    from ckptd.core import checksum

    # The empty input's value is in xxHash's own test vectors (XXH3_128bits, seed 0).
    if checksum.block_digest(b"").hex() != "99aa06d3014798d86001c324468d497f":
        msg = "xxh3-128 of nothing is not what it must be"
        raise Bug(msg)
    return f"{checksum.ALGORITHM} per {checksum.BLOCK_BYTES >> 20} MiB"


def _memory() -> str:
    from ckptd.arena import Arena

    made = Arena.create(job="selftest", rank=0, slot_count=2, slot_bytes=1 << 20)
    made.populate()
    again = Arena.adopt(os.dup(made.fd))
    same = again.descriptor == made.descriptor
    again.close()
    made.close()
    if not same:
        msg = "memory that was adopted is not what was made"
        raise Bug(msg)
    return "memory is sealed, populated and adopted"


def _socket() -> str:
    import socket

    one, other = socket.socketpair(socket.AF_UNIX)
    with one, other:
        read, write = os.pipe()
        socket.send_fds(one, [b"x"], [write])
        _, fds, _, _ = socket.recv_fds(other, 1, 1)
        os.write(fds[0], b"!")
        got = os.read(read, 1)
        for fd in (read, write, *fds):
            os.close(fd)
    if got != b"!":
        msg = "a descriptor did not come through a socket"
        raise Bug(msg)
    return "descriptors go through a socket"


TESTS: dict[str, Callable[[], str]] = {"parity": _parity, "checksum": _checksum, "memory": _memory, "socket": _socket}
