"""Compare intervals and tests with calculations by hand, published values and brute force."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sft_lightning.evaluation.statistics import (
    bootstrap_interval,
    majority_accuracy,
    mcnemar_p_value,
    pass_at_k,
    rate_interval,
    wilson_interval,
)


@pytest.mark.parametrize(
    ("num_correct", "num_examples", "low", "high"),
    [
        # Newcombe, "Two-sided confidence intervals for the single proportion" (1998), table I, method 3.
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
        # z^2 / (n + z^2) with z = 1.959964 and n = 1.
        (1, 1, 0.2065, 1.0),
        (0, 0, 0.0, 1.0),
    ],
)
def test_wilson_interval(num_correct, num_examples, low, high):
    assert wilson_interval(num_correct, num_examples) == pytest.approx((low, high), abs=5e-5)


@given(st.integers(1, 2000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_bounds_solve_the_score_test(counts):
    num_correct, num_examples = counts
    rate = num_correct / num_examples
    for bound in wilson_interval(num_correct, num_examples):
        assert 0 <= bound <= 1
        if 0 < bound < 1:
            z = (rate - bound) / math.sqrt(bound * (1 - bound) / num_examples)
            assert abs(z) == pytest.approx(1.959963985, rel=1e-6)
    low, high = wilson_interval(num_correct, num_examples)
    assert low <= rate <= high


def test_a_wider_confidence_gives_a_wider_interval():
    assert wilson_interval(5, 10, confidence=0.99)[0] < wilson_interval(5, 10)[0]


@pytest.mark.parametrize(
    ("num_fixed", "num_broken", "p_value"),
    [
        (0, 0, 1.0),
        (1, 0, 1.0),
        (5, 0, 2 / 32),
        (0, 5, 2 / 32),
        (3, 3, 1.0),
        (1, 9, 2 * (1 + 10) / 1024),
        (315, 0, 2.0**-314),
    ],
)
def test_mcnemar_p_value(num_fixed, num_broken, p_value):
    assert mcnemar_p_value(num_fixed, num_broken) == pytest.approx(p_value, rel=1e-12)


@pytest.mark.parametrize(("num_fixed", "num_broken"), [(4, 2), (7, 1), (2, 6)])
def test_mcnemar_is_the_exact_binomial_test(num_fixed, num_broken):
    throws = list(itertools.product([0, 1], repeat=num_fixed + num_broken))
    middle, distance = (num_fixed + num_broken) / 2, abs(num_fixed - num_broken) / 2
    lopsided = [throw for throw in throws if abs(sum(throw) - middle) >= distance]
    assert mcnemar_p_value(num_fixed, num_broken) == pytest.approx(len(lopsided) / len(throws))


def test_bootstrap_interval_is_that_of_resampling_prompt_by_prompt():
    values = [1.0] * 30 + [0.0] * 60 + [-1.0] * 10 + [0.25] * 20
    generator = np.random.default_rng(5)
    means = np.asarray(values)[generator.integers(0, len(values), size=(20_000, len(values)))].mean(axis=1)
    # Quantiles of 10,000 draws: a standard error of about 0.001 at this spread, of which four are allowed.
    assert bootstrap_interval(values) == pytest.approx(tuple(np.quantile(means, [0.025, 0.975])), abs=0.006)


def test_bootstrap_interval_repeats():
    assert bootstrap_interval([0.0, 1.0, 1.0]) == bootstrap_interval([1.0, 0.0, 1.0])


def test_bootstrap_interval_of_equal_values_is_that_value():
    assert bootstrap_interval([0.5] * 8) == (0.5, 0.5)


def test_bootstrap_interval_agrees_with_the_normal_one_for_many_prompts():
    values = [1.0] * 400 + [0.0] * 600
    margin = 1.96 * math.sqrt(0.24 / 1000)
    assert bootstrap_interval(values) == pytest.approx((0.4 - margin, 0.4 + margin), abs=0.003)


def test_rate_interval_is_wider_for_samples_that_agree():
    assert rate_interval([[True]] * 8 + [[False]] * 2) == wilson_interval(8, 10)
    low, high = rate_interval([[True] * 4] * 8 + [[False] * 4] * 2)
    as_if_independent = wilson_interval(32, 40)
    assert low < as_if_independent[0]
    assert high > as_if_independent[1]


@pytest.mark.parametrize("num_samples", [1, 4, 6])
def test_pass_at_k_counts_subsets_with_a_right_sample(num_samples):
    for num_correct in range(num_samples + 1):
        right = [index < num_correct for index in range(num_samples)]
        for k in range(1, num_samples + 1):
            choices = list(itertools.combinations(right, k))
            assert pass_at_k(num_samples, num_correct, k) == pytest.approx(sum(map(any, choices)) / len(choices))


@pytest.mark.parametrize(
    ("answers", "correct", "accuracy"),
    [
        (["7", "7", "8"], [True, True, False], 1.0),
        (["7", "8", "8"], [True, False, False], 0.0),
        (["72", "72.0", "8", "8", "9"], [True, True, False, False, False], 0.5),
        (["7", "8", "9"], [True, False, False], 1 / 3),
        ([None, None, "7"], [False, False, True], 1.0),
        ([None, None], [False, False], 0.0),
        ([None, "8"], [True, False], 0.5),  # right, although the answers differ
    ],
)
def test_majority_accuracy(answers, correct, accuracy):
    assert majority_accuracy(answers, correct) == pytest.approx(accuracy)
