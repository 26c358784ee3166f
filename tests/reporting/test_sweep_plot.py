import matplotlib.image
import pytest

from sft_lightning.reporting.sweep import read_results
from sft_lightning.reporting.sweep_plot import draw, plot

SIZES = {"100": 100, "full": 4000}


def lines(axes):
    """Returns the points of each line by its label. Of lines without one, the last."""
    return {line.get_label(): [tuple(point) for point in line.get_xydata().tolist()] for line in axes.get_lines()}


def test_accuracies_are_plotted_over_sizes_with_intervals(sweep):
    by_size, _ = plot(read_results(sweep, SIZES)).axes
    assert by_size.get_xscale() == "log"
    assert [label.get_text() for label in by_size.get_xticklabels()] == ["100", "4,000"]
    answers, formats = by_size.containers
    assert answers.get_label() == "answer accuracy"
    assert answers.lines[0].get_xydata().tolist() == [[100, 0.4], [4000, 1.0]]
    assert formats.lines[0].get_xydata().tolist() == [[100, 0.8], [4000, 1.0]]
    (bars,) = answers.lines[2]
    # Wilson's intervals of 4 and of 10 of 10.
    assert [segment[:, 1].round(3).tolist() for segment in bars.get_segments()] == [[0.168, 0.687], [0.722, 1.0]]


def test_accuracy_during_training_is_a_line_for_each_size(sweep):
    _, by_step = plot(read_results(sweep, SIZES)).axes
    assert lines(by_step) == {"100 examples": [(1, 0.3), (12, 0.4)], "4000 examples": [(50, 1.0)]}


def test_accuracy_before_training_is_a_dotted_line(sweep):
    results = read_results(sweep, SIZES)
    assert "before training" in lines(plot(results).axes[0])
    first = results[0]
    without = type(first)(**{**vars(first), "evaluations": first.evaluations[1:]})
    assert "before training" not in lines(plot([without]).axes[0])


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("labels", [{"100": 100}, {"full": 4000}, SIZES])
def test_the_plot_is_written_atomically(sweep, labels):
    draw(read_results(sweep, labels), sweep / "sweep.png")
    image = matplotlib.image.imread(sweep / "sweep.png")
    assert image.shape == (585, 1430, 4)
    assert not list(sweep.glob(".*"))
