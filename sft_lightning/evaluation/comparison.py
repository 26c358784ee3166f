"""Compare two evaluations on the same prompts: what was fixed or broken, and whether it is significant."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from sft_lightning.errors import UserError
from sft_lightning.evaluation.statistics import bootstrap_interval, mcnemar_p_value, rate_interval

Change = Literal["fixed", "broken", "still wrong", "still right"]
Sample = Mapping[str, Any]


@dataclass(frozen=True)
class PairedRate:
    """One rate before and after, on the same prompts.

    Attributes:
        num_pairs: Prompts in both evaluations.
        before: In [0, 1].
        after: In [0, 1].
        before_interval: 95% bounds of ``before``.
        after_interval: 95% bounds of ``after``.
        difference: ``after - before``.
        difference_interval: 95% bounds of the difference, by bootstrap over prompts.
        num_fixed: Prompts whose rate rose; with one sample per prompt: wrong before, right after.
        num_broken: Prompts whose rate fell.
        p_value: p value of McNemar's exact test on these two numbers (a sign test if prompts have several samples).
    """

    num_pairs: int
    before: float
    after: float
    before_interval: tuple[float, float]
    after_interval: tuple[float, float]
    difference: float
    difference_interval: tuple[float, float]
    num_fixed: int
    num_broken: int
    p_value: float


@dataclass(frozen=True)
class Comparison:
    """Two evaluations on the same prompts.

    Attributes:
        rates: ``format_accuracy``, ``answer_accuracy``, ``mean_reward`` and, if both have it,
            ``strict_format_accuracy``.
        changes: How the reward of each sample of the second evaluation changed.
    """

    rates: dict[str, PairedRate]
    changes: list[Change]


def rewarded(sample: Sample) -> bool:
    """Returns whether a sample is right in format and answer."""
    return sample["format_correct"] and sample["answer_correct"]


# Name of a rate -> whether it counts a sample as right; None if the grader does not know.
RATES: dict[str, Callable[[Sample], Any]] = {
    "format_accuracy": lambda sample: sample["format_correct"],
    "strict_format_accuracy": lambda sample: sample.get("strict_format_correct"),
    "answer_accuracy": lambda sample: sample["answer_correct"],
    "mean_reward": rewarded,
}

LABELS = dict(zip(RATES, ("format", "strict", "answer", "reward"), strict=True))


def by_prompt(samples: Sequence[Sample]) -> list[list[Sample]]:
    """Returns the samples of each prompt, in the order of the prompts."""
    prompts: dict[int, list[Sample]] = {}
    for sample in samples:
        prompts.setdefault(sample["index"], []).append(sample)
    return [prompts[index] for index in sorted(prompts)]


def compare(before: Sequence[Sample], after: Sequence[Sample]) -> Comparison:
    """Returns what changed from one evaluation to another on the same prompts.

    Args:
        before: Samples of the first evaluation: ``EvaluationResult.samples``, or from ``read_samples``.
        after: Samples of the second.

    Raises:
        UserError: If an evaluation has no samples, or the prompts, ground truths or their order differ.
    """
    if not before or not after:
        raise UserError("an evaluation without samples cannot be compared")
    pairs = _pairs(before, after)
    rates = {}
    for name, is_right in RATES.items():
        values = [[[is_right(sample) for sample in side] for side in pair] for pair in pairs]
        if not any(value is None for pair in values for side in pair for value in side):
            rates[name] = _paired_rate(values)
    earlier = {(sample["index"], sample["sample"]): rewarded(sample) for sample in before}
    # A sample that the first evaluation did not draw is compared with its first sample of that prompt.
    first = {sample["index"]: rewarded(sample) for sample in reversed(before)}
    was_right = [earlier.get((one["index"], one["sample"]), first[one["index"]]) for one in after]
    return Comparison(rates, [_change(old, rewarded(sample)) for old, sample in zip(was_right, after, strict=True)])


def comparison_table(comparison: Comparison) -> str:
    """Returns the rates as lines of at most 80 columns: before, after and difference with 95% bounds, and p."""
    lines = [f"{'':8} {'before':20} {'after':20} {'difference':21} p"]
    for name, rate in comparison.rates.items():
        before, after = (
            f"{value:.3f} [{low:.3f} {high:.3f}]"
            for value, (low, high) in ((rate.before, rate.before_interval), (rate.after, rate.after_interval))
        )
        low, high = rate.difference_interval
        difference = f"{rate.difference:+.3f} [{low:.3f} {high:.3f}]"
        lines.append(f"{LABELS[name]:8} {before:20} {after:20} {difference:21} {_short(rate.p_value)}")
    reward = comparison.rates["mean_reward"]
    lines.append(f"{reward.num_pairs} prompts: {reward.num_fixed} fixed, {reward.num_broken} broken")
    lines.append("[95% intervals], p of McNemar's exact test")
    return "\n".join(lines)


def _short(p_value: float) -> str:
    return f"{p_value:.3f}" if p_value >= 0.001 else f"{p_value:.0e}"


def _pairs(before: Sequence[Sample], after: Sequence[Sample]) -> list[tuple[list[Sample], list[Sample]]]:
    sides = [by_prompt(before), by_prompt(after)]
    if len(sides[0]) != len(sides[1]):
        raise UserError(
            f"the evaluations have {len(sides[0])} and {len(sides[1])} prompts: compare evaluations of the same ones"
        )
    pairs = list(zip(*sides, strict=True))
    for number, (old, new) in enumerate(pairs):
        for field in ("index", "prompt", "ground_truth"):
            if old[0][field] != new[0][field]:
                raise UserError(
                    f"the evaluations differ in the {field} of sample {number}: compare evaluations of the same data"
                )
    return pairs


def _paired_rate(values: Sequence[Sequence[Sequence[bool]]]) -> PairedRate:
    befores, afters = ([sum(pair[side]) / len(pair[side]) for pair in values] for side in (0, 1))
    differences = [after - before for before, after in zip(befores, afters, strict=True)]
    num_fixed, num_broken = sum(one > 0 for one in differences), sum(one < 0 for one in differences)
    before, after = sum(befores) / len(values), sum(afters) / len(values)
    return PairedRate(
        num_pairs=len(values),
        before=before,
        after=after,
        before_interval=rate_interval([pair[0] for pair in values]),
        after_interval=rate_interval([pair[1] for pair in values]),
        difference=after - before,
        difference_interval=bootstrap_interval(differences),
        num_fixed=num_fixed,
        num_broken=num_broken,
        p_value=mcnemar_p_value(num_fixed, num_broken),
    )


def _change(was_right: bool, is_right: bool) -> Change:
    if was_right:
        return "still right" if is_right else "broken"
    return "fixed" if is_right else "still wrong"
