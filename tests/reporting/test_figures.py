import pytest

from sft_lightning.reporting.figures import Bars, Line, evaluation_rate, figures
from sft_lightning.reporting.run_files import read_run


@pytest.fixture
def figure_of(tmp_path, write_run):
    def make(name, evaluations, metrics=()):
        found = {figure.name: figure for figure in figures(read_run(write_run(tmp_path / "run", evaluations, metrics)))}
        return found.get(name)

    return make


def test_losses_are_curves_over_steps(figure_of):
    figure = figure_of("loss", {}, ("step,train/loss,val/loss", "10,2.5,", "20,1.5,1.75"))
    assert figure.lines == [
        Line("train/loss", [(10, 2.5), (20, 1.5)], [], is_marked=False),
        Line("val/loss", [(20, 1.75)], [], is_marked=True),
    ]


def test_accuracy_has_its_wilson_interval(figure_of, samples_of):
    """Wilson's interval of 8 of 10 is 0.490 to 0.943, of 0 of 10 0 to 0.278."""
    figure = figure_of("accuracy", {0: samples_of(10, 0, format_correct=False), 50: samples_of(10, 8)})
    assert [line.name for line in figure.lines] == ["format", "answer"]
    answer = figure.lines[1]
    assert answer.points == [(0, 0.0), (50, 0.8)]
    assert answer.band == [pytest.approx((0, 0.278), abs=5e-4), pytest.approx((0.490, 0.943), abs=5e-4)]


def test_lengths_are_split_by_outcome(figure_of, samples_of):
    """Lengths 10 to 14 of five answers, the first two right."""
    lengths = figure_of("response-length", {5: samples_of(5, 2)})
    assert [(line.name, line.points) for line in lengths.lines] == [
        ("right answers", [(5, 10.5)]),
        ("wrong answers", [(5, 13.0)]),
        ("all answers", [(5, 12.0)]),
    ]


def test_the_last_lengths_are_counted_in_bins(figure_of, samples_of):
    """Lengths up to 31 in bins of two tokens."""
    rows = samples_of(3, 1)
    for row, num_tokens in zip(rows, (0, 3, 31), strict=True):
        row["num_tokens"] = num_tokens
    bars = figure_of("response-length-last", {5: rows})
    assert bars.labels == [str(number) for number in range(0, 32, 2)]
    assert bars.parts == {"right": [1, *[0] * 15], "wrong": [0, 1, *[0] * 13, 1]}


def test_failures_and_right_answers_are_shares_of_all(figure_of, samples_of):
    first = samples_of(4, 0)
    first[0]["failure"] = "cut_at_limit"
    bars = figure_of("failures", {0: first, 7: samples_of(4, 3)})
    assert isinstance(bars, Bars)
    assert bars.labels == ["0", "7"]
    assert bars.parts == {"right": [0, 0.75], "wrong": [0.75, 0.25], "cut at limit": [0.25, 0]}


def test_stop_reasons_are_shares_of_samples(figure_of, samples_of):
    rows = [*samples_of(2, 2), *samples_of(2, 2, sample=1, stop_reason="eos")]
    assert figure_of("stop-reasons", {3: rows}).parts == {"eos": [0.5], "stop string": [0.5]}


def test_entropy_of_answers_and_training_share_a_figure(figure_of, samples_of):
    figure = figure_of("entropy", {3: samples_of(2, 2)}, ("step,train/entropy", "1,2.0"))
    assert [(line.name, line.points) for line in figure.lines] == [
        ("generated answers", [(3, 0.5)]),
        ("training responses", [(1, 2.0)]),
    ]


def test_data_without_numbers_gives_no_figure(tmp_path, write_run):
    assert figures(read_run(write_run(tmp_path, {}))) == []


@pytest.mark.parametrize(
    "metrics", [{}, {"answer_accuracy": None, "num_examples": 3}, {"answer_accuracy": 0.5}, {"num_examples": 3}]
)
def test_a_rate_that_is_not_known_is_none(metrics):
    assert evaluation_rate(metrics, "answer_accuracy") is None


def test_a_rate_takes_the_interval_that_was_written():
    metrics = {"answer_accuracy": 0.5, "num_examples": 10, "intervals": {"answer_accuracy": [0.4, 0.6]}}
    assert evaluation_rate(metrics, "answer_accuracy") == (0.5, 0.4, 0.6)


@pytest.mark.parametrize(
    ("values", "is_logarithmic"), [((3.1, 0.1), True), ((2.9, 0.1), False), ((3.0, 0.0), False), ((3.0, -1.0), False)]
)
def test_a_loss_that_falls_far_has_a_logarithmic_axis(figure_of, values, is_logarithmic):
    figure = figure_of("loss", {}, ("step,train/loss", *(f"{step},{value}" for step, value in enumerate(values))))
    assert figure.is_logarithmic == is_logarithmic
    assert figure.y_label == "nats per label token" + (", logarithmic" if is_logarithmic else "")
