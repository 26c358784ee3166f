"""Records: the rows of JSONL and Parquet files, checked, rendered, and each known by file and line."""

import codecs
import glob
import itertools
import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from sft_lightning.data.fields import check_ground_truth, check_text, check_weight
from sft_lightning.data.formats.base import Plain, Template, template_for
from sft_lightning.errors import NoRowsError, UserError

logger = logging.getLogger(__name__)

_PARQUET_ROWS_AT_ONCE = 1024


@dataclass(frozen=True, slots=True)
class Record:
    """One prompt and the response to it.

    Attributes:
        prompt: What the model is given; not empty.
        response: What it learns to say; not empty.
        ground_truth: What an answer is graded against: a string, a number, a list of those, or None.
        weight: Multiplies the row's loss; finite, at least 0.
        source: ``file:line``, counted from 1. In a Parquet file the row stands for the line.
    """

    prompt: str
    response: str
    ground_truth: Any = None
    weight: float = 1.0
    source: str = ""


@dataclass
class SkippedRows:
    """Rows that are left out for a fault of one kind.

    Attributes:
        count: How many there are.
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


def resolve_files(path: str | Path) -> list[Path]:
    """Returns the data files that ``path`` names, sorted by name.

    Args:
        path: A file (Parquet by its suffix, else JSONL), a folder of ``*.jsonl`` and ``*.parquet``, or a glob.

    Raises:
        UserError: If there is no such file.
    """
    named = Path(path).expanduser()
    if named.is_file():
        return [named]
    if named.is_dir():
        files = [file for file in named.iterdir() if file.suffix in (".jsonl", ".parquet") and file.is_file()]
        missing = f"data folder '{path}' holds no .jsonl and no .parquet file"
    else:
        # Path.glob takes no absolute pattern.
        files = [Path(name) for name in glob.glob(str(named), recursive=True) if Path(name).is_file()]  # noqa: PTH207
        missing = f"data path '{path}' is no file, no folder and matches none"
    if not files:
        raise UserError(f"{missing}; give a .jsonl or .parquet file, a folder of them, or a glob")
    return sorted(files)


def read_records(
    path: str | Path,
    *,
    template: Template | None = None,
    columns: Mapping[str, str] | None = None,
    max_bad_rows: int = 0,
    bad_rows: SkippedRows | None = None,
) -> Iterator[Record]:
    """Yields the records of a file, a folder or a glob, in file order, one row in memory at a time.

    Args:
        path: As for ``resolve_files``.
        template: Turns a row into prompt and response; None chooses by the keys of each file's rows.
        columns: Our name for a field -> the file's name for it.
        max_bad_rows: So many bad rows are skipped. One more, and no further record comes: the rest is only looked
            through, so that the error can tell how many there are.
        bad_rows: Collects the rows skipped, for a caller that reports them itself; otherwise a warning does.

    Raises:
        UserError: If there is no such file, none of its rows can be used, or there are more than ``max_bad_rows``
            bad rows; the message names the first ones by file, line and reason.
    """
    found = SkippedRows() if bad_rows is None else bad_rows
    num_good = 0
    for file in resolve_files(path):
        file_template = template or template_of(file, columns)
        for source, row in _read_rows(file):
            try:
                record = _to_record(row, file_template, columns or {}, source)
            except ValueError as error:
                found.add(source, str(error))
                continue
            num_good += 1
            if found.count <= max_bad_rows:
                yield record
    check_bad_rows(found, max_bad_rows)
    if not num_good:
        raise NoRowsError(f"data path '{path}' has no usable row: {found if found.count else 'it is empty'}")
    if found.count and bad_rows is None:
        logger.warning("bad rows skipped (%d): %s", found.count, found)


def template_of(file: Path, columns: Mapping[str, str] | None = None) -> Template:
    """Returns the template that fits a file: the one for the keys of the first row that fits any.

    Raises:
        UserError: If no row fits; the message names the first row's place and keys, and the mapping to set.
    """
    misfit: UserError | None = None
    for source, row in _read_rows(file):
        if isinstance(row, ValueError):
            continue
        try:
            return template_for(set(_rename(row, columns or {})))
        except UserError as error:
            misfit = misfit or UserError(f"{source}: {error}")
    if misfit:
        raise misfit
    return Plain()  # no row to go by, so nothing to render: the reader says what is wrong with each line


class SFTDataset(Dataset[dict[str, Any]]):
    """Records in memory, as dictionaries: a look at the data for a script or a notebook.

    Training itself reads the memory-mapped token store of ``sft_lightning.data.token_store``.

    Args:
        path: A JSONL or Parquet file, a folder of them, or a glob.
        template: Turns a row into prompt and response; None chooses by the keys of each file's rows.
        columns: Our name for a field -> the file's name for it.
        max_examples: Keeps the first so many records in file order; None keeps all.
        max_bad_rows: So many bad rows are skipped before reading stops with an error.

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
        records = read_records(path, template=template, columns=columns, max_bad_rows=max_bad_rows)
        self.records = list(itertools.islice(records, max_examples))

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Returns ``prompt`` and ``response``, ``ground_truth`` if there is one, and a ``weight`` other than 1."""
        record = self.records[index]
        item: dict[str, Any] = {"prompt": record.prompt, "response": record.response}
        if record.ground_truth is not None:
            item["ground_truth"] = record.ground_truth
        if record.weight != 1.0:
            item["weight"] = record.weight
        return item


def _to_record(
    row: Mapping[str, Any] | ValueError, template: Template, columns: Mapping[str, str], source: str
) -> Record:
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
    """A mapped column goes by our name only, so that its old name cannot pass for another field."""
    mapped = {*columns.keys(), *columns.values()}
    fields = {key: value for key, value in row.items() if key not in mapped}
    return fields | {ours: row[theirs] for ours, theirs in columns.items() if theirs in row}


def _read_rows(file: Path) -> Iterator[tuple[str, Mapping[str, Any] | ValueError]]:
    """Yields (``file:line``, row), with the reason in the row's place where there is no row to read."""
    rows = _parquet_rows(file) if file.suffix == ".parquet" else _jsonl_rows(file)
    try:
        for line, row in rows:
            yield f"{file}:{line}", row
    except OSError as error:
        raise UserError(f"cannot read data file '{file}': {' '.join(str(error).split())}") from None


def _jsonl_rows(file: Path) -> Iterator[tuple[int, Mapping[str, Any] | ValueError]]:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            text = (line.removeprefix(codecs.BOM_UTF8) if number == 1 else line).strip()
            if text:
                yield number, _parse_json(text)


def _parse_json(line: bytes) -> Mapping[str, Any] | ValueError:
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return ValueError(f"not UTF-8: byte 0x{line[error.start]:02x} at position {error.start + 1}")
    except json.JSONDecodeError as error:
        return ValueError(f"not JSON: {error.msg} (column {error.colno})")
    except (ValueError, RecursionError) as error:
        return ValueError(f"not JSON that can be read: {error}")
    return row if isinstance(row, dict) else ValueError(f"not a JSON object, but {type(row).__name__}")


def _parquet_rows(file: Path) -> Iterator[tuple[int, Mapping[str, Any] | ValueError]]:
    import pyarrow
    from pyarrow import parquet  # here, because a run on JSONL has no need to wait for it

    try:
        with parquet.ParquetFile(file) as table:
            number = 0
            for batch in table.iter_batches(batch_size=_PARQUET_ROWS_AT_ONCE):
                for row in _batch_rows(batch):
                    number += 1
                    yield number, row
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:  # the name of a column may be no UTF-8
        raise UserError(f"cannot read '{file}' as Parquet: {' '.join(str(error).split())}") from None


def _batch_rows(batch: Any) -> list[Mapping[str, Any] | ValueError]:
    try:
        return batch.to_pylist()
    except UnicodeDecodeError as error:
        if batch.num_rows == 1:
            return [ValueError(f"not UTF-8: byte 0x{error.object[error.start]:02x} at position {error.start + 1}")]
        return [row for index in range(batch.num_rows) for row in _batch_rows(batch.slice(index, 1))]
