"""Compare two answers by their text: equal, different, or undecided without mathematics."""

import math
import re
from decimal import Decimal

from sft_lightning.errors import UserError
from sft_lightning.grading.notation import CURRENCY, SAME_CHARACTER, normalize, normalize_pair, split_unit
from sft_lightning.grading.structure import Structure, read_pair

_QUANTITY = re.compile(
    rf"(?P<sign>[+-]?) ?(?P<currency>[{CURRENCY}]?) ?(?P<inner_sign>[+-]?)"
    r"(?P<integer>[1-9][0-9]{0,2}(?:,[0-9]{3})+|[1-9][0-9]{0,2}(?: [0-9]{3})+|[0-9]*)(?:\.(?P<fraction>[0-9]*))?"
    rf" ?(?P<currency_after>[{CURRENCY}]?) ?%? ?(?P<unit>(?:[^\W0-9_][^0-9]*)?)"
)
# Not the digits of a word. A sign belongs to the number unless the number before it makes it a subtraction.
_NUMBER = re.compile(
    rf"(?:(?<![\w)\]}}])[+-])?[{CURRENCY}]?(?:(?<![A-Za-z0-9_])"
    r"(?:[1-9][0-9]{0,2}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|(?<![\w.])\.[0-9]+)"
)
_OPERATION = re.compile(rf" ?(?:[-+*/^\u00d7\u00b7\u00f7]|x |\\\\(?:times|cdot|div)) ?[{CURRENCY}]?[0-9(]")
_BRACES = re.compile(r"\\.|[{}]", re.DOTALL)  # an escaped brace is text


def extract_answer(response: str) -> str:
    r"""Returns the answer of a response.

    It is everything after the last ``<answer>`` without closing tags, or the content of the last ``\boxed{}`` in it;
    empty without ``<answer>``.
    """
    _, tag, answer = response.rpartition("<answer>")
    if not tag:
        return ""
    return unbox(answer.replace("</answer>", ""))


def unbox(text: str) -> str:
    r"""Returns the content of the last ``\boxed{}`` of a text, or the whole text if none is there or closed."""
    _, box, content = text.rpartition(r"\boxed{")
    depth = 1 if box else 0
    for brace in _BRACES.finditer(content if box else ""):
        depth += (brace[0] == "{") - (brace[0] == "}")
        if depth == 0:
            return content[: brace.start()].strip()
    return text.strip()


def accepted_answers(ground_truth: object) -> list[str]:
    """Returns the texts of a ground truth: a str, an int, a float or a list of alternatives.

    Raises:
        UserError: If it is of another type, or empty.
    """
    alternatives = ground_truth if isinstance(ground_truth, list | tuple) else [ground_truth]
    if not alternatives or not all(map(_is_usable, alternatives)):
        raise UserError(f"ground_truth {ground_truth!r} must be a text, a number or a list of those, and not empty")
    # Written without an exponent: 1e+20 is not a plain number.
    return [format(Decimal(repr(float(one))), "f") if isinstance(one, float) else str(one) for one in alternatives]


def _is_usable(truth: object) -> bool:
    if isinstance(truth, float):
        return math.isfinite(truth)
    return isinstance(truth, int) or (isinstance(truth, str) and bool(truth.strip()))


def is_plain_number(truth: str) -> bool:
    """Returns whether a text is one number with at most sign, separators, a currency and a percent sign."""
    quantity = _read_quantity(normalize(truth))
    return quantity is not None and not quantity[1]


def stated_number(text: str) -> str | None:
    """Returns the number that a text states, with its sign and separators; None if there is none.

    It is the first one, in an equation after the last sign of equality. The first number of a calculation is none: then
    the side before counts.
    """
    text = text.translate(SAME_CHARACTER)
    line = next((line for line in text.splitlines() if _NUMBER.search(line)), "")
    for side in reversed(line.split("=")):
        number = _NUMBER.search(side)
        if number and not _OPERATION.match(side, number.end()):
            return number[0]
    return None


def last_number(text: str) -> str | None:
    """Returns the last number in a text, with its sign and separators; None if there is none."""
    last = None
    for number in _NUMBER.finditer(text.translate(SAME_CHARACTER)):
        last = number
    return last[0] if last else None


def same_text(answer: str, truth: str) -> bool | None:
    """Returns whether two answers are equal, or None if only mathematics can decide.

    Texts are equal up to case, spacing and LaTeX markup. Quantities, a number with an optional unit, are equal up to
    separators, one currency sign and one percent sign.
    """
    answer, truth = normalize_pair(answer, truth)
    if not answer:
        return False
    if answer.casefold() == truth.casefold():
        return True
    quantity, true_quantity = _read_quantity(answer), _read_quantity(truth)
    if quantity and true_quantity:
        if quantity == true_quantity:
            return True
        if quantity[1] == true_quantity[1]:
            return False
    return None if _structures(answer, truth) else False


def structures(answer: str, truth: str) -> tuple[Structure, Structure]:
    """Returns both answers as mathematics reads them. Only for pairs on which ``same_text`` returned None."""
    pair = _structures(*normalize_pair(answer, truth))
    assert pair is not None
    return pair


def without_lone_unit(answer: str, truth: str) -> tuple[str, str]:
    """Returns both, where one has a unit that the other lacks without it."""
    answer, truth = normalize_pair(answer, truth)
    (value, unit), (true_value, true_unit) = split_unit(answer), split_unit(truth)
    return (answer, truth) if unit and true_unit else (value, true_value)


def _structures(answer: str, truth: str) -> tuple[Structure, Structure] | None:
    (value, unit), (true_value, true_unit) = split_unit(answer), split_unit(truth)
    if unit and unit.casefold() == true_unit.casefold():
        answer, truth = value, true_value
    return read_pair(answer, truth)


def _read_quantity(text: str) -> tuple[str, str] | None:
    """Returns the canonical number and the unit ("" for a plain number), or None if the text is not a quantity."""
    match = _QUANTITY.fullmatch(text)
    if match is None:
        return None
    integer, fraction = re.sub("[ ,]", "", match["integer"]), match["fraction"] or ""
    twice = (match["sign"] and match["inner_sign"]) or (match["currency"] and match["currency_after"])
    if twice or not (integer or fraction):
        return None
    integer, fraction = integer.lstrip("0") or "0", fraction.rstrip("0")
    number = f"{integer}.{fraction}" if fraction else integer
    negative = "-" in (match["sign"], match["inner_sign"]) and number != "0"
    return "-" * negative + number, match["unit"].casefold().strip()
