"""Read data files as records: rows that are checked, rendered, and identified by file and line."""

import itertools
import logging
import math
import reprlib
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from sft_lightning.data.formats.base import Record, Template
from sft_lightning.data.formats.detect import template_for
from sft_lightning.data.formats.prompt_response import Plain
from sft_lightning.data.load_report import SkippedRows, check_bad_rows
from sft_lightning.data.settings import DataSettings
from sft_lightning.data.sources.files import DataFile, read_rows, resolve_files
from sft_lightning.data.sources.rows import Row
from sft_lightning.errors import NoRowsError, UserError

logger = logging.getLogger(__name__)


def read_records(settings: DataSettings, bad_rows: SkippedRows | None = None) -> Iterator[Record]:
    """Yields the records of a data set in file order, with few rows in memory at a time.

    Args:
        settings: Which rows to read. ``filter`` and ``max_examples`` are not applied.
        bad_rows: Collects the skipped rows, for a caller that reports them; without it, a warning reports them.

    Raises:
        UserError: If there is no such file, no row is usable, or there are more than ``max_bad_rows`` bad rows; the
            message names the first ones by file, line and reason. Once there are too many, no further record is
            yielded: the rest of the data is read only to count its bad rows.
    """
    found = SkippedRows() if bad_rows is None else bad_rows
    num_good = 0
    for file in resolve_files(settings.path):
        template = settings.template or template_of(file, settings.columns)
        for source, row in read_rows(file):
            try:
                record = _to_record(row, template, settings.columns, source)
            except ValueError as error:
                found.add(source, str(error))
                continue
            num_good += 1
            if found.count <= settings.max_bad_rows:
                yield record
    check_bad_rows(found, settings.max_bad_rows)
    if not num_good:
        raise NoRowsError(f"data path '{settings.path}' has no usable row: {found if found.count else 'it is empty'}")
    if found.count and bad_rows is None:
        logger.warning("bad rows skipped (%d): %s", found.count, found)


def template_of(file: DataFile, columns: Mapping[str, str]) -> Template:
    """Returns the template for a file: the one for the keys of the first row that any template fits.

    Raises:
        UserError: If no row fits; the message names the first row's place and keys, and the mapping to set.
    """
    misfit: UserError | None = None
    for source, row in read_rows(file):
        if isinstance(row, ValueError):
            continue
        try:
            return template_for(set(_rename(row, columns)))
        except UserError as error:
            misfit = misfit or UserError(f"{source}: {error}")
    if misfit:
        raise misfit
    return Plain()  # the file has no readable row: any template does, because the reader reports each line


class SFTDataset(Dataset[dict[str, Any]]):
    """Holds records in memory as dictionaries, to look at the data in a script or a notebook.

    Training reads the memory-mapped token store of ``sft_lightning.data.token_store`` instead.

    Args:
        path: A JSONL or Parquet file, a folder of them, or a glob.
        template: Turns a row into prompt and response; None chooses by the keys of each file's rows.
        columns: Our name for a field -> the file's name for it.
        max_examples: Keeps only the first records in file order; None keeps all.
        max_bad_rows: The most unreadable rows to skip; one more is an error.

    Raises:
        UserError: As ``read_records``, or if ``max_examples`` is below 1.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        template: Template | None = None,
        columns: Mapping[str, str] | None = None,
        max_examples: int | None = None,
        max_bad_rows: int = 0,
    ) -> None:
        if max_examples is not None and max_examples < 1:
            raise UserError(f"max_examples is {max_examples}; give at least 1, or None for all")
        settings = DataSettings(path, template=template, columns=columns or {}, max_bad_rows=max_bad_rows)
        self.records = list(itertools.islice(read_records(settings), max_examples))

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Returns ``prompt`` and ``response``, ``ground_truth`` if there is one, and ``weight`` if it is not 1."""
        record = self.records[index]
        item: dict[str, Any] = {"prompt": record.prompt, "response": record.response}
        if record.ground_truth is not None:
            item["ground_truth"] = record.ground_truth
        if record.weight != 1.0:
            item["weight"] = record.weight
        return item


def _to_record(row: Row, template: Template, columns: Mapping[str, str], source: str) -> Record:
    if isinstance(row, ValueError):
        raise row
    fields = _rename(row, columns)
    for key in template.required_keys:
        check_text(f"field '{key}'" + (f" (column '{columns[key]}')" if key in columns else ""), fields.get(key))
    rendered = template.render(fields)
    check_text("rendered prompt", rendered["prompt"])
    check_text("rendered response", rendered["response"])
    weight, ground_truth = rendered.get("weight", 1.0), rendered.get("ground_truth")
    check_weight(weight)
    check_ground_truth(ground_truth)
    return Record(rendered["prompt"], rendered["response"], ground_truth, float(weight), source)


def _rename(row: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """Returns the fields by our names. A mapped column loses its old name, which could be mistaken for a field."""
    mapped = {*columns.keys(), *columns.values()}
    fields = {key: value for key, value in row.items() if key not in mapped}
    return fields | {ours: row[theirs] for ours, theirs in columns.items() if theirs in row}


def check_text(name: str, value: Any) -> None:
    """Raises ValueError unless the value is text that is not empty and can be written as UTF-8."""
    if value is None:
        raise ValueError(f"{name} is missing")
    if not isinstance(value, str):
        raise ValueError(f"{name} must be text, got {type(value).__name__}")
    if not value.strip():
        raise ValueError(f"{name} is empty")
    _check_characters(name, value)


def check_weight(value: Any) -> None:
    """Raises ValueError unless the value is a finite number, at least 0."""
    if not _is_number(value) or not 0 <= value <= sys.float_info.max:
        raise ValueError(f"field 'weight' must be a finite number, at least 0, got {_shown(value)}")


def check_ground_truth(value: Any) -> None:
    """Raises ValueError unless the value is text, a finite number, a list of those, or None."""
    for truth in value if isinstance(value, list) else [value]:
        if isinstance(truth, str):
            _check_characters("field 'ground_truth'", truth)
        elif value is not None and not (_is_number(truth) and (isinstance(truth, int) or math.isfinite(truth))):
            raise ValueError(f"field 'ground_truth' must be text, a number or a list of those, got {_shown(truth)}")


def _check_characters(name: str, value: str) -> None:
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{name} holds half a surrogate pair, which is not a character: {error.reason}") from None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _shown(value: Any) -> str:
    """Returns the beginning of a value's ``repr``. Plain ``repr`` fails on values that are nested too deeply."""
    return reprlib.repr(value)[:40]
