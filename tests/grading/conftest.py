"""Track the grading processes of a test, and assert that none remains."""

import os
import subprocess

import pytest

from sft_lightning.grading import math_processes


@pytest.fixture(scope="module", autouse=True)
def _no_worker_survives():
    yield
    math_processes.close_idle_workers()


@pytest.fixture
def started(monkeypatch):
    """The grading processes that a test starts. In the end none is alive, and none a zombie."""
    math_processes.close_idle_workers()
    processes = []

    class Recorded(subprocess.Popen):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            processes.append(self)

    monkeypatch.setattr(subprocess, "Popen", Recorded)
    yield processes
    math_processes.close_idle_workers()
    for process in processes:
        with pytest.raises(ChildProcessError):
            os.waitpid(process.pid, os.WNOHANG)
