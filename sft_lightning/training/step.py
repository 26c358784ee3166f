"""StepWatch: what is looked at before each optimizer step, and whether the step is taken."""

import logging
from collections.abc import Sequence
from math import isfinite
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from sft_lightning.checkpointing.run_folder import run_folder
from sft_lightning.data.batch import MicroBatch
from sft_lightning.data.load_report import SkippedRows
from sft_lightning.data.records import read_records
from sft_lightning.distributed.collectives import all_gather_objects
from sft_lightning.distributed.fsdp import gradient_norm
from sft_lightning.errors import NonFiniteError, UserError
from sft_lightning.lightning_compat.trainer import (
    TrainingData,
    datamodule_of,
    is_dry_run,
    logs_this_step,
    replicas,
)
from sft_lightning.losses.linear_cross_entropy import LabelLosses
from sft_lightning.training.metrics import step_sums
from sft_lightning.training.nonfinite import (
    StepRow,
    describe_non_finite,
    find_records,
    name_sources,
    rows_of_step,
    save_step,
    step_folder,
)
from sft_lightning.training.oom_advice import last_checkpoint
from sft_lightning.training.spikes import NormSpikes

logger = logging.getLogger(__name__)

OnNonFinite = Literal["stop", "skip"]
Parts = Sequence[tuple[LabelLosses, MicroBatch]]


class StepWatch:
    """Collects a step's micro-batches, reads the step's numbers once, and keeps steps that are not finite from weights.

    Args:
        on_nonfinite: Whether the first step that is not finite ends the run, or is left out.
        max_nonfinite_steps: So many steps of a run may be left out; one more ends it.

    Attributes:
        gradient_norm: Of the step that is about to be taken, before clipping; on its device.
        batch: The micro-batch that was added last.
        num_skipped: Steps of this run that were left out.
        stop_is_asked: Whether something asked this process to end the run.
        stop_is_agreed: Whether any process had been asked when the last step was taken: the same in all of them.

    Raises:
        UserError: If ``max_nonfinite_steps`` is below 0.
    """

    def __init__(self, on_nonfinite: OnNonFinite = "stop", max_nonfinite_steps: int = 0) -> None:
        if max_nonfinite_steps < 0:
            raise UserError(f"model.max_nonfinite_steps must be at least 0, got {max_nonfinite_steps}")
        self._num_allowed = max_nonfinite_steps if on_nonfinite == "skip" else 0
        self._parts: list[tuple[LabelLosses, MicroBatch]] = []
        self._spikes = NormSpikes()
        self.gradient_norm: Tensor | None = None
        self.batch: MicroBatch | None = None
        self.num_skipped = 0
        self.stop_is_asked = self.stop_is_agreed = False

    def start(self) -> None:
        """To be called when training starts: an earlier fit that was stopped in mid-step leaves a part behind."""
        self._parts = []

    def add(self, losses: LabelLosses, batch: MicroBatch) -> None:
        """Adds a micro-batch of the step that is being computed."""
        self.batch = batch
        self._parts.append((losses._replace(weighted_sum=losses.weighted_sum.detach()), batch))

    def before_step(self, trainer: Trainer, with_token_statistics: bool) -> tuple[float, dict[str, float]]:
        """Returns the loss of the step that is about to be taken, and its other metrics by name.

        Where the step must not be taken, its gradients are taken away: AdamW then leaves a parameter, its moments and
        its counter as they are, while the plan and the schedule of the learning rate move on.

        Args:
            trainer: In the middle of a step.
            with_token_statistics: Whether to return ``token_accuracy`` and ``entropy``, too.

        Raises:
            NonFiniteError: In all processes, if the loss or the gradient is not finite and no step may be left out.
        """
        parts, self._parts = self._parts, []
        self.gradient_norm = gradient_norm(p.grad for p in trainer.lightning_module.parameters() if p.grad is not None)
        # All processes have the same norm; they decide by the sum of their shares, so that they decide alike.
        share = (self.gradient_norm / replicas(trainer)[0]).view(1)
        own: Tensor = step_sums(parts)
        asked = own.new_full((1,), float(self.stop_is_asked))  # of this process: a signal may have reached some only
        sums: Tensor = trainer.strategy.reduce(torch.cat([own, asked, share.to(own.dtype)]), reduce_op="sum")
        # The one time in a step that the host waits for the device.
        loss, num_correct, entropy_sum, num_labels, num_asked, norm = sums.tolist()
        self.stop_is_agreed = num_asked > 0
        metrics = {"grad_norm": norm}
        if with_token_statistics:
            metrics |= {"token_accuracy": num_correct / num_labels, "entropy": entropy_sum / num_labels}
        scaler_decides = trainer.precision == "16-mixed"  # its gradients overflow now and then, by design
        if not isfinite(loss) or not (isfinite(norm) or scaler_decides):
            self._leave_out(trainer, loss, norm, parts)
        spike = self._spikes.add(norm)
        if spike:
            _tell_spike(trainer, norm, spike, parts)
        # In every step, since Lightning goes on handing out what it was given last.
        return loss, metrics | {"grad_norm_spike": spike}

    def state(self) -> dict[str, Any]:
        """Returns what a run that goes on needs to know."""
        return {"num_skipped": self.num_skipped, "norms": self._spikes.norms}

    def restore(self, state: dict[str, Any]) -> None:
        """Takes what ``state`` returned; an empty one begins anew."""
        self.num_skipped = state.get("num_skipped", 0)
        self._spikes = NormSpikes(state.get("norms", ()))

    def _leave_out(self, trainer: Trainer, loss: float, norm: float, parts: Parts) -> None:
        step, stops = trainer.global_step + 1, self.num_skipped >= self._num_allowed
        rows = _everywhere(trainer, rows_of_step(parts))
        done = "stopped before the step" if stops else "skipped the step"
        if self._num_allowed:
            done += f" ({self.num_skipped + 1 - stops} of {self._num_allowed} skipped)"
        folder = None if is_dry_run(trainer) else step_folder(run_folder(trainer, None), step)
        line = describe_non_finite(step, loss, norm, rows, done=done, folder=folder)
        if folder is not None and trainer.is_global_zero:
            try:
                _save(trainer, {"step": step, "loss": loss, "gradient_norm": norm}, rows, parts)
            except OSError as error:  # a full disk is no reason to hide why the run stops
                logger.warning("the rows could not be saved in '%s': %s", folder, error)
        # Launchers kill a run as soon as one of its processes has failed: not before the rows are on disk.
        trainer.strategy.barrier("StepWatch")
        if stops:
            raise NonFiniteError(line)
        self.num_skipped += 1
        for parameter in trainer.lightning_module.parameters():
            parameter.grad = None
        if trainer.is_global_zero:
            logger.warning(line)


def _tell_spike(trainer: Trainer, norm: float, spike: float, parts: Parts) -> None:
    step = trainer.global_step + 1
    sources = _everywhere(trainer, [source for _, batch in parts for source in batch.sources])
    if not trainer.is_global_zero:
        return
    logger.warning(
        "gradient norm %.4g in optimizer step %d is %.1f times the median of recent steps. Examples: %s",
        norm,
        step,
        spike,
        name_sources(sources),
    )
    if not logs_this_step(trainer, step):
        for each in trainer.loggers:  # a spike is worth a row of its own
            each.log_metrics({"train/grad_norm_spike": spike}, step=step)


def _everywhere(trainer: Trainer, rows: list[Any]) -> list[Any]:
    """Returns the step's rows of all processes, which all have to call it."""
    everyones = [row for part in all_gather_objects(rows, trainer.world_size) for row in part]
    return list(dict.fromkeys(everyones))  # processes that are no replicas of each other compute the same rows


def _save(trainer: Trainer, numbers: dict[str, Any], rows: Sequence[StepRow], parts: Parts) -> None:
    data: TrainingData = datamodule_of(trainer)
    settings = data.settings("train")
    module: Any = trainer.lightning_module
    run, checkpoint = run_folder(trainer, None), last_checkpoint(trainer)
    records = find_records(lambda: read_records(settings, SkippedRows()), rows)
    about = {
        **numbers,
        # Of this run by its name, so that the run's folder may move.
        "checkpoint": Path(checkpoint).name if checkpoint and Path(checkpoint).parent == run else checkpoint,
        "model_path": _absolute(module.hparams["model_path"]),
        **{name: module.hparams[name] for name in ("init", "attn_implementation")},
        "tokenizer_path": _absolute(str(data.tokenizer_path)),
        **settings.token_options,
        "precision": str(trainer.precision),
        "layout": next((batch.layout for _, batch in parts if batch.num_rows), "padded"),
        "seed": data.seed,
        "rows": [row.source for row in rows],
        "rows_not_finite": [row.source for row in rows if not row.is_finite],
        "rows_not_found": sorted({row.source for row in rows} - {record.source for record in records}),
    }
    save_step(run, records, about)


def _absolute(path: str) -> str:
    """Returns a name of the hub as it is, and a folder so that it is found from anywhere."""
    return str(Path(path).resolve()) if Path(path).is_dir() else path
