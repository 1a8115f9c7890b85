"""Arenas and what the daemon holds, in one process: admission, sealing, and checksums that two fillings cannot mix up."""

from __future__ import annotations

import fcntl
import mmap
import os

import pytest

from ckptd import arena as arenas
from ckptd.arena import MARGIN_BYTES, Arena, Room, admit
from ckptd.core import checksum, slots
from ckptd.core.node import SlotRef
from ckptd.errors import BadImage, ChecksumMismatch, MemoryRefused, NotFound, PeerFailed
from ckptd.held import Arenas, Guest, make_seal, put_seal

GB = 1 << 30


@pytest.fixture
def made():
    a = Arena.create(job="j", rank=1, slot_count=2, slot_bytes=3 << 20)
    yield a
    a.close()


class Machine:
    total = 10 * GB
    available = 6 * GB


@pytest.fixture
def memory(monkeypatch):
    def free(nbytes):
        monkeypatch.setattr(arenas, "room", lambda: Room(nbytes, "the test's limit"))

    monkeypatch.setattr(arenas.psutil, "virtual_memory", lambda: Machine)
    free(6 * GB)
    return free


def test_enough_memory_gives_what_was_asked(memory):
    assert admit(1 << 20, 3, 7) == 3
    assert admit(1 << 20, 100, 0) == slots.SLOTS_MAX


def test_a_somewhat_too_large_request_gets_fewer_slots(memory):
    assert admit(GB, 8, 0) == 5
    assert admit(GB, 4, 1) == 2, "as much is left for the other rank"


def test_an_absurd_request_is_refused_with_numbers(memory):
    with pytest.raises(MemoryRefused) as e:
        admit(4 * GB, 3, 2)
    assert "2 slots of 4295 MB; 6442 MB are free (the test's limit), 805 MB stay reserved, and 2 more ranks" in e.value.message
    assert e.value.remedy


@pytest.mark.parametrize("nbytes", [-GB, 0, MARGIN_BYTES])
def test_no_memory_at_all(memory, nbytes):
    memory(nbytes)
    with pytest.raises(MemoryRefused):
        admit(4096, 2, 0)


def test_the_kernels_refusal_is_ours(monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    before = len(os.listdir("/proc/self/fd"))
    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(MemoryRefused, match="no room for an arena"):
        Arena.create(job="j", rank=0, slot_count=2, slot_bytes=4096)
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_creation_that_fails_half_way_leaks_nothing(monkeypatch):
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(ValueError, match="does not fit"):
        Arena.create(job="x" * 5000, rank=0, slot_count=2, slot_bytes=4096)
    assert len(os.listdir("/proc/self/fd")) == before


def test_seals_hold(made):
    for size in (4096, made.geometry.arena_bytes * 2):
        with pytest.raises(PermissionError):
            os.ftruncate(made.fd, size)
    with pytest.raises(PermissionError):
        fcntl.fcntl(made.fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
    assert not os.get_inheritable(made.fd)


def test_adoption_shares_the_bytes_and_closes_what_is_none(made):
    other = Arena.adopt(os.dup(made.fd))
    made.memory[made.geometry.image_at(1)] = 7
    assert other.memory[other.geometry.image_at(1)] == 7
    assert other.descriptor == made.descriptor
    other.close()
    fd = os.memfd_create("x")
    with pytest.raises(BadImage):
        Arena.adopt(fd)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


def fill(a, slot, gen, byte, nbytes=2 << 20, state=slots.FILLED, step=0):
    at = a.geometry.header_at(slot)
    slots.begin(a.memory, at, slots.Header(slots.FILLING, gen, 1, step or gen, nbytes, 1, 2, 1, 0, 1))
    a.image(slot, nbytes)[:] = bytes([byte]) * nbytes
    slots.flip(a.memory, at, state)
    return SlotRef(a.name, slot, gen)


def test_checksums_of_an_overtaken_filling_are_not_written_over_its_successors(made):
    """Filling 1 was given up while it was hashed, the slot was refilled and hashed; then the first pool thread comes back."""
    fill(made, 0, 1, 1)
    late = make_seal(0, 1, made.image(0, 2 << 20), made.seal(0))
    fill(made, 0, 2, 2)
    put_seal(made, 0, 2, make_seal(0, 2, made.image(0, 2 << 20), made.seal(0)))
    put_seal(made, 0, 1, late)
    assert made.seal(0).gen == 2
    assert made.seal(0).digests == checksum.digests_of(bytes([2]) * (2 << 20))


def test_a_predecessors_seal_is_checked_not_replaced(made):
    fill(made, 0, 1, 1)
    put_seal(made, 0, 1, make_seal(0, 1, made.image(0, 2 << 20), made.seal(0)))
    assert make_seal(0, 1, made.image(0, 2 << 20), made.seal(0)) == made.seal(0).digests
    made.memory[made.geometry.image_at(0) + 9] ^= 1
    with pytest.raises(ChecksumMismatch):
        make_seal(0, 1, made.image(0, 2 << 20), made.seal(0))


def test_fillings_are_found_oldest_first_and_only_whole_ones(made):
    held = Arenas()
    held.add(made)
    fill(made, 1, 1, 1, step=4)
    fill(made, 0, 2, 2, step=5)
    assert [h.step for _, h in held.filled(made)] == [4, 5]
    fill(made, 1, 3, 3, step=6)
    assert [h.step for _, h in held.filled(made)] == [5, 6]
    held.release(SlotRef(made.name, 1, 3))
    assert [h.step for _, h in held.filled(made)] == [5]
    fill(made, 0, 4, 4, state=slots.FILLING)
    assert [*held.filled(made)] == []
    held.void_torn(made)
    assert made.header(0).state == slots.VOID
    fill(made, 0, 5, 1, nbytes=1)
    at = made.geometry.header_at(0)
    slots.begin(made.memory, at, slots.Header(slots.FILLING, 6, 1, 1, made.geometry.slot_bytes + 1, 1, 2, 1, 0, 1))
    slots.flip(made.memory, at, slots.FILLED)
    assert [*held.filled(made)] == [], "larger than its slot"


def test_images_of_other_fillings_are_not_given_out(made):
    held = Arenas()
    held.add(made)
    ref = fill(made, 0, 1, 1)
    assert held.image(ref, 100)[0] == 1
    with pytest.raises(NotFound):
        held.digests(ref)
    put_seal(made, 0, 1, make_seal(0, 1, made.image(0, 2 << 20), made.seal(0)))
    assert len(held.digests(ref)) == 32
    fill(made, 0, 2, 2)
    for ask in (lambda: held.image(ref, 100), lambda: held.digests(SlotRef(made.name, 0, 2)), lambda: held.image(SlotRef("x", 0, 1), 1)):
        with pytest.raises(NotFound):
            ask()


@pytest.mark.parametrize(("nbytes", "digests"), [(0, 0), (-1, 0), (1 << 20, 15), (1 << 20, 32), (1 << 62, 16)])
def test_guests_that_cannot_be(nbytes, digests):
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(PeerFailed):
        Guest.of("g", 1, nbytes, bytes(digests))
    assert len(os.listdir("/proc/self/fd")) == before


def test_closing_with_views_still_held():
    a = Arena.create(job="j", rank=1, slot_count=2, slot_bytes=4096)
    view = a.image(0, 4096)
    view[0] = 5
    a.close()
    assert view[0] == 5, "no SIGSEGV, no SIGBUS"


def test_a_populated_arena_is_all_there():
    a = Arena.create(job="j", rank=1, slot_count=2, slot_bytes=1 << 20)
    a.populate()
    other = Arena.adopt(os.dup(a.fd))
    arenas.populate(other.memory)
    other.close()
    with mmap.mmap(a.fd, a.geometry.arena_bytes) as m:
        assert m[:8] == slots.MAGIC
    a.close()
