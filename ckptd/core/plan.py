"""Plans: who stores what (capture), and which bytes go where (restore). Pure, and each proves what it promises.

*Capture.* Every rank declares its leaves: the boxes of each tensor that it holds. A box that several ranks declare is the same
bytes in each (DTensor Replicate, DDP, tensor parallelism's replicated parameters), and is stored once: cut into nearly equal
parts, one per holder, or given to the holder with least to store where cutting is not worth it. `plan_capture` proves that the
declared boxes tile every tensor.

*Restore.* A rank states the boxes that it wants; `plan_restore` intersects them with the saved boxes, proves that they are
covered, and orders the copies by image and place.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import msgspec
import xxhash

from ckptd.core.boxes import Box, prove_tiles
from ckptd.core.image import ITEM_BYTES, Piece
from ckptd.core.manifest import Index
from ckptd.errors import NotTiled, StateMismatch, Unstorable

SPLIT_BYTES_MIN = 64 << 10
"""Below this a shared box is stored whole by one holder: a header entry costs about 200 bytes, a copy call a microsecond."""


class LeafDecl(msgspec.Struct, frozen=True, array_like=True):
    """What one rank holds of one tensor: stored dtype, global shape, its boxes, and the logical dtype if stored as bytes.

    `digest`: of the bytes, given for tensors whose sharing is assumed and not declared (plain tensors under one name on several
    ranks); ranks that hold the same box must agree on it.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    boxes: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]
    view: str = ""
    digest: bytes = b""
    local: bool = False


def local_name(name: str, rank: int) -> str:
    """The name of a rank's own copy of a leaf that every rank has for itself."""
    return f"{name}@r{rank}"


def plan_capture(declared: Mapping[int, Sequence[LeafDecl]]) -> dict[int, list[Piece]]:
    """The pieces that each rank stores. Raises NotTiled, Unstorable (ranks disagree about a tensor), by name."""
    holders: dict[str, dict[Box, list[int]]] = {}
    first: dict[str, tuple[int, LeafDecl]] = {}
    digests: dict[tuple[str, Box], tuple[int, bytes]] = {}
    own: list[tuple[int, Piece]] = []
    for rank in sorted(declared):
        for leaf in declared[rank]:
            known_rank, known = first.setdefault(leaf.name, (rank, leaf))
            _check_agree(known_rank, known, rank, leaf)
            if leaf.local and known_rank != rank:
                own.append((rank, Piece(local_name(leaf.name, rank), leaf.dtype, leaf.shape, Box.whole(leaf.shape), leaf.view)))
                continue
            held = holders.setdefault(leaf.name, {})  # even without a box: a tensor that nobody holds must not vanish
            for start, extent in leaf.boxes:
                box = Box(start, extent)
                held.setdefault(box, []).append(rank)
                if leaf.digest:
                    _check_same(leaf, rank, digests.setdefault((leaf.name, box), (rank, leaf.digest)))
    plan: dict[int, list[Piece]] = {rank: [] for rank in sorted(declared)}
    shared: list[tuple[Piece, list[int]]] = []
    for rank, piece in own:
        plan[rank].append(piece)
    for name, boxes in holders.items():
        for whole, ranks in _proven(first[name][1], boxes, first[name][0]):
            if len(ranks) == 1:
                plan[ranks[0]].append(whole)
            else:
                shared.append((whole, ranks))
    _share(plan, shared)
    return plan


def _proven(leaf: LeafDecl, boxes: Mapping[Box, list[int]], someone: int) -> list[tuple[Piece, list[int]]]:
    """The boxes of one tensor, proven to tile it, with their holders. A tensor without elements is kept too: it has a name, a dtype and a shape."""
    prove_tiles(leaf.name, leaf.shape, boxes)
    kept = {b: r for b, r in boxes.items() if b.numel}
    if not kept:
        box = min(boxes, default=Box.whole(leaf.shape))
        kept = {box: boxes.get(box, [someone])}
    return [(Piece(leaf.name, leaf.dtype, leaf.shape, box, leaf.view), ranks) for box, ranks in kept.items()]


def _share(plan: dict[int, list[Piece]], shared: Sequence[tuple[Piece, list[int]]]) -> None:
    """Give each shared box's holders their parts, so that the fullest rank ends as low as can be."""
    load = {rank: sum(p.nbytes for p in pieces) for rank, pieces in plan.items()}
    # Largest first (Graham's longest processing time rule), one part per holder: stock PyTorch reads one box of a tensor per file, and would
    # silently leave out a second (`<name>#1`).
    for whole, ranks in sorted(shared, key=lambda c: (-c[0].nbytes, c[0].name, c[0].box)):
        shares = level({r: load[r] for r in ranks}, whole.nbytes)
        for part, rank in zip(whole.box.cut([*shares.values()]), shares, strict=True):
            if part.numel or whole.nbytes == 0:
                piece = Piece(whole.name, whole.dtype, whole.shape, part, whole.view)
                plan[rank].append(piece)
                load[rank] += piece.nbytes


def level(load: Mapping[int, int], nbytes: int) -> dict[int, int]:
    """Pour `nbytes` onto loads so that the fullest ends as low as can be: rank -> its share, none below SPLIT_BYTES_MIN (but for a single one)."""
    ranks = sorted(load, key=lambda r: (load[r], r))[: max(1, nbytes // SPLIT_BYTES_MIN)]
    while True:
        surface = (nbytes + sum(load[r] for r in ranks)) // len(ranks)
        if len(ranks) == 1 or surface - load[ranks[-1]] >= SPLIT_BYTES_MIN:
            shares = {r: surface - load[r] for r in ranks}
            shares[ranks[0]] += nbytes - sum(shares.values())
            return shares
        ranks.pop()


def _check_agree(known_rank: int, known: LeafDecl, rank: int, leaf: LeafDecl) -> None:
    if (known.dtype, known.shape, known.view) != (leaf.dtype, leaf.shape, leaf.view):
        msg = f"{leaf.name}: rank {known_rank} holds {known.dtype}{list(known.shape)}, rank {rank} holds {leaf.dtype}{list(leaf.shape)}"
        raise Unstorable(msg, remedy="names must be global: one name, one logical tensor, on all ranks")
    if leaf.local != known.local:
        msg = f"{leaf.name}: only one of ranks {known_rank} and {rank} says that it is each rank's own"
        raise Unstorable(msg, remedy="give attach(local=[...]) the same names on all ranks")


def _check_same(leaf: LeafDecl, rank: int, known: tuple[int, bytes]) -> None:
    if known[1] != leaf.digest:
        msg = f"{leaf.name}: ranks {known[0]} and {rank} both declare all of it, but hold different bytes"
        raise Unstorable(
            msg,
            remedy="if each rank has its own, name it in attach(local=[...]); if it is a shard, make it a DTensor; "
            "if they should be equal, broadcast it before attach",
        )


def mesh_digest(coords: Sequence[Mapping[str, int]]) -> str:
    """One word for the coordinates of all ranks, in rank order: two meshes are the same only if every rank's coordinates are."""
    return xxhash.xxh3_64_hexdigest(repr([sorted(c.items()) for c in coords]).encode())


class Want(msgspec.Struct, frozen=True, array_like=True):
    """A box that a rank wants of a tensor."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    box: Box
    view: str = ""


class Copy(msgspec.Struct, frozen=True, gc=False):
    """`part` of want number `want` (a box in the tensor) lies in `box`, stored at bytes [begin, end) of image `image`."""

    want: int
    image: int
    part: Box
    box: Box
    begin: int
    end: int


def plan_restore(index: Index, wants: Sequence[Want], *, mine: int | None = None) -> list[Copy]:
    """The copies that fill `wants`, image by image (image `mine` first), in the order of their bytes.

    Raises StateMismatch (missing names, other dtypes or shapes, all of them by name) and NotTiled.
    """
    problems = [p for w in wants if (p := _problem(index, w))]
    if problems:
        shown = "; ".join(problems[:8]) + (f"; and {len(problems) - 8} more" if len(problems) > 8 else "")
        msg = f"step {index.step} does not fit: {shown}"
        raise StateMismatch(msg, remedy="pass strict=False to leave missing keys as they are")
    copies: list[Copy] = []
    for i, want in enumerate(wants):
        covered = 0
        for row in index.rows[want.name]:
            part = row.box.intersect(want.box)
            if part is not None:
                covered += part.numel
                copies.append(Copy(i, row.image, part, row.box, row.begin, row.end))
        if covered != want.box.numel:
            msg = f"{want.name}: {want.box.numel - covered} of {want.box.numel} wanted elements are in no image"
            raise NotTiled(msg)
    return sorted(copies, key=lambda c: (c.image != mine, c.image, c.begin, c.want))


def _problem(index: Index, want: Want) -> str:
    info = index.tensors.get(want.name)
    if info is None:
        return f"{want.name} is missing"
    if info.shape != want.shape:
        return f"{want.name} is {list(info.shape)}, wanted {list(want.shape)}"
    if (info.dtype, info.view) != (want.dtype, want.view):
        return f"{want.name} is {info.view or info.dtype}, wanted {want.view or want.dtype}"
    if not want.box.inside(want.shape):
        return f"{want.name} is {list(info.shape)}, wanted {want.box} of it"
    return ""


def byte_ranges(copies: Iterable[Copy], dtypes: Mapping[int, str]) -> dict[int, list[tuple[int, int]]]:
    """image -> merged byte ranges of its file that the copies read. `dtypes`: by want number.

    The range of a copy reaches from its first element to its last: a box narrower than its row reads what lies between.
    """
    found: dict[int, list[tuple[int, int]]] = {}
    for c in copies:
        if c.part is c.box:
            found.setdefault(c.image, []).append((c.begin, c.end))
            continue
        low, high = span(c.part.relative_to(c.box), c.box.extent)
        item = ITEM_BYTES[dtypes[c.want]]
        found.setdefault(c.image, []).append((c.begin + low * item, c.begin + high * item))
    return {image: merge(ranges) for image, ranges in found.items()}


def span(part: Box, extent: Sequence[int]) -> tuple[int, int]:
    """First element of `part` in the row-major order of an array of `extent`, and first element past its last."""
    low = high = 0
    for start, length, size in zip(part.start, part.extent, extent, strict=True):
        low = low * size + start
        high = high * size + start + length - 1
    return low, high + 1


def merge(ranges: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Ranges sorted and joined where they touch."""
    merged: list[tuple[int, int]] = []
    for begin, end in sorted(ranges):
        if merged and begin <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        else:
            merged.append((begin, end))
    return merged
