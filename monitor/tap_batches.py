"""What torch does not send through the dispatcher: where a coalesced batch begins and ends, and where a CUDA graph is captured."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch._C._distributed_c10d import ProcessGroup


class Layer(Protocol):
    """What is told."""

    def coalesced(self, by: int) -> None:
        """A coalesced batch begins (1) or ended (-1)."""

    def captured(self, by: int) -> None:
        """A capture begins (1) or ended (-1)."""

    def last(self, work: Any, *, device: bool) -> None:
        """The work of the batch that just ended."""


class Batches:
    """The methods that say so, replaced."""

    def __init__(self, layer: Layer, failed: Callable[[], None]) -> None:
        self._failed = failed
        self._undo: list[Callable[[], None]] = []
        self._wrap(ProcessGroup, "_start_coalescing", before=lambda: layer.coalesced(1))
        self._wrap(ProcessGroup, "_end_coalescing", after=lambda work: self._ended(layer, work))
        graph = getattr(torch.cuda, "CUDAGraph", None)
        if graph is not None and hasattr(graph, "capture_begin"):
            self._wrap(graph, "capture_begin", before=lambda: layer.captured(1), broken=lambda: layer.captured(-1))
            self._wrap(graph, "capture_end", after=lambda _: layer.captured(-1), broken=lambda: layer.captured(-1))

    @staticmethod
    def _ended(layer: Layer, work: Any) -> None:
        layer.coalesced(-1)
        if work is not None:
            layer.last(work, device=True)  # only backends of devices give one

    def _wrap(
        self, owner: Any, name: str, before: Callable[[], None] | None = None, after: Callable[[Any], None] | None = None, broken: Callable[[], None] | None = None
    ) -> None:
        original = getattr(owner, name, None)
        if original is None:
            return

        @functools.wraps(original)
        def told(*args: Any, **options: Any) -> Any:
            self._quietly(before)
            try:
                said = original(*args, **options)
            except BaseException:
                self._quietly(broken)
                raise
            if after is not None:
                self._quietly(functools.partial(after, said))
            return said

        setattr(owner, name, told)
        self._undo.append(lambda: setattr(owner, name, original))

    def _quietly(self, work: Callable[[], None] | None) -> None:
        if work is not None:
            try:
                work()
            except Exception:  # noqa: BLE001  never into the user's code
                self._failed()

    def remove(self) -> None:
        """As before."""
        for undo in reversed(self._undo):
            undo()
