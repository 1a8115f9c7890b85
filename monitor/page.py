"""The page that the daemon serves: one document with its style and its script, which asks for /api/status again and again. No build step, nothing from elsewhere.

Its content security policy names its own script and style by their hashes: no other script runs, whatever a name holds, and it speaks to its own server only.
All that comes from the daemon is put in as text (monitor/page.html).
"""

from __future__ import annotations

import base64
import hashlib
import re
from functools import cache
from importlib import resources

from ckptd.monitor.http import Answer

_INLINE = re.compile(r"<(script|style)>(.*?)</\1>", re.DOTALL)


@cache
def render() -> bytes:
    """The document."""
    return resources.files("ckptd.monitor").joinpath("page.html").read_bytes()


@cache
def policy() -> str:
    """Its Content-Security-Policy."""
    hashes = {kind: base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for kind, text in _INLINE.findall(render().decode())}
    return (
        f"default-src 'none'; script-src 'sha256-{hashes['script']}'; style-src 'sha256-{hashes['style']}'; connect-src 'self'; img-src data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


def answer() -> Answer:
    """What the server gives out for it."""
    return Answer(render(), "text/html; charset=utf-8", headers={"Content-Security-Policy": policy()})
