"""What torch elastic finds by its entry point `torchrun.handlers`, in every process that imports it: next to nothing, until the backend "ckptd" is asked for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def handler(params: Any) -> Any:
    """A rendezvous of backend "ckptd"; see elastic.py."""
    from ckptd import elastic

    return elastic.handler(params)


def backend() -> Callable[[Any], Any]:
    """The entry point: torch elastic calls what this returns."""
    return handler
