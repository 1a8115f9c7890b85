"""A ring's bytes are the same in Python and C, and what is read of it is never wrong: torn, lapped, adopted from a stranger, or left by a dead writer."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest

from ckptd.errors import BadImage
from ckptd.monitor import record, tap_build
from ckptd.monitor.ring import Ring
from ckptd.monitor.tap_ops import OPS, group_key, history, signature
from ckptd.monitor.tap_writer import Writer

ROOT = Path(__file__).resolve().parents[2]
needs_native = pytest.mark.skipif(tap_build.built() is None, reason="the tap's C++ is not built (python -m ckptd.monitor.tap_build)")


def test_c_draws_the_same_bytes(tmp_path):
    """Every field of `record.py` at its place and of its size in `ring.h`, and all constants."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler")
    lines = []
    for dtype, struct in ((record.HEADER, "ckptd_ring_header"), (record.GROUP, "ckptd_ring_group"), (record.RECORD, "ckptd_ring_record")):
        lines += [f'printf("{struct}.{f} %zu %zu\\n", offsetof({struct}, {f}), sizeof((({struct} *)0)->{f}));' for f in dtype.names]
        lines.append(f'printf("{struct} %zu\\n", sizeof({struct}));')
    kinds = {f"CKPTD_{n.upper()}": i for i, n in enumerate(record.MARKS)}
    ops = {f"CKPTD_{n.upper()}": i for i, n in enumerate(record.OPS) if n != "?"}
    dtypes = {f"CKPTD_{n.upper()}": i for i, n in enumerate(record.DTYPES) if n not in ("?", "other")}
    layers = {f"CKPTD_LAYER_{n.upper()}": i for i, n in enumerate(record.LAYERS)}
    flags = {f"CKPTD_{n}": getattr(record, n) for n in ("P2P", "ASYNC", "FAILED", "DEVICE", "COALESCED", "MARK", "WAITED", "CAPTURED")}
    sizes = {
        "CKPTD_GROUPS_MAX": record.GROUPS_MAX, "CKPTD_RANKS_MAX": record.RANKS_MAX, "CKPTD_NO_GROUP": record.NO_GROUP, "CKPTD_EVERYBODY": record.EVERYBODY,
        "CKPTD_GROUPS_AT": record.GROUPS_AT, "CKPTD_RANKS_AT": record.RANKS_AT, "CKPTD_RECORDS_AT": record.RECORDS_AT,
        "CKPTD_RING_MAGIC": record.MAGIC, "CKPTD_RING_VERSION": record.VERSION,
    }  # fmt: skip
    constants = kinds | ops | dtypes | layers | flags | sizes
    lines += [f'printf("{n} %llu\\n", (unsigned long long)({n}));' for n in constants]
    source = tmp_path / "ring.c"
    source.write_text('#include <stddef.h>\n#include <stdio.h>\n#include "ring.h"\nint main(void) {\n' + "\n".join(lines) + "\nreturn 0;\n}\n")
    subprocess.run([compiler, f"-I{ROOT / 'monitor'}", "-o", str(tmp_path / "ring"), str(source)], check=True, timeout=60)
    said = subprocess.run([str(tmp_path / "ring")], capture_output=True, text=True, check=True, timeout=60).stdout.splitlines()
    told = {line.split()[0]: [int(x) for x in line.split()[1:]] for line in said}
    for dtype, struct in ((record.HEADER, "ckptd_ring_header"), (record.GROUP, "ckptd_ring_group"), (record.RECORD, "ckptd_ring_record")):
        for f in dtype.names:
            of, offset = dtype.fields[f][:2]
            assert told[f"{struct}.{f}"] == [offset, of.itemsize], f
        assert told[struct][0] - dtype.itemsize in range(8), "but for padding at the end"
    assert {n: told[n][0] for n in constants} == constants


@needs_native
def test_cpp_has_the_same_table_and_places():
    module = tap_build.load()
    for name, dtype in (("HEADER", record.HEADER), ("GROUP", record.GROUP), ("RECORD", record.RECORD)):
        fields, size = module.layout()[name]
        assert {f: (dtype.fields[f][1], dtype.fields[f][0].itemsize) for f in dtype.names} == fields
        assert size - dtype.itemsize in range(8)
    text = (ROOT / "monitor/native.cpp").read_text()
    codes = {n: f"CKPTD_{record.OPS[n].upper()}" for n in range(1, len(record.OPS))}
    for op in OPS:
        words = ", ".join([f'"{op.name}"', codes[op.code], str(op.tensors), *(str(b).lower() for b in (op.even, op.p2p, op.coalesced))])
        assert f"{{{words}, " in text, f"SPECS has no line {words}"


def test_keys_and_signatures():
    assert group_key("0", [0, 1, 2]) == group_key("0", [2, 1, 0])
    assert len({group_key("0", [0, 1]), group_key("1", [0, 1]), group_key("0", [0, 12]), group_key("0", [0, 1, 2])}) == 4
    a, b = signature(1, 7, 1024), signature(1, 7, 1028)
    assert len({a, b, signature(2, 7, 1024), signature(1, 8, 1024)}) == 4
    assert history(history(0, a), b) != history(history(0, b), a), "order counts"


# --- reading while it is written --------------------------------------------------------------------------------------------


def wrong(window, capacity: int) -> int:
    """Records that no writer wrote: `hammer` gives each field a value that follows from its number."""
    r = window.records
    i = r["commit"].astype(np.uint64) - np.uint64(1)
    return int(np.count_nonzero((r["entered_ns"] != i + np.uint64(5)) | (r["ended_ns"] != i * np.uint64(3)) | (r["bytes"] != i * np.uint64(7)) | (np.diff(i, prepend=i[:1]) > capacity * 64)))


def hammer(ring: Ring, native: bool, seconds: float) -> None:
    """Write records as fast as can be, each telling its number."""
    until = time.monotonic() + seconds
    i = 0
    if native:
        module = tap_build.load()
        module.use(np.frombuffer(ring.memory, np.uint8, 1).ctypes.data, ring.capacity)
        mark = module.mark
    else:
        mark = Writer(ring).mark
    while time.monotonic() < until:
        for _ in range(200):
            mark(record.DATA, i + 5, i * 3, i * 7, 0)
            i += 1


def child(work) -> int:
    pid = os.fork()
    if pid == 0:
        try:
            work()
        finally:
            os._exit(0)
    return pid


@pytest.mark.parametrize("native", [False, pytest.param(True, marks=needs_native)], ids=["python", "native"])
@pytest.mark.parametrize("pause_s", [0.0, 0.005], ids=["keeping up", "lapped"])
def test_nothing_wrong_is_read_and_what_is_lost_is_counted(native, pause_s):
    ring = Ring.create(256)
    if native:
        tap_build.load()  # before the fork
    pid = child(lambda: hammer(ring, native, 1.5))
    reader = Ring.adopt(os.dup(ring.fd))
    begin = got = lost = bad = windows = 0
    alive = True
    while alive or begin < reader.word("head"):
        alive = alive and os.waitpid(pid, os.WNOHANG)[0] == 0
        window = reader.read(begin)
        bad += wrong(window, 256)
        got, lost, begin, windows = got + len(window.records), lost + window.lost, window.end, windows + 1
        time.sleep(pause_s)
    written = reader.word("head")
    print(f"written {written}, read {got}, lost {lost}, in {windows} windows")
    assert bad == 0
    assert got + lost == written
    assert got > 0
    assert written > 1000
    if pause_s:
        assert lost > 0


def test_a_ring_is_readable_after_its_writer_was_killed():
    ring = Ring.create(64)
    ring.header["world_size"] = 6

    def work() -> None:
        writer = Writer(ring)
        row = writer.group(9, 2, 1, [3, 5])
        i = writer.enter(row, 1, 7, 64, 0, -1, 64)
        writer.ended(i)
        writer.enter(row, 1, 7, 64, 0, -1, 64)
        os.kill(os.getpid(), signal.SIGKILL)

    pid = child(work)
    assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGKILL
    reader = Ring.adopt(os.dup(ring.fd))
    (group,) = reader.groups()
    assert (group.members, group.mine, group.entered, group.done) == ((3, 5), 1, 2, 1)
    records = reader.read(0).records
    assert [int(x) > 0 for x in records["ended_ns"]] == [True, False]


def test_a_writer_that_died_within_a_record_costs_that_record():
    """Claimed, never committed: read later, and counted once it is lapped."""
    ring = Ring.create(64)
    writer = Writer(ring)
    for i in range(10):
        writer.mark(record.DATA, i, i, i)
    ring.header["head"] += 1  # died here: the place was cleared, nothing more
    ring.records["commit"][10] = 0
    reader = Ring.adopt(os.dup(ring.fd))
    window = reader.read(0)
    assert (len(window.records), window.lost) == (10, 0)
    for i in range(200):
        writer.mark(record.DATA, i, i, i)
    rest = reader.read(window.end)
    assert len(rest.records) + rest.lost + len(window.records) == reader.word("head")


def test_late_words_never_touch_a_record_of_another():
    ring = Ring.create(64)
    writer = Writer(ring)
    row = writer.group(9, 2, 0, [0, 1])
    first = writer.enter(row, 1, 7, 64, 0, -1, 64)
    for i in range(64):
        writer.mark(record.DATA, 1, 2, i)
    writer.ended(first)
    writer.waited(first, 0, done=True)
    writer.returned(first, 1)
    assert set(ring.read(0).records["ended_ns"]) == {2}


def test_groups_beyond_the_table_are_counted():
    ring = Ring.create(64)
    writer = Writer(ring)
    rows = [writer.group(100 + i, 2, 0, [0, i + 2]) for i in range(record.GROUPS_MAX + 3)]
    assert rows[: record.GROUPS_MAX] == [*range(record.GROUPS_MAX)]
    assert rows[record.GROUPS_MAX :] == [record.NO_GROUP] * 3
    assert ring.word("untabled") == 3
    assert writer.group(100, 2, 0, [0, 2]) == 0, "the same key is the same row"
    i = writer.enter(record.NO_GROUP, 1, 7, 4, 0, -1, 4)
    writer.ended(i)
    assert int(ring.read(0).records["group"][0]) == record.NO_GROUP


@pytest.mark.parametrize("how", ["unsealed", "short", "magic", "capacity", "pipe"])
def test_what_is_no_ring_is_refused(how):
    if how == "pipe":
        read, write = os.pipe()
        os.close(write)
        with pytest.raises(BadImage):
            Ring.adopt(read)
        return
    if how in ("unsealed", "short"):
        fd = os.memfd_create("x", os.MFD_ALLOW_SEALING)
        os.ftruncate(fd, record.ring_bytes(64) if how == "unsealed" else 4096)
        with pytest.raises(BadImage):
            Ring.adopt(fd)
        return
    ring = Ring.create(64)
    if how == "magic":
        ring.header["magic"] = 1
    else:
        ring.header["capacity"] = 1 << 19
    with pytest.raises(BadImage):
        Ring.adopt(os.dup(ring.fd))
