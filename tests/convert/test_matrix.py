"""Every source into every target and back, bit by bit: DeepSpeed's ZeRO 1, 2, 3 of 2, 3 and 4 ranks in fp32 and bf16 into each format that holds a whole
training state, and from there into ZeRO of another stage and world.

What the sources hold is compared with what DeepSpeed says in test_deepspeed.py; here all that stands between is compared with the sources: every tensor's
hash, the step, and each group's settings and members in order.
"""

from __future__ import annotations

import importlib.util
import shutil
from itertools import product

import pytest

from ckptd.convert import convert
from ckptd.formats import WriteOptions
from ckptd.reading import Pool, Reading, hashes, open_checkpoint, settle
from tests.convert.zero_sources import DTYPES, STAGES, WORLDS

pytestmark = [pytest.mark.timeout(600), pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed: see scripts/setup")]
TARGETS = ("ckptd", "dcp", "dcp-safetensors", "torch", "zero1", "zero2", "zero3", "universal")


def state(path):
    """(hashes by name, step, groups): all that has to come through."""
    place, _, checkpoint = open_checkpoint(str(path))
    pool = Pool(2)
    try:
        with Reading(place, checkpoint) as first:
            settled = settle(first, pool)
        with Reading(place, settled) as reading:
            found = hashes(reading, pool)
    finally:
        pool.close()
    groups = [{k: v for k, v in g.items() if k in {"lr", "betas", "eps", "weight_decay", "params"}} for g in settled.groups]
    for g in groups:
        g["betas"] = tuple(g["betas"])
    return {n: h for n, h in found.items() if not n.startswith("extras.")}, settled.objects.get("step"), groups


@pytest.mark.parametrize("name", [f"{s}-{w}-{d}" for w, d, s in product(WORLDS, DTYPES, STAGES)])
def test_there_and_back(zero_root, zero_made, name, tmp_path):
    stage, world, dtype = name.split("-")
    wanted = state(zero_root / name)
    assert wanted[1] == 3
    done = 0
    for number, to in enumerate(TARGETS):
        there, back = tmp_path / to, tmp_path / f"{to}-back"
        options = WriteOptions(ranks=1 + number % 3, drop=frozenset({"objects", "buffers"}) if to == "universal" else frozenset({"objects"}))
        convert(str(zero_root / name), str(there), to, write=options, sync=False, workers=1)
        got = state(there)
        lost = wanted[0].keys() - got[0].keys()
        assert to == "universal" or not lost, (to, sorted(lost)[:4])
        assert {n: h for n, h in wanted[0].items() if n not in lost} == got[0], to
        assert got[1] == wanted[1], to
        assert got[2] == wanted[2], to
        other = f"zero{1 + (int(stage) + number) % 3}"
        back_options = WriteOptions(ranks=1 + (int(world) + number) % 4, dtype="BF16" if dtype == "bf16" else "F32", drop=frozenset({"objects"}), config=buffers(to))
        convert(str(there), str(back), other, write=back_options, sync=False, workers=1)
        again = state(back)
        assert again[0] == got[0], (to, other)
        assert again[1:] == wanted[1:], (to, other)
        done += 1
        shutil.rmtree(there) if there.is_dir() else there.unlink()
        shutil.rmtree(back)
    assert done == len(TARGETS)


def buffers(source: str) -> dict[str, str]:
    """What does not say which names are buffers is told."""
    return {"buffers": "seen,count"} if source in {"ckptd", "dcp", "dcp-safetensors", "torch"} else {}


@pytest.mark.parametrize("name", ["1-2-fp32", "2-3-bf16", "3-4-bf16"])
def test_weights_alone(zero_root, zero_made, name, tmp_path):
    wanted = state(zero_root / name)[0]
    drop = frozenset({"optimizer", "objects"})
    report = convert(str(zero_root / name), str(tmp_path / "hf"), "hf", write=WriteOptions(dtype="F32", drop=drop), sync=False, check=True)
    got = state(tmp_path / "hf")[0]
    trained = {n for n in wanted if n.startswith("model.") and ".frozen." not in n}  # frozen 16-bit weights have no masters: they are widened
    assert {n: got[n] for n in trained} == {n: wanted[n] for n in trained}
    assert got.keys() - trained == {"model.frozen.weight", "model.frozen.bias"}
    assert any(n.startswith("optim.state.") for n in report.dropped)
