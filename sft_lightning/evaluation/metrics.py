"""Average graded answers over all processes."""

import warnings
from collections.abc import Mapping, Sequence
from math import isnan
from typing import Any

import torch
from torchmetrics import MeanMetric

from sft_lightning.distributed.collectives import SUM_DTYPE
from sft_lightning.evaluation.comparison import rewarded


def answer_metrics(samples: Sequence[Mapping[str, Any]], device: torch.device) -> dict[str, float]:
    """Returns rates and means over the graded answers of all processes. All processes must call it.

    Args:
        samples: ``EvaluationResult.samples`` of this process.
        device: Where processes exchange sums.

    Returns:
        ``format_accuracy``, ``strict_format_accuracy``, ``answer_accuracy`` and ``mean_reward``, in [0, 1]; mean
        ``response_tokens`` per answer and ``response_entropy`` per token, in nats. Omits metrics that no answer has.
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
    means = {name: MeanMetric().set_dtype(SUM_DTYPE).to(device) for name in weighted}
    for name, pairs in weighted.items():
        if pairs:
            values, weights = torch.tensor(pairs, dtype=SUM_DTYPE, device=device).T
            means[name].update(values, weights)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a process without prompts computes a metric that it never updated
        values = {name: float(mean.compute()) for name, mean in means.items()}
    return {name: value for name, value in values.items() if not isnan(value)}
