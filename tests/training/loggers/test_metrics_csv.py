import csv
import json
import math

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only
from torch.utils.data import DataLoader

from sft_lightning.checkpointing import callback, run_folder
from sft_lightning.cli.main import main
from sft_lightning.training.loggers.metrics_csv import MetricsCSVLogger
from sft_lightning.training.module import SFTModule


@pytest.fixture
def file(tmp_path):
    return tmp_path / "metrics.csv"


@pytest.fixture
def logger(tmp_path):
    return MetricsCSVLogger(tmp_path)


def lines(file):
    return file.read_text("utf-8").splitlines()


def test_a_row_for_each_set_of_metrics(logger, file):
    logger.log_metrics({"train/loss": 2.5, "train/lr": 0.001}, step=1)
    logger.log_metrics({"train/loss": 2.25, "train/lr": 0.002}, step=2)
    assert lines(file) == ["step,train/loss,train/lr", "1,2.5,0.001", "2,2.25,0.002"]


def test_a_new_metric_adds_a_column_and_keeps_rows(logger, file):
    logger.log_metrics({"train/loss": 2.5}, step=1)
    logger.log_metrics({"val/loss": 3.0}, step=1)
    logger.log_metrics({"train/loss": 2.0}, step=2)
    assert lines(file) == ["step,train/loss,val/loss", "1,2.5,", "1,,3.0", "2,2.0,"]


def test_epoch_is_not_a_metric_and_missing_step_is_zero(logger, file):
    logger.log_metrics({"val/loss": 3.0, "epoch": 0}, step=None)
    assert lines(file) == ["step,val/loss", "0,3.0"]


def test_digits_and_other_text_decode_to_themselves(logger, file):
    logger.log_metrics({"a": 1 / 3, "b": math.nan, "c": math.inf}, step=1)
    with file.open(newline="") as stream:
        (row,) = csv.DictReader(stream)
    assert float(row["a"]) == 1 / 3
    assert math.isnan(float(row["b"]))
    assert float(row["c"]) == math.inf


def test_another_process_appends_to_the_same_file(logger, file, tmp_path):
    logger.log_metrics({"train/loss": 2.5, "val/loss": 3.0}, step=1)
    again = MetricsCSVLogger(tmp_path)
    again.log_metrics({"train/loss": 2.0}, step=2)
    again.log_metrics({"train/grad_norm": 0.5}, step=3)
    assert lines(file) == ["step,train/loss,val/loss,train/grad_norm", "1,2.5,3.0,", "2,2.0,,", "3,,,0.5"]


def test_a_resumed_run_drops_what_it_will_write_again(logger, file, tmp_path):
    for step in (1, 2, 3, 10):
        logger.log_metrics({"train/loss": float(step)}, step=step)
    again = MetricsCSVLogger(tmp_path)
    again.start_after(2)
    assert lines(file) == ["step,train/loss", "1,1.0", "2,2.0"]
    again.log_metrics({"train/loss": 9.0}, step=3)
    assert lines(file) == ["step,train/loss", "1,1.0", "2,2.0", "3,9.0"]


@pytest.mark.parametrize(
    "again",
    [
        {"val/loss": 3.0, "val/perplexity": 20.0},  # a validation after the checkpoint
        {"lr-AdamW": 0.25},  # LearningRateMonitor, before each micro-batch of the next step
        {"val/answer_accuracy": 0.5},  # answers at the end of training
    ],
)
@pytest.mark.parametrize("times", [1, 2])
def test_what_a_resumed_run_writes_again_replaces_the_old_rows(logger, file, tmp_path, again, times):
    logger.log_metrics(again, step=1)
    logger.log_metrics({"train/loss": 2.5}, step=2)
    for _ in range(times):
        logger.log_metrics(again, step=2)
    before = lines(file)
    resumed = MetricsCSVLogger(tmp_path)
    resumed.start_after(2, step_metrics={"train/loss": 2.5})
    assert lines(file) == before
    for _ in range(times):
        resumed.log_metrics(again, step=2)
    assert lines(file) == before
    resumed.log_metrics(again, step=3)
    assert len(lines(file)) == len(before) + 1


def test_a_new_column_before_the_repeated_row_does_not_hide_it(logger, file, tmp_path):
    logger.log_metrics({"train/loss": 2.5}, step=2)
    logger.log_metrics({"val/loss": 3.0}, step=2)
    resumed = MetricsCSVLogger(tmp_path)
    resumed.start_after(2, step_metrics={"train/loss": 2.5})
    resumed.log_metrics({"lr": 0.5}, step=2)
    resumed.log_metrics({"val/loss": 3.0}, step=2)
    assert lines(file) == ["step,train/loss,val/loss,lr", "2,2.5,,", "2,,,0.5", "2,,3.0,"]


def test_metrics_of_the_step_are_written_beside_other_rows_of_it(logger, file, tmp_path):
    logger.log_metrics({"lr": 0.5}, step=2)
    MetricsCSVLogger(tmp_path).start_after(2, step_metrics={"train/loss": 2.5})
    assert lines(file) == ["step,lr,train/loss", "2,0.5,", "2,,2.5"]


def metrics_of(run):
    """Returns the rows without what depends on the clock."""
    with (run / "metrics.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    timed = {name for name in rows[0] if "second" in name or "utilization" in name or "memory" in name}
    return [{name: value for name, value in row.items() if name not in timed} for row in rows]


@pytest.mark.slow
def test_rows_of_killed_and_resumed_runs_are_those_of_one(command, val_file, tmp_path, monkeypatch, note_fault):
    """Dies in the step after a checkpoint, and again while ``final`` is written."""
    words = [*command, "--data.val_path", val_file, "--trainer.callbacks", "LearningRateMonitor"]
    words += ["--evaluation.num_examples", "3", "--trainer.max_steps", "5"]  # no validation at the end
    assert main([*words, "--output_dir", str(tmp_path / "one")]) == 0
    resumes = [*words, "--ckpt_path", "auto"]
    with monkeypatch.context() as patch:
        step = SFTModule.training_step

        def dies(module, batch, index):
            return 1 / 0 if module.global_step == 2 else step(module, batch, index)

        patch.setattr(SFTModule, "training_step", dies)
        with pytest.raises(ZeroDivisionError):
            main(resumes)
    with monkeypatch.context() as patch:
        patch.setattr(callback, "write_model", lambda *arguments: 1 / 0)  # of final
        with pytest.raises(ZeroDivisionError):
            main(resumes)
    assert not (tmp_path / "run" / "final").exists()
    assert main(resumes) == 0
    assert (tmp_path / "run" / "final").is_dir()
    assert metrics_of(tmp_path / "run") == metrics_of(tmp_path / "one")
    note_fault(
        "a run dies between a checkpoint and the metrics of the next step",
        provoked="in the step after a checkpoint, and while `final` is written, with LearningRateMonitor",
        outcome="`--ckpt_path auto` goes on; metrics.csv has the rows of a run that never died, each once",
        lost="the steps since the last checkpoint",
        tries=2,
    )


def test_a_fresh_run_keeps_only_the_row_before_training(logger, file, tmp_path):
    logger.log_metrics({"train/loss": 2.5}, step=7)
    logger.log_metrics({"val/answer_accuracy": 0.125}, step=0)
    MetricsCSVLogger(tmp_path).start_after(0)
    assert lines(file) == ["step,train/loss,val/answer_accuracy", "0,,0.125"]


def test_a_fresh_run_without_a_file_starts_one(logger, file):
    logger.start_after(0)
    logger.log_metrics({"train/loss": 2.5}, step=1)
    assert lines(file) == ["step,train/loss", "1,2.5"]


@pytest.mark.parametrize("tail", ["2,2.", "2", ",2.0,", "\r\n"])
def test_a_truncated_last_row_is_tolerated(file, tmp_path, tail):
    file.write_text(f"step,train/loss,val/loss\r\n1,2.5,\r\n{tail}")
    again = MetricsCSVLogger(tmp_path)
    again.start_after(1)
    again.log_metrics({"train/loss": 2.0}, step=2)
    assert lines(file) == ["step,train/loss,val/loss", "1,2.5,", "2,2.0,"]


def test_a_file_deleted_during_a_run_is_recreated(logger, file):
    logger.log_metrics({"train/loss": 2.5}, step=1)
    file.unlink()
    logger.log_metrics({"train/loss": 2.0}, step=2)
    assert lines(file) == ["step,train/loss", "2,2.0"]


def test_a_crash_during_the_rewrite_keeps_the_old_file(logger, file, monkeypatch):
    logger.log_metrics({"train/loss": 2.5}, step=1)
    monkeypatch.setattr(csv.DictWriter, "writerows", lambda *arguments: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        logger.log_metrics({"val/loss": 3.0}, step=1)
    assert lines(file) == ["step,train/loss", "1,2.5"]


def test_the_file_is_registered_with_the_run(logger, file, tmp_path):
    logger.log_metrics({"train/loss": 2.5}, step=1)
    assert json.loads((tmp_path / "run_files.json").read_text()) == ["metrics.csv"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.csv", "run_files.json"]
    run_folder.begin_new_run(tmp_path, overwrite=True)
    run_folder.delete_replaced(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_folder_is_created(tmp_path):
    MetricsCSVLogger(tmp_path / "new" / "run").log_metrics({"train/loss": 2.5}, step=1)
    assert lines(tmp_path / "new" / "run" / "metrics.csv") == ["step,train/loss", "1,2.5"]


def test_only_the_first_process_writes(logger, tmp_path, monkeypatch):
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    logger.log_metrics({"train/loss": 2.5}, step=1)
    logger.start_after(0)
    assert list(tmp_path.iterdir()) == []


class Counting(LightningModule):
    """Logs at every second micro-batch, which is every optimizer step, and after each validation."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))

    def training_step(self, batch, batch_idx):
        if batch_idx % 2:
            self.log("train/loss", float(batch_idx))
            self.log("step", float(self.trainer.global_step + 1))
        return self.weight * 1.0

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", 7.0)
        self.log("step", float(self.trainer.global_step))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


def test_in_a_trainer_the_steps_are_optimizer_steps(logger, file, tmp_path):
    trainer = Trainer(
        default_root_dir=tmp_path,
        accelerator="cpu",
        logger=logger,
        max_epochs=2,
        accumulate_grad_batches=2,
        log_every_n_steps=1,
        num_sanity_val_steps=0,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    loader = DataLoader(range(4), batch_size=1)
    trainer.fit(Counting(), loader, loader)
    assert lines(file) == [
        "step,train/loss,val/loss",
        "1,1.0,",
        "2,3.0,",
        "2,,7.0",
        "3,1.0,",
        "4,3.0,",
        "4,,7.0",
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.csv", "run_files.json"]


# Damaged files


@pytest.mark.parametrize("damage", [bytes(4096), b"3,\xff\xfe\r\n", b"3"])
def test_a_resumed_run_keeps_the_whole_rows(logger, file, tmp_path, note_fault, damage):
    for step in (1, 2, 3):
        logger.log_metrics({"train/loss": float(step)}, step=step)
    with file.open("ab") as stream:
        stream.write(damage)
    again = MetricsCSVLogger(tmp_path)
    again.start_after(2)
    again.log_metrics({"train/loss": 9.0}, step=3)
    assert lines(file) == ["step,train/loss", "1,1.0", "2,2.0", "3,9.0"]
    note_fault(
        "metrics.csv damaged",
        provoked="NULs at its end, as after a crash of the machine, bytes that are not UTF-8, a row cut short, a "
        "header of NULs",
        outcome="a warning names the first damaged line; the others are kept, and the run resumes; without a header "
        "the file is moved aside",
        lost="the damaged lines",
        tries=4,
    )


def test_a_file_without_a_header_is_moved_aside(logger, file, tmp_path, caplog):
    logger.log_metrics({"train/loss": 1.0}, step=1)
    damaged = bytes(8) + file.read_bytes()[8:]
    file.write_bytes(damaged)
    again = MetricsCSVLogger(tmp_path)
    again.start_after(1)
    again.log_metrics({"train/loss": 2.0}, step=2)
    assert lines(file) == ["step,train/loss", "2,2.0"]
    assert (tmp_path / "metrics.csv.damaged").read_bytes() == damaged
    assert caplog.messages[-1] == f"'{file}' was moved to '{file}.damaged'; metrics go on in a new file"
    assert "metrics.csv.damaged" in json.loads((tmp_path / run_folder.RUN_FILES).read_text())
