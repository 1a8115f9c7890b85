"""ckptd keeps distributed training alive: `attach` in the training loop, a daemon per node, a command line for checkpoints."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ckptd.errors import CkptdError

if TYPE_CHECKING:
    from ckptd.monitor.tap import phase, report_loss
    from ckptd.session import Session, attach

__version__ = "0.1.0"

__all__ = ["CkptdError", "Session", "__version__", "attach", "phase", "report_loss"]


def __getattr__(name: str) -> Any:
    """`attach`, `Session`, `phase` and `report_loss` on first use: `import ckptd` alone imports no torch."""
    if name in {"attach", "Session"}:
        from ckptd import session

        return getattr(session, name)
    if name in {"phase", "report_loss"}:
        import ckptd.monitor.tap

        return getattr(ckptd.monitor.tap, name)
    msg = f"module 'ckptd' has no attribute {name!r}"
    raise AttributeError(msg)
