"""Count the floating-point operations (FLOPs) of a training step.

A multiplication and an addition are two FLOPs. As is usual, only matrix multiplications count: everything else is a
few percent of them.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from sft_lightning.data.batch import MicroBatch

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, slots=True)
class ModelFlops:
    """FLOPs of the forward and backward pass together. Recomputation of activations does not count.

    Attributes:
        per_token: FLOPs of an input token, without attention scores and output embedding.
        per_label: FLOPs of a label in the output embedding, which runs at label positions only.
        per_attention: FLOPs of one (query token, key token) pair in all layers and heads.
    """

    per_token: int
    per_label: int
    per_attention: int


def count_model_flops(model: "PreTrainedModel") -> ModelFlops | None:
    """Returns the training FLOPs of a decoder of attention and dense layers; None for other models.

    A weight matrix of n elements costs 2n per token forward and 4n backward, for the gradients of its input and its
    weights. In each head of each layer, a pair of tokens in attention costs 2 x head_dim for the score and
    2 x head_dim for the weighted sum, and twice that backward: 12 x layers x heads x head_dim in total. The input
    embedding is a lookup and costs nothing. This follows PaLM (arXiv 2204.02311, appendix B) and Chinchilla
    (2203.15556, appendix F), except that attention counts under its causal mask instead of over the full square.
    Sliding windows count as full attention.

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
    """Returns the number of (query token, key token) pairs in attention, including each token with itself.

    Padding does not count.
    """
    if batch.segments is None:
        return sum(length * (length + 1) // 2 for length in batch.sequence_lengths)
    num_keys: list[int] = []  # by segment: its tokens and those of its ancestors
    pairs = 0
    for start, end, parent in batch.segments.tree:
        if start >= batch.num_unique_tokens:
            break  # padding, which is one segment at the end
        inherited = num_keys[parent] if parent >= 0 else 0
        own = end - start
        num_keys.append(inherited + own)
        pairs += own * inherited + own * (own + 1) // 2
    return pairs
