import json

import pytest
from lightning.pytorch import Callback

from sft_lightning.checkpointing.callback import HFCheckpoint
from sft_lightning.errors import UserError
from sft_lightning.generation.transformers_generator import TransformersGenerator
from sft_lightning.training.callbacks.generation_evaluation import GenerationEvaluation
from sft_lightning.training.callbacks.run_report import RunReport
from sft_lightning.training.loggers.metrics_csv import MetricsCSVLogger
from sft_lightning.training.module import SFTModule


@pytest.fixture
def run(tmp_path):
    return tmp_path / "run"


@pytest.fixture
def page(run):
    return run / "report" / "index.html"


@pytest.fixture
def fit(make_trainer, make_data, model_folder, train_file, val_file, run):
    """Trains four steps with a validation after every second one."""

    def start(*callbacks, data=None, **options):
        evaluation = GenerationEvaluation(2, generator=TransformersGenerator(max_new_tokens=3))
        saving = HFCheckpoint(str(run), monitor="val/loss")
        trainer = make_trainer(
            saving,
            evaluation,
            RunReport(),
            *callbacks,
            **{"max_steps": 4, "val_check_interval": 2, "logger": MetricsCSVLogger(run), **options},
        )
        trainer.fit(SFTModule(model_folder), make_data(train_file, val_file, **(data or {})))
        return trainer

    return start


class Stop(Callback):
    def __init__(self, error):
        self.error = error

    def on_train_batch_end(self, trainer, *args):
        if trainer.global_step == 3:
            raise self.error


class Pages(Callback):
    """Keeps the page as it is after each validation; it comes after the report in the list of callbacks."""

    def __init__(self, page):
        self.page = page
        self.seen = []

    def on_train_start(self, trainer, module):
        self.seen.append(self.page.read_text())

    def on_validation_end(self, trainer, module):
        if not trainer.sanity_checking:
            self.seen.append(self.page.read_text())


def test_the_report_is_written_before_during_and_after_training(fit, page, run, capsys, monkeypatch):
    monkeypatch.setattr("sft_lightning.training.callbacks.run_report._SECONDS_BETWEEN_PER_SECOND_OF_WRITING", 0)
    pages = Pages(page)
    fit(pages)
    assert len(pages.seen) == 3
    assert all("State <b>in training</b>" in seen for seen in pages.seen)
    assert ["step 0" in seen for seen in pages.seen] == [True, True, True]
    assert ["After (step 2)" in seen for seen in pages.seen] == [False, True, False]
    text = page.read_text()
    assert "State <b>finished</b>" in text
    assert "After (step 4)" in text
    assert "cores" in text
    assert f"report:  {page}" in capsys.readouterr().out
    files = json.loads((run / "run_files.json").read_text())
    written = {path.relative_to(run).as_posix() for path in page.parent.iterdir()}
    assert {"report/index.html", "report/environment.json", "report/loss.png", "report/accuracy.png"} <= written
    assert written <= set(files), "--overwrite would leave something behind"


def test_reports_are_skipped_until_the_next_is_due(fit, page, monkeypatch):
    monkeypatch.setattr("sft_lightning.training.callbacks.run_report._SECONDS_BETWEEN_PER_SECOND_OF_WRITING", 1e6)
    pages = Pages(page)
    fit(pages)
    assert len(set(pages.seen)) == 1
    assert "State <b>finished</b>" in page.read_text(), "the last report is always written"


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("something broke")])
def test_a_stopped_run_writes_its_report(fit, page, error):
    with pytest.raises((type(error), SystemExit)):
        fit(Stop(error))
    text = page.read_text()
    assert f"State <b>stopped by {type(error).__name__}</b>" in text
    assert "After (step 2)" in text
    assert (page.parent / "loss.png").is_file()


def test_a_report_that_cannot_be_written_stops_nothing(fit, run, caplog, capsys):
    run.mkdir()
    (run / "report").write_text("no folder")
    assert fit().global_step == 4
    messages = [record.getMessage() for record in caplog.records if "report" in record.getMessage()]
    assert messages
    assert set(messages) == {messages[0]}
    assert messages[0].startswith("the report was not written: ")
    assert "\n" not in messages[0]
    assert "report:" not in capsys.readouterr().out


def test_a_refused_fit_keeps_the_report_of_the_other_run(fit, page):
    fit()
    before = page.read_bytes()
    with pytest.raises(UserError, match="holds another run"):
        fit()
    assert page.read_bytes() == before


def test_a_dry_run_writes_nothing(fit, run):
    fit(fast_dev_run=True)
    assert not run.exists()
