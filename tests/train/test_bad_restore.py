"""Bad bytes in the durable tier or in memory: a named error or an older step, no tensor touched by the bad one, nothing lost."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

import ckptd
from ckptd import errors
from tests.train.harness import stop_daemon

pytestmark = pytest.mark.timeout(200)

SEED = 20261120


def build():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(300, 300), nn.Linear(300, 20))
    return model, torch.optim.AdamW(model.parameters())


def train(session, model, optimizer, first, last):
    for step in range(first, last + 1):
        model(torch.ones(4, 300) * step).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        session.step(step)
        assert session.wait("committed", step, timeout_s=20)


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """Two persisted steps, 2 and 4, and what the model was at each."""
    base = tmp_path_factory.mktemp("good")
    model, optimizer = build()
    session = ckptd.attach(model=model, optimizer=optimizer, job="bad", store=base / "store", directory=str(base / "d"), required=True)
    session.restore()
    truth = {}
    for step in (2, 4):
        train(session, model, optimizer, step - 1, step)
        session.persist(step)
        assert session.wait("persisted", step, timeout_s=20)
        truth[step] = [p.detach().clone() for p in model.parameters()]
    session.close()
    stop_daemon(base / "d")
    yield base / "store", truth


def restore_from(store: Path, tmp_path: Path):
    """(step or error, parameters, whether they were touched)."""
    model, optimizer = build()
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(-7.0)
    session = ckptd.attach(model=model, optimizer=optimizer, job="bad", store=store, directory=str(tmp_path / "none"), start_daemon=False, timeout_s=5)
    try:
        outcome = session.restore().step
    except errors.CkptdError as e:
        outcome = e
    finally:
        session.close()
    return outcome, [*model.parameters()], not all(bool((p == -7.0).all()) for p in model.parameters())


def damage(kind: str, step: Path, other: Path, rng: random.Random) -> None:
    image, manifest, index = step / "images" / "r00000.safetensors", step / "manifest.json", step / "index.msgpack.zst"
    target = {"i": image, "m": manifest, "x": index}[kind[0]]
    data = bytearray(target.read_bytes())
    match kind[2:]:
        case "flip":
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        case "truncate":
            data = data[: rng.randrange(len(data))]
        case "extend":
            data += bytes(rng.randrange(1, 64))
        case "zero":
            at = rng.randrange(max(1, len(data) - 512))
            data[at : at + 512] = bytes(len(data[at : at + 512]))
        case "foreign":
            from safetensors.torch import save

            data = bytearray(save({"w": torch.ones(3)}) if target == image else b"PK\x03\x04 not ours")
        case "newer":
            told = json.loads(data)
            told["version"] = 99
            data = bytearray(json.dumps(told).encode())
        case "stale":
            data = bytearray((other / target.relative_to(step)).read_bytes())
        case "gone":
            target.unlink()
            return
        case "random":
            data = bytearray(rng.randbytes(len(data)))
    target.write_bytes(data)


KINDS = [f"{t}:{k}" for t in "imx" for k in ("flip", "truncate", "extend", "zero", "foreign", "stale", "gone", "random")] + ["m:newer"]


@pytest.mark.parametrize("kind", KINDS)
def test_bad_bytes_on_disk_send_the_restore_to_the_step_before(kind, good, tmp_path):
    store, truth = good
    rng = random.Random(f"{SEED}/{kind}")
    for round_ in range(3 if kind.endswith(("flip", "truncate", "zero")) else 1):
        shutil.rmtree(tmp_path / "store", ignore_errors=True)
        shutil.copytree(store, tmp_path / "store")
        job = tmp_path / "store" / "bad"
        damage(kind, job / "step-00000004", job / "step-00000002", rng)
        before = (job / "step-00000004" / "images" / "r00000.safetensors").read_bytes() if kind != "i:gone" else b""
        outcome, params, _ = restore_from(tmp_path / "store", tmp_path)
        if outcome == 4:  # only where the damage hit a byte that nobody needs (an all-zero run of 512 bytes set to zero)
            assert kind.endswith("zero"), (SEED, kind, round_)
        else:
            assert outcome == 2, (SEED, kind, round_, outcome)
        assert all(torch.equal(a, b) for a, b in zip(params, truth[outcome], strict=True)), (SEED, kind, round_)
        if before:
            assert (job / "step-00000004" / "images" / "r00000.safetensors").read_bytes() == before, "evidence is left alone"


@pytest.mark.parametrize("kind", ["i:flip", "i:truncate", "x:flip", "i:foreign"])
def test_with_every_step_bad_the_error_is_named_and_no_tensor_is_touched(kind, good, tmp_path):
    shutil.copytree(good[0], tmp_path / "store")
    rng = random.Random(f"{SEED}/{kind}/all")
    job = tmp_path / "store" / "bad"
    for step in (2, 4):
        damage(kind, job / f"step-{step:08}", job / f"step-{6 - step:08}", rng)
    outcome, _, touched = restore_from(tmp_path / "store", tmp_path)
    assert isinstance(outcome, errors.CkptdError), "never a silent start from scratch"
    assert not touched
    print(f"{kind}: {str(outcome)[:160]}")


def test_a_block_that_rots_in_memory_is_noticed_before_a_tensor_is_touched(tmp_path):
    from ckptd.arena import Arena

    model, optimizer = build()
    place = {"job": "rot", "directory": str(tmp_path / "d"), "store": tmp_path / "store", "required": True}
    session = ckptd.attach(model=model, optimizer=optimizer, **place)
    session.restore()
    train(session, model, optimizer, 1, 2)
    session.persist(2)
    assert session.wait("persisted", 2, timeout_s=20)
    old = [p.detach().clone() for p in model.parameters()]
    train(session, model, optimizer, 3, 3)
    arena: Arena = session._arena
    slot = next(s for s in range(3) if arena.header(s).step == 3)
    image = arena.image(slot, arena.header(slot).image_bytes)
    image[len(image) // 2] ^= 0x10
    image.release()
    session.close()
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(-7.0)
    session = ckptd.attach(model=model, optimizer=optimizer, **place)
    try:
        restored = session.restore()
        assert (restored.step, restored.source) == (2, "rot/step-00000002"), restored
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), old, strict=True))
        session.close()
        session = ckptd.attach(model=model, optimizer=optimizer, **place)
        assert session.restore().step == 2, "the bad step is remembered, and not offered again"
    finally:
        session.close()
        stop_daemon(tmp_path / "d")


def test_a_loop_that_forgets_to_restore_is_told_so(good, tmp_path):
    model, optimizer = build()
    session = ckptd.attach(model=model, optimizer=optimizer, job="bad", store=good[0], directory=str(tmp_path / "d"), start_daemon=False, timeout_s=5)
    with pytest.raises(errors.NotRestored, match="step 4"):
        session.step(1)
    assert session.restore(fresh=True).source == "fresh"
    session.step(1)
    session.close()


def test_keys_that_do_not_match_are_named(good, tmp_path):
    torch.manual_seed(0)
    bigger = nn.Sequential(nn.Linear(300, 300), nn.Linear(300, 20), nn.Linear(20, 2))
    place = {"job": "bad", "store": good[0], "directory": str(tmp_path / "d"), "start_daemon": False, "timeout_s": 5}
    session = ckptd.attach(model=bigger, **place)
    with pytest.raises(errors.StateMismatch, match=r"model\.2\.weight"):
        session.restore()
    restored = session.restore(strict=False)
    assert restored.step == 4 and restored.missing == ("model.2.bias", "model.2.weight")
    assert "optim.state.0.weight.exp_avg" in restored.unexpected
    assert all(torch.equal(a, b) for a, b in zip([*bigger.parameters()][:4], good[1][4], strict=True))
    session.close()
    wrong = nn.Sequential(nn.Linear(300, 301), nn.Linear(301, 20))
    session = ckptd.attach(model=wrong, **place)
    with pytest.raises(errors.StateMismatch, match=r"\[300, 300\], wanted \[301, 300\]"):
        session.restore(strict=False)
    with pytest.raises(errors.NotFound, match=r"there are \[2, 4\]"):
        session.restore(step=3)
    session.close()
