"""sft-lightning evaluate, as typed."""

import json

import pytest

from sft_lightning.cli import main


def test_evaluate_writes_samples_and_metrics(tmp_path, model_folder, val_file, capsys):
    arguments = ["--model", model_folder, "--data", val_file, "--output", str(tmp_path), "--num_examples", "3"]
    assert main(["evaluate", *arguments, "--max_new_tokens", "5", "--greedy"]) == 0
    printed = capsys.readouterr().out
    assert "format accuracy  0.000  (0 of 3)" in printed
    assert "answer accuracy  0.000  (0 of 3)" in printed
    samples = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    assert [sample["ground_truth"] for sample in samples] == ["100", "101", "102"]
    assert {sample["stop_reason"] for sample in samples} <= {"length", "eos"}
    assert json.loads((tmp_path / "metrics.json").read_text())["num_examples"] == 3


def test_evaluate_takes_another_grader(tmp_path, model_folder, val_file, capsys):
    arguments = ["--model", model_folder, "--data", val_file, "--output", str(tmp_path), "--num_examples", "2"]
    options = ["--max_new_tokens", "5", "--grader"]
    assert main(["evaluate", *arguments, *options, "sft_lightning.evaluation.grading.ExactMatchGrader"]) == 0
    assert json.loads((tmp_path / "metrics.json").read_text())["num_format_correct"] == 2
    assert main(["evaluate", *arguments, *options, "Gsm9kGrader"]) == 2
    assert "grader 'Gsm9kGrader' cannot be made" in capsys.readouterr().err


@pytest.mark.parametrize("change", [["--num_examples", "0"], ["--model", "/no/such/folder"], ["--temperature", "0"]])
def test_evaluate_refuses(tmp_path, model_folder, val_file, capsys, change):
    arguments = ["--model", model_folder, "--data", val_file, "--output", str(tmp_path), *change]
    assert main(["evaluate", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert change[1] in error
