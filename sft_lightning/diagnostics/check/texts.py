"""Find unwanted characters, and rows whose white space between prompt and response is unusual."""

import re
from collections import Counter
from collections.abc import Sequence

from sft_lightning.diagnostics.check.findings import Finding, Place, counted
from sft_lightning.diagnostics.check.rows import Row, Sources

# C0 except tab, line feed and carriage return; DEL and C1; the byte-order mark.
_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ufeff]")
_FAULTS = (
    ("carriage_returns", re.compile("\r"), "a carriage return", "the model learns to write it: use \\n alone"),
    (
        "replacement_characters",
        re.compile("\ufffd"),
        "U+FFFD, which replaces text that was lost in decoding",
        "decode the source with its own encoding",
    ),
    ("control_characters", _CONTROL, "a control character", "remove them"),
)
# Rows are odd if at least this share of all rows agrees on the white space between prompt and response.
_AGREEMENT = 0.9
_BORDERS = ("none", "before the response", "after the prompt", "both")


class Texts:
    """Collects findings about the texts of a set's rows."""

    def __init__(self, set_name: str) -> None:
        self._set_name = set_name
        self._places: dict[str, list[Place]] = {name: [] for name, *_ in _FAULTS}
        self._borders = bytearray()  # two bits per row

    def add(self, rows: Sequence[Row]) -> None:
        """Adds rows, in file order."""
        for record, _ in rows:
            for name, pattern, *_ in _FAULTS:
                found = [field for field in ("prompt", "response") if pattern.search(getattr(record, field))]
                if found:
                    self._places[name].append(Place(record.source, reason=" and ".join(found)))
            self._borders.append(2 * record.prompt[-1].isspace() + record.response[0].isspace())

    def findings(self, sources: Sources) -> list[Finding]:
        """Returns the findings.

        Args:
            sources: ``file:line`` of the rows.
        """
        findings = []
        for name, _, noun, fix in _FAULTS:
            if places := self._places[name]:
                message = f"{self._set_name}: {counted(len(places), 'row holds', 'rows hold')} {noun}"
                findings.append(Finding(name, "warning", message, fix, len(places), places))
        return findings + self._odd_borders(sources)

    def _odd_borders(self, sources: Sources) -> list[Finding]:
        num_rows = len(self._borders)
        ((usual, count),) = Counter(self._borders).most_common(1) or [(0, 0)]
        if count == num_rows or count < _AGREEMENT * num_rows:
            return []
        odd = [
            Place(sources[row], reason=_BORDERS[border]) for row, border in enumerate(self._borders) if border != usual
        ]
        return [
            Finding(
                "odd_borders",
                "info",
                f"{self._set_name}: {counted(len(odd), 'row has', 'rows have')} other white space between prompt and "
                f"response than the rest ({_BORDERS[usual]})",
                "make them alike: the first token of an answer depends on it",
                len(odd),
                odd,
            )
        ]
