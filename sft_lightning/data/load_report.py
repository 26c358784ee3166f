"""The account of a data set: which rows did not become tokens, and why."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sft_lightning.data.records import SkippedRows


@dataclass
class LoadReport:
    """What a data set holds beside the rows that are kept.

    Attributes:
        bad_rows: Rows that cannot be read or tokenised.
        overlength_rows: Rows over ``max_length``.
        truncated_prompts: How many rows are kept with a shorter prompt.
        ungraded_rows: Rows without a ground truth, which a filter of responses cannot judge.
        rejected_rows: Rows that the filter does not accept.
    """

    bad_rows: SkippedRows = field(default_factory=SkippedRows)
    overlength_rows: SkippedRows = field(default_factory=SkippedRows)
    truncated_prompts: int = 0
    ungraded_rows: SkippedRows = field(default_factory=SkippedRows)
    rejected_rows: SkippedRows = field(default_factory=SkippedRows)

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any], names: Mapping[str, Path]) -> "LoadReport":
        """Returns what ``dataclasses.asdict`` made of one.

        Args:
            saved: A store that was made before a reason was known says nothing about it: no row is left out for it.
            names: A file's name at that time -> its name now.
        """

        def rows(reason: str) -> SkippedRows:
            kept = saved.get(reason, {"count": 0, "first": []})
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
        """How many rows are not kept."""
        reasons = (self.bad_rows, self.overlength_rows, self.ungraded_rows, self.rejected_rows)
        return sum(rows.count for rows in reasons)

    def advice(self, max_length: int) -> str:
        """Returns what to do where no row is kept."""
        if self.rejected_rows.count or self.ungraded_rows.count:
            return "Look at these rows, name another data.grader, or set data.filter_correct: false"
        return f"Raise data.max_length ({max_length})"

    def __str__(self) -> str:
        return ". ".join(self.sentences)

    @property
    def sentences(self) -> list[str]:
        """One for each reason that there is, with how many rows it concerns and which come first."""
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
