import time

import pytest

from sft_lightning.grading.notation import normalize, normalize_pair, radians, split_unit, without_delimiters

# text, its one spelling
NORMALIZED = [
    (" $ 72 $. ", "72"),
    ("**72**", "72"),
    ("**$72$**", "72"),
    (r"5\mbox{ cm}", "5 cm"),
    (r"1011_{\text{2}}", "1011_2"),
    # mixed numbers
    ("3 1/4", r"\frac{13}{4}"),
    ("-3 1/4 cups", r"-\frac{13}{4} cups"),
    ("1,234 1/2", r"\frac{2469}{2}"),
    (r"3\frac14", r"\frac{13}{4}"),
    ("3\u00bc", r"\frac{13}{4}"),
    ("3 5/4", "3 5/4"),
    ("x^3 1/4", "x^3 1/4"),
    ("3 1/4/2", "3 1/4/2"),
    ("3, 1/4", "3, 1/4"),
    # powers of ten
    ("1.2e3", "1200"),
    ("-1.2E+3", "-1200"),
    ("1.2e-3 m", "0.0012 m"),
    ("1e-07", "0.0000001"),
    (r"-1.2 \times 10^{-3}", "-0.0012"),
    ("6.02 * 10^23", "602000000000000000000000"),
    (r"1/2 \times 10^3", r"1/2 \times 10^3"),
    (r"2 \cdot 10^3 + 1", r"2 \cdot 10^3 + 1"),
    ("1e999", "1e999"),
    ("2e-3", "2e-3"),
    ("2e", "2e"),
    ("1.5 Million dollars", "1500000 dollars"),
    ("1,5 million", "1,5 million"),
    (r"0.1\overline{6}", r"\frac{15}{90}"),
    # symbols
    ("2pi", r"2\pi"),
    ("pin", "pin"),
    ("2\u221a12", r"2\sqrt{12}"),
    ("\u221a(x)", "sqrt(x)"),
    (r"\frac12", r"\frac{1}{2}"),
    (r"\frac{\pi}3", r"\frac{\pi}{3}"),
    (r"\frac1{3^{40}}", r"\frac{1}{3^{40}}"),
    (r"x\leqslant 2", r"x\le 2"),
    ("x >= 2", r"x \ge 2"),
    ("90\u00b0", r"90^\circ"),
    (r"90^{\circ}", r"90^\circ"),
    ("90 degrees", r"90^\circ"),
    (r"\{ \}", r"\emptyset"),
    ("3 : 4", "3:4"),
    ("7\u00b2", "7^2"),
]


@pytest.mark.parametrize(("text", "spelling"), NORMALIZED)
def test_normalize(text, spelling):
    assert normalize(text) == spelling
    assert normalize(spelling) == spelling


# answer, ground truth, both normalized
PAIRS = [
    ("2e-3", "0.002", ("0.002", "0.002")),
    ("0.002", "2e-3", ("0.002", "0.002")),
    ("2e-3", "-3 + 2e", ("2e-3", "-3 + 2e")),
    ("2e3", "6e", ("2000", "6e")),
]


@pytest.mark.parametrize(("answer", "truth", "pair"), PAIRS)
def test_an_exponent_or_a_sum_with_eulers_number(answer, truth, pair):
    assert normalize_pair(answer, truth) == pair


# text, value, unit
UNITS = [
    ("18 apples", "18", "apples"),
    ("18apples", "18", "apples"),
    ("72 cm^2", "72", "cm^2"),
    ("5 m/s", "5", "m/s"),
    ("5 m", "5", "m"),
    (r"90^\circ", "90", r"^\circ"),
    (r"\frac{13}{4} cups of flour", r"\frac{13}{4}", "cups of flour"),
    ("18 miles per hour", "18", "miles per hour"),
    ("18", "18", ""),
    ("18m", "18m", ""),
    ("18 x", "18 x", ""),
    ("18 xy", "18 xy", ""),
    ("18 thirds", "18 thirds", ""),
    ("18 dozen", "18 dozen", ""),
    ("18 and a half", "18 and a half", ""),
    ("18 or 19", "18 or 19", ""),
    ("about 18 apples", "about 18", "apples"),
    (r"\sin 30^\circ", r"\sin 30^\circ", ""),
]


@pytest.mark.parametrize(("text", "value", "unit"), UNITS)
def test_split_unit(text, value, unit):
    assert split_unit(text) == (value, unit)


def test_functions_take_radians():
    assert radians(r"\sin 70^\circ") == r"\sin (70 \cdot \frac{\pi}{180})"
    assert radians(r"70^\circ") == r"70^\circ"


def test_delimiters_of_an_item():
    assert without_delimiters(" $1$ ") == "1"
    assert without_delimiters("$1$, $2$") == "$1$, $2$"


@pytest.mark.parametrize(
    "text",
    [
        "9" * 500,
        "1,000" * 100,
        "1 " * 250,
        r"\frac{" * 80,
        "{}" * 250,
        "1/2" * 160,
        "a " * 250,
        "9 m" * 160,
        "1e1" * 160,
    ],
)
def test_hostile_texts_are_read_at_once(text):
    before = time.process_time()
    split_unit(normalize(text))
    normalize_pair(text, text)
    assert time.process_time() - before < 0.5
