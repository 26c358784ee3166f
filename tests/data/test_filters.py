import itertools
import json

import pytest

from sft_lightning.data.filters import CorrectResponses, filter_records
from sft_lightning.data.formats.base import Record
from sft_lightning.data.formats.r1_zero import R1Zero
from sft_lightning.data.load_report import LoadReport, SkippedRows
from sft_lightning.data.settings import DataSettings
from sft_lightning.data.token_store import load_or_build_tokens
from sft_lightning.grading.graders import Grade, Grader, R1ZeroGrader


class EvenTruths:
    identity = "even"

    def __init__(self):
        self.chunks = []

    def faults(self, records):
        self.chunks.append(len(records))
        return [None if record.ground_truth % 2 == 0 else f"{record.ground_truth} is odd" for record in records]


def records(truths):
    return (Record("p", "r", truth, source=f"a:{line}") for line, truth in enumerate(truths, start=1))


def test_rejected_rows_are_reported_by_place_and_reason():
    load_report = LoadReport()
    kept = filter_records(records([2, None, 3, 4, None]), EvenTruths(), load_report)
    assert [record.source for record in kept] == ["a:1", "a:4"]
    assert load_report == LoadReport(
        ungraded_rows=SkippedRows(2, [("a:2", "no ground_truth"), ("a:5", "no ground_truth")]),
        rejected_rows=SkippedRows(1, [("a:3", "3 is odd")]),
    )


def test_zero_is_a_ground_truth():
    assert [record.ground_truth for record in filter_records(records([0]), EvenTruths(), LoadReport())] == [0]


def test_records_are_judged_lazily_in_chunks():
    row_filter = EvenTruths()
    endless = filter_records(records(itertools.count()), row_filter, LoadReport())
    assert len(list(itertools.islice(endless, 600))) == 600
    assert row_filter.chunks == [1024, 1024]  # half of each is even


# Correct responses


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
def test_a_correct_response_needs_format_and_answer(text, truth, fault):
    assert CorrectResponses(R1ZeroGrader()).faults([Record("p", text, truth)]) == [fault]


class Silent(Grader):
    """Knows right and wrong, and no reasons."""

    def grade(self, response, ground_truth):
        return Grade(format_correct=True, answer_correct=response == ground_truth)


def test_another_grader_gives_other_verdicts_and_another_identity():
    row_filter = CorrectResponses(Silent())
    assert row_filter.faults([Record("p", "a", "a"), Record("p", "b", "a")]) == [None, "wrong"]
    assert row_filter.identity != CorrectResponses(R1ZeroGrader()).identity
    assert CorrectResponses(R1ZeroGrader()).identity == CorrectResponses(R1ZeroGrader()).identity
    assert CorrectResponses(R1ZeroGrader(units="ignore")).identity != CorrectResponses(R1ZeroGrader()).identity


@pytest.mark.slow
def test_only_planted_wrong_ground_truths_of_gsm8k_are_rejected(gsm8k, tokenizer, tmp_path):
    options = {"filter": CorrectResponses(R1ZeroGrader()), "max_length": 100_000, "cache_dir": tmp_path}
    clean = load_or_build_tokens(DataSettings(gsm8k / "train.jsonl", **options), tokenizer)
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
    store = load_or_build_tokens(DataSettings(path, **options), tokenizer)
    assert len(store) == 7473 - 15
    assert store.load_report.rejected_rows.count == store.load_report.num_rows == 15
    assert store.load_report.rejected_rows.first == [(f"{path}:{line}", "wrong") for line in planted]
    assert {example.source for example in store}.isdisjoint(f"{path}:{line}" for line in planted)
