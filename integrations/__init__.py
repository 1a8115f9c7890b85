"""Adapters, one file per ecosystem. torch itself needs none: `ckptd.attach` speaks it. See README.md."""
