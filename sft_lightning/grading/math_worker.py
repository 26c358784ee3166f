"""Decide whether expressions are equal, as the program of a grading process.

``math_processes`` starts it as a script, so that it imports math-verify and nothing of the calling program: a model
may have written anything. Each line of standard input is a JSON list ``[answer, truth, time limit in seconds]``, each
line of standard output ``true`` or ``false``. A task over its time limit kills the process with SIGALRM.
"""

import contextlib
import json
import os
import resource
import runpy
import sys
from functools import cache
from pathlib import Path
from typing import Any

from latex2sympy2_extended import NormalizationConfig
from math_verify import LatexExtractionConfig, parse, verify
from sympy import Expr, Float, I, prime, sqrt

_DIGITS = 60  # with 15, differences as small as 3**-41 count as none
_MEMORY_LIMIT_BYTES = 2 * 1024**3
# The whole answer is the expression: no part of it may be dropped as a unit.
_WHOLE_ANSWER = LatexExtractionConfig(
    normalization_config=NormalizationConfig(
        basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="none"
    )
)


def are_equal(answer: str | list, truth: str | list) -> bool:
    """Returns whether two structures of LaTeX expressions, as ``structure.py`` makes them, are mathematically equal.

    Decimals are equal to six places, and to four digits where they are small.
    """
    if isinstance(answer, str) or isinstance(truth, str):
        return answer == truth or (isinstance(answer, str) and isinstance(truth, str) and _are_equal(answer, truth))
    (_, *items), (kind, *true_items) = answer, truth
    if kind == "set":
        return all(any(are_equal(item, one) for one in true_items) for item in items) and all(
            any(are_equal(item, one) for item in items) for one in true_items
        )
    if len(items) != len(true_items) or answer[0] != kind:
        return False
    if kind not in ("list", "union"):
        return all(map(are_equal, items, true_items))
    for item in items:
        partner = next((one for one in true_items if are_equal(item, one)), None)
        if partner is None:
            return False
        true_items.remove(partner)
    return True


@cache
def _are_equal(answer: str, truth: str) -> bool:
    values, true_values = _read(answer), _read(truth)
    return verify(true_values, values, numeric_precision=_DIGITS, timeout_seconds=None) and any(
        _agree(value, true_value) for value in values for true_value in true_values
    )


@cache
def _read(text: str) -> list:
    parsed = parse(f"${text}$", [_WHOLE_ANSWER], fallback_mode="no_fallback", parsing_timeout=None)
    return [_with_imaginary_unit(one) for one in parsed if not isinstance(one, str)]


def _with_imaginary_unit(value: Any) -> Any:
    letters = {symbol: I for symbol in value.free_symbols if symbol.name == "i"}
    return value.subs(letters) if letters else value


def _agree(one: Any, other: Any) -> bool:
    """Returns whether two values agree relative to their size: to math-verify, all that is tiny is 0.

    A variable takes a number that no other expression is likely to make of it.
    """
    if not (isinstance(one, Expr) and isinstance(other, Expr)):
        return True
    symbols = sorted(one.free_symbols | other.free_symbols, key=str)
    at = {symbol: sqrt(prime(100 + index)) / 20 for index, symbol in enumerate(symbols)}
    pair = [each.subs(at).doit() for each in (one, other)]
    if all(each.is_Rational for each in pair):
        return bool(pair[0] == pair[1])
    first, second = (each.evalf(30) for each in pair)
    if first.is_finite is False or second.is_finite is False:
        return bool(first == second)
    if not (first.is_number and second.is_number):
        return True
    digits = 4 if one.has(Float) or other.has(Float) else 12
    return bool(abs(first - second) <= max(abs(first), abs(second)) * Float(10) ** -digits + Float(10) ** -60)


def main() -> None:
    # A script that -P started finds neither its own folder nor always the package on the import path.
    worker_process = runpy.run_path(str(Path(__file__).with_name("worker_process.py")))
    # Where the system refuses a limit, the time limit still holds.
    for limit, size in ((resource.RLIMIT_AS, _MEMORY_LIMIT_BYTES), (resource.RLIMIT_CORE, 0)):
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(limit, (size, resource.getrlimit(limit)[1]))
    tasks, reply = worker_process["open_streams"]()
    reply("ready")
    # The parsers print warnings.
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.dup2(nowhere, sys.stderr.fileno())
    while line := tasks.readline():
        answer, truth, seconds = json.loads(line)
        with worker_process["time_limit"](seconds):
            verdict = are_equal(answer, truth)
            _read.cache_clear()
            _are_equal.cache_clear()
        reply(json.dumps(bool(verdict)))


if __name__ == "__main__":
    main()
