import json
from types import SimpleNamespace

import pytest
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers.logger import Logger
from transformers import AutoTokenizer

from sft_lightning.callbacks.throughput import Throughput
from sft_lightning.datamodule import SFTDataModule
from sft_lightning.module import SFTModule


class Recorder(Logger):
    def __init__(self):
        super().__init__()
        self.rows = []

    name = "recorder"
    version = ""

    def log_hyperparams(self, *args, **kwargs):
        pass

    def log_metrics(self, metrics, step=None):
        self.rows.append((step, metrics))

    def series(self, key):
        return [(step, metrics[key]) for step, metrics in self.rows if key in metrics]


class Clock:
    """Stands still but for what the callbacks below take."""

    now = 100.0


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr("sft_lightning.callbacks.throughput.time", SimpleNamespace(monotonic=lambda: clock.now))
    return clock


class Takes(Callback):
    """Lets time pass: 2 seconds in a micro-batch, and hours wherever no training happens."""

    def __init__(self, clock):
        self.clock = clock

    def on_train_start(self, *args):
        self.clock.now += 3600

    def on_after_backward(self, *args):
        self.clock.now += 2

    def on_validation_start(self, *args):
        self.clock.now += 3600


@pytest.fixture
def rows(tmp_path, model_folder):
    """Two rows, and (input tokens, response tokens) of each; the EOS is a response token, and the last never input."""
    path = tmp_path / "rows.jsonl"
    texts = [("one", " two three four"), ("a longer prompt", " short")]
    path.write_text("".join(json.dumps({"prompt": p, "response": r}) + "\n" for p, r in texts))
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    counts = [
        (len(tokenizer(p).input_ids) + len(tokenizer(r).input_ids), len(tokenizer(r).input_ids) + 1) for p, r in texts
    ]
    assert len(set(counts)) == 2
    return str(path), counts


def fit(model_folder, path, *callbacks, batch_size, **options):
    recorder = Recorder()
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        logger=recorder,
        log_every_n_steps=1,
        callbacks=list(callbacks),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    data = SFTDataModule(train_path=path, val_path=path, tokenizer_path=model_folder, batch_size=batch_size, seed=1)
    trainer.fit(SFTModule(model_folder), data)
    return recorder


@pytest.mark.parametrize("listed_first", [True, False])
def test_tokens_are_counted_and_only_training_takes_time(model_folder, rows, clock, listed_first):
    path, counts = rows
    callbacks = [Throughput(), Takes(clock)]
    recorder = fit(
        model_folder,
        path,
        *(callbacks if listed_first else callbacks[::-1]),
        batch_size=1,
        max_epochs=2,
        accumulate_grad_batches=2,
    )
    tokens, response_tokens = (sum(each) for each in zip(*counts, strict=True))
    seconds = 4  # two micro-batches of 2 seconds; padding counts nothing
    assert recorder.series("train/tokens_per_second") == [(1, tokens / seconds), (2, tokens / seconds)]
    assert recorder.series("train/response_tokens_per_second") == [
        (1, response_tokens / seconds),
        (2, response_tokens / seconds),
    ]


def test_padding_counts_nothing(model_folder, rows, clock):
    path, counts = rows
    recorder = fit(model_folder, path, Throughput(), Takes(clock), batch_size=2, max_epochs=1, limit_val_batches=0)
    assert recorder.series("train/tokens_per_second") == [(1, sum(tokens for tokens, _ in counts) / 2)]


def test_an_empty_micro_batch_counts_nothing(model_folder, rows, clock):
    path, counts = rows
    recorder = fit(
        model_folder,
        path,
        Throughput(),
        Takes(clock),
        batch_size=2,
        accumulate_grad_batches=4,
        max_epochs=1,
        limit_val_batches=0,
    )
    seconds = 8  # four micro-batches, two of them empty
    assert recorder.series("train/tokens_per_second") == [(1, sum(tokens for tokens, _ in counts) / seconds)]
    assert recorder.series("train/response_tokens_per_second") == [(1, sum(n for _, n in counts) / seconds)]


def test_each_step_is_measured_for_itself(model_folder, rows, clock):
    path, counts = rows
    recorder = fit(model_folder, path, Throughput(), Takes(clock), batch_size=1, max_epochs=1, limit_val_batches=0)
    rates = [rate for _, rate in recorder.series("train/tokens_per_second")]
    assert sorted(rates) == sorted(tokens / 2 for tokens, _ in counts)


def test_replicas_multiply(model_folder, rows, clock, monkeypatch):
    monkeypatch.setattr("sft_lightning.callbacks.throughput.replicas", lambda trainer: (8, 0))
    path, counts = rows
    recorder = fit(model_folder, path, Throughput(), Takes(clock), batch_size=2, max_epochs=1, limit_val_batches=0)
    assert recorder.series("train/tokens_per_second") == [(1, 8 * sum(tokens for tokens, _ in counts) / 2)]
