"""Test answers written to break a grader: each is graded or given up, and memory stays flat."""

import gc
import itertools
import random
import time
from pathlib import Path

import pytest

from sft_lightning.grading import graders as grading
from sft_lightning.grading import math_processes
from sft_lightning.grading.graders import AnswerGrader, ExactMatchGrader, Grade, Gsm8kGrader, R1ZeroGrader, grade_all

# What our own patterns, the two parsers and the tags are made of.
SOUP = [*"0123456789.,+-*/^()[]{}=<>!|%$ xyzabce", r"\frac", r"\frac{1}{2}", r"\sqrt", r"\pi", r"\cdot ", r"\boxed{"]
BAITS = [
    *(
        "9",
        " ",
        "-",
        ".",
        "$",
        "%",
        "~",
        "(",
        "{",
        "}{",
        "[",
        "|",
        "!",
        "\\",
        "_",
        "'",
        "#",
        "<",
        "\n",
        "\x00",
        "\u00a0",
    ),
    *("1,", "1,000", ",000", "1 000", "1 ", "1.", "-1", "a1", "x=", "x =", "=", "+1", "1/", "^9", "####", "####1"),
    *(
        r"\text{",
        r"\text {a",
        r"\mathrm{}",
        r"\left",
        r"\left(",
        r"\!",
        r"\,",
        r"\$",
        r"{,}",
        r"\dfrac",
        r"\boxed{",
        r"\}",
    ),
    *(
        "<answer>",
        "</answer>",
        "</think> <answer>",
        "<think>",
        "</think>",
        "<answer",
        "\u0301",
        "\ud800",
        "\uff17",
        "\u202e",
    ),
]
# Texts that take sympy or math-verify longer than anyone waits.
TOWERS = ["9^9^9^9", "9^{9^{9^{9}}}", "72!!", "((9!)!)!", "10^{10^{10}}!", "2^{3^{4^{5^{6}}}}", r"\sqrt{7^{7^{7^{7}}}}"]


def nested(dice):
    opening, closing = dice.choice(
        ["()", "[]", "{}", ("\\{", "\\}"), ("\\frac{1}{", "}"), ("\\sqrt{", "}"), ("|", "|")]
    )
    depth = dice.choice([3, 30, 100, 10_000])
    return opening * depth + "72" + closing * (depth - dice.choice([0, 0, 1]))


def long(dice):
    bait = dice.choice(BAITS)
    return dice.choice(["", "7", "x"]) + bait * (1_000_000 // len(bait)) + dice.choice(["", "!", "2", "}", "y"])


def repeated(dice):
    return (
        dice.choice(["", "7", "$", "-"]) + dice.choice(BAITS) * dice.randint(1, 400) + dice.choice(["", "!", "2", "y"])
    )


def unbalanced(dice):
    return "".join(dice.choices([*"{}[]()|72", "\\{", "\\}"], k=dice.randint(1, 60)))


def tower(dice):
    return dice.choice(TOWERS).replace("9", str(dice.randint(7, 9)))


def huge_number(dice):
    digits = "".join(dice.choices("0123456789", k=dice.choice([50, 400, 20_000])))
    return dice.choice(["{}", "0.{}", "1e{}", "-{}.5", "{}/7", "10^{{{}}}", "{}%"]).format(digits)


def maze(dice):
    return "".join(
        dice.choices([r"\boxed{", r"\boxed {", r"\fbox{", "}", "72", r"\{", r"\}", "$", " "], k=dice.randint(1, 80))
    )


def control_characters(dice):
    return "".join(dice.choices([*map(chr, range(32)), *map(chr, range(127, 160)), "72"], k=dice.randint(1, 60)))


def strange_characters(dice):
    anything = [chr(dice.randrange(0x110000)) for _ in range(20)]  # surrogates too
    known = [
        *"\u202e\u200f\u2066\u0301\u0489\ufeff\u00bd\u00b2\uff17\uff12\uff0c\u0667\u0662\u2212\u221e",
        "\ud800",
        "72",
    ]
    return "".join(dice.choices([*anything, *known], k=dice.randint(1, 80)))


def tags(dice):
    return "".join(dice.choices(["<answer>", "</answer>", "</think>", "<think>", " ", "72", "</think> <answer>"], k=40))


def soup(dice):
    return "".join(dice.choices(SOUP, k=dice.randint(1, 20)))


def expression(dice):
    """Returns an answer that is likely to reach math-verify."""
    parts = ["x", "72", "0.5", r"\frac{y}{3}", "(z-1)", r"\sqrt{2}", "a^2", r"\pi", "e", "3!", r"\sin(x)", "[1,2]"]
    return dice.choice([" + ", " - ", r" \cdot ", "/", "", " = ", ", ", "^"]).join(
        dice.choices(parts, k=dice.randint(1, 7))
    )


FAMILIES = {
    nested: 8,
    long: 1,
    repeated: 15,
    unbalanced: 8,
    tower: 1,
    huge_number: 8,
    maze: 8,
    control_characters: 8,
    strange_characters: 8,
    tags: 5,
    soup: 15,
    expression: 15,
}


def hostile_answers(num_answers, seed):
    """Yields texts, some of them of a million characters, the same ones for the same seed."""
    dice = random.Random(seed)
    for family in dice.choices(list(FAMILIES), weights=FAMILIES.values(), k=num_answers):
        yield family(dice)


# The second one has letters, several values and an order: an answer may have them too, and goes to math-verify.
TRUTHS = ["12345.678", "x+y+z+a+b+c=1,2<3"]


def resident_bytes(pid="self"):
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS"))


def grade_in_chunks(num_answers, seed, chunk=250):
    """Yields the grades of one chunk after the other."""
    answers = hostile_answers(num_answers, seed)
    while texts := list(itertools.islice(answers, chunk)):
        responses = [f" t </think> <answer> {text} </answer>" for text in texts]
        truths = [TRUTHS[number % 2] for number in range(len(texts))]
        yield grade_all(R1ZeroGrader(time_limit_seconds=0.5), responses, truths)


def test_a_few_hundred_hostile_answers():
    grades = list(itertools.chain(*grade_in_chunks(300, seed=1)))
    assert len(grades) == 300
    assert not any(grade.answer_correct for grade in grades)
    assert any(grade.timed_out for grade in grades)
    assert {grade.failure for grade in grades} <= {"wrong", "timed_out", "text_after_answer"}


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="reads Linux's /proc")
def test_ten_thousand_hostile_answers_in_flat_memory(monkeypatch):
    # The same processes serve all of them: what they keep would add up.
    monkeypatch.setattr(grading, "close_idle_workers", lambda: None)
    failures: dict[str, int] = {}
    own, workers = {}, {}
    num_graded = 0
    for grades in grade_in_chunks(10_000, seed=0):
        for grade in grades:
            assert isinstance(grade, Grade)
            assert not grade.answer_correct
            failures[grade.failure] = failures.get(grade.failure, 0) + 1
        num_graded += len(grades)
        if num_graded in (2_000, 10_000):
            gc.collect()
            own[num_graded] = resident_bytes()
            workers[num_graded] = max(resident_bytes(one._process.pid) for one in math_processes._idle_workers)
    print(num_graded, failures, {"own": own, "workers": workers})
    assert num_graded == 10_000
    assert failures.keys() <= {"wrong", "timed_out", "text_after_answer"}
    assert failures["timed_out"] > 0
    assert own[10_000] - own[2_000] < 40 * 1024**2
    assert max(workers.values()) < 300 * 1024**2
    assert workers[10_000] - workers[2_000] < 80 * 1024**2


@pytest.mark.parametrize("grader", [R1ZeroGrader(0.5), AnswerGrader(0.5), Gsm8kGrader(), ExactMatchGrader()])
def test_the_time_for_a_long_answer_grows_with_its_length(grader):
    for bait in BAITS:
        text = "</think> <answer> 7" + bait * (100_000 // len(bait)) + "!"
        before = time.process_time()
        assert not grader.grade(text, "12345.678").answer_correct
        assert time.process_time() - before < 1, bait  # anything quadratic would take minutes
