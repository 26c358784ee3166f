"""Describe what a parser, a class or the Trainer refuses in one line that names the field."""

import re
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import lightning
from jsonargparse import Namespace
from lightning.fabric.utilities.exceptions import MisconfigurationException

from sft_lightning.errors import UserError

# What a mistake in code raises, rather than a class that refuses a value. These keep their traceback.
_MISTAKES_IN_CODE = (ArithmeticError, AssertionError, AttributeError, LookupError, NameError)
_ABOVE_ZERO = ("accumulate_grad_batches", "check_val_every_n_epoch", "val_check_interval")
_UNION = "Does not validate against any of the Union subtypes"


class Builder:
    """Makes the objects of a config for jsonargparse, and keeps the first error of a class.

    jsonargparse puts the errors of all members of a union into one text. A deferred call, such as that of an optimizer,
    holds the builder, so that the builder is copied with the module.

    Attributes:
        refused: The class that raised, and its error; None where all objects could be made.
    """

    def __init__(self) -> None:
        self.refused: tuple[type, Exception] | None = None

    def __call__(self, kind: type, *args: Any, **kwargs: Any) -> Any:
        try:
            return kind(*args, **kwargs)
        except Exception as error:
            self.refused = self.refused or (kind, error)
            raise

    def explain(self, error: Exception, config: Mapping[str, Any]) -> Exception:
        """Returns a UserError for an error in making the objects of a config, or the error if the code is wrong.

        Args:
            error: An error of jsonargparse, of an object's class or of the Trainer.
            config: The config as the user gave it, to find the field of a class.
        """
        kind, reason = self.refused or (None, error)
        if kind is not None and (reason is error or _UNION in str(error)):
            fields = (field for field, path in _classes(config) if path.rpartition(".")[2] == kind.__name__)
            field = next(fields, None)
            if field is None:
                return reason  # data, model, checkpoint and evaluation name their arguments themselves
            return UserError(f"{field} {kind.__name__}: {_told(reason)}")
        if isinstance(error, (UserError, *_MISTAKES_IN_CODE)):
            return error
        return UserError(f"trainer: {shorten(str(error))}")


def check_values(config: Any) -> None:
    """Checks values that the parser accepts, and that fail late or without naming their field.

    Args:
        config: The options of a Trainer command.

    Raises:
        UserError: For the first of them.
    """
    for section in ("trainer", "model", "data", "checkpoint", "evaluation"):
        if not isinstance(config[section], Namespace):
            raise UserError(f"{section} is {config[section]!r}; give its options, as in {section}: {{option: value}}")
    for name in ("train_path", "val_path", "test_path"):
        value = config.data[name]
        if not isinstance(value, str | None):
            raise UserError(f"data.{name} is a {type(value).__name__}; give a path: only Python can pass rows")
    seed = config.get("seed_everything")
    if not isinstance(seed, bool) and seed is not None and not 0 <= seed < 2**32:
        raise UserError(f"seed_everything must be from 0 to {2**32 - 1}, got {seed}")
    for name in _ABOVE_ZERO:
        value = config.trainer[name]
        if value is not None and value <= 0:
            raise UserError(f"trainer.{name} must be above 0, got {value}")
    if config.trainer.barebones:
        raise UserError(
            "trainer.barebones true turns off checkpoints, logging and callbacks, which a run folder consists of: "
            "leave it out"
        )


def is_refused_by_lightning(error: BaseException) -> bool:
    """Returns whether Lightning raises the error on purpose, as for options that do not fit each other."""
    if isinstance(error, MisconfigurationException):
        return True
    if type(error) not in (RuntimeError, TypeError, ValueError):
        return False
    raised_at = traceback.extract_tb(error.__traceback__)[-1]
    of_lightning = Path(raised_at.filename).is_relative_to(Path(lightning.__file__).parent)
    # Lightning's calls of our hooks also raise in its files, where a hook has the wrong arguments.
    return of_lightning and (raised_at.line or "").startswith("raise ")


def shorten(message: str) -> str:
    r"""Returns a jsonargparse message as one line: the key, the value and what was expected.

    Example:
        >>> shorten("Value  <class 'pathlib.Path'> is\n not a number")
        'Value Path is not a number'
    """
    line = re.sub(r"\s+", " ", message).strip()
    line = re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", line).replace("a typing.Literal", "one of ")
    union = re.fullmatch(
        rf"(.*?):(?: -.*?)? ?-? ?{_UNION}.*? Errors: (.*) Given value type: .* Given value: (.*)", line
    )
    if union:
        key, errors, value = union.groups()
        line = f"{key}: '{_shown(value)}' is not accepted. {_expected(errors)}"
    return line


def _told(error: Exception) -> str:
    if not isinstance(error, _MISTAKES_IN_CODE):
        return str(error)
    raised_at = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__} in {raised_at.filename}:{raised_at.lineno}: {error}"


def _expected(errors: str) -> str:
    """Returns what was expected: a class, arguments of one or one of several values; else the types."""
    reasons = list(dict.fromkeys(errors.removeprefix("- ").split(" - ")))
    of_others = re.compile(
        r"Expected an? \w+|Option '\w+' is not accepted|Not a valid subclass of .*|a class path .*|a dict .*"
    )
    shown = [reason for reason in reasons if not of_others.fullmatch(reason)]
    shown = shown or [reason for reason in reasons if reason != "Expected a NoneType"] or reasons
    known = r"There is no class \1; name one by package.module.Class"
    return re.sub(r"Expected a dot import path string: (\S+)", known, ". ".join(shown))


def _shown(value: str) -> str:
    """Returns a value as the user typed it, a class with its arguments as the name of the class."""
    nested = re.fullmatch(r"NestedArg\(key='(.*?)', val=(.*)\)", value)
    if nested:
        return f"{nested[1]}={nested[2].strip(chr(39))}"
    classes = re.findall(r"class_path'?[=:] ?'(?:\w+\.)*(\w+)'", value)
    return ", ".join(classes) or value


def _classes(config: Any, at: str = "") -> Iterator[tuple[str, str]]:
    """Yields (field, class path) of each class in a config."""
    if isinstance(config, list):
        for each in config:
            yield from _classes(each, at)
    elif isinstance(config, dict):
        if "class_path" in config:
            yield at, config["class_path"]
        for key, each in config.items():
            yield from _classes(each, f"{at}.{key}".removeprefix("."))
