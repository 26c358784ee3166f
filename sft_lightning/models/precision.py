"""Resolve the Trainer's precision to the dtypes of parameters and of matrix products."""

from dataclasses import dataclass

import torch

_DTYPES = {"bf16": torch.bfloat16, "16": torch.float16, "32": torch.float32, "64": torch.float64}
_SHORT_NAMES = {"bf16": "bf16-mixed", "16": "16-mixed", "32": "32-true", "64": "64-true"}


@dataclass(frozen=True, slots=True)
class Precision:
    """The dtypes of a Trainer precision. Make one with :meth:`named`.

    Attributes:
        name: The Trainer's name, such as ``bf16-mixed``.
        parameter_dtype: Of parameters, their gradients and the optimizer's averages.
        autocast_dtype: Of matrix products under autocast; None without autocast.
    """

    name: str
    parameter_dtype: torch.dtype
    autocast_dtype: torch.dtype | None

    @classmethod
    def named(cls, name: object) -> "Precision":
        """Returns the precision that the Trainer knows by a name or number; None and unknown ones count as float32.

        Example:
            >>> precision = Precision.named("bf16-mixed")
            >>> precision.parameter_dtype, precision.matmul_dtype
            (torch.float32, torch.bfloat16)
        """
        full_name = "32-true" if name is None else _SHORT_NAMES.get(str(name), str(name))
        bits, _, kind = full_name.partition("-")
        dtype = _DTYPES.get(bits, torch.float32)
        if kind == "mixed":
            return cls(full_name, torch.float32, dtype)
        return cls(full_name, dtype, None)

    @property
    def matmul_dtype(self) -> torch.dtype:
        """The dtype of matrix products and activations."""
        return self.autocast_dtype or self.parameter_dtype

    @property
    def is_16_bit(self) -> bool:
        """Whether activations are bfloat16 or float16."""
        return self.matmul_dtype.itemsize == 2

    @property
    def scales_gradients(self) -> bool:
        """Whether a gradient scaler is in use, which skips the steps whose float16 gradients overflow."""
        return self.autocast_dtype == torch.float16
