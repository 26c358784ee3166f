"""Filter log lines and warnings, and shorten parser errors to one line."""

import logging
import re
import sys
import warnings

from sft_lightning.models.loading import hide_progress_bars

_NOISE = ("`weights_only` was not set", "\N{ELECTRIC LIGHT BULB} Tip", "GPU available", "TPU available", "Seed set to")
_NOISY_WARNINGS = (
    "LightningCLI's args parameter",
    ".*LeafSpec",
    "Couldn't infer the batch indices",  # predictions.jsonl does not need them
    "Total length of `list` across ranks is zero",  # runs without validation data
    "It is recommended to use `self.log.*sync_dist=True",  # logged values are equal on all ranks
)


class _CurrentStderr(logging.StreamHandler):
    """Writes to the current sys.stderr, which a progress bar replaces while it is shown."""

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)


def set_up_logging() -> None:
    """Logs messages without prefixes and hides those that a user cannot act on."""
    handler = _CurrentStderr()
    handler.addFilter(lambda record: not record.getMessage().startswith(_NOISE))
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[handler])
    logging.getLogger("httpx").setLevel(logging.WARNING)
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).handlers = [handler]
        logging.getLogger(name).propagate = False
    for message in _NOISY_WARNINGS:
        warnings.filterwarnings("ignore", message)
    hide_progress_bars()


def shorten(message: str) -> str:
    r"""Returns a jsonargparse message as one line: the key, the value and what was expected.

    Example:
        >>> shorten("Value  <class 'pathlib.Path'> is\n not a number")
        'Value Path is not a number'
    """
    line = re.sub(r"\s+", " ", message).strip()
    union = re.fullmatch(
        r"(.*?):(?: -.*?)? ?-? ?Does not validate against .*? Errors: (.*) Given value type: .* Given value: (.*)", line
    )
    if union:
        key, errors, value = union.groups()
        line = f"{key}: '{value}' is not accepted. {errors}"
    return re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", line).replace("typing.Literal", "one of ")
