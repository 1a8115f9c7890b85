"""Sessions over real megatron-core jobs: what is captured is what the ranks hold, and another mesh restores it from memory and trains on."""

from __future__ import annotations

import importlib.util

import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("megatron") is None, reason="needs megatron-core (the extra `megatron`)"),
]
pytest.importorskip("torch")

from ckptd.formats import ReadOptions, place_of, recognise  # noqa: E402
from ckptd.reading import Reading  # noqa: E402
from tests.convert.test_megatron import Ranks, close_enough, gathered, roughly  # noqa: E402
from tests.train.harness import stop_daemon  # noqa: E402

STEPS = 2
SOURCES = {
    "fp32": {"world": 4, "run": {"tp": 2, "pp": 2}},
    "bf16": {"world": 4, "run": {"pp": 2, "dtype": "bf16", "tied": True}},
    "moe": {"world": 2, "run": {"experts": 2}},
}
"""fp32: every rank another shard. bf16: two replicas of each stage, masters, an embedding that both stages have. moe: it does not train on a CPU."""
DECAY = {"fp32": False, "bf16": True, "moe": True}
"""Whether there is a scheduler, whose rate falls."""
TARGETS = [("fp32", 2, 2, 1), ("fp32", 4, 1, 2), ("fp32", 4, 2, 2), ("bf16", 4, 2, 2), ("bf16", 1, 1, 1), ("moe", 2, 1, 2)]
"""source, ranks, TP, PP"""


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("live")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    pool = Ranks(tmp_path_factory.mktemp("ranks"))
    yield pool
    pool.close()


@pytest.fixture(scope="module")
def directory(root):
    made = root / "daemon"
    made.mkdir(mode=0o700)
    yield made
    stop_daemon(made)


@pytest.fixture(scope="module")
def sources(root, ranks, directory):
    """Jobs that trained with a session, ended, and are gone but for the daemon."""
    made = {}

    def get(name):
        if name not in made:
            (root / name).mkdir()
            how = {"job": name, "directory": str(directory), "store": str(root / "store"), "steps": STEPS, "decay": DECAY[name], "invented": name == "moe"}
            made[name] = ranks.do(**SOURCES[name], live=how, dump=str(root / name / "held"), more=0 if name == "moe" else 2)
        return made[name]

    return get


def held(folder):
    """What the ranks held, by name: masters stand for the weights that are their rounding."""
    found = gathered(folder)
    masters = {n: found.pop(n) for n in [*found] if n.endswith(".master")}
    halves = {n: found[n] for n in [*found] if f"optim.state.{n.removeprefix('model.')}.master" in masters}
    return found | {f"model.{n.removeprefix('optim.state.').removesuffix('.master')}": v for n, v in masters.items()}, halves


def same(got, want):
    assert set(got) == set(want)
    for name, value in want.items():
        assert got[name].shape == value.shape and got[name].tobytes() == value.tobytes(), name


@pytest.mark.parametrize("name", SOURCES)
def test_a_session_captures_what_the_ranks_hold(root, sources, name):
    answer = sources(name)["live"]
    assert (answer["step"], answer["source"], answer["counts"]) == (0, "fresh", {"captured": STEPS})
    want, _ = held(root / name)
    (folder,) = (root / "store" / name).glob("step-*")
    place = place_of(str(folder))
    checkpoint = recognise(place).read(place, ReadOptions())
    checkpoint.prove()
    with Reading(place, checkpoint) as reading:
        same({n: reading.array(n) for n in checkpoint.tensors}, want)
    assert sorted(f"model.{p}" for g in checkpoint.groups for p in g["params"]) == sorted(n for n in want if n.startswith("model."))
    assert checkpoint.objects["extras.args"] == {"iteration": STEPS, "consumed_train_samples": 4}


@pytest.mark.parametrize(("name", "world", "tp", "pp"), TARGETS)
def test_another_mesh_restores_from_memory_and_trains_on(root, ranks, sources, directory, name, world, tp, pp):
    source = sources(name)
    target = root / f"{name}-{world}-{tp}-{pp}"
    target.mkdir()
    run = SOURCES[name]["run"] | {"tp": tp, "pp": pp}
    how = {"job": name, "directory": str(directory), "steps": 0, "decay": DECAY[name]}
    answer = ranks.do(world=world, run=run, live=how, dump=str(target / "held"), more=len(source["after"]))
    told = answer["live"]
    assert (told["step"], told["source"], told["missing"], told["unexpected"]) == (STEPS, "memory", [], [])
    for key in ("samples", "num_steps", "lr"):
        assert told[key] == source["live"][key], key
    for got, want in zip(held(target), held(root / name), strict=True):
        same(got, want)
    (close_enough if name == "fp32" else roughly)(answer["after"], source["after"])


def test_a_session_changes_no_loss(ranks, sources):
    """Against a run without any."""
    plain = ranks.do(**SOURCES["fp32"], steps=STEPS, more=2)
    captured = sources("fp32")
    assert captured["live"]["losses"] == plain["losses"]
    assert captured["after"] == plain["after"]


def test_a_distributed_optimizer_is_refused_by_name(ranks, directory):
    how = {"job": "dist", "directory": str(directory), "steps": 1, "decay": True}
    with pytest.raises(AssertionError, match=r"Unstorable.*DistributedOptimizer: its state is not captured live"):
        ranks.do(world=2, run={"tp": 2, "optimizer": "dist", "dtype": "bf16"}, live=how)
