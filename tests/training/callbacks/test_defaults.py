import pytest
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger

from sft_lightning import GenerationEvaluation, HFCheckpoint, run_defaults
from sft_lightning.errors import UserError


def names(callbacks):
    return [type(callback).__name__ for callback in callbacks]


def test_a_run_gets_every_default(tmp_path):
    defaults = run_defaults(tmp_path)
    assert names(defaults["callbacks"]) == [
        "HFCheckpoint",
        "GenerationEvaluation",
        "Throughput",
        "SavedConfig",
        "PredictionWriter",
        "RowLossRecorder",
        "StepProgress",
        "RunReport",
    ]
    assert names(defaults["logger"]) == ["MetricsCSVLogger"]
    assert defaults["callbacks"][0].run == tmp_path
    assert defaults["logger"][0].save_dir == str(tmp_path)
    assert Trainer(**defaults, accelerator="cpu").checkpoint_callback is defaults["callbacks"][0]


def test_a_callback_of_the_same_class_replaces_the_default(tmp_path):
    own = [Callback(), GenerationEvaluation(3), HFCheckpoint(str(tmp_path), keep_last=1), TQDMProgressBar()]
    callbacks = run_defaults(tmp_path, callbacks=own)["callbacks"]
    assert callbacks[:4] == own
    assert names(callbacks[4:]) == ["Throughput", "SavedConfig", "PredictionWriter", "RowLossRecorder", "RunReport"]


def test_progress_can_be_off(tmp_path):
    assert "StepProgress" not in names(run_defaults(tmp_path, shows_progress=False)["callbacks"])


def test_other_loggers_come_before_metrics_csv(tmp_path):
    assert names(run_defaults(tmp_path, loggers=[CSVLogger(tmp_path)])["logger"]) == ["CSVLogger", "MetricsCSVLogger"]


def test_checkpoints_in_another_folder_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"HFCheckpoint saves to '.*/other', but output_dir is '.*': give both"):
        run_defaults(tmp_path, callbacks=[HFCheckpoint(str(tmp_path / "other"))])
