"""Test the command sft-lightning compare."""

import json

import pytest

from sft_lightning.cli.main import main
from sft_lightning.evaluation.result import EvaluationResult


def write_evaluation(folder, rewards):
    samples = [
        {
            "index": index,
            "sample": 0,
            "prompt": f"prompt {index}",
            "response": "",
            "ground_truth": "1",
            "format_correct": True,
            "strict_format_correct": True,
            "answer_correct": reward,
            "answer": "1",
            "failure": None if reward else "wrong",
            "timed_out": False,
            "stop_reason": "eos",
            "num_tokens": 3,
            "mean_entropy": None,
        }
        for index, reward in enumerate(rewards)
    ]
    EvaluationResult(samples).write(folder)
    return str(folder)


@pytest.fixture
def before(tmp_path):
    return write_evaluation(tmp_path / "before", [False] * 12 + [True] * 8)


@pytest.fixture
def after(tmp_path):
    return write_evaluation(tmp_path / "after", [True] * 11 + [False] + [True] * 7 + [False])


def test_the_comparison_is_printed_and_written(before, after, tmp_path, capsys):
    assert main(["compare", before, after]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[3] == "answer   0.400 [0.219 0.613]  0.900 [0.699 0.972]  +0.500 [0.250 0.750]  0.006"
    assert all(len(line) <= 80 for line in lines[:-1])
    assert lines[5] == "20 prompts: 11 fixed, 1 broken"
    assert lines[-1] == f"wrote {tmp_path / 'after' / 'comparison.json'}"
    written = json.loads((tmp_path / "after" / "comparison.json").read_text())
    assert written["rates"]["answer_accuracy"]["p_value"] == 2 * (1 + 12) / 2**12
    assert [row["change"] for row in written["changes"]] == (
        ["fixed"] * 11 + ["still wrong"] + ["still right"] * 7 + ["broken"]
    )


def test_output_names_another_folder(before, after, tmp_path):
    assert main(["compare", before, after, "--output", str(tmp_path / "new")]) == 0
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["comparison.json"]
    assert not (tmp_path / "after" / "comparison.json").exists()


def test_a_mistake_is_one_line(before, tmp_path, capsys):
    other = write_evaluation(tmp_path / "other", [True])
    assert main(["compare", before, other]) == 2
    assert capsys.readouterr().err == (
        "sft-lightning: error: the evaluations have 20 and 1 prompts: compare evaluations of the same ones\n"
    )
    assert main(["compare", before, str(tmp_path / "nothing")]) == 2
    assert "nothing' holds no predictions.jsonl" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"index": "0"}, "predictions.jsonl:1: a sample with a wrong type of index; evaluate again"),
        ({"sample": [0]}, "predictions.jsonl:1: a sample with a wrong type of sample; evaluate again"),
        ({"answer_correct": None}, "predictions.jsonl:1: a sample with a wrong type of answer_correct; evaluate again"),
        ({"format_correct": 2, "index": -1}, "a sample with a wrong type of index, format_correct; evaluate again"),
        ({"index": 99}, "the evaluations differ in the index of sample 0: compare evaluations of the same data"),
        (
            "index sample prompt ground_truth format_correct answer_correct",
            "predictions.jsonl:1: not a sample but a str",
        ),
        (None, "predictions.jsonl:1: not a sample but a NoneType"),
    ],
)
def test_a_sample_of_another_type_is_one_line(before, after, tmp_path, capsys, change, problem):
    path = tmp_path / "after" / "predictions.jsonl"
    first, *lines = path.read_text().splitlines()
    changed = {**json.loads(first), **change} if isinstance(change, dict) else change
    path.write_text("\n".join([json.dumps(changed), *lines]) + "\n")
    assert main(["compare", before, after]) == 2
    error = capsys.readouterr().err
    assert problem in error
    assert error.count("\n") == 1


def test_samples_may_be_numbered_from_another_number(before, after, tmp_path):
    for folder in ("before", "after"):
        path = tmp_path / folder / "predictions.jsonl"
        path.write_text(path.read_text().replace('"sample": 0', '"sample": 1'))
    assert main(["compare", before, after]) == 0
