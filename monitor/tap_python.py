"""The tap without C++ (layer "python"): each kind of caller is seen where that costs least.

- Python calls methods of ProcessGroup, which are replaced (`tap_methods`).
- Functional collectives are operators of their own, with kernels in Python (`tap_kernels.Functional`).
- DDP's reducer and its like call c10d's operators from C++. Kernels in Python there are passed by all callers, and cost torch more than all else of the tap, so the layer is "light",
  without them, until somebody is about to call operators, and then "whole" (`tap_kernels.Operators`): a reducer is made, or one of what DDP calls before it; a group whose class is
  written in Python is used; an operator of LIBRARIES is looked up. What called one without any of this (inductor's C++ wrapper, an operator that was looked up before the tap was
  attached) is seen only from then on.

Where the dispatcher takes no kernels of ours, methods are left (layer "patched"). All members of a job come to the same: each operation is recorded once, by whoever sees it first.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import threading
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch._C import _distributed_c10d as c10d

from ckptd.monitor.tap_kernels import Functional, Operators
from ckptd.monitor.tap_methods import Methods
from ckptd.monitor.tap_seen import Seen, Waits

CALLERS = ("_broadcast_coalesced", "_verify_params_across_processes")
"""Functions of C++ that call operators; DDP does before it makes its reducer."""
LIBRARIES = ("c10d", "_c10d_functional_autograd", "_dtensor")
"""Of operators that Python may call, and that call c10d's from C++."""


class _Asked(type(torch.ops.c10d)):  # type: ignore[misc]  # torch's own class, which has no public name: dynamo knows libraries by it
    """A library of operators, as `torch.ops` has it, that tells before it gives one."""

    def __init__(self, library: Any, tell: Callable[[], None]) -> None:
        super().__init__(library.name)
        self._library, self._tell, self._dir = library, tell, library._dir  # noqa: SLF001  what it lists is listed here

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("__"):
            self._tell()
        return getattr(self._library, name)


class Layer:
    """What both layers are."""

    def __init__(self, seen: Seen) -> None:
        self.seen, self.writer = seen, seen.writer
        self.coalesced, self.captured, self.last = seen.coalesced, seen.captured, seen.last
        self._parts: list[Any] = [Methods(seen, self.subclassed), Waits(seen)]

    def subclassed(self) -> None:
        """A group whose class is written in Python is used."""

    def remove(self) -> None:
        """As before."""
        for part in reversed(self._parts):
            part.remove()


class Patched(Layer):
    """Layer "patched": calls from C++ (DDP's reducer, functional collectives) pass it by."""


class Python(Layer):
    """Layer "python"."""

    def __init__(self, seen: Seen) -> None:
        self._lock = threading.Lock()
        self._operators: Operators | None = None
        self._undo: list[Callable[[], None]] = []
        self._c10d = torch.ops.c10d
        super().__init__(seen)
        try:
            self._parts.append(Functional(seen, self.announced))
            for owner, name in (*((module, name) for module in (c10d, dist) for name in CALLERS), (c10d.Reducer, "__init__")):
                self._announce(owner, name)
            for name in LIBRARIES:
                self._announce_library(name)
        except BaseException:
            self.remove()
            raise

    def subclassed(self) -> None:
        """What such a group hands to torch's own methods is seen as operators."""
        self.announced()

    def announced(self) -> None:
        """`whole`, for those that may not be disturbed."""
        if self._operators is None and not self.writer.off:
            try:
                self.whole()
            except Exception:  # noqa: BLE001  counted; never into the user's code
                self.seen.failed()

    def whole(self) -> None:
        """Somebody is about to call operators, not methods: from here on they have kernels."""
        with self._lock:
            if self._operators is None:
                self._operators = Operators(self.seen, self._c10d)

    def light(self) -> None:
        """Without kernels of operators again."""
        with self._lock:
            if self._operators is not None:
                self._operators.remove()
                self._operators = None

    def trial(self, group: Any) -> None:
        """A broadcast out of C++; whether it is seen, the ring says."""
        c10d._broadcast_coalesced(group, [torch.zeros(3)], 1 << 10, 0)  # noqa: SLF001  DDP's own way
        self.light()
        # A reducer may have been there before us. (`isinstance` would run code of what only poses as an object, and what is frozen is not listed.)
        if gc.get_freeze_count() or any(issubclass(type(x), torch.nn.parallel.DistributedDataParallel) for x in gc.get_objects()):
            self.whole()

    def _announce(self, owner: Any, name: str) -> None:
        """A call of this makes the layer whole."""
        original = getattr(owner, name, None)
        if original is None:
            return

        @functools.wraps(original)
        def announced(*args: Any, **options: Any) -> Any:
            self.announced()
            return original(*args, **options)

        setattr(owner, name, announced)
        self._undo.append(lambda: setattr(owner, name, original) if getattr(owner, name, None) is announced else None)

    def _announce_library(self, name: str) -> None:
        """Whoever looks for an operator of this library is about to call it."""
        library = getattr(torch.ops, name)
        asked = _Asked(library, self.announced)
        vars(torch.ops)[name] = asked
        self._undo.append(lambda: vars(torch.ops).update({name: library}) if vars(torch.ops).get(name) is asked else None)

    def remove(self) -> None:
        """As before."""
        for undo in reversed(self._undo):
            with contextlib.suppress(Exception):
                undo()
        self.light()
        super().remove()
