"""LocalStore beyond the contract: what lies on the disk, links, full and failing disks, processes that die in mid-put."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import secrets
import stat
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from ckptd.errors import CkptdError, NotFound, StoreFailed
from ckptd.storage import is_temporary, local
from ckptd.storage.direct import DirectFile, reserve
from ckptd.storage.local import LocalStore
from tests.storage.contract import Contract
from tests.storage.helpers import read

MB = 1 << 20


class TestLocal(Contract):
    @pytest.fixture
    def store(self, tmp_path):
        return LocalStore(tmp_path / "deep" / "root")


@pytest.fixture
def store(tmp_path):
    return LocalStore(tmp_path / "root")


@pytest.fixture
def root(tmp_path):
    return tmp_path / "root"


def files_below(path: Path) -> list[str]:
    return sorted(str(p.relative_to(path)) for p in path.rglob("*") if not p.is_dir())


def test_modes_obey_the_umask(store, root):
    before = os.umask(0o027)
    try:
        store.put("a/x", b"1")
    finally:
        os.umask(before)
    assert stat.S_IMODE((root / "a" / "x").stat().st_mode) == 0o640
    assert stat.S_IMODE((root / "a").stat().st_mode) == 0o750


@pytest.mark.parametrize("size", [8 * MB, 17 * MB + 1234])
@pytest.mark.parametrize("shift", [0, 1])
def test_bulk_data_goes_past_the_page_cache(store, monkeypatch, size, shift):
    """Aligned memory is written with O_DIRECT where the file system can; memory that is not aligned, and tails, are not."""
    memory = memoryview(mmap.mmap(-1, size + 4096))[shift : shift + size]
    memory[:8], memory[-8:] = b"begin..\n", b"the end\n"
    direct = []
    real = DirectFile.write
    monkeypatch.setattr(DirectFile, "write", lambda *a: direct.append(real(*a)) or direct[-1])
    store.put("a/x", memory)
    assert direct in ([size // 4096 * 4096], [0]) if shift == 0 else direct == [0]
    print(f"O_DIRECT wrote {direct} of {size} bytes")
    assert read(store, "a/x") == memory


def test_direct_writes_that_the_file_system_refuses_are_made_through_the_cache(store, monkeypatch):
    real = os.pwrite
    refused = []

    def pwrite(fd, data, at):
        if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT and at >= 16 * MB:
            refused.append(at)
            raise OSError(errno.EINVAL, "no direct writes here")
        return real(fd, data, at)

    monkeypatch.setattr(os, "pwrite", pwrite)
    memory = memoryview(mmap.mmap(-1, 20 * MB))
    memory[:] = bytes(range(256)) * (20 * MB // 256)
    store.put("x", memory)
    assert read(store, "x") == memory
    assert refused in ([16 * MB], [])


def test_short_writes_are_continued(store, monkeypatch):
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: real(fd, data[: max(1, len(data) // 2)], at))
    memory = memoryview(mmap.mmap(-1, 9 * MB))
    memory[:] = bytes(range(256)) * (9 * MB // 256)
    store.put("x", [b"head", memory, b"tail"])
    assert read(store, "x") == b"head" + bytes(memory) + b"tail"


# Things in the way


def test_links_in_place_of_a_file_are_not_followed(store, root, tmp_path):
    secret = tmp_path / "secret"
    secret.write_bytes(b"secret")
    store.put("a/x", b"1")
    (root / "a" / "link").symlink_to(secret)
    for call in [lambda: store.get("a/link", 0, memoryview(bytearray(1))), lambda: store.stat("a/link"),
                 lambda: store.put("a/link", b"2", exclusive=True)]:  # fmt: skip
        with pytest.raises(StoreFailed):
            call()
    assert [s.name for s in store.list("")] == ["a/x"]
    store.put("a/link", b"mine")  # replaces the link, and not what it points to
    assert (secret.read_bytes(), read(store, "a/link")) == (b"secret", b"mine")
    (root / "a" / "link2").symlink_to(secret)
    store.delete("a/link2")
    assert secret.exists()


def test_links_in_place_of_a_folder_are_not_followed(store, root, tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "x").write_bytes(b"1")
    store.put("a/x", b"1")
    (root / "link").symlink_to(outside)
    for call in [lambda: store.get("link/x", 0, memoryview(bytearray(1))), lambda: store.stat("link/x"), lambda: store.delete("link/x"),
                 lambda: store.put("link/y", b"2"), lambda: store.put("link/deep/y", b"2"), lambda: list(store.list("link"))]:  # fmt: skip
        with pytest.raises(StoreFailed, match="symbolic links"):
            call()
    assert [s.name for s in store.list("")] == ["a/x"]
    assert files_below(outside) == ["x"]


def test_the_root_may_be_a_link(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "root").symlink_to(tmp_path / "real")
    LocalStore(tmp_path / "root").put("a/x", b"1")
    assert files_below(tmp_path / "real") == ["a/x"]


@pytest.mark.parametrize("kind", ["directory", "fifo", "socket"])
def test_no_regular_file(store, root, kind):
    store.put("a/x", b"1")
    path = root / "a" / "odd"
    if kind == "directory":
        path.mkdir()
    else:
        os.mknod(path, 0o600 | (stat.S_IFIFO if kind == "fifo" else stat.S_IFSOCK))
    began_s = time.monotonic()
    for call in [lambda: store.get("a/odd", 0, memoryview(bytearray(1))), lambda: store.stat("a/odd"),
                 lambda: store.put("a/odd", b"", exclusive=True)]:  # fmt: skip
        with pytest.raises(StoreFailed):
            call()
    if kind == "directory":
        for call in [lambda: store.put("a/odd", b""), lambda: store.delete("a/odd")]:
            with pytest.raises(StoreFailed):
                call()
    assert [s.name for s in store.list("")] == ["a/x"]
    assert time.monotonic() - began_s < 5  # nothing waits for a FIFO's other end


def test_a_file_in_place_of_a_folder(store):
    store.put("a", b"1")
    for call in [lambda: store.put("a/x", b""), lambda: store.stat("a/x"), lambda: list(store.list("a"))]:
        with pytest.raises(StoreFailed):
            call()


def test_foreign_files_do_not_disturb_a_listing(store, root):
    store.put("a/x", b"1")
    (root / "a" / ("z" * 250)).write_bytes(b"")
    (Path(os.fsdecode(bytes(root) + b"/a/not-utf8-\xff"))).write_bytes(b"")
    assert [s.name for s in store.list("")] == ["a/x", "a/" + "z" * 250]


# Disks that are full or fail


def failing(monkeypatch, function, code, times):
    """`os.<function>` fails the first `times` times; returns the list of its calls."""
    real, calls = getattr(os, function), []

    def fail(*args, **kwargs):
        calls.append(args)
        if len(calls) <= times:
            raise OSError(code, os.strerror(code))
        return real(*args, **kwargs)

    monkeypatch.setattr(os, function, fail)
    return calls


@pytest.mark.parametrize("exclusive", [False, True])
def test_an_fsync_error_rewrites_under_a_new_name(store, root, monkeypatch, exclusive):
    store.put("a/x", b"old")
    names = []
    real = secrets.token_hex
    monkeypatch.setattr(secrets, "token_hex", lambda n: names.append(real(n)) or names[-1])
    failing(monkeypatch, "fsync", errno.EIO, 1)
    store.put("a/y", b"new", exclusive=exclusive)
    assert len(set(names)) == 2
    assert files_below(root) == ["a/x", "a/y"]
    assert read(store, "a/y") == b"new"


@pytest.mark.parametrize("exclusive", [False, True])
@pytest.mark.parametrize("first", range(4))
def test_every_fsync_of_a_put_counts(store, root, monkeypatch, exclusive, first):
    """The file's, its folder's, the folders' above: whichever fails once, the put is done again, and then holds."""
    store.put("a/x", b"old")
    real, calls = os.fsync, []

    def fsync(fd):
        calls.append(fd)
        if len(calls) - 1 == first:
            raise OSError(errno.EIO, "Input/output error")
        real(fd)

    monkeypatch.setattr(os, "fsync", fsync)
    store.put("a/y", b"new", exclusive=exclusive)
    assert len(calls) == (first + 1) + 3 if first < 3 else len(calls) == 3
    assert files_below(root) == ["a/x", "a/y"]


@pytest.mark.parametrize("code", [errno.EINVAL, errno.EOPNOTSUPP])
def test_file_systems_without_fsync_of_folders(store, root, monkeypatch, code):
    real = os.fsync

    def fsync(fd):
        if stat.S_ISDIR(os.fstat(fd).st_mode):
            raise OSError(code, os.strerror(code))
        real(fd)

    monkeypatch.setattr(os, "fsync", fsync)
    store.put("a/x", b"1", exclusive=True)
    store.put("a/y", b"2")
    store.delete("a/y")
    assert files_below(root) == ["a/x"]


@pytest.mark.parametrize("exclusive", [False, True])
def test_two_fsync_errors_fail_the_put(store, root, monkeypatch, exclusive):
    store.put("a/x", b"old")
    failing(monkeypatch, "fsync", errno.EIO, 2)
    with pytest.raises(StoreFailed, match="fsync failed twice") as caught:
        store.put("a/y", b"new", exclusive=exclusive)
    assert "dmesg" in caught.value.remedy
    assert files_below(root) == ["a/x"]


@pytest.mark.parametrize(("code", "remedy"), [(errno.ENOSPC, "free space"), (errno.EDQUOT, "quota"), (errno.EROFS, "read-only"),
                                              (errno.EACCES, "permission"), (errno.EIO, "dmesg"), (errno.EBADMSG, "mount")])  # fmt: skip
@pytest.mark.parametrize("function", ["open", "pwrite", "rename", "mkdir"])
def test_errors_name_path_cause_and_remedy(store, root, monkeypatch, function, code, remedy):
    store.put("a/x", b"old")
    with monkeypatch.context() as patched:
        failing(patched, function, code, 1)
        with pytest.raises(StoreFailed) as caught:
            store.put("a/x", b"new")
    assert str(root / "a" / "x") in caught.value.message
    assert os.strerror(code) in caught.value.message
    assert remedy in caught.value.remedy
    assert files_below(root) == ["a/x"]
    assert read(store, "a/x") == b"old"


@pytest.mark.parametrize("code", [errno.EPERM, errno.EOPNOTSUPP])
def test_exclusive_puts_without_hard_links(store, root, monkeypatch, code):
    failing(monkeypatch, "link", code, 100)
    store.put("a/x", b"1", exclusive=True)
    with pytest.raises(StoreFailed, match="exists"):
        store.put("a/x", b"2", exclusive=True)
    assert read(store, "a/x") == b"1"
    assert files_below(root) == ["a/x"]


def test_reads_that_fail(store, monkeypatch):
    store.put("a/x", b"1")
    failing(monkeypatch, "preadv", errno.EIO, 1)
    with pytest.raises(StoreFailed, match="cannot read .*a/x"):
        store.get("a/x", 0, memoryview(bytearray(1)))


def test_a_full_disk(tmp_path):
    """A real one: a 16 MiB tmpfs. The old object stays, no temporary stays, and the store works again after space was freed."""
    mount = tmp_path / "small"
    mount.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(mount)], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"mount is not permitted here: {done.stderr.strip()}")
    try:
        store = LocalStore(mount / "root")
        store.put("a/x", bytes(6 * MB))
        for data in [bytes(12 * MB), memoryview(mmap.mmap(-1, 12 * MB)), [bytes(1 * MB)] * 12]:
            with pytest.raises(StoreFailed, match="No space left") as caught:
                store.put("a/x", data)
            assert "free space" in caught.value.remedy
            assert files_below(mount) == ["root/a/x"]
        store.delete("a/x")
        store.put("a/x", bytes(12 * MB))
        assert store.stat("a/x").bytes == 12 * MB
    finally:
        subprocess.run(["umount", str(mount)], check=True)


def test_no_permission():
    """As another user, in another process: root may do anything."""
    if os.geteuid():
        pytest.skip("not root: cannot become somebody else")
    with tempfile.TemporaryDirectory() as path:
        Path(path).chmod(0o755)
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                os.setuid(65534)
                LocalStore(path).put("a/x", b"1")
            except StoreFailed as e:
                code = 0 if "permission" in e.remedy else 2
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


# Processes that die


STEPS = ["open", "pwrite", "fsync", "rename", "link", "unlink", "mkdir", "close"]


def die_at(n: int, work) -> bool:
    """Run `work` in a child that is gone at its n-th system call (half of it done, if it is a write). Whether it got that far."""
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        calls = 0
        real_write = os.pwrite

        def dying(name):
            real = getattr(os, name)

            def call(*args, **kwargs):
                nonlocal calls
                calls += 1
                if calls - 1 == n:
                    if name == "pwrite":
                        fd, data, at = args
                        real_write(fd, data[: len(data) // 2], at)
                    os._exit(99)
                return real(*args, **kwargs)

            return call

        code = 1
        try:
            for name in STEPS:
                setattr(os, name, dying(name))
            work()
            code = 0
        finally:
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert code in {0, 99}
    return code == 99


@pytest.mark.parametrize("exclusive", [False, True])
@pytest.mark.parametrize("existing", [False, True])
def test_a_put_that_dies_anywhere_leaves_old_or_new(tmp_path, exclusive, existing):
    if exclusive and existing:
        pytest.skip("an exclusive put of an existing name changes nothing")
    deaths = 0
    for n in range(200):
        store = LocalStore(tmp_path / f"root{n}")
        if existing:
            store.put("a/b/x", b"old" * 1000)
        died = die_at(n, lambda store=store: store.put("a/b/x", b"new!" * 1000, exclusive=exclusive))
        listed = list(store.list(""))
        held = read(store, "a/b/x") if listed else None
        assert held in ({b"new!" * 1000} if not died else {b"old" * 1000 if existing else None, b"new!" * 1000})
        assert [s.name for s in listed] in ([], ["a/b/x"])
        if held is None or not exclusive:
            store.put("a/b/x", b"again", exclusive=exclusive)
            assert read(store, "a/b/x") == b"again"
        if not died:
            break
        deaths += 1
    print(f"{deaths} deaths")
    assert 5 < deaths < 200


def test_a_process_killed_in_the_middle_of_a_large_put(tmp_path):
    """SIGKILL, for real: the reader sees nothing, or everything."""
    code = (
        "import mmap, sys; from ckptd.storage.local import LocalStore; m = memoryview(mmap.mmap(-1, 32 << 20));\n"
        "m[:] = b'k' * len(m); print('go', flush=True); LocalStore(sys.argv[1]).put('a/x', m); print('done', flush=True)"
    )
    seen = set()
    for i in range(4):
        root = tmp_path / f"root{i}"
        with subprocess.Popen([sys.executable, "-c", code, str(root)], stdout=subprocess.PIPE, text=True) as child:
            assert child.stdout.readline() == "go\n"
            time.sleep(0.004 * i)
            child.kill()
        sizes = [s.bytes for s in LocalStore(root).list("")]
        assert sizes in ([], [32 * MB])
        seen.add(tuple(sizes))
    print(f"seen after SIGKILL: {seen}")


def test_temporaries_of_the_dead_are_swept(store, root):
    store.put("a/x", b"1")
    young, old, held = (root / "a" / f".ckptd-{c * 32}.tmp" for c in "123")
    for path in (young, old, held):
        path.write_bytes(b"half")
        assert is_temporary(path.name)
    for path in (old, held):
        os.utime(path, (0, time.time() - 2 * local.STALE_AFTER_S))
    with held.open("rb") as writer:
        local.fcntl.flock(writer, local.fcntl.LOCK_EX)
        assert [s.name for s in store.list("")] == ["a/x"]
        assert files_below(root / "a") == sorted([young.name, held.name, "x"])
    assert [s.name for s in store.list("a")] == ["a/x"]
    assert files_below(root / "a") == sorted([young.name, "x"])


def test_no_descriptor_leaks(store):
    store.put("a/x", b"1")
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(10):
        store.put("a/y", b"2")
        list(store.list(""))
        for call in [lambda: store.stat("a/z"), lambda: store.put("a/x", b"", exclusive=True), lambda: store.get("q/x", 0, memoryview(b""))]:
            with pytest.raises(CkptdError):
                call()
        with pytest.raises(NotFound):
            store.get("q/x", 0, memoryview(bytearray()))
        store.delete("a/y")
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_reserving_space_tolerates_what_has_none(monkeypatch):
    """A pipe cannot be reserved; a closed descriptor is an error."""
    reading, writing = os.pipe()
    os.close(reading)
    try:
        with pytest.raises(OSError, match="seek"):
            reserve(writing, 10)
    finally:
        os.close(writing)
    monkeypatch.setattr(ctypes, "get_errno", lambda: errno.EOPNOTSUPP)
    reserve(writing, 10)
