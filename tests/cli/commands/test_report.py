"""Test the command sft-lightning report."""

import subprocess
import sys

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
