"""The rows behind a step that must not be taken are named by file and line, and kept as data."""

import json

import numpy as np
import pytest
import torch

from sft_lightning.checkpointing.run_folder import RUN_FILES
from sft_lightning.data.batch import Example, collate_padded
from sft_lightning.data.formats.base import Record
from sft_lightning.data.records import read_records
from sft_lightning.data.settings import DataSettings
from sft_lightning.errors import UserError
from sft_lightning.losses.linear_cross_entropy import LabelLosses
from sft_lightning.training.nonfinite import (
    StepRow,
    describe_non_finite,
    find_records,
    read_about,
    read_examples,
    rows_of_step,
    save_step,
)


def micro_batch(*lines):
    examples = [Example(np.array([1, 2, 3], dtype=np.int32), 1, f"rows.jsonl:{line}") for line in lines]
    return collate_padded(examples, [1.0] * len(examples), pad_token_id=0)


def losses(*values):
    nll = torch.tensor(values)
    return LabelLosses(weighted_sum=nll.sum(), nll=nll, correct=nll > 0, entropy=None)


def test_a_row_is_finite_when_the_losses_of_all_its_labels_are():
    first = (losses(1.0, 2.0, float("nan"), 1.0), micro_batch(3, 8))
    second = (losses(float("inf"), 2.0), micro_batch(5))
    assert rows_of_step([first, second]) == [
        StepRow("rows.jsonl:3", True),
        StepRow("rows.jsonl:8", False),
        StepRow("rows.jsonl:5", False),
    ]


def test_the_dummy_row_of_an_empty_micro_batch_is_never_named():
    empty = collate_padded([], [], pad_token_id=0)
    assert rows_of_step([(losses(float("nan")), empty)]) == []


def test_only_the_rows_whose_own_loss_is_not_finite_are_named(tmp_path):
    rows = [StepRow("a:3", True), StepRow("a:8", False), StepRow("a:5", False)]
    message = describe_non_finite(12, float("nan"), 4.0, rows, done="stopped before the step", folder=tmp_path)
    assert message == (
        "loss nan and gradient norm 4.0 in optimizer step 12: stopped before the step, the weights and the last "
        f"checkpoint are untouched. Each row alone: sft-lightning replay '{tmp_path}'. Examples: a:8, a:5"
    )


def test_an_overflowing_gradient_names_every_row_and_counts_beyond_eight():
    rows = [StepRow(f"rows.jsonl:{line}", True) for line in range(1, 11)]
    message = describe_non_finite(1, 1.0, float("inf"), rows, done="skipped the step")
    named = ", ".join(f"rows.jsonl:{line}" for line in range(1, 9))
    assert message.endswith(f"untouched. Examples: {named} and 2 more")


RECORDS = [Record(f"say {n}:", f" {n}", str(n), 0.5, f"a:{n}") for n in range(1, 6)]


def test_the_bad_rows_come_first_and_what_is_gone_is_left_out():
    rows = [StepRow("a:4", True), StepRow("a:2", False), StepRow("a:9", True)]
    assert [record.source for record in find_records(lambda: RECORDS, rows)] == ["a:2", "a:4"]

    def gone():
        yield RECORDS[0]
        raise UserError("no such file")

    assert find_records(gone, [StepRow("a:1", True), StepRow("a:2", True)]) == [RECORDS[0]]


def test_no_more_of_the_data_is_read_than_is_asked_for():
    read = []

    def records():
        for record in RECORDS:
            read.append(record.source)
            yield record

    find_records(records, [StepRow("a:2", True)])
    assert read == ["a:1", "a:2"]


def test_what_is_saved_is_data_again_and_belongs_to_the_run(tmp_path, tokenizer):
    options = {"max_length": 64, "overlength": "drop", "append_eos": True}
    names = ("checkpoint", "model_path", "init", "attn_implementation", "tokenizer_path", "precision", "layout", "seed")
    about = {"step": 7, "gradient_norm": 2.0, **options, **dict.fromkeys(names, "as in the run")}
    save_step(tmp_path, RECORDS[:2], {**about, "loss": float("nan")})
    folder = tmp_path / "nonfinite" / "step-7"
    assert read_about(folder) == {**about, "loss": "nan"}
    again = list(read_records(DataSettings(folder / "rows.jsonl")))
    assert [(r.prompt, r.response, r.ground_truth, r.weight) for r in again] == [
        ("say 1:", " 1", "1", 0.5),
        ("say 2:", " 2", "2", 0.5),
    ]
    claimed = json.loads((tmp_path / RUN_FILES).read_text())
    assert claimed == ["nonfinite/step-7/rows.jsonl", "nonfinite/step-7/about.json"]
    first, second = read_examples(folder, tokenizer, options)
    assert (first.source, second.source) == ("a:1", "a:2")
    prompt, response = tokenizer("say 2:").input_ids, tokenizer(" 2").input_ids
    assert second.tokens.tolist() == [*prompt, *response, tokenizer.eos_token_id]
    assert second.prompt_length == len(prompt)


@pytest.mark.parametrize("content", [None, "{", "[]", '{"step": 7}'])
def test_a_folder_without_a_step_is_the_users_mistake(tmp_path, content):
    if content is not None:
        (tmp_path / "about.json").write_text(content)
    with pytest.raises(UserError, match=r"about\.json"):
        read_about(tmp_path)
