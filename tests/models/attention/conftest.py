"""Define CPU stand-ins for the CUDA kernels, with their signatures and documented results."""

import sys
from types import ModuleType

import pytest
import torch


def attend_to_offsets(
    query, key, value, query_offsets, key_offsets, max_queries, max_keys, *, scale, window, softcap=0
):
    """Bottom-right causal attention over concatenated rows of [T, H, E]."""
    assert query_offsets.dtype == key_offsets.dtype == torch.int32
    left, right = window
    assert right == 0
    outputs = []
    for segment in range(len(query_offsets) - 1):
        rows = slice(*query_offsets[segment : segment + 2].tolist())
        columns = slice(*key_offsets[segment : segment + 2].tolist())
        q, k, v = query[rows].transpose(0, 1), key[columns].transpose(0, 1), value[columns].transpose(0, 1)
        assert q.shape[1] <= max_queries
        assert k.shape[1] <= max_keys
        k, v = (heads.repeat_interleave(q.shape[0] // k.shape[0], 0) for heads in (k, v))
        scores = q @ k.transpose(1, 2) * scale
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        distance = torch.arange(k.shape[1]) - torch.arange(k.shape[1])[-q.shape[1] :, None]
        hidden = (distance > 0) | ((distance < -left) if left >= 0 else torch.zeros_like(distance, dtype=torch.bool))
        outputs.append((scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v).transpose(0, 1))
    return torch.cat(outputs)


def varlen_of_torch_2_11(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1)
):
    return attend_to_offsets(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale=scale, window=window_size)


def varlen_of_torch_2_13(
    query,
    key,
    value,
    cu_seq_q,
    cu_seq_k,
    max_q,
    max_k,
    *,
    return_aux=None,
    scale=None,
    window_size=(-1, -1),
    enable_gqa=False,
):
    if not enable_gqa and query.shape[1] != key.shape[1]:
        raise ValueError("Try setting enable_gqa=True for GQA.")
    return attend_to_offsets(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale=scale, window=window_size)


def flash_attention_2(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
):
    assert causal
    offsets = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    return attend_to_offsets(q, k, v, *offsets, scale=softmax_scale, window=window_size, softcap=softcap)


def flash_attention_3(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    seqused_q=None,
    seqused_k=None,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    deterministic=False,
):
    assert causal
    offsets = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    output = attend_to_offsets(q, k, v, *offsets, scale=softmax_scale, window=window_size, softcap=softcap)
    return output, torch.zeros(q.shape[1], q.shape[0])  # with the log-sum-exp, as its first versions do


FUNCTIONS = {
    "flash_attention_2": ("flash_attn", "flash_attn_varlen_func", flash_attention_2),
    "flash_attention_3": ("flash_attn_interface", "flash_attn_varlen_func", flash_attention_3),
    "varlen": ("torch.nn.attention.varlen", "varlen_attn", varlen_of_torch_2_13),
    "varlen of torch 2.11": ("torch.nn.attention.varlen", "varlen_attn", varlen_of_torch_2_11),
}


@pytest.fixture
def install(monkeypatch):
    """Installs the stand-in for a kernel; ``instead`` replaces its function, or the whole package if it is a module."""

    def install_stand_in(kernel, instead=None):
        module_name, name, function = FUNCTIONS[kernel]
        module = ModuleType(module_name)
        setattr(module, name, instead or function)
        monkeypatch.setitem(sys.modules, module_name, instead if isinstance(instead, ModuleType) else module)

    return install_stand_in


@pytest.fixture
def uninstall(monkeypatch):
    """Makes the package of a kernel look as if it were not installed."""
    return lambda kernel: monkeypatch.setitem(sys.modules, FUNCTIONS[kernel][0], None)
