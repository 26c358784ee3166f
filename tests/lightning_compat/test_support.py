import subprocess
import sys
from functools import partial

import pytest
import torch
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    BaseFinetuning,
    BatchSizeFinder,
    LearningRateFinder,
    ModelPruning,
    StochasticWeightAveraging,
)
from lightning.pytorch.tuner import Tuner
from safetensors.torch import load_file

from sft_lightning.errors import UserError
from sft_lightning.lightning_compat.support import check_strategy
from sft_lightning.training.module import SFTModule

# Callbacks


@pytest.mark.parametrize(
    ("callback", "reason"),
    [
        (BackboneFinetuning(), "SFTModule has no attribute backbone: derive a class from BaseFinetuning"),
        (BatchSizeFinder(), "a step's examples follow from batch_size .* set data.batch_size"),
        (LearningRateFinder(), "the schedule replaces the rate .* or call lr_find of lightning.pytorch.tuner.Tuner"),
        (ModelPruning("l1_unstructured"), "pruned parameters have other names"),
        (StochasticWeightAveraging(1e-3), "it replaces the schedule .* use WeightAveraging"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_callbacks_that_cannot_work_are_refused_by_name(fit, tmp_path, callback, reason):
    with pytest.raises(UserError, match=f"trainer.callbacks holds a {type(callback).__name__}, but {reason}"):
        fit(tmp_path / "run", callbacks=(callback,))
    assert not (tmp_path / "run").exists()


class FrozenFirstLayer(BaseFinetuning):
    def __init__(self, until_epoch=None):
        super().__init__()
        self.until_epoch = until_epoch

    def freeze_before_training(self, pl_module):
        self.freeze(pl_module.model.model.layers[0])

    def finetune_function(self, pl_module, epoch, optimizer):
        if epoch == self.until_epoch:
            self.unfreeze_and_add_param_group(pl_module.model.model.layers[0], optimizer)


def test_a_frozen_layer_stays_frozen_and_the_run_resumes_bit_equal(fit, tmp_path, model_folder):
    frozen_fit = partial(fit, checkpoint={"every_n_train_steps": 4}, model={"lr_schedule": "linear"})
    frozen_fit(tmp_path / "whole", callbacks=(FrozenFirstLayer(),))
    checkpoint = str(tmp_path / "whole" / "checkpoint-4")
    frozen_fit(tmp_path / "resumed", callbacks=(FrozenFirstLayer(),), ckpt_path=checkpoint)
    before, whole, resumed = (
        load_file(f"{folder}/model.safetensors")
        for folder in (model_folder, tmp_path / "whole" / "final", tmp_path / "resumed" / "final")
    )
    for name, weight in before.items():
        assert torch.equal(weight, whole[name]) == name.startswith("model.layers.0."), name
        assert torch.equal(whole[name], resumed[name]), name


def test_parameters_without_a_learning_rate_are_refused(fit):
    with pytest.raises(UserError, match=r"adds parameters to the optimizer in epoch 1, .* set trainer.max_epochs 1"):
        fit(callbacks=(FrozenFirstLayer(until_epoch=1),))


def test_the_rate_that_a_tuner_finds_holds_in_every_step(make_trainer, make_data, model_folder, train_file):
    data, found = make_data(train_file), SFTModule(model_folder, lr_schedule="linear")
    trainer = make_trainer(max_epochs=1)
    Tuner(trainer).lr_find(found, data, num_training=20)
    rate = found.hparams["learning_rate"]
    assert rate != 5e-5
    trainer.fit(found, data)
    given = SFTModule(model_folder, lr_schedule="linear", learning_rate=rate)
    plain = make_trainer(max_epochs=1)
    plain.fit(given, make_data(train_file))
    assert trainer.logger.series("train/lr") == plain.logger.series("train/lr")
    for name, weight in given.model.named_parameters():
        assert torch.equal(weight, found.model.get_parameter(name)), name


# Strategies


@pytest.mark.parametrize("name", ["ddp_spawn", "ddp_fork", "ddp_notebook"])
def test_strategies_that_lose_the_weights_are_refused(make_trainer, name):
    with pytest.raises(UserError, match=r"trainer.strategy DDPStrategy with start_method (spawn|fork) trains copies"):
        check_strategy(make_trainer(strategy=name, devices=2))
    check_strategy(make_trainer(strategy="ddp", devices=2))


PROGRAM = """
import sys
from lightning.pytorch import Trainer
from sft_lightning import SFTDataModule, SFTModule
from sft_lightning.errors import UserError
from sft_lightning.training.callbacks.defaults import run_defaults

if __name__ == "__main__":
    model, train, run, strategy = sys.argv[1:]
    trainer = Trainer(accelerator="cpu", devices=2, strategy=strategy, max_epochs=1, **run_defaults(run))
    try:
        trainer.fit(SFTModule(model), SFTDataModule(train, tokenizer_path=model))
    except UserError as error:
        print(error)
"""


@pytest.mark.slow
def test_a_fit_in_copies_of_the_module_is_refused(model_folder, train_file, tmp_path, command, note_fault):
    script, run = tmp_path / "program.py", tmp_path / "run"
    script.write_text(PROGRAM)
    line = "trainer.strategy DDPStrategy with start_method {} trains copies of the module"
    argv = [sys.executable, script, model_folder, train_file, run, "ddp_fork"]
    result = subprocess.run(argv, capture_output=True, text=True, timeout=300)
    assert result.stdout.splitlines()[-1].startswith(line.format("fork"))
    argv = [sys.executable, "-m", "sft_lightning", *command, "--trainer.devices=2", "--trainer.strategy=ddp_spawn"]
    result = subprocess.run(argv, capture_output=True, text=True, timeout=300)
    assert (result.returncode, "Traceback" in result.stderr) == (2, False)
    assert result.stderr.splitlines()[-1].startswith(f"sft-lightning: error: {line.format('spawn')}")
    assert list(run.glob("*")) == []
    note_fault(
        "a strategy that trains copies of the module",
        provoked="ddp_fork from Python and ddp_spawn on the command line",
        outcome="refused in one line (exit 2) before anything is trained",
        tries=2,
    )
