import pytest

from sft_lightning.grading.structure import read_pair

OPEN = ["()", "1", "2"]
MATRIX = ["matrix", ["row", "1", "2"], ["row", "3", "4"]]

# text, its structure
STRUCTURES = [
    ("1/2", "1/2"),
    ("((1/2))", "1/2"),
    ("1, 2", ["list", "1", "2"]),
    ("$1$, $2$", ["list", "1", "2"]),
    (r"\{1, 2\}", ["set", "1", "2"]),
    (r"\{1\}", ["set", "1"]),
    ("(1, 2)", OPEN),
    ("(1, 2]", ["(]", "1", "2"]),
    ("[1, 2)", ["[)", "1", "2"]),
    ("[1, 2]", ["[]", "1", "2"]),
    ("(1, (1, 2))", ["()", "1", OPEN]),
    (r"\{(1, 2), (3, 4)\}", ["set", OPEN, ["()", "3", "4"]]),
    ("(1, 2), (3, 4)", ["list", OPEN, ["()", "3", "4"]]),
    ("(1)(2)", r"(1) \cdot (2)"),
    (r"(1, 2) \cup (3, 4]", ["union", OPEN, ["(]", "3", "4"]]),
    ("[[1, 2], [3, 4]]", MATRIX),
    (r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}", MATRIX),
    (r"\begin{bmatrix}1&2\\[4pt]3&4\\\end{bmatrix}", MATRIX),
    (r"[\begin{array}{cc} 1 & 2 \\ 3 & 4 \end{array}]", MATRIX),
    (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", ["matrix", ["row", "1"], ["row", "2"]]),
    ("2 > x > 1", ["in", "x", OPEN]),
    (r"1 < x \le 2", ["in", "x", ["(]", "1", "2"]]),
    (r"x \ge 2", ["in", "x", ["[)", "2", r"\infty"]]),
    (r"2 \ge x", ["in", "x", ["(]", r"-\infty", "2"]]),
    ("4 > 2x > 2", "2 < 2x < 4"),
    ("x < y", "x < y"),
    ("1 < x > 2", "1 < x > 2"),
    (r"1 \pm \sqrt{2}", ["list", r"1 + \sqrt{2}", r"1 - \sqrt{2}"]),
    (r"1 \pm x \mp y", r"1 \pm x \mp y"),
    ("x = 1, x = 2", ["list", "1", "2"]),
    ("x = 1, y = 2", ["list", "x = 1", "y = 2"]),
    ("(x, y) = (1, 2)", OPEN),
    (r"x \in (1, 2)", OPEN),
    ("f(x) = 2x", "2x"),
    ("$1,234 + 1", "1234 + 1"),
    (r"\log_2 8", r"\log_{2}(8)"),
]


@pytest.mark.parametrize(("text", "structure"), STRUCTURES)
def test_structures(text, structure):
    assert read_pair(text, text) == (structure, structure)


# answer, ground truth, of which each alone is an expression
NEVER_EQUAL = [
    ("(1, 2)", "1, 2"),
    ("1, 2", "(1, 2)"),
    ("(1, 2)", r"\{1, 2\}"),
    (r"\{1, 2\}", "1, 2"),
    ("[1, 2]", "1, 2"),
    ("[1, 2]", "(1, 2)"),
    (r"[0, \infty]", r"[0, \infty)"),
    ("(1, 2, 3)", "(1, 2)"),
    ("1, 1, 2", "1, 2"),
    ("1, 2", "1"),
    (r"\pm 1", "1"),
    ("((1, 2), 3)", "(1, (2, 3))"),
    (r"\begin{pmatrix} 1 & 2 \end{pmatrix}", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}"),
    (r"\begin{pmatrix} 1 & 2 \end{pmatrix}", "(1, 2)"),
    ("x + 1", "y + 1"),
    ("1 = 2", "2"),
    ("x < y", "x"),
    (r"90^\circ", "90"),
]


@pytest.mark.parametrize(("answer", "truth"), NEVER_EQUAL)
def test_structures_that_cannot_be_equal(answer, truth):
    assert read_pair(answer, answer) is not None
    assert read_pair(answer, truth) is None


def test_a_name_or_a_variable_may_be_left_out():
    assert read_pair("5", "x = 5") == read_pair("x = 5", "5") == ("5", "5")
    assert read_pair("(1, 2)", "1 < x < 2") == read_pair("1 < x < 2", "(1, 2)") == (OPEN, OPEN)
    assert read_pair("x = 1", "x + 1 = 2") == ("x = 1", "x + 1 = 2")
    assert read_pair("1 < y < 2", "1 < x < 2") is None


def test_a_list_may_stand_for_a_set():
    assert read_pair("1, 1, 2", r"\{1, 2\}") == (["list", "1", "1", "2"], ["set", "1", "2"])


@pytest.mark.parametrize(
    "text",
    ["", ",", "1,", "(1", "1)", "(1, 2}", "[1, 2", r"\{1, 2)", "73 72", "(0)72", "1 & 2", r"\\", "72_3", "abc",
     r"\begin{vmatrix} 1 & 2 \\ 3 & 4 \end{vmatrix}", r"\begin{pmatrix} 1 & & \end{pmatrix}", r"\cup 1",
     "(" * 11 + "1" + ")" * 11, "1+" * 250 + "1"],
)  # fmt: skip
def test_no_structure(text):
    assert read_pair(text, text) is None
