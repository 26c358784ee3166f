"""Define grades and graders."""

import traceback
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from sft_lightning.errors import UserError
from sft_lightning.system.identity import public_name

_MAX_REASON_CHARACTERS = 300


@dataclass(frozen=True, slots=True)
class Grade:
    """The result of grading one response.

    Attributes:
        format_correct: Whether the response has the required format.
        answer_correct: Whether its answer is right, regardless of the format.
        failure: Why the reward is 0, as a short name of the grader; None if it is 1.
        timed_out: Whether grading took too long, which counts as wrong.
        strict_format_correct: Whether the format is also exact; None for graders without a strict format.
        answer: What the grader read as the answer; None if it found none. maj@k counts votes for it.
    """

    format_correct: bool
    answer_correct: bool
    failure: str | None = None
    timed_out: bool = False
    strict_format_correct: bool | None = None
    answer: str | None = field(default=None, compare=False)  # grades with equal verdicts are equal

    @property
    def reward(self) -> float:
        """1.0 for the right answer in the right format, else 0.0."""
        return float(self.format_correct and self.answer_correct)


class Grader(ABC):
    """Grades one response. Any class with a method ``grade`` like this one is a grader and need not inherit from it.

    ``grade_all`` runs copies of a grader in separate processes, which are killed at a time limit. State that a copy
    collects is lost. Other processes must be able to import the class: define it in a module, not in a notebook or in
    the script that you start.

    Attributes:
        time_limit_seconds: Time limit of one response. Beyond it the answer counts as wrong.
        bounds_itself: Whether ``grade`` returns soon for every response and may be called from several threads. Such
            a grader runs in the calling process.
        version: Part of the token cache's key where ``data.filter_correct`` is on. Raise it whenever a change of the
            class changes verdicts.

    Example:
        >>> class Shorter:
        ...     def grade(self, response, ground_truth):
        ...         return Grade(format_correct=True, answer_correct=len(response) < ground_truth)
        >>> issubclass(Shorter, Grader)
        True
    """

    time_limit_seconds: float = 10.0
    bounds_itself: bool = False
    version: ClassVar[int] = 1

    @abstractmethod
    def grade(self, response: str, ground_truth: Any) -> Grade:
        """Returns the grade of a response, which may be any text.

        An exception ends the evaluation with a ``UserError`` that names the row, except for ``MemoryError`` and
        ``RecursionError``, which count as wrong.
        """

    @classmethod
    def __subclasshook__(cls, other: type) -> Any:
        return True if cls is Grader and callable(getattr(other, "grade", None)) else NotImplemented


def grade_row(grader: Grader, row: int, response: str, ground_truth: Any) -> Grade:
    """Returns the grade of one response.

    Args:
        grader: Grades the response.
        row: Number of the row, for error messages.
        response: Text that the model wrote.
        ground_truth: The reference for the grader.

    Raises:
        UserError: If the grader raises an exception, or does not return a ``Grade``.
    """
    try:
        grade = grader.grade(response, ground_truth)
    except UserError:
        raise
    except (MemoryError, RecursionError):
        return Grade(format_correct=False, answer_correct=False, failure="crashed")
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:_MAX_REASON_CHARACTERS]
        place = f"{Path(where.filename).name}, line {where.lineno}"
        raise UserError(f"grader {public_name(type(grader))} failed on row {row}: {reason} ({place})") from error
    if not isinstance(grade, Grade):
        found = type(grade).__name__
        raise UserError(f"grader {public_name(type(grader))} returned a {found} for row {row}; it must return a Grade")
    return grade
