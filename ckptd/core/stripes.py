"""Stripes: which block of which node is protected by which parity, on which node.

The images of a node, in the order of their ranks, are its blocks: each image is cut into blocks of `checksum.BLOCK_BYTES`, so that whatever is sent
can be checked as it comes. A row takes one block of each of k = n - m members, and has m parity blocks on the m others; from row to row the
parity moves on by one member, so that everybody stores, sends and computes the same.

        member   0    1    2    3        n = 4, m = 1
    row 0        P    a0   b0   c0   ->  row r has its parity on members r, r + 1, ..., r + m - 1 (mod n)
    row 1        d0   P    b1   c1
    row 2        d1   a1   P    c2
    row 3        d2   a2   b2   P

Members have different numbers of blocks, and the last block of an image is short: what is missing is zeros, which nobody stores, sends or hashes. A row's
parity is as long as its longest block. All parity that a member holds of a step is its fragment, row by row.

Memory: m parity blocks per k blocks of data, of the longest member. Network: every block goes to the m members that hold its row's parity.

Invariants (tests/core/test_stripes.py)
- a member's blocks and its parity lie in different rows; each block has exactly one place;
- whichever m members are lost, every block of theirs is decoded from blocks that the others have.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Collection, Iterator, Sequence
from functools import cached_property
from itertools import accumulate

import msgspec

from ckptd.core import checksum
from ckptd.core.parity import Rows, decode_rows
from ckptd.errors import Lost


class Member(msgspec.Struct, frozen=True, array_like=True, dict=True):
    """What a member of a group has of a step: its images' (rank, bytes), in the order of their ranks."""

    images: tuple[tuple[int, int], ...] = ()

    @cached_property
    def starts(self) -> list[int]:
        """The number of each image's first block, and of what follows the last."""
        return [0, *accumulate(checksum.block_count(size) for _, size in self.images)]

    @property
    def blocks(self) -> int:
        """How many blocks there are."""
        return self.starts[-1]

    def block_of(self, rank: int, number: int) -> int:
        """Which block of the member is block `number` of an image. Raises KeyError."""
        for start, (held, size) in zip(self.starts, self.images, strict=False):
            if held == rank and 0 <= number < checksum.block_count(size):
                return start + number
        raise KeyError((rank, number))

    def extent_of(self, block: int) -> tuple[int, int, int]:
        """(rank, begin, end) of a block: bytes of an image. Raises KeyError."""
        if not 0 <= block < self.blocks:
            raise KeyError(block)
        at = bisect_right(self.starts, block) - 1
        rank, size = self.images[at]
        return rank, *checksum.extent_of(block - self.starts[at], size)

    def bytes_of(self, block: int) -> int:
        """The length of a block; 0 past the last."""
        if not 0 <= block < self.blocks:
            return 0
        _, begin, end = self.extent_of(block)
        return end - begin


class Part(msgspec.Struct, frozen=True):
    """A block that a computation takes: of a member's images, or (`parity`) of its fragment."""

    member: int
    """Its position in the group."""
    block: int
    parity: bool = False
    bytes: int = 0


class Task(msgspec.Struct, frozen=True):
    """`coefficients` times `parts` is the block wanted, `bytes` long. Parts that are all zeros are left out, with their coefficients."""

    row: int
    parts: tuple[Part, ...]
    coefficients: Rows
    bytes: int


class Stripes(msgspec.Struct, frozen=True, dict=True):
    """The stripes of one group at one step. Positions are indices in `members`."""

    parity: int
    members: tuple[Member, ...]

    @property
    def n(self) -> int:
        """Members."""
        return len(self.members)

    @property
    def k(self) -> int:
        """Data blocks in a row."""
        return self.n - self.parity

    @cached_property
    def rows(self) -> int:
        """How many rows there are: whole turns, of which the last may have empty rows."""
        return -(-max((m.blocks for m in self.members), default=0) // self.k) * self.n

    def holders(self, row: int) -> tuple[int, ...]:
        """The positions that hold a row's parity blocks, in their order."""
        return tuple((row + i) % self.n for i in range(self.parity))

    def row_of(self, member: int, block: int) -> int:
        """Where a block of a member lies."""
        turn, place = divmod(block, self.k)
        return turn * self.n + (member + 1 + place) % self.n

    def block_in(self, row: int, member: int) -> int | None:
        """Which block of a member lies in a row; None where it holds parity."""
        turn, place = divmod(row, self.n)
        at = (place - member - 1) % self.n
        return turn * self.k + at if at < self.k else None

    def bytes_of(self, row: int) -> int:
        """The length of a row's parity: of its longest block."""
        return max(p.bytes for p in self._data(row))

    def held_by(self, member: int) -> Iterator[tuple[int, int]]:
        """(row, which of its parity blocks) that a member holds, in the fragment's order; rows without data have no parity."""
        for row in range(self.rows):
            index = (member - row) % self.n
            if index < self.parity and self.bytes_of(row):
                yield row, index

    def fragment_bytes(self, member: int) -> int:
        """The length of a member's fragment."""
        return max((end for _, end in self.places_of(member).values()), default=0)

    @cached_property
    def _places(self) -> dict[int, dict[int, tuple[int, int]]]:
        return {}

    def places_of(self, member: int) -> dict[int, tuple[int, int]]:
        """row -> (begin, end) of its parity in a member's fragment. Made when it is first asked for: about 10 us per row."""
        places = self._places.get(member)
        if places is None:
            places, at = {}, 0
            for row, _ in self.held_by(member):
                size = self.bytes_of(row)
                places[row] = at, at + size
                at += size
            self._places[member] = places
        return places

    def place_of(self, member: int, row: int) -> tuple[int, int]:
        """Where a row's parity lies in a member's fragment. Raises KeyError."""
        return self.places_of(member)[row]

    def _data(self, row: int) -> list[Part]:
        """The row's data blocks in their order: by position."""
        found = []
        for member in range(self.n):
            block = self.block_in(row, member)
            if block is not None:
                found.append(Part(member, block, bytes=self.members[member].bytes_of(block)))
        return found

    def _parts(self, row: int) -> list[Part]:
        """All of a row's blocks as the code numbers them: data, then parity."""
        size = self.bytes_of(row)
        return [*self._data(row), *(Part(h, row, parity=True, bytes=size) for h in self.holders(row))]

    def encode(self, member: int) -> Iterator[Task]:
        """What a member computes: its parity, row by row."""
        for row, index in self.held_by(member):
            yield self._task(row, tuple(range(self.k)), self.k + index, self._parts(row), self.bytes_of(row))

    def decode(self, member: int, block: int, lost: Collection[int]) -> Task:
        """How a block of a lost member is made from what the others have. Raises Lost if too many are lost."""
        row = self.row_of(member, block)
        return self._from_others(row, next(i for i, p in enumerate(self._data(row)) if p.member == member), lost, self.members[member].bytes_of(block))

    def rebuild(self, member: int, row: int, lost: Collection[int]) -> Task:
        """How a lost parity block is made anew. Raises Lost if too many are lost."""
        return self._from_others(row, self.k + (member - row) % self.n, lost, self.bytes_of(row))

    def _from_others(self, row: int, wanted: int, lost: Collection[int], size: int) -> Task:
        parts = self._parts(row)
        # What is known to be zeros costs nothing, data cost less than parity: nothing to compute where all of a row's data are there.
        there = [i for i, p in enumerate(parts) if not p.bytes or p.member not in lost]
        there.sort(key=lambda i: (parts[i].bytes > 0, parts[i].parity))
        if len(there) < self.k:
            gone = sorted({p.member for p in parts if p.member in lost})
            msg = f"row {row} of a group of {self.n} that may lose {self.parity}: members {gone} are lost"
            raise Lost(msg)
        return self._task(row, tuple(sorted(there[: self.k])), wanted, parts, size)

    def _task(self, row: int, have: tuple[int, ...], wanted: int, parts: Sequence[Part], size: int) -> Task:
        (coefficients,) = decode_rows(self.k, self.parity, have, (wanted,))
        used = [(c, parts[b]) for c, b in zip(coefficients, have, strict=True) if c and parts[b].bytes]
        return Task(row, tuple(p for _, p in used), (bytes(c for c, _ in used),), size)
