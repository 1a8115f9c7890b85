"""The pure core: no torch, clock, socket, thread or file. Values in, values out; `tests/test_architecture.py` holds it."""
