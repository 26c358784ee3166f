"""Write checkpoint folders atomically, verify them before use, and find them as ``auto``, ``last`` or ``best``.

checkpoints/sft/
  checkpoint-500/    a Hugging Face model folder, trainer_state.ckpt, manifest.json (written last)
  last -> checkpoint-1500    best -> checkpoint-1000
  final/             a model folder
  run_state.json     the current attempt: run_state.py
  run_files.json     the other files of the run: run_folder.py
"""

import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Any

from sft_lightning.checkpointing.run_state import Lineage, read_run_state
from sft_lightning.errors import RunFailedError, UserError
from sft_lightning.system.files import (
    atomic_folder,
    file_digest,
    remove_atomically,
    symlink_atomically,
    sync,
    unfinished,
    write_atomically,
)

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
TRAINER_STATE = "trainer_state.ckpt"
_STEP_FOLDER = re.compile(r"checkpoint-(\d+)")
_REPLACED = ".replaced"
# What safetensors and torch report when a file cannot be written.
_DISK_ERRORS = re.compile(r"IoError|I/O error|failed writing file|unexpected pos")
_WRITTEN_ATOMICALLY = (
    *("checkpoint-*", "checkpoint-*/manifest.json", "final", "last", "best", "run_files.json", "run_state.json"),
    *(".replaced-run", "config*.yaml", "metrics.csv", "predictions.jsonl"),
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
    earlier = branch(folder.parent)
    if not earlier:
        return "there is no checkpoint before it"
    return f"'{earlier[-1].resolve()}' is the last good checkpoint; resume with --ckpt_path auto"


def read_manifest(folder: Path) -> dict[str, Any]:
    """Returns the manifest of a folder. Raises UserError if it has none or it is unreadable."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        for name, expected in manifest["files"].items():
            if not {"size", "sha256"} <= expected.keys() or escapes_folder(name):
                raise ValueError(name)
        if not isinstance(manifest.get("step", 0), int) or not isinstance(manifest.get("metrics", {}), dict):
            raise ValueError(manifest)
        Lineage.of(manifest)
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


def branch(run: Path) -> list[Path]:
    """Returns the checkpoints of the run's current attempt and of those that it continues, oldest first.

    A checkpoint whose manifest cannot be read is among them, since its attempt is unknown.
    """
    state = read_run_state(run)
    return [folder for folder in checkpoints(run) if state is None or _may_belong_to(state.lineage, folder)]


def _may_belong_to(lineage: Lineage, folder: Path) -> bool:
    try:
        return lineage.includes(read_manifest(folder))
    except UserError:
        return True


def find(run: Path, word: str) -> Path | None:
    """Returns the checkpoint that ``auto``, ``last`` or ``best`` refers to; None if ``auto`` finds none.

    ``auto`` takes the newest of the current branch whose manifest verifies, and warns about each newer one that does
    not. The links ``last`` and ``best`` are for readers: a process that dies may leave them behind, so they count only
    where nothing else tells.

    Raises:
        UserError: If the word is unknown, ``last`` or ``best`` has no checkpoint, or ``auto`` finds only damaged ones.
    """
    if word not in ("auto", "last", "best"):
        raise UserError(f"'{word}' does not name a checkpoint; choose auto, last or best")
    run = run.resolve()
    if word == "auto":
        return _newest_good(run)
    found = best(run) if word == "best" else next(reversed(branch(run)), None)
    if found is None:
        raise UserError(f"--ckpt_path {word}: '{run}' has no such checkpoint; use auto to start fresh where none is")
    return found.resolve()


def best(run: Path) -> Path | None:
    """Returns the checkpoint with the best value of the run's monitored metric, the earliest of equal ones.

    All checkpoints on disk count, also those of an abandoned branch. Without a monitor the link ``best`` decides.
    """
    state = read_run_state(run)
    if state is None or state.monitor is None:
        link = run / "best"
        return run / link.readlink() if link.is_symlink() and (link / MANIFEST).is_file() else None
    scores = {folder: value for folder in checkpoints(run) if (value := score(folder, state.monitor)) is not None}
    choose = max if state.mode == "max" else min
    return choose(scores, key=lambda folder: scores[folder], default=None)


def score(folder: Path, monitor: str) -> float | None:
    """Returns the value of a validation metric of a checkpoint, None if it has none or it is NaN."""
    try:
        value = read_manifest(folder).get("metrics", {}).get(monitor)
    except UserError:
        return None
    return value if isinstance(value, int | float) and value == value else None


def add_metrics(folder: Path, metrics: Mapping[str, float]) -> None:
    """Adds the metrics of a validation of a checkpoint to its manifest."""
    manifest = {**read_manifest(folder), "metrics": dict(metrics)}
    with write_atomically(folder / MANIFEST) as file:
        json.dump(manifest, file, indent=2)


def holds_state_of(folder: Path, checkpoint: Path) -> bool:
    """Returns whether a model folder, such as ``final``, was written at the state of a checkpoint."""
    try:
        ours, theirs = read_manifest(folder), read_manifest(checkpoint)
    except UserError:
        return False
    return ours.get("step") == theirs.get("step") and Lineage.of(ours).includes(theirs)


def _newest_good(run: Path) -> Path | None:
    found = branch(run)
    for folder in reversed(found):
        try:
            verify(folder)
            return folder
        except UserError as error:
            logger.warning("%s; trying the one before it", error)
    if found:
        raise UserError(
            f"--ckpt_path auto: none of the {len(found)} checkpoints in '{run}' is good; name another folder as "
            "output_dir, or pass --overwrite without --ckpt_path to replace the run"
        )
    if others := checkpoints(run):
        raise UserError(
            f"--ckpt_path auto: the run in '{run}' has left the branch of its {len(others)} checkpoints; name the one "
            f"to resume from, such as --ckpt_path {others[-1]}"
        )
    return None


def point(link: Path, target: Path) -> None:
    """Makes a link in a run folder point at one of its checkpoints. At every moment it points at one."""
    if os.path.lexists(link) and not link.is_symlink():
        logger.warning("'%s' is not a link and stays as it is; move it away to have one", link)
        return
    symlink_atomically(link, target.name)


def prune(run: Path, keep_last: int) -> None:
    """Deletes all checkpoints but the newest of the current branch, and the best one.

    Keeps links, and folders without a manifest, which no run wrote.
    """
    kept = {*branch(run)[-keep_last:], best(run)}
    for folder in checkpoints(run):
        if folder not in kept and not folder.is_symlink() and (folder / MANIFEST).is_file():
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
    if (folder / MANIFEST).is_file() and not folder.is_symlink():
        shutil.rmtree(_set_aside(folder), ignore_errors=True)
        folder.rename(_set_aside(folder))
    else:
        kept = next(p for n in count(1) if not (p := folder.with_name(f"{folder.name}.aside-{n}")).exists())
        logger.warning("'%s' was not written by a run; moved to '%s'", folder, kept)
        folder.rename(kept)
    return True


def _set_aside(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}{_REPLACED}")
