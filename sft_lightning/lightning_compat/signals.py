"""Turn signals into a request to stop that all ranks agree on, and end the processes of a run that failed."""

import os
import signal
import subprocess
import time
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.plugins.environments import LightningEnvironment


class StopRequest:
    """A request to stop the run after the current optimizer step.

    A signal may reach only some processes. Each process therefore adds its own request to the reduction that every
    optimizer step makes anyway, and acts on what all of them agreed on.

    Attributes:
        is_made: Whether this process was asked to stop.
        is_agreed: Whether any process had been asked at the last optimizer step; the same in all processes.
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forgets the request of an earlier run."""
        self.is_made = self.is_agreed = False

    def make(self) -> None:
        """Asks the run to stop. Safe to call in a signal handler."""
        self.is_made = True


def install_signal_handlers(trainer: Trainer, stop_request: StopRequest) -> None:
    """Makes SIGTERM and SIGUSR1 ask the run to stop while the Trainer runs. Call it in ``on_fit_start``.

    These handlers replace Lightning's own, which broadcast from within a signal while the other ranks do not wait for
    it, and under SLURM save a checkpoint of another kind in mid-step. Lightning restores the earlier handlers at the
    end.
    """
    connector = trainer._signal_connector
    environment = trainer._accelerator_connector.cluster_environment
    signals = {signal.SIGTERM, signal.SIGUSR1, getattr(environment, "requeue_signal", None) or signal.SIGUSR1}
    main_process = os.getpid()

    def handle(number: int, frame: Any) -> None:
        if os.getpid() == main_process:
            stop_request.make()
        else:  # a forked process, which has nothing to save
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def register() -> None:
        type(connector).register_signal_handlers(connector)
        for each in signals:
            connector._register_signal(each, handle)

    connector.register_signal_handlers = register  # type: ignore[method-assign]


def is_watched_by_rank_zero(trainer: Trainer) -> bool:
    """Returns whether rank 0 started this process, and is killed as soon as this process exits with an error."""
    environment = trainer._accelerator_connector.cluster_environment
    return isinstance(environment, LightningEnvironment) and not trainer.is_global_zero


def end_other_ranks(trainer: Trainer, grace_seconds: float = 10.0) -> None:
    """Waits for the processes that this one started, and kills those that do not end. For a run that failed.

    Lightning leaves a rank that hangs behind. It also kills this process when another rank ends first, possibly before
    this process has reported why.
    """
    started: list[subprocess.Popen] = getattr(trainer.strategy.launcher, "procs", [])
    processes = list(started)
    started.clear()  # Lightning's observer reads this list
    deadline = time.monotonic() + grace_seconds
    for process in processes:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
