"""`ckptd inspect`: what a checkpoint or a single image holds, from manifest, index and headers; tensor bytes are not read."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Any

from ckptd.cli import foreign, show
from ckptd.core import typed
from ckptd.core.image import Entry, Image, header_bytes_of, parse
from ckptd.core.manifest import Index, Manifest, TensorInfo
from ckptd.errors import BadArgument, NotFound
from ckptd.storage.checkpoint import read_checkpoint

RANKS_SHOWN = 64
BOXES_SHOWN = 8
VALUE_CHARS = 120


def add_parser(verbs: Any) -> None:
    """The verb's arguments."""
    p = verbs.add_parser(
        "inspect",
        help="what a checkpoint of any format, or an image, holds",
        description="Show what one checkpoint (a step's directory) or one image file holds: job, step, world size and coordinates,\n"
        "tensors, dtypes and sizes. Checksums of tensor bytes are `ckptd verify`'s business.\n"
        "A checkpoint of another system is shown as ckptd understands it: a tree of tensors under canonical names, param groups, objects.",
        epilog="examples:\n  ckptd inspect /mnt/ckpt/llama/step-00001200 --tensors 'model.layers.0.*'\n"
        "  ckptd inspect /mnt/ckpt/llama/step-00001200/images/r00000.safetensors --objects\n"
        "  ckptd inspect /ckpt/zero3 --tag global_step100 --depth 4",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("path", metavar="PATH", help="a step's directory, or an image (.safetensors); or a checkpoint of another system")
    p.add_argument("--json", action="store_true", help="print one JSON document")
    p.add_argument(
        "--tensors",
        metavar="PATTERN",
        nargs="?",
        const="*",
        help="list the tensors whose name matches (shell wildcards; default: all)",
    )
    p.add_argument("--objects", action="store_true", help="show the objects of each rank: schedulers, RNG, counters ...")
    p.add_argument("--depth", type=int, default=3, metavar="N", help="other systems: depth of the tree (default %(default)s)")
    foreign.add_reading(p)
    p.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Show an image or a checkpoint."""
    if foreign.recognised(args.path):
        from ckptd.cli import tree

        return tree.run(args)
    place = show.open_place(args.path)
    if place.image:
        image = _read_image(place)
        entries = [e for e in image.entries if args.tensors is None or fnmatchcase(e.piece.name, args.tensors)]
        _check_some(args.tensors, [e.piece.name for e in entries])
        if args.json:
            show.emit_json(_image_document(place, image, entries, objects=args.objects))
        else:
            show.emit("\n".join(_image_lines(place, image, entries, objects=args.objects)))
        return 0
    if place.directory is None:
        msg = f"{place.label} is not one checkpoint"
        raise BadArgument(msg, remedy=f"give a step's directory, or an image; `ckptd ls {place.label}` lists them")
    manifest, index = _read_checkpoint(place, place.directory)
    names = sorted(n for n in index.tensors if args.tensors is not None and fnmatchcase(n, args.tensors))
    _check_some(args.tensors, names)
    if args.json:
        show.emit_json(_document(place, manifest, index, names if args.tensors is not None else None, objects=args.objects))
    else:
        show.emit("\n".join(_lines(place, manifest, index, names, objects=args.objects)))
    return 0


def _check_some(pattern: str | None, names: list[str]) -> None:
    if pattern not in {None, "*"} and not names:
        msg = f"no tensor matches {pattern!r}"
        raise NotFound(msg, remedy="--tensors alone lists all; * and ? match anything, also dots")


# --- a checkpoint -----------------------------------------------------------------------------------------------------------


def _read_checkpoint(place: show.Place, directory: str) -> tuple[Manifest, Index]:
    try:
        return read_checkpoint(place.store, directory)
    except NotFound as e:
        msg = f"{place.label} has no manifest: it is unfinished, and no checkpoint yet"
        raise NotFound(msg, remedy="give one of its images (images/r00000.safetensors) to see what is there") from e


def _lines(place: show.Place, manifest: Manifest, index: Index, names: list[str], *, objects: bool) -> Iterator[str]:
    image_bytes = sum(i.image_bytes for i in index.images.values())
    header_bytes = sum(i.header_bytes for i in index.images.values())
    yield show.plain(place.label)
    yield f"  job         {show.plain(manifest.job)}"
    yield f"  step        {manifest.step}, attempt {manifest.attempt}"
    yield f"  created     {show.utc(manifest.created_unix_s)}"
    yield f"  world size  {manifest.world_size}"
    yield f"  tensors     {show.count(len(index.tensors))} in {show.count(sum(map(len, index.rows.values())))} boxes"
    yield f"  bytes       {show.count(image_bytes)} ({show.size(image_bytes)}) in images, {show.count(header_bytes)} of them headers; index {show.count(manifest.index.bytes)}"
    yield ""
    yield show.table(
        ("DTYPE", "TENSORS", "BYTES", "SIZE"),
        ([d, show.count(n), show.count(b), show.size(b)] for d, n, b in _histogram(index)),
        right=("TENSORS", "BYTES", "SIZE"),
    )
    yield ""
    yield show.table(
        ("RANK", "BYTES", "OBJECTS", "COORDS"),
        (
            [str(r), show.count(i.image_bytes), show.count(len(i.objects)), _coords(i.coords)]
            for r, i in sorted(index.images.items())[:RANKS_SHOWN]
        ),
        right=("RANK", "BYTES", "OBJECTS"),
    )
    if len(index.images) > RANKS_SHOWN:
        yield f"... and {show.count(len(index.images) - RANKS_SHOWN)} more ranks: --json lists all"
    if names:
        yield ""
        yield show.table(
            ("TENSOR", "DTYPE", "SHAPE", "BOXES (image: box)"),
            [[n, _dtype(index.tensors[n]), str(list(index.tensors[n].shape)), _boxes(index, n)] for n in names],
        )
        shown = set(names)
        for alias, name in sorted(index.aliases.items()):
            if name in shown:
                yield f"{show.plain(alias)} is the same tensor as {show.plain(name)}"
    if objects:
        for rank, info in sorted(index.images.items()):
            yield ""
            yield from _object_lines(rank, info.coords, info.objects)


def _document(place: show.Place, manifest: Manifest, index: Index, names: list[str] | None, *, objects: bool) -> dict[str, Any]:
    document: dict[str, Any] = {
        "path": place.label,
        "store": str(place.store),
        "directory": place.directory,
        "job": manifest.job,
        "step": manifest.step,
        "attempt": manifest.attempt,
        "world_size": manifest.world_size,
        "created_unix_s": manifest.created_unix_s,
        "created": show.utc(manifest.created_unix_s),
        "bytes": sum(i.image_bytes for i in index.images.values()),
        "index_bytes": manifest.index.bytes,
        "tensor_count": len(index.tensors),
        "dtypes": {d: {"tensors": n, "bytes": b} for d, n, b in _histogram(index)},
        "aliases": index.aliases,
        "images": [
            {"rank": r, "bytes": i.image_bytes, "header_bytes": i.header_bytes, "coords": i.coords, "objects": sorted(i.objects)}
            for r, i in sorted(index.images.items())
        ],
    }
    if names is not None:
        document["tensors"] = [
            {
                "name": n,
                "dtype": index.tensors[n].dtype,
                "view": index.tensors[n].view,
                "shape": index.tensors[n].shape,
                "boxes": [
                    {"image": r.image, "start": r.box.start, "extent": r.box.extent, "begin": r.begin, "end": r.end}
                    for r in index.rows[n]
                ],
            }
            for n in names
        ]
    if objects:
        document["objects"] = {str(r): _checked(i.objects) for r, i in sorted(index.images.items())}
    return document


def _histogram(index: Index) -> list[tuple[str, int, int]]:
    """(dtype, tensors, bytes), the most bytes first. Tensors stored as bytes count as what they are."""
    totals: dict[str, tuple[int, int]] = {}
    for name, info in index.tensors.items():
        tensors, size = totals.get(_dtype(info), (0, 0))
        totals[_dtype(info)] = tensors + 1, size + sum(r.end - r.begin for r in index.rows[name])
    return sorted(((d, n, b) for d, (n, b) in totals.items()), key=lambda t: (-t[2], t[0]))


def _dtype(info: TensorInfo) -> str:
    return f"{info.view} as {info.dtype}" if info.view else info.dtype


def _boxes(index: Index, name: str) -> str:
    return show.some([f"{r.image}: {r.box}" for r in index.rows[name]], BOXES_SHOWN)


def _coords(coords: Mapping[str, int]) -> str:
    return " ".join(f"{axis}={at}" for axis, at in coords.items()) or "-"


# --- an image ---------------------------------------------------------------------------------------------------------------


def _read_image(place: show.Place) -> Image:
    image_bytes = place.store.stat(place.image).bytes
    head = bytearray(min(8, image_bytes))
    place.store.get(place.image, 0, memoryview(head))
    header = bytearray(header_bytes_of(bytes(head), image_bytes))
    place.store.get(place.image, 0, memoryview(header))
    return parse(memoryview(header), image_bytes)


def _image_lines(place: show.Place, image: Image, entries: list[Entry], *, objects: bool) -> Iterator[str]:
    meta = image.meta
    yield show.plain(place.label)
    yield f"  job         {show.plain(meta.job)}"
    yield f"  step        {meta.step}, attempt {meta.attempt}"
    yield f"  rank        {meta.rank} of {meta.world_size}"
    yield f"  coords      {show.plain(_coords(meta.coords))}"
    yield f"  format      {meta.format}"
    yield f"  header      {show.count(image.header_bytes)} bytes; {show.count(len(meta.objects), 'object')}, {show.count(len(meta.aliases))} tied names"
    yield f"  bytes       {show.count(image.image_bytes)} ({show.size(image.image_bytes)}) in {show.count(len(image.entries))} entries"
    yield ""
    yield show.table(
        ("KEY", "DTYPE", "SHAPE", "BOX", "OF SHAPE", "BEGIN", "END"),
        [
            [
                e.key,
                f"{e.piece.view} as {e.piece.dtype}" if e.piece.view else e.piece.dtype,
                str(list(e.piece.box.extent)),
                str(e.piece.box),
                str(list(e.piece.shape)),
                str(image.header_bytes + e.begin),
                str(image.header_bytes + e.end),
            ]
            for e in entries
        ],
        right=("BEGIN", "END"),
    )
    if objects:
        yield ""
        yield from _object_lines(meta.rank, meta.coords, meta.objects)


def _image_document(place: show.Place, image: Image, entries: list[Entry], *, objects: bool) -> dict[str, Any]:
    meta = image.meta
    document: dict[str, Any] = {
        "path": place.label,
        "format": meta.format,
        "job": meta.job,
        "step": meta.step,
        "attempt": meta.attempt,
        "rank": meta.rank,
        "world_size": meta.world_size,
        "coords": meta.coords,
        "aliases": meta.aliases,
        "bytes": image.image_bytes,
        "header_bytes": image.header_bytes,
        "entries": [
            {
                "key": e.key,
                "name": e.piece.name,
                "dtype": e.piece.dtype,
                "view": e.piece.view,
                "shape": e.piece.shape,
                "start": e.piece.box.start,
                "extent": e.piece.box.extent,
                "begin": image.header_bytes + e.begin,
                "end": image.header_bytes + e.end,
            }
            for e in entries
        ],
    }
    if objects:
        document["objects"] = _checked(meta.objects)
    return document


# --- objects ----------------------------------------------------------------------------------------------------------------


class Reference:
    """An array of an object: its bytes lie in the image, under a key."""

    def __init__(self, kind: str, key: str) -> None:
        self._text = f"<{kind} {key}>"

    def __repr__(self) -> str:
        return self._text


def _checked(objects: dict[str, Any]) -> dict[str, Any]:
    """The typed JSON itself, once it is known to be of our making. Raises BadImage."""
    typed.decode(objects, Reference)
    return objects


def _object_lines(rank: int, coords: Mapping[str, int], objects: dict[str, Any]) -> Iterator[str]:
    yield show.plain(f"objects of rank {rank} ({_coords(coords)}){'' if objects else ': none'}")
    for path, value in _leaves(typed.decode(objects, Reference), ""):
        text = repr(value)
        cut = f"{text[:VALUE_CHARS]}... ({show.count(len(text))} characters)" if len(text) > VALUE_CHARS else text
        yield show.plain(f"  {path} = {cut}")


def _leaves(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Plain dicts are walked, everything else is a value."""
    if type(value) is dict and value:
        for key, item in value.items():
            name = key if isinstance(key, str) else f"[{key!r}]"
            yield from _leaves(item, f"{path}.{name}" if path else name)
    else:
        yield path, value
