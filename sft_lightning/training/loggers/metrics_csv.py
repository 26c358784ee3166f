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
        self._columns = []

    @rank_zero_only
    def start_after(
        self, step: int, *, validates_again: bool = False, step_metrics: dict[str, float] | None = None
    ) -> None:
        """Drops the rows that a run which resumes after ``step`` writes again.

        Args:
            step: Completed optimizer steps.
            validates_again: Whether the run repeats the validation at that step.
            step_metrics: Metrics of that step, in case the interrupted run died before it wrote them.
        """

        def stays(row: dict[str, str]) -> bool:
            is_validation = any(value for name, value in row.items() if name.startswith("val/"))
            return int(row["step"]) < step + (not (validates_again and is_validation))

        rows = [row for row in self._read() if stays(row)]
        self._write(rows)
        if step_metrics and not any(int(row["step"]) == step for row in rows):
            self.log_metrics(step_metrics, step)

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        row = {"step": step or 0, **{name: value for name, value in metrics.items() if name != "epoch"}}
        new = [name for name in row if name not in self._columns]
        if new or not self._path.exists():
            rows = self._read()
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
        return rows

    def _write(self, rows: list[dict[str, str]]) -> None:
        register_file(self._path.parent, self._path.name)
        with write_atomically(self._path, newline="") as file:
            writer = csv.DictWriter(file, self._columns or ["step"], restval="", extrasaction="ignore")
            writer.writeheader()
            writer.writerows(rows)
