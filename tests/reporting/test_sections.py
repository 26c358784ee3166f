import re
from html import unescape

import pytest

from sft_lightning.reporting.before_after import before_and_after
from sft_lightning.reporting.figures import figures
from sft_lightning.reporting.run_files import read_run
from sft_lightning.reporting.sections import (
    Contents,
    config_section,
    evaluations_section,
    figures_section,
    result_section,
)

METRICS = ("step,train/loss,val/loss", "5,2.5,", "5,,1.75", "9,,1.25")


def contents_of(run, environment=None):
    files = read_run(run)
    return Contents(files, before_and_after(files), figures(files), environment or {})


def text_of(html):
    return " ".join(unescape(re.sub(r"<[^>]*>", " ", html)).split())


def rows_of(html):
    return [text_of(row) for row in re.findall(r"<tr.*?</tr>", html)]


def test_the_result_gives_the_change_and_its_interval(tmp_path, write_run, samples_of):
    """20 of 40 fixed, none broken: p = 2 / 2^20. Wilson's intervals: 0 of 40 0 to 8.8%, 20 of 40 35.2 to 64.8%."""
    run = write_run(tmp_path, {0: samples_of(40, 0), 9: samples_of(40, 20)})
    section = result_section(contents_of(run))
    assert section.title == "Did the model get better?"
    text = text_of(section.html)
    assert text.startswith(
        "Answer accuracy rose from 0.0% to 50.0% on 40 prompts. That is more than noise: 20 fixed, 0 broken, p < 0.001;"
    )
    assert "Format accuracy did not change on any of 40 prompts: it is 100.0%." in text
    head, formats, strict, answer, reward = rows_of(section.html)
    assert head == "Rate Before (step 0) After (step 9) 0 to 100% Change, points p Fixed Broken"
    assert answer.startswith("Answer accuracy 0.0% 0.0% to 8.8% 50.0% 35.2% to 64.8% +50.0 ")
    assert answer.endswith(" < 0.001 20 0")
    assert formats.endswith("+0.0 +0.0 to +0.0 1 0 0")
    assert strict.startswith("Strict format accuracy 100.0%")
    assert reward.startswith("Reward (format and answer) 0.0%")


def test_one_evaluation_has_its_rates(tmp_path, write_run, samples_of):
    section = result_section(contents_of(write_run(tmp_path, {9: samples_of(40, 20, strict_format_correct=None)})))
    assert section.title == "Result"
    assert "There is one evaluation so far" in section.html
    assert rows_of(section.html) == [
        "Rate Share (step 9) 0 to 100%",
        "Format accuracy 100.0% 91.2% to 100.0%",
        "Answer accuracy 50.0% 35.2% to 64.8%",
        "Reward (format and answer) 50.0% 35.2% to 64.8%",
    ]


def test_a_table_lists_evaluations_and_marks_the_best(tmp_path, write_run, samples_of):
    config = "checkpoint: {monitor: val/answer_accuracy}\n"
    run = write_run(tmp_path, {0: samples_of(4, 0), 5: samples_of(4, 4), 9: samples_of(4, 2)}, METRICS, config)
    (run / "best").symlink_to("checkpoint-5")
    section = evaluations_section(contents_of(run))
    rows = rows_of(section.html)
    assert [row.split()[0] for row in rows] == ["Step", "0", "5", "9"]
    assert ["best" in row for row in rows] == [False, False, True, False]
    assert rows[1].endswith("\N{EN DASH} 11.5 0.500")
    assert rows[2].endswith("1.7500 11.5 0.500")
    assert "Kept as best by val/answer_accuracy: step 5." in section.html


def test_every_figure_has_a_heading_a_legend_and_a_description(tmp_path, write_run, samples_of):
    html = figures_section(contents_of(write_run(tmp_path, {0: samples_of(4, 0), 5: samples_of(4, 4)}, METRICS))).html
    titles = re.findall("<h3>(.*?)</h3>", html)
    assert titles == [
        "Loss",
        "Accuracy of generated answers",
        "What became of the answers",
        "Why answers ended",
        "Mean response length",
        "Response length by outcome, last evaluation",
        "Mean token entropy",
    ]
    assert html.count('<ul class="legend">') == html.count('role="img" aria-label="') == len(titles)


def test_the_config_is_shown_without_its_secrets(tmp_path, write_run):
    config = (
        "model: {model_path: tiny <b>}\nevaluation: {generator: {init_args: {api_key: s3cret, pad_token: x}}}\n"
        "logger: [{Password: s3cret, API_KEY: null}]\n"
    )
    html = config_section(contents_of(write_run(tmp_path, {}, config=config), {"torch": "2.13.0"})).html
    assert "s3cret" not in html
    assert "api_key: (not shown)" in html
    assert "API_KEY: null" in html
    assert "pad_token: x" in html
    assert "<dt>model.model_path</dt><dd>tiny &lt;b&gt;</dd>" in html
    assert "<dt>torch</dt><dd>2.13.0</dd>" in html


@pytest.mark.parametrize("section", [result_section, figures_section, evaluations_section])
def test_missing_data_gives_no_section(tmp_path, write_run, section):
    assert section(contents_of(write_run(tmp_path, {}))) is None
