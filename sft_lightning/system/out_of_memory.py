"""Out of memory: how to tell, how much there was, and what to change."""

import errno
import resource
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from sft_lightning.errors import RunFailedError

# Where no class tells: the allocator for CPUs, mapped files and oneDNN raise a plain RuntimeError.
_WORDS_OF_HOST = ("can't allocate memory", "cannot allocate memory", "not enough memory", "std::bad_alloc")
_WORDS = (*_WORDS_OF_HOST, "out of memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Returns whether an error says that memory did not suffice, of the device or of the host."""
    return isinstance(error, torch.OutOfMemoryError) or _says(error, _WORDS)


def host_lacks_memory(error: BaseException) -> bool:
    """Returns whether an error, or the one that it explains, says that the host's memory did not suffice."""
    reason = error.__cause__ if isinstance(error, RunFailedError) and error.__cause__ else error
    return _says(reason, _WORDS_OF_HOST)


def _says(error: BaseException, words: tuple[str, ...]) -> bool:
    if isinstance(error, MemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    text = str(error).lower()
    return not isinstance(error, RunFailedError) and any(some in text for some in words)


def peak_memory_bytes(device: torch.device) -> int:
    """Returns the most memory that tensors took on a CUDA device, or the process elsewhere, since it started."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return resident if sys.platform == "darwin" else resident * 1024  # kilobytes everywhere but on macOS


@contextmanager
def translate_out_of_memory(
    where: Callable[[], str], advice: Callable[[], str], device: Callable[[], torch.device]
) -> Iterator[None]:
    """Raises ``RunFailedError`` in place of an error that says that memory did not suffice.

    Args:
        where: Returns what the memory was needed for.
        advice: Returns what to change.
        device: Returns where tensors are.

    Raises:
        RunFailedError: With all three in one line; the error itself is chained to it.
    """
    try:
        yield
    except (RuntimeError, MemoryError, OSError) as error:
        if not is_out_of_memory(error):
            raise
        peak = f"peak memory {peak_memory_bytes(device()) / 1e9:.2f} GB"
        raise RunFailedError(f"out of memory in {where()}; {peak}. {advice()}") from error


def generation_advice(generator: Any) -> str:
    """Returns what to change where answers do not fit."""
    shown = [f"{name} (now {getattr(generator, name)})" for name in _OF_A_GENERATOR if hasattr(generator, name)]
    return f"Lower the generator's {' or '.join(shown or _OF_A_GENERATOR)}, or shorten the prompts"


_OF_A_GENERATOR = ("max_new_tokens", "batch_tokens")
