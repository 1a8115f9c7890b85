"""What the verbs share: opening the path argument, and numbers, sizes and tables as people read them.

Names come out of files that anybody may have written: nothing reaches the terminal that is not printable.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import msgspec

from ckptd.core.manifest import INDEX_NAME, MANIFEST_NAME
from ckptd.errors import BadArgument, CkptdError, NotFound, StoreFailed
from ckptd.storage import Store, open_store
from ckptd.storage.checkpoint import Found, check_job, list_checkpoints, read_checkpoint, split_directory

_STEP_URL = re.compile(r"(\w+://[^/]+(?:/.*)?)/([^/]+/step-[^/]+)/?")
_KIBI = 1024
_SIZE = re.compile(r"([0-9.]+(?:e[0-9]+)?)\s*((?:[kmgtp]i?)?)b?", re.IGNORECASE)
_POWERS = "kmgtp"
_UNITS = ("KiB", "MiB", "GiB", "TiB", "PiB")
_SPANS = ((86400, "d"), (3600, "h"), (60, "min"), (1, "s"))

# --- places -----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Place:
    """What a path argument names: a store, a job in it, one step directory ("" is the store's root: a copied one), or one image file."""

    label: str
    store: Store
    job: str | None = None
    directory: str | None = None
    image: str = ""

    def name_of(self, directory: str) -> str:
        """A step directory for people."""
        return directory or self.label


def open_place(text: str, job: str | None = None) -> Place:
    """The place at a path or URL; `job` narrows a store to one of its jobs. Raises BadArgument, NotFound, StoreFailed."""
    place = _open(text)
    if job is None:
        return place
    check_job(job)
    if place.image or place.directory is not None or place.job not in {None, job}:
        msg = f"{text} is not a store: it has no job {job!r} below it"
        raise BadArgument(msg, remedy="give the store's root and the job, or the job's directory alone")
    return replace(place, job=job)


def _open(text: str) -> Place:
    store = open_store(text)  # refuses what is neither path nor URL
    scheme, found, rest = text.partition("://")
    if found and scheme != "file":
        match = _STEP_URL.fullmatch(text)
        if match and split_directory(match[2]):
            return Place(text, open_store(match[1]), match[2].partition("/")[0], match[2])
        return Place(text, store)
    path = Path(unquote(rest.removeprefix("localhost")) if found else text)
    try:
        return _open_path(path.resolve(strict=True))
    except FileNotFoundError as e:
        msg = f"{path} does not exist"
        raise NotFound(msg, remedy="give a store's root, a job's directory in it, or a step's directory in that") from e
    except (OSError, RuntimeError) as e:  # RuntimeError: links in a circle, until Python 3.13
        msg = f"cannot read {path}: {getattr(e, 'strerror', '') or e}"
        raise StoreFailed(msg, remedy="give the user that runs ckptd read permission, and look at the links of this path") from e


def _open_path(path: Path) -> Place:
    """Links are resolved already: below its root a store follows none."""
    if path.is_file():
        if path.name not in {MANIFEST_NAME, INDEX_NAME}:
            return Place(str(path), open_store(str(path.parent)), image=path.name)
        path = path.parent
    label = str(path)
    children = os.listdir(path)  # noqa: PTH208  names are enough
    steps = [child for child in children if split_directory(f"job/{child}")]
    directory = f"{path.parent.name}/{path.name}"
    if split_directory(directory) and not steps:
        return Place(label, open_store(str(path.parents[1])), path.parent.name, directory)
    if MANIFEST_NAME in children or INDEX_NAME in children:
        return Place(label, open_store(label), directory="")
    if any(split_directory(f"{path.name}/{step}") for step in steps) and not _holds_steps(path / steps[0]):
        return Place(label, open_store(str(path.parent)), path.name)
    return Place(label, open_store(label))


def _holds_steps(path: Path) -> bool:
    """Whether this is a job's directory, though it is called like a step's: jobs may be called so."""
    with suppress(OSError):
        return any(split_directory(f"job/{child}") for child in os.listdir(path))  # noqa: PTH208
    return False


def find_checkpoints(place: Place) -> list[Found]:
    """The step directories at a place, by job, newest first. Raises NotFound if there is none, BadArgument for an image file."""
    if place.image:
        msg = f"{place.label} is one file of a checkpoint"
        raise BadArgument(msg, remedy="give its step's directory; `ckptd inspect` also reads single images")
    if place.directory == "":
        return [_look_at_copy(place.store)]
    found = list_checkpoints(place.store, place.job)
    if place.directory is not None:
        found = [f for f in found if f.directory == place.directory]
    if not found:
        what = f"no checkpoint of job {place.job!r}" if place.job else "no checkpoint"
        msg = f"{what} at {place.label}"
        raise NotFound(
            msg, remedy="give the root of a store: its checkpoints are <root>/<job>/step-<step>; `ckptd status` names a job's store"
        )
    return sorted(found, key=lambda f: f.job)  # stable: within a job the order is the listing's


def _look_at_copy(store: Store) -> Found:
    """A step directory under a name that is not ours, which says nothing about job and step."""
    size = sum(held.bytes for held in store.list(""))
    try:
        manifest, _ = read_checkpoint(store, "")
    except NotFound:
        return Found("", "", -1, None, None, "no manifest: unfinished", unfinished=True, bytes=size)
    except CkptdError as e:
        return Found("", "", -1, None, None, f"{type(e).__name__}: {e.message}", bytes=size)
    return Found(manifest.job, "", manifest.step, manifest.attempt, manifest, "", bytes=size)


# --- text -------------------------------------------------------------------------------------------------------------------


def emit(text: str) -> None:
    """Print, whatever the terminal's encoding; flushed, so that a closed pipe is noticed here."""
    encoding = sys.stdout.encoding or "utf-8"
    print(text.encode(encoding, "backslashreplace").decode(encoding), flush=True)


def emit_json(document: Any) -> None:
    """Print one JSON document: strict JSON, bytes as base64, NaN as null."""
    print(msgspec.json.format(msgspec.json.encode(document), indent=1).decode(), flush=True)


def plain(text: str) -> str:
    """`text` on one line, without anything that a terminal would obey."""
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def parse_size(text: str) -> int:
    """Bytes of "12GB" (powers of 1000) or "12GiB" (of 1024). Raises BadArgument."""
    match = _SIZE.fullmatch(text.strip())
    try:
        if match is None:
            raise ValueError
        unit = match[2].lower()
        power = _POWERS.index(unit[0]) + 1 if unit else 0
        return int(float(match[1]) * (1024 if unit.endswith("i") else 1000) ** power)
    except (ValueError, OverflowError) as e:
        msg = f"{text!r} is no size"
        raise BadArgument(msg, remedy="give bytes, or a number with a unit: 800MB, 12GB, 12GiB") from e


def size(n: int) -> str:
    """Bytes: "812 B", "1.5 GiB"."""
    if n < _KIBI:
        return f"{n} B"
    power = 1
    while power < len(_UNITS) and round(n / _KIBI**power, 1) >= _KIBI:
        power += 1
    return f"{n / _KIBI**power:.1f} {_UNITS[power - 1]}"


def count(n: int, noun: str = "") -> str:
    """A number with its noun: "1,234 images", "1 image"."""
    return f"{n:,}" if not noun else f"{n:,} {noun}" + ("" if n == 1 else "s")


def duration(seconds: float) -> str:
    """The two largest units: "3 min 12 s", "2 d 4 h"; below ten seconds with a decimal."""
    left = int(seconds)
    first = next((i for i, (length, _) in enumerate(_SPANS[:-1]) if left >= length), None)
    if first is None:
        return f"{seconds:.1f} s" if seconds < 10 else f"{left} s"
    parts = []
    for length, unit in _SPANS[first : first + 2]:
        n, left = divmod(left, length)
        parts.append(f"{n} {unit}")
    return " ".join(parts)


def utc(unix_s: float) -> str:
    """ISO 8601, UTC, to the second. A time that no calendar has is shown as the number it is."""
    try:
        return datetime.fromtimestamp(unix_s, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    except (OverflowError, OSError, ValueError):
        return f"{unix_s:g}"


def ranges(numbers: Iterable[int]) -> str:
    """Ranks in few signs: "0-3,7"; "-" for none."""
    runs: list[list[int]] = []
    for n in sorted(set(numbers)):
        if runs and n == runs[-1][1] + 1:
            runs[-1][1] = n
        else:
            runs.append([n, n])
    return ",".join(f"{a}-{b}" if a != b else str(a) for a, b in runs) or "-"


def some(items: Sequence[str], at_most: int) -> str:
    """The first few, and how many more there are."""
    more = f" and {len(items) - at_most:,} more" if len(items) > at_most else ""
    return ", ".join(items[:at_most]) + more


def table(header: Sequence[str], rows: Iterable[Sequence[str]], *, right: Iterable[str] = (), indent: str = "") -> str:
    """Lines of padded columns; those named in `right` are aligned to the right."""
    cells = [list(header), *([plain(c) for c in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    aligned = ["rjust" if name in set(right) else "ljust" for name in header]
    lines = ("  ".join(getattr(c, how)(w) for c, how, w in zip(row, aligned, widths, strict=True)) for row in cells)
    return "\n".join(indent + line.rstrip() for line in lines)
