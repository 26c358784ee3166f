"""Look up or measure how many floating-point operations (FLOPs) per second a device reaches."""

import time
from functools import cache
from typing import NamedTuple

import torch

_MEASURE_SECONDS = 0.25
_MAX_MATRIX_SIZE = 8192

# Dense matrix multiplication per second, by the name that torch gives the device: 16-bit with float32 accumulation,
# TF32, float32. From NVIDIA's data sheets (H100, H200, GH200, A100, L40S, L4, A10) and its Ada white paper (RTX 4090),
# whose numbers "with sparsity" are twice as high. A name must match as a whole: a MIG slice, a laptop GPU or another
# board of a similar name is slower, and is measured.
_HOPPER_SXM = (989.4e12, 494.7e12, 66.9e12)
_AMPERE_A100 = (312e12, 156e12, 19.5e12)
_DATA_SHEETS = {
    "NVIDIA GH200 480GB": _HOPPER_SXM,
    "NVIDIA H200": _HOPPER_SXM,
    "NVIDIA H100 80GB HBM3": _HOPPER_SXM,
    "NVIDIA H100 NVL": (835.5e12, 417.5e12, 60e12),
    "NVIDIA H100 PCIe": (756e12, 378e12, 51e12),
    "NVIDIA A100-SXM4-80GB": _AMPERE_A100,
    "NVIDIA A100-SXM4-40GB": _AMPERE_A100,
    "NVIDIA A100 80GB PCIe": _AMPERE_A100,
    "NVIDIA A100-PCIE-40GB": _AMPERE_A100,
    "NVIDIA L40S": (362e12, 183e12, 91.6e12),
    "NVIDIA L4": (121e12, 60e12, 30.3e12),
    "NVIDIA A10": (125e12, 62.5e12, 31.2e12),
    "NVIDIA GeForce RTX 4090": (165.2e12, 82.6e12, 82.6e12),
}


class Peak(NamedTuple):
    """Highest FLOPs per second of a device, and the source of the number."""

    flops_per_second: float
    source: str


def peak_of(device: torch.device, dtype: torch.dtype) -> Peak:
    """Returns the rate at which a device multiplies matrices: from the data sheet, or measured where there is none.

    Measuring takes about a quarter of a second, once per process. It does not change the random state.

    Args:
        device: Where the model runs.
        dtype: Precision of its matrix multiplications.
    """
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    if name in _DATA_SHEETS and dtype in (torch.bfloat16, torch.float16, torch.float32):
        half, tf32, single = _DATA_SHEETS[name]
        if dtype != torch.float32:
            return Peak(half, f"data sheet of {name}, 16 bit, dense")
        if torch.get_float32_matmul_precision() != "highest":
            return Peak(tf32, f"data sheet of {name}, TF32, dense")
        return Peak(single, f"data sheet of {name}, float32")
    return Peak(_measure(device, dtype), f"measured by multiplying {str(dtype).removeprefix('torch.')} matrices")


@cache
def _measure(device: torch.device, dtype: torch.dtype) -> float:
    """Returns the best rate among square matrices of growing size, in FLOPs per second."""
    deadline = time.perf_counter() + _MEASURE_SECONDS
    generator = torch.Generator(device).manual_seed(0)
    best, size = 0.0, 256
    # Not zeros: a GPU multiplies those faster.
    matrix = torch.randn(size, size, device=device, generator=generator).to(dtype)
    while (begun := time.perf_counter()) < deadline:
        torch.mm(matrix, matrix)
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        seconds = time.perf_counter() - begun
        best = max(best, 2 * size**3 / seconds)
        # Twice the size takes eight times as long; the first call of a size is slow, so several must fit.
        if size < _MAX_MATRIX_SIZE and 8 * seconds < (deadline - time.perf_counter()) / 4:
            size *= 2
            matrix = torch.randn(size, size, device=device, generator=generator).to(dtype)
    return best
