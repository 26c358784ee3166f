"""Compare the reference with the table of loss weights, calculated by hand."""

from contextlib import nullcontext

import numpy as np
import pytest
import torch

from sft_lightning.data.batch import Example, LabelSpan, TokenSequence
from sft_lightning.diagnostics.selftest import reference
from sft_lightning.diagnostics.selftest.reference import Weighting, chunked_loss_difference, own_losses, reference_step
from sft_lightning.models.loading import load_model
from sft_lightning.models.precision import Precision

ROWS = [
    Example.from_prompt(np.arange(10, 18, dtype=np.int32), 5, "b:1"),  # three labels
    Example.from_prompt(np.arange(30, 36, dtype=np.int32), 5, "a:2"),  # one label
]


@pytest.fixture
def model(model_folder):
    return load_model(model_folder).eval()


@pytest.mark.parametrize(
    ("normalization", "expected"), [("token", [1 / 4, 1 / 4]), ("sequence", [1 / 6, 1 / 2]), ("constant", [1 / 20] * 2)]
)
def test_weights_of_labels(normalization, expected):
    weighting = Weighting(normalization, 10.0)
    assert [weighting.weight(ROWS, row) for row in ROWS] == pytest.approx(expected)


def test_a_step_is_the_mean_over_labels_with_record_weights(model):
    losses = [own_losses(model, row).detach() for row in ROWS]
    assert [len(each) for each in losses] == [3, 1]
    step = reference_step(model, [(ROWS[0], 1.0), (ROWS[1], 0.5)], Weighting("token", 1.0), nullcontext)
    assert step.loss == pytest.approx(float(losses[0].sum() + 0.5 * losses[1].sum()) / 4, rel=1e-6)
    assert step.sources == ("a:2", "b:1")
    assert step.gradients.keys() == dict(model.named_parameters()).keys()
    assert all(p.grad is None for p in model.parameters())


def test_the_gradient_is_that_of_the_loss(model):
    step = reference_step(model, [(row, 1.0) for row in ROWS], Weighting("token", 1.0), nullcontext)
    double = load_model(model.name_or_path, precision=Precision.named("64-true")).eval()
    ids = [torch.tensor(row.sequences[0].tokens).long() for row in ROWS]
    nll = [-double(input_ids=one[None]).logits[0, 4:-1].log_softmax(-1).gather(-1, one[5:, None]).sum() for one in ids]
    (sum(nll) / 4).backward()
    for name, parameter in double.named_parameters():
        difference = (step.gradients[name].double() - parameter.grad).norm() / parameter.grad.norm()
        assert difference <= 1e-5, name  # float32 against float64; single elements near 0 may differ by more


def test_sequences_are_alone_and_span_weights_multiply_the_loss(model):
    tokens = np.arange(10, 18, dtype=np.int32)
    sequences = (
        TokenSequence(tokens, (LabelSpan(2, 4, 0.5), LabelSpan(7, 8))),
        TokenSequence(tokens[:5], (LabelSpan(3, 5, 2.0),)),
    )
    row = Example(sequences, "a:1")
    losses = own_losses(model, row).detach().tolist()
    logits = [model(input_ids=torch.tensor(one.tokens)[None].long()).logits[0].log_softmax(-1) for one in sequences]
    expected = [-logits[0][place, tokens[place + 1]].item() for place in (1, 2, 6)]
    expected += [-logits[1][place, tokens[place + 1]].item() for place in (2, 3)]
    assert losses == pytest.approx(expected, rel=1e-5)
    step = reference_step(model, [(row, 3.0)], Weighting("token", 1.0), nullcontext)
    weighted = sum(weight * loss for weight, loss in zip([0.5, 0.5, 1.0, 2.0, 2.0], losses, strict=True))
    assert step.loss == pytest.approx(3.0 * weighted / 5, rel=1e-5)
    assert chunked_loss_difference(model, [(row, 1.0)], nullcontext) < 1e-6


def test_a_chunked_loss_that_is_wrong_in_one_label_shows(model, monkeypatch):
    rows = [(row, 1.0) for row in ROWS]
    assert chunked_loss_difference(model, rows, nullcontext) < 1e-6
    right = reference.label_losses

    def wrong(model, batch):
        losses = right(model, batch)
        losses.nll[-1] += 0.01
        return losses

    monkeypatch.setattr(reference, "label_losses", wrong)
    assert 1e-3 < chunked_loss_difference(model, rows, nullcontext) < 1e-2
