"""Run a program that answers tasks in a separate process, which a time limit or a crash may end.

:class:`WorkerProcess` is the side of the caller. :func:`open_streams` and :func:`time_limit` are the side of the
program, which loads this file by its path: nothing here imports the package.

Not ``multiprocessing``, which would import or fork the calling program.
"""

import contextlib
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

# A program imports much before it greets.
_START_LIMIT_SECONDS = 120.0
# The alarm of the program itself comes first, unless something in it uses SIGALRM too.
_GRACE_SECONDS = 1.0


class NoReplyError(Exception):
    """A process that died or took too long. The text is the failure of a grade: ``crashed`` or ``timed_out``."""


class WorkerProcess:
    """A process that runs a program, and its pipes. Only one thread may ask at a time; any thread may kill it.

    Args:
        program: A Python file that reads tasks from its standard input and answers each with one line.
        first_task: Sent at the start. The program replies to it, or without one, with its greeting.

    Attributes:
        greeting: The first line of the program.

    Raises:
        NoReplyError: If the program dies before its greeting, or sends none.
    """

    def __init__(self, program: Path, first_task: bytes = b"") -> None:
        # -P keeps the folder of the program, whose files may have any name, out of the import path. The new session
        # shields the process from a Ctrl-C, and its process group ends the child processes with the program.
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(program)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._tasks, self._replies = self._process.stdin, self._process.stdout
        try:
            self.greeting = self.ask(first_task, _START_LIMIT_SECONDS)
        except BaseException:
            self.close()
            raise

    @property
    def is_alive(self) -> bool:
        return self._process.poll() is None

    def ask(self, task: bytes, time_limit_seconds: float) -> bytes:
        """Returns the line that answers a task.

        Raises:
            NoReplyError: If the process dies, or does not answer in time. Close it then.
        """
        started = time.monotonic()
        reply = b""
        with contextlib.suppress(BrokenPipeError):
            self._tasks.write(task)
            self._tasks.flush()
            poll = select.poll()
            poll.register(self._replies, select.POLLIN)
            if poll.poll((time_limit_seconds + _GRACE_SECONDS) * 1000):
                reply = self._replies.readline()
        if reply.endswith(b"\n"):
            return reply
        raise NoReplyError("timed_out" if time.monotonic() - started >= time_limit_seconds else "crashed")

    def kill(self) -> None:
        """Ends the process and everything that it started. Whoever waits for a reply gets none."""
        # Once the process has been waited for, its number may belong to another group.
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)

    def close(self) -> None:
        """Ends the process and closes its pipes."""
        self.kill()
        self._process.wait()
        self._replies.close()
        with contextlib.suppress(BrokenPipeError):  # a task that the process did not read
            self._tasks.close()


def open_streams() -> tuple[BinaryIO, Callable[[str], None]]:
    """Returns the tasks of a program and what sends one line as a reply. To be called first in the program.

    From then on the rest of the program reads nothing and prints to standard error. Signals that schedulers send to
    all processes of a job are ignored: the caller decides what happens to its workers.
    """
    tasks = os.fdopen(os.dup(sys.stdin.fileno()), "rb")
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="ascii")
    os.dup2(os.open(os.devnull, os.O_RDONLY), sys.stdin.fileno())
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    # Inherited from the caller, either could disable the time limit.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGALRM})
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)

    def reply(line: str) -> None:
        print(line, file=replies, flush=True)

    return tasks, reply


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Kills this process with SIGALRM if the block takes longer, even if the block hangs or the caller has died."""
    signal.setitimer(signal.ITIMER_REAL, seconds)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
