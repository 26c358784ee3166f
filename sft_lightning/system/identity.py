"""Describe classes and objects by texts that stay the same when files of the package move.

Cache keys and the comparison of a resumed run with its checkpoint are made of these texts.
"""

import re
import sys
from typing import Any

_PACKAGE = __name__.partition(".")[0]
_MAX_DEPTH = 5
_ADDRESS = re.compile(r" at 0x[0-9a-f]+")


def public_name(value: Any) -> str:
    """Returns the import path of a class or function: the short one if the root of the package exports it.

    Example:
        >>> from sft_lightning import R1ZeroGrader
        >>> public_name(R1ZeroGrader)
        'sft_lightning.R1ZeroGrader'
    """
    name = value.__qualname__
    is_exported = value.__module__.startswith(f"{_PACKAGE}.") and getattr(sys.modules[_PACKAGE], name, None) is value
    return f"{_PACKAGE if is_exported else value.__module__}.{name}"


def identity(value: Any) -> str:
    """Returns a text that is equal in every process for objects of one class with equal settings.

    Settings are the attributes without a leading underscore. An object that has none, such as a path, an enum member
    or a compiled pattern, is described by its ``repr``. A change in the code of the class does not show.

    Example:
        >>> from sft_lightning import R1ZeroGrader
        >>> identity(R1ZeroGrader())
        'sft_lightning.R1ZeroGrader(time_limit_seconds=5.0)'
    """
    return _describe(value, _MAX_DEPTH)


def _describe(value: Any, depth: int) -> str:
    """Returns what ``repr`` would, but without memory addresses and with sets and keys in order."""
    if value is None or isinstance(value, bool | int | float | str | bytes):
        return repr(value)
    if hasattr(value, "__qualname__") and getattr(value, "__module__", None):
        return public_name(value)
    if depth == 0:
        return public_name(type(value))
    if isinstance(value, dict):
        pairs = (f"{_describe(key, depth - 1)}: {_describe(item, depth - 1)}" for key, item in value.items())
        return "{" + ", ".join(sorted(pairs)) + "}"
    if isinstance(value, list | tuple | set | frozenset):
        items = [_describe(item, depth - 1) for item in value]
        ordered = items if isinstance(value, list | tuple) else sorted(items)
        return f"{type(value).__name__}({', '.join(ordered)})"
    slots = {name: getattr(value, name) for name in getattr(type(value), "__slots__", ()) if hasattr(value, name)}
    settings = {**slots, **getattr(value, "__dict__", {})}
    public = sorted((name, setting) for name, setting in settings.items() if not name.startswith("_"))
    if not public and type(value).__repr__ is not object.__repr__:
        return _ADDRESS.sub("", repr(value))
    return f"{public_name(type(value))}({', '.join(f'{name}={_describe(one, depth - 1)}' for name, one in public)})"
