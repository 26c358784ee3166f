"""Plot the results of a sweep: accuracy against size, and during training."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sft_lightning.reporting.sweep import SizeResult
from sft_lightning.system.files import write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLORS = {"answer_accuracy": "#0b6e99", "format_accuracy": "#c8691c"}


def draw(results: Sequence[SizeResult], path: Path) -> None:
    """Writes the figure of ``plot`` as a PNG, atomically.

    Args:
        results: Results by increasing size; at least one.
        path: The file to write.
    """
    with write_atomically(path, "wb") as file:
        plot(results).savefig(file, format="png")


def plot(results: Sequence[SizeResult]) -> "Figure":
    """Returns two plots side by side: the last accuracies with 95% intervals, and answer accuracy during training."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # Without pyplot, which needs a window system and keeps figures in memory.
    figure = Figure(figsize=(11, 4.5), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    by_size, by_step = figure.subplots(1, 2, sharey=True)
    for axes in (by_size, by_step):
        axes.set_xscale("log")  # before the ticks, which it resets
        axes.set_ylim(-0.03, 1.03)
        axes.grid(color="0.9")
        axes.spines[["top", "right"]].set_visible(False)
    _draw_sizes(by_size, results)
    _draw_steps(by_step, results)
    return figure


def _draw_sizes(axes: "Axes", results: Sequence[SizeResult]) -> None:
    from matplotlib.ticker import NullLocator

    sizes = [result.num_examples for result in results]
    _set_limits(axes, sizes)
    for name, color in _COLORS.items():
        rates = [getattr(result.last, name) for result in results]
        bars = [[rate.value - rate.low for rate in rates], [rate.high - rate.value for rate in rates]]
        label = name.replace("_", " ")
        axes.errorbar(sizes, [rate.value for rate in rates], bars, color=color, marker="o", capsize=4, label=label)
        if before := results[0].before:
            axes.axhline(getattr(before, name).value, color=color, linestyle=":")
    if results[0].before:
        axes.plot([], [], color="0.4", linestyle=":", label="before training")
    axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("training examples")
    axes.set_ylabel("accuracy")
    axes.set_title(f"after training ({results[0].last.num_prompts} prompts, 95% intervals)")
    axes.legend(loc="best", frameon=False)


def _draw_steps(axes: "Axes", results: Sequence[SizeResult]) -> None:
    from matplotlib import colormaps
    from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

    _set_limits(axes, [each.step for result in results for each in result.evaluations if each.step > 0])
    for number, result in enumerate(results):
        # A logarithmic axis cannot show step 0.
        points = [each for each in result.evaluations if each.step > 0]
        color = colormaps["viridis"](0.9 * number / max(1, len(results) - 1))
        axes.plot(
            [each.step for each in points],
            [each.answer_accuracy.value for each in points],
            color=color,
            marker="o",
            label=f"{result.num_examples} examples",
        )
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("optimizer steps")
    axes.set_title("answer accuracy during training")
    axes.legend(loc="best", frameon=False)


def _set_limits(axes: "Axes", values: Sequence[int]) -> None:
    """Sets the limits before anything is drawn: matplotlib cannot derive them from a single value, and warns."""
    if values:
        axes.set_xlim(min(values) / 1.3, max(values) * 1.3)
