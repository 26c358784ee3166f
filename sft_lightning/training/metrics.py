"""Compute exact next-token metrics over a whole set of rows."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torchmetrics import Metric

from sft_lightning.distributed.collectives import SUM_DTYPE


class TokenMetrics(Metric):
    """Loss, perplexity and accuracy over all label tokens of a set.

    Accumulates sums and divides once, so that the result does not depend on batches or replicas.
    """

    full_state_update = False
    nll_sum: Tensor
    num_correct: Tensor
    num_tokens: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("nll_sum", torch.zeros((), dtype=SUM_DTYPE), dist_reduce_fx="sum")
        self.add_state("num_correct", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("num_tokens", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, nll: Tensor, correct: Tensor) -> None:
        """Adds label tokens.

        Args:
            nll: Shape [M], negative log-likelihood of each label, in nats.
            correct: Shape [M], bool, whether the most likely token is the label.
        """
        # Not in place: a state that validate or test has reset is an inference tensor, which fit may not change.
        self.nll_sum = self.nll_sum + nll.to(SUM_DTYPE).sum()
        self.num_correct = self.num_correct + correct.sum()
        self.num_tokens = self.num_tokens + nll.numel()

    def compute(self) -> dict[str, Tensor]:
        """Returns ``loss`` in nats per label token, ``perplexity`` and ``token_accuracy``; NaN over an empty set."""
        loss = self.nll_sum / self.num_tokens
        return {
            "loss": loss,
            "perplexity": loss.exp(),
            "token_accuracy": self.num_correct.to(SUM_DTYPE) / self.num_tokens,
        }

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = "") -> torch.nn.Module:
        # Moves and never casts: Lightning's bf16-true calls .to(bfloat16) on every module, where 256 + 1 is 256.
        return super()._apply(lambda state: state.to(fn(state.new_empty(0)).device), exclude_state)
