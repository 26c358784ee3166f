"""Build the small trainers, modules and data sets that the selftest runs on, from a config of ``fit``."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, Trainer, seed_everything

from sft_lightning.data.batch import Layout
from sft_lightning.models.precision import Precision
from sft_lightning.training.datamodule import SFTDataModule
from sft_lightning.training.module import SFTModule


@dataclass(frozen=True, slots=True)
class SelftestSetup:
    """A config of ``fit``, reduced to a few optimizer steps on one device.

    Attributes:
        data: The config's data module.
        model: The config's module, without weights.
        accumulate: The config's accumulate_grad_batches.
        clipping: The Trainer's gradient_clip_val and gradient_clip_algorithm.
        accelerator: The Trainer's accelerator.
        precision: The Trainer's precision.
        seed: Seed of random initial weights.
        num_steps: Optimizer steps of an epoch; the last one is short.
        folder: Folder for checkpoints and temporary files.
    """

    data: SFTDataModule
    model: SFTModule
    accumulate: int
    clipping: dict[str, Any]
    accelerator: str
    precision: Precision
    seed: int
    num_steps: int
    folder: Path

    @property
    def examples_per_step(self) -> int:
        return self.data.batch_size * self.accumulate

    @property
    def splits(self) -> list[tuple[int, int]]:
        """(batch_size, accumulate) of a step: the config's, half its batch_size, single rows, all rows at once."""
        batch_size, accumulate = self.data.batch_size, self.accumulate
        all_rows = batch_size * accumulate
        splits = [(batch_size, accumulate), (1, all_rows), (all_rows, 1)]
        if batch_size % 2 == 0:
            splits.insert(1, (batch_size // 2, 2 * accumulate))
        return list(dict.fromkeys(splits))

    def few_rows(self, **options: Any) -> SFTDataModule:
        """Returns the data with only the rows that the steps need, the first ones, and without validation.

        Args:
            options: Attributes to override.
        """
        data = copy.copy(self.data)  # shares the tokens that are already read
        num_rows = (self.num_steps - 1) * self.examples_per_step + max(1, self.examples_per_step // 3)
        train = self.data.settings("train")
        data.sets = {"train": replace(train, max_examples=min(num_rows, train.max_examples or num_rows))}
        if data.loss_normalization == "micro_batch":  # a mean of means, which by definition depends on the split
            data.loss_normalization = "token"
        for name, value in options.items():
            setattr(data, name, value)
        return data

    def module(self, **options: Any) -> SFTModule:
        """Returns a new module of the config with some hyperparameters overridden. Random weights follow the seed."""
        seed_everything(self.seed, verbose=False)
        module = copy.deepcopy(self.model)
        module.hparams.update({"compile": False, **options})
        return module

    def trainer(self, accumulate: int, callbacks: Sequence[Callback], **options: Any) -> Trainer:
        """Returns a Trainer on one device without console output, logger and checkpoints."""
        quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        return Trainer(
            accelerator=self.accelerator,
            devices=1,
            precision=self.precision.name,  # type: ignore[arg-type]
            accumulate_grad_batches=accumulate,
            callbacks=list(callbacks),
            default_root_dir=str(self.folder),
            num_sanity_val_steps=0,
            limit_val_batches=0,
            **{"enable_checkpointing": False, **quiet, **self.clipping, **options},
        )


LAYOUTS: tuple[Layout, ...] = ("padded", "packed", "shared_prefix")
