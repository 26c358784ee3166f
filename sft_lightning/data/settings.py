"""Define the settings that select the rows of a data set and determine their tokens."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

from sft_lightning.data.filters import RowFilter
from sft_lightning.data.formats.base import Template
from sft_lightning.data.formats.prompt_response import Plain
from sft_lightning.data.sources.files import DataFile
from sft_lightning.errors import UserError, check_at_least

Overlength: TypeAlias = Literal["drop", "error", "truncate_prompt"]

_TOKEN_OPTIONS = ("max_length", "overlength", "append_eos")


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """How one data set is read and tokenized. The fields have the names of the options of ``data``.

    Attributes:
        path: A JSONL or Parquet file, a folder of them, a glob, or rows in memory.
        columns: Our name for a field -> the file's name for it.
        template: Turns a row into prompt and response; None chooses by the keys of each file's rows.
        max_length: The most tokens that prompt, response and EOS may have together; at least 2.
        overlength: What happens to a longer row: ``drop`` it, stop with an ``error``, or ``truncate_prompt`` from the
            left, except for BOS and one token. Responses are never cut: a row that is still too long is dropped.
        append_eos: Ends each response with the tokenizer's EOS.
        max_bad_rows: The most unreadable rows to skip; one more is an error.
        filter: Accepts the rows to keep (``data.filter_correct``); None keeps all.
        max_examples: Keeps only the first rows in file order, after filtering (``data.max_train_examples``).
        cache_dir: Folder of the token stores; None uses ``$SFT_CACHE_DIR``, or ``sft_lightning`` in the user's cache
            folder.

    Raises:
        UserError: If an option is out of range.
    """

    path: str | DataFile = field(kw_only=False)
    columns: Mapping[str, str] = field(default_factory=dict)
    template: Template | None = None
    max_length: int = 2048
    overlength: Overlength = "drop"
    append_eos: bool = True
    max_bad_rows: int = 0
    filter: RowFilter | None = None
    max_examples: int | None = None
    cache_dir: str | Path | None = None

    def __post_init__(self) -> None:
        check_at_least(1, "data", max_length=self.max_length, max_train_examples=self.max_examples)
        check_at_least(0, "data", max_bad_rows=self.max_bad_rows)
        if self.overlength not in get_args(Overlength):
            raise UserError(f"data.overlength is {self.overlength!r}; give one of {', '.join(get_args(Overlength))}")
        if self.max_length < 2:
            raise UserError(f"data.max_length is {self.max_length}; a prompt and a response take at least 2 tokens")

    @property
    def token_options(self) -> dict[str, Any]:
        """The options that decide which tokens a prompt and its response become, by name, as plain values."""
        return {name: getattr(self, name) for name in _TOKEN_OPTIONS}

    @classmethod
    def of_saved_rows(cls, path: str | Path, token_options: Mapping[str, Any]) -> "DataSettings":
        """Returns the settings for rows that a run saved as ``prompt`` and ``response``, to get the run's tokens again.

        Args:
            path: File of the rows.
            token_options: From ``token_options``, possibly among other names.
        """
        return cls(path, template=Plain(), **{name: token_options[name] for name in _TOKEN_OPTIONS})
