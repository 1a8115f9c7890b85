"""Stripes: each block has one place, and what any m members lose the others give back; on images of every length."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from ckptd.core import checksum, stripes
from ckptd.core.parity import PARITY_MAX, Combine
from ckptd.core.stripes import Member, Stripes
from ckptd.errors import Lost

BLOCK = 16
"""Bytes per block in these tests; the code asks `checksum` for it."""


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(checksum, "BLOCK_BYTES", BLOCK)


class World:
    """Members with bytes, and their fragments."""

    def __init__(self, rng, n, m, images):
        self.members = tuple(Member(tuple((10 * i + r, size) for r, size in enumerate(sizes))) for i, sizes in enumerate(images))
        self.bytes = [{rank: rng.integers(0, 256, size, np.uint8).tobytes() for rank, size in member.images} for member in self.members]
        self.s = Stripes(m, self.members)
        self.fragments = [self.make(member) for member in range(n)]

    def block(self, part):
        if part.parity:
            begin, end = self.s.place_of(part.member, part.block)
            return bytes(self.fragments[part.member][begin:end])
        rank, begin, end = self.members[part.member].extent_of(part.block)
        return self.bytes[part.member][rank][begin:end]

    def perform(self, task, *, lost=()):
        assert not {p.member for p in task.parts} & {*lost}, "it takes what is lost"
        out = bytearray(task.bytes)
        parts = [self.block(p)[: task.bytes] for p in task.parts]
        if parts:
            Combine(task.coefficients)(parts, [out])
        return bytes(out)

    def make(self, member):
        return b"".join(self.perform(t) for t in self.s.encode(member))


def images_of(rng, n, kind):
    if kind == "equal":
        return [[5 * BLOCK]] * n
    if kind == "empty":
        return [[]] * n
    if kind == "one":
        return [[1]] + [[]] * (n - 1)
    return [[int(x) for x in rng.integers(1, 4 * BLOCK, rng.integers(0, 3))] for _ in range(n)]


@pytest.mark.parametrize("n", range(2, 11))
@pytest.mark.parametrize("kind", ["equal", "empty", "one", "mixed"])
def test_whatever_m_members_lose_comes_back(n, kind):
    rng = np.random.default_rng(n)
    decoded = 0
    for m in range(1, min(PARITY_MAX, n - 1) + 1):
        world = World(rng, n, m, images_of(rng, n, kind))
        for lost in combinations(range(n), m):
            for member in lost:
                for block in range(world.members[member].blocks):
                    rank, begin, end = world.members[member].extent_of(block)
                    got = world.perform(world.s.decode(member, block, lost), lost=lost)
                    assert got == world.bytes[member][rank][begin:end], (n, m, lost, member, block)
                    decoded += 1
                made = b"".join(world.perform(world.s.rebuild(member, row, lost), lost=lost) for row, _ in world.s.held_by(member))
                assert made == world.fragments[member], "parity made anew is the parity that was"
    print(f"n = {n}, {kind}: {decoded} blocks decoded")


@pytest.mark.parametrize(("n", "m"), [(2, 1), (3, 1), (5, 2), (8, 3)])
def test_each_block_has_one_place(n, m):
    s = Stripes(m, tuple(Member(((i, 7 * BLOCK),)) for i in range(n)))
    taken = set()
    for member in range(n):
        for block in range(7):
            row = s.row_of(member, block)
            assert s.block_in(row, member) == block
            assert member not in s.holders(row)
            assert row < s.rows
            taken.add((member, row))
    assert len(taken) == 7 * n
    for row in range(s.rows):
        assert [s.block_in(row, h) for h in s.holders(row)] == [None] * m
        assert len({*s.holders(row)}) == m


def test_beyond_m_the_loss_is_named():
    world = World(np.random.default_rng(1), 4, 1, [[3 * BLOCK]] * 4)
    with pytest.raises(Lost, match=r"row 1 of a group of 4 that may lose 1: members \[0, 2\] are lost"):
        world.s.decode(0, 0, {0, 2})
    with pytest.raises(Lost, match="may lose 1"):
        world.s.rebuild(0, 0, {0, 1})


def test_zeros_cost_nothing():
    """Members that have no block in a row are no reason to give up, and are not asked."""
    world = World(np.random.default_rng(1), 4, 1, [[BLOCK], [], [], []])
    task = world.s.decode(0, 0, {0, 2, 3} - set(world.s.holders(1)))
    assert [(p.member, p.parity) for p in task.parts] == [(1, True)]
    assert [world.s.fragment_bytes(i) for i in range(4)] == [0, BLOCK, 0, 0]


@pytest.mark.parametrize(("n", "m"), [(2, 1), (4, 1), (5, 2), (8, 3)])
def test_memory_is_m_of_k_and_even(n, m):
    blocks = 10 * (n - m)
    s = Stripes(m, tuple(Member(((i, blocks * BLOCK),)) for i in range(n)))
    each = [s.fragment_bytes(i) for i in range(n)]
    assert each == [blocks * BLOCK * m // (n - m)] * n
    taken = [sum(p.bytes for t in s.encode(i) for p in t.parts) for i in range(n)]
    assert taken == [blocks * BLOCK * m] * n, "each member is sent m times what it has"


def test_blocks_of_images():
    member = Member(((3, 2 * BLOCK + 1), (5, 0), (7, BLOCK)))
    assert member.blocks == 4
    assert [member.extent_of(b) for b in range(4)] == [(3, 0, 16), (3, 16, 32), (3, 32, 33), (7, 0, 16)]
    assert [member.bytes_of(b) for b in (-1, 0, 2, 3, 4)] == [0, 16, 1, 16, 0]
    assert (member.block_of(3, 2), member.block_of(7, 0)) == (2, 3)
    for wrong in ((3, 3), (5, 0), (9, 0), (7, -1)):
        with pytest.raises(KeyError):
            member.block_of(*wrong)
    for block in (-1, 4):
        with pytest.raises(KeyError):
            member.extent_of(block)
    assert stripes.Member().blocks == 0
