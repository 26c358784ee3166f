r"""Rewrite an answer, so that one thing is written in one way: ``\pi`` for "pi", 1200 for 1.2e3, 13/4 for 3 1/4."""

import re
from decimal import Decimal

# A final answer is never this long, and the time of a parser grows faster than the text.
MAX_EXPRESSION_CHARACTERS = 500
_MAX_EXPONENT = 300

CURRENCY = "$\u20ac\u00a3\u00a5\u20b9"  # dollar, euro, pound, yen, rupee
# Minus sign and en dash; no-break and thin spaces.
SAME_CHARACTER = str.maketrans({"\u2212": "-", "\u2013": "-", "\u00a0": " ", "\u2009": " ", "\u202f": " "})
# Times, dot, division, plus-minus, pi, infinity; the signs of order, element, union, intersection and the empty set;
# degree, square, cube; fractions; the Greek letters that are variables.
_LATEX_OF_CHARACTER = str.maketrans(
    {
        "\u00d7": r"\times ", "\u00b7": r"\cdot ", "\u00f7": r"\div ", "\u00b1": r"\pm ", "\u03c0": r"\pi ",
        "\u221e": r"\infty ", "\u2264": r"\le ", "\u2265": r"\ge ", "\u2260": r"\ne ", "\u2208": r"\in ",
        "\u222a": r"\cup ", "\u2229": r"\cap ", "\u2205": r"\emptyset ", "\u00b0": r"^\circ ", "\u00b2": "^2",
        "\u00b3": "^3", "\u00bd": " 1/2", "\u2153": " 1/3", "\u2154": " 2/3", "\u00bc": " 1/4", "\u00be": " 3/4",
        "\u03b1": r"\alpha ", "\u03b2": r"\beta ", "\u03b3": r"\gamma ", "\u03b4": r"\delta ", "\u03b8": r"\theta ",
        "\u03bb": r"\lambda ", "\u03c6": r"\phi ", "\u03c9": r"\omega ",
    }
)  # fmt: skip
_DELIMITERS = (("**", "**"), ("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"))
_REWRITES = (
    (re.compile(r"\\(?:left|right) ?(?=[.|()\[\]{}\\])|\\!"), ""),
    (re.compile(r"(?<=[0-9A-Za-z}])~"), " "),  # before a number it means "about"
    (re.compile(r"\{,\}"), ","),
    (re.compile(r"(?<!\\)\\[,;: ]"), " "),  # after a backslash it ends a row
    (re.compile(r"\\([$%])"), r"\1"),
    (re.compile(r"\\[dt]frac(?![a-zA-Z])"), r"\\frac"),
    (re.compile(r"\\(?:text|textbf|mathrm|mathbf|mbox) ?\{([^{}]*)\}"), r"\1"),
    (re.compile(r"\s+"), " "),
)

_NUMBER = r"(?P<number>[0-9]+(?:\.[0-9]*)?|(?<!,)\.[0-9]+)"
_E_NOTATION = re.compile(rf"(?<![\w.)}}\]^\\]){_NUMBER}[eE](?P<exponent>[+-]?[0-9]{{1,3}})(?![\w.])")
# "2e-3" may also be a difference with Euler's number in it.
_MAY_BE_A_SUM = re.compile(r"(?<![\w.)}\]^\\])[0-9]+e[+-][0-9](?![\w.])")
_EULER = re.compile(r"(?<![a-zA-Z\\])e(?![a-zA-Z])")
_TIMES_POWER_OF_TEN = re.compile(
    rf"^(?P<sign>[+-]? ?){_NUMBER} ?(?:\\times|\\cdot|\*) ?10 ?\^ ?(?:\{{ ?(?P<braced>[+-]?[0-9]{{1,3}}) ?\}}|"
    r"(?P<bare>[+-]?[0-9]{1,3}))(?=$| ?[A-Za-z])"
)
_EXPONENT_OF_WORD = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
_NUMBER_WORD = re.compile(
    rf"(?<![\w.)}}\]^,]){_NUMBER} (?P<word>{'|'.join(_EXPONENT_OF_WORD)})(?![a-zA-Z])", re.IGNORECASE
)
_FRACTION = r"(?: ?\\frac ?\{(\d+)\}\{(\d+)\}| (\d+) ?/ ?(\d+)(?![\d./^(]))"
_MIXED_NUMBER = re.compile(rf"(?<![\w.)}}\]^/\\])([0-9]+|[1-9][0-9]{{0,2}}(?:,[0-9]{{3}})+){_FRACTION}", re.ASCII)
_REPEATING_DECIMAL = re.compile(r"(?<![\w.])([0-9]*)\.([0-9]*)\\overline ?\{([0-9]+)\}", re.ASCII)
# Only where the text may be an expression: each has one form afterwards.
_EXPRESSION_REWRITES = (
    (re.compile(r"(?<![a-zA-Z\\])pi(?![a-zA-Z])"), r"\\pi "),
    (re.compile("\u221a ?([0-9]+(?:\\.[0-9]+)?|[a-zA-Z])"), r"\\sqrt{\1}"),
    (re.compile(r"(?:\u221a|\\sqrt) ?\("), "sqrt("),
    (re.compile(r"\\le(?:q(?:slant)?)?(?![a-zA-Z])|<="), r"\\le "),
    (re.compile(r"\\ge(?:q(?:slant)?)?(?![a-zA-Z])|>="), r"\\ge "),
    (re.compile(r"\\neq(?![a-zA-Z])"), r"\\ne"),
    (re.compile(r"\\lt(?![a-zA-Z])"), "<"),
    (re.compile(r"\\gt(?![a-zA-Z])"), ">"),
    (re.compile(r" ?\^ ?(?:\\circ(?![a-zA-Z])|\{ ?\\circ ?\})|(?<=[0-9]) ?degrees?(?![a-zA-Z])"), r"^\\circ "),
    (re.compile(r"\\varnothing(?![a-zA-Z])|\\\{ ?\\\}"), r"\\emptyset "),
    (re.compile(r"_ ?\{ ?(\w) ?\}"), r"_\1"),
    (re.compile(r"\\frac ?([0-9])(?=[0-9{])"), r"\\frac{\1}"),
    (re.compile(r"(\\frac ?\{(?:[^{}]|\{[^{}]*\})*\}) ?([0-9a-zA-Z])"), r"\1{\2}"),
    (re.compile(r" ?: ?"), ":"),
    (re.compile(r"\s+"), " "),
)

_FUNCTION = re.compile(r"\\(?:sin|cos|tan|cot|sec|csc)(?![a-zA-Z])")
_DEGREES = re.compile(rf"{_NUMBER} ?\^\\circ")

_LONG_WORD = r"[^\W\d_]{3,}"
_SHORT_WORDS = "cm|mm|km|kg|mg|ml|mL|lb|oz|ft|yd|mi|hr|ms|am|pm|Hz|kW"
_LETTERS = "mgshlLKNJWVACF"
_POWER = r"(?:\^\{?-?[0-9]\}?)?"
_WORD = rf"(?:{_LONG_WORD}|{_SHORT_WORDS})(?![^\W\d_]){_POWER}"
_NEXT = rf"(?:[ /-]| / | ?\\cdot ?)(?:{_WORD}|in|of|a|[{_LETTERS}](?![^\W\d_]){_POWER})"
_UNIT = re.compile(
    rf"(?P<value>.*?[0-9)}}])(?P<unit>\^\\circ ?[CF]?| ?{_WORD}(?:{_NEXT}){{0,5}}|"
    rf" (?:[{_LETTERS}]|in)(?![^\W\d_]){_POWER}(?:{_NEXT}){{0,5}})"
)
# Words that make another number or another statement out of the number before them.
_NO_UNITS = (
    "and but half halves hundred hundreds hundredth hundredths thousand thousands thousandth thousandths million "
    "millions billion billions trillion trillions dozen dozens score pair pairs third thirds quarter quarters fourth "
    "fourths fifth fifths sixth sixths seventh sevenths eighth eighths ninth ninths tenth tenths squared cubed "
    "factorial less more fewer not plus minus times over divided mod sqrt log sin cos tan exp approximately roughly "
    "least most"
)


def normalize(text: str) -> str:
    """Returns a text with one spelling of characters, spaces and LaTeX markup, without delimiters around it."""
    text = _without_delimiters(text.translate(SAME_CHARACTER).strip().removesuffix(".").rstrip())
    for pattern, replacement in _REWRITES:
        text = pattern.sub(replacement, text)
    text = text.strip().removesuffix(".").rstrip()
    return _in_one_notation(text) if len(text) <= MAX_EXPRESSION_CHARACTERS else text


def normalize_pair(answer: str, truth: str) -> tuple[str, str]:
    """Returns both texts normalized, with "2e-3" as 0.002 unless one of them has Euler's number elsewhere."""
    pair = normalize(answer), normalize(truth)
    if not any(map(_MAY_BE_A_SUM.search, pair)):
        return pair
    as_numbers = _MAY_BE_A_SUM.sub(_plain, pair[0]), _MAY_BE_A_SUM.sub(_plain, pair[1])
    return pair if any(map(_EULER.search, as_numbers)) else as_numbers


def without_delimiters(text: str) -> str:
    r"""Returns what is between two ``$``, ``**``, or other delimiters of mathematics; else the text."""
    return _without_delimiters(text.strip())


def split_unit(text: str) -> tuple[str, str]:
    r"""Returns the value and the unit after it, which is "" where there is none; of a text as ``normalize`` returns it.

    Example:
        >>> split_unit("72 cm^2"), split_unit("18 apples per day"), split_unit("18 or 19"), split_unit("3 x")
        (('72', 'cm^2'), ('18', 'apples per day'), ('18 or 19', ''), ('3 x', ''))
    """
    match = _UNIT.fullmatch(text) if len(text) <= MAX_EXPRESSION_CHARACTERS else None
    if match is None or _FUNCTION.search(match["value"]):
        return text, ""
    if set(_NO_UNITS.split()).intersection(re.findall(r"[^\W\d_]+", match["unit"].casefold())):
        return text, ""
    return match["value"], match["unit"].strip()


def radians(text: str) -> str:
    """Returns an expression whose functions take no degrees, which they would not know."""
    return _DEGREES.sub(r"(\g<number> \\cdot \\frac{\\pi}{180})", text) if _FUNCTION.search(text) else text


def _without_delimiters(text: str) -> str:
    for opening, closing in _DELIMITERS:
        inside = text[len(opening) : -len(closing)]
        if text.startswith(opening) and text.endswith(closing) and inside and opening not in inside:
            text = inside.strip().removesuffix(".")
    return text


def _in_one_notation(text: str) -> str:
    text = text.translate(_LATEX_OF_CHARACTER)
    for pattern, replacement in _EXPRESSION_REWRITES:
        text = pattern.sub(replacement, text)
    text = text.strip()
    text = _TIMES_POWER_OF_TEN.sub(_plain, text)
    text = _NUMBER_WORD.sub(_plain, text)
    text = _E_NOTATION.sub(lambda match: match[0] if _MAY_BE_A_SUM.fullmatch(match[0]) else _plain(match), text)
    text = _REPEATING_DECIMAL.sub(_repeating_decimal, text)
    return _MIXED_NUMBER.sub(_mixed_number, text)


def _plain(match: re.Match[str]) -> str:
    """Returns a number that was written with a power of ten without it."""
    groups = match.groupdict()
    if not groups:  # of _MAY_BE_A_SUM
        return format(Decimal(match[0]), "f")
    written = groups.get("exponent") or groups.get("braced") or groups.get("bare")
    power = int(written) if written else _EXPONENT_OF_WORD[groups["word"].lower()]
    if abs(power) > _MAX_EXPONENT:
        return match[0]
    return (groups.get("sign") or "").strip() + format(Decimal(f"{groups['number']}e{power}"), "f")


def _mixed_number(match: re.Match[str]) -> str:
    whole, *parts = filter(None, match.groups())
    numerator, denominator = map(int, parts)
    if not 0 < numerator < denominator:
        return match[0]
    return rf"\frac{{{int(whole.replace(',', '')) * denominator + numerator}}}{{{denominator}}}"


def _repeating_decimal(match: re.Match[str]) -> str:
    whole, fixed, repeated = match.groups()
    denominator = (10 ** len(repeated) - 1) * 10 ** len(fixed)
    return rf"\frac{{{int(whole + fixed + repeated) - int(whole + fixed or '0')}}}{{{denominator}}}"
