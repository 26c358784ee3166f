"""Turn out-of-memory errors into one line of advice."""

import errno
import resource
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from sft_lightning.errors import RunFailedError

# The CPU allocator, mapped files and oneDNN raise a plain RuntimeError: only the text identifies it.
_HOST_MESSAGES = ("can't allocate memory", "cannot allocate memory", "not enough memory", "std::bad_alloc")
_MESSAGES = (*_HOST_MESSAGES, "out of memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Returns whether an error reports that the device or the host is out of memory."""
    return isinstance(error, torch.OutOfMemoryError) or _says(error, _MESSAGES)


def host_lacks_memory(error: BaseException) -> bool:
    """Returns whether an error, or the one that it explains, reports that the host is out of memory."""
    reason = error.__cause__ if isinstance(error, RunFailedError) and error.__cause__ else error
    return _says(reason, _HOST_MESSAGES)


def _says(error: BaseException, words: tuple[str, ...]) -> bool:
    if isinstance(error, MemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    text = str(error).lower()
    return not isinstance(error, RunFailedError) and any(some in text for some in words)


def peak_memory_bytes(device: torch.device) -> int:
    """Returns the peak memory of tensors on a CUDA device, or else of the whole process, since its start."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return resident if sys.platform == "darwin" else resident * 1024  # kilobytes, except on macOS


@contextmanager
def translate_out_of_memory(
    where: Callable[[], str], advice: Callable[[], str], device: Callable[[], torch.device]
) -> Iterator[None]:
    """Turns an out-of-memory error into ``RunFailedError``.

    Args:
        where: Returns the operation that ran out of memory.
        advice: Returns what to change.
        device: Returns the device of the tensors.

    Raises:
        RunFailedError: One line with where, peak memory and advice; the original error is its cause.
    """
    try:
        yield
    except (RuntimeError, MemoryError, OSError) as error:
        if not is_out_of_memory(error):
            raise
        peak = f"peak memory {peak_memory_bytes(device()) / 1e9:.2f} GB"
        raise RunFailedError(f"out of memory in {where()}; {peak}. {advice()}") from error


def generation_advice(generator: Any) -> str:
    """Returns what to change when generation runs out of memory."""
    shown = [f"{name} (now {getattr(generator, name)})" for name in _GENERATOR_SETTINGS if hasattr(generator, name)]
    return f"Lower the generator's {' or '.join(shown or _GENERATOR_SETTINGS)}, or shorten the prompts"


_GENERATOR_SETTINGS = ("max_new_tokens", "batch_tokens")
