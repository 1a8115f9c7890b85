"""Live adapters of Hugging Face: a callback for its Trainer, and `attach` for an Accelerator. Both end in the session that a plain loop has.

    callback = CkptdCallback(job="my-run", store="s3://...", persist_every=500)      # what ckptd.attach takes
    trainer = Trainer(..., callbacks=[callback])
    callback.follow(trainer)
    trainer.train()                                     # restores first, if there is anything to restore, and goes on where it was

The callback snapshots every step: model and config, optimizer, scheduler, gradient scaler, the Trainer's counters, the states of other callbacks. `follow` lets an
interrupted epoch go on with its next batch: it stands in front of two methods of this one trainer, `_run_epoch` and `_load_rng_state`, and uses the
Trainer's own way of passing over batches (its samplers are seeded by epoch, so the order is the same). Random states are put back where the Trainer
itself puts them back, after the first batch was fetched; so dropout goes on exactly.

What the Trainer keeps for its log (`log_history`, the mean loss since the last log) is not captured.

    session, start = attach(accelerator, job="my-run")  # after accelerator.prepare
    for step in range(start + 1, total + 1): ...; session.step(step)
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.scheduler import AcceleratedScheduler
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

import ckptd
from ckptd.errors import BadArgument
from ckptd.session import Restored, Session

__all__ = ["CkptdCallback", "attach"]

COUNTERS = ("epoch", "global_step", "num_input_tokens_seen", "total_flos", "best_metric", "best_global_step", "best_model_checkpoint")
"""What is kept of a TrainerState. Its other fields follow from the arguments, or are a log."""


class _Counters:
    """The Trainer's counters, and the other callbacks' states, as a thing that has a state."""

    def __init__(self, state: TrainerState, callbacks: list[Any]) -> None:
        self.state, self.callbacks = state, callbacks

    def state_dict(self) -> dict[str, Any]:
        """Of this moment."""
        return {
            **{name: getattr(self.state, name, None) for name in COUNTERS},
            "callbacks": {type(c).__name__: dict(c.state().get("attributes", {})) for c in self.callbacks},
        }

    def load_state_dict(self, held: dict[str, Any]) -> None:
        """Put it back."""
        for name in COUNTERS:
            if held.get(name) is not None:
                setattr(self.state, name, held[name])
        for callback in self.callbacks:
            for name, value in held.get("callbacks", {}).get(type(callback).__name__, {}).items():
                setattr(callback, name, value)


class CkptdCallback(TrainerCallback):  # type: ignore[misc]  # transformers is not looked into
    """Snapshots every step of a Trainer, and restores when training begins. `options`: what `ckptd.attach` takes; `extras` adds to what the Trainer has.

    `session` is the session while it trains, `restored` what the last restore did.
    """

    def __init__(self, *, fresh: bool = False, extras: dict[str, Any] | None = None, **options: Any) -> None:
        self.session: Session | None = None
        self.restored: Restored | None = None
        self._fresh, self._extras, self._options = fresh, dict(extras or {}), options
        self._trainer: Trainer | None = None
        self._random: Callable[[], None] | None = None

    def follow(self, trainer: Trainer) -> None:
        """Let an interrupted epoch of this trainer go on with its next batch."""
        if not hasattr(trainer, "_run_epoch") or not hasattr(trainer, "_load_rng_state"):
            msg = "this Trainer has no _run_epoch: transformers 5 or later is needed to go on within an epoch"
            raise BadArgument(msg)
        self._trainer = trainer
        run_epoch, load_rng_state = trainer._run_epoch, trainer._load_rng_state  # noqa: SLF001  there is no public place

        def run(*, epoch: int, num_update_steps_per_epoch: int, **more: Any) -> Any:
            step = self.restored.step if self.restored is not None else 0
            done, within = divmod(step, num_update_steps_per_epoch)
            if epoch < done:
                return None
            if step and epoch == done:
                batches = within * trainer.args.gradient_accumulation_steps
                more |= {"resume_from_checkpoint": _OURS, "epochs_trained": epoch, "steps_trained_in_current_epoch": batches}
            return run_epoch(epoch=epoch, num_update_steps_per_epoch=num_update_steps_per_epoch, **more)

        def put_back(checkpoint: Any) -> None:
            if checkpoint is not _OURS:
                load_rng_state(checkpoint)
            elif self._random is not None:
                self._random()

        trainer._run_epoch, trainer._load_rng_state = run, put_back  # noqa: SLF001

    # --- what the Trainer calls ---------------------------------------------------------------------------------------------

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **of: Any) -> None:  # noqa: ARG002
        """Attach to what the Trainer prepared, and restore."""
        trainer = self._trainer
        others = [c for c in (trainer.callback_handler.callbacks if trainer is not None else ()) if isinstance(c, ExportableState)]
        extras = {"scheduler": of["lr_scheduler"], "trainer": _Counters(state, [*others, control])}
        config = getattr(of["model"], "config", None)
        if config is not None:  # so that a snapshot can be converted into a folder that from_pretrained loads
            extras["config"] = json.loads(config.to_json_string(use_diff=False))
        extras |= self._extras
        scaler = getattr(trainer.accelerator, "scaler", None) if trainer is not None else None
        if scaler is not None:
            extras["scaler"] = scaler
        self.session = ckptd.attach(model=of["model"], optimizer=_inner(of["optimizer"]), extras=extras, **self._options)
        began_at = state.global_step  # not 0: resume_from_checkpoint, which then wins over older snapshots
        self.restored = self.session.restore(fresh=self._fresh or began_at > 0)
        if self.restored.step and trainer is None:
            msg = f"step {self.restored.step} is restored, and the Trainer does not know where its data goes on"
            raise BadArgument(msg, remedy="call callback.follow(trainer) before trainer.train()")
        if self.restored.step:
            self._random = _random_states()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_of: Any) -> None:  # noqa: ARG002
        """Snapshot; returns at once."""
        if self.session is not None:
            self.session.step(state.global_step)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_of: Any) -> None:  # noqa: ARG002
        """Let the last snapshot be committed."""
        if self.session is not None:
            self.session.close()


_OURS = "restored by ckptd"
"""Stands where the Trainer has the folder that it resumes from."""


def _random_states() -> Callable[[], None]:
    """Put the random states of this moment back, later."""
    python, numpy_, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002  the global state is what trainers draw from
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None

    def put_back() -> None:
        random.setstate(python)
        np.random.set_state(numpy_)  # noqa: NPY002
        torch.set_rng_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state(cuda)

    return put_back


def _inner(optimizer: Any) -> Any:
    """torch's optimizer in accelerate's."""
    return optimizer.optimizer if isinstance(optimizer, AcceleratedOptimizer) else optimizer


# --- accelerate -------------------------------------------------------------------------------------------------------------


def attach(accelerator: Accelerator, *, extras: dict[str, Any] | None = None, fresh: bool = False, **options: Any) -> tuple[Session, int]:
    """Attach all that `accelerator.prepare` was given, restore, and return the session and the step to go on from.

    Schedulers, the gradient scaler, what `register_for_checkpointing` was given and data loaders that have a state (`use_stateful_dataloader`) go along.
    `accelerator.save_state(...)` then also has the newest snapshot persisted, if there is a store. Call it once, after `prepare`.
    """
    found: dict[str, Any] = {}
    for kind, things in (("scheduler", accelerator._schedulers), ("object", accelerator._custom_objects), ("loader", accelerator._dataloaders)):  # noqa: SLF001
        for number, thing in enumerate(things):
            inner = thing.scheduler if isinstance(thing, AcceleratedScheduler) else thing
            if kind != "loader" or (hasattr(inner, "state_dict") and hasattr(inner, "load_state_dict")):
                found[f"{kind}{number}"] = inner
    if accelerator.scaler is not None:
        found["scaler"] = accelerator.scaler
    models = [accelerator.unwrap_model(m) for m in accelerator._models]  # noqa: SLF001
    optimizers = [_inner(o) for o in accelerator._optimizers]  # noqa: SLF001
    named = {f"model{i}": m for i, m in enumerate(models)} if len(models) > 1 else models[0]
    steps = {f"model{i}": o for i, o in enumerate(optimizers)} if len(optimizers) > 1 else optimizers or None
    session = ckptd.attach(model=named, optimizer=steps, extras=found | dict(extras or {}), **options)
    start = session.restore(fresh=fresh).step
    if session.settings.store:

        def persist(_models: Any, _weights: Any, _folder: str) -> None:
            taken = session.status()["reached"].get("committed")
            if taken is not None:
                session.persist(taken)

        accelerator.register_save_state_pre_hook(persist)
    return session, start
