"""The security list of reference/reliability.md, section 4.3, as far as it concerns socket, peers and frames: real daemons, real sockets.

What is not named with its file is here; `test_the_table_names_tests_that_exist` reads this table. Each test says by which change of the code it would fail. What is
marked xfail is how it should be: a weakness that is known.

| | asked | held by |
|---|---|---|
| S1 | another user: refused before a byte is parsed | test_daemon_hostile.py::test_another_user_is_turned_away_before_a_byte_is_read |
| S2 | socket path made or linked by another user: no start | test_daemon_hostile.py::test_directories_that_are_not_ours_alone_are_refused, test_daemon_hostile.py::test_a_stale_socket_and_a_symlinked_lock, test_daemon_hostile.py::test_a_client_does_not_trust_another_users_daemon, test_links_in_the_place_of_the_socket_are_replaced_not_followed |
| S3 | pid reused between accept and check | test_a_pid_that_was_used_again_does_not_stand_in_for_the_dead |
| S4 | client in a user namespace, a container | test_another_user_who_is_root_in_a_namespace_is_another_user |
| S5 | idle connections, slow loris, half frames: nobody else notices | test_daemon_hostile.py::test_half_frames_slow_bytes_and_idle_connections, test_daemon_hostile.py::test_a_client_that_sends_much_and_reads_nothing, test_thousands_of_idle_connections, test_strangers_do_not_take_all_descriptors, test_whoever_is_slow_is_hung_up_on, test_half_of_a_length_is_no_pause_between_messages, test_peers_that_fetch_and_do_not_read_cost_bounded_memory, test_messages_that_are_announced_and_do_not_come_cost_nothing |
| S6 | lengths, depth, keys, NaN, UTF-8 | test_daemon_hostile.py::test_garbage_ends_the_connection_and_nothing_else, core/test_wire.py::test_lengths_out_of_bounds, core/test_wire.py::test_nesting, core/test_wire.py::test_announced_sizes_cost_nothing, core/test_wire.py::test_what_is_no_message, core/test_wire.py::test_memory_is_not_spent_before_the_bytes_are_there, test_the_longest_messages_cost_a_few_times_their_length, test_mutated_frames_against_the_decoder, test_mutated_frames_against_a_daemon; JSON: hostile/test_hostile_images.py::test_keys_that_stand_twice_are_refused_wherever_they_stand |
| S7 | descriptors that are no arena, floods of them | test_daemon_hostile.py::test_descriptors_that_are_no_arena, test_daemon_hostile.py::test_a_flood_of_descriptors, test_daemon_hostile.py::test_messages_without_their_descriptor |
| S8 | unsealed or truncated memory | test_daemon_hostile.py::test_descriptors_that_are_no_arena, test_arena.py::test_seals_hold |
| S9 | changed after it was acknowledged | test_daemon_lives.py::test_open_and_ensure_verify, test_daemon_peers.py::test_wrong_bytes_of_a_peer_are_refused, test_daemon_lives.py::test_damaged_bytes_in_an_adopted_slot_are_noticed. The memory is shared on purpose: who maps it and writes later is its own rank |
| S10 | one job fills the memory | admission only: test_arena.py::test_an_absurd_request_is_refused_with_numbers, test_daemon_hostile.py::test_a_request_for_more_memory_than_there_is_is_refused_with_numbers; the order of eviction is not of this issue: there is none, core/test_node.py::test_a_newer_commit_releases_the_older_one_and_only_then |
| S11 | a bomb of jobs, 10^5 snapshot ids | test_daemon_hostile.py::test_ten_thousand_jobs, core/test_node.py::test_memory_of_the_machine_is_bounded, test_a_line_enters_one_job, test_tens_of_thousands_of_snapshots_told_by_a_peer, test_checksums_of_steps_that_are_not_here_are_not_kept, test_who_does_not_read_is_dropped_and_nobody_else |
| S12 | job A names B's snapshot: not found, and nothing tells whether it is there | test_another_jobs_snapshots_cannot_be_opened, test_a_peer_of_one_job_learns_nothing_of_another |
| S13 | who does not know the secret, replays, turns around, strips | test_daemon_peers.py::test_news_of_unknown_jobs_and_old_attempts_change_nothing, test_daemon_peers.py::test_messages_that_were_tampered_with_end_the_connection, test_daemon_peers.py::test_a_listener_that_does_not_know_the_secret_is_told_nothing, test_daemon_peers.py::test_a_recorded_conversation_cannot_be_played_again, test_daemon_peers.py::test_a_rank_without_a_secret_is_refused, test_strangers_at_the_rendezvous, test_beats_that_were_tampered_with_are_not_heard, test_a_daemons_own_words_turned_around_are_not_heard, test_a_job_without_a_secret_hears_nobody, test_off_loopback_a_job_without_a_secret_file_is_refused. There is no TLS: no certificates to be wrong |
| S14 | zombies, old epochs | test_daemon_lives.py::test_an_old_attempt_is_fenced, test_daemon_peers.py::test_news_of_unknown_jobs_and_old_attempts_change_nothing, core/test_node.py::test_a_zombies_image_is_released, test_connections_of_the_rendezvous_carry_beats_only, test_attempt_0_is_no_attempt, test_older_beats_are_not_heard |
| S15 | a peer that sends wrong, other, endless or trickling bytes | test_daemon_peers.py::test_wrong_bytes_of_a_peer_are_refused, test_daemon_peers.py::test_a_peer_that_lies_about_an_image, test_protect.py::test_wrong_bytes_are_never_decoded_into_an_image, test_blocks_of_another_size_are_refused, test_whoever_is_slow_is_hung_up_on. Scores of peers: not there yet |
| S16 | a peer claims what it does not hold | test_daemon_peers.py::test_what_a_peer_does_not_have, test_a_commit_that_a_peer_only_claimed_is_found_out_by_the_restore |
| S17 | port scans, HTTP, TLS | test_daemon_hostile.py::test_garbage_ends_the_connection_and_nothing_else, test_whoever_did_not_prove_itself_is_counted |
| rendezvous | beats that are malformed, huge or lie | test_beats_of_other_types_end_the_connection, test_beats_that_cannot_be_disturb_no_other_job, test_numbers_at_their_end_do_not_stop_every_rendezvous, test_a_beat_of_very_many_members, test_thousands_of_lives_and_addresses, test_a_far_epoch_without_us, test_a_flood_of_beats |
| | launchers: what they say when they enter | test_enters_that_cannot_be, test_enters_that_would_fail_later, test_two_launchers_of_one_job, test_names_of_jobs_make_no_paths, test_a_name_too_long_to_knock_with, test_broken_files_of_votes, test_a_file_of_votes_is_ours_alone, test_who_enters_said_so |
| | files, endpoints | test_secret_files_that_are_none, test_secret_files_that_are_some, test_a_secret_file_that_is_a_pipe_does_not_hang, test_endpoints_that_are_none, test_ports_that_are_none, test_endpoints_that_are_some |

S18 to S35 concern foreign files, the object store, HTTP and the unit: not of this issue (`hostile/`, `storage/`, `system/`).
"""

from __future__ import annotations

import ast
import contextlib
import ctypes
import dataclasses
import functools
import gc
import math
import os
import random
import re
import resource
import select
import signal
import socket
import struct
import tempfile
import threading
import time
import types
import typing
from pathlib import Path

import msgspec
import psutil
import pytest

from ckptd import transport
from ckptd.core import checksum, proof, wire
from ckptd.core.rendezvous import Beat, Member, Proposal, Vote, Wish
from ckptd.errors import BadArgument, PeerFailed
from tests.daemon.rig import JOB, SECRET, Client, Peer, Refusal, Rig, image_of, secret_of, until
from tests.daemon.test_daemon_hostile import daemon_in, fds_of, unhurt
from tests.daemon.test_daemon_peers import liar

MB = 1 << 20
TESTS = Path(__file__).parents[1]
EPOCH_0 = transport.RENDEZVOUS
DEADLINE_S = transport.ANSWER_TIMEOUT_S + 2.5
"""By when a connection that is stuck within a message is gone."""


# --- helpers


def dialled(rig, name="d") -> socket.socket:
    c = Client(rig.directory(name))
    host, port = c.status()["peer_address"].split(":")
    c.close()
    return socket.create_connection((host, int(port)), 5)


def unix(rig, name="d") -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(str(rig.directory(name) / "daemon.sock"))  # blocks while the backlog is full
    sock.settimeout(5)
    return sock


def ended(sock, timeout_s=5.0) -> bytes:
    """All that came until it hung up; fails if it does not."""
    sock.settimeout(timeout_s)
    got = b""
    try:
        while piece := sock.recv(65536):
            got += piece
    except ConnectionResetError:
        pass
    except TimeoutError:
        pytest.fail("the connection was left open")
    return got


def sealed(peer: Peer, body: bytes) -> bytes:
    return struct.pack("<I", len(body)) + body + peer.sends.tag(body)


def peak(pid: int) -> int:
    """The most memory a process has had since `forget_peak`."""
    return 1024 * int(re.search(r"VmHWM:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())[1])


def forget_peak(pid: int) -> int:
    Path(f"/proc/{pid}/clear_refs").write_text("5")
    return peak(pid)


def files(rig, name="d"):
    return {p.name for p in rig.directory(name).iterdir()}


def sound(rig, name="d"):
    """The daemon lives and answers, and met nothing that nobody thought of."""
    assert rig.daemons[name].poll() is None
    c = Client(rig.directory(name))
    status = c.status()
    c.close()
    assert "Traceback" not in rig.log(name), rig.log(name)[-3000:]
    return status


def agent(rig, name="d", job=JOB, secret=SECRET, **wish) -> Client:
    """A launcher that enters."""
    c = rig.client(name)
    c.ask(wire.Hello, job=job, role="agent")
    c.ask(wire.Enter, job=job, wish=Wish(**({"seeds": (), "last_call_s": 0.0} | wish)), secret=secret)
    return c


def gathers(c: Client, timeout_s=5.0):
    return c.get(lambda m: isinstance(m, wire.Gathered), timeout_s)


def beat(**changes) -> Beat:
    return Beat(**({
        "me": Member("127.0.0.1:9", "life"), "number": 1, "phase": "waiting", "running": 0, "epoch": 0, "members": (), "vote": Vote(), "proposal": None,
        "hears": (), "known": (), "closed": False,
    } | changes))  # fmt: skip


def rendezvous(rig, job=JOB, name="d"):
    c = Client(rig.directory(name))
    found = c.status()["rendezvous"][job]
    c.close()
    return found


@contextlib.contextmanager
def beating(rig, job=JOB, secret=SECRET, name="d"):
    """A node that has proven itself for the job's rendezvous."""
    with dialled(rig, name) as sock:
        yield Peer(sock, job=job, attempt=EPOCH_0, secret=secret)


@pytest.fixture(scope="module")
def shared():
    """A daemon for tests that leave it as it was."""
    with tempfile.TemporaryDirectory(prefix="ckptd-") as base:
        rig = Rig(Path(base))
        try:
            rig.start()
            yield rig
        finally:
            rig.close()


# --- the table


def test_the_table_names_tests_that_exist():
    """Fails where a test of the table is renamed or deleted, or one of this file is not in it."""
    rows = [line for line in __doc__.splitlines() if line.startswith("|")]
    assert {f"S{n}" for n in range(1, 18)} <= {row.split("|")[1].strip() for row in rows}
    named = re.findall(r"(?:([\w/]+\.py)::)?(test_\w+)\b(?!\.py)", "\n".join(rows))

    @functools.cache
    def tests_in(path):
        return {n.name for n in ast.parse(path.read_text()).body if isinstance(n, ast.FunctionDef)}

    for file, test in named:
        path = TESTS / file if "/" in file else Path(__file__).with_name(file or Path(__file__).name)
        assert test in tests_in(path), (file, test)
    here = {t for t in tests_in(Path(__file__)) if t.startswith("test_")} - {"test_the_table_names_tests_that_exist"}
    assert here == {test for file, test in named if not file}


# --- S2, S3, S4: who is at the socket


def test_links_in_the_place_of_the_socket_are_replaced_not_followed(rig):
    """Fails if `_listen` binds at the path itself, or at a name that it does not clear first."""
    directory = rig.directory()
    directory.mkdir(mode=0o700)
    victim = rig.base / "victim"
    victim.write_text("mine")
    (directory / "daemon.sock").symlink_to(victim)
    rig.start()
    assert victim.read_text() == "mine" and (directory / "daemon.sock").is_socket()
    rig.kill()
    (directory / "daemon.sock").unlink()
    (directory / "daemon.sock").mkdir()
    done = daemon_in(directory)
    assert done.returncode != 0, "a directory in the socket's place was taken away"


LAST_PID = Path("/proc/sys/kernel/ns_last_pid")


def reborn(pid: int) -> int | None:
    """A child with this pid, if the kernel lets us choose."""
    for _ in range(50):
        try:
            LAST_PID.write_text(str(pid - 1))
        except OSError:
            return None
        child = os.fork()
        if child == 0:
            time.sleep(60)
            os._exit(0)
        if child == pid:
            return child
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    return None


@pytest.mark.skipif(not os.access(LAST_PID, os.W_OK), reason="needs to choose pids")
def test_a_pid_that_was_used_again_does_not_stand_in_for_the_dead(rig):
    """S3. A rank dies before the daemon looks, another process of ours gets its pid, and a third holds the rank's socket. Fails if the rank is watched by its pid alone."""
    rig.start()
    pid = rig.daemons["d"].pid
    os.kill(pid, signal.SIGSTOP)
    read, write = os.pipe()
    dead = os.fork()
    if dead == 0:  # connects in its own name: that is what SO_PEERCRED remembers
        mine = unix(rig)
        mine.sendall(wire.encode(wire.Hello(id=1, job=JOB, rank=0)))
        heir = os.fork()
        if heir == 0:
            mine.settimeout(8)
            got = b""
            with contextlib.suppress(TimeoutError):
                while piece := mine.recv(4096):
                    got += piece
                os.write(write, b"hung up")
            os._exit(0)
        os._exit(0)
    os.close(write)
    os.waitpid(dead, 0)
    other = reborn(dead)
    os.kill(pid, signal.SIGCONT)
    try:
        if other is None:
            pytest.skip("the pid could not be had again")
        assert select.select([read], [], [], 10)[0]
        assert os.read(read, 100) == b"hung up", "the new owner of the pid was taken for the rank"
    finally:
        os.close(read)
        if other is not None:
            os.kill(other, signal.SIGKILL)
            os.waitpid(other, 0)
    sound(rig)


CLONE_NEWUSER = 0x10000000


@pytest.mark.skipif(os.getuid() != 0, reason="needs root to become somebody else")
def test_another_user_who_is_root_in_a_namespace_is_another_user(rig):
    """S4. Fails if the daemon believes a uid that a client says, or asks for credentials in the client's namespace."""
    directory = rig.start()
    for path, mode in ((rig.base, 0o711), (directory, 0o711), (directory / "daemon.sock", 0o777)):
        os.chmod(path, mode)
    read, write = os.pipe()

    def work(ready):
        os.chdir(directory)  # what lies above may be closed to others
        os.setgid(65534)
        os.setuid(65534)
        libc = ctypes.CDLL(None, use_errno=True)
        libc.prctl(4, 1, 0, 0, 0)  # dumpable again: else its own uid_map is root's
        if libc.unshare(CLONE_NEWUSER) != 0:
            os.write(write, b"no namespace")
            return ready()
        try:
            Path("/proc/self/uid_map").write_text("0 65534 1")
        except OSError:
            os.write(write, b"no map")
            return ready()
        assert os.getuid() == 0
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(5)
            sock.connect("daemon.sock")
            with contextlib.suppress(BrokenPipeError):
                sock.sendall(wire.encode(wire.Shutdown(id=1)))
            with contextlib.suppress(ConnectionResetError):
                assert sock.recv(1) == b""
        os.write(write, b"turned away")
        return ready()

    rig.child(work)
    said = os.read(read, 100)
    os.close(read)
    os.close(write)
    if said != b"turned away":
        pytest.skip(said.decode())
    assert "user 65534" in sound(rig)["last_errors"][0]


# --- S5, S15: slow and many


@pytest.mark.parametrize(("kind", "count"), [("unix", 10_000), ("tcp", 10_000)])
def test_thousands_of_idle_connections(rig, kind, count):
    """Fails if a connection costs a thread, a task that polls, or a buffer of its own (READ_AHEAD_BYTES made at once)."""
    rig.start()
    count = min(count, resource.getrlimit(resource.RLIMIT_NOFILE)[1] - 500)
    process = psutil.Process(rig.daemons["d"].pid)
    before = process.memory_info().rss
    host, port = rig.client().status()["peer_address"].split(":")

    def work(ready):
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        look, socks = Client(rig.directory()), []
        for i in range(count):
            if i % 80 == 0:
                look.status()  # what came so far is accepted: no SYN is dropped
            socks.append(socket.create_connection((host, int(port)), 5) if kind == "tcp" else unix(rig))
        look.status()
        ready()
        time.sleep(60)

    began = time.perf_counter()
    child = rig.child(work)
    made_s = time.perf_counter() - began
    with unhurt(rig, f"{count} idle connections, {kind}, made in {made_s:.1f} s"):
        grown, fds = process.memory_info().rss - before, fds_of(rig)
    rig.end(child)
    print(f"{fds} descriptors cost {grown / 1e6:.0f} MB")
    if kind == "tcp":
        assert fds < 300, "strangers are hung up on, the oldest first"
    else:
        assert fds > count, "they are not there"
    assert grown < 30_000 * count
    until(lambda: fds_of(rig) < 100, 20, "connections that ended are kept")


def test_strangers_do_not_take_all_descriptors(rig):
    """Whoever reaches the peer port without a secret must not keep the node's own ranks out."""
    rig.start()
    pid = rig.daemons["d"].pid
    limit = fds_of(rig) + 60
    host, port = rig.client().status()["peer_address"].split(":")
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (limit, limit))
    with contextlib.ExitStack() as stack:
        for _ in range(150):
            stack.enter_context(socket.create_connection((host, int(port)), 5))
        time.sleep(0.5)
        began = time.perf_counter()
        rig.client().ask(wire.Status, timeout_s=2)
        t = rig.trainer()
        t.fill(1)
        t.reached("committed", 1)
        waited_s = time.perf_counter() - began
    print(f"a rank came in after {waited_s:.2f} s")
    assert waited_s < 2


def trickle(sock, data, stop, period_s=1.0):
    """Bytes, one by one; until the other end hangs up."""
    with contextlib.suppress(OSError):
        for byte in data:
            sock.sendall(bytes([byte]))
            if stop.wait(period_s):
                return


@pytest.fixture(scope="module")
def slow():
    """All who are slow, at one daemon and at the same time: name -> seconds until it was hung up on, or None; and what else was seen."""
    with tempfile.TemporaryDirectory(prefix="ckptd-") as base:
        rig = Rig(Path(base))
        try:
            yield patience(rig)
        finally:
            rig.close()


FETCHERS, ANNOUNCERS = 8, 20


def patience(rig):
    rig.start()
    rig.start("e")
    rig.trainer("e")
    server = socket.create_server(("127.0.0.1", 0))
    server.settimeout(20)
    t = rig.trainer(nbytes=12 * MB)
    t.fill(1)
    t.reached("committed", 1)
    image = image_of(1, 1, 2, 3 * MB)
    digests = checksum.digests_of(memoryview(image))
    far = rig.trainer(job="far", rank=0, world=2, local=1, node=0, peers=["", f"127.0.0.1:{server.getsockname()[1]}"])
    stop = threading.Event()
    seen: dict[str, typing.Any] = {"closed": {}}

    def serve(sock):  # a peer that describes an image well and sends it byte by byte
        with sock, contextlib.suppress(OSError, PeerFailed, AssertionError):
            sock.settimeout(20)
            peer = Peer.listening(sock)
            while True:
                message = peer.receive()
                if isinstance(message, wire.Describe):
                    peer.send(wire.Described(image_bytes=len(image), digests=digests))
                elif isinstance(message, wire.Fetch):
                    peer.send(wire.Blocks(bytes=message.end - message.begin))
                    trickle(sock, image[message.begin : message.begin + 60], stop)

    def listen():
        with contextlib.suppress(OSError):
            while not stop.is_set():
                threading.Thread(target=serve, args=(server.accept()[0],), daemon=True).start()

    threading.Thread(target=listen, daemon=True).start()

    def restore():
        began = time.perf_counter()
        try:
            opened = far.ask(wire.Open, job="far", attempt=1, step=1, rank=1, node=1)
            os.close(far.pipe.take_fd())
            far.ask(wire.Ensure, timeout_s=20, image=opened.image, blocks=[(0, 1)])
        except (Refusal, TimeoutError) as e:
            seen["restore"] = time.perf_counter() - began, e

    pid = rig.daemons["d"].pid
    forget = forget_peak(pid)
    ask = wire.Describe(job=JOB, attempt=1, step=1, rank=0)
    socks = {name: dialled(rig) for name in ("says nothing", "half a knock", "knock byte by byte", "no proof", "message byte by byte", "half a length")}
    fetchers = {f"fetches {i}": dialled(rig) for i in range(FETCHERS)}
    knock = wire.encode(wire.Knock(job=JOB, attempt=1, nonce=bytes(32)))
    socks["half a knock"].sendall(knock[:20])
    socks["no proof"].sendall(knock)
    whole = Peer(socks["message byte by byte"]).bytes_of(ask)
    socks["message byte by byte"].sendall(whole[:4])  # within a message
    socks["knock byte by byte"].sendall(knock[:4])
    socks["half a length"].sendall(Peer(socks["half a length"]).bytes_of(ask)[:2])
    announced = forget_peak(rig.daemons["e"].pid)
    announcers = {f"announces {i}": dialled(rig, "e") for i in range(ANNOUNCERS)}
    for sock in announcers.values():
        Peer(sock)
        sock.sendall(struct.pack("<I", wire.MESSAGE_BYTES_MAX) + bytes(100))
    for sock in fetchers.values():
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        peer = Peer(sock)
        sock.sendall(b"".join(peer.bytes_of(wire.Fetch(job=JOB, attempt=1, step=1, rank=0, begin=0, end=4 * MB)) for _ in range(64)))
    began = time.perf_counter()
    threads = [
        threading.Thread(target=trickle, args=(socks["knock byte by byte"], knock[4:-1], stop)),
        threading.Thread(target=trickle, args=(socks["message byte by byte"], whole[4:-1], stop)),
        threading.Thread(target=restore),
    ]
    ours = {name: sock.getsockname()[1] for name, sock in (socks | fetchers | announcers).items()}
    for thread in threads:
        thread.start()
    try:
        with unhurt(rig, "all who are slow"):
            while time.perf_counter() - began < DEADLINE_S:
                found = [c for d in rig.daemons.values() for c in psutil.Process(d.pid).net_connections("tcp")]
                open_ports = {c.raddr.port for c in found if c.raddr and c.status == "ESTABLISHED"}
                for name, port in ours.items():
                    if port not in open_ports:
                        seen["closed"].setdefault(name, time.perf_counter() - began)
                time.sleep(0.05)
        seen["grown"], seen["announced"] = peak(pid) - forget, peak(rig.daemons["e"].pid) - announced
    finally:
        stop.set()
        for sock in [*socks.values(), *fetchers.values(), *announcers.values(), server]:
            sock.close()
        for thread in threads:
            thread.join(15)
    sound(rig)
    sound(rig, "e")
    print({k: round(v, 1) for k, v in seen["closed"].items()}, f"{seen['grown'] / 1e6:.0f} MB")
    return seen


def test_whoever_is_slow_is_hung_up_on(slow):
    """S5, S15: strangers and peers, within a message. Fails if a deadline is for each byte instead of the whole, or if one is left out (`_frame`, `drained`, `receive_bytes`)."""
    wanted = {"says nothing", "half a knock", "knock byte by byte", "no proof", "message byte by byte"} | {f"fetches {i}" for i in range(FETCHERS)} | {f"announces {i}" for i in range(ANNOUNCERS)}
    assert wanted <= {*slow["closed"]}, "they are still there"
    took_s, refusal = slow["restore"]
    assert isinstance(refusal, Refusal) and "PeerFailed" in str(refusal)
    assert took_s < DEADLINE_S


def test_half_of_a_length_is_no_pause_between_messages(slow):
    """As `receive` says: between messages a connection may be idle, within one it may not."""
    assert "half a length" in slow["closed"]


def test_peers_that_fetch_and_do_not_read_cost_bounded_memory(slow):
    """One answer each, and what they asked ahead. Fails if answers are written before the last was taken: 64 of 4 MiB each were asked for, by 8."""
    print(f"{FETCHERS} peers that do not read: {slow['grown'] / 1e6:.0f} MB")
    assert slow["grown"] < FETCHERS * 12e6


def test_messages_that_are_announced_and_do_not_come_cost_nothing(slow):
    """Between daemons as at the socket (core/test_wire.py). Fails if memory for a message is taken when its length came."""
    print(f"{ANNOUNCERS} peers that announce {wire.MESSAGE_BYTES_MAX / MB:.0f} MiB each: {slow['announced'] / 1e6:.0f} MB")
    assert slow["announced"] < ANNOUNCERS * 2e6


# --- S6: frames


def head(kind, fields, last):
    """The beginning of a message, up to the value of its `last` field."""
    text = msgspec.msgpack.encode({"type": kind} | fields | {last: None})
    return text[:-1]


LONG = wire.MESSAGE_BYTES_MAX // 8
"""What is seen of an eighth of the longest is clear enough, and sooner."""


def filled_up(start, item, length):
    """A message whose last field is an array of as many items as fit."""
    count = (length - len(start) - 5) // len(item)
    return start + b"\xdd" + struct.pack(">I", count) + item * count


JOIN = {"id": 1, "job": JOB, "attempt": 1, "rank": 0, "world_size": 1, "local_count": 1, "node": 0, "peers": [], "image_bytes": 1, "slots": 2}
BOMBS = {
    "Report": (head("Report", {"id": 1}, "status") + b"\x81\xa1x", b"\x90"), "Ensure": (head("Ensure", {"id": 1, "image": "x"}, "blocks"), b"\x92\x00\x00"),
    "labels": (head("Join", JOIN, "labels"), b"\x80"), "peers": (head("Join", {k: v for k, v in JOIN.items() if k != "peers"}, "peers"), b"\xa1a"),
}  # fmt: skip


def test_the_longest_messages_cost_a_few_times_their_length(rig):
    """S6: millions of the smallest things that a field may hold."""
    rig.start()
    pid = rig.daemons["d"].pid
    for name, (start, item) in BOMBS.items():
        wire.decode(filled_up(start, item, len(start) + 50), "local")  # well formed: not refused for nothing
        body = filled_up(start, item, LONG)
        Client(rig.directory()).close()
        before = forget_peak(pid)
        with unix(rig) as sock:
            sock.sendall(wire.encode(wire.Hello(id=1, job=JOB, role="cli")))
            with contextlib.suppress(OSError):
                sock.sendall(struct.pack("<I", len(body)) + body)
            time.sleep(0.5)
            sound(rig)
        grown = peak(pid) - before
        print(f"{len(body) / 1e6:.0f} MB of {name} cost {grown / 1e6:.0f} MB")
        assert grown < 8 * len(body), name


# --- S11, S12, S14, S16: jobs and attempts


def told(peer, count, *kinds):
    """News of so many steps, and an answer that comes when all were heard."""
    for step in range(1, count, len(kinds)):
        news = (wire.PeerNews(job=JOB, attempt=1, step=step + i, node=1, what=w, errand=e, digests=d) for i, (w, e, d) in enumerate(kinds))
        peer.sock.sendall(b"".join(map(peer.bytes_of, news)))
    peer.send(wire.List(job=JOB, attempt=1, step=1))
    assert isinstance(peer.receive(), wire.Listed)


def test_tens_of_thousands_of_snapshots_told_by_a_peer(rig):
    """S11. Fails without DOOMED_KEPT in the machine, or NEWS_MAX on the lines on which it is answered."""
    rig.start()
    rig.trainer(rank=0, world=2, local=1, node=0, peers=["", "127.0.0.1:1"])
    process = psutil.Process(rig.daemons["d"].pid)
    with dialled(rig) as sock, unhurt(rig, "40,000 snapshots"):
        peer = Peer(sock)
        sock.settimeout(20)
        before = process.memory_info().rss
        told(peer, 40_000, *([("sealed", "", {}), ("part", "protect", {}), ("asked", "", {}), ("what?", "", {})] * 8))
        grown = process.memory_info().rss - before
    print(f"40,000 snapshots cost {grown / 1e6:.1f} MB")
    assert grown < 6e6


def test_checksums_of_steps_that_are_not_here_are_not_kept(rig):
    """S11: a peer says that it wrote steps that nobody asked for."""
    rig.start()
    rig.trainer(rank=0, world=2, local=1, node=0, peers=["", "127.0.0.1:1"])
    process = psutil.Process(rig.daemons["d"].pid)
    with dialled(rig) as sock:
        peer = Peer(sock)
        sock.settimeout(20)
        before = process.memory_info().rss
        told(peer, 5_000, *([("part", "persist", {1: bytes(2000)})] * 8))
        grown = process.memory_info().rss - before
    print(f"10 MB of checksums that nobody asked for cost {grown / 1e6:.1f} MB")
    assert grown < 3e6
    sound(rig)


def test_who_does_not_read_is_dropped_and_nobody_else(rig):
    """A rank that takes no notices loses its line in the middle of telling all ranks: what else was to be done then is done, and who told it is heard on."""
    rig.start()
    rig.trainer(rank=0, world=2, local=1, node=0, peers=["", "127.0.0.1:1"])
    rig.trainer(job="good")
    with dialled(rig) as sock:
        peer = Peer(sock)
        sock.settimeout(20)
        told(peer, 20_000, *([("skipped", "", {})] * 8))
    assert "does not read" in rig.log(), "nobody was dropped: this shows nothing"
    sound(rig)


def test_another_jobs_snapshots_cannot_be_opened(rig):
    """S12, at the socket: what is there and what is not are answered alike."""
    rig.start()
    b = rig.trainer(job="b")
    b.fill(1)
    b.reached("committed", 1)
    a = rig.trainer(job="a")
    said = []
    for step in (1, 7):
        with pytest.raises(Refusal) as refused:
            a.ask(wire.Open, job="b", attempt=1, step=step, rank=0, node=0)
        said.append(str(refused.value).replace("7", "1"))
    assert said[0] == said[1] and said[0].startswith("NotFound")
    with pytest.raises(Refusal, match="NotFound"):
        a.ask(wire.Ensure, image="1/1/0/b", blocks=[(0, 1)])


def test_a_peer_of_one_job_learns_nothing_of_another(rig):
    """S12, between daemons: the line ends, whether it is there or not. Fails if `_heed` does not compare the message's job with the connection's."""
    rig.start()
    b = rig.trainer(job="b")
    b.fill(1)
    b.reached("committed", 1)
    rig.trainer(job="a")
    for step in (1, 7):
        for ask in (wire.Describe(job="b", attempt=1, step=step, rank=0), wire.List(job="b", attempt=1, step=step), wire.Fetch(job="b", attempt=1, step=step, rank=0, begin=0, end=9)):
            with dialled(rig) as sock:
                peer = Peer(sock, job="a")
                peer.send(ask)
                assert ended(sock) == b"", (step, ask)
    with dialled(rig) as sock:
        peer = Peer(sock, job="b")
        peer.send(wire.List(job="b", attempt=1, step=1))
        assert peer.receive().images[0][0] == 0, "asked by b's own, it is told"


def test_a_job_without_a_secret_hears_nobody(rig):
    """S13: a job on one node has none, and a proof with none is no proof. Fails if `_secret_of` gives b"" out as a secret."""
    rig.start()
    t = rig.trainer(join=False)
    t.secret = b""
    t.join()
    t.choose(None)
    with dialled(rig) as sock:
        sock.sendall(wire.encode(wire.Knock(job=JOB, attempt=1, nonce=bytes(32))))
        assert ended(sock) == b""
    assert sound(rig)["strangers"] == 1


def test_attempt_0_is_no_attempt(rig):
    """S14: it is the rendezvous'; else who knows that secret would be heard as a peer of the attempt."""
    rig.start()
    for attempt in (0, -1):
        with pytest.raises(Refusal, match="BadArgument"):
            rig.trainer(attempt=attempt)


def test_connections_of_the_rendezvous_carry_beats_only(rig):
    """S14: and others carry none. Fails if `_heed` does not look at the connection's attempt."""
    rig.start()
    t = rig.trainer(attempt=1)
    t.fill(1)
    t.reached("committed", 1)
    agent(rig, nodes_min=2, nodes_max=2)
    for message in (
        wire.PeerNews(job=JOB, attempt=1, step=2, node=0, what="skipped"), wire.PeerHello(job=JOB, attempt=1, node=0, address="127.0.0.1:1"),
        wire.Describe(job=JOB, attempt=1, step=1, rank=0), wire.List(job=JOB, attempt=1, step=1), wire.Fetch(job=JOB, attempt=1, step=1, rank=0, begin=0, end=9),
        wire.PeerBeat(job="another", beat=beat()), wire.Blocks(bytes=1 << 40), wire.Knock(job=JOB, attempt=1, nonce=bytes(32)),
    ):  # fmt: skip
        with beating(rig) as peer:
            peer.send(message)
            assert ended(peer.sock) == b"", message
    with dialled(rig) as sock:
        peer = Peer(sock, attempt=1)
        peer.send(wire.PeerBeat(job=JOB, beat=beat()))
        assert ended(sock) == b""
    assert rendezvous(rig)["heard"] == []
    with beating(rig) as peer:
        peer.send(wire.PeerBeat(job=JOB, beat=beat()))
        until(lambda: rendezvous(rig)["heard"] == ["127.0.0.1:9"], what="a beat is heard, where it may be")
    sound(rig)


def test_blocks_of_another_size_are_refused(rig):
    """S15: more, fewer, endless. Fails if `stream` reads what a peer announces instead of what it asked for."""
    rig.start()
    image = image_of(1, 1, 2, 3 * MB)
    described = wire.Described(image_bytes=len(image), digests=checksum.digests_of(memoryview(image)))
    for count in (1, MB - 1, MB + 1, (1 << 63) - 1, -1, 0):
        server = socket.create_server(("127.0.0.1", 0))
        server.settimeout(10)

        def talk(sock, count=count):
            with sock, contextlib.suppress(OSError, PeerFailed):
                sock.settimeout(5)
                peer = Peer.listening(sock)
                while (message := peer.receive()) is not None:
                    if isinstance(message, wire.Describe):
                        peer.send(described)
                    elif isinstance(message, wire.Fetch):
                        peer.send(wire.Blocks(bytes=count))
                        sock.sendall(bytes(2 * MB))

        def serve(server=server, talk=talk):
            with contextlib.suppress(OSError):
                while True:
                    threading.Thread(target=talk, args=(server.accept()[0],), daemon=True).start()

        threading.Thread(target=serve, daemon=True).start()
        with server:
            job = f"of {count}"
            t = rig.trainer(rank=0, world=2, local=1, node=0, job=job, peers=["", f"127.0.0.1:{server.getsockname()[1]}"])
            opened = t.ask(wire.Open, timeout_s=5, job=job, attempt=1, step=1, rank=1, node=1)
            os.close(t.pipe.take_fd())
            with pytest.raises(Refusal, match="PeerFailed"):
                t.ask(wire.Ensure, timeout_s=5, image=opened.image, blocks=[(0, 1)])
            t.close()
    sound(rig)


def test_a_commit_that_a_peer_only_claimed_is_found_out_by_the_restore(rig):
    """S16: it said "sealed", and holds nothing. Fails if the daemon opens an image, or says Done, without its bytes from somebody who has them."""
    rig.start()
    address, server = liar([wire.Refused(id=0, error="NotFound", message="not here")] * 3)
    with server:
        t = rig.trainer(rank=0, world=2, local=1, node=0, peers=["", address])
        t.fill(1)
        with dialled(rig) as sock:
            Peer(sock).send(wire.PeerNews(job=JOB, attempt=1, step=1, node=1, what="sealed"))
            t.reached("committed", 1)
        with pytest.raises(Refusal, match="PeerFailed"):
            t.ask(wire.Open, timeout_s=5, job=JOB, attempt=1, step=1, rank=1, node=1)
        opened = t.ask(wire.Open, job=JOB, attempt=1, step=1, rank=0, node=0)
        os.close(t.pipe.take_fd())
        t.ask(wire.Ensure, image=opened.image, blocks=[(0, 1)])
    sound(rig)


# --- S13, S17: strangers


def test_strangers_at_the_rendezvous(rig):
    """S13, for connections of attempt 0. Fails if `accept` goes on without a proof, or `_secret_of` gives one job's secret for another."""
    rig.start()
    rig.trainer(attempt=1, job="trains")  # known by its attempt, has no rendezvous
    agent(rig, nodes_min=2, nodes_max=2)
    agent(rig, job="other", secret=bytes(32), nodes_min=2, nodes_max=2)
    message = wire.encode(wire.PeerBeat(job=JOB, beat=beat()))
    attempts = [("wrong", JOB, bytes(32)), ("another job's", JOB, b""), ("unknown", "nobody", SECRET), ("no rendezvous", "trains", secret_of(1)), ("turned", JOB, SECRET[::-1])]
    count = 0
    for what, job, secret in attempts:
        with dialled(rig) as sock:
            with contextlib.suppress(ConnectionError):
                peer = Peer(sock, job=job, attempt=EPOCH_0, secret=secret)
                sock.sendall(message + peer.sends.tag(message[4:]))
            with contextlib.suppress(ConnectionResetError):
                assert ended(sock) == b"", what
        count += 1
    knock = wire.encode(wire.Knock(job=JOB, attempt=EPOCH_0, nonce=bytes(32)))
    for what, data in (
        ("no knock", message), ("short nonce", wire.encode(wire.Knock(job=JOB, attempt=EPOCH_0, nonce=b"12345"))), ("stripped", knock + message),
        ("no nonce", wire.encode(wire.Knock(job=JOB, attempt=EPOCH_0, nonce=b""))), ("no proof", knock + wire.encode(wire.Prove(nonce=b"", proof=b""))),
        ("listener's", knock + wire.encode(wire.Prove(nonce=bytes(32), proof=proof.proof(bytes(32), proof.LISTENS, JOB, 0, bytes(32), bytes(32))))),
    ):  # fmt: skip
        with dialled(rig) as sock:
            sock.sendall(data)
            assert len(ended(sock)) < 200, what
        count += 1
    for attempt in (-1, 1, (1 << 63) - 1, (1 << 64) - 1):
        with dialled(rig) as sock:
            sock.sendall(wire.encode(wire.Knock(job=JOB, attempt=attempt, nonce=bytes(32))))
            assert ended(sock) == b""
        count += 1
    assert sound(rig)["strangers"] == count, "each is counted"
    assert rendezvous(rig)["heard"] == [] and rendezvous(rig)["epoch"] == 0


@pytest.mark.parametrize("what", ["changed", "repeated", "left out", "no tag", "turned around"])
def test_beats_that_were_tampered_with_are_not_heard(shared, what):
    """S13. Fails if beats are read without their tag, or tags do not count."""
    agent(shared, job=what, nodes_min=2, nodes_max=2)
    with beating(shared, what) as peer:
        first = peer.bytes_of(wire.PeerBeat(job=what, beat=beat(number=1)))
        peer.sock.sendall(first)
        until(lambda: rendezvous(shared, what)["heard"] == ["127.0.0.1:9"])
        far = wire.PeerBeat(job=what, beat=beat(number=2, epoch=9, members=(Member("127.0.0.1:9", "life"),)))
        data = peer.bytes_of(far)
        match what:
            case "changed":
                peer.sock.sendall(data[:-20] + bytes([data[-20] ^ 1]) + data[-19:])
            case "repeated":
                peer.sock.sendall(first)
            case "left out":
                peer.sock.sendall(peer.bytes_of(far))
            case "no tag":
                peer.sock.sendall(data[:-16] + bytes(16))
            case _:
                frame = wire.encode(far)
                peer.sock.sendall(frame + peer.receives.tag(frame[4:]))
        ended(peer.sock)
    assert rendezvous(shared, what)["epoch"] == 0, "a forged beat was heard"
    sound(shared)


def test_a_daemons_own_words_turned_around_are_not_heard(rig):
    """S13: who may speak repeats what it was told, as its own. Fails if `heard` takes beats of this daemon's own life, or the conversation can be had on another line."""
    rig.start()
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(10)
        mine = f"127.0.0.1:{server.getsockname()[1]}"
        agent(rig, seeds=(mine,), nodes_min=2, nodes_max=2)
        sock, _ = server.accept()
        with sock:
            sock.settimeout(5)
            heard = Peer.listening(sock).receive()
    assert isinstance(heard, wire.PeerBeat)
    with beating(rig) as peer:
        for number in (heard.beat.number, heard.beat.number + 1, 1 << 52):
            peer.send(wire.PeerBeat(job=JOB, beat=msgspec.structs.replace(heard.beat, number=number)))
        time.sleep(0.3)
        assert rendezvous(rig)["heard"] == []
        peer.send(wire.PeerBeat(job=JOB, beat=beat()))
        until(lambda: rendezvous(rig)["heard"] == ["127.0.0.1:9"])
    sound(rig)


def test_older_beats_are_not_heard(rig):
    """S14: a beat that is late does no harm, on whatever line it comes. Fails if `heard` does not compare numbers."""
    rig.start()
    agent(rig, nodes_min=2, nodes_max=2)
    with beating(rig) as peer, beating(rig) as late:
        peer.send(wire.PeerBeat(job=JOB, beat=beat(number=5, phase="away")))
        until(lambda: rendezvous(rig)["heard"] == ["127.0.0.1:9"])
        for number in (5, 4, 0):
            late.send(wire.PeerBeat(job=JOB, beat=beat(number=number, phase="waiting")))
        time.sleep(0.3)
        assert rendezvous(rig)["waiting"] == []
        late.send(wire.PeerBeat(job=JOB, beat=beat(number=6, phase="waiting")))
        until(lambda: rendezvous(rig)["waiting"] == ["127.0.0.1:9"])
    sound(rig)


SCANS = {
    "nothing": b"", "http": b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", "tls": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(500), "ssh": b"SSH-2.0-scan\r\n",
    "half a frame": struct.pack("<I", 100) + b"x", "too long": struct.pack("<I", 4097) + bytes(4097), "no message": struct.pack("<I", 3) + b"\xc1\xc1\xc1",
}  # fmt: skip


def test_whoever_did_not_prove_itself_is_counted(rig):
    """S13, S17: closed, counted. `status` calls them "strangers", connections that did not prove themselves."""
    rig.start()
    for what, data in SCANS.items():
        with dialled(rig) as sock:
            with contextlib.suppress(OSError):
                sock.sendall(data)
                sock.shutdown(socket.SHUT_WR)
            assert ended(sock) == b"", what
    until(lambda: sound(rig)["strangers"] == len(SCANS), 1.0)


def test_off_loopback_a_job_without_a_secret_file_is_refused():
    """S13: without one the secret follows from the job's name. `ckptd run` asks for one; the backend that torchrun loads must too."""
    import torch.distributed.elastic.rendezvous as torch_rendezvous

    from ckptd import elastic

    params = torch_rendezvous.RendezvousParameters("ckptd", "192.0.2.1:7070", "job", 1, 2, local_addr="192.0.2.9")
    with pytest.raises(BadArgument):
        elastic.handler(params)


# --- the rendezvous: beats of those who know the secret


ODD = {
    "number is a fraction": {"number": 1.5}, "number is a word": {"number": "1"}, "number is nothing": {"number": None}, "number over 64 bits": {"number": b"\0" * 9},
    "me is a word": {"me": "life"}, "me is empty": {"me": []}, "life is a number": {"me": ["127.0.0.1:9", 5]}, "members is a word": {"members": "life"},
    "members is a map": {"members": {}}, "a member is empty": {"members": [[]]}, "vote is nothing": {"vote": None}, "ballot of three": {"vote": [[0, "", 1]]},
    "hears numbers": {"hears": [1]}, "closed is a number": {"closed": 1}, "phase is nothing": {"phase": None}, "life is no text": {"phase": b"\xff"},
    "proposal is empty": {"proposal": []}, "nothing at all": None,
}  # fmt: skip


def test_beats_of_other_types_end_the_connection(rig):
    """Fails if decoding is lax, or an error of it is not PeerFailed."""
    rig.start()
    agent(rig, nodes_min=2, nodes_max=2)
    good = msgspec.to_builtins(beat())
    names = [f.name for f in msgspec.structs.fields(Beat)]
    for what, change in ODD.items():
        value = [] if change is None else [change.get(name, good[i]) for i, name in enumerate(names)]
        with beating(rig) as peer:
            peer.sock.sendall(sealed(peer, msgspec.msgpack.encode({"type": "PeerBeat", "job": JOB, "beat": value})))
            assert ended(peer.sock) == b"", what
    assert rendezvous(rig)["heard"] == []
    with beating(rig) as peer:
        peer.sock.sendall(sealed(peer, msgspec.msgpack.encode({"type": "PeerBeat", "job": JOB, "beat": good})))
        until(lambda: rendezvous(rig)["heard"] == ["127.0.0.1:9"], what="the good one is none")
    sound(rig)


ADDRESSES = ["", ":", "nonsense", "\0:1", "127.0.0.1:99999999", "127.0.0.1:-1", "[::", "a" * 10_000 + ":1", "é..:7", "host name:5", "../../x:1", "127.0.0.1:٣"]
STRANGE = [
    {"number": -1}, {"number": -(1 << 63)}, {"number": (1 << 64) - 1}, {"epoch": -1}, {"epoch": -(1 << 63)}, {"running": -5}, {"running": (1 << 64) - 1},
    {"phase": "evil"}, {"phase": ""}, {"phase": "running"}, {"me": Member("127.0.0.1:9", "")}, {"closed": True}, {"epoch": 5}, {"epoch": 5, "members": (Member("", ""),)},
    {"hears": ("",) * 1000, "known": ("",) * 1000}, {"me": Member("127.0.0.1:9", "x" * 100_000)}, {"me": Member("127.0.0.1:9", "l", -1, -1, "\0", -1, 1 << 40)},
    {"vote": Vote((-1, ""), (-1, ""), (Member("", ""),))}, {"proposal": Proposal((-5, ""), (Member("", ""),))}, {"proposal": Proposal((5, "life"), (Member("\0", "\0"),) * 9)},
    *({"me": Member(a, "life"), "known": (a,)} for a in ADDRESSES), *({"epoch": 3, "members": (Member(a, f"life {a[:9]}"),)} for a in ADDRESSES),
]  # fmt: skip


def test_beats_that_cannot_be_disturb_no_other_job(rig):
    """Numbers, lives and addresses that are none. Fails if one of them raises in the machine, in `run` or in a `_Line`."""
    rig.start()
    with unhurt(rig, "beats that cannot be"):
        for i, change in enumerate(STRANGE):
            job = f"bad {i}"
            agent(rig, job=job, nodes_min=2, nodes_max=3, seeds=("127.0.0.1:9",))
            with beating(rig, job) as peer:
                peer.send(wire.PeerBeat(job=job, beat=beat(**change)))
                peer.send(wire.PeerBeat(job=job, beat=beat(**change | {"number": 2})))
        time.sleep(1.2)  # its lines dial, its clock ticks
        gathers(agent(rig, job="other"))
    assert [rendezvous(rig, f"bad {i}")["heard"] for i, change in enumerate(STRANGE) if change.get("me") == Member("127.0.0.1:9", "")] == [[]], "an empty life is none"
    sound(rig)


END = (1 << 64) - 1


def life_of(rig, job, name="d"):
    """As its file of votes says."""
    for path in rig.directory(name).glob("rendezvous-*"):
        kept = msgspec.msgpack.decode(path.read_bytes())
        if kept["job"] == job:
            return kept["memory"]["life"]
    raise AssertionError("no such file")


ENDS = {"ballot": {"proposal": Proposal((END, "life"))}, "epoch": {"epoch": END}, "vote": {"vote": Vote((END, "life"))}}


def test_numbers_at_their_end_do_not_stop_every_rendezvous(rig):
    """Beats of one job, and no job of this daemon meets any more."""
    rig.start()
    me = rig.client().status()["peer_address"]
    for what, change in ENDS.items():
        c = agent(rig, job=what, nodes_min=1, nodes_max=3, seeds=(me, "127.0.0.1:9", "127.0.0.1:8"), last_call_s=0.3)
        if what == "epoch":  # of a roster in which we, the first of two, decide
            change = change | {"members": (Member(me, life_of(rig, what)), Member("127.0.0.1:9", "life"))}
        with beating(rig, what) as peer, contextlib.suppress(OSError):
            for number in range(1, 9):  # it waits beside us, so that the next roster is ours to propose
                peer.send(wire.PeerBeat(job=what, beat=beat(number=number, **change)))
                time.sleep(0.1)
        c.close()
        gathers(agent(rig, job=f"beside {what}", nodes_max=2, last_call_s=0.3), 3)  # by the clock
        sound(rig)


def test_a_beat_of_very_many_members(rig):
    """From one who knows the secret: it costs a few times its length, and nobody dials all of them. (A message has room for millions.)"""
    rig.start()
    pid = rig.daemons["d"].pid
    agent(rig, nodes_min=2, nodes_max=2)
    members = tuple(Member(f"127.{n >> 16}.{n >> 8 & 255}.{n & 255}:9", f"{n}") for n in range(50_000))
    before = forget_peak(pid)
    with beating(rig) as peer:
        data = peer.bytes_of(wire.PeerBeat(job=JOB, beat=beat(epoch=1, members=members)))
        with contextlib.suppress(OSError):
            peer.sock.sendall(data)
        time.sleep(1.0)
        grown = peak(pid) - before
    print(f"a beat of {len(data) / 1e6:.1f} MB cost {grown / 1e6:.0f} MB")
    assert grown < 12 * len(data)
    assert len(rendezvous(rig)["members"]) < 10_000
    sound(rig)


def test_thousands_of_lives_and_addresses(rig):
    """What is kept of nodes that were heard once is bounded, and so is whom the daemon dials for them."""
    rig.start()
    pid = rig.daemons["d"].pid
    agent(rig, nodes_min=2, nodes_max=2)
    before, cpu = psutil.Process(pid).memory_info().rss, sum(psutil.Process(pid).cpu_times()[:2])
    with beating(rig) as peer:
        peer.sock.settimeout(10)
        with contextlib.suppress(OSError):
            for i in range(100):
                known = tuple(f"127.9.{i}.{k}:9" for k in range(20))
                peer.send(wire.PeerBeat(job=JOB, beat=beat(me=Member(f"127.8.0.{i}:9", f"life {i}"), known=known)))
        time.sleep(1.5)
    grown, used = psutil.Process(pid).memory_info().rss - before, sum(psutil.Process(pid).cpu_times()[:2]) - cpu
    dialling = [t for t in psutil.Process(pid).net_connections("tcp") if t.status == "SYN_SENT"]
    print(f"100 beats that name 2,000 addresses cost {grown / 1e6:.1f} MB and {used:.1f} s; {len(dialling)} connections on their way")
    c = Client(rig.directory())
    began = time.perf_counter()
    c.status()
    waited_s = time.perf_counter() - began
    c.close()
    # 0.4 to 0.6 s and 3.7 to 5.3 MB on two busy cores, before and after the daemon learned to watch; dialling all of them takes seconds.
    assert grown < 8e6 and used < 1.0 and waited_s < 0.1
    sound(rig)


def test_a_far_epoch_without_us(rig):
    """Who knows the secret is as trusted as the job: it may end an epoch, of that job. Others go on. Fails if a stranger's beat does it, or if another job's agent is told."""
    rig.start()
    c, other = agent(rig, job="bad"), agent(rig, job="other")
    gathers(c)
    gathers(other)
    far = wire.PeerBeat(job="bad", beat=beat(epoch=1000, members=(Member("127.0.0.1:9", "life"),)))
    with beating(rig, "other") as peer:
        peer.send(far)
        assert ended(peer.sock) == b""
    with dialled(rig) as sock:
        sock.sendall(wire.encode(far))
        assert ended(sock) == b""
    assert rendezvous(rig, "bad")["epoch"] == 1
    with beating(rig, "bad") as peer:
        peer.send(far)
        regroup = c.get(lambda m: isinstance(m, wire.Regroup))
    assert "epoch 1000 began without this node" in regroup.why
    time.sleep(0.3)
    other.status()
    assert not any(isinstance(m, wire.Regroup) for m in other.inbox)
    assert rendezvous(rig, "other")["phase"] == "running"
    sound(rig)


def test_a_flood_of_beats(rig):
    """Each with a higher ballot, so that each is voted for and kept. Fails if what is heard is performed without giving way (`sleep(0)` in `_serve`)."""
    rig.start()
    agent(rig, nodes_min=2, nodes_max=2, seeds=("127.0.0.1:9",))
    pid = rig.daemons["d"].pid
    before = psutil.Process(pid).memory_info().rss
    with beating(rig) as peer, unhurt(rig, "a flood of beats"):
        peer.sock.settimeout(10)
        deadline, sent = time.monotonic() + 1.0, 0
        while time.monotonic() < deadline:
            sent += 20
            peer.sock.sendall(b"".join(peer.bytes_of(wire.PeerBeat(job=JOB, beat=beat(number=sent + i, proposal=Proposal((sent + i, "life"))))) for i in range(20)))
    grown = psutil.Process(pid).memory_info().rss - before
    print(f"{sent} beats in a second, {grown / 1e6:.1f} MB")
    assert grown < 20e6


# --- the rendezvous: launchers


WISH = {"seeds": (), "nodes_min": 1, "nodes_max": 1, "last_call_s": 0.0, "workers": 1}
ENTERS = {
    "secret of 31": ({}, SECRET[:31]), "secret of 33": ({}, SECRET + b"x"), "no secret": ({}, b""), "secret of a megabyte": ({}, bytes(MB)), "no node": ({"nodes_min": 0}, SECRET),
    "minus one node": ({"nodes_min": -1}, SECRET), "more than most": ({"nodes_min": 3, "nodes_max": 2}, SECRET), "no worker": ({"workers": 0}, SECRET),
    "minus one worker": ({"workers": -1}, SECRET),
    "port -1": ({"agent_port": -1}, SECRET), "port 70000": ({"worker_port": 70_000}, SECRET), "waits nan": ({"last_call_s": math.nan}, SECRET),
    "waits minus one": ({"last_call_s": -1.0}, SECRET), "seeds that are none": ({"seeds": ("nonsense",)}, SECRET), "ten thousand seeds": ({"seeds": tuple(f"127.0.0.1:{1 + n}" for n in range(10_000))}, SECRET),
    "host of 10 kB": ({"host": "h" * 10_000}, SECRET), "2^62 workers": ({"workers": 1 << 62}, SECRET),
}  # fmt: skip
LATER = ["port -1", "port 70000", "waits nan", "waits minus one", "seeds that are none", "host of 10 kB", "2^62 workers", "ten thousand seeds"]


def refused_to_enter(rig, what):
    before = files(rig)
    wish, secret = ENTERS[what]
    c = Client(rig.directory())
    try:
        c.ask(wire.Hello, job=what, role="agent")
        with pytest.raises(Refusal, match="BadArgument"):
            c.ask(wire.Enter, job=what, wish=Wish(**(WISH | wish)), secret=secret)
        assert what not in c.status()["rendezvous"] and files(rig) == before
    finally:
        c.close()
    sound(rig)


def test_enters_that_cannot_be(rig):
    """Refused, and nothing stays behind. Fails if one of `enter`'s checks goes, or comes after the job was made."""
    rig.start()
    for what in ENTERS:
        if what not in LATER:
            refused_to_enter(rig, what)


@pytest.mark.parametrize("what", LATER)
def test_enters_that_would_fail_later(shared, what):
    """Likewise: what nobody could use, said at once instead of by a launcher that dies, or waits for ever."""
    refused_to_enter(shared, what)


def test_two_launchers_of_one_job(rig):
    """The second is refused, the first notices nothing, and when it is gone another may come. Fails without the check of `known.agent`."""
    rig.start()
    first = agent(rig)
    gathers(first)
    for secret in (SECRET, bytes(32)):
        with pytest.raises(Refusal, match="another launcher"):
            agent(rig, secret=secret)
    with beating(rig) as peer:  # the secret is the first one's still
        peer.send(wire.PeerBeat(job=JOB, beat=beat(phase="away")))
        until(lambda: rendezvous(rig)["heard"] == ["127.0.0.1:9"])
    first.status()
    assert not any(isinstance(m, wire.Regroup) and m.why for m in first.inbox)
    assert rendezvous(rig)["phase"] == "running"
    first.close()
    until(lambda: rendezvous(rig)["phase"] == "away")
    gathers(agent(rig))
    sound(rig)


def test_names_of_jobs_make_no_paths(rig):
    """Fails if the file of a job's votes is called by the job's name."""
    rig.start()
    before, around = files(rig), {*rig.base.iterdir()}
    for name in ("a/b", "../../x", "/etc/x", "a\0b", ".", "..", "a\nb", "\u202e", "x" * 255, "'; rm -rf"):
        gathers(agent(rig, job=name))
    made = files(rig) - before
    assert len(made) == 10 and all(re.fullmatch("rendezvous-[0-9a-f]{16}", name) for name in made)
    assert {*rig.base.iterdir()} == around
    sound(rig)


def test_a_name_too_long_to_knock_with(rig):
    """A knock is at most STRANGER_BYTES_MAX: nodes of a job of such a name would wait for each other for ever."""
    rig.start()
    with pytest.raises(Refusal, match="BadArgument"):
        agent(rig, job="x" * 10_000)


def test_who_enters_said_so(rig):
    """As ranks say Hello before they join: in which job, and that it is a launcher."""
    rig.start()
    silent, rank, cli = rig.client(), rig.trainer(join=False), rig.client()
    cli.ask(wire.Hello, job=JOB, role="cli")
    for c in (silent, rank, cli):
        with pytest.raises(Refusal, match="BadArgument"):
            c.ask(wire.Enter, job=JOB, wish=Wish(**WISH), secret=SECRET)


def test_a_line_enters_one_job(rig):
    """S11: a bomb of jobs by one process costs it as many connections."""
    rig.start()
    c = rig.client()
    c.ask(wire.Hello, job="0", role="agent")
    with contextlib.suppress(Refusal):
        for i in range(300):
            c.ask(wire.Enter, job=f"{i}", wish=Wish(**WISH | {"nodes_min": 2, "nodes_max": 2}), secret=SECRET)
    assert len(sound(rig)["rendezvous"]) <= 1


def test_broken_files_of_votes(rig):
    """Fails if `_recalled` raises, or believes what is not of this job and boot."""
    from ckptd.core.rendezvous import Memory, Roster
    from ckptd.members import _Kept

    rig.start()
    paths = {}
    for what in ("empty", "garbage", "another job's", "a directory", "of another boot", "a link", "good"):
        before = files(rig)
        gathers(agent(rig, job=what))
        (name,) = files(rig) - before
        paths[what] = rig.directory() / name
    rig.kill()
    elsewhere = rig.base / "elsewhere"
    elsewhere.write_bytes(b"mine")
    for what, path in paths.items():
        kept = msgspec.msgpack.decode(path.read_bytes(), type=_Kept)
        lie = msgspec.structs.replace(kept, memory=Memory("evil", Roster(77, (Member("127.0.0.1:9", "evil"),)), Vote()))
        path.unlink()
        match what:
            case "a directory":
                path.mkdir()
            case "a link":
                path.symlink_to(elsewhere)
            case _:
                path.write_bytes({
                    "empty": b"", "garbage": random.Random(3).randbytes(1000), "another job's": msgspec.msgpack.encode(msgspec.structs.replace(lie, job="x")),
                    "of another boot": msgspec.msgpack.encode(msgspec.structs.replace(lie, boot="x")), "good": msgspec.msgpack.encode(kept),
                }[what])  # fmt: skip
    rig.start()
    for what in paths:
        assert gathers(agent(rig, job=what)).roster.epoch == (2 if what == "good" else 1), what
    assert elsewhere.read_bytes() == b"mine"
    sound(rig)


def test_a_file_of_votes_is_ours_alone(rig):
    """S26's rule, for what the rendezvous makes: no wider than 0600, whatever the umask was."""
    umask = os.umask(0)
    try:
        rig.start()
    finally:
        os.umask(umask)
    before = files(rig)
    gathers(agent(rig))
    (name,) = files(rig) - before
    assert (rig.directory() / name).stat().st_mode & 0o077 == 0


# --- files and endpoints


def secret_file(tmp_path, text=b"0123456789abcdef0123456789abcdef\n", mode=0o600):
    path = tmp_path / "secret"
    path.write_bytes(text)
    path.chmod(mode)
    return path


@pytest.mark.parametrize("what", ["group may read", "all may read", "all may write", "theirs", "link to theirs", "too short", "spaces", "empty", "directory", "not there", "dangling", "device"])
def test_secret_files_that_are_none(tmp_path, what):
    """Fails if the mode, the owner, the kind or the length is not looked at, or a link is judged instead of what it points to."""
    from ckptd import elastic

    modes = {"group may read": 0o640, "all may read": 0o604, "all may write": 0o602}
    texts = {"too short": b"0123456789abcde", "spaces": b" " * 100, "empty": b""}
    path = secret_file(tmp_path, texts.get(what, b"0" * 32), modes.get(what, 0o600))
    if what in {"theirs", "link to theirs"}:
        if os.getuid() != 0:
            pytest.skip("needs root to give a file away")
        os.chown(path, 65534, 65534)
    if what == "link to theirs":
        (tmp_path / "link").symlink_to(path)
        path = tmp_path / "link"
    if what == "directory":
        path = tmp_path / "directory"
        path.mkdir(mode=0o700)
    if what in {"not there", "dangling"}:
        path.unlink()
    if what == "dangling":
        (tmp_path / "link").symlink_to(path)
        path = tmp_path / "link"
    if what == "device":
        path = Path("/dev/null")
    with pytest.raises(BadArgument, match="--secret-file"):
        elastic.secret_from(str(path), JOB)


def test_secret_files_that_are_some(tmp_path):
    """And what is made of them: per job, 32 bytes, never the text itself. Fails if job or text does not go in."""
    from ckptd import elastic

    path = secret_file(tmp_path)
    made = elastic.secret_from(str(path), JOB)
    assert len(made) == proof.SECRET_BYTES and made not in path.read_bytes() and path.read_bytes().strip() not in made
    assert elastic.secret_from(str(path), "another") != made
    link = tmp_path / "link"
    link.symlink_to(path)  # as Kubernetes mounts them
    assert elastic.secret_from(str(link), JOB) == made
    path.write_bytes(path.read_bytes().strip())
    assert elastic.secret_from(str(path), JOB) == made, "the end of a line is no part of it"
    path.write_bytes(b"0123456789abcdef0123456789abcdeX")
    assert elastic.secret_from(str(path), JOB) != made
    assert elastic.secret_from(None, JOB) not in {made, elastic.secret_from(None, "another")}


def test_a_secret_file_that_is_a_pipe_does_not_hang(tmp_path):
    """What a file is must be known before it is read: a pipe blocks for ever, /dev/zero and a file of terabytes never end."""
    from ckptd import elastic

    path = tmp_path / "pipe"
    os.mkfifo(path, 0o600)
    said = []

    def work():
        try:
            elastic.secret_from(str(path), JOB)
        except BadArgument as e:
            said.append(e)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(1.0)
    in_time = [*said]
    with contextlib.suppress(OSError):
        os.close(os.open(path, os.O_WRONLY | os.O_NONBLOCK))  # lets it go
    thread.join(5.0)
    assert in_time, "it waits for somebody to write into the pipe"


@pytest.mark.parametrize("text", ["", ":", "host:port", ":7070", "127.0.0.1:", "127.0.0.1,,127.0.0.1", "127.0.0.1:-1", "a\0b:5", "x" * 300 + ":1", "a..b:7", "[::1]:7070", "1.2.3.4:5:6", "256.1.1.1:1", "127.0.0.1:" + "9" * 5000, "127.0.0.1:1e3", "-x:5", "a b:5"])
def test_endpoints_that_are_none(text):
    """Fails if something else than BadArgument comes out of the resolver, or something is taken for an address."""
    from ckptd import elastic

    with pytest.raises(BadArgument, match="--rdzv-endpoint"):
        elastic.seeds_of(text)


@pytest.mark.parametrize("port", ["0", "65536", "70000", "99999999"])
def test_ports_that_are_none(port):
    """The resolver takes them modulo 65536: another port is dialled than was said."""
    from ckptd import elastic

    with pytest.raises(BadArgument, match="--rdzv-endpoint"):
        elastic.seeds_of(f"127.0.0.1:{port}")


def test_endpoints_that_are_some():
    """Fails if what `seeds_of` refuses is everything."""
    from ckptd import elastic

    assert elastic.seeds_of("127.0.0.1:1, 127.0.0.1,127.0.0.1:65535,127.0.0.1:1") == ("127.0.0.1:1", "127.0.0.1:7070", "127.0.0.1:65535")


# --- frames that were good


def made_up(hint):
    """Some value of a type."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in {typing.Union, types.UnionType}:
        return made_up(args[0])
    if origin is typing.Annotated:
        return made_up(args[0])
    if origin in {list, set, frozenset}:
        return [made_up(args[0])]
    if origin is tuple:
        return (made_up(args[0]),) if args[-1] is Ellipsis else tuple(map(made_up, args))
    if origin is dict:
        return {made_up(args[0]): made_up(args[1])}
    if isinstance(hint, type) and issubclass(hint, msgspec.Struct):
        return of_type(hint)
    if dataclasses.is_dataclass(hint):
        return hint(**{k: made_up(t) for k, t in typing.get_type_hints(hint).items()})
    return {int: 7, str: "wörd", bytes: b"\x00\xff", bool: True, float: 0.5, type(None): None}.get(hint, [1, {"y": None}])


def of_type(kind, **known):
    hints = typing.get_type_hints(kind)
    return kind(**({f.name: made_up(hints[f.name]) for f in msgspec.structs.fields(kind)} | known))


KINDS = {"local": typing.get_args(wire.LOCAL), "remote": typing.get_args(wire.REMOTE)}


def mutated(body: bytes, rng: random.Random) -> bytes:
    """As damage, or somebody who tries, would have it."""
    data = bytearray(body)
    for _ in range(rng.choice((1, 1, 2, 5))):
        at = rng.randrange(len(data) + 1)
        match rng.randrange(7):
            case 0 if data:
                data[at % len(data)] ^= 1 << rng.randrange(8)
            case 1 if data:
                data[at % len(data)] = rng.choice((0, 0x7F, 0x80, 0x90, 0xC0, 0xC1, 0xCF, 0xD3, 0xD9, 0xDB, 0xDD, 0xDF, 0xFF))
            case 2:
                data[at:at] = rng.randbytes(rng.randint(1, 9))
            case 3:
                del data[at:]
            case 4:
                del data[at : at + rng.randint(1, 9)]
            case 5:
                data[at:at] = data[at : at + rng.randint(1, 60)] * rng.randint(1, 50)
            case _:
                data[at : at + 9] = rng.choice((b"\xcf" + b"\xff" * 8, b"\xd3\x80" + bytes(7), b"\xcb\x7f\xf8" + bytes(6), b"\xdd\xff\xff\xff\xff", b"\xdb\xff\xff\xff\xff"))
    return bytes(data)


def test_mutated_frames_against_the_decoder():
    """Every message type, 40,000 mutants, one seed: PeerFailed or a message, and memory as for its length. Fails for any other error, and where a length is believed."""
    rng = random.Random(13)
    bodies = [(kind, wire.encode(of_type(m))[4:]) for kind, ms in KINDS.items() for m in ms]
    for kind, body in bodies:
        wire.decode(body, kind)
    refused = 0
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(40_000):
        kind, body = rng.choice(bodies)
        try:
            wire.decode(mutated(body, rng), kind)
        except PeerFailed:
            refused += 1
    grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    print(f"{refused} of 40,000 refused, {grown / 1e6:.1f} MB")
    assert 20_000 < refused < 40_000, "some must get through, or nothing is tried"
    assert grown < 50e6


FUZZ_S = 2.0
"""For each way in."""


def fuzz_unix(rig, rng, bodies):
    with unix(rig) as sock:
        sock.settimeout(2)
        with contextlib.suppress(OSError):
            if rng.random() < 0.8:
                sock.sendall(wire.encode(wire.Hello(id=1, job=rng.choice((JOB, "wörd")), role=rng.choice(("cli", "rank", "agent", "keeper", "wörd")), rank=7)))
            for _ in range(rng.randint(1, 20)):
                body = mutated(rng.choice(bodies), rng)
                length = len(body) if rng.random() < 0.9 else rng.getrandbits(32)
                sock.sendall(struct.pack("<I", length) + body)
                if rng.random() < 0.2:
                    sock.setblocking(False)
                    with contextlib.suppress(BlockingIOError):
                        sock.recv(65536)
                    sock.settimeout(2)


def fuzz_tcp(address, rng, bodies, job, attempt):
    host, port = address.split(":")
    with socket.create_connection((host, int(port)), 2) as sock, contextlib.suppress(OSError, PeerFailed):
        if attempt is None:
            for _ in range(3):
                body = mutated(rng.choice(bodies), rng)
                sock.sendall(struct.pack("<I", len(body)) + body)
            return
        peer = Peer(sock, job=job, attempt=attempt)
        for _ in range(rng.randint(1, 20)):
            sock.sendall(sealed(peer, mutated(rng.choice(bodies), rng)))


def test_mutated_frames_against_a_daemon(rig):
    """Every message type, by all ways in. Fails for an error that nobody thought of (it is in the log), a job or a file that a mutant made, and for what is not given back."""
    rig.start()
    seed = int(os.environ.get("FUZZ_SEED", "17"))
    rng = random.Random(seed)
    t = rig.trainer(rank=0, world=2, local=1, node=0, peers=["", "127.0.0.1:1"])
    gathers(agent(rig))
    pid = rig.daemons["d"].pid
    status = sound(rig)
    address = status["peer_address"]
    local = [wire.encode(of_type(m, **({"job": JOB} if "job" in m.__struct_fields__ and m is not wire.Enter else {})))[4:] for m in KINDS["local"] if m not in {wire.Shutdown, wire.Forget}]
    remote = {
        attempt: [wire.encode(of_type(m, **{k: v for k, v in (("job", JOB), ("attempt", attempt or 0), ("beat", beat(epoch=1)), ("nonce", bytes(32))) if k in m.__struct_fields__}))[4:] for m in KINDS["remote"]]
        for attempt in (None, 0, 1)
    }  # fmt: skip
    files_before, jobs, meets, fds = files(rig), {*status["jobs"]}, {*status["rendezvous"]}, fds_of(rig)
    before = psutil.Process(pid).memory_info().rss
    counts = dict.fromkeys(["unix", *remote], 0)
    with unhurt(rig, f"fuzz, seed {seed}"):
        for way in counts:
            deadline = time.monotonic() + FUZZ_S
            while time.monotonic() < deadline and counts[way] < 1500:
                counts[way] += 1
                if way == "unix":
                    fuzz_unix(rig, rng, local)
                else:
                    fuzz_tcp(address, rng, remote[way], JOB, way)
    gc.collect()
    status = sound(rig)
    grown = psutil.Process(pid).memory_info().rss - before
    print(f"connections: {counts}; {grown / 1e6:.1f} MB")
    assert {*status["jobs"]} - {"good"} == jobs
    assert {*status["rendezvous"]} == meets
    assert files(rig) == files_before
    assert grown < 40e6
    until(lambda: fds_of(rig) <= fds + 8, 15, "descriptors leak")
    t.send(wire.Skipped(step=1 << 40, reason=""))
    t.status()
