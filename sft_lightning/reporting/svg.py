"""Draw figures as inline SVG. Colors come from the style sheet of the page, for light and dark mode."""

from html import escape
from itertools import pairwise
from math import ceil, floor, log10

from sft_lightning.reporting.figures import Bars, Figure, Line, Lines, Rate

# In CSS pixels on a narrow screen; scaled up on a wide one.
_WIDTH, _HEIGHT = 380, 230
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 10, 10, 42
_NUM_COLORS = 8
_SHARES = [0.0, 0.25, 0.5, 0.75, 1.0]
_MAX_POINTS = 400  # of a curve: more than pixels can show


def draw(figure: Figure) -> str:
    """Returns the figure as an ``<svg>`` element with escaped text."""
    body = _draw_lines(figure) if isinstance(figure, Lines) else _draw_bars(figure)
    return (
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(_describe(figure))}">'
        f"{body}"
        f'<text class="label" x="{(_LEFT + _WIDTH - _RIGHT) / 2:g}" y="{_HEIGHT - 6}" text-anchor="middle">'
        f"{escape(figure.x_label)}</text></svg>"
    )


def legend(figure: Figure) -> str:
    """Returns the names of curves or parts with their colors, as a list."""
    names = [line.name for line in figure.lines] if isinstance(figure, Lines) else list(figure.parts)
    kind = "line" if isinstance(figure, Lines) else "fill"
    items = (
        f'<li><svg class="swatch" viewBox="0 0 18 10" aria-hidden="true">{_swatch(kind, number)}</svg>'
        f"{escape(name)}</li>"
        for number, name in enumerate(names)
    )
    return f'<ul class="legend">{"".join(items)}</ul>'


def interval_strip(before: Rate | None, after: Rate) -> str:
    """Returns a scale from 0 to 100% with one or two rates and their bounds, each (rate, low, high)."""
    rows = [("before", before, 9), ("after", after, 21)] if before else [("after", after, 15)]
    marks = []
    for name, rate, y in rows:
        assert rate is not None
        value, low, high = (4 + 152 * min(1.0, max(0.0, share)) for share in rate)
        marks.append(
            f'<line class="{name}" x1="{low:.1f}" x2="{high:.1f}" y1="{y}" y2="{y}"/>'
            f'<circle class="{name}" cx="{value:.1f}" cy="{y}" r="3.5"/>'
        )
    ticks = "".join(f'<line class="grid" x1="{x}" x2="{x}" y1="2" y2="28"/>' for x in (4, 42, 80, 118, 156))
    return f'<svg class="strip" viewBox="0 0 160 30" aria-hidden="true">{ticks}{"".join(marks)}</svg>'


def nice_ticks(low: float, high: float) -> list[float]:
    """Returns four to seven round numbers, the first at or below ``low`` and the last at or above ``high``.

    Example:
        >>> nice_ticks(0.0, 4.2)
        [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]
    """
    span = (high - low) or abs(high) or 1.0
    unit = 10.0 ** floor(log10(span / 4))
    step = next(size * unit for size in (1, 2, 5, 10) if span / (size * unit) <= 5)
    first, last = floor(low / step + 1e-9), ceil(high / step - 1e-9)
    return [round(number * step, 12) for number in range(first, max(last, first + 1) + 1)]


def _describe(figure: Figure) -> str:
    if isinstance(figure, Bars):
        return f"{figure.title}: stacked bars of {', '.join(figure.parts)}"
    ends = [f"{line.name} from {line.points[0][1]:.4g} to {line.points[-1][1]:.4g}" for line in figure.lines]
    return f"{figure.title}: {'; '.join(ends)}"


def _swatch(kind: str, number: int) -> str:
    color = number % _NUM_COLORS
    if kind == "line":
        return f'<line class="line c{color}" x1="0" x2="18" y1="5" y2="5"/>'
    return f'<rect class="fill c{color}" width="12" height="10" x="3"/>'


def _draw_lines(figure: Lines) -> str:
    xs = [x for line in figure.lines for x, _ in line.points]
    ys = [y for line in figure.lines for _, y in line.points]
    ticks = _SHARES if figure.is_share else nice_ticks(min(0.0, *ys), max(ys))
    if figure.is_logarithmic:
        ticks = _decades(min(ys), max(ys))
    first, last = min(0.0, min(xs)), max(max(xs), 1.0)
    x_of = _Scale(first, last, _LEFT, _WIDTH - _RIGHT)
    y_of = _Scale(ticks[0], ticks[-1], _HEIGHT - _BOTTOM, _TOP, is_logarithmic=figure.is_logarithmic)
    curves = [_draw_line(line, number % _NUM_COLORS, x_of, y_of) for number, line in enumerate(figure.lines)]
    x_ticks = [tick for tick in nice_ticks(first, last) if tick <= last]
    x_axis = "".join(_x_tick(x_of(tick), f"{tick:,.10g}") for tick in x_ticks)
    return _y_axis(ticks, y_of, figure) + x_axis + "".join(curves)


def _draw_line(line: Line, color: int, x_of: "_Scale", y_of: "_Scale") -> str:
    parts = []
    if line.band:
        upper = [(x, high) for (x, _), (_, high) in zip(line.points, line.band, strict=True)]
        lower = [(x, low) for (x, _), (low, _) in zip(line.points, line.band, strict=True)]
        parts.append(f'<path class="band c{color}" d="{_path(upper + lower[::-1], x_of, y_of)}Z"/>')
    path = _path(_thinned(line.points), x_of, y_of)
    parts.append(f'<path class="line c{color}" d="{path}"/>')
    if (line.is_marked and len(line.points) <= 60) or len(line.points) == 1:
        parts += [
            f'<circle class="dot c{color}" cx="{x_of(x):.1f}" cy="{y_of(y):.1f}" r="2.6">'
            f"<title>{escape(line.name)}, step {x:g}: {y:.4g}</title></circle>"
            for x, y in line.points
        ]
    return "".join(parts)


def _draw_bars(figure: Bars) -> str:
    totals = [sum(heights) for heights in zip(*figure.parts.values(), strict=True)]
    ticks = _SHARES if figure.is_share else nice_ticks(0.0, max(totals))
    y_of = _Scale(ticks[0], ticks[-1], _HEIGHT - _BOTTOM, _TOP)
    slot = (_WIDTH - _LEFT - _RIGHT) / len(figure.labels)
    bar = min(slot * 0.8, 48)
    bottoms = [0.0] * len(figure.labels)
    shapes = []
    for number, (name, heights) in enumerate(figure.parts.items()):
        for index, height in enumerate(heights):
            top, bottom = y_of(bottoms[index] + height), y_of(bottoms[index])
            bottoms[index] += height
            if height:
                share = f"{height:.1%}" if figure.is_share else f"{height:g}"
                shapes.append(
                    f'<rect class="fill c{number % _NUM_COLORS}" x="{_LEFT + slot * index + (slot - bar) / 2:.1f}" '
                    f'y="{top:.1f}" width="{bar:.1f}" height="{bottom - top:.1f}">'
                    f"<title>{escape(figure.labels[index])}, {escape(name)}: {share}</title></rect>"
                )
    widest = max(map(len, figure.labels)) * 7 + 8
    every = ceil(widest / slot)
    shown = [(_LEFT + slot * (index + 0.5), label) for index, label in enumerate(figure.labels) if index % every == 0]
    return _y_axis(ticks, y_of, figure) + "".join(shapes) + "".join(_x_tick(x, label) for x, label in shown)


def _decades(low: float, high: float) -> list[float]:
    first, last = floor(log10(low)), ceil(log10(high))
    return [10.0**exponent for exponent in range(first, last + 1)]


class _Scale:
    """Maps values to positions."""

    def __init__(self, first: float, last: float, start: float, end: float, *, is_logarithmic: bool = False) -> None:
        self._map = log10 if is_logarithmic else float
        self._first, self._start = self._map(first), start
        self._slope = (end - start) / (self._map(last) - self._map(first))

    def __call__(self, value: float) -> float:
        return self._start + (self._map(value) - self._first) * self._slope


def _y_axis(ticks: list[float], y_of: _Scale, figure: Figure) -> str:
    marks = []
    for tick in ticks:
        y = y_of(tick)
        label = f"{tick:.0%}" if figure.is_share else f"{tick:,.10g}"
        marks.append(
            f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
            f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{label}</text>'
        )
    return "".join(marks)


def _x_tick(x: float, label: str) -> str:
    return f'<text x="{x:.1f}" y="{_HEIGHT - _BOTTOM + 16}" text-anchor="middle">{escape(label)}</text>'


def _path(points: list[tuple[float, float]], x_of: _Scale, y_of: _Scale) -> str:
    return "M" + "L".join(f"{x_of(x):.1f} {y_of(y):.1f}" for x, y in points)


def _thinned(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Returns the lowest and the highest point of each interval, so that no spike is lost."""
    if len(points) <= _MAX_POINTS:
        return points
    borders = [round(number * len(points) / (_MAX_POINTS // 2)) for number in range(_MAX_POINTS // 2 + 1)]
    kept = []
    for start, end in pairwise(borders):
        stretch = points[start:end]
        kept += sorted({min(stretch, key=lambda point: point[1]), max(stretch, key=lambda point: point[1])})
    return kept
