"""Log metrics to one metrics.csv, which continues across resumes."""

import csv
import logging
from argparse import Namespace
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only

from sft_lightning.checkpointing.run_folder import register_file
from sft_lightning.reporting.metrics_rows import read_metrics_rows
from sft_lightning.system.files import write_atomically

logger = logging.getLogger(__name__)


class MetricsCSVLogger(Logger):
    """Writes each logged set of metrics as a row; ``step`` is the number of completed optimizer steps.

    Args:
        directory: Folder of the run, which gets ``metrics.csv``.
    """

    def __init__(self, directory: str | Path) -> None:
        super().__init__()
        self._path = Path(directory) / "metrics.csv"
        self._columns: list[str] = []
        # Rows of the step that the run resumed after, until the run writes them again.
        self._repeatable: list[dict[str, str]] = []

    @property
    def name(self) -> str:
        return "metrics_csv"

    @property
    def version(self) -> str:
        return ""

    @property
    def save_dir(self) -> str:
        return str(self._path.parent)

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Writes nothing: config.yaml contains the hyperparameters."""

    @rank_zero_only
    def start_afresh(self) -> None:
        """Drops all rows, which a run that died before its first checkpoint may have left."""
        self._path.unlink(missing_ok=True)
        self._columns, self._repeatable = [], []

    @rank_zero_only
    def start_after(self, step: int, *, step_metrics: dict[str, float] | None = None) -> None:
        """Drops the rows that a run which resumes after ``step`` writes again.

        Rows of that step itself were written before or after its checkpoint. They stay, until the run writes one of
        their metrics again: a validation, the learning rate, or answers at the end of training.

        Args:
            step: Completed optimizer steps.
            step_metrics: Metrics of that step, in case the interrupted run died before it wrote them.
        """
        rows = [row for row in self._read() if int(row["step"]) <= step]
        self._write(rows)
        self._repeatable = [row for row in rows if int(row["step"]) == step] if step else []
        if step_metrics and not any(step_metrics.keys() & row for row in self._repeatable):
            self.log_metrics(step_metrics, step)

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        row = {"step": step or 0, **{name: value for name, value in metrics.items() if name != "epoch"}}
        old = [each for each in self._repeatable if int(each["step"]) == row["step"] and metrics.keys() & each]
        new = [name for name in row if name not in self._columns]
        if new or old or not self._path.exists():
            rows = [each for each in self._read() if each not in old]
            self._repeatable = [each for each in self._repeatable if each not in old]
            self._columns = [*self._columns, *[name for name in row if name not in self._columns]]
            self._write(rows)
        with self._path.open("a", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, self._columns, restval="").writerow(row)

    def _read(self) -> list[dict[str, str]]:
        self._columns, rows = read_metrics_rows(self._path)
        if not self._columns and self._path.is_file() and self._path.stat().st_size:
            aside = self._path.with_name(f"{self._path.name}.damaged")
            register_file(aside.parent, aside.name)
            self._path.replace(aside)
            logger.warning("'%s' was moved to '%s'; metrics go on in a new file", self._path, aside)
        return [{name: value for name, value in row.items() if value} for row in rows]

    def _write(self, rows: list[dict[str, str]]) -> None:
        register_file(self._path.parent, self._path.name)
        with write_atomically(self._path, newline="") as file:
            writer = csv.DictWriter(file, self._columns or ["step"], restval="", extrasaction="ignore")
            writer.writeheader()
            writer.writerows(rows)
