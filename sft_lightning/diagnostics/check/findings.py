"""Define a finding: one kind of fault, its severity, its places and its fix."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

Severity = Literal["error", "warning", "info"]

# A data fault that does not stop a run is a warning up to this share of a set's rows, and an error above it. On 1,319
# rows it is a third of the 95% interval of an accuracy of 50%: fewer rows cannot decide a comparison.
TOLERATED_SHARE = 0.01


@dataclass(frozen=True, slots=True)
class Place:
    """A row that a finding is about.

    Attributes:
        source: ``file:line``, counted from 1.
        other: ``file:line`` of a second row, such as the first of two equal rows.
        reason: What is wrong with the row, if that differs between the places of a finding.
    """

    source: str
    other: str = ""
    reason: str = ""

    def as_dict(self) -> dict[str, str]:
        """Returns the fields that are not empty."""
        values = {"source": self.source, "other": self.other, "reason": self.reason}
        return {name: value for name, value in values.items() if value}


@dataclass(frozen=True, slots=True)
class Finding:
    """All faults of one kind in one set.

    Attributes:
        name: The kind of fault, in lower case with underscores.
        severity: ``error`` would spoil the run, ``warning`` needs a look, ``info`` is good to know.
        message: One sentence with the numbers.
        fix: What to do, in one sentence; empty if there is nothing to do.
        count: The number of rows, files or prompts.
        places: All of them, if they are rows of a file.
    """

    name: str
    severity: Severity
    message: str
    fix: str = ""
    count: int = 0
    places: Sequence[Place] = ()

    def as_dict(self) -> dict[str, Any]:
        """Returns the finding as it is written to JSON."""
        return {
            "name": self.name,
            "severity": self.severity,
            "message": self.message,
            "fix": self.fix,
            "count": self.count,
            "places": [place.as_dict() for place in self.places],
        }


def by_share(count: int, num_rows: int) -> Severity:
    """Returns ``error`` for more than ``TOLERATED_SHARE`` of the rows, else ``warning``."""
    return "error" if count > TOLERATED_SHARE * num_rows else "warning"


def counted(count: int, noun: str, plural: str = "") -> str:
    """Returns a number with its noun.

    Example:
        >>> counted(1, "row"), counted(1200, "row"), counted(2, "response has", "responses have")
        ('1 row', '1,200 rows', '2 responses have')
    """
    return f"{count:,} {noun if count == 1 else plural or noun + 's'}"
