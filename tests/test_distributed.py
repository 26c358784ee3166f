"""Test that two processes compute the steps of one: equal rows, losses, weights, validation and row losses."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from sft_lightning.checkpointing import folder as checkpoint_folder
from sft_lightning.checkpointing import run_folder

PROGRAM = """
import json, os, signal, sys
from datetime import timedelta
import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from sft_lightning import GenerationEvaluation, HFCheckpoint, SFTDataModule, SFTModule
from sft_lightning.training.callbacks.row_losses import RowLossRecorder
from sft_lightning.generation.transformers_generator import TransformersGenerator

job = json.loads(sys.argv[1])
seed_everything(7, verbose=False)


def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


class Recorder(Callback):
    def __init__(self):
        self.sources, self.losses, self.metrics, self.gradients = [], [], [], []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.sources += batch.sources

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        named = pl_module.model.named_parameters()
        self.gradients.append({name: whole(p.grad).clone() for name, p in named if p.grad is not None})

    def on_before_zero_grad(self, trainer, pl_module, optimizer):
        if "train/loss" in trainer.callback_metrics:
            self.losses.append(float(trainer.callback_metrics["train/loss"]))

    def on_validation_end(self, trainer, pl_module):
        if not trainer.sanity_checking:
            self.metrics.append({k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("val/")})


class Fails(Callback):
    def fail(self, trainer, when):
        fault = job["fault"]
        if fault["when"] != when or trainer.global_rank != fault["rank"] or trainer.global_step < 2:
            return
        if fault["how"] == "raise":
            raise RuntimeError("planted")
        os.kill(os.getpid(), getattr(signal, fault["how"]))

    def on_train_batch_start(self, trainer, *args):
        self.fail(trainer, "training")

    def on_validation_batch_start(self, trainer, *args):
        self.fail(trainer, "validation")


class Generator(TransformersGenerator):
    def generate(self, model, *args, **kwargs):
        trainer = job["trainer"]
        if job["fault"]:
            Fails().fail(trainer, "generation")
        return super().generate(model, *args, **kwargs)


timeout = timedelta(seconds=job["timeout_seconds"])
strategies = {
    "ddp": lambda: DDPStrategy(timeout=timeout),
    "fsdp2": lambda: ModelParallelStrategy(job["devices"], 1, timeout=timeout),
    "auto": lambda: "auto",
}
recorder = Recorder()
data = SFTDataModule(
    train_path=job["train"], val_path=job["val"], tokenizer_path=job["model"], batch_size=job["batch_size"],
    max_length=512, layout=job["layout"],
)
module = SFTModule(job["model"], learning_rate=1e-3, init=job["init"])
trainer = Trainer(
    accelerator="cpu", devices=job["devices"], strategy=strategies[job["strategy"]](), precision=job["precision"],
    max_epochs=job["max_epochs"], max_steps=job["max_steps"], accumulate_grad_batches=job["accumulate"],
    gradient_clip_val=job["clip"], log_every_n_steps=1, enable_progress_bar=False, enable_model_summary=False,
    logger=False,
    callbacks=[
        recorder,
        *([Fails()] if job["fault"] else []),
        *([EMAWeightAveraging(decay=0.5)] if job["averages"] else []),
        GenerationEvaluation(
            num_examples=job["num_examples"], num_samples=2, generator=Generator(max_new_tokens=6)
        ),
        RowLossRecorder(),
        HFCheckpoint(job["output"], every_n_train_steps=5),
    ],
)
job["trainer"] = trainer
trainer.fit(module, data, ckpt_path=job["ckpt"])
result = {"losses": recorder.losses, "sources": recorder.sources, "metrics": recorder.metrics}
open(f"{job['output']}/rank-{trainer.global_rank}.json", "w").write(json.dumps(result))
if trainer.global_rank == 0:
    torch.save(recorder.gradients, f"{job['output']}/gradients.pt")
"""


@pytest.fixture
def start(tmp_path, model_folder, train_file, val_file):
    """Returns a function that runs the program with the options of a job, and returns its exit code and output."""
    script = tmp_path / "program.py"
    script.write_text(PROGRAM)

    def launch(name, devices, batch_size, accumulate, strategy=None, **options):
        files = {"model": model_folder, "train": train_file, "val": val_file, "output": str(tmp_path / name)}
        shape = {"devices": devices, "batch_size": batch_size, "accumulate": accumulate}
        job = {
            **{"strategy": strategy or ("ddp" if devices > 1 else "auto"), "precision": "64-true", "layout": "auto"},
            **{"max_epochs": 2, "max_steps": -1, "clip": 1.0, "init": "pretrained", "ckpt": None, "fault": None},
            **{"timeout_seconds": 120, "num_examples": 5, "averages": False, **files, **shape, **options},
        }
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.run(
            [sys.executable, script, json.dumps(job)], env=environment, timeout=300, capture_output=True, text=True
        )

    return launch


@pytest.fixture
def run(start, tmp_path):
    """Returns a function that runs a job to its end and returns the record of each rank."""

    def launch(name, devices, *shape, **options):
        ended = start(name, devices, *shape, **options)
        assert ended.returncode == 0, ended.stderr
        return [json.loads(Path(tmp_path / name / f"rank-{rank}.json").read_text()) for rank in range(devices)]

    return launch


def gradients(run):
    return torch.load(run / "gradients.pt", weights_only=True)


def assert_same_gradients(ours, theirs, tolerance):
    """Relative to each tensor's norm; tensors below 1e-6 of the total count in the total only."""
    assert len(ours) == len(theirs)
    for step, (found, expected) in enumerate(zip(ours, theirs, strict=True)):
        assert found.keys() == expected.keys()
        total = torch.stack([g.double().norm() for g in expected.values()]).norm()
        differences = {name: (found[name].double() - g.double()).norm() for name, g in expected.items()}
        for name, gradient in expected.items():
            if gradient.double().norm() > 1e-6 * total:
                assert differences[name] <= tolerance * gradient.double().norm(), (step, name)
        assert torch.stack(list(differences.values())).norm() <= tolerance * total, step


def assert_same_weights(ours, theirs, tolerance):
    for name, tensor in theirs.items():
        assert (ours[name] - tensor).norm() <= tolerance * tensor.norm(), name


def weights(folder):
    return load_file(folder / "model.safetensors")


def recorded_losses(run):
    """Returns (epoch, source) -> nll_sum from the parts of all ranks, after making sure that no row is there twice."""
    rows = [row for path in sorted((run / "row_losses").glob("*/*.parquet")) for row in pq.read_table(path).to_pylist()]
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
    (resumed,) = run("resumed", 1, 4, 2, ckpt=str(tmp_path / "two" / "checkpoint-5"))
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
    losses_of_both = [recorded_losses(tmp_path / name) for name in ("one", "two")]
    assert len(losses_of_both[0]) == 84
    assert losses_of_both[1] == pytest.approx(losses_of_both[0], rel=1e-6)
    names = {path.name for path in (tmp_path / "two" / "row_losses" / "epoch-0").iterdir()}
    assert names == {f"step-{step}.rank-{rank}.parquet" for step in (5, 6) for rank in (0, 1)}
    run_folder.begin_new_run(tmp_path / "two", overwrite=True)
    run_folder.delete_replaced(tmp_path / "two")
    assert not (tmp_path / "two" / "row_losses").exists()


@pytest.fixture
def reference(run, tmp_path):
    """The record of a run in one process and float64, and its gradients."""
    (seen,) = run("reference", 1, 8, 1)
    return seen, gradients(tmp_path / "reference")


@pytest.mark.slow
@pytest.mark.parametrize(("devices", "batch_size"), [(2, 2), (4, 1)])
def test_gradients_and_validation_are_those_of_one_process(run, tmp_path, reference, devices, batch_size):
    """The last step of an epoch has two rows: with four processes, six of its eight micro-batches are empty."""
    seen, expected = reference
    ranks = run("many", devices, batch_size, 2, precision="32-true")
    assert_same_gradients(gradients(tmp_path / "many")[:1], expected[:1], 1e-5)
    # Later steps start from weights that differ by float32's rounding.
    assert_same_gradients(gradients(tmp_path / "many"), expected, 1e-3)
    sources = [source for rank in ranks for source in rank["sources"]]
    assert sorted(sources) == sorted(seen["sources"])
    for rank in ranks:
        assert rank["losses"] == pytest.approx(seen["losses"], rel=1e-5)
        assert [m["val/loss"] for m in rank["metrics"]] == pytest.approx(
            [m["val/loss"] for m in seen["metrics"]], rel=1e-5
        )


@pytest.mark.slow
def test_a_run_of_two_processes_resumes_in_one_and_four(run, tmp_path, reference, note_fault):
    seen, expected = reference
    run("two", 2, 2, 2, max_steps=5)
    for devices, batch_size in ((1, 4), (4, 1)):
        ranks = run(f"on-{devices}", devices, batch_size, 2, ckpt=str(tmp_path / "two" / "checkpoint-5"))
        for rank in ranks:
            assert rank["losses"] == pytest.approx(seen["losses"][5:], rel=1e-6)
        assert_same_gradients(gradients(tmp_path / f"on-{devices}"), expected[5:], 1e-6)
        assert_same_weights(
            weights(tmp_path / f"on-{devices}" / "final"), weights(tmp_path / "reference" / "final"), 1e-7
        )
    note_fault(
        "resume on another number of processes",
        provoked="saved by 2 processes, resumed by 1 and by 4",
        outcome="the same steps, losses and gradients",
        tries=2,
    )


@pytest.mark.slow
def test_two_processes_average_weights_as_one_and_resume(run, tmp_path):
    (one,) = run("one", 1, 4, 2, averages=True)
    two = run("two", 2, 2, 2, averages=True)
    for rank in two:
        for ours, theirs in zip(rank["metrics"], one["metrics"], strict=True):
            assert ours == pytest.approx(theirs, rel=1e-6)
    run("resumed", 2, 2, 2, averages=True, ckpt=str(tmp_path / "two" / "checkpoint-5"))
    finals = {name: weights(tmp_path / name / "final") for name in ("one", "two", "resumed")}
    assert_same_weights(finals["two"], finals["one"], 1e-7)
    assert all(torch.equal(finals["resumed"][name], weight) for name, weight in finals["two"].items())


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["padded", "packed", "shared_prefix"])
def test_sharded_training_is_that_of_one_process_in_every_layout(run, tmp_path, reference, layout):
    """Gradients, clipping (1.0 is below every norm here), validation, answers and the whole checkpoint."""
    seen, expected = reference
    options = {"precision": "32-true", "layout": layout}
    ranks = run("sharded", 2, 2, 2, strategy="fsdp2", **options)
    assert_same_gradients(gradients(tmp_path / "sharded")[:1], expected[:1], 1e-5)
    assert_same_gradients(gradients(tmp_path / "sharded"), expected, 1e-3)  # from weights of float32
    for rank in ranks:
        assert rank["losses"] == pytest.approx(seen["losses"], rel=1e-5)
        for ours, theirs in zip(rank["metrics"], seen["metrics"], strict=True):
            assert ours == pytest.approx(theirs, rel=1e-4)
    run("ddp", 2, 2, 2, **options)
    ours, theirs = (weights(tmp_path / name / "final") for name in ("sharded", "ddp"))
    assert ours.keys() == theirs.keys()  # a tied weight occurs once
    assert_same_weights(ours, theirs, 1e-5)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "sharded" / "final")
    assert type(model).__name__ == "Qwen2ForCausalLM"
    assert model.lm_head.weight is model.model.embed_tokens.weight
    states = [
        torch.load(tmp_path / name / "checkpoint-10" / "trainer_state.ckpt", weights_only=True)["optimizer_states"][0]
        for name in ("sharded", "ddp")
    ]
    assert states[0]["param_groups"] == states[1]["param_groups"]
    assert states[0]["state"].keys() == states[1]["state"].keys()
    for number, state in states[1]["state"].items():
        assert_same_weights(states[0]["state"][number], state, 1e-4)
    answers = [
        [without_entropy(row) for row in samples(tmp_path / name / "evaluation" / "step-12")]
        for name in ("sharded", "reference")
    ]
    assert answers[0] == answers[1]


@pytest.mark.slow
def test_sharded_training_resumes_bit_equal_and_across_strategies(run, tmp_path, reference, note_fault):
    seen, expected = reference
    options = {"strategy": "fsdp2", "precision": "32-true"}
    run("straight", 2, 2, 2, **options)
    (tmp_path / "straight" / "checkpoint-5").rename(tmp_path / "checkpoint-5")
    checkpoint = str(tmp_path / "checkpoint-5")
    run("again", 2, 2, 2, **options, ckpt=checkpoint)
    ours, theirs = weights(tmp_path / "again" / "final"), weights(tmp_path / "straight" / "final")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    run("ddp", 2, 2, 2, precision="32-true", max_steps=5)
    ways = {
        "one": (1, 4, 2, {"ckpt": checkpoint}),
        "four": (4, 1, 2, {"ckpt": checkpoint, "strategy": "fsdp2"}),
        "from-ddp": (2, 2, 2, {"ckpt": str(tmp_path / "ddp" / "checkpoint-5"), "strategy": "fsdp2"}),
    }
    for name, (*shape, chosen) in ways.items():
        for rank in run(name, *shape, precision="32-true", **chosen):
            assert rank["losses"] == pytest.approx(seen["losses"][5:], rel=1e-4)
        assert_same_gradients(gradients(tmp_path / name), expected[5:], 1e-3)
    note_fault(
        "resume under another strategy",
        provoked="FSDP2 to one process and to four, DDP to FSDP2, FSDP2 to itself",
        outcome="the same steps, losses and gradients; FSDP2 to itself is bit-equal",
        tries=4,
    )


@pytest.mark.slow
def test_a_sharded_run_resumes_in_its_own_folder(command, tmp_path):
    sharded = tmp_path / "sharded.yaml"
    strategy = {
        "class_path": "lightning.pytorch.strategies.ModelParallelStrategy",
        "init_args": {"data_parallel_size": 2, "tensor_parallel_size": 1},
    }
    trainer = {"strategy": strategy, "devices": 2}
    data = {"batch_size": 2}
    sharded.write_text(yaml.safe_dump({"trainer": trainer, "data": data, "evaluation": {"num_examples": 0}}))
    program = [sys.executable, "-m", "sft_lightning", *command, "--config", str(sharded), "--trainer.max_epochs", "2"]

    def fit(name, *options):
        ended = subprocess.run(
            [*program, "--output_dir", str(tmp_path / name), *options],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            timeout=300,
            capture_output=True,
            text=True,
        )
        assert ended.returncode == 0, ended.stderr
        return weights(tmp_path / name / "final")

    straight = fit("straight")
    for options in (("--ckpt_path", "auto"), ("--ckpt_path", "last", "--overwrite")):
        fit("run", "--trainer.max_steps", "4", "--overwrite")
        resumed = fit("run", *options)
        assert all(torch.equal(resumed[name], straight[name]) for name in straight)
        steps = [path.name for path in checkpoint_folder.checkpoints(tmp_path / "run")]
        assert steps == [f"checkpoint-{step}" for step in (2, 4, 6, 8, 10, 12)]


@pytest.mark.slow
def test_random_weights_are_the_same_ones_sharded_or_not(run, tmp_path):
    options = {"precision": "32-true", "init": "random", "max_steps": 4, "num_examples": 0}
    (one,) = run("one", 1, 4, 2, **options)
    for rank in run("sharded", 2, 2, 2, strategy="fsdp2", **options):
        assert rank["losses"] == pytest.approx(one["losses"], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("strategy", "rank", "how", "when"),
    [
        ("ddp", 0, "SIGKILL", "training"),
        ("ddp", 1, "SIGKILL", "training"),
        ("ddp", 0, "raise", "training"),
        ("ddp", 1, "raise", "validation"),
        ("ddp", 1, "raise", "generation"),
        ("ddp", 1, "SIGSTOP", "training"),
        ("ddp", 0, "raise", "generation"),
        ("fsdp2", 0, "SIGKILL", "training"),
        ("fsdp2", 1, "SIGKILL", "training"),
        ("fsdp2", 1, "raise", "validation"),
        ("fsdp2", 1, "raise", "training"),
        ("fsdp2", 0, "raise", "generation"),
    ],
)
def test_a_rank_that_fails_takes_the_others_down(start, tmp_path, strategy, rank, how, when, note_fault):
    fault = {"rank": rank, "how": how, "when": when}
    started = time.monotonic()
    ended = start(
        "run", 2, 2, 2, strategy=strategy, fault=fault, max_epochs=100, timeout_seconds=15, precision="32-true"
    )
    seconds = time.monotonic() - started
    assert ended.returncode != 0
    assert seconds < 90, f"took {seconds:.0f} s"
    listed = subprocess.run(["pgrep", "-f", str(tmp_path / "program.py")], capture_output=True, text=True).stdout
    deadline = time.monotonic() + 20
    while listed and time.monotonic() < deadline:
        time.sleep(0.5)
        listed = subprocess.run(["pgrep", "-f", str(tmp_path / "program.py")], capture_output=True, text=True).stdout
    assert not listed, "a process is left"
    if how == "raise":
        assert "planted" in ended.stderr
    for checkpoint in checkpoint_folder.checkpoints(tmp_path / "run"):
        checkpoint_folder.verify(checkpoint)
    note_fault(
        {
            "SIGKILL": "one rank is killed",
            "raise": "an exception on one rank",
            "SIGSTOP": "one rank hangs",
        }[how],
        provoked={
            "SIGKILL": "rank 0 and rank 1, under DDP and under FSDP2, in mid-step",
            "raise": "in training, in validation and while answers are generated, also under FSDP2",
            "SIGSTOP": "rank 1 of 2 is suspended, with a time-out of 15 s for the process group",
        }[how],
        outcome="all ranks end, no process is left, the exit code is not 0; checkpoints stay",
        lost="the steps since the last checkpoint",
        tries={"SIGKILL": 4, "raise": 7, "SIGSTOP": 1}[how],
    )
