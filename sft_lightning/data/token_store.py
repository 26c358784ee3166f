"""Keep a data set's tokens on disk, memory-mapped, made once for its bytes, tokenizer and options.

    <cache_dir>/<key>/
        tokens.bin   int32, the tokens of all sequences end to end
        rows.bin     a _SEQUENCE for each sequence, row by row
        spans.bin    a _SPAN for each label span, sequence by sequence
        meta.json    format, sizes and digests, fingerprint and load report; written last

A sequence's first ``shared`` tokens are those of the row's previous sequence, and are not stored again: the context of
a conversation's turns grows, and would otherwise be stored once for each of them.

A store is written into a folder beside its place and renamed. Of processes that race for it, the first to finish
publishes and all read that one. A folder whose files are not as its meta.json says is made again.
"""

import contextlib
import dataclasses
import json
import logging
import os
import shutil
import struct
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sft_lightning.data.batch import Example, LabelSpan, TokenSequence
from sft_lightning.data.batching.prefix_trie import num_common_tokens
from sft_lightning.data.filters import filter_records
from sft_lightning.data.formats.base import Record, template_identity
from sft_lightning.data.load_report import LoadReport, check_bad_rows
from sft_lightning.data.records import read_records, template_of
from sft_lightning.data.settings import DataSettings
from sft_lightning.data.sources.files import DataFile, digest, resolve_files
from sft_lightning.data.tokenization import tokenize_records, tokenizer_fingerprint
from sft_lightning.errors import NoRowsError, UserError
from sft_lightning.system.files import atomic_folder, file_digest, sync, value_digest, write_atomically

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

_FORMAT = 2
_BUFFER_BYTES = 1 << 20
_ARRAYS = ("tokens.bin", "rows.bin", "spans.bin")
# start: of its stored tokens in tokens.bin; line, row, weight, file: of its row; length: with the shared tokens.
_SEQUENCE = np.dtype(
    [
        *(("start", "<i8"), ("line", "<i8"), ("first_span", "<i8"), ("row", "<i8"), ("weight", "<f8")),
        *(("file", "<i4"), ("length", "<i4"), ("shared", "<i4"), ("num_spans", "<i4")),
    ]
)
_SPAN = np.dtype([("start", "<i4"), ("end", "<i4"), ("weight", "<f4")])
# The same records one at a time, for which numpy takes several times as long.
_SEQUENCE_RECORD, _SPAN_RECORD = struct.Struct("<4qd4i"), struct.Struct("<2if")
# Makes a named tuple in half the time that its own constructor takes.
_new = tuple.__new__


class TokenStore:
    """The tokenized rows of a data set, memory-mapped. Pickles as its path.

    Attributes:
        fingerprint: What decided the tokens, by name. Equal fingerprints mean equal tokens.
        load_report: What the data set holds beside the rows of the store; a view of the first rows has it, too.
        total_lengths: Shape [N], int64, tokens of each row, over all its sequences.
        label_lengths: Shape [N], int64, label tokens of each row.
        weights: Shape [N], float64.
        longest_sequence: Tokens of the longest sequence.
    """

    def __init__(self, folder: Path, files: Sequence[DataFile], num_rows: int | None = None) -> None:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        self.fingerprint: dict[str, str | int | bool] = meta["fingerprint"]
        # A store is found by the bytes of the data, wherever they lie: its places get the names of today's files.
        self.load_report = LoadReport.from_dict(meta["load_report"], dict(zip(meta["files"], files, strict=True)))
        self._folder = folder
        self._files = files
        self._file_names = [str(file) for file in files]
        self._tokens = _map(folder / "tokens.bin", np.dtype("<i4"))
        sequences, spans = _map(folder / "rows.bin", _SEQUENCE), _map(folder / "spans.bin", _SPAN)
        # Where each row's sequences begin, and where the last row's end; None where every row has one sequence.
        self._row_starts: np.ndarray | None = None
        num_sequences = num_rows
        if sequences["row"][-1] + 1 < len(sequences):
            starts = np.flatnonzero(np.diff(sequences["row"], prepend=-1, append=-1))
            self._row_starts = starts if num_rows is None else starts[: num_rows + 1]
            num_sequences = self._row_starts[-1]
        sequences = sequences[:num_sequences]
        spans = spans[: sequences["first_span"][-1] + sequences["num_spans"][-1]]
        first_sequences = slice(None) if self._row_starts is None else self._row_starts[:-1]
        first_spans = slice(None) if len(spans) == len(sequences) else sequences["first_span"]
        self.total_lengths = _sums(sequences["length"], first_sequences)
        self.label_lengths = _sums(_sums(spans["end"] - spans["start"], first_spans), first_sequences)
        self.weights = sequences["weight"][first_sequences].astype(np.float64)
        self.longest_sequence = int(sequences["length"].max())
        self._sequences, self._spans = sequences.view("u1").data, spans.view("u1").data
        self._indices = range(len(self.weights))

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> Example:
        index = self._indices[index]
        if self._row_starts is None:
            return self._read(index)
        example = None
        for number in range(*self._row_starts[index : index + 2].tolist()):
            example = self._read(number, example.sequences if example else ())
        assert example is not None
        return example

    def prefixes(self, index: int) -> list[tuple[np.ndarray, int]]:
        """Returns ``self[index].prefixes``, but reads no more than that where every row has one sequence."""
        if self._row_starts is not None:
            return self[index].prefixes
        record = _SEQUENCE_RECORD.unpack_from(self._sequences, _SEQUENCE_RECORD.size * self._indices[index])
        start, _, first_span, _, _, _, length, _, num_spans = record
        prefix_length, _, _ = _SPAN_RECORD.unpack_from(self._spans, _SPAN_RECORD.size * (first_span + num_spans - 1))
        return [(self._tokens[start : start + prefix_length], length - 1)]

    def _read(self, number: int, earlier: tuple[TokenSequence, ...] = ()) -> Example:
        """Returns a row as far as one of its sequences, from the earlier ones of the row."""
        record = _SEQUENCE_RECORD.unpack_from(self._sequences, _SEQUENCE_RECORD.size * number)
        start, line, first_span, _, _, file, length, num_shared, num_spans = record
        tokens = self._tokens[start : start + length - num_shared]
        if num_shared:
            tokens = np.concatenate([earlier[-1].tokens[:num_shared], tokens])
        first, size = _SPAN_RECORD.size * first_span, _SPAN_RECORD.size * num_spans
        if num_spans == 1:  # three times as fast as what follows
            spans: tuple[LabelSpan, ...] = (_new(LabelSpan, _SPAN_RECORD.unpack_from(self._spans, first)),)
        else:
            spans = tuple(map(LabelSpan._make, _SPAN_RECORD.iter_unpack(self._spans[first : first + size])))
        sequence = _new(TokenSequence, (tokens, spans))
        return _new(Example, ((*earlier, sequence), f"{self._file_names[file]}:{line}"))

    @property
    def input_lengths(self) -> np.ndarray:
        """Tokens of each row that go into the model: all but the last of each sequence. Shape [N], int64."""
        return self.total_lengths - (1 if self._row_starts is None else np.diff(self._row_starts))

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
    settings: DataSettings, files: Sequence[DataFile], tokenizer: "PreTrainedTokenizerBase"
) -> dict[str, str | int | bool]:
    templates = [settings.template or template_of(file, settings.columns) for file in files]
    return {
        "data": digest(files),
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
    rows: Iterator[tuple[Record, Example]],
    load_report: LoadReport,
    settings: DataSettings,
    *,
    files: Sequence[DataFile],
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
        if digest(files) != fingerprint["data"]:
            raise UserError(f"data file '{files[0]}' or one beside it changed while it was read; start again")
        _write_meta(temporary, files, fingerprint, load_report)


def _write_rows(folder: Path, rows: Iterator[tuple[Record, Example]], files: Sequence[DataFile]) -> int:
    file_numbers = {str(file): number for number, file in enumerate(files)}
    num_rows = start = first_span = 0
    with contextlib.ExitStack() as stack:
        opened = [stack.enter_context((folder / name).open("wb", _BUFFER_BYTES)) for name in _ARRAYS]
        tokens_file, rows_file, spans_file = opened
        for record, example in rows:
            file, _, line = record.source.rpartition(":")
            row = num_rows, record.weight, file_numbers[file]
            previous = None
            for tokens, label_spans in example.sequences:
                shared = 0 if previous is None else num_common_tokens(previous, tokens)
                counts = len(tokens), shared, len(label_spans)
                rows_file.write(_SEQUENCE_RECORD.pack(start, int(line), first_span, *row, *counts))
                tokens_file.write(tokens[shared:].data)
                for span in label_spans:
                    spans_file.write(_SPAN_RECORD.pack(*span))
                start += len(tokens) - shared
                first_span += len(label_spans)
                previous = tokens
            num_rows += 1
    for name in _ARRAYS:
        sync(folder / name)
    return num_rows


def _map(path: Path, dtype: np.dtype) -> np.ndarray:
    # A view as ndarray, because taking a slice of a memmap itself costs several times as much.
    return np.memmap(path, dtype=dtype, mode="r").view(np.ndarray)


def _sums(values: np.ndarray, firsts: np.ndarray | slice) -> np.ndarray:
    """Returns the sums of the runs of values that begin at ``firsts``; each value, where that is a slice. Int64."""
    return values.astype(np.int64) if isinstance(firsts, slice) else np.add.reduceat(values, firsts, dtype=np.int64)


def _write_meta(
    folder: Path, files: Sequence[DataFile], fingerprint: Mapping[str, str | int | bool], load_report: LoadReport
) -> None:
    account = dataclasses.asdict(load_report)
    meta = {
        "format": _FORMAT,
        "sizes": {name: (folder / name).stat().st_size for name in _ARRAYS},
        "digests": _digests(folder, account),
        "fingerprint": fingerprint,
        "files": [str(file) for file in files],
        "load_report": account,
    }
    with write_atomically(folder / "meta.json") as file:
        json.dump(meta, file, indent=1)


def _open_whole(folder: Path, files: Sequence[DataFile], fingerprint: Mapping[str, Any]) -> TokenStore | None:
    """Returns the store in a folder, or None if it is missing or damaged."""
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        if meta["format"] != _FORMAT or meta["fingerprint"] != fingerprint:
            return None
        if any((folder / name).stat().st_size != size for name, size in meta["sizes"].items()):
            return None
        if meta["digests"] != _digests(folder, meta["load_report"]):
            return None
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
