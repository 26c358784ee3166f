"""Exact corpus metrics: of next-token prediction, and of graded answers."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from math import isnan
from typing import Any

import torch
from torch import Tensor
from torchmetrics import MeanMetric, Metric

from sft_lightning.data.batch import MicroBatch
from sft_lightning.evaluation.comparison import rewarded
from sft_lightning.losses.linear_cross_entropy import LabelLosses

# Apple's GPUs have no float64; everywhere else sums over millions of tokens are kept exact enough to compare runs.
_SUM_DTYPE = torch.float32 if torch.backends.mps.is_available() else torch.float64


class TokenMetrics(Metric):
    """Loss, perplexity and accuracy over all label tokens of a set, whatever the batches or replicas were.

    Sums first, one division last: the result does not depend on how rows were batched.
    """

    full_state_update = False
    nll_sum: Tensor
    num_correct: Tensor
    num_tokens: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("nll_sum", torch.zeros((), dtype=_SUM_DTYPE), dist_reduce_fx="sum")
        self.add_state("num_correct", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("num_tokens", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, nll: Tensor, correct: Tensor) -> None:
        """Adds label tokens.

        Args:
            nll: Shape [M], negative log-likelihood of each label, in nats.
            correct: Shape [M], bool, whether the most likely token is the label.
        """
        self.nll_sum += nll.to(_SUM_DTYPE).sum()
        self.num_correct += correct.sum()
        self.num_tokens += nll.numel()

    def compute(self) -> dict[str, Tensor]:
        """Returns ``loss`` in nats per label token, ``perplexity`` and ``token_accuracy``; NaN over an empty set."""
        loss = self.nll_sum / self.num_tokens
        return {
            "loss": loss,
            "perplexity": loss.exp(),
            "token_accuracy": self.num_correct.to(_SUM_DTYPE) / self.num_tokens,
        }

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = "") -> torch.nn.Module:
        # Moves and never casts: Lightning's bf16-true calls .to(bfloat16) on all there is, where 256 + 1 is 256.
        return super()._apply(lambda state: state.to(fn(state.new_empty(0)).device), exclude_state)


def answer_metrics(samples: Sequence[Mapping[str, Any]], device: torch.device) -> dict[str, float]:
    """Returns rates and means over the graded answers of all processes, each of which gives its own samples.

    Args:
        samples: Those of an ``EvaluationResult``, of this process.
        device: Where processes exchange sums.

    Returns:
        ``format_accuracy``, ``strict_format_accuracy``, ``answer_accuracy`` and ``mean_reward``, in [0, 1]; and
        ``response_tokens`` of an answer and ``response_entropy`` of a token, in nats. What no answer tells is left out.
    """
    weighted: dict[str, list[tuple[float, float]]] = {
        "format_accuracy": [(one["format_correct"], 1) for one in samples],
        "strict_format_accuracy": [
            (one["strict_format_correct"], 1) for one in samples if one["strict_format_correct"] is not None
        ],
        "answer_accuracy": [(one["answer_correct"], 1) for one in samples],
        "mean_reward": [(rewarded(one), 1) for one in samples],
        "response_tokens": [(one["num_tokens"], 1) for one in samples],
        "response_entropy": [
            (one["mean_entropy"], one["num_tokens"]) for one in samples if one["mean_entropy"] is not None
        ],
    }
    means = {name: MeanMetric().set_dtype(_SUM_DTYPE).to(device) for name in weighted}
    for name, pairs in weighted.items():
        if pairs:
            values, weights = torch.tensor(pairs, dtype=_SUM_DTYPE, device=device).T
            means[name].update(values, weights)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a process without prompts computes a metric that it never updated
        values = {name: float(mean.compute()) for name, mean in means.items()}
    return {name: value for name, value in values.items() if not isnan(value)}


def step_sums(parts: Sequence[tuple[LabelLosses, MicroBatch]]) -> Tensor:
    """Returns one process's share of an optimizer step's sums: over processes and steps they simply add up.

    Returns:
        Shape [4], dtype of the losses: the weighted loss; and of all label tokens, without the dummies of empty
        micro-batches, the number predicted right, the sum of entropies in nats (0 if not computed) and the number.
    """
    loss = torch.stack([losses.weighted_sum for losses, _ in parts]).sum()
    filled = [losses for losses, batch in parts if batch.num_rows]
    zero = loss.new_zeros(())
    num_correct = sum((losses.correct.sum() for losses in filled), zero)
    entropy = sum((losses.entropy.sum() for losses in filled if losses.entropy is not None), zero)
    num_labels = loss.new_full((), sum(len(losses.nll) for losses in filled))  # filled on the device, not copied to it
    return torch.stack([loss, num_correct.to(loss.dtype), entropy.to(loss.dtype), num_labels])
