"""`scripts/bench NAME`: find the benchmark, run it, print its tables and aims."""

from __future__ import annotations

import argparse
import importlib
import json
import pkgutil
import shlex
import signal
import sys
from pathlib import Path

import benchmarks
from benchmarks.harness import Bench

NAMES = sorted(m.name for m in pkgutil.iter_modules(benchmarks.__path__) if m.name not in {"__main__", "harness", "simjobs", "simhangs", "watch_links", "watch_real", "watch_score"})


def main() -> int:
    p = argparse.ArgumentParser(prog="scripts/bench", description=benchmarks.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("name", nargs="?", choices=NAMES, metavar="NAME", help="one of: " + ", ".join(NAMES))
    p.add_argument("--list", action="store_true", help="say which benchmarks there are")
    p.add_argument("--quick", action="store_true", help="under 90 s: smaller, fewer rounds, looser bounds (printed)")
    p.add_argument("--rounds", type=int, help="rounds, instead of the benchmark's own number")
    p.add_argument("--json", type=Path, metavar="FILE", help="write what is printed, the single rounds and the machine there")
    a, rest = p.parse_known_args()  # a benchmark may have options of its own: its function `options`
    if a.list:
        for name in NAMES:
            print(f"{name:10} {(importlib.import_module(f'benchmarks.{name}').__doc__ or '').splitlines()[0]}")
        return 0
    if a.name is None:
        p.error("NAME is missing; --list says which there are")
    options = getattr(importlib.import_module(f"benchmarks.{a.name}"), "options", None)
    if rest and options is None:
        p.error(f"unrecognized arguments: {shlex.join(rest)}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was started is ended
    with Bench(a.name, shlex.join(["scripts/bench", *sys.argv[1:]]), quick=a.quick, rounds=a.rounds) as bench:
        bench.options = options(rest) if options is not None else None
        importlib.import_module(f"benchmarks.{a.name}").run(bench)
        print(bench.text())
    if a.json is not None:
        a.json.write_text(json.dumps(bench.facts(), indent=1) + "\n")
    return 0 if all(aim.holds for aim in bench.aims) else 1


if __name__ == "__main__":
    sys.exit(main())
