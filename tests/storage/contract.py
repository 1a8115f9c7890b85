"""The contract of `ckptd.storage.Store`, as tests. A new store subclasses `Contract` and gives it a fixture `store`: empty, fresh."""

from __future__ import annotations

import threading

import pytest

from ckptd.errors import BadArgument, NotFound, StoreFailed
from ckptd.storage import Stat
from tests.storage.helpers import read

BAD_NAMES = ["", "/", "/a", "a/", "a//b", ".", "..", "a/../b", "a/./b", "../a", "a\0b", "\udc80", "x" * 256, "/".join(["y" * 200] * 6),
             ".ckptd-" + "0" * 32 + ".tmp", "a/.ckptd-" + "f" * 32 + ".tmp/b"]  # fmt: skip


class Contract:
    """What every store does."""

    @pytest.mark.parametrize("size", [0, 1, 4095, 4096, 70_001])
    def test_bytes_come_back(self, store, size):
        data = bytes(i * 7 % 251 for i in range(size))
        store.put("job/step-1/x", data)
        assert read(store, "job/step-1/x") == data
        assert store.stat("job/step-1/x") == Stat("job/step-1/x", size)

    def test_data_in_parts(self, store):
        store.put("a/x", [b"ab", memoryview(b"cd"), bytearray(), bytearray(b"e")])
        assert read(store, "a/x") == b"abcde"
        store.put("a/y", [])
        assert read(store, "a/y") == b""
        store.put("a/z", memoryview(bytearray(range(16))).cast("I"))
        assert read(store, "a/z") == bytes(range(16))

    def test_ranges(self, store):
        store.put("a/x", bytes(range(100)))
        for begin, size in [(0, 1), (99, 1), (10, 50), (100, 0), (0, 100)]:
            into = bytearray(size)
            store.get("a/x", begin, memoryview(into))
            assert into == bytes(range(begin, begin + size))

    @pytest.mark.parametrize(("begin", "size"), [(0, 101), (100, 1), (10**9, 1), (99, 2)])
    def test_short_read_is_an_error(self, store, begin, size):
        store.put("a/x", bytes(100))
        with pytest.raises(StoreFailed, match="short read"):
            store.get("a/x", begin, memoryview(bytearray(size)))

    def test_impossible_reads(self, store):
        store.put("a/x", b"abc")
        with pytest.raises(BadArgument):
            store.get("a/x", -1, memoryview(bytearray(1)))
        with pytest.raises(BadArgument):
            store.get("a/x", 0, memoryview(b"123"))

    def test_missing(self, store):
        store.put("a/x", b"")
        for name in ["b", "a/y", "b/c/d"]:
            with pytest.raises(NotFound):
                store.stat(name)
            with pytest.raises(NotFound):
                store.get(name, 0, memoryview(bytearray()))

    def test_overwrites_unless_exclusive(self, store):
        store.put("a/x", b"one")
        store.put("a/x", b"second")
        assert read(store, "a/x") == b"second"
        with pytest.raises(StoreFailed, match="exist"):
            store.put("a/x", b"third", exclusive=True)
        assert read(store, "a/x") == b"second"
        store.put("a/y", b"new", exclusive=True)
        assert read(store, "a/y") == b"new"
        assert [s.name for s in store.list("")] == ["a/x", "a/y"]

    def test_one_of_many_exclusive_puts_wins(self, store):
        won, lost = [], []

        def write(i):
            try:
                store.put("a/b/x", b"%d" % i * 1000, exclusive=True)
                won.append(i)
            except StoreFailed:
                lost.append(i)

        threads = [threading.Thread(target=write, args=(i,)) for i in range(8)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
        assert (len(won), len(lost)) == (1, 7)
        assert read(store, "a/b/x") == b"%d" % won[0] * 1000

    def test_a_reader_sees_one_put_or_another(self, store):
        store.put("a/x", b"\0" * 50_000)
        stop = threading.Event()

        def write():
            i = 0
            while not stop.is_set():
                i += 1
                store.put("a/x", bytes([i % 256]) * 50_000)

        thread = threading.Thread(target=write)
        thread.start()
        try:
            for _ in range(200):
                assert len(set(read(store, "a/x"))) == 1
                assert [s.bytes for s in store.list("")] == [50_000]
        finally:
            stop.set()
            thread.join()

    def test_list_is_sorted_and_knows_folders(self, store):
        names = ["a/b/x", "a/b.c", "a/x", "ab/x", "b", "a/b/y/z"]
        for name in names:
            store.put(name, name.encode())
        assert [s.name for s in store.list("")] == sorted(names)
        assert list(store.list("a")) == [Stat(n, len(n)) for n in sorted(names) if n.startswith("a/")]
        assert [s.name for s in store.list("a/b")] == ["a/b/x", "a/b/y/z"]
        assert list(store.list("nowhere/at/all")) == []

    def test_an_empty_store_lists_nothing(self, store):
        assert list(store.list("")) == []

    def test_delete(self, store):
        store.put("a/b/x", b"1")
        store.put("a/y", b"2")
        for _ in range(2):
            store.delete("a/b/x")
            store.delete("never/was")
        assert [s.name for s in store.list("")] == ["a/y"]
        store.put("a/b/x", b"3")
        assert read(store, "a/b/x") == b"3"

    @pytest.mark.parametrize("name", BAD_NAMES)
    def test_bad_names_are_refused(self, store, name):
        calls = [lambda: store.put(name, b""), lambda: store.get(name, 0, memoryview(bytearray())), lambda: store.delete(name),
                 lambda: store.stat(name), lambda: list(store.list(name)) if name else store.stat(name)]  # fmt: skip
        for call in calls:
            with pytest.raises(BadArgument):
                call()

    def test_puts_and_deletes_in_one_folder_do_not_disturb_each_other(self, store):
        errors = []

        def work(i):
            try:
                for _ in range(25):
                    store.put(f"a/b/{i}", b"x")
                    store.delete(f"a/b/{i}")
            except Exception as e:
                errors.append(e)

        threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
        assert errors == []
        assert list(store.list("")) == []
