import matplotlib.image
import pytest

from sft_lightning.sweep.plot import draw
from sft_lightning.sweep.results import read_results


def colours(image):
    """Returns the colours of a picture as numbers from 0 to 255, without the transparency."""
    return {tuple(pixel) for pixel in (image[..., :3] * 255).round().astype(int).reshape(-1, 3).tolist()}


@pytest.mark.parametrize("labels", [{"100": 100}, {"100": 100, "full": 400}])
def test_the_picture_shows_both_accuracies(sweep, labels):
    draw(read_results(sweep, labels), sweep / "sweep.png")
    image = matplotlib.image.imread(sweep / "sweep.png")
    assert image.shape == (585, 1430, 4)
    left = colours(image[:, :715])
    assert {(0x0B, 0x6E, 0x99), (0xC8, 0x69, 0x1C)} <= left, "answers and formats against size"
    assert (0x44, 0x01, 0x54) in colours(image[:, 715:]), "the smallest size, in viridis' first colour, over steps"
    assert [path.name for path in sweep.glob("*.png*")] == ["sweep.png"]
    assert not list(sweep.glob(".*"))


def test_a_run_without_a_baseline_is_drawn(sweep):
    (result,) = read_results(sweep, {"full": 400})
    draw([type(result)(**{**vars(result), "evaluations": result.evaluations[1:]})], sweep / "sweep.png")
    assert (sweep / "sweep.png").stat().st_size > 10_000
