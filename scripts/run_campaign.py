"""Fresh seeds for the simulators and for real node loss, until the time is over. Called by scripts/campaign."""

from __future__ import annotations

import argparse
import os
import random
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

REAL = [sys.executable, "-m", "pytest", "-q", "-s", "-x", "--timeout", "900", "-p", "no:cacheprovider", "tests/train/test_elastic.py", "-k", "seeded"]


def simulated(seconds: float, rng: random.Random) -> tuple[int, list[str]]:
    """Clusters of snapshots and of rendezvous, in turn; seeds that fail, with what they say."""
    from tests.core import sim, test_rendezvous

    done, failed, until = 0, [], time.monotonic() + seconds
    while time.monotonic() < until:
        seed = rng.randrange(1 << 40)
        for name, simulate in (("tests/core/test_sim.py", sim.simulate), ("tests/core/test_rendezvous.py", test_rendezvous.simulate)):
            try:
                simulate(seed)
            except AssertionError as e:
                failed.append(f"SIM_SEED={seed} {name}: {str(e).splitlines()[0]}")
        done += 1
    return done, failed


def real(rng: random.Random) -> tuple[int, str]:
    """Schedules of node loss under real jobs; how many held, and what failed."""
    seed = rng.randrange(1 << 31)
    run = subprocess.run(REAL, cwd=ROOT, env={**os.environ, "ELASTIC_SEED": str(seed)}, capture_output=True, text=True, check=False)
    lines = [line for line in run.stdout.splitlines() if line.startswith("seed ")]
    print("\n".join(lines), flush=True)
    if run.returncode == 0 and not lines:
        return 0, "no network namespaces here: nothing was run"
    return len(lines), "" if run.returncode == 0 else f"ELASTIC_SEED={seed}:\n{run.stdout[-3000:]}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--rounds", type=int, default=0, help="of real node loss (about 7 minutes each); default: as fit in half of the time")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 31))
    a = parser.parse_args()
    print(f"seed {a.seed}", flush=True)
    rng, began = random.Random(a.seed), time.monotonic()
    schedules, failed = 0, []
    rounds = a.rounds or max(1, int(a.seconds / 2 / 420))
    for _ in range(rounds):
        held, why = real(rng)
        schedules += held
        failed += [why] if why else []
    count, wrong = simulated(max(0.0, a.seconds - (time.monotonic() - began)), rng)
    failed += wrong
    print(f"{schedules} schedules of real node loss, {count} simulated clusters of each kind, {time.monotonic() - began:.0f} s: {len(failed)} failed")
    print("\n".join(failed))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
