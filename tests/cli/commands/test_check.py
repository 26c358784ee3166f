"""Test the command sft-lightning check."""

import json
from pathlib import Path

import pytest
import yaml

from sft_lightning.cli.commands.check import _num_replicas
from sft_lightning.cli.lightning_cli import parse_fit
from sft_lightning.cli.main import main


@pytest.fixture
def val_file(tmp_path_factory):
    """Eleven rows whose prompts are not in the training set."""
    path = tmp_path_factory.mktemp("data") / "val.jsonl"
    rows = [{"prompt": f"the fox {row}", "response": f" </think> <answer> {row} </answer>"} for row in range(11)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def config(model_folder, train_file, val_file, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("COLUMNS", "120")
    path = tmp_path / "config.yaml"
    values = {
        "output_dir": str(tmp_path / "run"),
        "data": {"train_path": train_file, "val_path": val_file, "max_length": 512},
        "model": {"model_path": model_folder},
        "trainer": {"accelerator": "cpu"},
    }
    path.write_text(yaml.safe_dump(values))
    return ["check", "--config", str(path)]


def test_check_prints_a_report_and_creates_no_run(config, tmp_path, capsys):
    assert main(config) == 0
    printed = capsys.readouterr().out
    assert "42 rows used, EOS supervised in 42 of 42" in printed
    assert "11 rows used, EOS supervised in 11 of 11" in printed
    assert "32 rows a step in 8 micro-batches" in printed
    assert printed.splitlines()[-1].startswith("no problem")
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]


def test_an_existing_run_does_not_matter(config, tmp_path):
    (tmp_path / "run" / "checkpoint-1").mkdir(parents=True)
    assert main(config) == 0


def test_stdout_contains_only_json(config, capsys):
    assert main([*config, "--json", "--memory_gib", "80", "--ckpt_path", "auto"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["exit_code"] == report["num_errors"] == 0
    assert report["sets"]["train"]["num_rows_used"] == 42
    assert report["sets"]["val"]["num_eos_supervised"] == 11
    assert len(report["sets"]["train"]["samples"]) == 5
    assert [layout["layout"] for layout in report["layouts"]] == ["padded", "packed", "shared_prefix"]
    assert report["memory"]["device_bytes"] == 80 * 2**30
    assert all(place["source"] for finding in report["findings"] for place in finding["places"])


def test_options_and_environment_of_fit_apply(config, capsys, monkeypatch):
    monkeypatch.setenv("SFT_FIT__DATA__MAX_LENGTH", "511")
    assert main([*config, "--json", "--data.max_train_examples=7", "--data.append_eos", "false"]) == 1
    report = json.loads(capsys.readouterr().out)
    train = report["sets"]["train"]
    assert (train["num_rows_used"], train["num_rows_unused"], train["num_eos_supervised"]) == (7, 35, 0)
    assert [finding["name"] for finding in report["findings"]][:2] == ["eos_not_supervised"] * 2
    # The config file comes before the environment.
    assert train["max_length"] == 512


def test_bad_rows_are_a_problem_with_exit_code_1(config, tmp_path, train_file, capsys):
    path = tmp_path / "rows.jsonl"
    path.write_text(Path(train_file).read_text() + "no json\n" * 30)
    assert main([*config, "--data.train_path", str(path)]) == 1
    printed = capsys.readouterr().out
    assert printed.count("not JSON") == 30
    assert printed.splitlines()[-1] == "1 problem that would spoil the run"


@pytest.mark.parametrize(
    "change",
    [
        ["--data.train_path", "/no/such/file"],
        ["--data.max_lenght", "3"],
        ["--memory_gib", "0"],
        ["--model.model_path", "/no/such/model"],
        ["--trainer.no_such", "1"],
    ],
)
def test_a_mistake_is_one_line_and_exit_2(config, capsys, change):
    assert main([*config, *change]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert change[0].rpartition(".")[2].lstrip("-") in error or change[1] in error


def test_help_refers_to_the_options_of_fit(capsys):
    with pytest.raises(SystemExit) as end:
        main(["check", "--help"])
    assert end.value.code == 0
    assert "sft-lightning fit --help" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "replicas"),
    [
        (["--trainer.devices", "3"], 3),
        (["--trainer.devices", "[0,1]"], 2),
        (["--trainer.devices", "auto"], 1),
        (["--trainer.devices", "2", "--trainer.num_nodes", "4"], 8),
    ],
)
def test_replicas_are_those_of_the_config(config, options, replicas):
    resolved = parse_fit([*config[1:], *options]).config
    assert _num_replicas(resolved.trainer) == replicas
