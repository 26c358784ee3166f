import time

import numpy as np
import pytest

from sft_lightning.errors import UserError
from sft_lightning.grading.math_equality import (
    accepted_answers,
    extract_answer,
    is_plain_number,
    last_number,
    same_text,
    stated_number,
    structures,
    unbox,
)

# response, answer
EXTRACTED = [
    ("t </think> <answer> 72 </answer>", "72"),
    ("t </think> <answer>72</answer>\n", "72"),
    ("<answer>72", "72"),
    ("<answer> 72 </answer></answer>", "72"),
    ("<answer> 71 </answer> no <answer> 72 </answer>", "72"),
    ("<answer> <answer> 72 </answer>", "72"),
    ("<answer> 72 </answer> is what I say", "72  is what I say"),
    ("<answer> 72 </Answer>", "72 </Answer>"),
    ("<answer></answer>", ""),
    ("72", ""),
    ("", ""),
    ("72 </answer>", ""),
    ("< answer> 72 </answer>", ""),
    (r"\boxed{72}", ""),
    (r"\boxed{71} <answer> 72 </answer>", "72"),
    (r"<answer> \boxed{72} </answer>", "72"),
    (r"<answer> so it is \boxed{ 72 } apples </answer>", "72"),
    (r"<answer> \boxed{71} no, \boxed{72} </answer>", "72"),
    (r"<answer> \boxed{\boxed{72}} </answer>", "72"),
    (r"<answer> $\boxed{\frac{1}{2}}$ </answer>", r"\frac{1}{2}"),
    (r"<answer> \boxed{} </answer>", ""),
    (r"<answer> \boxed{\{1, 2\}} </answer>", r"\{1, 2\}"),
    (r"<answer> \boxed{72\}73} </answer>", r"72\}73"),
    (r"<answer> \boxed{72 </answer>", r"\boxed{72"),
    (r"<answer> \boxed{\frac{1}{2} </answer>", r"\boxed{\frac{1}{2}"),
]


@pytest.mark.parametrize(("response", "answer"), EXTRACTED)
def test_extract_answer(response, answer):
    assert extract_answer(response) == answer


# answer, ground truth, whether their texts are equal
BY_TEXT = [
    # text
    ("72", "72", True),
    ("73", "72", False),
    ("", "72", False),
    (" . ", "72", False),
    ("Paris", "paris", True),
    (r"\text{Paris}", "Paris", True),
    ("Paris.", "Paris", True),
    ("in  the\nmorning", "in the morning", True),
    ("Rome", "Paris", False),
    ("apple, pear", "pear, apple", False),
    # one plain number
    ("72.", "72", True),
    ("072", "72", True),
    ("72.00", "72", True),
    ("+72", "72", True),
    ("-72", "72", False),
    ("-72", "-72", True),
    ("\u221272", "-72", True),
    ("- 72", "-72", True),
    ("-0", "0", True),
    ("0", "-0.0", True),
    (".5", "0.5", True),
    ("1e3", "1000", True),
    ("5.", "5", True),
    ("0.50", ".5", True),
    ("72.0000001", "72", False),
    ("9" * 400 + ".0", "9" * 400, True),
    ("9" * 400, "9" * 399 + "8", False),
    ("\u0667\u0662", "72", False),  # other scripts' digits
    ("\uff17\uff12", "72", False),
    # separators
    ("1,234", "1234", True),
    ("1,234,567.80", "1234567.8", True),
    ("1 234 567", "1234567", True),
    ("1\u202f234", "1234", True),
    (r"1{,}234", "1234", True),
    (r"1\,234", "1234", True),
    ("12,34", "1234", False),
    ("1,23", "1.23", False),
    ("1,2,3", "123", False),
    ("1.234.567", "1234567", False),
    # a currency sign and a percent sign
    ("$72", "72", True),
    ("72$", "72", True),
    ("$72$", "72", True),
    ("$\n72\n$", "72", True),
    ("$$72$$", "72", True),
    (r"\[72\]", "72", True),
    (r"\$72", "72", True),
    ("$-72", "-72", True),
    ("-$1,000.50", "-1000.5", True),
    ("-$-72", "72", False),
    ("\u20ac72", "72", True),
    ("72 \u20ac", "72", True),
    ("$72", "\u20ac72", True),
    ("$$72", "72", False),
    ("$72 $5", "72", False),
    ("72%", "72", True),
    (r"72\%", "72", True),
    ("72 %", "72%", True),
    ("0.72", "72%", False),
    ("72%", "0.72", False),
    ("72%%", "72", False),
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
    ("0 kg", "0", False),
    ("is 0", "0", False),
    ("0 or 72", "0", False),
    ("about 72", "72", False),
    ("The answer is 72", "72", False),
    ("72 or 73", "72", False),
    ("72 (exactly)", "72", False),
    ("73 72", "72", False),
    ("70 2", "72", False),
    ("70{2}", "72", False),
    ("{70}2", "72", False),
    (r"72\ 73", "72", False),
    # letters, lists and statements that the truth has not
    ("B", "C", False),
    ("0x", "0", False),
    ("x + 1", "y + 1", False),
    ("72, 73", "72", False),
    ("72, 72", "72", False),
    ("73 = 72", "72", False),
    ("6 * 12 = 72", "72", False),
    ("72 = x", "72", False),
    ("x + 1 = 5", "5", False),
    ("72 < 73", "72", False),
    (r"\{72\}", "72", False),
    (r"72 \pm 0", "72", False),
    (r"72^\circ", "72", False),
    # no expression
    ("~72", "72", False),
    ("7\\left2", "72", False),
    ("0,072", "72", False),
    (r"0 \mu", "0", False),
    ("(0)72", "72", False),
    ("70 [2]", "72", False),
    ("72_3", "72", False),
    ("72'", "72", False),
    ("72)", "72", False),
    ("(72]]", "72", False),
    (r"72 \\ 73", "72", False),
    (r"72_2 8", "3", False),
    (r"\input{/etc/passwd}", "72", False),
    ("__import__('os')._exit(0)", "72", False),
]


@pytest.mark.parametrize(("answer", "truth", "is_same"), BY_TEXT)
def test_same_text(answer, truth, is_same):
    assert same_text(answer, truth) is is_same


# answer, ground truth, both as mathematics reads them
BY_MATHEMATICS = [
    ("1/2", "0.5", ("1/2", "0.5")),
    ("0.33.", "1/3", ("0.33", "1/3")),
    ("--72", "72", ("--72", "72")),
    ("-1/2", "\u22120.5", ("-1/2", "-0.5")),
    ("$1/2", "50%", ("1/2", "50")),
    (r"\dfrac12", r"$0.5$", (r"\frac{1}{2}", "0.5")),
    (r"$\tfrac{3}{4}$", "0.75", (r"\frac{3}{4}", "0.75")),
    (r"\(\frac{3}{4}\)", "3/4", (r"\frac{3}{4}", "3/4")),
    (r"\left(3, \frac{\pi}{2}\right)", r"(3,\pi/2)", (["()", "3", r"\frac{\pi}{2}"], ["()", "3", r"\pi/2"])),
    ("\u03c0", r"2\pi", (r"\pi", r"2\pi")),
    ("sqrt(12)", r"2\sqrt{3}", ("sqrt(12)", r"2\sqrt{3}")),
    ("e^0", "1", ("e^0", "1")),
    ("x = 5", "4", ("5", "4")),
    ("10/2", "x=5", ("10/2", "5")),
    ("x^2 + 2x", "(x+1)^2", ("x^2 + 2x", "(x+1)^2")),
    ("2xy", "2yx", ("2xy", "2yx")),
    ("[1, 2)", "[1,2)", (["[)", "1", "2"], ["[)", "1", "2"])),
    (r"\{1, 2\}", r"\{2, 1\}", (["set", "1", "2"], ["set", "2", "1"])),
    (r"5 \geq x", "x <= 5", (["in", "x", ["(]", r"-\infty", "5"]],) * 2),
    ("(B)", "B", ("B", "B")),
    ("6(12)", "72", (r"6 \cdot (12)", "72")),
    (r"\frac{1}{2} \frac{3}{4}", "3/8", (r"\frac{1}{2} \cdot \frac{3}{4}", "3/8")),
    (r"70\frac{2}{1}", "72", (r"70 \cdot \frac{2}{1}", "72")),
    (r"(70)\frac{2}{1}", "72", (r"(70) \cdot \frac{2}{1}", "72")),
    (r"\frac{2}{1}(70)", "72", (r"\frac{2}{1} \cdot (70)", "72")),
    (r"72 \frac12", "72.5", (r"\frac{145}{2}", "72.5")),
    (r"\sin^2(x)", r"\sin^{2}(x)", (r"\sin^2(x)", r"\sin^{2}(x)")),
    (r"\frac{1,000}{2}", "500", (r"\frac{1000}{2}", "500")),
    ("1,234 + 1", "1235", ("1234 + 1", "1235")),
    ("(1, 234)", "(1,234)", (["()", "1", "234"],) * 2),
    (r"\{1, 234\}", r"\{1,234\}", (["set", "1", "234"],) * 2),
    ("7\u00b2", "72", ("7^2", "72")),
    (r"\alpha + 1", r"1 + \alpha", (r"\alpha + 1", r"1 + \alpha")),
]


@pytest.mark.parametrize(("answer", "truth", "pair"), BY_MATHEMATICS)
def test_math_verify_decides_what_text_comparison_cannot(answer, truth, pair):
    assert same_text(answer, truth) is None
    assert structures(answer, truth) == pair


def test_an_expression_may_have_500_characters():
    assert same_text("1+" * 249 + "12", "72") is None
    assert same_text("1+" * 249 + "123", "72") is False


def test_an_expression_may_have_10_brackets_in_one_another():
    assert same_text("(" * 10 + "144/2" + ")" * 10, "72") is None
    assert same_text("(" * 11 + "144/2" + ")" * 11, "72") is False
    assert same_text("()" * 10 + "+72", "72") is None
    assert same_text("|" * 20 + "72", "72") is None
    assert same_text("|" * 21 + "72", "72") is False


# text, last number
LAST_NUMBERS = [
    ("72", "72"),
    ("9 - 4 = 5", "5"),
    ("9-4", "4"),
    ("is -4.", "-4"),
    ("\u22127", "-7"),
    ("-$4 or $-5", "-5"),
    ("$1,234.50!", "$1,234.50"),
    ("1,2345", "2345"),
    ("GSM8K and x72", None),
    ("72kg", "72"),
    (".5 or 5.", "5"),
    ("1/2", "2"),
    ("none", None),
    ("", None),
]


@pytest.mark.parametrize(("text", "number"), LAST_NUMBERS)
def test_last_number(text, number):
    assert last_number(text) == number


# text, the number that it states
STATED_NUMBERS = [
    ("72", "72"),
    (" $1,234.50!", "$1,234.50"),
    ("-$4 or $-5", "-$4"),
    ("\u22127", "-7"),
    (".5 or 5.", ".5"),
    ("1,2345", "1"),
    ("72 eggs, not 73", "72"),
    ("72 - so I think", "72"),
    ("\n\n72\n6 = 6", "72"),
    ("6 x 7 = 42", "42"),
    ("6 boxes * $7 = $42 (40 + 2)", "$42"),
    ("42 = 6 \u00d7 7", "42"),
    ("3 = 1 + 1 + 1 = 3", "3"),
    ("x = 42", "42"),
    ("6 x 7", None),
    ("1/2", None),
    ("9-4", None),
    ("GSM8K and x72", None),
    ("", None),
]


@pytest.mark.parametrize(("text", "number"), STATED_NUMBERS)
def test_stated_number(text, number):
    assert stated_number(text) == number


@pytest.mark.parametrize(("text", "is_plain"), [("-$1,234.50", True), ("72%", True), ("72 kg", False), ("1/2", False)])
def test_is_plain_number(text, is_plain):
    assert is_plain_number(text) is is_plain


def test_unbox_takes_all_of_a_text_without_a_box():
    assert unbox(r" so \boxed{1} and \boxed{2} ") == "2"
    assert unbox(" 72 ") == "72"


# ground truth, texts
ACCEPTED = [
    ("72", ["72"]),
    (" 72 ", [" 72 "]),
    (72, ["72"]),
    (-3, ["-3"]),
    (0, ["0"]),
    (18.0, ["18.0"]),
    (0.1, ["0.1"]),
    (np.float64(0.1), ["0.1"]),
    (True, ["True"]),
    (1e20, ["100000000000000000000"]),
    (1e-5, ["0.00001"]),
    (["71", 72, 0.5], ["71", "72", "0.5"]),
    (("a",), ["a"]),
]


@pytest.mark.parametrize(("ground_truth", "texts"), ACCEPTED)
def test_accepted_answers(ground_truth, texts):
    assert accepted_answers(ground_truth) == texts


@pytest.mark.parametrize(
    "ground_truth", [None, "", " \n", [], {"a": 1}, [None], [["72"]], ["72", ""], b"72", float("nan"), float("inf")]
)
def test_a_useless_ground_truth_is_refused_in_one_line(ground_truth):
    with pytest.raises(
        UserError, match=r"^ground_truth .* must be a text, a number or a list of those, and not empty$"
    ):
        accepted_answers(ground_truth)


HOSTILE = [
    "9" * 1_000_000,
    "1," * 500_000,
    "1,000" * 200_000,
    "1 000" * 200_000,
    "1,000," + "000," * 250_000,
    " " * 1_000_000 + "y",
    "7" + " " * 1_000_000 + "2",
    "-" * 1_000_000,
    "." * 1_000_000,
    "(" * 1_000_000,
    "{" * 500_000 + "}" * 500_000,
    r"\boxed{" * 150_000,
    r"\text{" * 150_000,
    r"\text {" + "a" * 1_000_000,
    r"\left" * 200_000,
    "}{" * 10_000,
    "$" * 100_001,
    "x=" * 500_000,
    "<answer>" * 100_000,
    "</answer>" * 100_000,
    "\x00\x01\x1b[31m72\x7f",
    "72\x00",
    "\ud800",
    "\u202e27",
    "x" * 500,
]


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_text_is_wrong_at_once(text):
    before = time.process_time()
    answer = extract_answer(f"t </think> <answer> {text} </answer>")
    assert same_text(answer, "72") is False
    assert time.process_time() - before < 2  # anything quadratic would take minutes
