"""Compare the settings and the steps of a run with those of the checkpoint that it resumes from."""

from collections.abc import Mapping
from typing import Any

from torch.optim import AdamW

from sft_lightning.errors import UserError
from sft_lightning.losses.base import Loss
from sft_lightning.losses.token_loss import TokenLoss
from sft_lightning.optim.factory import OptimizerFactory, arguments_of, target_of
from sft_lightning.system.identity import identity, public_name

# What may differ between a checkpoint and a run that resumes from it only if resume_override is set.
_SETTINGS = (
    "loss",
    "optimizer",
    "learning_rate",
    "weight_decay",
    "betas",
    "eps",
    "lr_schedule",
    "warmup_steps",
    "warmup_ratio",
    "min_lr_factor",
)
_DEFAULT_OPTIMIZER = public_name(AdamW)


def optimizer_identity(factory: OptimizerFactory | None) -> str | None:
    """Returns a text of an optimizer's class and arguments, None for the default optimizer.

    Raises:
        UserError: If the factory cannot be called with parameter groups and ``lr``.
    """
    if factory is None:
        return None
    arguments = {name: tuple(v) if isinstance(v, list) else v for name, v in arguments_of(factory).items()}
    described = ", ".join(f"{name}={identity(value)}" for name, value in sorted(arguments.items()))
    return f"{public_name(target_of(factory))}({described})"


def loss_identity(loss: Loss | None) -> str | None:
    """Returns a text of a loss's class and settings, None for the default loss."""
    default = identity(TokenLoss())
    text = default if loss is None else identity(loss)
    return None if text == default else text


def check_resumable(saved: Mapping[str, Any], current: Mapping[str, Any], *, override: bool) -> None:
    """Checks that a run may resume from a checkpoint.

    Args:
        saved: Hyperparameters in the checkpoint, with the identities of ``optimizer`` and ``loss``.
        current: Those of the run.
        override: Whether settings may differ. The class of the optimizer may not, since its state would not fit.

    Raises:
        UserError: For the first setting that differs.
    """
    old_class, new_class = (_optimizer_class(settings.get("optimizer")) for settings in (saved, current))
    if old_class != new_class:
        raise UserError(
            f"model.optimizer is {new_class}, but the checkpoint holds the state of {old_class}: set it back, "
            "or start a new run from the checkpoint's weights with --model.model_path"
        )
    for name in () if override else _SETTINGS:
        old, new = saved.get(name), current[name]
        if _as_list(old) != _as_list(new):
            raise UserError(
                f"model.{name} is {new}, but the checkpoint was trained with {old}: set it back, "
                "or pass --resume_override to continue with the new one"
            )


def check_same_steps(own: Mapping[str, Any], saved: Mapping[str, Any]) -> None:
    """Raises UserError that names the first difference in what decides the tokens and the steps of two runs.

    Args:
        own: Of the run that is to continue.
        saved: Of the checkpoint. A name that one of the two lacks counts as None.
    """
    for name in {**own, **saved}:
        if own.get(name) != saved.get(name):
            raise UserError(
                f"cannot resume: {name} is {own.get(name)!r}, the checkpoint was trained with {saved.get(name)!r}; "
                "set it back, or start from the checkpoint's weights with --model.model_path"
            )


def _optimizer_class(text: str | None) -> str:
    return _DEFAULT_OPTIMIZER if text is None else text.partition("(")[0]


def _as_list(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value  # YAML has no tuples
