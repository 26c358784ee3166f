import json
import os
import random
import time
from pathlib import Path

import pytest

from sft_lightning.data.templates import R1Zero
from sft_lightning.errors import UserError
from sft_lightning.evaluation import grading_pool
from sft_lightning.evaluation.grading import Grade, Grader, R1ZeroGrader, grade_all

REPOSITORY = Path(__file__).parents[2]
GSM8K = Path(os.environ.get("SFT_GSM8K_DIR", REPOSITORY.parent / "shared" / "gsm8k")) / "test.jsonl"

TOWER = "9^{9^{9^{9}}}"


def respond(answer):
    return f" some thought </think> <answer> {answer} </answer>"


# answer, ground truth, whether it is right. What each stage makes of them stands in the tests of the stages.
ANSWERS = [
    ("Paris", "paris", True),
    ("Rome", "Paris", False),
    ("", "72", False),
    ("$1,234.00", "1234", True),
    ("72 apples", "72", False),
    ("73 = 72", "72", False),
    ("0 kg", "0", False),
    (r"\dfrac{144}{2}", "72", True),
    (r"\dfrac{144}{3}", "72", False),
    ("x = 5", "5", True),
    (r"so it is \boxed{72} apples", "72", True),
    (r"\boxed{72} no, \boxed{71}", "72", False),
    (r"$\boxed{\frac{1}{2}}$", "0.5", True),
    ("72.0", 72, True),
    ("73", 72, False),
    ("1/2", 0.5, True),
    ("18", 18.0, True),
    ("100,000,000,000,000,000,000", 1e20, True),
    ("72", ["71", "72"], True),
    ("72", [71, 72.0], True),
    ("1/2", ["apple", "0.5"], True),
    ("73", ["71", "72"], False),
]


@pytest.mark.parametrize(("answer", "ground_truth", "is_right"), ANSWERS)
def test_answers(answer, ground_truth, is_right):
    expected = Grade(format_correct=True, answer_correct=is_right, failure=None if is_right else "wrong")
    assert R1ZeroGrader().grade(respond(answer), ground_truth) == expected


# response, format, answer (the truth is 72), failure
FORMATS = [
    (" t </think> <answer> 72 </answer>", True, True, None),
    (" t </think> <answer>72</answer>", True, True, None),
    (" t </think> <answer> 72 </answer>\n", True, True, None),
    ("</think> <answer>72</answer>", True, True, None),
    (" t </think> <answer> 72 </answer></answer>", True, True, None),
    (" a </think> <answer> 71 </answer> b </think> <answer> 72 </answer>", True, True, None),
    (" a </think> <answer> 72 </answer> b </think> <answer> 71 </answer>", True, False, "wrong"),
    (" t </think> <answer> <answer> 72 </answer>", True, True, None),
    (" t </think> <answer> 72 </answer> is what I say", True, False, "text_after_answer"),
    (" t </think> <answer> 72 </answer> 72", True, False, "text_after_answer"),
    (" t </think><answer> 72 </answer>", False, True, "thought_not_closed"),
    (" t </think>  <answer> 72 </answer>", False, True, "thought_not_closed"),
    (" t </think>\n<answer> 72 </answer>", False, True, "thought_not_closed"),
    (" t <answer> 72 </answer>", False, True, "thought_not_closed"),
    (" t </think> <answer> 72", False, True, "no_closing_tag"),
    (" t </think> <answer> 72 </Answer>", False, False, "no_closing_tag"),
    (" t </think> 72 </answer>", False, False, "no_answer_tag"),
    ("72", False, False, "no_answer_tag"),
    ("", False, False, "no_answer_tag"),
]


@pytest.mark.parametrize(("response", "format_correct", "answer_correct", "failure"), FORMATS)
def test_formats(response, format_correct, answer_correct, failure):
    assert R1ZeroGrader().grade(response, "72") == Grade(format_correct, answer_correct, failure)


@pytest.mark.parametrize(
    ("format_correct", "answer_correct", "reward"), [(True, True, 1.0), (True, False, 0.0), (False, True, 0.0)]
)
def test_reward_wants_both(format_correct, answer_correct, reward):
    assert Grade(format_correct, answer_correct).reward == reward


@pytest.mark.parametrize("ground_truth", [None, "", "  ", [], {"a": 1}, [None], [["72"]]])
def test_useless_ground_truth_is_refused(ground_truth):
    with pytest.raises(UserError, match="ground_truth"):
        R1ZeroGrader().grade(respond("72"), ground_truth)


@pytest.mark.parametrize("seconds", [0, -1, float("inf"), float("nan")])
def test_useless_time_limit_is_refused(seconds):
    with pytest.raises(UserError, match="time_limit_seconds"):
        R1ZeroGrader(time_limit_seconds=seconds)


def gsm8k_rows():
    if not GSM8K.is_file():
        pytest.skip(f"no GSM8K test file at {GSM8K}; set SFT_GSM8K_DIR")
    rows = [json.loads(line) for line in GSM8K.read_text(encoding="utf-8").splitlines()]
    return [R1Zero().render(row) for row in rows]


def test_gsm8k_references(started):
    rows = gsm8k_rows()
    truths = [row["ground_truth"] for row in rows]
    references = [row["response"] for row in rows]
    changed = [
        response.replace(f"<answer> {truth} </answer>", f"<answer> {int(truth) + 1} </answer>")
        for response, truth in zip(references, truths, strict=True)
    ]
    unclosed = [response.removesuffix("</answer>") for response in references]
    before = time.perf_counter()
    grades = grade_all(R1ZeroGrader(), references, truths)
    assert time.perf_counter() - before < 5
    assert len(grades) == 1319
    assert sum(grade.format_correct for grade in grades) == 1319
    assert sum(grade.answer_correct for grade in grades) == 1319
    grades = grade_all(R1ZeroGrader(), changed, truths)
    assert sum(grade.format_correct for grade in grades) == 1319
    assert sum(grade.answer_correct for grade in grades) == 0
    grades = grade_all(R1ZeroGrader(), unclosed, truths)
    assert sum(grade.format_correct for grade in grades) == 0
    assert {grade.failure for grade in grades} == {"no_closing_tag"}
    assert started == []  # numbers are compared without mathematics


def test_grade_all_keeps_the_order_and_counts_time_outs(started):
    answers = ["72", TOWER, "144/2", "1/3", TOWER, r"\frac{144}{2}"]
    grades = grade_all(R1ZeroGrader(1.0), [respond(answer) for answer in answers], ["72"] * 6, num_workers=2)
    assert [grade.answer_correct for grade in grades] == [True, False, True, False, False, True]
    assert [grade.timed_out for grade in grades] == [False, True, False, False, True, False]
    assert [grade.failure for grade in grades] == [None, "timed_out", None, "wrong", "timed_out", None]
    assert len(started) <= 4  # two, and one after each that was killed
    assert all(process.returncode is not None for process in started)


def test_a_later_alternative_can_still_be_right():
    assert R1ZeroGrader(1.0).grade(respond("144/2"), [TOWER, "72"]).answer_correct


def test_crash_counts_as_wrong_and_is_told_apart(tmp_path, monkeypatch, started):
    program = tmp_path / "crashing.py"
    program.write_text("import os\nprint('ready', flush=True)\ninput()\nos.abort()\n")
    monkeypatch.setattr(grading_pool, "_PROGRAM", program)
    expected = Grade(format_correct=True, answer_correct=False, failure="crashed")
    assert grade_all(R1ZeroGrader(), [respond("1/2")] * 2, ["0.5"] * 2) == [expected] * 2
    assert all(process.returncode is not None for process in started)


def test_a_process_that_does_not_start_is_no_wrong_answer(tmp_path, monkeypatch, started):
    program = tmp_path / "absent.py"
    monkeypatch.setattr(grading_pool, "_PROGRAM", program)
    with pytest.raises(RuntimeError, match=r"absent\.py"):
        grade_all(R1ZeroGrader(), [respond("1/2")], ["0.5"])
    assert all(process.returncode is not None for process in started)


def test_grade_all_wants_a_ground_truth_for_each_response():
    with pytest.raises(UserError, match="2 responses and 1 ground_truths"):
        grade_all(R1ZeroGrader(), ["a", "b"], ["72"])


def test_grade_all_of_nothing():
    assert grade_all(R1ZeroGrader(), [], []) == []


def test_grade_all_takes_any_grader():
    class Length(Grader):
        def grade(self, response, ground_truth):
            return Grade(format_correct=True, answer_correct=len(response) == ground_truth)

    grades = grade_all(Length(), ["a", "ab"], [2, 2])
    assert [grade.answer_correct for grade in grades] == [False, True]


def test_random_answers_never_break_the_grader():
    letters = [*"0123456789.,+-*/^()[]{}=<>!%$ x\\_|&'\n", r"\frac", r"\sqrt", r"\pm", r"\boxed{", "</answer>"]
    dice = random.Random(0)
    answers = ["".join(dice.choices(letters, k=dice.randint(1, 12))) for _ in range(1000)]
    grades = grade_all(R1ZeroGrader(0.5), [respond(answer) for answer in answers], ["12345.678"] * 1000)
    assert not any(grade.answer_correct for grade in grades)
