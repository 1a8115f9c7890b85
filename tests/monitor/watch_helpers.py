"""Real torchrun jobs that a real daemon watches: the driver of `scripts/bench watch --real`, for tests."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT / "scripts") not in sys.path:
    sys.path.insert(0, str(ROOT / "scripts"))

from benchmarks import harness, watch_real  # noqa: E402
from benchmarks.watch_real import Case, Ranks, Timeline  # noqa: E402
from benchmarks.watch_score import Row  # noqa: E402


@contextlib.contextmanager
def watched(directory: Path, world: int = 4) -> Iterator[Ranks]:
    """A daemon and a torchrun of `world` ranks; both are ended afterwards."""
    with harness.daemon(directory / "d"), Ranks(directory / "r", world, directory / "d") as ranks:
        yield ranks


def told(ranks: Ranks, case: Case) -> tuple[Row, Timeline]:
    """Run a case, print what came of it, give its score."""
    timeline = ranks.run(case)
    scored = watch_real.score(case, timeline)
    print(watch_real.line(scored, timeline))
    return scored, timeline
