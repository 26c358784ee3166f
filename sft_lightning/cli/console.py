"""Filter log lines and warnings."""

import logging
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
