"""Recorded runs replay to the same verdicts; Flight Recorder dumps of real gloo ranks name who is missing and what differs. Hostile files cost nothing."""

from __future__ import annotations

import functools
import json
import multiprocessing
import os
import pickle
import threading
import time

import msgspec
import pytest
import zstandard

from ckptd.errors import BadArgument, BadForeign, NewerFormat
from ckptd.monitor import flight, recorded, trace_export
from ckptd.monitor.engine import Concluded, Engine
from ckptd.monitor.report import Finding, GroupInfo, OpenOp, Pulse, RankInfo, Report
from ckptd.monitor.settings import Settings
from tests import forks
from tests.monitor.test_trace_export import check

# --- recorded runs ----------------------------------------------------------------------------------------------------------

KEY = 77


def a_run(world=4, seconds=12):
    """What an engine is told of a job whose rank 2 stops entering operations: reports of two nodes, and ticks."""
    told = []
    for tick in range(seconds * 4):
        now_s = 100.0 + tick / 4
        hung = tick >= 8
        for node in range(2):
            ranks = [r for r in range(world) if r // 2 == node]
            infos = [RankInfo(rank=r, node=node, local_rank=r % 2, pid=10 + r, host=f"n{node}", groups=[GroupInfo(KEY, [*range(world)])]) for r in ranks] if tick == 0 else []
            pulses = []
            for r in ranks:
                idle_ms = (tick - 8) * 250 if hung else 0
                row = OpenOp(KEY, 100 - (r == 2) if hung else tick, 99 if hung else tick, 1, 7, 64, 5 if hung and r != 2 else tick, 9, idle_ms)
                pulses.append(Pulse(rank=r, idle_ms=idle_ms, step=min(tick, 8), records=tick, state="S", where="futex" if r == 2 else "sock", groups=[row] if idle_ms >= 1000 else []))
            told.append((now_s, 1.7e9 + now_s, {"report": Report(node=node, sent=tick + 1, ranks=infos, pulses=pulses)}))
        told.append((now_s, 1.7e9 + now_s, {}))
    told.append((now_s, 1.7e9 + now_s, {"finding": Finding(kind="divergence", ranks=(1,), step=8, since_step=8, strength=1.0, cause="copies differ")}))
    return told


def live(told, header):
    """What an engine says of it at the time, with what it was told about actions."""
    engine = Engine(header.job, header.attempt, header.world_size, header.nodes, Settings(**header.settings))
    said, acted = [], []
    for now_s, wall_s, what in told:
        if "report" in what:
            out = engine.receive(what["report"], now_s, wall_s)
        elif "finding" in what:
            out = engine.found(what["finding"])
        else:
            out = engine.tick(now_s, wall_s)
        said += [o.verdict for o in out if isinstance(o, Concluded)]
    return said, acted


HEADER = recorded.Header(job="job/../\x00<b>", attempt=3, world_size=4, nodes=2, settings={"start_s": 2.0, "policy": "report"})


def written(directory, told, header=HEADER, **more):
    writer = recorded.Writer(directory, header, **more)
    for now_s, wall_s, what in told:
        writer.write(now_s, wall_s, **what)
    assert writer.flush(30)
    writer.close()
    assert (writer.failed, writer.dropped) == (0, 0)
    return recorded.find(directory)


def test_a_recorded_run_gives_the_same_verdicts(tmp_path):
    told = a_run()
    (parts,) = written(tmp_path / "runs", told)
    said, _ = live(told, HEADER)
    assert {v.kind for v in said} >= {"hang", "divergence"} and any(v.ranks == (2,) for v in said if v.kind == "hang")
    done = recorded.replay(parts)
    assert done.history == said
    assert done.header == HEADER and done.reports == 96 and done.status["waits"]
    assert [oct(p.stat().st_mode & 0o777) for p in parts] == ["0o600"]
    assert "/" not in parts[0].name.replace(str(tmp_path), "") and parts[0].parent == tmp_path / "runs"


def test_it_is_bounded_and_what_is_left_can_be_read(tmp_path, monkeypatch):
    monkeypatch.setattr(recorded, "CHUNK_BYTES", 4096)
    noise = [(float(i), 0.0, {"report": Report(node=0, sent=i, ranks=[RankInfo(rank=0, node=0, local_rank=0, pid=1, host=os.urandom(64).hex())])}) for i in range(3000)]
    (parts,) = written(tmp_path, noise, bytes_max=128 << 10)
    assert len(parts) == recorded.PARTS and sum(p.stat().st_size for p in parts) < 200 << 10
    header, *entries = recorded.read(parts)
    assert header.part > 0 and [e.report.sent for e in entries] == [*range(3000 - len(entries), 3000)] and len(entries) > 500


def test_a_crash_costs_the_last_chunk(tmp_path, monkeypatch):
    monkeypatch.setattr(recorded, "CHUNK_BYTES", 1024)
    (parts,) = written(tmp_path, a_run())
    whole = [*recorded.read(parts)]
    data = parts[0].read_bytes()
    seen = set()
    for cut in range(len(data) - 3000, len(data), 97):
        parts[0].write_bytes(data[:cut])
        read = [*recorded.read(parts)]
        assert read == whole[: len(read)]
        seen.add(len(read))
    assert len(seen) > 1
    parts[0].write_bytes(data[:12])
    with pytest.raises(BadForeign, match="no recorded run"):
        [*recorded.read(parts)]


def test_flipped_bits_are_refused_or_harmless(tmp_path):
    (parts,) = written(tmp_path, a_run(seconds=3))
    whole = [*recorded.read(parts)]
    data = bytearray(parts[0].read_bytes())
    for at in [*range(200), *range(200, len(data), 61)]:
        data[at] ^= 0x10
        parts[0].write_bytes(data)
        try:
            read = [*recorded.read(parts)]
            assert read == whole[: len(read)], f"byte {at}"
        except (BadForeign, NewerFormat):
            pass
        data[at] ^= 0x10


def chunk(payload, packed=None):
    packed = zstandard.ZstdCompressor().compress(payload) if packed is None else packed
    return len(packed).to_bytes(4, "little") + packed


@pytest.mark.parametrize(
    "body",
    [
        chunk(bytes(64 << 20)),
        chunk(b"", b"\xff" * 100),
        (1 << 31).to_bytes(4, "little") + b"x",
        chunk(b"\xff\xff\xff\xff"),
        chunk(b"\x04\x00\x00\x00" + b"\x91" * 4),
        chunk((10**5).to_bytes(4, "little") + b"\x91" * 10**5),
        chunk(b"\x01\x00\x00\x00\xc0"),
    ],
    ids=["bomb", "no-zstd", "huge", "length", "short", "deep", "nil"],
)
def test_hostile_runs(tmp_path, body):
    path = tmp_path / "run-x-1-1-00000.ckptdrec"
    path.write_bytes(recorded.MAGIC + body)
    with pytest.raises(BadForeign):
        [*recorded.read([path])]


def test_a_newer_one_says_so(tmp_path):
    value = msgspec.msgpack.encode(recorded.Header(version=99, job="j", attempt=1, world_size=1, nodes=1))
    path = tmp_path / "run-x-1-1-00000.ckptdrec"
    path.write_bytes(recorded.MAGIC + chunk(len(value).to_bytes(4, "little") + value))
    with pytest.raises(NewerFormat):
        recorded.replay([path])


def test_where_nothing_can_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(BadArgument, match="cannot record"):
        recorded.Writer(tmp_path / "file" / "x", HEADER)


# --- Flight Recorder --------------------------------------------------------------------------------------------------------

FRESH = multiprocessing.get_context("forkserver")
FRESH.set_forkserver_preload(["tests.forks"])
"""Where ranks are forked from: a process that never had a group. torch's recorder is one per process, and a fork takes along what its parent recorded."""


def dumped(directory, count, work, after_s=2.5):
    """Dumps of real ranks: `work` (of this module) runs in a thread of each; after a while all write what their recorders hold, whatever they stand in."""
    directory.mkdir()
    parent = FRESH.Process(target=_dump, args=(directory, count, work, after_s))
    parent.start()
    parent.join(60)
    assert parent.exitcode == 0
    assert len([*directory.iterdir()]) == 2 * count
    return directory


def _dump(directory, count, work, after_s):
    def rank_of(rank):
        import torch
        import torch.distributed as dist

        c10d = torch._C._distributed_c10d
        thread = threading.Thread(target=work, args=(rank, torch, dist), daemon=True)
        dist.barrier()
        thread.start()
        time.sleep(after_s)
        (directory / f"trace_{rank}").write_bytes(c10d._dump_fr_trace())
        text = c10d._dump_fr_trace_json()
        (directory / f"json_{rank}.json").write_bytes(text if isinstance(text, bytes) else text.encode())
        time.sleep(0.5)  # who leaves first would end the others' waiting
        os._exit(0)

    forks.ranks(count, rank_of, env={"TORCH_FR_BUFFER_SIZE": "2000"}, may_die=True)


def concluded(files):
    job = flight.gather((r, flight.read(p)) for r, p in sorted(files.items()))
    findings, waits = flight.conclude(job)
    return job, findings, waits


def both_forms(directory):
    """Findings of the pickles, checked to be those of the JSON dumps too (which have no stacks)."""
    files = flight.find(directory)
    assert all(p.name.startswith("trace_") for p in files.values())
    job, findings, waits = concluded(files)
    _, of_json, waits_json = concluded({r: directory / f"json_{r}.json" for r in files})
    plain = [msgspec.structs.replace(f, evidence=()) for f in findings]
    assert plain == [msgspec.structs.replace(f, evidence=()) for f in of_json] and waits == waits_json
    return job, findings, waits


def evidence(finding):
    return {e.signal: e.value for e in finding.evidence}


def without_rank_2(rank, torch, dist):
    x = torch.ones(16)
    for _ in range(3):
        dist.all_reduce(x)
    if rank != 2:
        dist.all_reduce(x)


def test_a_missing_rank(tmp_path):
    directory = dumped(tmp_path / "d", 3, without_rank_2)
    _, (finding,), waits = both_forms(directory)
    assert (finding.kind, finding.ranks, finding.op, finding.victims) == ("hang", (2,), "all_reduce", (0, 1))
    told = evidence(finding)
    entered = finding.seq
    assert told["rank 2 entered"] == f"operation {entered - 1}: all_reduce of 16 Float" and told["rank 0 entered"].startswith(f"operation {entered}: ")
    assert "test_analyze.py:" in told["rank 0 called it in"] and "in without_rank_2" in told["rank 0 called it in"]
    assert waits == [{"rank": r, "group": "0", "seq": entered, "op": "all_reduce", "for": [2]} for r in (0, 1)]
    # Without its dump nobody is guessed at.
    (directory / "trace_2").unlink()
    (directory / "json_2.json").unlink()
    (directory / "notes.txt").write_text("no dump")
    job, findings, _ = concluded(flight.find(directory))
    assert [(f.kind, f.ranks) for f in findings] in ([("undecided", ())], [("comm-hang", ())])
    assert "dump" in findings[0].cause


def without_rank_3(rank, torch, dist):
    x = torch.ones(4)
    rows = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    columns = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    for _ in range(2):
        dist.all_reduce(x, group=rows[rank // 2])
        dist.all_reduce(x, group=columns[rank % 2])
    if rank != 3:
        dist.all_reduce(x, group=rows[rank // 2])
        dist.all_reduce(x, group=columns[rank % 2])


def test_the_root_of_several_groups(tmp_path):
    """A mesh of 2 x 2: rank 3 stays away from its row; its column waits for its row's other member only because of that."""
    _, (finding,), waits = both_forms(dumped(tmp_path / "d", 4, without_rank_3, after_s=4))
    assert (finding.kind, finding.ranks) == ("hang", (3,))
    assert {(w["rank"], *w["for"]) for w in waits} == {(2, 3), (0, 2), (1, 3)}


def odd_rank_2(what, rank, torch, dist):
    x = torch.ones(16)
    for _ in range(2):
        dist.all_reduce(x)
    odd = rank == 2
    if what == "operation":
        dist.broadcast(x, 2) if odd else dist.all_reduce(x)
    elif what == "size":
        dist.broadcast(torch.ones(32 if odd else 16), 0)
    else:
        dist.all_reduce(torch.ones(16, dtype=torch.int32) if odd else x)
    dist.all_reduce(x)


@pytest.mark.parametrize("what", ["operation", "size", "dtype"])
def test_a_mismatch(tmp_path, what):
    _, findings, _ = both_forms(dumped(tmp_path / "d", 3, functools.partial(odd_rank_2, what)))
    finding = findings[0]
    assert (finding.kind, finding.ranks, finding.seq) == ("desync", (2,), findings[0].seq)
    told = evidence(finding)
    differs = {"operation": ("broadcast of 16 Float", "all_reduce of 16 Float"), "size": ("broadcast of 32 Float", "broadcast of 16 Float"), "dtype": ("all_reduce of 16 Int", "all_reduce of 16 Float")}[what]
    assert (told["rank 2 entered"].partition(": ")[2], told["rank 0 entered"].partition(": ")[2]) == differs


def one_send_two_receives(rank, torch, dist):
    x = torch.ones(4)
    if rank == 0:
        dist.send(x, 1)
    elif rank == 1:
        dist.recv(x, 0)
        dist.recv(x, 0)


def test_gloo_records_no_sends(tmp_path):
    job, findings, waits = both_forms(dumped(tmp_path / "d", 2, one_send_two_receives))
    assert (findings, waits) == ([], []) and all(s.p2p is None for by_rank in job.standings.values() for s in by_rank.values())


def all_done(rank, torch, dist):
    x = torch.ones(16)
    for _ in range(300):
        dist.all_reduce(x)
    dist.all_gather([torch.ones(4), torch.ones(4)], torch.ones(4))
    dist.broadcast(x, 1)
    dist.reduce_scatter_tensor(torch.ones(2), torch.ones(4))
    dist.gather(torch.ones(3), [torch.ones(3), torch.ones(3)] if rank == 0 else None)
    dist.barrier()


def test_nothing_hangs(tmp_path):
    directory = dumped(tmp_path / "d", 2, all_done)
    job, findings, waits = both_forms(directory)
    assert (findings, waits) == ([], [])
    dumps = [(r, flight.read(p)) for r, p in flight.find(directory).items()]
    slices, flows = check(json.loads(trace_export.render(flight.windows(dumps, job))))
    assert len(slices) >= 2 and len(flows) > 300


def made(entries, **status):
    """A dump as torch writes it, of (sequence number, name) pairs."""
    rows = [
        {"record_id": i, "pg_id": 0, "process_group": ("0", "default_pg"), "collective_seq_id": seq, "p2p_seq_id": 0, "op_id": seq, "profiling_name": f"nccl:{name}", "time_created_ns": 10 + i,
         "input_sizes": [[4]], "input_dtypes": ["Float"], "output_sizes": [[4]], "output_dtypes": ["Float"], "state": "completed", "retired": True, "is_p2p": False, "frames": []}
        for i, (seq, name) in enumerate(entries)
    ]  # fmt: skip
    return {"version": "2.10", "entries": rows, "pg_config": {"0": {"name": "0", "desc": "default_pg", "ranks": "[0, 1, 2]"}}, "pg_status": {"0": {"last_enqueued_collective": entries[-1][0] if entries else 0, "last_started_collective": -1, "last_completed_collective": 0} | status}}


def test_dumps_of_different_moments_accuse_nobody(tmp_path):
    for rank, upto in enumerate((100, 100, 60)):
        (tmp_path / f"nccl_trace_rank_{rank}").write_bytes(pickle.dumps(made([(s, "all_reduce") for s in range(1, upto + 1)], last_completed_collective=upto)))
    _, (finding,), _ = concluded(flight.find(tmp_path))
    assert (finding.kind, finding.ranks) == ("undecided", ()) and "different moments" in finding.cause


def test_a_rank_without_a_dump_is_named_where_members_are_known(tmp_path):
    for rank in (0, 2):
        (tmp_path / f"rank_{rank}").write_bytes(pickle.dumps(made([(s, "all_reduce") for s in (1, 2, 3)], last_completed_collective=2)))
    job, (finding,), _ = concluded(flight.find(tmp_path))
    assert job.absent == [1] and (finding.kind, finding.ranks) == ("undecided", ()) and evidence(finding)["ranks without a dump"] == "1"


def test_a_receive_without_its_send(tmp_path):
    """As NCCL's dumps have them: gloo has none."""
    for rank in range(3):
        dump = made([(1, "all_reduce")], last_completed_collective=1)
        if rank == 1:
            receive = dump["entries"][0] | {"profiling_name": "nccl:recv 1<-0", "is_p2p": True, "collective_seq_id": 1, "p2p_seq_id": 4, "state": "started", "retired": False}
            dump["entries"].append(receive)
        (tmp_path / f"rank_{rank}").write_bytes(pickle.dumps(dump))
    _, (finding,), waits = concluded(flight.find(tmp_path))
    assert (finding.kind, finding.ranks, finding.victims, finding.op) == ("hang", (0,), (1,), "recv")
    assert waits == [{"rank": 1, "group": "", "seq": 0, "op": "send or receive", "for": [0]}]


class Evil:
    def __reduce__(self):
        return os.system, ("touch /tmp/ckptd-analyze-was-here",)


@pytest.mark.parametrize(
    "data",
    [
        pickle.dumps(Evil()),
        pickle.dumps({"version": "2.10", "entries": [Evil()]}),
        pickle.dumps(["no", "dump"]),
        pickle.dumps({"entries": [{"collective_seq_id": "x"}]}),
        b"{" * 100_000,
        b'{"entries": [{"collective_seq_id": 1e400}]}',
        b'{"entries": 3}',
        b"\x80\x04",
        b"",
        b"\x00" * 100,
    ],
)
def test_hostile_dumps(tmp_path, data):
    (tmp_path / "trace_0").write_bytes(data)
    with pytest.raises(BadForeign, match="trace_0"):
        flight.read(tmp_path / "trace_0")
    assert not os.path.exists("/tmp/ckptd-analyze-was-here")


def test_hostile_values_in_a_dump_of_the_right_shape(tmp_path):
    """Whatever numbers and texts it holds: an answer, or a refusal."""
    odd = made([(1, "all_reduce"), (2**62, "x" * 5000), (-5, "send 0->1"), (3, "\x1b[31m")])
    odd["entries"][0] |= {"input_sizes": [[2**40, 2**40, 2**40]], "frames": [3, None, {"filename": 7}]}
    odd["entries"][1] |= {"input_sizes": [["a"], None], "process_group": []}
    odd["entries"][2] |= {"is_p2p": True, "p2p_seq_id": -7}
    odd["pg_config"] = {"": {"ranks": "[" + "9" * 10000 + "]"}, "0": {"ranks": None}}
    for rank in range(3):
        (tmp_path / f"trace_{rank}").write_bytes(pickle.dumps(odd))
    files = flight.find(tmp_path)
    job, findings, _ = concluded(files)
    msgspec.json.encode(findings)
    trace_export.render(flight.windows(((r, flight.read(p)) for r, p in files.items()), job))
