"""S27 to S29 on a real daemon: where its webhooks go, who may ask its server, what of the planted secrets comes out anywhere.

The parts are tested where they are: tests/monitor/test_events.py (S27), tests/monitor/test_http.py, test_metrics.py and test_page.py (S28)."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.cli.helpers import COMMAND, ROOT, ckptd
from tests.monitor.statuses import HOSTILE
from tests.monitor.test_watch_daemon import FakeTap

SECRET = "planted-4f9c1e77"
LOAD_S = 60.0
"""Everything here answers at once on a quiet machine."""


def until(true, what):
    deadline_s = time.monotonic() + LOAD_S
    while not (found := true()):
        assert time.monotonic() < deadline_s, what
        time.sleep(0.05)
    return found


@contextlib.contextmanager
def daemon(directory: Path, *options, **env):
    """A daemon with its server; gives its process and the server's port."""
    directory.mkdir(mode=0o700)
    with (directory / "log").open("w") as log:
        process = subprocess.Popen([*COMMAND, "daemon", "--dir", str(directory), *map(str, options)], cwd=ROOT, stdout=log, stderr=log, env=os.environ | env)
    try:
        address = until(lambda: process.poll() is None and (directory / "http.address").exists() and (directory / "daemon.sock").exists() and (directory / "http.address").read_text().strip(), "no server")
        yield process, int(address.rpartition(":")[2])
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            process.wait(LOAD_S)


@contextlib.contextmanager
def receiver():
    """A webhook's other end: what it got."""
    got = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            got.append((self.path, self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield server.server_address[1], got
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def ask(port, path, host="localhost", method="GET"):
    connection = HTTPConnection("127.0.0.1", port, timeout=LOAD_S)
    try:
        connection.request(method, path, headers={"Host": host})
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


TRAINER = """
import sys, time
from pathlib import Path
from tests.monitor.test_watch_daemon import FakeTap
tap = FakeTap(Path(sys.argv[1]), 1, 2, job=sys.argv[2])
for step in range(1, 6): tap.step(step, 0.01)
tap.enter()
print("here", flush=True)
time.sleep(600)
"""


def test_a_death_is_told_everywhere_and_no_secret_anywhere(tmp_path):
    job = "job <img src=x onerror=alert(1)> \u2028"
    with receiver() as (port, got):
        urls = tmp_path / "urls"
        urls.write_text(f"# ours\nhttp://127.0.0.1:{port}/hook/{SECRET}?token={SECRET}\nhttps://169.254.169.254.nip.invalid/{SECRET}\n")
        urls.chmod(0o600)
        options = ["--webhook-file", urls, "--webhook-private", "--record", tmp_path / "runs"]
        with daemon(tmp_path / "d", *options, AWS_SECRET_ACCESS_KEY=SECRET, HTTPS_PROXY=f"http://u:{SECRET}@127.0.0.1:9") as (process, http_port):
            tap = FakeTap(tmp_path / "d", 0, 2, job=job)
            trainer = subprocess.Popen([sys.executable, "-c", TRAINER, str(tmp_path / "d"), job], cwd=ROOT, stdout=subprocess.PIPE, env=os.environ | {"PYTHONPATH": str(ROOT)})
            try:
                assert trainer.stdout.readline() == b"here\n"
                for step in range(1, 6):
                    tap.step(step, 0.01)
                tap.enter()
                time.sleep(1.0)
            finally:
                trainer.kill()
                trainer.wait(LOAD_S)
                trainer.stdout.close()
            until(lambda: any(json.loads(body)["verdict"]["kind"] == "crash" for _, body in got), "no webhook")
            log = tmp_path / "d" / "events.jsonl"
            until(lambda: '"crash"' in log.read_text(), "no event")
            status, body = ask(http_port, "/api/status")
            seen = json.loads(body)["watched"][job]
            assert status == 200 and any(v["kind"] == "crash" and v["ranks"] == [1] for v in seen["verdicts"])
            said = {"status": body, "metrics": ask(http_port, "/metrics")[1], "trace": ask(http_port, "/trace.json")[1], "page": ask(http_port, "/")[1]}
            assert b'kind="crash"' in said["metrics"] and json.loads(said["trace"])["traceEvents"]
            said["command line"] = Path(f"/proc/{process.pid}/cmdline").read_bytes()
            said["ckptd status"] = ckptd("status", "--dir", tmp_path / "d", "--json", timeout=LOAD_S).stdout.encode()
            said["ckptd status, text"] = ckptd("status", "--dir", tmp_path / "d", timeout=LOAD_S).stdout.encode()
            assert b"VERDICT: crash: rank 1" in said["ckptd status, text"]
            tap.close()
        assert {path for path, _ in got} == {f"/hook/{SECRET}?token={SECRET}"}
        said["webhook"] = b"".join(body for _, body in got)
    files = [p for p in [*(tmp_path / "d").rglob("*"), *(tmp_path / "runs").rglob("*")] if p.is_file()]
    assert {"log", "events.jsonl"} <= {p.name for p in files} and any(p.suffix == ".ckptdrec" for p in files)
    said |= {str(p): p.read_bytes() for p in files}
    assert [what for what, text in said.items() if SECRET.encode() in text] == []
    assert (tmp_path / "d" / "events.jsonl").stat().st_mode & 0o077 == 0
    done = ckptd("analyze", tmp_path / "runs", "--json", timeout=LOAD_S)
    (told,) = json.loads(done.stdout)["analyzed"]
    logged = [e["verdict"] for e in map(json.loads, log.read_text().split("\n")[:-1]) if e["event"] == "verdict"]
    assert [(v["kind"], v["ranks"], v["state"]) for v in told["history"]] == [(v["kind"], v["ranks"], v["state"]) for v in logged], "the same verdicts as then"


def test_who_may_ask(tmp_path):
    with daemon(tmp_path / "d") as (_, port):
        for path in ("/", "/metrics", "/api/status", "/trace.json"):
            assert ask(port, path)[0] == 200, path
            for host in ("evil.example", "127.0.0.1.nip.io"):
                status, body = ask(port, path, host)
                assert status == 421 and b"ckptd_" not in body and b"daemon" not in body
            for method in ("POST", "PUT", "DELETE", "OPTIONS"):
                assert ask(port, path, method=method)[0] == 405
        for query in ("x", "-1", "nan", "inf", "1e400"):
            assert ask(port, f"/trace.json?seconds={query}")[0] in {200, 400}, query
        assert ask(port, "/metrics")[0] == 200


def test_names_of_jobs_reach_the_metrics_as_labels(tmp_path):
    from prometheus_client.parser import text_string_to_metric_families

    name = HOSTILE.replace("\x00", "")[:120]
    with daemon(tmp_path / "d") as (_, port):
        tap = FakeTap(tmp_path / "d", 0, 1, job=name)
        tap.step(1, 0.01)
        until(lambda: b"ckptd_tap_records_total" in ask(port, "/metrics")[1], "no tap")
        families = [*text_string_to_metric_families(ask(port, "/metrics")[1].decode())]
        names = {s.labels["job"] for f in families for s in f.samples if "job" in s.labels}
        assert len(names) == 1 and names.pop().startswith("<img src=x onerror=")
        assert all(re.fullmatch(r"ckptd_\w+", s.name) for f in families for s in f.samples)
        tap.close()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--http", "0.0.0.0:0"], "would show the job to the network"),
        (["--http", "[::]:0"], "would show the job to the network"),
        (["--webhook-file", "urls-others"], "0600"),
        (["--webhook-file", "urls-metadata"], "never asked"),
        (["--webhook-file", "urls-plain"], "plain HTTP"),
        (["--webhook-file", "urls-file"], "not the URL of a receiver"),
        (["--webhook-file", "urls-loopback"], "loopback or private"),
    ],
)
def test_s27_s28_what_is_refused_at_the_start(tmp_path, options, says):
    directory = tmp_path / "d"
    directory.mkdir(mode=0o700)
    files = {"others": f"https://example.org/{SECRET}", "metadata": f"https://169.254.169.254/{SECRET}", "plain": f"http://example.org/{SECRET}", "file": "file:///etc/passwd", "loopback": f"https://[::ffff:127.0.0.1]/{SECRET}"}
    for name, url in files.items():
        (tmp_path / f"urls-{name}").write_text(url + "\n")
        (tmp_path / f"urls-{name}").chmod(0o644 if name == "others" else 0o600)
    options = [str(tmp_path / o) if o.startswith("urls-") else o for o in options]
    done = ckptd("daemon", "--dir", directory, *options, timeout=LOAD_S)
    assert done.returncode == 10 and says in done.stderr, done.stderr
    assert SECRET not in done.stderr + done.stdout and "Traceback" not in done.stderr
