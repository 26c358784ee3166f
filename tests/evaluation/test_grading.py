import json
import os
import random
import subprocess
import sys
import textwrap
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


@pytest.fixture(scope="module", autouse=True)
def _no_worker_survives():
    yield
    grading_pool.close_idle_workers()


@pytest.fixture
def started(monkeypatch):
    """The grading processes that a test starts."""
    grading_pool.close_idle_workers()
    processes = []

    class Recorded(subprocess.Popen):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            processes.append(self)

    monkeypatch.setattr(subprocess, "Popen", Recorded)
    yield processes
    grading_pool.close_idle_workers()


def respond(answer):
    return f" some thought </think> <answer> {answer} </answer>"


# answer, ground truth, whether it is right
ANSWERS = [
    # text
    ("72", "72", True),
    ("73", "72", False),
    ("", "72", False),
    ("Paris", "paris", True),
    (r"\text{Paris}", "Paris", True),
    ("Paris.", "Paris", True),
    ("in  the\nmorning", "in the morning", True),
    ("Rome", "Paris", False),
    ("B", "C", False),
    ("(B)", "B", True),
    # one plain number
    ("72.", "72", True),
    ("072", "72", True),
    ("72.00", "72", True),
    ("+72", "72", True),
    ("-72", "72", False),
    ("-72", "-72", True),
    ("\u221272", "-72", True),
    ("-0", "0", True),
    (".5", "0.5", True),
    ("0.50", ".5", True),
    ("1,234", "1234", True),
    ("1,234,567.80", "1234567.8", True),
    ("1 234 567", "1234567", True),
    (r"1{,}234", "1234", True),
    (r"1\,234", "1234", True),
    ("12,34", "1234", False),
    ("1,23", "1.23", False),
    ("1,2,3", "123", False),
    ("$72", "72", True),
    ("72$", "72", True),
    ("$72$", "72", True),
    ("$\n72\n$", "72", True),
    (r"\$72", "72", True),
    ("$-72", "-72", True),
    ("-$1,000.50", "-1000.5", True),
    ("\u20ac72", "72", True),
    ("$$72", "72", False),
    ("$72 $5", "72", False),
    ("72%", "72", True),
    (r"72\%", "72", True),
    ("72 %", "72%", True),
    ("0.72", "72%", False),
    ("72%", "0.72", False),
    ("72%%", "72", False),
    ("72.0000001", "72", False),
    ("1e3", "1000", False),
    ("7\u00b2", "72", False),
    ("\u0667\u0662", "72", False),
    ("9" * 400 + ".0", "9" * 400, True),
    ("9" * 400, "9" * 399 + "8", False),
    # other words and numbers beside it
    ("72 apples", "72", False),
    ("72 apples", "72 apples", True),
    ("1,000 Apples", "1000 apples", True),
    ("73 apples", "72 apples", False),
    ("72", "72 apples", False),
    ("72 dollars", "72", False),
    ("72 percent", "72", False),
    (r"72 \text{ cm}", "72", False),
    ("72 kg", "72", False),
    ("about 72", "72", False),
    ("The answer is 72", "72", False),
    ("73 72", "72", False),
    ("70 2", "72", False),
    ("70{2}", "72", False),
    (r"72\ 73", "72", False),
    ("72 or 73", "72", False),
    ("72, 73", "72", False),
    ("72, 72", "72", False),
    ("73 = 72", "72", False),
    ("6 * 12 = 72", "72", False),
    ("72 (exactly)", "72", False),
    # mathematics, where the whole answer is one expression
    ("1/2", "0.5", True),
    ("0.5", "1/2", True),
    ("-1/2", "-0.5", True),
    ("--72", "72", True),
    ("2/4", "1/2", True),
    ("1/3", "0.5", False),
    ("0.33", "1/3", False),
    (r"\frac{1}{2}", "0.5", True),
    (r"\dfrac12", r"\frac{1}{2}", True),
    (r"$\tfrac{3}{4}$", "0.75", True),
    (r"\(\frac{3}{4}\)", "3/4", True),
    (r"72\frac{1}{2}", "72.5", True),
    (r"2\sqrt{3}", r"\sqrt{12}", True),
    ("sqrt(12)", r"2\sqrt{3}", True),
    (r"2\sqrt{3}", r"\sqrt{13}", False),
    (r"\sqrt[3]{8}", "2", True),
    ("2^{10}", "1024", True),
    (r"6 \times 12", "72", True),
    ("\u03c0", r"\pi", True),
    ("x^2 + 2x + 1", "(x+1)^2", True),
    ("x^2 + 2x", "(x+1)^2", False),
    ("x = 5", "5", True),
    ("5", "x=5", True),
    ("x + 1 = 5", "5", False),
    ("2, 1", "1,2", True),
    ("(2, 1)", "(1,2)", False),
    (r"\left(3, \frac{\pi}{2}\right)", r"(3,\pi/2)", True),
    ("[1, 2)", "[1,2)", True),
    (r"\{1, 2\}", r"\{2, 1\}", True),
    (r"\{72\}", "72", False),
    (r"72 \pm 0", "72", False),
    (r"x \leq 5", "x <= 5", True),
    ("72_3", "72", False),
    ("72'", "72", False),
    ("72)", "72", False),
    (r"72 \\ 73", "72", False),
    (r"\frac{72}", "72", False),
    ("72^", "72", False),
    # boxed
    (r"\boxed{72}", "72", True),
    (r"so it is \boxed{72} apples", "72", True),
    (r"\boxed{71} no, \boxed{72}", "72", True),
    (r"\boxed{72} no, \boxed{71}", "72", False),
    (r"\boxed{\boxed{72}}", "72", True),
    (r"$\boxed{\frac{1}{2}}$", "0.5", True),
    (r"\boxed{72", "72", False),
    # ground truths that are no text
    ("72", 72, True),
    ("72.0", 72, True),
    ("73", 72, False),
    ("0.5", 0.5, True),
    ("1/2", 0.5, True),
    ("18", 18.0, True),
    ("100,000,000,000,000,000,000", 1e20, True),
    ("0.00001", 1e-5, True),
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
    grades = grade_all(R1ZeroGrader(0.5), [respond(answer) for answer in answers], ["72"] * 6, num_workers=2)
    assert [grade.answer_correct for grade in grades] == [True, False, True, False, False, True]
    assert [grade.timed_out for grade in grades] == [False, True, False, False, True, False]
    assert [grade.failure for grade in grades] == [None, "timed_out", None, "wrong", "timed_out", None]
    assert len(started) <= 4  # two, and one after each that was killed
    assert all(process.returncode is not None for process in started)


def test_time_limit_is_hard():
    before = time.perf_counter()
    grade = R1ZeroGrader(0.5).grade(respond(TOWER), "72")
    assert grade == Grade(format_correct=True, answer_correct=False, failure="timed_out", timed_out=True)
    assert time.perf_counter() - before < 10


def test_a_later_alternative_can_still_be_right():
    assert R1ZeroGrader(0.5).grade(respond("144/2"), [TOWER, "72"]).answer_correct


def test_a_process_serves_many_answers(started):
    grader = R1ZeroGrader()
    assert [grader.grade(respond(f"{n}/2"), "0.5").answer_correct for n in range(4)] == [False, True, False, False]
    assert len(started) == 1
    grading_pool.close_idle_workers()
    assert started[0].returncode is not None
    assert grader.grade(respond("1/2"), "0.5").answer_correct
    assert len(started) == 2


def test_a_process_that_died_idle_is_replaced(started):
    grader = R1ZeroGrader()
    assert grader.grade(respond("1/2"), "0.5").answer_correct
    started[0].kill()
    started[0].wait()
    assert grader.grade(respond("1/2"), "0.5").answer_correct


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


def test_from_a_script_without_main_guard_beside_torch_threads(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(
        textwrap.dedent("""
        import torch
        torch.set_num_threads(2)
        (torch.randn(300, 300) @ torch.randn(300, 300)).sum()
        print("script runs")
        from sft_lightning import R1ZeroGrader
        print(R1ZeroGrader().grade("</think> <answer> 1/2 </answer>", "0.5").reward)
        """)
    )
    # Modules of these names in the user's own folder must not reach the grading process.
    (tmp_path / "sympy.py").write_text("raise SystemExit('the wrong sympy')\n")
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(
        [sys.executable, str(script)], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.stdout == "script runs\n1.0\n", done.stderr
    assert done.stderr == ""


HOSTILE = [
    "9" * 1_000_000,
    "1," * 500_000,
    "1 000" * 200_000,
    " " * 1_000_000 + "x",
    "-" * 1_000_000,
    "(" * 1_000_000,
    "{" * 500_000 + "}" * 500_000,
    r"\boxed{" * 150_000,
    r"\text{" * 150_000,
    r"\frac{1}{" * 40 + "2" + "}" * 40,
    "(" * 200 + "1" + ")" * 200,
    "}{" * 10_000,
    "$" * 100_001,
    "<answer>" * 100_000,
    "</answer>" * 100_000,
    "\x00\x01\x1b[31m72\x7f",
    "72\x00",
    "\ud800",
    "\u202e27",
    "10^{10^{10}}!",
    "__import__('os')._exit(0)",
    r"\input{/etc/passwd}",
    "1/0",
    "0/0",
    r"\infty - \infty",
    "x" * 500,
    "+".join("xyz" * 80),
]


def test_hostile_answers():
    before = time.perf_counter()
    grades = grade_all(R1ZeroGrader(0.5), [respond(answer) for answer in HOSTILE], ["72"] * len(HOSTILE))
    assert [grade.answer_correct for grade in grades] == [False] * len(HOSTILE)
    assert time.perf_counter() - before < 30


def test_random_answers_never_break_the_grader():
    letters = [*"0123456789.,+-*/^()[]{}=<>!%$ x\\_|&'\n", r"\frac", r"\sqrt", r"\pm", r"\boxed{", "</answer>"]
    dice = random.Random(0)
    answers = ["".join(dice.choices(letters, k=dice.randint(1, 12))) for _ in range(1000)]
    grades = grade_all(R1ZeroGrader(0.5), [respond(answer) for answer in answers], ["12345.678"] * 1000)
    assert not any(grade.answer_correct for grade in grades)
