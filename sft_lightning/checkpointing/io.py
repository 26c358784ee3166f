"""Write and read checkpoints of Lightning as model folders that plain transformers loads."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch import Trainer
from lightning.pytorch import __version__ as lightning_version
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from sft_lightning.checkpointing import folder as folders
from sft_lightning.errors import UserError
from sft_lightning.lightning_compat.trainer import datamodule_of
from sft_lightning.models.loading import save_model
from sft_lightning.system.disk_space import require_space, size_bytes
from sft_lightning.system.files import remove_atomically
from sft_lightning.system.saved_values import require, require_form

_WEIGHTS_PREFIX = "model."
# What Lightning reads before the hooks of a checkpoint. It converts those of older versions.
_NEEDED = {"epoch": 0, "global_step": 0, "pytorch-lightning_version": ""}
_VERSION = re.compile(r"2\.\d+(\.\d+)*((a|b|rc)\d+)?(\.(post|dev)\d+)*")


class HFCheckpointIO(CheckpointIO):
    """Splits a checkpoint of Lightning into a model folder and ``trainer_state.ckpt``, and joins them again."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        state = {name: value for name, value in checkpoint.items() if name != "state_dict"}

        def write(folder: Path) -> None:
            write_model(self._trainer, folder, checkpoint["state_dict"])
            torch.save(state, folder / folders.TRAINER_STATE)

        require_space(Path(path), size_bytes(checkpoint))
        folders.publish(Path(path), write, storage_options or {"step": checkpoint["global_step"]})

    def load_checkpoint(
        self, path: str | Path, map_location: Any = None, weights_only: bool | None = True
    ) -> dict[str, Any]:
        """Returns the checkpoint. Loads only tensors and plain values, regardless of ``weights_only``."""
        folder = Path(path).resolve()
        fitting = self._trainer.state.fn == "fit"
        if not folder.is_dir():
            raise UserError(
                f"--ckpt_path '{path}' is not a folder; name a checkpoint-<step> folder, last, best or auto"
            )
        has_state = (folder / folders.TRAINER_STATE).is_file()
        if (folder / folders.MANIFEST).is_file() or has_state:
            folders.verify(folder)
        if fitting and not has_state:
            raise UserError(
                f"--ckpt_path '{path}' holds a model and no {folders.TRAINER_STATE}, so there is nothing to resume; "
                f"to train from these weights pass --model.model_path '{path}'"
            )
        plain = {"epoch": 0, "global_step": 0, "pytorch-lightning_version": lightning_version, "loops": None}
        state = _read_state(folder / folders.TRAINER_STATE) if fitting else plain
        return {**state, "state_dict": _read_weights(self._trainer, folder)}

    def remove_checkpoint(self, path: str | Path) -> None:
        if Path(path).is_dir():  # Lightning also asks to remove what was never written
            remove_atomically(Path(path))


def write_model(trainer: Trainer, folder: Path, weights: dict[str, Tensor]) -> None:
    """Writes the trained model and its tokenizer. ``weights`` is the state dict of the LightningModule."""
    datamodule = datamodule_of(trainer)
    tokenizer = getattr(datamodule, "tokenizer", None)
    supervised_stop = tokenizer.eos_token_id if tokenizer is not None and datamodule.append_eos else None
    model: Any = trainer.lightning_module.model
    save_model(model, tokenizer, folder, state_dict=model_weights(weights), eos_token_id=supervised_stop)


def model_weights(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the state dict of ``module.model`` from that of the LightningModule."""
    return {name.removeprefix(_WEIGHTS_PREFIX): w for name, w in weights.items() if name.startswith(_WEIGHTS_PREFIX)}


def _read_state(path: Path) -> dict[str, Any]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a broken or hostile pickle may raise anything
        # The message of torch suggests weights_only=False, which would run any code in the file.
        raise UserError(
            f"checkpoint '{path.parent}': {path.name} holds something else than tensors and plain values, or is "
            "damaged; it is not loaded"
        ) from error
    require_form(state, _NEEDED, "the content")
    for name in ("epoch", "global_step"):
        require(type(state[name]) is int and state[name] >= 0, name, "is not a count")
    version = state["pytorch-lightning_version"]
    require(_VERSION.fullmatch(version) is not None, "pytorch-lightning_version", "is not a version of Lightning 2")
    return state


def _read_weights(trainer: Trainer, folder: Path) -> dict[str, Tensor]:
    """Returns the state dict of the module. A tied weight is once on disk, and here under each of its names."""
    stored: dict[str, Tensor] = {}
    for path in sorted(folder.glob("model*.safetensors")):
        try:
            stored |= load_file(path)
        except SafetensorError as error:
            raise UserError(f"checkpoint '{folder}' is damaged: {path.name} cannot be read: {error}") from error
    if not stored:
        raise UserError(f"--ckpt_path '{folder}' holds no model*.safetensors: name a folder with a model")
    own = trainer.lightning_module.state_dict()
    weights = {_WEIGHTS_PREFIX + name: w for name, w in stored.items()}
    names = trainer.lightning_module.named_parameters(remove_duplicate=False)
    names_of: dict[int, list[str]] = {}
    for name, parameter in names:
        names_of.setdefault(id(parameter), []).append(name)
    for tied in names_of.values():
        known = next((weights[name] for name in tied if name in weights), None)
        weights |= {name: known for name in tied if known is not None and name not in weights}
    for name in sorted(own.keys() | weights.keys()):
        if name not in own or name not in weights or own[name].shape != weights[name].shape:
            raise UserError(
                f"--ckpt_path '{folder}' holds another model than model.model_path: "
                f"they differ in {name.removeprefix(_WEIGHTS_PREFIX)}"
            )
    return weights
