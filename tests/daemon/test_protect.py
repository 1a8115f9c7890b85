"""Daemons that protect each other: fragments are made, and what a lost node held is decoded by the others."""

from __future__ import annotations

import contextlib
import mmap
import os
import signal
import threading
import time

import msgspec
import pytest

from ckptd.core import wire
from ckptd.core.ladder import guarded, rungs
from ckptd.protect import FRAGMENT_SLOTS, GROWTH, WALK_BYTES_MAX
from tests.daemon.rig import JOB, Refusal, image_of, until

MB = 1 << 20


def cluster(rig, count, *, parity, nbytes=3 * MB, attempt=1, names=None, labels=(), store=""):
    """One daemon and one rank per node, joined to one attempt."""
    names = names or [f"n{i}" for i in range(count)]
    for name in names:
        if name not in rig.daemons:
            rig.start(name, *[x for label in labels for x in ("--label", label)])
    peers = [rig.client(n).status()["peer_address"] for n in names]
    return [
        rig.trainer(
            n, i, world=count, local=1, node=i, peers=peers, slot_count=4, nbytes=nbytes + 1000 * i, attempt=attempt, parity=parity, store=store,
            choose="none" if attempt == 1 else "wait",
        )  # fmt: skip
        for i, n in enumerate(names)
    ]


def protected(trainers, step):
    for t in trainers:
        t.fill(step)
    for t in trainers:
        t.reached("protected", step, 20)


def read(trainer, rung, rank, blocks=None):
    """A rank's image, as a session gets it."""
    node = rung.nodes.get(rank, -1)
    opened = trainer.ask(
        wire.Open, job=JOB, attempt=rung.attempt, step=rung.step, rank=rank, node=node, remains=None if node >= 0 else rung.remains_of(rank)
    )
    fd = trainer.pipe.take_fd()
    with mmap.mmap(fd, os.fstat(fd).st_size, prot=mmap.PROT_READ) as m:
        os.close(fd)
        trainer.ask(wire.Ensure, image=opened.image, blocks=blocks or [(0, -(-opened.image_bytes // MB))], timeout_s=30)
        return m[opened.offset : opened.offset + opened.image_bytes]


def ladder_of(trainers):
    return rungs({i: t.welcome.holdings for i, t in enumerate(trainers)}, [])


def survivors(rig, names, *, attempt=2, parity=1):
    """A new attempt on the nodes that are left."""
    return cluster(rig, len(names), parity=parity, attempt=attempt, names=names)


@pytest.mark.parametrize(("count", "m", "lost"), [(2, 1, [1]), (4, 1, [0]), (4, 1, [2]), (5, 2, [1, 3]), (4, 3, [0, 1, 2])])
def test_what_lost_nodes_held_is_decoded_by_the_others(rig, count, m, lost):
    trainers = cluster(rig, count, parity=m)
    protected(trainers, 1)
    protected(trainers, 2)
    for n in lost:
        rig.kill(f"n{n}")
    left = [f"n{n}" for n in range(count) if n not in lost]
    again = survivors(rig, left, parity=min(m, len(left) - 1))
    (best, *_) = ladder_of(again)
    assert best.key == (1, 2), "the newest PROTECTED step is offered"
    assert {*range(count)} - {*best.nodes} == {*lost}
    for t in again[:2]:
        for rank in range(count):
            assert read(t, best, rank) == image_of(2, rank, count, 3 * MB + 1000 * rank)


def test_only_the_blocks_that_are_asked_for_are_decoded(rig):
    trainers = cluster(rig, 4, parity=1, nbytes=9 * MB)
    protected(trainers, 1)
    rig.kill("n2")
    again = survivors(rig, ["n0", "n1", "n3"])
    (best,) = ladder_of(again)
    got, want = read(again[0], best, 2, [(3, 5)]), image_of(1, 2, 4, 9 * MB + 2000)
    assert got[3 * MB : 5 * MB] == want[3 * MB : 5 * MB]
    assert got[5 * MB : 6 * MB] == bytes(MB)


def test_more_losses_than_parity_are_no_rung(rig):
    trainers = cluster(rig, 4, parity=1)
    protected(trainers, 1)
    for name in ("n1", "n2"):
        rig.kill(name)
    again = survivors(rig, ["n0", "n3"])
    assert ladder_of(again) == []
    assert guarded({i: t.welcome.holdings for i, t in enumerate(again)}) is None


@pytest.mark.parametrize("what", ["image", "fragment"])
def test_wrong_bytes_are_never_decoded_into_an_image(rig, what):
    trainers = cluster(rig, 3, parity=1)
    slot = trainers[1].fill(1)[0]
    for t in (trainers[0], trainers[2]):
        t.fill(1)
    for t in trainers:
        t.reached("protected", 1, 20)
    if what == "image":
        a = trainers[1].arena
        for block in range(4):
            a.memory[a.geometry.image_at(slot) + block * MB + 77] ^= 1
    else:
        damage_fragment(rig, trainers[1])
    rig.kill("n2")
    again = survivors(rig, ["n0", "n1"])
    (best,) = ladder_of(again)
    with pytest.raises(Refusal, match="ChecksumMismatch"):
        read(again[0], best, 2)


def damage_fragment(rig, trainer):
    """Flip bits in the middle of every page of the parity that the trainer's daemon holds."""
    keeper = rig.client(os.path.basename(trainer.directory))
    keeper.ask(wire.Hello, job=JOB, role="keeper")
    from ckptd.arena import Arena

    for _ in range(2):
        arena = Arena.adopt(keeper.pipe.take_fd())
        if arena.descriptor.rank == -1:
            for s in range(2):
                at = arena.geometry.image_at(s)
                for offset in range(4096, arena.geometry.slot_bytes, 4096):
                    arena.memory[at + offset + 99] ^= 4
        arena.close()


def test_memory_of_parity_is_m_of_k(rig):
    trainers = cluster(rig, 4, parity=1, nbytes=24 * MB)
    protected(trainers, 1)
    status = trainers[0].job()["group"]
    per_slot = status["fragment_bytes"] / 2
    print(f"parity of 24 MB images in a group of 4: {per_slot / MB:.1f} MB a slot, {per_slot / (24 * MB):.3f} of an image")
    assert per_slot < 24 * MB / 3 * 1.25, "a third, room to grow, and headers"
    assert status["parity"] == 1 and list(status["members"]) == [0, 1, 2, 3] and status["degraded"] == ""


def resident(pid):
    """A process's anonymous memory."""
    with open(f"/proc/{pid}/status") as f:
        return next(int(line.split()[1]) << 10 for line in f if line.startswith("RssAnon"))


@contextlib.contextmanager
def peaks(rig, names):
    """At the end: by how much each daemon's anonymous memory grew at most."""
    pids = {n: rig.daemons[n].pid for n in names}
    before, most, stop = {n: resident(p) for n, p in pids.items()}, dict.fromkeys(names, 0), threading.Event()

    def watch():
        while not stop.wait(0.002):
            for n, p in pids.items():
                most[n] = max(most[n], resident(p) - before[n])

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield most
    finally:
        stop.set()
        thread.join()


def test_protecting_and_decoding_hold_a_bounded_part_of_the_images(rig):
    """160 MB each: what a walk holds does not grow with them. The interpreter's own objects, and its threads', are a few MB."""
    own = 4 * MB
    trainers = cluster(rig, 3, parity=1, nbytes=160 * MB)
    protected(trainers, 1)  # code is loaded, pools have their threads
    for t in trainers:
        t.fill(2)
    with peaks(rig, ["n0", "n1", "n2"]) as protecting:
        for t in trainers:
            t.reached("protected", 2, 60)
    rig.kill("n2")
    again = survivors(rig, ["n0", "n1"])
    (best, *_) = ladder_of(again)
    with peaks(rig, ["n0", "n1"]) as decoding:
        assert read(again[0], best, 2) == image_of(2, 2, 3, 160 * MB + 2000)
    found = {"protecting": protecting, "decoding": decoding}
    print("grew by at most, MB:", {what: [round(b / MB, 1) for b in most.values()] for what, most in found.items()})
    for what, most in found.items():
        assert max(most.values()) <= WALK_BYTES_MAX + own, f"{what} holds more of the images than its buffers"


@pytest.mark.parametrize(("n", "m"), [(2, 1), (4, 1), (5, 2)])
def test_what_parity_costs_is_resident_memory_of_m_of_k(rig, n, m):
    nbytes = 48 * MB
    trainers = cluster(rig, n, parity=m, nbytes=nbytes)
    protected(trainers, 1)
    protected(trainers, 2)
    resident_bytes = []
    for i in range(n):
        base = f"/proc/{rig.daemons[f'n{i}'].pid}/fd"
        found = {os.stat(f"{base}/{fd}").st_ino: os.stat(f"{base}/{fd}").st_blocks * 512 for fd in os.listdir(base) if f"ckptd:{JOB}:-1" in os.readlink(f"{base}/{fd}")}
        assert len(found) == 1, "one arena"
        resident_bytes.append(sum(found.values()) / FRAGMENT_SLOTS)
    share = m / (n - m)
    print(f"({n},{m}): {max(resident_bytes) / nbytes:.3f} of an image is resident for a fragment, the least is {share:.3f}")
    for got in resident_bytes:
        assert share * nbytes <= got <= (share * nbytes + m * MB) * (1 + 1 / GROWTH) + MB, "parity, room to grow, and headers"


def test_the_protected_step_stays_until_a_newer_one_is(rig):
    a, b = cluster(rig, 2, parity=1)
    protected([a, b], 1)
    a.fill(2)
    time.sleep(0.2)
    rig.kill("n1")  # in the middle of step 2
    (again,) = survivors(rig, ["n0"], parity=0)
    (best, *_) = ladder_of([again])
    assert best.key == (1, 1)
    assert read(again, best, 1) == image_of(1, 1, 2, 3 * MB + 1000)


def test_after_a_loss_the_next_step_is_protected_by_those_who_are_left(rig):
    trainers = cluster(rig, 4, parity=1)
    protected(trainers, 1)
    rig.kill("n3")
    again = survivors(rig, ["n0", "n1", "n2"])
    for t in again:
        t.send(wire.Chose(attempt=1, step=1, protected=(1, 1)))
    protected(again, 2)
    until(lambda: all(t.job()["protected"] == [2, 2] for t in again))
    until(lambda: all([*t.steps()] == [(2, 2)] for t in again), what="what a newer PROTECTED step replaced is kept for ever")
    rig.kill("n0")
    last = survivors(rig, ["n1", "n2"], attempt=3)
    (best,) = ladder_of(last)
    for rank in range(3):
        assert read(last[0], best, rank) == image_of(2, rank, 3, 3 * MB + 1000 * rank, attempt=2)


def test_a_fragment_comes_back_to_a_new_daemon(rig):
    """A keeper holds copies of all arenas, parity's too."""
    trainers = cluster(rig, 3, parity=1)
    keeper = rig.client("n1")
    keeper.ask(wire.Hello, job=JOB, role="keeper")
    protected(trainers, 1)
    fds = []
    until(lambda: (keeper.status() and False) or sum(isinstance(m, wire.Kept) for m in keeper.inbox) == 2, what="the keeper was not given the fragment's arena")
    fds = [keeper.pipe.take_fd() for m in keeper.inbox if isinstance(m, wire.Kept)]
    rig.kill("n1")
    (rig.directory("n1") / "peer.port").unlink()
    rig.start("n1")
    new = rig.client("n1")
    new.ask(wire.Hello, job=JOB, role="keeper")
    for fd in fds:
        new.send(wire.HandBack(), fd)
        os.close(fd)
    rig.kill("n0")
    again = survivors(rig, ["n1", "n2"])
    (best,) = ladder_of(again)
    for t in again:
        assert read(t, best, 0) == image_of(1, 0, 3, 3 * MB)


def test_labels_and_groups_are_shown(rig):
    trainers = cluster(rig, 2, parity=1, labels=["rack=r7"])
    assert trainers[0].welcome.labels == {"rack": "r7"}


# --- what went wrong once


def memfds(rig, name, what):
    """Descriptors of a daemon whose memory is called so."""
    base = f"/proc/{rig.daemons[name].pid}/fd"
    found = []
    for fd in os.listdir(base):
        with contextlib.suppress(FileNotFoundError):
            found += [fd] if what in os.readlink(f"{base}/{fd}") else []
    return len(found)


def open_of(rung, rank):
    node = rung.nodes.get(rank, -1)
    return {"job": JOB, "attempt": rung.attempt, "step": rung.step, "rank": rank, "node": node, "remains": None if node >= 0 else rung.remains_of(rank)}


def test_what_an_earlier_attempt_opened_is_not_what_a_later_one_needs(rig):
    """Attempt 2 fetched from a node that died before the restore chose; attempt 3 decodes the same image."""
    trainers = cluster(rig, 3, parity=1)
    protected(trainers, 1)
    again = cluster(rig, 3, parity=1, attempt=2)
    (best, *_) = ladder_of(again)
    assert best.nodes[2] == 2
    read(again[0], best, 2, [(0, 1)])
    rig.kill("n2")
    last = survivors(rig, ["n0", "n1"], attempt=3)
    (best, *_) = ladder_of(last)
    for t in last:
        assert read(t, best, 2) == image_of(1, 2, 3, 3 * MB + 2000)


def test_protecting_goes_on_with_a_new_daemon_at_the_old_address(rig):
    """Node 0's line was there before the new daemon knew the job: what it told then was told to nobody."""
    a, b = cluster(rig, 2, parity=1)
    protected([a, b], 1)
    a.fill(2)
    until(lambda: a.steps().get((1, 2)) == "sealed")
    rig.kill("n1")
    rig.start("n1")
    time.sleep(0.5)
    ask = b.request
    b.request = lambda n: ask(n) | {"protected": (1, 1)}
    b.rejoin()
    b.choose(None)
    b.fill(2)
    for step in (3, 4):
        protected([a, b], step)
    assert a.job()["counters"]["protect_failed"] == 0


def test_memory_for_parity_that_became_too_small_is_freed(rig):
    for attempt in (1, 2, 3):
        trainers = cluster(rig, 3, parity=1, attempt=attempt, nbytes=(2 << attempt) * MB)
        for t in trainers:
            t.choose(None)
        protected(trainers, 1)
        protected(trainers, 2)
        held = lambda t=trainers[0]: t.job()["group"]["fragment_bytes"]
        until(lambda a=attempt, h=held: h() < 2 * 1.2 * (2 << a) * MB / 2, what="fragments of earlier sizes are kept")


def test_a_keeper_gets_the_memory_of_parity_that_could_not_be_made_at_first(rig):
    trainers = cluster(rig, 3, parity=1)
    keeper = rig.client("n0")
    keeper.ask(wire.Hello, job=JOB, role="keeper")
    slot = trainers[2].fill(1)[0]
    until(lambda: trainers[2].steps().get((1, 1)) == "sealed")
    a = trainers[2].arena
    for block in range(4):
        a.memory[a.geometry.image_at(slot) + block * MB + 77] ^= 1
    for t in trainers[:2]:
        t.fill(1)
    until(lambda: trainers[0].job()["counters"]["protect_failed"])
    protected(trainers, 2)
    keeper.status()
    assert sum(isinstance(m, wire.Kept) for m in keeper.inbox) == 2


def test_a_job_that_is_forgotten_in_the_middle_leaves_nothing(rig):
    a, b = cluster(rig, 2, parity=1)
    b.fill(1)
    until(lambda: b.steps().get((1, 1)) == "sealed")
    time.sleep(0.3)
    os.kill(rig.daemons["n1"].pid, signal.SIGSTOP)
    a.fill(1)
    until(lambda: a.steps().get((1, 1)) == "committed")
    c = rig.client("n0")
    c.ask(wire.Forget, job=JOB)
    a.close()
    time.sleep(0.3)
    c.ask(wire.Forget, job=JOB)
    os.kill(rig.daemons["n1"].pid, signal.SIGCONT)
    time.sleep(1.0)
    assert c.status()["jobs"] == {} and c.status()["memory_bytes"] == 0


def test_a_choice_in_the_middle_of_decoding_leaks_nothing(rig):
    trainers = cluster(rig, 3, parity=1)
    protected(trainers, 1)
    rig.kill("n2")
    t, other = survivors(rig, ["n0", "n1"])
    (best, *_) = ladder_of([t, other])
    opened = t.ask(wire.Open, **open_of(best, 2))
    os.close(t.pipe.take_fd())
    os.kill(rig.daemons["n1"].pid, signal.SIGSTOP)
    t.send(wire.Ensure(id=99, image=opened.image, blocks=[(0, 3)]))
    time.sleep(0.3)
    t.send(wire.Chose(attempt=1, step=1, protected=(1, 1)))
    time.sleep(0.3)
    os.kill(rig.daemons["n1"].pid, signal.SIGCONT)
    until(lambda: memfds(rig, "n0", "job/1/2") == 0, what="a guest's descriptor is left")
    assert "BufferError" not in rig.log("n0")


def test_many_who_open_at_once_share_one_guest(rig):
    trainers = cluster(rig, 3, parity=1)
    protected(trainers, 1)
    rig.kill("n2")
    again = survivors(rig, ["n0", "n1", "n3"])
    (best, *_) = ladder_of(again)
    clients = [rig.client("n3") for _ in range(8)]
    for c in clients:
        c.ask(wire.Hello, job=JOB, role="cli")
    for c in clients:
        c.send(wire.Open(id=7, **open_of(best, 2)))
    for c in clients:
        c.get(lambda m: getattr(m, "id", 0) == 7)
        os.close(c.pipe.take_fd())
    until(lambda: memfds(rig, "n3", "job/1/2") == 2, what="guests that lost the race are left")  # its own, and its mapping's


@pytest.mark.parametrize("changes", [{"parity": 3}, {"parity": 50}, {"parity": -1}, {"members": ()}, {"fragments": {9: 0}}, {"images": {}}, {"fragments": {}}])
def test_remains_that_cannot_be_are_refused(rig, changes):
    trainers = cluster(rig, 3, parity=1)
    protected(trainers, 1)
    rig.kill("n2")
    t, other = survivors(rig, ["n0", "n1"])
    (best, *_) = ladder_of([t, other])
    lie = open_of(best, 2)
    lie["remains"] = msgspec.structs.replace(lie["remains"], **changes)
    with pytest.raises(Refusal):
        opened = t.ask(wire.Open, **lie)
        os.close(t.pipe.take_fd())
        t.ask(wire.Ensure, image=opened.image, blocks=[(0, 1)])
    assert read(t, best, 2) == image_of(1, 2, 3, 3 * MB + 2000), "and the truth is still taken"
