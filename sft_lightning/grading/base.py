"""What a grade is, and what every grader is held to."""

import traceback
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sft_lightning.errors import UserError
from sft_lightning.system.identity import public_name

_LONGEST_REASON = 300


@dataclass(frozen=True, slots=True)
class Grade:
    """What a grader found.

    Attributes:
        format_correct: Whether the response has the form that was asked for.
        answer_correct: Whether its answer is right, whatever the form.
        failure: Why the reward is 0, in one word of the grader's; None where it is 1.
        timed_out: Whether grading was given up, which counts as wrong.
        strict_format_correct: Whether the form also holds to the letter; None for graders that know no such thing.
        answer: What the grader read as the answer; None where it found none. Votes of maj@k are counted by it.
    """

    format_correct: bool
    answer_correct: bool
    failure: str | None = None
    timed_out: bool = False
    strict_format_correct: bool | None = None
    answer: str | None = field(default=None, compare=False)  # a note: equal grades are equal verdicts

    @property
    def reward(self) -> float:
        """1.0 for the right answer in the right form, else 0.0."""
        return float(self.format_correct and self.answer_correct)


class Grader(ABC):
    """Grades one response. Any class with such a ``grade`` is a grader, whether it inherits from this one or not.

    ``grade_all`` runs copies of a grader in processes of their own, which are killed at a time limit. What it learns
    while it grades stays there. It must be a class that another process can import: one of a module, not of a
    notebook or of the script that was started.

    Attributes:
        time_limit_seconds: What one response may take. Beyond it the answer counts as wrong.
        bounds_itself: Whether ``grade`` is sure to return soon, whatever the response, and may be called from several
            threads. Such a grader stays in the process that calls it.

    Example:
        >>> class Shorter:
        ...     def grade(self, response, ground_truth):
        ...         return Grade(format_correct=True, answer_correct=len(response) < ground_truth)
        >>> issubclass(Shorter, Grader)
        True
    """

    time_limit_seconds: float = 10.0
    bounds_itself: bool = False

    @abstractmethod
    def grade(self, response: str, ground_truth: Any) -> Grade:
        """Returns the grade of a response, for any text that a model may write.

        What it raises ends the evaluation with a ``UserError`` that names the row. Running out of memory or of
        recursion does not: that counts as wrong.
        """

    @classmethod
    def __subclasshook__(cls, other: type) -> Any:
        return True if cls is Grader and callable(getattr(other, "grade", None)) else NotImplemented


def grade_row(grader: Grader, row: int, response: str, ground_truth: Any) -> Grade:
    """Returns the grade of one response.

    Args:
        grader: What grades it.
        row: Its number, for the messages.
        response: What the model wrote.
        ground_truth: What it is graded against.

    Raises:
        UserError: If the grader raises something, or returns no ``Grade``.
    """
    try:
        grade = grader.grade(response, ground_truth)
    except UserError:
        raise
    except (MemoryError, RecursionError):
        return Grade(format_correct=False, answer_correct=False, failure="crashed")
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:_LONGEST_REASON]
        place = f"{Path(where.filename).name}, line {where.lineno}"
        raise UserError(f"grader {public_name(type(grader))} failed on row {row}: {reason} ({place})") from error
    if not isinstance(grade, Grade):
        found = type(grade).__name__
        raise UserError(f"grader {public_name(type(grader))} returned a {found} for row {row}; it must return a Grade")
    return grade
