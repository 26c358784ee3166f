"""Print the progress of a run in optimizer steps."""

import sys
import time
from datetime import timedelta
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from sft_lightning.lightning_compat.loops import is_optimizer_step
from sft_lightning.lightning_compat.trainer import total_optimizer_steps

# Logged, but not printed: a line of every metric would be hard to read.
_NOT_PRINTED = {
    f"val/{name}" for name in ("strict_format_accuracy", "mean_reward", "response_tokens", "response_entropy")
}


class StepProgress(ProgressBar):
    """Shows step, loss, response tokens per second and time left: as a bar on a terminal, else as lines.

    Args:
        every_n_steps: Optimizer steps between two lines where stderr is not a terminal; by default the Trainer's
            ``log_every_n_steps``.
    """

    def __init__(self, every_n_steps: int | None = None) -> None:
        super().__init__()
        self._every = every_n_steps
        self._enabled = True
        self._progress: Progress | None = None
        self._task = TaskID(0)
        self._total = 0
        self._first_step = 0
        self._started = 0.0

    def disable(self) -> None:
        self._enabled = False

    def enable(self) -> None:
        self._enabled = True

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._total = total_optimizer_steps(trainer)
        self._first_step, self._started = trainer.global_step, time.monotonic()
        if self._enabled and trainer.is_global_zero and sys.stderr.isatty():
            self._progress = Progress(
                TextColumn("step"),
                MofNCompleteColumn(),
                BarColumn(),
                TextColumn("{task.description}"),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                console=Console(stderr=True),
            )
            self._task = self._progress.add_task("", total=self._total, completed=trainer.global_step)
            self._progress.start()

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        if not (self._enabled and trainer.is_global_zero and is_optimizer_step(trainer)):
            return
        step, every = trainer.global_step, self._every or getattr(trainer, "log_every_n_steps", 0) or 10
        if self._progress is not None:
            self._progress.update(self._task, completed=step, description=_describe(trainer))
        elif step % every == 0 or step == self._total:
            per_step = (time.monotonic() - self._started) / (step - self._first_step)
            left = timedelta(seconds=round(per_step * (self._total - step)))
            print(f"step {step}/{self._total}  {_describe(trainer)}  {left} left", file=sys.stderr, flush=True)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._enabled and trainer.is_global_zero and not trainer.sanity_checking:
            shown = [name for name in sorted(trainer.callback_metrics) if name.startswith("val/")]
            shown = [name for name in shown if name not in _NOT_PRINTED]
            line = "  ".join(f"{name} {float(trainer.callback_metrics[name]):.4g}" for name in shown)
            self.print(f"validation after step {trainer.global_step}: {line}")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stop()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._stop()

    def print(self, *args: Any, **kwargs: Any) -> None:
        if self._progress is not None:
            self._progress.console.print(*args, highlight=False)
        else:
            print(*args, file=sys.stderr, flush=True)

    def _stop(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


def _describe(trainer: Trainer) -> str:
    metrics = trainer.callback_metrics
    parts = []
    if "train/loss" in metrics:
        parts.append(f"loss {float(metrics['train/loss']):.4f}")
    if "train/response_tokens_per_second" in metrics:
        parts.append(f"{float(metrics['train/response_tokens_per_second']):,.0f} response tokens/s")
    return "  ".join(parts)
