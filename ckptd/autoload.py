"""What torch loads by the entry point `torch.backends` at the end of its import: next to nothing, until this process is a rank of a job.

A rank is known by `init_process_group` succeeding while RANK is in the environment (or CKPTD_TAP asks for a tap): looked at then, not before, for a standby has torch
imported long before it is a worker. torchrun's agent and the workers of data loaders never call it. Nothing here raises, and CKPTD_DISABLE=1 turns it off.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
from typing import Any


def register() -> None:
    """The entry point: put ourselves behind `init_process_group` and `destroy_process_group`, wherever torch has their names already."""
    if os.environ.get("CKPTD_DISABLE", "") == "1":
        return
    with contextlib.suppress(Exception):  # torch would refuse to be imported
        c10d = sys.modules.get("torch.distributed.distributed_c10d")
        if c10d is not None:
            _replace("init_process_group", c10d, _after_init, _before_init)
            _replace("destroy_process_group", c10d, _after_destroy)


def _replace(name: str, owner: Any, after: Any, before: Any = None) -> None:
    original = getattr(owner, name)
    if getattr(original, "_ckptd", False):
        return

    @functools.wraps(original)
    def replaced(*args: Any, **options: Any) -> Any:
        if before is not None:
            with contextlib.suppress(Exception):
                before()
        said = original(*args, **options)
        with contextlib.suppress(Exception):  # never into the user's code
            after()
        return said

    replaced._ckptd = True  # type: ignore[attr-defined]  # noqa: SLF001  a mark of ours on a function of ours, so that it is wrapped once
    for module in [m for n, m in [*sys.modules.items()] if n.startswith("torch.distributed")]:
        if vars(module).get(name) is original:
            setattr(module, name, replaced)


def _is_rank() -> bool:
    return "RANK" in os.environ or os.environ.get("CKPTD_TAP", "0") != "0"


def _before_init() -> None:
    """NCCL takes its profiler plugin with the first communicator, which may be made right here."""
    if _is_rank() and os.environ.get("CKPTD_TAP", "") != "0" and os.path.exists("/dev/nvidiactl"):  # noqa: PTH110  no pathlib for one question in every process that imports torch
        from ckptd.monitor import nccl

        nccl.enable()


def _after_init() -> None:
    if _is_rank():
        from ckptd import tapline

        line = tapline.ensure()
        if line is not None:
            line.tap.finished(over=False)


def _after_destroy() -> None:
    tap = sys.modules.get("ckptd.monitor.tap")
    its = tap.current() if tap is not None else None
    if its is not None and not sys.modules["torch.distributed"].is_initialized():
        its.finished(over=True)
