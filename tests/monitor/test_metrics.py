"""Metrics: what Prometheus' own parser reads of them; bounds and hostile names (S28)."""

from __future__ import annotations

import math
import time

import pytest
from prometheus_client.openmetrics import parser as strict
from prometheus_client.parser import text_string_to_metric_families

from ckptd.monitor import metrics
from ckptd.monitor.report import KINDS
from tests.monitor.statuses import HOSTILE, job, status


def samples(told, *, openmetrics=False):
    """(name, labels) -> value, by the parser of prometheus_client; all families have help and a type."""
    text = metrics.render(told, openmetrics=openmetrics)
    families = [*(strict.text_string_to_metric_families(text) if openmetrics else text_string_to_metric_families(text))]
    assert all(f.documentation and f.type in {"gauge", "counter"} for f in families)
    assert len({f.name for f in families}) == len(families)
    found = {}
    for family in families:
        for s in family.samples:
            key = (s.name, tuple(sorted(s.labels.items())))
            assert key not in found
            found[key] = s.value
    return found


def get(found, name, **labels):
    return found[name, tuple(sorted(labels.items()))]


@pytest.mark.parametrize("openmetrics", [False, True])
def test_what_is_told(openmetrics):
    found = samples(status(), openmetrics=openmetrics)
    rank = {"job": "llama", "rank": "3", "node": "0"}
    assert get(found, "ckptd_rank_lateness_ratio", **rank) == 0.25
    wall = get(found, "ckptd_step_seconds", **rank)
    assert 0.1 < wall < 0.2
    assert get(found, "ckptd_step_self_seconds", **rank) + get(found, "ckptd_step_wait_seconds", **rank) == pytest.approx(wall)
    assert get(found, "ckptd_step_part_seconds", part="optimizer", **rank) == pytest.approx(0.004)
    assert get(found, "ckptd_tap_records_total", job="llama", rank="3") == 9000
    assert get(found, "ckptd_tap_seconds_total", job="llama", rank="3") == pytest.approx(0.003)
    assert get(found, "ckptd_snapshots", job="llama", state="COMMITTED") == 2
    assert get(found, "ckptd_snapshot_step", job="llama", tier="persisted") == 1050
    assert get(found, "ckptd_snapshot_events_total", job="llama", event="skipped") == 2
    assert get(found, "ckptd_verdicts", job="llama", kind="compute-slow", state="confirmed") == 1
    assert get(found, "ckptd_time_to_detect_seconds", job="llama", kind="compute-slow") == pytest.approx(1.4)
    assert get(found, "ckptd_job_lateness_ratio", job="llama", stat="max") == 0.25
    assert get(found, "ckptd_detector_state", job="llama", detector="hang", state="ok") == 1
    assert get(found, "ckptd_waiting_ranks", job="llama") == 3
    assert get(found, "ckptd_daemon_cpu_seconds_total") == 3.25
    assert get(found, "ckptd_daemon_private_bytes") == 45 << 20
    assert get(found, "ckptd_watch_events_total", job="llama", event="reports_lost") == 1
    assert get(samples(status(16), openmetrics=openmetrics), "ckptd_node_alarm", job="llama", node="1", kind="xid") == 1
    assert all(name.startswith("ckptd_") for name, _ in found)


def test_what_is_asked_for_is_said():
    assert metrics.content_type("application/openmetrics-text;version=1.0.0;q=0.5,text/plain;q=0.3") == metrics.OPENMETRICS
    assert metrics.content_type("") == metrics.content_type("*/*") == metrics.TEXT
    assert metrics.render({}, openmetrics=True).endswith("# EOF\n")


@pytest.mark.parametrize("openmetrics", [False, True])
def test_s28_hostile_names_stay_labels(openmetrics):
    told = status(name=HOSTILE, host=HOSTILE.replace("{", "").replace("}", ""))
    told["version"] = 'x"} 1\nevil 1'
    watched = told["jobs"][HOSTILE]["watching"]
    watched["counts"] = {HOSTILE: 1} | {f"c{i}": i for i in range(1000)}
    watched["detectors"] = {f"{HOSTILE}{i}": HOSTILE for i in range(1000)}
    watched["verdicts"][0]["kind"] = watched["verdicts"][0]["state"] = HOSTILE
    watched["ranks"][0]["parts"] = {HOSTILE: 5, "gc": 1}
    told["jobs"][HOSTILE]["counters"] = {HOSTILE: 3}
    found = samples(told, openmetrics=openmetrics)
    jobs = {dict(labels)["job"] for name, labels in found if dict(labels).get("job")}
    (shown,) = jobs
    assert shown.startswith('<img src=x onerror="window.hacked=1">\n"}\\ evil{x="1"} 9?') and len(shown) <= metrics.LABEL_CHARS_MAX
    assert "\x1b" not in shown and "\x00" not in shown and "\u2028" not in shown
    assert {name for name, _ in found} == {name for name, _ in samples(status(), openmetrics=openmetrics)}
    assert max(len(v) for _, labels in found for _, v in labels) <= metrics.LABEL_CHARS_MAX
    assert sum(name == "ckptd_watch_events_total" for name, _ in found) == metrics.NAMES_MAX
    assert get(found, "ckptd_verdicts", job=shown, kind="other", state="other") == 1


def test_s28_no_explosion_of_labels():
    at_most = status(metrics.RANKS_MAX, steps=1)
    found = samples(at_most)
    assert sum(name == "ckptd_step_seconds" for name, _ in found) == metrics.RANKS_MAX
    over = samples(status(metrics.RANKS_MAX + 1, steps=1))
    assert sum("rank" in dict(labels) and not name.startswith("ckptd_tap") for name, labels in over) == 0
    assert get(over, "ckptd_job_ranks", job="llama") == metrics.RANKS_MAX + 1
    assert get(over, "ckptd_job_step_seconds", job="llama", stat="max") > 0.1
    one = job(8, steps=1)
    many = status() | {"jobs": {f"job-{i}": one for i in range(500)}}
    found = samples(many)
    assert len({dict(labels)["job"] for _, labels in found if "job" in dict(labels)}) == metrics.JOBS_MAX
    assert get(found, "ckptd_jobs") == 500
    long = samples(status(name="x" * 100_000))
    assert {len(dict(labels)["job"]) for _, labels in long if "job" in dict(labels)} == {metrics.LABEL_CHARS_MAX}


def test_two_names_that_are_cut_to_the_same_do_not_break_the_text():
    one = job(8, steps=1)
    samples(status() | {"jobs": {"x" * 200: one, "x" * 201: one}}, openmetrics=True)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -1, 1e300, 10**400, "12", None, [], {}, True])
@pytest.mark.parametrize("openmetrics", [False, True])
def test_odd_values(value, openmetrics):
    told = status() | {"errors": value, "uptime_s": value, "memory_bytes": value, "process": {"cpu_s": value}}
    seen = told["jobs"]["llama"]["watching"]
    seen["ranks"][0] |= {"wall_us": value, "lateness": value}
    seen["counts"] = {"a": value}
    seen["step_us"] = value
    samples(told, openmetrics=openmetrics)


@pytest.mark.parametrize("told", [{}, {"jobs": {}}, {"jobs": []}, {"jobs": {"a": {}}}, {"jobs": {"a": None}}, {"jobs": {"a": {"watching": {}}}}, {"jobs": {"a": {"watching": None, "snapshots": None, "committed": 3}}}])
def test_an_older_daemon_says_less(told):
    samples(told)
    samples(told, openmetrics=True)


def test_every_kind_has_its_name():
    told = status()
    pattern = told["jobs"]["llama"]["watching"]["verdicts"][0]
    told["jobs"]["llama"]["watching"]["verdicts"] = [pattern | {"kind": kind, "id": i} for i, kind in enumerate(KINDS)]
    found = samples(told)
    assert {dict(labels)["kind"] for name, labels in found if name == "ckptd_verdicts"} == set(KINDS)


def test_a_scrape_of_a_thousand_ranks_is_cheap():
    told = status(1024, steps=1)
    times = []
    for _ in range(5):
        began_s = time.process_time()
        text = metrics.render(told)
        times.append(time.process_time() - began_s)
    print(f"1,024 ranks: {len(text)} bytes in {min(times) * 1e3:.0f} ms of processor time")
    assert min(times) < 1.0


def test_a_job_that_is_only_watched_and_the_outboxes():
    told = status()
    told["watched"] = {"llama": {}, "bare": told["jobs"]["llama"]["watching"]}
    told["faces"] = {"outboxes": [{"to": "events to /x", "delivered": 3, "failed": 1, "dropped": 0}, 7]}
    found = samples(told, openmetrics=True)
    assert get(found, "ckptd_jobs") == 2 and get(found, "ckptd_job_ranks", job="bare") == get(found, "ckptd_job_ranks", job="llama") == 8
    assert get(found, "ckptd_events_delivered_total", to="events to /x") == 3
