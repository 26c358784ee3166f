"""Test that what a parser, a class or the Trainer refuses is one line that names the field; wrong code is not."""

import importlib
import json

import pytest
import yaml
from lightning.pytorch import Callback
from lightning_utilities.core.imports import RequirementCache

from sft_lightning import SFTModule
from sft_lightning.cli.main import main
from sft_lightning.cli.mistakes import shorten


@pytest.fixture
def error_of(command, tmp_path, capsys):
    """Runs fit with an overlay of the config and options; returns its error, one line with exit code 2."""

    def run(overlay, *options):
        (tmp_path / "overlay.yaml").write_text(yaml.safe_dump(overlay))
        assert main([*command, "--config", str(tmp_path / "overlay.yaml"), *options]) == 2
        written = capsys.readouterr().err
        assert "Traceback" not in written
        assert not (tmp_path / "run" / "config.yaml").exists()
        (line,) = [line for line in written.splitlines() if line.startswith("sft-lightning: error: ")]
        return line.removeprefix("sft-lightning: error: ")

    return run


def instance(name, **arguments):
    return {"class_path": name, "init_args": arguments}


CALLBACKS = "lightning.pytorch.callbacks"


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        (
            "evaluation.generator",
            instance("TransformersGenerator", temperature=-1),
            "TransformersGenerator: temperature -1.0 must be finite, at least 1e-6; for the most likely answer set "
            "greedy: true",
        ),
        (
            "evaluation.generator",
            instance("TransformersGenerator", max_new_tokens=0),
            "TransformersGenerator: max_new_tokens 0 must be at least 1",
        ),
        (
            "data.template",
            instance("R1Zero", template_path="/nowhere.txt"),
            "R1Zero: template_path '/nowhere.txt' is not a file",
        ),
        (
            "evaluation.grader",
            instance("R1ZeroGrader", time_limit_seconds=-1),
            "R1ZeroGrader: time_limit_seconds -1.0 must be a positive number of seconds",
        ),
        (
            "trainer.callbacks",
            [instance("EarlyStopping", monitor="val/loss", mode="minn")],
            "EarlyStopping: `mode` can be min, max, got minn",
        ),
        (
            "trainer.callbacks",
            instance("Timer", duration="tomorrow"),
            "Timer: `Timer(duration='tomorrow')` is not a valid duration. Expected a string in the format DD:HH:MM:SS.",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) and " " not in value else "",
)
def test_what_a_class_refuses_is_told_with_its_field(error_of, note_fault, field, value, message):
    section, name = field.split(".")
    assert error_of({section: {name: value}}) == f"{field} {message}"
    note_fault(
        "argument that a class of the config refuses",
        provoked="a generator's temperature -1 and max_new_tokens 0, a template without its file, a grader's time "
        "limit, the mode of EarlyStopping, the duration of Timer",
        outcome="exit 2 with the field, the class and its reason",
        tries=6,
    )


def test_a_class_that_breaks_is_told_with_the_place(error_of, tmp_path, monkeypatch):
    (tmp_path / "callbacks_of_a_user.py").write_text(
        "from lightning.pytorch import Callback\n\n\n"
        "class Broken(Callback):\n    def __init__(self):\n        {}['key']\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    error = error_of({"trainer": {"callbacks": [{"class_path": "callbacks_of_a_user.Broken"}]}})
    assert error == f"trainer.callbacks Broken: KeyError in {tmp_path}/callbacks_of_a_user.py:6: 'key'"


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("trainer.accumulate_grad_batches=0", "trainer.accumulate_grad_batches must be above 0, got 0"),
        ("trainer.check_val_every_n_epoch=0", "trainer.check_val_every_n_epoch must be above 0, got 0"),
        ("trainer.val_check_interval=0", "trainer.val_check_interval must be above 0, got 0"),
        ("seed_everything=-1", "seed_everything must be from 0 to 4294967295, got -1"),
        ("seed_everything=4294967296", "seed_everything must be from 0 to 4294967295, got 4294967296"),
        ("trainer.strategy=dpp", "trainer: You selected an invalid strategy name: `strategy='dpp'`"),
        ("trainer.accelerator=cpuu", "trainer: You selected an invalid accelerator name: `accelerator='cpuu'`"),
        ("trainer.devices=x", "trainer: `devices` selected with `CPUAccelerator` should be an int > 0."),
        ("trainer.barebones=true", "trainer.barebones true turns off checkpoints, logging and callbacks"),
        ("trainer.strategy=ddp_spawn", "trainer.strategy DDPStrategy with start_method spawn trains copies"),
        ("trainer.strategy=ddp_notebook", "trainer.strategy DDPStrategy with start_method fork trains copies"),
    ],
)
def test_values_of_the_trainer_are_told_with_their_field(error_of, note_fault, option, message):
    assert error_of({}, f"--{option}").startswith(message)
    note_fault(
        "option of the Trainer out of range, mistyped or not for the command line",
        provoked="accumulate_grad_batches, check_val_every_n_epoch and val_check_interval 0, seeds out of range, a "
        "mistyped strategy, accelerator and devices, barebones, ddp_spawn, ddp_notebook",
        outcome="exit 2 with the field and the value",
        tries=11,
    )


def test_a_section_that_holds_no_options_is_named(error_of):
    assert error_of({"trainer": 3}) == "trainer is 3; give its options, as in trainer: {option: value}"


def test_rows_in_a_config_are_refused(error_of):
    error = error_of({"data": {"train_path": [{"prompt": "a", "response": "b"}]}})
    assert error == "data.train_path is a list; give a path: only Python can pass rows"


@pytest.mark.parametrize("option", ["output_dir", "ckpt_path", "data.train_path", "model.model_path", "data.cache_dir"])
def test_a_path_that_no_file_system_holds_names_its_option(error_of, note_fault, option):
    error = error_of({}, f"--{option}=/tmp/{'a' * 300}")
    assert option in error
    assert "/tmp/aaaaa" in error
    note_fault(
        "path that is too long",
        provoked="a name of 300 characters as output_dir, ckpt_path, data.train_path, data.cache_dir and "
        "model.model_path",
        outcome="exit 2 with the option and the beginning of the path",
        tries=5,
    )


def test_options_that_do_not_fit_the_data_are_one_line(command, val_file, capsys):
    assert main([*command, "--data.val_path", val_file, "--trainer.val_check_interval", "1000"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("sft-lightning: error: `val_check_interval` (1000) must be less than or equal to")


def test_a_metric_that_early_stopping_does_not_find_is_one_line(command, capsys):
    callback = json.dumps([instance("EarlyStopping", monitor="nope")])
    assert main([*command, "--trainer.callbacks", callback]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("sft-lightning: error: Early stopping conditioned on metric `nope` which is not available")


@pytest.mark.parametrize("name", ["WandbLogger", "TensorBoardLogger", "MLFlowLogger"])
def test_a_logger_without_its_package_names_the_install_command(error_of, note_fault, tmp_path, monkeypatch, name):
    missing = RequirementCache("a-package-that-nobody-has>=1")
    for module, flag in [
        ("pytorch.loggers.wandb", "_WANDB_AVAILABLE"),
        ("pytorch.loggers.mlflow", "_MLFLOW_AVAILABLE"),
        ("fabric.loggers.tensorboard", "_TENSORBOARD_AVAILABLE"),
        ("fabric.loggers.tensorboard", "_TENSORBOARDX_AVAILABLE"),
    ]:
        monkeypatch.setattr(importlib.import_module(f"lightning.{module}"), flag, missing)
    error = error_of({"trainer": {"logger": [instance(name, save_dir=str(tmp_path))]}})
    assert error.startswith(f"trainer.logger {name}: ")
    assert "pip install" in error
    note_fault(
        "package of a logger missing",
        provoked="WandbLogger, TensorBoardLogger and MLFlowLogger where their packages are not installed",
        outcome="exit 2 with the field, the class and the command that installs the package",
        tries=3,
    )


@pytest.mark.parametrize("raised", [ValueError("a bug"), TypeError("a bug"), ZeroDivisionError("a bug")])
def test_wrong_code_in_training_keeps_its_traceback(command, monkeypatch, raised):
    def breaks(*args):
        raise raised

    monkeypatch.setattr(SFTModule, "on_train_start", breaks)
    with pytest.raises(type(raised), match="a bug"):
        main(command)


def test_a_hook_with_wrong_arguments_keeps_its_traceback(command, monkeypatch):
    monkeypatch.setattr(Callback, "on_train_start", lambda callback: None)  # Lightning's call raises the TypeError
    with pytest.raises(TypeError, match="takes 1 positional argument"):
        main(command)


UNION = "Does not validate against any of the Union subtypes\n  Subtypes: [<class 'int'>]\n  Errors:\n    - {}\n"
GIVEN = "  Given value type: <class 'x.Y'>\n  Given value: {}"


@pytest.mark.parametrize(
    ("message", "line"),
    [
        ("Expected a\n  number", "Expected a number"),
        ("Problem: expected type <class 'sft_lightning.data.formats.r1_zero.R1Zero'>", "Problem: expected type R1Zero"),
        (
            "data.seed: - " + UNION.format("Expected an int") + GIVEN.format("x"),
            "data.seed: 'x' is not accepted. Expected an int",
        ),
        (
            'Parser key "trainer.callbacks":\n  '
            + UNION.format(
                "the following arguments are required: monitor\n    - Not a valid subclass of Callback\n"
                "      Subclass types expect one of:\n      - a class path (str)\n"
                "      - a dict with class_path entry\n    - Expected a <class 'NoneType'>"
            )
            + GIVEN.format(
                "[Namespace(class_path='a.b.EarlyStopping', init_args=Namespace(monitor=None, patience=3))]"
            ),
            "Parser key \"trainer.callbacks\": 'EarlyStopping' is not accepted. "
            "the following arguments are required: monitor",
        ),
        (
            'Parser key "trainer.callbacks":\n  '
            + UNION.format("Parser key \"patience\":\n  Expected a <class 'int'>. Got value: x")
            + GIVEN.format("NestedArg(key='patience', val='x')"),
            "Parser key \"trainer.callbacks\": 'patience=x' is not accepted. "
            'Parser key "patience": Expected a int. Got value: x',
        ),
        (
            'Parser key "model.loss":\n\n  - Expected a path but Nope either not accessible or invalid\n  - '
            + UNION.format("Expected a dot import path string: Nope\n    - Expected a <class 'NoneType'>")
            + GIVEN.format("Nope"),
            "Parser key \"model.loss\": 'Nope' is not accepted. "
            "There is no class Nope; name one by package.module.Class",
        ),
    ],
)
def test_messages_of_the_parser_become_one_line(message, line):
    assert shorten(message) == line
