"""Lightning: a callback that snapshots every step and restores when fitting begins, into the middle of an epoch too.

    trainer = L.Trainer(..., callbacks=[CkptdCallback(job="my-run", store="s3://...", persist_every=500)])
    trainer.fit(module, loader)                    # restores first, if there is anything to restore, and goes on where it was

Captured: the module, its optimizers and schedulers, the progress of the fit loop, the precision plugin's scaler, the states of other callbacks, and the
random states, also those with which the epoch began. Lightning itself starts an interrupted epoch's data anew unless the loader has a state; here the epoch's
order is made again from those random states and its batches are passed over, so that the next one is the one that was next.

To that end the callback stands in front of two methods of this one trainer's fit loop: `setup_data` and the epoch loop's `on_run_start`.
"""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

import ckptd
from ckptd.session import Restored, Session

__all__ = ["CkptdCallback"]


class _Progress:
    """The fit loop's progress, the other callbacks' states and the epoch's first random states, as a thing that has a state."""

    def __init__(self, trainer: Trainer, callbacks: list[Callback]) -> None:
        self._trainer, self._callbacks = trainer, callbacks
        self.epoch_random: dict[str, Any] = {}
        self.loaded = False

    def state_dict(self) -> dict[str, Any]:
        """Of this moment."""
        return {
            "loops": self._trainer.fit_loop.state_dict(),
            "callbacks": {c.state_key: held for c in self._callbacks if (held := c.state_dict())},
            "epoch_random": self.epoch_random,
        }

    def load_state_dict(self, held: dict[str, Any]) -> None:
        """Put it back; the loop then knows that it goes on."""
        self._trainer.fit_loop.load_state_dict(held["loops"])
        for callback in self._callbacks:
            if callback.state_key in held["callbacks"]:
                callback.load_state_dict(held["callbacks"][callback.state_key])
        self.epoch_random = held["epoch_random"]
        self.loaded = True


class CkptdCallback(Callback):  # type: ignore[misc]  # lightning is not looked into
    """Snapshots every optimizer step, and restores when fitting begins. `options`: what `ckptd.attach` takes; `extras` adds to what Lightning has.

    `session` is the session while it fits, `restored` what the restore did.
    """

    def __init__(self, *, fresh: bool = False, extras: dict[str, Any] | None = None, **options: Any) -> None:
        super().__init__()
        self.session: Session | None = None
        self.restored: Restored | None = None
        self._fresh, self._extras, self._options = fresh, dict(extras or {}), options
        self._last = 0

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Attach to what the strategy set up, and restore."""
        others = [c for c in trainer.callbacks if c is not self]
        progress = _Progress(trainer, others)
        extras: dict[str, Any] = {"lightning": progress, **self._extras}
        extras |= {f"scheduler{i}": c.scheduler for i, c in enumerate(trainer.lr_scheduler_configs)}
        if trainer.precision_plugin.state_dict():
            extras["precision"] = trainer.precision_plugin
        several = trainer.optimizers
        optimizer = {f"optimizer{i}": o for i, o in enumerate(several)} if len(several) > 1 else several or None
        self.session = ckptd.attach(model=pl_module, optimizer=optimizer, extras=extras, **self._options)
        began_at = trainer.ckpt_path is not None  # fit(ckpt_path=...) then wins over older snapshots
        self.restored = self.session.restore(fresh=self._fresh or began_at)
        self._last = self.restored.step
        _go_on(trainer, progress)

    def on_train_batch_end(self, trainer: Trainer, *_: Any, **__: Any) -> None:
        """Snapshot, if the optimizer has stepped; returns at once."""
        if self.session is not None and trainer.global_step > self._last:
            self._last = trainer.global_step
            self.session.step(trainer.global_step)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:  # noqa: ARG002
        """Let the last snapshot be committed."""
        if self.session is not None and stage == "fit":
            self.session.close()
            self.session = None


def _go_on(trainer: Trainer, progress: _Progress) -> None:
    """Note the random states with which each epoch's data begins; and after a restore begin the data as that epoch did, and pass over what was used."""
    loop = trainer.fit_loop
    epoch_loop = loop.epoch_loop
    setup, begin = loop.setup_data, epoch_loop.on_run_start
    now = _random_now() if progress.loaded else None

    def setup_data() -> None:
        nonlocal now
        if loop._combined_loader is not None:  # noqa: SLF001  there is no public place
            setup()
            return
        used = epoch_loop.batch_progress.current.ready if now is not None else 0
        if now is None or not used:
            progress.epoch_random = _random_now()
            setup()
            return
        random_before, now = now, None
        _set_random(progress.epoch_random)
        setup()
        loaders: Any = loop.__dict__["_combined_loader"].flattened
        if used < trainer.num_training_batches and not all(hasattr(d, "load_state_dict") for d in loaders):
            fetcher = loop._data_fetcher  # noqa: SLF001
            for _ in range(used):
                next(fetcher)
            fetcher.fetched -= used  # the loop counts them itself
        _set_random(random_before)

    def on_run_start(fetcher: Any) -> None:
        if trainer.current_epoch > 0 and not loop.is_resuming and not epoch_loop.restarting:
            progress.epoch_random = _random_now()
        begin(fetcher)

    loop.setup_data, epoch_loop.on_run_start = setup_data, on_run_start


def _random_now() -> dict[str, Any]:
    version, words, gauss = random.getstate()
    return {
        "python": (version, np.asarray(words, dtype=np.uint32), gauss),
        "numpy": np.random.get_state(legacy=False),  # noqa: NPY002  the global state is what samplers draw from
        "torch": torch.get_rng_state(),
    }


def _set_random(states: dict[str, Any]) -> None:
    version, words, gauss = states["python"]
    random.setstate((version, tuple(int(w) for w in words), gauss))
    np.random.set_state(states["numpy"])  # noqa: NPY002
    torch.set_rng_state(states["torch"])
