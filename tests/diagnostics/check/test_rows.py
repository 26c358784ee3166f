"""What becomes of each row: used, not used, bad, over-long, cut."""

import json

import pytest

from sft_lightning.data.correct_responses import CorrectResponses
from sft_lightning.data.token_store import load_or_build_tokens
from sft_lightning.diagnostics.check.rows import RowAccount, Sources
from sft_lightning.errors import UserError
from sft_lightning.grading.graders import ExactMatchGrader

SHORT, LONG = "2+2?", "again and again " * 40


def read(settings):
    account = RowAccount()
    rows = [row for chunk in account.read(settings, settings.load_tokens()) for row in chunk]
    return rows, account


def places(found):
    return [int(place.source.rpartition(":")[2]) for place in found]


def write(path, *rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def good(prompt=SHORT, response=" 4"):
    return {"prompt": prompt, "response": response}


def test_every_bad_row_is_in_the_account_whatever_max_bad_rows_is(tmp_path, settings_for):
    path = write(tmp_path / "rows.jsonl", *[good(), "no json", {"prompt": "a", "response": " "}] * 20)
    settings = settings_for(path)
    rows, account = read(settings)
    assert [row.record.source for row in rows] == [f"{path}:{line}" for line in range(1, 61, 3)]
    (finding,) = account.findings(settings)
    assert (finding.name, finding.severity, finding.count) == ("bad_rows", "error", 40)
    assert places(finding.places) == [line for line in range(1, 61) if line % 3 != 1]
    assert finding.places[0].reason == "not JSON: Expecting value (column 1)"
    assert finding.places[1].reason == "field 'response' is empty"


def test_bad_rows_that_are_allowed_are_a_warning(tmp_path, settings_for):
    path = write(tmp_path / "rows.jsonl", good(), "no json")
    settings = settings_for(path, reading={"template": None, "columns": None, "max_bad_rows": 1})
    (finding,) = read(settings)[1].findings(settings)
    assert finding.severity == "warning"


def test_rows_that_filter_correct_drops_are_told_from_overlong_ones(tmp_path, settings_for):
    right, wrong = {**good(), "ground_truth": 4}, {**good(), "ground_truth": 5}
    path = write(tmp_path / "rows.jsonl", right, wrong, good(), {**good(LONG), "ground_truth": 4})
    settings = settings_for(path, max_length=60, row_filter=CorrectResponses(ExactMatchGrader()))
    used, account = read(settings)
    assert [row.record.source for row in used] == [f"{path}:1"]
    found = {finding.name: (finding.severity, places(finding.places)) for finding in account.findings(settings)}
    assert found == {"filtered_rows": ("info", [2, 3]), "overlength_rows": ("warning", [4])}


def test_overlong_rows_are_named_with_their_tokens(tmp_path, settings_for, tokenizer):
    rows = [good(), good(LONG), good(), good(LONG, " and"), *[good()] * 60]
    path = write(tmp_path / "rows.jsonl", *rows)
    settings = settings_for(path, max_length=60)
    used, account = read(settings)
    assert len(used) == account.num_used == 62
    (finding,) = account.findings(settings)
    assert (finding.name, finding.severity, places(finding.places)) == ("overlength_rows", "info", [2, 4])
    tokens = len(tokenizer(LONG)["input_ids"]) + len(tokenizer(" 4")["input_ids"]) + 1
    assert finding.places[0].reason == f"{tokens} tokens"


def test_overlong_rows_that_are_many_are_a_warning_and_under_the_policy_error_an_error(tmp_path, settings_for):
    path = write(tmp_path / "rows.jsonl", good(), good(LONG))
    for overlength, severity in (("drop", "warning"), ("error", "error")):
        settings = settings_for(path, max_length=60, overlength=overlength)
        rows, account = read(settings)
        assert len(rows) == 1
        assert [(f.name, f.severity) for f in account.findings(settings)] == [("overlength_rows", severity)]


def test_cut_prompts_are_named(tmp_path, settings_for):
    path = write(tmp_path / "rows.jsonl", good(LONG), good(), good(SHORT, LONG))
    settings = settings_for(path, max_length=60, overlength="truncate_prompt")
    rows, account = read(settings)
    assert len(rows) == 2
    assert len(rows[0].example.sequences[0].tokens) == 60
    found = {finding.name: finding for finding in account.findings(settings)}
    assert places(found["truncated_prompts"].places) == [1]
    assert places(found["overlength_rows"].places) == [3], "a response is never cut"


def test_a_row_that_just_fits_is_not_cut(tmp_path, settings_for, tokenizer):
    length = len(tokenizer(SHORT)["input_ids"]) + len(tokenizer(" 4")["input_ids"]) + 1
    path = write(tmp_path / "rows.jsonl", good())
    settings = settings_for(path, max_length=length, overlength="truncate_prompt")
    assert read(settings)[1].findings(settings) == []


def test_rows_behind_max_examples_are_not_looked_at(tmp_path, settings_for):
    path = write(tmp_path / "rows.jsonl", good(), "no json", *[good()] * 4)
    settings = settings_for(path, max_examples=3)
    rows, account = read(settings)
    assert [int(row.record.source[-1]) for row in rows] == [1, 3, 4]
    assert (account.num_used, account.num_unused) == (3, 2)


@pytest.mark.parametrize("rows", [[good(LONG)], ["no json"]])
def test_a_set_of_which_nothing_is_left_is_a_finding_and_no_crash(tmp_path, settings_for, rows):
    settings = settings_for(write(tmp_path / "rows.jsonl", *rows), max_length=60)
    assert settings.load_tokens() is None
    used, account = read(settings)
    assert used == []
    assert account.findings(settings)[-1].name == "no_rows"
    assert account.findings(settings)[-1].severity == "error"


def test_fit_finds_the_tokens_that_the_check_has_made(tmp_path, settings_for, tokenizer, monkeypatch):
    path = write(tmp_path / "rows.jsonl", *[good()] * 3)
    settings = settings_for(path)
    assert len(settings.load_tokens()) == 3
    monkeypatch.setattr("sft_lightning.data.token_store._build", None)
    options = {"max_length": 512, "cache_dir": settings.cache_dir}
    assert len(load_or_build_tokens(path, tokenizer=tokenizer, **options)) == 3


def test_a_wrong_path_is_a_mistake_in_the_config(tmp_path, settings_for):
    with pytest.raises(UserError, match=r"data\.train_path: data path .* is no file"):
        settings_for(tmp_path / "none.jsonl", overlength="error").load_tokens()


def test_sources_come_back_as_they_were(tmp_path):
    sources = Sources()
    for source in ("a.jsonl:1", "b:c.jsonl:7", "a.jsonl:3"):
        sources.append(source)
    assert [sources[index] for index in range(len(sources))] == ["a.jsonl:1", "b:c.jsonl:7", "a.jsonl:3"]
