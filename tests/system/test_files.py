"""Test that files, folders and links are whole or absent; compare digests with coreutils' sha256sum."""

import errno
import multiprocessing
import os
import signal
import stat

import pytest

from sft_lightning.system.files import (
    atomic_folder,
    file_digest,
    remove_atomically,
    symlink_atomically,
    unfinished,
    value_digest,
    write_atomically,
)

OF_ABC = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def names(folder):
    return sorted(path.name for path in folder.iterdir())


# Files


def test_a_file_appears_when_the_block_ends(tmp_path):
    path = tmp_path / "new" / "rows.jsonl"
    with write_atomically(path) as file:
        file.write("a\n")
        assert not path.exists()
        assert names(tmp_path / "new") == [temporary.name for temporary in unfinished(path.parent, "rows.*")]
    assert path.read_bytes() == b"a\n"
    assert names(tmp_path / "new") == ["rows.jsonl"]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_failed_write_keeps_the_old_file_and_nothing_else(tmp_path, error):
    path = tmp_path / "rows.jsonl"
    path.write_text("old")

    def write():
        with write_atomically(path) as file:
            file.write("half")
            raise error

    with pytest.raises(error):
        write()
    assert path.read_text() == "old"
    assert names(tmp_path) == ["rows.jsonl"]


def test_bytes_surrogates_and_line_ends_are_written_as_asked(tmp_path):
    with write_atomically(tmp_path / "bytes", "wb") as file:
        file.write(b"\xff\r\n")
    with write_atomically(tmp_path / "text", newline="") as file:
        file.write("\u20ac\ud800\r\n")
    assert (tmp_path / "bytes").read_bytes() == b"\xff\r\n"
    assert (tmp_path / "text").read_bytes() == b"\xe2\x82\xac\\ud800\r\n"


def test_a_written_file_has_the_mode_of_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        with write_atomically(tmp_path / "a") as file:
            file.write("a")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o640


def test_a_file_is_on_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    synced = []

    def recording_fsync(handle):
        synced.append((os.fstat(handle).st_ino, (tmp_path / "a").exists(), os.fstat(handle).st_size))

    monkeypatch.setattr(os, "fsync", recording_fsync)
    with write_atomically(tmp_path / "a") as file:
        file.write("abc")
    assert synced[0] == ((tmp_path / "a").stat().st_ino, False, 3)
    assert synced[1][:2] == (tmp_path.stat().st_ino, True)
    assert len(synced) == 2


# Folders


def test_a_folder_appears_with_its_content_and_no_lock(tmp_path):
    with atomic_folder(tmp_path / "new" / "store") as temporary:
        (temporary / "a").touch()
        assert not (tmp_path / "new" / "store").exists()
    assert names(tmp_path / "new") == ["store"]
    assert names(tmp_path / "new" / "store") == ["a"]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_failed_folder_leaves_nothing(tmp_path, error):
    def fill():
        with atomic_folder(tmp_path / "store") as temporary:
            (temporary / "a").touch()
            raise error

    with pytest.raises(error):
        fill()
    assert names(tmp_path) == []


def fill(folder, *make_way):
    with atomic_folder(folder, *make_way) as temporary:
        (temporary / "ours").touch()


def test_a_folder_that_holds_something_is_not_replaced(tmp_path):
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "theirs").touch()
    with pytest.raises(OSError, match="not empty"):
        fill(tmp_path / "store")
    assert names(tmp_path) == ["store"]
    fill(tmp_path / "store", lambda: False)
    assert names(tmp_path) == ["store"]
    assert names(tmp_path / "store") == ["theirs"]


def test_the_caller_may_make_way_for_a_folder(tmp_path):
    (tmp_path / "store").write_text("a file")

    def make_way():
        (tmp_path / "store").rename(tmp_path / "aside")
        return True

    fill(tmp_path / "store", make_way)
    assert names(tmp_path) == ["aside", "store"]
    assert names(tmp_path / "store") == ["ours"]


def test_other_errors_of_the_rename_do_not_make_way(tmp_path, monkeypatch):
    rename = type(tmp_path).rename

    def failing_rename(path, target):
        if target == tmp_path / "store":
            raise OSError(errno.EIO, "Input/output error")
        return rename(path, target)

    monkeypatch.setattr(type(tmp_path), "rename", failing_rename)
    with pytest.raises(OSError, match="Input/output error"):
        fill(tmp_path / "store", lambda: pytest.fail("made way"))
    assert names(tmp_path) == []


def fill_for_ever(folder, filling):
    with atomic_folder(folder) as temporary:
        (temporary / "a").write_bytes(bytes(1000))
        filling.set()
        signal.pause()


def test_attempts_of_killed_processes_are_removed(tmp_path):
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
    fill(tmp_path / "another")
    assert len(names(tmp_path)) == 3
    fill(folder)
    assert names(tmp_path)[1:] == ["another", "store"]
    (left,) = unfinished(tmp_path, "store")
    assert names(left) == ["content", "lock"]
    assert names(left / "content") == ["a"]
    living.kill()
    living.join()
    fill(folder, lambda: False)
    assert names(tmp_path) == ["another", "store"]


# Links and removal


def test_a_link_replaces_a_link_and_leaves_no_other(tmp_path):
    for name in ("a", "b"):
        symlink_atomically(tmp_path / "last", name)
    assert str((tmp_path / "last").readlink()) == "b"
    assert names(tmp_path) == ["last"]


def test_a_link_does_not_replace_a_folder(tmp_path):
    (tmp_path / "last").mkdir()
    with pytest.raises(OSError, match="directory"):
        symlink_atomically(tmp_path / "last", "a")
    assert names(tmp_path) == ["last"]


def test_a_removed_folder_loses_its_name_before_its_files(tmp_path, monkeypatch):
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "a").touch()

    def die(folder):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("shutil.rmtree", die)
        with pytest.raises(KeyboardInterrupt):
            remove_atomically(tmp_path / "store")
    (left,) = unfinished(tmp_path, "store")
    assert names(tmp_path) == [left.name]
    assert names(left) == ["a"]


# Digests


def test_digest_of_a_file(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    assert file_digest(tmp_path / "a") == OF_ABC


def test_digest_of_a_value_ignores_the_order_of_keys():
    assert value_digest({"b": 1, "a": [None]}) == value_digest({"a": [None], "b": 1})
    assert value_digest("") == "12ae32cb1ec02d01eda3581b127c1fee3b0dc53572ed6baf239721a03d82e126"  # of two quotes
