"""`ckptd analyze` as a user runs it: runs, dumps, and what is neither."""

from __future__ import annotations

import json
import pickle

import pytest

from ckptd.cli.main import main
from tests.cli.helpers import ckptd
from tests.monitor.statuses import HOSTILE
from tests.monitor.test_analyze import HEADER, Evil, a_run, live, made, written
from tests.monitor.test_trace_export import check


@pytest.fixture
def dumps(tmp_path):
    directory = tmp_path / "dumps"
    directory.mkdir()
    for rank in range(3):
        upto = 4 if rank != 2 else 3
        (directory / f"trace_{rank}").write_bytes(pickle.dumps(made([(s, "all_reduce") for s in range(1, upto + 1)], last_completed_collective=3)))
    return directory


def test_dumps(dumps, tmp_path):
    done = ckptd("analyze", dumps, "--trace-out", tmp_path / "trace.json")
    assert (done.returncode, done.stderr) == (0, "")
    assert f"Flight Recorder dumps of 3 ranks in {dumps}\n" in done.stdout
    assert "  confirmed: hang: rank 2 in all_reduce 4: it did not come to the operation that others wait in\n" in done.stdout
    assert "    rank 2 entered: operation 3: all_reduce of 4 Float\n" in done.stdout
    assert "  ranks 0-1 wait in all_reduce 4 of group 0 for 2\n" in done.stdout
    check(json.loads((tmp_path / "trace.json").read_text()))


def test_dumps_as_json(dumps, capsys):
    assert main(["analyze", str(dumps), "--json"]) == 0
    (told,) = json.loads(capsys.readouterr().out)["analyzed"]
    (verdict,) = told["verdicts"]
    assert (verdict["kind"], verdict["ranks"], verdict["op"], verdict["seq"], verdict["files"]) == ("hang", [2], "all_reduce", 4, [str(dumps / "trace_2")])
    assert told["groups"] == {"0": {"ranks": [0, 1, 2], "entered": {"0": 4, "1": 4, "2": 3}}} and told["absent"] == []


def test_single_files_and_a_missing_dump(dumps, capsys):
    assert main(["analyze", str(dumps / "trace_0"), str(dumps / "trace_2")]) == 0
    text = capsys.readouterr().out
    assert "no dump of rank 1" in text and "hang: rank 2" in text


def test_a_recorded_run(tmp_path, capsys):
    written(tmp_path / "runs", a_run())
    said = live(a_run(), HEADER)[0]
    assert main(["analyze", str(tmp_path / "runs"), "--json", "--trace-out", str(tmp_path / "t.json")]) == 0
    (told,) = json.loads(capsys.readouterr().out)["analyzed"]
    assert [v["text"] for v in told["history"]] == [v.text for v in said] and told["nodes"] == 2
    check(json.loads((tmp_path / "t.json").read_text()))
    assert main(["analyze", str(tmp_path / "runs")]) == 0
    text = capsys.readouterr().out
    assert "recorded run of job job/../\\x00<b>, attempt 3: 4 ranks on 2 nodes" in text and "hang: rank 2" in text and "ranks 0-1,3 wait in all_reduce 100" in text


@pytest.mark.parametrize(
    ("make", "code", "says"),
    [
        (lambda d: d / "nothing", 14, "No such file"),
        (lambda d: d, 14, "neither recorded runs nor Flight Recorder dumps"),
        (lambda d: (d / "trace_0").write_bytes(pickle.dumps(Evil())) and d, 25, "trace_0"),
        (lambda d: (d / "run-x-1-1-00000.ckptdrec").write_bytes(b"CKPTDREC") and d, 25, "no recorded run"),
    ],
)
def test_what_it_cannot_read(tmp_path, capsys, make, code, says):
    assert main(["analyze", str(make(tmp_path))]) == code
    assert says in capsys.readouterr().err


def test_where_it_cannot_write(dumps, capsys, tmp_path):
    assert main(["analyze", str(dumps), "--trace-out", str(tmp_path / "no" / "t.json")]) == 41
    written(tmp_path / "runs", a_run(seconds=1))
    assert main(["analyze", str(dumps), str(tmp_path / "runs"), "--trace-out", str(tmp_path / "t.json")]) == 10
    assert "give one path" in capsys.readouterr().err


def test_hostile_texts_stay_in_their_lines(tmp_path, capsys):
    for rank in range(2):
        dump = made([(1, "all_reduce"), (2, HOSTILE)] if rank == 0 else [(1, "all_reduce")], last_completed_collective=1)
        for entry in dump["entries"]:
            entry |= {"process_group": (HOSTILE, "x"), "frames": [{"filename": HOSTILE, "line": 1, "name": HOSTILE}], "input_dtypes": [HOSTILE]}
        (tmp_path / f"trace_{rank}").write_bytes(pickle.dumps(dump))
    assert main(["analyze", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert "\x1b" not in text and "\x00" not in text and "hang: rank 1" in text
    assert main(["analyze", str(tmp_path), "--json"]) == 0
    json.loads(capsys.readouterr().out)
