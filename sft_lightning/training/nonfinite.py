"""What is told and kept of an optimizer step that must not be taken, or that stands out.

RUN/nonfinite/step-12/
  rows.jsonl    the step's rows as data that a run would read: prompt, response, ground_truth, weight; and their source
  about.json    the step, and what a replay needs to put the rows through the model as the run did
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from sft_lightning.checkpointing.run_folder import register_file
from sft_lightning.data.batch import Example, MicroBatch
from sft_lightning.data.formats.base import Record
from sft_lightning.data.load_report import LoadReport
from sft_lightning.data.records import read_records
from sft_lightning.data.settings import DataSettings
from sft_lightning.data.tokenization import tokenize_records
from sft_lightning.errors import UserError
from sft_lightning.losses.linear_cross_entropy import LabelLosses

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FOLDER = "nonfinite"
ROWS = "rows.jsonl"
ABOUT = "about.json"
# Of a step, and of the run that it was to be taken in.
_NEEDED = (
    "step",
    "loss",
    "gradient_norm",
    "checkpoint",
    "model_path",
    "init",
    "attn_implementation",
    "tokenizer_path",
    "max_length",
    "overlength",
    "append_eos",
    "precision",
    "layout",
    "seed",
)


class StepRow(NamedTuple):
    """A row of an optimizer step: ``file:line``, and whether the losses of all its labels are finite."""

    source: str
    is_finite: bool


def rows_of_step(parts: Iterable[tuple[LabelLosses, MicroBatch]]) -> list[StepRow]:
    """Returns the rows of one process's micro-batches. The host waits for the device: for a step that went wrong."""
    rows = []
    for losses, batch in parts:
        bad = set(batch.label_rows[~losses.nll.isfinite()].tolist())
        rows += [StepRow(source, row not in bad) for row, source in enumerate(batch.sources)]
    return rows


def name_sources(sources: Sequence[str]) -> str:
    """Returns the first eight sources, and how many more there are."""
    return ", ".join(sources[:8]) + (f" and {len(sources) - 8} more" if len(sources) > 8 else "")


def describe_non_finite(
    step: int, loss: float, norm: float, rows: Sequence[StepRow], *, done: str, folder: Path | None = None
) -> str:
    """Returns one line that names the rows behind a loss or gradient that is NaN or infinite.

    Those whose own loss is not finite; where every row's is (only the gradient overflowed), all rows of the step.

    Args:
        step: The number of the step, from 1.
        loss: Of the step, in nats.
        norm: Of the step's gradient.
        rows: Of the step, in all processes.
        done: What was done about it.
        folder: Where the rows are kept.
    """
    named = [row.source for row in rows if not row.is_finite] or [row.source for row in rows]
    replay = f" Each row alone: sft-lightning replay '{folder}'." if folder else ""
    return (
        f"loss {loss} and gradient norm {norm} in optimizer step {step}: {done}, the weights and the last checkpoint "
        f"are untouched.{replay} Examples: {name_sources(named)}"
    )


def find_records(read: Callable[[], Iterable[Record]], rows: Sequence[StepRow]) -> list[Record]:
    """Returns the records of a step's rows, those first whose own loss is not finite.

    A row that is no longer in its file is left out: it is named in ``about.json`` all the same.

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
    """Returns where a run keeps what it has of an optimizer step; steps are numbered from 1."""
    return run / FOLDER / f"step-{step}"


def save_step(run: Path, records: Sequence[Record], about: Mapping[str, Any]) -> None:
    """Writes the rows of step ``about["step"]``, and what a replay needs, into the run's folder.

    Args:
        run: Folder of the run.
        records: Of its rows.
        about: Numbers that are not finite become text, which JSON has no other way to write.
    """
    folder = step_folder(run, about["step"])
    folder.mkdir(parents=True, exist_ok=True)
    for name in (ROWS, ABOUT):
        register_file(run, f"{FOLDER}/{folder.name}/{name}")
    lines = [json.dumps(_as_row(record), ensure_ascii=False) for record in records]
    (folder / ROWS).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    plain = {name: str(v) if isinstance(v, float) and not isfinite(v) else v for name, v in about.items()}
    (folder / ABOUT).write_text(json.dumps(plain, indent=2, ensure_ascii=False, allow_nan=False), encoding="utf-8")


def read_about(folder: Path) -> dict[str, Any]:
    """Returns what ``save_step`` wrote about a step.

    Raises:
        UserError: If the folder holds nothing of the kind.
    """
    try:
        about = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"'{folder}' holds no {ABOUT} that can be read ({type(error).__name__}); name a folder "
            f"RUN/{FOLDER}/step-<n> of a run that met a step with a loss or gradient that is not finite"
        ) from None
    missing = [name for name in _NEEDED if not isinstance(about, dict) or name not in about]
    if missing:
        raise UserError(f"'{folder / ABOUT}' has no '{missing[0]}': it was not written by a run, or was changed")
    return about


def read_examples(folder: Path, tokenizer: "PreTrainedTokenizerBase", about: Mapping[str, Any]) -> list[Example]:
    """Returns the saved rows of a step as the run tokenised them, by the names that they had there.

    Raises:
        UserError: If there are none that can be read.
    """
    path = folder / ROWS
    settings = DataSettings.of_saved_rows(path, about)
    tokenised = tokenize_records(read_records(settings), tokenizer, settings, LoadReport())
    examples = {
        record.source: Example(np.array([*prompt, *response], dtype=np.int32), len(prompt), record.source)
        for record, prompt, response in tokenised
    }
    names = [json.loads(line).get("source", "") for line in path.read_text(encoding="utf-8").splitlines()]
    return [
        replace(examples[place], source=name)
        for number, name in enumerate(names, start=1)
        if (place := f"{path}:{number}") in examples
    ]


def _as_row(record: Record) -> dict[str, Any]:
    row = {"prompt": record.prompt, "response": record.response, "ground_truth": record.ground_truth}
    return {**row, "weight": record.weight, "source": record.source}
