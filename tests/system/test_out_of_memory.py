import re
import resource
import sys
from types import SimpleNamespace

import pytest
import torch

from sft_lightning.errors import RunFailedError
from sft_lightning.generation.transformers_generator import TransformersGenerator
from sft_lightning.system.out_of_memory import (
    generation_advice,
    host_lacks_memory,
    is_out_of_memory,
    peak_memory_bytes,
    translate_out_of_memory,
)


@pytest.mark.parametrize(("platform", "expected"), [("linux", 5000 * 1024), ("darwin", 5000)])
def test_memory_is_in_bytes_on_every_system(monkeypatch, platform, expected):
    monkeypatch.setattr(resource, "getrusage", lambda who: SimpleNamespace(ru_maxrss=5000))
    monkeypatch.setattr(sys, "platform", platform)
    assert peak_memory_bytes(torch.device("cpu")) == expected


@pytest.mark.gpu
def test_gpu_peak_memory_counts_tensors():
    device = torch.device("cuda")
    tensor = torch.empty(1 << 28, dtype=torch.uint8, device=device)
    del tensor
    assert peak_memory_bytes(device) >= 1 << 28


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory"), True),
        (MemoryError(), True),
        (OSError(12, "Cannot allocate memory"), True),
        (OSError(28, "No space left on device"), False),
        (RuntimeError("CUBLAS_STATUS_EXECUTION_FAILED"), False),
        (RunFailedError("out of memory in the forward pass"), False),
    ],
)
def test_out_of_memory_errors_are_recognized(error, expected):
    assert is_out_of_memory(error) is expected


def test_the_hosts_own_allocator_is_understood():
    with pytest.raises((RuntimeError, MemoryError)) as raised:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert is_out_of_memory(raised.value)


def cpu():
    return torch.device("cpu")


def test_out_of_memory_is_one_line_with_its_cause():
    with pytest.raises(RunFailedError) as raised, translate_out_of_memory(lambda: "a test", lambda: "Buy more", cpu):
        torch.empty(1 << 60, dtype=torch.uint8)
    assert re.fullmatch(r"out of memory in a test; peak memory \d+\.\d\d GB\. Buy more", str(raised.value))
    assert is_out_of_memory(raised.value.__cause__)
    assert host_lacks_memory(raised.value)


def test_errors_are_translated_once_and_others_pass():
    outer, inner = (
        translate_out_of_memory(lambda: "the outer", str, cpu),
        translate_out_of_memory(lambda: "the inner", str, cpu),
    )
    with pytest.raises(RunFailedError, match="in the inner"), outer, inner:
        raise MemoryError
    with pytest.raises(RuntimeError, match=r"^a shape$"), translate_out_of_memory(lambda: "a test", str, cpu):
        raise RuntimeError("a shape")


def test_device_out_of_memory_is_not_host_out_of_memory():
    error = RunFailedError("out of memory")
    error.__cause__ = torch.OutOfMemoryError("CUDA out of memory")
    assert not host_lacks_memory(error)
    assert not host_lacks_memory(RuntimeError("CUDA error: out of memory"))
    assert not host_lacks_memory(RunFailedError("out of memory"))
    assert host_lacks_memory(MemoryError())


def test_the_generators_own_settings_are_named():
    assert generation_advice(TransformersGenerator(max_new_tokens=7, batch_tokens=80)) == (
        "Lower the generator's max_new_tokens (now 7) or batch_tokens (now 80), or shorten the prompts"
    )
    assert "max_new_tokens or batch_tokens" in generation_advice(None)
