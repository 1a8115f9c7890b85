"""Persisting, as the daemon's pool does it: images and manifest into the durable tier, each read back; and what retention deletes after them."""

from __future__ import annotations

from ckptd.core.manifest import build_index
from ckptd.core.retention import Retention
from ckptd.errors import NotFound
from ckptd.storage import checkpoint, open_store


def write_images(url: str, job: str, step: int, attempt: int, held: dict[int, tuple[memoryview, bytes]]) -> None:
    """This node's images into the durable tier, each read back."""
    store = open_store(url)
    directory = checkpoint.pick_directory(store, job, step, attempt)
    for rank, (image, digests) in held.items():
        checkpoint.write_image(store, directory, rank, image, digests)


def write_manifest(
    url: str, job: str, step: int, attempt: int, world_size: int, digests: dict[int, bytes], created_unix_s: float
) -> str:
    """Index and manifest, from the headers as the tier gives them back. Returns the directory."""
    store = open_store(url)
    directory = checkpoint.pick_directory(store, job, step, attempt)
    missing = sorted(set(range(world_size)) - set(digests))
    if missing:
        msg = f"no checksums of ranks {missing}"
        raise NotFound(msg)
    images = {rank: checkpoint.read_header(store, directory, rank) for rank in range(world_size)}
    checkpoint.write_manifest(store, directory, build_index(images, digests), created_unix_s)
    return directory


def retain(url: str, job: str, retention: Retention, newest: str) -> None:
    """Delete what the policy lets go; never the newest."""
    checkpoint.apply_retention(open_store(url), job, retention, {newest})
