"""Compare two answers by their text: equal, different, or undecided without mathematics."""

import math
import re
from decimal import Decimal

from sft_lightning.errors import UserError

# A final answer is never this long, and the time of a parser grows faster than the text.
_MAX_EXPRESSION_CHARACTERS = 500
# Nor this deep: thirty brackets around a number take a parser seconds.
_MAX_OPEN_BRACKETS = 10

_CURRENCY = "$\u20ac\u00a3\u00a5\u20b9"  # dollar, euro, pound, yen, rupee
# Minus sign and en dash; no-break and thin spaces.
_SAME_CHARACTER = str.maketrans({"\u2212": "-", "\u2013": "-", "\u00a0": " ", "\u2009": " ", "\u202f": " "})
_DELIMITERS = (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"))
_REWRITES = (
    (re.compile(r"\\(?:left|right) ?(?=[.|()\[\]{}\\])|\\!"), ""),
    (re.compile(r"(?<=[0-9A-Za-z}])~"), " "),  # before a number it means "about"
    (re.compile(r"\{,\}"), ","),
    (re.compile(r"\\[,;: ]"), " "),
    (re.compile(r"\\([$%])"), r"\1"),
    (re.compile(r"\\[dt]frac(?![a-zA-Z])"), r"\\frac"),
    (re.compile(r"\\(?:text|textbf|mathrm|mathbf) ?\{([^{}]*)\}"), r"\1"),
    (re.compile(r"\s+"), " "),
)

_QUANTITY = re.compile(
    rf"(?P<sign>[+-]?) ?(?P<currency>[{_CURRENCY}]?) ?(?P<inner_sign>[+-]?)"
    r"(?P<integer>[1-9][0-9]{0,2}(?:,[0-9]{3})+|[1-9][0-9]{0,2}(?: [0-9]{3})+|[0-9]*)(?:\.(?P<fraction>[0-9]*))?"
    rf" ?(?P<currency_after>[{_CURRENCY}]?) ?%? ?(?P<unit>(?:[^\W0-9_][^0-9]*)?)"
)
# After an opening bracket it is the first of several values.
_SEPARATED = re.compile(r"(?<![0-9.,(\[])(?<!\\\{)[1-9][0-9]{0,2}(?:,[0-9]{3})+(?![0-9,])")
# Not the digits of a word. A sign belongs to the number unless the number before it makes it a subtraction.
_NUMBER = re.compile(
    rf"(?:(?<![\w)\]}}])[+-])?[{_CURRENCY}]?(?:(?<![A-Za-z0-9_])"
    r"(?:[1-9][0-9]{0,2}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|(?<![\w.])\.[0-9]+)"
)
# math-verify reads "6(12)" and two adjacent fractions as sums, like a mixed number.
_IMPLICIT_PRODUCT = re.compile(
    r"(?<=[0-9)])(?<!\^[0-9]) ?(?=\()|(?<=[)}]) ?(?=\\frac)|(?P<fraction>\\frac\{[^{}]*\}\{[^{}]*\}) ?(?=\()"
)
_FRACTION_AFTER_A_NUMBER = re.compile(r"(?<=[0-9]) ?(\\frac ?(?:\{([0-9]+)\}\{([0-9]+)\}|([0-9])([0-9]))?)")

_TOKEN = re.compile(r"\\[a-zA-Z]+|\\[{}]|[0-9]+(?:\.[0-9]+)?|\.[0-9]+|[a-zA-Z]+|[-+*/^=<>!|,()\[\]{}]")
_COMMANDS = (
    "frac sqrt cdot times div pm mp pi infty circ ln log exp sin cos tan cot sec csc cup cap le leq ge geq ne neq lt gt"
)
_VARIABLES = {r"\alpha", r"\beta", r"\gamma", r"\delta", r"\theta", r"\lambda", r"\mu", r"\phi", r"\omega"}
_ALLOWED_COMMANDS = {"\\" + name for name in _COMMANDS.split()} | _VARIABLES | {r"\{", r"\}"}
_ALLOWED_WORDS = {"sqrt"}
_CONSTANTS = {"e", "i"}
# Tokens that make several values or a statement out of values. An answer may only have the kinds, and the letters, that
# the truth has: math-verify accepts "73 = 72" and "72, 72" as 72, and "0 kg" as 0.
_STRUCTURE = {",": "list", r"\{": "set", r"\pm": "sign", r"\mp": "sign", r"\circ": "degree", "=": "equation"}
_STRUCTURE |= dict.fromkeys(("<", ">", r"\lt", r"\gt", r"\le", r"\leq", r"\ge", r"\geq", r"\ne", r"\neq"), "order")
_STRUCTURE |= dict.fromkeys((r"\cup", r"\cap"), "set")
_BRACES = re.compile(r"\\.|[{}]", re.DOTALL)  # an escaped brace is text
_ASSIGNMENT = re.compile(r"[a-zA-Z] ?= ?([^=]+)")


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
    quantity = _read_quantity(_normalize(truth))
    return quantity is not None and not quantity[1]


def first_number(text: str) -> str | None:
    """Returns the first number in a text, with its sign and separators; None if there is none."""
    number = _NUMBER.search(text.translate(_SAME_CHARACTER))
    return number[0] if number else None


def last_number(text: str) -> str | None:
    """Returns the last number in a text, with its sign and separators; None if there is none."""
    last = None
    for number in _NUMBER.finditer(text.translate(_SAME_CHARACTER)):
        last = number
    return last[0] if last else None


def same_text(answer: str, truth: str) -> bool | None:
    """Returns whether two answers are equal, or None if only mathematics can decide.

    Texts are equal up to case, spacing and LaTeX markup. Quantities, a number with an optional unit, are equal up to
    separators, one currency sign and one percent sign.
    """
    answer, truth = _normalize(answer), _normalize(truth)
    if not answer:
        return False
    if answer.casefold() == truth.casefold():
        return True
    quantity, true_quantity = _read_quantity(answer), _read_quantity(truth)
    if quantity and true_quantity:
        if quantity == true_quantity:
            return True
        if not quantity[1] and not true_quantity[1]:
            return False
    return None if _expressions(answer, truth) else False


def expressions(answer: str, truth: str) -> tuple[str, str]:
    """Returns both answers as expressions for math-verify. Only for pairs on which ``same_text`` returned None."""
    pair = _expressions(_normalize(answer), _normalize(truth))
    assert pair is not None
    return pair


def _normalize(text: str) -> str:
    text = text.translate(_SAME_CHARACTER).strip()
    text = text.removesuffix(".").rstrip()
    for opening, closing in _DELIMITERS:
        inside = text[len(opening) : -len(closing)]
        if text.startswith(opening) and text.endswith(closing) and inside and opening not in inside:
            text = inside
            break
    for pattern, replacement in _REWRITES:
        text = pattern.sub(replacement, text)
    return text.strip().removesuffix(".").rstrip()


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


def _expressions(answer: str, truth: str) -> tuple[str, str] | None:
    """Returns both as bare expressions, or None if one is not or the answer claims more than the truth."""
    assignment = _ASSIGNMENT.fullmatch(answer)
    if assignment and "=" not in truth:
        answer = assignment[1]
    answer, truth = _bare(answer), _bare(truth)
    tokens, true_tokens = _read_expression(answer), _read_expression(truth)
    if not tokens or not true_tokens:
        return None
    return (answer, truth) if _claims(tokens) <= _claims(true_tokens) else None


def _claims(tokens: list[str]) -> set[str]:
    """Returns the kinds of structure and the variables of an expression."""
    words = set(filter(str.isalpha, tokens)) - _ALLOWED_WORDS - _CONSTANTS
    structure = {_STRUCTURE[token] for token in tokens if token in _STRUCTURE}
    return structure | set("".join(words)) | _VARIABLES.intersection(tokens)


def _bare(text: str) -> str:
    text = text[1:] if text[:1] and text[0] in _CURRENCY else text
    text = text.removesuffix("%").replace("\u03c0", r"\pi ").strip()
    text = _SEPARATED.sub(lambda number: number[0].replace(",", ""), text)
    text = _IMPLICIT_PRODUCT.sub(r"\g<fraction> \\cdot ", text)
    return _FRACTION_AFTER_A_NUMBER.sub(_mixed_number_or_product, text)


def _mixed_number_or_product(match: re.Match[str]) -> str:
    _, *numbers = filter(None, match.groups())
    is_proper = len(numbers) == 2 and int(numbers[0]) < int(numbers[1])
    return match[1] if is_proper else rf" \cdot {match[1]}"


def _read_expression(text: str) -> list[str]:
    """Returns the tokens of a text that is one expression, or nothing for other texts."""
    if len(text) > _MAX_EXPRESSION_CHARACTERS:
        return []
    tokens = _TOKEN.findall(text)
    if "".join(tokens) != text.replace(" ", "") or not _is_balanced(tokens):
        return []
    for before, token in zip(["", *tokens], tokens, strict=False):
        if token[0] == "\\" and token not in _ALLOWED_COMMANDS:
            return []
        if token.isalpha() and len(token) > 2 and token not in _ALLOWED_WORDS:
            return []
        # math-verify reads "73 72", "70{2}" and "{70}2" as sums, and "(0)72" as 72.
        if token[0] in ".0123456789" and (before[-1:].isdigit() or before in ("}", ")", "]")):
            return []
        if token == "[" and before not in ("", r"\sqrt", r"\cup", r"\cap", "=", ",", "(", "["):
            return []
        if token == "{" and not (before[:1] == "\\" or before in ("^", "}", "]")):
            return []
    return tokens


def _is_balanced(tokens: list[str]) -> bool:
    closing_of = {"(": ")]", "[": ")]", "{": ("}",), r"\{": (r"\}",)}  # an interval may be half-open
    open_brackets: list[str] = []
    for token in tokens:
        if token in closing_of:
            open_brackets.append(token)
            if len(open_brackets) > _MAX_OPEN_BRACKETS:
                return False
        elif token in (")", "]", "}", r"\}") and (not open_brackets or token not in closing_of[open_brackets.pop()]):
            return False
    return not open_brackets and tokens.count("|") <= 2 * _MAX_OPEN_BRACKETS
