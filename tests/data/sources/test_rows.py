"""Test that rows from Python train as the file that holds them does, and are recognized by their content."""

import json
from pathlib import Path
from types import MappingProxyType

import pytest

from sft_lightning import HFCheckpoint
from sft_lightning.data.sources.files import digest, read_rows, resolve_files
from sft_lightning.data.sources.rows import MemoryRows
from sft_lightning.errors import UserError

ROWS = [{"prompt": "a", "response": "b"}, {"response": "d", "prompt": "c"}]


class Table:
    """Has rows by index, as a ``datasets.Dataset``, and is no ``Sequence``."""

    def __init__(self, rows):
        self._rows = rows

    def __len__(self):
        return len(self._rows)

    def __getitem__(self, index):
        return self._rows[index]


@pytest.mark.parametrize("rows", [ROWS, tuple(map(MappingProxyType, ROWS)), Table(ROWS), iter(ROWS)])
def test_rows_are_numbered_and_read_more_than_once(rows):
    source = MemoryRows(rows, "train_path")
    assert resolve_files(source) == [source]
    for _ in range(2):
        read = list(read_rows(source))
        assert [place for place, _ in read] == ["train_path:1", "train_path:2"]
        assert [dict(row) for _, row in read] == ROWS
    # As `printf '%s\n' '{"prompt": "a", "response": "b"}' '{"prompt": "c", "response": "d"}' | sha256sum` says.
    assert source.digest == "e0ce525eb913b4255a43e8718c071f4e33156cd8e21c5b04c5621625a6f14146"


def test_the_digest_changes_with_a_value_and_with_the_order():
    orders = [ROWS, ROWS[::-1], [ROWS[0], {**ROWS[1], "weight": 0.5}], ROWS[:1]]
    assert len({digest([MemoryRows(rows, "train_path")]) for rows in orders}) == 4


def test_a_row_that_is_no_mapping_is_a_bad_row():
    ((_, row),) = read_rows(MemoryRows(["text"], "train_path"))
    assert str(row) == "not a mapping, but str"


@pytest.mark.parametrize("kind", [list, iter, Table])
def test_training_on_rows_equals_training_on_their_file(fit, train_file, val_file, tmp_path, kind):
    rows, val = ([json.loads(line) for line in Path(file).read_text().splitlines()] for file in (train_file, val_file))
    ours = fit(tmp_path / "rows", data={"train_path": kind(rows), "val_path": kind(val), "num_workers": 1})
    theirs = fit(tmp_path / "file", data={"train_path": train_file, "val_path": val_file})
    assert ours.losses == theirs.losses
    assert ours.trainer.callback_metrics["val/loss"] == theirs.trainer.callback_metrics["val/loss"]


def test_a_resume_on_other_rows_is_refused(fit, train_file, tmp_path):
    rows = [json.loads(line) for line in Path(train_file).read_text().splitlines()]
    whole = fit(tmp_path / "whole", data={"train_path": rows})
    part = {"checkpoint": {"every_n_train_steps": 3}, "data": {"train_path": rows}}
    fit(tmp_path / "run", max_steps=3, **part)
    last = HFCheckpoint.find(tmp_path / "run")
    assert fit(tmp_path / "run", ckpt_path=last, **part).losses == whole.losses[3:]
    part["data"] = {"train_path": [*rows[:-1], {**rows[-1], "response": " other"}]}
    with pytest.raises(UserError, match=r"^cannot resume: the content of data\.train_path is "):
        fit(tmp_path / "run", ckpt_path=last, **part)


def test_a_bad_row_is_named_by_its_number(fit):
    with pytest.raises(UserError, match=r"^data\.train_path: too many bad rows .*: train_path:2: field 'response' is"):
        fit(data={"train_path": [ROWS[0], {"prompt": "c"}]})
