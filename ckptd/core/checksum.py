"""Checksums of an image: xxh3-128 of every block of `BLOCK_BYTES`, the last one short. They travel with the image through every tier.

1 MiB blocks: DESIGN section 7 bounds them at 4 MiB; a quarter of that makes a partial read verify less that it does not want,
keeps a block in a core's L2 cache between hashing and copying it, and costs 16 bytes per MiB.
"""

from __future__ import annotations

from collections.abc import Iterator

import xxhash

from ckptd.errors import ChecksumMismatch

ALGORITHM = "xxh3-128"
BLOCK_BYTES = 1 << 20
DIGEST_BYTES = 16


def block_count(image_bytes: int) -> int:
    """Blocks of an image."""
    return -(-image_bytes // BLOCK_BYTES)


def block_digest(block: memoryview | bytes) -> bytes:
    """The digest of one block; releases the GIL."""
    return xxhash.xxh3_128_digest(block)


def digests_of(image: memoryview | bytes) -> bytes:
    """All digests of an image, joined."""
    view = memoryview(image)
    return b"".join(block_digest(view[at : at + BLOCK_BYTES]) for at in range(0, len(view), BLOCK_BYTES))


def blocks_of(begin: int, end: int) -> Iterator[int]:
    """Indices of the blocks that hold bytes [begin, end)."""
    return iter(range(begin // BLOCK_BYTES, -(-end // BLOCK_BYTES)) if end > begin else ())


def extent_of(block: int, image_bytes: int) -> tuple[int, int]:
    """First byte of a block, and first byte past it."""
    return block * BLOCK_BYTES, min((block + 1) * BLOCK_BYTES, image_bytes)


def check_block(what: str, block: int, data: memoryview | bytes, digests: bytes) -> None:
    """Raise ChecksumMismatch if `data` is not what block number `block` was when its image was sealed."""
    if block_digest(data) != digests[block * DIGEST_BYTES : (block + 1) * DIGEST_BYTES]:
        msg = f"{what}: block {block} (bytes {block * BLOCK_BYTES} to {block * BLOCK_BYTES + len(data)}) does not match its checksum"
        raise ChecksumMismatch(msg)
