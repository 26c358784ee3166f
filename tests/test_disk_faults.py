"""Provoke disk faults in real runs: the last good checkpoint stays, is named, and the run resumes."""

import json
import resource
import shutil
import subprocess
import tempfile

import pytest
from lightning.pytorch import Callback

from sft_lightning.checkpointing import folder as folders
from sft_lightning.cli import lightning_cli
from sft_lightning.cli.main import main

EVERY_STEP = ["--checkpoint.every_n_train_steps", "1"]


@pytest.fixture
def straight(command, tmp_path):
    """Returns the final weights of a run that nothing happened to."""
    assert main([*command, "--output_dir", str(tmp_path / "straight")]) == 0
    return (tmp_path / "straight" / "final" / "model.safetensors").read_bytes()


def final(run):
    return (run / "final" / "model.safetensors").read_bytes()


class AtStep(Callback):
    """Does something when a step begins."""

    def __init__(self, step, action):
        self.step, self.action = step, action

    def on_train_batch_start(self, trainer, *args):
        if trainer.global_step == self.step:
            self.step = None
            self.action()


@pytest.fixture
def during(monkeypatch):
    """Returns a function that has the next runs of the command line do something at a step."""
    instantiate = lightning_cli.SFTCLI.instantiate_trainer

    def plan(step, action):
        def with_callback(cli, **kwargs):
            trainer = instantiate(cli, **kwargs)
            trainer.callbacks.insert(0, AtStep(step, action))
            return trainer

        monkeypatch.setattr(lightning_cli.SFTCLI, "instantiate_trainer", with_callback)

    return plan


def fill(folder, left_bytes):
    with (folder / "filler").open("wb") as file:
        file.write(b"0" * (shutil.disk_usage(folder).free - left_bytes))


def test_a_disk_that_others_fill_is_noticed_before_writing(command, small_disk, straight, during, capsys, note_fault):
    run = small_disk / "run"
    options = [*command, *EVERY_STEP, "--output_dir", str(run)]
    during(3, lambda: fill(small_disk, left_bytes=300_000))
    assert main(options) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"sft-lightning: error: '{run}/checkpoint-4' needs ")
    assert "nothing was written, and earlier checkpoints are untouched: free space, or" in error
    assert not list(run.glob(".checkpoint*"))
    (small_disk / "filler").unlink()
    during(None, None)
    assert main([*options, "--ckpt_path", "auto"]) == 0
    assert f"--ckpt_path auto: '{run}/checkpoint-3'" in capsys.readouterr().out
    assert final(run) == straight
    note_fault(
        "disk full, seen before writing",
        provoked="a file system of 16 MiB is filled during training",
        outcome="exit code 1; the sizes are named; with space again `--ckpt_path auto` resumes bit-equal",
    )


def test_a_disk_that_is_too_small_is_noticed_before_training(command, small_disk, capsys, note_fault):
    fill(small_disk, left_bytes=1_000_000)
    run = small_disk / "run"
    assert main([*command, "--output_dir", str(run)]) == 1
    assert f"'{run}/final' needs " in capsys.readouterr().err.splitlines()[-1]
    assert not list(run.glob("checkpoint*"))
    note_fault(
        "disk too small for one checkpoint",
        provoked="a file system with 1 MB free",
        outcome="exit code 1 before the first step, with both sizes",
    )


@pytest.mark.parametrize("size_bytes", [30_000, 110_000])
def test_a_failed_write_keeps_the_last_checkpoint(command, tmp_path, straight, during, capsys, size_bytes, note_fault):
    """The limit falls into the weights, or into the optimizer's state, which is twice as large."""
    run = tmp_path / "run"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    options = [*command, *EVERY_STEP]
    during(3, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, resource.RLIM_INFINITY)))
    try:
        assert main(options) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"sft-lightning: error: '{run}/checkpoint-4' could not be written: ")
    assert error.endswith(f"'{run}/checkpoint-3' is the last good checkpoint; resume with --ckpt_path auto")
    assert not list(run.glob(".*tmp*"))
    during(None, None)
    assert main([*options, "--ckpt_path", "auto"]) == 0
    assert final(run) == straight
    note_fault(
        "a write fails in the middle",
        provoked="a limit to the size of files, reached within the weights and within the optimizer's state",
        outcome="exit code 1; nothing half-written stays; the message names the last good checkpoint, which resumes "
        "bit-equal",
        tries=2,
    )


def test_an_unwritable_folder_stops_the_run_at_its_start(command, small_disk, capsys, note_fault):
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    assert main([*command, "--output_dir", str(small_disk / "run")]) == 2
    assert "cannot be written: Read-only file system" in capsys.readouterr().err.splitlines()[-1]
    note_fault(
        "output folder cannot be written",
        provoked="a read-only file system",
        outcome="exit code 2 before a model is loaded",
    )


def cut_short(checkpoint):
    path = checkpoint / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def flip_a_byte(checkpoint):
    content = bytearray((checkpoint / "trainer_state.ckpt").read_bytes())
    content[len(content) // 2] ^= 1
    (checkpoint / "trainer_state.ckpt").write_bytes(content)


def lose_the_manifest(checkpoint):
    (checkpoint / "manifest.json").unlink()


@pytest.mark.parametrize(
    ("damage", "fault", "complaint"),
    [
        (cut_short, "checkpoint file cut short", "model.safetensors has"),
        (flip_a_byte, "flipped byte in a checkpoint", "trainer_state.ckpt does not match its sha256"),
        (lose_the_manifest, "checkpoint without its manifest", "has no readable manifest.json"),
    ],
)
def test_a_damaged_checkpoint_is_skipped_for_the_previous_one(
    command, tmp_path, straight, caplog, capsys, damage, fault, complaint, note_fault
):
    run = tmp_path / "run"
    assert main([*command, "--trainer.max_steps", "4"]) == 0
    damage(run / "checkpoint-4")
    before = {path: path.read_bytes() for path in (run / "checkpoint-2").iterdir()}
    capsys.readouterr()
    assert main([*command, "--ckpt_path", "auto"]) == 0
    printed = capsys.readouterr()
    assert complaint in printed.err + caplog.text
    assert f"--ckpt_path auto: '{run}/checkpoint-2'" in printed.out
    assert {path: path.read_bytes() for path in before} == before
    assert final(run) == straight
    note_fault(
        fault,
        provoked="on the newest checkpoint of a run",
        outcome="`--ckpt_path auto` names the damage and resumes from the previous one, bit-equal",
        lost="nothing but the time of two steps",
    )


def test_unfinished_folders_of_dead_processes_are_removed(command, tmp_path, straight, note_fault):
    run = tmp_path / "run"
    assert main([*command, "--trainer.max_steps", "4"]) == 0
    shutil.copytree(run / "checkpoint-4", run / ".checkpoint-6.tmp-4711")
    (run / ".checkpoint-6.tmp-4711" / "manifest.json").unlink()
    (run / "checkpoint-4").rename(run / ".checkpoint-4.replaced")  # died between two renames
    assert main([*command, "--ckpt_path", "auto"]) == 0
    assert not list(run.glob(".*"))
    folders.verify(run / "checkpoint-4")
    assert final(run) == straight
    note_fault(
        "stale temporary folders",
        provoked="a half-written checkpoint and one moved aside, of a process that died",
        outcome="the whole one is restored, the half one deleted; the run resumes bit-equal",
    )


def test_temporary_files_may_be_on_another_file_system(
    command, tmp_path, small_disk, straight, monkeypatch, note_fault
):
    monkeypatch.setattr(tempfile, "tempdir", str(small_disk))
    assert small_disk.stat().st_dev != tmp_path.stat().st_dev
    assert main([*command, "--trainer.max_steps", "4"]) == 0
    assert main([*command, "--ckpt_path", "auto"]) == 0
    assert final(tmp_path / "run") == straight
    note_fault(
        "TMPDIR on another file system",
        provoked="a separate file system for temporary files",
        outcome="no difference: checkpoints are written in their own folder",
    )


def test_a_failing_run_overwrites_no_good_checkpoint(command, tmp_path, capsys, note_fault):
    run = tmp_path / "run"
    assert main(command) == 0
    for checkpoint in folders.checkpoints(run):
        cut_short(checkpoint)
    kept = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert main([*command, "--ckpt_path", "auto"]) == 2
    assert "none of the 3 checkpoints" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == kept
    assert json.loads((run / "final" / "manifest.json").read_text())["step"] == 6
    note_fault(
        "all checkpoints of a run damaged",
        provoked="each one's weights cut short",
        outcome="exit code 2 in one line; no file is touched",
    )
