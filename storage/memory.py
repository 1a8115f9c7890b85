"""MemoryStore: a dict behind a lock, the reference that the contract suite is written against. Nothing outlives the process.

Invariant: a value in the dict is never changed after it was put; readers copy out of it without holding the lock.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator

from ckptd.errors import BadArgument, NotFound, StoreFailed
from ckptd.storage import Data, Stat, Writer, check_name, parts_of

__all__ = ["MemoryStore", "shared"]


class MemoryStore:
    """A `Store` in this process's memory."""

    def __init__(self, label: str = "") -> None:
        self._label = label
        self._lock = threading.Lock()
        self._objects: dict[str, bytes] = {}

    def __str__(self) -> str:
        return f"memory://{self._label}"

    def put(self, name: str, data: Data, *, exclusive: bool = False) -> None:
        """See `Store.put`."""
        check_name(name)
        value = b"".join(parts_of(data))
        with self._lock:
            if exclusive and name in self._objects:
                msg = f"{self}/{name} exists already"
                raise StoreFailed(msg)
            self._objects[name] = value

    def get(self, name: str, begin: int, into: memoryview) -> None:
        """See `Store.get`."""
        value = self._value(name)
        if begin < 0 or into.readonly:
            msg = f"{name}: cannot read from byte {begin} into {'read-only ' if into.readonly else ''}memory"
            raise BadArgument(msg)
        part = memoryview(value)[begin : begin + into.nbytes]
        if len(part) != into.nbytes:
            msg = f"{self}/{name}: short read: {len(part)} of {into.nbytes} bytes at byte {begin}"
            raise StoreFailed(msg)
        if part:
            into.cast("B")[:] = part

    def list(self, prefix: str) -> Iterator[Stat]:
        """See `Store.list`."""
        start = "/".join([*check_name(prefix), ""]) if prefix else ""
        with self._lock:
            found = [Stat(n, len(v)) for n, v in self._objects.items() if n.startswith(start)]
        return iter(sorted(found))

    def delete(self, name: str) -> None:
        """See `Store.delete`."""
        check_name(name)
        with self._lock:
            self._objects.pop(name, None)

    def stat(self, name: str) -> Stat:
        """See `Store.stat`."""
        return Stat(name, len(self._value(name)))

    def stream(self, name: str) -> Writer:
        """See `Streaming.stream`."""
        check_name(name)
        return _MemoryWriter(self, name)

    def _value(self, name: str) -> bytes:
        check_name(name)
        with self._lock:
            value = self._objects.get(name)
        if value is None:
            msg = f"{self}/{name} does not exist"
            raise NotFound(msg)
        return value


class _MemoryWriter(Writer):
    def __init__(self, store: MemoryStore, name: str) -> None:
        super().__init__(f"{store}/{name}")
        self._store, self._name = store, name
        self._written = bytearray()

    def _write(self, data: memoryview) -> None:
        self._written += data

    def _commit(self) -> None:
        self._store.put(self._name, self._written)

    def _abort(self) -> None:
        self._written = bytearray()


_shared: dict[str, MemoryStore] = {}
_shared_lock = threading.Lock()


def shared(label: str) -> MemoryStore:
    """The store that every caller in this process gets for `label`."""
    with _shared_lock:
        return _shared.setdefault(label, MemoryStore(label))
