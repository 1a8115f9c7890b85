"""A daemon's status as Prometheus or OpenMetrics text. Pure: plain values in, text out.

Invariants
- bounded: at most JOBS_MAX jobs, RANKS_MAX ranks per job and metric (a larger job has its aggregates only), label values of at most LABEL_CHARS_MAX characters,
  and of names that others choose (kinds, detectors, parts) at most NAMES_MAX different ones;
- whatever a job, host or tensor is called, the text stays one that parses, and its labels say just that name;
- base units (seconds, bytes, ratios), counters end in _total, a value that is not known is not there.

By hand and not by prometheus_client: 1,024 ranks take it a third of a second per scrape, on the loop's only core. Its parser is what tests/monitor/test_metrics.py
holds this to. Format: https://prometheus.io/docs/instrumenting/exposition_formats/, OpenMetrics 1.0.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from statistics import median
from typing import Any

from ckptd.monitor import view
from ckptd.monitor.report import KINDS

JOBS_MAX = 64
RANKS_MAX = 4096
NAMES_MAX = 32
LABEL_CHARS_MAX = 128
TEXT = "text/plain; version=0.0.4; charset=utf-8"
CONTENT_TYPE = TEXT
"""Of what `render` gives by default."""
OPENMETRICS = "application/openmetrics-text; version=1.0.0; charset=utf-8"

Labels = tuple[tuple[str, str], ...]
_ESCAPED = str.maketrans({"\\": r"\\", "\n": r"\n", '"': r"\""})
_RANK_GAUGES = (
    ("step", "ckptd_rank_step", "Newest step of a rank.", 1.0),
    ("wall_us", "ckptd_step_seconds", "Duration of a rank's newest step.", 1e-6),
    ("self_us", "ckptd_step_self_seconds", "Its own part of that step: not waiting for others.", 1e-6),
    ("lateness", "ckptd_rank_lateness_ratio", "How much more a rank works than its peers, as a part of the step.", 1.0),
    ("idle_ms", "ckptd_rank_idle_seconds", "Since a rank's ring moved.", 1e-3),
)
_TAP_COUNTERS = (
    ("records", "ckptd_tap_records", "Records that a rank's tap wrote.", 1.0),
    ("lost", "ckptd_tap_records_lost", "Records that were overwritten or torn before they were read.", 1.0),
    ("errors", "ckptd_tap_errors", "Failures of a tap itself.", 1.0),
    ("device_lost", "ckptd_tap_device_timings_lost", "Device timings that found no free pair of events.", 1.0),
    ("hook_ns", "ckptd_tap_seconds", "Time spent in a rank's tap (sampled, scaled).", 1e-9),
)


def content_type(accept: str) -> str:
    """What to answer a scraper that accepts this."""
    return OPENMETRICS if "application/openmetrics-text" in accept else TEXT


def render(status: Mapping[str, Any], *, openmetrics: bool = False) -> str:
    """The text. `status`: what `Daemon.status` tells, with "process" from `process()` if that is known."""
    text = _Text(openmetrics=openmetrics)
    _daemon(text, status)
    _outboxes(text, status.get("faces"))
    named = sorted(view.jobs(status).items())
    text.gauge("ckptd_jobs", "Jobs that the daemon knows.", [((), len(named))])
    told = named[:JOBS_MAX]
    _snapshots(text, told)
    _watching(text, [(name, seen) for name, job in told if (seen := view.watching(job)) is not None])
    return text.finished()


class _Text:
    """Families, each once, in order."""

    def __init__(self, *, openmetrics: bool) -> None:
        self._openmetrics = openmetrics
        self._lines: list[str] = []

    def gauge(self, name: str, what: str, samples: Iterable[tuple[Labels, Any]]) -> None:
        """A value that goes up and down."""
        self._family(name, name, "gauge", what, samples)

    def counter(self, name: str, what: str, samples: Iterable[tuple[Labels, Any]]) -> None:
        """A count since the daemon (or the tap) began; `name` without _total."""
        good = ((labels, v) for labels, v in samples if _is_number(v) and 0 <= v < math.inf)
        self._family(name if self._openmetrics else f"{name}_total", f"{name}_total", "counter", what, good)

    def _family(self, family: str, sample: str, kind: str, what: str, samples: Iterable[tuple[Labels, Any]]) -> None:
        rows: dict[str, str] = {}
        for labels, value in samples:
            if _is_number(value):
                inside = ",".join(f'{k}="{_label(v)}"' for k, v in labels)
                rows.setdefault(f"{sample}{{{inside}}}" if inside else sample, _number(value))
        if rows:
            self._lines += [f"# HELP {family} {what}", f"# TYPE {family} {kind}", *(f"{k} {v}" for k, v in rows.items())]

    def finished(self) -> str:
        """All of it."""
        return "\n".join([*self._lines, *(["# EOF"] if self._openmetrics else []), ""])


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not (isinstance(value, int) and value.bit_length() > 512)


def _number(value: float) -> str:
    value = float(value)
    if math.isfinite(value):
        return repr(int(value)) if value.is_integer() and abs(value) < 1e15 else repr(value)
    return "NaN" if math.isnan(value) else "+Inf" if value > 0 else "-Inf"


def _label(value: str) -> str:
    """Escaped, of bounded length; what cannot be encoded or printed is a question mark."""
    shown = "".join(c if c.isprintable() or c == "\n" else "?" for c in value[:LABEL_CHARS_MAX])
    return shown.translate(_ESCAPED)


def _few(names: Mapping[Any, Any]) -> list[tuple[str, Any]]:
    """The first NAMES_MAX of them, by name."""
    return sorted((str(k), v) for k, v in names.items())[:NAMES_MAX]


# --- the daemon and its snapshots -------------------------------------------------------------------------------------------


def _daemon(text: _Text, status: Mapping[str, Any]) -> None:
    text.gauge("ckptd_build_info", "The daemon's version.", [((("version", str(status.get("version", ""))),), 1)])
    text.gauge("ckptd_uptime_seconds", "Since the daemon began.", [((), status.get("uptime_s"))])
    text.gauge("ckptd_held_bytes", "Memory of the snapshots' arenas.", [((), status.get("memory_bytes"))])
    text.counter("ckptd_errors", "Errors that the daemon met.", [((), status.get("errors"))])
    text.counter("ckptd_strangers", "Connections of peers that could not prove themselves.", [((), status.get("strangers"))])
    process = status.get("process")
    if isinstance(process, Mapping):
        text.counter("ckptd_daemon_cpu_seconds", "Processor time of the daemon.", [((), process.get("cpu_s"))])
        text.gauge("ckptd_daemon_resident_bytes", "Resident memory of the daemon, arenas that it has mapped included.", [((), process.get("rss_bytes"))])
        text.gauge("ckptd_daemon_private_bytes", "Resident memory of the daemon without arenas.", [((), process.get("private_bytes"))])


def _outboxes(text: _Text, faces: Any) -> None:
    """The event log and webhooks."""
    boxes = faces.get("outboxes") if isinstance(faces, Mapping) else None
    rows = [(str(box.get("to", "")), box) for box in (boxes if isinstance(boxes, list) else [])[:NAMES_MAX] if isinstance(box, Mapping)]
    for what in ("delivered", "failed", "dropped"):
        text.counter(f"ckptd_events_{what}", f"Events that were {what}.", [((("to", to),), box.get(what)) for to, box in rows])


def _snapshots(text: _Text, jobs: list[tuple[str, dict[str, Any]]]) -> None:
    held: list[tuple[Labels, Any]] = []
    newest: list[tuple[Labels, Any]] = []
    events: list[tuple[Labels, Any]] = []
    skipped: list[tuple[Labels, Any]] = []
    for name, job in jobs:
        who = ("job", name)
        listed = job.get("snapshots")
        states = Counter(str(s.get("state", "")) for s in (listed if isinstance(listed, list) else ()) if isinstance(s, Mapping))
        held += [((who, ("state", state)), n) for state, n in _few(states)]
        for tier in ("committed", "protected", "persisted"):
            key = job.get(tier)
            if isinstance(key, list | tuple) and len(key) == 2:
                newest.append(((who, ("tier", tier)), key[1]))
        for target, field, label in ((events, "counters", "event"), (skipped, "skipped", "reason")):
            values = job.get(field)
            if isinstance(values, Mapping):
                target += [((who, (label, what)), n) for what, n in _few(values)]
    text.gauge("ckptd_snapshots", "Snapshots in memory by state.", held)
    text.gauge("ckptd_snapshot_step", "Newest step in a tier.", newest)
    text.counter("ckptd_snapshot_events", "What became of snapshots since the daemon knows the job.", events)
    text.counter("ckptd_skipped", "Steps without a snapshot by reason.", skipped)


# --- watching ---------------------------------------------------------------------------------------------------------------


def _watching(text: _Text, jobs: list[tuple[str, view.Watching]]) -> None:
    shown = [(name, seen, seen.ranks if len(seen.ranks) <= RANKS_MAX else []) for name, seen in jobs]
    for attribute, metric, what, unit in _RANK_GAUGES:
        rows = ((name, r, getattr(r, attribute)) for name, _, ranks in shown for r in ranks)
        text.gauge(metric, what, ((_rank(name, r), v * unit) for name, r, v in rows if v is not None))
    waits = ((name, r) for name, _, ranks in shown for r in ranks if r.wall_us)
    text.gauge("ckptd_step_wait_seconds", "The rest of that step: waiting for others.", ((_rank(name, r), max(0.0, r.wall_us - r.self_us) * 1e-6) for name, r in waits))
    text.gauge(
        "ckptd_step_part_seconds", "Parts of a rank's own time in its newest step.",
        (((*_rank(name, r), ("part", part)), us * 1e-6) for name, _, ranks in shown for r in ranks for part, us in r.parts.items() if part in view.PARTS),
    )  # fmt: skip
    for attribute, metric, what, unit in _TAP_COUNTERS:
        taps = ((name, rank, getattr(t, attribute)) for name, seen, _ in shown for rank, t in [*seen.taps.items()][:RANKS_MAX])
        text.counter(metric, what, (((("job", name), ("rank", rank)), v * unit) for name, rank, v in taps))
    _aggregates(text, jobs)
    _verdicts(text, jobs)
    text.gauge("ckptd_node_alarm", "1 for an alarm of a node's health.", ((labels, 1) for name, seen in jobs for labels in _alarms(name, seen)))


def _alarms(name: str, seen: view.Watching) -> Iterable[Labels]:
    for node in seen.health[:RANKS_MAX]:
        alarms = node.get("alarms")
        for kind, _ in _few(alarms) if isinstance(alarms, Mapping) else ():
            yield ("job", name), ("node", str(node.get("node", ""))), ("kind", kind)


def _rank(name: str, r: view.RankView) -> Labels:
    return ("job", name), ("rank", str(r.rank)), ("node", str(r.node))


def _aggregates(text: _Text, jobs: list[tuple[str, view.Watching]]) -> None:
    def per_job(attribute: str, unit: float) -> Iterable[tuple[Labels, Any]]:
        for name, seen in jobs:
            values = [v for r in seen.ranks if (v := getattr(r, attribute)) is not None]
            if values:
                for stat, value in (("min", min(values)), ("median", median(values)), ("max", max(values))):
                    yield (("job", name), ("stat", stat)), value * unit

    text.gauge("ckptd_job_ranks", "Ranks that are watched.", [((("job", name),), len(seen.ranks)) for name, seen in jobs])
    text.gauge("ckptd_job_step", "Newest step of any rank.", [((("job", name),), seen.step) for name, seen in jobs])
    text.gauge("ckptd_job_step_seconds", "Duration of the newest step over all ranks.", per_job("wall_us", 1e-6))
    text.gauge("ckptd_job_self_seconds", "Own part of it over all ranks.", per_job("self_us", 1e-6))
    text.gauge("ckptd_job_lateness_ratio", "Lateness over all ranks.", per_job("lateness", 1.0))
    text.gauge("ckptd_waiting_ranks", "Ranks that wait for others for longer than a moment.", [((("job", name),), len({w.rank for w in seen.waits})) for name, seen in jobs])
    counts = [(name, what, n) for name, seen in jobs for what, n in _few(seen.counts)]
    text.counter("ckptd_watch_events", "What watching counted.", [((("job", name), ("event", what)), n) for name, what, n in counts])


def _verdicts(text: _Text, jobs: list[tuple[str, view.Watching]]) -> None:
    states: Counter[tuple[str, str, str]] = Counter()
    detected: dict[tuple[str, str], tuple[float, float]] = {}
    for name, seen in jobs:
        for v in seen.verdicts:
            kind = v.kind if v.kind in KINDS else "other"
            states[name, kind, v.state if v.state in {"suspected", "confirmed", "cleared"} else "other"] += 1
            if v.since_s and v.detected_s:
                detected[name, kind] = max(detected.get((name, kind), (0.0, 0.0)), (v.detected_s, max(0.0, v.detected_s - v.since_s)))
    text.gauge("ckptd_verdicts", "Verdicts that are kept, by kind and state.", [((("job", n), ("kind", k), ("state", s)), c) for (n, k, s), c in states.items()])
    text.gauge("ckptd_time_to_detect_seconds", "From its onset to the newest verdict of a kind.", [((("job", n), ("kind", k)), s) for (n, k), (_, s) in detected.items()])
    text.gauge(
        "ckptd_detector_state", "1 for the state that a detector is in.",
        [((("job", name), ("detector", d), ("state", s)), 1) for name, seen in jobs for d, s in _few(seen.detectors)],
    )  # fmt: skip
