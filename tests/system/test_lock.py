"""Test the lock on a folder across processes."""

import os
import re
import socket
import subprocess
import sys

import pytest

from sft_lightning.cli.main import main
from sft_lightning.errors import UserError
from sft_lightning.system.lock import lock_folder, unlock_folders

HOLD = """
import sys
from pathlib import Path
from sft_lightning.system.lock import lock_folder
lock_folder(Path(sys.argv[1]))
print("locked", flush=True)
sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def _unlocked():
    yield
    unlock_folders()


@pytest.fixture
def holder(tmp_path):
    program = [sys.executable, "-c", HOLD, str(tmp_path / "run")]
    with subprocess.Popen(program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "locked\n"
        yield process
        process.kill()


def test_a_second_process_is_refused_with_the_owner(tmp_path, holder):
    owner = re.escape(f"process {holder.pid} on {socket.gethostname()}")
    with pytest.raises(UserError, match=rf"^output_dir '{tmp_path}/run' is in use by {owner}: wait for its end"):
        lock_folder(tmp_path / "run")


@pytest.mark.parametrize("options", [(), ("--ckpt_path", "auto"), ("--overwrite",)])
def test_a_second_fit_in_a_folder_is_refused(command, tmp_path, holder, options, capsys, note_fault):
    (tmp_path / "run" / "config.yaml").write_text("of the first fit")
    assert main([*command, *options]) == 2
    assert f"output_dir '{tmp_path}/run' is in use by process {holder.pid} on " in capsys.readouterr().err
    assert {path.name for path in (tmp_path / "run").iterdir()} == {".lock", "config.yaml"}
    note_fault(
        "two fits in one folder at once",
        provoked="a second fit, with --ckpt_path auto and with --overwrite, while a process holds the folder",
        outcome="exit 2 before a model is loaded; the line names the process and its machine; no file is touched",
        tries=3,
    )


def test_the_death_of_the_owner_frees_the_folder(tmp_path, holder):
    holder.kill()
    holder.wait()
    lock_folder(tmp_path / "run")
    lock_folder(tmp_path / "run")
    assert (tmp_path / "run" / ".lock").read_text() == f"process {os.getpid()} on {socket.gethostname()}"
    unlock_folders()
    assert list((tmp_path / "run").iterdir()) == []


def test_a_forked_child_does_not_hold_its_parents_lock(tmp_path):
    lock_folder(tmp_path)
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(write)
        os.read(read, 1)
        os._exit(0)
    unlock_folders()
    lock_folder(tmp_path)  # while the child lives
    os.close(write)
    os.waitpid(child, 0)
