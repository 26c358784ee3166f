"""Test the report in a terminal and in a pipe."""

import io
import re

import pytest
from rich.console import Console

from sft_lightning.data.batching.plan import StepShape
from sft_lightning.diagnostics.check.check import CheckReport, SetReport
from sft_lightning.diagnostics.check.findings import Finding, Place
from sft_lightning.diagnostics.check.lengths import LengthSummary, histogram
from sft_lightning.diagnostics.check.rendering import render
from sft_lightning.diagnostics.check.samples import draw_samples


@pytest.fixture
def report_of(rows_of, tokenizer):
    """A report of one set with the findings that are given."""

    def make(*findings, texts=(("2+2?\n", " 4"), ("\x1b[2J\t?", " a b")), **options):
        _, account, checked = rows_of(texts, **options)
        store, settings = checked.load_tokens(), checked.settings
        report = SetReport("train", settings.path, settings.max_length, account, num_eos_supervised=2)
        report.lengths = {"row": LengthSummary.of(store.total_lengths)}
        report.histogram = histogram(store.total_lengths, store.total_lengths[:0], settings.max_length)
        report.samples = draw_samples(store, tokenizer, seed=0)
        return CheckReport([report], list(findings), [], StepShape(1, 1, 1), None, "padded")

    return make


def shown(report, width=80, *, encoding="utf-8", color=False):
    raw = io.BytesIO()
    with io.TextIOWrapper(raw, encoding=encoding, write_through=True) as file:
        colors = "standard" if color else None
        render(report, Console(file=file, width=width, force_terminal=color, highlight=False, color_system=colors))
        return raw.getvalue().decode(encoding)


def test_white_space_and_token_borders_are_visible_without_color(report_of):
    text = shown(report_of())
    assert "prompt    2\u2502+\u25022\u2502?\u2502\u23ce" in text
    assert "response  \u00b74\u2502" in text
    assert "EOS       <|endoftext|>" in text
    assert "\x1b" not in text
    assert "\\x1b\u2502[\u25022\u2502J\u2502\u21e5\u2502?" in text


def test_prompt_response_and_eos_differ_in_color(report_of):
    text = shown(report_of(), color=True)
    assert re.search(r"\x1b\[36m2", text)
    assert re.search(r"\x1b\[32m\u00b7", text)
    assert re.search(r"\x1b\[1;35m<\|endoftext\|>", text)
    assert "\x1b[2J" not in text, "data must not control the terminal"


def test_an_ascii_terminal_gets_ascii(report_of):
    text = shown(report_of(texts=[("caf\u00e9 1", " 4"), ("b", " c")]), encoding="ascii")
    assert "response  _4|" in text
    assert "caf" not in text or "\\xe9" in text


def test_a_row_without_eos_is_marked(report_of):
    assert "none: the model does not learn to stop here" in shown(report_of(append_eos=False))


def test_a_long_common_prefix_is_shown_once(report_of):
    beginning = "z" * 90
    text = shown(report_of(texts=[(f"{beginning}one", " 1"), (f"{beginning}two", " 2")]), width=400)
    assert text.count("z\u2502z\u2502z") == 30
    assert "\u2026 as above \u2026" in text


@pytest.mark.parametrize("width", [80, 120])
def test_no_line_is_wider_than_the_terminal(report_of, width):
    finding = Finding("wrong_answers", "error", "train: " + "many words " * 20, "do this", 9, [Place("x" * 100 + ":1")])
    assert max(map(len, shown(report_of(finding), width).splitlines())) <= width


def test_few_places_are_shown_and_the_rest_counted(report_of):
    places = [Place(f"a.jsonl:{line}", f"a.jsonl:{line - 1}") for line in range(2, 12)]
    text = shown(report_of(Finding("duplicate_rows", "warning", "train: twice", "delete", 10, places)), 120)
    assert "a.jsonl:2 = 1, 3 = 2, 4 = 3, 5 = 4, 6 = 5 and 5 more (all with --json)" in text
    assert "-> delete" in text


def test_places_in_two_files_name_both(report_of):
    places = [Place(f"val.jsonl:{line}", f"train.jsonl:{400 + line}", "same response") for line in (7, 9)]
    text = shown(report_of(Finding("validation_overlap", "error", "val: overlap", "", 2, places)))
    assert "val.jsonl:7 = train.jsonl:407, 9 = 409" in text


def test_every_bad_row_is_shown(report_of):
    places = [Place(f"a.jsonl:{line}", reason="not JSON") for line in range(1, 41)]
    text = shown(report_of(Finding("bad_rows", "error", "train: bad", "correct", 40, places)))
    assert text.count(": not JSON") == 40


@pytest.mark.parametrize(
    ("severities", "verdict"),
    [
        ([], "no problem found"),
        (["info"], "no problem found"),
        (["warning", "info"], "no problem that would spoil the run; 1 warning"),
        (["error", "warning"], "1 problem that would spoil the run"),
        (["error", "error"], "2 problems that would spoil the run"),
    ],
)
def test_the_verdict_comes_last(report_of, severities, verdict):
    text = shown(report_of(*(Finding("f", severity, "m") for severity in severities)))
    assert text.splitlines()[-1] == verdict
