"""Test the settings that decide whether a run resumes, and optimizers that resume bit-equal, from Python and YAML."""

import json
import re
import shutil
from functools import partial

import pytest
import torch
import yaml

from sft_lightning.cli.main import main
from sft_lightning.errors import UserError
from sft_lightning.losses.token_loss import TokenLoss
from sft_lightning.training.module import SFTModule
from sft_lightning.training.resume import check_resumable, loss_identity, optimizer_identity

SETTINGS = {
    "model.loss": None,
    "model.optimizer": None,
    "model.learning_rate": 0.1,
    "model.betas": [0.9, 0.999],
    "model.lr_schedule": "cosine",
    "trainer.gradient_clip_val": 1.0,
    "data.seed": 7,
}
OPTIMIZERS = {
    "SGD": {"momentum": 0.9, "nesterov": True, "weight_decay": 0.01},
    "Adagrad": {"lr_decay": 0.1},
    "RMSprop": {"momentum": 0.5, "centered": True},
    "AdamW": {"betas": [0.8, 0.9], "amsgrad": True},
}


class SmoothedLoss(TokenLoss):
    def __init__(self, smoothing=0.1):
        self.smoothing = smoothing


class WithoutLearningRate(torch.optim.Optimizer):
    def __init__(self, params, step_size=1.0):
        super().__init__(params, {"step_size": step_size})


# Identities


def test_the_default_optimizer_and_loss_have_no_identity():
    assert optimizer_identity(None) is None
    assert loss_identity(None) is None
    assert loss_identity(TokenLoss()) is None


def test_an_identity_names_the_class_and_all_settings():
    text = optimizer_identity(partial(torch.optim.SGD, momentum=0.9))
    assert text.startswith("torch.optim.sgd.SGD(")
    assert "momentum=0.9, nesterov=False" in text
    assert text == optimizer_identity(partial(torch.optim.SGD, momentum=0.9, nesterov=False))
    assert optimizer_identity(partial(torch.optim.AdamW, betas=[0.9, 0.8])) == optimizer_identity(
        partial(torch.optim.AdamW, betas=(0.9, 0.8))
    )
    assert loss_identity(SmoothedLoss(0.2)).endswith("SmoothedLoss(smoothing=0.2)")


# What may differ


def test_equal_settings_resume():
    check_resumable(SETTINGS, dict(SETTINGS))


@pytest.mark.parametrize(
    ("name", "value"),
    [("model.betas", [0.9, 0.9]), ("model.lr_schedule", "linear"), ("trainer.gradient_clip_val", None)],
)
def test_another_optimizer_option_needs_an_override(name, value):
    own = {**SETTINGS, name: value}
    with pytest.raises(UserError, match=rf"^cannot resume: {name} is .*, the checkpoint was trained with .*_override"):
        check_resumable(own, SETTINGS)
    check_resumable(own, SETTINGS, override=True)


@pytest.mark.parametrize("override", [False, True])
@pytest.mark.parametrize(("name", "value"), [("model.loss", "Smoothed(0.2)"), ("data.seed", 8), ("new.option", 1)])
def test_all_else_is_refused_also_with_an_override(name, value, override):
    old = SETTINGS.get(name)
    with pytest.raises(
        UserError,
        match=rf"^cannot resume: {name} is {re.escape(repr(value))}, the checkpoint was trained with {old}; set it "
        "back, or start from the checkpoint's weights with --model.model_path$",
    ):
        check_resumable({**SETTINGS, name: value}, SETTINGS, override=override)


@pytest.mark.parametrize("override", [False, True])
@pytest.mark.parametrize(
    ("saved", "own"),
    [(None, "torch.optim.sgd.SGD(momentum=0)"), ("torch.optim.sgd.SGD(momentum=0)", "torch.optim.adagrad.Adagrad()")],
)
def test_another_class_of_optimizer_is_always_refused(saved, own, override):
    own, saved = ({**SETTINGS, "model.optimizer": optimizer} for optimizer in (own, saved))
    with pytest.raises(UserError, match=r"model\.optimizer is .*, the checkpoint holds the state of .*"):
        check_resumable(own, saved, override=override)


def test_other_arguments_of_an_optimizer_need_an_override():
    own, saved = ({**SETTINGS, "model.optimizer": f"SGD(momentum={momentum})"} for momentum in (0.9, 0.5))
    with pytest.raises(UserError, match=r"model\.optimizer is 'SGD\(momentum=0\.9\)', .* 'SGD\(momentum=0\.5\)'"):
        check_resumable(own, saved)
    check_resumable(own, saved, override=True)


def test_a_missing_name_is_a_difference():
    with pytest.raises(UserError, match=r"data\.seed is None, the checkpoint was trained with 7"):
        check_resumable({}, {"data.seed": 7})


# Whole runs


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_resume_bit_equal_from_python(fit, tmp_path, name):
    options = {
        "model": {"optimizer": partial(getattr(torch.optim, name), **OPTIMIZERS[name]), "lr_schedule": "linear"},
        "checkpoint": {"every_n_train_steps": 2},
        "max_steps": 5,
    }
    straight = fit(tmp_path / "a", **options)
    resumed = fit(tmp_path / "b", ckpt_path=str(tmp_path / "a" / "checkpoint-2"), **options)
    assert type(resumed.trainer.optimizers[0]).__name__ == name
    assert resumed.losses == straight.losses[2:]
    for weight, expected in straight.weights.items():
        assert torch.equal(resumed.weights[weight], expected), weight
    groups = resumed.trainer.optimizers[0].param_groups
    assert {group["lr"] for group in groups} == {straight.trainer.optimizers[0].param_groups[0]["lr"]}
    assert groups[1]["weight_decay"] == 0.0


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_resume_bit_equal_from_yaml(command, tmp_path, name):
    overlay = tmp_path / "overlay.yaml"
    optimizer = {"class_path": f"torch.optim.{name}", "init_args": OPTIMIZERS[name]}
    overlay.write_text(yaml.safe_dump({"model": {"optimizer": optimizer}, "evaluation": {"num_examples": 0}}))
    command = [*command, "--config", str(overlay)]
    assert main([*command, "--trainer.max_steps", "2"]) == 0
    assert main([*command, "--trainer.max_steps", "4", "--ckpt_path", "auto"]) == 0
    assert main([*command, "--trainer.max_steps", "4", "--output_dir", str(tmp_path / "straight")]) == 0
    ours, theirs = ((tmp_path / run / "final" / "model.safetensors").read_bytes() for run in ("run", "straight"))
    assert ours == theirs
    saved = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["model"]["optimizer"]
    assert saved["class_path"] == f"torch.optim.{name}"
    assert OPTIMIZERS[name].items() <= saved["init_args"].items()
    assert "lr" not in saved["init_args"]


def test_an_override_continues_with_other_arguments_of_the_same_optimizer(fit, tmp_path):
    sgd = partial(torch.optim.SGD, momentum=0.9, weight_decay=0.1)
    fit(tmp_path, model={"optimizer": sgd}, max_steps=2)
    resumed = {"ckpt_path": str(tmp_path / "checkpoint-2"), "max_steps": 3}
    other = {"optimizer": partial(sgd, momentum=0.5, weight_decay=0.2)}
    with pytest.raises(
        UserError, match=r"model\.optimizer is 'torch\.optim\.sgd\.SGD\(.*momentum=0\.5.*resume_override"
    ):
        fit(tmp_path, model=other, **resumed)
    with pytest.raises(
        UserError, match=r"model\.optimizer is torch\.optim\.adamw\.AdamW, .* state of torch\.optim\.sgd\.SGD"
    ):
        fit(tmp_path, model={"resume_override": True}, **resumed)
    run = fit(tmp_path, model={**other, "resume_override": True}, **resumed)
    groups = run.trainer.optimizers[0].param_groups
    assert [(group["momentum"], group["weight_decay"]) for group in groups] == [(0.5, 0.2), (0.5, 0.0)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": {"loss": SmoothedLoss(0.2)}}, r"model\.loss is .*SmoothedLoss\(smoothing=0\.2\)', .*=0\.1\)'; set"),
        ({"model": {"init": "random"}}, r"model\.init is 'random', .* 'pretrained'; set .* --model\.model_path"),
        ({"gradient_clip_val": 0.5}, r"trainer\.gradient_clip_val is 0\.5, .* 1\.0; set .* --resume_override"),
        (
            {"gradient_clip_algorithm": "value"},
            r"trainer\.gradient_clip_algorithm is 'value', .* 'norm'; .* --resume_override",
        ),
        ({"precision": "bf16-mixed"}, r"trainer\.precision is 'bf16-mixed', .* '32-true'; .* --resume_override"),
        ({"config": {"rms_norm_eps": 1e-3}}, r"rms_norm_eps in the model's config\.json is 0\.001, .* 1e-06; set"),
        ({"config": {"rope_parameters": {"rope_theta": 5.0, "rope_type": "default"}}}, r"rope_parameters in .*5\.0"),
        ({"config": {"hidden_act": "gelu"}}, r"hidden_act in the model's config\.json is 'gelu', .* 'silu'"),
        ({"config": {"attention_dropout": 0.1}}, r"attention_dropout in the model's config\.json is 0\.1, .* 0\.0"),
    ],
)
def test_whatever_changes_the_trajectory_is_refused(fit, tmp_path, model_folder, change, message):
    options = {"gradient_clip_val": 1.0, "max_steps": 2}
    fit(tmp_path / "run", model={"loss": SmoothedLoss(0.1)}, checkpoint={"every_n_train_steps": 1}, **options)
    base = tmp_path / "base"
    shutil.copytree(model_folder, base)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, **change.pop("config", {})}))
    model = {"loss": SmoothedLoss(0.1), "model_path": str(base), **change.pop("model", {})}
    with pytest.raises(UserError, match=f"^cannot resume: {message}"):
        fit(tmp_path / "run", model=model, ckpt_path=str(tmp_path / "run" / "checkpoint-1"), **{**options, **change})


def test_options_that_change_no_result_may_differ(fit, tmp_path):
    straight = fit(tmp_path / "a", max_steps=2)
    fit(tmp_path / "b", max_steps=1)
    free = {"gradient_checkpointing": True, "on_nonfinite": "skip", "log_token_statistics": False}
    resumed = fit(tmp_path / "b", model=free, ckpt_path=str(tmp_path / "b" / "checkpoint-1"), max_steps=2)
    assert resumed.losses == straight.losses[1:]


# Mistakes in a config


@pytest.mark.parametrize(("name", "value"), [("weight_decay", 0.1), ("betas", (0.9, 0.95)), ("eps", 1e-6)])
def test_an_adamw_option_beside_another_optimizer_names_both(name, value):
    with pytest.raises(UserError, match=rf"model\.{name} .* beside model\.optimizer torch\.optim\.sgd\.SGD") as raised:
        SFTModule("nowhere", optimizer=torch.optim.SGD, **{name: value})
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        (
            {"class_path": f"{__name__}.WithoutLearningRate"},
            r"WithoutLearningRate cannot be called with \(params, lr=...\)",
        ),
        # The second wording is that of jsonargparse 4.41.
        (
            {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.1}},
            "Option 'lr' is not accepted|Key 'lr' is not expected",
        ),
        (
            {"class_path": "torch.optim.SGD", "init_args": {"momentun": 0.1}},
            "Option 'momentun' is not accepted|Key 'momentun' is not expected",
        ),
        ({"class_path": "torch.nn.Linear"}, r"to be a subclass of Optimizer|torch\.nn\.Linear.* is not accepted"),
        ({"class_path": "torch.optim.LBFGS"}, "the optimizer refuses its options"),
    ],
)
def test_a_wrong_optimizer_is_one_line_and_code_2(command, tmp_path, capsys, optimizer, message):
    overlay = tmp_path / "overlay.yaml"
    overlay.write_text(yaml.safe_dump({"model": {"optimizer": optimizer}}))
    assert main([*command, "--config", str(overlay)]) == 2
    (error,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("sft-lightning: error:")]
    assert re.search(message, error)


def test_a_config_names_the_loss_by_short_class_path(command, tmp_path):
    options = ["--model.loss", "sft_lightning.TokenLoss", "--trainer.max_steps", "1", "--evaluation.num_examples", "0"]
    assert main([*command, *options]) == 0
    saved = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["model"]["loss"]
    assert saved["class_path"].endswith("TokenLoss")
    state = torch.load(tmp_path / "run" / "checkpoint-1" / "trainer_state.ckpt", weights_only=True)
    assert (state["trajectory"]["model.optimizer"], state["trajectory"]["model.loss"]) == (None, None)
