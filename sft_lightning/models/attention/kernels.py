"""Call the CUDA kernels for variable-length attention: FlashAttention 3, FlashAttention 2 and torch's own.

They take the concatenated rows of all segments, [T, H, E], and the offset of each segment. A segment's queries
are the last of its keys: where segments have ancestors, keys and values are gathered once for every segment that sees
them.
"""

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from sft_lightning.data.batch import Segment, Segments

# The best first.
CUDA_KERNELS = ("flash_attention_3", "flash_attention_2", "varlen")
# Features that a kernel lacks, by the name of the argument with which a model's attention asks for them.
NOT_IN_KERNEL = {
    "flash_attention_3": {"dropout": "dropout"},
    "flash_attention_2": {},
    "varlen": {"dropout": "dropout", "softcap": "soft-capping"},
}


def import_kernel(kernel: str) -> Callable[..., Any]:
    """Returns the function of the package that brings a kernel.

    Raises:
        ImportError: If the package is missing, was built for another torch, or does not bring this kernel.
    """
    if kernel == "flash_attention_3":
        from flash_attn_interface import flash_attn_varlen_func as function
    elif kernel == "flash_attention_2":
        from flash_attn import flash_attn_varlen_func as function
    else:
        from torch.nn.attention.varlen import varlen_attn as function
    return function


@torch.compiler.disable  # the longest segment is a number that differs in every micro-batch
def attend_by_kernel(
    kernel: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Segments,
    *,
    scale: float,
    dropout: float = 0.0,
    window_tokens: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Returns each position's attention output over its segment and its segment's ancestors.

    Args:
        kernel: One of ``CUDA_KERNELS``.
        query: Shape [1, H, T, E].
        key: Shape [1, G, T, E]; G divides H.
        value: Shape [1, G, T, E].
        segments: Of the row.
        scale: Factor on the scores.
        dropout: Probability with which an attention weight is dropped.
        window_tokens: Keys that a position sees at most, itself included; None for all.
        softcap: Scores s become ``softcap * tanh(s / softcap)``.

    Returns:
        Shape [1, T, H, E], dtype of ``value`` (under autocast, the autocast dtype).
    """
    dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else value.dtype
    query, key, value = (heads.squeeze(0).transpose(0, 1).to(dtype) for heads in (query, key, value))
    if segments.key_positions is not None:
        # In float32: the gradients of all who share a token are added, and in 16 bits a long sum stops growing.
        key, value = (heads.float().index_select(0, segments.key_positions).to(dtype) for heads in (key, value))
    window = (-1 if window_tokens is None else window_tokens - 1, 0)
    function = import_kernel(kernel)
    options: dict[str, Any] = {"window_size": window}
    if kernel == "varlen":
        options["scale"] = scale
        if _has_parameter(function, "enable_gqa"):  # torch 2.11 runs grouped heads without being asked
            options["enable_gqa"] = query.shape[1] != key.shape[1]
    else:
        options |= {"softmax_scale": scale, "causal": True, "softcap": softcap or 0.0}
        options["deterministic"] = torch.are_deterministic_algorithms_enabled()
        if kernel == "flash_attention_2":
            options["dropout_p"] = dropout
    heads = (query.contiguous(), key.contiguous(), value.contiguous())
    offsets = (segments.query_offsets, segments.key_offsets, segments.max_queries, segments.max_keys)
    output = function(*heads, *offsets, **options)
    if isinstance(output, tuple):  # some versions of FlashAttention 3 also return the log-sum-exp
        output = output[0]
    return output.unsqueeze(0)


def try_kernel(kernel: str, *, num_heads: int, num_key_heads: int, head_size: int, device: str = "cuda") -> None:
    """Runs a kernel forward and backward on a row of five tokens in two segments that share a prefix.

    Raises:
        Exception: Whatever importing or running the kernel raises here.
    """
    segments = Segments.from_tree([Segment(0, 3, -1), Segment(3, 5, 0)]).to(torch.device(device))
    heads = [
        torch.ones(1, count, 5, head_size, device=device, dtype=torch.bfloat16, requires_grad=True)
        for count in (num_heads, num_key_heads, num_key_heads)
    ]
    with torch.enable_grad(), torch.autocast(torch.device(device).type, enabled=False):
        output = attend_by_kernel(kernel, *heads, segments, scale=head_size**-0.5)
        gradients = torch.autograd.grad(output.sum(), heads)
    # Reading a value waits for the device, which reports a failed kernel only then.
    assert all(bool(gradient.isfinite().all()) for gradient in gradients), "its gradients are not finite"


@cache
def _has_parameter(function: Callable[..., Any], name: str) -> bool:
    return name in inspect.signature(function).parameters
