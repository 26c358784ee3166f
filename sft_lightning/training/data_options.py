"""Checks of the options under ``data``: each alone, against the run, against those that a checkpoint came from."""

from collections.abc import Mapping
from typing import Any

from sft_lightning.errors import UserError


def check_at_least(least: int, **options: int | None) -> None:
    """Raises UserError that names the first option below ``least``. None stands for an option that is not set."""
    for name, value in options.items():
        if value is not None and value < least:
            raise UserError(f"data.{name} must be at least {least}, got {value}")


def sets_of_run(function: str | None, paths: Mapping[str, str | None]) -> list[str]:
    """Returns which of the sets ``train``, ``val`` and ``test`` a run reads, those that it must have first.

    Args:
        function: Of the Trainer: fit, validate, test or predict.
        paths: Where each set lies; None where there is none.
    """
    assert function is not None
    needed, optional = {
        "fit": (["train"], ["val"]),
        "validate": (["val"], []),
        "test": (["test"], []),
        "predict": ([], []),
    }[function]
    return needed + [name for name in optional if paths[name] is not None]


def check_same_steps(own: Mapping[str, Any], saved: Mapping[str, Any]) -> None:
    """Raises UserError that names the first difference in what the tokens and the steps of two runs follow from.

    Args:
        own: Of the run that is to go on.
        saved: Of the checkpoint. A name that one of the two lacks counts as None.
    """
    for name in {**own, **saved}:
        if own.get(name) != saved.get(name):
            raise UserError(
                f"cannot resume: {name} is {own.get(name)!r}, the checkpoint was trained with {saved.get(name)!r}; "
                "set it back, or start from the checkpoint's weights with --model.model_path"
            )
