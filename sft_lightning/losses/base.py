"""Define the interface of losses, which are computed at label positions."""

from abc import ABC, abstractmethod
from typing import NamedTuple

from torch import Tensor


class LabelLosses(NamedTuple):
    """Losses of the labels of a micro-batch.

    Attributes:
        weighted_sum: Scalar, float32 (float64 for float64 logits), with gradient: the sum over labels of the loss times
            its weight.
        nll: Shape [M], dtype of ``weighted_sum``, in nats, without gradient.
        correct: Shape [M], bool: whether the most likely token is the label. The first of equally likely ones counts,
            as in argmax.
        entropy: Shape [M], dtype of ``weighted_sum``, in nats, without gradient. None if it was not requested.
    """

    weighted_sum: Tensor
    nll: Tensor
    correct: Tensor
    entropy: Tensor | None


class Loss(ABC):
    """The loss of a micro-batch's labels, given as ``SFTModule(loss=...)`` or ``model.loss`` by ``class_path``.

    Public attributes are its settings: a run resumes only with the same ones.
    """

    @abstractmethod
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
        """Returns the losses for a linear output embedding, without logits of all labels in memory at once.

        The logits are ``scale * (hidden @ weight.T + bias)``, then ``softcap * tanh(logits / softcap)``.

        Args:
            hidden: Shape [M, D], the hidden states that predict the labels.
            weight: Shape [V, D], of the output embedding.
            bias: Shape [V], or None.
            labels: Shape [M], int64, in [0, V).
            loss_weights: Shape [M], float64, the weight of each label in the sum.
            scale: Factor of the logits.
            softcap: Bound of the logits.
            with_entropy: Whether to compute ``entropy``.
        """

    @abstractmethod
    def from_logits(
        self, logits: Tensor, labels: Tensor, loss_weights: Tensor, *, with_entropy: bool = False
    ) -> LabelLosses:
        """Returns the losses for a model that computes its logits in another way.

        Args:
            logits: Shape [M, V], any floating dtype, with gradient.
            labels: Shape [M], int64, in [0, V).
            loss_weights: Shape [M], float64, the weight of each label in the sum.
            with_entropy: Whether to compute ``entropy``.
        """
