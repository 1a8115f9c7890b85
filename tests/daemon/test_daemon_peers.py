"""Daemons together, on loopback: they commit, fetch and persist as one, and survive each other's restarts."""

from __future__ import annotations

import contextlib
import mmap
import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from ckptd.core import wire
from ckptd.storage import checkpoint, open_store
from tests.daemon.rig import JOB, ROOT, Peer, Refusal, Trainer, image_of, until


def pair(rig, names=("a", "b"), **options) -> list[Trainer]:
    """One rank on each of the daemons."""
    looks = [rig.client(n) for n in names]
    peers = [c.status()["peer_address"] for c in looks]
    return [rig.trainer(n, i, world=len(names), local=1, node=i, peers=peers, **options) for i, n in enumerate(names)]


def step_of(trainers, step):
    for t in trainers:
        t.fill(step)
    for t in trainers:
        t.reached("committed", step)


def start(rig, *names):
    for n in names:
        rig.start(n)


def test_three_daemons_commit_together(rig):
    start(rig, "a", "b", "c")
    ranks = pair(rig, ("a", "b", "c"))
    for step in range(1, 6):
        step_of(ranks, step)
    for t in ranks:
        until(lambda t=t: t.steps() == {(1, 5): "committed"})
    assert ranks[0].job()["peers_connected"] == {"1": True, "2": True}


def test_nothing_is_committed_that_one_node_did_not_seal(rig):
    start(rig, "a", "b")
    a, b = pair(rig)
    step_of([a, b], 1)
    a.fill(2)
    until(lambda: a.steps() == {(1, 1): "committed", (1, 2): "sealed"})
    time.sleep(0.3)
    assert a.steps() == {(1, 1): "committed", (1, 2): "sealed"}
    b.send(wire.Skipped(step=2, reason=""))
    until(lambda: a.steps() == {(1, 1): "committed"}, what="the skip did not come over")
    step_of([a, b], 3)


def test_a_restarted_peer_is_followed(rig):
    start(rig, "a", "b")
    a, b = pair(rig)
    step_of([a, b], 1)
    rig.kill("b")
    (rig.directory("b") / "peer.port").unlink()  # it will listen elsewhere
    a.fill(2)
    rig.start("b")
    b.rejoin()
    b.fill(2)
    for t in (a, b):
        t.reached("committed", 2)
    step_of([a, b], 3)


@pytest.mark.parametrize("order", ["ab", "ba", "both"])
def test_all_daemons_restarted(rig, order):
    """A rolling upgrade: ranks know only the first addresses, and each new daemon knows only what its rank says."""
    start(rig, "a", "b")
    a, b = ranks = pair(rig)
    step_of(ranks, 1)
    by_name = {"a": a, "b": b}
    if order == "both":
        for n in "ab":
            rig.kill(n)
        for n in "ab":
            rig.start(n)
            by_name[n].rejoin()
    else:
        for n in order:
            rig.kill(n)
            rig.start(n)
            by_name[n].rejoin()
    for t in ranks:
        t.choose(None)
    step_of(ranks, 2)
    step_of(ranks, 3)


def test_a_skip_that_was_lost_with_a_connection_is_told_again(rig):
    """b skipped step 2 while a's daemon was dead; with two slots a could never fill again."""
    start(rig, "a", "b")
    a, b = pair(rig, slot_count=2)
    step_of([a, b], 1)
    a.fill(2)
    until(lambda: (1, 2) in a.steps())
    rig.kill("a")
    b.send(wire.Skipped(step=2, reason="torn"))
    b.reached("skipped", 2)
    rig.start("a")
    a.rejoin()
    until(lambda: a.free_slot() is not None, what="a's slots are held for ever")
    step_of([a, b], 3)


def test_a_skip_that_was_lost_with_the_skipping_daemon_is_found_out(rig):
    start(rig, "a", "b")
    a, b = pair(rig, slot_count=2)
    step_of([a, b], 1)
    a.fill(2)
    rig.kill("b")
    rig.start("b")  # its rank skipped step 2, and nobody heard
    b.rejoin()
    a.send(wire.Skipped(step=3, reason="no free slot"))
    b.fill(3)
    until(lambda: a.free_slot() is not None, what="a's slots are held for ever")
    step_of([a, b], 4)


def open_at(trainer, rank, node, step=1):
    opened = trainer.ask(wire.Open, job=JOB, attempt=1, step=step, rank=rank, node=node)
    return opened, trainer.pipe.take_fd()


def test_images_are_fetched_from_peers(rig):
    start(rig, "a", "b")
    a, b = pair(rig, nbytes=9 << 20)
    step_of([a, b], 1)
    opened, fd = open_at(a, 1, 1)
    with mmap.mmap(fd, opened.image_bytes, prot=mmap.PROT_READ) as m:
        os.close(fd)
        want = image_of(1, 1, 2, 9 << 20)
        assert len(m) == len(want)
        assert m[2 << 20 : 3 << 20] == bytes(1 << 20), "nothing was asked for yet"
        a.ask(wire.Ensure, image=opened.image, blocks=[(2, 3)])
        assert m[2 << 20 : 3 << 20] == want[2 << 20 : 3 << 20]
        assert m[3 << 20 : 4 << 20] == bytes(1 << 20), "only what was asked for"
        a.ask(wire.Ensure, image=opened.image, blocks=[(0, 10)])
        assert m[:] == want


def test_wrong_bytes_of_a_peer_are_refused(rig):
    start(rig, "a", "b")
    a, b = pair(rig, nbytes=3 << 20)
    slot, _ = b.fill(1)
    a.fill(1)
    a.reached("committed", 1)
    b.arena.memory[b.arena.geometry.image_at(slot) + (1 << 20) + 9] ^= 2
    opened, fd = open_at(a, 1, 1)
    os.close(fd)
    a.ask(wire.Ensure, image=opened.image, blocks=[(0, 1), (2, 4)])
    with pytest.raises(Refusal, match="ChecksumMismatch"):
        a.ask(wire.Ensure, image=opened.image, blocks=[(0, 4)])
    for bad in ([(0, 5)], [(0, 1 << 40)]):
        with pytest.raises(Refusal, match="NotFound"):
            a.ask(wire.Ensure, image=opened.image, blocks=bad)


def test_what_a_peer_does_not_have(rig):
    start(rig, "a", "b")
    a, b = pair(rig)
    step_of([a, b], 1)
    for rank, node, step in ((1, 1, 7), (5, 1, 1), (1, 0, 1), (1, 9, 1)):
        with pytest.raises(Refusal, match="NotFound|PeerFailed"):
            open_at(a, rank, node, step)
    opened, fd = open_at(a, 1, 1)
    os.close(fd)
    rig.kill("b")
    began = time.perf_counter()
    with pytest.raises(Refusal):
        a.ask(wire.Ensure, image=opened.image, blocks=[(0, 1)])
    assert time.perf_counter() - began < 5


def liar(answers, then=lambda peer: None):
    """A peer that says what it likes: (address, server)."""
    import threading

    server = socket.create_server(("127.0.0.1", 0))
    server.settimeout(20)

    def serve():
        try:
            while True:
                sock, _ = server.accept()
                with sock:
                    sock.settimeout(2)
                    try:
                        peer = Peer.listening(sock)
                        for answer in answers:
                            peer.receive()
                            peer.send(answer)
                        then(peer)
                    except OSError:
                        pass
        except OSError:
            pass

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    return f"127.0.0.1:{server.getsockname()[1]}", server


@pytest.mark.parametrize(
    "described",
    [
        wire.Described(image_bytes=1 << 62, digests=b""), wire.Described(image_bytes=0, digests=b""), wire.Described(image_bytes=-5, digests=b""),
        wire.Described(image_bytes=1 << 20, digests=b"short"), wire.Described(image_bytes=(1 << 63) - 1, digests=b"x" * 16), wire.Blocks(bytes=5),
        wire.Refused(id=0, error="Nonsense", message="no"),
    ],
    ids=["huge", "empty", "negative", "few checksums", "max", "other", "refused"],
)  # fmt: skip
def test_a_peer_that_lies_about_an_image(rig, described):
    rig.start("a")
    address, server = liar([described] * 3)
    with server:
        t = rig.trainer("a", 0, world=2, local=1, node=0, peers=["", address])
        with pytest.raises(Refusal, match="PeerFailed"):
            t.ask(wire.Open, timeout_s=5, job=JOB, attempt=1, step=1, rank=1, node=1)
        fds = len(os.listdir(f"/proc/{rig.daemons['a'].pid}/fd"))
        with pytest.raises(Refusal, match="PeerFailed"):
            t.ask(wire.Open, timeout_s=5, job=JOB, attempt=1, step=1, rank=1, node=1)
        until(lambda: len(os.listdir(f"/proc/{rig.daemons['a'].pid}/fd")) <= fds, what="descriptors leak")


def test_peers_that_stop_in_the_middle_cost_nobody_else(rig):
    """More of them than a daemon has threads for byte work."""
    start(rig, "a", "b")
    peers = [rig.client(n).status()["peer_address"] for n in "ab"]
    described = wire.Described(image_bytes=3 << 20, digests=bytes(48))
    stuck = [liar([described], then=lambda peer: (peer.receive(), peer.send(wire.Blocks(bytes=3 << 20)), peer.sock.sendall(bytes(1000)), time.sleep(8))) for _ in range(4)]
    every = [*peers, *(address for address, _ in stuck)]
    a, b = (rig.trainer(n, i, world=2, local=1, node=i, peers=every, nbytes=3 << 20) for i, n in enumerate("ab"))
    for t in (a, b):
        t.fill(1)
    until(lambda: a.steps() and b.steps())
    waiting = [rig.client("a") for _ in stuck]
    for number, c in enumerate(waiting):
        c.ask(wire.Hello, job=JOB, role="cli")
        opened = c.ask(wire.Open, job=JOB, attempt=1, step=1, rank=10 + number, node=2 + number)
        os.close(c.pipe.take_fd())
        c.send(wire.Ensure(id=9, image=opened.image, blocks=[(0, 3)]))
    time.sleep(0.3)
    opened, fd = open_at(a, 1, 1)
    os.close(fd)
    began = time.perf_counter()
    a.ask(wire.Ensure, image=opened.image, blocks=[(0, 4)])
    a.fill(2)
    until(lambda: (1, 2) in a.steps())
    assert time.perf_counter() - began < 3
    assert not any(getattr(m, "id", 0) == 9 for c in waiting for m in c.inbox)
    rig.kill("a", signal.SIGTERM)  # and it leaves at once, whoever it waits for
    assert time.perf_counter() - began < 6
    for _, server in stuck:
        server.close()


def test_no_more_bytes_are_sent_than_the_rate_allows(rig):
    rig.start("a", "--peer-rate", "40MB")
    rig.start("b")
    a, b = pair(rig, nbytes=24 << 20)
    step_of([a, b], 1)
    took = {}
    for reader, rank in ((a, 1), (b, 0)):
        opened, fd = open_at(reader, rank, rank)
        with mmap.mmap(fd, opened.image_bytes, prot=mmap.PROT_READ) as m:
            os.close(fd)
            began = time.perf_counter()
            reader.ask(wire.Ensure, image=opened.image, blocks=[(0, 25)])
            took[rank] = time.perf_counter() - began
            assert m[:] == image_of(1, rank, 2, 24 << 20)
    print(f"24 MiB at 40 MB/s: {took[0]:.2f} s; without a limit {took[1]:.2f} s")
    assert (18 << 20) / 40e6 < took[0] < 5, "a burst and the last answer are not waited for"
    assert took[1] < took[0]


def test_a_rate_that_peers_would_not_wait_for_is_refused(rig):
    for rate in ("100kB", "much"):
        done = daemon_of(rig, "--peer-rate", rate)
        assert done.returncode == 10
        assert "remedy" in done.stderr


@pytest.mark.parametrize(("host", "seen"), [("127.0.0.1", "127.0.0.1"), ("127.0.0.2", "127.0.0.2")])
def test_a_daemon_dials_from_the_address_that_it_listens_on(rig, host, seen):
    rig.start("a", "--peer-host", host)
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(10)
        rig.trainer("a", 0, world=2, local=1, node=0, peers=["", f"127.0.0.1:{server.getsockname()[1]}"])
        sock, (address, _) = server.accept()
        sock.close()
    assert address == seen


# --- the durable tier


def test_both_write_one_complete_checkpoint(rig, tmp_path):
    start(rig, "a", "b")
    a, b = pair(rig, store=str(tmp_path), nbytes=2 << 20)
    step_of([a, b], 1)
    for t in (a, b):
        t.send(wire.Persist(step=1))
    for t in (a, b):
        t.reached("persisted", 1)
    store = open_store(str(tmp_path))
    (found,) = checkpoint.list_checkpoints(store, JOB)
    assert found.ok
    assert found.manifest.world_size == 2
    assert checkpoint.verify_checkpoint(store, found.directory).ok
    step_of([a, b], 2)
    assert a.job()["counters"]["persisted"] == 1
    until(lambda: [t.steps() for t in (a, b)] == [{(1, 2): "committed"}] * 2)


def test_wishes_at_different_times_are_one_wish(rig, tmp_path):
    """The ranks ask in their own time, and commits go on: every node must write the same step, or all wait for the deadline."""
    start(rig, "a", "b")
    a, b = pair(rig, store=str(tmp_path), nbytes=1 << 20)
    for step in range(1, 25):
        for t in (a, b) if step % 2 else (b, a):
            t.fill(step)
            t.send(wire.Persist(step=step))
            if step % 3 == 0:
                t.get(lambda m, s=step: isinstance(m, wire.Reached) and m.state == "committed" and m.step >= s - 1)
    for t in (a, b):
        t.get(lambda m: isinstance(m, wire.Reached) and m.state == "persisted" and m.step >= 22, 15)
    for t in (a, b):
        until(lambda t=t: not any(s["persisting"] for s in t.job()["snapshots"]), what="a node waits for another that writes another step")
        why = [m.state for m in t.inbox if isinstance(m, wire.Reached) and m.state.startswith("persist failed")]
        assert t.job()["counters"]["persist_failed"] == 0, why
    found = checkpoint.list_checkpoints(open_store(str(tmp_path)), JOB)
    print(f"{a.job()['counters']['persisted']} of 24 wishes became a checkpoint; steps kept: {[f.step for f in found if f.ok]}")


def test_a_wish_on_one_node_is_enough(rig, tmp_path):
    start(rig, "a", "b")
    a, b = pair(rig, store=str(tmp_path))
    b.send(wire.Persist(step=1))
    step_of([a, b], 1)
    a.reached("persisted", 1)
    b.reached("persisted", 1)


@pytest.mark.parametrize("victim", ["a", "b"])
def test_persisting_goes_on_after_a_daemon_died_in_the_middle(rig, tmp_path, victim):
    """Neither node may hold its slots for an hour because the other forgot what they were doing."""
    start(rig, "a", "b")
    a, b = ranks = pair(rig, store=str(tmp_path), nbytes=24 << 20)
    for t in ranks:
        t.send(wire.Persist(step=1))
        t.fill(1)
    until(lambda: any(t.job()["snapshots"] and t.job()["snapshots"][0]["persisting"] for t in ranks))
    rig.kill(victim)
    rig.start(victim)
    (a if victim == "a" else b).rejoin()
    for t in ranks:
        t.send(wire.Persist(step=1))
    for t in ranks:
        until(lambda t=t: t.job()["persisted"] == [1, 1] or t.job()["counters"]["persist_failed"], 15, "it hangs until its deadline")
        until(lambda t=t: not any(s["persisting"] for s in t.job()["snapshots"]), 15, "a slot is held until the deadline")
    for t in ranks:
        t.send(wire.Persist(step=2))
        t.fill(2)
    for t in ranks:
        until(lambda t=t: t.job()["persisted"] == [1, 2], 15)


def test_a_tier_that_refuses_costs_nothing_else(rig, tmp_path):
    start(rig, "a", "b")
    (tmp_path / "file").write_text("no directory")
    a, b = pair(rig, store=str(tmp_path / "file" / "store"))
    for step in range(1, 4):
        for t in (a, b):
            t.send(wire.Persist(step=step))
        step_of([a, b], step)
    a.get(lambda m: isinstance(m, wire.Reached) and m.state.startswith("persist failed"))
    for t in (a, b):
        until(lambda t=t: t.steps() == {(1, 3): "committed"}, what="a failed persist holds its slots")


# --- hostile peers


def dial(rig, name="a"):
    host, port = rig.client(name).status()["peer_address"].split(":")
    return socket.create_connection((host, int(port)), 5)


def test_news_of_unknown_jobs_and_old_attempts_change_nothing(rig):
    start(rig, "a", "b")
    a, b = pair(rig, attempt=5)
    a.fill(1)
    until(lambda: a.steps() == {(5, 1): "sealed"})
    with dial(rig) as sock:
        peer = Peer(sock, attempt=5)
        peer.send(wire.PeerNews(job=JOB, attempt=5, step=1, node=1, what="what?"))
        peer.send(wire.PeerNews(job=JOB, attempt=4, step=1, node=1, what="sealed"))
        peer.send(wire.PeerNews(job="another", attempt=5, step=1, node=1, what="sealed"))
        assert sock.recv(1) == b"", "news of another job end the connection"
    with dial(rig) as sock, pytest.raises((ConnectionError, TimeoutError)):
        Peer(sock, attempt=4)  # a zombie knows an older secret
    for job, attempt, secret in ((JOB, 5, bytes(32)), ("another", 5, None), (JOB, 6, None)):
        with dial(rig) as sock, contextlib.suppress(ConnectionError):
            peer = Peer(sock, job=job, attempt=attempt, secret=secret)
            peer.send(wire.PeerNews(job=job, attempt=attempt, step=1, node=1, what="sealed"))
            assert sock.recv(1) == b""
    assert a.status()["strangers"] == 4, "each is counted"
    assert a.steps() == {(5, 1): "sealed"}, "a zombie's word was taken"
    assert [*a.status()["jobs"]] == [JOB], "news make no jobs"
    b.fill(1)
    a.reached("committed", 1)


@pytest.mark.parametrize("begin_end", [(0, 1 << 40), (-1, 5), (5, 4), (0, (4 << 20) + 1), (1 << 40, 1 << 41)])
def test_ranges_of_a_fetch_are_bounded(rig, begin_end):
    rig.start("a")
    t = rig.trainer("a", nbytes=8 << 20)
    t.fill(1)
    t.reached("committed", 1)
    with dial(rig) as sock:
        peer = Peer(sock)
        peer.send(wire.Fetch(job=JOB, attempt=1, step=1, rank=0, begin=begin_end[0], end=begin_end[1]))
        answer = peer.receive()
    assert isinstance(answer, wire.Refused)


def test_addresses_that_are_none_do_not_kill_the_link_of_a_job(rig):
    start(rig, "a", "b")
    looks = [rig.client(n).status()["peer_address"] for n in "ab"]
    for bad in ("", "nonsense", "127.0.0.1:99999999", "host:port", ":"):
        rig.trainer("a", 0, world=2, local=1, node=0, peers=[looks[0], bad]).close()
    time.sleep(0.3)
    a, b = (rig.trainer(n, i, world=2, local=1, node=i, peers=looks, attempt=2) for i, n in enumerate("ab"))
    step_of([a, b], 1)
    assert "Traceback" not in rig.log("a")


def daemon_of(rig, *options):
    """One that does not come up."""
    return subprocess.run(
        [sys.executable, "-m", "ckptd.cli.main", "daemon", "--dir", str(rig.directory("x")), *options],
        capture_output=True, text=True, timeout=20, env=os.environ | {"PYTHONPATH": ROOT}, check=False,
    )  # fmt: skip


@pytest.mark.parametrize(("host", "why"), [("192.0.2.1", "--insecure-peers"), ("0.0.0.0", "remedy"), ("localhost", "remedy")])
def test_only_loopback_without_being_told(rig, host, why):
    done = daemon_of(rig, "--peer-host", host)
    assert done.returncode == 10
    assert why in done.stderr


# --- who is a peer


@pytest.mark.parametrize("what", ["changed", "repeated", "left out", "no tag", "turned around"])
def test_messages_that_were_tampered_with_end_the_connection(rig, what):
    """S13: between the ends somebody changes, repeats, drops or reflects what was sent."""
    rig.start("a")
    a = rig.trainer("a", 0, world=2, local=1, node=0, peers=["", "127.0.0.1:1"])
    a.fill(1)
    until(lambda: a.steps() == {(1, 1): "sealed"})
    news = wire.PeerNews(job=JOB, attempt=1, step=1, node=1, what="sealed")
    with dial(rig) as sock:
        peer = Peer(sock)
        good = peer.bytes_of(wire.List(job=JOB, attempt=1, step=1))
        sock.sendall(good)
        assert peer.receive().images[0][0] == 0
        data = peer.bytes_of(news)
        match what:
            case "changed":
                sock.sendall(data[:-20] + bytes([data[-20] ^ 1]) + data[-19:])
            case "repeated":
                sock.sendall(good)
            case "left out":
                sock.sendall(peer.bytes_of(news))
            case "no tag":
                sock.sendall(data[:-16] + bytes(16))
            case _:
                frame = wire.encode(news)
                sock.sendall(frame + peer.receives.tag(frame[4:]))
        sock.settimeout(5)
        with contextlib.suppress(ConnectionResetError):
            assert sock.recv(1) == b""
    time.sleep(0.2)
    assert a.steps() == {(1, 1): "sealed"}, "a forged word was taken"


def test_a_listener_that_does_not_know_the_secret_is_told_nothing(rig):
    """A stranger at a peer's address gets a knock, and no news."""
    rig.start("a")
    got = []
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(10)
        a = rig.trainer("a", 0, world=2, local=1, node=0, peers=["", f"127.0.0.1:{server.getsockname()[1]}"])
        a.fill(1)
        for _ in range(3):
            sock, _ = server.accept()
            with sock:
                sock.settimeout(2)
                head = sock.recv(4, socket.MSG_WAITALL)
                got.append(wire.decode(sock.recv(int.from_bytes(head, "little"), socket.MSG_WAITALL), "remote"))
                sock.sendall(wire.encode(wire.Prove(nonce=os.urandom(32), proof=os.urandom(32))))
                assert sock.recv(100) == b"", "it goes on without proof"
    assert [type(m) for m in got] == [wire.Knock] * 3
    assert len({m.nonce for m in got}) == 3, "a nonce is used once"
    assert a.job()["peers_connected"] == {"1": False}


def test_a_recorded_conversation_cannot_be_played_again(rig):
    start(rig, "a")
    rig.trainer("a", 0, world=2, local=1, node=0, peers=["", "127.0.0.1:1"])
    with dial(rig) as sock:
        sent = []

        class Recorder:
            def sendall(self, data):
                sent.append(data)
                sock.sendall(data)

            def recv(self, *args):
                return sock.recv(*args)

        Peer(Recorder()).send(wire.List(job=JOB, attempt=1, step=1))
    with dial(rig) as sock:
        sock.settimeout(5)
        for data in sent:
            sock.sendall(data)
        answers = b""
        with contextlib.suppress(ConnectionResetError):
            while piece := sock.recv(4096):
                answers += piece
    assert len(answers) < 200, "one proof, with a new nonce, and then nothing"


def test_a_rank_without_a_secret_is_refused(rig):
    start(rig, "a")
    with pytest.raises(Refusal, match="a secret of 3 bytes"):
        t = rig.trainer("a", 0, world=2, local=1, node=0, peers=["", "127.0.0.1:1"], join=False)
        t.secret = b"abc"
        t.join()
