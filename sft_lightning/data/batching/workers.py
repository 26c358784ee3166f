"""Manage the worker processes that collate: report one that dies or hangs, and end all of them with the run."""

import multiprocessing
import signal
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from typing import TYPE_CHECKING

from sft_lightning.errors import RunFailedError

if TYPE_CHECKING:
    from sft_lightning.data.batch import MicroBatch

_LOOK_EVERY_SECONDS = 0.5
_KILLED_WITHIN_SECONDS = 5.0


class WatchedWorkers:
    """Iterates over micro-batches that worker processes collate.

    Args:
        start: Returns torch's iterator. The processes that it starts are the workers.
        num_workers: Number of workers.
        timeout_seconds: The longest wait for a micro-batch.

    Raises:
        RunFailedError: From ``next``, if a worker died or no micro-batch came in time. All workers are ended first.
    """

    def __init__(self, start: "Callable[[], Iterator[MicroBatch]]", num_workers: int, timeout_seconds: int) -> None:
        before = multiprocessing.active_children()
        with _no_handler_of_deaths():
            self._batches = start()
        self._workers = [child for child in multiprocessing.active_children() if child not in before]
        self._num_workers = num_workers
        self._timeout_seconds = timeout_seconds
        self._wait = _Wait()
        ended = threading.Event()
        weakref.finalize(self, ended.set)
        watch = (self._wait, self._workers, timeout_seconds, ended)
        threading.Thread(target=_kill_in_time, args=watch, name="worker-watch", daemon=True).start()

    def __iter__(self) -> "Iterator[MicroBatch]":
        return self

    def __next__(self) -> "MicroBatch":
        self._wait.number += 1
        self._wait.is_on = True
        try:
            return next(self._batches)
        except StopIteration:
            raise
        except Exception as error:  # torch's for a missing worker, or the operating system's during a transfer
            died = [f"pid {worker.pid} {_describe_end(worker)}" for worker in self._workers if worker.exitcode]
            if not self._wait.was_too_long and not died:
                raise  # an error inside a worker
            for worker in self._workers:
                worker.kill()
            for worker in self._workers:
                worker.join(_KILLED_WITHIN_SECONDS)
            raise RunFailedError(self._describe(died)) from error
        finally:
            self._wait.is_on = False

    def _describe(self, died: list[str]) -> str:
        if self._wait.was_too_long:
            return (
                f"a worker process that collates micro-batches hangs: of data.num_workers {self._num_workers} (pid "
                f"{', '.join(str(worker.pid) for worker in self._workers)}) none brought the next one within "
                f"data.worker_timeout_seconds {self._timeout_seconds}. On a slow disk raise it; data.num_workers 0 "
                "collates in the main process. The last checkpoint is untouched"
            )
        return (
            f"a worker process that collates micro-batches died: {' and '.join(died)}, of data.num_workers "
            f"{self._num_workers}. SIGKILL is often the system's when memory runs out: lower data.num_workers, 0 "
            "collates in the main process. The last checkpoint is untouched"
        )


def ignore_signals(worker: int) -> None:
    """Ignores the signals that schedulers send to all processes of a job. Call it in each worker."""
    for each in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(each, signal.SIG_IGN)


@dataclass
class _Wait:
    """The state of the main thread's wait for a micro-batch, shared with the watching thread."""

    number: int = 0
    is_on: bool = False
    was_too_long: bool = False


def _kill_in_time(wait: _Wait, workers: list[BaseProcess], timeout_seconds: int, ended: threading.Event) -> None:
    """Kills the workers when a wait for them lasts too long, which raises an error in the waiting thread.

    torch's time-out does not suffice: it covers the wait for a message, but not for the tensor of that message, which a
    stopped worker never sends.
    """
    # Counts turns, since a clock would advance while the user suspends the job.
    turns, last = 0, 0
    while not ended.wait(_LOOK_EVERY_SECONDS):
        turns = turns + 1 if wait.is_on and wait.number == last else 0
        last = wait.number
        if turns * _LOOK_EVERY_SECONDS >= timeout_seconds:
            wait.was_too_long = True
            for worker in workers:
                worker.kill()  # no other signal ends a suspended process
            return


@contextmanager
def _no_handler_of_deaths() -> Iterator[None]:
    """Removes the handler of SIGCHLD that torch sets in the block.

    It raises an error wherever the program is when a worker dies, for example in the middle of an update or of a
    checkpoint. Without it, torch notices a dead worker when its micro-batch does not come.
    """
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "SIGCHLD"):
        yield  # torch sets no handler here either
        return
    before = signal.getsignal(signal.SIGCHLD)
    try:
        yield
    finally:
        if before is not None:  # None: a handler that was not set from Python
            signal.signal(signal.SIGCHLD, before)


def _describe_end(worker: BaseProcess) -> str:
    code = worker.exitcode or 0
    return f"by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
