"""A node's health: the kernel's texts parsed, the real /proc and /dev/kmsg of this machine, and NVML as a module that answers like it (tests/gpu asks the real one)."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from ckptd.monitor import health, kernel_log, nvml
from ckptd.monitor.report import TEXT_MAX

# --- text in, numbers out ---------------------------------------------------------------------------------------------------


def test_pressure():
    text = "some avg10=0.22 avg60=0.17 avg300=1.11 total=58761459\nfull avg10=0.00 avg60=0.13 avg300=0.96 total=12345\n"
    assert health.parse_pressure(text) == {"some": 58.761459, "full": 0.012345}
    for text in ("", "some", "some total=", "full total=x\nnone total=3", "\0\0"):
        assert health.parse_pressure(text) == {}


@pytest.mark.parametrize(
    ("text", "stood_s"),
    [
        ("usage_usec 5\nnr_periods 7\nnr_throttled 3\nthrottled_usec 1500000\n", 1.5),
        ("nr_periods 0\nnr_throttled 0\nthrottled_time 2500000000\nnr_bursts 0\n", 2.5),
        ("usage_usec 5\nuser_usec 5\n", None),
        ("", None),
        ("throttled_usec -1", None),
    ],
)
def test_throttling_of_both_versions(text, stood_s):
    assert health.parse_cpu_stat(text) == stood_s


def test_where_a_cgroups_quota_may_lie():
    root = Path("/c")
    two = health.cgroup_paths("0::/system.slice/job.scope\n", root)
    assert two[:3] == [root / "system.slice/job.scope/cpu.stat", root / "system.slice/cpu.stat", root / "cpu.stat"]
    one = health.cgroup_paths("4:memory:/x\n3:cpu,cpuacct:/docker/abc\n", root)
    assert one[:3] == [root / "cpu,cpuacct/docker/abc/cpu.stat", root / "cpu,cpuacct/docker/cpu.stat", root / "cpu,cpuacct/cpu.stat"]
    assert all(".." not in p.parts for p in health.cgroup_paths("0::/../../etc\n", root))
    assert health.cgroup_paths("nonsense", root) == [] and health.cgroup_paths("", root) == []


LINES = [
    ("NVRM: Xid (PCI:0000:3b:00): 79, pid='<unknown>', name=<unknown>, GPU has fallen off the bus.", "xid", "0000:3b:00", 0, 79),
    ("NVRM: Xid (PCI:0000:c1:00): 31, pid=4242, name=python, Ch 00000008, intr 10000000. MMU Fault", "xid", "0000:c1:00", 4242, 31),
    ("nvidia-nvswitch3: SXid (PCI:0000:c5:00.0): 20034, Fatal, Link 30 LTSSM Fault Up", "sxid", "3", 0, 20034),
    ("Out of memory: Killed process 4711 (python) total-vm:123kB, anon-rss:99kB", "oom-kill", "", 4711, 0),
    ("Memory cgroup out of memory: Killed process 815 (python3) total-vm:1kB", "oom-kill", "", 815, 0),
    ("mce: [Hardware Error]: CPU 3: Machine Check: 0 Bank 5: be00000000800400", "mce", "", 0, 0),
    ("EDAC MC0: 1 UE memory read error on CPU_SrcID#0_Ha#0_Chan#1_DIMM#0", "edac", "MC0", 0, 0),
    ("INFO: task python:31337 blocked for more than 120 seconds.", "hung-task", "", 31337, 0),
    ("watchdog: BUG: soft lockup - CPU#7 stuck for 22s! [python:99]", "soft-lockup", "", 99, 0),
    ("blk_update_request: I/O error, dev sda, sector 123456 op 0x0:(READ)", "io-error", "sda", 0, 0),
    ("Buffer I/O error on dev nvme0n1p1, logical block 7, async page read", "io-error", "nvme0n1p1", 0, 0),
    ("EXT4-fs error (device vda): ext4_lookup:1855: inode #2: comm ls: deleted inode", "io-error", "vda", 0, 0),
    ("nfs: server filer7 not responding, still trying", "nfs", "filer7", 0, 0),
    ("mlx5_core 0000:5e:00.0 ens5f0np0: Link down", "nic-down", "ens5f0np0", 0, 0),
    ("e1000e: eth0 NIC Link is Down", "nic-down", "eth0", 0, 0),
    ("igb 0000:01:00.0 eth1: igb: eth1 NIC Link is Up 1000 Mbps Full Duplex", "nic-up", "eth1", 0, 0),
    ("CPU3: Package temperature is above threshold, cpu clock is throttled", "cpu-thermal", "CPU3", 0, 0),
    ("python[555]: segfault at 0 ip 00007f sp 00007f error 4 in libtorch_cpu.so", "segfault", "", 555, 0),
    ("traps: python[13804] general protection fault ip:7f2e sp:7f2e error:0 in libc.so.6", "segfault", "", 13804, 0),
]


@pytest.mark.parametrize(("line", "kind", "device", "pid", "code"), LINES, ids=[f"{line[1]}-{n}" for n, line in enumerate(LINES)])
def test_what_the_kernel_says(line, kind, device, pid, code):
    assert kernel_log.classify(line) == kernel_log.Event(kind, line[: kernel_log.WORDS_MAX], device, pid, code)


@pytest.mark.parametrize(
    "line",
    [
        "", "Linux version 6.18", "eth0: renamed from veth1234", "EXT4-fs (vda): mounted filesystem with ordered data mode", "IPv6: ADDRCONF(NETDEV_CHANGE): eth0: link becomes ready",
        "audit: type=1400 apparmor=DENIED", "usb 1-1: new high-speed USB device", "\xff\0nonsense",
    ],
)  # fmt: skip
def test_what_says_nothing(line):
    assert kernel_log.classify(line) is None


def test_records_of_the_log():
    assert kernel_log.parse(b"6,336,1513363,-;EXT4-fs (vda): mounted\n SUBSYSTEM=block\n DEVICE=b254:0\n") == (6, "EXT4-fs (vda): mounted")
    assert kernel_log.parse(b"11,1,2,-;a;b") == (3, "a;b")
    assert kernel_log.parse(b"garbage") == (7, "garbage") and kernel_log.parse(b"") == (7, "")


# --- the real machine -------------------------------------------------------------------------------------------------------


def test_this_node(tmp_path):
    sampler = health.Sampler(3, paths=[str(tmp_path), str(tmp_path / "none")])
    first = sampler.sample(time.monotonic())
    burn_until = time.process_time() + 0.3
    while time.process_time() < burn_until:
        pass
    second = sampler.sample(time.monotonic())
    sampler.close()
    assert first.node == 3 and "cpu_busy_ratio" not in first.values, "no rate without a second look"
    assert 0.0 < second.values["cpu_busy_ratio"] <= 1.0 and 0.0 <= second.values["cpu_steal_ratio"] <= 1.0
    assert second.values["memory_available_bytes"] == pytest.approx(psutil.virtual_memory().available, rel=0.5)
    assert second.values["disk_free_bytes_0"] > 0 and "disk_free_bytes_1" not in second.values
    if Path("/proc/pressure/memory").exists():
        assert 0.0 <= second.values["psi_memory_full_ratio"] <= 1.0
    assert all(isinstance(v, float | int) and len(k) <= TEXT_MAX for k, v in second.values.items())
    assert len(second.values) < 200


def test_a_sample_is_quick_and_leaves_nothing_open():
    sampler = health.Sampler(paths=["/"])
    sampler.sample(time.monotonic())
    before, took = len(os.listdir("/proc/self/fd")), []
    for _ in range(10):
        began = time.thread_time()
        sampler.sample(time.monotonic())
        took.append(time.thread_time() - began)
    assert len(os.listdir("/proc/self/fd")) == before
    print(f"a sample takes {sorted(took)[5] * 1e3:.1f} ms of a processor")
    assert sorted(took)[5] < 0.05
    sampler.close()


@pytest.mark.skipif(os.geteuid() != 0 or not os.access("/dev/kmsg", os.W_OK), reason="only root writes to the kernel's log")
def test_the_kernels_log_is_read_from_now_on():
    with open("/dev/kmsg", "w") as f:
        f.write("NVRM: Xid (PCI:0000:00:00): 79, pid=1, said before\n")
    sampler = health.Sampler()
    if not sampler._log.readable:
        pytest.skip("this kernel's log cannot be read here")
    pid = 4190000 + os.getpid() % 1000
    with open("/dev/kmsg", "w") as f:
        f.write(f"Memory cgroup out of memory: Killed process {pid} (ckptd-test) total-vm:1kB\n")
    until = time.monotonic() + 5
    found = sampler.sample(0.0)
    while "oom-kill" not in found.alarms and time.monotonic() < until:
        time.sleep(0.05)
        found = sampler.sample(1.0)
    assert str(pid) in found.alarms["oom-kill"] and "xid" not in found.alarms, "what was said before we came is old"
    assert str(pid) in sampler.said_of(pid) and sampler.said_of(1) == ""
    assert "oom-kill" in sampler.sample(health.HOLD_S - 1.0).alarms and "oom-kill" not in sampler.sample(3 * health.HOLD_S).alarms
    sampler.close()


def test_a_log_that_cannot_be_read_is_silent(tmp_path):
    for path in (tmp_path / "none", tmp_path):
        log = kernel_log.KernelLog(str(path))
        assert log.read() == []
        log.close()
        log.close()


def test_a_pipe_in_place_of_the_log_never_waits(tmp_path):
    os.mkfifo(tmp_path / "kmsg")
    fd = os.open(tmp_path / "kmsg", os.O_RDWR | os.O_NONBLOCK)
    log = kernel_log.KernelLog(str(tmp_path / "kmsg"))
    assert log.read() == []
    os.write(fd, b"4,1,1,-;INFO: task python:12 blocked for more than 120 seconds.\n")
    assert [e.kind for e in log.read()] == ["hung-task"]
    os.close(fd)
    log.close()


# --- changes ----------------------------------------------------------------------------------------------------------------


def test_counters_that_went_back_begin_anew():
    counters = health.Counters()
    assert [counters.grew("x", v) for v in (5, 7, 7, 2, 4)] == [None, 2, 0, None, 2]


def test_alarms_stay_for_a_while_in_their_first_words():
    alarms = health.Alarms()
    alarms.raise_("steal", "6 %", 0.0)
    alarms.raise_("steal", "7 %", 50.0)
    assert alarms.now(100.0) == {"steal": "6 %"} and alarms.now(111.0) == {}
    for gpu in (3, 4, 3):
        alarms.raise_("xid", f"79 on GPU {gpu}", 200.0, event=True)
    assert alarms.now(200.0) == {"xid": "79 on GPU 3; 79 on GPU 4"}
    for n in range(1000):
        alarms.raise_(f"kind {n}", "w" * 1000, 200.0)
    assert len(alarms.now(200.0)) <= health.ALARMS_MAX and all(len(w) <= TEXT_MAX for w in alarms.now(200.0).values())


@pytest.fixture
def host(monkeypatch):
    """What psutil says, to be changed."""
    said = SimpleNamespace(
        times=SimpleNamespace(user=100.0, idle=100.0, steal=0.0), swap=SimpleNamespace(used=0, sin=0, sout=0),
        memory=SimpleNamespace(available=50, total=100), nic=SimpleNamespace(errin=0, errout=0, dropin=0, dropout=0), link=SimpleNamespace(isup=True, speed=100_000),
    )  # fmt: skip
    monkeypatch.setattr(psutil, "cpu_times", lambda: said.times)
    monkeypatch.setattr(psutil, "swap_memory", lambda: said.swap)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: said.memory)
    monkeypatch.setattr(psutil, "net_io_counters", lambda pernic: {"eth0": said.nic, "lo": SimpleNamespace(errin=9, errout=9, dropin=9, dropout=9)})
    monkeypatch.setattr(psutil, "net_if_stats", lambda: {} if said.link is None else {"eth0": said.link})
    return said


def test_each_change_is_an_alarm_in_words(host):
    sampler = health.Sampler(kmsg="/nowhere")
    assert sampler.sample(0.0).alarms == {} and sampler.sample(1.0).alarms == {}
    host.times = SimpleNamespace(user=101.0, idle=100.0, steal=0.5)
    host.swap = SimpleNamespace(used=1 << 30, sin=20 << 20, sout=0)
    host.memory = SimpleNamespace(available=1, total=100)
    host.nic = SimpleNamespace(errin=3, errout=0, dropin=500, dropout=0)
    host.link = SimpleNamespace(isup=True, speed=10_000)
    alarms = sampler.sample(2.0).alarms
    assert {*alarms} == {"steal", "swap", "memory", "nic-errors", "nic-drops", "nic-slow"}
    assert alarms["steal"].endswith("33% of the processors' time") and "3 damaged packets at eth0" in alarms["nic-errors"]
    assert "10000 Mbit/s, and ran at 100000" in alarms["nic-slow"]
    host.link = SimpleNamespace(isup=False, speed=0)
    assert sampler.sample(3.0).alarms["nic-down"] == "eth0 is down"
    host.link = None
    sampler.sample(200.0)
    assert "eth0 is gone" in sampler.sample(200.5).alarms["nic-down"]


def test_a_part_that_fails_takes_no_other_with_it(host, monkeypatch):
    def fails():
        raise RuntimeError("no such thing here")

    monkeypatch.setattr(psutil, "swap_memory", fails)
    monkeypatch.setattr(psutil, "cpu_times", fails)
    found = health.Sampler(kmsg="/nowhere").sample(0.0)
    assert "nic_eth0_up" in found.values and "load_per_core" not in found.values


# --- NVML, by a module that answers like it -----------------------------------------------------------------------------------


class Error(Exception):
    pass


class NVMLError_GpuIsLost(Error):
    pass


class NVMLError_NotSupported(Error):
    pass


class Fake:
    """Two GPUs of the newer interface, as nvidia-ml-py's functions and constants are called."""

    NVML_TEMPERATURE_GPU, NVML_CLOCK_SM, NVML_VOLATILE_ECC = 0, 1, 0
    NVML_MEMORY_ERROR_TYPE_CORRECTED, NVML_MEMORY_ERROR_TYPE_UNCORRECTED = 0, 1
    NVML_NVLINK_ERROR_DL_REPLAY, NVML_NVLINK_ERROR_DL_RECOVERY, NVML_NVLINK_ERROR_DL_CRC_FLIT = 0, 1, 2
    NVML_PAGE_RETIREMENT_CAUSE_DOUBLE_BIT_ECC_ERROR, nvmlEventTypeXidCriticalError = 1, 8

    def __init__(self):
        self.reasons, self.ecc, self.replays, self.links, self.rows, self.xids, self.lost = [0, 0], [0, 0], [0, 0], {}, [(0, 0, 0, 0)] * 2, [], set()

    def nvmlInit(self):
        return None

    def nvmlDeviceGetCount(self):
        return 2

    def nvmlDeviceGetHandleByIndex(self, index):
        return index

    def _alive(self, h):
        if h in self.lost:
            raise NVMLError_GpuIsLost

    def nvmlDeviceGetPciInfo(self, h):
        return SimpleNamespace(busId=f"00000000:{0x3A + h:02X}:00.0".encode())

    def nvmlDeviceGetTemperature(self, h, which):
        self._alive(h)
        return 60 + h

    def nvmlDeviceGetPowerUsage(self, h):
        return 350_000

    def nvmlDeviceGetClockInfo(self, h, which):
        return 1980

    def nvmlDeviceGetMaxClockInfo(self, h, which):
        return 1980

    def nvmlDeviceGetCurrentClocksEventReasons(self, h):
        return self.reasons[h]

    def nvmlDeviceGetTotalEccErrors(self, h, kind, which):
        return self.ecc[h] if kind == self.NVML_MEMORY_ERROR_TYPE_UNCORRECTED else 0

    def nvmlDeviceGetPcieReplayCounter(self, h):
        return self.replays[h]

    def nvmlDeviceGetNvLinkState(self, h, link):
        if link >= 2:
            raise NVMLError_NotSupported
        return 1

    def nvmlDeviceGetNvLinkErrorCounter(self, h, link, counter):
        return self.links.get((h, link, counter), 0)

    def nvmlDeviceGetRemappedRows(self, h):
        return self.rows[h]

    def nvmlDeviceGetRetiredPages(self, h, cause):
        raise NVMLError_NotSupported

    def nvmlEventSetCreate(self):
        return "set"

    def nvmlDeviceRegisterEvents(self, h, types, events):
        assert (types, events) == (8, "set")

    def nvmlEventSetWait_v2(self, events, timeout_ms):
        assert timeout_ms == 0
        if not self.xids:
            raise Error("timeout")
        h, xid = self.xids.pop(0)
        return SimpleNamespace(device=h, eventData=xid)


def test_gpus_tell_numbers_and_what_changed():
    fake = Fake()
    fake.ecc[0], fake.replays[1] = 7, 1_000_000  # of last year
    gpus = nvml.Gpus(fake)
    assert len(gpus) == 2
    values, alarms = gpus.sample()
    assert alarms == {} and values["gpu1_temperature_c"] == 61.0 and values["gpu0_power_w"] == 350.0 and values["gpu0_ecc_uncorrected"] == 7.0
    fake.ecc[0], fake.replays[1], fake.reasons[1], fake.rows[0] = 8, 1_000_050, 0x08 | 0x04, (0, 1, 0, 0)
    fake.links[1, 1, fake.NVML_NVLINK_ERROR_DL_RECOVERY] = 1
    fake.xids = [(1, 79), (0, 31)]
    values, alarms = gpus.sample()
    assert alarms == {
        "ecc": "GPU 0: 1 uncorrectable memory errors", "row-remapped": "GPU 0: 1 memory rows were remapped", "gpu-throttled": "GPU 1: hardware slowdown",
        "pcie": "GPU 1: 50 PCIe replays", "nvlink": "GPU 1: 1 NVLink recoveries", "xid": "79 on GPU 1", "xid-program": "31 on GPU 0",
    }  # fmt: skip
    assert values["gpu1_throttled"] == 1.0 and values["gpu1_power_capped"] == 1.0 and values["gpu0_throttled"] == 0.0
    fake.reasons[1] = 0x04
    assert gpus.sample()[1] == {}, "a power cap is no fault"
    fake.lost = {1}
    values, alarms = gpus.sample()
    assert "GPU 1" in alarms["gpu-lost"] and "gpu1_temperature_c" not in values and "gpu0_temperature_c" in values


@pytest.mark.parametrize("bus", ["0000:3b:00", "00000000:3B:00.0", "0000:3b:00.0"])
def test_a_pci_address_of_the_kernel_is_a_gpu_of_ours(bus):
    gpus = nvml.Gpus(Fake())
    assert gpus.index_of(bus) == 1 and gpus.index_of("0000:99:00") == -1


def test_no_driver_no_module_no_device():
    class NoDriver:
        def nvmlInit(self):
            raise Error("driver not loaded")

    for module in (None, NoDriver(), SimpleNamespace()):
        gpus = nvml.Gpus(module)
        assert len(gpus) == 0 and gpus.sample() == ({}, {})


def test_the_kernels_xid_is_told_with_the_gpus_number(tmp_path, host):
    os.mkfifo(tmp_path / "kmsg")
    fd = os.open(tmp_path / "kmsg", os.O_RDWR | os.O_NONBLOCK)
    sampler = health.Sampler(module=Fake(), kmsg=str(tmp_path / "kmsg"))
    sampler.sample_gpus(0.0)
    assert sampler.sample(0.0).values["gpu1_temperature_c"] == 61.0
    os.write(fd, b"4,1,1,-;NVRM: Xid (PCI:0000:3b:00): 48, pid=7, DBE\n")
    assert sampler.sample(1.0).alarms == {"xid": "48 on GPU 1"}
    os.close(fd)
    sampler.close()


def test_a_driver_that_hangs_holds_up_nobody_and_is_an_alarm(host):
    asleep, wake = threading.Event(), threading.Event()

    class Hangs(Fake):
        def nvmlDeviceGetTemperature(self, h, which):
            asleep.set()
            wake.wait(30)
            return 60

    sampler = health.Sampler(module=Hangs(), kmsg="/nowhere")
    thread = threading.Thread(target=sampler.sample_gpus, args=(0.0,))
    thread.start()
    assert asleep.wait(30)
    sampler.sample_gpus(1.0)  # comes back at once
    assert "gpu-driver" not in sampler.sample(2.0).alarms
    assert "has not answered for 15 s" in sampler.sample(15.0).alarms["gpu-driver"]
    wake.set()
    thread.join()
    assert "gpu0_temperature_c" in sampler.sample(16.0).values
