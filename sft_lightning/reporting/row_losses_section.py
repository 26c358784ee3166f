"""Build the report section on the training rows that stand out by their losses."""

from html import escape

from sft_lightning.errors import UserError
from sft_lightning.reporting.row_losses import (
    EPOCHS_TO_FIND_MEMORIZED,
    EPOCHS_TO_FIND_MISLABELED,
    RowLossEntry,
    RowLossFindings,
    read_row_losses,
)
from sft_lightning.reporting.sections import Contents, Section, scrolling

_MAX_ROWS = 10
_DASH = "\N{EN DASH}"


def row_losses_section(contents: Contents) -> Section | None:
    """Training rows: the hardest, the likely mislabeled, and the memorized ones."""
    try:
        findings = read_row_losses(contents.files.folder, most=_MAX_ROWS)
    except UserError as error:
        return Section("rows", "Training rows", f'<p class="note">{escape(str(error))}</p>')
    if findings is None or not findings.epochs:
        return None
    explanation = (
        f"{findings.num_rows:,} rows in {len(findings.epochs)} complete epochs. The numbers are the training loss of a "
        "row in the first and in the last of them, in nats per label token. Likely mislabeled: the loss stays high "
        "while that of other rows falls. Memorized: the probability of the whole response has risen above one half, "
        "because the model learned the row or the pattern behind it."
    )
    html = "".join(f'<p class="note">{escape(text)}</p>' for text in (findings.note.capitalize(), explanation) if text)
    html += _list(findings, "Hardest", findings.hardest, findings.num_rows, 1)
    html += _list(
        findings, "Likely mislabeled", findings.mislabeled, findings.num_mislabeled, EPOCHS_TO_FIND_MISLABELED
    )
    html += _list(findings, "Memorized", findings.memorized, findings.num_memorized, EPOCHS_TO_FIND_MEMORIZED)
    return Section("rows", "Training rows", html)


def _list(findings: RowLossFindings, title: str, rows: list[RowLossEntry], number: int, num_epochs: int) -> str:
    heading = f"<h3>{escape(title)}</h3>"
    if len(findings.epochs) < num_epochs:
        return f'{heading}<p class="note">Cannot be found before {num_epochs} epochs.</p>'
    if not rows:
        return f'{heading}<p class="note">None.</p>'
    caption = f"{len(rows)} of {number:,} rows" if title != "Hardest" else f"The {len(rows)} rows with the highest loss"
    body = "".join(
        f'<tr><th scope="row">{escape(row.source)}</th><td class="number">{_nll(row.nll[0])}</td>'
        f'<td class="number">{_nll(row.nll[-1])}</td><td>{escape(row.excerpt or "")}</td></tr>'
        for row in rows
    )
    table = (
        f'<table class="rows"><caption>{escape(caption)}</caption><thead><tr><th scope="col">Row</th>'
        '<th scope="col" class="number">First</th><th scope="col" class="number">Last</th>'
        f'<th scope="col">Text</th></tr></thead><tbody>{body}</tbody></table>'
    )
    return heading + scrolling(title, table)


def _nll(value: float | None) -> str:
    return _DASH if value is None else f"{value:.3f}"
