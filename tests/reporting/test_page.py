"""Test the whole page, also in a real browser."""

import json
from importlib.metadata import version

import pytest

from sft_lightning.reporting.page import record_environment, write_report

MARKUP = "<script>document.title = 'owned'</script><!--"
HOSTILE = MARKUP + '"></td><img src=x onerror="document.title=\'owned\'">\u2028</script>\t \u202e\ud83d'
METRICS = ("step,train/loss,val/loss,train/entropy", *(f"{step},{3 - step / 150},,1.5" for step in range(1, 301)))


@pytest.fixture(scope="module")
def page(tmp_path_factory, write_run, samples_of):
    """320 prompts, 10 of them right before and 200 after; 5 that were right are broken."""
    after = samples_of(320, 205)
    for row in after[:5]:
        row |= {"answer_correct": False, "failure": "cut_at_limit", "response": "word " * 300, "num_tokens": 300}
    after[7] |= {"response": "needle in\ta haystack\n", "num_tokens": 999}
    config = "checkpoint: {monitor: val/answer_accuracy}\nmodel: {model_path: " + "long/" * 60 + "}\n"
    evaluations = {0: samples_of(320, 10, response="and " * 60, num_tokens=60), 150: samples_of(320, 100), 300: after}
    run = write_run(tmp_path_factory.mktemp("run") / ("a-long-name-" * 8), evaluations, METRICS, config)
    record_environment(run, "cpu, 2 cores")
    return write_report(run)


@pytest.fixture(scope="module")
def hostile_page(tmp_path_factory, write_run, samples_of):
    rows = samples_of(
        3, 1, prompt=HOSTILE, response=HOSTILE, truth=HOSTILE, failure=HOSTILE, stop_reason=HOSTILE, answer=HOSTILE
    )
    config = json.dumps({HOSTILE: HOSTILE, "model": {"model_path": HOSTILE}, "checkpoint": {"monitor": HOSTILE}})
    run = write_run(tmp_path_factory.mktemp("run") / MARKUP.replace("/", "_"), {0: rows, 5: rows}, config=config)
    return write_report(run, state=HOSTILE)


def num_rows(browser):
    return browser.evaluate("document.querySelectorAll('tr.sample').length")


def status(browser):
    return browser.evaluate("document.getElementById('samples-status').textContent")


# What is written


def test_the_page_and_the_plots_are_written(page):
    names = {path.name for path in page.parent.iterdir()}
    assert names == {
        "index.html", "environment.json", "loss.png", "accuracy.png", "response-length.png", "response-length-last.png",
        "failures.png", "stop-reasons.png", "entropy.png",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("final_step", "state"), [(None, "not finished"), (5, "finished"), (3, "not finished"), ("x", "not finished")]
)
def test_the_state_is_read_off_the_folder(tmp_path, write_run, samples_of, final_step, state):
    run = write_run(tmp_path, {5: samples_of(2, 1)})
    if final_step is not None:
        (run / "final").mkdir()
        (run / "final" / "manifest.json").write_text(json.dumps({"step": final_step}))
    assert f"State <b>{state}</b>" in write_report(run, with_plots=False).read_text()
    assert not list((run / "report").glob("*.png"))


def test_a_recorded_environment_is_shown(tmp_path, write_run):
    run = write_run(tmp_path, {})
    now = write_report(run).read_text()
    assert f"<dt>torch</dt><dd>{version('torch')}</dd>" in now
    record_environment(run, "NVIDIA H100")
    recorded = json.loads((run / "report" / "environment.json").read_text())
    assert list(recorded) == ["Python", "sft-lightning", "torch", "lightning", "transformers", "device"]
    (run / "report" / "environment.json").write_text('{"torch": "1.2.3", "device": "NVIDIA H100"}')
    then = write_report(run).read_text()
    assert "<dt>torch</dt><dd>1.2.3</dd><dt>device</dt><dd>NVIDIA H100</dd>" in then


@pytest.mark.parametrize("left", ["config.yaml", "metrics.csv", "evaluation/step-0/predictions.jsonl"])
def test_any_single_file_gives_a_page(tmp_path, write_run, samples_of, left):
    run = write_run(tmp_path, {0: samples_of(3, 1)}, METRICS)
    for path in [path for path in run.rglob("*") if path.is_file()]:
        if path.relative_to(run).as_posix() != left:
            path.unlink()
    assert "</html>" in write_report(run, with_plots=False).read_text()


def test_a_page_is_whole_while_it_is_rewritten(tmp_path, write_run):
    run = write_run(tmp_path, {})
    first = write_report(run).stat().st_ino
    assert write_report(run).stat().st_ino != first, "it is replaced, not written over"
    assert [path.name for path in (run / "report").iterdir()] == ["index.html"]


# In a browser


def test_the_browser_detects_planted_faults(browser, tmp_path):
    bad = tmp_path / "bad.html"
    bad.write_text(
        "<div style='width: 1000px'>wide</div><img src='other.png'>"
        "<script>console.log('said'); throw Error('x')</script>"
    )
    browser.open(bad, width=400)
    assert browser.evaluate("document.documentElement.scrollWidth") > 400
    assert [url.rsplit("/", 1)[1] for url in browser.requests] == ["bad.html", "other.png"]
    assert len(browser.complaints) >= 2


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [400, 1400])
@pytest.mark.parametrize("name", ["page", "hostile_page"])
def test_a_page_opens_without_errors_requests_or_sideways_scrolling(browser, request, tmp_path, name, width, dark):
    page = request.getfixturevalue(name)
    browser.open(page, width=width, dark=dark)
    browser.evaluate("document.querySelectorAll('.opener').forEach((opener, n) => n < 3 && opener.click())")
    browser.evaluate("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
    assert browser.evaluate("document.documentElement.scrollWidth") == width
    assert browser.requests == [page.resolve().as_uri()]
    assert browser.complaints == []
    browser.screenshot(tmp_path / "page.png")
    assert (tmp_path / "page.png").stat().st_size > 20_000


def test_texts_of_data_models_and_configs_stay_texts(browser, hostile_page):
    browser.open(hostile_page)
    browser.click(".opener")
    browser.evaluate("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
    assert browser.evaluate("document.title").startswith("<script>")
    assert browser.evaluate("document.querySelectorAll('img, [onerror], main script:not([type])').length") == 0
    response = browser.evaluate("document.querySelector('.texts > div:nth-child(3) pre').textContent")
    assert response.startswith(MARKUP + '"></td><img src=x onerror=')
    assert response.endswith("U+2028</script>\t U+202E\ud83d")
    assert browser.evaluate("document.querySelector('td.failure').textContent").startswith(MARKUP)
    assert MARKUP in browser.evaluate("document.querySelector('details pre').textContent")


def test_the_table_filters_by_outcome_and_failure_from_the_keyboard(browser, page):
    browser.open(page)
    assert (num_rows(browser), status(browser)) == (25, "320 of 320 samples, page 1 of 13")
    # Outcomes are sorted by their number: 195 fixed, 115 still wrong, 5 broken, 5 still right.
    browser.evaluate("document.getElementById('samples-change').focus()")
    for expected in ("195 of 320", "115 of 320", "5 of 320"):
        browser.press("ArrowDown")
        browser.wait_for(f"document.getElementById('samples-status').textContent.startsWith('{expected}')")
    assert (
        browser.evaluate("[...document.querySelectorAll('td.change')].map((cell) => cell.textContent)")
        == ["\u25bc broken"] * 5
    )
    browser.press("Tab")
    for expected in ("0 of 320", "0 of 320", "5 of 320"):  # no failure, wrong, cut at limit
        browser.press("ArrowDown")
        browser.wait_for(f"document.getElementById('samples-status').textContent.startsWith('{expected}')")


def test_typing_searches_the_table(browser, page):
    browser.open(page)
    browser.click("#samples-search")
    browser.type("NEEDLE")
    browser.wait_for("document.getElementById('samples-status').textContent.startsWith('1 of 320')")
    assert browser.evaluate("document.querySelector('.opener').textContent") == "7"
    browser.type(" in no haystack")
    browser.wait_for("document.getElementById('samples-status').textContent.startsWith('0 of 320')")
    assert num_rows(browser) == 0


def test_pages_are_turned(browser, page):
    browser.open(page)
    assert browser.evaluate("document.getElementById('samples-previous').disabled")
    browser.click("#samples-next")
    browser.wait_for("document.getElementById('samples-status').textContent.endsWith('page 2 of 13')")
    assert browser.evaluate("document.querySelector('.opener').textContent") == "25"
    browser.click("#samples-previous")
    browser.wait_for("document.getElementById('samples-status').textContent.endsWith('page 1 of 13')")


def test_the_longest_answers_come_first_on_demand(browser, page):
    browser.open(page)
    browser.evaluate("document.getElementById('samples-order').focus()")
    browser.press("ArrowDown")
    browser.wait_for("document.querySelector('.opener').textContent === '7'")


def test_a_row_opens_by_mouse_and_by_key(browser, page):
    browser.open(page)
    browser.click("tr.sample:nth-child(1) td.truth")
    browser.wait_for("document.querySelector('.texts')")
    titles = "[...document.querySelectorAll('.texts h4')].map((title) => title.textContent)"
    assert browser.evaluate(titles) == [
        "Prompt",
        "Response before, 60 tokens",
        "Response now, entropy 0.500 nats, ended by stop string",
        "Ground truth",
    ]
    texts = browser.evaluate("[...document.querySelectorAll('.texts pre')].map((text) => text.textContent)")
    assert texts == ["Question 0? Assistant: <think>", "and " * 60, "word " * 300, "7"]
    browser.evaluate("document.querySelector('.opener').focus()")
    browser.press("Enter")
    browser.wait_for("!document.querySelector('.texts')")
    assert browser.evaluate("document.querySelector('.opener').getAttribute('aria-expanded')") == "false"


def test_whitespace_is_visible_until_switched_off(browser, page):
    browser.open(page)
    browser.click("tr.sample:nth-child(8) .opener")
    browser.wait_for("document.querySelector('.texts')")
    mark = "getComputedStyle(document.querySelector('.texts .newline'), '::before').content"
    dots = "getComputedStyle(document.querySelector('.texts .space')).backgroundImage"
    assert browser.evaluate(mark) == '"\u21b5"'
    assert "radial-gradient" in browser.evaluate(dots)
    browser.click("#samples-space")
    browser.wait_for(f"{mark} === 'none'")
    assert browser.evaluate(dots) == "none"


CONTRAST = """
(() => {
  const channels = (color) => color.match(/[\\d.]+/g).map(Number);
  const light = (color) => {
    const linear = (c) => c <= .03928 ? c / 12.92 : ((c + .055) / 1.055) ** 2.4;
    const [r, g, b] = channels(color).map((c) => linear(c / 255));
    return .2126 * r + .7152 * g + .0722 * b;
  };
  const ground = (element) => {
    for (let e = element; e; e = e.parentElement) {
      const color = getComputedStyle(e).backgroundColor;
      if ((channels(color)[3] ?? 1) === 1) return color;
    }
  };
  const poor = [];
  for (const e of document.querySelectorAll("body *")) {
    const hasText = [...e.childNodes].some((node) => node.nodeType === 3 && node.data.trim());
    if (!hasText || e.closest("script, style, :disabled, noscript") || !e.getClientRects().length) continue;
    const style = getComputedStyle(e);
    const [one, other] = [light(e.closest("svg") ? style.fill : style.color), light(ground(e))].sort((a, b) => b - a);
    if ((one + .05) / (other + .05) < 4.5) poor.push([e.tagName, e.className, style.color, ground(e)]);
  }
  return poor;
})()
"""


@pytest.mark.parametrize("dark", [False, True])
def test_all_text_has_the_contrast_that_wcag_asks_for(browser, page, dark):
    browser.open(page, dark=dark)
    browser.evaluate("document.querySelectorAll('.opener')[7].click()")
    assert browser.evaluate("matchMedia('(prefers-color-scheme: dark)').matches") == dark
    assert browser.evaluate(CONTRAST) == []


def test_every_table_figure_and_control_has_a_name(browser, page):
    browser.open(page)
    for selector, named in (
        ("table", "one.caption?.textContent"),
        ("svg[role=img]", "one.getAttribute('aria-label')"),
        ("input, select", "one.labels[0]?.textContent"),
        ("section", "document.getElementById(one.getAttribute('aria-labelledby'))?.textContent"),
    ):
        names = browser.evaluate(f"[...document.querySelectorAll('{selector}')].map((one) => {named})")
        assert names, selector
        assert all(names), selector
    levels = browser.evaluate("[...document.querySelectorAll('h1, h2, h3')].map((one) => +one.tagName[1])")
    assert levels[0] == 1
    assert levels.count(1) == 1


def test_thousands_of_long_samples_stay_quick(browser, tmp_path, write_run, samples_of):
    """Generous limits, for busy machines: a table with all rows in it takes many times as long."""
    texts = {"prompt": "preamble " * 150, "response": "thought " * 250}
    run = write_run(tmp_path, {0: samples_of(4000, 0, **texts), 5: samples_of(4000, 900, **texts)})
    page = write_report(run, with_plots=False)
    browser.open(page)
    assert browser.evaluate("document.querySelectorAll('main *').length") < 1000
    assert browser.evaluate("performance.timing.loadEventEnd - performance.timing.navigationStart") < 5000
    milliseconds = browser.evaluate(
        "(async () => { const search = document.getElementById('samples-search'); const start = performance.now();"
        "search.value = 'no such text'; search.dispatchEvent(new Event('input'));"
        "while (!document.getElementById('samples-status').textContent.startsWith('0 of'))"
        "  await new Promise((done) => setTimeout(done, 5));"
        "return performance.now() - start; })()"
    )
    assert milliseconds < 3000
