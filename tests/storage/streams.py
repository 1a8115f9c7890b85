"""The contract of `ckptd.storage.Streaming`, as tests. A store that streams subclasses `Streams` too."""

from __future__ import annotations

import pytest

from ckptd.errors import BadArgument
from ckptd.storage import Streaming
from tests.storage.helpers import read


class Streams:
    """What every store that streams does."""

    def test_it_says_that_it_streams(self, store):
        assert isinstance(store, Streaming)

    @pytest.mark.parametrize("sizes", [[], [0], [1, 2, 3], [70_001, 5, 4096]])
    def test_a_stream_comes_back_and_nothing_is_visible_before(self, store, sizes):
        data = bytearray(b"".join(bytes([i + 1]) * n for i, n in enumerate(sizes)))
        at = 0
        with store.stream("a/b/x") as writer:
            for n in sizes:
                window = bytearray(data[at : at + n])
                writer.write(memoryview(window))
                window[:] = bytes(n)  # the memory is ours again
                at += n
                assert list(store.list("")) == []
        assert read(store, "a/b/x") == data
        assert [s.bytes for s in store.list("a")] == [len(data)]

    def test_a_stream_replaces_what_was_there_and_only_at_its_end(self, store):
        store.put("a/x", b"old")
        writer = store.stream("a/x")
        writer.write([b"ne", memoryview(b"w")])
        assert read(store, "a/x") == b"old"
        writer.commit()
        assert read(store, "a/x") == b"new"

    def test_an_error_aborts(self, store):
        store.put("a/x", b"old")
        for name in ["a/x", "b/y"]:
            with pytest.raises(RuntimeError, match="mine"), store.stream(name) as writer:
                writer.write(b"new" * 1000)
                raise RuntimeError("mine")
        assert read(store, "a/x") == b"old"
        assert [s.name for s in store.list("")] == ["a/x"]

    def test_an_ended_stream_has_ended(self, store):
        with store.stream("a/x") as writer:
            writer.write(b"1")
            writer.commit()
        writer.abort()
        for call in [lambda: writer.write(b"2"), writer.commit]:
            with pytest.raises(BadArgument, match="ended"):
                call()
        assert read(store, "a/x") == b"1"
        gone = store.stream("a/y")
        gone.abort()
        with pytest.raises(BadArgument, match="ended"):
            gone.commit()
        assert [s.name for s in store.list("")] == ["a/x"]

    def test_two_streams_to_one_name(self, store):
        one, two = store.stream("a/x"), store.stream("a/x")
        one.write(b"1" * 10)
        two.write(b"2" * 10)
        one.commit()
        assert read(store, "a/x") == b"1" * 10
        two.commit()
        assert read(store, "a/x") == b"2" * 10

    def test_bad_names_are_refused_by_streams(self, store):
        for name in ["", "/a", "a/../b"]:
            with pytest.raises(BadArgument):
                store.stream(name)
