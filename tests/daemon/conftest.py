"""Fixtures of the daemon's tests."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest

from tests.daemon.rig import Rig


@pytest.fixture
def rig():
    with tempfile.TemporaryDirectory(prefix="ckptd-") as base:  # short: a socket's path has 107 bytes
        made = Rig(Path(base))
        try:
            yield made
        finally:
            made.close()
