"""The tables of a sweep, in Markdown that reads well as plain text too."""

from collections.abc import Sequence

from sft_lightning.reporting.sweep import Rate, SizeResult


def size_table(results: Sequence[SizeResult]) -> str:
    """Returns a row for each size, and one for the model before training where that was evaluated."""
    rows = [["size", "examples", "steps", "val loss", "format accuracy", "answer accuracy", "p vs smaller"]]
    if results and (before := results[0].before):
        rows.append(["before", "0", "0", "", _rate(before.format_accuracy), _rate(before.answer_accuracy), ""])
    for result in results:
        rows.append(
            [
                result.label,
                str(result.num_examples),
                str(result.num_steps),
                "" if result.val_loss is None else f"{result.val_loss:.3f}",
                _rate(result.last.format_accuracy),
                _rate(result.last.answer_accuracy),
                "" if result.p_value is None else _p_value(result.p_value),
            ]
        )
    return _markdown(rows)


def step_table(results: Sequence[SizeResult]) -> str:
    """Returns a row for each evaluation during training."""
    rows = [["size", "step", "format accuracy", "answer accuracy"]]
    for result in results:
        for each in result.evaluations:
            rows.append([result.label, str(each.step), _rate(each.format_accuracy), _rate(each.answer_accuracy)])
    return _markdown(rows)


def report(results: Sequence[SizeResult]) -> str:
    """Returns the text of ``sweep.md``."""
    num_prompts = results[0].last.num_prompts if results else 0
    return "\n".join(
        [
            "# Accuracy against the number of training examples",
            "",
            f"{num_prompts} prompts; in brackets 95% intervals. Each size is trained on the first rows of the same "
            "file, so that a larger one holds the smaller. p: McNemar's exact test against the next smaller size, on "
            "the answers to the same prompts.",
            "",
            size_table(results),
            "",
            "![accuracy against size, and during training](sweep.png)",
            "",
            "## During training",
            "",
            step_table(results),
            "",
        ]
    )


def _rate(rate: Rate) -> str:
    return f"{rate.value:.3f} [{rate.low:.3f}, {rate.high:.3f}]"


def _p_value(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    ruler = ["-" * (width - 1) + ":" for width in widths]
    lines = [rows[0], ruler, *rows[1:]]
    return "\n".join(
        "| " + " | ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines
    )
