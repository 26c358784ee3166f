"""Build the sections of a report. All text from data, models and configs goes through ``escape``."""

from dataclasses import dataclass
from html import escape
from typing import Any

import yaml

from sft_lightning.evaluation.comparison import PairedRate
from sft_lightning.reporting.before_after import RATE_LABELS, BeforeAfter, p_text, points, rates_of, verdict
from sft_lightning.reporting.figures import Figure, Lines, Rate, evaluation_rate
from sft_lightning.reporting.run_files import Evaluation, RunFiles
from sft_lightning.reporting.svg import draw, interval_strip, legend

_SECRETS = ("api_key", "apikey", "password", "secret", "access_token", "auth_token")
_STRIP = "0 to 100%"
_FACTS = (
    "model.model_path",
    "data.train_path",
    "data.val_path",
    "data.batch_size",
    "trainer.accumulate_grad_batches",
    "trainer.max_epochs",
    "model.learning_rate",
    "model.lr_schedule",
    "trainer.gradient_clip_val",
    "trainer.precision",
    "seed_everything",
)


@dataclass(frozen=True)
class Contents:
    """The content of a report.

    Attributes:
        files: The run folder.
        changed: Comparison of its first and last evaluation.
        figures: The figures for which the run has numbers.
        environment: Versions and device: name -> text.
    """

    files: RunFiles
    changed: BeforeAfter
    figures: list[Figure]
    environment: dict[str, str]


@dataclass(frozen=True)
class Section:
    """A section of the page: its anchor, its heading, and its HTML."""

    anchor: str
    title: str
    html: str


def result_section(contents: Contents) -> Section | None:
    """The first and the last evaluation, and whether the difference is significant."""
    files, changed = contents.files, contents.changed
    if not files.evaluations:
        return None
    note = f'<p class="note">{escape(changed.note)}</p>' if changed.note else ""
    if changed.comparison is None:
        return Section("result", "Result", note + _rates_table(files.evaluations[-1]))
    rates = changed.comparison.rates
    first, *others = [name for name in ("answer_accuracy", "format_accuracy") if name in rates]
    words = [f'<p class="verdict">{escape(verdict(RATE_LABELS[first], rates[first]))}</p>']
    words += [f"<p>{escape(verdict(RATE_LABELS[name], rates[name]))}</p>" for name in others]
    return Section("result", "Did the model get better?", "".join(words) + note + _paired_table(files, rates))


def figures_section(contents: Contents) -> Section | None:
    """Curves over the run, and lengths and failures of its answers."""
    if not contents.figures:
        return None
    parts = []
    for figure in contents.figures:
        bands = isinstance(figure, Lines) and any(line.band for line in figure.lines)
        unit = figure.y_label + (", with 95% intervals" if bands else "")
        parts.append(
            f"<figure><figcaption><h3>{escape(figure.title)}</h3><span>{escape(unit)}</span>"
            f"{legend(figure)}</figcaption>{draw(figure)}</figure>"
        )
    return Section("curves", "Over the run", f'<div class="figures">{"".join(parts)}</div>')


def evaluations_section(contents: Contents) -> Section | None:
    """Every evaluation of the run in numbers."""
    files = contents.files
    evaluations = [one for one in files.evaluations if one.metrics and one.step is not None]
    if not evaluations:
        return None
    validation_loss = dict(files.series.get("val/loss", []))
    rows = "".join(_evaluation_row(one, files.best_step, validation_loss) for one in evaluations)
    monitor = _look_up(files.config, "checkpoint.monitor")
    best = "" if files.best_step is None else f" Kept as best by {monitor}: step {files.best_step:,}."
    names = ("Step", "Format", "Answer", "Reward", "Loss", "Tokens", "Entropy")
    head = "".join(f'<th scope="col" class="number">{name}</th>' for name in names)
    table = (
        f"<table><caption>Each evaluation with its validation loss</caption><thead><tr>{head}</tr></thead>"
        f"<tbody>{rows}</tbody></table>"
    )
    explanation = (
        "Below each rate is its 95% interval. Loss: of the validation set, in nats a token. Tokens: mean length of an "
        f"answer. Entropy: mean of its tokens, in nats.{best}"
    )
    return Section(
        "evaluations",
        "All evaluations",
        f'{scrolling("All evaluations", table)}<p class="note">{escape(explanation)}</p>',
    )


def config_section(contents: Contents) -> Section | None:
    """The config and the environment."""
    config = contents.files.config
    html = ""
    if config:
        facts = [(key, _look_up(config, key)) for key in _FACTS]
        text = yaml.safe_dump(_without_secrets(config), sort_keys=False, allow_unicode=True)
        html += _definitions([(key, str(value)) for key, value in facts if value is not None])
        html += '<details class="config"><summary>The whole config.yaml</summary>'
        html += f'<pre tabindex="0">{escape(text)}</pre></details>'
    if contents.environment:
        html += f"<h3>Environment</h3>{_definitions(list(contents.environment.items()))}"
    return Section("config", "Config and environment", html) if html else None


def scrolling(label: str, table: str) -> str:
    """Returns a table in a box that scrolls horizontally on narrow pages."""
    # Focusable, so that the arrow keys scroll it.
    return f'<div class="scroll" role="region" aria-label="{label}" tabindex="0">{table}</div>'


def _paired_table(files: RunFiles, rates: dict[str, PairedRate]) -> str:
    before, after = files.baseline, files.latest
    assert before is not None
    assert after is not None
    rows = {}
    for name, rate in rates.items():
        old, new = (rate.before, *rate.before_interval), (rate.after, *rate.after_interval)
        low, high = rate.difference_interval
        rows[RATE_LABELS[name]] = {
            f"Before ({_step_name(before)})": _share(old),
            f"After ({_step_name(after)})": _share(new),
            _STRIP: interval_strip(old, new),
            "Change, points": f"<b>{points(rate.difference)}</b><small>{points(low)} to {points(high)}</small>",
            "p": escape(p_text(rate.p_value)),
            "Fixed": f"{rate.num_fixed:,}",
            "Broken": f"{rate.num_broken:,}",
        }
    num_pairs = next(iter(rates.values())).num_pairs
    explanation = (
        "Below each rate is its 95% interval (Wilson), below each change that of the change (bootstrap over prompts). "
        "Fixed: wrong before, right after; broken: the reverse. p: McNemar's exact test on those two."
    )
    return _rates_frame(f"{num_pairs:,} prompts, answered before and after", explanation, rows)


def _rates_table(evaluation: Evaluation) -> str:
    rows = {
        RATE_LABELS[name]: {f"Share ({_step_name(evaluation)})": _share(rate), _STRIP: interval_strip(None, rate)}
        for name, rate in rates_of(evaluation).items()
    }
    num_prompts = evaluation.metrics.get("num_examples") or len({row["index"] for row in evaluation.samples})
    return _rates_frame(f"{num_prompts} prompts", "Below each rate is its 95% interval.", rows) if rows else ""


def _rates_frame(caption: str, explanation: str, rows: dict[str, dict[str, str]]) -> str:
    """Returns a table from label of the row -> heading of the column -> HTML."""
    # Explicit roles: on a narrow screen the rows become blocks, and browsers then drop the table semantics.
    heads = ["Rate", *next(iter(rows.values()))]
    head = "".join(f'<th scope="col" role="columnheader">{escape(name)}</th>' for name in heads)
    body = []
    for label, cells in rows.items():
        columns = (
            f'<td role="cell" {"class=strip-cell" if name == _STRIP else ""} data-label="{escape(name)}">{html}</td>'
            for name, html in cells.items()
        )
        body.append(f'<tr role="row"><th scope="row" role="rowheader">{escape(label)}</th>{"".join(columns)}</tr>')
    table = (
        f'<table class="rates" role="table"><caption>{escape(caption)}</caption><thead role="rowgroup"><tr role="row">'
        f'{head}</tr></thead><tbody role="rowgroup">{"".join(body)}</tbody></table>'
    )
    return f'{scrolling("Rates", table)}<p class="note">{escape(explanation)}</p>'


def _share(rate: Rate) -> str:
    value, low, high = rate
    return f"<b>{value:.1%}</b><small>{low:.1%} to {high:.1%}</small>"


def _step_name(evaluation: Evaluation) -> str:
    return "evaluation" if evaluation.step is None else f"step {evaluation.step:,}"


def _evaluation_row(evaluation: Evaluation, best_step: int | None, validation_loss: dict[int, float]) -> str:
    metrics, step = evaluation.metrics, evaluation.step
    best = ' <span class="best">best</span>' if step == best_step else ""
    rates = [evaluation_rate(metrics, name) for name in ("format_accuracy", "answer_accuracy", "mean_reward")]
    cells = ["\N{EN DASH}" if rate is None else _share(rate) for rate in rates]
    length = (metrics.get("mean_num_tokens") or {}).get("all")
    for value, digits in ((validation_loss.get(step or 0), 4), (length, 1), (metrics.get("mean_entropy"), 3)):
        cells.append(f"{value:.{digits}f}" if isinstance(value, int | float) else "\N{EN DASH}")
    columns = "".join(f'<td class="number">{cell}</td>' for cell in cells)
    return f'<tr><th scope="row" class="number">{step:,}{best}</th>{columns}</tr>'


def _definitions(pairs: list[tuple[str, str]]) -> str:
    return f"<dl>{''.join(f'<dt>{escape(name)}</dt><dd>{escape(text)}</dd>' for name, text in pairs)}</dl>"


def _look_up(config: dict[str, Any], key: str) -> Any:
    value: Any = config
    for name in key.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    return value


def _without_secrets(value: Any) -> Any:
    """Returns a config with passwords and keys masked, because reports are shared."""
    if isinstance(value, dict):
        return {
            key: "(not shown)" if each and str(key).lower().endswith(_SECRETS) else _without_secrets(each)
            for key, each in value.items()
        }
    return [_without_secrets(each) for each in value] if isinstance(value, list) else value
