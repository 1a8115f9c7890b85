"""NVML for real: what the driver of this machine says through nvidia-ml-py (`pip install 'ckptd[gpu]'`). Run: pytest -m gpu."""

from __future__ import annotations

import time

import pytest

from ckptd.monitor import health, nvml

GPUS = nvml.Gpus(nvml.module())
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not len(GPUS), reason="needs an NVIDIA GPU, and nvidia-ml-py")]


def test_the_driver_answers():
    values, alarms = GPUS.sample()
    print({k: v for k, v in values.items() if k.startswith("gpu0")}, alarms)
    for i in range(len(GPUS)):
        assert 0 < values[f"gpu{i}_temperature_c"] < 110 and 0 < values[f"gpu{i}_power_w"] < 2000
        assert 0 < values[f"gpu{i}_sm_clock_mhz"] <= values[f"gpu{i}_sm_clock_max_mhz"]
        assert values[f"gpu{i}_throttled"] in {0.0, 1.0}
    assert "gpu-lost" not in alarms and "ecc" not in alarms, "counters of before we came are no alarm"
    assert GPUS.index_of(GPUS._gpus[0].bus) == 0


def test_a_sampler_with_gpus():
    sampler = health.Sampler()
    took = []
    for _ in range(5):
        began = time.monotonic()
        sampler.sample_gpus(began)
        took.append(time.monotonic() - began)
    found = sampler.sample(time.monotonic())
    print(f"NVML takes {sorted(took)[2] * 1e3:.1f} ms for {len(GPUS)} GPUs, the first time {took[0] * 1e3:.0f} ms")
    assert found.values["gpu0_temperature_c"] > 0
    sampler.close()
