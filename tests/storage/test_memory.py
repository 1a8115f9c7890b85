"""MemoryStore, and how stores are opened."""

from __future__ import annotations

import pytest

from ckptd.errors import BadArgument
from ckptd.storage import open_store
from ckptd.storage.memory import MemoryStore
from tests.storage.contract import Contract
from tests.storage.helpers import read


class TestMemory(Contract):
    @pytest.fixture
    def store(self):
        return MemoryStore()


def test_memory_stores_are_shared_by_name():
    open_store("memory://one").put("a", b"1")
    assert read(open_store("memory://one"), "a") == b"1"
    assert list(open_store("memory://two").list("")) == []


def test_local_stores_by_path_and_url(tmp_path):
    open_store(str(tmp_path / "a b")).put("x", b"1")
    for url in [f"file://{tmp_path}/a%20b", f"file://localhost{tmp_path}/a%20b"]:
        assert read(open_store(url), "x") == b"1"


@pytest.mark.parametrize("url", ["", "ftp://host/x", "s3://", "memory://", "file://host/x", "file://", "file:///a%00b", "a\0b"])
def test_other_schemes_say_what_exists(url):
    with pytest.raises(BadArgument):
        open_store(url)
