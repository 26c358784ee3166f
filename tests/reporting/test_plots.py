import subprocess
import sys

import pytest
from matplotlib.image import imread

from sft_lightning.reporting.figures import Bars, Line, Lines
from sft_lightning.reporting.plots import write_plot

CURVES = Lines("a", "Accuracy $x", "steps", "share", True, [Line("_a $", [(0, 0.0), (5, 1.0)], [(0, 0.2), (0.8, 1)])])
BARS = Bars("b", "Failures", "step", "answers", False, ["0", "5"], {"wrong": [3.0, 1.0], "right": [1.0, 3.0]})


@pytest.mark.parametrize(("figure", "colors"), [(CURVES, 1), (BARS, 2)])
def test_a_plot_is_a_picture_with_something_on_it(tmp_path, figure, colors):
    write_plot(figure, tmp_path / "plot.png")
    picture = imread(tmp_path / "plot.png")
    assert picture.shape[:2] == (800, 1280)
    palette = [(0x2A / 255, 0x62 / 255, 0xA6 / 255), (0xC0 / 255, 0x5A / 255, 0x1C / 255)]
    for color in palette[:colors]:
        assert (abs(picture[:, :, :3] - color).max(axis=2) < 0.01).sum() > 500


def test_plots_need_no_screen_and_no_pyplot(tmp_path):
    script = (
        "import sys; from pathlib import Path; from sft_lightning.reporting.figures import Bars; "
        "from sft_lightning.reporting.plots import write_plot; assert 'matplotlib' not in sys.modules; "
        f"write_plot(Bars('b', 't', 'x', 'y', False, ['1'], {{'a': [1.0]}}), Path({str(tmp_path / 'p.png')!r})); "
        "print('matplotlib.pyplot' in sys.modules)"
    )
    assert (
        subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout == "False\n"
    )


def test_any_name_can_be_drawn(tmp_path):
    names = ["_hidden", "$x^$", "\\alpha{", "half of \ud83d", "two\nlines\x00", "long " * 100, " "]
    write_plot(Bars("b", "t", "x", "y", True, ["1"], {name: [0.1] for name in names}), tmp_path / "plot.png")
    assert imread(tmp_path / "plot.png").shape[:2] == (800, 1280)
