"""Read the folder of a run as far as possible, also during training, after a crash, or if files are missing."""

import json
import logging
import re
from dataclasses import dataclass
from functools import cached_property
from math import isfinite
from pathlib import Path
from typing import Any

import yaml

from sft_lightning.errors import UserError
from sft_lightning.evaluation.result import wrong_fields, wrong_metrics
from sft_lightning.reporting.metrics_rows import read_metrics_rows

logger = logging.getLogger(__name__)

_STEP = re.compile(r"(?:step|checkpoint)-(\d+)")
_SHOWN = ("prompt", "response", "format_correct", "answer_correct")


@dataclass(frozen=True)
class Evaluation:
    """One evaluation of a run.

    Attributes:
        folder: Folder of ``predictions.jsonl`` and ``metrics.json``.
        step: Optimizer steps done; None for an evaluation outside of a run.
        metrics: Content of ``metrics.json``; empty if it cannot be read.
    """

    folder: Path
    step: int | None
    metrics: dict[str, Any]

    @cached_property
    def samples(self) -> list[dict[str, Any]]:
        """The rows of ``predictions.jsonl`` that are samples. The others are left out with a warning."""
        path = self.folder / "predictions.jsonl"
        # Not splitlines(): a response may contain U+2028 and similar characters, which do not end a line in JSON.
        lines = _read_text(path).split("\n")
        rows = [_parse(line) for line in lines]
        wrong = [
            number for number, row in enumerate(rows, start=1) if not _is_sample(row) and lines[number - 1].strip()
        ]
        if wrong:
            logger.warning("'%s': left out %d lines that are no samples, line %d first", path, len(wrong), wrong[0])
        return [{"index": number, "sample": 0, **row} for number, row in enumerate(rows) if _is_sample(row)]


@dataclass(frozen=True)
class RunFiles:
    """A run folder, or the folder of a plain evaluation.

    Attributes:
        folder: The folder itself.
        config: Content of ``config.yaml``; empty if it is missing or unreadable.
        series: Metric of ``metrics.csv`` -> its finite values, each with its optimizer step.
        evaluations: Evaluations in the order of their steps.
        best_step: The step whose weights the run keeps as ``best``.
        final_step: The step whose weights are in ``final``; None if the run is not finished.
    """

    folder: Path
    config: dict[str, Any]
    series: dict[str, list[tuple[int, float]]]
    evaluations: list[Evaluation]
    best_step: int | None
    final_step: int | None

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    @property
    def last_step(self) -> int | None:
        """The last optimizer step in the files."""
        steps = [points[-1][0] for points in self.series.values()]
        return max([*steps, *(one.step for one in self.evaluations if one.step is not None)], default=None)

    @property
    def baseline(self) -> Evaluation | None:
        """The first evaluation, for the comparison with the latest; None if there is only one."""
        first = next((one for one in self.evaluations if one.samples), None)
        return None if first is self.latest else first

    @property
    def latest(self) -> Evaluation | None:
        """The last evaluation whose samples can be read."""
        return next((one for one in reversed(self.evaluations) if one.samples), None)


def read_run(folder: Path) -> RunFiles:
    """Returns the content of the folder of a run or of a plain evaluation.

    Raises:
        UserError: If the folder does not exist or holds nothing to report.
    """
    if not folder.is_dir():
        raise UserError(f"run folder '{folder}' does not exist; name the output_dir of a run or of an evaluation")
    files = RunFiles(
        folder=folder,
        config=_read_config(folder / "config.yaml"),
        series=_read_series(folder / "metrics.csv"),
        evaluations=_read_evaluations(folder),
        best_step=_best_step(folder / "best"),
        final_step=_final_step(folder / "final" / "manifest.json"),
    )
    if not (files.config or files.series or files.evaluations):
        raise UserError(
            f"run folder '{folder}' holds nothing to report: no config.yaml, metrics.csv, evaluation/step-<n>, "
            "metrics.json or predictions.jsonl; name the output_dir of a run or of an evaluation"
        )
    return files


def read_json(path: Path) -> dict[str, Any]:
    """Returns the object in a JSON file; empty if it is missing or unreadable."""
    return _parse(_read_text(path))


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _parse(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _is_sample(row: dict[str, Any]) -> bool:
    return all(name in row for name in _SHOWN) and not wrong_fields(row)


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = yaml.safe_load(_read_text(path))
        json.dumps(config, default=str, skipkeys=True)  # raises ValueError if it contains itself
    except (yaml.YAMLError, ValueError, RecursionError):
        return {}
    return config if isinstance(config, dict) else {}


def _read_series(path: Path) -> dict[str, list[tuple[int, float]]]:
    series: dict[str, list[tuple[int, float]]] = {}
    for row in read_metrics_rows(path)[1]:
        step = int(row.pop("step"))
        for name, text in row.items():
            if (value := _number(text)) is not None:
                series.setdefault(name, []).append((step, value))
    return {name: sorted(points, key=lambda point: point[0]) for name, points in series.items()}


def _number(text: Any) -> float | None:
    try:
        value = float(text)
    except (TypeError, ValueError):
        return None
    return value if isfinite(value) else None


def _read_evaluations(folder: Path) -> list[Evaluation]:
    steps = {int(match[1]): path for path in folder.glob("evaluation/step-*") if (match := _STEP.fullmatch(path.name))}
    found = [Evaluation(path, step, _read_metrics(path)) for step, path in sorted(steps.items())]
    if not found:
        found = [Evaluation(folder, None, _read_metrics(folder))]
    return [one for one in found if one.metrics or one.samples]


def _read_metrics(folder: Path) -> dict[str, Any]:
    """Returns the metrics of an evaluation. What has another type than they have is left out with a warning."""
    metrics = read_json(folder / "metrics.json")
    wrong = wrong_metrics(metrics)
    if wrong:
        logger.warning("'%s': left out what has a wrong type: %s", folder / "metrics.json", ", ".join(wrong))
    return {name: value for name, value in metrics.items() if name not in wrong}


def _best_step(link: Path) -> int | None:
    match = _STEP.fullmatch(link.readlink().name) if link.is_symlink() else None
    return int(match[1]) if match else None


def _final_step(manifest: Path) -> int | None:
    step = read_json(manifest).get("step")
    return step if isinstance(step, int) else None
