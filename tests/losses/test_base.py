import pytest
import torch

from sft_lightning.losses.base import Loss
from sft_lightning.losses.token_loss import TokenLoss


class DoubledLoss(TokenLoss):
    """Twice the cross-entropy; the nll that is logged stays plain."""

    def from_hidden(self, *args, **kwargs):
        losses = super().from_hidden(*args, **kwargs)
        return losses._replace(weighted_sum=2 * losses.weighted_sum)


def test_a_loss_must_implement_both_methods():
    class OnlyLogits(Loss):
        def from_logits(self, logits, labels, loss_weights, *, with_entropy=False):
            raise NotImplementedError

    with pytest.raises(TypeError, match="from_hidden"):
        OnlyLogits()


def test_the_training_loss_replaces_the_objective_and_leaves_validation_plain(fit, make_trainer, val_file):
    options = {"data": {"val_path": val_file}, "max_steps": 1, "gradient_clip_val": None}
    plain, doubled = (
        fit(model={"loss": loss, "learning_rate": 0.0}, logger=make_trainer().logger, **options)
        for loss in (None, DoubledLoss())
    )
    assert doubled.losses == [2 * plain.losses[0]]
    for name, gradient in plain.gradients[0].items():
        assert torch.equal(doubled.gradients[0][name], 2 * gradient), name
    (validated,) = doubled.trainer.validate(doubled.module, doubled.trainer.datamodule, verbose=False)
    (expected,) = plain.trainer.validate(plain.module, plain.trainer.datamodule, verbose=False)
    assert validated["val/loss"] == expected["val/loss"]
