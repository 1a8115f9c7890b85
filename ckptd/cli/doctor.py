"""`ckptd doctor`: this machine and this installation; what is wrong with either, and what to do about it.

Each check reads something real and hands what it read to a function that judges it, so that a test can judge any machine. Levels: "ok"; "info": true, and nothing to
mend; "warning": it works, slower or not in every case; "problem": something of ckptd does not work here.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import importlib.metadata
import json
import mmap
import os
import platform
import re
import resource
import secrets
import select
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import msgspec
import psutil

from ckptd import __version__, arena
from ckptd.channel import peer_of, pidfd_of, socket_path
from ckptd.cli import show, status
from ckptd.core import parity
from ckptd.errors import BadArgument, CkptdError, DaemonUnreachable, StoreFailed
from ckptd.storage.local import LocalStore

LEVELS = ("ok", "info", "warning", "problem")
OK, INFO, WARNING, PROBLEM = LEVELS

PYTHON_MIN = (3, 11)
KERNELS = (
    ((5, 3), PROBLEM, "pidfd_open is missing (Linux 5.3): a daemon cannot watch its trainers"),
    ((5, 14), WARNING, "MADV_POPULATE_WRITE is missing (Linux 5.14): the first snapshots are slow, for their memory is touched then"),
    ((6, 5), INFO, "SO_PEERPIDFD is missing (Linux 6.5): a trainer's process is found by its number, which can be used again"),
)
FILES_MIN, FILES_WANTED = 256, 4096
"""Descriptors of a daemon: three per rank (connection, arena, process), one per other node; the launcher holds copies. ckptd.service has 65536."""
SOCKET_PATH_BYTES_MAX = 107
"""sockaddr_un, with its final zero."""
UNLIMITED_BYTES = 1 << 60
"""Above this a cgroup (v1) means "no limit"."""
GOOD_CLOCKS = {"tsc", "kvm-clock", "arch_sys_counter", "hyperv_clocksource_tsc_page", "timebase", "tod"}
"""Those that are read without a system call, on x86, virtual machines, ARM, POWER and z."""
CLOCK_RESOLUTION_S_MAX = 1e-3
CLOCK_READ_NS_MAX = 1000.0
NUMPY_TIMES = (20, 40)
"""How much faster the C kernels (AVX2, GFNI) are than NumPy, for two blocks of parity of eight (one core of a Xeon, 2026-11-20)."""
TAP_TIMEOUT_S = 30.0
NVIDIA = Path("/dev/nvidiactl")
TRIAL_BYTES = 64 << 20
STORE_BYTES_PER_S_MIN = 100e6
STORE_FREE_MIN = 0.05
VOLATILE = {"tmpfs", "ramfs"}
HANDLERS, HANDLER, BACKENDS = "torchrun.handlers", "ckptd", "torch.backends"
SHARE_STORE = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"
DEVICES = ("/dev/nvidia0", "/dev/kfd", "/dev/infiniband")
INSTALL = f"install ckptd again with this Python: {sys.executable} -m pip install 'ckptd[torch]'"

EXAMPLES = """examples:
  ckptd doctor
  ckptd doctor --store /mnt/checkpoints
"""


@dataclass(frozen=True, slots=True)
class Finding:
    """What a check found. `remedy`: what to do about it; "" where nothing has to be done."""

    level: str
    text: str
    remedy: str = ""


def add_parser(verbs: Any) -> None:
    """The verb's arguments."""
    p = verbs.add_parser(
        "doctor",
        help="what is wrong with this machine and this installation, and what to do about it",
        description="Look at this machine and this installation: versions, limits, memory, sockets, this node's daemon, the parity kernel, clocks, entry points; with\n"
        "--store, at the durable tier. Each line is ok, info, warning or problem, with its remedy. Exits with 0 if there is no problem, else with 1.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("--dir", metavar="DIR", help="directory of the daemon's socket; default: $CKPTD_DIR, $RUNTIME_DIRECTORY, or the user's runtime directory")
    p.add_argument("--store", metavar="PATH", help=f"a durable tier: write {TRIAL_BYTES >> 20} MiB there, read them back, remove them")
    p.add_argument("--timeout-s", type=float, default=2.0, metavar="S", help="wait this long for the daemon (default %(default)g)")
    p.add_argument("--json", action="store_true", help="print one JSON document")
    p.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """All checks, whatever some of them find."""
    if not 0 < args.timeout_s < float("inf"):
        msg = f"--timeout-s {args.timeout_s:g}: give a number of seconds above 0"
        raise BadArgument(msg)
    found = [(name, _checked(check, args)) for name, check in CHECKS.items() if check is not _store or args.store]
    counts = {level: sum(f.level == level for _, f in found) for level in LEVELS}
    if args.json:
        show.emit_json({"ok": not counts[PROBLEM], "checks": [{"name": name, **asdict(f)} for name, f in found]})
    else:
        show.emit("\n".join([*(_line(name, f) for name, f in found), f"{show.count(counts[PROBLEM], 'problem')}, {show.count(counts[WARNING], 'warning')}"]))
    return int(counts[PROBLEM] > 0)


def _line(name: str, f: Finding) -> str:
    remedy = f"\n{'':23}remedy: {show.plain(f.remedy)}" if f.remedy else ""
    return f"{f.level:8} {name:13} {show.plain(f.text)}{remedy}"


def _checked(check: Callable[[argparse.Namespace], Finding], args: argparse.Namespace) -> Finding:
    try:
        return check(args)
    except CkptdError as e:
        return Finding(PROBLEM, e.message, e.remedy)
    except OSError as e:
        return Finding(PROBLEM, f"the system refuses: {e}", "a container's seccomp profile or a security module may forbid it; `strace -f ckptd doctor` shows the call")


# --- versions ---------------------------------------------------------------------------------------------------------------


def _python(_: argparse.Namespace) -> Finding:
    return judge_python(sys.version_info[:3])


def judge_python(version: tuple[int, ...]) -> Finding:
    """This interpreter."""
    text = ".".join(map(str, version))
    if version < PYTHON_MIN:
        return Finding(PROBLEM, f"Python {text} is too old", f"Python {'.'.join(map(str, PYTHON_MIN))} or newer")
    return Finding(OK, f"Python {text}, ckptd {__version__}")


def version_of(text: str) -> tuple[int, ...]:
    """The leading numbers of a version: "2.13.0+cpu" is (2, 13, 0)."""
    match = re.match(r"\d+(?:\.\d+)*", text)
    return tuple(map(int, match[0].split("."))) if match else ()


def _installed(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _requirements(extra: str = "") -> dict[str, str]:
    """What this installation says it needs: package -> least version. Empty if it is not installed."""
    try:
        lines = importlib.metadata.requires("ckptd") or []
    except importlib.metadata.PackageNotFoundError:
        return {}
    wanted = [line.partition(";") for line in lines]
    chosen = [re.match(r"([\w.-]+)\s*>=\s*([\d.]+)", need) for need, _, marker in wanted if (f'"{extra}"' in marker if extra else not marker)]
    return {m[1]: m[2] for m in chosen if m}


def _packages(_: argparse.Namespace) -> Finding:
    needs = _requirements()
    return judge_packages(needs, {name: _installed(name) for name in needs})


def judge_packages(needs: dict[str, str], have: dict[str, str | None]) -> Finding:
    """What ckptd needs itself."""
    if not needs:
        return Finding(WARNING, "ckptd is not installed, it runs from its sources: torchrun does not find it", INSTALL)
    wrong = [f"{name} {have[name] or 'is missing'} (needs {least})" for name, least in needs.items() if version_of(have[name] or "") < version_of(least)]
    if wrong:
        return Finding(PROBLEM, ", ".join(wrong), INSTALL)
    return Finding(OK, ", ".join(f"{name} {have[name]}" for name in needs))


def _torch(_: argparse.Namespace) -> Finding:
    return judge_torch(_installed("torch"), _requirements("torch").get("torch", ""))


def judge_torch(have: str | None, least: str) -> Finding:
    """Not imported: that takes seconds. `least`: "" if this installation does not say."""
    if have is None:
        return Finding(WARNING, "torch is not installed: daemon and command line work, `ckptd run` and attach() do not", "pip install 'ckptd[torch]' where trainers run")
    if version_of(have) < version_of(least):
        return Finding(PROBLEM, f"torch {have} is too old", f"torch {least} or newer: pip install 'ckptd[torch]'")
    return Finding(OK, f"torch {have}")


def _kernel(_: argparse.Namespace) -> Finding:
    return judge_kernel(platform.system(), platform.release())


def judge_kernel(system: str, release: str) -> Finding:
    """What the kernel can, by its version; `memfd` and `sockets` try."""
    version = version_of(release)[:2]
    if system != "Linux" or not version:
        return Finding(PROBLEM, f"{system} {release} is not Linux", "run ckptd on Linux 5.3 or newer")
    for least, level, text in KERNELS:
        if version < least:
            return Finding(level, f"Linux {release}: {text}", "" if level == INFO else f"Linux {least[0]}.{least[1]} or newer")
    return Finding(OK, f"Linux {release}")


# --- limits -----------------------------------------------------------------------------------------------------------------


def _memlock(_: argparse.Namespace) -> Finding:
    soft, hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return judge_memlock(soft, hard, [d for d in DEVICES if Path(d).exists()])


def judge_memlock(soft: int, hard: int, devices: Sequence[str]) -> Finding:
    """Arenas are registered with devices; nothing else locks memory."""
    if soft == resource.RLIM_INFINITY:
        return Finding(OK, "unlimited")
    text = f"{show.size(soft)} of memory may be locked"
    if not devices:
        return Finding(OK, f"{text}; no device here for which it would have to be more")
    how = "ulimit -l unlimited" if hard == resource.RLIM_INFINITY else "memlock in /etc/security/limits.conf, LimitMEMLOCK=infinity in a unit, --ulimit memlock=-1 for a container"
    return Finding(WARNING, f"{text}: arenas may not be registered with {', '.join(devices)}, and copies into them then wait", how)


def _files(_: argparse.Namespace) -> Finding:
    return judge_files(resource.getrlimit(resource.RLIMIT_NOFILE)[1])


def judge_files(hard: int) -> Finding:
    """Open files. The daemon raises its own limit as far as the hard one."""
    if hard == resource.RLIM_INFINITY or hard >= FILES_WANTED:
        return Finding(OK, f"{'any number of' if hard == resource.RLIM_INFINITY else hard} open files")
    remedy = f"raise the hard limit to {FILES_WANTED} or more: nofile in /etc/security/limits.conf, LimitNOFILE= in a unit, --ulimit nofile for a container"
    text = f"at most {hard} open files: three per rank and one per node"
    return Finding(WARNING if hard >= FILES_MIN else PROBLEM, text, remedy)


@dataclass(frozen=True, slots=True)
class Limit:
    """A cgroup's limit, and what is left of it."""

    path: str
    limit_bytes: int
    left_bytes: int


def cgroup_limits(root: Path = Path("/")) -> list[Limit]:
    """The memory limits of this process's cgroup and those above it, v1 and v2; `root` for tests."""
    top, found = root / "sys/fs/cgroup", []
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        lines = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        names = ("memory.max", "memory.current") if not controllers else ("memory.limit_in_bytes", "memory.usage_in_bytes")
        for mount in (top, top / "unified") if not controllers else (top / "memory",):
            here = mount / path.strip("/")
            for folder in (here, *here.parents):
                if not folder.is_relative_to(mount):
                    break
                try:
                    limit, used = (int((folder / name).read_text()) for name in names)
                except (OSError, ValueError):  # absent, or "max"
                    continue
                if limit < UNLIMITED_BYTES:
                    found.append(Limit(str(folder / names[0]), limit, limit - used + _reclaimable_bytes(folder)))
    return found


def _reclaimable_bytes(cgroup: Path) -> int:
    """Page cache that nobody uses: it counts as used, and goes when memory is wanted."""
    try:
        stats = dict(line.split() for line in (cgroup / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return 0
    return int(stats.get("total_inactive_file") or stats.get("inactive_file") or 0)


def _memory(_: argparse.Namespace) -> Finding:
    memory = psutil.virtual_memory()
    return judge_memory(memory.total, memory.available, cgroup_limits(), arena.room().available_bytes)


def judge_memory(total_bytes: int, available_bytes: int, limits: Sequence[Limit], seen_bytes: int) -> Finding:
    """Room for snapshots. `seen_bytes`: what admission control takes for free."""
    tightest = min(limits, key=lambda limit: limit.left_bytes, default=None)
    left = min(available_bytes, tightest.left_bytes if tightest else available_bytes)
    free = min(left, seen_bytes)
    margin = arena.MARGIN_BYTES + total_bytes // 20
    text = f"{show.size(available_bytes)} of {show.size(total_bytes)} available, "
    text += f"{show.size(tightest.left_bytes)} left of {show.size(tightest.limit_bytes)} ({tightest.path})" if tightest else "no cgroup limits it"
    if free <= margin:
        return Finding(PROBLEM, f"{text}: no room, for {show.size(margin)} stay reserved", "raise the memory limit, or end what uses the memory: snapshots are shared memory, and count")
    if tightest and left < seen_bytes - margin:
        remedy = f"give fewer slots (ckptd run --slots), so that all snapshots of a node stay below {show.size(left - margin)}; or raise the limit"
        return Finding(WARNING, f"{text}, which the daemon's admission control does not see: it takes {show.size(seen_bytes)} for free", remedy)
    return Finding(OK, f"{text}; {show.size(free - margin)} for snapshots")


# --- what the system lets us do ---------------------------------------------------------------------------------------------


def _memfd(_: argparse.Namespace) -> Finding:
    """Sealed memory, tried: made, written through a mapping, and neither shrunk nor grown."""
    fd = os.memfd_create("ckptd:doctor", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.posix_fallocate(fd, 0, mmap.PAGESIZE)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, arena.SEALS)
        with mmap.mmap(fd, mmap.PAGESIZE) as mapping:
            mapping[:5] = b"ckptd"
            same = os.pread(fd, 5, 0) == b"ckptd"
        for size in (0, 2 * mmap.PAGESIZE):
            try:
                os.ftruncate(fd, size)
            except PermissionError:
                continue
            return judge_memfd(same=same, sealed=False)
        return judge_memfd(same=same, sealed=True)
    finally:
        os.close(fd)


def judge_memfd(*, same: bool, sealed: bool) -> Finding:
    """memfd_create, as arenas use it."""
    if not same or not sealed:
        what = "can be shrunk or grown though it is sealed" if same else "does not hold what was written to it"
        return Finding(PROBLEM, f"memory of memfd_create {what}", "this kernel or sandbox emulates memfd_create wrongly (gVisor?): run ckptd outside of it")
    return Finding(OK, "memfd_create gives memory that is sealed against shrinking and growing; /dev/shm is not used")


def _sockets(_: argparse.Namespace) -> Finding:
    """Who is at the other end of a socket, and a descriptor of its process: how a daemon knows its trainers and notices their death."""
    one, other = socket.socketpair(socket.AF_UNIX)
    with one, other:
        pid, uid = peer_of(one)
        fd = pidfd_of(one, pid)
        try:
            poller = select.poll()
            poller.register(fd, select.POLLIN)
            alive = not poller.poll(0)
        finally:
            os.close(fd)
    return judge_sockets((pid, uid), (os.getpid(), os.getuid()), alive=alive)


def judge_sockets(told: tuple[int, int], true: tuple[int, int], *, alive: bool) -> Finding:
    """(pid, uid) of a peer that is this process."""
    if told != true or not alive:
        what = f"SO_PEERCRED tells process {told[0]} of user {told[1]} for process {true[0]} of user {true[1]}" if told != true else "a pidfd says that a living process is dead"
        return Finding(PROBLEM, what, "daemon and trainers must share a PID and user namespace: run both in one container, or neither")
    return Finding(OK, "SO_PEERCRED and pidfd tell who is at the other end, and whether it lives")


def _loopback(_: argparse.Namespace) -> Finding:
    """TCP to itself, as daemons and rendezvous use it."""
    try:
        with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname(), 2) as there:
            server.settimeout(2)
            here, _ = server.accept()
            with here:
                here.settimeout(2)
                there.sendall(b"ckptd")
                got = here.recv(5)
    except OSError as e:
        return Finding(PROBLEM, f"TCP to 127.0.0.1 fails: {e}", "set the loopback device up (ip link set lo up), and let no firewall filter it")
    if got != b"ckptd":
        return Finding(PROBLEM, f"TCP to 127.0.0.1 turned b'ckptd' into {got!r}", "something intercepts connections: look at iptables")
    return Finding(OK, "TCP to 127.0.0.1 works")


def _clock(_: argparse.Namespace) -> Finding:
    source = Path("/sys/devices/system/clocksource/clocksource0/current_clocksource")
    name = source.read_text().strip() if source.exists() else ""
    began_ns = time.perf_counter_ns()
    for _i in range(10_000):
        time.monotonic_ns()
    return judge_clock(time.get_clock_info("monotonic").resolution, name, (time.perf_counter_ns() - began_ns) / 10_000)


def judge_clock(resolution_s: float, source: str, read_ns: float) -> Finding:
    """The monotonic clock: deadlines, and later the times of collectives. `source`: "" where the kernel does not say."""
    text = f"monotonic, {1e9 * resolution_s:g} ns fine, read in {read_ns:.0f} ns{f', by {source}' if source else ''}"
    slow = read_ns > CLOCK_READ_NS_MAX or (source and source not in GOOD_CLOCKS)
    if resolution_s > CLOCK_RESOLUTION_S_MAX:
        return Finding(WARNING, f"{text}: too coarse for deadlines of milliseconds", "a kernel with high-resolution timers (CONFIG_HIGH_RES_TIMERS)")
    if slow:
        return Finding(WARNING, f"{text}: reading it is slow", "tsc, where dmesg does not call it unstable: see available_clocksource beside current_clocksource in /sys")
    return Finding(OK, text)


# --- this node's daemon -----------------------------------------------------------------------------------------------------


def _directory(args: argparse.Namespace) -> Finding:
    return judge_directory(socket_path(args.dir))


def judge_directory(path: Path) -> Finding:
    """The directory of the daemon's socket `path`: ours alone, or one that can be made."""
    length = len(os.fsencode(path))
    if length > SOCKET_PATH_BYTES_MAX:
        return Finding(PROBLEM, f"{path} is {length} bytes long: a socket's path has at most {SOCKET_PATH_BYTES_MAX}", "give a shorter directory with --dir or CKPTD_DIR")
    folder = path.parent
    try:
        info = folder.lstat()
    except FileNotFoundError:
        above = next(p for p in folder.parents if p.exists())
        if above.is_dir() and os.access(above, os.W_OK | os.X_OK):
            return Finding(OK, f"{folder} is made when it is needed")
        return Finding(PROBLEM, f"{folder} cannot be made: {above} is {'not writable' if above.is_dir() else 'no directory'}", "give another with --dir or CKPTD_DIR")
    wrong = []
    if not folder.is_dir() or folder.is_symlink():
        wrong.append("is no directory, or a symlink")
    if info.st_uid != os.getuid():
        wrong.append(f"belongs to user {info.st_uid}, not to {os.getuid()}")
    if info.st_mode & 0o077:
        wrong.append(f"is open to others (mode {info.st_mode & 0o777:04o})")
    if wrong:
        return Finding(PROBLEM, f"{folder} {' and '.join(wrong)}: the daemon refuses it", f"chmod 700 {folder} if it is yours, else give another with --dir or CKPTD_DIR")
    return Finding(OK, f"{folder} is ours alone")


def _daemon(args: argparse.Namespace) -> Finding:
    path = socket_path(args.dir)
    if not path.exists():
        return Finding(INFO, f"no daemon at {path}: `ckptd run` and attach() start one")
    try:
        return judge_daemon(status.ask(path, args.timeout_s))
    except DaemonUnreachable as e:
        if isinstance(e.__cause__, ConnectionRefusedError):
            return Finding(WARNING, f"the daemon at {path} is gone, its socket is left", "nothing, if a job starts one; else `ckptd daemon`, or look why systemd does not restart it")
        return Finding(PROBLEM, e.message, e.remedy)


def judge_daemon(told: dict[str, Any]) -> Finding:
    """What a daemon says of itself."""
    try:
        d = msgspec.convert(told, status.Daemon)
    except msgspec.ValidationError as e:
        return Finding(WARNING, f"it answers, but not as this ckptd ({__version__}) expects: {e}", "use one version for daemon and command line")
    text = f"pid {d.pid}, version {d.version}, up {show.duration(d.uptime_s)}, {show.count(len(d.jobs), 'job')}, peers at {d.peer_address or '-'}"
    if d.version != __version__:
        return Finding(WARNING, f"{text}: this is {__version__}", "restart the daemon when no job needs its memory, or use its version here")
    if d.errors:
        last = d.last_errors[-1] if d.last_errors else "?"
        return Finding(WARNING, f"{text}; {show.count(d.errors, 'error')}, the last: {last}", "`ckptd status` shows them, the daemon's log shows all")
    alone = d.peer_address.startswith(("127.", "[::1]", "localhost"))
    return Finding(OK, f"{text}{' (this machine only: jobs on several nodes need --peer-host)' if alone else ''}; no errors")


# --- this installation ------------------------------------------------------------------------------------------------------


def _parity(_: argparse.Namespace) -> Finding:
    folder = Path(parity.__file__).parent
    rates = {kernel: _rate(kernel) for kernel in {parity.KERNELS[0], parity.NUMPY}}
    return judge_parity(parity.KERNELS, parity.self_test(), rates, [p.name for p in folder.glob("_parity*.so")])


def _rate(kernel: str) -> float:
    """Bytes of data per second, eight blocks to two of parity, in a core's cache: the best of a few times."""
    data, made = [secrets.token_bytes(64 << 10) for _ in range(8)], [bytearray(64 << 10) for _ in range(2)]
    encode = parity.encoder(8, 2, kernel)
    encode(data, made)
    took_s = []
    for _ in range(5):
        began_s = time.perf_counter()
        encode(data, made)
        took_s.append(time.perf_counter() - began_s)
    return sum(map(len, data)) / min(took_s)


def judge_parity(kernels: Sequence[str], wrong: Sequence[str], rates: dict[str, float], built: Sequence[str]) -> Finding:
    """Which kernel computes parity. `built`: the extension's files, which may be another Python's."""
    if wrong:
        return Finding(PROBLEM, "; ".join(wrong), "this machine computes wrongly, or ckptd was built for another: install it again, then test the memory and the processor")
    numpy = f"{rates[parity.NUMPY] / 1e9:.1f} GB/s"
    if kernels[0] == parity.NUMPY:
        why = f"{built[0]} does not load into this Python" if built else "no C compiler was found when ckptd was installed"
        slower = f"{NUMPY_TIMES[0]} to {NUMPY_TIMES[1]} times slower for parity 2 and more"
        return Finding(WARNING, f"{why}: NumPy computes parity, {slower} ({numpy})", "install a C compiler (gcc or clang), then ckptd again")
    times = f"{rates[kernels[0]] / rates[parity.NUMPY]:.0f} times NumPy's"
    return Finding(OK, f"{kernels[0]} computes parity, {rates[kernels[0]] / 1e9:.0f} GB/s per thread, {times}; all kernels agree: {', '.join(kernels)}")


def _entry(_: argparse.Namespace) -> Finding:
    found = [e.value for e in importlib.metadata.entry_points(group=HANDLERS) if e.name == HANDLER]
    places = dict.fromkeys(str(d.locate_file("")) for d in importlib.metadata.distributions(name="ckptd"))
    first = next(iter(importlib.metadata.distributions(name="ckptd")), None)
    fresh = first is not None and any(e.group == HANDLERS and e.name == HANDLER for e in first.entry_points)
    return judge_entry(found, list(places), fresh=fresh)


def judge_entry(found: Sequence[str], places: Sequence[str], *, fresh: bool = False) -> Finding:
    """How torchrun finds its backend "ckptd". `places`: where ckptd's metadata lie; the first is the one that counts, and is `fresh` if it tells of the backend (an
    editable install leaves such a one beside the sources)."""
    if found and (len(places) == 1 or fresh):
        return Finding(OK, f"torchrun finds backend {HANDLER!r}: {found[0]}")
    lost = "" if found else "; torchrun --rdzv-backend ckptd does not work"
    if len(places) > 1:
        remedy = f"remove the stale one: `pip uninstall ckptd` until none is left and install again, or delete {places[0]}/ckptd.egg-info"
        return Finding(WARNING, f"ckptd's metadata in {places[0]} shadow those in {', '.join(places[1:])}{lost}", remedy)
    return Finding(WARNING, f"no entry point {HANDLER!r} of {HANDLERS}{lost}", INSTALL)


# --- watching ---------------------------------------------------------------------------------------------------------------


def _tap(_: argparse.Namespace) -> Finding:
    if _installed("torch") is None:
        return Finding(INFO, "there is no torch here: nothing to watch")
    from ckptd.monitor import tap_build

    found = [e.value for e in importlib.metadata.entry_points(group=BACKENDS) if e.name == HANDLER]
    compiler = ""
    with contextlib.suppress(tap_build.NotBuilt):
        compiler = tap_build.compiler_command()[0]
    native = ""
    with contextlib.suppress(OSError, subprocess.SubprocessError):  # in a process of its own: it asks torch
        native = subprocess.run([sys.executable, "-m", "ckptd.monitor.tap_build", "--where"], capture_output=True, text=True, timeout=TAP_TIMEOUT_S, check=False).stdout.strip()
    env = {name: os.environ[name] for name in ("CKPTD_DISABLE", "CKPTD_TAP", "TORCH_DEVICE_BACKEND_AUTOLOAD") if name in os.environ}
    return judge_tap(found, native, compiler, env)


def judge_tap(found: Sequence[str], native: str, compiler: str, env: Mapping[str, str]) -> Finding:
    """How ranks will be watched. `found`: the entry points by which torch loads the tap; `native`: its C++, built for the torch that is here; `env`: what turns it off."""
    if env.get("CKPTD_DISABLE") == "1" or env.get("CKPTD_TAP") == "0" or env.get("TORCH_DEVICE_BACKEND_AUTOLOAD") == "0":
        said = ", ".join(f"{k}={v}" for k, v in env.items())
        return Finding(INFO, f"ranks are not watched, unless they attach a session: {said}", "unset it to have them watched")
    if not found:
        return Finding(WARNING, f"no entry point {HANDLER!r} of {BACKENDS}: only ranks that attach a session are watched", INSTALL)
    if native:
        return Finding(OK, f"collectives are recorded in C++ (layer native): {native}")
    build = f"{sys.executable} -m ckptd.monitor.tap_build"
    if compiler:
        return Finding(INFO, "collectives are recorded in Python, at some ten times the cost (layer python); the first job here builds the C++", f"build it now: {build}")
    return Finding(WARNING, "collectives are recorded in Python, at some ten times the cost (layer python): there is no C++ compiler", f"install one, then: {build}")


def _nccl(_: argparse.Namespace) -> Finding:
    """In a process of its own, as a rank does it: loading a library is not undone."""
    if not NVIDIA.exists():
        return Finding(INFO, "no NVIDIA driver here: no device's operations to time")
    code = "import json; from dataclasses import asdict; from ckptd.monitor import nccl; print(json.dumps(asdict(nccl.enable())))"
    try:
        said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=TAP_TIMEOUT_S, check=True).stdout
        return judge_nccl(json.loads(said.splitlines()[-1]))
    except (OSError, subprocess.SubprocessError, ValueError, IndexError) as e:
        return judge_nccl({"active": False, "why": f"{type(e).__name__}: {e}"})


def judge_nccl(state: Mapping[str, object]) -> Finding:
    """The profiler plugin that NCCL is to load; `state`: as `monitor.nccl.State` has it."""
    if state.get("active"):
        behind = f", {state['next']} behind it" if state.get("next") else ""
        return Finding(OK, f"NCCL loads the profiler plugin {state.get('path')}{behind}: operations are timed on the device")
    why = str(state.get("why", ""))
    lost = f"NCCL's operations are not timed by its profiler: {why}"
    if why.startswith(("CKPTD_NCCL_PROFILER=", "NCCL_PROFILER_PLUGIN=")):
        return Finding(INFO, lost, f"unset {why.partition('=')[0]} to have them timed")
    return Finding(WARNING, lost, "install a C compiler, or name one with CC" if "compiler" in why else "see the message; CKPTD_NCCL_PROFILER=0 says that it is meant to be so")


def _rendezvous(_: argparse.Namespace) -> Finding:
    return judge_rendezvous(os.environ.get(SHARE_STORE, ""))


def judge_rendezvous(value: str) -> Finding:
    """What plain torchrun needs to restart workers with new addresses; `ckptd run` sets it itself."""
    if value == "1":
        return Finding(OK, f"{SHARE_STORE}=1")
    return Finding(INFO, f"{SHARE_STORE} is not 1: restarted ranks then read addresses of dead ones; `ckptd run` sets it", f"with plain torchrun: export {SHARE_STORE}=1")


# --- the durable tier -------------------------------------------------------------------------------------------------------


def _store(args: argparse.Namespace) -> Finding:
    """By ckptd's own store, in a directory of its own that goes again: all that a commit relies on."""
    scheme, _, rest = str(args.store).rpartition("://")
    if scheme not in {"", "file"}:
        msg = f"{args.store} is no directory: only local and shared file systems can be looked at"
        raise BadArgument(msg, remedy="give a path, or file:///absolute/path")
    root = Path(unquote(rest.removeprefix("localhost")) if scheme else rest).absolute()
    there = next(p for p in (root, *root.parents) if p.exists())
    try:
        folder = tempfile.mkdtemp(prefix=".ckptd-doctor-", dir=there)
    except OSError as e:
        return Finding(PROBLEM, f"{there} cannot be written: {e.strerror}", f"give user {os.getuid()} write permission there, or another store; it must be mounted, and not read-only")
    try:
        free = shutil.disk_usage(folder)
        if free.free < 2 * TRIAL_BYTES:
            return judge_store(str(root), existing=root == there, kind=file_system_of(there), free=(free.free, free.total), bytes_per_s=float("inf"))
        rate = try_store(LocalStore(folder))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return judge_store(str(root), existing=root == there, kind=file_system_of(there), free=(free.free, free.total), bytes_per_s=rate)


def try_store(store: LocalStore) -> float:
    """Write, read back, replace, refuse to replace; bytes per second of writing until they are durable. Raises StoreFailed."""
    data = mmap.mmap(-1, TRIAL_BYTES)  # aligned, as images are
    piece = secrets.token_bytes(1 << 20)  # nothing that a file system could compress
    for at in range(0, TRIAL_BYTES, len(piece)):
        data[at : at + len(piece)] = piece
    with memoryview(data) as view:
        began_s = time.perf_counter()
        store.put("trial", view)
        took_s = time.perf_counter() - began_s
        back = bytearray(TRIAL_BYTES)
        store.get("trial", 0, memoryview(back))
        if back != view:
            msg = f"{store}: what was read is not what was written"
            raise StoreFailed(msg, remedy="look into dmesg, and use another store meanwhile")
    data.close()
    store.put("trial", b"replaced")
    with suppress(StoreFailed):
        store.put("trial", b"again!!!", exclusive=True)
    kept = bytearray(8)
    store.get("trial", 0, memoryview(kept))
    if kept != b"replaced":
        msg = f"{store}: a file that was replaced holds {bytes(kept)!r}, not what was put last and must stay"
        raise StoreFailed(msg, remedy="two jobs could overwrite each other's manifests here: use a file system with hard links and atomic rename")
    return TRIAL_BYTES / took_s


def file_system_of(path: Path, mounts: Path = Path("/proc/self/mounts")) -> str:
    """The kind of file system that `path` lies on; "" where it cannot be told."""
    best, kind = -1, ""
    try:
        lines = mounts.read_text().splitlines()
    except OSError:
        return ""
    for line in lines:
        _, at, this, *_ = line.split()
        point = at.replace("\\040", " ")
        if path.resolve().is_relative_to(point) and len(point) >= best:
            best, kind = len(point), this
    return kind


def judge_store(root: str, *, existing: bool, kind: str, free: tuple[int, int], bytes_per_s: float) -> Finding:
    """A directory that was written to. `free`: of how many bytes."""
    text = f"{root}{'' if existing else ' (does not exist yet; its parent was tried)'}: {show.size(free[0])} free of {show.size(free[1])}, {kind or 'unknown file system'}"
    if free[0] < 2 * TRIAL_BYTES:
        return Finding(PROBLEM, f"{text}: full", "free space, keep fewer checkpoints, or use another store")
    text += f"; {TRIAL_BYTES >> 20} MiB written and synced at {bytes_per_s / 1e6:.0f} MB/s, read back; files are replaced whole"
    if kind in VOLATILE:
        return Finding(WARNING, f"{text}; this is memory, which goes with the machine", "use a disk or a shared file system")
    if free[0] < STORE_FREE_MIN * free[1]:
        return Finding(WARNING, f"{text}; nearly full", "free space, or keep fewer checkpoints")
    if bytes_per_s < STORE_BYTES_PER_S_MIN:
        return Finding(WARNING, f"{text}; that is slow", "persist rarely (`ckptd plan --store-gbps` says how often is worth it), or use a faster store")
    if not existing:
        return Finding(WARNING, text, f"mount it, or make it: mkdir -p {root}")
    return Finding(OK, text)


CHECKS: dict[str, Callable[[argparse.Namespace], Finding]] = {
    "python": _python, "packages": _packages, "torch": _torch, "entry point": _entry, "parity": _parity, "kernel": _kernel, "memlock": _memlock,
    "open files": _files, "memory": _memory, "memfd": _memfd, "sockets": _sockets, "loopback": _loopback, "clock": _clock, "directory": _directory,
    "daemon": _daemon, "tap": _tap, "nccl": _nccl, "torchrun": _rendezvous, "store": _store,
}  # fmt: skip
