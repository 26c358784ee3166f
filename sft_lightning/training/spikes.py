"""Spikes of the gradient norm: steps whose norm is far above that of the steps before."""

from collections import deque
from collections.abc import Iterable
from math import isfinite
from statistics import median

# A median over 50 steps forgets a change of level within 25, and takes no notice of single spikes.
WINDOW_STEPS = 50
# Of a run's first steps there is too little to compare with.
MIN_STEPS = 10
FACTOR = 5.0


class NormSpikes:
    """A rolling median of recent gradient norms, on the host.

    Args:
        norms: The recent norms of the run that goes on, oldest first.
    """

    def __init__(self, norms: Iterable[float] = ()) -> None:
        self._norms = deque(norms, maxlen=WINDOW_STEPS)

    @property
    def norms(self) -> list[float]:
        """The recent norms, oldest first: all that the next steps are judged by."""
        return list(self._norms)

    @property
    def median(self) -> float:
        """The median of the recent norms; NaN where there is none."""
        return median(self._norms) if self._norms else float("nan")

    def add(self, norm: float) -> float:
        """Returns how many times the median of the steps before a norm is, where that makes it a spike, else 0.

        Norms that are not finite are left out.
        """
        if not isfinite(norm):
            return 0.0
        usual = self.median
        is_spike = len(self._norms) >= MIN_STEPS and 0 < FACTOR * usual < norm
        self._norms.append(norm)
        return norm / usual if is_spike else 0.0
