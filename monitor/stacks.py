"""Where a process stands, from outside: Python and native stacks of all its threads, for a verdict's evidence.

py-spy (an optional package, `pip install 'ckptd[stacks]'`) reads another process's memory; the process takes no part, so a hung or stopped one can be read as
well. Without it, or where the kernel forbids it, the tap is asked (faulthandler), which a stopped process cannot answer; what the kernel itself says is always had.
"""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import sys
from pathlib import Path

DUMP_TIMEOUT_S = 8.0
TEXT_MAX = 16 << 10


def of(pid: int, *, native: bool = True) -> tuple[str, str]:
    """(text, how it was had) of a living process; ("", "") if nothing may read it. Blocks for up to two deadlines: call it in a pool."""
    tool = _tool()
    if tool:
        # --nonblocking does not stop the process: a hung rank may still be taking part in its network's protocol. Native frames need it to stand still.
        for options in ([["--native"]] if native else []) + [["--nonblocking"]]:
            with contextlib.suppress(OSError, subprocess.TimeoutExpired):
                done = subprocess.run(
                    [tool, "dump", "--pid", str(pid), *options], capture_output=True, text=True, errors="replace", timeout=DUMP_TIMEOUT_S, check=False
                )
                if done.returncode == 0 and done.stdout.strip():
                    return done.stdout[:TEXT_MAX], "py-spy" + (" (native)" if options == ["--native"] else "")
    return "", ""


def kernel(pid: int) -> str:
    """What the kernel says of each thread: its state and what it sleeps in. One line per thread; "" if the process is gone."""
    lines = []
    with contextlib.suppress(OSError):
        for task in sorted(Path(f"/proc/{pid}/task").iterdir(), key=lambda p: int(p.name)):
            with contextlib.suppress(OSError, IndexError):
                stat = (task / "stat").read_text()
                name, state = stat[stat.index("(") + 1 : stat.rindex(")")], stat.rpartition(")")[2].split()[0]
                wchan = (task / "wchan").read_text()
                lines.append(f"thread {task.name} {name}: {state} {'' if wchan == '0' else wchan}".rstrip())
    return "\n".join(lines)[:TEXT_MAX]


def _tool() -> str:
    """py-spy beside this interpreter, else on the path."""
    beside = Path(sys.executable).with_name("py-spy")
    return str(beside) if beside.is_file() else shutil.which("py-spy") or ""
