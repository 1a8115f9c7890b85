"""Files to be written, cut into windows: at most a buffer of one file, to be filled in any order. Pure.

Consecutive segments share a window as long as it fits, so that a file of a few MiB is one. Tensors whose hash is made on the way (`hashed`) are cut at the
multiples of WINDOW_BYTES that are blocks of their hash. What is sealed is left zero; it is written when the file is complete.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import msgspec

from ckptd.core.crc import joined
from ckptd.core.emit import Entry, Known, OutFile, Sealed, Segment, Take, Zeros
from ckptd.core.image import ITEM_BYTES
from ckptd.reading import BUFFER_BYTES, WINDOW_BYTES, flat_part


class Piece(msgspec.Struct, frozen=True, gc=False):
    """A part of a window, from byte `at` of it: bytes, a box, or zeros."""

    at: int
    nbytes: int
    data: bytes | None = None
    take: Take | None = None


class Window(msgspec.Struct, frozen=True):
    """Bytes `begin` .. of a file. `marks`: (mark, at, bytes) whose CRC is wanted; `blocks`: (tensor, number, at, bytes) that are blocks of its hash."""

    file: int
    begin: int
    nbytes: int
    pieces: tuple[Piece, ...]
    marks: tuple[tuple[str, int, int], ...]
    blocks: tuple[tuple[str, int, int, int], ...]


@dataclass(slots=True)
class Sums:
    """CRCs of one file: mark -> (place, CRC, length) of its parts."""

    parts: dict[str, list[tuple[int, int, int]]] = field(default_factory=dict)

    def joined(self) -> dict[str, int]:
        """mark -> CRC of all its parts, in order."""
        return {mark: joined((c, n) for _, c, n in sorted(parts)) for mark, parts in self.parts.items()}


class _Packer:
    """Windows of one file, packed in order."""

    def __init__(self, number: int) -> None:
        self._number = number
        self._begin = self._size = 0
        self._pieces: list[Piece] = []
        self._marks: list[tuple[str, int, int]] = []
        self._blocks: list[tuple[str, int, int, int]] = []

    def room(self, nbytes: int) -> Iterator[Window]:
        """End the window unless so many bytes still fit."""
        if self._size and self._size + nbytes > BUFFER_BYTES:
            yield self.take()

    def take(self) -> Window:
        """What was packed."""
        done = Window(self._number, self._begin, self._size, tuple(self._pieces), tuple(self._marks), tuple(self._blocks))
        self._begin, self._size = self._begin + self._size, 0
        self._pieces, self._marks, self._blocks = [], [], []
        return done

    def put(self, nbytes: int, mark: str, data: bytes | None = None, take: Take | None = None) -> None:
        at = self._size
        self._pieces.append(Piece(at, nbytes, data, take))
        if mark and self._marks and self._marks[-1][0] == mark and sum(self._marks[-1][1:]) == at:
            self._marks[-1] = (mark, self._marks[-1][1], self._marks[-1][2] + nbytes)
        elif mark:
            self._marks.append((mark, at, nbytes))
        self._size += nbytes

    def block(self, name: str, number: int, nbytes: int) -> None:
        """The last so many bytes are a block."""
        self._blocks.append((name, number, self._size - nbytes, nbytes))

    @property
    def is_empty(self) -> bool:
        return not self._size


def windows(number: int, file: OutFile, hashed: Mapping[str, str]) -> Iterator[Window]:
    """The windows of a file; together they are all of it. `hashed`: tensor -> dtype, for those whose hash is made on the way."""
    packer = _Packer(number)
    for segment, mark in flat(file.segments):
        if isinstance(segment, Take):
            item = ITEM_BYTES[segment.dtype]
            count = WINDOW_BYTES // item
            for block, first in enumerate(range(0, segment.box.numel, count)):
                elements = min(count, segment.box.numel - first)
                yield from packer.room(elements * item)
                for piece in flat_part(segment.box, first, elements):
                    packer.put(piece.numel * item, mark, None, Take(segment.name, piece, segment.dtype))
                if hashed.get(segment.name) == segment.dtype:
                    packer.block(segment.name, block, elements * item)
            continue
        for at in range(0, segment.nbytes, WINDOW_BYTES):
            size = min(WINDOW_BYTES, segment.nbytes - at)
            yield from packer.room(size)
            packer.put(size, mark, segment.data[at : at + size] if isinstance(segment, Known) else None)
    if not packer.is_empty:
        yield packer.take()


def flat(segments: Iterable[Segment]) -> Iterator[tuple[Known | Zeros | Take | Sealed, str]]:
    """Segments with the mark of the entry that they stand in."""
    for segment in segments:
        if isinstance(segment, Entry):
            for inner in segment.segments:
                yield inner, segment.mark
        else:
            yield segment, ""
