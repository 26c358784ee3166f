"""Test real worker processes of a real fit that are killed or stopped from outside."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from torch.utils.data import DataLoader

from sft_lightning.data.batching.workers import WatchedWorkers
from sft_lightning.errors import RunFailedError


class Numbers:
    """A data set whose items name the process that made them."""

    def __len__(self):
        return 60

    def __getitem__(self, index):
        time.sleep(0.02)
        if index == 50:
            raise ValueError("no such number")
        return index, os.getpid()


def watched(timeout_seconds=60):
    loader = DataLoader(Numbers(), batch_size=None, num_workers=2)
    return WatchedWorkers(lambda: iter(loader), 2, timeout_seconds)


def is_alive(pid):
    """Whether a process runs; one that ended and was not waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_workers_error_is_kept_and_torchs_handler_removed():
    before = signal.getsignal(signal.SIGCHLD)
    with pytest.raises(ValueError, match="no such number"):
        assert [number for number, _ in watched()] == []
    assert signal.getsignal(signal.SIGCHLD) == before


@pytest.mark.slow  # torch looks every five seconds
def test_a_killed_worker_is_named_and_others_end():
    batches = watched()
    pids = {next(batches)[1], next(batches)[1]}
    os.kill(min(pids), signal.SIGKILL)
    with pytest.raises(RunFailedError) as raised:
        list(batches)
    assert f"died: pid {min(pids)} by SIGKILL, of data.num_workers 2." in str(raised.value)
    assert isinstance(raised.value.__cause__, Exception)
    assert not any(map(is_alive, pids))


@pytest.mark.slow
def test_a_stopped_worker_causes_an_error_in_time():
    batches = watched(timeout_seconds=1)
    pids = {next(batches)[1], next(batches)[1]}
    os.kill(max(pids), signal.SIGSTOP)
    started = time.monotonic()
    with pytest.raises(RunFailedError, match=r"hangs: of data\.num_workers 2 \(pid \d+, \d+\)"):
        list(batches)
    assert time.monotonic() - started < 30
    assert not any(map(is_alive, pids))


def test_an_abandoned_iterator_leaves_no_thread_or_process():
    before = set(threading.enumerate())
    batches = watched()
    pids = {next(batches)[1], next(batches)[1]}
    (watch,) = [thread for thread in set(threading.enumerate()) - before if thread.name == "worker-watch"]
    del batches
    watch.join(10)
    assert not watch.is_alive()
    assert not any(map(is_alive, pids))


@pytest.fixture
def start_fit(model_folder, tmp_path):
    """Starts a long fit with two workers, and returns it with the workers' ids once it has saved a checkpoint."""
    started = []
    train_file = tmp_path / "train.jsonl"  # so long that workers do not end with their epoch
    train_file.write_text("".join(json.dumps({"prompt": f"{n}:", "response": f" {n}"}) + "\n" for n in range(5000)))

    def start(*options):
        run = tmp_path / "run"
        command = [sys.executable, "-m", "sft_lightning", "fit", "--model.model_path", model_folder]
        command += ["--data.train_path", str(train_file), "--data.num_workers", "2", "--data.batch_size", "1"]
        command += ["--trainer.max_epochs", "2000", "--trainer.accumulate_grad_batches", "2"]
        command += ["--trainer.accelerator", "cpu", "--checkpoint.every_n_train_steps", "5", "--checkpoint.keep_last"]
        command += ["2", "--output_dir", str(run), *options]
        fit = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
        started.append(fit)
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and fit.poll() is None:
            workers = children(fit.pid)
            if len(workers) == 2 and (run / "last").exists():
                return fit, workers, run
            time.sleep(0.01)
        fit.kill()
        pytest.fail(f"the run did not get going: {fit.communicate()[1][-2000:]}")

    yield start
    for fit in started:
        fit.kill()
        fit.wait()


def children(pid):
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def ends_in_one_line(fit, run, within):
    """Returns the error line of a fit that ended as it should."""
    session = set(children(fit.pid))
    _, output = fit.communicate(timeout=within)
    assert fit.returncode == 1, output
    assert "Traceback" not in output
    *_, line = output.strip().splitlines()
    assert line.startswith("sft-lightning: error: ")
    assert (run / "last" / "manifest.json").is_file()
    time.sleep(0.2)
    assert not any(map(is_alive, session))
    return line


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds the workers in /proc")
def test_the_run_ends_when_a_worker_is_killed(start_fit, note_fault):
    fit, workers, run = start_fit()
    os.kill(workers[0], signal.SIGKILL)
    line = ends_in_one_line(fit, run, within=60)
    assert f"pid {workers[0]} by SIGKILL, of data.num_workers 2" in line
    assert not any(map(is_alive, workers))
    note_fault(
        "data worker killed",
        provoked="SIGKILL to one of two workers of a running fit",
        outcome="exit 1, one line that names the worker and data.num_workers; no process is left",
        lost="steps since the last checkpoint",
    )


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds the workers in /proc")
def test_the_run_ends_when_a_worker_hangs(start_fit, note_fault):
    fit, workers, run = start_fit("--data.worker_timeout_seconds", "3")
    os.kill(workers[1], signal.SIGSTOP)
    line = ends_in_one_line(fit, run, within=60)
    assert "data.worker_timeout_seconds 3" in line
    assert not any(map(is_alive, workers))
    note_fault(
        "data worker hangs",
        provoked="SIGSTOP to one of two workers of a running fit",
        outcome="exit 1 within data.worker_timeout_seconds, in one line; the stopped process is killed",
        lost="steps since the last checkpoint",
    )
