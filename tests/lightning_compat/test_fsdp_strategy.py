"""Test ModelParallelStrategy with one process. test_distributed.py tests several."""

import os
import subprocess
import sys

import pytest
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from sft_lightning.cli.main import main
from sft_lightning.distributed.fsdp import is_sharded


@pytest.fixture
def strategy():
    before = dict(os.environ)  # to which Lightning adds a port, a rank and a number of processes
    yield lambda: ModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=1)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    os.environ.clear()
    os.environ.update(before)


def test_checkpoints_are_those_of_any_strategy_and_resume_bit_equal(fit, tmp_path, strategy):
    saves = {"every_n_train_steps": 5}
    sharded = fit(tmp_path / "sharded", strategy=strategy(), devices=1, checkpoint=saves)
    assert is_sharded(sharded.module)
    plain = fit(tmp_path / "plain", devices=1, checkpoint=saves)
    assert sharded.losses == pytest.approx(plain.losses, rel=1e-5)
    for name in ("checkpoint-5", "final"):
        ours, theirs = (load_file(tmp_path / run / name / "model.safetensors") for run in ("sharded", "plain"))
        assert ours.keys() == theirs.keys()
        for key, tensor in theirs.items():
            torch.testing.assert_close(ours[key], tensor, rtol=1e-3, atol=1e-4)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "sharded" / "final").config.architectures == [
        "Qwen2ForCausalLM"
    ]
    checkpoint = str(tmp_path / "sharded" / "checkpoint-5")
    fit(tmp_path / "again", strategy=strategy(), devices=1, checkpoint=saves, ckpt_path=checkpoint)
    ours, theirs = (load_file(tmp_path / run / "final" / "model.safetensors") for run in ("again", "sharded"))
    assert all(torch.equal(ours[key], tensor) for key, tensor in theirs.items())
    unsharded = fit(tmp_path / "unsharded", devices=1, checkpoint=saves, ckpt_path=checkpoint)
    assert unsharded.losses == pytest.approx(plain.losses[5:], rel=1e-4)


def ways_to_split(data_parallel_size, tensor_parallel_size):
    name = "lightning.pytorch.strategies.ModelParallelStrategy"
    sizes = f"data_parallel_size: {data_parallel_size}, tensor_parallel_size: {tensor_parallel_size}"
    return ["--trainer.strategy", f"{{class_path: {name}, init_args: {{{sizes}}}}}"]


def test_mesh_sizes_that_mismatch_the_devices_are_one_line(command, capsys, strategy):
    assert main([*command, *ways_to_split(2, 1), "--trainer.devices", "1"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "trainer.strategy: The sizes `data_parallel_size=2` and `tensor_parallel_size=1`" in error
    assert error.endswith("Set data_parallel_size to the number of devices and tensor_parallel_size to 1")


@pytest.mark.slow
def test_splitting_tensors_is_refused_in_one_line(command):
    program = [sys.executable, "-m", "sft_lightning", *command, *ways_to_split(1, 2), "--trainer.devices", "2"]
    ended = subprocess.run(program, capture_output=True, text=True, timeout=200)
    assert ended.returncode == 2, ended.stderr
    assert "would split tensors over 2 devices, which is not supported: set tensor_parallel_size to 1" in ended.stderr
