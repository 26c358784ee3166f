"""Find data files, and read the rows of JSONL and Parquet."""

import codecs
import glob
import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from sft_lightning.data.sources.rows import MemoryRows, Row
from sft_lightning.errors import UserError
from sft_lightning.system.files import file_digest, user_path

_PARQUET_ROWS_AT_ONCE = 1024

DataFile: TypeAlias = Path | MemoryRows


def resolve_files(path: str | DataFile) -> Sequence[DataFile]:
    """Returns the data files that ``path`` names, sorted by name.

    Args:
        path: A file (Parquet by its suffix, else JSONL), a folder of ``*.jsonl`` and ``*.parquet``, a glob, or rows.

    Raises:
        UserError: If there is no such file.
    """
    if isinstance(path, MemoryRows):
        return [path]
    named = Path(user_path(path))
    if named.is_file():
        return [named]
    if named.is_dir():
        files = [file for file in named.iterdir() if file.suffix in (".jsonl", ".parquet") and file.is_file()]
        missing = f"data folder '{path}' holds no .jsonl and no .parquet file"
    else:
        # Path.glob does not accept absolute patterns.
        files = [Path(name) for name in glob.glob(str(named), recursive=True) if Path(name).is_file()]  # noqa: PTH207
        missing = f"data path '{path}' is not a file or folder and matches no file"
    if not files:
        raise UserError(f"{missing}; give a .jsonl or .parquet file, a folder of them, or a glob")
    return sorted(files)


def digest(files: Sequence[DataFile]) -> str:
    """Returns one SHA-256 for the content of several files in order, in hexadecimal."""
    digests = (file.digest if isinstance(file, MemoryRows) else file_digest(file) for file in files)
    return hashlib.sha256(b"".join(map(bytes.fromhex, digests))).hexdigest()


def read_rows(file: DataFile) -> Iterator[tuple[str, Row]]:
    """Yields ``(file:line, row)`` in file order, with few rows in memory at a time.

    Blank lines of JSONL are skipped, but counted. A row that cannot be read is yielded as a ``ValueError`` that holds
    the reason, and reading continues.

    Raises:
        UserError: If the file cannot be read at all.
    """
    try:
        for line, row in _numbered_rows(file):
            yield f"{file}:{line}", row
    except OSError as error:
        raise UserError(f"cannot read data file '{file}': {' '.join(str(error).split())}") from None


def _numbered_rows(file: DataFile) -> Iterable[tuple[int, Row]]:
    if isinstance(file, MemoryRows):
        return file
    return _parquet_rows(file) if file.suffix == ".parquet" else _jsonl_rows(file)


def _jsonl_rows(file: Path) -> Iterator[tuple[int, Row]]:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            text = (line.removeprefix(codecs.BOM_UTF8) if number == 1 else line).strip()
            if text:
                yield number, _parse_json(text)


def _parse_json(line: bytes) -> Row:
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return ValueError(f"not UTF-8: byte 0x{line[error.start]:02x} at position {error.start + 1}")
    except json.JSONDecodeError as error:
        return ValueError(f"not JSON: {error.msg} (column {error.colno})")
    except (ValueError, RecursionError) as error:
        return ValueError(f"not JSON that can be read: {error}")
    return row if isinstance(row, dict) else ValueError(f"not a JSON object, but {type(row).__name__}")


def _parquet_rows(file: Path) -> Iterator[tuple[int, Row]]:
    import pyarrow
    from pyarrow import parquet  # imported here, because runs on JSONL do not need it

    try:
        with parquet.ParquetFile(file) as table:
            number = 0
            for batch in table.iter_batches(batch_size=_PARQUET_ROWS_AT_ONCE):
                for row in _batch_rows(batch):
                    number += 1
                    yield number, row
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:  # a column's name may not be UTF-8
        raise UserError(f"cannot read '{file}' as Parquet: {' '.join(str(error).split())}") from None


def _batch_rows(batch: Any) -> list[Row]:
    try:
        return batch.to_pylist()
    except UnicodeDecodeError as error:
        if batch.num_rows == 1:
            return [ValueError(f"not UTF-8: byte 0x{error.object[error.start]:02x} at position {error.start + 1}")]
        return [row for index in range(batch.num_rows) for row in _batch_rows(batch.slice(index, 1))]
