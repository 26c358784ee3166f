"""Summarize the lengths of a set's rows in tokens."""

from dataclasses import dataclass
from typing import Any

import numpy as np

PERCENTILES = (50, 90, 99)
_MOST_BARS = 12


@dataclass(frozen=True, slots=True)
class LengthSummary:
    """Lengths of prompts, responses or whole rows, in tokens.

    Attributes:
        percentiles: Percent -> length. Each is the length of an actual row.
    """

    least: int
    mean: float
    percentiles: dict[int, int]
    most: int

    @classmethod
    def of(cls, lengths: np.ndarray) -> "LengthSummary":
        """Returns the summary of at least one length."""
        found = np.percentile(lengths, PERCENTILES, method="inverted_cdf")
        return cls(
            int(lengths.min()),
            float(lengths.mean()),
            {percent: int(value) for percent, value in zip(PERCENTILES, found, strict=True)},
            int(lengths.max()),
        )

    def as_dict(self) -> dict[str, Any]:
        """Returns the summary as it is written to JSON."""
        named = {f"p{percent}": value for percent, value in self.percentiles.items()}
        return {"min": self.least, "mean": round(self.mean, 1), **named, "max": self.most}


@dataclass(frozen=True, slots=True)
class Bar:
    """Rows of ``first`` to ``last`` tokens, both included, and whether they are over the limit."""

    first: int
    last: int
    count: int
    is_over: bool


def histogram(used: np.ndarray, over: np.ndarray, max_length: int) -> list[Bar]:
    """Returns bars whose equal width is a round number, then one bar for all rows over ``max_length``.

    Args:
        used: Shape [rows], tokens of the rows in use, at least one.
        over: Shape [rows], tokens of the rows that are longer than ``max_length``.
        max_length: The most tokens of a row in use.
    """
    width = _round_up((int(used.max()) - int(used.min()) + 1) / _MOST_BARS)
    start = (int(used.min()) - 1) // width
    counts = np.bincount((used - 1) // width - start).tolist()
    bars = [
        Bar(number * width + 1, min((number + 1) * width, max_length), count, is_over=False)
        for number, count in enumerate(counts, start=start)
    ]
    if len(over):
        bars.append(Bar(max_length + 1, int(over.max()), len(over), is_over=True))
    return bars


def _round_up(width: float) -> int:
    """Returns the smallest of 1, 2, 5, 10, 20, 50, ... that is at least ``width``."""
    power = 1
    while True:
        for step in (1, 2, 5):
            if step * power >= width:
                return step * power
        power *= 10
