"""Test bit-equal resume from any step, checkpoints as models, `best`, `last` and retention."""

import json
import re
import shutil

import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from transformers import AutoModelForCausalLM

from sft_lightning import HFCheckpoint
from sft_lightning.checkpointing import callback
from sft_lightning.checkpointing import folder as folders
from sft_lightning.errors import RunFailedError, UserError
from sft_lightning.training.loggers.metrics_csv import MetricsCSVLogger

STEPS = 12  # 42 rows in steps of 8: six an epoch, the last one of two rows; two epochs


@pytest.fixture(scope="module")
def straight_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("straight")


@pytest.fixture
def straight(straight_dir, fit, dropout_model_folder):
    """An uninterrupted run with dropout that saved after every step."""
    shutil.rmtree(straight_dir)
    return fit(straight_dir, model={"model_path": dropout_model_folder}, checkpoint={"every_n_train_steps": 1})


def assert_bit_equal(run, reference):
    assert all(torch.equal(run.weights[name], reference.weights[name]) for name in reference.weights)


@pytest.mark.parametrize("step", [3, 6])
def test_resume_with_loader_workers_is_bit_equal(straight, straight_dir, fit, tmp_path, dropout_model_folder, step):
    resumed = fit(
        tmp_path,
        model={"model_path": dropout_model_folder},
        data={"num_workers": 2},
        ckpt_path=str(straight_dir / f"checkpoint-{step}"),
    )
    assert resumed.losses == straight.losses[step:]
    assert_bit_equal(resumed, straight)


def test_a_resumed_run_resumes_again(straight, straight_dir, fit, tmp_path, dropout_model_folder):
    model = {"model_path": dropout_model_folder}
    every = {"every_n_train_steps": 1}
    fit(tmp_path / "a", model=model, ckpt_path=str(straight_dir / "checkpoint-5"), checkpoint=every, max_steps=8)
    fit(tmp_path / "b", model=model, ckpt_path=str(tmp_path / "a" / "checkpoint-6"), checkpoint=every, max_steps=9)
    resumed = fit(tmp_path / "c", model=model, ckpt_path=str(tmp_path / "b" / "checkpoint-9"))
    assert resumed.losses == straight.losses[9:]
    assert_bit_equal(resumed, straight)


@pytest.mark.parametrize("split", [(1, 8), (8, 1), (2, 4)])
def test_resume_with_another_split_follows_the_same_steps(fit, tmp_path, split):
    batch_size, accumulate = split
    # Padded, because the model's RMSNorm is float32 and takes a packed row's last bits of float64 into that.
    data = {"layout": "padded"}
    straight = fit(tmp_path / "a", checkpoint={"every_n_train_steps": 4}, data=data, precision="64-true")
    for step in (4, 8):
        resumed = fit(
            tmp_path / f"b{step}",
            ckpt_path=str(tmp_path / "a" / f"checkpoint-{step}"),
            data={**data, "batch_size": batch_size},
            accumulate_grad_batches=accumulate,
            precision="64-true",
        )
        assert resumed.trainer.global_step == STEPS
        # 1e-9 relative: the same examples in another order of summation, in float64.
        assert resumed.losses == pytest.approx(straight.losses[step:], rel=1e-9)


def test_more_epochs_may_be_asked_for(fit, tmp_path):
    longer = fit(tmp_path / "a", max_epochs=3)
    fit(tmp_path / "b", max_epochs=2)
    resumed = fit(tmp_path / "b", ckpt_path=HFCheckpoint.find(tmp_path / "b", "last"), max_epochs=3)
    assert resumed.losses == longer.losses[STEPS:]
    assert_bit_equal(resumed, longer)


def test_resuming_a_finished_run_trains_nothing(fit, tmp_path):
    done = fit(tmp_path)
    again = fit(tmp_path, ckpt_path=str(tmp_path / "last"))
    assert again.losses == []
    assert again.trainer.global_step == STEPS
    assert_bit_equal(again, done)


def test_weights_are_stored_once_and_the_state_loads_without_code(fit, tmp_path):
    fit(tmp_path, max_steps=2)
    state = torch.load(tmp_path / "checkpoint-2" / "trainer_state.ckpt", weights_only=True)
    assert "state_dict" not in state
    assert state["global_step"] == 2
    manifest = json.loads((tmp_path / "checkpoint-2" / "manifest.json").read_text())
    assert manifest["step"] == 2
    assert "model.safetensors" in manifest["files"]
    assert manifest["digest"]["data.seed"] == 7


def test_best_holds_exactly_the_validated_weights(fit, tmp_path, val_file):
    run = fit(
        tmp_path,
        data={"val_path": val_file},
        checkpoint={"every_n_train_steps": 5, "monitor": "val/loss"},
        val_check_interval=4,
        check_val_every_n_epoch=None,
        model={"learning_rate": 0.5},  # so high that the loss rises again
    )
    scores = {}
    for folder in tmp_path.glob("checkpoint-*"):
        manifest = json.loads((folder / "manifest.json").read_text())
        if "metrics" in manifest:
            scores[folder.name] = manifest["metrics"]["val/loss"]
    best = (tmp_path / "best").resolve().name
    callback = run.trainer.checkpoint_callback
    assert best == min(scores, key=scores.get)
    assert callback.best_model_path == str(tmp_path / best)
    assert int(best.split("-")[1]) % 2 == 0, "validations fall on every second optimizer step"
    assert {"checkpoint-5", "checkpoint-10", "checkpoint-12"} <= {p.name for p in tmp_path.glob("checkpoint-*")}
    (again,) = run.trainer.validate(run.module, datamodule=run.trainer.datamodule, ckpt_path=str(tmp_path / "best"))
    assert again["val/loss"] == scores[best]


@pytest.mark.parametrize(("every_n_steps", "max_steps"), [(3, -1), (None, -1), (None, STEPS)])
def test_a_resumed_run_writes_the_same_metrics(fit, tmp_path, val_file, every_n_steps, max_steps):
    """Every validation too, also the one that was due right after the checkpoint and that the first run never saw."""
    interval = {"val_check_interval": 2 * every_n_steps, "check_val_every_n_epoch": None} if every_n_steps else {}
    options = {
        "data": {"val_path": val_file},
        "checkpoint": {"every_n_train_steps": 1, "monitor": "val/loss"},
        "log_every_n_steps": 2,
        "max_steps": max_steps,  # Lightning restarts otherwise where steps, not epochs, end a run
        **interval,
    }
    straight = fit(tmp_path / "a", logger=MetricsCSVLogger(tmp_path / "a"), **options)
    expected = (tmp_path / "a" / "metrics.csv").read_text()
    validated = [row.split(",")[0] for row in expected.splitlines()[1:] if not row.endswith(",,,")]
    assert validated == (["3", "6", "9", "12"] if every_n_steps else ["6", "12"])
    for step in (3, 5, 6, 7, 9, 11):
        run = tmp_path / f"b{step}"
        shutil.copytree(tmp_path / "a" / f"checkpoint-{step}", run / f"checkpoint-{step}")
        shutil.copy(tmp_path / "a" / "metrics.csv", run)
        resumed = fit(run, ckpt_path=str(run / f"checkpoint-{step}"), logger=MetricsCSVLogger(run), **options)
        assert (run / "metrics.csv").read_text() == expected, f"from step {step}"
        assert_bit_equal(resumed, straight)


def test_metrics_of_a_run_without_checkpoint_are_dropped(fit, tmp_path):
    MetricsCSVLogger(tmp_path).log_metrics({"val/answer_accuracy": 0.5}, 0)
    fit(tmp_path, logger=MetricsCSVLogger(tmp_path), max_steps=2, log_every_n_steps=1)
    rows = (tmp_path / "metrics.csv").read_text().splitlines()
    assert [row.split(",")[0] for row in rows] == ["step", "1", "2"]


def test_early_stopping_works_on_a_validation_metric(fit, tmp_path, val_file):
    run = fit(
        tmp_path,
        data={"val_path": val_file},
        model={"learning_rate": 0.0},
        callbacks=(EarlyStopping("val/loss", patience=1, mode="min"),),
        max_epochs=5,
    )
    assert run.trainer.current_epoch == 2  # the second epoch brought nothing
    assert (tmp_path / "final" / "config.json").is_file()


def test_retention_keeps_the_newest_and_the_targets_of_links(fit, tmp_path):
    fit(tmp_path, checkpoint={"every_n_train_steps": 2, "keep_last": 2})
    assert sorted(p.name for p in tmp_path.glob("checkpoint-*")) == ["checkpoint-10", "checkpoint-12"]
    assert (tmp_path / "last").resolve().name == "checkpoint-12"


def test_another_run_in_the_folder_is_refused(fit, tmp_path):
    fit(tmp_path, max_steps=1)
    before = (tmp_path / "checkpoint-1" / "manifest.json").read_bytes()
    with pytest.raises(UserError, match=r"holds another run: pass --ckpt_path auto .* --overwrite"):
        fit(tmp_path, max_steps=1)
    assert (tmp_path / "checkpoint-1" / "manifest.json").read_bytes() == before
    mine = tmp_path / "notes.txt"
    mine.write_text("keep me")
    fit(tmp_path, max_steps=2, checkpoint={"overwrite": True})
    assert mine.read_text() == "keep me"
    assert [p.name for p in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]


def test_resume_refuses_other_data_and_another_learning_rate(fit, tmp_path):
    fit(tmp_path, max_steps=2)
    ckpt = str(tmp_path / "checkpoint-2")
    with pytest.raises(UserError, match=r"cannot resume: data\.seed is 8, the checkpoint was trained with 7"):
        fit(tmp_path, ckpt_path=ckpt, data={"seed": 8})
    with pytest.raises(UserError, match=r"cannot resume: data\.max_length is 500, the checkpoint was trained with 512"):
        fit(tmp_path, ckpt_path=ckpt, data={"max_length": 500})
    with pytest.raises(UserError, match=r"resume: model\.learning_rate is 0\.5, the checkpoint was trained with 0\.01"):
        fit(tmp_path, ckpt_path=ckpt, model={"learning_rate": 0.5})


def test_resume_override_takes_the_new_learning_rate_at_once(fit, tmp_path):
    fit(tmp_path, max_steps=2)
    run = fit(
        tmp_path,
        ckpt_path=str(tmp_path / "checkpoint-2"),
        max_steps=3,
        model={"learning_rate": 0.5, "weight_decay": 0.1, "resume_override": True},
    )
    groups = run.trainer.optimizers[0].param_groups
    assert [group["lr"] for group in groups] == [0.5, 0.5]
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]


def test_a_model_folder_without_trainer_state_does_not_resume(fit, tmp_path):
    fit(tmp_path / "a", max_steps=1)
    with pytest.raises(UserError, match=r"holds a model and no trainer_state\.ckpt.*--model\.model_path"):
        fit(tmp_path / "b", ckpt_path=str(tmp_path / "a" / "final"))


def test_a_damaged_checkpoint_is_named_and_skipped(fit, tmp_path):
    fit(tmp_path, max_steps=4, checkpoint={"every_n_train_steps": 2})
    weights = tmp_path / "checkpoint-4" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(UserError, match=r"checkpoint-4' is damaged: model\.safetensors has \d+ of \d+ bytes"):
        fit(tmp_path, ckpt_path=str(tmp_path / "checkpoint-4"))
    assert HFCheckpoint.find(tmp_path, "auto") == str(tmp_path / "checkpoint-2")


def test_resuming_into_another_runs_folder_is_refused(fit, tmp_path):
    fit(tmp_path / "a", max_steps=2)
    fit(tmp_path / "b", max_steps=3)
    before = (tmp_path / "b" / "final" / "manifest.json").read_bytes()
    with pytest.raises(UserError, match="holds another run"):
        fit(tmp_path / "b", ckpt_path=str(tmp_path / "a" / "checkpoint-2"), max_steps=3)
    assert (tmp_path / "b" / "final" / "manifest.json").read_bytes() == before


def test_a_final_model_alone_is_a_run_too(fit, tmp_path):
    fit(tmp_path, max_steps=1)
    shutil.rmtree(tmp_path / "checkpoint-1")
    with pytest.raises(UserError, match="holds another run"):
        fit(tmp_path, max_steps=1)


def test_auto_follows_the_branch_that_was_resumed_last(fit, tmp_path):
    every = {"every_n_train_steps": 2}
    fit(tmp_path, max_steps=8, checkpoint=every)
    other = {"learning_rate": 0.5, "resume_override": True}
    fit(tmp_path, max_steps=4, checkpoint=every, ckpt_path=str(tmp_path / "checkpoint-2"), model=other)
    assert HFCheckpoint.find(tmp_path, "auto") == str(tmp_path / "checkpoint-4")
    # A run that dies right after it published a checkpoint has not moved `last` yet.
    folders.point(tmp_path / "last", tmp_path / "checkpoint-2")
    assert HFCheckpoint.find(tmp_path, "auto") == str(tmp_path / "checkpoint-4")


def test_one_callback_serves_two_fits(fit, tmp_path, val_file):
    first = fit(tmp_path / "a", max_steps=2, data={"val_path": val_file}, checkpoint={"monitor": "val/loss"})
    callback = first.trainer.checkpoint_callback
    callback.overwrite = True
    fit(None, max_steps=2, data={"val_path": val_file}, callbacks=(callback,), model={"learning_rate": 0.5})
    assert (tmp_path / "a" / "checkpoint-2").is_dir()
    assert (tmp_path / "a" / "last").resolve().name == "checkpoint-2"


def test_plain_model_checkpoint_resumes_between_epochs_too(fit, tmp_path):
    saver = ModelCheckpoint(tmp_path, every_n_train_steps=6, save_top_k=-1)
    straight = fit(None, callbacks=(saver,))
    resumed = fit(None, callbacks=(), ckpt_path=str(tmp_path / "epoch=0-step=6.ckpt"))
    assert resumed.losses == straight.losses[6:]


def test_float32_buffers_stay_so_under_bf16_true(fit, tmp_path):
    run = fit(tmp_path, max_steps=1, precision="bf16-true")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "final", dtype=torch.bfloat16)
    ours = dict(run.module.model.named_buffers())
    for name, buffer in plain.named_buffers():
        assert torch.equal(ours[name], buffer)
        assert ours[name].dtype == torch.float32
    assert {p.dtype for p in run.module.model.parameters()} == {torch.bfloat16}


def test_a_failing_save_leaves_the_last_good_checkpoint(fit, tmp_path, monkeypatch):
    def disk_full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    fit(tmp_path, max_steps=2)
    monkeypatch.setattr("sft_lightning.checkpointing.io.torch.save", disk_full)
    last = re.escape(str((tmp_path / "checkpoint-2").resolve()))
    with pytest.raises(RunFailedError, match=f"No space left on device; '{last}' is the last good checkpoint"):
        fit(tmp_path, ckpt_path=str(tmp_path / "checkpoint-2"), max_steps=4, checkpoint={"every_n_train_steps": 1})
    monkeypatch.undo()
    assert HFCheckpoint.find(tmp_path, "auto") == str(tmp_path / "checkpoint-2")
    assert not list(tmp_path.glob(".*tmp*"))


@pytest.mark.parametrize(("optimizer", "num_copies"), [(None, 3), (torch.optim.SGD, 1)])
def test_the_disk_check_counts_the_moments_of_adamw_only(fit, tmp_path, monkeypatch, optimizer, num_copies):
    asked = []
    monkeypatch.setattr(callback, "require_space", lambda path, size: asked.append(size))
    run = fit(tmp_path, max_steps=1, model={"optimizer": optimizer})
    num_parameters = sum(parameter.numel() for parameter in run.module.parameters())
    assert asked[0] == num_copies * 4 * num_parameters
