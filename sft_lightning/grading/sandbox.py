"""Run a user's grader in separate processes, so that a time limit can end it and a crash stays isolated."""

import json
import logging
import pickle
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from threading import Event
from typing import Any

from sft_lightning.errors import UserError
from sft_lightning.grading.base import Grade, Grader, grade_row
from sft_lightning.grading.worker_process import NoReplyError, WorkerProcess

logger = logging.getLogger(__name__)

_PROGRAM = Path(__file__).with_name("sandbox_worker.py")


class _CannotStartError(RuntimeError):
    """A grader that another process cannot import. The text says why."""


def grade_isolated(
    grader: Grader, responses: Sequence[str], ground_truths: Sequence[Any], num_workers: int
) -> list[Grade]:
    """Returns the grade of each response, in order, from processes that time-outs and crashes may end.

    A grader that cannot be pickled, or that another process cannot import, runs in this process, one response after
    the other.

    Raises:
        UserError: If the grader raises something, or returns no ``Grade``.
    """
    rows = range(len(responses))
    try:
        pickled = pickle.dumps(grader)
        processes = [_start(pickled)]
    except Exception as error:
        name, reason = type(grader).__qualname__, " ".join(str(error).split())
        _warn_once(
            f"grader {name} runs in this process and without a time limit: another process cannot load it ({reason})"
        )
        return [grade_row(grader, *row) for row in zip(rows, responses, ground_truths, strict=True)]
    idle = list(processes)
    is_over = Event()
    time_limit_seconds = getattr(grader, "time_limit_seconds", Grader.time_limit_seconds)

    def grade(row: int) -> Grade:
        try:
            process = idle.pop()
        except IndexError:
            process = _start(pickled)
            processes.append(process)
            if is_over.is_set():  # too late to be killed with the others
                process.kill()
        task = pickle.dumps((row, responses[row], ground_truths[row], time_limit_seconds))
        try:
            content = json.loads(process.ask(task, time_limit_seconds))
        except NoReplyError as failure:
            process.close()
            return Grade(False, False, failure=str(failure), timed_out=str(failure) == "timed_out")
        if "error" in content:
            raise UserError(content["error"])
        idle.append(process)
        return Grade(**content["grade"])

    executor = ThreadPoolExecutor(num_workers)
    try:
        return list(executor.map(grade, rows))
    finally:
        # After an interrupt, or an error of the grader, nothing waits for the other responses.
        is_over.set()
        for process in processes:
            process.kill()
        executor.shutdown(cancel_futures=True)
        for process in processes:
            process.close()


def _start(pickled_grader: bytes) -> WorkerProcess:
    try:
        process = WorkerProcess(_PROGRAM, pickle.dumps((sys.path, pickled_grader)))
    except NoReplyError as failure:
        raise _CannotStartError(f"its process {failure} at the start") from None
    content = json.loads(process.greeting)
    if "error" in content:
        process.close()
        raise _CannotStartError(content["error"])
    return process


@cache
def _warn_once(line: str) -> None:
    logger.warning("%s", line)
