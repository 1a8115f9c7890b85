"""What a daemon shows: an HTTP server on loopback (page, metrics, status, trace), a JSON log of verdicts, webhooks, recorded runs.

`monitor/` has the parts; here they are put together and given the daemon's own values. The server is on by default, on any free port of loopback:
`ckptd status` says where, and the file `http.address` beside the socket does.

Invariant: a face that cannot be had costs the face. Only what the operator asked for by an option and cannot have ends the daemon, at its start.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import logging
import os
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ckptd.channel import read_private
from ckptd.errors import BadArgument, CkptdError
from ckptd.monitor import events, health, http, metrics, page, recorded, report, trace_export

if TYPE_CHECKING:
    from ckptd.daemon import Daemon

log = logging.getLogger("ckptd.faces")

URLS_BYTES_MAX = 64 << 10
HEALTH_S = 5.0
"""Between looks at the node's health."""
TRACE_S_DEFAULT, TRACE_S_MAX = 10.0, 600.0


@dataclass(frozen=True, kw_only=True)
class FaceSettings:
    """What is shown, and where."""

    http: str = "127.0.0.1:0"
    """Where the server listens, HOST:PORT (0: any free port); "": nowhere."""
    http_remote: bool = False
    """Allow it off loopback: whoever can reach it can read the job's status."""
    http_names: tuple[str, ...] = ()
    """Host names by which it may be asked, besides loopback's."""
    events: str = ""
    """JSON log of verdicts; "": `events.jsonl` beside the socket."""
    webhook_file: str = ""
    """A file (0600) with one URL a line, to which verdicts are POSTed: in a file, because a URL is often a secret and a command line is not."""
    webhook_private: bool = False
    """Allow webhooks to loopback and private addresses."""
    record: str = ""
    """Directory for recorded runs, which `ckptd analyze` reads; "": none."""


class Faces:
    """All faces of one daemon."""

    def __init__(self, daemon: Daemon, settings: FaceSettings) -> None:
        self._daemon, self._settings = daemon, settings
        self._address_file: Path | None = None
        self._outboxes: list[events.Outbox] = []
        self._server: http.Server | None = None
        self._health = health.Sampler()
        self._gpus: threading.Thread | None = None
        self._gpus_there = importlib.util.find_spec("pynvml") is not None
        self._told: dict[str, Any] = {}
        self._told_s = float("-inf")
        self.last_health: report.Health | None = None

    async def start(self, directory: Path) -> None:
        """`directory`: where the daemon's socket lies. Raises BadArgument for what was asked for and cannot be had."""
        s = self._settings
        if s.record:
            self._daemon.watcher.record_with(lambda header: recorded.Writer(s.record, header))
        try:
            self._outboxes.append(events.Log(s.events or directory / "events.jsonl"))
        except BadArgument as e:
            if s.events:
                raise
            log.warning("%s", e)
        self._outboxes += [events.Webhook(url, allow_private=s.webhook_private) for url in _urls(s.webhook_file)]
        self._daemon.watcher.listeners.append(self._tell)
        if s.http:
            host, port = _address(s.http)
            pages = {
                "/": lambda _: page.answer(),
                "/metrics": self._metrics,
                "/api/status": lambda _: http.json_answer(self._daemon.status()),
                "/trace.json": self._trace,
            }
            self._server = http.Server(pages, host, port, allow_remote=s.http_remote, names=s.http_names)
            await self._server.start()
            self._address_file = directory / "http.address"
            with os.fdopen(os.open(self._address_file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600), "w") as f:
                f.write(self._server.address + "\n")
            log.info("page and metrics at http://%s/", self._server.address)
        await self._feel()
        self._daemon.start(self._look_after_health())

    async def stop(self) -> None:
        """Stop serving; what was concluded is written, within a second or two."""
        if self._server is not None:
            await self._server.stop()
        if self._address_file is not None:
            self._address_file.unlink(missing_ok=True)
        for box in [*self._outboxes, *self._daemon.watcher.recorders()]:
            await asyncio.to_thread(box.close, 1.0)

    def status(self) -> dict[str, Any]:
        """For `ckptd status`: what the daemon takes, and what it shows. Made anew once a second: a flood of questions is answered from the last."""
        now_s = time.monotonic()
        if now_s - self._told_s >= 1.0:
            self._told_s = now_s
            health = None if self.last_health is None else {"values": dict(self.last_health.values), "alarms": dict(self.last_health.alarms)}
            shown = {"http": self._server.address if self._server is not None else "", "outboxes": [box.status() for box in self._outboxes], "health": health}
            self._told = {"process": process(), "faces": shown}
        return self._told

    def _tell(self, job: str, verdict: report.Verdict) -> None:
        for box in self._outboxes:
            box.put(events.of_verdict(verdict, time.time()) | {"job": job})

    async def _look_after_health(self) -> None:
        """The first look is taken before the daemon says that it is ready: what it costs to begin is no growth later."""
        while True:
            await asyncio.sleep(HEALTH_S)
            await self._feel()

    async def _feel(self) -> None:
        if self._gpus_there and (self._gpus is None or not self._gpus.is_alive()):  # a driver that hangs keeps its own thread, and nobody else's
            self._gpus = threading.Thread(target=self._health.sample_gpus, args=(time.monotonic(),), name="ckptd-gpus", daemon=True)
            self._gpus.start()
        with contextlib.suppress(OSError, CkptdError):
            self.last_health = await self._daemon.in_pool(lambda: self._health.sample(time.monotonic()))
            if self.last_health is not None:
                self._daemon.watcher.feels(self.last_health)

    def _metrics(self, asked: http.Asked) -> http.Answer:
        kind = metrics.content_type(asked.headers.get("accept", ""))
        status = self._daemon.status()
        return http.Answer(lambda: metrics.render(status, openmetrics=kind == metrics.OPENMETRICS).encode(), kind)

    def _trace(self, asked: http.Asked) -> http.Answer:
        try:
            seconds = min(TRACE_S_MAX, max(0.1, float(asked.query.get("seconds", TRACE_S_DEFAULT))))
        except ValueError:
            return http.Answer(b'{"error": "seconds is a number"}', status=400)
        windows = self._daemon.watcher.windows(asked.query.get("job"), seconds)
        return http.Answer(lambda: trace_export.render(windows), http.JSON)


def process() -> dict[str, Any]:
    """What this daemon itself takes."""
    times = os.times()
    with contextlib.suppress(OSError, ValueError, IndexError):
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return {"cpu_s": times.user + times.system, "rss_bytes": pages * os.sysconf("SC_PAGE_SIZE")}
    return {"cpu_s": times.user + times.system}


def _address(text: str) -> tuple[str, int]:
    """HOST:PORT. Raises BadArgument."""
    host, colon, port = text.rpartition(":")
    if not colon or not (port.isascii() and port.isdecimal() and int(port) < 1 << 16):
        msg = f"--http {text}: not HOST:PORT"
        raise BadArgument(msg, remedy="for example 127.0.0.1:9411; port 0 takes any that is free")
    return host.strip("[]") or "127.0.0.1", int(port)


def _urls(file: str) -> list[str]:
    """The lines of a file that is ours alone. Raises BadArgument."""
    if not file:
        return []
    lines = read_private("--webhook-file", file, URLS_BYTES_MAX).decode(errors="replace").splitlines()
    return [line.strip() for line in lines if line.strip() and not line.startswith("#")]
