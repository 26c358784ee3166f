"""The token store: a data set's tokens on disk, memory-mapped, made once for its bytes, tokenizer and options.

    <cache_dir>/<key>/
        tokens.bin   int32, the tokens of all rows end to end
        rows.bin     a _ROW for each row
        meta.json    sizes and digests, fingerprint and what was left out; written last

A store is written into a folder beside its place and renamed. Of processes that race for it, the first to finish
publishes and all read that one. A folder whose files are not as its meta.json says is made again.
"""

import contextlib
import dataclasses
import itertools
import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from sft_lightning.data.batch import Example
from sft_lightning.data.filters import filter_records
from sft_lightning.data.formats.base import Record, template_identity
from sft_lightning.data.load_report import LoadReport, check_bad_rows
from sft_lightning.data.records import read_records, template_of
from sft_lightning.data.settings import DataSettings
from sft_lightning.data.sources.files import resolve_files
from sft_lightning.data.tokenization import tokenize_records, tokenizer_fingerprint
from sft_lightning.errors import NoRowsError, UserError
from sft_lightning.system.files import atomic_folder, file_digest, files_digest, value_digest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

_FORMAT = 1
_ROWS_AT_ONCE = 1024
_ARRAYS = ("tokens.bin", "rows.bin")
_ROW = np.dtype(
    [("start", "<i8"), ("line", "<i8"), ("weight", "<f8"), ("file", "<i4"), ("length", "<i4"), ("prompt_length", "<i4")]
)


class TokenStore:
    """The tokenised rows of a data set, memory-mapped. Pickling one costs no more than its path.

    Attributes:
        fingerprint: What decided the tokens, by name. Equal fingerprints mean equal tokens.
        load_report: What the data set holds beside the rows of the store; a view of the first rows has it, too.
        total_lengths: Shape [N], int64, prompt and response tokens of each row.
        label_lengths: Shape [N], int64, response tokens of each row.
        weights: Shape [N], float64.
    """

    def __init__(self, folder: Path, files: Sequence[Path], num_rows: int | None = None) -> None:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        self.fingerprint: dict[str, str | int | bool] = meta["fingerprint"]
        # A store is found by the bytes of the data, wherever they lie: its places get the names of today's files.
        self.load_report = LoadReport.from_dict(meta["load_report"], dict(zip(meta["files"], files, strict=True)))
        self._folder = folder
        self._files = files
        # A view as ndarray, because taking a slice of a memmap itself costs several times as much.
        self._tokens = np.memmap(folder / "tokens.bin", dtype="<i4", mode="r").view(np.ndarray)
        self._rows = np.memmap(folder / "rows.bin", dtype=_ROW, mode="r").view(np.ndarray)[:num_rows]
        self.total_lengths = self._rows["length"].astype(np.int64)
        self.label_lengths = self.total_lengths - self._rows["prompt_length"]
        self.weights = self._rows["weight"].astype(np.float64)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Example:
        start, line, _, file, length, prompt_length = self._rows[index].item()
        return Example(self._tokens[start : start + length], prompt_length, f"{self._files[file]}:{line}")

    def prompt(self, index: int) -> np.ndarray:
        """Returns the prompt tokens of a row. Shape [prompt length], int32."""
        start, *_, prompt_length = self._rows[index].item()
        return self._tokens[start : start + prompt_length]

    def __reduce__(self) -> tuple[Any, ...]:
        return TokenStore, (self._folder, self._files, len(self))

    @property
    def report(self) -> dict[str, Any]:
        """``rows`` of this store, and the fields of ``load_report``."""
        return {"rows": len(self), **dataclasses.asdict(self.load_report)}

    def first(self, num_rows: int) -> "TokenStore":
        """Returns a view of the first ``num_rows`` rows in file order, or of all where there are fewer."""
        if num_rows < 1:
            raise UserError(f"data.max_train_examples is {num_rows}; give at least 1, or null for all")
        return TokenStore(self._folder, self._files, min(num_rows, len(self)))


def load_or_build_tokens(settings: DataSettings, tokenizer: "PreTrainedTokenizerBase") -> TokenStore:
    """Returns the tokens of a data set: from the cache if they are there, else built and kept there.

    The filter judges rows when the store is built, and never again.

    Args:
        settings: Which rows to read and how to tokenize them.
        tokenizer: Makes the ids.

    Raises:
        UserError: For a bad path, option or row, for a row too long under ``error``, or when no row is left.
    """
    files = resolve_files(settings.path)
    fingerprint = _fingerprint(settings, files, tokenizer)
    folder = _cache_root(settings.cache_dir) / _key(fingerprint)
    store = _open_whole(folder, files, fingerprint)
    if store is None:
        load_report = LoadReport()
        records = read_records(settings, load_report.bad_rows)
        kept = filter_records(records, settings.filter, load_report) if settings.filter else records
        rows = tokenize_records(kept, tokenizer, settings, load_report)
        _build(folder, rows, load_report, settings, files=files, fingerprint=fingerprint)
        store = TokenStore(folder, files)
    _report_skipped_rows(settings, store)
    return store if settings.max_examples is None else store.first(settings.max_examples)


def _fingerprint(
    settings: DataSettings, files: Sequence[Path], tokenizer: "PreTrainedTokenizerBase"
) -> dict[str, str | int | bool]:
    templates = [settings.template or template_of(file, settings.columns) for file in files]
    return {
        "data": files_digest(files),
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "template": ", ".join(sorted({template_identity(template) for template in templates})),
        "columns": json.dumps(dict(settings.columns), sort_keys=True),
        **settings.token_options,
        **({"filter": settings.filter.identity} if settings.filter else {}),
    }


def _report_skipped_rows(settings: DataSettings, store: TokenStore) -> None:
    # A store that was built under a higher max_bad_rows holds the same tokens, but may have skipped too many rows.
    check_bad_rows(store.load_report.bad_rows, settings.max_bad_rows)
    reasons = store.load_report.sentences
    if settings.filter:
        num_rows = len(store) + store.load_report.num_rows
        reasons = [f"data.filter_correct is on, {len(store)} of {num_rows} rows are kept", *reasons]
    if reasons:
        level = logging.WARNING if store.load_report.sentences else logging.INFO
        logger.log(level, "data path '%s': %s", settings.path, ". ".join(reasons))


def _build(
    folder: Path,
    rows: Iterator[tuple[Record, list[int], list[int]]],
    load_report: LoadReport,
    settings: DataSettings,
    *,
    files: Sequence[Path],
    fingerprint: Mapping[str, str | int | bool],
) -> None:
    def make_way() -> bool:
        if _open_whole(folder, files, fingerprint):
            return False  # another process was first
        with contextlib.suppress(FileNotFoundError):  # another process may remove it too
            shutil.rmtree(folder)
        return True

    with _write_errors(folder.parent), atomic_folder(folder, make_way) as temporary:
        num_rows = _write_rows(temporary, rows, files)
        check_bad_rows(load_report.bad_rows, settings.max_bad_rows)
        if not num_rows:
            raise NoRowsError(f"no row is left. {load_report}. {load_report.advice(settings.max_length)}")
        if files_digest(files) != fingerprint["data"]:
            raise UserError(f"data file '{files[0]}' or one beside it changed while it was read; start again")
        _write_meta(temporary, files, fingerprint, load_report)


def _write_rows(folder: Path, rows: Iterator[tuple[Record, list[int], list[int]]], files: Sequence[Path]) -> int:
    file_numbers = {str(file): number for number, file in enumerate(files)}
    num_rows = start = 0
    with (folder / "tokens.bin").open("wb") as tokens_file, (folder / "rows.bin").open("wb") as rows_file:
        while chunk := list(itertools.islice(rows, _ROWS_AT_ONCE)):
            table = []
            for record, prompt, response in chunk:
                file, _, line = record.source.rpartition(":")
                length = len(prompt) + len(response)
                table.append((start, int(line), record.weight, file_numbers[file], length, len(prompt)))
                start += length
            tokens = itertools.chain.from_iterable(ids for _, *both in chunk for ids in both)
            rows_file.write(np.array(table, dtype=_ROW).tobytes())
            tokens_file.write(np.fromiter(tokens, dtype="<i4").tobytes())
            num_rows += len(chunk)
        _sync(tokens_file)
        _sync(rows_file)
    return num_rows


def _write_meta(
    folder: Path, files: Sequence[Path], fingerprint: Mapping[str, str | int | bool], load_report: LoadReport
) -> None:
    account = dataclasses.asdict(load_report)
    meta = {
        "sizes": {name: (folder / name).stat().st_size for name in _ARRAYS},
        "digests": _digests(folder, account),
        "fingerprint": fingerprint,
        "files": [str(file) for file in files],
        "load_report": account,
    }
    with (folder / "meta.json").open("w", encoding="utf-8") as file:
        json.dump(meta, file, indent=1)
        _sync(file)


def _sync(file: IO[Any]) -> None:
    file.flush()
    os.fsync(file.fileno())


def _open_whole(folder: Path, files: Sequence[Path], fingerprint: Mapping[str, Any]) -> TokenStore | None:
    """Returns the store in a folder, None if there is none or it is not as it was written."""
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        if meta["fingerprint"] != fingerprint:
            return None
        if any((folder / name).stat().st_size != size for name, size in meta["sizes"].items()):
            return None
        if "digests" in meta and meta["digests"] != _digests(folder, meta["load_report"]):
            return None  # in stores of earlier versions there are none
        return TokenStore(folder, files)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


@contextlib.contextmanager
def _write_errors(cache_dir: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write the token cache in data.cache_dir '{cache_dir}': {error}") from None


def _digests(folder: Path, load_report: Mapping[str, Any]) -> dict[str, str]:
    return {**{name: file_digest(folder / name) for name in _ARRAYS}, "load_report": value_digest(load_report)}


def _key(fingerprint: Mapping[str, str | int | bool]) -> str:
    return value_digest([_FORMAT, fingerprint])[:32]


def _cache_root(cache_dir: str | Path | None) -> Path:
    if chosen := cache_dir or os.environ.get("SFT_CACHE_DIR"):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sft_lightning"
