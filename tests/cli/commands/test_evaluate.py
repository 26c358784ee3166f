"""Test the command sft-lightning evaluate."""

import json
import sys
from types import SimpleNamespace

import pytest
import torch
from transformers import Qwen2ForCausalLM

from sft_lightning.cli.main import main
from sft_lightning.grading.graders import Grade


def test_evaluate_writes_samples_and_metrics(tmp_path, model_folder, val_file, capsys):
    arguments = ["--model", model_folder, "--data", val_file, "--output", str(tmp_path), "--num_examples", "3"]
    assert main(["evaluate", *arguments, "--max_new_tokens", "5", "--greedy"]) == 0
    printed = capsys.readouterr().out
    assert "format accuracy  0.000 [0.000 0.561]  (0 of 3)" in printed  # z^2 / (3 + z^2)
    assert "answer accuracy  0.000 [0.000 0.561]  (0 of 3)" in printed
    samples = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    assert [sample["ground_truth"] for sample in samples] == ["100", "101", "102"]
    assert {sample["stop_reason"] for sample in samples} <= {"length", "eos"}
    assert json.loads((tmp_path / "metrics.json").read_text())["num_examples"] == 3


def test_several_answers_to_each_prompt(tmp_path, model_folder, val_file, capsys):
    arguments = ["--model", model_folder, "--data", val_file, "--output", str(tmp_path), "--num_examples", "3"]
    assert main(["evaluate", *arguments, "--max_new_tokens", "3", "--num_samples", "2"]) == 0
    samples = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    assert [(one["index"], one["sample"]) for one in samples] == [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1)]
    assert capsys.readouterr().out.splitlines()[2:5] == [
        "pass@1  0.000  (at least one right of 1)",
        "pass@2  0.000  (at least one right of 2)",
        "maj@2  0.000  (the most frequent right of 2)",
    ]


def test_a_server_answers(tmp_path, val_file, server, capsys):
    """The model's name is the server's: nothing is loaded here."""
    choice = {"text": " 1 </think> <answer> 100 </answer>", "finish_reason": "stop", "stop_reason": "</answer>"}
    server.answer = lambda path, body: (200, {}, {"choices": [choice], "usage": {"completion_tokens": 7}})
    arguments = ["--server", server.url, "--model", "tiny", "--data", val_file, "--output", str(tmp_path)]
    assert main(["evaluate", *arguments, "--num_examples", "2", "--greedy"]) == 0
    samples = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    assert [(sample["answer_correct"], sample["num_tokens"]) for sample in samples] == [(True, 7), (False, 7)]
    assert {request[2]["model"] for request in server.requests} == {"tiny"}


@pytest.mark.parametrize(
    ("options", "stop", "is_right"),
    [
        ([], ["</answer>"], False),
        (["--stop", "\n\n", "Q:"], ["\n\n", "Q:"], False),
        (["--units", "ignore"], ["</answer>"], True),
    ],
)
def test_stop_texts_and_units(tmp_path, val_file, server, options, stop, is_right):
    choice = {"text": " 1 </think> <answer> 100 eggs </answer>", "finish_reason": "stop", "stop_reason": stop[0]}
    server.answer = lambda path, body: (200, {}, {"choices": [choice], "usage": {"completion_tokens": 7}})
    arguments = ["--server", server.url, "--model", "tiny", "--data", val_file, "--output", str(tmp_path)]
    assert main(["evaluate", *arguments, "--num_examples", "1", "--greedy", *options]) == 0
    assert server.requests[-1][2]["stop"] == stop
    sample = json.loads((tmp_path / "predictions.jsonl").read_text())
    assert sample["answer_correct"] is is_right


class EverythingIsRight:
    def grade(self, response, ground_truth):
        return Grade(True, True)


def test_a_grader_by_class_path(tmp_path, model_folder, val_file, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "my_graders", SimpleNamespace(EverythingIsRight=EverythingIsRight))
    arguments = ["--model", model_folder, "--data", val_file, "--output", str(tmp_path), "--num_examples", "3"]
    arguments += ["--max_new_tokens", "2"]
    assert main(["evaluate", *arguments, "--grader", "my_graders.EverythingIsRight"]) == 0
    assert "answer accuracy  1.000 [0.439 1.000]  (3 of 3)" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["Gsm8kGrader", "sft_lightning.Gsm8kGrader"])
def test_a_grader_by_its_public_name(tmp_path, model_folder, val_file, name):
    arguments = ["--model", model_folder, "--data", val_file, "--output", str(tmp_path), "--num_examples", "1"]
    assert main(["evaluate", *arguments, "--max_new_tokens", "2", "--grader", name]) == 0
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["num_strict_format_correct"] is None  # which R1ZeroGrader, the default, knows


@pytest.mark.parametrize(
    "change",
    [
        ["--num_examples", "0"],
        ["--num_samples", "0"],
        ["--model", "/no/such/folder"],
        ["--temperature", "0"],
        ["--grader", "NoGrader"],
        ["--grader", "no_module.NoGrader"],
        ["--server", "ftp://nowhere"],
        ["--grader", "Gsm8kGrader", "--units", "ignore"],
    ],
)
def test_evaluate_refuses(tmp_path, model_folder, val_file, capsys, change):
    arguments = ["--model", model_folder, "--data", val_file, "--output", str(tmp_path), *change]
    assert main(["evaluate", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert change[1] in error


def test_evaluate_needs_a_model_or_a_server(tmp_path, val_file, capsys):
    assert main(["evaluate", "--data", val_file, "--output", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith("sft-lightning: error: --model or --server is needed")


def test_out_of_memory_names_the_option_to_lower(tmp_path, model_folder, val_file, capsys, monkeypatch):
    """The host's allocator itself refuses; one row was the smallest batch to try."""
    monkeypatch.setattr(Qwen2ForCausalLM, "forward", lambda self, *args, **kwargs: torch.empty(1 << 60))
    arguments = ["--model", model_folder, "--data", val_file, "--output", str(tmp_path), "--num_examples", "3"]
    assert main(["evaluate", *arguments, "--max_new_tokens", "5"]) == 1
    *_, line = capsys.readouterr().err.splitlines()
    assert line.startswith("sft-lightning: error: out of memory in the answers to 3 prompts; peak memory ")
    assert line.endswith("max_new_tokens (now 5) or batch_tokens (now 65536), or shorten the prompts")
