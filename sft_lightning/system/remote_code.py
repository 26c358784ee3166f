"""Call the loaders of transformers so that they never run the code that a model folder or a repository brings."""

from collections.abc import Callable
from typing import Any, TypeVar

Loaded = TypeVar("Loaded")


def without_remote_code(load: Callable[..., Loaded], *arguments: Any, **options: Any) -> Loaded:
    """Returns what a loader such as ``AutoConfig.from_pretrained`` returns. Every call of one goes through here.

    Without the argument, transformers asks on the terminal whether it may run the code, and runs it after "y".
    """
    return load(*arguments, trust_remote_code=False, **options)
