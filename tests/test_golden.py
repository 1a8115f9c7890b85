"""Checkpoints of every released format version are read for ever: compared with what is written here, not with what today's code would write."""

from __future__ import annotations

import hashlib
import math
from collections import Counter, OrderedDict, deque
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors import safe_open

from ckptd import restore
from ckptd.cli import main as cli
from ckptd.core import typed
from ckptd.core.boxes import Box
from ckptd.core.image import ITEM_BYTES
from ckptd.core.plan import Want
from ckptd.storage import checkpoint, open_store

V1 = Path(__file__).parent / "golden" / "v1"
DIRECTORY = "golden/step-00000012"
FILES = {
    "images/r00000.safetensors": "680a8c19e60c9ef9b840f60e0d7631f9527492f3423de7779706f4939b80f377",
    "images/r00001.safetensors": "b885339abce0d964f43f81bc97863f7a8d0929ff52eb6044efaf0560974ad6ac",
    "index.msgpack.zst": "35d2c07772c8920d700f185b51df04f8d5ffb8948139736217ce2e15a76b2124",
    "manifest.json": "79a1bab169f8dc13446f17d41a7b35e5442ae11c2d7912cdacbf9b6851d4374b",
}

EMBED = "".join(np.float32(i).tobytes().hex() for i in range(21))
TENSORS = {
    "every.BF16": ("BF16", (3,), "", "08090a0b0c0d"),
    "every.BOOL": ("BOOL", (3,), "", "000100"),
    "every.C64": ("C64", (3,), "", "030405060708090a0b0c0d0e0f101112131415161718191a"),
    "every.F16": ("F16", (3,), "", "0708090a0b0c"),
    "every.F32": ("F32", (3,), "", "0405060708090a0b0c0d0e0f"),
    "every.F64": ("F64", (3,), "", "000102030405060708090a0b0c0d0e0f1011121314151617"),
    "every.F8_E4M3": ("F8_E4M3", (3,), "", "0e0f10"),
    "every.F8_E4M3FNUZ": ("F8_E4M3FNUZ", (3,), "", "0f1011"),
    "every.F8_E5M2": ("F8_E5M2", (3,), "", "101112"),
    "every.F8_E5M2FNUZ": ("F8_E5M2FNUZ", (3,), "", "111213"),
    "every.I16": ("I16", (3,), "", "090a0b0c0d0e"),
    "every.I32": ("I32", (3,), "", "05060708090a0b0c0d0e0f10"),
    "every.I64": ("I64", (3,), "", "0102030405060708090a0b0c0d0e0f101112131415161718"),
    "every.I8": ("I8", (3,), "", "0b0c0d"),
    "every.U16": ("U16", (3,), "", "0a0b0c0d0e0f"),
    "every.U32": ("U32", (3,), "", "060708090a0b0c0d0e0f1011"),
    "every.U64": ("U64", (3,), "", "02030405060708090a0b0c0d0e0f10111213141516171819"),
    "every.U8": ("U8", (3,), "", "0c0d0e"),
    "every.complex128": ("U8", (2, 16), "complex128", "000000000000f03f00000000000000400000000000000080000000000000e0bf"),
    "every.float4_e2m1fn_x2": ("U8", (2, 1), "float4_e2m1fn_x2", "2143"),
    "every.float8_e8m0fnu": ("U8", (3, 1), "float8_e8m0fnu", "7e7f80"),
    "model.bn.running_mean": ("F32", (2,), "", "0000803f00000040"),
    "model.bn.running_mean@r1": ("F32", (2,), "", "0000404000008040"),
    "model.embed.weight": ("F32", (7, 3), "", EMBED),
    "model.flat": ("I16", (3, 4), "", "00000100020003000400050006000700080009000a000b00"),
    "model.flat#1": ("I8", (1,), "", "2a"),
    "model.head.weight": ("F32", (7, 3), "", EMBED),
    "model.none": ("F32", (0, 3), "", ""),
    "object/extras.loader.weights@r0": ("F64", (1, 2), "", "000000000000e03f000000000000e0bf"),
    "object/extras.loader.weights@r1": ("F64", (1, 2), "", "000000000000e03f000000000000e0bf"),
    "object/rng.python.1@r0": ("U32", (5,), "", "0000000001000000020000000300000004000000"),
    "object/rng.python.1@r1": ("U32", (5,), "", "0000000001000000020000000300000004000000"),
    "object/rng.torch@r0": ("U8", (6,), "", "000102030405"),
    "object/rng.torch@r1": ("U8", (6,), "", "010203040506"),
    "optim.state.embed.weight.step": ("F32", (), "", "00004041"),
    "optim.state.frozen.exp_avg": ("F32", (2,), "", "0000000000000000"),
}
FLAT_ROWS = {0: {Box((0, 0), (2, 4)), Box((2, 0), (1, 2))}, 1: {Box((2, 2), (1, 2))}}
"""The boxes of model.flat by image: a flat range in two boxes, and the rest."""
NOTES = {
    "json": [None, True, False, 0, -9223372036854775807, 9223372036854775807, 0.1, -0.0, 5e-324, "text \u00e9 \u2028 \x00", [], {}],
    "int": [2**63, -(2**63), 2**127 + 1, 2**2000 + 1, -(2**2000) - 1],
    "str": "file-\udcff.txt",
    "float": [math.inf, -math.inf],
    "bytes": b"\x00\xff",
    "complex": complex(-0.0, math.inf),
    "tuple": (1, (2,), ()),
    "set": {1, 2, 3},
    "frozenset": frozenset({"a"}),
    "deque": deque([1, 2]),
    "ring": deque([1, 2], maxlen=3),
    "odict": OrderedDict([("z", 1), ("a", 2)]),
    "dict": {1: "one", "$tag": "dollar", (0, 1): "pair"},
    "counter": Counter({"x": 3}),
    "npscalar": [
        np.float32(1.5), np.int64(-7), np.bool_(True), np.complex128(1 + 2j), np.datetime64("2026-01-01", "D"), np.str_("\u00e9"), np.bytes_(b"\x01\x00"),
    ],
}  # fmt: skip
TAGS = {
    "$int", "$str", "$float", "$bytes", "$complex", "$tuple", "$set", "$frozenset", "$deque", "$odict", "$dict", "$counter", "$ring", "$npscalar", "$array",
}  # fmt: skip


@pytest.fixture(scope="module")
def index():
    _, found = checkpoint.read_checkpoint(open_store(str(V1)), DIRECTORY)
    return found


def test_the_files_are_those_that_were_released():
    held = {str(p.relative_to(V1 / DIRECTORY)): hashlib.sha256(p.read_bytes()).hexdigest() for p in (V1 / DIRECTORY).rglob("*") if p.is_file()}
    assert held == FILES
    assert sum((V1 / DIRECTORY / name).stat().st_size for name in held) < 64 << 10


def test_every_byte_verifies(capsys):
    report = checkpoint.verify_checkpoint(open_store(str(V1)), DIRECTORY)
    assert report.ok and (report.images, report.bytes_read) == (2, 25095)
    assert cli.main(["verify", str(V1), "--quiet"]) == 0
    assert capsys.readouterr().out == ""


def test_manifest_and_index(index):
    manifest, _ = checkpoint.read_checkpoint(open_store(str(V1)), DIRECTORY)
    assert (manifest.job, manifest.attempt, manifest.step, manifest.world_size) == ("golden", 3, 12, 2)
    assert (manifest.format, manifest.version, manifest.checksum, manifest.block_bytes) == ("ckptd-manifest", 1, "xxh3-128", 1 << 20)
    assert manifest.created_unix_s == 1767225600.25
    assert [(i.rank, i.name, i.bytes) for i in manifest.images] == [(0, "images/r00000.safetensors", 12455), (1, "images/r00001.safetensors", 12640)]
    assert (index.job, index.attempt, index.step, index.world_size) == ("golden", 3, 12, 2)
    assert {r: i.coords for r, i in index.images.items()} == {0: {"rank": 0, "dp": 0}, 1: {"rank": 1, "dp": 1}}
    assert index.aliases == {"model.head.weight": "model.embed.weight"}
    assert {r: {row.box for row in index.rows["model.flat"] if row.image == r} for r in (0, 1)} == FLAT_ROWS


def test_every_tensor(index):
    store = open_store(str(V1))
    found = {}
    for name, info in index.tensors.items():
        out = np.zeros((*info.shape, ITEM_BYTES[info.dtype]), np.uint8)
        for row in index.rows[name]:
            data = bytearray(row.end - row.begin)
            store.get(f"{DIRECTORY}/images/r{row.image:05}.safetensors", row.begin, memoryview(data))
            place = tuple(slice(a, b) for a, b in zip(row.box.start, row.box.stop, strict=True))
            out[place] = np.frombuffer(data, np.uint8).reshape(*row.box.extent, ITEM_BYTES[info.dtype])
        found[name] = (info.dtype, info.shape, info.view, out.tobytes().hex())
    assert found == TENSORS
    assert {dtype for dtype, *_ in TENSORS.values()} == set(ITEM_BYTES), "every dtype that version 1 knows"


@pytest.mark.parametrize("rank", [0, 1])
def test_every_object(index, rank):
    objects = index.images[rank].objects
    assert {name: o["policy"] for name, o in objects.items()} == {
        "optim.param_groups": "optimizer", "extras.notes": "same", "rng.python": "rng", "extras.loader": "loader", "rng.torch": "rng", "absent": "absent",
    }  # fmt: skip
    value = {name: typed.decode(o["value"], lambda kind, reference: (kind, reference)) for name, o in objects.items()}
    notes = value["extras.notes"]
    assert math.isnan(notes.pop("nan"))
    assert list(notes) == list(NOTES)
    for what, expected in NOTES.items():
        assert repr(notes[what]) == repr(expected), what  # repr: -0.0, types, maxlen, order
        assert type(notes[what]) is type(expected)
    assert [type(s) for s in notes["npscalar"]] == [type(s) for s in NOTES["npscalar"]]
    assert notes["npscalar"][4].dtype.str == "<M8[D]"
    assert value["optim.param_groups"] == [{"lr": 0.003, "betas": (0.9, 0.999), "foreach": None, "amsgrad": False, "params": ["w"]}]
    assert value["rng.python"] == (3, ("ndarray", f"object/rng.python.1@r{rank}"), None)
    assert value["rng.torch"] == ("tensor", f"object/rng.torch@r{rank}")
    assert value["extras.loader"] == {"position": 40, "weights": ("ndarray", f"object/extras.loader.weights@r{rank}")}
    assert value["absent"] == ["optim.state.frozen.exp_avg"]
    assert set(tags(objects)) == TAGS, "every tag that version 1 knows"


def tags(json):
    if isinstance(json, dict):
        yield from (k for k in json if k.startswith("$"))
    for child in json.values() if isinstance(json, dict) else json if isinstance(json, list) else ():
        yield from tags(child)


def test_it_is_restored_onto_another_cut(index):
    source = restore.StoreSource(open_store(str(V1)), DIRECTORY)
    wants = [Want("model.embed.weight", "F32", (7, 3), Box((2, 1), (4, 2))), Want("model.flat", "I16", (3, 4), Box((0, 1), (3, 2)))]
    live = [torch.zeros(4, 2), torch.zeros(3, 2, dtype=torch.int16)]
    staged = restore.stage(source, wants, [], mine=0)
    assert restore.apply(staged, live.__getitem__) == 4 * 2 * 4 + 3 * 2 * 2
    assert live[0].tolist() == [[7.0, 8.0], [10.0, 11.0], [13.0, 14.0], [16.0, 17.0]]
    assert live[1].tolist() == [[1, 2], [5, 6], [9, 10]]
    del staged
    source.close()


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")  # torch loads in one process here
def test_stock_readers_read_it():
    images = V1 / DIRECTORY / "images"
    with safe_open(images / "r00001.safetensors", framework="np") as f:
        assert f.get_tensor("model.embed.weight").tolist() == [[12.0, 13.0, 14.0], [15.0, 16.0, 17.0], [18.0, 19.0, 20.0]]
    state = {"model": {"embed.weight": torch.zeros(7, 3), "head.weight": torch.zeros(7, 3)}}
    dcp.load(state, storage_reader=dcp.HuggingFaceStorageReader(str(images)))
    assert state["model"]["embed.weight"].flatten().tolist() == [float(i) for i in range(21)]
    assert torch.equal(state["model"]["head.weight"], state["model"]["embed.weight"])
