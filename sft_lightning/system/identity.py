"""Describe classes and objects by texts that stay the same when files of the package move.

Cache keys and the comparison of a resumed run with its checkpoint are made of these texts.
"""

import hashlib
import re
import sys
from pathlib import Path
from types import CodeType, FunctionType
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
        "sft_lightning.R1ZeroGrader(time_limit_seconds=5.0, units='strict')"
    """
    return _describe(value, _MAX_DEPTH)


def is_built_in(cls: type) -> bool:
    """Returns whether a class is the package's own, whose changes of results are told by its ``version``."""
    return cls.__module__.partition(".")[0] == _PACKAGE


def identity_with_code(value: Any) -> str:
    """Returns an identity for results that are kept: what ``value`` returned before, it would return again.

    For a class of the package it holds the settings and ``version``, where that is not 1. For another class it holds
    all attributes, ``version`` if there is one, and a digest of the source files of the class and its bases outside of
    the package and the standard library. Files that these import do not show.

    Example:
        >>> from sft_lightning import ExactMatchGrader
        >>> identity_with_code(ExactMatchGrader())
        'sft_lightning.ExactMatchGrader(ignore_case=False)'
    """
    cls = type(value)
    version = getattr(cls, "version", 1)
    suffix = f"/{version}" if version != 1 else ""
    if is_built_in(cls):
        return identity(value) + suffix
    return f"{_describe(value, _MAX_DEPTH, with_private=True)}{suffix}:{_code_digest(cls)}"


def _code_digest(cls: type) -> str:
    not_theirs = {_PACKAGE, *sys.stdlib_module_names}
    classes = [base for base in cls.__mro__ if base.__module__.partition(".")[0] not in not_theirs or base is cls]
    digest = hashlib.sha256()
    for base in classes:
        file = getattr(sys.modules.get(base.__module__), "__file__", None)
        if file and Path(file).is_file():
            digest.update(Path(file).read_bytes())
        else:  # of a notebook or a program on standard input
            functions = sorted((name, item) for name, item in vars(base).items() if isinstance(item, FunctionType))
            digest.update(repr([(name, _code(function.__code__)) for name, function in functions]).encode())
    return digest.hexdigest()[:16]


def _code(code: CodeType) -> tuple:
    constants = [_code(one) if isinstance(one, CodeType) else _describe(one, _MAX_DEPTH) for one in code.co_consts]
    return code.co_code, code.co_names, constants


def _describe(value: Any, depth: int, *, with_private: bool = False) -> str:
    """Returns what ``repr`` would, but without memory addresses and with sets and keys in order."""

    def inner(item: Any) -> str:
        return _describe(item, depth - 1, with_private=with_private)

    if value is None or isinstance(value, bool | int | float | str | bytes):
        return repr(value)
    if hasattr(value, "__qualname__") and getattr(value, "__module__", None):
        return public_name(value)
    if depth == 0:
        return public_name(type(value))
    if isinstance(value, dict):
        pairs = (f"{inner(key)}: {inner(item)}" for key, item in value.items())
        return "{" + ", ".join(sorted(pairs)) + "}"
    if isinstance(value, list | tuple | set | frozenset):
        items = list(map(inner, value))
        ordered = items if isinstance(value, list | tuple) else sorted(items)
        return f"{type(value).__name__}({', '.join(ordered)})"
    slots = {name: getattr(value, name) for name in getattr(type(value), "__slots__", ()) if hasattr(value, name)}
    settings = {**slots, **getattr(value, "__dict__", {})}
    public = sorted((name, setting) for name, setting in settings.items() if with_private or not name.startswith("_"))
    if not public and type(value).__repr__ is not object.__repr__:
        return _ADDRESS.sub("", repr(value))
    return f"{public_name(type(value))}({', '.join(f'{name}={inner(one)}' for name, one in public)})"
