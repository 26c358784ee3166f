"""Whether there is room for what a run will write, asked before it is written."""

import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from sft_lightning.errors import RunFailedError

# Config, tokenizer, manifest, the state of loops and callbacks, and blocks that are not full.
_OVERHEAD_BYTES = 4 * 2**20


def size_bytes(content: Any) -> int:
    """Returns the bytes of all tensors in nested mappings, lists and tuples. A shared storage counts once."""
    storages = (tensor.untyped_storage() for tensor in _tensors(content))
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def require_space(folder: Path, needed_bytes: int) -> None:
    """Raises RunFailedError if what is about to be written does not fit.

    Args:
        folder: What will be written, which need not exist; the file system is that of its parent.
        needed_bytes: Of its tensors. A few MiB for everything else are added.
    """
    free = free_bytes(folder.parent)
    needed = needed_bytes + _OVERHEAD_BYTES
    if free < needed:
        raise RunFailedError(
            f"'{folder}' needs {_mebibytes(needed)} and '{folder.parent}' has {_mebibytes(free)} free; nothing was "
            "written, and earlier checkpoints are untouched: free space, or keep fewer with checkpoint.keep_last, and "
            "go on with --ckpt_path auto"
        )


def free_bytes(folder: Path) -> int:
    """Returns the bytes that this user may still write on the file system of a folder that exists."""
    return shutil.disk_usage(folder).free


def describe_shortage(run: Path, checkpoint_bytes: int, num_checkpoints: int) -> str | None:
    """Returns one line that warns of a run whose checkpoints will not all fit, None where they will."""
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
