"""Seeded mutation of small foreign files: pickles of all protocols, torch.save zips and streams, DCP metadata, safetensors headers.

Only BadForeign may come out of a mutant, within a bounded time; what is accepted must be consistent and inert; nothing may be opened, imported, run
or unpickled meanwhile (an audit hook watches). Each execution has its own seed, so that one of them replays alone:

    FUZZ_SEED=<seed> FUZZ_FIRST=<number> FUZZ_EXECUTIONS=1 .venv/bin/python tests/hostile/fuzz.py
    scripts/fuzz --seconds 600                                                                     fresh seeds
"""

from __future__ import annotations

import argparse
import collections
import io
import os
import pathlib
import pickle
import random
import resource
import sys
import time
from collections.abc import Callable, Iterator

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

from ckptd.core.archive import Storage, Tensor, read_torch
from ckptd.core.inert import Dtype, Global, Made, MetadataIndex, NumpyDtype
from ckptd.core.pickles import Limits, load
from ckptd.core.tensorfile import parse
from ckptd.errors import BadForeign

LIMITS = Limits(bytes_max=1 << 20, opcodes_max=50_000, containers_max=20_000, memo_max=20_000, copied_bytes_max=4 << 20, nodes_max=100_000)
SECONDS_MAX = 5.0
"""One execution, on a machine that others use too. The slowest measured took 0.02 s."""
GROWTH_BYTES_MAX = 256 << 20
"""Of the process over a whole run."""

INERT = {type(None), bool, int, float, complex, str, bytes, bytearray, list, tuple, dict, set, frozenset, slice, range, np.ndarray}
INERT |= {Storage, Tensor, Dtype, Global, Made, MetadataIndex, NumpyDtype}
FORBIDDEN = ("os.", "subprocess.", "socket.", "ctypes.", "shutil.", "urllib.", "http.", "exec", "compile", "open", "pickle.find_class", "builtins.input", "webbrowser.", "pty.", "code.__new__")
_watching = False
_seen: list[str] = []


def _hook(event: str, args: object) -> None:
    if _watching and event.startswith(FORBIDDEN):
        _seen.append(f"{event} {args!r}"[:200])


# --- samples ----------------------------------------------------------------------------------------------------------------


def values() -> list[object]:
    return [
        {"a": [1, -2, 2**40, 2**100, 1.5, None, True], "b": ("x", b"\xff", "é" * 3), (1, "k"): {1, 2}}, collections.OrderedDict(a=collections.OrderedDict(), b=[()]), np.arange(4, dtype=">i2").reshape(2, 2),
        [np.float64(2), np.array(["a", "b"]), np.datetime64("2026-01-01")], argparse.Namespace(lr=1e-3, path=pathlib.PurePosixPath("/a")), [frozenset({1}), collections.deque([1]), collections.Counter("ab"), bytearray(b"x"), 1j, slice(1), range(3)],
        [[[[[1], 2], 3], 4], 5], list(range(40)),
    ]  # fmt: skip


def pickles() -> list[bytes]:
    return [pickle.dumps(value, protocol) for value in values() for protocol in range(6)]


def files() -> list[bytes]:
    """torch.save files, without CRCs: a mutant of the pickle shall get as far as the pickle."""
    import torch

    base = torch.arange(6.0).reshape(2, 3)
    samples = [{"a": base, "b": base[1:], "s": 3}, [torch.nn.Parameter(torch.ones(2)), torch.zeros(0), torch.ones(2, dtype=torch.uint16)]]
    found = []
    torch.serialization.set_crc32_options(False)
    try:
        for value in samples:
            for zipped in (True, False):
                file = io.BytesIO()
                torch.save(value, file, _use_new_zipfile_serialization=zipped)
                found.append(file.getvalue())
    finally:
        torch.serialization.set_crc32_options(True)
    return found


def metadata() -> list[bytes]:
    import torch
    from torch.distributed.checkpoint import metadata as m
    from torch.distributed.checkpoint.filesystem import _StorageInfo

    tensor = m.TensorStorageMetadata(m.TensorProperties(torch.float32), torch.Size((4, 3)), [m.ChunkStorageMetadata(torch.Size((0, 0)), torch.Size((4, 3)))])
    whole = m.Metadata({"w": tensor, "o": m.BytesStorageMetadata()}, {"w": ("w",)}, {m.MetadataIndex("w", torch.Size((0, 0)), 0): _StorageInfo("__0_0.distcp", 0, 9)})
    return [pickle.dumps(whole, protocol) for protocol in (2, 4)]


def headers() -> list[bytes]:
    texts = [b'{"__metadata__":{"format":"pt"},"a":{"dtype":"F32","shape":[2,2],"data_offsets":[0,16]},"b":{"dtype":"BF16","shape":[4],"data_offsets":[16,24]}}', b'{"z":{"dtype":"I64","shape":[],"data_offsets":[0,8]}}  ']
    return [len(t).to_bytes(8, "little") + t + bytes(n) for t, n in zip(texts, (24, 8), strict=True)]


# --- what each is read by, and what must hold of what is accepted -----------------------------------------------------------


def port(data: bytes) -> Callable[[int, int], bytes]:
    return lambda begin, count: data[begin : begin + count]


def read_pickle(data: bytes) -> None:
    value, used = load(data, limits=LIMITS)
    assert 0 < used <= len(data)
    assert_inert(value, 0)


def read_file(data: bytes) -> None:
    assert_inert(read_torch(port(data), len(data), limits=LIMITS), len(data))


def read_header(data: bytes) -> None:
    file = parse(port(data), len(data))
    at = file.header_bytes
    for _, _, begin, end in file.tensors.values():
        assert begin == at <= end
        at = end
    assert at == len(data)


def assert_inert(value: object, size: int) -> None:
    seen: set[int] = set()
    todo = [value]
    while todo:
        node = todo.pop()
        assert type(node) in INERT or isinstance(node, np.generic), type(node)
        if isinstance(node, np.ndarray):
            assert not node.dtype.hasobject
        if type(node) is Tensor:
            assert node.storage.begin <= node.begin or not node.numel
            assert 0 <= node.storage.begin <= node.storage.begin + node.storage.nbytes <= size
            todo.append(node.storage)
        if id(node) in seen or type(node) not in {list, tuple, dict, set, frozenset, Made}:
            continue
        seen.add(id(node))
        if type(node) is Made:
            todo.extend([*node.args, node.state, *node.items, *(part for pair in node.pairs for part in pair), node.kwargs])
        elif type(node) is dict:
            todo.extend([*node.keys(), *node.values()])
        else:
            todo.extend(node)


# --- mutation ---------------------------------------------------------------------------------------------------------------

NUMBERS = [0, 1, 2, 7, 8, 16, 127, 128, 255, 256, 65535, 65536, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**62, 2**63 - 1, 2**63, 2**64 - 1]
WORDS = [bytes([op]) for op in b"()]}.02NRabdeghjlqrstu\x80\x81\x85\x86\x87\x88\x8f\x90\x91\x92\x93\x94\x95\x8c\x8d\x8e\x96\x97\x98\x82\x83"]
WORDS += [b"cos\nsystem\n", b"cbuiltins\neval\n", b"ccollections\nOrderedDict\n", b"cnumpy\ndtype\n", b"ctorch\nSize\n", b"cbuiltins\nset\n", b"cargparse\nNamespace\n)R", b"K\x00\x85", b"}b", b"ctorch.distributed.checkpoint.metadata\nMetadataIndex\n)\x81"]
WORDS += [b"PK\x03\x04", b"PK\x05\x06", b"PK\x01\x02", b"data.pkl", b"../", b"{", b"[", b'"', b",", b"9" * 40, b"-1", b"1e999", b"NaN", b"F64", b"\xff\xff\xff\xff"]


def mutated(rng: random.Random, data: bytes, others: list[bytes]) -> bytes:
    mutant = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 6))):
        size = len(mutant)
        at = rng.randrange(size + 1)
        kind = rng.randrange(9)
        if kind == 0 and at < size:
            mutant[at] ^= 1 << rng.randrange(8)
        elif kind == 1 and at < size:
            mutant[at] = rng.randrange(256)
        elif kind == 2:
            del mutant[at : at + rng.choice((1, 2, 4, 16, 64))]
        elif kind == 3:
            mutant[at:at] = rng.choice(WORDS)
        elif kind == 4 and size > 8:  # a length, or any other number
            width = rng.choice((1, 2, 4, 8))
            at = min(at, size - width)
            number = rng.choice(NUMBERS) if rng.random() < 0.5 else int.from_bytes(mutant[at : at + width], "little") + rng.choice((-1, 1, 8, -8, 64))
            mutant[at : at + width] = (number % 256**width).to_bytes(width, "little")
        elif kind == 5:
            other = rng.choice(others)
            begin = rng.randrange(len(other))
            mutant[at : at + rng.choice((0, 4, 32))] = other[begin : begin + rng.choice((4, 16, 128))]
        elif kind == 6 and rng.random() < 0.3:
            del mutant[at:]
        elif kind == 7:
            begin = rng.randrange(size + 1)
            mutant[at:at] = mutant[begin : begin + rng.choice((1, 8, 64))]
        elif kind == 8 and at < size:
            mutant[at : at + 1] = rng.choice(WORDS)[:1]
        if not mutant:
            mutant += b"\x80"
    return bytes(mutant)


def kinds() -> list[tuple[str, int, list[bytes], Callable[[bytes], None]]]:
    """(name, share, samples, reader)."""
    return [("pickle", 11, pickles(), read_pickle), ("metadata", 2, metadata(), read_pickle), ("torch.save", 4, files(), read_file), ("safetensors", 3, headers(), read_header)]


def schedule(seed: int, first: int) -> Iterator[int]:
    number = first
    while True:
        yield (seed << 40) + number
        number += 1


def fuzz(seed: int, executions: int = 1 << 62, seconds: float = float("inf"), first: int = 0) -> dict[str, tuple[int, int]]:
    """Run; returns kind -> (executions, accepted). Raises AssertionError that names what to replay."""
    global _watching
    chosen = [kind for kind in kinds() for _ in range(kind[1])]
    for _, _, samples, reader in kinds():
        for sample in samples:
            reader(sample)  # the samples themselves are good; and codecs are imported before the watch begins
    sys.addaudithook(_hook)
    counts = {name: [0, 0] for name, *_ in kinds()}
    rng = random.Random()
    rss_kib, began, slowest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic(), 0.0
    for number, own in enumerate(schedule(seed, first)):
        if number >= executions or (number % 256 == 0 and time.monotonic() - began > seconds):
            break
        rng.seed(own)
        name, _, samples, reader = rng.choice(chosen)
        mutant = mutated(rng, rng.choice(samples), samples)
        replay = f"FUZZ_SEED={seed} FUZZ_FIRST={first + number} FUZZ_EXECUTIONS=1 .venv/bin/python tests/hostile/fuzz.py"
        counts[name][0] += 1
        start = time.monotonic()
        _watching = True
        try:
            reader(mutant)
            counts[name][1] += 1
        except BadForeign:
            pass
        except BaseException as e:
            _watching = False
            msg = f"{name}: {type(e).__name__}: {e}\n  {replay}\n  {mutant[:400]!r}"
            raise AssertionError(msg) from e
        finally:
            _watching = False
        took = time.monotonic() - start
        slowest = max(slowest, took)
        assert took < SECONDS_MAX, f"{name}: took {took:.1f} s\n  {replay}"
        assert not _seen, f"{name}: {_seen}\n  {replay}"
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - rss_kib) << 10
    assert grown < GROWTH_BYTES_MAX, f"seed {seed}: the process grew by {grown >> 20} MiB"
    print(f"slowest {slowest * 1e3:.1f} ms, grown by {grown >> 20} MiB")
    return {name: (done, accepted) for name, (done, accepted) in counts.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=float("inf"))
    parser.add_argument("--executions", type=int, default=int(os.environ.get("FUZZ_EXECUTIONS", "0")))
    a = parser.parse_args()
    seed = int(os.environ.get("FUZZ_SEED", random.SystemRandom().randrange(1 << 31)))
    executions = a.executions or (1 << 62 if a.seconds < float("inf") else 100_000)
    print(f"seed {seed}", flush=True)
    began = time.monotonic()
    counts = fuzz(seed, executions, a.seconds, int(os.environ.get("FUZZ_FIRST", "0")))
    total = sum(done for done, _ in counts.values())
    print(f"{total} executions in {time.monotonic() - began:.1f} s; " + ", ".join(f"{name}: {done} ({accepted} accepted)" for name, (done, accepted) in counts.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
