"""Test the part of the command line that runs without heavy imports."""

import subprocess
import sys
import time

import pytest

from sft_lightning import __version__
from sft_lightning.cli import main as cli
from sft_lightning.errors import NonFiniteError, RunFailedError


def test_help_lists_every_command(capsys):
    assert cli.main(["--help"]) == 0
    printed = capsys.readouterr().out
    for command in (
        "prepare gsm8k",
        "prepare quickstart",
        "fit",
        "validate",
        "test",
        "predict",
        "evaluate",
        "compare",
        "replay",
    ):
        assert f"\n  {command} " in printed


def test_help_of_a_trainer_command_shows_the_typed_name(capsys):
    with pytest.raises(SystemExit):
        cli.main(["fit", "--help"])
    assert capsys.readouterr().out.startswith("usage: sft-lightning fit [")


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"sft-lightning {__version__}\n"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["fitt"], "unknown command 'fitt'; sft-lightning --help lists the commands"),
        (["prepare"], "the following arguments are required: source"),
        (["prepare", "gsm8k", "--input", "a"], "the following arguments are required: --output"),
        (["evaluate", "--model", "a"], "the following arguments are required: --data, --output"),
        (
            ["evaluate", "--model", "a", "--data", "b", "--output", "c", "--num_examples", "x"],
            "argument --num_examples: invalid int value: 'x'",
        ),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(capsys, args, message):
    assert cli.main(args) == 2
    assert capsys.readouterr().err == f"sft-lightning: error: {message}\n"


@pytest.mark.parametrize("command", [["report"], ["compare", "b"]])
def test_a_path_that_is_too_long_is_one_line(capsys, command):
    assert cli.main([*command, "a" * 300]) == 2
    assert capsys.readouterr().err == f"sft-lightning: error: path '{'a' * 60}...' is too long\n"


@pytest.mark.parametrize(
    ("error", "local_rank", "printed"),
    [
        (RunFailedError("no memory"), "0", "sft-lightning: error: no memory\n"),
        (RunFailedError("no memory"), "1", "sft-lightning: error: no memory\n"),
        (NonFiniteError("loss nan"), "0", "sft-lightning: error: loss nan\n"),
        (NonFiniteError("loss nan"), "1", ""),
    ],
)
def test_one_process_reports_a_failed_run_with_exit_code_1(capsys, monkeypatch, error, local_rank, printed):
    def fails(args):
        raise error

    monkeypatch.setattr(cli, "_run", fails)
    monkeypatch.setenv("LOCAL_RANK", local_rank)
    assert cli.main(["fit"]) == 1
    assert capsys.readouterr().err == printed


@pytest.mark.parametrize("option", ["--help", "--version"])
def test_nothing_heavy_is_imported_for(option):
    program = f"import sys; from sft_lightning.cli.main import main; main(['{option}']); print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "lightning", "transformers", "numpy", "jsonargparse"} & set(modules)


def test_python_m_runs_it():
    started = time.monotonic()
    command = [sys.executable, "-m", "sft_lightning", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == f"sft-lightning {__version__}\n"
    assert time.monotonic() - started < 5  # 0.1 s where the machine is idle; torch alone would take 3 s
