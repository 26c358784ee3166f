import json
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import yaml
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.strategies import ModelParallelStrategy
from safetensors.torch import load_file

from sft_lightning import (
    GenerationEvaluation,
    Grade,
    HFCheckpoint,
    R1Zero,
    SFTDataModule,
    SFTModule,
    TransformersGenerator,
    run_defaults,
)
from sft_lightning.cli.main import main
from sft_lightning.training.callbacks.saved_config import config_of_run


@pytest.fixture(autouse=True)
def _no_seed(monkeypatch):
    """Restores the environment variable that seed_everything sets."""
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")
    monkeypatch.delenv("PL_GLOBAL_SEED")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def trainer_of(run, *, callbacks=(), config=None, **options):
    defaults = run_defaults(run, callbacks=callbacks, config=config)
    return Trainer(accelerator="cpu", devices=1, accumulate_grad_batches=2, **options, **defaults)


def saved_config(run):
    return yaml.safe_load((run / "config.yaml").read_text())


def weights(run):
    return load_file(run / "final" / "model.safetensors")


def assert_equal_weights(run, other):
    ours, theirs = weights(run), weights(other)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_fit_repeats_a_python_run_bit_equal(tmp_path, model_folder, train_file, val_file):
    run, again = tmp_path / "run", tmp_path / "again"
    data = SFTDataModule(train_file, val_file, tokenizer_path=model_folder, batch_size=4, max_length=512, seed=3)
    module = SFTModule(model_folder, learning_rate=1e-2, lr_schedule="cosine", betas=(0.9, 0.95))
    evaluation = GenerationEvaluation(num_examples=2, generator=TransformersGenerator(max_new_tokens=3, greedy=True))
    trainer_of(run, callbacks=[evaluation], max_steps=5, gradient_clip_val=0.5).fit(module, data)
    assert main(["fit", "--config", str(run / "config.yaml")]) == 2, "a saved config must not overwrite its own run"
    assert main(["fit", "--config", str(run / "config.yaml"), "--output_dir", str(again)]) == 0
    assert_equal_weights(again, run)
    answers = [folder / "evaluation" / "step-5" / "predictions.jsonl" for folder in (again, run)]
    assert answers[0].read_bytes() == answers[1].read_bytes()
    files = [{path.relative_to(folder) for path in folder.rglob("*")} for folder in (again, run)]
    assert files[0] == files[1], "fit and run_defaults must write the same files"


def test_fit_repeats_random_initial_weights_of_a_seeded_run(tmp_path, model_folder, train_file):
    seed_everything(7)
    data = SFTDataModule(train_file, tokenizer_path=model_folder, batch_size=4, max_length=512)
    trainer_of(tmp_path / "run", max_steps=2).fit(SFTModule(model_folder, init="random", learning_rate=1e-2), data)
    assert saved_config(tmp_path / "run")["seed_everything"] == 7
    config = str(tmp_path / "run" / "config.yaml")
    assert main(["fit", "--config", config, "--output_dir", str(tmp_path / "again")]) == 0
    assert_equal_weights(tmp_path / "again", tmp_path / "run")


class MaximumLength:
    """A grader that keeps its argument as an attribute."""

    def __init__(self, num_characters: int) -> None:
        self.num_characters = num_characters

    def grade(self, response, ground_truth):
        return Grade(format_correct=True, answer_correct=len(response) <= self.num_characters)


class Forgetful(MaximumLength):
    """A grader that does not."""

    def __init__(self, limit: int = 3) -> None:
        super().__init__(limit)


class OtherModule(SFTModule):
    """A module that fit does not know."""


def test_a_python_run_saves_its_arguments(tmp_path, model_folder, train_file):
    data = SFTDataModule(train_file, tokenizer_path=model_folder, batch_size=2, max_length=512, template=R1Zero())
    module = SFTModule(model_folder, betas=(0.9, 0.95), generator=TransformersGenerator(stop_strings=("a", "b")))
    saving = HFCheckpoint(str(tmp_path), every_n_train_steps=7, keep_last=2, overwrite=True)
    evaluation = GenerationEvaluation(num_examples=3, grader=MaximumLength(9), output_dir="elsewhere")
    trainer = trainer_of(tmp_path, callbacks=[saving, evaluation], max_epochs=2, gradient_clip_val=0.5)
    trainer.datamodule = data
    config, not_repeated = config_of_run(trainer, module)
    assert not_repeated == []
    assert config == {
        "seed_everything": False,
        "data": {
            "train_path": train_file,
            "tokenizer_path": model_folder,
            "template": {"class_path": "sft_lightning.R1Zero"},
            "batch_size": 2,
            "max_length": 512,
            "grader": {"class_path": "sft_lightning.R1ZeroGrader"},
        },
        "model": {
            "model_path": model_folder,
            "betas": [0.9, 0.95],
            "generator": {
                "class_path": "sft_lightning.TransformersGenerator",
                "init_args": {"stop_strings": ["a", "b"]},
            },
        },
        "checkpoint": {"every_n_train_steps": 7, "keep_last": 2},
        "evaluation": {
            "num_examples": 3,
            "grader": {"class_path": f"{__name__}.MaximumLength", "init_args": {"num_characters": 9}},
        },
        "trainer": {
            "accumulate_grad_batches": 2,
            "check_val_every_n_epoch": 1,
            "gradient_clip_val": 0.5,
            "limit_predict_batches": 1.0,
            "limit_test_batches": 1.0,
            "limit_train_batches": 1.0,
            "limit_val_batches": 1.0,
            "log_every_n_steps": 50,
            "max_epochs": 2,
            "max_steps": -1,
            "min_epochs": None,
            "min_steps": None,
            "num_nodes": 1,
            "overfit_batches": 0.0,
            "precision": "32-true",
            "val_check_interval": 1.0,
            "gradient_clip_algorithm": None,
            "num_sanity_val_steps": 2,
            "accelerator": "cpu",
            "devices": 1,
        },
    }


def test_the_file_lists_parts_that_fit_cannot_repeat(tmp_path, model_folder, train_file):
    class Local(MaximumLength):
        pass

    callbacks = [EarlyStopping("train/loss"), GenerationEvaluation(0, grader=Forgetful(4))]
    trainer = trainer_of(tmp_path / "run", callbacks=callbacks, max_steps=1)
    data = SFTDataModule(train_file, tokenizer_path=model_folder, max_length=512, grader=Local(1))
    trainer.fit(OtherModule(model_folder, init="random"), data)
    text = (tmp_path / "run" / "config.yaml").read_text()
    assert [line for line in text.splitlines() if line.startswith("#")] == [
        "# fit does not repeat data.grader, which cannot be read from SFTDataModule",
        "# fit does not repeat the class OtherModule: it uses SFTModule",
        "# fit does not repeat evaluation.grader.init_args.limit, which cannot be read from Forgetful",
        "# fit does not repeat EarlyStopping: add it to trainer.callbacks",
        "# fit does not repeat the random weights: call seed_everything before the run",
    ]
    assert "grader" not in yaml.safe_load(text)["data"]


def test_given_content_is_written_as_it_is(tmp_path, model_folder, train_file):
    trainer = trainer_of(tmp_path / "run", config={"trainer": {"max_steps": 9}}, max_steps=1)
    trainer.fit(SFTModule(model_folder), SFTDataModule(train_file, tokenizer_path=model_folder, max_length=512))
    assert (tmp_path / "run" / "config.yaml").read_text() == "trainer:\n  max_steps: 9\n"
    assert "config.yaml" in json.loads((tmp_path / "run" / "run_files.json").read_text())


def test_a_resumed_run_keeps_config_yaml(tmp_path, model_folder, train_file):
    for max_steps, path in ((1, None), (2, str(tmp_path / "run" / "checkpoint-1"))):
        data = SFTDataModule(train_file, tokenizer_path=model_folder, batch_size=4, max_length=512)
        trainer_of(tmp_path / "run", max_steps=max_steps).fit(SFTModule(model_folder), data, ckpt_path=path)
    configs = {path.name: yaml.safe_load(path.read_text()) for path in (tmp_path / "run").glob("config*")}
    assert configs.keys() == {"config.yaml", "config.resume-1.yaml"}
    assert [configs[name]["trainer"]["max_steps"] for name in ("config.yaml", "config.resume-1.yaml")] == [1, 2]


def test_a_dry_run_writes_no_config(tmp_path, model_folder, train_file):
    data = SFTDataModule(train_file, tokenizer_path=model_folder, max_length=512)
    trainer_of(tmp_path / "run", fast_dev_run=True).fit(SFTModule(model_folder), data)
    assert not (tmp_path / "run").exists()


class Mesh(dict):
    """Stands in for the device mesh of a started strategy."""

    def __init__(self, **sizes):
        super().__init__({name: SimpleNamespace(size=lambda size=size: size) for name, size in sizes.items()})


@pytest.mark.parametrize(
    ("strategy", "devices", "expected"),
    [
        ("auto", 1, None),
        ("ddp", 2, "ddp"),
        (
            ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1),
            2,
            {
                "class_path": "lightning.pytorch.strategies.model_parallel.ModelParallelStrategy",
                "init_args": {"data_parallel_size": 2, "tensor_parallel_size": 1},
            },
        ),
    ],
)
def test_the_strategy_is_saved(tmp_path, monkeypatch, strategy, devices, expected):
    monkeypatch.setattr(ModelParallelStrategy, "device_mesh", Mesh(data_parallel=2, tensor_parallel=1))
    trainer = Trainer(accelerator="cpu", devices=devices, strategy=strategy, **run_defaults(tmp_path))
    trainer.datamodule = SFTDataModule("rows.jsonl", tokenizer_path="t")
    config, not_repeated = config_of_run(trainer, SFTModule("m"))
    assert (config["trainer"].get("strategy"), config["trainer"]["devices"]) == (expected, devices)
    assert not_repeated == []


def test_fit_repeats_a_python_run_with_another_optimizer(tmp_path, model_folder, train_file):
    data = SFTDataModule(train_file, tokenizer_path=model_folder, batch_size=4, max_length=512, seed=1)
    module = SFTModule(model_folder, learning_rate=1e-2, optimizer=partial(torch.optim.SGD, momentum=0.9))
    trainer_of(tmp_path / "run", max_steps=2).fit(module, data)
    assert saved_config(tmp_path / "run")["model"]["optimizer"] == {
        "class_path": "torch.optim.sgd.SGD",
        "init_args": {"momentum": 0.9},
    }
    config = str(tmp_path / "run" / "config.yaml")
    assert main(["fit", "--config", config, "--output_dir", str(tmp_path / "again")]) == 0
    assert_equal_weights(tmp_path / "again", tmp_path / "run")


def test_an_optimizer_function_is_listed_as_not_repeated(tmp_path, model_folder, train_file):
    def make_sgd(params, *, lr):
        return torch.optim.SGD(params, lr=lr)

    trainer = trainer_of(tmp_path, max_steps=2)
    trainer.datamodule = SFTDataModule(train_file, tokenizer_path=model_folder)
    config, not_repeated = config_of_run(trainer, SFTModule(model_folder, optimizer=make_sgd))
    assert "optimizer" not in config["model"]
    assert not_repeated == ["model.optimizer, which cannot be read from SFTModule"]
