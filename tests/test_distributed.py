"""Two processes compute the steps of one: same members, same losses, same weights, same validation, same ledger."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from sft_lightning import claims

PROGRAM = """
import json, sys
from lightning.pytorch import Callback, Trainer, seed_everything
from sft_lightning import GenerationEvaluation, HFCheckpoint, SFTDataModule, SFTModule
from sft_lightning.callbacks.row_ledger import RowLedger
from sft_lightning.evaluation.generation import TransformersGenerator

model, train, val, output, devices, batch_size, accumulate, ckpt = sys.argv[1:]
seed_everything(7, verbose=False)


class Recorder(Callback):
    def __init__(self):
        self.sources, self.losses, self.metrics = [], [], []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.sources += batch.sources

    def on_before_zero_grad(self, trainer, pl_module, optimizer):
        if "train/loss" in trainer.callback_metrics:
            self.losses.append(float(trainer.callback_metrics["train/loss"]))

    def on_validation_end(self, trainer, pl_module):
        if not trainer.sanity_checking:
            self.metrics.append({k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("val/")})


recorder = Recorder()
data = SFTDataModule(train_path=train, val_path=val, tokenizer_path=model, batch_size=int(batch_size), max_length=512)
module = SFTModule(model, learning_rate=1e-3)
trainer = Trainer(
    accelerator="cpu", devices=int(devices), strategy="ddp" if devices != "1" else "auto", precision="64-true",
    max_epochs=2, accumulate_grad_batches=int(accumulate), gradient_clip_val=1.0, log_every_n_steps=1,
    enable_progress_bar=False, enable_model_summary=False, logger=False,
    callbacks=[
        recorder,
        GenerationEvaluation(num_examples=5, num_samples=2, generator=TransformersGenerator(max_new_tokens=6)),
        RowLedger(),
        HFCheckpoint(output, every_n_train_steps=5),
    ],
)
trainer.fit(module, data, ckpt_path=ckpt or None)
result = {"losses": recorder.losses, "sources": recorder.sources, "metrics": recorder.metrics}
open(f"{output}/rank-{trainer.global_rank}.json", "w").write(json.dumps(result))
"""


@pytest.fixture
def run(tmp_path, model_folder, train_file, val_file):
    script = tmp_path / "program.py"
    script.write_text(PROGRAM)

    def launch(name, devices, batch_size, accumulate, ckpt=""):
        arguments = [model_folder, train_file, val_file, tmp_path / name, devices, batch_size, accumulate, ckpt]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run([sys.executable, script, *map(str, arguments)], check=True, env=environment, timeout=300)
        return [json.loads(Path(tmp_path / name / f"rank-{rank}.json").read_text()) for rank in range(devices)]

    return launch


def ledger(run):
    """Returns (epoch, source) -> nll_sum from the parts of all ranks, after making sure that no row is there twice."""
    rows = [row for path in sorted((run / "ledger").glob("*/*.parquet")) for row in pq.read_table(path).to_pylist()]
    found = {(row["epoch"], row["source"]): row["nll_sum"] for row in rows}
    assert len(found) == len(rows)
    return found


def evaluations(run):
    return sorted((run / "evaluation").glob("step-*"))


def samples(folder):
    return [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]


def without_entropy(row):
    return {name: value for name, value in row.items() if name != "mean_entropy"}


@pytest.mark.slow
def test_two_processes_equal_one_and_resume_as_one(run, tmp_path):
    (one,) = run("one", 1, 4, 2)
    two = run("two", 2, 2, 2)
    assert sorted(two[0]["sources"] + two[1]["sources"]) == sorted(one["sources"])
    for rank in two:
        # Logged in float32; the same sums in another order.
        assert rank["losses"] == pytest.approx(one["losses"], rel=1e-6)
        for ours, theirs in zip(rank["metrics"], one["metrics"], strict=True):
            assert ours == pytest.approx(theirs, rel=1e-6)
    (resumed,) = run("resumed", 1, 4, 2, ckpt=tmp_path / "two" / "checkpoint-5")
    assert resumed["losses"][-3:] == pytest.approx(one["losses"][-3:], rel=1e-6)
    # Each process answered its share, no prompt twice, and sampled what one process would have.
    answers = {name: [samples(folder) for folder in evaluations(tmp_path / name)] for name in ("one", "two")}
    assert len(answers["one"]) == 3
    assert [(row["index"], row["sample"]) for row in answers["two"][0]] == [(i, s) for i in range(5) for s in (0, 1)]
    assert len({row["response"] for row in answers["one"][0]}) > 5
    for ours, theirs in zip(answers["two"], answers["one"], strict=True):
        assert [without_entropy(row) for row in ours] == [without_entropy(row) for row in theirs]
        entropies = [[row["mean_entropy"] for row in rows] for rows in (ours, theirs)]
        assert entropies[0] == pytest.approx(entropies[1], rel=1e-5)
    ledgers = [ledger(tmp_path / name) for name in ("one", "two")]
    assert len(ledgers[0]) == 84
    assert ledgers[1] == pytest.approx(ledgers[0], rel=1e-6)
    names = {path.name for path in (tmp_path / "two" / "ledger" / "epoch-0").iterdir()}
    assert names == {f"step-{step}.rank-{rank}.parquet" for step in (5, 6) for rank in (0, 1)}
    claims.clear(tmp_path / "two")
    assert not (tmp_path / "two" / "ledger").exists()
