"""Settings that every test shares. One OpenMP thread, before torch is imported: ranks are forked from here, and two cores are shared."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
for name in [n for n in os.environ if n.startswith(("CKPTD_", "TORCHELASTIC_"))]:
    del os.environ[name]
