"""Real Trainer, Accelerator and Lightning jobs that are killed (SIGKILL) in the middle of an epoch, and go on with the losses of the uninterrupted run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.train.harness import stop_daemon

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.timeout(280), pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

COMMON = """
import json, os, signal, sys, warnings
warnings.simplefilter("ignore")
import torch
torch.manual_seed(3)
torch.set_num_threads(1)
out, kill_at, total = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
def said(step, loss):
    with open(out, "a") as f:
        f.write(json.dumps([step, loss]) + chr(10))
def perhaps_die(step, session):
    if step == kill_at:
        assert session.wait("committed", step, timeout_s=30)
        os.kill(os.getpid(), signal.SIGKILL)
"""

TRAINER = COMMON + """
import transformers
from transformers import TrainerCallback, TrainingArguments, Trainer
from ckptd.integrations.hf_live import CkptdCallback
class Words(torch.utils.data.Dataset):
    def __len__(self): return 22
    def __getitem__(self, i):
        ids = torch.arange(6).mul(i + 1).remainder(37)
        return {"input_ids": ids, "labels": ids}
class Heard(Trainer):
    def compute_loss(self, *args, **more):
        loss = super().compute_loss(*args, **more)
        said(self.state.global_step + 1, (loss[0] if isinstance(loss, tuple) else loss).item())
        return loss
config = transformers.GPT2Config(n_embd=16, n_layer=2, n_head=4, vocab_size=37, n_positions=12, bos_token_id=0, eos_token_id=1)  # with dropout
model = transformers.GPT2LMHeadModel(config)
arguments = TrainingArguments(output_dir=out + ".run", max_steps=total, save_strategy="no", per_device_train_batch_size=2, gradient_accumulation_steps=2,
    report_to=[], use_cpu=True, learning_rate=1e-2, warmup_steps=4, weight_decay=0.1, disable_tqdm=True, logging_strategy="no")
callback = CkptdCallback(required=True)
class Death(TrainerCallback):
    def on_step_end(self, args, state, control, **_): perhaps_die(state.global_step, callback.session)
trainer = Heard(model=model, args=arguments, train_dataset=Words(), callbacks=[callback, Death()])
callback.follow(trainer)
trainer.train()
said("restored", callback.restored.step)
said("final", [float(p.double().sum()) for p in model.parameters()])
"""

ACCELERATE = COMMON + """
from accelerate import Accelerator
from ckptd.integrations.hf_live import attach
accelerator = Accelerator(cpu=True)
model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Dropout(0.2), torch.nn.Linear(8, 1))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, 1.0, 10)
model, optimizer, scheduler = accelerator.prepare(model, optimizer, scheduler)
session, start = attach(accelerator, required=True)
for step in range(start + 1, total + 1):
    loss = model(torch.arange(24).view(4, 6).mul(step).remainder(7).float()).square().mean()
    said(step, loss.item())
    accelerator.backward(loss)
    optimizer.step(); scheduler.step(); optimizer.zero_grad()
    session.step(step)
    perhaps_die(step, session)
    if step == total and session.settings.store:
        session.wait("committed", step, timeout_s=30)
        accelerator.save_state(out + ".state")
        assert session.wait("persisted", timeout_s=30)
session.close()
said("restored", start)
said("final", [float(p.double().sum()) for p in model.parameters()])
"""

LIGHTNING = COMMON + """
import lightning as L, logging
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
from ckptd.integrations.lightning import CkptdCallback
class Words(torch.utils.data.Dataset):
    def __len__(self): return 22
    def __getitem__(self, i): return torch.arange(6).mul(i + 1).remainder(7).float()
class Net(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.BatchNorm1d(8), torch.nn.Dropout(0.2), torch.nn.Linear(8, 1))
    def training_step(self, batch, batch_idx):
        loss = (self.net(batch) - 1).square().mean()
        said([self.trainer.current_epoch, batch_idx], loss.item())
        return loss
    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, 1.0, 10), "interval": "step"}}
callback = CkptdCallback(required=True)
class Death(L.Callback):
    def on_train_batch_end(self, trainer, *_): perhaps_die(trainer.global_step, callback.session)
trainer = L.Trainer(max_steps=total, accelerator="cpu", callbacks=[callback, Death()], logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
net = Net()
trainer.fit(net, torch.utils.data.DataLoader(Words(), batch_size=4, shuffle=True))
said("restored", callback.restored.step)
said("final", [float(p.double().sum()) for p in net.state_dict().values()])
"""


def job(tmp: Path, name: str, script: str, kill_at: int, total: int, **env) -> tuple[int, list]:
    """Run it; its return code, and what it said."""
    out = tmp / f"{name}.jsonl"
    before = len(out.read_text().splitlines()) if out.exists() else 0
    settings = {"CKPTD_DIR": str(tmp / "d"), "CKPTD_JOB": name, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **env}
    done = subprocess.run(
        [sys.executable, "-c", script, str(out), str(kill_at), str(total)], env={**os.environ, **settings}, capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode in {0, -signal.SIGKILL}, done.stderr[-4000:]
    return done.returncode, [json.loads(line) for line in out.read_text().splitlines()[before:]]


@pytest.mark.parametrize(
    ("kind", "script", "deaths", "total"),
    [("transformers", TRAINER, [4, 9], 14), ("accelerate", ACCELERATE, [5], 9), ("lightning", LIGHTNING, [4, 8], 15)],
)
def test_killed_and_resumed_with_the_same_losses(kind, script, deaths, total, tmp_path):
    """Killed in the first epoch and in a later one; dropout, shuffling, warm-up and (Trainer) gradient accumulation on."""
    pytest.importorskip(kind)
    try:
        code, truth = job(tmp_path, "whole", script, -1, total)
        assert code == 0
        store = {"CKPTD_STORE": str(tmp_path / "store")} if kind != "lightning" else {}
        if kind == "transformers":
            store["CKPTD_PERSIST_EVERY"] = str(total)
        said = []
        for number, death in enumerate([*deaths, -1]):
            code, more = job(tmp_path, "killed", script, death, total, **store)
            assert (code == 0) == (number == len(deaths))
            said += more
        restored = [v for k, v in said if k == "restored"]
        assert restored == [deaths[-1]], "each went on from the step at which the last was killed"
        assert [s for s in said if s[0] != "restored"] == [s for s in truth if s[0] != "restored"], "every loss, and the weights at the end"
        if store:
            assert list((tmp_path / "store" / "killed").glob("step-*/manifest.json"))
        if kind == "transformers":
            as_a_folder(tmp_path, said[-1][1])
        print(f"{kind}: killed at {deaths}, {len(said)} losses and weights equal")
    finally:
        stop_daemon(tmp_path / "d")


def as_a_folder(tmp_path, sums) -> None:
    """What the daemon persisted of a Trainer's run, as a folder that from_pretrained loads: the callback kept the model's configuration."""
    import transformers

    from ckptd.convert import convert
    from ckptd.formats import WriteOptions

    convert(str(tmp_path / "store" / "killed"), str(tmp_path / "hf"), "hf", write=WriteOptions(drop=frozenset({"optimizer", "objects"})), check=True)
    model, info = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert [float(p.double().sum()) for p in model.parameters()] == sums


def test_a_trainer_that_is_not_followed_says_so(tmp_path):
    pytest.importorskip("transformers")
    try:
        job(tmp_path, "lone", TRAINER, 3, 6)
        out = tmp_path / "lone.jsonl"
        settings = {"CKPTD_DIR": str(tmp_path / "d"), "CKPTD_JOB": "lone", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        script = TRAINER.replace("callback.follow(trainer)", "")
        done = subprocess.run([sys.executable, "-c", script, str(out), "-1", "6"], env={**os.environ, **settings}, capture_output=True, text=True, timeout=200, check=False)
        assert done.returncode == 1
        assert "callback.follow(trainer)" in done.stderr
    finally:
        stop_daemon(tmp_path / "d")
