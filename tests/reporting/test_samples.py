import json
import re

import pytest

from sft_lightning.reporting.before_after import before_and_after
from sft_lightning.reporting.run_files import read_run
from sft_lightning.reporting.samples import embedded_json, samples_section
from sft_lightning.reporting.sections import Contents


def section_of(run):
    files = read_run(run)
    return samples_section(Contents(files, before_and_after(files), [], {}))


def rows_in(section):
    return json.loads(re.search(r'id="samples-data">(.*)</script>', section.html)[1])


def options_in(section, name):
    select = re.search(rf'<select id="samples-{name}">(.*?)</select>', section.html)[1]
    return re.findall(r'<option value="(.*?)">(.*?)</option>', select)


def test_rows_show_the_change(tmp_path, write_run, samples_of):
    after = samples_of(3, 2)
    after[0] |= {"ground_truth": [7, "seven"], "response": "new", "mean_entropy": float("nan")}
    before = samples_of(3, 1, response="old")
    before[0]["ground_truth"] = [7, "seven"]
    section = section_of(write_run(tmp_path, {0: before, 5: after}))
    rows = rows_in(section)
    assert rows[0] == {
        "label": "0",
        "change": "still right",
        "failure": None,
        "tokens": 10,
        "stop": "stop string",
        "entropy": None,
        "truth": '[7, "seven"]',
        "prompt": "Question 0? Assistant: <think>",
        "response": "new",
        "before": {"response": "old", "tokens": 10},
    }
    assert [row["change"] for row in rows] == ["still right", "fixed", "still wrong"]
    assert options_in(section, "change") == [
        ("", "all (3)"),
        ("fixed", "fixed (1)"),
        ("still right", "still right (1)"),
        ("still wrong", "still wrong (1)"),
    ]
    assert options_in(section, "failure") == [("", "all (3)"), ("none", "none (2)"), ("wrong", "wrong (1)")]


def test_without_a_baseline_rows_are_right_or_wrong(tmp_path, write_run, samples_of):
    rows = rows_in(section_of(write_run(tmp_path, {5: samples_of(2, 1)})))
    assert [(row["change"], row["before"]) for row in rows] == [("right", None), ("wrong", None)]


def test_several_samples_of_a_prompt_have_distinct_labels(tmp_path, write_run, samples_of):
    before = samples_of(2, 0, response="old")
    after = [*samples_of(2, 2), *samples_of(2, 0, sample=1)]
    rows = rows_in(section_of(write_run(tmp_path, {0: before, 5: after})))
    assert [(row["label"], row["change"]) for row in rows] == [
        ("0.0", "fixed"),
        ("1.0", "fixed"),
        ("0.1", "still wrong"),
        ("1.1", "still wrong"),
    ]
    assert {row["before"]["response"] for row in rows} == {"old"}


@pytest.mark.parametrize(
    "text", ["</script><b>", "<!--<script>", "a\u2028b\u2029", "\ud83d", "&amp;", 'quo"te\\', "\x00"]
)
def test_json_in_the_page_cannot_end_its_script(text):
    embedded = embedded_json([text])
    assert embedded.isascii()
    assert not set("<>&") & set(embedded)
    assert json.loads(embedded) == [text]


def test_no_samples_give_no_table(tmp_path, write_run):
    assert section_of(write_run(tmp_path, {})) is None
