"""What can be said about two answers by looking at their text: equal, different, or a question for mathematics."""

import re
from decimal import Decimal

from sft_lightning.errors import UserError

# No one writes a final answer this long, and a parser's time grows faster than the text.
_LONGEST_EXPRESSION = 500

_CURRENCY = "$\u20ac\u00a3\u00a5\u20b9"  # dollar, euro, pound, yen, rupee
# Minus sign and en dash; the spaces that do not break or are thin.
_SAME_CHARACTER = str.maketrans({"\u2212": "-", "\u2013": "-", "\u00a0": " ", "\u2009": " ", "\u202f": " ", "~": " "})
_DELIMITERS = (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"))
_REWRITES = (
    (re.compile(r"\\(?:left|right)(?![a-zA-Z])|\\!"), ""),
    (re.compile(r"\{,\}"), ","),
    (re.compile(r"\\[,;: ]"), " "),
    (re.compile(r"\\([$%])"), r"\1"),
    (re.compile(r"\\[dt]frac(?![a-zA-Z])"), r"\\frac"),
    (re.compile(r"\\(?:text|textbf|mathrm|mathbf) ?\{([^{}]*)\}"), r"\1"),
    (re.compile(r"\s+"), " "),
)

_QUANTITY = re.compile(
    rf"(?P<sign>[+-]?) ?(?P<currency>[{_CURRENCY}]?) ?(?P<inner_sign>[+-]?)"
    r"(?P<integer>[0-9]{1,3}(?:,[0-9]{3})+|[0-9]{1,3}(?: [0-9]{3})+|[0-9]*)(?:\.(?P<fraction>[0-9]*))?"
    rf" ?(?P<currency_after>[{_CURRENCY}]?) ?%? ?(?P<unit>(?:[^\W0-9_][^0-9]*)?)"
)
_THOUSANDS_COMMA = re.compile(r"(?<=[0-9]),(?=[0-9]{3}(?![0-9]))")

_TOKEN = re.compile(r"\\[a-zA-Z]+|\\[{}]|[0-9]+(?:\.[0-9]+)?|\.[0-9]+|[a-zA-Z]+|[-+*/^=<>!|,()\[\]{}]")
_COMMANDS = (
    "frac sqrt cdot times div pm mp pi infty circ ln log exp sin cos tan cot sec csc "
    "cup cap le leq ge geq ne neq lt gt alpha beta gamma delta theta lambda mu phi omega"
)
_ALLOWED_COMMANDS = {"\\" + name for name in _COMMANDS.split()} | {r"\{", r"\}"}
_ALLOWED_WORDS = {"sqrt"}
_CONSTANTS = {"e", "i"}
# What makes several values, or a statement, out of values. An answer may have of these only what the truth has, and so
# of letters: mathematics would take "73 = 72" and "72, 72" for 72, and "0 kg" for 0.
_STRUCTURE = {",": "list", r"\{": "set", r"\pm": "sign", r"\mp": "sign", r"\circ": "degree", "=": "equation"}
_STRUCTURE |= dict.fromkeys(("<", ">", r"\lt", r"\gt", r"\le", r"\leq", r"\ge", r"\geq", r"\ne", r"\neq"), "order")
_STRUCTURE |= dict.fromkeys((r"\cup", r"\cap"), "set")
_ASSIGNMENT = re.compile(r"[a-zA-Z] ?= ?([^=]+)")


def extract_answer(response: str) -> str:
    r"""Returns what the response gives as its answer.

    That is everything after the last ``<answer>``, closing tags removed, or the content of the last ``\boxed{}`` in
    there; empty without ``<answer>``.
    """
    _, tag, answer = response.rpartition("<answer>")
    if not tag:
        return ""
    answer = answer.replace("</answer>", "").strip()
    _, box, content = answer.rpartition(r"\boxed{")
    depth = 1 if box else 0
    for position, character in enumerate(content if box else ""):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return content[:position].strip()
    return answer


def accepted_answers(ground_truth: object) -> list[str]:
    """Returns the texts of a ground truth, which is a str, an int, a float or a list of those (alternatives).

    Raises:
        UserError: If it is something else, or empty.
    """
    alternatives = ground_truth if isinstance(ground_truth, list | tuple) else [ground_truth]
    if not alternatives or not all(isinstance(one, str | int | float) and str(one).strip() for one in alternatives):
        raise UserError(f"ground_truth {ground_truth!r} must be a text, a number or a list of those, and not empty")
    # A float is written out: 1e+20 is no plain number.
    return [format(Decimal(repr(one)), "f") if isinstance(one, float) else str(one) for one in alternatives]


def same_text(answer: str, truth: str) -> bool | None:
    """Returns whether two answers are equal, or None where only mathematics can tell.

    Equal are the same texts up to case, spacing and LaTeX dress, and the same quantities: a number with its unit, if
    any, up to separators, one currency sign and one percent sign.
    """
    answer, truth = _normalise(answer), _normalise(truth)
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
    """Returns both answers as mathematics reads them. Only for answers on which ``same_text`` returned None."""
    pair = _expressions(_normalise(answer), _normalise(truth))
    assert pair is not None
    return pair


def _normalise(text: str) -> str:
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
    """Returns the canonical number and the unit ("" for a plain number), or None where the text is not one quantity."""
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
    """Returns both as bare expressions, or None where one is none or the answer claims more than one value."""
    assignment = _ASSIGNMENT.fullmatch(answer)
    if assignment and "=" not in truth:
        answer = assignment[1]
    answer, truth = _bare(answer), _bare(truth)
    tokens, true_tokens = _read_expression(answer), _read_expression(truth)
    if not tokens or not true_tokens:
        return None
    return (answer, truth) if _claims(tokens) <= _claims(true_tokens) else None


def _claims(tokens: list[str]) -> set[str]:
    """Returns what an expression has beside numbers and operations: kinds of structure, and letters of variables."""
    words = set(filter(str.isalpha, tokens)) - _ALLOWED_WORDS - _CONSTANTS
    return {_STRUCTURE[token] for token in tokens if token in _STRUCTURE} | set("".join(words))


def _bare(text: str) -> str:
    text = text[1:] if text[:1] and text[0] in _CURRENCY else text
    return text.removesuffix("%").replace("\u03c0", r"\pi ").strip()


def _read_expression(text: str) -> list[str]:
    """Returns the tokens of a text that is one expression through and through, and nothing for any other."""
    if len(text) > _LONGEST_EXPRESSION:
        return []
    text = _THOUSANDS_COMMA.sub("", text)
    tokens = _TOKEN.findall(text)
    if "".join(tokens) != text.replace(" ", "") or not _is_balanced(tokens):
        return []
    for before, token in zip(["", *tokens], tokens, strict=False):
        if token[0] == "\\" and token not in _ALLOWED_COMMANDS:
            return []
        if token.isalpha() and len(token) > 2 and token not in _ALLOWED_WORDS:
            return []
        # Side by side, "73 72", "70{2}" and "{70}2" would be read as sums.
        if token[0] in ".0123456789" and before[-1:].isdigit():
            return []
        if token[0] in ".0123456789" and before == "}":
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
        elif token in (")", "]", "}", r"\}") and (not open_brackets or token not in closing_of[open_brackets.pop()]):
            return False
    return not open_brackets
