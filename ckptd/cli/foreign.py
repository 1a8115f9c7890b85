"""What the verbs share for checkpoints of any format: finding them, opening them, settings from arguments, and progress as people read it.

ckptd's own stores have manifests and checksums, which `ls`, `inspect` and `verify` know how to use; everything here is for the others.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ckptd.cli import show
from ckptd.convert import Progress
from ckptd.core import typed
from ckptd.core.logical import GROUPS, Checkpoint
from ckptd.errors import BadArgument, CkptdError, NotFound
from ckptd.formats import Format, Place, ReadOptions, formats, place_of, recognise
from ckptd.reading import Pool, Reading, compare_replicas, open_checkpoint, settle

OWN, FILE = "ckptd", "torch"
"""Formats that `ls` treats in their own way: ours has manifests; one that is a single file, of which a folder may hold many."""
REDRAW_S, LINE_S = 0.1, 5.0
"""On a terminal the line is drawn anew this often; in a log there is a new one this often."""
FOLDERS_MAX = 10_000
"""Folders and files that `ls` looks into."""
SUFFIXES = frozenset({"pt", "pth", "bin", "ckpt", "safetensors"})
"""Of files that may be checkpoints by themselves."""

_DTYPES = {
    "bf16": "BF16", "bfloat16": "BF16", "fp16": "F16", "f16": "F16", "float16": "F16", "half": "F16", "fp32": "F32", "f32": "F32", "float32": "F32",
    "fp64": "F64", "f64": "F64", "float64": "F64",
}  # fmt: skip
_IMAGE = re.compile(r"r[0-9]{5,}\.safetensors")
"""A file of this name is taken for an image of ours, also where it is not: then it is said what is wrong with it."""
_TAG = re.compile(r"(?:.*?(?:step|iter|iteration|checkpoint|ckpt|epoch)[-_=]?)?([0-9]+)", re.IGNORECASE)


# --- arguments --------------------------------------------------------------------------------------------------------------


def dtype_of(text: str) -> str:
    """safetensors' code of a dtype as people write it; "" stays. Raises BadArgument."""
    code = _DTYPES.get(text.lower(), "") if text else ""
    if text and not code:
        msg = f"--dtype {text!r} is not known"
        raise BadArgument(msg, remedy="bf16, fp16, fp32 or fp64")
    return code


def settings(pairs: Sequence[str], name: str) -> dict[str, Any]:
    """{"k": v} of "k=v" and "k=@file.json". A value that reads as JSON is that, anything else is text. Raises BadArgument."""
    found: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            msg = f"{name} {pair!r} is no KEY=VALUE"
            raise BadArgument(msg)
        try:
            if value.startswith("@"):
                found[key] = json.loads(Path(value[1:]).read_text("utf-8"))
                continue
        except (OSError, ValueError) as e:
            msg = f"{name} {key}: {value[1:]} cannot be read: {getattr(e, 'strerror', '') or e}"
            raise BadArgument(msg) from e
        try:
            found[key] = json.loads(value)
        except ValueError:
            found[key] = value
    return found


def add_reading(parser: argparse.ArgumentParser) -> None:
    """The arguments that say how a source is read."""
    parser.add_argument("--tag", metavar="TAG", default="", help="which of several checkpoints in the folder: a DeepSpeed tag, an iteration, a step (default: the newest)")
    parser.add_argument(
        "--hint", metavar="KEY=VALUE", action="append", default=[], help="what the files do not say of themselves; KEY=@FILE takes JSON from a file; may be repeated"
    )


def read_options(args: argparse.Namespace) -> ReadOptions:
    """Of `add_reading`."""
    return ReadOptions(args.tag, settings(args.hint, "--hint"))


# --- finding ----------------------------------------------------------------------------------------------------------------


def recognised(path: str) -> tuple[Place, Format] | None:
    """Place and format of what lies at `path`, if it is another system's; None for ckptd's own, and for what nobody knows or cannot be opened."""
    try:
        place = place_of(path)
        found = recognise(place)
    except CkptdError:
        return None
    return None if found.name == OWN or _IMAGE.fullmatch(place.only) else (place, found)


@dataclass(frozen=True)
class Listed:
    """A checkpoint that `ls` found: its folder below the path ("" for the path itself), whose it is, its step or iteration if the name tells."""

    directory: str
    format: str
    step: int | None
    files: int
    bytes: int
    latest: bool


def listed(path: str) -> list[Listed]:
    """The checkpoints at a path: the folders in it that are ones, or itself; none where it is ckptd's own. Files are read only to recognise them."""
    try:
        place = place_of(path)
    except CkptdError:
        return []
    whose = _whose(place)
    if whose == OWN:
        return []
    folders = [*dict.fromkeys(n.partition("/")[0] for n in place.files if "/" in n)][:FOLDERS_MAX]
    found = []
    latest = _latest(place)
    for folder in folders:
        below = place.below(folder)
        of = _whose(below)
        if of:
            match = _TAG.fullmatch(folder)
            step = int(match[1]) if match else None
            found.append(Listed(folder, of, step, len(below.files), sum(below.files.values()), folder in latest or str(step) in latest))
    here = {n: size for n, size in place.files.items() if "/" not in n}
    own = _whose(_with_files(place, here)) if found else whose
    if own in {"", FILE}:  # files that are checkpoints, each by itself
        found += _files(place)
    elif not any(f.format == own for f in found):  # else the folder is known by what lies in it
        held = here if found else place.files
        found.append(Listed("", own, None, len(held), sum(held.values()), latest=False))
    return sorted(found, key=lambda f: (-1 if f.step is None else f.step, f.directory), reverse=True)


def _with_files(place: Place, files: dict[str, int]) -> Place:
    """The same place as if it held these files alone."""
    part = replace(place)
    part.__dict__["files"] = files  # what its cached property would find
    return part


def _files(place: Place) -> list[Listed]:
    """Files of a folder that are checkpoints by themselves."""
    found = []
    for name in [n for n in place.files if "/" not in n and n.rpartition(".")[2] in SUFFIXES][:FOLDERS_MAX]:
        whose = _whose(Place(place.store, place.prefix, f"{place.label}/{name}", name))
        if whose:
            match = _TAG.fullmatch(name.rpartition(".")[0])
            found.append(Listed(name, whose, int(match[1]) if match else None, 1, place.files[name], latest=False))
    return found


def _whose(place: Place) -> str:
    try:
        return recognise(place).name
    except CkptdError:
        return ""


def _latest(place: Place) -> set[str]:
    """What the systems' own pointers name: DeepSpeed's `latest`, Megatron's `latest_checkpointed_iteration.txt`."""
    found = set()
    for name in ("latest", "latest_checkpointed_iteration.txt"):
        if 0 < place.files.get(name, 0) < 1000:
            found.add(place.read(name).decode("utf-8", "replace").strip())
    return found


def table_of_formats() -> list[dict[str, Any]]:
    """All formats: name, title, and whether they can be written."""
    return [{"name": f.name, "title": f.title, "reads": True, "writes": bool(getattr(f, "writes", True))} for f in formats()]


# --- opening ----------------------------------------------------------------------------------------------------------------


class Opened:
    """A checkpoint, proven and settled: replicas were compared, a 16-bit weight and its equal master are one tensor."""

    def __init__(self, path: str, options: ReadOptions, pool: Pool, view: Callable[[Checkpoint], Checkpoint] | None = None) -> None:
        self.place, self.format, found = open_checkpoint(path, options)
        with Reading(self.place, found) as reading:
            if found.pairs or any(t.replicas for t in found.tensors.values()):
                compare_replicas(reading, pool)
            self.checkpoint = settle(reading, pool)
        if view is not None:
            self.checkpoint = view(self.checkpoint)
            self.checkpoint.prove()
        self.reading = Reading(self.place, self.checkpoint)

    def close(self) -> None:
        """Close its files."""
        self.reading.close()


# --- objects ----------------------------------------------------------------------------------------------------------------


def leaves(value: Any, path: str = "") -> list[tuple[str, Any]]:
    """(path, value) of an object: dicts and lists of dicts are walked, everything else is a value."""
    if isinstance(value, dict) and value:
        return [leaf for k, v in value.items() for leaf in leaves(v, f"{path}.{k}" if path else str(k))]
    if isinstance(value, list) and value and all(isinstance(v, dict) for v in value):
        return [leaf for i, v in enumerate(value) for leaf in leaves(v, f"{path}.{i}")]
    return [(path, value)]


def plain_json(value: Any) -> Any:
    """An object for a JSON document: typed JSON (`core.typed`) where there is one, else its text; arrays by dtype and shape."""

    def put(_path: str, item: Any) -> tuple[str, str] | None:
        return ("ndarray", f"{item.dtype}{list(item.shape)}") if isinstance(item, np.ndarray) else None

    try:
        return typed.encode(value, "", put)
    except CkptdError:
        return repr(value)


def text_of(value: Any, at_most: int = 120) -> str:
    """A value on one line."""
    text = f"<array {value.dtype}{list(value.shape)}>" if isinstance(value, np.ndarray) else repr(value)
    return show.plain(text if len(text) <= at_most else f"{text[:at_most]}... ({show.count(len(text))} characters)")


def group_lines(checkpoint: Checkpoint) -> list[str]:
    """The param groups, one line each."""
    out = []
    for number, group in enumerate(checkpoint.objects.get(GROUPS) or ()):
        hyper = " ".join(f"{k}={text_of(v, 40)}" for k, v in group.items() if k != "params")
        out.append(show.plain(f"  group {number}: {show.count(len(group['params']), 'parameter')}; {hyper}"))
    return out


# --- progress ---------------------------------------------------------------------------------------------------------------


class Line:
    """Progress on stderr: one line that is drawn anew on a terminal, else a line now and then; nothing if not `shown`."""

    def __init__(self, *, shown: bool) -> None:
        self._shown = shown
        self._terminal = shown and sys.stderr.isatty()
        self._told_s = time.monotonic()
        self._drawn = False

    def __call__(self, p: Progress) -> None:
        """For `convert(progress=...)`."""
        now = time.monotonic()
        if not self._shown or now - self._told_s < (REDRAW_S if self._terminal else LINE_S):
            return
        self._told_s = now
        text = progress_text(p)
        if self._terminal:
            self._drawn = True
            width = os.get_terminal_size(sys.stderr.fileno()).columns if _has_size() else 100
            print(f"\r\x1b[K{text[: width - 1]}", end="", file=sys.stderr, flush=True)
        else:
            print(text, file=sys.stderr, flush=True)

    def end(self) -> None:
        """Take the line away."""
        if self._drawn:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
            self._drawn = False


def _has_size() -> bool:
    try:
        os.get_terminal_size(sys.stderr.fileno())
    except (OSError, ValueError):
        return False
    return True


def progress_text(p: Progress) -> str:
    """What is being done, how far it is, how fast, how long it will take."""
    share = 100 * p.done_bytes // max(p.total_bytes, 1)
    text = f"{p.phase}: {show.size(p.done_bytes)} of {show.size(p.total_bytes)}, {share} %"
    if p.seconds > 0 and p.done_bytes:
        left_s = (p.total_bytes - p.done_bytes) * p.seconds / p.done_bytes
        text += f", {p.done_bytes / p.seconds / 1e6:,.0f} MB/s, {show.duration(left_s)} left"
    return text


def view_of(text: str, hints: Mapping[str, Any]) -> Callable[[Checkpoint], Checkpoint] | None:
    """What `--view` names, a view of ckptd's or a file, as a function of a checkpoint; None for "". Raises NotFound, BadArgument."""
    if not text:
        return None
    from ckptd.core import views

    source = text
    if text.endswith(".json") or os.sep in text:
        try:
            source = Path(text).read_text("utf-8")
        except (OSError, ValueError) as e:
            msg = f"--view {text} cannot be read: {getattr(e, 'strerror', '') or e}"
            raise NotFound(msg) from e
    view = views.load_view(source)
    return lambda checkpoint: views.apply(view, checkpoint, hints)
