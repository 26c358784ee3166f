"""Watch the gradient norm for spikes: steps whose norm is far above that of recent steps."""

import logging
from collections import deque
from collections.abc import Iterable
from math import isfinite
from statistics import median

from lightning.pytorch import Trainer

from sft_lightning.distributed.collectives import all_gather_distinct
from sft_lightning.lightning_compat.trainer import logs_this_step
from sft_lightning.training.step import MicroBatchLosses, name_sources

logger = logging.getLogger(__name__)

# A median over 50 steps follows a change of level within 25 steps, and ignores single spikes.
WINDOW_STEPS = 50
# A run's first steps have too few earlier ones to compare with.
MIN_STEPS = 10
FACTOR = 5.0


class NormSpikes:
    """A rolling median of recent gradient norms, on the host.

    Args:
        norms: The recent norms of the resumed run, oldest first.
    """

    def __init__(self, norms: Iterable[float] = ()) -> None:
        self._norms = deque(norms, maxlen=WINDOW_STEPS)

    @property
    def norms(self) -> list[float]:
        """The recent norms, oldest first: the whole state."""
        return list(self._norms)

    @property
    def median(self) -> float:
        """The median of the recent norms; NaN if there are none."""
        return median(self._norms) if self._norms else float("nan")

    def add(self, norm: float) -> float:
        """Adds a norm. Returns its ratio to the median of the steps before if that makes it a spike, else 0.

        Ignores norms that are not finite.
        """
        if not isfinite(norm):
            return 0.0
        usual = self.median
        is_spike = len(self._norms) >= MIN_STEPS and 0 < FACTOR * usual < norm
        self._norms.append(norm)
        return norm / usual if is_spike else 0.0


def log_spike(trainer: Trainer, norm: float, ratio: float, micro_batches: Iterable[MicroBatchLosses]) -> None:
    """Warns of a spike with the rows of the step, and logs it. All processes must call this.

    Args:
        trainer: Before the step.
        norm: Gradient norm of the step.
        ratio: From ``NormSpikes.add``.
        micro_batches: Of the step, in this process.
    """
    step = trainer.global_step + 1
    sources = all_gather_distinct([row for _, batch in micro_batches for row in batch.sources], trainer.world_size)
    if not trainer.is_global_zero:
        return
    logger.warning(
        "gradient norm %.4g in optimizer step %d is %.1f times the median of recent steps. Examples: %s",
        norm,
        step,
        ratio,
        name_sources(sources),
    )
    if not logs_this_step(trainer, step):
        for each in trainer.loggers:  # a spike is logged even between logged steps
            each.log_metrics({"train/grad_norm_spike": ratio}, step=step)
