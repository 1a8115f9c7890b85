"""`ckptd status`: against real daemons, stopped ones, absent ones; and the sentences about what would be lost."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time

import pytest

from ckptd.cli import status
from ckptd.cli.main import main
from tests.cli.helpers import COMMAND, ROOT, Trainer, ckptd, running_daemon
from tests.monitor import statuses
from tests.storage.helpers import make_step


@pytest.fixture
def home(tmp_path):
    directory = tmp_path / "d"
    directory.mkdir(mode=0o700)
    return directory


def test_no_daemon(tmp_path):
    done = ckptd("status", "--dir", tmp_path)
    assert (done.returncode, done.stdout) == (30, "")
    assert f"no daemon answers at {tmp_path}/daemon.sock" in done.stderr
    assert "remedy: start one with `ckptd daemon`" in done.stderr
    done = ckptd("status", "--dir", tmp_path, "--json")
    assert done.returncode == 30
    assert json.loads(done.stdout)["error"] == "DaemonUnreachable"


def test_a_dead_daemons_socket(home):
    with running_daemon(home) as process:
        process.kill()
        process.wait(10)
    assert (home / "daemon.sock").exists()
    assert ckptd("status", "--dir", home).returncode == 30


def test_an_idle_daemon(home):
    with running_daemon(home) as process:
        done = ckptd("status", "--dir", home)
        assert (done.returncode, done.stderr) == (0, "")
        assert f"pid {process.pid}, version 0.1.0, up " in done.stdout
        assert "no errors\nno jobs\n" in done.stdout
        done = ckptd("status", "--json", CKPTD_DIR=str(home))
        document = json.loads(done.stdout)
        assert (document["pid"], document["jobs"], document["socket"]) == (process.pid, {}, f"{home}/daemon.sock")


def test_a_stopped_daemon_costs_no_more_than_the_timeout(home):
    with running_daemon(home) as process:
        process.send_signal(signal.SIGSTOP)
        began_s = time.monotonic()
        assert main(["status", "--dir", str(home), "--timeout-s", "0.5"]) == 30
        assert 0.4 < time.monotonic() - began_s < 2
        done = ckptd("status", "--dir", home, "--timeout-s", "0.3")
        assert done.returncode == 30
        assert "did not answer within 0.3 s" in done.stderr
        assert "SIGSTOP" in done.stderr
        process.send_signal(signal.SIGCONT)
        assert main(["status", "--dir", str(home)]) == 0


def test_the_life_of_a_job(home, tmp_path, capsys):
    store = tmp_path / "store"

    def look():
        assert main(["status", "--dir", str(home)]) == 0
        return capsys.readouterr().out

    with running_daemon(home):
        trainer = Trainer(home, store=str(store))
        try:
            trainer.join(make_step())
            text = look()
            assert "job job: attempt 1, node 0 of 1, 2 ranks connected (0-1)\n  no snapshots\n" in text
            assert f"if every trainer of this node died now: everything, but for what {store} held before" in text
            trainer.fill(make_step(step=7))
            trainer.wait_for(7, "committed")
            assert "if every trainer of this node died now: back to step 7 from memory (0 steps committed later are lost)" in look()
            trainer.persist(7)
            trainer.wait_for(7, "persisted")
            trainer.fill(make_step(step=9))
            trainer.wait_for(9, "committed")
            text = look()
            assert "back to step 9 from memory" in text
            assert "if this node died now: back to step 7 from the durable tier (2 steps committed later are lost)" in text
            assert f"persisted: step 7 (attempt 1) in {store}" in text
            assert "2 sealed, 2 committed, 0 skipped, 0 protected, 0 protect failed, 1 persisted" in text
            assert main(["status", "--dir", str(home), "--json"]) == 0
            job = json.loads(capsys.readouterr().out)["jobs"]["job"]
            assert job["if_trainers_die"] == {
                "source": "memory", "attempt": 1, "step": 9, "steps": 0, "text": "back to step 9 from memory (0 steps committed later are lost)",
            }  # fmt: skip
            assert (job["if_node_dies"]["source"], job["if_node_dies"]["step"], job["if_node_dies"]["steps"]) == ("durable", 7, 2)
        finally:
            trainer.close()
        assert main(["verify", str(store)]) == 0
        assert main(["ls", str(store), "job"]) == 0


def test_errors_are_shown(home, tmp_path, capsys):
    blocked = tmp_path / "file"
    blocked.write_text("no directory")
    with running_daemon(home):
        trainer = Trainer(home, store=str(blocked / "store"))
        try:
            trainer.join(make_step())
            trainer.fill(make_step())
            trainer.wait_for(7, "committed")
            trainer.persist(7)
            deadline_s = time.monotonic() + 10
            text = ""
            while "the last:" not in text:
                assert time.monotonic() < deadline_s
                assert main(["status", "--dir", str(home)]) == 0
                text = capsys.readouterr().out
            assert "1 error, the last:\n  persisting step 7 of job job: " in text
            assert "1 persist failed" in text
        finally:
            trainer.close()


def test_watch_goes_on_without_the_daemon_and_ends_on_ctrl_c(home, tmp_path):
    out = tmp_path / "out"
    with running_daemon(home) as process, out.open("w") as sink:
        watching = subprocess.Popen(
            [*COMMAND, "status", "--dir", str(home), "--watch", "0.1", "--timeout-s", "0.5"], cwd=ROOT, stdout=sink, stderr=sink
        )
        try:
            _until(lambda: out.read_text().count("no jobs") >= 2)
            process.terminate()
            process.wait(10)
            _until(lambda: "no daemon answers" in out.read_text())
            assert watching.poll() is None
            watching.send_signal(signal.SIGINT)
            assert watching.wait(10) == 130
        finally:
            if watching.poll() is None:
                watching.kill()
                watching.wait(10)
    text = out.read_text()
    assert "\x1b" not in text
    assert text.startswith("--- every 0.1 s, 20")
    assert "Traceback" not in text


def _until(true) -> None:
    deadline_s = time.monotonic() + 15
    while not true():
        assert time.monotonic() < deadline_s
        time.sleep(0.05)


def test_watch_redraws_a_terminal(home):
    master, slave = os.openpty()
    with running_daemon(home):
        watching = subprocess.Popen(
            [*COMMAND, "status", "--dir", str(home), "--watch", "0.1"], cwd=ROOT, stdout=slave, stderr=slave
        )
        os.close(slave)
        seen = b""
        try:
            deadline_s = time.monotonic() + 15
            while seen.count(b"\x1b[H\x1b[2J") < 2:
                assert time.monotonic() < deadline_s
                seen += os.read(master, 4096)
            watching.send_signal(signal.SIGINT)
            assert watching.wait(10) == 130
        finally:
            if watching.poll() is None:
                watching.kill()
                watching.wait(10)
            os.close(master)


@pytest.mark.parametrize("args", [["--timeout-s", "0"], ["--timeout-s", "nan"], ["--watch", "-1"]])
def test_impossible_numbers(args, tmp_path, capsys):
    assert main(["status", "--dir", str(tmp_path), *args]) == 10
    assert "seconds above 0" in capsys.readouterr().err


def a_job(**fields):
    snapshots = [status.Snapshot(*key, "committed") for key in {fields.get("committed")} if key]
    return status.Job(**{"attempt": 2, "snapshots": snapshots} | fields)


@pytest.mark.parametrize(
    ("job", "trainers", "node"),
    [
        (a_job(), "everything: no durable tier", "everything: no durable tier"),
        (a_job(store="/s"), "nothing persisted yet", "everything, but for what /s held before this daemon began"),
        (a_job(committed=(2, 9)), "back to step 9 from memory", "everything: no durable tier"),
        (a_job(committed=(2, 9), persisted=(2, 8), store="/s"), "back to step 9 from memory", "back to step 8 from the durable tier (1 step committed later is lost)"),
        (a_job(committed=(2, 9), persisted=(2, 9), store="/s"), "back to step 9 from memory", "back to step 9 from the durable tier (0 steps committed later are lost)"),
        (a_job(committed=(2, 4), persisted=(1, 9), store="/s"), "back to step 4 from memory", "back to step 9 from the durable tier (attempt 1; all that attempt 2 committed is lost)"),
        (a_job(persisted=(1, 9), store="/s"), "back to step 9 from the durable tier (0 steps", "back to step 9 from the durable tier (0 steps"),
        (a_job(committed=(1, 12), persisted=(1, 9), snapshots=[], store="/s"), "back to step 9 from the durable tier (3 steps", "back to step 9"),
    ],
)  # fmt: skip
def test_what_would_be_lost(job, trainers, node):
    assert trainers in status.if_trainers_die(job).text
    assert node in status.if_node_dies(job).text


def test_a_newer_daemon_says_more_and_a_hostile_one_says_it_in_colour():
    base = {
        "version": "9",
        "daemon": "\x1b[31mred",
        "pid": 1,
        "uptime_s": 200000.0,
        "verdicts": [1],
        "last_errors": ["a\nb"],
        "errors": 1,
    }
    text = status.render(base | {"jobs": {"j": {"attempt": 1, "peers_connected": {"1": False, "10": True, "2": True}}}})
    assert "\x1b" not in text
    assert "a\\nb" in text
    assert "up 2 d 7 h" in text
    assert "peers: node 1 NOT connected, node 2 connected, node 10 connected" in text


# --- watching ---------------------------------------------------------------------------------------------------------------


def test_what_watching_found():
    told = statuses.status(8)
    told["faces"] = {"http": "127.0.0.1:4444"}
    text = status.render(told)
    assert "page and metrics at http://127.0.0.1:4444/" in text
    assert "watching: 8 of 8 ranks, step 1059, policy report, " in text and "taps here: 8 (native), 0 records lost" in text
    assert "  VERDICT: compute-slow: rank 3, 24% of a step; done: asked the launcher\n" in text
    assert "  ranks 0-2 wait in all_reduce 77 of group dp0 for rank 3, since 3.1 s\n" in text
    (row,) = [line for line in text.splitlines() if line.endswith("<-")]
    assert row.split()[:5] == ["3", "0", "node0.cluster", "R", "1059"] and "25.0%" in row and "optimizer 4.0 ms" in row


def test_of_many_ranks_the_guilty_and_the_latest_are_listed():
    text = status.render(statuses.status(1024, slow=700))
    rows = text.partition("RANK  NODE")[2].splitlines()
    assert rows[1].split()[0] == "700" and rows[1].endswith("<-")
    assert rows[-1] == "  and 992 ranks that are less late" and len(rows) == 2 + status.RANKS_SHOWN


def test_watching_tells_what_is_over_and_who_coordinates():
    told = statuses.status(8, state="cleared")
    assert "no verdict holds: 1 cleared" in status.render(told)
    told["jobs"]["llama"]["watching"] = {"taps": {"0": {"layer": "python", "lost": 3}}, "world_size": 4, "coordinator": False}
    text = status.render(told)
    assert "watching: 1 of 4 ranks" in text and "taps here: 1 (python), 3 records lost" in text and "node 0 coordinates this job" in text


@pytest.mark.parametrize("watching", [None, {}, {"ranks": 7, "verdicts": [3]}, {"ranks": [{"rank": 1}], "verdicts": [{}], "waits": [{"rank": 2}]}, "x"])
def test_watching_of_another_version(watching):
    told = statuses.status(2)
    told["jobs"]["llama"]["watching"] = watching
    text = status.render(told)
    assert "committed: step 1057" in text
    assert ("not understood: ranks" in text) == (watching == {"ranks": 7, "verdicts": [3]})


def test_hostile_names_of_the_watched_stay_in_their_lines():
    told = statuses.status(2, host=statuses.HOSTILE.replace("{", "").replace("}", ""), slow=1)
    seen = told["jobs"]["llama"]["watching"]
    seen["verdicts"][0]["text"] = seen["verdicts"][0]["did"] = seen["policy"] = seen["waits"][0]["op"] = seen["ranks"][0]["state"] = statuses.HOSTILE
    text = status.render(told)
    assert "\x1b" not in text and "\x00" not in text and "\u2028" not in text and '\n"}' not in text


def test_a_job_without_a_session_is_watched_all_the_same():
    told = statuses.status(4)
    told["watched"] = {"bare": told["jobs"]["llama"]["watching"]}
    text = status.render(told | {"jobs": {}})
    assert "job bare: watched only, no session is attached\n  watching: 4 of 4 ranks" in text and "no jobs" not in text
