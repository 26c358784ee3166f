import json
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from transformers import AutoModelForCausalLM, AutoTokenizer

from sft_lightning.checkpointing import folder as checkpoint_folder
from sft_lightning.checkpointing import run_folder
from sft_lightning.errors import UserError
from sft_lightning.training.callbacks import row_losses
from sft_lightning.training.callbacks.row_losses import RowLossRecorder

LAYOUTS = ["padded", "packed", "shared_prefix"]
SCHEMA = pa.schema(
    {"source": pa.string(), "epoch": pa.int32(), "step": pa.int64(), "num_labels": pa.int32(), "nll_sum": pa.float64()}
)


def parts(run):
    return sorted((run / "row_losses").glob("epoch-*/*"))


def entries(run):
    """Returns (epoch, source) -> (step, num_labels, nll_sum), after making sure that none is there twice."""
    found = {}
    for path in parts(run):
        for row in pq.read_table(path).to_pylist():
            assert path.parent.name == f"epoch-{row['epoch']}"
            key = row["epoch"], row["source"]
            assert key not in found, f"{key} is there twice"
            found[key] = row["step"], row["num_labels"], row["nll_sum"]
    return found


class Sees(Callback):
    """Keeps in which step of which epoch a row was."""

    def __init__(self):
        self.steps = {}

    def on_train_batch_start(self, trainer, module, batch, index):
        for source in batch.sources:
            self.steps[trainer.current_epoch, source] = trainer.global_step + 1


class Dies(Callback):
    """Ends the run like a kill does: when a micro-batch of an epoch is about to begin, and nothing is tidied up."""

    def __init__(self, epoch, index):
        self.at = epoch, index

    def on_train_batch_start(self, trainer, module, batch, index):
        if (trainer.current_epoch, index) == self.at:
            raise RuntimeError("killed")


@pytest.fixture(scope="module")
def reference(model_folder, train_file):
    """Returns source -> (num_labels, nll_sum) of the untrained weights: float64, row by row, transformers alone."""
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float64)
    expected = {}
    for number, line in enumerate(Path(train_file).read_text().splitlines(), start=1):
        row = json.loads(line)
        prompt = tokenizer(row["prompt"]).input_ids
        response = [*tokenizer(row["response"]).input_ids, tokenizer.eos_token_id]
        ids = torch.tensor([prompt + response])
        with torch.no_grad():
            log_probabilities = model(ids).logits[0].log_softmax(-1)
        nll = [-float(log_probabilities[len(prompt) - 1 + i, token]) for i, token in enumerate(response)]
        expected[f"{train_file}:{number}"] = len(response), sum(nll)
    return expected


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("batch_size", "accumulate"), [(8, 1), (4, 2), (1, 8)])
def test_row_losses_use_the_weights_of_their_step(fit, tmp_path, reference, layout, batch_size, accumulate):
    """At learning rate 0 those are the untrained ones. With batch size 1 the last step has six empty micro-batches."""
    sees = Sees()
    fit(
        data={"batch_size": batch_size, "layout": layout},
        model={"learning_rate": 0.0},
        accumulate_grad_batches=accumulate,
        callbacks=(RowLossRecorder(str(tmp_path)), sees),
    )
    found = entries(tmp_path)
    assert found.keys() == {(epoch, source) for epoch in (0, 1) for source in reference}
    for (epoch, source), (step, num_labels, nll_sum) in found.items():
        assert step == sees.steps[epoch, source]
        assert num_labels == reference[source][0]
        assert nll_sum == pytest.approx(reference[source][1], rel=1e-5)  # of a float32 model
    assert {path.name for path in parts(tmp_path)} == {"step-6.rank-0.parquet", "step-12.rank-0.parquet"}


def test_a_file_is_compressed_and_has_the_documented_columns(fit, tmp_path):
    fit(callbacks=(RowLossRecorder(str(tmp_path)),), max_epochs=1)
    (path,) = parts(tmp_path)
    assert pq.read_schema(path).equals(SCHEMA)
    column = pq.read_metadata(path).row_group(0).column(4)
    assert (column.path_in_schema, column.compression) == ("nll_sum", "ZSTD")


def test_limited_epochs_have_the_rows_that_were_trained_on(fit, tmp_path):
    sees = Sees()
    fit(callbacks=(RowLossRecorder(str(tmp_path)), sees), limit_train_batches=3)
    assert len(sees.steps) == 24, "two epochs of three micro-batches of four rows"
    assert {key: step for key, (step, *_) in entries(tmp_path).items()} == sees.steps


def test_a_repeated_epoch_has_the_same_rows_again(fit, tmp_path):
    fit(callbacks=(RowLossRecorder(str(tmp_path)),), overfit_batches=2)
    first, second = ({source for epoch, source in entries(tmp_path) if epoch == e} for e in (0, 1))
    assert first == second
    assert len(first) == 8


def test_memory_is_bounded_by_writing_more_parts(fit, tmp_path, monkeypatch):
    fit(callbacks=(RowLossRecorder(str(tmp_path / "one")),))
    monkeypatch.setattr(row_losses, "_MICRO_BATCHES_AT_ONCE", 3)
    fit(callbacks=(RowLossRecorder(str(tmp_path / "many")),))
    # Two micro-batches a step: a third one is there in the middle of a step, and the part ends with it.
    assert [path.name for path in parts(tmp_path / "many")] == [
        *("step-2.rank-0.parquet", "step-4.rank-0.parquet", "step-6.rank-0.parquet"),
        *("step-10.rank-0.parquet", "step-12.rank-0.parquet", "step-8.rank-0.parquet"),
    ]
    assert entries(tmp_path / "many") == entries(tmp_path / "one")


# Interrupted runs. Twelve steps of two micro-batches, six an epoch.


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    return tmp_path_factory.mktemp("straight")


@pytest.fixture
def whole(fit, straight):
    """The row losses of a run that nothing interrupted."""
    if not (straight / "final").exists():
        fit(straight, checkpoint={"every_n_train_steps": 1}, callbacks=(RowLossRecorder(),))
    return entries(straight)


@pytest.mark.parametrize("step", [1, 5, 6, 7, 11, 12])
def test_a_run_resumed_from_any_step_has_each_row_once(fit, tmp_path, straight, whole, step):
    """Rows of later steps are there when it starts, and would be there twice when it ends."""
    run = tmp_path / "run"
    shutil.copytree(straight, run, symlinks=True)
    fit(run, ckpt_path=str(run / f"checkpoint-{step}"), callbacks=(RowLossRecorder(),))
    assert entries(run) == whole


@pytest.mark.parametrize("index", range(0, 12, 3))
@pytest.mark.parametrize("epoch", [0, 1])
def test_a_crash_loses_no_row_before_the_checkpoint(fit, tmp_path, whole, epoch, index):
    saves = {"every_n_train_steps": 4}
    with pytest.raises(RuntimeError, match="killed"):
        fit(tmp_path, checkpoint=saves, callbacks=(RowLossRecorder(), Dies(epoch, index)))
    last = checkpoint_folder.find(tmp_path, "auto")
    fit(tmp_path, checkpoint={**saves, "overwrite": True}, callbacks=(RowLossRecorder(),), ckpt_path=last and str(last))
    assert entries(tmp_path) == whole


def test_rows_are_recorded_once_after_a_crash_before_the_checkpoint(fit, tmp_path, whole, monkeypatch):
    publish = checkpoint_folder.publish

    def dies(folder, *rest):
        if folder.name == "checkpoint-8":
            raise RuntimeError("killed")
        publish(folder, *rest)

    saves = {"every_n_train_steps": 4}
    with monkeypatch.context() as patches:
        patches.setattr(checkpoint_folder, "publish", dies)
        with pytest.raises(RuntimeError, match="killed"):
            fit(tmp_path, checkpoint=saves, callbacks=(RowLossRecorder(),))
    assert (tmp_path / "row_losses" / "epoch-1" / "step-8.rank-0.parquet").exists()
    fit(tmp_path, checkpoint=saves, callbacks=(RowLossRecorder(),), ckpt_path=str(tmp_path / "checkpoint-4"))
    assert entries(tmp_path) == whole


def test_a_file_is_cut_at_the_resumed_step(fit, tmp_path, whole):
    """When a run resumes from a checkpoint of an earlier attempt."""
    run = {"callbacks": (RowLossRecorder(),)}
    fit(tmp_path, checkpoint={"every_n_train_steps": 2}, max_steps=6, **run)
    again = {"checkpoint": {"every_n_train_steps": 100}, **run}
    fit(tmp_path, ckpt_path=str(tmp_path / "checkpoint-2"), max_steps=5, **again)
    assert [path.name for path in parts(tmp_path)] == ["step-2.rank-0.parquet", "step-5.rank-0.parquet"]
    fit(tmp_path, ckpt_path=str(tmp_path / "checkpoint-4"), **again)
    assert entries(tmp_path) == whole
    assert [path.name for path in parts(tmp_path)[:2]] == ["step-2.rank-0.parquet", "step-4.rank-0.parquet"]


def test_a_damaged_file_does_not_stop_a_resume(fit, tmp_path, whole, caplog, note_fault):
    run = {"callbacks": (RowLossRecorder(),), "checkpoint": {"every_n_train_steps": 2}}
    fit(tmp_path, max_steps=6, **run)
    last = parts(tmp_path)[-1]
    assert last.name == "step-6.rank-0.parquet"
    last.write_bytes(last.read_bytes()[:100])
    fit(tmp_path, ckpt_path=str(tmp_path / "checkpoint-4"), **run)
    aside = last.with_name("step-6.rank-0.parquet.damaged")
    assert f"'{last}' cannot be read and was moved to '{aside}'" in caplog.messages
    assert aside.stat().st_size == 100
    assert str(aside.relative_to(tmp_path)) in json.loads((tmp_path / run_folder.RUN_FILES).read_text())
    aside.unlink()
    assert entries(tmp_path) == whole
    note_fault(
        "row losses damaged",
        provoked="a file of them cut short, before a resume and before a report; other columns and types, missing "
        "values",
        outcome="a resume moves it aside with a warning and goes on; the report leaves it out and names it",
        lost="the losses of its rows",
        tries=5,
    )


def test_only_unfinished_files_of_a_killed_process_are_deleted(fit, tmp_path):
    folder = tmp_path / "row_losses" / "epoch-0"
    folder.mkdir(parents=True)
    (folder / ".step-4.rank-0.parquet.tmp-1").write_text("half")
    (folder / "mine.parquet").write_text("mine")
    fit(callbacks=(RowLossRecorder(str(tmp_path)),), max_epochs=1)
    assert {path.name for path in folder.iterdir()} == {"mine.parquet", "step-6.rank-0.parquet"}


# The run folder


def test_overwriting_a_run_deletes_its_row_losses(fit, tmp_path):
    fit(tmp_path, callbacks=(RowLossRecorder(),))
    assert len(parts(tmp_path)) == 2
    run_folder.begin_new_run(tmp_path, overwrite=True)
    run_folder.delete_replaced(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_new_run_replaces_rows_of_a_run_without_checkpoints(fit, tmp_path):
    for _ in range(2):
        fit(callbacks=(RowLossRecorder(),), default_root_dir=tmp_path, max_epochs=1)
    assert len(entries(tmp_path)) == 42


def test_a_dry_run_leaves_nothing(fit, tmp_path):
    fit(callbacks=(RowLossRecorder(str(tmp_path / "run")),), fast_dev_run=True)
    assert not (tmp_path / "run").exists()


def test_an_error_names_the_required_training_step_output(tmp_path):
    class Other(LightningModule):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(1, 1)

        def training_step(self, batch, index):
            return self.layer(batch).sum()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    trainer = Trainer(callbacks=[RowLossRecorder(str(tmp_path))], enable_model_summary=False, max_steps=1, **quiet)
    with pytest.raises(UserError, match="RowLossRecorder needs a training_step that returns"):
        trainer.fit(Other(), torch.utils.data.DataLoader(torch.ones(2, 1)))
