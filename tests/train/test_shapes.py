"""Uneven and odd state round-trips: dims 7 and 50257, empty shards, more ranks than rows, 0-d, 0-element, every dtype, tied, frozen,
several groups and optimizers, buffers that differ by rank; also where torch's own DCP fails (uneven FSDP2 x TP)."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import xxhash
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import ckptd
from tests.forks import ranks
from tests.train.harness import stop_daemon

pytestmark = pytest.mark.timeout(300)


@pytest.fixture
def place(tmp_path):
    yield {"CKPTD_DIR": str(tmp_path / "d"), "CKPTD_STORE": str(tmp_path / "store"), "CKPTD_JOB": "shapes"}
    stop_daemon(tmp_path / "d")


def digest(t: torch.Tensor) -> str:
    t = t.full_tensor() if isinstance(t, DTensor) else t
    flat = t.detach().cpu().contiguous().reshape(-1)
    raw = flat.view(torch.uint8).numpy() if flat.numel() else b""
    return f"{t.dtype} {tuple(t.shape)} {xxhash.xxh3_64_hexdigest(raw)}"


def scramble(module: nn.Module, seed: int) -> None:
    """Bits of the whole tensor, the same on every mesh."""
    for name, t in [*module.named_parameters(), *module.named_buffers()]:
        with torch.no_grad():
            g = torch.Generator().manual_seed(seed + sum(name.encode()))
            shape = tuple(t.shape)
            whole = torch.rand(shape, generator=g) * 100 if t.is_floating_point() or t.is_complex() else torch.randint(0, 2, shape, generator=g)
            whole = whole.to(t.dtype)
            if isinstance(t, DTensor):
                source = distribute_tensor(whole, t.device_mesh, [Replicate()] * t.device_mesh.ndim)
                t.to_local().copy_(_cut(source.to_local(), name, t))
            else:
                t.copy_(whole)


def _cut(whole, name, t):
    from ckptd.state import box_of

    box = box_of(name, t)
    return whole[tuple(slice(s, e) for s, e in zip(box.start, box.stop, strict=True))]


class Uneven(nn.Module):
    def __init__(self, vocab: int = 50257) -> None:
        super().__init__()
        self.emb = nn.Embedding(vocab, 4)
        self.a = nn.Linear(4, 7)
        self.b = nn.Linear(7, 3)
        self.c = nn.Linear(3, 1)

    def forward(self, x):
        return self.c(self.b(self.a(self.emb(x))))


def full_state(model, optimizer) -> dict[str, str]:
    names = {id(p): n for n, p in model.named_parameters()}
    out = {n: digest(p) for n, p in [*model.named_parameters(), *model.named_buffers()]}
    for p, slots in optimizer.state.items():
        out |= {f"{names[id(p)]}.{k}": digest(v) for k, v in slots.items()}
    return out


def make(kind: str, vocab: int):
    torch.manual_seed(0)
    world = dist.get_world_size() if dist.is_initialized() else 1
    model = Uneven(vocab)
    if kind == "fsdp":
        fully_shard(model, mesh=init_device_mesh("cpu", (world,), mesh_dim_names=("dp",)))
    elif kind == "tp_fsdp":
        mesh = init_device_mesh("cpu", (world // 2, 2), mesh_dim_names=("dp", "tp"))
        from torch.distributed.tensor import Shard as S

        parallelize_module(
            model, mesh["tp"],
            {"emb": RowwiseParallel(input_layouts=Replicate()), "a": ColwiseParallel(), "b": RowwiseParallel()},
        )
        assert S
        fully_shard(model, mesh=mesh["dp"])
    return model, torch.optim.AdamW(model.parameters(), lr=1e-2, foreach=False)


def fake_moments(model, optimizer) -> None:
    """State without a forward pass (uneven tensor parallelism cannot compute everywhere): exact bits in every moment."""
    for name, p in model.named_parameters():
        for slot in ("exp_avg", "exp_avg_sq"):
            m = torch.zeros_like(p, requires_grad=False)
            optimizer.state[p][slot] = m
            holder = nn.Module()
            holder.register_buffer("x", m)
            scramble(holder, len(name) * 31 + len(slot))
        optimizer.state[p]["step"] = torch.tensor(3.0)


def save(kind: str, vocab: int):
    def work(rank):
        model, optimizer = make(kind, vocab)
        scramble(model, 1)
        fake_moments(model, optimizer)
        session = ckptd.attach(model=model, optimizer=optimizer, required=True)
        session.restore(fresh=True)
        session.step(3)
        assert session.wait("committed", 3, timeout_s=30)
        session.persist(3)
        assert session.wait("persisted", 3, timeout_s=30)
        session.close()
        return full_state(model, optimizer)

    return work


def load(kind: str, vocab: int, memory: bool):
    def work(rank):
        model, optimizer = make(kind, vocab)
        session = ckptd.attach(model=model, optimizer=optimizer, required=True)
        restored = session.restore()
        assert (restored.step, restored.missing, restored.unexpected) == (3, (), ())
        assert (restored.source == "memory") == memory, restored
        session.close()
        return full_state(model, optimizer)

    return work


@pytest.mark.parametrize("saved", [("fsdp", 3), ("tp_fsdp", 6), ("fsdp", 5), ("plain", 1)])
def test_uneven_shards_go_into_any_other_mesh(saved, place, tmp_path):
    kind, world = saved
    vocab = 50257 if kind != "plain" else 50257
    truth = ranks(world, save(kind, vocab), env=place)[0]
    targets = [("plain", 1), ("fsdp", 2), ("fsdp", 4), ("tp_fsdp", 6), ("tp_fsdp", 4)]
    for target, count in targets:
        for got in ranks(count, load(target, vocab, memory=True), env=place)[:1]:
            assert got == truth, (saved, target, [k for k in truth if truth[k] != got.get(k)])
    stop_daemon(tmp_path / "d")  # and again from disk, for memory is gone
    for target, count in targets[1:4]:
        assert ranks(count, load(target, vocab, memory=False), env=place)[0] == truth
    print(f"{kind} x {world}: {len(truth)} tensors, bit-equal in {len(targets)} meshes from memory and 3 from disk")


def test_torchs_own_dcp_fails_where_we_do_not(tmp_path):
    """The reason for boxes from physical ownership: the same uneven FSDP2 x TP state through dcp.save and dcp.load."""

    def work(rank):
        mesh = init_device_mesh("cpu", (3, 2), mesh_dim_names=("dp", "tp"))
        model = nn.Linear(5, 7, bias=False)
        parallelize_module(model, mesh["tp"], ColwiseParallel())
        fully_shard(model, mesh=mesh["dp"])
        with torch.no_grad():
            model.weight.to_local().fill_(rank + 1)
        before = model.weight.to_local().clone()
        try:
            dcp.save({"w": model.weight}, checkpoint_id=str(tmp_path / "dcp"))
            with torch.no_grad():
                model.weight.to_local().zero_()
            dcp.load({"w": model.weight}, checkpoint_id=str(tmp_path / "dcp"))
            return bool(torch.equal(model.weight.to_local(), before))
        except Exception:
            return False

    equal = ranks(6, work)
    print(f"torch {torch.__version__} dcp, dim 7 over dp 3 x tp 2: equal on ranks {equal}")


class Zoo(nn.Module):
    """Every dtype, 0-d, 0-element, tied, frozen, buffers, a buffer that differs by rank, a non-contiguous parameter."""

    DTYPES = (
        torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
        torch.uint8, torch.uint16, torch.uint32, torch.uint64, torch.bool, torch.complex64, torch.complex128,
        torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e8m0fnu,
    )  # fmt: skip

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 7)
        self.second = nn.Linear(7, 7)
        self.tied = nn.Linear(5, 7, bias=False)
        self.tied.weight = self.first.weight
        self.frozen = nn.Parameter(torch.rand(3, 3), requires_grad=False)
        self.strided = nn.Parameter(torch.rand(6, 4).t())
        self.scalar = nn.Parameter(torch.rand(()))
        self.empty = nn.Parameter(torch.rand(0, 5))
        self.bn = nn.BatchNorm1d(7)
        for dtype in self.DTYPES:
            bits = torch.arange(24, dtype=torch.uint8) % 2 if dtype == torch.bool else torch.randint(0, 120, (6 * dtype.itemsize,), dtype=torch.uint8)
            name = "b_" + str(dtype).split(".")[1]
            self.register_buffer(name, bits.bool()[:6] if dtype == torch.bool else bits.view(dtype))
            self.register_buffer(name + "_0d", getattr(self, name)[0].clone())
        self.register_buffer("mine", torch.zeros(4))
        self.register_buffer("cache", torch.ones(3), persistent=False)

    def forward(self, x):
        y = self.bn(self.second(torch.relu(self.first(x) + self.tied(x))))
        return y.square().mean() * self.scalar + self.strided.square().mean()


def zoo(rank: int, restore: bool):
    torch.manual_seed(3)
    model = Zoo()
    odd = [p for n, p in model.named_parameters() if p.requires_grad and n != "empty"]
    optimizers = {
        "matrices": torch.optim.SGD([p for p in odd if p.ndim > 1], lr=0.1, momentum=0.9),
        "rest": torch.optim.Adam([{"params": [p for p in odd if p.ndim == 1], "lr": 0.01}, {"params": [p for p in odd if p.ndim == 0], "lr": 0.02}], amsgrad=True),
    }
    schedulers = {"s1": torch.optim.lr_scheduler.MultiStepLR(optimizers["matrices"], [1, 2]), "s2": torch.optim.lr_scheduler.OneCycleLR(optimizers["rest"], [0.1, 0.2], total_steps=50)}
    own = {"rank": rank, "deep": [(1, 2.5), {"x": None}]}
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    generator = torch.Generator().manual_seed(rank)
    session = ckptd.attach(model=model, optimizer=optimizers, extras={**schedulers, "own": own, "scaler": scaler, "gen": generator}, required=True)
    restored = session.restore()
    if restore:
        assert restored.step == 4, restored
    else:
        for step in range(1, 5):
            torch.manual_seed(100 * step)  # equal gradients on all ranks: nothing here averages them
            loss = model(torch.rand(8, 5))
            for o in optimizers.values():
                o.zero_grad()
            loss.backward()
            for o in optimizers.values():
                o.step()
            for s in schedulers.values():
                s.step()
            model.mine.fill_(rank * 10 + step)
            own["deep"][0] = (step, rank + 0.1)
            torch.rand(rank + 1, generator=generator)
            session.step(step)
            assert session.wait("committed", step, timeout_s=30)
    flat = {n: digest(t) for n, t in [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]}
    for name, o in optimizers.items():
        flat |= {f"{name}.{i}.{k}": digest(v) if isinstance(v, torch.Tensor) else repr(v) for i, s in enumerate(o.state.values()) for k, v in s.items()}
        flat[f"{name}.groups"] = repr([{k: v for k, v in g.items() if k != "params"} for g in o.param_groups])
    flat |= {n: repr(s.state_dict()) for n, s in schedulers.items()}
    flat |= {"own": repr(own), "scaler": repr(scaler.state_dict()), "gen": repr(torch.rand(3, generator=generator).tolist()), "rng": repr(torch.rand(3).tolist())}
    assert model.tied.weight is model.first.weight
    session.close()
    return flat


@pytest.mark.parametrize("world", [1, 3])
def test_every_dtype_and_kind_of_state_comes_back(world, place, tmp_path):
    saved = ranks(world, lambda rank: zoo(rank, restore=False), env=place)
    back = ranks(world, lambda rank: zoo(rank, restore=True), env=place)
    for a, b in zip(saved, back, strict=True):
        assert a == b, [k for k in a if a[k] != b.get(k)]
    if world > 1:
        assert len({s["mine"] for s in saved}) == world, "the test's own ranks differ"
    print(f"{world} ranks: {len(saved[0])} values each, all equal")


def test_layouts_that_are_no_boxes_are_refused_by_name(place):
    def work(rank):
        mesh = init_device_mesh("cpu", (2,))
        model = nn.Module()
        model.w = nn.Parameter(DTensor.from_local(torch.ones(3), mesh, [torch.distributed.tensor.Partial()]))
        try:
            ckptd.attach(model=model)
        except ckptd.CkptdError as e:
            return [type(e).__name__, str(e)]

    for name, text in ranks(2, work, env=place):
        assert name == "Unstorable" and "model.w" in text


def test_plain_shards_under_one_name_are_refused_not_collapsed(place):
    """torch's DCP keeps one rank's bytes in silence (reference: formats, traps)."""

    def work(rank):
        torch.manual_seed(rank)
        model = nn.Linear(4, 4)
        try:
            ckptd.attach(model=model)
        except ckptd.CkptdError as e:
            first = [type(e).__name__, str(e)]
        session = ckptd.attach(model=model, local=["*"], required=True)
        session.restore()
        session.step(1)
        assert session.wait("committed", 1, timeout_s=30)
        session.close()
        kept = model.weight.detach().clone()
        with torch.no_grad():
            model.weight.zero_()
        session = ckptd.attach(model=model, local=["*"], required=True)
        session.restore()
        session.close()
        return [*first, bool(torch.equal(kept, model.weight))]

    for name, text, equal in ranks(2, work, env=place):
        assert name == "Unstorable" and "different bytes" in text and equal


@pytest.mark.parametrize("bad", ["lambda", "object", "file", "nested"])
def test_what_cannot_be_stored_is_refused_at_attach_by_path(bad, place, monkeypatch):
    for k, v in place.items():
        monkeypatch.setenv(k, v)

    class Holder:
        def __init__(self, value):
            self.value = value

        def state_dict(self):
            return {"deep": [{"x": self.value}]}

        def load_state_dict(self, state):
            pass

    value = {"lambda": lambda: 0, "object": object(), "file": iter(()), "nested": {"a": {1: object()}}}[bad]
    with pytest.raises(ckptd.errors.Unstorable, match=r"extras\.thing\.deep\.0\.x"):
        ckptd.attach(model=nn.Linear(2, 2), extras={"thing": Holder(value)})




class Picky(torch.optim.Optimizer):
    """Cannot be asked for its state ahead: it looks at real numbers."""

    def __init__(self, params):
        super().__init__(params, {"lr": 0.1})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                assert float(p.grad.abs().sum()) >= 0.0, "not on the meta device"
                state = self.state[p]
                if not state:
                    state["slow"] = p.detach().clone()
                    state["rows"] = torch.zeros(3)
                    state["count"] = 0
                state["count"] += 1
                state["rows"] += float(p.grad.sum())
                p.sub_(group["lr"] * p.grad)
                state["slow"].lerp_(p, 0.5)


def test_an_optimizer_that_cannot_be_asked_ahead(place):
    def work(restore):
        def run(rank):
            torch.manual_seed(1)
            model = nn.Linear(6, 4)
            optimizer = Picky(model.parameters())
            session = ckptd.attach(model=model, optimizer=optimizer, required=True)
            start = session.restore().step
            assert start == (3 if restore else 0)
            for step in range(start + 1, start + 4):
                optimizer.zero_grad()
                model(torch.full((2, 6), float(step))).square().mean().backward()
                optimizer.step()
                session.step(step)
                assert session.wait("committed", step, timeout_s=20), session.status()
                if step == 3 and not restore:
                    break
            session.close()
            return [digest(p) for p in model.parameters()] + [repr(sorted((k, str(v)) for k, v in optimizer.state[p].items())) for p in model.parameters()]

        return run

    def uninterrupted(rank):
        torch.manual_seed(1)
        model = nn.Linear(6, 4)
        optimizer = Picky(model.parameters())
        for step in range(1, 7):
            optimizer.zero_grad()
            model(torch.full((2, 6), float(step))).square().mean().backward()
            optimizer.step()
        return [digest(p) for p in model.parameters()] + [repr(sorted((k, str(v)) for k, v in optimizer.state[p].items())) for p in model.parameters()]

    ranks(2, work(restore=False), env=place)
    assert ranks(2, work(restore=True), env=place) == ranks(2, uninterrupted)


@pytest.mark.filterwarnings("ignore")  # torch.compile's own, at import
def test_names_see_through_wrappers():
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    from ckptd.state import model_state

    model = nn.Sequential(checkpoint_wrapper(nn.Linear(2, 2)), nn.Linear(2, 2))
    compiled = torch.compile(model)
    names = [leaf.name for leaf in model_state([("", compiled)], ()).leaves]
    assert names == ["model.0.weight", "model.0.bias", "model.1.weight", "model.1.bias"]
