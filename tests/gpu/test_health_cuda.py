"""NVML on a real device. Run: pytest -m gpu."""

from __future__ import annotations

import time

import pytest
import torch

from ckptd.monitor import nvml
from ckptd.monitor.health import Sampler

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(nvml.module() is None, reason="needs pynvml (nvidia-ml-py)"),
]


def test_a_real_device_is_seen_and_raises_no_alarm_by_itself():
    sampler = Sampler(0)
    took = []
    for _ in range(3):
        began = time.perf_counter()
        sampler.sample_gpus(time.monotonic())
        took.append(time.perf_counter() - began)
        seen = sampler.sample(time.monotonic())
    sampler.close()
    of_gpu = {k: v for k, v in seen.values.items() if k.startswith("gpu0_")}
    print(f"NVML: looks took {[round(t * 1e3, 1) for t in took]} ms: {of_gpu}; alarms {seen.alarms}")
    assert 10 < of_gpu["gpu0_temperature_c"] < 110
    assert 10 < of_gpu["gpu0_power_w"] < 1500
    assert 100 <= of_gpu["gpu0_sm_clock_mhz"] <= of_gpu["gpu0_sm_clock_max_mhz"] <= 4000
    assert not [k for k in seen.alarms if k in ("gpu-lost", "xid", "ecc", "gpu-throttled")]
    assert took[-1] < 2


def test_a_device_is_found_by_its_address():
    gpus = nvml.Gpus(nvml.module())
    assert len(gpus) >= torch.cuda.device_count() >= 1
    bus = torch.cuda.get_device_properties(0)
    address = f"{bus.pci_domain_id:04x}:{bus.pci_bus_id:02x}:{bus.pci_device_id:02x}"
    assert gpus.index_of(address) >= 0
