"""The server that gives the faces out: status, metrics, page, trace. Small, on loopback, and for reading.

    socket --h11--> Asked --the page's function, in the loop--> Answer --its body rendered in a thread--> socket

Invariants
- GET and HEAD answer; any other method is 405, but for an action that was given, whose caller presents the token;
- whose Host is a name that is not ours gets nothing: a page elsewhere that rebinds its name to loopback reads nothing (DNS rebinding);
- off loopback it listens only where that was asked for;
- nothing is unbounded: connections, bytes of a request, time to read it, time to take the answer; one request per connection, so none is half another's;
- the loop is held for no longer than a page's function takes; what is large is rendered in a thread, few at a time;
- no cross-origin reader (no CORS, same-origin resource policy), no script but the page's own (content security policy).

HTTP/1.1 is h11's work. Threads: one event loop; `Answer.body` as a function runs in a thread, and gets nothing that changes meanwhile.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import ipaddress
import logging
import re
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qsl

import h11
import msgspec

from ckptd.errors import BadArgument

log = logging.getLogger(__name__)

CONNECTIONS_MAX = 32
HEAD_BYTES_MAX = 16 << 10
BODY_BYTES_MAX = 64 << 10
READ_S = 5.0
"""For the whole request: one byte a second gets nowhere."""
PAGE_S = 30.0
WRITE_S = 30.0
CHUNK_BYTES = 64 << 10
RENDERING_MAX = 2
TOKEN_CHARS_MIN = 16
JSON = "application/json"

_HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}


@dataclass(frozen=True, slots=True)
class Asked:
    """A request that was admitted. `query`: the last value of each name."""

    path: str
    query: Mapping[str, str] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)
    """By lower-case name."""
    body: bytes = b""


@dataclass(frozen=True, slots=True)
class Answer:
    """What is sent. `body` may be a function: it is called in a thread, so it must be given plain values and not the daemon's own."""

    body: bytes | Callable[[], bytes]
    content_type: str = JSON
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)


Page = Callable[[Asked], Answer | Awaitable[Answer]]


_HOST = re.compile(r"(?:\[([0-9A-Fa-f:.]+)\]|([\w.-]+))(?::\d*)?", re.ASCII)
_FAILED = "this page failed; the daemon's log says why"


def json_answer(value: Any) -> Answer:
    """`value` (plain values, not changed any more) as JSON, encoded in a thread."""
    return Answer(lambda: msgspec.json.encode(value))


def _problem(status: int, what: str, **headers: str) -> Answer:
    return Answer(msgspec.json.encode({"error": what}), status=status, headers={k.replace("_", "-"): v for k, v in headers.items()})


class _Refused(Exception):
    def __init__(self, status: int, what: str, **headers: str) -> None:
        super().__init__(what)
        self.answer = _problem(status, what, **headers)


class Server:
    """Serves `pages` by path. `actions`: POSTs by path, for who presents `token` ("Authorization: Bearer ..."); without a token there are none.

    `host`: a loopback address, unless `allow_remote`; `names`: more host names by which it may be asked. Raises BadArgument.
    """

    def __init__(
        self,
        pages: Mapping[str, Page],
        host: str = "127.0.0.1",
        port: int = 0,
        token: str = "",
        *,
        actions: Mapping[str, Page] | None = None,
        allow_remote: bool = False,
        names: tuple[str, ...] = (),
    ) -> None:
        if not _is_loopback(host) and not allow_remote:
            msg = f"serving on {host!r} would show the job to the network"
            raise BadArgument(msg, remedy="serve on 127.0.0.1 and reach it through ssh -L, or allow it explicitly (--http-remote)")
        if token and len(token) < TOKEN_CHARS_MIN:
            msg = f"a token of {len(token)} characters can be guessed"
            raise BadArgument(msg, remedy=f"take at least {TOKEN_CHARS_MIN} random characters")
        self._pages, self._actions = dict(pages), dict(actions or {})
        self._host, self._port, self._token, self._remote = host, port, token, allow_remote
        self._names = {"localhost", *(name.lower() for name in names)}
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._rendering = asyncio.Semaphore(RENDERING_MAX)
        self.refused = 0
        """Connections and requests that were turned away."""

    @property
    def address(self) -> str:
        """"host:port" while it serves, else ""."""
        if self._server is None:
            return ""
        host, port = self._server.sockets[0].getsockname()[:2]
        return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"

    async def start(self) -> None:
        """Listen. Raises BadArgument if the address cannot be had."""
        try:
            self._server = await asyncio.start_server(self._accept, self._host, self._port, limit=HEAD_BYTES_MAX)
        except (OSError, OverflowError) as e:
            msg = f"cannot serve HTTP on {self._host}:{self._port}: {e}"
            raise BadArgument(msg, remedy="take another port, or 0 for any that is free") from e

    async def stop(self) -> None:
        """Stop listening, and end what is under way."""
        if self._server is not None:
            self._server.close()
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            self._server = None

    # --- a connection -------------------------------------------------------------------------------------------------------

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if len(self._tasks) >= CONNECTIONS_MAX:
            self.refused += 1
            writer.transport.abort()
            return
        task = asyncio.get_running_loop().create_task(self._serve(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One request, one answer. Whatever goes wrong ends this connection only."""
        connection = h11.Connection(h11.SERVER, max_incomplete_event_size=HEAD_BYTES_MAX)
        try:
            async with asyncio.timeout(READ_S + PAGE_S):
                request, answer = await self._answer(connection, reader)
                answer, body = await self._rendered(answer)
            async with asyncio.timeout(WRITE_S):
                await self._send(connection, writer, answer, b"" if request.method == b"HEAD" else body, len(body))
                writer.write_eof()
                await _drain_input(reader)
        except (TimeoutError, OSError, EOFError, h11.ProtocolError) as e:
            self.refused += 1
            log.debug("HTTP: %s: %s", type(e).__name__, e)
        finally:
            writer.transport.abort()

    async def _answer(self, connection: h11.Connection, reader: asyncio.StreamReader) -> tuple[h11.Request, Answer]:
        """The request and what to answer; a request that cannot be read is answered too, as far as the protocol lets us."""
        request = h11.Request(method="GET", target="/", headers=[("Host", "?")])
        try:
            async with asyncio.timeout(READ_S):
                request, body = await _read(connection, reader)
            return request, await self._dispatch(request, body)
        except _Refused as e:
            self.refused += 1
            return request, e.answer
        except h11.RemoteProtocolError as e:
            self.refused += 1
            return request, _problem(e.error_status_hint, "not a request that this server reads")

    async def _dispatch(self, request: h11.Request, body: bytes) -> Answer:
        if request.http_version not in {b"1.0", b"1.1"}:
            raise _Refused(505, "HTTP/1.1 is spoken here")
        headers = {k.decode("latin-1"): v.decode("latin-1") for k, v in request.headers}
        self._check_host(headers.get("host"))
        target = request.target.decode("latin-1")
        path, _, query = target.partition("?")
        if not path.startswith("/"):
            raise _Refused(400, "ask for a path")
        page = self._page(request.method.decode("latin-1"), path, headers)
        try:
            asked = Asked(path, dict(parse_qsl(query, max_num_fields=16)), headers, body)
        except ValueError as e:
            raise _Refused(400, "too many fields") from e
        try:
            made = page(asked)
            return made if isinstance(made, Answer) else await made
        except BadArgument as e:
            return _problem(400, e.message)
        except Exception:  # of one page: the server serves on, the asker is told
            log.exception("HTTP: %s failed", path)
            return _problem(500, _FAILED)

    def _page(self, method: str, path: str, headers: Mapping[str, str]) -> Page:
        if method in {"GET", "HEAD"}:
            if path in self._pages:
                return self._pages[path]
            if path not in self._actions:
                raise _Refused(404, "no such page")
        elif self._token:
            given = headers.get("authorization", "").removeprefix("Bearer ")
            if not hmac.compare_digest(given.encode(), self._token.encode()):
                raise _Refused(401, "this needs the token", WWW_Authenticate="Bearer")
            if method == "POST" and path in self._actions:
                return self._actions[path]
        raise _Refused(405, "this server is for reading: GET and HEAD", Allow="GET, HEAD")

    def _check_host(self, host: str | None) -> None:
        """An address cannot be rebound, a name can: only ours are heard. The port may differ (ssh -L)."""
        name = _host_name(host or "")
        try:
            address = ipaddress.ip_address(name)
        except ValueError:
            known = name in self._names
        else:
            known = address.is_loopback or self._remote
        if not known:
            raise _Refused(421, "ask for this server by its address or as localhost")

    async def _rendered(self, answer: Answer) -> tuple[Answer, bytes]:
        if isinstance(answer.body, bytes):
            return answer, answer.body
        async with self._rendering:
            try:
                return answer, await asyncio.to_thread(answer.body)
            except Exception:  # of one page's rendering, likewise
                log.exception("HTTP: rendering failed")
                return await self._rendered(_problem(500, _FAILED))

    async def _send(self, connection: h11.Connection, writer: asyncio.StreamWriter, answer: Answer, body: bytes, length: int) -> None:
        headers = {**_HEADERS, **answer.headers, "Content-Type": answer.content_type, "Content-Length": str(length), "Connection": "close"}
        writer.write(connection.send(h11.Response(status_code=answer.status, headers=list(headers.items()))) or b"")
        for at in range(0, len(body), CHUNK_BYTES):
            writer.write(connection.send(h11.Data(data=body[at : at + CHUNK_BYTES])) or b"")
            await writer.drain()
        connection.send(h11.EndOfMessage())
        await writer.drain()


async def _read(connection: h11.Connection, reader: asyncio.StreamReader) -> tuple[h11.Request, bytes]:
    """One request with its body, all of it bounded. Raises h11.RemoteProtocolError, EOFError, _Refused."""
    request, body = None, bytearray()
    while True:
        event = connection.next_event()
        if event is h11.NEED_DATA:
            data = await reader.read(CHUNK_BYTES)
            connection.receive_data(data)
        elif isinstance(event, h11.Request):
            request = event
        elif isinstance(event, h11.Data):
            body += event.data
            if len(body) > BODY_BYTES_MAX:
                raise _Refused(413, "too long")
        elif isinstance(event, h11.EndOfMessage) and request is not None:
            return request, bytes(body)
        else:
            raise EOFError


async def _drain_input(reader: asyncio.StreamReader) -> None:
    """Until the other end closes, for a moment: closing over unread input would reset the connection, and the answer with it."""
    with contextlib.suppress(TimeoutError, ConnectionError):
        async with asyncio.timeout(1.0):
            for _ in range(16):
                if not await reader.read(CHUNK_BYTES):
                    return


def _host_name(host: str) -> str:
    """The name in a Host header, without its port and an address's brackets; "" of what is none."""
    match = _HOST.fullmatch(host)
    return (match[1] or match[2]).lower() if match else ""


def _is_loopback(host: str) -> bool:
    """Whether to listen there is to listen on this machine only. Of names, only "localhost" is believed."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
