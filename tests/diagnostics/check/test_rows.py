"""Test which rows are used, filtered, bad, over-long or truncated."""

import json

import pytest

from sft_lightning.data.filters import CorrectResponses
from sft_lightning.data.token_store import load_or_build_tokens
from sft_lightning.diagnostics.check.rows import RowAccount, Sources
from sft_lightning.errors import UserError
from sft_lightning.grading.graders import ExactMatchGrader

SHORT, LONG = "2+2?", "again and again " * 40


def read(checked):
    account = RowAccount()
    rows = [row for chunk in account.read(checked, checked.load_tokens()) for row in chunk]
    return rows, account


def places(found):
    return [int(place.source.rpartition(":")[2]) for place in found]


def write(path, *rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def good(prompt=SHORT, response=" 4"):
    return {"prompt": prompt, "response": response}


def test_every_bad_row_is_listed_beyond_max_bad_rows(tmp_path, checked_set):
    path = write(tmp_path / "rows.jsonl", *[good(), "no json", {"prompt": "a", "response": " "}] * 20)
    checked = checked_set(path)
    rows, account = read(checked)
    assert [row.record.source for row in rows] == [f"{path}:{line}" for line in range(1, 61, 3)]
    (finding,) = account.findings(checked)
    assert (finding.name, finding.severity, finding.count) == ("bad_rows", "error", 40)
    assert places(finding.places) == [line for line in range(1, 61) if line % 3 != 1]
    assert finding.places[0].reason == "not JSON: Expecting value (column 1)"
    assert finding.places[1].reason == "field 'response' is empty"


def test_bad_rows_that_are_allowed_are_a_warning(tmp_path, checked_set):
    path = write(tmp_path / "rows.jsonl", good(), "no json")
    checked = checked_set(path, max_bad_rows=1)
    (finding,) = read(checked)[1].findings(checked)
    assert finding.severity == "warning"


def test_filtered_and_overlong_rows_are_separate_findings(tmp_path, checked_set):
    right, wrong = {**good(), "ground_truth": 4}, {**good(), "ground_truth": 5}
    path = write(tmp_path / "rows.jsonl", right, wrong, good(), {**good(LONG), "ground_truth": 4})
    checked = checked_set(path, max_length=60, filter=CorrectResponses(ExactMatchGrader()))
    used, account = read(checked)
    assert [row.record.source for row in used] == [f"{path}:1"]
    found = {finding.name: (finding.severity, places(finding.places)) for finding in account.findings(checked)}
    assert found == {"filtered_rows": ("info", [2, 3]), "overlength_rows": ("warning", [4])}


def test_overlong_rows_are_listed_with_their_tokens(tmp_path, checked_set, tokenizer):
    rows = [good(), good(LONG), good(), good(LONG, " and"), *[good()] * 60]
    path = write(tmp_path / "rows.jsonl", *rows)
    checked = checked_set(path, max_length=60)
    used, account = read(checked)
    assert len(used) == account.num_used == 62
    (finding,) = account.findings(checked)
    assert (finding.name, finding.severity, places(finding.places)) == ("overlength_rows", "info", [2, 4])
    tokens = len(tokenizer(LONG)["input_ids"]) + len(tokenizer(" 4")["input_ids"]) + 1
    assert finding.places[0].reason == f"{tokens} tokens"


def test_many_overlong_rows_are_a_warning_or_an_error(tmp_path, checked_set):
    path = write(tmp_path / "rows.jsonl", good(), good(LONG))
    for overlength, severity in (("drop", "warning"), ("error", "error")):
        checked = checked_set(path, max_length=60, overlength=overlength)
        rows, account = read(checked)
        assert len(rows) == 1
        assert [(f.name, f.severity) for f in account.findings(checked)] == [("overlength_rows", severity)]


def test_cut_prompts_are_listed(tmp_path, checked_set):
    path = write(tmp_path / "rows.jsonl", good(LONG), good(), good(SHORT, LONG))
    checked = checked_set(path, max_length=60, overlength="truncate_prompt")
    rows, account = read(checked)
    assert len(rows) == 2
    assert len(rows[0].example.sequences[0].tokens) == 60
    found = {finding.name: finding for finding in account.findings(checked)}
    assert places(found["truncated_prompts"].places) == [1]
    assert places(found["overlength_rows"].places) == [3], "a response is never cut"


def test_a_row_that_just_fits_is_not_cut(tmp_path, checked_set, tokenizer):
    length = len(tokenizer(SHORT)["input_ids"]) + len(tokenizer(" 4")["input_ids"]) + 1
    path = write(tmp_path / "rows.jsonl", good())
    checked = checked_set(path, max_length=length, overlength="truncate_prompt")
    assert read(checked)[1].findings(checked) == []


def test_rows_after_max_examples_are_not_checked(tmp_path, checked_set):
    path = write(tmp_path / "rows.jsonl", good(), "no json", *[good()] * 4)
    checked = checked_set(path, max_examples=3)
    rows, account = read(checked)
    assert [int(row.record.source[-1]) for row in rows] == [1, 3, 4]
    assert (account.num_used, account.num_unused) == (3, 2)


@pytest.mark.parametrize("rows", [[good(LONG)], ["no json"]])
def test_a_set_without_usable_rows_is_a_finding(tmp_path, checked_set, rows):
    checked = checked_set(write(tmp_path / "rows.jsonl", *rows), max_length=60)
    assert checked.load_tokens() is None
    used, account = read(checked)
    assert used == []
    assert account.findings(checked)[-1].name == "no_rows"
    assert account.findings(checked)[-1].severity == "error"


def test_fit_reads_the_tokens_that_the_check_cached(tmp_path, checked_set, tokenizer, monkeypatch):
    path = write(tmp_path / "rows.jsonl", *[good()] * 3)
    checked = checked_set(path)
    assert len(checked.load_tokens()) == 3
    monkeypatch.setattr("sft_lightning.data.token_store._build", None)
    assert len(load_or_build_tokens(checked.settings, tokenizer)) == 3


def test_a_missing_path_is_an_error_that_names_the_option(tmp_path, checked_set):
    with pytest.raises(UserError, match=r"data\.train_path: data path .* is not a file"):
        checked_set(tmp_path / "none.jsonl", overlength="error").load_tokens()


def test_sources_survive_a_round_trip(tmp_path):
    sources = Sources()
    for source in ("a.jsonl:1", "b:c.jsonl:7", "a.jsonl:3"):
        sources.append(source)
    assert [sources[index] for index in range(len(sources))] == ["a.jsonl:1", "b:c.jsonl:7", "a.jsonl:3"]
