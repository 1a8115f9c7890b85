"""The bytes of an arena: what one side writes the other reads, and a death between any two stores leaves nothing that looks whole."""

from __future__ import annotations

import mmap
import os
import random
import signal
import time

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptd.core import checksum, slots
from ckptd.core.slots import EMPTY, FILLED, FILLING, VOID, Descriptor, Geometry, Header, Seal
from ckptd.errors import BadImage

PAGE = slots.PAGE_BYTES
WORD = st.integers(0, (1 << 64) - 1)
HEADERS = st.builds(Header, st.just(FILLING), *[WORD] * 9)


def memory(nbytes=16 * PAGE):
    return memoryview(bytearray(nbytes))


# --- geometry and descriptor


@pytest.mark.parametrize(("count", "nbytes"), [(2, PAGE), (3, 5 * PAGE), (8, 300 << 20)])
def test_parts_do_not_overlap(count, nbytes):
    g = Geometry(count, nbytes)
    at = PAGE
    for slot in range(count):
        assert g.header_at(slot) == at
        assert g.seal_at(slot) >= g.header_at(slot) + PAGE
        assert g.image_at(slot) - g.seal_at(slot) >= 40 + checksum.block_count(nbytes) * checksum.DIGEST_BYTES
        assert g.image_at(slot) % PAGE == 0
        at = g.image_at(slot) + nbytes
    assert g.arena_bytes == at


@pytest.mark.parametrize(("count", "nbytes"), [(1, PAGE), (9, PAGE), (2, 0), (2, -PAGE), (2, PAGE + 1), (-1, PAGE)])
def test_impossible_geometry(count, nbytes):
    with pytest.raises(ValueError, match="an arena has"):
        Geometry(count, nbytes)


def described(**changes):
    return Descriptor(**{"arena": "ab12", "job": "j", "rank": 3, "slots": 2, "slot_bytes": PAGE} | changes)


def test_descriptor_round_trip():
    m = memory(Geometry(2, PAGE).arena_bytes)
    slots.write_descriptor(m, described())
    assert slots.read_descriptor(m) == described()
    with pytest.raises(ValueError, match="does not fit"):
        slots.write_descriptor(m, described(job="x" * PAGE))


def forged(body: bytes, nbytes: int = Geometry(2, PAGE).arena_bytes) -> memoryview:
    """Any body with the right checksum: the check is against accidents, so what it holds may still be anything."""
    m = memory(nbytes)
    m[24 : 24 + len(body)] = body
    m[8:16] = len(body).to_bytes(8, "little")
    m[16:24] = slots._check(body).to_bytes(8, "little")
    m[0:8] = slots.MAGIC
    return m


def hostile_memories():
    good = msgspec.to_builtins(described())
    pack = msgspec.msgpack.encode
    yield "empty", memory(0)
    yield "small", memory(100)
    yield "zero", memory(PAGE)
    yield "magic only", memoryview(slots.MAGIC + bytes(2 * PAGE))
    for name, change in {
        "no slots": {"slots": 0}, "nine slots": {"slots": 9}, "negative": {"slots": -2}, "negative bytes": {"slot_bytes": -PAGE}, "odd": {"slot_bytes": 1},
        "huge": {"slot_bytes": 1 << 62}, "beyond": {"slot_bytes": (1 << 64) - PAGE}, "text": {"rank": "0"}, "name": {"arena": "x\nMAINPID=1"}, "no name": {"arena": ""}, "long name": {"arena": "a" * 65}, "float": {"slots": 2.5},
    }.items():  # fmt: skip
        yield name, forged(pack(good | change))
    yield "other size", forged(pack(good), Geometry(2, PAGE).arena_bytes + PAGE)
    yield "nil", forged(b"\xc0")
    yield "bomb", forged(b"\x91" * 3000)
    m = forged(pack(good))
    m[8:16] = (1 << 63).to_bytes(8, "little")
    yield "long", m
    m = forged(pack(good))
    m[30] ^= 1
    yield "flipped", m


@pytest.mark.parametrize(("name", "m"), [*hostile_memories()], ids=lambda v: v if isinstance(v, str) else "")
def test_hostile_descriptors(name, m):
    with pytest.raises(BadImage):
        slots.read_descriptor(m)


@given(st.binary(max_size=200))
def test_any_descriptor_body(body):
    with pytest.raises(BadImage):
        slots.read_descriptor(forged(body))


# --- headers


@given(HEADERS)
def test_header_round_trip(header):
    m = memory()
    slots.begin(m, PAGE, header)
    assert slots.read_header(m, PAGE) == header
    for state in (FILLED, VOID, FILLING):
        slots.flip(m, PAGE, state)
        assert slots.read_header(m, PAGE).state == state
        assert slots.read_header(m, PAGE).gen == header.gen


def test_every_flipped_byte_of_the_words_makes_it_torn():
    m = memory()
    slots.begin(m, 0, Header(FILLING, *range(1, 10)))
    slots.flip(m, 0, FILLED)
    for at in range(8, 8 + 8 * 9 + 8):
        m[at] ^= 0x10
        assert slots.read_header(m, 0).state == FILLING
        m[at] ^= 0x10
    assert slots.read_header(m, 0).state == FILLED


@pytest.mark.parametrize("state", [4, 255, 1 << 63])
def test_states_that_nobody_wrote_read_as_empty(state):
    m = memory()
    slots.flip(m, 0, state)
    assert slots.read_header(m, 0) == Header(EMPTY)
    assert slots.read_header(memory(), 0) == Header(EMPTY)


def test_a_filling_stopped_after_any_store_is_not_filled():
    """The writer dies between any two of its stores: every prefix of what it does, over what lay there before."""

    class Recorder(bytearray):
        pass

    stores: list[tuple[int, bytes]] = []
    put = slots._put

    def record(m, at, *words):
        stores.extend((at + 8 * i, w.to_bytes(8, "little")) for i, w in enumerate(words))
        put(m, at, *words)

    before = memory()
    slots.begin(before, 0, Header(FILLING, *range(1, 10)))
    slots.flip(before, 0, FILLED)
    old = bytes(before)
    new = Header(FILLING, *range(11, 20))
    slots._put = record
    try:
        slots.begin(before, 0, new)
        slots.flip(before, 0, FILLED)
    finally:
        slots._put = put
    for stop in range(len(stores)):
        m = memoryview(bytearray(old))
        for at, data in stores[:stop]:
            m[at : at + 8] = data
        h = slots.read_header(m, 0)
        assert stop == 0 or h.state == FILLING, f"after {stop} stores of {len(stores)}"
    assert slots.read_header(before, 0) == Header(FILLED, *range(11, 20))


class Between:
    """Memory in which something happens before the n-th read."""

    def __init__(self, inner: memoryview, n: int, happen) -> None:
        self.inner, self.n, self.happen = inner, n, happen

    def __getitem__(self, at):
        if self.n == 0:
            self.happen()
        self.n -= 1
        return self.inner[at]


def test_a_reader_interrupted_at_any_point_by_the_next_filling_is_not_fooled():
    """The daemon reads a slot that its trainer refills at that moment: old state with new words is not FILLED."""
    for n in range(14):
        m = memory()
        slots.begin(m, 0, Header(FILLING, *range(1, 10)))
        slots.flip(m, 0, FILLED)
        h = slots.read_header(Between(m, n, lambda m=m: slots.begin(m, 0, Header(FILLING, *range(11, 20)))), 0)
        assert h.state != FILLED or h.gen == 1, f"interrupted before read {n}: {h}"


def test_is_free():
    assert slots.is_free(Header(EMPTY), 0)
    assert slots.is_free(Header(VOID, gen=4), 0)
    assert slots.is_free(Header(FILLED, gen=4), 4)
    assert not slots.is_free(Header(FILLED, gen=4), 3)
    assert not slots.is_free(Header(FILLED, gen=4), 5), "another filling was released"
    assert not slots.is_free(Header(FILLING, gen=4), 4)


# --- seals


@given(WORD.filter(bool), st.binary(min_size=1, max_size=400), WORD)
def test_seal_round_trip(gen, digests, released):
    m = memory()
    slots.write_seal(m, 0, gen, digests)
    slots.release(m, 0, released)
    assert slots.read_seal(m, 0, PAGE) == Seal(released, gen, digests)


def test_every_flipped_byte_of_a_seal_makes_it_none():
    m = memory()
    slots.write_seal(m, 0, 7, b"0123456789abcdef" * 3)
    for at in range(16, 40 + 48):
        m[at] ^= 1
        assert slots.read_seal(m, 0, PAGE) == Seal(0, 0, b""), at
        m[at] ^= 1
    assert slots.read_seal(m, 0, PAGE).gen == 7


@pytest.mark.parametrize("length", [PAGE, 1 << 40, (1 << 64) - 1])
def test_a_seal_that_is_longer_than_its_room(length):
    m = memory()
    slots.write_seal(m, 0, 7, b"x" * 16)
    m[32:40] = length.to_bytes(8, "little")
    assert slots.read_seal(m, 0, PAGE).gen == 0


def test_a_fresh_seal_is_none():
    assert slots.read_seal(memory(), 0, PAGE) == Seal(0, 0, b"")


# --- a real writer that is killed


def derived(gen: int) -> Header:
    return Header(FILLING, gen, *(gen * k for k in range(2, 10)))


def write_for_ever(shared: mmap.mmap, gen: int) -> None:
    m = memoryview(shared)
    while True:
        gen += 1
        slots.begin(m, 0, derived(gen))
        m[PAGE : 3 * PAGE] = (gen & 0xFFFFFFFF).to_bytes(4, "little") * (PAGE // 2)
        slots.flip(m, 0, FILLED)
        if gen % 7 == 0:
            slots.flip(m, 0, VOID)


def test_a_writer_killed_anywhere_leaves_no_wrong_filling():
    rng = random.Random(3)
    rounds = int(os.environ.get("KILL_ROUNDS", "250"))
    seen = {EMPTY: 0, FILLING: 0, FILLED: 0, VOID: 0}
    live = gen = 0
    shared = mmap.mmap(-1, 4 * PAGE)
    m = memoryview(shared)
    if True:
        for _ in range(rounds):
            pid = os.fork()
            if pid == 0:
                try:
                    write_for_ever(shared, gen)
                finally:
                    os._exit(1)
            try:
                deadline = time.perf_counter() + rng.random() * 0.004
                limit = deadline + 10
                while slots.read_header(m, 0).gen == gen or time.perf_counter() < deadline:
                    h = slots.read_header(m, 0)
                    if h.state == FILLED:  # beside a live writer
                        assert h == Header(FILLED, h.gen, *(h.gen * k for k in range(2, 10)))
                        live += 1
                    assert time.perf_counter() < limit, "the writer does not write"
            finally:
                os.kill(pid, signal.SIGKILL)
                assert os.waitpid(pid, 0)[1] == signal.SIGKILL
            h = slots.read_header(m, 0)
            seen[h.state] += 1
            if h.state == FILLED:
                assert h == Header(FILLED, h.gen, *(h.gen * k for k in range(2, 10)))
                assert bytes(m[PAGE : 3 * PAGE]) == (h.gen & 0xFFFFFFFF).to_bytes(4, "little") * (PAGE // 2)
            gen = max(gen, h.gen) + 1000
    print(f"{rounds} kills: {seen}; {live} reads beside a live writer")
    assert seen[FILLED]
    assert seen[FILLING]
