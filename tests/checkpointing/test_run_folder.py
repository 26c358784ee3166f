"""What a run wrote and no longer stands for. What else becomes of claims: test_checkpoint_folder.py, on whole runs."""

from sft_lightning.checkpointing import run_folder as claims


def write(run, *names):
    for name in names:
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text("x")


def test_stale_files_are_deleted_with_their_folders_and_no_others(tmp_path):
    ours = ("config.yaml", "evaluation/step-5/metrics.json", "evaluation/step-10/metrics.json")
    write(tmp_path, *ours, "evaluation/step-10/notes.txt", "evaluation/step-15/mine.txt")
    for name in (*ours, "evaluation/step-20/gone.json"):
        claims.register_file(tmp_path, name)
    claims.remove_registered(tmp_path, lambda name: name.startswith(("evaluation/step-10", "evaluation/step-20")))
    left = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    theirs = {"evaluation/step-10/notes.txt", "evaluation/step-15/mine.txt"}
    assert left == {*ours[:2], *theirs, claims.RUN_FILES}
    claims.clear(tmp_path)
    assert {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()} == theirs


def test_withdrawing_leads_nowhere_out_of_the_run(tmp_path):
    write(tmp_path, "victim.txt")
    run = tmp_path / "run"
    run.mkdir()
    (run / claims.RUN_FILES).write_text('["../victim.txt"]')
    claims.remove_registered(run, lambda name: True)
    assert (tmp_path / "victim.txt").exists()
