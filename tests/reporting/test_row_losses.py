import json
import random
import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from lightning.pytorch import Trainer, seed_everything

from sft_lightning import SFTDataModule, SFTModule
from sft_lightning.cli.commands.prepare import prepare_quickstart
from sft_lightning.data.formats.r1_zero import R1Zero
from sft_lightning.errors import UserError
from sft_lightning.quickstart.arithmetic import make_problems
from sft_lightning.reporting.row_losses import describe_row_losses, read_row_losses
from sft_lightning.training.callbacks.row_losses import RowLossRecorder


@pytest.fixture
def write(tmp_path):
    """Writes row losses: for each epoch, source -> nll per label token, of ten labels each. A part per two rows."""

    def write_epochs(*epochs):
        for epoch, rows in enumerate(epochs):
            folder = tmp_path / "row_losses" / f"epoch-{epoch}"
            folder.mkdir(parents=True, exist_ok=True)
            items = list(rows.items())
            for part in range(0, len(items), 2):
                mine = items[part : part + 2]
                columns = {
                    "source": pa.array([source for source, _ in mine], pa.string()),
                    "epoch": pa.array([epoch] * len(mine), pa.int32()),
                    "step": pa.array([part + 1] * len(mine), pa.int64()),
                    "num_labels": pa.array([10] * len(mine), pa.int32()),
                    "nll_sum": pa.array([10 * nll for _, nll in mine], pa.float64()),
                }
                pq.write_table(pa.table(columns), folder / f"step-{part + 1}.rank-0.parquet")
        return tmp_path

    return write_epochs


def sources(rows):
    return [row.source for row in rows]


def many(value, number=9):
    """Rows around a value, so that there is a spread to compare with."""
    return {f"data:{i}": value * (0.8 + 0.05 * i) for i in range(number)}


def test_a_run_without_row_losses_has_no_findings(tmp_path):
    assert read_row_losses(tmp_path) is None
    (tmp_path / "row_losses" / "epoch-0").mkdir(parents=True)
    assert read_row_losses(tmp_path) is None


def test_one_epoch_gives_only_hard_rows(write):
    findings = read_row_losses(write({"data:1": 0.001, "data:2": 3.0, "data:3": 1.0}), most=2)
    assert (findings.epochs, findings.num_rows) == ((0,), 3)
    assert [(row.source, row.nll, row.num_labels) for row in findings.hardest] == [
        ("data:2", (3.0,), 10),
        ("data:3", (1.0,), 10),
    ]
    assert findings.memorized == findings.mislabeled == []
    assert describe_row_losses(findings, most=1) == [
        "row losses: 3 rows, 1 epochs, nll in nats per label token",
        "hardest: 1 of 3 rows",
        "   3.000  data:2",
        "memorized: cannot be found before 2 epochs",
        "likely mislabeled: cannot be found before 3 epochs",
    ]


def test_the_hardest_are_those_of_the_last_epoch(write):
    findings = read_row_losses(write({"data:1": 5.0, "data:2": 2.0}, {"data:1": 1.0, "data:2": 2.0}))
    assert [(row.source, row.nll, row.score) for row in findings.hardest] == [
        ("data:2", (2.0, 2.0), 2.0),
        ("data:1", (5.0, 1.0), 1.0),
    ]


def test_an_epoch_that_still_runs_does_not_count(write):
    findings = read_row_losses(write({"data:1": 5.0, "data:2": 2.0}, {"data:1": 9.0}))
    assert findings.epochs == (0,)
    assert [(row.source, row.nll) for row in findings.hardest] == [("data:1", (5.0,)), ("data:2", (2.0,))]


def test_rows_missing_in_an_epoch_are_none(write):
    """As under limit_train_batches, where epochs have different rows."""
    findings = read_row_losses(write({"data:1": 5.0, "data:2": 2.0}, {"data:2": 1.0, "data:3": 3.0}))
    assert [(row.source, row.nll) for row in findings.hardest] == [("data:3", (None, 3.0)), ("data:2", (2.0, 1.0))]
    assert describe_row_losses(findings)[2] == "       -  3.000  data:3"


def test_memorized_is_a_whole_response_that_became_likely(write):
    """Ten labels: 0.06 nats each are 0.6, below log 2 = 0.693, and 0.08 are above it."""
    findings = read_row_losses(
        write(
            {"data:1": 1.0, "data:2": 3.0, "data:3": 1.0, "data:4": 0.05},
            {"data:1": 0.06, "data:2": 0.01, "data:3": 0.08, "data:4": 0.01},
        ),
        most=1,
    )
    assert findings.num_memorized == 2
    assert [(row.source, row.score) for row in findings.memorized] == [("data:2", pytest.approx(29.9))]


def test_mislabeled_stays_high_while_the_others_fall(write):
    """The median of rows 0 to 8 falls from 1.0 to 0.25, so a row must keep more than half of its loss."""
    stays, falls, low = {"bad:1": 4.0}, {"hard:1": 4.0}, {"easy:1": 0.9}
    findings = read_row_losses(
        write(
            many(2.0) | stays | falls | low,
            many(1.0) | stays | falls | low,
            many(0.25) | {"bad:1": 3.0, "hard:1": 1.9, "easy:1": 0.9},
        )
    )
    assert sources(findings.mislabeled) == ["bad:1"]
    assert findings.num_mislabeled == 1
    (row,) = findings.mislabeled
    assert row.nll == (4.0, 4.0, 3.0)
    # Means of the two later epochs. The nine: 0.625 times 0.8, 0.85 ... 1.2. With 0.9, 2.95 and 3.5 the median of
    # twelve lies between 1.05 and 1.1 times 0.625: 0.671875. Deviations in units of 0.625, of which the median lies
    # between the sixth and the seventh: 0.025, 0.025, 0.075, 0.075, 0.125, 0.125, 0.175, ... = 0.15.
    assert row.score == pytest.approx((3.5 - 0.671875) / (1.4826 * 0.15 * 0.625))


def test_first_epoch_losses_flag_no_row(write):
    first = many(2.0) | {"early:1": 50.0}
    later = many(0.5) | {"early:1": 0.5}
    last = many(0.1) | {"early:1": 0.1}
    assert read_row_losses(write(first, later, last)).mislabeled == []


@pytest.mark.parametrize("last", [1.0, 2.0])
def test_no_row_is_flagged_if_nothing_is_learned(write, last):
    epochs = [many(1.0) | {"bad:1": 40.0}, many(1.0) | {"bad:1": 40.0}, many(last) | {"bad:1": 90.0}]
    assert read_row_losses(write(*epochs)).mislabeled == []


def test_two_epochs_flag_no_row(write):
    assert read_row_losses(write(many(2.0) | {"bad:1": 9.0}, many(0.1) | {"bad:1": 9.0})).mislabeled == []


def test_equal_rows_are_not_outliers(write):
    alike = {f"data:{i}": 0.5 for i in range(9)}
    fallen = {f"data:{i}": 0.1 for i in range(9)}
    assert read_row_losses(write(alike, alike | {"bad:1": 5.0}, fallen | {"bad:1": 5.0})).mislabeled == []


# Excerpts


def excerpts(write, file, *lines):
    file.write_bytes(b"".join(line + b"\n" for line in lines))
    findings = read_row_losses(write({f"{file}:{number}": 1.0 / number for number in range(1, len(lines) + 1)}))
    return [row.excerpt for row in findings.hardest]


def test_an_excerpt_has_ends_of_prompt_and_response(write, tmp_path):
    prompt, response = "p" * 300 + "\n the   question", "First " + "r" * 300 + " last"
    lines = [
        json.dumps({"prompt": prompt, "response": response}),
        json.dumps({"question": "2+2?", "answer": "4", "id": "x"}),
        json.dumps({"instruction": "Say hi.", "n": 3, "output": "hi"}),
    ]
    found = excerpts(write, tmp_path / "rows.jsonl", *(line.encode() for line in lines))
    assert found == [
        "... " + "p" * 107 + " the question => First " + "r" * 54 + " ... " + "r" * 55 + " last",
        "2+2? => 4",
        "Say hi. => hi",
    ]


def test_a_line_that_holds_no_row_has_no_excerpt(write, tmp_path):
    lines = [b"\xff", b"not json", b"[1]", b"{}", b"[" * 100_000, b'\xef\xbb\xbf{"prompt": "a", "response": "b"}']
    assert excerpts(write, tmp_path / "rows.jsonl", *lines) == [None, None, None, None, None, "a => b"]


def test_a_file_that_is_gone_or_shorter_has_no_excerpt(write, tmp_path):
    short = tmp_path / "short.jsonl"
    short.write_text('{"prompt": "a", "response": "b"}\n')
    rows = {f"{short}:1": 4.0, f"{short}:7": 3.0, f"{tmp_path}/gone.jsonl:1": 2.0, "rows.parquet:1": 1.0}
    assert [row.excerpt for row in read_row_losses(write(rows)).hardest] == ["a => b", None, None, None]


def test_control_characters_do_not_reach_the_terminal(write, tmp_path):
    line = json.dumps({"prompt": "\x1b[2Jgone", "response": "\u202eok"}).encode()
    excerpts(write, tmp_path / "rows.jsonl", line)
    assert describe_row_losses(read_row_losses(tmp_path))[2].endswith(r"\x1b[2Jgone => \u202eok")


def cut(path):
    path.write_bytes(path.read_bytes()[:50])


def of_other_types(path):
    pq.write_table(pa.table({"source": [1], "epoch": ["x"], "num_labels": [1], "nll_sum": [1.0]}), path)


def without_a_column(path):
    pq.write_table(pq.read_table(path).drop_columns(["epoch"]), path)


def with_a_missing_value(path):
    table = pq.read_table(path)
    pq.write_table(table.set_column(0, "source", pa.array([None], pa.string())), path)


@pytest.mark.parametrize("damage", [cut, of_other_types, without_a_column, with_a_missing_value])
def test_a_damaged_part_is_left_out_and_named(write, tmp_path, damage):
    folder = write({"data:1": 1.0}) / "row_losses" / "epoch-0"
    part = folder / "step-1.rank-0.parquet"
    other = pq.read_table(part).set_column(0, "source", pa.array(["data:2"], pa.string()))
    pq.write_table(other, folder / "step-2.rank-0.parquet")
    damage(part)
    findings = read_row_losses(tmp_path)
    assert [row.source for row in findings.hardest] == ["data:2"]
    assert describe_row_losses(findings)[0] == (
        "row losses: left out what cannot be read: row_losses/epoch-0/step-1.rank-0.parquet"
    )
    (folder / "step-2.rank-0.parquet").unlink()
    with pytest.raises(UserError, match=r"none of the row losses in .* can be read; row_losses/epoch-0/step-1"):
        read_row_losses(tmp_path)


# A real training


def with_wrong_numbers(rows, share, draw):
    """Returns the rows with some results changed in thought and answer, and the line numbers of those."""
    planted = set(draw.sample(range(len(rows)), round(share * len(rows))))
    changed = []
    for place, row in enumerate(rows):
        right = row["ground_truth"]
        if place in planted:
            wrong = str(int(right) + draw.randint(1, 9))
            text, count = re.subn(
                rf"={right}\. </think> <answer> {right} <", f"={wrong}. </think> <answer> {wrong} <", row["response"]
            )
            assert count == 1
            row = {**row, "response": text}
        changed.append(row)
    return changed, {place + 1 for place in planted}


@pytest.mark.slow
def test_most_planted_wrong_answers_are_flagged_and_few_others(tmp_path):
    """1,200 short problems of the quickstart, 2% with a wrong result, until the model can calculate."""
    seed_everything(11, verbose=False)
    prepare_quickstart(tmp_path, seed=5)
    problems, _ = make_problems(num_train=12_000, num_heldout=1, seed=17)
    short = [problem for problem in problems if len(problem.numbers) == 2 and max(problem.numbers) <= 9][:1200]
    rows = [R1Zero().render({"question": problem.question, "answer": problem.solution}) for problem in short]
    rows, planted = with_wrong_numbers(rows, 0.02, random.Random(23))
    train = tmp_path / "train.jsonl"
    train.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert (len(rows), len(planted)) == (1200, 24)
    model = str(tmp_path / "model")
    data = SFTDataModule(str(train), tokenizer_path=model, batch_size=16)
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=10,
        gradient_clip_val=1.0,
        callbacks=[RowLossRecorder(str(tmp_path / "run"))],
        **quiet,
    )
    trainer.fit(SFTModule(model, learning_rate=3e-3, betas=(0.9, 0.9), lr_schedule="cosine", warmup_steps=20), data)
    findings = read_row_losses(tmp_path / "run", most=1000)
    accused = {int(row.source.rpartition(":")[2]) for row in findings.mislabeled}
    precision, recall = len(accused & planted) / len(accused), len(accused & planted) / len(planted)
    print(f"precision {precision:.2f}, recall {recall:.2f} of {len(planted)}, {len(accused)} accused")
    print("\n".join(describe_row_losses(findings)))
    assert recall >= 0.7
    assert precision >= 0.6
    assert all(row.excerpt for row in findings.mislabeled)
