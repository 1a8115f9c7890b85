"""Builds the tap's C++ (`native.cpp`) against the torch that is installed, and loads it.

    python -m ckptd.monitor.tap_build          build now, say where it lies
    start_in_background()                      one process per node does it at low priority, for the next start: training never waits for it

A wheel cannot contain it: it needs torch's own headers and ABI. So it is built once per (torch, Python, machine, source) with the C++ compiler that is there, into a
private directory ($XDG_CACHE_HOME/ckptd or ~/.cache/ckptd; 0700 and ours, or nothing is loaded). Where there is no compiler, the tap runs in Python.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib.machinery
import importlib.util
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
SOURCES = ("native.cpp", "ring.h")
PREFIX = "ckptd_tap_"
BUILD_TIMEOUT_S = 900.0
NICE = 19
FLAGS = ("-O2", "-g0", "-std=c++20", "-fPIC", "-shared", "-fvisibility=hidden", "-Wall", "-Wno-unknown-pragmas")


class NotBuilt(Exception):
    """Why there is no native tap."""


def cache_directory() -> Path:
    """Ours, and nobody else's. Raises NotBuilt."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    path = Path(base) / "ckptd"
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        info = path.lstat()
    except OSError as e:
        msg = f"{path}: {e.strerror}"
        raise NotBuilt(msg) from e
    if path.is_symlink() or info.st_uid != os.getuid() or info.st_mode & 0o022:
        msg = f"{path} is not ours alone: what lies there is not loaded"
        raise NotBuilt(msg)
    return path


def module_name() -> str:
    """The name of the module, which says what it was built from and for."""
    import torch

    h = hashlib.sha256()
    for name in SOURCES:
        h.update((HERE / name).read_bytes())
    h.update(" ".join((*FLAGS, torch.__version__, str(torch.compiled_with_cxx11_abi()), sysconfig.get_config_var("EXT_SUFFIX") or "", platform.machine())).encode())
    return f"{PREFIX}{h.hexdigest()[:16]}"


def built() -> Path | None:
    """Where the module for this torch lies, if it does and is ours."""
    with contextlib.suppress(NotBuilt, OSError):
        path = cache_directory() / f"{module_name()}.so"
        info = path.lstat()
        if path.is_file() and not path.is_symlink() and info.st_uid == os.getuid() and not info.st_mode & 0o022:
            return path
    return None


def load() -> Any:
    """The module, the same for the life of the process: its state is the process's. Raises NotBuilt, ImportError."""
    loaded = [m for name, m in [*sys.modules.items()] if name.startswith(PREFIX)]
    if loaded:
        return loaded[0]
    path = built()
    if path is None:
        msg = "the native tap is not built: python -m ckptd.monitor.tap_build"
        raise NotBuilt(msg)
    name = path.stem
    spec = importlib.util.spec_from_file_location(name, path, loader=importlib.machinery.ExtensionFileLoader(name, str(path)))
    if spec is None or spec.loader is None:
        msg = f"{path} cannot be loaded"
        raise NotBuilt(msg)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules[name] = module
    return module


def compiler_command() -> list[str]:
    """CXX, or what the machine calls its C++ compiler. Raises NotBuilt."""
    found = shlex.split(os.environ.get("CXX", "")) or [path for name in ("c++", "g++", "clang++") if (path := shutil.which(name))][:1]
    if not found:
        msg = "there is no C++ compiler (CXX, c++, g++, clang++)"
        raise NotBuilt(msg)
    return found


def command(target: Path) -> list[str]:
    """How it is compiled. Raises NotBuilt without a compiler."""
    import torch
    from torch.utils import cpp_extension

    compiler = compiler_command()
    libraries = Path(torch.__file__).parent / "lib"
    includes = [*cpp_extension.include_paths(), sysconfig.get_paths()["include"]]
    defines = (
        f"-DCKPTD_MODULE={target.name.split('.')[0]}", f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
        "-DUSE_C10D_GLOO", "-DTORCH_API_INCLUDE_EXTENSION_H",
    )  # fmt: skip
    return [
        *compiler, *FLAGS, *defines, *(f"-isystem{path}" for path in includes), f"-I{HERE}", str(HERE / "native.cpp"),
        f"-L{libraries}", "-ltorch_python", "-ltorch_cpu", "-lc10", "-o", str(target),
    ]  # fmt: skip


def build(*, wait: bool = True) -> Path:
    """Where the module lies, built if it is not there; one process at a time (`wait`: for its turn). Raises NotBuilt, with what the compiler said."""
    found = built()
    if found is not None:
        return found
    directory = cache_directory()
    with (directory / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as e:
            msg = "another process is at it"
            raise NotBuilt(msg) from e
        found = built()
        if found is not None:
            return found
        name = module_name()
        with tempfile.TemporaryDirectory(dir=directory) as scratch:
            target = Path(scratch) / f"{name}.so"
            try:
                done = subprocess.run(command(target), capture_output=True, text=True, timeout=BUILD_TIMEOUT_S, check=False)
            except (OSError, subprocess.TimeoutExpired) as e:
                raise NotBuilt(str(e)) from e
            if done.returncode != 0:
                msg = f"the compiler said:\n{done.stderr[-4000:]}"
                raise NotBuilt(msg)
            target.chmod(0o700)
            target.rename(directory / target.name)
        for old in directory.glob(f"{PREFIX}*.so"):  # of other sources or torches: kept a month, for a node may have several environments
            with contextlib.suppress(OSError):
                if old.stem != name and old.stat().st_atime < (directory / f"{name}.so").stat().st_mtime - 30 * 86400:
                    old.unlink()
        return directory / f"{name}.so"


def start_in_background() -> None:
    """Have it built for the next start, by a process of lowest priority that nobody waits for. Does nothing where it is built or being built."""
    if os.environ.get("CKPTD_TAP_BUILD", "") == "0" or built() is not None:
        return
    with contextlib.suppress(NotBuilt, OSError):
        compiler_command()
        with (cache_directory() / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        env = {k: v for k, v in os.environ.items() if not k.startswith(("RANK", "LOCAL_RANK", "LD_PRELOAD", "TORCHELASTIC_"))} | {"CKPTD_DISABLE": "1"}
        subprocess.Popen(
            [sys.executable, "-m", "ckptd.monitor.tap_build", "--background"], env=env, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL, start_new_session=True, close_fds=True,
        )  # fmt: skip


def main() -> int:
    """Build, and say where it lies or why it does not."""
    if "--where" in sys.argv:
        print(built() or "")  # noqa: T201  a command line
        return 0
    if "--background" in sys.argv:
        os.nice(NICE)
    try:
        print(build(wait="--background" not in sys.argv))  # noqa: T201  a command line
    except NotBuilt as e:
        print(f"the native tap cannot be built; collectives are then seen from Python, at ten times the cost: {e}", file=sys.stderr)  # noqa: T201  a command line
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
