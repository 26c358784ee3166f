"""A folder is whole or not there, and nothing of the dead stays."""

import multiprocessing
import os
import signal

import pytest

from sft_lightning.system.folder_beside import folder_beside, publish, remove_unfinished


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_published_folder_has_what_was_put_in_and_no_lock(tmp_path):
    with folder_beside(tmp_path / "new" / "store") as temporary:
        (temporary / "a").touch()
        publish(temporary, tmp_path / "new" / "store")
    assert names(tmp_path / "new") == ["store"]
    assert names(tmp_path / "new" / "store") == ["a"]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_failure_leaves_nothing(tmp_path, error):
    def fill():
        with folder_beside(tmp_path / "store") as temporary:
            (temporary / "a").touch()
            raise error

    with pytest.raises(error):
        fill()
    assert names(tmp_path) == []


def test_a_folder_that_holds_something_is_not_replaced(tmp_path):
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "theirs").touch()
    with folder_beside(tmp_path / "store") as temporary, pytest.raises(OSError, match="not empty"):
        publish(temporary, tmp_path / "store")
    assert names(tmp_path) == ["store"]
    assert names(tmp_path / "store") == ["theirs"]


def fill_for_ever(folder, filling):
    with folder_beside(folder) as temporary:
        (temporary / "a").write_bytes(bytes(1000))
        filling.set()
        signal.pause()


def test_what_a_killed_process_left_is_removed_and_what_a_living_one_fills_is_not(tmp_path):
    folder = tmp_path / "store"
    context = multiprocessing.get_context("fork")
    processes = []
    for _ in range(2):
        filling = context.Event()
        processes.append(context.Process(target=fill_for_ever, args=(folder, filling)))
        processes[-1].start()
        assert filling.wait(30)
    killed, living = processes
    os.kill(killed.pid, signal.SIGKILL)
    killed.join()
    assert len(names(tmp_path)) == 2
    remove_unfinished(tmp_path / "another")
    assert len(names(tmp_path)) == 2
    remove_unfinished(folder)
    assert len(names(tmp_path)) == 1
    assert names(next(tmp_path.iterdir())) == ["a", "lock"]
    living.kill()
    living.join()
    with folder_beside(folder):
        assert len(names(tmp_path)) == 1
    assert names(tmp_path) == []
