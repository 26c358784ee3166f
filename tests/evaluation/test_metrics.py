import pytest
import torch

from sft_lightning.evaluation.metrics import answer_metrics


def graded(format_correct, answer_correct, num_tokens, strict=None, entropy=None):
    return {
        "format_correct": format_correct,
        "strict_format_correct": strict,
        "answer_correct": answer_correct,
        "num_tokens": num_tokens,
        "mean_entropy": entropy,
    }


def test_answer_metrics_are_rates_and_means_over_answers():
    samples = [
        graded(True, False, 10, strict=True, entropy=0.5),
        graded(False, True, 30, strict=False, entropy=1.5),
        graded(True, True, 20, strict=False),
    ]
    assert answer_metrics(samples, torch.device("cpu")) == {
        "format_accuracy": pytest.approx(2 / 3, abs=1e-12),
        "strict_format_accuracy": pytest.approx(1 / 3, abs=1e-12),
        "answer_accuracy": pytest.approx(2 / 3, abs=1e-12),
        "mean_reward": pytest.approx(1 / 3, abs=1e-12),
        "response_tokens": 20.0,
        "response_entropy": 1.25,  # of tokens: (10 * 0.5 + 30 * 1.5) / 40
    }


def test_metrics_that_no_answer_has_are_omitted(recwarn):
    values = answer_metrics([graded(True, True, 4)], torch.device("cpu"))
    assert values == {"format_accuracy": 1.0, "answer_accuracy": 1.0, "mean_reward": 1.0, "response_tokens": 4.0}
    assert answer_metrics([], torch.device("cpu")) == {}
    assert not recwarn.list
