"""Collect the numbers of each figure of a report. ``svg`` and ``plots`` draw them."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil, isfinite
from typing import Any

from sft_lightning.evaluation.comparison import rewarded
from sft_lightning.evaluation.statistics import wilson_interval
from sft_lightning.reporting.run_files import Evaluation, RunFiles

_STEPS = "optimizer steps"
_NUM_BINS = 16
_LARGE_RATIO = 30


@dataclass(frozen=True)
class Line:
    """A curve.

    Attributes:
        name: Label in the legend.
        points: (x, y) in the order of x.
        band: (low, high) of each point; empty if there is none.
        is_marked: Whether points are drawn, because they are few separate measurements.
    """

    name: str
    points: list[tuple[float, float]]
    band: list[tuple[float, float]]
    is_marked: bool = True


@dataclass(frozen=True)
class Lines:
    """A figure of curves.

    Attributes:
        name: Name of its PNG file.
        title: Title of the figure.
        x_label: Label of the x axis.
        y_label: Label of the y axis, with its unit.
        is_share: Whether y is a share in [0, 1], shown in percent.
        lines: At least one curve.
        is_logarithmic: Whether the y axis is logarithmic; all y are above 0 then.
    """

    name: str
    title: str
    x_label: str
    y_label: str
    is_share: bool
    lines: list[Line]
    is_logarithmic: bool = False


@dataclass(frozen=True)
class Bars:
    """A figure of stacked bars.

    Attributes:
        name: Name of its PNG file.
        title: Title of the figure.
        x_label: Label of the x axis.
        y_label: Label of the y axis.
        is_share: Whether heights are shares in [0, 1], shown in percent.
        labels: Label of each bar.
        parts: Name of a part -> its height in each bar, from the bottom up.
    """

    name: str
    title: str
    x_label: str
    y_label: str
    is_share: bool
    labels: list[str]
    parts: dict[str, list[float]]


Figure = Lines | Bars
Rate = tuple[float, float, float]  # a rate and its 95% bounds, in [0, 1]


def figures(files: RunFiles) -> list[Figure]:
    """Returns the figures for which a run has numbers."""
    evaluations = [one for one in files.evaluations if one.metrics]
    in_training = [one for one in evaluations if one.step is not None]
    losses = _logged(files, "train/loss", "val/loss")
    return [
        *_lines("loss", "Loss", "nats per label token", losses, may_be_logarithmic=True),
        *_lines("accuracy", "Accuracy of generated answers", "share of answers", _accuracy(in_training), is_share=True),
        *_count_bars("failures", "What became of the answers", in_training),
        *_count_bars("stop_reasons", "Why answers ended", in_training),
        *_lines("response-length", "Mean response length", "tokens", _lengths(in_training)),
        *_length_bars(files.latest),
        *_lines("entropy", "Mean token entropy", "nats", _entropy(files, in_training), may_be_logarithmic=True),
        *_lines(
            "gradient-norm",
            "Gradient norm",
            "before clipping",
            _logged(files, "train/grad_norm"),
            may_be_logarithmic=True,
        ),
        *_lines("learning-rate", "Learning rate", "step size", _logged(files, "train/lr")),
    ]


def evaluation_rate(metrics: dict[str, Any], name: str) -> Rate | None:
    """Returns a rate with its bounds, or None if ``metrics.json`` does not have it."""
    rate, num_examples = metrics.get(name), metrics.get("num_examples")
    if not isinstance(rate, int | float) or not isinstance(num_examples, int):
        return None
    bounds = (metrics.get("intervals") or {}).get(name)
    low, high = bounds or wilson_interval(min(num_examples, round(rate * num_examples)), num_examples)
    return rate, low, high


def _lines(
    name: str, title: str, y_label: str, lines: list[Line], *, is_share: bool = False, may_be_logarithmic: bool = False
) -> Iterator[Lines]:
    lines = [line for line in lines if line.points]
    if not lines:
        return
    values = [y for line in lines for _, y in line.points]
    is_logarithmic = may_be_logarithmic and max(values) > _LARGE_RATIO * min(values) > 0
    yield Lines(
        name, title, _STEPS, y_label + ", logarithmic" * is_logarithmic, is_share, lines, is_logarithmic=is_logarithmic
    )


def _logged(files: RunFiles, *names: str) -> list[Line]:
    series = [(name, files.series.get(name, [])) for name in names]
    return [Line(name, [*points], [], is_marked=name.startswith("val/")) for name, points in series]


def _accuracy(evaluations: list[Evaluation]) -> list[Line]:
    lines = []
    for label, name in (("format", "format_accuracy"), ("answer", "answer_accuracy")):
        rates = [(one.step, evaluation_rate(one.metrics, name)) for one in evaluations]
        known = [(step, rate) for step, rate in rates if step is not None and rate is not None]
        lines.append(Line(label, [(step, rate[0]) for step, rate in known], [rate[1:] for _, rate in known]))
    return lines


def _lengths(evaluations: list[Evaluation]) -> list[Line]:
    by_outcome = {"right": "right answers", "wrong": "wrong answers", "all": "all answers"}
    return [
        Line(label, _points(evaluations, lambda metrics, key=key: (metrics.get("mean_num_tokens") or {}).get(key)), [])
        for key, label in by_outcome.items()
    ]


def _entropy(files: RunFiles, evaluations: list[Evaluation]) -> list[Line]:
    generated = Line("generated answers", _points(evaluations, lambda metrics: metrics.get("mean_entropy")), [])
    taught = Line("training responses", [*files.series.get("train/entropy", [])], [], is_marked=False)
    return [generated, taught]


def _points(evaluations: list[Evaluation], value_of: Any) -> list[tuple[float, float]]:
    values = [(one.step, value_of(one.metrics)) for one in evaluations]
    return [(step, x) for step, x in values if step is not None and isinstance(x, int | float) and isfinite(x)]


def _length_bars(evaluation: Evaluation | None) -> Iterator[Bars]:
    rows = [one for one in (evaluation.samples if evaluation else []) if isinstance(one.get("num_tokens"), int)]
    if not rows:
        return
    width = max(1, ceil((max(row["num_tokens"] for row in rows) + 1) / _NUM_BINS))
    num_bins = max(row["num_tokens"] for row in rows) // width + 1
    parts = {"right": [0.0] * num_bins, "wrong": [0.0] * num_bins}
    for row in rows:
        parts["right" if rewarded(row) else "wrong"][row["num_tokens"] // width] += 1
    labels = [str(number * width) for number in range(num_bins)]
    title = "Response length by outcome, last evaluation"
    yield Bars("response-length-last", title, "response tokens, from", "answers", False, labels, parts)


def _count_bars(key: str, title: str, evaluations: list[Evaluation]) -> Iterator[Bars]:
    """Yields the shares of failures or stop reasons over the evaluations. Answers without a failure come first."""
    known = [one for one in evaluations if isinstance(one.metrics.get(key), dict)]
    nums_answers = [max(1, one.metrics.get("num_examples", 0) * one.metrics.get("num_samples", 1)) for one in known]
    totals: Counter[str] = Counter()
    for one in known:
        totals.update(one.metrics[key])
    if not totals:
        return
    parts = {
        kind: [one.metrics[key].get(kind, 0) / num for one, num in zip(known, nums_answers, strict=True)]
        for kind, _ in sorted(totals.items(), key=lambda item: (-item[1], item[0]))
    }
    if key == "failures":
        rest = [1 - sum(shares) for shares in zip(*parts.values(), strict=True)]
        parts = {"right": [max(0.0, share) for share in rest], **parts}
    labels = [str(one.step) for one in known]
    named = {kind.replace("_", " "): shares for kind, shares in parts.items()}
    yield Bars(key.replace("_", "-"), title, "evaluation after optimizer step", "share of answers", True, labels, named)
