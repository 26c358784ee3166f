"""Register the files that a run writes, so that --overwrite deletes those and nothing else."""

import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from sft_lightning.checkpointing import folder as folders
from sft_lightning.errors import UserError
from sft_lightning.system.files import write_atomically

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

logger = logging.getLogger(__name__)

RUN_FILES = "run_files.json"


def starts_new_run(resumed: str | None, run: Path) -> bool:
    """Returns whether a run starts in this folder, fresh or from a checkpoint of another folder."""
    return resumed is None or Path(resumed).resolve().parent != run.resolve()


def run_folder(trainer: "Trainer", output_dir: str | None) -> Path:
    """Returns the folder of a run: ``output_dir`` if given, else that of the checkpoints, else the Trainer's."""
    folder = output_dir or getattr(trainer.checkpoint_callback, "dirpath", None) or trainer.default_root_dir
    return Path(folder).expanduser()


def prepare_run_folder(run: Path, *, overwrite: bool) -> None:
    """Prepares a folder for a new run.

    Raises:
        UserError: If the folder holds a run and ``overwrite`` is False, or cannot be written.
    """
    if run.exists() and folders.is_run(run):
        if not overwrite:
            raise UserError(
                f"output_dir '{run}' holds another run: pass --ckpt_path auto to go on with it, --overwrite to replace "
                "it, or name another folder"
            )
        clear(run)
    try:
        run.mkdir(parents=True, exist_ok=True)
        probe = run / f".write-probe-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"output_dir '{run}' cannot be written: {error.strerror}") from error


def register_file(run: Path, name: str) -> None:
    """Records that the run wrote a file of this relative name, so that ``clear`` may delete it."""
    names = _registered(run)
    if name not in names:
        _write_registered(run, [*names, name])


def remove_registered(run: Path, is_stale: Callable[[str], bool]) -> None:
    """Deletes the registered files for whose relative names ``is_stale`` returns True."""
    names = _registered(run)
    stale = [name for name in names if is_stale(name) and not folders.escapes_folder(name)]
    for name in stale:
        _unlink(run / name, below=run)
    if stale:
        _write_registered(run, [name for name in names if name not in stale])


def clear(run: Path) -> None:
    """Deletes a run: registered files, files in its manifests, and folders that are empty then. Other files stay."""
    folders.remove_unfinished(run)
    for folder in [*folders.checkpoints(run), run / "final"]:
        if (folder / folders.MANIFEST).is_file():
            try:
                named = folders.read_manifest(folder)["files"]
            except UserError as error:
                logger.warning("%s; not deleted", error)
                continue
            for name in [*named, folders.MANIFEST]:
                _unlink(folder / name, below=run)
        _remove_empty(folder, below=run)
    for name in _registered(run):
        if not folders.escapes_folder(name):
            _unlink(run / name, below=run)
    for name in ("last", "best"):
        if (run / name).is_symlink():
            (run / name).unlink()
    (run / RUN_FILES).unlink(missing_ok=True)


def _registered(run: Path) -> list[str]:
    try:
        return [str(name) for name in json.loads((run / RUN_FILES).read_text(encoding="utf-8"))]
    except (OSError, ValueError):
        return []


def _write_registered(run: Path, names: list[str]) -> None:
    with write_atomically(run / RUN_FILES) as file:
        json.dump(names, file, indent=2)


def _unlink(path: Path, below: Path) -> None:
    path.unlink(missing_ok=True)
    _remove_empty(path.parent, below)


def _remove_empty(folder: Path, below: Path) -> None:
    while folder != below and folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()
        folder = folder.parent
