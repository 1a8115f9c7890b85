"""Formats: what the rest of ckptd knows about checkpoints of any system, and how one is recognised.

    Place      where a checkpoint lies: a folder or one file, in a store
    Format     its name, `probe` (is this mine?), `read` (Place -> Checkpoint), `write` (Checkpoint -> Plan) where it can be written
    Plan       the files of a target, and what of the checkpoint it does not hold

The formats themselves are in `ckptd.integrations`, one file per ecosystem, above everything else; they are found by name when they are asked for, and other
packages add theirs through the entry-point group "ckptd.formats" (name -> object that is a `Format`).

A reader executes nothing that it reads (`core.pickles`), reads headers and pickles only, and says where tensors lie. A writer is pure.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Protocol

from ckptd.core.emit import OutFile
from ckptd.core.logical import Checkpoint
from ckptd.errors import BadArgument, BadForeign, NotFound, StoreFailed, Unstorable
from ckptd.storage import Store, open_store
from ckptd.storage.local import LocalStore

HEAD_BYTES_MAX = 256 << 20
"""A pickle, header or JSON file larger than this is not read into memory."""


@dataclass(frozen=True)
class Place:
    """A folder of a store ("" for its root), or one file in it: `only`."""

    store: Store
    prefix: str
    label: str
    only: str = ""

    @cached_property
    def files(self) -> dict[str, int]:
        """Size by name below the folder, sorted. Symlinks that leave the folder and special files are not listed."""
        lead = f"{self.prefix}/" if self.prefix else ""
        if self.only:
            return {self.only: self.store.stat(lead + self.only).bytes}
        return {s.name.removeprefix(lead): s.bytes for s in self.store.list(self.prefix)}

    def full(self, name: str) -> str:
        """The store's name of a file."""
        return f"{self.prefix}/{name}" if self.prefix else name

    def read(self, name: str, begin: int = 0, count: int | None = None) -> bytes:
        """Bytes of a file; all of it by default. Raises NotFound, StoreFailed, BadForeign (too many, or beyond the end)."""
        size = self.files.get(name)
        if size is None:
            msg = f"{self.label}: {name} is not there"
            raise NotFound(msg)
        count = size - begin if count is None else count
        if not (begin >= 0 and 0 <= count <= HEAD_BYTES_MAX and begin + count <= size):
            msg = f"{name}: bytes {begin} to {begin + count} of {size} cannot be read at once"
            raise BadForeign(msg)
        data = bytearray(count)
        self.store.get(self.full(name), begin, memoryview(data))
        return bytes(data)

    def reader(self, name: str, offset: int = 0) -> Callable[[int, int], bytes]:
        """(begin, count) -> bytes, of a file or of what begins at `offset` in it."""
        return lambda begin, count: self.read(name, offset + begin, count)

    def path(self, name: str) -> Path | None:
        """The file itself, where the store is a local folder."""
        return Path(str(self.store), self.full(name)) if isinstance(self.store, LocalStore) else None

    def glob(self, *patterns: str) -> list[str]:
        """Names that match a shell pattern; `*` does not cross folders."""
        from fnmatch import fnmatchcase

        wanted = [p.split("/") for p in patterns]
        return [
            n for n in self.files
            if any(len(p) == n.count("/") + 1 and all(map(fnmatchcase, n.split("/"), p)) for p in wanted)
        ]  # fmt: skip

    def below(self, folder: str) -> Place:
        """A folder in this one."""
        return Place(self.store, self.full(folder), f"{self.label}/{folder}")


def place_of(url_or_path: str) -> Place:
    """Where a user's argument points: a folder, a file, or a URL of either. Raises NotFound, BadArgument."""
    if "://" not in url_or_path:
        path = Path(os.path.abspath(url_or_path))  # noqa: PTH100  links in the user's path stay as they are
        if path.is_file():
            return Place(open_store(str(path.parent)), "", url_or_path, path.name)
        if not path.is_dir():
            msg = f"{url_or_path} does not exist, or is neither file nor folder"
            raise NotFound(msg)
        return Place(open_store(str(path)), "", url_or_path)
    store = open_store(url_or_path)
    place = Place(store, "", url_or_path)
    if not place.files:
        above, _, name = url_or_path.rstrip("/").rpartition("/")
        if "://" in above:
            single = Place(open_store(above), "", url_or_path, name)
            try:
                if single.files:
                    return single
            except (NotFound, StoreFailed):
                pass
        msg = f"nothing lies at {url_or_path}"
        raise NotFound(msg)
    return place


@dataclass(frozen=True)
class ReadOptions:
    """`tag`: which of several checkpoints in the folder (a DeepSpeed tag, a Megatron iteration, a step); "" for the newest.

    `hints`: what a format does not say of itself, by name (parameter order, model configuration).
    """

    tag: str = ""
    hints: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class WriteOptions:
    """`ranks`: data-parallel size of the target; `tp`, `pp`: tensor and pipeline parallel; `dtype`: of the weights ("" as they are; "BF16", "F32").

    `drop`: what may be left out if the target cannot hold it ("optimizer", "objects", "buffers").
    `shard_bytes`: most bytes per file where a format has shards. `config`: further settings by name, a format's own.
    """

    ranks: int = 1
    tp: int = 1
    pp: int = 1
    dtype: str = ""
    shard_bytes: int = 5_000_000_000
    drop: frozenset[str] = frozenset()
    config: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Plan:
    """The files of a target. `single`: the target is the one file itself, not a folder.

    `dropped`: what of the checkpoint is in no file, by name. `inlined`: tensors of one element that are stored as numbers (`Checkpoint.scalars`).
    Every tensor is taken by a file, or is in one of these: the engine refuses a plan that forgets one. `notes`: what a user should know.
    `renamed`: tensors that the target's reader will call otherwise, old name -> new.
    `finish`: given the place where `files` lie, further files that follow from their bytes (checksums, indexes); called once, at the end.
    """

    files: Sequence[OutFile]
    single: bool = False
    dropped: Sequence[str] = ()
    inlined: Sequence[str] = ()
    renamed: Mapping[str, str] = field(default_factory=dict)
    notes: Sequence[str] = ()
    finish: Callable[[Place], Sequence[OutFile]] | None = None


class Format(Protocol):
    """One kind of checkpoint. `name`: what `--to` takes; `title`: for people. Stateless."""

    name: str
    title: str

    def probe(self, place: Place) -> bool:
        """Whether a checkpoint of this format lies at `place`: by names and first bytes, cheaply. Raises nothing but StoreFailed."""
        ...

    def read(self, place: Place, options: ReadOptions) -> Checkpoint:
        """What lies there. Raises BadForeign, NotTiled, NotFound, BadArgument (a hint is missing: its remedy says which)."""
        ...

    def write(self, checkpoint: Checkpoint, options: WriteOptions) -> Plan:
        """The files that hold it. Raises Unstorable (what the target cannot hold and `drop` does not name), BadArgument."""
        ...


OURS = (
    "ckptd.integrations.native:CKPTD",
    "ckptd.integrations.dcp:DCP",
    "ckptd.integrations.dcp:DCP_SAFETENSORS",
    "ckptd.integrations.megatron:TORCH_DIST",
    "ckptd.integrations.megatron:LEGACY",
    "ckptd.integrations.deepspeed:UNIVERSAL",
    "ckptd.integrations.deepspeed:ZERO1",
    "ckptd.integrations.deepspeed:ZERO2",
    "ckptd.integrations.deepspeed:ZERO3",
    "ckptd.integrations.deepspeed:ZERO0",
    "ckptd.integrations.hf:HF",
    "ckptd.integrations.torch_native:TORCH",
)
"""In the order in which they are asked: the most particular first (Megatron's folder is a DCP folder with one more file)."""


ALSO = {
    "deepspeed-universal": "universal", "ds-universal": "universal", "zero-0": "zero0", "deepspeed-zero0": "zero0", "zero-1": "zero1", "zero-2": "zero2", "zero-3": "zero3", "deepspeed-zero1": "zero1",
    "deepspeed-zero2": "zero2", "deepspeed-zero3": "zero3", "huggingface": "hf", "safetensors": "hf", "torch_dist": "megatron", "megatron-core": "megatron",
    "torch.save": "torch", "pt": "torch", "dcp_safetensors": "dcp-safetensors", "native": "ckptd",
}  # fmt: skip
"""Other names that people have for them."""


def formats() -> Iterator[Format]:
    """All formats: other packages' after ours."""
    for text in OURS:
        module, _, name = text.partition(":")
        try:
            yield getattr(import_module(module), name)
        except ModuleNotFoundError as e:
            if not (e.name or "").startswith("ckptd.integrations"):
                raise
    for point in entry_points(group="ckptd.formats"):
        yield point.load()


def format_named(name: str) -> Format:
    """The format that `--to` means. Raises BadArgument."""
    names = []
    for one in formats():
        if one.name == ALSO.get(name, name):
            return one
        names.append(one.name)
    msg = f"{name!r} is no format that is known"
    raise BadArgument(msg, remedy="one of " + ", ".join(names))


def recognise(place: Place) -> Format:
    """Whose checkpoint lies there. Raises BadForeign."""
    for one in formats():
        if one.probe(place):
            return one
    some = ", ".join(list(place.files)[:4]) or "nothing"
    msg = f"{place.label}: no format is recognised in {some}"
    raise BadForeign(msg, remedy="give the folder that holds the checkpoint's files, or one file; `ckptd convert --help` lists the formats")


def check_settings(options: WriteOptions, known: Iterable[str], target: str) -> None:
    """Raise BadArgument for a setting (`--config`) that the target does not have."""
    names = sorted(known)
    unknown = sorted(set(options.config) - {*names})
    if unknown:
        msg = f"--config {unknown[0]}: {target} has no such setting"
        raise BadArgument(msg, remedy="there are " + ", ".join(names) if names else "there are none")


def need_drop(what: str, names: Sequence[str], options: WriteOptions, target: str) -> list[str]:
    """`names`, which the target leaves out, if the user said `--drop what`. Raises Unstorable otherwise."""
    if names and what not in options.drop:
        some = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
        msg = f"{target} cannot hold the {what} state: {some}"
        raise Unstorable(msg, remedy=f"--drop {what} leaves it out")
    return list(names)
