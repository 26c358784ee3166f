"""Compute learning rates as pure functions of the optimizer step."""

import math
from typing import Literal

from sft_lightning.errors import UserError

Schedule = Literal["constant", "cosine", "linear"]


def learning_rate_factor(
    step: int, *, schedule: Schedule, total_steps: int, warmup_steps: int, min_factor: float
) -> float:
    """Returns the factor of the peak learning rate in one optimizer step.

    Warm-up rises linearly, ``(step + 1) / warmup_steps``, and reaches 1 in its last step. Then ``constant`` stays at 1,
    and ``linear`` and ``cosine`` decay towards ``min_factor``, which they reach at ``total_steps``, one after the run's
    last step, so that no step has a learning rate of 0.

    Args:
        step: Optimizer steps already taken, so 0 in the first one.
        schedule: ``constant``, ``cosine`` or ``linear``.
        total_steps: Optimizer steps of the whole run.
        warmup_steps: Length of the warm-up.
        min_factor: Final factor of ``cosine`` and ``linear``, in [0, 1].

    Raises:
        UserError: If ``schedule`` is unknown.

    Example:
        >>> options = dict(schedule="linear", total_steps=6, warmup_steps=2, min_factor=0.0)
        >>> [learning_rate_factor(step, **options) for step in range(6)]
        [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]
    """
    if schedule not in ("constant", "cosine", "linear"):
        raise UserError(f"schedule '{schedule}' is unknown; choose constant, cosine or linear")
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if schedule == "constant":
        return 1.0
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    remaining = 1.0 - progress if schedule == "linear" else (1.0 + math.cos(math.pi * progress)) / 2.0
    return min_factor + (1.0 - min_factor) * remaining


def resolve_warmup_steps(total_steps: int, *, warmup_steps: int = 0, warmup_ratio: float = 0.0) -> int:
    """Returns the length of the warm-up in optimizer steps.

    Args:
        total_steps: Optimizer steps of the whole run.
        warmup_steps: Optimizer steps; 0 if the ratio is given.
        warmup_ratio: Share of ``total_steps``, rounded to the nearest whole step; 0 if the steps are given.

    Raises:
        UserError: If both are given, or one is out of range.

    Example:
        >>> resolve_warmup_steps(200, warmup_ratio=0.05)
        10
    """
    if warmup_steps and warmup_ratio:
        raise UserError(
            f"warmup_steps {warmup_steps} and warmup_ratio {warmup_ratio} are both given; set one of them to 0"
        )
    if not warmup_steps >= 0 or warmup_steps % 1:
        raise UserError(
            f"warmup_steps {warmup_steps} is not a number of optimizer steps; for a share of them use warmup_ratio"
        )
    if not 0.0 <= warmup_ratio <= 1.0:
        raise UserError(f"warmup_ratio {warmup_ratio} is outside of [0, 1]; it is a share of the run's steps")
    return warmup_steps or round(warmup_ratio * total_steps)
