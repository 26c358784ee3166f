"""The rows behind a step that must not be taken are named by file and line."""

import numpy as np
import torch

from sft_lightning.data.batch import Example, collate_padded
from sft_lightning.linear_cross_entropy import LabelLosses
from sft_lightning.nonfinite import describe_non_finite


def micro_batch(*lines):
    examples = [Example(np.array([1, 2, 3], dtype=np.int32), 1, f"rows.jsonl:{line}") for line in lines]
    return collate_padded(examples, [1.0] * len(examples), pad_token_id=0)


def losses(*values):
    nll = torch.tensor(values)
    return LabelLosses(weighted_sum=nll.sum(), nll=nll, correct=nll > 0, entropy=None)


def test_only_the_rows_whose_own_loss_is_not_finite_are_named():
    first = (losses(1.0, 2.0, float("nan"), 1.0), micro_batch(3, 8))
    second = (losses(float("inf"), 2.0), micro_batch(5))
    message = describe_non_finite(11, float("nan"), 4.0, [first, second])
    assert message == (
        "loss nan and gradient norm 4.0 in optimizer step 12: stopped before the step, the weights and the last "
        "checkpoint are untouched. Examples: rows.jsonl:8, rows.jsonl:5"
    )


def test_an_overflowing_gradient_names_every_row_and_counts_beyond_eight():
    part = (losses(*[1.0] * 20), micro_batch(*range(1, 11)))
    message = describe_non_finite(0, 1.0, float("inf"), [part])
    named = ", ".join(f"rows.jsonl:{line}" for line in range(1, 9))
    assert message.endswith(f"Examples: {named} and 2 more")


def test_the_dummy_row_of_an_empty_micro_batch_is_never_named():
    empty = collate_padded([], [], pad_token_id=0)
    message = describe_non_finite(0, float("nan"), 1.0, [(losses(float("nan")), empty)])
    assert message.endswith("Examples: ")
