"""Graders: a response and the ground truth in, right or wrong and why out."""

import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from sft_lightning.errors import UserError
from sft_lightning.evaluation.grading_pool import Verdict, close_idle_workers, compare
from sft_lightning.evaluation.math_answer import accepted_answers, expressions, extract_answer, same_text


@dataclass(frozen=True, slots=True)
class Grade:
    """What a grader found.

    Attributes:
        format_correct: Whether the response has the form that was asked for.
        answer_correct: Whether its answer is right, whatever the form.
        failure: Why the reward is 0, in one word of the grader's; None where it is 1.
        timed_out: Whether the comparison of the answers was given up, which counts as wrong.
        strict_format_correct: Whether the form also holds to the letter; None for graders that know no such thing.
        answer: What the grader read as the answer; None where it found none. Votes of maj@k are counted by it.
    """

    format_correct: bool
    answer_correct: bool
    failure: str | None = None
    timed_out: bool = False
    strict_format_correct: bool | None = None
    answer: str | None = None

    @property
    def reward(self) -> float:
        """1.0 for the right answer in the right form, else 0.0."""
        return float(self.format_correct and self.answer_correct)


class Grader(ABC):
    """Grades one response. ``grade_all`` calls it from several threads at once."""

    @abstractmethod
    def grade(self, response: str, ground_truth: Any) -> Grade:
        """Returns the grade of a response, for any text that a model may write."""


class R1ZeroGrader(Grader):
    r"""Grades responses of the r1_zero form.

    The format is right when ``</think> <answer>``, with exactly one space, and ``</answer>`` stand anywhere in the
    response. The answer is everything after the last ``<answer>`` with the closing tag removed, so that text after it
    spoils it, or the last ``\boxed{}`` in there. It is right when it equals the ground truth, or one of a list: as
    text; as one plain number (sign, separators, one currency sign, one trailing %, which is ignored); or, where the
    whole answer is one expression, by math-verify in a process of its own.

    Failures: ``timed_out``, ``crashed``, ``no_answer_tag``, ``no_closing_tag``, ``thought_not_closed``,
    ``text_after_answer``, ``wrong``.

    Args:
        time_limit_seconds: How long math-verify may take over one answer. Beyond it the answer counts as wrong.

    Example:
        >>> R1ZeroGrader().grade(" 9 times 8 </think> <answer> $72.00 </answer>", "72")
        Grade(format_correct=True, answer_correct=True, failure=None, timed_out=False, strict_format_correct=None)
        >>> R1ZeroGrader().grade(" 9 times 8 </think> <answer> 72 apples </answer>", "72").failure
        'wrong'
    """

    def __init__(self, time_limit_seconds: float = 5.0) -> None:
        if not 0 < time_limit_seconds < float("inf"):
            raise UserError(f"time_limit_seconds {time_limit_seconds} must be a positive number of seconds")
        self.time_limit_seconds = time_limit_seconds

    def grade(self, response: str, ground_truth: str | int | float | list) -> Grade:
        """Returns the grade of a response.

        Raises:
            UserError: If the ground truth is no text, number or list of those.
        """
        verdict = self._compare(extract_answer(response), accepted_answers(ground_truth))
        format_failure = _format_failure(response)
        failure = None
        if verdict in (Verdict.TIMED_OUT, Verdict.CRASHED):
            failure = verdict.name.lower()
        elif format_failure:
            failure = format_failure
        elif verdict is Verdict.DIFFERENT:
            failure = "text_after_answer" if response.rpartition("</answer>")[2].strip() else "wrong"
        return Grade(
            format_correct=format_failure is None,
            answer_correct=verdict is Verdict.EQUAL,
            failure=failure,
            timed_out=verdict is Verdict.TIMED_OUT,
        )

    def _compare(self, answer: str, truths: list[str]) -> Verdict:
        by_text = [same_text(answer, truth) for truth in truths]
        if any(by_text):
            return Verdict.EQUAL
        verdicts = [Verdict.DIFFERENT]
        for truth, equal in zip(truths, by_text, strict=True):
            if equal is None:
                verdicts.append(compare(*expressions(answer, truth), self.time_limit_seconds))
                if verdicts[-1] is Verdict.EQUAL:
                    return Verdict.EQUAL
        order = (Verdict.TIMED_OUT, Verdict.CRASHED, Verdict.DIFFERENT)
        return min(verdicts, key=order.index)


def grade_all(
    grader: Grader, responses: Sequence[str], ground_truths: Sequence[Any], *, num_workers: int | None = None
) -> list[Grade]:
    """Returns the grade of each response, in order.

    Args:
        grader: What grades one response.
        responses: What the model wrote.
        ground_truths: One for each response.
        num_workers: How many responses are graded at a time; None: as many as there are cores, at most 4.

    Raises:
        UserError: If there are not as many ground truths as responses.
    """
    if len(responses) != len(ground_truths):
        raise UserError(f"got {len(responses)} responses and {len(ground_truths)} ground_truths; give one for each")
    executor = ThreadPoolExecutor(num_workers or min(4, os.cpu_count() or 1))
    try:
        return list(executor.map(grader.grade, responses, ground_truths))
    finally:
        executor.shutdown(cancel_futures=True)
        close_idle_workers()


def grader_identity(grader: Grader) -> str:
    """Returns text that tells graders apart: the class, where it comes from, and its public attributes."""
    kind = type(grader)
    options = {name: value for name, value in sorted(vars(grader).items()) if not name.startswith("_")}
    settings = ", ".join(f"{name}={value!r}" for name, value in options.items())
    return f"{kind.__module__}.{kind.__qualname__}({settings})"


def _format_failure(response: str) -> str | None:
    if "<answer>" not in response:
        return "no_answer_tag"
    if "</answer>" not in response:
        return "no_closing_tag"
    return None if "</think> <answer>" in response else "thought_not_closed"
