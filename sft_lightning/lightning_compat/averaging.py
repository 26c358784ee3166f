"""Make Lightning's WeightAveraging resume bit-equal, and lend its averaged weights to those who evaluate."""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.strategies import ModelParallelStrategy

from sft_lightning.errors import UserError
from sft_lightning.lightning_compat.trainer import callbacks_of


class _ExactAveraging(WeightAveraging):
    """Goes before the class of a user's callback.

    Lightning's class overwrites the current weights before the last checkpoint is saved, averages constants such as
    rotary frequencies until rounding has changed them, and takes the initial weights for the average until the first
    update. It also keeps the counters of an earlier fit, and forgets the update at the end of an epoch if a run resumes
    there.
    """

    _holds_average = False  # whether the module has the averaged weights, and the average model has the current ones

    @property
    def is_averaging(self) -> bool:
        return self._average_model is not None and bool(self._average_model.n_averaged > 0)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._holds_average, self._use_buffers = False, False
        self._latest_update_step, self._latest_update_epoch = 0, -1
        with warnings.catch_warnings():
            # It warns of sharded models, which are refused here.
            warnings.filterwarnings("ignore", message="You're using the WeightAveraging callback with a model that")
            super().setup(trainer, pl_module, stage)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._finish_epoch(trainer, pl_module)
        super().on_train_epoch_start(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._finish_epoch(trainer, pl_module)
        self._swap_models(pl_module)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().teardown(trainer, pl_module, stage)
        self._average_model = None  # later validations take the module's weights, which are averaged

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "latest_update_epoch": self._latest_update_epoch}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._latest_update_epoch = state_dict["latest_update_epoch"]

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        weights = checkpoint["state_dict"]
        super().on_save_checkpoint(trainer, pl_module, checkpoint)
        if self._holds_average:
            checkpoint["current_model_state"], checkpoint["state_dict"] = checkpoint["state_dict"], weights
        elif not self.is_averaging:
            checkpoint["state_dict"] = weights

    def _swap_models(self, pl_module: LightningModule) -> None:
        if self.is_averaging:
            super()._swap_models(pl_module)
            self._holds_average = not self._holds_average

    def _finish_epoch(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Makes the update at the end of the last epoch, if a run that resumed there has not made it."""
        epoch = trainer.current_epoch - 1
        if epoch > self._latest_update_epoch and self.should_update(epoch_idx=epoch):
            assert self._average_model is not None
            self._average_model.update_parameters(pl_module)
            self._latest_update_epoch = epoch


def average_exactly(trainer: Trainer) -> None:
    """Makes a WeightAveraging of the Trainer resume bit-equal. Call it before the callbacks' ``setup``.

    Raises:
        UserError: If there are several, or the strategy shards the model.
    """
    averaging = [callback for callback in callbacks_of(trainer) if isinstance(callback, WeightAveraging)]
    if len(averaging) > 1:
        raise UserError(f"trainer.callbacks holds {len(averaging)} WeightAveraging callbacks: keep one of them")
    for callback in averaging:
        kind = type(callback)
        if isinstance(trainer.strategy, ModelParallelStrategy):
            raise UserError(
                f"trainer.callbacks holds a {kind.__name__}, which cannot average a model that trainer.strategy "
                "ModelParallelStrategy shards: use ddp, or take it out"
            )
        if not isinstance(callback, _ExactAveraging):
            # Its state in checkpoints is found by the name of the class.
            names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__}
            callback.__class__ = type(kind.__name__, (_ExactAveraging, kind), names)


@contextmanager
def averaged_weights(trainer: Trainer) -> Iterator[None]:
    """Gives the module its averaged weights for a while, if a WeightAveraging has averaged any."""
    averaging = [callback for callback in callbacks_of(trainer) if isinstance(callback, _ExactAveraging)]
    swapped = [callback for callback in averaging if not callback._holds_average]
    for callback in swapped:
        callback._swap_models(trainer.lightning_module)
    try:
        yield
    finally:
        for callback in swapped:
            callback._swap_models(trainer.lightning_module)


def check_averaging(trainer: Trainer, checkpoint: Mapping[str, Any]) -> None:
    """Raises UserError if a run that resumes lacks the WeightAveraging of the checkpoint's run."""
    averages = any(isinstance(callback, WeightAveraging) for callback in callbacks_of(trainer))
    if "current_model_state" in checkpoint and not averages:
        raise UserError(
            "cannot resume: the checkpoint's run averaged its weights and trainer.callbacks holds no WeightAveraging: "
            "add it again, or start from the averaged weights with --model.model_path"
        )
