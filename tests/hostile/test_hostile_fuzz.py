"""A hundred thousand mutants of foreign files (tests/hostile/fuzz.py); FUZZ_SEED, FUZZ_FIRST and FUZZ_EXECUTIONS replay and repeat."""

from __future__ import annotations

import os
import random

import pytest

pytest.importorskip("torch")

from tests.hostile import fuzz


@pytest.mark.slow
def test_mutants_are_refused_or_inert():
    seed = int(os.environ.get("FUZZ_SEED", random.SystemRandom().randrange(1 << 31)))
    print(f"seed {seed}", flush=True)
    counts = fuzz.fuzz(seed, int(os.environ.get("FUZZ_EXECUTIONS", "100000")), first=int(os.environ.get("FUZZ_FIRST", "0")))
    print(counts)
    assert "FUZZ_EXECUTIONS" in os.environ or all(accepted < done for done, accepted in counts.values())
