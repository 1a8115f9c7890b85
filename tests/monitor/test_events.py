"""The event log and webhooks: real files, real receivers, hostile addresses (S27, S29)."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import ssl
import stat
import subprocess
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from ckptd.errors import BadArgument
from ckptd.monitor import events
from ckptd.monitor.events import Forbidden, Log, Webhook, check_address, redacted
from ckptd.monitor.report import Evidence, Verdict

SECRET = "planted-secret-1234"


def verdict(**more):
    values = {
        "id": 1, "job": "job", "attempt": 2, "kind": "compute-slow", "cause": "", "state": "confirmed", "ranks": (3,), "nodes": (1,), "places": ("host, local rank 3",),
        "confidence": 0.9, "since_step": 10, "step": 20, "since_s": 1e9, "detected_s": 1e9 + 5, "slowdown": 0.2,
    }  # fmt: skip
    return Verdict(**values | more)


# --- the log ----------------------------------------------------------------------------------------------------------------


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_one_line_per_event(tmp_path):
    log = Log(tmp_path / "events.jsonl")
    log.put(events.of_verdict(verdict(job='evil\n{"event": "forged"}\u2028<b>'), 1e9))
    log.put(events.of_change("daemon", 1e9 + 1, version="1"))
    assert log.flush(10)
    log.close()
    first, second = lines(tmp_path / "events.jsonl")
    assert (first["event"], first["verdict"]["kind"], first["time"]) == ("verdict", "compute-slow", "2001-09-09T01:46:40.000+00:00")
    assert first["text"].startswith("compute-slow: rank 3 (host, local rank 3), 20% of a step")
    assert second == {"time": "2001-09-09T01:46:41.000+00:00", "event": "daemon", "version": "1"}
    assert stat.S_IMODE((tmp_path / "events.jsonl").stat().st_mode) == 0o600
    assert log.status() | {"to": ""} == {"to": "", "delivered": 2, "failed": 0, "dropped": 0, "waiting": 0, "last_error": ""}


def test_it_is_bounded_and_no_line_is_torn(tmp_path):
    path = tmp_path / "events.jsonl"
    log = Log(path, bytes_max=4000, queue_max=2000)
    for n in range(300):
        log.put({"n": n, "text": "x" * 50})
    assert log.flush(30)
    log.close()
    kept = [e["n"] for e in lines(tmp_path / "events.jsonl.1") + lines(path)]
    assert kept == list(range(kept[0], 300)) and len(kept) > 50
    assert path.stat().st_size <= 4000 and (tmp_path / "events.jsonl.1").stat().st_size <= 4000
    assert sorted(p.name for p in tmp_path.iterdir()) == ["events.jsonl", "events.jsonl.1"]


def test_a_link_or_an_unwritable_place_is_refused(tmp_path):
    (tmp_path / "victim").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "victim")
    for path in (tmp_path / "link", tmp_path / "no" / "where", tmp_path):
        with pytest.raises(BadArgument, match="cannot write the event log"):
            Log(path)
    assert (tmp_path / "victim").read_text() == "mine"


def test_a_full_disk_or_a_pipe_costs_events_only(tmp_path):
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full")
    log = Log("/dev/full")
    log.put({"a": 1})
    assert log.flush(10)
    log.close()
    assert log.failed == 1 and "No space" in log.last_error
    log = Log(tmp_path / "log")
    log.put({"what": object()})
    assert log.failed == 1
    log.close()
    log.put({})
    assert log.dropped == 1


# --- the webhook ------------------------------------------------------------------------------------------------------------


class Receiver:
    """A real HTTP server that remembers what it got, and answers as told."""

    def __init__(self, answers=(200,), location="", cert=None, stall_s=0.0):
        got, answers = [], list(answers)
        self.got = got

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = self.rfile.read(int(self.headers["Content-Length"]))
                got.append((self.path, dict(self.headers), body))
                time.sleep(stall_s)
                with contextlib.suppress(OSError):
                    self.send_response(answers.pop(0) if len(answers) > 1 else answers[0])
                    if location:
                        self.send_header("Location", location)
                    self.end_headers()

            do_GET = do_POST

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        if cert:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(*cert)
            self.server.socket = context.wrap_socket(self.server.socket, server_side=True)
        self.port = self.server.server_address[1]
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02})

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.thread.join(10)
        self.server.server_close()


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(events, "BACKOFF_S", 0.02)


def tell(hook, *told):
    for event in told or ({"event": "test"},):
        hook.put(event)
    assert hook.flush(30)
    hook.close()
    return hook


def test_a_verdict_arrives():
    with Receiver() as receiver:
        hook = tell(Webhook(f"http://127.0.0.1:{receiver.port}/hook?key={SECRET}", allow_private=True), events.of_verdict(verdict(), 1e9))
    ((path, headers, body),) = receiver.got
    assert path == f"/hook?key={SECRET}" and headers["Content-Type"] == "application/json" and headers["Host"] == f"127.0.0.1:{receiver.port}"
    assert json.loads(body)["verdict"]["ranks"] == [3]
    assert (hook.delivered, hook.failed) == (1, 0)
    assert SECRET not in json.dumps(hook.status())


def test_over_tls_with_the_certificate_checked(tmp_path):
    made = subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-keyout", tmp_path / "key", "-out", tmp_path / "cert",
         "-days", "2", "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"], capture_output=True, check=False,
    )  # fmt: skip
    if made.returncode:
        pytest.skip("no openssl")
    resolve = lambda host, port: [(2, 1, 6, "", ("127.0.0.1", port))]
    with Receiver(cert=(tmp_path / "cert", tmp_path / "key")) as receiver:
        more = {"allow_private": True, "tries": 1, "resolve": resolve}
        url = f"https://localhost:{receiver.port}/"
        assert tell(Webhook(url, ca_file=str(tmp_path / "cert"), **more)).delivered == 1
        assert tell(Webhook(url, **more)).failed == 1
        assert tell(Webhook(f"https://other.name:{receiver.port}/", ca_file=str(tmp_path / "cert"), **more)).failed == 1
    assert len(receiver.got) == 1


def test_tries_again_and_gives_up():
    with Receiver([503, 429, 200]) as receiver:
        assert tell(Webhook(f"http://127.0.0.1:{receiver.port}/", allow_private=True)).delivered == 1
    assert len(receiver.got) == 3
    with Receiver([500]) as receiver:
        hook = tell(Webhook(f"http://127.0.0.1:{receiver.port}/", allow_private=True, tries=3))
    assert (len(receiver.got), hook.failed, hook.last_error) == (3, 1, "OSError: the receiver answered 500")
    with Receiver([404]) as receiver:
        assert tell(Webhook(f"http://127.0.0.1:{receiver.port}/", allow_private=True)).failed == 1
    assert len(receiver.got) == 1


@pytest.mark.parametrize("to", ["http://127.0.0.1:{}/other", "file:///etc/passwd", "http://169.254.169.254/latest/meta-data"])
def test_redirects_are_not_followed(to):
    with Receiver() as other, Receiver([302], location=to.format(other.port)) as receiver:
        hook = tell(Webhook(f"http://127.0.0.1:{receiver.port}/", allow_private=True))
    assert (len(receiver.got), other.got, hook.failed) == (1, [], 1) and "redirects" in hook.last_error


def test_a_receiver_that_stalls_or_is_gone_holds_nobody():
    with Receiver(stall_s=1.0) as receiver:
        hook = Webhook(f"http://127.0.0.1:{receiver.port}/", allow_private=True, timeout_s=0.2, tries=1, queue_max=4)
        began_s = time.monotonic()
        for n in range(1000):
            hook.put({"n": n})
        assert time.monotonic() - began_s < 1.0
        assert hook.dropped >= 990 and hook.status()["waiting"] <= 4
        hook.close(0.1)
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    listener.close()
    assert tell(Webhook(f"http://127.0.0.1:{port}/", allow_private=True, tries=2)).failed == 1


def test_an_answer_without_end_is_cut():
    def endless(sock):
        with contextlib.suppress(OSError), sock.accept()[0] as client:
            while True:
                client.sendall(b"X: y\r\n" * 100)

    with socket.create_server(("127.0.0.1", 0)) as sock:
        thread = threading.Thread(target=endless, args=(sock,))
        thread.start()
        hook = tell(Webhook(f"http://127.0.0.1:{sock.getsockname()[1]}/", allow_private=True, tries=1, timeout_s=5))
        thread.join(10)
    assert hook.failed == 1


NEVER = ["169.254.169.254", "[fe80::1]", "[::ffff:169.254.169.254]", "[::ffff:a9fe:a9fe]", "[fd00:ec2::254]", "100.100.100.200", "0.0.0.0", "[::]", "[64:ff9b::a9fe:a9fe]", "[2002:a9fe:a9fe::]", "224.0.0.1", "[::a9fe:a9fe]"]
PRIVATE = ["127.0.0.1", "127.8.8.8", "[::1]", "[::ffff:127.0.0.1]", "10.1.2.3", "172.16.0.1", "192.168.1.1", "[fd00::1]", "[64:ff9b::7f00:1]", "100.64.0.1", "[2002:7f00:1::]", "[::ffff:10.0.0.1]"]


@pytest.mark.parametrize("host", NEVER + PRIVATE)
def test_s27_forbidden_addresses(host):
    with pytest.raises(BadArgument) as caught:
        Webhook(f"https://{host}/{SECRET}")
    assert SECRET not in str(caught.value)
    if host in NEVER:
        with pytest.raises(BadArgument):
            Webhook(f"https://{host}/", allow_private=True)
    else:
        Webhook(f"https://{host}/", allow_private=True)


@pytest.mark.parametrize("host", ["0x7f000001", "2130706433", "017700000001", "127.1", "0x7f.1", "0xa9fea9fe", "2852039166", "0251.0376.0251.0376"])
def test_s27_other_spellings(host):
    """The resolver knows them: what it says is what is checked."""
    hook = tell(Webhook(f"https://{host}/", tries=3, timeout_s=2))
    assert hook.failed == 1 and hook.last_error.startswith("Forbidden: "), hook.last_error


@pytest.mark.parametrize("url", ["file:///etc/passwd", "ftp://example.org/", "gopher://x/", "//x/", "x", "", "https://", "http://example.org/", "https://u:p@example.org/", "https://a b/", "https://x:99999/", "https://[::1/", "https://x/\r\nHost: y", "https://ex\u00e4mple.org/", "HTTPS:///x"])
def test_s27_other_urls(url):
    with pytest.raises(BadArgument) as caught:
        Webhook(url)
    assert "u:p" not in str(caught.value)


def test_s27_a_name_that_flips():
    """Whatever the name says next: the connection goes to what was checked, and one bad answer is enough to go nowhere."""
    asked = []
    with Receiver() as receiver:

        def flips(host, port):
            asked.append(host)
            return [(2, 1, 6, "", (["127.0.0.1", "169.254.169.254"][len(asked) - 1], port))]

        hook = tell(Webhook(f"http://flips.example:{receiver.port}/", allow_private=True, resolve=flips))
        assert (asked, hook.delivered, receiver.got[0][1]["Host"]) == (["flips.example"], 1, f"flips.example:{receiver.port}")
        for addresses in (["127.0.0.1", "169.254.169.254"], ["192.0.2.1", "127.0.0.1"]):
            mixed = lambda host, port, addresses=addresses: [(2, 1, 6, "", (a, port)) for a in addresses]
            hook = tell(Webhook(f"https://mixed.example:{receiver.port}/", resolve=mixed))
            assert hook.failed == 1 and hook.last_error.startswith("Forbidden")
    assert len(receiver.got) == 1


@pytest.mark.parametrize("address", ["8.8.8.8", "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808"])
def test_public_addresses_pass(address):
    check_address(address, allow_private=False)
    with pytest.raises(Forbidden):
        check_address("127.0.0.1", allow_private=False)


def test_s29_no_secret_in_logs(caplog):
    caplog.set_level(logging.DEBUG)
    hook = Webhook(f"https://hooks.example.org/services/{SECRET}?token={SECRET}", tries=1, resolve=lambda h, p: (_ for _ in ()).throw(OSError(f"https://{SECRET}@h/{SECRET}")))
    tell(hook)
    assert hook.failed == 1
    assert SECRET not in caplog.text and SECRET not in json.dumps(hook.status()) and "hooks.example.org" in caplog.text
    assert redacted(f"https://user:{SECRET}@host:8/p/{SECRET}?k={SECRET}#{SECRET}") == "https://host:8/..."
    assert redacted("https://[::1") == "a URL that cannot be read"


def test_a_long_verdict_is_shortened():
    with Receiver() as receiver:
        tell(Webhook(f"http://127.0.0.1:{receiver.port}/", allow_private=True), events.of_verdict(verdict(evidence=(*(Evidence("stack", "x" * 16000) for _ in range(8)),)), 1e9))
    body = json.loads(receiver.got[0][2])
    assert body["shortened"] and body["verdict"]["evidence"] == [] and body["verdict"]["kind"] == "compute-slow"
