import json

import pytest

from sft_lightning.data.correct_responses import CorrectResponses
from sft_lightning.data.formats.base import R1Zero
from sft_lightning.data.records import Record
from sft_lightning.data.token_store import load_or_build_tokens
from sft_lightning.grading.graders import Grade, Grader, R1ZeroGrader


def response(number):
    return f" thought </think> <answer> {number} </answer>"


@pytest.mark.parametrize(
    ("text", "truth", "fault"),
    [
        (response("72"), "72", None),
        (response("1,000"), 1000, None),
        (response("0.5"), ["2", "1/2"], None),
        (response("71"), "72", "wrong"),
        (" thought </think> <answer> 72", "72", "no_closing_tag"),
        (" thought </think>  <answer> 72 </answer>", "72", "thought_not_closed"),
        ("72", "72", "no_answer_tag"),
    ],
)
def test_a_response_needs_both_format_and_answer(text, truth, fault):
    assert CorrectResponses(R1ZeroGrader()).faults([Record("p", text, truth)]) == [fault]


class Silent(Grader):
    """Knows right and wrong, and no reasons."""

    def grade(self, response, ground_truth):
        return Grade(format_correct=True, answer_correct=response == ground_truth)


def test_another_grader_judges_otherwise_and_goes_by_another_name():
    row_filter = CorrectResponses(Silent())
    assert row_filter.faults([Record("p", "a", "a"), Record("p", "b", "a")]) == [None, "wrong"]
    assert row_filter.identity != CorrectResponses(R1ZeroGrader()).identity
    assert CorrectResponses(R1ZeroGrader()).identity == CorrectResponses(R1ZeroGrader()).identity


@pytest.mark.slow
def test_gsm8k_is_kept_whole_and_planted_wrong_ground_truths_go_alone(gsm8k, tokenizer, tmp_path):
    options = {"tokenizer": tokenizer, "row_filter": CorrectResponses(R1ZeroGrader()), "max_length": 100_000}
    clean = load_or_build_tokens(gsm8k / "train.jsonl", cache_dir=tmp_path, **options)
    assert clean.report["rows"] == 7473
    assert clean.load_report.num_rows == 0
    planted = range(50, 7473, 500)  # lines 50, 550, ..., 7050
    path = tmp_path / "planted.jsonl"
    with (gsm8k / "train.jsonl").open() as source, path.open("w") as target:
        for line, text in enumerate(source, start=1):
            row = R1Zero().render(json.loads(text))
            if line in planted:
                row["ground_truth"] += "1"
            target.write(json.dumps(row) + "\n")
    store = load_or_build_tokens(path, cache_dir=tmp_path, **options)
    assert len(store) == 7473 - 15
    assert store.load_report.rejected_rows.count == store.load_report.num_rows == 15
    assert store.load_report.rejected_rows.first == [(f"{path}:{line}", "wrong") for line in planted]
    assert {example.source for example in store}.isdisjoint(f"{path}:{line}" for line in planted)
