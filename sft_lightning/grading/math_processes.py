"""Grading processes: started when first needed, one for each thread that asks, killed when they take too long."""

import atexit
import contextlib
import json
import os
import signal
import subprocess
import sys
from enum import Enum
from pathlib import Path

_PROGRAM = Path(__file__).with_name("math_worker.py")


class Verdict(Enum):
    """What a grading process made of two expressions."""

    EQUAL = "equal"
    DIFFERENT = "different"
    TIMED_OUT = "timed out"
    CRASHED = "crashed"


class _Worker:
    """One grading process. Not ``multiprocessing``: that would import or fork the program it is called from."""

    def __init__(self) -> None:
        # -P keeps this folder, whose files are named as they please, out of the import path. In a session of its own
        # the process does not see a Ctrl-C that is meant for the program.
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(_PROGRAM)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            encoding="ascii",
            start_new_session=True,
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._tasks, self._replies = self._process.stdin, self._process.stdout
        try:
            greeting = self._replies.readline()
        except BaseException:
            self.close()
            raise
        if greeting != "ready\n":
            self.close()
            raise RuntimeError(f"a grading process did not start: '{sys.executable} {_PROGRAM}' says why")

    @property
    def is_alive(self) -> bool:
        return self._process.poll() is None

    def compare(self, answer: str, truth: str, time_limit_seconds: float) -> Verdict:
        try:
            self._tasks.write(json.dumps([answer, truth, time_limit_seconds]) + "\n")
            self._tasks.flush()
            reply = self._replies.readline()
        except BrokenPipeError:
            reply = ""
        if reply:
            return Verdict.EQUAL if json.loads(reply) else Verdict.DIFFERENT
        return Verdict.TIMED_OUT if self._process.wait() == -signal.SIGALRM else Verdict.CRASHED

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        self._replies.close()
        with contextlib.suppress(BrokenPipeError):  # a task that died with its reader
            self._tasks.close()


_idle_workers: list[_Worker] = []


def compare(answer: str, truth: str, time_limit_seconds: float) -> Verdict:
    """Returns whether two LaTeX expressions are mathematically equal, found out in another process.

    Safe to call from several threads: each has a process to itself while it waits.

    Args:
        answer: A text that passed ``math_answer.same_text``.
        truth: Likewise.
        time_limit_seconds: The process is killed after this time. It does not count the process's own start.
    """
    worker = _take_worker()
    try:
        verdict = worker.compare(answer, truth, time_limit_seconds)
    except BaseException:  # an interrupt leaves a reply unread
        worker.close()
        raise
    if verdict in (Verdict.EQUAL, Verdict.DIFFERENT):
        _idle_workers.append(worker)
    else:
        worker.close()
    return verdict


def close_idle_workers() -> None:
    """Ends the processes that no one waits for. The next comparison starts a new one."""
    with contextlib.suppress(IndexError):  # asking first would not do: another thread may take the last one
        while True:
            _idle_workers.pop().close()


def _take_worker() -> _Worker:
    while True:
        try:
            worker = _idle_workers.pop()
        except IndexError:
            return _Worker()
        if worker.is_alive:
            return worker
        worker.close()


atexit.register(close_idle_workers)
os.register_at_fork(after_in_child=_idle_workers.clear)  # they belong to the parent
