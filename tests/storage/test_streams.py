"""Streams of the stores that need no server; what a directory does with them beyond the contract."""

from __future__ import annotations

import errno
import os

import pytest

from ckptd.errors import StoreFailed
from ckptd.storage import local
from ckptd.storage.local import LocalStore
from ckptd.storage.memory import MemoryStore
from tests.storage.helpers import read
from tests.storage.streams import Streams

MIB = 1 << 20


class TestMemoryStreams(Streams):
    @pytest.fixture
    def store(self):
        return MemoryStore()


class TestLocalStreams(Streams):
    @pytest.fixture
    def store(self, tmp_path):
        return LocalStore(tmp_path / "root")


@pytest.fixture
def store(tmp_path):
    return LocalStore(tmp_path / "root")


def files(tmp_path):
    return sorted(str(p.relative_to(tmp_path / "root")) for p in (tmp_path / "root").rglob("*") if p.is_file())


def test_a_long_stream_is_whole(store, tmp_path):
    window, n = bytearray(5 * MIB + 13), 9
    with store.stream("a/x") as writer:
        for i in range(n):
            window[:] = bytes([i]) * len(window)
            writer.write(memoryview(window))
    assert read(store, "a/x") == b"".join(bytes([i]) * len(window) for i in range(n))
    assert files(tmp_path) == ["a/x"]


def test_an_abort_leaves_no_file(store, tmp_path):
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(KeyboardInterrupt), store.stream("a/x") as writer:
        writer.write(bytes(40 * MIB))
        assert len(files(tmp_path)) == 1
        raise KeyboardInterrupt
    assert files(tmp_path) == []
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_listing_leaves_an_unfinished_stream_alone(store, tmp_path, monkeypatch):
    """Even if it has been silent for long: its lock says that its writer lives."""
    with store.stream("a/x") as writer:
        writer.write(bytes(20 * MIB))
        monkeypatch.setattr(local, "STALE_AFTER_S", -1.0)
        assert list(store.list("")) == []
        assert len(files(tmp_path)) == 1
    assert store.stat("a/x").bytes == 20 * MIB


@pytest.mark.parametrize("call", ["pwrite", "fsync", "rename"])
def test_what_the_disk_refuses_fails_the_stream(store, tmp_path, monkeypatch, call):
    store.put("a/x", b"old")

    def refused(*args, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(StoreFailed, match=r"a/x: No space left(.|\n)*remedy: free space"), store.stream("a/x") as writer:
        writer.write(b"new")
        monkeypatch.setattr(os, call, refused)
    monkeypatch.undo()
    assert read(store, "a/x") == b"old"
    assert files(tmp_path) == ["a/x"]
