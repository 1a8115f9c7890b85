"""The tap's C++ as a layer ("native"): the same face as `Writer`, whose stores happen in `native.cpp`; and `Work.wait`, replaced by one that is seen.

A ring that was given to C++ is kept mapped for ever: a callback of an old operation may still come.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch.distributed as dist
from torch._C._distributed_c10d import Work

from ckptd.monitor import tap_build
from ckptd.monitor.ring import Ring

WORK: Any = Work
DEVICE_EVERY = 8
"""One in so many operations of a group on a device is timed by events."""
_kept: list[Ring] = []


class NativeWriter:
    """Writes through the module. See tap_writer.Writer for what each does."""

    def __init__(self, module: Any, ring: Ring) -> None:
        self.module = module
        self.use(ring)

    def use(self, ring: Ring) -> None:
        """Write here from now on."""
        self.ring = ring
        _kept.append(ring)
        self.module.use(np.frombuffer(ring.memory, np.uint8, 1).ctypes.data, ring.capacity)

    @property
    def off(self) -> bool:
        """Whether nothing is written."""
        return bool(self.module.is_off())

    @off.setter
    def off(self, value: bool) -> None:
        self.module.set_off(value)

    @property
    def records(self) -> int:
        """Records claimed so far."""
        return int(self.module.records())

    def mark(self, kind: int, began_ns: int, ended_ns: int, value: int = 0, flags: int = 0) -> None:
        """An interval of the step's life."""
        self.module.mark(kind, began_ns, ended_ns, value, flags)

    def step(self, number: int | None, cpu_us: int = 0, delay_us: int = 0) -> None:
        """A step ended, in which the thread used a processor, and waited for one, for so long (0 and 0: not known)."""
        self.module.step(-1 if number is None else number, cpu_us, delay_us)

    def phase(self, kind: int, since_ns: int | None) -> None:
        """An interval of this kind is open since then; None: no more."""
        self.module.phase(kind, since_ns or 0)

    def error(self) -> int:
        """Count a failure of the tap."""
        return int(self.module.error())

    def thread(self, native_id: int) -> None:
        """The thread that trains."""
        self.ring.header["thread"] = native_id


class Native:
    """The layer."""

    def __init__(self, ring: Ring) -> None:
        self.module = tap_build.load()
        self.writer = NativeWriter(self.module, ring)
        self.module.sample(DEVICE_EVERY)
        self._remove: list[Callable[[], None]] = []
        for group, ranks in dist.distributed_c10d._world.pg_group_ranks.items():  # noqa: SLF001  the public question takes one group at a time
            if hasattr(group, "group_name"):  # a group that this rank is not in is a number here
                self._hint(group.group_name, [rank for rank, _ in sorted(ranks.items(), key=lambda item: item[1])])
        self._watch_groups()
        self.module.install()
        self._original: Any = WORK.wait
        self._wait = self.module.method(Work)
        WORK.wait = self._wait
        atexit.register(self.module.stop)

    def coalesced(self, by: int) -> None:
        """A coalesced batch begins (1) or ended (-1)."""
        self.module.coalesce(by)

    def captured(self, by: int) -> None:
        """The capture of a CUDA graph begins (1) or ended (-1)."""
        self.module.capture(by)

    def last(self, work: Any, *, device: bool) -> None:
        """The work of a coalesced batch: its wait is its last operation's."""
        self.module.link(work, max(self.writer.records - 1, 0), device)

    def _hint(self, name: str, ranks: Sequence[int]) -> None:
        if ranks:
            self.module.hint(name, list(ranks))

    def _watch_groups(self) -> None:
        """Members of groups to come. Backends say theirs too, but not all of them, and not behind TORCH_DISTRIBUTED_DEBUG=DETAIL."""
        c10d: Any = dist.distributed_c10d
        original = getattr(c10d, "_new_process_group_helper", None)
        if original is None:
            return
        signature = inspect.signature(original)

        @functools.wraps(original)
        def making(*args: Any, **options: Any) -> Any:
            with contextlib.suppress(Exception):
                given = signature.bind(*args, **options).arguments
                self._hint(given["group_name"], given["global_ranks_in_group"])
            return original(*args, **options)

        c10d._new_process_group_helper = making  # noqa: SLF001  torch has no public name for it; the attach's self-test says if it is gone

        def undo() -> None:
            if c10d._new_process_group_helper is making:  # noqa: SLF001  torch has no public name for it; the attach's self-test says if it is gone
                c10d._new_process_group_helper = original  # noqa: SLF001  torch has no public name for it; the attach's self-test says if it is gone

        self._remove.append(undo)

    def remove(self) -> None:
        """As before."""
        self.module.remove()
        if WORK.wait is self._wait or getattr(WORK, "wait", None) == self._wait:
            WORK.wait = self._original
        for undo in self._remove:
            undo()
