import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.demos.boring_classes import BoringModel

from sft_lightning.lightning_compat.signals import StopRequest, end_other_ranks, install_signal_handlers


def quiet_trainer(*callbacks):
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    return Trainer(accelerator="cpu", callbacks=list(callbacks), max_steps=2, enable_model_summary=False, **quiet)


def test_a_request_counts_until_it_is_cleared():
    request = StopRequest()
    assert (request.is_made, request.is_agreed) == (False, False)
    request.make()
    request.is_agreed = True
    assert request.is_made
    request.clear()
    assert (request.is_made, request.is_agreed) == (False, False)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_signals_make_the_request_while_the_trainer_runs(number):
    request, seen = StopRequest(), []

    class Signals(Callback):
        def on_fit_start(self, trainer, module):
            install_signal_handlers(trainer, request)

        def on_train_batch_end(self, trainer, module, outputs, batch, index):
            if index == 0:
                seen.append(request.is_made)
                os.kill(os.getpid(), number)
                seen.append(request.is_made)

    before = signal.getsignal(number)
    quiet_trainer(Signals()).fit(BoringModel())
    assert seen == [False, True]
    assert signal.getsignal(number) == before


def test_a_forked_process_dies_of_the_signal_instead():
    exits = []

    class Forks(Callback):
        def on_fit_start(self, trainer, module):
            install_signal_handlers(trainer, StopRequest())

        def on_train_start(self, trainer, module):
            child = os.fork()
            if child == 0:
                os.kill(os.getpid(), signal.SIGTERM)
                os._exit(0)  # reached only if the signal did nothing
            exits.append(os.waitpid(child, 0)[1])

    torch.set_num_threads(1)
    quiet_trainer(Forks()).fit(BoringModel())
    assert [os.WTERMSIG(status) for status in exits] == [signal.SIGTERM]


def test_other_ranks_are_killed_after_the_grace_period():
    program = "import sys, time; time.sleep(float(sys.argv[1]))"
    processes = [subprocess.Popen([sys.executable, "-c", program, seconds]) for seconds in ("0", "600")]
    launcher = SimpleNamespace(procs=list(processes))
    started = time.monotonic()
    end_other_ranks(SimpleNamespace(strategy=SimpleNamespace(launcher=launcher)), grace_seconds=2.0)
    assert launcher.procs == []
    assert [process.wait(timeout=10) for process in processes] == [0, -signal.SIGKILL]
    assert time.monotonic() - started < 30
