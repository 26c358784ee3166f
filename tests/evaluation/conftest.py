"""Grading processes: the ones that a test starts, and none left behind."""

import subprocess

import pytest

from sft_lightning.evaluation import grading_pool


@pytest.fixture(scope="module", autouse=True)
def _no_worker_survives():
    yield
    grading_pool.close_idle_workers()


@pytest.fixture
def started(monkeypatch):
    """The grading processes that a test starts; in the end each of them has been waited for."""
    grading_pool.close_idle_workers()
    processes = []

    class Recorded(subprocess.Popen):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            processes.append(self)

    monkeypatch.setattr(subprocess, "Popen", Recorded)
    yield processes
    grading_pool.close_idle_workers()
    assert [process.returncode for process in processes if process.returncode is None] == []
