import time
from types import SimpleNamespace

import pytest
import torch

from sft_lightning.system import peak_flops
from sft_lightning.system.peak_flops import Peak, peak_of

CPU = torch.device("cpu")


class Device:
    """Multiplies matrices at a constant rate; the first of each size takes three times as long."""

    def __init__(self, flops_per_second):
        self.rate = flops_per_second
        self.now = 0.0
        self.sizes = set()

    def mm(self, one, other):
        size = len(one)
        self.now += (1 if size in self.sizes else 3) * 2 * size**3 / self.rate
        self.sizes.add(size)


@pytest.mark.parametrize("rate", [3e9, 5e10, 1e12])
def test_the_best_rate_is_measured_within_half_a_second(monkeypatch, rate):
    device = Device(rate)
    monkeypatch.setattr(peak_flops, "time", SimpleNamespace(perf_counter=lambda: device.now))
    monkeypatch.setattr(torch, "mm", device.mm)
    monkeypatch.setattr(peak_flops, "_MAX_MATRIX_SIZE", 1024)
    measured = peak_flops._measure.__wrapped__(CPU, torch.float32)
    assert measured == pytest.approx(rate)
    assert device.now < 0.5
    assert max(device.sizes) == {3e9: 256, 5e10: 1024, 1e12: 1024}[rate]


def test_measuring_keeps_the_random_state():
    before = torch.get_rng_state()
    peak = peak_of(CPU, torch.bfloat16)
    assert torch.equal(torch.get_rng_state(), before)
    assert peak.source == "measured by multiplying bfloat16 matrices"
    assert peak.flops_per_second > 1e6


@pytest.mark.parametrize(
    ("name", "dtype", "precision", "expected"),
    [
        ("NVIDIA H200", torch.bfloat16, "highest", Peak(989.4e12, "data sheet of NVIDIA H200, 16 bit, dense")),
        ("NVIDIA H200", torch.float16, "highest", Peak(989.4e12, "data sheet of NVIDIA H200, 16 bit, dense")),
        ("NVIDIA L40S", torch.float32, "high", Peak(183e12, "data sheet of NVIDIA L40S, TF32, dense")),
        ("NVIDIA L40S", torch.float32, "highest", Peak(91.6e12, "data sheet of NVIDIA L40S, float32")),
        ("NVIDIA H200", torch.float64, "highest", Peak(7.0, "measured by multiplying float64 matrices")),
        ("NVIDIA H200 MIG 1g.18gb", torch.bfloat16, "high", Peak(7.0, "measured by multiplying bfloat16 matrices")),
        ("NVIDIA A10G", torch.bfloat16, "high", Peak(7.0, "measured by multiplying bfloat16 matrices")),
    ],
)
def test_known_gpus_have_the_peak_of_their_data_sheet(monkeypatch, name, dtype, precision, expected):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: precision)
    monkeypatch.setattr(peak_flops, "_measure", lambda device, dtype: 7.0)
    assert peak_of(torch.device("cuda"), dtype) == expected


@pytest.mark.gpu
def test_measured_peak_is_near_the_data_sheet():
    device = torch.device("cuda")
    peak = peak_of(device, torch.bfloat16)
    begun = time.perf_counter()
    measured = peak_flops._measure(device, torch.bfloat16)
    assert time.perf_counter() - begun < 5  # the first call loads kernels
    if peak.source.startswith("data sheet"):
        assert 0.4 * peak.flops_per_second < measured < 1.05 * peak.flops_per_second
