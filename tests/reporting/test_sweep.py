import json
import shutil

import pytest

from sft_lightning.errors import UserError
from sft_lightning.evaluation.statistics import mcnemar_p_value
from sft_lightning.reporting.sweep import (
    Evaluation,
    Rate,
    SizeResult,
    is_finished,
    read_results,
    report,
    size_table,
    step_table,
)

SIZES = {"full": 400, "100": 100, "200": 200}


def test_finished_runs_are_read_smallest_first(sweep):
    (sweep / "size-200" / "evaluation").mkdir(parents=True)  # begun, not finished
    small, large = read_results(sweep, SIZES)
    assert (small.label, small.num_examples, small.folder, small.num_steps) == ("100", 100, "size-100", 12)
    assert (large.label, large.num_examples, large.folder, large.num_steps) == ("full", 400, "size-full", 50)
    assert (small.val_loss, large.val_loss) == (2.25, None)
    assert [each.step for each in small.evaluations] == [0, 1, 12]
    assert (small.before.step, small.last.step) == (0, 12)
    assert (small.last.format_accuracy.value, small.last.answer_accuracy.value) == (0.8, 0.4)
    assert small.last.num_prompts == 10


def test_intervals_are_those_of_the_evaluation(sweep):
    path = sweep / "size-full" / "evaluation" / "step-50" / "metrics.json"
    metrics = json.loads(path.read_text())
    metrics["intervals"] = {"answer_accuracy": [0.5, 0.75], "format_accuracy": [0.25, 1.0]}
    path.write_text(json.dumps(metrics))
    last = read_results(sweep, SIZES)[1].last
    assert (last.answer_accuracy.low, last.answer_accuracy.high) == (0.5, 0.75)
    assert (last.format_accuracy.low, last.format_accuracy.high) == (0.25, 1.0)


def test_the_p_value_compares_with_the_next_smaller_size(sweep):
    small, large = read_results(sweep, SIZES)
    assert small.p_value is None
    assert large.p_value == mcnemar_p_value(6, 0) == 0.03125  # six heads in six throws


def test_other_prompts_have_no_p_value(sweep):
    path = sweep / "size-full" / "evaluation" / "step-50" / "predictions.jsonl"
    path.write_text(path.read_text().replace("2+2?", "2+3?"))
    assert read_results(sweep, SIZES)[1].p_value is None


def test_a_run_is_finished_when_its_final_model_is_there(sweep):
    assert is_finished(sweep / "size-100")
    (sweep / "size-100" / "final" / "manifest.json").unlink()
    assert not is_finished(sweep / "size-100")
    assert not is_finished(sweep / "nowhere")


def test_a_finished_run_without_an_evaluation_is_an_error(sweep):
    shutil.rmtree(sweep / "size-100" / "evaluation")
    with pytest.raises(UserError, match=r"size-100' has no evaluation/step-<n>/metrics\.json"):
        read_results(sweep, SIZES)


def test_the_table_of_sizes(sweep):
    # Wilson's intervals of 0, 2, 4, 8 and 10 of 10.
    assert size_table(read_results(sweep, {"100": 100, "full": 400})).splitlines() == [
        "|   size | examples | steps | val loss |      format accuracy |      answer accuracy | p vs smaller |",
        "| -----: | -------: | ----: | -------: | -------------------: | -------------------: | -----------: |",
        "| before |        0 |     0 |          | 0.200 [0.057, 0.510] | 0.000 [0.000, 0.278] |              |",
        "|    100 |      100 |    12 |    2.250 | 0.800 [0.490, 0.943] | 0.400 [0.168, 0.687] |              |",
        "|   full |      400 |    50 |          | 1.000 [0.722, 1.000] | 1.000 [0.722, 1.000] |        0.031 |",
    ]


def test_the_table_over_training(sweep):
    lines = step_table(read_results(sweep, {"100": 100, "full": 400})).splitlines()
    assert [line.split("|")[1:3] for line in lines[2:]] == [
        ["  100 ", "    0 "],
        ["  100 ", "    1 "],
        ["  100 ", "   12 "],
        [" full ", "    0 "],
        [" full ", "   50 "],
    ]
    assert lines[3].endswith("| 1.000 [0.722, 1.000] | 0.300 [0.108, 0.603] |")


def test_small_p_values_and_a_missing_baseline_in_the_table():
    rate = Rate(0.5, 0.4, 0.6)
    result = SizeResult("8", 8, "size-8", 1, None, (Evaluation(1, 100, rate, rate),), p_value=1e-9)
    lines = size_table([result]).splitlines()
    assert len(lines) == 3
    assert lines[2].endswith("|      < 0.001 |")


def test_the_report_contains_both_tables_and_the_plot(sweep):
    results = read_results(sweep, {"100": 100, "full": 400})
    text = report(results)
    assert size_table(results) in text
    assert step_table(results) in text
    assert "(sweep.png)" in text
    assert "10 prompts" in text
