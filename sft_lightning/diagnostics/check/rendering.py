"""Print a check's report to a terminal or as plain text. Color never carries information alone."""

import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from sft_lightning.diagnostics.check.check import CheckReport, SetReport
from sft_lightning.diagnostics.check.findings import Finding, Place, counted
from sft_lightning.diagnostics.check.layout_statistics import LayoutStatistics
from sft_lightning.diagnostics.check.lengths import PERCENTILES
from sft_lightning.diagnostics.check.memory_estimate import in_gib
from sft_lightning.diagnostics.check.rows import file_and_line
from sft_lightning.diagnostics.check.samples import Pieces, Sample

_STYLES = {"error": "bold red", "warning": "bold yellow", "info": "bold cyan"}
_PROMPT, _RESPONSE, _EOS, _BORDER = "cyan", "green", "bold magenta", "dim"
_BAR_WIDTH = 32
_MOST_PLACES = 5
# A prompt's beginning is abbreviated if at least this many characters are the same as in the prompt before.
_LONG_BEGINNING = 80
# For these findings, which stop fit, every place is listed with its reason.
_ALL_PLACES = {"bad_rows"}


class _Marks:
    """Symbols for invisible characters, in the terminal's encoding."""

    def __init__(self, encoding: str) -> None:
        is_unicode = encoding.lower().startswith("utf")
        self.space, self.newline, self.tab, self.border, self.bar, self.gap = (
            ("\u00b7", "\u23ce\n", "\u21e5", "\u2502", "\u2588", "\u2026")
            if is_unicode
            else ("_", "\\n\n", "\\t", "|", "#", "...")
        )
        self._encoding = encoding

    def visible(self, text: str) -> str:
        """Returns text with visible white space, and with control characters escaped."""
        special = {" ": self.space, "\n": self.newline, "\t": self.tab}
        shown = "".join(special.get(character) or _escaped(character) for character in text)
        return shown.encode(self._encoding, "backslashreplace").decode(self._encoding)


def render(report: CheckReport, console: Console) -> None:
    """Prints the report; the verdict comes last."""
    marks = _Marks(console.encoding)
    for each in report.sets:
        _print_set(each, console, marks)
    if report.layouts:
        _print_layouts(report, console)
    _print_memory(report, console)
    console.print()
    for finding in report.findings:
        _print_finding(finding, console, marks)
    console.print(_verdict(report))


def _print_set(report: SetReport, console: Console, marks: _Marks) -> None:
    account = report.account
    console.print(Text.assemble((report.name, "bold"), f"  {report.path}"))
    counts = [
        (account.num_unused, "not used (max_train_examples)"),
        (account.bad_rows.count, "bad"),
        (len(account.overlength_rows), f"over {report.max_length} tokens"),
        (len(account.filtered_rows), "dropped by data.filter_correct"),
        (len(account.truncated_rows), "with a cut prompt"),
    ]
    parts = [f"{account.num_used:,} rows used", *(f"{count:,} {what}" for count, what in counts if count)]
    if account.num_used:
        parts.append(f"EOS supervised in {report.num_eos_supervised:,} of {account.num_used:,}")
    if report.num_graded:
        parts.append(f"{report.num_graded:,} graded")
    console.print(_indented(Text(", ".join(parts))))
    if report.lengths:
        console.print(_indented(_length_table(report), above=1))
        console.print(_indented(_histogram(report, marks), above=1))
        _print_samples(report.samples, console, marks)
    console.print()


def _length_table(report: SetReport) -> Table:
    names = ["min", "mean", *(f"{percent}%" for percent in PERCENTILES), "max"]
    table = _table("tokens", *names)
    for kind, summary in report.lengths.items():
        values = [summary.least, round(summary.mean), *summary.percentiles.values(), summary.most]
        table.add_row(kind, *(f"{value:,}" for value in values))
    return table


def _histogram(report: SetReport, marks: _Marks) -> Table:
    most = max(bar.count for bar in report.histogram)
    table = _table("row length", "rows", f"max_length {report.max_length:,}")
    table.columns[2].justify = "left"
    for bar in report.histogram:
        length = -(-bar.count * _BAR_WIDTH // most)
        drawn = Text(marks.bar * length, "red" if bar.is_over else _RESPONSE)
        note = " dropped" if bar.is_over and bar.count else ""
        table.add_row(f"{bar.first:,} - {bar.last:,}", f"{bar.count:,}", drawn + Text(note))
    return table


def _print_samples(samples: Sequence[Sample], console: Console, marks: _Marks) -> None:
    legend = Text.assemble(
        "\n  rows drawn: ",
        ("prompt, no loss", _PROMPT),
        ", ",
        ("response, loss", _RESPONSE),
        ", ",
        ("EOS, loss", _EOS),
        f"; space {marks.space} newline {marks.newline.strip()} token border {marks.border}",
    )
    console.print(legend)
    before: list[str] = []
    for sample in samples:
        numbers = f"{sample.num_prompt_tokens:,} + {sample.num_response_tokens:,} tokens"
        console.print(Text(f"\n  {sample.source}  {numbers}", "bold"))
        grid = Table.grid(padding=(0, 2, 0, 0))
        grid.add_column(no_wrap=True)
        grid.add_column(overflow="fold")
        grid.add_row("  prompt", _tokens(_behind(sample.prompt, before), _PROMPT, marks))
        before = sample.prompt.head
        grid.add_row("  response", _tokens(sample.response, _RESPONSE, marks))
        eos = Text("none: the model does not learn to stop here", "bold red")
        grid.add_row("  EOS", eos if sample.eos is None else Text(marks.visible(sample.eos), _EOS))
        console.print(grid)


def _behind(prompt: Pieces, before: Sequence[str]) -> Pieces:
    """Returns a prompt without the beginning that it shares with the prompt shown before, if that is long."""
    differs = (number for number, pair in enumerate(zip(prompt.head, before, strict=False)) if pair[0] != pair[1])
    num_common = next(differs, min(len(prompt.head), len(before)))
    if sum(map(len, prompt.head[:num_common])) < _LONG_BEGINNING:
        return prompt
    return Pieces(["", *prompt.head[num_common:]], prompt.num_left_out, prompt.tail)


def _tokens(pieces: Pieces, style: str, marks: _Marks) -> Text:
    text = Text()
    if pieces.head[:1] == [""]:
        text.append(f"{marks.gap} as above {marks.gap}\n", _BORDER)
    for part, gap in ((pieces.head, pieces.num_left_out), (pieces.tail, 0)):
        for piece in filter(None, part):
            shown = marks.visible(piece)
            # The border goes before the line break, so that no line begins with a border.
            body, line_break = (shown[:-1], "\n") if shown.endswith("\n") else (shown, "")
            text.append(body, style).append(marks.border, _BORDER).append(line_break)
        if gap:
            text.append(f"\n{marks.gap} {gap:,} tokens {marks.gap}\n", _BORDER)
    text.rstrip()
    return text


def _print_layouts(report: CheckReport, console: Console) -> None:
    shape, first = report.step_shape, report.layouts[0]
    console.print(Text.assemble(("layouts", "bold"), f"  first {first.num_steps:,} steps of epoch 0, "), end="")
    num_parts = shape.num_micro_batches * shape.num_replicas
    console.print(f"{shape.examples_per_step:,} rows a step in {counted(num_parts, 'micro-batch', 'micro-batches')}")
    table = _table("layout", "padding", "sharing gain", "positions a step", "largest micro-batch")
    for layout in report.layouts:
        table.add_row(*_layout_row(layout))
    console.print(_indented(table))
    console.print()


def _layout_row(layout: LayoutStatistics) -> list[str]:
    return [
        layout.layout,
        f"{layout.padding_waste:.1%}",
        f"{layout.sharing_gain:.2f}",
        f"{layout.positions_per_step:,.0f}",
        f"{layout.largest.num_positions:,}",
    ]


def _print_memory(report: CheckReport, console: Console) -> None:
    memory = report.memory
    if memory is None:
        if report.layouts:
            console.print("memory: no estimate, the formula does not cover this kind of model")
        return
    console.print(
        Text.assemble(
            ("memory", "bold"),
            f"  estimate for {memory.num_parameters:,} parameters, layout {report.memory_layout}, "
            f"{memory.num_positions:,} positions in a micro-batch",
        )
    )
    table = _table("part", "size")
    for name, size in memory.parts.items():
        if size:
            table.add_row(name, in_gib(size))
    table.add_row("together", in_gib(memory.total_bytes), style="bold")
    table.add_row(memory.device.name, in_gib(memory.device.memory_bytes))
    console.print(_indented(table))
    console.print(_indented(Text(_what_fits(report))))


def _what_fits(report: CheckReport) -> str:
    memory = report.memory
    assert memory is not None
    rows = report.sets[0].lengths["row"]
    if not memory.num_fitting_positions:
        return "does not fit with any micro-batch"
    if memory.num_fitting_positions < rows.most:
        return f"fits {memory.num_fitting_positions:,} positions: not one of the longest rows ({rows.most:,} tokens)"
    return (
        f"fits {memory.num_fitting_positions:,} positions in a micro-batch: "
        f"{memory.num_fitting_positions // rows.most:,} rows of the longest ({rows.most:,} tokens), "
        f"{memory.num_fitting_positions // max(1, round(rows.mean)):,} of the mean ({rows.mean:,.0f})"
    )


def _print_finding(finding: Finding, console: Console, marks: _Marks) -> None:
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(no_wrap=True, width=7)
    grid.add_column(overflow="fold")
    grid.add_row(
        Text(finding.severity, _STYLES[finding.severity]),
        Text(marks.visible(finding.message).replace(marks.space, " ")),
    )
    if finding.places:
        grid.add_row("", Text(_places(finding, marks)))
    if finding.fix:
        grid.add_row("", Text(f"-> {finding.fix}", "italic"))
    console.print(grid)


def _places(finding: Finding, marks: _Marks) -> str:
    shown = finding.places if finding.name in _ALL_PLACES else finding.places[:_MOST_PLACES]
    if finding.name in _ALL_PLACES:
        text = "\n".join(f"{place.source}: {place.reason}" for place in shown)
    else:
        text = "; ".join(
            f"{file}:" + ", ".join(_lines(places))
            for file, places in groupby(shown, key=lambda place: file_and_line(place.source)[0])
        )
    if (more := len(finding.places) - len(shown)) > 0:
        text += f" and {more:,} more (all with --json)"
    return "\n".join(marks.visible(line).replace(marks.space, " ") for line in text.split("\n"))


def _lines(places: Iterable[Place]) -> Iterator[str]:
    """Yields the line of each place in one file, with its other place, whose file is named only when it changes."""
    known = ""
    for place in places:
        file, line = file_and_line(place.source)
        if not place.other:
            yield f"{line} ({place.reason})" if place.reason else str(line)
            continue
        other_file, other_line = file_and_line(place.other)
        yield f"{line} = {other_line}" if other_file == (known or file) else f"{line} = {place.other}"
        known = other_file


def _verdict(report: CheckReport) -> Text:
    errors, warnings = report.number_of("error"), report.number_of("warning")
    if errors:
        return Text(f"{errors} problem{'s' * (errors > 1)} that would spoil the run", "bold red")
    if warnings:
        return Text(f"no problem that would spoil the run; {warnings} warning{'s' * (warnings > 1)}", "bold yellow")
    return Text("no problem found", "bold green")


def _table(first: str, *others: str) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column(first, no_wrap=True)
    for name in others:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _indented(content: Table | Text, above: int = 0) -> Padding:
    return Padding(content, (above, 0, 0, 2), expand=False)


def _escaped(character: str) -> str:
    if unicodedata.category(character)[0] != "C":
        return character
    return character.encode("unicode_escape").decode("ascii")
