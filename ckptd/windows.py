"""Files to be written, cut into windows: at most WINDOW_BYTES of one file, to be filled in any order. Pure.

A tensor whose hash is made on the way (`hashed`) has windows of its own, each a block of that hash; everything else shares them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import msgspec

from ckptd.core.boxes import boxes_of_flat_range
from ckptd.core.crc import joined
from ckptd.core.emit import Entry, Known, OutFile, Sealed, Segment, Take, Zeros
from ckptd.core.image import ITEM_BYTES
from ckptd.reading import WINDOW_BYTES, cuts


class Piece(msgspec.Struct, frozen=True):
    """A part of a window. `mark`: whose CRC it belongs to."""

    at: int
    nbytes: int
    data: bytes | None
    take: Take | None
    mark: str = ""


class Window(msgspec.Struct, frozen=True):
    """Bytes `begin` .. of a file, and the block of a tensor's hash that they are, if they are one."""

    file: int
    begin: int
    nbytes: int
    pieces: tuple[Piece, ...]
    block: tuple[str, int] | None = None


@dataclass(slots=True)
class Sums:
    """CRCs of one file: mark -> (place, CRC, length) of its pieces."""

    parts: dict[str, list[tuple[int, int, int]]] = field(default_factory=dict)

    def joined(self) -> dict[str, int]:
        """mark -> CRC of all its pieces, in order."""
        return {mark: joined((c, n) for _, c, n in sorted(parts)) for mark, parts in self.parts.items()}


def windows(number: int, file: OutFile, hashed: Mapping[str, str]) -> Iterator[Window]:
    """The windows of a file, but for what is sealed. `hashed`: tensor -> dtype, for those whose hash is made on the way."""
    at = 0
    pieces: list[Piece] = []
    begin = 0

    def flush() -> Iterator[Window]:
        nonlocal pieces
        if pieces:
            yield Window(number, begin, sum(p.nbytes for p in pieces), tuple(pieces))
            pieces = []

    for segment, mark in flat(file.segments):
        size = segment.nbytes
        if isinstance(segment, Sealed):
            yield from flush()
            at += size
            continue
        if isinstance(segment, Take) and hashed.get(segment.name) == segment.dtype and segment.box.numel:
            yield from flush()  # a tensor whose blocks are hashed has windows of its own
            yield from _blocks(number, at, segment, mark)
            at += size
            continue
        for piece in _pieces(segment, mark):
            if pieces and (sum(p.nbytes for p in pieces) + piece.nbytes > WINDOW_BYTES):
                yield from flush()
            if not pieces:
                begin = at
            pieces.append(Piece(at - begin, piece.nbytes, piece.data, piece.take, mark))
            at += piece.nbytes
    yield from flush()


def _blocks(number: int, at: int, take: Take, mark: str) -> Iterator[Window]:
    item = ITEM_BYTES[take.dtype]
    count = WINDOW_BYTES // item
    for block, first in enumerate(range(0, take.box.numel, count)):
        inside, pieces = 0, []
        for piece in boxes_of_flat_range(take.box.extent, first, min(count, take.box.numel - first)):
            size = piece.numel * item
            pieces.append(Piece(inside, size, None, Take(take.name, piece, take.dtype), mark))
            inside += size
        yield Window(number, at + first * item, inside, tuple(pieces), (take.name, block))


def flat(segments: Iterable[Segment]) -> Iterator[tuple[Known | Zeros | Take | Sealed, str]]:
    """Segments with the mark of the entry that they stand in."""
    for segment in segments:
        if isinstance(segment, Entry):
            for inner in segment.segments:
                yield inner, segment.mark
        else:
            yield segment, ""


def _pieces(segment: Known | Zeros | Take, mark: str) -> Iterator[Piece]:
    """A segment in parts no longer than a window; their places are the caller's."""
    if isinstance(segment, Take):
        for _, box in cuts(segment.box, ITEM_BYTES[segment.dtype]):
            take = Take(segment.name, box, segment.dtype)
            yield Piece(0, take.nbytes, None, take, mark)
        return
    for at in range(0, segment.nbytes, WINDOW_BYTES):
        size = min(WINDOW_BYTES, segment.nbytes - at)
        yield Piece(0, size, segment.data[at : at + size] if isinstance(segment, Known) else None, None, mark)
