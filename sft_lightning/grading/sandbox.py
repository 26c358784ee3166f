"""Somebody's grader in processes of its own: killed at a time limit, and its crashes are no one else's."""

import contextlib
import json
import logging
import os
import pickle
import select
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from threading import Event
from typing import Any

from sft_lightning.errors import UserError
from sft_lightning.grading.base import Grade, Grader, grade_row

logger = logging.getLogger(__name__)

_PROGRAM = Path(__file__).with_name("sandbox_worker.py")
# It imports what the grader imports.
_START_LIMIT_SECONDS = 120.0
# The process's own alarm comes first, unless the grader uses SIGALRM itself.
_GRACE_SECONDS = 1.0


class _CannotStartError(RuntimeError):
    """The grader does not exist in another process; the text says why."""


class _NoReplyError(Exception):
    """The process died, or takes too long; the text is the failure of the grade."""


class _Process:
    """One copy of a grader. Not ``multiprocessing``: that would import or fork the program it is called from."""

    def __init__(self, pickled_grader: bytes) -> None:
        # The session is a process group too: what the grader starts ends with it. A Ctrl-C is not for this process.
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(_PROGRAM)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._tasks, self._replies = self._process.stdin, self._process.stdout
        self.is_usable = True
        try:
            content = self._ask((sys.path, pickled_grader), _START_LIMIT_SECONDS)
        except _NoReplyError as failure:
            content = {"error": f"its process {failure} at the start"}
        except BaseException:
            self.close()
            raise
        if "error" in content:
            self.close()
            raise _CannotStartError(content["error"])

    def grade(self, row: int, response: str, ground_truth: Any, time_limit_seconds: float) -> Grade:
        try:
            content = self._ask((row, response, ground_truth, time_limit_seconds), time_limit_seconds)
        except _NoReplyError as failure:
            self.is_usable = False
            reason = str(failure)
            return Grade(False, False, failure=reason, timed_out=reason == "timed_out")
        if "error" in content:
            raise UserError(content["error"])
        return Grade(**content["grade"])

    def kill(self) -> None:
        # Not after wait(): then the number may belong to another group.
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)

    def close(self) -> None:
        self.kill()
        self._process.wait()
        self._replies.close()
        with contextlib.suppress(BrokenPipeError):  # a task that died with its reader
            self._tasks.close()

    def _ask(self, task: tuple, time_limit_seconds: float) -> dict[str, Any]:
        started = time.monotonic()
        reply = b""
        with contextlib.suppress(BrokenPipeError):
            pickle.dump(task, self._tasks)
            self._tasks.flush()
            poll = select.poll()
            poll.register(self._replies, select.POLLIN)
            if poll.poll((time_limit_seconds + _GRACE_SECONDS) * 1000):
                reply = self._replies.readline()
        if reply.endswith(b"\n"):
            return json.loads(reply)
        raise _NoReplyError("timed_out" if time.monotonic() - started >= time_limit_seconds else "crashed")


def grade_isolated(
    grader: Grader, responses: Sequence[str], ground_truths: Sequence[Any], num_workers: int
) -> list[Grade]:
    """Returns the grade of each response, in order, found out in processes that time-outs and crashes end.

    A grader that cannot be pickled, or that another process cannot import, grades here, one response after the other.

    Raises:
        UserError: If the grader raises something, or returns no ``Grade``.
    """
    rows = range(len(responses))
    try:
        pickled = pickle.dumps(grader)
        processes = [_Process(pickled)]
    except Exception as error:
        name, reason = type(grader).__qualname__, " ".join(str(error).split())
        _say_once(f"grader {name} runs in this process and without a time limit: another one cannot have it ({reason})")
        return [grade_row(grader, *row) for row in zip(rows, responses, ground_truths, strict=True)]
    idle = list(processes)
    is_over = Event()
    time_limit_seconds = getattr(grader, "time_limit_seconds", Grader.time_limit_seconds)

    def grade(row: int) -> Grade:
        try:
            process = idle.pop()
        except IndexError:
            process = _Process(pickled)
            processes.append(process)
            if is_over.is_set():  # too late to be killed with the others
                process.kill()
        found = process.grade(row, responses[row], ground_truths[row], time_limit_seconds)
        if process.is_usable:
            idle.append(process)
        else:
            process.close()
        return found

    executor = ThreadPoolExecutor(num_workers)
    try:
        return list(executor.map(grade, rows))
    finally:
        # An interrupt, or a bug in the grader, waits for no one.
        is_over.set()
        for process in processes:
            process.kill()
        executor.shutdown(cancel_futures=True)
        for process in processes:
            process.close()


@cache
def _say_once(line: str) -> None:
    logger.warning("%s", line)
