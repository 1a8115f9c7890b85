"""A source into every format that holds a whole training state, and back: what `test_matrix.py` and others compare."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from ckptd.convert import convert
from ckptd.formats import WriteOptions
from ckptd.reading import Pool, Reading, hashes, open_checkpoint, settle

TARGETS = ("ckptd", "dcp", "dcp-safetensors", "torch", "zero1", "zero2", "zero3", "universal")
SETTINGS = {"lr", "betas", "eps", "weight_decay", "params"}


def state(path: Path | str):
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
    groups = [{k: v for k, v in g.items() if k in SETTINGS} for g in settled.groups]
    for g in groups:
        g["betas"] = tuple(g["betas"])
        g["params"] = list(g["params"])
    return {n: h for n, h in found.items() if not n.startswith("extras.")}, settled.objects.get("step"), groups


def same(wanted: dict[str, str], got: dict[str, str], where: str) -> None:
    missing, more = sorted(wanted.keys() - got.keys()), sorted(got.keys() - wanted.keys())
    assert not missing, (where, missing[:4])
    assert not more, (where, more[:4])
    differing = sorted(n for n in wanted if wanted[n] != got[n])
    assert not differing, (where, differing[:4])


def there_and_back(source: Path, tmp: Path, back_to: Callable[[int, str], tuple[str, WriteOptions]], targets: tuple[str, ...] = TARGETS) -> int:
    """Convert to each target, and from there as `back_to(number, target)` says; all that came through is equal. Returns how many conversions."""
    wanted = state(source)
    assert wanted[0]
    assert wanted[1]
    done = 0
    for number, to in enumerate(targets):
        there, back = tmp / to, tmp / f"{to}-back"
        drop = frozenset({"objects", "buffers"}) if to == "universal" else frozenset({"objects"})
        convert(str(source), str(there), to, write=WriteOptions(ranks=1 + number % 3, drop=drop), sync=False, workers=1)
        got = state(there)
        lost = wanted[0].keys() - got[0].keys()
        assert to == "universal" or not lost, (to, sorted(lost)[:4])
        same({n: h for n, h in wanted[0].items() if n not in lost}, got[0], to)
        assert got[1:] == wanted[1:], to
        other, options = back_to(number, to)
        convert(str(there), str(back), other, write=options, sync=False, workers=1)
        again = state(back)
        same(got[0], again[0], f"{to} -> {other}")
        assert again[1] == wanted[1], (to, other)
        if other == "megatron":  # its files do not say the order of a group's members
            again[2][:] = [{**g, "params": sorted(g["params"])} for g in again[2]]
            assert again[2] == [{**g, "params": sorted(g["params"])} for g in wanted[2]], (to, other)
        else:
            assert again[2] == wanted[2], (to, other)
        done += 2
        shutil.rmtree(there) if there.is_dir() else there.unlink()
        shutil.rmtree(back) if back.is_dir() else back.unlink()
    return done
