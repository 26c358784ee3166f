"""Test fit, validate, test and predict. Every mistake is one line with exit code 2, and overwrites nothing."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
import yaml
from safetensors.torch import load_file

from sft_lightning import GenerationEvaluation
from sft_lightning.checkpointing import folder as checkpoint_folder
from sft_lightning.cli.lightning_cli import SFTCLI, parse_fit
from sft_lightning.cli.main import main
from sft_lightning.errors import UserError


def losses(run):
    with (run / "metrics.csv").open() as file:
        return [(int(row["step"]), row["train/loss"]) for row in csv.DictReader(file) if row["train/loss"]]


def recorded_losses(run):
    rows = [row for path in run.glob("row_losses/*/*.parquet") for row in pq.read_table(path).to_pylist()]
    return sorted(rows, key=lambda row: (row["epoch"], row["source"]))


def test_fit_writes_the_run_folder(command, tmp_path, capsys):
    assert main(command) == 0
    run = tmp_path / "run"
    expected = {"checkpoint-2", "checkpoint-4", "checkpoint-6", "config.yaml", "final", "last", "metrics.csv"}
    assert {path.name for path in run.iterdir()} == expected | {
        "row_losses",
        "report",
        "run_files.json",
        "run_state.json",
    }
    assert [step for step, _ in losses(run)] == [1, 2, 3, 4, 5, 6]
    assert len(recorded_losses(run)) == 42
    assert "step 6/6  loss" in capsys.readouterr().err
    saved = yaml.safe_load((run / "config.yaml").read_text())
    assert saved["seed_everything"] == 42
    assert saved["data"]["max_length"] == 512


def test_each_command_builds_only_its_own_parser(monkeypatch, capsys):
    parsers = []
    add_arguments = SFTCLI.add_arguments_to_parser

    def add_and_note(cli, parser):
        parsers.append(parser)
        add_arguments(cli, parser)

    monkeypatch.setattr(SFTCLI, "add_arguments_to_parser", add_and_note)
    for number, name in enumerate(("fit", "validate", "test", "predict"), start=1):
        with pytest.raises(SystemExit) as end:
            main([name, "--help"])
        assert end.value.code == 0
        assert len(parsers) == number
        help_text = capsys.readouterr().out
        assert "--data.max_length" in help_text
        assert "--ckpt_path" in help_text


def test_any_class_with_a_method_grade_is_a_grader(command, tmp_path, val_file, monkeypatch, capsys):
    (tmp_path / "graders_of_a_user.py").write_text(
        "from sft_lightning.grading.graders import Grade\n\n\n"
        "class Length:\n"
        "    def __init__(self, at_most: int) -> None:\n"
        "        self.at_most = at_most\n\n"
        "    def grade(self, response, ground_truth):\n"
        "        return Grade(format_correct=True, answer_correct=len(response) <= self.at_most)\n\n\n"
        "class Other: ...\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    validate = ["validate", *command[1:], "--data.val_path", val_file]
    options = ["--evaluation.grader", "graders_of_a_user.Length", "--evaluation.grader.at_most"]
    assert main([*validate, *options, "1000"]) == 0
    metrics = json.loads((tmp_path / "run" / "evaluation" / "val" / "metrics.json").read_text())
    assert (metrics["num_answer_correct"], metrics["num_timed_out"]) == (11, 0)
    assert main([*validate, *options, "-1"]) == 0
    assert json.loads((tmp_path / "run" / "evaluation" / "val" / "metrics.json").read_text())["num_answer_correct"] == 0
    capsys.readouterr()
    assert main([*validate, "--evaluation.grader", "graders_of_a_user.Other"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "evaluation.grader" in line
    assert "does not correspond to a subclass of Grader" in line


def test_the_saved_config_repeats_the_run(command, tmp_path):
    assert main([*command, "--overwrite"]) == 0
    saved = ["fit", "--config", str(tmp_path / "run" / "config.yaml")]
    assert main(saved) == 2, "a saved config must not overwrite the run that it was saved in"
    assert main([*saved, "--output_dir", str(tmp_path / "again")]) == 0
    assert losses(tmp_path / "again") == losses(tmp_path / "run")


def test_auto_starts_then_resumes_then_reports_the_end(command, tmp_path, capsys):
    run = tmp_path / "run"
    assert main([*command, "--ckpt_path", "auto", "--trainer.max_steps", "3"]) == 0
    assert f"--ckpt_path auto: no checkpoint in '{run}', starting fresh" in capsys.readouterr().out
    assert main([*command, "--ckpt_path", "auto"]) == 0
    assert f"--ckpt_path auto: '{run / 'checkpoint-3'}'" in capsys.readouterr().out
    assert (run / "config.resume-3.yaml").is_file()
    assert main([*command, "--ckpt_path", "auto"]) == 0
    assert "nothing to do: the run has finished its 6 optimizer steps" in capsys.readouterr().out
    straight = tmp_path / "straight"
    assert main([*command, "--output_dir", str(straight)]) == 0
    assert losses(run) == losses(straight)
    ours, theirs = (load_file(folder / "final" / "model.safetensors") for folder in (run, straight))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("save_every", [2, 100])
def test_a_run_that_died_before_its_end_is_completed(command, tmp_path, val_file, capsys, save_every):
    """Whether its last checkpoint was saved before the last validation or after it."""
    options = [*command, "--data.val_path", val_file, "--evaluation.num_examples", "4"]
    options += ["--checkpoint.every_n_train_steps", str(save_every)]
    straight, run = tmp_path / "straight", tmp_path / "run"
    assert main([*options, "--output_dir", str(straight)]) == 0
    capsys.readouterr()

    def die(callback, trainer, module):
        if not trainer.sanity_checking:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        if save_every == 2:
            patch.setattr(GenerationEvaluation, "on_validation_epoch_end", die)
        else:
            patch.setattr(checkpoint_folder, "publish", publish_unless_final)
        assert main(options) == 130
    assert (run / "checkpoint-6").is_dir()
    assert not (run / "final").exists()
    capsys.readouterr()
    assert main([*options, "--ckpt_path", "auto"]) == 0
    printed = capsys.readouterr().out
    assert (
        "the run has finished its 6 optimizer steps, but had stopped before its end, which is now complete" in printed
    )
    assert "format   0.000 [0.000 0.490]  0.000 [0.000 0.490]  +0.000 [0.000 0.000]  1.000" in printed
    assert without_speed(run) == without_speed(straight)
    for name in ("evaluation/step-6/predictions.jsonl", "evaluation/step-6/metrics.json", "final/model.safetensors"):
        assert (run / name).read_bytes() == (straight / name).read_bytes()
    assert main([*options, "--ckpt_path", "auto"]) == 0
    assert "nothing to do" in capsys.readouterr().out


def without_speed(run):
    names = ("step", "train/loss", "val/loss", "val/format_accuracy", "val/answer_accuracy")
    with (run / "metrics.csv").open() as file:
        return [[row[name] for name in names] for row in csv.DictReader(file)]


def publish_unless_final(folder, *arguments, publish=checkpoint_folder.publish):
    if folder.name == "final":
        raise KeyboardInterrupt
    publish(folder, *arguments)


def test_overwrite_deletes_only_the_files_of_the_run(command, tmp_path, capsys):
    assert main(command) == 0
    (tmp_path / "run" / "mine.txt").write_text("mine")
    assert main(command) == 2
    assert (
        "holds another run: pass --ckpt_path auto to go on with it, --overwrite to replace it"
        in capsys.readouterr().err
    )
    assert main([*command, "--overwrite", "--trainer.max_steps", "1"]) == 0
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"mine.txt", "checkpoint-1"} <= names
    assert not {"checkpoint-2", "checkpoint-4", "checkpoint-6"} & names


def test_auto_never_replaces_a_run_whose_checkpoints_are_all_damaged(command, tmp_path, capsys):
    assert main(command) == 0
    run = tmp_path / "run"
    for config in run.glob("checkpoint-*/generation_config.json"):
        config.write_text("{}")
    weights = (run / "final" / "model.safetensors").read_bytes()
    assert main([*command, "--ckpt_path", "auto"]) == 2
    assert "none of the 3 checkpoints" in capsys.readouterr().err
    assert (run / "final" / "model.safetensors").read_bytes() == weights


def test_a_home_folder_is_expanded_everywhere(command, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert main([*command, "--output_dir", "~/deep/run", "--trainer.max_steps", "1"]) == 0
    assert {"config.yaml", "metrics.csv", "checkpoint-1"} <= {path.name for path in (tmp_path / "deep/run").iterdir()}
    assert not (tmp_path / "~").exists()


def test_bad_data_deletes_no_run_that_overwrite_would(command, tmp_path, capsys):
    assert main(command) == 0
    bad = tmp_path / "bad.jsonl"
    bad.write_text("not json\n")
    assert main([*command, "--overwrite", "--data.train_path", str(bad)]) == 2
    assert (tmp_path / "run" / "checkpoint-6" / "model.safetensors").is_file()


def test_graded_validation_every_n_optimizer_steps(command, tmp_path, val_file, capsys):
    options = ["--data.val_path", val_file, "--validate_every_n_steps", "3", "--evaluation.num_examples", "4"]
    options += ["--checkpoint.monitor", "val/answer_accuracy", "--checkpoint.mode", "max"]
    assert main([*command, *options]) == 0
    run = tmp_path / "run"
    with (run / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["val/format_accuracy"]]
    assert [int(row["step"]) for row in rows] == [0, 3, 6]
    assert (run / "best").resolve().name == "checkpoint-3"  # the first; an equal value does not improve
    assert sorted(path.name for path in (run / "evaluation").iterdir()) == ["step-0", "step-3", "step-6"]
    printed = capsys.readouterr().out
    assert "format   0.000 [0.000 0.490]  0.000 [0.000 0.490]  +0.000 [0.000 0.000]  1.000" in printed
    assert f"model:   {run / 'final'}" in printed
    assert main([*command, *options, "--ckpt_path", "auto"]) == 0
    printed = capsys.readouterr().out
    assert "nothing to do: the run has finished its 6 optimizer steps" in printed
    assert "format accuracy" not in printed, "an unfinished evaluation of an earlier step must not pass for the result"


def test_filter_correct_defaults_to_the_evaluation_grader(command, tmp_path, train_file, caplog):
    rows = [json.loads(line) for line in Path(train_file).read_text().splitlines()]
    for row in rows[:2]:
        row["ground_truth"] = "99"
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ["--data.train_path", str(tmp_path / "rows.jsonl"), "--data.filter_correct", "true"]
    own = '{"class_path": "R1ZeroGrader", "init_args": {"time_limit_seconds": %s}}'
    graders = [["--evaluation.grader", own % 3], ["--data.grader", own % 4]]
    for number, grader in ((3, graders[0]), (4, graders[0] + graders[1])):
        run = tmp_path / f"run-{number}"
        assert main([*command, *options, *grader, "--output_dir", str(run), "--trainer.max_steps", "1"]) == 0
        digest = json.loads((run / "checkpoint-1" / "manifest.json").read_text())["digest"]
        grader = f"sft_lightning.R1ZeroGrader(time_limit_seconds={number}.0, "
        assert grader in digest["the grader of data.filter_correct"]
        assert digest["examples per epoch (under trainer.limit_train_batches)"] == 40
    saved = yaml.safe_load((run / "config.yaml").read_text())
    assert saved["data"]["filter_correct"] is True
    assert saved["data"]["grader"]["class_path"] == "sft_lightning.R1ZeroGrader"


def test_validate_test_and_predict_a_checkpoint_and_a_final_model(command, tmp_path, val_file, capsys):
    assert main(command) == 0
    config = command[1:]
    for folder in ("checkpoint-6", "final"):
        path = ["--ckpt_path", str(tmp_path / "run" / folder), "--data.val_path", val_file]
        assert main(["validate", *config, *path, "--evaluation.num_examples", "0"]) == 0
        assert "val/loss" in capsys.readouterr().out
        assert main(["test", *config, *path, "--evaluation.num_examples", "2"]) == 0
        printed = capsys.readouterr().out
        assert "test/loss" in printed
        assert "test/answer_accuracy" in printed
    assert main(["predict", *config, *path]) == 0
    rows = [json.loads(line) for line in (tmp_path / "run" / "predictions.jsonl").read_text().splitlines()]
    assert [row["ground_truth"] for row in rows] == [str(n) for n in range(100, 111)]
    assert all(row["num_tokens"] <= 3 for row in rows)


def test_environment_variables_and_later_configs_override(command, tmp_path, monkeypatch, capsys):
    overlay = tmp_path / "overlay.yaml"
    overlay.write_text("trainer: {max_steps: 1}\n")
    monkeypatch.setenv("SFT_FIT__MODEL__LEARNING_RATE", "0.25")
    (tmp_path / "config.yaml").write_text(
        (tmp_path / "config.yaml").read_text().replace("learning_rate: 0.01", "eps: 1e-7")
    )
    assert main([*command, "--config", str(overlay)]) == 0
    saved = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert saved["model"]["learning_rate"] == 0.25
    assert saved["trainer"]["max_steps"] == 1
    assert [step for step, _ in losses(tmp_path / "run")] == [1]


def mistakes():
    yield (
        ["--model.learning_ratee", "1"],
        "nrecognized arguments: --model.learning_ratee 1",
    )  # jsonargparse 4.41 writes a capital
    yield ["--model.learning_rate", "abc"], 'Parser key "model.learning_rate": Expected a float. Got value: abc'
    yield ["--data.train_path", "nope.jsonl"], "data.train_path: data path 'nope.jsonl' is not a file"
    yield ["--data.batch_size", "0"], "data.batch_size must be at least 1, got 0"
    yield ["--data.max_length", "3"], "Raise data.max_length (3)"
    yield ["--model.model_path", "/nope"], "'/nope'"
    yield ["--trainer.devices", "0"], "devices='0'"
    yield ["--trainer.precision", "12"], "'12' is not accepted"
    yield ["--trainer.callbacks", "nope"], "Parser key \"trainer.callbacks\": 'nope' is not accepted"
    yield ["--ckpt_path", "nope"], "--ckpt_path 'nope' is not a folder"
    yield ["--ckpt_path", "last"], "has no such checkpoint; use auto"
    yield ["--ckpt_path", "best"], "has no such checkpoint; use auto"
    yield ["--config", "nope.yaml"], "nope.yaml"
    yield ["--validate_every_n_steps", "0"], "validate_every_n_steps must be at least 1, got 0"
    yield ["--checkpoint.monitor", "val/loss"], "checkpoint.monitor 'val/loss' needs validations: set data.val_path"
    yield ["--model.attn_implementation", "flash_attention_2"], "pip install flash-attn --no-build-isolation"
    yield ["--model.warmup_steps", "1", "--model.warmup_ratio", "0.1"], "warmup_ratio 0.1 are both given"
    scheduler = '{"class_path": "GradientAccumulationScheduler", "init_args": {"scheduling": {"1": 2}}}'
    yield ["--trainer.callbacks+", scheduler], "GradientAccumulationScheduler"


@pytest.mark.parametrize(
    ("options", "message"), mistakes(), ids=lambda value: value[0] if isinstance(value, list) else ""
)
def test_a_mistake_is_one_line_and_exit_code_2(command, tmp_path, capsys, options, message):
    assert main([*command, *options]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("sft-lightning: error: ")]
    assert len(lines) == 1
    assert message in lines[0]
    assert not (tmp_path / "run" / "config.yaml").exists()


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (b"not json", "not JSON"),
        (b'{"prompt": "a"}', "response"),
        (b'{"prompt": "a", "response": ""}', "field 'response' is empty"),
        (b'{"prompt": "a", "response": 3}', "response"),
        (b'{"prompt": "a", "response": "\xff"}', "not UTF-8"),
    ],
)
def test_a_bad_row_is_named_by_file_and_line(command, tmp_path, capsys, row, reason):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"prompt": "a", "response": "b"}\n' + row + b"\n")
    assert main([*command, "--data.train_path", str(path)]) == 2
    error = capsys.readouterr().err
    assert f"{path}:2" in error
    assert reason in error


def test_a_model_folder_without_weights_names_the_option(command, tmp_path, model_folder, capsys):
    folder = tmp_path / "no-weights"
    folder.mkdir()
    for path in Path(model_folder).glob("*.json"):
        (folder / path.name).write_bytes(path.read_bytes())
    assert main([*command, "--model.model_path", str(folder)]) == 2
    assert "has config.json but no weights; set model.init random" in capsys.readouterr().err
    assert (
        main([*command, "--model.model_path", str(folder), "--model.init", "random", "--trainer.max_steps", "1"]) == 0
    )


def test_a_config_is_read_without_running_or_writing_anything(command, tmp_path, val_file):
    options = ["--data.max_train_examples", "5", "--data.val_path", val_file]
    parsed = parse_fit([*command[1:], *options])
    data = parsed.built.data
    assert [example.source.rpartition(":")[2] for example in data.training_tokens] == ["1", "2", "3", "4", "5"]
    assert [record.ground_truth for record in data.evaluation_records()][:2] == ["100", "101"]
    assert not (tmp_path / "run").exists()
    assert main([*command, *options, "--trainer.max_steps", "1"]) == 0
    saved = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert parsed.saved == {**saved, "trainer": {**saved["trainer"], "max_steps": -1}}
    parse_fit([*command[1:], *options])  # a run in the way is none of its business
    with pytest.raises(UserError, match="learning_ratee"):
        parse_fit([*command[1:], "--model.learning_ratee", "1"])


def test_print_config_works(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([*command, "--print_config"])
    assert stop.value.code == 0
    assert yaml.safe_load(capsys.readouterr().out)["model"]["learning_rate"] == 0.01


@pytest.mark.slow
def test_a_killed_run_resumes_bit_equal(command, tmp_path):
    """SIGKILL at three moments; `--ckpt_path auto` takes the newest good checkpoint each time."""
    options = [*command, "--trainer.max_epochs", "6", "--checkpoint.every_n_train_steps", "3"]
    assert main([*options, "--output_dir", str(tmp_path / "straight")]) == 0
    program = [sys.executable, "-m", "sft_lightning", *options, "--ckpt_path", "auto"]
    for wanted in (1, 4, 7):
        process = subprocess.Popen(program, env={**os.environ, "OMP_NUM_THREADS": "1"})
        deadline = time.monotonic() + 120
        while len(list((tmp_path / "run").glob("checkpoint-*"))) < wanted and time.monotonic() < deadline:
            time.sleep(0.003)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, "the run ended before it could be killed"
    subprocess.run(program, check=True)
    ours, theirs = (load_file(tmp_path / run / "final" / "model.safetensors") for run in ("run", "straight"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert losses(tmp_path / "run") == losses(tmp_path / "straight")
    assert recorded_losses(tmp_path / "run") == recorded_losses(tmp_path / "straight")
    assert len(recorded_losses(tmp_path / "run")) == 6 * 42


def test_parse_fit_builds_the_classes_and_starts_nothing(command, tmp_path, model_folder):
    run = tmp_path / "run" / "checkpoint-1"
    run.mkdir(parents=True)
    options = ["--ckpt_path", "last", "--data.seed", "5", "--trainer.logger", "true"]
    config, built, _ = parse_fit([*command[1:], *options])
    assert config.data.tokenizer_path == model_folder
    assert (built.data.seed, built.data.batch_size, built.data.max_length) == (5, 4, 512)
    assert built.evaluation.generator.max_new_tokens == 3
    assert built.model.model is None
    assert [path.name for path in run.parent.iterdir()] == ["checkpoint-1"]
