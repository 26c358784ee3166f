import io
import re
import sys
import threading
from types import SimpleNamespace

import pytest
from lightning.pytorch import Callback, Trainer

from sft_lightning.training.callbacks.progress import StepProgress
from sft_lightning.training.callbacks.throughput import Throughput
from sft_lightning.training.datamodule import SFTDataModule
from sft_lightning.training.module import SFTModule


def fit(model_folder, train_file, *callbacks, val_path=None, **options):
    """One epoch: six steps of four micro-batches."""
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        logger=False,
        callbacks=list(callbacks),
        enable_checkpointing=False,
        enable_model_summary=False,
        **{"max_epochs": 1, "accumulate_grad_batches": 4, "num_sanity_val_steps": 0, **options},
    )
    paths = {"train_path": train_file, "val_path": val_path, "tokenizer_path": model_folder}
    trainer.fit(SFTModule(model_folder, learning_rate=0.0), SFTDataModule(**paths, batch_size=2, seed=1))
    return trainer


def lines_of(capsys):
    """Returns our lines on stderr. Nothing may be on stdout, which is for results."""
    captured = capsys.readouterr()
    assert "step" not in captured.out
    return [line for line in captured.err.splitlines() if re.match(r"step \d|validation", line)]


@pytest.mark.parametrize(("every", "steps"), [(1, [1, 2, 3, 4, 5, 6]), (4, [4, 6]), (10, [6])])
def test_without_a_terminal_a_line_is_printed_every_n_steps(model_folder, train_file, capsys, every, steps):
    fit(model_folder, train_file, Throughput(), StepProgress(every_n_steps=every))
    lines = lines_of(capsys)
    pattern = r"step (\d)/6  loss (5\.\d{4})  [\d,]+ response tokens/s  \d+:\d\d:\d\d left"
    matches = [re.fullmatch(pattern, line) for line in lines]
    assert all(matches), lines
    assert [int(match[1]) for match in matches] == steps


@pytest.mark.parametrize(
    ("seconds_a_step", "left"),
    [
        (100, ["0:06:40 left", "0:03:20 left", "0:00:00 left"]),
        (43200, ["2 days, 0:00:00 left", "1 day, 0:00:00 left", "0:00:00 left"]),
    ],
)
def test_the_time_left_follows_from_the_steps_so_far(
    model_folder, train_file, capsys, monkeypatch, seconds_a_step, left
):
    clock = SimpleNamespace(now=0.0)

    class Slow(Callback):
        def on_after_backward(self, *args):
            clock.now += seconds_a_step / 4

    monkeypatch.setattr("sft_lightning.training.callbacks.progress.time", SimpleNamespace(monotonic=lambda: clock.now))
    fit(model_folder, train_file, StepProgress(every_n_steps=2), Slow())
    assert [line.rpartition("  ")[2] for line in lines_of(capsys)] == left


def test_a_validation_has_a_line_with_its_values(model_folder, train_file, val_file, capsys):
    trainer = fit(model_folder, train_file, StepProgress(), val_path=val_file, val_check_interval=12)
    values = [trainer.callback_metrics[f"val/{name}"] for name in ("loss", "perplexity", "token_accuracy")]
    line = "val/loss {:.4g}  val/perplexity {:.4g}  val/token_accuracy {:.4g}".format(*values)
    # The learning rate is 0, so that both say the same.
    lines = lines_of(capsys)
    assert lines[:1] == [f"validation after step 3: {line}"]
    assert f"validation after step 6: {line}" in lines
    assert sum("validation" in each for each in lines) == 2


def test_the_sanity_check_prints_nothing(model_folder, train_file, val_file, capsys):
    fit(
        model_folder,
        train_file,
        StepProgress(),
        val_path=val_file,
        num_sanity_val_steps=1,
        max_steps=1,
        val_check_interval=24,
    )
    assert not [line for line in lines_of(capsys) if "validation" in line]


def test_disabled_progress_prints_nothing(model_folder, train_file, val_file, capsys):
    progress = StepProgress(every_n_steps=1)
    progress.disable()
    fit(model_folder, train_file, progress, val_path=val_file, max_steps=1)
    assert lines_of(capsys) == []
    progress.enable()
    fit(model_folder, train_file, progress, max_steps=1)
    assert len(lines_of(capsys)) == 1


def bars():
    return [thread for thread in threading.enumerate() if type(thread).__name__ == "_RefreshThread"]


def bar_goes_on():
    """Returns whether a bar is still drawn, after the moment that an ended one takes to notice."""
    for thread in bars():
        thread.join(timeout=2)
    return bool(bars())


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_terminal_shows_a_bar_and_no_lines(model_folder, train_file, val_file, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setattr(sys, "stderr", Terminal())
    fit(model_folder, train_file, Throughput(), StepProgress(every_n_steps=1), val_path=val_file)
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", sys.stderr.getvalue())
    assert "left" not in shown
    steps = re.findall(r"step\s+(\d)/6 .*?loss (5\.\d{4})  [\d,]+ response tokens/s", shown)
    assert steps[-1][0] == "6"
    assert re.search(r"validation after step 6: val/loss 5\.\d+", shown)
    assert not bar_goes_on()


def test_a_failure_ends_the_bar(model_folder, train_file, monkeypatch):
    class Fails(Callback):
        def on_train_batch_end(self, *args):
            assert bars(), "there is no bar to end"
            raise ZeroDivisionError

    monkeypatch.setattr(sys, "stderr", Terminal())
    with pytest.raises(ZeroDivisionError):
        fit(model_folder, train_file, StepProgress(), Fails())
    assert not bar_goes_on()
