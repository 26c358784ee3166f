"""Stop or skip an optimizer step that is not finite and save its rows for a replay; stop a run whose weights are not.

RUN/nonfinite/step-12/
  rows.jsonl    the step's rows as training data: prompt, response, ground_truth, weight; and their source
  about.json    the step, and what a replay needs to run the rows through the model as the run did
"""

import json
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import torch
from lightning.pytorch import Trainer

from sft_lightning.checkpointing.run_folder import register_file, run_folder
from sft_lightning.data.batch import Example, Layout
from sft_lightning.data.formats.base import Record
from sft_lightning.data.load_report import LoadReport, SkippedRows
from sft_lightning.data.records import read_records
from sft_lightning.data.settings import DataSettings, Overlength
from sft_lightning.data.tokenization import tokenize_records
from sft_lightning.distributed.collectives import SUM_DTYPE, all_gather_distinct
from sft_lightning.distributed.fsdp import own_parts
from sft_lightning.errors import NonFiniteError, UserError, check_at_least
from sft_lightning.lightning_compat.trainer import TrainingData, datamodule_of, is_dry_run
from sft_lightning.models.attention.selection import AttentionChoice
from sft_lightning.models.loading import Initialization
from sft_lightning.system.files import write_atomically
from sft_lightning.training.oom_advice import last_checkpoint
from sft_lightning.training.step import MicroBatchLosses, StepStats, name_sources

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

OnNonFinite = Literal["stop", "skip"]

FOLDER = "nonfinite"
ROWS = "rows.jsonl"
ABOUT = "about.json"
# Fields of about.json that a replay reads, with the types or the values that they may have.
_NEEDED: dict[str, tuple[Any, ...]] = {
    "step": (int,),
    "loss": (int, float, str),
    "gradient_norm": (int, float, str),
    "checkpoint": (str, type(None)),
    "model_path": (str,),
    "init": get_args(Initialization),
    "attn_implementation": get_args(AttentionChoice),
    "tokenizer_path": (str,),
    "max_length": (int,),
    "overlength": get_args(Overlength),
    "append_eos": (bool,),
    "precision": (str,),
    "layout": get_args(Layout),
    "seed": (int,),
}


class StepRow(NamedTuple):
    """A row of an optimizer step: ``file:line``, and whether the losses of all its labels are finite."""

    source: str
    is_finite: bool


class NonFinitePolicy:
    """Keeps NaN and infinity out of a run's weights and its checkpoints.

    A step with a non-finite loss or gradient does not change the weights. An update that itself overflows does; then
    the run ends before the weights are validated or saved.

    Args:
        on_nonfinite: Whether such a step stops the run or is skipped.
        max_nonfinite_steps: With ``skip``, how many steps of a run may be skipped; one more stops it.

    Attributes:
        num_skipped: Steps of this run that were skipped.

    Raises:
        UserError: If ``max_nonfinite_steps`` is below 0.
    """

    def __init__(self, on_nonfinite: OnNonFinite = "stop", max_nonfinite_steps: int = 0) -> None:
        check_at_least(0, "model", max_nonfinite_steps=max_nonfinite_steps)
        self._max_skipped = max_nonfinite_steps if on_nonfinite == "skip" else 0
        self.num_skipped = 0
        self._counts_at_start: dict[str, int] | None = None

    def watch_weights(self, trainer: Trainer) -> None:
        """Counts what is not finite in the weights that a run starts from, such as unused rows of an embedding."""
        self._counts_at_start = _count_nonfinite(trainer)

    def check_weights(self, trainer: Trainer) -> None:
        """Checks that training has made no weight NaN or infinite. All processes must call this.

        Raises:
            NonFiniteError: In all processes.
        """
        if self._counts_at_start is None:
            return
        counts = _count_nonfinite(trainer)
        broken = [name for name, count in counts.items() if count > self._counts_at_start[name]]
        if broken:
            raise NonFiniteError(
                f"{len(broken)} of {len(counts)} weights are NaN or infinite after optimizer step "
                f"{trainer.global_step}, the first is {broken[0]}: they are not saved, and earlier checkpoints are "
                "untouched. A learning rate that is far too high or an optimizer's eps of 0 does this"
            )

    def stop_or_skip(self, trainer: Trainer, stats: StepStats, micro_batches: Sequence[MicroBatchLosses]) -> None:
        """Saves the rows of a step, then stops the run or skips the step.

        A skipped step has no gradients: the optimizer leaves each parameter and its state unchanged, while the plan and
        the learning rate schedule advance. All processes must call this.

        Args:
            trainer: Before the step.
            stats: Of the step.
            micro_batches: Of the step, in this process.

        Raises:
            NonFiniteError: In all processes, if no further step may be skipped.
        """
        step, stops = trainer.global_step + 1, self.num_skipped >= self._max_skipped
        rows = all_gather_distinct(rows_of_step(micro_batches), trainer.world_size)
        done = "stopped before the step" if stops else "skipped the step"
        if self._max_skipped:
            done += f" ({self.num_skipped + 1 - stops} of {self._max_skipped} skipped)"
        folder = None if is_dry_run(trainer) else step_folder(run_folder(trainer, None), step)
        line = describe_non_finite(step, stats.loss, stats.grad_norm, rows, done=done, folder=folder)
        if folder is not None and trainer.is_global_zero:
            try:
                _save(trainer, stats, rows, micro_batches)
            except OSError as error:  # a full disk must not hide why the run stops
                logger.warning("the rows could not be saved in '%s': %s", folder, error)
        # Launchers kill a run as soon as one of its processes fails, so the rows must be on disk before that.
        trainer.strategy.barrier("NonFinitePolicy")
        if stops:
            raise NonFiniteError(line)
        self.num_skipped += 1
        for parameter in trainer.lightning_module.parameters():
            parameter.grad = None
        if trainer.is_global_zero:
            logger.warning(line)


def _count_nonfinite(trainer: Trainer) -> dict[str, int]:
    """Returns how many numbers of each parameter are not finite, the same in all processes."""
    parts = dict(own_parts(trainer.lightning_module))
    # A sum is several times faster than counting. It may overflow, but it is never finite where an element is not.
    sums = torch.stack([part.sum(dtype=torch.float32) for part in parts.values()]).tolist()
    suspects = [name for name, total in zip(parts, sums, strict=True) if not isfinite(total)]
    counts = dict.fromkeys(parts, 0) | {name: int((~parts[name].isfinite()).sum()) for name in suspects}
    own = torch.tensor([*counts.values()], dtype=SUM_DTYPE, device=trainer.strategy.root_device)
    total: torch.Tensor = trainer.strategy.reduce(own, reduce_op="sum")
    return dict(zip(parts, map(int, total.tolist()), strict=True))


def rows_of_step(micro_batches: Iterable[MicroBatchLosses]) -> list[StepRow]:
    """Returns the rows of one process's micro-batches. The host waits for the device."""
    rows = []
    for losses, batch in micro_batches:
        bad = set(batch.label_rows[~losses.nll.isfinite()].tolist())
        rows += [StepRow(source, row not in bad) for row, source in enumerate(batch.sources)]
    return rows


def describe_non_finite(
    step: int, loss: float, norm: float, rows: Sequence[StepRow], *, done: str, folder: Path | None = None
) -> str:
    """Returns one line that names the rows behind a loss or gradient that is NaN or infinite.

    These are the rows whose own loss is not finite, or all rows of the step if only the gradient overflowed.

    Args:
        step: The number of the step, from 1.
        loss: Of the step, in nats.
        norm: Of the step's gradient.
        rows: Of the step, in all processes.
        done: What happened to the step.
        folder: Where the rows are saved.
    """
    named = [row.source for row in rows if not row.is_finite] or [row.source for row in rows]
    replay = f" Each row alone: sft-lightning replay '{folder}'." if folder else ""
    return (
        f"loss {loss} and gradient norm {norm} in optimizer step {step}: {done}, the weights and the last checkpoint "
        f"are untouched.{replay} Examples: {name_sources(named)}"
    )


def find_records(read: Callable[[], Iterable[Record]], rows: Sequence[StepRow]) -> list[Record]:
    """Returns the records of a step's rows; rows whose own loss is not finite come first.

    Skips rows that are no longer in their file; ``about.json`` names them.

    Args:
        read: Yields the records of the training data, in file order.
        rows: Of the step.
    """
    wanted, found = {row.source for row in rows}, {}
    try:
        for record in read():
            if record.source in wanted:
                found[record.source] = record
                if len(found) == len(wanted):
                    break
    except UserError:  # the file is gone, or was changed
        pass
    return [found[row.source] for row in sorted(rows, key=lambda row: row.is_finite) if row.source in found]


def step_folder(run: Path, step: int) -> Path:
    """Returns the folder in which a run saves an optimizer step; steps are numbered from 1."""
    return run / FOLDER / f"step-{step}"


def save_step(run: Path, records: Sequence[Record], about: Mapping[str, Any]) -> None:
    """Writes the rows of step ``about["step"]``, and what a replay needs, into the run's folder.

    Args:
        run: Folder of the run.
        records: Of the step's rows.
        about: Numbers that are not finite become text, because JSON cannot hold them.
    """
    folder = step_folder(run, about["step"])
    for name in (ROWS, ABOUT):
        register_file(run, f"{FOLDER}/{folder.name}/{name}")
    with write_atomically(folder / ROWS) as file:
        file.writelines(json.dumps(_as_row(record), ensure_ascii=False) + "\n" for record in records)
    plain = {name: str(v) if isinstance(v, float) and not isfinite(v) else v for name, v in about.items()}
    with write_atomically(folder / ABOUT) as file:
        json.dump(plain, file, indent=2, ensure_ascii=False, allow_nan=False)


def read_about(folder: Path) -> dict[str, Any]:
    """Returns what ``save_step`` wrote about a step.

    Raises:
        UserError: If the folder holds no saved step.
    """
    try:
        about = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            f"'{folder}' holds no {ABOUT} that can be read ({type(error).__name__}); name a folder "
            f"RUN/{FOLDER}/step-<n> of a run with a loss or gradient that was not finite"
        ) from None
    missing = [name for name in _NEEDED if not isinstance(about, dict) or name not in about]
    if missing:
        raise UserError(f"'{folder / ABOUT}' has no '{missing[0]}': it was not written by a run, or was changed")
    about["rows_not_found"] = about.get("rows_not_found", [])
    for name, allowed in {**_NEEDED, "rows_not_found": (list,)}.items():
        value = about[name]
        if (type(value) not in allowed and value not in allowed) or (type(value) is int and not 0 <= value < 2**63):
            raise UserError(f"'{folder / ABOUT}': {name} {str(value)[:40]!r} was not written by a run, or was changed")
    return about


def read_examples(folder: Path, tokenizer: "PreTrainedTokenizerBase", about: Mapping[str, Any]) -> list[Example]:
    """Returns the saved rows of a step as the run tokenized them, with their original ``file:line``.

    Raises:
        UserError: If the rows cannot be read.
    """
    path = folder / ROWS
    settings = DataSettings.of_saved_rows(path, about)
    tokenized = tokenize_records(read_records(settings), tokenizer, settings, LoadReport())
    examples = {record.source: example for record, example in tokenized}
    return [
        examples[place]._replace(source=str(json.loads(line).get("source", "")))
        for number, line in enumerate(path.read_bytes().split(b"\n"), start=1)
        if (place := f"{path}:{number}") in examples
    ]


def _as_row(record: Record) -> dict[str, Any]:
    row = {"prompt": record.prompt, "response": record.response, "ground_truth": record.ground_truth}
    return {**row, "weight": record.weight, "source": record.source}


def _save(
    trainer: Trainer, stats: StepStats, rows: Sequence[StepRow], micro_batches: Sequence[MicroBatchLosses]
) -> None:
    data: TrainingData = datamodule_of(trainer)
    settings = data.settings("train")
    module: Any = trainer.lightning_module
    run, checkpoint = run_folder(trainer, None), last_checkpoint(trainer)
    records = find_records(lambda: read_records(settings, SkippedRows()), rows)
    about = {
        "step": trainer.global_step + 1,
        "loss": stats.loss,
        "gradient_norm": stats.grad_norm,
        # A checkpoint of this run is saved by name, so that the run's folder may move.
        "checkpoint": Path(checkpoint).name if checkpoint and Path(checkpoint).parent == run else checkpoint,
        "model_path": _absolute(module.hparams["model_path"]),
        **{name: module.hparams[name] for name in ("init", "attn_implementation")},
        "tokenizer_path": _absolute(str(data.tokenizer_path)),
        **settings.token_options,
        "precision": str(trainer.precision),
        "layout": next((batch.layout for _, batch in micro_batches if batch.num_rows), "padded"),
        "seed": data.seed,
        "rows": [row.source for row in rows],
        "rows_not_finite": [row.source for row in rows if not row.is_finite],
        "rows_not_found": sorted({row.source for row in rows} - {record.source for record in records}),
    }
    save_step(run, records, about)


def _absolute(path: str) -> str:
    """Returns an absolute path for a folder, and a hub name unchanged."""
    return str(Path(path).resolve()) if Path(path).is_dir() else path
