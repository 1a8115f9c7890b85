"""`ckptd plan`: the table, the document, and what it refuses."""

from __future__ import annotations

import json
import shlex

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptd.cli import plan
from ckptd.cli.main import main
from ckptd.core.groups import form
from ckptd.errors import BadArgument
from tests.cli.helpers import ckptd

BASE = {"image-bytes": "12GB", "ranks-per-node": 8, "nodes": 64, "step-s": 8}


@pytest.fixture
def plan_of(capsys):
    def call(*args, code=0, **changes):
        given = BASE | {k.replace("_", "-"): v for k, v in changes.items()}
        got = main(["plan", *(f"--{k}={v}" for k, v in given.items()), *args])
        out, err = capsys.readouterr()
        assert got == code, out + err
        return json.loads(out) if "--json" in args else out + err

    return call


def row_of(document, kind, number):
    return next(r for r in document["protections"] if (r["kind"], r["number"]) == (kind, number))


def test_help_has_examples_that_run(capsys):
    done = ckptd("plan", "--help")
    assert (done.returncode, done.stderr) == (0, "")
    examples = [line.strip() for line in plan.EXAMPLES.splitlines()[1:] if line.strip()]
    assert examples and all(e in done.stdout for e in examples)
    for example in examples:
        assert main(shlex.split(example)[1:]) == 0
    assert "GOODPUT" in capsys.readouterr().out


def test_the_table(plan_of):
    text = plan_of()
    assert text.startswith("64 nodes, 89.4 GiB of images on each; one of them is lost every 4 d 2 h\n\nPROTECTION ")
    names = [line.split("  ")[0] for line in text.split("\n\n")[1].splitlines()[1:]]
    assert names == ["parity 0", "parity 1 of 8 *", "parity 2 of 8", "parity 3 of 8", "parity 4 of 8", "1 copy", "2 copies", "durable only"]
    one = next(line for line in text.splitlines() if "*" in line)
    assert one.split() == "parity 1 of 8 * 384.8 GiB +43 % 89.4 GiB 7.7 s yes 6e-06 19 d 18 h 99.974 %".split()
    assert "trainers wait 1 min 36 s per checkpoint, every 2 h 16 min (Daly; Young: 2 h 17 min)" in text
    assert "DEGRADED" not in text and "not every snapshot" not in text
    assert "a step 3.0 s: not every snapshot is protected" in plan_of(step_s=3)


def test_the_document(plan_of):
    document = plan_of("--json")
    assert document["job"]["node_bytes"] == 96 * 10**9
    one = row_of(document, "parity", 1)
    assert one["chosen"] and sum(r["chosen"] for r in document["protections"]) == 1
    assert one["groups"] == [{"n": 8, "m": 1, "count": 8}]
    parity_bytes = -(-96 * 10**9 // 7)
    assert one["memory_bytes"] == 4 * 96 * 10**9 + 2 * (parity_bytes + parity_bytes // 16)
    assert one["network_bytes"] == 96 * 10**9 and one["protect_s"] == pytest.approx(96 * 8 / 100)
    assert row_of(document, "copies", 1)["memory_bytes"] == (4 * 96 + 2 * 102) * 10**9
    assert row_of(document, "parity", 0)["memory_bytes"] == 3 * 96 * 10**9
    assert document["durable_only"]["goodput"] < row_of(document, "parity", 0)["goodput"] < one["goodput"]
    assert row_of(plan_of("--json", slots=3), "parity", 1)["memory_bytes"] == one["memory_bytes"] - 96 * 10**9


def test_what_is_asked_for_arrives(plan_of):
    """Each option changes what it must, against the default."""
    before = row_of(plan_of("--json"), "parity", 1)
    assert row_of(plan_of("--json", link_gbps=200), "parity", 1)["protect_s"] == before["protect_s"] / 2
    assert row_of(plan_of("--json", mtbf_hours=630), "parity", 1)["loss_per_day"] == pytest.approx(100 * before["loss_per_day"], rel=0.01)
    assert row_of(plan_of("--json", recovery_s=0), "parity", 1)["window_s"] == pytest.approx(before["window_s"] - 60)
    assert row_of(plan_of("--json", stall_s=0.8), "parity", 1)["goodput"] == pytest.approx(before["goodput"] / 1.1, rel=1e-3)
    assert row_of(plan_of("--json", group_size=16), "parity", 1)["groups"] == [{"n": 16, "m": 1, "count": 4}]
    assert plan_of("--json", store_gbps=4)["durable_only"]["young_s"] == pytest.approx(2**0.5 * plan_of("--json")["durable_only"]["young_s"])
    assert [r["number"] for r in plan_of("--json", parity=3)["protections"] if r["kind"] == "copies"] == [1, 2, 3]


def test_the_groups_are_those_that_ckptd_forms(plan_of):
    for nodes in (9, 20, 100):
        sizes = sorted({len(g.members) for g in form([{}] * nodes, parity=2)})
        assert [g["n"] for g in row_of(plan_of("--json", nodes=nodes, parity=2), "parity", 2)["groups"]] == sizes
    assert "parity 1 of 6-7 *" in plan_of(nodes=20)
    # Nine nodes are split for parity 3, and not for parity 4, which takes less memory: the table shows it, and the sizes.
    nine = plan_of("--json", nodes=9)
    assert [g["n"] for g in row_of(nine, "parity", 3)["groups"]] == [4, 5]
    assert row_of(nine, "parity", 4)["memory_bytes"] < row_of(nine, "parity", 3)["memory_bytes"]


def test_small_jobs(plan_of):
    text = plan_of(nodes=2, parity=2)
    assert "parity 2 of 2 *" in text and "DEGRADED: groups of 2 can lose 1, not 2" in text
    assert {(r["kind"], r["number"]) for r in plan_of("--json", nodes=2)["protections"]} == {("parity", 0), ("parity", 1), ("copies", 1)}
    single = plan_of("--json", nodes=1)
    assert {(r["kind"], r["number"]) for r in single["protections"]} == {("parity", 0), ("parity", 1)}
    assert row_of(single, "parity", 1)["memory_bytes"] == row_of(single, "parity", 0)["memory_bytes"]
    assert "DEGRADED: groups of 1 can lose 0, not 1" in plan_of(nodes=1)
    assert "DEGRADED" not in plan_of(nodes=1, parity=0)


@pytest.mark.parametrize(
    "changes",
    [
        {"image_bytes": "twelve"}, {"image_bytes": "12 XB"}, {"image_bytes": "0"}, {"image_bytes": "-1GB"}, {"image_bytes": "1.2.3"}, {"image_bytes": "9e999"},
        {"nodes": 0}, {"nodes": 10**6}, {"ranks_per_node": 0}, {"step_s": 0}, {"step_s": "nan"}, {"link_gbps": 0}, {"link_gbps": "inf"}, {"store_gbps": -1},
        {"mtbf_hours": 0}, {"recovery_s": -1}, {"stall_s": -1}, {"parity": 5}, {"parity": -1}, {"parity": 8}, {"group_size": 1}, {"group_size": 33},
        {"parity": 2, "group_size": 2}, {"slots": 1}, {"slots": 9}, {"slots": 2}, {"slots": 0},
    ],
)  # fmt: skip
def test_what_cannot_be(changes, plan_of):
    text = plan_of(code=10, **changes)
    assert text.startswith("ckptd plan: ")
    assert "remedy: " in text


def test_a_refusal_in_json(plan_of):
    assert plan_of("--json", code=10, nodes=0)["error"] == "BadArgument"


def test_two_slots_are_enough_where_nodes_do_not_protect_each_other(plan_of):
    assert row_of(plan_of("--json", slots=2, parity=0), "parity", 0)["memory_bytes"] == 2 * 96 * 10**9
    assert row_of(plan_of("--json", slots=2, nodes=1), "parity", 1)["memory_bytes"] == 2 * 96 * 10**9


def test_sizes():
    assert [plan.parse_size(t) for t in ("7", "7B", "1.5kB", "12GB", "12 GiB", "1MiB", "2t", "1e9", "3Ki")] == [
        7, 7, 1500, 12 * 10**9, 12 << 30, 1 << 20, 2 * 10**12, 10**9, 3072,
    ]  # fmt: skip
    for text in ("", "GB", "iB", "1i", ".", "1 2", "0x10", "1EB", "1\n2"):
        with pytest.raises(BadArgument):
            plan.parse_size(text)


@given(st.text())
def test_any_text_is_a_size_or_refused(text):
    try:
        assert plan.parse_size(text) >= 0
    except BadArgument as e:
        assert e.remedy
