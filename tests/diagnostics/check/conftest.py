"""Define rows and settings for the checks, on the tiny tokenizer."""

import json

import pytest

from sft_lightning.data.settings import DataSettings
from sft_lightning.diagnostics.check.rows import CheckedSet, RowAccount


@pytest.fixture
def checked_set(tokenizer, tmp_path):
    """Makes a set of a path; keywords override the settings."""

    def make(path, name="train", **options):
        defaults = {"max_length": 512, "cache_dir": str(tmp_path / "cache")}
        return CheckedSet(name, DataSettings(str(path), **{**defaults, **options}), tokenizer)

    return make


@pytest.fixture
def rows_of(checked_set, tmp_path):
    """Writes (prompt, response[, ground truth]) as rows and returns (rows in use, account, set)."""

    def read(texts, *, name="train", **options):
        path = tmp_path / f"{name}.jsonl"
        keys = ("prompt", "response", "ground_truth")
        path.write_text("".join(json.dumps(dict(zip(keys, row, strict=False))) + "\n" for row in texts))
        checked = checked_set(path, name, **options)
        account = RowAccount()
        rows = [row for chunk in account.read(checked, checked.load_tokens()) for row in chunk]
        return rows, account, checked

    return read


@pytest.fixture
def lines_of():
    """Returns the line numbers of a finding's places, and of the places that they are about as well."""

    def numbers(finding):
        return [
            tuple(int(source.rpartition(":")[2]) for source in (place.source, place.other) if source)
            for place in finding.places
        ]

    return numbers
