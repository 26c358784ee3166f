"""What the fields of a row must be. Each check raises ValueError with a reason of one short line."""

import math
import reprlib
import sys
from typing import Any


def check_text(name: str, value: Any) -> None:
    """Checks for text that is not empty, and that can be written as UTF-8."""
    if value is None:
        raise ValueError(f"{name} is missing")
    if not isinstance(value, str):
        raise ValueError(f"{name} must be text, got {type(value).__name__}")
    if not value.strip():
        raise ValueError(f"{name} is empty")
    _check_characters(name, value)


def check_weight(value: Any) -> None:
    """Checks for a number that a loss can be multiplied by."""
    if not _is_number(value) or not 0 <= value <= sys.float_info.max:
        raise ValueError(f"field 'weight' must be a finite number, at least 0, got {_shown(value)}")


def check_ground_truth(value: Any) -> None:
    """Checks for text, a finite number, a list of those, or None."""
    for truth in value if isinstance(value, list) else [value]:
        if isinstance(truth, str):
            _check_characters("field 'ground_truth'", truth)
        elif value is not None and not (_is_number(truth) and (isinstance(truth, int) or math.isfinite(truth))):
            raise ValueError(f"field 'ground_truth' must be text, a number or a list of those, got {_shown(truth)}")


def _check_characters(name: str, value: str) -> None:
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{name} holds half a surrogate pair, which is no character: {error.reason}") from None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _shown(value: Any) -> str:
    """Returns the beginning of a value, which may be nested deeper than ``repr`` can follow."""
    return reprlib.repr(value)[:40]
