"""Attention over the segments of a packed row, in pure torch: on any device, and faster on CPUs.

A segment attends causally to itself and fully to its ancestors. The row is in depth-first order, so the descendants of
a segment stand directly behind it:

    row        [ preamble | question 1 | response 1a | response 1b | question 2 response 2 ]
    preamble     <------>   <------------------------------------------------------------->   its descendants
    question 1              <--------->  <----------------------->

Letters beside those of data/batch.py: H query heads, G key/value heads, E head size.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from sft_lightning.data.batch import Segments, Span


@torch.compiler.disable  # a graph would hold for these very spans only
def attend(
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
        query: Shape [1, H, T, E], any floating dtype.
        key: Shape [1, G, T, E]; G divides H.
        value: Shape [1, G, T, any].
        segments: Of the row.
        scale: Factor on the scores.
        dropout: Probability with which an attention weight is dropped.
        window_tokens: Keys that a position sees at the most, itself included; None for all.
        softcap: Scores s become ``softcap * tanh(s / softcap)``.

    Returns:
        Shape [1, H, T, any], dtype of ``value`` (under autocast, the autocast dtype).
    """
    device_type = query.device.type
    dtype = torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else value.dtype
    plain = dropout == 0.0 and softcap is None and (window_tokens is None or window_tokens >= segments.max_keys)
    if plain and device_type == "cpu" and query.shape[-1] == value.shape[-1]:
        # The backward kernel takes 1.8 times as long in bfloat16 as in float32.
        wide = torch.promote_types(dtype, torch.float32)
        return _OnCPU.apply(query.to(wide), key.to(wide), value.to(wide), segments.spans, scale).to(dtype)
    query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    parts = [
        _attend_segment(
            query[:, :, span.start : span.end],
            _with_ancestors(key, segments.spans, span),
            _with_ancestors(value, segments.spans, span),
            scale=scale,
            dropout=dropout,
            window_tokens=window_tokens,
            softcap=softcap,
        )
        for span in segments.spans
    ]
    return torch.cat(parts, dim=2)


def _with_ancestors(row: Tensor, spans: tuple[Span, ...], span: Span) -> Tensor:
    parts = [row[:, :, span.start : span.end]]
    while span.parent >= 0:
        span = spans[span.parent]
        parts.append(row[:, :, span.start : span.end])
    return torch.cat(parts[::-1], dim=2) if len(parts) > 1 else parts[0]


def _attend_segment(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float,
    dropout: float,
    window_tokens: int | None,
    softcap: float | None,
) -> Tensor:
    num_queries, num_keys = query.shape[2], key.shape[2]
    windowed = window_tokens is not None and window_tokens < num_keys
    options: dict[str, Any] = {"dropout_p": dropout, "scale": scale, "enable_gqa": query.shape[1] != key.shape[1]}
    if softcap is None and not windowed and num_queries == num_keys:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, **options)
    # Queries are the last of the keys' positions.
    before = num_keys - num_queries
    visible = torch.ones(num_queries, num_keys, dtype=torch.bool, device=query.device).tril(before)
    if windowed:
        visible = visible.triu(before - window_tokens + 1)  # type: ignore[operator]
    if softcap is None:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=visible, **options)
    key, value = _for_each_query_head(key, query), _for_each_query_head(value, query)
    scores = softcap * torch.tanh(query @ key.transpose(2, 3) * scale / softcap)
    scores = scores.masked_fill(~visible, torch.finfo(scores.dtype).min)
    # As transformers' own eager attention does: softmax in float32, dropout on the weights.
    weights = scores.softmax(-1, dtype=torch.promote_types(torch.float32, scores.dtype)).to(query.dtype)
    return F.dropout(weights, dropout) @ value


class _OnCPU(torch.autograd.Function):
    """Torch's FlashAttention for CPUs, in two kinds of calls that compute no masked score and gather no key.

    Each segment attends to itself, causally. Then all descendants of a segment, which stand side by side, attend to it
    in one unmasked call. The parts of a position's output are put together by their log-sum-exp, which is exact: the
    softmax over a union of keys is the average of the softmaxes over its parts, weighted by their sums of exponentials
    (the online softmax of FlashAttention, Dao et al. 2022; over blocks of keys as in Ring Attention, Liu et al. 2023).
    In the backward pass, the output and the log-sum-exp over all keys make each part's gradient that of the whole.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, spans: tuple[Span, ...], scale: float) -> Tensor:
        query = _in_rows(query)
        repeated_key, repeated_value = _for_each_query_head(key, query), _for_each_query_head(value, query)
        output = torch.empty_like(query)
        log_sums = output.new_empty(query.shape[:3])
        for queries, keys, causal in _parts(spans):
            part, part_log_sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                query[:, :, queries], repeated_key[:, :, keys], repeated_value[:, :, keys], 0.0, causal, scale=scale
            )
            if causal:
                output[:, :, queries], log_sums[:, :, queries] = part, part_log_sums
                continue
            so_far = log_sums[:, :, queries]
            together = torch.logaddexp(so_far, part_log_sums)
            output[:, :, queries].mul_((so_far - together).exp_().unsqueeze(-1))
            output[:, :, queries].addcmul_(part, (part_log_sums - together).exp_().unsqueeze(-1))
            log_sums[:, :, queries] = together
        ctx.save_for_backward(query, key, value, output, log_sums)
        ctx.spans, ctx.scale = spans, scale
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, output, log_sums = ctx.saved_tensors
        grad_output = _in_rows(grad_output)
        repeated_key, repeated_value = _for_each_query_head(key, query), _for_each_query_head(value, query)
        gradients = [torch.empty_like(query) for _ in range(3)]
        for queries, keys, causal in _parts(ctx.spans):
            parts = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                grad_output[:, :, queries],
                query[:, :, queries],
                repeated_key[:, :, keys],
                repeated_value[:, :, keys],
                output[:, :, queries],
                log_sums[:, :, queries],
                0.0,
                causal,
                scale=ctx.scale,
            )
            for gradient, part, where in zip(gradients, parts, (queries, keys, keys), strict=True):
                if causal:
                    gradient[:, :, where] = part
                else:
                    gradient[:, :, where] += part
        grad_query, grad_key, grad_value = gradients
        return (
            grad_query,
            grad_key.unflatten(1, (key.shape[1], -1)).sum(2),
            grad_value.unflatten(1, (key.shape[1], -1)).sum(2),
            None,
            None,
        )


def _parts(spans: tuple[Span, ...]) -> list[tuple[slice, slice, bool]]:
    """Returns (queries, keys, causal) of each call: every segment on itself first, then descendants on ancestors."""
    own = [(slice(span.start, span.end), slice(span.start, span.end), True) for span in spans]
    shared = [
        (slice(span.end, span.subtree_end), slice(span.start, span.end), False)
        for span in spans
        if span.subtree_end > span.end
    ]
    return own + shared


def _for_each_query_head(heads: Tensor, query: Tensor) -> Tensor:
    """Returns keys or values with one head for each query head, in the layout that torch's kernels for CPUs read."""
    repeats = query.shape[1] // heads.shape[1]
    if repeats > 1:
        return heads.repeat_interleave(repeats, dim=1)
    return _in_rows(heads)


def _in_rows(heads: Tensor) -> Tensor:
    # Below the public function nobody checks that a head's numbers stand side by side.
    return heads if heads.stride(-1) == 1 else heads.contiguous()
