"""Check that values read from a checkpoint have the names and the types that a run goes on to use."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from sft_lightning.errors import UserError


def require(is_right: bool, name: str, problem: str) -> None:
    """Raises UserError that a saved value cannot be used, unless ``is_right``."""
    if not is_right:
        raise UserError(
            f"cannot resume: in trainer_state.ckpt {name} {problem}: the file was altered, or another version wrote "
            "it; name another checkpoint, or start from the weights of this one with --model.model_path"
        )


def require_form(saved: Any, like: Any, name: str) -> None:
    """Raises UserError at the first place where a saved value has another form than an example of it.

    Args:
        saved: Read from a checkpoint.
        like: The example. A dict needs all keys of the example's, and may have others. Each element of a list has the
            form of the example's only element, any form if the example is empty. A tensor stands for tensors of as
            many elements, a number for all numbers, and None for everything.
        name: Of the value, for the message.
    """
    if like is None:
        return
    if isinstance(like, Mapping):
        require(isinstance(saved, Mapping), name, "is not a dictionary")
        for key, value in like.items():
            require(key in saved, name, f"has no {key!r}")
            require_form(saved[key], value, f"{name}[{key!r}]")
    elif isinstance(like, list | tuple):
        require(isinstance(saved, list | tuple), name, "is not a list")
        for number, one in enumerate(saved if like else ()):
            require_form(one, like[0], f"{name}[{number}]")
    elif isinstance(like, int | float):
        require(isinstance(saved, int | float), name, "is not a number")
    else:
        kind = Tensor if isinstance(like, Tensor) else type(like)
        require(isinstance(saved, kind), name, f"is not a {kind.__name__}")
        if isinstance(like, Tensor):
            require(saved.numel() == like.numel(), name, f"has {saved.numel()} elements, not {like.numel()}")
