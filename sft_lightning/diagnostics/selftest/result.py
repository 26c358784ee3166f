"""Define the outcome of a selftest check and compute differences of gradients."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

# Relative to the norm of the whole gradient. A smaller tensor is mostly rounding and counts only in the whole.
_TINY = 1e-6


@dataclass(frozen=True, slots=True)
class Outcome:
    """The outcome of a check: one line of the selftest's table.

    Attributes:
        check: What was compared.
        difference: The largest relative difference; None if the check could not run.
        allowed: The largest difference that passes; 0 requires equality bit for bit.
        note: Where the largest difference is, or why the check could not run.
    """

    check: str
    difference: float | None
    allowed: float
    note: str

    @property
    def failed(self) -> bool:
        return self.difference is not None and not self.difference <= self.allowed

    @property
    def verdict(self) -> str:
        return "not tried" if self.difference is None else "FAIL" if self.failed else "pass"


def gradient_difference(
    gradients: Mapping[str, Tensor], reference: Mapping[str, Tensor], *, each_tensor: bool
) -> tuple[float, str]:
    """Returns the largest ``||g - g_ref|| / ||g_ref||`` and the tensor that it belongs to.

    Args:
        gradients: Gradients by parameter name; a missing one counts as zero.
        reference: Reference gradients, in the same form.
        each_tensor: Compares each tensor as well as the whole gradient. Otherwise compares only the whole: in 16 bits,
            a tensor whose gradient is a small difference of large terms is mostly rounding.
    """
    squares: dict[str, tuple[float, float]] = {}
    for name in sorted(gradients.keys() | reference.keys()):
        one, other = gradients.get(name), reference.get(name)
        own = torch.zeros(()) if one is None else one.double()
        expected = torch.zeros(()) if other is None else other.double()
        squares[name] = float((own - expected).square().sum()), float(expected.square().sum())
    total = math.sqrt(sum(square for _, square in squares.values()))
    found = [(_ratio(math.sqrt(sum(square for square, _ in squares.values())), total), "the whole gradient")]
    if each_tensor:
        found += [
            (_ratio(math.sqrt(difference), math.sqrt(square)), f"the gradient of {name}")
            for name, (difference, square) in squares.items()
            if not math.sqrt(square) <= _TINY * total
        ]
    return max(found)


def relative_difference(value: float, reference: float) -> float:
    """Returns ``|value - reference| / |reference|``; infinite if either is NaN."""
    return _ratio(abs(value - reference), abs(reference))


def _ratio(difference: float, size: float) -> float:
    if difference == 0:
        return 0.0
    ratio = difference / size if size else math.inf
    return math.inf if math.isnan(ratio) else ratio
