"""A few labelled faults in real torchrun jobs over gloo: what is named, as what; `scripts/bench watch --real` runs them all, and measures.

Deadlines here are generous: two shared cores may be busy with something else for seconds.
"""

from __future__ import annotations

import pytest

from tests.monitor.watch_helpers import Case, told, watched

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    with watched(tmp_path_factory.mktemp("watch")) as its:
        yield its


@pytest.mark.parametrize(
    "case",
    [
        Case(name="stopped", layout="ddp", fault="sigstop:rank=1,step=15", rank=1, kinds=("stopped",), stands=True, limit_s=60, options=("--step-ms", "60")),
        Case(name="hang", layout="pp", fault="stuck:rank=2,step=15,place=forward", rank=2, kinds=("hang",), stands=True, limit_s=60, options=("--step-ms", "60")),
        Case(name="skip", layout="tp_fsdp", fault="skip:rank=3,step=15", rank=3, kinds=("desync", "deadlock"), stands=True, limit_s=60),
        Case(name="killed", layout="pp_dp", fault="sigkill:rank=2,step=15", rank=2, kinds=("crash",), stands=True, limit_s=60),
        Case(name="mismatch", layout="ddp", fault="desync:rank=0,step=15,what=op", rank=0, kinds=("desync",), stands=True, limit_s=60),
    ],
    ids=lambda c: c.name,
)
def test_a_job_that_stands_still(ranks, case):
    scored, timeline = told(ranks, case)
    assert scored.named, timeline.seen
    assert scored.right_rank, scored
    assert scored.right_cause, scored
    assert not scored.false_reports
    assert not any("errors" in t and t["errors"] for t in timeline.taps.values()), timeline.taps


def test_a_slow_rank(ranks):
    scored, timeline = told(ranks, Case(name="slow", layout="fsdp", fault="slow:rank=1,step=40,percent=60", rank=1, kinds=("compute-slow",), steps=130, limit_steps=80))
    assert (scored.named, scored.right_rank, scored.right_cause) == (True, True, True), (scored, timeline.seen)


def test_a_rank_that_is_slow_from_the_start(ranks):
    case = Case(name="slow from the start", layout="ddp", fault="slow:rank=1,step=4,percent=60", rank=1, kinds=("compute-slow",), steps=90, limit_steps=60)
    scored, timeline = told(ranks, case)
    assert (scored.named, scored.right_rank, scored.right_cause) == (True, True, True), (scored, timeline.seen)


def test_a_loss_that_is_no_number(ranks):
    scored, _ = told(ranks, Case(name="nan", layout="ddp", fault="nan:rank=2,step=15", kinds=("nan",), steps=60, limit_steps=40, options=("--report-loss",)))
    assert (scored.named, scored.right_rank, scored.right_cause) == (True, True, True), scored


def test_a_healthy_job_and_a_single_spike_are_no_news(ranks):
    """With evaluation, saves, logging and uneven batches; the rank that stalls once is not called slow."""
    scored, timeline = told(ranks, Case(name="healthy", layout="ddp", fault="spike:rank=1,step=50", steps=90))
    assert len(timeline.steps) == 90
    assert len(timeline.taps) == 4, "the taps were attached without a word in the job"
    assert not scored.false_reports, timeline.seen
