"""Settings that every test shares. One OpenMP thread, before torch is imported: ranks are forked from here, and two cores are shared."""

from __future__ import annotations

import os
import signal

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # started with "&" by a shell without job control: what the tests start would not hear Ctrl-C either
    signal.signal(signal.SIGINT, signal.default_int_handler)
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # hundreds of processes are started from here: each would compile the package anew
for name in [n for n in os.environ if n.startswith(("CKPTD_", "TORCHELASTIC_"))]:
    del os.environ[name]
