"""The server of the faces: real sockets, hostile clients (S5, S28)."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import threading
import time
from http.client import HTTPConnection

import pytest

from ckptd.errors import BadArgument
from ckptd.monitor import http
from ckptd.monitor.http import Answer, Server

TOKEN = "0123456789abcdef-planted"


def pages():
    def query(asked):
        return http.json_answer({"query": dict(asked.query)})

    def broken(_):
        raise KeyError("secret detail")

    async def later(_):
        await asyncio.sleep(0.01)
        return Answer(b"later", "text/plain")

    return {
        "/": lambda _: Answer(b"<p>hello", "text/html; charset=utf-8"),
        "/query": query,
        "/broken": broken,
        "/late-broken": lambda _: Answer(lambda: 1 / 0),
        "/later": later,
        "/long": lambda _: Answer(lambda: b"x" * (8 << 20), "text/plain"),
        "/bad": lambda _: (_ for _ in ()).throw(BadArgument("seconds: give a number")),
    }


@contextlib.contextmanager
def serving(**more):
    """A server in a loop of its own; its address."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    server = Server(pages(), **more)
    try:
        asyncio.run_coroutine_threadsafe(server.start(), loop).result(10)
        host, _, port = server.address.rpartition(":")
        yield server, host.strip("[]"), int(port)
    finally:
        asyncio.run_coroutine_threadsafe(server.stop(), loop).result(10)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
        loop.run_until_complete(loop.shutdown_default_executor())
        loop.close()


def ask(port, method="GET", path="/", host="127.0.0.1", headers=None, body=None):
    connection = HTTPConnection(host, port, timeout=20)
    try:
        connection.request(method, path, body=body, headers=headers or {})
        answer = connection.getresponse()
        return answer.status, dict(answer.getheaders()), answer.read()
    finally:
        connection.close()


def raw(port, data, *, timeout_s=20.0):
    """All that comes back for these bytes."""
    with socket.create_connection(("127.0.0.1", port), timeout=timeout_s) as sock:
        sock.sendall(data)
        parts = []
        with contextlib.suppress(ConnectionError):
            while part := sock.recv(1 << 16):
                parts.append(part)
    return b"".join(parts)


def test_pages_are_given_out():
    with serving() as (_, _, port):
        status, headers, body = ask(port)
        assert (status, body, headers["Content-Type"]) == (200, b"<p>hello", "text/html; charset=utf-8")
        assert "default-src 'none'" in headers["Content-Security-Policy"]
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert headers["Cross-Origin-Resource-Policy"] == "same-origin"
        assert not [h for h in headers if h.lower().startswith("access-control")]
        assert json.loads(ask(port, path="/query?a=1&b=%20x&a=2")[2]) == {"query": {"a": "2", "b": " x"}}
        assert ask(port, path="/later")[2] == b"later"
        assert ask(port, path="/nothing")[0] == 404
        assert len(ask(port, path="/long")[2]) == 8 << 20


def test_head_has_the_length_and_no_body():
    with serving() as (_, _, port):
        status, headers, body = ask(port, "HEAD", "/long")
        assert (status, body, headers["Content-Length"]) == (200, b"", str(8 << 20))
        assert ask(port, "HEAD", "/nothing")[0] == 404


def test_a_page_that_fails_tells_the_log_and_not_the_network():
    with serving() as (_, _, port):
        for path in ("/broken", "/late-broken"):
            status, _, body = ask(port, path=path)
            assert status == 500 and b"secret" not in body and b"division" not in body
        status, _, body = ask(port, path="/bad")
        assert status == 400 and b"give a number" in body
        assert ask(port)[0] == 200


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "CONNECT", "BREW"])
def test_it_is_for_reading(method):
    with serving() as (_, _, port):
        status, headers, _ = ask(port, method, headers={"Authorization": f"Bearer {TOKEN}"}, body=b"x" if method in {"POST", "PUT", "PATCH"} else None)
        assert status == 405 and headers["Allow"] == "GET, HEAD"


def test_actions_need_the_token():
    did = []
    with serving(token=TOKEN, actions={"/act": lambda asked: did.append(asked.body) or http.json_answer("done")}) as (_, _, port):
        assert ask(port)[0] == 200  # to read, none is needed
        assert ask(port, "POST", "/act", body=b"1")[0] == 401
        for wrong in ("", "Bearer", "Bearer x", f"Bearer {TOKEN[:-1]}", f"Bearer {TOKEN}\u00e9", f"Basic {TOKEN}"):
            assert ask(port, "POST", "/act", headers={"Authorization": wrong}, body=b"1")[0] == 401, wrong
        right = {"Authorization": f"Bearer {TOKEN}"}
        assert ask(port, "GET", "/act", headers=right)[0] == 405
        assert ask(port, "POST", "/", headers=right)[0] == 405
        assert ask(port, "DELETE", "/act", headers=right)[0] == 405
        assert not did
        assert ask(port, "POST", "/act", headers=right, body=b"1")[0] == 200 and did == [b"1"]
        assert ask(port, "POST", "/act", headers=right, body=b"x" * (http.BODY_BYTES_MAX + 1))[0] == 413 and len(did) == 1
    with serving(actions={"/act": lambda _: did.append(2)}) as (_, _, port):
        assert ask(port, "POST", "/act", body=b"1")[0] == 405 and len(did) == 1


@pytest.mark.parametrize("host", ["evil", "evil.example:80", "localhost.evil.example", "127.0.0.1.nip.io", "[::1].evil", "192.0.2.7", "169.254.169.254", "", "127.0.0.1@evil", "0x7f000001"])
def test_a_name_that_is_not_ours_gets_nothing(host):
    with serving() as (_, _, port):
        status, _, body = ask(port, headers={"Host": host})
        assert status in {400, 421} and b"hello" not in body


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:9", "127.0.0.1", "127.0.0.1:1234", "[::1]:80", "127.8.8.8"])
def test_ours_are_heard(host):
    with serving() as (_, _, port):
        assert ask(port, headers={"Host": host})[0] == 200


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "", "example.org", "localhost.example.org"])
def test_off_loopback_only_if_asked_for(host):
    with pytest.raises(BadArgument, match="network") as caught:
        Server({}, host)
    assert "ssh -L" in caught.value.remedy


def test_off_loopback_addresses_are_heard_and_names_only_if_given():
    with serving(host="0.0.0.0", allow_remote=True, names=("node7",)) as (_, _, port):
        for host, status in (("192.0.2.7:99", 200), ("node7:80", 200), ("evil.example", 421)):
            assert ask(port, headers={"Host": host})[0] == status, host


def test_a_weak_token_and_a_taken_port_are_refused():
    with pytest.raises(BadArgument, match="guessed"):
        Server({}, token="secret")
    with serving() as (_, _, port), pytest.raises(BadArgument, match="cannot serve HTTP"):
        asyncio.run(Server({}, port=port).start())
    with pytest.raises(BadArgument, match="cannot serve HTTP"):
        asyncio.run(Server({}, port=70000).start())


@pytest.mark.parametrize(
    "data",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(200),  # TLS
        b"GET / HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.0\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nHost: evil\r\n\r\n",
        b"GET http://evil/ HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\nContent-Length: 6\r\n\r\nabcde",
        b"GET / HTTP/9.9\r\nHost: localhost\r\n\r\n",
        b"GET /\x00 HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * (1 << 20) + b"\r\n\r\n",
        b"GET /" + b"a" * (1 << 20) + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET /?" + b"a=1&" * 2000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"\r\n" * 100_000,
        b"",
    ],
    ids=["tls", "no-host", "http10", "two-hosts", "absolute", "smuggling", "version", "nul", "long-header", "long-path", "fields", "blank", "nothing"],
)
def test_what_is_no_request_costs_its_connection(data):
    with serving() as (_, _, port):
        if data:
            got = raw(port, data)
            assert b"hello" not in got and (not got or got.startswith((b"HTTP/1.1 4", b"HTTP/1.1 505")))
        else:
            socket.create_connection(("127.0.0.1", port)).close()
        assert ask(port)[0] == 200


def test_slow_clients_cost_others_nothing(monkeypatch):
    """Slow-loris: connections that say a byte now and then, or take no answer; they are bounded, and gone at the deadline (S5)."""
    monkeypatch.setattr(http, "READ_S", 1.0)
    monkeypatch.setattr(http, "WRITE_S", 1.0)
    with serving() as (server, _, port), contextlib.ExitStack() as held:
        slow = [held.enter_context(socket.create_connection(("127.0.0.1", port), timeout=20)) for _ in range(http.CONNECTIONS_MAX - 4)]
        for i, sock in enumerate(slow):
            sock.sendall(b"GET /long HTTP/1.1\r\nHost: localhost\r\n\r\n" if i % 2 and i < 8 else b"GET / HT")
        began_s = time.monotonic()
        assert ask(port)[0] == 200
        assert time.monotonic() - began_s < 5
        deadline_s = time.monotonic() + 20
        while server.refused < len(slow):
            assert time.monotonic() < deadline_s
            time.sleep(0.05)
        flood = [held.enter_context(socket.create_connection(("127.0.0.1", port), timeout=20)) for _ in range(200)]
        assert len(server._tasks) <= http.CONNECTIONS_MAX
        for sock in flood:
            sock.close()
        deadline_s = time.monotonic() + 20
        while True:
            with contextlib.suppress(OSError):
                if ask(port)[0] == 200:
                    break
            assert time.monotonic() < deadline_s
            time.sleep(0.05)


def test_the_loop_is_not_held_while_something_large_is_rendered():
    """Rendering sleeps half a second in its thread; the loop goes on ticking."""
    late = []

    async def main():
        server = Server({"/slow": lambda _: Answer(lambda: time.sleep(0.5) or b"x")})
        await server.start()
        host, _, port = server.address.rpartition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(b"GET /slow HTTP/1.1\r\nHost: localhost\r\n\r\n")
        answer = asyncio.ensure_future(reader.read())
        while not answer.done():
            before_s = time.monotonic()
            await asyncio.sleep(0.01)
            late.append(time.monotonic() - before_s)
        writer.close()
        await server.stop()
        assert (await answer).endswith(b"x")

    asyncio.run(main())
    assert len(late) > 10 and sorted(late)[len(late) // 2] < 0.1
