"""Build the table of samples of a report: its frame, and its rows as JSON for ``assets/samples.js``."""

import json
from collections import Counter
from html import escape
from math import isfinite
from typing import Any

from sft_lightning.evaluation.comparison import rewarded
from sft_lightning.reporting.run_files import Evaluation
from sft_lightning.reporting.sections import Contents, Section


def samples_section(contents: Contents) -> Section | None:
    """The answers of the last evaluation, with filters and search."""
    evaluation = contents.files.latest
    if evaluation is None:
        return None
    rows = _sample_rows(contents, evaluation)
    after = "" if evaluation.step is None else f" after step {evaluation.step:,}"
    since = " and what changed since the first evaluation" if contents.changed.changes else ""
    changes = Counter(row["change"] for row in rows)
    failures = Counter(row["failure"] or "none" for row in rows)
    html = (
        '<div class="filters" role="group" aria-label="Filters of the samples">'
        '<label class="search">Search prompt, response and ground truth'
        '<input type="search" id="samples-search"></label>'
        f"{_select('change', 'Outcome', changes, len(rows))}{_select('failure', 'Failure', failures, len(rows))}"
        '<label>Order<select id="samples-order"><option value="number">as evaluated</option>'
        '<option value="longest">longest first</option>'
        '<option value="shortest">shortest first</option></select></label>'
        '<label class="check"><input type="checkbox" id="samples-space" checked>Show spaces and line ends</label></div>'
        "<noscript><p>This table needs JavaScript; predictions.jsonl holds the same samples.</p></noscript>"
        '<table class="samples"><caption>Answers of the evaluation'
        f"{after}{since}. A row opens to its texts.</caption>"
        '<colgroup><col class="number-column"><col class="change-column"><col class="failure-column">'
        '<col class="tokens-column"><col class="truth-column"><col class="preview-column"></colgroup>'
        '<thead><tr><th scope="col">Sample</th><th scope="col">Outcome</th><th scope="col">Failure</th>'
        '<th scope="col" class="number">Tokens</th><th scope="col" class="truth">Ground truth</th>'
        '<th scope="col" class="preview">Response</th></tr></thead><tbody id="samples-body"></tbody></table>'
        '<div class="pager"><button type="button" id="samples-previous">Previous</button>'
        '<button type="button" id="samples-next">Next</button>'
        '<span id="samples-status" role="status" aria-live="polite"></span></div>'
        f'<script type="application/json" id="samples-data">{embedded_json(rows)}</script>'
    )
    return Section("samples", "Samples", html)


def embedded_json(value: Any) -> str:
    """Returns JSON for the inside of a ``<script>`` element: ASCII, without characters that could end it."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _sample_rows(contents: Contents, evaluation: Evaluation) -> list[dict[str, Any]]:
    changes, baseline = contents.changed.changes, contents.files.baseline
    earlier = {(row["index"], row["sample"]): row for row in (baseline.samples if baseline and changes else [])}
    one_sample_each = all(row["sample"] == 0 for row in evaluation.samples)
    rows = []
    for row in evaluation.samples:
        key = (row["index"], row["sample"])
        before = earlier.get(key) or earlier.get((row["index"], 0))
        truth = row.get("ground_truth")
        rows.append(
            {
                "label": f"{key[0]}" if one_sample_each else f"{key[0]}.{key[1]}",
                "change": changes.get(key) or ("right" if rewarded(row) else "wrong"),
                "failure": row.get("failure"),
                "tokens": _finite(row.get("num_tokens")),
                "stop": str(row.get("stop_reason") or "").replace("_", " "),
                "entropy": _finite(row.get("mean_entropy")),
                "truth": truth if isinstance(truth, str) else json.dumps(truth, ensure_ascii=False),
                "prompt": row["prompt"],
                "response": row["response"],
                "before": before and {"response": before["response"], "tokens": _finite(before.get("num_tokens"))},
            }
        )
    return rows


def _finite(value: Any) -> int | float | None:
    return value if isinstance(value, int | float) and isfinite(value) else None


def _select(name: str, label: str, counts: Counter[str], num_rows: int) -> str:
    options = "".join(
        f'<option value="{escape(value)}">{escape(value.replace("_", " "))} ({count:,})</option>'
        for value, count in sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    )
    everything = f'<option value="">all ({num_rows:,})</option>'
    return f'<label>{label}<select id="samples-{name}">{everything}{options}</select></label>'
