"""Read the rows of metrics.csv that are whole, also of a file that a crash of the machine has damaged."""

import csv
import logging
from pathlib import Path

logger = logging.getLogger(__name__)


def read_metrics_rows(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    """Returns the columns and the rows of a file; none if there is no file, or its header cannot be read.

    A row whose writing has not ended does not count: a truncated number is a number. Damaged rows (not UTF-8, with NUL,
    another number of columns, or a step that is no number) are left out with a warning.
    """
    if not path.is_file():
        return [], []
    *lines, unfinished = path.read_bytes().split(b"\n")
    columns = _fields(lines[0]) if lines else []
    if lines and "step" not in columns:
        logger.warning("'%s': its header is damaged, so none of its rows can be read", path)
        return [], []
    rows, damaged = [], []
    for number, line in enumerate(lines[1:], start=2):
        fields = _fields(line)
        row = dict(zip(columns, fields, strict=False))
        if len(fields) == len(columns) and _is_integer(row["step"]):
            rows.append(row)
        elif line.strip():
            damaged.append(number)
    if b"\0" in unfinished:
        damaged.append(len(lines) + 1)
    if damaged:
        more = f" and {len(damaged) - 1} more" if len(damaged) > 1 else ""
        logger.warning("'%s': left out what is damaged: line %d%s", path, damaged[0], more)
    return columns, rows


def _fields(line: bytes) -> list[str]:
    """Returns the fields of a line; none if it is damaged."""
    try:
        text = line.decode("utf-8")
        return [] if "\0" in text else next(csv.reader([text.rstrip("\r")]), [])
    except (UnicodeDecodeError, csv.Error):
        return []


def _is_integer(text: str) -> bool:
    return text.removeprefix("-").isdecimal() and len(text) < 20
