"""What a thread had of the processors, as the tap writes it into the marks of steps and as summaries have it."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from ckptd.monitor import record, schedstat
from ckptd.monitor.ring import Ring
from ckptd.monitor.steps import Summarizer
from ckptd.monitor.tap_writer import Writer

pytestmark = pytest.mark.skipif(not Path("/proc/self/schedstat").exists(), reason="this kernel does not say what a thread had of the processors")


def spin(cpu_s: float) -> None:
    until_s = time.thread_time() + cpu_s
    while time.thread_time() < until_s:
        pass


def test_a_thread_is_told_what_it_had_since_it_asked_before() -> None:
    spent = schedstat.Spent()
    assert spent.take() == (0, 0)  # nothing to compare with
    spin(0.03)
    cpu_us, _ = spent.take()
    assert 29_000 <= cpu_us < 200_000
    time.sleep(0.03)
    assert spent.take()[0] < 20_000
    spent.close()
    assert spent.take() == (0, 0)
    spent.close()


def test_another_thread_begins_anew() -> None:
    spent = schedstat.Spent()
    spent.take()
    spin(0.02)
    found: list[tuple[int, int]] = []
    other = threading.Thread(target=lambda: found.extend([spent.take(), spent.take()]))
    other.start()
    other.join()
    assert found[0] == (0, 0)
    assert found[1][0] < 10_000
    assert spent.take() == (0, 0)
    spent.close()


def test_who_waits_for_a_processor_is_told_so() -> None:
    before = os.sched_getaffinity(0)
    core = min(before)
    spin_there = f"import os\nos.sched_setaffinity(0, {{{core}}})\nprint(flush=True)\nwhile os.getppid() == {os.getpid()}: sum(range(9999))"
    with subprocess.Popen([sys.executable, "-c", spin_there], stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        other.stdout.readline()
        try:
            os.sched_setaffinity(0, {core})
            spent = schedstat.Spent()
            spent.take()
            spin(0.1)
            cpu_us, delay_us = spent.take()
        finally:
            os.sched_setaffinity(0, before)
            other.kill()
    spent.close()
    assert cpu_us >= 99_000
    assert delay_us > 30_000  # two shared one core


def test_a_kernel_that_does_not_say_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def refused(*what: object) -> int:
        asked.append(what)
        raise PermissionError

    monkeypatch.setattr(os, "open", refused)
    spent = schedstat.Spent()
    assert [spent.take() for _ in range(3)] == [(0, 0)] * 3
    assert len(asked) == 1


def test_what_a_mark_says_is_believed_and_looks_from_outside_where_it_says_nothing() -> None:
    ring = Ring.create(64)
    writer = Writer(ring)
    for i, told in enumerate([(7_000, 300), (0, 0), (9_000, 50)], 1):
        writer.enter(writer.group(1, 1, 0, [0]), 1, 1, 8, 0, -1, 8)
        time.sleep(0.02)
        writer.step(i, *told)
    window = ring.read(0)
    summarizer = Summarizer(0)
    at = window.records["entered_ns"][window.records["op"] == record.STEP].astype(np.int64)
    summarizer.samples.add(int(at[0]), 0, 0)
    summarizer.samples.add(int(at[1]), 4_000_000, 2_000_000)
    done = summarizer.feed(window.first, window.records, window.lost, ring.groups(), ring.capacity)
    assert [(d.summary.cpu_us, d.summary.delay_us) for d in done] == [(7_000, 300), (4_000, 2_000), (9_000, 50)]
