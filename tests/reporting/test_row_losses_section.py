import json

import pyarrow
from pyarrow import parquet

from sft_lightning.reporting.before_after import before_and_after
from sft_lightning.reporting.figures import figures
from sft_lightning.reporting.row_losses_section import row_losses_section
from sft_lightning.reporting.run_files import read_run
from sft_lightning.reporting.sections import Contents


def contents_of(run):
    files = read_run(run)
    return Contents(files, before_and_after(files), figures(files), {})


def write_row_losses(run, rows, epoch):
    """Rows are (source, labels, nll of the whole response)."""
    folder = run / "row_losses" / f"epoch-{epoch}"
    folder.mkdir(parents=True)
    sources, num_labels, nll_sums = zip(*rows, strict=True)
    columns = {
        "source": list(sources),
        "epoch": pyarrow.array([epoch] * len(rows), pyarrow.int32()),
        "step": pyarrow.array([epoch + 1] * len(rows), pyarrow.int64()),
        "num_labels": pyarrow.array(num_labels, pyarrow.int32()),
        "nll_sum": pyarrow.array(nll_sums, pyarrow.float64()),
    }
    parquet.write_table(pyarrow.table(columns), folder / f"step-{epoch + 1}.rank-0.parquet")


def test_listed_rows_are_escaped(tmp_path, write_run, samples_of):
    data = tmp_path / "train.jsonl"
    texts = ["<script>alert(1)</script>", "easy", "middling"]
    data.write_text("".join(json.dumps({"prompt": text, "response": " r"}) + "\n" for text in texts))
    run = write_run(tmp_path, {0: samples_of(4, 0)})
    for epoch, scale in enumerate((1.0, 0.5, 0.25)):
        rows = [(f"{data}:1", 2, 8.0), (f"{data}:2", 2, 2.0 * scale), (f"{data}:3", 2, 4.0 * scale)]
        write_row_losses(run, rows, epoch)
    section = row_losses_section(contents_of(run))
    assert section.title == "Training rows"
    assert "3 rows in 3 complete epochs" in section.html
    hardest = section.html.split("<tbody>")[1].split("</tbody>")[0]
    first = hardest.split("</tr>")[0]
    assert f"{data}:1" in first
    assert first.count('<td class="number">4.000</td>') == 2  # nats a label token, in the first and in the last epoch
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in first
    assert "<script>" not in section.html
    # 2.0 * 0.25 nats are below log 2, and were above it: row 2 is memorized, row 3 at 1.0 is not.
    heart = section.html.split("Memorized</h3>")[1]
    assert f"{data}:2" in heart
    assert f"{data}:3" not in heart


def test_a_run_without_row_losses_has_no_such_section(tmp_path, write_run, samples_of):
    assert row_losses_section(contents_of(write_run(tmp_path, {0: samples_of(4, 0)}))) is None


def test_a_damaged_file_of_row_losses_is_a_note(tmp_path, write_run, samples_of):
    run = write_run(tmp_path, {0: samples_of(4, 0)})
    folder = run / "row_losses" / "epoch-0"
    folder.mkdir(parents=True)
    (folder / "step-1.rank-0.parquet").write_bytes(b"PAR1 not")
    assert "step-1.rank-0.parquet" in row_losses_section(contents_of(run)).html


def test_rules_that_need_more_epochs_are_named(tmp_path, write_run, samples_of):
    run = write_run(tmp_path, {0: samples_of(4, 0)})
    write_row_losses(run, [("gone.jsonl:1", 2, 8.0)], 0)
    html = row_losses_section(contents_of(run)).html
    assert "Cannot be found before 3 epochs" in html
    assert "gone.jsonl:1" in html
