"""systemd: the unit file as systemd reads it, and the daemon under a service manager that holds its descriptors.

systemd itself does not run where tests run (PID 1 is something else), so `Manager` plays it, after sd_notify(3), sd_listen_fds(3) and
systemd's service.c: a datagram socket, a descriptor store that keeps one copy per file, descriptors handed back from 3 on with their names, a
watchdog that kills. What it plays is checked against the unit's own numbers where they matter.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from ckptd.arena import Arena
from ckptd.core import wire
from ckptd.link import Link

ROOT = Path(__file__).resolve().parents[2]
UNIT = ROOT / "ckptd" / "ckptd.service"
WAIT_S = 60.0


# --- the unit ---------------------------------------------------------------------------------------------------------------

needs_systemd_analyze = pytest.mark.skipif(
    shutil.which("systemd-analyze") is None, reason="systemd-analyze is missing: install the Debian package `systemd`"
)


def analyze(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    command = ["systemd-analyze", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, env=os.environ | env)


def user_form() -> str:
    """The unit for a user's manager, by the very sed command that its comment gives."""
    (script,) = re.findall(r"sed '([^']+)'", UNIT.read_text())
    return subprocess.run(["sed", script, str(UNIT)], capture_output=True, text=True, check=True).stdout


def settings_of(text: str) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for line in text.splitlines():
        if "=" in line and not line.startswith("#"):
            key, value = line.split("=", 1)
            found.setdefault(key, []).append(value)
    return found


@needs_systemd_analyze
@pytest.mark.parametrize("form", ["system", "system for alice", "user"])
def test_unit_is_valid(form: str, tmp_path: Path) -> None:
    """A bad value is only a line on stderr, with status 0: so stderr has to be empty."""
    text = user_form() if form == "user" else UNIT.read_text()
    if form == "system for alice":
        text = text.replace("#User=alice", "User=daemon").replace("#ReadWritePaths=", "ReadWritePaths=")
        assert text.count("User=daemon") == text.count("\nReadWritePaths=") == 1
    (tmp_path / "ckptd.service").write_text(text)
    manager = ["--user"] if form == "user" else []
    done = analyze(*manager, "verify", str(tmp_path / "ckptd.service"), XDG_RUNTIME_DIR=str(tmp_path))
    assert (done.returncode, done.stderr) == (0, "")


@needs_systemd_analyze
def test_unit_of_an_unknown_setting_would_be_noticed(tmp_path: Path) -> None:
    """That the test above can fail."""
    (tmp_path / "ckptd.service").write_text(UNIT.read_text().replace("Type=notify", "Type=notifyy"))
    assert analyze("verify", str(tmp_path / "ckptd.service")).stderr != ""


@needs_systemd_analyze
def test_unit_keeps_memory_over_stop_where_systemd_can(tmp_path: Path) -> None:
    version = int(analyze("--version").stdout.split()[1])
    line = "FileDescriptorStorePreserve=yes"
    assert f"\n#{line}\n" in UNIT.read_text()
    (tmp_path / "ckptd.service").write_text(UNIT.read_text().replace(f"#{line}", line))
    assert (analyze("verify", str(tmp_path / "ckptd.service")).stderr == "") == (version >= 254)


@needs_systemd_analyze
def test_unit_is_hardened() -> None:
    done = analyze("security", "--offline=true", str(UNIT))
    if done.returncode != 0 and "offline" in done.stderr:
        pytest.skip("this systemd-analyze has no `security --offline`: systemd 250 or newer has")
    score = float(re.search(r"exposure level for ckptd.service: ([\d.]+)", done.stdout).group(1))
    print(f"\nsystemd-analyze security: {score} (0 is closed, 10 is open)")
    assert score <= 2.0


def test_unit_says_what_the_daemon_relies_on() -> None:
    unit = settings_of(UNIT.read_text())
    expected = {
        "Type": "notify", "NotifyAccess": "main", "Restart": "always", "WatchdogSec": "30", "FileDescriptorStoreMax": "1024",
        "RuntimeDirectory": "ckptd", "RuntimeDirectoryMode": "0700", "RuntimeDirectoryPreserve": "yes", "LimitMEMLOCK": "infinity",
        "OOMScoreAdjust": "-900", "StartLimitIntervalSec": "0", "LimitCORE": "0",
    }  # fmt: skip
    assert {k: unit[k] for k in expected} == {k: [v] for k, v in expected.items()}
    assert "PrivateUsers" not in unit, "SO_PEERCRED would show everybody as nobody"
    assert unit.get("ProcSubset", ["all"]) == ["all"], "admission control reads /proc/meminfo"
    assert "PrivateDevices" not in settings_of(user_form()), "a user's manager cannot drop capabilities"


# --- playing systemd --------------------------------------------------------------------------------------------------------

HAND_OVER = """
import ctypes, os, sys
at = sys.argv.index("--")
pairs = [a.split(":") for a in sys.argv[1:at]]
for place, fd in pairs: os.dup2(int(fd), int(place))
for place, fd in pairs: os.close(int(fd))
os.environ["LISTEN_PID"] = os.environ.get("LISTEN_PID", str(os.getpid()))
libc = ctypes.CDLL(None, use_errno=True)
libc.prctl(38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS: NoNewPrivileges=
libc.prctl(65, 1, 0, 0, 0)  # PR_SET_MDWE, Linux 6.3: MemoryDenyWriteExecute=
os.umask(0o077)
os.execv(sys.argv[at + 1], sys.argv[at + 1 :])
"""
"""What systemd does between fork and exec. Older kernels refuse the second prctl, and the daemon runs without it."""


@dataclass
class Stored:
    """A descriptor in the store."""

    name: str
    fd: int

    @property
    def file(self) -> tuple[int, int]:
        info = os.fstat(self.fd)
        return info.st_dev, info.st_ino


@dataclass
class Manager:
    """The part of systemd that a daemon sees."""

    directory: Path
    watchdog_s: float = 0.0
    log: list[tuple[float, dict[str, str]]] = field(default_factory=list)
    store: list[Stored] = field(default_factory=list)
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.changed = threading.Condition()
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(str(self.directory / "notify"))
        self.socket.settimeout(0.2)
        self.closing = False
        self.thread = threading.Thread(target=self._receive, daemon=True)
        self.thread.start()

    def _receive(self) -> None:
        while not self.closing:
            try:
                data, fds, _, _ = socket.recv_fds(self.socket, 4096, 16)
            except TimeoutError:
                continue
            said = dict(line.split("=", 1) for line in data.decode().splitlines())
            with self.changed:
                self.log.append((time.monotonic(), said))
                if said.get("FDSTOREREMOVE") == "1":
                    for gone in [s for s in self.store if s.name == said["FDNAME"]]:
                        os.close(gone.fd)
                        self.store.remove(gone)
                for fd in fds:
                    new = Stored(said.get("FDNAME", "stored"), fd)
                    if said.get("FDSTORE") == "1" and new.file not in {s.file for s in self.store}:
                        self.store.append(new)
                    else:
                        os.close(fd)  # not asked for, or held already: service_add_fd_store keeps the first
                self.changed.notify_all()

    def start(self, *, foreign: list[Stored] | None = None, wait: bool = True, **env: str) -> subprocess.Popen[bytes]:
        """Start the daemon, with everything in the store (and `foreign`) from descriptor 3 on."""
        handed = [*self.store, *(foreign or [])]
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("LISTEN_", "WATCHDOG_", "CKPTD_", "NOTIFY_"))}
        clean |= {"NOTIFY_SOCKET": str(self.directory / "notify"), "RUNTIME_DIRECTORY": str(self.directory / "run"), "PYTHONPATH": str(ROOT)}
        if handed:
            clean |= {"LISTEN_FDS": str(len(handed)), "LISTEN_FDNAMES": ":".join(s.name for s in handed)}
        if self.watchdog_s:
            clean |= {"WATCHDOG_USEC": str(int(self.watchdog_s * 1e6))}
        high = [fcntl.fcntl(s.fd, fcntl.F_DUPFD_CLOEXEC, 200) for s in handed]
        places = [f"{place}:{fd}" for place, fd in enumerate(high, 3)]
        command = [sys.executable, "-S", "-c", HAND_OVER, *places, "--", sys.executable, "-m", "ckptd.cli.main", "daemon"]
        command += ["--dir", str(self.directory / "run")]
        mark = len(self.log)
        with (self.directory / "daemon.log").open("ab") as log:
            process = subprocess.Popen(command, env=clean | env, pass_fds=high, stdout=log, stderr=log, cwd=self.directory)
        for fd in high:
            os.close(fd)
        self.processes.append(process)
        if wait:
            assert self.wait(lambda: any("READY" in said for _, said in self.log[mark:])), self.said()
        return process

    def wait(self, done: Callable[[], bool], timeout_s: float = WAIT_S) -> bool:
        with self.changed:
            return self.changed.wait_for(done, timeout_s)

    def times(self, key: str, since: int = 0) -> list[float]:
        with self.changed:
            return [t for t, said in self.log[since:] if key in said]

    def kill_when_hung(self, process: subprocess.Popen[bytes]) -> float:
        """Wait until the daemon has missed its watchdog, and kill it as systemd does. Returns how long it was silent."""
        while (silent_s := time.monotonic() - max(self.times("WATCHDOG"))) < self.watchdog_s:
            time.sleep(0.02)
        process.send_signal(signal.SIGABRT)
        time.sleep(0.1)
        process.kill()  # a stopped process does not see the first
        process.wait(WAIT_S)
        return silent_s

    def said(self) -> str:
        return (self.directory / "daemon.log").read_text()

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait(WAIT_S)
        self.closing = True
        self.thread.join(WAIT_S)
        self.socket.close()
        for stored in self.store:
            os.close(stored.fd)


@pytest.fixture
def directory() -> Iterator[Path]:
    """Short, for a socket's path has 108 bytes."""
    with tempfile.TemporaryDirectory(prefix="ckptd-") as made:
        yield Path(made)


@pytest.fixture
def manager(directory: Path) -> Iterator[Manager]:
    made = Manager(directory)
    yield made
    made.close()


TRAINER = """
import hashlib, json, random, sys
import torch
import ckptd, ckptd.session

directory, total, width = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])

def say(**facts):
    print(json.dumps(facts), flush=True)

torch.manual_seed(7)
torch.use_deterministic_algorithms(True)
torch.set_num_threads(1)
model = torch.nn.Sequential(torch.nn.Linear(64, width), torch.nn.Dropout(0.1), torch.nn.ReLU(), torch.nn.Linear(width, 64))
model.register_buffer("seen", torch.zeros((), dtype=torch.int64))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total)

def digest():
    h = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        h.update(name.encode() + tensor.numpy().tobytes())
    for state in optimizer.state.values():
        for name in sorted(state):
            h.update(name.encode() + torch.as_tensor(state[name]).numpy().tobytes())
    h.update(repr(scheduler.state_dict()).encode() + torch.get_rng_state().numpy().tobytes())
    return h.hexdigest()

say(imported=True)
sys.stdin.readline()
session = None
start = 0
if directory != "-":
    session = ckptd.attach(model=model, optimizer=optimizer, extras={"scheduler": scheduler}, job="unit", directory=directory,
                           start_daemon=False, required=True)
    restored = session.restore()
    start = restored.step
    say(restored=start, source=restored.source, digest=digest(), seconds=restored.seconds, bytes=restored.bytes)
for step in range(start + 1, total + 1):
    optimizer.zero_grad()
    model(torch.randn(16, 64)).square().mean().backward()
    optimizer.step()
    scheduler.step()
    model.seen += 16
    if session is None:
        continue
    now = digest()
    session.step(step)
    if not session.wait("committed", step, timeout_s=60):
        sys.exit(f"step {step} was not committed")
    say(committed=step, digest=now)
    if len(sys.argv) > 4 and step == int(sys.argv[4]):
        sys.stdin.readline()  # hold still: there is more to come, and nobody will let us
say(final=digest())
if session is not None:
    session.close()
"""


class Trainer:
    """A real training process. It imports torch at once and waits; `go` waits for that and lets it attach."""

    def __init__(self, directory: Path | None, total: int, *, width: int = 4096, hold_at: int | None = None) -> None:
        self.imported = False
        arguments = ["-" if directory is None else str(directory / "run"), str(total), str(width), *([str(hold_at)] if hold_at else [])]
        env = {k: v for k, v in os.environ.items() if not k.startswith("CKPTD_")} | {"PYTHONPATH": str(ROOT)}
        self.process = subprocess.Popen(
            [sys.executable, "-c", TRAINER, *arguments], env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def go(self) -> None:
        if not self.imported:
            self.hear("imported")
        self.process.stdin.write("go\n")
        self.process.stdin.flush()

    def hear(self, key: str) -> dict[str, Any]:
        """Its next line, which is to have this key."""
        line = self.process.stdout.readline()
        assert line, f"the trainer ended with {self.process.wait(WAIT_S)}, and never said {key!r}"
        facts = json.loads(line)
        assert key in facts, facts
        self.imported = True
        return facts

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(WAIT_S)
        self.process.stdin.close()
        self.process.stdout.close()


@contextlib.contextmanager
def trainer(*arguments: Any, **options: Any) -> Iterator[Trainer]:
    made = Trainer(*arguments, **options)
    try:
        yield made
    finally:
        made.kill()


def holders_of(stored: Stored) -> set[int]:
    """Processes that have this memory open or mapped."""
    found = set()
    for proc in Path("/proc").iterdir():
        if not proc.name.isdigit():
            continue
        with contextlib.suppress(OSError):
            for entry in (proc / "fd").iterdir():
                with contextlib.suppress(OSError):  # closed since it was listed
                    info = entry.stat()
                    if (info.st_dev, info.st_ino) == stored.file:
                        found.add(int(proc.name))
            if any(f" {stored.file[1]} " in line and "memfd:" in line for line in (proc / "maps").read_text().splitlines()):
                found.add(int(proc.name))
    return found


@pytest.mark.parametrize("how", ["killed", "hung"])
def test_snapshots_outlive_trainer_and_daemon(manager: Manager, directory: Path, how: str) -> None:
    """Nobody but the manager holds the memory; the next daemon and the next trainer go on bit-equal."""
    total, hold = 9, 5
    manager.watchdog_s = 1.0 if how == "hung" else 0.0
    daemon = manager.start()
    with trainer(None, total) as uninterrupted, trainer(directory, total, hold_at=hold) as first:
        uninterrupted.go()
        expected = uninterrupted.hear("final")["final"]
        first.go()
        assert first.hear("restored")["source"] == "fresh"
        committed = [first.hear("committed") for _ in range(hold)][-1]
        assert manager.wait(lambda: len(manager.store) == 1)
        (stored,) = manager.store
        assert re.fullmatch(r"ckptd-[0-9a-f]{16}", stored.name), "FDNAME takes no colon and no control character"
        assert holders_of(stored) == {os.getpid(), daemon.pid, first.process.pid}
        image_bytes = os.fstat(stored.fd).st_size
        first.kill()
        if how == "hung":
            daemon.send_signal(signal.SIGSTOP)
            silent_s = manager.kill_when_hung(daemon)
            print(f"\nhung: silent for {silent_s:.2f} s of {manager.watchdog_s:.0f} s allowed, killed")
        else:
            daemon.kill()
            daemon.wait(WAIT_S)
    assert holders_of(stored) == {os.getpid()}

    with trainer(directory, total) as second:
        second.hear("imported")
        began_s = time.monotonic()
        successor = manager.start()
        ready_s = time.monotonic() - began_s
        second.go()
        restored = second.hear("restored")
        restored_s = time.monotonic() - began_s
        assert (restored["restored"], restored["source"]) == (committed["committed"], "memory")
        assert restored["digest"] == committed["digest"]
        for step in range(hold + 1, total + 1):
            assert second.hear("committed")["committed"] == step
        assert second.hear("final")["final"] == expected
        assert second.process.wait(WAIT_S) == 0
    assert len(manager.store) == 1, "the same memory is stored once, whichever daemon sends it"
    assert holders_of(stored) == {os.getpid(), successor.pid}
    print(
        f"\n{how}: arena {image_bytes / 1e6:.1f} MB, state {restored['bytes'] / 1e6:.1f} MB; daemon started -> READY {ready_s:.2f} s, "
        f"-> trainer restored {restored_s:.2f} s (restore() itself {restored['seconds']:.3f} s; torch was imported before)"
    )


@pytest.mark.parametrize("watchdog_s", [1.0, 0.4])
def test_watchdog_is_fed_in_time(manager: Manager, watchdog_s: float) -> None:
    """sd_watchdog_enabled(3) asks for a ping in every half of the interval; none may be later than the whole."""
    manager.watchdog_s = watchdog_s
    manager.start()
    began_s = time.monotonic()
    wanted = 8
    assert manager.wait(lambda: sum("WATCHDOG" in said for _, said in manager.log) > wanted, 30.0)
    times = manager.times("WATCHDOG")
    gaps = sorted(b - a for a, b in zip(times, times[1:], strict=False))
    print(f"\nwatchdog {watchdog_s} s: {len(times)} pings in {times[-1] - began_s:.2f} s, median gap {gaps[len(gaps) // 2]:.3f}, longest {gaps[-1]:.3f} s")
    assert gaps[len(gaps) // 2] <= 0.6 * watchdog_s
    assert gaps[-1] < watchdog_s


@pytest.mark.parametrize("env", [{}, {"WATCHDOG_USEC": "400000", "WATCHDOG_PID": "1"}], ids=["unasked", "another process asked"])
def test_no_watchdog_no_pings(manager: Manager, env: dict[str, str]) -> None:
    manager.start(**env)
    time.sleep(1.2)
    assert manager.times("WATCHDOG") == []


def asking(directory: Path, job: str) -> Link:
    link = Link(directory / "run" / "daemon.sock", lambda i: wire.Hello(id=i, job=job, role="cli"), lambda _: None)
    link.open(WAIT_S)
    return link


def status_of(link: Link) -> dict[str, Any]:
    report, _ = link.ask(lambda i: wire.Status(id=i), wire.Report, WAIT_S)
    return report.status


def arena_of(job: str, rank: int, slot_bytes: int = 1 << 20) -> Stored:
    """Sealed memory with a descriptor, as a daemon would have left it; nothing is in its slots."""
    made = Arena.create(job=job, rank=rank, slot_count=2, slot_bytes=slot_bytes)
    stored = Stored(f"ckptd-{made.name}", os.dup(made.fd))
    made.close()
    return stored


def test_forgotten_memory_leaves_the_store(manager: Manager, directory: Path) -> None:
    """Forget, or the manager would hold a finished job's memory for as long as the unit lives."""
    manager.store += [arena_of("old", 0), arena_of("old", 1), arena_of("other", 0)]
    kept = manager.store[2]
    daemon = manager.start()
    link = asking(directory, "old")
    before = status_of(link)["memory_bytes"]
    link.ask(lambda i: wire.Forget(id=i, job="old"), wire.Done, WAIT_S)
    assert manager.wait(lambda: len(manager.times("FDSTOREREMOVE")) == 2)
    assert manager.store == [kept]
    after = status_of(link)["memory_bytes"]
    assert after == os.fstat(kept.fd).st_size
    assert before == 3 * after
    assert holders_of(kept) == {os.getpid(), daemon.pid}
    link.close()


def memory(name: str, *, size: int = 1 << 20, seals: int = 0, data: bytes = b"") -> int:
    fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, size)
    os.pwrite(fd, data, 0)
    if seals:
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    return fd


def test_foreign_descriptors_are_ignored_and_closed(manager: Manager, directory: Path) -> None:
    """What a unit's drop-in, a socket unit or an older version may have left in the store is no reason to fail."""
    good = arena_of("job", 0)
    lying = arena_of("job", 1)
    head = os.pread(lying.fd, 4096, 0)
    os.close(lying.fd)
    (directory / "plain").write_bytes(head.ljust(1 << 20, b"\0"))
    deleted = os.open(directory / "gone", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    os.truncate(deleted, 1 << 20)
    (directory / "gone").unlink()
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listening.bind(str(directory / "other.sock"))
    listening.listen()
    pipe, pipe_in = os.pipe()
    sealed = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
    foreign = [
        Stored("a-socket", os.dup(listening.fileno())),
        Stored("a-plain-file", os.open(directory / "plain", os.O_RDWR | os.O_CLOEXEC)),
        Stored("a-deleted-file", deleted),
        Stored("a-directory", os.open(directory, os.O_RDONLY | os.O_CLOEXEC)),
        Stored("a-pipe", pipe),
        Stored("unsealed", memory("unsealed", data=head)),
        Stored("half-sealed", memory("half", data=head, seals=fcntl.F_SEAL_GROW)),
        Stored("of another size", memory("size", data=head, seals=sealed)),
        Stored("garbage", memory("garbage", data=os.urandom(8192), seals=sealed)),
        Stored("too short", memory("short", size=100, seals=sealed)),
        Stored("empty", memory("empty", size=0, seals=sealed)),
        good,
    ]
    daemon = manager.start(foreign=foreign)
    theirs = {}
    for entry in Path(f"/proc/{daemon.pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            info = entry.stat()
            theirs[info.st_dev, info.st_ino] = entry.name
    kept = [s.name for s in foreign if s.file in theirs]
    assert kept == [good.name], manager.said()
    link = asking(directory, "job")
    status = status_of(link)
    assert status["memory_bytes"] == os.fstat(good.fd).st_size
    assert manager.wait(lambda: [s.name for s in manager.store] == [good.name]), "what it adopts it stores again"
    print(f"\n{len(foreign) - 1} of {len(foreign)} descriptors refused, daemon up; it counts {status['errors']} errors")
    link.close()
    listening.close()
    os.close(pipe_in)
    for stored in foreign:
        os.close(stored.fd)


def test_descriptors_for_another_process_are_left_alone(manager: Manager, directory: Path) -> None:
    """LISTEN_PID is not ours where something stands between the manager and the daemon: the descriptors are that one's."""
    manager.store.append(arena_of("job", 0))
    manager.start(LISTEN_PID="1")
    link = asking(directory, "job")
    assert status_of(link)["memory_bytes"] == 0
    link.close()


def test_going_is_said_and_keeps_the_memory(manager: Manager) -> None:
    """`systemctl restart`: READY once, STOPPING at the end, status 0, and nothing is taken out of the store."""
    manager.store.append(arena_of("job", 0))
    daemon = manager.start()
    began_s = time.monotonic()
    daemon.terminate()
    assert daemon.wait(WAIT_S) == 0
    print(f"\nSIGTERM -> gone in {time.monotonic() - began_s:.2f} s")
    assert manager.wait(lambda: bool(manager.times("STOPPING")))
    assert len(manager.times("READY")) == 1
    assert len(manager.store) == 1
    assert manager.times("FDSTOREREMOVE") == []


def test_daemon_stands_the_units_memory_rule(manager: Manager, directory: Path) -> None:
    """MemoryDenyWriteExecute=: that the daemon of the tests above ran under it, where the kernel can (Linux 6.3)."""
    if ctypes.CDLL(None).prctl(66, 0, 0, 0, 0) < 0:  # PR_GET_MDWE
        pytest.skip("this kernel has no PR_SET_MDWE: Linux 6.3 or newer has")
    daemon = manager.start()
    status = Path(f"/proc/{daemon.pid}/status").read_text()
    assert re.search(r"NoNewPrivs:\s+1", status)
    maps = Path(f"/proc/{daemon.pid}/maps").read_text()
    assert not re.search(r"^\S+ \S?wx", maps, re.MULTILINE), "memory that is writable and executable"
    link = asking(directory, "job")
    assert status_of(link)["pid"] == daemon.pid
    link.close()
