"""Register the files that a run writes, so that --overwrite deletes those and nothing else."""

import errno
import json
import logging
import os
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from sft_lightning.checkpointing import folder as folders
from sft_lightning.checkpointing.run_state import RUN_STATE, Lineage, read_run_state
from sft_lightning.errors import UserError
from sft_lightning.system.files import remove_atomically, write_atomically
from sft_lightning.system.lock import lock_folder

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

logger = logging.getLogger(__name__)

RUN_FILES = "run_files.json"
# The run that --overwrite replaces: while its files are on their way, and when all are there.
_MOVING, _REPLACED = ".replaced-run.moving", ".replaced-run"


def starts_new_run(resumed: str | None, run: Path) -> bool:
    """Returns whether a run starts in this folder, fresh or from a checkpoint of another folder."""
    return resumed is None or Path(resumed).resolve().parent != run.resolve()


def run_folder(trainer: "Trainer", output_dir: str | None) -> Path:
    """Returns the folder of a run: ``output_dir`` if given, else that of the checkpoints, else the Trainer's."""
    folder = output_dir or getattr(trainer.checkpoint_callback, "dirpath", None) or trainer.default_root_dir
    return Path(folder).expanduser()


def open_run_folder(run: Path) -> None:
    """Locks the folder of a run for this process, and clears up what a killed process left in it.

    Raises:
        UserError: If another process writes to the folder, or it cannot be written.
    """
    try:
        lock_folder(run)
        folders.remove_unfinished(run)
        if (run / _MOVING).is_dir():
            put_back(run)
        if (run / _REPLACED).is_dir() and _has_own_checkpoint(run):
            delete_replaced(run)
    except OSError as error:
        raise UserError(f"output_dir '{run}' cannot be written: {error.strerror}") from error


def begin_new_run(run: Path, *, overwrite: bool) -> None:
    """Makes room for a new run in a folder that :func:`open_run_folder` locked.

    The files of an old run move to a hidden folder in it. :func:`delete_replaced` deletes them once the new run has a
    checkpoint; :func:`put_back` brings them back if it fails before.

    Raises:
        UserError: If the folder holds a run and ``overwrite`` is False.
    """
    put_back(run)
    if overwrite:
        _set_aside(run)
    else:
        refuse_other_run(run)


def refuse_other_run(run: Path) -> None:
    """Raises UserError if the folder holds a run."""
    if folders.is_run(run):
        raise UserError(
            f"output_dir '{run}' holds another run: pass --ckpt_path auto to go on with it, --overwrite to replace "
            "it, or name another folder"
        )


def put_back(run: Path) -> None:
    """Brings back the run that a new one without a checkpoint replaced, and deletes what the new one wrote."""
    if (run / _REPLACED).is_dir():
        remove_registered(run, lambda name: True)
        for name in (RUN_FILES, RUN_STATE):
            (run / name).unlink(missing_ok=True)
        (run / _REPLACED).rename(run / _MOVING)
    for path in sorted((run / _MOVING).rglob("*")):
        if path.is_symlink() or not path.is_dir():
            _move(path.relative_to(run / _MOVING).as_posix(), run / _MOVING, run)
    shutil.rmtree(run / _MOVING, ignore_errors=True)


def delete_replaced(run: Path) -> None:
    """Deletes the run that a new one replaced."""
    if (run / _REPLACED).is_dir():
        remove_atomically(run / _REPLACED)


def register_file(run: Path, name: str) -> None:
    """Records that the run wrote a file of this relative name, so that ``clear`` may delete it."""
    names = _registered(run)
    if name not in names:
        _write_registered(run, [*names, name])


def remove_registered(run: Path, is_stale: Callable[[str], bool]) -> None:
    """Deletes the registered files for whose relative names ``is_stale`` returns True."""
    names = _registered(run)
    stale = [name for name in names if is_stale(name)]
    for name in stale:
        with suppress(FileNotFoundError, IsADirectoryError), _parent(run, name) as parent:
            os.unlink(_last(name), dir_fd=parent)
        _remove_empty((run / name).parent, below=run)
    if stale:
        _write_registered(run, [name for name in names if name not in stale])


def _has_own_checkpoint(run: Path) -> bool:
    """Returns whether the current attempt has written a checkpoint."""
    state = read_run_state(run)
    attempt = None if state is None else state.lineage.attempts[-1]
    for folder in folders.checkpoints(run):
        with suppress(UserError):
            if Lineage.of(folders.read_manifest(folder)).attempts[-1] == attempt:
                return True
    return False


def _set_aside(run: Path) -> None:
    """Moves a run aside: registered files and those in its manifests. Other files stay."""
    for name in _files_of_run(run):
        _move(name, run, run / _MOVING)
    if (run / _MOVING).is_dir():
        (run / _MOVING).rename(run / _REPLACED)


def _files_of_run(run: Path) -> list[str]:
    names = _registered(run)
    for folder in [*folders.checkpoints(run), run / "final"]:
        if (folder / folders.MANIFEST).is_file():
            try:
                files = [*folders.read_manifest(folder)["files"], folders.MANIFEST]
                names += [f"{folder.name}/{name}" for name in files]
            except UserError as error:
                logger.warning("%s; it stays", error)
    links = [name for name in ("last", "best") if (run / name).is_symlink()]
    # The state of the run is last: without it, what has not been moved yet would count as this attempt's.
    return [*names, *links, RUN_FILES, RUN_STATE]


def _registered(run: Path) -> list[str]:
    """Returns the registered names that lie below the run. Warns if they cannot be read."""
    try:
        names = json.loads((run / RUN_FILES).read_text(encoding="utf-8"))
        if not isinstance(names, list):
            raise ValueError(names)
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        logger.warning(
            "'%s' is damaged (%s): files that it named are no longer known as the run's",
            run / RUN_FILES,
            type(error).__name__,
        )
        return []
    return [name for name in names if isinstance(name, str) and _last(name) and not folders.escapes_folder(name)]


def _write_registered(run: Path, names: list[str]) -> None:
    with write_atomically(run / RUN_FILES) as file:
        json.dump(names, file, indent=2)


def _move(name: str, source: Path, target: Path) -> None:
    """Moves a file to the same place in another folder. What is no file, or lies behind a link, stays."""
    with suppress(FileNotFoundError), _parent(source, name) as old:
        if stat.S_ISDIR(os.stat(_last(name), dir_fd=old, follow_symlinks=False).st_mode):
            return
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        with _parent(target, name) as new:
            os.rename(_last(name), _last(name), src_dir_fd=old, dst_dir_fd=new)
    _remove_empty((source / name).parent, below=source)


@contextmanager
def _parent(top: Path, name: str) -> Iterator[int]:
    """Opens the folder of a file below ``top``; it follows no link on its way there.

    Raises:
        FileNotFoundError: If there is no such folder, or only a link to one.
    """
    handle = os.open(top, os.O_RDONLY | os.O_DIRECTORY)
    try:
        for part in Path(name).parts[:-1]:
            try:
                below = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=handle)
            except OSError as error:
                if error.errno not in (errno.ELOOP, errno.ENOTDIR):
                    raise
                raise FileNotFoundError(name) from None
            os.close(handle)
            handle = below
        yield handle
    finally:
        os.close(handle)


def _last(name: str) -> str:
    return Path(name).name


def _remove_empty(folder: Path, below: Path) -> None:
    """Deletes a folder, and those above it, as far as they are empty."""
    with suppress(OSError):
        while folder != below and not folder.is_symlink():
            folder.rmdir()
            folder = folder.parent
