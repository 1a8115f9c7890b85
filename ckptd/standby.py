"""A worker that has done its imports and waits to be one: `python -u -m ckptd.standby`, started by the launcher ahead of need.

Most of the time from a rank's death to its next step is Python importing torch (measured: 1 to 3 s of 3 to 5 on two cores). A standby
has done it, at the lowest priority; when the launcher starts a worker it writes {"argv", "env"} to the standby's stdin, and the script runs as
`__main__` as it would have. End of file instead of an order means that the launcher is gone.

What a script can notice: the process existed before, its command line reads ckptd.standby, and modules named in the launcher's --preload
are loaded. Libraries that read the environment when they load have seen the launcher's.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import runpy
import sys
import types
from pathlib import Path

PRELOAD = (
    "numpy",
    "torch",
    "torch.distributed.fsdp",
    "torch.distributed.tensor.parallel",
    "torch.distributed.pipelining",
    "torch._dynamo",  # the first optimizer and the first fully_shard import it: 0.5 s, and four times that when four ranks do it at once
    "torch.profiler",
    "ckptd.session",
)
NICE = 19


def main() -> None:
    """Import, wait, become the worker."""
    original = os.getpriority(os.PRIO_PROCESS, 0)
    if may_raise_priority(original):
        set_priority(NICE)
    for name in (*PRELOAD, *filter(None, os.environ.get("CKPTD_PRELOAD", "").split(","))):
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    order = sys.stdin.buffer.readline()
    if not order:
        return
    set_priority(original)
    told = json.loads(order)
    os.environ.clear()
    os.environ.update(told["env"])
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    for stream, path in ((1, told.get("stdout")), (2, told.get("stderr"))):
        if path:
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            os.dup2(fd, stream)
            os.close(fd)
    become(told["argv"])


def may_raise_priority(to: int) -> bool:
    """Whether this process could come back from a low priority to nice `to`: tried in a child, for a worker that could not would stay slow for ever."""
    pid = os.fork()
    if pid == 0:
        try:
            os.setpriority(os.PRIO_PROCESS, 0, NICE)
            os.setpriority(os.PRIO_PROCESS, 0, to)
        except OSError:
            os._exit(1)
        os._exit(0)
    return os.waitpid(pid, 0)[1] == 0


def set_priority(nice: int) -> None:
    """For every thread of this process: on Linux the priority is a thread's."""
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, int(task.name), nice)


def become(argv: list[str]) -> None:
    """Run `script args` or `-m module args` as python would."""
    if argv[0] == "-m":
        sys.argv = argv[1:]
        sys.path[0] = str(Path.cwd())
        runpy.run_module(argv[1], run_name="__main__", alter_sys=True)
        return
    sys.argv = argv
    script = Path(argv[0])
    sys.path[0] = str(script.resolve().parent)
    module = types.ModuleType("__main__")
    module.__dict__.update({"__file__": str(script), "__builtins__": __builtins__, "__spec__": None})
    sys.modules["__main__"] = module
    code = compile(script.read_bytes(), str(script), "exec")
    exec(code, module.__dict__)  # noqa: S102  this is what starting a script means


if __name__ == "__main__":
    main()
