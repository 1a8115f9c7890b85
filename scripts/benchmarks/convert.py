"""Conversion beside DeepSpeed's `ds_to_universal` and torch's `format_utils`, on the same checkpoints, made by the real frameworks.

Every case is a command, started anew, as a user starts it: interpreter, imports and all. Its peak memory is the kernel's (VmHWM of its largest
process). "copy" is `cp` of the source's files to the same file system. ckptd's default is compared: its target is on the disk when it ends; what the others
(and "ckptd --no-sync") leave is in the page cache.

- ZeRO -> universal: 2 ranks, stage 2, bf16; `python -m deepspeed.checkpoint.ds_to_universal`, with as many workers as cores.
- DCP -> torch.save: 2 ranks, FSDP2; `python -m torch.distributed.checkpoint.format_utils dcp_to_torch`.
- bounded: a checkpoint ten times as large as `--memory`.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

from benchmarks import harness
from benchmarks.harness import Aim, Bench, Table, median

# --- in the ranks -----------------------------------------------------------------------------------------------------------


def _model(parameters: int) -> Any:
    """Square layers of together about so many parameters."""
    import torch
    from torch import nn

    torch.manual_seed(0)
    width = 1024
    return nn.Sequential(*(nn.Linear(width, width) for _ in range(max(1, parameters // (width * width)))))


def save_zero(folder: str, parameters: int) -> int:
    """A ZeRO-2 checkpoint in bf16. Returns its bytes."""
    import deepspeed
    import torch

    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # type: ignore[attr-defined]  # no C++ to build: this job's speed is not measured
    config = {
        "train_micro_batch_size_per_gpu": 1, "bf16": {"enabled": True}, "zero_optimization": {"stage": 2},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-4, "torch_adam": True}},
    }  # fmt: skip
    engine, *_ = deepspeed.initialize(model=_model(parameters), config=config)
    loss = engine(torch.randn(1, 1024, dtype=torch.bfloat16)).float().sum()
    engine.backward(loss)
    engine.step()
    engine.save_checkpoint(folder, tag="global_step1")
    return _bytes(Path(folder))


def save_dcp(folder: str, parameters: int) -> int:
    """An FSDP2 checkpoint in fp32. Returns its bytes."""
    import torch
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict
    from torch.distributed.fsdp import fully_shard

    model = _model(parameters)
    for layer in model:
        fully_shard(layer)
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    model(torch.randn(1, 1024)).sum().backward()
    optimizer.step()
    model_state, optim_state = get_state_dict(model, optimizer)
    dcp.save({"model": model_state, "optim": optim_state}, checkpoint_id=folder)
    return _bytes(Path(folder))


# --- commands ---------------------------------------------------------------------------------------------------------------


def _bytes(folder: Path) -> int:
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())


def command(words: Sequence[str], log: Path) -> tuple[float, float]:
    """Run it; seconds, and peak MiB of its largest process, as the kernel keeps it (VmHWM), looked at every 20 ms.

    Python keeps compiled modules beside `log`, for all commands alike: whatever this process was told of them, the first round compiles and the others do not.
    """
    peak_kib = 0
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPYCACHEPREFIX": str(log.with_name("pycache"))}
    env.pop("PYTHONDONTWRITEBYTECODE", None)
    with log.open("wb") as out:
        began_s = time.perf_counter()
        process = subprocess.Popen(words, stdout=out, stderr=out, env=env)
        own = psutil.Process(process.pid)
        while process.poll() is None:
            peak_kib = max([peak_kib, *map(_high_water_kib, _tree(own))])
            time.sleep(0.02)
        seconds = time.perf_counter() - began_s
    if process.returncode:
        msg = f"{' '.join(words)} ended with {process.returncode}\n{log.read_text(errors='replace')[-3000:]}"
        raise RuntimeError(msg)
    return seconds, peak_kib / 1024


def _tree(process: psutil.Process) -> list[int]:
    try:
        return [process.pid, *(c.pid for c in process.children(recursive=True))]
    except psutil.NoSuchProcess:
        return []


def _high_water_kib(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("VmHWM")), 0)


def _cleared(directory: Path) -> None:
    """What a command made is gone, and the disk has done with it: the next one does not pay for writing it back, nor for discarding its blocks."""
    for left in directory.glob("out*"):
        if left.is_dir():
            shutil.rmtree(left)
        else:
            left.unlink()
    os.sync()


def ckptd(source: Path, target: Path, *words: str) -> list[str]:
    return [sys.executable, "-m", "ckptd.cli.main", "convert", str(source), str(target), "--quiet", *words]


def run(bench: Bench) -> None:
    """Both pairs, and the bound."""
    parameters = bench.pick(384 << 20, 32 << 20)
    rounds = bench.rounds or 3
    log = bench.directory / "log"
    zero, dcp = bench.directory / "zero", bench.directory / "dcp"
    nbytes = {
        "zero": harness.ranks("benchmarks.convert:save_zero", {"folder": str(zero), "parameters": parameters}, world=2, directory=bench.directory / "z")[0],
        "dcp": harness.ranks("benchmarks.convert:save_dcp", {"folder": str(dcp), "parameters": parameters}, world=2, directory=bench.directory / "d")[0],
    }
    tag, out = zero / "global_step1", bench.directory / "out"
    python = sys.executable
    cases = {
        "zero": {
            "ckptd": ckptd(zero, out, "--to", "universal"),
            "ckptd --no-sync": ckptd(zero, out, "--to", "universal", "--no-sync"),
            "ds_to_universal": [python, "-m", "deepspeed.checkpoint.ds_to_universal", "--input_folder", str(tag), "--output_folder", str(out),
                                "--inject_missing_state", "--num_extract_workers", str(os.cpu_count()), "--num_merge_workers", str(os.cpu_count())],
            "copy": ["/bin/cp", "-r", str(zero), str(out)],
        },
        "dcp": {
            "ckptd": ckptd(dcp, out, "--to", "torch"),
            "ckptd --no-sync": ckptd(dcp, out, "--to", "torch", "--no-sync"),
            "dcp_to_torch": [python, "-m", "torch.distributed.checkpoint.format_utils", "dcp_to_torch", str(dcp), str(out)],
            "copy": ["/bin/cp", "-r", str(dcp), str(out)],
        },
    }  # fmt: skip
    theirs = {"zero": "ds_to_universal", "dcp": "dcp_to_torch"}
    titles = {"zero": "ZeRO-2 bf16 -> universal", "dcp": "FSDP2 DCP -> torch.save"}
    rows = []
    for name, commands in cases.items():
        seconds: dict[str, list[float]] = {case: [] for case in commands}
        peak: dict[str, float] = dict.fromkeys(commands, 0.0)
        for turn in range(rounds + 1):
            for case in harness.rotated([*commands], turn):
                took, mib = command(commands[case], log)
                peak[case] = max(peak[case], mib)
                if turn:  # the first one warms the caches
                    seconds[case].append(took)
                _cleared(bench.directory)
        bench.raw[name] = {"bytes": nbytes[name], "seconds": seconds, "peak_mib": peak}
        other = seconds[theirs[name]]
        for case, each in seconds.items():
            faster = median([o / s for o, s in zip(other, each, strict=True)])
            of_copy = median([c / s for c, s in zip(seconds["copy"], each, strict=True)])
            rows.append([titles[name], case, median(each), nbytes[name] / median(each) / 1e9, of_copy, faster, peak[case]])
        ratio = median([o / s for o, s in zip(other, seconds["ckptd"], strict=True)])
        bench.aims.append(Aim(f"{titles[name]}: faster than {theirs[name]}", ratio, ">=", 5.0, "x"))
    bench.tables.append(
        Table(f"{nbytes['zero'] / 1e9:.2f} and {nbytes['dcp'] / 1e9:.2f} GB, {rounds} rounds", ["what", "command", "s", "GB/s", "x cp", "x theirs", "peak MiB"], rows)
    )
    _bounded(bench, dcp, nbytes["dcp"], out, log)


def _bounded(bench: Bench, source: Path, nbytes: int, out: Path, log: Path) -> None:
    """A checkpoint of at least ten times `--memory`, in every direction that streams."""
    bound = 256 if not bench.quick else 192
    big = source
    if nbytes < 10 * bound << 20:
        big = bench.directory / "big"
        nbytes = harness.ranks(
            "benchmarks.convert:save_dcp", {"folder": str(big), "parameters": (10 * bound << 20) // 12 + (8 << 20)}, world=2, directory=bench.directory / "b"
        )[0]
    rows = []
    for to, more in (("torch", ()), ("dcp", ("--ranks", "4")), ("zero3", ("--ranks", "4")), ("ckptd", ())):
        seconds, peak = command(ckptd(big, out, "--to", to, "--no-sync", "--memory", f"{bound}MiB", *more), log)
        rows.append([f"dcp -> {to}", nbytes / (bound << 20), seconds, peak, peak / bound])
        bench.aims.append(Aim(f"dcp -> {to}: peak memory of {bound} MiB asked", peak, "<=", bound, " MiB"))
        _cleared(bench.directory)
    bench.tables.append(Table(f"bounded memory: {nbytes / 1e9:.2f} GB with --memory {bound}MiB", ["what", "x the bound", "s", "peak MiB", "of bound"], rows))


