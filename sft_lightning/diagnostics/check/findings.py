"""What a check finds: one kind of fault, how bad it is, where it is and what to do about it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

Severity = Literal["error", "warning", "info"]

# Up to this share of its rows a set may have a fault of data that no run fails over: a warning, above it an error. On
# 1,319 rows it is a third of the 95% interval of an accuracy of 50%: below, it cannot be what decides a comparison.
TOLERATED_SHARE = 0.01


@dataclass(frozen=True, slots=True)
class Place:
    """Where something is.

    Attributes:
        source: ``file:line``, counted from 1.
        other: The place that it is about as well, such as the first of two equal rows.
        reason: What is wrong there, where that differs from place to place.
    """

    source: str
    other: str = ""
    reason: str = ""

    def as_dict(self) -> dict[str, str]:
        """Returns ``source``, and of the others what there is."""
        values = {"source": self.source, "other": self.other, "reason": self.reason}
        return {name: value for name, value in values.items() if value}


@dataclass(frozen=True, slots=True)
class Finding:
    """All faults of one kind in one set.

    Attributes:
        name: Of the kind, in lower case with underscores.
        severity: ``error`` would spoil the run, ``warning`` wants a look, ``info`` is good to know.
        message: One sentence with the numbers.
        fix: What to do, one sentence; empty where there is nothing to do.
        count: How many rows, files or prompts.
        places: All of them where they are rows of a file.
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
    """Returns the number with its noun.

    Example:
        >>> counted(1, "row"), counted(1200, "row"), counted(2, "response has", "responses have")
        ('1 row', '1,200 rows', '2 responses have')
    """
    return f"{count:,} {noun if count == 1 else plural or noun + 's'}"
