"""Test the grading of responses in the data set."""

import pytest

from sft_lightning.diagnostics.check.ground_truths import GroundTruths
from sft_lightning.grading.graders import Grade, Grader, R1ZeroGrader


def r1(answer):
    return f" so </think> <answer> {answer} </answer>"


class Picky(Grader):
    """Compares text, and raises on some answers. Grades in this process, since others take seconds to start."""

    def __reduce__(self):
        raise TypeError("no other process can have it")

    def grade(self, response, ground_truth):
        if ground_truth == "bad":
            raise RuntimeError("no such truth")
        return Grade(format_correct=True, answer_correct=response.strip() == ground_truth)


def graded(rows_of, texts, grader=None, *, stops=False):
    rows, *_ = rows_of(texts)
    truths = GroundTruths("val", grader or R1ZeroGrader())
    truths.add(rows)
    return truths, {finding.name: finding for finding in truths.findings(stops_evaluation=stops)}


def test_correct_and_ungraded_rows_give_no_finding(rows_of):
    truths, found = graded(rows_of, [("a", r1("72"), "72"), ("a", r1("$1,005"), 1005), ("a", "anything")])
    assert (truths.num_graded, found) == (2, {})


def test_wrong_answers_and_wrong_format_are_separate_findings(rows_of, lines_of):
    texts = [("a", r1("72"), "72"), ("b", r1("72"), "73"), ("c", " so </think> <answer> 4", "4")]
    found = graded(rows_of, texts)[1]
    assert lines_of(found["wrong_answers"]) == [(2,)]
    assert found["wrong_answers"].places[0].reason == "wrong"
    assert lines_of(found["wrong_form"]) == [(3,)]
    assert found["wrong_form"].places[0].reason == "no_closing_tag"
    assert {finding.severity for finding in found.values()} == {"error"}


def test_one_wrong_row_of_hundreds_is_a_warning(rows_of):
    found = graded(rows_of, [("a", "yes", "yes")] * 199 + [("a", "yes", "no")], Picky())[1]
    assert found["wrong_answers"].severity == "warning"
    assert "1 of 200 responses fail by their own ground truth (1 wrong)" in found["wrong_answers"].message


def test_data_in_another_format_is_one_finding(rows_of):
    found = graded(rows_of, [("a", "4", "4"), ("a", "5", "6")])[1]
    assert set(found) == {"other_form"}
    assert found["other_form"].severity == "warning"


@pytest.mark.parametrize(("stops", "severity"), [(True, "error"), (False, "warning")])
def test_rejected_ground_truths_are_listed_and_others_graded(rows_of, lines_of, stops, severity):
    texts = [("a", "yes", "yes")] * 150 + [("a", "yes", "bad")] + [("a", "no", "yes")]
    truths, found = graded(rows_of, texts, Picky(), stops=stops)
    assert lines_of(found["rejected_ground_truths"]) == [(151,)]
    assert "no such truth" in found["rejected_ground_truths"].places[0].reason
    assert found["rejected_ground_truths"].severity == severity
    assert lines_of(found["wrong_answers"]) == [(152,)]
    assert truths.num_graded == 151


def test_r1_zero_grader_rejects_an_empty_ground_truth(rows_of, lines_of):
    found = graded(rows_of, [("a", r1("4"), " "), ("a", r1("4"), "4"), ("a", r1("4"), [])], stops=True)[1]
    assert lines_of(found["rejected_ground_truths"]) == [(1,), (3,)]


def test_grading_stops_after_enough_failures(rows_of, monkeypatch):
    monkeypatch.setattr("sft_lightning.diagnostics.check.ground_truths._GRADED_AT_ONCE", 10)
    monkeypatch.setattr("sft_lightning.diagnostics.check.ground_truths._MOST_FAILED", 5)
    rows, *_ = rows_of([("a", "yes", "no")] * 30)
    truths = GroundTruths("val", Picky())
    for start in range(0, 30, 10):
        truths.add(rows[start : start + 10])
    (finding,) = truths.findings(stops_evaluation=False)
    assert truths.num_graded == 10
    assert finding.message.endswith("and no more were graded")
