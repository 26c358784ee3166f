"""Read the results of a sweep from the folders of its runs and tabulate them in Markdown."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sft_lightning.checkpointing import folder as folders
from sft_lightning.errors import UserError
from sft_lightning.evaluation.comparison import compare
from sft_lightning.evaluation.result import read_samples
from sft_lightning.reporting.run_files import RunFiles, read_run

_RATES = ("format_accuracy", "answer_accuracy")


@dataclass(frozen=True)
class Rate:
    """A fraction of the prompts, in [0, 1], with its 95% interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Evaluation:
    """Graded answers after ``step`` optimizer steps; step 0 is before training."""

    step: int
    num_prompts: int
    format_accuracy: Rate
    answer_accuracy: Rate


@dataclass(frozen=True)
class SizeResult:
    """A finished run.

    Attributes:
        label: The size as the user gave it: a number, or ``full``.
        num_examples: Number of training rows.
        folder: Folder of the run, inside the sweep's.
        num_steps: Number of optimizer steps.
        val_loss: Loss of the last validation, in nats per label token; None without validations.
        evaluations: By step.
        p_value: p-value of McNemar's exact test against the next smaller size, on the answers to the same prompts;
            None if there is no such size or its prompts differ.
    """

    label: str
    num_examples: int
    folder: str
    num_steps: int
    val_loss: float | None
    evaluations: tuple[Evaluation, ...]
    p_value: float | None = None

    @property
    def last(self) -> Evaluation:
        return self.evaluations[-1]

    @property
    def before(self) -> Evaluation | None:
        """The evaluation before training, which is the same for all sizes."""
        return self.evaluations[0] if self.evaluations[0].step == 0 else None

    def as_dict(self) -> dict[str, Any]:
        """Returns the entry of ``sweep.json``."""
        return asdict(self)


def is_finished(run: Path) -> bool:
    """Returns whether a run is finished: it writes the final model last."""
    return (run / "final" / folders.MANIFEST).is_file()


def read_results(sweep: Path, num_examples: dict[str, int]) -> list[SizeResult]:
    """Returns the finished runs of a sweep, smallest first.

    Args:
        sweep: Folder of the sweep.
        num_examples: Number of examples of each size, by its label; unfinished runs are skipped.

    Raises:
        UserError: If a finished run has no evaluation.
    """
    labels = sorted(num_examples, key=lambda label: num_examples[label])
    labels = [label for label in labels if is_finished(run_folder(sweep, label))]
    results: list[SizeResult] = []
    for label in labels:
        run = run_folder(sweep, label)
        files = read_run(run)
        evaluations = _evaluations(files)
        losses = files.series.get("val/loss")
        before = _last_samples(run_folder(sweep, results[-1].label), results[-1].last.step) if results else None
        results.append(
            SizeResult(
                label=label,
                num_examples=num_examples[label],
                folder=run.name,
                num_steps=folders.read_manifest(run / "final")["step"],
                val_loss=losses[-1][1] if losses else None,
                evaluations=evaluations,
                p_value=None if before is None else _p_value(before, _last_samples(run, evaluations[-1].step)),
            )
        )
    return results


def run_folder(sweep: Path, label: str) -> Path:
    """Returns the folder of a size's run."""
    return sweep / f"size-{label}"


def size_table(results: Sequence[SizeResult]) -> str:
    """Returns a row for each size, and one for the model before training if it was evaluated."""
    rows = [["size", "examples", "steps", "val loss", "format accuracy", "answer accuracy", "p vs smaller"]]
    if results and (before := results[0].before):
        rows.append(
            ["before", "0", "0", "", _rate_cell(before.format_accuracy), _rate_cell(before.answer_accuracy), ""]
        )
    for result in results:
        rows.append(
            [
                result.label,
                str(result.num_examples),
                str(result.num_steps),
                "" if result.val_loss is None else f"{result.val_loss:.3f}",
                _rate_cell(result.last.format_accuracy),
                _rate_cell(result.last.answer_accuracy),
                "" if result.p_value is None else _p_value_cell(result.p_value),
            ]
        )
    return _markdown(rows)


def step_table(results: Sequence[SizeResult]) -> str:
    """Returns a row for each evaluation during training."""
    rows = [["size", "step", "format accuracy", "answer accuracy"]]
    for result in results:
        for each in result.evaluations:
            rows.append(
                [result.label, str(each.step), _rate_cell(each.format_accuracy), _rate_cell(each.answer_accuracy)]
            )
    return _markdown(rows)


def report(results: Sequence[SizeResult]) -> str:
    """Returns the text of ``sweep.md``."""
    num_prompts = results[0].last.num_prompts if results else 0
    return "\n".join(
        [
            "# Accuracy against the number of training examples",
            "",
            f"{num_prompts} prompts; 95% intervals in brackets. Each size is trained on the first rows of the same "
            "file, so a larger size contains the smaller ones. p: McNemar's exact test against the next smaller size, "
            "on the answers to the same prompts.",
            "",
            size_table(results),
            "",
            "![accuracy against size, and during training](sweep.png)",
            "",
            "## During training",
            "",
            step_table(results),
            "",
        ]
    )


def _evaluations(files: RunFiles) -> tuple[Evaluation, ...]:
    known = [(one.step, one.metrics) for one in files.evaluations if one.step is not None and one.metrics]
    if not known:
        raise UserError(f"run '{files.folder}' has no evaluation/step-<n>/metrics.json, which the comparison needs")
    return tuple(
        Evaluation(step, metrics["num_examples"], **{name: _rate(metrics, name) for name in _RATES})
        for step, metrics in known
    )


def _rate(metrics: dict[str, Any], name: str) -> Rate:
    return Rate(metrics[name], *metrics["intervals"][name])


def _last_samples(run: Path, step: int) -> list[dict[str, Any]]:
    return read_samples(run / "evaluation" / f"step-{step}")


def _p_value(before: list[dict[str, Any]], after: list[dict[str, Any]]) -> float | None:
    try:
        return compare(before, after).rates["answer_accuracy"].p_value
    except UserError:  # other prompts
        return None


def _rate_cell(rate: Rate) -> str:
    return f"{rate.value:.3f} [{rate.low:.3f}, {rate.high:.3f}]"


def _p_value_cell(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    ruler = ["-" * (width - 1) + ":" for width in widths]
    lines = [rows[0], ruler, *rows[1:]]
    return "\n".join(
        "| " + " | ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines
    )
