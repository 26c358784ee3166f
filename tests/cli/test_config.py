"""Test that options of the Trainer commands have one spelling and set all dependent values."""

import pytest
import yaml

from sft_lightning.cli.config import check_checkpoint_path, resolve_start
from sft_lightning.cli.lightning_cli import parse_fit
from sft_lightning.cli.main import main
from sft_lightning.errors import UserError


@pytest.fixture
def fit_options(command):
    return command[1:]


def test_one_option_sets_the_arguments_of_several_classes(fit_options, tmp_path):
    _, built, _ = parse_fit([*fit_options, "--output_dir", "a/b", "--overwrite", "--resume_override"])
    assert (built.checkpoint.dirpath.endswith("/a/b"), built.evaluation.output_dir) == (True, "a/b")
    assert (built.checkpoint.overwrite, built.model.resume_override) == (True, True)
    _, built, _ = parse_fit(fit_options)
    assert (str(built.checkpoint.run), built.evaluation.output_dir) == (str(tmp_path / "run"), str(tmp_path / "run"))
    assert (built.checkpoint.overwrite, built.model.resume_override) == (False, False)


@pytest.mark.parametrize(
    ("argument", "value", "option"),
    [
        ("checkpoint.dirpath", "x", "output_dir"),
        ("evaluation.output_dir", "x", "output_dir"),
        ("checkpoint.overwrite", "true", "overwrite"),
        ("model.resume_override", "true", "resume_override"),
    ],
)
def test_another_spelling_of_an_option_is_refused(fit_options, tmp_path, argument, value, option):
    section, _, name = argument.partition(".")
    (tmp_path / "overlay.yaml").write_text(yaml.safe_dump({section: {name: yaml.safe_load(value)}}))
    for words in ([f"--{argument}", value], ["--config", str(tmp_path / "overlay.yaml")]):
        with pytest.raises(UserError) as error:
            parse_fit([*fit_options, *words])
        assert str(error.value) == f"{argument} cannot be set: remove it and use --{option}, which sets it"


def test_unset_arguments_take_the_value_of_another(fit_options, model_folder):
    grader = ["--evaluation.grader", "R1ZeroGrader", "--evaluation.grader.time_limit_seconds", "4"]
    config, built, saved = parse_fit([*fit_options, *grader])
    assert config.data.tokenizer_path == model_folder
    assert built.data.grader.time_limit_seconds == 4
    assert built.model.generator.max_new_tokens == built.evaluation.generator.max_new_tokens == 3
    assert (saved["data"]["tokenizer_path"], saved["data"]["grader"], saved["model"]["generator"]) == (None, None, None)
    own = ["--data.tokenizer_path", "t", "--data.grader", "R1ZeroGrader", "--model.generator", "TransformersGenerator"]
    config, built, _ = parse_fit([*fit_options, *grader, *own])
    assert config.data.tokenizer_path == "t"
    assert built.data.grader.time_limit_seconds != 4
    assert built.model.generator.max_new_tokens == 1024


@pytest.mark.parametrize(
    ("words", "epochs"),
    [
        ([], 3),
        (["--trainer.max_steps", "100"], -1),
        (["--trainer.max_steps", "100", "--trainer.max_epochs", "2"], 2),
        (["--trainer.max_steps", "-1", "--trainer.max_epochs", "null"], 3),
    ],
)
def test_epochs_limit_a_run_only_if_set_or_without_steps(model_folder, words, epochs):
    config, _, saved = parse_fit(["--model.model_path", model_folder, *words])
    assert config.trainer.max_epochs == saved["trainer"]["max_epochs"] == epochs


def test_max_steps_trains_over_more_epochs_than_the_default(fit_options, tmp_path):
    """Six steps an epoch: the default of three epochs would end after 18."""
    words = ["--trainer.max_epochs", "null", "--trainer.max_steps", "20", "--evaluation.num_examples", "0"]
    assert main(["fit", *fit_options, *words]) == 0
    assert (tmp_path / "run" / "checkpoint-20").is_dir()
    again = tmp_path / "again"
    assert main(["fit", "--config", str(tmp_path / "run" / "config.yaml"), "--output_dir", str(again)]) == 0
    assert (again / "checkpoint-20").is_dir()


def test_validation_is_counted_in_optimizer_steps(fit_options):
    trainer = parse_fit([*fit_options, "--validate_every_n_steps", "3"]).config.trainer
    assert (trainer.val_check_interval, trainer.check_val_every_n_epoch) == (6, None)
    with pytest.raises(UserError, match=r"^validate_every_n_steps must be at least 1, got 0$"):
        parse_fit([*fit_options, "--validate_every_n_steps", "0"])


def test_the_saved_config_omits_options_of_one_start(fit_options, tmp_path):
    (tmp_path / "run" / "checkpoint-1").mkdir(parents=True)
    plain = parse_fit(fit_options).saved
    start = ["--ckpt_path", str(tmp_path / "run" / "checkpoint-1"), "--overwrite", "--resume_override"]
    assert parse_fit([*fit_options, *start]).saved == plain
    assert (plain["ckpt_path"], plain["overwrite"], plain["resume_override"]) == (None, False, False)
    assert plain["checkpoint"] == {"every_n_train_steps": 2, "monitor": None, "mode": "min", "keep_last": None}
    assert "output_dir" not in plain["evaluation"]
    assert "resume_override" not in plain["model"]


@pytest.mark.parametrize("path", [None, "auto", "last", "best", "."])
def test_a_checkpoint_path_is_a_folder_or_a_word(path):
    check_checkpoint_path(path)


def test_a_file_as_ckpt_path_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="is not a folder; name a checkpoint-<step>, last, best or auto"):
        check_checkpoint_path(str(tmp_path / "file"))


def test_a_restart_replaces_a_run_of_another_job(fit_options, tmp_path, monkeypatch):
    """The job died while it was loading, before it could replace the run that --overwrite names."""
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    assert main(["fit", *fit_options, "--trainer.max_steps", "1"]) == 0
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    config = parse_fit([*fit_options, "--overwrite"]).config
    resolve_start(config, is_fit=True)
    assert config.ckpt_path == str(tmp_path / "run" / "checkpoint-1")
    monkeypatch.setenv("SLURM_JOB_ID", "2")
    config = parse_fit([*fit_options, "--overwrite"]).config
    resolve_start(config, is_fit=True)
    assert (config.ckpt_path, config.checkpoint.overwrite) == (None, True)


@pytest.mark.parametrize("variable", ["SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT"])
def test_a_restarted_fit_never_overwrites(fit_options, tmp_path, monkeypatch, capsys, variable):
    monkeypatch.setenv(variable, "0")
    config = parse_fit([*fit_options, "--overwrite"]).config
    resolve_start(config, is_fit=True)
    assert (config.ckpt_path, config.checkpoint.overwrite) == (None, True)
    monkeypatch.setenv(variable, "1")
    assert main(["fit", *fit_options, "--trainer.max_steps", "1"]) == 0
    assert "continues as with --ckpt_path auto" in capsys.readouterr().out
    config = parse_fit([*fit_options, "--overwrite"]).config
    resolve_start(config, is_fit=True)
    assert (config.ckpt_path, config.checkpoint.overwrite) == (str(tmp_path / "run" / "checkpoint-1"), False)
    config = parse_fit([*fit_options, "--overwrite"]).config
    resolve_start(config, is_fit=False)
    assert config.ckpt_path is None
