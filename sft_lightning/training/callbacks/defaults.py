"""Define the callbacks and loggers of every run, from the command line and from Python."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.loggers import Logger

from sft_lightning.checkpointing.callback import HFCheckpoint
from sft_lightning.errors import UserError
from sft_lightning.training.callbacks.generation_evaluation import GenerationEvaluation
from sft_lightning.training.callbacks.predictions import PredictionWriter
from sft_lightning.training.callbacks.progress import StepProgress
from sft_lightning.training.callbacks.row_losses import RowLossRecorder
from sft_lightning.training.callbacks.run_report import RunReport
from sft_lightning.training.callbacks.saved_config import SavedConfig
from sft_lightning.training.callbacks.throughput import Throughput
from sft_lightning.training.loggers.metrics_csv import MetricsCSVLogger


def run_defaults(
    output_dir: str | Path,
    *,
    callbacks: Sequence[Callback] = (),
    loggers: Sequence[Logger] = (),
    shows_progress: bool = True,
    config: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Returns the arguments ``callbacks`` and ``logger`` that give a Trainer what ``fit`` gives it.

    The run then writes checkpoints, ``config.yaml``, ``metrics.csv``, graded answers, row losses and a report into
    ``output_dir``, logs its throughput and prints its progress.

    Args:
        output_dir: Folder of the run.
        callbacks: More callbacks. One of a default's class, such as ``HFCheckpoint(output_dir, monitor="val/loss")`` or
            a progress bar, takes the place of the default.
        loggers: More loggers.
        shows_progress: Print the progress; set it to False with ``Trainer(enable_progress_bar=False)``.
        config: Content of ``config.yaml``; by default read from the Trainer, the module and the data module.

    Raises:
        UserError: If an HFCheckpoint among ``callbacks`` saves to another folder.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(max_epochs=3, accumulate_grad_batches=8, **run_defaults("checkpoints/run"))
    """
    folder = str(output_dir)
    for callback in callbacks:
        if isinstance(callback, HFCheckpoint) and callback.run.resolve() != Path(folder).expanduser().resolve():
            raise UserError(
                f"HFCheckpoint saves to '{callback.run}', but output_dir is '{folder}': give both the same folder"
            )
    return {
        "callbacks": [*callbacks, *_missing(callbacks, _default_callbacks(folder, config, shows_progress))],
        "logger": [*loggers, MetricsCSVLogger(Path(folder).expanduser())],
    }


def _default_callbacks(output_dir: str, config: Mapping[str, Any] | None, shows_progress: bool) -> list[Callback]:
    return [
        HFCheckpoint(output_dir),
        GenerationEvaluation(output_dir=output_dir),
        Throughput(),
        SavedConfig(output_dir, config),
        PredictionWriter(output_dir),
        RowLossRecorder(output_dir),
        *([StepProgress()] if shows_progress else []),
        RunReport(output_dir),  # after GenerationEvaluation, whose answers it shows
    ]


def _missing(callbacks: Sequence[Callback], defaults: Sequence[Callback]) -> list[Callback]:
    """Returns the defaults whose class is not among ``callbacks``."""

    def kind(default: Callback) -> type[Callback]:
        return ProgressBar if isinstance(default, ProgressBar) else type(default)

    return [default for default in defaults if not any(isinstance(own, kind(default)) for own in callbacks)]
