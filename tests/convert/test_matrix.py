"""Every source into every target and back, bit by bit: DeepSpeed's ZeRO 1, 2, 3 of 2, 3 and 4 ranks in fp32 and bf16, and torch's FSDP2, HSDP, TP x FSDP2 (uneven
too) and PP, into each format that holds a whole training state, and from there into ZeRO of another stage and world, or another of torch's.
Megatron's are in test_megatron.py.

What the sources hold is compared with what the frameworks say in test_deepspeed.py and test_dcp.py; here all that stands between is compared with the sources: every tensor's
hash, the step, and each group's settings and members in order.
"""

from __future__ import annotations

import importlib.util
from itertools import product

import pytest

from ckptd.convert import convert
from ckptd.formats import WriteOptions
from tests.convert.dcp_job import trained_and_saved
from tests.convert.roundtrip import TARGETS, state, there_and_back
from tests.convert.zero_sources import DTYPES, STAGES, WORLDS
from tests.forks import ranks

pytestmark = pytest.mark.timeout(600)
needs_deepspeed = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed: see scripts/setup")


@needs_deepspeed
@pytest.mark.parametrize("name", [f"{s}-{w}-{d}" for w, d, s in product(WORLDS, DTYPES, STAGES)])
def test_zero_there_and_back(zero_root, zero_made, name, tmp_path):
    stage, world, dtype = name.split("-")

    def back(number: int, to: str) -> tuple[str, WriteOptions]:
        options = WriteOptions(
            ranks=1 + (int(world) + number) % 4, dtype="BF16" if dtype == "bf16" else "F32", drop=frozenset({"objects"}), config=buffers(to)
        )
        return f"zero{1 + (int(stage) + number) % 3}", options

    assert there_and_back(zero_root / name, tmp_path, back) == 2 * len(TARGETS)


@pytest.mark.parametrize(("kind", "world"), [("fsdp", 3), ("fsdp", 4), ("hsdp", 4), ("tp_fsdp", 4), ("tp_fsdp", 6), ("pp", 2)])
def test_torch_there_and_back(kind, world, tmp_path):
    """Uneven sizes: 53 tokens, width 6, hidden 7."""
    ranks(world, trained_and_saved(kind, str(tmp_path / "source"), flat=kind == "pp"))

    def back(number: int, to: str) -> tuple[str, WriteOptions]:
        return ("dcp", "dcp-safetensors", "torch")[number % 3], WriteOptions(ranks=1 + number % 4, drop=frozenset({"objects"}))

    assert there_and_back(tmp_path / "source", tmp_path, back) == 2 * len(TARGETS)


def buffers(source: str) -> dict[str, str]:
    """What does not say which names are buffers is told."""
    return {"buffers": "seen,count"} if source in {"ckptd", "dcp", "dcp-safetensors", "torch"} else {}


@needs_deepspeed
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
