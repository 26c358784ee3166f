"""Refuse what Lightning offers and would lose or change what a run has learned, and build the model for the rest."""

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    BatchSizeFinder,
    GradientAccumulationScheduler,
    LearningRateFinder,
    ModelPruning,
    StochasticWeightAveraging,
)
from lightning.pytorch.strategies.launchers.multiprocessing import _MultiProcessingLauncher
from lightning.pytorch.trainer.call import _call_configure_model

from sft_lightning.errors import UserError
from sft_lightning.lightning_compat.averaging import average_exactly
from sft_lightning.lightning_compat.trainer import TrainedModule, callbacks_of

_CALLBACKS: dict[type[Callback], str] = {
    BackboneFinetuning: "SFTModule has no attribute backbone: derive a class from BaseFinetuning",
    BatchSizeFinder: "a step's examples follow from batch_size x accumulate_grad_batches, which must not change in a "
    "run: take it out and set data.batch_size",
    GradientAccumulationScheduler: "a step's examples follow from batch_size x accumulate_grad_batches, which must not "
    "change in a run: take it out",
    LearningRateFinder: "the schedule replaces the rate that it finds after one step: take it out, and set "
    "model.learning_rate or call lr_find of lightning.pytorch.tuner.Tuner before fit",
    ModelPruning: "pruned parameters have other names, which losses and checkpoints do not know: take it out and prune "
    "the trained model",
    StochasticWeightAveraging: "it replaces the schedule and averages no checkpoint: use WeightAveraging, of the same "
    "package, which averages alike",
}


def check_strategy(trainer: Trainer) -> None:
    """Raises UserError if the strategy trains a copy of the module in other processes, whose weights are lost."""
    strategy, launcher = trainer.strategy, trainer.strategy.launcher
    if isinstance(launcher, _MultiProcessingLauncher):
        raise UserError(
            f"trainer.strategy {type(strategy).__name__} with start_method {launcher._start_method} trains copies of "
            "the module in other processes, and the trained weights do not come back: use ddp, in a script or on the "
            "command line, or trainer.devices 1 in a notebook"
        )


def check_support(trainer: Trainer) -> None:
    """Raises UserError for a strategy or the first callback that cannot work with an SFTModule."""
    check_strategy(trainer)
    for callback in callbacks_of(trainer) if isinstance(trainer.lightning_module, TrainedModule) else ():
        for kind, reason in _CALLBACKS.items():
            is_tuners = isinstance(callback, LearningRateFinder) and callback._early_exit  # ends before any training
            if isinstance(callback, kind) and not is_tuners:
                raise UserError(f"trainer.callbacks holds a {kind.__name__}, but {reason}")


def check_parameter_groups(trainer: Trainer) -> None:
    """Raises UserError if the optimizer got parameters that the schedule has no rate for."""
    for optimizer, schedule in zip(trainer.optimizers, trainer.lr_scheduler_configs, strict=False):
        rates = getattr(schedule.scheduler, "base_lrs", optimizer.param_groups)
        if len(optimizer.param_groups) != len(rates):
            epoch = trainer.current_epoch
            raise UserError(
                f"a callback adds parameters to the optimizer in epoch {epoch}, where the schedule has no learning "
                f"rate for them: set trainer.max_epochs {epoch}, and train them in a second run that starts from the "
                "final of this one with --model.model_path"
            )


def build_model(trainer: Trainer) -> None:
    """Calls the module's ``configure_model`` before the callbacks' ``setup``, where some read or copy the module.

    Lightning calls it after that, and again; the hook is made for this. Call it in the ``setup`` of the data module.
    """
    check_support(trainer)
    average_exactly(trainer)
    _call_configure_model(trainer)
