"""Compare expressions in processes that are started when needed and killed when they take too long."""

import atexit
import contextlib
import json
import os
import sys
from enum import Enum
from pathlib import Path

from sft_lightning.grading.structure import Structure
from sft_lightning.grading.worker_process import NoReplyError, WorkerProcess

_PROGRAM = Path(__file__).with_name("math_worker.py")


class Verdict(Enum):
    """What a comparison of two expressions found."""

    EQUAL = "equal"
    DIFFERENT = "different"
    TIMED_OUT = "timed_out"
    CRASHED = "crashed"


_idle_workers: list[WorkerProcess] = []


def compare(answer: Structure, truth: Structure, time_limit_seconds: float) -> Verdict:
    """Returns whether two answers are mathematically equal.

    Several threads may call it: each has a process to itself while it waits.

    Args:
        answer: A structure as ``math_equality.structures`` returns it.
        truth: Likewise.
        time_limit_seconds: The process is killed after this time, which does not include its start.

    Raises:
        RuntimeError: If the process does not start.
    """
    worker = _take_worker()
    task = json.dumps([answer, truth, time_limit_seconds]) + "\n"
    try:
        reply = worker.ask(task.encode("ascii"), time_limit_seconds)
    except NoReplyError as failure:
        worker.close()
        return Verdict(str(failure))
    except BaseException:  # an interrupt leaves a reply unread
        worker.close()
        raise
    _idle_workers.append(worker)
    return Verdict.EQUAL if json.loads(reply) else Verdict.DIFFERENT


def close_idle_workers() -> None:
    """Ends the processes that no thread waits for. The next comparison starts a new one."""
    with contextlib.suppress(IndexError):  # a check before would not do: another thread may take the last one
        while True:
            _idle_workers.pop().close()


def _take_worker() -> WorkerProcess:
    while True:
        try:
            worker = _idle_workers.pop()
        except IndexError:
            return _start_worker()
        if worker.is_alive:
            return worker
        worker.close()


def _start_worker() -> WorkerProcess:
    with contextlib.suppress(NoReplyError):
        worker = WorkerProcess(_PROGRAM)
        if worker.greeting == b"ready\n":
            return worker
        worker.close()
    raise RuntimeError(f"a grading process did not start: '{sys.executable} {_PROGRAM}' says why")


atexit.register(close_idle_workers)
os.register_at_fork(after_in_child=_idle_workers.clear)  # they belong to the parent
