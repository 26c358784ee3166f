"""What a run of a sweep came to, read from its folder: steps, validation loss and every evaluation's accuracies."""

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
    """A share of the prompts, in [0, 1], with its 95% interval."""

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
        label: The size as it was asked for: a number, or ``full``.
        num_examples: Rows it was trained on.
        folder: Of the run, inside the sweep's.
        num_steps: Optimizer steps.
        val_loss: Of its last validation, in nats per label token; None where there was none.
        evaluations: By step.
        p_value: Of McNemar's exact test on the answers to the same prompts after the next smaller size; None where
            there is no such size, or its prompts are others.
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
        """Returns what ``sweep.json`` holds."""
        return asdict(self)


def is_finished(run: Path) -> bool:
    """Returns whether a run came to its end: its final model is the last thing that it writes."""
    return (run / "final" / folders.MANIFEST).is_file()


def read_results(sweep: Path, num_examples: dict[str, int]) -> list[SizeResult]:
    """Returns the finished runs of a sweep, smallest first.

    Args:
        sweep: Folder of the sweep.
        num_examples: Of each size, by its label; runs that are not finished are passed over.

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


def _evaluations(files: RunFiles) -> tuple[Evaluation, ...]:
    known = [(one.step, one.metrics) for one in files.evaluations if one.step is not None and one.metrics]
    if not known:
        raise UserError(f"run '{files.folder}' has no evaluation/step-<n>/metrics.json: nothing to compare it by")
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
