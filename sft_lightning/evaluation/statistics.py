"""Compute confidence intervals and significance tests of rates, pass@k and maj@k."""

from collections.abc import Hashable, Sequence
from math import comb, sqrt
from statistics import NormalDist

import numpy as np

_NUM_RESAMPLES = 10_000


def wilson_interval(num_correct: int, num_examples: int, confidence: float = 0.95) -> tuple[float, float]:
    """Returns the bounds of a rate on independent examples: Wilson's score interval (1927).

    Unlike rate +- 1.96 standard errors it stays in [0, 1] and keeps its coverage at 0, at 1 and for few examples.
    Without examples it is [0, 1].

    Example:
        >>> [round(bound, 3) for bound in wilson_interval(8, 10)]
        [0.49, 0.943]
    """
    assert 0 <= num_correct <= num_examples
    if num_examples == 0:
        return 0.0, 1.0
    z_squared = NormalDist().inv_cdf((1 + confidence) / 2) ** 2
    rate = num_correct / num_examples
    center = rate + z_squared / (2 * num_examples)
    margin = sqrt(z_squared * (rate * (1 - rate) / num_examples + z_squared / (4 * num_examples**2)))
    scale = 1 + z_squared / num_examples
    # At 0 and 1 the bound is the rate itself, which rounding may miss.
    low = 0.0 if num_correct == 0 else (center - margin) / scale
    high = 1.0 if num_correct == num_examples else (center + margin) / scale
    return low, high


def rate_interval(outcomes: Sequence[Sequence[bool]]) -> tuple[float, float]:
    """Returns the 95% bounds of a rate, given the outcomes of the samples of each prompt.

    With one sample per prompt it is Wilson's interval. Samples of one prompt are not independent: with several it is
    the bootstrap over prompts.
    """
    if all(len(samples) == 1 for samples in outcomes):
        return wilson_interval(sum(samples[0] for samples in outcomes), len(outcomes))
    return bootstrap_interval([sum(samples) / len(samples) for samples in outcomes])


def mcnemar_p_value(num_fixed: int, num_broken: int) -> float:
    """Returns the two-sided p value of McNemar's exact test.

    Args:
        num_fixed: Prompts that only the second model answers right.
        num_broken: Prompts that only the first model answers right. Prompts on which both agree do not count.

    Example:
        >>> mcnemar_p_value(5, 0)  # five heads or five tails in five throws
        0.0625
    """
    num_changed = num_fixed + num_broken
    num_tail = sum(comb(num_changed, count) for count in range(min(num_fixed, num_broken) + 1))
    return min(1.0, 2 * num_tail / 2**num_changed)


def bootstrap_interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float]:
    """Returns the bounds of the mean of one value per prompt: the percentile bootstrap (Efron, 1979).

    Prompts are resampled, so values of one prompt (several samples, or before and after) stay together. The draws are
    seeded: equal values give equal bounds.

    Args:
        values: One per prompt; at least one.
        confidence: Share of the resampled means between the bounds.
    """
    distinct, counts = np.unique(np.asarray(values, dtype=np.float64), return_counts=True)
    num_prompts = len(values)
    # The mean of a resample depends only on how often it draws each distinct value.
    draws = np.random.default_rng(0).multinomial(num_prompts, counts / num_prompts, size=_NUM_RESAMPLES)
    tail = (1 - confidence) / 2
    low, high = np.quantile(draws @ distinct / num_prompts, [tail, 1 - tail])
    return float(low), float(high)


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """Returns the probability that one of k samples is right, estimated without bias from ``num_samples`` >= k.

    The estimator of Chen et al., "Evaluating Large Language Models Trained on Code" (2021).

    Example:
        >>> pass_at_k(4, 1, 2)  # 3 of the 6 pairs hold the right one
        0.5
    """
    assert 1 <= k <= num_samples
    return 1 - comb(num_samples - num_correct, k) / comb(num_samples, k)


def majority_accuracy(answers: Sequence[Hashable], correct: Sequence[bool]) -> float:
    """Returns whether the most frequent answer is right; between 0 and 1 if several are equally frequent.

    Wang et al., "Self-Consistency Improves Chain of Thought Reasoning" (2022). All right answers count as one answer,
    in any notation. A missing answer (None) is not a vote.

    Example:
        >>> majority_accuracy(["72", "8", "72.0"], [True, False, True])
        1.0
        >>> majority_accuracy(["72", "8"], [True, False])
        0.5
    """
    votes: dict[Hashable, int] = {}
    right = object()
    for answer, is_correct in zip(answers, correct, strict=True):
        if is_correct or answer is not None:
            choice = right if is_correct else answer
            votes[choice] = votes.get(choice, 0) + 1
    winners = [choice for choice, count in votes.items() if count == max(votes.values())]
    return (right in winners) / len(winners) if winners else 0.0
