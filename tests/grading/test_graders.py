import json
import random
import time
from decimal import Decimal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sft_lightning.data.formats.r1_zero import R1Zero
from sft_lightning.errors import UserError
from sft_lightning.grading import math_processes
from sft_lightning.grading.graders import (
    AnswerGrader,
    ExactMatchGrader,
    Grade,
    Gsm8kGrader,
    R1ZeroGrader,
    grade_all,
    grader_named,
)

TOWER = "9^{9^{9^{9}}}"


def respond(answer):
    return f" some thought </think> <answer> {answer} </answer>"


# answer, ground truth, whether it is right
ANSWERS = [
    # text
    ("Paris", "paris", True),
    ("Paris.", "Paris", True),
    ("Rome", "Paris", False),
    ("", "72", False),
    ("B", "C", False),
    (True, True, True),
    # numbers, separators, sign
    ("72", "72", True),
    ("72.", "72", True),
    ("072", "72", True),
    ("72.00", "72", True),
    ("+72", "72", True),
    ("-72", "72", False),
    ("\u221272", "-72", True),
    ("-0", "0", True),
    ("1,234", "1234", True),
    ("1,234,567.80", "1234567.8", True),
    ("1 234 567", "1234567", True),
    (r"1{,}234", "1234", True),
    ("12,34", "1234", False),
    ("1,23", "1.23", False),
    ("0,072", "72", False),
    ("1.234.567", "1234567", False),
    ("72.0000001", "72", False),
    # currency and percent
    ("$72", "72", True),
    (r"\$1,234.00", "1234", True),
    ("72 \u20ac", "72", True),
    ("-$5", "-5", True),
    ("$$72", "72", False),
    ("72%", "72", True),
    (r"72\%", "72", True),
    ("72", "72%", True),
    ("0.72", "72%", False),
    ("72%", "0.72", False),
    ("72%%", "72", False),
    # words and units
    ("72 apples", "72", False),
    ("72 apples", "72 apples", True),
    ("72.0 Apples", "72 apples", True),
    ("72", "72 apples", False),
    ("72 pears", "72 apples", False),
    (r"72 \text{ cm}", "72", False),
    (r"72~\text{cm}", "72 cm", True),
    ("72 dollars", "72", False),
    ("0 kg", "0", False),
    (r"0 \mu", "0", False),
    (r"72^\circ", "72", False),
    ("about 72", "72", False),
    ("~72", "72", False),
    ("The answer is 72", "72", False),
    # more than one value
    ("73 72", "72", False),
    ("70 2", "72", False),
    ("72 or 73", "72", False),
    ("72, 72", "72", False),
    ("73 = 72", "72", False),
    ("72 < 73", "72", False),
    (r"72 \pm 0", "72", False),
    ("70(2)", "72", False),
    ("70 [2]", "72", False),
    ("0(72)", "72", False),
    ("(0)72", "72", False),
    (r"\frac{70}{1}\frac{2}{1}", "72", False),
    (r"\frac{2}{1}(70)", "72", False),
    (r"70\frac{2}{1}", "72", False),
    (r"70\frac{2}{1}", "140", True),
    (r"7\left2", "72", False),
    # fractions and decimals
    ("1/2", "0.5", True),
    ("0.5", "1/2", True),
    (".5", "0.50", True),
    ("2/4", "1/2", True),
    ("-1/2", "-0.5", True),
    ("0.33", "1/3", False),
    ("1 1/2", "1.5", True),
    (r"72\frac{1}{2}", "72.5", True),
    # LaTeX and whole expressions
    (r"\dfrac{144}{2}", "72", True),
    (r"\dfrac{144}{3}", "72", False),
    (r"\frac12", "0.5", True),
    (r"\frac{1,000}{2}", "500", True),
    (r"$\tfrac{3}{4}$", "0.75", True),
    (r"\(2\sqrt{3}\)", r"\sqrt{12}", True),
    (r"\left(3, \frac{\pi}{2}\right)", r"(3,\pi/2)", True),
    ("(1, 234)", "(1,234)", True),
    (r"6 \times 12", "72", True),
    ("6(12)", "72", True),
    ("2(x+1)", "2x+2", True),
    (r"\sin^2(x)", r"\sin^{2}(x)", True),
    (r"7.2 \times 10^{1}", "72", True),
    ("x = 5", "5", True),
    ("x = 4", "5", False),
    ("x^2 + 2x + 1", "(x+1)^2", True),
    # boxes
    (r"so it is \boxed{72} apples", "72", True),
    (r"\boxed{72} no, \boxed{71}", "72", False),
    (r"\boxed{71} no, \boxed{72}", "72", True),
    (r"\boxed{\boxed{72}}", "72", True),
    (r"$\boxed{\frac{1}{2}}$", "0.5", True),
    (r"\boxed{72\}73}", "72", False),
    (r"\boxed{72 apples}", "72", False),
    (r"\boxed{72", "72", False),
    # ground truths that are numbers and lists
    ("72.0", 72, True),
    ("73", 72, False),
    ("1/2", 0.5, True),
    ("18", 18.0, True),
    ("100,000,000,000,000,000,000", 1e20, True),
    ("72", ["71", "72"], True),
    ("72", [71, 72.0], True),
    ("1/2", ["apple", "0.5"], True),
    ("72", r"so it is $\boxed{72}$", True),
    ("73", ["71", "72"], False),
]


@pytest.mark.parametrize(("answer", "ground_truth", "is_right"), ANSWERS)
def test_answers(answer, ground_truth, is_right):
    expected = Grade(True, is_right, failure=None if is_right else "wrong", strict_format_correct=True)
    assert R1ZeroGrader().grade(respond(answer), ground_truth) == expected


# answer, ground truth, whether it is right where units are ignored
UNITS = [
    ("18 apples", "18", True),
    ("18", "18 apples", True),
    ("18 apples", 18, True),
    ("18 miles per hour", "18", True),
    (r"\frac12 \text{ cup}", "0.5", True),
    (r"90^\circ", "90", True),
    ("18 apples", ["17", "18"], True),
    ("19 apples", "18", False),
    ("18 pears", "18 apples", False),
    ("72 cm", "72 m", False),
    ("18x", "18", False),
    ("18 x", "18", False),
    ("18 dozen", "18", False),
    ("18 million", "18", False),
    ("18 and a half", "18", False),
    ("18 or 19", "18", False),
    ("about 18 apples", "18", False),
    ("18 apples and 2 pears", "18", False),
]


@pytest.mark.parametrize(("answer", "ground_truth", "is_right"), UNITS)
def test_units_can_be_ignored(answer, ground_truth, is_right):
    for grader in (R1ZeroGrader(units="ignore"), AnswerGrader(units="ignore")):
        assert grader.grade(respond(rf"\boxed{{{answer}}}"), ground_truth).answer_correct is is_right
    assert not R1ZeroGrader().grade(respond(answer), ground_truth).answer_correct


@pytest.mark.parametrize("grader", [R1ZeroGrader, AnswerGrader])
def test_other_words_for_units_are_refused(grader):
    with pytest.raises(UserError, match=r"^units 'no' is unknown; choose strict or ignore$"):
        grader(units="no")


# response, format, strictly, answer (the truth is 72), failure
FORMATS = [
    (" t </think> <answer> 72 </answer>", True, True, True, None),
    (" t </think> <answer>72</answer>", True, True, True, None),
    (" t </think> <answer> 72 </answer>\n", True, True, True, None),
    ("</think> <answer>72</answer>", True, True, True, None),
    (" t </think> <answer> 72 </answer></answer>", True, False, True, None),
    (" a </think> <answer> 71 </answer> b </think> <answer> 72 </answer>", True, False, True, None),
    (" a </think> <answer> 72 </answer> b </think> <answer> 71 </answer>", True, False, False, "wrong"),
    (" t </think> <answer> <answer> 72 </answer>", True, False, True, None),
    (" t </think> t </think> <answer> 72 </answer>", True, False, True, None),
    ("<think> t </think> <answer> 72 </answer>", True, False, True, None),
    (" t </think> <answer> 72 </answer> <think>", True, False, False, "text_after_answer"),
    ("</answer> t </think> <answer> 72", True, False, True, None),
    (" t </think> <answer> 72 </answer> is what I say", True, True, False, "text_after_answer"),
    (" t </think> <answer> 72 </answer> 72", True, True, False, "text_after_answer"),
    (" t </think><answer> 72 </answer>", False, False, True, "thought_not_closed"),
    (" t </think>  <answer> 72 </answer>", False, False, True, "thought_not_closed"),
    (" t </think>\n<answer> 72 </answer>", False, False, True, "thought_not_closed"),
    (" t <answer> 72 </answer>", False, False, True, "thought_not_closed"),
    (" t </think> <answer> 72", False, False, True, "no_closing_tag"),
    (" t </think> <answer> 72 </Answer>", False, False, False, "no_closing_tag"),
    (" t </think> 72 </answer>", False, False, False, "no_answer_tag"),
    ("72", False, False, False, "no_answer_tag"),
    ("", False, False, False, "no_answer_tag"),
]


@pytest.mark.parametrize(("response", "format_correct", "strictly", "answer_correct", "failure"), FORMATS)
def test_formats(response, format_correct, strictly, answer_correct, failure):
    expected = Grade(format_correct, answer_correct, failure, strict_format_correct=strictly)
    assert R1ZeroGrader().grade(response, "72") == expected


# response, ground truth, whether it is right
PLAIN_ANSWERS = [
    ("72", "72", True),
    (" $72.00\n", 72, True),
    ("1/2", 0.5, True),
    ("the answer is 72", "72", False),
    (r"Six a side, so the answer is $\boxed{72}$.", "72", True),
    (r"First \boxed{71}, then \boxed{\frac{144}{2}}", "72", True),
    ("(B)", "B", True),
    ("", "72", False),
]


@pytest.mark.parametrize(("response", "ground_truth", "is_right"), PLAIN_ANSWERS)
def test_responses_that_are_answers(response, ground_truth, is_right):
    expected = Grade(format_correct=True, answer_correct=is_right, failure=None if is_right else "wrong")
    assert AnswerGrader().grade(response, ground_truth) == expected


def test_an_answer_that_takes_too_long_is_counted():
    expected = Grade(format_correct=True, answer_correct=False, failure="timed_out", timed_out=True)
    assert AnswerGrader(0.5).grade(TOWER, "72") == expected


# response, ground truth, format, answer, failure
GSM8K_ANSWERS = [
    ("6 * 12 = 72\n#### 72", "72", True, True, None),
    ("6 * 12 = 72\n####72", 72, True, True, None),
    ("#### $1,234.00", "1234", True, True, None),
    ("#### 1234", "1,234", True, True, None),
    ("#### -5", -5, True, True, None),
    ("#### 72 eggs, not 73", "72", True, True, None),
    ("#### 71\nno\n#### 72", "72", True, False, "wrong"),
    ("#### 72\n\nQuestion: 1 + 1? #### 2", "72", True, True, None),
    ("#### 6 x 12 = 72", "72", True, True, None),
    ("#### 6 boxes * $12 = $72.00", "72", True, True, None),
    ("#### 72 = 6 x 12", "72", True, True, None),
    ("#### 72 x 2 = 144", "72", True, False, "wrong"),
    ("#### 72/5", "72", True, False, "no_number"),
    ("72 #### seventy-two", "72", True, False, "no_number"),
    ("72 ####", "72", True, False, "no_number"),
    ("She has 71 + 1 = 72 eggs.", "72", False, True, "no_marker"),
    ("74 - 2", "-2", False, False, "no_marker"),
    ("it is -2.", "-2", False, True, "no_marker"),
    ("It takes 72 eggs and 3 pans", "72", False, False, "no_marker"),
    ("eggs", "72", False, False, "no_marker"),
    ("", "72", False, False, "no_marker"),
    ("#### 72", ["71", 72.0], True, True, None),
    ("#### 0.5", 0.5, True, True, None),
]


@pytest.mark.parametrize(("response", "ground_truth", "format_correct", "answer_correct", "failure"), GSM8K_ANSWERS)
def test_gsm8k_answers(response, ground_truth, format_correct, answer_correct, failure):
    assert Gsm8kGrader().grade(response, ground_truth) == Grade(format_correct, answer_correct, failure)


@pytest.mark.parametrize("ground_truth", ["Paris", "72 apples", ["72", "x"], "1/2"])
def test_gsm8k_wants_numbers_for_ground_truths(ground_truth):
    with pytest.raises(UserError, match="must be a number, or a list of numbers, for Gsm8kGrader"):
        Gsm8kGrader().grade("#### 72", ground_truth)


# response, ground truth, whether it is right, whether it is where case does not count
EXACT_ANSWERS = [
    ("positive", "positive", True, True),
    (" positive\n", "positive ", True, True),
    ("Positive", "positive", False, True),
    ("positive.", "positive", False, False),
    ("72.0", 72, False, False),
    ("72", 72, True, True),
    ("yes", ["no", "yes"], True, True),
    ("", "x", False, False),
]


@pytest.mark.parametrize(("response", "ground_truth", "is_right", "is_right_in_any_case"), EXACT_ANSWERS)
def test_exact_answers(response, ground_truth, is_right, is_right_in_any_case):
    for ignore_case, expected in ((False, is_right), (True, is_right_in_any_case)):
        grade = ExactMatchGrader(ignore_case).grade(response, ground_truth)
        assert grade == Grade(True, expected, failure=None if expected else "wrong")


@pytest.mark.parametrize(
    ("format_correct", "answer_correct", "reward"), [(True, True, 1.0), (True, False, 0.0), (False, True, 0.0)]
)
def test_reward_wants_both(format_correct, answer_correct, reward):
    assert Grade(format_correct, answer_correct).reward == reward


@pytest.mark.parametrize("ground_truth", [None, "", "  ", [], {"a": 1}, [None], [["72"]]])
@pytest.mark.parametrize("grader", [R1ZeroGrader(), AnswerGrader(), Gsm8kGrader(), ExactMatchGrader()])
def test_useless_ground_truth_is_refused(grader, ground_truth):
    with pytest.raises(UserError, match=r"^ground_truth"):
        grade_all(grader, [respond("72")], [ground_truth])


@pytest.mark.parametrize("seconds", [0, -1, float("inf"), float("nan")])
def test_useless_time_limit_is_refused(seconds):
    with pytest.raises(UserError, match="time_limit_seconds"):
        R1ZeroGrader(time_limit_seconds=seconds)


def test_gsm8k_references(gsm8k, started):
    rows = [json.loads(line) for line in (gsm8k / "test.jsonl").read_text(encoding="utf-8").splitlines()]
    records = [R1Zero().render(row) for row in rows]
    truths = [record["ground_truth"] for record in records]
    references = [record["response"] for record in records]
    changed = [
        response.replace(f"<answer> {truth} </answer>", f"<answer> {int(truth) + 1} </answer>")
        for response, truth in zip(references, truths, strict=True)
    ]
    unclosed = [response.removesuffix("</answer>") for response in references]

    def counts(grader, responses):
        grades = grade_all(grader, responses, truths)
        assert len(grades) == 1319
        strict = sum(grade.strict_format_correct is True for grade in grades)
        return sum(grade.format_correct for grade in grades), strict, sum(grade.answer_correct for grade in grades)

    before = time.process_time()
    assert counts(R1ZeroGrader(), references) == (1319, 1319, 1319)
    assert time.process_time() - before < 5
    assert counts(R1ZeroGrader(), changed) == (1319, 1319, 0)
    assert counts(R1ZeroGrader(), unclosed) == (0, 0, 1319)
    assert counts(Gsm8kGrader(), [row["answer"] for row in rows]) == (1319, 0, 1319)
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


def test_a_crash_counts_as_wrong_and_is_reported_separately(tmp_path, monkeypatch, started):
    program = tmp_path / "crashing.py"
    program.write_text("import os\nprint('ready', flush=True)\ninput()\nos.abort()\n")
    monkeypatch.setattr(math_processes, "_PROGRAM", program)
    expected = Grade(format_correct=True, answer_correct=False, failure="crashed", strict_format_correct=True)
    assert grade_all(R1ZeroGrader(), [respond("1/2")] * 2, ["0.5"] * 2) == [expected] * 2
    assert all(process.returncode is not None for process in started)


def test_a_process_start_failure_is_not_a_wrong_answer(tmp_path, monkeypatch, started):
    program = tmp_path / "absent.py"
    monkeypatch.setattr(math_processes, "_PROGRAM", program)
    with pytest.raises(UserError, match=r"R1ZeroGrader failed on row 0: .*absent\.py"):
        grade_all(R1ZeroGrader(), [respond("1/2")], ["0.5"])
    assert all(process.returncode is not None for process in started)


def test_grade_all_wants_a_ground_truth_for_each_response():
    with pytest.raises(UserError, match="2 responses and 1 ground_truths"):
        grade_all(R1ZeroGrader(), ["a", "b"], ["72"])


def test_grade_all_of_nothing():
    assert grade_all(R1ZeroGrader(), [], []) == []


def test_a_grader_that_bounds_itself_stays_in_this_process():
    graded = []

    class Remembers:
        bounds_itself = True

        def grade(self, response, ground_truth):
            graded.append(response)
            return Grade(format_correct=True, answer_correct=len(response) == ground_truth)

    grades = grade_all(Remembers(), ["a", "ab"], [2, 2])
    assert [grade.answer_correct for grade in grades] == [False, True]
    assert sorted(graded) == ["a", "ab"]


def test_graders_are_named_by_class_or_import_path(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "named_graders.py").write_text(
        "class Mine:\n    def grade(self, response, ground_truth): ...\n"
        "class Wants:\n    def __init__(self, rubric): ...\n    def grade(self, response, ground_truth): ...\n"
        "class Other: ...\n"
    )
    assert isinstance(grader_named("Gsm8kGrader"), Gsm8kGrader)
    assert type(grader_named("named_graders.Mine")).__name__ == "Mine"
    assert grader_named("AnswerGrader", units="ignore").units == "ignore"
    with pytest.raises(UserError, match=r"^grader 'Gsm8kGrader' cannot be created: .*takes no arguments$"):
        grader_named("Gsm8kGrader", units="ignore")
    for name, reason in [
        ("Gsm9kGrader", "has no attribute 'Gsm9kGrader'"),
        ("absent_graders.Mine", "No module named 'absent_graders'"),
        ("named_graders.Wants", "missing 1 required positional argument: 'rubric'"),
        ("named_graders.Other", "has no method grade"),
    ]:
        with pytest.raises(UserError, match=rf"^grader '{name}' .*{reason}"):
            grader_named(name)


def test_random_answers_never_break_the_grader():
    letters = [*"0123456789.,+-*/^()[]{}=<>!%$ x\\_|&'\n", r"\frac", r"\sqrt", r"\pm", r"\boxed{", "</answer>"]
    dice = random.Random(0)
    answers = ["".join(dice.choices(letters, k=dice.randint(1, 12))) for _ in range(1000)]
    grades = grade_all(R1ZeroGrader(0.5), [respond(answer) for answer in answers], ["12345.678"] * 1000)
    assert not any(grade.answer_correct for grade in grades)


plain_numbers = st.from_regex(r"[+-]?[0-9]{1,6}(\.[0-9]{0,3})?%?", fullmatch=True)


@settings(deadline=None)  # the first answer for math-verify waits for its process
@given(plain_numbers, plain_numbers)
def test_plain_numbers_are_equal_as_python_compares_them(one, other):
    is_equal = Decimal(one.rstrip("%")) == Decimal(other.rstrip("%"))
    assert R1ZeroGrader().grade(respond(one), other).answer_correct is is_equal
    assert R1ZeroGrader().grade(respond(other), one).answer_correct is is_equal
    assert Gsm8kGrader().grade(f"#### {one}", other).answer_correct is is_equal


@settings(deadline=None)  # the first answer for math-verify waits for its process
@given(st.text())
def test_any_text_can_be_graded(text):
    for grader in (R1ZeroGrader(), AnswerGrader(), Gsm8kGrader(), ExactMatchGrader()):
        for response in (text, respond(text)):
            assert not grader.grade(response, "12345.678").answer_correct or "12345" in text


@pytest.mark.parametrize(
    ("grader", "response", "answer"),
    [
        (R1ZeroGrader(), " so </think> <answer> $1,234 </answer>", "$1,234"),
        (R1ZeroGrader(), "no tag: 7", None),
        (AnswerGrader(), r"it is \boxed{7}", "7"),
        (Gsm8kGrader(), "6 and 7 #### 13 eggs", "13"),
        (Gsm8kGrader(), "none", None),
        (ExactMatchGrader(), " Yes\n", "Yes"),
    ],
)
def test_a_grade_names_the_extracted_answer(grader, response, answer):
    assert grader.grade(response, 7).answer == answer
