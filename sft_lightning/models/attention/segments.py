"""Compute attention over the segments of a packed row in pure torch, on any device.

A segment attends causally to itself and fully to its ancestors:

    row           [ preamble | question 1 | response 1a | response 1b | question 2 response 2 ]
    response 1b     all        all                        causally
    the last one    all                                                 causally

In addition to the letters of data/batch.py: H query heads, G key/value heads, E head size.
"""

from functools import lru_cache
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from sft_lightning.data.batch import Segments, Span

# A causal block wastes half of its own scores; a small block spends its time between matrix products. On two cores, 64
# to 128 tokens are equally fast for segments of 64 to 1,024 tokens.
_BLOCK_TOKENS = 96


@torch.compiler.disable  # a graph would be valid for these spans only
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
        window_tokens: Keys that a position sees at most, itself included; None for all.
        softcap: Scores s become ``softcap * tanh(s / softcap)``.

    Returns:
        Shape [1, H, T, any], dtype of ``value`` (under autocast, the autocast dtype).
    """
    device_type = query.device.type
    dtype = torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else value.dtype
    plain = dropout == 0.0 and softcap is None and (window_tokens is None or window_tokens >= segments.max_keys)
    if plain and device_type == "cpu" and query.shape[-1] == value.shape[-1]:
        # Small matrix products are hardly faster in bfloat16, and the operations between them are slower.
        wide = torch.promote_types(dtype, torch.float32)
        with torch.autocast(device_type, enabled=False):
            return _InBlocks.apply(query.to(wide), key.to(wide), value.to(wide), segments.spans, scale).to(dtype)
    query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    parts = [
        _attend_segment(
            query[:, :, segment.start : segment.end],
            segment.seen(key),
            segment.seen(value),
            scale=scale,
            dropout=dropout,
            window_tokens=window_tokens,
            softcap=softcap,
        )
        for segment in _blocks(segments.spans, segments.max_queries)  # long enough to split no segment
    ]
    return torch.cat(parts, dim=2)


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
    # The queries are at the last of the keys' positions.
    before = num_keys - num_queries
    visible = torch.ones(num_queries, num_keys, dtype=torch.bool, device=query.device).tril(before)
    if windowed:
        visible = visible.triu(before - window_tokens + 1)  # type: ignore[operator]
    if softcap is None:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=visible, **options)
    key, value = _for_each_query_head(key, query), _for_each_query_head(value, query)
    scores = softcap * torch.tanh(query @ key.transpose(2, 3) * scale / softcap)
    scores = scores.masked_fill(~visible, torch.finfo(scores.dtype).min)
    # As in transformers' eager attention: softmax in float32, dropout on the weights.
    weights = scores.softmax(-1, dtype=torch.promote_types(torch.float32, scores.dtype)).to(query.dtype)
    return F.dropout(weights, dropout) @ value


class _InBlocks(torch.autograd.Function):
    """Attention by matrix products over blocks of queries, whose keys are gathered from the segments they see.

    A block's scores stay in the processor's cache, and the backward pass recomputes them (Rabe and Staats, 2021), so
    that memory is linear in T. Query heads that share keys are rows of one matrix: no key is copied for them, and one
    product sums their gradients. Shapes inside, with R = H / G:

        queries        [G, T * R, E], the R heads of a token next to each other
        keys, values   [2, G, T, E]
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, spans: tuple[Span, ...], scale: float) -> Tensor:
        (_, num_heads, num_tokens, head_size), num_groups = query.shape, key.shape[1]
        shared_by = num_heads // num_groups
        query = _side_by_side(query, num_groups) * scale
        both = torch.cat([key, value])
        output = query.new_empty(num_tokens, num_groups, shared_by, head_size)
        for block in _blocks(spans, _BLOCK_TOKENS):
            keys, values = block.seen(both)
            weights = block.weights(query[:, block.rows(shared_by)], keys, shared_by)
            output[block.start : block.end] = torch.bmm(weights, values).unflatten(1, (-1, shared_by)).transpose(0, 1)
        output = output.view(1, num_tokens, num_heads, head_size).transpose(1, 2)
        ctx.save_for_backward(query, both, output)
        ctx.spans, ctx.scale, ctx.shared_by = spans, scale, shared_by
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        (query, both, output), shared_by = ctx.saved_tensors, ctx.shared_by
        num_groups = both.shape[1]
        with torch.autocast("cpu", enabled=False):
            # The softmax subtracts from each score's gradient the mean of its row (Dao et al., 2022, appendix B.2).
            means = _side_by_side((grad_output * output).sum(-1, keepdim=True), num_groups)
            grad_output = _side_by_side(grad_output, num_groups)
            grad_query, grad_both = torch.empty_like(query), torch.zeros_like(both)
            for block in _blocks(ctx.spans, _BLOCK_TOKENS):
                rows = block.rows(shared_by)
                seen = block.seen(both)
                keys, values = seen
                weights = block.weights(query[:, rows], keys, shared_by)
                grad_scores = torch.baddbmm(means[:, rows], grad_output[:, rows], values.mT, beta=-1).mul_(weights)
                grad_query[:, rows] = torch.bmm(grad_scores, keys)
                grad_seen = torch.empty_like(seen)
                torch.bmm(grad_scores.mT, query[:, rows], out=grad_seen[0])
                torch.bmm(weights.mT, grad_output[:, rows], out=grad_seen[1])
                block.add_to(grad_both, grad_seen)
        grad_query = grad_query.mul_(ctx.scale).unflatten(1, (-1, shared_by)).transpose(1, 2).flatten(0, 1)
        return grad_query.unsqueeze(0), grad_both[:1], grad_both[1:], None, None


class _Block(NamedTuple):
    """Queries from ``start`` to ``end`` of one segment, and the ranges of keys that they see, their own last."""

    start: int
    end: int
    ranges: tuple[tuple[int, int], ...]

    def rows(self, shared_by: int) -> slice:
        return slice(self.start * shared_by, self.end * shared_by)

    def seen(self, tokens: Tensor) -> Tensor:
        """Returns the tokens, shape [..., T, any], that the queries see. Shape [..., keys, any]."""
        parts = [tokens[..., start:end, :] for start, end in self.ranges]
        return torch.cat(parts, dim=-2) if len(parts) > 1 else parts[0]

    def add_to(self, total: Tensor, seen: Tensor) -> None:
        """Adds the gradients of the keys and values that the queries see to those of all."""
        parts = seen.split([end - start for start, end in self.ranges], dim=2)
        for (start, end), part in zip(self.ranges, parts, strict=True):
            total[:, :, start:end] += part

    def weights(self, query: Tensor, keys: Tensor, shared_by: int) -> Tensor:
        """Returns the attention weights. Shape [G, queries * R, keys]."""
        scores = torch.bmm(query, keys.mT)
        num_queries = self.end - self.start
        scores[:, :, -num_queries:] += _future(_BLOCK_TOKENS, shared_by, scores.dtype)[
            : num_queries * shared_by, :num_queries
        ]
        return torch.softmax(scores, dim=-1, out=scores)


@lru_cache(maxsize=4)  # the forward and backward passes of all layers need the same
def _blocks(spans: tuple[Span, ...], max_tokens: int) -> list[_Block]:
    """Returns the row's queries in blocks of at most ``max_tokens``."""
    blocks = []
    chains: list[tuple[tuple[int, int], ...]] = []  # of each segment: its ancestors and itself
    for start, end, parent in spans:
        above = chains[parent] if parent >= 0 else ()
        chains.append((*above, (start, end)))
        num_blocks = -(-(end - start) // max_tokens)
        cuts = [start + (end - start) * number // num_blocks for number in range(num_blocks + 1)]
        blocks += [_Block(first, behind, (*above, (start, behind))) for first, behind in pairwise(cuts)]
    return blocks


@lru_cache(maxsize=8)
def _future(num_tokens: int, shared_by: int, dtype: torch.dtype) -> Tensor:
    """Returns the bias that hides later keys from each query. Shape [num_tokens * R, num_tokens]."""
    hidden = torch.full((num_tokens, num_tokens), float("-inf"), dtype=dtype).triu(1)
    return hidden.repeat_interleave(shared_by, dim=0)


def _side_by_side(heads: Tensor, num_groups: int) -> Tensor:
    """Returns [1, H, T, any] as [G, T * R, any]."""
    return heads.unflatten(1, (num_groups, -1)).squeeze(0).transpose(1, 2).flatten(1, 2)


def _for_each_query_head(heads: Tensor, query: Tensor) -> Tensor:
    return heads.repeat_interleave(query.shape[1] // heads.shape[1], dim=1)
