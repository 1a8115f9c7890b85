"""Ports for servers that others will start."""

from __future__ import annotations

import contextlib
import random
import socket
from pathlib import Path


def free_ports(count: int) -> list[int]:
    """Ports below those that the kernel gives to outgoing connections: one of these could take it before the server listens there."""
    first = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    found: set[int] = set()
    while len(found) < count:
        with socket.socket() as s, contextlib.suppress(OSError):
            s.bind(("127.0.0.1", random.SystemRandom().randrange(first - 16_000, first) if first > 20_000 else 0))
            found.add(s.getsockname()[1])
    return [*found]


def free_port() -> int:
    """One of these."""
    return free_ports(1)[0]
