"""Marks: what else a step is made of. Optimizer, data, garbage collection, checkpoints, evaluation, compilation, a loss that is no number.

A mark is an interval (or a moment) in the rank's own ring; while it is open its bit stands in the header, so that a hang inside a checkpoint is told from others.
What is hooked here is public in torch or Python where that exists: the optimizer's global hooks, `gc.callbacks`, the loader's iterator, `clip_grad_norm_`.

Where a step ends: `session.step(n)` says it, with its number. Without a session the *leading* optimizer does, the first that stepped (of several, one leads; one
that steps twice while the leader does not takes over), if an operation or a millisecond lies since the last.

Threads: marks come from any; the steps from the one that trains. Nothing here raises into its caller, or waits.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from time import monotonic_ns
from typing import Any

import torch
from torch.optim import optimizer as optim

from ckptd.monitor import record, schedstat
from ckptd.monitor.tap_writer import Writer

STEP_MIN_NS = 1_000_000
DATA_MIN_NS = 100_000
GC_MIN_NS = 1_000_000
TAKE_OVER = 2
"""Steps of another optimizer without one of the leader's, after which it leads."""


class Marks:
    """The marks of one tap. `on_step` is called at each boundary, in the thread that trains."""

    def __init__(self, writer: Writer, failed: Callable[[], None], on_step: Callable[[], None]) -> None:
        self.writer: Any = writer
        self.failed = failed
        self.on_step = on_step
        self.numbered = False
        """A session gives the steps their numbers: the optimizers' own ends count no more."""
        self._remove: list[Callable[[], None]] = []
        self._leader: weakref.ref[Any] | None = None
        self._others = 0
        self._last_ns = 0
        self._last_records = 0
        self._optimizer_ns = 0
        self._gc_ns = 0
        self._inside = threading.local()
        self._norm: Any = None
        self._thread = 0
        self._spent = schedstat.Spent()

    def install(self) -> None:
        """Hook everything that is there."""
        for hook in (self._hook_optimizers, self._hook_gc, self._hook_loader, self._hook_clip, self._hook_saves, self._hook_compile):
            try:
                hook()
            except Exception:  # noqa: BLE001  a torch that has it elsewhere: one kind of mark less
                self.failed()

    def remove(self) -> None:
        """Unhook."""
        for undo in reversed(self._remove):
            with contextlib.suppress(Exception):
                undo()
        self._remove.clear()
        self._spent.close()

    # --- steps --------------------------------------------------------------------------------------------------------------

    def step(self, number: int | None) -> None:
        """A step ended; `number`: what the session calls it."""
        if self.writer.off:
            return
        if number is not None:
            self.numbered = True
        self._look_at_norm()
        self.writer.step(number, *self._spent.take())
        if not self._thread:
            self._thread = threading.get_native_id()
            self.writer.thread(self._thread)
        self._last_ns, self._last_records = monotonic_ns(), self.writer.records
        self.on_step()

    def _optimizer_stepped(self, which: Any) -> None:
        leader = self._leader() if self._leader is not None else None
        if leader is None:
            self._leader, leader = weakref.ref(which), which
        if leader is not which:
            self._others += 1
            if self._others < TAKE_OVER:
                return
            self._leader = weakref.ref(which)
        self._others = 0
        if self.numbered:
            return
        if self.writer.records > self._last_records + 1 or monotonic_ns() - self._last_ns > STEP_MIN_NS:  # one is the optimizer's own mark
            self.step(None)

    def _hook_optimizers(self) -> None:
        def before(_optimizer: Any, *_: Any) -> None:
            if not self.writer.off and not self._optimizer_ns:
                self._optimizer_ns = monotonic_ns()
                self.writer.phase(record.OPTIMIZER, self._optimizer_ns)

        def after(optimizer: Any, *_: Any) -> None:
            if self.writer.off:
                return
            try:
                began_ns, self._optimizer_ns = self._optimizer_ns, 0
                if began_ns:
                    self.writer.phase(record.OPTIMIZER, None)
                    self.writer.mark(record.OPTIMIZER, began_ns, monotonic_ns())
                self._optimizer_stepped(optimizer)
            except Exception:  # noqa: BLE001  never into the user's code
                self.failed()

        self._remove.append(optim.register_optimizer_step_pre_hook(before).remove)
        self._remove.append(optim.register_optimizer_step_post_hook(after).remove)

    # --- intervals ----------------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def interval(self, kind: int, value: int = 0, *, least_ns: int = 0) -> Iterator[None]:
        """An interval of this kind; inside another of the same kind it is part of that one."""
        depth = getattr(self._inside, str(kind), 0)
        if depth or self.writer.off:
            yield
            return
        setattr(self._inside, str(kind), 1)
        began_ns = monotonic_ns()
        self.writer.phase(kind, began_ns)
        try:
            yield
        finally:
            setattr(self._inside, str(kind), 0)
            ended_ns = monotonic_ns()
            self.writer.phase(kind, None)
            if ended_ns - began_ns >= least_ns and not self.writer.off:
                self.writer.mark(kind, began_ns, ended_ns, value)

    def _hook_gc(self) -> None:
        def collected(phase: str, info: dict[str, int]) -> None:
            if self.writer.off:
                return
            if phase == "start":
                self._gc_ns = monotonic_ns()
                if info["generation"] == 2:
                    self.writer.phase(record.GC, self._gc_ns)
                return
            began_ns, self._gc_ns = self._gc_ns, 0
            ended_ns = monotonic_ns()
            full = info["generation"] == 2
            if full:
                self.writer.phase(record.GC, None)
            if began_ns and (full or ended_ns - began_ns > GC_MIN_NS):
                self.writer.mark(record.GC, began_ns, ended_ns, info["generation"])

        gc.callbacks.append(collected)
        self._remove.append(lambda: gc.callbacks.remove(collected))

    def _hook_loader(self) -> None:
        from torch.utils.data import dataloader

        self._wrap(dataloader._BaseDataLoaderIter, "__next__", record.DATA, DATA_MIN_NS)  # noqa: SLF001  the loader's iterators have no public base

    def _hook_saves(self) -> None:
        import torch.serialization

        self._wrap(torch.serialization, "save", record.CHECKPOINT, 0)
        self._wrap(torch, "save", record.CHECKPOINT, 0)
        saver = sys.modules.get("torch.distributed.checkpoint.state_dict_saver")
        for module in filter(None, (saver, sys.modules.get("torch.distributed.checkpoint"))):
            for name in ("save", "async_save"):
                self._wrap(module, name, record.CHECKPOINT, 0)

    def _hook_compile(self) -> None:
        def install(callbacks: Any) -> None:
            began: list[int] = []

            def start(*_: Any) -> None:
                if not began:
                    began.append(monotonic_ns())
                    self.writer.phase(record.COMPILE, began[0])

            def end(*_: Any) -> None:
                if began:
                    self.writer.phase(record.COMPILE, None)
                    self.writer.mark(record.COMPILE, began.pop(), monotonic_ns())

            handler = callbacks.callback_handler
            handler.register_start_callback(start)
            handler.register_end_callback(end)
            self._remove += [functools.partial(handler.remove_start_callback, start), functools.partial(handler.remove_end_callback, end)]

        module = sys.modules.get("torch._dynamo.callback")
        if module is not None:
            install(module)
        else:
            self._later = functools.partial(self._look_for_dynamo, install)

    def _look_for_dynamo(self, install: Callable[[Any], None]) -> None:
        """Dynamo is imported when it is first needed, and not by us: looked for at each boundary until it is there."""
        module = sys.modules.get("torch._dynamo.callback")
        if module is not None and hasattr(module, "callback_handler"):
            self._later = None
            install(module)

    def _wrap(self, owner: Any, name: str, kind: int, least_ns: int) -> None:
        """Time a function or method. It stays ours to take back only while nobody replaced it again."""
        original = getattr(owner, name, None)
        if original is None:
            return

        @functools.wraps(original)
        def timed(*args: Any, **options: Any) -> Any:
            with self.interval(kind, least_ns=least_ns):
                return original(*args, **options)

        setattr(owner, name, timed)

        def undo() -> None:
            if getattr(owner, name) is timed:
                setattr(owner, name, original)

        self._remove.append(undo)

    # --- losses -------------------------------------------------------------------------------------------------------------

    def loss(self, value: Any, bit: int = record.BAD_LOSS) -> None:
        """Look at a loss or norm: one that is no number is marked. On a device it is looked at when the next step ends, without waiting."""
        if value is None or self.writer.off:
            return
        if isinstance(value, torch.Tensor) and value.device.type != "cpu":
            self._remember(value, bit)
            return
        x = float(value.detach() if isinstance(value, torch.Tensor) else value)
        if x != x or x in {float("inf"), float("-inf")}:  # noqa: PLR0124  that is what NaN is
            now = monotonic_ns()
            self.writer.mark(record.LOSS, now, now, bit)

    def _remember(self, value: torch.Tensor, bit: int) -> None:
        with torch.no_grad():
            small = torch.empty(value.numel(), dtype=torch.float32, pin_memory=True)
            small.copy_(value.detach().reshape(-1).float(), non_blocking=True)
            event: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record()
        self._pending_losses = [*getattr(self, "_pending_losses", [])[-7:], (event, small, bit)]

    def _look_at_norm(self) -> None:
        if self._later is not None:
            self._later()
        pending = getattr(self, "_pending_losses", None)
        if not pending:
            return
        left = []
        for event, small, bit in pending:
            if event.query():
                for x in small.tolist():
                    self.loss(x, bit)
            else:
                left.append((event, small, bit))
        self._pending_losses = left

    def _hook_clip(self) -> None:
        from torch.nn.utils import clip_grad

        original = clip_grad.clip_grad_norm_

        @functools.wraps(original)
        def clip_grad_norm_(*args: Any, **options: Any) -> Any:
            norm = original(*args, **options)
            try:
                local = norm.to_local() if hasattr(norm, "to_local") else norm
                self.loss(local, record.BAD_GRAD)
            except Exception:  # noqa: BLE001  counted; never into the user's code
                self.failed()
            return norm

        for module in (clip_grad, torch.nn.utils):
            if getattr(module, "clip_grad_norm_", None) is original:
                module.clip_grad_norm_ = clip_grad_norm_  # type: ignore[attr-defined]
                self._remove.append(functools.partial(setattr, module, "clip_grad_norm_", original))

    _later: Callable[[], None] | None = None
