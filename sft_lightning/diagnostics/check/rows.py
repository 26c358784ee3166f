"""Read a set's rows as `fit` does, and record which are used, which are skipped, and why."""

import itertools
import sys
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, NamedTuple

from sft_lightning.data.batch import Example
from sft_lightning.data.formats.base import Record
from sft_lightning.data.load_report import SkippedRows
from sft_lightning.data.records import read_records
from sft_lightning.data.settings import DataSettings
from sft_lightning.data.token_store import TokenStore, load_or_build_tokens
from sft_lightning.data.tokenization import encode_prompts, encode_responses
from sft_lightning.diagnostics.check.findings import Finding, Place, Severity, counted
from sft_lightning.errors import NoRowsError, UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ROWS_AT_ONCE = 1024
# Over-long rows are dropped by design; a larger share suggests that max_length does not suit the data.
_MANY_DROPPED = 0.05


class Row(NamedTuple):
    """A row that the run uses: its text and its tokens."""

    record: Record
    example: Example


class Sources:
    """A list of ``file:line`` that takes 12 bytes an entry."""

    def __init__(self) -> None:
        self._files: dict[str, int] = {}
        self._file_numbers = array("i")
        self._lines = array("q")

    def __len__(self) -> int:
        return len(self._lines)

    def __getitem__(self, index: int) -> str:
        return f"{list(self._files)[self._file_numbers[index]]}:{self._lines[index]}"

    def append(self, source: str) -> None:
        file, line = file_and_line(source)
        self._file_numbers.append(self._files.setdefault(file, len(self._files)))
        self._lines.append(line)


class AllSkippedRows(SkippedRows):
    """Skipped rows that keep every place."""

    def add(self, source: str, reason: str) -> None:
        self.count += 1
        self.first.append((source, reason))


@dataclass(frozen=True)
class CheckedSet:
    """A set as `fit` would read and tokenize it.

    Attributes:
        name: ``train`` or ``val``.
        settings: The settings of `fit`.
        tokenizer: Makes the ids.
    """

    name: str
    settings: DataSettings
    tokenizer: "PreTrainedTokenizerBase"

    def load_tokens(self) -> TokenStore | None:
        """Returns the whole set's tokens, from the cache that `fit` uses; None if no row is left.

        ``max_bad_rows`` and ``max_examples`` are not applied.

        Raises:
            UserError: For everything that stops `fit`, except bad rows and over-long rows.
        """
        whole = replace(self.settings, max_bad_rows=sys.maxsize, max_examples=None)
        try:
            return load_or_build_tokens(whole, self.tokenizer)
        except NoRowsError:
            return None
        except UserError as error:
            if whole.overlength != "error":
                raise UserError(f"data.{self.name}_path: {error}") from error
        # The error is about over-long rows, or it comes again. The rows that fit are checked in any case.
        return replace(self, settings=replace(self.settings, overlength="drop")).load_tokens()


@dataclass
class RowAccount:
    """Which rows of a set are used, skipped or cut.

    Attributes:
        sources: ``file:line`` of each row that the run uses.
        num_unused: The number of rows after the first ``max_examples``.
        bad_rows: Every row that cannot be read, or whose prompt or response gives no token.
        overlength_rows: Every row with more than ``max_length`` tokens.
        overlength_lengths: The number of tokens of each over-long row.
        truncated_rows: Every row whose prompt is cut.
        filtered_rows: Every row that ``data.filter_correct`` drops.
    """

    sources: Sources = field(default_factory=Sources)
    num_unused: int = 0
    bad_rows: AllSkippedRows = field(default_factory=AllSkippedRows)
    overlength_rows: list[Place] = field(default_factory=list)
    overlength_lengths: list[int] = field(default_factory=list)
    truncated_rows: list[Place] = field(default_factory=list)
    filtered_rows: list[Place] = field(default_factory=list)

    def read(self, checked: CheckedSet, store: TokenStore | None) -> Iterator[list[Row]]:
        """Yields the rows in use, at most ``ROWS_AT_ONCE`` at a time, in file order, and fills the account.

        The file's records and the store's rows are both in file order, so one pass over both finds the skipped rows.
        """
        max_examples = checked.settings.max_examples
        records = _until_no_rows(read_records(replace(checked.settings, max_bad_rows=sys.maxsize), self.bad_rows))
        stored = 0 if store is None else len(store)
        index = 0
        while chunk := list(itertools.islice(records, ROWS_AT_ONCE)):
            rows: list[Row] = []
            skipped: list[Record] = []
            for record in chunk:
                example = store[index] if store is not None and index < stored else None
                if example is None or example.source != record.source:
                    skipped.append(record)
                    continue
                index += 1
                if max_examples is not None and self.num_used >= max_examples:
                    self.num_unused += 1
                else:
                    rows.append(Row(record, example))
                    self.sources.append(record.source)
            self._note_skipped(skipped, checked)
            self._note_truncated(rows, checked)
            if rows:
                yield rows
        assert index == stored, "the token store holds rows that the files do not"
        self.bad_rows.first.sort(key=lambda row: file_and_line(row[0]))

    @property
    def num_used(self) -> int:
        """The number of rows that the run uses."""
        return len(self.sources)

    def findings(self, checked: CheckedSet) -> list[Finding]:
        """Returns the findings about rows that are skipped or cut."""
        name, settings, findings = checked.name, checked.settings, []
        num_rows = self.num_used + self.num_unused + self.bad_rows.count
        num_rows += len(self.overlength_rows) + len(self.filtered_rows)
        if self.bad_rows.count:
            allowed = settings.max_bad_rows
            too_many = self.bad_rows.count > allowed
            message = f"{name}: {counted(self.bad_rows.count, 'row')} of {num_rows:,} cannot be used"
            findings.append(
                Finding(
                    "bad_rows",
                    "error" if too_many else "warning",
                    f"{message}; data.max_bad_rows is {allowed}" + (", so fit would stop" if too_many else ""),
                    "correct or delete these lines",
                    self.bad_rows.count,
                    [Place(source, reason=reason) for source, reason in self.bad_rows.first],
                )
            )
        if self.overlength_rows:
            findings.append(self._overlength_finding(checked, num_rows))
        if self.truncated_rows:
            findings.append(
                Finding(
                    "truncated_prompts",
                    "info",
                    f"{name}: {counted(len(self.truncated_rows), 'prompt is', 'prompts are')} cut from the left to "
                    f"data.max_length {settings.max_length}",
                    "",
                    len(self.truncated_rows),
                    self.truncated_rows,
                )
            )
        if self.filtered_rows:
            count = len(self.filtered_rows)
            message = f"{name}: {counted(count, 'row')} of {num_rows:,} dropped by data.filter_correct"
            fix = "the grader does not accept their response, or they have no ground truth"
            findings.append(Finding("filtered_rows", "info", message, fix, count, self.filtered_rows))
        if not self.num_used:
            findings.append(Finding("no_rows", "error", f"{name}: no row is left", "see the rows above", num_rows))
        return findings

    def _overlength_finding(self, checked: CheckedSet, num_rows: int) -> Finding:
        count, settings = len(self.overlength_rows), checked.settings
        severity: Severity = "warning" if count > _MANY_DROPPED * num_rows else "info"
        action = "dropped"
        if settings.overlength == "error":
            severity, action = "error", "what fit would stop at (data.overlength is error)"
        return Finding(
            "overlength_rows",
            severity,
            f"{checked.name}: {counted(count, 'row')} of {num_rows:,} over data.max_length {settings.max_length}, "
            f"{action}",
            f"the longest has {max(self.overlength_lengths):,} tokens: raise data.max_length or set data.overlength",
            count,
            self.overlength_rows,
        )

    def _note_skipped(self, records: list[Record], checked: CheckedSet) -> None:
        for record, prompt, response in _encoded(records, checked):
            if prompt and response:
                num_tokens = len(prompt) + len(response)
                if num_tokens <= checked.settings.max_length:  # only the filter skips a row that fits
                    self.filtered_rows.append(Place(record.source))
                    continue
                self.overlength_lengths.append(num_tokens)
                self.overlength_rows.append(Place(record.source, reason=f"{num_tokens} tokens"))
            else:
                empty = "response" if prompt else "prompt"
                self.bad_rows.add(record.source, f"the {empty} has no tokens")

    def _note_truncated(self, rows: list[Row], checked: CheckedSet) -> None:
        if checked.settings.overlength != "truncate_prompt":
            return
        # A row with a cut prompt has exactly the allowed length.
        full = [row for row in rows if len(row.example.sequences[0].tokens) == checked.settings.max_length]
        prompts = encode_prompts(checked.tokenizer, [row.record.prompt for row in full])
        for (record, example), prompt in zip(full, prompts, strict=True):
            num_kept = len(example.sequences[0].prefix)
            if len(prompt) > num_kept:
                reason = f"{len(prompt)} tokens, {num_kept} left"
                self.truncated_rows.append(Place(record.source, reason=reason))


def _until_no_rows(records: Iterator[Record]) -> Iterator[Record]:
    """Ends a set without any usable row like an empty one: its bad rows are in the account by then."""
    try:
        yield from records
    except NoRowsError:
        return


def _encoded(records: list[Record], checked: CheckedSet) -> Iterator[tuple[Record, list[int], list[int]]]:
    prompts = encode_prompts(checked.tokenizer, [record.prompt for record in records])
    texts = [record.response for record in records]
    responses = encode_responses(checked.tokenizer, texts, append_eos=checked.settings.append_eos)
    return zip(records, prompts, responses, strict=True)


def file_and_line(source: str) -> tuple[str, int]:
    """Returns the two parts of ``file:line``."""
    file, _, line = source.rpartition(":")
    return file, int(line)
