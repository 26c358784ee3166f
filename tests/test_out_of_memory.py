import resource
import sys
from types import SimpleNamespace

import pytest
import torch

from sft_lightning.out_of_memory import peak_memory_bytes


@pytest.mark.parametrize(("platform", "expected"), [("linux", 5000 * 1024), ("darwin", 5000)])
def test_memory_is_in_bytes_on_every_system(monkeypatch, platform, expected):
    monkeypatch.setattr(resource, "getrusage", lambda who: SimpleNamespace(ru_maxrss=5000))
    monkeypatch.setattr(sys, "platform", platform)
    assert peak_memory_bytes(torch.device("cpu")) == expected


@pytest.mark.gpu
def test_peak_memory_on_a_gpu_is_that_of_its_tensors():
    device = torch.device("cuda")
    tensor = torch.empty(1 << 28, dtype=torch.uint8, device=device)
    del tensor
    assert peak_memory_bytes(device) >= 1 << 28
