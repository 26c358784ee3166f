import json

import pytest

from sft_lightning.errors import UserError
from sft_lightning.evaluation.result import EvaluationResult
from sft_lightning.reporting.run_files import read_run

METRICS = ("step,train/loss,val/loss", "10,2.5,", "20,1.5,", "20,,1.75")


def test_all_of_a_run_is_read(tmp_path, write_run, samples_of):
    run = write_run(tmp_path / "my-run", {0: samples_of(3, 0), 20: samples_of(3, 2), 100: samples_of(3, 3)}, METRICS)
    (run / "best").symlink_to("checkpoint-20")
    (run / "final").mkdir()
    (run / "final" / "manifest.json").write_text('{"step": 100}')
    files = read_run(run)
    assert files.name == "my-run"
    assert files.config == {"seed_everything": 42, "model": {"model_path": "tiny"}}
    assert files.series == {"train/loss": [(10, 2.5), (20, 1.5)], "val/loss": [(20, 1.75)]}
    assert [one.step for one in files.evaluations] == [0, 20, 100]
    assert [one.metrics["num_answer_correct"] for one in files.evaluations] == [0, 2, 3]
    assert (files.best_step, files.final_step, files.last_step) == (20, 100, 100)
    assert files.baseline is files.evaluations[0]
    assert files.latest is files.evaluations[2]
    assert [row["answer_correct"] for row in files.latest.samples] == [True, True, True]


def test_a_plain_evaluation_is_one_evaluation_without_a_step(tmp_path, samples_of):
    EvaluationResult(samples_of(4, 1)).write(tmp_path)
    files = read_run(tmp_path)
    assert [(one.step, len(one.samples)) for one in files.evaluations] == [(None, 4)]
    assert (files.baseline, files.last_step, files.best_step, files.final_step) == (None, None, None, None)


def test_lines_that_a_crash_cut_off_do_not_count(tmp_path, write_run, samples_of):
    run = write_run(tmp_path, {0: samples_of(3, 0)}, METRICS)
    with (run / "metrics.csv").open("a") as file:
        file.write("30,0.1")  # of 30,0.125, perhaps
    with (run / "evaluation" / "step-0" / "predictions.jsonl").open("a") as file:
        file.write('{"index": 3, "sample": 0, "prompt": "Quest')
    files = read_run(run)
    assert files.series["train/loss"] == [(10, 2.5), (20, 1.5)]
    assert [row["index"] for row in files.latest.samples] == [0, 1, 2]


def test_unreadable_files_are_skipped(tmp_path, write_run, samples_of):
    run = write_run(tmp_path, {0: samples_of(2, 0), 5: samples_of(2, 1), 9: samples_of(2, 2)}, METRICS, config="a: [")
    (run / "evaluation" / "step-5" / "metrics.json").write_text('{"step": 5, "num_ex')
    for name in ("metrics.json", "predictions.jsonl"):
        (run / "evaluation" / "step-9" / name).write_bytes(b"\xff\x00[1, 2]\n")
    files = read_run(run)
    assert files.config == {}
    assert [(one.step, bool(one.metrics)) for one in files.evaluations] == [(0, True), (5, False)]
    assert files.latest.step == 5


def test_nonfinite_and_nonnumeric_values_are_skipped(tmp_path, write_run):
    run = write_run(tmp_path, {}, ("step,train/loss,note", "1,nan,hello", "2,inf,", "x,1.0,", "3,0.5,"))
    assert read_run(run).series == {"train/loss": [(3, 0.5)]}


def test_rows_of_older_runs_get_their_numbers(tmp_path):
    row = {"prompt": "a", "response": "b\u2028c", "format_correct": True, "answer_correct": False}
    lines = [json.dumps(row, ensure_ascii=False), '{"prompt": 3}', "[]", json.dumps(row)]
    (tmp_path / "predictions.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    samples = read_run(tmp_path).latest.samples
    assert [(one["index"], one["sample"], one["response"]) for one in samples] == [
        (0, 0, "b\u2028c"),
        (3, 0, "b\u2028c"),
    ]


def test_a_folder_that_holds_nothing_is_refused(tmp_path):
    with pytest.raises(UserError, match="holds nothing to report: no config"):
        read_run(tmp_path)
    with pytest.raises(UserError, match=r"^run folder '/no/such' does not exist"):
        read_run(tmp_path / "/no/such")
