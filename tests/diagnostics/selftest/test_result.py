"""Compare differences with calculations by hand, and test the verdicts."""

import math

import pytest
import torch

from sft_lightning.diagnostics.selftest.result import Outcome, gradient_difference, relative_difference


@pytest.mark.parametrize(
    ("difference", "allowed", "verdict"),
    [(0.0, 0.0, "pass"), (1e-5, 1e-5, "pass"), (1.1e-5, 1e-5, "FAIL"), (1e-9, 0.0, "FAIL"), (None, 0.0, "not tried")],
)
def test_outcome_verdicts(difference, allowed, verdict):
    outcome = Outcome("a check", difference, allowed, "")
    assert outcome.verdict == verdict
    assert outcome.failed == (verdict == "FAIL")


@pytest.mark.parametrize("difference", [math.inf, math.nan])
def test_nonfinite_differences_fail(difference):
    assert Outcome("a check", difference, 1.0, "").failed


def test_the_worst_tensor_is_named():
    reference = {"a": torch.tensor([3.0, 4.0]), "b": torch.tensor([10.0])}
    gradients = {"a": torch.tensor([3.0, 4.5]), "b": torch.tensor([10.1])}
    assert gradient_difference(gradients, reference, each_tensor=True) == (pytest.approx(0.1), "the gradient of a")
    whole = math.sqrt((0.25 + 0.01) / 125)
    assert gradient_difference(gradients, reference, each_tensor=False) == (
        pytest.approx(whole, rel=1e-5),
        "the whole gradient",
    )


def test_a_tiny_tensor_counts_in_the_whole_only():
    reference = {"a": torch.tensor([1.0]), "b": torch.tensor([1e-7])}
    wrong = {"a": torch.tensor([1.0]), "b": torch.tensor([3e-7])}
    difference, where = gradient_difference(wrong, reference, each_tensor=True)
    assert (difference, where) == (pytest.approx(2e-7, rel=1e-5), "the whole gradient")
    wrong["b"] = torch.tensor([0.5])
    assert gradient_difference(wrong, reference, each_tensor=True)[0] == pytest.approx(0.5)


def test_a_missing_or_nan_gradient_is_detected():
    reference = {"a": torch.tensor([1.0]), "b": torch.tensor([1.0])}
    assert gradient_difference({"a": reference["a"]}, reference, each_tensor=True) == (1.0, "the gradient of b")
    broken = {"a": torch.tensor([float("nan")]), "b": reference["b"]}
    assert gradient_difference(broken, reference, each_tensor=True)[0] == math.inf


def test_relative_differences():
    assert relative_difference(1.1, 1.0) == pytest.approx(0.1)
    assert relative_difference(0.0, 0.0) == 0.0
    assert relative_difference(math.nan, 1.0) == relative_difference(1.0, 0.0) == math.inf
