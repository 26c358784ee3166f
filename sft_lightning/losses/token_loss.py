"""Compute the cross-entropy of each label token, the default loss."""

import torch
from torch import Tensor

from sft_lightning.losses.base import LabelLosses, Loss
from sft_lightning.losses.functional import compute_entropy, token_nll
from sft_lightning.losses.linear_cross_entropy import linear_cross_entropy


class TokenLoss(Loss):
    """The weighted sum of the labels' negative log-likelihood."""

    def from_hidden(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        loss_weights: Tensor,
        *,
        scale: float | None = None,
        softcap: float | None = None,
        with_entropy: bool = False,
    ) -> LabelLosses:
        return linear_cross_entropy(
            hidden, weight, bias, labels, loss_weights, scale=scale, softcap=softcap, with_entropy=with_entropy
        )

    def from_logits(
        self, logits: Tensor, labels: Tensor, loss_weights: Tensor, *, with_entropy: bool = False
    ) -> LabelLosses:
        nll = token_nll(logits, labels)
        entropy = None
        if with_entropy:
            with torch.no_grad():
                entropy = compute_entropy(logits)
        return LabelLosses(
            weighted_sum=(loss_weights.to(nll.dtype) * nll).sum(),
            nll=nll.detach(),
            correct=logits.argmax(-1) == labels,
            entropy=entropy,
        )
