"""Write the report of a run during training and at its end."""

import logging
import os
import time
from pathlib import Path

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from sft_lightning.checkpointing.run_folder import register_file, run_folder
from sft_lightning.lightning_compat.trainer import is_dry_run
from sft_lightning.reporting.page import ENVIRONMENT, record_environment, write_report
from sft_lightning.system.out_of_memory import host_lacks_memory

logger = logging.getLogger(__name__)

# Limits the reports during training to a twentieth of the time.
_SECONDS_BETWEEN_PER_SECOND_OF_WRITING = 19


class RunReport(Callback):
    """Writes ``report/index.html`` of the run after each validation, at the end and when training fails.

    PNG files of the figures are written at the end. A report that cannot be written does not stop the training. In a
    list of callbacks, place it after GenerationEvaluation, whose answers it shows.

    Args:
        output_dir: Folder of the run, by default that of the checkpoints.
    """

    def __init__(self, output_dir: str | None = None) -> None:
        self.output_dir = output_dir
        self._is_on = False
        self._not_before = 0.0

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._is_on, self._not_before = False, 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Not earlier: a fit that is refused because its folder holds another run must not change that run.
        self._is_on = trainer.is_global_zero and not is_dry_run(trainer)
        if self._is_on:
            self._write(trainer, "in training")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._is_on and trainer.state.fn == "fit" and time.monotonic() >= self._not_before:
            self._write(trainer, "in training")

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._is_on and (page := self._write(trainer, None)) is not None:
            print(f"report:  {page}")
        self._is_on = False

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        # A host without memory cannot start the threads that read Parquet, and waiting for them would never end.
        if self._is_on and not host_lacks_memory(exception):
            self._write(trainer, f"stopped by {type(exception).__name__}")
        self._is_on = False

    def _write(self, trainer: Trainer, state: str | None) -> Path | None:
        """Returns the path of the page, or None if it could not be written."""
        started = time.monotonic()
        run = run_folder(trainer, self.output_dir)
        try:
            if state == "in training" and not self._not_before:
                record_environment(run, _device(trainer))
            page = write_report(run, state=state, with_plots=state != "in training")
            for path in (run / ENVIRONMENT, page, *page.parent.glob("*.png")):
                register_file(run, path.relative_to(run).as_posix())
        except Exception as error:
            logger.warning("the report was not written: %s: %s", type(error).__name__, error)
            page = None
        now = time.monotonic()
        self._not_before = now + _SECONDS_BETWEEN_PER_SECOND_OF_WRITING * (now - started)
        return page


def _device(trainer: Trainer) -> str:
    device = trainer.strategy.root_device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type}, {os.cpu_count()} cores"
    return f"{trainer.world_size} x {name}" if trainer.world_size > 1 else name
