"""Clients that send garbage, too much or nothing; foreign users and foreign directories. Nobody else may notice."""

from __future__ import annotations

import array
import contextlib
import fcntl
import os
import select
import socket
import statistics
import struct
import subprocess
import sys
import threading
import time

import psutil
import pytest

from ckptd.channel import connect, private_directory
from ckptd.core import slots, wire
from ckptd.errors import BadArgument, DaemonUnreachable
from tests.daemon.rig import JOB, ROOT, Client, Peer, Refusal, latency, until

LATENCY_MAX_S = 0.1
STALL_MAX_S = 1.0
"""For a single answer: two cores that are shared with whatever else runs here are taken away for tenths of a second."""


@contextlib.contextmanager
def unhurt(rig, what):
    """Meanwhile another client is answered as ever, and a rank goes on committing."""
    t = rig.trainer(job="good")
    with latency(rig.directory()) as times:
        time.sleep(0.1)
        yield t
        t.fill(1)
        t.reached("committed", 1)
        time.sleep(0.1)
    assert times, "the other client was not answered at all"
    p95, worst = sorted(times)[-1 - len(times) // 20], max(times)
    print(f"{what}: {len(times)} answers, median {statistics.median(times) * 1e3:.2f} ms, p95 {p95 * 1e3:.1f} ms, worst {worst * 1e3:.1f} ms")
    assert p95 < LATENCY_MAX_S
    assert worst < STALL_MAX_S
    assert rig.daemons["d"].poll() is None
    assert "Traceback" not in rig.log()


def raw(rig) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(5)
    sock.connect(str(rig.directory() / "daemon.sock"))
    return sock


def peer(rig) -> socket.socket:
    client = Client(rig.directory())
    host, port = client.status()["peer_address"].split(":")
    client.close()
    return socket.create_connection((host, int(port)), 5)


def hung_up(sock) -> bool:
    try:
        while sock.recv(65536):
            pass
    except ConnectionResetError:
        pass
    return True


GARBAGE = {
    "random": os.urandom(100_000),
    "http": b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    "tls": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + os.urandom(500),
    "huge length": struct.pack("<I", (1 << 32) - 1) + b"x" * 1000,
    "int max": struct.pack("<I", (1 << 31) - 1),
    "zero length": struct.pack("<I", 0),
    "no message": struct.pack("<I", 3) + b"\xc1\xc1\xc1",
    "bomb": struct.pack("<I", 1_000_000) + b"\x91" * 1_000_000,
    "wrong kind": wire.encode(wire.Done(id=1)),
}


@pytest.mark.parametrize("kind", ["unix", "tcp"])
def test_garbage_ends_the_connection_and_nothing_else(rig, kind):
    rig.start()
    dial = raw if kind == "unix" else peer
    with unhurt(rig, f"garbage on the {kind} socket"):
        for name, data in GARBAGE.items():
            with dial(rig) as sock:
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                    sock.sendall(data)
                try:
                    assert hung_up(sock), name
                except TimeoutError:
                    pytest.fail(f"{name}: the connection was left open")


@pytest.mark.parametrize("kind", ["unix", "tcp"])
def test_half_frames_slow_bytes_and_idle_connections(rig, kind):
    rig.start()
    dial = raw if kind == "unix" else peer
    memory = psutil.Process(rig.daemons["d"].pid)
    before = memory.memory_info().rss
    with contextlib.ExitStack() as stack, unhurt(rig, f"200 idle, 50 half frames, slow bytes on the {kind} socket"):
        socks = [stack.enter_context(dial(rig)) for _ in range(250)]
        halves = socks[:50] if kind == "unix" else socks[-50:-10]  # of those that did not prove themselves, the oldest are hung up on
        for sock in halves:
            sock.sendall(struct.pack("<I", wire.MESSAGE_BYTES_MAX) + b"x" * 100)
        if kind == "tcp":
            rig.trainer()
        message = wire.encode(wire.Status(id=1)) if kind == "unix" else Peer(socks[-1]).bytes_of(wire.Describe(job=JOB, attempt=1, step=1, rank=0))
        for byte in message:
            socks[-1].sendall(bytes([byte]))
            time.sleep(0.005)
        assert socks[-1].recv(4)
        grown = memory.memory_info().rss - before
    print(f"250 connections cost {grown / 1e6:.1f} MB")
    assert grown < 60e6


@pytest.mark.parametrize("kind", ["unix", "tcp"])
def test_a_client_that_sends_much_and_reads_nothing(rig, kind):
    rig.start()
    dial = raw if kind == "unix" else peer
    process = psutil.Process(rig.daemons["d"].pid)
    if kind == "tcp":
        rig.trainer()
    with dial(rig) as sock, unhurt(rig, f"a client that does not read, {kind}"):
        proven = Peer(sock) if kind == "tcp" else None
        sock.setblocking(False)
        deadline = time.monotonic() + 1.0
        sent = 0
        while time.monotonic() < deadline:
            try:
                ask = wire.Describe(job=JOB, attempt=1, step=1, rank=0)
                message = wire.encode(wire.Status(id=1)) * 20 if proven is None else b"".join(proven.bytes_of(ask) for _ in range(20))
                sent += sock.send(message)
            except (BlockingIOError, BrokenPipeError, ConnectionResetError):
                time.sleep(0.01)
        rss = process.memory_info().rss
    print(f"{sent / 1e6:.1f} MB sent unread, daemon at {rss / 1e6:.0f} MB")
    assert rss < 400e6


def send_fds(sock, data, fds):
    sock.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))])


def fds_of(rig):
    return len(os.listdir(f"/proc/{rig.daemons['d'].pid}/fd"))


def test_a_flood_of_descriptors(rig):
    rig.start()
    with unhurt(rig, "a flood of descriptors"):
        rig.client().status()
        before = fds_of(rig)
        null = os.open("/dev/null", os.O_RDONLY)
        for count in (1, 16, 17, 200):
            with raw(rig) as sock:
                for _ in range(80):
                    try:
                        send_fds(sock, b"\x10", [null] * count)
                    except (BrokenPipeError, ConnectionResetError):
                        break
        os.close(null)
        until(lambda: fds_of(rig) <= before, what="descriptors leak")


def things_that_are_no_arena(tmp):
    """(name, fd)"""
    read, write = os.pipe()
    os.close(write)
    yield "pipe", read
    yield "directory", os.open(tmp, os.O_RDONLY)
    yield "zero", os.open("/dev/zero", os.O_RDWR)
    yield "path only", os.open("/etc/hostname", os.O_PATH)
    yield "socket", socket.socket(socket.AF_UNIX).detach()
    file = os.open(tmp / "file", os.O_RDWR | os.O_CREAT)
    os.ftruncate(file, 1 << 20)
    yield "file", file
    for name, nbytes, seals in (("unsealed", 1 << 20, 0), ("half sealed", 1 << 20, fcntl.F_SEAL_SHRINK), ("empty", 0, 6), ("zeros", 1 << 20, 6), ("sealed all", 1 << 20, 14)):
        fd = os.memfd_create(name, os.MFD_ALLOW_SEALING)
        os.ftruncate(fd, nbytes)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
        yield name, fd
    geometry = slots.Geometry(2, 4096)
    for name, change in (("other size", {"slot_bytes": 8192}), ("many slots", {"slots": 100}), ("evil name", {"arena": "x\nMAINPID=1"})):
        fd = os.memfd_create(name, os.MFD_ALLOW_SEALING)
        page = memoryview(bytearray(4096))
        slots.write_descriptor(page, slots.Descriptor(**{"arena": "ab", "job": JOB, "rank": 0, "slots": 2, "slot_bytes": 4096} | change))
        os.ftruncate(fd, geometry.arena_bytes)
        os.pwrite(fd, page, 0)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, 6)
        yield name, fd


def test_descriptors_that_are_no_arena(rig, tmp_path):
    rig.start()
    with unhurt(rig, "descriptors that are no arena"):
        rig.client().status()
        before = fds_of(rig)
        errors = 0
        for name, fd in things_that_are_no_arena(tmp_path):
            c = rig.client()
            c.send(wire.HandBack(), fd)
            t = rig.trainer(join=False)
            with pytest.raises(Refusal, match="NotFound|BadArgument"):
                t.ask(wire.Join, fd, **t.request(0))
            errors += 3
            assert c.status()["errors"] == errors, f"{name} was taken: {c.status()['last_errors']}"
            os.close(fd)
            t.close()
            c.close()
        until(lambda: fds_of(rig) <= before, what="descriptors leak")


def test_messages_without_their_descriptor(rig):
    rig.start()
    with unhurt(rig, "messages without their descriptor"):
        c = rig.client()
        c.send(wire.HandBack())
        t = rig.trainer(join=False)
        with pytest.raises(Refusal, match="PeerFailed"):
            t.ask(wire.Join, **t.request(0))
        assert c.status()["errors"] == 2


def test_the_descriptor_of_a_refused_join_is_not_the_next_messages(rig):
    """Two messages with a descriptor each, in one packet; the first is refused."""
    rig.start()
    t = rig.trainer(attempt=2)
    t.fill(1)
    t.reached("committed", 1)
    kept = os.dup(t.arena.fd)
    rig.kill()
    t.close()
    rig.start()
    rig.trainer(rank=1, world=2, attempt=2)
    old = rig.trainer(attempt=1, join=False)
    null = os.open("/dev/null", os.O_RDONLY)
    old.pipe.put(wire.Join(id=99, **old.request(0)), null)
    old.pipe.put(wire.HandBack(), kept)
    old.pipe.flush()
    os.close(null)
    os.close(kept)
    look = rig.client()
    until(lambda: (2, 1) in look.steps(), what="the arena that was handed back was lost")


NUMBERS = [
    {"image_bytes": -1}, {"image_bytes": -(1 << 60)}, {"slots": 0}, {"slots": -3}, {"slots": 1 << 40}, {"world_size": 0}, {"rank": -1}, {"local_count": 0},
    {"local_count": 1 << 40}, {"node": 3}, {"node": -1}, {"peers": []}, {"keep_newest": 0}, {"job": "a\0b"}, {"job": "x" * 5000}, {"attempt": -1},
    {"image_bytes": 1 << 62}, {"image_bytes": (1 << 63) - 1},
]  # fmt: skip


def test_joins_that_cannot_be_are_answered(rig):
    """Refused or granted, but answered: a trainer waits for it. And nothing stays behind."""
    rig.start()
    look = rig.client()
    for change in NUMBERS:
        t = rig.trainer(join=False, rank=change.get("rank", 0), job=change.get("job", JOB))
        held, before = look.status()["memory_bytes"], fds_of(rig)
        with contextlib.suppress(Refusal):
            t.ask(wire.Join, timeout_s=5, **(t.request(8192) | change))
        if look.status()["memory_bytes"] == held:
            until(lambda before=before: fds_of(rig) <= before, what=f"{change}: a refused arena leaks")
        t.close()
    assert "Traceback" not in rig.log()
    assert rig.daemons["d"].poll() is None


def test_a_request_for_more_memory_than_there_is_is_refused_with_numbers(rig):
    rig.start()
    t = rig.trainer(join=False)
    with pytest.raises(Refusal, match=r"MemoryRefused: a rank needs 2 slots of \d+ MB; \d+ MB are free \(.+\), \d+ MB stay reserved, and 0 more ranks"):
        t.ask(wire.Join, **t.request(1 << 45))
    assert rig.client().status()["memory_bytes"] == 0


def test_nobody_joins_without_saying_hello(rig):
    """Such a client would not be watched: a process that inherited its socket would hide its death."""
    rig.start()
    c = rig.client()
    t = rig.trainer(join=False)
    with pytest.raises(Refusal, match="BadArgument"):
        c.ask(wire.Join, **t.request(8192))
    with pytest.raises(Refusal, match="BadArgument"):
        t.ask(wire.Join, **(t.request(8192) | {"rank": 1, "world_size": 2}))


def cpu_s(rig):
    times = psutil.Process(rig.daemons["d"].pid).cpu_times()
    return times.user + times.system


def test_hello_twice_and_a_death_do_not_make_the_daemon_spin(rig):
    rig.start()

    def work(ready):
        t = rig.trainer(join=False)
        t.send(wire.Hello(id=50, job=JOB, rank=0))
        t.send(wire.Hello(id=51, job=JOB, rank=0))
        time.sleep(0.2)
        ready()

    rig.end(rig.child(work))
    time.sleep(0.2)
    before = cpu_s(rig)
    time.sleep(1.0)
    used = cpu_s(rig) - before
    print(f"an idle daemon uses {used * 1e3:.0f} ms of CPU per second")
    assert used < 0.2


def test_out_of_descriptors_is_no_busy_loop_and_passes(rig):
    rig.start("d", env={})
    pid = rig.daemons["d"].pid
    import resource

    soft = fds_of(rig) + 20
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (soft, soft))
    with contextlib.ExitStack() as stack:
        for _ in range(60):
            stack.enter_context(raw(rig))
        time.sleep(0.3)
        before = cpu_s(rig)
        time.sleep(1.0)
        used = cpu_s(rig) - before
    assert used < 0.3, f"{used:.2f} s of CPU in a second"
    until(lambda: Client(rig.directory()).close() is None)
    c = rig.client()
    assert c.status()["errors"] >= 1


def test_odd_notices_from_a_rank(rig):
    rig.start()
    with unhurt(rig, "odd notices"):
        t = rig.trainer()
        for slot in (-1, 99, 1 << 62):
            t.send(wire.Filled(step=1, slot=slot, gen=1))
        t.send(wire.Filled(step=5, slot=0, gen=77))
        for step in (-5, 0, (1 << 63) - 1):
            t.send(wire.Skipped(step=step, reason="x" * 100_000))
            t.send(wire.Persist(step=step))
            t.send(wire.RestoreFailed(attempt=step, step=step, source="memory", why="y" * 1000))
        t.send(wire.Chose(attempt=1 << 40, step=1 << 40))
        assert t.steps() == {}
        t.send(wire.Reached(attempt=1, step=1, state="committed"))
        with pytest.raises(EOFError):
            t.get(lambda m: False, 2)


def test_a_rank_that_lies_in_its_headers(rig):
    """What a trainer writes into its memory is believed about its own job and slot only."""
    rig.start()
    with unhurt(rig, "lying headers"):
        t = rig.trainer()
        for i, change in enumerate([{"image_bytes": 1 << 60}, {"local_count": 0}, {"nodes": 0}, {"world_size": 0}, {"image_bytes": 0}, {"rank": 1 << 63}]):
            slot = i % 3
            at = t.arena.geometry.header_at(slot)
            words = {"gen": i + 1, "attempt": 1, "step": i + 1, "image_bytes": 8192, "rank": 0, "world_size": 1, "local_count": 1, "node": 0, "nodes": 1}
            slots.begin(t.arena.memory, at, slots.Header(slots.FILLING, **(words | change)))
            slots.flip(t.arena.memory, at, slots.FILLED)
            t.send(wire.Filled(step=i + 1, slot=slot, gen=i + 1))
        t.status()


def test_ten_thousand_jobs(rig):
    """News and notices about jobs that nobody joined cost next to nothing."""
    rig.start()
    process = psutil.Process(rig.daemons["d"].pid)
    c = rig.client()
    c.status()
    before = process.memory_info().rss
    with peer(rig) as sock, unhurt(rig, "ten thousand jobs"):
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            for i in range(10_000):
                sock.sendall(wire.encode(wire.Knock(job=f"{i}", attempt=1, nonce=bytes(32))))
        for i in range(300):
            with peer(rig) as stranger:
                stranger.sendall(wire.encode(wire.Knock(job=f"{i}", attempt=1, nonce=bytes(32))))
        time.sleep(0.5)
    assert process.memory_info().rss - before < 30e6
    assert len(c.status()["jobs"]) == 1


# --- users and directories


@pytest.mark.skipif(os.getuid() != 0, reason="needs root to become somebody else")
def test_another_user_is_turned_away_before_a_byte_is_read(rig):
    directory = rig.start()
    os.chmod(rig.base, 0o711)  # noqa: S103  the socket itself must do it, whatever the directory's mode
    os.chmod(directory, 0o711)  # noqa: S103
    os.chmod(directory / "daemon.sock", 0o777)  # noqa: S103

    def work(ready):
        os.setgid(65534)
        os.setuid(65534)
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(str(directory / "daemon.sock"))
        with contextlib.suppress(BrokenPipeError):
            sock.sendall(wire.encode(wire.Shutdown(id=1)))
        assert select.select([sock], [], [], 5)[0]
        with contextlib.suppress(ConnectionResetError):
            assert sock.recv(1) == b""
        try:
            connect(directory / "daemon.sock", 1.0)
        except DaemonUnreachable:
            pass  # or it connects to root's daemon, which may serve anybody, and is hung up on
        ready()

    rig.child(work)
    assert rig.daemons["d"].poll() is None
    status = rig.client().status()
    assert status["errors"] >= 1
    assert "user 65534" in status["last_errors"][0]


@pytest.mark.skipif(os.getuid() != 0, reason="needs root to become somebody else")
def test_a_client_does_not_trust_another_users_daemon(rig):
    path = rig.base / "fake.sock"
    os.chmod(rig.base, 0o777)  # noqa: S103

    def work(ready):
        os.setuid(65534)
        sock = socket.socket(socket.AF_UNIX)
        sock.bind(str(path))
        sock.listen()
        ready()
        time.sleep(60)

    rig.child(work)
    with pytest.raises(DaemonUnreachable, match="belongs to user 65534"):
        connect(path, 2.0)


def daemon_in(directory):
    return subprocess.run(
        [sys.executable, "-m", "ckptd.cli.main", "daemon", "--dir", str(directory)],
        capture_output=True, text=True, timeout=20, env=os.environ | {"PYTHONPATH": ROOT}, check=False,
    )  # fmt: skip


def test_directories_that_are_not_ours_alone_are_refused(rig):
    wide = rig.base / "wide"
    wide.mkdir(mode=0o700)
    wide.chmod(0o777)
    done = daemon_in(wide)
    assert done.returncode == 10
    assert "0700" in done.stderr
    assert not (wide / "daemon.sock").exists()
    group = rig.base / "group"
    group.mkdir()
    group.chmod(0o750)
    with pytest.raises(BadArgument):
        private_directory(group)
    link = rig.base / "link"
    link.symlink_to(rig.base / "target")
    (rig.base / "target").mkdir(mode=0o700)
    with pytest.raises(BadArgument, match="no symlink"):
        private_directory(link)
    if os.getuid() == 0:
        theirs = rig.base / "theirs"
        theirs.mkdir(mode=0o700)
        os.chown(theirs, 65534, 65534)
        with pytest.raises(BadArgument):
            private_directory(theirs)


def test_what_the_daemon_makes_is_for_its_user_only(rig):
    before = os.umask(0)
    try:
        rig.start()
    finally:
        os.umask(before)
    for path in [rig.directory(), *rig.directory().iterdir()]:
        assert path.name == "peer.port" or path.stat().st_mode & 0o077 == 0, path


def test_a_stale_socket_and_a_symlinked_lock(rig):
    rig.start()
    rig.kill()
    assert (rig.directory() / "daemon.sock").exists()
    rig.start()
    rig.kill()
    (rig.directory() / "daemon.lock").unlink()
    (rig.directory() / "daemon.lock").symlink_to(rig.base / "elsewhere")
    done = daemon_in(rig.directory())
    assert done.returncode != 0
    assert not (rig.base / "elsewhere").exists()


@pytest.mark.parametrize("text", ["", "99999999", "-1", "nonsense", "0", "1"])
def test_a_broken_port_file_is_no_obstacle(rig, text):
    rig.directory().mkdir(mode=0o700)
    (rig.directory() / "peer.port").write_text(text)
    rig.start()
    assert rig.client().status()["peer_address"].startswith("127.0.0.1:")


def test_threads_asking_at_once(rig):
    rig.start()
    wrong = []

    def work():
        c = Client(rig.directory())
        for _ in range(100):
            if c.status()["pid"] != rig.daemons["d"].pid:
                wrong.append(1)
        c.close()

    threads = [threading.Thread(target=work) for _ in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join(20)
    assert not wrong
