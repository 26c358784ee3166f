"""Load a module from a checkpoint, without a Trainer."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sft_lightning.checkpointing import folder as folders
from sft_lightning.checkpointing.io import model_weights
from sft_lightning.errors import UserError
from sft_lightning.models.compilation import compile_layers
from sft_lightning.models.loading import load_model
from sft_lightning.system.files import user_path

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def read_module(path: str | Path) -> tuple[dict[str, Any], dict[str, Tensor] | None]:
    """Returns the arguments of a saved ``SFTModule`` and the weights of its model.

    Args:
        path: A folder with a model, such as ``checkpoint-<step>`` or ``final``, or a ``.ckpt`` file of Lightning.

    Returns:
        The arguments by name, and the weights by the names of ``module.model``. The weights are None for a folder,
        which is the ``model_path`` among the arguments.

    Raises:
        UserError: If there is nothing at the path, it is damaged, or it holds anything but tensors and plain values.
    """
    place = Path(user_path(path))
    if place.is_dir():
        if (place / folders.MANIFEST).is_file():
            folders.verify(place)
        state = place / folders.TRAINER_STATE
        saved = _load(state)["hyper_parameters"] if state.is_file() else {}
        return {**saved, "model_path": str(place), "init": "pretrained"}, None
    if not place.is_file():
        raise UserError(f"checkpoint '{path}' is neither a folder nor a .ckpt file")
    content = _load(place)
    if not {"hyper_parameters", "state_dict"} <= content.keys():
        raise UserError(f"checkpoint '{path}' has no hyper_parameters or no state_dict: Lightning did not write it")
    return content["hyper_parameters"], model_weights(content["state_dict"])


def load_saved_model(
    arguments: Mapping[str, Any], weights: Mapping[str, Tensor] | None, *, strict: bool
) -> "PreTrainedModel":
    """Returns the model of a saved module, in float32.

    Args:
        arguments: Of the module.
        weights: From :func:`read_module`; None loads those in the folder ``model_path``.
        strict: Whether ``weights`` must be exactly those of the model.

    Raises:
        UserError: If the model cannot be loaded, or the weights are those of another one.
    """
    options = {name: arguments[name] for name in ("attn_implementation", "gradient_checkpointing")}
    model = load_model(arguments["model_path"], init=arguments["init"] if weights is None else "random", **options)
    if weights is not None:
        try:
            model.load_state_dict(weights, strict=strict)
        except RuntimeError as error:
            raise UserError(
                f"model.model_path '{arguments['model_path']}' is not the model of the checkpoint: {error}"
            ) from error
    if arguments["compile"]:
        compile_layers(model)
    return model


def _load(path: Path) -> dict[str, Any]:
    try:
        # Mapped, since the moments of the optimizer are not read.
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # a broken or hostile pickle may raise anything
        raise UserError(
            f"checkpoint '{path}' is damaged, or holds something else than tensors and plain values"
        ) from error
    if not isinstance(content, dict):
        raise UserError(f"checkpoint '{path}' holds a {type(content).__name__} instead of a dictionary")
    return content
