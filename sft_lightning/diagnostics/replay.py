"""Run each row of a step alone to find its loss, its gradient norm and its first non-finite tensor."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from math import isfinite
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sft_lightning.data.batch import Example, Layout
from sft_lightning.data.batching.collate import collate
from sft_lightning.distributed.fsdp import gradient_norm
from sft_lightning.losses.model_hooks import label_losses
from sft_lightning.models.precision import Precision

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, slots=True)
class ReplayedRow:
    """The result of one row.

    Attributes:
        source: ``file:line``.
        loss: Mean over its labels, in nats.
        gradient_norm: Norm of the gradient of that loss.
        first_not_finite: The first activation of the forward pass, or else the first gradient of the backward pass,
            that holds NaN or infinity; None if all are finite.
    """

    source: str
    loss: float
    gradient_norm: float
    first_not_finite: str | None

    @property
    def is_finite(self) -> bool:
        return isfinite(self.loss) and isfinite(self.gradient_norm)


def replay_rows(
    model: "PreTrainedModel", examples: Sequence[Example], *, layout: Layout, precision: Precision, pad_token_id: int
) -> Iterator[ReplayedRow]:
    """Yields the result of each row alone, without dropout. Clears the model's gradients.

    Args:
        model: Model from ``load_model``.
        examples: The rows.
        layout: Layout of the run.
        precision: Precision of training.
        pad_token_id: Token id of padding.
    """
    device = model.device
    model.eval()
    for example in examples:
        batch = collate([example], [1 / example.num_labels], layout=layout, pad_token_id=pad_token_id).to(device)
        model.zero_grad()
        with _first_not_finite(model) as found:
            with _autocast(device, precision):
                losses = label_losses(model, batch)
            if not found and not losses.weighted_sum.isfinite():
                found.append("the logits or their loss")
            losses.weighted_sum.backward()
        norm = gradient_norm(p.grad for p in model.parameters() if p.grad is not None)
        yield ReplayedRow(example.source, losses.weighted_sum.item(), norm.item(), found[0] if found else None)
    model.zero_grad()


def weights_not_finite(model: nn.Module) -> list[str]:
    """Returns the names of a model's parameters that hold NaN or infinity."""
    return [name for name, parameter in model.named_parameters() if not parameter.isfinite().all()]


def _autocast(device: torch.device, precision: Precision) -> AbstractContextManager[Any]:
    if precision.autocast_dtype is None:
        return nullcontext()
    return torch.autocast(device.type, dtype=precision.autocast_dtype, cache_enabled=False)


@contextmanager
def _first_not_finite(model: nn.Module) -> Iterator[list[str]]:
    """Collects the names of activations and gradients that are not finite, in the order of computation."""
    found: list[str] = []
    hooks = []

    def look(what: str, values: Any) -> None:
        for value in values if isinstance(values, tuple) else (values,):
            if isinstance(value, Tensor) and value.is_floating_point() and not value.isfinite().all():
                found.append(what)
                return

    # A module's hook runs after those of its submodules, so the innermost one is named first.
    for name, module in model.named_modules():
        if name:
            what = f"activation of {name}"
            hooks.append(module.register_forward_hook(lambda _, __, output, what=what: look(what, output)))
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            what = f"gradient of {name}"
            hooks.append(parameter.register_post_accumulate_grad_hook(lambda p, what=what: look(what, p.grad)))
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()
