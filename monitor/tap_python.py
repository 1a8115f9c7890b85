"""The tap without C++ (layer "python"): each kind of caller is seen where that costs least.

- Python calls methods of ProcessGroup, which are replaced (`tap_methods`).
- Functional collectives are operators of their own, with kernels in Python (`tap_kernels.Functional`).
- DDP's reducer and its like call c10d's operators from C++. Kernels in Python there are passed by all callers, and cost torch more than all else of the tap, so they come with the
  first reducer (`tap_kernels.Operators`): its making, and what DDP calls before it, is seen. C++ that calls operators and says so to nobody (inductor's C++ wrapper)
  is seen only from then on.

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


class Layer:
    """What both layers are."""

    def __init__(self, seen: Seen) -> None:
        self.seen, self.writer = seen, seen.writer
        self.coalesced, self.captured, self.last = seen.coalesced, seen.captured, seen.last
        self._parts: list[Any] = [Methods(seen), Waits(seen)]

    def remove(self) -> None:
        """As before."""
        for part in reversed(self._parts):
            part.remove()


class Patched(Layer):
    """Layer "patched": calls from C++ (DDP's reducer, functional collectives) pass it by."""


class Python(Layer):
    """Layer "python"."""

    def __init__(self, seen: Seen) -> None:
        super().__init__(seen)
        self._lock = threading.Lock()
        self._operators: Operators | None = None
        self._undo: list[Callable[[], None]] = []
        try:
            self._parts.append(Functional(seen, self.whole))
            for module in (c10d, dist):
                for name in CALLERS:
                    self._announce(module, name)
            self._announce(getattr(c10d, "Reducer", None), "__init__")
        except BaseException:
            self.remove()
            raise

    def whole(self) -> None:
        """Somebody in C++ is about to call operators: from here on they have kernels."""
        with self._lock:
            if self._operators is None:
                self._operators = Operators(self.seen)

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
        if any(issubclass(type(x), torch.nn.parallel.DistributedDataParallel) for x in gc.get_objects()):
            self.whole()  # a reducer was there before us; `isinstance` would run code of what only poses as an object

    def _announce(self, owner: Any, name: str) -> None:
        """A call of this makes the layer whole."""
        original = getattr(owner, name, None)
        if original is None:
            return

        @functools.wraps(original)
        def announced(*args: Any, **options: Any) -> Any:
            try:
                self.whole()
            except Exception:  # noqa: BLE001  counted; never into the user's code
                self.seen.failed()
            return original(*args, **options)

        setattr(owner, name, announced)
        self._undo.append(lambda: setattr(owner, name, original))

    def remove(self) -> None:
        """As before."""
        for undo in reversed(self._undo):
            with contextlib.suppress(Exception):
                undo()
        self.light()
        super().remove()
