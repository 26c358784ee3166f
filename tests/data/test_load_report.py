from pathlib import Path

import pytest

from sft_lightning.data.load_report import LoadReport, SkippedRows, check_bad_rows
from sft_lightning.errors import UserError

FULL = LoadReport(
    bad_rows=SkippedRows(1, [("a.jsonl:1", "not JSON")]),
    overlength_rows=SkippedRows(2, [("a.jsonl:2", "9 tokens"), ("a.jsonl:3", "8 tokens")]),
    truncated_prompts=5,
    ungraded_rows=SkippedRows(6, [(f"a.jsonl:{line}", "no ground_truth") for line in range(10, 16)]),
    rejected_rows=SkippedRows(1, [("a.jsonl:4", "wrong")]),
)


def test_each_reason_is_a_sentence_with_count_and_five_rows():
    assert FULL.sentences == [
        "bad rows skipped (1): a.jsonl:1: not JSON",
        "rows over data.max_length dropped (2): a.jsonl:2: 9 tokens; a.jsonl:3: 8 tokens",
        "prompts cut from the left to data.max_length (5)",
        "rows whose response data.filter_correct does not accept dropped (1): a.jsonl:4: wrong",
        "rows that data.filter_correct cannot judge dropped (6): a.jsonl:10: no ground_truth; a.jsonl:11: no "
        "ground_truth; a.jsonl:12: no ground_truth; a.jsonl:13: no ground_truth; a.jsonl:14: no ground_truth; "
        "and 1 more",
    ]
    assert str(FULL) == ". ".join(FULL.sentences)
    assert str(LoadReport()) == ""


def test_rows_with_a_cut_prompt_do_not_count_as_skipped():
    assert FULL.num_rows == 10


def test_loaded_places_get_current_file_names():
    saved = {
        "bad_rows": {"count": 30, "first": [["old:dir/a.jsonl:7", "not JSON"]]},
        "overlength_rows": {"count": 0, "first": []},
        "truncated_prompts": 2,
        "ungraded_rows": {"count": 1, "first": [["b.jsonl:1", "no ground_truth"]]},
        "rejected_rows": {"count": 0, "first": []},
    }
    names = {"old:dir/a.jsonl": Path("new/a.jsonl"), "b.jsonl": Path("b.jsonl")}
    assert LoadReport.from_dict(saved, names) == LoadReport(
        bad_rows=SkippedRows(30, [("new/a.jsonl:7", "not JSON")]),
        truncated_prompts=2,
        ungraded_rows=SkippedRows(1, [("b.jsonl:1", "no ground_truth")]),
    )


def test_advice_depends_on_the_reasons():
    assert LoadReport(overlength_rows=FULL.overlength_rows).advice(8) == "Raise data.max_length (8)"
    assert "data.filter_correct: false" in LoadReport(rejected_rows=FULL.rejected_rows).advice(8)
    assert "data.filter_correct: false" in LoadReport(ungraded_rows=FULL.ungraded_rows).advice(8)


def test_skipped_rows_count_all_and_keep_the_first_twenty():
    rows = SkippedRows()
    for line in range(1, 26):
        rows.add(f"a:{line}", "bad")
    assert (rows.count, rows.first) == (25, [(f"a:{line}", "bad") for line in range(1, 21)])
    assert str(rows) == "a:1: bad; a:2: bad; a:3: bad; a:4: bad; a:5: bad; and 20 more"


def test_more_bad_rows_than_allowed_are_an_error():
    rows = SkippedRows(2, [("a:1", "not JSON"), ("a:4", "not JSON")])
    check_bad_rows(rows, 2)
    with pytest.raises(UserError) as error:
        check_bad_rows(rows, 1)
    assert str(error.value) == "too many bad rows (2, data.max_bad_rows is 1): a:1: not JSON; a:4: not JSON"
