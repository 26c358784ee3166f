"""Compare paired comparisons of evaluations with calculations by hand."""

import pytest

from sft_lightning.errors import UserError
from sft_lightning.evaluation.comparison import compare
from sft_lightning.evaluation.statistics import bootstrap_interval, wilson_interval


def samples(outcomes, num_samples=1, strict=None):
    """One sample for each (format, answer), ``num_samples`` of them to a prompt."""
    return [
        {
            "index": number // num_samples,
            "sample": number % num_samples,
            "prompt": f"prompt {number // num_samples}",
            "ground_truth": "1",
            "format_correct": bool(format_correct),
            "strict_format_correct": strict,
            "answer_correct": bool(answer_correct),
        }
        for number, (format_correct, answer_correct) in enumerate(outcomes)
    ]


BEFORE = samples([(0, 0), (0, 0), (1, 0), (1, 1), (1, 1), (0, 1)])
AFTER = samples([(1, 1), (1, 0), (1, 1), (1, 1), (0, 0), (1, 1)])


def test_rates_before_and_after():
    rates = compare(BEFORE, AFTER).rates
    assert list(rates) == ["format_accuracy", "answer_accuracy", "mean_reward"]
    answer = rates["answer_accuracy"]
    assert (answer.num_pairs, answer.before, answer.after) == (6, 0.5, pytest.approx(4 / 6))
    assert answer.difference == pytest.approx(1 / 6)
    assert (answer.num_fixed, answer.num_broken) == (2, 1)
    assert answer.p_value == 1.0  # 2 * (1 + 3) / 8
    assert answer.before_interval == wilson_interval(3, 6)
    assert answer.after_interval == wilson_interval(4, 6)
    assert answer.difference_interval == bootstrap_interval([1.0, 0.0, 1.0, 0.0, -1.0, 0.0])
    reward = rates["mean_reward"]
    assert (reward.before, reward.after, reward.num_fixed, reward.num_broken) == (2 / 6, 4 / 6, 3, 1)
    assert reward.p_value == 0.625  # 2 * (1 + 4) / 16


def test_each_sample_is_fixed_broken_or_unchanged():
    changes = compare(BEFORE, AFTER).changes
    assert changes == ["fixed", "still wrong", "fixed", "still right", "broken", "fixed"]


def test_the_strict_format_is_compared_where_both_know_it():
    known = compare(samples([(1, 1)], strict=False), samples([(1, 1)], strict=True))
    assert known.rates["strict_format_accuracy"].difference == 1.0
    unknown = compare(samples([(1, 1)]), samples([(1, 1)], strict=True))
    assert "strict_format_accuracy" not in unknown.rates


def test_several_samples_of_a_prompt_count_as_one_prompt():
    before = samples([(1, 0), (1, 0), (1, 1), (1, 0)], num_samples=2)
    after = samples([(1, 1), (1, 1), (1, 1), (1, 0)], num_samples=2)
    answer = compare(before, after).rates["answer_accuracy"]
    assert (answer.num_pairs, answer.num_fixed, answer.num_broken, answer.p_value) == (2, 1, 0, 1.0)
    assert (answer.before, answer.after) == (0.25, 0.75)
    assert compare(before, after).changes == ["fixed", "fixed", "still right", "still wrong"]


def test_more_samples_than_before_are_compared_with_the_first_one():
    comparison = compare(samples([(1, 0), (1, 1)]), samples([(1, 1), (1, 0), (1, 0), (1, 1)], num_samples=2))
    assert comparison.changes == ["fixed", "still wrong", "broken", "still right"]


def changed(**fields):
    return [{**BEFORE[0], **fields}, *BEFORE[1:]]


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ([], AFTER, "without samples"),
        (BEFORE[:5], AFTER, "5 and 6 prompts"),
        (changed(prompt="another"), AFTER, "differ in the prompt of sample 0"),
        (changed(ground_truth=2), AFTER, "differ in the ground_truth of sample 0"),
    ],
)
def test_evaluations_of_other_data_are_refused(before, after, message):
    with pytest.raises(UserError, match=message):
        compare(before, after)
