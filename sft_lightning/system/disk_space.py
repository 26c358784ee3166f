"""Check for free disk space before writing."""

import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from sft_lightning.errors import RunFailedError

# Config, tokenizer, manifest, the state of loops and callbacks, and partly filled blocks.
_OVERHEAD_BYTES = 4 * 2**20


def size_bytes(content: Any) -> int:
    """Returns the size of all tensors in nested mappings, lists and tuples. A shared storage counts once."""
    storages = (tensor.untyped_storage() for tensor in _tensors(content))
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def require_space(folder: Path, needed_bytes: int) -> None:
    """Raises RunFailedError if a folder does not fit on its disk.

    Args:
        folder: The folder to write. It need not exist; its parent decides which file system counts.
        needed_bytes: Size of its tensors. A few MiB are added for everything else.
    """
    free = free_bytes(folder.parent)
    needed = needed_bytes + _OVERHEAD_BYTES
    if free < needed:
        raise RunFailedError(
            f"'{folder}' needs {_mebibytes(needed)} and '{folder.parent}' has {_mebibytes(free)} free; nothing was "
            "written, and earlier checkpoints are untouched: free space, or keep fewer with checkpoint.keep_last, and "
            "resume with --ckpt_path auto"
        )


def free_bytes(folder: Path) -> int:
    """Returns the free bytes, available to this user, on the file system that a folder is on, or would be on."""
    existing = next(each for each in (folder, *folder.absolute().parents) if each.exists())
    return shutil.disk_usage(existing).free


def describe_shortage(run: Path, checkpoint_bytes: int, num_checkpoints: int) -> str | None:
    """Returns a one-line warning if the checkpoints of a run will not all fit, else None."""
    free, needed = free_bytes(run), num_checkpoints * (checkpoint_bytes + _OVERHEAD_BYTES)
    if free >= needed:
        return None
    return (
        f"{num_checkpoints} checkpoints of about {_mebibytes(checkpoint_bytes)} are to come and '{run}' has "
        f"{_mebibytes(free)} free: set checkpoint.keep_last, or save less often with checkpoint.every_n_train_steps"
    )


def _tensors(content: Any) -> Iterator[Tensor]:
    if isinstance(content, Tensor):
        yield content
    elif isinstance(content, Mapping):
        yield from _tensors(list(content.values()))
    elif isinstance(content, list | tuple):
        for each in content:
            yield from _tensors(each)


def _mebibytes(number: int) -> str:
    return f"{number / 2**20:,.0f} MiB"
