"""Small real checkpoints, and stores that fail on demand."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ckptd.core.boxes import Box
from ckptd.core.checksum import digests_of
from ckptd.core.image import ITEM_BYTES, Piece, lay_out, parse
from ckptd.core.manifest import Index, Manifest, build_index
from ckptd.storage import checkpoint
from ckptd.storage.memory import MemoryStore


@dataclass(frozen=True)
class Step:
    """The sealed images of one step, ready to be committed."""

    job: str
    attempt: int
    step: int
    images: dict[int, bytes]
    digests: dict[int, bytes]
    index: Index


def make_step(job="job", attempt=1, step=7, *, world_size=2, rows=8, seed=0) -> Step:
    """`world_size` images that each hold some rows of a matrix; rank 0 also holds a vector and a scalar."""
    random = np.random.default_rng(seed)
    images = {}
    for rank in range(world_size):
        shape = (rows * world_size, 16)
        pieces = [Piece("model.w", "F32", shape, Box((rank * rows, 0), (rows, 16)))]
        if rank == 0:
            pieces += [Piece("model.b", "BF16", (5,), Box.whole((5,))), Piece("optim.step", "I64", (), Box((), ()))]
        layout = lay_out(pieces, job=job, rank=rank, world_size=world_size, coords={"dp": rank}, aliases={}, objects_bytes=64)
        header = layout.render(attempt=attempt, step=step, objects={"lr": 0.1, "rank": rank})
        images[rank] = header + random.bytes(sum(p.box.numel * ITEM_BYTES[p.dtype] for p in pieces))
    digests = {r: digests_of(i) for r, i in images.items()}
    index = build_index({r: parse(i, len(i)) for r, i in images.items()}, digests)
    return Step(job, attempt, step, images, digests, index)


def commit(store, made: Step, directory: str | None = None, created_unix_s: float = 1000.0) -> tuple[str, Manifest]:
    """The whole protocol, as a coordinator and its ranks run it."""
    directory = directory or checkpoint.pick_directory(store, made.job, made.step, made.attempt)
    for rank, image in made.images.items():
        checkpoint.write_image(store, directory, rank, memoryview(image), made.digests[rank])
    return directory, checkpoint.write_manifest(store, directory, made.index, created_unix_s)


def copy_of(store: MemoryStore) -> MemoryStore:
    """A memory store with the same objects."""
    copy = MemoryStore()
    for stat in store.list(""):
        copy.put(stat.name, read(store, stat.name))
    return copy


def read(store, name: str) -> bytes:
    """All bytes of an object."""
    data = bytearray(store.stat(name).bytes)
    store.get(name, 0, memoryview(data))
    return bytes(data)


class Crash(BaseException):
    """The process is gone; nobody catches this."""


class CrashingStore:
    """Dies at operation number `at`. `how`: "before" it, "after" it, or, of a put, "torn": half of the bytes lie there."""

    def __init__(self, inner, at: int, how: str) -> None:
        self._inner, self._at, self._how = inner, at, how
        self.operations = 0

    def _run(self, operation, torn=lambda: None):
        self.operations += 1
        if self.operations - 1 != self._at:
            return operation()
        if self._how == "torn":
            torn()
        try:
            if self._how == "after":
                operation()
        finally:
            raise Crash

    def put(self, name, data, *, exclusive=False):
        whole = bytes(data)
        self._run(lambda: self._inner.put(name, data, exclusive=exclusive), lambda: self._inner.put(name, whole[: len(whole) // 2]))

    def get(self, name, begin, into):
        self._run(lambda: self._inner.get(name, begin, into))

    def list(self, prefix):
        return self._run(lambda: self._inner.list(prefix))

    def delete(self, name):
        self._run(lambda: self._inner.delete(name))

    def stat(self, name):
        return self._run(lambda: self._inner.stat(name))
