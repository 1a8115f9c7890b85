"""`ckptd verify`."""

from __future__ import annotations

from typing import Any


def add_parser(verbs: Any) -> None:
    """The verb's arguments."""
    verbs.add_parser("verify")
