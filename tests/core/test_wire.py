"""The wire: every message and back; anything else is PeerFailed and nothing worse, before memory is spent on it."""

from __future__ import annotations

import random
import struct
import tracemalloc
import typing

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptd.core import rendezvous, wire
from ckptd.core.ladder import Holding, Key, Remains
from ckptd.core.rendezvous import Beat, Proposal, Roster, Vote, Wish
from ckptd.core.stripes import Member
from ckptd.errors import PeerFailed

KINDS = {"local": typing.get_args(wire.LOCAL), "remote": typing.get_args(wire.REMOTE)}
EXAMPLES = {
    int: 7, float: 0.25, list[int]: [1, 2], str: "häßlich\u2028", bytes: b"\x00\xff", bool: True, list[Holding]: [Holding(1, 2, 3, (0, 2), "committed")],
    list[tuple[int, int, str]]: [(1, 2, "memory")], list[str]: ["a:1", ""], list[tuple[int, int]]: [(0, 3)],
    dict[str, typing.Any]: {"x": [1, {"y": None}]}, dict[int, bytes]: {3: b"abc"}, dict[str, str]: {"rack": "r1"},
    list[dict[str, str]]: [{"rack": "r1"}, {}], Key | None: (3, 4), list[tuple[int, int, bytes]]: [(1, 2, b"x")],
    dict[str, int]: {"w": 2**64 - 1}, dict[int, dict[str, int]]: {2: {"w": 0}}, Wish: Wish(seeds=("a:1", "b:2"), nodes_max=3),
    Roster: Roster(3, (rendezvous.Member("a:1", "x", 2),)),
    Beat: Beat(rendezvous.Member("a:1", "x"), 1, "waiting", 0, 3, (), Vote((1, "x")), Proposal((2, "y")), ("y",), ("b:1",), closed=False),
    Remains | None: Remains(1, (Member(((0, 5), (1, 6))), Member()), {1: 0}, {1: 2}),
}  # fmt: skip


def example(kind):
    hints = typing.get_type_hints(kind)
    return kind(**{f.name: EXAMPLES[hints[f.name]] for f in msgspec.structs.fields(kind)})


@pytest.mark.parametrize(("kind", "message"), [(k, m) for k, ms in KINDS.items() for m in ms], ids=lambda v: getattr(v, "__name__", v))
def test_every_message_and_back(kind, message):
    sent = example(message)
    frame = wire.encode(sent)
    assert wire.frame_length(frame) == len(frame) - 4
    assert wire.decode(frame[4:], kind) == sent
    assert list(wire.Framer(kind).feed(frame)) == [sent]


def test_kinds_do_not_mix():
    for message in set(KINDS["local"]) - set(KINDS["remote"]):
        with pytest.raises(PeerFailed):
            wire.decode(wire.encode(example(message))[4:], "remote")


def test_frames_in_any_pieces():
    sent = [example(m) for m in KINDS["local"]] * 3
    data = b"".join(map(wire.encode, sent))
    rng = random.Random(1)
    framer, got, at = wire.Framer("local"), [], 0
    while at < len(data):
        n = rng.choice([1, 2, 3, 5, 100, 4096])
        got += framer.feed(data[at : at + n])
        at += n
    assert got == sent


@given(st.binary(max_size=300), st.sampled_from(["local", "remote"]))
@settings(max_examples=600, deadline=None)
def test_random_bytes_raise_peer_failed_only(data, kind):
    try:
        wire.decode(data, kind)
    except PeerFailed:
        pass
    try:
        list(wire.Framer(kind).feed(data))
    except PeerFailed:
        pass


def test_mutated_messages_raise_peer_failed_only():
    rng = random.Random(2)
    frames = [(kind, wire.encode(example(m))) for kind, ms in KINDS.items() for m in ms]
    refused = 0
    for _ in range(20_000):
        kind, frame = rng.choice(frames)
        body = bytearray(frame[4:])
        for _ in range(rng.randint(1, 3)):
            match rng.randrange(3):
                case 0:
                    body[rng.randrange(len(body))] ^= 1 << rng.randrange(8)
                case 1:
                    del body[rng.randrange(len(body)) :]
                    body += b"\xc1"
                case 2:
                    body.insert(rng.randrange(len(body)), rng.randrange(256))
        try:
            wire.decode(body, kind)
        except PeerFailed:
            refused += 1
    assert refused > 10_000


@pytest.mark.parametrize("length", [0, wire.MESSAGE_BYTES_MAX + 1, (1 << 31) - 1, (1 << 32) - 1])
def test_lengths_out_of_bounds(length):
    with pytest.raises(PeerFailed):
        list(wire.Framer("local").feed(struct.pack("<I", length)))
    with pytest.raises(PeerFailed):
        wire.frame_length(struct.pack("<I", length))


def test_memory_is_not_spent_before_the_bytes_are_there():
    tracemalloc.start()
    framers = [wire.Framer("local") for _ in range(200)]
    for f in framers:
        assert list(f.feed(struct.pack("<I", wire.MESSAGE_BYTES_MAX) + b"x" * 10)) == []
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


def test_a_message_that_is_too_long_is_not_sent():
    with pytest.raises(PeerFailed):
        wire.encode(wire.PeerNews(job="j", attempt=1, step=1, node=0, what="written", digests={0: bytes(wire.MESSAGE_BYTES_MAX)}))


def bomb(opener: bytes, depth: int) -> bytes:
    return opener * depth + b"\xc0"


@pytest.mark.parametrize("opener", [b"\x91", b"\x81\xa1k", b"\xdc\x00\x01"])
@pytest.mark.parametrize("depth", [100, 10_000, 1_000_000])
def test_nesting(opener, depth):
    status = b"\x83\xa4type\xa6Report\xa2id\x01\xa6status\x81\xa1k"
    for body in (bomb(opener, depth), status + bomb(opener, depth)):
        try:
            wire.decode(body, "local")
        except PeerFailed:
            pass
        else:
            assert depth == 100


@pytest.mark.parametrize("head", [b"\xdd\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff", b"\xdb\xff\xff\xff\xff", b"\xc6\xff\xff\xff\xff", b"\xc9\xff\xff\xff\xff\x01"])
def test_announced_sizes_cost_nothing(head):
    """An array, map, string, binary or extension of four billion, of which nothing follows."""
    tracemalloc.start()
    for body in (head, b"\x83\xa4type\xa6Report\xa2id\x01\xa6status\x81\xa1k" + head, b"\x82\xa4type\xa6Forget\xa3job" + head):
        with pytest.raises(PeerFailed):
            wire.decode(body, "local")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


@pytest.mark.parametrize(
    "body",
    [
        b"\x82\xa4type\xa6Status\xa2id\xcf\xff\xff\xff\xff\xff\xff\xff\xff" + b"\x00",  # something after the end
        b"\x82\xa4type\xa6Status\xa2id\xcb\x7f\xf8\x00\x00\x00\x00\x00\x00",  # NaN as an id
        b"\x82\xa4type\xa6Forget\xa3job\xa2\xff\xfe",  # no UTF-8
        b"\x83\xa4type\xa6Status\xa2id\x01\xa5extra\x01",
        b"\x81\xa4type\xa6Status",
        b"\x82\xa4type\xa4Evil\xa2id\x01",
        b"\x81\xa2id\x01",
        b"",
    ],
)
def test_what_is_no_message(body):
    with pytest.raises(PeerFailed):
        wire.decode(body, "local")
