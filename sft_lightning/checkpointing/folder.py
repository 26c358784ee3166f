"""Write checkpoint folders atomically, verify them before use, and find them as ``auto``, ``last`` or ``best``.

checkpoints/sft/
  checkpoint-500/    a Hugging Face model folder, trainer_state.ckpt, manifest.json (written last)
  last -> checkpoint-1500    best -> checkpoint-1000
  final/             a model folder
  run_files.json     the other files of the run: run_folder.py
"""

import json
import logging
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Any

from sft_lightning.errors import RunFailedError, UserError
from sft_lightning.system.files import (
    atomic_folder,
    file_digest,
    remove_atomically,
    symlink_atomically,
    sync,
    unfinished,
)

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
TRAINER_STATE = "trainer_state.ckpt"
_STEP_FOLDER = re.compile(r"checkpoint-(\d+)")
_REPLACED = ".replaced"
# What safetensors and torch report when a file cannot be written.
_DISK_ERRORS = re.compile(r"IoError|I/O error|failed writing file|unexpected pos")
_WRITTEN_ATOMICALLY = (
    *("checkpoint-*", "final", "last", "best", "config*.yaml", "metrics.csv", "predictions.jsonl", "run_files.json"),
    *("evaluation/*/predictions.jsonl", "evaluation/*/metrics.json", "nonfinite/*/*", "report/*"),
)


def publish(folder: Path, write: Callable[[Path], None], about: dict[str, Any]) -> None:
    """Writes a folder with a manifest. It appears complete or not at all, even if the process dies.

    Args:
        folder: The final place. A folder with a manifest that is there is replaced; any other is moved aside.
        write: Fills the empty folder that it gets.
        about: Fields of the manifest beside the size and sha256 of each file.

    Raises:
        RunFailedError: If the disk is full, or the folder cannot be written for another reason.
    """
    try:
        with atomic_folder(folder, lambda: _make_way(folder)) as temporary:
            write(temporary)
            files = {}
            for path in _files(temporary):
                sync(path)
                files[path.relative_to(temporary).as_posix()] = _describe(path)
            manifest = temporary / MANIFEST
            manifest.write_text(json.dumps({**about, "files": files}, indent=2), encoding="utf-8")
            sync(manifest)
    except BaseException as error:
        if isinstance(error, OSError) or _DISK_ERRORS.search(str(error)):
            raise RunFailedError(f"'{folder}' could not be written: {_reason(error)}; {_before(folder)}") from error
        raise
    shutil.rmtree(_set_aside(folder), ignore_errors=True)


def _reason(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    # After a failed write torch raises a second error when it closes the file.
    before = error.__context__
    return _reason(before) if isinstance(before, OSError) else f"{' '.join(str(error).split()):.200}"


def _before(folder: Path) -> str:
    last = folder.parent / "last"
    if not (last / MANIFEST).is_file():
        return "there is no checkpoint before it"
    return f"'{last.resolve()}' is the last good checkpoint; resume with --ckpt_path auto"


def read_manifest(folder: Path) -> dict[str, Any]:
    """Returns the manifest of a folder. Raises UserError if it has none or it is unreadable."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        for name, expected in manifest["files"].items():
            if not {"size", "sha256"} <= expected.keys() or escapes_folder(name):
                raise ValueError(name)
        return manifest
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"checkpoint '{folder}' has no readable {MANIFEST}: {type(error).__name__}") from None


def verify(folder: Path) -> None:
    """Raises UserError with the first file of a folder that is missing, truncated or altered."""
    for name, expected in read_manifest(folder)["files"].items():
        path = folder / name
        if not path.is_file():
            raise UserError(f"checkpoint '{folder}' is damaged: {name} is missing")
        if path.stat().st_size != expected["size"]:
            raise UserError(
                f"checkpoint '{folder}' is damaged: {name} has {path.stat().st_size} of {expected['size']} bytes"
            )
        if _describe(path) != expected:
            raise UserError(f"checkpoint '{folder}' is damaged: {name} does not match its sha256")


def checkpoints(run: Path) -> list[Path]:
    """Returns the step folders of a run, oldest first. Restores folders that a crash left set aside, also ``final``."""
    for aside in [*run.glob(f".checkpoint-*{_REPLACED}"), *run.glob(f".final{_REPLACED}")]:
        home = run / aside.name.removeprefix(".").removesuffix(_REPLACED)
        if home.exists():
            shutil.rmtree(aside, ignore_errors=True)
        else:
            with suppress(FileNotFoundError):  # another rank was faster
                aside.rename(home)
    found = [(int(m[1]), p) for p in run.glob("checkpoint-*") if (m := _STEP_FOLDER.fullmatch(p.name))]
    return [path for _, path in sorted(found)]


def is_run(run: Path) -> bool:
    """Returns whether a folder holds a run: a saved config, a checkpoint or a final model."""
    return (run / "config.yaml").exists() or (run / "final").exists() or bool(checkpoints(run))


def find(run: Path, word: str) -> Path | None:
    """Returns the checkpoint that ``auto``, ``last`` or ``best`` refers to; None if ``auto`` finds none.

    ``auto`` takes the newest whose manifest verifies, and warns about each newer one that does not. It skips
    checkpoints that the run left behind when it was resumed from an earlier one.

    Raises:
        UserError: If the word is unknown, ``last`` or ``best`` has no checkpoint, or ``auto`` finds only damaged ones.
    """
    if word not in ("auto", "last", "best"):
        raise UserError(f"'{word}' does not name a checkpoint; choose auto, last or best")
    run = run.resolve()
    found = checkpoints(run)
    if word == "auto":
        return _newest_good(run, found)
    link = run / word
    if not link.exists():
        raise UserError(f"--ckpt_path {word}: there is no '{link}'; use auto to start fresh where there is none")
    return link.resolve()


def identity(folder: Path) -> str:
    """Returns a hash that is unique to a checkpoint, also among those of one step; empty if there is none."""
    manifest = folder / MANIFEST
    return file_digest(manifest) if manifest.is_file() else ""


def _newest_good(run: Path, found: list[Path]) -> Path | None:
    last = (run / "last").resolve()
    for folder in reversed(found):
        try:
            verify(folder)
        except UserError as error:
            logger.warning("%s; trying the one before it", error)
            continue
        # A run that dies between writing a checkpoint and moving `last` leaves one that follows `last` directly. Any
        # other one beyond `last` belongs to an abandoned branch.
        is_beyond = last in found and _step(folder) > _step(last)
        if is_beyond and read_manifest(folder).get("previous") != identity(last):
            logger.warning("checkpoint '%s' was left behind when the run resumed from an earlier one", folder)
            continue
        return folder
    if found:
        raise UserError(
            f"--ckpt_path auto: none of the {len(found)} checkpoints in '{run}' is good; name another folder as "
            "output_dir, or pass --overwrite without --ckpt_path to replace the run"
        )
    return None


def _step(folder: Path) -> int:
    return int(folder.name.removeprefix("checkpoint-"))


def point(link: Path, target: Path) -> None:
    """Makes a link in a run folder point at one of its checkpoints. At every moment it points at one."""
    symlink_atomically(link, target.name)


def prune(run: Path, keep_last: int) -> None:
    """Deletes all but the newest checkpoints of a run. It keeps those that ``last`` and ``best`` point at."""
    protected = {(run / name).resolve() for name in ("last", "best")}
    for folder in checkpoints(run)[:-keep_last]:
        if folder.resolve() not in protected:
            remove_atomically(folder)


def remove_unfinished(run: Path) -> None:
    """Deletes what dead processes left unfinished in a run folder. No other process may be writing there."""
    for path in [path for pattern in _WRITTEN_ATOMICALLY for path in unfinished(run, pattern)]:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def escapes_folder(name: str) -> bool:
    """Returns whether a relative name, read from a file, leads out of the folder that it belongs to."""
    return Path(name).is_absolute() or ".." in Path(name).parts


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.rglob("*")) if path.is_file())


def _describe(path: Path) -> dict[str, Any]:
    return {"size": path.stat().st_size, "sha256": file_digest(path)}


def _make_way(folder: Path) -> bool:
    """Moves the folder in the place of a new one aside: a checkpoint until the new one is there, others for good."""
    if (folder / MANIFEST).is_file():
        shutil.rmtree(_set_aside(folder), ignore_errors=True)
        folder.rename(_set_aside(folder))
    else:
        kept = next(p for n in count(1) if not (p := folder.with_name(f"{folder.name}.aside-{n}")).exists())
        logger.warning("'%s' was not written by a run; moved to '%s'", folder, kept)
        folder.rename(kept)
    return True


def _set_aside(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}{_REPLACED}")
