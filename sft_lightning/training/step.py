"""Collect the micro-batches of an optimizer step and reduce them once to the step's numbers."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from sft_lightning.data.batch import MicroBatch
from sft_lightning.distributed.fsdp import gradient_norm
from sft_lightning.lightning_compat.trainer import replicas
from sft_lightning.losses.base import LabelLosses


class MicroBatchLosses(NamedTuple):
    """A micro-batch of this process and the losses of its labels, without gradient."""

    losses: LabelLosses
    batch: MicroBatch


@dataclass(frozen=True, slots=True)
class StepStats:
    """Numbers of an optimizer step before it is taken, the same in all processes.

    Attributes:
        loss: The step's exact loss, in nats.
        grad_norm: L2 norm of the gradient, before clipping.
        token_accuracy: Share of the labels that are the most likely token.
        entropy: Mean entropy of the predictions at label positions, in nats; 0 if it was not computed.
        num_labels: Label tokens of the step.
        stop_requested: Whether any process was asked to stop.
    """

    loss: float
    grad_norm: float
    token_accuracy: float
    entropy: float
    num_labels: int
    stop_requested: bool


class StepAccumulator:
    """Collects the micro-batches of the current optimizer step.

    Attributes:
        micro_batches: Those of the current step so far.
        batch: The micro-batch that was added last.
        grad_norm: Gradient norm of the last reduced step, before clipping: a scalar on its device, for clipping.
    """

    def __init__(self) -> None:
        self.micro_batches: list[MicroBatchLosses] = []
        self.batch: MicroBatch | None = None
        self.grad_norm: Tensor | None = None

    def clear(self) -> None:
        """Drops the micro-batches, so that the next step starts empty."""
        self.micro_batches = []

    def add(self, losses: LabelLosses, batch: MicroBatch) -> None:
        """Adds a micro-batch of the current step."""
        self.batch = batch
        losses = losses._replace(weighted_sum=losses.weighted_sum.detach())
        self.micro_batches.append(MicroBatchLosses(losses, batch))

    def reduce(self, trainer: Trainer, *, stop_requested: bool) -> StepStats:
        """Returns the step's numbers over all processes.

        This is the step's only reduction, and the only time that the host waits for the device.

        Args:
            trainer: Before an optimizer step, when the gradients are complete.
            stop_requested: Whether this process was asked to stop; a signal may have reached only some of them.
        """
        parameters = trainer.lightning_module.parameters()
        self.grad_norm = gradient_norm(p.grad for p in parameters if p.grad is not None)
        # All processes have the same norm, and still decide by the sum of their shares, so that they decide alike.
        norm_share = (self.grad_norm / replicas(trainer)[0]).view(1)
        own = step_sums(self.micro_batches)
        request = own.new_full((1,), float(stop_requested))
        sums: Tensor = trainer.strategy.reduce(torch.cat([own, request, norm_share.to(own.dtype)]), reduce_op="sum")
        loss, num_correct, entropy_sum, num_labels, num_requests, norm = sums.tolist()
        return StepStats(
            loss=loss,
            grad_norm=norm,
            token_accuracy=num_correct / num_labels,
            entropy=entropy_sum / num_labels,
            num_labels=int(num_labels),
            stop_requested=num_requests > 0,
        )


def step_sums(micro_batches: Sequence[MicroBatchLosses]) -> Tensor:
    """Returns one process's share of an optimizer step's sums, which add up over processes.

    Returns:
        Shape [4], dtype of the losses: the weighted loss; and over all label tokens, without the dummies of empty
        micro-batches, the number predicted right, the sum of entropies in nats (0 if not computed) and the number.
    """
    loss = torch.stack([losses.weighted_sum for losses, _ in micro_batches]).sum()
    filled = [losses for losses, batch in micro_batches if batch.num_rows]
    zero = loss.new_zeros(())
    num_correct = sum((losses.correct.sum() for losses in filled), zero)
    entropy = sum((losses.entropy.sum() for losses in filled if losses.entropy is not None), zero)
    num_labels = loss.new_full((), sum(len(losses.nll) for losses in filled))  # filled on the device, not copied to it
    return torch.stack([loss, num_correct.to(loss.dtype), entropy.to(loss.dtype), num_labels])


def name_sources(sources: Sequence[str]) -> str:
    """Returns the first eight of ``file:line`` sources, and how many more there are."""
    return ", ".join(sources[:8]) + (f" and {len(sources) - 8} more" if len(sources) > 8 else "")
