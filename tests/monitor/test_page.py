"""The page in a real headless Chromium, served by the real server: what is shown, nothing from elsewhere, no name that becomes markup (S28)."""

from __future__ import annotations

import asyncio
import re
import threading

import pytest

from ckptd.monitor import http, page
from tests.monitor.browser import browser
from tests.monitor.statuses import HOSTILE, job, status


class Site:
    """The page's server, with the status that a test puts in; remembers what was asked for."""

    def __init__(self) -> None:
        self.status, self.asked = status(), []
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever)
        self.server = http.Server({"/": self._page, "/api/status": self._status})
        self.broken = False

    def _page(self, asked):
        self.asked.append(asked.path)
        return page.answer()

    def _status(self, asked):
        self.asked.append(asked.path)
        return http.Answer(b"{}", status=500) if self.broken else http.json_answer(self.status)

    @property
    def url(self):
        return f"http://{self.server.address}/"


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    with browser(tmp_path_factory.mktemp("browser")) as it:
        yield it


@pytest.fixture
def site():
    it = Site()
    it.thread.start()
    asyncio.run_coroutine_threadsafe(it.server.start(), it.loop).result(10)
    try:
        yield it
    finally:
        asyncio.run_coroutine_threadsafe(it.server.stop(), it.loop).result(10)
        it.loop.call_soon_threadsafe(it.loop.stop)
        it.thread.join(10)
        it.loop.run_until_complete(it.loop.shutdown_default_executor())
        it.loop.close()


def opened(chromium, site, told=None):
    site.status = told if told is not None else status()
    chromium.console()
    chromium.go(site.url)
    chromium.wait("document.body.dataset.ready")
    return chromium


def text(chromium, selector="main"):
    return chromium.js("return document.querySelector(arguments[0]).innerText", selector)


def test_what_is_shown(chromium, site):
    it = opened(chromium, site)
    assert "1 verdict" in text(it, "#tiles") and "compute-slow" in text(it, "#tiles") and "8 / 8" in text(it, "#tiles")
    verdict = text(it, "#verdictlist")
    for part in ("compute-slow", "rank 3", "node0.cluster, local rank 3, GPU 3", "confirmed", "97 % sure", "grave enough to evict", "costs 24 % of a step", "recommended: evict", "1.4 s after it began"):
        assert part in verdict
    waits = text(it, "#waitlist")
    assert "ranks 0–2" in waits and "all_reduce 77" in waits and "rank 3" in waits and "group dp0" in waits
    snapshots = text(it, "#snaplist")
    assert "1059" in snapshots and "✓ stored" in snapshots and "persisting" in snapshots and "any 1 may be lost" in snapshots
    ranks = text(it, "#ranklist")
    assert ranks.count("node0.cluster") == 8 and "25 %" in ranks
    assert "node 0" in text(it, "#nodelist") and "cpu steal" in text(it, "#nodelist")
    assert "last: persisting step 1040" in text(it, "#errors")
    assert it.console() == []
    assert set(site.asked) == {"/", "/api/status"}, "the icon is in the page"


def test_evidence_and_stacks_open_and_stay_open(chromium, site):
    it = opened(chromium, site)
    assert "74.8 ms" not in text(it, "#verdictlist")
    it.click("#verdictlist details:nth-of-type(1) summary")
    it.click("#verdictlist details:nth-of-type(2) summary")
    shown = text(it, "#verdictlist")
    assert "74.8 ms" in shown and "60.1 ms" in shown and "probe: compute of rank 3" in shown and "line 40 in forward" in shown
    told = status()
    told["jobs"]["llama"]["watching"]["verdicts"][0]["confidence"] = 0.5
    site.status = told
    it.wait("document.querySelector('#verdictlist').innerText.includes('50 % sure')")
    assert "line 40 in forward" in text(it, "#verdictlist")


def pixel(it, row, rows, step, steps):
    """The colour of a cell's middle."""
    return it.js(
        "const [r, n, s, m] = arguments, c = document.getElementById('map'), k = devicePixelRatio, x = map.left + (s + 0.5) * map.width / m, y = map.top + (r + 0.5) * map.height / n;"
        "return [...c.getContext('2d').getImageData(Math.round(x * k), Math.round(y * k), 1, 1).data].slice(0, 3)", row, rows, step, steps,
    )  # fmt: skip


def luminance(rgb):
    return 0.2126 * rgb[0] + 0.7152 * rgb[1] + 0.0722 * rgb[2]


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_the_heat_map_shows_the_slow_rank(chromium, site, theme):
    it = opened(chromium, site)
    it.js("document.documentElement.dataset.theme = arguments[0]; draw()", theme)
    slow, before, others = pixel(it, 3, 8, 55, 60), pixel(it, 3, 8, 5, 60), pixel(it, 5, 8, 55, 60)
    assert abs(luminance(slow) - luminance(others)) > 100 and abs(luminance(before) - luminance(others)) < 60
    it.click("#wall")
    assert it.js("return document.getElementById('wall').getAttribute('aria-pressed')") == "true"
    assert "ms" in text(it, "#high") and "duration of each step" in text(it, "#heatnote")
    assert abs(luminance(pixel(it, 5, 8, 55, 60)) - luminance(pixel(it, 5, 8, 5, 60))) > 60, "all ranks are slower since one is"
    it.click("#late")
    assert "of a step" in text(it, "#high")


def test_the_colours_are_in_order_of_lightness(chromium, site):
    """For any kind of colour vision, and in grey, more is more."""
    it = opened(chromium, site)
    for theme, sign in (("light", -1), ("dark", 1)):
        ramp = it.js("document.documentElement.dataset.theme = arguments[0]; return [...Array(21).keys()].map(i => colour(i / 20))", theme)
        steps = [sign * (luminance(b) - luminance(a)) for a, b in zip(ramp, ramp[1:], strict=False)]
        assert min(steps) > 0, (theme, steps)


def test_the_tip_names_rank_step_and_value(chromium, site):
    it = opened(chromium, site)
    it.js(
        "const b = document.getElementById('map').getBoundingClientRect();"
        "document.getElementById('map').dispatchEvent(new MouseEvent('mousemove', {clientX: b.left + map.left + map.width * 59.5 / 60, clientY: b.top + map.top + map.height * 3.5 / 8}))"
    )
    assert text(it, "#tip") == "rank 3 (node 0 node0.cluster)\nstep 1059: 25 % of a step"


@pytest.mark.parametrize(("ranks", "rows", "first"), [(64, 64, "0"), (256, 256, "0"), (1024, 128, "node 0")])
def test_from_few_ranks_to_a_thousand(chromium, site, ranks, rows, first):
    it = opened(chromium, site, status(ranks, steps=100, slow=ranks // 2 + 1))
    assert it.js("return [map.rows.length, map.rows[0].name]") == [rows, first]
    assert f"{ranks:,} ranks × 100 steps" in text(it, "#heatnote")
    row = (ranks // 2 + 1) * rows // ranks
    assert abs(luminance(pixel(it, row, rows, 95, 100)) - luminance(pixel(it, row - 2, rows, 95, 100))) > 80
    it.size(1024, 800)
    try:
        it.wait("document.documentElement.scrollWidth <= innerWidth && map.width + map.left <= document.getElementById('heatbox').clientWidth")
    finally:
        it.size(1280, 900)
    if ranks > 64:
        assert f"the 32 latest of {ranks:,} ranks" in text(it, "#ranknote") and it.js("return document.querySelectorAll('#ranklist tbody tr').length") == 32
        assert text(it, "#ranklist tbody tr td") == str(ranks // 2 + 1)
    assert it.console() == []


def test_s28_names_stay_text(chromium, site):
    """Whatever jobs, hosts, kinds, stacks, groups and stores are called: no element, no script, no request comes of it."""
    told = status(8, name=HOSTILE, host=HOSTILE.replace("{", "").replace("}", ""))
    one = told["jobs"][HOSTILE]
    seen = one["watching"]
    seen["verdicts"] = [{k: HOSTILE if isinstance(v, str) else v for k, v in seen["verdicts"][0].items()} | {"state": "confirmed", "places": [HOSTILE], "evidence": [{"signal": HOSTILE, "value": HOSTILE * 3, "unit": HOSTILE}, {"signal": HOSTILE, "value": HOSTILE[:40].replace("\n", " "), "unit": "x"}], "probes": [{"kind": HOSTILE, "rank": HOSTILE, "rate": HOSTILE}]}]
    seen["waits"] = [{"rank": 1, "group": HOSTILE, "op": HOSTILE, "seq": HOSTILE, "for": [3], "since_ms": 1}]
    seen["health"] = [{"node": 0, "host": HOSTILE, "values": {HOSTILE: HOSTILE}, "alarms": {HOSTILE: HOSTILE}}]
    seen["policy"] = HOSTILE
    one |= {"store": HOSTILE, "suspected": [{"step": 3, "what": HOSTILE}], "counters": {HOSTILE: 3}}
    one["snapshots"][0]["state"] = one["group"]["degraded"] = HOSTILE
    told |= {"last_errors": [HOSTILE], "version": HOSTILE, "daemon": HOSTILE, "jobs": {HOSTILE: one, "other": job()}}
    it = opened(chromium, site, told)
    it.js("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert it.js("return window.hacked") is None
    assert it.js("return document.querySelectorAll('img, body script ~ script, iframe, object, embed, main a, form').length") == 0
    assert it.js("return document.scripts.length") == 1
    assert it.js("return [...document.querySelectorAll('*')].flatMap(e => e.getAttributeNames()).filter(n => n.startsWith('on'))") == []
    for part in ("#verdictlist", "#waitlist", "#snaplist", "#nodelist", "#daemon", "#errors"):
        assert "<img src=x onerror=" in text(it, part), part
    assert "<img" in it.js("return document.title")
    assert it.console() == [] and set(site.asked) == {"/", "/api/status"}


def test_s28_even_markup_would_run_nothing(chromium, site):
    """The second line: the policy refuses scripts that are not the page's own, and speaking to others."""
    it = opened(chromium, site)
    it.js("const s = document.createElement('script'); s.textContent = 'window.hacked = 1'; document.body.append(s)")
    it.js("const d = document.createElement('div'); d.innerHTML = '<img src=\"data:,\" onerror=\"window.hacked = 2\">'; document.body.append(d)")
    it.js("fetch('http://127.0.0.1:9/').catch(() => { window.refused = 1 })")
    it.wait("window.refused")
    assert it.js("return window.hacked") is None
    refused = "\n".join(it.console())
    assert "Content Security Policy" in refused and "connect-src" in refused and "script" in refused


def test_a_daemon_that_goes_away_and_comes_back(chromium, site):
    it = opened(chromium, site)
    assert text(it, "#live").startswith("live")
    site.broken = True
    it.wait("document.getElementById('live').innerText.startsWith('no answer for')")
    assert "1 verdict" in text(it, "#tiles"), "what was known stays"
    site.broken = False
    it.wait("document.getElementById('live').innerText.startsWith('live')")


def test_jobs_are_chosen(chromium, site):
    two = status() | {"jobs": {"a": job(4), "b": {"attempt": 3, "snapshots": []}}}
    it = opened(chromium, site, two)
    assert it.js("return document.getElementById('job').value") == "a" and "4 / 4" in text(it, "#tiles")
    it.js("const s = document.getElementById('job'); s.value = 'b'; s.dispatchEvent(new Event('change'))")
    assert "not watched" in text(it, "#tiles") and "none in memory" in text(it, "#snaplist")
    assert it.js("return document.getElementById('heat').hidden") is True


def test_a_job_that_is_only_watched(chromium, site):
    told = status(4) | {"faces": {"health": {"values": {"cpu_steal": 0.5}, "alarms": {"oom": "killed 3"}}}}
    seen = told["jobs"]["llama"]["watching"] | {"health": []}
    it = opened(chromium, site, told | {"jobs": {}, "watched": {"bare": seen}})
    assert "4 / 4" in text(it, "#tiles") and "committed" not in text(it, "#tiles") and text(it, "#jobname") == "bare"
    assert "this node" in text(it, "#nodelist") and "oom: killed 3" in text(it, "#nodelist")
    assert it.console() == []


@pytest.mark.parametrize(
    "told",
    [{}, {"jobs": {}}, {"jobs": {"j": {}}}, {"jobs": {"j": {"watching": {}}}}, {"jobs": {"j": {"watching": {"ranks": [{"rank": 0}], "heat": {"steps": [1], "ranks": [0]}, "verdicts": [{}], "waits": [{}], "health": [{}]}}}},
     {"jobs": {"j": {"watching": {"ranks": 3, "heat": [], "verdicts": "x", "waits": None, "health": {}}}}}],
    ids=["nothing", "no-job", "empty-job", "empty", "bare", "wrong"],
)  # fmt: skip
def test_less_is_shown_of_an_older_daemon(chromium, site, told):
    it = opened(chromium, site, told)
    assert text(it, "#live").startswith("live"), text(it, "#live")
    assert [m for m in it.console() if "500" not in m] == []


def test_no_name_is_put_in_as_markup():
    document = page.render().decode()
    (script,) = re.findall(r"<script>(.*?)</script>", document, re.DOTALL)
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|\beval\(|new Function|setAttribute\(.on", script)
    assert not re.search(r"https?:|//[a-z]", re.sub(r"^\s*//.*$|//.*$", "", document, flags=re.MULTILINE))
    assert "'unsafe" not in page.policy() and page.policy().count("sha256-") == 2
    assert page.answer().headers["Content-Security-Policy"] == page.policy()
