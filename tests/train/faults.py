"""Faults that a training script arms in itself, by wrapping the real functions: a SIGKILL at an exact place, once per job.

    capture:rank=1,step=7,at=5     in the copier, before the 5th tensor of step 7 (copied one by one)
    seal:rank=1,step=7             right after the slot is FILLED and the daemon told
    persist:rank=1,step=7          right after the persist of step 7 was asked for
"""

from __future__ import annotations

import os
import signal
from pathlib import Path


def arm(spec: str, rank: int, out: Path) -> None:
    kind, _, rest = spec.partition(":")
    facts = {k: int(v) for k, v in (f.split("=") for f in rest.split(","))}
    flag = out / f"fault-{spec.replace(':', '-')}"
    if facts["rank"] != rank or flag.exists():
        return

    def die() -> None:
        flag.touch()
        os.kill(os.getpid(), signal.SIGKILL)

    from ckptd import session as sessions

    if kind == "capture":
        arm_capture(sessions, facts["step"], facts["at"], die)
    elif kind == "seal":
        real_tell = sessions.Link.tell

        def tell(self, message, fd=None):
            real_tell(self, message, fd)
            if type(message).__name__ == "Filled" and message.step == facts["step"]:
                die()

        sessions.Link.tell = tell
    elif kind == "persist":
        real_persist = sessions.Session.persist

        def persist(self, step):
            real_persist(self, step)
            if step == facts["step"]:
                die()

        sessions.Session.persist = persist
    else:
        raise ValueError(spec)


def arm_capture(sessions, step: int, at: int, die) -> None:
    from ckptd import capture

    real_take, real_copy = sessions.Session._take, capture.copy_batch
    state = {"armed": False, "count": 0}

    def take(self, number, **how):
        self._binding.batch_bytes = 0  # every tensor a batch of its own
        self._copier.fence()
        state.update(armed=number == step, count=0)
        return real_take(self, number, **how)

    def copy(places, sources):
        import threading

        if state["armed"] and threading.current_thread().name == "ckptd-copier":
            if state["count"] == at:
                die()
            state["count"] += 1
        real_copy(places, sources)

    sessions.Session._take = take
    capture.copy_batch = copy
