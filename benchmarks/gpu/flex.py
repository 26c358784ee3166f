"""A prototype: attention over segments by FlexAttention, registered with transformers as ``sft_flex``.

Who sees whom in a whole trie takes one number a key: a key is visible to the queries from its own position to the end
of its segment's subtree, since spans are in depth-first order.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from transformers import AttentionInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface

from sft_lightning.data.batch import Segments
from sft_lightning.models.attention.interface import RegisteredAttention

_BLOCK_TOKENS = 128


class FlexAttention(RegisteredAttention):
    """Keeps the block mask of the last micro-batch: all layers ask for the same."""

    def __init__(self) -> None:
        super().__init__("varlen", "sdpa")  # like varlen, it is for 16-bit precision: the layout check tries it there
        self._compiled: Callable[..., Tensor] | None = None
        self._mask: tuple[Segments | None, BlockMask | None] = (None, None)

    @torch.compiler.disable  # the mask differs in every micro-batch
    def __call__(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *args: Any,
        segments: Segments | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        if segments is None:
            return super().__call__(module, query, key, value, attention_mask, *args, **kwargs)
        device_type = query.device.type
        dtype = torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else value.dtype
        heads = query.to(dtype), key.to(dtype), value.to(dtype)
        # FlexAttention has no backward on a CPU. Rows that are not filled up are those of the layout check, for which
        # compiling takes too long.
        if device_type == "cpu" or query.shape[2] % _BLOCK_TOKENS:
            place = torch.arange(query.shape[2], device=query.device)
            until = visible_until(segments).to(query.device)
            visible = (place[:, None] >= place) & (place[:, None] < until)
            output = F.scaled_dot_product_attention(*heads, attn_mask=visible, scale=kwargs["scaling"], enable_gqa=True)
        else:
            if self._compiled is None:
                self._compiled = torch.compile(flex_attention, dynamic=False)
            mask = self._block_mask(segments, query.shape[2], query.device)
            output = self._compiled(*heads, block_mask=mask, scale=kwargs["scaling"], enable_gqa=True)
        return output.transpose(1, 2), None

    def _block_mask(self, segments: Segments, num_tokens: int, device: torch.device) -> BlockMask:
        if self._mask[0] is not segments:
            until = visible_until(segments).to(device)

            def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
                return (query >= key) & (query < until[key])

            self._mask = segments, create_block_mask(sees, None, None, num_tokens, num_tokens, device=device)
        assert self._mask[1] is not None
        return self._mask[1]


def visible_until(segments: Segments) -> Tensor:
    """Returns for each key the position behind the last query that sees it. Shape [T], int32."""
    ends = [span.end for span in segments.spans]
    for index, span in reversed(list(enumerate(segments.spans))):
        if span.parent >= 0:
            ends[span.parent] = max(ends[span.parent], ends[index])
    return torch.from_numpy(np.repeat(ends, [span.end - span.start for span in segments.spans]).astype(np.int32))


def register() -> None:
    AttentionInterface.register("sft_flex", FlexAttention())
    AttentionMaskInterface.register("sft_flex", ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
