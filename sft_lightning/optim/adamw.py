"""AdamW with decay groups, and learning-rate schedules as pure functions of the optimizer step."""

import math
from collections.abc import Mapping
from typing import Any, Literal

from torch import Tensor, nn
from torch.optim import AdamW

from sft_lightning.errors import UserError

Schedule = Literal["constant", "cosine", "linear"]


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Returns the trainable parameters as optimizer groups: decayed ones, then those without weight decay.

    Decayed are the matrices: what has two or more dimensions and is no embedding, norm weight or bias. A tensor
    tied to an embedding counts as one. Every tensor stands once, also where modules share it; what has
    ``requires_grad`` False is left out, and so is a group that would be empty.

    Args:
        model: Any module.
        weight_decay: For the decayed group.

    Returns:
        Dicts with ``params`` and ``weight_decay``, in the model's order of parameters.

    Example:
        >>> groups = parameter_groups(nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3)), 0.1)
        >>> [(group["weight_decay"], [tuple(p.shape) for p in group["params"]]) for group in groups]
        [(0.1, [(3, 2)]), (0.0, [(3,), (3,), (3,)])]
    """
    undecayed = {
        id(parameter)
        for module in model.modules()
        for name, parameter in module.named_parameters(recurse=False)
        if not _is_decayed(module, name, parameter)
    }
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in trainable if id(p) not in undecayed], "weight_decay": weight_decay},
        {"params": [p for p in trainable if id(p) in undecayed], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def build_adamw(
    model: nn.Module,
    *,
    learning_rate: float,
    weight_decay: float,
    betas: tuple[float, float],
    eps: float,
    fused: bool,
) -> AdamW:
    """Returns AdamW over the model's parameter groups.

    Args:
        model: The module to train.
        learning_rate: Peak rate; a schedule multiplies it.
        weight_decay: For the decayed group, see ``parameter_groups``.
        betas: Decay rates of the running mean and of the running mean square of the gradient.
        eps: Added to the denominator.
        fused: One kernel for the whole update. False leaves torch its own choice of the others.

    Raises:
        UserError: If the model has no trainable parameter or a number is out of its range.
    """
    groups = parameter_groups(model, weight_decay)
    if not groups:
        raise UserError("the model has no parameter to train: requires_grad is False everywhere")
    try:
        # torch takes fused=False as an order to loop over single tensors, its slowest way; None lets it choose.
        # The groups have their own weight_decay; torch looks at the one passed here when it checks the range.
        return AdamW(groups, lr=learning_rate, betas=betas, eps=eps, weight_decay=weight_decay, fused=fused or None)
    except ValueError as error:
        raise UserError(f"the optimizer refuses its options: {error}") from error


def learning_rate_factor(
    step: int, *, schedule: Schedule, total_steps: int, warmup_steps: int, min_factor: float
) -> float:
    """Returns what the peak learning rate is multiplied by in one optimizer step.

    Warm-up rises in equal parts, ``(step + 1) / warmup_steps``, and is at 1 in its last step. Then ``constant``
    stays at 1, and ``linear`` and ``cosine`` fall towards ``min_factor``, which they reach at ``total_steps``, one
    after the run's last step: no step is spent on a rate of 0.

    Args:
        step: Optimizer steps already taken, so 0 in the first one.
        schedule: ``constant``, ``cosine`` or ``linear``.
        total_steps: Optimizer steps of the whole run.
        warmup_steps: Length of the warm-up.
        min_factor: Where ``cosine`` and ``linear`` end, in [0, 1].

    Raises:
        UserError: If ``schedule`` is none of the three.

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
    """Returns the length of the warm-up in optimizer steps, given as such or as a share of the run.

    Args:
        total_steps: Optimizer steps of the whole run.
        warmup_steps: Optimizer steps; 0 where the ratio decides.
        warmup_ratio: Share of ``total_steps``, rounded to the nearest whole step; 0 where the steps decide.

    Raises:
        UserError: If both are given, or one is out of its range.

    Example:
        >>> resolve_warmup_steps(200, warmup_ratio=0.05)
        10
    """
    if warmup_steps and warmup_ratio:
        raise UserError(
            f"warmup_steps {warmup_steps} and warmup_ratio {warmup_ratio} are both given; set one of them to 0"
        )
    if warmup_steps < 0:
        raise UserError(f"warmup_steps {warmup_steps} is negative; give 0 or more optimizer steps")
    if not 0.0 <= warmup_ratio <= 1.0:
        raise UserError(f"warmup_ratio {warmup_ratio} is outside of [0, 1]; it is a share of the run's steps")
    return warmup_steps or round(warmup_ratio * total_steps)


def adopt_settings(
    checkpoint: dict[str, Any], model: nn.Module, settings: Mapping[str, Any], schedule_settings: Mapping[str, Any]
) -> None:
    """Puts a run's settings into the optimizer and the schedule of the checkpoint that it goes on from.

    The run may have more or fewer steps than the saved one, and so another factor in the same step.

    Args:
        checkpoint: As Lightning hands it to ``on_load_checkpoint``, changed in place.
        model: The module to train.
        settings: ``learning_rate``, ``weight_decay``, ``betas`` and ``eps``.
        schedule_settings: Keywords of ``learning_rate_factor``.
    """
    peak = settings["learning_rate"]
    (schedule,) = checkpoint["lr_schedulers"]
    schedule["base_lrs"] = [peak] * len(schedule["base_lrs"])
    factor = learning_rate_factor(schedule["last_epoch"], **schedule_settings)
    own_groups = parameter_groups(model, settings["weight_decay"])
    for group, own in zip(checkpoint["optimizer_states"][0]["param_groups"], own_groups, strict=True):
        group.update(lr=peak * factor, initial_lr=peak, betas=tuple(settings["betas"]), eps=settings["eps"])
        group["weight_decay"] = own["weight_decay"]


def _is_decayed(module: nn.Module, name: str, parameter: Tensor) -> bool:
    # Dimensions alone do not tell: some norms have a weight for each head, some layers a bias for each expert.
    is_norm = "norm" in type(module).__name__.lower()
    return parameter.ndim >= 2 and not (isinstance(module, nn.Embedding) or is_norm or name.endswith("bias"))
