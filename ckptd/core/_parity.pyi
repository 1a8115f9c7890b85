from collections.abc import Sequence

from typing_extensions import Buffer

kernels: tuple[str, ...]

def combine(tables: Buffer, inputs: Sequence[Buffer], outputs: Sequence[Buffer], accumulate: bool, kernel: int) -> None: ...
