"""A real headless Chromium, driven through chromedriver by the W3C WebDriver protocol: plain HTTP, so no library is needed."""

from __future__ import annotations

import base64
import contextlib
import json
import shutil
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from tests.ports import free_port

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
ARGS = [
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update",
    "--disable-sync", "--disable-dev-shm-usage", "--hide-scrollbars", "--disable-extensions", "--disable-default-apps", "--disable-features=Translate,MediaRouter",
]  # fmt: skip


class Browser:
    """One session."""

    def __init__(self, port: int) -> None:
        self._base = f"http://127.0.0.1:{port}"
        self._session = ""

    def call(self, method: str, path: str, body=None, timeout_s: float = 60):
        data = json.dumps(body or {}).encode() if method == "POST" else None
        request = urllib.request.Request(f"{self._base}{path}", data, {"Content-Type": "application/json"}, method=method)
        try:
            with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=timeout_s) as answer:
                return json.load(answer)["value"]
        except urllib.error.HTTPError as e:
            raise AssertionError(e.read().decode()[:1000]) from e

    def begin(self, profile: Path) -> None:
        options = {"binary": CHROMIUM, "args": [*ARGS, f"--user-data-dir={profile}", "--window-size=1280,900"]}
        wish = {"capabilities": {"alwaysMatch": {"browserName": "chrome", "goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}}}
        self._session = f"/session/{self.call('POST', '/session', wish)['sessionId']}"

    def end(self) -> None:
        if self._session:
            with contextlib.suppress(OSError, AssertionError):
                self.call("DELETE", self._session)

    def go(self, url: str) -> None:
        self.call("POST", f"{self._session}/url", {"url": url})

    def js(self, script: str, *args):
        """The value of a function body."""
        return self.call("POST", f"{self._session}/execute/sync", {"script": script, "args": list(args)})

    def wait(self, condition: str, timeout_s: float = 30) -> None:
        """Until an expression is true."""
        deadline_s = time.monotonic() + timeout_s
        while not self.js(f"return !!({condition})"):
            assert time.monotonic() < deadline_s, f"{condition}: never; {self.js('return document.body.innerText')[:500]}"
            time.sleep(0.05)

    def size(self, width: int, height: int) -> None:
        self.call("POST", f"{self._session}/window/rect", {"width": width, "height": height})

    def click(self, selector: str) -> None:
        (found,) = self.call("POST", f"{self._session}/element", {"using": "css selector", "value": selector}).values()
        self.call("POST", f"{self._session}/element/{found}/click")

    def shot(self, path: Path) -> None:
        """The window as PNG."""
        path.write_bytes(base64.b64decode(self.call("GET", f"{self._session}/screenshot")))

    def console(self) -> list[str]:
        """What the browser logged since the last call: errors of scripts, refusals of the policy."""
        entries = self.call("POST", f"{self._session}/se/log", {"type": "browser"})
        return [e["message"] for e in entries if e["level"] in {"SEVERE", "WARNING"} and "getImageData" not in e["message"]]  # how tests read pixels


@contextlib.contextmanager
def browser(directory: Path):
    """A browser with a new profile; skips where there is none, and says what is missing."""
    missing = [name for name, found in (("chromium", CHROMIUM), ("chromium-driver", DRIVER)) if not found]
    if missing:
        pytest.skip(f"needs Debian's {' and '.join(missing)}")
    port = free_port()
    log = (directory / "chromedriver.log").open("w")
    driver = subprocess.Popen([DRIVER, f"--port={port}"], stdout=log, stderr=log)
    it = Browser(port)
    try:
        deadline_s = time.monotonic() + 30
        while True:
            with contextlib.suppress(OSError):
                if it.call("GET", "/status")["ready"]:
                    break
            assert driver.poll() is None and time.monotonic() < deadline_s, (directory / "chromedriver.log").read_text()
            time.sleep(0.05)
        it.begin(directory / "profile")
        yield it
    finally:
        it.end()
        driver.terminate()
        driver.wait(20)
        log.close()
