"""`ckptd inspect` of another system's checkpoint: what its headers and pickles say, under canonical names. Tensor bytes are not read."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from ckptd.cli import foreign, show
from ckptd.core.logical import FILL, GROUPS, LITERAL, Checkpoint, Row, Tensor
from ckptd.errors import BadArgument, NotFound
from ckptd.formats import Place
from ckptd.reading import open_checkpoint

BOXES_SHOWN = 6
FILES_SHOWN = 16
CHILDREN_SHOWN = 40


def run(args: argparse.Namespace) -> int:
    """Show it."""
    if args.depth < 1:
        msg = f"--depth {args.depth}: at least 1"
        raise BadArgument(msg)
    place, found, checkpoint = open_checkpoint(args.path, foreign.read_options(args))
    names = [n for n in checkpoint.tensors if args.tensors is not None and fnmatchcase(n, args.tensors)]
    if args.tensors not in {None, "*"} and not names:
        msg = f"no tensor matches {args.tensors!r}"
        raise NotFound(msg, remedy="--tensors alone lists all; * and ? match anything, also dots")
    if args.json:
        show.emit_json(_document(place, found.title, checkpoint, names if args.tensors is not None else [*checkpoint.tensors], objects=args.objects))
    else:
        show.emit("\n".join(_lines(place, found.title, checkpoint, names, args)))
    return 0


def _lines(place: Place, title: str, checkpoint: Checkpoint, names: list[str], args: argparse.Namespace) -> Iterator[str]:
    boxes = sum(len(t.rows) for t in checkpoint.tensors.values())
    again = sum(len(t.replicas) for t in checkpoint.tensors.values())
    file_bytes = sum(h.bytes for h in checkpoint.files)
    yield show.plain(place.label)
    yield f"  format      {checkpoint.format}: {title}"
    if "step" in checkpoint.objects:
        yield f"  step        {foreign.text_of(checkpoint.objects['step'])}"
    yield f"  tensors     {show.count(len(checkpoint.tensors))} in {show.count(boxes, 'row')}" + (f", {show.count(again)} more repeat them" if again else "")
    yield f"  bytes       {show.count(checkpoint.nbytes)} ({show.size(checkpoint.nbytes)}) of tensors, in {show.count(len(checkpoint.files), 'file')} of {show.size(file_bytes)}"
    groups = checkpoint.objects.get(GROUPS)
    if groups is not None:
        yield f"  optimizer   {show.count(len(groups), 'param group')}"
        yield from foreign.group_lines(checkpoint)
    for note in checkpoint.notes:
        yield f"  note        {show.plain(note)}"
    yield ""
    if args.tensors is not None:
        header = ("TENSOR", "DTYPE", "SHAPE", "SIZE", "ROWS (file: box)")
        yield show.table(
            header, ([n, t.dtype, str(list(t.shape)), show.size(t.nbytes), _rows(checkpoint, t)] for n in names if (t := checkpoint.tensors[n])), right=("SIZE",)
        )
    else:
        yield show.table(("TENSORS", "COUNT", "SIZE", "DTYPES", "SHAPE"), _tree(checkpoint, args.depth), right=("COUNT", "SIZE"))
    yield from (show.plain(f"{a} is the same tensor as {n}") for a, n in sorted(checkpoint.aliases.items()))
    if args.tensors is None:
        yield ""
        yield show.table(("FILE", "SIZE"), ([h.name, show.size(h.bytes)] for h in checkpoint.files[:FILES_SHOWN]), right=("SIZE",))
        if len(checkpoint.files) > FILES_SHOWN:
            yield f"... and {show.count(len(checkpoint.files) - FILES_SHOWN)} more files: --json lists all"
    if args.objects:
        yield ""
        yield from _object_lines(checkpoint)
    elif others := sorted(set(checkpoint.objects) - {GROUPS, "step"}):
        yield show.plain(f"objects: {show.some(others, 12)} (--objects shows them)")


def _object_lines(checkpoint: Checkpoint) -> Iterator[str]:
    yield "objects:"
    for path, value in foreign.leaves(checkpoint.objects):
        yield f"  {show.plain(path)} = {foreign.text_of(value)}"
    for rank, objects in sorted(checkpoint.per_rank.items()):
        yield f"objects of rank {rank}:"
        for path, value in foreign.leaves(objects):
            yield f"  {show.plain(path)} = {foreign.text_of(value)}"


# --- the tree ---------------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Node:
    """A part of the names: what lies below it."""

    children: dict[str, _Node] = field(default_factory=dict)
    tensors: list[Tensor] = field(default_factory=list)
    own: bool = False

    def form(self) -> tuple[object, ...]:
        """What makes two nodes look alike: names below, dtypes, shapes."""
        return tuple(sorted((n, c.form()) for n, c in self.children.items())), tuple((t.dtype, t.shape) for t in self.tensors) if self.own else ()


def _tree(checkpoint: Checkpoint, depth: int) -> Iterator[list[str]]:
    root = _Node()
    for name, tensor in checkpoint.tensors.items():
        node = root
        for part in name.split("."):
            node.tensors.append(tensor)
            node = node.children.setdefault(part, _Node())
        node.tensors.append(tensor)
        node.own = True
    yield from _below(root, 0, depth)


def _below(node: _Node, level: int, depth: int) -> Iterator[list[str]]:
    runs = _alike(node.children)
    for first, last, child in runs[:CHILDREN_SHOWN]:
        name, inner = first, child
        while len(inner.children) == 1 and not inner.own:  # a lonely child goes on the same line
            ((part, inner),) = inner.children.items()
            name += f".{part}"
        count = 1 if first == last else int(last) - int(first) + 1
        label = name if first == last else f"{name} ... {last} ({count} alike)"
        dtypes = sorted({t.dtype for t in inner.tensors})
        shape = str(list(inner.tensors[0].shape)) if inner.own and not inner.children else ""
        nbytes = count * sum(t.nbytes for t in inner.tensors)
        yield ["  " * level + label, show.count(count * len(inner.tensors)), show.size(nbytes), " ".join(dtypes), shape]
        if level + 1 < depth:
            yield from _below(inner, level + 1, depth)
    if len(runs) > CHILDREN_SHOWN:
        rest = runs[CHILDREN_SHOWN:]
        yield ["  " * level + f"... and {len(rest)} more", show.count(sum(len(c.tensors) for _, _, c in rest)), "", "", ""]


def _alike(children: dict[str, _Node]) -> list[tuple[str, str, _Node]]:
    """Children in order; numbers that follow each other and look alike are one: (first, last, the first one)."""
    runs: list[tuple[str, str, _Node]] = []
    numbered = sorted(children, key=lambda n: (not n.isdecimal(), int(n) if n.isdecimal() else 0)) if any(map(str.isdecimal, children)) else [*children]
    for name in numbered:
        child = children[name]
        if runs and name.isdecimal() and runs[-1][1].isdecimal() and int(name) == int(runs[-1][1]) + 1 and child.form() == runs[-1][2].form():
            runs[-1] = (runs[-1][0], name, runs[-1][2])
        else:
            runs.append((name, name, child))
    return runs


# --- rows -------------------------------------------------------------------------------------------------------------------


def _file_of(checkpoint: Checkpoint, row: Row) -> str:
    if row.file >= 0:
        return checkpoint.files[row.file].name
    return {LITERAL: "(objects)", FILL: "(zeros)"}[row.file]


def _rows(checkpoint: Checkpoint, tensor: Tensor) -> str:
    return show.some([f"{_file_of(checkpoint, r)}: {r.box}" for r in tensor.rows], BOXES_SHOWN)


def _document(place: Place, title: str, checkpoint: Checkpoint, names: list[str], *, objects: bool) -> dict[str, Any]:
    document: dict[str, Any] = {
        "path": place.label,
        "format": checkpoint.format,
        "title": title,
        "tensor_count": len(checkpoint.tensors),
        "bytes": checkpoint.nbytes,
        "files": [{"name": h.name, "bytes": h.bytes} for h in checkpoint.files],
        "aliases": checkpoint.aliases,
        "buffers": sorted(checkpoint.buffers),
        "derived": checkpoint.derived,
        "notes": checkpoint.notes,
        "param_groups": foreign.plain_json(checkpoint.objects.get(GROUPS)),
        "object_names": sorted(checkpoint.objects),
        "tensors": [_of_tensor(checkpoint, n) for n in names],
    }
    if objects:
        document["objects"] = {k: foreign.plain_json(v) for k, v in checkpoint.objects.items() if k != GROUPS}
        document["per_rank"] = {str(r): {k: foreign.plain_json(v) for k, v in o.items()} for r, o in sorted(checkpoint.per_rank.items())}
    return document


def _of_tensor(checkpoint: Checkpoint, name: str) -> dict[str, Any]:
    tensor = checkpoint.tensors[name]

    def rows(held: tuple[Row, ...]) -> list[dict[str, Any]]:
        return [
            {"file": _file_of(checkpoint, r), "start": r.box.start, "extent": r.box.extent, "begin": r.begin, "strides": r.strides} for r in held
        ]

    return {
        "name": name, "dtype": tensor.dtype, "shape": tensor.shape, "bytes": tensor.nbytes, "rows": rows(tensor.rows), "replicas": rows(tensor.replicas)
    }  # fmt: skip
