"""Test the command sft-lightning report."""

import json
import subprocess
import sys

import pytest

from sft_lightning.cli.main import main
from sft_lightning.evaluation.result import EvaluationResult


def samples(num_right):
    row = {"sample": 0, "prompt": "p", "response": "r", "ground_truth": "1", "format_correct": True}
    rest = {"strict_format_correct": None, "answer": None, "failure": None, "timed_out": False, "stop_reason": "eos"}
    return [
        {"index": n, **row, "answer_correct": n < num_right, **rest, "num_tokens": 3, "mean_entropy": None}
        for n in range(20)
    ]


def test_report_writes_the_page_and_prints_the_table(tmp_path, capsys):
    for step, num_right in ((0, 0), (9, 12)):
        EvaluationResult(samples(num_right), step).write(tmp_path / "evaluation" / f"step-{step}")
    assert main(["report", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    (answer,) = [line for line in lines if line.startswith("answer")]
    assert answer.split()[1:5] == ["0.000", "[0.000", "0.161]", "0.600"]
    assert "20 prompts: 12 fixed, 0 broken" in lines
    assert lines[-1] == f"report: {tmp_path}/report/index.html"
    assert (tmp_path / "report" / "accuracy.png").is_file()


def test_report_of_an_evaluation_prints_its_rates(tmp_path, capsys):
    EvaluationResult(samples(12)).write(tmp_path)
    assert main(["report", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["format   1.000 [0.839 1.000]", "answer   0.600 [0.387 0.781]"]
    assert "There is one evaluation so far: nothing to compare it with." in lines


def test_report_refuses_a_folder_without_a_run(tmp_path, capsys):
    for folder in (tmp_path, tmp_path / "missing"):
        assert main(["report", str(folder)]) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"sft-lightning: error: run folder '{folder}' ")
        assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_report_imports_no_torch(tmp_path):
    EvaluationResult(samples(12)).write(tmp_path)
    script = (
        "import sys; from sft_lightning.cli.main import main; main(['report', sys.argv[1]]); "
        "print(sorted({'torch', 'lightning', 'transformers'} & sys.modules.keys()))"
    )
    output = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=True
    ).stdout
    assert output.splitlines()[-1] == "[]"


# Values of other types

WRONG = ["text", 5, 10**400, -1, 1.5, float("nan"), True, None, [], [1], {}, {"a": None}, {"a": "b"}]
METRICS = (
    *("num_examples", "num_samples", "format_accuracy", "answer_accuracy", "mean_reward", "intervals", "failures"),
    *("stop_reasons", "mean_num_tokens", "mean_entropy", "step"),
)


@pytest.mark.parametrize("name", METRICS)
def test_metrics_of_other_types_are_left_out(tmp_path, capsys, caplog, monkeypatch, note_fault, name):
    monkeypatch.setattr("sft_lightning.reporting.plots.write_plot", lambda figure, path: None)
    EvaluationResult(samples(0), 0).write(tmp_path / "evaluation" / "step-0")
    EvaluationResult(samples(12), 9).write(tmp_path / "evaluation" / "step-9")
    path = tmp_path / "evaluation" / "step-9" / "metrics.json"
    whole = json.loads(path.read_text())
    for value in WRONG:
        path.write_text(json.dumps({**whole, name: value}))
        assert main(["report", str(tmp_path)]) == 0
        assert "20 prompts: 12 fixed, 0 broken" in capsys.readouterr().out
    told = {f"'{path}': left out what has a wrong type: {name}"} if name != "step" else set()
    assert set(caplog.messages) == told
    note_fault(
        "results of other types",
        provoked="each field of metrics.json, predictions.jsonl and about.json with texts, lists, objects, booleans, "
        "huge and negative numbers",
        outcome="`report` leaves the field or the line out and says so; `compare` and `replay` refuse it in one line "
        "that names it (exit 2)",
        tries=len(METRICS) * len(WRONG),
    )


@pytest.mark.parametrize(
    "name",
    ["index", "sample", "prompt", "response", "format_correct", "strict_format_correct", "failure", "num_tokens"],
)
def test_a_sample_of_another_type_is_left_out(tmp_path, capsys, caplog, monkeypatch, name):
    monkeypatch.setattr("sft_lightning.reporting.plots.write_plot", lambda figure, path: None)
    EvaluationResult(samples(12)).write(tmp_path)
    path = tmp_path / "predictions.jsonl"
    first, *lines = path.read_text().splitlines()
    for value in ([1], {"a": 1}, -0.5):
        path.write_text("\n".join([json.dumps({**json.loads(first), name: value}), *lines]) + "\n")
        assert main(["report", str(tmp_path)]) == 0
        assert "There is one evaluation so far" in capsys.readouterr().out
        page = (tmp_path / "report" / "index.html").read_text()
        assert "Evaluated prompts <b>19</b>" in page
    assert set(caplog.messages) == {f"'{path}': left out 1 lines that are no samples, line 1 first"}


def test_a_config_that_contains_itself_is_left_out(tmp_path):
    EvaluationResult(samples(12)).write(tmp_path)
    (tmp_path / "config.yaml").write_text("data: &data\n  more: *data\n")
    assert main(["report", str(tmp_path)]) == 0
