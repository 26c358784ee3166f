"""What a training step has to compute, and what the device could compute, both in floating-point operations (FLOPs).

A multiplication and an addition are two FLOPs. Only matrix multiplications are counted, as everyone does: all else is
a few per cent of them.
"""

import time
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import nn

from sft_lightning.data.batch import MicroBatch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_MEASURE_SECONDS = 0.25
_MAX_MATRIX_SIZE = 8192

# Dense matrix multiplication per second, by the name that torch gives the device: 16-bit with float32 accumulation,
# TF32, float32. From NVIDIA's data sheets (H100, H200, GH200, A100, L40S, L4, A10) and its Ada white paper (RTX 4090),
# whose numbers "with sparsity" are twice as high. The names are whole ones: a MIG slice, a laptop's chip or another
# board of the same name is slower, and is measured.
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


@dataclass(frozen=True, slots=True)
class ModelFlops:
    """FLOPs of forward and backward together, without what is computed twice (checkpointed activations).

    Attributes:
        per_token: Of an input token, without attention scores and without the output embedding.
        per_label: Of a label: the output embedding runs at label positions only.
        per_attention: Of one token that attends to one token, itself included, in all layers and heads.
    """

    per_token: int
    per_label: int
    per_attention: int


class Peak(NamedTuple):
    """FLOPs per second that a device reaches at best, and where the number is from."""

    flops_per_second: float
    source: str


def count_model_flops(model: "PreTrainedModel") -> ModelFlops | None:
    """Returns what training costs a decoder of attention and dense layers; None for other models.

    A weight matrix of n numbers costs 2n a token forward and 4n backward, for the gradients of its input and of
    itself. Two tokens in attention cost, in each head of each layer, 2 x head_dim for the score and 2 x head_dim for
    the weighted sum, and twice that backward: 12 x layers x heads x head_dim. The input embedding is a look-up and
    costs nothing. This is the accounting of PaLM (arXiv 2204.02311, appendix B) and Chinchilla (2203.15556, appendix
    F), but that attention is counted where a causal mask lets it happen and not over the whole square. A sliding
    window is counted as if rows were shorter than it.

    A parameter with three dimensions is a convolution or a stack of experts, which no such formula covers.
    """
    config = model.config.get_text_config()
    head = model.get_output_embeddings()
    num_heads = getattr(config, "num_attention_heads", None)
    weights = [
        parameter
        for module in model.modules()
        if module is not head and not isinstance(module, nn.Embedding)
        for parameter in module.parameters(recurse=False)
    ]
    if head is None or not num_heads or any(weight.ndim > 2 for weight in weights):
        return None
    head_size = getattr(config, "head_dim", None) or config.hidden_size // num_heads
    return ModelFlops(
        per_token=6 * sum(weight.numel() for weight in weights if weight.ndim == 2),
        per_label=6 * head.weight.numel(),
        per_attention=12 * config.num_hidden_layers * num_heads * head_size,
    )


def num_attended(batch: MicroBatch) -> int:
    """Returns over how many (token, token it attends to) pairs attention runs, each token attending to itself too.

    Padding attends to nothing that counts.
    """
    if batch.segments is None:
        return sum(length * (length + 1) // 2 for length in batch.sequence_lengths)
    num_keys: list[int] = []  # of a segment's last token: its ancestors' tokens and the segment's own
    pairs = 0
    for start, end, parent in batch.segments.tree:
        if start >= batch.num_unique_tokens:
            break  # padding, which is one segment at the end
        inherited = num_keys[parent] if parent >= 0 else 0
        own = end - start
        num_keys.append(inherited + own)
        pairs += own * inherited + own * (own + 1) // 2
    return pairs


def peak_of(device: torch.device, dtype: torch.dtype) -> Peak:
    """Returns the rate at which a device multiplies matrices: from the data sheet, or measured where there is none.

    Measuring takes about a quarter of a second, once a process. The random state of the program is left alone.

    Args:
        device: Where the model runs.
        dtype: What its matrix multiplications are done in.
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
    """Returns the best rate among ever larger square matrices, in FLOPs per second."""
    deadline = time.perf_counter() + _MEASURE_SECONDS
    generator = torch.Generator(device).manual_seed(0)
    best, size = 0.0, 256
    # Zeros would do on a CPU; a GPU runs faster on them than on numbers.
    matrix = torch.randn(size, size, device=device, generator=generator).to(dtype)
    while (begun := time.perf_counter()) < deadline:
        torch.mm(matrix, matrix)
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        seconds = time.perf_counter() - begun
        best = max(best, 2 * size**3 / seconds)
        # Twice the size takes eight times as long; the first call of a size is slow, so that a few must fit.
        if size < _MAX_MATRIX_SIZE and 8 * seconds < (deadline - time.perf_counter()) / 4:
            size *= 2
            matrix = torch.randn(size, size, device=device, generator=generator).to(dtype)
    return best
