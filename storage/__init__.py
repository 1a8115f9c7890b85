"""The storage room: where images outlive their nodes.

A `Store` keeps named runs of bytes. Five methods, synchronous, called from the threads of the byte pool; every method may be called
from several threads at once. Behaviour is stacked as restic stacks its backends: a wrapper is a `Store` that holds a `Store`.

Names are relative posix paths, "job/step-00000007/manifest.json"; `check_name` says which are accepted. A store knows nothing of
checkpoints: `ckptd.storage.checkpoint` builds the commit protocol on these five methods and on what they promise here.

Invariants that every store keeps, held by the contract suite in tests/storage/contract.py
- a name holds all the bytes of one put, or does not exist: no reader ever sees a part of a put;
- when `put` returns, the bytes survive the loss of power (a store in memory survives as long as its process);
- what cannot be done raises an error of `ckptd.errors` that names the object and, where one is known, a remedy.
"""

from __future__ import annotations

import os
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol, Self, TypeAlias, runtime_checkable
from urllib.parse import unquote

from ckptd.errors import BadArgument

__all__ = [
    "Bytes",
    "Data",
    "Stat",
    "Store",
    "Streaming",
    "Writer",
    "absolute",
    "check_name",
    "is_temporary",
    "open_store",
    "parts_of",
]

Bytes: TypeAlias = bytes | bytearray | memoryview
Data: TypeAlias = Bytes | Sequence[Bytes]
"""One run of bytes, or several that are stored one after the other."""

NAME_BYTES_MAX = 1024
"""S3's and GCS's limit on keys; Linux allows paths of 4096."""
COMPONENT_BYTES_MAX = 255
"""NAME_MAX of every Linux file system."""

_TEMPORARY = re.compile(r"\.ckptd-[0-9a-f]{32}\.tmp")


@dataclass(frozen=True, slots=True, order=True)
class Stat:
    """A stored object: its name and its size in bytes."""

    name: str
    bytes: int


class Store(Protocol):
    """Keeps named runs of bytes. See the module's text for what holds for all methods."""

    def put(self, name: str, data: Data, *, exclusive: bool = False) -> None:
        """Store `data` under `name`, atomically, and durably when this returns.

        Others see the old object (or none) until they see the whole new one. An existing object is replaced; with `exclusive`
        it is left alone and StoreFailed is raised, and of two writers exactly one succeeds. After an error the name holds what it
        held before, or all of `data`; the caller may put again. `data` is not kept and not changed; large page-aligned
        memory is written from where it lies.

        Raises: StoreFailed, BadArgument (the name).
        """
        ...

    def get(self, name: str, begin: int, into: memoryview) -> None:
        """Fill all of `into` with the bytes of `name` from byte `begin` on.

        There is no short read: bytes beyond the end are StoreFailed, and `into` then holds anything. An empty `into` still asks
        whether the object exists. Two calls may see two versions of a name that is put in between: readers hold checksums.

        Raises: NotFound, StoreFailed, BadArgument (the name, a negative `begin`, read-only memory).
        """
        ...

    def list(self, prefix: str) -> Iterator[Stat]:
        """Every object below the folder `prefix` ("" for all), at any depth, sorted by name.

        `prefix` is a name and not a run of letters: "a" lists "a/b" and not "ab". Temporaries of unfinished puts are never
        listed. A folder that does not exist lists nothing. Objects put or deleted during the listing may be in it or not.

        Raises: StoreFailed, BadArgument (the prefix).
        """
        ...

    def delete(self, name: str) -> None:
        """Remove `name`; removing what does not exist is no error. The removal is durable when this returns.

        Raises: StoreFailed, BadArgument (the name).
        """
        ...

    def stat(self, name: str) -> Stat:
        """Name and size of an object.

        Raises: NotFound, StoreFailed, BadArgument (the name).
        """
        ...


@runtime_checkable
class Streaming(Store, Protocol):
    """A store that can also write an object whose bytes are never all in memory. Optional: ask with isinstance(store, Streaming)."""

    def stream(self, name: str) -> Writer:
        """Begin an object that is written piece by piece; nothing of it is visible, or replaced, before `Writer.commit`.

        Raises: StoreFailed, BadArgument (the name).
        """
        ...


class Writer(ABC):
    """One object being written, in order, by one thread at a time; memory is bounded, whatever the object's size.

        with store.stream(name) as writer:      # commits at the end, aborts on an error
            writer.write(data)

    After `commit` the name holds all that was written, durably, as after `Store.put`. After `abort`, after an error of `commit` and
    after the death of the process it holds what it held before; only an error of `commit` may also leave all of it.
    """

    def __init__(self, what: str) -> None:
        self._what = what
        self._open = True

    def __str__(self) -> str:
        return self._what

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is not None:
            self.abort()
        elif self._open:
            self.commit()

    def write(self, data: Data) -> None:
        """Append `data`, which may be changed as soon as this returns. After an error only `abort` makes sense.

        Raises: StoreFailed, also for what was written earlier; BadArgument (the stream has ended, or the data is not contiguous).
        """
        self._check_open()
        for part in parts_of(data):
            self._write(part)

    def commit(self) -> None:
        """Make the object visible and durable. Raises: StoreFailed, BadArgument (the stream has ended)."""
        self._check_open()
        self._open = False
        try:
            self._commit()
        except BaseException:
            with suppress(Exception):
                self._abort()
            raise

    def abort(self) -> None:
        """Forget what was written; after a commit or an abort it does nothing. Raises nothing."""
        if self._open:
            self._open = False
            with suppress(Exception):
                self._abort()

    def _check_open(self) -> None:
        if not self._open:
            msg = f"the stream to {self} has ended"
            raise BadArgument(msg)

    @abstractmethod
    def _write(self, data: memoryview) -> None: ...

    @abstractmethod
    def _commit(self) -> None: ...

    @abstractmethod
    def _abort(self) -> None: ...


def check_name(name: str) -> list[str]:
    """The components of a valid name. Raises BadArgument on anything that could leave the store or mean two things."""
    parts = name.split("/")
    if "\0" in name or any(p in {"", ".", ".."} for p in parts):
        msg = f"{name!r} is no name of a stored object: it is absolute, or has an empty component, '.', '..' or NUL"
        raise BadArgument(msg)
    try:
        sizes = [len(p.encode()) for p in parts]
    except UnicodeEncodeError as e:
        msg = f"{name!r} is no name of a stored object: it is not UTF-8"
        raise BadArgument(msg) from e
    if max(sizes) > COMPONENT_BYTES_MAX or sum(sizes) + len(sizes) - 1 > NAME_BYTES_MAX:
        msg = f"{name[:40]!r}... is too long: {COMPONENT_BYTES_MAX} bytes per component, {NAME_BYTES_MAX} in all"
        raise BadArgument(msg)
    if any(map(is_temporary, parts)):
        msg = f"{name!r} is no name of a stored object: it is that of a temporary file"
        raise BadArgument(msg)
    return parts


def is_temporary(component: str) -> bool:
    """Whether a file of this name is the unfinished put of a store."""
    return _TEMPORARY.fullmatch(component) is not None


def parts_of(data: Data) -> list[memoryview]:
    """`data` as flat views of bytes; nothing is copied."""
    runs = [data] if isinstance(data, (bytes, bytearray, memoryview)) else data
    views = [memoryview(r) for r in runs]
    if not all(v.c_contiguous for v in views):
        msg = "data to be stored must be contiguous"
        raise BadArgument(msg)
    return [v.cast("B") for v in views if v.nbytes]


def absolute(url_or_path: str | os.PathLike[str]) -> str:
    """A place as every process understands it, whatever its working directory: local paths made absolute, URLs and "" as they are."""
    text = os.fspath(url_or_path)
    return text if not text or "://" in text else os.path.abspath(text)  # noqa: PTH100  as the user named it: links stay


def open_store(url_or_path: str) -> Store:
    """The store at a local path or URL: "file:///path", "memory://NAME" (one per name and process, for tests), or an object store's
    "s3://bucket/prefix", "gs://bucket/prefix", "az://container/prefix", which take credentials and endpoint from the environment.

    Nothing is created or touched; a local root is made by the first put. Raises BadArgument.
    """
    from ckptd.storage import local, memory, objects

    scheme, found, rest = url_or_path.partition("://")
    if not found:
        if not url_or_path or "\0" in url_or_path:
            msg = f"{url_or_path!r} is no path of a store"
            raise BadArgument(msg)
        return local.LocalStore(url_or_path)
    if scheme == "memory" and rest:
        return memory.shared(rest)
    if scheme in objects.SCHEMES:
        return objects.ObjectStore(url_or_path)
    path = unquote(rest.removeprefix("localhost"))
    if scheme == "file" and path.startswith("/") and "\0" not in path:
        return local.LocalStore(path)
    msg = f"no store for {url_or_path!r}"
    remedy = (
        "give a local path, file:///absolute/path, memory://NAME, s3://bucket/prefix, gs://bucket/prefix or az://container/prefix"
    )
    raise BadArgument(msg, remedy=remedy)
