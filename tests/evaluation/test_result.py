"""Compare the metrics of samples with calculations by hand, and test the files."""

import json

import pytest

from sft_lightning.errors import UserError
from sft_lightning.evaluation.result import EvaluationResult, read_samples
from sft_lightning.evaluation.statistics import bootstrap_interval, wilson_interval


def sample(index, format_correct, answer_correct, num_tokens=10, **fields):
    return {
        "index": index,
        "sample": 0,
        "prompt": f"caf\u00e9 {index}?",
        "response": "r",
        "ground_truth": "1",
        "format_correct": format_correct,
        "strict_format_correct": None,
        "answer_correct": answer_correct,
        "answer": None,
        "failure": None,
        "timed_out": False,
        "stop_reason": "eos",
        "num_tokens": num_tokens,
        "mean_entropy": None,
        **fields,
    }


SAMPLES = [
    sample(0, True, True, 12, mean_entropy=0.5, strict_format_correct=True),
    sample(1, False, True, 11, failure="thought_not_closed", strict_format_correct=False),
    sample(2, False, False, 20, failure="cut_at_limit", stop_reason="length", strict_format_correct=False),
    sample(3, True, False, 4, failure="timed_out", timed_out=True, mean_entropy=1.0, strict_format_correct=False),
]


def test_metrics():
    assert EvaluationResult(SAMPLES, step=300).metrics() == {
        "step": 300,
        "num_examples": 4,
        "num_samples": 1,
        "num_format_correct": 2,
        "num_strict_format_correct": 1,
        "num_answer_correct": 2,
        "num_rewarded": 1,
        "num_timed_out": 1,
        "format_accuracy": 0.5,
        "strict_format_accuracy": 0.25,
        "answer_accuracy": 0.5,
        "mean_reward": 0.25,
        "intervals": {
            "format_accuracy": list(wilson_interval(2, 4)),
            "strict_format_accuracy": list(wilson_interval(1, 4)),
            "answer_accuracy": list(wilson_interval(2, 4)),
            "mean_reward": list(wilson_interval(1, 4)),
        },
        "pass_at": {},
        "maj_at": {},
        "mean_num_tokens": {"all": 11.75, "right": 11.5, "wrong": 12.0},
        "mean_entropy": 0.625,  # of tokens: (12 * 0.5 + 4 * 1) / 16
        "stop_reasons": {"eos": 3, "length": 1},
        "failures": {"cut_at_limit": 1, "thought_not_closed": 1, "timed_out": 1},
    }


def test_unknown_values_are_null():
    metrics = EvaluationResult([sample(0, True, True)]).metrics()
    assert metrics["step"] is None
    assert metrics["strict_format_accuracy"] is None
    assert metrics["num_strict_format_correct"] is None
    assert metrics["mean_entropy"] is None
    assert metrics["mean_num_tokens"] == {"all": 10.0, "right": 10.0, "wrong": None}


def test_several_answers_to_a_prompt():
    first = [("72", True), ("8", False), ("72.0", True), ("5", True)]
    second = [("1", False), ("1", False), ("2", True), ("3", False)]
    samples = [
        sample(number // 4, True, right, sample=number % 4, answer=answer)
        for number, (answer, right) in enumerate(first + second)
    ]
    metrics = EvaluationResult(samples).metrics()
    assert (metrics["num_examples"], metrics["num_samples"], metrics["num_answer_correct"]) == (2, 4, 4)
    assert metrics["answer_accuracy"] == 0.5
    # Three of four right: every pair holds one. One of four: 3 of 6 pairs do.
    assert metrics["pass_at"] == {"1": 0.5, "2": 0.75, "4": 1.0}
    assert metrics["maj_at"] == {"4": 0.5}
    assert metrics["intervals"]["answer_accuracy"] == list(bootstrap_interval([0.75, 0.25]))


def test_parts_add_up():
    assert EvaluationResult(SAMPLES[:1] + SAMPLES[1:]).metrics() == EvaluationResult(SAMPLES).metrics()


def test_rates_of_no_samples_are_zero():
    metrics = EvaluationResult().metrics()
    assert (metrics["num_examples"], metrics["answer_accuracy"], metrics["intervals"]) == (0, 0.0, {})


def test_files(tmp_path):
    EvaluationResult(SAMPLES, step=5).write(tmp_path / "new" / "folder")
    lines = (tmp_path / "new" / "folder" / "predictions.jsonl").read_bytes().decode().split("\n")
    assert lines[0] == (
        '{"index": 0, "sample": 0, "prompt": "caf\u00e9 0?", "response": "r", "ground_truth": "1", '
        '"format_correct": true, "strict_format_correct": true, "answer_correct": true, "answer": null, '
        '"failure": null, "timed_out": false, "stop_reason": "eos", "num_tokens": 12, "mean_entropy": 0.5}'
    )
    assert lines[4:] == [""]
    assert read_samples(tmp_path / "new" / "folder") == SAMPLES
    metrics = json.loads((tmp_path / "new" / "folder" / "metrics.json").read_text())
    assert metrics == EvaluationResult(SAMPLES, step=5).metrics()
    assert sorted(path.name for path in (tmp_path / "new" / "folder").iterdir()) == [
        "metrics.json",
        "predictions.jsonl",
    ]


def test_writing_again_replaces_the_earlier_evaluation(tmp_path):
    EvaluationResult(SAMPLES).write(tmp_path)
    EvaluationResult(SAMPLES[:1]).write(tmp_path)
    assert read_samples(tmp_path) == SAMPLES[:1]
    assert json.loads((tmp_path / "metrics.json").read_text())["num_examples"] == 1


def test_a_lone_surrogate_is_written_as_an_escape(tmp_path):
    broken = sample(0, True, True, response="\ud800")
    EvaluationResult([broken]).write(tmp_path)
    assert b'"response": "\\ud800"' in (tmp_path / "predictions.jsonl").read_bytes()
    assert read_samples(tmp_path) == [broken]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"index": 0', "predictions.jsonl:2: not a sample"),
        ("7", "predictions.jsonl:2: not a sample"),
        ('{"index": 0, "sample": 0}', "predictions.jsonl:2: a sample without prompt, ground_truth, format_correct"),
    ],
)
def test_a_damaged_line_is_named(tmp_path, line, message):
    EvaluationResult(SAMPLES[:1]).write(tmp_path)
    with (tmp_path / "predictions.jsonl").open("a") as file:
        file.write(line + "\n")
    with pytest.raises(UserError, match=message):
        read_samples(tmp_path)


def test_a_folder_without_an_evaluation_is_named(tmp_path):
    with pytest.raises(UserError, match=r"holds no predictions\.jsonl"):
        read_samples(tmp_path / "nowhere")
