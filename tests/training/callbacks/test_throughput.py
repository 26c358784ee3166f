import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Callback
from transformers import AutoTokenizer

from sft_lightning.models.flops import ModelFlops
from sft_lightning.system.peak_flops import Peak
from sft_lightning.training.callbacks import throughput
from sft_lightning.training.callbacks.throughput import Throughput
from sft_lightning.training.module import SFTModule


class Clock:
    """A clock that only the callbacks below advance."""

    now = 100.0


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(throughput, "time", SimpleNamespace(monotonic=lambda: clock.now))
    return clock


class Takes(Callback):
    """Lets time pass: 2 seconds in a micro-batch, and hours wherever no training happens."""

    def __init__(self, clock):
        self.clock = clock

    def on_train_start(self, *args):
        self.clock.now += 3600

    def on_after_backward(self, *args):
        self.clock.now += 2

    def on_validation_epoch_start(self, *args):
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


@pytest.fixture
def peaks(monkeypatch):
    """A device of 1e6 FLOP/s; holds the (device, dtype) it was asked for."""
    asked = []

    def peak_of(device, dtype):
        asked.append((device, dtype))
        return Peak(1e6, "made up")

    monkeypatch.setattr(throughput, "peak_of", peak_of)
    return asked


@pytest.fixture
def run(model_folder, rows, peaks, make_trainer, make_data):
    """Trains on the two rows and returns the logger. Padded, so that the computed tokens are easy to count."""

    def fit(*callbacks, batch_size, **options):
        path, _ = rows
        trainer = make_trainer(*callbacks, **{"max_epochs": 1, "limit_val_batches": 0, **options})
        trainer.fit(SFTModule(model_folder), make_data(path, path, batch_size=batch_size, layout="padded"))
        return trainer.logger

    return fit


@pytest.mark.parametrize("micro_batches_between_validations", [1, 2])
@pytest.mark.parametrize("listed_first", [True, False])
def test_tokens_are_counted_and_only_training_is_timed(
    run, rows, clock, listed_first, micro_batches_between_validations
):
    callbacks = [Throughput(), Takes(clock)]
    logged = run(
        *(callbacks if listed_first else callbacks[::-1]),
        batch_size=1,
        max_epochs=2,
        accumulate_grad_batches=2,
        limit_val_batches=1.0,
        val_check_interval=micro_batches_between_validations,
    )
    tokens, response_tokens = (sum(each) for each in zip(*rows[1], strict=True))
    seconds = 4  # two micro-batches of 2 seconds
    assert logged.series("train/tokens_per_second") == [(1, tokens / seconds), (2, tokens / seconds)]
    assert logged.series("train/unique_tokens_per_second") == logged.series("train/tokens_per_second")
    assert logged.series("train/response_tokens_per_second") == [
        (1, response_tokens / seconds),
        (2, response_tokens / seconds),
    ]


def test_padding_does_not_count_and_is_logged(run, rows, clock):
    logged = run(Throughput(), Takes(clock), batch_size=2)
    (one, _), (other, _) = rows[1]
    assert logged.series("train/tokens_per_second") == [(1, (one + other) / 2)]
    assert logged.series("train/padding_waste") == [(1, 1 - (one + other) / (2 * max(one, other)))]
    assert logged.series("train/sharing_gain") == [(1, 1.0)]


def test_an_empty_micro_batch_counts_nothing(run, rows, clock):
    logged = run(Throughput(), Takes(clock), batch_size=2, accumulate_grad_batches=4)
    seconds = 8  # four micro-batches, two of them empty
    assert logged.series("train/tokens_per_second") == [(1, sum(tokens for tokens, _ in rows[1]) / seconds)]
    assert logged.series("train/response_tokens_per_second") == [(1, sum(n for _, n in rows[1]) / seconds)]


def test_each_step_is_measured_separately(run, rows, clock):
    logged = run(Throughput(), Takes(clock), batch_size=1)
    rates = [rate for _, rate in logged.series("train/tokens_per_second")]
    assert sorted(rates) == sorted(tokens / 2 for tokens, _ in rows[1])


def test_replicas_multiply_only_rates(run, rows, clock, monkeypatch):
    alone = run(Throughput(), Takes(clock), batch_size=2)
    monkeypatch.setattr(throughput, "replicas", lambda trainer: (8, 0))
    logged = run(Throughput(), Takes(clock), batch_size=2)
    for name in ("tokens", "response_tokens", "unique_tokens"):
        ((_, one),), ((_, eight),) = (log.series(f"train/{name}_per_second") for log in (alone, logged))
        assert eight == 8 * one
    for name in ("model_flop_utilization", "padding_waste", "sharing_gain"):
        assert logged.series(f"train/{name}") == alone.series(f"train/{name}")


def test_utilization_is_flops_of_tokens_over_device_peak(run, rows, clock, model_folder):
    """One row a micro-batch. The costs of this model by hand: see test_flops.py."""
    logged = run(Throughput(), Takes(clock), batch_size=1, accumulate_grad_batches=2)
    vocabulary = json.loads(Path(model_folder, "config.json").read_text())["vocab_size"]
    needed = sum(
        tokens * 6 * 2 * 9216 + labels * 6 * vocabulary * 32 + tokens * (tokens + 1) // 2 * 12 * 2 * 32
        for tokens, labels in rows[1]
    )
    ((_, utilization),) = logged.series("train/model_flop_utilization")
    assert utilization == pytest.approx(needed / 4 / 1e6, rel=1e-12)


def test_a_model_without_a_formula_has_no_utilization(run, peaks, clock, monkeypatch):
    monkeypatch.setattr(throughput, "count_model_flops", lambda model: None)
    logged = run(Throughput(), Takes(clock), batch_size=2)
    assert not logged.series("train/model_flop_utilization")
    assert logged.series("train/tokens_per_second")
    assert not peaks


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [("32-true", torch.float32), ("bf16-mixed", torch.bfloat16), ("bf16-true", torch.bfloat16)],
)
def test_peak_flops_are_read_once_per_fit(run, peaks, caplog, precision, dtype):
    callback = Throughput()
    assert not peaks
    with caplog.at_level("INFO", logger="sft_lightning"):
        run(callback, batch_size=1, max_epochs=2, precision=precision)
    assert peaks == [(torch.device("cpu"), dtype)]
    assert [r.message for r in caplog.records if r.name.startswith("sft_lightning.training.callbacks")] == [
        "model FLOP utilization is relative to 1e-06 TFLOP/s (made up)"
    ]


def test_shared_tokens_count_for_each_row_and_are_computed_once(clock, peaks, monkeypatch):
    monkeypatch.setattr(throughput, "is_optimizer_step", lambda trainer: True)
    monkeypatch.setattr(throughput, "replicas", lambda trainer: (1, 0))
    logged = {}
    module = SimpleNamespace(device=torch.device("cpu"), model=None, log_dict=logged.update)
    batch = SimpleNamespace(num_tokens=30, num_unique_tokens=12, num_label_tokens=9, input_ids=torch.zeros(1, 16))
    monkeypatch.setattr(throughput, "count_model_flops", lambda model: ModelFlops(1000, 100, 10))
    monkeypatch.setattr(throughput, "num_attended", lambda batch: 50)
    callback, trainer = Throughput(), SimpleNamespace(precision="32-true", is_global_zero=True)
    callback.on_train_start(trainer, module)
    callback.on_train_batch_start()
    clock.now += 3
    callback.on_train_batch_end(trainer, module, None, batch, 0)
    del logged["train/peak_memory_bytes"]
    assert {name: value.item() for name, value in logged.items()} == {
        "train/tokens_per_second": 10.0,
        "train/response_tokens_per_second": 3.0,
        "train/unique_tokens_per_second": 4.0,
        "train/padding_waste": 0.25,
        "train/sharing_gain": 2.5,
        "train/model_flop_utilization": (12 * 1000 + 9 * 100 + 50 * 10) / 3 / 1e6,
    }


# Peak memory


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads what Linux says of the process")
def test_peak_memory_is_that_of_the_process(run, clock):
    logged = run(Throughput(), Takes(clock), batch_size=2)
    ((_, peak),) = logged.series("train/peak_memory_bytes")
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    kilobytes = int(line.split()[1])
    # The kernel adds up per-thread counters in one place and not in the other, and counts what the parent had, too.
    assert kilobytes * 1024 / 2 < peak < kilobytes * 1024 * 64
