"""Hold a lock on a folder, so that no second process writes to it."""

import fcntl
import os
import socket
from pathlib import Path
from typing import BinaryIO

from sft_lightning.errors import UserError

LOCK = ".lock"
_held: dict[Path, BinaryIO] = {}


def lock_folder(folder: Path) -> None:
    """Locks a folder until :func:`unlock_folders` or until this process ends. Locking it again does nothing.

    The lock is advisory, and ignored where the file system has no locks.

    Args:
        folder: Created where missing.

    Raises:
        UserError: If another process holds the lock.
        OSError: If the folder cannot be written.
    """
    path = folder.resolve() / LOCK
    if path in _held:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        file = path.open("a+b")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            owner = file.read().decode(errors="replace")
            file.close()
            raise UserError(
                f"output_dir '{folder}' is in use by {owner or 'another process'}: wait for its end, or name another "
                "folder"
            ) from None
        except OSError:
            pass
        # Whoever held the lock may have deleted the file between the two calls.
        if _is_at(file, path):
            break
        file.close()
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}".encode())
    file.flush()
    _held[path] = file


def holds_lock(folder: Path) -> bool:
    """Returns whether this process locked a folder."""
    return folder.resolve() / LOCK in _held


def unlock_folders() -> None:
    """Releases all locks that this process holds."""
    while _held:
        path, file = _held.popitem()
        path.unlink(missing_ok=True)
        file.close()


def _is_at(file: BinaryIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _forget() -> None:
    # A lock belongs to the open file, which a forked child would otherwise keep open, and locked, after its parent's
    # death.
    for file in _held.values():
        file.close()
    _held.clear()


os.register_at_fork(after_in_child=_forget)
