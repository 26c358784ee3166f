import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest

from sft_lightning.checkpointing import folder as folders
from sft_lightning.checkpointing import run_folder as run_folders
from sft_lightning.errors import RunFailedError, UserError
from sft_lightning.system.lock import unlock_folders

WEIGHTS, CONFIG = b"0123456789", b'{"hidden_size": 8}'
fsync = os.fsync


@pytest.fixture(autouse=True)
def _without_waiting_for_the_disk(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda handle: None)


def write_model(folder):
    (folder / "model.safetensors").write_bytes(WEIGHTS)
    (folder / "config.json").write_bytes(CONFIG)


def publish(run, name="checkpoint-5", text=None, **about):
    """Publishes a folder that holds ``text`` in one file, or a model of two files."""
    write = write_model if text is None else lambda folder: (folder / "weights").write_text(text)
    folders.publish(run / name, write, about)
    return run / name


def text_of(folder):
    return (folder / "weights").read_text()


def names(folder):
    """Returns everything below a folder."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def replace_run(run):
    """Overwrites a run with one that has a checkpoint."""
    run_folders.open_run_folder(run)
    run_folders.begin_new_run(run, overwrite=True)
    run_folders.delete_replaced(run)
    unlock_folders()


# Publishing


def test_a_published_folder_has_files_and_manifest(tmp_path):
    folder = publish(tmp_path / "new" / "run", step=5, digest={"seed": 1})
    assert names(folder) == ["config.json", "manifest.json", "model.safetensors"]
    assert json.loads((folder / "manifest.json").read_text()) == {
        "step": 5,
        "digest": {"seed": 1},
        "files": {
            "config.json": {"size": 18, "sha256": hashlib.sha256(CONFIG).hexdigest()},
            "model.safetensors": {"size": 10, "sha256": hashlib.sha256(WEIGHTS).hexdigest()},
        },
    }
    assert names(folder.parent) == ["checkpoint-5", *(f"checkpoint-5/{name}" for name in names(folder))]
    folders.verify(folder)
    assert folders.read_manifest(folder)["step"] == 5


def test_files_in_subfolders_are_in_the_manifest(tmp_path):
    def write(folder):
        (folder / "additional_chat_templates").mkdir()
        (folder / "additional_chat_templates" / "tool.jinja").write_text("x")

    folders.publish(tmp_path / "final", write, {})
    assert list(folders.read_manifest(tmp_path / "final")["files"]) == ["additional_chat_templates/tool.jinja"]
    (tmp_path / "final" / "additional_chat_templates" / "tool.jinja").write_text("y")
    with pytest.raises(UserError, match=r"additional_chat_templates/tool\.jinja does not match"):
        folders.verify(tmp_path / "final")


def test_publishing_again_replaces_the_whole_folder(tmp_path):
    publish(tmp_path)
    publish(tmp_path, text="new")
    assert names(tmp_path) == ["checkpoint-5", "checkpoint-5/manifest.json", "checkpoint-5/weights"]
    folders.verify(tmp_path / "checkpoint-5")


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failed_write_leaves_only_the_old_folder(tmp_path, error):
    publish(tmp_path, text="old")

    def write(folder):
        (folder / "weights").write_text("half")
        raise error

    for step in (5, 6):
        with pytest.raises(RunFailedError if isinstance(error, OSError) else KeyboardInterrupt) as raised:
            folders.publish(tmp_path / f"checkpoint-{step}", write, {})
        if isinstance(error, OSError):
            assert f"No space left on device; '{tmp_path}/checkpoint-5' is the last good checkpoint" in str(
                raised.value
            )
    assert names(tmp_path) == ["checkpoint-5", "checkpoint-5/manifest.json", "checkpoint-5/weights"]
    assert text_of(tmp_path / "checkpoint-5") == "old"


def test_a_failure_of_the_last_rename_loses_nothing(tmp_path, monkeypatch):
    publish(tmp_path, text="old")
    rename = Path.rename

    def failing_rename(path, target):
        if Path(target).name == "checkpoint-5":
            raise OSError(5, "Input/output error")
        return rename(path, target)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", failing_rename)
        with pytest.raises(RunFailedError, match="could not be written: Input/output error"):
            publish(tmp_path, text="new")
    assert text_of(folders.find(tmp_path, "auto")) == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-5"]


def test_leftovers_of_an_earlier_process_are_not_published(tmp_path):
    leftover = tmp_path / f".checkpoint-5.tmp-{os.getpid()}"
    leftover.mkdir()
    (leftover / "stale").write_text("stale")
    assert "stale" not in names(publish(tmp_path))


def test_a_death_at_any_moment_leaves_one_whole_checkpoint(tmp_path, deaths):
    def prepare(run):
        publish(run, "checkpoint-4", text="before")
        publish(run, text="old")
        folders.point(run / "last", run / "checkpoint-5")

    found = []
    for run in deaths(tmp_path, lambda run: publish(run, text="new"), prepare):
        for word in ("last", "auto"):
            folder = folders.find(run, word)
            assert folder.name == "checkpoint-5"
            folders.verify(folder)
        found.append(text_of(folder))
        folders.remove_unfinished(run)
        assert sorted(path.name for path in run.iterdir()) == ["checkpoint-4", "checkpoint-5", "last"]
    assert found == sorted(found, reverse=True)  # old, old, ..., new
    assert set(found) == {"old", "new"}


def test_a_death_before_the_first_checkpoint_is_complete_leaves_none(tmp_path, deaths):
    found = []
    for run in deaths(tmp_path, publish, lambda run: None):
        found.append(folders.find(run, "auto") is not None)
        assert folders.is_run(run) == found[-1]
        if found[-1]:
            folders.verify(run / "checkpoint-5")
        folders.remove_unfinished(run)
        assert [path.name for path in run.iterdir()] == (["checkpoint-5"] if found[-1] else [])
    assert found == sorted(found)


def test_a_death_while_final_is_replaced_leaves_a_whole_one(tmp_path, deaths):
    prepare = lambda run: publish(run, "final", text="old")  # noqa: E731
    for run in deaths(tmp_path, lambda run: publish(run, "final", text="new"), prepare):
        folders.find(run, "auto")
        folders.verify(run / "final")
        folders.remove_unfinished(run)
        assert [path.name for path in run.iterdir()] == ["final"]


def test_a_checkpoint_is_on_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    synced = []
    rename = Path.rename

    def recording_rename(path, target):
        renamed = rename(path, target)
        expected = [*sorted(renamed.iterdir(), key=lambda each: (each.name == "manifest.json", each.name)), renamed]
        assert [each.stat().st_ino for each in expected] == synced
        return renamed

    def recording_fsync(handle):
        fsync(handle)
        synced.append(os.fstat(handle).st_ino)

    monkeypatch.setattr(os, "fsync", recording_fsync)
    monkeypatch.setattr(Path, "rename", recording_rename)
    folder = publish(tmp_path)
    # The two files, the manifest after them, the folder; and then the folder above, which holds the new name.
    assert len(synced) == 5
    assert synced[-1] == folder.parent.stat().st_ino


# Verifying


def damaged(folder):
    return pytest.raises(UserError, match=rf"^checkpoint '{folder}' is damaged: ")


def test_a_missing_file_is_named(tmp_path):
    folder = publish(tmp_path)
    (folder / "config.json").unlink()
    with damaged(folder) as error:
        folders.verify(folder)
    assert str(error.value).endswith("config.json is missing")


def test_a_cut_file_is_named_with_its_sizes(tmp_path):
    folder = publish(tmp_path)
    os.truncate(folder / "model.safetensors", 3)
    with damaged(folder) as error:
        folders.verify(folder)
    assert str(error.value).endswith("model.safetensors has 3 of 10 bytes")


@pytest.mark.parametrize("position", range(len(WEIGHTS)))
def test_a_flipped_byte_is_found_wherever_it_is(tmp_path, position):
    folder = publish(tmp_path)
    flipped = bytearray(WEIGHTS)
    flipped[position] ^= 1
    (folder / "model.safetensors").write_bytes(flipped)
    with damaged(folder) as error:
        folders.verify(folder)
    assert str(error.value).endswith("model.safetensors does not match its sha256")


def test_a_file_outside_of_the_manifest_is_ignored(tmp_path):
    folder = publish(tmp_path)
    (folder / "notes.txt").write_text("mine")
    folders.verify(folder)


@pytest.mark.parametrize(
    "manifest",
    [
        None,
        "",
        '{"step": 5, "files": {"model.safe',
        "[]",
        "null",
        '{"step": 5}',
        '{"files": ["model.safetensors"]}',
        '{"files": {"model.safetensors": null}}',
        '{"files": {"model.safetensors": {"size": 10}}}',
        '{"files": {"../../precious": {"size": 10, "sha256": "0"}}}',
        '{"files": {"/precious": {"size": 10, "sha256": "0"}}}',
        b"\xff\xfe",
    ],
)
def test_an_unreadable_manifest_is_one_line(tmp_path, manifest):
    folder = publish(tmp_path)
    (folder / "manifest.json").unlink()
    if manifest is not None:
        (folder / "manifest.json").write_bytes(manifest if isinstance(manifest, bytes) else manifest.encode())
    for check in (folders.read_manifest, folders.verify):
        with pytest.raises(UserError, match=rf"^checkpoint '{folder}' has no readable manifest\.json: \w+$"):
            check(folder)


def test_a_flipped_byte_of_a_manifest_is_refused_or_harmless(tmp_path):
    folder = publish(tmp_path, step=5)
    good = (folder / "manifest.json").read_bytes()
    refused = 0
    for position in range(len(good)):
        flipped = bytearray(good)
        flipped[position] ^= 1
        (folder / "manifest.json").write_bytes(flipped)
        try:
            folders.verify(folder)
        except UserError:
            refused += 1
    assert refused > 200  # the others change the step, or white space to other white space


# Finding


def test_checkpoints_are_in_the_order_of_their_steps(tmp_path):
    for name in ("checkpoint-9", "checkpoint-10", "checkpoint-1", "checkpoint-x", "checkpoint-5-copy", "final"):
        publish(tmp_path, name)
    assert [path.name for path in folders.checkpoints(tmp_path)] == ["checkpoint-1", "checkpoint-9", "checkpoint-10"]


def test_a_folder_that_does_not_exist_has_no_checkpoints(tmp_path):
    assert folders.checkpoints(tmp_path / "none") == []
    assert folders.find(tmp_path / "none", "auto") is None
    assert not folders.is_run(tmp_path / "none")


def test_auto_takes_the_newest_good_checkpoint(tmp_path, caplog):
    for step in (8, 9, 10, 11, 12):
        publish(tmp_path, f"checkpoint-{step}")
    (tmp_path / "checkpoint-12" / "manifest.json").unlink()
    (tmp_path / "checkpoint-11" / "manifest.json").write_text("{")
    os.truncate(tmp_path / "checkpoint-10" / "config.json", 1)
    assert folders.find(tmp_path, "auto") == tmp_path / "checkpoint-9"
    assert [record.message.split("'")[1].rpartition("-")[2] for record in caplog.records] == ["12", "11", "10"]


def test_auto_returns_none_only_without_checkpoints(tmp_path):
    assert folders.find(tmp_path, "auto") is None
    (publish(tmp_path) / "config.json").unlink()
    with pytest.raises(UserError, match=r"none of the 1 checkpoints in .* is good"):
        folders.find(tmp_path, "auto")


def test_a_folder_of_the_user_is_moved_aside(tmp_path):
    theirs = tmp_path / "checkpoint-5"
    theirs.mkdir()
    (theirs / "thesis.txt").write_text("precious")
    publish(tmp_path, "checkpoint-5")
    assert (tmp_path / "checkpoint-5.aside-1" / "thesis.txt").read_text() == "precious"
    folders.verify(theirs)


def test_clearing_ignores_registered_names_outside_of_the_run(tmp_path):
    (tmp_path / "victim.txt").write_text("alive")
    run = tmp_path / "run"
    run.mkdir()
    (run / run_folders.RUN_FILES).write_text('["../victim.txt"]')
    replace_run(run)
    assert (tmp_path / "victim.txt").read_text() == "alive"


def test_last_and_best_follow_their_links(tmp_path):
    publish(tmp_path, "checkpoint-5")
    publish(tmp_path, "checkpoint-10")
    folders.point(tmp_path / "last", tmp_path / "checkpoint-10")
    folders.point(tmp_path / "best", tmp_path / "checkpoint-5")
    assert folders.find(tmp_path, "last") == tmp_path / "checkpoint-10"
    assert folders.find(tmp_path, "best") == tmp_path / "checkpoint-5"


def test_last_and_best_without_a_checkpoint_suggest_auto(tmp_path):
    for word in ("last", "best"):
        with pytest.raises(UserError, match=rf"^--ckpt_path {word}: '{tmp_path}' has no such checkpoint; use auto "):
            folders.find(tmp_path, word)


def test_a_checkpoint_that_a_crash_left_set_aside_is_found(tmp_path):
    publish(tmp_path).rename(tmp_path / ".checkpoint-5.replaced")
    folders.point(tmp_path / "last", tmp_path / "checkpoint-5")
    assert folders.find(tmp_path, "last") == tmp_path / "checkpoint-5"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-5", "last"]


def test_a_replaced_checkpoint_is_deleted(tmp_path):
    publish(tmp_path, text="old").rename(tmp_path / ".checkpoint-5.replaced")
    publish(tmp_path, "checkpoint-6", text="new").rename(tmp_path / "checkpoint-5")
    assert text_of(folders.find(tmp_path, "auto")) == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-5"]


def test_a_run_has_a_config_or_a_checkpoint_or_final(tmp_path):
    (tmp_path / "metrics.csv").touch()
    (tmp_path / ".checkpoint-5.tmp-1").mkdir()
    assert not folders.is_run(tmp_path)
    (tmp_path / "config.yaml").touch()
    assert folders.is_run(tmp_path)
    (tmp_path / "config.yaml").unlink()
    publish(tmp_path)
    assert folders.is_run(tmp_path)


# Links


def test_a_link_moves_and_survives_a_move_of_the_run(tmp_path):
    run = tmp_path / "run"
    for step in (5, 10):
        folders.point(run / "last", publish(run, f"checkpoint-{step}"))
        assert (run / "last").resolve() == run / f"checkpoint-{step}"
    run.rename(tmp_path / "moved")
    assert folders.find(tmp_path / "moved", "last") == tmp_path / "moved" / "checkpoint-10"
    assert sorted(path.name for path in (tmp_path / "moved").iterdir()) == ["checkpoint-10", "checkpoint-5", "last"]


def test_a_link_points_at_a_checkpoint_at_every_moment(tmp_path, deaths):
    def prepare(run):
        for step in (5, 10):
            publish(run, f"checkpoint-{step}")
        folders.point(run / "last", run / "checkpoint-5")

    found = []
    for run in deaths(tmp_path, lambda run: folders.point(run / "last", run / "checkpoint-10"), prepare):
        found.append((run / "last").readlink().name)
        folders.remove_unfinished(run)
        assert sorted(path.name for path in run.iterdir()) == ["checkpoint-10", "checkpoint-5", "last"]
    assert found == sorted(found, reverse=True)
    assert set(found) == {"checkpoint-5", "checkpoint-10"}


# Pruning


def run_of(run, steps, **links):
    for step in steps:
        publish(run, f"checkpoint-{step}", text=str(step))
    for word, step in links.items():
        folders.point(run / word, run / f"checkpoint-{step}")


@pytest.mark.parametrize(
    ("keep_last", "links", "kept"),
    [
        (2, {}, [9, 10]),
        (1, {"last": 10}, [10]),
        (1, {"last": 10, "best": 2}, [2, 10]),
        (1, {"last": 9}, [10]),
        (2, {"last": 10, "best": 9}, [9, 10]),
        (99, {}, [1, 2, 9, 10]),
    ],
)
def test_pruning_keeps_the_newest_and_linked_checkpoints(tmp_path, keep_last, links, kept):
    run_of(tmp_path, (1, 2, 9, 10), **links)
    folders.prune(tmp_path, keep_last)
    assert [path.name for path in folders.checkpoints(tmp_path)] == [f"checkpoint-{step}" for step in kept]
    assert {path.name for path in tmp_path.iterdir()} == {f"checkpoint-{step}" for step in kept} | set(links)


def test_pruning_leaves_final_and_other_files(tmp_path):
    run_of(tmp_path, (1, 2))
    publish(tmp_path, "final")
    (tmp_path / "notes.txt").write_text("mine")
    folders.prune(tmp_path, 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-2", "final", "notes.txt"]


def test_a_death_while_pruning_leaves_no_half_a_checkpoint(tmp_path, deaths):
    prepare = lambda run: run_of(run, (1, 2, 3, 4), best=1, last=4)  # noqa: E731
    for run in deaths(tmp_path, lambda run: folders.prune(run, 1), prepare):
        left = folders.checkpoints(run)
        assert {path.name for path in left} >= {"checkpoint-1", "checkpoint-4"}
        for folder in left:
            folders.verify(folder)
        folders.remove_unfinished(run)
        folders.prune(run, 1)
        assert sorted(path.name for path in run.iterdir()) == ["best", "checkpoint-1", "checkpoint-4", "last"]


def test_only_unfinished_files_are_removed(tmp_path):
    publish(tmp_path)
    folders.point(tmp_path / "last", tmp_path / "checkpoint-5")
    (tmp_path / ".checkpoint-6.tmp-123").mkdir()
    (tmp_path / ".checkpoint-6.tmp-123" / "model.safetensors").write_bytes(b"half")
    (tmp_path / ".best.tmp-123").symlink_to("checkpoint-5")
    (tmp_path / ".metrics.csv.tmp-123").write_text("half")
    for ours in ("evaluation/step-5/.metrics.json.tmp-123", "report/.index.html.tmp-123"):
        (tmp_path / ours).parent.mkdir(parents=True)
        (tmp_path / ours).write_text("half")
    for mine in ("notes.txt", "copy.tmp-1", ".hidden", "report/.hidden", "other-run/.metrics.csv.tmp-123"):
        (tmp_path / mine).parent.mkdir(exist_ok=True)
        (tmp_path / mine).write_text("mine")
    folders.remove_unfinished(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        ".hidden",
        "checkpoint-5",
        "copy.tmp-1",
        "evaluation",
        "last",
        "notes.txt",
        "other-run",
        "report",
    ]
    assert [path.name for path in tmp_path.glob("evaluation/*/*")] == []
    assert [path.name for path in tmp_path.glob("report/*")] == [".hidden"]
    assert [path.name for path in tmp_path.glob("other-run/*")] == [".metrics.csv.tmp-123"]
    folders.verify(tmp_path / "checkpoint-5")


# Clearing a run


def registered(run):
    return json.loads((run / "run_files.json").read_text())


def test_registered_files_are_unique_and_ordered(tmp_path):
    run = tmp_path / "new" / "run"
    for name in ("config.yaml", "metrics.csv", "config.yaml", "evaluation/step-5/metrics.json"):
        run_folders.register_file(run, name)
    assert registered(run) == ["config.yaml", "metrics.csv", "evaluation/step-5/metrics.json"]
    assert names(run) == ["run_files.json"]


def test_a_death_while_registering_keeps_earlier_files(tmp_path, deaths):
    for run in deaths(
        tmp_path, lambda run: run_folders.register_file(run, "b"), lambda run: run_folders.register_file(run, "a")
    ):
        assert registered(run) in (["a"], ["a", "b"])
        folders.remove_unfinished(run)
        assert names(run) == ["run_files.json"]


def whole_run(run):
    """Makes a run with everything that one can have."""
    run_of(run, (5, 10), best=5, last=10)

    def write_final(folder):
        (folder / "additional_chat_templates").mkdir()
        (folder / "additional_chat_templates" / "tool.jinja").write_text("x")
        (folder / "model.safetensors").write_bytes(WEIGHTS)

    folders.publish(run / "final", write_final, {})
    for name in ("config.yaml", "evaluation/step-5/metrics.json", "evaluation/step-5/predictions.jsonl"):
        run_folders.register_file(run, name)
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text("ours")
    (run / ".checkpoint-15.tmp-123").mkdir()


def users_own_files(run):
    mine = (
        "notes.txt",
        "checkpoint-5/notes.txt",
        "evaluation/plot.png",
        "final/card/README.md",
        "checkpoint-old/model",
    )
    for name in mine:
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text("mine")
    return mine


def test_clearing_deletes_a_run_to_the_last_file(tmp_path):
    whole_run(tmp_path)
    replace_run(tmp_path)
    assert names(tmp_path) == []


def test_clearing_keeps_files_outside_every_manifest(tmp_path):
    whole_run(tmp_path)
    mine = users_own_files(tmp_path)
    replace_run(tmp_path)
    assert sorted(path for path in names(tmp_path) if (tmp_path / path).is_file()) == sorted(mine)
    assert not (tmp_path / "last").is_symlink()
    assert not (tmp_path / "checkpoint-10").exists()


def test_clearing_a_folder_without_a_run_deletes_nothing(tmp_path):
    mine = users_own_files(tmp_path)
    (tmp_path / "last").write_text("mine")
    (tmp_path / "checkpoint-5" / "model.safetensors").write_bytes(WEIGHTS)
    replace_run(tmp_path)
    found = sorted(path for path in names(tmp_path) if (tmp_path / path).is_file())
    assert found == sorted([*mine, "last", "checkpoint-5/model.safetensors"])


def test_clearing_keeps_folders_with_an_unreadable_manifest(tmp_path, caplog):
    run_of(tmp_path, (5, 10, 15))
    (tmp_path / "checkpoint-10" / "manifest.json").write_text('{"files": ')
    replace_run(tmp_path)
    assert names(tmp_path) == ["checkpoint-10", "checkpoint-10/manifest.json", "checkpoint-10/weights"]
    (warning,) = caplog.records
    assert f"checkpoint '{tmp_path}/checkpoint-10' has no readable manifest.json" in warning.message


def test_clearing_never_reaches_outside_of_the_checkpoint(tmp_path):
    precious = tmp_path / "precious"
    precious.write_text("mine")
    for step, name in ((5, "../../precious"), (10, str(precious))):
        folder = publish(tmp_path / "run", f"checkpoint-{step}")
        (folder / "manifest.json").write_text(json.dumps({"files": {name: {"size": 4, "sha256": "0"}}}))
    replace_run(tmp_path / "run")
    assert precious.read_text() == "mine"


def test_clearing_continues_after_a_death_and_keeps_user_files(tmp_path, deaths):
    def prepare(run):
        whole_run(run)
        users_own_files(run)

    for run in deaths(tmp_path, replace_run, prepare):
        replace_run(run)
        assert sorted(path for path in names(run) if (run / path).is_file()) == [
            "checkpoint-5/notes.txt",
            "checkpoint-old/model",
            "evaluation/plot.png",
            "final/card/README.md",
            "notes.txt",
        ]
        assert not (run / "checkpoint-10").exists()
        assert not (run / "evaluation" / "step-5").exists()
        shutil.rmtree(run)


def test_a_file_that_is_gone_already_does_no_harm(tmp_path):
    whole_run(tmp_path)
    (tmp_path / "config.yaml").unlink()
    (tmp_path / "checkpoint-5" / "weights").unlink()
    replace_run(tmp_path)
    assert names(tmp_path) == []
