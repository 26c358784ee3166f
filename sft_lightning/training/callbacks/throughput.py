"""Log the speed of training: tokens per second, FLOP utilization, padding and memory."""

import logging
import time
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from sft_lightning.data.batch import MicroBatch
from sft_lightning.lightning_compat.loops import is_optimizer_step
from sft_lightning.lightning_compat.trainer import replicas
from sft_lightning.models.flops import ModelFlops, count_model_flops, num_attended
from sft_lightning.models.precision import Precision
from sft_lightning.system.out_of_memory import peak_memory_bytes
from sft_lightning.system.peak_flops import Peak, peak_of

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class _Work:
    """What the model processed since the clock started; all values are known to the host."""

    num_tokens: int = 0
    num_unique_tokens: int = 0
    num_label_tokens: int = 0
    num_positions: int = 0
    num_attended: int = 0

    def add(self, batch: MicroBatch) -> None:
        self.num_tokens += batch.num_tokens
        self.num_unique_tokens += batch.num_unique_tokens
        self.num_label_tokens += batch.num_label_tokens
        self.num_positions += batch.input_ids.numel()
        self.num_attended += num_attended(batch)

    def flops(self, model: ModelFlops) -> int:
        return (
            model.per_token * self.num_unique_tokens
            + model.per_label * self.num_label_tokens
            + model.per_attention * self.num_attended
        )


class Throughput(Callback):
    """Logs the speed of each optimizer step.

    The clock covers the whole loop, including data, optimizer and checkpoints, and pauses during validation and
    generation. Rates are those of this process times the number of replicas; other values are those of this process.

    - ``train/tokens_per_second``: input tokens of all rows without padding; shared tokens count for every row.
    - ``train/response_tokens_per_second``: tokens that are labels.
    - ``train/unique_tokens_per_second``: computed input tokens without padding.
    - ``train/model_flop_utilization``: the FLOPs that the unique tokens need, divided by the peak of the device.
      Padding and recomputed activations do not count. See :mod:`sft_lightning.models.flops`; not logged for models
      that its formula does not cover.
    - ``train/padding_waste``: the share of the computed positions that were padding.
    - ``train/sharing_gain``: tokens over unique tokens, 1 where no prompt is shared.
    - ``train/peak_memory_bytes``: peak memory of tensors on a CUDA device, or of the process elsewhere, since the
      program started.
    """

    def __init__(self) -> None:
        self._started: float | None = None
        self._before_validation = 0.0
        self._work = _Work()
        self._model_flops: ModelFlops | None = None
        self._peak: Peak | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._started = None
        self._model_flops = count_model_flops(pl_module.model)  # type: ignore[arg-type]
        self._peak = None

    def on_train_batch_start(self, *args: Any) -> None:
        # Not in on_train_start, where the callbacks after this one may generate.
        if self._started is None:
            self._restart()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._started is not None:
            self._before_validation = time.monotonic() - self._started

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._started is not None:
            self._started = time.monotonic() - self._before_validation

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: MicroBatch, batch_idx: int
    ) -> None:
        self._work.add(batch)
        if is_optimizer_step(trainer):
            # A GPU runs behind the host but needs no synchronization here: the module has just read this step's loss
            # and gradient norm, so only the optimizer's update is pending. It was pending too when the clock started,
            # so the interval is one whole step.
            assert self._started is not None
            values = self._values(trainer, pl_module.device, time.monotonic() - self._started)
            # Tensors in host memory: Lightning would copy a number to the GPU and back, and wait for both.
            pl_module.log_dict({f"train/{name}": torch.tensor(v, dtype=torch.float64) for name, v in values.items()})
            self._restart()

    def _values(self, trainer: Trainer, device: torch.device, seconds: float) -> dict[str, float]:
        work, per_second = self._work, replicas(trainer)[0] / seconds
        values = {
            "tokens_per_second": work.num_tokens * per_second,
            "response_tokens_per_second": work.num_label_tokens * per_second,
            "unique_tokens_per_second": work.num_unique_tokens * per_second,
            "padding_waste": 1 - work.num_unique_tokens / work.num_positions,
            "sharing_gain": work.num_tokens / work.num_unique_tokens if work.num_unique_tokens else 1.0,
            "peak_memory_bytes": peak_memory_bytes(device),
        }
        if self._model_flops is not None:
            peak = self._peak = self._peak or _find_peak(trainer, device)
            values["model_flop_utilization"] = work.flops(self._model_flops) / seconds / peak.flops_per_second
        return values

    def _restart(self) -> None:
        self._started = time.monotonic()
        self._work = _Work()


def _find_peak(trainer: Trainer, device: torch.device) -> Peak:
    peak = peak_of(device, Precision.named(trainer.precision).matmul_dtype)
    if trainer.is_global_zero:
        rate = peak.flops_per_second / 1e12
        logger.info("model FLOP utilization is relative to %.4g TFLOP/s (%s)", rate, peak.source)
    return peak
