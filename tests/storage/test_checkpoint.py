"""The commit protocol: what is written, what a crash leaves, and that no wrong byte is ever taken for a right one."""

from __future__ import annotations

import os
import shutil
import time
from collections import Counter

import pytest

from ckptd import errors
from ckptd.core.checksum import BLOCK_BYTES
from ckptd.core.image import parse
from ckptd.core.manifest import INDEX_NAME, MANIFEST_NAME, image_name
from ckptd.core.retention import Retention
from ckptd.errors import BadArgument, BadBytes, BadManifest, ChecksumMismatch, CkptdError, NotFound, StoreFailed
from ckptd.storage import checkpoint
from ckptd.storage.local import LocalStore
from ckptd.storage.memory import MemoryStore
from tests.storage.helpers import Crash, CrashingStore, commit, copy_of, make_step, read

STEP = make_step()
PLAIN = "job/step-00000007"


@pytest.fixture(params=["memory", "local"])
def store(request, tmp_path):
    return MemoryStore() if request.param == "memory" else LocalStore(tmp_path / "root")


@pytest.fixture(scope="module")
def committed():
    """A store with one good checkpoint; tests damage copies of it."""
    store = MemoryStore()
    commit(store, STEP)
    return store


def damage(committed, name, change):
    """A copy of the store in which `change` was applied to the bytes of one file of the checkpoint."""
    store = copy_of(committed)
    store.put(f"{PLAIN}/{name}", change(read(store, f"{PLAIN}/{name}")))
    return store


# What is written


def test_round_trip(store):
    directory, manifest = commit(store, STEP)
    assert directory == PLAIN
    assert [s.name for s in store.list("")] == [
        f"{PLAIN}/images/r00000.safetensors", f"{PLAIN}/images/r00001.safetensors", f"{PLAIN}/{INDEX_NAME}", f"{PLAIN}/{MANIFEST_NAME}"]  # fmt: skip
    assert checkpoint.read_checkpoint(store, directory) == (manifest, STEP.index)
    for rank, image in STEP.images.items():
        assert read(store, f"{directory}/{image_name(rank)}") == image
    seen = []
    report = checkpoint.verify_checkpoint(store, directory, lambda done, total: seen.append((done, total)))
    total = sum(map(len, STEP.images.values()))
    assert report == checkpoint.Report(directory, 2, total, ())
    assert report.ok
    assert seen[-1] == (total, total)
    (found,) = checkpoint.list_checkpoints(store, "job")
    assert (found.ok, found.manifest, found.attempt, found.step, found.error, found.unfinished) == (True, manifest, 1, 7, "", False)
    assert found.bytes == sum(s.bytes for s in store.list(""))


def test_manifest_comes_last_and_index_after_images():
    written = []

    class Recording(MemoryStore):
        def put(self, name, data, *, exclusive=False):
            written.append((name.removeprefix(PLAIN + "/"), exclusive))
            super().put(name, data, exclusive=exclusive)

    commit(Recording(), STEP)
    assert written == [(image_name(0), False), (image_name(1), False), (INDEX_NAME, False), (MANIFEST_NAME, True)]


def test_large_image_in_windows(store):
    """More than one window, a last block that is short, and progress that grows."""
    made = make_step(world_size=1, rows=(17 * BLOCK_BYTES + 64 * 3) // 64)
    directory, _ = commit(store, made)
    seen = []
    report = checkpoint.verify_checkpoint(store, directory, lambda done, total: seen.append(done))
    assert report.ok
    assert len(seen) == 3
    assert seen == sorted(seen)


@pytest.mark.parametrize("job", ["", ".", "..", ".hidden", "a/b", "a b", "ä", "x" * 129, "a\n", "a\0"])
def test_job_names(job):
    with pytest.raises(BadArgument):
        checkpoint.step_dir(job, 1)
    with pytest.raises(BadArgument):
        checkpoint.list_checkpoints(MemoryStore(), job)


@pytest.mark.parametrize(("step", "suffix", "last"), [(0, 0, "step-00000000"), (7, 3, "step-00000007.a3"), (10**9, 0, "step-1000000000")])
def test_directories(step, suffix, last):
    assert checkpoint.step_dir("a.b_c-D", step, suffix) == f"a.b_c-D/{last}"
    assert checkpoint.split_directory(f"a.b_c-D/{last}") == ("a.b_c-D", step, suffix)


@pytest.mark.parametrize("directory", ["", "job", "job/", "job/step-7", "job/step-00000007.a0", "job/step-00000007.a01", "job/step-000000007",
                                       "job/step-00000007/images", "job/step-0000000７", ".job/step-00000007", "job/step-00000007\n"])  # fmt: skip
def test_directories_of_others(directory):
    assert checkpoint.split_directory(directory) is None


def test_impossible_steps():
    for step, suffix in [(-1, 0), (0, -1), (10**18, 0)]:
        with pytest.raises(BadArgument):
            checkpoint.step_dir("job", step, suffix)
    with pytest.raises(BadArgument):
        checkpoint.pick_directory(MemoryStore(), "job", 1, -1)


def test_an_image_that_is_not_what_was_sealed(store):
    image = bytearray(STEP.images[0])
    image[-1] ^= 1
    with pytest.raises(ChecksumMismatch):
        checkpoint.write_image(store, PLAIN, 0, memoryview(image), STEP.digests[0])
    with pytest.raises(BadArgument):
        checkpoint.write_image(store, PLAIN, 0, memoryview(image), STEP.digests[0] * 2)


def test_a_disk_that_loses_a_bit(monkeypatch):
    class Flipping(MemoryStore):
        def put(self, name, data, *, exclusive=False):
            changed = bytearray(data)
            changed[len(changed) // 2] ^= 4
            super().put(name, changed, exclusive=exclusive)

    with pytest.raises(ChecksumMismatch):
        checkpoint.write_image(Flipping(), PLAIN, 0, memoryview(STEP.images[0]), STEP.digests[0])
    good, bad = MemoryStore(), Flipping()
    for rank, image in STEP.images.items():
        checkpoint.write_image(good, PLAIN, rank, memoryview(image), STEP.digests[rank])
    bad._objects = good._objects
    with pytest.raises(ChecksumMismatch, match="does not read back"):
        checkpoint.write_manifest(bad, PLAIN, STEP.index, 1.0)


# Committing


def test_a_store_that_the_nodes_do_not_share(store):
    checkpoint.write_image(store, PLAIN, 0, memoryview(STEP.images[0]), STEP.digests[0])
    with pytest.raises(StoreFailed, match=r"r00001.*missing") as caught:
        checkpoint.write_manifest(store, PLAIN, STEP.index, 1.0)
    assert "all nodes share" in caught.value.remedy
    store.put(f"{PLAIN}/{image_name(1)}", STEP.images[1] + b"!")
    with pytest.raises(StoreFailed, match=r"r00001.* bytes") as caught:
        checkpoint.write_manifest(store, PLAIN, STEP.index, 1.0)
    assert "all nodes share" in caught.value.remedy
    assert not any(f.manifest for f in checkpoint.list_checkpoints(store, None))


def test_a_zombie_that_wrote_over_an_image(store):
    """Same sizes, another attempt: the header tells."""
    zombie = make_step(attempt=0)
    for rank, image in STEP.images.items():
        checkpoint.write_image(store, PLAIN, rank, memoryview(image), STEP.digests[rank])
    checkpoint.write_image(store, PLAIN, 1, memoryview(zombie.images[1]), zombie.digests[1])
    assert len(zombie.images[1]) == len(STEP.images[1])
    with pytest.raises(ChecksumMismatch):
        checkpoint.write_manifest(store, PLAIN, STEP.index, 1.0)


def test_an_index_of_another_step_is_not_committed(store):
    with pytest.raises(BadManifest):
        checkpoint.write_manifest(store, "job/step-00000008", STEP.index, 1.0)


def test_commits_are_immutable(store):
    directory, manifest = commit(store, STEP)
    before = {s.name: read(store, s.name) for s in store.list("")}
    other = make_step(seed=1)
    with pytest.raises(StoreFailed, match="already committed"):
        checkpoint.write_image(store, directory, 0, memoryview(other.images[0]), other.digests[0])
    for rank, image in other.images.items():
        store.put(f"{directory}/{image_name(rank)}", image)  # somebody goes behind our back
    with pytest.raises(StoreFailed, match="already committed"):
        checkpoint.write_manifest(store, directory, other.index, 2.0)
    for name, data in before.items():
        store.put(name, data)
    assert commit(store, STEP, created_unix_s=2000.0) == (directory, manifest)  # repeating oneself is no change
    assert {s.name: read(store, s.name) for s in store.list("")} == before


def test_attempts_do_not_meet(store):
    assert checkpoint.pick_directory(store, "job", 7, 1) == PLAIN
    commit(store, STEP)
    assert checkpoint.pick_directory(store, "job", 7, 1) == PLAIN
    assert checkpoint.pick_directory(store, "job", 7, 2) == PLAIN + ".a2"
    assert checkpoint.pick_directory(store, "job", 8, 2) == "job/step-00000008"
    with pytest.raises(StoreFailed):
        checkpoint.pick_directory(store, "job", 7, 0)
    second = make_step(attempt=2, seed=2)
    assert commit(store, second)[0] == PLAIN + ".a2"
    assert [(f.attempt, f.directory, f.ok) for f in checkpoint.list_checkpoints(store, None)] == [(2, PLAIN + ".a2", True), (1, PLAIN, True)]
    assert all(checkpoint.verify_checkpoint(store, d).ok for d in (PLAIN, PLAIN + ".a2"))


def test_leftovers_are_written_over(store):
    """Images and an index of an attempt that died, of more ranks than there are now."""
    dead = make_step(world_size=4)
    for rank, image in dead.images.items():
        checkpoint.write_image(store, PLAIN, rank, memoryview(image), dead.digests[rank])
    store.put(f"{PLAIN}/{INDEX_NAME}", b"half an index")
    (found,) = checkpoint.list_checkpoints(store, "job")
    assert (found.ok, found.unfinished, found.attempt) == (False, True, None)
    made = make_step(attempt=2)
    assert commit(store, made)[0] == PLAIN
    assert checkpoint.verify_checkpoint(store, PLAIN).ok


def test_a_damaged_manifest_is_left_as_evidence(store):
    store.put(f"{PLAIN}/{MANIFEST_NAME}", b"{")
    store.put(f"{PLAIN}.a2/{MANIFEST_NAME}", b"{")
    made = make_step(attempt=2)
    assert commit(store, made)[0] == PLAIN + ".a2"
    assert read(store, f"{PLAIN}/{MANIFEST_NAME}") == b"{"


# Crashes


@pytest.mark.parametrize("how", ["before", "after", "torn"])
@pytest.mark.parametrize("next_attempt", [1, 2])
def test_a_crash_at_every_operation(how, next_attempt):
    """Whatever operation is the last: a reader sees no checkpoint or the complete one, and the next try succeeds."""
    outcomes = Counter()
    for at in range(1000):
        inner = MemoryStore()
        crashing = CrashingStore(inner, at, how)
        try:
            commit(crashing, STEP)
        except Crash:
            outcomes["crashed"] += 1
        else:
            outcomes["finished"] += 1
        for found in checkpoint.list_checkpoints(inner, None):
            outcomes["complete" if found.ok else "none"] += 1
            if found.ok:
                assert checkpoint.verify_checkpoint(inner, found.directory).ok
                assert checkpoint.read_checkpoint(inner, found.directory)[1] == STEP.index
            else:
                with pytest.raises((BadBytes, NotFound)):
                    checkpoint.read_checkpoint(inner, found.directory)
        again = make_step(attempt=next_attempt)
        directory, _ = commit(inner, again)
        assert checkpoint.verify_checkpoint(inner, directory).ok
        newest = checkpoint.list_checkpoints(inner, "job")[0]
        assert (newest.ok, newest.attempt, newest.directory) == (True, next_attempt, directory)
        if crashing.operations <= at:
            break
    print(how, dict(outcomes))
    assert outcomes["crashed"] > 20


@pytest.mark.parametrize("how", ["before", "after"])
def test_a_crash_at_every_operation_of_a_deletion(committed, how):
    for at in range(100):
        inner = copy_of(committed)
        crashing = CrashingStore(inner, at, how)
        try:
            checkpoint.delete_checkpoint(crashing, PLAIN)
        except Crash:
            for found in checkpoint.list_checkpoints(inner, None):
                assert found.ok or found.unfinished
        checkpoint.delete_checkpoint(inner, PLAIN)
        assert list(inner.list("")) == []
        if crashing.operations <= at:
            break
    assert at == 5


# Wrong bytes


MASKS = [0x01, 0x80]


@pytest.mark.parametrize("name", [MANIFEST_NAME, INDEX_NAME])
def test_every_byte_of_manifest_and_index(committed, name):
    """A changed bit is an error of ours, by name; or, where JSON has two spellings of one number, the very same content."""
    path = f"{PLAIN}/{name}"
    data = read(committed, path)
    truth = checkpoint.read_checkpoint(committed, PLAIN)
    store = copy_of(committed)
    seen = Counter()
    for at in range(len(data)):
        for mask in MASKS:
            store.put(path, data[:at] + bytes([data[at] ^ mask]) + data[at + 1 :])
            try:
                got = checkpoint.read_checkpoint(store, PLAIN)
            except BadBytes as e:
                seen[type(e).__name__] += 1
                (found,) = checkpoint.list_checkpoints(store, "job")
                assert name == INDEX_NAME or not found.ok
            else:
                assert got == truth
                seen["same content"] += 1
    print(name, len(data), "bytes:", dict(seen))
    assert seen["same content"] <= 2


@pytest.mark.parametrize("rank", [0, 1])
def test_every_byte_of_an_image(committed, rank):
    """Header and tensors: the block's checksum tells, and the report names the tensors of the block."""
    store = copy_of(committed)
    path = f"{PLAIN}/{image_name(rank)}"
    image = bytearray(STEP.images[rank])
    for at in range(len(image)):
        for mask in MASKS:
            image[at] ^= mask
            store._objects[path] = bytes(image)
            image[at] ^= mask
            report = checkpoint.verify_checkpoint(store, PLAIN)
            assert [(p.rank, p.error) for p in report.problems] == [(rank, "ChecksumMismatch")]
            assert "model.w" in report.problems[0].tensors
    print(f"{2 * len(image)} images with one wrong bit, all found")


def test_a_wrong_header_byte_without_a_checksum():
    """The parser alone (an image from elsewhere has no checksums): ckptd's errors or an image, nothing else."""
    image = bytearray(STEP.images[0])
    header_bytes = parse(bytes(image), len(image)).header_bytes
    seen = Counter()
    for at in range(header_bytes):
        for mask in MASKS:
            image[at] ^= mask
            try:
                parse(bytes(image), len(image))
                seen["parsed"] += 1
            except BadBytes as e:
                seen[type(e).__name__] += 1
            image[at] ^= mask
    print(dict(seen))


@pytest.mark.parametrize("name", [MANIFEST_NAME, INDEX_NAME, image_name(0), image_name(1)])
def test_truncated_and_lengthened(committed, name):
    data = read(committed, f"{PLAIN}/{name}")
    for changed in [data[:n] for n in {0, 1, 7, 8, 9, 100, 4095, 4096, 4097, len(data) // 2, len(data) - 2} if n < len(data) - 1] + [
        data + b"\0", data + b"x" * 4096, data * 2]:  # fmt: skip
        store = damage(committed, name, lambda _, c=changed: c)
        with pytest.raises(BadBytes):
            checkpoint.read_checkpoint(store, PLAIN)
        (found,) = checkpoint.list_checkpoints(store, "job")
        assert not found.ok
        assert found.error
        assert not checkpoint.verify_checkpoint(store, PLAIN).ok
        with pytest.raises(BadBytes):
            checkpoint.read_checkpoint(store, PLAIN)


def test_manifest_without_its_last_newline_is_the_same(committed):
    store = damage(committed, MANIFEST_NAME, lambda d: d[:-1])
    assert checkpoint.read_checkpoint(store, PLAIN) == checkpoint.read_checkpoint(committed, PLAIN)


@pytest.mark.parametrize("name", [INDEX_NAME, image_name(0), image_name(1)])
def test_a_missing_file(committed, name):
    store = copy_of(committed)
    store.delete(f"{PLAIN}/{name}")
    with pytest.raises(BadBytes, match="missing"):
        checkpoint.read_checkpoint(store, PLAIN)
    (found,) = checkpoint.list_checkpoints(store, "job")
    assert name in found.error
    assert not found.unfinished
    report = checkpoint.verify_checkpoint(store, PLAIN)
    assert not report.ok
    assert name == INDEX_NAME or report.bytes_read == sum(len(i) for r, i in STEP.images.items() if image_name(r) != name)


def test_no_manifest(committed):
    store = copy_of(committed)
    store.delete(f"{PLAIN}/{MANIFEST_NAME}")
    for call in [checkpoint.read_checkpoint, checkpoint.verify_checkpoint]:
        with pytest.raises(NotFound):
            call(store, PLAIN)


def test_swapped_images():
    """Two ranks' images of one size, exchanged."""
    made = make_step(world_size=3)
    store = MemoryStore()
    commit(store, made)
    a, b = (f"{PLAIN}/{image_name(r)}" for r in (1, 2))
    assert len(made.images[1]) == len(made.images[2])
    store.put(a, made.images[2])
    store.put(b, made.images[1])
    assert [(p.rank, p.error) for p in checkpoint.verify_checkpoint(store, PLAIN).problems] == [(1, "ChecksumMismatch"), (2, "ChecksumMismatch")]


@pytest.mark.parametrize("other", [make_step(job="jab"), make_step(step=8), make_step(attempt=2), make_step(seed=9)])
def test_an_image_of_another(committed, other):
    """Job, step, attempt or only content: same size, another image."""
    store = damage(committed, image_name(1), lambda _: other.images[1])
    report = checkpoint.verify_checkpoint(store, PLAIN)
    assert [(p.rank, p.error, p.tensors) for p in report.problems] == [(1, "ChecksumMismatch", ("model.w",))]
    assert [p.rank for p in report.problems] == [1]


@pytest.mark.parametrize("name", [MANIFEST_NAME, INDEX_NAME])
@pytest.mark.parametrize("other", [make_step(job="jab"), make_step(step=8), make_step(attempt=2), make_step(world_size=1)])
def test_a_manifest_or_index_of_another(committed, name, other):
    elsewhere = MemoryStore()
    directory, _ = commit(elsewhere, other)
    store = damage(committed, name, lambda _: read(elsewhere, f"{directory}/{name}"))
    with pytest.raises(BadBytes):
        checkpoint.read_checkpoint(store, PLAIN)
    assert not checkpoint.verify_checkpoint(store, PLAIN).ok


def test_a_checkpoint_under_another_name(committed):
    """Under a name of ours it must agree; under any other it may be read, and at the root of a store too."""
    store = MemoryStore()
    for directory in ["job/step-00000008", "jab/step-00000007", "job/step-00000007.a2", "kept/best", "kept"]:
        for stat in committed.list(PLAIN):
            store.put(stat.name.replace(PLAIN, directory), read(committed, stat.name))
    for directory in ["job/step-00000008", "jab/step-00000007", "job/step-00000007.a2"]:
        with pytest.raises(BadManifest):
            checkpoint.read_checkpoint(store, directory)
    assert checkpoint.verify_checkpoint(store, "kept/best").ok
    assert [(f.directory, f.ok) for f in checkpoint.list_checkpoints(store, None)] == [
        ("job/step-00000008", False), ("job/step-00000007.a2", False), ("jab/step-00000007", False)]  # fmt: skip
    with pytest.raises(BadArgument):
        checkpoint.delete_checkpoint(store, "kept")
    root = MemoryStore()
    for stat in committed.list(PLAIN):
        root.put(stat.name.removeprefix(PLAIN + "/"), read(committed, stat.name))
    assert checkpoint.verify_checkpoint(root, "").ok


def test_several_problems_in_one_report():
    """A bad block in one image, another image unreadable in its middle, a third missing: all are told, with their tensors."""
    made = make_step(world_size=4, rows=10 * BLOCK_BYTES // 64)

    class Failing(MemoryStore):
        def get(self, name, begin, into):
            if name.endswith("r00001.safetensors") and begin:
                msg = "Input/output error"
                raise StoreFailed(msg)
            super().get(name, begin, into)

    store = Failing()
    for rank, image in made.images.items():
        MemoryStore.put(store, f"{PLAIN}/{image_name(rank)}", image)
    for name, data in {s.name: read(m, s.name) for m in [MemoryStore()] if commit(m, made) for s in m.list("")}.items():
        store.put(name, data)
    image = bytearray(made.images[0])
    image[5 * BLOCK_BYTES] ^= 1
    image[9 * BLOCK_BYTES + 5] ^= 1
    store.put(f"{PLAIN}/{image_name(0)}", image)
    store.delete(f"{PLAIN}/{image_name(2)}")
    report = checkpoint.verify_checkpoint(store, PLAIN)
    assert [(p.rank, p.error) for p in report.problems] == [(0, "ChecksumMismatch"), (1, "StoreFailed"), (2, "NotFound")]
    assert "block 5" in report.problems[0].message
    assert "2 blocks" in report.problems[0].message
    assert report.problems[0].tensors == ("model.w",)  # and neither model.b nor optim.step, which lie elsewhere
    assert report.bytes_read == len(made.images[0]) + checkpoint.WINDOW_BYTES + len(made.images[3])


# Things in the way, on a disk


@pytest.mark.parametrize("name", [MANIFEST_NAME, INDEX_NAME, image_name(0), "images"])
@pytest.mark.parametrize("kind", ["directory", "link to the real one", "dangling link", "fifo"])
def test_odd_things_in_place_of_a_file(tmp_path, name, kind):
    store = LocalStore(tmp_path)
    commit(store, STEP)
    good = make_step(step=6)
    commit(store, good)
    path = tmp_path / PLAIN / name
    shutil.move(path, tmp_path / "real")
    match kind:
        case "directory":
            path.mkdir()
        case "fifo":
            os.mkfifo(path)
        case "link to the real one":
            path.symlink_to(tmp_path / "real")
        case "dangling link":
            path.symlink_to(tmp_path / "nowhere")
    began_s = time.monotonic()
    with pytest.raises(CkptdError) as caught:
        checkpoint.read_checkpoint(store, PLAIN)
    assert type(caught.value).__name__ in errors.__all__
    found = {f.step: f for f in checkpoint.list_checkpoints(store, "job")}
    assert not found[7].ok
    assert not found[7].unfinished
    assert found[6].ok
    assert not checkpoint.verify_checkpoint(store, PLAIN).ok
    assert checkpoint.verify_checkpoint(store, "job/step-00000006").ok
    assert time.monotonic() - began_s < 5


# Listing and retention


def test_listing_is_newest_first_and_shows_the_broken(store):
    for attempt, step in [(1, 5), (1, 9), (2, 6), (2, 10), (3, 7)]:
        commit(store, make_step(attempt=attempt, step=step))
    commit(store, make_step(job="other", attempt=9, step=1))
    store.put("job/step-00000010/manifest.json", b"\xff\xfe")
    store.put("job/step-00000011/images/r00000.safetensors", b"x")
    for foreign in ["job/notes.txt", "job/step-12/manifest.json", "README", "job/tmp/x/y", ".trash/step-00000001/manifest.json"]:
        store.put(foreign, b"{}")
    listed = [(f.attempt, f.step, f.ok, f.unfinished) for f in checkpoint.list_checkpoints(store, "job")]
    assert listed == [(3, 7, True, False), (2, 6, True, False), (1, 9, True, False), (1, 5, True, False),
                      (None, 11, False, True), (None, 10, False, False)]  # fmt: skip
    assert [f.job for f in checkpoint.list_checkpoints(store, None)] == ["other"] + ["job"] * 6
    assert checkpoint.list_checkpoints(store, "nobody") == []


def test_retention(store):
    for step in range(1, 9):
        commit(store, make_step(step=step), created_unix_s=float(step))
    commit(store, make_step(job="job2", step=1))
    store.put("job/step-00000002/manifest.json", b"damaged")
    for step in (0, 99):
        store.put(f"job/step-000000{step:02}/images/r00000.safetensors", b"unfinished")
    gone = checkpoint.apply_retention(store, "job", Retention(newest=2, every=4), {"job/step-00000003"}, now_unix_s=100.0)
    assert gone == [f"job/step-0000000{n}" for n in (1, 5, 6, 0)]
    left = {f.step for f in checkpoint.list_checkpoints(store, "job")}
    assert left == {2, 3, 4, 7, 8, 99}
    assert len(checkpoint.list_checkpoints(store, "job2")) == 1
    assert checkpoint.apply_retention(store, "job", Retention(newest=2, every=4), {"job/step-00000003"}) == []


def test_retention_never_takes_the_last_good_one(store):
    """Newer ones are damaged or unfinished: the old good one is the last hope."""
    commit(store, make_step(step=1))
    commit(store, make_step(step=2))
    store.delete(f"job/step-00000002/{image_name(1)}")
    store.put("job/step-00000003/images/r00000.safetensors", b"unfinished")
    assert checkpoint.apply_retention(store, "job", Retention(newest=1), ()) == []
    store.delete(f"job/step-00000001/{MANIFEST_NAME}")
    assert checkpoint.apply_retention(store, "job", Retention(newest=1), ()) == []


def test_deleting(store):
    commit(store, STEP)
    checkpoint.delete_checkpoint(store, PLAIN)
    checkpoint.delete_checkpoint(store, PLAIN)
    assert list(store.list("")) == []
    for directory in ["", "job", "job/step-7", "..", "job/../other/step-00000001"]:
        with pytest.raises(BadArgument):
            checkpoint.delete_checkpoint(store, directory)
