"""Test that a state is named by its attempt and its step: `auto`, `best`, `last`, retention and the end of a run."""

import json
import os
import signal

import pytest
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EarlyStopping, OnExceptionCheckpoint
from lightning.pytorch.callbacks import ModelCheckpoint as PlainModelCheckpoint
from safetensors.torch import load_file

from sft_lightning import HFCheckpoint
from sft_lightning.checkpointing import callback as callback_module
from sft_lightning.checkpointing import folder as folders
from sft_lightning.checkpointing.run_state import Lineage, RunState, read_run_state
from sft_lightning.errors import UserError

EVERY_2 = {"every_n_train_steps": 2}
VALIDATE_EVERY_2 = {"val_check_interval": 4, "check_val_every_n_epoch": None}  # micro-batches, two a step


class Kill(Callback):
    """Kills the process as its training has done a step."""

    def __init__(self, step):
        self.step = step

    def on_train_batch_start(self, trainer, *args):
        if trainer.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def names(run):
    return [path.name for path in folders.checkpoints(run)]


def link(run, word):
    return (run / word).readlink().name


def put_metrics(run, values, monitor="val/loss"):
    for step, value in values.items():
        folders.publish(run / f"checkpoint-{step}", lambda folder: (folder / "w").write_text("w"), {"step": step})
        folders.add_metrics(run / f"checkpoint-{step}", {monitor: value})


# Lineage


def test_a_lineage_includes_states_up_to_where_it_left_an_attempt():
    first = Lineage.new()
    second = first.continued(4)
    third = second.continued(6)
    states = [(first, 4), (first, 6), (second, 6), (second, 8), (third, 8)]
    included = [third.includes({"step": step, "lineage": lineage.attempts}) for lineage, step in states]
    assert included == [True, False, True, False, True]
    assert len({name for name, _ in third.attempts}) == 3


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"lineage": 3, "monitor": null, "mode": "min", "job": ""}', "\0\0"])
def test_a_damaged_run_state_is_told_and_ignored(tmp_path, text, caplog):
    assert read_run_state(tmp_path) is None
    assert not caplog.records
    (tmp_path / "run_state.json").write_text(text)
    assert read_run_state(tmp_path) is None
    (warning,) = caplog.records
    assert f"'{tmp_path}/run_state.json' is damaged" in warning.message


# Branches


def test_auto_does_not_return_to_a_branch_that_was_left(fit, tmp_path, in_child, note_fault):
    fit(tmp_path, max_steps=8, checkpoint=EVERY_2)
    left = {"max_steps": 8, "checkpoint": EVERY_2, "ckpt_path": str(tmp_path / "checkpoint-4")}
    code = in_child(lambda: fit(tmp_path, callbacks=(Kill(5),), log_every_n_steps=3, **left))
    assert code == -signal.SIGKILL
    assert names(tmp_path) == ["checkpoint-2", "checkpoint-4", "checkpoint-6", "checkpoint-8"]
    assert HFCheckpoint.find(tmp_path, "auto") == str(tmp_path / "checkpoint-4")
    assert HFCheckpoint.find(tmp_path, "last") == str(tmp_path / "checkpoint-4")
    # A second attempt that dies as early does not lose the first one's place.
    left["ckpt_path"] = HFCheckpoint.find(tmp_path, "auto")
    assert in_child(lambda: fit(tmp_path, callbacks=(Kill(4),), **left)) == -signal.SIGKILL
    assert HFCheckpoint.find(tmp_path, "auto") == str(tmp_path / "checkpoint-4")
    note_fault(
        "resumed from an earlier checkpoint, and killed before the first save",
        provoked="SIGKILL, twice, in a run of four checkpoints that resumes from the second",
        outcome="`auto` continues from where that resume started, not from the later checkpoints of the old branch",
        tries=2,
    )


def test_auto_takes_a_checkpoint_that_last_does_not_point_at_yet(fit, tmp_path):
    fit(tmp_path, max_steps=4, checkpoint=EVERY_2)
    folders.point(tmp_path / "last", tmp_path / "checkpoint-2")
    for word in ("auto", "last"):
        assert HFCheckpoint.find(tmp_path, word) == str(tmp_path / "checkpoint-4")


def test_auto_without_a_checkpoint_of_the_branch_names_another(tmp_path):
    put_metrics(tmp_path, {2: 0.1, 4: 0.1})
    RunState(Lineage.new()).write(tmp_path)
    with pytest.raises(UserError, match=rf"has left the branch of its 2 checkpoints; .* {tmp_path}/checkpoint-4$"):
        folders.find(tmp_path, "auto")


def test_final_of_another_branch_is_written_again(fit, tmp_path, in_child):
    fit(tmp_path, max_steps=4, checkpoint=EVERY_2)
    old = (tmp_path / "final" / "model.safetensors").read_bytes()
    other = {"model": {"learning_rate": 0.5, "resume_override": True}, "max_steps": 4, "checkpoint": EVERY_2}
    dies = pytest.MonkeyPatch()
    dies.setattr(callback_module, "write_model", lambda *args: os.kill(os.getpid(), signal.SIGKILL))
    code = in_child(lambda: fit(tmp_path, ckpt_path=str(tmp_path / "checkpoint-2"), **other))
    dies.undo()
    assert code == -signal.SIGKILL
    assert (tmp_path / "final" / "model.safetensors").read_bytes() == old
    fit(tmp_path, ckpt_path=HFCheckpoint.find(tmp_path, "auto"), **other)
    final, last = (load_file(tmp_path / name / "model.safetensors") for name in ("final", "checkpoint-4"))
    assert all((final[name] == last[name]).all() for name in last)
    assert (tmp_path / "final" / "model.safetensors").read_bytes() != old


# Best


@pytest.mark.parametrize(
    ("mode", "values", "best"),
    [
        ("min", {2: 0.5, 4: 0.3, 6: 0.4}, 4),
        ("max", {2: 0.5, 4: 0.5, 6: 0.4}, 2),
        ("min", {2: 0.5, 4: float("nan"), 6: float("inf")}, 2),
        ("max", {2: float("nan")}, None),
    ],
)
def test_best_follows_from_the_metrics_on_disk(tmp_path, mode, values, best):
    put_metrics(tmp_path, values)
    RunState(Lineage((("", None),)), "val/loss", mode).write(tmp_path)
    found = folders.best(tmp_path)
    assert found == (None if best is None else tmp_path / f"checkpoint-{best}")


@pytest.mark.parametrize("at", ["link", "metrics"])
def test_best_is_right_after_a_death_beside_the_best_save(fit, tmp_path, val_file, at, in_child):
    options = {
        "data": {"val_path": val_file},
        "checkpoint": {"every_n_train_steps": 3, "monitor": "val/loss", "keep_last": 1},
        "max_steps": 6,
        **VALIDATE_EVERY_2,
    }
    fit(tmp_path / "whole", **options)
    expected = link(tmp_path / "whole", "best")
    assert expected == "checkpoint-6"
    assert names(tmp_path / "whole") == ["checkpoint-6"]
    point, add = folders.point, folders.add_metrics

    def die_at_link(where, target):
        if where.name == "best" and target.name == "checkpoint-4":
            os.kill(os.getpid(), signal.SIGKILL)
        point(where, target)

    def die_at_metrics(folder, metrics):
        if folder.name == "checkpoint-6":
            os.kill(os.getpid(), signal.SIGKILL)
        add(folder, metrics)

    run = tmp_path / "killed"
    with pytest.MonkeyPatch.context() as dies:
        if at == "link":
            dies.setattr(folders, "point", die_at_link)
        else:
            dies.setattr(folders, "add_metrics", die_at_metrics)
        assert in_child(lambda: fit(run, **options)) == -signal.SIGKILL
    at_death = "checkpoint-4"
    assert HFCheckpoint.find(run, "best") == str(run / at_death)
    fit(run, ckpt_path=HFCheckpoint.find(run, "auto"), **options)
    assert (link(run, "best"), names(run)) == (expected, ["checkpoint-6"])


def test_a_resume_from_before_the_best_keeps_it(fit, tmp_path, val_file):
    options = {
        "data": {"val_path": val_file},
        "checkpoint": {"every_n_train_steps": 2, "monitor": "val/loss"},
        **VALIDATE_EVERY_2,
    }
    fit(tmp_path, max_steps=6, **options)
    best = folders.best(tmp_path)
    assert best.name == "checkpoint-6"
    options["checkpoint"] |= {"keep_last": 1}
    worse = {"learning_rate": 5.0, "resume_override": True}  # diverges
    fit(tmp_path, max_steps=10, model=worse, ckpt_path=str(tmp_path / "checkpoint-2"), **options)
    scores = {folder.name: folders.score(folder, "val/loss") for folder in folders.checkpoints(tmp_path)}
    assert link(tmp_path, "best") == min(scores, key=scores.get)
    assert link(tmp_path, "last") == "checkpoint-10"


def test_another_monitor_on_resume_finds_its_best(fit, tmp_path, val_file):
    options = {"data": {"val_path": val_file}, **VALIDATE_EVERY_2}
    fit(tmp_path, max_steps=4, checkpoint=EVERY_2, **options)
    assert not (tmp_path / "best").exists()
    monitored = {**EVERY_2, "monitor": "val/loss", "mode": "max"}
    fit(tmp_path, max_steps=6, checkpoint=monitored, ckpt_path=str(tmp_path / "checkpoint-4"), **options)
    assert link(tmp_path, "best") == "checkpoint-2"  # the loss falls


# Retention


def test_checkpoints_of_an_abandoned_branch_take_no_place(fit, tmp_path):
    fit(tmp_path, max_steps=10, checkpoint=EVERY_2)
    kept = {**EVERY_2, "keep_last": 2}
    fit(tmp_path, max_steps=6, checkpoint=kept, ckpt_path=str(tmp_path / "checkpoint-4"))
    assert names(tmp_path) == ["checkpoint-4", "checkpoint-6"]


def test_pruning_leaves_links_and_foreign_folders(tmp_path):
    elsewhere = tmp_path / "elsewhere"
    put_metrics(tmp_path / "run", {2: 0.1, 4: 0.1, 6: 0.1})
    (tmp_path / "run" / "checkpoint-2").rename(elsewhere)
    (tmp_path / "run" / "checkpoint-2").symlink_to(elsewhere)
    (tmp_path / "run" / "checkpoint-3").mkdir()
    folders.prune(tmp_path / "run", 1)
    assert names(tmp_path / "run") == ["checkpoint-2", "checkpoint-3", "checkpoint-6"]
    folders.verify(elsewhere)


@pytest.mark.parametrize("make", [lambda link: link.mkdir(), lambda link: link.symlink_to(link.name)])
def test_a_last_that_is_no_link_or_loops_does_no_harm(fit, tmp_path, make):
    fit(tmp_path, max_steps=2, checkpoint=EVERY_2)
    (tmp_path / "last").unlink()
    make(tmp_path / "last")
    resumed = fit(tmp_path, max_steps=4, checkpoint=EVERY_2, ckpt_path=HFCheckpoint.find(tmp_path, "last"))
    assert resumed.trainer.global_step == 4
    assert HFCheckpoint.find(tmp_path, "last") == str(tmp_path / "checkpoint-4")


def test_other_checkpoint_callbacks_save_beside_ours(fit, tmp_path):
    others = (
        PlainModelCheckpoint(tmp_path / "plain", every_n_train_steps=2, save_top_k=1),
        OnExceptionCheckpoint(tmp_path / "exception"),
    )
    fit(tmp_path / "run", max_steps=4, checkpoint=EVERY_2, callbacks=others)
    (saved,) = (tmp_path / "plain").iterdir()
    folders.verify(saved)
    assert folders.read_manifest(saved)["step"] == 4
    assert names(tmp_path / "run") == ["checkpoint-2", "checkpoint-4"]


# The end of a run


class Plateau(EarlyStopping):
    """Stops at the second validation, as the loss never falls by 100."""

    def __init__(self, patience=1):
        super().__init__("val/loss", patience=patience, min_delta=100.0)


@pytest.fixture
def stopped(fit, tmp_path, val_file):
    options = {"data": {"val_path": val_file}, "checkpoint": EVERY_2, "max_epochs": 4, **VALIDATE_EVERY_2}
    run = fit(tmp_path, callbacks=(Plateau(),), **options)
    assert run.trainer.global_step == 4
    return options


def resume(fit, run, stopper, options, **model):
    return fit(run, callbacks=(stopper,), ckpt_path=HFCheckpoint.find(run, "auto"), model=model, **options)


def test_an_early_stopped_run_does_not_train_on(fit, tmp_path, stopped):
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file() and path.suffix != ".json"}
    for _ in range(2):
        assert resume(fit, tmp_path, Plateau(), stopped).losses == []
    assert {path: path.read_bytes() for path in before} == before
    assert json.loads((tmp_path / "final" / "manifest.json").read_text())["step"] == 4


def test_more_patience_or_an_override_trains_on(fit, tmp_path, stopped):
    resumed = resume(fit, tmp_path, Plateau(patience=3), stopped)
    assert resumed.trainer.global_step == 8  # the first validation counts as an improvement; three more do not
    again = resume(fit, tmp_path, Plateau(patience=3), stopped, resume_override=True)
    assert again.trainer.global_step == 12  # three more again, from the validation at step 8 on


def test_a_run_without_its_early_stopping_trains_on(fit, tmp_path, stopped):
    resumed = fit(tmp_path, ckpt_path=HFCheckpoint.find(tmp_path, "auto"), **stopped)
    assert resumed.trainer.global_step == 24
