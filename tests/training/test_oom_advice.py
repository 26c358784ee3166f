"""Test real runs that run out of memory under a limit of the operating system."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from sft_lightning.checkpointing import folder as checkpoint_folder
from sft_lightning.data.batch import Example
from sft_lightning.data.batching.collate import collate
from sft_lightning.errors import RunFailedError
from sft_lightning.training.module import SFTModule
from sft_lightning.training.oom_advice import generation_oom_advice, step_oom_advice

# A callback in a separate file sets the limit at a given point, in the process that runs the fit.
LIMIT = """
import resource
from lightning.pytorch import Callback


class LimitsMemory(Callback):
    def __init__(self, when):
        self.when = when

    def limit(self):
        kilobytes = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmSize"))
        resource.setrlimit(resource.RLIMIT_AS, (kilobytes * 1024,) * 2)

    def on_train_batch_start(self, trainer, module, batch, index):
        if self.when == "step" and trainer.global_step == 3:
            self.limit()

    def on_before_optimizer_step(self, trainer, module, optimizer):
        if self.when == "update":
            self.limit()

    def on_validation_start(self, trainer, module):
        if self.when == "validation" and not trainer.sanity_checking:
            self.limit()

    def on_validation_epoch_end(self, trainer, module):
        if self.when == "generation" and not trainer.sanity_checking:
            self.limit()
"""


@pytest.fixture
def limited_fit(tmp_path, model_folder):
    """Runs fit on long rows with the command line; after ``when`` it gets no more memory."""
    (tmp_path / "limits.py").write_text(LIMIT)
    for name, num_rows in (("train", 32), ("val", 4)):
        rows = [{"prompt": f"{n} " * 500, "response": f" {n}" * 300, "ground_truth": str(n)} for n in range(num_rows)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def fit(when, *options):
        callback = {"class_path": "limits.LimitsMemory", "init_args": {"when": when}}
        command = [sys.executable, "-m", "sft_lightning", "fit", "--model.model_path", model_folder]
        command += ["--data.train_path", "train.jsonl", "--data.batch_size", "4", "--data.max_length", "4096"]
        command += ["--trainer.accumulate_grad_batches", "1", "--trainer.max_epochs", "1", "--output_dir", "run"]
        command += ["--trainer.accelerator", "cpu", "--checkpoint.every_n_train_steps", "1"]
        command += ["--trainer.callbacks", json.dumps([callback]), *options]
        # Freed memory goes back at once, so that a limit at what the process has leaves it nothing.
        malloc = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_ARENA_MAX": "1"}
        path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
        # Nor a stack for another thread, so that none is to be started then.
        threads = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        environment = {**os.environ, **malloc, **threads, "PYTHONPATH": path}
        return subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120, check=False
        )

    return fit


def error_line(done):
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    *_, line = done.stderr.strip().splitlines()
    assert line.startswith("sft-lightning: error: out of memory in ")
    return line


linux = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the process's size in /proc")


@linux
@pytest.mark.slow
def test_a_step_without_memory_ends_the_run_in_one_line(limited_fit, tmp_path, note_fault):
    line = error_line(limited_fit("step"))
    assert "of optimizer step 4: a micro-batch of 4 rows, " in line
    assert "label positions, layout " in line
    assert "peak memory 0." in line
    assert "--data.batch_size 2 with --trainer.accumulate_grad_batches 2 (the same step)" in line
    assert "--model.gradient_checkpointing true; --trainer.precision bf16-mixed; --data.max_length below 4096" in line
    assert line.endswith(f"The last checkpoint, '{tmp_path}/run/checkpoint-3', is untouched")
    checkpoint_folder.verify(tmp_path / "run" / "checkpoint-3")
    note_fault(
        "out of memory in a training step",
        provoked="RLIMIT_AS at the size of the process, before step 4 of a fit of the command line",
        outcome="exit 1, one line with the micro-batch's shape, the peak memory and what to change",
        lost="steps since the last checkpoint",
    )


@linux
@pytest.mark.slow
def test_validation_without_memory_says_so(limited_fit, tmp_path, note_fault):
    line = error_line(limited_fit("validation", "--data.val_path", "val.jsonl", "--evaluation.num_examples", "0"))
    assert "in validation: a micro-batch of 4 rows, " in line
    assert line.endswith(f"The last checkpoint, '{tmp_path}/run/checkpoint-8', is untouched")
    note_fault(
        "out of memory in validation",
        provoked="RLIMIT_AS at the size of the process, before the validation at the end of a fit's epoch",
        outcome="exit 1, one line with the micro-batch's shape and what to change",
        lost="steps since the last checkpoint",
    )


@linux
@pytest.mark.slow
def test_generation_without_memory_names_the_generators_settings(limited_fit, tmp_path, note_fault):
    options = ["--data.val_path", "val.jsonl", "--evaluation.evaluate_before_training", "false"]
    options += ["--evaluation.generator", "TransformersGenerator", "--evaluation.generator.max_new_tokens", "200"]
    line = error_line(limited_fit("generation", *options))
    assert "in the answers to 4 prompts after step 8; " in line
    assert "max_new_tokens (now 200) or batch_tokens (now 65536)" in line
    assert line.endswith(f"The last checkpoint, '{tmp_path}/run/checkpoint-8', is untouched")
    note_fault(
        "out of memory while answers are generated",
        provoked="RLIMIT_AS at the size of the process, before the answers to the validation prompts",
        outcome="smaller batches are tried; then exit 1, one line that names max_new_tokens and batch_tokens",
        lost="steps since the last checkpoint",
    )


# Contents of the message


def test_from_python_the_error_is_chained(make_trainer, make_data, model_folder, train_file):
    class Hungry(SFTModule):
        def on_train_batch_start(self, batch, batch_idx):
            self.model.register_forward_pre_hook(lambda *_: torch.empty(1 << 60))

    with pytest.raises(
        RunFailedError, match="in the forward pass of optimizer step 1: a micro-batch of 2 rows"
    ) as raised:
        make_trainer(accumulate_grad_batches=4).fit(Hungry(model_folder), make_data(train_file))
    assert "--data.batch_size 1 with --trainer.accumulate_grad_batches 8 (the same step)" in str(raised.value)
    assert "There is no checkpoint yet" in str(raised.value)
    assert isinstance(raised.value.__cause__, RuntimeError | MemoryError)


@pytest.mark.parametrize("where", ["backward", "update"])
def test_backward_pass_and_update_are_distinguished(make_trainer, make_data, model_folder, train_file, where):
    class Hungry(SFTModule):
        def on_train_start(self):
            super().on_train_start()
            if where == "backward":
                self.model.model.norm.weight.register_hook(lambda _: torch.empty(1 << 60))
            else:
                self.optimizers().optimizer.register_step_post_hook(lambda *_: torch.empty(1 << 60))

    said = {"backward": "the backward pass", "update": "the update"}[where]
    with pytest.raises(RunFailedError, match=f"in {said} of optimizer step 1: a micro-batch of 2 rows"):
        make_trainer(accumulate_grad_batches=2).fit(Hungry(model_folder), make_data(train_file))


def stand_in(function, **data):
    trainer = SimpleNamespace(
        training=False,
        global_step=5,
        state=SimpleNamespace(fn=function),
        datamodule=SimpleNamespace(**data),
        accumulate_grad_batches=4,
        precision="bf16-mixed",
        checkpoint_callback=SimpleNamespace(last_model_path="run/checkpoint-5"),
        strategy=SimpleNamespace(root_device=torch.device("cpu")),
    )
    return SimpleNamespace(trainer=trainer, hparams={"gradient_checkpointing": True}, device=torch.device("cpu"))


@pytest.mark.parametrize(("size", "smaller", "accumulate"), [(4, 2, 8), (6, 3, 8), (9, 3, 12), (7, 1, 28)])
def test_a_smaller_batch_makes_the_same_step(size, smaller, accumulate):
    module = stand_in("fit", batch_size=size, max_length=64)
    with pytest.raises(RunFailedError) as raised, step_oom_advice(module, "validation"):
        raise MemoryError
    assert (
        f"What helps: --data.batch_size {smaller} with --trainer.accumulate_grad_batches {accumulate} (the same step); "
        "--data.max_length below 64; several devices with configs/overlays/fsdp2.yaml. The last checkpoint, "
        "'run/checkpoint-5', is untouched"
    ) in str(raised.value)


def test_outside_of_fit_the_message_says_nothing_was_changed():
    module = stand_in("validate", batch_size=4, max_length=64)
    with pytest.raises(RunFailedError) as raised, step_oom_advice(module, "validation"):
        raise MemoryError
    assert str(raised.value).endswith(
        "What helps: --data.batch_size 2; --data.max_length below 64. Nothing was changed"
    )
    with (
        pytest.raises(RunFailedError, match="the answers to 3 prompts"),
        generation_oom_advice(module.trainer, None, 3),
    ):
        raise MemoryError


@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_the_micro_batch_is_described(layout):
    examples = [Example.from_prompt(np.arange(n, dtype=np.int32), 2, f"a:{n}") for n in (5, 9)]
    batch = collate(examples, [1.0, 1.0], layout=layout, pad_token_id=0)
    with pytest.raises(RunFailedError) as raised, step_oom_advice(stand_in("fit"), "the forward pass", batch):
        raise MemoryError
    shape = {"padded": "16 tokens (2 x 8)", "packed": "12 tokens (1 x 12)"}[layout]
    assert f"a micro-batch of 2 rows, {shape}, 10 label positions, layout {layout}; " in str(raised.value)
