"""How tests/golden/v1 was made, with ckptd 0.1.0: `python -m tests.golden.make_v1 DIRECTORY`.

It is kept for people who want to know what is in there; it is never run again over the fixture, which is read for ever as it is. It uses the
layout, the typed JSON and the commit protocol of the package, so a later version of ckptd writes something else.
"""

from __future__ import annotations

import math
import sys
from collections import Counter, OrderedDict, deque

import numpy as np

from ckptd.core import typed
from ckptd.core.boxes import Box
from ckptd.core.checksum import digests_of
from ckptd.core.image import ITEM_BYTES, Piece, lay_out, parse
from ckptd.core.manifest import build_index
from ckptd.storage import checkpoint, open_store

JOB, ATTEMPT, STEP, WORLD = "golden", 3, 12, 2
CREATED_UNIX_S = 1767225600.25

OBJECTS = {
    "optim.param_groups": ("optimizer", [{"lr": 0.003, "betas": (0.9, 0.999), "foreach": None, "amsgrad": False, "params": ["w"]}]),
    "extras.notes": (
        "same",
        {
            "json": [None, True, False, 0, -(2**63) + 1, 2**63 - 1, 0.1, -0.0, 5e-324, "text é \u2028 \x00", [], {}],
            "int": [2**63, -(2**63), 2**127 + 1, 2**2000 + 1, -(2**2000) - 1],
            "str": "file-\udcff.txt",
            "float": [math.inf, -math.inf],
            "nan": math.nan,
            "bytes": b"\x00\xff",
            "complex": complex(-0.0, math.inf),
            "tuple": (1, (2,), ()),
            "set": {3, 1, 2},
            "frozenset": frozenset({"a"}),
            "deque": deque([1, 2]),
            "ring": deque([1, 2], maxlen=3),
            "odict": OrderedDict([("z", 1), ("a", 2)]),
            "dict": {1: "one", "$tag": "dollar", (0, 1): "pair"},
            "counter": Counter({"x": 3}),
            "npscalar": [
                np.float32(1.5), np.int64(-7), np.bool_(True), np.complex128(1 + 2j), np.datetime64("2026-01-01", "D"), np.str_("é"), np.bytes_(b"\x01\x00"),
            ],
        },
    ),
    "rng.python": ("rng", (3, np.arange(5, dtype=np.uint32), None)),
    "extras.loader": ("loader", {"position": 40, "weights": np.array([[0.5, -0.5]], np.float64)}),
}  # fmt: skip
TENSOR = "rng.torch"
"""An object that is a torch tensor: its bytes lie in the image as those of an array do."""


FLAT = np.arange(12, dtype="<i2").reshape(3, 4)


def whole(name: str, dtype: str, shape: tuple[int, ...], data: bytes, view: str = "") -> tuple[Piece, bytes]:
    return Piece(name, dtype, shape, Box.whole(shape), view), data


def pieces_of(rank: int) -> list[tuple[Piece, bytes]]:
    """What a rank stores, with its bytes."""
    weight = np.arange(21, dtype="<f4").reshape(7, 3)
    rows = Box((0, 0), (4, 3)) if rank == 0 else Box((4, 0), (3, 3))
    cut = weight[rows.start[0] : rows.stop[0]].tobytes()
    out = [(Piece(name, "F32", (7, 3), rows), cut) for name in ("model.embed.weight", "model.head.weight")]
    if rank == 0:
        out.append((Piece("model.flat", "I16", (3, 4), Box((0, 0), (2, 4))), FLAT[:2].tobytes()))  # elements 0 to 9: two boxes
        out.append((Piece("model.flat", "I16", (3, 4), Box((2, 0), (1, 2))), FLAT[2, :2].tobytes()))
        out.append(whole("model.flat#1", "I8", (1,), b"\x2a"))  # called like the key of a further box
        out.append(whole("model.none", "F32", (0, 3), b""))
        out.append(whole("model.bn.running_mean", "F32", (2,), np.array([1, 2], "<f4").tobytes()))
    else:
        out.append((Piece("model.flat", "I16", (3, 4), Box((2, 2), (1, 2))), FLAT[2, 2:].tobytes()))
        out.append(whole("model.bn.running_mean@r1", "F32", (2,), np.array([3, 4], "<f4").tobytes()))
        out.append(whole("optim.state.embed.weight.step", "F32", (), np.array(12, "<f4").tobytes()))
        for number, (dtype, item) in enumerate(ITEM_BYTES.items()):
            data = bytes(i % 2 for i in range(3)) if dtype == "BOOL" else bytes(number + i for i in range(3 * item))
            out.append(whole(f"every.{dtype}", dtype, (3,), data))
        out.append(whole("every.complex128", "U8", (2, 16), np.array([1 + 2j, -0.5j], "<c16").tobytes(), "complex128"))
        out.append(whole("every.float8_e8m0fnu", "U8", (3, 1), b"\x7e\x7f\x80", "float8_e8m0fnu"))
        out.append(whole("every.float4_e2m1fn_x2", "U8", (2, 1), b"\x21\x43", "float4_e2m1fn_x2"))
    return out


def image_of(rank: int) -> bytes:
    """A rank's image, made as a session makes it."""
    held = pieces_of(rank)
    arrays: dict[str, tuple[str, np.ndarray]] = {}

    def put(path: str, value: object) -> tuple[str, str] | None:
        if not isinstance(value, np.ndarray):
            return None
        kind = "tensor" if path == TENSOR else "ndarray"
        arrays[f"object/{path}@r{rank}"] = kind, value
        return kind, f"object/{path}@r{rank}"

    given = OBJECTS | {TENSOR: ("rng", np.arange(rank, rank + 6, dtype=np.uint8))}
    objects = {name: {"policy": policy, "value": typed.encode(value, name, put)} for name, (policy, value) in given.items()}
    objects["absent"] = {"policy": "absent", "value": ["optim.state.frozen.exp_avg"]}
    dtypes = {"uint32": "U32", "float64": "F64", "uint8": "U8"}
    held += [whole(name, dtypes[a.dtype.name], a.shape, a.tobytes()) for name, (_, a) in arrays.items()]
    if rank == 1:
        held.append(whole("optim.state.frozen.exp_avg", "F32", (2,), bytes(8)))
    coords = {"rank": rank, "dp": rank}
    aliases = {"model.head.weight": "model.embed.weight"}
    layout = lay_out(
        [p for p, _ in held], job=JOB, rank=rank, world_size=WORLD, coords=coords, aliases=aliases, objects_bytes=len(str(objects))
    )
    data = {(p.name, p.box): d for p, d in held}
    body = b"".join(data[e.piece.name, e.piece.box] for e in layout.entries)
    image = layout.render(attempt=ATTEMPT, step=STEP, objects=objects) + body
    assert len(image) == layout.image_bytes
    return image


def make(root: str) -> str:
    store = open_store(root)
    directory = checkpoint.pick_directory(store, JOB, STEP, ATTEMPT)
    images = {rank: image_of(rank) for rank in range(WORLD)}
    digests = {rank: digests_of(image) for rank, image in images.items()}
    for rank, image in images.items():
        checkpoint.write_image(store, directory, rank, memoryview(image), digests[rank])
    index = build_index({rank: parse(image, len(image)) for rank, image in images.items()}, digests)
    checkpoint.write_manifest(store, directory, index, CREATED_UNIX_S)
    return directory


if __name__ == "__main__":
    print(make(sys.argv[1]))
