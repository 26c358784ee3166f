import re
from itertools import pairwise
from xml.etree import ElementTree

import pytest

from sft_lightning.reporting.figures import Bars, Line, Lines
from sft_lightning.reporting.svg import draw, interval_strip, legend, nice_ticks

HOSTILE = '"/><script>alert(1)</script>&'


def lines(*curves, is_share=False):
    return Lines("name", "Title", "steps", "unit", is_share, list(curves))


def elements(svg, name):
    return [one for one in ElementTree.fromstring(svg).iter() if one.tag == name]


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (0, 4.2, [0, 1, 2, 3, 4, 5]),
        (-0.3, 0.3, [-0.4, -0.2, 0, 0.2, 0.4]),
        (0, 0.00012, [0, 0.00005, 0.0001, 0.00015]),
        (0, 1200, [0, 500, 1000, 1500]),
        (3, 3, [3, 4]),
        (0, 0, [0, 0.2]),
    ],
)
def test_ticks_are_round_and_hold_the_values(low, high, ticks):
    assert nice_ticks(low, high) == ticks


def test_points_are_drawn_at_their_values():
    """The plot is 324 wide from 46, and 178 high down to 188: half of the x and of the y range is in its middle."""
    svg = draw(lines(Line("a", [(0, 0.0), (50, 0.5), (100, 1.0)], []), is_share=True))
    places = [(one.get("cx"), one.get("cy")) for one in elements(svg, "circle")]
    assert places == [("46.0", "188.0"), ("208.0", "99.0"), ("370.0", "10.0")]
    assert [one.text for one in elements(svg, "title")] == ["a, step 0: 0", "a, step 50: 0.5", "a, step 100: 1"]


def test_decades_are_equally_far_apart_on_a_logarithmic_scale():
    """The plot is 178 high: from 0.01 at 188 over 0.1 and 1 to 10 at 10 it is a third of that a decade."""
    figure = Lines("a", "Loss", "steps", "nats", False, [Line("a", [(0, 10.0), (1, 0.1), (2, 0.02)], [])], True)
    svg = draw(figure)
    assert [one.get("cy") for one in elements(svg, "circle")] == ["10.0", "128.7", "170.1"]
    assert {"0.01", "0.1", "1", "10"} <= {one.text for one in elements(svg, "text")}


def test_a_band_follows_its_upper_and_lower_bound():
    svg = draw(lines(Line("a", [(0, 0.5), (100, 0.5)], [(0.0, 1.0), (0.25, 0.75)]), is_share=True))
    (band,) = [one.get("d") for one in elements(svg, "path") if "band" in one.get("class")]
    assert band == "M46.0 10.0L370.0 54.5L370.0 143.5L46.0 188.0Z"


def test_a_curve_of_many_points_keeps_its_spikes():
    points = [(float(step), 1.0) for step in range(10_000)]
    points[7777] = (7777.0, 9.0)
    svg = draw(lines(Line("a", points, [], is_marked=False)))
    (path,) = [one.get("d") for one in elements(svg, "path")]
    places = [float(y) for y in re.findall(r"[ML]\S+ (\S+?)(?=L|$)", path)]
    assert len(places) <= 400
    assert places.count(min(places)) == 1


def test_bars_are_stacked_from_the_bottom():
    svg = draw(Bars("name", "Title", "x", "y", True, ["1", "2"], {"a": [0.25, 0.0], "b": [0.75, 1.0]}))
    bars = [(one.get("class"), one.get("y"), one.get("height")) for one in elements(svg, "rect")]
    assert bars == [("fill c0", "143.5", "44.5"), ("fill c1", "10.0", "133.5"), ("fill c1", "10.0", "178.0")]


def test_labels_of_many_bars_do_not_run_into_each_other():
    svg = draw(Bars("name", "Title", "x", "y", False, [f"{n}000" for n in range(100)], {"a": [1.0] * 100}))
    places = [float(one.get("x")) for one in elements(svg, "text") if (one.text or "").endswith("000")]
    assert all(after - before >= 35 for before, after in pairwise(places))


@pytest.mark.parametrize("points", [[(0, 0.0)], [(5, 3.0)], [(0, -2.0), (1, -2.0)]])
def test_few_and_equal_values_are_drawn(points):
    svg = draw(lines(Line("a", points, [])))
    assert len(elements(svg, "circle")) == len(points)
    assert "nan" not in svg


def test_names_are_escaped():
    bars = Bars(HOSTILE, HOSTILE, HOSTILE, HOSTILE, True, [HOSTILE], {HOSTILE: [1.0]})
    curves = Lines(HOSTILE, HOSTILE, HOSTILE, HOSTILE, True, [Line(HOSTILE, [(0, 1.0)], [])])
    for figure in (bars, curves):
        for html in (draw(figure), legend(figure)):
            assert not elements(html, "script")
            assert HOSTILE not in html


def test_a_strip_shows_both_rates_on_one_scale():
    """From 4 to 156: a half is at 80."""
    svg = interval_strip((0.0, 0.0, 0.5), (0.5, 0.25, 1.0))
    marks = {one.get("class"): one.get("cx") for one in elements(svg, "circle")}
    assert marks == {"before": "4.0", "after": "80.0"}
    bounds = {one.get("class"): (one.get("x1"), one.get("x2")) for one in elements(svg, "line")}
    assert bounds["before"] == ("4.0", "80.0")
    assert bounds["after"] == ("42.0", "156.0")
    assert len(elements(interval_strip(None, (0.5, 0.25, 1.0)), "circle")) == 1
