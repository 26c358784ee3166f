"""Test that SFTModule.load_from_checkpoint reads our folders and Lightning's files, and refuses everything else."""

import shutil
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy

from sft_lightning import SFTModule
from sft_lightning.errors import UserError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("saved")


@pytest.fixture
def run(fit, folder):
    """A run of two steps with our checkpoints, and the same with Lightning's; made once."""
    if not (folder / "weights.pt").exists():
        options = {"max_steps": 2, "model": {"learning_rate": 0.02}}
        fit(callbacks=(ModelCheckpoint(dirpath=folder / "lightning", filename="step-2"),), **options)
        trained = fit(folder / "run", checkpoint={"every_n_train_steps": 2}, **options)
        torch.save(trained.weights, folder / "weights.pt")
    return folder


@pytest.mark.parametrize("path", ["run/checkpoint-2", "run/final", "lightning/step-2.ckpt"])
def test_a_checkpoint_gives_back_the_trained_weights(run, path):
    module = SFTModule.load_from_checkpoint(run / path)
    trained = torch.load(run / "weights.pt")
    weights = module.model.state_dict()
    assert weights.keys() == trained.keys()
    assert all(torch.equal(weights[name], trained[name]) for name in trained)
    assert module.hparams["learning_rate"] == (5e-5 if path == "run/final" else 0.02)  # final has no arguments
    assert SFTModule.load_from_checkpoint(str(run / path), learning_rate=0.5).hparams["learning_rate"] == 0.5


def test_a_loaded_module_validates_as_the_run_did(run, make_trainer, make_data, val_file):
    losses = []
    for source in (
        SFTModule(str(run / "run" / "final")),
        SFTModule.load_from_checkpoint(run / "lightning/step-2.ckpt"),
    ):
        trainer = make_trainer()
        trainer.validate(source, make_data(val_path=val_file), verbose=False)
        losses.append(trainer.callback_metrics["val/loss"])
    assert losses[0] == losses[1]


def test_a_loaded_module_trains_on_from_its_weights(run, make_trainer, make_data, train_file):
    module = SFTModule.load_from_checkpoint(run / "run" / "checkpoint-2", learning_rate=0.0)
    make_trainer(max_steps=1).fit(module, make_data(train_file))
    trained = torch.load(run / "weights.pt")
    assert all(torch.equal(weight, trained[name]) for name, weight in module.model.state_dict().items())


def test_a_ckpt_file_of_another_model_is_refused(run, tmp_path):
    content = torch.load(run / "lightning" / "step-2.ckpt", weights_only=True)
    del content["state_dict"]["model.model.norm.weight"]
    torch.save(content, tmp_path / "cut.ckpt")
    with pytest.raises(UserError, match="is not the model of the checkpoint: "):
        SFTModule.load_from_checkpoint(tmp_path / "cut.ckpt")
    SFTModule.load_from_checkpoint(tmp_path / "cut.ckpt", strict=False)


def test_what_is_no_checkpoint_is_refused_and_never_run(run, tmp_path):
    class Code:
        def __reduce__(self):
            return Path.touch, (tmp_path / "touched",)

    torch.save({"state_dict": {}, "hyper_parameters": Code()}, tmp_path / "code.ckpt")
    torch.save([1], tmp_path / "list.ckpt")
    torch.save({"weights": {}}, tmp_path / "other.ckpt")
    shutil.copytree(run / "run" / "checkpoint-2", tmp_path / "damaged")
    with (tmp_path / "damaged" / "model.safetensors").open("r+b") as file:
        file.write(b"x")
    for name, message in {
        "missing.ckpt": "is neither a folder nor a .ckpt file",
        "code.ckpt": "is damaged, or holds something else than tensors and plain values",
        "list.ckpt": "holds a list instead of a dictionary",
        "other.ckpt": "has no hyper_parameters or no state_dict",
        "damaged": "damaged",
    }.items():
        with pytest.raises(UserError, match=message):
            SFTModule.load_from_checkpoint(tmp_path / name)
    assert not (tmp_path / "touched").exists()


def test_a_whole_model_is_not_trained_in_unsynchronized_copies(run, make_trainer):
    module = SFTModule.load_from_checkpoint(run / "run" / "final")
    module.trainer = make_trainer(strategy=ModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=1))
    with pytest.raises(UserError, match="shards a model while it loads"):
        module.configure_model()
