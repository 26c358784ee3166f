r"""Read an answer as lists, sets, tuples, intervals, unions and matrices of single expressions.

math-verify compares the expressions; it takes tuples for sets, and all intervals that end before they begin for one.
"""

import re
from typing import TypeAlias

from sft_lightning.grading.notation import CURRENCY, MAX_EXPRESSION_CHARACTERS, radians, without_delimiters

# An expression, or a list [kind, item, ...]. The kinds: "list", "set" and "union" have no order; "in" is a variable and
# its interval, "matrix" has "row"s, and the others are brackets around several items: "()", "(]", "[)" and "[]".
Structure: TypeAlias = str | list["Structure"]

# Deeper, thirty brackets around a number, takes a parser seconds.
_MAX_OPEN_BRACKETS = 10
_UNORDERED = {"list", "set", "union"}

# After an opening bracket it is the first of several values.
_SEPARATED = re.compile(r"(?<![0-9.,(\[])(?<!\\\{)[1-9][0-9]{0,2}(?:,[0-9]{3})+(?![0-9,])")
# math-verify reads "6(12)" and two adjacent fractions as sums, like a mixed number.
_IMPLICIT_PRODUCT = re.compile(
    r"(?<=[0-9)])(?<!\^[0-9])(?<!\\log_[0-9]) ?(?=\()|(?<=[)}0-9]) ?(?=\\frac)|"
    r"(?P<fraction>\\frac\{[^{}]*\}\{[^{}]*\}) ?(?=\()"
)

_TOKEN = re.compile(r"\\[a-zA-Z]+|\\[{}]|[0-9]+(?:\.[0-9]+)?|\.[0-9]+|[a-zA-Z]+|[-+*/^_=<>!|,()\[\]{}]")
_COMMANDS = (
    "frac sqrt binom cdot times div pm mp pi infty circ ln log exp sin cos tan cot sec csc cup cap le ge ne "
    "lfloor rfloor lceil rceil emptyset"
)
_VARIABLES = {r"\alpha", r"\beta", r"\gamma", r"\delta", r"\theta", r"\lambda", r"\mu", r"\phi", r"\omega"}
_ALLOWED_COMMANDS = {"\\" + name for name in _COMMANDS.split()} | _VARIABLES | {r"\{", r"\}"}
_ALLOWED_WORDS = {"sqrt"}
_CONSTANTS = {"e", "i"}
# Tokens that make a statement or several values out of an expression. An answer may only have the kinds, and the
# letters, that the truth has: math-verify accepts "73 = 72" as 72, and "0 kg" as 0.
_STATEMENT = {"=": "equation", "<": "order", ">": "order", r"\le": "order", r"\ge": "order", r"\ne": "order"}
_STATEMENT |= {",": "list", r"\pm": "sign", r"\mp": "sign", r"\circ": "degree", r"\cap": "set"}

_BRACKET = re.compile(r"\\[{}]|[()\[\]{}]")
_COMMA = re.compile(",")
_UNION = re.compile(r"\\cup(?![a-zA-Z])")
_NAME = r"[a-zA-Z]|[a-zA-Z] ?\([a-zA-Z]\)|\( ?[a-zA-Z](?: ?, ?[a-zA-Z])+ ?\)"
_ASSIGNMENT = re.compile(rf"(?P<name>{_NAME}) ?(?:=|\\in(?![a-zA-Z])) ?(?P<value>[^=]+)")
_MATRIX = re.compile(
    r"(?P<opening>[(\[])? ?\\begin ?\{(?P<name>[pb]?matrix|smallmatrix|array)\} ?(?:\{[lcr| ]+\})? ?"
    r"(?P<rows>(?:(?!\\begin|\\end).)*)\\end ?\{(?P=name)\} ?(?(opening)[)\]])"
)
_ROW_END = re.compile(r"\\\\(?: ?\[[0-9.]+ ?[a-z]+\])?")
_ORDER = re.compile(r" ?(<|>|\\le(?![a-zA-Z])|\\ge(?![a-zA-Z])) ?")
_MIRRORED = {">": "<", r"\ge": r"\le"}
_VARIABLE = re.compile("|".join(["[a-df-zA-Z]", *map(re.escape, _VARIABLES)]))
_SIGN = re.compile(r"\\(?:pm|mp)(?![a-zA-Z])")
_LOGARITHM = re.compile(r"\\log ?_ ?(?:\{([0-9a-z]+)\}|([0-9a-z])) ?([0-9]+(?:\.[0-9]+)?)?")


def read_pair(answer: str, truth: str) -> tuple[Structure, Structure] | None:
    """Returns the structures of both, or None if they cannot be equal.

    So if one of them is no expression, if their structures differ, or if the answer claims more than the truth.

    Args:
        answer: A text as ``notation.normalize`` returns it.
        truth: Likewise.
    """
    if max(len(answer), len(truth)) > MAX_EXPRESSION_CHARACTERS or not (_is_shallow(answer) and _is_shallow(truth)):
        return None
    answer, truth = _SEPARATED.sub(_without_commas, answer), _SEPARATED.sub(_without_commas, truth)
    (name, value), (true_name, true_value) = _assigned(answer), _assigned(truth)
    if name and (name == true_name or not (true_name or "=" in truth)):
        answer = value
    if true_name and (name == true_name or not (name or "=" in answer)):
        truth = true_value
    structure, true_structure = _read(answer), _read(truth)
    if (_kind(structure) == "in") != (_kind(true_structure) == "in"):
        structure, true_structure = _interval(structure), _interval(true_structure)
    leaves, true_leaves = _leaves(structure), _leaves(true_structure)
    claims, true_claims = _claims(leaves), _claims(true_leaves)
    if claims is None or true_claims is None or not claims <= true_claims:
        return None
    return (structure, true_structure) if _may_be_equal(structure, true_structure) else None


def _is_shallow(text: str) -> bool:
    depth = deepest = 0
    for bracket in _BRACKET.findall(text):
        depth += 1 if bracket[-1] in "([{" else -1
        deepest = max(deepest, depth)
    return deepest <= _MAX_OPEN_BRACKETS


def _without_commas(number: re.Match[str]) -> str:
    return number[0].replace(",", "")


def _assigned(text: str) -> tuple[str, str]:
    """Returns name and value of "x = 5", or of "x = 1, x = 2"; two empty texts for others."""
    matches = [_ASSIGNMENT.fullmatch(part) for part in _split(text, _COMMA)]
    found = [match for match in matches if match]
    names = {match["name"].replace(" ", "") for match in found}
    if len(found) < len(matches) or len(names) != 1:
        return "", ""
    return names.pop(), ", ".join(match["value"] for match in found)


def _split(text: str, separator: re.Pattern[str]) -> list[str]:
    """Returns the parts between the separators that are in no bracket."""
    depth, start, parts = 0, 0, []
    for token in re.finditer(rf"{_BRACKET.pattern}|{separator.pattern}", text):
        if _BRACKET.fullmatch(token[0]):
            depth += 1 if token[0][-1] in "([{" else -1
        elif depth == 0:
            parts.append(text[start : token.start()].strip())
            start = token.end()
    return [*parts, text[start:].strip()]


def _read(text: str) -> Structure:
    text = without_delimiters(text)
    for kind, separator in (("list", _COMMA), ("union", _UNION)):
        parts = _split(text, separator)
        if len(parts) > 1:
            return [kind, *map(_read, parts)]
    matrix = _MATRIX.fullmatch(text)
    if matrix:
        rows = [row for row in _ROW_END.split(matrix["rows"]) if row.strip()]
        return ["matrix", *(["row", *map(_read, row.split("&"))] for row in rows)]
    return _read_brackets(text) or _read_inequality(text) or _read_expression(text)


def _read_brackets(text: str) -> Structure | None:
    """Returns what one pair of brackets around a text makes of it; None if there is none."""
    brackets = list(_BRACKET.finditer(text))
    if not brackets or brackets[0].start() > 0 or brackets[0][0] == "{":
        return None
    depth = 0
    for bracket in brackets:
        depth += 1 if bracket[0][-1] in "([{" else -1
        if depth == 0:
            break
    opening, closing = brackets[0][0], bracket[0]
    if bracket.end() < len(text) or (opening == r"\{") != (closing == r"\}") or closing == "}":
        return None
    items = list(map(_read, _split(text[len(opening) : -len(closing)].strip(), _COMMA)))
    if opening == r"\{":
        return ["set", *items]
    if len(items) == 1:
        return items[0] if opening + closing == "()" else None
    if opening + closing == "[]" and all(_kind(item) == "[]" and len(item) == len(items[0]) for item in items):
        return ["matrix", *(["row", *item[1:]] for item in items)]
    return [opening + closing, *items]


def _read_inequality(text: str) -> Structure | None:
    """Returns the interval of one variable, or an expression in ascending order; None if it is no inequality."""
    parts = _ORDER.split(text)
    terms, signs = parts[::2], parts[1::2]
    if signs and all(sign in _MIRRORED for sign in signs):
        parts = [_MIRRORED.get(part, part) for part in parts[::-1]]
        terms, signs = parts[::2], parts[1::2]
    if not signs or not set(signs) <= {"<", r"\le"} or "=" in text:
        return None
    if len(terms) == 2:
        is_below = _VARIABLE.fullmatch(terms[0])
        terms, signs = ([r"-\infty", *terms], ["<", *signs]) if is_below else ([*terms, r"\infty"], [*signs, "<"])
    if len(terms) == 3 and _VARIABLE.fullmatch(terms[1]) and "" not in terms:
        ends = [_read_expression(terms[0]), _read_expression(terms[2])]
        if not any(_claims(_leaves(end)) for end in ends):
            brackets = ("[" if signs[0] == r"\le" else "(") + ("]" if signs[1] == r"\le" else ")")
            return ["in", terms[1], [brackets, *ends]]
    return _read_expression(" ".join(parts))


def _read_expression(text: str) -> Structure:
    """Returns a text that is one expression, "" for other texts; two expressions for one with a double sign."""
    text = _bare(text)
    if not _is_expression(text):
        return ""
    if len(_SIGN.findall(text)) == 1:
        return ["list", _SIGN.sub("+", text), _SIGN.sub("-", text)]
    return text


def _bare(text: str) -> str:
    text = text[1:] if text[:1] and text[0] in CURRENCY else text
    text = radians(text.removesuffix("%").strip())
    text = _LOGARITHM.sub(_with_brackets, text)
    return _IMPLICIT_PRODUCT.sub(r"\g<fraction> \\cdot ", text)


def _with_brackets(logarithm: re.Match[str]) -> str:
    braced, bare, argument = logarithm.groups()
    return rf"\log_{{{braced or bare}}}" + (f"({argument})" if argument else "")


def _is_expression(text: str) -> bool:
    tokens = _TOKEN.findall(text)
    if not tokens or "".join(tokens) != text.replace(" ", "") or not _is_balanced(tokens):
        return False
    for before, token in zip(["", *tokens], tokens, strict=False):
        if token[0] == "\\" and token not in _ALLOWED_COMMANDS:
            return False
        if token.isalpha() and len(token) > 2 and token not in _ALLOWED_WORDS:
            return False
        # math-verify reads "73 72", "70{2}" and "{70}2" as sums, and "(0)72" as 72.
        if token[0] in ".0123456789" and (before[-1:].isdigit() or before in ("}", ")", "]")):
            return False
        if token == "[" and before not in ("", r"\sqrt", r"\cup", r"\cap", "=", ",", "(", "["):
            return False
        if token == "{" and not (before[:1] == "\\" or before in ("^", "_", "}", "]")):
            return False
        if token == "_" and before != r"\log":
            return False
    return True


def _is_balanced(tokens: list[str]) -> bool:
    closing_of = {"(": ")]", "[": ")]", "{": ("}",), r"\{": (r"\}",)}  # an interval may be half-open
    open_brackets: list[str] = []
    for token in tokens:
        if token in closing_of:
            open_brackets.append(token)
        elif token in (")", "]", "}", r"\}") and (not open_brackets or token not in closing_of[open_brackets.pop()]):
            return False
    return not open_brackets and tokens.count("|") <= 2 * _MAX_OPEN_BRACKETS


def _leaves(structure: Structure) -> list[str]:
    if isinstance(structure, str):
        return [structure]
    return [leaf for item in structure[1:] for leaf in _leaves(item)]


def _claims(leaves: list[str]) -> set[str] | None:
    """Returns the kinds of statements and the variables of expressions, or None if one is no expression."""
    if not all(leaves):
        return None
    tokens = [token for leaf in leaves for token in _TOKEN.findall(leaf)]
    words = set(filter(str.isalpha, tokens)) - _ALLOWED_WORDS - _CONSTANTS
    kinds = {_STATEMENT[token] for token in tokens if token in _STATEMENT}
    return kinds | set("".join(words)) | _VARIABLES.intersection(tokens)


def _interval(structure: Structure) -> Structure:
    return structure[2] if _kind(structure) == "in" else structure


def _kind(structure: Structure) -> Structure:
    return "" if isinstance(structure, str) else structure[0]


def _may_be_equal(answer: Structure, truth: Structure) -> bool:
    kinds = _kind(answer), _kind(truth)
    if kinds == ("", ""):
        return True
    if kinds == ("list", "set") or kinds == ("set", "set"):
        return True
    if kinds[0] != kinds[1] or len(answer) != len(truth):
        return False
    return kinds[0] in _UNORDERED or all(map(_may_be_equal, answer[1:], truth[1:]))
