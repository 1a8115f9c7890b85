"""Builds the profiler plugin for NCCL (`nccl_profiler.c`), has NCCL load it, and gives it the ring. In the trainer; no torch.

    enable()      before the first communicator: compile (once per machine and source), set NCCL_PROFILER_PLUGIN
    attach(ring)  any time: what the device did is added to this ring from now on
    times, waits  how much is looked at

NCCL loads one plugin only (nccl#1981). A user's own, named by NCCL_PROFILER_PLUGIN, is loaded from ours and hears what it asked for; only the versions of the interface
that it has are offered then. NCCL_PROFILER_PLUGIN=none means that nobody wants one. CKPTD_NCCL_PROFILER=0 switches ours off.

The library lies in a directory of this user alone ($XDG_CACHE_HOME/ckptd, 0700), under a name that is a hash of its sources and how they are compiled: nobody else's
file is loaded, and none is rebuilt. It is loaded here by the path that NCCL is given, so both have the same instance.

Threads: any; `enable` by one at a time.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import mmap
import os
import shlex
import shutil
import stat
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from ckptd.monitor import record
from ckptd.monitor.ring import Ring

SOURCES = tuple(Path(__file__).parent / name for name in ("nccl_profiler.c", "ring.h"))
VERSIONS: tuple[int, ...] = (3, 4, 5, 6)
FLAGS = ("-O2", "-std=gnu11", "-fPIC", "-shared", "-fvisibility=hidden", "-Wl,-z,nodelete")
"""nodelete: NCCL closes its plugin with the last communicator, while the ring goes on."""
BUILD_TIMEOUT_S = 60
PATH_MAX = 250
"""NCCL keeps 255 bytes of a plugin's name."""
PLUGIN, NEXT, SWITCH = "NCCL_PROFILER_PLUGIN", "CKPTD_NCCL_PROFILER_NEXT", "CKPTD_NCCL_PROFILER"
COUNTS = ("communicators", "operations", "matched", "timed", "marks", "lost", "stale", "waits", "forwarded", "captures")
"""What `counts` names: operations seen, of these matched with a record of the tap; times written; marks written; events that found no place; handles of events long
gone; transfers told while waits are watched; events given to the user's plugin; operations captured into graphs."""


@dataclass(frozen=True, slots=True)
class State:
    """Whether NCCL will load the plugin, and why not. `next`: the user's plugin behind it."""

    active: bool
    why: str = ""
    path: str = ""
    next: str = ""


class _Loaded:
    """The one library of this process, and mappings of rings: they stay, because NCCL's threads may be in the middle of one."""

    library: ctypes.CDLL | None = None
    state = State(active=False, why="not enabled")
    mappings: list[mmap.mmap]


_loaded = _Loaded()
_loaded.mappings = []


def cache_directory() -> Path:
    """Where built libraries lie: a directory of this user alone. Raises OSError if it belongs to another, or others may write to it."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")  # noqa: PTH111  Path.expanduser raises where there is no home
    path = Path(base) / "ckptd" if base.startswith("/") else Path(tempfile.gettempdir()) / f"ckptd-{os.getuid()}"
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError:
        path = Path(tempfile.gettempdir()) / f"ckptd-{os.getuid()}"
        path.mkdir(mode=0o700, exist_ok=True)
    about = path.lstat()
    if not stat.S_ISDIR(about.st_mode) or about.st_uid != os.getuid() or about.st_mode & 0o022:
        msg = f"{path} is not a directory that only this user writes to"
        raise PermissionError(msg)
    return path


def build(versions: tuple[int, ...] = VERSIONS) -> Path:
    """The plugin that offers these versions of the interface, compiled if it was not yet. Raises OSError (with what the compiler said)."""
    compiler = shlex.split(os.environ.get("CC", "")) or [found for name in ("cc", "gcc", "clang") if (found := shutil.which(name))][:1]
    offered = f"-DCKPTD_VERSIONS={sum(1 << v for v in versions)}"
    about = hashlib.sha256("\0".join((*FLAGS, offered, os.uname().machine)).encode())
    for source in SOURCES:
        about.update(source.read_bytes())
    target = cache_directory() / f"nccl-profiler-{about.hexdigest()[:24]}.so"
    if len(str(target)) > PATH_MAX:
        msg = f"the path is too long for NCCL: {target}"
        raise OSError(msg)
    if target.exists():
        return target
    if not compiler:
        msg = "no C compiler (cc, gcc or clang) is there"
        raise FileNotFoundError(msg)
    handle, partial = tempfile.mkstemp(dir=target.parent, suffix=".partial")
    os.close(handle)
    try:
        done = subprocess.run(
            [*compiler, *FLAGS, offered, "-o", partial, str(SOURCES[0]), "-ldl"], capture_output=True, text=True, timeout=BUILD_TIMEOUT_S, check=False
        )
        if done.returncode:
            msg = f"{compiler[0]}: {done.stderr[-500:].strip()}"
            raise OSError(msg)
        os.chmod(partial, 0o500)  # noqa: PTH101  paths here are what the compiler was given
        os.replace(partial, target)  # noqa: PTH105  paths here are what the compiler was given
    except subprocess.TimeoutExpired as e:
        msg = f"{compiler[0]} did not end in {BUILD_TIMEOUT_S} s"
        raise OSError(msg) from e
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(partial)  # noqa: PTH108  paths here are what the compiler was given
    return target


def _versions_of(name: str) -> tuple[int, ...]:
    """Which versions a plugin has that we have too. Raises OSError if there is no such library."""
    names = [name] if "/" in name or name.endswith(".so") else [name, f"libnccl-profiler-{name}.so"]
    failed: OSError | None = None
    for candidate in names:
        try:
            library = ctypes.CDLL(candidate)
        except OSError as e:
            failed = e
            continue
        return tuple(v for v in VERSIONS if hasattr(library, f"ncclProfiler_v{v}"))
    raise failed or FileNotFoundError(name)


def enable() -> State:
    """Have NCCL load the plugin with its next first communicator. Never raises: `why` says what stands against it. Again: what it said before."""
    if _loaded.state.active:
        return _loaded.state
    try:
        _loaded.state = _enable()
    except (OSError, AttributeError) as e:
        _loaded.state = State(active=False, why=str(e)[:500])
    return _loaded.state


def _enable() -> State:
    if os.environ.get(SWITCH) == "0":
        return State(active=False, why=f"{SWITCH}=0")
    asked = os.environ.get(PLUGIN, "")
    if asked.lower() == "none":
        return State(active=False, why=f"{PLUGIN}=none")
    behind = os.environ.get(NEXT, "") if "/nccl-profiler-" in asked else asked  # a child inherits what its parent has set
    versions = VERSIONS
    if behind:
        versions = _versions_of(behind)
        if not versions:
            return State(active=False, why=f"the plugin {behind} has none of the versions {VERSIONS}: it is left alone", next=behind)
    path = build(versions)
    library = ctypes.CDLL(str(path))
    library.ckptd_nccl_attach.argtypes = [ctypes.c_void_p, ctypes.c_uint64]
    library.ckptd_nccl_times.argtypes = [ctypes.c_uint32, ctypes.c_int]
    library.ckptd_nccl_times.restype = None
    library.ckptd_nccl_waits.argtypes = [ctypes.c_int]
    library.ckptd_nccl_waits.restype = None
    library.ckptd_nccl_counts.argtypes = [ctypes.POINTER(ctypes.c_uint64), ctypes.c_int]
    if behind:
        os.environ[NEXT] = behind
    os.environ[PLUGIN] = str(path)
    _loaded.library = library
    return State(active=True, path=str(path), next=behind)


def state() -> State:
    """What `enable` last said."""
    return _loaded.state


def attach(ring: Ring) -> bool:
    """Add what the device does to this ring. It gets a mapping of its own, which stays for the rest of the process (0.6 MiB with the default capacity)."""
    if _loaded.library is None:
        return False
    size = len(ring.memory)
    try:
        mapping = mmap.mmap(ring.fd, size)
    except (OSError, ValueError):
        return False
    address = ctypes.addressof(ctypes.c_char.from_buffer(mapping))
    _loaded.mappings.append(mapping)
    return int(_loaded.library.ckptd_nccl_attach(address, size)) == 0


def detach() -> None:
    """Write no more."""
    if _loaded.library is not None:
        _loaded.library.ckptd_nccl_attach(None, 0)


def times(every: int, *, graphs: bool = False) -> None:
    """Time one in `every` groups of operations on the device (0: none; 16 unless $CKPTD_NCCL_TIMES says otherwise). `graphs`: also in a process that captures CUDA graphs
    ($CKPTD_NCCL_GRAPHS=1): each replay of an operation that was captured with timing carries a host callback."""
    if _loaded.library is not None:
        _loaded.library.ckptd_nccl_times(every, int(graphs))


def waits(on: bool) -> None:  # noqa: FBT001  a switch is what it is
    """Write what NCCL's proxies wait for, peer by peer (marks of kind record.NCCL with the flag P2P): for a suspicion, not for always."""
    if _loaded.library is not None:
        _loaded.library.ckptd_nccl_waits(int(on))


def counts() -> dict[str, int]:
    """What the plugin has done in this process so far, by COUNTS; empty where it is not loaded."""
    if _loaded.library is None:
        return {}
    found = (ctypes.c_uint64 * len(COUNTS))()
    n = int(_loaded.library.ckptd_nccl_counts(found, len(COUNTS)))
    return dict(zip(COUNTS, (int(x) for x in found[:n]), strict=False))


assert record.NCCL == 11  # noqa: S101  as ring.h has it
