"""Test fits with a broken token or gradient: the step changes no weight, and its rows are saved."""

import copy
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.plugins import MixedPrecision
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from sft_lightning.checkpointing import folder as checkpoint_folder
from sft_lightning.checkpointing import run_folder
from sft_lightning.checkpointing.run_folder import RUN_FILES
from sft_lightning.data.batch import Example
from sft_lightning.data.batching.collate import collate
from sft_lightning.data.formats.base import Record
from sft_lightning.data.records import read_records
from sft_lightning.data.settings import DataSettings
from sft_lightning.errors import NonFiniteError, UserError
from sft_lightning.losses.base import LabelLosses
from sft_lightning.training.nonfinite import (
    NonFinitePolicy,
    StepRow,
    describe_non_finite,
    find_records,
    read_about,
    read_examples,
    rows_of_step,
    save_step,
)
from sft_lightning.training.step import MicroBatchLosses


def micro_batch(*lines):
    examples = [Example.from_prompt(np.array([1, 2, 3], dtype=np.int32), 1, f"rows.jsonl:{line}") for line in lines]
    return collate(examples, [1.0] * len(examples), layout="padded", pad_token_id=0)


def losses(*values):
    nll = torch.tensor(values)
    return LabelLosses(weighted_sum=nll.sum(), nll=nll, correct=nll > 0, entropy=None)


def test_a_row_is_finite_if_all_label_losses_are():
    first = MicroBatchLosses(losses(1.0, 2.0, float("nan"), 1.0), micro_batch(3, 8))
    second = MicroBatchLosses(losses(float("inf"), 2.0), micro_batch(5))
    assert rows_of_step([first, second]) == [
        StepRow("rows.jsonl:3", True),
        StepRow("rows.jsonl:8", False),
        StepRow("rows.jsonl:5", False),
    ]


def test_dummy_rows_of_empty_micro_batches_are_never_named():
    empty = collate([], [], layout="padded", pad_token_id=0)
    assert rows_of_step([MicroBatchLosses(losses(float("nan")), empty)]) == []


def test_only_rows_with_a_nonfinite_loss_are_named(tmp_path):
    rows = [StepRow("a:3", True), StepRow("a:8", False), StepRow("a:5", False)]
    message = describe_non_finite(12, float("nan"), 4.0, rows, done="stopped before the step", folder=tmp_path)
    assert message == (
        "loss nan and gradient norm 4.0 in optimizer step 12: stopped before the step, the weights and the last "
        f"checkpoint are untouched. Each row alone: sft-lightning replay '{tmp_path}'. Examples: a:8, a:5"
    )


def test_an_overflowing_gradient_names_eight_rows_and_counts_the_rest():
    rows = [StepRow(f"rows.jsonl:{line}", True) for line in range(1, 11)]
    message = describe_non_finite(1, 1.0, float("inf"), rows, done="skipped the step")
    named = ", ".join(f"rows.jsonl:{line}" for line in range(1, 9))
    assert message.endswith(f"untouched. Examples: {named} and 2 more")


RECORDS = [Record(f"say {n}:", f" {n}", str(n), 0.5, f"a:{n}") for n in range(1, 6)]


def test_nonfinite_rows_come_first_and_missing_ones_are_skipped():
    rows = [StepRow("a:4", True), StepRow("a:2", False), StepRow("a:9", True)]
    assert [record.source for record in find_records(lambda: RECORDS, rows)] == ["a:2", "a:4"]

    def gone():
        yield RECORDS[0]
        raise UserError("no such file")

    assert find_records(gone, [StepRow("a:1", True), StepRow("a:2", True)]) == [RECORDS[0]]


def test_reading_stops_when_all_rows_are_found():
    read = []

    def records():
        for record in RECORDS:
            read.append(record.source)
            yield record

    find_records(records, [StepRow("a:2", True)])
    assert read == ["a:1", "a:2"]


def test_saved_rows_are_training_data_and_registered_with_the_run(tmp_path, tokenizer):
    options = {"max_length": 64, "overlength": "drop", "append_eos": True}
    names = ("checkpoint", "model_path", "tokenizer_path", "precision")
    chosen = {"init": "random", "attn_implementation": "sdpa", "layout": "padded", "seed": 1, "rows_not_found": []}
    about = {"step": 7, "gradient_norm": 2.0, **options, **chosen, **dict.fromkeys(names, "as in the run")}
    save_step(tmp_path, RECORDS[:2], {**about, "loss": float("nan")})
    folder = tmp_path / "nonfinite" / "step-7"
    assert read_about(folder) == {**about, "loss": "nan"}
    again = list(read_records(DataSettings(folder / "rows.jsonl")))
    assert [(r.prompt, r.response, r.ground_truth, r.weight) for r in again] == [
        ("say 1:", " 1", "1", 0.5),
        ("say 2:", " 2", "2", 0.5),
    ]
    claimed = json.loads((tmp_path / RUN_FILES).read_text())
    assert claimed == ["nonfinite/step-7/rows.jsonl", "nonfinite/step-7/about.json"]
    first, second = read_examples(folder, tokenizer, options)
    assert (first.source, second.source) == ("a:1", "a:2")
    prompt, response = tokenizer("say 2:").input_ids, tokenizer(" 2").input_ids
    (sequence,) = second.sequences
    assert sequence.tokens.tolist() == [*prompt, *response, tokenizer.eos_token_id]
    assert sequence.label_spans == ((len(prompt), len(prompt) + len(response) + 1, 1.0),)


@pytest.mark.parametrize("content", [None, "{", "[]", '{"step": 7}'])
def test_a_folder_without_a_saved_step_is_a_user_error(tmp_path, content):
    if content is not None:
        (tmp_path / "about.json").write_text(content)
    with pytest.raises(UserError, match=r"about\.json"):
        read_about(tmp_path)


# Whole fits


NAN = float("nan")


class BreaksGradients(Callback):
    """Multiplies a gradient in the steps of the given numbers; keeps weights and optimizer after each step."""

    def __init__(self, factors):
        self.factors = factors
        self.after = {}

    def on_train_start(self, trainer, module):
        weight = module.model.model.norm.weight
        weight.register_hook(lambda gradient: gradient * self.factors.get(trainer.global_step + 1, 1.0))

    def on_train_batch_end(self, trainer, module, *args):
        state = copy.deepcopy(trainer.optimizers[0].state_dict()["state"])
        self.after[trainer.global_step] = (copy.deepcopy(module.model.state_dict()), state)


def equal(one, other):
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(value, other[key]) for key, value in one.items())
    return torch.equal(one, other)


SKIP = {"on_nonfinite": "skip", "max_nonfinite_steps": 2, "lr_schedule": "linear"}
OPTIONS = {"max_epochs": 1, "accumulate_grad_batches": 1}


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "64-true"])
@pytest.mark.parametrize("clip", [1.0, None])
def test_a_skipped_step_moves_only_the_schedule(fit, tmp_path, precision, clip, caplog):
    watch = BreaksGradients({4: NAN})
    run = fit(tmp_path / "run", model=SKIP, callbacks=(watch,), precision=precision, gradient_clip_val=clip, **OPTIONS)
    assert run.trainer.global_step == 11
    assert equal(watch.after[3][0], watch.after[4][0])
    assert equal(watch.after[3][1], watch.after[4][1])
    assert not equal(watch.after[4][0], watch.after[5][0])
    assert {int(state["step"]) for state in watch.after[11][1].values()} == {10}
    assert run.trainer.optimizers[0].param_groups[0]["lr"] == 0.0
    assert "in optimizer step 4: skipped the step (1 of 2 skipped)" in caplog.text
    about = json.loads((tmp_path / "run" / "nonfinite" / "step-4" / "about.json").read_text())
    assert about["gradient_norm"] == "nan"
    assert len(about["rows"]) == 4
    assert about["rows_not_finite"] == []


def test_the_step_after_a_skipped_first_one_is_adamws_first(fit):
    """Skipping is the same as a step of learning rate 0 whose moments are not touched: an independent AdamW agrees."""
    watch = BreaksGradients({1: NAN})
    run = fit(model=SKIP | {"lr_schedule": "constant"}, callbacks=(watch,), max_steps=2, accumulate_grad_batches=1)
    gradient = run.gradients[1]["model.layers.0.mlp.up_proj.weight"].double()
    norm = torch.stack([g.double().norm() for g in run.gradients[1].values()]).norm()
    gradient = gradient * min(1.0, 1.0 / (norm.item() + 1e-6))
    before = watch.after[1][0]["model.layers.0.mlp.up_proj.weight"].double()
    # The first step of AdamW: both moments are bias-corrected to the gradient itself.
    expected = before - 1e-2 * gradient / (gradient.abs() + 1e-8)
    after = watch.after[2][0]["model.layers.0.mlp.up_proj.weight"].double()
    assert torch.allclose(after, expected, atol=1e-7)


def test_one_more_than_allowed_stops_the_run(fit, tmp_path):
    watch = BreaksGradients({2: NAN, 4: float("inf"), 6: NAN})
    with pytest.raises(NonFiniteError) as raised:
        fit(tmp_path, model=SKIP, callbacks=(watch,), checkpoint={"every_n_train_steps": 1}, **OPTIONS)
    assert "in optimizer step 6: stopped before the step (2 of 2 skipped)" in str(raised.value)
    assert sorted(path.name for path in (tmp_path / "nonfinite").iterdir()) == ["step-2", "step-4", "step-6"]
    assert (tmp_path / "last").resolve().name == "checkpoint-5"
    checkpoint_folder.verify(tmp_path / "checkpoint-5")
    assert json.loads((tmp_path / "nonfinite/step-6/about.json").read_text())["checkpoint"] == "checkpoint-5"
    three, four = (load_file(tmp_path / f"checkpoint-{step}" / "model.safetensors") for step in (3, 4))
    assert equal(three, four)
    run_folder.begin_new_run(tmp_path, overwrite=True)
    run_folder.delete_replaced(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_count_of_skipped_steps_survives_a_resume(fit, tmp_path):
    saving = {"every_n_train_steps": 1}
    with pytest.raises(NonFiniteError):
        fit(
            tmp_path,
            model=SKIP | {"max_nonfinite_steps": 1},
            callbacks=(BreaksGradients({2: NAN, 5: NAN}),),
            checkpoint=saving,
            **OPTIONS,
        )
    resumed = {"ckpt_path": str(tmp_path / "checkpoint-4"), "checkpoint": saving, **OPTIONS}
    with pytest.raises(NonFiniteError, match=r"step 7: stopped before the step \(2 of 2 skipped\)"):
        fit(tmp_path, model=SKIP, callbacks=(BreaksGradients({6: NAN, 7: NAN}),), **resumed)
    # And a run that begins anew with the same module counts from 0: see SFTModule.setup.
    run = fit(model=SKIP, callbacks=(BreaksGradients({1: NAN, 2: NAN}),), **OPTIONS)
    assert run.module.nonfinite.num_skipped == 2
    run.module.setup("fit")
    assert run.module.nonfinite.num_skipped == 0


def test_stop_is_the_default_and_a_dry_run_saves_nothing(fit, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(NonFiniteError, match="stopped before the step, the weights"):
        fit(callbacks=(BreaksGradients({1: NAN}),), fast_dev_run=True)
    assert list(tmp_path.iterdir()) == []


def test_with_float16_the_scaler_skips_overflowing_gradients(fit, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    watch = BreaksGradients({2: float("inf")})
    run = fit(callbacks=(watch,), plugins=MixedPrecision("16-mixed", "cpu"), max_steps=4, accumulate_grad_batches=1)
    assert equal(watch.after[1][0], watch.after[2][0])
    assert equal(watch.after[1][1], watch.after[2][1])
    assert not equal(watch.after[2][0], watch.after[3][0])
    assert run.module.nonfinite.num_skipped == 0
    assert not (tmp_path / "nonfinite").exists()


def test_with_float16_a_nan_loss_is_skipped(fit, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    class BreaksAWeight(BreaksGradients):
        def on_train_batch_start(self, trainer, module, batch, index):
            weight = module.model.model.norm.weight.data
            weight.copy_(torch.full_like(weight, NAN) if index == 1 else torch.ones_like(weight))

    watch = BreaksAWeight({})
    run = fit(
        model=SKIP,
        callbacks=(watch,),
        plugins=MixedPrecision("16-mixed", "cpu"),
        max_steps=4,
        accumulate_grad_batches=1,
    )
    assert run.module.nonfinite.num_skipped == 1
    before, after = watch.after[1], watch.after[2]
    assert equal(before[1], after[1])
    assert all(equal(weight, after[0][name]) for name, weight in before[0].items() if name != "model.norm.weight")


def test_a_negative_number_of_skipped_steps_is_refused():
    with pytest.raises(UserError, match=r"model\.max_nonfinite_steps must be at least 0, got -1"):
        NonFinitePolicy("skip", -1)


def test_a_full_disk_does_not_hide_why_the_run_stops(fit, tmp_path, caplog):
    (tmp_path / "nonfinite").write_text("a file in the place of the folder")
    with pytest.raises(NonFiniteError, match="in optimizer step 1"):
        fit(tmp_path, callbacks=(BreaksGradients({1: NAN}),))
    assert "the rows could not be saved" in caplog.text


class BreaksAWeightAtTheEnd(Callback):
    """As an update that overflows does, in the last of the run's steps."""

    def on_train_batch_end(self, trainer, module, *args):
        if trainer.global_step == trainer.max_steps:
            module.model.model.norm.weight.data[3] = NAN


def test_an_update_that_overflows_leaves_no_checkpoint(fit, tmp_path, note_fault):
    with pytest.raises(NonFiniteError) as raised:
        fit(tmp_path, model={"learning_rate": 1e39}, max_steps=1)
    assert str(raised.value) == (
        "26 of 26 weights are NaN or infinite after optimizer step 1, the first is model.model.embed_tokens.weight: "
        "they are not saved, and earlier checkpoints are untouched. A learning rate that is far too high or an "
        "optimizer's eps of 0 does this"
    )
    assert not list(tmp_path.glob("checkpoint-*")) + list(tmp_path.glob("final"))
    note_fault(
        "an update makes weights infinite",
        provoked="a learning rate of 1e39, in the last step of a run",
        outcome="exit code 1 in one line; the weights become neither a checkpoint nor `final`",
        lost="the steps since the last checkpoint",
    )


@pytest.mark.parametrize(
    ("max_steps", "saved"), [(4, {"checkpoint-2", "last"}), (5, {"checkpoint-2", "checkpoint-4", "last"})]
)
def test_weights_that_break_in_the_last_step_are_not_saved(fit, tmp_path, max_steps, saved):
    """Step 4 is saved as a multiple of 2, step 5 because it is the last."""
    with pytest.raises(NonFiniteError, match=rf"^1 of 26 .* step {max_steps}, the first is model.model.norm.weight:"):
        fit(tmp_path, callbacks=(BreaksAWeightAtTheEnd(),), checkpoint={"every_n_train_steps": 2}, max_steps=max_steps)
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == saved
    checkpoint_folder.verify(tmp_path / "last")


def test_broken_weights_are_not_validated(fit, tmp_path, val_file):
    validated = []

    class Watch(BreaksAWeightAtTheEnd):
        def on_validation_batch_start(self, trainer, *args):
            validated.append(trainer.global_step)

    with pytest.raises(NonFiniteError, match="step 4, the first is"):
        fit(
            callbacks=(Watch(),),
            data={"val_path": val_file},
            max_steps=4,
            val_check_interval=4,
            check_val_every_n_epoch=None,
            num_sanity_val_steps=0,
        )
    assert set(validated) == {2}


def test_weights_that_were_not_finite_at_the_start_may_stay(fit, broken, train_file):
    run = fit(broken / "run", model={"model_path": str(broken / "broken")}, max_steps=2)
    assert run.weights["model.embed_tokens.weight"].isnan().sum() == 32
    assert (broken / "run" / "final").is_dir()


# Two processes


@pytest.fixture
def broken(tmp_path, tokenizer, model_folder):
    """An untied model whose embedding of "~" is NaN, and rows of which only line 30 has that token."""
    (tilde,) = tokenizer("~").input_ids
    config = AutoConfig.from_pretrained(model_folder)
    config.tie_word_embeddings = False
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    model.model.embed_tokens.weight.data[tilde] = NAN
    model.save_pretrained(tmp_path / "broken")
    tokenizer.save_pretrained(tmp_path / "broken")
    rows = [
        {"prompt": f"say {n}{'~' if n == 30 else ''}:", "response": f" {n} </think> <answer> {n} </answer>"}
        for n in range(1, 49)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def command_line_fit(folder, run, *options, devices=2, strategy=("--trainer.strategy", "ddp")):
    command = [sys.executable, "-m", "sft_lightning", "fit", "--model.model_path", "broken", "--output_dir", run]
    command += ["--data.train_path", "rows.jsonl", "--data.batch_size", "2", "--trainer.accumulate_grad_batches", "2"]
    command += ["--trainer.max_epochs", "1", "--trainer.accelerator", "cpu", "--trainer.devices", str(devices)]
    command += ["--trainer.log_every_n_steps", "1", "--checkpoint.every_n_train_steps", "1", *options]
    command += strategy if devices > 1 else ()
    options = {"cwd": folder, "capture_output": True, "text": True, "timeout": 300, "check": False}
    return subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, **options)


@pytest.mark.slow
def test_a_bad_row_stops_both_of_two_processes(broken, note_fault):
    done = command_line_fit(broken, "run")
    assert done.returncode == 1, done.stderr
    errors = [line for line in done.stderr.splitlines() if "error:" in line]
    assert len(errors) == 1, done.stderr
    (folder,) = (broken / "run" / "nonfinite").iterdir()
    about = json.loads((folder / "about.json").read_text())
    step = about["step"]
    assert f"loss nan and gradient norm nan in optimizer step {step}: stopped before the step" in errors[0]
    assert errors[0].endswith(f"sft-lightning replay '{folder}'. Examples: rows.jsonl:30")
    assert about["rows_not_finite"] == ["rows.jsonl:30"]
    assert len(set(about["rows"])) == 8, "of both processes"
    assert (folder / "rows.jsonl").read_text().count("\n") == 8
    assert (broken / "run" / "last").resolve().name == f"checkpoint-{step - 1}"
    checkpoint_folder.verify(broken / "run" / "last")
    note_fault(
        "loss is NaN on one rank",
        provoked="a token whose embedding is NaN, in one row on one of two DDP ranks, in mid-run",
        outcome="both ranks stop before the step; exit 1, one line; the rows of all ranks are kept for replay",
    )


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_all_ranks_refuse_to_save_weights_that_are_not_finite(broken, model_folder, strategy):
    """One rank holds the weight that breaks, or all do."""
    sharded = {"class_path": "lightning.pytorch.strategies.ModelParallelStrategy"}
    sharded["init_args"] = {"data_parallel_size": 2, "tensor_parallel_size": 1}
    overlay = {"trainer": {"strategy": strategy if strategy == "ddp" else sharded}}
    (broken / "overlay.yaml").write_text(json.dumps(overlay))
    words = ["--config", "overlay.yaml", "--model.model_path", model_folder, "--model.learning_rate", "1e39"]
    done = command_line_fit(broken, "run", *words, strategy=())
    assert done.returncode == 1, done.stderr
    (error,) = [line for line in done.stderr.splitlines() if "error:" in line]
    assert "26 of 26 weights are NaN or infinite after optimizer step 1" in error
    assert not list((broken / "run").glob("checkpoint-*")) + list((broken / "run").glob("final"))


@pytest.mark.slow
def test_both_processes_skip_and_end_with_equal_weights(broken, note_fault):
    done = command_line_fit(broken, "run", "--model.on_nonfinite", "skip")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("skipped the step (1 of 3 skipped)") == 1
    (folder,) = (broken / "run" / "nonfinite").iterdir()
    step = json.loads((folder / "about.json").read_text())["step"]
    before, after = (
        load_file(broken / "run" / f"checkpoint-{number}" / "model.safetensors") for number in (step - 1, step)
    )
    assert all(torch.equal(weight.nan_to_num(7.0), after[name].nan_to_num(7.0)) for name, weight in before.items())
    single = command_line_fit(broken, "single", "--model.on_nonfinite", "skip", "--data.batch_size", "4", devices=1)
    assert single.returncode == 0, single.stderr
    ones, others = (load_file(broken / run / "final" / "model.safetensors") for run in ("run", "single"))
    for name, weight in ones.items():
        assert torch.allclose(weight.nan_to_num(7.0), others[name].nan_to_num(7.0), atol=1e-5), name
    note_fault(
        "loss is NaN on one rank, on_nonfinite: skip",
        provoked="a token whose embedding is NaN, in one row on one of two DDP ranks, with model.on_nonfinite skip",
        outcome="both ranks skip the step and continue; weights, moments and counters do not change",
        lost="the step",
    )
