"""Report which rows of a data set are skipped or truncated, and why."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sft_lightning.data.sources.rows import MemoryRows
from sft_lightning.errors import UserError


@dataclass
class SkippedRows:
    """Rows that are skipped for one kind of reason.

    Attributes:
        count: The number of skipped rows.
        first: ``(file:line, reason)`` of the first twenty.
    """

    count: int = 0
    first: list[tuple[str, str]] = field(default_factory=list)

    def add(self, source: str, reason: str) -> None:
        self.count += 1
        if len(self.first) < 20:
            self.first.append((source, reason))

    def __str__(self) -> str:
        named = [f"{source}: {reason}" for source, reason in self.first[:5]]
        if self.count > len(named):
            named.append(f"and {self.count - len(named)} more")
        return "; ".join(named)


def check_bad_rows(bad_rows: SkippedRows, max_bad_rows: int) -> None:
    """Raises UserError if there are more bad rows than ``max_bad_rows``."""
    if bad_rows.count > max_bad_rows:
        raise UserError(f"too many bad rows ({bad_rows.count}, data.max_bad_rows is {max_bad_rows}): {bad_rows}")


@dataclass
class LoadReport:
    """The rows of a data set that are skipped or shortened, by reason.

    Attributes:
        bad_rows: Rows that cannot be read or tokenized.
        overlength_rows: Rows over ``max_length``.
        truncated_prompts: The number of rows that are kept with a shorter prompt.
        ungraded_rows: Rows without a ground truth, which a filter of responses cannot judge.
        rejected_rows: Rows that the filter rejects.
    """

    bad_rows: SkippedRows = field(default_factory=SkippedRows)
    overlength_rows: SkippedRows = field(default_factory=SkippedRows)
    truncated_prompts: int = 0
    ungraded_rows: SkippedRows = field(default_factory=SkippedRows)
    rejected_rows: SkippedRows = field(default_factory=SkippedRows)

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any], names: Mapping[str, Path | MemoryRows]) -> "LoadReport":
        """Returns the report that ``dataclasses.asdict`` turned into a dictionary.

        Args:
            saved: The dictionary.
            names: The name of each file when the report was saved -> its name now.
        """

        def rows(reason: str) -> SkippedRows:
            kept = saved[reason]
            places = [(source.rpartition(":"), why) for source, why in kept["first"]]
            return SkippedRows(kept["count"], [(f"{names[file]}:{line}", why) for (file, _, line), why in places])

        return cls(
            bad_rows=rows("bad_rows"),
            overlength_rows=rows("overlength_rows"),
            truncated_prompts=saved["truncated_prompts"],
            ungraded_rows=rows("ungraded_rows"),
            rejected_rows=rows("rejected_rows"),
        )

    @property
    def num_rows(self) -> int:
        """The number of skipped rows."""
        reasons = (self.bad_rows, self.overlength_rows, self.ungraded_rows, self.rejected_rows)
        return sum(rows.count for rows in reasons)

    def advice(self, max_length: int) -> str:
        """Returns what to change if every row is skipped."""
        if self.rejected_rows.count or self.ungraded_rows.count:
            return "Look at these rows, name another data.grader, or set data.filter_correct: false"
        return f"Raise data.max_length ({max_length})"

    def __str__(self) -> str:
        return ". ".join(self.sentences)

    @property
    def sentences(self) -> list[str]:
        """One sentence for each reason that occurred, with the number of rows and the first of them."""
        parts = []
        if self.bad_rows.count:
            parts.append(f"bad rows skipped ({self.bad_rows.count}): {self.bad_rows}")
        if self.overlength_rows.count:
            parts.append(f"rows over data.max_length dropped ({self.overlength_rows.count}): {self.overlength_rows}")
        if self.truncated_prompts:
            parts.append(f"prompts cut from the left to data.max_length ({self.truncated_prompts})")
        if self.rejected_rows.count:
            rows = self.rejected_rows
            parts.append(f"rows whose response data.filter_correct does not accept dropped ({rows.count}): {rows}")
        if self.ungraded_rows.count:
            rows = self.ungraded_rows
            parts.append(f"rows that data.filter_correct cannot judge dropped ({rows.count}): {rows}")
        return parts
