"""Test the files that a run registers, and its folder. test_folder.py clears whole runs."""

from pathlib import Path

from sft_lightning.checkpointing import run_folder as run_folders
from sft_lightning.checkpointing.callback import HFCheckpoint
from sft_lightning.checkpointing.run_folder import run_folder


def write(run, *names):
    for name in names:
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text("x")


def test_stale_files_and_their_empty_folders_are_deleted(tmp_path):
    ours = ("config.yaml", "evaluation/step-5/metrics.json", "evaluation/step-10/metrics.json")
    write(tmp_path, *ours, "evaluation/step-10/notes.txt", "evaluation/step-15/mine.txt")
    for name in (*ours, "evaluation/step-20/gone.json"):
        run_folders.register_file(tmp_path, name)
    run_folders.remove_registered(tmp_path, lambda name: name.startswith(("evaluation/step-10", "evaluation/step-20")))
    left = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    theirs = {"evaluation/step-10/notes.txt", "evaluation/step-15/mine.txt"}
    assert left == {*ours[:2], *theirs, run_folders.RUN_FILES}
    run_folders.begin_new_run(tmp_path, overwrite=True)
    run_folders.delete_replaced(tmp_path)
    assert {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()} == theirs


def test_removing_registered_files_never_leaves_the_run(tmp_path):
    write(tmp_path, "victim.txt")
    run = tmp_path / "run"
    run.mkdir()
    (run / run_folders.RUN_FILES).write_text('["../victim.txt"]')
    run_folders.remove_registered(run, lambda name: True)
    assert (tmp_path / "victim.txt").exists()


def test_run_folder_is_given_or_of_checkpoints_or_of_trainer(make_trainer, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/of-someone")
    saving = make_trainer(HFCheckpoint(str(tmp_path / "saved")))
    plain = make_trainer(default_root_dir=str(tmp_path / "root"))
    assert run_folder(saving, "~/given") == Path("/home/of-someone/given")
    assert run_folder(saving, None) == tmp_path / "saved"
    assert run_folder(plain, None) == tmp_path / "root"
