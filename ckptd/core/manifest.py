"""Index and manifest: what turns a set of images into a checkpoint.

The *index* says which box of which tensor lies where in which image, carries the block checksums and the objects of every image.
It is built from parsed images, in memory as well as on disk, and constructing one proves that the boxes tile every tensor.
On disk it is columnar msgpack in a zstd frame. The *manifest* is small JSON, written last: it names the images and the index,
with the index's sha256, and ends with the sha256 of itself. No manifest, no checkpoint.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice, pairwise
from typing import Any

import msgspec
import zstandard

from ckptd.core import checksum as sums  # `checksum` is a field of the manifest
from ckptd.core.boxes import Box, Shape, prove_tiles
from ckptd.core.image import ITEM_BYTES, Image
from ckptd.errors import BadManifest, ChecksumMismatch, NewerFormat, NotTiled

MANIFEST_NAME = "manifest.json"
INDEX_NAME = "index.msgpack.zst"
FORMAT = "ckptd-manifest"
VERSION = 1
_INT_MAX = 2**63 - 1
INDEX_BYTES_MAX = 4 << 30
"""An index of 40 million boxes; the frame's declared size is checked against it before anything is allocated."""


def image_name(rank: int) -> str:
    """Where a rank's image lies below the step's directory."""
    return f"images/r{rank:05}.safetensors"


class TensorInfo(msgspec.Struct, frozen=True, gc=False):
    """A logical tensor: stored dtype, global shape, and what it is if stored as bytes (`view`)."""

    dtype: str
    shape: Shape
    view: str = ""


class Row(msgspec.Struct, frozen=True, gc=False):
    """A box of a tensor and its place: bytes [begin, end) from the start of the file of image `image`."""

    image: int
    box: Box
    begin: int
    end: int


class ImageInfo(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An image as the index knows it. `digests`: 16 bytes per block (`core.checksum`)."""

    rank: int
    image_bytes: int
    header_bytes: int
    digests: bytes
    coords: dict[str, int]
    aliases: dict[str, str]
    objects: dict[str, Any]


@dataclass(frozen=True)
class Index:
    """Tensors, rows and images of one step. Constructing it proves coverage: raises NotTiled or BadManifest."""

    job: str
    attempt: int
    step: int
    world_size: int
    images: Mapping[int, ImageInfo]
    tensors: Mapping[str, TensorInfo]
    rows: Mapping[str, tuple[Row, ...]]
    aliases: Mapping[str, str] = field(init=False)

    def __post_init__(self) -> None:
        self._check_images()
        for name, info in self.tensors.items():
            self._prove_rows(name, info)
        self._prove_places()
        object.__setattr__(self, "aliases", {a: n for i in self.images.values() for a, n in i.aliases.items()})

    def _check_images(self) -> None:
        if min(self.attempt, self.step) < 0 or self.world_size < 1:
            msg = f"impossible attempt {self.attempt}, step {self.step} or world size {self.world_size}"
            raise BadManifest(msg)
        if len(self.images) != self.world_size or not _are_ranks(sorted(self.images)):  # a lying world size costs nothing
            missing = list(islice((r for r in range(self.world_size) if r not in self.images), 8))
            msg = f"step {self.step}: {len(self.images)} images for {self.world_size} ranks; the first that are missing: {missing}"
            raise BadManifest(msg)
        for rank, image in self.images.items():
            if image.rank != rank or not 0 <= image.header_bytes <= image.image_bytes:
                msg = f"image {rank}: impossible rank {image.rank}, header of {image.header_bytes} or size of {image.image_bytes} bytes"
                raise BadManifest(msg)

    def _prove_rows(self, name: str, info: TensorInfo) -> None:
        rows = self.rows.get(name, ())
        if not rows:
            msg = f"{name}: no image holds it"
            raise NotTiled(msg)
        prove_tiles(name, info.shape, (r.box for r in rows))
        for row in rows:
            held = self.images.get(row.image)
            if held is None or not held.header_bytes <= row.begin <= row.end <= held.image_bytes:
                msg = f"{name}: bytes {row.begin} to {row.end} do not lie in image {row.image}"
                raise BadManifest(msg)
            if row.end - row.begin != row.box.numel * ITEM_BYTES[info.dtype]:
                msg = f"{name}: {row.box} of {info.dtype} does not fill bytes {row.begin} to {row.end}"
                raise BadManifest(msg)

    def _prove_places(self) -> None:
        """No byte of an image belongs to two rows: boxes that tile a tensor must not share what fills them."""
        places: dict[int, list[tuple[int, int, str]]] = {}
        for name, rows in self.rows.items():
            for row in rows:
                if row.begin != row.end:
                    places.setdefault(row.image, []).append((row.begin, row.end, name))
        for rank, held_places in places.items():
            for (_, end, one), (begin, _, other) in pairwise(sorted(held_places)):
                if begin < end:
                    msg = f"image {rank}: {one} and {other} share bytes {begin} to {end}"
                    raise BadManifest(msg)


def _are_ranks(ranks: Sequence[int]) -> bool:
    return all(a == b for a, b in enumerate(ranks))


def build_index(images: Mapping[int, Image], digests: Mapping[int, bytes]) -> Index:
    """The index of a step from its parsed images and their checksums, by rank. Raises NotTiled, BadManifest."""
    if not images:
        msg = "a step needs at least one image"
        raise BadManifest(msg)
    first = next(iter(images.values())).meta
    tensors: dict[str, TensorInfo] = {}
    rows: dict[str, list[Row]] = {}
    for rank, image in sorted(images.items()):
        meta = image.meta
        if (meta.job, meta.attempt, meta.step, meta.world_size) != (first.job, first.attempt, first.step, first.world_size):
            msg = f"image {rank} is of {_of(meta.job, meta.attempt, meta.step)}, others are of {_of(first.job, first.attempt, first.step)}"
            raise BadManifest(msg)
        if meta.rank != rank:
            msg = f"the image of rank {rank} says that it is rank {meta.rank}'s"
            raise BadManifest(msg)
        if len(digests[rank]) != sums.block_count(image.image_bytes) * sums.DIGEST_BYTES:
            msg = f"image {rank}: {len(digests[rank])} bytes of checksums for {image.image_bytes} bytes"
            raise BadManifest(msg)
        for entry in image.entries:
            p = entry.piece
            info = TensorInfo(p.dtype, p.shape, p.view)
            if tensors.setdefault(p.name, info) != info:
                msg = f"{p.name}: image {rank} says {info}, another image says {tensors[p.name]}"
                raise BadManifest(msg)
            rows.setdefault(p.name, []).append(Row(rank, p.box, image.header_bytes + entry.begin, image.header_bytes + entry.end))
    infos = {
        r: ImageInfo(r, i.image_bytes, i.header_bytes, digests[r], i.meta.coords, i.meta.aliases, i.meta.objects)
        for r, i in images.items()
    }
    return Index(first.job, first.attempt, first.step, first.world_size, infos, tensors, {n: tuple(r) for n, r in rows.items()})


def _of(job: str, attempt: int, step: int) -> str:
    return f"job {job!r} attempt {attempt} step {step}"


class _IndexFile(msgspec.Struct, array_like=False, forbid_unknown_fields=True):
    """Columns; `starts` and `extents` are the boxes' numbers, one box after the other."""

    version: int
    job: str
    attempt: int
    step: int
    world_size: int
    block_bytes: int
    images: list[ImageInfo]
    names: list[str]
    dtypes: list[str]
    views: list[str]
    shapes: list[list[int]]
    tensor: list[int]
    image: list[int]
    begin: list[int]
    end: list[int]
    starts: list[int]
    extents: list[int]


def encode_index(index: Index) -> bytes:
    """The index as bytes. It is decoded again before it is returned."""
    names = sorted(index.tensors)
    flat = [(i, row) for i, name in enumerate(names) for row in index.rows[name]]
    infos = [index.tensors[n] for n in names]
    packed = msgspec.msgpack.encode(
        _IndexFile(
            version=VERSION, job=index.job, attempt=index.attempt, step=index.step, world_size=index.world_size,
            block_bytes=sums.BLOCK_BYTES, images=[index.images[r] for r in sorted(index.images)],
            names=names, dtypes=[i.dtype for i in infos], views=[i.view for i in infos], shapes=[list(i.shape) for i in infos],
            tensor=[i for i, _ in flat], image=[r.image for _, r in flat],
            begin=[r.begin for _, r in flat], end=[r.end for _, r in flat],
            starts=[n for _, r in flat for n in r.box.start], extents=[n for _, r in flat for n in r.box.extent],
        )
    )  # fmt: skip
    data = zstandard.ZstdCompressor(level=3, write_checksum=True, write_content_size=True).compress(packed)
    decode_index(data)
    return data


def decode_index(data: bytes) -> Index:
    """Parse and prove an index. Raises BadManifest, NewerFormat, NotTiled."""
    try:
        raw_bytes = zstandard.frame_content_size(data)
        if not 0 <= raw_bytes <= INDEX_BYTES_MAX:
            msg = f"index: declares {raw_bytes} bytes, at most {INDEX_BYTES_MAX} are read"
            raise BadManifest(msg)
        packed = zstandard.ZstdDecompressor().decompress(data, max_output_size=raw_bytes, allow_extra_data=False)
        peek = msgspec.msgpack.decode(packed, type=dict[str, Any]).get("version")
        if isinstance(peek, int) and peek > VERSION:
            msg = f"index version {peek} is newer than this ckptd's {VERSION}"
            raise NewerFormat(msg, remedy="upgrade ckptd")
        file = msgspec.msgpack.decode(packed, type=_IndexFile)
    except (zstandard.ZstdError, msgspec.MsgspecError, ValueError, RecursionError, MemoryError) as e:
        msg = f"index: {e}"
        raise BadManifest(msg) from e
    try:
        return _index_of(file)
    except (IndexError, ValueError, KeyError, TypeError) as e:
        msg = f"index: its columns do not fit together: {e}"
        raise BadManifest(msg) from e


def _index_of(file: _IndexFile) -> Index:
    if file.version < 1:
        msg = f"index: impossible version {file.version}"
        raise BadManifest(msg)
    if file.block_bytes != sums.BLOCK_BYTES:
        msg = f"index: checksum blocks of {file.block_bytes} bytes are not known"
        raise BadManifest(msg)
    images = {i.rank: i for i in file.images}
    for info in images.values():
        if len(info.digests) != sums.block_count(info.image_bytes) * sums.DIGEST_BYTES:
            msg = f"index: image {info.rank} has {len(info.digests)} bytes of checksums for {info.image_bytes} bytes"
            raise BadManifest(msg)
    if len(images) != len(file.images) or not len(file.names) == len(set(file.names)) == len(file.dtypes) == len(file.shapes):
        msg = "index: a rank or a tensor stands twice, or columns differ in length"
        raise BadManifest(msg)
    if any(d not in ITEM_BYTES for d in file.dtypes) or any(n < 0 for s in file.shapes for n in s):
        msg = "index: unknown dtype or negative shape"
        raise BadManifest(msg)
    tensors = {
        n: TensorInfo(d, tuple(s), v) for n, d, s, v in zip(file.names, file.dtypes, file.shapes, file.views, strict=True)
    }
    rows: dict[str, list[Row]] = {n: [] for n in file.names}
    at = 0
    for t, image, begin, end in zip(file.tensor, file.image, file.begin, file.end, strict=True):
        if t < 0:
            msg = f"negative tensor number {t}"
            raise IndexError(msg)
        name = file.names[t]
        dims = len(file.shapes[t])
        box = Box(tuple(file.starts[at : at + dims]), tuple(file.extents[at : at + dims]))
        rows[name].append(Row(image, box, begin, end))
        at += dims
    if at != len(file.starts) or at != len(file.extents):
        msg = "left-over box coordinates"
        raise ValueError(msg)
    return Index(
        file.job, file.attempt, file.step, file.world_size, images, tensors, {n: tuple(r) for n, r in rows.items()}
    )


class ImageFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An image as the manifest names it."""

    rank: int
    name: str
    bytes: int


class IndexFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The index as the manifest names it."""

    name: str
    bytes: int
    sha256: str


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The file that makes images a checkpoint. `created_unix_s` is for people; nothing is decided by it."""

    job: str
    attempt: int
    step: int
    world_size: int
    images: list[ImageFile]
    index: IndexFile
    created_unix_s: float
    format: str
    version: int
    block_bytes: int
    checksum: str

    def __post_init__(self) -> None:
        ranks, names = [i.rank for i in self.images], [i.name for i in self.images]
        if len(ranks) != self.world_size or not _are_ranks(ranks) or names != [image_name(r) for r in ranks]:
            msg = f"manifest: images {names[:4]}... are not those of {self.world_size} ranks in order"
            raise ValueError(msg)
        numbers = (self.attempt, self.step, self.index.bytes, *(i.bytes for i in self.images))
        if min(numbers) < 0 or max(numbers) > _INT_MAX or min(self.world_size, self.version) < 1:
            msg = "manifest: a negative number, or one of more than 63 bits"
            raise ValueError(msg)
        if self.format != FORMAT or self.index.name != INDEX_NAME:
            msg = f"manifest: format {self.format!r} with index {self.index.name!r}"
            raise ValueError(msg)
        if self.checksum != sums.ALGORITHM or self.block_bytes != sums.BLOCK_BYTES:
            msg = f"manifest: checksum {self.checksum} over {self.block_bytes} bytes is not known"
            raise ValueError(msg)


def make_manifest(index: Index, index_bytes: bytes, *, created_unix_s: float) -> Manifest:
    """The manifest of an index whose encoded form is `index_bytes`."""
    images = [ImageFile(r, image_name(r), index.images[r].image_bytes) for r in range(index.world_size)]
    digest = hashlib.sha256(index_bytes).hexdigest()
    return Manifest(
        index.job, index.attempt, index.step, index.world_size, images, IndexFile(INDEX_NAME, len(index_bytes), digest), created_unix_s,
        FORMAT, VERSION, sums.BLOCK_BYTES, sums.ALGORITHM,
    )  # fmt: skip


def encode_manifest(manifest: Manifest) -> bytes:
    """The manifest as JSON text that ends with its own sha256. It is decoded again before it is returned."""
    body = msgspec.to_builtins(manifest)
    data = json.dumps({**body, "sha256": _seal(body)}, indent=1).encode() + b"\n"
    if decode_manifest(data) != manifest:
        msg = "the manifest does not read back as it was written"
        raise BadManifest(msg)
    return data


def decode_manifest(data: bytes) -> Manifest:
    """Parse and check a manifest. Raises BadManifest, NewerFormat, ChecksumMismatch."""
    try:
        body = msgspec.json.decode(data, type=dict[str, Any])
        version = body.get("version")
        if body.get("format") == FORMAT and isinstance(version, int) and version > VERSION:
            msg = f"manifest version {version} is newer than this ckptd's {VERSION}"
            raise NewerFormat(msg, remedy="upgrade ckptd")
        seal = body.pop("sha256", None)
        manifest = msgspec.convert(body, Manifest)
    except (msgspec.MsgspecError, ValueError, RecursionError) as e:
        msg = f"manifest: {e}"
        raise BadManifest(msg) from e
    if seal != _seal(body):
        msg = "manifest: its sha256 does not match"
        raise ChecksumMismatch(msg)
    return manifest


def check_index_bytes(manifest: Manifest, data: bytes) -> None:
    """Raise ChecksumMismatch unless `data` is the index that the manifest names."""
    if len(data) != manifest.index.bytes or hashlib.sha256(data).hexdigest() != manifest.index.sha256:
        msg = f"index: {len(data)} bytes do not match the manifest's size and sha256"
        raise ChecksumMismatch(msg)


def check_agreement(manifest: Manifest, index: Index) -> None:
    """Raise BadManifest unless manifest and index speak of the same step and images."""
    mine = (manifest.job, manifest.attempt, manifest.step, manifest.world_size, [i.bytes for i in manifest.images])
    sizes = [index.images[r].image_bytes for r in sorted(index.images)]
    theirs = (index.job, index.attempt, index.step, index.world_size, sizes)
    if mine != theirs:
        msg = f"manifest and index disagree: {mine[:4]} and {theirs[:4]}, or the images' sizes"
        raise BadManifest(msg)


def check_rows(index: Index, rank: int, image: Image) -> None:
    """Raise BadManifest unless the index says of image `rank` exactly what the image's own header says."""
    said = {(n, r.box, r.begin, r.end) for n, rows in index.rows.items() for r in rows if r.image == rank}
    held = {(e.piece.name, e.piece.box, image.header_bytes + e.begin, image.header_bytes + e.end) for e in image.entries}
    info = index.images[rank]
    sizes = (info.header_bytes, info.image_bytes) == (image.header_bytes, image.image_bytes)
    if said != held or not sizes:
        wrong = sorted({n for n, *_ in said ^ held})[:4]
        msg = f"image {rank}: index and header disagree about {wrong or 'the sizes'}"
        raise BadManifest(msg)
    if (info.coords, info.aliases, info.objects) != (image.meta.coords, image.meta.aliases, image.meta.objects):
        msg = f"image {rank}: index and header disagree about coordinates, aliases or objects"
        raise BadManifest(msg)
    if (image.meta.job, image.meta.attempt, image.meta.step, image.meta.rank) != (index.job, index.attempt, index.step, rank):
        msg = f"image {rank}: its header is of another job, attempt, step or rank"
        raise BadManifest(msg)
    for entry in image.entries:
        p = entry.piece
        if index.tensors[p.name] != TensorInfo(p.dtype, p.shape, p.view):
            msg = f"image {rank}: index and header disagree about the dtype or shape of {p.name}"
            raise BadManifest(msg)


def _seal(body: Mapping[str, Any]) -> str:
    canonical = json.dumps(body, sort_keys=True, separators=(",", ":")).encode()
    return hashlib.sha256(canonical).hexdigest()


def names_missing(index: Index, wanted: Iterable[str]) -> list[str]:
    """Wanted names that the index does not have, sorted."""
    return sorted(set(wanted) - set(index.tensors))
