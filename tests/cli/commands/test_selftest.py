"""Test the command sft-lightning selftest."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import yaml
from transformers import Qwen2Model

from sft_lightning.cli.main import main


@pytest.fixture
def config(model_folder, train_file, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    path = tmp_path / "config.yaml"
    values = {
        "output_dir": str(tmp_path / "run"),
        "data": {"train_path": train_file, "val_path": "nowhere.jsonl", "max_length": 512, "batch_size": 2},
        "model": {"model_path": model_folder},
        "trainer": {"accelerator": "cpu", "accumulate_grad_batches": 2},
    }
    path.write_text(yaml.safe_dump(values))
    return ["selftest", "--config", str(path)]


def test_a_correct_model_passes_and_no_files_remain(config, tmp_path, capsys):
    assert main(config) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["check", "largest", "difference", "allowed", "where"]
    assert lines[-2].split()[:8] == ["resume,", "step", "3", "to", "5", "0", "0", "pass"]
    # The loss, three layouts in splits of 2 x 2, 1 x 4 and 4 x 1, and the resume.
    assert lines[-1] == "all 11 checks pass"
    assert sum("  pass  " in line for line in lines) == 11
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.yaml", "temporary"]
    assert list((tmp_path / "temporary").iterdir()) == []


def test_a_failed_check_gives_exit_code_1(config, tmp_path, capsys, monkeypatch):
    forward = Qwen2Model.forward

    def mixing(self, *args, **kwargs):
        output = forward(self, *args, **kwargs)
        if output.last_hidden_state.shape[1] > 40:  # which the guard's tiny examples do not have
            output.last_hidden_state = output.last_hidden_state + 1e-3 * output.last_hidden_state.mean(0, keepdim=True)
        return output

    monkeypatch.setattr(Qwen2Model, "forward", mixing)
    assert main(config) == 1
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("gradient, padded, 2 x 2, 32-true ") and "  FAIL  " in line for line in lines)
    assert any(line.startswith("gradient, padded, 1 x 4, 32-true ") and "  pass  " in line for line in lines)
    assert lines[-1].endswith(" checks FAIL")
    assert list((tmp_path / "temporary").iterdir()) == []


def test_sixteen_bits_are_checked_after_float32(config, capsys):
    assert main([*config, "--trainer.precision", "bf16-mixed", "--model.attn_implementation", "eager"]) == 0
    printed = capsys.readouterr().out
    assert "\ngradient, packed, 2 x 2, 32-true " in printed
    assert "\ngradient, packed, 2 x 2, bf16-mixed " in printed
    assert printed.endswith("all 21 checks pass\n")


def test_a_tolerance_of_the_user(config, capsys):
    assert main([*config, "--tolerance", "1e-12"]) == 1
    assert "  1e-12  FAIL  " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--num_steps", "1"], "--num_steps must be at least 2, a full step and a short one, got 1"),
        (["--tolerance", "nan"], "--tolerance must be a positive number, got nan"),
        (["--data.train_path", "nowhere.jsonl"], "data.train_path: data path 'nowhere.jsonl' is not a file"),
        (["--model.lrr", "1"], "model.lrr"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(config, capsys, options, message):
    assert main([*config, *options]) == 2
    error = capsys.readouterr().err
    assert error.startswith("sft-lightning: error: ")
    assert message in error
    assert len(error.splitlines()) == 1


CONFIGS = Path(__file__).parents[3] / "configs"


@pytest.mark.slow
def test_the_quickstart_passes(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["prepare", "quickstart", "--output", "data/quickstart"]) == 0
    assert main(["selftest", "--config", str(CONFIGS / "quickstart.yaml")]) == 0
    assert capsys.readouterr().out.endswith("all 11 checks pass\n")
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


@pytest.mark.slow
def test_an_interrupt_leaves_no_files(config, tmp_path):
    temporary = tmp_path / "temporary"
    with subprocess.Popen(
        [sys.executable, "-m", "sft_lightning", *config, "--num_steps", "50"],
        env={**os.environ, "TMPDIR": str(temporary)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    ) as process:
        deadline = time.monotonic() + 120
        while not list(temporary.glob("sft-selftest-*")) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert list(temporary.glob("sft-selftest-*"))
        time.sleep(1)
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
    assert process.returncode != 0
    assert list(temporary.glob("sft-selftest-*")) == []
