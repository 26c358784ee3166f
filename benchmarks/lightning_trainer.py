"""This project as a user runs it: SFTDataModule, SFTModule and Lightning's Trainer, nothing written to disk."""

import logging
import warnings
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from meter import Counts, Measurement, Meter
from rows import Job
from transformers import PreTrainedModel

from sft_lightning import SFTDataModule, SFTModule
from sft_lightning.data.batch import MicroBatch
from sft_lightning.models.flops import num_attended

LAYOUTS = ("padded", "packed", "shared_prefix")
_PRECISIONS = {"float32": "32-true", "bfloat16": "bf16-true"}


class _StepClock(Callback):
    def __init__(self, meter: Meter) -> None:
        self._meter = meter

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._meter.start()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: MicroBatch, batch_idx: int
    ) -> None:
        self._meter.add(lambda: _counts(batch))
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0 or trainer.is_last_batch:
            self._meter.end_step()
            if self._meter.first_loss is None:
                self._meter.first_loss = float(trainer.callback_metrics["train/loss"])


class _Handover(Callback):
    """Takes the model and the optimizer out of Lightning's hands, which moves both to the host after each fit."""

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trainer.strategy.optimizers = []
        pl_module.model = None


def run(job: Job, layout: str, batch_size: int, *, compiled: bool = False) -> Measurement:
    """Trains and returns what was measured; ``batch_size`` rows a micro-batch, ``job.rows_per_step`` a step."""
    return _fit(None, job, layout, batch_size, Meter(job.device), [], {"compile": compiled}, {})


def train(
    model: PreTrainedModel,
    job: Job,
    layout: str,
    batch_size: int,
    meter: Meter,
    *,
    compiled: bool = False,
    statistics: bool = True,
    pad_to_multiple_of: int | None = None,
) -> Measurement:
    """The same with a model that is on the device, compiled already if ``compiled``, and stays there."""
    module_options = {"compile": compiled, "log_token_statistics": statistics}
    data_options = {"pad_to_multiple_of": pad_to_multiple_of}
    return _fit(model, job, layout, batch_size, meter, [_Handover()], module_options, data_options)


def _fit(
    model: PreTrainedModel | None,
    job: Job,
    layout: str,
    batch_size: int,
    meter: Meter,
    callbacks: list[Callback],
    module_options: dict[str, Any],
    data_options: dict[str, Any],
) -> Measurement:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    seed_everything(0, verbose=False)
    data = SFTDataModule(
        train_path=str(job.rows_path),
        tokenizer_path=str(job.folder),
        batch_size=batch_size,
        max_length=4096,
        cache_dir=str(job.folder.parent / "tokens"),
        layout=layout,
        **data_options,
    )
    trainer = Trainer(
        accelerator="gpu" if job.device == "cuda" else "cpu",
        devices=1,
        precision="bf16-mixed" if job.mixed else _PRECISIONS[job.dtype],
        max_steps=job.num_steps,
        accumulate_grad_batches=job.rows_per_step // batch_size,
        gradient_clip_val=1.0,
        callbacks=[_StepClock(meter), *callbacks],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module = SFTModule(model_path=str(job.folder), learning_rate=5e-5, **module_options)
    module.model = model
    trainer.fit(module, data)
    return meter.result(job.num_warmup_steps)


def _counts(batch: MicroBatch) -> Counts:
    return Counts(
        rows=batch.num_rows,
        tokens=batch.num_tokens,
        unique_tokens=batch.num_unique_tokens,
        positions=batch.input_ids.numel(),
        labels=batch.num_label_tokens,
        attended=num_attended(batch),
    )
