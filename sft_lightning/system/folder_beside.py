"""A folder that is filled beside its place and renamed when it is whole; what dead processes left of theirs goes."""

import contextlib
import fcntl
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

_LOCK = "lock"


@contextlib.contextmanager
def folder_beside(folder: Path) -> Iterator[Path]:
    """A new folder with a name of its own on the same disk, gone afterwards unless it was renamed.

    Those that others left for the same place are removed, if their makers are gone: each holds a lock on a file in its
    own, which the system takes from it when it dies.

    Raises:
        OSError: If the folder cannot be written.
    """
    remove_unfinished(folder)
    temporary = folder.with_name(f"{folder.name}.{secrets.token_hex(4)}.tmp")
    temporary.mkdir(parents=True)
    try:
        # Under its name it is locked from the first moment on.
        with (temporary / f"{_LOCK}.new").open("wb") as lock:
            with contextlib.suppress(OSError):  # a file system without locks: what a killed process left stays
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.rename(lock.name, temporary / _LOCK)  # noqa: PTH104
            yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def publish(temporary: Path, folder: Path) -> None:
    """Gives a folder from :func:`folder_beside` its name.

    Raises:
        OSError: If there is such a folder already that is not empty, or it cannot be renamed.
    """
    for name in (_LOCK, f"{_LOCK}.new"):
        (temporary / name).unlink(missing_ok=True)
    temporary.rename(folder)


def remove_unfinished(folder: Path) -> None:
    """Removes what processes that died left of their attempts at a folder; those of the living are left alone."""
    for lock_path in folder.parent.glob(f"{folder.name}.*.tmp/{_LOCK}"):
        with contextlib.suppress(OSError), lock_path.open("rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(lock_path.parent)
