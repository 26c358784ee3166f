import pytest

from sft_lightning.evaluation.comparison import PairedRate
from sft_lightning.reporting.before_after import before_and_after, p_text, points, rates_of, verdict
from sft_lightning.reporting.run_files import read_run


def rate(before, after, fixed, broken, p_value, num_pairs=320, bounds=(0.05, 0.1)):
    return PairedRate(num_pairs, before, after, (0, 1), (0, 1), after - before, bounds, fixed, broken, p_value)


@pytest.mark.parametrize(
    ("paired", "sentence"),
    [
        (
            rate(0.025, 0.1, 30, 6, 0.00007),
            "Answer accuracy rose from 2.5% to 10.0% on 320 prompts. That is more than noise: 30 fixed, 6 broken, "
            "p < 0.001; 95% interval of the change +5.0 to +10.0 points.",
        ),
        (
            rate(0.5, 0.4, 4, 36, 0.003, bounds=(-0.15, -0.05)),
            "Answer accuracy fell from 50.0% to 40.0% on 320 prompts. That is more than noise: 4 fixed, 36 broken, "
            "p = 0.003; 95% interval of the change \N{MINUS SIGN}15.0 to \N{MINUS SIGN}5.0 points.",
        ),
        (
            rate(0.5, 0.5125, 10, 6, 0.455),
            "Answer accuracy rose from 50.0% to 51.2% on 320 prompts. That may be noise: 10 fixed, 6 broken, "
            "p = 0.455.",
        ),
        (
            rate(0.5, 0.5, 3, 3, 1.0),
            "Answer accuracy stayed at 50.0% on 320 prompts. That may be noise: 3 fixed, 3 broken, p = 1.",
        ),
        (rate(1.0, 1.0, 0, 0, 1.0, num_pairs=1), "Answer accuracy did not change on any of 1 prompt: it is 100.0%."),
    ],
)
def test_a_verdict_says_whether_a_change_is_more_than_noise(paired, sentence):
    assert verdict("Answer accuracy", paired) == sentence


@pytest.mark.parametrize(
    ("p_value", "text"), [(0.0009, "< 0.001"), (0.001, "0.001"), (0.0499, "0.050"), (0.0502, "0.050"), (1.0, "1")]
)
def test_p_values_are_written_with_three_digits(p_value, text):
    assert p_text(p_value) == text


def test_differences_are_signed_points():
    assert [points(value) for value in (0.125, -0.0312, 0.0)] == ["+12.5", "\N{MINUS SIGN}3.1", "+0.0"]


def test_the_first_and_the_last_evaluation_are_compared(tmp_path, write_run, samples_of):
    run = write_run(tmp_path, {0: samples_of(4, 1), 5: samples_of(4, 4), 9: samples_of(4, 2)})
    changed = before_and_after(read_run(run))
    answer = changed.comparison.rates["answer_accuracy"]
    assert (answer.before, answer.after, answer.num_fixed, answer.num_broken) == (0.25, 0.5, 1, 0)
    assert list(changed.changes.values()) == ["still right", "fixed", "still wrong", "still wrong"]
    assert changed.note == ""


def test_only_prompts_of_both_are_compared(tmp_path, write_run, samples_of):
    run = write_run(tmp_path, {0: samples_of(4, 0), 9: samples_of(3, 3)})
    changed = before_and_after(read_run(run))
    assert changed.comparison.rates["mean_reward"].num_pairs == 3
    assert changed.note == "The evaluations have 4 and 3 readable prompts; compared are the 3 that both have."


def test_other_prompts_cannot_be_compared(tmp_path, write_run, samples_of):
    run = write_run(tmp_path, {0: samples_of(2, 0), 9: samples_of(2, 0, prompt="another")})
    changed = before_and_after(read_run(run))
    assert changed.comparison is None
    assert changed.note.startswith(
        "The first and the last evaluation cannot be compared: the evaluations differ in the"
    )


def test_one_evaluation_is_compared_with_nothing(tmp_path, write_run, samples_of):
    changed = before_and_after(read_run(write_run(tmp_path, {0: samples_of(2, 1)})))
    assert (changed.comparison, changed.changes) == (None, {})
    assert changed.note == "There is one evaluation so far: nothing to compare it with."
    assert before_and_after(read_run(write_run(tmp_path / "none", {}))).note == ""


def test_rates_come_from_samples_if_metrics_are_missing(tmp_path, write_run, samples_of):
    run = write_run(tmp_path, {0: samples_of(10, 8, strict_format_correct=None)})
    with_metrics = rates_of(read_run(run).latest)
    assert with_metrics["answer_accuracy"] == pytest.approx((0.8, 0.490, 0.943), abs=5e-4)
    (run / "evaluation" / "step-0" / "metrics.json").unlink()
    evaluation = read_run(run).latest
    assert evaluation.metrics == {}
    assert rates_of(evaluation) == with_metrics
    assert list(with_metrics) == ["format_accuracy", "answer_accuracy", "mean_reward"]
