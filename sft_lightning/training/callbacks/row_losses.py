"""Record the loss of each training row in each epoch as Parquet."""

import logging
import re
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from sft_lightning.checkpointing.run_folder import register_file, run_folder
from sft_lightning.data.batch import MicroBatch
from sft_lightning.errors import UserError
from sft_lightning.lightning_compat.loops import is_optimizer_step
from sft_lightning.lightning_compat.trainer import is_dry_run, replicas
from sft_lightning.reporting.row_losses import FOLDER
from sft_lightning.system.files import unfinished, write_atomically

logger = logging.getLogger(__name__)

# Largest number of micro-batches in memory. All replicas reach it together, so they write the same parts.
_MICRO_BATCHES_AT_ONCE = 1024
_PART = re.compile(r"step-(\d+)\.rank-\d+\.parquet")


class _Entry(NamedTuple):
    """The rows of a micro-batch in an optimizer step. ``sums``: shape [2, B], nll and number of labels."""

    step: int
    sources: tuple[str, ...]
    sums: Tensor


class RowLossRecorder(Callback):
    """Writes the negative log-likelihood of each training row, summed over its labels, once per epoch.

    The values come from the training step, so they cost no forward pass; they depend on the weights at that step, and
    on dropout if the model has it. ``reporting.row_losses.read_row_losses`` finds outliers among the rows.

    Each replica writes files ``row_losses/epoch-<epoch>/step-<step>.rank-<replica>.parquet`` with the rows of its
    optimizer steps up to ``step``, after those of the previous file. Columns: ``source`` (file:line), ``epoch``
    (from 0), ``step`` (from 1, as in ``checkpoint-<step>``), ``num_labels`` and ``nll_sum`` (float64, nats).

    A file ends where a checkpoint is saved, and is on disk before the checkpoint is: after a kill and a resume, each
    row of an epoch is recorded once.

    Args:
        output_dir: Folder of the run, by default that of the checkpoints.
    """

    def __init__(self, output_dir: str | None = None) -> None:
        self.output_dir = output_dir
        self._entries: list[_Entry] = []
        self._num_micro_batches = 0
        self._last_whole_step = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._entries, self._num_micro_batches, self._last_whole_step = [], 0, trainer.global_step
        if trainer.is_global_zero and not is_dry_run(trainer):
            _drop_steps_after(run_folder(trainer, self.output_dir), trainer.global_step)
        trainer.strategy.barrier("RowLossRecorder.on_train_start")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: MicroBatch, batch_idx: int
    ) -> None:
        if is_dry_run(trainer):
            return
        if not isinstance(outputs, dict) or "nll" not in outputs:
            raise UserError(
                'RowLossRecorder needs a training_step that returns {"loss": ..., "nll": the loss of each label}, as '
                "SFTModule's does: take RowLossRecorder out of the callbacks, or return both"
            )
        ends_step = is_optimizer_step(trainer)
        if batch.num_rows:
            step = trainer.global_step if ends_step else trainer.global_step + 1
            self._entries.append(_Entry(step, batch.sources, _sum_rows(outputs["nll"], batch)))
        self._num_micro_batches += 1
        if ends_step:
            self._last_whole_step = trainer.global_step
            if self._num_micro_batches >= _MICRO_BATCHES_AT_ONCE:
                self._write(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._write(trainer)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if trainer.state.fn == "fit":
            self._write(trainer)
            # The checkpoint is written after this hook, when the rows of every replica up to its step are on disk.
            trainer.strategy.barrier("RowLossRecorder.on_save_checkpoint")

    def _write(self, trainer: Trainer) -> None:
        """Writes the rows of complete steps and keeps those of the current one, which a resumed run repeats."""
        whole = [entry for entry in self._entries if entry.step <= self._last_whole_step]
        self._entries = self._entries[len(whole) :]
        due, self._num_micro_batches = self._num_micro_batches, 0
        if not due or is_dry_run(trainer):
            return
        run, epoch = run_folder(trainer, self.output_dir), trainer.current_epoch
        num_replicas, replica = replicas(trainer)
        part = f"{FOLDER}/epoch-{epoch}/step-{self._last_whole_step}"
        if trainer.is_global_zero:
            for rank in range(num_replicas):
                register_file(run, f"{part}.rank-{rank}.parquet")
        if whole:
            _write_table(_table(whole, epoch), run / f"{part}.rank-{replica}.parquet")


def _sum_rows(nll: Tensor, batch: MicroBatch) -> Tensor:
    """Returns for each row the sum of ``nll`` and its number of labels. Shape [2, B]; without a host sync."""
    dtype = torch.float32 if nll.device.type == "mps" else torch.float64  # Apple's GPUs have no float64
    values = torch.ones((2, len(nll)), dtype=dtype, device=nll.device)
    values[0] = nll
    sums = torch.zeros((2, batch.num_rows), dtype=dtype, device=nll.device)
    return sums.index_add_(1, batch.label_rows, values)


def _table(entries: list[_Entry], epoch: int) -> Any:
    import pyarrow as pa

    nll_sums, num_labels = torch.cat([entry.sums for entry in entries], dim=1).cpu().numpy()
    sources = [source for entry in entries for source in entry.sources]
    steps = [entry.step for entry in entries for _ in entry.sources]
    columns = {
        "source": pa.array(sources, pa.string()),
        "epoch": pa.array([epoch] * len(sources), pa.int32()),
        "step": pa.array(steps, pa.int64()),
        "num_labels": pa.array(num_labels.astype("int32"), pa.int32()),
        "nll_sum": pa.array(nll_sums.astype("float64"), pa.float64()),
    }
    return pa.table(columns)


def _write_table(table: Any, path: Path) -> None:
    import pyarrow.parquet as pq

    with write_atomically(path, "wb") as file:
        pq.write_table(table, file, compression="zstd")


def _drop_steps_after(run: Path, step: int) -> None:
    """Drops the rows that a run which resumes after ``step`` writes again. Moves a file that cannot be read aside.

    A file ends where its run saved a checkpoint, so it is usually kept or deleted whole. It is cut only if the run
    resumes from a checkpoint that an earlier resume had left behind.
    """
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    folder = run / FOLDER
    for path in unfinished(folder, "epoch-*/step-*"):
        path.unlink()
    for path in folder.glob("epoch-*/step-*.parquet"):
        match = _PART.fullmatch(path.name)
        if match is None or int(match[1]) <= step:
            continue
        try:
            table = pq.read_table(path)
            table = table.filter(pc.less_equal(table["step"], step))
        except (OSError, KeyError, pa.ArrowException):
            aside = path.with_name(f"{path.name}.damaged")
            register_file(run, aside.relative_to(run).as_posix())
            path.replace(aside)
            logger.warning("'%s' cannot be read and was moved to '%s'", path, aside)
            continue
        if len(table):
            _write_table(table, path.with_name(path.name.replace(f"step-{match[1]}.", f"step-{step}.", 1)))
        path.unlink()
