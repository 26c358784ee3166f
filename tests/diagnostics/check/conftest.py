"""Rows and settings for the checks, on the tiny tokenizer."""

import json

import pytest

from sft_lightning.diagnostics.check.rows import RowAccount, RowSettings


@pytest.fixture
def settings_for(tokenizer, tmp_path):
    """Makes the settings of a set out of its path; keywords override."""

    def make(path, **options):
        defaults = {
            "name": "train",
            "reading": {"template": None, "columns": None, "max_bad_rows": 0},
            "max_length": 512,
            "overlength": "drop",
            "append_eos": True,
            "cache_dir": str(tmp_path / "cache"),
        }
        return RowSettings(path=str(path), tokenizer=tokenizer, **{**defaults, **options})

    return make


@pytest.fixture
def rows_of(settings_for, tmp_path):
    """Writes (prompt, response[, ground truth]) as rows and returns (rows in use, account, settings)."""

    def read(texts, *, name="train", **options):
        path = tmp_path / f"{name}.jsonl"
        keys = ("prompt", "response", "ground_truth")
        path.write_text("".join(json.dumps(dict(zip(keys, row, strict=False))) + "\n" for row in texts))
        settings = settings_for(path, name=name, **options)
        account = RowAccount()
        rows = [row for chunk in account.read(settings, settings.load_tokens()) for row in chunk]
        return rows, account, settings

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
