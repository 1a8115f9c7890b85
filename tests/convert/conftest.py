"""What several test files convert: DeepSpeed's checkpoints are made once."""

from __future__ import annotations

import pytest

from tests.convert import zero_sources


@pytest.fixture(scope="session")
def zero_root(tmp_path_factory):
    return tmp_path_factory.mktemp("deepspeed")


@pytest.fixture(scope="session")
def zero_server(zero_root):
    made = zero_sources.Server(zero_root / "log")
    yield made
    made.close()
    print(f"DeepSpeed's worlds took {made.seconds:.0f} s")


@pytest.fixture(scope="session")
def zero_made(zero_root, zero_server):
    return zero_sources.make(zero_root, zero_server)
