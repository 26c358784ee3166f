"""Write files, folders and links atomically, and hash files and values.

Whenever the process dies, a path holds its old content or its new content and never a part of it. New content is
written under a temporary name in the same folder, flushed to the disk and then renamed. Names of temporary files and
folders match ``.NAME.tmp-*``; :func:`unfinished` finds those that a dead process left.
"""

import errno
import fcntl
import glob
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, Literal

from sft_lightning.errors import UserError

_LOCK = "lock"
_CONTENT = "content"
# How the system reports that a folder cannot take a name because something else has it.
_NAME_IS_TAKEN = (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR)


def user_path(path: str | Path) -> str:
    """Returns a path that a user gave, with a leading ``~`` replaced by the home folder.

    Raises:
        UserError: If there is no such user, or no file system can hold the path.
    """
    try:
        expanded = Path(path).expanduser()
        expanded.exists()
    except (RuntimeError, ValueError) as error:
        raise UserError(f"path {str(path)!r} cannot be used: {error}") from None
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise UserError(f"path '{str(path)[:60]}...' is too long: it has {len(str(path))} characters") from None
    return str(expanded) if str(path).startswith("~") else str(path)


@contextmanager
def write_atomically(path: Path, mode: Literal["w", "wb"] = "w", *, newline: str | None = None) -> Iterator[IO[Any]]:
    """Opens a file that replaces ``path`` when the block ends without an error, and is deleted otherwise.

    Args:
        path: The file to write. Its folder is created where missing.
        mode: Text is UTF-8. A lone surrogate, which UTF-8 cannot hold, is written as a backslash escape, valid in JSON.
        newline: As in ``open``.

    Raises:
        OSError: If the file cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary_name(path)
    as_text = {"encoding": "utf-8", "errors": "backslashreplace", "newline": newline} if mode == "w" else {}
    try:
        with temporary.open(mode, **as_text) as file:  # type: ignore[call-overload]
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


@contextmanager
def atomic_folder(path: Path, make_way: Callable[[], bool] | None = None) -> Iterator[Path]:
    """Yields an empty folder that becomes ``path`` when the block ends without an error, and is deleted otherwise.

    Flush the files in it with :func:`sync`; the folder itself is flushed here. Several processes may race for one
    path. What dead processes left of their attempts is deleted first: each attempt holds a lock while its process
    lives.

    Args:
        path: The final place. Its parent is created where missing.
        make_way: Called if something that is not an empty folder has the place. It returns True after it made way,
            and False to keep what is there and drop the new folder. None raises the error.

    Raises:
        OSError: If the folder cannot be written, or the place is taken and ``make_way`` is None.
    """
    _remove_abandoned(path)
    temporary = _temporary_name(path)
    temporary.mkdir(parents=True)
    try:
        with _locked(temporary):
            content = temporary / _CONTENT
            content.mkdir()
            yield content
            sync(content)
            _rename(content, path, make_way)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    sync(path.parent)


def symlink_atomically(link: Path, target: str) -> None:
    """Makes ``link`` a symbolic link to a target relative to its folder; an earlier link is replaced."""
    temporary = _temporary_name(link)
    try:
        temporary.symlink_to(target)
        temporary.replace(link)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync(link.parent)


def remove_atomically(folder: Path) -> None:
    """Deletes a folder, which is whole as long as it has its name."""
    temporary = _temporary_name(folder)
    folder.rename(temporary)
    shutil.rmtree(temporary)


def unfinished(folder: Path, pattern: str) -> Iterator[Path]:
    """Returns the temporary files and folders of paths below ``folder`` that match a glob pattern such as ``a/*.b``."""
    parents, slash, name = pattern.rpartition("/")
    return folder.glob(f"{parents}{slash}.{name}.tmp-*")


def sync(path: Path) -> None:
    """Flushes a file, or the list of names in a folder, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def file_digest(file: Path) -> str:
    """Returns the SHA-256 of a file's bytes, in hexadecimal."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def value_digest(value: Any) -> str:
    """Returns the SHA-256, in hexadecimal, of a value that JSON can hold. The order of keys does not matter."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _temporary_name(path: Path) -> Path:
    return path.with_name(f".{path.name}.tmp-{secrets.token_hex(4)}")


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Holds a lock on a file in ``folder``. The system releases it when the process dies."""
    # The file gets its final name only after it is locked, so that no other process finds it unlocked.
    with (folder / f"{_LOCK}.new").open("wb") as lock:
        with suppress(OSError):  # on a file system without locks, what a killed process left stays
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.rename(lock.name, folder / _LOCK)  # noqa: PTH104
        yield


def _rename(content: Path, path: Path, make_way: Callable[[], bool] | None) -> None:
    while True:
        try:
            content.rename(path)
            return
        except OSError as error:
            if make_way is None or error.errno not in _NAME_IS_TAKEN:
                raise
        if not make_way():
            return


def _remove_abandoned(path: Path) -> None:
    """Deletes the attempts at a folder whose processes are dead. It leaves those of living processes alone."""
    for temporary in unfinished(path.parent, glob.escape(path.name)):
        with suppress(OSError), (temporary / _LOCK).open("r+b") as lock:  # NFS locks only what is open for writing
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(temporary)
