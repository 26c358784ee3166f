"""Send signals to real runs: all ranks stop with a checkpoint at the next optimizer step, and a restart resumes."""

import contextlib
import csv
import os
import re
import signal
import subprocess
import sys
import time

import pytest

from sft_lightning.cli.main import main

# Long enough to be hit in the middle, on any machine.
LONG = ["--trainer.max_epochs", "500", "--checkpoint.every_n_train_steps", "100000", "--evaluation.num_examples", "0"]


@pytest.fixture
def start(command, tmp_path):
    """Starts the command in separate processes and kills those that remain at the end."""
    processes = []

    def popen(*options, program=(sys.executable, "-m", "sft_lightning"), **environment):
        with (tmp_path / f"output-{len(processes)}.txt").open("w") as output:
            process = subprocess.Popen(
                [*program, *command, *options],
                env={**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", **environment},
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        process.output = tmp_path / f"output-{len(processes)}.txt"
        processes.append(process)
        return process

    yield popen
    for process in processes:
        for pid in [*ranks_of(process), process.pid]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()


def wait_for_steps(run, num_steps, process):
    """Waits until a run has logged a number of optimizer steps."""
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        if (run / "metrics.csv").is_file() and len(steps(run)) >= num_steps:
            return
        time.sleep(0.01)
    raise AssertionError(process.output.read_text())


def steps(run):
    with (run / "metrics.csv").open() as file:
        return [int(row["step"]) for row in csv.DictReader(file) if row["step"]]


def ranks_of(process):
    """Returns the process ids of all ranks, rank 0 first."""
    shown = subprocess.run(["ps", "-eo", "pid=,ppid=,args="], capture_output=True, text=True, check=True)
    rows = [line.split(None, 2) for line in shown.stdout.splitlines() if len(line.split(None, 2)) == 3]
    family = {process.pid}
    for pid, parent, _ in sorted(rows, key=lambda row: int(row[0])):
        if int(parent) in family:
            family.add(int(pid))
    program = re.compile(r"sft_lightning(\.__main__)? fit ")  # of the second kind are those that Lightning starts
    named = {int(pid) for pid, _, arguments in rows if program.search(arguments) and "-m torch." not in arguments}
    return sorted(family & named)


def assert_it_goes_on_bit_equal(command, tmp_path, options=()):
    """Trains two steps more than the newest checkpoint has, by resuming it and straight through."""
    run = tmp_path / "run"
    (saved,) = {int(path.name.removeprefix("checkpoint-")) for path in run.glob("checkpoint-*")}
    end = [*LONG, *options, "--trainer.max_steps", str(saved + 2)]
    assert main([*command, *end, "--ckpt_path", "auto"]) == 0
    assert main([*command, *end, "--output_dir", str(tmp_path / "straight")]) == 0
    ours, theirs = ((tmp_path / name / "final" / "model.safetensors").read_bytes() for name in ("run", "straight"))
    assert ours == theirs
    assert steps(run) == list(range(1, saved + 3))


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_one_checkpoint_at_the_next_step_and_code_75(start, command, tmp_path, number, note_fault):
    process = start(*LONG)
    wait_for_steps(tmp_path / "run", 5, process)
    process.send_signal(number)
    process.send_signal(number)  # schedulers repeat themselves
    assert process.wait(timeout=60) == 75, process.output.read_text()
    printed = process.output.read_text()
    assert "stopped by a signal after optimizer step" in printed
    assert "Traceback" not in printed
    assert not (tmp_path / "run" / "final").exists()
    assert_it_goes_on_bit_equal(command, tmp_path)
    note_fault(
        f"{number.name} to a run",
        provoked="sent twice in mid-training",
        outcome="one checkpoint at the next optimizer step, exit code 75; `--ckpt_path auto` resumes bit-equal",
    )


@pytest.mark.slow
def test_a_signal_to_all_processes_spares_the_workers(start, tmp_path, note_fault):
    """Loader workers share the process group, as all that a job started share its cgroup."""
    process = start(*LONG, "--data.num_workers", "2")
    wait_for_steps(tmp_path / "run", 5, process)
    os.killpg(process.pid, signal.SIGTERM)
    assert process.wait(timeout=60) == 75, process.output.read_text()
    assert len(list((tmp_path / "run").glob("checkpoint-*"))) == 1
    note_fault(
        "SIGTERM to all processes of a job",
        provoked="a run with two loader workers, its whole process group",
        outcome="workers continue until the run stops: one checkpoint, exit code 75",
    )


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_to_any_rank_stops_all_of_them(start, command, tmp_path, rank, note_fault):
    options = ["--trainer.devices", "2", "--trainer.strategy", "ddp", "--data.batch_size", "2"]
    process = start(*LONG, *options)
    wait_for_steps(tmp_path / "run", 5, process)
    pids = ranks_of(process)
    assert len(pids) == 2, pids
    os.kill(pids[rank], signal.SIGTERM)
    assert process.wait(timeout=60) == 75, process.output.read_text()
    deadline = time.monotonic() + 30
    while ranks_of(process) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert ranks_of(process) == [], process.output.read_text()
    assert "Traceback" not in process.output.read_text()
    (checkpoint,) = (tmp_path / "run").glob("checkpoint-*")
    again = start(*LONG, *options, "--ckpt_path", "auto", "--trainer.max_steps", str(steps(tmp_path / "run")[-1] + 3))
    assert again.wait(timeout=120) == 0, again.output.read_text()
    assert f"--ckpt_path auto: '{checkpoint}'" in again.output.read_text()
    note_fault(
        "SIGTERM to one of two ranks",
        provoked="to rank 0, and to rank 1",
        outcome="both ranks save one checkpoint together and stop, exit code 75; the run resumes",
        tries=2,
    )


@pytest.mark.slow
def test_ctrl_c_twice_does_no_harm(start, command, tmp_path, note_fault):
    process = start(*LONG[:2], "--checkpoint.every_n_train_steps", "1", "--evaluation.num_examples", "0")
    tries = 0
    for _ in range(5):
        wait_for_steps(tmp_path / "run", 5 * (tries + 1), process)
        process.send_signal(signal.SIGINT)
        time.sleep(0.002 * tries)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 130, process.output.read_text()
        assert "Traceback" not in process.output.read_text()
        tries += 1
        process = start(
            *LONG[:2], "--checkpoint.every_n_train_steps", "1", "--evaluation.num_examples", "0", "--ckpt_path", "auto"
        )
    wait_for_steps(tmp_path / "run", 30, process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 75
    for old in sorted((tmp_path / "run").glob("checkpoint-*"))[:-1]:
        assert old.is_dir()
    assert not list((tmp_path / "run").glob(".*tmp*"))
    note_fault(
        "Ctrl-C twice",
        provoked="in quick succession, in a run that saves after each step",
        outcome="exit code 130, no traceback, nothing half-written; `--ckpt_path auto` resumes",
        tries=tries,
    )


@pytest.mark.slow
@pytest.mark.parametrize("variable", ["SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT"])
def test_a_restart_by_a_scheduler_resumes_by_itself(start, command, tmp_path, variable, note_fault):
    run = tmp_path / "run"
    process = start(*LONG, "--overwrite", **{variable: "0"})
    wait_for_steps(run, 5, process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 75
    (checkpoint,) = run.glob("checkpoint-*")
    end = ["--trainer.max_steps", str(int(checkpoint.name.removeprefix("checkpoint-")) + 2)]
    again = start(*LONG, "--overwrite", *end, **{variable: "1"})
    assert again.wait(timeout=120) == 0, again.output.read_text()
    assert "continues as with --ckpt_path auto" in again.output.read_text()
    assert checkpoint.is_dir()
    note_fault(
        "restart by SLURM or torchrun",
        provoked="SIGTERM, then the same command with the scheduler's restart count",
        outcome="resumes by itself, even if the command has --overwrite",
        tries=2,
    )


@pytest.mark.slow
def test_torchrun_restarts_a_killed_rank_and_the_run_resumes(start, tmp_path, monkeypatch, note_fault):
    run = tmp_path / "run"
    # Else gloo may find in torchrun's own store the addresses of processes that died.
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "--max_restarts", "1", "-m"]
    options = ["--trainer.devices", "2", "--trainer.strategy", "ddp", "--data.batch_size", "2"]
    saves = ["--checkpoint.every_n_train_steps", "20", "--trainer.max_steps", "200"]
    process = start(*LONG[:2], *options, *saves, program=(sys.executable, *torchrun, "sft_lightning"))
    wait_for_steps(run, 50, process)
    os.kill(ranks_of(process)[1], signal.SIGKILL)
    assert process.wait(timeout=200) == 0, process.output.read_text()
    printed = process.output.read_text()
    assert "restarted by torchrun: continues as with --ckpt_path auto" in printed
    assert f"--ckpt_path auto: '{run}/checkpoint-" in printed
    assert steps(run) == list(range(1, 201))
    assert (run / "final" / "model.safetensors").is_file()
    note_fault(
        "SIGKILL to one rank under torchrun",
        provoked="rank 1 of 2, with --standalone --max_restarts 1",
        outcome="torchrun restarts both ranks, which resume from the last checkpoint and finish",
        lost="the steps since that checkpoint, computed again",
    )
