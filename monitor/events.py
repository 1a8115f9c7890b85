"""What was concluded, told outside: one JSON line per event in a log of bounded size, and one POST per event to a webhook.

Invariants
- `put` returns at once, whatever disk and network do; what finds no room is dropped, oldest first, and counted;
- an event is plain values; the log is 0600, and opened through no symbolic link;
- a webhook goes where the operator said and nowhere else: a name is resolved once per attempt, all that it gives is checked, and the connection goes to an
  address that was checked (a name that changes its mind in between changes nothing). Redirects are not followed. Link-local addresses, where clouds hand
  out credentials, are refused always; loopback and private ones, and plain HTTP, unless `allow_private`;
- no log, error or status says more of a webhook's URL than its scheme and host: the rest is often the secret.

Threads: `put`, `status` and `close` from any; each Log and each Webhook delivers in one thread of its own.
"""

from __future__ import annotations

import contextlib
import ipaddress
import logging
import os
import re
import socket
import ssl
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, urlsplit

import h11
import msgspec

from ckptd.errors import BadArgument
from ckptd.monitor.report import Verdict

log = logging.getLogger(__name__)

QUEUE_MAX = 256
BYTES_MAX = 16 << 20
BODY_BYTES_MAX = 64 << 10
ANSWER_BYTES_MAX = 64 << 10
BACKOFF_S = 1.0
BACKOFF_MAX_S = 60.0

Event = Mapping[str, Any]
Resolve = Callable[[str, int], list[tuple[Any, ...]]]


def of_verdict(verdict: Verdict, now_s: float) -> dict[str, Any]:
    """The event of a verdict that is new or changed. `now_s`: seconds since the epoch."""
    return {"time": _iso(now_s), "event": "verdict", "text": verdict.text, "verdict": msgspec.to_builtins(verdict)}


def of_change(what: str, now_s: float, **values: Any) -> dict[str, Any]:
    """Any other event: "daemon", "snapshot" ..., with plain values."""
    return {"time": _iso(now_s), "event": what, **values}


def redacted(url: str) -> str:
    """What may be said of a URL: its scheme and host. User, password, path and query may be secrets."""
    try:
        parts = urlsplit(url)
        port = f":{parts.port}" if parts.port else ""
    except ValueError:
        return "a URL that cannot be read"
    return f"{parts.scheme}://{parts.hostname or ''}{port}/..."


_URL = re.compile(r"\b[a-zA-Z][a-zA-Z0-9+.-]*://[^\s\"'<>]+")


def without_urls(text: str) -> str:
    """`text` with every URL in it redacted, for what others' errors say."""
    return _URL.sub(lambda m: redacted(m[0]), text)


def _iso(now_s: float) -> str:
    return datetime.fromtimestamp(now_s, UTC).isoformat(timespec="milliseconds")


# --- a queue and a thread ---------------------------------------------------------------------------------------------------


class Outbox(ABC):
    """Events on their way: a bounded queue, and the thread that delivers them. `dropped`: found no room; `failed`: were given up; `delivered`."""

    def __init__(self, name: str, queue_max: int) -> None:
        self.dropped = self.failed = self.delivered = 0
        self.last_error = ""
        self._name = name
        self._queue: deque[bytes] = deque(maxlen=queue_max)
        self._more = threading.Condition()
        self._closing = threading.Event()
        self._busy = False
        self._thread: threading.Thread | None = None

    def put(self, event: Event) -> None:
        """Take an event; returns at once and never raises."""
        try:
            line = self._encode(event)
        except (TypeError, ValueError, RecursionError) as e:
            self.failed += 1
            self.last_error = f"{type(e).__name__}: {e}"
            return
        with self._more:
            if self._closing.is_set():
                self.dropped += 1
                return
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
                self._thread.start()
            if len(self._queue) == self._queue.maxlen:
                self.dropped += 1
            self._queue.append(line)
            self._more.notify_all()

    def flush(self, timeout_s: float) -> bool:
        """Wait until all is told or given up; whether that came true."""
        with self._more:
            return self._more.wait_for(lambda: not self._queue and not self._busy, timeout_s)

    def close(self, timeout_s: float = 2.0) -> None:
        """Tell what is left, as far as `timeout_s` goes, and end the thread."""
        self.flush(timeout_s)
        self._closing.set()
        with self._more:
            self._more.notify_all()
        if self._thread is not None:
            self._thread.join(timeout_s)

    def status(self) -> dict[str, Any]:
        """Counts, as plain values."""
        return {
            "to": self._name, "delivered": self.delivered, "failed": self.failed, "dropped": self.dropped,
            "waiting": len(self._queue), "last_error": self.last_error,
        }  # fmt: skip

    def _run(self) -> None:
        while True:
            with self._more:
                self._busy = False
                self._more.notify_all()
                self._more.wait_for(lambda: self._queue or self._closing.is_set())
                if self._closing.is_set():
                    self.dropped += len(self._queue)
                    self._queue.clear()
                    return
                line = self._queue.popleft()
                self._busy = True
            try:
                self._deliver(line)
                self.delivered += 1
            except Exception as e:  # noqa: BLE001  the thread outlives whatever disk and network come up with
                self.failed += 1
                self.last_error = without_urls(f"{type(e).__name__}: {e}")
                log.warning("%s: an event was not told: %s", self._name, self.last_error)

    @abstractmethod
    def _encode(self, event: Event) -> bytes: ...

    @abstractmethod
    def _deliver(self, line: bytes) -> None: ...


# --- the log ----------------------------------------------------------------------------------------------------------------


_LINE_ENDS = {sign.encode(): b"\\u%04x" % ord(sign) for sign in "\u0085\u2028\u2029"}
"""What JSON leaves as it is and some readers split lines at."""


class Log(Outbox):
    """Appends events to `path`, one JSON document a line. At `bytes_max` the file becomes `path`.1, and what was that is gone.

    Raises BadArgument if it cannot be opened.
    """

    def __init__(self, path: str | Path, bytes_max: int = BYTES_MAX, queue_max: int = QUEUE_MAX) -> None:
        super().__init__(f"events to {path}", queue_max)
        self._path, self._bytes_max = Path(path), bytes_max
        try:
            os.close(self._open())
        except OSError as e:
            msg = f"cannot write the event log {path}: {e.strerror}"
            raise BadArgument(msg, remedy="give a file in a directory that the daemon may write") from e

    def _open(self) -> int:
        return os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK, 0o600)

    def _encode(self, event: Event) -> bytes:
        line = msgspec.json.encode(event)
        for sign, escaped in _LINE_ENDS.items():
            line = line.replace(sign, escaped)
        return line + b"\n"

    def _deliver(self, line: bytes) -> None:
        # Opened each time: events are rare, and whoever moved or removed the file gets a new one.
        fd = self._open()
        try:
            if (size := os.fstat(fd).st_size) and size + len(line) > self._bytes_max:
                self._path.replace(f"{self._path}.1")
                os.close(fd)
                fd, size = self._open(), 0
            if os.write(fd, line) != len(line):
                os.ftruncate(fd, size)  # a full disk: half a line would spoil the next one
                msg = "no space for an event"
                raise OSError(msg)
        finally:
            os.close(fd)


# --- the webhook ------------------------------------------------------------------------------------------------------------

METADATA = frozenset(ipaddress.ip_address(a) for a in ("169.254.169.254", "fd00:ec2::254", "100.100.100.200", "192.0.0.192", "168.63.129.16"))
"""Where clouds tell a machine its credentials; some of these are not link-local, so no range covers them."""
_NAT64 = ipaddress.ip_network("64:ff9b::/96")


class Forbidden(OSError):
    """An address that webhooks do not go to."""


def check_address(text: str, *, allow_private: bool) -> None:
    """Raises Forbidden for an address that no webhook goes to: by what it is, however it is written or wrapped in IPv6."""
    for address in _unwrapped(ipaddress.ip_address(text.partition("%")[0])):
        never = address.is_link_local or address.is_multicast or address.is_unspecified or address in METADATA
        inside = address.is_loopback or address.is_private or not address.is_global
        if never or (inside and not allow_private):
            msg = f"{address} is {'an address that is never asked' if never else 'loopback or private'}"
            raise Forbidden(msg)


def _unwrapped(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> list[ipaddress.IPv4Address | ipaddress.IPv6Address]:
    """The IPv4 address inside an IPv6 one (mapped, 6to4, Teredo, NAT64), and the address itself unless it only maps one."""
    if isinstance(address, ipaddress.IPv4Address):
        return [address]
    if address.ipv4_mapped is not None:
        return [address.ipv4_mapped]
    inner = [address.sixtofour, *(address.teredo or ())]
    if address in _NAT64 or (int(address) >> 32 == 0 and int(address) > 1):
        inner.append(ipaddress.IPv4Address(int(address) & 0xFFFFFFFF))
    return [address, *(a for a in inner if a is not None)]


class Webhook(Outbox):
    """POSTs events to `url` as JSON. Tried `tries` times with back-off, each try within `timeout_s`.

    `allow_private`: also to loopback and private addresses, and over plain HTTP. `ca_file`: certificates to believe instead of the system's. Raises BadArgument.
    """

    def __init__(
        self,
        url: str,
        *,
        allow_private: bool = False,
        timeout_s: float = 5.0,
        tries: int = 5,
        queue_max: int = QUEUE_MAX,
        ca_file: str = "",
        resolve: Resolve | None = None,
    ) -> None:
        super().__init__(f"webhook {redacted(url)}", queue_max)
        self._url = _checked(url, allow_private=allow_private)
        self._allow_private, self._timeout_s, self._tries = allow_private, timeout_s, tries
        self._resolve = resolve or (lambda host, port: socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
        self._tls: ssl.SSLContext | None = None
        if self._url.scheme == "https":
            try:
                self._tls = ssl.create_default_context(cafile=ca_file or None)
            except OSError as e:
                msg = f"cannot read the certificates in {ca_file}"
                raise BadArgument(msg, remedy="give a file of certificates in PEM form") from e

    def _encode(self, event: Event) -> bytes:
        body = msgspec.json.encode(event)
        if len(body) > BODY_BYTES_MAX and "verdict" in event:  # stacks are long: the log and the page have them
            body = msgspec.json.encode({**event, "verdict": {**event["verdict"], "evidence": []}, "shortened": True})
        if len(body) > BODY_BYTES_MAX:
            msg = f"an event of {len(body)} bytes is too long for a webhook"
            raise ValueError(msg)
        return body

    def _deliver(self, line: bytes) -> None:
        for left in range(self._tries - 1, -1, -1):
            try:
                status = self._post(line)
            except Forbidden:
                raise
            except (OSError, h11.ProtocolError) as e:
                if not left:
                    raise
                self.last_error = without_urls(f"{type(e).__name__}: {e}")
            else:
                if 200 <= status < 300:
                    return
                if not left or not (status >= 500 or status in {408, 429}):
                    msg = f"the receiver answered {status}{', redirects are not followed' if 300 <= status < 400 else ''}"
                    raise OSError(msg)
            tried = self._tries - left
            if self._closing.wait(min(BACKOFF_S * 2 ** (tried - 1), BACKOFF_MAX_S)):
                msg = "closed before it was told"
                raise OSError(msg)

    def _post(self, body: bytes) -> int:
        """One try; the status that came back."""
        deadline_s = time.monotonic() + self._timeout_s
        with self._connect(deadline_s) as sock:
            connection = h11.Connection(h11.CLIENT)
            host = self._url.netloc
            headers = [("Host", host), ("User-Agent", "ckptd"), ("Content-Type", "application/json"), ("Content-Length", str(len(body))), ("Connection", "close")]
            target = (self._url.path or "/") + (f"?{self._url.query}" if self._url.query else "")
            for event in (h11.Request(method="POST", target=target, headers=headers), h11.Data(data=body), h11.EndOfMessage()):
                sock.settimeout(_left_s(deadline_s))
                sock.sendall(connection.send(event) or b"")
            return _status(connection, sock, deadline_s)

    def _connect(self, deadline_s: float) -> socket.socket:
        """Connect to an address that was resolved and checked here, and to no other."""
        host, port = self._url.hostname or "", self._url.port or (443 if self._tls else 80)
        found = self._resolve(host, port)
        addresses = list(dict.fromkeys(str(entry[4][0]) for entry in found))
        for address in addresses:  # all of them: a name that gives one forbidden address is not to be trusted with the others
            check_address(address, allow_private=self._allow_private)
        error: OSError = OSError(f"{host} has no address")
        for address in addresses[:4]:
            try:
                sock = socket.create_connection((address, port), _left_s(deadline_s))
            except OSError as e:
                error = e
                continue
            try:
                sock.settimeout(_left_s(deadline_s))
                return self._tls.wrap_socket(sock, server_hostname=host) if self._tls else sock
            except BaseException:
                sock.close()
                raise
        raise error


def _checked(url: str, *, allow_private: bool) -> SplitResult:
    """The parts of a URL that a webhook may have. Raises BadArgument."""
    shown = redacted(url)
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError as e:
        msg = f"webhook {shown}: not a URL"
        raise BadArgument(msg, remedy="give https://host/path") from e
    if parts.scheme not in {"https", "http"} or not host or not url.isascii() or not url.isprintable() or " " in url:
        msg = f"webhook {shown}: not the URL of a receiver"
        raise BadArgument(msg, remedy="give https://host/path")
    if parts.scheme == "http" and not allow_private:
        msg = f"webhook {shown}: plain HTTP"
        raise BadArgument(msg, remedy="give an https:// URL; plain HTTP goes to private receivers only, when they are allowed")
    if "@" in parts.netloc:
        msg = f"webhook {shown}: user and password in a URL"
        raise BadArgument(msg, remedy="give the receiver's secret in the path or the query; none of it is logged")
    with contextlib.suppress(ValueError):  # a name: looked at when it is resolved
        try:
            check_address(host, allow_private=allow_private)
        except Forbidden as e:
            msg = f"webhook {shown}: {e}"
            raise BadArgument(msg, remedy="private receivers have to be allowed explicitly; link-local ones never are") from e
    return parts


def _left_s(deadline_s: float) -> float:
    left_s = deadline_s - time.monotonic()
    if left_s <= 0:
        raise TimeoutError
    return left_s


def _status(connection: h11.Connection, sock: socket.socket, deadline_s: float) -> int:
    """The status of the answer; of its body nothing is wanted."""
    taken = 0
    while True:
        event = connection.next_event()
        if isinstance(event, h11.Response):
            return event.status_code
        if event is h11.NEED_DATA:
            sock.settimeout(_left_s(deadline_s))
            data = sock.recv(4096)
            taken += len(data)
            if taken > ANSWER_BYTES_MAX:
                msg = "the receiver answers without end"
                raise OSError(msg)
            connection.receive_data(data)
        elif not isinstance(event, h11.InformationalResponse):
            msg = "the receiver hung up"
            raise OSError(msg)
