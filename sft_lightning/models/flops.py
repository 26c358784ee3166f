"""Count the floating-point operations (FLOPs) of a training step.

A multiplication and an addition are two FLOPs. Only matrix multiplications are counted, as is usual: everything else
is a few percent of them.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from sft_lightning.data.batch import MicroBatch

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, slots=True)
class ModelFlops:
    """FLOPs of the forward and backward pass together. Recomputed activations do not count twice.

    Attributes:
        per_token: FLOPs of an input token, without attention scores and without the output embedding.
        per_label: FLOPs of a label: the output embedding runs at label positions only.
        per_attention: FLOPs of one (query token, key token) pair in all layers and heads.
    """

    per_token: int
    per_label: int
    per_attention: int


def count_model_flops(model: "PreTrainedModel") -> ModelFlops | None:
    """Returns the training FLOPs of a decoder of attention and dense layers; None for other models.

    A weight matrix of n numbers costs 2n per token forward and 4n backward, for the gradients of its input and of
    itself. A pair of tokens in attention costs, in each head of each layer, 2 x head_dim for the score and
    2 x head_dim for the weighted sum, and twice that backward: 12 x layers x heads x head_dim. The input embedding is
    a look-up and costs nothing. This is the accounting of PaLM (arXiv 2204.02311, appendix B) and Chinchilla
    (2203.15556, appendix F), except that attention is counted under its causal mask and not over the whole square. A
    sliding window is counted as if rows were shorter than it.

    A parameter with three dimensions is a convolution or a stack of experts, which the formula does not cover.
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
    """Returns how many (query token, key token) pairs attention computes, each token with itself included.

    Padding does not count.
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
