"""The tap in real ranks: every caller of c10d once, by every layer alike; attached by the environment alone; silent where it is told to be, and never in the way."""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from torch._C._distributed_c10d import ProcessGroup

from ckptd.channel import Pipe, listen, private_directory
from ckptd.core import wire
from ckptd.monitor import record, tap_build
from ckptd.monitor.ring import Ring
from tests.forks import ranks
from tests.ports import free_port

ROOT = Path(__file__).resolve().parents[2]
WORLD = 4
FUNCTIONAL_SENDS = hasattr(torch.ops._c10d_functional, "batch_p2p_ops")  # torch 2.13
HOOKS = ["hooks"] if hasattr(ProcessGroup, "register_pre_hook") else []  # torch 2.14
LAYERS = [*(["native"] if tap_build.built() else []), *HOOKS, "python", "patched"]
FULL = [n for n in LAYERS if n != "patched"]
SEEN = [*LAYERS, "light"]
"""What tap_job.py runs."""
SEEN_FULL = [n for n in SEEN if n != "patched"]
needs_native = pytest.mark.skipif("native" not in LAYERS, reason="the tap's C++ is not built (python -m ckptd.monitor.tap_build)")


def environment(directory: Path, **more: str) -> dict[str, str]:
    """Of a rank: no daemon but the one whose socket lies in `directory`."""
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CKPTD_DIR": str(directory), "CKPTD_TAP_BUILD": "0", **more}


@pytest.fixture(scope="module")
def seen(tmp_path_factory) -> list[dict]:
    """What each rank's ring held after the program of tap_job.py, by layer."""
    where = tmp_path_factory.mktemp("tap")
    port = str(free_port())
    processes = []
    for r in range(WORLD):
        env = environment(where, RANK=str(r), LOCAL_RANK=str(r), WORLD_SIZE=str(WORLD), MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        command = [sys.executable, str(ROOT / "tests/monitor/tap_job.py"), f"{where}/r", ",".join(SEEN)]
        with (where / f"log{r}").open("w") as log:
            processes.append(subprocess.Popen(command, env=env, stdout=log, stderr=log))
    try:
        for r, p in enumerate(processes):
            assert p.wait(280) == 0, (where / f"log{r}").read_text()[-3000:]
    finally:
        for p in processes:
            p.kill()
            p.wait()
    return [json.loads((where / f"r{r}.json").read_text()) for r in range(WORLD)]


def operations(said: dict, layer: str, case: str) -> list[tuple]:
    return [(r["op"], r["bytes"], r["dtype"]) for r in said[layer]["cases"][case] if not r["mark"]]


# --- every caller -----------------------------------------------------------------------------------------------------------

PLAIN = [
    ("all_reduce", 1024, "f32"), ("broadcast", 1024, "f32"), ("reduce", 1024, "f32"), ("all_gather", 1024, "f32"), ("all_gather", 1024, "f32"),
    ("reduce_scatter", 4096, "f32"), ("reduce_scatter", 1024, "f32"), ("all_to_all", 1024, "f32"), ("gather", 1024, "f32"), ("scatter", 1024, "f32"),
    ("barrier", 0, "?"), ("all_reduce", 14, "bf16"), ("all_reduce", 24, "i64"),
]  # fmt: skip


@pytest.mark.parametrize("layer", SEEN)
def test_calls_of_dist_are_recorded_once_each(seen, layer):
    for said in seen:
        assert operations(said, layer, "plain") == PLAIN
        assert operations(said, layer, "asynchronous") == [("all_reduce", 1024, "f32")] * 3 + [("reduce_scatter", 1024, "f32")]
        assert operations(said, layer, "groups_own_methods") == [("all_reduce", 1024, "f32")] * 3 + [("broadcast", 1024, "f32"), ("all_gather", 1024, "f32"), ("barrier", 0, "?")]
        assert [op for op, *_ in operations(said, layer, "objects")] == ["broadcast", "broadcast", "all_gather", "all_gather"]


@pytest.mark.parametrize("layer", SEEN)
def test_sends_and_receives_name_their_other_end(seen, layer):
    ends = [[(r["op"], r["peer"], r["seq"]) for r in said[layer]["cases"]["sends"] if not r["mark"]] for said in seen]
    assert ends[0] == [("send", 3, 1), ("send", 2, 2), ("send", 1, 3), ("recv", 3, 4)]
    assert ends[1] == [("recv_any", -1, 1), ("send", 2, 2), ("recv", 0, 3)]
    assert ends[2] == [("recv", 0, 1), ("send", 1, 2), ("send", 3, 3), ("recv", 1, 4)]
    assert ends[3] == [("recv", 0, 1), ("send", 0, 2), ("recv", 2, 3)]
    for said in seen:
        assert all(r["flags"] & record.P2P for r in said[layer]["cases"]["sends"] if not r["mark"])


@pytest.mark.parametrize("layer", SEEN)
def test_a_subgroup_counts_for_itself_and_has_global_members(seen, layer):
    for me, said in enumerate(seen):
        found = [(r["op"], r["seq"], r["peer"]) for r in said[layer]["cases"]["subgroup"] if not r["mark"]]
        assert found == {1: [("all_reduce", 1, -1), ("send", 1, 3)], 3: [("all_reduce", 1, -1), ("recv", 1, 1)]}.get(me, [])
    assert any(g["members"] == [1, 3] for g in seen[1][layer]["groups"])


@pytest.mark.parametrize("layer", SEEN_FULL)
def test_callers_in_cpp_are_recorded(seen, layer):
    """DDP's reducer, functional collectives, tensor parallelism, compiled code."""
    for said in seen:
        assert operations(said, layer, "ddp") == [("all_reduce", 33024, "f32"), ("all_reduce", 33280, "f32")]
        assert operations(said, layer, "functional") == [(op, 1024, "f32") for op in ("all_reduce", "all_gather", "reduce_scatter")], "of one tensor, they are the plain ones"
        assert operations(said, layer, "functional_sends") == [(op, 1024, "f32") for op in ("send", "recv") if FUNCTIONAL_SENDS]
        assert operations(said, layer, "tensor_parallel") == [("all_reduce", 512, "f32")]
        assert operations(said, layer, "compiled") == [("all_reduce", 1024, "f32")]


def test_operators_have_kernels_in_python_only_where_somebody_calls_them(seen):
    """Not for FSDP2, tensor parallelism, pipelines, functional collectives, compiled code."""
    assert {name for said in seen for name in said["light"]["whole"]} == {"ddp", *["functional_sends"] * FUNCTIONAL_SENDS}


@pytest.mark.parametrize("layer", SEEN)
def test_fsdp_and_a_pipeline_are_recorded(seen, layer):
    for said in seen:
        assert [op for op, *_ in operations(said, layer, "fsdp")] == ["all_gather"] * 4 + ["reduce_scatter"] * 2
        sends = sorted(op for op, *_ in operations(said, layer, "pipeline"))
        assert sends == ["recv", "recv", "send", "send"]


@pytest.mark.parametrize("layer", SEEN)
def test_what_began_is_known_to_have_ended(seen, layer):
    for said in seen:
        nobody_waits = [r for r in said[layer]["cases"]["functional_sends"] if r["op"] == "send"]  # torch gives back what is received
        records = [r for case in said[layer]["cases"].values() for r in case if not r["mark"] and r not in nobody_waits]
        assert all(r["returned"] and r["ended"] for r in records), [r for r in records if not r["ended"]]
        assert all(g["done"] == g["entered"] for g in said[layer]["groups"])
        waited = [r for name in ("plain", "asynchronous", "functional") for r in said[layer]["cases"][name] if not r["mark"]]
        assert all(r["flags"] & record.WAITED for r in waited)
        assert said[layer]["errors"] == 0


@pytest.mark.parametrize("layer", SEEN)
def test_members_of_a_group_agree(seen, layer):
    """The same key, and after the same operations the same history, on all members."""
    told: dict[int, set] = {}
    for said in seen:
        for g in said[layer]["groups"]:
            told.setdefault(g["key"], set()).add((tuple(g["members"]), g["entered"], g["history"]))
    assert told
    assert all(len(v) == 1 for v in told.values()), told


@pytest.mark.parametrize("layer", [n for n in SEEN_FULL if n != "native"])
@needs_native
def test_the_layers_write_the_same(seen, layer):
    names = ("op", "bytes", "dtype", "group", "seq", "peer")
    for said in seen:
        for case, records in said["native"]["cases"].items():
            mine = [[r[n] for n in names] for r in records if not r["mark"]]
            other = [[r[n] for n in names] for r in said[layer]["cases"][case] if not r["mark"]]
            assert mine == other, case
        used = [[(g["key"], g["history"]) for g in said[n]["groups"] if g["entered"]] for n in ("native", layer)]  # each layer had a pair of its own for what fails
        assert used[0] == used[1]


def test_errors_come_through_as_they_are(seen):
    plain = seen[0]["plain"]["raised"]
    assert [name for _, name, _ in plain] == ["ValueError", "RuntimeError"]
    for layer in SEEN:
        assert seen[0][layer]["raised"] == plain


def test_optimizers_end_steps(seen):
    for said in seen:
        for layer in SEEN:
            marks = [r["op"] for r in said[layer]["cases"]["ddp"] if r["mark"] and r["op"] in ("optimizer", "step")]
            assert marks == ["optimizer", "step"]


# --- attached by the environment alone --------------------------------------------------------------------------------------

USER = """
import sys, time, torch, torch.distributed as dist
dist.init_process_group("gloo")
model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(8, 8))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for i in range(10_000):
    model(torch.ones(4, 8)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    time.sleep(0.01)
    if i == int(sys.argv[1]):
        break
dist.barrier()
dist.destroy_process_group()
"""


class Listener:
    """A daemon that takes rings and asks once for a probe and for stacks."""

    def __init__(self, directory: Path) -> None:
        private_directory(directory)
        self.rings: dict[int, Ring] = {}
        self.heard: list = []
        self.changed = threading.Condition()
        self._socket = listen(directory / "daemon.sock")
        self._socket.setblocking(True)
        self._clients: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._socket.accept()
            except OSError:
                return
            self._clients.append(client)
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        pipe = Pipe(client, "daemon")
        while True:
            select.select([client], [], [], 1)
            try:
                messages = pipe.read()
            except (EOFError, OSError):
                return
            for m in messages:
                if isinstance(m, wire.Hello):
                    pipe.put(wire.Welcome(id=m.id, daemon="test", peer_address="", attempt_max=0, holdings=[], failed=[]))
                fd = pipe.take_fd() if isinstance(m, wire.Watch) else None
                with self.changed:
                    self.heard.append(m)
                    if fd is not None:
                        self.rings[m.rank] = Ring.adopt(fd)
                    self.changed.notify_all()
                if fd is not None:
                    pipe.put(wire.Watched(id=m.id))
                    pipe.put(wire.ProbeAsked(probe=m.rank, kind="compute", seconds=0.05))
                    pipe.put(wire.ProbeAsked(probe=100 + m.rank, kind="memory", seconds=0.05))  # before the first was answered
                    pipe.put(wire.StacksAsked(ask=m.rank))
                pipe.flush()

    def wait_for(self, what, timeout_s: float = 60.0):
        with self.changed:
            assert self.changed.wait_for(what, timeout_s), self.heard[-5:]

    def of(self, kind) -> list:
        return [m for m in self.heard if isinstance(m, kind)]

    def close(self) -> None:
        self._socket.close()
        for c in self._clients:
            c.close()


def torchrun(directory: Path, script: Path, *args: str, **env: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script), *args]
    with (directory / "log").open("w") as log:
        return subprocess.Popen(command, env=environment(directory / "d", **env), stdout=log, stderr=log, start_new_session=True)


def end(process: subprocess.Popen) -> None:
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "user.py"
    path.write_text(USER)
    return path


def test_a_script_that_knows_nothing_is_watched_and_its_rings_outlive_it(tmp_path, script):
    first = Listener(tmp_path / "d")
    job = torchrun(tmp_path, script, "9999")
    second = None
    try:
        first.wait_for(lambda: len(first.of(wire.ProbeDone)) == 4 and len(first.of(wire.StacksDone)) == 2)
        assert {(p.probe, p.kind) for p in first.of(wire.ProbeDone)} == {(0, "compute"), (1, "compute"), (100, "memory"), (101, "memory")}, "each that was asked for"
        assert {m.role for m in first.of(wire.Hello)} == {"tap"}, "torchrun's agent is no rank"
        assert {m.job for m in first.of(wire.Watch)} == {"user"}
        assert all(p.rate > 0 and p.best >= p.rate for p in first.of(wire.ProbeDone))
        assert all("user.py" in s.text for s in first.of(wire.StacksDone))
        ring = first.rings[0]
        pid = ring.word("pid")
        assert ring.word("layer") == record.LAYERS.index(LAYERS[0])
        until = time.monotonic() + 30
        while ring.word("step") < 5 and time.monotonic() < until:
            time.sleep(0.05)
        assert ring.word("step") >= 5
        (tmp_path / "d" / "daemon.sock").unlink()
        first.close()  # the daemon is gone, and another comes
        second = Listener(tmp_path / "d")
        second.wait_for(lambda: len(second.rings) == 2)
        again = second.rings[0]
        assert again.word("pid") == pid
        os.kill(pid, signal.SIGKILL)
        time.sleep(0.3)
        group = again.groups()[0]
        assert group.members == (0, 1)
        assert group.entered >= group.done >= 5
        marks = again.read(0).records
        steps = marks[(marks["op"] == record.STEP) & ((marks["flags"] & record.MARK) != 0)]
        assert len(steps) >= 5
        if Path("/proc/self/schedstat").exists():
            assert (steps["inside_us"][1:] > 0).all(), "how long the thread was on a processor"
    finally:
        end(job)
        first.close()
        if second is not None:
            second.close()


@pytest.mark.parametrize("switch", [{"CKPTD_DISABLE": "1"}, {"CKPTD_TAP": "0"}], ids=["everything", "the tap"])
def test_kill_switch(tmp_path, switch):
    listener = Listener(tmp_path / "d")
    code = (
        "import os, sys, threading, torch, torch.distributed as dist\n"
        "before = torch._C._distributed_c10d.Work.wait\n"
        "dist.init_process_group('gloo')\n"
        "dist.all_reduce(torch.ones(2))\n"
        "tap = sys.modules.get('ckptd.monitor.tap')\n"
        "print(tap is None or tap.current() is None, before is torch._C._distributed_c10d.Work.wait, len(threading.enumerate()))\n"
        "dist.destroy_process_group()\n"  # gloo's threads and an interpreter that ends without it have aborted
    )
    env = environment(tmp_path / "d", RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()), **switch)
    try:
        said = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120, check=True)
        assert said.stdout.split() == ["True", "True", "1"]
        assert not listener.heard
    finally:
        listener.close()


# --- in one process ---------------------------------------------------------------------------------------------------------


def with_tap(layer: str, work) -> object:
    """`work(tap)` in a rank of its own, alone, with this layer."""

    def rank(_rank: int) -> object:
        import torch.distributed as dist

        from ckptd.monitor import tap

        dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
        its = tap.current() or tap.attach()
        assert its is not None
        assert its.layer == layer
        said = work(its)
        its.close()
        return said

    return ranks(1, rank, env={"CKPTD_TAP": layer, "CKPTD_DIR": "/nonexistent", "CKPTD_TAP_BUILD": "0"})[0]


@pytest.mark.parametrize("layer", [n for n in FULL if n != "hooks"])  # torch's hooks are a group's own: one that nobody told of has none
def test_a_group_of_a_backend_that_says_nothing_of_itself(layer):
    """Nobody told Python of this group, and its backend gives no options: a process died of asking it."""

    def work(its):
        import torch
        import torch.distributed as dist
        from torch._C import _distributed_c10d as c10d

        backend = getattr(c10d.FakeProcessGroup, "_create_internal", c10d.FakeProcessGroup)(0, 1)
        group = c10d.ProcessGroup(dist.HashStore(), 0, 1)
        kind = c10d.ProcessGroup.BackendType.CUSTOM
        group._register_backend(torch.device("cpu"), kind, backend)
        group._set_default_backend(kind)
        group._set_group_name("untold")
        group.allreduce([torch.zeros(3)]).wait()
        newest = its.ring.read(0).records[-1]
        return [int(newest["op"]), int(newest["bytes"]), [*its.ring.groups()[int(newest["group"])].members]]

    assert with_tap(layer, work) == [record.OPS.index("all_reduce"), 12, [0]]


def from_the_start(its) -> dict[str, list[str]]:
    """A reducer and a compiler that come after the tap: what is recorded of each."""
    import torch.distributed as dist
    import torch.distributed._functional_collectives as funcol

    said: dict[str, list[str]] = {}

    def case(name: str, work) -> object:
        begin = its.writer.records
        got = work()
        ops = its.ring.read(begin).records
        said[name] = [record.OPS[int(o)] for o in ops["op"][(ops["flags"] & record.MARK) == 0]]
        return got

    group = dist.group.WORLD.group_name
    compiled = torch.compile(lambda x: funcol.all_reduce(x, "sum", group) + 1, backend="aot_eager")
    case("before", lambda: dist.all_reduce(torch.ones(3)))
    case("functional", lambda: float(funcol.all_reduce(torch.ones(3), "sum", group).sum()))
    case("compiling", lambda: compiled(torch.ones(3)))
    case("compiled", lambda: compiled(torch.ones(3)))
    case("differentiable", lambda: torch.ops._c10d_functional_autograd.all_gather_into_tensor(torch.ones(3, requires_grad=True), 1, group).sum().backward())
    model = case("ddp made", lambda: torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(3, 3)))
    case("ddp", lambda: model(torch.ones(1, 3)).sum().backward())
    case("after", lambda: dist.all_reduce(torch.ones(3)))
    case("functional after", lambda: float(funcol.all_reduce(torch.ones(3), "sum", group).sum()))
    return said


@pytest.mark.parametrize("layer", FULL)
def test_a_reducer_and_a_compiler_that_come_after_the_tap(layer):
    """Each operation once, whoever calls it, whatever was called before; what a compiler only tries out is none."""
    said = with_tap(layer, from_the_start)
    for case in ("before", "functional", "compiling", "compiled", "ddp", "after", "functional after"):
        assert said[case] == ["all_reduce"], case
    assert said["differentiable"] == ["all_gather", "reduce_scatter"]
    assert said["ddp made"] == ["all_gather", "broadcast", "broadcast"], "sizes, then parameters"


def odd_callers(its) -> dict[str, list]:
    """Calls that few make: what is recorded of each, as (operation, bytes, dtype), with what is amiss."""
    import datetime as dt
    import warnings

    import torch.distributed as dist
    from torch._C import _distributed_c10d as c10d
    from torch.utils._python_dispatch import TorchDispatchMode

    warnings.simplefilter("ignore")
    said: dict[str, list] = {}

    def case(name: str, work, *, raises: bool = False) -> object:
        begin, got = its.writer.records, None
        try:
            got = work()
        except RuntimeError:
            assert raises, name
        time.sleep(0.02)
        ops = [r for r in its.ring.read(begin).records if not int(r["flags"]) & record.MARK]
        said[name] = [[record.OPS[r["op"]], int(r["bytes"]), record.DTYPES[r["dtype"]]] + ["open"] * (not int(r["ended_ns"])) for r in ops]
        said[name] += ["failed"] * any(int(r["flags"]) & record.FAILED for r in ops)
        return got

    def group_of(cls, name: str):
        group = cls(dist.HashStore(), 0, 1) if cls is dist.ProcessGroup else cls()
        group._register_backend(torch.device("cpu"), dist.ProcessGroup.BackendType.GLOO, c10d.ProcessGroupGloo(dist.HashStore(), 0, 1, dt.timedelta(seconds=10)))
        group._set_default_backend(dist.ProcessGroup.BackendType.GLOO)
        group._set_group_name(name)
        return group

    class Named(dist.ProcessGroup):
        """Overrides nothing that matters."""

        def __init__(self) -> None:
            super().__init__(0, 1)

        def getBackendName(self) -> str:
            return "named"

    class Overrides(Named):
        def allreduce(self, tensors, opts):
            return super().allreduce(tensors, opts)

        def barrier(self, opts):
            return super().barrier(opts)

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            return func(*args, **(kwargs or {}))

    x, pg, functional, name = torch.ones(3), dist.group.WORLD, torch.ops._c10d_functional, dist.group.WORLD.group_name
    wait = functional.wait_tensor

    def in_a_mode(work):
        with Mode():
            work()

    def embedding():
        model = torch.nn.parallel.DistributedDataParallel(torch.nn.Embedding(5, 2, sparse=True))
        begin = its.writer.records
        model(torch.tensor([1, 3])).sum().backward()
        return begin

    # before anything made the Python tap whole
    case("opts and tensors by name", lambda: pg.allreduce(opts=dist.AllreduceOptions(), tensors=[x]).wait())
    case("tensor by name", lambda: pg.broadcast(root=0, tensor=x).wait())
    case("input by name", lambda: pg.allgather(input_tensors=[x], output_tensors=[[x.clone()]]).wait())
    case("a group of no class", lambda: ProcessGroup.allreduce(self=pg, tensors=[x]).wait())
    for kind, op in (("all_reduce", ("sum", name)), ("all_reduce_", ("sum", name)), ("all_gather_into_tensor", (1, name)), ("broadcast", (0, name))):
        case(f"complex {kind}", lambda kind=kind, op=op: wait(getattr(functional, kind)(torch.ones(3, dtype=torch.complex64), *op)))
    case("a wait that raises", lambda: wait(functional.all_to_all_single(torch.ones(3, dtype=torch.complex64), [3], [3], name)), raises=True)
    case("mode, functional", lambda: in_a_mode(lambda: wait(functional.all_reduce(x, "sum", name))))
    case("direct", lambda: c10d.Work.unbox(torch.ops.c10d.barrier(x, pg.boxed(), [], False, -1)).wait())
    case("dtensor", lambda: wait(torch.ops._dtensor.shard_dim_alltoall(torch.ones(2, 2), 0, 1, name)))
    named, overrides = group_of(Named, "named"), group_of(Overrides, "overrides")
    case("a class of Python's", lambda: named.allreduce([x], dist.AllreduceOptions()).wait())
    case("its coalesced", lambda: named.allgather_into_tensor_coalesced([x.clone()], [x], c10d.AllgatherOptions()).wait())
    case("an override", lambda: overrides.allreduce([x], dist.AllreduceOptions()).wait())
    case("its barrier", lambda: overrides.barrier(dist.BarrierOptions()).wait())
    c10d._register_process_group("overrides", overrides)
    case("functional on it", lambda: wait(functional.all_reduce(x, "sum", "overrides")))
    begin = case("sparse", embedding)
    sparse = [r for r in its.ring.read(begin).records if not int(r["flags"]) & record.MARK]
    said["sparse"] = [[record.OPS[r["op"]], int(r["bytes"])] for r in sparse]
    case("mode, whole", lambda: in_a_mode(lambda: dist.all_reduce(x)))
    case("mode, barrier", lambda: in_a_mode(dist.barrier))
    said["history"] = [hex(g.history) for g in its.ring.groups()]
    said["errors"] = [int(its.ring.header["errors"][0])]
    return said


def test_odd_callers():
    """Each is recorded as C++ records it; nothing raises that does not without a tap."""
    found = {layer: with_tap(layer, odd_callers) for layer in FULL if layer != "hooks"}  # which belong to groups that Python was told of
    one, first = [["all_reduce", 12, "f32"]], next(iter(found.values()))
    for layer, said in found.items():
        for name in ("opts and tensors by name", "a group of no class", "mode, functional", "a class of Python's", "an override", "functional on it", "mode, whole"):
            assert said[name] == one, (layer, name)
        assert said["tensor by name"] == [["broadcast", 12, "f32"]], layer
        assert said["complex all_reduce"] == [["all_reduce", 24, "f32"]], layer
        assert said["a wait that raises"][-1] == "failed", layer
        assert said["errors"] == [0], layer
        assert {k: v for k, v in said.items() if v != first[k]} == {}, layer


@pytest.mark.parametrize("layer", [n for n in FULL if n != "hooks"])  # which hold the newest work
def test_works_and_tensors_are_let_go_once_they_were_waited_for(layer):
    def work(_its):
        import gc
        import weakref

        import torch.distributed as dist

        alive = []
        for asynchronous in (True, False):
            x = torch.ones(1000)
            its = weakref.ref(x)
            w = dist.all_reduce(x, async_op=asynchronous)
            if w is not None:
                w.wait()
            del w, x
            gc.collect()
            alive.append(its() is not None)
        return alive

    assert with_tap(layer, work) == [False, False]


def test_collectives_of_another_thread_while_a_layer_is_tried():
    """What was seen on the trial's ring is not taken for what is on the tap's."""

    def rank(_rank: int) -> list:
        import torch.distributed as dist

        from ckptd.monitor import tap

        dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
        taking = tap.Tap._take

        def take(its, name, layer):
            dist.all_reduce(torch.ones(2))  # as if another thread came here
            taking(its, name, layer)

        tap.Tap._take = take
        its = tap.current() or tap.attach()
        for _ in range(20):
            dist.all_reduce(torch.ones(2))
        found = its.ring.read(0).records
        return [its.layer, int(its.ring.header["errors"][0]), len(found), its.ring.groups()[0].entered]

    assert ranks(1, rank, env={"CKPTD_TAP": "python", "CKPTD_DIR": "/nonexistent", "CKPTD_TAP_BUILD": "0"})[0] == ["python", 0, 20, 20]


def test_what_others_replaced_after_us_stays():
    """Another library may put its own method over ours; it is not taken away, and ours in it does nothing any more."""

    def rank(_rank: int) -> list:
        import torch.distributed as dist

        from ckptd.monitor import tap

        dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
        its = tap.current() or tap.attach()
        ours, broadcast, called = ProcessGroup.allreduce, ProcessGroup.broadcast, []
        dist._broadcast_coalesced = replaced = lambda *_: None

        def theirs(*args, **options):
            called.append(1)
            return ours(*args, **options)

        ProcessGroup.allreduce = theirs
        its.close()
        x = torch.ones(3)
        dist.all_reduce(x)
        return [its.layer, ProcessGroup.allreduce is theirs, ProcessGroup.broadcast is broadcast, called, float(x.sum()), its.writer.records, dist._broadcast_coalesced is replaced]

    said = ranks(1, rank, env={"CKPTD_TAP": "python", "CKPTD_DIR": "/nonexistent", "CKPTD_TAP_BUILD": "0"})[0]
    assert said == ["python", True, False, [1], 3.0, 0, True]


def odd_calls() -> dict[str, object]:
    """Operations whose tensors want gradients, or that something else looks at on their way: what comes of each."""
    import warnings

    import torch
    import torch.distributed as dist
    from torch.utils._python_dispatch import TorchDispatchMode

    heard, passed = [], []

    class Listens(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            passed.append(str(func))
            return func(*args, **(kwargs or {}))

    def gradient(grad: bool) -> list[str]:
        with warnings.catch_warnings(record=True) as caught, torch.set_grad_enabled(grad):
            warnings.simplefilter("always")
            x = torch.ones(3, requires_grad=True)
            y = x * 2
            dist.all_reduce(y)
            dist.broadcast(y.detach(), 0)
            if grad:
                y.sum().backward()
        return sorted(str(w.message).split("This may lead")[0] for w in caught if "autograd kernel" in str(w.message))

    heard += [gradient(True), gradient(False)]
    with torch.inference_mode():
        dist.all_reduce(torch.ones(3))
    with Listens():
        dist.all_reduce(torch.ones(3))
    with torch.no_grad():
        dist.all_gather([torch.empty(3)], torch.ones(3))
    return {"warnings": heard, "passed": [p for p in passed if p.startswith("c10d")]}


@pytest.mark.parametrize("layer", FULL)
def test_gradients_and_modes_see_what_they_see_without_a_tap(layer):
    """Operations are recorded once each, however they come; and torch warns of a backward pass through one as it does without us."""
    bare = ranks(1, lambda _: bare_calls(), env={"CKPTD_TAP": "0"})[0]

    def work(its):
        before, direct = its.writer.records, its._layer.module.direct() if layer == "native" else 0
        said = odd_calls()
        ops = its.ring.read(0).records[before:]
        names = [record.OPS[int(o)] for o in ops["op"][(ops["flags"] & record.MARK) == 0]]
        return [said, names, its._layer.module.direct() - direct if layer == "native" else 0, int(its.ring.header["errors"][0])]

    said, names, direct, errors = with_tap(layer, work)
    assert said == bare
    assert len(bare["warnings"][0]) >= 1 and bare["warnings"][1] == [] and len(bare["passed"]) == 1
    assert names == ["all_reduce", "broadcast", "all_reduce", "broadcast", "all_reduce", "all_reduce", "all_gather"]
    assert direct == (4 if layer == "native" else 0), "without a wish for gradients, and with nothing in between, the arguments are handed on as they are"
    assert errors == 0


def bare_calls() -> dict[str, object]:
    import torch.distributed as dist

    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    return odd_calls()


@pytest.mark.parametrize("layer", LAYERS)
def test_a_forked_child_writes_nothing(layer):
    def work(its):
        import torch
        import torch.distributed as dist

        dist.all_reduce(torch.ones(2))
        before = its.writer.records
        pid = os.fork()
        if pid == 0:
            its.marks.step(7)
            its.writer.step(8)
            os._exit(0 if its.writer.off else 1)
        code = os.waitpid(pid, 0)[1]
        after = its.writer.records
        dist.all_reduce(torch.ones(2))
        return [code, after - before, its.writer.records - after]

    assert with_tap(layer, work) == [0, 0, 1]


@pytest.mark.parametrize("layer", LAYERS)
def test_the_taps_own_failures_never_reach_the_user(layer):
    def work(its):
        import torch
        import torch.distributed as dist

        if layer == "native":
            its._layer.module.fail(1000)
        else:
            its._layer.seen.row = None  # a bug in the tap
        sums = []
        for _ in range(20):
            x = torch.ones(3)
            dist.all_reduce(x)
            sums.append(float(x.sum()))
        return [set(sums) == {3.0}, int(its.ring.header["errors"][0]), its.writer.off, len(its.ring.read(0).records)]

    assert with_tap(layer, work) == [True, 16, True, 0]


def test_a_layer_that_sees_nothing_is_not_believed(monkeypatch):
    """The trial: a native layer that records nothing falls through to the next."""

    def rank(_rank: int) -> str:
        import torch.distributed as dist

        from ckptd.monitor import tap

        class Blind:
            def __init__(self, ring) -> None:
                self.writer = None

            def remove(self) -> None:
                pass

        tap.LAYERS["native"] = lambda _tap, ring: Blind(ring)
        dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
        its = tap.current() or tap.attach()
        return its.layer

    assert ranks(1, rank, env={"CKPTD_TAP": "1", "CKPTD_DIR": "/nonexistent", "CKPTD_TAP_BUILD": "0"}) == [(HOOKS + ["python"])[0]]


@pytest.mark.parametrize("layer", FULL)
def test_marks(layer):
    """Phases of the user's, losses, gc, loader, saves, several optimizers: each as it was."""

    def work(its):
        import gc
        import tempfile

        import torch
        import torch.distributed as dist
        from torch.utils.data import DataLoader

        import ckptd

        gc.disable()
        begin = its.writer.records
        with ckptd.phase("eval"):
            inside = int(its.ring.header["phases"][0])
            with ckptd.phase("eval"), ckptd.phase("checkpoint"):
                both = int(its.ring.header["phases"][0])
            time.sleep(0.002)
        outside = int(its.ring.header["phases"][0])
        ckptd.report_loss(torch.tensor(float("nan")))
        ckptd.report_loss(1.0, torch.tensor(float("inf")))
        ckptd.report_loss(torch.tensor(2.0), 3.0)
        p = torch.nn.Parameter(torch.ones(3))
        p.grad = torch.full((3,), float("nan"))
        torch.nn.utils.clip_grad_norm_([p], 1.0)
        gc.collect()
        with tempfile.TemporaryFile() as f:
            torch.save({"a": 1}, f)

        class Slow(torch.utils.data.Dataset):
            def __len__(self):
                return 2

            def __getitem__(self, i):
                time.sleep(0.002)
                return torch.ones(1)

        assert len(list(DataLoader(Slow()))) == 2
        two = [torch.optim.SGD([p], lr=0.1), torch.optim.Adam([torch.nn.Parameter(torch.ones(200))], lr=0.1)]
        two[1].param_groups[0]["params"][0].grad = torch.ones(200)
        for _ in range(3):
            dist.all_reduce(torch.ones(2))
            for o in two:
                o.step()
            time.sleep(0.003)
        unnumbered = int(its.ring.header["step"][0])
        from ckptd.monitor import tap

        tap.stepped(40)
        two[0].step()
        found = its.ring.read(begin).records
        marks = [(record.MARKS[r["op"]], int(r["bytes"]), int(r["ended_ns"] - r["entered_ns"]) // 1000, int(r["flags"])) for r in found if r["flags"] & record.MARK]
        return {"phases": [inside, both, outside], "marks": marks, "steps": [unnumbered, int(its.ring.header["step"][0])]}

    said = with_tap(layer, work)
    assert said["phases"] == [1 << record.EVAL, 1 << record.EVAL | 1 << record.CHECKPOINT, 0]
    of = {kind: [m for m in said["marks"] if m[0] == kind] for kind in record.MARKS}
    assert len(of["eval"]) == 1
    assert of["eval"][0][2] >= 2000
    assert [m[1] for m in of["loss"]] == [record.BAD_LOSS, record.BAD_GRAD, record.BAD_GRAD]
    assert len(of["checkpoint"]) == 2, "the phase, and torch.save"
    assert [m[2] >= 2000 for m in of["data"][:2]] == [True, True]  # the end of the loop may be a third
    assert any(m[1] == 2 for m in of["gc"])
    assert len(of["optimizer"]) == 7
    assert [m[1] for m in of["step"]] == [0, 0, 0, 40], "of two optimizers one leads; once steps have numbers, those count"
    assert said["steps"] == [3, 40]
    assert of["step"][-1][3] == record.MARK | record.NUMBERED


@needs_native
def test_the_module_in_the_cache_must_be_ours(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert tap_build.built() is None
    (tmp_path / "ckptd").chmod(0o777)
    with pytest.raises(tap_build.NotBuilt, match="not ours alone"):
        tap_build.cache_directory()
    (tmp_path / "ckptd").chmod(0o700)
    target = tmp_path / "ckptd" / f"{tap_build.module_name()}.so"
    target.write_bytes(b"")
    target.chmod(0o722)
    assert tap_build.built() is None, "others may write it"
    monkeypatch.setenv("CXX", "/nonexistent/c++")
    target.unlink()
    with pytest.raises(tap_build.NotBuilt):
        tap_build.build()
