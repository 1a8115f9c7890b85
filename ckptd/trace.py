"""Marks of a job's life, for measuring recoveries: one JSON line per mark in the file that $CKPTD_TRACE names; nothing without it."""

from __future__ import annotations

import contextlib
import json
import os
import time
from typing import Any


def mark(what: str, **facts: Any) -> None:
    """Append {"t": unix seconds, "what": ..., facts} in one write, so that processes do not mix their lines."""
    path = os.environ.get("CKPTD_TRACE")
    if not path:
        return
    line = json.dumps({"t": time.time(), "what": what, "pid": os.getpid(), **facts}) + "\n"
    with contextlib.suppress(OSError):
        fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            os.write(fd, line.encode())
        finally:
            os.close(fd)
