"""Test that --overwrite keeps the old run until the new one has a checkpoint, and touches nothing outside of it."""

import fcntl
import json
import os
import signal
from pathlib import Path

import pytest
from lightning.pytorch import Callback

from sft_lightning import HFCheckpoint
from sft_lightning.checkpointing import folder as folders
from sft_lightning.checkpointing import run_folder as run_folders
from sft_lightning.checkpointing.run_state import Lineage, RunState
from sft_lightning.errors import UserError
from sft_lightning.system.lock import unlock_folders


@pytest.fixture(autouse=True)
def _unlocked():
    yield
    unlock_folders()


def content(run):
    """Returns the content of each file of a run, and the targets of links."""
    return {
        path.relative_to(run).as_posix(): path.readlink() if path.is_symlink() else path.read_bytes()
        for path in run.rglob("*")
        if (path.is_symlink() or path.is_file()) and path.name != ".lock"
    }


def publish(run, name="checkpoint-2", text="old", **about):
    folders.publish(run / name, lambda folder: (folder / "weights").write_text(text), {"step": 2, **about})


def old_run(run):
    publish(run, lineage=[["old", None]])
    publish(run, "final", lineage=[["old", None]])
    folders.point(run / "last", run / "checkpoint-2")
    for name in ("config.yaml", "evaluation/step-2/metrics.json"):
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text("old")
        run_folders.register_file(run, name)
    RunState(Lineage((("old", None),))).write(run)
    (run / "notes.txt").write_text("mine")


def begin(run, overwrite=True):
    run_folders.open_run_folder(run)
    run_folders.begin_new_run(run, overwrite=overwrite)


def start_new_run(run):
    begin(run)
    RunState(Lineage((("new", None),))).write(run)
    run_folders.register_file(run, "config.yaml")
    (run / "config.yaml").write_text("new")


def test_a_new_run_that_fails_brings_the_old_one_back(tmp_path):
    old_run(tmp_path)
    before = content(tmp_path)
    start_new_run(tmp_path)
    assert {name for name in content(tmp_path) if not name.startswith(".replaced-run")} == {
        *("notes.txt", "config.yaml", "run_files.json", "run_state.json")
    }
    assert not folders.find(tmp_path, "auto")
    run_folders.put_back(tmp_path)
    assert content(tmp_path) == before


def test_a_death_at_any_moment_of_an_overwrite_loses_nothing(tmp_path, deaths, note_fault):
    expected, tries = None, 0
    for tries, run in enumerate(deaths(tmp_path, start_new_run, old_run), 1):  # noqa: B007
        begin(run, overwrite=True)
        run_folders.put_back(run)
        unlock_folders()
        found = content(run)
        expected = expected or found
        assert found == expected
        assert found["notes.txt"] == b"mine"
        assert folders.find(run, "auto") == run / "checkpoint-2"
    note_fault(
        "killed while --overwrite replaces a run",
        provoked="a death before each change on disk, until the new run's first checkpoint",
        outcome="the old run comes back with its next start, or is moved aside again with --overwrite",
        tries=tries,
    )


def test_a_death_after_the_first_checkpoint_keeps_the_new_run(tmp_path):
    old_run(tmp_path)
    start_new_run(tmp_path)
    publish(tmp_path, "checkpoint-4", "new", step=4, lineage=[["new", None]])
    run_folders.open_run_folder(tmp_path)
    assert not (tmp_path / ".replaced-run").exists()
    assert folders.find(tmp_path, "auto") == tmp_path / "checkpoint-4"
    assert (tmp_path / "config.yaml").read_text() == "new"


def test_a_killed_overwrite_is_undone_by_a_start_without_it(tmp_path):
    old_run(tmp_path)
    start_new_run(tmp_path)
    with pytest.raises(UserError, match="holds another run"):
        begin(tmp_path, overwrite=False)
    assert folders.find(tmp_path, "auto") == tmp_path / "checkpoint-2"


@pytest.fixture
def outside(tmp_path):
    """Files outside of the run that nothing may touch."""
    folder = tmp_path / "outside"
    for name in ("weights", "manifest.json", "step-2/metrics.json", "sub/weights"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("mine")
    before = content(folder)
    yield folder
    assert content(folder) == before


def test_a_checkpoint_that_is_a_link_is_left_alone(tmp_path, outside):
    run = tmp_path / "run"
    old_run(run)
    (run / "checkpoint-2").rename(tmp_path / "moved")
    (run / "checkpoint-2").symlink_to(tmp_path / "moved")
    before = content(tmp_path / "moved")
    begin(run)
    run_folders.delete_replaced(run)
    assert content(tmp_path / "moved") == before
    assert (run / "checkpoint-2").is_symlink()
    publish(run, text="new")
    assert (run / "checkpoint-2" / "weights").read_text() == "new"
    assert content(tmp_path / "moved") == before


def test_a_folder_behind_a_link_is_left_alone(tmp_path, outside, note_fault):
    run = tmp_path / "run"
    old_run(run)
    (run / "evaluation").rename(tmp_path / "evaluation")
    (run / "evaluation").symlink_to(outside)
    (run / "checkpoint-2" / "sub").symlink_to(outside / "sub")
    manifest = json.loads((run / "checkpoint-2" / "manifest.json").read_text())
    manifest["files"]["sub/weights"] = {"size": 4, "sha256": ""}
    (run / "checkpoint-2" / "manifest.json").write_text(json.dumps(manifest))
    run_folders.remove_registered(run, lambda name: name.startswith("evaluation"))
    begin(run)
    run_folders.delete_replaced(run)
    note_fault(
        "links in the folder of a run, or a hostile run_files.json or manifest, with --overwrite",
        provoked="a checkpoint, its subfolder or the evaluations behind a link; names that lead outside",
        outcome="nothing outside of the folder is touched; what lies behind a link stays",
        tries=9,
    )


@pytest.mark.parametrize(
    "names", [["../outside/weights"], ["/etc/passwd"], ["", ".", "..", 3, None], ["evaluation"], "weights", {"a": 1}]
)
def test_hostile_names_reach_nothing_outside(tmp_path, outside, names):
    run = tmp_path / "run"
    old_run(run)
    (run / "evaluation" / "mine.txt").write_text("mine")
    (run / "run_files.json").write_text(json.dumps(names))
    begin(run)
    run_folders.delete_replaced(run)
    assert (run / "evaluation" / "mine.txt").read_text() == "mine"


# Whole runs


class Fails(Callback):
    """Ends a run before its first checkpoint."""

    def __init__(self, error):
        self.error = error

    def on_train_batch_start(self, trainer, *args):
        if trainer.global_step == 1:
            if self.error is None:
                os.kill(os.getpid(), signal.SIGKILL)
            raise self.error


@pytest.mark.parametrize("mistake", ["monitor", "raises", "interrupt", "no steps"])
def test_a_run_that_fails_early_leaves_the_old_run(fit, tmp_path, val_file, mistake, interrupts, note_fault):
    fit(tmp_path, max_steps=2)
    before = content(tmp_path)
    options = {"max_steps": 4, "data": {"val_path": val_file}, "checkpoint": {"overwrite": True}}
    if mistake == "monitor":
        options |= {"val_check_interval": 2, "check_val_every_n_epoch": None}
        options["checkpoint"] |= {"monitor": "val/los", "every_n_train_steps": 9}
    if mistake in ("raises", "interrupt"):
        options["callbacks"] = (Fails(ValueError("planted") if mistake == "raises" else KeyboardInterrupt()),)
    if mistake == "no steps":
        fit(tmp_path, **{**options, "max_steps": 0})
    else:
        with pytest.raises((UserError, ValueError, SystemExit)):
            fit(tmp_path, **options)
    assert content(tmp_path) == before
    note_fault(
        "--overwrite, and the new run fails before its first checkpoint",
        provoked="a mistyped monitor, an exception, Ctrl-C and max_steps 0",
        outcome="the old run is back, to the last byte",
        tries=4,
    )


def test_a_second_fit_does_not_undo_the_overwrite_of_the_first(fit, tmp_path):
    old_run(tmp_path)
    start_new_run(tmp_path)
    before = content(tmp_path)
    unlock_folders()
    with (tmp_path / ".lock").open("a+b") as held:
        fcntl.flock(held, fcntl.LOCK_EX)  # as by another process
        with pytest.raises(UserError, match="is in use by another process"):
            fit(tmp_path, max_steps=1)
    assert content(tmp_path) == before


def test_a_run_that_succeeds_replaces_the_old_run(fit, tmp_path):
    fit(tmp_path, max_steps=3)
    fit(tmp_path, max_steps=2, checkpoint={"overwrite": True})
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-2", "final", "last", "run_state.json"}
    assert HFCheckpoint.find(tmp_path, "auto") == str(tmp_path / "checkpoint-2")


def test_auto_after_a_killed_overwrite_starts_the_new_run(fit, tmp_path, in_child):
    fit(tmp_path, max_steps=2)
    overwrite = {"checkpoint": {"overwrite": True}, "max_steps": 4}
    assert in_child(lambda: fit(tmp_path, callbacks=(Fails(None),), **overwrite)) == -signal.SIGKILL
    assert HFCheckpoint.find(Path(tmp_path), "auto") is None
    assert fit(tmp_path, **overwrite).trainer.global_step == 4
    assert [path.name for path in folders.checkpoints(tmp_path)] == ["checkpoint-4"]
