"""Ranks and daemons that live and die: what is complete is found, what is torn is void, memory changes hands only after a death."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from ckptd import spawn
from ckptd.arena import Arena
from ckptd.core import slots, wire
from ckptd.link import Link
from tests.daemon.rig import JOB, ROOT, Refusal, image_of, until


def in_child(rig, work, **options):
    """A trainer in a process of its own; `work(trainer)`, then it waits for its death."""

    def run(ready):
        trainer = rig.trainer(**options)
        work(trainer)
        ready()

    return rig.child(run)


def test_two_ranks_commit_and_the_older_step_is_released(rig):
    rig.start()
    a, b = rig.trainer(rank=0, world=2), rig.trainer(rank=1, world=2)
    for step in range(1, 8):
        a.fill(step)
        b.fill(step)
        assert a.reached("committed", step).attempt == 1
        b.reached("committed", step)
    assert a.steps() == {(1, 7): "committed"}
    assert a.job()["counters"]["committed"] == 7
    assert a.status()["errors"] == 0


def test_a_step_that_one_rank_skipped_is_released(rig):
    rig.start()
    a, b = rig.trainer(rank=0, world=2), rig.trainer(rank=1, world=2)
    a.fill(1)
    b.send(wire.Skipped(step=1, reason="no free slot"))
    a.reached("skipped", 1)
    assert a.steps() == {}
    a.fill(2)
    b.fill(2)
    a.reached("committed", 2)


@pytest.mark.parametrize("slot_count", [2, 3])
def test_skip_notices_that_died_with_a_daemon_do_not_stop_snapshots_for_ever(rig, slot_count):
    """Rank 1 skipped step 2 while no daemon was there. Rank 0's slot of step 2 must come back."""
    rig.start()
    a, b = rig.trainer(rank=0, world=2, slot_count=slot_count), rig.trainer(rank=1, world=2, slot_count=slot_count)
    for t in (a, b):
        t.fill(1)
    a.reached("committed", 1)
    rig.kill()
    a.fill(2, tell=False)
    rig.start()
    a.rejoin()
    b.rejoin()
    b.fill(3)
    if slot_count == 3:
        a.fill(3)
    else:
        a.send(wire.Skipped(step=3, reason="no free slot"))
    a.fill(4)
    b.fill(4)
    a.reached("committed", 4)


def test_killed_in_mid_fill_voids_the_slot_and_finds_what_was_not_announced(rig):
    rig.start()
    look = rig.client()

    def work(t):
        t.fill(1)
        t.reached("committed", 1)
        t.fill(2, tell=False)
        t.begin(3)

    pid = in_child(rig, work)
    assert look.steps() == {(1, 1): "committed"}
    rig.end(pid)
    until(lambda: look.steps() == {(1, 2): "committed"}, what="the unannounced filling was not found")
    t = rig.trainer(attempt=2, join=False)
    assert [(h.attempt, h.step, h.state) for h in t.welcome.holdings] == [(1, 2, "committed")]
    assert t.welcome.attempt_max == 1
    t.join()
    assert sorted(t.states()) == [slots.FILLED, slots.FILLED, slots.VOID]
    t.choose((1, 2))
    t.fill(3)
    t.reached("committed", 3)
    assert look.steps() == {(2, 3): "committed"}


def test_the_next_attempt_gets_the_same_arena(rig):
    rig.start()
    pid = in_child(rig, lambda t: (t.fill(1), t.reached("committed", 1)))
    rig.end(pid)
    first = rig.client().status()["memory_bytes"]
    t = rig.trainer(attempt=2, choose=(1, 1))
    assert rig.client().status()["memory_bytes"] == first
    assert t.steps() == {(1, 1): "committed"}


def test_a_process_that_holds_the_dead_ranks_socket_does_not_hide_its_death(rig):
    """A forked data loader worker inherits the socket and lives on."""
    rig.start()
    look = rig.client()
    read, write = os.pipe()

    def work(t):
        t.fill(1, tell=False)
        t.begin(2)
        worker = os.fork()
        if worker == 0:
            os.write(write, f"{os.getpid()}\n".encode())
            time.sleep(600)
            os._exit(0)

    pid = in_child(rig, work)
    worker = int(os.read(read, 20))
    try:
        assert look.steps() == {}
        rig.end(pid)
        until(lambda: look.steps() == {(1, 1): "committed"}, what="the worker hid the death")
        assert slots.VOID in rig.trainer(attempt=2).states()
    finally:
        os.kill(worker, signal.SIGKILL)
        os.close(read)
        os.close(write)


@pytest.mark.parametrize("hung_up", [False, True])
def test_an_arena_changes_hands_only_after_its_owners_death(rig, hung_up):
    """Also when the old rank lost its connection: it may be a stopped zombie that goes on writing."""
    rig.start()

    def work(t):
        t.fill(1)
        t.reached("committed", 1)
        if hung_up:
            t.pipe.sock.shutdown(socket.SHUT_RDWR)

    pid = in_child(rig, work)
    look = rig.client()
    if hung_up:
        until(lambda: look.job()["ranks"] == [])
    try:
        second = rig.trainer(attempt=2, choose=(1, 1))
    except Refusal as e:  # two runs of one name
        assert "alive already" in str(e)  # noqa: PT017  both outcomes are right: it is refused, or it gets memory of its own
    else:
        assert second.states() == [slots.EMPTY] * 3, "the memory of a living process was given away"
        second.close()
    rig.end(pid)
    third = rig.trainer(attempt=3, choose=(1, 1))
    assert third.steps() == {(1, 1): "committed"}
    assert slots.FILLED in third.states()


def test_the_same_process_may_attach_again(rig):
    rig.start()
    a = rig.trainer()
    name = a.arena.name
    a.fill(1)
    a.reached("committed", 1)
    a.close()
    look = rig.client()
    until(lambda: look.job()["ranks"] == [])
    assert rig.trainer(attempt=2, choose=(1, 1)).arena.name == name


def test_an_old_attempt_is_fenced(rig):
    rig.start()
    old = rig.trainer(attempt=1, rank=1, world=2)
    in_child(rig, lambda _: None, attempt=2, world=2)
    with pytest.raises(Refusal, match="attempt 1 of job 'job' is over"):
        rig.trainer(attempt=1)
    old.fill(9)
    old.send(wire.Skipped(step=10, reason=""))
    until(lambda: old.free_slot() is not None and slots.is_free(old.arena.header(0), old.arena.seal(0).released_gen))
    assert old.steps() == {}


# --- daemons die too


def test_a_successor_gets_everything_back_from_the_trainers(rig):
    rig.start()
    a, b = rig.trainer(rank=0, world=2), rig.trainer(rank=1, world=2)
    for t in (a, b):
        t.fill(1)
    a.reached("committed", 1)
    rig.kill()
    rig.start()
    assert a.rejoin().brings is False
    assert a.steps() == {(1, 1): "filling"}
    b.rejoin()
    until(lambda: a.steps() == {(1, 1): "committed"})
    for t in (a, b):
        t.fill(2)
    a.reached("committed", 2)


def test_a_successor_keeps_the_restored_step_until_the_first_commit(rig):
    """Two ranks, attempt 2 restored step 1 and committed nothing yet. The arenas come back one after the other."""
    rig.start()
    children = [in_child(rig, lambda t: t.fill(1), rank=r, world=2) for r in range(2)]
    look = rig.client()
    until(lambda: look.steps() == {(1, 1): "committed"})
    for pid in children:
        rig.end(pid)
    a, b = (rig.trainer(rank=r, world=2, attempt=2, choose=(1, 1)) for r in range(2))
    rig.kill()
    rig.start()
    for t in (a, b):
        t.rejoin()
        t.choose((1, 1))
    until(lambda: a.steps() == {(1, 1): "committed"}, what="the only step of the job was released")
    assert rig.trainer(rank=0, world=2, attempt=3, join=False).welcome.holdings[0].ranks == (0, 1)


@pytest.mark.parametrize("slot_count", [2, 3])
def test_what_was_filled_while_a_successor_already_had_the_arena_is_found_at_join(rig, slot_count):
    """The service manager handed the arena over at once; the trainer filled, and then found the way to the successor."""
    rig.start()
    t = rig.trainer(slot_count=slot_count)
    t.fill(1)
    t.reached("committed", 1)
    rig.kill()
    rig.daemons["d"] = spawn.start_daemon(str(rig.directory()), arenas=[t.arena.fd])
    rig.await_up(rig.directory(), rig.daemons["d"])
    look = rig.client()
    until(lambda: look.steps() == {(1, 1): "committed"})
    t.fill(2, tell=False)
    t.rejoin()
    until(lambda: look.steps() == {(1, 2): "committed"}, what="slots that nobody announced are held for ever")
    t.fill(3)
    t.reached("committed", 3)


def test_handed_over_arenas_alone_are_enough(rig):
    rig.start()
    t = rig.trainer()
    t.fill(1)
    t.reached("committed", 1)
    t.fill(2, tell=False)
    t.begin(3)
    kept = os.dup(t.arena.fd)
    junk, unsealed = os.open("/dev/null", os.O_RDONLY), os.memfd_create("x")
    os.ftruncate(unsealed, 1 << 16)
    rig.kill()
    t.close()
    rig.daemons["d"] = spawn.start_daemon(str(rig.directory()), arenas=[junk, unsealed, kept])
    for fd in (kept, junk, unsealed):
        os.close(fd)
    rig.await_up(rig.directory(), rig.daemons["d"])
    look = rig.client()
    until(lambda: look.steps() == {(1, 2): "committed"})
    n = rig.trainer(attempt=2, choose=(1, 2))
    assert slots.FILLING not in n.states(), "a slot torn when daemon and trainer died is lost for ever"
    assert n.free_slot() is not None


def link_of(rig, trainer, notices):
    """A Link in the place of the trainer's raw pipe, as the session has it."""
    link = Link(rig.directory() / "daemon.sock", lambda i: wire.Hello(id=i, job=JOB, rank=trainer.rank), notices.append)
    rig.keep(link)  # a test that fails leaves no thread behind that goes on connecting
    link.open(5.0)
    granted, fd = link.ask(lambda i: wire.Join(id=i, **trainer.request(trainer.nbytes + 8192)), wire.Granted, 5.0)
    trainer.arena = Arena.adopt(fd)
    link.rejoin_with(lambda i: wire.Join(id=i, **trainer.request(0)), trainer.arena.fd)
    return link


def test_a_link_hands_the_arena_to_a_successor_and_repeats_the_choice(rig):
    rig.start()
    rig.end(in_child(rig, lambda t: (t.fill(1), t.reached("committed", 1)), slot_count=2))
    t = rig.trainer(join=False, slot_count=2)
    t.attempt = 2
    notices: list = []
    link = link_of(rig, t, notices)
    link.tell(wire.Chose(attempt=1, step=1))
    look = rig.client()
    until(lambda: look.job()["ranks"] == [0])
    rig.kill()
    until(lambda: not link.connected)
    t.fill(2, tell=False)
    link.tell(wire.Filled(step=2, slot=1, gen=1))
    rig.start()
    until(lambda: link.reconnects and link.connected)  # a daemon that dies may still have taken a connection
    look = rig.client()
    until(lambda: look.steps() == {(2, 2): "committed"})
    until(lambda: [n.step for n in notices if isinstance(n, wire.Reached) and n.state == "committed"][-1:] == [2])
    link.close()


def test_a_choice_that_the_daemon_did_not_live_to_hear_reaches_its_successor(rig):
    """Else both slots of a rank stay with what the restore gave up: no snapshot ever again."""
    rig.start()

    def work(t):
        t.fill(1)
        t.fill(2)

    rig.end(in_child(rig, work, slot_count=2, world=1, node=0, peers=["", "127.0.0.1:1"]))  # node 1 never sealed
    t = rig.trainer(join=False, slot_count=2)
    t.attempt = 2
    link = link_of(rig, t, [])
    assert t.states() == [slots.FILLED, slots.FILLED]
    assert t.free_slot() is None
    rig.kill()
    until(lambda: not link.connected)
    link.tell(wire.Chose(attempt=-1, step=-1))
    rig.start()
    until(lambda: link.reconnects)
    until(lambda: t.free_slot() is not None, what="the successor never heard of the choice")
    link.close()


def test_damaged_bytes_in_an_adopted_slot_are_noticed(rig):
    rig.start()
    t = rig.trainer(nbytes=3 << 20)
    slot, _ = t.fill(1)
    t.reached("committed", 1)
    rig.kill()
    t.arena.memory[t.arena.geometry.image_at(slot) + (2 << 20) + 77] ^= 1
    rig.start()
    t.rejoin()
    look = rig.client()
    until(lambda: look.status()["errors"])
    assert look.steps() == {}
    assert "does not match its checksum" in look.status()["last_errors"][0]
    assert rig.trainer(attempt=2, join=False).welcome.holdings == []
    t.fill(2)
    t.reached("committed", 2)


def test_a_damaged_slot_of_the_last_attempt_is_released_too(rig):
    rig.start()
    pid = in_child(rig, lambda t: (t.fill(1), t.reached("committed", 1)), slot_count=2)
    rig.end(pid)
    t = rig.trainer(attempt=2, choose=(1, 1), slot_count=2)
    slot = t.states().index(slots.FILLED)
    rig.kill()
    t.arena.memory[t.arena.geometry.image_at(slot) + 100] ^= 1
    rig.start()
    t.rejoin()
    until(lambda: slots.is_free(t.arena.header(slot), t.arena.seal(slot).released_gen), what="the damaged slot is held for ever")


def test_open_and_ensure_verify(rig):
    rig.start()
    t = rig.trainer(nbytes=3 << 20)
    slot, _ = t.fill(1)
    t.reached("committed", 1)
    opened = t.ask(wire.Open, job=JOB, attempt=1, step=1, rank=0, node=0)
    fd = t.pipe.take_fd()
    assert not os.get_inheritable(fd)
    image = image_of(1, 0, 1, 3 << 20)
    assert os.pread(fd, opened.image_bytes, opened.offset) == image
    os.close(fd)
    count = len(opened.digests) // 16
    assert count == 4
    t.ask(wire.Ensure, image=opened.image, blocks=[(1, 2), (3, 4)])
    t.arena.memory[opened.offset + (2 << 20) + 5] ^= 4
    t.ask(wire.Ensure, image=opened.image, blocks=[(0, 2), (3, 4)])
    for blocks in ([(2, 3)], [(0, 4)]):
        with pytest.raises(Refusal, match=r"ChecksumMismatch: .*block 2"):
            t.ask(wire.Ensure, image=opened.image, blocks=blocks)
    for image_id in ("", "x", "1/1/0/other", "1/2/0/job", "1/1/1/job", "-1/1/0/job", "9" * 30 + "/1/0/job"):
        with pytest.raises(Refusal, match="NotFound"):
            t.ask(wire.Ensure, image=image_id, blocks=[(0, 1)])
    with pytest.raises(Refusal, match="NotFound"):
        t.ask(wire.Open, job=JOB, attempt=1, step=2, rank=0, node=0)


@pytest.mark.parametrize("blocks", [[(0, 1 << 62)], [(-5, 0)], [(3, 2)], [(0, 1)] * 100_000, [(1, 2)]], ids=["huge", "negative", "backwards", "often", "past the end"])
def test_ranges_that_cannot_be_are_refused_at_once(rig, blocks):
    rig.start()
    t = rig.trainer()
    t.fill(1)
    t.reached("committed", 1)
    began = time.perf_counter()
    with pytest.raises(Refusal):
        t.ask(wire.Ensure, image="1/1/0/job", blocks=blocks, timeout_s=5)
    assert time.perf_counter() - began < 1


def test_forget_frees_the_memory(rig):
    rig.start()
    t = rig.trainer()
    t.fill(1)
    t.reached("committed", 1)
    t.close()
    look = rig.client()
    until(lambda: look.job()["ranks"] == [])
    look.ask(wire.Forget, job=JOB)
    assert look.status()["memory_bytes"] == 0
    assert look.status()["jobs"] == {}


def test_a_second_daemon_in_the_directory_is_refused(rig):
    directory = rig.start()
    second = subprocess.run(
        [sys.executable, "-m", "ckptd.cli.main", "daemon", "--dir", str(directory)],
        capture_output=True, text=True, timeout=20, env=os.environ | {"PYTHONPATH": ROOT}, check=False,
    )  # fmt: skip
    assert second.returncode == 10
    assert "already serves" in second.stderr
    assert rig.client().status()["pid"] == rig.daemons["d"].pid


@pytest.mark.parametrize("sig", [signal.SIGTERM, signal.SIGINT])
def test_it_leaves_when_told_and_cleans_up(rig, sig):
    directory = rig.start()
    rig.trainer()
    process = rig.daemons["d"]
    rig.kill(sig=sig)
    assert process.returncode == 0
    assert not (directory / "daemon.sock").exists()


def test_it_leaves_after_lingering(rig):
    rig.start("d", "--linger-s", "0.3")
    client = rig.client()
    client.status()
    time.sleep(0.8)
    assert rig.daemons["d"].poll() is None, "a client is here"
    client.close()
    assert rig.daemons["d"].wait(5) == 0


def test_verification_for_a_restart_is_done_once_and_not_forgotten_at_join(rig):
    """Eight dead ranks are one restart."""
    rig.start()
    children = [in_child(rig, lambda t: t.fill(1), rank=r, world=3, nbytes=1 << 20) for r in range(3)]
    look = rig.client()
    until(lambda: look.steps() == {(1, 1): "committed"})
    for pid in children:
        rig.end(pid)
    t = rig.trainer(world=3, attempt=2, nbytes=1 << 20, choose="wait")
    slot = t.states().index(slots.FILLED)
    time.sleep(0.2)
    t.arena.memory[t.arena.geometry.image_at(slot) + 5000] ^= 1
    t.ask(wire.Ensure, image="1/1/0/job", blocks=[(0, 1)])  # verified when the ranks died: the later damage is not looked for
    u = rig.trainer(world=3, attempt=3, nbytes=1 << 20, choose="wait")
    with pytest.raises(Refusal, match="ChecksumMismatch"):
        u.ask(wire.Ensure, image="1/1/0/job", blocks=[(0, 1)])
