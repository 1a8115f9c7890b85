"""Benchmarks: each pairs ckptd with peers or with a physical limit in one run, prints ratios, and says which of its aims hold.

A benchmark is a module here with a docstring, whose first line `scripts/bench --list` shows, and `run(bench: harness.Bench) -> None`.
"""
