"""Compute the selftest's reference: each row alone through the model's own forward, and the loss by its formula."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from sft_lightning.data.batch import Example
from sft_lightning.data.batching.collate import collate
from sft_lightning.losses.base import Loss
from sft_lightning.losses.model_hooks import label_losses

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, slots=True)
class Step:
    """An optimizer step: its rows as sorted ``file:line``, its loss, and its gradients on the CPU."""

    sources: tuple[str, ...]
    loss: float
    gradients: dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class Weighting:
    """The weighting of rows in a step's loss: ``data.loss_normalization`` and ``data.normalize_constant``."""

    normalization: str
    constant: float

    def weight(self, rows: Sequence[Example], row: Example) -> float:
        """Returns the weight of each of the row's labels, without the weights of its record and of its spans."""
        if self.normalization == "token":
            return 1.0 / sum(each.num_labels for each in rows)
        if self.normalization == "sequence":
            return 1.0 / (len(rows) * row.num_labels)
        assert self.normalization == "constant"
        return 1.0 / (len(rows) * self.constant)


def reference_step(
    model: "PreTrainedModel",
    rows: Sequence[tuple[Example, float]],
    weighting: Weighting,
    precision: Callable[[], AbstractContextManager],
    loss: Loss | None = None,
) -> Step:
    """Computes a step from the model's own logits, one row at a time, with a plain cross-entropy in float32.

    Args:
        model: On its device; its gradients are overwritten.
        rows: The step's examples and their record weights.
        weighting: Normalization of the loss.
        precision: Returns a context manager that enters the precision of training.
        loss: Replaces the cross-entropy.
    """
    model.zero_grad(set_to_none=True)
    examples = [example for example, _ in rows]
    total = 0.0
    for example, record_weight in rows:
        with precision():
            logits, labels = _own_logits(model, example)
            weights = (weighting.weight(examples, example) * record_weight * _span_weights(example)).to(logits)
            if loss is None:
                part = (F.cross_entropy(logits, labels, reduction="none") * weights).sum()
            else:
                part = loss.from_logits(logits, labels, weights).weighted_sum
        part.backward()
        total += float(part.detach())
    sources = tuple(sorted(example.source for example in examples))
    step = Step(sources, total, gradients_of(model))
    model.zero_grad(set_to_none=True)
    return step


def own_losses(model: "PreTrainedModel", example: Example) -> Tensor:
    """Returns the cross-entropy of each label of a row by the model's own logits. Shape [M], at least float32."""
    return F.cross_entropy(*_own_logits(model, example), reduction="none")


def _own_logits(model: "PreTrainedModel", example: Example) -> tuple[Tensor, Tensor]:
    """Returns the model's own logits at a row's label positions, shape [M, V], at least float32; and the labels."""
    logits, labels = [], []
    for tokens, label_spans in example.sequences:
        ids = torch.as_tensor(tokens.astype("int64"), device=model.device)
        own = model(input_ids=ids[None, :-1], use_cache=False).logits[0]
        for start, end, _ in label_spans:
            logits.append(own[start - 1 : end - 1].to(torch.promote_types(own.dtype, torch.float32)))
            labels.append(ids[start:end])
    return torch.cat(logits), torch.cat(labels)


def _span_weights(example: Example) -> Tensor:
    """Returns the weight of each label's span. Shape [M], float64."""
    spans = [span for sequence in example.sequences for span in sequence.label_spans]
    weights = torch.tensor([span.weight for span in spans], dtype=torch.float64)
    return weights.repeat_interleave(torch.tensor([span.end - span.start for span in spans]))


def chunked_loss_difference(
    model: "PreTrainedModel", rows: Sequence[tuple[Example, float]], precision: Callable[[], AbstractContextManager]
) -> float:
    """Returns the largest difference between a label's chunked and plain loss, relative to the mean plain loss."""
    ours, expected = [], []
    with torch.no_grad(), precision():
        for example, _ in rows:
            batch = collate([example], [1.0], layout="padded", pad_token_id=0).to(model.device)
            ours.append(label_losses(model, batch).nll.double())
            expected.append(own_losses(model, example).double())
    reference = torch.cat(expected)
    ratio = (torch.cat(ours) - reference).abs().max() / reference.mean()
    return float(ratio.nan_to_num(nan=float("inf")))


def gradients_of(model: "PreTrainedModel") -> dict[str, Tensor]:
    """Returns copies of all gradients on the CPU, by parameter name."""
    return {name: p.grad.detach().to("cpu", copy=True) for name, p in model.named_parameters() if p.grad is not None}
