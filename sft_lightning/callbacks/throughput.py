"""Throughput: how many tokens a second the training loop gets through."""

import time
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from sft_lightning.data.batch import MicroBatch
from sft_lightning.lightning_compat import is_optimizer_step, replicas


class Throughput(Callback):
    """Logs ``train/tokens_per_second`` and ``train/response_tokens_per_second`` once an optimizer step.

    Tokens are those of this process's rows, padding left out, times the number of replicas. The clock stands still
    during validation and generation.
    """

    def __init__(self) -> None:
        self._started: float | None = None
        self._num_tokens = 0
        self._num_response_tokens = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._started = None

    def on_train_batch_start(self, *args: Any) -> None:
        # Not in on_train_start: the callbacks after this one may generate there.
        if self._started is None:
            self._restart()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._restart()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: MicroBatch, batch_idx: int
    ) -> None:
        self._num_tokens += batch.num_tokens
        self._num_response_tokens += batch.num_label_tokens
        if is_optimizer_step(trainer):
            assert self._started is not None
            per_second = replicas(trainer)[0] / (time.monotonic() - self._started)
            pl_module.log("train/tokens_per_second", self._num_tokens * per_second)
            pl_module.log("train/response_tokens_per_second", self._num_response_tokens * per_second)
            self._restart()

    def _restart(self) -> None:
        self._started = time.monotonic()
        self._num_tokens = self._num_response_tokens = 0
