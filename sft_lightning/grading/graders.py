"""Grade responses against their ground truths."""

import importlib
import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, Literal, get_args

from sft_lightning.errors import UserError
from sft_lightning.grading.base import Grade as Grade
from sft_lightning.grading.base import Grader as Grader
from sft_lightning.grading.base import grade_row
from sft_lightning.grading.math_equality import (
    accepted_answers,
    extract_answer,
    is_plain_number,
    last_number,
    same_text,
    stated_number,
    structures,
    unbox,
    without_lone_unit,
)
from sft_lightning.grading.math_processes import Verdict, close_idle_workers, compare
from sft_lightning.grading.sandbox import grade_isolated

Units = Literal["strict", "ignore"]

_TAG = re.compile("</?(?:think|answer)>")


class R1ZeroGrader(Grader):
    r"""Grades responses in r1_zero format.

    The format is right if the response contains ``</think> <answer>``, with exactly one space, and ``</answer>``. It
    is strictly right if the response also contains each of these three tags once, in this order, and no ``<think>``.
    The answer is everything after the last ``<answer>`` without closing tags, so text after the closing tag makes it
    wrong, or the last ``\boxed{}`` in it. It is right if it equals the ground truth, or one of a list: as text; as one
    plain number (sign, separators, one currency sign, one trailing %, which is ignored); or, if the whole answer is
    one expression, or a list, set, tuple, interval or matrix of those, according to math-verify in a separate process.

    Failures: ``timed_out``, ``crashed``, ``no_answer_tag``, ``no_closing_tag``, ``thought_not_closed``,
    ``text_after_answer``, ``wrong``.

    Args:
        time_limit_seconds: Time limit of math-verify for one answer. Beyond it the answer counts as wrong.
        units: Whether "18 apples" is wrong where the ground truth is 18, or the truth has a unit that the answer lacks:
            "strict" or "ignore". Another unit than the truth's is wrong in any case.

    Example:
        >>> grade = R1ZeroGrader().grade(" 9 times 8 </think> <answer> $72.00 </answer>", "72")
        >>> grade.format_correct, grade.answer_correct, grade.answer
        (True, True, '$72.00')
        >>> R1ZeroGrader().grade(" 9 times 8 </think> <answer> 72 apples </answer>", "72").failure
        'wrong'
    """

    bounds_itself = True
    version = 2

    def __init__(self, time_limit_seconds: float = 5.0, units: Units = "strict") -> None:
        self.time_limit_seconds, self.units = _checked(time_limit_seconds, units)

    def grade(self, response: str, ground_truth: str | int | float | list) -> Grade:
        """Returns the grade of a response.

        Raises:
            UserError: If the ground truth is not a text, a number or a list of those.
        """
        answer = extract_answer(response)
        verdict = _compare(answer, ground_truth, self.time_limit_seconds, self.units)
        format_failure = _format_failure(response)
        failure = None
        if verdict in (Verdict.TIMED_OUT, Verdict.CRASHED):
            failure = verdict.value
        elif format_failure:
            failure = format_failure
        elif verdict is Verdict.DIFFERENT:
            failure = "text_after_answer" if response.rpartition("</answer>")[2].strip() else "wrong"
        in_order = _TAG.findall(response) == ["</think>", "<answer>", "</answer>"]
        return Grade(
            format_correct=format_failure is None,
            answer_correct=verdict is Verdict.EQUAL,
            failure=failure,
            timed_out=verdict is Verdict.TIMED_OUT,
            strict_format_correct=format_failure is None and in_order,
            answer=answer or None,
        )


class AnswerGrader(Grader):
    r"""Grades responses that are only an answer, or that end in ``\boxed{}`` like solutions of MATH.

    The answer is the last ``\boxed{}``, or else the whole response. It is compared as in ``R1ZeroGrader``. No format is
    required, so the format is always right.

    Args:
        time_limit_seconds: Time limit of math-verify for one answer. Beyond it the answer counts as wrong.
        units: Whether "18 apples" is wrong where the ground truth is 18, or the truth has a unit that the answer lacks:
            "strict" or "ignore". Another unit than the truth's is wrong in any case.

    Example:
        >>> AnswerGrader().grade(r"Six a side, so the answer is $\boxed{72}$.", 72).answer_correct
        True
        >>> AnswerGrader().grade("the answer is 72", 72).answer_correct
        False
    """

    bounds_itself = True
    version = 2

    def __init__(self, time_limit_seconds: float = 5.0, units: Units = "strict") -> None:
        self.time_limit_seconds, self.units = _checked(time_limit_seconds, units)

    def grade(self, response: str, ground_truth: str | int | float | list) -> Grade:
        """Returns the grade of a response.

        Raises:
            UserError: If the ground truth is not a text, a number or a list of those.
        """
        answer = unbox(response)
        verdict = _compare(answer, ground_truth, self.time_limit_seconds, self.units)
        failures = {Verdict.EQUAL: None, Verdict.DIFFERENT: "wrong"}
        return Grade(
            format_correct=True,
            answer_correct=verdict is Verdict.EQUAL,
            failure=failures.get(verdict, verdict.value),
            timed_out=verdict is Verdict.TIMED_OUT,
            answer=answer,
        )


class Gsm8kGrader(Grader):
    """Grades responses in the format of the solutions of GSM8K, which end in ``#### 72``.

    The format is right if the response contains ``####``. The answer is the first number after the first ``####``, or
    the result of a calculation there, like 42 in ``#### 6 x 7 = 42``; without ``####``, it is the last number of the
    response. It is right if it is the same number: separators, one currency sign and the text around the number do not
    matter.

    Failures: ``no_marker``, ``no_number``, ``wrong``.

    Example:
        >>> Gsm8kGrader().grade("6 times 12 is 72 eggs. #### 72", "72").reward
        1.0
        >>> Gsm8kGrader().grade("6 times 12 is 72 eggs.", "72").failure
        'no_marker'
    """

    bounds_itself = True
    version = 2

    def grade(self, response: str, ground_truth: str | int | float | list) -> Grade:
        """Returns the grade of a response.

        Raises:
            UserError: If the ground truth is not a number or a list of numbers.
        """
        truths = accepted_answers(ground_truth)
        if not all(map(is_plain_number, truths)):
            raise UserError(f"ground_truth {ground_truth!r} must be a number, or a list of numbers, for Gsm8kGrader")
        _, marker, end = response.partition("####")
        answer = stated_number(end.partition("####")[0]) if marker else last_number(response)
        is_right = answer is not None and any(same_text(answer, truth) for truth in truths)
        failure = "no_number" if answer is None else None if is_right else "wrong"
        return Grade(bool(marker), is_right, failure=failure if marker else "no_marker", answer=answer)


class ExactMatchGrader(Grader):
    r"""Grades responses that must equal the ground truth, or one of a list, except for surrounding whitespace.

    No format is required, so the format is always right.

    Args:
        ignore_case: Whether "Paris" and "paris" are equal.

    Example:
        >>> ExactMatchGrader().grade(" positive\n", "positive").reward
        1.0
    """

    bounds_itself = True

    def __init__(self, ignore_case: bool = False) -> None:
        self.ignore_case = ignore_case

    def grade(self, response: str, ground_truth: str | int | float | list) -> Grade:
        """Returns the grade of a response.

        Raises:
            UserError: If the ground truth is not a text, a number or a list of those.
        """
        texts = [response, *accepted_answers(ground_truth)]
        response, *truths = [text.strip().casefold() if self.ignore_case else text.strip() for text in texts]
        is_right = response in truths
        failure = None if is_right else "wrong"
        return Grade(format_correct=True, answer_correct=is_right, failure=failure, answer=response)


def grade_all(
    grader: Grader, responses: Sequence[str], ground_truths: Sequence[Any], *, num_workers: int | None = None
) -> list[Grade]:
    """Returns the grade of each response, in order.

    A grader that does not bound itself runs in separate processes: a response that takes too long or crashes the
    grader counts as wrong.

    Args:
        grader: Grades one response.
        responses: Texts that the model wrote.
        ground_truths: One for each response.
        num_workers: How many responses are graded at a time; None means the number of cores, at most 4.

    Raises:
        UserError: If the numbers of responses and ground truths differ, or the grader raises an exception.
    """
    if len(responses) != len(ground_truths):
        raise UserError(f"got {len(responses)} responses and {len(ground_truths)} ground_truths; give one for each")
    num_workers = num_workers or min(4, os.cpu_count() or 1)
    if not getattr(grader, "bounds_itself", False):
        return grade_isolated(grader, responses, ground_truths, num_workers) if responses else []
    executor = ThreadPoolExecutor(num_workers)
    try:
        return list(executor.map(partial(grade_row, grader), range(len(responses)), responses, ground_truths))
    finally:
        executor.shutdown(cancel_futures=True)
        close_idle_workers()


def grader_named(name: str, **settings: Any) -> Grader:
    """Returns a grader by its name in this module or its import path.

    Args:
        name: For example ``R1ZeroGrader``, or ``my_graders.Rubric``.
        settings: Arguments; the others have their defaults.

    Raises:
        UserError: If there is no such class, or it requires other arguments.
    """
    module, _, attribute = name.rpartition(".")
    try:
        grader = getattr(importlib.import_module(module or __name__), attribute)(**settings)
    except (ImportError, AttributeError, TypeError) as error:
        raise UserError(f"grader '{name}' cannot be created: {error}") from error
    if not isinstance(grader, Grader):
        raise UserError(f"grader '{name}' has no method grade(response, ground_truth)")
    return grader


def _compare(answer: str, ground_truth: str | int | float | list, time_limit_seconds: float, units: Units) -> Verdict:
    pairs = [(answer, unbox(truth)) for truth in accepted_answers(ground_truth)]
    if units == "ignore":
        pairs = [without_lone_unit(*pair) for pair in pairs]
    by_text = [same_text(*pair) for pair in pairs]
    if any(by_text):
        return Verdict.EQUAL
    verdicts = [Verdict.DIFFERENT]
    for pair, equal in zip(pairs, by_text, strict=True):
        if equal is None:
            verdicts.append(compare(*structures(*pair), time_limit_seconds))
            if verdicts[-1] is Verdict.EQUAL:
                return Verdict.EQUAL
    order = (Verdict.TIMED_OUT, Verdict.CRASHED, Verdict.DIFFERENT)
    return min(verdicts, key=order.index)


def _checked(time_limit_seconds: float, units: Units) -> tuple[float, Units]:
    if not 0 < time_limit_seconds < float("inf"):
        raise UserError(f"time_limit_seconds {time_limit_seconds} must be a positive number of seconds")
    if units not in get_args(Units):
        raise UserError(f"units '{units}' is unknown; choose {' or '.join(get_args(Units))}")
    return time_limit_seconds, units


def _format_failure(response: str) -> str | None:
    if "<answer>" not in response:
        return "no_answer_tag"
    if "</answer>" not in response:
        return "no_closing_tag"
    return None if "</think> <answer>" in response else "thought_not_closed"
