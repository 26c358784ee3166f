"""Make Lightning's ModelParallelStrategy write the same checkpoints as every other strategy."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.strategies.strategy import Strategy
from torch import Tensor
from torch.optim import Optimizer

from sft_lightning.distributed.fsdp import as_shard_like, is_sharded, load_sharded, unsharded
from sft_lightning.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class _FullStateDictStrategy(ModelParallelStrategy):
    """Gathers weights and optimizer states on rank 0 for the CheckpointIO, and shards what the CheckpointIO reads.

    Lightning's own class writes folders that only the same strategy reads, or bypasses the CheckpointIO with files in
    which the optimizer's states are numbered in another order than the optimizer's own.
    """

    @property
    def lightning_restore_optimizer(self) -> bool:
        return True

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        # The model is sharded before. As with other strategies, on_fit_start then knows what the run resumes from.
        return False

    def lightning_module_state_dict(self) -> dict[str, Any]:
        assert self.lightning_module is not None
        whole = unsharded(self.lightning_module.state_dict(keep_vars=True), keep=self.is_global_zero)
        return whole if self.is_global_zero else {}

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        return unsharded(getattr(optimizer, "_optimizer", optimizer).state_dict(), keep=self.is_global_zero)

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None) -> None:
        Strategy.save_checkpoint(self, checkpoint, filepath, storage_options)

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        return Strategy.load_checkpoint(self, checkpoint_path, weights_only)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        assert self.lightning_module is not None
        own = self.lightning_module.state_dict()
        with torch.no_grad():
            for name, whole in checkpoint["state_dict"].items():
                own[name].copy_(as_shard_like(whole.to(own[name].dtype), own[name]))

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        for optimizer, saved in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            state = {
                number: {
                    name: as_shard_like(value, parameters[number]) if isinstance(value, Tensor) else value
                    for name, value in values.items()
                }
                for number, values in saved["state"].items()
            }
            optimizer.load_state_dict({**saved, "state": state})


def use_full_state_dicts(trainer: Trainer) -> None:
    """Makes a ModelParallelStrategy write and read checkpoints through the CheckpointIO, as other strategies do."""
    strategy = trainer.strategy
    if type(strategy) is ModelParallelStrategy:
        strategy.__class__ = _FullStateDictStrategy


def load_for_strategy(
    trainer: Trainer, load: Callable[[], "PreTrainedModel"], load_without_weights: Callable[[], "PreTrainedModel"]
) -> "PreTrainedModel":
    """Returns the model for the Trainer's strategy: sharded for a ModelParallelStrategy, else whole.

    Args:
        trainer: After its processes have been connected.
        load: Returns the whole model.
        load_without_weights: Returns the same model with arbitrary weights.

    Raises:
        UserError: If the strategy uses tensor parallelism, which this package does not support.
    """
    strategy = trainer.strategy
    if not isinstance(strategy, ModelParallelStrategy):
        return load()
    mesh = strategy.device_mesh
    if (split := mesh["tensor_parallel"].size()) > 1:
        raise UserError(
            f"trainer.strategy ModelParallelStrategy would split tensors over {split} devices, which is not supported: "
            f"set tensor_parallel_size to 1 and data_parallel_size to {mesh.size()}"
        )
    return load_sharded(load, load_without_weights, mesh["data_parallel"], strategy.root_device)


def check_sharded(trainer: Trainer, model: "PreTrainedModel") -> None:
    """Raises UserError if a ModelParallelStrategy gets a whole model, whose copies would train apart."""
    if isinstance(trainer.strategy, ModelParallelStrategy) and not is_sharded(model):
        raise UserError(
            "trainer.strategy ModelParallelStrategy shards a model while it loads, and this module has loaded its "
            "model: make a new SFTModule, with the checkpoint's folder as its model_path"
        )
