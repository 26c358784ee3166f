"""Read rows that are already in memory as if they were a data file."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeAlias

# A row's fields, or the reason why the row cannot be read.
Row: TypeAlias = Mapping[str, Any] | ValueError


class MemoryRows:
    """Rows from Python: a list of dictionaries, a ``datasets.Dataset``, or any other iterable of mappings.

    Args:
        rows: Read more than once, except for an iterator, whose rows are kept in memory.
        name: Names the rows where a file would have its path.
    """

    def __init__(self, rows: Iterable[Mapping[str, Any]], name: str) -> None:
        self._rows = list(rows) if isinstance(rows, Iterator) else rows
        self._name = name

    def __str__(self) -> str:
        return self._name

    def __iter__(self) -> Iterator[tuple[int, Row]]:
        """Yields each row with its number, which begins at 1."""
        for number, row in enumerate(self._rows, start=1):
            yield number, row if isinstance(row, Mapping) else ValueError(f"not a mapping, but {type(row).__name__}")

    @property
    def digest(self) -> str:
        """The SHA-256 of the rows as JSON, in hexadecimal. A value that JSON lacks counts as its text."""
        content = hashlib.sha256()
        for row in self._rows:
            fields = dict(row) if isinstance(row, Mapping) else row
            content.update(json.dumps(fields, sort_keys=True, default=str).encode() + b"\n")
        return content.hexdigest()
